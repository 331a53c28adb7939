"""DeltawCallback under transformers.Trainer and TRL's SFTTrainer: checks, sealed checkpoints, equal bits after a resume."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import ConfigError, ModelError, NonFinite, UnknownName

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.filterwarnings("ignore")]

from deltaw.training.callback import DeltawCallback  # noqa: E402


class Parity(torch.utils.data.Dataset):
    """Six tokens each; the label is whether their sum is odd."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(1, 20, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids.sum() % 2)}


class Killed(BaseException):
    """Nothing catches it."""


class KillAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


def bert(variant=None, **attached):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config)
    variant = dw.LoRA(rank=2, dropout=0.1) if variant is None else variant
    return dw.attach(model, variant, ["query", "value"], train=["classifier"], **attached)


def trainer(model, folder, *callbacks, **changed):
    given = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6,
        "save_steps": 2, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "seed": 1, "disable_tqdm": True,
        **changed,
    }  # fmt: skip
    return transformers.Trainer(
        model=model, args=transformers.TrainingArguments(**given), train_dataset=Parity(),
        eval_dataset=Parity(), callbacks=list(callbacks),
    )  # fmt: skip


def trained_bits(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_killed_then_resumed_it_keeps_the_same_best_adapter(tmp_path):
    evaluating = {"eval_strategy": "steps", "eval_steps": 2}
    calm, broken = tmp_path / "calm", tmp_path / "broken"
    model = bert()
    trainer(model, calm, DeltawCallback(), **evaluating).train()
    with pytest.raises(Killed):
        trainer(bert(), broken, DeltawCallback(), KillAt(5), **evaluating).train()
    callback = DeltawCallback()
    start = callback.newest(broken)
    assert start is not None
    assert start.endswith("checkpoint-4")
    again = bert()
    trainer(again, broken, callback, **evaluating).train(resume_from_checkpoint=start)
    assert equal(trained_bits(model), trained_bits(again))
    one, other = dw.read(calm / "adapter").tensors(), dw.read(broken / "adapter").tensors()
    assert equal(one, other)
    scores = [r["eval_loss"] for r in json.loads((calm / "checkpoint-6" / "trainer_state.json").read_text())["log_history"] if "eval_loss" in r]  # fmt: skip
    assert callback.best_score == min(scores)
    fresh = dw.load(bert(name="other"), broken / "checkpoint-2" / "adapter", name="early")
    assert "early" in [a.name for a in dw.adapters(fresh)]


def test_a_damaged_or_unsealed_checkpoint_is_skipped(tmp_path, capsys):
    callback = DeltawCallback()
    trainer(bert(), tmp_path, callback).train()
    weights = tmp_path / "checkpoint-6" / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-7])
    (tmp_path / "checkpoint-4" / "MANIFEST.json").unlink()
    found = callback.newest(tmp_path)
    assert found == str(tmp_path / "checkpoint-2")
    said = capsys.readouterr().out
    assert "checkpoint-6: optimizer.pt is not what its manifest lists" in said
    assert "checkpoint-4: it has no whole MANIFEST.json" in said
    assert DeltawCallback().newest(tmp_path / "nothing") is None


def test_without_evaluations_the_result_is_the_last(tmp_path):
    model = bert()
    trainer(model, tmp_path, DeltawCallback(), save_strategy="no").train()
    kept = dw.read(tmp_path / "adapter").tensors()
    mine = dw.get(model, "default").tensors()
    assert equal(kept, {k: t.detach() for k, t in mine.items()})


def test_a_gradient_that_is_not_finite_stops(tmp_path):
    model = bert()
    seen = []

    def poison(module, args, output):
        seen.append(1)
        return output * float("nan") if len(seen) == 7 else output  # the first half of step 4

    model.classifier.register_forward_hook(poison)
    with pytest.raises(NonFinite, match=r"step 4: the gradient of .* is not finite"):
        trainer(model, tmp_path, DeltawCallback()).train()
    assert DeltawCallback().newest(tmp_path) == str(tmp_path / "checkpoint-2")
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_an_adapter_that_nothing_reaches_stops_after_the_first_backward(tmp_path):
    model = bert()
    model.spare = nn.Linear(8, 8)
    dw.attach(model, dw.LoRA(rank=2), ["spare"], name="spare")
    dw.activate(model, ["default", "spare"])
    with pytest.raises(ModelError, match="got no gradient"):
        trainer(model, tmp_path, DeltawCallback("spare")).train()


def test_a_buffer_of_the_base_that_moves_is_found(tmp_path):
    model = bert()
    model.register_buffer("seen", torch.zeros(()))

    def count(module, args, output):
        model.seen.add_(1)

    model.bert.register_forward_hook(count)
    with pytest.raises(ModelError, match="1 buffers of the frozen base have changed while training: seen"):
        trainer(model, tmp_path, DeltawCallback()).train()


def test_a_name_that_is_not_there(tmp_path):
    with pytest.raises(UnknownName, match="has no adapter 'sst3'; did you mean 'sst2'"):
        trainer(bert(name="sst2"), tmp_path, DeltawCallback("sst3")).train()


def test_adalora_is_driven(tmp_path):
    model = bert(dw.AdaLoRA(rank=4, target=2, total=6))
    trainer(model, tmp_path, DeltawCallback()).train()
    alive = [int((t != 0).sum()) for k, t in dw.get(model, "default").tensors().items() if k.endswith("E")]
    assert len(alive) == 4
    assert sum(alive) <= 8
    with pytest.raises(ConfigError, match="expects 60 optimizer steps, the Trainer makes 6: attach it with total=6"):
        trainer(bert(dw.AdaLoRA(rank=4, target=2, total=60)), tmp_path, DeltawCallback()).train()


def test_trl(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tests.tiny_chat import make_chat_model, make_talks

    make_chat_model(tmp_path / "model")
    make_talks(tmp_path / "talks.jsonl", 16)
    rows = [json.loads(line) for line in (tmp_path / "talks.jsonl").read_text().splitlines()]
    rows = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in rows]
    ends = []
    for folder, killer in (("calm", None), ("broken", 3), ("broken", None)):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        torch.manual_seed(0)
        dw.attach(model, dw.LoRA(rank=2, dropout=0.1), ["q_proj", "v_proj"])
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / folder), per_device_train_batch_size=4, max_steps=4, save_steps=2, bf16=False,
            learning_rate=1e-2, report_to=[], use_cpu=True, seed=1, disable_tqdm=True, max_length=64,
            gradient_checkpointing=False,
        )  # fmt: skip
        callback = DeltawCallback()
        run = trl.SFTTrainer(
            model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "model"),
            callbacks=[callback, *([KillAt(killer)] if killer else [])],
        )  # fmt: skip
        start = callback.newest(tmp_path / folder)
        if killer:
            with pytest.raises(Killed):
                run.train(resume_from_checkpoint=start)
            continue
        run.train(resume_from_checkpoint=start)
        ends.append(trained_bits(model))
        assert (start is None) == (folder == "calm")
    assert equal(*ends)
    assert all(bool((t != 0).any()) for n, t in ends[0].items() if n.endswith(".B"))
    assert equal(dw.read(tmp_path / "calm" / "adapter").tensors(), dw.read(tmp_path / "broken" / "adapter").tensors())
