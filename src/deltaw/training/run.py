"""One training run in its folder: from a task to an adapter (or a model), a record and a result.

RUN/  config.resolved.yaml  run.json (running, interrupted, finished)  metrics.jsonl  checkpoints/step-N/
      results.json  and the result itself: adapter_config.json + adapter_model.safetensors, or model/
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from deltaw.errors import ConfigError, DataError, OutOfMemory
from deltaw.io import save
from deltaw.io.folder import CONFIG as CONFIG_FILE
from deltaw.io.folder import WEIGHTS
from deltaw.model.groups import param_groups
from deltaw.model.quantize import kernel_choices
from deltaw.model.state import rosters
from deltaw.ops.choices import Choices
from deltaw.training import checkpoint, memory, trained
from deltaw.training.beginning import beginning
from deltaw.training.begun import begun
from deltaw.training.config import IRRELEVANT, RunConfig
from deltaw.training.fit import Fit
from deltaw.training.full_disk import writing
from deltaw.training.methods import Prepared, check_method, parameters, prepare, quantize_base
from deltaw.training.place import check_place
from deltaw.training.prefix_run import frozen_body, frozen_prefix, train_mode
from deltaw.training.progress import Progress
from deltaw.training.record import METRICS, Record, jsonable, recorded
from deltaw.training.scoring import to_device
from deltaw.training.signals import Interrupted, Stop
from deltaw.training.start_from_data import start_from_data
from deltaw.training.task import Task
from deltaw.training.trackers import Trackers, chosen

CONFIG = "config.resolved.yaml"
STATUS = "run.json"

RESULTS = "results.json"
FACTS = "deltaw_facts.json"


def train(
    make_task: Callable[[], Task], config: RunConfig, folder: Path, *, resume: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Run `config` in `folder` and return what results.json holds.

    make_task: builds the task; called once, so that nothing is read before the configuration is known to be right.
    resume: go on from the newest whole checkpoint in `folder`; without one, start afresh and say so.

    Raises:
        ConfigError, DataError, NonFinite, OutOfMemory: see their messages. A folder that was new is removed again
            unless it holds a checkpoint, or the metrics of a run that came to its last step.
        Interrupted: a signal came; the run can be resumed.
    """
    from accelerate import Accelerator

    check_method(config)
    check_place(folder)
    trackers = chosen(config.report_to)
    progress = Progress(config.method, quiet=quiet or int(os.environ.get("RANK", "0")) > 0)
    stop = Stop()
    with ExitStack() as stack:
        stack.enter_context(stop.listening())
        accelerator = Accelerator(mixed_precision=config.precision, cpu=not torch.cuda.is_available())
        task = make_task()
        stop.check()
        for note in task.notes:
            progress.say(note)
        model = task.build()
        began = beginning(model, task)
        plain = parameters(model)
        prepared = prepare(model, task, config, accelerator.num_processes)
        if (quantized := quantize_base(model, config)) is not None:
            progress.say(str(quantized))
            if resume:
                recall_kernels(model, folder / "checkpoints")
        model.to(accelerator.device)
        torch.manual_seed(config.seed + accelerator.process_index)  # dropout differs between processes
        earlier, loaded = memory.peak_bytes(), memory.loaded_bytes(model)
        size = {"trainable": parameters(model, trained=True), "total": plain}
        progress.say(
            f"{size['trainable']:,} parameters are trained ({size['trainable'] / plain:.2%} of the {plain:,} of the plain model)"
        )
        stop.check()
        main = accelerator.is_main_process
        fresh, trained_through = not folder.exists(), False
        accelerator.wait_for_everyone()
        if main:
            folder.mkdir(parents=True, exist_ok=True)
        checkpoints = folder / "checkpoints"
        record = Record(folder / METRICS if main else None)
        stack.callback(record.close)
        try:
            if main and not resume:
                write_config(folder, config)
            reports = Trackers(trackers if main else (), folder, config.recipe, config.nested(), progress.complain)
            record.follow = reports.report
            stack.callback(reports.finish)
            fit, spent_before = _fit(model, task, config, accelerator, prepared, record, progress, stop, checkpoints)
            fit.began = began
            if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not fit.sharded:
                progress.say(
                    "FSDP was asked for, but accelerate shards on GPUs only: each process holds the whole model"
                )
            if resume and prepared.trains:
                _continue(fit, checkpoints, config, progress, accelerator)
                if main:
                    write_config(folder, config)
            elif not resume:
                record.cut(0)
            fit.state.seconds = fit.state.seconds or spent_before
            stop.check()
            state = fit.run() if prepared.trains else fit.state
            trained_through = prepared.trains
            test = fit.evaluate("test") if "test" in task.splits else None
            validation = None if prepared.trains else fit.evaluate("validation")
            peak = _peak(accelerator.device)
            results: dict[str, Any] = {}
            chosen_weights = trained.snapshot(fit.bare) if fit.sharded else {}
            if main:
                bare = accelerator.unwrap_model(fit.model, keep_fp32_wrapper=False)
                if fit.sharded:  # the shards of the trained tensors, gathered, in a model that is whole
                    bare = task.build()
                    prepare(bare, task, config, accelerator.num_processes)
                    trained.restore(bare, chosen_weights)
                kept = keep_result(bare, task, config, prepared, folder, test)
                results = {
                    "recipe": config.recipe,
                    "method": config.method,
                    "model": task.model_name,
                    "metric": task.metric,
                    "higher_is_better": task.higher_is_better,
                    "parameters": {**size, "share": size["trainable"] / size["total"]},
                    "best": best_row(state.history, task) if state.history else {"epoch": 0, **(validation or {})},
                    "test": test,
                    "history": state.history,
                    "seconds": round(state.seconds, 3),
                    "peak_bytes": max(earlier, peak),
                    "peak_above_model_bytes": max(0, peak - loaded),
                    "kept_bytes": kept,
                    "examples": {name: len(rows) for name, rows in task.splits.items()},
                    "seed": config.seed,
                    "notes": task.notes,
                    "facts": task.facts(),
                    "versions": versions(),
                    "machine": machine(),
                }
                record.write({"event": "end", "step": state.step, "test": test, "seconds": results["seconds"]})
                checkpoint.write_atomic(folder / RESULTS, json.dumps(jsonable(results), indent=2) + "\n")
                set_status(folder, "finished", model)
                if config.keep_checkpoints:
                    checkpoint.remove_leftovers(checkpoints)
            accelerator.wait_for_everyone()  # what comes next may read what the main process has written
            return results
        except Interrupted:
            if not main:
                pass
            elif checkpoints.is_dir() or not fresh:
                set_status(folder, "interrupted", model)
                progress.complain(f"saved; go on with: deltaw resume {folder}")
            else:
                shutil.rmtree(folder)
            raise
        except BaseException as error:
            if main and fresh and not trained_through and not checkpoints.is_dir():
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, torch.OutOfMemoryError):
                raise OutOfMemory(
                    f"out of memory outside the training steps ({error}): take a smaller eval_batch_size or model"
                ) from error
            raise


def _fit(
    model: nn.Module,
    task: Task,
    config: RunConfig,
    accelerator: Any,
    prepared: Prepared,
    record: Record,
    progress: Progress,
    stop: Stop,
    checkpoints: Path,
) -> tuple[Fit, float]:
    """The loop, its optimizer, and the recorded frozen prefix; also the seconds that recording the training examples took."""
    if prepared.trains:
        start_from_data(model, task, config, accelerator.device, progress.say)
    body = frozen_body(model, task) if prepared.trains else None

    def answer(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with accelerator.autocast():
            return task.loss(model, to_device(batch, accelerator.device))

    recorded = (
        frozen_prefix(model, task, config, checkpoints.parent, answer, lambda: train_mode(model, body), progress.say)
        if prepared.trains
        else None
    )
    if prepared.trains:
        groups = param_groups(
            model, config.lr_for(config.method), config.b_ratio if config.b_ratio != 1.0 else None, config.weight_decay
        )
    else:
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.0}]
    for group in groups:
        group["initial_lr"] = group["lr"]
    optimizer = torch.optim.AdamW(groups, fused=True)
    fit = Fit(
        model,
        task,
        config,
        accelerator,
        optimizer,
        record=record,
        progress=progress,
        stop=stop,
        checkpoints=checkpoints,
        body=recorded[:2] if recorded is not None else None,
        frozen_body=body,
    )
    return fit, recorded[2] if recorded is not None else 0.0


def _continue(fit: Fit, checkpoints: Path, config: RunConfig, progress: Progress, accelerator: Any) -> None:
    if accelerator.is_main_process:
        checkpoint.remove_leftovers(checkpoints)
        checkpoint.remove_leftovers(checkpoints.parent)
    accelerator.wait_for_everyone()
    found, manifest, skipped = checkpoint.newest(checkpoints)
    for reason in skipped:
        progress.say(f"skipped {reason}")
    if found is None:
        progress.say("no checkpoint to resume from: starting afresh")
        fit.record.cut(0)
        return
    if manifest["config"] != config.digest():
        changed = differences(found.state.get("config", {}), config.nested())
        raise ConfigError(
            f"the checkpoint belongs to another configuration ({'; '.join(changed) or 'details unknown'}): "
            f"resume with the run's own {CONFIG}, or train into another folder"
        )
    if manifest["versions"] != checkpoint.versions():
        progress.say(f"note: the checkpoint was written with {manifest['versions']}; going on is not bit-identical")
    fit.resume(found)
    progress.say(f"resumed at step {fit.state.step} of {fit.total}")


def differences(before: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """ "key: before -> now" of every setting that decides the result and differs."""
    found = []
    for key in {**before, **now}:
        if not where and key in IRRELEVANT:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{where}{key}.")
        elif old != new:
            found.append(f"{where}{key}: {old} -> {new}")
    return found


def keep_result(
    model: nn.Module, task: Task, config: RunConfig, prepared: Prepared, folder: Path, test: dict[str, float] | None
) -> int:
    """Write what must be kept for the task; returns its size in bytes."""
    facts = jsonable({**task.facts(), "recipe": config.recipe, "test": test})
    if prepared.adapter is not None:
        for roster in rosters(model):
            notes = roster.notes.setdefault(prepared.adapter, {})
            notes |= {"base": {**notes.get("base", {}), "name": task.model_name}}
            notes |= {"extra": {**notes.get("extra", {}), **facts}}
        return keep_adapter(model, prepared.adapter, folder)
    if not prepared.trains:
        return 0
    aside = folder / "model.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    with writing(aside):
        task.keep_model(model, aside)
        checkpoint.write_atomic(aside / FACTS, json.dumps(facts, indent=2))
    checkpoint.open_modes(aside)
    final = folder / "model"
    shutil.rmtree(final, ignore_errors=True)
    os.rename(aside, final)
    return sum(p.stat().st_size for p in final.iterdir() if p.suffix == ".safetensors")


def keep_adapter(model: nn.Module, name: str, folder: Path) -> int:
    """Save an adapter among a run's other files; returns the size of its tensors' file."""
    aside = folder / "adapter.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    save(model, aside, name)
    files = sorted(aside.iterdir(), key=lambda p: p.name == CONFIG_FILE)  # last: its presence means that all are there
    for file in files:
        os.replace(file, folder / file.name)
    aside.rmdir()
    return (folder / WEIGHTS).stat().st_size


def best_row(history: list[dict[str, Any]], task: Task) -> dict[str, Any]:
    """The epoch with the best score."""
    return (max if task.higher_is_better else min)(history, key=lambda row: row[task.metric])


def write_config(folder: Path, config: RunConfig) -> None:
    """Write what the run is, and that it runs."""
    checkpoint.write_atomic(folder / CONFIG, yaml.safe_dump(config.nested(), sort_keys=False))
    set_status(folder, "running")


def set_status(folder: Path, state: str, model: nn.Module | None = None) -> None:
    """Note how far a run has come, which kernels the model's quantised weights run on, and where it was begun."""
    choices = None if model is None else kernel_choices(model)
    kernels = {} if choices is None else {"kernels": json.loads(choices.to_json())}
    checkpoint.write_atomic(folder / STATUS, json.dumps({"state": state, **kernels, **begun(folder)}) + "\n")


def recall_kernels(model: nn.Module, checkpoints: Path) -> None:
    """Take the kernels of the newest checkpoint before the model is first called, so that nothing is timed again."""
    choices = kernel_choices(model)
    found, _, _ = checkpoint.newest(checkpoints)
    if choices is not None and found is not None and found.state.get("kernels") is not None:
        choices.take(Choices.from_json(found.state["kernels"]))


def status(folder: Path) -> str:
    """How far the run in `folder` has come.

    Raises:
        DataError: it is no run, or its file is damaged.
    """
    path = folder / STATUS
    if not path.is_file():
        raise DataError(f"{folder} is no run: it has no {STATUS}")
    return str(recorded(path, "state")[0])


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.peak_bytes()


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    from importlib.metadata import version

    return {**checkpoint.versions(), **{name: version(name) for name in ("accelerate", "transformers", "numpy")}}


def machine() -> dict[str, Any]:
    """The machine, in words that explain its speed."""
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "architecture": platform.machine(),
        "features": [f for f in known if f in flags.split()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
