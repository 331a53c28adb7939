"""`deltaw analyze`: what adapters learned, as a report with pictures and numbers."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def analyze(
        adapters: list[str] = typer.Argument(..., metavar="ADAPTER ...", help="Folders or hub ids."),
        out: str = typer.Option(..., "--out", "-o", help="Folder for report.html, PNGs and analysis.json."),
        base: str = typer.Option(
            None, "--base", help="Base model (folder, file or hub id): adds amplification and overlap."
        ),
        energy: float = typer.Option(0.95, "--energy", help="The share of the change that the advised rank must hold."),
        top: int = typer.Option(64, "--top", help="How many of W's leading directions to compare with."),
        intruders: int = typer.Option(
            None,
            "--intruders",
            help="Look among this many directions of W + ΔW (10 for weights up to 2048); 0 skips it.",
        ),
        allow_base_mismatch: bool = typer.Option(
            False, "--allow-base-mismatch", help="Look beside a base whose weights are not those trained on."
        ),
        overwrite: bool = typer.Option(False, "--overwrite", help="Replace --out if it exists."),
        as_json: bool = typer.Option(False, "--json", help="Print all numbers as JSON."),
    ) -> None:
        """Spectra, shares, similarity of every pair, and with --base how the changes lie to the weights."""
        from deltaw.analysis.findings import analyze as look
        from deltaw.analysis.report import write
        from deltaw.cli.commands.combine import base_weights, read
        from deltaw.cli.outputs import new_folder

        names = distinct(adapters)
        values = dict(zip(names, (read(source) for source in adapters)))
        findings = look(
            values, base_weights(base, values, allow_base_mismatch), energy=energy, top=top, intruders_of=intruders
        )
        with new_folder(out, "analysis", overwrite, "report") as folder:
            write(findings, folder)
        if as_json:
            typer.echo(json.dumps(findings.facts(), indent=1))
            return
        for said in findings.sentences():
            typer.echo(said)
        typer.echo(f"report: {folder / 'report.html'}")


def distinct(sources: list[str]) -> list[str]:
    """Short names for adapters: the last part of each path, with as many parts more as it takes to tell them apart."""
    parts = [Path(source).resolve().parts if Path(source).exists() else tuple(source.split("/")) for source in sources]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{source} ({n})" for n, source in enumerate(sources, 1)]
