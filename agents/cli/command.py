"""The console command ``textgym``, which imports what it needs only after it can answer Ctrl-C."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command; Ctrl-C at any moment ends it with one line and the code 130."""
    try:
        from textgym.agents.cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        sys.exit(130)
