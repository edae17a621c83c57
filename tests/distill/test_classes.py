"""Checkpoints of other model classes, from the directory to the saved student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from distill import models
from distill.assemble import build_tokenizer
from distill.config import Align, Lora, TrainConfig
from distill.families import FAMILIES, patchify
from distill.methods import Tokens
from distill.train import train
from tests.distill.test_models import MROPE, TEXT
from vlm import chat, digits, preprocess
from vlm.errors import CheckpointError, UserError
from vlm.load import open_checkpoint

QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL_TOKENS = ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>")
SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}: {% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)


def write(directory: Path, model: Any, tokenizer: Any, image: Any, template: str) -> Path:
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    image.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(template)
    return directory


def make_qwen(directory: Path, layers: int, side: int = 32, seed: int = 0) -> Path:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = build_tokenizer(digits.texts(), specials=QWEN_TOKENS)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in QWEN_TOKENS}
    vision = {"depth": 2, "patch_size": 8, "num_heads": 2, "hidden_size": 32, "out_hidden_size": 32}
    vision |= {"intermediate_size": 48, "window_size": 32, "fullatt_block_indexes": [1]}
    text = {**TEXT, "vocab_size": 384, "num_hidden_layers": layers, "rope_parameters": MROPE}
    torch.manual_seed(seed)
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**text, "max_position_embeddings": 512},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=383,
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    area = {"shortest_edge": side * side, "longest_edge": side * side}
    image = Qwen2VLImageProcessorPil(size=area, patch_size=8)
    return write(directory, transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer, image, QWEN_TEMPLATE)


def make_smol(directory: Path, layers: int, seed: int = 0, **processor: Any) -> Path:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    tokenizer = build_tokenizer(digits.texts(), specials=("<|endoftext|>", *SMOL_TOKENS))
    tokenizer.eos_token = "<end_of_utterance>"
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    config = transformers.SmolVLMConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 4},
        text_config={
            **TEXT,
            "model_type": "llama",
            "vocab_size": 384,
            "num_hidden_layers": layers,
            "max_position_embeddings": 512,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    settings = {"do_image_splitting": False, "size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}}
    image = SmolVLMImageProcessorPil(**{**settings, **processor})
    return write(directory, transformers.SmolVLMForConditionalGeneration(config), tokenizer, image, SMOL_TEMPLATE)


MAKE = {"qwen2_5_vl": make_qwen, "smolvlm": make_smol}


@pytest.fixture(scope="module", params=list(MAKE))
def shelf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    MAKE[request.param](folder / "teacher", 3, seed=1)
    MAKE[request.param](folder / "student", 2, seed=2)
    return folder


def test_pixels_and_prompts_are_the_processor_own(shelf: Path) -> None:
    checkpoint = models.open_model(shelf / "student")
    assert checkpoint.image.tokens == {"qwen2_5_vl": 4, "smolvlm": 16}[checkpoint.config["model_type"]]
    dice = np.random.default_rng(0)
    image = Image.fromarray(dice.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    ours = torch.from_numpy(preprocess.pixels(image, checkpoint.image))[None]
    if checkpoint.config["model_type"] == "smolvlm":
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil as Processor
    else:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
    theirs = Processor.from_pretrained(shelf / "student")(images=[image], return_tensors="pt")
    if checkpoint.config["model_type"] == "smolvlm":
        assert theirs["pixel_values"].shape == (1, 1, 3, 32, 32)
        torch.testing.assert_close(theirs["pixel_values"][0], ours, rtol=0, atol=1e-6)
    else:
        patches, grid = patchify(ours, 8, 2, 2)
        assert theirs["image_grid_thw"].tolist() == grid.tolist()
        torch.testing.assert_close(theirs["pixel_values"], patches, rtol=0, atol=1e-6)
    messages = [chat.user_message("top left ?"), {"role": "assistant", "content": "four"}]
    conversation = checkpoint.tokenizer.conversation(messages)
    spans = {
        name: checkpoint.tokenizer.tokenizer.decode(
            [i for i, span in zip(conversation.ids, conversation.spans, strict=True) if span == name],
            skip_special_tokens=False,
        )
        for name in ("instruction", "response")
    }
    assert spans["instruction"].strip() == "top left ?"
    assert spans["response"].startswith("four<")
    before = checkpoint.tokenizer.tokenizer.id_to_token(conversation.ids[conversation.spans.index("image") - 1])
    assert before in ("<|vision_start|>", "<global-img>")


@pytest.mark.parametrize("lora", [Lora(), Lora(r=2)], ids=["full", "lora"])
def test_a_pair_trains_and_the_student_opens_again(shelf: Path, tmp_path: Path, lora: Lora) -> None:
    result = train(
        TrainConfig(
            preset="digits",
            teacher=str(shelf / "teacher"),
            student=str(shelf / "student"),
            out=tmp_path / "run",
            steps=2,
            batch_size=2,
            samples=8,
            eval_samples=4,
            lr=1e-2,
            log_every=1,
            visual_every=0,
            threads=1,
            lora=lora,
            align=Align(iva_layer=1),
        )
    )
    before, after = models.open_model(shelf / "student"), models.open_model(result.student)
    assert after.tokenizer.spec == before.tokenizer.spec
    assert after.image == before.image
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("iva", 0) > 0 and line.get("tpa", 0) > 0 for line in logged)
    moved = models._open(result.student)[0].state_dict()
    start = models._open(shelf / "student")[0].state_dict()
    assert moved.keys() == start.keys()
    assert any(not torch.equal(moved[name], start[name]) for name in start)


def test_reasonings_that_could_not_be_decoded_are_refused_before_training(tmp_path: Path) -> None:
    config = TrainConfig(
        preset="digits",
        format="rationale",
        objective="sft",
        student=str(make_qwen(tmp_path / "qwen", 1)),
        out=tmp_path / "run",
        samples=8,
        batch_size=2,
        steps=1,
    )
    with pytest.raises(UserError, match=r"cannot be decoded from Qwen2_5_VL.*take a LLaVA student"):
        train(config)
    assert not config.out.exists(), "nothing was written"


def test_a_class_that_cannot_predict_for_kpod_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    student = make_qwen(tmp_path / "student", 2)
    record = {"question": "sum ?", "steps": ["1 plus 2 gives 3"], "answer": "3"}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"id": str(i), **record}) + "\n" for i in range(8)))
    asked = {"student": str(student), "data": tmp_path / "data.jsonl", "holdout": 0.0, "batch_size": 2, "steps": 1}
    with pytest.raises(UserError, match="predictor does not serve"):
        train(TrainConfig(objective="sft", out=tmp_path / "run", tokens=Tokens("kpod"), **asked))
    assert not (tmp_path / "run").exists()


def test_images_without_one_size_are_refused(tmp_path: Path) -> None:
    qwen = make_qwen(tmp_path / "qwen", 1)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (qwen / name).is_file():
            value = json.loads((qwen / name).read_text())
            value["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}
            (qwen / name).write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"images of 3136 to 12845056 pixels; .*one square size, so set size"):
        models.open_model(qwen)
    with pytest.raises(CheckpointError, match=r"split into tiles; .* set do_image_splitting to false"):
        models.open_model(make_smol(tmp_path / "smol", 1, do_image_splitting=True))


def test_other_commands_and_other_classes_say_what_they_take(tmp_path: Path) -> None:
    qwen = make_qwen(tmp_path / "qwen", 1)
    with pytest.raises(CheckpointError, match="'qwen2_5_vl' model; this command takes LLaVA checkpoints"):
        open_checkpoint(qwen)
    config = json.loads((qwen / "config.json").read_text())
    for kind, why in (("llava_next", "cuts every image into tiles"), ("mllama", "cross-attention"), ("bert", "")):
        (qwen / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        with pytest.raises(CheckpointError, match=f"is a '{kind}' model.*{why}.*takes checkpoints of type llava, "):
            models.open_model(qwen)
    assert set(FAMILIES) >= {"llava", "qwen2_vl", "smolvlm"}
