"""One of our modules in a process of its own: started with a job, asked through its pipes, ended by closing them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from runtime.options import LoadOptions

END_S = 30.0


class Child:
    """A running `python -m MODULE JOB`; it ends when its standard input does.

    Args:
        job: argv[1] of the module, as JSON.
        log: where its standard error goes; None is ours.
    """

    def __init__(self, module: str, job: dict[str, Any], options: LoadOptions, log: IO[Any] | None = None) -> None:
        packages = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            # read by the libraries when they load: too late to set from inside
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(options.threads)},
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process was started without pipes")
        self.stdin: IO[bytes] = self._process.stdin
        self.stdout: IO[bytes] = self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> int:
        """Close its standard input, wait for it, kill it if it does not end; its exit status, negative for a signal."""
        with contextlib.suppress(BrokenPipeError):  # unsent bytes to a process that died
            self.stdin.close()
        try:
            return self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def job(artifact: str, backend: str, options: LoadOptions) -> dict[str, Any]:
    """What every module that loads a model is told."""
    return {"artifact": artifact, "backend": backend, "options": asdict(options)}
