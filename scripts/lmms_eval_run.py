"""Another project's evaluation against our server, and ours beside it: the same questions must get the same score.

    python -m scripts.lmms_eval_run ARTEFACT --python VENV/bin/python --samples 100

Writes a local lmms-eval task (a parquet file of digits questions, a YAML file, two functions), serves the artefact on a
free port of the loopback interface, runs `lmms_eval --model openai` against it without network, then `runtime eval` on
the same questions through the same server and on the artefact itself. Exit code 1 unless the three scores are equal; the
last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.tasks.base import SHORT_TOKENS
from vlm import digits
from vlm.console import print_json

TASK = "digits_local"
NAME = "student"
YAML = """task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
metadata:
  version: 1.0
"""
UTILS = """import io
from PIL import Image


def pictures(doc):
    return [Image.open(io.BytesIO(doc["image"])).convert("RGB")]
"""


def write_data(folder: Path, samples: int) -> None:
    """The same questions as an lmms-eval task and as a task of our own."""
    import pyarrow
    import pyarrow.parquet

    rows, ours = [], []
    for index in range(samples):
        sample = digits.sample("test", index)
        buffer = io.BytesIO()
        sample.image.save(buffer, "PNG")
        rows.append({"image": buffer.getvalue(), "question": sample.question, "answer": sample.answer})
        (folder / f"{index}.png").write_bytes(buffer.getvalue())
        ours.append({"id": index, "image": f"{index}.png", "question": sample.question, "answer": sample.answer})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "test.parquet")
    (folder / "task.json").write_text(json.dumps(ours))
    (folder / "task").mkdir()
    (folder / f"task/{TASK}.yaml").write_text(YAML.format(task=TASK, data=folder / "test.parquet", tokens=SHORT_TOKENS))
    (folder / "task/utils.py").write_text(UTILS)


@contextlib.contextmanager
def serving(artefact: Path, log: Path) -> Iterator[str]:
    """Address of a server process; ended with the block."""
    command = [sys.executable, "-m", "runtime", "serve", str(artefact), "--port", "0", "--queue", "64", "--name", NAME]
    with log.open("wb") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            if process.stdout is None:
                raise RuntimeError("no output to read")
            address = ""
            for line in process.stdout:
                file.write(line)
                if match := re.search(rb"http://127\.0\.0\.1:\d+", line):
                    address = match[0].decode()
                if line.startswith(b"ready:"):
                    break
            if not address:
                raise SystemExit(f"the server did not start; see {log}")
            yield address
        finally:
            process.terminate()
            process.communicate()


def lmms(python: Path, folder: Path, address: str) -> tuple[float, str]:
    """lmms-eval's score and version."""
    arguments = f"model={NAME},base_url={address}/v1,api_key=none,num_concurrent=4,timeout=120"
    command = [
        str(python), "-m", "lmms_eval", "--model", "openai", "--model_args", arguments, "--tasks", TASK, "--include_path",
        str(folder / "task"), "--batch_size", "1", "--output_path", str(folder / "lmms"), "--log_samples",
    ]  # fmt: skip
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "OPENAI_API_KEY": "none",
             "HF_HOME": str(folder / "hf"), "NO_PROXY": "127.0.0.1"}  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | quiet
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    (folder / "lmms.log").write_text(result.stdout + result.stderr)
    found = sorted((folder / "lmms").glob("**/*results.json"))
    if result.returncode or not found:
        sys.stderr.write("\n".join((result.stdout + result.stderr).splitlines()[-30:]) + "\n")
        raise SystemExit(f"lmms-eval failed with {result.returncode}; see {folder / 'lmms.log'}")
    print("\n".join(line for line in result.stdout.splitlines() if "|" in line))
    values: dict[str, Any] = json.loads(found[-1].read_text())["results"][TASK]
    score = next(value for key, value in values.items() if key.startswith("exact_match") and "stderr" not in key)
    version = "import importlib.metadata as m; print(m.version('lmms-eval'))"
    shown = subprocess.run([str(python), "-c", version], capture_output=True, text=True, check=True)
    return float(score), shown.stdout.strip()


def ours(model: str, folder: Path, name: str) -> float:
    command = [sys.executable, "-m", "runtime", "eval", model, "--task", "json", "--data", str(folder), "--max-new-tokens",
               str(SHORT_TOKENS), "--out", str(folder / name), "--json"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return float(json.loads(result.stdout.splitlines()[-1])["score"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the environment with lmms-eval")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="keep everything here (default: a temporary folder)")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        temporary = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        temporary.mkdir(parents=True, exist_ok=True)
        folder = temporary.resolve()
        write_data(folder, arguments.samples)
        with serving(arguments.artefact, folder / "server.log") as address:
            theirs, version = lmms(arguments.python.absolute(), folder, address)
            remote = ours(address, folder, "remote")
        local = ours(str(arguments.artefact), folder, "local")
    equal = abs(theirs - remote) < 1e-9 and remote == local
    print_json({"task": TASK, "n": arguments.samples, "lmms_eval": theirs, "through_server": remote, "local": local,
                "equal": equal, "version": version})  # fmt: skip
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
