"""Every verb accepts a model wrapped by DDP, torch.compile or Accelerate; FSDP2 shards after attach; meta-device attach."""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deltaw as dw
from deltaw.errors import ModelError

from .conftest import shaken

X = torch.randn(4, 6)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this very process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")


def accelerated(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare_model(model)


WRAPPERS = {
    "DDP": ddp,
    "compile": compiled,
    "Accelerate": accelerated,
    "DataParallel": nn.DataParallel,
    "compiled DDP": lambda model: compiled(ddp(model)),
    "DDP of compiled": lambda model: ddp(compiled(model)),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_verb_accepts_a_wrapped_model(wrapper, tmp_path):
    torch._dynamo.reset()
    model, reference = plain(), plain()
    wrapped = WRAPPERS[wrapper](model)
    assert dw.attach(wrapped, dw.LoRA(rank=2), targets=["0", "2"], name="a") is wrapped
    dw.attach(reference, dw.LoRA(rank=2), targets=["0", "2"], name="a")
    shaken(reference)
    dw.replace(wrapped, "a", dw.get(reference, "a"))
    dw.add(wrapped, dw.get(reference, "a"), "b")
    dw.copy(wrapped, "a", "c")
    dw.rename(wrapped, "c", "d")
    dw.delete(wrapped, "d")
    assert [s.name for s in dw.adapters(wrapped)] == ["a", "b"]
    assert dw.status(wrapped, "a").active
    assert len(dw.summary(wrapped).rows) == 4
    expected, base = reference(X), plain()(X)
    for name in ("a", "b"):
        with dw.use(wrapped, name):
            torch.testing.assert_close(wrapped(X), expected)
    with dw.disabled(wrapped):
        torch.testing.assert_close(wrapped(X), base)
    with dw.rows(wrapped, ["a", None, "b", None]):
        found = wrapped(X)
    torch.testing.assert_close(found[0::2], expected[0::2])
    torch.testing.assert_close(found[1::2], base[1::2])
    dw.activate(wrapped, "a")
    with dw.merged(wrapped):
        torch.testing.assert_close(wrapped(X), expected)
    dw.quantize(wrapped, dw.Dense16(), keep="memory")
    dw.dequantize(wrapped)
    wrapped(X).square().sum().backward()
    dw.check_gradients(wrapped)
    assert dw.param_groups(wrapped, lr=1e-3)
    dw.after_step(wrapped, 1)
    dw.save(wrapped, tmp_path / "a", name="a")
    dw.detach(wrapped)
    torch.testing.assert_close(wrapped(X), base)
    dw.load(wrapped, tmp_path / "a", name="a", trainable=True)
    torch.testing.assert_close(wrapped(X), expected)
    dw.detach(wrapped)
    assert type(model[0]) is nn.Linear


@pytest.mark.usefixtures("one_process")
def test_fsdp2_shards_an_adapted_model(tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = dw.attach(plain(), dw.LoRA(rank=2), targets=["0", "2"])
    shaken(model)
    reference = copy.deepcopy(model)
    expected = reference(X)
    expected.square().sum().backward()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    found = model(X)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    dw.check_gradients(model)
    for mine, theirs in zip(model.parameters(), reference.parameters()):
        assert mine.requires_grad == theirs.requires_grad
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)
    with dw.disabled(model):
        torch.testing.assert_close(model(X), plain()(X))
    with pytest.raises(ModelError, match="FSDP"):
        dw.detach(model)
    with pytest.raises(ModelError, match="FSDP"):
        dw.attach(model, dw.LoRA(rank=2), targets=["0"], name="late")
    torch.testing.assert_close(model(X), expected)
    for key, change in dw.get(model).changes.items():
        for name, tensor in dw.get(reference).changes[key].tensors.items():
            assert type(change.tensors[name]) is torch.Tensor
            assert torch.equal(change.tensors[name], tensor), (key, name)
    dw.save(model, tmp_path / "sharded")
    dw.save(reference, tmp_path / "whole")
    for file in sorted(p.name for p in (tmp_path / "whole").iterdir()):
        assert (tmp_path / "sharded" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_attach_on_the_meta_device_then_load(tmp_path):
    full = dw.attach(plain(), dw.DoRA(rank=2), targets=["0", "2"], name="a")
    shaken(full)
    dw.save(full, tmp_path / "a", name="a")
    with torch.device("meta"):
        model = plain()
    dw.attach(model, dw.LoRA(rank=2), targets=["0"], name="fresh")
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ModelError, match="meta device"):
        dw.merge(model, "fresh")
    dw.detach(model)
    model.to_empty(device="cpu")
    model.load_state_dict(plain().state_dict())
    dw.load(model, tmp_path / "a", name="a")
    torch.testing.assert_close(model(X), full(X))


@pytest.mark.usefixtures("one_process")
def test_compact_saves_under_ddp_give_the_gradients_of_compact_saves():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    shaken(dw.attach(net, dw.LoRA(rank=2, dropout=0.1), targets=["0", "2"]))
    x = torch.randn(200, 64)
    found = []
    for wrapped in (net, ddp(net)):
        torch.manual_seed(1)
        with dw.compact(wrapped):
            loss = wrapped(x).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
        net.zero_grad()
    assert len(found[0]) == 5
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
