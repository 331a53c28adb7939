"""Recipe defaults, file, command line; the words of other trainers; YAML's traps."""

from __future__ import annotations

import pytest
import yaml

from deltaw.errors import ConfigError, UnknownName
from deltaw.recipes.configure import ALIASES, ELSEWHERE, SWITCHES, build, load, parse
from deltaw.recipes.describe import commented, json_schema
from deltaw.recipes.recipe import recipes
from deltaw.training.config import RunConfig, method_variant
from deltaw.variants.dora import DoRA
from deltaw.variants.lora import LoRA

RECIPES = [name for name, _ in recipes.items()]


def test_later_wins(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("recipe: sentiment\nepochs: 7\nlr: 1e-4\ndata: {limit: 5}\n")
    config = load(str(path), ["epochs=9"])
    assert config.epochs == 9
    assert config.lr == 1e-4
    assert config.data.limit == 5
    assert config.data.split == "train", "the recipe's own default stays"
    assert config.batch_size == 32


VALUES = {
    "targets": ["query"],
    "train": ["classifier"],
    "model": "m",
    "data": "d.csv",
    "data.text": "t",
    "data.split": "test",
    "revision": "main",
    "schedule": "cosine",
    "lora.init": "pissa",
    "sft.packing": False,
}
HALVES = ("lora.dropout", "warmup", "data.validation")


@pytest.mark.parametrize("word", sorted(set(ALIASES) - {"task"}))
def test_known_words_mean_the_same(word):
    recipe = "sft" if ALIASES[word].startswith("sft.") else "sentiment"
    value = VALUES.get(ALIASES[word], 0.5 if ALIASES[word] in HALVES else 3)
    one = build({"recipe": recipe, **load_words({word: value})})
    other = build({"recipe": recipe, **load_words({ALIASES[word]: value})})
    assert one == other
    assert one != build({"recipe": recipe})


@pytest.mark.parametrize("word", sorted(SWITCHES))
def test_switches_of_other_trainers_say_something_when_on_and_nothing_when_off(word):
    plain = build({"recipe": "sentiment"})
    targets = {"targets": "query"} if word == "lora_target_linear" else {}
    on = build({"recipe": "sentiment", **load_words({**targets, word: True})})
    assert on == build({"recipe": "sentiment", **SWITCHES[word]})
    assert build({"recipe": "sentiment", **load_words({word: False})}) == plain


def test_choices_of_other_trainers_are_ours():
    assert load_words({"finetuning_type": "freeze"}) == {"method": "head"}
    assert load_words({"adapter": "qlora"}) == {"method": "lora", "quantize": "nf4"}
    with pytest.raises(ConfigError, match="unknown key 'adapter'"):
        build({"recipe": "sentiment", **load_words({"adapter": "llama-adapter"})})


@pytest.mark.parametrize("word", sorted(ELSEWHERE))
def test_words_without_a_key_here_say_where_to_look(word):
    with pytest.raises(ConfigError, match=f"unknown key '{word}': ") as told:
        build({"recipe": "sentiment", **load_words({word: 3})})
    assert "did you mean" not in str(told.value)


@pytest.mark.parametrize(("word", "near"), [("lerning_rate", "learning_rate"), ("lora_rnk", "lora_rank")])
def test_a_word_that_nobody_knows_is_refused_with_the_nearest(word, near):
    with pytest.raises(ConfigError, match=f"did you mean .*'{near}'"):
        build({"recipe": "sentiment", **load_words({word: 3})})


def load_words(words):
    from deltaw.recipes.configure import _merge

    given = {}
    _merge(given, words, "test")
    return given


@pytest.mark.parametrize("text", ["a=b #1.csv", "no", "123", "2026-01-02", "x: y.csv", "[x].csv", "1e3", "~/a.csv"])
def test_a_text_is_taken_as_it_is_typed(text):
    config = load("text-classification", [f"data={text}", f"data.label={text}", f"model={text}", "precision=no"])
    assert (config.data.path, config.data.label, config.model, config.precision) == (text, text, text, "no")


def test_quotes_braces_and_null_keep_their_meaning():
    config = load(
        "mnist", ["data={path: 'a #1.csv', label: x}", "data.text=' text '", "model=null", "mnist.source=1.0"]
    )
    assert (config.data.path, config.data.label, config.data.text) == ("a #1.csv", "x", " text ")
    assert (config.model, config.options["source"]) == (None, "1.0")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E+3", -2000.0),
        (".5e1", 5.0),
        ("3", 3),
        ("true", True),
        ("[a, b]", ["a", "b"]),
        ("null", None),
        ("1e-4x", "1e-4x"),
        ("a: [", "a: ["),
    ],
)
def test_values_are_yaml_with_scientific_numbers(text, value):
    assert parse(text) == value


@pytest.mark.parametrize("name", RECIPES)
def test_the_written_configuration_reads_back(name, tmp_path):
    config = build({"recipe": name})
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(config.nested()))
    assert load(str(path)) == config
    assert load(str(path)).digest() == config.digest()


@pytest.mark.parametrize("name", RECIPES)
def test_the_commented_file_is_the_default(name, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(commented(name))
    found = load(str(path))
    default = build({"recipe": name})
    for field in set(RunConfig.model_fields) - {"methods"}:
        assert getattr(found, field) == getattr(default, field), field
    assert json_schema(name)["properties"]["epochs"]["type"] == "integer"


def test_the_digest_ignores_what_does_not_decide():
    base = build({"recipe": "sentiment"})
    assert base.digest() == build({"recipe": "sentiment", "log_every": 3, "workers": 2}).digest()
    assert base.digest() != build({"recipe": "sentiment", "lora": {"rank": 3}}).digest()
    assert base.digest() != build({"recipe": "sentiment", "seed": 1}).digest()


def test_methods_take_their_sections_and_dora_loras():
    config = build({"recipe": "sentiment", "lora": {"rank": 4, "alpha": 4}, "dora": {"alpha": 6}})
    assert method_variant(config, "lora") == LoRA(rank=4, alpha=4)
    assert method_variant(config, "dora") == DoRA(rank=4, alpha=6)
    assert method_variant(config, "lora:16") == LoRA(rank=16, alpha=4)


def test_rates_per_method():
    config = build({"recipe": "sentiment", "lr": {"full": 1e-5, "default": 1e-3}})
    assert config.lr_for("full") == 1e-5
    assert config.lr_for("lora:4") == 1e-3
    with pytest.raises(ConfigError, match=r"lr has no value for method 'lora'"):
        RunConfig(recipe="sentiment", lr={"full": 1e-5}).lr_for("lora")


def test_unknown_things_have_neighbours():
    with pytest.raises(UnknownName, match="did you mean 'sentiment'"):
        load("sentimet")
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        build({"recipe": "sentiment", "batchsize": 3})
