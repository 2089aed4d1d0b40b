"""The rate of a recipe that names none: by optimizer, weights, and what BatchNorm does."""

from __future__ import annotations

import pytest
import recipes

from lbaccel.recipe.rate import rate_of


@pytest.mark.parametrize(
    ("flags", "base_lr"),
    [
        ("--optimizer sgd", 0.1),
        ("--optimizer adamw", 1e-3),
        ("--norm-batch-size frozen", 0.1),
        ("--pretrained", 0.01),
        ("--pretrained --norm-batch-size 32", 0.01),
        ("--pretrained --norm-batch-size frozen", 0.003),
        ("--pretrained --norm-batch-size frozen --train head", 0.01),
        ("--pretrained --train head", 0.01),
        ("--pretrained --norm-batch-size frozen --optimizer adamw", 3e-4),
        ("--pretrained --norm-batch-size 32 --optimizer adamw", 1e-4),
        ("--pretrained --norm-batch-size frozen --base-lr 0.02", 0.02),
    ],
)
def test_the_rate_of_a_recipe_that_names_none(flags, base_lr):
    settings = recipes.settings_of(*flags.split())
    assert rate_of(settings, global_batch_size=256).base_lr == base_lr
