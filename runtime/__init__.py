"""One token at a time: `load(artefact)` gives an Engine, `engine.generate(messages)` streams events with timings."""

from runtime.loading import load

__all__ = ["load"]
