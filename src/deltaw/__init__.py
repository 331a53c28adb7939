"""deltaw: low-rank changes ΔW of pretrained PyTorch models: train, keep, compare, analyse, combine, merge them.

This file is a list of names. Each is imported when first used, so that `deltaw --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "errors": "deltaw.errors",
    # variants and forms
    "LoRA": "deltaw.variants.lora",
    "DoRA": "deltaw.variants.dora",
    "Full": "deltaw.variants.full",
    "LoRAFA": "deltaw.variants.lora_fa",
    "VeRA": "deltaw.variants.vera",
    "LoHa": "deltaw.variants.loha",
    "LoKr": "deltaw.variants.lokr",
    "IA3": "deltaw.variants.ia3",
    "AdaLoRA": "deltaw.variants.adalora",
    "Diff": "deltaw.variants.diff",
    "Rows": "deltaw.variants.rows",
    # a model's adapters
    "attach": "deltaw.model.attach",
    "detach": "deltaw.model.attach",
    "get": "deltaw.model.attach",
    "install": "deltaw.io.values",
    "use": "deltaw.model.activate",
    "disabled": "deltaw.model.activate",
    "activate": "deltaw.model.activate",
    "rows": "deltaw.model.rows",
    "replace": "deltaw.io.values",
    "compact": "deltaw.ops.compact",
    "quantize": "deltaw.model.quantize",
    "dequantize": "deltaw.model.quantize",
    "Int8": "deltaw.frozen.int8",
    "NF4": "deltaw.frozen.nf4",
    "Dense16": "deltaw.frozen.dense",
    "add": "deltaw.io.values",
    "copy": "deltaw.model.copies",
    "rename": "deltaw.model.copies",
    "delete": "deltaw.model.copies",
    "status": "deltaw.model.copies",
    "merge": "deltaw.model.merge",
    "unmerge": "deltaw.model.merge",
    "merged": "deltaw.model.merge",
    "summary": "deltaw.model.summary",
    "adapters": "deltaw.model.summary",
    "param_groups": "deltaw.model.groups",
    "after_step": "deltaw.model.groups",
    "check_gradients": "deltaw.model.gradients",
    "orthogonality_loss": "deltaw.variants.adalora",
    "initialize": "deltaw.model.initialize",
    # adapters as values and files
    "Adapter": "deltaw.core.adapter",
    "Change": "deltaw.core.adapter",
    "save": "deltaw.io",
    "load": "deltaw.io",
    "read": "deltaw.io",
    "write": "deltaw.io",
    "extract": "deltaw.io",
    # combinations and insight
    "combine": "deltaw.compose",
    "spectrum": "deltaw.analysis",
    "similarity": "deltaw.analysis",
    "amplification": "deltaw.analysis",
    "overlap": "deltaw.analysis",
    "intruders": "deltaw.analysis",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'deltaw' has no attribute {name!r}{_nearest(name)}")
    module = import_module(_WHERE[name])
    return module if name == "errors" else getattr(module, name)


def _nearest(name: str) -> str:
    from deltaw.errors import did_you_mean

    same = [known for known in _WHERE if known.lower() == name.lower()]
    return "" if name.startswith("_") else did_you_mean(same[0] if same else name, same or _WHERE)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from deltaw import errors as errors
    from deltaw.analysis import amplification as amplification
    from deltaw.analysis import intruders as intruders
    from deltaw.analysis import overlap as overlap
    from deltaw.analysis import similarity as similarity
    from deltaw.analysis import spectrum as spectrum
    from deltaw.compose import combine as combine
    from deltaw.core.adapter import Adapter as Adapter
    from deltaw.core.adapter import Change as Change
    from deltaw.frozen.dense import Dense16 as Dense16
    from deltaw.frozen.int8 import Int8 as Int8
    from deltaw.frozen.nf4 import NF4 as NF4
    from deltaw.io import extract as extract
    from deltaw.io import load as load
    from deltaw.io import read as read
    from deltaw.io import save as save
    from deltaw.io import write as write
    from deltaw.io.values import add as add
    from deltaw.io.values import install as install
    from deltaw.io.values import replace as replace
    from deltaw.model.activate import activate as activate
    from deltaw.model.activate import disabled as disabled
    from deltaw.model.activate import use as use
    from deltaw.model.attach import attach as attach
    from deltaw.model.attach import detach as detach
    from deltaw.model.attach import get as get
    from deltaw.model.copies import copy as copy
    from deltaw.model.copies import delete as delete
    from deltaw.model.copies import rename as rename
    from deltaw.model.copies import status as status
    from deltaw.model.gradients import check_gradients as check_gradients
    from deltaw.model.groups import after_step as after_step
    from deltaw.model.groups import param_groups as param_groups
    from deltaw.model.initialize import initialize as initialize
    from deltaw.model.merge import merge as merge
    from deltaw.model.merge import merged as merged
    from deltaw.model.merge import unmerge as unmerge
    from deltaw.model.quantize import dequantize as dequantize
    from deltaw.model.quantize import quantize as quantize
    from deltaw.model.rows import rows as rows
    from deltaw.model.summary import adapters as adapters
    from deltaw.model.summary import summary as summary
    from deltaw.ops.compact import compact as compact
    from deltaw.variants.adalora import AdaLoRA as AdaLoRA
    from deltaw.variants.adalora import orthogonality_loss as orthogonality_loss
    from deltaw.variants.diff import Diff as Diff
    from deltaw.variants.dora import DoRA as DoRA
    from deltaw.variants.full import Full as Full
    from deltaw.variants.ia3 import IA3 as IA3
    from deltaw.variants.loha import LoHa as LoHa
    from deltaw.variants.lokr import LoKr as LoKr
    from deltaw.variants.lora import LoRA as LoRA
    from deltaw.variants.lora_fa import LoRAFA as LoRAFA
    from deltaw.variants.rows import Rows as Rows
    from deltaw.variants.vera import VeRA as VeRA
