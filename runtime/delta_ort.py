"""The graphs of a TensorRT artefact in ONNX Runtime: on the CPU, on CUDA, or through its TensorRT provider.

The fall-back where engines cannot be built, and the same keeping of the cache: one buffer per tensor, the past bound at
its beginning, the new rows written behind it by the graph itself. Nothing is copied on any provider.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from runtime.api import Logits
from runtime.delta import ITEM_BYTES, NUMPY, RESERVED, Array, bias_of, ports
from runtime.options import LoadOptions
from runtime.source import Source, need_package
from vlm.errors import ArtifactError, MissingPiece, UserError

PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    # what a TensorRT of this provider does not take, CUDA does
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
}


class OrtRunner:
    """Sessions of the two graphs, and the cache as buffers of ONNX Runtime's own."""

    def __init__(self, source: Source, options: LoadOptions, plan: dict[str, Any], provider: str) -> None:
        import onnxruntime

        assert source.manifest is not None
        self._ort, self._device = onnxruntime, "cpu" if provider == "cpu" else "cuda"
        io = source.manifest.io
        inputs = ports(io, "decoder", "inputs")
        self._past = [name for name in inputs if name.startswith("past_")]
        self._new = [name for name in ports(io, "decoder", "outputs") if name.startswith("new_")]
        cache_type, (_, _, heads, width) = inputs[self._past[0]]
        if "bfloat16" in (cache_type, ports(io, "vision_encoder", "inputs")["pixel_values"][0]) and provider == "cpu":
            raise UserError("bfloat16 graphs do not run on a CPU; export --precision fp16, or run them on a GPU")
        self._dtype = NUMPY[inputs["inputs_embeds"][0]]
        self._pixels = NUMPY[ports(io, "vision_encoder", "inputs")["pixel_values"][0]]
        self._cache_type, self._row = cache_type, (heads, width)
        self._row_bytes = heads * width * ITEM_BYTES[cache_type]
        self.context = min(source.info("onnx", options).context_length, int(plan["cache"]["max_rows"]) - RESERVED)
        self._limit = self.context + RESERVED
        self.max_new = int(plan["cache"]["prefill_rows"])
        self._vision = self._session(source, options, "vision_encoder", plan, provider)
        self._decoder = self._session(source, options, "decoder", plan, provider)
        self._buffers = [self._zeros((1, self._limit, heads, width)) for _ in self._past]

    def _session(self, source: Source, options: LoadOptions, role: str, plan: dict[str, Any], provider: str) -> Any:
        settings = self._ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        chosen: list[Any] = list(PROVIDERS[provider])
        if provider == "tensorrt":
            chosen[0] = (chosen[0], tensorrt_options(source.root, plan["engines"][role]["profiles"]))
        path = source.path_of(role)
        try:
            session = self._ort.InferenceSession(str(path), settings, providers=chosen)
        except Exception as error:  # the library's exceptions share no public base class
            raise ArtifactError(f"{path} cannot be loaded ({str(error).splitlines()[0]}); export again") from None
        if (first := PROVIDERS[provider][0]) not in session.get_providers():
            raise MissingPiece(f"{first} did not start (its libraries are not found); look at the messages above")
        return session

    def _zeros(self, shape: tuple[int, ...]) -> Any:
        if self._cache_type == "bfloat16":
            return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, np.uint16), 16)
        return self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, NUMPY[self._cache_type]), self._device, 0)

    def encode(self, pixels_NCSS: Array) -> Array:
        (features_NTD,) = self._vision.run(None, {"pixel_values": pixels_NCSS.astype(self._pixels, copy=False)})
        features: Array = features_NTD
        return features

    def extend(self, embeds_LD: Array, length: int) -> Logits:
        new, past = len(embeds_LD), length + RESERVED
        if past + new > self._limit:
            raise ValueError(f"{past + new} rows do not fit a cache of {self._limit}")
        binding = self._decoder.io_binding()
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds_LD[None].astype(self._dtype, copy=False)))
        binding.bind_cpu_input("position_ids", np.arange(length, length + new, dtype=np.int64)[None])
        binding.bind_cpu_input("attention_bias", bias_of(new, past, self._dtype)[None, None])
        element = 16 if self._cache_type == "bfloat16" else NUMPY[self._cache_type]
        for before, after, buffer in zip(self._past, self._new, self._buffers, strict=True):
            at = buffer.data_ptr()
            binding.bind_input(before, self._device, 0, element, (1, past, *self._row), at)
            binding.bind_output(after, self._device, 0, element, (1, new, *self._row), at + past * self._row_bytes)
        binding.bind_output("logits", "cpu")
        binding.bind_output("token", "cpu")
        self._decoder.run_with_iobinding(binding)
        logits_11V = binding.get_outputs()[-2].numpy()
        logits_V: Logits = logits_11V[0, -1].astype(np.float32, copy=False)
        return logits_V

    def forget(self) -> None:
        """Rows behind the past are never read here: every call sees exactly the rows that count."""

    def sync(self) -> None:
        """Nothing to wait for: `run` returns after the device is done."""

    def close(self) -> None:
        self._vision = self._decoder = None
        self._buffers = []


def tensorrt_options(root: Path, profiles: dict[str, Any]) -> dict[str, Any]:
    """Options of ONNX Runtime's TensorRT provider: engines and timings kept, one profile over all of the plan's."""
    folder = root / "engines" / "onnxruntime"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror}); engines are kept there, copy the artefact"
        ) from None
    union: dict[str, list[list[int]]] = {}
    for shapes in profiles.values():
        for name, (low, best, high) in shapes.items():
            known = union.setdefault(name, [list(low), list(best), list(high)])
            known[0] = [min(a, b) for a, b in zip(known[0], low, strict=True)]
            known[2] = [max(a, b) for a, b in zip(known[2], high, strict=True)]

    def text(index: int) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, shapes[index]))}" for name, shapes in union.items())

    return {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(folder),
        # the graphs are typed: these only allow the types they already hold
        "trt_fp16_enable": True,
        "trt_int8_enable": True,
        "trt_profile_min_shapes": text(0),
        "trt_profile_opt_shapes": text(1),
        "trt_profile_max_shapes": text(2),
    }


def open_ort(source: Source, options: LoadOptions, plan: dict[str, Any], provider: str) -> OrtRunner:
    """Runner on one of PROVIDERS.

    Raises:
        MissingPiece: this ONNX Runtime does not have the provider. ArtifactError: a graph does not load.
    """
    need_package("onnxruntime", "onnx" if provider == "cpu" else "onnx-gpu")
    import onnxruntime

    if (wanted := PROVIDERS[provider][0]) not in onnxruntime.get_available_providers():
        raise MissingPiece(f"this onnxruntime has no {wanted}; run `pip install 'align-edge[onnx-gpu]'`")
    return OrtRunner(source, options, plan, provider)
