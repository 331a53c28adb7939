"""R14: nothing in the package runs what a file says. Pickles, eval, unsafe YAML, archives and shells do not occur."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "deltaw"

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    "torch.load": "runs pickles",
    "torch.save": "writes pickles",
    "numpy.load": "may run pickles",
    "np.load": "may run pickles",
    "eval": "runs text",
    "exec": "runs text",
    "compile": "compiles text",
    "__import__": "imports by a computed name",
    "yaml.load": "builds objects",
    "yaml.unsafe_load": "builds objects",
    "yaml.full_load": "builds objects",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "tempfile.mktemp": "races",
}
METHODS = {"extractall": "writes outside its folder", "unpack_archive": "writes outside its folder"}


def named(node: ast.expr) -> str:
    """ "torch.load" for the expression torch.load, "" for what has no name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        left = named(node.value)
        return f"{left}.{node.attr}" if left else ""
    return ""


def faults(text: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) in a source text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, f"imports {a.name}") for a in node.names if a.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            yield node.lineno, f"imports from {node.module}"
        elif isinstance(node, ast.Call):
            name = named(node.func)
            safe = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            safely = name in ("np.load", "numpy.load") and safe.get("allow_pickle") is False
            if name in CALLS and not safely:
                yield node.lineno, f"{name}: {CALLS[name]}"
            if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                yield node.lineno, f"{node.func.attr}: {METHODS[node.func.attr]}"
            if safe.get("shell") is True:
                yield node.lineno, "shell=True: runs a shell"
            if safe.get("trust_remote_code") is True:
                yield node.lineno, "trust_remote_code=True: runs what a repository says"
            if safe.get("weights_only") is False or safe.get("allow_pickle") is True:
                yield node.lineno, "asks for pickles"


FILES = sorted(SOURCE.rglob("*.py"))


def test_the_package_is_found() -> None:
    assert len(FILES) > 50


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(SOURCE)) for f in FILES])
def test_nothing_runs_what_a_file_says(path: Path) -> None:
    where = path.relative_to(SOURCE).as_posix()
    found = [f"{where}:{line}: {what}" for line, what in faults(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x', weights_only=True)",
        "class Loose(yaml.Loader): ...\nyaml.load(s, Loader=Loose)",
        "eval('1')",
        "import yaml\nyaml.load(s)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "z.extractall()",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_the_lint_finds(text: str) -> None:
    assert list(faults(text))


def test_the_lint_lets_safe_calls_pass() -> None:
    assert not list(
        faults("import numpy as np\nnp.load('x', allow_pickle=False)\nmodel.eval()\nre.compile('x')\ntorch.compile(m)")
    )
