"""Contexts that are left in another order than the reverse of that in which they were entered."""

import asyncio
import threading
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import ModelError
from tests.laws.conftest import shaken

X = torch.randn(2, 8)


def model_with(*names: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    for name in names:
        dw.attach(model, dw.LoRA(rank=2), ["0"], name=name)
    return shaken(model)


def said_by(model, choice) -> torch.Tensor:
    with dw.use(model, choice):
        return model(X).detach()


def test_tasks_that_overlap_are_told_and_leave_nothing_behind():
    model = model_with("a", "b", "c")
    outputs = {}

    async def request(name, seconds):
        with dw.use(model, name):
            await asyncio.sleep(seconds)
            outputs[name] = model(X)

    async def both():
        return await asyncio.gather(request("a", 0.01), request("b", 0.05), return_exceptions=True)

    first, second = asyncio.run(both())
    assert isinstance(first, ModelError)
    assert "must nest" in str(first)
    assert "asyncio.to_thread" in str(first)
    assert second is None
    assert torch.equal(outputs["b"], said_by(model, "b"))
    assert torch.equal(model(X), said_by(model, "c"))


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)])
def test_whatever_the_order_in_which_contexts_are_left_those_that_remain_speak(order):
    model = model_with("a", "b", "c")
    contexts = [dw.use(model, "a"), dw.rows(model, ["c", "a"]), dw.use(model, {"b": 2.0})]
    mixed = torch.cat([said_by(model, "c")[:1], said_by(model, "a")[1:]])
    said = [said_by(model, "a"), mixed, said_by(model, {"b": 2.0})]
    for context in contexts:
        context.__enter__()
    inside = [0, 1, 2]
    for leaving in order:
        if leaving == inside[-1]:
            contexts[leaving].__exit__(None, None, None)
        else:
            with pytest.raises(ModelError, match="must nest"):
                contexts[leaving].__exit__(None, None, None)
        inside.remove(leaving)
        torch.testing.assert_close(model(X), said[inside[-1]] if inside else said_by(model, "c"))
    assert "forward" not in model.__dict__


def test_a_generator_that_another_thread_closes_changes_nothing_there():
    model = model_with("a", "b")

    def streamed():
        with dw.use(model, "a"):
            yield model(X)

    stream = streamed()
    next(stream)
    found = []

    def close():
        with dw.use(model, "b"):
            with pytest.raises(ModelError, match="must nest"):
                stream.close()
            found.append(model(X))

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert torch.equal(found[0], said_by(model, "b"))


def test_contexts_that_nest_are_no_error():
    model = model_with("a", "b")
    with ExitStack() as stack:
        for name in ("a", "b", None, "a"):
            stack.enter_context(dw.use(model, name))
        with pytest.raises(ZeroDivisionError), dw.disabled(model):
            _ = 1 / 0
        assert torch.equal(model(X), said_by(model, "a"))
    assert torch.equal(model(X), said_by(model, "b"))
