"""Saving: all or nothing at every step, the umask's mode, and nothing of anybody else's is overwritten."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw as dw
from deltaw.errors import AdapterError, NonFinite
from deltaw.io import folder as folders
from deltaw.io.admission import admit
from deltaw.io.digest import digest
from deltaw.io.folder import CARD, CONFIG, MANIFEST, WEIGHTS
from tests.unit.io.adapter_folders import net, shaken


def adapter(seed: int) -> dw.Adapter:
    model = net()
    dw.attach(model, dw.LoRA(rank=2), ["first", "0"])
    return dw.get(shaken(model, seed))


def content(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(path.iterdir())}


class Broken(OSError):
    pass


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes the n-th write, flush or rename fail; returns how many there were."""
    state = {"left": -1, "seen": 0}

    def guard(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            state["seen"] += 1
            state["left"] -= 1
            if state["left"] == 0:
                raise Broken("disk full")
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "open", "mkdir"):
        monkeypatch.setattr(folders.os, name, guard(getattr(os, name)))
    monkeypatch.setattr(folders, "exchange", guard(folders.exchange))
    monkeypatch.setattr(Path, "write_bytes", guard(Path.write_bytes))
    monkeypatch.setattr(Path, "open", guard(Path.open))
    yield state
    state["left"] = -1


@pytest.mark.parametrize("atomic", [True, False])
def test_every_failure_leaves_the_old_or_the_new(
    tmp_path: Path, fail_at: dict[str, int], monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    if not atomic:
        monkeypatch.setattr(folders, "_rename_exchange", lambda one, other: False)
    target = tmp_path / "a"
    dw.write(adapter(1), target)
    old = content(target)
    fail_at["seen"] = 0
    dw.write(adapter(2), tmp_path / "b")
    new, steps = content(tmp_path / "b"), fail_at["seen"]
    assert steps > 10
    failures = 0
    for step in range(1, steps + 5):
        fail_at["left"] = step
        try:
            dw.write(adapter(2), target)
        except Broken:
            failures += 1
        fail_at["left"] = -1
        assert content(target) in (old, new)
        # a draft may be left only where its removal was what failed
        assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["a", "b"]
        dw.write(adapter(1), target)
    assert failures > 10


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        dw.write(adapter(1), tmp_path / "a")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "a").iterdir()} == {0o640}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750


def test_an_adapter_of_ours_is_replaced_and_its_card_kept(tmp_path: Path) -> None:
    dw.write(adapter(1), tmp_path / "a")
    (tmp_path / "a" / CARD).write_text("mine")
    dw.write(adapter(2), tmp_path / "a")
    assert sorted(content(tmp_path / "a")) == sorted([CONFIG, WEIGHTS, MANIFEST, CARD])
    assert (tmp_path / "a" / CARD).read_text() == "mine"
    assert torch.equal(dw.read(tmp_path / "a").tensors()["first.weight.A"], adapter(2).tensors()["first.weight.A"])


@pytest.mark.parametrize("case", ["file", "foreign", "extra", "link"])
def test_nothing_else_is_overwritten(tmp_path: Path, case: str) -> None:
    target = tmp_path / "a"
    if case == "file":
        target.write_text("x")
    elif case == "link":
        dw.write(adapter(1), tmp_path / "real")
        target.symlink_to(tmp_path / "real")
    else:
        target.mkdir()
        (target / "thesis.tex").write_text("x")
        if case == "extra":
            (target / MANIFEST).write_text("{}")
    with pytest.raises(AdapterError, match=r"exists|holds files"):
        dw.write(adapter(1), target)
    assert not list(tmp_path.glob(".*tmp*"))
    if case in ("foreign", "extra"):
        assert (target / "thesis.tex").read_text() == "x"


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="cannot be written"):
        dw.write(adapter(1), tmp_path / "file" / "a")
    assert (tmp_path / "file").read_text() == "x"


def test_a_name_that_is_not_there_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dw.write(adapter(1), "adapters/sum")
    with pytest.raises(AdapterError, match=r"did you mean 'sum'\? \(it has: sum\)"):
        dw.load(torch.nn.Linear(2, 2), "adapters/sun")


def test_a_damaged_adapter_is_not_written(tmp_path: Path) -> None:
    broken = adapter(1)
    broken.tensors()["first.weight.A"][0, 0] = float("nan")
    with pytest.raises(NonFinite, match=r"first\.weight\.A"):
        dw.write(broken, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_values_survive_in_every_dtype(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        change = dw.Change(dw.LoRA(rank=1), {"A": torch.randn(1, 3).to(dtype), "B": torch.randn(4, 1).to(dtype)})
        dw.write(dw.Adapter({"x.weight": change}), tmp_path / str(dtype))
        back = dw.read(tmp_path / str(dtype)).changes["x.weight"]
        assert all(
            torch.equal(back.tensors[n], t) and back.tensors[n].dtype == dtype for n, t in change.tensors.items()
        )


@pytest.mark.parametrize("at", ["names", WEIGHTS, CONFIG, MANIFEST])
def test_a_folder_that_is_replaced_while_it_is_read_gives_one_adapter_whole(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, path = adapter(1), adapter(2), tmp_path / "a"
    dw.write(old, path)
    real_open, real_names, left = folders.Folder.opened, os.listdir, [3]

    def overtaken(name: str) -> None:
        if name == at and left[0]:
            left[0] -= 1
            dw.write(new, path)

    def opened(self: folders.Folder, name: str, *args: Any, **options: Any) -> folders.Opened:
        overtaken(name)
        return real_open(self, name, *args, **options)

    def names(handle: Any) -> list[str]:
        if isinstance(handle, int):
            overtaken("names")
        return real_names(handle)

    monkeypatch.setattr(folders.Folder, "opened", opened)
    monkeypatch.setattr(folders.os, "listdir", names)
    admitted = admit(path)
    assert admitted.manifested
    assert admitted.digest == digest(dw.read(path)) == digest(new)
    assert left == [0]


def test_a_folder_that_never_comes_to_rest_is_said_to_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dw.write(adapter(1), tmp_path / "a")
    monkeypatch.setattr(folders.Folder, "replaced", lambda self: True)
    with pytest.raises(AdapterError, match="replaced again and again while it is read: try again"):
        dw.read(path)


def test_reading_leaves_no_folder_open(tmp_path: Path) -> None:
    path = dw.write(adapter(1), tmp_path / "a")
    before = len(os.listdir("/proc/self/fd"))
    dw.read(path)
    with pytest.raises(AdapterError):
        dw.read(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_drafts_of_killed_writers_are_removed_and_no_others(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / ".b.tmp-0123456789ab"
    mine = (
        ".a.tmp-0123456789ab",
        ".a.tmp-mine",
        ".a.tmp-0123456789ab.old",
        ".a.tmp-ab0123456789",
        ".b.tmp-0123456789ab",
    )
    for name in mine:
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG).write_text("{}")
    (tmp_path / ".a.tmp-ba9876543210").symlink_to(other)
    (tmp_path / ".a.tmp-000000000000").mkdir()
    lock = os.open(tmp_path / ".a.tmp-ab0123456789", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    dw.write(adapter(1), path)
    os.close(lock)
    left = {*mine[1:], ".a.tmp-ba9876543210", "a"}
    assert {p.name for p in tmp_path.iterdir()} == left
    dw.write(adapter(2), path)
    assert {p.name for p in tmp_path.iterdir()} == left - {".a.tmp-ab0123456789"}
    assert (other / CONFIG).exists()


def test_a_draft_that_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = folders.fcntl.flock, []

    def overtaken(handle: int, how: int) -> None:
        if len(removed) < 2:
            removed.extend(tmp_path.glob(".a.tmp-*"))
            removed[-1].rmdir()
        real(handle, how)

    monkeypatch.setattr(folders.fcntl, "flock", overtaken)
    dw.write(adapter(1), tmp_path / "a")
    assert len(removed) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_writer_that_is_killed_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    def wait(folder: Path) -> None:
        (folder / CONFIG).write_text("{}")
        os.write(ready[1], b"x")
        time.sleep(60)

    ready, path = os.pipe(), tmp_path / "a"
    pid = os.fork()
    if not pid:
        folders.replace(path, wait)
    os.read(ready[0], 1)
    dw.write(adapter(1), path)
    assert len(list(tmp_path.iterdir())) == 2
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    dw.write(adapter(2), path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("path", [None, 3, b"a"])
def test_what_names_no_folder_is_refused(path: Any) -> None:
    for write in (lambda: dw.write(adapter(1), path), lambda: dw.read(path)):
        with pytest.raises(AdapterError, match="a folder is named by a text or a path, found"):
            write()


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_that_the_system_finds_too_long_is_refused(length: int, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"cannot be written.*File name too long"):
        dw.write(adapter(1), tmp_path / ("n" * length))
    assert not list(tmp_path.iterdir())
