"""`deltaw predict`: what a kept result says about new inputs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
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

        from deltaw.cli.outputs import strict
        from deltaw.errors import DataError
        from deltaw.recipes.kept import open_kept
        from deltaw.training.labelled import short

        given = list(inputs or ()) or list(typed())
        while given and not inputs and not given[-1].strip():  # empty lines at the end of stdin
            given.pop()
        if not given:
            raise DataError("no input: give texts on the command line, or one per line on stdin")
        if empty := [n for n, text in enumerate(given, 1) if not text.strip()]:
            raise DataError(
                f"input {', '.join(map(str, empty[:5]))}{' ...' if len(empty) > 5 else ''} of {len(given)} is empty: "
                "every input needs a text, so that answers and inputs line up"
            )
        if strange := [text for text in given if text != text.encode(errors="replace").decode()]:
            raise DataError(f"the input {strange[0]!r} is not UTF-8: convert it to UTF-8")
        _, task, net = open_kept(Path(run), model)
        answers, unreadable = answered(task, net, given)
        for answer in answers:
            if as_json:
                typer.echo(strict(answer))
                continue
            if "answer" in answer:  # of a language model, which knows no classes
                typer.echo(f"{answer['answer']}  | {answer['text']}")
                continue
            shares = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
            typer.echo(
                f"{short(answer['label'])}  {'  '.join(f'{short(name)} {p:.4f}' for name, p in shares[:5])}"
                f"  | {answer['text']}"
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


def typed() -> Iterator[str]:
    """The lines of stdin as they come, without their ends and a byte order mark.

    Raises:
        DataError: one is not UTF-8.
    """
    from deltaw.errors import DataError

    for number, raw in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"stdin: line {number} is not UTF-8 ({error.reason}): convert the input to UTF-8") from None
        yield line.rstrip("\r\n")
