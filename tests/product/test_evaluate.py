"""`evaluate`: the run's own number, on any number of ranks, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_forked, values
from judging import CLASSES, make_photos, photos_and_run, run_on
from runs_of_recipe import run, whole
from scipy.special import softmax

import lbaccel
from lbaccel import InputError, RunFailed, evaluate
from lbaccel.data.pipelines import evaluation_batches
from lbaccel.product import files
from lbaccel.product import logits as logits_module
from lbaccel.recipe.trained_model import read_trained


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take seconds, and test_files.py draws them."""
    monkeypatch.setattr(files, "draw_confusion", lambda result, path: None)
    monkeypatch.setattr(files, "draw_mistakes", lambda result, path: True)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_run_on_arrays_has_its_own_number_to_the_bit(tmp_path):
    folder = whole()
    assert evaluate(folder, output=tmp_path / "e").top1_pct == summary(folder)["best_val_top1"]


def test_a_run_on_files_has_its_own_number_to_the_bit(tmp_path):
    _, folder = photos_and_run()
    assert evaluate(folder, output=tmp_path / "e").top1_pct == summary(folder)["best_val_top1"]
    last = evaluate(folder / "checkpoints/last", output=tmp_path / "l")
    assert last.top1_pct == summary(folder)["val_top1"]
    average = evaluate(folder / "checkpoints/last", ema=True, output=tmp_path / "a")
    assert average.top1_pct == summary(folder)["val_top1_ema"]


def test_the_number_is_that_of_batches_as_large_as_the_run_s(monkeypatch):
    _, folder = photos_and_run()
    assert logits_module.batch_of(read_trained(folder)) == 6  # --micro-batch-size
    sizes = []
    plain = logits_module.evaluation_batches

    def seen(*args, **options):
        sizes.append(options["batch_size"])
        return plain(*args, **options)

    monkeypatch.setattr(logits_module, "evaluation_batches", seen)
    evaluate(folder)
    assert sizes == [6]


def judge(rank, folder, data):
    result = evaluate(folder, data, output=Path(f"rank{rank}"))
    return result.as_json(), result.outputs.logits, torch.distributed.is_initialized()


def test_three_ranks_count_each_sample_once_and_give_one_rank_s_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, folder = photos_and_run()
    data = make_photos(tmp_path / "new", val=7, seed=5)  # 21 images: 4 batches, the last of 3
    ((alone, logits, _),) = values(run_forked(judge, folder, f"folder:{data}"))
    together = values(run_forked(judge, folder, f"folder:{data}", world_size=3))
    assert alone["n"] == 21
    for found, its_logits, joined in together:
        assert joined
        assert found == alone
        assert np.array_equal(its_logits, logits)  # to the bit
    assert Path("rank0/eval.json").exists()
    assert not Path("rank1").exists()


def test_more_ranks_than_batches_still_count_each_sample_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, folder = photos_and_run()
    few = make_photos(tmp_path / "few", val=1)
    outcomes = values(run_forked(judge, folder, f"folder:{few}", world_size=3))
    assert {found["n"] for found, _, _ in outcomes} == {3}


def test_flip_is_the_mean_of_the_probabilities_of_image_and_mirror_image(tmp_path):
    _, folder = photos_and_run()
    result = evaluate(folder, tta="flip", output=tmp_path / "e")
    trained = read_trained(folder)
    images = result.judged.images
    expected = []
    with torch.no_grad():
        for batch, _ in evaluation_batches(
            images, preprocessing=dict(trained.preprocessing), batch_size=6
        ):
            both = [trained.model(x).double().softmax(1) for x in (batch, batch.flip(3))]
            expected.append((both[0] + both[1]) / 2)
    assert np.allclose(result.probabilities, torch.cat(expected).numpy(), rtol=1e-6)
    assert result.as_json()["tta"] == "flip"
    assert not np.allclose(result.probabilities, evaluate(folder).probabilities)


def test_an_evaluation_that_ran_out_of_memory_counts_each_sample_once(monkeypatch):
    _, folder = photos_and_run()
    truth = evaluate(folder)
    plain, calls = logits_module.KeptLogits.forward, []

    def short(self, images):
        calls.append(len(images))
        found = plain(self, images)  # kept, and then the memory is not enough
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return found

    monkeypatch.setattr(logits_module.KeptLogits, "forward", short)
    found = evaluate(folder)
    assert calls == [6, 6, 3, 3, 3]
    assert np.allclose(found.outputs.logits, truth.outputs.logits, rtol=1e-5, atol=1e-6)


def test_an_export_and_a_copied_checkpoint_give_the_same_number(tmp_path):
    from lbaccel.cli import main

    data, folder = photos_and_run()
    assert main(["export", str(folder), "--to", str(tmp_path / "export")]) == 0
    shutil.copytree(folder / "checkpoints/best", tmp_path / "copy")
    truth = evaluate(folder)
    said: list[str] = []
    for path in (tmp_path / "export", tmp_path / "copy"):
        found = evaluate(path, f"folder:{data}", say=said.append)
        assert found.folder is None
        assert np.allclose(found.outputs.logits, truth.outputs.logits, atol=1e-6)
        assert found.figures.confusion.tolist() == truth.figures.confusion.tolist()
    with pytest.raises(InputError, match="names no images"):
        evaluate(tmp_path / "export")


def test_a_share_held_out_is_the_run_s_also_for_its_export(tmp_path):
    from lbaccel.cli import main

    data = make_photos(tmp_path / "photos", val=0)
    folder = run_on(data / "train", "--val-fraction", "0.25", output=tmp_path / "runs")
    assert main(["export", str(folder), "--to", str(tmp_path / "export")]) == 0
    said: list[str] = []
    found = evaluate(tmp_path / "export", f"folder:{data / 'train'}", say=said.append)
    assert found.judged.names == evaluate(folder).judged.names
    assert said == []
    shutil.copytree(folder / "checkpoints/best", tmp_path / "copy")
    evaluate(tmp_path / "copy", f"folder:{data / 'train'}", say=said.append)
    assert "nothing says which images this model was trained with" in said[0]


def test_other_images_than_the_run_s_are_refused_unless_they_are_named(tmp_path):
    data = make_photos(tmp_path / "photos")
    folder = run_on(data, output=tmp_path / "runs")
    (data / "val/cat/0.png").unlink()
    with pytest.raises(InputError, match="14 validation images in place of 15") as caught:
        evaluate(folder)
    assert f"name it: --data folder:{data}" in str(caught.value)
    said: list[str] = []
    found = evaluate(folder, f"folder:{data}", say=said.append)
    assert found.figures.n == 14
    assert "other images than the run's own: 14 validation images in place of 15" in said[0]
    assert found.folder is not None
    assert found.folder.name.startswith("update_")
    assert "photos" in found.folder.name
    shutil.rmtree(data)
    with pytest.raises(InputError, match=r"absent.*say so: --data folder:PATH"):
        evaluate(folder)


def test_classes_are_matched_by_name_and_others_refused(tmp_path):
    data, folder = photos_and_run()
    other = make_photos(tmp_path / "other", classes=("cat", "cow", "dog"))
    with pytest.raises(InputError, match=r"the classes differ.*'cow' only in the images"):
        evaluate(folder, f"folder:{other}")
    assert evaluate(folder, f"folder:{data}").figures.n == 15


def test_a_test_set_is_read_where_there_is_one(tmp_path):
    _, folder = photos_and_run()
    with pytest.raises(InputError, match="has no test set"):
        evaluate(folder, split="test")
    with pytest.raises(InputError, match="split='train' is not one of"):
        evaluate(folder, split="train")


def test_the_images_of_the_test_set_are_judged_and_not_those_of_validation(tmp_path):
    data, folder = photos_and_run()
    other = make_photos(tmp_path / "other", val=2, seed=9)
    photos = shutil.copytree(data, tmp_path / "photos")
    shutil.copytree(other / "val", photos / "test")
    result = evaluate(folder, f"folder:{photos}", split="test", output=tmp_path / "out")
    assert result.figures.n == 6
    assert result.judged.names[0] == "cat/0.png"
    assert result.as_json()["data"]["split"] == "test"
    expected = evaluate(folder, f"folder:{other}", say=lambda _: None)
    assert np.array_equal(result.outputs.logits, expected.outputs.logits)


def test_two_models_are_compared_on_the_same_images(tmp_path):
    data, folder = photos_and_run()
    other = run_on(data, "--base-lr", "0.3", output=tmp_path / "runs")
    result = evaluate(folder, against=other, output=tmp_path / "e")
    labels = result.judged.labels
    a = result.outputs.predicted == labels
    b = evaluate(other).outputs.predicted == labels
    found = result.as_json()["against"]
    assert (found["only_first"], found["only_second"]) == (sum(a & ~b), sum(b & ~a))
    assert found["top1_pct"] == summary(other)["best_val_top1"]


def test_a_model_with_its_classes_in_another_order_is_aligned_by_name(tmp_path):
    _, folder = photos_and_run()
    turned = tmp_path / "turned"
    shutil.copytree(folder, turned, symlinks=True)
    turn_outputs(turned / "checkpoints/best")
    result = evaluate(folder, against=turned, output=tmp_path / "e")
    assert result.other is not None
    assert (result.other.test.only_first, result.other.test.only_second) == (0, 0)
    assert result.other.figures.confusion.tolist() == result.figures.confusion.tolist()
    assert result.other.figures.loss == pytest.approx(result.figures.loss, rel=1e-6)
    own = evaluate(turned, output=tmp_path / "t")  # labels follow the network's order
    assert own.top1_pct == result.top1_pct


def turn_outputs(checkpoint):
    """The same network with its classes in the opposite order."""
    from safetensors.torch import load_file, save_file

    from lbaccel.runs.checkpoints import fingerprint

    weights = load_file(checkpoint / "model.safetensors")
    weights |= {k: weights[k].flip(0).contiguous() for k in ("fc.weight", "fc.bias")}
    save_file(weights, checkpoint / "model.safetensors")
    names = json.loads((checkpoint / "classes.json").read_text())
    (checkpoint / "classes.json").write_text(json.dumps(names[::-1]))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in ("model.safetensors", "classes.json"):
        manifest["files"][name] = fingerprint(checkpoint / name)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_second_run_of_another_split_is_refused(tmp_path):
    data = make_photos(tmp_path / "photos", val=0)
    flags = ("--val-fraction", "0.25")
    first = run_on(data / "train", *flags, output=tmp_path / "a")
    second = run_on(data / "train", *flags, "--seed", "2", output=tmp_path / "b")
    with pytest.raises(InputError, match="some of these may be its training images"):
        evaluate(first, against=second)
    said: list[str] = []
    evaluate(first, f"folder:{data / 'train'}", against=second, say=said.append)
    assert any("trained with another split" in line for line in said)


def test_outputs_without_a_name_count_as_in_training(tmp_path):
    data, _ = photos_and_run()
    folder = run_on(data, "--num-classes", "5", output=tmp_path / "runs")
    result = evaluate(folder)
    assert result.top1_pct == summary(folder)["best_val_top1"]
    assert result.trained.classes == (*sorted(CLASSES), "output 3", "output 4")
    assert len(result.figures.classes) == 3


def test_a_corrupt_image_is_named(tmp_path):
    _, folder = photos_and_run()
    data = make_photos(tmp_path / "photos")
    (data / "val/dog/2.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"2\.png can't be read as an image"):
        evaluate(folder, f"folder:{data}")


def test_float64_runs_are_evaluated_in_float64(tmp_path):
    folder = run("--precision", "fp64", "--max-updates", "2", output=tmp_path / "runs")
    result = evaluate(folder)
    assert result.precision == "fp64"
    assert result.top1_pct == summary(folder)["best_val_top1"]
    assert not np.array_equal(result.outputs.logits, result.outputs.logits.astype(np.float32))


def beside_another_precision(rank, folder):
    from accelerate import Accelerator

    Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(RunFailed, match=r"trained in fp32.*of another precision.*lbaccel eval"):
        evaluate(folder)


def test_another_precision_in_one_process_is_a_sentence():
    values(run_forked(beside_another_precision, photos_and_run()[1]))


def test_probabilities_are_the_softmax_of_the_logits():
    _, folder = photos_and_run()
    result = evaluate(folder)
    assert np.allclose(result.probabilities, softmax(result.outputs.logits, axis=1))
    assert lbaccel.Evaluation is type(result)
