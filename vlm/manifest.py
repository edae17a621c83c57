"""The artefact manifest (`vlm-artifact/1`): what every exporter writes and every runtime reads. Stdlib only."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.errors import ArtifactError
from vlm.files import sha256_file, write_atomic

SCHEMA = "vlm-artifact/1"
NAME = "manifest.json"
FORMATS = ("onnx", "gguf", "tensorrt")


@dataclass(frozen=True)
class FileEntry:
    """One file of the artefact; `path` is relative to the manifest, `role` says what it is for.

    Roles: vision_encoder, embed_tokens, decoder, external_data, text_gguf, mmproj, imatrix, build_plan,
    build_script, build_script_part, tokenizer, chat_template, config, card, golden_image, reference.
    """

    path: str
    role: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Golden:
    """One image and question with the greedy token ids PyTorch gave; replayed by `export verify`."""

    image: str
    question: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime must know about an artefact, so that nothing is guessed from names or defaults.

    Attributes:
        source: student weights sha256, teacher, data set, objective, recipe, licence.
        io: per graph, the inputs and outputs: `{graph: {"inputs": [[name, dtype, shape]...], "outputs": [...]}}`.
        precision: per component: type, real bits per weight, fallbacks taken.
        image: `dataclasses.asdict(vlm.preprocess.ImageSpec)`.
        chat: `dataclasses.asdict(vlm.chat.ChatSpec)`.
        model: numbers a backend or profiler needs (layers, kv_heads, head_dim, vocab_size, context_length, ...).
        pair_id: one value shared by files that only work together.
        parity, accuracy: measured at export; `verified` is true only if every gate held.
    """

    format: str
    created: str
    tools: dict[str, str]
    source: dict[str, Any]
    files: tuple[FileEntry, ...]
    io: dict[str, Any]
    precision: dict[str, Any]
    image: dict[str, Any]
    chat: dict[str, Any]
    model: dict[str, Any]
    pair_id: str
    golden: tuple[Golden, ...]
    verified: bool = False
    parity: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    schema: str = SCHEMA

    def path_of(self, root: Path, role: str) -> Path:
        """Path of the only file with this role.

        Raises:
            ArtifactError: none or several files have it.
        """
        found = [entry.path for entry in self.files if entry.role == role]
        if len(found) != 1:
            raise ArtifactError(
                f"{root / NAME} lists {len(found)} files with role {role!r}, expected one; export again"
            )
        return root / found[0]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def file_entry(root: Path, path: Path, role: str) -> FileEntry:
    return FileEntry(path.relative_to(root).as_posix(), role, path.stat().st_size, sha256_file(path))


def write_manifest(root: Path, manifest: Manifest) -> None:
    write_atomic(root / NAME, manifest.to_json())


def read_manifest(root: Path) -> Manifest:
    """Read and type-check `root/manifest.json`; files are not hashed (see `check_files`).

    Raises:
        ArtifactError: no artefact there, broken JSON, another schema, unknown or missing keys.
    """
    path = root / NAME
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            f"{root} is not an artefact (no {NAME}); make one with `python -m export --target onnx`"
        ) from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ArtifactError(f"{path} is damaged (not JSON); export again") from None
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        seen = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise ArtifactError(f"{path} has schema {seen!r}, this version reads {SCHEMA!r}; export again")
    names = {f.name for f in dataclasses.fields(Manifest)}
    required = {f.name for f in dataclasses.fields(Manifest) if f.default is f.default_factory is dataclasses.MISSING}
    if unknown := sorted(set(value) - names):
        raise ArtifactError(f"{path} has unknown key {unknown[0]!r}; export again with this version")
    if missing := sorted(required - set(value)):
        raise ArtifactError(f"{path} lacks key {missing[0]!r}; export again")
    if value["format"] not in FORMATS:
        raise ArtifactError(f"{path} has format {value['format']!r}, known: {', '.join(FORMATS)}")
    try:
        files = tuple(FileEntry(**entry) for entry in value.pop("files"))
        golden = tuple(Golden(g["image"], g["question"], tuple(g["token_ids"])) for g in value.pop("golden"))
    except (TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); export again") from None
    for name in ("tools", "source", "io", "precision", "image", "chat", "model", "parity", "accuracy"):
        if not isinstance(value.get(name, {}), dict):
            raise ArtifactError(f"{path}: {name!r} is a {type(value[name]).__name__}, expected an object; export again")
    return Manifest(files=files, golden=golden, **value)


def check_files(root: Path, manifest: Manifest) -> None:
    """Compare every listed file with its recorded size and hash.

    Raises:
        ArtifactError: names the first file that is missing, truncated, altered or outside the artefact.
    """
    for entry in manifest.files:
        path = root / entry.path
        if not path.resolve().is_relative_to(root.resolve()):
            raise ArtifactError(f"{root / NAME} lists {entry.path}, which lies outside the artefact; export again")
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; copy the whole directory or export again")
        size = path.stat().st_size
        if size != entry.bytes:
            raise ArtifactError(f"{path} has {size} bytes, the manifest says {entry.bytes} (truncated?); copy it again")
        if sha256_file(path) != entry.sha256:
            raise ArtifactError(f"{path} was altered (sha256 differs from the manifest); copy it again or export again")
