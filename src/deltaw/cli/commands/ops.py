"""`deltaw ops`: which kernels run for a shape, by which rule, and how fast they are here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from deltaw.ops.kernels import Shape


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def ops(
        model: str = typer.Argument(
            None, metavar="[MODEL|RUN]", help="A model's layers, or a run's record; left out: typical ones."
        ),
        shape: list[str] = typer.Option(
            None, "--shape", metavar="TOKENS,IN,OUT,RANK", help="Ask for this shape; may be repeated."
        ),
        tokens: int = typer.Option(1024, "--tokens", min=1, help="Rows per forward pass, for MODEL."),
        rank: int = typer.Option(8, "--rank", min=1, help="Rank of the adapters, for MODEL."),
        measured: bool = typer.Option(False, "--time", help="Measure every kernel, forward and backward."),
        as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
    ) -> None:
        """Say which kernels run for each shape and why: merged or added, oneDNN or MKL, 8 bit or dense."""
        from dataclasses import asdict

        import torch

        from deltaw.errors import ConfigError
        from deltaw.ops.choices import Choices
        from deltaw.ops.kernels import TYPICAL, kernels, measure

        if model is not None and shape:
            raise ConfigError("give MODEL or --shape, not both: a model brings its own shapes")
        choices = Choices(timed=measured)
        if model is not None and (Path(model) / "run.json").is_file():
            recorded = json.loads((Path(model) / "run.json").read_text()).get("kernels")
            if recorded is None:
                raise ConfigError(f"{model} is a run without 8-bit weights: it chose no kernels; name its base instead")
            choices = Choices.from_json(json.dumps(recorded))
            lines = choices.lines() or ["8 bit everywhere, by the fixed rule: nothing was timed"]
            typer.echo(json.dumps(recorded, indent=1) if as_json else "\n".join(lines))
            return
        shapes = [parsed(s) for s in shape] if shape else TYPICAL if model is None else of_model(model, tokens, rank)
        rows = []
        for one in shapes:
            rules = kernels(one, choices)
            spent = measure(one) if measured else {}
            rows.append({**asdict(rules), "shape": one._asdict(), "milliseconds": spent})
            if not as_json:
                typer.echo("\n".join(rules.lines()))
                if spent:
                    typer.echo("  milliseconds      " + ", ".join(f"{k} {v:g}" for k, v in spent.items()))
        if as_json:
            typer.echo(json.dumps({"threads": torch.get_num_threads(), "shapes": rows}, indent=1))
            return
        if measured:
            typer.echo(f"8 bit or dense, timed with {torch.get_num_threads()} threads:")
            typer.echo("\n".join(f"  {line}" for line in choices.lines()) or "  no 8-bit kernels here")


def parsed(text: str) -> Shape:
    """ "1024,384,1536,8" as a shape."""
    from deltaw.errors import ConfigError
    from deltaw.ops.kernels import Shape

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(Shape._fields) or min(numbers) < 1:
        raise ConfigError(f"--shape {text}: four whole numbers above 0 are wanted, TOKENS,IN,OUT,RANK: 1024,384,1536,8")
    return Shape(*numbers)


def of_model(name: str, tokens: int, rank: int) -> list[Shape]:
    """The distinct shapes of what "all-linear" adapts in a model, which is built without weights."""
    from deltaw.errors import ConfigError
    from deltaw.io.base_models import open_base
    from deltaw.model.targeting import ALL_LINEAR, host_for, layers_of, matching
    from deltaw.ops.kernels import Shape

    net = open_base(name).model
    if net is None:
        raise ConfigError(f"{name} holds weights without a model: give a folder that transformers loads, or --shape")
    layers = layers_of(net)
    found: dict[Shape, None] = {}
    for path in matching(net, ALL_LINEAR, layers):
        host = host_for(layers[path])
        for rows_out, columns_in in () if host is None else host.sites(layers[path]).values():
            found[Shape(tokens, columns_in, rows_out, rank)] = None
    return list(found)
