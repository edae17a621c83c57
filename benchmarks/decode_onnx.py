"""int4 decode speed of our ONNX decoder against onnxruntime-genai's on the same weights and threads, in turns.

Both sides hold the same random Qwen2.5-0.5B-shaped decoder in 4 bits (block 32, symmetric, head included, int8 products).
Each round feeds a context, then times some greedy tokens a side; rounds alternate which side goes first. Ours is
driven the way a runtime should: key-value buffers of full length shared between input and output, bound once.
The share of memory bandwidth counts packed weights and cache read per token over the read rate measured in the same rounds.

    python -m benchmarks.decode_onnx --student DIR --artefact ARTEFACT --rounds 12 --threads 2 \\
        --genai-path FOLDER_WITH_ONNXRUNTIME_GENAI --out benchmarks/results/decode_onnx.json

On a machine that others use, take --threads 1 --clock cpu: processor seconds then, for the read rate too.
DIR comes from `python -m benchmarks.export_onnx --keep-student DIR`, ARTEFACT from `python -m export --precision int4`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import compare, finish, parser
from benchmarks.export_onnx import save_text_decoder
from vlm.manifest import read_manifest

ROOM = 512
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class OurDecoder:
    """embed_tokens and decoder of an artefact with one key-value buffer per tensor, input and output at once."""

    def __init__(self, root: Path, threads: int) -> None:
        import onnxruntime

        self.ort = onnxruntime
        manifest = read_manifest(root)
        self.embed, self.decoder = (
            self._session(manifest.path_of(root, r), threads) for r in ("embed_tokens", "decoder")
        )
        self.past = [i for i in self.decoder.get_inputs() if i.name.startswith("past_key_values.")]
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        shape = (1, self.past[0].shape[1], ROOM, self.past[0].shape[3])
        arrays = [np.zeros(shape, kinds[i.type]) for i in self.past]
        self.cache = [self._value(a) for a in arrays]
        self.keep = self._value(np.array(1, np.int64))
        self.mask = np.ones((1, ROOM), np.int64)
        self.logits = self._value(np.zeros((1, 1, manifest.model["vocab_size"]), np.float32))
        self.binding = self.decoder.io_binding()
        for node, value in zip(self.past, self.cache, strict=True):
            self.binding.bind_ortvalue_input(node.name, value)
            self.binding.bind_ortvalue_output(node.name.replace("past_key_values", "present"), value)
        self.binding.bind_ortvalue_input("num_logits_to_keep", self.keep)
        self.binding.bind_ortvalue_output("logits", self.logits)
        self.length = 0

    def _session(self, path: Path, threads: int) -> Any:
        options = self.ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        return self.ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def _value(self, array: Any) -> Any:
        return self.ort.OrtValue.ortvalue_from_numpy(array, "cpu")

    def feed(self, ids: list[int]) -> int:
        """Append tokens; the most likely next one."""
        (embeds,) = self.embed.run(None, {"input_ids": np.asarray([ids], np.int64)})
        total = self.length + len(ids)
        self.binding.bind_cpu_input("inputs_embeds", embeds)
        self.binding.bind_cpu_input("attention_mask", np.ascontiguousarray(self.mask[:, :total]))
        self.binding.bind_cpu_input("position_ids", np.arange(self.length, total, dtype=np.int64)[None])
        self.decoder.run_with_iobinding(self.binding)
        self.length = total
        return int(self.logits.numpy().argmax())

    def start(self, ids: list[int]) -> int:
        self.length = 0
        return self.feed(ids)


def build_genai(student: Path, out: Path, path: Path | None) -> None:
    """The builder of onnxruntime-genai on the text decoder, int4, CPU."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        text = Path(scratch) / "text"
        save_text_decoder(student, text)
        options = ["int4_accuracy_level=4", "int4_block_size=32", "int4_is_symmetric=true"]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(text), "-o", str(out)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(path or ""), os.getenv("PYTHONPATH")])),
        }
        command += ["-p", "int4", "-e", "cpu", "-c", scratch, "--extra_options", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the builder failed: {done.stderr[-600:]}")


class Genai:
    """onnxruntime-genai's own generator: its loop is C++."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai

        self.library = onnxruntime_genai
        config = json.loads((folder / "genai_config.json").read_text())
        session = config["model"]["decoder"]["session_options"]
        session |= {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        (folder / "genai_config.json").write_text(json.dumps(config))
        self.model = onnxruntime_genai.Model(str(folder))

    def start(self, ids: list[int]) -> Any:
        parameters = self.library.GeneratorParams(self.model)
        parameters.set_search_options(max_length=ROOM, min_length=ROOM, do_sample=False)
        generator = self.library.Generator(self.model, parameters)
        generator.append_tokens(np.asarray([ids], np.int32))
        generator.generate_next_token()
        return generator


def time_ours(decoder: OurDecoder, ids: list[int], tokens: int, clock: Callable[[], float]) -> tuple[float, list[int]]:
    token, said = decoder.start(ids), []
    started = clock()
    for _ in range(tokens):
        said.append(token)
        token = decoder.feed([token])
    return tokens / (clock() - started), said


def time_genai(model: Genai, ids: list[int], tokens: int, clock: Callable[[], float]) -> tuple[float, list[int]]:
    generator = model.start(ids)
    started = clock()
    for _ in range(tokens):
        generator.generate_next_token()
    rate = tokens / (clock() - started)
    return rate, [int(t) for t in generator.get_sequence(0)[len(ids) : len(ids) + tokens]]


def read_rate(buffer: Any, clock: Callable[[], float]) -> float:
    """Bytes per second of summing a gigabyte."""
    started = clock()
    buffer.sum()
    return float(buffer.numel() * buffer.element_size() / (clock() - started))


def main() -> None:
    import torch

    arguments = parser(__doc__ or "")
    arguments.set_defaults(rounds=12, threads=2)
    arguments.add_argument("--student", type=Path, required=True)
    arguments.add_argument("--artefact", type=Path, nargs="+", required=True)
    arguments.add_argument("--context", type=int, default=256)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments.add_argument("--genai", type=Path, help="folder of a model built earlier; built there if it is empty")
    arguments.add_argument("--genai-path", type=Path, help="folder that holds the onnxruntime_genai package")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    if given.genai_path:
        sys.path.insert(0, str(given.genai_path))
    folder = given.genai or Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
    if not (folder / "genai_config.json").is_file():
        build_genai(given.student, folder, given.genai_path)
    artefacts = {f"ours, {root.name}" if len(given.artefact) > 1 else "ours": root for root in given.artefact}
    theirs = Genai(folder, given.threads)
    manifests = {name: read_manifest(root) for name, root in artefacts.items()}
    first = manifests[next(iter(manifests))]
    ids = np.random.default_rng(0).integers(5, first.model["vocab_size"], given.context).tolist()
    clock = CLOCKS[given.clock]
    sides: dict[str, Callable[[], tuple[float, list[int]]]] = {
        "genai": lambda: time_genai(theirs, ids, given.tokens, clock)
    }
    for name, root in artefacts.items():
        decoder = OurDecoder(root, given.threads)
        sides[name] = lambda decoder=decoder: time_ours(decoder, ids, given.tokens, clock)  # type: ignore[misc]
    rates, said, bandwidth = run_rounds(sides, given.rounds, clock)
    per_token = {
        name: m.model["decoder_weight_bytes"] + given.context * m.model["kv_bytes_per_token"]
        for name, m in manifests.items()
    }
    peak = statistics.median(bandwidth)
    settings = {
        "context": given.context,
        "tokens": given.tokens,
        "clock": given.clock,
        "threads": given.threads,
        "bytes_per_token": per_token,
        "read_bandwidth_bytes_s": peak,
        "share_of_bandwidth": {k: statistics.median(rates[k]) * size / peak for k, size in per_token.items()},
        "tokens_s": rates,
        "bandwidth_bytes_s": bandwidth,
        "same_greedy_tokens": {k: int(np.argmin([*map(int.__eq__, said[k], said["genai"]), False])) for k in artefacts},
    }
    what = "int4 decode against onnxruntime-genai"
    rows = [compare(what if k == "ours" else f"{what} ({k})", rates[k], rates["genai"], "tokens/s") for k in artefacts]
    finish(rows, settings, given.out)


def run_rounds(
    sides: dict[str, Callable[[], tuple[float, list[int]]]], rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, list[int]], list[float]]:
    """Tokens per second of each side in turns, what each said last, and the read rate beside every round."""
    import torch

    buffer = torch.ones(1 << 28, dtype=torch.float32)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    said: dict[str, list[int]] = {}
    bandwidth: list[float] = []
    names = list(sides)
    for turn in range(rounds + 1):  # the first warms up
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            rate, said[name] = sides[name]()
            if turn:
                rates[name].append(rate)
        if turn:
            bandwidth.append(read_rate(buffer, clock))
            print(turn, {k: round(v[-1], 1) for k, v in rates.items()}, file=sys.stderr, flush=True)
    return rates, said, bandwidth


if __name__ == "__main__":
    main()
