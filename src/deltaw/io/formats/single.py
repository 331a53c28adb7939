"""`safetensors`: one file with deltaw's own grammar, its config in the metadata. It says every adapter."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from deltaw.core.adapter import Adapter
from deltaw.errors import AdapterError
from deltaw.io import strict_json, tensor_file
from deltaw.io.formats import format as shared
from deltaw.io.formats.format import Format, Hints
from deltaw.io.peft import grammar_for

CONFIG, EXTRA = "deltaw_config", "deltaw_facts"


class Single(Format):
    """A single safetensors file."""

    name: ClassVar[str] = "safetensors"
    suffix: ClassVar[str] = ".safetensors"

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".safetensors" and path.is_file() and CONFIG in shared.metadata_of(path)

    def read(self, path: Path, hints: Hints) -> Adapter:
        tensors, metadata = shared.open_tensors(path)
        if CONFIG not in metadata:
            raise AdapterError(f"{path} holds no {CONFIG} in its metadata: it is no adapter that deltaw wrote")
        raw = metadata[CONFIG].encode()
        plain = {k: v for k, v in metadata.items() if k != tensor_file.CHECKSUM}
        if metadata.get(tensor_file.CHECKSUM) != tensor_file.checksum(raw, tensors, plain):
            raise AdapterError(f"{path} is damaged: its checksum is not that of its content")
        config = strict_json.parse(raw, CONFIG, 1 << 23)
        adapter = grammar_for(config).read(config, tensors).adapter
        facts = strict_json.parse(metadata.get(EXTRA, "{}").encode(), EXTRA, 1 << 23)
        return adapter.replace(base=facts.get("base", {}), extra=facts.get("extra", {}), error=facts.get("error", {}))

    def cannot(self, adapter: Adapter) -> str | None:
        return None

    def write(self, adapter: Adapter, path: Path, hints: Hints) -> None:
        config, tensors = grammar_for({"peft_type": "DELTAW"}).write(adapter)
        raw = strict_json.canonical(config)
        facts = {"base": dict(adapter.base), "extra": dict(adapter.extra), "error": dict(adapter.error)}
        metadata = {"format": "pt", CONFIG: raw.decode(), EXTRA: strict_json.canonical(facts).decode()}
        metadata[tensor_file.CHECKSUM] = tensor_file.checksum(raw, tensors, metadata)
        with path.open("wb") as stream:
            shared.write_tensors(stream, tensors, metadata)


FORMAT = Single()
