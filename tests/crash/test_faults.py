"""NaN, no memory, a full disk, a damaged or foreign checkpoint: what is promised for each."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from deltaw.errors import ConfigError, NonFinite, OutOfMemory
from deltaw.training import checkpoint
from deltaw.training.run import status
from deltaw.training.signals import Interrupted, Stop
from tests.crash.faults import trials


class Disturbed:
    """A task whose loss misbehaves at certain calls in training."""

    def __init__(self, task, disturb):
        self.task, self.disturb, self.calls = task, disturb, 0

    def __getattr__(self, name):
        return getattr(self.task, name)

    def loss(self, model, batch):
        loss, outputs = self.task.loss(model, batch)
        if model.training:
            self.calls += 1
            loss = self.disturb(self.calls, loss, batch)
        return loss, outputs


def at(step, what):
    def disturb(call, loss, batch):
        if call == step:
            if isinstance(what, Exception):
                raise what
            return loss * what
        return loss

    return lambda task: Disturbed(task, disturb)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def steps(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_the_checkpoint_stays(run, tmp_path, value):
    with pytest.raises(NonFinite, match=r"step 5: the loss is (nan|inf); lower lr") as error:
        run(tmp_path / "run", wrap=at(5, value))
    assert error.value.exit_code == 4
    assert steps(tmp_path / "run") == ["step-3"]
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    run(tmp_path / "calm")
    run(tmp_path / "run", resume=True)
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "calm"))


def test_no_memory_halves_the_micro_batch_and_keeps_the_step(run, tmp_path):
    def disturb(call, loss, batch):
        if len(batch["labels"]) > 2:
            raise torch.OutOfMemoryError("made up")
        return loss

    calm = run(tmp_path / "calm", lora={"rank": 4}, base_dropout=0.0, bucket=False)
    hard = run(
        tmp_path / "hard", lora={"rank": 4}, base_dropout=0.0, bucket=False, wrap=lambda t: Disturbed(t, disturb)
    )
    for one, other in zip(calm["history"], hard["history"]):
        assert one["step"] == other["step"]
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    for key, tensor in weights(tmp_path / "calm").items():
        assert torch.allclose(tensor, weights(tmp_path / "hard")[key], atol=1e-4), key


def test_no_memory_for_one_example_is_exit_code_5(run, tmp_path):
    def disturb(call, loss, batch):
        raise torch.OutOfMemoryError("made up")

    with pytest.raises(OutOfMemory, match="one example does not fit") as error:
        run(tmp_path / "run", wrap=lambda t: Disturbed(t, disturb))
    assert error.value.exit_code == 5
    assert not (tmp_path / "run").exists()


def test_other_errors_of_the_model_are_not_taken_for_memory(run, tmp_path):
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(tmp_path / "run", wrap=at(2, RuntimeError("shapes do not fit")))
    assert not (tmp_path / "run").exists(), "there was nothing to keep yet"


def test_a_full_disk_keeps_the_old_checkpoint(run, tmp_path, monkeypatch):
    real = checkpoint._write_flushed

    def full(path, content):
        if "step-6" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_flushed", full)
        with pytest.raises(OSError, match=r"No space left .* checkpoint of step 6 needs [\d,]+ bytes") as error:
            run(tmp_path / "run")
    assert error.value.errno == errno.ENOSPC
    assert steps(tmp_path / "run") == ["step-3"]
    run(tmp_path / "calm")
    run(tmp_path / "run", resume=True)
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "calm"))


def test_faults_at_random_steps_end_as_promised():
    """The short version of R11: `python -m tests.crash.faults --trials 100`."""
    found = trials(6, seed=4)
    assert found["wrong"] == []
    assert found["as promised"] == 6


def test_a_damaged_newest_checkpoint_is_skipped(run, tmp_path, capsys):
    with pytest.raises(NonFinite):
        run(tmp_path / "run", wrap=at(8, float("nan")))
    newest = tmp_path / "run" / "checkpoints" / "step-6" / "trained.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    run(tmp_path / "calm")
    run(tmp_path / "run", resume=True)
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "calm"))


def test_without_a_checkpoint_a_run_starts_afresh(run, tmp_path):
    with pytest.raises(NonFinite):
        run(tmp_path / "run", wrap=at(5, float("nan")))
    import shutil

    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run(tmp_path / "calm")
    run(tmp_path / "run", resume=True)
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "calm"))
    read = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in read if r["event"] == "epoch"] == [1.0, 2.0], "what the lost run wrote is gone"


def test_another_configuration_is_refused_and_told_apart(run, tmp_path):
    with pytest.raises(NonFinite):
        run(tmp_path / "run", wrap=at(5, float("nan")))
    with pytest.raises(ConfigError, match=r"lr: 0\.005 .* 0\.001"):
        run(tmp_path / "run", resume=True, lr=1e-3)
    assert status(tmp_path / "run") == "running"
    run(tmp_path / "run", resume=True, log_every=5, keep_checkpoints=1)  # these decide nothing
    assert status(tmp_path / "run") == "finished"


def test_a_signal_just_after_the_loop_has_asked_is_obeyed_a_step_later_with_a_checkpoint(run, tmp_path, monkeypatch):
    asked = []

    def late(self):
        asked.append(self.number is not None)
        if len(asked) == 2:
            self.number = signal.SIGINT
        return asked[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "asked", late)
        with pytest.raises(Interrupted):
            run(tmp_path / "run", checkpoint_every=100)
    assert steps(tmp_path / "run") == ["step-3"]
