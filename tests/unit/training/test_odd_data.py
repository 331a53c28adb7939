"""Data that used to be read wrongly without a word: missing labels, pixels of another scale, broken tables, silent sounds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from deltaw.errors import DataError
from deltaw.training.config import DataConfig
from deltaw.training.image_files import read_images
from deltaw.training.labelled import labelled_text
from deltaw.training.pictures import read_pictures
from deltaw.training.rows import read_file
from deltaw.training.sounds import LOUDEST, read_sound, read_sounds
from deltaw.training.tasks.audio_classification import AudioClassification

NAN = float("nan")


# ---- labels that are missing


def labels_with_gaps() -> list[float]:
    return [NAN if i % 5 == 0 else float(i % 2) for i in range(40)]


def test_nan_is_no_class_of_texts(tmp_path):
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels_with_gaps())]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, _ = labelled_text(DataConfig(path=str(tmp_path / "a.jsonl")), 0)
    assert found.labels == ["0.0", "1.0"]
    assert found.dropped == {"without label": 8}


def test_nan_is_no_class_of_a_parquet_file(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"text": [f"text {i}" for i in range(40)], "label": labels_with_gaps()}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    found, _ = labelled_text(DataConfig(path=str(tmp_path / "a.parquet")), 0)
    assert found.labels == ["0.0", "1.0"]
    assert found.dropped == {"without label": 8}


def test_the_word_nan_in_a_csv_stays_a_class(tmp_path):
    lines = [f"text {i},{('NaN', 'grandmother')[i % 2]}\n" for i in range(40)]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(lines))
    found, _ = labelled_text(DataConfig(path=str(tmp_path / "a.csv")), 0)
    assert set(found.labels) == {"NaN", "grandmother"}
    assert found.dropped == {}


MANY = [(f"text {i}", i * 0.37) for i in range(60)]
WRONG_LABELS = {
    "whole and with a point": ([(f"{i}", (1, 0, 1.0)[i % 3]) for i in range(40)], {}, r"'1' and '1.0' are one number"),
    "true and 1": ([(f"{i}", (True, 0, 1)[i % 3]) for i in range(40)], {}, r"'1' and 'True' are one number: write it"),
    "texts that are numbers": ([(i, "xy"[i % 2]) for i in range(30)], {}, r"dropped: 30 whose text is of the kind int"),
    "a list": ([("a", "x"), ("b", ["x", "y"])], {}, r"row 2: the label is a list: multi-label data are not supported"),
    "an object": ([("a", {"x": 1})], {}, r"row 1: the label is a dict: multi-label"),
    "numbers": (MANY, {}, r"60 usable rows of 60 classes are too few: .* several rows .*\(numbers to be predicted are"),
    "nearly all": ([*MANY, *((f"more {i}", 0.0) for i in range(9))], {}, r"69 usable rows of 60 classes are too few"),
    "words": ([(t, f"c{n}") for t, n in MANY], {}, r"are too few: classification needs several rows of each class$"),
    "cut off": (
        [(f"{i}", "xy"[i % 2]) for i in range(40)],
        {"limit": 1},
        r"data.limit=1 leaves no .* class '[xy]': raise",
    ),
}


@pytest.mark.parametrize("what", WRONG_LABELS)
def test_labels_that_are_no_classes_and_a_limit_that_takes_one_away(tmp_path, what):
    rows, settings, message = WRONG_LABELS[what]
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    with pytest.raises(DataError, match=message):
        labelled_text(DataConfig(path=str(tmp_path / "a.jsonl"), **settings), 0)


@pytest.mark.parametrize("column", ["text", "label"])
def test_half_a_character_is_refused_with_its_row(tmp_path, column):
    rows = [{"text": "an émigré 🎬", "label": "ä"}, {"text": "a", "label": "b", column: "odd \ud800"}]
    for name, content in {
        "a.jsonl": "\n".join(map(json.dumps, rows)),
        "a.json": json.dumps([rows[0], {**rows[1], column: ["odd \ud800"]}]),
    }.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=r"row 2: 'odd \\ud800' holds half of a character"):
            list(read_file(tmp_path / name))


def test_a_very_long_class_name_is_shown_shortened(tmp_path):
    rows = [json.dumps({"text": f"text {i}", "label": ("long " * 9999, "b")[i % 2]}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found, _ = labelled_text(DataConfig(path=str(tmp_path / "a.jsonl")), 0)
    assert max(map(len, found.labels)) > 40_000
    assert max(map(len, found.notes())) < 200


def test_codes_with_a_leading_zero_are_labels_of_their_own(tmp_path):
    lines = [f"text {i},{('1', '01')[i % 2]}\n" for i in range(40)]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(lines))
    assert labelled_text(DataConfig(path=str(tmp_path / "a.csv")), 0)[0].labels == ["01", "1"]


HEADERS = {
    "another separator": ("text;label\na;1\n", r"its columns 'text;label' are separated by ';': save it with commas"),
    "capitals": (
        "TEXT,Label\na,1\n",
        r"no column 'text' among 'TEXT', 'Label'; did you mean 'TEXT'\? Set data.text=TEXT$",
    ),
    "spaces": (" text , label \na,1\n", r"did you mean ' text '\? Set data.text='\" text \"'$"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_columns_that_are_nearly_there(tmp_path, what):
    content, message = HEADERS[what]
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        labelled_text(DataConfig(path=str(tmp_path / "a.csv")), 0)


def save_pictures(path, images, labels):
    np.savez(path, x_train=images, y_train=labels)
    return str(path)


@pytest.fixture
def grey():
    return np.random.default_rng(0).integers(0, 256, (40, 8, 8)).astype(np.uint8)


def test_nan_is_no_class_of_pictures(tmp_path, grey):
    path = save_pictures(tmp_path / "a.npz", grey, np.array(labels_with_gaps()))
    found, where = read_pictures(path)
    assert sorted(set(found["train"].labels.tolist())) == [0, 1]
    assert len(found["train"].images) == len(found["train"].labels) == 32
    assert np.array_equal(found["train"].images[0] * 255, grey[1])
    assert "dropped: 8 without label" in where
    pytest.importorskip("PIL")
    photos = read_images(DataConfig(path=path))
    assert {row["label"] for row in photos.rows["train"]} == {0, 1}
    assert "dropped: 8 without label" in photos.where


@pytest.mark.parametrize("odd", [0.5, float("inf")])
def test_labels_of_pictures_are_whole(tmp_path, grey, odd):
    with pytest.raises(DataError, match=r"1 labels are no whole numbers, the first is"):
        read_pictures(save_pictures(tmp_path / "a.npz", grey, np.array([odd] + [0.0, 1.0, 1.0] * 13)))


# ---- pixels

BAD_PIXELS = {
    "floats to 255": (lambda x: x.astype(np.float32), r"float32 pixels range from 0 to 255; .*: divide them by 255"),
    "floats from -1": (lambda x: x / 127.5 - 1, r"range from -1 to 1; .*: scale them with \(x - lowest\)"),
    "uint16": (lambda x: x.astype(np.uint16) * 257, r"uint16 pixels range from 0 to 65535; .* 0 \.\. 255"),
    "negative": (lambda x: x.astype(np.int16) - 1, r"int16 pixels range from -1 to 254"),
    "NaN": (lambda x: np.where(np.arange(40)[:, None, None] == 3, NAN, x / 255.0), "1 of 40 pictures hold NaN"),
    "infinity": (lambda x: np.where(np.arange(40)[:, None, None] < 2, np.inf, x / 255.0), "2 of 40 pictures hold NaN"),
    "complex": (lambda x: x.astype(np.complex64), "pixels of type complex64"),
}


@pytest.mark.parametrize("what", BAD_PIXELS)
def test_pixels_of_an_unknown_scale_are_refused(tmp_path, grey, what):
    grey[0, 0, :2] = 0, 255
    change, message = BAD_PIXELS[what]
    path = save_pictures(tmp_path / "a.npz", change(grey), np.arange(40) % 2)
    with pytest.raises(DataError, match=message):
        read_pictures(path)
    with pytest.raises(DataError, match=message):
        read_images(DataConfig(path=path))


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.uint16, np.float32, np.float64])
def test_pixels_of_a_known_scale_are_the_same_in_every_type(tmp_path, grey, kind):
    pixels = grey.astype(kind) / kind(255) if np.issubdtype(kind, np.floating) else grey.astype(kind)
    found, _ = read_pictures(save_pictures(tmp_path / "a.npz", pixels, np.arange(40) % 2))
    assert found["train"].images.dtype == np.float32
    assert np.array_equal((found["train"].images * 255).round(), grey)


# ---- tables

BROKEN = {
    "unclosed quote": ("a.csv", 'text,label\na,1\n"b,0\nc,1\nd,0\n', r"a\.csv: the row that begins in line 3 .* quote"),
    "closed by a later row's quote": ("a.csv", 'text,label\n"b,0\nc,1\n"d, e",0\n', "the row that begins in line 2"),
    "unclosed quote in a tsv": ("a.tsv", 'text\tlabel\n"b\t0\nc\t1\n', "the row that begins in line 2 .* as tsv"),
    "after a row of two lines": ("a.csv", 'text,label\n"a\nb",1\n"c,0\n', "the row that begins in line 4"),
    "label twice": ("a.csv", "text,label,label\na,1,x\n", "'label' names more than one column"),
    "text twice": ("a.csv", "text,text,label\na,b,1\n", "'text' names more than one column"),
    "a number": ("a.json", "5", "holds 5; wanted: a list of objects"),
    "an object": ("a.json", '{"data": [{"text": "a"}]}', "an object of 'data'; wanted: a list of objects"),
    "null": ("a.json", "null", "holds None; wanted: a list of objects"),
    "empty parquet": ("a.parquet", "", "cannot be read as parquet"),
    "damaged parquet": ("a.parquet", "PAR1 and then nothing of the kind", "cannot be read as parquet"),
}


def test_a_parquet_file_with_a_column_twice(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'text' names more than one column"):
        list(read_file(tmp_path / "a.parquet"))


@pytest.mark.parametrize("what", BROKEN)
def test_broken_tables_are_refused(tmp_path, what):
    name, content, message = BROKEN[what]
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_file(tmp_path / name))


def test_tables_that_look_odd_but_are_legal(tmp_path):
    content = '\ufefftext,label,,\r\n"two\r\nlines, ""quoted""",1,,\r\n\r\nsay "hi",0\r\n'
    (tmp_path / "a.CSV").write_bytes(content.encode())
    first, second = read_file(tmp_path / "a.CSV")
    assert (first["text"], first["label"]) == ('two\r\nlines, "quoted"', "1")
    assert second == {"text": 'say "hi"', "label": "0", "": None}


def write_part(path, first):
    lines = [f"text {i},{i % 2}\n" for i in range(first, first + 10)]
    path.write_text("text,label\n" + "".join(lines))


def test_two_files_that_mean_one_split(tmp_path):
    for i, name in enumerate(("train.csv", "val.csv", "dev.csv")):
        write_part(tmp_path / name, 10 * i)
    with pytest.raises(DataError, match=r"dev\.csv and val\.csv both mean the validation split"):
        labelled_text(DataConfig(path=str(tmp_path)), 0)


def test_endings_in_capitals_are_read(tmp_path):
    write_part(tmp_path / "train.csv", 0)
    write_part(tmp_path / "validation.CSV", 10)
    write_part(tmp_path / "TEST.Csv", 20)
    found, _ = labelled_text(DataConfig(path=str(tmp_path)), 0)
    assert {name: len(rows) for name, rows in found.splits.items()} == {"train": 10, "validation": 10, "test": 10}
    single, _ = labelled_text(DataConfig(path=str(tmp_path / "TEST.Csv")), 0)
    assert sum(map(len, single.splits.values())) == 10


@pytest.mark.parametrize("read", [read_images, lambda data: read_sounds(data, 0)])
def test_two_folders_that_mean_one_split(tmp_path, read):
    for name in ("train", "val", "dev"):
        (tmp_path / name / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="dev and val both mean the validation split"):
        read(DataConfig(path=str(tmp_path)))


# ---- sounds


@pytest.fixture
def recordings(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            soundfile.write(tmp_path / name / f"{i}.wav", 0.1 * random.standard_normal(800), 16_000)
    odd = {"nan": [0.1, NAN], "infinite": [np.inf, 0.1], "loud": [10 * LOUDEST, 0.1], "none": []}
    for name, wave in odd.items():
        soundfile.write(tmp_path / "a" / f"{name}.wav", np.array(wave, dtype=np.float32), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "b" / "short.wav", np.array([0.1]), 44_100)
    return tmp_path


def test_recordings_without_a_finite_spectrogram_are_dropped_and_counted(recordings):
    found, notes = read_sounds(DataConfig(path=str(recordings)), 0)
    assert all(np.isfinite(part.waves).all() for part in found.values())
    assert sum(map(len, found.values())) == 11
    assert "dropped: 3 unreadable, 1 empty" in notes


@pytest.mark.parametrize(
    ("name", "message"),
    [("nan", "NaN or infinity"), ("infinite", "NaN or infinity"), ("loud", "samples beyond"), ("none", "no samples")],
)
def test_predict_refuses_what_training_drops(recordings, name, message):
    with pytest.raises(DataError, match=message):
        read_sound(recordings / "a" / f"{name}.wav", 16_000, 800, 1)


def test_an_npy_of_a_signal_is_held_to_the_same(tmp_path):
    for wave, message in ((np.zeros((1, 0)), "no samples"), (np.array([0.0, NAN]), "NaN or infinity")):
        np.save(tmp_path / "a.npy", wave)
        with pytest.raises(DataError, match=message):
            read_sound(tmp_path / "a.npy", 4096, 10, 1)


def test_the_baseline_says_nothing_where_its_numbers_are_not_finite():
    task = object.__new__(AudioClassification)
    task.labels = ["a", "b"]
    mels = torch.randn(8, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    task.targets_of = {"train": torch.arange(8) % 2, "validation": torch.arange(8) % 2}
    task.mels = {"train": mels, "validation": mels}
    assert "validation accuracy" in task._baseline()
    task.mels = {"train": mels, "validation": mels.index_fill(0, torch.tensor([3]), NAN)}
    assert "baseline: none" in task._baseline()
