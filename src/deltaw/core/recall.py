"""Which adapters spoke when something was computed: asked by a recomputation that happens long after, in backward.

Gradient checkpointing runs a part of the forward again during backward, perhaps outside of the `dw.use` under which it
ran first, perhaps in another thread. A `dw.use` inside of the checkpointed function runs again with it, so what has to be
known is who spoke where the part began. Every context in which a thread is carries where it began (`roster.Frame`), and a
host that is called in backward looks for the innermost one that was there before the part (`recall`):

- `use_reentrant=False`: the part runs under saved-tensor hooks of its own. A host that is called where hooks are in force
  writes onto the autograd nodes that its call made who spoke outside of all contexts that began under the same hooks
  (`remember`). The node whose saved tensors are wanted is in the part that runs again; of the nodes above it that carry
  a note, the latest one (autograd numbers nodes in the order of their making) belongs to the same part.
- `use_reentrant=True`: the part ran without a graph. A node's number is taken just before its forward runs, so the
  first host call after that number, in the thread's journal of calls made without a graph, is the part's own, and a
  context that began at a greater number began in it. Two threads whose journals disagree are an error, never a guess.
"""

from __future__ import annotations

import heapq
import threading
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deltaw.core.roster import Roster, Speaking
from deltaw.errors import ModelError
from deltaw.ops.compact import hooks_in_force

NOTE = "deltaw: who spoke"
LEAF = 2**63
"""Autograd numbers leaves (AccumulateGrad) above this."""
JOURNAL = 8192
"""Calls without a graph that are kept per thread."""


def in_backward() -> bool:
    """Whether the calling thread is inside of a backward pass."""
    return torch._C._current_graph_task_id() != -1


def remember(roster: Roster, output: Any, since: int) -> None:
    """Write who spoke where this part began onto every autograd node made since number `since` that `output` comes from."""
    hooks = hooks_in_force()
    speaking = next(f.speaking for f in reversed(roster.frames()) if f.hooks is None or f.hooks != hooks)
    waiting = [t.grad_fn for t in tensors(output) if t.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if since <= node._sequence_nr() < LEAF:
            notes: dict[Any, Any] = node.metadata  # type: ignore[assignment]
            if notes.get(NOTE) != (roster, speaking):
                notes[NOTE] = (roster, speaking)
                waiting += [n for n, _ in node.next_functions if n is not None]


def note_silent_call(roster: Roster) -> None:
    """Enter a call made without a graph into the thread's journal; only the first one at each number counts."""
    number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    journal = roster.journals.setdefault(threading.get_ident(), ([], []))
    numbers, said = journal
    if numbers and numbers[-1] == number:
        return
    if numbers and numbers[-1] > number:  # a new thread with the identity of an old one
        numbers.clear()
        said.clear()
    if len(numbers) >= JOURNAL:
        del numbers[: JOURNAL // 2], said[: JOURNAL // 2]
    numbers.append(number)
    said.append(roster.frames())


def recall(roster: Roster) -> Speaking | None:
    """Who spoke when that ran which runs again now; None if nothing is known.

    Raises:
        ModelError: reentrant checkpointing, and several threads ran forwards that cannot be told apart.
    """
    node = torch._C._current_autograd_node()
    if node is None:
        return None
    if type(node).__name__.startswith("CheckpointFunction"):
        return _from_journals(roster, node._sequence_nr())
    order = 0  # breaks ties: nodes cannot be compared
    waiting = [(-node._sequence_nr(), order, node)]
    seen = {node}
    while waiting:
        _, _, node = heapq.heappop(waiting)
        note = node.metadata.get(NOTE)  # type: ignore[attr-defined]
        if note is not None and note[0] is roster:
            found: Speaking = note[1]
            return found
        for above, _ in node.next_functions:
            if above is not None and above not in seen and above._sequence_nr() < LEAF:
                seen.add(above)
                order += 1
                heapq.heappush(waiting, (-above._sequence_nr(), order, above))
    return None


def _from_journals(roster: Roster, number: int) -> Speaking | None:
    found: list[Speaking] = []
    for numbers, said in list(roster.journals.values()):
        at = bisect_right(numbers, number)
        if at < len(said):
            speaking = next(f.speaking for f in reversed(said[at]) if f.number <= number)
            if speaking not in found:
                found.append(speaking)
    if len(found) > 1:
        raise ModelError(
            "reentrant gradient checkpointing cannot tell which adapters were active: several threads use this model. "
            "Checkpoint with use_reentrant=False"
        )
    return found[0] if found else None


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an output: itself, or those in tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors(each)
