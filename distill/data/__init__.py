"""Data sets of every supported format and container -> checked records -> examples -> batches."""

from distill.data.batch import Collator, DigitsExamples, Example, Examples, batches, to_batch
from distill.data.records import (
    DataOptions,
    LlavaJson,
    Records,
    check_lengths,
    hold_out,
    open_records,
    write_skipped,
)
from distill.data.sampler import LengthGrouped
from distill.data.split import Split, open_split

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
    "batches",
    "check_lengths",
    "hold_out",
    "open_records",
    "open_split",
    "to_batch",
    "write_skipped",
]
