"""What is known: variants, hosts, forms, inits. A file of an axis registers itself; nobody keeps a list.

Third parties register the same way: a package with an entry point in the group `deltaw.plugins` naming a module to import.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from deltaw.errors import NameTaken, UnknownName, did_you_mean

T = TypeVar("T", bound=type[Any])
V = TypeVar("V")


class Registry(Generic[V]):
    """Name -> thing, filled by decorators; asks for the plugins once, at the first look-up."""

    def __init__(self, what: str, folder: str | None = None) -> None:
        self.what = what
        self.folder = folder
        self._known: dict[str, V] = {}
        self._loaded = False

    def register(self, name: str, thing: V) -> V:
        """Make `thing` known as `name`."""
        before = self._known.get(name)
        if before is not None and before is not thing:
            raise NameTaken(f"{self.what} {name!r} is registered already, by {before!r}")
        self._known[name] = thing
        return thing

    def __getitem__(self, name: str) -> V:
        self.load()
        if name not in self._known:
            raise UnknownName(
                f"unknown {self.what} {name!r}{did_you_mean(name, self._known)} (known: {', '.join(sorted(self._known))})"
            )
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        self.load()
        return name in self._known

    def __len__(self) -> int:
        self.load()
        return len(self._known)

    def items(self) -> list[tuple[str, V]]:
        """All of them, in order of registration."""
        self.load()
        return list(self._known.items())

    def load(self) -> None:
        """Import the axis's own files, then every plugin, once."""
        if self._loaded:
            return
        self._loaded = True
        if self.folder is not None:
            package = importlib.import_module(self.folder)
            for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
                importlib.import_module(f"{self.folder}.{module}")
        load_plugins()


_plugins_loaded = False


def load_plugins() -> None:
    """Import every module named by an entry point of the group `deltaw.plugins`."""
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True
        for point in entry_points(group="deltaw.plugins"):
            point.load()


variants: Registry[type[Any]] = Registry("method", "deltaw.variants")
hosts: Registry[type[Any]] = Registry("layer family", "deltaw.layers")
forms: Registry[type[Any]] = Registry("form of the frozen weight", "deltaw.frozen")
foreign_readers: Registry[Callable[..., Any]] = Registry("library of quantised weights", "deltaw.frozen")
inits: Registry[Callable[..., Any]] = Registry("init", "deltaw.inits")


def variant(cls: T) -> T:
    """Class decorator: make a Variant known by its `kind`."""
    variants.register(cls.kind, cls)
    return cls


def host(cls: T) -> T:
    """Class decorator: make a Host known by its `family`."""
    hosts.register(cls.family, cls)
    return cls


def form(cls: T) -> T:
    """Class decorator: make a form of the frozen weight known by its `kind`."""
    forms.register(cls.kind, cls)
    return cls


def foreign_reader(name: str) -> Callable[[V], V]:
    """Decorator: make a reader of another library's quantised weights known by the library's `name`."""

    def add(thing: V) -> V:
        foreign_readers.register(name, thing)  # type: ignore[arg-type]
        return thing

    return add


def init(name: str) -> Callable[[V], V]:
    """Decorator: make an init known by `name`."""

    def add(thing: V) -> V:
        inits.register(name, thing)  # type: ignore[arg-type]
        return thing

    return add
