"""A network that is really cut: page, browser and engine in a network namespace whose only interface goes down.

    unshare --map-root-user --net python -m tests.demo.cut     prints {"finish": ..., "ms": ...}

A closed tab says goodbye to the server; here nobody says anything, and packets no longer arrive.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

SET_FLAGS = 0x8914  # SIOCSIFFLAGS
UP = 0x1
COMMAND = ("unshare", "--map-root-user", "--net")


def missing() -> str:
    """Why a network cannot be cut here; "" if it can."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    done = subprocess.run([*COMMAND, "true"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no network namespace: {done.stderr.strip()}"


def measure() -> dict[str, str | float]:
    """Run this module in a namespace of its own: how the answer ended, milliseconds after the cut."""
    done = subprocess.run(
        [*COMMAND, sys.executable, "-m", "tests.demo.cut"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, str | float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _loopback(up: bool) -> None:
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh14x", b"lo", UP if up else 0))


def main() -> None:
    from demo.__main__ import give_up_on_silent_peers
    from runtime.api import Done
    from runtime.backend_fake import FakeBackend, FakeScript
    from runtime.workload import make_workload
    from tests.demo import browser

    _loopback(up=True)
    script = FakeScript("x" * 6_000, step_ns=50_000_000, context_length=100_000)
    served = browser.Served(None, fake=FakeBackend(script))
    give_up_on_silent_peers(served.blocks.server)
    with browser.chromium() as chromium:
        visit = browser.Visit(chromium, served.url)
        visit.show_image("digits.png", make_workload(None, 0).png(0))
        visit.set_length(512)
        visit.ask("Which digit?")
        visit.page.locator("#chat [data-testid=bot]", has_text="xxx").wait_for()
        engine = served.watched["fake"]
        _loopback(up=False)
        cut_ns = time.perf_counter_ns()
        engine.ended[0].wait()
        done = engine.events[0][-1]
        if not isinstance(done, Done):
            raise RuntimeError(f"the request failed: {done}")
        print(json.dumps({"finish": done.finish, "ms": (done.spans[-1].end_ns - cut_ns) / 1e6}), flush=True)
        os._exit(0)  # nothing in here can be closed over a network that is gone


if __name__ == "__main__":
    main()
