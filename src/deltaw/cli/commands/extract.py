"""`deltaw extract`: a low-rank adapter from a full fine-tune."""

from __future__ import annotations

import json

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def extract(
        tuned: str = typer.Argument(
            ..., metavar="TUNED", help="The fine-tuned model: folder, hub id, safetensors file, or a full run."
        ),
        base: str = typer.Option(..., "--base", metavar="MODEL", help="What it was fine-tuned from."),
        out: str = typer.Option(..., "--out", "-o", metavar="DIR", help="Folder to write."),
        rank: int = typer.Option(None, "--rank", "-r", help="Rank of every change."),
        energy: float = typer.Option(
            None, "--energy", help="Instead: the share of the squared change to keep, such as 0.95."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
    ) -> None:
        """Write the adapter nearest to TUNED minus MODEL, with its error."""
        from pathlib import Path

        from deltaw.io.base_models import open_alike, open_base
        from deltaw.io.extraction import extract as take
        from deltaw.io.files import write
        from deltaw.training.run import FACTS, STATUS

        if (Path(tuned) / STATUS).is_file():
            tuned = str(Path(tuned) / "model")
        new, old = open_base(tuned, weights=True), open_base(base, weights=True)
        if new.model is not None and old.model is not None:
            model, added = old.model, list[str]()
            if type(new.model) is not type(old.model):  # such as a classifier over a plain encoder
                model, added = open_alike(base, new.model)
            adapter = take(new.model, model, rank, energy=energy, added=added)
        else:
            adapter = take(new.all(), old.all(), rank, energy=energy)
        said = Path(tuned) / FACTS
        facts = (
            json.loads(said.read_text()) if said.is_file() else {}
        )  # of a full fine-tune of ours: recipe, labels ...
        facts.pop("test", None)
        write(adapter.replace(base={**adapter.base, "name": base}, extra=facts), out)
        worst = max(adapter.error.items(), key=lambda item: item[1], default=("", 0.0))
        if as_json:
            typer.echo(json.dumps({"out": out, "error": dict(adapter.error)}))
        else:
            typer.echo(f"wrote {out}: {adapter!r}; relative error at most {worst[1]:.2%} ({worst[0]})")
