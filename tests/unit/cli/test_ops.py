"""`deltaw ops`: the rules for shapes, for a model's layers, and what a run has recorded."""

from __future__ import annotations

import json

from deltaw.ops import select


def test_the_rules_of_a_shape_are_those_that_run(deltaw) -> None:
    many, few, least = (deltaw("ops", "--shape", f"{tokens},384,384,8").out for tokens in (1024, 100, 20))
    bound = "in·out/(in+out) = 192" if select.worth(False) == 1 else "4 in·out/(in+out) = 768"
    assert f"adapter           merged: 1024 rows > {bound}" in many
    assert f"adapter           added: 100 rows <= {bound}" in few
    assert all("with dropout      added: dropout 0.05" in out for out in (many, few))
    assert "fp32 products     torch's own choice" in least
    assert (
        "adapter           composed: 2,949,120 multiplications do not pay for the fused operation (8,388,608 would)"
        in least
    )
    small = deltaw("ops", "--shape", "1024,300,300,8").out
    assert "on an int8 base   forward on the dense weight" in small


def test_measured_shapes_come_as_json(deltaw) -> None:
    found = json.loads(deltaw("ops", "--shape", "40,32,48,2", "--time", "--json").out)
    (row,) = found["shapes"]
    assert row["shape"] == {"tokens": 40, "columns_in": 32, "rows_out": 48, "rank": 2}
    assert {"merged", "added", "composed"} <= row["milliseconds"].keys()
    assert all(spent > 0 for spent in row["milliseconds"].values())
    assert found["threads"] >= 1


def test_a_models_distinct_shapes_once_each(deltaw, tiny) -> None:
    rows = json.loads(deltaw("ops", tiny / "model", "--tokens", 64, "--rank", 4, "--json").out)["shapes"]
    shapes = [tuple(row["shape"].values()) for row in rows]
    assert shapes
    assert len(set(shapes)) == len(shapes)
    assert all(tokens == 64 and rank == 4 for tokens, _, _, rank in shapes)


def test_a_run_shows_what_it_chose(deltaw, tmp_path) -> None:
    kernels = {"choices": 1, "timed": True, "looks": {}, "kernels": [{"shape": [48, 32, 64], "int8": [True, False]}]}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"state": "finished", "kernels": kernels}))
    assert "48 x 32, up to 64 rows: forward 8 bit, gradient dense (timed)" in deltaw("ops", "run").out


def test_what_makes_no_sense_is_refused(deltaw) -> None:
    assert "four whole numbers" in deltaw("ops", "--shape", "3,4", code=2).err
    assert "not both" in deltaw("ops", "some/model", "--shape", "1,2,3,4", code=2).err
