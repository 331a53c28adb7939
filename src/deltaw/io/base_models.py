"""The base behind a name: a transformers folder or hub id, or a safetensors file of plain weights; with or without weights.

`shapes` needs no weights: `deltaw check` builds the model on the meta device. The class is the first, of the adapter's
task and the config's architectures, that has the adapter's parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter
from deltaw.errors import AdapterError, MissingExtra
from deltaw.io import tensor_file
from deltaw.io.folder import Folder
from deltaw.io.model_files import stored_shapes

AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
FACTS = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Base:
    """A base model. `model` is None for a file of plain weights; `facts` are those of its config.

    missing: parameters of `model` that the base does not bring (a new head), drawn at random.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    model: nn.Module | None
    tensors: dict[str, Tensor] | None
    facts: dict[str, Any]
    missing: tuple[str, ...] = ()

    def all(self) -> dict[str, Tensor]:
        """Name -> tensor of every parameter and kept buffer."""
        return dict(self.tensors) if self.model is None and self.tensors is not None else dict(self.model.state_dict())  # type: ignore[union-attr]


def open_base(name: str, adapter: Adapter | None = None, *, weights: bool = False, revision: str | None = None) -> Base:
    """The base called `name`.

    adapter: picks the model's class and number of labels. weights: load them; else the model is on the meta device.

    Raises:
        AdapterError: there is no such model, or it cannot be built.
        MissingExtra: transformers is needed and not installed.
    """
    path = Path(name)
    if path.suffix == ".safetensors" or (
        (path / "model.safetensors").is_file() and not (path / "config.json").is_file()
    ):
        return plain(path if path.is_file() else path / "model.safetensors")
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("a base by name needs transformers: pip install 'deltaw[train]'") from error
    if not path.is_dir() and not _is_id(name):
        raise AdapterError(f"there is no model {name!r}: give a folder, a safetensors file, or a hub id")
    options = {} if revision is None else {"revision": revision}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = transformers.AutoConfig.from_pretrained(name, **options)
            labels = labels_of(adapter)
            if labels:
                config.num_labels = labels
            model = meta_model(transformers, config, adapter)
            missing: list[str] = []
            if weights:
                model, missing = _with_weights(type(model), name, config, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise AdapterError(f"the base {name!r} cannot be loaded: {error}") from error
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    facts = {f: getattr(text, f) for f in FACTS if getattr(text, f, None) is not None}
    return Base(name, stored_shapes(model), model, None, facts, tuple(missing))


def open_alike(name: str, tuned: nn.Module) -> tuple[nn.Module, list[str]]:
    """The base called `name` as a model of the class of `tuned`, and the parameters of that which the base lacks (a new head).

    Raises:
        AdapterError: it cannot be loaded so.
    """
    maker: Any = type(tuned)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _with_weights(maker, name, tuned.config)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise AdapterError(f"the base {name!r} cannot be loaded as a {maker.__name__}: {error}") from error


def _with_weights(maker: Any, name: str, config: Any, **options: Any) -> tuple[nn.Module, list[str]]:
    """The model called `name` of the class `maker`, and the parameters that it lacks or has in another shape."""
    model, info = maker.from_pretrained(
        name, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    return model.eval(), sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})


def _is_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/")) and all(c.isalnum() or c in "/-_." for c in name)


def plain(path: Path) -> Base:
    """A safetensors file of parameters under the model's own names."""
    raw = Folder(path.parent).read(path.name)
    header = tensor_file.read_header(memoryview(raw), path.name)
    tensors = tensor_file.read_tensors(memoryview(raw), header)
    return Base(str(path), {k: tuple(t.shape) for k, t in tensors.items()}, None, tensors, {})


def meta_model(transformers: Any, config: Any, adapter: Adapter | None) -> nn.Module:
    """The model of `config` on the meta device, of the class that has the adapter's parameters.

    Raises:
        AdapterError: no class does; the message names a parameter that the nearest lacks.
    """
    wanted: Collection[str] = [] if adapter is None else [k.partition("[")[0] for k in adapter.changes]
    best: tuple[int, nn.Module, str] | None = None
    for make in classes(transformers, config, adapter):
        with torch.device("meta"):
            try:
                model: nn.Module = make(config)
            except (ValueError, KeyError, AttributeError):
                continue
        lacking = sorted(set(wanted) - set(stored_shapes(model)))
        if not lacking:
            return model
        if best is None or len(lacking) < best[0]:
            best = (len(lacking), model, lacking[0])
    if best is None:
        raise AdapterError(f"no model class of transformers takes the config of type {config.model_type!r}")
    return best[1]


def classes(transformers: Any, config: Any, adapter: Adapter | None) -> Iterator[Any]:
    """Makers of models, the likeliest first."""
    task = None if adapter is None else adapter.extra.get("task_type")
    if task in AUTO:
        yield getattr(transformers, AUTO[task]).from_config
    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if cls is not None:
            yield cls
    yield transformers.AutoModel.from_config
    for name in AUTO.values():
        yield getattr(transformers, name).from_config


def labels_of(adapter: Adapter | None) -> int | None:
    """The number of labels that the adapter's head was trained for, if it has one."""
    if adapter is None:
        return None
    labels = adapter.extra.get("id2label")
    if isinstance(labels, dict) and labels:
        return len(labels)
    for key, change in adapter.changes.items():
        if change.variant.any_shape and key.rpartition(".")[0].endswith(("classifier", "score", "classifier.out_proj")):
            return int(change.matrix_shape[0])
    return None
