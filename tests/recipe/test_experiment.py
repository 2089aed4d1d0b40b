"""Which settings a comparison is about: derived from the option table."""

from __future__ import annotations

import pytest

from lbaccel.recipe.experiment import beside_defaults, experiment_settings, with_experiment
from lbaccel.recipe.options import OPTIONS
from lbaccel.runs.folder import plain
from lbaccel.runs.read import Run

# of a whole config.yaml, flat, as runs of the recipe have it
WHOLE = {
    **{name: plain(row.default) for name, row in OPTIONS.items()},
    "plan/world_size": 1,
    "origin/lr": "flag",
    "asked/seed": 3,
}


def names(config, **options):
    return set(experiment_settings([config], **options)[0])


def test_each_option_is_in_the_contract_or_a_length_or_left_out_for_a_reason():
    kept = names(WHOLE)
    for name, row in OPTIONS.items():
        assert (name in kept) == (row.contract or row.length), name
        assert not (row.contract and row.length), f"{name}: a length is no part of the contract"
        assert not (row.length and (row.private or row.plan)), name
    assert {"seed", "global_batch_size", "epochs", "patience", "eval_every"} <= kept
    left_out = ("output", "wandb_name", "wandb_tags", "workers", "log_with", "resume", "dry_run")
    assert not kept & {*left_out, "micro_batch_size", "memory", "log_every", "keep", "max_hours"}


def test_plan_origin_and_what_was_asked_for_are_no_settings():
    assert not [name for name in names(WHOLE) if "/" in name]


def test_the_plan_is_there_where_it_is_asked_for_and_adds_something():
    configs = [
        {"lr": lr, "plan/lr": lr, "plan/micro_batch_size": 32 * lr, "plan/equation": f"{lr}"}
        | {"output": f"runs/{lr}", "origin/lr": "flag", "wandb_mode": str(lr)}
        for lr in (1, 2)
    ]
    for one in experiment_settings(configs, plan=True):
        lr = one["lr"]
        assert one["plan/micro_batch_size"] == 32 * lr
        assert not {"plan/lr", "plan/equation", "output", "origin/lr", "wandb_mode"} & set(one)
    assert {"micro_batch_size", "activation_checkpointing"} <= names(WHOLE, plan=True)


def test_a_setting_that_is_younger_than_a_run_has_the_value_that_it_had_then():
    older = {k: v for k, v in WHOLE.items() if k not in ("test_split", "mixup")}
    first, second = experiment_settings([older, WHOLE])
    assert first["test_split"] == "val" and second["test_split"] == "test"
    assert first["mixup"] == second["mixup"] == 0.0


def test_a_loop_of_your_own_has_the_settings_that_it_names_and_no_others():
    assert experiment_settings([{"width": 4, "seed": 1}]) == [{"width": 4, "seed": 1}]


def test_other_images_are_a_setting_and_their_fingerprint_is_none():
    of = {"data_identity/num_train": 80, "data_identity/fingerprint": "a"}
    other = {"data_identity/num_train": 81, "data_identity/fingerprint": "b"}
    assert experiment_settings([of, other]) == [
        {"data_identity/num_train": 80},
        {"data_identity/num_train": 81},
    ]
    assert experiment_settings([of, {}]) == [{}, {}], "an older run does not know it"


def test_an_extended_run_is_another_experiment():
    first, second = experiment_settings([WHOLE, {**WHOLE, "extensions": [[2.0, "restart"]]}])
    assert (first["extensions"], second["extensions"]) == ([], [[2.0, "restart"]])


def test_what_is_at_its_default_has_not_to_be_said():
    assert beside_defaults({"model": "vit", "mixup": 0.0, "mine": 1}) == {
        "model": "vit",
        "mine": "1",
    }


@pytest.mark.parametrize(
    ("config", "summary", "status"),
    [
        (WHOLE, {}, "unfinished"),
        (WHOLE, {"status": "running"}, "unfinished"),
        (WHOLE, {"status": "failed"}, "failed"),
        ({"seed": 1}, {}, None),
    ],
)
def test_a_run_of_the_recipe_that_wrote_no_end_did_not_finish(config, summary, status):
    (one,) = with_experiment([Run("a", config, summary, {}, "folder")])
    assert one.summary.get("status") == status
