"""`deltaw train`: one method of one recipe, into a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def train(
        source: str = typer.Argument(
            ..., metavar="RECIPE|FILE.yaml", help="A recipe (see `deltaw recipes`) or a configuration file."
        ),
        overrides: list[str] = typer.Argument(
            None, metavar="key=value ...", help="Settings, for example epochs=3 lora.rank=4 lr=1e-4."
        ),
        method: str = typer.Option(None, "--method", "-m", help="lora, dora, lora:4, head, full, ..."),
        out: str = typer.Option(None, "--out", "-o", help="Run folder. Default: runs/RECIPE-METHOD."),
        overwrite: bool = typer.Option(False, "--overwrite", help="Replace the run folder if it exists."),
        dry_run: bool = typer.Option(
            False, "--dry-run", help="Say what would be trained, its cost and first examples; write nothing."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print the result as JSON, and nothing else."),
    ) -> None:
        """Fine-tune with one method and keep the result."""
        from deltaw.cli.outputs import new_folder, strict
        from deltaw.recipes.configure import load
        from deltaw.recipes.start import start
        from deltaw.training.methods import check_method

        config = load(source, overrides or (), {"method": method})
        if dry_run:
            from deltaw.recipes.configure import recipe_of
            from deltaw.training.rehearsal import rehearse, text

            facts = rehearse(lambda: recipe_of(config).task(config), config)
            typer.echo(json.dumps(facts, indent=2) if as_json else text(facts))
            return
        check_method(config)
        with new_folder(out, f"{config.recipe}-{config.method.replace(':', '')}", overwrite, "run") as folder:
            results = start(config, folder, quiet=as_json)
        if not results:
            return
        if as_json:
            typer.echo(strict({**results, "folder": str(folder)}, indent=2))
        else:
            typer.echo(last_line(results, str(folder)))


def last_line(results: Mapping[str, Any], folder: str) -> str:
    """What a run that is finished says of itself."""
    best, test, metric = results["best"], results["test"] or {}, results["metric"]
    return (
        f"best validation {metric} {best[metric]:.4f} (epoch {best['epoch']})"
        + (f", test {metric} {test[metric]:.4f}" if metric in test else "")
        + f", {results['seconds']:.1f} s of training; kept in {folder}"
    )
