"""The noise scale in the recipe: its lines, its last words, and a resume that goes on with it."""

from __future__ import annotations

import json

from runs_of_recipe import NUM_UPDATES, rows, run

from lbaccel.cli import main

KEYS = {
    "noise/critical_batch_size",
    "noise/low",
    "noise/high",
    "noise/scale_s",
    "noise/grad_norm_sq",
    "noise/num_updates",
}


def noise_lines(folder):
    """Updates' lines with what they hold of the noise scale."""
    found = [row for row in rows(folder) if "train/loss" in row]
    return [{k: v for k, v in row.items() if k.startswith("noise/")} for row in found]


def test_a_run_logs_its_noise_scale_ends_with_advice_and_resumes_exactly(tmp_path, capsys):
    whole = run(output=tmp_path / "a")
    said = capsys.readouterr().out.splitlines()
    lines = noise_lines(whole)
    assert len(lines) == NUM_UPDATES and all(line.keys() == KEYS for line in lines)
    last = lines[-1]
    assert last["noise/scale_s"] > 0 and 1 < last["noise/num_updates"] < NUM_UPDATES
    if last["noise/critical_batch_size"] is not None:
        ratio = last["noise/scale_s"] / last["noise/grad_norm_sq"]
        assert abs(last["noise/critical_batch_size"] / ratio - 1) < 1e-12
    assert main(["advise", str(whole), "--quick"]) == 0
    advised = capsys.readouterr().out.splitlines()[:2]
    assert said[-3:-1] == advised  # the last line is the folder
    assert advised[0].startswith("This concerns training loss")

    stopped = run("--max-updates", "5", output=tmp_path / "b")
    again = run("--resume", stopped, "--max-updates", NUM_UPDATES, output=tmp_path / "b")
    assert again == stopped
    assert json.dumps(noise_lines(stopped)) == json.dumps(lines)


def test_it_can_be_turned_off_and_off_and_on_in_a_resume(tmp_path, capsys):
    off = run("--noise-scale", "none", "--max-updates", "4", output=tmp_path)
    assert noise_lines(off) == [{}] * 4
    assert "critical batch" not in capsys.readouterr().out
    on = run("--resume", off, "--noise-scale", "plain", "--max-updates", "8", output=tmp_path)
    assert [bool(line) for line in noise_lines(on)] == [False] * 4 + [True] * 4
    run("--resume", on, "--noise-scale", "none", "--max-updates", "10", output=tmp_path)
    assert [bool(line) for line in noise_lines(on)][8:] == [False] * 2


def test_measuring_changes_nothing_else(tmp_path):
    folders = [run("--noise-scale", kind, output=tmp_path / kind) for kind in ("none", "plain")]
    found = [
        [{k: v for k, v in row.items() if not k.startswith("noise/")} for row in rows(folder)]
        for folder in folders
    ]
    assert found[0] == found[1]


def test_one_micro_batch_an_update_is_said_not_to_do(tmp_path, capsys):
    flags = ("--micro-batch-size", "256", "--max-updates", "2")
    folder = run(*flags, output=tmp_path)
    out = capsys.readouterr().out
    assert "noise scale: not measured, as an update is one micro-batch (it takes two)" in out
    assert noise_lines(folder) == [{}] * 2
    run(*flags, "--noise-scale", "plain", output=tmp_path / "asked")
    out = capsys.readouterr().out
    assert "critical batch unknown: the last update was one micro-batch of 256 samples" in out
    assert "Use micro_batch_size <= 128." in out


def test_the_preconditioned_form_is_logged_beside_the_plain_one_and_needs_adam(tmp_path, capsys):
    flags = ("--noise-scale", "preconditioned", "--max-updates", "4")
    folder = run(*flags, "--optimizer", "adamw", output=tmp_path)
    lines = noise_lines(folder)
    more = {f"noise/preconditioned_{end}" for end in ("batch_size", "low", "high")}
    assert lines[0].keys() == KEYS  # Adam has no moments before its first step
    assert all(line.keys() == KEYS | more for line in lines[1:])
    assert main(["advise", str(folder)]) == 0
    assert "preconditioned by Adam's moments:" in capsys.readouterr().out
    assert run(*flags, code=2, output=tmp_path / "sgd") is None
    assert "needs second moments" in capsys.readouterr().err


def test_second_moments_that_are_one_a_tensor_are_refused(tmp_path, capsys):
    flags = ["--optimizer", "novograd", "--noise-scale", "preconditioned"]
    run(*flags, output=tmp_path, code=2)
    assert "needs second moments" in capsys.readouterr().err


def test_the_last_words_are_of_the_batch_and_not_of_an_epoch_s_short_last_update(tmp_path, capsys):
    """1,438 samples at 256 end in an update of 158."""
    folder = run("--last-update", "keep", output=tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert [row["batch/global"] for row in rows(folder) if "batch/global" in row][-1] == 158
    assert main(["advise", str(folder), "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["global_batch_size"] == 256
    assert said[-3:-1] == found["advice"]
