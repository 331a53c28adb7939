"""`deltaw chat`: talk to a fine-tuned model, and to its base beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def chat(
        run: str = typer.Argument(..., metavar="RUN", help="A run's folder, or an adapter's."),
        prompt: list[str] = typer.Option(
            None, "--prompt", "-p", help="Ask this and stop. Several: one conversation, in turn."
        ),
        system: str = typer.Option(None, "--system", help="System message."),
        model: str = typer.Option(None, "--model", help="The base, where it is not at its recorded place."),
        alone: bool = typer.Option(False, "--alone", help="Only the fine-tuned model, without the base beside it."),
        max_new: int = typer.Option(64, "--max-new-tokens", min=1, help="Longest answer, in tokens."),
        temperature: float = typer.Option(0.0, "--temperature", min=0.0, help="0: the most likely token each time."),
        seed: int = typer.Option(0, "--seed", help="Of the draws, if there is a temperature."),
        as_json: bool = typer.Option(False, "--json", help="One JSON object per answer."),
    ) -> None:
        """Talk to base and adapter side by side. An empty line ends it."""
        from pathlib import Path

        from deltaw.errors import DataError
        from deltaw.recipes.talking import Talk

        if prompt and any(not text.strip() for text in prompt):
            raise DataError("--prompt is empty")
        talk = Talk(
            Path(run), model=model, system=system, alone=alone, max_new=max_new, temperature=temperature, seed=seed
        )
        for text in prompt or _typed():
            answers = talk.say(text)
            if as_json:
                typer.echo(json.dumps({"prompt": text, **answers}))
                continue
            if prompt:
                typer.echo(f"you      {text}")
            for name, answer in answers.items():
                typer.echo(f"{name:<8} {answer}")


def _typed() -> Iterator[str]:
    """Lines as they are typed (or piped in), until an empty one or the end."""
    from deltaw.cli.commands.predict import typed

    lines = typed()
    while True:
        if sys.stdin.isatty():
            print("you      ", end="", flush=True)
        line = next(lines, "").strip()
        if not line:
            return
        yield line
