"""The page in a real browser: first with models that stand still on command, then as a person starts it."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from demo.catalogue import named
from demo.session import Engines
from runtime import load
from runtime.api import STAGES, EncodedImage
from runtime.backend_fake import FakeBackend, FakeScript
from tests.demo import browser as chrome
from tests.demo.browser import Served, Visit, open_page, stage_ms, total_ms
from tests.demo.conftest import GatedBackend

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(chrome.missing()), reason=chrome.missing() or "present")]
ROOT = Path(__file__).parents[2]


def test_text_appears_while_the_model_still_works(chromium: Any, visits: list[Any], png: bytes) -> None:
    gated = GatedBackend(FakeScript("seven"), "gated")
    _, visit = open_page(visits, chromium, gated=gated)
    visit.show_image("digits.png", png)
    visit.ask("Which digit?")
    visit.wait_said("s")  # prefill gives the first token; every other needs a permit
    gated.let(2)
    visit.wait_said("sev")
    assert visit.page.locator("#chat .lat").count() == 0
    assert visit.page.locator("#ask").is_disabled()
    gated.let(3)
    breakdown = visit.wait_answered(1)
    visit.wait_said("seven")
    assert breakdown.get_attribute("data-finish") == "stop"


def test_stop_ends_the_answer_in_the_engine(chromium: Any, visits: list[Any], png: bytes) -> None:
    gated = GatedBackend(FakeScript("a very long answer"), "gated")
    served, visit = open_page(visits, chromium, gated=gated)
    visit.show_image("digits.png", png)
    visit.ask("Which digit?")
    visit.wait_said("a")
    visit.page.locator("#stop").click()
    assert served.watched["gated"].cancels[0].wait(60)  # through the page, the server and the model's process
    gated.let(1)  # the step in flight ends; no other may follow
    breakdown = visit.wait_answered(1)
    assert breakdown.get_attribute("data-finish") == "cancelled"
    assert "stopped by you" in breakdown.inner_text()
    assert gated.calls.count("step") == 1
    gated.script = FakeScript("ok")
    gated.let(100)
    visit.ask("And now?")
    visit.wait_answered(2)
    visit.wait_said("ok")
    assert gated.calls.count("step") == 1 + 2


def test_closing_the_tab_ends_the_answer(chromium: Any, visits: list[Any], png: bytes) -> None:
    gated = GatedBackend(FakeScript("a very long answer"), "gated")
    served, visit = open_page(visits, chromium, gated=gated)
    visit.show_image("digits.png", png)
    visit.ask("Which digit?")
    visit.wait_said("a")
    visit.close()
    assert served.watched["gated"].cancels[0].wait(60)


def test_a_follow_up_is_about_the_same_image_until_another_comes(chromium: Any, visits: list[Any], png: bytes) -> None:
    served, visit = open_page(visits, chromium, fake=FakeBackend(FakeScript("7")))
    visit.show_image("digits.png", png)
    visit.ask("First?")
    visit.wait_answered(1)
    visit.ask("Second?")
    visit.wait_answered(2)
    other = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(other, "PNG")
    visit.show_image("red.png", other.getvalue())
    visit.ask("Third?")
    visit.wait_answered(3)
    first, second, third = (
        [(message.role, *message.content) for message in messages] for messages in served.watched["fake"].asked
    )
    assert [len(turns) for turns in (first, second, third)] == [1, 3, 5]  # a conversation, not single questions
    assert second[0] == first[0]
    assert second[1] == ("assistant", "7")
    seen = [
        [part.data for turn in turns for part in turn if isinstance(part, EncodedImage)]
        for turns in (first, second, third)
    ]
    assert seen == [[png], [png], [png, other.getvalue()]]  # told once, and not again with every question
    assert "from cache" in visit.page.locator("#chat .lat").nth(1).inner_text()
    cached = visit.page.locator("#chat .lat").nth(1).locator("[data-figure='from cache'] dd").inner_text()
    assert re.fullmatch(r"\d+ of \d+ tokens, 1 image", cached)
    assert visit.page.locator("#chat img.asked").count() == 2  # shown once per image, not once per question


def test_two_people_do_not_see_each_other(chromium: Any, visits: list[Any], png: bytes) -> None:
    served, first = open_page(visits, chromium, fake=FakeBackend(FakeScript("7")))
    second = Visit(chromium, served.url)
    visits.append(second)
    first.show_image("digits.png", png)
    first.ask("Mine?")
    first.wait_answered(1)
    second.ask("Yours?")
    assert "Choose an image first" in second.notice()
    assert second.page.locator("#chat .lat").count() == 0


def test_a_file_that_is_no_image_is_refused_at_the_door(chromium: Any, visits: list[Any], png: bytes) -> None:
    _, visit = open_page(visits, chromium, fake=FakeBackend(FakeScript("7")))
    visit.upload("notes.txt", b"not an image at all", "text/plain")
    visit.page.get_by_text("Invalid file type: notes.txt").wait_for()
    assert visit.page.locator("#picture img").count() == 0
    visit.show_image("digits.png", png)
    visit.ask("Which digit?")
    visit.wait_answered(1)


def test_a_file_over_the_limit_is_refused_at_the_door(
    chromium: Any, visits: list[Any], png: bytes, tmp_path: Path
) -> None:
    _, visit = open_page(visits, chromium, fake=FakeBackend(FakeScript("7")))
    big = tmp_path / "big.png"
    big.write_bytes(png + bytes(16 << 20))
    visit.page.locator("#picture input[type=file]").set_input_files(big)
    visit.page.get_by_text("exceed the maximum allowed size").wait_for()
    assert visit.page.locator("#picture img").count() == 0


@pytest.mark.parametrize(
    ("name", "data", "mime"),
    [
        ("liar.png", b"GIF89a but not really", "image/png"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
        ("cut.png", b"\x89PNG\r\n\x1a\n", "image/png"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence_and_the_page_goes_on(
    chromium: Any, visits: list[Any], png: bytes, name: str, data: bytes, mime: str
) -> None:
    _, visit = open_page(visits, chromium, fake=FakeBackend(FakeScript("7")))
    visit.upload(name, data, mime)
    message = visit.notice("#image-notice")
    assert message.startswith("The image is")
    assert "/" not in message  # no path of the server
    visit.show_image("digits.png", png)
    visit.page.locator("#image-notice .notice").wait_for(state="hidden")
    visit.ask("Which digit?")
    visit.wait_answered(1)


def test_a_failing_model_is_reported_and_the_next_answer_works(chromium: Any, visits: list[Any], png: bytes) -> None:
    fake = FakeBackend(FakeScript("7", fail_at="prefill"))
    _, visit = open_page(visits, chromium, fake=fake)
    visit.show_image("digits.png", png)
    visit.ask("Which digit?")
    assert "The model failed (RuntimeError)" in visit.notice()
    fake.script = FakeScript("8")
    visit.ask("Again?")
    visit.wait_answered(1)
    visit.wait_said("8")


def test_switching_models_frees_the_old_one_and_warns_of_the_new(chromium: Any, visits: list[Any], png: bytes) -> None:
    good, doubtful = FakeBackend(FakeScript("7"), "good"), FakeBackend(FakeScript("8"), "doubtful")
    _, visit = open_page(visits, chromium, good=good, doubtful=doubtful)
    visit.show_image("digits.png", png)
    visit.ask("Which digit?")
    visit.wait_answered(1)
    assert visit.page.locator(".card .warning").count() == 0
    visit.page.locator("#model input").click()
    visit.page.get_by_role("option", name="doubtful").click()
    visit.page.locator(".card .warning").wait_for()
    visit.page.locator(".card", has_text="runs on").wait_for()
    assert good.closed
    visit.ask("Which digit?")
    assert "doubtful" in visit.wait_answered(2).inner_text()
    visit.wait_said("8")


def test_what_a_model_says_is_text_not_markup(chromium: Any, visits: list[Any], png: bytes) -> None:
    reply = "<img src=x onerror=alert(1)> *7*"
    _, visit = open_page(visits, chromium, fake=FakeBackend(FakeScript(reply)))
    visit.show_image("digits.png", png)
    visit.ask("<b>Which</b> digit?")
    visit.wait_answered(1)
    visit.wait_said(reply)
    assert visit.page.locator("#chat img[src=x]").count() == 0
    assert "<b>Which</b> digit?" in visit.page.locator("#chat").inner_text()


def test_a_new_chat_forgets_the_conversation_and_keeps_the_image(chromium: Any, visits: list[Any], png: bytes) -> None:
    _, visit = open_page(visits, chromium, fake=FakeBackend(FakeScript("7")))
    visit.show_image("digits.png", png)
    visit.ask("Which digit?")
    visit.wait_answered(1)
    visit.page.locator("#new-chat").click()
    visit.page.locator("#chat .lat").wait_for(state="detached")
    visit.ask("And now?")
    visit.wait_answered(1)
    assert visit.page.locator("#chat img.asked").count() == 1


@pytest.fixture(scope="module")
def demo_url(student: Path) -> Iterator[str]:
    """The URL of `python -m demo STUDENT`, as a person would start it; ended with Ctrl-C."""
    command = [sys.executable, "-m", "demo", str(student), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("demo ready at http://127.0.0.1:"):
            process.kill()
            pytest.fail(f"{line}\n{process.stderr.read() if process.stderr else ''}")
        yield line.split()[-1]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_a_student_answers_and_its_stages_add_up(chromium: Any, visits: list[Any], demo_url: str, png: bytes) -> None:
    visit = Visit(chromium, demo_url)
    visits.append(visit)
    visit.show_image("digits.png", png)
    visit.ask("Which digit is at the top left?")
    for answers, question in ((1, "Read the bottom row."), (2, "")):
        breakdown = visit.wait_answered(answers)
        stages = stage_ms(breakdown)
        assert list(stages) == list(STAGES)
        assert sum(stages.values()) == pytest.approx(total_ms(breakdown), rel=0.05)
        assert all(stages[stage] > 0 for stage in STAGES)
        if question:  # a follow-up, on the same image
            assert "first answer since loading" in breakdown.inner_text()
            visit.ask(question)
    breakdown.locator("summary").click()
    breakdown.get_by_role("rowheader", name="sum of stages").wait_for()
    for name in ("total", "first token", "per token", "tokens/s", "tokens"):
        breakdown.get_by_text(name, exact=True).first.wait_for()
    target = Path(os.environ.get("DEMO_SCREENSHOT", Path(tempfile.gettempdir()) / "demo.png"))
    visit.page.screenshot(path=str(target), full_page=True)
    assert visit.hosts == {urlsplit(demo_url).netloc}, "the page asked another host for something"


def test_examples_are_one_click_away(chromium: Any, visits: list[Any], demo_url: str) -> None:
    visit = Visit(chromium, demo_url)
    visits.append(visit)
    example = visit.page.get_by_role("button", name="Read the bottom row.")
    example.click()
    visit.page.locator("#picture img").wait_for()
    field = visit.page.get_by_label("Question")
    visit.page.wait_for_function("document.querySelector('#question textarea').value !== ''")
    assert field.input_value() == "Read the bottom row."
    field.press("Enter")
    visit.wait_answered(1)


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_on_a_phone_or_a_desk(
    chromium: Any, visits: list[Any], demo_url: str, png: bytes, width: int
) -> None:
    visit = Visit(chromium, demo_url, width=width, height=844)
    visits.append(visit)
    visit.show_image("digits.png", png)
    visit.ask("Which digit is at the top left?")
    visit.wait_answered(1).locator("summary").click()
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    right = "(selector) => document.querySelector(selector).getBoundingClientRect().right"
    assert visit.page.evaluate(right, ".lat") < visit.page.evaluate(right, "#chat")


def test_every_control_has_a_name_for_screen_readers(chromium: Any, visits: list[Any], demo_url: str) -> None:
    visit = Visit(chromium, demo_url)
    visits.append(visit)
    nameless = visit.page.evaluate(
        """() => [...document.querySelectorAll('main button, main input, main textarea')]
            .filter(e => e.checkVisibility() && e.type !== 'file')
            .filter(e => !(e.innerText || e.ariaLabel || e.title || e.placeholder || e.labels?.length))
            .map(e => e.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.slow
def test_an_exported_artefact_answers_too(
    chromium: Any, visits: list[Any], student: Path, png: bytes, tmp_path: Path
) -> None:
    pytest.importorskip("export.cli", reason="the export room is not there")
    pytest.importorskip("onnxruntime")
    artefact = tmp_path / "small-onnx"
    command = [sys.executable, "-m", "export", "--target", "onnx", "--student", str(student), "--out", str(artefact)]
    # a random student cannot pass the accuracy gate; the artefact is written all the same, and marked unverified
    ended = subprocess.run([*command, "--samples", "2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode in (0, 1), ended.stderr
    entries = named([artefact, student])
    engines = Engines(entries, load)
    served = Served.over(engines)
    visits.append(served)
    visit = Visit(chromium, served.url)
    visits.append(visit)
    visit.show_image("digits.png", png)
    visit.ask("Which digit is at the top left?")
    breakdown = visit.wait_answered(1)
    assert "ONNX Runtime" in breakdown.inner_text()
    assert sum(stage_ms(breakdown).values()) == pytest.approx(total_ms(breakdown), rel=0.05)
