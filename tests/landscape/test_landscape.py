"""`lbaccel landscape` on a run: its surface, its folder, its ranks, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from forks import run_forked, values
from judging import make_photos, photos_and_run, run_on
from torch.nn import functional as F

import lbaccel
from lbaccel import InputError, RunFailed, evaluate, loss_landscape
from lbaccel.cli import main
from lbaccel.data.pipelines import evaluation_batches
from lbaccel.landscape import folder as files
from lbaccel.landscape import images as images_module
from lbaccel.landscape import landscape as landscape_module
from lbaccel.landscape.images import subset
from lbaccel.landscape.pictures import draw
from lbaccel.landscape.words import barrier
from lbaccel.product import files as product_files
from lbaccel.recipe.trained_model import read_trained

FEW = {"x": "-1:1:5", "samples": 20}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take seconds, and one test draws them."""
    monkeypatch.setattr(landscape_module, "draw", lambda result, folder: [])
    monkeypatch.setattr(product_files, "draw_confusion", lambda result, path: None)
    monkeypatch.setattr(product_files, "draw_mistakes", lambda result, path: True)


def loss_of(trained, images):
    """Mean cross-entropy and top-1 in %, one image at a time."""
    losses, hits = [], 0
    with torch.no_grad():
        for x, y in evaluation_batches(
            images, preprocessing=dict(trained.preprocessing), batch_size=1
        ):
            logits = trained.model(x)
            losses.append(float(F.cross_entropy(logits.double(), y)))
            hits += int(logits.argmax(1) == y)
    return sum(losses) / len(losses), 100 * hits / len(losses)


def test_at_zero_it_is_the_evaluation_of_the_run(tmp_path):
    _, folder = photos_and_run()
    found = loss_landscape(folder, x="-1:1:3", split="val", output=tmp_path / "l")
    judged = evaluate(folder, output=tmp_path / "e")
    assert found.top1_pct[1] == judged.top1_pct
    truth, _ = loss_of(read_trained(folder), judged.judged.images)
    assert found.loss[1] == pytest.approx(truth, rel=1e-6)
    assert found.loss[0] != found.loss[1] != found.loss[2]


def test_training_images_are_taken_as_evaluation_has_them(tmp_path):
    _, folder = photos_and_run()
    found = loss_landscape(folder, x="-1:1:3", output=tmp_path / "l")
    trained = read_trained(folder)
    source = lbaccel.open_source(trained.settings.data.data)
    assert found.content["data"]["num_samples"] == len(source.train) == 36
    truth, share = loss_of(trained, source.train)
    assert found.loss[1] == pytest.approx(truth, rel=1e-6)
    assert found.top1_pct[1] == share


def test_so_many_samples_are_always_the_same_ones_and_hold_the_fewer():
    _, folder = photos_and_run()
    source = lbaccel.open_source(read_trained(folder).settings.data.data)
    chosen = [set(subset(source.train, n).names) for n in (5, 10, 10)]
    assert chosen[0] < chosen[1] == chosen[2]
    labels = list(subset(source.train, 9).labels)
    assert [labels.count(label) for label in range(3)] == [3, 3, 3]
    assert subset(source.train, 99) is subset(source.train, None) is source.train


def test_the_files_are_those_that_are_documented(tmp_path):
    _, folder = photos_and_run()
    out = tmp_path / "l"
    found = loss_landscape(folder, y="-1:1:3", seed=4, output=out, **FEW)
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        *("landscape.json", "surface.csv")
    ]
    content = json.loads((out / "landscape.json").read_text())
    assert content == json.loads(json.dumps(found.as_json()))
    assert content["complete"] is True and content["made_by"] == "lbaccel landscape"
    values = [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert content["x"] == {"low": -1.0, "high": 1.0, "num": 5, "values": values}
    assert (
        [len(row) for row in content["loss"]]
        == [5, 5, 5]
        == [len(row) for row in content["top1_pct"]]
    )
    assert content["norm"] == "filter" and content["seed"] == 4 and content["second"] is None
    assert content["weights"]["update"] == read_trained(folder).update
    assert abs(content["cosine"]) < 0.5 and content["lengths"]["x"] > 0
    table = list(csv.DictReader((out / "surface.csv").read_text().splitlines()))
    assert len(table) == 15
    row = table[7]
    assert (float(row["x"]), float(row["y"])) == (0.0, 0.0)
    assert float(row["loss"]) == content["loss"][1][2]
    along = loss_landscape(folder, seed=4, output=tmp_path / "x", **FEW)
    assert along.loss == content["loss"][1]  # the direction x is the same with and without y


def test_a_curve_and_a_surface_are_drawn_also_where_a_loss_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(landscape_module, "draw", draw)
    _, folder = photos_and_run()
    for name, y, pictures in (("c", None, ["curve"]), ("s", "-1:1:3", ["contours", "relief"])):
        out = tmp_path / name
        loss_landscape(folder, y=y, output=out, **FEW)
        assert sorted(p.stem for p in out.glob("*.png")) == pictures
        for picture in out.glob("*.png"):
            assert picture.read_bytes().startswith(b"\x89PNG")
    far = loss_landscape(
        folder, x="-3:3:3", direction="states", ignore="none", samples=5, output=tmp_path / "far"
    )
    assert far.loss[0] is None and (tmp_path / "far/curve.png").exists()
    assert '"loss": [\n  null' in (tmp_path / "far/landscape.json").read_text()


def killed_after(rank, folder, out, num):
    plain, done = files.add_point, []

    def add(*args):
        plain(*args)
        done.append(1)
        if len(done) == num:
            os.kill(os.getpid(), signal.SIGKILL)

    files.add_point = add
    loss_landscape(folder, output=out, **FEW)


def test_a_killed_landscape_goes_on_where_it_stood(tmp_path, monkeypatch):
    _, folder = photos_and_run()
    whole = loss_landscape(folder, output=tmp_path / "whole", **FEW)
    out = tmp_path / "l"
    (outcome,) = run_forked(killed_after, folder, out, 3)
    assert outcome.exit_code == -signal.SIGKILL
    assert json.loads((out / "landscape.json").read_text())["complete"] is False
    with (out / "points-00000.jsonl").open("a") as file:
        file.write('{"point": 3, "loss": 0.12')  # a line that a kill cut off
    computed, plain, said = [], landscape_module.values_at, []

    def counted(network, plane, places, images, **options):
        computed.extend(places)
        return plain(network, plane, places, images, **options)

    monkeypatch.setattr(landscape_module, "values_at", counted)
    found = loss_landscape(folder, output=out, say=said.append, **FEW)
    assert computed == [(0.5, 0.0), (1.0, 0.0)]
    assert "3 of 5 points are there, 2 are to be computed" in said
    assert found.points == whole.points  # to the bit
    texts = [(place / "surface.csv").read_text() for place in (out, tmp_path / "whole")]
    assert texts[0] == texts[1]
    assert not list(out.glob("points-*"))


def test_a_whole_landscape_is_read_and_not_computed_again(tmp_path, monkeypatch):
    _, folder = photos_and_run()
    found = loss_landscape(folder, output=tmp_path / "l", **FEW)
    monkeypatch.setattr(landscape_module, "prepared", None)  # no image is decoded
    assert loss_landscape(folder, output=tmp_path / "l", **FEW).points == found.points


def test_another_landscape_in_the_folder_is_refused_and_stays(tmp_path):
    _, folder = photos_and_run()
    out = tmp_path / "l"
    loss_landscape(folder, output=out, **FEW)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for options, told in (
        ({"seed": 1}, "--seed differs"),
        ({"x": "-1:1:7"}, "--x differs"),
        ({"y": "-1:1:3"}, "--y differs"),
        ({"direction": "states"}, "--direction differs"),
        ({"norm": "layer", "ignore": "none"}, "--norm, --ignore differ"),
        ({"samples": 21}, "the images differ"),
        ({"split": "val"}, "the images differ"),
        ({"ema": True}, "the checkpoint differs"),
    ):
        with pytest.raises(InputError, match="holds another landscape") as caught:
            loss_landscape(folder, output=out, **{**FEW, **options})
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="the checkpoint"):
        loss_landscape(folder / "checkpoints/last", ema=True, output=out, **FEW)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_foreign_and_damaged_folders_are_refused_and_stay(tmp_path):
    _, folder = photos_and_run()
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.txt, which no landscape wrote"):
        loss_landscape(folder, output=out, **FEW)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    out = tmp_path / "l"
    loss_landscape(folder, output=out, **FEW)
    whole = json.loads((out / "landscape.json").read_text())
    for damage in (
        {"loss": whole["loss"][:3]},
        {"loss": ["a"] * 5},
        {"top1_pct": [1e9] * 5},
        {"top1_pct": None},
        {"x": 3},
    ):
        (out / "landscape.json").write_text(json.dumps(whole | damage))
        with pytest.raises(InputError, match=r"is damaged|holds another landscape"):
            loss_landscape(folder, output=out, **FEW)
    (out / "landscape.json").write_text("{")
    with pytest.raises(InputError, match="no landscape wrote"):
        loss_landscape(folder, output=out, **FEW)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="is a file"):
        loss_landscape(folder, output=file, **FEW)


def test_a_folder_that_another_process_writes_is_left_to_it(tmp_path):
    from filelock import FileLock

    _, folder = photos_and_run()
    out = tmp_path / "l"
    out.mkdir()
    with FileLock(out / files.LOCK), pytest.raises(RunFailed, match="is being written by"):
        loss_landscape(folder, output=out, **FEW)
    assert len(loss_landscape(folder, output=out, **FEW).points) == 5


def on_rank(rank, folder, out):
    plain, mine = files.add_point, []

    def add(file, place, *rest):
        mine.append(place)
        plain(file, place, *rest)

    files.add_point = add
    found = loss_landscape(folder, y="-1:1:2", output=out, **FEW)
    return found.points, mine, torch.distributed.is_initialized()


def test_ranks_divide_the_points_and_their_surface_is_that_of_one_process(tmp_path):
    _, folder = photos_and_run()
    ((alone, whole, _),) = values(run_forked(on_rank, folder, tmp_path / "one"))
    assert len(whole) == 10
    for world_size in (2, 3):
        out = tmp_path / f"{world_size}"
        outcomes = values(run_forked(on_rank, folder, out, world_size=world_size))
        shares = [mine for _, mine, _ in outcomes]
        assert sorted(place for mine in shares for place in mine) == list(range(10))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        for points, _, joined in outcomes:
            assert joined
            assert points == alone  # to the bit
        texts = [(place / "surface.csv").read_text() for place in (out, tmp_path / "one")]
        assert texts[0] == texts[1]
        assert not list(out.glob("points-*"))


def failing_rank(rank, folder, out):
    if rank == 1:
        files.add_point = lambda *_: 1 / 0
    try:
        loss_landscape(folder, output=out, **FEW)
    except (RunFailed, ZeroDivisionError) as error:
        return type(error).__name__


def test_a_rank_that_fails_ends_all_of_them_and_the_points_of_the_others_stay(tmp_path):
    _, folder = photos_and_run()
    names = values(run_forked(failing_rank, folder, tmp_path / "l", world_size=2))
    assert names == ["RunFailed", "ZeroDivisionError"]
    said: list[str] = []
    loss_landscape(folder, output=tmp_path / "l", say=said.append, **FEW)
    assert "3 of 5 points are there, 2 are to be computed" in said


_second: list[Path] = []


def second_run(tmp_path_factory):
    """Another run on the same images, from other weights; made once."""
    if not _second:
        data, _ = photos_and_run()
        place = tmp_path_factory.mktemp("second")
        _second.append(run_on(data, "--seed", "2", output=place / "runs"))
    return _second[0]


@pytest.fixture
def two(tmp_path_factory):
    return photos_and_run()[1], second_run(tmp_path_factory)


def test_between_two_models_both_ends_are_the_models_with_their_statistics(two, tmp_path):
    first, second = two
    found = loss_landscape(first, second, x="0:1:3", split="val", output=tmp_path / "l")
    for place, folder in ((0, first), (2, second)):
        judged = evaluate(folder, output=tmp_path / f"e{place}")
        truth, share = loss_of(read_trained(folder), judged.judged.images)
        assert found.loss[place] == pytest.approx(truth, rel=1e-6)
        assert found.top1_pct[place] == share
    assert found.content["direction"] == "states"
    assert found.content["norm"] is found.content["seed"] is None
    states = [read_trained(folder).model.state_dict() for folder in two]
    middle = read_trained(first)
    middle.model.load_state_dict(
        {n: (t + states[1][n]) / 2 if t.is_floating_point() else t for n, t in states[0].items()}
    )
    truth, share = loss_of(middle, judged.judged.images)
    assert found.loss[1] == pytest.approx(truth, rel=1e-5)
    assert barrier(found) == pytest.approx(
        max(0.0, found.loss[1] - (found.loss[0] + found.loss[2]) / 2)
    )


def test_weights_alone_leave_the_statistics_those_of_the_first_model_and_it_is_said(two, tmp_path):
    first, second = two
    said: list[str] = []
    found = loss_landscape(
        first, second, x="0:1:2", direction="weights", output=tmp_path / "l", say=said.append
    )
    assert any("so that x = 1 is not the second one" in line for line in said)
    assert not any("another split" in line for line in said)
    whole = loss_landscape(first, second, x="0:1:2", output=tmp_path / "s")
    assert found.loss[0] == whole.loss[0] and found.loss[1] != whole.loss[1]


def test_beside_the_line_between_two_models_lies_a_random_direction(two, tmp_path):
    first, second = two
    found = loss_landscape(
        first, second, x="0:1:2", y="-1:1:3", norm="layer", samples=9, output=tmp_path / "l"
    )
    assert found.content["norm"] == "layer"
    line = loss_landscape(first, second, x="0:1:2", samples=9, output=tmp_path / "m")
    assert found.loss[1] == line.loss
    assert found.loss[0] != line.loss != found.loss[2]


def test_what_a_line_between_two_models_has_no_use_for_is_refused(two):
    first, second = two
    for options in ({"seed": 0}, {"norm": "filter"}, {"ignore": "none"}):
        with pytest.raises(InputError, match="a line between two models has none"):
            loss_landscape(first, second, **options)


def test_two_models_that_differ_in_more_than_their_weights_are_refused(tmp_path):
    data, first = photos_and_run()
    other = make_photos(tmp_path / "p", classes=("cat", "cow"))
    fewer = run_on(other, output=tmp_path / "runs")
    with pytest.raises(InputError, match="the classes differ"):
        loss_landscape(first, fewer)
    larger = run_on(data, "--img-size", "16", output=tmp_path / "larger")
    with pytest.raises(InputError, match=r"img_size=16, and .* has 8"):
        loss_landscape(first, larger)


def test_a_second_run_on_other_images_is_said(tmp_path):
    _, first = photos_and_run()
    second = run_on(make_photos(tmp_path / "p", seed=3, train=10), output=tmp_path / "runs")
    said: list[str] = []
    loss_landscape(first, second, x="0:1:2", samples=5, output=tmp_path / "l", say=said.append)
    assert said == [f"note: {second} was trained with another split or other images"]


def test_where_memory_does_not_suffice_the_surface_is_the_same_to_the_bit(tmp_path, monkeypatch):
    _, folder = photos_and_run()
    truth = loss_landscape(folder, output=tmp_path / "a", **FEW)
    monkeypatch.setattr(images_module, "default_budget", lambda *args, **options: 1000)
    assert loss_landscape(folder, output=tmp_path / "b", **FEW).points == truth.points

    def unknown(*args, **options):
        raise InputError("the free memory of this system can't be read")

    monkeypatch.setattr(images_module, "default_budget", unknown)
    assert loss_landscape(folder, output=tmp_path / "c", **FEW).points == truth.points


def test_an_export_and_a_copied_checkpoint_need_their_images_named(tmp_path):
    data, folder = photos_and_run()
    shutil.copytree(folder / "checkpoints/best", tmp_path / "copy")
    with pytest.raises(InputError, match=r"names no images. Give them: --images folder:PATH"):
        loss_landscape(tmp_path / "copy", **FEW)
    truth = loss_landscape(folder, output=tmp_path / "l", **FEW)
    found = loss_landscape(tmp_path / "copy", images=f"folder:{data}", **FEW)
    assert found.folder is None and found.points == truth.points


def test_an_interrupt_says_that_the_points_stay(tmp_path, monkeypatch, capsys):
    _, folder = photos_and_run()

    def interrupted(*args, **options):
        yield 1.0, 50.0
        raise KeyboardInterrupt

    monkeypatch.setattr(landscape_module, "values_at", interrupted)
    out = tmp_path / "l"
    assert main(["landscape", str(folder), "--x", "-1:1:5", "--output", str(out)]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"interrupted. The points that are done lie in {out}: the same line goes on from there."
    )
    assert len((out / "points-00000.jsonl").read_text().splitlines()) == 1


def test_the_command_says_what_the_surface_says(capsys, two):
    first, second = two
    before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    flags = ["--x", "-1:1:3", "--samples", "10"]
    assert main(["landscape", str(first), *flags]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[-1].startswith(f"files: {first}/landscapes/update_")
    assert any(line.startswith("first model: ") and "at x = 0" in line for line in lines)
    assert main(["landscape", str(first), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"][1] is not None and math.isfinite(found["loss"][1])
    assert main(["landscape", str(first), str(second), "--x", "0:1:3", "--samples", "10"]) == 0
    out = capsys.readouterr().out
    assert f"second model, at x = 1: {second}" in out and "barrier: " in out
    assert len(list((first / "landscapes").iterdir())) == 2  # each has a folder of its own
    shutil.rmtree(first / "landscapes")
    assert {p: p.read_bytes() for p in first.rglob("*") if p.is_file()} == before


def test_bad_input_is_a_sentence(capsys):
    _, folder = photos_and_run()
    for flags, told in (
        (["--x", "1:2"], "--x='1:2' is not LOW:HIGH:POINTS, such as -1:1:51"),
        (["--y=-1:1:0"], "--y='-1:1:0' is not LOW:HIGH:POINTS"),
        (["--norm", "filters"], "--norm='filters' is not one of filter, layer, weight"),
        (["--samples", "0"], "--samples='0' is not a whole number"),
        (["--images", "folder:absent"], "absent"),
        (["--x", "-1:1:1001", "--y", "-1:1:1001"], "a grid of 1,002,001 points"),
    ):
        assert main(["landscape", str(folder), *flags]) == 2
        err = capsys.readouterr().err
        assert told in err and "Traceback" not in err
    assert main(["landscape", "absent"]) == 2
    assert "absent does not exist" in capsys.readouterr().err
