"""ONNX Runtime: three graphs (vision encoder, token embedding, decoder with past; see `runtime.onnx_decoder`).

Shape legend: N = images, C = 3, S = image side, T = visual tokens, L = new tokens, D = hidden, V = vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.api import Logits, Message, PreparedImage, Prompt
from runtime.onnx_decoder import GrowingCache, make_decoder
from runtime.options import LoadOptions
from runtime.source import Source, need_package, open_artifact, visible
from vlm import preprocess
from vlm.errors import ArtifactError, MissingPiece
from vlm.manifest import Manifest

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def providers(device: str, provider: str, key: str | None) -> list[Any]:
    """Execution providers of one graph, first choice first.

    TensorRT runs the vision encoder only: its shapes are fixed. The decoder's past grows with every token, and for each
    length outside the range seen before ONNX Runtime would build another engine in the middle of an answer.
    """
    if device != "cuda" or provider == "auto":
        return [PROVIDERS[device]]
    cache = Path.home() / ".cache" / "align-edge" / "onnxruntime-tensorrt" / (key or "unknown")
    settings: dict[str, Any] = {}
    with contextlib.suppress(OSError):  # without a place to keep engines they are built at every start
        cache.mkdir(parents=True, exist_ok=True)
        settings = {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": True,
        }
    return [("TensorrtExecutionProvider", settings), PROVIDERS["cuda"]]


class OnnxBackend:
    """Three sessions and the context of the running conversation."""

    def __init__(self, source: Source, options: LoadOptions) -> None:
        import onnxruntime

        self._ort = onnxruntime
        self._source = source
        self._device = options.device
        self.info = source.info("onnx", options)
        self._vision = self._session("vision_encoder", options, {"pixel_values"}, options.provider)
        self._embed = self._session("embed_tokens", options, {"input_ids"})
        self._decoder = self._session("decoder", options, {"inputs_embeds", "attention_mask"})
        names = [node.name for node in self._decoder.get_outputs()]
        if names[0] != "logits" or len(names) != len(GrowingCache.past_names(self._decoder)) + 1:
            raise ArtifactError(f"{source.root}: the decoder's outputs do not match its past inputs; export again")
        room, vocabulary = self.info.context_length, self.info.vocab_size
        path = source.path_of("decoder")
        self._context: Any = make_decoder(onnxruntime, self._decoder, path, options.device, room, vocabulary)
        self._ids_11 = np.zeros((1, 1), np.int64)

    def _session(self, role: str, options: LoadOptions, required: set[str], provider: str = "auto") -> Any:
        path = self._source.path_of(role)
        settings = self._ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3  # errors only: they arrive as exceptions too
        wanted = providers(options.device, provider, self._source.weights_sha256)
        try:
            session = self._ort.InferenceSession(str(path), settings, providers=wanted)
        except Exception as error:  # the library's exceptions share no public base class
            raise ArtifactError(f"{path} cannot be loaded ({str(error).splitlines()[0]}); export again") from None
        # ONNX Runtime goes on without a provider whose libraries do not load: the figures would be the processor's
        name = wanted[0][0] if isinstance(wanted[0], tuple) else wanted[0]
        if name not in session.get_providers():
            raise MissingPiece(
                f"onnxruntime could not start {name} (CUDA, cuDNN or TensorRT libraries missing or of another version); "
                "run `pip install 'onnxruntime-gpu[cuda,cudnn]'`"
            )
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
        (embeds_1LD,) = self._embed.run(None, {"input_ids": np.asarray([prompt.ids[start:stop]], np.int64)})
        for place, rows in visible(prompt, self.info.tokens_per_image, start, stop):
            embeds_1LD[0, place] = embeds[rows.image][rows.rows]
        return self._context.append(embeds_1LD, start)

    def step(self, token_id: int) -> Logits:
        self._ids_11[0, 0] = token_id
        (embeds_11D,) = self._embed.run(None, {"input_ids": self._ids_11})
        return self._context.append(embeds_11D, self._context.length)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._source.tokenizer.decode(ids)

    def pieces(self) -> Mapping[int, str | bytes] | None:
        return self._source.pieces

    def sync(self) -> None:
        """Nothing to wait for: `run` returns after the device is done."""

    def close(self) -> None:
        self._vision = self._embed = self._decoder = self._context = None


def open_onnx(root: Path, options: LoadOptions, manifest: Manifest) -> OnnxBackend:
    """Artefact of format `onnx` -> backend.

    Raises:
        ArtifactError: a file is missing, altered or not this layout. MissingPiece: no onnxruntime, or no GPU in it.
    """
    need_package("onnxruntime", "onnx-gpu" if options.device == "cuda" else "onnx")
    import onnxruntime

    wanted = "TensorrtExecutionProvider" if options.provider == "tensorrt" else PROVIDERS[options.device]
    if wanted not in onnxruntime.get_available_providers():
        raise MissingPiece(f"this onnxruntime has no {wanted}; run `pip install 'align-edge[onnx-gpu]'`")
    return OnnxBackend(open_artifact(root, manifest, options.latents), options)
