"""Errors a user can act on, and the exit code each one becomes.

    ToolError
    ├── GateFailed          exit 1: a parity, accuracy or regression gate did not hold
    ├── UserError           exit 2: the input is wrong
    │   ├── BadImage        not decodable, too large, not an allowed format
    │   ├── ArtifactError   missing, truncated, altered or mismatched artefact
    │   ├── CheckpointError a student or teacher directory that cannot be loaded
    │   └── DataError       a data set record that cannot be used
    └── MissingPiece        exit 3: this machine lacks something; what could be done is on disk

A message is one line: what is wrong, the value seen, what to type next.
"""

from __future__ import annotations

from typing import ClassVar


class ToolError(Exception):
    """Root of every error that is shown to the user as one line without a traceback."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    @property
    def message(self) -> str:
        return str(self)


class GateFailed(ToolError):
    code = "gate_failed"
    exit_code = 1


class UserError(ToolError):
    code = "bad_input"
    exit_code = 2


class BadImage(UserError):
    code = "bad_image"


class ArtifactError(UserError):
    code = "bad_artifact"


class CheckpointError(UserError):
    code = "bad_checkpoint"


class DataError(UserError):
    code = "bad_data"


class MissingPiece(ToolError):
    code = "missing_piece"
    exit_code = 3
