"""Greedy decoding of a batch by the training model itself: what a reasoning's conclusion is scored by.

Shape legend: B = batch, T = tokens, P = prompt tokens, V = vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from distill import access
from distill.batch import Batch
from distill.families import family
from distill.ribbon import for_decoder
from vlm.errors import UserError

# a reasoning may take some more tokens than the reference's
SLACK = 1.25, 8


def prompts(batch: Batch) -> Batch:
    """What stands before the first response token of each sample, padded on the left."""
    length_B = batch.response_BT.long().argmax(dim=1)
    first_B = batch.attention_mask_BT.long().argmax(dim=1)
    width = int((length_B - first_B).max())
    index_P = torch.arange(width, device=length_B.device)
    at_BP = length_B[:, None] - width + index_P
    real_BP = at_BP >= first_B[:, None]
    at_BP = at_BP.clamp(min=0)

    def take(value_BT: Tensor) -> Tensor:
        return value_BT.gather(1, at_BP) * real_BP.to(value_BT.dtype)

    return replace(
        batch,
        input_ids_BT=batch.input_ids_BT.gather(1, at_BP),
        attention_mask_BT=take(batch.attention_mask_BT),
        image_BT=take(batch.image_BT.long()).bool(),
        instruction_BT=take(batch.instruction_BT.long()).bool(),
        response_BT=torch.zeros_like(real_BP),
        token_weight_BT=None,
        step_BT=None,
        packing=None,
    )


def refuse(model: nn.Module) -> None:
    """Raises UserError for a class whose answers `greedy` cannot decode, before anything is trained."""
    if family(model).extended:
        raise UserError(
            f"answers with a reasoning cannot be decoded from {type(model).__name__} (several position ids a token or deep "
            "features); take a LLaVA student"
        )


@torch.no_grad()
def greedy(model: nn.Module, batch: Batch, limit: int, stop_B: Tensor) -> Tensor:
    """ids_BT of the likeliest continuation of each prompt, at most `limit` tokens; after `stop_B` only that token.

    Args:
        batch: see `prompts`.
        stop_B: the token that ends each sample.

    Raises:
        UserError: a class with several position ids a token or deep features.
    """
    refuse(model)
    decoder, head = access.decoder(model), access.head(model)
    taken = access.inputs(model, batch)
    mask_BT, position_BT = batch.attention_mask_BT, taken.position_BT
    output = decoder(
        inputs_embeds=taken.embeds_BTD,
        attention_mask=mask_BT,
        position_ids=for_decoder(position_BT),
        use_cache=True,
    )
    at_B1 = position_BT[:, -1:]
    found: list[Tensor] = []
    done_B = torch.zeros_like(stop_B, dtype=torch.bool)
    for _ in range(limit):
        next_B = head.logits(output.last_hidden_state[:, -1]).argmax(dim=-1)
        next_B = torch.where(done_B, stop_B, next_B)
        found.append(next_B)
        done_B = done_B | (next_B == stop_B)
        if done_B.all():
            break
        at_B1 = at_B1 + 1
        mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
        output = decoder(
            inputs_embeds=decoder.get_input_embeddings()(next_B[:, None]),
            attention_mask=mask_BT,
            position_ids=at_B1,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    return torch.stack(found, dim=1)


def concludes(model: nn.Module, batch: Batch) -> list[bool]:
    """Per sample: does greedy decoding from the prompt end with the reference's conclusion, token for token?

    Args:
        batch: with `step_BT`; the conclusion is what follows the last step.
    """
    assert batch.step_BT is not None
    wanted: list[list[int]] = []
    for b in range(len(batch.input_ids_BT)):
        place = batch.response_BT[b].nonzero()[:, 0]
        inside = place[batch.step_BT[b, place] > 0]
        after = place[place > (inside[-1] if len(inside) else -1)]
        wanted.append(batch.input_ids_BT[b, after].tolist())
    longest = int(batch.response_BT.sum(dim=1).max())
    stop_B = torch.tensor([ids[-1] for ids in wanted], device=batch.input_ids_BT.device)
    said = greedy(model, prompts(batch), int(longest * SLACK[0]) + SLACK[1], stop_B).tolist()
    found = []
    for ids, end in zip(said, wanted, strict=True):
        whole = ids[: ids.index(end[-1]) + 1] if end[-1] in ids else ids
        found.append(whole[-len(end) :] == end)
    return found
