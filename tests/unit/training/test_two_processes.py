"""Two processes (gloo, under torchrun) train to the same adapter as one with the same batch per step."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from safetensors.torch import load_file

from tests.tiny_text import make_data, make_model


def test_two_processes_equal_one(tmp_path):
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.csv", 83)  # 83: the last batch of an epoch is uneven

    def train(out, size, *launcher):
        settings = [
            "model=model",
            "data=data.csv",
            "epochs=2",
            "base_dropout=0",
            "bucket=false",
            "lr=1e-3",
            f"batch_size={size}",
        ]
        command = [
            sys.executable,
            *launcher,
            "-m",
            "deltaw.cli",
            "train",
            "text-classification",
            *settings,
            "--out",
            out,
        ]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return load_file(tmp_path / out / "adapter_model.safetensors")

    one = train("one", 8)
    two = train("two", 4, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert torch.allclose(tensor, two[key], atol=1e-6, rtol=0), key
    assert (tmp_path / "two" / "metrics.jsonl").read_text().count('"epoch", ') == 2, "one process writes the record"
