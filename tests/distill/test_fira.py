"""Fira against closed forms, its limits, GaLore, and torch's AdamW."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill import optimizers
from distill.config import Lora, TrainConfig
from distill.fira import NORM, PROJECTOR, Fira, left_vectors, range_finder
from distill.methods import FiraOptions
from distill.optimizers import build_optimizer, estimate_memory, low_rank_bytes, take_over
from distill.train import train
from tests.distill import killing
from tests.tiny import make_student
from vlm.errors import UserError
from vlm.load import load_model, open_checkpoint


def one(rows: int, columns: int, rank: int, lr: float = 1.0, eps: float = 0.0, **options: Any) -> tuple[Tensor, Fira]:
    """A matrix of zeros and its optimiser, in double precision."""
    p = nn.Parameter(torch.zeros(rows, columns, dtype=torch.float64))
    settings = FiraOptions(rank=rank, **options)
    return p, Fira([{"params": [p], "rank": rank}], lr=lr, eps=eps, settings=settings)


def gradients(rows: int, columns: int, count: int, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=random, dtype=torch.float64) for _ in range(count)]


def run(p: Tensor, optimizer: torch.optim.Optimizer, given: list[Tensor]) -> list[Tensor]:
    """The updates (what is subtracted) of each gradient."""
    found = []
    for gradient in given:
        before = p.detach().clone()
        p.grad = gradient.clone()
        optimizer.step()
        found.append(before - p.detach())
    return found


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_the_first_step_has_a_closed_form(shape: tuple[int, int]) -> None:
    p, optimizer = one(*shape, rank=3)
    gradient = gradients(*shape, 1)[0]
    (update,) = run(p, optimizer, [gradient])
    wide = gradient if shape[0] < shape[1] else gradient.T
    left = torch.linalg.svd(wide, full_matrices=False).U[:, :3]
    low = left.T @ wide
    expected = left @ low.sign() + (wide - left @ low) * (math.sqrt(3) / low.norm(dim=0))
    torch.testing.assert_close(update if shape[0] < shape[1] else update.T, expected, rtol=0, atol=3e-12)


def test_the_whole_space_leaves_no_residual() -> None:
    p, optimizer = one(5, 8, rank=5)
    run(p, optimizer, gradients(5, 8, 3))
    assert float(optimizer.state[p][NORM]) == 0.0
    # and the update lies in the span of what Adam made of R: with GaLore it is the same to the last bit
    q, galore = one(5, 8, rank=5, residual="none")
    run(q, galore, gradients(5, 8, 3))
    assert torch.equal(p, q)


def test_diagonal_gradients_of_full_rank_are_adamw() -> None:
    diagonals = [torch.diag(torch.arange(6, 0, -1).double() * scale) for scale in (1.0, 2.0, -0.5, 3.0, 0.7)]
    p, optimizer = one(6, 6, rank=6, lr=0.1, eps=1e-8)
    q = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
    adamw = torch.optim.AdamW([q], lr=0.1, weight_decay=0.0)
    for ours, theirs in zip(run(p, optimizer, diagonals), run(q, adamw, diagonals), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_what_is_not_targeted_is_torch_adamw_bit_for_bit() -> None:
    torch.manual_seed(0)
    start = [torch.randn(7), torch.randn(3, 5), torch.randn(2, 3, 4, 4)]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    fira = Fira([{"params": ours}], lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    for _ in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        fira.step()
        adamw.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_signs_of_singular_vectors_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    given = gradients(6, 9, 8)
    p, optimizer = one(6, 9, rank=3, refresh=4, lr=0.1, eps=1e-8)
    expected = run(p, optimizer, given)
    original = Fira._projector
    flips = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    monkeypatch.setattr(Fira, "_projector", lambda *a: original(*a) * flips)
    q, flipped = one(6, 9, rank=3, refresh=4, lr=0.1, eps=1e-8)
    for found, update in zip(run(q, flipped, given), expected, strict=True):
        torch.testing.assert_close(found, update, rtol=0, atol=1e-12)


def test_a_sudden_gradient_is_limited() -> None:
    given = gradients(6, 9, 8)
    given[5] = given[5] * 1e4
    for limit, grows in ((1.01, False), (0.0, True)):
        p, optimizer = one(6, 9, rank=2, lr=0.1, eps=1e-8, limit=limit)
        norms = []
        for gradient in given:
            run(p, optimizer, [gradient])
            norms.append(float(optimizer.state[p][NORM]))
        ratios = [b / a for a, b in itertools.pairwise(norms)]
        assert (max(ratios) > 1.0100001) == grows
    # what is stored is what was applied
    p, optimizer = one(6, 9, rank=2, residual="orthogonal")
    (_, update) = run(p, optimizer, [given[0], given[5]])
    left = optimizer.state[p][PROJECTOR]
    torch.testing.assert_close((update - left @ (left.T @ update)).norm(), optimizer.state[p][NORM])


def test_the_released_residual_differs_only_where_scale_does() -> None:
    given = gradients(5, 9, 3)
    same = [run(*one(5, 9, rank=2, residual=r), given) for r in ("orthogonal", "release")]
    torch.testing.assert_close(same[0], same[1])
    apart = [run(*one(5, 9, rank=2, residual=r, scale=0.25), given) for r in ("orthogonal", "release")]
    assert not torch.allclose(apart[0][0], apart[1][0])


def test_the_matrix_level_scale_is_one_number() -> None:
    gradient = gradients(5, 9, 1)[0]
    p, optimizer = one(5, 9, rank=2, scaling="matrix")
    (update,) = run(p, optimizer, [gradient])
    left = optimizer.state[p][PROJECTOR]
    low = left.T @ gradient
    expected = left @ low.sign() + (gradient - left @ low) * (math.sqrt(2 * 9) / low.norm())
    torch.testing.assert_close(update, expected, rtol=0, atol=1e-12)


def regression(residual: str, refresh: int, seed: int, steps: int = 600) -> tuple[float, int]:
    """Final loss and rank of the whole movement, on a target of full rank."""
    random = torch.Generator().manual_seed(seed)
    target = torch.randn(16, 24, generator=random, dtype=torch.float64)
    p, optimizer = one(16, 24, rank=2, lr=0.1, eps=1e-8, residual=residual, refresh=refresh)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / steps))
        p.grad = (p - target).detach()
        optimizer.step()
    return float((p - target).square().sum() / 2), int(torch.linalg.matrix_rank(p.detach(), atol=1e-6))


@pytest.mark.parametrize("refresh", [100_000, 50])
def test_fira_reaches_a_full_rank_target_and_galore_does_not(refresh: int) -> None:
    for seed in range(3):
        ours, rank = regression("orthogonal", refresh, seed)
        theirs, low = regression("none", refresh, seed)
        assert rank == 16
        assert ours < 1e-15
        assert theirs > 1e-3
        if refresh > 600:
            assert low == 2


def test_exact_vectors_are_those_of_a_singular_value_decomposition() -> None:
    """Of single precision they come from G G' in double precision: also with values over six orders of magnitude."""
    random = torch.Generator().manual_seed(2)
    left = torch.linalg.qr(torch.randn(40, 40, generator=random, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(70, 40, generator=random, dtype=torch.float64)).Q
    gradient = left @ torch.diag(torch.logspace(0, -6, 40).double()) @ right.T
    for kind, near in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        found = left_vectors(gradient.to(kind), 12)
        assert found.dtype == kind
        torch.testing.assert_close(
            (found.T @ left[:, :12].to(kind)).abs(), torch.eye(12, dtype=kind), atol=near, rtol=0
        )
    nothing = left_vectors(torch.zeros(5, 8), 3)
    torch.testing.assert_close(nothing.T @ nothing, torch.eye(3))


def test_the_randomised_decomposition_finds_the_same_space() -> None:
    random = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(60, 60, generator=random)).Q
    right = torch.linalg.qr(torch.randn(90, 60, generator=random)).Q
    gradient = left @ torch.diag(0.7 ** torch.arange(60.0)) @ right.T
    exact = torch.linalg.svd(gradient, full_matrices=False).U[:, :8]
    found = range_finder(gradient, 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found @ found.T, exact @ exact.T, atol=1e-4, rtol=0)
    before = torch.get_rng_state()
    updates = [run(*one(30, 50, rank=4, svd="randomized"), gradients(30, 50, 2))[1] for _ in range(2)]
    assert torch.equal(*updates), "the draws depend on seed, step and shape only"
    assert torch.equal(torch.get_rng_state(), before), "and leave the global stream alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_resuming_goes_on_with_the_same_bits(dtype: torch.dtype, moments: str, tmp_path: Path) -> None:
    given = [g.to(dtype) for g in gradients(12, 20, 12)]

    def made() -> tuple[nn.Parameter, nn.Parameter, Fira]:
        p, v = nn.Parameter(torch.ones(12, 20, dtype=dtype)), nn.Parameter(torch.ones(20, dtype=dtype))
        groups = [{"params": [("p", p)], "rank": 3}, {"params": [("v", v)]}]
        settings = FiraOptions(rank=3, refresh=4, svd="randomized", moments=moments)  # type: ignore[arg-type]
        return p, v, Fira(groups, lr=1e-2, settings=settings)

    def steps(p: Tensor, v: Tensor, optimizer: Fira, part: list[Tensor]) -> None:
        for gradient in part:
            p.grad, v.grad = gradient.clone(), gradient[0].clone()
            optimizer.step()

    p, v, optimizer = made()
    steps(p, v, optimizer, given[:7])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    q, w, again = made()
    q.data, w.data = p.data.clone(), v.data.clone()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(p, v, optimizer, given[7:])
    steps(q, w, again, given[7:])
    assert torch.equal(p, q)
    assert torch.equal(v, w)
    assert {n: t.dtype for n, t in again.state[q].items() if isinstance(t, Tensor)} == {
        n: t.dtype for n, t in optimizer.state[p].items() if isinstance(t, Tensor)
    }


def test_a_gradient_that_is_not_finite_is_skipped_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    p, optimizer = one(4, 6, rank=2)
    bad = gradients(4, 6, 1)[0]
    bad[1, 2] = math.nan
    updates = run(p, optimizer, [bad, bad])
    assert not any(update.any() for update in updates)
    assert optimizer.skipped == 2
    assert capsys.readouterr().err.count("not finite") == 1
    assert run(p, optimizer, gradients(4, 6, 1))[0].any()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_student(tmp_path_factory.mktemp("student"), **killing.SIZES)


def config_with(**fira: Any) -> TrainConfig:
    free = {"max_grad_norm": 0.0} if fira.get("per_layer") else {}
    return TrainConfig(preset="digits", optim="fira", lr=1e-3, fira=FiraOptions(rank=8, **fira), **free)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_state_bytes_are_the_formula_and_the_estimate(student: Path, moments: str) -> None:
    model = load_model(open_checkpoint(student))
    config = config_with(moments=moments)
    optimizer = build_optimizer(config, model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert isinstance(optimizer, Fira)
    assert optimizer.state_bytes() == estimate_memory(model, config).state
    m, n, r = 32, 48, 8
    gate = model.get_parameter("model.language_model.layers.0.mlp.gate_proj.weight")
    held = [v for v in optimizer.state[gate].values() if isinstance(v, Tensor)]
    width = 4 if moments == "float32" else 2
    assert sum(v.numel() * v.element_size() for v in held) == 4 * m * r + width * 2 * n * r + 4
    assert low_rank_bytes(gate, config.fira) == 4 * m * r + width * 2 * n * r + 4
    adamw = build_optimizer(TrainConfig(preset="digits"), model)
    adamw.step()
    held = [v for state in adamw.state.values() for v in state.values() if isinstance(v, Tensor)]
    assert sum(v.numel() * v.element_size() for v in held) == estimate_memory(model, config).adamw


def test_updating_in_the_backward_pass_gives_the_same_weights_and_holds_no_gradient(student: Path) -> None:
    given = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    models, peaks = [], []
    for per_layer in (False, True):
        model = load_model(open_checkpoint(student)).train()
        alive: list[int] = []
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(
                lambda _, m=model, a=alive: a.append(sum(q.grad is not None for q in m.parameters()))
            )
        optimizer = build_optimizer(config_with(per_layer=per_layer), model)
        for _ in range(3):
            logits = model(input_ids=given).logits
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), given[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
        peaks.append(max(alive))
    assert peaks[0] > 10
    assert peaks[1] == 1
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_either_optimizer_goes_on_with_the_others_state(student: Path, tmp_path: Path) -> None:
    model = load_model(open_checkpoint(student))
    fira_config = config_with()
    for first, second in ((fira_config, TrainConfig(preset="digits")), (TrainConfig(preset="digits"), fira_config)):
        one_, other = build_optimizer(first, model), build_optimizer(second, model)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        one_.step()
        torch.save(one_.state_dict(), tmp_path / optimizers.FILE)
        taken, total = take_over(other, tmp_path)
        low = len(optimizers.low_rank_names(model, fira_config.fira))
        assert (taken, total) == (len(one_.state) - low, sum(1 for _ in model.parameters()))
        norm = model.get_parameter("model.language_model.norm.weight")
        assert torch.equal(other.state[norm]["exp_avg"], one_.state[norm]["exp_avg"])
        other.step()
    same = build_optimizer(fira_config, model)
    torch.save(build_and_step(fira_config, model).state_dict(), tmp_path / optimizers.FILE)
    taken, total = take_over(same, tmp_path)
    assert taken == total
    same.step()
    narrow = build_optimizer(config_with(moments="bfloat16"), model)
    take_over(narrow, tmp_path)
    assert isinstance(narrow, Fira)
    assert narrow.state_bytes() == build_and_step(config_with(moments="bfloat16"), model).state_bytes()
    with pytest.raises(UserError, match="no optimiser state"):
        take_over(same, tmp_path / "nowhere")


def build_and_step(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = build_optimizer(config, model)
    optimizer.step()
    return optimizer


def test_a_run_resumes_to_the_same_bits(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    recipe = killing.recipe(tmp_path_factory.mktemp("models"))
    settings = FiraOptions(rank=8, refresh=2, svd="randomized")
    config = dataclasses.replace(
        recipe, objective="sft", eval_every=0, final="last", optim="fira", fira=settings, steps=6, save_every=3
    )
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    train(whole)
    cut = dataclasses.replace(config, out=tmp_path / "cut")
    killing.stop_after(cut, 4)
    train(dataclasses.replace(cut, resume=True))
    assert not killing.differences(whole.out, cut.out)
    adamw = dataclasses.replace(config, out=tmp_path / "adamw", optim="adamw", fira=FiraOptions())
    train(adamw)
    assert killing.differences(whole.out, adamw.out)


def test_a_run_updates_layer_by_layer_and_takes_state_over(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = killing.recipe(tmp_path_factory.mktemp("models"))
    settings = FiraOptions(rank=8, refresh=2)
    config = dataclasses.replace(
        recipe, objective="sft", eval_every=0, final="last", accumulate=1, max_grad_norm=0.0, optim="fira", steps=3
    )
    runs = []
    for per_layer in (False, True):
        fira = dataclasses.replace(settings, per_layer=per_layer)
        runs.append(dataclasses.replace(config, out=tmp_path / str(per_layer), fira=fira))
        train(runs[-1])
    assert "residual=orthogonal" in capsys.readouterr().err
    ours, theirs = (load_file(run.out / "student" / "model.safetensors") for run in runs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    cut = dataclasses.replace(runs[0], out=tmp_path / "cut", save_every=2)
    killing.stop_after(cut, 2)
    kept = cut.out / "checkpoints" / "checkpoint-2"
    again = dataclasses.replace(runs[0], out=tmp_path / "again", optim="adamw", fira=FiraOptions(), optim_state=kept)
    train(again)
    assert "taken over from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"fira": FiraOptions(rank=4)}, "--optim fira"),
        ({"optim": "fira", "accumulate": 2, "fira": FiraOptions(per_layer=True)}, "set accumulate 1"),
        ({"optim": "fira", "fira": FiraOptions(per_layer=True)}, "set max_grad_norm 0"),
        ({"optim": "fira", "fsdp": True}, "whole gradients"),
        ({"optim": "fira", "lora": Lora(r=4)}, "low rank already"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], seen: str) -> None:
    with pytest.raises(UserError, match=seen):
        TrainConfig(preset="digits", **changes)
    for wrong in ({"rank": 0}, {"limit": 0.9}, {"targets": "("}, {"scale": math.nan}, {"refresh": 0}):
        with pytest.raises(UserError, match=f"fira.{next(iter(wrong))}"):
            FiraOptions(**wrong)  # type: ignore[arg-type]


def test_targets_that_save_nothing_are_refused(student: Path) -> None:
    model = load_model(open_checkpoint(student))
    with pytest.raises(UserError, match="names no trained matrix"):
        optimizers.low_rank_names(model, FiraOptions(targets="nothing_like_it"))
    with pytest.raises(UserError, match="lower it below 32"):
        optimizers.low_rank_names(model, FiraOptions(rank=64))
