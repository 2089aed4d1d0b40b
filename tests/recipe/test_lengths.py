"""Lengths that no run has are refused at once, in every command that walks through epochs."""

from __future__ import annotations

import pytest

from lbaccel.batch.duration import MOST_EPOCHS, Duration
from lbaccel.cli import main
from lbaccel.errors import InputError


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
    assert "epochs='1e10' is not a number" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_duration_has_the_same_bound():
    assert Duration(epochs=MOST_EPOCHS).epochs == MOST_EPOCHS
    with pytest.raises(InputError, match=r"at most 1e\+06"):
        Duration(epochs=1e10)
