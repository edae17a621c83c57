"""Trace the export modules and write them in the transformers.js layout."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.declare import GraphSpec, decoder_spec, embed_spec, example_inputs, vision_spec
from export.precision import KINDS, Algorithm, Flavour, Precision
from export.sizes import describe, tensor_bytes
from export.stages import Stages, code_sha256, student_key
from export.student import Facts, Student, read_config
from vlm import allocator
from vlm.errors import GateFailed
from vlm.files import read_json

if TYPE_CHECKING:
    from torch import nn

    from export.linear import Range

OPSET = 18
# what wrote a graph: another version of one of them writes it again
TOOLS = ("torch", "transformers", "optimum", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
BLOCK_OPSET = 21  # the first with blocks in DequantizeLinear
INLINE_BYTES = 1024
HEAD_STEP = 16  # of GroupQueryAttention with rotation
CONTRIB = "com.microsoft"
LIST_INPUTS = ("past_key_values", "past")


@dataclass(frozen=True)
class Storage:
    """How weights are kept in the three graphs.

    Attributes:
        ranges: calibration per module path; static 8 bits needs it.
        wide: parts whose residual stream leaves float16 and stays float32.
    """

    precision: Precision
    flavour: Flavour = "portable"
    algorithm: Algorithm = "default"
    ranges: Mapping[str, Range] = field(default_factory=dict)
    wide: frozenset[str] = frozenset()

    def fused(self, facts: Facts) -> bool:
        """Whether the decoder uses ONNX Runtime's operators."""
        return self.flavour == "ort" and not self.obstacle(facts)

    def obstacle(self, facts: Facts) -> str:
        """What ONNX Runtime's operators cannot do: a float32 residual under float16, heads of any width."""
        if "decoder" in self.wide and KINDS[self.precision.decoder].half:
            return "activations beyond float16: plain operators"
        if facts.head_dim % HEAD_STEP:
            return f"head_dim {facts.head_dim} is no multiple of {HEAD_STEP}: plain operators"
        return ""


def trace(module: nn.Module, spec: GraphSpec, student: Student, opset: int = OPSET) -> Any:
    """torch module -> onnx_ir model with the names and symbolic shapes of `spec`; its matrices are read when saved."""
    import torch
    from onnxscript.optimizer import optimize_ir

    from export.hold import fill, held_tensors

    examples = example_inputs(spec, student)
    dynamic = torch.export.Dim.DYNAMIC
    axes = {p.name: {i: dynamic for i, d in enumerate(p.dims) if isinstance(d, str)} for p in spec.inputs}
    feed: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    for port in spec.inputs:
        name = next((n for n in LIST_INPUTS if port.name.startswith((f"{n}.", f"{n}_"))), None)
        if name is None:
            feed[port.name], shapes[port.name] = examples[port.name], axes[port.name]
        else:  # the cache: one list argument
            feed.setdefault(name, []).append(examples[port.name])
            shapes.setdefault(name, []).append(axes[port.name])
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            (),
            kwargs=feed,
            dynamic_shapes=shapes,
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
        )
        waiting = held_tensors(module)
        # a small placeholder must not be folded into a constant before its values are there
        optimize_ir(program.model, should_fold=lambda node: False if _reads(node, waiting) else None)
    _rename(program.model, spec)
    fill(program.model, module)
    return program.model


def _reads(node: Any, names: Container[str]) -> bool:
    return any(value is not None and value.name in names for value in node.inputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter narrates every run: progress on stdout, and warnings about packages we do not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _rename(model: Any, spec: GraphSpec) -> None:
    import onnx_ir as ir

    for node in model.graph:
        node.metadata_props.clear()  # stack traces with the paths of this machine
        node.doc_string = None
        for value in node.outputs:  # traced symbols (s43, s29 + s85) would contradict the declared names
            value.shape = None
            value.metadata_props.clear()
            if node.domain == CONTRIB and not value.uses() and not value.is_graph_output():
                value.name = ""  # an optional output that is named is computed
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for values, ports in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        for value, port in zip(values, ports, strict=True):
            value.name = port.name
            value.shape = ir.Shape(port.dims)
    model.graph.name = "main"
    model.producer_name, model.producer_version = "align-edge", None


def save(model: Any, path: Path) -> list[tuple[Path, str]]:
    """Write a graph and ONE external data file next to it; check it as a reader finds it, by path.

    Returns: the files with their manifest roles, except the graph's own.
    """
    import onnx
    import onnx_ir as ir

    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(path.name + "_data")
    ir.save(model, path, external_data=data.name, size_threshold_bytes=INLINE_BYTES)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise GateFailed(f"{path.name} is not valid ONNX ({str(error).splitlines()[0]})") from error
    return [(data, "external_data")] if data.is_file() else []


@dataclass(frozen=True)
class Graph:
    """One file of the artefact before it is traced.

    Attributes:
        part: of `Precision`, whose kind names the file.
        fallbacks: what could not be stored as asked.
    """

    stem: str
    part: str
    role: str
    spec: GraphSpec
    opset: int
    build: Callable[[], nn.Module]
    fallbacks: dict[str, int]


def graphs(student: Student, options: Storage) -> list[Graph]:
    """The three graphs in writing order."""
    from export.graph import MergedDecoder, VisionEncoder
    from export.graph_ort import FusedDecoder
    from export.linear import EmbedTokens, Recipe

    facts, tokens, chosen = student.facts, student.checkpoint.image.tokens, options.precision

    def recipe(part: str) -> Recipe:
        return Recipe(
            student,
            KINDS[getattr(chosen, part)],
            options.flavour,
            options.algorithm,
            options.ranges,
            wide=part in options.wide,
        )

    vision, embed, decoder = recipe("vision"), recipe("embed"), recipe("decoder")
    if options.flavour == "ort" and (obstacle := options.obstacle(facts)):
        decoder.fell_back(obstacle)
    cache = "float16" if decoder.kind.half else "float32"
    kind = FusedDecoder if options.fused(facts) else MergedDecoder

    def opset(part: str) -> int:
        blocks = options.flavour == "portable" and any(
            KINDS[getattr(chosen, p)].bits < 16 for p in ((part, "head") if part == "decoder" else (part,))
        )
        return BLOCK_OPSET if blocks else OPSET

    made: list[tuple[str, str, str, GraphSpec, Callable[[], nn.Module], dict[str, int]]] = [
        ("vision_encoder", "vision", "vision_encoder", vision_spec(facts, tokens), lambda: VisionEncoder(vision), vision.fallbacks),
        ("embed_tokens", "embed", "embed_tokens", embed_spec(facts), lambda: EmbedTokens(embed), embed.fallbacks),
        ("decoder_model_merged", "decoder", "decoder", decoder_spec(facts, cache), lambda: kind(decoder, KINDS[chosen.head]), decoder.fallbacks),
    ]  # fmt: skip
    return [Graph(s, p, r, spec, opset(p), build, falls) for s, p, r, spec, build, falls in made]


def write_graph(student: Student, graph: Graph, suffix: str, root: Path) -> list[tuple[Path, str]]:
    """Trace one graph and write it with its weights; (file, role) pairs."""
    path = root / "onnx" / f"{graph.stem}{suffix}.onnx"
    return [(path, graph.role), *write_module(graph.build(), graph.spec, student, graph.opset, path)]


def write_module(
    module: nn.Module, spec: GraphSpec, student: Student, opset: int, path: Path
) -> list[tuple[Path, str]]:
    """Trace a module, write it to `path`, and let go of the student; the files but the graph's own, with roles."""
    from export.hold import release

    try:
        return save(trace(module, spec, student, opset), path)
    finally:
        release(module)


def write(
    student: Student, root: Path, options: Storage, stages: Stages
) -> tuple[list[tuple[Path, str]], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Write graphs and transformers.js files under `root`.

    Returns: (file, role) pairs, and the manifest's `io`, `precision` and weight counts for `model`.
    """
    from export.graph_ort import ROTARY_POSITIONS

    files: list[tuple[Path, str]] = []
    planned, of_student = graphs(student, options), student_key(student.checkpoint)
    for graph in planned:
        allocator.give_back()  # what calibration, or the graph before, has freed
        kind = KINDS[getattr(options.precision, graph.part)]
        key = stage_key(student, options, graph, of_student)
        files += stages.files(graph.stem, key, root, lambda folder, g=graph, k=kind: write_graph(student, g, k.suffix, folder), graph.fallbacks)  # type: ignore[misc]  # fmt: skip
    io = {graph.stem: graph.spec.to_json() for graph in planned}
    paths = {role: path for path, role in files}
    section, counts = describe(student, paths, options.precision, {graph.role: graph.fallbacks for graph in planned})
    if options.fused(student.facts):  # the operator reads its angles from a table
        counts["context_length"] = min(student.facts.context_length, ROTARY_POSITIONS)
    return files + write_configs(student, root, files, options.precision), io, section, counts


def stage_key(student: Student, options: Storage, graph: Graph, of_student: list[Any]) -> dict[str, Any]:
    """Everything the bytes of one graph depend on, this program's own text included."""
    folds = hashlib.sha256()
    for path, fold in sorted(student.folds.items()):
        for scale in (fold.input, fold.output):
            folds.update(path.encode() + (b"" if scale is None else scale.numpy().tobytes()))
    for path, seen in sorted(options.ranges.items()):
        folds.update(f"{path} {seen.low} {seen.high}".encode() + seen.power_K.numpy().tobytes())
    versions = [importlib.metadata.version(name) for name in TOOLS]
    return {
        "student": of_student,
        "graph": graph.stem,
        "precision": [
            getattr(options.precision, p) for p in (graph.part, "head")[: 2 if graph.part == "decoder" else 1]
        ],
        "options": [options.flavour, options.algorithm, sorted(options.wide)],
        "calibration": folds.hexdigest(),
        "code": code_sha256(),
        "versions": versions,
    }


def write_configs(
    student: Student, root: Path, graphs_written: list[tuple[Path, str]], precision: Precision
) -> list[tuple[Path, str]]:
    """Configuration, tokenizer and processor files as transformers.js 4 reads them.

    It wants a `preprocessor_config.json`, the chat template inside `tokenizer_config.json`, both spellings of the
    image token. Its processor ignores `vision_feature_select_strategy`, so a dropped CLS token is already taken off
    the additional tokens and the strategy reads `full`: JavaScript and Python then count the same.
    """
    source = student.checkpoint.directory
    config = dict(student.checkpoint.config)
    image_id = student.checkpoint.tokenizer.spec.image_token_id
    external = [path.name.removesuffix("_data") for path, role in graphs_written if role == "external_data"]
    config.update(image_token_index=image_id, image_token_id=image_id)
    config["transformers.js_config"] = {
        "use_external_data_format": dict.fromkeys(external, 1),
        "dtype": {
            "vision_encoder": KINDS[precision.vision].dtype,
            "embed_tokens": KINDS[precision.embed].dtype,
            "decoder_model_merged": KINDS[precision.decoder].dtype,
        },
    }
    processor = _read(source / "processor_config.json")
    preprocessor = _read(source / "preprocessor_config.json") or dict(processor.pop("image_processor", {}))
    drop_first = student.facts.select == "default"  # of a CLIP tower it is the class token
    additional = int(processor.get("num_additional_image_tokens", 1 if student.facts.tower == "clip" else 0))
    shared = {
        "processor_class": "LlavaProcessor",
        "patch_size": read_config(student.checkpoint).vision_config.patch_size,
        "vision_feature_select_strategy": "full" if drop_first else student.facts.select,
        "num_additional_image_tokens": additional - drop_first,
    }
    tokenizer = _read(source / "tokenizer_config.json")
    tokenizer.update(
        tokenizer_class="PreTrainedTokenizerFast", chat_template=student.checkpoint.tokenizer.spec.template
    )
    written = {
        "config.json": config,
        "preprocessor_config.json": {**preprocessor, **shared},
        "processor_config.json": {**processor, **shared},
        "tokenizer_config.json": tokenizer,
    }
    for name, value in written.items():
        (root / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", root / "generation_config.json")
        written["generation_config.json"] = {}
    return [(root / name, "config") for name in written]


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def weight_bytes(path: Path) -> tuple[list[int], int]:
    """Bytes of each tensor of a float graph, and how many weights it holds."""
    import math

    import onnx

    tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    return [tensor_bytes(t) for t in tensors], sum(math.prod(t.dims) for t in tensors)
