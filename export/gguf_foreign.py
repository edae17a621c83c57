"""Decoders this project has no names for: a llama.cpp checkout's own converter writes the text file.

That converter refuses LLaVA checkpoints with a SigLIP tower. So the decoder is laid out as a plain causal language
model, which it knows; the tower and projector are ours to write (`export.gguf_mmproj`). What the converter cannot know
about prompts (template, end of sequence, pair) is put right afterwards, and the same gates measure the result.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from export.gguf_file import PAIR_KEY
from export.gguf_source import Array, Weights
from export.gguf_text import HEAD, Origin, describe_origin
from export.gguf_tokens import declared, pre_tokenizer_name, read_tokenizer_json
from export.stages import code_sha256
from vlm.errors import CheckpointError, MissingPiece, UserError
from vlm.load import Checkpoint

SCRIPT = "convert_hf_to_gguf.py"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt")  # fmt: skip
# the converter knows splitting rules by a checksum of published tokenizers; ours are named by the rule itself
DRIVER = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
name = sys.argv[2]
import conversion.base as base
if name:
    for kind in (base.TextModel, base.ModelBase):
        if hasattr(kind, "get_vocab_base_pre"):
            kind.get_vocab_base_pre = lambda self, tokenizer: name
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def check_checkout(folder: Path) -> None:
    """Raises UserError: not a llama.cpp checkout."""
    for needed in (SCRIPT, "conversion"):
        if not (folder / needed).exists():
            raise UserError(f"--llama-cpp {folder} holds no {needed}; give the folder of a current llama.cpp checkout")


def checkout_key(folder: Path) -> str:
    """Of the program text a conversion runs: what another version of it wrote is written again."""
    return code_sha256(folder / SCRIPT, folder / "conversion", folder / "gguf-py")


def write_text(origin: Origin, weights: Weights, checkout: Path, path: Path, kind: str) -> None:
    """The text file, converted by the checkout's script and then given this student's prompts and origin.

    Raises:
        CheckpointError: the converter refuses the decoder; its own words are in the message.
    """
    scratch = path.with_name(".decoder")
    raw = path.with_name(".converted.gguf")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        lay_out(origin.checkpoint, weights, scratch)
        convert(checkout, scratch, raw, kind, _rule(origin.checkpoint))
        restamp(raw, path, origin)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        raw.unlink(missing_ok=True)


def lay_out(checkpoint: Checkpoint, weights: Weights, folder: Path) -> None:
    """The decoder as a Hugging Face causal language model of its own, copied tensor by tensor.

    Raises:
        CheckpointError: transformers knows no such language model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = dict(checkpoint.config["text_config"])
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type", ""))
    if name is None:
        raise CheckpointError(f"{checkpoint.directory}: {config.get('model_type')!r} is no causal language model")
    folder.mkdir(parents=True)
    tied = bool(checkpoint.config.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    config.update(architectures=[name], tie_word_embeddings=tied and HEAD not in weights)
    (folder / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER_FILES:
        if (checkpoint.directory / file).is_file():
            shutil.copyfile(checkpoint.directory / file, folder / file)
    if (checkpoint.directory / "generation_config.json").is_file():
        shutil.copyfile(checkpoint.directory / "generation_config.json", folder / "generation_config.json")
    chosen = [n for n in weights.stored if n.startswith(("language_model.", "lm_head."))]
    _copy_tensors(weights, chosen, folder / "model.safetensors")


def _copy_tensors(weights: Weights, names: Iterable[str], path: Path) -> None:
    """A safetensors file with `language_model.` spelled `model.`; blocks are copied, nothing is held."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place, chosen = 0, list(names)
    for name in chosen:
        stored = weights[name]
        span = [place, place + stored.bytes]
        header[_plain_name(name)] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": span}
        place += stored.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in chosen:
            for block in weights.raw_blocks(name):
                np.ascontiguousarray(block).tofile(file)


def _plain_name(name: str) -> str:
    return name.replace("language_model.", "model.", 1)


def _rule(checkpoint: Checkpoint) -> str:
    """Name of the splitting rule where it is known exactly, else empty: the converter then decides by its checksums."""
    try:
        return pre_tokenizer_name(read_tokenizer_json(checkpoint))
    except CheckpointError:
        return ""


def convert(checkout: Path, source: Path, target: Path, kind: str, rule: str) -> None:
    """Run the checkout's converter in a process of its own.

    Raises:
        CheckpointError: it failed. MissingPiece: it needs a package that is not installed.
    """
    script = checkout / SCRIPT
    command = [sys.executable, "-c", DRIVER, str(checkout), rule, str(script), str(source)]
    command += ["--outfile", str(target), "--outtype", kind]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode or not target.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no reason given"]
        if missing := re.search(r"No module named '([\w.]+)'", said[0]):
            raise MissingPiece(f"{script} needs {missing[1]}; run `pip install {missing[1]}`")
        raise CheckpointError(f"{script} could not convert the decoder: {said[0].strip()[:300]}")


def restamp(source: Path, target: Path, origin: Origin) -> None:
    """Copy a GGUF file tensor by tensor with this student's prompts, origin and pair in its metadata."""
    import gguf

    reader = gguf.GGUFReader(source)
    arch = str(reader.get_field(gguf.Keys.General.ARCHITECTURE).contents())
    writer = gguf.GGUFWriter(target, arch)
    told = declared(origin.checkpoint.tokenizer)
    names = gguf.Keys.Tokenizer
    ours = (
        names.CHAT_TEMPLATE,
        names.BOS_ID,
        names.EOS_ID,
        names.EOT_ID,
        names.EOM_ID,
        names.PAD_ID,
        names.ADD_BOS,
        names.ADD_EOS,
    )
    skipped = ("GGUF.", "general.", PAIR_KEY, *ours)
    for key, field in reader.fields.items():
        if key.startswith(skipped) and key not in ("general.file_type", "general.quantization_version", "general.type"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=sub)
    describe_origin(writer, origin)
    writer.add_bos_token_id(told["bos_token_id"])
    writer.add_eos_token_id(told["eos_token_id"])
    for token in origin.checkpoint.tokenizer.spec.eos_token_ids[1:2]:
        writer.add_eot_token_id(token)
    for token in origin.checkpoint.tokenizer.spec.eos_token_ids[2:3]:
        writer.add_eom_token_id(token)
    writer.add_pad_token_id(told["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(told["chat_template"])
    for tensor in reader.tensors:
        writer.add_tensor_info(
            tensor.name, tuple(int(v) for v in reversed(tensor.shape)), np.dtype(np.float32), int(tensor.n_bytes), tensor.tensor_type
        )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        data: Array = tensor.data
        writer.write_tensor_data(np.ascontiguousarray(data))
    writer.close()
