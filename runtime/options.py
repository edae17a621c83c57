"""Options of `runtime.load`, passed whole."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vlm.errors import UserError

Device = Literal["cpu", "cuda"]
Provider = Literal["auto", "cpu", "cuda", "tensorrt", "edge-llm"]
CacheType = Literal["f32", "f16", "q8_0"]
Latents = Literal["emit", "prefill"]


@dataclass(frozen=True)
class LoadOptions:
    """How a model is put on this machine; the same defaults for every backend, so that they compare.

    Attributes:
        threads: CPU threads of the model. One, because small decoders do not gain from more and llama.cpp loses
            badly when cores are shared.
        context: upper limit on the context in tokens; memory for it is taken at load by some backends.
        queue_size: requests that may wait while one runs.
        image_cache_mb: room for image embeddings kept for later requests; 0 keeps none.
        prefill_chunk: prompt tokens computed between two looks at the cancel flag.
        provider: TensorRT artefacts: their engines (`auto`), or their graphs in ONNX Runtime on this provider. ONNX
            artefacts on a GPU: `tensorrt` lets ONNX Runtime build a TensorRT engine of the vision encoder.
        kv: GGUF artefacts: type of keys and values. f32 answers as PyTorch does; f16 and q8_0 are smaller, and llama.cpp
            then uses flash attention, as its own programs do.
        latents: of models that say latent tokens before an answer: emit them, one step each, or put them into the prompt.
    """

    threads: int = 1
    device: Device = "cpu"
    context: int = 4096
    queue_size: int = 8
    image_cache_mb: int = 256
    prefill_chunk: int = 512
    provider: Provider = "auto"
    kv: CacheType = "f32"
    latents: Latents = "emit"

    def __post_init__(self) -> None:
        for name in ("threads", "context", "queue_size", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.image_cache_mb < 0:
            raise UserError(f"image_cache_mb is {self.image_cache_mb}; give 0 (keep none) or more")
        for name, kinds in (("device", Device), ("provider", Provider), ("kv", CacheType), ("latents", Latents)):
            if (value := getattr(self, name)) not in get_args(kinds):
                raise UserError(f"{name} is {value!r}; known: {', '.join(get_args(kinds))}")


def options_from(values: dict[str, Any]) -> LoadOptions:
    """Keyword arguments -> LoadOptions; an unknown name is an error, not ignored."""
    known = [f.name for f in dataclasses.fields(LoadOptions)]
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"unknown option {unknown[0]!r}; known: {', '.join(known)}")
    return LoadOptions(**values)
