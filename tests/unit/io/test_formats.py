"""Converters: round trips through every format, and what each file means, checked against its own definition."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltaw as dw
from deltaw.errors import AdapterError
from deltaw.io import digest
from deltaw.io.convert import convert, read_any
from deltaw.io.formats import Hints, formats
from deltaw.io.model_files import stored_shapes
from tests.unit.io.adapter_folders import shaken


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8, bias=False)
        self.k_proj = nn.Linear(8, 4)
        self.conv = nn.Conv2d(2, 4, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(2)])


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adapter(variant: Any, targets: list[str]) -> dw.Adapter:
    model = net()
    dw.attach(model, variant, targets)
    return dw.get(shaken(model))


def same_change(one: dw.Adapter, other: dw.Adapter, tolerance: float = 0.0) -> None:
    """The same ΔW of the same parameters."""
    assert set(one.changes) == set(other.changes)
    weights = dict(net().named_parameters())
    for key, change in one.changes.items():
        W = weights[key].detach().double()
        matrix = W.flatten(1) if W.ndim > 1 and len(change.matrix_shape) == 2 else W
        a = change.delta_weight(matrix).double().flatten()
        b = other.changes[key].delta_weight(matrix).double().flatten()
        assert (a - b).abs().max() <= tolerance * a.abs().max()


LINEAR = ["q_proj", "k_proj"]
CAN = {
    "kohya": [
        (dw.LoRA(rank=3, alpha=5), [*LINEAR, "conv"]),
        (dw.DoRA(rank=2), [*LINEAR, "conv"]),
        (dw.LoRA(rank=4, alpha=3, scaling="alpha/sqrt(rank)"), LINEAR),
        ("loha", LINEAR),
        ("lokr", LINEAR),
        ("diff", LINEAR),
    ],
    "diffusers": [(dw.LoRA(rank=3, alpha=5), [*LINEAR, "conv"]), (dw.DoRA(rank=2), LINEAR)],
    "loralib": [(dw.LoRA(rank=3, alpha=5), LINEAR)],
    "mlx": [(dw.LoRA(rank=3, alpha=5), LINEAR), (dw.DoRA(rank=2), LINEAR)],
    "safetensors": [
        (dw.LoRA(rank=3, alpha=0.3, scaling="alpha", dropout=0.1), LINEAR),
        ("vera", LINEAR),
        ("ia3", LINEAR),
    ],
    "peft": [(dw.LoRA(rank=3, alpha=5), [*LINEAR, "conv"]), ("loha", LINEAR)],
}


def variant_of(value: Any) -> Any:
    from deltaw.core.registry import variants

    return variants[value]() if isinstance(value, str) else value


@pytest.mark.parametrize(("to", "value", "targets"), [(f, v, t) for f, cases in CAN.items() for v, t in cases])
def test_round_trip(tmp_path: Path, to: str, value: Any, targets: list[str]) -> None:
    made = adapter(variant_of(value), targets)
    out = tmp_path / ("a" + ("" if to == "peft" else formats()[to].suffix))
    convert(made, to, out)
    back = read_any(out)
    exact = to in ("safetensors", "peft")
    same_change(made, back, 0.0 if exact else 1e-7)
    if exact:
        assert digest(back) == digest(made)
    assert set(back.tensors()) == set(made.tensors())
    # flattened names also come back from the base's names alone
    if to == "kohya":
        tensors = load_file(out)
        save_file(tensors, tmp_path / "foreign.safetensors")
        with pytest.raises(AdapterError, match="give the base"):
            read_any(tmp_path / "foreign.safetensors")
        same_change(made, read_any(tmp_path / "foreign.safetensors", Hints(shapes=stored_shapes(net()))), 1e-7)


def test_kohya_means_what_it_says(tmp_path: Path) -> None:
    down, up = torch.randn(2, 8), torch.randn(4, 2)
    flat = "lora_unet_layers_1_k_proj"
    tensors = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    hints = Hints(shapes=stored_shapes(net()))
    found = read_any(tmp_path / "a.safetensors", hints).changes["layers.1.k_proj.weight"]
    assert torch.allclose(found.delta_weight(), up @ down / 2)
    del tensors[f"{flat}.alpha"]  # then alpha is the rank
    save_file(tensors, tmp_path / "b.safetensors")
    found = read_any(tmp_path / "b.safetensors", hints).changes["layers.1.k_proj.weight"]
    assert torch.allclose(found.delta_weight(), up @ down)


def test_tucker_convolution_of_lycoris(tmp_path: Path) -> None:
    down, up, mid = torch.randn(2, 2, 1, 1), torch.randn(4, 2, 1, 1), torch.randn(2, 2, 3, 3)
    flat = "lora_unet_layers_0_conv"
    save_file(
        {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.lora_mid.weight": mid},
        tmp_path / "a.safetensors",
    )
    found = read_any(tmp_path / "a.safetensors", Hints(shapes=stored_shapes(net()))).changes["layers.0.conv.weight"]
    expected = torch.einsum("mnwh,im,nj->ijwh", mid, up[:, :, 0, 0], down[:, :, 0, 0])
    assert torch.allclose(found.delta_weight().reshape(4, 2, 3, 3), expected, atol=1e-5)


def test_loralib_needs_alpha_and_knows_merged_linear(tmp_path: Path) -> None:
    # as loralib's MergedLinear: 12 outputs in three parts, q and v adapted
    A, B = torch.randn(4, 8), torch.randn(8, 2)
    save_file({"attn.lora_A": A, "attn.lora_B": B}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="alpha"):
        read_any(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="enabled"):
        read_any(tmp_path / "a.safetensors", Hints(alpha=6))
    found = read_any(tmp_path / "a.safetensors", Hints(alpha=6, enabled=(True, False, True))).changes["attn.weight"]
    grouped = torch.nn.functional.conv1d(A[None], B[..., None], groups=2)[0]  # loralib's own formula
    expected = torch.zeros(12, 8)
    expected[:4], expected[8:] = grouped[:4] * 3, grouped[4:] * 3
    assert torch.allclose(found.delta_weight(), expected, atol=1e-5)


def test_loralib_merged_linear_with_one_part_and_a_linear_beside_it(tmp_path: Path) -> None:
    A, B = torch.randn(2, 8), torch.randn(4, 2)
    save_file(
        {f"{m}.lora_{n}": t.clone() for m in ("attn", "out") for n, t in (("A", A), ("B", B))},
        tmp_path / "a.safetensors",
    )
    shapes = {"attn.weight": (12, 8), "out.weight": (4, 8)}
    for known in (shapes, None):
        hints = Hints(alpha=6, enabled=(False, True, False), shapes=known)
        found = {k: c.delta_weight() for k, c in read_any(tmp_path / "a.safetensors", hints).changes.items()}
        expected = torch.zeros(12, 8)
        expected[4:8] = 3 * B @ A
        assert torch.allclose(found["attn.weight"], expected, atol=1e-5)
        assert torch.allclose(found["out.weight"], expected if known is None else 3 * B @ A, atol=1e-5)
    two = read_any(tmp_path / "a.safetensors", Hints(alpha=6, enabled=(True, False, True)))
    assert all(c.matrix_shape == (4, 8) for c in two.changes.values())


def test_loralib_convolution(tmp_path: Path) -> None:
    A, B = torch.randn(2 * 3, 2 * 3), torch.randn(4 * 3, 2 * 3)
    save_file({"layers.0.conv.lora_A": A, "layers.0.conv.lora_B": B}, tmp_path / "a.safetensors")
    hints = Hints(alpha=4, shapes=stored_shapes(net()))
    found = read_any(tmp_path / "a.safetensors", hints).changes["layers.0.conv.weight"]
    assert torch.allclose(found.delta_weight(), (B @ A).view(4, 2, 3, 3) * 2, atol=1e-5)


def test_mlx_layout(tmp_path: Path) -> None:
    made = adapter(dw.LoRA(rank=2, alpha=6), ["q_proj"])
    convert(made, "mlx", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "rank": 2,
        "scale": 3.0,
        "dropout": 0.0,
        "keys": ["layers.0.q_proj", "layers.1.q_proj"],
    }
    a, b = (load_file(tmp_path / "a" / "adapters.safetensors")[f"layers.0.q_proj.lora_{n}"] for n in "ab")
    assert (a.shape, b.shape) == ((8, 2), (2, 8))
    assert torch.allclose(3 * (a @ b).T, made.changes["layers.0.q_proj.weight"].delta_weight())


def test_diffusers_without_a_config_has_scale_one(tmp_path: Path) -> None:
    A, B = torch.randn(2, 8), torch.randn(8, 2)
    for suffix in (("lora_A.weight", "lora_B.weight"), ("lora.down.weight", "lora.up.weight")):
        save_file({f"unet.x.{suffix[0]}": A, f"unet.x.{suffix[1]}": B}, tmp_path / "a.safetensors")
        assert torch.allclose(read_any(tmp_path / "a.safetensors").changes["x.weight"].delta_weight(), B @ A)
    save_file({"unet.x.lora_A.weight": A, "text_encoder.x.lora_A.weight": A.clone()}, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="--component"):
        read_any(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("to", "value", "message"),
    [
        ("kohya", "vera", "vera"),
        ("kohya", "full", "full"),
        ("diffusers", "loha", "loha"),
        ("loralib", dw.DoRA(rank=2), "dora"),
        ("gguf", dw.DoRA(rank=2), "dora"),
        ("peft", "mixed", "both"),
        ("mlx", "mixed ranks", "one rank and one scale"),
    ],
)
def test_what_a_format_cannot_say_is_refused(tmp_path: Path, to: str, value: Any, message: str) -> None:
    if value == "mixed":
        made = adapter({"q_proj": dw.LoRA(rank=2), "k_proj": dw.DoRA(rank=2)}, None)  # type: ignore[arg-type]
    elif value == "mixed ranks":
        made = adapter({"q_proj": dw.LoRA(rank=2), "k_proj": dw.LoRA(rank=4)}, None)  # type: ignore[arg-type]
    else:
        made = adapter(variant_of(value), LINEAR)
    out = tmp_path / ("a" + ("" if to == "peft" else formats()[to].suffix))
    with pytest.raises(AdapterError, match=message):
        convert(made, to, out)
    assert list(tmp_path.iterdir()) == []


def test_one_rank_for_servers(tmp_path: Path) -> None:
    made = adapter(
        {"q_proj": dw.LoRA(rank=2, alpha=5), "k_proj": dw.LoRA(rank=4, alpha=3, scaling="alpha/sqrt(rank)")}, None
    )  # type: ignore[arg-type]
    convert(made, "peft", tmp_path / "a", reader="vllm")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert not {"rank_pattern", "alpha_pattern", "use_rslora"} & set(config)
    same_change(made, read_any(tmp_path / "a"), 1e-6)
    with pytest.raises(AdapterError, match="DoRA"):
        convert(adapter(dw.DoRA(rank=2), LINEAR), "peft", tmp_path / "b", reader="vllm", one_rank=False)


def test_approximation_states_its_error(tmp_path: Path) -> None:
    model = net()
    made = adapter(dw.DoRA(rank=2), LINEAR)
    written = convert(made, "mlx", tmp_path / "a", rank=8, base=model, one_rank=True)
    assert max(written.error.values()) < 1e-6  # rank 8 is all there is
    same_change(made, read_any(tmp_path / "a"), 1e-5)
    coarse = convert(made, "peft", tmp_path / "b", rank=3, base=model)
    for key, error in coarse.error.items():
        W = dict(model.named_parameters())[key].detach().double()
        exact, near = made.changes[key].delta_weight(W), coarse.changes[key].delta_weight().double()
        assert float((exact - near).norm() / exact.norm()) == pytest.approx(error, rel=1e-3, abs=1e-6)


LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def test_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = llama()
    hints = Hints(base=LLAMA, shapes=stored_shapes(model))
    dw.attach(model, {"q_proj": dw.LoRA(rank=2, alpha=3), "k_proj|down_proj": dw.LoRA(rank=4, alpha=1)})
    made = dw.get(shaken(model))
    convert(made, "gguf", tmp_path / "a.gguf", hints)

    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    facts = {k: reader.fields[k].contents() for k in reader.fields}
    assert (facts["general.type"], facts["adapter.type"], facts["general.architecture"]) == ("adapter", "lora", "llama")
    tensors = {t.name: torch.tensor(t.data) for t in reader.tensors}
    alpha = facts["adapter.lora.alpha"]
    for n in range(2):
        for ours, theirs, heads in (
            ("self_attn.q_proj", "attn_q", 4),
            ("self_attn.k_proj", "attn_k", 2),
            ("mlp.down_proj", "ffn_down", 0),
        ):
            a, b = (tensors[f"blk.{n}.{theirs}.weight.lora_{x}"] for x in "ab")
            delta = alpha / b.shape[1] * (b @ a)  # llama.cpp's rule
            exact = made.changes[f"model.layers.{n}.{ours}.weight"].delta_weight()
            if heads:  # llama.cpp's order of rows: of each head, the two halves interleaved
                exact = exact.reshape(heads, 2, -1, 16).swapaxes(1, 2).reshape(exact.shape)
            assert torch.allclose(delta, exact, atol=1e-5)
    for given in (hints, Hints()):  # with the base, and by the names that our files keep
        back = read_any(tmp_path / "a.gguf", given)
        for key, change in made.changes.items():
            assert torch.allclose(back.changes[key].delta_weight(), change.delta_weight(), atol=1e-5)
    with pytest.raises(AdapterError, match="give the base"):
        convert(made, "gguf", tmp_path / "b.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("to", ["kohya", "diffusers", "loralib", "safetensors", "mlx"])
def test_damaged_files_are_refused(tmp_path: Path, to: str) -> None:
    out = tmp_path / ("a" + formats()[to].suffix)
    convert(adapter(dw.LoRA(rank=2), LINEAR), to, out)
    file = out if out.is_file() else out / "adapters.safetensors"
    whole = file.read_bytes()
    for cut in range(0, len(whole), 37):
        file.write_bytes(whole[:cut])
        with pytest.raises(AdapterError):
            read_any(out, kind=to)
    tensors = load_file_bytes(whole, tmp_path)
    name = sorted(tensors)[0]
    save_file({k: t for k, t in tensors.items() if k != name}, file)
    with pytest.raises(AdapterError):
        read_any(out, Hints(alpha=1), kind=to)


def load_file_bytes(raw: bytes, folder: Path) -> dict[str, Tensor]:
    (folder / "whole.safetensors").write_bytes(raw)
    return load_file(folder / "whole.safetensors")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="pickle"):
        read_any(tmp_path / "a.pt", kind="loralib")
    with pytest.raises(AdapterError, match=re.escape("--from")):
        read_any(tmp_path / "a.pt")
