"""`deltaw data`: make a data set that can be made here."""

from __future__ import annotations

import json

import typer


def add(app: typer.Typer) -> None:
    """Register the commands."""
    data = typer.Typer(help="Make data sets.", no_args_is_help=True)
    app.add_typer(data, name="data")

    @data.callback()
    def _group() -> None:
        """Make data sets."""

    @data.command()
    def gw(
        out: str = typer.Option(..., "--out", "-o", metavar="DIR", help="Folder to write."),
        n: int = typer.Option(1000, "--n", help="Training samples, half of them with a signal."),
        validation: int = typer.Option(None, "--validation", help="Validation samples. Default: as many as --n."),
        test: int = typer.Option(0, "--test", help="Test samples."),
        snr: str = typer.Option("8:20", "--snr", metavar="LOW:HIGH", help="Network signal-to-noise ratios."),
        masses: str = typer.Option("10:80", "--masses", metavar="LOW:HIGH", help="Solar masses of each black hole."),
        seed: int = typer.Option(0, "--seed", help="Of everything random; equal seeds give equal files."),
        approximant: str = typer.Option("IMRPhenomD", "--approximant", help="Waveform model; or SEOBNRv4_opt."),
        dtype: str = typer.Option("float16", "--dtype", help="float16 or float32."),
        processes: int = typer.Option(None, "--processes", help="Default: one per core. Does not change the files."),
        overwrite: bool = typer.Option(False, "--overwrite", help="Replace the folder if it exists."),
        as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
    ) -> None:
        """Simulate merging black holes in three detectors' noise (needs lalsuite)."""
        import time

        from deltaw.cli.outputs import new_folder
        from deltaw.errors import ConfigError
        from deltaw.recipes.gw_data import make
        from deltaw.recipes.gw_waves import Sky, whitener

        if dtype not in ("float16", "float32"):
            raise ConfigError(f"--dtype {dtype}: float16 or float32")
        sky = Sky(snr=_range("snr", snr), masses=_range("masses", masses), approximant=approximant)
        whitener()  # says at once if lalsuite is missing
        sizes = {"train": n, "validation": n if validation is None else validation, **({"test": test} if test else {})}
        started = time.perf_counter()
        with new_folder(out, "gw-data", overwrite, "data set") as folder:
            facts = make(folder, sizes, seed, sky, dtype=dtype, processes=processes)
        spent = time.perf_counter() - started
        if as_json:
            typer.echo(json.dumps({**facts, "folder": str(folder), "seconds": round(spent, 2)}))
            return
        made = ", ".join(f"{size:,} {split}" for split, size in sizes.items())
        typer.echo(f"{made} samples in {spent:.1f} s; train on them with: deltaw train gw data={folder}")


def _range(name: str, text: str) -> tuple[float, float]:
    """ "8:20" -> (8.0, 20.0); "12" -> (12.0, 12.0)."""
    from deltaw.errors import ConfigError

    low, _, high = text.partition(":")
    try:
        return float(low), float(high or low)
    except ValueError:
        raise ConfigError(f"--{name} {text}: a range is wanted, for example --{name} 8:20") from None
