"""Build small LLaVA checkpoints from scratch: tokenizer, processor, SigLIP or CLIP tower, Qwen2/Qwen3/Llama decoder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm.files import write_atomic
from vlm.load import PROVENANCE

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END, IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"
SPECIALS = (END_OF_TEXT, TURN_START, TURN_END, IMAGE)
# the pre-tokeniser pattern of Qwen2: llama.cpp reads it back identically as `qwen2`
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# content may be a string or a list of parts; an image part prints the placeholder and nothing else
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA model; the defaults are the digits student.

    Decoder widths are multiples of 256, so that llama.cpp's K-quants apply without falling back to other types.
    """

    tower: Literal["siglip", "clip"] = "siglip"
    image_size: int = 32
    patch_size: int = 8
    vision_hidden: int = 128
    vision_layers: int = 3
    vision_heads: int = 4
    vision_intermediate: int = 256
    feature_layer: int = -1
    decoder: Literal["qwen2", "qwen3", "llama"] = "qwen2"
    hidden: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 512
    tied: bool = True
    context: int = 1024
    rope_theta: float = 10000.0


def build_tokenizer(
    texts: Iterable[str], vocab_size: int = 512, specials: tuple[str, ...] = SPECIALS
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose ids llama.cpp reproduces exactly (pre-tokeniser `qwen2`, no normaliser)."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=32,  # llama-cpp-python detokenises into a 32-byte buffer
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *["user", "assistant", "system"] * 4], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, shape: Shape) -> LlavaProcessor:
    """Processor with Lanczos resizing: the one filter that JavaScript, Pillow and llama.cpp runtimes agree on."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor, SiglipImageProcessorPil

    if shape.tower == "siglip":
        image = SiglipImageProcessorPil(size={"height": shape.image_size, "width": shape.image_size}, resample=1)
    else:
        image = CLIPImageProcessorPil(
            size={"shortest_edge": shape.image_size},
            crop_size={"height": shape.image_size, "width": shape.image_size},
            resample=1,
        )
    is_clip = shape.tower == "clip"
    return LlavaProcessor(
        image_processor=image,
        tokenizer=tokenizer,
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default" if is_clip else "full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1 if is_clip else 0,
    )


def build_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """Randomly initialised model of the given sizes, float32."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
        Qwen3Config,
        SiglipVisionConfig,
    )

    vision_class = {"siglip": SiglipVisionConfig, "clip": CLIPVisionConfig}[shape.tower]
    text_class = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[shape.decoder]
    vision = vision_class(
        hidden_size=shape.vision_hidden,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        intermediate_size=shape.vision_intermediate,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        **({"vision_use_head": False} if shape.tower == "siglip" else {}),
    )
    end, pad = tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT])
    text = text_class(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        **({} if shape.decoder == "qwen2" else {"head_dim": shape.head_dim}),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="gelu_pytorch_tanh",  # what ggml computes
        vision_feature_layer=shape.feature_layer,
        vision_feature_select_strategy="default" if shape.tower == "clip" else "full",
        image_seq_length=(shape.image_size // shape.patch_size) ** 2,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = [end, pad]
    model.generation_config.pad_token_id = pad
    return model


def save_checkpoint(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, directory: Path, provenance: dict[str, Any]
) -> None:
    """Write a plain Hugging Face directory; `vlm.json` comes last, so its presence means the write finished."""
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    for path in directory.iterdir():
        if path.is_file():
            path.chmod(0o644)  # the weights come out readable by their owner only
    write_atomic(directory / PROVENANCE, json.dumps(provenance, indent=1, ensure_ascii=False) + "\n")
