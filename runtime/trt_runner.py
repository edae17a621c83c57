"""Both engines of an artefact on one stream: images, prompt pieces, and single tokens as recorded CUDA graphs.

The cache is one block of memory: a row of slabs, one per key or value tensor of a layer, each with room for the whole
context. New rows go to their place in one of two ways. A prompt piece is bound with exactly the past there is, so its
rows are written in place where that address is a multiple of 256; elsewhere, and for graphs, they go to a staging block
and one strided copy puts all layers' rows in place. A graph fixes shapes, so graphs are made for a few past lengths
(buckets); rows between the real past and the bucket's end are masked.

Shape legend: N = images, T = visual tokens, L = new tokens, P = past rows with the reserved one, D = hidden, V = vocabulary.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from runtime.api import Logits, ModelFailed
from runtime.cuda import U8, Device, aligned
from runtime.delta import ITEM_BYTES, NUMPY, RESERVED, Array, DeviceLogits, bias_of, ports
from runtime.options import LoadOptions
from runtime.source import Source
from runtime.trt_engine import Context, TrtEngine

INPUTS = ("inputs_embeds", "position_ids", "attention_bias")


class Arena:
    """Named regions of one block, in pinned host memory and on the device at the same offsets."""

    def __init__(self, device: Device, sizes: dict[str, int]) -> None:
        self._device, self.offsets, self.total = device, {}, 0
        for name, size in sizes.items():
            self.offsets[name] = self.total
            self.total += aligned(size)
        self.host: U8 = device.pinned(self.total)
        self.base = device.malloc(self.total)

    def at(self, name: str) -> int:
        return self.base + self.offsets[name]

    def put(self, name: str, values: Array) -> int:
        """Into host memory; the number of bytes."""
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        self.host[self.offsets[name] : self.offsets[name] + raw.size] = raw
        return int(raw.size)

    def send(self, name: str, values: Array) -> None:
        nbytes = self.put(name, values)
        self._device.upload(self.base, self.host, nbytes, self.offsets[name])


class TrtRunner:
    """See `runtime.delta.Runner`."""

    def __init__(
        self,
        source: Source,
        options: LoadOptions,
        plan: dict[str, Any],
        folder: Path,
        trt: Any,
        runtime: Any,
        cudart: Any,
    ) -> None:
        assert source.manifest is not None
        io = source.manifest.io
        self._device = device = Device(cudart)
        self._recorded: dict[int, tuple[Any, Context]] = {}
        self._record = True
        self._last: DeviceLogits | None = None
        try:
            profiles = {name: engine["profiles"] for name, engine in plan["engines"].items()}
            self._vision = TrtEngine(trt, runtime, folder / "vision_encoder.engine", profiles["vision_encoder"])
            self._decoder = TrtEngine(trt, runtime, folder / "decoder.engine", profiles["decoder"])
            for name, engine in (("vision_encoder", self._vision), ("decoder", self._decoder)):
                engine.check(ports(io, name, "inputs"), ports(io, name, "outputs"))
            self._scratch_bytes = max(self._vision.scratch_bytes, self._decoder.scratch_bytes)
            self._scratch = device.malloc(self._scratch_bytes)
            self._open_decoder(source, options, plan, ports(io, "decoder", "inputs"))
            self._open_vision(io)
            device.sync()
        except BaseException:
            device.close()
            raise

    def _open_decoder(self, source: Source, options: LoadOptions, plan: dict[str, Any], inputs: dict[str, Any]) -> None:
        device, info = self._device, source.info("tensorrt", options)
        self._pasts = [name for name in inputs if name.startswith("past_")]
        self._news = [name.replace("past_", "new_", 1) for name in self._pasts]
        cache_type, (_, _, heads, width) = inputs[self._pasts[0]]
        self._row, self._row_bytes = (heads, width), heads * width * ITEM_BYTES[cache_type]
        self._dtype, self._hidden = NUMPY[inputs["inputs_embeds"][0]], int(inputs["inputs_embeds"][1][2])
        self.context = min(info.context_length, int(plan["cache"]["max_rows"]) - RESERVED)
        self._rows = self.context + RESERVED
        self.max_new = min(int(plan["cache"]["prefill_rows"]), self.context)
        ends = [int(end) for end in plan["cache"]["decode_buckets"]]
        self._buckets = [*(end for end in ends if end < self.context), self.context]
        tensors = len(self._pasts)
        self._pitch = aligned(self._rows * self._row_bytes)
        self._cache = device.malloc(tensors * self._pitch)
        self._staging_pitch = aligned(self.max_new * self._row_bytes)
        self._staging = device.malloc(tensors * self._staging_pitch)
        item = self._dtype.itemsize
        # the bias of a piece is widest at the end of the context, and of a token at the last bucket
        wide = {
            "inputs_embeds": self.max_new * self._hidden * item,
            "position_ids": self.max_new * 8,
            "attention_bias": self.max_new * (self._rows + self.max_new) * item,
        }
        narrow = {
            "inputs_embeds": self._hidden * item,
            "position_ids": 8,
            "attention_bias": (self._rows + 1) * item,
        }
        self._piece, self._single = Arena(device, wide), Arena(device, narrow)
        self._logits, self._token = device.malloc(info.vocab_size * 4), device.malloc(8)
        self._logits_host, self._token_host = device.pinned(info.vocab_size * 4), device.pinned(8)
        self._vocabulary, self._used = info.vocab_size, 0
        self._prefill = self._context(self._decoder, "prefill")
        self._decode = self._context(self._decoder, "decode")

    def _open_vision(self, io: dict[str, Any]) -> None:
        name, (dtype, (_, *image)) = next(iter(ports(io, "vision_encoder", "inputs").items()))
        out, (out_dtype, (_, *features)) = next(iter(ports(io, "vision_encoder", "outputs").items()))
        self._pixel_name, self._pixel_type, self._image = name, NUMPY[dtype], tuple(image)
        self._feature_name, self._feature_type, self._features = out, NUMPY[out_dtype], tuple(features)
        self._images = {int(p.rpartition("_")[2]): self._context(self._vision, p) for p in self._vision.profiles}
        most = max(self._images)
        self._pixels = Arena(self._device, {name: most * int(np.prod(image)) * self._pixel_type.itemsize})
        nbytes = most * int(np.prod(features)) * self._feature_type.itemsize
        self._feature_memory, self._feature_host = self._device.malloc(nbytes), self._device.pinned(nbytes)

    def _context(self, engine: TrtEngine, profile: str) -> Context:
        return engine.context(profile, self._device, self._scratch, self._scratch_bytes)

    def encode(self, pixels_NCSS: Array) -> Array:
        pieces, at = [], 0
        while at < len(pixels_NCSS):
            left = len(pixels_NCSS) - at
            count = max(size for size in self._images if size <= left)
            pieces.append(self._encode(pixels_NCSS[at : at + count].astype(self._pixel_type, copy=False)))
            at += count
        return np.concatenate(pieces)

    def _encode(self, pixels_NCSS: Array) -> Array:
        count, context = len(pixels_NCSS), self._images[len(pixels_NCSS)]
        self._pixels.send(self._pixel_name, pixels_NCSS)
        context.bind(self._pixel_name, self._pixels.base, (count, *self._image))
        context.bind(self._feature_name, self._feature_memory)
        context.enqueue()
        nbytes = count * int(np.prod(self._features)) * self._feature_type.itemsize
        self._device.download(self._feature_host, self._feature_memory, nbytes)
        self._device.sync()
        return self._feature_host[:nbytes].view(self._feature_type).reshape(count, *self._features).copy()

    def extend(self, embeds_LD: Array, length: int) -> Logits:
        new, past = len(embeds_LD), length + RESERVED
        if past + new > self._rows:
            raise ValueError(f"{past + new} rows do not fit a cache of {self._rows}")
        if self._last is not None:
            self._last.end()
        embeds_LD = embeds_LD.astype(self._dtype, copy=False)
        positions_L = np.arange(length, length + new, dtype=np.int64)
        if new == 1 and self._record:
            self._token_graph(embeds_LD, positions_L, past)
        else:
            self._exact(self._decode if new == 1 else self._prefill, embeds_LD, positions_L, past)
        self._used = max(self._used, past + new)
        self._device.sync()
        token = int(self._token_host[:8].view(np.int64)[0])
        self._last = DeviceLogits(token, self._fetch)
        return self._last  # type: ignore[return-value]  # an array to whoever asks for more than its argmax

    def _exact(self, context: Context, embeds_LD: Array, positions_L: Array, past: int) -> None:
        """Bound with exactly the past there is."""
        new, arena = len(embeds_LD), self._piece
        for name, values in zip(INPUTS, (embeds_LD, positions_L, bias_of(new, past, self._dtype)), strict=True):
            arena.send(name, values)
        target = self._cache + past * self._row_bytes
        in_place = target % 256 == 0
        self._bind(context, arena, new, past, target if in_place else None)
        context.enqueue()
        self._device.download(self._token_host, self._token, 8)
        if not in_place:
            self._place(new, past)

    def _bind(self, context: Context, arena: Arena, new: int, past: int, target: int | None) -> None:
        shapes = ((1, new, self._hidden), (1, new), (1, 1, new, past + new))
        for name, shape in zip(INPUTS, shapes, strict=True):
            context.bind(name, arena.at(name), shape)
        for i, (before, after) in enumerate(zip(self._pasts, self._news, strict=True)):
            context.bind(before, self._cache + i * self._pitch, (1, past, *self._row))
            context.bind(after, self._staging + i * self._staging_pitch if target is None else target + i * self._pitch)
        context.bind("logits", self._logits)
        context.bind("token", self._token)

    def _place(self, new: int, past: int) -> None:
        self._device.copy_rows(
            self._cache + past * self._row_bytes,
            self._pitch,
            self._staging,
            self._staging_pitch,
            new * self._row_bytes,
            len(self._pasts),
        )

    def _token_graph(self, embeds_1D: Array, positions_1: Array, past: int) -> None:
        """One token by a graph of the smallest bucket that holds its past."""
        bucket = next(end for end in self._buckets if end >= past)
        bias_T = bias_of(1, bucket, self._dtype)[0]
        bias_T[past:bucket] = np.finfo(self._dtype).min
        for name, values in zip(INPUTS, (embeds_1D, positions_1, bias_T), strict=True):
            self._single.put(name, values)
        if bucket in self._recorded:
            self._device.launch(self._recorded[bucket][0])
        else:
            self._first(bucket)
        self._place(1, past)

    def _first(self, bucket: int) -> None:
        """Run a bucket for the first time, then record it.

        Its context is its own: a graph stays bound to the shapes its context had. TensorRT wants one run after a change
        of shapes before recording, which is the run this token needs anyway.
        """
        context = self._context(self._decoder, "decode")
        self._bind(context, self._single, 1, bucket, None)
        nbytes = self._single.offsets["attention_bias"] + (bucket + 1) * self._dtype.itemsize

        def work() -> None:
            self._device.upload(self._single.base, self._single.host, nbytes)
            context.enqueue()
            self._device.download(self._token_host, self._token, 8)

        work()
        self._device.sync()
        try:
            self._recorded[bucket] = (self._device.record(work), context)  # the graph refers to the context's memory
        except ModelFailed as error:
            self._record = False
            logging.getLogger(__name__).warning("decoding goes on without CUDA graphs: %s", error.message)

    def _fetch(self) -> Logits:
        self._device.download(self._logits_host, self._logits, self._vocabulary * 4)
        self._device.sync()
        logits_V: Logits = self._logits_host[: self._vocabulary * 4].view(np.float32).copy()
        return logits_V

    def forget(self) -> None:
        """Zero the rows in use: an overflow (NaN) in one would pass through any mask in the next conversation."""
        if self._used:
            self._device.clear_rows(self._cache, self._pitch, self._used * self._row_bytes, len(self._pasts))
        self._used = 0

    def sync(self) -> None:
        self._device.sync()

    def close(self) -> None:
        self._device.sync()
        self._recorded, self._images = {}, {}
        del self._prefill, self._decode
        self._vision.close()
        self._decoder.close()
        self._device.close()
