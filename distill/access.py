"""Where a vision-language model keeps its parts: the only module that knows the layout of a model class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.batch import Batch
from distill.distiller import is_sharded
from distill.packing import additive
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
    return model.model.language_model


def head(model: nn.Module) -> Head:
    """The language-model head.

    Raises:
        CheckpointError: the head has a bias, which the chunked loss does not compute.
    """
    if getattr(model.lm_head, "bias", None) is not None:
        raise CheckpointError("the language-model head has a bias; only heads without one are supported")
    text = getattr(model.config, "text_config", model.config)
    return Head(model.lm_head.weight, getattr(text, "final_logit_softcapping", None))


def image_token(model: nn.Module) -> int:
    """Id of the placeholder that image features replace."""
    return int(model.config.image_token_id)


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """Token embeddings with image features scattered over the placeholder tokens: embeds_BTD."""
    llava = model.model
    embeds_BTD = llava.get_input_embeddings()(batch.input_ids_BT)
    if batch.pixels_NCHW is None or len(batch.pixels_NCHW) == 0:
        if is_sharded(model):  # other processes may have images, and this one must follow them through the tower
            return embeds_BTD + 0.0 * _features(model, _blank(model, embeds_BTD)).sum().to(embeds_BTD.dtype)
        return embeds_BTD
    flat = _features(model, batch.pixels_NCHW).to(embeds_BTD.dtype)
    if flat.shape[0] != int(batch.image_BT.sum()):
        raise ValueError(f"{int(batch.image_BT.sum())} image tokens but {flat.shape[0]} image features")
    return embeds_BTD.masked_scatter(batch.image_BT[..., None], flat)


def _features(model: nn.Module, pixels_NCHW: Tensor) -> Tensor:
    config = model.config
    features = model.model.get_image_features(
        pixel_values=pixels_NCHW,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        return_dict=True,
    ).pooler_output
    return torch.cat(list(features), dim=0)


def _blank(model: nn.Module, like: Tensor) -> Tensor:
    vision = model.config.vision_config
    return torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size, device=like.device)


@dataclass(frozen=True)
class GoldPass:
    """Result of one decoder pass over the gold sequence."""

    hidden_BTD: Tensor
    embeds_BTD: Tensor
    cache: Any


def gold_pass(model: nn.Module, batch: Batch, keep_cache: bool) -> GoldPass:
    """Run the decoder over the gold tokens, keeping keys and values when asked to."""
    embeds_BTD = embed(model, batch)
    packing = batch.packing
    if packing is None:
        output = decoder(model)(
            inputs_embeds=embeds_BTD,
            attention_mask=batch.attention_mask_BT,
            position_ids=batch.position_BT,
            use_cache=keep_cache,
        )
        return GoldPass(output.last_hidden_state, embeds_BTD, output.past_key_values if keep_cache else None)
    output = decoder(model)(
        inputs_embeds=packing.pack(embeds_BTD),
        attention_mask=additive(packing.visible(), embeds_BTD.dtype),
        position_ids=packing.pack(batch.position_BT),
        use_cache=keep_cache,
    )
    cache = packing.unpack_cache(output.past_key_values) if keep_cache else None
    return GoldPass(packing.unpack(output.last_hidden_state), embeds_BTD, cache)
