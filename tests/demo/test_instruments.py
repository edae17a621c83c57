"""The device card and the cost of an answer, read from recorded boards: what is absent is absent, never 0."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from demo import page
from demo.instruments import IN_CACHE, NO_METER, Instruments, Reading, _own_memory
from runtime.api import Done, Span, Token, Usage
from runtime.backend_fake import FakeBackend
from runtime.clock import VirtualClock
from runtime.latency import timing

MS = 1_000_000
INFO = dataclasses.replace(FakeBackend().info, decoder_weight_bytes=10_000_000, kv_bytes_per_token=1_000)


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """An Orin Nano as its files show it."""
    write(tmp_path, "proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    write(tmp_path, "proc/meminfo", "MemTotal:        8000000 kB\nMemAvailable:    6000000 kB\n")
    write(tmp_path, "sys/class/thermal/thermal_zone0/temp", "45500")
    write(tmp_path, "sys/class/devfreq/17000000.ga10b/cur_freq", "624750000")
    chip = "sys/class/hwmon/hwmon1"
    write(tmp_path, f"{chip}/name", "ina3221")
    write(tmp_path, f"{chip}/in1_label", "VDD_IN")
    write(tmp_path, f"{chip}/in1_input", "5000")
    write(tmp_path, f"{chip}/curr1_input", "1400")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def finished(milliseconds: int, tokens: int = 2) -> tuple[Done, list[Token]]:
    spans = (Span("prefill", 0, 10 * MS), Span("decode", 10 * MS, milliseconds * MS))
    return Done("stop", "ab", Usage(20, 0, 0, tokens), 0, spans), [Token(1, "a", 10 * MS)]


def test_a_board_is_read_from_its_files(board: Path) -> None:
    now = Instruments(board, VirtualClock()).look()
    assert now.device == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (now.memory_total, now.memory_free) == (8_000_000 << 10, 6_000_000 << 10)
    assert (now.celsius, now.watts, now.power_source) == (45.5, 7.0, "ina3221:VDD_IN")
    assert now.clock_mhz == {"gpu": 624.75}
    card = page.device_card(now)
    for text in ("2.0 GB of 8.2 GB", "46 °C", "7.0 W", "gpu 625 MHz"):
        assert text in card


def test_a_reading_is_kept_for_a_moment(board: Path) -> None:
    clock = VirtualClock()
    instruments = Instruments(board, clock)
    first = instruments.look()
    write(board, "sys/class/thermal/thermal_zone0/temp", "60000")
    assert instruments.look() is first
    clock.wait_ns(1_000 * MS)
    assert instruments.look().celsius == 60.0


def test_nothing_to_read_is_said_and_never_zero(tmp_path: Path) -> None:
    now = Instruments(tmp_path, VirtualClock()).look()
    assert (now.memory_total, now.celsius, now.watts, now.throttled) == (None, None, None, None)
    card = page.device_card(Reading("a box"))
    assert card.count("n/a") == 6
    assert ">0" not in card


def test_a_counter_gives_power_from_the_second_look_on(tmp_path: Path) -> None:
    zone = "sys/class/powercap/intel-rapl:0"
    write(tmp_path, f"{zone}/name", "package-0")
    write(tmp_path, f"{zone}/energy_uj", "1000000")
    clock = VirtualClock()
    instruments = Instruments(tmp_path, clock)
    assert instruments.look().watts is None
    write(tmp_path, f"{zone}/energy_uj", "21000000")
    clock.wait_ns(2_000 * MS)
    assert instruments.look().watts == pytest.approx(10.0)


def test_energy_of_an_answer_is_the_integral_over_it(board: Path) -> None:
    clock = VirtualClock()
    instruments = Instruments(board, clock)
    recorder = instruments.recorder()
    for _ in range(60):
        recorder.poll()
        clock.wait_ns(20 * MS)
    done, tokens = finished(1_000)
    cost = instruments.cost(INFO, timing([*tokens, done]), done, recorder)
    assert cost.joules.value == pytest.approx(7.0)
    assert "VDD_IN, 7.0 W" in cost.joules.reason


def test_energy_of_too_short_an_answer_is_absent(board: Path) -> None:
    instruments = Instruments(board, VirtualClock())
    done, tokens = finished(100)
    recorder = instruments.recorder()
    assert instruments.cost(INFO, timing([*tokens, done]), done, recorder).joules.value is None
    assert "too short: 0 samples" in instruments.cost(INFO, timing([*tokens, done]), done, recorder).joules.reason
    assert instruments.cost(INFO, timing([*tokens, done]), done, None).joules.reason == NO_METER


def test_bandwidth_share_is_bytes_per_token_over_measured_speed(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.instruments.host_bandwidth", lambda threads: 10.0)
    instruments = Instruments(board, VirtualClock())
    done, tokens = finished(11)  # one token after the first, in 1 ms
    measured = timing([*tokens, done])
    assert instruments.wants_bandwidth(INFO)
    assert instruments.cost(INFO, measured, done, None).mbu.value is None
    instruments.measure_bandwidth(INFO)
    assert not instruments.wants_bandwidth(INFO)
    # 10 MB of weights and 21 tokens of context in 1 ms are 10.021 GB/s
    assert instruments.cost(INFO, measured, done, None).mbu.value == pytest.approx(1.0021)
    unknown = dataclasses.replace(INFO, decoder_weight_bytes=None)
    assert not instruments.wants_bandwidth(unknown)
    assert "does not say" in instruments.cost(unknown, measured, done, None).mbu.reason


def test_weights_in_the_cache_have_no_share_of_the_memorys_speed(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.instruments.host_bandwidth", lambda threads: 5.0)
    write(board, "sys/devices/system/cpu/cpu0/cache/index3/size", "32768K")
    write(board, "sys/devices/system/cpu/cpu0/cache/index3/type", "Unified")
    instruments = Instruments(board, VirtualClock())
    done, tokens = finished(11)
    instruments.measure_bandwidth(INFO)
    share = instruments.cost(INFO, timing([*tokens, done]), done, None).mbu
    assert (share.value, share.instead) == (None, IN_CACHE)  # and not 200 %
    assert "10.0 MB a token, a cache of 33.6 MB (10.0 of 5.0 GB/s)" in share.reason


def test_a_full_board_is_not_filled_further(board: Path) -> None:
    write(board, "proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 500000 kB\n")
    instruments = Instruments(board, VirtualClock())
    instruments.measure_bandwidth(INFO)
    done, tokens = finished(11)
    assert "too little free memory" in instruments.cost(INFO, timing([*tokens, done]), done, None).mbu.reason


def test_memory_counts_the_processes_that_run_models(tmp_path: Path) -> None:
    def process(pid: str, kilobytes: int, children: str = "") -> None:
        for path, text in (("status", f"Name: x\nVmRSS:\t {kilobytes} kB\n"), (f"task/{pid}1/children", children)):
            (tmp_path / pid / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / pid / path).write_text(text)

    process("self", 100, "70 71 ")
    process("70", 20)
    assert _own_memory(tmp_path) == 120 * 1024, "a process that has just ended counts nothing"
    process("71", 3)
    assert _own_memory(tmp_path) == 123 * 1024
    assert _own_memory(tmp_path / "none") is None
