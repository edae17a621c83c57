"""Collect PyTorch's side once per export: parity cases, the golden sample, the evaluation answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from export.parity import STEPS, Case, Expected, Gate, compare_features, expect, is_tie
from export.reference import TorchBackend, greedy_batch
from export.replay import F32, Backend, Prompt, forced_logits, greedy, make_prompt
from export.student import Student
from vlm import digits
from vlm.chat import ChatTokenizer
from vlm.console import track
from vlm.manifest import Golden
from vlm.preprocess import pixels
from vlm.score import bootstrap_interval, exact_match

LIMIT = 24
GOLDEN_SEED = 7
POSITIONS = 32
TOKEN_TEXTS = (
    "12 + 5 = 17",
    "naïve café, Ünïcödé, 数字 и цифры",
    "  two  spaces\tand a tab\n\nand lines ",
    "emoji 🙂👍🏽 and 1234567890",
    "it's we'll I'd 'S 'LL",
    "<|im_start|>user\nhello<|im_end|>\n",
)


@dataclass(frozen=True)
class Evidence:
    """PyTorch's answers, so that several artefacts of one student ask only once.

    Attributes:
        cases: prompts of two lengths with forced continuations; the first is the golden sample.
        expected: PyTorch's logits and visual tokens per case.
        positions: places in the second prompt, and the logits after the token at each of them.
        prompts, answers, truths: evaluation questions, PyTorch's greedy tokens, the right answers.
        limit: most tokens an answer may have.
        task: name of the evaluation task, empty when the questions are not what the student was trained for.
    """

    golden: Golden
    cases: tuple[Case, ...]
    expected: tuple[Expected, ...]
    positions: tuple[npt.NDArray[np.int64], Expected]
    prompts: tuple[Prompt, ...]
    answers: tuple[tuple[int, ...], ...]
    truths: tuple[str, ...]
    limit: int
    task: str


def collect(student: Student, samples: int, seed: int, limit: int = LIMIT) -> Evidence:
    """Run the student in PyTorch on everything the gates compare.

    Raises:
        MissingPiece: scikit-learn is missing (evaluation images come from it).
    """
    tokenizer = student.checkpoint.tokenizer
    stop = tokenizer.spec.eos_token_ids
    backend = TorchBackend(student)
    shown = digits.sample("test", 0, seed=GOLDEN_SEED)
    golden_prompt = make_prompt(tokenizer, shown.image, shown.question)
    answer = greedy(backend, golden_prompt, stop, limit)
    cases = (
        Case("golden", golden_prompt, greedy(backend, golden_prompt, (), STEPS)),
        Case("noise", *_noise_case(student, seed)),
    )
    expected = tuple(
        expect(forced_logits(backend, c.prompt, c.forced), backend.features(c.prompt.image), c.forced) for c in cases
    )
    drawn = [digits.sample("test", index, seed=seed) for index in range(samples)]
    prompts = tuple(make_prompt(tokenizer, s.image, s.question) for s in drawn)
    return Evidence(
        golden=Golden("golden/0.png", shown.question, answer),
        cases=cases,
        expected=expected,
        positions=expect_positions(backend.prefill_all(cases[1].prompt), expected[1]),
        prompts=prompts,
        answers=tuple(greedy_batch(student, prompts, stop, limit)),
        truths=tuple(s.answer for s in drawn),
        limit=limit,
        task=task_of(student.checkpoint.provenance),
    )


def expect_positions(logits_PV: F32, case: Expected) -> tuple[npt.NDArray[np.int64], Expected]:
    """Logits at some evenly spread prompt positions: all of them would take gigabytes for a large vocabulary."""
    chosen = np.unique(np.linspace(0, len(logits_PV) - 1, POSITIONS).astype(np.int64))
    return chosen, expect(logits_PV[chosen], case.features, ())


def task_of(provenance: dict[str, Any]) -> str:
    """`digits` if that is what the student was trained on; else empty: right answers mean nothing to it."""
    data = provenance.get("data")
    name = data.get("name") if isinstance(data, dict) else data
    return "digits" if name == "digits" else ""


def _noise_case(student: Student, seed: int) -> tuple[Prompt, tuple[int, ...]]:
    """A longer prompt over a random picture of another size, then random tokens: nothing the model has learned."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (57, 91, 3), dtype=np.uint8))
    words = " ".join(digits.PLACES)
    tokenizer = student.checkpoint.tokenizer
    allowed = [i for i in range(tokenizer.tokenizer.get_vocab_size()) if i not in tokenizer.special_ids]
    forced = tuple(int(t) for t in rng.choice(allowed, STEPS))
    return make_prompt(tokenizer, image, f"Describe {words} and everything in between, slowly."), forced


def pixel_parity(student: Student, evidence: Evidence) -> dict[str, float]:
    """Our preprocessing against the checkpoint's own processor: largest difference on normalised pixels."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(student.checkpoint.directory, local_files_only=True, backend="pil")
    images = [case.prompt.image for case in evidence.cases] + [p.image for p in evidence.prompts[:8]]
    worst = 0.0
    for image in images:
        theirs = np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0], np.float32)
        ours = pixels(image, student.checkpoint.image)
        worst = max(worst, float(np.abs(theirs - ours).max()) if theirs.shape == ours.shape else float("inf"))
    return {"images": len(images), "max": worst}


def token_corpus(evidence: Evidence) -> list[str]:
    """Texts on which a foreign tokenizer must give the same ids."""
    return sorted({p.text for p in evidence.prompts} | {*evidence.truths, *digits.texts()[:200], *TOKEN_TEXTS})


def embedding_parity(student: Student, table: Any) -> dict[str, float]:
    """A callable ids [B,S] -> embeddings against the student's table, over the whole vocabulary."""
    ids = np.arange(student.facts.vocab_size, dtype=np.int64)[None]
    truth = student.model.model.language_model.embed_tokens.weight.numpy()
    return compare_features(truth, np.asarray(table(ids)[0], np.float32))


def accuracy(
    backend: Backend, reference: Backend, tokenizer: ChatTokenizer, evidence: Evidence, gate: Gate
) -> tuple[dict[str, Any], list[str]]:
    """Greedy answers of the artefact against PyTorch's (always) and against the truth (on the student's own task)."""
    if not evidence.prompts:
        return {"task": None, "n": 0}, []
    stop = tokenizer.spec.eos_token_ids
    got = [
        greedy(backend, prompt, stop, evidence.limit)
        for prompt in track(evidence.prompts, len(evidence.prompts), "compare greedy answers")
    ]
    pairs = list(zip(evidence.prompts, evidence.answers, got, strict=True))
    equal = [float(want == have) for _, want, have in pairs]
    tied = [float(want == have or is_tie(reference, prompt, want, have, gate)) for prompt, want, have in pairs]
    result: dict[str, Any] = {
        "task": evidence.task or None,
        "n": len(equal),
        "tokens_equal": float(np.mean(equal)),
        "tokens_equal_interval": bootstrap_interval(equal),
        "tokens_equal_or_tied": float(np.mean(tied)),
        "before": None,
        "after": None,
    }
    found = []
    if evidence.task:
        for key, answers in (("before", evidence.answers), ("after", got)):
            hits = [float(exact_match(tokenizer.decode(a), t)) for a, t in zip(answers, evidence.truths, strict=True)]
            result[key], result[f"{key}_interval"] = float(np.mean(hits)), bootstrap_interval(hits)
        if result["before"] - result["after"] > gate.accuracy_drop:
            found.append(f"exact match fell from {result['before']:.4f} to {result['after']:.4f}")
    # a student off its task rambles through near ties that rounding turns; on its task it must say the same
    key = "tokens_equal" if evidence.task else "tokens_equal_or_tied"
    if result[key] < gate.tokens_equal:
        found.append(f"greedy answers: {key} {result[key]:.4f} is below {gate.tokens_equal}")
    return result, found


def save_golden(evidence: Evidence, root: Path) -> list[tuple[Path, str]]:
    """Write the golden image and PyTorch's figures for it; `verify` needs nothing else."""
    image, figures = root / evidence.golden.image, root / "golden" / "reference.npz"
    image.parent.mkdir(parents=True, exist_ok=True)
    evidence.cases[0].prompt.image.save(image)
    np.savez_compressed(figures, **vars(evidence.expected[0]))
    return [(image, "golden_image"), (figures, "reference")]


def load_reference(path: Path) -> Expected:
    with np.load(path) as stored:
        values = {name: stored[name] for name in stored.files}
    return Expected(**{**values, "spread": float(values["spread"])})
