"""Students as others save them: what is legitimate works and is right, what cannot be done is one line before the work."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.cli import main
from export.reference import _equal_lengths, greedy_batch
from export.replay import make_prompt
from tests.tiny import make_student
from vlm.chat import user_message
from vlm.errors import CheckpointError, GateFailed, UserError
from vlm.files import atomic_dir
from vlm.load import open_checkpoint
from vlm.manifest import Manifest, read_manifest


def edit(student: Path, name: str, **changes: Any) -> None:
    path = student / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def exported(student: Path, *words: str) -> Manifest:
    out = student.parent / "out"
    with contextlib.suppress(GateFailed):
        main(["--student", str(student), "--out", str(out), "--samples", "4", "--no-ablation", *words])
    return read_manifest(out)


def test_a_tokenizer_saved_while_it_cut_and_filled_up(tmp_path: Path) -> None:
    """Trainers leave both settings in tokenizer.json; a cut prompt would be compared with the same cut prompt."""
    student = make_student(tmp_path / "student")
    want = open_checkpoint(student).tokenizer.prompt_ids([user_message("How many digits are there?")])
    cut = {"max_length": 12, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    full = {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None}
    edit(student, "tokenizer.json", truncation=cut, padding={**full, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"})
    assert open_checkpoint(student).tokenizer.prompt_ids([user_message("How many digits are there?")]) == want
    assert len(want) > 12


def test_heads_that_the_fused_operator_does_not_take(tmp_path: Path) -> None:
    made = exported(
        make_student(tmp_path / "student", decoder="qwen3", head_dim=24), "--target", "onnx", "--precision", "int4"
    )
    assert made.verified
    assert made.precision["decoder"]["fallbacks"] == {"head_dim 24 is no multiple of 16: plain operators": 1}


def test_a_siglip_student_that_drops_its_first_token(tmp_path: Path) -> None:
    """`default` is also what LlavaConfig has where the key is left out."""
    student = make_student(tmp_path / "student")
    tokens = open_checkpoint(student).image.tokens
    edit(student, "config.json", vision_feature_select_strategy="default")
    edit(student, "processor_config.json", vision_feature_select_strategy="default")
    assert open_checkpoint(student).image.tokens == tokens - 1
    made = exported(student, "--target", "onnx", "--precision", "fp32")
    assert made.verified
    shared = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert (shared["vision_feature_select_strategy"], shared["num_additional_image_tokens"]) == ("full", -1)
    with pytest.raises(CheckpointError, match="drops a patch of a SigLIP tower"):
        exported(student, "--target", "gguf", "--precision", "f16")


def test_sizes_that_equal_their_defaults_need_not_be_stored(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student", image_size=224, patch_size=16, vision_layers=1)
    vision = json.loads((student / "config.json").read_text())["vision_config"]
    edit(
        student, "config.json", vision_config={k: v for k, v in vision.items() if k not in ("image_size", "patch_size")}
    )
    assert open_checkpoint(student).image.tokens == 196
    assert exported(student, "--target", "onnx", "--precision", "fp32").verified
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text())["patch_size"] == 16


def test_a_head_finer_than_its_decoder_is_stored_so(tmp_path: Path) -> None:
    made = exported(make_student(tmp_path / "student"), "--target", "onnx", "--precision", "fp16,head=fp32")
    assert made.verified
    assert (made.precision["lm_head"]["type"], made.precision["lm_head"]["bits_per_weight"]) == ("fp32", 32.0)


def test_three_words_may_end_an_answer(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student")
    ends = open_checkpoint(student).tokenizer
    ids = [ends.tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>", "<|im_start|>")]
    edit(student, "generation_config.json", eos_token_id=ids)
    assert exported(student, "--target", "gguf", "--precision", "f16").verified


def test_an_added_token_that_takes_white_space_with_it_is_seen(tmp_path: Path) -> None:
    """llama.cpp has no such tokens; users may type those that are not special."""
    from tokenizers import AddedToken, Tokenizer

    student = make_student(tmp_path / "student")
    tokenizer = Tokenizer.from_file(str(student / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<tool>", special=False, lstrip=True, rstrip=True)])
    tokenizer.save(str(student / "tokenizer.json"))
    found = exported(student, "--target", "gguf", "--precision", "f16").parity["failures"]
    assert [text for text in found if "tokenises" in text] == [
        "llama.cpp tokenises 1 texts differently, first 'a <tool> b'"
    ]


def test_templates_in_a_list_and_with_loop_controls(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student")
    file = student / "chat_template.jinja"
    text = "{% for x in [1, 2] %}{% continue %}{% endfor %}" + file.read_text()
    want = open_checkpoint(student).tokenizer.prompt_ids([user_message("how ?")])
    file.unlink()
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": text}]
    edit(student, "tokenizer_config.json", chat_template=named)
    assert open_checkpoint(student).tokenizer.prompt_ids([user_message("how ?")]) == want


NO_IMAGES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
FAULTS: dict[str, tuple[str, Any, str]] = {
    "no image in the prompt": ("chat_template.jinja", NO_IMAGES.encode(), "puts 0 tokens of an image into the prompt"),
    "template in bytes": ("chat_template.jinja", b"\xff\xfe", "chat settings are malformed"),
    "template that divides": ("chat_template.jinja", b"{{ 1 / 0 }}", "refuses this conversation .division by zero"),
    "quantised already": ("config.json", {"quantization_config": {"quant_method": "bnb"}}, "quantised already .bnb"),
    "end that is no number": ("generation_config.json", {"eos_token_id": "x"}, "chat settings are malformed"),
    "image that is no number": ("config.json", {"image_token_id": "x"}, "chat settings are malformed"),
    "image below zero": ("config.json", {"image_token_id": -1}, "chat settings are malformed"),
    "latents": ("config.json", {"latent_token_ids": ["x"]}, "chat settings are malformed"),
    "processor": ("processor_config.json", {"image_processor": None}, "image settings are incomplete"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_exported_is_one_line_before_the_work(tmp_path: Path, fault: str) -> None:
    name, change, message = FAULTS[fault]
    student = make_student(tmp_path / "student")
    if isinstance(change, bytes):
        (student / name).write_bytes(change)
    else:
        edit(student, name, **change)
    for target in ("onnx", "gguf"):
        with pytest.raises(UserError, match=message) as caught:
            main(["--target", target, "--student", str(student), "--out", str(tmp_path / "out"), "--dry-run"])
        assert "\n" not in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["mscale", "mscale_all_dim", "truncate"])
def test_yarn_that_llama_cpp_does_not_compute_is_refused(tmp_path: Path, key: str) -> None:
    """At four bits such a file passed: rounding hid that the rotation was another one."""
    student = make_student(tmp_path / "student", decoder="qwen3")
    text = json.loads((student / "config.json").read_text())["text_config"]
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
    run = ["--target", "gguf", "--student", str(student), "--out", str(tmp_path / "out"), "--dry-run"]
    edit(student, "config.json", text_config={**text, "rope_parameters": rope})
    assert main(run) == 0
    value = False if key == "truncate" else 1.0
    edit(student, "config.json", text_config={**text, "rope_parameters": {**rope, key: value}})
    with pytest.raises(CheckpointError, match=f"YaRN with {key} has no GGUF form"):
        main(run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "fp16", "--ablation"], "and fp16 rounds none"),
    ],
)
def test_options_that_help_nothing_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["--target", "onnx", "--student", str(tmp_path), *words])


def test_pixels_do_not_come_back_with_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--auto-precision raises nothing for a failure that no precision cures, and the card does not say it did."""
    monkeypatch.setattr("export.measure.pixel_parity", lambda *_: {"images": 1, "max": 0.5})
    student = make_student(tmp_path / "student")
    made = exported(student, "--target", "onnx", "--precision", "fp16", "--auto-precision")
    assert not made.verified
    assert made.parity["auto_precision"] == []
    assert made.precision["decoder"]["type"] == "fp16"
    assert "raised until the gates held" not in (tmp_path / "out" / "README.md").read_text()


def test_long_prompts_go_in_small_batches(subjects: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer makes of 50 prompts of 800 tokens is several gigabytes; the answers are the same."""
    subject = subjects("siglip", "qwen2")
    tokenizer = subject.student.checkpoint.tokenizer
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(7)]
    prompts = [make_prompt(tokenizer, image, "how many ?") for image in images]
    sizes: list[int] = []

    def watched(student: Any, part: list[Any], *rest: Any) -> Any:
        sizes.append(len(part))
        return _equal_lengths(student, part, *rest)

    monkeypatch.setattr("export.reference._equal_lengths", watched)
    whole = greedy_batch(subject.student, prompts, (), 3)
    monkeypatch.setattr("export.reference.TOKENS", 3 * len(prompts[0].ids))
    assert greedy_batch(subject.student, prompts, (), 3) == whole
    assert sizes == [7, 3, 3, 1]


def test_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    other = tmp_path / ".x.partial-live"
    stale = tmp_path / ".[x].partial-stale"
    for folder in (other, stale):
        folder.mkdir()
    with atomic_dir(tmp_path / "[x]") as work:
        (work / "a").write_text("a")
    assert other.exists()
    assert not stale.exists()
