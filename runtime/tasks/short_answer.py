"""GQA, TextVQA, POPE and MME: official files, LLaVA's eval folders, and the data sets' parquet form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.tasks.base import (
    SHORT,
    FilePicture,
    Item,
    Picture,
    Task,
    TaskOptions,
    data_of,
    find,
    nothing_found,
    unique,
)
from runtime.tasks.tables import Row, json_lines, parquet_files, parquet_rows, read_json, required
from vlm.errors import DataError
from vlm.scoring.summary import MME_COGNITION, MME_PERCEPTION

IMAGE_ENDINGS = (".jpg", ".png", ".jpeg", ".JPEG", ".JPG", ".webp")
YES_NO = ("yes", "no")
MME_CATEGORIES = (*MME_PERCEPTION, *MME_COGNITION)


def gqa(options: TaskOptions) -> Task:
    """`{split}_questions.json` with `images/`, or parquet `{split}_instructions` with `{split}_images`."""
    root, split = data_of(options, "gqa"), options.split or "testdev_balanced"
    tables = parquet_files(root, f"{split}_instructions/*.parquet", f"data/{split}_instructions/*.parquet")
    if tables:
        images = parquet_files(root, f"{split}_images/*.parquet", f"data/{split}_images/*.parquet")
        pictures = {str(row["id"]): row["image"] for row in parquet_rows(images)}
        rows = [(str(row["id"]), row, pictures.get(str(row["imageId"]))) for row in parquet_rows(tables)]
    else:
        name = f"{split}_questions.json"
        source = find(root, name, f"data/{name}", f"questions/{name}", f"data/questions1.2/{name}")
        if source is None:
            raise nothing_found("gqa", root, name, f"{split}_instructions/*.parquet")
        folder = options.images or find(root, "images", "data/images") or root / "images"
        questions = read_json(source)
        if not isinstance(questions, dict):
            raise DataError(f"{source} holds no object of questions; this is not GQA's file")
        rows = [(key, row, FilePicture(folder / f"{row.get('imageId')}.jpg")) for key, row in questions.items()]
    items = []
    for number, (key, row, picture) in enumerate(rows, 1):
        required(row, ("question", "answer"), root, number)
        types = row.get("types") or {}
        structural = types.get("structural") or ""
        group = {
            "form": "open" if structural == "query" else "binary" if structural else "",
            "structural": structural,
            "semantic": types.get("semantic") or "",
        }
        truth = {"answer": str(row["answer"])}
        items.append(Item(key, f"{row['question']}{SHORT}", _one(picture, f"image {row.get('imageId')}"), truth, group))
    return Task("gqa", unique(items, root))


def _one(picture: Picture | None, name: str) -> tuple[Picture, ...]:
    return (picture if picture is not None else FilePicture(Path(name)),)


def textvqa(options: TaskOptions) -> Task:
    """`TextVQA_0.5.1_val.json` with `train_images/`; with LLaVA's jsonl beside it the prompts name its OCR tokens."""
    root, split = data_of(options, "textvqa"), options.split or "val"
    source = find(root, f"TextVQA_0.5.1_{split}.json")
    if source is None:
        tables = parquet_files(root, f"data/{_parquet_split(split)}-*.parquet", f"{_parquet_split(split)}-*.parquet")
        if not tables:
            raise nothing_found("textvqa", root, f"TextVQA_0.5.1_{split}.json", "data/validation-*.parquet")
        rows = list(parquet_rows(tables))
        asked: dict[tuple[str, str], str] = {}
    else:
        rows = read_json(source)["data"]
        folder = options.images or find(root, "train_images", "images") or root / "train_images"
        rows = [{**row, "image": FilePicture(folder / f"{row.get('image_id')}.jpg")} for row in rows]
        asked = _llava_prompts(find(root, f"llava_textvqa_{split}_v051_ocr.jsonl"))
    items = []
    for number, row in enumerate(rows, 1):
        required(row, ("question", "image_id", "answers"), root, number)
        question = str(row["question"])
        plain = f"{question[:1].upper()}{question[1:]}{SHORT}"
        prompt = asked.get((str(row["image_id"]), question.lower()), plain)
        key = str(row.get("question_id", number))
        answers = [str(answer) for answer in row["answers"]]
        items.append(Item(key, prompt, _one(row.get("image"), row["image_id"]), {"answers": answers}))
    used = sum((str(row["image_id"]), row["question"].lower()) in asked for row in rows)
    note = (
        f"{used} of {len(rows)} prompts name OCR tokens, as LLaVA 1.5 does" if asked else "prompts without OCR tokens"
    )
    return Task("textvqa", unique(items, root), note=note)


def _parquet_split(split: str) -> str:
    return {"val": "validation"}.get(split, split)


def _llava_prompts(path: Path | None) -> dict[tuple[str, str], str]:
    """(image id, question in lower case) -> prompt, from LLaVA's question file."""
    found: dict[tuple[str, str], str] = {}
    for row in json_lines(path) if path else []:
        text = str(row["text"])
        lines = text.split("\n")
        question = lines[1] if lines[0].startswith("Reference OCR token:") else lines[0]
        found[str(row["question_id"]), question.lower()] = text
    return found


POPE_SPLITS = ("random", "popular", "adversarial")


def pope(options: TaskOptions) -> Task:
    """`coco_pope_{random,popular,adversarial}.json` with `val2014/`, or parquet with a category column."""
    root = data_of(options, "pope")
    wanted = (options.split,) if options.split else POPE_SPLITS
    tables = parquet_files(root, "data/test-*.parquet", "Full/*.parquet", "test-*.parquet", "*.parquet")
    items = list(_pope_parquet(tables, wanted) if tables else _pope_files(root, options, wanted))
    if not items:
        raise nothing_found("pope", root, "coco/coco_pope_random.json", "data/test-*.parquet")
    return Task("pope", unique(items, root))


def _pope_files(root: Path, options: TaskOptions, wanted: tuple[str, ...]) -> Iterator[Item]:
    folder = options.images or find(root, "val2014", "images", "coco/val2014") or root / "val2014"
    for split in wanted:
        source = find(
            root, f"coco/coco_pope_{split}.json", f"coco_pope_{split}.json", f"output/coco/coco_pope_{split}.json"
        )
        for number, row in enumerate(json_lines(source) if source else [], 1):
            required(row, ("text", "label", "image"), source or root, number)
            yield _pope_item(
                f"{split}/{row.get('question_id', number)}",
                row["text"],
                row["label"],
                split,
                FilePicture(folder / row["image"]),
            )


def _pope_parquet(tables: list[Path], wanted: tuple[str, ...]) -> Iterator[Item]:
    for number, row in enumerate(parquet_rows(tables), 1):
        required(row, ("question", "answer", "category"), tables[0], number)
        if (split := str(row["category"])) in wanted:
            key = f"{split}/{row.get('question_id', number)}"
            yield _pope_item(key, row["question"], row["answer"], split, row["image"])


def _pope_item(key: str, question: str, label: str, split: str, picture: Picture | None) -> Item:
    answer = str(label).strip().lower()
    # the original takes every label that is not "no" for a yes
    truth = {"answer": "no" if answer == "no" else "yes"}
    return Item(key, f"{question.strip()}{SHORT}", _one(picture, f"image of {key}"), truth, {"split": split})


def mme(options: TaskOptions) -> Task:
    """`MME_Benchmark_release_version/CATEGORY/` with a text file of two questions per image, or parquet."""
    root = data_of(options, "mme")
    tables = parquet_files(root, "data/test-*.parquet", "test-*.parquet", "*.parquet")
    items = unique(_mme_parquet(tables) if tables else _mme_folders(root, options.images), root)
    _check_pairs(items, root)
    return Task("mme", items)


def _check_pairs(items: tuple[Item, ...], root: Path) -> None:
    counts: dict[str, int] = {}
    for item in items:
        counts[item.group["image_key"]] = counts.get(item.group["image_key"], 0) + 1
    if odd := [name for name, count in counts.items() if count != 2]:
        raise DataError(f"{root}: {odd[0]} has {counts[odd[0]]} questions; MME has two per image")


def _mme_item(category: str, image: str, number: int, row: Row, picture: Picture | None) -> Item:
    question = str(row["question"]).replace("Please answer yes or no.", "").strip()
    answer = str(row["answer"]).strip().rstrip(".").lower()
    if answer not in YES_NO:
        raise DataError(f"{category}/{image}: the answer is {row['answer']!r}; MME's are Yes and No")
    key = f"{category}/{image}"
    group = {"category": category, "image": image, "image_key": key}
    return Item(f"{key}#{number}", f"{question}{SHORT}", _one(picture, key), {"answer": answer}, group)


def _mme_parquet(tables: list[Path]) -> Iterator[Item]:
    counts: dict[str, int] = {}
    for number, row in enumerate(parquet_rows(tables), 1):
        required(row, ("question", "answer", "category", "question_id"), tables[0], number)
        name = str(row["question_id"])
        counts[name] = counts.get(name, 0) + 1
        yield _mme_item(str(row["category"]), name.rpartition("/")[2], counts[name], row, row["image"])


def _mme_folders(root: Path, images: Path | None) -> Iterator[Item]:
    release = "MME_Benchmark_release_version"
    base = find(root, f"{release}/MME_Benchmark", release, "MME_Benchmark") or root
    # the release brings texts of its own, with results of models
    texts = [path for name in sorted(MME_CATEGORIES) for path in sorted((base / name).glob("**/*.txt"))]
    if not texts:
        raise nothing_found("mme", root, "MME_Benchmark_release_version/CATEGORY/*.txt", "data/test-*.parquet")
    for text in texts:
        category = text.relative_to(base).parts[0]
        folders = [text.parent, base / category / "images", base / category]
        if images is not None:
            folders = [images / category / "images", images / category, images]
        places = [folder / f"{text.stem}{ending}" for folder in folders for ending in IMAGE_ENDINGS]
        picture = FilePicture(next((place for place in places if place.exists()), places[0]))
        lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            question, tab, answer = line.rpartition("\t")
            if not tab:
                raise DataError(f"{text}, line {number}: no tab between question and answer")
            row: dict[str, Any] = {"question": question, "answer": answer}
            yield _mme_item(category, picture.path.name, number, row, picture)
