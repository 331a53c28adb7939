"""Merge an adapter into its base on disk: a plain model folder, or a safetensors file, that needs no deltaw to load.

A base of transformers is built, merged in place and saved by transformers itself. For any other model the base is a
safetensors file under the model's own parameter names, and no model is built: W + ΔW is formed weight by weight.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltaw.compose.agreement import class_names
from deltaw.core.adapter import Adapter, Change, split_key
from deltaw.core.base_weights import base_weight
from deltaw.core.host import Host
from deltaw.core.registry import hosts
from deltaw.core.true_change import true_change
from deltaw.errors import ConfigError, DataError, ModelError, NonFinite
from deltaw.io import load, read
from deltaw.io.base_walk import inventory
from deltaw.io.model_files import check_base
from deltaw.model.attach import detach
from deltaw.model.merge import MergeReport, merge
from deltaw.ops.product import Product
from deltaw.training.checkpoint import open_modes
from deltaw.training.full_disk import writing
from deltaw.training.hub import load_pretrained, quiet_transformers, resolve

AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
"""PEFT's kinds of task -> the class of transformers that has the right head."""

WEIGHTS = "model.safetensors"
SIDE_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "*.tiktoken",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template*",
    "generation_config.json",
)
"""What a folder needs besides config and weights to be used."""


def merge_folder(base: str, adapter: Path, out: Path, *, allow_base_mismatch: bool = False) -> str:
    """Merge `adapter` into `base` and write `out`; returns a line that says what was done.

    base: a model folder or hub id of transformers, a safetensors file, or a run folder that holds one.

    Raises:
        ConfigError: `out` exists. DataError: `base` is missing or unreadable.
        BaseMismatch: the adapter was trained on other weights. AdapterError, NonFinite, ModelError: as dw.load and dw.merge.
        OSError: the disk is full or unwritable.
    In every case `out` is whole or not there.
    """
    if out.exists():
        raise ConfigError(f"--out {out} exists: choose another folder")
    tensors = plain_tensors(base)
    with aside(out) as draft:
        if tensors is None:
            return _merge_transformers(base, adapter, draft, allow_base_mismatch)
        found = read(adapter)
        check_base(inventory(tree(tensors)), found, allow_base_mismatch)
        merged = merged_tensors(tensors, found)
        save_file(merged, draft / WEIGHTS, metadata={"format": "pt"})
        return f"merged {len(found.changes)} changes into {len(tensors)} tensors: {out / WEIGHTS}"


def plain_tensors(base: str) -> dict[str, Tensor] | None:
    """The tensors of a base that is a safetensors file (or a folder with one and no config.json); None for any other base."""
    path = Path(base).expanduser()
    for inside in ("", "model", "pretrained/model"):
        folder = path / inside
        if folder.is_dir() and (folder / WEIGHTS).is_file() and not (folder / "config.json").is_file():
            path = folder / WEIGHTS
            break
    if path.suffix != ".safetensors":
        return None
    if not path.is_file():
        raise DataError(f"--base {base}: no such file")
    try:
        found: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise DataError(f"--base {base}: not a safetensors file ({error})") from None
    return found


def _merge_transformers(base: str, adapter: Path, draft: Path, allow: bool) -> str:
    import transformers

    found = read(adapter)
    folder, _ = resolve(base)
    labels = class_names(found.extra)
    task = found.extra.get("task_type") or ("SEQ_CLS" if labels else None)
    options: dict[str, Any] = {}
    if task == "SEQ_CLS":
        names = list(labels) or [f"LABEL_{i}" for i in range(_classes(found))]
        options = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {n: i for i, n in enumerate(names)},
        }
    kind = AUTO.get(task or "") or _own_class(folder, base)
    auto = getattr(transformers, kind)
    model, _ = load_pretrained(auto, folder, base, with_missing=True, dtype="auto", **options)
    load(model, adapter, allow_base_mismatch=allow)
    report: MergeReport = merge(model, keep=None)
    detach(model)
    with quiet_transformers():
        model.save_pretrained(draft)
    copy_side_files(folder, base, draft)
    return str(report)


def _own_class(folder: str, base: str) -> str:
    """The class of transformers that the base's config names."""
    import transformers

    with quiet_transformers():
        named = load_pretrained(transformers.AutoConfig, folder, base).architectures or []
    return named[0] if named and hasattr(transformers, named[0]) else "AutoModel"


def _classes(adapter: Adapter) -> int:
    rows = [change.matrix_shape[0] for change in adapter.changes.values() if change.variant.any_shape]
    if not rows:
        raise ConfigError("the adapter has no classifier of its own and no label map: its number of classes is unknown")
    return rows[-1]


def copy_side_files(folder: str, name: str, draft: Path) -> None:
    """Tokenizer and the like of the base, into `draft`."""
    if Path(folder).is_dir():
        for pattern in SIDE_FILES:
            for file in sorted(Path(folder).glob(pattern)):
                if file.is_file() and not (draft / file.name).exists():
                    shutil.copyfile(file, draft / file.name)
        return
    from transformers import AutoTokenizer

    load_pretrained(AutoTokenizer, folder, name).save_pretrained(draft)


def merged_tensors(base: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The base's tensors with W + ΔW in the place of each W that the adapter changes, rounded once to W's dtype.

    Raises:
        UnknownName, AdapterError: the adapter does not fit. NonFinite: a weight is not finite.
        ModelError: what a change needs cannot be told from tensors alone.
    """
    merged = {key: tensor.contiguous() for key, tensor in base.items()}
    for key, change in adapter.changes.items():
        matrix = base_weight(base, key, change)  # checks name and shape
        stored = base[key]
        if not bool(torch.isfinite(stored).all()):
            raise NonFinite(f"cannot merge: base weight {key!r} holds NaN or infinity; get the base again")
        if change.variant.any_shape:
            new = change.delta().new_weight(stored)
        else:
            delta = true_change(key, change, matrix.double())
            dense = delta.dense() if isinstance(delta, Product) else delta
            new = to_stored(key, change, matrix.double() + dense, stored)
        merged[key] = new.detach().to(stored.dtype).reshape(stored.shape).contiguous().clone()
        for other in change.tied:
            merged[other] = merged[key].clone()
    return merged


def to_stored(key: str, change: Change, matrix: Tensor, stored: Tensor) -> Tensor:
    """(out, in) matrix -> the layout in which the layer family stores it."""
    if change.layer is not None and change.layer in hosts:
        blank: Host = object.__new__(hosts[change.layer])
        try:
            return blank.from_matrix(split_key(key)[1], matrix)
        except AttributeError:  # the family reads the layer's own attributes, and there is no layer here
            pass
    if matrix.shape == stored.shape or stored.ndim > 2:
        return matrix
    if matrix.T.shape == stored.shape:
        return matrix.T
    raise ModelError(
        f"{key}: a {tuple(matrix.shape)} matrix cannot be stored as {tuple(stored.shape)} without the model: merge in Python with dw.merge"
    )


def tree(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Plain modules that hold `tensors` under their dotted names, to ask what is asked of a model."""
    root = nn.Module()
    for key, tensor in tensors.items():
        *path, name = key.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        if tensor.is_floating_point():
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            module.register_buffer(name, tensor)
    return root


@contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` if all goes well, and vanishes if not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    draft.mkdir()
    with writing(draft):
        yield draft
        open_modes(draft)
        draft.rename(out)
