"""`deltaw inspect`: what is in an adapter."""

from __future__ import annotations

import json

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def inspect(
        adapter: str = typer.Argument(..., metavar="ADAPTER", help="A folder, or a hub id."),
        every: bool = typer.Option(False, "--all", "-a", help="Also a line for every weight."),
        revision: str = typer.Option(None, "--revision", help="Branch, tag or commit on the hub."),
        no_verify: bool = typer.Option(
            False, "--no-verify", help="Accept files that were edited since deltaw wrote them."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
    ) -> None:
        """Say what is in an adapter: methods, modules, norms, base, digest, and who can read it."""
        from deltaw.io.inspection import inspect as look
        from deltaw.io.inspection import text
        from deltaw.io.model_files import found

        facts = look(found(adapter, revision), verify=not no_verify)
        typer.echo(json.dumps(facts, indent=2) if as_json else text(facts, every))
