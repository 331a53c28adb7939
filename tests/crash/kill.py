"""Kill training with SIGKILL at random instants, resume until it is done, compare with a run that nobody touched.

    python -m tests.crash.kill --trials 400 --seed 0        (R1; about 30 % of the kills fall into a save)

Every trial forks a fresh process from this one, which has only imported things, so a trial costs seconds. A kill comes
either after a random time, or at a random call of write, fsync, rename or replace, which is inside a save.
Prints one JSON object: trials, kills, how many runs ended bit-identical, and every difference found; on stderr, how far
it has come.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltaw.recipes.configure import build
from deltaw.recipes.recipe import recipes
from deltaw.training import checkpoint
from deltaw.training.config import RunConfig
from deltaw.training.pictures import Pictures
from deltaw.training.run import status, train
from deltaw.training.small_networks import perceptron
from deltaw.training.task import Task
from deltaw.training.tasks.image_classification import ImageClassification
from tests.tiny_chat import make_chat_model, make_talks
from tests.tiny_text import make_data, make_model


class Shifted(ImageClassification):
    """Pictures with noise and a shift that differ in every epoch."""

    augments = True

    def example(self, split, index, random):
        image, label = super().example(split, index, random)
        if split != "train":
            return image, label
        return np.roll(image, random.integers(-1, 2), axis=1) + random.normal(0, 0.1, image.shape).astype(
            np.float32
        ), label


def make_tones(folder: Path) -> None:
    """Low and high tones in noise under folder/tones, and a tiny Whisper in folder/listener."""
    import soundfile
    from transformers import WhisperConfig, WhisperModel

    chance = np.random.default_rng(0)
    for name, pitch in (("low", 300), ("high", 1500)):
        (folder / "tones" / name).mkdir(parents=True)
        for i in range(24):
            moment = np.arange(1600 + 80 * i) / 16_000
            wave = 0.3 * np.sin(2 * np.pi * pitch * moment + i) + 0.05 * chance.standard_normal(len(moment))
            soundfile.write(folder / "tones" / name / f"{i}.wav", wave, 16_000)
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, max_target_positions=8, max_source_positions=50,
    )  # fmt: skip
    WhisperModel(config).save_pretrained(folder / "listener")


def make_everything(folder: Path) -> None:
    """The data and models of all scenarios."""
    make_model(folder / "model")
    make_data(folder / "data.csv", 80)
    make_chat_model(folder / "chat")
    make_talks(folder / "talks.jsonl", 40)
    make_tones(folder)


def scenarios(folder: Path) -> dict[str, tuple[RunConfig, Callable[[RunConfig], Task]]]:
    """Name -> (configuration, task)."""
    text = {
        "recipe": "text-classification", "model": str(folder / "model"), "data": str(folder / "data.csv"),
        "epochs": 3, "batch_size": 8, "checkpoint_every": 3, "evaluations": 2, "lr": 5e-3,
    }  # fmt: skip
    of_text = recipes["text-classification"].task
    random_pictures = np.random.default_rng(0)
    pictures = Pictures(random_pictures.random((96, 8, 8), dtype=np.float32), random_pictures.integers(0, 3, 96))

    def of_pictures(config: RunConfig) -> Task:
        parts = {
            "train": pictures[slice(0, 64)],
            "validation": pictures[slice(64, 80)],
            "test": pictures[slice(80, 96)],
        }
        return Shifted(config, lambda: perceptron(64, [16], 3), parts, ["a", "b", "c"], "net", (8, 8))

    digits = {
        "recipe": "mnist",
        "mnist": {"scratch": True},
        "targets": ["1"],
        "train": ["3"],
        "epochs": 4,
        "batch_size": 8,
        "checkpoint_every": 5,
        "lora": {"dropout": 0.2},
    }
    talks = {
        "recipe": "sft", "model": str(folder / "chat"), "max_length": 96, "epochs": 3, "batch_size": 2, "lr": 1e-2,
        "data": {"path": str(folder / "talks.jsonl"), "validation": 0.2, "test": 0.1}, "checkpoint_every": 3,
        "lora": {"rank": 4, "dropout": 0.1},
    }  # fmt: skip
    tones = {
        "recipe": "audio-classification", "model": str(folder / "listener"), "epochs": 3, "batch_size": 4, "lr": 3e-3,
        "data": {"path": str(folder / "tones"), "validation": 0.2, "test": 0.2}, "checkpoint_every": 3,
        "lora": {"rank": 4, "dropout": 0.1},
    }  # fmt: skip
    return {
        "language, lora, dropout, packed": (build(talks), recipes["sft"].task),
        "sound, lora, dropout": (build(tones), recipes["audio-classification"].task),
        "text, adalora": (
            build({**text, "method": "adalora", "adalora": {"rank": 4, "target": 2, "every": 2}}),
            of_text,
        ),
        "text, lora, dropout, accumulation": (
            build({**text, "accumulate": 2, "batch_size": 4, "lora": {"dropout": 0.1, "rank": 4}}),
            of_text,
        ),
        "text, dora, 2 workers": (build({**text, "method": "dora", "workers": 2, "epochs": 2}), of_text),
        "text, full": (build({**text, "method": "full"}), of_text),
        "text, head, cached body": (build({**text, "method": "head"}), of_text),
        "pictures, lora, augmentation": (build(digits), of_pictures),
        "pictures, lora, augmentation, 2 workers": (build({**digits, "workers": 2, "epochs": 2}), of_pictures),
        "pictures, full, augmentation": (build({**digits, "method": "full"}), of_pictures),
    }


def forked(work: Callable[[], Any], kill_after: float | None, log: Path) -> int:
    """Run `work` in a forked process; its exit code, negative for a signal. `kill_after`: SIGKILL after so many seconds."""
    child = os.fork()
    if child == 0:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        with contextlib.suppress(PermissionError):
            os.setpgid(0, 0)
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(child, child)  # by both, so that the group is there whoever is first
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if deadline is not None and time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # workers that outlive their parent
    return os.waitstatus_to_exitcode(code)


def die_at(call: int) -> None:
    """Make this process kill itself at its `call`-th write, fsync, rename or replace."""
    seen = 0

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return counting

    for name in ("fsync", "rename", "replace"):
        setattr(os, name, wrapped(getattr(os, name)))
    checkpoint._write_flushed = wrapped(checkpoint._write_flushed)


def content(folder: Path) -> dict[str, str]:
    """sha256 of what a finished run keeps, and of everything else it states but time and machine."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if "checkpoints" not in path.parts:
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    results = json.loads((folder / "results.json").read_text())
    for row in results["history"]:
        row.pop("seconds")
    found["history"] = json.dumps([results["history"], results["test"]])
    return found


def kind_of_kill(chance: random.Random, typical: float, calls: int) -> tuple[float | None, int | None]:
    """(after so many seconds, None) or (None, at this disk call): about a third of the latter."""
    if chance.random() < 0.35:
        return None, chance.randint(1, calls)
    return chance.uniform(0.0, 1.1 * typical), None


def main() -> int:
    """Run the trials of the command line; 0 if every run ended bit-identical."""
    options = argparse.ArgumentParser()
    options.add_argument("--trials", type=int, default=400)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    torch.set_num_threads(1)
    import accelerate  # noqa: F401  (imported here so that the forks need not)
    import transformers  # noqa: F401

    chance = random.Random(given.seed)
    root = Path(tempfile.mkdtemp(prefix="deltaw-kill-"))
    counts = {"trials": 0, "kills": 0, "kills at a disk call": 0, "resumes": 0, "identical": 0}
    differences: list[str] = []
    try:
        make_everything(root)
        known = scenarios(root)
        reference, seconds = {}, {}
        for number, (name, (config, task)) in enumerate(known.items()):
            started = time.monotonic()
            folder = root / f"reference-{number}"
            if (
                forked(lambda c=config, t=task, f=folder: train(lambda: t(c), c, f, quiet=True), None, root / "log")
                != 0
            ):
                raise RuntimeError(f"{name}: the run that nobody touched failed\n{(root / 'log').read_text()}")
            seconds[name] = time.monotonic() - started
            reference[name] = content(folder)
        while counts["trials"] < given.trials:
            name = list(known)[counts["trials"] % len(known)]
            config, task = known[name]
            folder = root / f"trial-{counts['trials']}"
            counts["trials"] += 1
            kills_left = chance.randint(1, 3)
            while True:
                after, call = kind_of_kill(chance, seconds[name], 120) if kills_left else (None, None)

                def work(config=config, task=task, folder=folder, call=call):
                    if call is not None:
                        die_at(call)
                    train(lambda: task(config), config, folder, resume=folder.exists(), quiet=True)

                code = forked(work, after, root / "log")
                if code == -signal.SIGKILL:
                    counts["kills"] += 1
                    counts["kills at a disk call"] += call is not None
                    kills_left -= 1
                    counts["resumes"] += 1
                    continue
                if code != 0:
                    differences.append(f"{name}: resuming failed with {code}: {(root / 'log').read_text()[-2000:]}")
                break
            if code == 0:
                found = content(folder)
                wrong = [k for k in {**found, **reference[name]} if found.get(k) != reference[name].get(k)]
                if wrong or status(folder) != "finished":
                    differences.append(f"{name}: differs in {wrong}")
                else:
                    counts["identical"] += 1
            shutil.rmtree(folder, ignore_errors=True)
            print(json.dumps(counts), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(
        json.dumps(
            {**counts, "seed": given.seed, "versions": checkpoint.versions(), "differences": differences}, indent=2
        )
    )
    return 0 if not differences else 1


if __name__ == "__main__":
    sys.exit(main())
