"""Meters on recorded sysfs trees and a scripted NVML: exact energy, throttling found, missing sensors null."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.clock import VirtualClock
from runtime.energy import Curve, Recorder, energy_json, idle_watts, thermal_json
from runtime.jetson import jetson
from runtime.memory import DeviceMemory
from runtime.meters import HeatProbe, NvmlMeter, RaplMeter, board_meter, find_meter, find_rails, rapl_meter

S = 1_000_000_000
MS = 1_000_000


def write(root: Path, files: dict[str, object]) -> Path:
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


def ina3221(number: int, rails: dict[str, tuple[int, int]], **extra: object) -> dict[str, object]:
    """hwmon files of one chip: label -> (millivolts, milliamps)."""
    chip = f"sys/class/hwmon/hwmon{number}"
    files: dict[str, object] = {f"{chip}/name": "ina3221", f"{chip}/in7_label": "sum of shunt voltages"}
    for channel, (label, (volts, amps)) in enumerate(rails.items(), 1):
        files[f"{chip}/in{channel}_label"] = label
        files[f"{chip}/in{channel}_input"] = volts
        files[f"{chip}/curr{channel}_input"] = amps
        files[f"{chip}/in{channel}_enable"] = 1
    return {**files, **{f"{chip}/{name}": value for name, value in extra.items()}}


def orin_nano(root: Path) -> Path:
    rails = {"VDD_IN": (4968, 1504), "VDD_CPU_GPU_CV": (4960, 520), "VDD_SOC": (4960, 280)}
    return write(
        root,
        {
            **ina3221(1, rails, oc1_event_cnt=0, oc2_event_cnt=0, oc3_event_cnt=0),
            "sys/class/thermal/thermal_zone0/temp": 48031,
            "sys/class/thermal/thermal_zone1/temp": 51468,
            "sys/class/thermal/thermal_zone2/temp": -256000,
            "sys/class/devfreq/17000000.gpu/cur_freq": 306000000,
            "sys/class/devfreq/17000000.gpu/min_freq": 306000000,
            "sys/class/devfreq/17000000.gpu/max_freq": 1020000000,
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\x00",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
            "var/lib/nvpmodel/status": "pmode:0002",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq": 1728000,
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": 1728000,
        },
    )


def agx_orin(root: Path) -> Path:
    return write(
        root,
        {
            **ina3221(3, {"VDD_GPU_SOC": (19000, 400), "VDD_CPU_CV": (19000, 100), "VIN_SYS_5V0": (5000, 900)}),
            **ina3221(4, {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (19000, 50), "NC2": (0, 0)}, in3_enable=0),
            "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit",
            "etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 1, BOARD: t186ref",
        },
    )


def thor(root: Path) -> Path:
    return write(
        root,
        {
            "sys/class/hwmon/hwmon2/name": "ina238",
            "sys/class/hwmon/hwmon2/label": "VIN",
            "sys/class/hwmon/hwmon2/power1_input": 41_250_000,
            "sys/class/hwmon/hwmon2/in1_input": 20000,
            "sys/class/hwmon/hwmon2/curr1_input": 2062,
            **ina3221(5, {"VDD_GPU": (12000, 500), "VDD_CPU_SOC_MSS": (12000, 700), "VIN_SYS_5V0": (5000, 1000)}),
            "sys/class/devfreq/gpu-gpc-0/cur_freq": 1575000000,
            "sys/class/devfreq/gpu-gpc-0/max_freq": 1575000000,
            "sys/class/devfreq/gpu-gpc-0/min_freq": 1575000000,
            "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit",
            "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 1, BOARD: generic",
        },
    )


@pytest.mark.parametrize(
    ("tree", "watts", "source"),
    [
        (orin_nano, 4.968 * 1.504, "ina3221:VDD_IN"),
        (agx_orin, 19 * 0.4 + 19 * 0.1 + 5 * 0.9, "ina3221:VDD_GPU_SOC+VDD_CPU_CV+VIN_SYS_5V0"),
        (thor, 41.25, "ina238:VIN"),
    ],
)
def test_10_the_total_power_of_a_board_is_found_by_the_names_of_its_rails(
    tree: Any, watts: float, source: str, tmp_path: Path
) -> None:
    meter = board_meter(tree(tmp_path))
    assert meter is not None
    assert meter.source == source
    assert meter.watts() == pytest.approx(watts)
    assert meter.joules() is None


def test_thor_without_its_power_file_and_without_its_sensor(tmp_path: Path) -> None:
    root = thor(tmp_path)
    (root / "sys/class/hwmon/hwmon2/power1_input").unlink()
    meter = board_meter(root)
    assert meter is not None
    assert meter.watts() == pytest.approx(20 * 2.062)
    (root / "sys/class/hwmon/hwmon2/name").write_text("other")
    meter = board_meter(root)
    assert meter is not None
    assert meter.source == "ina3221:VDD_GPU+VDD_CPU_SOC_MSS+VIN_SYS_5V0"
    assert meter.watts() == pytest.approx(6 + 8.4 + 5)


def test_rails_of_an_unknown_board_are_not_added_up(tmp_path: Path) -> None:
    root = write(tmp_path, ina3221(0, {"VDD_FOO": (5000, 100), "VDD_BAR": (5000, 100)}))
    assert [rail.label for rail in find_rails(root)] == ["VDD_FOO", "VDD_BAR"]
    assert board_meter(root) is None


def test_sensors_that_cannot_be_read_are_absent(tmp_path: Path) -> None:
    root = orin_nano(tmp_path)
    meter = board_meter(root)
    assert meter is not None
    (root / "sys/class/hwmon/hwmon1/curr1_input").unlink()
    assert meter.watts() is None
    assert board_meter(root) is None, "the remaining rails are not the total"
    assert find_meter(tmp_path / "nothing") is None
    assert HeatProbe(tmp_path / "nothing").look().throttled is None


@pytest.mark.parametrize("period", [20 * MS, 37 * MS])
def test_energy_of_a_known_curve_is_exact(period: int) -> None:
    """Power that rises on a straight line: trapezoids are exact, also between two samples."""
    curve, t = Curve(), 0
    while t <= 30 * S:
        curve.add_watts(t, 5 + 2 * t / S)
        t += period
    for start, stop in ((0, 10), (1.2345, 2.5), (3.0101, 28.777)):
        joules, seconds, samples = curve.between([(int(start * S), int(stop * S))])
        assert joules == pytest.approx(5 * (stop - start) + stop**2 - start**2, rel=1e-6)
        assert seconds == pytest.approx(stop - start)
        assert samples == pytest.approx((stop - start) * S / period, abs=1.01)
    assert curve.between([(0, 31 * S)])[0] is None, "no sample there: unknown, not zero"


def test_energy_is_given_net_of_idle_and_only_over_long_enough_windows() -> None:
    clock = VirtualClock()
    load = SimpleNamespace(source="scripted", power=4.0)
    load.watts, load.joules = (lambda: load.power), (lambda: None)
    recorder = Recorder(clock, load, None)

    def advance(seconds: float) -> tuple[int, int]:
        start = clock.now_ns()
        for _ in range(round(seconds / 0.02)):
            recorder.poll()
            clock.wait_ns(20 * MS)
        recorder.poll()
        return start, clock.now_ns()

    idle = idle_watts(recorder.curve, advance(3))
    assert idle == pytest.approx(4.0)
    load.power = 14.0
    window = advance(12)
    got, note = energy_json(recorder, [window], idle, requests=6, tokens=120, images=6)
    assert (note, got is not None) == ("", True)
    assert got is not None
    assert got["mean_w"] == pytest.approx(14.0, rel=1e-3)
    assert got["j_per_output_token"] == pytest.approx(1.0, rel=2e-3)
    assert got["j_per_request"] == pytest.approx(20.0, rel=2e-3)
    short, why = energy_json(recorder, [(window[0], window[0] + 5 * S)], idle, 1, 1, 1)
    assert short is None
    assert "too short" in why


def test_rapl_counters_that_wrap_are_carried_over(tmp_path: Path) -> None:
    zone = "sys/class/powercap/intel-rapl:0"
    root = write(tmp_path, {f"{zone}/name": "package-0", f"{zone}/energy_uj": 900, f"{zone}/max_energy_range_uj": 1000})
    write(
        tmp_path, {"sys/class/powercap/intel-rapl:0:0/name": "core", "sys/class/powercap/intel-rapl:0:0/energy_uj": 5}
    )
    meter = rapl_meter(root)
    assert isinstance(meter, RaplMeter)
    assert meter.source == "rapl:package-0"
    readings = []
    for value in (900, 990, 30, 980, 10):
        (root / zone / "energy_uj").write_text(str(value))
        readings.append(meter.joules())
    assert readings == [pytest.approx(v / 1e6) for v in (900, 990, 1030, 1980, 2010)]


class FakeNvml:
    """An energy counter that follows a known curve, and throttling on demand."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_FI_DEV_POWER_INSTANT = 0, 1, 186

    def __init__(self, clock: VirtualClock) -> None:
        self.clock, self.reasons = clock, 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        seconds = self.clock.now_ns() / S
        return int(1000 * (100 * seconds + 50 * math.sin(seconds)))

    def nvmlDeviceGetTemperature(self, handle: Any, kind: int) -> int:
        return 71

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int) -> int:
        return 1410

    def nvmlDeviceGetSupportedClocksEventReasons(self, handle: Any) -> int:
        return 0x1FF

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any) -> int:
        return self.reasons


def test_nvml_counter_and_throttling(tmp_path: Path) -> None:
    clock = VirtualClock()
    nvml = FakeNvml(clock)
    meter = find_meter(tmp_path, (nvml, None), gpu=True)
    assert isinstance(meter, NvmlMeter)
    assert meter.source == "nvml:energy counter"
    recorder = Recorder(clock, meter, HeatProbe(tmp_path, nvml, None))
    for tick in range(1001):
        nvml.reasons = 0x40 if 200 < tick <= 350 else 0x1
        recorder.poll()
        if tick % 10 == 0:
            recorder.look()
        clock.wait_ns(20 * MS)
    joules, _, _ = recorder.curve.between([(0, 20 * S)])
    assert joules == pytest.approx(100 * 20 + 50 * math.sin(20), abs=0.01)
    heat = thermal_json(recorder.heat)
    assert heat["throttled_s"] == pytest.approx(3.0)
    assert heat["reasons"] == ["hardware thermal slowdown"]
    assert (heat["max_c"], heat["clock_mhz"]["gpu_mean"]) == (71.0, 1410.0)
    assert find_meter(tmp_path, (nvml, None), gpu=False) is None, "a model on the processor is not the GPU's energy"


def test_nvml_without_counter_gives_momentary_power() -> None:
    class PowerOnly:
        NVML_FI_DEV_POWER_INSTANT = 186

        def nvmlDeviceGetFieldValues(self, handle: Any, fields: list[int]) -> list[Any]:
            return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=21500))]

    meter = NvmlMeter(PowerOnly(), None)
    assert (meter.source, meter.watts(), meter.joules()) == ("nvml:momentary power", 21.5, None)


def test_device_memory_names_its_method_and_is_absent_where_nothing_tells(tmp_path: Path) -> None:
    def process(megabytes: float | None, pid: int | None = None) -> Any:
        used = None if megabytes is None else int(megabytes * 1e6)
        return SimpleNamespace(pid=pid or os.getpid(), usedGpuMemory=used)

    running = [process(900, pid=1), process(300)]
    nvml = SimpleNamespace(nvmlDeviceGetComputeRunningProcesses=lambda handle: running)
    memory = DeviceMemory("cuda", tmp_path, (nvml, None))
    assert memory.look() == (300_000_000, "NVML, this process, sampled after each request")
    running[:] = [process(500)]
    assert memory.look()[0] == 500_000_000
    running[:] = [process(200)]
    assert memory.look()[0] == 500_000_000, "the peak stays"
    running[:] = [process(None)]
    assert DeviceMemory("cuda", tmp_path, (nvml, None)).look()[0] is None
    refusing = SimpleNamespace()  # NotSupported
    assert DeviceMemory("cuda", tmp_path, (refusing, None)).look()[0] is None
    assert DeviceMemory("cuda", tmp_path).look()[0] is None
    assert DeviceMemory("cpu", tmp_path, (nvml, None)).look() == (None, "the model runs on the processor")


def test_a_jetson_has_one_memory_for_both_sides(tmp_path: Path) -> None:
    root = write(orin_nano(tmp_path), {"proc/meminfo": "MemTotal: 7800000 kB\nMemAvailable: 6000000 kB"})
    memory = DeviceMemory("cuda", root)
    for available, peak in ((4000000, 2000000), (5000000, 2000000), (3500000, 2500000)):
        write(root, {"proc/meminfo": f"MemAvailable: {available} kB"})
        held, method = memory.look()
        assert held == peak * 1024
        assert "MemAvailable" in method


def test_jetson_over_current_is_throttling(tmp_path: Path) -> None:
    root = orin_nano(tmp_path)
    probe = HeatProbe(root)
    first = probe.look()
    assert (first.throttled, first.celsius, first.clock_mhz) == (False, 51.468, {"gpu": 306.0})
    (root / "sys/class/hwmon/hwmon1/oc2_event_cnt").write_text("3")
    second, third = probe.look(), probe.look()
    assert (second.throttled, second.reasons) == (True, ("over-current",))
    assert third.throttled is False, "only new events count"


def test_a_jetson_describes_itself(tmp_path: Path) -> None:
    got = jetson(orin_nano(tmp_path / "nano"))
    assert got == {
        "model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "l4t": "36.4.3",
        "jetpack": "6.1 or 6.2",
        "nvpmodel": "MAXN_SUPER",
        "jetson_clocks": False,
        "gpu_mhz": 306.0,
        "gpu_max_mhz": 1020.0,
    }
    other = jetson(thor(tmp_path / "thor"))
    assert other is not None
    assert (other["l4t"], other["jetpack"], other["jetson_clocks"], other["nvpmodel"]) == ("38.2.0", "7.0", True, None)
    orin = jetson(agx_orin(tmp_path / "orin"))
    assert orin is not None
    assert (orin["jetpack"], orin["jetson_clocks"], orin["gpu_mhz"]) == ("5.1.2", None, None)
    assert jetson(tmp_path / "nothing") is None
