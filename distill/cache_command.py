"""`python -m distill cache`: run the teacher over the training data once and keep what it says."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distill.cli import AS_JSON, Extra, parse
from distill.config import NEW_RUN, TrainConfig
from distill.stages import standing_in
from vlm.console import note, print_json
from vlm.errors import UserError

if TYPE_CHECKING:
    from distill.cache_build import CacheOptions
    from distill.cache_verify import Verified

HELP = """usage: python -m distill cache [the options of train] --out DIR [options]

Run the teacher over the training data once and keep what it says of every sample, found again by the sample's content.
`python -m distill train ... --teacher_cache DIR` then trains without the teacher's weights. Stopped in any way, the same
command goes on; more data can be added to the same folder. Held-out samples that training scores are cached too.

  --out DIR           the cache
  --top_k K           likeliest tokens kept of a response row [64]
  --tail S            unbiased draws from the rest [12]
  --visual_top_k K    the same of a row at a visual token [16]
  --visual_tail S     [8]
  --min_prob P        likeliest tokens below this are left to the draws [1e-4]
  --visual_share X    visual tokens with the largest IVA weights, until they hold this share of it; 1 takes all and 0
                      none, for objectives without iva [1]
  --all_logits        keep hidden states and the output head instead: every logit exactly, more bytes, any temperature
  --candidates N      tokens a response position for L_tpa, drawn from the teacher without the gold token, and what the
                      teacher says after each. A deviation from Align-TI, which draws them anew from the student at
                      every step; a live teacher does that [0]
  --shard I/N         every N-th sample from the I-th on (0 to N-1); under torchrun it is the process's rank
  --batch_size B      samples a forward pass; with --streaming as in training: steps x batch_size x accumulate samples of the
                      stream are stored, and for N processes give N times the accumulate
  --verify N          then train N steps with the live teacher, comparing both losses of the same student at every step,
                      and N steps from the cache; exit code 1 where a loss leaves its bound [0]
  --dry_run           say how large the cache will be and how exact, write nothing
  --json              print the result as one JSON line at the end

Of the options of train these decide what is stored: teacher, teacher_device, teacher_dtype, teacher_load, student (for
the vocabulary both share and the measured error), the data, align.temperature, align.iva_layer (-1: by IRS), and an
objective with lavit, for which the teacher's gaze and image semantics are stored too.

examples:
  python -m distill cache --preset digits --out caches/digits
  python -m distill cache --teacher DIR --student DIR --data train.json --images images/ --teacher_dtype bfloat16 \\
                          --out caches/mine
  torchrun --nproc_per_node 4 -m distill cache --recipe paper --teacher DIR --student DIR --data train.json --out C
  python -m distill train --teacher_cache caches/mine --student DIR --data train.json --objective kd+iva --out runs/mine
"""
EXTRAS = (
    AS_JSON,
    Extra("top_k", int, 64, "likeliest tokens kept of a response row"),
    Extra("tail", int, 12, "draws from the rest"),
    Extra("visual_top_k", int, 16, "likeliest tokens kept of a visual row"),
    Extra("visual_tail", int, 8, "draws from the rest of a visual row"),
    Extra("min_prob", float, 1e-4, "likeliest tokens below this are left to the draws"),
    Extra("visual_share", float, 1.0, "share of the IVA weight whose rows are kept"),
    Extra("all_logits", bool, False, "keep hidden states and the head"),
    Extra("candidates", int, 0, "fixed candidates a response position"),
    Extra("shard", str, "", "I/N"),
    Extra("verify", int, 0, "steps to compare with a live run"),
    Extra("dry_run", bool, False, "write nothing"),
)


def main(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(HELP, end="")
        return 0
    request = parse(list(argv), "cache", EXTRAS)
    extra = request.extra
    configs = [stage.config for stage in request.stages]
    # stages share the cache: what one of them needs is stored for all
    watching = next((config for config in configs if config.watches), configs[0])
    options, shard = _options(extra, watching), _shard(str(extra["shard"]))
    for config in configs:
        _refuse(config)
    if configs[0].out == NEW_RUN:
        raise UserError("name the folder of the cache with --out DIR")
    if extra["verify"] < 0 or (extra["verify"] and extra["dry_run"]):
        raise UserError(f"--verify {extra['verify']}: a number of steps from 1 on, of a cache that is written")
    from distill.__main__ import quiet
    from distill.cache_run import build
    from distill.cache_verify import verify

    quiet()
    results: list[dict[str, Any]] = []
    verified: list[Verified] = []
    done: set[str] = set()
    for number, stage in enumerate(request.stages):
        if number:
            stage = dataclasses.replace(stage, config=standing_in(stage.config, configs[0]))
        where = f"stage {stage.name}: " if stage.name else ""
        if request.staged and not stage.config.needs_teacher:
            note(f"{where}{stage.config.objective} needs no teacher")
            continue
        try:
            result = build(stage.config, options, shard, bool(extra["dry_run"]))
        except KeyboardInterrupt:
            note(f"stopped; what was done is kept in {stage.config.out}, run the same command again to go on")
            raise
        if result.text not in done:
            print(f"{where}{result.text}")
        done.add(result.text)
        results.append(result.to_json())
        if extra["verify"]:
            verified.append(verify(stage.config, stage.config.out, extra["verify"]))
            print(verified[-1].text)
            results[-1]["verified"] = verified[-1].to_json()
    if extra["json"]:
        print_json(results[0] if len(results) == 1 else {"stages": results})
    for found in verified:
        found.refuse_misses()
    return 0


def _options(extra: dict[str, Any], config: TrainConfig) -> CacheOptions:
    from distill.cache_build import CacheOptions
    from distill.cache_codec import Compression

    smallest = float(extra["min_prob"])
    return CacheOptions(
        Compression(extra["top_k"], extra["tail"], smallest),
        Compression(extra["visual_top_k"], extra["visual_tail"], smallest),
        extra["visual_share"],
        extra["all_logits"],
        extra["candidates"],
        *((config.lavit.keep, config.lavit.layers) if config.watches else ()),
    )


def _shard(text: str) -> tuple[int, int]:
    """(index, count) from --shard, else from torchrun's environment."""
    if not text:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard is I/N with I from 0 to N-1, got {text!r}")
    return int(index), int(count)


def _refuse(config: TrainConfig) -> None:
    if config.resume:
        raise UserError("a cache goes on by itself: run the same command without --resume")
    if config.teacher_cache is not None:
        raise UserError("a cache is made from a live teacher; drop --teacher_cache")
    if config.teacher is None and config.preset == "none":
        raise UserError("no teacher to ask; pass --teacher DIR or --preset digits")
