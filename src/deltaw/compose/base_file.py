"""Base weights read from files one at a time: a safetensors file, or a Hugging Face model folder, sharded or not.

No model is built and nothing is read ahead, so a 7-billion-parameter base costs the memory of its largest weight. The
parameter names of a task model and of the checkpoint that it starts from may differ by a prefix ("bert.encoder..." and
"encoder..."); such a name is found by the prefix rule that Hugging Face applies itself: one of them with its first part
taken off, or put in front of all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from deltaw.core.adapter import Adapter
from deltaw.errors import BaseMismatch, ConfigError, MissingExtra
from deltaw.io import hub
from deltaw.io.fingerprint import entry_of, judge


class BaseFile(Mapping[str, Tensor]):
    """Parameter name -> tensor, read when asked for. Use `opened(path)` to make one."""

    def __init__(self, where: Mapping[str, Path]) -> None:
        self.where = dict(where)
        self.prefixes = {name.partition(".")[0] for name in self.where}

    def __len__(self) -> int:
        return len(self.where)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.stored_name(key) is not None

    def __getitem__(self, key: str) -> Tensor:
        from safetensors import safe_open

        name = self.stored_name(key)
        if name is None:
            raise KeyError(key)
        with safe_open(str(self.where[name]), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def stored_name(self, key: str) -> str | None:
        """The name under which the files keep the parameter `key`; None if they do not."""
        if key in self.where:
            return key
        first, _, rest = key.partition(".")
        if rest in self.where and first not in self.prefixes:
            return rest
        added = [f"{prefix}.{key}" for prefix in sorted(self.prefixes) if f"{prefix}.{key}" in self.where]
        return added[0] if len(added) == 1 else None


def opened(source: str) -> BaseFile:
    """The base weights in `source`: a safetensors file, a model folder, or a hub id.

    Raises:
        ConfigError: there is no such thing, or it holds no safetensors file.
    """
    path = Path(source)
    if not path.exists():
        if not hub.is_id(source):
            raise ConfigError(f"--base {source}: no such file or folder (nor a hub id like 'user/model')")
        path = _fetched(source)
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        files = sorted(path.glob("*.safetensors"))
        if index.exists():
            files = sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
        if not files:
            raise ConfigError(
                f"--base {source}: the folder has no .safetensors file; save the model with save_pretrained"
            )
    else:
        files = [path]
    return BaseFile({name: file for file in files for name in _names(file)})


def check(base: BaseFile, adapters: Mapping[str, Adapter]) -> None:
    """Compare every weight that an adapter changes with the fingerprint that the adapter recorded, if it did.

    Raises:
        BaseMismatch: a weight is missing in `base` or has other values than the one the adapter was trained on.
    """
    for source, adapter in adapters.items():
        recorded = (adapter.base.get("fingerprint") or {}).get("parameters", {})
        changed = sorted({key.partition("[")[0] for key in adapter.changes} & set(recorded))
        for name in changed:
            verdict = judge(recorded[name], entry_of(base[name])) if name in base else "!missing in this base"
            if verdict.startswith("!"):
                raise BaseMismatch(
                    f"{source} was trained on another base: {name}: {verdict[1:]}. Give the --base it was trained on, "
                    "or --allow-base-mismatch if you know that these weights are meant"
                )


def _names(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as content:
            return list(content.keys())
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"--base: {file} is not a readable safetensors file ({error})") from error


def _fetched(repo: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtra("a base on the hub needs huggingface_hub: pip install 'deltaw[hub]'") from error
    try:
        return Path(snapshot_download(repo, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    except Exception as error:
        raise ConfigError(f"--base {repo}: could not be fetched from the hub ({error})") from error
