"""The Profile tab: the runtime's own profiler with its progress, its report on the page and as files."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from demo import page
from demo.instruments import Instruments
from demo.session import Engines, Session
from demo.tab_chat import BUSY, Updates, failure
from runtime.html_report import html_report
from runtime.options import LoadOptions
from runtime.profiler import WARM_LAST, ProfileOptions, Profiler
from runtime.report import report
from runtime.runner import ProcessRunner, Runner
from runtime.tables import csv_text
from runtime.workload import make_workload
from vlm.errors import ToolError, UserError

ACTIVITY = "profile"
LOOK_S = 0.25
MOST_REQUESTS = 700  # enough for p99
REQUESTS, TOKENS = 64, 32
EXTRA = 8
FOLLOW_UP_ASKS = 5  # two first questions, two second ones, one cold
WRITERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "json": lambda value: json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    "html": html_report,
    "csv": csv_text,
}
Opener = Callable[[str, ProfileOptions], Runner]


class Stopped(Exception):
    """A person pressed Stop or left."""


@dataclass
class Progress:
    """Requests made and requests to come; warming up ends when it is steady, so that part is a guess until it is over."""

    models: int
    requests: int
    extra: int
    cancel: threading.Event
    began_s: float = field(default_factory=time.monotonic)
    done: int = 0
    detail: str = "loading"

    @property
    def total(self) -> int:
        each = WARM_LAST + 1 + self.requests + self.extra * (2 + FOLLOW_UP_ASKS + 1) + 1
        return max(self.models * each, self.done)

    def count(self, request: dict[str, Any]) -> None:
        """One more request is about to be made.

        Raises:
            Stopped: nobody wants the result any more.
        """
        if self.cancel.is_set():
            raise Stopped
        self.done += 1
        self.detail = _what(request)


def _what(request: dict[str, Any]) -> str:
    if "bandwidth_s" in request:
        return "measuring the memory's speed"
    if "stop_after" in request:
        return "stopping on the way"
    if request["sync"] == "all":
        return "timing stages"
    if request["reuse"] != "none":
        return "asking follow-up questions"
    return "asking"


class CountedRunner:
    """A runner that tells `progress` of every request."""

    def __init__(self, runner: Runner, progress: Progress) -> None:
        self._runner, self._progress = runner, progress
        self.info, self.load_s = runner.info, runner.load_s

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._progress.count(request)
        return self._runner.ask(request)

    def close(self) -> None:
        self._runner.close()


@dataclass(frozen=True)
class Widgets:
    models: Any
    requests: Any
    tokens: Any
    run: Any
    stop: Any
    notice: Any
    progress: Any
    report: Any
    files: tuple[Any, ...]


def process_runner(artifact: str, options: ProfileOptions) -> Runner:
    """The model in a process of its own, as the command does it."""
    return ProcessRunner(artifact, options.backend, options.load)


class Handlers:
    """Measures in a thread, and looks at how far it is.

    Args:
        folder: where reports are written, one folder each; None for the system's temporary folder.
    """

    def __init__(
        self,
        widgets: Widgets,
        engines: Engines,
        instruments: Instruments,
        folder: Path | None,
        backend: str = "auto",
        opener: Opener = process_runner,
    ) -> None:
        self.w, self.engines, self.instruments = widgets, engines, instruments
        self._folder, self._backend, self._opener = folder, backend, opener

    def begin(self, session: Session | None, models: Sequence[str]) -> Updates:
        import gradio as gr

        session = session or Session()
        problem = BUSY if session.busy else "" if models else "Choose one model or more."
        if problem:
            return {self.w.notice: page.notice(problem)}
        session.busy, session.cancel, session.activity = True, threading.Event(), ACTIVITY
        return {
            self.w.notice: "",
            self.w.progress: page.status("Waiting for the model …"),
            self.w.report: "",
            self.w.run: gr.update(interactive=False),
            self.w.stop: gr.update(interactive=True),
            **{button: gr.update(interactive=False) for button in self.w.files},
        }

    async def profile(
        self, session: Session | None, models: Sequence[str], requests: float | None, tokens: float | None
    ) -> AsyncIterator[Updates]:
        """Free the model in memory, measure every chosen one in a process of its own, show and write the report."""
        import gradio as gr

        if session is None or session.activity != ACTIVITY or session.cancel is None:
            yield {self.w.progress: gr.skip()}
            return
        cancel = session.cancel
        try:
            options = self._options(int(requests or REQUESTS), int(tokens or TOKENS))  # emptied: the default
            artifacts = [str(self.engines.entry(key).path) for key in models]
            progress = Progress(len(artifacts), options.requests, options.extra, cancel)
            async with self.engines.wanted(cancel) as mine:
                if not mine:
                    raise Stopped
                await asyncio.to_thread(self.engines.free)
                work = asyncio.create_task(asyncio.to_thread(self._measure, artifacts, options, progress))
                try:
                    while not (await asyncio.wait([work], timeout=LOOK_S))[0]:
                        yield {self.w.progress: bar(progress)}
                finally:  # also when the tab was closed: the next in line waits for the processes to end
                    cancel.set()
                    await asyncio.wait([work])
            result = work.result()
            paths = self._write(result, session)
            yield {
                self.w.progress: page.status(
                    "Done." if result["valid"] else "Done, but not comparable: see the warnings."
                ),
                self.w.report: frame(html_report(result)),
                **{
                    button: gr.update(value=str(path), interactive=True)
                    for button, path in zip(self.w.files, paths, strict=True)
                },
            }
            return
        except Stopped:
            yield {self.w.progress: page.status("Stopped; nothing was kept.")}
            return
        except ToolError as error:
            problem = error.message
        except Exception as error:
            problem = failure(error)
        yield {self.w.progress: "", self.w.notice: page.notice(problem)}

    def end(self, session: Session | None) -> tuple[Any, ...]:
        import gradio as gr

        if session is not None and session.activity == ACTIVITY:
            session.busy, session.activity = False, ""
        return gr.update(interactive=True), gr.update(interactive=False)

    def stop(self, session: Session | None) -> Any:
        import gradio as gr

        if session is not None and session.activity == ACTIVITY:
            session.stop()
        return gr.update(interactive=False)

    def _options(self, requests: int, tokens: int) -> ProfileOptions:
        if requests > MOST_REQUESTS:
            raise UserError(f"requests is {requests}; give at most {MOST_REQUESTS}, or use `python -m runtime profile`")
        return ProfileOptions(
            backend=self._backend, requests=requests, output_tokens=tokens, extra=EXTRA, load=LoadOptions()
        )

    def _measure(self, artifacts: Sequence[str], options: ProfileOptions, progress: Progress) -> dict[str, Any]:
        def opener(artifact: str) -> Runner:
            if progress.cancel.is_set():
                raise Stopped
            return CountedRunner(self._opener(artifact, options), progress)

        workload = make_workload(None, options.seed)
        profiler = Profiler(options, workload, self.instruments.clock, self.instruments.recorder(heat=True))
        return report(profiler.run(artifacts, opener), options, workload)

    def _write(self, result: dict[str, Any], session: Session) -> list[Path]:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="profile-", dir=self._folder))
        paths = []
        for ending, write in WRITERS.items():
            path = folder / f"profile.{ending}"
            path.write_text(write(result))
            session.files.add(str(path))
            paths.append(path)
        return paths


def bar(progress: Progress) -> str:
    """Requests done of all, time spent and time left."""
    spent = time.monotonic() - progress.began_s
    left = f", about {spent / progress.done * (progress.total - progress.done):.0f} s left" if progress.done else ""
    return (
        f'<div class="profile-progress" role="status"><label>{escape(progress.detail)}'
        f'<progress max="{progress.total}" value="{progress.done}"></progress></label>'
        f"<p>{progress.done} of {progress.total} requests, {spent:.0f} s{left}</p></div>"
    )


def frame(html: str) -> str:
    """A whole page inside this one; it has no scripts, and none would run."""
    grow = "this.style.height=(this.contentDocument.documentElement.scrollHeight+24)+'px'"
    return (
        f'<iframe class="report" title="Latency profile" sandbox="allow-same-origin" onload="{grow}" '
        f'srcdoc="{escape(html)}"></iframe>'
    )


def lay_out(engines: Engines, plain: dict[str, Any]) -> Widgets:
    """The tab's components, inside the caller's `gr.Tab`."""
    import gradio as gr

    choices = [(entry.label, key) for key, entry in engines.entries.items()]
    models = gr.CheckboxGroup(
        choices, value=[choices[0][1]], label="Models (a process each, requests in turns)", elem_id="profile-models"
    )
    with gr.Row():
        requests = gr.Slider(
            4,
            MOST_REQUESTS,
            value=REQUESTS,
            step=4,
            label="Requests per model (64 for p90, 662 for p99)",
            elem_id="requests",
            min_width=240,
        )
        tokens = gr.Slider(2, 128, value=TOKENS, step=1, label="Tokens per answer", min_width=240)
    with gr.Row():
        run = gr.Button("Profile", variant="primary", elem_id="profile", min_width=80)
        stop = gr.Button("Stop profiling", variant="stop", interactive=False, elem_id="profile-stop", min_width=80)
    with gr.Row():
        files = tuple(
            gr.DownloadButton(
                f"Download {ending.upper()}", interactive=False, elem_id=f"download-{ending}", min_width=80
            )
            for ending in WRITERS
        )
    notice = gr.HTML("", elem_id="profile-notice", **plain)
    progress = gr.HTML("", elem_id="profile-progress", **plain)
    shown = gr.HTML("", elem_id="profile-report", **plain)
    return Widgets(models, requests, tokens, run, stop, notice, progress, shown, files)


def connect(w: Widgets, on: Handlers, session: Any, quick: dict[str, Any], queued: dict[str, Any]) -> None:
    outputs = [w.notice, w.progress, w.report, *w.files]
    w.run.click(on.begin, [session, w.models], [*outputs, w.run, w.stop], trigger_mode="once", **quick).then(
        on.profile, [session, w.models, w.requests, w.tokens], outputs, show_progress="hidden", **queued
    ).then(on.end, [session], [w.run, w.stop], **quick)
    w.stop.click(on.stop, [session], [w.stop], **quick)
