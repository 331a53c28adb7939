"""`deltaw convert`: an adapter from one tool's format into another's."""

from __future__ import annotations

import json

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command()
    def convert(
        source: str = typer.Argument(..., metavar="SRC", help="An adapter: folder or file of any known format."),
        to: str = typer.Option(..., "--to", help="peft, kohya, diffusers, loralib, mlx, gguf or safetensors."),
        out: str = typer.Option(..., "--out", "-o", metavar="PATH", help="Folder or file to write."),
        kind: str = typer.Option(None, "--from", help="The format of SRC, if it cannot be told by its look."),
        base: str = typer.Option(None, "--base", metavar="MODEL", help="The base: its names undo flattened paths."),
        alpha: float = typer.Option(None, "--alpha", help="For formats that do not keep it."),
        component: str = typer.Option(None, "--component", help="unet, transformer, text_encoder ... of a pipeline."),
        enabled: str = typer.Option(None, "--enabled", help="Parts of a MergedLinear, for example true,false,true."),
        reader: str = typer.Option(None, "--for", help="Write for a server: vllm, sglang or ollama."),
        uniform: bool = typer.Option(False, "--uniform", help="One rank, and every scale inside B."),
        rank: int = typer.Option(
            None, "--rank", help="Approximate by a plain LoRA of this rank; the error is printed."
        ),
        no_verify: bool = typer.Option(
            False, "--no-verify", help="Accept files that were edited since deltaw wrote them."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
    ) -> None:
        """Convert without loss, or refuse with the reason."""
        from deltaw.io.base_models import open_base
        from deltaw.io.convert import convert as write
        from deltaw.io.convert import read_any
        from deltaw.io.formats import Hints

        model = None if base is None else open_base(base)
        flags = (
            None if enabled is None else tuple(e.strip().lower() in ("true", "1", "yes") for e in enabled.split(","))
        )
        hints = Hints(
            alpha=alpha,
            component=component,
            enabled=flags,
            shapes=None if model is None else model.shapes,
            base={} if model is None else model.facts,
        )
        adapter = read_any(source, hints, kind=kind, verify=not no_verify)
        if base is not None and rank is not None:  # now that the adapter says of which class the model is
            model = open_base(base, adapter, weights=True)
        weights = None if model is None else model.model if model.tensors is None else model.tensors
        added = () if model is None else model.missing
        written = write(adapter, to, out, hints, rank=rank, reader=reader, one_rank=uniform, base=weights, added=added)
        worst = max(written.error.values(), default=0.0)
        if as_json:
            typer.echo(json.dumps({"out": out, "weights": len(written.changes), "error": dict(written.error)}))
        else:
            typer.echo(f"wrote {out}: {written!r}" + (f", at most {worst:.2%} from the exact ΔW" if worst else ""))
