"""The guide of the first hour, typed line by line on generated pictures."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from pathlib import Path

from photographs import make_photographs, make_weights

from lbaccel import cli

GUIDE = Path(__file__).parent.parent / "docs" / "first_hour.md"


def test_the_guide_works_as_it_is_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = make_photographs("made")
    for split in ("train", "val"):  # one folder a class, as the guide draws it
        for folder in (made / split).iterdir():
            target = Path("photos", folder.name)
            target.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                shutil.copy(path, target / f"{split}-{path.name}")
    shutil.copytree(made / "val" / "red", "new")
    weights = make_weights("test_resnet")
    # this machine has no network: weights of a file; and pictures of 48 px
    more = {"start": ["--checkpoint", str(weights), "--img-size", "32", "--workers", "0"]}
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.DOTALL)
        for line in block.splitlines()
    ]
    assert [shlex.split(line)[1] for line in lines] == [
        "start", "train", "eval", "predict", "export",
    ]  # fmt: skip
    for line in lines:
        runs = sorted(Path("runs").glob("*")) if Path("runs").exists() else []
        name = runs[-1].name if runs else "none"
        _, command, *arguments = shlex.split(line.replace("NAME", name))
        assert cli.main([command, *arguments, *more.get(command, [])]) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert "first figure: 100.0 % top-1" in said and "top-1 is " in said
    (run,) = Path("runs").iterdir()
    (judged,) = (run / "eval").iterdir()
    assert (judged / "confusion.png").exists() and (judged / "predictions.csv").exists()
    rows = list(csv.DictReader(Path("predictions.csv").read_text().splitlines()))
    assert len(rows) == 8 and {row["class_1"] for row in rows} <= {"blue", "green", "red"}
    assert (Path("model") / "config.json").exists()
