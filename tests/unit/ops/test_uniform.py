"""Random numbers drawn by the compiled function are torch's own, to the bit, and so is what is drawn next."""

import math

import pytest
import torch

from deltaw.ops import compiled, uniform

here = pytest.mark.skipif(isinstance(compiled.library(), str), reason=f"nothing compiled here: {compiled.library()}")


@here
@pytest.mark.parametrize("drawn_before", [0, 1, 623, 624, 625, 3001])
@pytest.mark.parametrize("shape", [(256,), (623,), (8, 78), (25, 25), (2, 8, 1024), (1249,), (100_001,)])
def test_the_numbers_are_torchs(drawn_before: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniform, "WORTH", 1)
    bound = 1 / math.sqrt(shape[-1])
    found = []
    for draw in (uniform.uniform_, torch.Tensor.uniform_):
        torch.manual_seed(drawn_before)
        torch.rand(drawn_before)
        torch.randn(3)  # leaves one normal number over
        drawn = draw(torch.empty(shape), -bound, 2 * bound)
        found.append((drawn, torch.randn(3), torch.rand(700), torch.get_rng_state()))
    for ours, torchs in zip(*found):
        assert torch.equal(ours, torchs)
    assert found[0][0].min() < -0.9 * bound
    assert found[0][0].max() > 1.8 * bound


@here
def test_it_is_compiled_code_that_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    assert uniform.agrees()
    calls = []
    filled = uniform.filled
    monkeypatch.setattr(uniform, "filled", lambda *given: calls.append(filled(*given)))
    t = torch.empty(3, 700)
    version = t._version
    assert uniform.uniform_(t, 0.0, 1.0) is t
    assert len(calls) == 1
    assert t._version > version  # what was saved of it for a backward is known to be gone


@pytest.mark.parametrize(
    "t",
    [
        torch.empty(2047),
        torch.empty(0),
        torch.empty(3000, dtype=torch.float64),
        torch.empty(3000, dtype=torch.bfloat16),
        torch.empty(60, 40).t(),
        torch.empty(60, 80)[:, ::2],
    ],
    ids=["short", "empty", "float64", "bfloat16", "turned", "gaps"],
)
def test_what_is_left_to_torch(t: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniform, "filled", None)
    torch.manual_seed(0)
    ours = uniform.uniform_(t, -1.0, 1.0).clone()
    torch.manual_seed(0)
    assert torch.equal(ours, t.uniform_(-1.0, 1.0))


@here
def test_a_torch_that_draws_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose generator keeps its state elsewhere, or that rounds at other places: the comparison at the first use says so."""
    drawn = uniform.filled

    def rounded_twice(t: torch.Tensor, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
        span = torch.tensor(high) - torch.tensor(low)
        return drawn(t, 0.0, 1.0, generator).mul_(span).add_(torch.tensor(low))

    assert uniform.agrees.__wrapped__()
    monkeypatch.setattr(uniform, "filled", rounded_twice)
    assert not uniform.agrees.__wrapped__()
    monkeypatch.setattr(uniform, "filled", lambda t, low, high, g: (drawn(t, low, high, g), g.manual_seed(1))[0])
    assert not uniform.agrees.__wrapped__()
    monkeypatch.setattr(uniform, "library", lambda: "not here")
    assert not uniform.agrees.__wrapped__()
