"""The command `flexq`: a module a command, what they share in options and output, `main` in front."""

from flexq.cli.main import main

__all__ = ["main"]
