"""`deltaw combine`: several adapters of one base -> one, with the error that it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from deltaw.compose.base_file import BaseFile
    from deltaw.core.adapter import Adapter


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def combine(
        adapters: list[str] = typer.Argument(..., metavar="ADAPTER ...", help="Folders or hub ids, all of one base."),
        out: str = typer.Option(..., "--out", "-o", help="Folder for the result."),
        weights: str = typer.Option(
            None,
            "--weights",
            "-w",
            help='One number each, as in 0.6,-0.4; or JSON for blocks: \'{"layers.0": [1, 0], "*": [0.5, 0.5]}\'.',
        ),
        how: str = typer.Option("cat", "--how", help="cat, svd, linear, ties, dare, magnitude, slerp."),
        rank: int = typer.Option(None, "--rank", help="Truncate to this rank."),
        energy: float = typer.Option(None, "--energy", help="Truncate to this share of the squared singular values."),
        density: float = typer.Option(None, "--density", help="Share of entries kept by ties, dare, magnitude."),
        then: str = typer.Option(None, "--then", help="For dare: sum or ties."),
        seed: int = typer.Option(0, "--seed", help="For dare's random masks."),
        base: str = typer.Option(
            None, "--base", help="Base model (folder, file or hub id); for DoRA and trained copies."
        ),
        allow_base_mismatch: bool = typer.Option(
            False, "--allow-base-mismatch", help="Combine although the adapters record different bases."
        ),
        overwrite: bool = typer.Option(False, "--overwrite", help="Replace --out if it is an adapter of ours."),
        as_json: bool = typer.Option(False, "--json", help="Print the errors as JSON."),
    ) -> None:
        """Blend adapters of one base into one; says how far the result is from the exact sum of the changes."""
        from deltaw.compose.combination import combine as blend
        from deltaw.errors import ConfigError
        from deltaw.io.files import write

        if Path(out).exists() and not overwrite:
            raise ConfigError(f"--out {out} exists: choose another folder, or give --overwrite to replace it")
        options = {name: value for name, value in (("density", density), ("then", then)) if value is not None}
        values = [read(source) for source in adapters]
        result = blend(
            values,
            parse_weights(weights),
            how=how,
            rank=rank,
            energy=energy,
            seed=seed,
            base=base_weights(base, dict(zip(adapters, values)), allow_base_mismatch),
            allow_base_mismatch=allow_base_mismatch,
            **options,
        )
        write(result, out)
        errors = sorted(result.error.items(), key=lambda item: -item[1])
        if as_json:
            typer.echo(json.dumps({"out": out, "values": result.numel, "error": dict(errors)}, indent=2))
            return
        typer.echo(f"{len(adapters)} adapters -> {result} in {out}")
        averaged = result.extra["combined"]["averaged"]
        if averaged:
            typer.echo(f"averaged as trained copies, the base values being unknown: {', '.join(averaged)}")
        whole = result.extra["combined"]["whole"]
        if whole and (rank is not None or energy is not None):
            typer.echo(f"kept whole, not truncated: {', '.join(whole)}")
        mean = sum(value for _, value in errors) / len(errors)
        typer.echo(
            f"relative error against the exact sum: mean {mean:.2g}, largest {errors[0][1]:.2g} ({errors[0][0]})"
        )


def read(source: str):  # type: ignore[no-untyped-def]
    """The adapter in a folder or on the hub; what its reader notes goes to stderr."""
    from deltaw.io.admission import admit
    from deltaw.io.model_files import found

    admitted = admit(found(source))
    for note in admitted.notes:
        typer.echo(f"{source}: {note}", err=True)
    return admitted.adapter


def base_weights(source: str | None, adapters: Mapping[str, Adapter], allow_mismatch: bool) -> BaseFile | None:
    """The base's weights, read when needed; None if none was named. Refused if `adapters` were trained on others."""
    from deltaw.compose.base_file import check, opened

    if source is None:
        return None
    base = opened(source)
    if not allow_mismatch:
        check(base, adapters)
    return base


def parse_weights(text: str | None):  # type: ignore[no-untyped-def]
    """--weights: "0.6,-0.4" or a JSON object; None if not given."""
    from deltaw.errors import ConfigError

    if text is None:
        return None
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {text!r}: give numbers like 0.6,-0.4, or a JSON object of lists") from None
