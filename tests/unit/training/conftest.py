"""A tiny text model and data, once per test file."""

from __future__ import annotations

import pytest

from tests.tiny_text import make_data, make_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    make_data(folder / "data.csv", 80)
    return folder
