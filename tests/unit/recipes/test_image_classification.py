"""Pictures of people's own: sources, what is dropped, preparation, networks, resume, predict."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from deltaw.cli.commands.predict import answered
from deltaw.errors import ConfigError, DataError, MissingExtra
from deltaw.recipes.configure import build
from deltaw.recipes.kept import open_kept, score
from deltaw.recipes.recipe import recipes
from deltaw.recipes.start import start
from deltaw.training.config import DataConfig
from deltaw.training.image_files import read_images
from deltaw.training.order import generator
from deltaw.training.preparation import Preparation, from_processor
from deltaw.training.vision_models import VisionModel

DATA = DataConfig(text="image")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """dark/ and light/ with 24 pictures each, a damaged one, a text, a picture that comes twice; and a table of paths."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for name, level in (("dark", 60), ("light", 190)):
        (folder / "by_class" / name).mkdir(parents=True)
        for i in range(24):
            pixels = generator("picture", name, i).integers(level - 50, level + 50, (20, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "by_class" / name / f"{i}.png")
            rows.append((f"by_class/{name}/{i}.png", name))
    whole = (folder / "by_class/dark/0.png").read_bytes()
    (folder / "by_class/dark/again.png").write_bytes(whole)
    (folder / "by_class/dark/cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "by_class/light/notes.txt").write_text("no picture")
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "label"), *rows, ("gone.png", "dark"), ("", "light")])
    return folder


def config(pictures, **given):
    settings = {"epochs": 2, "batch_size": 8, "data": str(pictures / "by_class"), "keep_checkpoints": 0, **given}
    return build({"recipe": "image-classification", **settings})


def tiny_vit(folder):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def test_what_cannot_be_used_is_counted(pictures):
    task = recipes["image-classification"].task(config(pictures, model="cnn"))
    said = "\n".join(task.notes)
    assert "1 with the ending .txt" in said
    assert "1 not readable as a picture" in said
    assert "1 duplicate" in said
    assert sum(len(part) for part in task.splits.values()) == 48


def test_a_table_an_npz_and_a_folder_hold_the_same(pictures, tmp_path):
    of_folder = read_images(DATA.model_copy(update={"path": str(pictures / "by_class")}))
    of_table = read_images(DATA.model_copy(update={"path": str(pictures / "table.csv")}))
    assert of_table.items.keys() == of_folder.items.keys()
    assert of_table.dropped == {"without a picture file": 2}
    colour = np.stack([np.full((6, 5, 3), value, np.uint8) for value in (0, 100, 200)])
    np.savez(tmp_path / "some.npz", x_train=colour, y_train=np.array([[0], [1], [1]]))
    of_npz = read_images(DATA.model_copy(update={"path": str(tmp_path / "some.npz")}))
    assert [row["label"] for row in of_npz.rows["train"]] == [0, 1, 1]
    assert all((a == b).all() for a, b in zip(of_npz.items.values(), colour))


def test_the_encoded_pictures_of_a_parquet_file_are_read(pictures, tmp_path):
    import pyarrow
    import pyarrow.parquet

    files = sorted((pictures / "by_class/light").glob("*.png"))[:2]
    rows = [{"image": {"bytes": f.read_bytes(), "path": f.name}, "label": i} for i, f in enumerate(files)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "some.parquet")
    found = read_images(DATA.model_copy(update={"path": str(tmp_path / "some.parquet")}))
    assert list(found.items.values()) == [f.read_bytes() for f in files]


def test_one_class_is_refused_and_what_was_dropped_is_told(pictures, tmp_path):
    for file in ("0.png", "cut.png"):
        (tmp_path / "dark").mkdir(exist_ok=True)
        (tmp_path / "dark" / file).write_bytes((pictures / "by_class/dark" / file).read_bytes())
    with pytest.raises(DataError, match=r"only one class, 'dark' \(dropped: 1 not readable as a picture\)"):
        recipes["image-classification"].task(config(pictures, model="cnn", data=str(tmp_path)))


def test_augmentation_depends_on_seed_epoch_and_index_only(pictures):
    options = {"flip": True, "crop": 0.5}
    task = recipes["image-classification"].task(config(pictures, model="cnn", **{"image-classification": options}))

    def drawn(epoch):
        return task.example("train", 3, generator("example", 0, epoch, 3))[0]

    assert np.array_equal(drawn(0), drawn(0))
    assert not np.array_equal(drawn(0), drawn(1))
    plain = task.example("validation", 0, None)[0]
    assert np.array_equal(task.example("validation", 0, generator("example", 0, 0, 0))[0], plain)


@pytest.mark.parametrize(
    "told",
    [
        {"size": {"height": 12, "width": 12}, "resample": 2},
        {
            "size": {"shortest_edge": 14},
            "crop_size": {"height": 10, "width": 10},
            "do_center_crop": True,
            "resample": 3,
        },
    ],
)
def test_a_picture_is_prepared_as_transformers_does(told, pictures):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    numbers = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    told = {"do_center_crop": False, **told, **numbers}
    image = Image.open(pictures / "by_class/dark/0.png")
    ours = from_processor(told, 224, 3)(image)
    theirs = CLIPImageProcessorPil(**told)(image, return_tensors="np")["pixel_values"][0]
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-5  # both round to bytes after resizing: float32 arithmetic is left


def test_a_convnext_below_384_pixels_is_cut_from_a_larger_picture():
    found = from_processor({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 224, 3)
    assert (found.height, found.edge) == (224, 256)
    assert from_processor({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, 384, 3).edge is None
    assert Preparation(height=4, width=4, mean=(0.5,), std=(0.5,))(Image.new("RGB", (9, 7))).shape == (1, 4, 4)


def test_a_vit_learns_resumes_and_opens_again(pictures, tmp_path):
    options = {"flip": True, "crop": 0.8}
    run = config(
        pictures,
        model=tiny_vit(tmp_path / "vit"),
        lr=5e-3,
        keep_checkpoints=2,
        **{"image-classification": options},
    )
    results = start(run, tmp_path / "run", quiet=True)
    assert results["test"]["accuracy"] > 0.9
    whole = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    shutil.copytree(tmp_path / "run", tmp_path / "half")
    newest = max((tmp_path / "half/checkpoints").glob("step-*"), key=lambda p: int(p.name.partition("-")[2]))
    shutil.rmtree(newest)
    (tmp_path / "half/adapter_model.safetensors").unlink()
    assert start(run, tmp_path / "half", resume=True, quiet=True)["test"] == results["test"]
    assert (tmp_path / "half/adapter_model.safetensors").read_bytes() == whole
    _, task, model = open_kept(tmp_path / "run")
    answers = task.predict(model, [str(pictures / f"by_class/{name}/1.png") for name in ("dark", "light")])
    assert [answer["label"] for answer in answers] == ["dark", "light"]
    assert score(tmp_path / "run", [f"data={pictures / 'table.csv'}"])["accuracy"] > 0.9
    with pytest.raises(DataError, match="no readable image"):
        task.predict(model, [str(pictures / "by_class/dark/cut.png")])
    names = [str(pictures / f"by_class/{name}.png") for name in ("dark/1", "dark/cut", "light/1")]
    answers, unreadable = answered(task, model, names)
    assert [answer["text"] for answer in answers] == [names[0], names[2]]
    assert len(unreadable) == 1
    assert "cut.png" in unreadable[0]


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_a_small_network_is_trained_kept_and_adapted(name, pictures, tmp_path):
    start(config(pictures, model=name, method="full", lr=3e-3), tmp_path / "first", quiet=True)
    folder = tmp_path / "first" / "model"
    assert json.loads((folder / "network.json").read_text())["labels"] == ["dark", "light"]
    start(config(pictures, model=str(folder), epochs=1), tmp_path / "second", quiet=True)
    assert (tmp_path / "second" / "adapter_model.safetensors").is_file()
    _, task, model = open_kept(tmp_path / "second")
    assert len(task.predict(model, [str(pictures / "by_class/dark/1.png")])) == 1
    other, new = VisionModel(str(folder)).build(["a", "b", "c"], 0)
    assert len(new) == 1
    assert other(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_wrong_networks_are_named(pictures, tmp_path):
    with pytest.raises(DataError, match="model=cnm: no such network; did you mean 'cnn'"):
        VisionModel("cnm").preparation()
    with pytest.raises(DataError, match="model=tim:x: no such kind of network; did you mean 'timm'"):
        VisionModel("tim:x").preparation()
    size = {"image-classification": {"size": 32}}
    with pytest.raises(ConfigError, match="does not take pictures of 32x32"):
        recipes["image-classification"].task(config(pictures, model=tiny_vit(tmp_path / "vit"), **size)).build()


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_networks_of_other_libraries(name, pictures, tmp_path):
    library = VisionModel(name, pretrained=False, size=32)
    try:
        library.preparation()
    except MissingExtra as missing:
        pytest.skip(str(missing))
    model, new = library.build(["a", "b", "c"], 0)
    assert new == ["fc"]
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    library.keep(model, tmp_path, ["a", "b", "c"], library.preparation())
    again, new = VisionModel(str(tmp_path)).build(["a", "b", "c"], 1)
    assert new == []
    assert all((v == model.state_dict()[k]).all() for k, v in again.state_dict().items())
