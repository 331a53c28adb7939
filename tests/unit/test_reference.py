"""The generated pages of the documentation are up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "reference" / "combinations.py"


def test_the_table_of_combinations_is_what_the_registry_says():
    result = subprocess.run(
        [sys.executable, SCRIPT, "--check"], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
