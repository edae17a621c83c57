"""Checkpoint directory -> what is needed to train, export or run it. Torch is imported inside functions only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm import chat, preprocess
from vlm.errors import CheckpointError
from vlm.files import read_json, sha256_file

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

PROVENANCE = "vlm.json"
RUNS = Path("runs")
UNSUPPORTED = {
    "llava_next": "it cuts every image into tiles by its shape, so images have no common number of visual tokens",
    "llava_next_video": "it is made for videos",
    "paligemma": "its prompt is not causal",
    "gemma3": "its image tokens are not causal",
    "mllama": "its images enter by cross-attention, not as tokens",
}


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face LLaVA directory, checked; weights are not loaded yet."""

    directory: Path
    config: dict[str, Any]
    image: preprocess.ImageSpec
    tokenizer: chat.ChatTokenizer
    weights: tuple[Path, ...]
    provenance: dict[str, Any]

    def weights_sha256(self) -> str:
        """Hash of the weights: of the file, or of the shard hashes in name order."""
        hashes = [sha256_file(path) for path in self.weights]
        if len(hashes) == 1:
            return hashes[0]
        import hashlib

        return hashlib.sha256("".join(hashes).encode()).hexdigest()


def open_checkpoint(directory: Path, kinds: tuple[str, ...] = ("llava",)) -> Checkpoint:
    """Check that `directory` holds a checkpoint of one of the model types and read everything but the weights.

    Raises:
        CheckpointError: says which file is missing or which model type was found.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; train a student with `python -m distill`")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json; point at a directory saved with save_pretrained")
    config = read_json(directory / "config.json")
    kind = config.get("model_type")
    if kind not in kinds:
        known = "LLaVA checkpoints" if kinds == ("llava",) else f"checkpoints of type {', '.join(kinds)}"
        why = f" ({UNSUPPORTED[kind]})" if kind in UNSUPPORTED else ""
        raise CheckpointError(f"{directory} is a {kind!r} model{why}; this command takes {known}")
    if "text_config" not in config:  # the flat form of earlier Qwen2-VL files
        config["text_config"] = {name: value for name, value in config.items() if name != "vision_config"}
    weights = tuple(sorted(directory.glob("*.safetensors")))
    if not weights:
        raise CheckpointError(f"{directory} has no weights (*.safetensors); train again or copy the whole directory")
    image = preprocess.spec_from_checkpoint(directory)
    provenance_file = directory / PROVENANCE
    provenance = read_json(provenance_file) if provenance_file.is_file() else {}
    spec = chat.spec_from_checkpoint(directory)
    if kind in ("smolvlm", "idefics3"):
        spec = dataclasses.replace(spec, template=_smolvlm_template(spec))
    tokenizer = chat.ChatTokenizer(directory / "tokenizer.json", spec, image.tokens)
    return Checkpoint(directory, config, image, tokenizer, weights, provenance)


def _smolvlm_template(spec: chat.ChatSpec) -> str:
    """The template with what its processor puts around an image that is not split, and with texts given as parts.

    The published template prints nothing for a message whose content is a plain string.
    """
    parts = (
        "{% set flat = namespace(messages=[]) %}{% for message in messages %}"
        "{% set flat.messages = flat.messages + [{'role': message['role'], 'content': message['content'] "
        "if message['content'] is not string else [{'type': 'text', 'text': message['content']}]}] %}"
        "{% endfor %}{% set messages = flat.messages %}"
    )
    around = "<fake_token_around_image>"
    return parts + spec.template.replace(spec.image_token, f"{around}<global-img>{spec.image_token}{around}")


def load_model(
    checkpoint: Checkpoint, dtype: str = "float32", attention: str = "sdpa"
) -> LlavaForConditionalGeneration:
    """Load the weights for inference (eval mode, no gradients needed is up to the caller).

    Raises:
        CheckpointError: the weights are damaged or do not fit the configuration.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

    llava = checkpoint.config.get("model_type") == "llava"
    try:
        model, info = (LlavaForConditionalGeneration if llava else AutoModelForImageTextToText).from_pretrained(
            checkpoint.directory,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            local_files_only=True,
            output_loading_info=True,
        )
    except (SafetensorError, ImportError, LookupError, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{checkpoint.directory}: weights cannot be loaded ({reason})") from error
    if info["missing_keys"]:
        raise CheckpointError(
            f"{checkpoint.directory}: weights lack {sorted(info['missing_keys'])[0]}; save them again"
        )
    return model.eval()


def newest_run(runs: Path = RUNS) -> Path:
    """The student directory of the run that finished last.

    Raises:
        CheckpointError: no finished run.
    """
    finished = [path.parent for path in runs.glob(f"*/student/{PROVENANCE}")]
    if not finished:
        raise CheckpointError(
            f"no finished run under {runs}/; train one with `python -m distill` or pass --student DIR"
        )
    return max(finished, key=lambda directory: (directory / PROVENANCE).stat().st_mtime_ns)
