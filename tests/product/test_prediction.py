"""`predict`: answers for files of all kinds, and the temperature of the run's own evaluation."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from judging import CLASSES, photos_and_run
from PIL import Image

from lbaccel import InputError, evaluate, predict
from lbaccel.product import files
from lbaccel.product.inputs import files_named
from lbaccel.product.prediction import BATCH, predictions, temperature_of
from lbaccel.recipe.trained_model import read_trained


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take seconds, and test_files.py draws them."""
    monkeypatch.setattr(files, "draw_confusion", lambda result, path: None)
    monkeypatch.setattr(files, "draw_mistakes", lambda result, path: True)


def test_predictions_are_those_of_the_evaluation():
    data, folder = photos_and_run()
    result = evaluate(folder)
    t = result.figures.calibration.temperature
    found = predict(folder, data / "val")
    assert [p.file for p in found] == [f"{data}/val/{name}" for name in result.judged.names]
    logits = torch.from_numpy(result.outputs.logits)
    expected = (logits / t).softmax(1).max(1)
    assert [p.classes[0] for p in found] == [sorted(CLASSES)[i] for i in expected.indices]
    assert np.allclose([p.probabilities[0] for p in found], expected.values, atol=1e-5)
    for one in found:
        assert len(one.classes) == 3
        assert sum(one.probabilities) == pytest.approx(1)
        assert one.probabilities == tuple(sorted(one.probabilities, reverse=True))


def test_the_temperature_is_of_the_same_weights_and_the_run_s_own_images(tmp_path):
    import shutil

    _, folder = photos_and_run()
    evaluate(folder)
    copy = tmp_path / "run"
    shutil.copytree(folder, copy, symlinks=True)
    trained = read_trained(copy)
    found = temperature_of(trained)
    assert found.source is not None
    path = found.source / "eval.json"
    content = json.loads(path.read_text())
    assert found.value == content["calibration"]["temperature"]
    assert "calibrated, with temperature" in str(found)
    shutil.rmtree(copy / "eval")
    path.parent.mkdir(parents=True)
    for change in (
        {"weights": {**content["weights"], "sha256": "0" * 64}},
        {"data": {**content["data"], "named": True}},
        {"tta": "flip"},
        {"made_by": "me"},
        {"calibration": None},
        {"calibration": {"temperature": 0.02}},  # no minimum
        {"calibration": {"temperature": "hot"}},
    ):
        path.write_text(json.dumps({**content, **change}))
        assert temperature_of(trained).value == 1, change
    assert "without a temperature" in str(temperature_of(trained))
    path.write_text("no JSON")
    assert temperature_of(trained).source is None


def save(path, mode="RGB", size=(9, 7), **options):
    Image.new(mode, size).save(path, **options)
    return path


def test_images_of_all_kinds_are_read_and_the_broken_ones_named(tmp_path):
    _, folder = photos_and_run()
    place = tmp_path / "new"
    place.mkdir()
    good = [
        save(place / "a cmyk.jpg", "CMYK"),
        save(place / "b palette.png", "P"),
        save(place / "c 16 bit.png", "I;16"),
        save(place / "d grey.png", "L"),
        save(place / "e alpha.webp", "RGBA"),
        save(place / "f 猫\n\x1b[2J\"'.png"),
        save(place / "g large.png", size=(3000, 20)),
    ]
    frames = [Image.new("RGB", (8, 8), (i, i, i)) for i in (0, 200)]
    frames[0].save(place / "h animated.webp", save_all=True, append_images=frames[1:])
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        whole, "jpeg"
    )
    (place / "i cut.jpg").write_bytes(whole.getvalue()[:900])
    (place / "j empty.png").write_bytes(b"")
    (place / "k text.png").write_text("hello")
    (place / "l folder.png").mkdir()
    save(place / "l folder.png/m.png")
    (place / "n link.png").symlink_to(place / "absent")
    (place / ".hidden.png").write_bytes(b"")
    found = {p.file.rpartition("/")[2]: p for p in predict(folder, place)}
    broken = {"i cut.jpg", "j empty.png", "k text.png", "n link.png"}
    assert {name for name, p in found.items() if p.error} == broken
    assert set(found) == {path.name for path in good} | broken | {"h animated.webp", "m.png"}
    for name in broken:
        assert name in found[name].error
        assert found[name].classes == ()


def test_a_broken_file_among_many_shifts_no_answer(tmp_path):
    data, folder = photos_and_run()
    images = sorted(str(path) for path in (data / "val").rglob("*.png"))
    absent = str(tmp_path / "absent.png")
    mixed = [absent, *images[:4], absent, *images[4:], absent]
    assert len(mixed) > BATCH  # so that batches differ too
    alone = {p.file: p for p in predict(folder, images)}
    found = predict(folder, mixed, topk=1)
    assert [p.file for p in found] == mixed
    for one in found:
        if one.file == absent:
            assert "No such file" in one.error
        else:
            assert one.classes == alone[one.file].classes[:1]
            assert one.probabilities == pytest.approx(alone[one.file].probabilities[:1], abs=1e-6)


def test_unsure_is_below_the_threshold():
    data, folder = photos_and_run()
    found = predict(folder, data / "val", threshold=0.5)
    assert [p.unsure for p in found] == [p.probabilities[0] < 0.5 for p in found]
    assert {p.unsure for p in predict(folder, data / "val", threshold=0)} == {False}
    assert {p.unsure for p in predict(folder, data / "val")} == {None}
    with pytest.raises(InputError, match="threshold"):
        predict(folder, data / "val", threshold=80)
    with pytest.raises(InputError, match="topk"):
        predict(folder, data / "val", topk=0)


def test_outputs_without_a_name_are_not_predicted(tmp_path):
    from judging import run_on

    data, _ = photos_and_run()
    folder = run_on(data, "--num-classes", "9", "--max-updates", "1", output=tmp_path / "runs")
    for one in predict(folder, data / "val", topk=9):
        assert sorted(one.classes) == sorted(CLASSES)
        assert sum(one.probabilities) == pytest.approx(1)


def test_a_model_of_grey_images_is_given_grey_ones(tmp_path):
    from runs_of_recipe import whole
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for i in range(20):
        pixels = np.rint(images[i].reshape(8, 8) * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(tmp_path / f"{i:02d}.png")
    trained = read_trained(whole())
    with torch.no_grad():
        pixels = torch.from_numpy(np.rint(images[:20] * 255 / 16)).view(-1, 1, 8, 8).float() / 255
        mean, std = trained.preprocessing["mean"][0], trained.preprocessing["std"][0]
        expected = trained.model((pixels - mean) / std).softmax(1).max(1)
    found = list(predictions(trained, files_named([tmp_path], stream=None)))
    assert [p.classes[0] for p in found] == [str(i) for i in expected.indices.tolist()]
    assert np.allclose([p.probabilities[0] for p in found], expected.values, atol=1e-5)
    assert len(labels) > 20


def test_files_folders_patterns_and_a_stream_name_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.png", "a/b/2.JPG", "a/3.txt", "a/[x].png", "c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def named(*names, stream=b""):
        return files_named(names, stream=io.BytesIO(stream))

    assert named("a") == ["a/1.png", "a/[x].png", "a/b/2.JPG"]
    assert named("c.png", "a/*.png") == ["c.png", "a/1.png", "a/[x].png"]
    assert named("a/[x].png") == ["a/[x].png"]  # a file of that name is no pattern
    assert named("**/*.JPG") == ["a/b/2.JPG"]
    assert named("absent.png") == ["absent.png"]
    assert named("-", stream=b"c.png\n\na/1.png\n") == ["c.png", "a/1.png"]
    assert named("-", stream=b"new\nline.png\0c.png\0") == ["new\nline.png", "c.png"]
    (tmp_path / "empty").mkdir()
    for names, says in (
        (["empty"], "holds no image"),
        (["x*.png"], "fits no file"),
        (["-"], "no image is named"),
    ):
        with pytest.raises(InputError, match=says):
            named(*names)
