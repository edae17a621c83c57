"""Data sets of every supported format and container -> checked records -> examples -> batches."""

from distill.data.batch import Collator, DigitsExamples, Example, Examples, at_hand, batches, to_batch
from distill.data.records import (
    DataOptions,
    LlavaJson,
    Records,
    check_lengths,
    hold_out,
    open_records,
    write_skipped,
)
from distill.data.sampler import LengthGrouped, train_sampler
from distill.data.split import Split, open_split, open_streaming_split
from distill.data.stream import Streamed, StreamOptions

__all__ = [
    "Collator",
    "DataOptions",
    "DigitsExamples",
    "Example",
    "Examples",
    "LengthGrouped",
    "LlavaJson",
    "Records",
    "Split",
    "StreamOptions",
    "Streamed",
    "at_hand",
    "batches",
    "check_lengths",
    "hold_out",
    "open_records",
    "open_split",
    "open_streaming_split",
    "to_batch",
    "train_sampler",
    "write_skipped",
]
