"""Tiny students that know something: briefly trained, so that their first choice has a margin as a trained model's has.

The logits of a random student have none: its two likeliest tokens are near ties at most steps, and rounding to 4 bits
turns half of them, whatever the exporter does. `memorise` teaches the successor of every token under one of two random
permutations of the vocabulary; which one the picture says (digits or noise). Any prompt, forced or greedy continuation
is then on known ground, and a student that does not look at the picture answers from the wrong permutation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from export.evidence import golden_prompts
from export.questions import digit_questions
from export.replay import Prompt, make_prompt
from tests.tiny import make_student
from vlm import digits
from vlm.load import Checkpoint, load_model, open_checkpoint
from vlm.preprocess import pixels

if TYPE_CHECKING:
    from torch import Tensor

STEPS, BATCH, RATE, TAIL = 200, 4, 3e-3, 48
DIGITS, NOISES = 24, 8
SMALL = {"hidden": 128, "head_dim": 32, "intermediate": 256}


def make_memorised(directory: Path, seed: int = 0, steps: int = STEPS, **sizes: Any) -> Path:
    """Write a student with the given Shape fields, trained for `steps`; its tower stays random."""
    import torch

    make_student(directory, seed, spread=1.0, **{**SMALL, **sizes})
    checkpoint = open_checkpoint(directory)
    model = load_model(checkpoint)
    model.model.vision_tower.requires_grad_(False)
    lessons = Lessons.draw(checkpoint, int(model.config.text_config.vocab_size), seed)
    kept = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(kept, RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps, pct_start=0.15)
    for _ in range(steps):
        ids, wanted, images = lessons.batch()
        logits = model(input_ids=ids, pixel_values=images).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100).backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    generation = (directory / "generation_config.json").read_text()
    model.save_pretrained(directory)
    (directory / "generation_config.json").write_text(generation)
    return directory


@dataclass(frozen=True)
class Lessons:
    """Prompts about digits and noise, each followed by random tokens or by a chain of successors from anywhere.

    Attributes:
        successors: [2, vocabulary] the token after each, with a picture of digits and with noise.
    """

    prompts: tuple[Prompt, ...]
    images: Tensor
    successors: npt.NDArray[np.int64]
    plain: npt.NDArray[np.int64]
    image_id: int
    rng: np.random.Generator

    @classmethod
    def draw(cls, checkpoint: Checkpoint, vocabulary: int, seed: int) -> Lessons:
        import torch

        rng, tokenizer = np.random.default_rng(seed), checkpoint.tokenizer
        asked = [make_prompt(tokenizer, q.image(), q.text) for q in digit_questions("test", DIGITS, seed)]
        words = f"Describe {' '.join(digits.PLACES)} and everything in between, slowly."
        noise = [Image.fromarray(rng.integers(0, 256, (57, 91, 3), dtype=np.uint8)) for _ in range(NOISES)]
        asked += [*golden_prompts(tokenizer), *(make_prompt(tokenizer, image, words) for image in noise)]
        count = tokenizer.tokenizer.get_vocab_size()
        plain = np.array([i for i in range(count) if i not in tokenizer.special_ids])
        successors = rng.choice(plain, (2, vocabulary))
        for row in successors:  # one cycle: no chain ends in a stop token
            order = rng.permutation(plain)
            row[order] = np.roll(order, -1)
        images = torch.from_numpy(np.stack([pixels(p.image, checkpoint.image) for p in asked]))
        return cls(tuple(asked), images, successors, plain, tokenizer.spec.image_token_id, rng)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [B,S], the token wanted after each (-100 where there is none), and the pictures."""
        import torch

        half = BATCH // 2
        first_noise = len(self.prompts) - NOISES
        chosen = [*self.rng.choice(first_noise, BATCH - half), *(first_noise + self.rng.choice(NOISES, half))]
        rows = [self._sequence(index, index >= first_noise) for index in chosen]
        ids = np.zeros((BATCH, max(len(r) for r, _ in rows)), np.int64)
        wanted = np.full_like(ids, -100)
        for i, (row, target) in enumerate(rows):
            ids[i, : len(row)], wanted[i, : len(row)] = row, target
        return torch.from_numpy(ids), torch.from_numpy(wanted), self.images[chosen]

    def _sequence(self, index: int, noise: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        following, ids = self.successors[int(noise)], list(self.prompts[index].ids)
        random = self.rng.random() < 0.5
        ids.append(int(self.rng.choice(self.plain)))
        for _ in range(TAIL - 1):
            ids.append(int(self.rng.choice(self.plain) if random else following[ids[-1]]))
        row = np.array(ids)
        start = int(np.argmax(row == self.image_id))
        # before the picture nobody can know which of the two is meant
        return row, np.where(np.arange(len(row)) < start, self.successors[0][row], following[row])


def margins(logits_SV: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """How far the first choice leads the second per unit of the logits' spread, per row; sorted logits do as well."""
    two = -np.sort(-logits_SV, axis=1)[:, :2]
    result: npt.NDArray[np.float32] = two[:, 0] - two[:, 1]
    return result
