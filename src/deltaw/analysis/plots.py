"""The pictures of an analysis, as matplotlib figures. Nothing global is touched: no pyplot, no backend, no window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deltaw.analysis.amplification import Amplifications
from deltaw.analysis.directions import by_place
from deltaw.analysis.similarity import Similarities
from deltaw.analysis.spectrum import Spectra
from deltaw.errors import MissingExtra

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")
MANY_CELLS = 160
"""Heat maps of more cells carry no figures in them."""
MANY_NAMES = 12
"""Axes with more weights than this carry no names."""


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
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    fig = figure(max(6.0, 4.6 * columns), 3.6 * rows)
    axes = fig.subplots(rows, columns, squeeze=False).flat
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
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(title=name, xlabel="direction i", ylabel="singular value σᵢ of ΔW")
        if labelled:
            axis.legend(fontsize=7, frameon=False)
    for axis in list(axes)[len(found) :]:
        axis.set_visible(False)
    return fig


def heat_map(
    axis: Any, table: Any, rows: Sequence[str], columns: Sequence[str], style: str = "{:.2f}", **options: Any
) -> Any:
    """One heat map with names at its sides and, if there are few cells, the figures in them. NaN cells stay empty."""
    image = axis.imshow(table, aspect="auto", **{"cmap": "viridis", **options})
    axis.set_xticks(
        range(len(columns)),
        columns,
        fontsize=7,
        rotation=0 if max(map(len, columns), default=0) < 9 else 30,
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
    panels: Mapping[str, Mapping[str, float]], label: str, style: str = "{:.2f}", *, add: bool = False, **options: Any
) -> Any:
    """Heat maps of one number per weight: blocks down, kinds across. `add`: sum at a place instead of the mean."""
    grids: dict[str, tuple[Any, list[str], list[str]]] = {}
    for name, values in panels.items():
        layers, kinds, places = by_place(list(values))
        grid = np.full((len(layers), len(kinds)), np.nan)
        for at, keys in places.items():
            pick: Callable[[list[float]], float] = sum if add else np.mean  # type: ignore[assignment]
            grid[layers.index(at.layer), kinds.index(at.kind)] = pick([values[k] for k in keys])
        grids[name] = grid, ["other" if n is None else f"block {n}" for n in layers], kinds
    everything = np.concatenate([g[0][np.isfinite(g[0])] for g in grids.values()])
    if everything.size:  # one scale for all panels
        options = {"vmin": everything.min(), "vmax": everything.max(), **options}
    width = sum(1.6 + 0.75 * len(g[2]) for g in grids.values())
    height = 1.5 + 0.3 * max((len(g[1]) for g in grids.values()), default=1)
    fig = figure(max(5.0, min(22.0, width)), min(24.0, height))
    axes = fig.subplots(1, len(grids), squeeze=False, width_ratios=[2 + len(g[2]) for g in grids.values()])[0]
    for axis, (name, (grid, rows, columns)) in zip(axes, grids.items()):
        image = heat_map(axis, grid, rows, columns, style, **options)
        axis.set_title(name, fontsize=10)
        fig.colorbar(image, ax=axis, label=label, shrink=0.85)
    return fig


def similarity(found: Similarities, names: tuple[str, str]) -> Any:
    """The paper's figure 3: φ(i, j), what random spans would give, and the difference, averaged over the weights."""
    phi, baseline = (t.numpy() for t in found.mean())
    fig = figure(11.5, 3.9)
    axes = fig.subplots(1, 3)
    top = max(0.05, float(phi.max()))
    for axis, table, title in zip(
        axes, (phi, baseline, phi - baseline), ("φ(i, j), mean over weights", "random directions", "difference")
    ):
        image = axis.imshow(table, vmin=0, vmax=top, cmap="magma", aspect="auto")
        axis.set(title=title, xlabel=f"j directions of {names[1]}", ylabel=f"i directions of {names[0]}")
        for side, count in (("x", table.shape[1]), ("y", table.shape[0])):
            step = max(1, count // 8)
            getattr(axis, f"set_{side}ticks")(range(0, count, step), [str(n + 1) for n in range(0, count, step)])
        fig.colorbar(image, ax=axis, shrink=0.85)
    return fig


def pairs(names: Sequence[str], table: Any) -> Any:
    """Adapters against adapters: how much more than random their directions agree."""
    fig = figure(2.2 + 0.9 * len(names), 1.6 + 0.6 * len(names))
    axis = fig.subplots()
    image = heat_map(axis, table, list(names), list(names), vmin=0, vmax=1, cmap="magma")
    fig.colorbar(image, ax=axis, label="(φ - random) / (1 - random)", shrink=0.85)
    return fig


def amplification(found: Mapping[str, Amplifications]) -> Any:
    """‖ΔW‖ and W's size along ΔW's, its own top and random directions, weight by weight."""
    fig = figure(max(7.0, min(22.0, 2 + 0.16 * max(len(f) for f in found.values()))), 3.4 * len(found))
    axes = fig.subplots(len(found), 1, squeeze=False)[:, 0]
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
        axis.set(title=name, ylabel="Frobenius norm")
        if len(order) <= MANY_NAMES:
            axis.set_xticks(range(len(order)), order, fontsize=7, rotation=20, ha="right")
        else:
            axis.set_xlabel("weights, block by block")
        axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig


def overlap(found: Mapping[str, Similarities]) -> Any:
    """How much of ΔW's directions lies in the span of W's first j, against random ones."""
    fig = figure(6.5, 3.8)
    axis = fig.subplots()
    quiet(axis)
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
        axis.plot(range(1, longest + 1), np.mean(curves, axis=0), color=colour, label=name)
        axis.plot(
            range(1, longest + 1), np.mean(random, axis=0), color=colour, linestyle=":", label=f"{name}, if random"
        )
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
