"""`deltaw diff`: which inputs an adapter changes most, and where two adapters disagree."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def diff(
        runs: list[str] = typer.Argument(..., metavar="A [B]", help="One or two run or adapter folders of one base."),
        data: str = typer.Option(..., "--data", "-d", help="Inputs: a line each, or .jsonl / .csv with a column."),
        column: str = typer.Option("text", "--column", help="The column of .jsonl and .csv."),
        model: str = typer.Option(None, "--model", help="The base, where it is not at its recorded place."),
        show: int = typer.Option(10, "--show", "-n", help="How many inputs of each list are printed."),
        as_json: bool = typer.Option(False, "--json", help="Print all as JSON."),
    ) -> None:
        """Compare answers with and without the adapter, and of two adapters, input by input."""
        from deltaw.analysis.outputs import difference
        from deltaw.cli.commands.analyze import distinct
        from deltaw.errors import ConfigError
        from deltaw.io.model_files import load
        from deltaw.model.activate import disabled, use
        from deltaw.recipes.kept import open_kept

        if len(runs) > 2:
            raise ConfigError(f"diff compares one adapter with its base, or two adapters; {len(runs)} were given")
        texts = inputs(Path(data), column)
        _, task, net = open_kept(Path(runs[0]), model)
        names = distinct(runs)
        answers = {}
        try:
            with disabled(net):
                answers["base"] = [a["probabilities"] for a in task.predict(net, texts)]
            with use(net, "default"):
                answers[names[0]] = [a["probabilities"] for a in task.predict(net, texts)]
        except NotImplementedError as error:
            raise ConfigError(f"{runs[0]}: {error}: its answers cannot be compared") from None
        if len(runs) == 2:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the same base as the first, whose notes were printed
                load(net, runs[1], "other", active=False)
            with use(net, "other"):
                answers[names[1]] = [a["probabilities"] for a in task.predict(net, texts)]
        pairs = [("base", name) for name in names] + ([(names[0], names[1])] if len(names) == 2 else [])
        found = {pair: difference(pair, answers[pair[0]], answers[pair[1]]) for pair in pairs}
        if as_json:
            facts = [
                {
                    "of": list(pair),
                    "mean_distance": d.mean,
                    "flipped": d.flipped,
                    "inputs": d.table(texts, answers[pair[0]], answers[pair[1]]),
                }
                for pair, d in found.items()
            ]
            typer.echo(json.dumps(facts, indent=1))
            return
        for (one, other), d in found.items():
            typer.echo(
                f"{one} and {other}: mean distance {d.mean:.3f}, another answer for {d.flipped:.1%} of {len(texts)}"
            )
            for row in d.table(texts, answers[one], answers[other])[:show]:
                typer.echo(f"  {row['distance']:.3f}  {row[one]} -> {row[other]}  | {row['input']}")


def inputs(path: Path, column: str) -> list[str]:
    """The texts of a file: lines, or a column of JSON lines or CSV; empty ones are refused."""
    import csv

    from deltaw.errors import DataError

    if not path.is_file():
        raise DataError(f"--data {path}: no such file")
    try:
        if path.suffix in (".jsonl", ".json"):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            found = [str(row[column]) for row in rows]
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                found = [row[column] for row in csv.DictReader(file)]
        else:
            found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (KeyError, TypeError):
        raise DataError(f"--data {path}: a row has no {column!r}; name the column with --column") from None
    except ValueError as error:
        raise DataError(f"--data {path}: not readable ({error})") from None
    if not found or not all(text.strip() for text in found):
        raise DataError(f"--data {path}: no inputs, or an empty one")
    return found
