"""`deltaw merge`: base and adapter into a plain model that loads without deltaw."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def merge(
        adapter: str = typer.Argument(..., metavar="ADAPTER", help="An adapter's folder, or a run's."),
        base: str = typer.Option(..., "--base", metavar="MODEL", help="Model folder, hub id, or safetensors file."),
        out: str = typer.Option(..., "--out", "-o", metavar="DIR", help="Folder to write; must not exist."),
        allow_base_mismatch: bool = typer.Option(
            False, "--allow-base-mismatch", help="Merge into other weights than it was trained on."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
    ) -> None:
        """Write base + adapter as a plain model."""
        from pathlib import Path

        from deltaw.recipes.merging import merge_folder

        with option_named():
            said = merge_folder(base, Path(adapter), Path(out), allow_base_mismatch=allow_base_mismatch)
        typer.echo(json.dumps({"out": out, "report": said}) if as_json else f"{said}\nwrote {out}")


@contextmanager
def option_named(advice: str = "give --allow-base-mismatch if you mean this one") -> Iterator[None]:
    """Let a mismatch of bases advise what the command line has in the place of Python's `allow_base_mismatch`."""
    from deltaw.errors import BaseMismatch

    try:
        yield
    except BaseMismatch as error:
        raise BaseMismatch(str(error).replace("pass allow_base_mismatch=True if you mean this one", advice)) from error
