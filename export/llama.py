"""llama.cpp through its C interface: run an artefact's GGUF files for checking. No torch."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from export.replay import F32, Prompt
from vlm.errors import ArtifactError, MissingPiece
from vlm.preprocess import ImageSpec, resize

# llama.cpp keeps the raw pointer: a collected callback would leave it dangling
_keep_alive: list[Any] = []
_listeners: list[Callable[[str], object]] = []


def library() -> tuple[Any, Any]:
    """The llama and mtmd bindings, initialised once and silenced.

    Raises:
        MissingPiece: llama-cpp-python is not installed.
    """
    try:
        import llama_cpp
        from llama_cpp import mtmd_cpp
    except ImportError:
        raise MissingPiece("llama-cpp-python is missing; run `pip install llama-cpp-python`") from None
    if not _keep_alive:

        @llama_cpp.llama_log_callback
        def quiet(_level: int, text: bytes, _data: Any) -> None:
            for listener in _listeners:
                listener(text.decode(errors="replace"))

        _keep_alive.append(quiet)
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        mtmd_cpp.mtmd_log_set(quiet, ctypes.c_void_p(0))
        mtmd_cpp.mtmd_helper_log_set(quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
    return llama_cpp, mtmd_cpp


@contextlib.contextmanager
def listen(listener: Callable[[str], object]) -> Iterator[None]:
    """Hand over what llama.cpp writes to its log during the block, in pieces; at other times it is dropped."""
    # whoever else uses llama.cpp in this process may have taken the log over
    library()[0].llama_log_set(_keep_alive[0], ctypes.c_void_p(0))
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class LlamaBackend:
    """A text GGUF with its mmproj on one CPU thread: float32 cache, no flash attention, no sampling."""

    def __init__(self, text: Path, mmproj: Path, image: ImageSpec, image_token: str, context: int = 1024) -> None:
        self.lib, self.mtmd = library()
        self.image, self.image_token = image, image_token
        self.model = self.context = self.vision = None
        model_params = self.lib.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(str(text).encode(), model_params)
        if not self.model:
            raise ArtifactError(f"{text} cannot be loaded by llama.cpp")
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, min(context, 512), min(context, 512)
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type, params.offload_kqv, params.op_offload = 0, False, False
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        self.context = self.lib.llama_init_from_model(self.model, params)
        vision_params = self.mtmd.mtmd_context_params_default()
        vision_params.use_gpu = vision_params.print_timings = vision_params.warmup = False
        vision_params.n_threads, vision_params.flash_attn_type = 1, 0
        self.vision = self.mtmd.mtmd_init_from_file(str(mmproj).encode(), self.model, vision_params)
        if not self.context or not self.vision:
            self.close()
            raise ArtifactError(f"{mmproj} cannot be loaded by llama.cpp for {text.name}")
        self.vocab_size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        self.hidden = self.lib.llama_model_n_embd(self.model)

    def close(self) -> None:
        if self.vision:
            self.mtmd.mtmd_free(self.vision)
        if self.context:
            self.lib.llama_free(self.context)
        if self.model:
            self.lib.llama_model_free(self.model)
        self.vision = self.context = self.model = None

    def tokenise(self, text: str) -> list[int]:
        """Special tokens recognised, none added; the rule prompts are tokenised by."""
        data = text.encode()
        vocab = self.lib.llama_model_get_vocab(self.model)
        room = len(data) + 8
        buffer = (ctypes.c_int32 * room)()
        count = self.lib.llama_tokenize(vocab, data, len(data), buffer, room, False, True)
        return list(buffer[:count])

    def stops_at(self, token: int) -> bool:
        """Whether llama.cpp's own programs end an answer at this token."""
        return bool(self.lib.llama_vocab_is_eog(self.lib.llama_model_get_vocab(self.model), token))

    def declared(self) -> dict[str, Any]:
        """What the text file tells other programs about prompts: token ids, whether one is added, the template."""
        lib, vocab = self.lib, self.lib.llama_model_get_vocab(self.model)
        template = lib.llama_model_chat_template(self.model, None)
        return {
            "bos_token_id": int(lib.llama_vocab_bos(vocab)),
            "eos_token_id": int(lib.llama_vocab_eos(vocab)),
            "pad_token_id": int(lib.llama_vocab_pad(vocab)),
            "adds_a_token": bool(lib.llama_vocab_get_add_bos(vocab) or lib.llama_vocab_get_add_eos(vocab)),
            "chat_template": "" if template is None else template.decode(),
        }

    def _chunks(self, text: str, image: Image.Image) -> Any:
        rgb = np.ascontiguousarray(np.asarray(resize(image, self.image)), np.uint8)
        data = rgb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = self.mtmd.mtmd_bitmap_init(self.image.size, self.image.size, data)
        encoded = text.replace(self.image_token, self.mtmd.mtmd_default_marker().decode()).encode()
        entry = self.mtmd.mtmd_input_text(text=encoded, text_len=len(encoded), add_special=False, parse_special=True)
        chunks = self.mtmd.mtmd_input_chunks_init()
        status = self.mtmd.mtmd_tokenize(self.vision, chunks, ctypes.byref(entry), (ctypes.c_void_p * 1)(bitmap), 1)
        self.mtmd.mtmd_bitmap_free(bitmap)
        if status:
            self.mtmd.mtmd_input_chunks_free(chunks)
            raise ArtifactError(f"llama.cpp could not tokenise the prompt (status {status})")
        return chunks

    def _read_ids(self, chunks: Any, image_id: int) -> tuple[int, ...]:
        ids: list[int] = []
        for index in range(self.mtmd.mtmd_input_chunks_size(chunks)):
            chunk = self.mtmd.mtmd_input_chunks_get(chunks, index)
            count = ctypes.c_size_t()
            if self.mtmd.mtmd_input_chunk_get_type(chunk) == self.mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                ids += [image_id] * self.mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            else:
                tokens = self.mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                ids += tokens[: count.value]
        return tuple(ids)

    def ids_of(self, prompt: Prompt, image_id: int) -> tuple[int, ...]:
        """Token ids llama.cpp makes of a prompt, visual tokens written as `image_id`."""
        chunks = self._chunks(prompt.text, prompt.image)
        try:
            return self._read_ids(chunks, image_id)
        finally:
            self.mtmd.mtmd_input_chunks_free(chunks)

    def features(self, image: Image.Image) -> F32:
        chunks = self._chunks(self.image_token, image)
        try:
            for index in range(self.mtmd.mtmd_input_chunks_size(chunks)):
                chunk = self.mtmd.mtmd_input_chunks_get(chunks, index)
                if self.mtmd.mtmd_input_chunk_get_type(chunk) != self.mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                    continue
                if self.mtmd.mtmd_encode_chunk(self.vision, chunk):
                    raise ArtifactError("llama.cpp could not encode the image")
                count = self.mtmd.mtmd_input_chunk_get_n_tokens(chunk)
                flat = np.ctypeslib.as_array(self.mtmd.mtmd_get_output_embd(self.vision), (count * self.hidden,))
                return flat.reshape(count, self.hidden).copy()
        finally:
            self.mtmd.mtmd_input_chunks_free(chunks)
        raise ArtifactError("llama.cpp found no image in the prompt")

    def _logits(self) -> F32:
        pointer = self.lib.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, (self.vocab_size,)).astype(np.float32)

    def prefill(self, prompt: Prompt) -> F32:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        chunks = self._chunks(prompt.text, prompt.image)
        position = ctypes.c_int32(0)
        try:
            status = self.mtmd.mtmd_helper_eval_chunks(
                self.vision, self.context, chunks, 0, 0, 512, True, ctypes.byref(position)
            )
        finally:
            self.mtmd.mtmd_input_chunks_free(chunks)
        if status:
            raise ArtifactError(f"llama.cpp could not run the prompt (status {status})")
        return self._logits()

    def step(self, token: int) -> F32:
        batch = self.lib.llama_batch_get_one((ctypes.c_int32 * 1)(token), 1)
        status = self.lib.llama_decode(self.context, batch)
        if status:
            raise ArtifactError(f"llama.cpp could not decode (status {status})")
        return self._logits()
