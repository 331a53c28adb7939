"""Where a model can be cut: the modules whose outputs are constants of the example, found by watching it work.

A module belongs to the frozen prefix if, in one forward pass, it is called once, ends before the first trained layer
starts, nothing that it returns has a gradient, it returns the same in training as in evaluation (no dropout, no batch
statistics), and its outputs have one entry (or k) per example. Which of these outputs the rest of the model reads is
asked with NaN: each is poisoned in turn, and the answer stays finite or not. At the end the prefix is played back for
a batch of another make-up and compared with the plain computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.training.order import generator
from deltaw.training.prefix import Cut, Leaf, NotConstant, Prefix, flat
from deltaw.training.prefix_file import PrefixFile
from deltaw.training.task import Task

PROBES = 4


@dataclass
class Call:
    """One call of one module: when it began and ended, which call made it, and the tensors it returned."""

    name: str
    module: nn.Module
    start: int
    parent: Call | None
    end: int = -1
    leaves: list[Tensor] = field(default_factory=list)
    rebuild: Callable[[Sequence[Tensor]], Any] | None = None
    constant: bool = False


Answer = Callable[[Any], tuple[Tensor, Tensor]]


def search(model: nn.Module, task: Task, answer: Answer, train_mode: Callable[[], object], file: PrefixFile) -> Prefix:
    """The frozen prefix of `model`, proven on a few training examples.

    Raises:
        NotConstant: there is none, or it would not give the same answers; the text says why.
    """
    chosen = probes(task)
    widths = task.widths("train")
    batches = [_batch(task, some) for some in (chosen, chosen[:-1])]
    model.eval()
    first = watch(model, answer, batches[0])
    limit = first_trained(model, first)
    below = [i for i, call in enumerate(first) if call.constant and 0 <= call.end < limit.start]
    if not any(costly(first[i].module) for i in below):
        raise NotConstant(f"nothing but lookups and norms lies below the first trained layer, {limit.name}")
    second = watch(model, answer, batches[1])
    with torch.random.fork_rng():
        train_mode()
        trained = watch(model, answer, batches[0])
        model.eval()
    if not [c.name for c in first] == [c.name for c in second] == [c.name for c in trained]:
        raise NotConstant("the model takes different ways for different batches")
    steady = [i for i in below if _same(first[i].leaves, trained[i].leaves)]
    if not any(costly(first[i].module) for i in steady):
        unsteady = next(first[i].name for i in below if i not in steady)
        raise NotConstant(
            f"{unsteady} acts differently in training: dropout (base_dropout=0 switches it off) or batch statistics"
        )
    named = [c.name for c in first]
    sizes = (len(chosen), len(chosen) - 1)
    longest = None if widths is None else (max(widths[i] for i in chosen), max(widths[i] for i in chosen[:-1]))
    cuts: dict[int, Cut] = {}
    for i in steady:
        call = first[i]
        leaves = leaves_of(call.leaves, second[i].leaves, sizes, longest)
        if leaves is not None and named.count(call.name) == 1 and call.rebuild is not None:
            cuts[id(call)] = Cut(call.name, call.module, leaves, call.rebuild)
    top = [cuts[id(c)] for c in first if id(c) in cuts and not _inside(c, cuts)]
    if not any(costly(cut.module) for cut in top):
        raise NotConstant("no module below the first trained layer returns one entry per example")
    own = None if widths is None else [widths[i] for i in chosen]
    try:
        return proven(Prefix(narrowed(top, answer, batches[0], own), answer, file), task, chosen, own)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise NotConstant(f"played back up to {top[-1].name}, the model fails ({error})") from error


def probes(task: Task) -> list[int]:
    """A few training examples: the shortest, the longest (last), and some between."""
    count = len(task.splits["train"])
    if count < 2:
        raise NotConstant("there is only one training example")
    widths = task.widths("train")
    order = sorted(range(count), key=lambda i: (0 if widths is None else widths[i], i))
    last = min(PROBES, count) - 1
    return [order[i * (count - 1) // last] for i in range(last + 1)]


def _batch(task: Task, chosen: Sequence[int]) -> Any:
    draw = generator("prefix", 0) if task.augments else None
    return task.collate([task.example("train", i, draw) for i in chosen])


def watch(model: nn.Module, answer: Answer, batch: Any) -> list[Call]:
    """Every call of a module in one forward pass, in the order in which they began. Nothing is kept for a backward."""
    calls: list[Call] = []
    open_calls: list[Call] = []
    clock = 0

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any) -> None:
            nonlocal clock
            clock += 1
            open_calls.append(Call(name, module, clock, open_calls[-1] if open_calls else None))
            calls.append(open_calls[-1])

        return hook

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal clock
        clock += 1
        call = open_calls.pop()
        call.end = clock
        tree = flat(output)
        if tree is not None and tree.leaves and not any(t.requires_grad for t in tree.leaves):
            call.leaves, call.rebuild = [t.detach().clone() for t in tree.leaves], tree.rebuild
            call.constant = any(t.is_floating_point() for t in tree.leaves)

    handles = []
    try:
        for name, module in model.named_modules():
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: torch.empty(0)):
            answer(dict(batch))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def first_trained(model: nn.Module, calls: Sequence[Call]) -> Call:
    """The first call of a module that holds a trained parameter which no called module inside it holds."""
    named = {call.name for call in calls}
    owners = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = name.rpartition(".")[0]
            while owner and owner not in named:
                owner = owner.rpartition(".")[0]
            owners.add(owner)
    found = next((call for call in calls if call.name in owners), None)
    if found is None:
        raise NotConstant("no trained layer was called")
    return found


def costly(module: nn.Module) -> bool:
    """Whether it multiplies by a matrix: lookups, norms and activations are cheaper computed than read."""
    return any(
        p.ndim >= 2 for m in module.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    )


def leaves_of(
    first: Sequence[Tensor], second: Sequence[Tensor], sizes: tuple[int, int], longest: tuple[int, int] | None
) -> tuple[Leaf, ...] | None:
    """What the outputs of two batches, of `sizes` examples, say about one example; None if they do not count examples.

    longest: the longest example of either batch, which a first dimension of that size follows.
    """
    found = []
    for one, other in zip(first, second, strict=True):
        if one.ndim == 0 or other.ndim != one.ndim or one.shape[0] % sizes[0]:
            return None
        fold = one.shape[0] // sizes[0]
        if fold == 0 or other.shape[0] != fold * sizes[1]:
            return None
        shape, shape_other = tuple(one.shape[1:]), tuple(other.shape[1:])
        long = longest is not None and (shape[:1], shape_other[:1]) == ((longest[0],), (longest[1],))
        if shape[long:] != shape_other[long:]:
            return None
        found.append(Leaf(fold, shape, one.dtype, long))
    return tuple(found)


def _inside(call: Call, cuts: dict[int, Cut]) -> bool:
    while call.parent is not None:
        call = call.parent
        if id(call) in cuts:
            return True
    return False


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(_near(a, b) for a, b in zip(one, other))


def _near(one: Tensor, other: Tensor) -> bool:
    """Equal within the root of the format's precision, relative to the largest value."""
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    gap = (one.float() - other.float()).abs().max().item() if one.numel() else 0.0
    size = other.float().abs().max().item() if one.numel() else 0.0
    return bool(gap <= float(torch.finfo(one.dtype).eps) ** 0.5 * size)  # False for NaN


class _Memory(PrefixFile):
    """Rows of the probe, where no file is worth making."""

    def __init__(self) -> None:
        self.rows: list[list[Tensor]] = []

    def write(self, tensors: Sequence[Tensor]) -> int:
        self.rows.append([t.clone() for t in tensors])
        return len(self.rows) - 1

    def read(self, start: int, kept: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        return self.rows[start]


@torch.no_grad()
def narrowed(cuts: Sequence[Cut], answer: Answer, batch: Any, lengths: Sequence[int] | None) -> list[Cut]:
    """`cuts` that keep only what the answer depends on.

    A cheap module (a norm) that is read is computed live instead where what it reads is kept anyway.
    """
    found = read_ones(cuts, answer, batch, lengths)
    for cut in found:
        if any(leaf.use != "none" for leaf in cut.leaves) and not costly(cut.module):
            rest = [c for c in cuts if c.module is not cut.module]
            if _kept(read_ones(rest, answer, batch, lengths)) < _kept(found):
                return narrowed(rest, answer, batch, lengths)
    return found


def _kept(cuts: Sequence[Cut]) -> int:
    return sum(leaf.use == "all" for cut in cuts for leaf in cut.leaves)


def read_ones(cuts: Sequence[Cut], answer: Answer, batch: Any, lengths: Sequence[int] | None) -> list[Cut]:
    """`cuts` with the use of every output: poisoned with NaN, does the answer notice?"""
    prefix = Prefix(cuts, answer, _Memory())
    outputs = prefix.read(prefix.record(dict(batch), lengths))

    def finite(name: str, place: int, poisoned: Tensor) -> bool:
        own = [poisoned if i == place else t for i, t in enumerate(outputs[name])]
        with prefix.replaced({**outputs, name: own}):
            return bool(torch.isfinite(answer(dict(batch))[1]).all())

    found = []
    for cut in cuts:
        leaves = []
        for place, (leaf, tensor) in enumerate(zip(cut.leaves, outputs[cut.name])):
            use = "all"
            if leaf.dtype.is_floating_point:
                poisoned = torch.full_like(tensor, float("nan"))
                if finite(cut.name, place, poisoned):
                    use = "none"
                elif tensor.ndim >= 3 and tensor.shape[1] > 1:
                    poisoned[:, 0] = tensor[:, 0]
                    use = "first" if finite(cut.name, place, poisoned) else "all"
            leaves.append(replace(leaf, use=use))
        found.append(replace(cut, leaves=tuple(leaves)))
    return found


@torch.no_grad()
def proven(prefix: Prefix, task: Task, chosen: Sequence[int], lengths: Sequence[int] | None) -> Prefix:
    """`prefix`, if it answers for a batch of another make-up as the model itself does."""
    trial = Prefix(prefix.cuts, prefix.answer, _Memory())
    rows = trial.record(_batch(task, chosen), lengths)
    for some in ([len(chosen) - 1, 0], [0]):
        batch = _batch(task, [chosen[i] for i in some])
        plain = prefix.answer(dict(batch))[1]
        with trial.playing([rows[i] for i in some]):
            played = prefix.answer(dict(batch))[1]
        if not _near(played, plain):
            raise NotConstant(f"played back up to {prefix.cuts[-1].name}, the model does not give the same answers")
    return prefix
