"""The network behind a name, for pictures: how it wants them, and itself with a head for our classes.

`cnn`, `mlp`                    small ones that start from nothing
`timm:NAME`, `torchvision:NAME` of these libraries, where they are installed
a folder or hub id              of transformers (`AutoModelForImageClassification`), or a network kept by an earlier run
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deltaw.errors import DataError, MissingExtra, did_you_mean
from deltaw.training.hub import load_pretrained, quiet_transformers, resolve
from deltaw.training.preparation import Preparation, from_processor
from deltaw.training.small_networks import convolutional, perceptron

SMALL = ("cnn", "mlp")
LIBRARIES = ("timm", "torchvision")
WHOLE = "network.json"
"""In the folder of a network that is not of transformers: its name, its preparation, its classes."""
SIDE = 32


@dataclass(frozen=True)
class VisionModel:
    """A named network. pretrained: whether a library's own weights are wanted. size: pixels a side instead of its own."""

    name: str
    revision: str | None = None
    pretrained: bool = True
    size: int | None = None

    @property
    def kept(self) -> dict[str, Any] | None:
        """What an earlier run wrote about a network in this folder."""
        path = Path(self.name).expanduser() / WHOLE
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def kind(self) -> str:
        """cnn, mlp, timm, torchvision, or transformers."""
        name = self.kept["name"] if self.kept else self.name
        first = name.partition(":")[0]
        if first in (*SMALL, *LIBRARIES):
            return str(first)
        near = "" if "/" in name or Path(name).is_dir() else did_you_mean(name, SMALL)
        if near:
            raise DataError(f"model={name}: no such network{near} (known: {KINDS})")
        if ":" in name and not Path(name).exists():
            raise DataError(f"model={name}: no such kind of network{did_you_mean(first, LIBRARIES)} (known: {KINDS})")
        return "transformers"

    def build(self, labels: Sequence[str], seed: int, base_dropout: float | None = None) -> tuple[nn.Module, list[str]]:
        """The network with a head for `labels`, and the paths of the modules that its weights do not bring.

        Raises:
            DataError: it cannot be had. MissingExtra: its library is not installed.
        """
        torch.manual_seed(seed)  # what is new starts the same every time
        if self.kind == "transformers":
            return self._transformers(labels, base_dropout)
        kept = self.kept
        if kept is None:
            model, head = _fresh(self.name, len(labels), self.pretrained, self.preparation())
            return model, [head]
        model, head = _fresh(kept["name"], len(labels), False, Preparation(**kept["preparation"]))
        state = load_file(Path(self.name).expanduser() / "model.safetensors")
        if kept["labels"] == list(labels):
            model.load_state_dict(state)
            return model, []
        body = {k: v for k, v in state.items() if not k.startswith(f"{head}.")}
        model.load_state_dict(body, strict=False)
        return model, [head]

    def _transformers(self, labels: Sequence[str], base_dropout: float | None) -> tuple[nn.Module, list[str]]:
        from transformers import AutoModelForImageClassification

        folder, _ = resolve(self.name, self.revision)
        extra: dict[str, Any] = {} if base_dropout is None else {"base_dropout": base_dropout}
        model, missing = load_pretrained(
            AutoModelForImageClassification,
            folder,
            self.name,
            revision=self.revision,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            with_missing=True,
            **extra,
        )
        return model, list(dict.fromkeys(key.rpartition(".")[0] for key in missing))

    def preparation(self) -> Preparation:
        """How the network wants its pictures.

        Raises:
            DataError, MissingExtra: as `build`.
        """
        kept = self.kept
        if kept is not None:
            return _listed(kept["preparation"])
        side = self.size
        if self.kind in SMALL:
            return Preparation(height=side or SIDE, width=side or SIDE)
        if self.kind == "timm":
            timm = _library("timm")
            told = timm.data.resolve_data_config({}, model=_timm(self.name, 1, False))
            own, mean, std = told["input_size"][1], told["mean"], told["std"]
            filters = {"bilinear": 2, "bicubic": 3, "nearest": 0}
            found = Preparation(height=own, width=own, edge=int(own / told["crop_pct"]), mean=mean, std=std,
                                resample=filters.get(told["interpolation"], 3))  # fmt: skip
        elif self.kind == "torchvision":
            steps = _torchvision_weights(self.name).transforms()
            found = Preparation(height=steps.crop_size[0], width=steps.crop_size[0], edge=steps.resize_size[0],
                                mean=tuple(steps.mean), std=tuple(steps.std), resample=2)  # fmt: skip
        else:
            found = self._of_transformers()
        if side is None:
            return found
        edge = None if found.edge is None else round(side * found.edge / found.height)
        return Preparation(**{**asdict(found), "height": side, "width": side, "edge": edge})

    def _of_transformers(self) -> Preparation:
        from transformers import AutoConfig, ImageProcessingMixin

        folder, _ = resolve(self.name, self.revision)
        config = load_pretrained(AutoConfig, folder, self.name, revision=self.revision)
        size = getattr(config, "image_size", None) or 224
        size = size if isinstance(size, int) else size[0]
        try:
            told, _ = ImageProcessingMixin.get_image_processor_dict(folder, revision=self.revision)
        except OSError:  # a model without it: its own size, values from -1 to 1
            told = {}
        return from_processor(told, size, getattr(config, "num_channels", 3))

    def keep(self, model: nn.Module, folder: Path, labels: Sequence[str], preparation: Preparation) -> None:
        """Write the trained network into `folder`, so that `model=folder` means it."""
        if self.kind == "transformers":
            with quiet_transformers():
                model.save_pretrained(folder)  # type: ignore[operator]
            told = {
                "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255,
                "size": {"height": preparation.height, "width": preparation.width}
                if preparation.edge is None else {"shortest_edge": preparation.edge},
                "image_mean": preparation.mean, "image_std": preparation.std, "resample": preparation.resample,
                "image_processor_type": "ViTImageProcessor" if preparation.edge is None else "CLIPImageProcessor",
            }  # fmt: skip
            if preparation.edge is not None:
                told |= {
                    "do_center_crop": True,
                    "crop_size": {"height": preparation.height, "width": preparation.width},
                }
            (folder / "preprocessor_config.json").write_text(json.dumps(told, indent=2) + "\n")
            return
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        name = self.kept["name"] if self.kept else self.name
        facts = {"name": name, "labels": list(labels), "preparation": asdict(preparation)}
        (folder / WHOLE).write_text(json.dumps(facts, indent=2) + "\n")


KINDS = "cnn, mlp, timm:NAME, torchvision:NAME, a folder or a hub id"


def _listed(told: dict[str, Any]) -> Preparation:
    """A Preparation as JSON gives it back."""
    return Preparation(**{**told, "mean": tuple(told["mean"]), "std": tuple(told["std"])})


def _fresh(name: str, classes: int, pretrained: bool, preparation: Preparation) -> tuple[nn.Module, str]:
    """(the network called `name` with a new head for `classes`, the head's path)."""
    kind = name.partition(":")[0]
    channels = len(preparation.mean)
    if kind == "cnn":
        model: nn.Module = convolutional(channels, classes)
    elif kind == "mlp":
        model = perceptron(channels * preparation.height * preparation.width, (256, 128), classes)
    elif kind == "timm":
        model = _timm(name, classes, pretrained)
    else:
        return _torchvision(name, classes, pretrained)
    head: Any = _last_linear(model) if kind != "timm" else model.default_cfg["classifier"]  # type: ignore[index]
    return model, str(head)


def _last_linear(model: nn.Module) -> str:
    found = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise DataError("the network has no Linear layer at its end to replace by one for our classes")
    return str(found[-1])


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(f"model={name}:... needs the package {name}: pip install {name}") from error
    except RuntimeError as error:  # torchvision built for another torch
        raise MissingExtra(f"the installed {name} does not fit this torch ({error}): pip install -U {name}") from error


def _timm(name: str, classes: int, pretrained: bool) -> nn.Module:
    timm, own = _library("timm"), name.partition(":")[2]
    try:
        model: nn.Module = timm.create_model(own, pretrained=pretrained, num_classes=classes)
    except Exception as error:  # whatever its hub client raises: one message for all of it
        if own.partition(".")[0] not in timm.list_models():
            raise DataError(f"model={name}: timm knows no such model{did_you_mean(own, timm.list_models())}") from None
        raise DataError(_unreachable(name, error)) from error
    if not pretrained:  # timm switches residual branches off at random starts: nothing in them would get a gradient
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and not bool(module.weight.any()):
                nn.init.ones_(module.weight)
    return model


def _torchvision_weights(name: str) -> Any:
    models, own = _library("torchvision").models, name.partition(":")[2]
    known = models.list_models(module=models)
    if own not in known:
        raise DataError(f"model={name}: torchvision knows no such classifier{did_you_mean(own, known)}")
    return models.get_model_weights(own).DEFAULT


def _torchvision(name: str, classes: int, pretrained: bool) -> tuple[nn.Module, str]:
    weights = _torchvision_weights(name)
    try:
        model = _library("torchvision").models.get_model(
            name.partition(":")[2], weights=weights if pretrained else None
        )
    except OSError as error:
        raise DataError(_unreachable(name, error)) from error
    head = _last_linear(model)
    old = model.get_submodule(head)
    model.set_submodule(head, nn.Linear(old.in_features, classes, bias=old.bias is not None))
    return model, head


def _unreachable(name: str, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return (
        f"model={name}: its weights cannot be had ({reason}); fetch them where the net is, or start from random "
        "weights with image-classification.pretrained=false"
    )
