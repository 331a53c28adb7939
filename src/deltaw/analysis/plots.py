"""The pictures of an analysis, as matplotlib figures. Nothing global is touched: no pyplot, no backend, no window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deltaw.analysis.amplification import Amplifications
from deltaw.analysis.directions import by_place, place
from deltaw.analysis.similarity import Similarities
from deltaw.analysis.spectrum import Spectra
from deltaw.errors import MissingExtra

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")
MANY_CELLS = 160
"""Heat maps of more cells carry no figures in them."""
WIDE = 9.8
"""Inches: what the page shows without making it smaller."""
LONGEST_NAME = 26
"""Longer names are cut in the middle, in pictures only."""


def short(name: str, longest: int = LONGEST_NAME) -> str:
    """`name`, or its two ends with an ellipsis between."""
    if len(name) <= longest:
        return name
    keep = longest - 1
    return f"{name[: keep - keep // 2]}…{name[-(keep // 2) :]}"


def figure(width: float, height: float) -> Any:
    """An empty figure that is drawn without a display.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(
            "pictures need matplotlib: pip install 'deltaw[train]' (or pip install matplotlib)"
        ) from error
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def quiet(axes: Any) -> None:
    """The frame's top and right lines off, a light grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)


def spectra(found: Mapping[str, Spectra]) -> Any:
    """σᵢ over i for every weight, one panel per adapter, one colour per kind of layer."""
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    fig = figure(WIDE if columns > 1 else 6.5, 3.6 * rows)
    axes = fig.subplots(rows, columns, squeeze=False, sharey=True).flat
    longest = max((len(s.values) for weights in found.values() for s in weights.values()), default=1)
    for axis, (name, weights) in zip(axes, found.items()):
        quiet(axis)
        _, kinds, places = by_place(list(weights))
        colour = {kind: COLOURS[n] if n < len(COLOURS) else "#9c9c9c" for n, kind in enumerate(kinds)}
        labelled: set[str] = set()
        for at, keys in places.items():
            for key in keys:
                values = weights[key].values
                label = at.kind if at.kind not in labelled and len(labelled) < len(COLOURS) else None
                labelled.add(at.kind)
                marks = {"marker": "o", "markersize": 3} if len(values) <= 32 else {}
                axis.plot(
                    range(1, len(values) + 1),
                    values,
                    color=colour[at.kind],
                    linewidth=1,
                    alpha=0.75,
                    label=label,
                    **marks,
                )
        axis.set_yscale("log")
        step = max(1, longest // 8)
        axis.set_xticks(range(1, longest + 1, step))
        axis.set_xlim(0.5, longest + 0.5)
        axis.set(xlabel="direction i", ylabel="singular value σᵢ of ΔW")
        axis.set_title(short(name, 44), fontsize=10)
        if labelled:
            axis.legend(fontsize=7, frameon=False)
    for axis in list(axes)[len(found) :]:
        axis.set_visible(False)
    return fig


def heat_map(
    axis: Any, table: Any, rows: Sequence[str], columns: Sequence[str], style: str = "{:z.2f}", **options: Any
) -> Any:
    """One heat map with names at its sides and, if there are few cells, the figures in them. NaN cells stay empty."""
    image = axis.imshow(table, aspect="auto", **{"cmap": "viridis", **options})
    axis.set_xticks(
        range(len(columns)),
        [short(name) for name in columns],
        fontsize=7,
        rotation=0 if max(map(len, columns), default=0) < 9 else 35,
        ha="center" if max(map(len, columns), default=0) < 9 else "right",
    )
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    if table.size <= MANY_CELLS:
        for (i, j), value in np.ndenumerate(table):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                axis.text(
                    j,
                    i,
                    style.format(value),
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="white" if dark else "black",
                )
    return image


def by_layer(
    panels: Mapping[str, Mapping[str, float]], label: str, style: str = "{:z.2f}", *, add: bool = False, **options: Any
) -> Any:
    """Heat maps of one number per weight: blocks down, kinds across. `add`: sum at a place instead of the mean.

    All panels have one scale of colours. They stand side by side where the page is wide enough, else below each other.
    """
    grids: dict[str, tuple[Any, list[str], list[str]]] = {}
    for name, values in panels.items():
        layers, kinds, places = by_place(list(values))
        grid = np.full((len(layers), len(kinds)), np.nan)
        for at, keys in places.items():
            pick: Callable[[list[float]], float] = sum if add else np.mean  # type: ignore[assignment]
            grid[layers.index(at.layer), kinds.index(at.kind)] = pick([values[k] for k in keys])
        grids[name] = grid, ["other" if n is None else f"block {n}" for n in layers], kinds
    everything = np.concatenate([g[0][np.isfinite(g[0])] for g in grids.values()])
    if everything.size and "norm" not in options:
        options = {"vmin": everything.min(), "vmax": everything.max(), **options}
    across = [max(1.6, 0.5 * len(g[2])) for g in grids.values()]
    down = [0.7 + 0.26 * max(2, len(g[1])) for g in grids.values()]
    beside = sum(across) + 0.4 * len(across) + 1.8 <= WIDE
    width = sum(across) + 0.4 * len(across) + 1.8 if beside else max(across) + 2.2
    fig = figure(min(WIDE, max(5.0, width)), min(40.0, 0.9 + (max(down) if beside else sum(down) + 0.5 * len(down))))
    shape = (1, len(grids)) if beside else (len(grids), 1)
    axes = fig.subplots(*shape, squeeze=False, **({"width_ratios": across} if beside else {"height_ratios": down}))
    image = None
    for n, (axis, (name, (grid, rows, columns))) in enumerate(zip(axes.flat, grids.items())):
        image = heat_map(axis, grid, rows, columns, style, **options)
        axis.set_title(short(name, 44 if not beside or len(grids) == 1 else int(10 * across[n])), fontsize=9)
        if beside and n and rows == next(iter(grids.values()))[1]:
            axis.set_yticks([])
    fig.colorbar(image, ax=list(axes.flat), label=label, shrink=0.8 if beside else 0.5, aspect=25)
    return fig


def similarity(found: Similarities, names: tuple[str, str]) -> Any:
    """The paper's figure 3: φ(i, j), what random spans would give, and the difference, averaged over the weights."""
    phi, baseline = (t.numpy() for t in found.mean())
    fig = figure(WIDE, 3.6)
    axes = fig.subplots(1, 3, sharey=True)
    top = max(0.05, float(phi.max()))
    image = None
    for axis, table, title in zip(
        axes, (phi, baseline, phi - baseline), ("φ(i, j), mean over weights", "random directions", "difference")
    ):
        if table.size <= MANY_CELLS // 2:
            numbers = [[str(n + 1) for n in range(count)] for count in table.shape]
            image = heat_map(axis, table, numbers[0], numbers[1], vmin=0, vmax=top, cmap="magma")
        else:
            image = axis.imshow(table, vmin=0, vmax=top, cmap="magma", aspect="auto")
            for side, count in (("x", table.shape[1]), ("y", table.shape[0])):
                step = max(1, count // 8)
                getattr(axis, f"set_{side}ticks")(range(0, count, step), [str(n + 1) for n in range(0, count, step)])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"first j of {short(names[1])}", fontsize=8)
    axes[0].set_ylabel(f"first i of {short(names[0])}", fontsize=8)
    fig.colorbar(image, ax=list(axes), shrink=0.9, aspect=25)
    return fig


def pairs(names: Sequence[str], table: Any) -> Any:
    """Adapters against adapters: how much more than random their directions agree."""
    fig = figure(min(WIDE, 3.4 + 0.8 * len(names)), 1.8 + 0.5 * len(names))
    axis = fig.subplots()
    called = [short(name) for name in names]
    image = heat_map(axis, table, called, called, vmin=0, vmax=1, cmap="magma")
    fig.colorbar(image, ax=axis, label="(φ - random) / (1 - random)", shrink=0.85)
    return fig


def amplification(found: Mapping[str, Amplifications]) -> Any:
    """‖ΔW‖ and W's size along ΔW's, its own top and random directions, weight by weight."""
    fig = figure(WIDE, 0.5 + 2.9 * len(found))
    axes = fig.subplots(len(found), 1, squeeze=False, sharey=True)[:, 0]
    for axis, (name, weights) in zip(axes, found.items()):
        quiet(axis)
        order = _in_blocks(list(weights))
        for label, pick, marker, colour in (
            ("‖ΔW‖", "change", "o", COLOURS[2]),
            ("W along its own top directions", "along_weight", "^", COLOURS[4]),
            ("W along ΔW's directions", "along_change", "s", COLOURS[0]),
            ("W along random directions", "along_random", "_", "#888888"),
        ):
            axis.plot([getattr(weights[k], pick) for k in order], marker, color=colour, label=label, markersize=4)
        axis.set_yscale("log")
        axis.set_ylabel("Frobenius norm")
        axis.set_title(short(name, 60), fontsize=10)
        _name_blocks(axis, order)
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside upper center", ncols=4)
    return fig


def _name_blocks(axis: Any, order: Sequence[str]) -> None:
    """Ticks where a block begins, with its number; a thin line between blocks."""
    layers = [place(key).layer for key in order]
    starts = [n for n, layer in enumerate(layers) if n == 0 or layer != layers[n - 1]]
    axis.set_xticks(
        starts, ["other" if layers[n] is None else f"block {layers[n]}" for n in starts], fontsize=7, ha="left"
    )
    axis.tick_params(axis="x", length=0, rotation=0 if len(starts) <= 12 else 60)
    axis.grid(False, axis="x")
    for n in starts[1:]:
        axis.axvline(n - 0.5, color="#d0d0d0", linewidth=0.8)
    axis.set_xlim(-0.7, len(order) - 0.3)


def overlap(found: Mapping[str, Similarities]) -> Any:
    """How much of ΔW's directions lies in the span of W's first j, against random ones."""
    fig = figure(6.5, 3.8)
    axis = fig.subplots()
    quiet(axis)
    baselines: list[Any] = []
    for n, (name, weights) in enumerate(found.items()):
        if not weights:
            continue
        # φ · min(i, j) / i: the share of ΔW's i directions, so that j = d gives 1
        curves, random = [], []
        longest = min(s.phi.shape[1] for s in weights.values())
        for s in weights.values():
            i = s.phi.shape[0]
            j = np.arange(1, longest + 1)
            curves.append(s.phi[-1, :longest].numpy() * np.minimum(i, j) / i)
            random.append(j / s.dimension)
        colour = COLOURS[n % len(COLOURS)]
        axis.plot(range(1, longest + 1), np.mean(curves, axis=0), color=colour, label=short(name, 44))
        expected = np.mean(random, axis=0)
        if not any(np.array_equal(expected, drawn) for drawn in baselines):
            label = "random directions" if not baselines else f"random directions for {short(name)}"
            axis.plot(range(1, longest + 1), expected, color="#888888", linestyle=":", label=label)
            baselines.append(expected)
    axis.set(xlabel="first j singular directions of W", ylabel="share of ΔW's directions in them")
    axis.set_ylim(bottom=0)
    if axis.has_data():
        axis.legend(fontsize=7, frameon=False)
    return fig


def _in_blocks(keys: list[str]) -> list[str]:
    layers, kinds, places = by_place(keys)
    return [
        key
        for layer in layers
        for kind in kinds
        for at, found in places.items()
        if at == (layer, kind)
        for key in found
    ]
