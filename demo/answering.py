"""One answer as a page shows it: the text so far, and at its end where the time and the energy went."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from demo import timeline
from demo.instruments import Instruments
from demo.session import batches
from runtime.api import Done, Event, Message, Reuse, Sampling, Token
from runtime.engine import EngineLike
from vlm.errors import UserError

LONGEST_ANSWER = 512


@dataclass(frozen=True)
class Reply:
    """`text` grows; `done` and what follows from it come with the last one."""

    text: str
    done: Done | None = None
    view: timeline.Breakdown | None = None
    html: str = ""


@dataclass(frozen=True)
class Run:
    """Everything that stays the same during one answer; `label` names the model on the page."""

    engine: EngineLike
    instruments: Instruments
    label: str
    cancel: threading.Event
    first: bool = False
    reuse: Reuse = "all"


async def replies(run: Run, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Reply, None]:
    """Stream one answer; the last reply has the whole text and the breakdown of its latency.

    Raises:
        Exception: whatever the request failed with.
    """
    said, events = "", list[Event]()
    with run.instruments.recording() as recorder:
        async with aclosing(batches(run.engine, messages, sampling, run.cancel, run.reuse)) as stream:
            async for batch in stream:
                events += batch
                if batch and isinstance(batch[-1], Done):
                    break
                said += "".join(event.text for event in batch if isinstance(event, Token))
                yield Reply(said)
    done, view = events[-1], timeline.break_down(events)
    if not isinstance(done, Done):
        raise RuntimeError("the request did not finish")

    def render() -> Reply:
        cost = run.instruments.cost(run.engine.info, view.timing, done, recorder)
        return Reply(done.text, done, view, timeline.render(view, run.label, run.first, cost))

    yield render()
    if view.timing.tpot_ms is not None and run.instruments.wants_bandwidth(run.engine.info):
        # once per device, after the answer and before the next one may begin: neither disturbs the other
        await asyncio.to_thread(run.instruments.measure_bandwidth, run.engine.info)
        yield render()


def sampling_of(
    length: float | None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: float | None = None,
    min_p: float | None = None,
    penalty: float | None = None,
    seed: str | None = None,
    stop: str | None = None,
) -> Sampling:
    """What the controls say; an emptied field means its default.

    Args:
        stop: strings that end the answer, one per line.

    Raises:
        UserError: a value is out of range.
    """
    default, seed = Sampling(), (seed or "").strip()
    tokens = int(length or default.max_new_tokens)
    if tokens > LONGEST_ANSWER:
        raise UserError(f"the longest answer is {tokens} tokens; give 1 to {LONGEST_ANSWER}")
    if seed and not (seed.isascii() and seed.isdecimal()):
        raise UserError(f"the seed is {seed!r}; give a whole number from 0 up, or nothing")
    return Sampling(
        max_new_tokens=tokens,
        temperature=float(temperature or 0),
        top_p=float(default.top_p if top_p is None else top_p),
        top_k=int(top_k or 0),
        min_p=float(min_p or 0),
        repetition_penalty=float(default.repetition_penalty if penalty is None else penalty),
        seed=int(seed) if seed else None,
        stop=tuple(line for line in (stop or "").splitlines() if line),
    )
