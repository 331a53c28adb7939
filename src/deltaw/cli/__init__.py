"""The command line. One file per command; torch is imported by the commands that need it, when they run."""

from __future__ import annotations


def main() -> None:
    """Entry point of `deltaw`: run a command, turn errors into one message and an exit code."""
    from deltaw.cli.app import run

    run()
