"""Bad input gives one message, the right exit code, and leaves nothing half-written."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import deltaw as dw
from deltaw.recipes.kept import open_kept


@pytest.fixture
def train(deltaw, tiny):
    """A training run that would be fine, but for what is added."""

    def call(*extra: object, code: int, data: object = None):
        return deltaw(
            "train",
            "text-classification",
            f"model={tiny / 'model'}",
            f"data={data or tiny / 'data.csv'}",
            "epochs=1",
            "--out",
            "run",
            *extra,
            code=code,
        )

    return call


WRONG = {
    "unknown recipe": (["train", "sentimnt"], "did you mean 'sentiment'"),
    "unknown key": (["train", "sentiment", "epocs=3"], "did you mean 'epochs'"),
    "unknown key of a method": (["train", "sentiment", "lora.rnk=3"], "did you mean 'rank'"),
    "unknown key of the data": (["train", "sentiment", "data.pth=x"], "did you mean 'path'"),
    "unknown key of the recipe": (["train", "mnist", "mnist.sorce=x"], "did you mean 'source'"),
    "missing file": (["train", "nothing.yaml"], "no such file"),
    "unknown method": (["train", "sentiment", "--method", "lara"], "did you mean 'lora'"),
    "unknown method of several": (["compare", "sentiment", "--methods", "lora,dorra"], "did you mean 'dora'"),
    "method twice": (["compare", "sentiment", "--methods", "lora,lora"], "given twice"),
    "rank 0": (["train", "sentiment", "lora.rank=0"], "rank=0: must be a whole number of at least 1"),
    "rank negative": (["train", "sentiment", "--method", "lora:-3"], "after the colon comes a rank"),
    "rank left out": (["train", "sentiment", "--method", "lora:"], "after the colon comes a rank"),
    "colon of a method without rank": (["train", "sentiment", "--method", "full:"], "'full' has no rank"),
    "rank a bool": (["train", "sentiment", "lora.rank=true"], "rank=True: must be a whole number"),
    "alpha 0": (["train", "sentiment", "lora.alpha=0"], "alpha=0: must be a finite number above 0"),
    "alpha negative": (["train", "sentiment", "alpha=-1"], "must be a finite number above 0"),
    "alpha a bool": (["train", "sentiment", "lora.alpha=true"], "alpha=True"),
    "epochs a bool": (["train", "sentiment", "epochs=true"], "epochs=True"),
    "epochs 0": (["train", "sentiment", "epochs=0"], "epochs=0"),
    "rate 0": (["train", "sentiment", "lr=0"], "lr=0: input should be greater than 0 or a valid dictionary"),
    "rate infinite": (["train", "sentiment", "lr=1e400", "--dry-run"], "lr=inf: input should be a finite number"),
    "rate of one method": (
        ["train", "sentiment", "lr={lora: -1}"],
        "error: lr.lora=-1: input should be greater than 0\n",
    ),
    "rate of no method": (["train", "sentiment", "lr={loraa: 1e-3}"], "unknown key 'lr.loraa'; did you mean 'lora'"),
    "seed": (["train", "sentiment", f"seed={2**63}"], f"less than or equal to {2**63 - 1}"),
    "schedule": (["train", "sentiment", "schedule=cosin"], "schedule='cosin'"),
    "not key=value": (["train", "sentiment", "epochs"], "not of the form key=value"),
    "missing argument": (["train"], "Missing argument"),
    "unknown option": (["train", "sentiment", "--metod", "lora"], "--metod"),
    "unknown command": (["trian", "sentiment"], "trian"),
    "seeds": (["compare", "sentiment", "--seeds", "0,x"], "whole numbers"),
}


@pytest.mark.parametrize("what", WRONG)
def test_configuration_errors(deltaw, tmp_path, what):
    arguments, message = WRONG[what]
    found = deltaw(*arguments, code=2)
    assert message in found.err
    assert "Traceback" not in found.err
    assert list(tmp_path.iterdir()) == []


def test_a_yaml_with_two_names_of_one_key(deltaw, tmp_path):
    (tmp_path / "a.yaml").write_text("recipe: sentiment\nepochs: 1\nnum_train_epochs: 2\n")
    assert "both names of 'epochs'" in deltaw("train", "a.yaml", code=2).err
    (tmp_path / "b.yaml").write_text("recipe: sentiment\nlora: {rank: 2}\nlora_r: 4\n")
    assert "'lora_r' and 'lora: rank' are both names of 'lora.rank'" in deltaw("train", "b.yaml", code=2).err
    (tmp_path / "c.yaml").write_text("recipe: sentiment\nlora: {rank: 2, r: 4}\n")
    assert "lora: rank, r name one key twice" in deltaw("train", "c.yaml", code=2).err


def test_a_yaml_with_a_key_twice_and_a_broken_one(deltaw, tmp_path):
    (tmp_path / "a.yaml").write_text("recipe: sentiment\nepochs: 1\nepochs: 2\n")
    assert "'epochs' is given twice" in deltaw("train", "a.yaml", code=2).err
    (tmp_path / "b.yaml").write_text("recipe: [\n")
    assert "not valid YAML" in deltaw("train", "b.yaml", code=2).err
    (tmp_path / "c.yaml").write_text("epochs: 1\n")
    assert "no `recipe:`" in deltaw("train", "c.yaml", code=2).err


def test_targets_that_match_nothing(train, tmp_path):
    found = train('targets=["query","valu"]', code=2)
    assert "'valu' matches no layer" in found.err
    assert "'value'" in found.err
    assert "'q_proj' matches no layer" in train("targets=q_proj", code=2).err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["lora", "head"])
def test_a_new_classifier_that_would_be_neither_trained_nor_kept_is_refused(train, tmp_path, method):
    said = train("train=[encoder.layer.0.attention.output.LayerNorm]", "--method", method, code=2).err
    assert "classifier, new in this model and filled at random" in said
    assert not (tmp_path / "run").exists()
    train("train=[classifier.weight,classifier.bias]", "--method", method, "--dry-run", code=0)


def test_train_that_matches_nothing(train, tmp_path):
    assert "train='poller'" in train("train=[classifier,poller]", code=2).err
    assert "train=[clasifier] leaves out classifier" in train("train=[clasifier]", code=2).err
    assert list(tmp_path.iterdir()) == []


DATA = {
    "missing file": (None, "no such file"),
    "empty": ("text,label\n", "no rows"),
    "one class": ("text,label\na film,good\nthe film,good\nit is,good\n", "only one class, 'good'"),
    "no text column": ("sentence,label\na film,good\n", "no column 'text'"),
    "no usable row": ("text,label\n,good\na film,\n", "no usable row"),
    "contradicting": ("text,label\na film,good\na film,bad\n", "no usable row"),
    "too few": ("text,label\na film,good\nthe film,bad\n", "too few"),
}


@pytest.mark.parametrize("what", DATA)
def test_data_errors(train, tmp_path, what):
    content, message = DATA[what]
    path = tmp_path / "data.csv"
    if content is not None:
        path.write_text(content)
    found = train(code=3, data=path)
    assert message in found.err, found.err
    assert "Traceback" not in found.err
    assert not (tmp_path / "run").exists()


def test_data_that_is_no_text_and_lines_that_are_no_json(train, tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    assert "cannot be read as csv" in train(code=3, data=tmp_path / "a.csv").err
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{oops\n')
    assert "line 2: not JSON" in train(code=3, data=tmp_path / "a.jsonl").err


def test_a_model_that_is_not_there(deltaw, tiny, tmp_path):
    near = tiny / "modle"
    err = deltaw(
        "train", "text-classification", f"model={near}", f"data={tiny / 'data.csv'}", "--out", "run", code=3
    ).err
    assert "no such folder" in err
    assert "'model'" in err
    assert list(tmp_path.iterdir()) == []


def test_pictures_that_are_not_there(deltaw, tmp_path):
    assert "no such file" in deltaw("train", "mnist", "mnist.source=nothing.npz", code=3).err
    (tmp_path / "bad.npz").write_bytes(b"PK\3\4 no")
    assert "not a readable npz" in deltaw("train", "mnist", "mnist.source=bad.npz", "--out", "run", code=3).err
    assert not (tmp_path / "run").exists()


def test_an_output_that_exists_is_left_alone(train, deltaw, kept_run, tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert "--out run exists" in train(code=2).err
    assert (tmp_path / "run" / "mine.txt").read_text() == "mine"
    assert "exists" in deltaw("merge", kept_run, "--base", tiny / "model", "--out", "run", code=2).err
    assert "exists" in deltaw("compare", "mnist", "--out", "run", code=2).err


PLACES = {
    "a file": "mine.txt",
    "under a file": "mine.txt/run",
    "a name that no disk takes": "deep/" + "x" * 300,
    "a dangling link": "away/run",
}


@pytest.mark.parametrize("what", PLACES)
def test_a_place_where_nothing_can_be_kept_is_told_before_anything_is_read(deltaw, tmp_path, what):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "away").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    place = tmp_path / PLACES[what]
    # the data do not exist either: exit code 3, had they been looked for
    for call in (
        ["train", "text-classification", "model=nothing"],
        ["compare", "text-classification", "model=nothing"],
    ):
        err = deltaw(*call, "data=nothing.csv", "--out", place, code=2).err
        assert str(place) in err
        assert "choose another" in err
        assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_only_what_a_command_of_ours_has_written_is_overwritten(train, deltaw, kept_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert "no command of ours has written it" in train("--overwrite", code=2).err
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(kept_run, tmp_path / "run")
    assert "unknown method" in train("--overwrite", "--method", "lara", code=2).err
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file(), "taken away for a method that does not exist"
    train("--overwrite", code=0)
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["history"]) == 1


def damaged(kept_run, tmp_path, change):
    folder = tmp_path / "adapter"
    shutil.copytree(kept_run, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "deltaw_manifest.json").unlink()
    return folder


def first(tensors: dict) -> str:
    return next(k for k in sorted(tensors) if "lora_A" in k)


ADAPTERS = {
    "missing tensor": lambda t: t.pop(first(t)),
    "extra tensor": lambda t: t.update({"base_model.model.bert.nothing.weight": t[first(t)].clone()}),
    "misshapen tensor": lambda t: t.update({first(t): t[first(t)][:, :-1].clone()}),
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_damaged_adapters(deltaw, kept_run, tiny, tmp_path, what):
    folder = damaged(kept_run, tmp_path, ADAPTERS[what])
    for arguments in (["predict", folder, "a film"], ["merge", folder, "--base", tiny / "model", "--out", "merged"]):
        found = deltaw(*arguments, code=2)
        assert "\nerror: " in "\n" + found.err, found.err
        assert "Traceback" not in found.err
    assert not (tmp_path / "merged").exists()


def test_not_finite_base_weights_at_merge(deltaw, kept_run, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["encoder.layer.0.attention.self.query.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    found = deltaw("merge", kept_run, "--base", "base", "--out", "merged", "--allow-base-mismatch", code=4)
    assert "query.weight" in found.err
    assert not (tmp_path / "merged").exists()


def test_a_loss_that_is_not_finite_ends_with_4(train, tmp_path):
    found = train("lr=1e30", "clip=null", "warmup=0", "epochs=20", code=4)
    assert "step" in found.err
    assert "lower lr" in found.err


def test_a_model_whose_answers_are_not_finite_is_neither_kept_nor_used(train, deltaw, kept_run, tiny, tmp_path):
    assert "the validation loss is nan" in train("lr=1e30", "batch_size=200", "warmup=0", code=4).err
    assert not (tmp_path / "run").exists()
    _, _, model = open_kept(kept_run)
    for name, parameter in model.named_parameters():
        if "adapters" in name:
            parameter.data *= 1e30
    dw.save(model, tmp_path / "huge")
    for name in ("config.resolved.yaml", "run.json", "results.json"):
        shutil.copy(kept_run / name, tmp_path / "huge")
    assert "'a film': the model's answer is not finite" in deltaw("predict", "huge", "a film", code=4).err
    assert "the test loss is nan" in deltaw("eval", "huge", code=4).err


def test_things_that_are_no_run(deltaw, tmp_path, kept_run):
    assert "no such folder" in deltaw("predict", "nothing", "a film", code=3).err
    (tmp_path / "empty").mkdir()
    assert "no run" in deltaw("predict", "empty", "a film", code=3).err
    assert "no run" in deltaw("resume", "empty", code=3).err
    assert "input 1 of 1 is empty" in deltaw("predict", kept_run, " ", code=3).err
    assert "\nerror: " in "\n" + deltaw("inspect", "empty", code=2).err


def test_damaged_files_of_a_run_are_named(deltaw, kept_run, tmp_path):
    shutil.copytree(kept_run, tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text("[1")
    assert "error: run/results.json is damaged" in deltaw("predict", "run", "a film", code=3).err
    (tmp_path / "run" / "run.json").write_text("[]")
    assert "error: run/run.json is damaged" in deltaw("resume", "run", code=3).err
    (tmp_path / "run" / "compare.json").write_text("{}")
    assert "error: run/compare.json is damaged" in deltaw("resume", "run", code=3).err


def test_one_sentence_says_what_a_value_may_be(deltaw):
    said = deltaw("train", "sentiment", "lr=abc", code=2).err
    assert "lr='abc': input should be a valid number or a valid dictionary\n" in said


def test_eval_refuses_settings_of_training(deltaw, kept_run):
    said = deltaw("eval", kept_run, "lora.rank=2", "epochs=9", "eval_batch_size=8", code=2).err
    assert "error: epochs, lora: a setting of training" in said or "error: lora, epochs: a setting of training" in said


def test_debug_shows_the_traceback(deltaw):
    assert "Traceback" in deltaw("--debug", "train", "sentimnt", code=2).err
    assert "Traceback" in deltaw("train", "sentimnt", "--debug", code=2).err


def test_a_run_that_was_not_finished_says_how_to_go_on(deltaw, kept_run, tmp_path):
    shutil.copytree(kept_run, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"state": "interrupted"}))
    assert "deltaw resume" in deltaw("predict", "run", "a film", code=3).err
