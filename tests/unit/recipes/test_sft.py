"""sft: a tiny Llama learns to answer, packed or not; its result talks beside its base."""

from __future__ import annotations

import pytest
import torch

from deltaw.errors import ConfigError
from deltaw.recipes.configure import build
from deltaw.recipes.kept import score
from deltaw.recipes.start import start
from deltaw.recipes.talking import Talk
from tests.tiny_chat import make_chat_model, make_talks

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    make_chat_model(folder / "model")
    make_talks(folder / "talks.jsonl")
    return folder


def configured(chat, **changed):
    given = {
        "recipe": "sft",
        "model": str(chat / "model"),
        "data": {"path": str(chat / "talks.jsonl"), "validation": 0.2, "test": 0.1},
        "max_length": 96,
        "epochs": 8,
        "batch_size": 1,
        "lr": 2e-2,
    }
    return build({**given, **changed})


@pytest.fixture(scope="module")
def kept(chat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "run"
    return folder, start(configured(chat), folder, quiet=True)


def test_perplexity_falls_and_before_is_that_of_the_base(chat, kept, tmp_path):
    folder, results = kept
    before = results["facts"]["before"]
    assert results["best"]["perplexity"] < 0.5 * before["perplexity"]
    untouched = start(configured(chat, method="base", sft={"before": False}), tmp_path / "base", quiet=True)
    assert untouched["best"]["perplexity"] == pytest.approx(before["perplexity"], rel=1e-6)
    assert score(folder, [], "validation")["perplexity"] == pytest.approx(results["best"]["perplexity"], rel=1e-5)
    assert score(folder, [f"data={chat / 'talks.jsonl'}"])["split"] == "all"
    assert any("[[aa<|end|>]]" in n or "<|end|>]]" in n for n in results["notes"])


def test_packed_and_unpacked_see_the_same_data(chat, tmp_path):
    scores = []
    for packing in (True, False):
        config = configured(chat, method="base", sft={"packing": packing, "before": False})
        scores.append(start(config, tmp_path / str(packing), quiet=True)["best"])
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-5)
    assert scores[0]["token_accuracy"] == pytest.approx(scores[1]["token_accuracy"])


def test_base_and_adapter_talk_side_by_side(chat, kept):
    from deltaw.training.tasks.causal_lm import CausalLM

    folder, _ = kept
    talk = Talk(folder, max_new=6)
    answers = talk.say("a number 1")
    assert list(answers) == ["base", "adapter"]
    untouched = CausalLM(configured(chat), read="no")
    plain = untouched.build().eval()
    assert answers["base"] == untouched.answer(plain, [{"role": "user", "content": "a number 1"}], max_new=6)
    assert answers["adapter"] != answers["base"]
    again = talk.say("b number 2")
    heard = [
        {"role": "user", "content": "a number 1"},
        {"role": "assistant", "content": answers["base"]},
        {"role": "user", "content": "b number 2"},
    ]
    assert again["base"] == untouched.answer(plain, heard, max_new=6)


def test_draws_depend_on_the_seed_only(kept):
    folder, _ = kept
    talks = [Talk(folder, alone=True, max_new=8, temperature=1.5, seed=s).say("c number 3") for s in (1, 1, 2)]
    assert talks[0] == talks[1] != talks[2]


def test_a_fully_trained_model_talks_beside_its_base(chat, tmp_path):
    start(configured(chat, method="full", epochs=2, lr=1e-2), tmp_path / "run", quiet=True)
    answers = Talk(tmp_path / "run", max_new=12).say("a number 1")
    assert answers["base"] != answers["adapter"]


def test_only_language_models_talk(tmp_path):
    from tests.tiny_text import make_data, make_model

    make_model(tmp_path / "model")
    make_data(tmp_path / "data.csv", 60)
    config = build(
        {
            "recipe": "text-classification",
            "model": str(tmp_path / "model"),
            "data": {"path": str(tmp_path / "data.csv")},
            "epochs": 1,
        }
    )
    start(config, tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match="TextClassification, not a language model"):
        Talk(tmp_path / "run")


def test_masks_are_given_as_each_attention_takes_them(chat):
    from transformers import AutoModelForCausalLM

    from deltaw.training.packing import may_see
    from deltaw.training.tasks.causal_lm import _as_mask

    allowed = may_see(torch.tensor([[1, 1, 2, 0]]))
    for kind, dtype in (("sdpa", torch.bool), ("eager", torch.float32)):
        model = AutoModelForCausalLM.from_pretrained(chat / "model", attn_implementation=kind)
        assert _as_mask(allowed, model).dtype == dtype


def test_conversations_longer_than_the_model_has_positions_for_are_refused(chat, tmp_path):
    make_chat_model(tmp_path / "model", max_position_embeddings=8)
    with pytest.raises(ConfigError, match=r"max_length=96: .* texts of \d+ tokens.* positions for 8: set max_length=8"):
        start(configured(chat, model=str(tmp_path / "model")), tmp_path / "run", quiet=True)


def test_a_dry_run_shows_which_tokens_the_loss_counts(chat):
    from deltaw.recipes.recipe import recipes
    from deltaw.training.rehearsal import rehearse, text

    config = configured(chat, sft={"before": False})
    facts = rehearse(lambda: recipes["sft"].task(config), config)
    assert all("[[" in sample and "<|end|>]]" in sample for sample in facts["samples"])
    assert facts["peak_bytes"] > facts["gradient_bytes"] + facts["optimizer_bytes"] > 0
    assert "at its peak about" in text(facts)
