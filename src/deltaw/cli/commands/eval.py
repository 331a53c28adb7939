"""`deltaw eval`: score a kept result on a split of its data, or on other data."""

from __future__ import annotations

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command("eval")
    def evaluate(
        run: str = typer.Argument(..., metavar="RUN", help="A run's folder, or an adapter's."),
        overrides: list[str] = typer.Argument(None, metavar="key=value ...", help="For example data=other.jsonl."),
        split: str = typer.Option(
            None, "--split", help="train, validation or test. Default: test; of other data without one, all."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
    ) -> None:
        """Score a kept result."""
        from pathlib import Path

        from deltaw.recipes.kept import score

        found = score(Path(run), overrides or (), split)
        if as_json:
            from deltaw.cli.outputs import strict

            typer.echo(strict(found))
        else:
            typer.echo("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()))
