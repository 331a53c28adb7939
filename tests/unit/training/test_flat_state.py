"""AdamW's state in one buffer: the same bits as apart, from the start and from a checkpoint."""

import pytest
import torch
from torch import nn

from deltaw.training.flat_state import LINE, lay_flat
from deltaw.training.trained import pack_optimizer, unpack_optimizer

SHAPES = ((8, 5), (3,), (), (33, 2), (0, 4), (1, 64))


def parameters(dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(d)) for d in dtypes for s in SHAPES]


def adamw(of: list[nn.Parameter], fused: bool = True) -> torch.optim.AdamW:
    half = len(of) // 2
    return torch.optim.AdamW(
        [{"params": of[:half], "lr": 0.1}, {"params": of[half:], "lr": 0.02, "weight_decay": 0.3}], fused=fused
    )


def step(of: list[nn.Parameter], optimizer: torch.optim.Optimizer, turn: int, without: int = -1) -> None:
    generator = torch.Generator().manual_seed(turn)
    for i, p in enumerate(of):
        gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if i == without else gradient
    optimizer.step()


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float64), (torch.bfloat16,)], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_the_bits_are_those_of_tensors_apart(dtypes: tuple[torch.dtype, ...], fused: bool) -> None:
    ours, plain = parameters(dtypes), parameters(dtypes)
    flat, apart = adamw(ours, fused), adamw(plain, fused)
    lay_flat(flat)
    for turn in range(5):
        step(ours, flat, turn, without=2 if turn < 2 else -1)  # one that is trained later on
        step(plain, apart, turn, without=2 if turn < 2 else -1)
        for a, b in zip(ours, plain):
            assert torch.equal(a, b)
    kept, expected = pack_optimizer(flat)[0], pack_optimizer(apart)[0]
    assert kept.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(kept[name], tensor), name


def test_one_buffer_for_each_precision_and_every_moment_on_a_line_of_its_own() -> None:
    of = parameters((torch.float32, torch.float64))
    optimizer = adamw(of)
    lay_flat(optimizer)
    step(of, optimizer, 0)
    moments = [optimizer.state[p][name] for p in of for name in ("exp_avg", "exp_avg_sq") if p.numel()]
    assert len({m.untyped_storage().data_ptr() for m in moments}) == 2
    assert len({m.data_ptr() for m in moments}) == len(moments)
    assert all((m.data_ptr() - m.untyped_storage().data_ptr()) % LINE == 0 for m in moments)


def test_a_checkpoints_state_is_kept_and_what_it_lacks_begins_at_zero() -> None:
    plain = parameters()
    apart = adamw(plain)
    step(plain, apart, 0, without=1)  # as before this was there: no state of what had no gradient
    ours = [nn.Parameter(p.detach().clone()) for p in plain]
    flat = adamw(ours)
    lay_flat(flat)
    unpack_optimizer(flat, *pack_optimizer(apart))
    lay_flat(flat)
    assert len({flat.state[p]["exp_avg"].untyped_storage().data_ptr() for p in ours}) == 1
    for turn in (1, 2):
        step(ours, flat, turn)
        step(plain, apart, turn)
    for a, b in zip(ours, plain):
        assert torch.equal(a, b)
