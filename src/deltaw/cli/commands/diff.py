"""`deltaw diff`: which inputs an adapter changes most, and where two adapters disagree."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def diff(
        runs: list[str] = typer.Argument(..., metavar="A [B]", help="One or two run or adapter folders of one base."),
        data: str = typer.Option(..., "--data", "-d", help="Inputs: a line each, or .jsonl / .csv with a column."),
        column: str = typer.Option("text", "--column", help="The column of .jsonl and .csv."),
        model: str = typer.Option(None, "--model", help="The base, where it is not at its recorded place."),
        show: int = typer.Option(10, "--show", "-n", min=1, help="How many inputs of each list are printed."),
        as_json: bool = typer.Option(False, "--json", help="Print all as JSON."),
    ) -> None:
        """Compare answers with and without the adapter, and of two adapters, input by input."""
        from deltaw.analysis.outputs import difference
        from deltaw.cli.commands.analyze import distinct
        from deltaw.cli.commands.merge import option_named
        from deltaw.cli.outputs import strict
        from deltaw.errors import ConfigError
        from deltaw.io.model_files import load
        from deltaw.model.activate import disabled, use
        from deltaw.recipes.kept import open_kept

        if len(runs) > 2:
            raise ConfigError(f"diff compares one adapter with its base, or two adapters; {len(runs)} were given")
        texts = inputs(Path(data), column)
        _, task, net = open_kept(Path(runs[0]), model)
        if not hasattr(task, "labels"):
            raise ConfigError(
                f"{runs[0]} is a result of {type(task).__name__}, whose answers are no classes: they cannot be compared; "
                "`deltaw chat` shows the answers of a language model beside those of its base"
            )
        for other in runs[1:]:
            same_labels(runs[0], list(task.labels), other)
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
            with warnings.catch_warnings(), option_named("compare each with its base alone"):
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
            typer.echo(strict(facts, indent=1))
            return
        for (one, other), d in found.items():
            typer.echo(
                f"{one} and {other}: mean distance {d.mean:.3f}, another answer for {d.flipped:.1%} of {len(texts)}"
            )
            for row in d.table(texts, answers[one], answers[other])[:show]:
                typer.echo(f"  {row['distance']:.3f}  {row[one]} -> {row[other]}  | {row['input']}")


def same_labels(first: str, labels: list[str], other: str) -> None:
    """Refuse `other` if it says other class names than those of `first`, or the same in another order.

    Raises:
        ConfigError: it does.
    """
    from deltaw.compose.agreement import said_labels
    from deltaw.errors import ConfigError

    mine, theirs = said_labels({"labels": labels}), said_labels(facts_of(other))
    if mine and theirs and mine != theirs:
        raise ConfigError(
            f"{first} tells {mine} apart and {other} {theirs}: their answers cannot be compared; "
            "compare results of the same classes in the same order, or each with its base alone"
        )


def facts_of(source: str) -> Mapping[str, Any]:
    """What a run, or else an adapter, says of its task."""
    from deltaw.io.admission import admit
    from deltaw.io.model_files import found
    from deltaw.recipes.kept import described
    from deltaw.training.run import CONFIG

    return described(Path(source))[1] if (Path(source) / CONFIG).is_file() else admit(found(source)).adapter.extra


def inputs(path: Path, column: str) -> list[str]:
    """The texts of a file: lines, or a column of JSON lines or CSV. Empty ones are left out, and counted on stderr.

    Raises:
        DataError: the file is missing, not readable, or holds no text.
    """
    import csv

    from deltaw.errors import DataError

    if not path.is_file():
        raise DataError(f"--data {path}: no such file")
    try:
        with path.open(encoding="utf-8-sig", newline="" if path.suffix.lower() == ".csv" else None) as file:
            if path.suffix.lower() in (".jsonl", ".json"):
                found = [json.loads(line)[column] for line in file if line.strip()]
            elif path.suffix.lower() == ".csv":
                found = [row[column] for row in csv.DictReader(file)]
            else:
                found = [line.rstrip("\n") for line in file]
    except (KeyError, TypeError):
        raise DataError(f"--data {path}: a row has no {column!r}; name the column with --column") from None
    except (ValueError, csv.Error) as error:
        raise DataError(f"--data {path}: not readable ({error})") from None
    texts = [str(text) for text in found if text is not None and str(text).strip()]
    if not texts:
        raise DataError(f"--data {path}: no text in its {len(found)} rows; give one input a line, or name the --column")
    if len(texts) < len(found):
        typer.echo(f"--data {path}: {len(found) - len(texts)} of {len(found)} rows are empty and left out", err=True)
    return texts
