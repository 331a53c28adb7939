"""Damaged, foreign and hostile folders: none gets in, and the model is what it was."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import deltaw as dw
from deltaw.errors import AdapterError, BaseMismatch, DeltawError
from deltaw.io import folder as folders_of
from deltaw.io.admission import MUCH, admit
from deltaw.io.folder import CONFIG, MANIFEST, WEIGHTS, Opened
from tests.unit.io.adapter_folders import KINDS, bits, make, net, parts, put, shaken

SEALED = KINDS[:2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {kind: make(kind, root / kind.replace(" ", "-")) for kind in KINDS}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[request.param], tmp_path / "a"))


def refused(model: torch.nn.Module, folder: Path) -> bool:
    """Whether load refuses, with an error of ours and the model untouched."""
    before = bits(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dw.load(model, folder)
    except DeltawError:
        assert bits(model) == before
        return True
    dw.detach(model)
    assert bits(model) == before
    return False


def test_sound_folders_are_admitted(folder: Path) -> None:
    assert not refused(net(), folder)


def test_truncated_anywhere(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = [*range(header + 1), *random.Random(0).sample(range(header + 1, len(whole)), 100)]
    for cut in cuts:
        (folder / WEIGHTS).write_bytes(whole[:cut])
        with pytest.raises(AdapterError):
            admit(folder)
    config = (folder / CONFIG).read_bytes()
    (folder / WEIGHTS).write_bytes(whole)
    for cut in range(len(config.rstrip())):
        (folder / CONFIG).write_bytes(config[:cut])
        with pytest.raises(AdapterError):
            admit(folder)


def flip(folder: Path, rng: random.Random, names: list[str]) -> tuple[Path, bytes]:
    sizes = [(folder / n).stat().st_size for n in names]
    file = folder / rng.choices(names, sizes)[0]
    whole = file.read_bytes()
    at = rng.randrange(len(whole) * 8)
    damaged = bytearray(whole)
    damaged[at // 8] ^= 1 << at % 8
    file.write_bytes(damaged)
    return file, whole


def count_accepted_flips(folder: Path, count: int) -> int:
    rng = random.Random(1)
    names = [n for n in (CONFIG, WEIGHTS, MANIFEST) if (folder / n).exists()]
    accepted = 0
    for i in range(count):
        file, whole = flip(folder, rng, [names[i % len(names)]])
        try:
            admit(folder)
            accepted += 1
        except DeltawError:
            pass
        file.write_bytes(whole)
    return accepted


@pytest.mark.parametrize("kind", SEALED)
def test_no_flipped_bit_is_accepted(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    assert count_accepted_flips(Path(shutil.copytree(folders[kind], tmp_path / "a")), 400) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEALED)
def test_no_flipped_bit_is_accepted_of_ten_thousand(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    assert count_accepted_flips(Path(shutil.copytree(folders[kind], tmp_path / "a")), 10_000) == 0


@pytest.mark.parametrize("rank", [1, 200], ids=["small", "hashed in a thread of its own"])
@pytest.mark.parametrize("damage", [b"\x00\x00\xc0\x7f", b"\x00\x00\x00\x00"], ids=["NaN", "zero"])
def test_damage_is_called_damage_whatever_it_looks_like(tmp_path: Path, rank: int, damage: bytes) -> None:
    model = torch.nn.Linear(512, 512)
    dw.attach(model, dw.LoRA(rank=rank), targets=torch.nn.Linear)
    dw.save(model, tmp_path / "a")
    assert admit(tmp_path / "a").sealed
    whole = (tmp_path / "a" / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    (tmp_path / "a" / WEIGHTS).write_bytes(whole[:header] + damage + whole[header + 4 :])
    with pytest.raises(AdapterError, match="not the file that was written"):
        admit(tmp_path / "a")


@pytest.mark.parametrize("width", [4, 1024])  # read here, and in a thread beside the walk over the model
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    model = nn.Sequential(nn.Linear(width, width))
    dw.attach(model, dw.LoRA(rank=40), ["0"])
    dw.save(shaken(model), tmp_path / "a")
    dw.detach(model)
    size = (tmp_path / "a" / WEIGHTS).stat().st_size
    assert (size > MUCH) == (width > 4)

    class Cut(Opened):
        def read(self) -> memoryview:
            os.truncate(self.path, self.size - 1)
            return super().read()

    monkeypatch.setattr(folders_of, "Opened", Cut)
    before = bits(model)
    with pytest.raises(AdapterError, match="changed while it was read"):
        dw.load(model, tmp_path / "a")
    assert bits(model) == before


def test_a_flipped_bit_in_a_foreign_file_loads_whole_or_not_at_all(folders: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's files have no checksum: a flip in a value cannot be seen, but one in a name, shape or rank is."""
    folder = Path(shutil.copytree(folders["peft"], tmp_path / "a"))
    keys, rng, model = set(admit(folder).adapter.changes), random.Random(2), net()
    for _ in range(200):
        file, whole = flip(folder, rng, [CONFIG, WEIGHTS])
        if not refused(model, folder):
            assert set(admit(folder).adapter.changes) == keys
        file.write_bytes(whole)


JUNK: list[Any] = [None, True, -1, 0, 3, 2.5, 1e9, "", "x", ".*", "(", [], ["x"], [1], {}, {"a": 1}, {"a": "b"}, [[]]]


def mutate(config: dict[str, Any], tensors: dict[str, Tensor], rng: random.Random) -> None:
    """One random damage, in place."""
    name = rng.choice(sorted(tensors))
    match rng.randrange(10):
        case 0:
            config[rng.choice(sorted(config))] = rng.choice(JUNK)
        case 1:
            config.pop(rng.choice(["r", "target_modules", "peft_type", "modules_to_save", "lora_alpha"]), None)
        case 2:
            del tensors[name]
        case 3:
            tensors[name + rng.choice(["x", ".weight", "_A"])] = tensors[name].clone()
        case 4:
            tensors[name.replace("0", "7").replace("first", "frist") + "" if rng.random() < 0.5 else "q." + name] = (
                tensors.pop(name)
            )
        case 5:
            tensors[name] = tensors[name].reshape(-1)
        case 6:
            tensors[name] = torch.cat([tensors[name], tensors[name]])
        case 7 if tensors[name].numel() and tensors[name].is_floating_point():
            tensors[name].view(-1)[0] = rng.choice([float("nan"), float("inf"), float("-inf")])
        case 8:
            tensors[name] = tensors[name][..., :0]
        case 9:
            tensors[name] = tensors[name].to(rng.choice([torch.int8, torch.bool, torch.int64]))


def fuzz(folder: Path, scratch: Path, count: int) -> int:
    """Mutate and load; returns how many were refused. What is accepted must have used every tensor."""
    rng, model, total = random.Random(3), net(), 0
    good = admit(folder).adapter
    for _ in range(count):
        config, tensors = parts(folder)
        for _ in range(rng.choice([1, 1, 2])):
            if tensors:
                mutate(config, tensors, rng)
        put(scratch, config, tensors)
        if refused(model, scratch):
            total += 1
            continue
        adapter = admit(scratch).adapter
        assert len(adapter.tensors()) == len(tensors)
        assert set(adapter.changes) >= set(good.changes) - {"head.weight", "head.bias"}
    return total


@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_no_mutant_loads_in_part(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    assert fuzz(folders[kind], tmp_path / "m", 300) > 200


@pytest.mark.slow
def test_no_mutant_of_ten_thousand_loads_in_part(folders: dict[str, Path], tmp_path: Path) -> None:
    assert fuzz(folders["peft"], tmp_path / "m", 10_000) > 7_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "LORA", "r": 2, "r": 2}', "twice"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "too large"),
        ("[" * 100_000, "nested"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested"),
        ("[1]", "must be a JSON object"),
        ("\ufeff{}", "not valid JSON"),
        ('{"peft_type": "PROMPT_TUNING"}', "cannot be read"),
        ('{"peft_type": null}', "cannot be read"),
        ("{}" + " " * (1 << 20), "at most"),
    ],
)
def test_bad_configs(folders: dict[str, Path], tmp_path: Path, text: str, message: str) -> None:
    put(tmp_path / "a", text, parts(folders["peft"])[1])
    with pytest.raises(AdapterError, match=message):
        admit(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 3}, "A has rank 2, the config says 3"),
        ({"use_dora": True}, "m missing"),
        ({"rank_pattern": {"(a+)+b": 2}}, None),
        ({"rank_pattern": {r"(a)\1": 2}}, "groupref"),
        ({"lora_alpha": 10**400}, "too large"),
        ({"target_modules": "(" * 5}, "no valid regular expression"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"init_lora_weights": "corda"}, "rewrites the base"),
        ({"init_lora_weights": "loftq"}, "rewrites the base"),
        ({"modules_to_save": None}, None),
        ({"target_modules": ["first", "0", "1", "norm", "head2"]}, None),
        ({"lora_alpha": "8"}, "is no number"),
        ({"lora_alpha": 1e300}, r"alpha=1e\+300: must be a finite number above 0 \(in float32\)"),
        ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, None),
        ({"megatron_core": "antigravity"}, None),
    ],
)
def test_wrong_fields(folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str | None) -> None:
    config, tensors = parts(folders["peft"])
    put(tmp_path / "a", {**config, **change}, tensors)
    if message is None:
        admit(tmp_path / "a")
        assert "antigravity" not in sys.modules
    else:
        with pytest.raises(AdapterError, match=message):
            admit(tmp_path / "a")


def test_a_target_without_tensors_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config, tensors = parts(folders["peft"])
    put(tmp_path / "a", config, {k: t for k, t in tensors.items() if "first" not in k})
    with pytest.raises(AdapterError, match=r"targets 1 modules of Net for which the file has no tensors \(first\)"):
        dw.load(net(), tmp_path / "a")
    put(tmp_path / "a", config, {k: t for k, t in tensors.items() if "head.bias" not in k})
    with pytest.raises(AdapterError, match=r"trained in full, for which .* no tensors \(head.bias\)"):
        dw.load(net(), tmp_path / "a")


def test_pickles_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"pickle .*save_pretrained"):
        admit(folder)


opened: list[str] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if opened is not None and event == "open" and isinstance(args[0], (str, bytes)):
        opened.append(os.fsdecode(args[0]))


sys.addaudithook(_hook)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
def test_no_link_is_followed(folder: Path, tmp_path: Path, name: str) -> None:
    global opened
    if not (folder / name).exists():
        pytest.skip("this kind of folder has no such file")
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    opened = []
    try:
        with pytest.raises(AdapterError, match="symbolic link"):
            admit(folder)
    finally:
        seen, opened = opened, None
    assert seen
    assert [p for p in seen if Path(p).name == "outside"] == []
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(AdapterError, match="not a regular file"):
        admit(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
def test_a_folder_in_the_place_of_a_file(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    assert refused(net(), folder)


@pytest.mark.parametrize("source", ["a\0b", "x" * 5000, b"abc", 3, None, "/dev/null"])
def test_what_is_no_folder(source: Any) -> None:
    with pytest.raises(AdapterError):
        dw.load(net(), source)


@pytest.mark.parametrize(
    ("start", "message"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"<html>404", "HTML"), (b"PK\x03\x04", "zip")],
)
def test_what_often_lies_in_the_place_of_weights(folder: Path, start: bytes, message: str) -> None:
    (folder / WEIGHTS).write_bytes(start + b"0" * 64)
    (folder / MANIFEST).unlink(missing_ok=True)
    with pytest.raises(AdapterError, match=message):
        admit(folder)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "x\x00y", "\u202ereversed", "", "a" * 5000]
)
def test_hostile_tensor_names_open_nothing(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    global opened
    config, tensors = parts(folders["peft"])
    put(tmp_path / "a", {**config, "base_model_name_or_path": "/etc/passwd"}, {**tensors, name: torch.ones(2)})
    opened = []
    try:
        with pytest.raises(AdapterError):
            dw.load(net(), tmp_path / "a")
    finally:
        seen, opened = opened, None
    inside = {CONFIG, WEIGHTS, MANIFEST, "a"}
    assert {Path(p).name for p in seen if "site-packages" not in p and not p.endswith((".py", ".pyc"))} <= inside


def test_another_base_of_the_same_shape_is_refused(folders: dict[str, Path]) -> None:
    rng = random.Random(4)
    for trial in range(100):
        other = net(seed=0 if trial % 2 else trial + 1)
        if trial % 2:  # one entry of one parameter, targeted or not
            parameter = rng.choice([p for n, p in other.named_parameters() if not n.startswith("head")])
            with torch.no_grad():
                parameter.view(-1)[rng.randrange(parameter.numel())] += 10.0 ** -rng.randrange(1, 5)
        before = bits(other)
        with pytest.raises(BaseMismatch):
            dw.load(other, folders["ours"])
        assert bits(other) == before


def test_edited_files_need_a_word(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["ours"], tmp_path / "a"))
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere"}))
    with pytest.raises(AdapterError, match="verify=False"):
        dw.read(folder)
    assert dw.read(folder, verify=False).base["name"] == "elsewhere"


def test_of_an_edited_folder_the_files_count(tmp_path: Path) -> None:
    """Another scale, and a layer less, than the manifest says."""
    model = dw.attach(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), dw.LoRA(rank=2), ["0", "1"])
    folder = dw.save(model, tmp_path / "a")
    config, tensors = parts(folder)
    (folder / CONFIG).write_text(json.dumps({**config, "lora_alpha": 8}))
    with pytest.raises(AdapterError, match="verify=False"):
        dw.read(folder)
    assert {c.variant for c in dw.read(folder, verify=False).changes.values()} == {dw.LoRA(rank=2, alpha=8)}
    (folder / CONFIG).write_text(json.dumps({**config, "target_modules": ["0"]}))
    save_file({k: t for k, t in tensors.items() if ".1." not in k}, folder / WEIGHTS)
    assert set(dw.read(folder, verify=False).changes) == {"0.weight"}
    dw.load(dw.detach(model), folder, verify=False)
    assert set(dw.get(model).changes) == {"0.weight"}
    dw.write(dw.read(folder, verify=False), tmp_path / "anew")
    assert set(dw.read(tmp_path / "anew").changes) == {"0.weight"}


@pytest.mark.parametrize("width", [64, 7])
def test_loaded_tensors_lie_as_torch_lays_its_own_and_are_nobody_elses(tmp_path: Path, width: int) -> None:
    """Where they can, deltas hold the very memory that the file was read into: aligned, and anew for every load."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    kept = shaken(dw.attach(copy.deepcopy(plain), dw.LoRA(rank=4), "all-linear"))
    folder = dw.save(kept, tmp_path / "a")
    before = (folder / WEIGHTS).read_bytes()
    value = dw.get(kept)
    model = dw.attach(copy.deepcopy(plain), dw.LoRA(rank=4), "all-linear", name="first")
    for name in ("one", "two"):
        dw.load(model, folder, name=name, trainable=True)
    dw.load(model, value, name="three", trainable=True)
    owned = [p for n, p in model.named_parameters() if ".adapters." in n]
    assert len({p.data_ptr() for p in owned}) == len(owned)
    for p in owned:
        if p.numel() * 4 % 64 == 0:
            assert p.data_ptr() % 64 == 0
        with torch.no_grad():
            p.add_(1.0)
    for name in ("one", "two", "three"):
        for key, change in dw.get(model, name).changes.items():
            for part, tensor in change.tensors.items():
                assert torch.equal(tensor, value.changes[key].tensors[part] + 1), (name, key, part)
    assert (folder / WEIGHTS).read_bytes() == before


def test_damage_is_told_before_that_the_base_is_another(folders: dict[str, Path], tmp_path: Path) -> None:
    """Checksums are computed until the last check is made, and have the first word all the same."""
    folder = Path(shutil.copytree(folders["ours"], tmp_path / "a"))
    with pytest.raises(BaseMismatch):
        dw.load(net(1), folder)
    whole = bytearray((folder / WEIGHTS).read_bytes())
    whole[-3] ^= 1  # a finite value, a little off
    (folder / WEIGHTS).write_bytes(whole)
    model = net(1)
    with pytest.raises(AdapterError, match="is not the file that was written") as caught:
        dw.load(model, folder)
    assert not isinstance(caught.value, BaseMismatch)
    assert not any(".adapters." in name for name, _ in model.named_modules())


def test_memory_of_a_trainable_adapter_is_its_own(tmp_path: Path) -> None:
    """Who offloads or shards resizes storages, which those of a file's memory do not allow."""
    kept = dw.attach(nn.Linear(64, 64), dw.LoRA(rank=4), targets=nn.Linear)
    folder = dw.save(kept, tmp_path / "a")
    dw.load(kept, folder, name="b", trainable=True)
    for p in kept.adapters.b.parameters():
        p.untyped_storage().resize_(0)
