"""The Hugging Face hub, only through huggingface_hub and only when asked: fetch an adapter, push one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from deltaw.errors import AdapterError, MissingExtra
from deltaw.io.folder import CARD, CONFIG, MANIFEST, WEIGHTS, Files, Folder

ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}")


def is_id(text: str) -> bool:
    """Whether `text` looks like "user/repo"."""
    return ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def fetch(repo: str, *, revision: str | None = None, token: str | None = None) -> Folder:
    """The adapter files of a repository, from the cache or the hub. Pickled weights are not fetched.

    Raises:
        AdapterError: no such repository, revision or adapter.
        MissingExtra: huggingface_hub is not installed.
    """
    hub = _library()
    missing: Any = hub.errors.EntryNotFoundError
    files: dict[str, str] = {}
    for name in (CONFIG, WEIGHTS, MANIFEST):
        try:
            files[name] = hub.hf_hub_download(repo, name, revision=revision, token=token)
        except missing as error:
            if name == MANIFEST:
                continue
            if isinstance(error, hub.errors.LocalEntryNotFoundError):  # offline, and not in the cache
                raise AdapterError(f"{repo!r} is no folder here, and the hub cannot be reached: {error}") from error
            raise AdapterError(f"{repo} on the hub is no adapter that can be read: it has no {name}") from error
        except Exception as error:
            raise AdapterError(f"{repo!r} is no folder here, and the hub has no such adapter: {error}") from error
    return Files(files, repo)


def push(folder: Path, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Upload an adapter folder; returns the commit's address.

    Raises:
        AdapterError: the hub refused.
        MissingExtra: huggingface_hub is not installed.
    """
    hub = _library()
    api = hub.HfApi(token=token)
    try:
        full = api.create_repo(repo, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=full,
            folder_path=str(folder),
            commit_message="Upload adapter",
            allow_patterns=[CONFIG, WEIGHTS, MANIFEST, CARD],
        )
    except Exception as error:
        raise AdapterError(f"{folder} was saved, but pushing it to {repo!r} failed: {error}") from error
    return str(commit)


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors  # a lazy module: not an attribute until imported
    except ImportError as error:
        raise MissingExtra("the hub needs huggingface_hub: pip install 'deltaw[hub]'") from error
    return huggingface_hub
