"""Mistakes that people make in their first hour with the package: each gets one message that says how to mend it."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
from torch import nn

import deltaw as dw
from deltaw.errors import BaseMismatch, ConfigError, DataError
from deltaw.training.rows import read_file


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dw.LoRA(8), r"by name, as in LoRA\(rank=8\)"),
        (lambda: dw.LoRA(rnk=8), "did you mean 'rank'"),
        (lambda: dw.IA3(rank=8), "IA3 has no option 'rank'"),
        (lambda: dw.attach(nn.Sequential(nn.Linear(2, 2)), dw.LoRA, ["0"]), "found the class LoRA"),
        (lambda: dw.spectrum("adapters/mine"), r"not on str: use dw\.read"),
        (lambda: dw.similarity(nn.Linear(2, 2), None), "not on Linear"),
        (lambda: dw.amplification("adapters/mine", {}), r"use dw\.read"),
        (lambda: dw.write(nn.Linear(2, 2), "x"), "not on Linear"),
        (lambda: dw.combine(["adapters/mine"]), r"use dw\.read"),
    ],
)
def test_calls(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_variants_are_values_still():
    variant = dw.DoRA(rank=3)
    assert pickle.loads(pickle.dumps(variant)) == variant == copy.deepcopy(variant)


def test_a_name_that_the_package_lacks():
    with pytest.raises(AttributeError, match="did you mean 'LoRA'"):
        dw.Lora  # noqa: B018
    assert not hasattr(dw, "_nothing")


def test_adapters_of_models_without_a_common_parameter_are_not_added_up(tmp_path):
    kept = []
    for layer in ("fc", "head"):
        model = nn.Sequential()
        model.add_module(layer, nn.Linear(3, 3))
        dw.attach(model, dw.LoRA(rank=1), [layer])
        kept.append(dw.read(dw.save(model, tmp_path / layer)))
    with pytest.raises(BaseMismatch, match="no parameter in common"):
        dw.combine(kept)
    assert len(dw.combine(kept, allow_base_mismatch=True).changes) == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "row 2: .* no object"),
        ("a.json", b'{"text": "a"}', "holds an object of 'text'; wanted: a list"),
        ("a.csv", b"text,label\na,1\nb, c,1\n", "row 2: 3 values for 2 columns"),
        ("a.csv", "text,label\ncafé,1\n".encode("latin1"), "save it as UTF-8"),
    ],
)
def test_data_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(read_file(tmp_path / name))


def test_a_missing_adapter_is_told_in_a_fresh_process(tmp_path):
    """huggingface_hub loads its submodules when they are first named: `hub.errors` need not be there."""
    pytest.importorskip("huggingface_hub")
    import subprocess

    code = f"""
import os; os.environ["HF_HUB_OFFLINE"] = "1"; os.environ["HF_HOME"] = {str(tmp_path)!r}
import deltaw as dw
import torch
try: dw.load(torch.nn.Linear(2, 2), "adapters/nothing")
except dw.errors.AdapterError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "'adapters/nothing' is no folder here" in done.stdout


def test_texts_that_are_longer_than_the_model_has_positions_for():
    from deltaw.training.hub import check_length, position_rows

    body = nn.Module()
    assert position_rows(body) is None
    body.position_embeddings = nn.Embedding(10, 4, padding_idx=1)  # RoBERTa's: two rows are no positions
    with pytest.raises(ConfigError, match=r"texts of 9 tokens.*some/model has positions for 8: set max_length=8"):
        check_length(9, 500, "some/model", position_rows(body))
    body.position_embeddings = nn.Embedding(9, 4)
    check_length(9, 500, "some/model", position_rows(body))


@pytest.mark.parametrize(
    ("line", "words"),
    [(["train", "sentiment", "--model", "x"], "key=value, without dashes"), ([], "Usage: ")],
)
def test_the_command_line(monkeypatch, capsys, line, words):
    from deltaw.cli.app import run

    monkeypatch.setattr(sys, "argv", ["deltaw", *line])
    with pytest.raises(SystemExit) as end:
        run()
    said = capsys.readouterr()
    assert end.value.code == 2
    assert words in (said.err if line else said.out)


def test_the_documentation_lists_every_name_and_every_command():
    root = Path(__file__).resolve().parents[2]
    text = "".join(page.read_text() for page in [root / "README.md", *(root / "docs").rglob("*.md")])
    assert [name for name in dw.__all__ if name != "__version__" and f"dw.{name}" not in text] == []
    for name in set(dw.__all__) - {"__version__", "errors"}:
        assert (getattr(dw, name).__doc__ or "").strip(), f"dw.{name} has no docstring"
    commands = {p.stem.replace("_", "-") for p in (root / "src/deltaw/cli/commands").glob("[a-z]*.py")}
    assert [name for name in sorted(commands) if f"deltaw {name}" not in text] == []
