"""Write a student as llama.cpp reads it: one text GGUF and one mmproj (`clip`, projector `mlp`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from export.student import Facts, Student, blocks_used, read_config
from vlm.errors import CheckpointError
from vlm.load import Checkpoint

PAIR_KEY = "align_edge.pair_id"
TEXT_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
VISION_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
# stopping words llama.cpp recognises by name, whatever the end-of-sequence id says
ALWAYS_STOP = ("<|im_end|>", "<|endoftext|>", "<eos>", "</s>", "<PAD>", "[PAD]", "<|eot_id|>", "<EOT>", "<|end|>")


def check(checkpoint: Checkpoint, facts: Facts) -> None:
    """Needs no weights: refuse what the installed llama.cpp computes wrongly or crashes on.

    Raises:
        CheckpointError: one line naming the setting and the way out.
    """
    config, where = read_config(checkpoint), checkpoint.directory
    vision, text = config.vision_config, config.text_config
    for broken, message in (
        (facts.tower == "clip", "llama.cpp computes CLIP towers wrongly (CLS token placed last); use --target onnx"),
        (len(facts.feature_layers) != 1, "several vision_feature_layer values have no GGUF form; use --target onnx"),
        (facts.select != "full", "vision_feature_select_strategy 'default' drops a patch of a SigLIP tower"),
        (vision.hidden_act not in ("gelu_pytorch_tanh", "gelu"), f"vision activation {vision.hidden_act!r}"),
        (config.projector_hidden_act not in ("gelu_pytorch_tanh", "gelu"), "the projector activation is not GELU"),
        (not config.multimodal_projector_bias, "a projector without bias is untested in llama.cpp; use --target onnx"),
        (text.hidden_act != "silu", f"decoder activation {text.hidden_act!r}"),
        (
            text.rope_parameters.get("rope_type", "default") != "default",
            f"rope_type {text.rope_parameters.get('rope_type')!r} is not written to GGUF yet",
        ),
        (
            facts.decoder in ("qwen2", "llama") and facts.head_dim * facts.heads != facts.hidden,
            f"{facts.decoder} with heads x head_dim != hidden does not load; use a qwen3 decoder",
        ),
        (facts.head_dim % 2 == 1, f"head_dim {facts.head_dim} is odd"),
        (facts.decoder == "llama" and getattr(text, "mlp_bias", False), "mlp_bias has no GGUF name"),
    ):
        if broken:
            raise CheckpointError(f"{where} cannot become GGUF: {message}")
    _check_tokenizer(checkpoint, facts)


def _check_tokenizer(checkpoint: Checkpoint, facts: Facts) -> None:
    spec, tokenizer, where = checkpoint.tokenizer.spec, checkpoint.tokenizer.tokenizer, checkpoint.directory
    for name in ALWAYS_STOP:
        token = tokenizer.token_to_id(name)
        if token is not None and token not in spec.eos_token_ids:
            raise CheckpointError(
                f"{where} cannot become GGUF: llama.cpp always stops at {name!r}, but eos_token_id lacks {token}; "
                "add it to generation_config.json"
            )
    highest = max(tokenizer.get_vocab().values())
    if highest >= facts.vocab_size:
        raise CheckpointError(
            f"{where}: token {highest} has no embedding row (vocabulary {facts.vocab_size}); train again"
        )
    model = json.loads((where / "tokenizer.json").read_text())
    if model["model"]["type"] != "BPE" or model.get("normalizer"):
        raise CheckpointError(
            f"{where} cannot become GGUF: only byte-level BPE tokenizers without a normalizer are read identically"
        )
    pre_tokenizer_name(model)


def write_text(student: Student, path: Path, pair_id: str, licence: str) -> None:
    """Text GGUF with float16 matrices, float32 vectors."""
    import gguf

    facts, config = student.facts, student.model.config.text_config
    writer = gguf.GGUFWriter(path, facts.decoder)
    writer.add_type("model")
    writer.add_name(student.checkpoint.directory.name)
    if licence:
        writer.add_license(licence)
    writer.add_string(PAIR_KEY, pair_id)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(facts.vocab_size)
    writer.add_context_length(facts.context_length)
    writer.add_embedding_length(facts.hidden)
    writer.add_block_count(facts.layers)
    writer.add_feed_forward_length(facts.intermediate)
    writer.add_head_count(facts.heads)
    writer.add_head_count_kv(facts.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if facts.decoder == "qwen3":
        writer.add_key_length(facts.head_dim)
        writer.add_value_length(facts.head_dim)
    elif facts.decoder == "llama":
        writer.add_rope_dimension_count(facts.head_dim)
    _add_tokenizer(writer, student)
    for name, array in text_tensors(student):
        writer.add_tensor(name, array)
    _finish(writer)


def _add_tokenizer(writer: Any, student: Student) -> None:
    import gguf

    spec, tokenizer = student.checkpoint.tokenizer.spec, student.checkpoint.tokenizer.tokenizer
    model = json.loads((student.checkpoint.directory / "tokenizer.json").read_text())
    special = student.checkpoint.tokenizer.special_ids
    added = set(tokenizer.get_added_tokens_decoder())
    names = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    taken = set(names.values())
    tokens: list[str] = []
    types: list[int] = []
    for token_id in range(student.facts.vocab_size):
        if token_id in names:
            tokens.append(names[token_id])
            kind = gguf.TokenType.NORMAL
            if token_id in special:
                kind = gguf.TokenType.CONTROL
            elif token_id in added:
                kind = gguf.TokenType.USER_DEFINED
            types.append(kind)
        else:  # embedding rows without a token: llama.cpp wants exactly one name per row, none twice
            name = f"[PAD{token_id}]"
            while name in taken:
                name = f"[{name}]"
            tokens.append(name)
            types.append(gguf.TokenType.UNUSED)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(model))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    end = spec.eos_token_ids[0]
    writer.add_eos_token_id(end)
    bos = tokenizer.token_to_id(spec.bos_token) if spec.bos_token else None
    writer.add_bos_token_id(end if bos is None else bos)  # missing would mean 11, a random token
    writer.add_pad_token_id(spec.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(spec.template)


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the splitting rule of a tokenizer.json.

    Raises:
        CheckpointError: a rule llama.cpp has no exact counterpart for.
    """
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    patterns = [s["pattern"].get("Regex", "") for s in steps if s.get("type") == "Split"]
    if any("\\p{N}{1,3}" in p for p in patterns):
        return "llama-bpe"
    if any("\\p{N}|" in p for p in patterns):
        return "qwen2"
    if any(s.get("type") == "ByteLevel" and s.get("use_regex", True) for s in steps):
        return "gpt-2"
    raise CheckpointError(f"pre-tokenizer {[s.get('type') for s in steps]} has no counterpart in llama.cpp")


def text_tensors(student: Student) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """GGUF names and arrays: matrices float16, vectors float32."""
    model, facts = student.model, student.facts
    language = model.model.language_model
    tensors = [("token_embd.weight", _array(language.embed_tokens.weight))]
    tensors.append(("output_norm.weight", _array(language.norm.weight)))
    if not facts.tied:
        tensors.append(("output.weight", _array(model.lm_head.weight)))
    for index, layer in enumerate(language.layers):
        for name, parameter in layer.named_parameters():
            module, _, kind = name.rpartition(".")
            array = _array(parameter)
            if facts.decoder == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
                array = _interleave(array, facts.heads if "q_proj" in module else facts.kv_heads)
            tensors.append((f"blk.{index}.{TEXT_NAMES[module]}.{kind}", array))
    return tensors


def _interleave(array: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of each head from two halves to neighbouring pairs: arch `llama` rotates (0,1), (2,3), ..."""
    shape = array.shape
    return np.ascontiguousarray(array.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2)).reshape(
        shape
    )


def write_mmproj(student: Student, path: Path, pair_id: str) -> None:
    """Vision tower and projector with float16 matrices."""
    import gguf

    facts, vision, image = student.facts, student.model.config.vision_config, student.checkpoint.image
    blocks = blocks_used(facts, vision.num_hidden_layers)[0]
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_string(PAIR_KEY, pair_id)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)  # without it: QuickGELU
    for key, value in (
        ("image_size", vision.image_size),
        ("patch_size", vision.patch_size),
        ("embedding_length", vision.hidden_size),
        ("feed_forward_length", vision.intermediate_size),
        ("block_count", blocks),
        ("projection_dim", facts.hidden),
        ("attention.head_count", vision.num_attention_heads),
    ):
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    writer.add_array("clip.vision.image_mean", [float(v) for v in image.mean])
    writer.add_array("clip.vision.image_std", [float(v) for v in image.std])
    # named explicitly, or the last block is silently skipped; gguf-py writes Python ints as INT32, as llama.cpp needs
    writer.add_array("clip.vision.feature_layer", [blocks])
    for name, array in vision_tensors(student, blocks):
        writer.add_tensor(name, array)
    _finish(writer)


def vision_tensors(student: Student, blocks: int) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """Only the blocks in use; never the post-layernorm, which llama.cpp would apply to the features."""
    model, vision = student.model.model, student.model.config.vision_config
    tower, projector = model.vision_tower, model.multi_modal_projector
    tensors = [
        ("v.patch_embd.weight", _array(tower.embeddings.patch_embedding.weight)),
        ("v.patch_embd.bias", _array(tower.embeddings.patch_embedding.bias)),
        ("v.position_embd.weight", _array(tower.embeddings.position_embedding.weight).astype(np.float32)),
    ]
    names = dict(VISION_NAMES)
    if vision.intermediate_size == vision.hidden_size:  # llama.cpp then takes them for an old, swapped file
        names["mlp.fc1"], names["mlp.fc2"] = names["mlp.fc2"], names["mlp.fc1"]
    for index, layer in enumerate(tower.encoder.layers[:blocks]):
        for name, parameter in layer.named_parameters():
            module, _, kind = name.rpartition(".")
            tensors.append((f"v.blk.{index}.{names[module]}.{kind}", _array(parameter)))
    for source, target in (("linear_1", "mm.0"), ("linear_2", "mm.2")):
        for kind, parameter in getattr(projector, source).named_parameters():
            tensors.append((f"{target}.{kind}", _array(parameter)))
    return tensors


def _array(parameter: Any) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = parameter.detach().float().numpy()
    return array.astype(np.float16) if array.ndim > 1 else array


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bits_per_weight(path: Path) -> tuple[float, dict[str, int]]:
    """Measured on the file: bits per stored weight, and how many matrices have which type."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    types: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1:
            types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors), types


def read_pair_id(path: Path) -> str:
    """The pair id inside a GGUF file, empty if it has none."""
    import gguf

    field = gguf.GGUFReader(path).get_field(PAIR_KEY)
    return "" if field is None else str(field.contents())


def decoder_bytes(path: Path, facts: Facts) -> tuple[int, int]:
    """Bytes read per generated token: (all decoder matrices and norms with the head, the head alone)."""
    import gguf

    sizes = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(path).tensors}
    head = sizes["token_embd.weight" if facts.tied else "output.weight"]
    body = sum(size for name, size in sizes.items() if name not in ("token_embd.weight", "output.weight"))
    return body + head, head
