"""The loop, on Accelerate: one for every task and method, resumable at any step.

What an optimizer step does is a function of (weights, optimizer state, generator state, step number); all four are in
a checkpoint, so a run that was killed goes on as if nothing had happened. The gradient of a step is the sum of the
loss over its examples (or tokens) divided by their number, however they are spread over micro-batches and processes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deltaw.errors import ConfigError, ModelError, NonFinite, OutOfMemory
from deltaw.model.gradients import check_gradients
from deltaw.model.groups import after_step
from deltaw.model.quantize import kernel_choices
from deltaw.model.state import names, whole
from deltaw.ops.choices import Choices
from deltaw.ops.compact import compact
from deltaw.training import checkpoint, trained
from deltaw.training.beginning import Beginning, check_same
from deltaw.training.config import RunConfig
from deltaw.training.flat_state import lay_flat
from deltaw.training.loader import ROWS, Epoch, micro_batches
from deltaw.training.order import batches
from deltaw.training.prefix import Prefix
from deltaw.training.prefix_run import train_mode
from deltaw.training.progress import Progress
from deltaw.training.record import Record
from deltaw.training.schedule import factor, steps
from deltaw.training.scoring import check_finite, evaluate, to_device
from deltaw.training.signals import Stop
from deltaw.training.task import Batch, Task
from deltaw.variants.adalora import orthogonality_loss

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class State:
    """Where a run stands. JSON; part of every checkpoint.

    batch: batches done in `epoch`. seconds: spent training, evaluation and checkpoints not counted. micro: examples
    per forward pass, smaller than batch_size after running out of memory.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    micro: int = 0
    best_epoch: float = 0.0
    best_score: float | None = None
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    recorded_bytes: int = 0


class Fit:
    """One run of training: `Fit(...).run()` returns the final State and leaves the chosen weights in the model.

    body: a recorded frozen prefix and its outputs per split, if there is one.
    frozen_body: a module that stays in eval mode because nothing in it is trained.
    began: marks of base and data, which checkpoints keep and a resumed run must have again, where they are known.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: RunConfig,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        *,
        record: Record,
        progress: Progress,
        stop: Stop,
        checkpoints: Path | None = None,
        body: tuple[Prefix, dict[str, list[Any]]] | None = None,
        frozen_body: nn.Module | None = None,
    ) -> None:
        self.bare, self.task, self.config, self.accelerator = model, task, config, accelerator
        self.record, self.progress, self.stop, self.checkpoints = record, progress, stop, checkpoints
        self.prefix: Prefix | None = None
        self.recorded: dict[str, list[Any]] = {}
        if body is not None:
            self.prefix, self.recorded = body
        self.frozen_body = frozen_body
        self.began: Beginning | None = None
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        lay_flat(self.optimizer)
        self.state = State(micro=config.batch_size)
        self.best: dict[str, Tensor] = {}
        world = accelerator.num_processes
        self.batch = config.batch_size * config.accumulate * world  # examples per optimizer step
        self.steps_per_epoch, self.total = steps(len(task.splits["train"]), self.batch, config.epochs)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.adapters = names(model)
        self.kernels = kernel_choices(model)
        self.sharded = any(isinstance(p, DTensor) for p in model.parameters())
        if self.sharded and isinstance(orthogonality_loss(model), Tensor):
            raise ConfigError("adalora ranks whole directions and cannot be sharded: train it without FSDP")
        if self.sharded and config.compact:
            raise ConfigError(
                "compact=true cannot tell gathered weights from activations, and would round them: train without FSDP"
            )

    # ---- resume

    def resume(self, found: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint."""
        state = dict(found.state)
        plain = state.pop("optimizer")
        state.pop("config")
        began = state.pop("began", None)
        if began is not None and self.began is not None:
            check_same(began, self.began)
        scaler, processes = state.pop("scaler", None), state.pop("processes", 1)
        if processes != self.accelerator.num_processes:
            raise ConfigError(
                f"the checkpoint was written by {processes} processes, now there are {self.accelerator.num_processes}: "
                "batch_size counts per process, so the batches would be others; resume with as many as before"
            )
        kernels = state.pop("kernels", None)
        if kernels is not None and self.kernels is not None:
            self.kernels.take(Choices.from_json(kernels))
        self.state = State(**state)
        trained.restore(self.bare, found.tensors["trained"])
        trained.unpack_optimizer(self.optimizer, found.tensors["optimizer"], plain)
        lay_flat(self.optimizer)
        if scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        trained.set_random_state(found.tensors[self._random_name()])
        self.best = found.tensors["best"]
        self.record.cut(self.state.recorded_bytes)

    def _random_name(self, rank: int | None = None) -> str:
        """The group of a checkpoint that holds a process's generators: dropout differs between processes."""
        rank = self.accelerator.process_index if rank is None else rank
        return "random" if rank == 0 else f"random-{rank}"

    def save(self) -> None:
        """Write a checkpoint of this very moment (the main process does, with what all of them hold)."""
        if self.checkpoints is None or self.config.keep_checkpoints == 0:
            return
        world = self.accelerator.num_processes
        now = {name: whole(t) for name, t in trained.trained_tensors(self.bare).items()}
        tensors, plain = trained.pack_optimizer(self.optimizer)
        generators = [trained.random_state()]
        if world > 1:
            generators = [{} for _ in range(world)]
            torch.distributed.all_gather_object(generators, trained.random_state())
        if self.accelerator.is_main_process:
            self.state.recorded_bytes = self.record.flush()
            groups = {
                "trained": now,
                "best": self.best,
                "optimizer": tensors,
                **{self._random_name(rank): found for rank, found in enumerate(generators)},
            }
            scaler = self.accelerator.scaler
            state = {
                **asdict(self.state),
                "optimizer": plain,
                "config": self.config.nested(),
                "began": self.began,
                "scaler": None if scaler is None else scaler.state_dict(),
                "processes": world,
                "kernels": None if self.kernels is None else self.kernels.to_json(),
            }
            checkpoint.write(
                self.checkpoints, self.state.step, groups, state, self.config.digest(), self.config.keep_checkpoints
            )
        self.accelerator.wait_for_everyone()

    # ---- training

    def run(self) -> State:
        """Train to the end (or until told to stop), then put the chosen weights into the model.

        Raises:
            NonFinite: a loss or gradient is not finite; checkpoints from before stay.
            OutOfMemory: a micro-batch of one example does not fit.
            Interrupted: a signal came; a checkpoint has been written.
        """
        state, config = self.state, self.config
        self.progress.start(self.total, state.step)
        while state.epoch < config.epochs and not self._out_of_patience():
            self._epoch()
        self.progress.finish()
        if config.keep == "best" and self.best:
            trained.restore(self.bare, self.best)
        return state

    def _judge(self) -> None:
        """Evaluate, and remember the weights if they are the best so far."""
        state = self.state
        scores = self.evaluate("validation")
        epoch = round(state.epoch + state.batch / self.steps_per_epoch, 4)
        row = {
            "epoch": epoch,
            "step": state.step,
            "seconds": round(state.seconds, 3),
            "train_loss": state.loss_sum / state.loss_weight,
            **scores,
        }
        state.loss_sum = state.loss_weight = 0.0
        state.history.append(row)
        if self._is_better(scores[self.task.metric]):
            state.best_epoch, state.best_score = epoch, scores[self.task.metric]
            self.best = trained.snapshot(self.bare)
        self.record.write({"event": "epoch", **row})
        self.progress.epoch(row, best=state.best_epoch == epoch)
        train_mode(self.model, self.frozen_body)

    def _epoch(self) -> None:
        """The rest of the current epoch."""
        state, config = self.state, self.config
        order = batches(len(self.task.splits["train"]), self.batch, config.seed, state.epoch, self._lengths("train"))
        epoch = Epoch(self.task, "train", config.seed, state.epoch, self.recorded.get("train"))
        train_mode(self.model, self.frozen_body)
        while state.batch < len(order):
            micro = state.micro
            steps = micro_batches(
                epoch,
                order[state.batch :],
                micro,
                rank=self.accelerator.process_index,
                world=self.accelerator.num_processes,
                workers=config.workers,
            )
            for micros in steps:
                try:
                    self._step(micros, len(order[state.batch]))
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    if not _is_out_of_memory(error):
                        raise
                    self._smaller_micro_batch(error)
                    break  # the same batch again, in smaller pieces
                self._after_step(len(order))
        state.epoch += 1
        state.batch = 0
        due = config.checkpoint_every == 0 or state.step % config.checkpoint_every == 0
        told = self._told_to_stop()
        if due or state.epoch == config.epochs or told:
            self.save()
        if told:
            self.stop.check()

    def _after_step(self, steps: int) -> None:
        """Count the step; evaluate, save and stop where it is time. `steps`: those of the epoch."""
        state, config = self.state, self.config
        state.step += 1
        state.batch += 1
        if state.batch in {math.ceil(i * steps / config.evaluations) for i in range(1, config.evaluations + 1)}:
            self._judge()
        if state.batch == steps:
            return  # the end of an epoch is `_epoch`'s
        told = self._told_to_stop()
        if told or (config.checkpoint_every and state.step % config.checkpoint_every == 0):
            self.save()
        if told:  # who is told from here on stops after the next step, when that is saved
            self.stop.check()

    def _told_to_stop(self) -> bool:
        """Whether a signal has come, to any of the processes: then all of them save and stop together."""
        if self.accelerator.num_processes > 1:
            own = torch.tensor([self.stop.number or 0], device=self.accelerator.device)
            self.stop.number = int(self.accelerator.gather(own).max()) or None
        return self.stop.asked()

    def _step(self, micros: Sequence[tuple[Batch, bool]], examples: int) -> None:
        """One optimizer step over the micro-batches of one global batch."""
        state, config = self.state, self.config
        started = time.perf_counter()
        random = trained.random_state()
        try:
            rate = factor(state.step, self.total, config.warmup, config.schedule)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            total = self._everywhere(sum(self.task.weight(batch) for batch, counts in micros if counts))
            loss_sum = torch.zeros((), device=self.accelerator.device)
            for i, (batch, counts) in enumerate(micros):
                last = i == len(micros) - 1
                with self._synced(last=last):
                    with self._saves():
                        loss, _ = self._loss(batch)
                    loss = loss if counts else loss * 0.0
                    # DDP averages over processes; the sum over all examples divided by their number is wanted
                    objective = loss * (self.accelerator.num_processes / total)
                    self.accelerator.backward(objective + orthogonality_loss(self.bare) if last else objective)
                loss_sum += loss.detach()
            norm = self._clip()
            self._refuse_non_finite(loss_sum, norm)
            if state.step == 0 and self.adapters:
                check_gradients(self.bare, self.adapters)
            self.optimizer.step()
            if not self.accelerator.optimizer_step_was_skipped:
                after_step(self.bare, state.step + 1)
            self.optimizer.zero_grad(set_to_none=True)
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)
            trained.set_random_state(random)
            raise
        spent = time.perf_counter() - started
        state.seconds += spent
        loss_value = self._everywhere(loss_sum.item())
        state.loss_sum += loss_value
        state.loss_weight += total
        facts = {
            "step": state.step + 1,
            "epoch": state.epoch + (state.batch + 1) / self.steps_per_epoch,
            "loss": loss_value / total,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "seconds": round(state.seconds, 3),
            "examples_per_second": round(examples / spent, 2),
        }
        self.progress.step(facts)
        if (state.step + 1) % config.log_every == 0:
            self.record.write({"event": "step", **facts})

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = batch.pop(ROWS, None)
        batch = to_device(batch, self.accelerator.device)
        with self.accelerator.autocast():
            if rows is None:
                return self.task.loss(self.model, batch)
            assert self.prefix is not None
            with self.prefix.playing(rows):
                return self.task.loss(self.model, batch)

    def _saves(self) -> Any:
        """How a training forward keeps what its backward needs."""
        return compact(self.bare) if self.config.compact else contextlib.nullcontext()

    def _synced(self, *, last: bool) -> Any:
        """Processes exchange gradients at the last micro-batch only."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def _everywhere(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.accelerator.num_processes == 1:
            return float(value)
        return float(
            self.accelerator.reduce(
                torch.tensor(value, dtype=torch.float64, device=self.accelerator.device), "sum"
            ).item()
        )

    def _clip(self) -> float:
        limit = math.inf if self.config.clip is None else self.config.clip
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        return float(whole(norm)) if norm is not None else 0.0

    def _refuse_non_finite(self, loss: Tensor, norm: float) -> None:
        if not math.isfinite(loss.item()):
            raise NonFinite(
                f"step {self.state.step + 1}: the loss is {loss.item()}; lower lr (now {self.optimizer.param_groups[0]['lr']:g}), or look at the data of this step"
            )
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            raise NonFinite(
                f"step {self.state.step + 1}: the gradient is not finite (norm {norm}); lower lr (now {self.optimizer.param_groups[0]['lr']:g}) or set clip=1.0"
            )

    def _smaller_micro_batch(self, error: BaseException) -> None:
        if self.accelerator.num_processes > 1:  # the others are waiting for this one's gradients of this micro-batch
            raise OutOfMemory(
                f"process {self.accelerator.process_index} ran out of memory ({error}); with several processes the "
                f"micro-batch is not changed on the way: set batch_size={max(1, self.config.batch_size // 2)} "
                f"accumulate={self.config.accumulate * 2}, the same batch per step"
            ) from error
        if self.state.micro == 1:
            raise OutOfMemory(
                f"a forward and backward pass of one example does not fit into memory ({error}): shorten max_length or take a smaller model"
            ) from error
        self.state.micro = max(1, self.state.micro // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.progress.say(
            f"out of memory at step {self.state.step + 1}: going on with {self.state.micro} examples per forward pass, the same {self.batch} per step"
        )

    # ---- evaluation

    def evaluate(self, split: str) -> dict[str, float]:
        """Loss and scores over a split, model in eval mode. Every process computes all of it.

        Raises:
            NonFinite: the loss is not finite.
        """
        scores = evaluate(self.model, self.task, self.config, split, self._loss, self.recorded.get(split))
        check_finite(scores, split)
        return scores

    def _lengths(self, split: str) -> Sequence[int] | None:
        return self.task.lengths(split) if self.config.bucket else None

    def _is_better(self, score: float) -> bool:
        if not math.isfinite(score):
            raise ModelError(f"the validation {self.task.metric} is {score}: the epoch cannot be judged")
        best = self.state.best_score
        return best is None or (score > best if self.task.higher_is_better else score < best)

    def _out_of_patience(self) -> bool:
        patience, state = self.config.patience, self.state
        return patience is not None and state.epoch - state.best_epoch >= patience


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
