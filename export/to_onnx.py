"""Trace the export modules and write them in the transformers.js layout."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.declare import GraphSpec, decoder_spec, embed_spec, example_inputs, vision_spec
from export.student import Student
from vlm.errors import GateFailed

if TYPE_CHECKING:
    from torch import nn

OPSET = 18
INLINE_BYTES = 1024
LIST_INPUTS = ("past_key_values", "past")


def trace(module: nn.Module, spec: GraphSpec, student: Student) -> Any:
    """torch module -> onnx_ir model with the names and symbolic shapes of `spec`."""
    import torch

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
            module.eval(), (), kwargs=feed, dynamic_shapes=shapes, dynamo=True, opset_version=OPSET, verbose=False
        )
    _rename(program.model, spec)
    return program.model


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


def graphs(student: Student) -> dict[str, tuple[nn.Module, GraphSpec, str]]:
    """File stem -> module, outside, manifest role."""
    from export.graph import EmbedTokens, MergedDecoder, VisionEncoder

    facts, tokens = student.facts, student.checkpoint.image.tokens
    return {
        "vision_encoder": (VisionEncoder(student), vision_spec(facts, tokens), "vision_encoder"),
        "embed_tokens": (EmbedTokens(student), embed_spec(facts), "embed_tokens"),
        "decoder_model_merged": (MergedDecoder(student), decoder_spec(facts), "decoder"),
    }


def write(student: Student, root: Path) -> tuple[list[tuple[Path, str]], dict[str, Any]]:
    """Write graphs and transformers.js files under `root`.

    Returns: (file, role) pairs, and the manifest's `io`.
    """
    files: list[tuple[Path, str]] = []
    io: dict[str, Any] = {}
    for stem, (module, spec, role) in graphs(student).items():
        path = root / "onnx" / f"{stem}.onnx"
        extra = save(trace(module, spec, student), path)
        files += [(path, role), *extra]
        io[stem] = spec.to_json()
    return files + write_configs(student, root, files), io


def write_configs(student: Student, root: Path, graphs_written: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
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
    config["transformers.js_config"] = {"use_external_data_format": dict.fromkeys(external, 1)}
    processor = _read(source / "processor_config.json")
    preprocessor = _read(source / "preprocessor_config.json") or dict(processor.pop("image_processor", {}))
    drop_cls = student.facts.tower == "clip" and student.facts.select == "default"
    additional = int(processor.get("num_additional_image_tokens", 1 if student.facts.tower == "clip" else 0))
    shared = {
        "processor_class": "LlavaProcessor",
        "patch_size": config["vision_config"]["patch_size"],
        "vision_feature_select_strategy": "full" if drop_cls else student.facts.select,
        "num_additional_image_tokens": additional - drop_cls,
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
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def weight_bytes(path: Path) -> tuple[int, int]:
    """Bytes and number of weights in a graph, from its tensor declarations (external data is not read)."""
    import math

    import onnx

    tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    counts = [math.prod(t.dims) for t in tensors]
    widths = [onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in tensors]
    return sum(c * w for c, w in zip(counts, widths, strict=True)), sum(counts)
