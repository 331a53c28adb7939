"""Rows: one adapter, or none, for each row of a batch; in eval and in training, for every variant and layer.

Two ways lead to the same result, that every row equals the same row run alone with its adapter:

- **split**: at the model's entry the batch is split by adapter, the model runs once per group under `use`, and the
  outputs are put together again. Exact for any layer, since no layer sees two adapters in one call.
- **one pass**: the model runs once, and every adapted layer splits its own call by adapter. Only where each layer that
  an adapter of the batch changes is proven to see the rows in its first dimension (model/probe.py; once per form of the
  arguments, on three rows and then on two). A layer of which that is not so is named, and the call is split. Where the
  model's outputs are proven to follow the rows as well, the rows are sorted by adapter once, at the entry, and put back
  in the outputs: a layer's groups are then slices (hooks inside of the model see the sorted rows).

Randomness: a split batch draws dropout group by group, in the order in which the adapters first appear, one pass layer
by layer. Both are the model's own distribution; neither has the very bits of the other.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.core.host import Host
from deltaw.core.recall import in_backward
from deltaw.core.roster import Active, Roster, Speaking
from deltaw.errors import ConfigError, ModelError
from deltaw.model import probe, state, targeting, trees
from deltaw.model.activate import Choice, chosen_in
from deltaw.model.entry import AtEntry, entered, entrance, is_compiled
from deltaw.model.one_pass import Group, OnePass, Unproven, changed_by, sorted_groups
from deltaw.model.row_arguments import Dims, argument, form_of, row_dims, usual_dim
from deltaw.model.row_outputs import Joined
from deltaw.model.shared import shared

How = Literal["auto", "one pass", "split"]


@contextmanager
def rows(
    model: nn.Module,
    names: Sequence[Choice],
    *,
    how: How = "auto",
    dims: Dims = None,
    multiples: Mapping[str, int] | None = None,
    scalars: Literal["refuse", "mean"] = "refuse",
) -> Iterator[Rows]:
    """Within the context, in this thread, row i of the batch that `model` is called with has the adapter `names[i]`.

    names: for each row what `use` takes: a name, a list, {name: weight}, or None for the bare base.
    how: "split", "one pass" (you vouch for the layers' first dimensions; their sizes are checked), or "auto".
    dims: the dimension of the tensor arguments that counts the rows (default 0; 1 for torch.nn's own modules with
        batch_first=False), or {argument name or position: dimension, or None if all rows share it}. Of arguments that are
        not named, those that have so many entries by chance are found out by trying (model/shared.py).
    multiples: {module path or dotted suffix: k}: layers in there see k entries for each row, one row's after another's.
    scalars: a split call cannot put numbers that describe the whole batch (a loss) together, and refuses; "mean" gives
        the mean weighted by the groups' rows, which is right for means over rows.

    Yields an object that says how the last call went: `strategy`, and `named`, {layer path: why it forced a split}.

    Raises:
        UnknownName, ConfigError: as `use`; `multiples` names no module.
        ModelError: a call does not have that many rows, its rows cannot be taken apart, or changes are merged.
    """
    if isinstance(names, (str, Mapping)):
        raise ConfigError(f"rows(model, {names!r}): give a list, one name (or None) for each row of the batch")
    if how not in ("auto", "one pass", "split"):
        raise ConfigError(f"how={how!r} is not one of 'auto', 'one pass', 'split'")
    if scalars not in ("refuse", "mean"):
        raise ConfigError(f"scalars={scalars!r} is not one of 'refuse', 'mean'")
    layout = state.Layout(model)
    rosters = layout.rosters()
    state.unmerged_in(rosters, "give rows adapters")
    actives = [chosen_in(rosters, model, choice) for choice in names]
    place = entrance(model)
    request = Rows(place, layout, actives, how, dims, multiples_by_host(layout, multiples or {}), scalars)
    with ExitStack() as stack:
        stack.enter_context(entered(place, rosters[0]))
        for roster in request.rosters:
            stack.enter_context(roster.using(request))
        yield request


class Rows(AtEntry):
    """The request of one `rows` context, and the report on its last call."""

    def __init__(
        self,
        place: nn.Module,
        layout: state.Layout,
        actives: Sequence[Active],
        how: How,
        dims: Dims,
        multiples: Mapping[int, int],
        scalars: str,
    ) -> None:
        self.layout = layout
        self.root = layout.root
        self.how: How = how
        self.compiled = any(is_compiled(m) for m in (place, *layout.modules))
        self.dims = usual_dim(self.root) if dims is None else dims
        self.multiples = multiples
        self.scalars = scalars
        self.count = len(actives)
        self.rosters: list[Roster] = layout.rosters()
        groups: dict[Active, list[int]] = {}
        for row, active in enumerate(actives):
            groups.setdefault(active, []).append(row)
        self.groups: list[Group] = list(groups.items())
        self.strategy: Literal["none yet", "one adapter", "one pass", "split"] = "none yet"
        self.named: dict[str, str] = {}

    def call(self, host: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A host was reached without passing the model's entry: rows are not known there."""
        path = next((p for p, h in self.layout.hosts() if h is host), "a layer")
        if in_backward():
            raise ModelError(
                f"{path} runs again in backward (gradient checkpointing), and dw.rows was entered around the checkpoint and has "
                "been left: enter it inside of the checkpointed function, or call backward inside of the context"
            )
        raise ModelError(
            f"{path} was called inside of dw.rows, but not by calling the model that dw.rows was given: "
            f"call that {type(self.root).__name__}, or give dw.rows the module that you call"
        )

    @contextmanager
    def speak(self, speaking: Speaking) -> Iterator[None]:
        """`speaking` for all rosters of the model."""
        with ExitStack() as stack:
            for roster in self.rosters:
                stack.enter_context(roster.using(speaking))
            yield

    def run(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the model."""
        where: Mapping[str, int]
        where, doubtful = row_dims(self.dims, self.count, plain, args, kwargs)
        self.named = {}
        if len(self.groups) <= 1:
            self.strategy = "one adapter"
            with self.speak(self.groups[0][0] if self.groups else ()):
                return plain(*args, **kwargs)
        found: probe.Found | None = None
        if self.how == "one pass":
            if self.compiled:
                raise ModelError("how='one pass' does not reach into compiled modules: use 'auto' or 'split'")
            return self.one_pass(plain, args, kwargs, where, None)
        probing = self.can_be_probed(args, kwargs)
        if probing and doubtful and len(where) > 1:
            where = self.without_shared(plain, args, kwargs, where, doubtful)
        if self.how == "auto" and probing:
            found = self.probed(plain, args, kwargs, where)
            self.named = self.foreign(found)
            if not self.named:
                try:
                    return self.one_pass(plain, args, kwargs, where, found)
                except Unproven as late:
                    self.named = {late.path: late.reason}
            self.warn()
        return self.split(plain, args, kwargs, where, found)

    # ---- one call per group

    def split(
        self,
        plain: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        where: Mapping[str, int],
        found: probe.Found | None,
    ) -> Any:
        """The model, once for each group; the outputs put together."""
        for name, leaf in trees.leaves((args, kwargs)):
            if probe.opaque(leaf):
                raise ModelError(
                    f"dw.rows: {argument(name)} is a {type(leaf).__name__}, whose rows cannot be taken apart: leave it "
                    "out (use_cache=False), or vouch for the layers with how='one pass'"
                )
        self.strategy = "split"
        outputs = []
        for active, group in self.groups:
            some_args, some_kwargs = trees.taken((args, kwargs), where, group)
            with self.speak(active):
                outputs.append(plain(*some_args, **some_kwargs))
        usual = self.dims if isinstance(self.dims, int) else 0
        known = {} if found is None else found.outputs
        joined = Joined([group for _, group in self.groups], known, usual, self.scalars)
        return trees.together(outputs, joined.output)

    # ---- one call in all

    def one_pass(
        self,
        plain: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        where: Mapping[str, int],
        found: probe.Found | None,
    ) -> Any:
        """The model once, every adapted layer splitting its own call; on rows sorted by adapter, where that is proven."""
        self.strategy = "one pass"
        if found is None or not found.in_order:
            with self.speak(OnePass(self.root, self.groups, self.multiples, None if found is None else found.follows)):
                return plain(*args, **kwargs)
        groups, order = sorted_groups(self.groups)
        some_args, some_kwargs = trees.taken((args, kwargs), where, order)
        with self.speak(OnePass(self.root, groups, self.multiples, found.follows)):
            output = plain(*some_args, **some_kwargs)
        return trees.mapped(output, functools.partial(self.unsorted, found, order))

    def unsorted(self, found: probe.Found, order: Sequence[int], name: str, leaf: Any) -> Any:
        """One output of a call with sorted rows, in the caller's order."""
        if not isinstance(leaf, Tensor):
            return leaf
        dim = found.outputs.get(name, 0)
        if dim is None:
            return leaf
        if name not in found.outputs or leaf.shape[dim] % len(order):
            raise Unproven(f"output {name!r}", "was not there, or of another form, in the probe")
        return trees.place([leaf], [trees.unfold(order, leaf.shape[dim] // len(order))], dim)

    def can_be_probed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the model can run on a few rows without side effects."""
        moving = any(
            m.training and not isinstance(m, Host) and isinstance(m._buffers.get("running_mean"), Tensor)
            for m in self.layout.modules
        )
        return not self.compiled and not moving and not any(probe.opaque(v) for _, v in trees.leaves((args, kwargs)))

    def probed(
        self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], where: Mapping[str, int]
    ) -> probe.Found:
        """What the probe found for arguments of this form; remembered."""
        hosts = frozenset(id(host) for _, host in self.layout.hosts())
        multiples = tuple(sorted(self.multiples.items()))
        key = (form_of(args, kwargs), tuple(sorted(where.items())), self.root.training, hosts, multiples)
        known: dict[Any, probe.Found] = self.rosters[0].probes
        if key not in known:
            runs = []
            outputs = []
            with self.aside():
                for sample in probe.sample(self.count):
                    some_args, some_kwargs = trees.taken((args, kwargs), where, sample)
                    recorder = probe.Recorder()
                    with self.speak(recorder):
                        outputs.append(plain(*some_args, **some_kwargs))
                    runs.append(recorder)
            known[key] = probe.compared(runs[0], runs[1], self.multiples, (outputs[0], outputs[1]))
        return known[key]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Calls that leave nothing behind: no gradients, no dropout, and random numbers as they were."""
        devices = {t.device.index for t in self.root.parameters() if t.device.type == "cuda"}
        with torch.no_grad(), torch.random.fork_rng([d for d in devices if d is not None]), probe.NoDropout():
            yield

    def without_shared(
        self,
        plain: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        where: Mapping[str, int],
        doubtful: Mapping[str, str],
    ) -> Mapping[str, int]:
        """`where` without the arguments that have as many entries as rows by chance; remembered by the arguments' form."""

        def base(cut: Mapping[str, int], some: Sequence[int]) -> Any:
            some_args, some_kwargs = trees.taken((args, kwargs), cut, some)
            return plain(*some_args, **some_kwargs)

        key = ("shared", form_of(args, kwargs), tuple(sorted(where.items())), tuple(doubtful))
        known: dict[Any, tuple[str, ...] | None] = self.rosters[0].probes
        if key not in known:
            with self.aside(), self.speak(()):
                known[key] = shared(base, where, tuple(doubtful), self.count)
            if known[key] is None:
                names = list(doubtful.values())
                warnings.warn(
                    f"dw.rows: {', '.join(names)} have as many entries as the batch has rows ({self.count}), but the base, on "
                    "some of the rows, does not give what it gives on all: taken as rows. Say which are rows and which all "
                    f"rows share: dims={{{names[0]!r}: 0, {names[-1]!r}: None}}",
                    stacklevel=2,
                )
        return {name: dim for name, dim in where.items() if name not in (known[key] or ())}

    def foreign(self, found: probe.Found) -> dict[str, str]:
        """Path -> reason of the layers that an adapter of the batch changes and that do not see the rows."""
        names = {name for active, _ in self.groups for name, _ in active}
        return {
            path: found.foreign[id(host)]
            for path, host in self.layout.hosts()
            if id(host) in found.foreign and changed_by(host, names)
        }

    def warn(self) -> None:
        """Name, once per model and layer, the layers that force a split."""
        said = self.rosters[0].probes.setdefault("said", set())
        new = {path: why for path, why in self.named.items() if path not in said}
        said.update(new)
        if new:
            path, why = next(iter(new.items()))
            more = f" (and {len(new) - 1} more)" if len(new) > 1 else ""
            warnings.warn(
                f"dw.rows: {path}{more} {why}: the batch runs once for each of its {len(self.groups)} adapter groups, "
                "which is exact. To say so yourself: how='split', or multiples={...}",
                stacklevel=2,
            )


def multiples_by_host(layout: state.Layout, multiples: Mapping[str, int]) -> dict[int, int]:
    """{pattern: multiple} -> {id of a host inside of the modules that the pattern names: multiple}."""
    known = layout.layers
    found: dict[int, int] = {}
    for pattern, multiple in multiples.items():
        if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
            raise ConfigError(f"multiples={{{pattern!r}: {multiple!r}}}: entries per row are a whole number above 0")
        for path in targeting.matching(layout.root, pattern, known) if pattern else [""]:
            found |= {id(m): multiple for m in known[path].modules() if isinstance(m, Host)}
    return found
