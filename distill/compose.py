"""Students made from what exists: a vision tower and a language model with a fresh projector, or fewer layers."""

from __future__ import annotations

import dataclasses
import fcntl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import access, templates
from distill.assemble import IMAGE, save_checkpoint
from vlm.console import note
from vlm.errors import CheckpointError, UserError
from vlm.files import atomic_dir, read_json
from vlm.load import PROVENANCE, Checkpoint, load_model, open_checkpoint

if TYPE_CHECKING:
    from torch import nn
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

DECODERS = ("qwen2", "qwen3", "llama")
TOWERS = {"siglip": "siglip", "siglip_vision_model": "siglip", "clip": "clip", "clip_vision_model": "clip"}
ROWS_MULTIPLE = 64


@dataclass(frozen=True)
class Parts:
    """What a student is assembled from.

    Attributes:
        tower: directory of a SigLIP, SigLIP2 (fixed resolution) or CLIP model, or of a LLaVA checkpoint.
        llm: directory of a Qwen2, Qwen2.5, Qwen3 or Llama causal language model.
        feature_layer: hidden state of the tower that the projector reads.
        layers: decoder layers to keep; 0 keeps all.
        seed: initialises projector and new embedding rows.
    """

    tower: Path
    llm: Path
    feature_layer: int = -2
    layers: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Words:
    """Tokenizer of an assembled student and what it is used with."""

    tokenizer: PreTrainedTokenizerFast
    template: str
    image_token: str
    end_ids: tuple[int, ...]
    origin: str


def assemble(parts: Parts, out: Path, teacher: Checkpoint | None = None) -> Path:
    """Write the assembled student as a Hugging Face directory, unless the same one stands there already.

    Where the teacher's tokenizer contains the language model's with the same ids, the student takes the teacher's
    tokenizer, image token and template, as distillation needs. Otherwise `<image>` is added to the language model's.

    Raises:
        CheckpointError: a part is missing, damaged, or of a kind that cannot be combined.
    """
    recipe = {
        "assembled": {name: str(value) for name, value in dataclasses.asdict(parts).items()},
        "teacher": None if teacher is None else str(teacher.directory),
    }
    return once(out, recipe, lambda: _assemble(parts, out, teacher, recipe))


def shorten(source: Checkpoint, layers: int, out: Path, processor: Any) -> Path:
    """Write `source` with only `layers` of its decoder layers, unless the same stands there already; see `kept`."""
    recipe = {"shortened": str(source.directory), "layers": layers}

    def write() -> None:
        model = load_model(source, dtype=str(source.config.get("dtype") or "float32"))
        keep_layers(access.decoder(model), layers)
        with atomic_dir(out) as work:
            save_checkpoint(model, processor, work, {"objective": "shortened", **recipe})

    return once(out, recipe, write)


def once(out: Path, recipe: dict[str, Any], write: Callable[[], None]) -> Path:
    """Several processes of one run all ask; the first one writes, the others wait for its lock and find it done."""

    def done() -> bool:
        stored = out / PROVENANCE
        return stored.is_file() and {name: read_json(stored).get(name) for name in recipe} == recipe

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = (out.parent / f".{out.name}.lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {out.parent} ({error.strerror}); choose another --out") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done():
            write()
    return out


def kept(total: int, wanted: int) -> tuple[int, ...]:
    """Which of `total` layers stay: the first, the last, and `wanted` - 2 evenly between them.

    Raises:
        CheckpointError: more layers are wanted than there are.
    """
    if not 1 <= wanted <= total:
        raise CheckpointError(f"student_layers {wanted}: the decoder has {total} layers; choose from 1 to {total}")
    if wanted == 1:
        return (0,)
    return tuple(round(index * (total - 1) / (wanted - 1)) for index in range(wanted))


def keep_layers(decoder: Any, wanted: int) -> tuple[int, ...]:
    """Drop layers of a decoder in place and number the rest anew; returns which were kept."""
    from torch import nn

    chosen = kept(len(decoder.layers), wanted)
    config = decoder.config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in chosen]
    config.num_hidden_layers = wanted
    decoder.layers = nn.ModuleList([decoder.layers[layer] for layer in chosen])
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index  # the key/value cache counts by it
    return chosen


def _assemble(parts: Parts, out: Path, teacher: Checkpoint | None, recipe: dict[str, Any]) -> None:
    import torch

    torch.manual_seed(parts.seed)
    llm = _load_llm(parts.llm)
    if parts.layers:
        keep_layers(llm.model, parts.layers)
    tower, kind = _load_tower(parts.tower)
    words = _words(parts.llm, teacher)
    needed = max(words.tokenizer.get_vocab().values()) + 1
    if needed > llm.get_input_embeddings().num_embeddings:  # most models have spare rows; those need no new ones
        llm.resize_token_embeddings(needed, pad_to_multiple_of=ROWS_MULTIPLE)
    model = _graft(tower, llm, words, parts.feature_layer, kind)
    processor = _processor(parts.tower, words, tower, kind)
    with atomic_dir(out) as work:
        save_checkpoint(model, processor, work, {"objective": "assembled", **recipe})
        side = open_checkpoint(work).image.size
        if side != tower.config.image_size:
            raise CheckpointError(
                f"{parts.tower}: its processor makes {side} pixels a side, the tower takes {tower.config.image_size}"
            )
    note(f"student assembled in {out}; {words.origin}")


def _load_llm(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    kind = _config(directory, "llm").get("model_type")
    if kind not in DECODERS:
        raise CheckpointError(f"--llm {directory} is a {kind!r} model; known decoders: {', '.join(DECODERS)}")
    llm = _load(AutoModelForCausalLM, directory)
    if getattr(llm.lm_head, "bias", None) is not None:
        raise CheckpointError(f"--llm {directory}: its head has a bias, which a LLaVA model cannot hold")
    return llm


def _load_tower(directory: Path) -> tuple[Any, str]:
    from transformers import AutoConfig, CLIPVisionModel, SiglipVisionModel

    kind = _config(directory, "vision_tower").get("model_type")
    if kind == "llava":
        tower = load_model(open_checkpoint(directory)).model.vision_tower
        return tower, TOWERS[tower.config.model_type]
    if kind == "siglip2":
        raise CheckpointError(
            f"--vision_tower {directory} is a SigLIP2 NaFlex model (variable resolution); "
            "take one of the fixed resolutions, such as siglip2-base-patch16-224"
        )
    if kind not in TOWERS:
        raise CheckpointError(
            f"--vision_tower {directory} is a {kind!r} model; known towers: siglip (and fixed-size siglip2), clip, llava"
        )
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    config = getattr(config, "vision_config", config)
    if TOWERS[kind] == "siglip":
        config.vision_use_head = False  # pooling head: unused, the projector reads patches
    found = _load({"siglip": SiglipVisionModel, "clip": CLIPVisionModel}[TOWERS[kind]], directory, config=config)
    return found, TOWERS[kind]


def _config(directory: Path, option: str) -> dict[str, Any]:
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"--{option} {directory} has no config.json; name a directory saved with save_pretrained")
    return read_json(directory / "config.json")


def _load(kind: Any, directory: Path, **options: Any) -> Any:
    from safetensors import SafetensorError

    try:
        model, info = kind.from_pretrained(
            directory, dtype="auto", local_files_only=True, output_loading_info=True, **options
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{directory}: weights cannot be loaded ({str(error).splitlines()[0]})") from error
    if info["missing_keys"]:
        raise CheckpointError(f"{directory}: weights lack {sorted(info['missing_keys'])[0]}; get the whole model again")
    return model


def _words(llm: Path, teacher: Checkpoint | None) -> Words:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(llm, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--llm {llm} has no readable tokenizer ({str(error).splitlines()[0]})") from None
    if not tokenizer.is_fast:
        raise CheckpointError(f"--llm {llm} has no tokenizer.json; convert its tokenizer with transformers first")
    if teacher is not None and tokenizer.get_vocab().items() <= teacher.tokenizer.tokenizer.get_vocab().items():
        spec = teacher.tokenizer.spec
        theirs = AutoTokenizer.from_pretrained(teacher.directory, local_files_only=True)
        return Words(
            theirs, spec.template, spec.image_token, spec.eos_token_ids, "tokenizer and template of the teacher"
        )
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    choice = templates.choose(tokenizer, llm)
    ends = [choice.turn_end, tokenizer.eos_token_id]
    return Words(
        tokenizer,
        choice.template,
        IMAGE,
        tuple(dict.fromkeys(int(end) for end in ends if end is not None)),
        f"chat template: {choice.name}" + "".join(f" (not {reason})" for reason in choice.reasons),
    )


def _graft(tower: Any, llm: Any, words: Words, feature_layer: int, kind: str) -> LlavaForConditionalGeneration:
    import torch
    from torch import nn
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    depth = tower.config.num_hidden_layers
    if feature_layer == 0 or not -depth <= feature_layer <= depth:
        raise CheckpointError(f"feature_layer {feature_layer} is outside 1..{depth} and -{depth}..-1")
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=llm.config,
        image_token_id=int(words.tokenizer.convert_tokens_to_ids(words.image_token)),
        projector_hidden_act="gelu_pytorch_tanh",  # what ggml computes
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if kind == "clip" else "full",
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        tie_word_embeddings=llm.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    projector = model.model.multi_modal_projector.to_empty(device="cpu").to(llm.dtype)
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.normal_(layer.weight, std=llm.config.initializer_range)
        nn.init.zeros_(layer.bias)
    model.model.vision_tower, model.model.language_model, model.lm_head = tower, llm.model, llm.lm_head
    model.tie_weights()
    model.generation_config = llm.generation_config
    model.generation_config.eos_token_id = list(words.end_ids)
    model.generation_config.pad_token_id = words.tokenizer.pad_token_id
    return model.eval()


def _processor(tower_directory: Path, words: Words, tower: nn.Module, kind: str) -> LlavaProcessor:
    from transformers import AutoImageProcessor, LlavaProcessor

    try:
        image = AutoImageProcessor.from_pretrained(tower_directory, local_files_only=True, backend="pil")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"--vision_tower {tower_directory} has no image processor ({str(error).splitlines()[0]})"
        ) from None
    return LlavaProcessor(
        image_processor=image,
        tokenizer=words.tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default" if kind == "clip" else "full",
        chat_template=words.template,
        image_token=words.image_token,
        num_additional_image_tokens=1 if kind == "clip" else 0,
    )
