"""The recipe's loss: exact over every partition, and what it counts beside the loss."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import forks
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy
from torch import nn
from torch.nn import functional as F

from lbaccel import BatchPlan, InputError, LargeBatch
from lbaccel.batch.plan import MicroBatch
from lbaccel.data.loader import Update
from lbaccel.recipe.class_weights import check_unchanged, in_words, weights_of
from lbaccel.recipe.loss import HITS, loss_of
from lbaccel.update.accumulation import accumulate

COUNT, CLASSES = 23, 5
WEIGHTS = torch.tensor([0.1, 3.0, 1.0, 7.5, 0.02], dtype=torch.float64)
KINDS = ["hard", "smooth", "soft"]


def samples(kind):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(COUNT, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (COUNT,), generator=generator)
    if kind == "soft":
        y = torch.rand(COUNT, CLASSES, generator=generator, dtype=torch.float64).softmax(1)
    return x, y


def network():
    torch.manual_seed(0)
    return nn.Linear(6, CLASSES).double()


def smoothing_of(kind):
    return 0.1 if kind == "smooth" else 0.0


def loss_fn_of(name, kind, weights=None):
    return loss_of(
        name,
        dtype=torch.float64,
        memory_format="contiguous",
        label_smoothing=smoothing_of(kind),
        class_weights=weights,
    )


def truth(name, kind, weights=None):
    """Loss and gradients of the whole batch, in torch's and timm's own words."""
    model, (x, y) = network(), samples(kind)
    if name == "bce":
        loss = BinaryCrossEntropy(smoothing=smoothing_of(kind))(model(x), y)
    else:
        loss = F.cross_entropy(model(x), y, weight=weights, label_smoothing=smoothing_of(kind))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def error(loss, gradients, expected):
    truth_loss, truth_gradients = expected
    gap = (gradients - truth_gradients).norm() / truth_gradients.norm()
    return max(abs(loss / truth_loss - 1), gap.item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "weights"), [("ce", None), ("ce", WEIGHTS), ("bce", None)], ids=["ce", "w", "bce"]
)
def test_random_partitions_give_the_loss_and_the_gradient_of_the_whole_batch(name, weights, kind):
    expected, draw = truth(name, kind, weights), random.Random(0)
    for _ in range(20):
        cuts = sorted(draw.sample(range(1, COUNT), draw.randint(1, COUNT - 1)))
        edges = [0, *cuts, COUNT]
        (x, y), model = samples(kind), network()
        parts = [(MicroBatch(a, (b - a,)), (x[a:b], y[a:b])) for a, b in pairwise(edges)]
        sums = accumulate(model, parts, loss_fn_of(name, kind, weights), num_samples=COUNT)
        scale = COUNT / sums.weight
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()]) * scale
        assert error((sums.loss / sums.weight).item(), gradients, expected) < 1e-12


def forked(rank, kind):
    accelerator = Accelerator(cpu=True)
    plan = BatchPlan(global_batch_size=COUNT, micro_batch_size=3, world_size=2)
    (x, y), model = samples(kind), network()
    parts = [(m, slice(m.start, m.start + m.num_samples)) for m in plan.partition(rank)]
    update = Update(0, COUNT, [(m, (x[p], y[p])) for m, p in parts])
    start = [p.detach().clone() for p in model.parameters()]
    large_batch = LargeBatch(accelerator, plan)
    bare, optimizer = model, torch.optim.SGD(model.parameters(), lr=1.0)
    large_batch.prepare(model, optimizer, [update])
    result = large_batch.update(update, loss_fn_of("ce", kind, WEIGHTS))
    moved = zip(start, bare.parameters(), strict=True)
    gradients = torch.cat([(a - b.detach()).flatten() for a, b in moved])
    return error(result.loss, gradients, truth("ce", kind, WEIGHTS)), dict(result.sums)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_with_class_weights_give_the_whole_batch(kind):
    found = forks.values(forks.run_forked(forked, kind, world_size=2))
    assert max(gap for gap, _ in found) < 1e-12
    x, y = samples(kind)
    hits = {} if kind == "soft" else {HITS: (network()(x).argmax(1) == y).sum().item()}
    assert [sums for _, sums in found] == [hits, hits]


def test_equal_weights_to_the_partitions_would_be_wrong():
    """So that the partitions above show something."""
    (x, y), model = samples("hard"), network()
    halves = [F.cross_entropy(model(x[p]), y[p], weight=WEIGHTS) for p in (slice(3), slice(3, 23))]
    whole, _ = truth("ce", "hard", WEIGHTS)
    assert abs(sum(halves).item() / 2 / whole - 1) > 1e-2


def test_balanced_weights_are_scikit_learns():
    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 31)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    found = weights_of("balanced", labels=labels, classes=("a", "b", "c"), num_classes=4)
    assert found == (*expected, 1.0)
    assert "0.4301 (c) to 6.667 (b)" in in_words(found, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w.yaml", "a: 2\n'no': 0.5\n"),
        ("w.csv", "class,weight\nno,0.5\na,2\n"),
        ("w.csv", "\ufeffno,0.5\na, 2\n"),
        ("w.json", '{"no": 0.5, "a": 2}'),
    ],
)
def test_a_file_names_the_weight_of_each_class(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    labels = torch.tensor([0, 1])
    asked = str(tmp_path / name)
    found = weights_of(asked, labels=labels, classes=("a", "no"), num_classes=2)
    assert found == (2.0, 0.5)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("w.yaml", "a: 2", "has no weight for 'b'"),
        ("w.yaml", "{a: 2, b: 1, c: 3}", "names 'c'"),
        ("w.yaml", "{a: 2, b: 0}", "the weight of 'b' is 0"),
        ("w.yaml", "{a: 2, b: -1}", "the weight of 'b' is -1"),
        ("w.yaml", "{a: .nan, b: 1}", "the weight of 'a' is nan"),
        ("w.yaml", "{a: .inf, b: 1}", "the weight of 'a' is inf"),
        ("w.yaml", "{a: yes, b: 1}", "the weight of 'a', True, is no number"),
        ("w.yaml", "{a: [1], b: 1}", "is no number"),
        ("w.yaml", "a: 1\nb: {", "is no YAML"),
        ("w.yaml", "[1, 2]", "is no mapping"),
        ("w.csv", "a,1\nb", "the line 'b' is not class,weight"),
        ("w.csv", "a,1\na,2\nb,1", "names 'a' twice"),
        ("w.csv", "a,x\nb,1", "the weight of 'a', 'x', is no number"),
        ("absent.yaml", None, "can't be read"),
    ],
)
def test_a_file_of_no_use_is_refused_by_its_name_and_the_class(name, text, says, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    asked = str(tmp_path / name)
    with pytest.raises(InputError) as caught:
        weights_of(asked, labels=torch.tensor([0, 1]), classes=("a", "b"), num_classes=2)
    assert says in str(caught.value) and name in str(caught.value)


def test_a_class_without_images_has_no_balanced_weight():
    with pytest.raises(InputError, match="class 'b' has no training image"):
        weights_of("balanced", labels=torch.tensor([0]), classes=("a", "b"), num_classes=2)


def test_weights_that_a_run_began_with_are_not_changed_by_its_file():
    check_unchanged((1.0, 2.0), [1.0, 2.0])
    check_unchanged((1.0, 2.0), "balanced")
    check_unchanged((1.0, 2.0), None)
    with pytest.raises(InputError, match="other weights than when the run began"):
        check_unchanged((1.0, 2.5), [1.0, 2.0])


def test_a_class_weight_of_one_changes_nothing_but_the_sum_of_weights():
    loss, _ = truth("ce", "hard")
    ones, _ = truth("ce", "hard", torch.ones(CLASSES, dtype=torch.float64))
    assert math.isclose(loss, ones, rel_tol=1e-15)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("w.csv", "caf\xe9,2\n".encode("latin-1"), "w.csv is no CSV"),
        ("w.yaml", b"a: " + b"9" * 400 + b"\nb: 1\n", "the weight of 'a', 9999"),
    ],
)
def test_a_file_of_another_encoding_or_a_number_without_end_is_a_sentence(
    name, content, says, tmp_path
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        weights_of(
            str(tmp_path / name),
            labels=torch.tensor([0, 1]),
            classes=("a", "b"),
            num_classes=2,
        )
    assert says in str(caught.value) and len(str(caught.value)) < 400
