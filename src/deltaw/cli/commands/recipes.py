"""`deltaw recipes`: what can be run."""

from __future__ import annotations

import json

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def recipes(as_json: bool = typer.Option(False, "--json", help="Print as JSON.")) -> None:
        """List the recipes and the methods."""
        from deltaw.recipes.recipe import recipes as known
        from deltaw.training.methods import known_methods

        if as_json:
            typer.echo(
                json.dumps({"recipes": {n: r.about for n, r in known.items()}, "methods": known_methods()}, indent=2)
            )
            return
        typer.echo("recipes:")
        for name, recipe in known.items():
            typer.echo(f"  {name:<22} {recipe.about}")
        typer.echo("methods:")
        for name, about in known_methods().items():
            typer.echo(f"  {name:<22} {about}")
