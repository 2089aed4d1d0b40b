"""Folders of studies whose runs were never trained: each value is a formula of the test."""

from __future__ import annotations

import json
from pathlib import Path

from lbaccel.runs.metric_lines import numbered
from lbaccel.studies.folder import begin, cell_folder, study_in
from lbaccel.studies.read import study_of

NUM_TEST, SAMPLES_AN_EPOCH = 2000, 2048
STUDY = {
    "name": "made-up",
    "title": "Does growing the batch lose accuracy?",
    "settings": {"norm_batch_size": 32, "model": "resnet10t", "epochs": 6.0},
    "arms": {
        "plain": {"title": "batch alone", "settings": {"lr_scaling": "none"}},
        "linear": {"title": "linear rule", "settings": {"lr_scaling": "linear"}},
    },
    "batches": [32, 128, 512],
    "seeds": 3,
    "baseline": {"arm": "plain", "batch": 32},
    "pairs": [["linear", "plain"]],
    "target": 80.0,
    "expected": {"plain": {32: 88.33}},
    "source": {"authors": "A. Author", "title": "On batches", "year": 2020, "where": "table I"},
}
ENVIRONMENT = {
    "command": "lbaccel-train --config settings.yaml",
    "python": "3.12.1",
    "platform": "Linux",
    "cpu_count": 2,
    "devices": ["cpu"],
    "git_commit": "0123abcd",
    "versions": {"torch": "2.15.0"},
}


def make_study(folder, **changed):
    """An empty folder of a study, and the study."""
    begin(Path(folder), study_of({**STUDY, **changed}, None))
    return study_in(Path(folder))


def add_run(folder, cell, tops, *, status="done", name="20260101-000000-run", more=(), **summary):
    """A run of a cell: an evaluation an epoch with these top-1, two training lines an epoch."""
    run = cell_folder(Path(folder), cell) / name
    run.mkdir(parents=True)
    updates = SAMPLES_AN_EPOCH // cell.batch
    lines = []
    for epoch, top in enumerate(tops, start=1):
        for half in (0.5, 1.0):
            update = round(updates * (epoch - 1 + half))
            where = {"update": update, "samples_seen": update * cell.batch}
            where["perf/seconds"] = update * 0.5
            train = {"train/loss": 1 / update, "train/top1": top + half, "optim/lr": 0.1}
            lines.append({**where, **train, "batch/micro": 32})
        lines.append({**where, "val/top1": top, "val/loss": 1 - top / 100})
    lines += more
    text = [numbered(line, i) for i, line in enumerate(lines, start=1)]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in text))
    plan = {"micro_batch_size": 32, "lr": 0.1, "equation": f"{cell.batch} = ..."}
    origin = dict.fromkeys(cell.settings, "settings.yaml")
    identity = {"num_val": NUM_TEST, "num_train": SAMPLES_AN_EPOCH}
    config = {**cell.settings, "workers": 2, "plan": plan, "origin": origin}
    # JSON is YAML, and nothing here waits for the disk
    (run / "config.yaml").write_text(json.dumps({**config, "data_identity": identity}))
    end = {"num_updates": updates * len(tops), "samples_seen": SAMPLES_AN_EPOCH * len(tops)}
    ended = {"status": status, **end, "seconds": 12.5, "peak_gib": 0.5, **summary}
    (run / "summary.json").write_text(json.dumps(ended))
    (run / "env.json").write_text(json.dumps(ENVIRONMENT))
    return run


def fill(folder, study, top, **of_a_run):
    """A run for each cell: `top(cell)` is its top-1 after the last epochs, which it comes near."""
    for cell in study.cells():
        final = top(cell)
        add_run(folder, cell, [final - 20, final - 5, final, final, final, final], **of_a_run)
