"""What PyTorch says: the Hugging Face model itself, unmodified, as the truth every format is held against."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from export.replay import F32, Prompt
from export.student import Student
from vlm.preprocess import pixels

# tokens of a batch, and prompts: what a layer makes of them is held at once
TOKENS, BATCH = 4096, 50


class TorchBackend:
    """`export.replay.Backend` over the student in float32."""

    def __init__(self, student: Student) -> None:
        self.student, self.model = student, student.model
        self.cache: Any = None

    def _pixels(self, images: Sequence[Image.Image]) -> Any:
        import torch

        return torch.from_numpy(np.stack([pixels(image, self.student.checkpoint.image) for image in images]))

    def features(self, image: Image.Image) -> F32:
        import torch

        with torch.no_grad():
            outputs = self.model.get_image_features(pixel_values=self._pixels([image]), return_dict=True)
        return np.asarray(outputs.pooler_output[0].numpy(), np.float32)

    def prefill(self, prompt: Prompt) -> F32:
        return self.prefill_all(prompt, keep=1)[-1]

    def prefill_all(self, prompt: Prompt, keep: int = 0) -> F32:
        """Logits of the last `keep` prompt positions (0: all), [positions, vocab]."""
        import torch

        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            outputs = self.model(
                input_ids=ids, pixel_values=self._pixels([prompt.image]), use_cache=True, logits_to_keep=keep
            )
        self.cache = outputs.past_key_values
        return np.asarray(outputs.logits[0].numpy(), np.float32)

    def step(self, token: int) -> F32:
        import torch

        with torch.no_grad():
            outputs = self.model(input_ids=torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)
        return np.asarray(outputs.logits[0, -1].numpy(), np.float32)

    def close(self) -> None:
        self.cache = None


def greedy_batch(student: Student, prompts: Sequence[Prompt], stop: Sequence[int], limit: int) -> list[tuple[int, ...]]:
    """Greedy continuations like `export.replay.greedy`; prompts of equal length share a batch, so nothing is padded."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[len(prompt.ids)].append(index)
    answers: list[tuple[int, ...]] = [()] * len(prompts)
    for length, members in groups.items():
        step = max(1, min(BATCH, TOKENS // length))
        for start in range(0, len(members), step):
            part = members[start : start + step]
            for index, ids in zip(part, _equal_lengths(student, [prompts[i] for i in part], stop, limit), strict=True):
                answers[index] = ids
    return answers


def greedy_padded(student: Student, prompts: Sequence[Prompt], steps: int) -> list[tuple[int, ...]]:
    """`steps` greedy tokens after each prompt, stop tokens or not; all prompts in one left-padded batch."""
    import torch

    length, pad = max(len(p.ids) for p in prompts), student.checkpoint.tokenizer.spec.pad_token_id
    ids = torch.tensor([(pad,) * (length - len(p.ids)) + p.ids for p in prompts])
    mask = torch.tensor([[0] * (length - len(p.ids)) + [1] * len(p.ids) for p in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    feed: dict[str, Any] = {
        "input_ids": ids,
        "pixel_values": TorchBackend(student)._pixels([p.image for p in prompts]),
    }
    said: list[Any] = []
    with torch.no_grad():
        while True:
            outputs = student.model(
                **feed, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
            )
            said.append(outputs.logits[:, -1].argmax(-1))
            if len(said) == steps:
                return [tuple(row) for row in torch.stack(said, dim=1).tolist()]
            feed = {"input_ids": said[-1][:, None], "past_key_values": outputs.past_key_values}
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = positions[:, -1:] + 1


def _equal_lengths(student: Student, prompts: list[Prompt], stop: Sequence[int], limit: int) -> list[tuple[int, ...]]:
    import torch

    backend = TorchBackend(student)
    feed: dict[str, Any] = {
        "input_ids": torch.tensor([p.ids for p in prompts]),
        "pixel_values": backend._pixels([p.image for p in prompts]),
    }
    done = [False] * len(prompts)
    ids: list[list[int]] = [[] for _ in prompts]
    with torch.no_grad():
        for _ in range(limit):
            outputs = student.model(**feed, use_cache=True, logits_to_keep=1)
            tokens = outputs.logits[:, -1].argmax(-1)
            for row, token in enumerate(tokens.tolist()):
                if not done[row]:
                    ids[row].append(token)
                    done[row] = token in stop
            if all(done):
                break
            feed = {"input_ids": tokens[:, None], "past_key_values": outputs.past_key_values}
    return [tuple(row) for row in ids]
