"""The runs of a study as processes: none twice, none lost, and a study goes on after a kill.

The processes are a script in place of `lbaccel.train`; tests/studies/test_study_command.py runs it.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import yaml

from lbaccel.errors import InputError
from lbaccel.studies.checks import judged_on_test_images, tune_of
from lbaccel.studies.folder import (
    begin,
    cell_folder,
    chosen_in,
    is_study,
    run_folder,
    shared_names,
    state_of,
    study_in,
)
from lbaccel.studies.launching import final_cells, one_of_each, run_study
from lbaccel.studies.read import study_of
from lbaccel.studies.running import Worker, alike, claimed, command_lines
from lbaccel.studies.spec import ArmBatch
from lbaccel.studies.tuning import best_of, grid_cells, grid_of, settled

SCRIPT = """
import json, os, sys, time, yaml
from pathlib import Path
settings = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
home = Path(sys.argv[sys.argv.index("--output") + 1])
with open(os.environ["COUNT"], "a") as count:
    count.write(f"{home.name}\\n")
time.sleep(float(os.environ.get("SLEEP", "0")))
if settings["base_lr"] == 13:
    print("error: --base-lr 13: no")
    sys.exit(2)
if settings["base_lr"] == 7:
    print("a traceback")
    sys.exit(1)
run = home / "20260101-000000-x"
run.mkdir(exist_ok=True)
(run / "config.yaml").write_text(yaml.safe_dump(settings))
values = [90 - 100 * abs(settings["base_lr"] - 0.2)] * 3
lines = [{"update": i, "samples_seen": i, "val/top1": v} for i, v in enumerate(values, 1)]
(run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
ends = {"status": "failed", "diverged": True} if settings["base_lr"] == 9 else {"status": "done"}
(run / "summary.json").write_text(json.dumps(ends))
"""


def study(**changed):
    whole = {
        "name": "mine",
        "settings": {"data": "folder:photos", "norm_batch_size": 8, "base_lr": 0.1},
        "arms": {"one": {}, "two": {"settings": {"base_lr": 0.2}}},
        "batches": [8, 16],
        "seeds": 2,
    }
    return judged_on_test_images(study_of({**whole, **changed}, None))


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A command in place of lbaccel.train, and how often each run was begun."""
    path, count = tmp_path / "train.py", tmp_path / "count.txt"
    path.write_text(SCRIPT)
    monkeypatch.setenv("COUNT", str(count))

    def begun():
        return sorted(count.read_text().split()) if count.exists() else []

    return (sys.executable, str(path)), begun


def test_each_run_is_begun_once_and_those_that_ended_never_again(tmp_path, script):
    command, begun = script
    folder, said = tmp_path / "results", []
    mine = begin(folder, study())
    cells = mine.cells()
    tally = Worker(folder, mine, 2, said.append, command).run(cells)
    assert (tally.ended, tally.total) == (8, 8)
    assert begun() == sorted(cell.name for cell in cells)
    assert any(line.startswith("[8/8] ") for line in said)
    assert "val/top1 80.00" in "".join(said)
    again = Worker(folder, mine, 2, said.append, command).run(cells)
    assert again.ended == 8
    assert len(begun()) == 8
    settings = yaml.safe_load((cell_folder(folder, cells[0]) / "settings.yaml").read_text())
    assert settings["wandb_group"] == "mine"
    assert settings["wandb_tags"] == ["one"]
    assert settings["base_lr"] == 0.1


def in_another_process(folder, command, results):
    mine = study_in(folder)
    tally = Worker(folder, mine, 2, lambda _: None, command).run(mine.cells())
    results.put(len(tally.seconds))


def test_any_number_of_workers_share_the_runs_of_one_folder(tmp_path, script, monkeypatch):
    command, begun = script
    monkeypatch.setenv("SLEEP", "0.2")
    folder = tmp_path / "results"
    mine = begin(folder, study(seeds=4))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=in_another_process, args=(folder, command, results))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sum(results.get() for _ in workers) == 16
    assert begun() == sorted(cell.name for cell in mine.cells())


def test_a_failed_run_is_told_and_tried_again_and_a_diverged_one_is_a_result(tmp_path, script):
    command, begun = script
    arms = {
        "bad": {"settings": {"base_lr": 7}},
        "hot": {"settings": {"base_lr": 9}},
        "good": {},
    }
    folder, said = tmp_path / "results", []
    mine = begin(folder, study(arms=arms, batches=[8], seeds=1))
    for count in (1, 2):
        tally = Worker(folder, mine, 1, said.append, command).run(mine.cells())
        assert tally.failed == {"bad-gbs8-seed0": "a traceback"}
        assert tally.ended == 2
        assert begun().count("bad-gbs8-seed0") == count
    assert begun().count("hot-gbs8-seed0") == 1
    assert any("hot-gbs8-seed0: diverged" in line for line in said)


def test_an_arm_that_cant_run_stops_the_study_and_keeps_what_ended(tmp_path, script):
    command, begun = script
    arms = {"good": {}, "bad": {"settings": {"base_lr": 13}}, "last": {"settings": {"base_lr": 1}}}
    folder = tmp_path / "results"
    mine = begin(folder, study(arms=arms, batches=[8], seeds=1))
    with pytest.raises(InputError, match="arm bad at batch 8 can't run: --base-lr 13: no"):
        Worker(folder, mine, 1, lambda _: None, command).run(mine.cells())
    assert begun() == ["bad-gbs8-seed0", "good-gbs8-seed0"]
    assert state_of(run_folder(folder, mine.cells()[0])) == "done"


def test_a_signal_ends_the_runs_in_good_order_and_the_study_goes_on(tmp_path, script, monkeypatch):
    """In a process of its own: SIGTERM reaches its child, which has the time to end."""
    command, begun = script
    folder = tmp_path / "results"
    begin(folder, study(batches=[8], seeds=1))
    program = textwrap.dedent(f"""
        from pathlib import Path
        from lbaccel.studies.folder import study_in
        from lbaccel.studies.launching import _ended
        from lbaccel.studies.running import Worker
        folder = Path({str(folder)!r})
        mine = study_in(folder)
        worker = Worker(folder, mine, 1, print, {command!r})
        raise SystemExit(_ended(worker.run(mine.cells()), folder, print, stopped=worker.stopped))
    """)
    monkeypatch.setenv("SLEEP", "60")
    worker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    while not begun():
        time.sleep(0.05)
    worker.send_signal(signal.SIGTERM)
    text, _ = worker.communicate(timeout=30)
    assert worker.returncode == 130
    assert "0 of 2 runs have their result; the others: lbaccel study run" in text
    assert begun() == ["one-gbs8-seed0"]
    monkeypatch.setenv("SLEEP", "0")
    mine = study_in(folder)
    assert Worker(folder, mine, 1, lambda _: None, command).run(mine.cells()).ended == 2


def test_a_killed_worker_leaves_no_claim(tmp_path):
    home = tmp_path / "cell"
    home.mkdir()
    program = (
        "import sys, time; from pathlib import Path; from lbaccel.studies.running import claimed\n"
        "with claimed(Path(sys.argv[1])) as c: print(c is not None, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(home)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "True\n"
    with claimed(home) as claim:
        assert claim is None
    holder.kill()
    holder.communicate()
    with claimed(home) as claim:
        assert claim is not None


def test_a_run_that_ended_and_is_damaged_is_told_and_counts_as_none(tmp_path, script):
    command, begun = script
    folder, said = tmp_path / "results", []
    mine = begin(folder, study(batches=[8], seeds=1))
    assert run_study(folder, mine, say=said.append, command=command) == 0
    run = run_folder(folder, mine.cells()[0])
    (run / "metrics.jsonl").write_text("{")
    (run / "metrics.jsonl").write_text('{"update": "x"}\n{"update": 2}\n')
    assert run_study(folder, mine, say=said.append, command=command) == 1
    assert any("can't be read any more" in line and str(run) in line for line in said)
    assert "1 of 2 runs have their result" in said[-1]
    run.rename(tmp_path / "away")
    assert run_study(folder, mine, say=said.append, command=command) == 0
    assert len(begun()) == 3


def test_another_target_is_taken_over_since_it_changes_no_run(tmp_path):
    folder = tmp_path / "results"
    assert begin(folder, study()).target is None
    assert begin(folder, study(target=70)).target.value == 70
    assert study_in(folder).target.value == 70
    assert begin(folder, study(target=80)).target.value == 80


def test_factors_multiply_the_default_where_an_arm_states_none():
    mine = study(tune="base_lr x 0.5,1", settings={"data": "folder:x", "norm_batch_size": 8})
    assert [value for value, _ in grid_cells(mine, mine.tune, ArmBatch("one", 8))] == [0.05, 0.1]


def test_runs_of_equal_settings_are_one_run(tmp_path, script):
    command, begun = script
    arms = {"one": {}, "same": {"per_batch": {16: {"base_lr": 0.3}}}}
    folder = tmp_path / "results"
    mine = begin(folder, study(arms=arms, seeds=1))
    assert alike(mine.cells()) == {"same-gbs8-seed0": "one-gbs8-seed0"}
    cells = one_of_each(folder, mine.cells())
    Worker(folder, mine, 1, lambda _: None, command).run(cells)
    assert begun() == ["one-gbs16-seed0", "one-gbs8-seed0", "same-gbs16-seed0"]
    runs = {cell.name: run_folder(folder, cell) for cell in mine.cells()}
    assert runs["same-gbs8-seed0"] == runs["one-gbs8-seed0"] is not None
    assert shared_names(folder) == {"same-gbs8-seed0": "one-gbs8-seed0"}


def test_a_folder_of_another_study_is_refused_with_what_differs(tmp_path):
    folder = tmp_path / "results"
    begin(folder, study())
    with pytest.raises(InputError, match=r"settings/base_lr is 0.1, here 0.3"):
        begin(
            folder, study(settings={"norm_batch_size": 8, "data": "folder:photos", "base_lr": 0.3})
        )
    assert begin(folder, study(seeds=3)).seeds == (0, 1, 2)
    assert begin(folder, study(seeds=1)).seeds == (0, 1, 2)  # none is lost
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no study"):
        begin(other, study())
    with pytest.raises(InputError, match="holds no study"):
        study_in(other)
    assert not is_study(other)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't hold the study"):
        begin(tmp_path / "file", study())


def test_relative_paths_are_those_of_the_folder_that_a_study_is_begun_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings = {"data": "parquet:~/images", "norm_batch_size": 8, "checkpoint": "weights.pth"}
    arms = {
        "one": {"per_batch": {8: {"data": "csv:a.csv"}}},
        "two": {"settings": {"data": "hf:a/b"}},
    }
    begin(tmp_path / "results", study(settings=settings, arms=arms))
    found = study_in(tmp_path / "results")
    assert found.settings["data"] == f"parquet:{tmp_path / 'home' / 'images'}"
    assert found.settings["checkpoint"] == str(tmp_path / "weights.pth")
    assert found.arms[0].per_batch[8]["data"] == f"csv:{tmp_path / 'a.csv'}"
    assert found.arms[1].settings["data"] == "hf:a/b"
    assert begin(tmp_path / "results", study(settings=settings, arms=arms)) == found
    monkeypatch.chdir("/")
    assert study_in(tmp_path / "results") == found


def test_a_grid_is_run_first_the_same_for_each_arm_and_its_best_is_taken(tmp_path, script):
    command, begun = script
    folder, said = tmp_path / "results", []
    mine = begin(folder, study(tune="base_lr x 0.5,1,2", batches=[8], seeds=2))
    code = run_study(folder, mine, jobs=2, say=said.append, command=command)
    assert code == 0
    found = {one["arm"]: one for one in chosen_in(folder)}
    assert found["one"]["values"] == [0.05, 0.1, 0.2]
    assert found["two"]["values"] == [0.1, 0.2, 0.4]
    assert found["one"]["results"] == pytest.approx([75, 80, 90])
    assert (found["one"]["best"], found["one"]["at_edge"]) == (0.2, True)
    assert (found["two"]["best"], found["two"]["at_edge"]) == (0.2, False)
    assert len(begun()) == 6 + 2  # both arms are the same run after the grid
    cells = final_cells(mine, {ArmBatch("one", 8): 0.2, ArmBatch("two", 8): 0.2})
    run = yaml.safe_load((run_folder(folder, cells[0]) / "config.yaml").read_text())
    assert (run["base_lr"], run["test_split"]) == (0.2, "val")
    cell = grid_cells(mine, mine.tune, ArmBatch("one", 8))[0][1]
    run = yaml.safe_load((run_folder(folder, cell) / "config.yaml").read_text())
    assert (run["base_lr"], run["test_split"], run["val_fraction"]) == (0.05, "unused", 0.1)
    assert run_study(folder, mine, say=said.append, command=command) == 0
    assert len(begun()) == 8


def folder_of_pictures(root, **parts):
    """Sub-folders of two classes with tiny pictures: part to the grey of its pixels."""
    from PIL import Image

    for part, grey in parts.items():
        for name in ("rose", "tulip"):
            home = root / part / name
            home.mkdir(parents=True)
            for number in range(20):
                color = (grey, number, ord(name[0]))
                Image.new("RGB", (8, 8), color).save(home / f"{part}{number}.png")
    return root


def parts_of(images):
    """The parts that pictures come from, by their names."""
    return {Path(name).stem.rstrip("0123456789") for name in images.names}


@pytest.mark.parametrize("others", [{"val": 2}, {"test": 3}, {"val": 2, "test": 3}])
def test_a_grid_never_sees_the_images_that_the_study_is_judged_on(tmp_path, others):
    from lbaccel.recipe.images import open_data
    from lbaccel.studies.outlook import check_grid_images, settings_of

    folder_of_pictures(tmp_path / "photos", train=1, **others)
    data = f"folder:{tmp_path / 'photos'}"
    mine = study(
        tune="base_lr x 0.5,1", settings={"data": data, "norm_batch_size": 8, "base_lr": 0.1}
    )
    judged = open_data(settings_of(mine.cells()[0]).data, seed=0)
    grid = open_data(settings_of(grid_of(mine)[0]).data, seed=0)
    assert parts_of(judged.val) == {"val" if "val" in others else "test"}
    assert parts_of(grid.train) == parts_of(grid.val) == {"train"}
    assert len(grid.val) == 4  # a tenth of each class
    assert grid.test is None
    check_grid_images(mine)


def test_a_grid_is_refused_where_the_study_itself_holds_images_out(tmp_path):
    from lbaccel.studies.outlook import check_grid_images

    folder_of_pictures(tmp_path / "photos", train=1)
    data = f"folder:{tmp_path / 'photos'}"
    settings = {"data": data, "norm_batch_size": 8, "base_lr": 0.1}
    with pytest.raises(InputError, match="has no test set of its own"):
        check_grid_images(study(tune="base_lr x 0.5,1", settings=settings))
    check_grid_images(study(settings=settings))


def test_other_workers_may_run_the_grid_and_the_study_goes_past_it(tmp_path, script):
    """Each run is named alone, as the lines of --launcher print do it."""
    command, begun = script
    folder = tmp_path / "results"
    mine = begin(folder, study(tune="base_lr x 0.5,1", batches=[8], seeds=1))

    def printed():
        lines = []
        assert run_study(folder, mine, launcher="print", say=lines.append) == 0
        return [line.split()[-1] for line in lines if not line.startswith("#")]

    grid = printed()
    assert sorted(grid) == sorted(cell.name for cell in grid_of(mine))
    for name in grid:
        run_study(folder, mine, only=[name], say=lambda _: None, command=command)
    final = printed()
    assert final == ["one-gbs8-seed0", "two-gbs8-seed0"]
    assert {one["arm"]: one["best"] for one in chosen_in(folder)} == {"one": 0.1, "two": 0.2}
    assert len(begun()) == 4


def test_a_run_that_stands_for_two_arms_may_be_named_by_both(tmp_path, script):
    command, begun = script
    folder, said = tmp_path / "results", []
    mine = begin(folder, study(arms={"one": {}, "same": {}}, batches=[8], seeds=1))
    for name in ("same-gbs8-seed0", "one-gbs8-seed0"):
        assert run_study(folder, mine, only=[name], say=said.append, command=command) == 0
    assert begun() == ["one-gbs8-seed0"]


def test_a_place_whose_grid_diverged_is_trained_as_its_arm_says(tmp_path, script):
    command, _ = script
    folder = tmp_path / "results"
    hot = study(
        tune="weight_decay 0.1,0.2",
        arms={"hot": {"settings": {"base_lr": 9}}},
        batches=[8],
        seeds=1,
    )
    mine = begin(folder, hot)
    assert run_study(folder, mine, say=lambda _: None, command=command) == 0
    assert [one["best"] for one in chosen_in(folder)] == [None]
    assert settled(folder, mine) == {}


def test_a_run_keeps_its_claim_though_its_worker_is_killed(tmp_path, script, monkeypatch):
    command, begun = script
    folder = tmp_path / "results"
    begin(folder, study(batches=[8], seeds=1, arms={"one": {}}))
    program = textwrap.dedent(f"""
        from pathlib import Path
        from lbaccel.studies.folder import study_in
        from lbaccel.studies.running import Worker
        folder = Path({str(folder)!r})
        mine = study_in(folder)
        Worker(folder, mine, 1, print, {command!r}).run(mine.cells())
    """)
    monkeypatch.setenv("SLEEP", "4")
    worker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    while not begun():
        time.sleep(0.05)
    worker.kill()
    worker.wait()
    mine = study_in(folder)
    tally = Worker(folder, mine, 1, lambda _: None, command).run(mine.cells())
    assert (tally.ended, tally.elsewhere) == (0, ["one-gbs8-seed0"])
    assert begun() == ["one-gbs8-seed0"]
    while run_folder(folder, mine.cells()[0]) is None:  # it goes on to its end
        time.sleep(0.1)


def test_a_gpu_is_that_of_a_free_slot(tmp_path, script, monkeypatch):
    command, _ = script
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    used = []
    real = subprocess.Popen

    def noted(line, **kwargs):
        used.append(kwargs["env"]["CUDA_VISIBLE_DEVICES"])
        return real(line, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", noted)
    mine = begin(tmp_path / "results", study(batches=[8], seeds=3))
    Worker(tmp_path / "results", mine, 2, lambda _: None, command).run(mine.cells())
    assert set(used) == {"4", "5"}


def test_data_that_cant_be_split_take_no_grid():
    with pytest.raises(InputError, match="--data digits can't be split"):
        study(tune="base_lr x 1,2", settings={"data": "digits", "norm_batch_size": 8, "base_lr": 1})


def test_the_best_of_a_grid_is_the_smallest_of_equals_and_no_diverged_one():
    assert best_of([1, 2, 4], [5.0, 5.0, None], "val/top1") == 1
    assert best_of([1, 2, 4], [0.5, 0.2, 0.3], "val/loss") == 2
    assert best_of([1, 2], [None, None], "val/top1") is None
    assert tune_of("a x 1,2").at(3) == (3, 6)


def test_the_shell_lines_are_one_for_each_run_without_a_result(tmp_path, script):
    command, _ = script
    folder = tmp_path / "my results"
    mine = begin(folder, study(batches=[8], seeds=1))
    lines = list(command_lines(folder, mine.cells()))
    assert lines == [
        f"lbaccel study run '{folder}' --only one-gbs8-seed0",
        f"lbaccel study run '{folder}' --only two-gbs8-seed0",
    ]
    run_study(folder, mine, only=["one-gbs8-seed0"], say=lambda _: None, command=command)
    assert list(command_lines(folder, mine.cells())) == lines[1:]
    with pytest.raises(InputError, match="the study has no such run"):
        run_study(folder, mine, only=["one-gbs8-seed1"], say=lambda _: None, command=command)


@pytest.mark.parametrize(
    ("summary", "state"),
    [
        ({"status": "done"}, "done"),
        ({"status": "failed", "diverged": True}, "diverged"),
        ({"status": "failed", "exit_reason": "No space left"}, "failed"),
        ({"status": "interrupted"}, "stopped"),
        ({"status": "running"}, "stopped"),  # nobody writes into it
        (None, "stopped"),
        ([1], "stopped"),
    ],
)
def test_the_state_of_a_run_is_that_of_its_summary(tmp_path, summary, state):
    assert state_of(None) == "missing"
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert state_of(tmp_path) == state


def test_a_run_that_a_process_writes_into_is_running(tmp_path):
    from lbaccel.runs.lock import writing

    with writing(tmp_path, say=lambda _: None):
        assert state_of(tmp_path) == "running"
    assert state_of(tmp_path) == "stopped"


def test_several_runs_at_a_time_share_the_threads_of_the_machine(monkeypatch):
    from lbaccel.studies.running import _share_of_machine

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert _share_of_machine(1, 0) == {}
    assert _share_of_machine(2, 0)["OMP_NUM_THREADS"] == "4"
    assert _share_of_machine(16, 0)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in _share_of_machine(2, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert [_share_of_machine(2, slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1, 2)] == [
        "4",
        "5",
        "4",
    ]


def test_runs_of_a_worker_that_is_stopped_while_a_process_is_made_end_too(
    tmp_path, script, monkeypatch
):
    command, _ = script
    monkeypatch.setenv("SLEEP", "60")
    folder = tmp_path / "results"
    mine = begin(folder, study(batches=[8], seeds=1))
    worker = Worker(folder, mine, 1, lambda _: None, command)
    real = subprocess.Popen

    def slow(*args, **kwargs):
        worker._stop()  # as the handler of a signal, between the look and the process
        return real(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", slow)
    ended = threading.Thread(target=worker.run, args=(mine.cells(),))
    ended.start()
    ended.join(timeout=30)
    assert not ended.is_alive()
