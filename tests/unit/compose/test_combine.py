"""Combinations against dense float64 computations."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deltaw as dw
from deltaw import errors
from deltaw.compose import Ties
from deltaw.compose.combiner import draw_mask
from deltaw.variants.diff import Diff

ROUNDING = 2e-7
"""Relative Frobenius error of rounding factors to float32 (2^-24 per entry, twice)."""


def lora(seed, *, out=9, columns=13, rank=3, alpha=5.0, dtype=torch.float32, scaling="alpha/rank"):
    g = torch.Generator().manual_seed(seed)
    return dw.Change(
        dw.LoRA(rank=rank, alpha=alpha, scaling=scaling),
        {
            "A": torch.randn(rank, columns, generator=g, dtype=torch.float64).to(dtype),
            "B": torch.randn(out, rank, generator=g, dtype=torch.float64).to(dtype),
        },
        "linear",
        (out, columns),
    )


def adapter(seed, keys=("x.weight", "y.weight"), **options):
    return dw.Adapter({key: lora(seed * 100 + i, **options) for i, key in enumerate(keys)})


def dense(adapter, key, weight=None):
    """ΔW in float64, from the tensors, not from the package."""
    if key not in adapter.changes:
        return 0.0
    change = adapter.changes[key]
    v, t = change.variant, {n: x.double() for n, x in change.tensors.items()}
    if isinstance(v, dw.Full):
        return t["value"] - weight
    alpha = 2 * v.rank if v.alpha is None else v.alpha
    scale = {"alpha/rank": alpha / v.rank, "alpha/sqrt(rank)": alpha / math.sqrt(v.rank), "alpha": alpha}[v.scaling]
    low = scale * t["B"] @ t["A"]
    if isinstance(v, dw.DoRA):
        changed = weight + low
        return t["m"][:, None] * changed / changed.norm(dim=1, keepdim=True) - weight
    return low


def relative(a, b):
    return float((a - b).norm() / b.norm())


def best_of_rank(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


class TestExactSum:
    @given(
        st.lists(
            st.tuples(st.integers(1, 6), st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3)), min_size=1, max_size=4
        ),
        st.sampled_from(["alpha/rank", "alpha/sqrt(rank)", "alpha"]),
    )
    @settings(max_examples=40, deadline=None)
    def test_cat_is_the_dense_sum_for_any_ranks_scales_and_signs(self, parts, scaling):
        made = [
            adapter(i, rank=r, alpha=1.0 + i, scaling=scaling, dtype=torch.float64) for i, (r, _) in enumerate(parts)
        ]
        weights = [w for _, w in parts]
        result = dw.combine(made, weights)
        for key in ("x.weight", "y.weight"):
            exact = sum(w * dense(a, key) for w, a in zip(weights, made))
            size = sum((abs(w) * dense(a, key)).norm() for w, a in zip(weights, made))
            assert float((dense(result, key) - exact).norm()) < 1e-14 * float(size)

    def test_ranks_add_up(self):
        result = dw.combine([adapter(1, rank=3), adapter(2, rank=2)], [1.0, -0.5])
        assert {c.variant.rank for c in result.changes.values()} == {5}

    def test_one_adapter_with_weight_one_is_itself(self):
        a = adapter(1)
        for how in ("cat", "svd", "linear", "slerp"):
            result = dw.combine([a], [1.0], how=how)
            assert result.changes == a.changes
            assert set(result.error.values()) == {0.0}

    def test_difference_with_itself_is_zero(self):
        a = adapter(1)
        for how in ("cat", "svd"):
            result = dw.combine([a, a], [1, -1], how=how)
            for key in a.changes:
                assert float(dense(result, key).norm()) < 1e-6 * float(dense(a, key).norm())
                assert result.error[key] < 1e-6

    def test_a_weight_that_one_adapter_does_not_touch_counts_as_zero(self):
        a, b = adapter(1, keys=("x.weight",)), adapter(2, keys=("x.weight", "z.weight"))
        result = dw.combine([a, b], [0.3, -2.0])
        assert set(result.changes) == {"x.weight", "z.weight"}
        assert relative(dense(result, "z.weight"), -2.0 * dense(b, "z.weight")) < ROUNDING

    def test_wider_than_the_matrix_is_kept_as_wide_as_the_matrix(self):
        made = [adapter(i, out=4, columns=7, rank=3) for i in range(3)]
        result = dw.combine(made)
        assert result.changes["x.weight"].variant.rank == 4
        assert relative(dense(result, "x.weight"), sum(dense(a, "x.weight") for a in made)) < ROUNDING

    def test_sixteen_bit_factors_give_a_float32_sum(self):
        a, b = adapter(1, dtype=torch.bfloat16), adapter(2, dtype=torch.bfloat16)
        result = dw.combine([a, b], [0.3, 0.7])
        assert result.changes["x.weight"].tensors["A"].dtype == torch.float32
        assert max(result.error.values()) < ROUNDING

    def test_the_inputs_are_left_alone(self):
        a, b = adapter(1), adapter(2)
        before = {k: t.clone() for k, t in a.tensors().items()}
        dw.combine([a, b], [2, 3])
        assert all(torch.equal(before[k], t) for k, t in a.tensors().items())


class TestTruncation:
    def test_svd_is_the_best_approximation_of_its_rank(self):
        a, b = adapter(1), adapter(2)
        result = dw.combine([a, b], [0.6, -0.4], how="svd", rank=2)
        for key in a.changes:
            exact = 0.6 * dense(a, key) - 0.4 * dense(b, key)
            best = best_of_rank(exact, 2)
            assert relative(dense(result, key), best) < 1e-6
            assert result.error[key] == pytest.approx(relative(best, exact), rel=1e-5)

    def test_error_is_the_distance_of_what_is_kept(self):
        a, b = adapter(1), adapter(2, rank=5)
        for how in ("svd", "linear", "ties", "dare", "magnitude", "slerp"):
            result = dw.combine([a, b], [0.6, 0.4], how=how, rank=3)
            for key in a.changes:
                exact = 0.6 * dense(a, key) + 0.4 * dense(b, key)
                assert result.error[key] == pytest.approx(relative(dense(result, key), exact), rel=1e-6)

    def test_svd_keeps_the_largest_rank_of_the_parts_by_default(self):
        result = dw.combine([adapter(1, rank=2), adapter(2, rank=4)], how="svd")
        assert result.changes["x.weight"].variant.rank == 4

    @given(st.floats(0.05, 1.0))
    @settings(max_examples=20, deadline=None)
    def test_energy_is_held_by_the_fewest_directions(self, energy):
        a, b = adapter(1), adapter(2)
        result = dw.combine([a, b], how="svd", energy=energy)
        exact = dense(a, "x.weight") + dense(b, "x.weight")
        squares = torch.linalg.svdvals(exact).square()
        rank = result.changes["x.weight"].variant.rank
        assert float(squares[:rank].sum() / squares.sum()) >= energy - 1e-9
        assert float(squares[: rank - 1].sum() / squares.sum()) < energy

    def test_energy_one_stops_where_the_sum_has_no_more_directions(self):
        a = adapter(1)
        result = dw.combine([a, a], [0.5, 0.25], how="svd", energy=1.0)
        assert result.changes["x.weight"].variant.rank == 3
        assert max(result.error.values()) < ROUNDING


def ties_reference(matrices, weights, density):
    """The paper's three steps entry by entry, in plain Python."""
    trimmed = []
    for m in matrices:
        flat = m.flatten().tolist()
        keep = max(1, round(density * len(flat)))
        top = set(sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[:keep])
        trimmed.append([x if i in top else 0.0 for i, x in enumerate(flat)])
    merged = []
    for entries in zip(*trimmed):
        weighted = [w * e for w, e in zip(weights, entries)]
        total = sum(weighted)
        agree = [x for x in weighted if x * total > 0]
        merged.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view_as(matrices[0])


class TestPruning:
    @pytest.mark.parametrize("density", [0.1, 0.37, 1.0])
    @pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -0.7, 2.0)])
    def test_ties_is_the_papers_on_dense_changes(self, density, weights):
        made = [adapter(i) for i in (1, 2, 3)]
        result = dw.combine(made, weights, how="ties", density=density, rank=9)
        for key in ("x.weight", "y.weight"):
            reference = ties_reference([dense(a, key) for a in made], weights, density)
            assert relative(dense(result, key), reference) < ROUNDING
            assert result.extra["combined"]["truncation"][key] < ROUNDING

    def test_ties_does_not_depend_on_how_factors_split(self):
        a, b = adapter(1, dtype=torch.float64), adapter(2, dtype=torch.float64)
        flip = torch.diag(torch.tensor([-1.0, 2.0, 0.5], dtype=torch.float64))
        change = a.changes["x.weight"]
        other = dw.Change(
            change.variant, {"A": flip @ change.tensors["A"], "B": change.tensors["B"] @ flip.inverse()}, "linear"
        )
        again = dw.Adapter({**a.changes, "x.weight": other})
        one, two = (dw.combine([x, b], how="ties", density=0.3) for x in (a, again))
        assert relative(dense(one, "x.weight"), dense(two, "x.weight")) < 1e-9

    def test_magnitude_keeps_the_largest_entries(self):
        a, b = adapter(1), adapter(2)
        result = dw.combine([a, b], [1.0, -2.0], how="magnitude", density=0.25, rank=9)
        expected = 0
        for w, m in ((1.0, dense(a, "x.weight")), (-2.0, dense(b, "x.weight"))):
            threshold = m.abs().flatten().sort(descending=True).values[round(0.25 * m.numel()) - 1]
            expected = expected + w * m * (m.abs() >= threshold)
        assert relative(dense(result, "x.weight"), expected) < ROUNDING

    def test_dare_keeps_rescaled_entries_of_one_adapter(self):
        a = adapter(1)
        result = dense(dw.combine([a], how="dare", density=0.4, seed=3, rank=9), "x.weight")
        ratio = result / dense(a, "x.weight")
        kept = (ratio - 2.5).abs() < 1e-4
        dropped = ratio.abs() < 1e-4
        assert bool((kept | dropped).all())
        assert bool(kept.any())
        assert bool(dropped.any())

    def test_dare_drops_the_share_it_should_and_keeps_the_mean(self):
        a = adapter(1, keys=("x.weight",), out=60, columns=50, dtype=torch.float64)
        exact = dense(a, "x.weight")
        runs = [dense(dw.combine([a], how="dare", density=0.3, seed=s, rank=60), "x.weight") for s in range(40)]
        share = torch.stack([(r.abs() > 1e-9 * exact.abs().max()).double().mean() for r in runs]).mean()
        assert float(share) == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / (40 * 3000)))
        # Var of the mean over 40 runs is Σx²(1-p)/p/40: the distance is sqrt(.7/.3/40) = .24 of the norm.
        assert relative(sum(runs) / 40, exact) == pytest.approx(math.sqrt(0.7 / 0.3 / 40), rel=0.1)

    def test_dare_is_seeded_and_independent_of_the_other_weights(self):
        a, b = adapter(1), adapter(2)
        both = dw.combine([a, b], how="dare", seed=7)
        again = dw.combine([a, b], how="dare", seed=7)
        alone = dw.combine(
            [dw.Adapter({"y.weight": a.changes["y.weight"]}), dw.Adapter({"y.weight": b.changes["y.weight"]})],
            how="dare",
            seed=7,
        )
        other = dw.combine([a, b], how="dare", seed=8)
        assert all(torch.equal(t, again.tensors()[k]) for k, t in both.tensors().items())
        assert torch.equal(both.changes["y.weight"].tensors["B"], alone.changes["y.weight"].tensors["B"])
        assert not torch.equal(both.changes["y.weight"].tensors["B"], other.changes["y.weight"].tensors["B"])

    @pytest.mark.parametrize("seed", [-(2**63), -2148, 4295, 2**32, 2**63 - 1])
    def test_dare_takes_every_seed_and_draws_others_for_the_next(self, seed):
        one, other = (dw.combine([adapter(1)], how="dare", seed=s) for s in (seed, seed - 1 if seed > 0 else seed + 1))
        assert not torch.equal(dense(one, "x.weight"), dense(other, "x.weight"))

    def test_dares_masks_of_a_seed_stay_what_they_were(self):
        drawn = [draw_mask(torch.Size([8]), 0.5, seed=s, key="x.weight", place=1).int().tolist() for s in (0, -7, 4294)]
        assert drawn == [[1, 0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 1, 1], [0, 1, 1, 0, 1, 0, 1, 0]]

    def test_dare_ties_elects_signs_after_dropping(self):
        a, b = adapter(1), adapter(2)
        result = dw.combine([a, b], how="dare", density=1.0, then="ties", rank=9)
        reference = ties_reference([dense(a, "x.weight"), dense(b, "x.weight")], (1, 1), 1.0)
        assert relative(dense(result, "x.weight"), reference) < ROUNDING

    def test_dare_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        dw.combine([adapter(1), adapter(2)], how="dare")
        assert torch.equal(before, torch.get_rng_state())


class TestSlerp:
    def test_keeps_the_length_and_turns_evenly(self):
        a, b = adapter(1, dtype=torch.float64), adapter(2, dtype=torch.float64)
        x, y = dense(a, "x.weight"), dense(b, "x.weight")
        unit = lambda m: m / m.norm()  # noqa: E731
        angle = math.acos(float((unit(x) * unit(y)).sum()))
        for t in (0.0, 0.25, 0.5, 1.0):
            z = dense(dw.combine([a, b], [1 - t, t], how="slerp"), "x.weight")
            assert float(z.norm()) == pytest.approx(float((1 - t) * x.norm() + t * y.norm()))
            assert math.acos(min(1.0, float((unit(x) * unit(z)).sum()))) == pytest.approx(t * angle, abs=1e-6)

    def test_of_parallel_changes_is_the_straight_line(self):
        a = adapter(1, dtype=torch.float64)
        z = dw.combine([a, a], [0.25, 0.75], how="slerp")
        assert relative(dense(z, "x.weight"), dense(a, "x.weight")) < 1e-12

    def test_refuses_three_and_negative_weights(self):
        made = [adapter(i) for i in (1, 2, 3)]
        with pytest.raises(errors.ConfigError, match="between two adapters"):
            dw.combine(made, how="slerp")
        with pytest.raises(errors.ConfigError, match="none negative"):
            dw.combine(made[:2], [1, -1], how="slerp")


class TestLinear:
    def test_averages_factors_not_changes(self):
        a, b = adapter(1, rank=3, alpha=6.0), adapter(2, rank=2, alpha=1.0)
        result = dw.combine([a, b], [0.7, -0.3], how="linear")
        A1, B1 = (a.changes["x.weight"].tensors[n].double() for n in "AB")
        A2, B2 = (b.changes["x.weight"].tensors[n].double() for n in "AB")
        s1, s2 = 0.7 * 2.0, 0.3 * 0.5
        A = math.sqrt(s1) * A1
        B = math.sqrt(s1) * B1
        A[:2] -= math.sqrt(s2) * A2
        B[:, :2] += math.sqrt(s2) * B2
        assert relative(dense(result, "x.weight"), B @ A) < ROUNDING
        assert result.error["x.weight"] > 0.1


class TestBlocks:
    keys = ("layers.1.q.weight", "layers.10.q.weight", "layers.2.q.weight")

    def test_patterns_give_each_block_its_weights(self):
        a, b = adapter(1, keys=self.keys), adapter(2, keys=self.keys)
        result = dw.combine([a, b], {"layers.1": [1, 0], r"layers\.\d\d\..*": [0, 2], "*": [0.5, 0.5]})
        assert relative(dense(result, self.keys[0]), dense(a, self.keys[0])) < ROUNDING
        assert relative(dense(result, self.keys[1]), 2 * dense(b, self.keys[1])) < ROUNDING
        half = 0.5 * (dense(a, self.keys[2]) + dense(b, self.keys[2]))
        assert relative(dense(result, self.keys[2]), half) < ROUNDING

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ({"layers.1": [1, 0]}, "no pattern matches layers.10"),
            ({"layer.1": [1, 0], "*": [1, 1]}, "matches none of the 3"),
            ({"layers.1": [1, 0], "q": [1, 1]}, "both match layers.1.q.weight"),
            ({"*": [1]}, "1 weights for 2 adapters"),
            ([1, 2, 3], "3 weights for 2 adapters"),
            ([1, math.nan], "finite"),
            ("12", "one number per adapter"),
            ([0, 0], "every weight is zero"),
        ],
    )
    def test_refusals(self, weights, message):
        with pytest.raises(errors.ConfigError, match=message):
            dw.combine([adapter(1, keys=self.keys), adapter(2, keys=self.keys)], weights)


def dora(seed, weight, **options):
    change = lora(seed, **options)
    m = weight.norm(dim=1).float() * torch.linspace(0.5, 1.5, weight.shape[0])
    return dw.Change(dw.DoRA(rank=3, alpha=5.0), {**change.tensors, "m": m}, "linear")


class TestChangesThatNeedTheBase:
    def base(self):
        return torch.randn(9, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    @pytest.mark.parametrize("as_model", [False, True])
    def test_dora_enters_by_its_true_change(self, as_model):
        W = self.base()
        base = {"x.weight": W.float()}
        if as_model:
            model = nn.Module()
            model.x = nn.Linear(13, 9)
            model.x.weight.data = W.float()
            base = model
        W = W.float().double()
        a = dw.Adapter({"x.weight": dora(1, W)})
        b = adapter(2, keys=("x.weight",))
        exact = 0.6 * dense(a, "x.weight", W) - 0.4 * dense(b, "x.weight")
        result = dw.combine([a, b], [0.6, -0.4], base=base)
        assert relative(dense(result, "x.weight"), exact) < ROUNDING
        small = dw.combine([a, b], [0.6, -0.4], base=base, how="svd", rank=4)
        assert relative(dense(small, "x.weight"), best_of_rank(exact, 4)) < 1e-6
        assert small.error["x.weight"] == pytest.approx(relative(best_of_rank(exact, 4), exact), rel=1e-5)

    def test_dora_without_a_base_is_refused_with_the_reason(self):
        a = dw.Adapter({"x.weight": dora(1, self.base())})
        with pytest.raises(errors.ConfigError, match=r"ΔW of x.weight \(dora\) depends on the base weight"):
            dw.combine([a, adapter(2)], [0.5, 0.5])

    def test_a_base_of_another_shape_or_without_the_weight_is_refused(self):
        a = dw.Adapter({"x.weight": dora(1, self.base())})
        with pytest.raises(errors.AdapterError, match="give the base that the adapter was trained on"):
            dw.combine([a], [2.0], base={"x.weight": torch.zeros(9, 12)})
        with pytest.raises(errors.UnknownName, match=r"did you mean 'xx.weight'"):
            dw.combine([a], [2.0], base={"xx.weight": torch.zeros(9, 13)})

    def copies(self):
        g = torch.Generator().manual_seed(5)
        W, one, two = (torch.randn(3, 4, generator=g) for _ in range(3))
        make = lambda value: dw.Adapter({"head.weight": dw.Change(dw.Full(), {"value": value})})  # noqa: E731
        return W, one, two, make(one), make(two)

    def test_copies_whose_weights_add_up_to_one_need_no_base(self):
        _, one, two, a, b = self.copies()
        result = dw.combine([a, b], [0.25, 0.75])
        assert torch.allclose(result.changes["head.weight"].tensors["value"], 0.25 * one + 0.75 * two, atol=1e-7)

    def test_copies_of_a_new_head_are_averaged_and_it_is_said(self):
        _, one, two, a, b = self.copies()
        result = dw.combine([a, b], [0.5, 0.5], how="ties", base={"other.weight": one})
        assert torch.allclose(result.changes["head.weight"].tensors["value"], (one + two) / 2, atol=1e-7)
        assert result.extra["combined"]["averaged"] == ["head.weight"]
        assert dw.combine([a, b], [0.5, 0.5]).extra["combined"]["averaged"] == []

    def test_other_weights_of_copies_need_it(self):
        W, one, two, a, b = self.copies()
        with pytest.raises(errors.ConfigError, match="the weights add up to 2"):
            dw.combine([a, b])
        result = dw.combine([a, b], [1.0, -1.0], base={"head.weight": W})
        assert torch.allclose(result.changes["head.weight"].tensors["value"], W + one - two, atol=1e-6)
        ties = dw.combine([a, b], base={"head.weight": W}, how="ties", density=0.5)
        expected = W.double() + ties_reference([(one - W).double(), (two - W).double()], (1, 1), 0.5)
        assert torch.allclose(ties.changes["head.weight"].tensors["value"].double(), expected, atol=1e-6)

    @pytest.mark.parametrize("how", ["linear", "ties", "slerp", "dare", "magnitude", "cat", "svd"])
    def test_counters_of_a_trained_batch_norm_stay_whole_numbers(self, how):
        base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        model = dw.attach(copy.deepcopy(base), dw.LoRA(rank=1), targets=["0"], train=["1"])
        for _ in range(3):
            model(torch.randn(8, 4))
        a = dw.get(model)
        counter = dw.combine([a, a], [1.0, 1.0], base=base, how=how).changes["1.num_batches_tracked"].tensors["value"]
        assert counter.dtype == torch.int64
        assert int(counter) in {3, 6}  # some ways add, some average
        assert torch.equal(a.changes["1.num_batches_tracked"].delta_weight(torch.tensor(1)), torch.tensor(2))
        for found in (dw.spectrum(a), dw.spectrum(a, base=base)):
            assert "1.num_batches_tracked" in found.skipped


class TestOtherForms:
    def test_stacks_of_experts_are_combined_expert_by_expert(self):
        g = torch.Generator().manual_seed(1)
        make = lambda rank: dw.Adapter(  # noqa: E731
            {
                "experts": dw.Change(
                    dw.LoRA(rank=rank),
                    {"A": torch.randn(4, rank, 7, generator=g), "B": torch.randn(4, 5, rank, generator=g)},
                )
            }
        )
        a, b = make(2), make(1)
        exact = 0.5 * dense(a, "experts") - 2 * dense(b, "experts")
        result = dw.combine([a, b], [0.5, -2])
        assert result.changes["experts"].tensors["A"].shape == (4, 3, 7)
        assert relative(dense(result, "experts"), exact) < ROUNDING
        small = dw.combine([a, b], [0.5, -2], how="svd", energy=0.9)
        for e in range(4):
            values = torch.linalg.svdvals(exact[e]).square()
            rank = int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
            assert relative(dense(small, "experts")[e], best_of_rank(exact[e], rank)) < 1e-6
        assert small.error["experts"] == pytest.approx(relative(dense(small, "experts"), exact), rel=1e-6)

    @pytest.mark.parametrize("how", ["cat", "svd", "ties"])
    @pytest.mark.parametrize("whole", [dw.Full, Diff])
    def test_a_whole_change_and_a_lora_of_one_matrix_are_truncated_together(self, whole, how):
        W, D = (torch.randn(9, 13, dtype=torch.float64) for _ in range(2))
        tensors = {"value": W + D} if whole is dw.Full else {"diff": D}
        norm = dw.Change(Diff(), {"diff": torch.randn(9)})
        other = dw.Adapter({"x.weight": dw.Change(whole(), tensors), "norm.bias": norm})
        a, base = adapter(1, keys=("x.weight",)), {"x.weight": W, "norm.bias": torch.zeros(9)}
        uncut = dw.combine([other, a], how=how, base=base)
        blend = (
            uncut.changes["x.weight"].tensors["value"] - W
            if whole is dw.Full
            else uncut.changes["x.weight"].tensors["diff"]
        )
        result = dw.combine([other, a], how=how, base=base, rank=4)
        change = result.changes["x.weight"]
        assert change.variant == dw.LoRA(rank=4, alpha=4)
        assert (change.layer, change.shape) == ("linear", (9, 13))
        assert relative(dense(result, "x.weight"), best_of_rank(blend, 4)) < 1e-6
        cost = relative(best_of_rank(blend, 4), blend)
        assert result.extra["combined"]["truncation"]["x.weight"] == pytest.approx(cost, rel=1e-6)
        assert result.extra["combined"]["whole"] == ["norm.bias"]
        assert uncut.extra["combined"]["whole"] == ["x.weight", "norm.bias"]
        kept = dw.combine([other, a], how=how, base=base, energy=0.9).changes["x.weight"].variant.rank
        squares = torch.linalg.svdvals(blend).square()
        assert kept == int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1

    def test_dense_differences_add_up_without_a_base(self):
        D, E = torch.randn(5), torch.randn(5)
        a, b = (dw.Adapter({"norm.bias": dw.Change(Diff(), {"diff": x})}) for x in (D, E))
        result = dw.combine([a, b], [2, -1])
        assert result.changes["norm.bias"].variant == Diff()
        assert torch.allclose(result.changes["norm.bias"].tensors["diff"], 2 * D - E, atol=1e-6)

    def test_ia3_is_refused_for_its_bias(self):
        from deltaw.variants.ia3 import IA3

        a = dw.Adapter({"x.weight": dw.Change(IA3(), {"l": torch.rand(9)})})
        with pytest.raises(errors.ConfigError, match="changes the layer's bias together with its weight"):
            dw.combine([a, adapter(2)], [0.5, 0.5], base={"x.weight": torch.randn(9, 13)})

    def test_ia3_of_the_input_enters_by_its_true_change(self):
        from deltaw.variants.ia3 import IA3

        l, W = torch.rand(13), torch.randn(9, 13)
        a, b = dw.Adapter({"x.weight": dw.Change(IA3(of="input"), {"l": l})}), adapter(2, keys=("x.weight",))
        with pytest.raises(errors.ConfigError, match="depends on the base weight"):
            dw.combine([a, b])
        result = dw.combine([a, b], [0.5, 2], base={"x.weight": W})
        exact = 0.5 * W.double() * (l.double() - 1) + 2 * dense(b, "x.weight")
        assert relative(dense(result, "x.weight"), exact) < ROUNDING

    def test_a_part_of_a_weight_reads_its_part_of_the_base(self):
        W = torch.randn(27, 13, dtype=torch.float64)
        a = dw.Adapter({"qkv.weight[9:18]": dora(1, W[9:18])})
        result = dw.combine([a], [0.5], base={"qkv.weight": W})
        exact = 0.5 * (dense(a, "qkv.weight[9:18]", W[9:18]))
        assert relative(dense(result, "qkv.weight[9:18]"), exact) < ROUNDING

    def test_ties_of_the_base_must_agree_and_are_kept(self):
        from dataclasses import replace

        a = adapter(1, keys=("x.weight",))
        tied = dw.Adapter({"x.weight": replace(a.changes["x.weight"], tied=("head.weight",))})
        assert dw.combine([tied, tied]).changes["x.weight"].tied == ("head.weight",)
        with pytest.raises(errors.AdapterError, match="tied"):
            dw.combine([a, tied])


class TestRefusals:
    def test_unknown_ways_and_options_name_the_nearest(self):
        with pytest.raises(errors.UnknownName, match="did you mean 'ties'"):
            dw.combine([adapter(1)], how="tie")
        with pytest.raises(errors.ConfigError, match="no option 'densty'; did you mean 'density'"):
            dw.combine([adapter(1)], how="ties", densty=0.2)
        with pytest.raises(errors.ConfigError, match="takes no options"):
            dw.combine([adapter(1)], how="cat", density=0.2)

    @pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 2.5}, {"energy": 0}, {"energy": 1.1}, {"energy": True}])
    def test_bad_ranks_and_energies(self, options):
        with pytest.raises(errors.ConfigError):
            dw.combine([adapter(1)], how="svd", **options)

    @pytest.mark.parametrize("weights", [[None, 1], ["x", 1], [10**400, 1], [1e39, 1], {3: [1, 1]}], ids=str)
    def test_bad_weights(self, weights):
        with pytest.raises(errors.ConfigError, match="weights"):
            dw.combine([adapter(1), adapter(2)], weights)

    def test_a_blend_beyond_float32_is_refused(self):
        with pytest.raises(errors.NonFinite, match=r"x\.weight: the blend is too large .*give smaller weights"):
            dw.combine([adapter(1), adapter(2)], [3e38, 1])

    @pytest.mark.parametrize("how", [None, 3, ["cat"]])
    def test_bad_ways(self, how):
        with pytest.raises(errors.ConfigError, match=r"how=.*give one of .*cat.*, or a Combiner"):
            dw.combine([adapter(1)], how=how)

    @pytest.mark.parametrize("density", [0, -1, 1.5, True])
    def test_bad_densities(self, density):
        with pytest.raises(errors.ConfigError, match="density"):
            Ties(density=density)

    @pytest.mark.parametrize("seed", [1.0, None, "1", True, 2**63])
    def test_bad_seeds(self, seed):
        with pytest.raises(errors.ConfigError, match=r"seed=.*must be a whole number"):
            dw.combine([adapter(1)], how="dare", seed=seed)

    def test_not_finite(self):
        a = adapter(1)
        a.changes["x.weight"].tensors["B"][0, 0] = math.nan
        with pytest.raises(errors.AdapterError, match=r"x\.weight\.B holds NaN"):
            dw.combine([a, adapter(2)])

    def test_different_shapes(self):
        with pytest.raises(errors.AdapterError, match="of different shapes"):
            dw.combine([adapter(1), adapter(2, columns=12)])

    def test_different_bases_by_fingerprint(self):
        from deltaw.io.fingerprint import fingerprint

        g = torch.Generator().manual_seed(0)
        one, other = nn.Linear(13, 9), nn.Linear(13, 9)
        one.weight.data = torch.randn(9, 13, generator=g)
        other.load_state_dict(one.state_dict())
        rounded = nn.Linear(13, 9).bfloat16()
        rounded.load_state_dict(one.state_dict())
        a, same, short = (adapter(1).replace(base={"fingerprint": fingerprint(m)}) for m in (one, other, rounded))
        assert dw.combine([a, same, short]).base == a.base
        other.weight.data[0, 0] += 1
        b = adapter(2).replace(base={"fingerprint": fingerprint(other)})
        with pytest.raises(errors.BaseMismatch, match="weight has other values"):
            dw.combine([a, b])
        assert dw.combine([a, b], allow_base_mismatch=True).base == {}

    def test_different_bases_by_name(self):
        a, b, c = (adapter(1).replace(base={"name": n}) for n in ("hub/bert", "local/folder/bert", "hub/roberta"))
        dw.combine([a, b])
        with pytest.raises(errors.BaseMismatch, match="they name 'bert' and 'roberta'"):
            dw.combine([a, c])

    def test_nothing_and_not_adapters(self):
        with pytest.raises(errors.ConfigError, match="at least one"):
            dw.combine([])
        with pytest.raises(errors.ConfigError, match=r"takes a list of adapters.*found Adapter"):
            dw.combine(adapter(1))
        with pytest.raises(errors.ConfigError, match=r"use dw.read"):
            dw.combine(["folder"])


def test_a_combiner_from_outside_is_used_like_ours():
    from dataclasses import dataclass

    from deltaw.compose.combiner import Combiner, combiner, combiners

    @combiner
    @dataclass(frozen=True, kw_only=True, repr=False)
    class First(Combiner):
        kind = "first"

        def blend(self, key, terms, seed):
            return terms[0].change

    try:
        result = dw.combine([adapter(1), adapter(2)], how="first")
        assert relative(dense(result, "x.weight"), dense(adapter(1), "x.weight")) < ROUNDING
    finally:
        del combiners._known["first"]


def test_weights_in_use_compute_what_the_combination_computes():
    model = nn.Sequential(nn.Linear(13, 9), nn.ReLU(), nn.Linear(9, 13)).double()
    made = [
        dw.Adapter(
            {"0.weight": lora(n, dtype=torch.float64), "2.weight": lora(n + 9, out=13, columns=9, dtype=torch.float64)}
        )
        for n in (1, 2)
    ]
    x = torch.randn(5, 13, dtype=torch.float64)
    for name, a in zip("ab", made):
        dw.install(model, a, name=name, active=False)
    dw.install(model, dw.combine(made, [0.6, -0.4]), name="both", active=False)
    with dw.use(model, {"a": 0.6, "b": -0.4}):
        live = model(x)
    with dw.use(model, "both"):
        assert torch.allclose(model(x), live, rtol=1e-12, atol=1e-12)


def test_linear_is_pefts_linear():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 9))
    config = {"target_modules": ["0"], "lora_alpha": 5}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, **config), adapter_name="one")
    wrapped.add_adapter("two", peft.LoraConfig(r=3, **config))
    made = [adapter(n, keys=("0.weight",)) for n in (1, 2)]
    layer = wrapped.base_model.model[0]
    for name, a in zip(("one", "two"), made):
        layer.lora_A[name].weight.data = a.changes["0.weight"].tensors["A"].clone()
        layer.lora_B[name].weight.data = a.changes["0.weight"].tensors["B"].clone()
    wrapped.add_weighted_adapter(["one", "two"], [0.7, -0.3], "sum", combination_type="linear")
    ours = dw.combine(made, [0.7, -0.3], how="linear")
    assert torch.allclose(ours.changes["0.weight"].delta_weight(), layer.get_delta_weight("sum"), rtol=1e-4, atol=1e-5)


def test_a_square_weight_that_is_stored_transposed_is_not_added_to_its_copy():
    from transformers.pytorch_utils import Conv1D

    for make, added_up in ((Conv1D, False), (torch.nn.Linear, True)):
        torch.manual_seed(0)
        base, x = torch.nn.Sequential(make(8, 8)), torch.randn(3, 8)
        adapters, outputs = [], []
        for variant, target in ((dw.LoRA(rank=2), "0"), (dw.Diff(), "0.weight")):
            model = dw.attach(copy.deepcopy(base), variant, [target])
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter)
            adapters.append(dw.get(model))
            outputs.append(model(x))
        if added_up:
            got = dw.install(copy.deepcopy(base), dw.combine(adapters, [1.0, 1.0], how="svd", base=base))
            torch.testing.assert_close(got(x), sum(outputs) - base(x), rtol=1e-4, atol=1e-4)
            continue
        with pytest.raises(errors.ConfigError, match="not stored as an"):
            dw.combine(adapters, [1.0, 1.0], how="svd", base=base)
