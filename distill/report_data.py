"""What a report needs beside the run's own files: answers on a few samples, data in figures, the machine.

It is measured once, at the end of training, and kept in OUT/report.json; drawing the report again reads it back.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import importlib.metadata
import io
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from distill import access
from distill.check_parts import data_figures
from distill.config import TrainConfig
from distill.data import Collator, Example, Examples, at_hand, to_batch
from distill.placement import computes_on, student_device
from distill.ribbon import for_decoder
from distill.stages import starting_from
from vlm import chat, preprocess
from vlm.errors import CheckpointError
from vlm.files import read_json, write_atomic

if TYPE_CHECKING:
    from distill.train import Run

FACTS = "report.json"
SHOWN = 8
MOST_TOKENS = 96
DRAWN = 200


def collect(out: Path, config: TrainConfig, shown: int = SHOWN) -> dict[str, Any]:
    """Answer `shown` samples with the student as it was saved and with its teacher, and write OUT/report.json.

    Raises:
        UserError: student, teacher or data are not where they were.
    """
    from distill.train import load_run

    gc.collect()
    run = load_run(starting_from(config, out / "student", plain=True))
    run.student.to(student_device())
    examples, split = _held_out(run)
    chosen = evenly(examples, shown)
    stored = {}
    with contextlib.suppress(CheckpointError):  # cut by a kill, or not there
        stored = read_json(out / FACTS)
    facts = {
        "environment": stored.get("environment") or environment(),  # the machine that trained
        "data": _data_facts(run, config.seed),
        "split": split,
        "samples": answers(run, chosen) if chosen else [],
    }
    write_atomic(out / FACTS, json.dumps(facts, ensure_ascii=False) + "\n")
    return facts


def _held_out(run: Run) -> tuple[Examples, str]:
    for name in ("test", "validation"):
        examples = getattr(run.data, name)
        if examples is not None:
            return examples, name
    return run.data.train, "training"


def evenly(examples: Examples, count: int) -> list[Example]:
    """At most `count` examples, evenly spread over those at hand."""
    within = at_hand(examples)
    count = min(count, within)
    return [examples[i * within // count] for i in range(count)]


def _data_facts(run: Run, seed: int) -> dict[str, Any]:
    train = run.data.train
    order = np.random.default_rng(seed).permutation(at_hand(train))[:DRAWN]
    drawn = [train[int(i)] for i in order]
    counted = getattr(train, "lengths", None)
    lengths = [len(example.ids) for example in drawn] if counted is None else counted.tolist()
    return {**run.data.description, "figures": data_figures(train, drawn, lengths).to_json()}


def answers(run: Run, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Question, reference and both models' greedy answers to each sample's first question, with a thumbnail."""
    tokenizer, image = run.student_source.tokenizer, run.student_source.image
    collate = Collator(tokenizer.spec.pad_token_id)
    found = []
    for example in examples:
        start = example.spans.index("response")
        ends = (i for i, span in enumerate(example.spans) if i >= start and span != "response")
        end = next(ends, len(example.spans))
        asked = [
            token for token, span in zip(example.ids[:start], example.spans, strict=False) if span == "instruction"
        ]
        prompt = example.cut(start)
        limit = min(MOST_TOKENS, 2 * (end - start) + 8)
        value = {
            "question": tokenizer.decode(asked).strip(),
            "reference": tokenizer.decode(example.ids[start:end]).strip(),
            "image": thumbnail(example.pixels[0], image) if example.pixels else None,
            "student": answer(run.student, prompt, tokenizer, collate, limit),
        }
        if run.teacher is not None:
            value["teacher"] = answer(run.teacher, prompt, tokenizer, collate, limit)
        found.append(value)
    return found


@torch.no_grad()
def answer(model: nn.Module, prompt: Example, tokenizer: chat.ChatTokenizer, collate: Collator, limit: int) -> str:
    """Greedy answer to a prompt, at most `limit` tokens, through the same forward pass that training uses."""
    was_training = model.training
    model.eval()
    device = computes_on(model)
    batch = to_batch({name: value.to(device) for name, value in collate([prompt]).items()})
    gold = access.gold_pass(model, batch, keep_cache=True)
    decoder, head = access.decoder(model), access.head(model)
    hidden_BD, cache, ids = gold.hidden_BTD[:, -1], gold.cache, list[int]()
    while len(ids) < limit:
        token = head.logits(hidden_BD).argmax(dim=-1)
        if int(token) in tokenizer.spec.eos_token_ids:
            break
        ids.append(int(token))
        place = for_decoder(gold.inputs.position_BT[:, -1:] + len(ids))
        embeds = decoder.get_input_embeddings()(token[:, None])
        mask = torch.ones((1, len(prompt.ids) + len(ids)), dtype=torch.long, device=device)
        output = decoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True
        )
        hidden_BD, cache = output.last_hidden_state[:, -1], output.past_key_values
    model.train(was_training)
    return tokenizer.decode(ids).strip() + ("" if len(ids) < limit else " …")


def thumbnail(pixels_CHW: preprocess.Pixels, spec: preprocess.ImageSpec, side: int = 96) -> str:
    """What the model saw, as a data URL."""
    from PIL import Image

    mean, std = np.array(spec.mean)[:, None, None], np.array(spec.std)[:, None, None]
    bytes_HWC = ((pixels_CHW * std + mean).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    image = Image.fromarray(bytes_HWC)
    # a small picture is shown as it is, enlarged by the page
    image.thumbnail((2 * side, 2 * side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def environment() -> dict[str, str]:
    """The machine and the libraries, for whoever wants to repeat the run."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        device = f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
    processes = os.environ.get("WORLD_SIZE", "1")
    return {
        "device": device,
        "processes": processes,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }
