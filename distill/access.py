"""Where a vision-language model keeps its parts: one face for all model classes (see families)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.batch import Batch
from distill.distiller import is_sharded
from distill.families import family
from distill.gate import Gate
from distill.packing import additive
from distill.ribbon import deepstack, for_decoder, gold_mask
from vlm.errors import CheckpointError


@dataclass(frozen=True)
class Head:
    """The output projection: logits = soft_cap * tanh(hidden @ weight.T / soft_cap), or without the cap."""

    weight_VD: Tensor
    soft_cap: float | None = None

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """logits_RV of a few rows."""
        logits_RV = hidden_RD @ self.weight_VD.to(hidden_RD.dtype).T
        return logits_RV if self.soft_cap is None else self.soft_cap * torch.tanh(logits_RV / self.soft_cap)


def decoder(model: nn.Module) -> Any:
    """The causal decoder: takes inputs_embeds, returns the last hidden states."""
    return family(model).decoder(model)


def head(model: nn.Module) -> Head:
    """The language-model head.

    Raises:
        CheckpointError: the head has a bias, which the chunked loss does not compute.
    """
    if getattr(model.lm_head, "bias", None) is not None:
        raise CheckpointError("the language-model head has a bias; only heads without one are supported")
    text = getattr(model.config, "text_config", model.config)
    return Head(model.lm_head.weight, getattr(text, "final_logit_softcapping", None))


def width(model: nn.Module | None) -> int:
    """Size of a decoder's hidden states."""
    assert model is not None
    return int(getattr(model.config, "text_config", model.config).hidden_size)


def image_token(model: nn.Module) -> int:
    """Id of the placeholder that image features replace."""
    return int(model.config.image_token_id)


def latent_tokens(model: nn.Module) -> tuple[int, ...]:
    """Ids of the latent tokens the model was given, see distill.latents; none for others."""
    return tuple(getattr(model.config, "latent_token_ids", None) or ())


@dataclass(frozen=True)
class Inputs:
    """What a decoder takes in.

    Attributes:
        position_BT: position ids; of a class with three position ids a token, position_BT3.
        deep: deep_BTD for each of the first decoder layers, added to what comes out of it; zero beside image tokens.
    """

    embeds_BTD: Tensor
    position_BT: Tensor
    deep: tuple[Tensor, ...] = ()


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """Token embeddings with image features scattered over the placeholder tokens: embeds_BTD."""
    return inputs(model, batch).embeds_BTD


def inputs(model: nn.Module, batch: Batch) -> Inputs:
    """Token embeddings with image features in place, and the positions of the model's class."""
    kind = family(model)
    position_BT = kind.positions(model, batch)
    embeds_BTD = decoder(model).get_input_embeddings()(batch.input_ids_BT)
    if batch.pixels_NCHW is None or len(batch.pixels_NCHW) == 0:
        if is_sharded(model):  # other processes may have images, and this one must follow them through the tower
            flat, deep = kind.features(model, _blank(model, embeds_BTD))
            nothing = 0.0 * sum((part.sum() for part in deep), start=flat.sum())
            embeds_BTD = embeds_BTD + nothing.to(embeds_BTD.dtype)
        return Inputs(embeds_BTD, position_BT)
    flat, deep = kind.features(model, batch.pixels_NCHW)
    if flat.shape[0] != int(batch.image_BT.sum()):
        raise ValueError(f"{int(batch.image_BT.sum())} image tokens but {flat.shape[0]} image features")
    image_BT1 = batch.image_BT[..., None]
    zero_BTD = torch.zeros_like(embeds_BTD)
    return Inputs(
        embeds_BTD.masked_scatter(image_BT1, flat.to(embeds_BTD.dtype)),
        position_BT,
        tuple(zero_BTD.masked_scatter(image_BT1, part.to(embeds_BTD.dtype)) for part in deep),
    )


def _blank(model: nn.Module, like: Tensor) -> Tensor:
    kind = family(model)
    side = kind.side(model)
    return torch.zeros(1, kind.channels(model), side, side, device=like.device)


@dataclass(frozen=True)
class GoldPass:
    """Result of one decoder pass over the gold sequence, and what went in."""

    hidden_BTD: Tensor
    inputs: Inputs
    cache: Any

    @property
    def embeds_BTD(self) -> Tensor:
        return self.inputs.embeds_BTD


def gold_pass(model: nn.Module, batch: Batch, keep_cache: bool, gate: Gate | None = None) -> GoldPass:
    """Run the decoder over the gold tokens, keeping keys and values when asked to.

    Args:
        gate: attention that is held back.
    """
    taken = inputs(model, batch)
    packing, kind = batch.packing, taken.embeds_BTD.dtype
    if packing is None:
        mask = batch.attention_mask_BT
        if gate is not None:
            mask = additive(gold_mask(mask, 0), kind) + gate.bias().to(kind)
        output = decoder(model)(
            inputs_embeds=taken.embeds_BTD,
            attention_mask=mask,
            position_ids=for_decoder(taken.position_BT),
            use_cache=keep_cache,
            **deepstack(taken.deep),
        )
        return GoldPass(output.last_hidden_state, taken, output.past_key_values if keep_cache else None)
    mask = additive(packing.visible(), kind)
    if gate is not None:
        mask = mask + gate.bias(packing).to(kind)
    output = decoder(model)(
        inputs_embeds=packing.pack(taken.embeds_BTD),
        attention_mask=mask,
        position_ids=for_decoder(packing.pack(taken.position_BT)),
        use_cache=keep_cache,
        **deepstack([packing.pack(part) for part in taken.deep]),
    )
    cache = packing.unpack_cache(output.past_key_values) if keep_cache else None
    return GoldPass(packing.unpack(output.last_hidden_state), taken, cache)
