"""Seeded dropout: the formula, its statistics, and that it depends on nothing but the seed."""

from __future__ import annotations

import pytest
import torch

from deltaw.ops import dropout


@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, -5, 2**31 - 2, 123456789])
def test_the_mask_is_the_formula(p: float, seed: int) -> None:
    columns = dropout.BLOCK // 3  # three rows a block
    mask = dropout.keep_mask(torch.tensor(seed, dtype=torch.int32), 7, columns, p, torch.float64)
    some = [0, 1, columns // 2, columns - 1]
    expected = torch.tensor(dropout.keep_mask_reference(seed, 7, columns, p, some), dtype=torch.float64)
    torch.testing.assert_close(mask[:, some], expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.5])
def test_the_share_dropped_and_the_mean(p: float) -> None:
    generator = torch.manual_seed(3)
    masks = torch.stack(
        [dropout.keep_mask(dropout.draw_seed(torch.device("cpu")), 64, 48, p, torch.float64) for _ in range(200)]
    )
    assert generator is not None
    # 614,400 decisions from a tape of 1,179,648, some of them twice: five standard deviations of their mean, with room
    tolerance = 5 * (p * (1 - p) / (200 * 64 * 48)) ** 0.5 * 2
    assert abs(float((masks == 0).double().mean()) - p) < tolerance
    assert abs(float(masks.mean()) - 1) < tolerance / (1 - p)


def test_entries_rows_and_columns_are_uncorrelated() -> None:
    torch.manual_seed(0)
    dropped = torch.stack(
        [
            (dropout.keep_mask(dropout.draw_seed(torch.device("cpu")), 8, 8, 0.3, torch.float64) == 0)
            .double()
            .flatten()
            for _ in range(4000)
        ]
    )
    correlation = torch.corrcoef(dropped.t())
    correlation.fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5.5 / 4000**0.5  # 64 x 63 / 2 pairs, normal with this deviation


def test_a_seed_comes_from_torchs_generator() -> None:
    torch.manual_seed(1)
    first = [dropout.draw_seed(torch.device("cpu")) for _ in range(3)]
    torch.manual_seed(1)
    assert [int(dropout.draw_seed(torch.device("cpu"))) for _ in range(3)] == [int(s) for s in first]
    assert len({int(s) for s in first}) == 3


def test_a_few_rows_of_the_mask_are_the_rows_of_the_whole() -> None:
    seed, columns = torch.tensor(17, dtype=torch.int32), dropout.BLOCK // 8
    whole = dropout.keep_mask(seed, 20, columns, 0.2, torch.float32)
    mask = dropout.Mask(seed, 20, columns, 0.2, torch.float32)
    for part in (slice(0, 8), slice(9, 12), slice(5, 12), slice(16, 20)):  # one view, a part of one, copies, the rest
        assert torch.equal(mask.rows(part), whole[part])


def test_a_compiler_makes_the_same_mask() -> None:
    seed = torch.tensor(-3, dtype=torch.int32)
    made = torch.compile(lambda s: dropout.keep_mask(s, 40, 50, 0.3, torch.float32), fullgraph=True, backend="eager")
    assert torch.equal(made(seed), dropout.keep_mask(seed, 40, 50, 0.3, torch.float32))


def test_rows_of_one_block_are_uncorrelated_and_calls_differ() -> None:
    seeds = torch.arange(2, dtype=torch.int32)
    one, two = (dropout.keep_mask(s, 300, 384, 0.5, torch.float64) - 1 for s in seeds)  # +1 and -1
    limit = 5 / 384**0.5
    between = one @ one.t() / 384
    assert float(between.fill_diagonal_(0).abs().max()) < limit * 1.2
    assert float((one @ two.t() / 384).abs().max()) < limit * 1.2


def test_no_rows() -> None:
    assert dropout.keep_mask(torch.tensor(1, dtype=torch.int32), 0, 9, 0.2, torch.float32).shape == (0, 9)
