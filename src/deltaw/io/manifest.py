"""The manifest beside an adapter: what PEFT's two files cannot say, and the checksums of those that they are.

It keeps the exact variants (a plain alpha, where dropout applies), the fingerprint of the base, the adapter's facts (label
map, metrics) and its digest. No time, host or run id: equal adapters are equal folders. README.md is left out, since it is
meant to be edited. The manifest's own checksum is over its very bytes, with the checksum's digits as zeros.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from deltaw import __version__
from deltaw.core.adapter import Adapter, Change
from deltaw.core.registry import variants
from deltaw.core.variant import Variant
from deltaw.errors import AdapterError, DeltawError
from deltaw.io import strict_json
from deltaw.io.digest import digest, effect
from deltaw.io.entry_lines import from_lines, to_lines

FORMAT = "deltaw-manifest"
VERSION = 2
MAX_BYTES = 64 << 20
ZEROS = b"0" * 64
OWN = re.compile(rb'"checksum": "([0-9a-f]{64})"')


def build(adapter: Adapter, files: Mapping[str, bytes | tuple[int, str]]) -> bytes:
    """The manifest's bytes. `files` maps a name to its content or to (bytes, sha256)."""
    kinds: list[dict[str, Any]] = []
    changes: dict[str, Any] = {}
    for key, change in sorted(adapter.changes.items()):
        described = describe(change.variant)
        if described not in kinds:
            kinds.append(described)
        shape = None if change.shape is None else list(change.shape)
        changes[key] = [kinds.index(described), change.layer, shape, list(change.tied)]
    body = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"deltaw {__version__}",
        "digest": digest(adapter),
        "files": {name: _stamp(content) for name, content in files.items()},
        "variants": kinds,
        "changes": changes,
        "order": list(adapter.changes),
        "base": packed(adapter.base),
        "extra": dict(adapter.extra),
        "error": {k: float(v) for k, v in adapter.error.items()},
        "checksum": ZEROS.decode(),
    }
    raw = strict_json.pretty(body)
    return raw.replace(b'"checksum": "' + ZEROS, b'"checksum": "' + hashlib.sha256(raw).hexdigest().encode(), 1)


def packed(base: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the base, its fingerprint's entries as lines."""
    recorded = base.get("fingerprint")
    if isinstance(recorded, Mapping) and isinstance(recorded.get("parameters"), Mapping):
        lines = to_lines(recorded["parameters"])
        if lines is not None:
            return {**base, "fingerprint": {**recorded, "parameters": lines}}
    return dict(base)


def unpacked(base: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse; version 1 had no lines."""
    recorded = base.get("fingerprint")
    if isinstance(recorded, Mapping) and isinstance(recorded.get("parameters"), list):
        return {**base, "fingerprint": {**recorded, "parameters": from_lines(recorded["parameters"])}}
    return dict(base)


def _stamp(content: bytes | tuple[int, str]) -> dict[str, Any]:
    size, sha = content if isinstance(content, tuple) else (len(content), hashlib.sha256(content).hexdigest())
    return {"bytes": size, "sha256": sha}


def parse(raw: bytes, verify: bool = True) -> dict[str, Any]:
    """The manifest, checked against its own checksum.

    Raises:
        AdapterError: damaged, or written in a way that this version does not know.
    """
    body = strict_json.parse(raw, "the manifest", MAX_BYTES)
    if body.get("format") != FORMAT or type(body.get("version")) is not int:
        raise AdapterError("the manifest is not one of deltaw's: remove it, if it came from elsewhere")
    if body["version"] > VERSION:
        raise AdapterError(f"the manifest is of version {body['version']}, this deltaw reads {VERSION}: update deltaw")
    found = OWN.search(raw)
    if verify and (
        found is None
        or hashlib.sha256(raw[: found.start(1)] + ZEROS + raw[found.end(1) :]).hexdigest().encode() != found.group(1)
    ):
        raise AdapterError("the manifest is damaged: its checksum is not that of its content")
    needed = {
        "digest": str,
        "files": dict,
        "variants": list,
        "changes": dict,
        "base": dict,
        "extra": dict,
        "error": dict,
    }
    for field, kind in needed.items():
        if not isinstance(body.get(field), kind):
            raise AdapterError(f"the manifest's {field!r} is missing or no {kind.__name__}")
    return body


def check_file(body: Mapping[str, Any], name: str, size: int, sha256: str) -> None:
    """Refuse a file that is not the one that the manifest describes."""
    stamp = body["files"].get(name)
    if not isinstance(stamp, dict):
        raise AdapterError(f"the manifest does not list {name}: the folder was put together from several adapters")
    if stamp.get("bytes") != size or stamp.get("sha256") != sha256:
        raise AdapterError(
            f"{name} is not the file that was written (its sha256 differs from the manifest's): it is damaged or was "
            f"edited; fetch it again, or read it with verify=False (--no-verify) and write it anew if you mean it"
        )


def refine(adapter: Adapter, body: Mapping[str, Any], verify: bool = True) -> Adapter:
    """`adapter` as PEFT's files give it -> with the exact variants, layers and facts of the manifest.

    verify: False lets the files count where the manifest says otherwise: they were edited, and it was not.

    Raises:
        AdapterError: the manifest contradicts the files, or is not readable.
    """
    if verify and set(body["changes"]) != set(adapter.changes):
        differ = sorted(set(body["changes"]) ^ set(adapter.changes))
        raise AdapterError(f"the manifest and the weights name different parameters, for example {differ[0]!r}")
    known = [build_variant(v) for v in body["variants"]]
    agreed: tuple[Variant, Variant] | None = None  # neighbours mostly share one pair
    changes = dict(adapter.changes)
    for key in [key for key in changes if key in body["changes"]]:
        change = changes[key]
        try:
            index, layer, shape, tied = body["changes"][key]
            exact = known[index]
            shape = None if shape is None else tuple(int(n) for n in shape)
            tied = tuple(str(n) for n in tied)
        except (ValueError, TypeError, IndexError) as error:
            raise AdapterError(f"the manifest's entry of {key!r} is not readable") from error
        if layer is not None and not isinstance(layer, str):
            raise AdapterError(f"the manifest's entry of {key!r} is not readable")
        if (exact, change.variant) != agreed:
            if effect(exact) != effect(change.variant):
                if verify:
                    raise AdapterError(f"{key}: the manifest says {exact}, the config says {change.variant}")
                exact = change.variant
            agreed = exact, change.variant
        changes[key] = Change(exact, change.tensors, layer, shape, tied)
    return adapter.replace(
        changes=changes,
        base={**unpacked(body["base"]), **adapter.base},
        extra={**body["extra"], **adapter.extra},
        error=dict(body["error"]),
    )


def describe(variant: Variant) -> dict[str, Any]:
    """The variant as JSON values; `build_variant` is the inverse."""
    return {
        "kind": variant.kind,
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in variant.options().items()},
    }


def shapes(body: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The stored shapes of the base's parameters that the manifest records."""
    found = {}
    order = body.get("order")
    for key in order if isinstance(order, list) else body["changes"]:
        entry = body["changes"].get(key)
        if isinstance(entry, list) and len(entry) == 4 and isinstance(entry[2], list):
            found[key] = tuple(n for n in entry[2] if type(n) is int)
    return found


def build_variant(described: Any) -> Variant:
    """{"kind": ..., "options": {...}} -> the variant.

    Raises:
        AdapterError: unknown kind (a plugin is missing), or options that it refuses.
    """
    if not isinstance(described, dict) or not isinstance(described.get("options"), dict):
        raise AdapterError(f"not the description of a method: {str(described)[:80]}")
    kind, options = described.get("kind"), described["options"]
    if not isinstance(kind, str) or kind not in variants:
        raise AdapterError(f"the method {kind!r} is not known here: install the package that provides it")
    try:
        return variants[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})  # type: ignore[no-any-return]
    except (DeltawError, TypeError, ValueError) as error:
        raise AdapterError(f"options of the method {kind!r} are not valid: {error}") from error
