"""`study`, `hub-search` and `diff` through the command line, on a tiny real BERT."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

import deltaw as dw
from deltaw import errors
from deltaw.cli.app import app
from tests.tiny_text import make_data


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if code == 0:
        assert done.exit_code == 0, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def study(tiny, tmp_path_factory):
    """A finished study of ranks 1 and 2 and two seeds; its runs are adapters to search with and to compare."""
    folder = tmp_path_factory.mktemp("study") / "s"
    options = [f"model={tiny / 'model'}", f"data={tiny / 'data.csv'}", "epochs=2", "lr=5e-3"]
    arguments = ["study", "text-classification", *options, "--ranks", "1,2", "--seeds", 2, "--out", folder]
    return folder, arguments, run(*arguments).output


def test_study_writes_tables_figures_and_findings(study):
    folder, _, said = study
    names = {p.name for p in folder.iterdir()}
    assert {"study.json", "study.md", "report.html", "metric-over-rank.png", "similarity-ranks.png"} <= names
    assert {"similarity-seeds.png", "amplification.png", "runs"} <= names
    facts = json.loads((folder / "study.json").read_text())
    assert [row["rank"] for row in facts["rows"]] == [1, 2]
    assert [len(row["values"]) for row in facts["rows"]] == [2, 2]
    for row in facts["rows"]:
        kept = [json.loads((folder / f"runs/rank{row['rank']}-seed{s}/results.json").read_text()) for s in (0, 1)]
        assert row["values"] == [k["test"]["accuracy"] for k in kept]
    a, b = (dw.read(folder / f"runs/rank{r}-seed0") for r in (1, 2))
    key, expected = next(iter(dw.similarity(a, b).items()))
    (found,) = [w for w in facts["across_ranks"]["weights"] if w["weight"] == key]
    assert found["first"] == pytest.approx(expected.at(1, 1))
    assert all(sentence in said for sentence in facts["findings"])
    pictures = re.findall(r"\]\((.*?\.png)\)", (folder / "study.md").read_text())
    assert len(pictures) == 3
    assert set(pictures) <= names


def test_a_finished_study_is_not_trained_again_and_other_settings_are_refused(study):
    folder, arguments, _ = study
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/adapter_model.safetensors")}
    run(*arguments)
    assert before == {p: p.stat().st_mtime_ns for p in before}
    refused = run(*arguments, "epochs=1", code=None)
    assert isinstance(refused.exception, errors.ConfigError)
    assert "was run with other settings" in str(refused.exception)


def test_hub_search_keeps_what_it_found_goes_on_and_says_who_wins(study, tiny, tmp_path):
    pytest.importorskip("nevergrad")
    make_data(tmp_path / "new.csv", count=100, seed=7)
    sources = [study[0] / f"runs/rank2-seed{s}" for s in (0, 1)]
    settings = ["--set", f"model={tiny / 'model'}", "--set", f"data={tmp_path / 'new.csv'}"]
    arguments = ["hub-search", *sources, "--task", "text-classification", *settings]
    options = ["--examples", 12, "--steps", 6, "--seed", 1, "--out", tmp_path / "hub", "--json"]
    facts = json.loads(run(*arguments, *options).stdout)
    assert facts["examples"]["count"] == 12
    assert set(facts["held_out"]) == {"base alone", "rank2-seed0", "rank2-seed1", "found"}
    best = facts["best"]["weights"]
    assert best in [step["weights"] for step in facts["steps"]]
    assert (tmp_path / "hub" / "trace.png").read_bytes().startswith(b"\x89PNG")
    if any(best):
        parts = [dw.read(source) for source in sources]
        key = next(iter(parts[0].changes))
        exact = sum(w * p.changes[key].delta_weight().double() for w, p in zip(best, parts))
        kept = dw.read(tmp_path / "hub" / "adapter").changes[key].delta_weight().double()
        assert float((kept - exact).norm()) < 1e-6 * float(exact.norm())
    trace = (tmp_path / "hub" / "trace.jsonl").read_text()
    assert len(trace.splitlines()) == 1 + 3 + 6
    assert json.loads(run(*arguments, *options).stdout) == facts
    assert (tmp_path / "hub" / "trace.jsonl").read_text() == trace
    other = run(*arguments, *options[:-2], tmp_path / "hub", "--l1", 0.5, code=None)
    assert "another search" in str(other.exception)


def test_hub_search_without_a_better_weighting_keeps_no_adapter(study, tiny, tmp_path):
    pytest.importorskip("nevergrad")
    settings = ["--set", f"model={tiny / 'model'}", "--set", f"data={tiny / 'data.csv'}", "--l1", 1e6]
    sources = [study[0] / f"runs/rank1-seed{s}" for s in (0, 1)]
    out = tmp_path / "hub"
    said = run("hub-search", *sources, "-t", "text-classification", *settings, "--steps", 2, "-o", out).output
    assert "no adapter is kept" in said
    assert not (out / "adapter").exists()
    assert json.loads((out / "results.json").read_text())["best"]["weights"] == [0.0, 0.0]


def test_diff_lists_what_changes_most(study, tmp_path):
    texts = ["the film is wonderful", "a dull story", "the actor and the music"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    one, other = (study[0] / f"runs/rank2-seed{s}" for s in (0, 1))
    found = json.loads(run("diff", one, other, "--data", tmp_path / "texts.txt", "--json").stdout)
    pairs = [tuple(d["of"]) for d in found]
    assert pairs == [("base", "rank2-seed0"), ("base", "rank2-seed1"), ("rank2-seed0", "rank2-seed1")]
    for d in found:
        sizes = [row["distance"] for row in d["inputs"]]
        assert sizes == sorted(sizes, reverse=True)
        assert {row["input"] for row in d["inputs"]} == set(texts)
        assert d["mean_distance"] == pytest.approx(sum(sizes) / len(sizes))
    predicted = run("predict", other, *texts, "--json").stdout.splitlines()
    answers = {row["text"]: row["probabilities"] for row in map(json.loads, predicted)}
    for row in found[1]["inputs"]:
        assert row["probabilities"]["rank2-seed1"] == pytest.approx(answers[row["input"]], abs=1e-6)
    said = run("diff", one, "--data", tmp_path / "texts.txt", "-n", 1).output
    assert "base and rank2-seed0: mean distance" in said
    assert len(said.splitlines()) == 2


def test_diff_refuses_what_it_cannot_compare(study, tmp_path):
    one = study[0] / "runs/rank1-seed0"
    (tmp_path / "a.csv").write_text("sentence\na film\n")
    refusals = {
        ("--data", tmp_path / "no.txt"): "no such file",
        ("--data", tmp_path / "a.csv"): "has no 'text'",
    }
    for options, message in refusals.items():
        assert message in str(run("diff", one, *options, code=None).exception)
    assert "3 were given" in str(run("diff", one, one, one, "--data", tmp_path / "a.csv", code=None).exception)
