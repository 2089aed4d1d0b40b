"""The first figure: a linear classifier on frozen features, within its time."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from photographs import make_photographs
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lbaccel.data.pipelines import evaluation_batches
from lbaccel.data.sources import open_source
from lbaccel.models import preprocessing
from lbaccel.product import features
from lbaccel.product.features import first_figure

CPU = torch.device("cpu")


@pytest.fixture
def parts(tmp_path):
    source = open_source(f"folder:{make_photographs(tmp_path / 'photos', seed=1)}")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    values, _ = preprocessing(model, num_channels=3, given={})
    return model, source, {**values, "img_size": 32}


def test_it_is_the_figure_of_scikit_learn_on_the_pooled_features(parts):
    model, source, pre = parts
    found = first_figure(model, source, pre, device=CPU, seconds=60.0)
    assert (found.num_train, found.num_val) == (72, 24)
    sets = []
    for part in (source.train, source.val):
        images, labels = zip(
            *evaluation_batches(part, preprocessing=pre, batch_size=7), strict=True
        )
        with torch.no_grad():
            maps = model.eval().forward_features(torch.cat(images))
        sets.append((maps.mean((2, 3)).numpy(), torch.cat(labels).numpy()))
    (x, y), (x_val, y_val) = sets
    truth = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500)).fit(x, y)
    assert found.hits == (truth.predict(x_val) == y_val).sum()


def test_the_model_is_left_as_it_was(parts):
    model, source, pre = parts
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first_figure(model.train(), source, pre, device=CPU, seconds=60.0)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_in_little_time_fewer_images_are_taken_of_every_class(parts, monkeypatch):
    model, source, pre = parts
    seen = []
    plain = features._features
    monkeypatch.setattr(
        features,
        "_features",
        lambda m, images, *rest: seen.append(images) or plain(m, images, *rest),
    )
    found = first_figure(model, source, pre, device=CPU, seconds=0.0)
    train, val = seen[-2:]
    assert set(train.labels) == set(val.labels) == {0, 1, 2}
    assert found.num_train == len(train) == 6 and found.num_val == len(val) < 24
    names = dict(zip(source.train.names, source.train.labels, strict=True))
    assert all(names[name] == label for name, label in zip(train.names, train.labels, strict=True))


@pytest.mark.parametrize("count", [1, 5, 30, 71])
def test_a_part_of_a_set_keeps_its_order_and_its_shares(parts, count):
    _, source, _ = parts
    part = features._evenly(source.train, count)
    assert len(part) == count == len(set(part.names))
    order = [source.train.names.index(name) for name in part.names]
    assert order == sorted(order)
    counts = np.bincount(part.labels, minlength=3)
    assert counts.max() - counts.min() <= 1 + (count % 3 > 0)
