"""Every tab in a real browser, over models that do exactly what they are told."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from runtime.api import Done, EncodedImage, Message
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.engine import Engine
from runtime.latency import timing
from runtime.profiler import ProfileOptions
from runtime.runner import EngineRunner, Runner
from tests.demo import browser as chrome
from tests.demo import cut
from tests.demo.browser import Served, Visit, open_page, stage_ms, total_ms
from tests.demo.conftest import GatedBackend

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(chrome.missing()), reason=chrome.missing() or "present")]
TABS = ("Chat", "Compare", "Live", "Profile", "About")
MS = 1_000_000


def picture(colour: str, size: tuple[int, int] = (40, 30)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def endless() -> FakeBackend:
    """Talks for a minute unless it is stopped, except about what is "mine"."""

    def reply(messages: Sequence[Message]) -> str:
        return "7" if "mine" in str(messages[-1].content[-1]) else "x" * 6_000

    return FakeBackend(FakeScript(reply, step_ns=50 * MS, context_length=100_000))


def images_of(served: Served, name: str, request: int) -> list[bytes]:
    messages = served.watched[name].asked[request]
    return [part.data for message in messages for part in message.content if isinstance(part, EncodedImage)]


# Chat


def test_several_images_are_one_question(chromium: Any, visits: list[Any]) -> None:
    served, visit = open_page(visits, chromium, fake=FakeBackend(FakeScript("7")))
    red, blue = picture("red"), picture("blue")
    visit.upload_all(
        {"name": "red.png", "mimeType": "image/png", "buffer": red},
        {"name": "blue.png", "mimeType": "image/png", "buffer": blue},
    )
    visit.page.locator("#picture .gallery-item").nth(1).wait_for()
    visit.ask("What differs?")
    visit.wait_answered(1)
    assert images_of(served, "fake", 0) == [red, blue]
    assert visit.page.locator("#chat img.asked").count() == 2
    visit.page.get_by_role("button", name="Delete image").first.click()
    visit.page.locator("#picture .gallery-item").nth(1).wait_for(state="detached")
    visit.ask("And now?")
    visit.wait_answered(2)
    assert images_of(served, "fake", 1) == [red, blue, blue]  # the conversation, then what is left


def test_controls_reach_the_engine(chromium: Any, visits: list[Any], png: bytes) -> None:
    served, visit = open_page(visits, chromium, fake=FakeBackend(FakeScript("7")))
    visit.show_image("digits.png", png)
    visit.page.get_by_role("button", name="Answer settings").click()
    for place, value in (("#length", "9"), ("#temperature", "0.7"), ("#top-k", "5")):
        visit.set_number(place, value)
    visit.page.get_by_label("Seed").fill("11")
    visit.page.get_by_label("Stop at these words").fill("END")
    visit.page.get_by_label("Earlier questions and answers").uncheck()
    visit.ask("Which digit?")
    visit.wait_answered(1)
    visit.ask("Again?")
    visit.wait_answered(2)
    used = served.watched["fake"].samplings[0]
    assert used is not None
    assert (used.max_new_tokens, used.temperature, used.top_k, used.seed) == (9, 0.7, 5, 11)
    assert used.stop == ("END",)
    assert [len(messages) for messages in served.watched["fake"].asked] == [1, 1]  # no conversation asked for


def test_figures_on_the_page_are_the_engines(chromium: Any, visits: list[Any], png: bytes) -> None:
    script = FakeScript("seven", prepare_ns=3 * MS, encode_ns=11 * MS, prefill_ns=17 * MS, step_ns=5 * MS)
    served, visit = open_page(visits, chromium, fake=FakeBackend(script))
    visit.show_image("digits.png", png)
    visit.ask("Which digit?")
    shown = visit.wait_answered(1)
    events = [event for event in served.watched["fake"].events[0] if not hasattr(event, "error")]
    measured = timing(events)  # type: ignore[arg-type]
    assert total_ms(shown) == pytest.approx(measured.e2el_ms, abs=1e-5)
    stages = stage_ms(shown)
    assert {stage: ms for stage, ms in stages.items() if ms} == pytest.approx(measured.stages_ms, abs=1e-5)
    assert sum(stages.values()) == pytest.approx(measured.e2el_ms, rel=0.05)
    for figure in ("MBU", "energy"):  # a fake does not say what it reads, and there is no meter
        assert shown.locator(f"[data-figure='{figure}'] dd").inner_text() == "n/a"


def test_fifty_megapixels_are_refused_in_a_sentence(chromium: Any, visits: list[Any], png: bytes) -> None:
    _, visit = open_page(visits, chromium, fake=FakeBackend(FakeScript("7")))
    visit.upload("huge.png", picture("white", (10_000, 5_000)))
    assert "pixels" in visit.notice("#image-notice")
    visit.page.locator("#picture img").wait_for(state="detached")
    visit.show_image("digits.png", png)
    visit.ask("Which digit?")
    visit.wait_answered(1)


def test_two_people_with_different_images_at_once(chromium: Any, visits: list[Any]) -> None:
    gated = GatedBackend(FakeScript("ab"), "gated")
    served, first = open_page(visits, chromium, gated=gated)
    second = Visit(chromium, served.url)
    visits.append(second)
    red, blue = picture("red"), picture("blue")
    first.show_image("red.png", red)
    second.show_image("blue.png", blue)
    first.ask("Mine?")
    first.wait_said("a")
    second.ask("Yours?")  # waits for the first
    gated.let(10)
    for visit in (first, second):
        visit.wait_answered(1)
        visit.wait_said("ab")
        assert visit.page.locator("#chat img.asked").count() == 1
    assert (images_of(served, "gated", 0), images_of(served, "gated", 1)) == ([red], [blue])


def test_one_who_waits_can_stop(chromium: Any, visits: list[Any]) -> None:
    gated = GatedBackend(FakeScript("ab"), "gated")
    served, first = open_page(visits, chromium, gated=gated)
    second = Visit(chromium, served.url)
    visits.append(second)
    first.show_image("red.png", picture("red"))
    second.show_image("blue.png", picture("blue"))
    first.ask("Mine?")
    first.wait_said("a")
    second.ask("Yours?")
    second.wait_said("Waiting for the model …")
    second.page.locator("#stop").click()
    second.wait_said("Stopped before its turn came.")
    gated.let(10)
    first.wait_answered(1)
    second.ask("And now?")
    second.wait_answered(1)
    assert len(served.watched["gated"].asked) == 2


def test_a_closed_tab_stops_the_engine_and_the_next_is_served(chromium: Any, visits: list[Any], png: bytes) -> None:
    served, visit = open_page(visits, chromium, fake=endless())
    other = Visit(chromium, served.url)
    visits.append(other)
    for person in (visit, other):
        person.show_image("digits.png", png)
    visit.set_length(512)
    visit.ask("Which digit?")
    visit.page.locator("#chat [data-testid=bot]", has_text="xx").wait_for()
    other.ask("And mine?")
    visit.close()
    engine = served.watched["fake"]
    assert engine.ended[0].wait(60)
    done = engine.events[0][-1]
    assert isinstance(done, Done)
    assert done.finish == "cancelled"
    other.wait_answered(1)
    other.wait_said("7")


@pytest.mark.skipif(bool(cut.missing()), reason=cut.missing() or "present")
def test_a_cut_network_stops_the_engine() -> None:
    assert cut.measure()["finish"] == "cancelled"


# Compare


def test_two_models_answer_side_by_side_one_after_the_other(chromium: Any, visits: list[Any], png: bytes) -> None:
    served, visit = open_page(
        visits, chromium, a=FakeBackend(FakeScript("7"), "a"), b=FakeBackend(FakeScript("9"), "b")
    )
    visit.tab("Compare")
    visit.page.locator("#compare").click()
    assert "Choose an image first" in visit.notice("#compare-notice")
    visit.tab("Chat")
    visit.show_image("digits.png", png)
    visit.tab("Compare")
    visit.page.get_by_label("Question about the images").fill("Which digit?")
    visit.page.locator("#compare").click()
    verdict = visit.page.locator("#columns .verdict")
    verdict.wait_for()
    assert "The answers differ" in verdict.inner_text()
    columns = visit.page.locator("#columns .answer-column")
    assert [columns.nth(i).locator(".column-answer").inner_text() for i in range(2)] == ["7", "9"]
    assert visit.page.locator("#columns tbody .lat, #columns .lat").count() == 2
    assert served.loads == [("a", []), ("b", [])]  # the first was freed before the second came
    table, cards = (visit.page.locator(f"#columns {part}").bounding_box() for part in (".wide", ".answer-columns"))
    assert table is not None
    assert cards is not None
    assert cards["y"] - (table["y"] + table["height"]) >= 10  # they do not touch
    left = [columns.nth(i).evaluate("e => e.getBoundingClientRect().left") for i in range(2)]
    assert left[0] < left[1]  # side by side
    visit.page.locator("#compare:not([disabled])").wait_for()
    visit.tab("Chat")
    visit.ask("Which digit?")
    visit.wait_answered(1)  # the chat's own model is loaded again
    visit.wait_said("7")


# Profile


class SlowRunner(EngineRunner):
    """Waits for a permit before every request after the first `free` ones."""

    permits = threading.Semaphore(0)
    free = 10

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.free > 0:
            self.free -= 1
        elif not self.permits.acquire(timeout=60):
            raise RuntimeError("no permit within a minute")
        return super().ask({**request, "bandwidth_s": 0.01} if "bandwidth_s" in request else request)


def open_runner(artifact: str, options: ProfileOptions) -> Runner:
    return SlowRunner(Engine(FakeBackend(FakeScript("7"), artifact)), 0.1)


@pytest.fixture
def profiled(chromium: Any, visits: list[Any], tmp_path: Path) -> Iterator[tuple[Served, Visit]]:
    SlowRunner.permits = threading.Semaphore(0)
    served = Served({"opener": open_runner, "folder": tmp_path / "profiles"}, a=FakeBackend(), b=FakeBackend())
    visits.append(served)
    visit = Visit(chromium, served.url)
    visits.append(visit)
    visit.tab("Profile")
    visit.page.get_by_label("b · ONNX Runtime").last.check()
    visit.set_number("#requests", "4")
    yield served, visit
    SlowRunner.permits.release(100_000)


def test_a_profile_shows_its_progress_and_can_be_taken_home(profiled: tuple[Served, Visit]) -> None:
    served, visit = profiled
    visit.page.locator("#profile").click()
    bar = visit.page.locator("#profile-progress progress")
    bar.wait_for()
    visit.page.wait_for_function("document.querySelector('#profile-progress progress')?.value >= 10")
    seen = bar.evaluate("e => [e.value, e.max]")
    SlowRunner.permits.release(20)
    visit.page.wait_for_function(f"document.querySelector('#profile-progress progress')?.value > {seen[0]}")
    assert served.engines.info("a") is None  # nothing else in memory meanwhile
    SlowRunner.permits.release(100_000)
    report = visit.page.frame_locator("iframe.report")
    report.get_by_role("heading", name="Where the time goes").wait_for()
    assert report.locator("svg").count() >= 3
    with visit.page.expect_download() as download:
        visit.page.locator("#download-json").click()
    result = json.loads(Path(download.value.path()).read_text())
    assert [p["counts"]["requests"] for p in result["profiles"]] == [4, 4]
    with visit.page.expect_download() as download:
        visit.page.locator("#download-html").click()
    assert "<svg" in Path(download.value.path()).read_text()


def test_a_profile_stops_when_told(profiled: tuple[Served, Visit]) -> None:
    _, visit = profiled
    visit.page.locator("#profile").click()
    visit.page.wait_for_function("document.querySelector('#profile-progress progress')?.value >= 10")
    visit.page.locator("#profile-stop").click()
    visit.page.locator("#profile-stop[disabled]").wait_for()
    SlowRunner.permits.release(1)  # the request in flight
    visit.page.get_by_text("Stopped; nothing was kept.").wait_for()
    visit.page.locator("#profile:not([disabled])").wait_for()


# Live


def test_a_camera_is_answered_and_its_frames_are_counted(chromium: Any, visits: list[Any]) -> None:
    served, visit = open_page(visits, chromium, fake=FakeBackend(FakeScript("a green face", encode_ns=400 * MS)))
    visit.tab("Live")
    visit.page.locator("#camera [title='grant webcam access'] button").click()
    visit.page.get_by_label("capture photo").click()
    visit.page.locator("#live .live-answer", has_text="a green face").wait_for()
    counted = "(name) => Number(document.querySelector(`#live-counts [data-count='${name}'] dd`)?.innerText)"
    for name, least in (("answered", 2), ("dropped", 1)):
        visit.page.wait_for_function(f"({counted})('{name}') >= {least}")
    told = {name: visit.page.evaluate(counted, name) for name in ("frames", "answered", "dropped")}
    assert told["frames"] >= told["answered"] + told["dropped"]
    assert "Time to answer" in visit.page.locator("#live").inner_text()
    shown = {images_of(served, "fake", index)[0] for index in range(2)}
    assert len(shown) == 2  # the picture moves: another frame each time
    visit.page.get_by_label("capture photo").click()  # off
    assert visit.page.locator("#live .live-answer").is_visible()


# The page as a whole


def test_all_tabs_ask_nobody_else_and_nothing_fails(chromium: Any, visits: list[Any]) -> None:
    served, visit = open_page(visits, chromium, fake=FakeBackend())
    for name in TABS:
        visit.tab(name)
    visit.page.locator("#about .about, #about .warning").first.wait_for()
    assert visit.hosts == {urlsplit(served.url).netloc}
    assert visit.failed == []


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_tabs_fit_a_phone_and_a_desk_in_dark_and_light(
    chromium: Any, visits: list[Any], width: int, scheme: str
) -> None:
    served = Served(None, fake=FakeBackend())
    visits.append(served)
    visit = Visit(chromium, served.url, width, 844, color_scheme=scheme)
    visits.append(visit)
    ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(ground[:3]) < 384) == (scheme == "dark")
    for name in TABS:
        visit.tab(name)
        assert visit.page.evaluate("document.documentElement.scrollWidth") == width, name
        assert visit.page.evaluate("document.querySelector('.gradio-container').clientWidth") == width, name
        nameless = visit.page.evaluate(
            """() => [...document.querySelectorAll('main button, main input, main textarea, main iframe')]
                .filter(e => e.checkVisibility() && e.type !== 'file')
                .filter(e => !(e.innerText || e.ariaLabel || e.title || e.placeholder || e.labels?.length))
                .map(e => e.outerHTML)"""
        )
        assert nameless == [], name


def test_everything_works_from_the_keyboard(chromium: Any, visits: list[Any], png: bytes) -> None:
    served, visit = open_page(
        visits, chromium, a=FakeBackend(FakeScript("7"), "a"), b=FakeBackend(FakeScript("9"), "b")
    )
    visit.show_image("digits.png", png)
    visit.page.get_by_label("Question", exact=True).focus()
    visit.page.keyboard.type("Which digit?")
    visit.page.keyboard.press("Enter")
    visit.wait_answered(1)
    visit.page.get_by_role("tab", name="Chat").focus()
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press("Enter")
    visit.page.get_by_label("Question about the images").focus()
    visit.page.keyboard.type("Which digit?")
    visit.page.keyboard.press("Enter")
    visit.page.locator("#columns .verdict").wait_for()
    assert [name for name, _ in served.loads] == ["a", "b"]
