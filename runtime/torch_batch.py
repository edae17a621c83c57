"""Greedy answers to several prompts at once with a PyTorch decoder: padded on the left, one cache for all rows.

Shape legend: B = prompts, L = longest prompt, T = visual tokens, D = hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.api import Prompt


def greedy(
    torch: Any,
    model: Any,
    prompts: Sequence[Prompt],
    embeds: Sequence[Sequence[Any]],
    limits: Sequence[int],
    end_ids: Sequence[int],
) -> list[list[int]]:
    """Tokens per prompt until its end token or limit.

    Args:
        embeds: per prompt one embeds_TD per image.
    """
    from transformers import DynamicCache

    table = model.get_input_embeddings()
    device = table.weight.device
    longest = max(len(prompt.ids) for prompt in prompts)
    pads = [longest - len(prompt.ids) for prompt in prompts]
    ids_BL = torch.tensor([[0] * pad + list(p.ids) for pad, p in zip(pads, prompts, strict=True)], device=device)
    embeds_BLD = table(ids_BL)
    for row, (prompt, pad, images) in enumerate(zip(prompts, pads, embeds, strict=True)):
        for image, embeds_TD in zip(prompt.images, images, strict=True):
            embeds_BLD[row, pad + image.start : pad + image.start + len(embeds_TD)] = embeds_TD
    mask_BL = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)
    positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config.get_text_config())
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    while True:
        hidden_BLD = model.model.language_model(
            inputs_embeds=embeds_BLD,
            attention_mask=mask_BL,
            position_ids=positions_BL,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        ids_B = model.lm_head(hidden_BLD[:, -1]).argmax(dim=-1)
        for row, token_id in enumerate(ids_B.tolist()):
            if row in running:
                answers[row].append(token_id)
                if token_id in end_ids or len(answers[row]) == limits[row]:
                    running.discard(row)
        if not running:
            return answers
        embeds_BLD = table(ids_B[:, None])
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(prompts), 1)], dim=1)
        positions_BL = positions_BL[:, -1:] + 1
