"""`python -m runtime`: ask, serve, profile, compare, eval, doctor."""

from runtime.cli import main
from vlm.console import run_command

if __name__ == "__main__":
    run_command(main)
