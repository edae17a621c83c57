"""LaViT's terms (arXiv 2601.10129): what latent tokens should see and where they should look.

    concept  1 - mean over samples of cos(phi(h_z), V_sem)
             h_z: the last latent's hidden state; V_sem: mean of the teacher's last hidden states at the image
    traj     mean over samples and latents of KL(A_teacher || A_latent)
             A_teacher: the teacher's attention from text to image, min-max, largest 8, made to sum to one
             A_latent: attention of a latent to the image, mean over heads and the last 8 layers, made to sum to one

phi is Linear-GELU-Linear, trained with the student and dropped with the run.

Shape legend: B = samples, T = tokens, K = latents of a sample, D = student hidden, E = teacher hidden.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill import access, gate
from distill.access import GoldPass
from distill.attention import AttentionTap
from distill.batch import Batch, Normaliser
from distill.methods import LavitOptions
from distill.teacher import Gaze

TERMS = ("concept", "traj")
PAPER = "arXiv 2601.10129"
SMALLEST = 1e-8


class LavitHead(nn.Module):
    """What is trained beside the student: phi, and where attention is not read, a bilinear gaze.

    Args:
        student: D. teacher: E.
    """

    def __init__(self, student: int, teacher: int, traj: str) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(student, student), nn.GELU(), nn.Linear(student, teacher))
        self.look = nn.Linear(student, student, bias=False) if traj == "head" else None


@dataclass(frozen=True)
class Lavit:
    """The terms of one run.

    Attributes:
        steps: of the run, for the gate.
    """

    options: LavitOptions
    head: LavitHead
    steps: int

    def gate(self, batch: Batch, step: int | None) -> gate.Gate | None:
        """The gate at an optimiser step; None where it is open, as it is outside training."""
        options = self.options
        until = options.gate_share * self.steps
        if step is None or options.gate == "none" or step >= until:
            return None
        factor = gate.gamma(step, until, options.gate_floor)
        log_factor = gate.SHUT if options.gate == "hard" else float(torch.tensor(factor, dtype=torch.float64).log())
        latent_BT = torch.zeros_like(batch.image_BT) if batch.latent_BT is None else batch.latent_BT
        query_BT = batch.response_BT if not options.gate_prompt else batch.attention_mask_BT.bool() & ~batch.image_BT
        return gate.Gate(log_factor, query_BT & ~latent_BT, batch.image_BT)

    def tap(self, student: nn.Module, batch: Batch) -> contextlib.AbstractContextManager[AttentionTap | None]:
        """Watches the attention that `traj` needs while the student runs."""
        if self.options.traj != "attention":
            return contextlib.nullcontext()
        decoder = access.decoder(student)
        return AttentionTap(decoder, last_layers(decoder, self.options.layers), batch.packing)

    def losses(
        self, batch: Batch, gold: GoldPass, tap: AttentionTap | None, gaze: Gaze, normaliser: Normaliser
    ) -> dict[str, Tensor]:
        """concept and traj, each divided by the samples with an image of the step."""
        nothing = (
            sum((p.sum() for p in self.head.parameters()), start=torch.zeros((), device=gold.hidden_BTD.device)) * 0.0
        )
        latent_BT = batch.latent_BT
        seen_B = batch.image_BT.any(dim=1) & (gaze.mass_BT.sum(dim=1) > 0)
        if latent_BT is None or not seen_B.any():
            return dict.fromkeys(TERMS, nothing)
        index_BK, valid_BK = places(latent_BT)
        share_B = seen_B / normaliser.image_samples
        hidden_BKD = gold.hidden_BTD.gather(1, index_BK[..., None].expand(-1, -1, gold.hidden_BTD.shape[-1]))
        pooled_BD = pool(hidden_BKD, valid_BK, self.options.pool)
        concept_B = concept(self.head.phi(pooled_BD.float()), gaze.semantics_BE.float())
        if tap is not None:
            look_BKT = attended(tap, index_BK, batch)
        else:
            assert self.head.look is not None
            score_BKT = self.head.look(hidden_BKD.float()) @ gold.hidden_BTD.float().transpose(1, 2)
            look_BKT = score_BKT.masked_fill(~batch.image_BT[:, None], torch.finfo(torch.float32).min).softmax(dim=-1)
        # what comes before the first image has nothing to look at
        there_BK = valid_BK & (batch.image_BT.long().cumsum(dim=1).gather(1, index_BK) > 0)
        traj_B = trajectory(look_BKT, gaze.mass_BT, there_BK, self.options.reduction)
        return {"concept": (concept_B * share_B).sum() + nothing, "traj": (traj_B * share_B).sum() + nothing}


def last_layers(decoder: nn.Module, count: int) -> range:
    total = len(decoder.layers)  # type: ignore[arg-type]
    return range(max(0, total - count), total)


def places(marked_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(index_BK, valid_BK) of the marked tokens, in order."""
    count_B = marked_BT.sum(dim=1)
    width = max(int(count_B.max()), 1)
    index_BK = torch.argsort((~marked_BT).int(), dim=1, stable=True)[:, :width]
    return index_BK, torch.arange(width, device=count_B.device) < count_B[:, None]


def pool(hidden_BKD: Tensor, valid_BK: Tensor, how: str) -> Tensor:
    """h_z: the last latent's hidden state, or the mean of all."""
    count_B = valid_BK.sum(dim=1)
    if how == "mean":
        return (hidden_BKD * valid_BK[..., None]).sum(dim=1) / count_B.clamp(min=1)[:, None]
    return hidden_BKD[torch.arange(len(count_B), device=count_B.device), (count_B - 1).clamp(min=0)]


def concept(seen_BE: Tensor, wanted_BE: Tensor) -> Tensor:
    """1 - cosine, from 0 (collinear) over 1 (orthogonal) to 2 (opposite); the target gets no gradient."""
    return 1 - nn.functional.cosine_similarity(seen_BE, wanted_BE.detach(), dim=-1)


def attended(tap: AttentionTap, index_BK: Tensor, batch: Batch) -> Tensor:
    """look_BKT: attention of the latents to the image, mean over heads and tapped layers, each row summing to one."""
    layers = tap.layers
    total_BKT = sum(
        (tap.rows(layer, index_BK, batch.attention_mask_BT).mean(dim=1) for layer in layers[1:]),
        start=tap.rows(layers[0], index_BK, batch.attention_mask_BT).mean(dim=1),
    )
    image_BKT = total_BKT / len(layers) * batch.image_BT[:, None]
    return image_BKT / image_BKT.sum(dim=-1, keepdim=True).clamp(min=SMALLEST)


def trajectory(look_BKT: Tensor, mass_BT: Tensor, valid_BK: Tensor, reduction: str) -> Tensor:
    """KL(mass || look) of each sample, over its latents; `mass` sums to one."""
    mass_B1T = mass_BT.detach()[:, None]
    log_ratio = mass_B1T.clamp(min=torch.finfo(torch.float32).tiny).log() - look_BKT.clamp(min=SMALLEST).log()
    kl_BK = (mass_B1T * log_ratio).sum(dim=-1) * valid_BK
    return kl_BK.sum(dim=1) if reduction == "sum" else kl_BK.sum(dim=1) / valid_BK.sum(dim=1).clamp(min=1)


def header(options: LavitOptions) -> str:
    """What a run says of its latents, departures from the paper named."""
    departures = [
        "gaze=renormalised (the sum of the kept targets is one)",
        f"reduction={options.reduction}" + (" (paper: sum over latents)" if options.reduction == "mean" else ""),
        "no space between latents and answer (the answer's tokens stay the teacher's)",
        "no resampling of the gaze (both models see one grid)",
    ]
    departures += ["pool=mean"] if options.pool == "mean" else []
    departures += ["traj=head (published code)"] if options.traj == "head" else []
    departures += [f"gate={options.gate}"] if options.gate != "cosine" else []
    prompt = "on" if options.gate_prompt else "off: the image reaches the answer through the question"
    return (
        f"lavit: K={options.latents} gate={options.gate} share={options.gate_share:g} floor={options.gate_floor:g} "
        f"gate_prompt={prompt}; not as in {PAPER}: {', '.join(departures)}"
    )
