"""`deltaw check`: does an adapter fit a base, and what would each reader do with it? No weights are loaded."""

from __future__ import annotations

from typing import Any

from deltaw.core.adapter import split_key
from deltaw.errors import AdapterError, DeltawError, did_you_mean
from deltaw.io.admission import Admitted
from deltaw.io.base_models import Base
from deltaw.io.base_walk import inventory
from deltaw.io.fitting import check_dtypes, check_fit, turned
from deltaw.io.readers import READERS, verdict
from deltaw.model.fit import fitted
from deltaw.model.state import Layout


def check(admitted: Admitted, base: Base | None = None, readers: tuple[str, ...] = READERS) -> dict[str, Any]:
    """{"fits": True | False | None, "problems": [...], "readers": {name: {...}}, "fine": bool} as JSON values.

    base: on the meta device is enough. readers: those asked about; the answer is `fine` if it fits and they all read it.
    """
    problems: list[str] = []
    if base is not None:
        problems = fit_problems(admitted, base)
    verdicts = {r: verdict(admitted.adapter, r, admitted.config) for r in readers}
    said = {
        name: {
            "reads": v.fine,
            "refuses": list(v.refuses),
            "misreads": list(v.misreads),
            "needs": list(v.needs),
            "cure": v.cure,
        }
        for name, v in verdicts.items()
    }
    return {
        "fits": None if base is None else not problems,
        "problems": problems,
        "readers": said,
        "fine": not problems and all(v.fine for v in verdicts.values()),
    }


def fit_problems(admitted: Admitted, base: Base) -> list[str]:
    """Why the adapter does not fit the base; empty if it does."""
    adapter = admitted.adapter
    if base.model is None:
        return plain_problems(admitted, base)
    have = inventory(base.model)
    try:
        if admitted.parsed.claims is not None:
            check_fit(have, adapter, admitted.parsed.claims, admitted.ours)
        check_dtypes(have, adapter)
        fitted(Layout(have.model), turned(have, adapter))
    except DeltawError as error:
        return str(error).splitlines()
    return []


def plain_problems(admitted: Admitted, base: Base) -> list[str]:
    """The same for a file of weights: names and sizes only."""
    found = []
    for key, change in admitted.adapter.changes.items():
        name = key.partition("[")[0]
        if name not in base.shapes:
            found.append(f"{key!r} is no parameter of {base.name}{did_you_mean(name, base.shapes, 1)}")
            continue
        try:
            wanted, have = change.matrix_shape, base.shapes[name]
        except (AdapterError, KeyError) as error:
            found.append(f"{key!r}: {error}")
            continue
        sizes = [n for n in wanted if n >= 0]
        fits = all(n in have for n in sizes) if -1 in wanted else _numel(wanted) == _numel(have)
        if not fits:
            found.append(f"{key!r} changes a {tuple(wanted)} weight, the base's {split_key(name)[1]} is {have}")
    return found


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def text(answer: dict[str, Any]) -> str:
    """`check`'s answer for people."""
    lines = []
    if answer["fits"] is not None:
        lines.append(
            "fits the base by names and shapes (doctor and load compare the weights themselves)"
            if answer["fits"]
            else "does not fit the base:"
        )
        lines += [f"  {p}" for p in answer["problems"]]
    for name, said in answer["readers"].items():
        lines.append(f"{name}: {'reads it' if said['reads'] else 'refuses it' if said['refuses'] else 'misreads it'}")
        lines += [f"  {why}" for why in (*said["refuses"], *said["misreads"])]
        lines += [f"  needs {need}" for need in said["needs"]]
        lines += [f"  {said['cure']}"] if said["cure"] else []
    return "\n".join(lines)
