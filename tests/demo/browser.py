"""Headless Chromium for the browser tests, or the reason why there is none."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from demo.catalogue import Entry
from demo.instruments import Instruments
from demo.session import Engines
from runtime.backend_fake import FakeBackend
from runtime.engine_process import ProcessEngine
from tests.apart import apart
from tests.demo.conftest import GatedBackend, WatchedEngine

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # a camera that shows a moving picture, and nobody who must allow it
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
PATIENCE_MS = 120_000  # an upper limit for a busy machine, not a measurement
AGAIN_MS = 5_000


def missing() -> str:
    """What stops browser tests on this machine; "" if nothing does."""
    if importlib.util.find_spec("gradio") is None:
        return "gradio is not installed"
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    if not CHROMIUM.exists():
        return f"no browser at {CHROMIUM} (set CHROMIUM to its path)"
    return ""


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(ARGS))
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """One open page, and what a person does on it."""

    def __init__(self, browser: Any, url: str, width: int = 1280, height: int = 900, **options: Any) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, permissions=["camera"], **options
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.hosts: set[str] = set()
        self.failed: list[str] = []
        self.page.on("requestfailed", lambda request: self.failed.append(request.url))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.goto(url)
        self.page.locator("#ask").wait_for()

    def upload(self, name: str, data: bytes, mime: str = "image/png") -> None:
        """Choose a file, as a person does; the page may refuse it."""
        self.upload_all({"name": name, "mimeType": mime, "buffer": data})

    def upload_all(self, *files: dict[str, Any]) -> None:
        self.page.locator("#picture input[type=file]").set_input_files(list(files))

    def clear_images(self) -> None:
        self.page.locator("#picture button[aria-label=Clear]").click()
        self.page.locator("#picture img").wait_for(state="detached")

    def show_image(self, name: str, data: bytes) -> None:
        """Choose this image instead of those there are; returns when the server has looked at it."""
        if self.page.locator("#picture img").count():
            self.clear_images()
        # the widget's change carries the file's name; the clock of the device card asks the same address
        with self.page.expect_response(lambda reply: name in (reply.request.post_data or "")):
            self.upload(name, data)
        self.page.locator("#picture img").first.wait_for()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def open_settings(self) -> None:
        self.page.get_by_role("button", name="Answer settings").click()

    def set_length(self, tokens: int) -> None:
        """The longest answer the model may give."""
        self.open_settings()
        self.set_number("#length", str(tokens))

    def set_number(self, place: str, value: str) -> None:
        """Type a number beside a slider; returns when the slider has moved."""
        from playwright.sync_api import TimeoutError as TookTooLong

        field = self.page.locator(f"{place} input[type=number]")
        moved = "([place, value]) => document.querySelector(`${place} input[type=range]`).value === value"
        for left in reversed(range(PATIENCE_MS // AGAIN_MS)):
            # a panel that is just opening may take the field back to its old value once
            field.fill(value)
            field.press("Tab")
            try:
                self.page.wait_for_function(moved, arg=[place, value], timeout=AGAIN_MS)
                return
            except TookTooLong:
                if not left:
                    raise

    def ask(self, question: str) -> None:
        self.page.locator("#question textarea").fill(question)
        self.page.locator("#ask").click()

    def wait_answered(self, answers: int) -> Any:
        """Wait for this many breakdowns and for the page to take questions again; the newest breakdown."""
        self.page.wait_for_function(f"document.querySelectorAll('#chat .lat').length === {answers}")
        self.page.locator("#ask:not([disabled])").wait_for()
        return self.page.locator("#chat .lat").nth(answers - 1)

    def wait_said(self, text: str) -> None:
        """Wait until the newest answer reads exactly like this."""
        self.page.wait_for_function(
            """(text) => [...document.querySelectorAll('#chat [data-testid=bot] .message-content')]
                .at(-1)?.innerText.trim() === text""",
            arg=text,
        )

    def notice(self, place: str = "#notice") -> str:
        """The message in the page, once there is one."""
        return str(self.page.locator(f"{place} .notice").inner_text())

    def close(self) -> None:
        self.context.close()


class Served:
    """A served page over scripted models, and the models to look into."""

    def __init__(self, options: dict[str, Any] | None = None, **scripts: FakeBackend) -> None:
        self.backends = scripts
        self.watched: dict[str, WatchedEngine] = {}
        self.loads: list[tuple[str, list[str]]] = []
        entries = [Entry(Path(name), name, "onnx", "int8", 1_000_000, name != "doubtful") for name in scripts]
        self._serve(Engines(entries, self._load), **(options or {}))

    @staticmethod
    def over(engines: Engines) -> Served:
        """The same page over real models."""
        served = Served.__new__(Served)
        served.backends = {}
        served._serve(engines)
        return served

    def _serve(self, engines: Engines, **options: Any) -> None:
        from demo import app
        from demo.__main__ import free_port

        self.engines = engines
        options.setdefault("instruments", Instruments(Path("/nowhere")))
        self.blocks = app.build(engines, app.Setting(**options))
        _, self.url, _ = self.blocks.launch(
            server_name="127.0.0.1", server_port=free_port("127.0.0.1"), **app.launch_options()
        )

    def _load(self, path: Path) -> ProcessEngine:
        """As the command does it: behind the pipes of a process. Also notes which models were in memory at that moment."""
        held = [name for name in self.watched if not self.backends[name].closed]
        self.loads.append((path.name, held))
        self.backends[path.name].closed = False  # a fake can be loaded again
        self.watched[path.name] = WatchedEngine(self.backends[path.name])
        return apart(self.watched[path.name])

    def close(self) -> None:
        for backend in self.backends.values():
            if isinstance(backend, GatedBackend):
                backend.let(10_000)
        self.blocks.close(verbose=False)
        self.engines.close()


def open_page(visits: list[Any], browser: Any, **scripts: FakeBackend) -> tuple[Served, Visit]:
    served = Served(**scripts)
    visits.append(served)
    visit = Visit(browser, served.url)
    visits.append(visit)
    return served, visit


def stage_ms(breakdown: Any) -> dict[str, float]:
    rows = breakdown.locator("tr[data-stage]").evaluate_all("rows => rows.map(r => [r.dataset.stage, r.dataset.ms])")
    return {stage: float(ms) for stage, ms in rows}


def total_ms(breakdown: Any) -> float:
    return float(breakdown.get_attribute("data-total-ms"))
