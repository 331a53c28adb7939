"""`deltaw resume`: go on with a run or a comparison that was stopped, bit-identical to one that never was."""

from __future__ import annotations

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def resume(
        folder: str = typer.Argument(..., metavar="DIR", help="The folder of a run or of a comparison."),
    ) -> None:
        """Go on with a run that was stopped or killed."""
        from pathlib import Path

        from deltaw.cli.commands.compare import show
        from deltaw.cli.commands.train import last_line
        from deltaw.errors import DataError
        from deltaw.recipes import compare
        from deltaw.recipes.configure import load
        from deltaw.recipes.start import start
        from deltaw.training.begun import as_begun
        from deltaw.training.run import CONFIG, STATUS, status

        path = Path(folder)
        if not path.is_dir():
            raise DataError(f"{folder}: no such folder")
        if (path / compare.PLAN).is_file():
            rows, _, sentence = compare.resume(path)
            show(rows, sentence, folder)
            return
        if status(path) == "finished":
            typer.echo(f"{folder} is finished: nothing to resume")
            return
        with as_begun(path, STATUS) as there:
            results = start(load(str(there / CONFIG)), there, resume=True)
        if results:
            typer.echo(last_line(results, folder))
