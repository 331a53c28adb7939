"""What strangers met at the command line: labels that do not agree, odd files and streams, options out of range."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import deltaw as dw
from deltaw import errors
from deltaw.cli.app import app
from deltaw.cli.commands.diff import inputs
from deltaw.cli.outputs import strict
from deltaw.recipes.kept import open_kept
from tests.tiny_chat import make_chat_model


def run(*arguments, code=0, **options):
    done = CliRunner().invoke(app, [str(a) for a in arguments], **options)
    if code == 0:
        assert done.exit_code == 0, (done.output, done.exception)
    return done


def relabelled(kept, folder, labels):
    """A copy of the adapter in `kept` that says other class names."""
    adapter = dw.read(kept)
    table = {str(n): name for n, name in enumerate(labels)}
    dw.write(adapter.replace(extra={**adapter.extra, "labels": labels, "id2label": table}), folder)
    return folder


@pytest.fixture
def other(kept_run, tmp_path):
    return relabelled(kept_run, tmp_path / "other", ["ham", "spam"])


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.txt").write_text("a wonderful film\na dull story\n")
    return tmp_path / "texts.txt"


@pytest.mark.parametrize("labels", [["ham", "spam"], ["good", "bad"]])
def test_diff_refuses_two_adapters_of_other_labels(kept_run, tmp_path, texts, labels):
    mine = dw.read(kept_run).extra["labels"]
    assert mine == ["bad", "good"]
    other = relabelled(kept_run, tmp_path / "other", labels)
    refused = run("diff", kept_run, other, "--data", texts, code=None).exception
    assert isinstance(refused, errors.ConfigError)
    assert f"{mine} apart and {other} {labels}" in str(refused)


def test_diff_of_equal_labels_goes_on(kept_run, tmp_path, texts):
    same = relabelled(kept_run, tmp_path / "same", ["bad", "good"])
    assert "mean distance 0.000" in run("diff", kept_run, same, "--data", texts).output


def test_combine_refuses_classifiers_of_other_labels(kept_run, other, tmp_path):
    refused = run("combine", kept_run, other, "-w", "0.5,0.5", "-o", tmp_path / "out", code=None).exception
    assert isinstance(refused, errors.ConfigError)
    assert "['bad', 'good'] in adapter 1 and of ['ham', 'spam'] in adapter 2" in str(refused)
    assert not (tmp_path / "out").exists()


def test_combine_takes_the_classifier_and_the_labels_of_one_adapter(kept_run, other, tmp_path):
    weights = '{"classifier": [0, 1], "*": [0.5, 0.5]}'
    run("combine", kept_run, other, "-w", weights, "-o", tmp_path / "out")
    assert dw.read(tmp_path / "out").extra["labels"] == ["ham", "spam"]


def test_combine_keeps_labels_that_agree_and_predict_prints_them(kept_run, tmp_path):
    adapter = dw.read(kept_run)
    few = {k: v for k, v in adapter.extra.items() if k != "id2label"}
    dw.write(adapter.replace(extra=few), tmp_path / "same")
    run("combine", kept_run, tmp_path / "same", "-w", "0.5,0.5", "-o", tmp_path / "out")
    assert dw.read(tmp_path / "out").extra["id2label"] == {"0": "bad", "1": "good"}
    said = run("predict", tmp_path / "out", "a dull story", "--json").stdout
    assert set(json.loads(said)["probabilities"]) == {"bad", "good"}


def test_combine_of_adapters_without_a_common_classifier_does_not_ask_for_labels(kept_run, other):
    adapters = [dw.read(kept_run), dw.read(other)]
    bodies = [
        a.replace(changes={k: c for k, c in a.changes.items() if not k.startswith("classifier")}) for a in adapters
    ]
    assert "labels" not in dw.combine(bodies).extra
    assert dw.combine([adapters[0], bodies[1]], [1, 0.5], base={}).extra["labels"] == ["bad", "good"]


def test_class_names_of_more_than_ten_classes_are_in_the_order_of_the_classes():
    from deltaw.compose.agreement import said_labels

    names = [f"name {n}" for n in range(12)]
    table = {str(n): names[n] for n in sorted(range(12), key=str)}
    assert said_labels({"id2label": table}) == names
    assert said_labels({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}) is None


def test_notes_do_not_mix_with_json(tiny, tmp_path):
    settings = [f"model={tiny / 'model'}", f"data={tiny / 'data.csv'}", "epochs=1", "quantize=int8"]
    run("train", "text-classification", *settings, "--out", tmp_path / "run")
    for arguments in (("predict", tmp_path / "run", "a film"), ("eval", tmp_path / "run")):
        done = run(*arguments, "--json")
        json.loads(done.stdout)
        assert "note: same base in another precision" in done.stderr


def test_json_of_numbers_that_are_not_finite():
    assert json.loads(strict({"a": [float("nan"), 1.5], "b": {"c": float("-inf")}})) == {
        "a": [None, 1.5],
        "b": {"c": None},
    }


def test_eval_writes_null_for_a_score_that_is_not_defined(kept_run, tmp_path):
    (tmp_path / "one.csv").write_text("text,label\na film,good\na story,good\n")
    said = run("eval", kept_run, f"data={tmp_path / 'one.csv'}", "--json").stdout
    assert None in json.loads(said, parse_constant=pytest.fail).values()


def test_predict_takes_only_utf8_from_stdin(kept_run):
    refused = run("predict", kept_run, input=b"a film\n\xff\xfe great\n", code=None).exception
    assert isinstance(refused, errors.DataError)
    assert "line 2 is not UTF-8" in str(refused)
    marked = run("predict", kept_run, "--json", input=b"\xef\xbb\xbfa film\r\na story\r\n").stdout
    assert [json.loads(line)["text"] for line in marked.splitlines()] == ["a film", "a story"]


def test_predict_refuses_an_empty_line_between_others(kept_run):
    refused = run("predict", kept_run, input=b"a film\n\na story\n", code=None).exception
    assert str(refused).startswith("input 2 of 3 is empty: every input needs a text")
    assert len(run("predict", kept_run, input=b"a film\na story\n\n").stdout.splitlines()) == 2
    assert str(run("predict", kept_run, input=b"", code=None).exception).startswith("no input: give texts")


def test_predict_takes_only_utf8_as_arguments(kept_run):
    refused = run("predict", kept_run, "\udcff great", code=None).exception
    assert isinstance(refused, errors.DataError)


def test_lines_of_stdin_come_one_by_one():
    code = "from deltaw.cli.commands.predict import typed\nfor line in typed(): print(repr(line), flush=True)"
    talk = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    talk.stdin.write(b"one\r\n")
    talk.stdin.flush()
    assert talk.stdout.readline() == b"'one'\n"
    talk.communicate()


def test_diff_refuses_answers_of_language_models(tmp_path, texts):
    make_chat_model(tmp_path / "talker")
    rows = [[{"role": "user", "content": f"a number {n}"}, {"role": "assistant", "content": "b"}] for n in range(8)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    settings = [f"model={tmp_path / 'talker'}", f"data={tmp_path / 'chat.jsonl'}", "epochs=1"]
    run("train", "sft", *settings, "--out", tmp_path / "run")
    refused = run("diff", tmp_path / "run", "--data", texts, code=None).exception
    assert isinstance(refused, errors.ConfigError)
    assert "cannot be compared" in str(refused)
    said = json.loads(run("predict", tmp_path / "run", "a number 1", "--json").stdout)
    assert said.keys() == {"text", "answer"}
    assert run("predict", tmp_path / "run", "a number 1").stdout == f"{said['answer']}  | a number 1\n"


def test_hub_search_refuses_no_examples_and_an_adapter_given_twice(kept_run, other):
    task = ["--task", "text-classification"]
    none = run("hub-search", kept_run, other, *task, "--examples", 0, code=None).exception
    assert isinstance(none, errors.ConfigError)
    assert "--examples 0" in str(none)
    twice = run("hub-search", kept_run, other, f"{kept_run}/", *task, code=None).exception
    assert isinstance(twice, errors.ConfigError)
    assert "given 2 times" in str(twice)


def test_hub_search_mixes_adapters_of_other_labels_and_names_the_tasks_own(kept_run, other, tiny, tmp_path):
    pytest.importorskip("nevergrad")
    settings = ["--set", f"model={tiny / 'model'}", "--set", f"data={tiny / 'data.csv'}", "--l1", 0]
    run("hub-search", kept_run, other, "-t", "text-classification", *settings, "--steps", 3, "-o", tmp_path / "hub")
    assert dw.read(tmp_path / "hub" / "adapter").extra["id2label"] == {"0": "bad", "1": "good"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.CSV", b"\xef\xbb\xbftext,label\r\na film,1\r\n,0\r\na story,1\r\n"),
        ("a.txt", b"\xef\xbb\xbfa film\n  \na story\n"),
        ("a.JSONL", b'\xef\xbb\xbf{"text": "a film"}\n{"text": null}\n{"text": "a story"}\n'),
    ],
)
def test_diff_reads_marked_files_and_leaves_empty_rows_out(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    assert inputs(tmp_path / name, "text") == ["a film", "a story"]
    assert "1 of 3 rows are empty" in capsys.readouterr().err


def test_diff_refuses_a_file_of_empty_rows_and_a_damaged_one(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"",1\n')
    with pytest.raises(errors.DataError, match="no text in its 1 rows"):
        inputs(tmp_path / "a.csv", "text")
    (tmp_path / "a.csv").write_bytes(b"text\n\xff\xfe\n")
    with pytest.raises(errors.DataError, match="not readable"):
        inputs(tmp_path / "a.csv", "text")


def test_diff_shows_at_least_one_row(kept_run, texts):
    assert run("diff", kept_run, "--data", texts, "-n", 0, code=None).exit_code == 2


def test_a_mismatch_of_bases_advises_what_the_command_line_has(kept_run, tiny, tmp_path, texts):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny / "model", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["encoder.layer.0.attention.self.query.weight"] += 0.1
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    merged = run("merge", kept_run, "--base", tmp_path / "base", "-o", tmp_path / "out", code=None).exception
    asked = run("predict", kept_run, "a film", "--model", tmp_path / "base", code=None).exception
    examined = run("doctor", kept_run, "--base", tmp_path / "base", code=None).exception
    _, _, model = open_kept(kept_run)
    model.bert.encoder.layer[0].attention.self.query.weight.data += 0.1
    dw.save(model, tmp_path / "b")
    compared = run("diff", kept_run, tmp_path / "b", "--data", texts, code=None).exception
    for refused, advice in (
        (merged, "--allow-base-mismatch"),
        (asked, "--model"),
        (examined, "--allow-base-mismatch"),
        (compared, "compare each with its base alone"),
    ):
        assert isinstance(refused, errors.BaseMismatch)
        assert advice in str(refused)
        assert "allow_base_mismatch" not in str(refused)


def test_what_a_run_names_is_found_from_another_directory(tiny, tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(tiny, home)
    monkeypatch.chdir(home)
    run("train", "text-classification", "model=model", "data=data.csv", "epochs=1", "--out", "run")
    here = [run(*arguments, "--json").stdout for arguments in (("predict", "run", "a film"), ("eval", "run"))]
    monkeypatch.chdir(elsewhere)
    there = [
        run(*arguments, "--json").stdout for arguments in (("predict", "../home/run", "a film"), ("eval", home / "run"))
    ]
    assert there == here
    state = json.loads((home / "run" / "run.json").read_text())
    results = (home / "run" / "results.json").read_bytes()
    (home / "run" / "run.json").write_text(json.dumps({**state, "state": "interrupted"}))
    assert "best validation" in run("resume", "../home/run").output
    before, after = json.loads(results), json.loads((home / "run" / "results.json").read_text())
    assert [before[k] for k in ("best", "test", "model")] == [after[k] for k in ("best", "test", "model")]


def test_a_comparison_goes_on_from_another_directory(tiny, tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(tiny, home)
    monkeypatch.chdir(home)
    settings = ["model=model", "data=data.csv", "epochs=1", "--methods", "head", "--out", "compared"]
    said = run("compare", "text-classification", *settings).output
    monkeypatch.chdir(elsewhere)
    shutil.rmtree(home / "compared" / "head")
    assert run("resume", "../home/compared").output.splitlines()[0] == said.splitlines()[0]
    assert not list(elsewhere.iterdir())


def test_a_run_that_has_moved_is_opened_with_the_names_that_it_has(tiny, tmp_path, monkeypatch):
    home, moved = tmp_path / "home", tmp_path / "moved"
    shutil.copytree(tiny, home)
    monkeypatch.chdir(home)
    run("train", "text-classification", "model=model", "data=data.csv", "epochs=1", "--out", "run")
    here = run("predict", "run", "a film", "--json").stdout
    monkeypatch.chdir(tmp_path)
    home.rename(moved)
    monkeypatch.chdir(moved)
    assert run("predict", "run", "a film", "--json").stdout == here


def test_compare_with_json_prints_nothing_else(tiny, deltaw):
    settings = [f"model={tiny / 'model'}", f"data={tiny / 'data.csv'}", "epochs=1", "--methods", "head", "--out", "out"]
    done = deltaw("compare", "text-classification", *settings, "--json")
    assert json.loads(done.out)["runs"][0]["method"] == "head"
    assert "[head]" in done.err


def test_extract_takes_a_full_fine_tune_with_a_new_head_over_a_plain_encoder(tiny, tmp_path):
    settings = [f"model={tiny / 'model'}", f"data={tiny / 'data.csv'}", "epochs=2", "method=full"]
    run("train", "text-classification", *settings, "--out", tmp_path / "full")
    run("extract", tmp_path / "full", "--base", tiny / "model", "--rank", "32", "--out", tmp_path / "kept")
    found = dw.read(tmp_path / "kept")
    assert found.changes["classifier.weight"].variant.kind == "full"
    assert {c.variant.kind for k, c in found.changes.items() if k.endswith("query.weight")} == {"lora"}
    said = [json.loads(run("predict", tmp_path / f, "a film", "--json").stdout) for f in ("full", "kept")]
    assert said[1]["probabilities"] == pytest.approx(said[0]["probabilities"], abs=1e-5)


def test_convert_of_a_rank_keeps_the_new_head_over_a_plain_encoder(kept_run, tiny, tmp_path):
    words = ["convert", kept_run, "--to", "peft", "--base", tiny / "model"]
    run(*words, "--rank", "4", "--out", tmp_path / "four")
    before, after = dw.read(kept_run), dw.read(tmp_path / "four")
    head = "classifier.weight"
    assert after.changes[head].tensors["value"].equal(before.changes[head].tensors["value"])
    narrow = {c.variant.rank for c in after.changes.values() if c.variant.kind == "lora"}
    assert narrow == {4}


def test_combine_says_what_becomes_of_a_head_that_the_base_does_not_have(kept_run, tiny, tmp_path):
    words = ["combine", kept_run, kept_run, "--base", tiny / "model", "--out", tmp_path / "blend"]
    refused = run(*words, code=None).exception
    assert isinstance(refused, errors.ConfigError)
    advice = str(refused).partition("for two adapters ")[2].strip("'")
    assert "the base has no classifier" in str(refused)
    run(*words, "--weights", advice)
    blend = dw.read(tmp_path / "blend")
    assert (
        blend.changes["classifier.weight"]
        .tensors["value"]
        .equal(dw.read(kept_run).changes["classifier.weight"].tensors["value"])
    )
