from __future__ import annotations

from export.cli import main
from vlm.console import run_command

if __name__ == "__main__":
    run_command(main)
