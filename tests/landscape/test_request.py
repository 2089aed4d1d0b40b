"""Two models have a line between them where they differ in their weights alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from lbaccel.errors import InputError
from lbaccel.landscape.request import check_comparable

BUILT = {"model": "cifar_resnet8", "img_size": 32, "num_channels": 3, "stem": "native"}
BUILT |= {"mean": [0.5], "std": [0.5], "interpolation": "bilinear"}


def trained(path, **more):
    pre = {**BUILT, **more}
    model, classes = nn.Linear(2, 2), ("a", "b")
    return SimpleNamespace(path=path, classes=classes, num_named=2, preprocessing=pre, model=model)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ({"act": "relu"}, {"act": "gelu"}),
        ({}, {"act": "gelu"}),
        ({"widths": [8, 16]}, {"widths": [16, 8]}),
    ],
)
def test_two_networks_of_other_arguments_and_equal_shapes_have_no_line(own, other):
    with pytest.raises(InputError, match=r"RUN2 has model_kwargs=.*, and RUN1 has"):
        check_comparable(trained("RUN1", model_kwargs=own), trained("RUN2", model_kwargs=other))


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ({"act": "gelu", "widths": [8, 16]}, {"widths": (8, 16), "act": "gelu"}),
        ({"zero_init_last": False}, {}),  # where the weights began
    ],
)
def test_equal_networks_have_one(own, other):
    check_comparable(trained("RUN1", model_kwargs=own), trained("RUN2", model_kwargs=other))
    check_comparable(trained("RUN1"), trained("RUN2"))


def test_other_images_are_refused_as_before():
    with pytest.raises(InputError, match="RUN2 has mean="):
        check_comparable(trained("RUN1"), trained("RUN2", mean=[0.1]))
