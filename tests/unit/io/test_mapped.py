"""`load(mapped=True)`: an adapter that is the file's own pages computes as one that was read, and is checked as one."""

from __future__ import annotations

import gc
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deltaw as dw
from deltaw.errors import AdapterError, BaseMismatch, ConfigError
from deltaw.io import AdapterNotice
from deltaw.io.folder import WEIGHTS

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="looks into /proc")


def mappings_of(file: Path) -> list[range]:
    """Where this process has the file in its memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = [line.split(" ", 1)[0].split("-") for line in lines if line.endswith(str(file))]
    return [range(int(start, 16), int(end, 16)) for start, end in found]


def own(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the adapter brought."""
    base = dict(Net().named_parameters())
    return [p for name, p in model.named_parameters() if name not in base]


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.down(self.up(x).relu()))
        return out


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A DoRA of rank 8 with a head of two outputs, whose bias fills no line."""
    return trained(tmp_path / "one", 1)


def trained(folder: Path, seed: int) -> Path:
    model = dw.attach(Net(), dw.DoRA(rank=8), ["up", "down"], train=["head"])
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return dw.save(model, folder)


def output(folder: Path, *, mapped: bool) -> Tensor:
    model = dw.load(Net(), folder, mapped=mapped).eval()
    return model(torch.linspace(-1, 1, 160).view(5, 32)).detach()


def test_its_parameters_lie_in_the_file_and_compute_the_same(saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = dw.load(Net(), saved, mapped=True).eval()
    places = mappings_of(saved / WEIGHTS)
    assert places
    assert len(own(model)) >= 6
    assert all(any(p.data_ptr() in place for place in places) for p in own(model))
    x = torch.linspace(-1, 1, 160).view(5, 32)
    assert torch.equal(model(x), output(saved, mapped=False))
    dw.merge(model)
    torch.testing.assert_close(model(x), output(saved, mapped=False))  # W + ΔW is rounded to W's precision


def test_a_plain_load_maps_nothing(saved: Path) -> None:
    model = dw.load(Net(), saved)
    assert not mappings_of(saved / WEIGHTS)
    del model


def test_the_mapping_goes_with_the_adapter(saved: Path) -> None:
    model = dw.load(Net(), saved, mapped=True)
    assert mappings_of(saved / WEIGHTS)
    dw.detach(model)
    gc.collect()
    assert not mappings_of(saved / WEIGHTS)


def test_saving_over_the_folder_leaves_who_maps_it_as_he_was(saved: Path, tmp_path: Path) -> None:
    before = output(saved, mapped=False)
    model = dw.load(Net(), saved, mapped=True).eval()
    x = torch.linspace(-1, 1, 160).view(5, 32)
    dw.write(dw.read(trained(tmp_path / "other", 2)), saved)
    assert torch.equal(model(x), before)
    assert not torch.equal(output(saved, mapped=True), before)
    shutil.rmtree(saved)
    assert torch.equal(model(x), before)


def test_what_is_written_into_the_parameters_stays_in_the_process(saved: Path) -> None:
    content = (saved / WEIGHTS).read_bytes()
    model = dw.load(Net(), saved, mapped=True)
    with torch.no_grad():
        for parameter in own(model):
            parameter.zero_()
    assert (saved / WEIGHTS).read_bytes() == content


def test_another_precision_is_copied_and_said(saved: Path) -> None:
    with pytest.warns(AdapterNotice, match="mapped=True, but its tensors were copied"):
        dw.load(Net().double(), saved, mapped=True)
    assert not mappings_of(saved / WEIGHTS)


def test_it_is_for_folders_that_are_served(saved: Path) -> None:
    with pytest.raises(ConfigError, match="trainable=True"):
        dw.load(Net(), saved, mapped=True, trainable=True)
    with pytest.raises(ConfigError, match="in memory already"):
        dw.load(Net(), dw.read(saved), mapped=True)


def test_every_check_is_made(saved: Path) -> None:
    with pytest.raises(BaseMismatch):
        dw.load(Net(seed=5), saved, mapped=True)
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (saved / WEIGHTS).write_bytes(content)
    with pytest.raises(AdapterError, match=r"sha256|checksum"):
        dw.load(Net(), saved, mapped=True)
    (saved / WEIGHTS).write_bytes(content[:-9])
    with pytest.raises(AdapterError):
        dw.load(Net(), saved, mapped=True)
    (saved / WEIGHTS).write_bytes(b"")
    with pytest.raises(AdapterError):
        dw.load(Net(), saved, mapped=True)
    model = Net()
    with pytest.raises(AdapterError):
        dw.load(model, saved, mapped=True)
    gc.collect()
    assert not mappings_of(saved / WEIGHTS)
