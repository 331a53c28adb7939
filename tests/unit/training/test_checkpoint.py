"""Checkpoints are whole or not there: every call that touches the disk is made to fail once."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from deltaw.errors import DataError
from deltaw.training import checkpoint

TENSORS = {
    "trained": {"w": torch.arange(6.0)},
    "best": {},
    "optimizer": {"0.exp_avg": torch.ones(3)},
    "random": {"cpu": torch.arange(8, dtype=torch.uint8)},
}


def write(folder, step, keep=2):
    return checkpoint.write(folder, step, TENSORS, {"step": step}, "digest", keep)


def test_round_trip_is_exact(tmp_path):
    write(tmp_path, 7)
    found, manifest, skipped = checkpoint.newest(tmp_path)
    assert found is not None
    assert skipped == []
    assert found.state == {"step": 7}
    assert manifest["config"] == "digest"
    for name, group in TENSORS.items():
        assert found.tensors[name].keys() == group.keys()
        assert all(torch.equal(found.tensors[name][k], t) for k, t in group.items())


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 9, 10, 11):
        write(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-11"]


@pytest.mark.parametrize("name", ["trained.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_newest_is_skipped_with_its_reason(tmp_path, name, damage):
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    found, _, skipped = checkpoint.newest(tmp_path)
    if name == "MANIFEST.json" and damage == "flip" and not skipped:
        pytest.skip("this bit of the manifest decides nothing")
    assert found is not None
    assert found.state["step"] == 1
    assert "step-2" in skipped[0]


def calls_of_one_save(tmp_path, monkeypatch):
    """The number of disk calls in a save over an existing checkpoint, by counting them."""
    count = Counting(monkeypatch)
    write(tmp_path, 2, keep=1)
    count.undo()
    return count.calls


class Counting:
    """Counts write, fsync and rename of a save; makes call number `fail_at` fail."""

    def __init__(self, monkeypatch, fail_at=None, error=errno.EIO):
        self.calls, self.fail_at, self.error = 0, fail_at, error
        self.context = monkeypatch.context()
        patch = self.context.__enter__()
        for module, name in (
            (os, "fsync"),
            (os, "rename"),
            (checkpoint, "_write_flushed"),
            (checkpoint, "flush_folder"),
        ):
            patch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, real):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.fail_at:
                raise OSError(self.error, os.strerror(self.error))
            return real(*args, **kwargs)

        return call

    def undo(self):
        self.context.__exit__(None, None, None)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_whatever_call_fails_the_old_or_the_new_checkpoint_is_there(tmp_path, monkeypatch, error):
    write(tmp_path / "count", 1, keep=1)
    total = calls_of_one_save(tmp_path / "count", monkeypatch)
    assert total > 10
    for fail_at in range(1, total + 1):
        folder = tmp_path / f"{error}-{fail_at}"
        write(folder, 1, keep=1)
        counting = Counting(monkeypatch, fail_at, error)
        with pytest.raises(OSError, match=os.strerror(error)):
            write(folder, 2, keep=1)
        counting.undo()
        found, _, skipped = checkpoint.newest(folder)
        assert found is not None
        assert found.state["step"] in (1, 2)
        assert skipped == []
        assert not [p for p in folder.iterdir() if ".tmp-" in p.name]


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    checkpoint.write_atomic(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        checkpoint.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_reading_what_is_no_checkpoint_says_so(tmp_path):
    (tmp_path / "step-3").mkdir()
    with pytest.raises(DataError, match="step-3: unreadable"):
        checkpoint.read(tmp_path / "step-3")
    found, _, skipped = checkpoint.newest(tmp_path)
    assert found is None
    assert len(skipped) == 1
