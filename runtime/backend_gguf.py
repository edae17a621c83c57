"""llama.cpp through llama-cpp-python's low-level bindings: text GGUF and mmproj, one step at a time.

The chat handler of that package is not used: it clears the context and encodes the image again on every call. Token
ids come from the artefact's own tokenizer, so that every backend sees the same prompt. Keys and values are float32
and flash attention is off unless `kv` says otherwise, so that answers equal PyTorch's.
Shape legend: S = image side, T = visual tokens, D = hidden, V = vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from runtime.api import Constraint, Logits, Message, ModelInfo, PreparedImage, Prompt, Sampling
from runtime.options import LoadOptions
from runtime.source import Source, need_package, open_artifact, visible
from vlm import preprocess
from vlm.errors import ArtifactError, MissingPiece
from vlm.manifest import Manifest
from vlm.preprocess import ImageSpec

BATCH = 512
# llama.cpp's name, bytes per number (q8_0: blocks of 32 bytes and a float16 scale)
KV_TYPES = {"f32": ("GGML_TYPE_F32", 4.0), "f16": ("GGML_TYPE_F16", 2.0), "q8_0": ("GGML_TYPE_Q8_0", 34 / 32)}
PADDING = 1024  # llama.cpp rounds the context up
_log_callback: Any = None  # llama.cpp keeps a bare pointer to it: it must outlive every model


class GgufBackend:
    """Owns a llama model, its context and the multimodal context; frees them in `close`."""

    def __init__(self, source: Source, options: LoadOptions) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self._llama, self._mtmd = llama_cpp, mtmd_cpp
        self._source = source
        self._model: Any = None
        self._context: Any = None
        self._vision: Any = None
        self._batch: Any = None
        self._width = 0
        self._token = (llama_cpp.llama_token * 1)()
        self._one = llama_cpp.llama_batch_get_one(
            self._token, 1
        )  # it points to `_token`: made once, used at every step
        self._logits_at = 0
        self._logits_V = np.empty(0, np.float32)
        self.info = _with_cache_bytes(source.info("gguf", options), source.model, options.kv)
        _silence(llama_cpp, mtmd_cpp)
        llama_cpp.llama_backend_init()
        try:
            self._open(options)
        except BaseException:
            self.close()
            raise

    def _open(self, options: LoadOptions) -> None:
        llama, path = self._llama, self._source.path_of("text_gguf")
        model_params = llama.llama_model_default_params()
        model_params.n_gpu_layers = -1 if options.device == "cuda" else 0
        self._model = llama.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise ArtifactError(f"{path} cannot be loaded by llama.cpp; export again")
        vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        if vocab != self.info.vocab_size:
            raise ArtifactError(f"{path} has {vocab} tokens, the manifest says {self.info.vocab_size}; export again")
        params = llama.llama_context_default_params()
        params.n_ctx = self.info.context_length
        params.n_batch = params.n_ubatch = min(BATCH, self.info.context_length)
        params.n_threads = params.n_threads_batch = options.threads
        kind, _ = KV_TYPES[options.kv]
        params.type_k = params.type_v = getattr(llama, kind)
        exact = options.kv == "f32"
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED if exact else llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.offload_kqv = params.op_offload = options.device == "cuda"
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            size = f"{self.info.context_length} tokens with keys and values in {options.kv}"
            raise ArtifactError(f"{path}: llama.cpp made no context of {size}; lower --context or leave --kv out")
        if not self.info.context_length <= llama.llama_n_ctx(self._context) < self.info.context_length + PADDING:
            raise MissingPiece(
                "this llama-cpp-python and its llama.cpp disagree about parameter layout; "
                "run `pip install --force-reinstall 'align-edge[gguf]'`"
            )
        self._width = llama.llama_model_n_embd(self._model)
        self._batch = llama.llama_batch_init(BATCH, self._width, 1)
        mmproj = self._source.path_of("mmproj")
        vision_params = self._mtmd.mtmd_context_params_default()
        vision_params.use_gpu = options.device == "cuda"
        vision_params.print_timings = vision_params.warmup = False
        vision_params.n_threads = options.threads
        vision_params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._vision = self._mtmd.mtmd_init_from_file(str(mmproj).encode(), self._model, vision_params)
        if not self._vision:
            raise ArtifactError(f"{mmproj} cannot be loaded by llama.cpp; export again")

    def prepare(self, messages: Sequence[Message], at_hand: Container[str] = frozenset()) -> Prompt:
        return self._source.prompt(messages, self._chunk, at_hand)

    def _chunk(self, image: Pillow.Image, spec: ImageSpec) -> _ImageChunk:
        # handed over at S x S, so that llama.cpp's own resizing and padding never come into play
        return _ImageChunk(self._mtmd, self._vision, preprocess.resize(image, spec), spec.tokens)

    def encode(self, images: Sequence[PreparedImage]) -> list[Any]:
        features = []
        for image in images:
            if self._mtmd.mtmd_encode_chunk(self._vision, image.pixels.pointer):
                raise RuntimeError("llama.cpp could not encode the image")
            output = self._mtmd.mtmd_get_output_embd(self._vision)
            tokens = self._source.image.tokens
            features.append(np.ctypeslib.as_array(output, (tokens, self._width)).copy())
        return features

    def prefill(self, prompt: Prompt, embeds: Sequence[Any], start: int = 0, stop: int | None = None) -> Logits:
        llama = self._llama
        memory = llama.llama_get_memory(self._context)
        if start == 0:
            llama.llama_memory_clear(memory, True)
        elif not llama.llama_memory_seq_rm(memory, 0, start, -1):
            raise RuntimeError(f"llama.cpp could not forget the context from token {start} on")
        ids, done = prompt.ids[start:stop], 0
        for place, rows in visible(prompt, self.info.tokens_per_image, start, stop):
            self._decode(ids[done : place.start])
            self._decode_embeds(embeds[rows.image][rows.rows], start + place.start)
            done = place.stop
        self._decode(ids[done:])
        return self._logits()

    def step(self, token_id: int) -> Logits:
        self._token[0] = token_id
        self._run(self._one)
        return self._logits()

    def _decode(self, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), BATCH):
            piece = ids[start : start + BATCH]
            array = (self._llama.llama_token * len(piece))(*piece)
            self._run(self._llama.llama_batch_get_one(array, len(piece)))

    def _decode_embeds(self, embeds_TD: Any, position: int) -> None:
        """Visual tokens stand in the context like text: one position each, causal (plain LLaVA)."""
        for start in range(0, len(embeds_TD), BATCH):
            piece_TD = np.ascontiguousarray(embeds_TD[start : start + BATCH], np.float32)
            batch, n = self._batch, len(piece_TD)
            ctypes.memmove(batch.embd, piece_TD.ctypes.data, piece_TD.nbytes)
            for i in range(n):
                batch.pos[i] = position + start + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = i == n - 1
            batch.n_tokens = n
            self._run(batch)

    def _run(self, batch: Any) -> None:
        if status := self._llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with status {status}")

    def _logits(self) -> Logits:
        """llama.cpp's own row, seen from NumPy: it holds until the next decode."""
        pointer = self._llama.llama_get_logits_ith(self._context, -1)
        if not pointer:
            raise RuntimeError("llama.cpp gave no logits")
        address = ctypes.addressof(pointer.contents)
        if address != self._logits_at:  # making the view costs more than all the rest of a step
            self._logits_at, self._logits_V = address, np.ctypeslib.as_array(pointer, (self.info.vocab_size,))
        return self._logits_V

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._source.tokenizer.decode(ids)

    def pieces(self) -> Mapping[int, str | bytes] | None:
        return self._source.pieces

    def sync(self) -> None:
        """Wait for queued work of llama.cpp's backend."""
        self._llama.llama_synchronize(self._context)

    def constrain(self, sampling: Sampling) -> Constraint:
        from runtime.grammar import LlamaGrammar

        return LlamaGrammar(self._llama, self._llama.llama_model_get_vocab(self._model), self.info, sampling)

    def close(self) -> None:
        if self._batch:
            self._llama.llama_batch_free(self._batch)
        if self._vision:
            self._mtmd.mtmd_free(self._vision)
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._batch = self._vision = self._context = self._model = None


class _ImageChunk:
    """One image as llama.cpp's multimodal library holds it: normalised, not yet encoded."""

    def __init__(self, mtmd: Any, vision: Any, image: Pillow.Image, tokens: int) -> None:
        self._mtmd = mtmd
        self._chunks = mtmd.mtmd_input_chunks_init()
        data = image.tobytes()
        bitmap = mtmd.mtmd_bitmap_init(image.width, image.height, (ctypes.c_uint8 * len(data)).from_buffer_copy(data))
        try:
            marker = mtmd.mtmd_default_marker()
            text = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            status = mtmd.mtmd_tokenize(vision, self._chunks, ctypes.byref(text), bitmaps, 1)
        finally:
            mtmd.mtmd_bitmap_free(bitmap)
        if status or mtmd.mtmd_input_chunks_size(self._chunks) != 1:
            raise ArtifactError("the mmproj file wraps images in extra tokens; this runtime supports plain LLaVA only")
        self.pointer = mtmd.mtmd_input_chunks_get(self._chunks, 0)
        got = mtmd.mtmd_input_chunk_get_n_tokens(self.pointer)
        if got != tokens:
            raise ArtifactError(f"the mmproj file makes {got} tokens of an image, the manifest says {tokens}")

    def __del__(self) -> None:
        if self._chunks:
            self._mtmd.mtmd_input_chunks_free(self._chunks)


def _with_cache_bytes(info: ModelInfo, model: dict[str, Any], kind: str) -> ModelInfo:
    """The manifest counts the float16 cache other llama.cpp programs use; this one is of the type asked for."""
    if not {"layers", "kv_heads", "head_dim"} <= set(model):
        return info
    numbers = 2 * model["layers"] * model["kv_heads"] * model["head_dim"]
    return replace(info, kv_bytes_per_token=int(numbers * KV_TYPES[kind][1]))


def _silence(llama_cpp: Any, mtmd_cpp: Any) -> None:
    """Failures come back as return values; the library's log would only bury the answer."""
    global _log_callback
    if _log_callback is None:
        _log_callback = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
        llama_cpp.llama_log_set(_log_callback, None)
        mtmd_cpp.mtmd_log_set(_log_callback, None)
        mtmd_cpp.mtmd_helper_log_set(_log_callback, None)


def open_gguf(root: Path, options: LoadOptions, manifest: Manifest) -> GgufBackend:
    """Artefact of format `gguf` -> backend.

    Raises:
        ArtifactError: a file is missing, altered or not loadable. MissingPiece: no llama_cpp, or none with a GPU.
    """
    need_package("llama_cpp", "gguf")
    import llama_cpp

    if options.device == "cuda" and not llama_cpp.llama_supports_gpu_offload():
        raise MissingPiece(
            "this llama-cpp-python was built without CUDA; run "
            "`CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-binary :all: llama-cpp-python`"
        )
    return GgufBackend(open_artifact(root, manifest, options.latents), options)
