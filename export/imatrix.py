"""An importance matrix over images and text: how strongly each column of a matrix is driven.

llama.cpp's own `llama-imatrix` reads text only, so the columns that image tokens drive are rounded as if they did not
matter. Here the student runs in PyTorch on prompts with images and answers. Image and text tokens have the same total
weight. The file is the GGUF form of `llama-imatrix` (sums of squares and counts), so other tools read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from export.gguf_text import LAYER, NAMES
from export.student import DECODERS, Facts
from vlm.errors import UserError

if TYPE_CHECKING:
    from export.questions import Question

HEAD = "output.weight"
FLOOR = 1e-6  # of the mean: a column that was never driven must not make a block weightless
SUMS, COUNTS = ".in_sum2", ".counts"
CHUNK = 512
TOKENS, FEWEST, MOST = 8192, 8, 128

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Importance:
    """What was measured.

    Attributes:
        power: GGUF tensor name -> mean square of each input column.
        tokens: how many token rows stand behind it.
        data: what it was gathered on.
        sha256: of the pixels and token ids, empty for a file from elsewhere.
    """

    power: dict[str, F32]
    tokens: int
    data: str
    sha256: str = ""

    def weights(self) -> dict[str, F32]:
        """For llama.cpp: positive everywhere."""
        return {name: np.maximum(v, FLOOR * max(float(v.mean()), 1e-30)) for name, v in self.power.items()}

    def to_json(self) -> dict[str, Any]:
        return {"entries": len(self.power), "tokens": self.tokens, "data": self.data, "sha256": self.sha256}

    def save(self, path: Path) -> None:
        """As `llama-imatrix --output-format gguf` writes it."""
        import gguf

        writer = gguf.GGUFWriter(path, "")
        writer.kv_data[0].pop(gguf.Keys.General.ARCHITECTURE, None)  # a matrix belongs to no architecture
        writer.add_type(gguf.GGUFType.IMATRIX)
        writer.add_array(gguf.Keys.IMatrix.DATASETS, [self.data])
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, max(self.tokens // CHUNK, 1))
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, CHUNK)
        writer.add_string("align_edge.calibration_sha256", self.sha256)
        for name in sorted(self.power):
            writer.add_tensor(name + SUMS, (self.power[name] * self.tokens).astype(np.float32)[None])
            writer.add_tensor(name + COUNTS, np.full((1, 1), self.tokens, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def load(path: Path) -> Importance:
    """Read an importance matrix, ours or llama-imatrix's.

    Raises:
        UserError: not such a file.
    """
    import gguf

    if not path.is_file():
        raise UserError(f"--imatrix {path} is not a file; leave it out to gather one")
    try:
        reader = gguf.GGUFReader(path)
        tensors = {t.name: np.asarray(t.data, np.float32) for t in reader.tensors}
        data = reader.get_field(gguf.Keys.IMatrix.DATASETS)
        stamp = reader.get_field("align_edge.calibration_sha256")
    except (ValueError, IndexError, OSError) as error:
        raise UserError(
            f"--imatrix {path} is no GGUF file ({error}); convert old ones with llama-imatrix --in-file OLD -o NEW.gguf"
        ) from None
    power: dict[str, F32] = {}
    most = 0.0
    for name in sorted(n.removesuffix(SUMS) for n in tensors if n.endswith(SUMS)):
        count = float(tensors[name + COUNTS].max()) if name + COUNTS in tensors else 0.0
        if count > 0:
            power[name] = tensors[name + SUMS].reshape(-1) / np.float32(count)
            most = max(most, count)
    if not power:
        raise UserError(
            f"--imatrix {path} holds no importance matrix; give a file that llama-imatrix or this tool wrote"
        )
    sets = data.contents() if data else []
    return Importance(power, int(most), ", ".join(map(str, sets)) or path.name, str(stamp.contents()) if stamp else "")


def check(importance: Importance, shapes: dict[str, tuple[int, ...]], where: Path) -> None:
    """The matrix must fit the model: its names and widths.

    Raises:
        UserError: names the first matrix that is missing or has another width.
    """
    for name, shape in shapes.items():
        if len(shape) != 2 or name == "token_embd.weight":
            continue
        seen = importance.power.get(name)
        if seen is None and name == HEAD:  # llama-imatrix leaves the head out unless it is told not to
            continue
        if seen is None:
            raise UserError(f"--imatrix {where} lacks {name}; it was made for another model")
        if len(seen) != shape[1]:
            raise UserError(f"--imatrix {where}: {name} has {len(seen)} columns, this student {shape[1]}")


def gather(student: Any, folder: Path | None, questions: Sequence[Question] = (), called: str = "") -> Importance:
    """Run the student in PyTorch over calibration prompts: images of a folder, else `questions`, else digits to train on.

    Args:
        called: name of what was taken, for the file.

    Raises:
        UserError: the folder holds no image.
    """
    from export.calibrate import importance, observe
    from export.evidence import calibration_prompts

    count = min(max(TOKENS // (student.checkpoint.image.tokens + 32), FEWEST), MOST)
    prompts, answers = calibration_prompts(student, folder, count, questions)
    seen = observe(student, prompts, answers, keep=0)
    power = {}
    for path in seen.seen:
        values = importance(seen, path)
        if values is not None and (name := _gguf_name(path, student.facts)):
            power[name] = values
    power["token_embd.weight"] = power["output.weight"]  # the head, where it is the table
    tokens = sum(len(p.ids) + len(a) for p, a in zip(prompts, answers, strict=True))
    source = f"{len(prompts)} images of {called or 'digits (training split)'} with questions and answers"
    return Importance(power, tokens, source, seen.sha256)


def _gguf_name(path: str, facts: Facts) -> str | None:
    """`model.language_model.layers.0.mlp.up_proj` -> `blk.0.ffn_up.weight`; None for matrices of the tower."""
    if path == "lm_head":
        return "output.weight"
    if facts.decoder in DECODERS:
        found = LAYER.fullmatch(path.removeprefix("model.") + ".weight")
        return f"blk.{found[1]}.{NAMES[found[2]]}.weight" if found else None
    import gguf

    if "language_model." not in path:
        return None
    kinds = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds.get(facts.decoder, gguf.MODEL_ARCH.LLAMA), facts.layers)
    found_name = names.get_name(path.replace("language_model.", "", 1))
    return None if found_name is None else f"{found_name}.weight"
