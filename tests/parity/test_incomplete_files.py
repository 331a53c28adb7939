"""A file of PEFT that lacks any one of its tensors is refused, and whole it is what PEFT computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import deltaw as dw
from deltaw.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
IDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """Layers of several kinds, two of them with names that end alike, and a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.q, self.out = nn.Embedding(40, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.first_norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.first_norm(self.q(self.words(ids)))
        return self.out(self.norm(x + self.attention(x, x, x)[0])) + self.bias


MODELS: dict[str, Any] = {
    "plain": Plain,
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=4, **SIZES)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    ),
    "tied llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **SIZES)),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    "all experts and their router": (
        "mixtral",
        {"target_modules": [], "target_parameters": ["down_proj", "gate_up_proj", "gate.weight"]},
    ),
    "biases of adapted layers": ("plain", {"target_modules": ["q", "out", "attention"], "bias": "lora_only"}),
    "all biases": ("plain", {"target_modules": ["q", "attention"], "bias": "all"}),
    "all biases of a model with tied ones": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "biases of the changes": ("plain", {"target_modules": ["q"], "lora_bias": True}),
    "names that end alike": ("plain", {"target_modules": ["q"], "modules_to_save": ["norm"]}),
    "a head and the layer before it": ("distilbert", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "a module with tied parameters": ("bert", {"target_modules": ["query"], "modules_to_save": ["cls"]}),
    "tied modules in full": (
        "tied llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied layers": ("tied llama", {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
    "an embedding that PEFT does not tie": (
        "bert",
        {"target_modules": ["query", "word_embeddings"], "ensure_weight_tying": True},
    ),
}


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(IDS)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_lacks_a_tensor_is_refused(tmp_path: Path, case: str) -> None:
    kind, options = CASES[case]
    torch.manual_seed(0)
    base = MODELS[kind]()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, init_lora_weights=False, **options))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    theirs.save_pretrained(tmp_path)
    whole = dw.load(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(output(whole), output(theirs), rtol=1e-5, atol=1e-4)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(".base_layer.weight"):
            continue  # the base's own, which PEFT puts beside an adapted embedding
        save_file({k: t for k, t in tensors.items() if k != name}, file)
        with pytest.raises(AdapterError, match=r"incomplete|missing|the file has (1|2)"):
            dw.load(copy.deepcopy(base), tmp_path)


def test_one_bias_of_many_is_whole_if_we_wrote_it(tmp_path: Path) -> None:
    """PEFT's `bias` means all of them, or those of all adapted layers; our files may hold fewer."""
    model = dw.attach(
        Plain(), {"q": dw.LoRA(rank=2), "q.bias": dw.Full(), "norm.bias": dw.Full(), "out": dw.LoRA(rank=2)}
    )
    dw.save(model, tmp_path / "a")
    (tmp_path / "a" / "deltaw_manifest.json").unlink()
    base = Plain()
    base.load_state_dict({k: t for k, t in model.state_dict().items() if k in base.state_dict()})
    assert set(dw.get(dw.load(base, tmp_path / "a")).changes) == set(dw.get(model).changes)
