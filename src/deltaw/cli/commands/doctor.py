"""`deltaw doctor`: does an adapter change anything, and where?"""

from __future__ import annotations

import json

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def doctor(
        adapter: str = typer.Argument(..., metavar="ADAPTER", help="A folder, or a hub id."),
        base: str = typer.Option(..., "--base", metavar="MODEL", help="Model folder or hub id."),
        revision: str = typer.Option(None, "--revision", help="Branch, tag or commit of the adapter on the hub."),
        allow_base_mismatch: bool = typer.Option(False, "--allow-base-mismatch", help="Examine it on other weights."),
        as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
    ) -> None:
        """Run inputs with the adapter on and off: does it change anything, is a module dead or exploding? Exit code 2 if ill."""
        from deltaw.cli.commands.merge import option_named
        from deltaw.errors import AdapterError
        from deltaw.io.admission import admit
        from deltaw.io.base_models import open_base
        from deltaw.io.doctor import doctor as examine
        from deltaw.io.doctor import text
        from deltaw.io.model_files import found, load

        folder = found(adapter, revision)
        model = open_base(base, admit(folder).adapter, weights=True).model
        if model is None:
            raise AdapterError(f"{base} holds weights without a model to run: give a folder that transformers loads")
        with option_named():
            load(model, folder, allow_base_mismatch=allow_base_mismatch)
        findings = examine(model)
        typer.echo(json.dumps(findings, indent=2) if as_json else text(findings))
        if not findings["healthy"]:
            raise typer.Exit(2)
