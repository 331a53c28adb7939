"""Two processes never train in one folder; a record of a run is locked while it is open."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deltaw.errors import ConfigError
from deltaw.training.record import Record

HOLD = """
import sys
from pathlib import Path
from deltaw.training.record import Record
record = Record(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.readline()
"""


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step"}\n')
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    with pytest.raises(ConfigError, match="another process is training in this folder"):
        Record(path)
    assert path.read_text() == '{"event": "step"}\n'
    holder.kill()
    holder.wait()
    Record(path).close()
