"""`deltaw check`: does an adapter fit a base, and who can read it?"""

from __future__ import annotations

import json

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def check(
        adapter: str = typer.Argument(..., metavar="ADAPTER", help="A folder, or a hub id."),
        base: str = typer.Option(None, "--base", metavar="MODEL", help="Model folder, hub id, or safetensors file."),
        reader: list[str] = typer.Option(None, "--for", help="vllm, sglang, ollama or peft; may be repeated."),
        revision: str = typer.Option(None, "--revision", help="Branch, tag or commit of the adapter on the hub."),
        out: str = typer.Option(None, "--out", "-o", help="Also write it as the reader named by --for needs it."),
        as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
    ) -> None:
        """Check an adapter against a base (no weights are loaded) and against what servers accept. Exit code 2 if it fails."""
        from deltaw.errors import ConfigError
        from deltaw.io.admission import admit
        from deltaw.io.base_models import open_base
        from deltaw.io.checking import check as verify
        from deltaw.io.checking import text
        from deltaw.io.convert import convert
        from deltaw.io.model_files import found
        from deltaw.io.readers import READERS

        if out is not None and len(reader or ()) != 1:
            raise ConfigError("--out writes for one reader: name it, for example --for vllm")
        folder = found(adapter, revision)
        admitted = admit(folder)
        model = None if base is None else open_base(base, admitted.adapter)
        if model is not None:
            admitted = admit(folder, shapes=model.shapes)
        answer = verify(admitted, model, tuple(reader) if reader else READERS if base is None else ())
        typer.echo(json.dumps(answer, indent=2) if as_json else text(answer))
        if out is not None and not answer["problems"]:
            convert(admitted.adapter, "peft", out, reader=reader[0])
            typer.echo(f"wrote {out}", err=as_json)
        elif not answer["fine"] and (base is not None or reader):
            raise typer.Exit(2)
