"""torchrun, `accelerate launch` and FSDP2, two processes on the CPU: as one process, and resumed to the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltaw.recipes.configure import build
from deltaw.recipes.start import start
from tests.tiny_text import make_data, make_model

ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
import json, os, shutil, sys
from pathlib import Path
import torch
from deltaw.recipes.configure import build
from deltaw.recipes.start import start
from deltaw.training.fit import Fit

if "SHARD" in os.environ:  # accelerate itself shards on accelerators only: tell it that the CPU is one
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"],
        reshard_after_forward=True, cpu_ram_efficient_loading=False,
    )
    PartialState._shared_state.update(distributed_type=DistributedType.FSDP)
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)

seen = {"sharded": False, "processes": 0}
real = Fit.__init__
def watching(fit, *args, **kwargs):
    real(fit, *args, **kwargs)
    seen.update(sharded=fit.sharded, processes=fit.accelerator.num_processes)
Fit.__init__ = watching

for name, given in json.loads(sys.argv[1]).items():
    config, whole, again = build(given), Path(name), Path(name + "-again")
    start(config, whole, quiet=True)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.copytree(whole, again)
        for left in [*again.glob("adapter*"), *again.glob("*manifest*"), again / "results.json"]:
            left.unlink()
        for kept in (again / "checkpoints").iterdir():
            if kept.name != "step-4":
                shutil.rmtree(kept)
        (again / "run.json").write_text('{"state": "running"}')
    torch.distributed.barrier()
    start(config, again, resume=True, quiet=True)
    torch.distributed.barrier()
if "SHARD" in os.environ:  # a model that the user has sharded: every process saves, one writes
    import deltaw as dw
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    dw.attach(model, dw.DoRA(rank=1), targets=["0", "2"])  # one row over two processes: one of them holds nothing
    dw.save(model, f"whole-{torch.distributed.get_rank()}")
    for part in (model[0], model[2], model):
        fully_shard(part)
    assert (dw.save(model, "sharded") / "adapter_config.json").is_file()
if torch.distributed.get_rank() == 0:
    Path("seen.json").write_text(json.dumps(seen))
"""

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHERS = {
    "torchrun": TORCHRUN,
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no"],
    "fsdp2": TORCHRUN,
}  # fmt: skip


@pytest.mark.slow  # test_two_processes.py and tests/laws/test_wrappers.py are the short forms
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(tmp_path, launcher):
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.csv", 83)  # 83: the last batch of an epoch is uneven
    (tmp_path / "script.py").write_text(SCRIPT)
    plain = {
        "recipe": "text-classification", "model": str(tmp_path / "model"), "data": str(tmp_path / "data.csv"),
        "epochs": 2, "base_dropout": 0.0, "bucket": False, "lr": 1e-3, "batch_size": 4, "checkpoint_every": 4,
        "keep_checkpoints": 9, "keep": "last",
    }  # fmt: skip
    dropping = {**plain, "base_dropout": 0.1, "bucket": True, "lora": {"dropout": 0.2}, "accumulate": 2}
    dropping |= {"batch_size": 2, "method": "dora"}
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], "script.py", json.dumps({"plain": plain, "dropping": dropping})],
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **({"SHARD": "1", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if launcher == "fsdp2" else {}),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "seen.json").read_text()) == {"sharded": launcher == "fsdp2", "processes": 2}

    def weights(name):
        return load_file(tmp_path / name / "adapter_model.safetensors")

    for name in ("plain", "dropping"):
        one, other = weights(name), weights(f"{name}-again")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one), f"{name}: resumed to other bits"
        assert all(t.numel() for t in one.values())
    if launcher == "fsdp2":
        for file in (tmp_path / "whole-0").iterdir():
            assert (tmp_path / "sharded" / file.name).read_bytes() == file.read_bytes(), file.name
    start(build({**plain, "batch_size": 8}), tmp_path / "alone", quiet=True)
    alone, two = weights("alone"), weights("plain")
    assert alone.keys() == two.keys()
    for key, tensor in alone.items():
        assert torch.allclose(tensor, two[key], atol=1e-6, rtol=0), key
