"""Freed memory stays with the process that trains, unless the user chose otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping

import pytest

from vlm.allocator import CHOICES

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
# pages touched by filling 256 MiB again after it was freed
PROGRAM = """
import resource
import torch
from vlm import allocator

def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

took = allocator.keep_freed()
# a freed block does not always hold an aligned one of its own size (glibc < 2.38), but always a smaller one
torch.empty(65 << 20).fill_(1.0)
again = min(fill() for _ in range(8))
allocator.give_back()
print(took, again, fill())
"""
PAGES = (256 << 20) // os.sysconf("SC_PAGE_SIZE")


def faults(environment: Mapping[str, str]) -> tuple[bool, int, int]:
    """(was the allocator told, pages touched anew by the best of eight turns, and after giving memory back)."""
    clean = {name: value for name, value in os.environ.items() if name not in (*CHOICES, "GLIBC_TUNABLES")}
    clean |= {"THP_MEM_ALLOC_ENABLE": "0", **environment}
    out = subprocess.run([sys.executable, "-c", PROGRAM], env=clean, check=True, capture_output=True, text=True).stdout
    took, again, after = out.split()
    return took == "True", int(again), int(after)


def test_freed_memory_is_used_again_without_asking_the_kernel() -> None:
    took, again, after = faults({})
    assert took
    assert again < PAGES // 100
    assert after > PAGES // 2  # give_back really gave


@pytest.mark.parametrize("chosen", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=0"}])
def test_the_users_choice_of_allocator_wins(chosen: dict[str, str]) -> None:
    took, again, _ = faults(chosen)
    assert not took
    assert again > PAGES // 2
