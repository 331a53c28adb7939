"""`deltaw hub-search`: weights for known adapters on a few examples of a new task, found without gradients (LoRAHub)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""

    @app.command("hub-search")
    def hub_search(
        adapters: list[str] = typer.Argument(..., metavar="ADAPTER ...", help="Folders or hub ids, all of one base."),
        task: str = typer.Option(
            ..., "--task", "-t", metavar="RECIPE|FILE.yaml", help="The new task: its model, data, loss and metric."
        ),
        settings: list[str] = typer.Option(
            None, "--set", metavar="key=value", help="A setting of the task; repeatable."
        ),
        out: str = typer.Option(None, "--out", "-o", help="Folder. Default: runs/hub-search."),
        examples: int = typer.Option(32, "--examples", help="How many training examples the search may look at."),
        steps: int = typer.Option(40, "--steps", help="How many weightings are tried."),
        seed: int = typer.Option(0, "--seed", help="Of the choice of examples and of the search."),
        l1: float = typer.Option(0.05, "--l1", help="Penalty per unit of weight."),
        bound: float = typer.Option(1.5, "--bound", help="Weights lie within plus and minus this."),
        workers: int = typer.Option(1, "--workers", help="Weightings measured at the same time."),
        rank: int = typer.Option(None, "--rank", help="Truncate the result to this rank."),
        allow_base_mismatch: bool = typer.Option(
            False, "--allow-base-mismatch", help="Load although the base differs."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
    ) -> None:
        """Search weights; go on with --out's trace if there is one; keep the combination; compare on held-out data."""
        from deltaw.cli.commands.analyze import distinct
        from deltaw.cli.commands.merge import option_named
        from deltaw.cli.outputs import strict
        from deltaw.compose.agreement import unlabelled
        from deltaw.compose.combination import combine
        from deltaw.compose.hub import BASE, measured, search
        from deltaw.compose.hub_plot import plot
        from deltaw.errors import ConfigError
        from deltaw.io.files import write
        from deltaw.io.model_files import load
        from deltaw.model.activate import use
        from deltaw.model.attach import get
        from deltaw.recipes.configure import load as configured
        from deltaw.recipes.configure import recipe_of
        from deltaw.training.scoring import evaluate

        if examples < 1:
            raise ConfigError(f"--examples {examples}: the search needs at least one example to measure weights on")
        check_distinct(adapters)
        config = configured(task, settings or ())
        problem = recipe_of(config).task(config)
        model = problem.build().eval()
        names = distinct(adapters)
        for name, source in zip(names, adapters):
            with warnings.catch_warnings(record=True) as notes, option_named():
                warnings.simplefilter("always")
                load(model, source, name, active=False, allow_base_mismatch=allow_base_mismatch)
            for note in notes:
                typer.echo(f"{name}: {note.message}", err=True)

        folder = Path(out or "runs/hub-search")
        chosen = few(problem, examples, seed)
        loss = mean_loss(problem, chosen, config.eval_batch_size)
        found = search(
            names,
            measured(model, names, loss),
            steps=steps,
            seed=seed,
            l1=l1,
            bound=bound,
            workers=workers,
            trace=folder / "trace.jsonl",
        )
        plot(found, folder / "trace.png")
        values = [unlabelled(get(model, name)) for name in names]  # the classes are those of the new task
        if any(found.best.weights):
            kept = combine(values, list(found.best.weights), base=model, rank=rank, how="svd" if rank else "cat")
            write(kept.replace(extra={**kept.extra, **label_facts(problem)}), folder / "adapter")

        split = "test" if "test" in problem.splits else "validation"
        held_out: dict[str, Any] = {}
        single: dict[str, dict[str, float]] = {BASE: {}} | {name: {name: 1.0} for name in names}
        for name, weights in {**single, "found": dict(zip(names, found.best.weights))}.items():
            with use(model, {n: w for n, w in weights.items() if w}):
                held_out[name] = evaluate(model, problem, config, split)
        metric = problem.metric
        order = max if problem.higher_is_better else min
        best_single = order(single, key=lambda n: held_out[n][metric])
        better = held_out["found"][metric] != held_out[best_single][metric] and (
            order(("found", best_single), key=lambda n: held_out[n][metric]) == "found"
        )
        said = (
            f"on {split} data ({len(problem.splits[split])} examples): {metric} {held_out['found'][metric]:.4f}, best single "
            f"({best_single}) {held_out[best_single][metric]:.4f}, base alone {held_out[BASE][metric]:.4f}: "
            + ("the search wins" if better else "the search does NOT win")
        )
        facts = {**found.facts(), "split": split, "metric": metric, "held_out": held_out, "held_out_verdict": said}
        facts["examples"] = {"count": len(chosen), "indices": chosen, "seed": seed}
        (folder / "results.json").write_text(strict(facts, indent=2) + "\n", encoding="utf-8")
        if as_json:
            typer.echo(strict(facts, indent=2))
            return
        typer.echo(f"on the {len(chosen)} examples: {found.verdict}")
        typer.echo(said)
        if not any(found.best.weights):
            typer.echo("nothing was better than the base alone: no adapter is kept")
        typer.echo(f"kept in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def check_distinct(sources: list[str]) -> None:
    """Refuse an adapter that is given twice.

    Raises:
        ConfigError: one is.
    """
    from deltaw.errors import ConfigError

    places = [str(Path(source).resolve()) if Path(source).exists() else source for source in sources]
    for source, place in zip(sources, places):
        if places.count(place) > 1:
            raise ConfigError(f"{source} is given {places.count(place)} times: give each adapter once")


def label_facts(problem: Any) -> dict[str, Any]:
    """The class names of the task, as an adapter carries them; empty for a task without classes."""
    labels = problem.facts().get("labels")
    return {"labels": labels, "id2label": {str(n): name for n, name in enumerate(labels)}} if labels else {}


def few(problem: Any, count: int, seed: int) -> list[int]:
    """Indices of `count` training examples, chosen by `seed`."""
    from deltaw.training.order import generator

    total = len(problem.splits["train"])
    return sorted(generator("hub-search", seed).permutation(total)[:count].tolist())


def mean_loss(problem: Any, chosen: list[int], size: int) -> Any:
    """model -> mean loss over the chosen training examples."""
    import torch

    rows = [problem.example("train", index, None) for index in chosen]
    batches = [problem.collate(rows[at : at + size]) for at in range(0, len(rows), size)]

    def loss(model: Any) -> float:
        with torch.no_grad():
            total = sum(float(problem.loss(model, batch)[0]) for batch in batches)
        return float(total / sum(problem.weight(batch) for batch in batches))

    return loss
