"""Packed rows are exactly the conversations they hold: same losses, same gradients, none sees another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaw.training.chat_tokens import IGNORED, Tokens, answer_spans, tokens
from deltaw.training.conversations import Unusable
from deltaw.training.packing import collate, may_see, pack
from tests.tiny_chat import make_chat_model, make_tokenizer

pytest.importorskip("transformers")


@given(st.lists(st.integers(1, 50), max_size=200))
def test_packing_loses_nothing_and_fills_no_row_beyond_its_size(lengths):
    rows = pack(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)
    assert rows == pack(lengths, 50)
    if lengths:  # two rows of at most half would have been one, while both were open
        assert len(rows) <= max(1, 2 * sum(lengths) / 50 + 1 + len(lengths) / 64)


def test_an_example_that_is_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="51 tokens does not fit into rows of 50"):
        pack([3, 51], 50)


def test_positions_restart_and_attention_stays_within_a_conversation():
    a, b = Tokens([5, 6, 7], [IGNORED, 6, 7]), Tokens([8, 9], [8, 9])
    found = collate([[a, b], [a]], pad=0)
    assert found["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]
    assert found["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9], [IGNORED, 6, 7, IGNORED, IGNORED]]
    seen = may_see(found["segments"])[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert may_see(found["segments"]).any(-1).all()  # no row of the mask is empty


def talks(count=9):
    random = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        length = int(torch.randint(2, 24, (), generator=random))
        ids = torch.randint(4, 250, (length,), generator=random).tolist()
        found.append(Tokens(ids, [t if j > length // 3 else IGNORED for j, t in enumerate(ids)]))
        assert found[i].counted > 0
    return found


@pytest.mark.parametrize(("attention", "error"), [("sdpa", 1e-10), ("eager", 1e-5)])
def test_packed_losses_and_gradients_are_those_of_each_conversation_alone(tmp_path, attention, error):
    """In float64; transformers' eager attention takes its softmax in float32 all the same."""
    from transformers import AutoModelForCausalLM

    import deltaw as dw
    from deltaw.training.tasks.causal_lm import answers

    folder = make_chat_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).double().eval()
    torch.manual_seed(0)
    dw.attach(model, dw.LoRA(rank=4), "all-linear")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.2)

    def run(rows, packed):
        logits, wanted = answers(model, collate(rows, pad=0), packed=packed)
        loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        return loss, torch.autograd.grad(loss, list(trained.values())), len(wanted)

    every = talks()
    rows = [[every[i] for i in row] for row in pack([len(t.ids) for t in every], 40)]
    assert any(len(row) > 1 for row in rows)
    packed_loss, packed_grads, counted = run(rows, True)
    alone = [run([[one]], False) for one in every]
    bucketed_loss, bucketed_grads, _ = run([[one] for one in every], False)
    assert counted == sum(one.counted for one in every)
    total = sum(loss for loss, _, _ in alone)
    assert torch.allclose(packed_loss, total, rtol=error)
    assert torch.allclose(bucketed_loss, total, rtol=error)
    for i, name in enumerate(trained):
        expected = sum(grads[i] for _, grads, _ in alone)
        assert expected.abs().max() > 1e-4, name
        assert torch.allclose(packed_grads[i], expected, rtol=100 * error, atol=error), name
        assert torch.allclose(bucketed_grads[i], expected, rtol=100 * error, atol=error), name


# ---- which tokens the loss counts


def decoded(tokenizer, found):
    return tokenizer.decode([label for label in found.labels if label != IGNORED])


TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "uno"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "dos, é"},
]


def test_the_loss_counts_the_answers_and_their_ends_only():
    tokenizer = make_tokenizer()
    found = tokens(tokenizer, TALK, 200)
    assert (
        tokenizer.decode(found.ids)
        == "<|user|>one<|end|><|assistant|>uno<|end|><|user|>two<|end|><|assistant|>dos, é<|end|>"
    )
    assert decoded(tokenizer, found) == "uno<|end|>dos, é<|end|>"


def test_without_a_template_lines_are_used():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    found = tokens(tokenizer, TALK, 200)
    assert decoded(tokenizer, found) == " uno<|end|> dos, é<|end|>"
    assert tokenizer.decode(found.ids).startswith("User: one\nAssistant: uno<|end|>\nUser: two\n")


def test_an_answer_beyond_the_longest_length_makes_the_row_unusable():
    tokenizer = make_tokenizer()
    assert decoded(tokenizer, tokens(tokenizer, TALK, 10)) == "uno<|end|>"
    with pytest.raises(Unusable, match="begins beyond max_length=5"):
        tokens(tokenizer, TALK, 5)


def test_a_template_that_refuses_or_rewrites_is_not_guessed_around():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(Unusable, match="roles must alternate"):
        answer_spans(tokenizer, TALK)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last %}{{ m['content'] }}{% else %}...{% endif %}<|end|>{% endfor %}"
    with pytest.raises(ValueError, match="rewrites earlier messages"):
        answer_spans(tokenizer, TALK)
