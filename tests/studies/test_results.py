"""All numbers of a study's folder: of runs that are whole, missing, diverged and damaged."""

from __future__ import annotations

import json
import math
import random

import pytest
from made_studies import NUM_TEST, add_run, fill, make_study
from scipy.stats import t

from lbaccel.errors import InputError
from lbaccel.product.shares import wilson
from lbaccel.runs.folder import strict_json
from lbaccel.runs.groups import Mean
from lbaccel.studies.folder import CELLS, CHOSEN, cell_folder, choose, share, state_of, study_in
from lbaccel.studies.results import study_result
from lbaccel.studies.spec import ArmBatch
from lbaccel.studies.tables import as_csv, as_markdown, as_text
from lbaccel.studies.tuning import chosen

LOSS = {("plain", 128): 0.1, ("plain", 512): 3.0, ("linear", 512): 0.7}


def top(cell):
    """The seeds spread by +-0.1; a seed is as good at each place."""
    return 90 - LOSS.get((cell.arm, cell.batch), 0.0) + 0.1 * (cell.seed - 1)


@pytest.fixture
def whole(tmp_path):
    study = make_study(tmp_path / "study")
    fill(tmp_path / "study", study, top)
    return tmp_path / "study"


def of(rows, **where):
    (found,) = [one for one in rows if all(one[k] == v for k, v in where.items())]
    return found


def test_the_schema_is_whole_and_strict_json(whole):
    found = study_result(whole)
    assert json.loads(strict_json(found)) == found
    assert set(found) >= {
        *("kind", "name", "title", "question", "source", "scale", "note", "metric", "last"),
        *("level", "arms", "settings", "batches", "seeds", "baseline", "target", "runs", "table"),
        *("comparisons", "scaling_limits", "to_target", "tuning", "figures", "warnings"),
        "verdict",
    }
    assert (found["kind"], found["metric"], found["last"], found["level"]) == (
        "study",
        "val/top1",
        5,
        0.95,
    )
    assert found["baseline"] == {"arm": "plain", "batch": 32}
    assert found["source"]["authors"] == "A. Author"
    assert len(found["runs"]) == 18 and found["warnings"] == []
    run = of(found["runs"], cell="linear-gbs512-seed2")
    assert set(run) >= {
        "shared_with",
        "exit_reason",
        *("cell", "name", "folder", "arm", "batch", "seed", "status", "value", "train_value"),
        *("num_updates", "samples", "seconds", "peak_gib", "predicted_gib", "reached"),
        *("censored", "num_test", "history", "events", "noise", "provenance"),
    }
    assert run["folder"] == f"{CELLS}/linear-gbs512-seed2/20260101-000000-run"
    assert (run["num_updates"], run["samples"], run["seconds"], run["peak_gib"]) == (
        24,
        6 * 2048,
        12.5,
        0.5,
    )
    assert run["history"]["val/top1"][0] == [4, 2048, pytest.approx(2 / 3600, rel=1e-5), 69.4]
    assert set(run["history"]) == {"val/top1", "val/loss", "train/loss", "train/top1"}
    assert run["thinned"] == {}


def test_a_result_is_the_median_of_the_last_evaluations_and_never_the_best(tmp_path):
    study = make_study(tmp_path / "s", last=5)
    cell = study.cells()[0]
    add_run(tmp_path / "s", cell, [99.0, 50.0, 60.0, 90.0, 70.0, 80.0])
    run = study_result(tmp_path / "s")["runs"][0]
    assert run["value"] == 70.0
    # lines of training: 0.5 above at the half of an epoch, 1.0 at its end, as many samples each
    assert run["train_value"] == 70.75


def test_the_row_has_the_mean_the_interval_over_seeds_and_that_over_images(whole):
    found = study_result(whole)
    row = of(found["table"], arm="plain", batch=512)
    mean = Mean((86.9, 87.0, 87.1))
    assert (row["n"], row["diverged"], row["missing"]) == (3, 0, 0)
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((87.0, *mean.interval))
    assert row["wilson"] == pytest.approx([100 * b for b in wilson(1740, NUM_TEST)])
    assert (row["updates"], row["expected"], row["lr"]) == (24, None, 0.1)
    assert row["train_mean"] == pytest.approx(87.75)
    assert of(found["table"], arm="plain", batch=32)["expected"] == 88.33


def test_comparisons_are_the_baseline_s_and_the_pairs_each_once(whole):
    found = study_result(whole)["comparisons"]
    against = [(c["arm"], c["batch"], c["against_arm"], c["against_batch"]) for c in found]
    assert against == [
        ("plain", 128, "plain", 32),
        ("plain", 512, "plain", 32),
        ("linear", 32, "plain", 32),  # of the baseline, and of the pair
        ("linear", 128, "plain", 32),
        ("linear", 512, "plain", 32),
        ("linear", 128, "plain", 128),
        ("linear", 512, "plain", 512),
    ]
    last = found[-1]
    assert (last["n"], last["verdict"]) == (3, "gain")
    assert last["difference"] == pytest.approx(2.3)
    assert last["per_seed"] == {s: pytest.approx(2.3) for s in ("0", "1", "2")}
    assert found[1]["sentence"].startswith(
        "Loss: batch alone at batch 512 is 3.00 points lower than batch alone at batch 32"
    )


def test_places_of_equal_settings_share_their_runs_and_are_not_compared(whole):
    share(whole, {f"linear-gbs32-seed{s}": f"plain-gbs32-seed{s}" for s in range(3)})
    found = study_result(whole)
    shared = of(found["runs"], cell="linear-gbs32-seed1")
    assert shared["folder"] == f"{CELLS}/plain-gbs32-seed1/20260101-000000-run"
    assert of(found["table"], arm="linear", batch=32)["n"] == 3
    places = [(one["arm"], one["batch"]) for one in found["comparisons"]]
    assert ("linear", 32) not in places and len(places) == 6


def test_the_measured_spread_stands_beside_the_planned_one(tmp_path):
    study = make_study(tmp_path / "s", batches=[32, 128], pairs=[])
    values = {("plain", 32): (88, 90, 92), ("plain", 128): (87, 90, 93)}
    for cell in study.cells():
        add_run(tmp_path / "s", cell, [values.get((cell.arm, cell.batch), [90] * 3)[cell.seed]] * 5)
    found = study_result(tmp_path / "s")["spread"]
    # variances 4, 9, 0, 0 of the places; differences from plain at 32: 1, 4, 4
    assert (found["planned"], found["run"]) == (0.4, pytest.approx(math.sqrt(13 / 4)))
    assert found["pair"] == pytest.approx(math.sqrt(9 / 3))
    assert found["resolves"] == pytest.approx(t.ppf(0.975, 2) * math.sqrt(3) / math.sqrt(3))
    assert "3 seeds resolve 4.30 points" in found["sentence"]


def test_seeds_without_a_spread_say_nothing_of_it(tmp_path):
    study = make_study(tmp_path / "s", seeds=1)
    fill(tmp_path / "s", study, top)
    found = study_result(tmp_path / "s")
    assert found["spread"] == {
        "planned": 0.4,
        "run": None,
        "pair": None,
        "resolves": None,
        "sentence": None,
    }
    assert None not in found["verdict"]


def write_predictions(folder, cell, right, *, kind="val", update=24, names=None):
    """The table of an evaluation of a cell's run: "1" is a right image."""
    run = cell_folder(folder, cell) / "20260101-000000-run"
    table = run / "eval" / f"update_{update:06d}-{kind}" / "predictions.csv"
    table.parent.mkdir(parents=True)
    names = names or [f"{i}.png" for i in range(len(right))]
    rows = [f"{name},cat,cat,{one}\n" for name, one in zip(names, right, strict=True)]
    table.write_text("".join(["file,label,predicted,right\n", *rows]))


def test_mcnemar_s_test_stands_apart_from_the_verdict(whole):
    cells = {cell.name: cell for cell in study_in(whole).cells()}
    base, other = cells["plain-gbs32-seed1"], cells["plain-gbs512-seed1"]
    before = of(study_result(whole)["comparisons"], arm="plain", batch=512)
    write_predictions(whole, base, "11111111110000")
    write_predictions(whole, other, "10000000001111", update=12)  # an earlier one
    write_predictions(whole, other, "11000000001000")
    write_predictions(whole, cells["plain-gbs512-seed2"], "11", kind="val")  # alone
    found = of(study_result(whole)["comparisons"], arm="plain", batch=512)
    (test,) = found["on_images"]
    # 8 images that only the baseline has right, 1 that only the other has: of 9 at most 1
    assert test.pop("p") == pytest.approx(2 * 10 / 2**9)
    assert test == {"seed": 1, "num_images": 14, "only_one": 1, "only_other": 8}
    assert {**found, "on_images": []} == before
    assert "McNemar's exact test" in as_text(study_result(whole))


def test_predictions_of_other_images_are_not_compared(whole):
    cells = {cell.name: cell for cell in study_in(whole).cells()}
    write_predictions(whole, cells["plain-gbs32-seed0"], "1100")
    write_predictions(whole, cells["plain-gbs128-seed0"], "1100", names=list("abcd"))
    write_predictions(whole, cells["plain-gbs512-seed0"], "1100", kind="test")
    write_predictions(whole, cells["linear-gbs512-seed0"], "110", names=list("aab"))
    found = study_result(whole)
    assert not any(one["on_images"] for one in found["comparisons"])


def test_a_table_of_predictions_is_read_within_a_bound(whole, monkeypatch):
    cells = {cell.name: cell for cell in study_in(whole).cells()}
    for name in ("plain-gbs32-seed1", "plain-gbs512-seed1"):
        names = ["a\u2028.png", "b.png", "c.png", "d.png"]
        write_predictions(whole, cells[name], "1101", names=names)
    (test,) = of(study_result(whole)["comparisons"], arm="plain", batch=512)["on_images"]
    assert test["num_images"] == 4
    monkeypatch.setattr("lbaccel.studies.on_images.MOST_TABLE_BYTES", 40)
    assert of(study_result(whole)["comparisons"], arm="plain", batch=512)["on_images"] == []


def test_a_study_without_a_baseline_takes_its_first_place(tmp_path):
    study = make_study(tmp_path / "s", baseline=None, pairs=[])
    fill(tmp_path / "s", study, top)
    found = study_result(tmp_path / "s")
    assert found["baseline"] == {"arm": "plain", "batch": 32}
    assert len(found["comparisons"]) == 5


def test_a_pair_of_two_single_places(tmp_path):
    pair = {"arm": "linear", "batch": 512, "against": "plain", "against_batch": 128}
    study = make_study(tmp_path / "s", pairs=[pair])
    fill(tmp_path / "s", study, top)
    last = study_result(tmp_path / "s")["comparisons"][-1]
    assert (last["batch"], last["against_batch"]) == (512, 128)
    assert last["difference"] == pytest.approx(-0.6)


def test_the_scaling_limits(whole):
    limits = study_result(whole)["scaling_limits"]
    found = {(one["arm"], one["points"]): (one["batch"], one["factor"]) for one in limits}
    assert found == {
        ("plain", 0.5): (128, 4.0),
        ("plain", 1.0): (128, 4.0),
        ("linear", 0.5): (128, 4.0),
        ("linear", 1.0): (512, 16.0),
    }


def test_the_interquartile_mean_of_each_arm(whole):
    found = study_result(whole)["aggregates"]
    # 9 values, the lowest and highest two left out: 89.8 89.9 89.9 90 90 (sorted by hand)
    values = sorted([89.9, 90, 90.1, 89.8, 89.9, 90, 86.9, 87, 87.1])[2:7]
    assert of(found, arm="plain")["value"] == pytest.approx(sum(values) / 5)
    assert of(found, arm="plain")["num_runs"] == 9


def test_a_diverged_run_counts_and_is_no_run_that_is_left_out(tmp_path):
    folder = tmp_path / "s"
    study = make_study(folder)
    for cell in study.cells():
        if (cell.arm, cell.batch, cell.seed) == ("linear", 128, 1):
            add_run(folder, cell, [50.0, 60.0], status="failed", diverged=True)
        else:
            add_run(folder, cell, [top(cell)] * 5)
    found = study_result(folder)
    run = of(found["runs"], cell="linear-gbs128-seed1")
    assert (run["status"], run["value"], run["censored"]) == ("diverged", None, True)
    row = of(found["table"], arm="linear", batch=128)
    assert (row["n"], row["diverged"], row["missing"]) == (2, 1, 0)
    judged = of(found["comparisons"], arm="linear", batch=128, against_batch=32)
    assert judged["verdict"] == "not resolved"
    assert "1 of 3 runs of linear rule at batch 128 diverged" in judged["sentence"]
    assert of(found["scaling_limits"], arm="linear", points=0.5)["batch"] == 32
    points = of(found["to_target"], arm="linear")["points"]
    assert of(points, batch=128)["censored"] == 1
    assert "1 of 18 runs diverged." in found["verdict"]
    # it counts as 0 %, which the interquartile mean leaves out as one of the lowest two
    assert of(found["aggregates"], arm="linear")["num_runs"] == 9


def test_a_run_that_is_not_finite_at_its_end_diverged(tmp_path):
    study = make_study(tmp_path / "s", metric="val/loss", target={"value": 0.1})
    cell = study.cells()[0]
    end = {"update": 640, "samples_seen": 20480, "val/loss": None}
    add_run(tmp_path / "s", cell, [50.0] * 6, more=[end])
    assert study_result(tmp_path / "s")["runs"][0]["status"] == "diverged"


def test_a_run_that_is_missing_or_goes_on_has_no_result_yet(tmp_path):
    folder = tmp_path / "s"
    study = make_study(folder)
    for cell in study.cells()[1:]:
        add_run(folder, cell, [top(cell)] * 5)
    add_run(folder, study.cells()[0], [70.0] * 3, status="stopped")
    cell_folder(folder, study.cells()[5]).joinpath("20260101-000000-run", "config.yaml").unlink()
    found = study_result(folder)
    first = found["runs"][0]
    assert (first["status"], first["value"], first["censored"]) == ("stopped", None, False)
    missing = of(found["runs"], cell=study.cells()[5].name)
    assert (missing["status"], missing["name"], missing["history"]) == ("missing", None, {})
    assert of(found["table"], arm="plain", batch=32)["missing"] == 1
    assert "2 of 18 runs have no result yet." in found["verdict"]
    judged = of(found["comparisons"], arm="plain", batch=128)
    assert list(judged["per_seed"]) == ["1", "2"]  # paired by seed, and not by order
    assert judged["difference"] == pytest.approx(-0.1)
    assert found["aggregates"] == []


def truncate(path):
    path.write_bytes(path.read_bytes()[:40] + b"\n" + path.read_bytes()[40:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: truncate(run / "metrics.jsonl"),
        lambda run: (run / "metrics.jsonl").unlink(),
        lambda run: (run / "config.yaml").write_text("[1, 2]"),
        lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"),
        lambda run: (run / "env.json").write_text("{"),
        lambda run: (run / "resumes.jsonl").write_text('{"no": "update"}\n'),
    ],
    ids=["line", "no lines", "list", "bytes", "environment", "resumes"],
)
def test_a_damaged_run_is_one_warning_and_the_rest_is_judged(whole, damage):
    run = whole / CELLS / "linear-gbs128-seed1" / "20260101-000000-run"
    before = study_result(whole)
    damage(run)
    found = study_result(whole)
    (warning,) = found["warnings"]
    assert "linear-gbs128-seed1" in warning
    assert of(found["runs"], cell="linear-gbs128-seed1")["value"] is None
    others = [one for one in before["runs"] if one["cell"] != "linear-gbs128-seed1"]
    assert [one for one in found["runs"] if one["cell"] != "linear-gbs128-seed1"] == others
    assert of(found["table"], arm="linear", batch=128)["n"] == 2
    assert found["verdict"][-1] == "1 warning below."


def test_a_run_that_failed_is_a_warning_with_its_reason(tmp_path):
    study = make_study(tmp_path / "s")
    cells = study.cells()
    add_run(tmp_path / "s", cells[0], [80.0] * 3, status="failed", exit_reason="no disk left")
    add_run(tmp_path / "s", cells[1], [], status="done")
    found = study_result(tmp_path / "s")
    assert {of(found["runs"], cell=cell.name)["status"] for cell in cells[:2]} == {"failed"}
    assert found["warnings"] == [
        f"{cells[0].name} has no result: no disk left",
        f"{cells[1].name} has no result: it has no val/top1",
    ]
    assert of(found["table"], arm="plain", batch=32)["missing"] == 3


def damaged(path, rng):
    """A file with bytes changed, its end cut off, or a value of another kind."""
    content = path.read_bytes()
    way = rng.random()
    if way < 0.3:
        changed = bytearray(content)
        for _ in range(rng.choice([1, 3, 20])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if way < 0.4:
        return content[: rng.randrange(len(content))]
    lines = content.decode().splitlines()
    place = rng.randrange(len(lines))
    row = json.loads(lines[place])
    row.pop("check", None)
    inner = row[key] if isinstance(row[key := rng.choice(list(row))], dict) and row[key] else row
    values = [None, "x", -1, float("nan"), 1e400, [], {}, True, 10**400, "", [[]], {"a": {}}]
    inner[rng.choice(list(inner))] = rng.choice(values)
    lines[place] = json.dumps(row)
    return "\n".join([*lines, ""]).encode()


@pytest.mark.slow
def test_no_damage_to_the_files_of_a_run_ends_the_report(whole):
    rng = random.Random(0)
    files = [path for path in sorted((whole / CELLS).glob("*/*/*")) if path.is_file()]
    for _ in range(120):
        path = rng.choice(files)
        content = path.read_bytes()
        path.write_bytes(damaged(path, rng))
        found = study_result(whole)
        json.dumps(found, allow_nan=False)
        as_text(found), as_markdown(found), as_csv(found)
        assert len([one for one in found["runs"] if one["value"] is not None]) >= 17
        path.write_bytes(content)


DEEP = '{"status": ' + "[" * 500 + "]" * 500 + "}"
LARGE = '{"status": "done", "note": "' + "x" * (33 * 2**20) + '"}'


@pytest.mark.parametrize(
    "summary",
    ["[]", "{", '{"status": "done", "num_updates": "many"}', DEEP, LARGE],
    ids=["list", "half", "text", "deep", "large"],
)
def test_an_edited_summary_costs_no_more_than_its_run(whole, summary):
    path = whole / CELLS / "plain-gbs32-seed0" / "20260101-000000-run" / "summary.json"
    path.write_text(summary)
    found = study_result(whole)
    assert len([one for one in found["runs"] if one["value"] is not None]) >= 17
    assert of(found["table"], arm="plain", batch=512)["n"] == 3
    assert summary not in (DEEP, LARGE) or "plain-gbs32-seed0" in found["warnings"][0]


@pytest.mark.parametrize("content", [DEEP, LARGE], ids=["deep", "large"])
def test_files_out_of_bounds_are_read_as_damaged_ones(whole, content):
    run = whole / CELLS / "plain-gbs32-seed0" / "20260101-000000-run"
    (run / "summary.json").write_text(content)
    (whole / CHOSEN).write_text(content)
    assert state_of(run) == "stopped"  # `lbaccel study run` asks too
    assert study_result(whole)["tuning"] == []


@pytest.mark.parametrize(
    "damage",
    [
        "text",
        {},
        {"batch": None},
        {"values": [None]},
        {"results": "71"},
        {"best": "0.1"},
        {"setting": 3},
        {"arm": ["plain"]},
    ],
)
def test_a_damaged_choice_of_the_grid_is_left_out(whole, damage):
    entry = {"arm": "plain", "batch": 32, "setting": "base_lr", "values": [0.05, 0.1, 0.2]}
    entry |= {"results": [70.0, 71.0, None], "best": 0.1, "at_edge": False}
    wrong = {**entry, "batch": 128, **damage} if damage and isinstance(damage, dict) else damage
    (whole / CHOSEN).write_text(json.dumps([wrong, entry]))
    found = study_result(whole)
    as_text(found), as_markdown(found), as_csv(found)
    assert found["tuning"] == [entry]
    assert chosen(whole) == {ArmBatch("plain", 32): 0.1}


def test_fewer_evaluations_than_the_median_takes_are_said(tmp_path):
    study = make_study(tmp_path / "s", batches=[32], pairs=[], seeds=1)
    add_run(tmp_path / "s", study.cells()[0], [80.0, 90.0, 85.0])
    found = study_result(tmp_path / "s")
    assert found["runs"][0]["value"] == 85.0
    assert "plain-gbs32-seed0 has 3 evaluations" in found["warnings"][0]


def test_the_first_meeting_of_the_target_and_the_censored_runs(tmp_path):
    folder = tmp_path / "s"
    study = make_study(folder, target=80.0, batches=[32, 128])
    for cell in study.cells():
        never = cell.arm == "plain" and cell.batch == 128 and cell.seed == 2
        add_run(folder, cell, [70.0, 75.0] if never else [70.0, 79.0, 80.0, 60.0, 90.0])
    found = study_result(folder)
    run = found["runs"][0]
    assert run["reached"] == {"updates": 192, "samples": 6144, "hours": pytest.approx(96 / 3600)}
    assert run["censored"] is False
    plain = of(found["to_target"], arm="plain")
    assert [one["updates"] for one in plain["points"]] == [[192, 192, 192], [48, 48, None]]
    assert [one["mean"] for one in plain["points"]] == [192.0, None]
    assert "1 of 6 runs never reached it (censored)." in plain["sentence"]
    assert of(found["runs"], cell="plain-gbs128-seed2")["censored"] is True


def test_without_a_target_nothing_is_timed(tmp_path):
    study = make_study(tmp_path / "s", target=None)
    fill(tmp_path / "s", study, top)
    found = study_result(tmp_path / "s")
    assert found["to_target"] == []
    assert found["target"] is None
    assert found["runs"][0]["reached"] is None and found["runs"][0]["censored"] is False


def test_the_noise_scale_stands_beside_the_fit(tmp_path):
    folder = tmp_path / "s"
    study = make_study(folder, target=80.0)
    for cell in study.cells():
        at = {"update": 3, "samples_seen": 3 * cell.batch, "noise/low": 50.0, "noise/high": None}
        later = {"update": 10**6, "samples_seen": 10**8, "noise/critical_batch_size": 7.0}
        lines = [{**at, "noise/critical_batch_size": 100.0 + cell.seed}, later]
        add_run(folder, cell, [top(cell)] * 5)
        run = cell_folder(folder, cell) / "20260101-000000-run" / "metrics.jsonl"
        rest = run.read_text().splitlines()
        rest.insert(0, json.dumps(lines[0]))
        run.write_text("\n".join([*rest, json.dumps(later)]) + "\n")
    found = study_result(folder)
    linear = of(found["to_target"], arm="linear")
    # at the target, which all meet at their first evaluation, and not at the end
    assert linear["noise_scale"] == {"critical_batch": 101.0, "low": 50.0, "high": None}
    assert "The noise scale of its runs gives 100 (50 to unbounded)." in linear["sentence"]
    assert found["runs"][0]["noise"][0] == [3, 96, 100.0, 50.0, None]


def test_the_noise_scale_at_the_target_is_the_last_reading_before_it(tmp_path):
    folder = tmp_path / "s"
    study = make_study(folder, target=80.0, batches=[32, 128])
    for cell in study.cells():
        run = add_run(folder, cell, [70.0, 90.0])
        at = 2 * 2048 // cell.batch
        # at the target the reading is its update; many follow, so a page shows few of all
        lines = [
            {"update": u, "samples_seen": u * cell.batch, "noise/critical_batch_size": float(u)}
            | {"noise/low": 1.0, "noise/high": 1e6}
            for u in [*range(1, at), *range(at + 1, at + 4000)]
        ]
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        both = sorted([*logged, *lines], key=lambda line: line["update"])
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in both))
    found = study_result(folder)
    # batch 32 meets it at update 128 and batch 128 at 32: the last readings are one update before
    assert of(found["to_target"], arm="linear")["noise_scale"]["critical_batch"] == 79.0
    assert max(len(one["noise"]) for one in found["runs"]) <= 200


def test_an_arm_whose_batch_grows_has_no_critical_batch(tmp_path):
    grows = {"batch_schedule": "bsi", "factor": 2}
    arms = {"plain": {}, "bsi": {"settings": grows}}
    study = make_study(tmp_path / "s", arms=arms, pairs=[], expected={})
    fill(tmp_path / "s", study, top)
    sentence = of(study_result(tmp_path / "s")["to_target"], arm="bsi")["sentence"]
    assert sentence == "bsi: no critical batch, since its batch grows in training."


def test_settings_that_differ_between_arms_and_those_that_are_equal(whole):
    found = study_result(whole)
    differing = {arm["name"]: arm["settings"] for arm in found["arms"]}
    assert differing == {"plain": {"lr_scaling": "none"}, "linear": {"lr_scaling": "linear"}}
    assert found["settings"]["norm_batch_size"] == 32
    assert "seed" not in found["settings"] and "global_batch_size" not in found["settings"]
    assert "workers" not in found["settings"]


def test_a_setting_that_follows_the_batch_is_said_once_with_its_values(tmp_path):
    per_batch = {32: {"base_lr": 0.1}, 128: {"base_lr": 0.2}, 512: {"base_lr": 0.4}}
    arms = {
        "a": {"settings": {"norm_batch_size": "batch / 4"}, "per_batch": per_batch},
        "b": {"settings": {"norm_batch_size": "batch / 4", "base_lr": 0.1}},
    }
    study = make_study(tmp_path / "s", arms=arms, pairs=[], expected={}, baseline=None)
    fill(tmp_path / "s", study, top)
    found = study_result(tmp_path / "s")
    assert found["settings"]["norm_batch_size"] == "8 at 32, 32 at 128, 128 at 512"
    differing = {arm["name"]: arm["settings"] for arm in found["arms"]}
    assert differing == {
        "a": {"base_lr": "0.1 at 32, 0.2 at 128, 0.4 at 512"},
        "b": {"base_lr": 0.1},
    }


def test_a_study_before_its_first_run_has_the_settings_that_it_states(tmp_path):
    make_study(tmp_path / "s")
    found = study_result(tmp_path / "s")
    differing = {arm["name"]: arm["settings"] for arm in found["arms"]}
    assert differing == {"plain": {"lr_scaling": "none"}, "linear": {"lr_scaling": "linear"}}
    assert found["settings"] == {"norm_batch_size": 32, "model": "resnet10t", "epochs": 6.0}
    assert "18 of 18 runs have no result yet." in found["verdict"]
    assert {row["n"] for row in found["table"]} == {0}


def test_before_its_runs_an_arm_has_the_default_of_what_another_arm_states(tmp_path):
    arms = {
        "a": {"settings": {}},
        "b": {"settings": {"mixup": 0.8, "warmup": "none", "model_kwargs": {"stem": 8}}},
        "c": {"settings": {"batch_schedule": "bsi", "factor": [2], "milestones": [1]}},
    }
    study = make_study(tmp_path / "s", arms=arms, pairs=[], expected={}, baseline=None)
    for begun in (False, True):  # where arm c has runs, the others have what they state still
        if begun:
            cells = [cell for cell in study.cells() if cell.arm == "c"]
            for cell in cells:
                add_run(tmp_path / "s", cell, [70.0, 80.0])
        found = study_result(tmp_path / "s")
        of_arms = {arm["name"]: arm["settings"] for arm in found["arms"]}
        assert {name: one["mixup"] for name, one in of_arms.items()} == {"a": 0, "b": 0.8, "c": 0}
        assert of_arms["b"]["model_kwargs"] == "stem=8"
        assert of_arms["a"]["model_kwargs"] is None
        assert "mixup" not in found["settings"] and "model_kwargs" not in found["settings"]
    # under a batch schedule there is no warmup unless it is asked for
    assert (of_arms["a"]["warmup"], of_arms["b"]["warmup"]) == ("gradual", "none")


def test_a_best_value_at_the_edge_of_its_grid_is_a_warning(whole):
    entry = {"arm": "plain", "batch": 32, "setting": "base_lr", "values": [0.05, 0.1]}
    entry |= {"results": [70.0, 71.0], "best": 0.1, "at_edge": True}
    choose(whole, [entry, {**entry, "batch": 128, "at_edge": False}])
    found = study_result(whole)
    assert len(found["tuning"]) == 2
    (warning,) = found["warnings"]
    assert warning.startswith("plain at batch 32: the best base_lr, 0.1, lies at the edge")


def test_resumes_and_a_lack_of_memory_are_events(tmp_path):
    folder = tmp_path / "s"
    study = make_study(folder)
    run = add_run(folder, study.cells()[0], [80.0])
    lines = [(2, 32), (4, 16), (6, 32), (8, 16), (10, 16)]
    rows = [{"update": u, "samples_seen": 32 * u, "batch/micro": m} for u, m in lines]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text)
    (run / "resumes.jsonl").write_text(json.dumps({"update": 6, "plan": "32 = 2 x 16"}) + "\n")
    events = study_result(folder)["runs"][0]["events"]
    assert events == [
        {
            "kind": "oom",
            "update": 4,
            "text": "memory ran short: the micro-batch went from 32 to 16 samples",
        },
        {"kind": "resume", "update": 6, "text": "resumed after update 6: 32 = 2 x 16"},
    ]
    (run / "resumes.jsonl").unlink()
    rows[0]["batch/micro"] = 16  # the plan of the run has 32
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = study_result(folder)["runs"][0]["events"]
    assert [(one["kind"], one["update"]) for one in events] == [("oom", 2), ("oom", 8)]


def test_each_number_has_its_provenance(whole):
    found = of(study_result(whole)["runs"], cell="plain-gbs128-seed2")["provenance"]
    assert found["command"] == "lbaccel-train --config settings.yaml"
    assert (found["commit"], found["versions"]) == ("0123abcd", {"torch": "2.15.0"})
    assert found["hardware"] == "cpu (2 cores), Linux, Python 3.12.1"
    assert found["plan"]["micro_batch_size"] == 32
    assert found["origin"]["norm_batch_size"] == "settings.yaml"
    assert found["reproduce"] == (
        "lbaccel train --global-batch-size 128 --norm-batch-size 32 --epochs 6 "
        "--lr-scaling none --seed 2"
    )


def test_curves_are_short_and_keep_their_last_point(tmp_path):
    study = make_study(tmp_path / "s", batches=[32], pairs=[], seeds=1)
    many = [
        {"update": 640 + i, "samples_seen": 9000 + i, "train/loss": 77.0 if i == 3333 else i % 2}
        for i in range(4000)
    ]
    add_run(tmp_path / "s", study.cells()[0], [80.0] * 5, more=many)
    run = study_result(tmp_path / "s")["runs"][0]
    history = run["history"]
    assert 150 < len(history["train/loss"]) <= 200
    assert history["train/loss"][-1][0] == 640 + 3999
    values = [point[3] for point in history["train/loss"]]
    assert max(values) == 77.0 and min(values) == 0.0, "the extremes are kept"
    assert len(history["val/top1"]) == 5
    assert run["thinned"] == {"train/loss": 4010}


def test_a_folder_that_is_no_study_s_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"holds no study\.yaml"):
        study_result(tmp_path)


def test_the_verdict_begins_with_what_was_asked(whole):
    said = study_result(whole)["verdict"]
    assert said[0] == "Of 7 comparisons 2 show a loss, 1 shows a gain and 4 show no loss."
    assert said[1] == (
        "batch alone against batch alone at batch 32: loss at batch 512 (-3.00); no loss at batch "
        "128 (-0.10)."
    )
    assert any(
        line.startswith("linear rule against batch alone at the same batch: ") for line in said
    )
    # the two limits of "batch alone" lie at one batch size
    assert len([line for line in said if line.startswith("batch alone: within")]) == 1
    assert len([line for line in said if line.startswith("linear rule: within")]) == 2
    assert said[-1].startswith("The value of a run is the median of its last 5 evaluations of val")
    assert "A difference is taken seed by seed" in said[-1] and "inside ±0.5 points" in said[-1]


def test_one_seed_gives_no_verdict(tmp_path):
    study = make_study(tmp_path / "s", seeds=1)
    fill(tmp_path / "s", study, top)
    found = study_result(tmp_path / "s")
    assert {one["verdict"] for one in found["comparisons"]} == {"not enough seeds"}
    assert any("one seed, so no verdict is possible" in line for line in found["verdict"])
