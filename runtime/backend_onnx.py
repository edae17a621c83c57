"""ONNX Runtime: three graphs (vision encoder, token embedding, decoder with past), key-values kept as OrtValues.

Shape legend: N = images, C = 3, S = image side, T = visual tokens, L = new tokens, P = past tokens, D = hidden,
K = key-value heads, E = head width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.api import Logits, Message, PreparedImage, Prompt
from runtime.options import LoadOptions
from runtime.source import Source, need_package, open_artifact, visible
from vlm import preprocess
from vlm.errors import ArtifactError, MissingPiece
from vlm.manifest import Manifest

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class OnnxBackend:
    """The key-values never leave the device: each step's outputs are bound as the next step's inputs."""

    def __init__(self, source: Source, options: LoadOptions) -> None:
        import onnxruntime

        self._ort = onnxruntime
        self._source = source
        self._device = options.device
        self.info = source.info("onnx", options)
        self._vision = self._session("vision_encoder", options, {"pixel_values"})
        self._embed = self._session("embed_tokens", options, {"input_ids"})
        self._decoder = self._session("decoder", options, {"inputs_embeds", "attention_mask"})
        self._inputs = {node.name: node for node in self._decoder.get_inputs()}
        self._outputs = [node.name for node in self._decoder.get_outputs()]
        self._past = [name for name in self._inputs if name.startswith("past_key_values.")]
        if self._outputs[0] != "logits" or len(self._outputs) != len(self._past) + 1:
            raise ArtifactError(f"{source.root}: the decoder's outputs do not match its past inputs; export again")
        self._cache: dict[str, Any] = {}
        self._length = 0

    def _session(self, role: str, options: LoadOptions, required: set[str]) -> Any:
        path = self._source.path_of(role)
        settings = self._ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3  # errors only: they arrive as exceptions too
        try:
            session = self._ort.InferenceSession(str(path), settings, providers=[PROVIDERS[options.device]])
        except Exception as error:  # the library's exceptions share no public base class
            raise ArtifactError(f"{path} cannot be loaded ({str(error).splitlines()[0]}); export again") from None
        if missing := sorted(required - {node.name for node in session.get_inputs()}):
            raise ArtifactError(f"{path} has no input {missing[0]!r}; export again with this version")
        return session

    def prepare(self, messages: Sequence[Message], at_hand: Container[str] = frozenset()) -> Prompt:
        return self._source.prompt(messages, preprocess.pixels, at_hand)

    def encode(self, images: Sequence[PreparedImage]) -> list[Any]:
        pixels_NCSS = np.stack([image.pixels for image in images])
        (features_NTD,) = self._vision.run(None, {"pixel_values": pixels_NCSS})
        return [embeds_TD.copy() for embeds_TD in features_NTD]  # each may be kept without the others

    def prefill(self, prompt: Prompt, embeds: Sequence[Any], start: int = 0, stop: int | None = None) -> Logits:
        embeds_1LD = self._embedded(prompt.ids[start:stop])
        for place, rows in visible(prompt, self.info.tokens_per_image, start, stop):
            embeds_1LD[0, place] = embeds[rows.image][rows.rows]
        if start == 0:
            self._cache = {name: self._value(self._empty_past(name)) for name in self._past}
        elif start < self._length:
            # through the host: ONNX Runtime has no view on a part of a value
            self._cache = {name: self._value(value.numpy()[:, :, :start]) for name, value in self._cache.items()}
        self._length = start
        return self._run(embeds_1LD)

    def step(self, token_id: int) -> Logits:
        return self._run(self._embedded([token_id]))

    def _embedded(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        embeds_1LD: npt.NDArray[np.float32]
        (embeds_1LD,) = self._embed.run(None, {"input_ids": np.asarray([ids], np.int64)})
        return embeds_1LD

    def _run(self, embeds_1LD: npt.NDArray[np.float32]) -> Logits:
        new = embeds_1LD.shape[1]
        total = self._length + new
        feeds = {
            "inputs_embeds": embeds_1LD.astype(DTYPES[self._inputs["inputs_embeds"].type], copy=False),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self._length, total, dtype=np.int64)[None],
            "num_logits_to_keep": np.asarray(1, np.int64),
        }
        binding = self._decoder.io_binding()
        for name, value in feeds.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, value)
        for name, cached in self._cache.items():
            binding.bind_ortvalue_input(name, cached)
        binding.bind_output("logits", "cpu")
        for name in self._outputs[1:]:
            binding.bind_output(name, self._device)
        self._decoder.run_with_iobinding(binding)
        values = binding.get_outputs()
        self._cache = {
            name.replace("present", "past_key_values", 1): value
            for name, value in zip(self._outputs[1:], values[1:], strict=True)
        }
        self._length = total
        logits: Logits = values[0].numpy()[0, -1].astype(np.float32, copy=False)
        return logits

    def _empty_past(self, name: str) -> npt.NDArray[Any]:
        node = self._inputs[name]
        _, heads, _, width = node.shape
        return np.zeros((1, heads, 0, width), DTYPES[node.type])

    def _value(self, array: npt.NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._source.tokenizer.decode(ids)

    def sync(self) -> None:
        """Nothing to wait for: `run` returns after the device is done."""

    def close(self) -> None:
        self._vision = self._embed = self._decoder = None
        self._cache = {}


def open_onnx(root: Path, options: LoadOptions, manifest: Manifest) -> OnnxBackend:
    """Artefact of format `onnx` -> backend.

    Raises:
        ArtifactError: a file is missing, altered or not this layout. MissingPiece: no onnxruntime, or no GPU in it.
    """
    need_package("onnxruntime", "onnx-gpu" if options.device == "cuda" else "onnx")
    import onnxruntime

    if PROVIDERS[options.device] not in onnxruntime.get_available_providers():
        raise MissingPiece(
            f"this onnxruntime has no {PROVIDERS[options.device]}; run `pip install 'align-edge[onnx-gpu]'`"
        )
    return OnnxBackend(open_artifact(root, manifest), options)
