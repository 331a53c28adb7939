"""`deltaw study`: train a grid of ranks and seeds, and see what the rank changes (Hu et al. 2021, section 7)."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def study(
        source: str = typer.Argument(..., metavar="RECIPE|FILE.yaml", help="A recipe or a configuration file."),
        overrides: list[str] = typer.Argument(None, metavar="key=value ...", help="Settings of all runs."),
        ranks: str = typer.Option("1,2,4,8,64", "--ranks", help="Comma-separated."),
        seeds: int = typer.Option(3, "--seeds", help="How many seeds for every rank, counted from the task's own."),
        method: str = typer.Option("lora", "--method", "-m", help="A method that has a rank."),
        of: str = typer.Option("change", "--of", help="Directions of the change ΔW, or of the 'factors' as the paper."),
        out: str = typer.Option(
            None, "--out", "-o", help="Folder. Default: runs/study-RECIPE. Finished runs in it are kept."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print all numbers as JSON."),
    ) -> None:
        """Train the grid (what is finished is not trained again), then write report.html, PNGs, study.md and study.json."""
        from deltaw.analysis.study import Run, write
        from deltaw.analysis.study import study as compare_runs
        from deltaw.core.options import positive_int
        from deltaw.errors import ConfigError
        from deltaw.io.files import read
        from deltaw.recipes.compare import compare, plan
        from deltaw.recipes.configure import load, recipe_of
        from deltaw.recipes.start import with_base

        try:
            numbers = [int(r) for r in ranks.split(",")]
        except ValueError:
            raise ConfigError(f"--ranks {ranks}: whole numbers with commas between them, for example 1,2,4,8") from None
        positive_int("seeds", seeds)
        config = load(source, overrides or ())
        folder = Path(out or f"runs/study-{config.recipe}")
        command = shlex.join(["deltaw", *sys.argv[1:]])
        grid: dict[str, tuple[int, int]] = {}
        configs = {}
        for rank in numbers:
            for seed in range(config.seed, config.seed + seeds):
                ((_, made),) = plan(config, [f"{method}:{rank}"], [seed]).items()
                name = f"rank{rank}-seed{seed}"
                grid[name], configs[name] = (rank, seed), made
        check_same(folder / "runs", configs)
        compare(configs, folder / "runs", command)

        first = with_base(next(iter(configs.values())), folder / "runs")
        problem = recipe_of(first).task(first)
        runs = []
        for name, (rank, seed) in grid.items():
            results = json.loads((folder / "runs" / name / "results.json").read_text())
            scores = results["test"] or results["best"]
            runs.append(
                Run(
                    rank=rank,
                    seed=seed,
                    adapter=read(folder / "runs" / name),
                    scores=scores,
                    parameters=results["parameters"]["trainable"],
                    seconds=results["seconds"],
                )
            )
        found = compare_runs(runs, problem.metric, problem.build(), higher_is_better=problem.higher_is_better, of=of)
        subtitle = (
            f"{config.recipe}, {config.model or 'a base pretrained by the recipe'}, {method}, {seeds} seeds; {command}"
        )
        write(found, folder, "What the rank changes", subtitle)
        if as_json:
            typer.echo(json.dumps(found.facts(), indent=1))
            return
        for row in found.rows:
            typer.echo(
                f"rank {row['rank']:3d}  {found.metric} {row['mean']:.4f} ± {row['spread']:.4f}  {row['parameters']:,} parameters"
            )
        for said in found.findings():
            typer.echo(said)
        typer.echo(f"report: {folder / 'report.html'}")


def check_same(folder: Path, configs: dict) -> None:  # type: ignore[type-arg]
    """Refuse to go on in a folder whose finished runs were made with other settings."""
    from deltaw.errors import ConfigError
    from deltaw.recipes.configure import load

    for name, config in configs.items():
        kept = folder / name / "config.resolved.yaml"
        if kept.is_file() and load(str(kept)).digest() != config.digest():
            raise ConfigError(f"{folder / name} was run with other settings: give another --out, or remove it")
