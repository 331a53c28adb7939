"""The report's files, the study over a grid, outputs side by side, and the commands that write them."""

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import deltaw as dw
from deltaw import errors
from deltaw.analysis.findings import analyze
from deltaw.analysis.outputs import difference, total_variation
from deltaw.analysis.report import write
from deltaw.analysis.study import Run, study
from deltaw.analysis.study import write as write_study
from deltaw.cli.app import app

KEYS = ("layers.0.q.weight", "layers.0.v.weight", "layers.1.q.weight", "head.weight")


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(seed, rank=3, keys=KEYS):
    return dw.Adapter(
        {
            k: dw.Change(
                dw.LoRA(rank=rank),
                {"A": randn(seed * 100 + n, rank, 12), "B": randn(seed * 100 + 50 + n, 10, rank)},
                "linear",
            )
            for n, k in enumerate(keys)
        }
    )


BASE = {k: randn(n, 10, 12) for n, k in enumerate(KEYS)}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.outside, self.images, self.open = [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        at = dict(attrs)
        self.outside += [v for k, v in at.items() if k in ("src", "href") and not v.startswith("data:")]
        self.images += tag == "img"
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_page_with_every_picture_in_it(tmp_path):
    found = analyze({"one": adapter(1), "two": adapter(2), "<three>": adapter(3, rank=2)}, BASE)
    written = write(found, tmp_path)
    pictures = [p for p in written if p.suffix == ".png"]
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.outside == []
    assert page.images == len(pictures) >= 10
    assert "&lt;three&gt;" in text
    assert "<three>" not in text
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    facts = json.loads((tmp_path / "analysis.json").read_text())
    assert len(facts["pairs"]) == 3
    values = facts["adapters"]["one"]["weights"][0]["singular_values"]
    assert values == pytest.approx(dw.spectrum(adapter(1))[KEYS[0]].values)
    assert facts["amplification"]["two"][0]["factor"] == pytest.approx(
        dw.amplification(adapter(2), BASE)[KEYS[0]].factor
    )


class Counting(dict):
    reads = 0

    def __getitem__(self, key):
        self.reads += 1
        return super().__getitem__(key)


def test_every_base_weight_is_read_once_for_all_adapters_and_measures():
    made = {name: adapter(n) for n, name in enumerate(("one", "two", "three"))}
    base = Counting(BASE)
    found = analyze(made, base, top=5)
    assert base.reads == len(KEYS)
    for name, a in made.items():
        assert found.amplification[name] == dw.amplification(a, BASE)
        assert found.intruders[name] == dw.intruders(a, BASE)
        for key, expected in dw.overlap(a, BASE, top=5).items():
            assert torch.equal(found.overlap[name][key].phi, expected.phi)


def test_equal_analyses_give_equal_files(tmp_path):
    for name in ("a", "b"):
        write(analyze({"one": adapter(1)}, BASE), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_without_a_base_nothing_is_said_of_it_and_strangers_are_named(tmp_path):
    found = analyze({"one": adapter(1), "far": adapter(2, keys=("other.weight",))})
    write(found, tmp_path)
    assert not found.amplification
    assert "no weight in common" in found.apart["one", "far"]
    assert "no weight in common" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "amplification.png").exists()


def test_a_fresh_adapter_is_reported_as_unchanged(tmp_path):
    fresh = adapter(1)
    for change in fresh.changes.values():
        change.tensors["B"].zero_()
    write(analyze({"fresh": fresh}, BASE), tmp_path)
    assert "nothing was changed" in (tmp_path / "report.html").read_text()


def grid():
    runs = []
    for rank in (1, 2, 4):
        for seed in (0, 1):
            scores = {"accuracy": 0.7 + 0.05 * math.log2(rank) + 0.01 * seed}
            made = adapter(rank * 10 + seed, rank=rank)
            runs.append(Run(rank=rank, seed=seed, adapter=made, scores=scores, parameters=rank * 22, seconds=1.0))
    return runs


def test_a_study_tables_the_scores_and_compares_ranks_and_seeds(tmp_path):
    found = study(grid(), "accuracy", BASE)
    assert [r["rank"] for r in found.rows] == [1, 2, 4]
    assert found.rows[1]["mean"] == pytest.approx(0.755)
    assert found.rows[1]["spread"] == pytest.approx(np.std([0.75, 0.76], ddof=1))
    assert (found.ranks, found.seeds_rank, found.seeds) == ((2, 4), 4, (0, 1))
    expected = dw.similarity(adapter(20, rank=2), adapter(40, rank=4))
    assert torch.equal(found.across_ranks.mean()[0], expected.mean()[0])
    assert found.findings()[0] == (
        "Best accuracy at rank 4 (0.8050 ± 0.0071 over seeds); within that spread already from rank 4."
    )
    write_study(found, tmp_path, "title", "subtitle")
    assert Page((tmp_path / "report.html").read_text()).images == 4
    assert "| 2 | 44 | 0.7550 | 0.0071 |" in (tmp_path / "study.md").read_text()
    assert json.loads((tmp_path / "study.json").read_text())["rows"][0]["parameters"] == 22


def test_a_study_of_one_rank_and_seed_compares_nothing():
    found = study(grid()[:1], "accuracy")
    assert found.across_ranks is None
    assert found.across_seeds is None
    assert len(found.findings()) == 1


def test_outputs_are_compared_by_total_variation():
    one = [{"a": 0.9, "b": 0.1}, {"a": 0.6, "b": 0.4}, {"a": 0.2, "b": 0.8}]
    other = [{"a": 0.8, "b": 0.2}, {"a": 0.1, "b": 0.9}, {"a": 0.2, "b": 0.8}]
    found = difference(("x", "y"), one, other)
    assert found.distances == pytest.approx((0.1, 0.5, 0.0))
    assert found.order == (1, 0, 2)
    assert found.flips == (False, True, False)
    assert found.flipped == pytest.approx(1 / 3)
    assert found.table("pqr", one, other)[0]["y"] == "b"
    assert total_variation({"a": 1.0}, {"b": 1.0}) == 1.0
    with pytest.raises(errors.DataError, match="same inputs"):
        difference(("x", "y"), one, other[:1])
    with pytest.raises(errors.DataError, match="no probabilities"):
        difference(("x", "y"), one, [{} for _ in one])


class TestCommands:
    @pytest.fixture
    def folders(self, tmp_path):
        for n in (1, 2):
            dw.write(adapter(n), tmp_path / f"a{n}")
        save_file(BASE, tmp_path / "base.safetensors")
        return tmp_path

    def run(self, *arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)

    def test_analyze(self, folders):
        done = self.run(
            "analyze", folders / "a1", folders / "a2", "--base", folders / "base.safetensors", "-o", folders / "r"
        )
        assert done.exit_code == 0, done.output
        assert "a1 and a2: directions agree" in done.output
        assert (folders / "r" / "report.html").is_file()
        again = self.run("analyze", folders / "a1", "-o", folders / "r")
        assert isinstance(again.exception, errors.ConfigError)

    def test_combine(self, folders):
        done = self.run("combine", folders / "a1", folders / "a2", "-w", "0.6,-0.4", "-o", folders / "c")
        assert done.exit_code == 0, done.output
        assert "relative error against the exact sum" in done.output
        kept = dw.read(folders / "c")
        exact = 0.6 * adapter(1).changes[KEYS[0]].delta_weight() - 0.4 * adapter(2).changes[KEYS[0]].delta_weight()
        assert torch.allclose(kept.changes[KEYS[0]].delta_weight(), exact, atol=1e-5)
        assert max(kept.error.values()) < 1e-6

    def test_combine_by_blocks_and_how(self, folders):
        weights = json.dumps({"layers.0": [1, 0], "*": [0.5, 0.5]})
        out = ("-o", folders / "c", "--json")
        done = self.run(
            "combine", folders / "a1", folders / "a2", "-w", weights, "--how", "ties", "--density", 0.5, *out
        )
        assert done.exit_code == 0, done.output
        assert set(json.loads(done.output)["error"]) == set(KEYS)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("-w", "1,x"), "give numbers like"),
            (("-w", "1"), "1 weights for 2 adapters"),
            (("--how", "sum"), "unknown way to combine"),
            (("--density", "0.5"), "no option 'density'"),
            (("--base", "nowhere/at/all"), "no such file or folder"),
        ],
    )
    def test_combine_refuses_and_writes_nothing(self, folders, options, message):
        done = self.run("combine", folders / "a1", folders / "a2", "-o", folders / "c", *options)
        assert message in str(done.exception)
        assert not (folders / "c").exists()


class TestBaseFile:
    def test_names_are_found_with_and_without_the_task_models_prefix(self, tmp_path):
        from deltaw.compose.base_file import opened

        save_file({"encoder.w": randn(0, 2, 3), "pooler.w": randn(1, 2, 2)}, tmp_path / "model.safetensors")
        base = opened(str(tmp_path))
        assert torch.equal(base["bert.encoder.w"], base["encoder.w"])
        assert "bert.other.w" not in base
        save_file({"bert.encoder.w": randn(0, 2, 3)}, tmp_path / "model.safetensors")
        assert torch.equal(opened(str(tmp_path))["encoder.w"], randn(0, 2, 3))

    def test_shards(self, tmp_path):
        from deltaw.compose.base_file import opened

        save_file({"a.w": randn(0, 2, 3)}, tmp_path / "one.safetensors")
        save_file({"b.w": randn(1, 2, 3)}, tmp_path / "two.safetensors")
        index = {"weight_map": {"a.w": "one.safetensors", "b.w": "two.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        base = opened(str(tmp_path))
        assert sorted(base) == ["a.w", "b.w"]
        assert torch.equal(base["b.w"], randn(1, 2, 3))

    def test_refusals(self, tmp_path):
        from deltaw.compose.base_file import opened

        with pytest.raises(errors.ConfigError, match=r"no \.safetensors file"):
            opened(str(tmp_path))
        (tmp_path / "x.safetensors").write_bytes(b"no")
        with pytest.raises(errors.ConfigError, match="not a readable safetensors file"):
            opened(str(tmp_path / "x.safetensors"))
