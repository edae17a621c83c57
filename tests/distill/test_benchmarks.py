"""The distillation benchmarks at a tiny size: what they report, and that both sides of a comparison are the same loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import head_loss, trl_ours, trl_step
from tests.tiny import make_student
from vlm.errors import MissingPiece, UserError

TINY = ["--rows", "40", "--vocabulary", "300", "--hidden", "16", "--teacher-hidden", "24", "--liger", "none"]


@pytest.mark.parametrize("terms", ["sft+kd", "kd"])
def test_head_loss_sides_agree_and_the_report_is_complete(tmp_path: Path, terms: str) -> None:
    out = tmp_path / "result.json"
    sizes = [*TINY, "--terms", terms, "--rounds", "2", "--memory-rounds", "1" if terms == "kd" else "0"]
    assert head_loss.main([*sizes, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    names = {row["name"] for row in found["rows"]}
    assert {"time: ours / full"} <= names
    if terms == "kd":
        assert {"peak memory: ours / full", "peak memory less gradients: ours / full"} <= names
    assert set(found["settings"]["relative_error"]["ours"]) == {"loss", "hidden", "weight"}
    assert max(found["settings"]["relative_error"]["ours"].values()) < head_loss.TOLERANCE


def test_head_loss_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "available", lambda: 1000)
    with pytest.raises(MissingPiece, match="40 rows x 300 tokens need"):
        head_loss.main(TINY)


def test_trl_step_names_a_missing_interpreter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file"):
        trl_step.main(["--trl", str(tmp_path / "python")])


def test_our_side_of_the_trl_comparison_is_the_divergence_over_response_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlavaForConditionalGeneration

    for seed, name in enumerate(("student", "teacher")):
        make_student(tmp_path / name, seed=seed)
    pair = [LlavaForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("student", "teacher")]
    batch = _batch(pair[0].config)
    torch.save([batch], tmp_path / "batches.pt")
    monkeypatch.setattr(
        "sys.argv", ["ours", "--pair", str(tmp_path), "--steps", "2", "--warmup", "0", "--threads", "1"]
    )
    trl_ours.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        q, p = (model(**inputs).logits[:, :-1].log_softmax(-1) for model in pair)
    trained = batch["labels"][:, 1:] != -100
    expected = F.kl_div(q, p, reduction="none", log_target=True)[trained].sum() / trained.sum()
    assert report["losses"][0] == pytest.approx(float(expected), rel=1e-5)
    assert report["losses"][1] < report["losses"][0]
    assert report["peak"] >= report["before"] > 0


def _batch(config: object) -> dict[str, Tensor]:
    """Two samples, the second response shorter and padded."""
    image, visual = config.image_token_id, config.image_seq_length  # type: ignore[attr-defined]
    ids_BT = torch.randint(5, image - 2, (2, visual + 14), generator=torch.Generator().manual_seed(3))
    ids_BT[:, 2 : 2 + visual] = image
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, -2:] = 0
    labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
    labels_BT[:, : visual + 8] = -100
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT, "pixel_values": pixels}
