"""Whole runs on tiny models: what is written, how a killed run resumes, how the step is normalised."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill import checkpoint
from distill.config import OBJECTIVES, Align, LossWeights, TrainConfig
from distill.data import Collator, DigitsExamples, LlavaJson
from distill.evaluate import greedy_matches, held_out_terms
from distill.objective import VARIANCE, Objective, bounded
from distill.reporter import drop_after
from distill.stored import config_from_json
from distill.teacher import LiveTeacher
from distill.train import train
from tests.distill.conftest import interrupt_at
from tests.tiny import make_student
from vlm import chat, digits
from vlm.errors import CheckpointError, DataError, GateFailed, UserError
from vlm.load import load_model, newest_run, open_checkpoint

ROOT = Path(__file__).parent.parent.parent
SIZES = {"hidden": 64, "head_dim": 16, "intermediate": 96, "spread": 2.0}


def tiny(models: Path, out: Path, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        preset="digits",
        teacher=str(models / "teacher"),
        student=str(models / "student"),
        out=out,
        steps=6,
        batch_size=4,
        lr=1e-3,
        samples=200,
        eval_samples=20,
        eval_every=3,
        save_every=2,
        log_every=2,
        threads=1,
    )
    return dataclasses.replace(base, **changes)


def test_a_run_leaves_a_plain_hugging_face_student_and_its_record(models: Path, tmp_path: Path) -> None:
    config = tiny(models, tmp_path / "runs" / "one")
    result = train(config)
    assert result.student == config.out / "student"
    assert result.n == 20
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(result.student)
    processor = AutoProcessor.from_pretrained(result.student)
    sample = digits.sample("test", 0)
    prompt = processor.apply_chat_template([chat.user_message(sample.question)], add_generation_prompt=True)
    inputs = processor(images=sample.image, text=prompt, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2
    provenance = json.loads((result.student / "vlm.json").read_text())
    assert provenance["objective"] == "align-ti"
    assert provenance["data"]["name"] == "digits"
    assert config_from_json(provenance["recipe"]) == config
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert {"sft", "kd", "iva", "tpa", "loss"} <= set().union(*lines)
    assert {"eval_sft", "eval_kd", "eval_iva", "eval_tpa", "eval_exact_match"} <= set().union(*lines)
    for name in ("loss.png", "irs.png", "irs.json", "tensorboard"):
        assert (config.out / name).exists(), name
    assert newest_run(tmp_path / "runs") == result.student


def test_logged_terms_add_up_to_the_logged_loss(models: Path, tmp_path: Path) -> None:
    config = tiny(models, tmp_path / "run", accumulate=2)
    train(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert logged
    for line in logged:
        assert line["loss"] == pytest.approx(sum(line[name] for name in ("sft", "kd", "iva", "tpa")), rel=1e-4)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def test_accumulation_does_not_change_the_result(models: Path, tmp_path: Path) -> None:
    """Deterministic candidates; the same samples in one batch of 8 or in 4 micro-batches of 2."""
    from distill.config import Align

    align = Align(sampling="top-k", iva_layer=0)
    whole = tiny(models, tmp_path / "whole", batch_size=8, steps=4, align=align, eval_every=0)
    pieces = dataclasses.replace(whole, out=tmp_path / "pieces", batch_size=2, accumulate=4)
    train(whole)
    train(pieces)
    one, other = final_weights(whole.out), final_weights(pieces.out)
    start = load_file(models / "student" / "model.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-4, rtol=1e-3)
    assert any(not torch.equal(value, start[name]) for name, value in one.items() if name in start)


def test_resuming_a_finished_run_changes_nothing(models: Path, tmp_path: Path) -> None:
    config = tiny(models, tmp_path / "run", steps=2, eval_every=0)
    first = train(config)
    before = (config.out / "student" / "model.safetensors").read_bytes()
    again = train(dataclasses.replace(config, resume=True))
    assert again == first
    assert (config.out / "student" / "model.safetensors").read_bytes() == before


def test_a_diverged_run_fails_and_leaves_no_student(models: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(GateFailed, match="lower --lr"):
        train(tiny(models, tmp_path / "run", lr=1e30, objective="sft", eval_every=0))
    assert not (tmp_path / "run" / "student").exists()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 500}, "do not fill one batch"),
        ({"out": Path("FILE/run")}, "choose another --out"),
        ({"teacher": "runs/typo"}, "not a directory"),
        ({"teacher": "no body/here"}, "neither a directory nor"),
    ],
)
def test_refused_input_leaves_no_run_folder(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(tiny(models, tmp_path / "run"), **changes))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "runs"]


def test_a_layer_the_teacher_lacks_is_refused_before_anything_is_written(models: Path, tmp_path: Path) -> None:
    from distill.config import Align

    with pytest.raises(UserError, match="layers 0 to 1"):
        train(tiny(models, tmp_path / "run", align=Align(iva_layer=99)))
    assert not (tmp_path / "run").exists()


def test_a_question_before_its_image_is_put_after_it(models: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(models / "student")
    digits.sample("train", 0).image.save(tmp_path / "0.png")
    forms = ["<image>\nRead the top row.", "Read the top row.\n<image>"]
    records = [
        {"image": "0.png", "conversations": [{"from": "human", "value": v}, {"from": "gpt", "value": "1 2"}]}
        for v in forms
    ]
    (tmp_path / "d.json").write_text(json.dumps(records))
    examples = LlavaJson(tmp_path / "d.json", None, checkpoint.tokenizer, checkpoint.image)
    assert examples[0].ids == examples[1].ids
    assert examples.tokens(0) == len(examples[0].ids)


def test_ctrl_c_writes_a_checkpoint_and_resumes(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tiny(models, tmp_path / "reference", save_every=100)
    train(reference)
    stopped = dataclasses.replace(reference, out=tmp_path / "stopped")
    interrupt_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.undo()
    last = checkpoint.last(stopped.out)
    assert last is not None
    assert last.name == "checkpoint-3"
    train(dataclasses.replace(stopped, resume=True))
    one, other = final_weights(reference.out), final_weights(stopped.out)
    assert all(torch.equal(other[name], value) for name, value in one.items())


def test_bfloat16_autocast_really_casts(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.objective import Objective

    seen: list[torch.dtype] = []
    original = Objective.__call__

    def watch(self: Objective, student: Any, *rest: Any) -> Any:
        if student.training:
            hook = student.model.language_model.layers[0].mlp.down_proj.register_forward_hook(
                lambda _m, _i, output: seen.append(output.dtype)
            )
            try:
                return original(self, student, *rest)
            finally:
                hook.remove()
        return original(self, student, *rest)

    monkeypatch.setattr(Objective, "__call__", watch)
    train(tiny(models, tmp_path / "run", bf16=True, steps=2, eval_every=0))
    assert set(seen) == {torch.bfloat16}


def test_an_existing_run_is_never_overwritten(models: Path, tmp_path: Path) -> None:
    config = tiny(models, tmp_path / "run", steps=2, eval_every=0, objective="sft")
    train(config)
    before = final_weights(config.out)
    with pytest.raises(UserError, match="--resume"):
        train(config)
    assert all(torch.equal(value, before[name]) for name, value in final_weights(config.out).items())


def test_resume_without_a_run_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run to resume"):
        train(tiny(models, tmp_path / "nothing", resume=True))
    assert not (tmp_path / "nothing").exists()


def test_a_pair_with_different_tokenizers_is_refused(models: Path, tmp_path: Path) -> None:
    other = make_student(tmp_path / "other", **SIZES)
    text = (other / "tokenizer.json").read_text().replace("<|endoftext|>", "<|finis|>")
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="tokenizers"):
        train(tiny(models, tmp_path / "run", teacher=str(other)))
    make_student(tmp_path / "larger", **SIZES, image_size=64)
    with pytest.raises(CheckpointError, match="different pixels"):
        train(tiny(models, tmp_path / "run", teacher=str(tmp_path / "larger")))


def test_padded_vocabularies_share_their_common_part(models: Path, tmp_path: Path) -> None:
    from distill.pair import shared_vocabulary

    teacher, student = open_checkpoint(models / "teacher"), open_checkpoint(models / "student")
    wider = dataclasses.replace(
        teacher, config={**teacher.config, "text_config": {**teacher.config["text_config"], "vocab_size": 1024}}
    )
    assert shared_vocabulary(wider, student) == student.config["text_config"]["vocab_size"]


def test_teacher_forced_matches_equal_free_running_greedy_decoding(models: Path) -> None:
    """The shortcut used for accuracy: greedy decoding reproduces the reference iff every argmax on it does."""
    checkpoint = open_checkpoint(models / "student")
    model = load_model(checkpoint)
    collate = Collator(checkpoint.tokenizer.spec.pad_token_id)
    examples = DigitsExamples("test", 12, checkpoint.tokenizer, checkpoint.image)
    # teach the random model by rote so that some answers match
    from distill.config import Align, LossWeights
    from distill.data import to_batch
    from distill.objective import Normaliser, Objective

    objective = Objective(("sft",), LossWeights(), Align(), None, 10**6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = to_batch(collate([examples[i] for i in range(6)]))
    for _ in range(40):
        objective(model, batch, Normaliser.of(batch))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = greedy_matches(model.eval(), examples, 12, collate)
    for index, matched in enumerate(ours):
        example = examples[index]
        start = example.spans.index("response")
        answer = [i for i, s in zip(example.ids, example.spans, strict=True) if s == "response"]
        out = model.generate(
            input_ids=torch.tensor([example.ids[:start]]),
            pixel_values=torch.from_numpy(example.pixels[0])[None],
            max_new_tokens=len(answer),
            do_sample=False,
            eos_token_id=list(checkpoint.tokenizer.spec.eos_token_ids),
        )[0, start:].tolist()
        assert matched == (out == answer), index
    assert 0 < sum(ours) < 12


def test_llava_json_equals_the_digits_stream(models: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(models / "student")
    records = []
    for index in range(3):
        sample = digits.sample("train", index)
        sample.image.save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": f"<image>\n{sample.question}"}, {"from": "gpt", "value": sample.answer}]
        records.append({"id": index, "image": f"{index}.png", "conversations": turns})
    (tmp_path / "d.json").write_text(json.dumps(records))
    ours = LlavaJson(tmp_path / "d.json", None, checkpoint.tokenizer, checkpoint.image)
    stream = DigitsExamples("train", 3, checkpoint.tokenizer, checkpoint.image)
    for index in range(3):
        assert ours[index].ids == stream[index].ids
        assert ours[index].spans == stream[index].spans
        assert (ours[index].pixels[0] == stream[index].pixels[0]).all()


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ("x", "conversations"),
        ({"image": 5, "conversations": []}, "image"),
        ({"image": [1], "conversations": []}, "image"),
        ({"conversations": 3}, "conversations"),
        ({"conversations": []}, "conversations"),
        ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}, "image"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "conversations"),
        ({"conversations": [{"from": "human"}]}, "conversations"),
    ],
)
def test_a_bad_record_is_named(models: Path, tmp_path: Path, record: object, field: str) -> None:
    checkpoint = open_checkpoint(models / "student")
    good = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    (tmp_path / "d.json").write_text(json.dumps([good, record]))
    with pytest.raises(DataError, match=rf"record 1.*{field}"):
        LlavaJson(tmp_path / "d.json", None, checkpoint.tokenizer, checkpoint.image)


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    drop_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_gradient_checkpointing_changes_memory_not_the_result(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distill.config import Align

    plain = tiny(models, tmp_path / "plain", steps=3, eval_every=0, align=Align(iva_layer=0, layout="appended"))
    saved = dataclasses.replace(plain, out=tmp_path / "saved", gradient_checkpointing=True, align=Align(iva_layer=0))
    train(plain)
    train(saved)
    assert "align.layout cached becomes appended" in capsys.readouterr().err
    one, other = final_weights(plain.out), final_weights(saved.out)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-5)


def test_a_logger_that_is_not_installed_is_named_with_its_extra(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else original(name, *rest)
    )
    with pytest.raises(UserError, match=r"report_to wandb.*pip install 'align-edge\[wandb\]'"):
        train(tiny(models, tmp_path / "run", report_to="tensorboard,wandb"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="choose from tensorboard, trackio, wandb"):
        tiny(models, tmp_path / "run", report_to="tensorbored")


def test_held_out_terms_do_not_depend_on_batches(models: Path) -> None:
    """Every response token and every image counts alike, in whichever batch it is, beside samples without an image too."""
    student = open_checkpoint(models / "student")
    model, teacher = load_model(student), load_model(open_checkpoint(models / "teacher")).eval()
    objective = Objective(OBJECTIVES["align-ti"], LossWeights(), Align(), LiveTeacher(teacher, Align()), 10**6)
    drawn = DigitsExamples("validation", 7, student.tokenizer, student.image)
    examples: Any = [drawn[i] for i in range(7)]
    blind = [span != "image" for span in examples[6].spans]
    ids, spans = (tuple(itertools.compress(x, blind)) for x in (examples[6].ids, examples[6].spans))
    examples[6] = dataclasses.replace(examples[6], ids=ids, spans=spans, pixels=())
    collate = Collator(student.tokenizer.spec.pad_token_id)
    whole, parts = (held_out_terms(model, objective, examples, 7, collate, size) for size in (7, 3))
    assert whole.keys() == parts.keys() == {"sft", "kd", "iva", "tpa", "loss"}
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("order", [1, -1])
def test_a_variance_that_one_batch_does_not_know(models: Path, order: int) -> None:
    """A batch without images has no variance of iva; it is as if it were zero, in whichever batch it comes."""
    student = open_checkpoint(models / "student")
    drawn = DigitsExamples("validation", 2, student.tokenizer, student.image)
    seen = drawn[0]
    blind = [span != "image" for span in seen.spans]
    ids, spans = (tuple(itertools.compress(x, blind)) for x in (seen.ids, seen.spans))
    examples = [seen, dataclasses.replace(seen, ids=ids, spans=spans, pixels=())][::order]

    class Sampled:
        terms, weights = ("iva",), LossWeights()

        def __call__(self, _model: Any, batch: Any, _normaliser: Any) -> tuple[None, dict[str, float]]:
            return None, {"iva": 2.0, f"iva{VARIANCE}": 0.25} if batch.pixels_NCHW is not None else {"iva": 0.0}

    objective: Any = Sampled()
    collate = Collator(student.tokenizer.spec.pad_token_id)
    found = held_out_terms(load_model(student), objective, examples, 2, collate, 1)
    assert found == bounded({"iva": 2.0, f"iva{VARIANCE}": 0.25, "loss": 2.0})
