"""Multiple choice: ScienceQA, MMBench, MMVP, BLINK, V*, MMStar, AV-Odyssey."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.tasks.base import (
    LETTER,
    FilePicture,
    Item,
    Picture,
    Task,
    TaskOptions,
    ask_options,
    data_of,
    find,
    nothing_found,
    unique,
)
from runtime.tasks.tables import (
    Row,
    base64_picture,
    json_lines,
    parquet_files,
    parquet_rows,
    read_json,
    required,
    separated,
)
from vlm.errors import DataError
from vlm.scoring.choice import LETTERS, lettered

CIRCLE = 1_000_000  # MMBench numbers the rotations of a question in steps of this
BRACKETED = re.compile(r"\(([A-Za-z])\)\s*(.*?)(?=\s*\([A-Za-z]\)|\s*$)", re.DOTALL)


def scienceqa(options: TaskOptions) -> Task:
    """All questions of the split; the ones with an image are the paper's ScienceQA-IMG."""
    return _scienceqa(options, "scienceqa")


def scienceqa_img(options: TaskOptions) -> Task:
    """Only the questions with an image."""
    return _scienceqa(options, "scienceqa-img")


def _scienceqa(options: TaskOptions, name: str) -> Task:
    root, split = data_of(options, name), options.split or "test"
    tables = parquet_files(root, f"data/{split}-*.parquet", f"ScienceQA-*/{split}-*.parquet", f"{split}-*.parquet")
    asked: dict[str, str] = {}
    if tables:
        rows = [(str(n), row, row.get("image")) for n, row in enumerate(parquet_rows(tables))]
    else:
        problems, splits = find(root, "problems.json"), find(root, "pid_splits.json")
        if problems is None or splits is None:
            raise nothing_found(name, root, "problems.json", "pid_splits.json", f"data/{split}-*.parquet")
        folder = options.images or find(root, f"images/{split}", split, "images") or root / "images" / split
        known, listed = read_json(problems), read_json(splits)
        if split not in listed:
            raise DataError(f"{splits} has no split {split!r}; known: {', '.join(listed)}")
        rows = [(pid, known[pid], _problem_picture(folder, pid, known[pid])) for pid in listed[split]]
        asked = _llava_scienceqa(find(root, f"llava_{split}_CQM-A.json"))
    items = []
    for number, (key, row, picture) in enumerate(rows, 1):
        required(row, ("question", "choices", "answer"), root, number)
        if picture is None and name == "scienceqa-img":
            continue
        hint = str(row.get("hint") or "").strip()
        prompt, letters = ask_options(
            f"Context: {hint}\n{row['question']}" if hint else row["question"], row["choices"]
        )
        truth = {"answer": LETTERS[int(row["answer"])], "options": letters}
        group = {"context": "image" if picture else "text" if hint else "none", "subject": row.get("subject") or ""}
        group["grade"] = _grades(str(row.get("grade") or ""))
        pictures = (picture,) if picture else ()
        items.append(Item(key, f"{asked[key]}{LETTER}" if key in asked else prompt, pictures, truth, group))
    note = "prompts from LLaVA's question file" if asked else ""
    return Task(name, unique(items, root), note=note)


def _problem_picture(folder: Path, pid: str, row: Row) -> Picture | None:
    return FilePicture(folder / pid / str(row["image"])) if row.get("image") else None


def _llava_scienceqa(path: Path | None) -> dict[str, str]:
    rows = read_json(path) if path else []
    return {str(row["id"]): row["conversations"][0]["value"].replace("<image>", "").strip() for row in rows}


def _grades(grade: str) -> str:
    """`grade7` -> `7-12`, as ScienceQA's table has it."""
    number = re.sub(r"\D", "", grade)
    return "" if not number else "1-6" if int(number) <= 6 else "7-12"


def _present(value: Any) -> bool:
    return value is not None and str(value).strip().lower() not in ("", "nan", "none")


def mmbench(options: TaskOptions) -> Task:
    """`mmbench_{split}*.tsv` or parquet; every question is asked once per rotation of its options."""
    root, split = data_of(options, "mmbench"), options.split
    if root.is_file() and root.suffix == ".tsv":
        source, rows = root, separated(root)
    elif (found := find(root, *_mmbench_names(split))) is not None:
        source, rows = found, separated(found)
    else:
        others = () if split else ("data/*.parquet", "*.parquet")
        tables = parquet_files(root, f"**/{split or 'dev'}-*.parquet", *others)
        if not tables:
            raise nothing_found("mmbench", root, f"mmbench_{split or 'dev'}*.tsv", f"data/{split or 'dev'}-*.parquet")
        source, rows = tables[0], list(parquet_rows(tables))
    for number, row in enumerate(rows, 2):
        required(row, ("index", "question", "A"), source, number)
    rotated = [row for row in rows for row in (_rotations(row) if _alone(rows) else [row])]
    pictures = _mmbench_pictures(rows, source)
    items = [_mmbench_item(row, pictures) for row in rotated]
    keys = ("index", "question", "A", "B", "C", "D", "answer", "split")
    firsts = {int(row["index"]) for row in rows}
    submission = tuple(
        {key: row[key] for key in keys if key in row} | {"main": int(row["index"]) in firsts} for row in rotated
    )
    note = "rotations made here; the file has none" if _alone(rows) else ""
    return Task("mmbench", unique(items, source), note=note, submission=submission)


def _mmbench_names(split: str) -> tuple[str, ...]:
    if split:
        return f"mmbench_{split}*.tsv", f"MMBench_{split.upper()}*.tsv", f"*{split}*.tsv"
    return "mmbench_dev_20230712.tsv", "mmbench_dev*.tsv", "MMBench_DEV*.tsv", "*.tsv"


def _alone(rows: Sequence[Row]) -> bool:
    return all(int(row["index"]) < CIRCLE for row in rows)


def _given(row: Row) -> list[str]:
    """Options up to the first empty one."""
    found: list[str] = []
    for letter in "ABCDEFGH":
        if not _present(row.get(letter)):
            break
        found.append(str(row[letter]))
    return found


def _rotations(row: Row) -> Iterator[Row]:
    """The row, and its options moved on by one place each time, as LLaVA's all-rounds evaluation does."""
    given = _given(row)
    right = LETTERS.index(str(row["answer"]).strip()) if _present(row.get("answer")) else None
    for turn in range(len(given)):
        moved = lettered(given[turn:] + given[:turn])
        answer = {} if right is None else {"answer": LETTERS[(right - turn) % len(given)]}
        yield {**row, **moved, **answer, "index": int(row["index"]) + turn * CIRCLE}


def _mmbench_pictures(rows: Sequence[Row], source: Path) -> dict[int, Picture | None]:
    """Index of a question -> its image; a short cell is the index of the row that holds the image."""
    cells = {int(row["index"]): row.get("image") for row in rows}
    found: dict[int, Picture | None] = {}
    for index, cell in cells.items():
        if isinstance(cell, str) and cell.strip().isdigit() and len(cell) < 20:
            cell = cells.get(int(cell))
        place = f"image of index {index % CIRCLE}"
        picture = base64_picture(cell, source, place) if isinstance(cell, str) and cell else cell
        found.setdefault(index % CIRCLE, picture if not isinstance(picture, str) else None)
    return found


def _mmbench_item(row: Row, pictures: dict[int, Picture | None]) -> Item:
    index = int(row["index"])
    question = f"{row['hint']}\n{row['question']}" if _present(row.get("hint")) else str(row["question"])
    prompt, letters = ask_options(question, _given(row))
    answer = str(row["answer"]).strip() if _present(row.get("answer")) else None
    picture = pictures.get(index % CIRCLE)
    group = {
        "index": str(index % CIRCLE),
        "split": row.get("split") or "",
        "l2": row.get("l2-category") or row.get("L2-category") or "",
        "category": row.get("category") or "",
    }
    return Item(str(index), prompt, (picture,) if picture else (), {"answer": answer, "options": letters}, group)


def mmvp(options: TaskOptions) -> Task:
    """`Questions.csv` with `MMVP Images/`, or parquet. Questions 1 and 2, 3 and 4, ... are pairs."""
    root = data_of(options, "mmvp")
    source = find(root, "Questions.csv")
    if source is not None:
        rows = separated(source)
        folder = options.images or find(root, "MMVP Images", "images") or root / "MMVP Images"
        # the published file calls its first column `lndex`, with a small L
        rows = [{**row, "Index": row.get("Index") or row.get("lndex") or number} for number, row in enumerate(rows, 1)]
        rows = [{**row, "image": FilePicture(folder / f"{row['Index']}.jpg")} for row in rows]
    else:
        tables = parquet_files(root, "data/*.parquet", "*.parquet")
        if not tables:
            raise nothing_found("mmvp", root, "Questions.csv", "data/*.parquet")
        source, rows = tables[0], list(parquet_rows(tables))
    items = []
    first = 0 if any(str(row.get("Index")) == "0" for row in rows) else 1
    for number, row in enumerate(rows, 1):
        required(row, ("Question", "Options", "Correct Answer"), source, number)
        index = int(number if row.get("Index") in (None, "") else row["Index"])
        prompt, letters = ask_options(str(row["Question"]), _bracketed(str(row["Options"]), source, number))
        truth = {"answer": _letter(row["Correct Answer"]), "options": letters}
        items.append(
            Item(str(index), prompt, _pictures([row["image"]]), truth, {"pair": f"{(index - first) // 2:03d}"})
        )
    return Task("mmvp", unique(items, source))


def _bracketed(text: str, source: Path, number: int) -> list[str]:
    found = [match[2].strip() for match in BRACKETED.finditer(text)]
    if len(found) < 2:
        raise DataError(f"{source}, row {number}: no options like (a) ... (b) ... in {text!r}")
    return found


def _letter(answer: Any) -> str:
    return re.sub(r"[^A-Za-z]", "", str(answer))[:1].upper()


def _pictures(cells: Sequence[Picture | None]) -> tuple[Picture, ...]:
    return tuple(cell for cell in cells if cell is not None)


def _numbered(row: Row) -> tuple[Picture, ...]:
    """image_1 .. image_9, and image."""
    return _pictures([row.get(name) for name in ("image", *(f"image_{n}" for n in range(1, 10)))])


def blink(options: TaskOptions) -> Task:
    """`SUBTASK/val-*.parquet`; the data set's own prompts."""
    root, split = data_of(options, "blink"), options.split or "val"
    tables = parquet_files(root, f"*/{split}-*.parquet", f"data/{split}-*.parquet", f"{split}-*.parquet")
    if not tables:
        raise nothing_found("blink", root, f"Relative_Depth/{split}-*.parquet")
    items = []
    for number, row in enumerate(parquet_rows(tables), 1):
        required(row, ("prompt", "answer", "choices"), root, number)
        truth = {"answer": _letter(row["answer"]), "options": lettered([str(text) for text in row["choices"]])}
        key = str(row.get("idx", number))
        group = {"sub_task": row.get("sub_task") or ""}
        items.append(Item(key, f"{str(row['prompt']).strip()}{LETTER}", _numbered(row), truth, group))
    if any(item.truth["answer"] not in item.truth["options"] for item in items):
        raise DataError(f"{root}: split {split!r} has no answers (BLINK publishes those of val only); use --split val")
    return Task("blink", unique(items, root))


def vstar(options: TaskOptions) -> Task:
    """`test_questions.jsonl` as published, or the folders of images with a JSON file each."""
    root = data_of(options, "vstar")
    source = find(root, "test_questions.jsonl")
    if source is None:
        return Task(
            "vstar",
            unique(_vstar_folders(root, options.images or root), root),
            note="options in a fixed shuffled order",
        )
    items = []
    for number, row in enumerate(json_lines(source), 1):
        required(row, ("image", "text", "label"), source, number)
        text = str(row["text"]).strip()
        listed = BRACKETED.findall(text.removesuffix(LETTER.strip()).strip())
        truth = {
            "answer": _letter(row["label"]),
            "options": {letter.upper(): words.strip() for letter, words in listed},
        }
        picture = FilePicture((options.images or root) / row["image"])
        prompt = text if text.endswith(LETTER.strip()) else f"{text}{LETTER}"
        group = {"category": row.get("category") or str(row["image"]).split("/")[0]}
        items.append(Item(str(row.get("question_id", number)), prompt, (picture,), truth, group))
    return Task("vstar", unique(items, source))


def _vstar_folders(root: Path, images: Path) -> Iterator[Item]:
    import hashlib

    for source in sorted(root.glob("*/*.json")):
        row = read_json(source)
        required(row, ("question", "options"), source, 1)
        # the right option comes first in these files: move it to a place that follows from the name
        given = [str(text) for text in row["options"]]
        turn = hashlib.sha256(source.stem.encode()).digest()[0] % len(given)
        prompt, letters = ask_options(str(row["question"]), given[-turn:] + given[:-turn] if turn else given)
        beside = images / source.relative_to(root)
        picture = next((p for e in (".jpg", ".png", ".jpeg") if (p := beside.with_suffix(e)).exists()), None)
        pictures = (FilePicture(picture or beside.with_suffix(".jpg")),)
        truth = {"answer": LETTERS[turn], "options": letters}
        key = f"{source.parent.name}/{source.stem}"
        yield Item(key, prompt, pictures, truth, {"category": source.parent.name})


def mmstar(options: TaskOptions) -> Task:
    """parquet (`mmstar.parquet`, `data/val-*.parquet`) or VLMEvalKit's TSV."""
    root = data_of(options, "mmstar")
    tables = parquet_files(root, "mmstar.parquet", "data/val-*.parquet", "*.parquet")
    source = tables[0] if tables else (root if root.suffix == ".tsv" else find(root, "MMStar.tsv", "*.tsv"))
    if source is None:
        raise nothing_found("mmstar", root, "mmstar.parquet", "data/val-*.parquet", "MMStar.tsv")
    items = []
    for number, row in enumerate(parquet_rows(tables) if tables else separated(source), 1):
        required(row, ("question", "answer"), source, number)
        cell = row.get("image")
        picture = base64_picture(cell, source, f"row {number}") if isinstance(cell, str) else cell
        if given := _given(row):
            prompt, letters = ask_options(str(row["question"]), given)
        else:
            prompt, letters = f"{str(row['question']).strip()}{LETTER}", _written(str(row["question"]))
        truth = {"answer": _letter(row["answer"]), "options": letters}
        group = {"category": row.get("category") or "", "l2": row.get("l2_category") or ""}
        items.append(Item(str(row.get("index", number)), prompt, _pictures([picture]), truth, group))
    return Task("mmstar", unique(items, source))


def _written(question: str) -> dict[str, str]:
    """Options written into the question: `Options: A: red, B: blue`; letters without text if they cannot be told."""
    found = re.findall(r"(?:^|[\s,])\(?([A-H])[:.)]\s*(.*?)(?=[\s,]+\(?[A-H][:.)]\s|\s*$)", question, re.DOTALL)
    return {letter: text.strip().rstrip(",") for letter, text in found} or dict.fromkeys("ABCD", "")


def av_odyssey(options: TaskOptions) -> Task:
    """Parquet parts, image and text only: the audio is not given to the model, video items are left out."""
    root = data_of(options, "av-odyssey")
    tables = parquet_files(root, "*.parquet", "data/*.parquet", "**/*.parquet")
    if not tables:
        raise nothing_found("av-odyssey", root, "av_odyssey_part1.parquet")
    items, left_out = [], 0
    for number, row in enumerate(parquet_rows(tables), 1):
        required(row, ("question_id", "question", "answer"), root, number)
        pictures = _numbered(row)
        if "video" in str(row.get("data_type") or "") or not pictures:
            left_out += 1
            continue
        given = row.get("options") or [row.get(f"option_{letter}") for letter in "ABCD"]
        prompt, letters = ask_options(
            str(row["question"]), [re.sub(r"^[A-D][.:)]\s*", "", str(text)) for text in given]
        )
        group = {"subfield": row.get("subfield") or "", "question_type": str(row.get("question_type_id") or "")}
        truth = {"answer": _letter(row["answer"]), "options": letters}
        items.append(Item(str(row["question_id"]), prompt, pictures, truth, group))
    note = f"vision only: no audio is given, {left_out} items with video or without images are left out"
    return Task("av-odyssey", unique(items, root), note=note)
