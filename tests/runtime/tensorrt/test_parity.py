"""TensorRT artefacts end to end: ONNX Runtime, and engines on stand-ins that hold real memory, both against PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.api import ContextOverflow, Done, Sampling, Token
from runtime.delta import DeltaBackend, DeviceLogits
from runtime.engine import Engine
from runtime.images import question
from runtime.trt_runner import TrtRunner
from tests.fake_tensorrt import Fake

from .making import CONTEXT, QUESTIONS, STEPS, Borrowed, Made, close_to, engines, forced, picture, tokens


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_step_equals_torch(name: str, backend: DeltaBackend, made: Made) -> None:
    expected, got = forced(made.torch, QUESTIONS[name]), forced(backend, QUESTIONS[name])
    assert got.shape == (1 + STEPS, expected.shape[1])
    assert close_to(expected, got, made.precision)
    if name == "across a bucket":
        assert len(backend.prepare(QUESTIONS[name]).ids) < 127 < len(backend.prepare(QUESTIONS[name]).ids) + STEPS


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_a_prompt_in_pieces_gives_the_same(chunk: int, backend: DeltaBackend, made: Made) -> None:
    expected = forced(made.torch, QUESTIONS["three images"], 2)
    assert close_to(expected, forced(backend, QUESTIONS["three images"], 2, chunk), made.precision)


def test_the_profile_cuts_a_long_prompt_by_itself(backend: DeltaBackend, made: Made) -> None:
    backend._runner.max_new = 16
    assert close_to(
        forced(made.torch, QUESTIONS["across a bucket"], 2),
        forced(backend, QUESTIONS["across a bucket"], 2),
        made.precision,
    )


def test_up_to_the_last_row_of_the_profile(backend: DeltaBackend, made: Made) -> None:
    messages = QUESTIONS["one image"]
    room = CONTEXT - len(backend.prepare(messages).ids)
    expected, got = forced(made.torch, messages, room), forced(backend, messages, room)
    assert close_to(expected[-1:], got[-1:], made.precision)
    with pytest.raises(ValueError, match="do not fit"):
        backend.step(5)


def test_going_back_into_a_conversation(backend: DeltaBackend, made: Made) -> None:
    """The engine keeps what two prompts share and takes in the rest from there."""
    first, second = QUESTIONS["one image"], [question("Read the bottom row, then stop.", picture(0))]
    forced(backend, first)
    prompt = backend.prepare(second)
    shared = next(i for i, (a, b) in enumerate(zip(prompt.ids, backend.prepare(first).ids, strict=False)) if a != b)
    assert shared > 16
    got = [np.array(backend.prefill(prompt, backend.encode(prompt.images), shared)), np.array(backend.step(9))]
    made.torch.prefill(prompt, made.torch.encode(prompt.images))
    expected = forced(made.torch, second, 0)
    assert close_to(expected[0], got[0], made.precision)


def test_an_overflow_does_not_reach_the_next_conversation(backend: DeltaBackend, made: Made) -> None:
    before = forced(backend, QUESTIONS["one image"])
    bad = np.full((40, backend._table_VD.shape[1]), np.nan, np.float32)
    assert np.isnan(np.array(backend._runner.extend(bad, 60))).all()
    assert close_to(before, forced(backend, QUESTIONS["one image"]), made.precision)


def test_greedy_answers_through_the_engine(backend: DeltaBackend, made: Made) -> None:
    messages = QUESTIONS["three images"]
    prompt = made.torch.prepare(messages)
    expected, logits = [], made.torch.prefill(prompt, made.torch.encode(prompt.images))
    for _ in range(STEPS):
        expected.append(int(logits.argmax()))
        logits = made.torch.step(expected[-1])
    opened = Engine(Borrowed(backend))  # type: ignore[arg-type]
    events = list(opened.generate(messages, Sampling(max_new_tokens=STEPS, ignore_eos=True)))
    assert [e.id for e in events if isinstance(e, Token)] == expected or made.precision == "fp16"
    done = events[-1]
    assert isinstance(done, Done)
    assert sum(s.end_ns - s.start_ns for s in done.spans) == done.spans[-1].end_ns - done.received_ns
    drawn = Sampling(max_new_tokens=4, temperature=1.0, seed=1, repetition_penalty=1.2, ignore_eos=True)
    assert [len(tokens(opened, messages, drawn)) for _ in range(2)] == [4, 4]
    with pytest.raises(ContextOverflow):
        tokens(opened, [question("7 " * 200)])
    opened.close()


def test_a_greedy_step_is_one_graph_one_copy_one_wait(made: Made, device: Fake) -> None:
    backend = engines(made, device)
    prompt = backend.prepare(QUESTIONS["no image"])
    logits = backend.prefill(prompt, [])
    backend.step(5)
    device.cudart.calls.clear()
    logits = backend.step(6)
    assert isinstance(logits, DeviceLogits)
    assert int(logits.argmax()) == int(np.array(logits).argmax())
    assert device.cudart.calls[:3] == ["cudaGraphLaunch", "cudaMemcpy2DAsync", "cudaStreamSynchronize"]
    device.cudart.calls.clear()
    stale = backend.step(7)
    backend.step(8)
    assert device.cudart.calls == ["cudaGraphLaunch", "cudaMemcpy2DAsync", "cudaStreamSynchronize"] * 2
    with pytest.raises(RuntimeError, match="overwritten"):
        np.array(stale)
    backend.close()


def test_rows_go_in_place_where_addresses_allow(made: Made, device: Fake) -> None:
    backend = engines(made, device)
    runner = backend._runner
    assert isinstance(runner, TrtRunner)
    device.cudart.calls.clear()
    backend.prefill(backend.prepare(QUESTIONS["no image"]), [])
    in_place = runner._row_bytes % 256 == 0
    assert in_place == (made.precision == "fp16")
    assert ("cudaMemcpy2DAsync" in device.cudart.calls) != in_place
    backend.close()


def test_a_new_bucket_is_recorded_once(made: Made, device: Fake) -> None:
    backend = engines(made, device)
    device.cudart.calls.clear()
    forced(backend, QUESTIONS["across a bucket"])
    forced(backend, QUESTIONS["across a bucket"])
    assert device.cudart.calls.count("cudaStreamBeginCapture") == 2
    assert device.cudart.calls.count("cudaGraphInstantiate") == 2
    backend.close()


def test_an_empty_cache_is_the_same_as_its_reserved_row(made: Made) -> None:
    """The graph itself, with no past rows at all and with the one masked row the runtime binds instead."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(made.root / "onnx" / "decoder.onnx"), providers=["CPUExecutionProvider"])
    ports = {port.name: port for port in session.get_inputs()}
    dtype = np.float16 if made.precision == "fp16" else np.float32
    hidden = ports["inputs_embeds"].shape[2]
    embeds = np.random.default_rng(0).normal(size=(1, 5, hidden)).astype(dtype)
    results = []
    for past in (0, 1):
        bias = np.where(np.arange(5 + past)[None] <= np.arange(past, past + 5)[:, None], 0, np.finfo(dtype).min)
        bias[:, :past] = np.finfo(dtype).min
        feed = {
            "inputs_embeds": embeds,
            "position_ids": np.arange(5)[None],
            "attention_bias": bias[None, None].astype(dtype),
        }
        for name, port in ports.items():
            if name.startswith("past_"):
                feed[name] = np.zeros((1, past, *port.shape[2:]), dtype)
        results.append(session.run(None, feed))
    for a, b in zip(*results, strict=True):
        assert np.allclose(a, b, rtol=0, atol=1e-5 if made.precision == "fp32" else 1e-2)
