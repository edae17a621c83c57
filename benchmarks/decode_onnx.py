"""int4 decode speed of our ONNX decoder against onnxruntime-genai's on the same weights and threads, in turns.

Both sides hold the same random Qwen2.5-0.5B-shaped decoder in 4 bits (block 32, symmetric, head included, int8 products).
Each round feeds a context, then times some greedy tokens a side; rounds alternate which side goes first. Ours is
driven the way a runtime should: key-value buffers of full length shared between input and output, bound once.
The share of memory bandwidth counts packed weights and cache read per token over the read rate measured in the same rounds.

    python -m benchmarks.decode_onnx --student DIR --artefact ARTEFACT --rounds 12 --threads 2 \\
        --genai-path FOLDER_WITH_ONNXRUNTIME_GENAI --out benchmarks/results/decode_onnx.json

On a machine that others use, take --threads 1 --clock cpu: processor seconds then, and no share of bandwidth.
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


def read_rate(buffer: Any) -> float:
    """Bytes per second of summing a gigabyte."""
    started = time.perf_counter()
    buffer.sum()
    return buffer.numel() * buffer.element_size() / (time.perf_counter() - started)


def main() -> None:
    import torch

    arguments = parser(__doc__ or "")
    arguments.set_defaults(rounds=12, threads=2)
    arguments.add_argument("--student", type=Path, required=True)
    arguments.add_argument("--artefact", type=Path, required=True)
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
    ours, theirs = OurDecoder(given.artefact, given.threads), Genai(folder, given.threads)
    manifest = read_manifest(given.artefact)
    ids = np.random.default_rng(0).integers(5, manifest.model["vocab_size"], given.context).tolist()
    buffer = torch.ones(1 << (28 if given.clock == "wall" else 1), dtype=torch.float32)
    sides: dict[str, Callable[[], tuple[float, list[int]]]] = {
        "ours": lambda: time_ours(ours, ids, given.tokens, CLOCKS[given.clock]),
        "genai": lambda: time_genai(theirs, ids, given.tokens, CLOCKS[given.clock]),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    said: dict[str, list[int]] = {}
    bandwidth = []
    for turn in range(given.rounds + 1):
        for name in list(sides) if turn % 2 else list(sides)[::-1]:
            rate, said[name] = sides[name]()
            if turn:
                rates[name].append(rate)
        bandwidth.append(read_rate(buffer) if given.clock == "wall" else 1.0)
        if turn:
            print(
                turn,
                {k: round(v[-1], 1) for k, v in rates.items()},
                f"{bandwidth[-1] / 1e9:.1f} GB/s read",
                file=sys.stderr,
            )
    per_token = manifest.model["decoder_weight_bytes"] + given.context * manifest.model["kv_bytes_per_token"]
    peak = statistics.median(bandwidth)
    wall = given.clock == "wall"
    settings = {
        "context": given.context,
        "tokens": given.tokens,
        "clock": given.clock,
        "threads": given.threads,
        "bytes_per_token": per_token,
        "read_bandwidth_bytes_s": peak if wall else None,
        "share_of_bandwidth": {k: statistics.median(v) * per_token / peak for k, v in rates.items()} if wall else None,
        "tokens_s": rates,
        "same_greedy_tokens": int(np.argmin([*map(int.__eq__, said["ours"], said["genai"]), False])),
    }
    finish(
        [compare("int4 decode against onnxruntime-genai", rates["ours"], rates["genai"], "tokens/s")],
        settings,
        given.out,
    )


if __name__ == "__main__":
    main()
