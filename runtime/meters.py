"""Where energy, temperature and throttling are read: Jetson and PC sysfs, RAPL, NVML. Absent is None, never 0.

Every source is read through a root folder, so that recorded trees can stand in for machines. No root rights are
needed except where said. Standard library only; NVML through `nvidia-ml-py` where it is installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

SENSORS = ("ina3221", "ina238")
TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")
# boards without a rail for the whole module: these lie side by side below the input, so their sum is the module.
# Other rails of the same board are fed by one of them and would be counted twice.
TOP_RAILS: tuple[frozenset[str], ...] = (
    frozenset(("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")),  # AGX Orin
    frozenset(("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0")),  # Thor without its input sensor
    frozenset(("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V")),  # AGX Xavier
)
RAPL_FILES = "/sys/class/powercap/*/energy_uj"
CLOCK_REASONS = {
    0x0004: "software power cap",
    0x0008: "hardware slowdown",
    0x0020: "software thermal slowdown",
    0x0040: "hardware thermal slowdown",
    0x0080: "hardware power brake",
}


class Meter(Protocol):
    """One source. A power meter gives watts, a counter joules since some moment; the other one is None."""

    source: str

    def watts(self) -> float | None: ...

    def joules(self) -> float | None: ...


@dataclass(frozen=True)
class Rail:
    """One supply rail: a power file in microwatts, or voltage (mV) and current (mA) files."""

    label: str
    chip: str
    power: Path | None
    volts: Path | None
    amps: Path | None

    def watts(self) -> float | None:
        if self.power is not None:
            value = read_number(self.power)
            return None if value is None else value / 1e6
        if self.volts is None or self.amps is None:
            return None
        millivolts, milliamps = read_number(self.volts), read_number(self.amps)
        return None if millivolts is None or milliamps is None else millivolts * milliamps / 1e6


class RailMeter:
    """Watts of the whole module from its rails."""

    def __init__(self, rails: Sequence[Rail]) -> None:
        self._rails = tuple(rails)
        chips = "+".join(dict.fromkeys(rail.chip for rail in rails))
        self.source = f"{chips}:{'+'.join(rail.label for rail in rails)}"

    def watts(self) -> float | None:
        values = [rail.watts() for rail in self._rails]
        return None if any(value is None for value in values) else sum(value or 0.0 for value in values)

    def joules(self) -> float | None:
        return None


class RaplMeter:
    """Joules of the processor packages; counters that start again from 0 are carried over."""

    def __init__(self, zones: Sequence[Path]) -> None:
        self._zones = tuple(zones)
        self._last: dict[Path, float] = {}
        self._carried = 0.0
        self.source = f"rapl:{'+'.join((zone / 'name').read_text().strip() for zone in zones)}"

    def watts(self) -> float | None:
        return None

    def joules(self) -> float | None:
        total = 0.0
        for zone in self._zones:
            value = read_number(zone / "energy_uj")
            if value is None:
                return None
            if value < self._last.get(zone, 0.0):
                self._carried += read_number(zone / "max_energy_range_uj") or 0.0
            self._last[zone] = value
            total += value
        return (total + self._carried) / 1e6


class NvmlMeter:
    """The GPU's own energy counter, or its momentary power where it has no counter."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.counts = self.joules() is not None
        self.source = "nvml:energy counter" if self.counts else "nvml:momentary power"

    def watts(self) -> float | None:
        if self.counts:
            return None
        with contextlib.suppress(Exception):  # NotSupported is an exception of its own per version
            (field_value,) = self._nvml.nvmlDeviceGetFieldValues(self._handle, [self._nvml.NVML_FI_DEV_POWER_INSTANT])
            if field_value.nvmlReturn == 0:
                return float(field_value.value.uiVal) / 1000
        with contextlib.suppress(Exception):
            return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1000
        return None

    def joules(self) -> float | None:
        with contextlib.suppress(Exception):
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        return None


@dataclass(frozen=True)
class Heat:
    """One look at temperatures, clocks and whatever slows the machine down.

    Attributes:
        throttled: None where nothing on this machine would tell.
    """

    celsius: float | None
    throttled: bool | None
    reasons: tuple[str, ...] = ()
    clock_mhz: dict[str, float] = field(default_factory=dict)


class HeatProbe:
    """Looks at thermal zones, over-current and thermal-throttle counters, GPU clocks and NVML's reasons."""

    def __init__(self, root: Path = Path("/"), nvml: Any = None, handle: Any = None) -> None:
        self._zones = sorted((root / "sys/class/thermal").glob("thermal_zone*/temp"))
        self._counters = {
            **dict.fromkeys(sorted((root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt")), "over-current"),
            **dict.fromkeys(
                sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/package_throttle_count"))[:1],
                "processor too hot",
            ),
        }
        self._clocks = _clocks(root)
        self._nvml, self._handle = nvml, handle
        self._last = {path: read_number(path) for path in self._counters}

    def look(self) -> Heat:
        degrees = [value / 1000 for path in self._zones if (value := read_number(path)) is not None and value > 0]
        reasons: list[str] = []
        known = False
        for path, meaning in self._counters.items():
            value = read_number(path)
            known |= value is not None
            if value is not None and value > (self._last[path] or 0.0):
                reasons.append(meaning)
            self._last[path] = value
        clocks = {name: value / scale for name, (path, scale) in self._clocks.items() if (value := read_number(path))}
        if self._nvml is not None:
            known |= self._look_at_gpu(degrees, reasons, clocks)
        return Heat(max(degrees, default=None), bool(reasons) if known else None, tuple(dict.fromkeys(reasons)), clocks)

    def _look_at_gpu(self, degrees: list[float], reasons: list[str], clocks: dict[str, float]) -> bool:
        nvml, handle = self._nvml, self._handle
        with contextlib.suppress(Exception):
            degrees.append(float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)))
        with contextlib.suppress(Exception):
            clocks["gpu"] = float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        try:
            supported = int(nvml.nvmlDeviceGetSupportedClocksEventReasons(handle))
            active = int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        except Exception:
            return False
        reasons += [text for bit, text in CLOCK_REASONS.items() if supported & active & bit]
        return bool(supported)


def find_rails(root: Path = Path("/")) -> list[Rail]:
    """All INA3221 and INA238 channels with a label and something to read."""
    rails = []
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        name = read_text(chip / "name")
        if name not in SENSORS:
            continue
        if name == "ina238":
            label = read_text(chip / "label") or read_text(chip / "power1_label") or "VIN"
            power = chip / "power1_input"
            files = (power if power.is_file() else None, chip / "in1_input", chip / "curr1_input")
            rails.append(Rail(label, name, *files))
            continue
        for file in sorted(chip.glob("in[1-3]_label")):
            channel, text = file.name[2], read_text(file)
            if text and text != "NC" and read_text(chip / f"in{channel}_enable") != "0":
                rails.append(Rail(text, name, None, chip / f"in{channel}_input", chip / f"curr{channel}_input"))
    return [rail for rail in rails if rail.watts() is not None]


def board_meter(root: Path = Path("/")) -> RailMeter | None:
    """Power of a whole Jetson module: its input rail, or the top-level rails of a board known to have none."""
    rails = {rail.label: rail for rail in find_rails(root)}
    for label in TOTAL_RAILS:
        if label in rails:
            return RailMeter([rails[label]])
    for labels in TOP_RAILS:
        if labels <= set(rails):
            return RailMeter([rails[label] for label in rails if label in labels])
    return None


def rapl_meter(root: Path = Path("/")) -> RaplMeter | None:
    """Processor packages; most systems let only root read the counter."""
    zones = [
        zone
        for zone in sorted((root / "sys/class/powercap").glob("*:*"))
        if (read_text(zone / "name") or "").startswith("package") and read_number(zone / "energy_uj") is not None
    ]
    return RaplMeter(zones) if zones else None


def unreadable_rapl(root: Path = Path("/")) -> bool:
    """There are counters, but not for this user."""
    files = list((root / "sys/class/powercap").glob("*:*/energy_uj"))
    return bool(files) and all(read_number(path) is None for path in files)


def open_nvml() -> tuple[Any, Any] | None:
    """NVML and the handle of the first GPU, if there are both."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # not installed, no driver, no GPU: each version says it with another class
        return None


def find_meter(root: Path = Path("/"), nvml: tuple[Any, Any] | None = None, gpu: bool = False) -> Meter | None:
    """The source that covers most of what a model uses here: board input, then the GPU it runs on, then the processor."""
    meter: Meter | None = board_meter(root)
    if meter is None and nvml is not None and gpu:
        candidate = NvmlMeter(*nvml)
        meter = candidate if candidate.counts or candidate.watts() is not None else None
    return meter or rapl_meter(root)


def read_text(path: Path) -> str | None:
    try:
        return path.read_text().strip("\x00 \n\t")
    except (OSError, UnicodeDecodeError):
        return None


def read_number(path: Path) -> float | None:
    text = read_text(path)
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _clocks(root: Path) -> dict[str, tuple[Path, float]]:
    """devfreq reports Hz, cpufreq kHz."""
    found: dict[str, tuple[Path, float]] = {}
    for path in sorted((root / "sys/class/devfreq").glob("*/cur_freq")):
        name = path.parent.name
        if "gpu" in name or "ga10b" in name or "gv11b" in name or "gpc" in name:
            found.setdefault("gpu", (path, 1e6))
        elif "emc" in name:
            found["emc"] = (path, 1e6)
    cpu = root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
    if cpu.is_file():
        found["cpu"] = (cpu, 1e3)
    return found
