"""Push and load through huggingface_hub, against a fake hub on this machine; nothing is asked of a network otherwise."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import deltaw as dw
from deltaw.io.folder import CARD, CONFIG, MANIFEST, WEIGHTS
from deltaw.io.hub import is_id
from tests.unit.io.adapter_folders import net, shaken

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The few routes that uploading and downloading small files take."""

    repos: dict[str, dict[str, bytes]]

    def log_message(self, *args: Any) -> None:
        return None

    def answer(self, body: Any = b"", code: int = 200, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(raw)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def do_GET(self) -> None:
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if file is not None:
            data = self.repos.get(file[1], {}).get(file[3])
            if file[1] not in self.repos:
                self.answer({}, 404, X_Error_Code="RepoNotFound")
            elif data is None or file[2] not in ("main", COMMIT):
                self.answer({}, 404, X_Error_Code="EntryNotFound")
            else:
                self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', Content_Type="application/octet-stream")
            return
        info = re.match(r"/api/models/([^/]+/[^/?]+)", self.path)
        if info is not None and info[1] in self.repos:
            files = [{"rfilename": n} for n in sorted(self.repos[info[1]])]
            self.answer({"id": info[1], "sha": COMMIT, "siblings": files, "private": False, "tags": []})
        else:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        base = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            body = json.loads(raw)
            name = f"{body.get('organization') or 'me'}/{body['name']}"
            self.repos.setdefault(name, {})
            self.answer({"url": f"{base}/{name}", "name": name, "id": name})
        elif "/preupload/" in self.path:
            files = json.loads(raw)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            for line in raw.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.repos[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(
                {
                    "success": True,
                    "commitUrl": f"{base}/{name}/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "commitMessage": "x",
                }
            )
        else:
            self.answer({})


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    repos: dict[str, dict[str, bytes]] = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"repos": repos}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", repos
    server.shutdown()
    server.server_close()


def run(code: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own: huggingface_hub reads its settings when it is imported."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": "x",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    here = Path(__file__).resolve().parents[3]
    code = (
        "import warnings, deltaw as dw; from tests.unit.io.adapter_folders import net, shaken; model = net()\n" + code
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings},
        cwd=here,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_push_and_load(hub: tuple[str, dict[str, dict[str, bytes]]], tmp_path: Path) -> None:
    endpoint, repos = hub
    push = f"""
dw.attach(model, dw.LoRA(rank=2), ["first"])
dw.save(shaken(model), {str(tmp_path / "a")!r}, push_to_hub="me/mine")
"""
    done = run(push, endpoint, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert {CONFIG, WEIGHTS, MANIFEST, CARD} <= set(repos["me/mine"])
    card = repos["me/mine"][CARD].decode()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "PeftModel.from_pretrained" in card

    load = """
dw.load(model, "me/mine", revision="main")
print(dw.get(model).changes["first.weight"].tensors["B"].sum().item())
"""
    done = run(load, endpoint, tmp_path / "other")
    assert done.returncode == 0, done.stderr
    model = net()
    dw.attach(model, dw.LoRA(rank=2), ["first"])
    dw.load(model, tmp_path / "a", name="pushed")
    assert float(done.stdout) == dw.get(model, "pushed").changes["first.weight"].tensors["B"].sum().item()

    repos["me/mine"][WEIGHTS] = repos["me/mine"][WEIGHTS][:-4] + b"\0\0\0\0"  # the hub's copy is damaged
    done = run("dw.load(model, 'me/mine')", endpoint, tmp_path / "third")
    assert "AdapterError" in done.stderr
    done = run("dw.load(model, 'me/nothing')", endpoint, tmp_path / "third")
    assert "is no folder here, and the hub has no such adapter" in done.stderr


def test_a_pickled_adapter_on_the_hub_is_not_fetched(
    hub: tuple[str, dict[str, dict[str, bytes]]], tmp_path: Path
) -> None:
    endpoint, repos = hub
    repos["me/old"] = {CONFIG: b"{}", "adapter_model.bin": b"\x80\x04."}
    done = run("dw.load(model, 'me/old')", endpoint, tmp_path / "home")
    assert f"it has no {WEIGHTS}" in done.stderr
    assert not list((tmp_path / "home").rglob("adapter_model.bin"))


def test_no_network_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    model = net()
    dw.attach(model, dw.LoRA(rank=2), ["first"])
    dw.save(shaken(model), tmp_path / "a")
    dw.load(net(), tmp_path / "a")
    with pytest.raises(dw.errors.AdapterError, match="no folder"):
        dw.load(net(), tmp_path / "b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user/repo", True),
        ("user/repo.v2", True),
        ("../repo", False),
        ("user/..", False),
        ("/etc/passwd", False),
        ("a/b/c", False),
        ("a", False),
    ],
)
def test_what_looks_like_a_hub_id(text: str, expected: bool) -> None:
    assert is_id(text) is expected
