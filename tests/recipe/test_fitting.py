"""--max-minutes: the length that fits, by a clock of the test's own, and what becomes of it."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import re
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from forks import run_forked, values
from runs_of_recipe import BASE, at_update, differences, interrupt

from lbaccel import LargeBatch, cli, train
from lbaccel.batch.stream import UpdateStream
from lbaccel.recipe import fitting
from lbaccel.recipe.checks import checked
from lbaccel.recipe.fitting import epochs_within
from lbaccel.recipe.settings import from_file, read_settings

AT = BASE.index("--epochs")
OTHERS = [*BASE[:AT], *BASE[AT + 2 :], "--eval-every", "1"]  # without a length
MINUTES = ["--max-minutes", "0.9"]
UPDATES = [1.5, 2.0, 3.0, 2.0, 2.0, 2.0]  # seconds
TIMED = 3  # after which a tenth of the minutes is over
EVALUATION = 2.0
SPENT = sum(UPDATES[:TIMED]) + 2 * EVALUATION  # its start alone, and a part of it
TRAIN, BATCH = 1438, 256


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Clock:
    """Moves where updates and evaluations of the trial say so, and never by itself."""

    def __init__(self, updates=UPDATES, evaluation=EVALUATION, batch=0.0):
        self.now, self.updates, self.evaluation = 0.0, itertools.chain(updates), evaluation
        self.timed, self.batch = 0, batch

    def __call__(self):
        return self.now

    def install(self):
        evaluate, inside = fitting.evaluate, fitting._seconds_of_updates

        def updates(*args, **options):
            plain = LargeBatch.update

            def update(large_batch, *rest):
                self.now += next(self.updates)
                self.timed += 1
                return plain(large_batch, *rest)

            LargeBatch.update = update
            try:
                return inside(*args, **options)
            finally:
                LargeBatch.update = plain

        def evaluated(network, batches, *args, **options):
            def slow(start, size):
                for batch in batches(start, size):
                    self.now += self.batch
                    yield batch

            self.now += self.evaluation
            return evaluate(network, slow, *args, **options)

        fitting.clock, fitting.evaluate, fitting._seconds_of_updates = self, evaluated, updates


@pytest.fixture
def clock(monkeypatch):
    for name in ("clock", "evaluate", "_seconds_of_updates"):  # to be put back
        monkeypatch.setattr(fitting, name, getattr(fitting, name))
    clock = Clock()
    clock.install()
    return clock


def test_the_start_of_an_evaluation_counts_once_and_its_images_by_their_number(clock, capsys):
    clock.batch = 0.5
    trained("--max-minutes", "3", "--val-batch-size", "16", "--dry-run")
    seconds = re.search(r"evaluations? of ([\d.]+) s", capsys.readouterr().out)[1]
    assert float(seconds) == pytest.approx(EVALUATION + 0.5 * 359 / 16, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "needs"),
    [(["--loss-dropout", "30", "50"], "--loss-dropout 30 50 needs at least 30"),
     (["--warmup", "gradual", "--warmup-epochs", "25"], "--warmup-epochs 25 needs at least 25")],
)  # fmt: skip
def test_a_setting_for_more_epochs_than_fit_is_refused_by_the_minutes(clock, flags, needs, capsys):
    assert trained(*MINUTES, *flags, code=2) is None
    said = capsys.readouterr().err
    assert said.startswith("error: --max-minutes 0.9 has time for ") and needs in said


def test_the_trial_is_gone_before_the_run_is_built(clock, monkeypatch):
    plain, alive = fitting._check_length, []

    def count(*given):
        alive.append(sum(type(x) is LargeBatch for x in gc.get_objects()))
        plain(*given)

    gc.collect()
    before = sum(type(x) is LargeBatch for x in gc.get_objects())
    monkeypatch.setattr(fitting, "_check_length", count)
    trained(*MINUTES, "--ema-decay", "0.9", "--dry-run")
    assert alive == [before]


def trained(*flags, code=0, output="runs"):
    assert train.main([*OTHERS, "--output", output, *map(str, flags)]) == code
    found = sorted(Path(output).iterdir()) if Path(output).exists() else []
    return found[-1] if found else None


def settings_of(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def most_updates(seconds, of_update, of_evaluation, *, each=TRAIN, size=BATCH):
    """By counting: an evaluation where an update passes the end of an epoch, and at the last."""
    updates = 0
    while True:
        updates += 1
        ends = {n * size // each for n in range(1, updates + 1)} - {0}
        evaluations = len(ends) + (updates * size // each == (updates - 1) * size // each)
        if updates * of_update + evaluations * of_evaluation > seconds:
            return updates - 1


@pytest.mark.parametrize("last_update", ["wrap", "keep", "drop"])
@pytest.mark.parametrize("eval_every", [0.25, 1.0, 2.5])
@pytest.mark.parametrize("seconds", [4.0, 17.0, 123.0, 4567.0])
def test_no_run_that_fits_is_longer_and_the_one_that_is_given_fits(
    last_update, eval_every, seconds
):
    stream = UpdateStream(32, 300, last_update)
    each = Fraction(str(eval_every)) * stream.samples_per_epoch

    costs, total, before = [0.0], 0.0, 0  # of a run that ends there, its last update evaluated
    while costs[-1] <= seconds:
        now = stream.samples_seen(len(costs)) // each
        total += 1.5 + 2.5 * (now > before)
        costs.append(total + 2.5 * (now == before))
        before = now
    most = len(costs) - 2
    epochs = epochs_within(seconds, stream, of_update=1.5, of_evaluation=2.5, eval_every=eval_every)
    assert epochs is not None
    updates = stream.num_updates(epochs)
    assert updates <= most and costs[updates] <= seconds
    exact = stream.samples_seen(most) / stream.samples_per_epoch
    assert epochs <= exact < epochs + 10 ** (math.floor(math.log10(epochs)) - 2) * 1.0001


def test_what_does_not_hold_one_update_and_one_evaluation_is_no_run():
    stream = UpdateStream(32, 300, "wrap")
    times = {"of_update": 1.5, "of_evaluation": 2.5, "eval_every": 1.0}
    assert epochs_within(3.9, stream, **times) is None
    assert epochs_within(-5.0, stream, **times) is None
    found = epochs_within(4.0, stream, **times)
    assert found is not None and stream.num_updates(found) == 1


def test_a_run_is_fitted_says_so_and_is_that_of_as_many_epochs_to_the_bit(clock, capsys):
    folder = trained(*MINUTES)
    out, summary = capsys.readouterr().out, json.loads((folder / "summary.json").read_text())
    assert clock.timed == TIMED
    updates = most_updates(54 * (1 - fitting.RESERVE) - SPENT, 2.5, EVALUATION)
    assert summary["num_updates"] == updates == 12
    config = settings_of(folder)
    assert (config["max_minutes"], config["epochs"]) == (0.9, 2.13)
    assert config["warmup_epochs"] == 2.13 / 4  # in proportion
    said = (
        "2.13, fitted to --max-minutes 0.9: 12 updates of 2.5 s (the median of 2 updates, slowest "
        "rank) and 2 evaluations of 2 s, after 10.5 s; 10% of the time is kept back"
    )
    assert f"epochs: {said}" in out and config["origin"]["epochs"] == said
    truth = trained("--epochs", 2.13, output="whole")
    assert differences(folder, truth) == []


def test_a_resume_takes_the_length_and_measures_nothing(clock):
    truth = trained(*MINUTES, output="whole")
    undo = at_update(TIMED + 3, interrupt)
    clock.updates = itertools.chain(UPDATES)
    clock.now = 0.0
    try:
        folder = trained(*MINUTES, "--resume", "auto", code=130)
    finally:
        undo()
    clock.updates, clock.now = itertools.repeat(1e9), 1e9  # a measurement would find another one
    assert trained(*MINUTES, "--resume", "auto") == folder
    assert differences(folder, truth) == []
    assert settings_of(folder)["origin"]["epochs"] == settings_of(truth)["origin"]["epochs"]


def test_another_number_of_minutes_is_another_run_and_more_epochs_an_extension(clock, capsys):
    folder = trained(*MINUTES, "--max-updates", 2, code=2)
    assert folder is None
    folder = trained(*MINUTES)
    trained("--resume", folder, "--max-minutes", 3, code=2)
    assert "--max-minutes 3.0: the run in" in capsys.readouterr().err
    trained("--resume", folder, "--epochs", 2.5, "--extend", "stretch")
    assert settings_of(folder)["epochs"] == 2.5


def test_the_config_of_a_fitted_run_states_its_epochs(clock):
    folder = trained(*MINUTES)
    settings = from_file(folder / "config.yaml")
    assert (settings.rate.epochs, settings.rate.max_minutes) == (2.13, None)
    checked(settings)
    assert cli.main(["export", str(folder), "--to", "out"]) == 0
    exported = from_file(Path("out/config.yaml"))
    assert (exported.rate.epochs, exported.rate.max_minutes) == (2.13, None)
    checked(exported)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--epochs", 3], "--epochs 3 states the length. Leave one of them out"),
        (["--max-updates", 9], "--max-updates 9 states the length"),
        (["--batch-schedule", "bsi"], "under --batch-schedule bsi later ones take another time"),
        (
            ["--lr-scaling", "adascale", "--base-batch-size", 64],
            "under --lr-scaling adascale later ones",
        ),
    ],
)
def test_what_it_does_not_go_with_is_refused(flags, says, capsys):
    assert trained(*MINUTES, *flags, code=2) is None
    assert says in capsys.readouterr().err


def test_minutes_that_hold_no_update_are_refused_before_anything_is_written(clock, capsys):
    clock.updates = itertools.repeat(80.0)
    assert trained(*MINUTES, code=2) is None
    err = capsys.readouterr().err
    assert "one of them takes 80 s and an evaluation 2 s. Use more minutes" in err
    assert clock.timed == 1  # the first was a tenth of the minutes already


def test_a_warmup_that_was_asked_for_is_compared_with_the_length_that_was_found(clock, capsys):
    assert trained(*MINUTES, "--warmup-epochs", 25, code=2) is None
    said = capsys.readouterr().err
    assert "has time for 2.13 epochs, and --warmup-epochs 25 needs at least 25" in said
    clock.updates, clock.now = itertools.chain(UPDATES), 0.0
    assert settings_of(trained(*MINUTES, "--warmup-epochs", 2))["warmup_epochs"] == 2.0


def on_ranks(rank, flags):
    import tiny  # noqa: F401

    # the second rank is slower in all it does
    factor = 1 + rank
    Clock([factor * seconds / 2 for seconds in UPDATES], factor * EVALUATION / 2).install()
    return train.main([*OTHERS, "--output", "runs", *flags]), os.environ["WORLD_SIZE"]


def test_all_ranks_take_the_length_of_the_slowest():
    found = values(run_forked(on_ranks, MINUTES, world_size=2, timeout=120))
    assert found == [(0, "2"), (0, "2")]
    (folder,) = Path("runs").iterdir()
    config = settings_of(folder)
    # by the first rank's own clock a tenth of the minutes was not over
    assert "updates of 2 s (the median of 5 updates" in config["origin"]["epochs"]


def test_the_flag_is_read():
    assert read_settings(MINUTES)[0].rate.max_minutes == 0.9
