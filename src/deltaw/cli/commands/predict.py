"""`deltaw predict`: what a kept result says about new inputs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from deltaw.training.task import Task


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def predict(
        run: str = typer.Argument(..., metavar="RUN", help="A run's folder, or an adapter's."),
        inputs: list[str] = typer.Argument(
            None, metavar="INPUT ...", help="Texts (or files, by the task). Without any: one per line of stdin."
        ),
        model: str = typer.Option(None, "--model", help="The base, where it is not at its recorded place."),
        as_json: bool = typer.Option(False, "--json", help="One JSON object per input."),
    ) -> None:
        """Label new inputs, with probabilities."""
        from pathlib import Path

        from deltaw.errors import DataError
        from deltaw.recipes.kept import open_kept

        given = list(inputs or ()) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
        if not given or any(not text.strip() for text in given):
            raise DataError("an input is empty: give texts on the command line, or one per line on stdin")
        _, task, net = open_kept(Path(run), model)
        answers, unreadable = answered(task, net, given)
        for answer in answers:
            if as_json:
                typer.echo(json.dumps(answer))
                continue
            shares = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
            typer.echo(
                f"{answer['label']}  {'  '.join(f'{name} {p:.4f}' for name, p in shares[:5])}  | {answer['text']}"
            )
        if unreadable:
            reasons = "\n  ".join(unreadable)
            raise DataError(f"{len(unreadable)} of {len(given)} inputs have no answer:\n  {reasons}")


def answered(task: Task, net: nn.Module, given: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The answers for all inputs that can be read, and why the others cannot."""
    from deltaw.errors import DataError

    try:
        return task.predict(net, given), []
    except DataError as error:
        if len(given) == 1:
            return [], [str(error)]
    each = [answered(task, net, [one]) for one in given]  # rare: what was done for the others is done again
    return [a for answers, _ in each for a in answers], [why for _, whys in each for why in whys]
