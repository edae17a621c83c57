"""Collect PyTorch's side once per export: parity cases, the golden sample, the evaluation answers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from export.corpus import corpus
from export.options import IMAGES
from export.parity import STEPS, Case, Expected, Gate, compare_features, expect, is_tie
from export.questions import Question, digit_questions
from export.reference import TorchBackend, greedy_batch, greedy_padded
from export.replay import F32, Backend, Prompt, forced_logits, greedy, make_prompt
from export.student import Student
from vlm import digits
from vlm.chat import ChatTokenizer
from vlm.console import note, track
from vlm.errors import UserError
from vlm.load import Checkpoint
from vlm.manifest import Golden
from vlm.preprocess import ImageSpec, pixels, resize
from vlm.score import bootstrap_interval, exact_match, share_interval

LIMIT = 24
LONGEST = 64
GOLDEN_SEED = 7
GOLDEN = 4
POSITIONS = 32
PIXEL_IMAGES = 8  # of the questions, on which preprocessing is compared
TABLE_ROWS = 4096
CALIBRATION_SEED = 11
CALIBRATION_TOKENS = 4096
DESCRIBE = "Describe the image."


@dataclass(frozen=True)
class Evidence:
    """PyTorch's answers, so that several artefacts of one student ask only once.

    Attributes:
        golden: real images with questions, stored in the artefact and replayed by `verify`.
        cases: prompts of two lengths with forced continuations; the golden samples, then noise.
        expected: PyTorch's logits and visual tokens per case.
        table: ids spread over the vocabulary, and their embeddings.
        positions: places in the second prompt, and the logits after the token at each of them.
        prompts, answers, truths: evaluation questions, PyTorch's greedy tokens, the right answers to each.
        limit: most tokens an answer may have.
        task: name of the evaluation task, empty when the questions are not what the student was trained for.
        given: whether the questions are the user's; else they are of the embedded digits.
        knows_digits: whether the student was trained on those.
    """

    golden: tuple[Golden, ...]
    cases: tuple[Case, ...]
    expected: tuple[Expected, ...]
    positions: tuple[npt.NDArray[np.int64], Expected]
    table: tuple[npt.NDArray[np.int64], F32]
    prompts: tuple[Prompt, ...]
    answers: tuple[tuple[int, ...], ...]
    truths: tuple[tuple[str, ...], ...]
    limit: int
    task: str
    given: bool = False
    knows_digits: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        asked = (len(prompt.ids) + self.limit for prompt in self.prompts)
        return max((*asked, *(len(case.prompt.ids) + STEPS for case in self.cases)))


def collect(
    student: Student, samples: int, seed: int, limit: int = LIMIT, questions: Sequence[Question] = (), task: str = ""
) -> Evidence:
    """Run the student in PyTorch on everything the gates compare.

    Args:
        questions: of the student's own `task`; none takes `samples` of the digits.

    Raises:
        MissingPiece: scikit-learn is missing (evaluation images come from it).
        UserError: a question is longer than what the student reads.
    """
    tokenizer = student.checkpoint.tokenizer
    stop = tokenizer.spec.eos_token_ids
    drawn = questions or digit_questions("test", samples, seed)
    prompts = tuple(prompts_of(student.checkpoint, drawn, whole=PIXEL_IMAGES))
    if questions:
        limit = max(limit, min(1 + max(len(_ids(tokenizer, a)) for q in drawn for a in q.answers), LONGEST))
        _check_lengths(prompts, limit, student.facts.context_length)
    backend = TorchBackend(student)
    own = task_of(student.checkpoint.provenance)
    shown = _golden_cases(backend, golden_prompts(tokenizer))
    noise, noise_expected, positions = _noise_case(student, backend, seed)
    return Evidence(
        golden=tuple(
            Golden(f"golden/{i}.png", c.prompt.question, _until(c.forced, stop)) for i, (c, _) in enumerate(shown)
        ),
        cases=(*(case for case, _ in shown), noise),
        expected=(*(expected for _, expected in shown), noise_expected),
        positions=positions,
        table=_table(student),
        prompts=prompts,
        answers=tuple(greedy_batch(student, prompts, stop, limit)),
        truths=tuple(q.answers for q in drawn),
        limit=limit,
        task=task if questions else own,
        given=bool(questions),
        knows_digits=bool(own),
    )


def prompts_of(checkpoint: Checkpoint, questions: Sequence[Question], whole: int = 0) -> list[Prompt]:
    """Prompts that hold a larger image as the tower gets it: resizing it again changes nothing, photos take gigabytes.

    Args:
        whole: how many of the first keep their image as it is.
    """
    spec, made = checkpoint.image, []
    for index, question in enumerate(questions):
        image = question.image()
        if index >= whole and image.width * image.height > spec.size**2:
            image = resize(image, spec)
        made.append(make_prompt(checkpoint.tokenizer, image, question.text))
    return made


def _check_lengths(prompts: Sequence[Prompt], limit: int, context: int) -> None:
    for prompt in prompts:
        if len(prompt.ids) + limit > context:
            start = f"{prompt.question[:40]!r}{'...' if len(prompt.question) > 40 else ''}"
            raise UserError(
                f"question {start} takes {len(prompt.ids)} tokens and its answer up to {limit}, this student reads "
                f"{context}; shorten it or take it out of --data"
            )


def _ids(tokenizer: ChatTokenizer, text: str) -> list[int]:
    return list(tokenizer.tokenizer.encode(text, add_special_tokens=False).ids)


def golden_prompts(tokenizer: ChatTokenizer) -> list[Prompt]:
    """The images and questions every artefact carries."""
    shown = (digits.sample("test", index, seed=GOLDEN_SEED) for index in range(GOLDEN))
    return [make_prompt(tokenizer, s.image, s.question) for s in shown]


def _golden_cases(backend: TorchBackend, prompts: Sequence[Prompt]) -> list[tuple[Case, Expected]]:
    """Greedy tokens of all prompts together, then per prompt one pass over them for the logits they are held against."""
    cases, image_id = [], backend.student.checkpoint.tokenizer.spec.image_token_id
    for index, (prompt, forced) in enumerate(zip(prompts, greedy_padded(backend.student, prompts, STEPS), strict=True)):
        whole = dataclasses.replace(prompt, ids=(*prompt.ids, *forced))
        # a student may say the image token, which in a prompt asks for an image
        rows = None if image_id in forced else backend.prefill_all(whole, keep=STEPS + 1)
        if rows is None or tuple(rows[:-1].argmax(1).tolist()) != forced:  # or padding turned a near tie
            forced = greedy(backend, prompt, (), STEPS)
            rows = forced_logits(backend, prompt, forced)
        case = Case(f"golden {index}" if index else "golden", prompt, forced)
        cases.append((case, expect(rows, backend.features(prompt.image), forced)))
    return cases


def _until(ids: Sequence[int], stop: Sequence[int]) -> tuple[int, ...]:
    """Up to and including the first stop token."""
    end = next((i + 1 for i, token in enumerate(ids) if token in stop), len(ids))
    return tuple(ids[:end])


def _table(student: Student) -> tuple[npt.NDArray[np.int64], F32]:
    count = student.facts.vocab_size
    ids = np.unique(np.linspace(0, count - 1, min(count, TABLE_ROWS)).astype(np.int64))
    return ids, student.model.model.language_model.embed_tokens.weight[ids].detach().float().numpy()


def expect_positions(logits_PV: F32, case: Expected) -> tuple[npt.NDArray[np.int64], Expected]:
    """Logits at some evenly spread prompt positions: all of them would take gigabytes for a large vocabulary."""
    chosen = np.unique(np.linspace(0, len(logits_PV) - 1, POSITIONS).astype(np.int64))
    return chosen, expect(logits_PV[chosen], case.features, ())


def task_of(provenance: dict[str, Any]) -> str:
    """`digits` if that is what the student was trained on; else empty: right answers mean nothing to it."""
    data = provenance.get("data")
    name = data.get("name") if isinstance(data, dict) else data
    return "digits" if name == "digits" else ""


def _noise_case(
    student: Student, backend: TorchBackend, seed: int
) -> tuple[Case, Expected, tuple[npt.NDArray[np.int64], Expected]]:
    """A longer prompt over a random picture of another size, then random tokens: nothing the model has learned.

    Returns: the case, its logits, and logits at some prompt positions; all from one pass without a cache.
    """
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (57, 91, 3), dtype=np.uint8))
    words = " ".join(digits.PLACES)
    tokenizer = student.checkpoint.tokenizer
    kept = {*tokenizer.special_ids, tokenizer.spec.image_token_id}
    allowed = [i for i in range(tokenizer.tokenizer.get_vocab_size()) if i not in kept]
    forced = tuple(int(t) for t in rng.choice(allowed, STEPS))
    prompt = make_prompt(tokenizer, image, f"Describe {words} and everything in between, slowly.")
    logits_PV = backend.prefill_all(dataclasses.replace(prompt, ids=(*prompt.ids, *forced)))
    features = backend.features(image)
    expected = expect(logits_PV[len(prompt.ids) - 1 :], features, forced)
    return Case("noise", prompt, forced), expected, expect_positions(logits_PV[: len(prompt.ids)], expected)


def pixel_parity(checkpoint: Checkpoint, evidence: Evidence, spec: ImageSpec) -> dict[str, float]:
    """The artefact's preprocessing against the checkpoint's own processor: largest difference of normalised pixels."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(checkpoint.directory, local_files_only=True, backend="pil")
    images = [case.prompt.image for case in evidence.cases] + [p.image for p in evidence.prompts[:PIXEL_IMAGES]]
    worst = 0.0
    for image in images:
        theirs = np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0], np.float32)
        ours = pixels(image, spec)
        worst = max(worst, float(np.abs(theirs - ours).max()) if theirs.shape == ours.shape else float("inf"))
    return {"images": len(images), "max": worst}


def token_corpus(evidence: Evidence, tokenizer: ChatTokenizer) -> list[str]:
    """Texts on which a foreign tokenizer must give the same ids: 1,000 of every kind, and those of the task."""
    specials = sorted(str(tokenizer.tokenizer.id_to_token(i)) for i in tokenizer.special_ids)
    added = sorted(str(token.content) for token in tokenizer.tokenizer.get_added_tokens_decoder().values())
    # white space that a token takes with it, and tokens that are none inside a word
    around = [form.format(token) for token in added for form in ("{}", "a {} b", "x{}y", "{}s")]
    asked = {p.text for p in evidence.prompts} | {*itertools.chain(*evidence.truths), *digits.texts()[:200]}
    return [*corpus(specials), *around, *sorted(asked)]


def embedding_parity(evidence: Evidence, lookup: Callable[[npt.NDArray[np.int64]], F32]) -> dict[str, float]:
    """ids [1,S] -> embeddings against the student's table, over rows spread across the vocabulary."""
    ids, truth = evidence.table
    return compare_features(truth, np.asarray(lookup(ids[None])[0], np.float32))


def accuracy(
    backend: Backend, reference: Callable[[], Backend], tokenizer: ChatTokenizer, evidence: Evidence, gate: Gate
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
    # off its task a student rambles through near ties that rounding turns, and long answers have some on any task
    strict = evidence.knows_digits and not evidence.given
    key = "tokens_equal" if strict else "tokens_equal_or_tied"
    tied = equal
    if not strict and not all(equal) and gate.tokens_equal > 0:
        truth = reference()
        tied = [float(want == have or is_tie(truth, prompt, want, have, gate)) for prompt, want, have in pairs]
    result: dict[str, Any] = {
        "task": evidence.task or None,
        "given": evidence.given,
        "n": len(equal),
        "tokens_equal": float(np.mean(equal)),
        "tokens_equal_interval": share_interval(equal),
        "tokens_equal_or_tied": float(np.mean(tied)),
        "before": None,
        "after": None,
        "change": None,
    }
    found = []
    if evidence.task:
        hits = {}
        for when, answers in (("before", evidence.answers), ("after", got)):
            said = [tokenizer.decode(answer) for answer in answers]
            right = [float(any(exact_match(s, t) for t in ts)) for s, ts in zip(said, evidence.truths, strict=True)]
            result[when], result[f"{when}_interval"] = float(np.mean(right)), share_interval(right)
            hits[when] = right
        change = [b - a for a, b in zip(hits["before"], hits["after"], strict=True)]
        result["change"], result["change_interval"] = float(np.mean(change)), bootstrap_interval(change)
        if result["change"] < -gate.accuracy_drop:
            found.append(f"exact match fell from {result['before']:.4f} to {result['after']:.4f}")
    if result[key] < gate.tokens_equal:
        found.append(f"greedy answers: {key} {result[key]:.4f} is below {gate.tokens_equal}")
    return result, found


def save_golden(evidence: Evidence, root: Path) -> list[tuple[Path, str]]:
    """Write the golden images and PyTorch's figures for them; `verify` needs nothing else."""
    files = []
    figures = root / "golden" / "reference.npz"
    figures.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {}
    for index, golden in enumerate(evidence.golden):
        evidence.cases[index].prompt.image.save(root / golden.image)
        files.append((root / golden.image, "golden_image"))
        arrays |= {f"{index}.{name}": value for name, value in vars(evidence.expected[index]).items()}
    np.savez_compressed(figures, **arrays)
    return [*files, (figures, "reference")]


def load_reference(path: Path) -> list[Expected]:
    """The stored figures, one per golden sample."""
    with np.load(path) as stored:
        values = {name: stored[name] for name in stored.files}
    found: list[Expected] = []
    while mine := {n.split(".", 1)[1]: v for n, v in values.items() if n.startswith(f"{len(found)}.")}:
        found.append(Expected(**{**mine, "spread": float(mine["spread"])}))
    return found


def calibration_images(evidence: Evidence, folder: Path | None, questions: Sequence[Question]) -> str:
    """What `calibration_prompts` takes, in the words of a note; names the digits where they are foreign to the student."""
    if folder is None and not questions and not evidence.knows_digits:
        return "digits, which this student does not know; --calibration or more --data gives it better images"
    return "real images"


def note_unread(folder: Path | None, why: str) -> None:
    """Say that --calibration, where it was given, changes nothing."""
    if folder is not None:
        note(f"{why} needs no calibration: --calibration {folder} is not read")


def calibration_prompts(
    student: Student, folder: Path | None, count: int = 0, questions: Sequence[Question] = ()
) -> tuple[list[Prompt], list[tuple[int, ...]]]:
    """Prompts with continuations to calibrate on: images of a folder, else `questions`, else digits to train on.

    Args:
        count: of prompts; 0 takes 4 to 32, fewer where an image has many tokens.

    Raises:
        UserError: the folder holds no image.
    """
    tokenizer = student.checkpoint.tokenizer
    count = count or min(max(CALIBRATION_TOKENS // (student.checkpoint.image.tokens + 32), 4), 32)
    if folder is None:
        drawn = list(questions)[:count] or digit_questions("train", count, CALIBRATION_SEED)
        answers = [tuple(_ids(tokenizer, q.answers[0])) for q in drawn]
        return prompts_of(student.checkpoint, drawn), answers
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)
    prompts = prompts_of(student.checkpoint, [Question(path, DESCRIBE, ()) for path in paths[:count]])
    stop = tokenizer.spec.eos_token_ids
    return prompts, greedy_batch(student, prompts, stop, LIMIT)
