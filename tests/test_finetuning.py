"""`lbaccel.finetune`: one call from photographs to a model that is judged and used."""

from __future__ import annotations

from pathlib import Path

import pytest
from photographs import make_photographs, make_weights

import lbaccel
from lbaccel import InputError, train


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_one_call_trains_what_start_would_print():
    photos, weights = make_photographs("photos"), make_weights("test_resnet")
    said: list[str] = []
    pins = {"checkpoint": str(weights), "img_size": 32, "workers": 0, "log_with": ["run_folder"]}
    result = lbaccel.finetune(photos, minutes=5, say=said.append, epochs=3, **pins)
    assert result.folder.parent == Path("runs") and any("first figure" in line for line in said)
    judged = result.evaluate()
    (first, *_) = result.predict(photos / "val" / "red")
    assert 0 <= judged.top1_pct <= 100 and first.classes[0] in ("blue", "green", "red")
    assert train.main([*result.start.flags(), "--output", "again"]) == 0
    (again,) = Path("again").iterdir()
    losses = [(run / "metrics.jsonl").read_text() for run in (again, result.folder)]
    assert [text.count("train/loss") for text in losses] == [losses[0].count("train/loss")] * 2
    assert lbaccel.evaluate(again).top1_pct == judged.top1_pct


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epoch": 3}, "no argument 'epoch'. Did you mean epochs?"),
        ({"epochs": -1}, "epochs in finetune()=-1 is not a number above 0"),
        ({"model": "test_resnett", "checkpoint": None}, "Nearest: test_resnet"),
    ],
)
def test_settings_of_no_use_are_refused(settings, says):
    make_photographs("photos", train=2, val=2)
    with pytest.raises(InputError) as caught:
        lbaccel.finetune("photos", say=lambda _: None, **settings)
    assert says in str(caught.value)
