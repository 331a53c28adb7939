"""From data to a merged model through the command line, on a tiny real BERT."""

from __future__ import annotations

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaw as dw


def test_a_run_folder_is_an_adapter_folder_that_peft_loads(kept_run, tiny):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def base():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(tiny / "model", num_labels=2).eval()

    text = AutoTokenizer.from_pretrained(tiny / "model")("the film is wonderful", return_tensors="pt")
    text.pop("token_type_ids", None)
    theirs = PeftModel.from_pretrained(base(), kept_run).eval()
    ours = dw.load(base(), kept_run)
    with torch.no_grad():
        assert torch.allclose(theirs(**text).logits, ours(**text).logits, atol=1e-6)
    names = {p.name for p in kept_run.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.resolved.yaml",
        "metrics.jsonl",
        "results.json",
        "checkpoints",
    } <= names
    assert not [n for n in names if "tmp" in n]


def test_predict_prints_label_and_probabilities(deltaw, kept_run):
    out = deltaw("predict", kept_run, "the film is wonderful", "a dull story", "--json").out
    rows = [json.loads(line) for line in out.splitlines()]
    assert [r["text"] for r in rows] == ["the film is wonderful", "a dull story"]
    for row in rows:
        assert set(row["probabilities"]) == {"good", "bad"}
        assert sum(row["probabilities"].values()) == pytest.approx(1.0)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)


def test_predict_takes_lines_from_stdin(deltaw, kept_run):
    assert len(deltaw("predict", kept_run, input="one film\nanother story\n").out.splitlines()) == 2


def test_eval_repeats_the_runs_test_score(deltaw, kept_run):
    kept = json.loads((kept_run / "results.json").read_text())["test"]
    found = json.loads(deltaw("eval", kept_run, "--json").out)
    assert found["accuracy"] == kept["accuracy"]
    assert found["loss"] == pytest.approx(kept["loss"], rel=1e-5)


def test_eval_on_other_data(deltaw, kept_run, tmp_path):
    (tmp_path / "other.jsonl").write_text(
        '{"text": "a wonderful film", "label": "good"}\n{"text": "an awful film", "label": "bad"}\n'
    )
    assert json.loads(deltaw("eval", kept_run, "data=other.jsonl", "--json").out)["examples"] == 2


def test_eval_scores_every_row_with_a_text_and_a_label_and_counts_the_others(deltaw, kept_run, tmp_path):
    rows = "a wonderful film,good\na wonderful film,bad\na wonderful film,good\n,good\na film,\n"
    (tmp_path / "other.csv").write_text("text,label\n" + rows)
    done = deltaw("eval", kept_run, "data=other.csv", "--json")
    found = json.loads(done.out)
    assert found["examples"] == 3
    assert found["accuracy"] in (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert done.err == "note: dropped: 1 without text, 1 without label\n"


def test_eval_of_other_data_scores_the_split_that_is_asked_for_or_their_test_part(deltaw, kept_run, tmp_path):
    (tmp_path / "fold").mkdir()
    for split, rows in (("train", 3), ("validation", 2), ("test", 1)):
        lines = [f"a wonderful film {i},good\n" for i in range(rows)]
        (tmp_path / "fold" / f"{split}.csv").write_text("text,label\n" + "".join(lines))
    for given, rows in (("train", 3), ("validation", 2), ("test", 1)):
        found = json.loads(deltaw("eval", kept_run, "data=fold", "--split", given, "--json").out)
        assert (found["split"], found["examples"]) == (given, rows)
    assert deltaw("eval", kept_run, "data=fold").out.startswith("split test  examples 1  ")
    assert deltaw("eval", kept_run, "data=fold", "data.split=train").out.startswith("split train  examples 3  ")
    assert deltaw("eval", kept_run, "data=fold/train.csv").out.startswith("split all  examples 3  ")
    for wrong in ("data.split=validatoin", "--split=validatoin"):
        assert "did you mean 'validation'" in deltaw("eval", kept_run, "data=fold", wrong, code=3).err


def test_eval_and_predict_refuse_texts_longer_than_the_model(deltaw, kept_run, tmp_path):
    long = "film " * 80
    (tmp_path / "long.csv").write_text(f"text,label\n{long},good\n")
    said = deltaw("eval", kept_run, "data=long.csv", "max_length=100", code=2).err
    assert "max_length=100: the data have texts of 82 tokens" in said
    assert "set max_length=64" in said
    shutil.copytree(kept_run, tmp_path / "run")
    config = tmp_path / "run" / "config.resolved.yaml"
    config.write_text(config.read_text().replace("max_length: ", "max_length: 1"))
    assert "set max_length=64" in deltaw("predict", "run", long, code=2).err


def test_merge_gives_a_plain_model_that_says_the_same(deltaw, kept_run, tiny, tmp_path):
    deltaw("merge", kept_run, "--base", tiny / "model", "--out", "merged")
    from transformers import pipeline

    plain = pipeline("text-classification", str(tmp_path / "merged"), device="cpu")
    ours = json.loads(deltaw("predict", kept_run, "the film is wonderful", "--json").out)
    (theirs,) = plain("the film is wonderful")
    assert theirs["label"] == ours["label"]
    assert theirs["score"] == pytest.approx(max(ours["probabilities"].values()), abs=1e-6)
    assert not any("adapters" in key for key in load_file(tmp_path / "merged" / "model.safetensors"))


def test_merge_refuses_another_base(deltaw, kept_run, tiny, tmp_path):
    import shutil

    shutil.copytree(tiny / "model", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["encoder.layer.0.attention.self.query.weight"] += 0.1
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    err = deltaw("merge", kept_run, "--base", "other", "--out", "merged", code=2).err
    assert "another base" in err
    assert not (tmp_path / "merged").exists()


def test_mnist_on_real_digits_and_a_plain_module_merged_by_its_own_names(deltaw, tmp_path):
    out = deltaw(
        "compare",
        "mnist",
        "epochs=2",
        "mnist.pretrain_epochs=2",
        "mnist.hidden=[16]",
        'targets=["1","3"]',
        "--out",
        "digits",
    ).out
    assert "scikit-learn's 1,797 digits" in out
    results = json.loads((tmp_path / "digits" / "results.json").read_text())
    assert [m["method"] for m in results["methods"]] == ["base", "lora", "full"]
    assert results["methods"][0]["trainable"] == 0
    for name in ("report.html", "metrics.jsonl", "metric_over_epochs.png", "metric_over_time.png"):
        assert (tmp_path / "digits" / name).stat().st_size > 100
    base = tmp_path / "digits" / "pretrained" / "model" / "model.safetensors"
    deltaw("merge", "digits/lora", "--base", base, "--out", "merged")
    merged, before = load_file(tmp_path / "merged" / "model.safetensors"), load_file(base)
    assert merged.keys() == before.keys()
    assert not torch.equal(merged["1.weight"], before["1.weight"])
    adapter = dw.read(tmp_path / "digits" / "lora")
    for key, change in adapter.changes.items():
        assert torch.allclose(merged[key], before[key] + change.delta_weight(), atol=1e-6)
    assert torch.equal(merged["1.bias"], before["1.bias"])


def test_a_disk_without_room_for_a_plain_model_is_told_and_the_metrics_stay(deltaw, kept_run, tiny, tmp_path):
    small = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))}
    merge = ("merge", kept_run, "--base", tiny / "model", "--out", "merged")
    said = deltaw(*merge, code=2, **small).err
    assert "File too large: the model cannot be written" in said
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]
    data = (f"model={tiny / 'model'}", f"data={tiny / 'data.csv'}", "epochs=1", "keep_checkpoints=0", "--out", "full")
    said = deltaw("train", "text-classification", *data, "--method", "full", code=2, **small).err
    assert "File too large: the model cannot be written" in said
    assert {path.name for path in (tmp_path / "full").iterdir()} == {
        "config.resolved.yaml",
        "metrics.jsonl",
        "run.json",
    }


def test_a_yaml_file_of_init_runs(deltaw, tiny, tmp_path):
    deltaw("init", "text-classification")
    out = deltaw(
        "train",
        "text-classification.yaml",
        f"model={tiny / 'model'}",
        f"data={tiny / 'data.csv'}",
        "epochs=1",
        "method=head",
        "--out",
        "run",
        "--json",
    ).out
    results = json.loads(out)
    assert results["method"] == "head"
    from transformers import AutoModelForSequenceClassification

    whole = sum(p.numel() for p in AutoModelForSequenceClassification.from_pretrained(tiny / "model").parameters())
    assert results["parameters"] == {"trainable": 66, "total": whole, "share": 66 / whole}, "the head counts once"
    assert json.loads(deltaw("config", "schema", "mnist").out)["properties"]["mnist"]["properties"]["source"]
    assert "sentiment" in json.loads(deltaw("recipes", "--json").out)["recipes"]
    assert "text-classification" in deltaw("inspect", "run").out


def test_a_dry_run_says_what_would_be_and_writes_nothing(deltaw, tiny, tmp_path):
    arguments = ["train", "text-classification", f"model={tiny / 'model'}", f"data={tiny / 'data.csv'}", "--dry-run"]
    facts = json.loads(deltaw(*arguments, "--json").out)
    assert facts["trainable"] == 7746
    assert facts["steps"] == 15
    assert len(facts["samples"]) == 3
    assert facts["samples"][0].split()[0] in ("good", "bad")
    assert "trainable: 7,746 parameters (36.62% of the 21,154" in deltaw(*arguments).out
    assert list(tmp_path.iterdir()) == []
