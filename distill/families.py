"""What differs between model classes: where the decoder is, how pixels enter, which positions tokens have.

Every image has the same square size (vlm.preprocess), so each class gives every image the same number of tokens:
    llava             the class itself
    llava_onevision   the base tile only, as the class does for several images in one prompt
    qwen2_vl, qwen2_5_vl, qwen3_vl   a square grid of merged patches; three position ids a token; in qwen3_vl, features
                      of earlier vision layers are added to the first decoder layers (DeepStack, arXiv 2406.04334)
    smolvlm, idefics3 one tile, no splitting

Shape legend: N = images, C, H, W = image, J = visual tokens of the batch, B = batch, T = tokens, D = hidden, P = patch side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm.errors import CheckpointError

if TYPE_CHECKING:
    from distill.batch import Batch


class Family:
    """LLaVA, and what the other classes share with it.

    Attributes:
        extended: several position ids a token, or features added in the decoder.
    """

    extended = False

    def decoder(self, model: Any) -> Any:
        """The causal decoder: takes inputs_embeds, returns the last hidden states."""
        return model.model.language_model

    def features(self, model: Any, pixels_NCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """features_JD to put in the place of image tokens, and what is added there after the first decoder layers."""
        config = model.config
        found = model.model.get_image_features(
            pixel_values=pixels_NCHW,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            return_dict=True,
        ).pooler_output
        return torch.cat(list(found), dim=0), []

    def positions(self, model: Any, batch: Batch) -> Tensor:
        """Position ids: position_BT, or position_BT3 with time, height and width."""
        return batch.position_BT

    def side(self, model: Any) -> int:
        """Pixels of an image's side, where no image is at hand to look at."""
        return int(model.config.vision_config.image_size)

    def channels(self, model: Any) -> int:
        return int(getattr(model.config.vision_config, "num_channels", 3))


class Onevision(Family):
    def features(self, model: Any, pixels_NCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        inner, config = model.model, model.config
        hidden = inner.vision_tower(pixels_NCHW, output_hidden_states=True).hidden_states
        layers = config.vision_feature_layer
        chosen = [hidden[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        selected = torch.cat(chosen, dim=-1)
        if config.vision_feature_select_strategy == "default":
            selected = selected[:, 1:]
        projected_NJD = inner.multi_modal_projector(selected)
        newline = inner.image_newline.to(projected_NJD.dtype).expand(len(projected_NJD), 1, -1)
        return torch.cat([projected_NJD, newline], dim=1).flatten(0, 1), []


class QwenVL(Family):
    extended = True

    def features(self, model: Any, pixels_NCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        vision = model.config.vision_config
        patches, grid_N3 = patchify(
            pixels_NCHW, vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
        )
        found = model.model.get_image_features(patches, grid_N3, return_dict=True)
        deep = getattr(found, "deepstack_features", None) or []
        return torch.cat(list(found.pooler_output), dim=0), [torch.cat(list(part), dim=0) for part in deep]

    def positions(self, model: Any, batch: Batch) -> Tensor:
        grid_N3 = None
        if batch.pixels_NCHW is not None and len(batch.pixels_NCHW):
            count, _, height, width = batch.pixels_NCHW.shape
            patch = model.config.vision_config.patch_size
            grid_N3 = torch.tensor([[1, height // patch, width // patch]]).expand(count, -1)
        position_3BT, _ = model.model.get_rope_index(
            batch.input_ids_BT,
            mm_token_type_ids=batch.image_BT.int(),
            image_grid_thw=grid_N3,
            attention_mask=batch.attention_mask_BT,
        )
        return position_3BT.movedim(0, -1)

    def side(self, model: Any) -> int:
        vision = model.config.vision_config
        return int(vision.patch_size * vision.spatial_merge_size)  # the smallest grid there is

    def channels(self, model: Any) -> int:
        return int(model.config.vision_config.in_channels)


class Smol(Family):
    def decoder(self, model: Any) -> Any:
        return model.model.text_model

    def features(self, model: Any, pixels_NCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        # not through get_image_features: it takes an all-black image for padding and drops it
        inner, patch = model.model, model.config.vision_config.patch_size
        count, _, height, width = pixels_NCHW.shape
        seen = torch.ones(count, height // patch, width // patch, dtype=torch.bool, device=pixels_NCHW.device)
        hidden = inner.vision_model(pixel_values=pixels_NCHW, patch_attention_mask=seen).last_hidden_state
        return inner.connector(hidden).flatten(0, 1), []


def patchify(pixels_NCHW: Tensor, patch: int, frames: int, merge: int) -> tuple[Tensor, Tensor]:
    """Square images -> the flattened patches Qwen-VL's towers take: patches that are merged later lie together.

    Args:
        frames: an image is repeated to so many video frames.

    Returns:
        (patches of [N * grid * grid, C * frames * P * P], grid_N3 of time, height and width in patches).
    """
    count, channels, height, width = pixels_NCHW.shape
    rows, columns = height // patch, width // patch
    split = pixels_NCHW.reshape(count, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    ordered = split.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    patches = ordered.expand(*ordered.shape[:6], frames, patch, patch)
    grid = torch.tensor([[1, rows, columns]], device=pixels_NCHW.device).expand(count, -1)
    return patches.reshape(count * rows * columns, channels * frames * patch * patch), grid


FAMILIES: dict[str, Family] = {
    "llava": Family(),
    "llava_onevision": Onevision(),
    "qwen2_vl": QwenVL(),
    "qwen2_5_vl": QwenVL(),
    "qwen3_vl": QwenVL(),
    "smolvlm": Smol(),
    "idefics3": Smol(),
}


def family(model: nn.Module) -> Family:
    """Raises CheckpointError for a class that is not known here."""
    kind = str(model.config.model_type)
    if kind not in FAMILIES:
        raise CheckpointError(f"{kind!r} models cannot be distilled here; known: {', '.join(FAMILIES)}")
    return FAMILIES[kind]
