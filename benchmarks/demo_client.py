"""The demo's page without a page: sends what a browser has sent and reads what comes, and nobody draws it.

A process for `benchmarks.demo_overhead`, in place of a browser on another machine. Stdin: one line of JSON, the requests as
[method, address, body, headers]; then a line for every time they shall be played. Stdout: a line each time the last is read.
"""

from __future__ import annotations

import json
import sys
import urllib.request


def play(requests: list[tuple[str, str, str | None, dict[str, str]]]) -> None:
    """One after the other, as the page does: each waits for the answer to the one before."""
    for method, url, body, headers in requests:
        data = None if body is None else body.encode()
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=60) as reply:
            if headers.get("accept") != "text/event-stream":
                reply.read()
                continue
            for line in reply:
                if b'"process_completed"' in line:
                    break


def main() -> None:
    requests = json.loads(sys.stdin.readline())
    for _ in sys.stdin:
        play(requests)
        print("played", flush=True)


if __name__ == "__main__":
    main()
