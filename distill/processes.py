"""Several processes of one run (torchrun, accelerate launch): who writes, who waits, what all agree on.

Everything here is a plain call in a run of one process.
"""

from __future__ import annotations

import atexit
import datetime
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from vlm.console import note
from vlm.errors import ToolError

T = TypeVar("T")

# the first process may hash a large data set or write a large student while the others wait
PATIENCE = datetime.timedelta(hours=2)


def join() -> None:
    """Become one of the processes a launcher started; without a launcher nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        atexit.register(_leave)


def _leave() -> None:
    """Without this the group's threads outlive the interpreter and abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave() -> None:
    """End this process of a group, with success, once everything is written; alone, nothing happens.

    A thread of the group that lets go of a tensor while the interpreter closes down aborts the process, and the launcher
    then reports a finished run as failed. So the interpreter is not closed down.
    """
    if world() == 1:
        return
    wait()
    atexit._run_exitfuncs()  # loggers finish theirs, then the group is left
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def is_first() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        dist.barrier()


def share(value: T) -> T:
    """The first process's value, for all."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def gather(value: T) -> list[T]:
    """Every process's value, in their order."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def total(value: Tensor) -> Tensor:
    """Sum of the processes' tensors."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def any_of(flag: bool, device: torch.device | str) -> bool:
    """Whether the flag is set in any process."""
    return flag if world() == 1 else bool(total(torch.tensor([float(flag)], device=device)) > 0)


def first(work: Callable[[], T]) -> T:
    """Do `work` in the first process only and hand its result to all.

    Raises:
        ToolError: what the first process raised; the others end with the same exit code and say nothing.
    """
    if world() == 1:
        return work()
    result: Any = None
    error: BaseException | None = None
    if is_first():
        try:
            result = work()
        except BaseException as caught:
            error = caught
    failed = share(None if error is None else error.exit_code if isinstance(error, ToolError) else 1)
    if error is not None:
        raise error
    if failed is not None:
        raise SystemExit(failed)
    return share(result)


def one_after_another(work: Callable[[], T]) -> T:
    """Do `work` in every process, in the first one before the others, so that what is wrong is said once.

    Raises:
        ToolError: what the first process raised; the others end with the same exit code and say nothing.
    """
    kept: list[T] = []
    first(lambda: kept.append(work()))
    return kept[0] if kept else work()


def say(message: str) -> None:
    """Tell the user once."""
    if is_first():
        note(message)


def refuse(error: ToolError) -> NoReturn:
    """Give up in every process, saying why once."""
    raise error if is_first() else SystemExit(error.exit_code)


def turns(count: int, size: int) -> list[tuple[range, bool]]:
    """This process's share of the batches of `count` items, and whether each one counts.

    Every process gets equally many, since sharded models need all processes at every pass; the surplus repeats the last
    batch and does not count.
    """
    chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    surplus = -len(chunks) % world()
    marked = [(chunk, True) for chunk in chunks] + [(chunks[-1], False)] * surplus if chunks else []
    return marked[rank() :: world()]


def in_order(shares: Sequence[Sequence[T]]) -> list[T]:
    """What the processes computed for their `turns`, back in the order of the batches."""
    return [part[i] for i in range(max(map(len, shares), default=0)) for part in shares if i < len(part)]
