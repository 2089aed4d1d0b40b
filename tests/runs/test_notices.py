"""A loss that goes wrong is said once, with its cause and what to type."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from runs_of_recipe import run

from lbaccel.runs.notices import Circumstances, LossNotices

PLAIN = Circumstances(10, 224, None, False, False, 0.1)


def said(losses, facts=PLAIN, num_samples=512, rates=None):
    notices = LossNotices(facts)
    rates = rates or [0.1] * len(losses)
    return [
        notices.after_update(loss, num_samples, lr=lr)
        for loss, lr in zip(losses, rates, strict=True)
    ]


def test_a_loss_that_grows_tenfold_is_said_once_with_a_rate_to_type():
    found = said([2.3, 2.1, 1.9, 18.0, 60.0, 197.0])
    texts = [text for text in found if text is not None]
    assert len(texts) == 1 and found.index(texts[0]) == 3
    assert "it was 2" in texts[0] and "--base-lr 0.025" in texts[0] and "lr-find" in texts[0]


def test_the_rate_to_type_is_the_largest_that_the_run_bore():
    """The step of 0.05 came before the best loss, and that of 0.1 after it: half the base rate."""
    losses, rates = [2.3, 2.1, 1.9, 1.7, 18.0], [0.01, 0.03, 0.05, 0.1, 0.1]
    (text,) = filter(None, said(losses, rates=rates))
    assert "rates up to 0.05 brought it down to 1." in text and "after rates up to 0.1." in text
    assert "give --base-lr 0.05, or" in text


def test_a_rate_that_was_borne_and_then_was_not_is_quartered():
    (text,) = filter(None, said([2.3, 1.5, 1.0, 0.8, 30.0]))
    assert "it was 1.05 at its best" in text and "give --base-lr 0.025, or" in text


def test_the_stable_rate_is_kept_over_a_resume():
    first = LossNotices(PLAIN)
    for loss, lr in ((2.3, 0.01), (2.1, 0.05), (1.9, 0.1)):
        assert first.after_update(loss, 512, lr=lr) is None
    resumed = LossNotices(PLAIN)
    resumed.load_state_dict(first.state_dict())
    texts = [notices.after_update(30.0, 512, lr=0.1) for notices in (first, resumed)]
    assert texts[0] == texts[1] and "--base-lr 0.05, or" in texts[0]


@pytest.mark.parametrize("losses", [
    [2.3, 2.6, 3.2, 3.0, 2.0, 1.0],  # a warmup's bump
    [2.3, 0.01, 0.05, 0.2, 0.9, 0.8],  # small losses vary by factors
    [3.5, 3.0, 3.3, 3.1],
])  # fmt: skip
def test_a_loss_that_only_varies_is_not_said(losses):
    assert said(losses) == [None] * len(losses)


def test_noise_of_small_updates_is_smoothed_away():
    varied = [2.3] * 20 + [2.3, 2.3, 9.0, 2.3] * 3
    assert said(varied, num_samples=8) == [None] * len(varied)
    assert any(said([2.3] * 20 + [9.0] * 200, num_samples=8))


def test_the_first_loss_far_above_chance_names_the_likely_causes():
    facts = Circumstances(5, 96, 224, True, True, 0.01)
    first, *rest = said([13.4, 9.0, 5.0, 2.0], facts)
    assert rest == [None] * 3
    for word in ("13.4", "5 classes has 1.61", "frozen", "96 px", "224 px", "--img-size 224"):
        assert word in first, word
    (plain,) = said([13.4])
    assert "frozen" not in plain and "px" not in plain
    assert said([math.log(10) + 1.4]) == [None]


def test_a_resumed_run_says_nothing_twice():
    notices = LossNotices(PLAIN)
    assert notices.after_update(2.0, 512, lr=0.1) is None
    assert notices.after_update(50.0, 512, lr=0.1)
    resumed = LossNotices(PLAIN)
    resumed.load_state_dict(notices.state_dict())
    assert resumed.after_update(80.0, 512, lr=0.1) is None


def test_a_run_that_diverges_prints_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("--base-lr", "60", "--warmup", "none", "--momentum", "0.9", "--epochs", "1")
    text = capsys.readouterr().err
    assert text.count("the loss diverges") == 1 and "--base-lr 15" in text


def test_a_run_in_peace_prints_none(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("--epochs", "1")
    text = capsys.readouterr().err
    assert "diverges" not in text and "first loss" not in text


def test_chance_under_bce_is_that_of_one_class_alone():
    facts = Circumstances(1000, 224, None, False, False, 0.1, loss="bce")
    texts = [text for text in said([0.69, 0.05, 0.01, 7.0, 8.0], facts) if text is not None]
    assert len(texts) == 1 and "diverges" in texts[0]
    assert not any(
        said([0.69, 0.05, 0.01, 7.0, 7.5], Circumstances(1000, 224, None, False, False, 1))
    )


def test_chance_beside_a_teacher_is_the_most_that_guessing_has():
    """Guessing answers a teacher of one class alone with ln(5), of T^2 times that in the loss."""
    alpha, temperature = 0.5, 4.0
    most = (1 - alpha) * math.log(5) + alpha * temperature**2 * math.log(5)
    facts = Circumstances(5, 224, None, False, False, 0.1, times_chance=0.5 + 0.5 * 16)
    assert said([most + 1.4], facts) == [None]
    (text,) = said([most + 1.6], facts)
    assert f"5 classes has at most {most:.3g}" in text
    assert said([most + 1.4]) != [None]  # without a teacher


def test_a_taught_run_tells_its_notices_of_the_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from recipes import settings_of

    from lbaccel.recipe.training import circumstances

    seen = []
    for flags in ((), ("--teacher", "x", "--distill-alpha", 0.25, "--distill-temperature", 2)):
        s = settings_of(*flags)
        task = SimpleNamespace(
            model=None,
            num_classes=10,
            preprocessing={"img_size": 8},
            plan=SimpleNamespace(norm_batch_size=32),
        )
        seen.append(circumstances(s, task, SimpleNamespace(lr=0.1)).times_chance)
    assert seen == [1.0, 0.75 + 0.25 * 4]
