"""What the page costs: tokens per second, how soon an answer nobody waits for ends, cold start to the first answer.

Engine and page in one process and in turns, on the engine's own clock: `tokens/s` is decode speed as the events tell it,
once with nobody but the caller listening, once while a browser shows the answer.

    python -m benchmarks.demo_overhead artifacts/NAME --rounds 10
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Result, compare, finish, parser
from demo import app, catalogue
from demo.__main__ import free_port
from demo.session import Engines
from runtime import load
from runtime.api import Done, EncodedImage, Event, Failed, Sampling
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.engine import Engine
from runtime.images import question
from runtime.latency import Timing, timing
from runtime.workload import make_workload
from tests.demo import browser as chrome
from tests.demo import cut
from tests.demo.browser import Served, Visit

TOKENS = 256
ASKED = "Read the top row."


class Recorded:
    """An engine whose requests all run to the full length, and whose events can be looked at afterwards."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.events: list[Event | Failed] = []
        self.ended = threading.Event()

    def submit(self, messages: Any, sampling: Sampling, *, listener: Any, **options: Any) -> None:
        self.events, self.ended = [], threading.Event()

        def listen(event: Event | Failed) -> None:
            self.events.append(event)
            listener(event)
            if isinstance(event, (Done, Failed)):
                self.ended.set()

        full = Sampling(max_new_tokens=sampling.max_new_tokens, ignore_eos=True)
        self._engine.submit(messages, full, listener=listen, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def timing(self) -> Timing:
        return timing([event for event in self.events if not isinstance(event, Failed)])


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("artifact", type=Path)
    options.add_argument("--cold-starts", type=int, default=3)
    arguments = options.parse_args()
    if reason := chrome.missing():
        print(f"error: {reason}", file=sys.stderr)
        return 3
    with chrome.chromium() as browser:
        speeds = _speeds(browser, arguments.artifact, load(arguments.artifact), arguments.rounds)
        slow = Engine(FakeBackend(FakeScript("x" * 6_000, step_ns=20_000_000, context_length=100_000)))
        board = _speeds(browser, arguments.artifact, slow, arguments.rounds, 64)
        stops = {"tab closed": [_leave(browser) for _ in range(arguments.rounds)]}
        colds = [_cold_start(browser, arguments.artifact) for _ in range(arguments.cold_starts)]
    if reason := cut.missing():
        print(f"network not cut: {reason}", file=sys.stderr)
    else:
        stops["network cut"] = [float(cut.measure()["ms"]) for _ in range(arguments.rounds)]
    results = [
        compare("tokens per second, page / engine", speeds["page"], speeds["engine"], "tokens/s"),
        compare("the same at 20 ms a token (scripted)", board["page"], board["engine"], "tokens/s"),
    ]
    for way, values in stops.items():
        results.append(_plain(f"{way} to end of generation", values, "ms"))
    results.append(_plain("python -m demo to the end of the first answer", colds, "s"))
    finish(results, {"tokens": TOKENS, "artefact": arguments.artifact.name}, arguments.out)
    return 0 if results[0].ratio >= 0.95 and max(max(values) for values in stops.values()) <= 1000 else 1


def _speeds(browser: Any, artifact: Path, engine: Engine, rounds: int, tokens: int = TOKENS) -> dict[str, list[float]]:
    recorded = Recorded(engine)
    engines = Engines(catalogue.named([artifact]), lambda _: recorded)  # type: ignore[arg-type, return-value]
    engines.use(next(iter(engines.entries)))
    blocks = app.build(engines)
    _, url, _ = blocks.launch(server_name="127.0.0.1", server_port=free_port("127.0.0.1"), **app.launch_options())
    workload = make_workload(None, 0)
    speeds: dict[str, list[float]] = {"page": [], "engine": []}
    try:
        visit = Visit(browser, url)
        visit.show_image("digits.png", workload.png(0))
        visit.set_length(tokens)
        for index in range(rounds + 1):
            alone = recorded._engine.complete(
                [question(ASKED, EncodedImage(workload.png(index)))], Sampling(max_new_tokens=tokens, ignore_eos=True)
            )
            visit.page.locator("#new-chat").click()
            visit.page.locator("#chat .lat").first.wait_for(state="detached")
            visit.ask(ASKED)
            visit.wait_answered(1)
            if index:  # the first round is warm-up
                speeds["engine"].append(1000 / (timing(alone).tpot_ms or 0))
                speeds["page"].append(1000 / (recorded.timing().tpot_ms or 0))
        visit.close()
    finally:
        blocks.close(verbose=False)
        engines.close()
    return speeds


def _leave(browser: Any) -> float:
    """Milliseconds from the moment the page is gone to the end of the request, by the engine's clock.

    The model is scripted, 50 ms a token: the digits student would have said everything before a window can close.
    """
    served = Served(None, fake=FakeBackend(FakeScript("x" * 6_000, step_ns=50_000_000, context_length=100_000)))
    visit = Visit(browser, served.url)
    try:
        visit.show_image("digits.png", make_workload(None, 0).png(0))
        visit.set_length(512)
        visit.ask(ASKED)
        visit.page.locator("#chat [data-testid=bot]", has_text="xxx").wait_for()
        engine = served.watched["fake"]
        visit.page.close()
        gone_ns = time.perf_counter_ns()
        engine.ended[0].wait()
        done = engine.events[0][-1]
    finally:
        visit.close()
        served.close()
    if not isinstance(done, Done) or done.finish != "cancelled":
        raise RuntimeError(f"the answer was not cancelled: {done}")
    return max(done.spans[-1].end_ns - gone_ns, 0) / 1e6


def _cold_start(browser: Any, artifact: Path) -> float:
    """Seconds from typing the command to the breakdown under the first answer, a browser window being open."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "demo", str(artifact), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        visit = Visit(browser, url)
        visit.page.get_by_role("button", name="Read the bottom row.").click()
        visit.page.wait_for_function("document.querySelector('#question textarea').value !== ''")
        visit.page.locator("#ask").click()
        visit.page.locator("#chat .lat").wait_for()
        seconds = time.perf_counter() - began
        visit.close()
        process.terminate()
    return seconds


def _plain(name: str, values: list[float], unit: str) -> Result:
    """A figure with nothing to compare it with: `theirs` is 1 of its unit."""
    middle = statistics.median(values)
    return Result(name, middle, middle, 1.0, unit, len(values), (min(values), max(values)))


if __name__ == "__main__":
    raise SystemExit(main())
