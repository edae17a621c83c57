"""ONNX Runtime on the CPU for both graph layouts. Needs onnxruntime and NumPy, no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from export.replay import F32, Prompt
from vlm import allocator
from vlm.errors import ArtifactError, MissingPiece
from vlm.preprocess import ImageSpec, pixels

LARGE = 1 << 27  # bytes of weights from which memory is worth more than seconds
PIECE = 64  # positions of a batch that go into a large graph at once
LOGITS = 1 << 24  # of one call; all positions of a prompt at once would take gigabytes with a large vocabulary
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def session(path: Path, emulated: bool = False) -> Any:
    """Open one graph on one CPU thread.

    Args:
        emulated: the graph may use bfloat16, which ONNX Runtime has no CPU kernels for (see `export.emulate`).

    Raises:
        ArtifactError: the file is not a graph ONNX Runtime can load.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingPiece("onnxruntime is missing; run `pip install onnxruntime`") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        if emulated:
            from export.emulate import as_float32, uses_bfloat16

            if uses_bfloat16(path):
                with tempfile.TemporaryDirectory(prefix="emulated-") as folder:
                    as_float32(path, Path(folder) / path.name)
                    return session(Path(folder) / path.name)
        model: str | bytes = str(path)
        if _external_bytes(path) > LARGE and (lean := overridable(path)):
            model, options.enable_cpu_mem_arena, options.enable_mem_pattern = lean, False, False
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # widens late, and frees
            options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent.resolve()))
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library raises many types without a common base
        raise ArtifactError(f"{path} cannot be loaded by ONNX Runtime ({str(error).splitlines()[0]})") from None


def overridable(path: Path) -> bytes:
    """The same graph, its float16 matrices declared as inputs with a default; empty if it has none.

    ONNX Runtime has no float16 products on the CPU. It widens constant matrices while it loads, to twice their bytes in
    memory. Matrices that a caller might replace stay in the mapped file, and are widened during a run.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    half = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16 and len(t.dims) == 2]
    model.graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in half)
    return bytes(model.SerializeToString()) if half else b""


def _opener(path: Path) -> Callable[[], Any]:
    """Gives the session of a graph; a large one is opened for each call, so that its pages are not held beside others."""
    held = session(path)
    if _external_bytes(path) <= LARGE:
        return lambda: held
    return lambda: session(path)


def _external_bytes(path: Path) -> int:
    data = path.with_name(f"{path.name}_data")
    return data.stat().st_size if data.is_file() else 0


def merge_features(embeds_SH: npt.NDArray[Any], ids: tuple[int, ...], image_id: int, features_NH: F32) -> F32:
    """Put visual tokens where the placeholders are."""
    merged = np.array(embeds_SH)
    merged[np.asarray(ids) == image_id] = features_NH
    return merged


class OnnxBackend:
    """vision_encoder, embed_tokens and decoder_model_merged; cache [1, heads, positions, width]."""

    def __init__(self, vision: Path, embed: Path, decoder: Path, image: ImageSpec, image_id: int) -> None:
        self.image, self.image_id = image, image_id
        self.vision, self.embed, self.decoder = _opener(vision), _opener(embed), session(decoder)
        self.large = _external_bytes(decoder) > LARGE
        inputs = self.decoder.get_inputs()
        self.past_names = [i.name for i in inputs if i.name.startswith("past_key_values.")]
        first = next(i for i in inputs if i.name == self.past_names[0])
        self.past_shape = first.shape
        self.past_type: type[np.floating[Any]] = np.float16 if first.type == "tensor(float16)" else np.float32
        self.cache: list[npt.NDArray[Any]] = []

    def features(self, image: Image.Image) -> F32:
        feed = {"pixel_values": pixels(image, self.image)[None]}
        return np.asarray(self.vision().run(None, feed)[0][0], np.float32)

    def embeddings(self, ids_BS: npt.NDArray[np.int64]) -> F32:
        return np.asarray(self.embed().run(None, {"input_ids": ids_BS})[0], np.float32)

    def run(
        self, embeds_BSH: F32, mask_BT: npt.NDArray[np.int64], positions_BS: npt.NDArray[np.int64], keep: int
    ) -> F32:
        """One decoder call on the running cache; logits [B, keep or S, V]. An empty cache starts a sequence."""
        if not self.cache:
            shape = (embeds_BSH.shape[0], self.past_shape[1], 0, self.past_shape[3])
            self.cache = [np.zeros(shape, self.past_type) for _ in self.past_names]
        if self.large:
            allocator.give_back()  # what the last run widened lies in the heap, beside all of the mapped file
        logits, *self.cache = self.decoder.run(
            None,
            {
                "inputs_embeds": embeds_BSH,
                "attention_mask": mask_BT,
                "position_ids": positions_BS,
                "num_logits_to_keep": np.array(keep, np.int64),
                **dict(zip(self.past_names, self.cache, strict=True)),
            },
        )
        return np.asarray(logits, np.float32)

    def prefill_batch(
        self, embeds_BSH: F32, mask_BS: npt.NDArray[np.int64], positions_BS: npt.NDArray[np.int64]
    ) -> F32:
        """Logits after padded prompts, [B, V]; into a large graph they go as pieces, whose activations are small."""
        self.cache, length = [], embeds_BSH.shape[1]
        piece = PIECE if self.large else length
        for start in range(0, length, piece):
            end = min(start + piece, length)
            logits = self.run(embeds_BSH[:, start:end], mask_BS[:, :end], positions_BS[:, start:end], 1)
        return logits[:, -1]

    def prompt_embeddings(self, prompt: Prompt) -> F32:
        embeds = self.embeddings(np.asarray([prompt.ids], np.int64))[0]
        return merge_features(embeds, prompt.ids, self.image_id, self.features(prompt.image))[None]

    def prefill(self, prompt: Prompt) -> F32:
        return self.prefill_all(prompt, keep=1)[-1]

    def prefill_all(self, prompt: Prompt, keep: int = 0) -> F32:
        """Logits of the last `keep` prompt positions (0: all), [positions, V]."""
        self.cache = []
        length = len(prompt.ids)
        mask, positions = np.ones((1, length), np.int64), np.arange(length, dtype=np.int64)[None]
        return self.run(self.prompt_embeddings(prompt), mask, positions, keep)[0]

    def prefill_rows(self, prompt: Prompt, chosen: npt.NDArray[np.int64]) -> F32:
        """Logits of some prompt positions, [chosen, V]; a long prompt goes in as pieces."""
        embeds_BSH, rows = self.prompt_embeddings(prompt), []
        self.cache, piece = [], max(LOGITS // self.decoder.get_outputs()[0].shape[-1], 1)
        for start in range(0, len(prompt.ids), piece):
            end = min(start + piece, len(prompt.ids))
            mask, positions = np.ones((1, end), np.int64), np.arange(start, end, dtype=np.int64)[None]
            logits_SV = self.run(embeds_BSH[:, start:end], mask, positions, 0)[0]
            rows.append(logits_SV[chosen[(start <= chosen) & (chosen < end)] - start])
        return np.concatenate(rows)

    def step(self, token: int) -> F32:
        past = self.cache[0].shape[2]
        mask, positions = np.ones((1, past + 1), np.int64), np.array([[past]], np.int64)
        return self.run(self.embeddings(np.array([[token]], np.int64)), mask, positions, keep=1)[0, -1]

    def close(self) -> None:
        self.cache = []


class DeltaBackend:
    """The TensorRT graphs on the CPU, driven as the device drives them: one buffer per tensor, rows appended.

    Row 0 of the buffers is reserved and always masked, because an empty cache tensor is not portable.
    """

    def __init__(self, vision: Path, table: Path, decoder: Path, image: ImageSpec, image_id: int, context: int) -> None:
        self.image, self.image_id = image, image_id
        self.vision, self.decoder = session(vision, emulated=True), session(decoder, emulated=True)
        self.table = np.load(table, mmap_mode="r")
        inputs = {port.name: port for port in self.decoder.get_inputs()}
        self.pixels, self.dtype = _numpy_type(self.vision.get_inputs()[0]), _numpy_type(inputs["inputs_embeds"])
        self.past_names = [name for name in inputs if name.startswith("past_")]
        past = inputs[self.past_names[0]]
        _, _, heads, width = past.shape
        self.buffers = [np.zeros((1, context + 1, heads, width), _numpy_type(past)) for _ in self.past_names]
        self.length = 0

    def features(self, image: Image.Image) -> F32:
        feed = {"pixel_values": pixels(image, self.image)[None].astype(self.pixels)}
        return np.asarray(self.vision.run(None, feed)[0][0], np.float32)

    def _run(self, embeds_SH: npt.NDArray[Any]) -> F32:
        new, past = embeds_SH.shape[0], self.length + 1
        allowed = np.arange(past + new)[None, :] <= np.arange(past, past + new)[:, None]
        allowed[:, 0] = False
        bias = np.where(allowed, 0, np.finfo(self.dtype).min).astype(self.dtype)
        feed = {
            "inputs_embeds": embeds_SH[None].astype(self.dtype),
            "position_ids": np.arange(self.length, self.length + new, dtype=np.int64)[None],
            "attention_bias": bias[None, None],
            **{n: b[:, :past] for n, b in zip(self.past_names, self.buffers, strict=True)},
        }
        logits, token, *rows = self.decoder.run(None, feed)
        if np.isfinite(logits).all() and logits[0, -1, token[0, 0]] != logits[0, -1].max():
            raise ArtifactError("the decoder names another token than its logits do; export again")
        for buffer, row in zip(self.buffers, rows, strict=True):
            buffer[:, past : past + new] = row
        self.length += new
        return np.asarray(logits[0, -1], np.float32)

    def prefill(self, prompt: Prompt) -> F32:
        self.length = 0
        embeds = np.asarray(self.table[list(prompt.ids)])
        return self._run(merge_features(embeds, prompt.ids, self.image_id, self.features(prompt.image)))

    def step(self, token: int) -> F32:
        return self._run(np.asarray(self.table[[token]]))

    def close(self) -> None:
        self.buffers = []


def _numpy_type(port: Any) -> type[np.floating[Any]]:
    return np.float16 if port.type == "tensor(float16)" else np.float32
