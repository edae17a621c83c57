"""Seconds and memory of an Align-TI step against a vanilla KD step (SFT + KD), same models, same batch, in turns.

Random weights at realistic shapes: SigLIP-base tower with 196 visual tokens, Qwen2 student of hidden size 896 and teacher
of hidden size 1536, each cut to a sixth of its layers unless told otherwise. Candidates are drawn from the student, so
their number depends on how sure it is: the heads are scaled to a mean entropy of `--entropy` nats a response token (a
trained VLM student's cross-entropy is about 1), and the response is sampled from the student itself.

    python -m benchmarks.distill_step --rounds 12 --out benchmarks/results/distill_step-cpu.json
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Result, compare, finish, in_turns, parser, peak_total_bytes
from distill import access, ribbon
from distill.batch import Batch, Normaliser
from distill.config import OBJECTIVES, Align, LossWeights
from distill.objective import Objective
from distill.teacher import LiveTeacher
from vlm import allocator

INSTRUCTION_TOKENS, VISUAL_TOKENS = 32, 196
# freed memory is kept and takes some steps to settle
MEMORY_STEPS = 4
WARMUP = 4


@dataclass(frozen=True)
class Decoder:
    """Sizes of a Qwen2 decoder."""

    hidden: int
    layers: int
    heads: int
    intermediate: int


SIZES = {
    "0.5B": Decoder(896, 24, 14, 4864),
    "1.5B": Decoder(1536, 28, 12, 8960),
    "7B": Decoder(3584, 28, 28, 18944),
}


def build(size: str, layers: int, vocabulary: int, seed: int, device: str, dtype: torch.dtype) -> nn.Module:
    """A LLaVA model of the given decoder size with a SigLIP-base tower and random weights."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

    torch.manual_seed(seed)
    shape = SIZES[size]
    text = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=4 if size == "7B" else 2,
        intermediate_size=shape.intermediate,
        tie_word_embeddings=False,
    )
    vision = SiglipVisionConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        image_size=224,
        patch_size=16,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=vocabulary - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    config._attn_implementation = "sdpa"
    with torch.device(device):
        model = LlavaForConditionalGeneration(config)
    return model.to(dtype)


@torch.no_grad()
def make_batch(student: nn.Module, size: int, response: int, entropy: float, seed: int) -> tuple[Batch, float]:
    """A batch whose responses the student sampled itself, and the entropy of its heads after scaling them to `entropy`."""
    device = student.device
    random = torch.Generator().manual_seed(seed)
    vocabulary = int(student.config.text_config.vocab_size)
    prompt = VISUAL_TOKENS + INSTRUCTION_TOKENS
    ids_BT = torch.randint(0, vocabulary - 1, (size, prompt + response), generator=random).to(device)
    ids_BT[:, 4 : 4 + VISUAL_TOKENS] = access.image_token(student)
    shape = ids_BT.shape
    image_BT = ids_BT == access.image_token(student)
    place_T = torch.arange(shape[1], device=device)
    response_BT = (place_T >= prompt).expand(shape)
    batch = Batch(
        ids_BT,
        torch.ones_like(ids_BT),
        image_BT,
        ~image_BT & ~response_BT & (place_T >= 4),
        response_BT,
        torch.randn(size, 3, 224, 224, generator=random).to(device),
    )
    scale_head(student, batch, entropy)
    torch.manual_seed(seed)
    tokens = student.generate(
        input_ids=ids_BT[:, :prompt],
        attention_mask=torch.ones_like(ids_BT[:, :prompt]),
        pixel_values=batch.pixels_NCHW.to(student.dtype) if batch.pixels_NCHW is not None else None,
        do_sample=True,
        top_k=0,
        max_new_tokens=response,
        min_new_tokens=response,
        suppress_tokens=[access.image_token(student)],
    )
    batch = dataclasses.replace(batch, input_ids_BT=tokens)
    return batch, float(ribbon.entropy(response_logits(student, batch)).mean())


def response_logits(model: nn.Module, batch: Batch) -> Tensor:
    sample_N, place_N = batch.response_places()
    pixels = batch.pixels_NCHW
    typed = dataclasses.replace(batch, pixels_NCHW=None if pixels is None else pixels.to(model.dtype))
    hidden = access.gold_pass(model, typed, keep_cache=False).hidden_BTD[sample_N, place_N - 1]
    return access.head(model).logits(hidden).float()


def scale_head(model: nn.Module, batch: Batch, entropy: float) -> None:
    """Scale the head so that the mean entropy of the response positions is `entropy` nats."""
    logits = response_logits(model, batch)
    low, high = 0.1, 1000.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        if float(ribbon.entropy(logits * middle).mean()) > entropy:
            low = middle
        else:
            high = middle
    model.lm_head.weight.mul_(low)


def stepper(objective: Objective, student: nn.Module, batch: Batch, autocast: bool) -> Callable[[], Any]:
    """One optimiser step as the trainer takes it."""
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.0, fused=True)
    normaliser, kind = Normaliser.of(batch), batch.input_ids_BT.device.type
    turn = [0]

    def step() -> None:
        turn[0] += 1
        seeds = [turn[0] * 1000 + row for row in range(len(batch.input_ids_BT))]
        with torch.autocast(kind, torch.bfloat16, enabled=autocast):
            loss, _ = objective(student, batch, normaliser, seeds)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def options() -> argparse.ArgumentParser:
    made = parser(__doc__ or "")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--student", default="0.5B", choices=SIZES)
    made.add_argument("--teacher", default="1.5B", choices=SIZES)
    made.add_argument("--student-layers", type=int, default=4, help="0 keeps all")
    made.add_argument("--teacher-layers", type=int, default=5, help="0 keeps all")
    made.add_argument("--vocabulary", type=int, default=151936)
    made.add_argument("--batch", type=int, default=2)
    made.add_argument("--response", type=int, default=64, help="response tokens a sample")
    made.add_argument("--entropy", type=float, default=1.0, help="nats a response token")
    made.add_argument("--bf16", action="store_true", help="bfloat16 autocast and teacher")
    made.add_argument("--freeze-vision", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--memory-rounds", type=int, default=3, help="0 measures none")
    made.add_argument("--clock", choices=["wall", "process"], default="wall", help="process: processor seconds")
    made.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="kd is always needed")
    return made


VARIANTS = {
    "kd": ("kd", Align()),
    "align-ti": ("align-ti", Align()),
    "kd+iva": ("kd+iva", Align()),
    "kd+tpa": ("kd+tpa", Align()),
    "every position": ("align-ti", Align(tpa_share=1.0)),
    "every position, every visual token": ("align-ti", Align(tpa_share=1.0, iva_rows=0)),
    "distinct candidates, every position, every visual token": (
        "align-ti",
        Align(tpa_share=1.0, iva_rows=0, sampling="distinct"),
    ),
}


def plan(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The steps to be measured, over one student, one teacher and one batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        allocator.keep_freed()  # as training does
    student = build(args.student, args.student_layers, args.vocabulary, 0, device, torch.float32)
    teacher_type = torch.bfloat16 if args.bf16 else torch.float32
    teacher = build(args.teacher, args.teacher_layers, args.vocabulary, 1, device, teacher_type).eval()
    teacher.requires_grad_(False)
    batch, entropy = make_batch(student.eval(), args.batch, args.response, args.entropy, seed=2)
    print(f"mean entropy {entropy:.3f} nats a response token")
    with torch.no_grad():
        scale_head(teacher, batch, args.entropy)
    student.train().model.vision_tower.requires_grad_(not args.freeze_vision)
    steps = {}
    for name in args.variants:
        terms, align = OBJECTIVES[VARIANTS[name][0]], VARIANTS[name][1]
        objective = Objective(terms, LossWeights(), align, LiveTeacher(teacher, align), args.vocabulary)
        steps[name] = stepper(objective, student, batch, args.bf16)
    return steps


def main() -> None:
    args = options().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    steps = plan(args)
    clock = time.process_time if args.clock == "process" else time.perf_counter
    seconds = in_turns(steps, args.rounds, warmup=WARMUP, clock=clock)
    memory: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.memory_rounds):
        for name, step in steps.items():
            allocator.give_back()  # what the other side left
            memory[name].append(max(peak_total_bytes(step) for _ in range(MEMORY_STEPS)) / 2**30)
    results: list[Result] = []
    for name in [n for n in steps if n != "kd"]:
        results.append(compare(f"step time: {name} / kd", seconds[name], seconds["kd"], "s"))
        if args.memory_rounds:
            results.append(compare(f"peak memory: {name} / kd", memory[name], memory["kd"], "GiB"))
    finish(results, {k: v for k, v in vars(args).items() if k != "out"}, args.out)


if __name__ == "__main__":
    main()
