"""What the page costs: tokens per second, how soon an answer nobody waits for ends, cold start to the first answer.

One engine, started as the demo starts it and asked in turns, on its own clock. `tokens/s` is decode speed as its events tell
it: with nobody but the caller listening (`engine`), while the page's server streams the answer to a browser on this machine,
which takes processor time itself (`page`), and while it streams it to a client that sends and reads the same and draws nothing,
as if the browser were on another machine (`served`). The ratio is the median over rounds of the ratio within a round.

    python -m benchmarks.demo_overhead artifacts/NAME --rounds 30
    python -m benchmarks.demo_overhead artifacts/NAME --in-process      what it would be with the engine as a thread
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import Result, finish, paired, parser
from demo import app, catalogue
from demo.__main__ import free_port
from demo.session import Engines
from runtime import load
from runtime.api import Done, EncodedImage, Event, Failed, Sampling
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.engine import EngineLike
from runtime.engine_process import load_apart
from runtime.images import question
from runtime.latency import Timing, timing
from runtime.workload import make_workload
from tests.demo import browser as chrome
from tests.demo import cut
from tests.demo.browser import Served, Visit

ASKED = "Read the top row."


class Recorded:
    """An engine whose requests all run to the full length, and whose events can be looked at afterwards."""

    def __init__(self, engine: EngineLike) -> None:
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


class Client:
    """Plays what the page sends for one answer, in a process of its own; learns it by watching `ask`."""

    def __init__(self, visit: Visit, ask: Callable[[], None]) -> None:
        sent: list[Any] = []

        def note(request: Any) -> None:
            if '"data":[]' not in (request.post_data or ""):  # the device card's own clock
                sent.append((request.method, request.url, request.post_data, dict(request.headers)))

        visit.page.on("request", note)
        ask()
        visit.page.remove_listener("request", note)
        command = [sys.executable, "-m", "benchmarks.demo_client"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._write(json.dumps(sent))

    def ask(self) -> None:
        self._write("again")
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError("the client failed")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("artifact", type=Path, nargs="+", help="of several speeds, if there are any")
    options.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512], help="lengths of the answers")
    options.add_argument("--cold-starts", type=int, default=3)
    options.add_argument("--stops", type=int, default=10, help="closed tabs, and cut networks")
    options.add_argument("--in-process", action="store_true", help="the engine as a thread beside the page's server")
    arguments = options.parse_args()
    if reason := chrome.missing():
        print(f"error: {reason}", file=sys.stderr)
        return 3
    opener = load if arguments.in_process else load_apart
    speeds: list[Result] = []
    with chrome.chromium() as browser:
        for artifact in arguments.artifact:
            with opener(artifact) as engine:  # type: ignore[attr-defined]
                speeds += _speeds(browser, artifact, engine, arguments.rounds, arguments.tokens)
        stops = {"tab closed": [_leave(browser) for _ in range(arguments.stops)]}
        colds = [_cold_start(browser, arguments.artifact[0]) for _ in range(arguments.cold_starts)]
    if reason := cut.missing():
        print(f"network not cut: {reason}", file=sys.stderr)
    else:
        stops["network cut"] = [float(cut.measure()["ms"]) for _ in range(arguments.stops)]
    results = [*speeds]
    for way, values in stops.items() if arguments.stops else ():
        results.append(_plain(f"{way} to end of generation", values, "ms"))
    if colds:
        results.append(_plain("python -m demo to the end of the first answer", colds, "s"))
    finish(results, {"tokens": arguments.tokens, "in_process": arguments.in_process}, arguments.out)
    quick = all(result.ratio >= 0.95 for result in speeds)
    return 0 if quick and max(itertools.chain(*stops.values()), default=0) <= 1000 else 1


def _speeds(browser: Any, artifact: Path, engine: EngineLike, rounds: int, lengths: list[int]) -> list[Result]:
    """The engine asked by the page and by nobody else, in turns, the page being open either way."""
    recorded = Recorded(engine)
    engines = Engines(catalogue.named([artifact]), lambda _: recorded)  # type: ignore[arg-type, return-value]
    engines.use(next(iter(engines.entries)))
    blocks = app.build(engines)
    _, url, _ = blocks.launch(server_name="127.0.0.1", server_port=free_port("127.0.0.1"), **app.launch_options())
    workload = make_workload(None, 0)
    images = itertools.count()
    results = []
    try:
        visit = Visit(browser, url)
        visit.show_image("digits.png", workload.png(next(images)))
        visit.open_settings()
        for tokens in lengths:
            visit.set_number("#length", str(tokens))
            _clear(visit)
            with Client(visit, lambda: _ask_on_page(visit)) as client:
                sides = {
                    "page": lambda: _ask_on_page(visit),
                    "served": client.ask,
                    "engine": lambda tokens=tokens: _ask(recorded, workload.png(next(images)), tokens),
                }
                speeds: dict[str, list[float]] = {side: [] for side in sides}
                for order in itertools.islice(itertools.cycle(itertools.permutations(sides)), rounds):
                    for side in order:
                        _clear(visit)  # so that the page has done the same before every answer
                        sides[side]()
                        speeds[side].append(1000 / (recorded.timing().tpot_ms or 0))
            for side in ("page", "served"):
                label = f"tokens per second, {side} / engine, {artifact.name}, {tokens} tokens"
                results.append(paired(label, speeds[side], speeds["engine"], "tokens/s"))
        visit.close()
    finally:
        blocks.close(verbose=False)
        engines.close()
    return results


def _ask(recorded: Recorded, png: bytes, tokens: int) -> None:
    asked = [question(ASKED, EncodedImage(png))]
    recorded.submit(asked, Sampling(max_new_tokens=tokens), listener=lambda _: None)
    recorded.ended.wait()


def _clear(visit: Visit) -> None:
    with visit.page.expect_response(lambda reply: '"data":[null],"fn_index"' in (reply.request.post_data or "")):
        visit.page.locator("#new-chat").click()
    visit.page.locator("#chat .lat").first.wait_for(state="detached")


def _ask_on_page(visit: Visit) -> None:
    visit.ask(ASKED)
    visit.wait_answered(1)


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
