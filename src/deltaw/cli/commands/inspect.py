"""`deltaw inspect`: what is in an adapter, and what was trained on what."""

from __future__ import annotations

import json

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def inspect(
        adapter: str = typer.Argument(..., metavar="ADAPTER", help="An adapter's folder, a run's, or a hub id."),
        revision: str = typer.Option(None, "--revision", help="Branch, tag or commit on the hub."),
        every: bool = typer.Option(False, "--all", help="One line per changed weight."),
        verify: bool = typer.Option(
            True, "--verify/--no-verify", help="Refuse files that were edited since they were written."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
    ) -> None:
        """Say what an adapter changes, after every check that needs no model."""
        from deltaw.io.inspection import inspect as look
        from deltaw.io.inspection import text
        from deltaw.io.model_files import found

        facts = look(found(adapter, revision), verify=verify)
        typer.echo(json.dumps(facts, indent=2) if as_json else text(facts, every))
