"""`lbaccel study` as it is typed: what it prints, and each study's shortest version to its end."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from lbaccel.cli import main
from lbaccel.studies.find import shipped
from lbaccel.studies.folder import run_folder, state_of, study_in

MINE = """
name: mine
settings: {data: digits, model: cifar_resnet8, norm_batch_size: 32, epochs: 1, log_with: run_folder}
arms:
  one: {title: as it is}
  two: {title: a larger rate, settings: {base_lr: 0.2}}
batches: [64]
seeds: 1
pairs: [[two, one]]
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(MINE)
    return tmp_path


def test_ls_and_show_say_what_there_is(capsys):
    assert main(["study", "ls"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped())
    assert main(["study", "show", "trivial"]) == 0
    assert "88.33" in capsys.readouterr().out
    assert main(["study", "show", "trivial", "--scale", "paper"]) == 0
    assert "## one-rate at 2,048" in capsys.readouterr().out


def test_plan_says_runs_updates_and_what_the_seeds_resolve(mine, capsys):
    assert main(["study", "plan", "mine.yaml", "--seeds", "3", "--no-timing"]) == 0
    text = capsys.readouterr().out
    assert "6 runs, 138 updates, 8,832 samples" in text  # 23 updates of 64, of 1438 images
    assert "3 seeds" in text
    assert "points" in text
    assert "note: the shortest run has 23 updates" in text


@pytest.mark.slow
def test_plan_times_updates_of_this_machine(mine, capsys):
    assert main(["study", "plan", "mine.yaml", "--jobs", "2"]) == 0
    text = capsys.readouterr().out
    assert "timed: arm one at batch 64" in text
    assert "on this machine, 2 at a time" in text


BAD = {
    "study run nothing": "neither a study of lbaccel",
    "study run mine.yaml --seeds 0": "--seeds='0' is not a whole number from 1",
    "study run mine.yaml --tune 'base_lr x 1,2'": "--data digits can't be split",
    "study run mine.yaml --scale smoke": "it has no scales",
    "study run mine.yaml --base-lr many": "--base-lr",
    "study run mine.yaml --seed 3": "--seed",
    "study run mine.yaml --only three": "no such run",
    "study run mine.yaml --norm-batch-size 48 --epochs 0": "--epochs",
    "study run mine.yaml --final-lr 0.1 --schedule constant": "arm one at batch 64 can't run",
    "study plan mine.yaml --seeds 5000 --no-timing": "a study has 1 to 1000",
    "study report .": "holds no study.yaml",
    "scaling --batches 64 --data digits": "at least two",
    "scaling --batches 64,64 --data digits": "at least two",
    "scaling --batches 64,128 --data digits": "can't be split",
    "scaling --batches 0,64 --data digits": "--batches",
    "scaling --batches 64,128 --data digits --seeds 2000 --tune none": "a study has 1 to 1000",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_sentence_and_begins_nothing(line, mine, capsys):
    assert main(shlex.split(line)) == 2
    said = capsys.readouterr().err
    assert BAD[line] in said
    assert said.count("\n") == 1
    assert not list(mine.rglob("metrics.jsonl"))


def test_data_that_are_not_there_stop_the_study_with_the_runs_own_sentence(mine, capsys):
    line = "study run mine.yaml --data folder:nowhere --output results"
    assert main(shlex.split(line)) == 2
    assert "arm one at batch 64 can't run: " in (said := capsys.readouterr().err)
    assert "nowhere" in said


def test_a_study_goes_on_in_its_folder_as_it_was_begun(mine, capsys):
    """The settings that were pinned, the scale and the target stay, from any folder."""
    line = "study run mine.yaml --output results --epochs 2 --target 50 --seeds 2 --launcher print"
    assert main(shlex.split(line)) == 0
    capsys.readouterr()
    before = study_in(Path("results"))
    assert (before.pinned, before.settings["epochs"]) == (("epochs",), 2.0)
    assert main(["study", "run", str(mine / "results"), "--launcher", "print"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert study_in(Path("results")) == before
    assert main(["study", "run", "results", "--momentum", "0.8", "--launcher", "print"]) == 2
    assert "holds the results of another study" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_of_ones_own_runs_is_reported_and_a_damaged_run_costs_no_other(mine, capsys):
    assert main(["study", "run", "mine.yaml", "--output", "results", "--seeds", "2"]) == 0
    assert "all 4 runs have their result" in capsys.readouterr().out
    folder, study = Path("results"), study_in(Path("results"))
    assert [state_of(run_folder(folder, cell)) for cell in study.cells()] == ["done"] * 4
    config = yaml.safe_load((run_folder(folder, study.cells()[1]) / "config.yaml").read_text())
    assert (config["base_lr"], config["seed"], config["global_batch_size"]) == (0.2, 0, 64)
    assert main(["study", "report", "results", "--json", "--csv", "runs.csv"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert [one["n"] for one in whole["table"]] == [2, 2]
    assert whole["comparisons"]
    assert len(Path("runs.csv").read_text().splitlines()) == 3  # a place a line
    (run_folder(folder, study.cells()[0]) / "metrics.jsonl").write_text("{")
    (run_folder(folder, study.cells()[2]) / "config.yaml").write_text("[")
    assert main(["study", "report", "results"]) == 0
    assert "warning: " in capsys.readouterr().err
    # another study is not written over it
    assert main(["study", "run", "mine.yaml", "--output", "results", "--epochs", "2"]) == 2
    assert "holds the results of another study" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simulated-workers", "batch-increase", "landscapes"])
def test_the_smoke_of_a_shipped_study_runs_to_its_end(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "run", name, "--scale", "smoke", "--jobs", "2"]) == 0
    assert main(["study", "report", f"studies/{name}-smoke", "--md"]) == 0
    assert "expected" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of its processes
def test_submitit_runs_each_run_as_a_job_of_its_own(mine, capsys):
    import time

    submitit = pytest.importorskip("submitit")
    assert submitit is not None
    line = ["study", "run", "mine.yaml", "--output", "results", "--launcher", "submitit"]
    assert main(line) == 0
    assert "2 jobs are in the queue" in capsys.readouterr().out
    folder, study = Path("results"), study_in(Path("results"))
    for _ in range(600):
        states = [state_of(run_folder(folder, cell)) for cell in study.cells()]
        if states == ["done", "done"]:
            break
        time.sleep(0.5)
    assert states == ["done", "done"]
    assert main(line) == 0
    assert "every run has its result" in capsys.readouterr().out
