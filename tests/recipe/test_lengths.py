"""Lengths that no run has are refused at once, in every command that walks through epochs."""

from __future__ import annotations

import pytest

from lbaccel.batch.duration import MOST_EPOCHS, Duration
from lbaccel.cli import main
from lbaccel.errors import InputError

TIMM = "model: test_resnet\nbatch_size: 8\nlr: 0.1\nopt: sgd\nsched: step\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "1e10"],
        ["--epochs", "1e10", "--schedule", "step", "--milestones", "0.001"],
        ["--epochs", "5", "--warmup-epochs", "1e10"],
    ],
)
def test_train_refuses_a_length_that_no_run_has(arguments, capfd, tmp_path):
    whole = ["train", "--data", "digits", "--output", str(tmp_path / "run"), *arguments]
    assert main(whole) == 2
    assert "10000000000 must be at most 1,000,000" in capfd.readouterr().err.replace("1e+10", f"{10**10}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs: 1.0e+10", "must be at most 1,000,000"),
        ("epochs: .inf", "must be at most 1,000,000"),
        ("epochs: 100\ndecay_epochs: 1.0e-9", "at most 10,000 times"),
        ("epochs: 100\ndecay_epochs: 0.0", "more than 0 epochs"),
    ],
)
def test_replicate_refuses_a_length_that_no_run_has(text, words, tmp_path):
    from lbaccel.replication.readers.timm_args import read_timm_args
    import yaml

    content = {**DEFAULTS, **yaml.safe_load(text)}
    with pytest.raises(InputError, match=words):
        read_timm_args(content, origin="args.yaml")


def test_a_duration_has_the_same_bound():
    assert Duration(epochs=MOST_EPOCHS).epochs == MOST_EPOCHS
    with pytest.raises(InputError, match=r"at most 1e\+06"):
        Duration(epochs=1e10)
