"""Open the real backend of an artefact from nothing but its directory and manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from export.parity import GATES, Gate, gguf_gate, mixed_gate, trt_gate
from export.replay import Backend
from vlm.chat import ChatSpec, ChatTokenizer
from vlm.errors import ArtifactError
from vlm.manifest import Manifest
from vlm.preprocess import ImageSpec

PROMPT_ROOM = 512


def image_spec(manifest: Manifest) -> ImageSpec:
    return ImageSpec.from_json(manifest.image)


def chat_tokenizer(root: Path, manifest: Manifest) -> ChatTokenizer:
    spec = ChatSpec.from_json(manifest.chat)
    return ChatTokenizer(manifest.path_of(root, "tokenizer"), spec, image_spec(manifest).tokens)


def gate_of(manifest: Manifest) -> Gate:
    """Limits of the artefact's own precision.

    Raises:
        ArtifactError: a precision this version has no limits for.
    """
    kinds = {part: str(section["type"]) for part, section in manifest.precision.items()}
    unknown = [kind for kind in kinds.values() if manifest.format != "gguf" and (manifest.format, kind) not in GATES]
    head = kinds.get("lm_head", kinds["decoder"])
    if manifest.format == "onnx" and not unknown:
        return mixed_gate(kinds["vision_encoder"], kinds["embed_tokens"], kinds["decoder"], head)
    if manifest.format == "tensorrt" and not unknown:
        return trt_gate(kinds["vision_encoder"], kinds["decoder"], head)
    precision = kinds["decoder"]
    if unknown or (manifest.format, precision) not in GATES:
        raise ArtifactError(
            f"no tolerance is known for {manifest.format} at {[*unknown, precision][0]!r}; export again"
        )
    return gguf_gate(kinds["vision_encoder"], kinds["embed_tokens"], precision, head)


def open_backend(
    root: Path, manifest: Manifest, instead: Mapping[str, Path] | None = None, longest: int = 0
) -> Backend:
    """The runner of the artefact's format, on one CPU thread.

    Args:
        instead: role -> file of an ONNX artefact to take in place of its own.
        longest: tokens of a prompt with its answer that there has to be room for.

    Raises:
        ArtifactError: a file does not load, or does not belong to its partner.
        MissingPiece: the runtime library is not installed.
    """
    image, image_id = image_spec(manifest), int(manifest.chat["image_token_id"])
    context = min(int(manifest.model["context_length"]), max(1024, image.tokens + PROMPT_ROOM, longest))
    if manifest.format == "onnx":
        from export.ort import OnnxBackend

        names = ("vision_encoder", "embed_tokens", "decoder")
        swapped = instead or {}
        vision, embed, decoder = (swapped.get(role) or manifest.path_of(root, role) for role in names)
        return OnnxBackend(vision, embed, decoder, image, image_id)
    if manifest.format == "tensorrt":
        from export.ort import DeltaBackend

        names = ("vision_encoder", "embed_tokens", "decoder")
        vision, table, decoder = (manifest.path_of(root, role) for role in names)
        return DeltaBackend(vision, table, decoder, image, image_id, context)
    from export.gguf_file import read_pair_id
    from export.llama import LlamaBackend

    text, mmproj = manifest.path_of(root, "text_gguf"), manifest.path_of(root, "mmproj")
    for path in (text, mmproj):
        if (found := read_pair_id(path)) != manifest.pair_id:
            raise ArtifactError(
                f"{path} carries pair id {found!r}, the manifest says {manifest.pair_id!r}; export again"
            )
    return LlamaBackend(text, mmproj, image, str(manifest.chat["image_token"]), context)
