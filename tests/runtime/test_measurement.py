"""Ten ways in which published VLM latencies went wrong, each against a scripted model on a clock moved by hand.

Known stage times go in; exact figures must come out. The tenth, rails that were not found or summed twice, is in
`test_meters.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from runtime.api import Event, Message, ModelFailed, ModelInfo, Prompt, Reported, Reuse, Sampling, Usage
from runtime.backend_fake import IMAGE_TOKENS, FakeBackend, FakeScript
from runtime.clock import VirtualClock
from runtime.energy import Recorder
from runtime.engine import Engine
from runtime.images import question
from runtime.latency import Timing, timing
from runtime.meters import NvmlMeter, find_meter
from runtime.profiler import Measured, ProfileOptions, Profiler, Session
from runtime.report import report
from runtime.runner import EngineRunner
from runtime.stats import summary
from runtime.workload import Workload

MS = 1_000_000
WORK = Workload("tiny", 0, Pillow.new("RGB", (8, 8), (120, 130, 140)))


class Scripted(FakeBackend):
    """The n-th request takes `prefill_ms(n)`; every request must come with an image it has not seen."""

    def __init__(self, clock: VirtualClock, prefill_ms: Callable[[int], float] = lambda n: 20, **script: Any) -> None:
        super().__init__(FakeScript(clock=clock, **{"reply": "abc", **script}))
        self.prefill_ms, self.requests = prefill_ms, 0

    def prefill(self, prompt: Prompt, embeds: Sequence[Any], start: int = 0, stop: int | None = None) -> Any:
        self.script = dataclasses.replace(self.script, prefill_ns=int(self.prefill_ms(self.requests) * MS))
        self.requests += 1
        return super().prefill(prompt, embeds, start, stop)


def profile(
    requests: int, make: Callable[[VirtualClock], Any], output_tokens: int = 5, names: Sequence[str] = ("model",)
) -> tuple[dict[str, Any], list[Measured]]:
    """The real profiler over engines in this process, all on one virtual clock."""
    clock = VirtualClock()
    options = ProfileOptions(requests=requests, output_tokens=output_tokens, extra=0)
    engines = []

    def opener(name: str) -> EngineRunner:
        engines.append(Engine(make(clock), clock))
        runner = EngineRunner(engines[-1], 0.0)
        runner._bandwidth = lambda seconds: 10.0  # type: ignore[method-assign]
        return runner

    session = Profiler(options, WORK, clock).run(list(names), opener)
    return report(session, options, WORK), session.results


def run(clock: VirtualClock, sampling: Sampling, **script: Any) -> Timing:
    with Engine(FakeBackend(FakeScript(clock=clock, **script)), clock) as engine:
        return timing(engine.complete([question("hi")], sampling, reuse="none"))


def test_percentiles_are_exactly_those_of_the_script() -> None:
    order = np.random.default_rng(0).permutation(130)
    # six warm-up requests come first: the first is the cold one, the rest alike
    value, _ = profile(130, lambda clock: Scripted(clock, lambda n: 1 + order[n - 6] if n >= 6 else 5, step_ns=2 * MS))
    metrics = value["profiles"][0]["metrics"]
    expected = summary([float(v) for v in range(1, 131)])
    assert {k: pytest.approx(v) for k, v in expected.items()} == metrics["ttft_ms"]
    assert (metrics["ttft_ms"]["p90"], metrics["ttft_ms"]["p95"]) == (pytest.approx(117.1), pytest.approx(123.55))
    assert metrics["ttft_ms"]["p99"] is None, "130 requests say nothing about one in a hundred"
    assert (metrics["tpot_ms"]["p50"], metrics["itl_ms"]["max"]) == (2.0, 2.0)


def test_1_rates_count_generated_tokens_and_ttft_has_all_its_parts() -> None:
    got = run(
        VirtualClock(), Sampling(max_new_tokens=500), reply="abcd", prepare_ns=3 * MS, prefill_ns=7 * MS, step_ns=MS
    )
    assert got.completion_tokens == 5
    assert (got.ttft_ms, got.tpot_ms) == (10.0, 1.0)
    value, _ = profile(3, lambda clock: Scripted(clock, prepare_ns=3 * MS, encode_ns=30 * MS, step_ns=10 * MS))
    throughput = value["profiles"][0]["throughput"]
    assert throughput["output_tok_s"] == pytest.approx(5 / (0.053 + 4 * 0.010))
    assert value["profiles"][0]["metrics"]["ttft_ms"]["mean"] == pytest.approx(53.0)


def test_2_the_vision_encoder_is_not_the_preprocessing_and_a_piece_of_text_is_not_a_token() -> None:
    value, _ = profile(2, lambda clock: Scripted(clock, prepare_ns=40 * MS, encode_ns=6 * MS, step_ns=MS))
    stages = value["profiles"][0]["stages_ms"]
    assert (stages["preprocess"]["p50"], stages["vision_encode"]["p50"]) == (40.0, 6.0)
    got = run(VirtualClock(), Sampling(), reply="😀😀", step_ns=10 * MS)
    assert (got.completion_tokens, got.tpot_ms) == (9, 10.0), "two characters on the screen, eight tokens and the end"


def test_3_nothing_is_tried_again_and_failures_are_counted() -> None:
    class Failing(Scripted):
        def encode(self, images: Any) -> Any:
            if self.requests >= 6 and self.calls.count("encode") % 3 == 0:
                self.calls.append("encode")
                raise ModelFailed("out of memory")
            return super().encode(images)

    backends: list[Failing] = []

    def make(clock: VirtualClock) -> Failing:
        backends.append(Failing(clock, step_ns=MS))
        return backends[-1]

    value, results = profile(9, make)
    counts = value["profiles"][0]["counts"]
    assert (counts["requests"], counts["failed"]) == (9, 3)
    assert value["profiles"][0]["metrics"]["ttft_ms"]["n"] == 6
    assert backends[0].calls.count("encode") == 6 + 9, "one try each"
    assert not value["valid"]
    assert "3 of 9 requests failed (out of memory)" in value["warnings"][0]
    assert "VmHWM" in results[0].memory_method or "maxrss" in results[0].memory_method


def test_4_the_first_token_is_not_in_the_decode_rate() -> None:
    value, _ = profile(2, lambda clock: Scripted(clock, step_ns=10 * MS), output_tokens=2)
    assert value["profiles"][0]["metrics"]["tpot_ms"]["p50"] == 10.0
    assert value["profiles"][0]["throughput"]["decode_tok_s"] == pytest.approx(100.0)


def test_5_decoding_is_measured_not_subtracted() -> None:
    rng = np.random.default_rng(1)
    value, _ = profile(20, lambda clock: Scripted(clock, lambda n: rng.uniform(1, 500), step_ns=MS))
    stages = value["profiles"][0]["stages_ms"]
    assert stages["prefill"]["std"] > 50
    # subtracting a mean prefill would have made some of these negative
    assert (stages["decode"]["min"], stages["decode"]["max"]) == (4.0, 4.0)


def test_6_repeated_images_and_caches_cannot_pass_for_speed() -> None:
    value, results = profile(3, lambda clock: Scripted(clock, encode_ns=2000 * MS, step_ns=MS))
    assert value["profiles"][0]["metrics"]["ttft_ms"]["p50"] == 2020.0, "not the 20 ms of a cached image"
    assert len(set(results[0].digests)) == len(results[0].digests)

    clock = VirtualClock()
    cached = Timing(20.0, 1.0, (1.0,), 24.0, {"prefill": 20.0, "decode": 4.0}, 20, 4, 12, 5)
    with pytest.raises(RuntimeError, match="took 12 prompt tokens from a cache"):
        Profiler(ProfileOptions(), WORK, clock)._check(cached, Measured("m", {}, 0.0))


def test_6_different_numbers_of_image_tokens_are_not_compared() -> None:
    class Smaller(Scripted):
        def __init__(self, clock: VirtualClock) -> None:
            super().__init__(clock, step_ns=MS)
            self.info = dataclasses.replace(self.info, tokens_per_image=IMAGE_TOKENS - sizes.pop(0))

    sizes = [0, 1]
    clock = VirtualClock()
    options = ProfileOptions(requests=1, output_tokens=3, extra=0)
    session = Session()
    for name in ("a", "b"):
        backend = Smaller(clock)
        with Engine(FakeBackend(backend.script), clock) as engine:
            got = timing(engine.complete([question("x")], Sampling(max_new_tokens=3, ignore_eos=True)))
        info = {f: getattr(backend.info, f) for f in backend.info.__dataclass_fields__}
        shown = dataclasses.replace(got, image_tokens=backend.info.tokens_per_image)
        session.results.append(Measured(name, info, 0.0, timings=[shown], started_s=[0.0]))
    value = report(session, options, WORK)
    assert not value["valid"]
    assert "not comparable: image_tokens differs (3, 4)" in value["warnings"]


class Pieces:
    """Somebody else's server, scripted: (wait in ms, piece of text)."""

    def __init__(self, clock: VirtualClock, script: Sequence[tuple[int, str]], usage: Usage) -> None:
        self.clock, self.script, self.usage = clock, script, usage
        self.info = ModelInfo("m", "openai", "remote", "unknown", 0, 0, 0, 0, ())

    def stream(
        self, messages: Sequence[Message], sampling: Sampling, reuse: Reuse, stopped: Callable[[], bool]
    ) -> Generator[str | Reported, None, None]:
        for wait, piece in self.script:
            self.clock.wait_ns(wait * MS)
            yield piece
        yield Reported("length", self.usage, {})

    def close(self) -> None: ...


def remote(script: Sequence[tuple[int, str]], tokens: int | None) -> Timing:
    clock = VirtualClock()
    with Engine(Pieces(clock, script, Usage(10, None, 0, tokens)), clock) as engine:
        return timing(engine.complete([question("x")]))


def test_7_an_empty_first_piece_is_not_a_token_and_pieces_are_not_tokens() -> None:
    got = remote([(5, ""), (95, "one two"), (40, " three four")], tokens=5)
    assert got.ttft_ms == 100.0
    assert got.tpot_ms == 10.0
    assert got.itl_ms == ()
    assert remote([(5, "a"), (10, "b"), (20, "c")], tokens=3).itl_ms == (10.0, 20.0)


def test_8_tokens_are_ids_that_were_made_not_words_in_the_text() -> None:
    got = remote([(10, "a b c d e f g h")], tokens=3)
    assert (got.completion_tokens, remote([(10, "a b")], tokens=None).completion_tokens) == (3, None)
    value, _ = profile(2, lambda clock: Scripted(clock, reply="", step_ns=MS), output_tokens=9)
    assert value["profiles"][0]["throughput"]["output_tok_s"] == pytest.approx(9 / 0.028)


class NotSupported(Exception):
    pass


class JetsonNvml:
    """Initialises, names the GPU, and then supports nothing: what NVML does on a Jetson."""

    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_TEMPERATURE_GPU = NVML_CLOCK_SM = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def refuse(*_: Any) -> Any:
            raise NotSupported(name)

        return refuse


def test_9_a_meter_that_supports_nothing_is_absent_not_zero(tmp_path: Path) -> None:
    nvml = JetsonNvml()
    meter = NvmlMeter(nvml, None)
    assert (meter.watts(), meter.joules()) == (None, None)
    assert find_meter(tmp_path, (nvml, None), gpu=True) is None
    value, _ = profile(2, lambda clock: Scripted(clock, step_ns=MS))
    assert value["profiles"][0]["energy"] is None
    clock = VirtualClock()
    session = Session(recorder=Recorder(clock, None, None))
    session.results = [Measured("m", profile(1, Scripted)[1][0].info, 0.0, timings=[cached_free()], started_s=[0.0])]
    shown = report(session, ProfileOptions(requests=1), WORK)["profiles"][0]
    assert shown["energy"] is None
    assert "no power or energy meter" in shown["energy_note"]
    assert shown["thermal"]["throttled_s"] is None
    assert shown["thermal"]["clock_mhz"]["gpu_mean"] is None


def cached_free() -> Timing:
    return Timing(5.0, 2.0, (2.0,), 7.0, {"prefill": 5.0, "decode": 2.0}, 20, 4, 0, 2)


def test_cancel_inside_a_step_ends_with_that_step() -> None:
    import threading

    from runtime.api import Done, Failed

    clock, cancel, finished = VirtualClock(), threading.Event(), threading.Event()
    times: dict[str, int] = {}

    class Interrupted(FakeBackend):
        def step(self, token_id: int) -> Any:
            clock.wait_ns(3 * MS)
            if self.calls.count("step") == 2:
                times["called"] = clock.now_ns()
                cancel.set()
            clock.wait_ns(7 * MS)
            return super().step(token_id)

    def listen(event: Event | Failed) -> None:
        if isinstance(event, Done):
            times["ended"] = clock.now_ns()
            finished.set()

    with Engine(Interrupted(FakeScript(reply="x" * 100, clock=clock)), clock) as engine:
        engine.submit([question("hi")], listener=listen, cancel=cancel)
        assert finished.wait(60)
    assert times["ended"] - times["called"] == 7 * MS
