"""Is the artefact the same function as the student? Every figure here is computed, and held against a tolerance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.replay import F32, Backend, Prompt, forced_logits, greedy

STEPS = 16
TOP_K = 256
FEATURE_ROWS = 64
TIE = 0.02
LOW_IS_BAD = ("top1", "top1_tied", "correlation", "cosine")
POOLED = ("top1_tied", "kl", "correlation")


@dataclass(frozen=True)
class Gate:
    """Limits; logit differences are per unit of the reference logits' standard deviation.

    A match of greedy tokens alone misses most real faults (swapped keys and values, a dropped vision block), so the
    logits decide.

    Attributes:
        prefill: max |logit difference| after the prompt.
        decode: the same over the teacher-forced steps.
        top1: share of steps whose most likely token is the same, or one of several that PyTorch gives the same logit.
        kl: mean Kullback-Leibler divergence from PyTorch, nats.
        cosine: of visual tokens, the worst one.
        tokens_equal: share of samples with identical greedy answers; loose for quantised weights, whose answers are
            held to `accuracy_drop` instead. Off the student's own task a near tie counts as identical.
        accuracy_drop: allowed loss of exact match on the student's own task, as a share of the samples.
        pooled: hold top1, kl and correlation against all teacher-forced rows together instead of the worst case:
            rounding to few bits turns single near ties, and one of 17 steps would be 6 %. A near tie, where PyTorch
            itself gives the other token at most TIE less probability, then counts as the same token.
        correlation: mean over rows, of the logits with PyTorch's; sees what KL does not when logits are flat.
        embedding: max |difference| of the embedding table per unit of its standard deviation.
    """

    prefill: float
    decode: float
    top1: float
    kl: float
    cosine: float
    tokens_equal: float
    accuracy_drop: float = 0.01
    pooled: bool = False
    embedding: float = 0.0
    correlation: float = 0.0


# measured worst cases of correct exports lie two to ten times below; injected faults above (tests/export)
GATES: dict[tuple[str, str], Gate] = {
    ("onnx", "fp32"): Gate(3e-4, 3e-4, 1.0, 1e-6, 0.999999, 1.0, embedding=1e-6, correlation=0.999999),
    ("onnx", "fp16"): Gate(0.03, 0.05, 0.99, 1e-4, 0.999, 0.97, pooled=True, embedding=5e-3, correlation=0.9999),
    ("onnx", "int8"): Gate(0.5, 1.0, 0.97, 5e-3, 0.99, 0.9, pooled=True, embedding=0.05, correlation=0.99),
    ("onnx", "int4"): Gate(4.0, 4.0, 0.93, 0.05, 0.95, 0.0, 0.02, pooled=True, embedding=0.8, correlation=0.75),
    ("onnx", "q4f16"): Gate(4.0, 4.0, 0.93, 0.05, 0.95, 0.0, 0.02, pooled=True, embedding=0.8, correlation=0.75),
    ("tensorrt", "fp32"): Gate(3e-4, 3e-4, 1.0, 1e-6, 0.999999, 1.0),
    ("tensorrt", "fp16"): Gate(0.03, 0.05, 0.94, 1e-4, 0.9999, 0.99),
    ("tensorrt", "bf16"): Gate(0.25, 0.4, 0.95, 2e-3, 0.999, 0.9, pooled=True, correlation=0.999),
    ("tensorrt", "int8"): Gate(1.0, 2.0, 0.95, 0.02, 0.98, 0.85, 0.02, pooled=True, correlation=0.97),
    ("tensorrt", "int4"): Gate(4.0, 4.0, 0.93, 0.05, 0.95, 0.0, 0.02, pooled=True, correlation=0.75),
    ("gguf", "f32"): Gate(0.02, 0.03, 0.94, 1e-5, 0.9999, 0.99),
    ("gguf", "f16"): Gate(0.03, 0.05, 0.94, 1e-4, 0.999, 0.99),
    ("gguf", "bf16"): Gate(0.2, 0.4, 0.97, 1e-3, 0.999, 0.9, pooled=True, correlation=0.999),
    ("gguf", "q8_0"): Gate(0.3, 0.6, 0.97, 5e-3, 0.999, 0.9, pooled=True, correlation=0.99),
    ("gguf", "q6_k"): Gate(1.0, 1.5, 0.95, 0.01, 0.999, 0.0, pooled=True, correlation=0.95),
    ("gguf", "q5_k_m"): Gate(2.0, 2.0, 0.93, 0.02, 0.999, 0.0, 0.02, pooled=True, correlation=0.9),
}
GATES |= {
    ("gguf", kind): Gate(4.0, 4.0, 0.93, 0.05, 0.999, 0.0, 0.02, pooled=True, correlation=0.75)
    for kind in ("q4_k_m", "q4_0", "iq4_xs", "iq4_nl")
}
GATES |= {
    ("gguf", kind): Gate(6.0, 6.0, 0.8, 0.5, 0.999, 0.0, 0.05, pooled=True, correlation=0.5)
    for kind in ("iq3_m", "iq3_s", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs")
}
# of visual tokens, by the type of an mmproj: QuickGELU in place of GELU gives 0.99993, right files 0.999999
COSINE = {"f32": 0.99995, "f16": 0.99995, "q8_0": 0.99}


def mixed_gate(vision: str, embed: str, decoder: str, head: str) -> Gate:
    """Limits of an ONNX artefact whose parts differ: each measure is held to the coarsest part it depends on."""
    kinds = [GATES["onnx", kind] for kind in (vision, embed, decoder, head)]
    return _coarsest(kinds, cosine=kinds[0].cosine, embedding=kinds[1].embedding)


def trt_gate(vision: str, decoder: str, head: str) -> Gate:
    """The same for a TensorRT artefact, whose embedding table is never rounded further than its decoder."""
    kinds = [GATES["tensorrt", kind] for kind in (vision, decoder, head)]
    return _coarsest(kinds, cosine=kinds[0].cosine)


def gguf_gate(vision: str, embed: str, decoder: str, head: str) -> Gate:
    """The same for a GGUF pair, with the types of its tensors; one without limits of its own counts as the decoder's."""
    found = (GATES.get(("gguf", kind)) or GATES.get(("gguf", f"{kind}_m")) for kind in (vision, embed, head))
    kinds = [GATES["gguf", decoder], *filter(None, found)]
    return _coarsest(kinds, cosine=COSINE.get(vision, kinds[0].cosine))


def _coarsest(kinds: Sequence[Gate], cosine: float, embedding: float = 0.0) -> Gate:
    # a share of all rows says nothing about the worst case, nor the other way round
    pooled = any(g.pooled for g in kinds)
    return Gate(
        prefill=max(g.prefill for g in kinds),
        decode=max(g.decode for g in kinds),
        top1=min(g.top1 for g in kinds if g.pooled is pooled),
        kl=max(g.kl for g in kinds),
        cosine=cosine,
        tokens_equal=min(g.tokens_equal for g in kinds),
        accuracy_drop=max(g.accuracy_drop for g in kinds),
        pooled=pooled,
        embedding=embedding,
        correlation=min(g.correlation for g in kinds if g.pooled is pooled),
    )


@dataclass(frozen=True)
class Case:
    """A prompt and the tokens fed after it, whatever the model would have said."""

    name: str
    prompt: Prompt
    forced: tuple[int, ...]


@dataclass(frozen=True)
class Expected:
    """What PyTorch gave for a case, cut down to what is worth storing in an artefact.

    Attributes:
        forced: tokens fed after the prompt.
        top_ids, top_logits: the K most likely tokens of each step, [1 + steps, K].
        spread: standard deviation of the logits over the vocabulary.
        rows, features: some visual tokens, [R] and [R, hidden].
    """

    forced: npt.NDArray[np.int64]
    top_ids: npt.NDArray[np.int64]
    top_logits: F32
    spread: float
    rows: npt.NDArray[np.int64]
    features: F32


def expect(logits_SV: F32, features_NH: F32, forced: Sequence[int]) -> Expected:
    count = min(TOP_K, logits_SV.shape[1])
    some = np.argpartition(-logits_SV, count - 1, axis=1)[:, :count]
    ranks = np.argsort(-np.take_along_axis(logits_SV, some, axis=1), axis=1)
    order = np.take_along_axis(some, ranks, axis=1)
    rows = np.unique(np.linspace(0, len(features_NH) - 1, min(FEATURE_ROWS, len(features_NH))).astype(np.int64))
    return Expected(
        forced=np.asarray(forced, np.int64),
        top_ids=order.astype(np.int64),
        top_logits=np.take_along_axis(logits_SV, order, axis=1),
        spread=float(logits_SV.std()),
        rows=rows,
        features=features_NH[rows],
    )


def compare_logits(expected: Expected, logits_SV: F32) -> dict[str, float]:
    """Differences of teacher-forced logits from what was expected; row 0 is the prefill."""
    if not np.isfinite(logits_SV).all():
        worst = {"prefill": np.inf, "decode": np.inf, "kl": np.inf, "top1": 0.0, "top1_tied": 0.0, "correlation": -1.0}
        return {**worst, "rows": float(len(logits_SV))}
    got = np.take_along_axis(logits_SV, expected.top_ids, axis=1).astype(np.float64)
    want = expected.top_logits.astype(np.float64)
    worst_S = np.abs(got - want).max(axis=1) / max(expected.spread, 1e-9)
    said_SK = expected.top_ids == logits_SV.argmax(axis=1)[:, None]
    top1 = (said_SK & (want == want[:, :1])).any(axis=1).mean()
    want_log, got_log = _log_softmax(want), _log_softmax(got)
    # probability PyTorch gives to what was said, 0 if it is not among the stored tokens
    said_probability = (np.exp(want_log) * said_SK).sum(axis=1)
    tied = (np.exp(want_log[:, 0]) - said_probability <= TIE) & (said_probability > 0)
    kl = (np.exp(want_log) * (want_log - got_log)).sum(axis=1).mean()
    decode = float(worst_S[1:].max()) if len(worst_S) > 1 else 0.0
    return {
        "prefill": float(worst_S[0]),
        "decode": decode,
        "top1": float(top1),
        "top1_tied": float(tied.mean()),
        "kl": float(max(kl, 0.0)),
        "correlation": float(_correlation(want, got).mean()),
        "rows": float(len(worst_S)),
    }


def _correlation(a_SK: npt.NDArray[np.float64], b_SK: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    a, b = a_SK - a_SK.mean(axis=1, keepdims=True), b_SK - b_SK.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: npt.NDArray[np.float64] = (a * b).sum(axis=1) / np.maximum(norms, 1e-30)
    return result


def _log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = x - x.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def compare_features(expected: F32, got: F32) -> dict[str, float]:
    """Worst cosine and largest difference per unit of standard deviation over visual tokens [R, hidden]."""
    if expected.shape != got.shape or not np.isfinite(got).all():
        return {"cosine": -1.0, "max": float("inf")}
    dot = (expected.astype(np.float64) * got).sum(axis=1)
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(got, axis=1)
    zero = ~expected.any(axis=1) & ~got.any(axis=1)  # rows of padding tokens
    cosine = float(np.where(zero, 1.0, dot / np.maximum(norms, 1e-12)).min())
    return {"cosine": cosine, "max": float(np.abs(expected - got).max() / max(float(expected.std()), 1e-9))}


def replay_case(backend: Backend, prompt: Prompt, expected: Expected) -> dict[str, float]:
    """Run one case and compare: keys prefill, decode, top1, kl, cosine, features."""
    features = compare_features(expected.features, backend.features(prompt.image)[expected.rows])
    logits = compare_logits(expected, forced_logits(backend, prompt, expected.forced.tolist()))
    return {**logits, "cosine": features["cosine"], "features": features["max"]}


def golden_answer(
    backend: Backend, prompt: Prompt, expected: tuple[int, ...], measured: dict[str, float], stop: Sequence[int]
) -> tuple[int, ...]:
    """Greedy tokens of a golden sample; known where every forced step said the expected token, or one tied with it."""
    return expected if measured["top1"] == 1.0 else greedy(backend, prompt, stop, len(expected))


def pool(cases: Iterable[dict[str, float]]) -> dict[str, float]:
    """Means over the rows of all cases."""
    every = list(cases)
    rows = sum(case["rows"] for case in every)
    keys = ("top1", *POOLED)
    return {key: sum(case[key] * case["rows"] for case in every) / rows for key in keys} | {"rows": rows}


def all_failures(cases: dict[str, dict[str, float]], gate: Gate) -> list[str]:
    """Every limit broken by a case, or by all of them together where the gate pools."""
    if not gate.pooled:
        return [line for name, values in cases.items() for line in failures(name, values, gate)]
    single = ({k: v for k, v in values.items() if k not in ("top1", *POOLED)} for values in cases.values())
    found = [line for name, values in zip(cases, single, strict=True) for line in failures(name, values, gate)]
    pooled = pool(cases.values())
    return found + failures("all rows", {**pooled, "top1": pooled["top1_tied"]}, gate)


def failures(name: str, measured: dict[str, float], gate: Gate) -> list[str]:
    """One line per limit that `measured` breaks."""
    found = [
        f"{name}: {key} {measured[key]:.3g} is above {getattr(gate, key):.3g}"
        for key in ("prefill", "decode", "kl")
        if key in measured and not measured[key] <= getattr(gate, key)
    ]
    return found + [
        f"{name}: {key} {measured[key]:.6g} is below {getattr(gate, key):.6g}"
        for key in ("top1", "cosine", "correlation", "tokens_equal")
        if key in measured and not measured[key] >= getattr(gate, key)
    ]


def is_tie(reference: Backend, prompt: Prompt, want: Sequence[int], got: Sequence[int], gate: Gate) -> bool:
    """Whether two greedy answers part where PyTorch itself puts both tokens within the allowed logit difference."""
    same = next(i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b)
    logits_V = forced_logits(reference, prompt, want[:same])[-1]
    margin = float(logits_V[want[same]] - logits_V[got[same]])
    return margin <= 2 * max(gate.prefill, gate.decode) * float(logits_V.std())


def finite(value: Any) -> Any:
    """Replace infinities, which JSON cannot hold, by a number no gate passes."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return 1e30 if isinstance(value, float) and not np.isfinite(value) else value


def report(gate: Gate, cases: dict[str, dict[str, float]], extra: dict[str, Any], found: list[str]) -> dict[str, Any]:
    """The manifest's `parity`: limits, every measurement, the worst of each kind, and what failed."""
    worst = {
        key: (min if key in LOW_IS_BAD else max)(case[key] for case in cases.values() if key in case)
        for key in ("prefill", "decode", "top1", "kl", "correlation", "cosine", "features")
        if any(key in case for case in cases.values())
    }
    return dict(
        finite(
            {
                "gate": asdict(gate),
                "steps": STEPS,
                "worst": worst,
                "pooled": pool(cases.values()),
                "cases": cases,
                **extra,
                "failures": found,
            }
        )
    )
