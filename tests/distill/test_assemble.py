"""Students made of a tower and a language model, and students with fewer layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from distill import compose, models, templates
from distill.assemble import CHAT_TEMPLATE, SPECIALS, build_tokenizer
from distill.config import TrainConfig
from distill.pair import shared_vocabulary
from tests.tiny import make_llm, make_student, make_tower
from vlm import chat, digits, preprocess
from vlm.errors import CheckpointError, UserError
from vlm.load import load_model, open_checkpoint


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Towers and language models as they are published."""
    folder = tmp_path_factory.mktemp("shelf")
    for kind in ("siglip", "clip"):
        make_tower(folder / kind, kind)
    for kind in ("qwen2", "qwen3", "llama"):
        make_llm(folder / kind, kind)
    return folder


def assembled(shelf: Path, out: Path, tower: str = "siglip", llm: str = "qwen2", **options: Any) -> Path:
    return compose.assemble(compose.Parts(shelf / tower, shelf / llm, **options), out)


@pytest.mark.parametrize(
    ("tower", "llm"), [("siglip", "qwen2"), ("clip", "qwen2"), ("siglip", "qwen3"), ("clip", "llama")]
)
def test_the_directory_works_everywhere(shelf: Path, tmp_path: Path, tower: str, llm: str) -> None:
    out = assembled(shelf, tmp_path / "student", tower, llm)
    checkpoint = open_checkpoint(out)
    model, processor = LlavaForConditionalGeneration.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert model.config.vision_feature_layer == -2
    assert model.config.vision_feature_select_strategy == ("default" if tower == "clip" else "full")
    sample = digits.sample("train", 1)
    message = chat.user_message(sample.question)
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    theirs = processor(images=sample.image, text=text, return_tensors="pt")
    assert theirs["input_ids"][0].tolist() == checkpoint.tokenizer.prompt_ids([message])
    np.testing.assert_allclose(
        theirs["pixel_values"][0].numpy(), preprocess.pixels(sample.image, checkpoint.image), atol=1e-6
    )
    with torch.no_grad():
        logits = model(**theirs).logits
    assert logits.isfinite().all()
    spans = checkpoint.tokenizer.conversation([message, {"role": "assistant", "content": sample.answer}]).spans
    assert spans.count("image") == checkpoint.image.tokens == 16
    assert spans[-2:] == ("response", "template"), "the end-of-turn token is trained, the line break after it is not"


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_parts_keep_their_weights_and_the_projector_is_new(shelf: Path, tmp_path: Path, tower: str) -> None:
    first = load_model(open_checkpoint(assembled(shelf, tmp_path / "a", tower, "qwen3")))
    llm = AutoModelForCausalLM.from_pretrained(shelf / "qwen3").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids).logits, llm(input_ids=ids).logits)
        whole = compose._load_tower(shelf / tower)[0]
        pixels = torch.randn(1, 3, 32, 32)
        ours = first.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(ours, whole(pixels, output_hidden_states=True).hidden_states[-2])
    weight = first.model.multi_modal_projector.linear_1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    other = load_model(open_checkpoint(assembled(shelf, tmp_path / "b", tower, "qwen3", seed=1)))
    assert not torch.equal(weight, other.model.multi_modal_projector.linear_1.weight)
    again = load_model(open_checkpoint(assembled(shelf, tmp_path / "c", tower, "qwen3")))
    assert torch.equal(weight, again.model.multi_modal_projector.linear_1.weight)


def test_padded_rows_are_used_before_new_ones_are_made(shelf: Path, tmp_path: Path) -> None:
    padded = open_checkpoint(assembled(shelf, tmp_path / "padded"))
    assert padded.config["text_config"]["vocab_size"] == 576
    full = len(AutoTokenizer.from_pretrained(shelf / "qwen2"))
    for tied in (True, False):
        make_llm(tmp_path / f"llm-{tied}", rows=full, tie_word_embeddings=tied)
        out = compose.assemble(compose.Parts(shelf / "siglip", tmp_path / f"llm-{tied}"), tmp_path / f"full-{tied}")
        grown = load_model(open_checkpoint(out))
        assert grown.config.text_config.vocab_size == grown.lm_head.weight.shape[0] == -(-(full + 1) // 64) * 64
        assert grown.config.image_token_id == full
        before = AutoModelForCausalLM.from_pretrained(tmp_path / f"llm-{tied}")
        assert torch.equal(grown.lm_head.weight[:full], before.lm_head.weight)
        assert (grown.lm_head.weight is grown.model.language_model.embed_tokens.weight) == tied


def test_a_teacher_gives_its_words(shelf: Path, tmp_path: Path) -> None:
    tower = make_student(tmp_path / "teacher", image_size=32)
    teacher = open_checkpoint(tower)
    out = compose.assemble(compose.Parts(tower, shelf / "qwen2"), tmp_path / "student", teacher)
    student = open_checkpoint(out)
    assert student.tokenizer.spec.template == teacher.tokenizer.spec.template
    assert shared_vocabulary(teacher, student) == 384
    mine, theirs = load_model(student).model.vision_tower, load_model(teacher).model.vision_tower
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


def test_the_same_student_is_not_made_twice(shelf: Path, tmp_path: Path) -> None:
    out = assembled(shelf, tmp_path / "s")
    before = (out / "model.safetensors").stat().st_mtime_ns
    assembled(shelf, tmp_path / "s")
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assembled(shelf, tmp_path / "s", seed=3)
    assert (out / "model.safetensors").stat().st_mtime_ns != before


@pytest.mark.parametrize(
    ("tower", "llm", "seen"),
    [
        ("qwen2", "qwen2", "is a 'qwen2' model; known towers"),
        ("siglip", "clip", "is a 'clip' model; known decoders"),
        ("nothing", "qwen2", "has no config.json"),
        ("naflex", "qwen2", "NaFlex"),
        ("bare", "qwen2", "has no image processor"),
    ],
)
def test_parts_that_do_not_fit_are_refused(shelf: Path, tmp_path: Path, tower: str, llm: str, seen: str) -> None:
    (tmp_path / "naflex").mkdir()
    (tmp_path / "naflex" / "config.json").write_text('{"model_type": "siglip2"}')
    make_tower(tmp_path / "bare")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    where = tmp_path / tower if tower in ("naflex", "bare") else shelf / tower
    with pytest.raises(CheckpointError, match=seen):
        compose.assemble(compose.Parts(where, shelf / llm), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_the_tower_lacks_is_refused(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"feature_layer -9 is outside 1..3 and -3..-1"):
        assembled(shelf, tmp_path / "s", feature_layer=-9)


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ({"llm": "x"}, "needs both"),
        ({"vision_tower": "x"}, "needs both"),
        ({"llm": "x", "vision_tower": "x", "student": "y"}, "drop one"),
        ({"student_layers": -1}, "student_layers must be 0 or more"),
        ({"feature_layer": 0}, "feature_layer counts from 1"),
    ],
)
def test_options_that_contradict_each_other(words: dict[str, Any], seen: str) -> None:
    with pytest.raises(UserError, match=seen):
        TrainConfig(**words)


# the forms of published templates that matter here, in a few lines each
TEXT_ONLY = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
THINKING = TEXT_ONLY.replace(
    "{{- '<|im_start|>' + message.role + '\\n' + message.content",
    "{{- '<|im_start|>' + message.role + '\\n' + ('<think></think>' if loop.last else '') + message.content",
)
DATED = TEXT_ONLY.replace(
    "You are helpful.", "Today is ' + (strftime_now('%Y') if strftime_now is defined else '1') + '"
)


@pytest.mark.parametrize(
    ("own", "name", "reason"),
    [
        (None, "chatml", ""),
        (CHAT_TEMPLATE, "llm", ""),
        (TEXT_ONLY, "llm+images", "takes no lists"),
        (THINKING, "chatml", "the prompt of an answer|changes earlier turns|the answer is found|response is found"),
        (DATED, "chatml", "depends on more than the messages"),
    ],
)
def test_the_template_that_passes_its_trial_is_taken(own: str | None, name: str, reason: str) -> None:
    tokenizer = build_tokenizer(digits.texts())
    tokenizer.chat_template = own
    choice = templates.choose(tokenizer, Path("llm"))
    assert choice.name == name
    assert choice.turn_end == tokenizer.convert_tokens_to_ids("<|im_end|>")
    if reason:
        import re

        assert re.search(reason, " ".join(choice.reasons)), choice.reasons


def test_templates_for_other_marks() -> None:
    tokenizer = build_tokenizer(digits.texts(), specials=("<|endoftext|>", "</s>", "<image>"))
    tokenizer.eos_token = "</s>"
    choice = templates.choose(tokenizer, Path("llm"))
    assert (choice.name, choice.turn_end) == ("plain", tokenizer.convert_tokens_to_ids("</s>"))
    marks = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = build_tokenizer(digits.texts(), specials=(*SPECIALS[:1], "<|begin_of_text|>", *marks, "<image>"))
    tokenizer.bos_token, tokenizer.eos_token = "<|begin_of_text|>", "<|endoftext|>"
    choice = templates.choose(tokenizer, Path("llm"))
    assert (choice.name, choice.turn_end) == ("llama3", tokenizer.convert_tokens_to_ids("<|eot_id|>"))


def test_which_layers_are_kept() -> None:
    assert compose.kept(24, 24) == tuple(range(24))
    assert compose.kept(24, 2) == (0, 23)
    assert compose.kept(5, 3) == (0, 2, 4)
    assert compose.kept(28, 1) == (0,)
    for total in range(1, 30):
        for wanted in range(2, total + 1):
            chosen = compose.kept(total, wanted)
            assert len(set(chosen)) == wanted
            assert (chosen[0], chosen[-1]) == (0, total - 1)
            assert list(chosen) == sorted(chosen)
            gaps = np.diff(chosen)
            assert gaps.max() - gaps.min() <= 1, "evenly spaced"
    with pytest.raises(CheckpointError, match="has 3 layers"):
        compose.kept(3, 4)


def test_a_shortened_student_is_the_chosen_layers(tmp_path: Path) -> None:
    source = open_checkpoint(make_student(tmp_path / "long", layers=5, decoder="qwen3"))
    short = load_model(open_checkpoint(compose.shorten(source, 3, tmp_path / "short", models.processor_of(source))))
    long = load_model(source)
    assert short.config.text_config.num_hidden_layers == 3
    assert len(short.config.text_config.layer_types) == 3
    for new, old in enumerate((0, 2, 4)):
        ours, theirs = (m.model.language_model.layers[i].state_dict() for m, i in ((short, new), (long, old)))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        # the same three layers run by hand inside the long model
        decoder = long.model.language_model
        decoder.layers = torch.nn.ModuleList([decoder.layers[i] for i in (0, 2, 4)])
        expected = long(input_ids=ids, use_cache=False).logits
        assert torch.equal(short(input_ids=ids, use_cache=False).logits, expected)
        stepwise = short.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        assert stepwise.shape[1] > 12, "the key/value cache counts the new layer numbers"


def test_runs_open_these_students(shelf: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        vision_tower=str(shelf / "siglip"), llm=str(shelf / "qwen2"), student_layers=2, out=tmp_path / "run"
    )
    student, source = models.open_student(config, None)
    assert student.training
    assert source.directory == tmp_path / "run" / "initial"
    assert len(student.model.language_model.layers) == 2
    teacher = open_checkpoint(make_student(tmp_path / "teacher", layers=3))
    student, source = models.open_student(TrainConfig(student_layers=1, out=tmp_path / "cut"), teacher)
    assert len(student.model.language_model.layers) == 1
    with pytest.raises(UserError, match="no student to train"):
        models.open_student(TrainConfig(), teacher)
