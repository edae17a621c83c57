"""`serve` as people start it, and `doctor` on boards it has never seen."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from runtime.doctor import describe_board, examine
from runtime.jetson import jetson
from runtime.serve_command import listen

from .conftest import ROOT
from .test_imports import EVERYTHING, python
from .test_meters import orin_nano, thor

pytest.importorskip("starlette", reason="needs the serve extra")


@contextmanager
def serve(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime", "serve", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_told_to_stop(end: signal.Signals) -> None:
    with serve("x", "--backend", "fake", "--port", "0") as process:
        assert process.stderr is not None
        url = process.stderr.readline().split(": ")[0]
        assert "ready: x (fake, none)" in process.stderr.readline()
        value = {"messages": [{"role": "user", "content": "hi"}]}
        got = httpx.post(f"{url}/v1/chat/completions", json=value, timeout=120)
        assert got.json()["choices"][0]["message"]["content"] == "7"
        process.send_signal(end)
        _, rest = process.communicate(timeout=120)
        assert (process.returncode, rest.strip()) == (0, "stopped")


def test_every_loopback_address_is_answered() -> None:
    with serve("x", "--backend", "fake", "--host", "127.0.0.2", "--port", "0") as process:
        assert process.stderr is not None
        url = process.stderr.readline().split(": ")[0]
        assert url.startswith("http://127.0.0.2:")
        assert "ready" in process.stderr.readline()
        assert httpx.get(f"{url}/health", timeout=120).status_code == 200
        assert httpx.get(f"{url}/health", headers={"Host": "elsewhere"}, timeout=120).status_code == 400


def test_replies_do_not_wait_for_more_to_send() -> None:
    """With Nagle's delay on, every reply on a connection kept open took 40 ms."""

    async def main() -> int:
        seen: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        class Look(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                accepted = transport.get_extra_info("socket")
                seen.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                transport.close()

        listener = listen("127.0.0.1", 0)
        server = await asyncio.get_running_loop().create_server(Look, sock=listener)
        with socket.create_connection(listener.getsockname()):
            got = await asyncio.wait_for(seen, 60)
        server.close()
        return got

    assert asyncio.run(main()) != 0


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    with serve(str(tmp_path / "nothing"), "--port", "0") as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "is not a directory" in error.splitlines()[-1]
    assert "Traceback" not in error


def test_doctor_describes_a_board(tmp_path: Path) -> None:
    first, second = describe_board(jetson(orin_nano(tmp_path / "a")))
    assert "Orin Nano" in first
    assert "JetPack 6.1 or 6.2, power mode MAXN_SUPER, GPU MHz 306 of 1020" in first
    assert "sudo jetson_clocks" in second
    assert len(describe_board(jetson(thor(tmp_path / "b")))) == 1
    assert describe_board(None) == []


def test_doctor_looks_at_server_and_meters() -> None:
    names = {finding.name for finding in examine()}
    assert {"onnx", "gguf", "torch", "tensorrt", "serve", "demo", "energy meter"} <= names


def test_a_core_install_runs_doctor_and_names_each_extra() -> None:
    blocked = [*EVERYTHING, "starlette", "uvicorn", "prometheus_client", "tensorrt", "pynvml", "anyio"]
    code = "sys.argv = ['x', 'doctor']\nimport runpy\nrunpy.run_module('runtime', run_name='__main__')"
    result = python(blocked, code)
    assert result.returncode == 0, result.stderr
    for extra in ("tokenizer", "onnx", "gguf", "torch", "tensorrt", "serve", "digits"):
        assert f"pip install 'align-edge[{extra}]'" in result.stdout


def test_serve_without_its_extra_says_which() -> None:
    code = "sys.argv = ['x', 'serve', 'x', '--backend', 'fake']\nimport runpy\nrunpy.run_module('runtime', run_name='__main__')"
    result = python(["starlette"], code)
    assert result.returncode == 3
    assert "pip install 'align-edge[serve]'" in result.stderr
