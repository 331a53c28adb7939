"""Analyses against dense float64 computations, known answers and invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deltaw as dw
from deltaw import errors
from deltaw.analysis import intruders, overlap, subspace_similarity
from deltaw.analysis.directions import Place, place

KEY = "layers.0.q.weight"


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(seed, d, k):
    return torch.linalg.qr(randn(seed, d, k)).Q


def one(A, B, alpha=None, key=KEY):
    return dw.Adapter({key: dw.Change(dw.LoRA(rank=A.shape[0], alpha=alpha), {"A": A, "B": B}, "linear")})


def with_values(values, seed=0, out=20, columns=30, key=KEY):
    """An adapter whose ΔW has the given singular values (scale 2)."""
    S = torch.tensor(values, dtype=torch.float64)
    U, V = orthonormal(seed, out, len(values)), orthonormal(seed + 1, columns, len(values))
    return one(V.T * S[:, None] / 2, U, key=key), U, V


gauges = st.integers(0, 10**6).map(lambda s: randn(s, 4, 4) + 3 * torch.eye(4, dtype=torch.float64))


def regauged(adapter, M):
    change = adapter.changes[KEY]
    t = change.tensors
    return dw.Adapter({KEY: dw.Change(change.variant, {"A": M @ t["A"], "B": t["B"] @ M.inverse()}, "linear")})


class TestSpectrum:
    def test_known_values(self):
        a, _, _ = with_values([4.0, 2.0, 1.0])
        s = dw.spectrum(a)[KEY]
        assert s.values == pytest.approx((4, 2, 1))
        assert s.norm == pytest.approx(math.sqrt(21))
        assert s.stable_rank == pytest.approx(21 / 16)
        p = [4 / 7, 2 / 7, 1 / 7]
        assert s.effective_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
        assert [s.rank_for(e) for e in (0.5, 16 / 21 - 1e-9, 0.8, 0.96, 1.0)] == [1, 1, 2, 3, 3]
        assert s.shape == (20, 30)

    def test_what_cancels_is_no_change(self):
        A, B = randn(0, 4, 30).float(), randn(1, 20, 4).float()
        none = dw.spectrum(one(torch.cat([A, A]), torch.cat([B, -B], 1)))
        assert none.norm == 0
        assert none.advice().text == "nothing was changed: no advice"
        assert dw.spectrum(one(torch.cat([A, A]), torch.cat([B, -0.999 * B], 1)))[KEY].rank == 4

    def test_equal_values_count_fully(self):
        a, _, _ = with_values([3.0] * 5)
        s = dw.spectrum(a)[KEY]
        assert s.effective_rank == pytest.approx(5)
        assert s.stable_rank == pytest.approx(5)

    def test_equals_the_dense_decomposition(self):
        A, B = randn(1, 5, 40).float(), randn(2, 25, 5).float()
        s = dw.spectrum(one(A, B, alpha=3.0))[KEY]
        dense = torch.linalg.svdvals(0.6 * B.double() @ A.double())[:5]
        assert s.values == pytest.approx(dense.tolist(), rel=1e-10)

    def test_a_fresh_adapter_has_no_directions(self):
        spectra = dw.spectrum(one(randn(1, 4, 9).float(), torch.zeros(7, 4)))
        assert spectra[KEY].rank == 0
        assert spectra[KEY].effective_rank == 0
        assert spectra.shares() == {KEY: 0.0}
        assert "nothing was changed" in spectra.advice().text

    def test_rank_deficient_factors_show_their_true_rank(self):
        A = randn(1, 3, 12).float()
        a = one(torch.cat([A, A, 2 * A]), randn(2, 10, 9).float())
        assert dw.spectrum(a)[KEY].rank == 3
        assert dw.spectrum(a)[KEY].given == 9

    def test_shares_add_up_by_layer_and_kind(self):
        parts = {
            f"layers.{i}.{kind}.weight": with_values([float(v)], key="w")[0].changes["w"]
            for i, kind, v in ((0, "q", 1), (0, "v", 2), (1, "q", 2), (1, "v", 4))
        }
        spectra = dw.spectrum(dw.Adapter(parts))
        assert spectra.shares_by_layer() == pytest.approx({0: 5 / 25, 1: 20 / 25})
        assert spectra.shares_by_kind() == pytest.approx({"q": 5 / 25, "v": 20 / 25})
        assert spectra.norm == pytest.approx(5)

    def test_advice(self):
        low, _, _ = with_values([10.0, 1.0, 0.1, 0.1])
        advice = dw.spectrum(low).advice(0.95)
        assert (advice.needed, advice.suggested, advice.given) == (1, 2, 4)
        assert advice.text == "energy 95% at rank 1: train with 2 instead of 4"
        full, _, _ = with_values([1.0, 1.0])
        assert dw.spectrum(full).advice(0.95).suggested == 4
        assert "fills the rank" in dw.spectrum(full).advice(0.95).text
        with pytest.raises(errors.ConfigError, match="share in"):
            dw.spectrum(full).advice(95)

    def test_copies_are_left_out_with_the_reason_unless_there_is_a_base(self):
        W, V = randn(1, 4, 6), randn(2, 4, 6)
        a = dw.Adapter(
            {"head.weight": dw.Change(dw.Full(), {"value": V}), "head.bias": dw.Change(dw.Full(), {"value": V[0]})}
        )
        assert "trained copy" in dw.spectrum(a).skipped["head.weight"]
        found = dw.spectrum(a, base={"head.weight": W, "head.bias": W[0]})
        assert found["head.weight"].values == pytest.approx(torch.linalg.svdvals(V - W).tolist())
        assert "only matrices" in found.skipped["head.bias"]

    def test_dora_is_analysed_by_its_true_change(self):
        W, A, B, m = randn(1, 20, 30), randn(2, 3, 30), randn(3, 20, 3), 1 + randn(4, 20).abs()
        a = dw.Adapter({KEY: dw.Change(dw.DoRA(rank=3, alpha=3), {"A": A, "B": B, "m": m})})
        with pytest.raises(errors.ConfigError, match="depends on the base weight"):
            dw.spectrum(a)
        changed = W + B @ A
        exact = m[:, None] * changed / changed.norm(dim=1, keepdim=True) - W
        assert dw.spectrum(a, base={KEY: W})[KEY].values == pytest.approx(torch.linalg.svdvals(exact).tolist())
        found = dw.amplification(a, {KEY: W}, rank=2)[KEY]
        U, _, Vh = torch.linalg.svd(exact)
        assert found.along_change == pytest.approx(float((U[:, :2].T @ W @ Vh[:2].T).norm()))

    def test_every_expert_of_a_stack_has_its_own(self):
        A, B, W = randn(1, 3, 2, 8), randn(2, 3, 6, 2), randn(3, 3, 6, 8)
        a = dw.Adapter({"layers.0.experts": dw.Change(dw.LoRA(rank=2, alpha=2), {"A": A, "B": B})})
        found = dw.spectrum(a)
        assert list(found) == [f"layers.0.experts#{e}" for e in range(3)]
        assert found["layers.0.experts#1"].values == pytest.approx(torch.linalg.svdvals(B[1] @ A[1])[:2].tolist())
        assert dw.amplification(a, {"layers.0.experts": W})["layers.0.experts#2"].weight == pytest.approx(
            float(W[2].norm())
        )

    def test_prints(self):
        text = str(dw.spectrum(with_values([4.0, 2.0])[0]))
        assert KEY in text
        assert "try 4" in text


class TestSimilarity:
    @given(gauges)
    @settings(max_examples=15, deadline=None)
    def test_of_a_change_with_itself_is_one_whatever_the_gauge(self, M):
        a = one(randn(1, 4, 30), randn(2, 20, 4))
        for side in ("in", "out"):
            phi = dw.similarity(a, regauged(a, M), side=side)[KEY].phi
            assert torch.allclose(phi.diagonal(), torch.ones(4, dtype=torch.float64), atol=1e-8)

    def test_of_the_factors_does_depend_on_the_gauge(self):
        a = one(randn(1, 4, 30), randn(2, 20, 4))
        stretched = regauged(a, torch.diag(torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)))
        phi = dw.similarity(a, stretched, of="factors")[KEY].phi
        assert float(phi[0, 0]) < 0.9
        assert float(phi[-1, -1]) == pytest.approx(1)

    def test_is_the_papers_formula(self):
        a, b = one(randn(1, 3, 30), randn(2, 20, 3)), one(randn(3, 5, 30), randn(4, 20, 5))
        s = dw.similarity(a, b)[KEY]
        V1 = torch.linalg.svd(randn(2, 20, 3) @ randn(1, 3, 30))[2][:3].T
        V2 = torch.linalg.svd(randn(4, 20, 5) @ randn(3, 5, 30))[2][:5].T
        assert s.phi.shape == (3, 5)
        for i in range(1, 4):
            for j in range(1, 6):
                expected = float(torch.linalg.matrix_norm(V1[:, :i].T @ V2[:, :j]) ** 2) / min(i, j)
                assert s.at(i, j) == pytest.approx(expected)

    def test_factors_are_those_of_figure_three(self):
        A1, A2 = randn(1, 3, 30), randn(3, 5, 30)
        s = dw.similarity(one(A1, randn(2, 20, 3)), one(A2, randn(4, 20, 5)), of="factors")[KEY]
        V1, V2 = (torch.linalg.svd(A, full_matrices=False)[2].T for A in (A1, A2))
        assert s.at(2, 4) == pytest.approx(float((V1[:, :2].T @ V2[:, :4]).square().sum()) / 2)

    def test_of_random_spans_is_near_the_baseline(self):
        d, pairs = 200, 60
        found = [subspace_similarity(orthonormal(2 * n, d, 3), orthonormal(2 * n + 1, d, 8)) for n in range(pairs)]
        mean = torch.stack([s.phi for s in found]).mean(0)
        baseline = found[0].baseline
        assert float(baseline[2, 7]) == pytest.approx(8 / 200)
        # The squared cosine of two random unit vectors has a standard deviation of about √2/d.
        assert torch.allclose(mean[0, 0], baseline[0, 0], atol=5 * math.sqrt(2) / d / math.sqrt(pairs))
        assert float((mean - baseline).abs().max()) < 5 * math.sqrt(2) / d / math.sqrt(pairs)
        assert abs(found[0].above_random) < 0.1

    def test_orthogonal_and_nested_spans(self):
        Q = orthonormal(0, 12, 6)
        assert float(subspace_similarity(Q[:, :3], Q[:, 3:]).phi.abs().max()) < 1e-20
        nested = subspace_similarity(Q[:, :2], Q)
        assert nested.at(2, 6) == pytest.approx(1)
        assert nested.above_random == pytest.approx(1)

    def test_says_what_it_left_out(self):
        a = one(randn(1, 3, 9), randn(2, 8, 3))
        b = dw.Adapter({**a.changes, "other.weight": a.changes[KEY]})
        assert dw.similarity(a, b).skipped == {"other.weight": "changed by one of the two only"}
        fresh = one(randn(1, 3, 9), torch.zeros(8, 3).double())
        assert "does not change" in dw.similarity(a, fresh).skipped[KEY]

    def test_refusals(self):
        a = one(randn(1, 3, 9), randn(2, 8, 3))
        with pytest.raises(errors.ConfigError, match="no weight in common"):
            dw.similarity(a, one(randn(1, 3, 9), randn(2, 8, 3), key="z.weight"))
        with pytest.raises(errors.AdapterError, match="9 dimensions in one adapter, 10"):
            dw.similarity(a, one(randn(1, 3, 10), randn(2, 8, 3)))
        with pytest.raises(errors.ConfigError, match="side='left'"):
            dw.similarity(a, a, side="left")


class TestAmplification:
    @given(gauges)
    @settings(max_examples=15, deadline=None)
    def test_is_the_same_in_every_gauge(self, M):
        a, base = one(randn(1, 4, 30), randn(2, 20, 4)), {KEY: randn(3, 20, 30)}
        x, y = dw.amplification(a, base)[KEY], dw.amplification(regauged(a, M), base)[KEY]
        assert x.factor == pytest.approx(y.factor, rel=1e-8)
        assert x.along_change == pytest.approx(y.along_change, rel=1e-8)

    def test_equals_the_dense_computation(self):
        A, B, W = randn(1, 4, 30), randn(2, 20, 4), randn(3, 20, 30)
        x = dw.amplification(one(A, B), {KEY: W}, rank=2)[KEY]
        U, S, Vh = torch.linalg.svd(2 * B @ A)
        assert x.change == pytest.approx(float(S[:2].norm()))
        assert x.along_change == pytest.approx(float((U[:, :2].T @ W @ Vh[:2].T).norm()))
        assert x.along_weight == pytest.approx(float(torch.linalg.svdvals(W)[:2].norm()))
        assert x.factor == pytest.approx(x.change / x.along_change)

    def test_of_ws_own_top_directions_and_of_unused_ones(self):
        U, V = orthonormal(1, 20, 20), orthonormal(2, 20, 20)
        W = U[:, :10] * torch.arange(10, 0, -1).double() @ V[:, :10].T
        top = one(V[:, :2].T, U[:, :2] / 2)
        x = dw.amplification(top, {KEY: W})[KEY]
        assert x.along_change == pytest.approx(x.along_weight)
        assert x.emphasis == pytest.approx(1)
        assert x.factor == pytest.approx(math.sqrt(2) / math.sqrt(181))
        unused = dw.amplification(one(V[:, 12:14].T, U[:, 12:14]), {KEY: W})[KEY]
        assert unused.along_change < 1e-12

    def test_random_directions_are_the_mean_of_many(self):
        W, r = randn(3, 20, 30), 3
        drawn = [
            float((orthonormal(2 * n, 20, r).T @ W @ orthonormal(2 * n + 1, 30, r)).square().sum()) for n in range(400)
        ]
        x = dw.amplification(one(randn(1, r, 30), randn(2, 20, r)), {KEY: W})[KEY]
        spread = (sum((d - sum(drawn) / 400) ** 2 for d in drawn) / 400) ** 0.5
        assert x.along_random**2 == pytest.approx(sum(drawn) / 400, abs=4 * spread / 20)

    def test_a_model_serves_as_base_adapted_or_not(self):
        model = torch.nn.Sequential(torch.nn.Linear(30, 20))
        plain = dw.amplification(one(randn(1, 4, 30), randn(2, 20, 4), key="0.weight"), model)["0.weight"]
        dw.attach(model, dw.LoRA(rank=2), targets=["0"])
        adapted = dw.amplification(one(randn(1, 4, 30), randn(2, 20, 4), key="0.weight"), model)["0.weight"]
        assert plain == adapted
        assert plain.weight == pytest.approx(float(model[0].weight.detach().double().norm()))


class TestOverlapAndIntruders:
    def test_overlap_sees_what_the_change_shares_with_w(self):
        U, V = orthonormal(1, 20, 20), orthonormal(2, 25, 20)
        W = U * torch.arange(20, 0, -1).double() @ V.T
        shared = overlap(one(V[:, :2].T, U[:, 5:7]), {KEY: W}, top=4)[KEY]
        assert shared.at(2, 2) == pytest.approx(1)
        out = overlap(one(V[:, :2].T, U[:, 5:7]), {KEY: W}, top=4, side="out")[KEY]
        assert out.at(2, 4) == pytest.approx(0, abs=1e-20)

    def test_a_large_foreign_direction_intrudes_and_a_familiar_one_does_not(self):
        U, V = orthonormal(1, 40, 40), orthonormal(2, 40, 40)
        W = U * torch.linspace(3, 1, 40).double() @ V.T
        stranger = U.sum(1, keepdim=True) / math.sqrt(40)  # as far from every direction of W as can be
        foreign = intruders(one(V[:, :1].T, 10 * stranger), {KEY: W}, top=5)[KEY]
        assert foreign.count == 1
        assert foreign.cosines[0] < 0.5
        familiar = intruders(one(V[:, :1].T, 10 * U[:, :1]), {KEY: W}, top=5)[KEY]
        assert familiar.count == 0
        assert min(familiar.cosines) == pytest.approx(1)


def test_places():
    assert place("model.layers.3.self_attn.q_proj.weight") == Place(3, "self_attn.q_proj")
    assert place("classifier.weight") == Place(None, "classifier")
    assert place("h.11.attn.c_attn.bias") == Place(11, "attn.c_attn.bias")
    assert place("0.weight") == Place(0, "weight")


@pytest.mark.parametrize("top", [0, -1, 1.5, True])
def test_a_bad_number_of_directions_is_refused(top):
    a = one(randn(1, 4, 30), randn(2, 20, 4))
    with pytest.raises(errors.ConfigError, match=r"top=.*: must be a whole number of at least 1"):
        dw.similarity(a, a, top=top)


def test_the_mean_similarity_is_over_the_weights_that_have_so_many_directions():
    small, large = "layers.0.head.weight", "layers.0.q.weight"
    parts = [
        {
            large: one(randn(n, 4, 30), randn(n + 9, 20, 4)).changes[KEY],
            small: one(randn(n, 2, 30), randn(n, 6, 2)).changes[KEY],
        }
        for n in (1, 2)
    ]
    found = dw.similarity(*(dw.Adapter(p) for p in parts))
    phi, baseline = found.mean()
    assert phi.shape == (4, 4)
    assert float(phi[3, 3]) == pytest.approx(found[large].at(4, 4))
    assert float(phi[1, 0]) == pytest.approx((found[large].at(2, 1) + found[small].at(2, 1)) / 2)
    assert float(baseline[3, 3]) == pytest.approx(4 / 30)
