"""MME-Reasoning, the embedded digits task, and the generic JSON task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.images import from_pillow
from runtime.tasks.base import (
    LONG_TOKENS,
    FilePicture,
    Item,
    LazyPicture,
    Picture,
    Task,
    TaskOptions,
    data_of,
    find,
    nothing_found,
    unique,
)
from runtime.tasks.tables import Row, base64_picture, parquet_files, parquet_rows, records, required
from vlm import digits as scans
from vlm.errors import DataError, UserError
from vlm.scoring.answers import CHECKS, literal
from vlm.scoring.choice import lettered
from vlm.scoring.mme_reasoning import REQUESTS, rule_of

DIGITS_SAMPLES = 200
REASONING_TOKENS = 2048


def digits(options: TaskOptions) -> Task:
    """Grids of handwritten digits; the split `test` shows only scans the student has not seen."""
    split = options.split or "test"
    if split not in ("train", "validation", "test"):
        raise UserError(f"split is {split!r}; known: train, validation, test")
    scans.scan_indices("test")  # a missing package should be known before the model is loaded
    items = []
    for index in range(options.samples or DIGITS_SAMPLES):
        sample = scans.sample(split, index, options.seed)  # type: ignore[arg-type]
        image = from_pillow(sample.image)
        name = f"digits {split} {options.seed}/{index}"
        picture = LazyPicture(name, name, lambda image=image: image)  # type: ignore[misc]
        truth = {"metric": "exact", "answer": sample.answer}
        items.append(Item(str(index), sample.question, (picture,), truth, {"kind": sample.kind}))
    return Task("digits", tuple(items))


def generic(options: TaskOptions) -> Task:
    """A list of {question, image or images, answer or answers, metric, options, id, category}; see docs/evaluation.md.

    LLaVA's training form (`conversations`) is read too: the first question, and the reply as the answer.
    """
    source = data_of(options, "json")
    if source.is_dir():
        named = find(source, "task.json", "task.jsonl", "*.json", "*.jsonl", "*.parquet")
        if named is None:
            raise nothing_found("json", source, "task.json", "task.jsonl")
        source = named
    rows = list(parquet_rows([source])) if source.suffix == ".parquet" else records(source)
    folder = options.images or source.parent
    return Task(
        "json", unique((_generic(row, n, source, folder) for n, row in enumerate(rows, 1)), source), LONG_TOKENS
    )


def _generic(row: Row, number: int, source: Path, folder: Path) -> Item:
    row = _from_conversation(row) if "conversations" in row else row
    required(row, ("question",), source, number)
    answer = row.get("answer", row.get("answers"))
    if answer is None or answer == []:
        raise DataError(f"{source}, record {number}: no 'answer'")
    metric = str(row.get("metric") or ("choice" if row.get("options") else "exact"))
    if metric not in CHECKS:
        raise DataError(f"{source}, record {number}: metric is {metric!r}; known: {', '.join(CHECKS)}")
    truth: dict[str, Any] = {"metric": metric, "answer": answer}
    if options := row.get("options"):
        truth["options"] = options if isinstance(options, dict) else lettered([str(text) for text in options])
    if metric == "choice" and not options:
        raise DataError(f"{source}, record {number}: metric 'choice' needs 'options'")
    cells = row.get("images") or ([row["image"]] if row.get("image") else [])
    if not isinstance(cells, list) or not all(isinstance(cell, (str, FilePicture, LazyPicture)) for cell in cells):
        raise DataError(f"{source}, record {number}: images are {str(cells)[:60]}; give names of files")
    pictures = tuple(_picture(cell, folder) for cell in cells)
    group = {"category": str(row.get("category") or "")}
    return Item(str(row.get("id", number)), str(row["question"]), pictures, truth, group)


def _picture(cell: Any, folder: Path) -> Picture:
    if isinstance(cell, str):
        return FilePicture(folder / cell)
    picture: Picture = cell
    return picture


def _from_conversation(row: Row) -> Row:
    turns = row["conversations"]
    asked = next((turn["value"] for turn in turns if turn.get("from") == "human"), None)
    said = next((turn["value"] for turn in turns if turn.get("from") == "gpt"), None)
    question = None if asked is None else str(asked).replace("<image>", "").strip()
    return {
        **{key: value for key, value in row.items() if key != "conversations"},
        "question": question,
        "answer": said,
    }


REASONING_FIELDS = ("question", "answer", "question_type", "function_id", "prompt_id", "special_info")


def mme_reasoning(options: TaskOptions) -> Task:
    """Parquet, TSV or JSON with the fields of U4R/MME-Reasoning; each question asks for an answer a rule can read."""
    root = data_of(options, "mme-reasoning")
    tables = parquet_files(root, "data/*.parquet", "*.parquet")
    source = tables[0] if tables else (root if root.is_file() else find(root, "*.tsv", "*.json", "*.jsonl"))
    if source is None:
        raise nothing_found("mme-reasoning", root, "data/test-*.parquet", "*.tsv", "*.json")
    folder = options.images or (root if root.is_dir() else root.parent)
    items = []
    for number, row in enumerate(parquet_rows(tables) if tables else records(source), 1):
        required(row, ("question", "question_type"), source, number)
        row = {key: None if value in ("", "nan", "None") else value for key, value in row.items()}
        try:
            function, prompt_id = rule_of(row)
        except ValueError as error:
            raise DataError(f"{source}, row {number}: {error}") from None
        request = REQUESTS.get(prompt_id)
        prompt = f"{row['question']}\n{request}" if request else str(row["question"])
        truth = {name: row.get(name) for name in REASONING_FIELDS}
        group = {
            "capability": str(row.get("capability") or ""),
            "reasoning_type": str(row.get("reasoning_type") or ""),
            "question_type": "open" if function == "open_function" else str(row["question_type"]),
        }
        key = str(number if row.get("index") is None else row["index"])
        items.append(Item(key, prompt, _listed(row, folder, source, f"row {number}"), truth, group))
    note = "answers are read by rules; open questions compared as numbers or words unless --judge is given"
    return Task("mme-reasoning", unique(items, source), REASONING_TOKENS, note)


def _listed(row: Row, folder: Path, source: Path, place: str) -> tuple[Picture, ...]:
    cells = row.get("image_path") or row.get("images") or row.get("image")
    if isinstance(cells, str) and cells.startswith("["):
        cells = literal(cells)
    if cells is None:
        return tuple(row[n] for n in (f"image_{i}" for i in range(1, 10)) if row.get(n) is not None)
    found: list[Picture] = []
    for cell in cells if isinstance(cells, list) else [cells]:
        if isinstance(cell, str):
            found.append(base64_picture(cell, source, place) if len(cell) > 300 else FilePicture(folder / cell))
        elif cell is not None:
            found.append(cell)
    return tuple(found)
