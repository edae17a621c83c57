"""A loaded student and the numbers every target needs about it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vlm.chat import user_message
from vlm.errors import CheckpointError, ToolError
from vlm.load import Checkpoint, load_model

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import LlavaForConditionalGeneration

DECODERS = ("qwen2", "qwen3", "llama")
TOWERS = {"siglip_vision_model": "siglip", "clip_vision_model": "clip"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Facts:
    """Sizes and variants, read from the configuration and checked against the tensors."""

    decoder: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab_size: int
    context_length: int
    tied: bool
    tower: str
    image_size: int
    feature_layers: tuple[int, ...]
    select: str

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


@dataclass(frozen=True)
class Fold:
    """Per-channel scales moved between a module and the one before it; the network's function stays the same.

    Attributes:
        input: multiplies the columns of a matrix.
        output: divides the rows of a matrix and its bias, or the weight of a norm.
    """

    input: Tensor | None = None
    output: Tensor | None = None


@dataclass(frozen=True)
class Student:
    """A checkpoint with its weights, evaluation mode, no gradients.

    Attributes:
        model: weights as stored; small checkpoints are float32 (see `open_student`).
        folds: module path -> scales that `weight` applies.
    """

    checkpoint: Checkpoint
    model: LlavaForConditionalGeneration
    facts: Facts
    folds: Mapping[str, Fold] = field(default_factory=dict)

    @functools.cached_property
    def paths(self) -> dict[nn.Module, str]:
        return {module: name for name, module in self.model.named_modules()}

    def weight(self, module: Any, name: str = "weight", rows: slice = slice(None)) -> Tensor:
        """A parameter, or some of its rows, in float32 with its folds applied."""
        values = getattr(module, name).detach()[rows].float()
        fold = self.folds.get(self.paths[module])
        if fold is None:
            return values
        if fold.input is not None and values.ndim == 2:
            values = values * fold.input
        if fold.output is not None:
            output = fold.output[rows]
            values = values / (output[:, None] if values.ndim == 2 else output)
        return values


def open_student(checkpoint: Checkpoint) -> Student:
    """Load and check a student.

    A checkpoint stored in 16 bits is kept so, with float32 arithmetic (see `export.widen`): the same figures as a
    float32 copy, at half its memory.

    Raises:
        CheckpointError: weights that cannot be loaded, or an architecture no exporter here handles.
    """
    from export.widen import stored_dtype, widen

    facts = read_facts(checkpoint)
    model = widen(load_model(checkpoint, stored_dtype(checkpoint.weights)).requires_grad_(False))
    head, table = model.lm_head.weight, model.model.language_model.embed_tokens.weight
    if facts.tied and head.data_ptr() != table.data_ptr() and not bool((head == table).all()):
        # published checkpoints exist whose config claims tying while the head differs
        facts = replace(facts, tied=False)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise CheckpointError(f"{checkpoint.directory}: some weights are not finite; train again")
    return Student(checkpoint, model, facts)


def outline(checkpoint: Checkpoint) -> Student:
    """A student whose matrices have no values and take no memory: enough to trace its graphs and count their bytes.

    Vectors are random, because equal constants would be written once.
    """
    import torch
    from torch import nn
    from transformers import LlavaForConditionalGeneration

    facts, config = read_facts(checkpoint), read_config(checkpoint)
    try:
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(config).eval()
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{checkpoint.directory}/config.json describes no model ({reason})") from None
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            small = parameter.ndim < 2
            values = (
                torch.rand(parameter.shape) if small else torch.zeros((1,) * parameter.ndim).expand(parameter.shape)
            )
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    language = model.model.language_model
    language.rotary_emb = type(language.rotary_emb)(config=config.text_config)
    return Student(checkpoint, model, facts)


def read_config(checkpoint: Checkpoint) -> Any:
    """The checkpoint's `LlavaConfig`."""
    from transformers import LlavaConfig

    return LlavaConfig.from_pretrained(checkpoint.directory, local_files_only=True)


def read_facts(checkpoint: Checkpoint) -> Facts:
    """Read sizes without loading weights.

    Raises:
        CheckpointError: names the setting that cannot be exported.
    """
    try:
        facts = _read_facts(checkpoint, config := read_config(checkpoint))
    except ToolError:
        raise
    except Exception as error:  # transformers checks types in many ways, each with an exception of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{checkpoint.directory}/config.json is no LLaVA configuration ({reason})") from None
    for name, size in asdict(facts).items():
        if isinstance(size, int) and not isinstance(size, bool) and size < 1:
            raise CheckpointError(f"{checkpoint.directory}/config.json: {name} is {size}; it must be at least 1")
    _check(checkpoint, config, facts)
    return facts


def check_prompt(checkpoint: Checkpoint) -> None:
    """A template that came with a language model knows no images, and its prompts would have none.

    Raises:
        CheckpointError: a prompt with an image does not hold the image's tokens.
    """
    spec, image = checkpoint.tokenizer.spec, checkpoint.image
    held = checkpoint.tokenizer.prompt_ids([user_message("What is shown?")]).count(spec.image_token_id)
    if held != image.tokens:
        raise CheckpointError(
            f"{checkpoint.directory}: the chat template puts {held} tokens of an image into the prompt, the tower makes "
            f"{image.tokens}; give the checkpoint the template of its processor"
        )


def _read_facts(checkpoint: Checkpoint, config: Any) -> Facts:
    from optimum.utils import NormalizedTextConfigWithGQA, NormalizedVisionConfig

    text, vision = NormalizedTextConfigWithGQA(config.text_config), NormalizedVisionConfig(config.vision_config)
    layers = config.vision_feature_layer
    if not isinstance(layers, int) and not layers:
        raise CheckpointError(f"{checkpoint.directory}/config.json: vision_feature_layer {layers!r} names no layer")
    return Facts(
        decoder=config.text_config.model_type,
        layers=text.num_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(config.text_config, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        hidden=text.hidden_size,
        intermediate=config.text_config.intermediate_size,
        vocab_size=text.vocab_size,
        context_length=config.text_config.max_position_embeddings,
        tied=bool(config.tie_word_embeddings),
        tower=TOWERS.get(config.vision_config.model_type, config.vision_config.model_type),
        image_size=vision.image_size,
        feature_layers=(layers,) if isinstance(layers, int) else tuple(layers),
        select=config.vision_feature_select_strategy,
    )


def check_decoder(checkpoint: Checkpoint, facts: Facts) -> None:
    """Needs no weights.

    Raises:
        CheckpointError: a decoder this project has no graphs and names for.
    """
    text, where = read_config(checkpoint).text_config, f"{checkpoint.directory}/config.json"
    if facts.decoder not in DECODERS:
        raise CheckpointError(
            f"{where}: decoder {facts.decoder!r} cannot be exported; known: {', '.join(DECODERS)} "
            "(others: --target gguf --llama-cpp DIR)"
        )
    rope = (text.rope_parameters or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise CheckpointError(f"{where}: rope_type {rope!r} cannot be exported; known: {', '.join(ROPE_TYPES)}")
    if (share := (text.rope_parameters or {}).get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError(f"{where}: partial_rotary_factor {share} cannot be exported; only 1.0")
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise CheckpointError(f"{where}: layer types {sorted(kinds)} cannot be exported; only full attention")


def _check(checkpoint: Checkpoint, config: Any, facts: Facts) -> None:
    where = f"{checkpoint.directory}/config.json"
    if (kept := checkpoint.config.get("quantization_config")) is not None:
        method = kept.get("quant_method", "unknown") if isinstance(kept, dict) else kept
        raise CheckpointError(
            f"{where}: the weights are quantised already ({method}); give the checkpoint they were made from"
        )
    if facts.heads % facts.kv_heads:
        raise CheckpointError(f"{where}: {facts.heads} heads cannot share {facts.kv_heads} keys and values")
    if facts.tower == "siglip2_vision_model":
        raise CheckpointError(
            f"{where}: {facts.tower} is the NaFlex tower, whose images have no common number of visual tokens; "
            "take a SigLIP 2 checkpoint of fixed resolution (its tower is a siglip_vision_model)"
        )
    if facts.tower not in TOWERS.values():
        raise CheckpointError(f"{where}: tower {facts.tower!r} cannot be exported; known: siglip, clip")
    depth = config.vision_config.num_hidden_layers
    for layer in facts.feature_layers:
        if layer == 0 or not -depth <= layer <= depth:
            raise CheckpointError(f"{where}: vision_feature_layer {layer} is outside 1..{depth} and -{depth}..-1")
    if facts.image_size != checkpoint.image.size:
        raise CheckpointError(
            f"{where}: the tower takes {facts.image_size} pixels, the processor makes {checkpoint.image.size}"
        )


def blocks_used(facts: Facts, depth: int) -> tuple[int, ...]:
    """How many vision blocks run before each selected feature: hidden state 0 is the embedding output."""
    return tuple(layer if layer > 0 else depth + 1 + layer for layer in facts.feature_layers)
