"""`lbaccel advise`: McCandlish's trade-off in figures, and what it says where little is known."""

from __future__ import annotations

import json
import math

import pytest

from lbaccel.cli import main
from lbaccel.noise.advice import (
    NoiseReading,
    advice,
    closing_advice,
    samples_factor,
    trade,
    updates_factor,
)
from lbaccel.noise.arithmetic import UNKNOWN, Interval, NoiseEstimate
from lbaccel.noise.scale import NoiseScale, UnitSums


def verdict(critical, interval, batch):
    first, second = advice(NoiseReading(critical, interval, 40.0), batch)
    assert first.startswith("This concerns training loss at tuned learning rates")
    assert "near the end of the run" in first and "some 40 updates" in first
    return second


def test_the_trade_off_is_the_hyperbola_of_mccandlish():
    """(S / Smin - 1) (E / Emin - 1) = 1 and E = B S, with B_crit = Emin / Smin."""
    critical = 700.0
    for batch in (1, 64, 700, 20_000):
        samples, updates = samples_factor(batch, critical), updates_factor(batch, critical)
        assert (samples - 1) * (updates - 1) == pytest.approx(1)
        assert samples * critical / updates == pytest.approx(batch)
    more, fewer = trade(64, 20_000, critical)
    assert more / fewer == pytest.approx((1 + 20_000 / 700) / (1 + 64 / 700) / (
        (1 + 700 / 64) / (1 + 700 / 20_000)))  # fmt: skip


def test_the_figures_of_the_issue():
    assert verdict(3100.0, Interval(2600.0, 3800.0), 16384) == (
        "critical batch about 3,100 (2,600 to 3,800): from 3,100 to 16,384 costs 3.1 times the "
        "samples for 1.7 times fewer updates"
    )


@pytest.mark.parametrize(
    ("critical", "interval", "batch", "says"),
    [
        # (1 + 1) / (1 + 512 / 3100) = 1.72; (1 + 3100 / 512) / 2 = 3.53
        (
            3100.0,
            Interval(2600.0, math.inf),
            512,
            "about 3,100 (2,600 to unbounded): from 512 to 3,100 costs 1.7 times the samples for "
            "3.5 times fewer updates",
        ),
        (3100.0, Interval(2600.0, 3800.0), 3072, "3,072 is there, with twice the fewest samples"),
        (3100.0, UNKNOWN, 512, "about 3,100, but its interval excludes nothing"),
        # (1 + 2 x 512 / 2600) / (1 + 512 / 2600) = 1.165
        (
            math.inf,
            Interval(2600.0, math.inf),
            512,
            "above 2,600, with no upper bound from this run: twice the batch of 512 costs at most "
            "1.16 times the samples",
        ),
        (math.inf, Interval(2600.0, math.inf), 4096, "whether 4,096 is below it is not known"),
        (math.inf, UNKNOWN, 512, "critical batch unknown: the mean gradient does not stand out"),
        (math.nan, UNKNOWN, 512, "critical batch unknown"),
    ],
)
def test_advice_says_what_is_known_and_what_is_not(critical, interval, batch, says):
    assert says in verdict(critical, interval, batch)


def write_run(folder, rows, **config):
    folder.mkdir()
    lines = [
        {"update": i + 1, "samples_seen": (i + 1) * 512, "train/loss": 1.0, "batch/global": 512}
        | {f"noise/{k}": v for k, v in row.items()}
        for i, row in enumerate(rows)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.yaml").write_text(json.dumps({"global_batch_size": 512, **config}))
    return folder


def row(critical, low, high, n=30.0, **more):
    return {"critical_batch_size": critical, "low": low, "high": high, "num_updates": n, **more}


ROWS = [
    {},
    row(100.0, 0.0, None, 1.0),
    row(250.0, 90.0, None),
    row(None, 200.0, None),
    row(800.0, 500.0, 1300.0, preconditioned_batch_size=60.0, preconditioned_low=40.0,
        preconditioned_high=95.0),
]  # fmt: skip


def test_the_command_prints_the_last_reading_the_way_there_and_a_table(tmp_path, capsys):
    run = write_run(tmp_path / "run", ROWS)
    assert main(["advise", str(run), "--global-batch-size", "64", "4096"]) == 0
    out = capsys.readouterr().out
    first, second, *rest = out.splitlines()
    assert first.startswith("This concerns training loss at tuned learning rates")
    # (1 + 1) / (1 + 512 / 800) = 1.22; (1 + 800 / 512) / 2 = 1.28
    assert second == (
        "critical batch about 800 (500 to 1,300): from 512 to 800 costs 1.2 times the samples for "
        "1.3 times fewer updates"
    )
    assert "preconditioned by Adam's moments: 60 (40 to 95)" in rest
    assert "over training (samples): 250 at 1,536, above 200 at 2,048, 800 at 2,560" in rest
    table = {line.split()[0]: line.split()[1:3] for line in rest if line[:1].isdigit()}
    assert table == {
        "512": ["1.64", "2.56"],  # 1 + 512 / 800, 1 + 800 / 512
        "64": ["1.08", "13.50"],
        "4,096": ["6.12", "1.20"],
    }


def test_json_is_strict_and_null_where_nothing_bounds(tmp_path, capsys):
    run = write_run(tmp_path / "run", ROWS[:4])
    assert main(["advise", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert found["critical_batch_size"] is None and found["high"] is None
    assert found["low"] == 200.0 and found["interval"] == "200 to unbounded"
    assert [r["critical_batch_size"] for r in found["history"]] == [100.0, 250.0, None]
    assert found["global_batch_size"] == 512 and len(found["advice"]) == 2


def test_a_run_without_a_noise_scale_says_what_to_type(tmp_path, capsys):
    run = write_run(tmp_path / "run", [{}, {}])
    assert main(["advise", str(run)]) == 2
    said = capsys.readouterr().err
    assert "noise scale was not measured" in said
    assert "lbaccel train --noise-scale plain --micro-batch-size N, N at most 256." in said


def test_bad_arguments_are_refused(tmp_path, capsys):
    run = write_run(tmp_path / "run", ROWS)
    assert main(["advise", str(run), "--global-batch-size", "0"]) == 2
    assert main(["advise", str(run), "--plot", "x.bmp"]) == 2
    assert main(["advise", str(run), "--plot", str(tmp_path / "no" / "x.png")]) == 2
    assert main(["advise", str(tmp_path / "nothing")]) == 2
    assert "can't be written" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [ROWS, ROWS[:2], ROWS[3:4]])
def test_a_plot_is_drawn_of_bounded_and_unbounded_readings(tmp_path, rows):
    run = write_run(tmp_path / "run", rows)
    assert main(["advise", str(run), "--plot", str(tmp_path / "noise.png")]) == 0
    assert (tmp_path / "noise.png").stat().st_size > 5000


def test_a_schedule_of_batches_is_judged_by_its_last_one(tmp_path, capsys):
    run = write_run(tmp_path / "run", ROWS)
    text = (run / "metrics.jsonl").read_text().splitlines()
    last = {**json.loads(text[-1]), "batch/global": 8000}
    (run / "metrics.jsonl").write_text("\n".join([*text[:-1], json.dumps(last)]) + "\n")
    assert main(["advise", str(run)]) == 0
    # (1 + 10) / 2; 2 / (1 + 0.1)
    assert "from 800 to 8,000 costs 5.5 times the samples for 1.8 times fewer updates" in (
        capsys.readouterr().out
    )


def test_the_end_of_a_run_says_the_same_two_lines_or_why_not(tmp_path, capsys):
    noise = NoiseScale(half_life_samples=10_000)
    assert closing_advice(noise, 512) == "critical batch unknown: no update was done yet."
    units = UnitSums(1, 1.0, math.nan, math.nan)
    noise.add(units, grad_norm=1.0, num_samples=512, weight=512, start=0)
    assert "Use micro_batch_size <= 256" in closing_advice(noise, 512)
    for s, g in ((100.0, 0.2), (120.0, 0.21), (90.0, 0.19), (95.0, 0.2)):
        noise.average.add(NoiseEstimate(s, g), num_samples=512)
    names = {k.removeprefix("noise/"): v for k, v in noise.metrics().items()}
    run = write_run(tmp_path / "run", [names])
    assert main(["advise", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == closing_advice(noise, 512).splitlines()


def test_the_batch_is_not_the_short_update_that_ends_an_epoch(tmp_path, capsys):
    run = write_run(tmp_path / "run", ROWS)
    text = (run / "metrics.jsonl").read_text().splitlines()
    last = {**json.loads(text[-1]), "batch/global": 414}  # 1,438 samples at 512: 512, 512, 414
    (run / "metrics.jsonl").write_text("\n".join([*text[:-1], json.dumps(last)]) + "\n")
    assert main(["advise", str(run), "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["global_batch_size"] == 512


@pytest.mark.parametrize("critical", [0.0, -5.0])
def test_a_critical_batch_that_is_none_is_unknown(tmp_path, capsys, critical):
    run = write_run(tmp_path / "run", [row(critical, 0.0, 5.0)])
    assert main(["advise", str(run), "--quick", "--json", "--global-batch-size", "64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batches"][1] == {
        "global_batch_size": 64,
        "samples_factor": None,
        "updates_factor": None,
    }
    assert "unknown" in found["advice"][1]


def test_a_run_without_a_batch_is_refused(tmp_path, capsys):
    run = write_run(tmp_path / "run", [row(50.0, 20.0, 80.0)])
    text = (run / "metrics.jsonl").read_text().replace('"batch/global": 512', '"batch/global": 0')
    (run / "metrics.jsonl").write_text(text)
    assert main(["advise", str(run), "--quick"]) == 2
    assert "global batch is not known" in capsys.readouterr().err
