"""`deltaw config schema` and `deltaw init`: what can be set, and a commented file to start from."""

from __future__ import annotations

import json

import typer


def add(app: typer.Typer) -> None:
    """Register the commands."""
    config = typer.Typer(help="About configuration files.", no_args_is_help=True)
    app.add_typer(config, name="config")

    @config.command()
    def schema(
        recipe: str = typer.Argument(None, metavar="[RECIPE]", help="Include this recipe's own section."),
    ) -> None:
        """Print the JSON schema of a configuration file."""
        from deltaw.recipes.describe import json_schema

        typer.echo(json.dumps(json_schema(recipe), indent=2))

    @app.command()
    def init(
        recipe: str = typer.Argument(..., metavar="RECIPE", help="A recipe (see `deltaw recipes`)."),
        out: str = typer.Option(None, "--out", "-o", help="File to write. Default: RECIPE.yaml."),
    ) -> None:
        """Write a commented configuration file."""
        from pathlib import Path

        from deltaw.errors import ConfigError
        from deltaw.recipes.describe import commented
        from deltaw.training.checkpoint import write_atomic

        text = commented(recipe)
        path = Path(out or f"{recipe}.yaml")
        if path.exists():
            raise ConfigError(f"{path} exists: choose another name with --out")
        write_atomic(path, text)
        typer.echo(f"wrote {path}; run it with: deltaw train {path}")
