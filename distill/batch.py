"""A padded batch and what its terms are divided by.

Shape legend: B = batch, T = tokens, N = images, C, H, W = image.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distill.packing import Packing


@dataclass(frozen=True)
class Batch:
    """Tensors of a batch; the span masks come from token ids (see vlm.chat), never from fixed positions.

    Attributes:
        token_weight_BT: weight of each trained token in the response terms; None weighs all alike.
        packing: how samples share the decoder's rows; None gives each its own.
        step_BT: step of a reasoning each token belongs to, 0 for none (see distill.data.rationale); None without reasonings.
        latent_BT: latent tokens (see distill.latents); None for students without.
        key_B4: content keys of the samples (see distill.cache_key), for a teacher read from disk.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    image_BT: Tensor
    instruction_BT: Tensor
    response_BT: Tensor
    pixels_NCHW: Tensor | None
    token_weight_BT: Tensor | None = None
    step_BT: Tensor | None = None
    latent_BT: Tensor | None = None
    key_B4: Tensor | None = None
    packing: Packing | None = None

    @property
    def position_BT(self) -> Tensor:
        """Position ids that ignore padding on either side."""
        return (self.attention_mask_BT.cumsum(dim=1) - 1).clamp(min=0)

    def response_places(self) -> tuple[Tensor, Tensor]:
        """(sample_N, place_N) of the trained tokens; token 0 of a row has no predicting position and never counts."""
        sample_N, place_N = self.response_BT[:, 1:].nonzero(as_tuple=True)
        return sample_N, place_N + 1

    def response_tokens(self, normalise: str = "weight", taught: bool = False) -> Tensor:
        """What the response terms are divided by.

        Args:
            taught: leave out latent tokens, about which no teacher is asked.
            normalise: `weight` of all trained tokens together (their number, where none are weighted); `count` of those
                that weigh anything; `sample`, of the samples.
        """
        trained_BT = self.response_BT[:, 1:]
        if taught and self.latent_BT is not None:
            trained_BT = trained_BT & ~self.latent_BT[:, 1:]
        if normalise == "sample":
            return trained_BT.any(dim=1).sum()
        if self.token_weight_BT is None:
            return trained_BT.sum()
        weight_BT = trained_BT * self.token_weight_BT[:, 1:]
        return (weight_BT > 0).sum() if normalise == "count" else weight_BT.sum()

    def image_samples(self) -> Tensor:
        """Number of samples that have an image."""
        return self.image_BT.any(dim=1).sum()


@dataclass(frozen=True)
class Normaliser:
    """What the terms are divided by: totals over all micro-batches (and processes) of a step.

    Attributes:
        taught_tokens: those of the response that a teacher is asked about; None where that is all of them.
    """

    response_tokens: Tensor | float
    image_samples: Tensor | float
    taught_tokens: Tensor | float | None = None

    @property
    def taught(self) -> Tensor | float:
        return self.response_tokens if self.taught_tokens is None else self.taught_tokens

    @staticmethod
    def of(batch: Batch) -> Normaliser:
        return Normaliser(
            batch.response_tokens().clamp(min=1),
            batch.image_samples().clamp(min=1),
            batch.response_tokens(taught=True).clamp(min=1),
        )
