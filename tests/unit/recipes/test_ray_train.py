"""Ray Train's TorchTrainer calls the same entry function: two workers end where one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltaw.errors import ConfigError
from deltaw.recipes.configure import build
from deltaw.recipes.start import start
from tests.tiny_text import make_data, make_model

pytest.importorskip("ray")
ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
import json, sys
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from deltaw.recipes.ray_train import train_func

ray.init(num_cpus=2, include_dashboard=False)
found = TorchTrainer(
    train_func, train_loop_config=json.loads(sys.argv[1]), torch_config=TorchConfig(backend="gloo"),
    scaling_config=ScalingConfig(num_workers=2), run_config=RunConfig(storage_path=sys.argv[2]),
).fit()
print("METRICS", json.dumps(found.metrics), found.checkpoint.path)
"""


def test_a_setting_is_missing_or_relative():
    from deltaw.recipes.ray_train import train_func

    with pytest.raises(ConfigError, match="train_loop_config has no 'out'"):
        train_func({"recipe": "sft"})
    with pytest.raises(ConfigError, match="give an absolute path"):
        train_func({"recipe": "sft", "out": "runs/a"})


@pytest.mark.slow
def test_two_workers_equal_one_process(tmp_path):
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.csv", 83)
    settings = {
        "recipe": "text-classification", "model": str(tmp_path / "model"), "data": str(tmp_path / "data.csv"),
        "epochs": 2, "base_dropout": 0.0, "bucket": False, "lr": 1e-3,
    }  # fmt: skip
    start(build({**settings, "batch_size": 8}), tmp_path / "one", quiet=True)
    asked = json.dumps({**settings, "batch_size": 4, "out": str(tmp_path / "two")})
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", asked, tmp_path / "store"],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert torch.allclose(tensor, two[key], atol=1e-6, rtol=0), key
    line = next(line for line in done.stdout.splitlines() if line.startswith("METRICS"))
    metrics = json.loads(line[len("METRICS ") : line.rindex("}") + 1])
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert metrics["loss"] == results["best"]["loss"]
    kept = load_file(Path(line[line.rindex("}") + 2 :]) / "adapter_model.safetensors")
    assert all(torch.equal(kept[k], two[k]) for k in two)
