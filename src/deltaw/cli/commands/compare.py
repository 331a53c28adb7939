"""`deltaw compare`: several methods on the same task, a table, a report, and which one to take."""

from __future__ import annotations

import json
import shlex
import sys

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def compare(
        source: str = typer.Argument(..., metavar="RECIPE|FILE.yaml", help="A recipe or a configuration file."),
        overrides: list[str] = typer.Argument(None, metavar="key=value ...", help="Settings of all runs."),
        methods: str = typer.Option(
            None, "--methods", help="Comma-separated, for example full,head,lora:4,lora:16,dora."
        ),
        seeds: str = typer.Option(None, "--seeds", help="Comma-separated; several give means and spreads."),
        out: str = typer.Option(None, "--out", "-o", help="Folder. Default: runs/compare-RECIPE."),
        overwrite: bool = typer.Option(False, "--overwrite", help="Replace the folder if it exists."),
        as_json: bool = typer.Option(False, "--json", help="Print results.json, and nothing else."),
    ) -> None:
        """Fine-tune with several methods and compare them."""
        from deltaw.cli.outputs import new_folder
        from deltaw.errors import ConfigError
        from deltaw.recipes.compare import compare as run
        from deltaw.recipes.compare import plan
        from deltaw.recipes.configure import load, recipe_of

        config = load(source, overrides or ())
        chosen = (
            [m.strip() for m in methods.split(",") if m.strip()]
            if methods is not None
            else list(recipe_of(config).methods)
        )
        try:
            numbers = [int(s) for s in seeds.split(",")] if seeds else [config.seed]
        except ValueError:
            raise ConfigError(
                f"--seeds {seeds}: whole numbers with commas between them, for example --seeds 0,1,2"
            ) from None
        configs = plan(config, chosen, numbers)
        command = shlex.join(["deltaw", *sys.argv[1:]])
        with new_folder(out, f"compare-{config.recipe}", overwrite, "comparison") as folder:
            rows, _, sentence = run(configs, folder, command, aside=as_json)
        show(rows, sentence, str(folder), as_json=as_json)


def show(rows: list, sentence: str, folder: str, *, as_json: bool = False) -> None:  # type: ignore[type-arg]
    """Print the table and the verdict."""
    from pathlib import Path

    from deltaw.training.verdict import table

    results = json.loads((Path(folder) / "results.json").read_text())
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    lines = table(rows, results["metric"])
    wide = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    typer.echo()
    for line in lines:
        typer.echo("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, wide))))
    typer.echo(f"\n{sentence}\nreport: {folder}/report.html")
