"""Write GGUF files tensor by tensor, block by block, with llama.cpp's own `gguf` package for everything but the copying."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.gguf_source import Array, Weights, widen
from vlm.console import track
from vlm.errors import ArtifactError, CheckpointError

PAIR_KEY = "align_edge.pair_id"
HALF_MAX = 65504.0
FLOATS = ("F32", "F16", "BF16")
BLOCKS = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file to be written.

    Attributes:
        shape: as in torch, rows first.
        type: GGML type name: F32, F16, BF16 or Q8_0.
        read: gives the rows in order, in float32 or as stored (float16; bfloat16 as uint16).
    """

    name: str
    shape: tuple[int, ...]
    type: str
    read: Callable[[], Iterable[Array]]

    @property
    def bytes(self) -> int:
        return stored_bytes(self.shape, self.type)


def stored_bytes(shape: Sequence[int], type_name: str) -> int:
    """Bytes of a tensor in a GGML type."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def plain(weights: Weights, source: str, name: str, type_name: str) -> Tensor:
    """A tensor that is copied or rounded as it is."""
    shape = weights[source].shape
    return Tensor(name, shape, type_name, lambda: weights.raw_blocks(source))


def changed(weights: Weights, source: str, name: str, type_name: str, change: Callable[[Array], Array]) -> Tensor:
    """A tensor whose rows or columns move; it is read whole."""
    shape = weights[source].shape
    return Tensor(name, shape, type_name, lambda: [change(weights.whole(source))])


def encode(block: Array, type_name: str, name: str) -> Array:
    """Rows in the bytes of a GGML type.

    Raises:
        CheckpointError: a number is beyond float16.
    """
    import gguf

    if type_name == "BF16" and block.dtype == np.uint16:
        return block
    if type_name == "F16" and block.dtype == np.float16:
        return block
    values = widen(block)
    if type_name == "F32":
        return values
    if type_name == "F16":
        if float(np.abs(values).max(initial=0.0)) > HALF_MAX:
            kind = "--precision f32,vision=f32" if name.startswith(("v.", "mm.")) else "--precision bf16"
            raise CheckpointError(f"{name} holds a number beyond float16; use {kind}")
        return values.astype(np.float16)
    return np.asarray(gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_name]))


def write(
    path: Path, arch: str, describe: Callable[[Any], None], tensors: Sequence[Tensor], hollow: bool = False
) -> None:
    """Write a GGUF file.

    Args:
        describe: adds the metadata to a `gguf.GGUFWriter`.
        hollow: leave the data out: the file has its full length and takes no disk. Enough for a plan.
    """
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    try:
        describe(writer)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.type]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        if hollow:
            end = file.tell() + sum(gguf.GGUFWriter.ggml_pad(t.bytes, writer.data_alignment) for t in tensors)
            file.truncate(end)
            return
        for tensor in track(tensors, len(tensors), f"write {path.name}"):
            written = 0
            for block in tensor.read():
                data = np.ascontiguousarray(encode(block, tensor.type, tensor.name))
                file.write(data.data.cast("B") if data.ndim else data.tobytes())
                written += data.nbytes
            if written != tensor.bytes:
                raise RuntimeError(f"{tensor.name}: {written} bytes written, {tensor.bytes} declared")
            writer.write_padding(file, written)
        file.flush()
    finally:
        for file in writer.fout or ():
            file.close()


def read_tensors(path: Path) -> dict[str, Any]:
    """Tensors of a GGUF file by name (`gguf.ReaderTensor`), memory-mapped."""
    import gguf

    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def read_pair_id(path: Path) -> str:
    """The pair id inside a GGUF file, empty if it has none.

    Raises:
        ArtifactError: not a GGUF file, or a truncated one.
    """
    import gguf

    try:
        field = gguf.GGUFReader(path).get_field(PAIR_KEY)
    except (ValueError, IndexError, OSError) as error:
        raise ArtifactError(f"{path} is not a whole GGUF file ({error}); export again") from None
    return "" if field is None else str(field.contents())
