"""Our readers of replies against the published scripts, on random text, from checkouts you name.

    python -m scripts.against_official --llava LLaVA --vlmevalkit VLMEvalKit --av-odyssey AV-Odyssey --rounds 100000

Nothing of those projects is part of this one: their files are loaded from the checkouts and run beside ours. Exit code 1
on any difference; the last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import random
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm.console import note, print_json
from vlm.scoring import choice, text

REFERENCES = ["red", "Red", "the red", "blue", "two", "2", "unanswerable", "it's", "dont", ""]
WORDS = [
    *text.CONTRACTIONS, *text.CONTRACTIONS.values(), *text.NUMBER_WORDS, "a", "an", "the", "A", "The", "cat", "3.5", ".5",
    "1,000", "10.", "it's", "dog's", "yes", "no", "No", "not", "Not", "-", "--", "/", "?", "!", "e.g.", ".", "a.b", "x-y",
    "(x)", "[y]", "\n", "\t", "'", '"q"', "_", "@", "#", "$5", "50%", ",", "Yes, it is",
]  # fmt: skip
REPLIES = [
    "A", "B", "C", "D", "(A)", "(B)", "A.", "B.", "the answer is", "The answer is", "cat", "a cat", "dog", "two dogs", "Z",
    "because", "it is", "answer: C", "a", "*B*", "bird", "**C**", "E", "Cannot determine the answer", ".", "Answer: B", ",",
]  # fmt: skip
OPTIONS = [
    {"A": "cat", "B": "dog", "C": "two dogs", "D": "bird"},
    {"A": "yes", "B": "no"},
    {"A": "Red", "B": "a cat", "C": "it"},
]


def load_file(path: Path, **stubs: Any) -> Any:
    """A module from a file; `stubs` stand for modules it imports."""
    if not path.is_file():
        raise SystemExit(f"no {path}; name a checkout that has it")
    for name, members in stubs.items():
        sys.modules.setdefault(name, types.SimpleNamespace(**members))  # type: ignore[arg-type]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(name: str, rounds: int, draw: Callable[[], tuple[Any, ...]], theirs: Any, ours: Any) -> dict[str, Any]:
    different = 0
    for _ in range(rounds):
        given = draw()
        if (a := theirs(*given)) != (b := ours(*given)):
            different += 1
            if different <= 3:
                note(f"{name}: {given!r}: theirs {a!r}, ours {b!r}")
    return {"name": name, "n": rounds, "different": different}


def llava(root: Path, rng: random.Random, rounds: int) -> list[dict[str, Any]]:
    module = load_file(root / "llava/eval/m4c_evaluator.py")
    normalise, evaluator = module.EvalAIAnswerProcessor(), module.TextVQAAccuracyEvaluator()
    module.tqdm = lambda values: values

    def words() -> tuple[str]:
        return (rng.choice([" ", "", "  "]).join(rng.choice(WORDS) for _ in range(rng.randint(0, 6))),)

    def answers() -> tuple[str, list[str]]:
        return rng.choice([*REFERENCES, "x"]), [rng.choice(REFERENCES) for _ in range(10)]

    def soft(said: str, listed: list[str]) -> float:
        return round(evaluator.eval_pred_list([{"pred_answer": said, "gt_answers": listed}]), 9)

    pope = load_file(root / "llava/eval/eval_pope.py")
    with tempfile.TemporaryDirectory() as folder:
        labels = Path(folder) / "labels.json"
        labels.write_text("\n".join(json.dumps({"label": label}) for label in ("yes", "no", "yes", "no")))

        def label(said: str) -> str:
            # four answers, so that no denominator of the script is zero
            rows = [{"text": said}, {"text": "no"}, {"text": "yes"}, {"text": "yes"}]
            with contextlib.redirect_stdout(io.StringIO()):
                pope.eval_pope(rows, str(labels))
            return str(rows[0]["text"])

        return [
            compare("EvalAI normaliser", rounds, words, normalise, text.vqa_normalise),
            compare("VQA soft accuracy", rounds // 5, answers, soft, lambda *a: round(text.vqa_soft_accuracy(*a), 9)),
            compare("POPE", rounds // 5, words, label, text.pope_label),
        ]


def choices(rng: random.Random) -> tuple[str, dict[str, str]]:
    return " ".join(rng.choice(REPLIES) for _ in range(rng.randint(0, 9))), rng.choice(OPTIONS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("llava", "vlmevalkit", "av-odyssey"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, rounds = random.Random(arguments.seed), arguments.rounds
    rows = llava(arguments.llava, rng, rounds) if arguments.llava else []
    if arguments.vlmevalkit:
        stub = {"vlmeval.smp.log": {"get_logger": lambda _: None}}
        theirs = load_file(arguments.vlmevalkit / "vlmeval/utils/matching_util.py", **stub)

        def matched(reply: str, options: dict[str, str]) -> str | None:
            return theirs.can_infer(reply, dict(options)) or None

        rows.append(compare("MMBench reader", rounds, lambda: choices(rng), matched, choice.mmbench))
    if arguments.av_odyssey:
        odyssey = load_file(arguments.av_odyssey / "evaluation.py")

        def parsed(reply: str, options: dict[str, str]) -> str:
            return str(odyssey.parse_multi_choice_response(reply, list(options), options))

        rows.append(compare("AV-Odyssey reader", rounds, lambda: choices(rng), parsed, choice.av_odyssey))
    if not rows:
        parser.error("name at least one checkout")
    for row in rows:
        print(f"{row['name']}: {row['different']} differences in {row['n']}")
    print_json({"rows": rows, "seed": arguments.seed})
    return 1 if any(row["different"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
