"""The C library's allocator: told to keep what a training step frees for the next one, or to give it back now.

By default glibc asks the kernel for every block above 32 MiB and gives it back when it is freed: each step touches its
logits, gradients and activations as new pages. On a virtual machine that was a third of a step's processor time
(benchmarks/distill_step.py). The price is that memory once used stays with the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

# mallopt's parameters (malloc.h)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER = -1
CHOICES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
STEP_BYTES = 64 << 20


def keep_freed() -> bool:
    """Serve every block from a heap that does not shrink; False where that is not glibc's malloc or the user chose already.

    These MALLOC_ variables and glibc.malloc tunables in the environment win.
    """
    if any(name in os.environ for name in CHOICES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return all(mallopt(*pair) for pair in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, STEP_BYTES)))
    return False


def give_back() -> None:
    """Return freed memory to the system now."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
