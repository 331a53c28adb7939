"""`transformers.Trainer` trains our adapters, also on a model that transformers loaded in 4 bit."""

from __future__ import annotations

import pytest
import torch

import deltaw as dw

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def folder(tmp_path):
    """A tiny language model in a folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def loaded(folder, bits):
    if bits == 32:
        return transformers.AutoModelForCausalLM.from_pretrained(folder)
    pytest.importorskip("bitsandbytes")
    quantized = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized, device_map="cpu")


@pytest.mark.parametrize("bits", [32, 4])
def test_the_trainer_trains_an_adapter(folder, tmp_path, bits):
    model = loaded(folder, bits)
    quantizer = getattr(model, "hf_quantizer", None)
    before = type(quantizer)
    dw.attach(model, dw.LoRA(rank=2), targets=["q_proj", "v_proj"])
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    started = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    rows = [{"input_ids": torch.arange(3, 15), "labels": torch.arange(3, 15)} for _ in range(4)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        learning_rate=1e-2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    state = dict(model.named_parameters())
    assert all(torch.equal(state[n], p) for n, p in frozen.items())
    assert all(not torch.equal(state[n], p) for n, p in started.items() if n.endswith(".B"))
    dw.detach(model)
    assert type(getattr(model, "hf_quantizer", None)) is before


def test_a_quantised_model_without_adapters_is_still_refused(folder, tmp_path):
    model = loaded(folder, 4)
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(
            model=model, args=transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
        )


class Parity(torch.utils.data.Dataset):
    """Six tokens each; the label is whether their sum is odd."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(1, 20, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids.sum() % 2)}


def test_a_run_resumed_by_the_trainer_ends_in_the_same_bits(tmp_path):
    """Dropout, gradient accumulation, a classifier trained in full; the Trainer's own checkpoints."""
    ends = []
    for start in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
        )
        model = transformers.BertForSequenceClassification(config)
        dw.attach(model, dw.LoRA(rank=2, dropout=0.1), ["query", "value"], train=["classifier"])
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            save_steps=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            seed=1,
            disable_tqdm=True,
        )
        fresh = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        transformers.Trainer(model=model, args=arguments, train_dataset=Parity()).train(resume_from_checkpoint=start)
        ends.append({n: p.detach().clone() for n, p in model.named_parameters()})
        assert all(not torch.equal(ends[-1][n], p) for n, p in fresh.items())
    assert all(torch.equal(p, ends[1][n]) for n, p in ends[0].items())
