"""The rooms of the house and who may enter which: each imports only from those before it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "deltaw"
ORDER = [
    ["errors"],
    ["ops"],
    ["core"],
    ["variants", "layers", "frozen"],
    ["inits"],
    ["model"],
    ["io"],
    ["compose", "analysis"],
    ["training"],
    ["recipes"],
    ["store"],
    ["serving"],
    ["cli"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
FILES = [p for p in sorted(SOURCE.rglob("*.py")) if p != SOURCE / "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at any depth, as a dotted name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            if node.module == "deltaw":
                found.update(f"deltaw.{alias.name}" for alias in node.names)
    return found


def test_every_folder_is_a_known_room():
    rooms = {room_of(p) for p in FILES}
    assert rooms <= set(LEVEL), f"no place in the import order for {sorted(rooms - set(LEVEL))}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_only_from_rooms_before(path):
    here = room_of(path)
    for name in imported(path):
        if name.startswith("deltaw."):
            there = name.split(".")[1]
            if there == here or there not in LEVEL:
                continue
            assert LEVEL[there] < LEVEL[here], (
                f"{path.relative_to(SOURCE)} imports {name}: {here}/ comes before {there}/"
            )


def test_the_three_axes_do_not_know_each_other():
    for axis in ("variants", "layers", "frozen"):
        others = {"variants", "layers", "frozen"} - {axis}
        for path in (SOURCE / axis).glob("*.py"):
            for name in imported(path):
                assert not any(name.startswith(f"deltaw.{other}") for other in others), f"{path} imports {name}"


def test_model_names_no_variant_layer_or_form():
    for path in (SOURCE / "model").glob("*.py"):
        for name in imported(path):
            assert not name.startswith(("deltaw.variants", "deltaw.layers", "deltaw.frozen")), f"{path} imports {name}"
