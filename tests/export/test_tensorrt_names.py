"""The names our code uses of TensorRT and CUDA exist in the published bindings.

The bindings cannot be loaded without a GPU. `scripts/tensorrt-names WHEEL` reads the names from the library's file; what
it read is kept here, so that a name nobody looked up fails. Read from tensorrt-cu12-bindings 10.3.0 and 10.13.3.9 and
tensorrt-cu13-bindings 11.4.0.106.
"""

from __future__ import annotations

import inspect
import runpy
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.fake_cuda import FakeCudart

ROOT = Path(__file__).resolve().parents[2]
NAMES = """
    AMPERE_PLUS Builder BuilderFlag TF32 clear_flag ERROR ExecutionContextAllocationStrategy HardwareCompatibilityLevel ILogger INPUT
    INTERNAL_ERROR Logger MemoryPoolType NetworkDefinitionCreationFlag OUTPUT OnnxParser Runtime STRONGLY_TYPED Severity
    TensorIOMode USER_MANAGED VERBOSE VERSION_COMPATIBLE WARNING WORKSPACE __init__ add_optimization_profile
    build_serialized_network builder_optimization_level create_builder_config create_execution_context create_network
    create_optimization_profile create_timing_cache deserialize_cuda_engine engine_host_code_allowed execute_async_v3
    get_device_memory_size_for_profile_v2 get_error get_tensor_mode get_tensor_name get_timing_cache
    hardware_compatibility_level num_errors num_io_tensors num_optimization_profiles parse_from_file serialize
    set_device_memory set_flag set_input_shape set_memory_pool_limit set_optimization_profile_async set_shape
    set_tensor_address set_timing_cache
"""
EVERYWHERE = frozenset(NAMES.split())
SINCE_10_13 = frozenset({"SAME_COMPUTE_CAPABILITY"})


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "tensorrt-names"))


def test_no_name_is_used_that_nobody_looked_up(script: dict[str, Any]) -> None:
    used = script["names_in_use"]()
    assert used - EVERYWHERE - {"__version__"} == SINCE_10_13 == script["OPTIONAL"]
    assert len(used) > 50, "the script no longer sees what the code uses"


def test_the_script_reads_wheels(script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = tmp_path / "tensorrt.whl"
    names = sorted(EVERYWHERE)
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("tensorrt_bindings/tensorrt.so", b"\0".join(n.encode() for n in names) + b"\0")
    assert script["main"]([str(wheel)]) == 0
    assert "without SAME_COMPUTE_CAPABILITY" in capsys.readouterr().out
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("tensorrt_bindings/tensorrt.so", b"\0".join(n.encode() for n in names[1:]) + b"\0")
    assert script["main"]([str(wheel)]) == 1
    assert names[0] in capsys.readouterr().out
    assert script["main"]([str(tmp_path / "none")]) == 2


def test_the_cuda_stand_in_has_the_real_signatures() -> None:
    """Where cuda-python is installed: it loads without a GPU, and its docstrings begin with the signature."""
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    names = [name for name, value in vars(FakeCudart).items() if name.startswith("cuda") and inspect.isfunction(value)]
    assert len(names) > 15
    for name in names:
        wanted = len(inspect.signature(getattr(FakeCudart, name)).parameters) - 1
        signature = getattr(real, name).__doc__.strip().splitlines()[0]
        inside = signature[signature.index("(") + 1 : signature.rindex(")")]
        assert len([part for part in inside.split(",") if part.strip()]) == wanted, signature
