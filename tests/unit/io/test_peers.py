"""Our exports in diffusers itself, really run where it is installed, and what it saves, read here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw as dw
from deltaw.io.convert import convert, read_any
from deltaw.io.formats import Hints
from deltaw.io.model_files import stored_shapes
from tests.unit.io.adapter_folders import shaken


def unet() -> Any:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()


def image(model: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        found: Tensor = model(torch.randn(2, 4, 8, 8, generator=draw), 7, torch.randn(2, 5, 8, generator=draw)).sample
    return found


VARIANTS = {
    "one rank": {"to_q|to_v": dw.LoRA(rank=4, alpha=2)},
    "ranks and alphas": {"to_q": dw.LoRA(rank=2, alpha=6), "to_v": dw.LoRA(rank=3, alpha=1), "conv1": dw.LoRA(rank=2)},
    "dora": {"to_q|to_k": dw.DoRA(rank=2, alpha=4)},
}


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_diffusers_reads_our_exports(tmp_path: Path, to: str, kind: str) -> None:
    if to == "kohya" and kind == "dora":
        pytest.skip("diffusers reads no DoRA out of kohya's files of this kind")
    model = unet()
    plain, hints = image(model), Hints(component="unet", shapes=stored_shapes(model))
    dw.attach(model, VARIANTS[kind])
    expected, made = image(shaken(model)), dw.get(model)
    # diffusers 0.42 looks for mixed alphas of kohya's files under old names, and applies one to all: one_rank is the cure
    convert(made, to, tmp_path / "a.safetensors", hints, one_rank=to == "kohya" and kind == "ranks and alphas")

    import diffusers

    pipeline = diffusers.StableDiffusionPipeline
    loaded, theirs = (
        pipeline.lora_state_dict(tmp_path / "a.safetensors", unet_config=unet().config, return_lora_metadata=True),
        unet(),
    )
    state, alphas, metadata = loaded
    pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=theirs, adapter_name="a", metadata=metadata)
    found = image(theirs)
    assert float((expected - plain).abs().max()) > 1e-2
    assert torch.allclose(found, expected, atol=2e-5, rtol=1e-4), float((found - expected).abs().max())


@pytest.mark.parametrize("dora", [False, True])
def test_we_read_what_diffusers_saves(tmp_path: Path, dora: bool) -> None:
    theirs = unet()
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["to_q", "to_out.0", "conv2"],
        rank_pattern={"conv2": 2},
        alpha_pattern={"to_q": 7},
        use_dora=dora,
        init_lora_weights=False,
    )
    theirs.add_adapter(config, "a")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    theirs.eval()
    expected = image(theirs)
    theirs.save_lora_adapter(tmp_path, adapter_name="a", weight_name="a.safetensors")
    ours = unet()
    adapter = read_any(tmp_path / "a.safetensors", Hints(shapes=stored_shapes(ours)), kind="diffusers")
    dw.load(ours, adapter)
    assert torch.allclose(image(ours), expected, atol=2e-5, rtol=1e-4)
