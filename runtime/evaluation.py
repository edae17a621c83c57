"""One evaluation on disk: which model answered which questions, line by line, so that a killed run goes on.

A run directory holds `run.json` (what was asked of what), `predictions.jsonl` (one line per answer, written as it is
given), and once complete `samples.jsonl` (with scores) and `result.json`. Replies are kept as they came: scoring them
again, in another mode, needs no model.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from runtime.api import ContextOverflow, Done, EncodedImage, ModelFailed, QueueFull, Sampling
from runtime.batch import Batches, ask_batch
from runtime.engine import Engine
from runtime.images import question
from runtime.tasks.base import Item, Picture, Task, fingerprint
from vlm.console import Progress
from vlm.errors import BadImage, DataError, UserError
from vlm.files import write_atomic
from vlm.manifest import NAME as MANIFEST
from vlm.manifest import read_manifest

JUDGED = "mme-reasoning"  # whose open questions no rule decides well
SCHEMA = "vlm-eval/1"
SYNC_S = 2.0  # at most so many seconds of answers are lost when the power goes
RETRIES = 4
# files a checkpoint's answers depend on
CHECKPOINT_FILES = ("*.safetensors", "*config.json", "tokenizer*.json", "special_tokens_map.json", "*.jinja")


@dataclass(frozen=True)
class Identity:
    """What a run must have in common with the one it goes on from; each part is compared and named."""

    task: str
    artefact: str
    backend: str
    data: str
    settings: str

    def differences(self, other: dict[str, Any]) -> list[str]:
        return [name for name, value in vars(self).items() if other.get(name) != value]


def artefact_digest(artefact: Path) -> str:
    """Digest of everything on disk that the answers of an artefact or checkpoint depend on.

    An artefact's manifest lists the hashes of its files, and loading it checks them.
    """
    digest = hashlib.sha256()
    if (artefact / MANIFEST).is_file():
        manifest = read_manifest(artefact)
        listed = sorted((str(entry.path), entry.sha256) for entry in manifest.files if "golden" not in entry.role)
        digest.update(json.dumps([listed, manifest.image, manifest.chat], sort_keys=True, default=str).encode())
        return digest.hexdigest()
    for path in sorted({path for pattern in CHECKPOINT_FILES for path in artefact.glob(pattern)}):
        digest.update(path.name.encode())
        with path.open("rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Checked:
    """Items with their digests, and the pictures that cannot be read."""

    digests: tuple[str, ...]
    whole: str
    missing: tuple[str, ...]


def check_items(items: Sequence[Item]) -> Checked:
    """Read every picture once: digest of the data, and which pictures are not there."""
    known: dict[Picture, str] = {}
    missing: list[str] = []
    progress = Progress(len(items), "check data")

    def digest_of(picture: Picture) -> str:
        if picture not in known:
            try:
                image = picture.read()
                known[picture] = (
                    hashlib.sha256(image.data).hexdigest() if isinstance(image, EncodedImage) else image.digest
                )
            except BadImage:
                missing.append(picture.name)
                known[picture] = "missing"
        return known[picture]

    digests = []
    for digest in fingerprint(items, digest_of):
        digests.append(digest)
        progress.advance()
    return Checked(tuple(digests), hashlib.sha256("\n".join(digests).encode()).hexdigest(), tuple(missing))


def json_line(value: dict[str, Any]) -> bytes:
    """One line; half a character from a remote server is written as its escape."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


class Run:
    """A run directory, held by one process at a time."""

    def __init__(
        self, root: Path, identity: Identity, items: Sequence[Item], digests: Sequence[str], fresh: bool = False
    ) -> None:
        """Start a run, or go on with one that has the same identity.

        Args:
            fresh: forget what is there, if it is an evaluation.

        Raises:
            UserError: the directory belongs to another run, or another process works on it.
        """
        self.root, self._digests = root, {i.id: d for i, d in zip(items, digests, strict=True)}
        self.answers: dict[str, dict[str, Any]] = {}
        try:
            if root.exists() and any(root.iterdir()) and not (root / "run.json").exists():
                raise UserError(f"{root} is not empty and holds no evaluation; choose another --out")
            root.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = (root / "predictions.jsonl").open("ab+")
        except OSError as error:
            raise UserError(f"cannot write to {root} ({error.strerror}); choose another --out") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(f"another process evaluates into {root}; wait for it or choose another --out") from None
        try:
            if fresh:
                self._clear()
            self._head(identity)
            self._read()
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def _clear(self) -> None:
        self._file.truncate(0)
        for name in ("run.json", "samples.jsonl", "result.json", "judged.jsonl", "submission.xlsx"):
            (self.root / name).unlink(missing_ok=True)

    def _head(self, identity: Identity) -> None:
        head = self.root / "run.json"
        if head.exists():
            try:
                other = json.loads(head.read_text())
            except ValueError:
                raise UserError(f"{head} is damaged; add --fresh to start over, or choose another --out") from None
            if changed := identity.differences(other):
                raise UserError(
                    f"{self.root} holds answers for another {' and '.join(changed)}; they cannot be mixed: "
                    "choose another --out, or add --fresh to start over"
                )
            return
        write_atomic(head, json.dumps({"schema": SCHEMA, **vars(identity)}, indent=1) + "\n")

    def _read(self) -> None:
        """Take over complete lines; a line cut off by a crash is dropped."""
        self._file.seek(0)
        kept = 0
        for line in self._file:
            try:
                answer = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                answer = None
            if not isinstance(answer, dict):
                break
            if self._digests.get(str(answer.get("id"))) != answer.get("item"):
                raise DataError(
                    f"{self.root}: the question {answer.get('id')!r} has changed; add --fresh to start over"
                )
            self.answers[str(answer["id"])] = answer
            kept += len(line)
        self._file.truncate(kept)
        self._file.seek(0, os.SEEK_END)

    def add(self, item: Item, answer: dict[str, Any]) -> None:
        """Append one answer; on disk at most SYNC_S later."""
        whole = {"id": item.id, "item": self._digests[item.id], **answer}
        self._file.write(json_line(whole))
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_S:
            self.sync()
        self.answers[item.id] = whole

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        self._file.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask(engine: Engine, item: Item, max_new_tokens: int) -> dict[str, Any]:
    """One greedy answer; the reply is {prediction, finish, tokens, ms}, or {error} where it could not be asked.

    Embeddings of an image that comes up again are kept where that changes nothing: one image, and our own backend.
    """
    try:
        pictures = [picture.read() for picture in item.pictures]
    except BadImage as error:
        return {"prediction": "", "error": "image_missing", "cause": error.message}
    reuse = "images" if len(pictures) == 1 and engine.info.device != "remote" else "none"
    sampling = Sampling(max_new_tokens=max_new_tokens)
    for attempt in range(RETRIES):
        try:
            events = engine.complete([question(item.prompt, *pictures)], sampling, reuse=reuse)  # type: ignore[arg-type]
            break
        except BadImage as error:
            return {"prediction": "", "error": "image_damaged", "cause": error.message}
        except ContextOverflow as error:
            return {"prediction": "", "error": "context_overflow", "cause": error.message}
        except (QueueFull, ModelFailed):  # somebody else's server is busy, or stumbled
            if attempt == RETRIES - 1 or engine.info.device != "remote":
                raise
            time.sleep(0.5 * 2**attempt)
    done = events[-1]
    if not isinstance(done, Done):
        raise RuntimeError("the request did not finish")
    ms = (done.spans[-1].end_ns - done.received_ns) / 1e6 if done.spans else 0.0
    return {
        "prediction": done.text.strip(),
        "finish": done.finish,
        "tokens": done.usage.completion_tokens,
        "ms": round(ms, 3),
    }


def _left(run: Run, task: Task) -> tuple[list[Item], Progress]:
    left = [item for item in task.items if item.id not in run.answers]
    done = len(task.items) - len(left)
    return left, Progress(len(left), f"eval {task.name}" + (f" ({done} kept)" if done else ""))


def answer_in_batches(run: Run, task: Task, backend: Batches, max_new_tokens: int, size: int) -> None:
    """Ask what is not answered yet, `size` questions at a time; prompts of similar length together."""
    left, progress = _left(run, task)
    left.sort(key=lambda item: len(item.prompt))
    for start in range(0, len(left), size):
        some = left[start : start + size]
        for item, answer in zip(some, ask_batch(backend, some, max_new_tokens), strict=True):
            run.add(item, answer)
        progress.advance(len(some))


def answer_all(run: Run, task: Task, engines: Sequence[Engine], max_new_tokens: int) -> None:
    """Ask what is not answered yet, as many at a time as there are engines; answers are kept as they come."""
    left, progress = _left(run, task)
    idle: queue.SimpleQueue[Engine] = queue.SimpleQueue()
    for engine in engines:
        idle.put(engine)

    def work(item: Item) -> dict[str, Any]:
        engine = idle.get()
        try:
            return ask(engine, item, max_new_tokens)
        finally:
            idle.put(engine)

    for item, answer in _in_flight(work, left, len(engines)):
        run.add(item, answer)
        progress.advance()


def _in_flight(
    work: Callable[[Item], dict[str, Any]], items: Sequence[Item], width: int
) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Results as they come, with never more than `width` items begun."""
    if width == 1:
        for item in items:
            yield item, work(item)
        return
    with ThreadPoolExecutor(width) as pool:
        running: dict[Future[dict[str, Any]], Item] = {}
        left = iter(items)
        try:
            while True:
                while len(running) < width and (new := next(left, None)) is not None:
                    running[pool.submit(work, new)] = new
                if not running:
                    return
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(cancel_futures=True)
