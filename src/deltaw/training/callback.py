"""A callback for `transformers.Trainer` and TRL: their loop, with this package's checks and checkpoints.

    callback = DeltawCallback()
    trainer = Trainer(model=model, args=arguments, callbacks=[callback], ...)       # or trl.SFTTrainer
    trainer.train(resume_from_checkpoint=callback.newest(arguments.output_dir))

    OUT/  checkpoint-N/adapter/          the adapter as a folder of its own, ready for dw.load, PEFT and servers
          checkpoint-N/MANIFEST.json     sha256 of every file of the checkpoint, the Trainer's too; written last, so a
                                         checkpoint without it is one that was cut short
          best/step-N/                   the trained tensors of the best evaluation so far
          adapter/                       the result: the best evaluation's adapter, or the last if there was none

What the Trainer does itself (optimizer, schedule, order of the data, generators) it goes on doing, its resume included.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltaw.core.host import CHILD
from deltaw.errors import ConfigError, DataError, ModelError, NonFinite
from deltaw.io import save
from deltaw.model.gradients import check_gradients, listed
from deltaw.model.groups import after_step
from deltaw.model.state import hosts, known, unsharded, unwrap
from deltaw.training import checkpoint, trained
from deltaw.variants.adalora import orthogonality_loss

ADAPTER, BEST = "adapter", "best"


class DeltawCallback(TrainerCallback):  # type: ignore[misc]
    """Checks and keeps the adapter `name` of the model that a Trainer trains.

    Raises, from inside of `trainer.train()`:
        ModelError: after the first step a trained tensor has no gradient, or a buffer of the frozen base has moved.
        NonFinite: a gradient is not finite; the checkpoints from before stay.
        ConfigError: a method's number of steps (AdaLoRA's `total`) is not the Trainer's.
        UnknownName: the model has no adapter of that name.
    """

    def __init__(self, name: str = "default") -> None:
        self.name = name
        self.checked = False
        self.buffers: dict[str, Tensor] = {}
        self.best: dict[str, Tensor] = {}
        self.best_score: float | None = None

    # ---- checks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Look at the model before the first step, and take up the best evaluation of a run that is resumed."""
        root = unwrap(model)
        known(root, self.name)
        unsharded(root, "train with DeltawCallback")
        for path, host in hosts(root):
            for delta in host.deltas(self.name).values():
                total = getattr(delta.variant, "total", state.max_steps)
                if total != state.max_steps:
                    raise ConfigError(
                        f"{delta.variant} on {path} expects {total} optimizer steps, the Trainer makes "
                        f"{state.max_steps}: attach it with total={state.max_steps}"
                    )
        if args.fp16 and isinstance(orthogonality_loss(root), Tensor):
            raise ConfigError("AdaLoRA's penalty is not scaled as fp16 gradients are: train with bf16=True")
        self.checked = False
        self.buffers = {name: b.detach().clone() for name, b in frozen_buffers(root)}
        self.best, self.best_score = {}, None
        found, _manifest, _skipped = checkpoint.newest(Path(args.output_dir) / BEST)
        if state.global_step > 0 and found is not None and found.state["step"] <= state.global_step:
            self.best, self.best_score = found.tensors["trained"], found.state["score"]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """AdaLoRA's penalty joins the gradient before the step's first batch does."""
        penalty = orthogonality_loss(unwrap(model))
        if isinstance(penalty, Tensor):
            penalty.backward()  # type: ignore[no-untyped-call]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Every gradient is there and finite."""
        root = unwrap(model)
        if not args.fp16:  # there infinite gradients are a scale to be lowered, and the step is skipped
            gradients = [(n, p.grad) for n, p in root.named_parameters() if p.grad is not None]
            norms = torch._foreach_norm([g for _, g in gradients])
            if gradients and not bool(torch.isfinite(torch.stack([n.float() for n in norms])).all()):
                bad = [name for (name, _), norm in zip(gradients, norms) if not bool(torch.isfinite(norm))]
                raise NonFinite(
                    f"step {state.global_step + 1}: the gradient of {listed(bad)} is not finite; lower learning_rate, "
                    "or look at the data of this step"
                )
        if not self.checked:
            check_gradients(root, self.name)
            self.checked = True

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Methods that move rank between layers do it here."""
        after_step(model, state.global_step + 1)

    def _refuse_moved_buffers(self, root: nn.Module) -> None:
        moved = [name for name, b in frozen_buffers(root) if name in self.buffers and not same(b, self.buffers[name])]
        if moved:
            raise ModelError(
                f"{len(moved)} buffers of the frozen base have changed while training: {listed(moved)}; something calls "
                "or writes them behind the layers' backs"
            )

    # ---- keeping

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        """Remember the weights if they are the best so far, by `metric_for_best_model` (default: the loss)."""
        wanted = args.metric_for_best_model or "loss"
        key = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
        if key not in metrics:  # several evaluation sets: the Trainer calls once for each
            return
        higher = bool(args.greater_is_better) if args.metric_for_best_model else False
        score = metrics[key]
        best = self.best_score
        if best is not None and not (score > best if higher else score < best):
            return
        self.best_score, self.best = score, trained.snapshot(unwrap(model))
        if state.is_world_process_zero:
            kept = {"score": score, "metric": key, "step": state.global_step}
            checkpoint.write(Path(args.output_dir) / BEST, state.global_step, {"trained": self.best}, kept, "", 1)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Add the adapter to the Trainer's checkpoint, and seal it with a manifest."""
        root = unwrap(model)
        self._refuse_moved_buffers(root)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            keep_folder(root, folder / ADAPTER, self.name)
            seal(folder, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Put the best evaluation's weights into the model and keep its adapter."""
        root = unwrap(model)
        self._refuse_moved_buffers(root)
        if self.best:
            trained.restore(root, self.best)
        if state.is_world_process_zero:
            keep_folder(root, Path(args.output_dir) / ADAPTER, self.name)

    # ---- resume

    def newest(self, output_dir: str | os.PathLike[str]) -> str | None:
        """The newest whole checkpoint in `output_dir`, for `trainer.train(resume_from_checkpoint=...)`; None: none is.

        Every byte is verified; checkpoints that were cut short or changed are skipped, each with a line that says why.
        """
        for _, path in numbered(Path(output_dir)):
            try:
                verify(path)
            except DataError as error:
                print(f"skipped {error}", flush=True)
                continue
            return str(path)
        return None


def frozen_buffers(root: nn.Module) -> list[tuple[str, Tensor]]:
    """The persistent buffers (running statistics) of the base, unless the base itself is trained."""
    if any(p.requires_grad and f".{CHILD}." not in f".{n}" for n, p in root.named_parameters()):
        return []
    kept = root.state_dict(keep_vars=True)
    return [(name, b) for name, b in root.named_buffers() if name in kept and f".{CHILD}." not in f".{name}"]


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bits in equal shapes, wherever they are."""
    return one.shape == other.shape and torch.equal(one.to(other.device), other)


def keep_folder(model: nn.Module, folder: Path, name: str) -> None:
    """Save an adapter as `folder`, in the place of one that may be there."""
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    save(model, aside, name)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(aside, folder)


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """The Trainer's checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = [(p.name.removeprefix("checkpoint-"), p) for p in folder.iterdir() if p.name.startswith("checkpoint-")]
    return sorted(((int(n), p) for n, p in found if n.isdigit()), reverse=True)


def seal(folder: Path, step: int) -> None:
    """Write down every file of a checkpoint with its sha256, everything flushed, the manifest last."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != checkpoint.MANIFEST)
    listed_files = {}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        listed_files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest = {"step": step, "versions": checkpoint.versions(), "files": listed_files}
    checkpoint.write_atomic(folder / checkpoint.MANIFEST, json.dumps(manifest, indent=2))
    checkpoint.flush_folder(folder)


def verify(folder: Path) -> None:
    """Compare a sealed checkpoint with its manifest.

    Raises:
        DataError: it has none, or a file is missing, cut short or changed.
    """
    try:
        expected = json.loads((folder / checkpoint.MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder.name}: it has no whole {checkpoint.MANIFEST} ({type(error).__name__})") from error
    for name, facts in expected.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{folder.name}: {name} is missing")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != facts["sha256"]:
            raise DataError(f"{folder.name}: {name} is not what its manifest lists (sha256 differs)")
