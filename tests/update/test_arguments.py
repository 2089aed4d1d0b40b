"""Arguments of `LargeBatch` and `UpdateLoader` of another kind: each ends in one sentence."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import timm.loss
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset
from updates import cross_entropy

from lbaccel import BatchPlan, InputError, LargeBatch, Update, UpdateLoader

PLAN = BatchPlan(global_batch_size=8, micro_batch_size=4)
DATA = TensorDataset(torch.randn(32, 5), torch.arange(32) % 3)
CPU = partial(Accelerator, cpu=True)


def refused(*words):
    """The block raises an InputError of one line that has these words."""
    return _Refused(words)


class _Refused:
    def __init__(self, words):
        self.words = words

    def __enter__(self):
        self.raises = pytest.raises(InputError)
        self.caught = self.raises.__enter__()

    def __exit__(self, *error):
        passed = self.raises.__exit__(*error)
        text = str(self.caught.value)
        assert "\n" not in text and len(text) < 500, text
        assert all(word in text for word in self.words), text
        return passed


def model_and_optimizer():
    model = nn.Linear(5, 3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def prepared(**options):
    large_batch = LargeBatch(CPU(), PLAN, **options)
    model, optimizer, loader = large_batch.prepare(*model_and_optimizer(), UpdateLoader(DATA, PLAN))
    return large_batch, model, optimizer, loader


BUILT = {
    "nothing": (lambda: LargeBatch(), ["LargeBatch(): the first argument is the Accelerator"]),
    "no accelerator": (
        lambda: LargeBatch(PLAN),
        ["(a BatchPlan)", "LargeBatch(Accelerator(), plan)"],
    ),
    "None": (lambda: LargeBatch(None, PLAN), ["(None, a BatchPlan)", "from accelerate import"]),
    "a device": (lambda: LargeBatch("cpu", PLAN), ["('cpu', a BatchPlan)"]),
    "torch's device": (lambda: LargeBatch(torch.device("cpu"), PLAN), ["(a device, a BatchPlan)"]),
    "the class": (lambda: LargeBatch(Accelerator, PLAN), ["(the class Accelerator, a BatchPlan)"]),
    "the other order": (lambda: LargeBatch(PLAN, CPU()), ["(a BatchPlan, an Accelerator)"]),
    "no plan": (
        lambda: LargeBatch(CPU()),
        ["LargeBatch(an Accelerator): the second argument is the plan"],
    ),
    "a size": (lambda: LargeBatch(CPU(), 512), ["BatchPlan(global_batch_size=512, micro_b"]),
    "a loader": (
        lambda: LargeBatch(CPU(), DataLoader(DATA)),
        ["(an Accelerator, a DataLoader)", "BatchPlan(global_batch_size=..., "],
    ),
    "as accelerator.prepare": (
        lambda: LargeBatch(CPU(), PLAN, *model_and_optimizer()),
        ["a Linear, a SGD", "large_batch.prepare(model, optimizer, loader)"],
    ),
    "transformers' name": (
        lambda: LargeBatch(CPU(), PLAN, max_grad_norm=1.0),
        ["LargeBatch(max_grad_norm=1.0): use clip_grad_norm"],
    ),
    "a typo": (lambda: LargeBatch(CPU(), PLAN, clip_grad_norms=1.0), ["mean clip_grad_norm?"]),
    "a word": (lambda: LargeBatch(CPU(), PLAN, verbose=True), ["known are clip_grad_norm, "]),
    "of the plan": (
        lambda: LargeBatch(CPU(), PLAN, gradient_accumulation_steps=4),
        ["it belongs to the plan"],
    ),
    "of prepare": (lambda: LargeBatch(CPU(), PLAN, ema=nn.Linear(1, 1)), ["(ema=a Linear)"]),
    "a norm in quotes": (
        lambda: LargeBatch(CPU(), PLAN, clip_grad_norm="1.0"),
        ["'1.0'", "above 0"],
    ),
    "a switch": (lambda: LargeBatch(CPU(), PLAN, clip_grad_norm=True), ["=True: give a norm"]),
    "no norm": (lambda: LargeBatch(CPU(), PLAN, clip_grad_norm=0), ["=0: give a norm above 0"]),
    "a share": (lambda: LargeBatch(CPU(), PLAN, drops=0.1), ["drops=0.1", "LossDropout"]),
    "noise": (lambda: LargeBatch(CPU(), PLAN, noise_scale=True), ["noise_scale=True: use Noise"]),
    "one name": (
        lambda: LargeBatch(CPU(), PLAN, averages="head.centers"),
        ["give a list of names, such as averages=['head.centers']"],
    ),
    "writes": (lambda: LargeBatch(CPU(), PLAN, allow_writes=True), ["allow_writes=True"]),
    "a seed": (lambda: LargeBatch(CPU(), PLAN, seed="0"), ["seed='0'"]),
}


@pytest.mark.parametrize("case", BUILT)
def test_a_large_batch_of_other_parts_is_one_sentence(case):
    build, words = BUILT[case]
    with refused(*words):
        build()


def of_another_model():
    model, optimizer = model_and_optimizer()
    return copy.deepcopy(model), optimizer, UpdateLoader(DATA, PLAN)


def with_a_temperature():
    model, _ = model_and_optimizer()
    more = [*model.parameters(), nn.Parameter(torch.zeros(7))]
    return model, torch.optim.SGD(more, lr=0.1), UpdateLoader(DATA, PLAN)


def with_a_scheduler_of_another_optimizer():
    model, optimizer = model_and_optimizer()
    _, other = model_and_optimizer()
    return model, optimizer, UpdateLoader(DATA, PLAN), LambdaLR(other, lambda u: 1.0)


def with_loader(loader):
    return lambda: (*model_and_optimizer(), loader)


PREPARED = {
    "nothing": (tuple, ["got nothing in the place of the model"]),
    "a model alone": (lambda: (nn.Linear(5, 3),), ["got nothing in the place of the optimizer"]),
    "no loader": (model_and_optimizer, ["got nothing in the place of the loader", "UpdateLoader("]),
    "the loader first": (
        lambda: (UpdateLoader(DATA, PLAN), *model_and_optimizer()),
        ["an UpdateLoader, a Linear, a SGD", "the loader stands in the place of the model"],
    ),
    "a plain loader second": (
        lambda: (nn.Linear(5, 3), DataLoader(DATA), model_and_optimizer()[1]),
        [
            "the loader stands in the place of the optimizer",
            "Use prepare(model, optimizer, loader)",
        ],
    ),
    "the scheduler third": (
        lambda: (*(m := model_and_optimizer()), LambdaLR(m[1], lambda u: 1.0)),
        ["the scheduler stands in the place of the loader"],
    ),
    "a plain loader": (with_loader(DataLoader(DATA)), ["Use UpdateLoader(dataset, plan)"]),
    "a data set": (with_loader(DATA), ["a TensorDataset in the place of the loader"]),
    "batches": (with_loader([(torch.ones(2), torch.ones(1))]), ["a list in the place of"]),
    "a tensor": (with_loader(torch.ones(4)), ["a Tensor in the place of the loader"]),
    "None": (with_loader(None), ["None in the place of the loader"]),
    "a model's class": (
        lambda: (nn.Linear, None, None),
        ["the class Linear in the place of the model"],
    ),
    "an optimizer's class": (
        lambda: (nn.Linear(5, 3), torch.optim.SGD, UpdateLoader(DATA, PLAN)),
        ["the class SGD in the place of the optimizer", "model.parameters()"],
    ),
    "an optimizer of a copy": (
        of_another_model,
        ["no parameter of the model (a Linear)", "SGD(model.parameters(), ...)"],
    ),
    "an optimizer of more": (with_a_temperature, ["holds 1 tensors beside", "(7,)"]),
    "a scheduler of another": (
        with_a_scheduler_of_another_optimizer,
        ["a LambdaLR of another optimizer"],
    ),
}


@pytest.mark.parametrize("case", PREPARED)
def test_other_objects_to_prepare_are_one_sentence_and_leave_it_ready(case):
    objects, words = PREPARED[case]
    large_batch = LargeBatch(CPU(), PLAN)
    with refused(*words):
        large_batch.prepare(*objects())
    *_, loader = large_batch.prepare(*model_and_optimizer(), UpdateLoader(DATA, PLAN))
    assert large_batch.update(next(iter(loader)), cross_entropy).applied


@pytest.mark.parametrize(
    ("average", "words"),
    [
        (0.999, ["(ema=0.999)", "ModelEmaV3(model, decay=0.999)"]),
        (AveragedModel, ["the class AveragedModel"]),
        (AveragedModel(nn.Linear(5, 3)), ["update_parameters()"]),
    ],
)
def test_an_average_without_update_is_refused_before_the_first_update(average, words):
    with refused(*words):
        LargeBatch(CPU(), PLAN).prepare(
            *model_and_optimizer(), UpdateLoader(DATA, PLAN), ema=average
        )


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (BatchPlan(global_batch_size=16, micro_batch_size=4), "global_batch_size=16"),
        (BatchPlan(global_batch_size=8, micro_batch_size=4, mix_pairs=True), "mix_pairs=True"),
        (
            BatchPlan(global_batch_size=8, micro_batch_size=4, norm_batch_size=4),
            "norm_batch_size=4",
        ),
    ],
)
def test_a_loader_of_another_plan_is_refused(other, words):
    with refused(words, "Give both the same BatchPlan"):
        LargeBatch(CPU(), PLAN).prepare(*model_and_optimizer(), UpdateLoader(DATA, other))


def test_a_loader_may_have_other_micro_batches_and_a_batch_above_its_data():
    asked = {"global_batch_size": 64, "norm_batch_size": 16}
    with pytest.warns(UserWarning, match="full-batch"):
        loader = UpdateLoader(DATA, BatchPlan(**asked, micro_batch_size=16))
    large_batch = LargeBatch(CPU(), BatchPlan(**asked, micro_batch_size=32))
    *_, loader = large_batch.prepare(*model_and_optimizer(), loader)
    assert large_batch.update(next(iter(loader)), cross_entropy).num_samples == 32


def three(model, images, labels):
    raise AssertionError("never called")


CALLED = {
    "no function": ((), ["got nothing in the place of the loss function", "def loss_fn(model"]),
    "a loss": ((torch.tensor(0.5, requires_grad=True),), ["got a Tensor in the place of the loss"]),
    "None": ((None,), ["got None in the place of the loss function"]),
    "a criterion": ((nn.CrossEntropyLoss(),), ["got CrossEntropyLoss", "logits and labels"]),
    "its class": ((nn.CrossEntropyLoss,), ["the class CrossEntropyLoss"]),
    "timm's": ((timm.loss.LabelSmoothingCrossEntropy(),), ["LabelSmoothingCrossEntropy, whose"]),
    "torch's": ((F.cross_entropy,), ["got cross_entropy, whose arguments"]),
    "with options": ((partial(F.cross_entropy, label_smoothing=0.1),), ["got cross_entropy"]),
    "of three": ((three,), ["three does not take these two", "'labels'"]),
    "of one": ((lambda batch: 0.0,), ["<lambda> does not take these two"]),
}


@pytest.mark.parametrize("case", CALLED)
def test_another_loss_function_is_one_sentence_and_the_update_can_be_done(case):
    arguments, words = CALLED[case]
    large_batch, _, _, loader = prepared()
    update = next(iter(loader))
    with refused(*words):
        large_batch.update(update, *arguments)
    with refused(*words):
        large_batch.find_micro_batch_size(loader, *arguments)
    assert large_batch.update(update, cross_entropy).applied


def test_a_loss_function_may_be_any_callable_of_two():
    class Loss(nn.Module):
        def forward(self, model, micro_batch, scale=1.0):
            return scale * cross_entropy(model, micro_batch)

    large_batch, _, _, loader = prepared()
    for loss_fn in (Loss(), Loss().forward, partial(Loss(), scale=2.0), lambda *a: Loss()(*a)):
        assert large_batch.update(next(iter(loader)), loss_fn).applied


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda loader: (), "update() got nothing"),
        (lambda loader: (cross_entropy, next(iter(loader))), "update() got a function"),
        (lambda loader: (loader, cross_entropy), "update() got an UpdateLoader"),
        (lambda loader: (next(iter(DataLoader(DATA, 8))), cross_entropy), "update() got a list"),
        (lambda loader: ({"image": torch.ones(1)}, cross_entropy), "update() got a dict"),
    ],
)
def test_another_thing_than_an_update_is_one_sentence(given, words):
    large_batch, _, _, loader = prepared()
    with refused(words, "for update in loader"):
        large_batch.update(*given(loader))


def test_an_update_before_prepare_and_a_second_prepare_are_one_sentence():
    large_batch = LargeBatch(CPU(), PLAN)
    with refused("before prepare()"):
        large_batch.update(next(iter(UpdateLoader(DATA, PLAN))), cross_entropy)
    large_batch, model, optimizer, loader = prepared()
    with refused("prepare() was called before"):
        large_batch.prepare(model, optimizer, loader)


def batches(*sizes):
    return [(torch.randn(n, 5), torch.arange(n) % 3) for n in sizes]


@pytest.mark.parametrize(
    ("micro_batches", "words"),
    [
        (batches(4, 4), ["holds a tuple of a Tensor, a Tensor", "zip(plan.partition(rank)"]),
        ([torch.randn(4, 5)], ["holds a Tensor where it needs pairs"]),
    ],
)
def test_an_update_of_batches_made_by_hand_is_one_sentence(micro_batches, words):
    large_batch, model, *_ = prepared()
    before = copy.deepcopy(model.state_dict())
    with refused(*words):
        large_batch.update(Update(0, 8, micro_batches), cross_entropy)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_update_made_by_hand_says_how_many_samples_it_holds():
    large_batch, model, *_ = prepared()
    pairs = list(zip(PLAN.partition(), batches(4, 4), strict=True))
    before = copy.deepcopy(model.state_dict())
    with refused("num_samples=16", "hold 8 samples", "Give num_samples=8"):
        large_batch.update(Update(0, 16, pairs), cross_entropy)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert large_batch.update(Update(0, 8, pairs), cross_entropy).samples_seen == 8


def normed(norm_batch_size):
    plan = BatchPlan(global_batch_size=8, micro_batch_size=4, norm_batch_size=norm_batch_size)
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    large_batch = LargeBatch(CPU(), plan)
    return large_batch, *large_batch.prepare(model, optimizer, UpdateLoader(DATA, plan))


def test_a_model_left_in_eval_mode_by_an_evaluation_is_one_sentence():
    large_batch, model, _, loader = normed(4)
    large_batch.update(next(iter(loader)), cross_entropy)
    model.eval()
    with refused("in eval mode", "norm_batch_size=4", "Call model.train()"):
        large_batch.update(next(iter(loader)), cross_entropy)
    model[2].train()  # the user's own choice of layers
    large_batch.update(next(iter(loader)), cross_entropy)
    large_batch, model, _, loader = normed("frozen")
    model.eval()
    large_batch.update(next(iter(loader)), cross_entropy)


def test_a_search_over_a_plain_loader_and_another_reason_to_stop_are_one_sentence():
    large_batch, _, _, loader = prepared()
    with refused("find_micro_batch_size() got a DataLoader"):
        large_batch.find_micro_batch_size(DataLoader(DATA), cross_entropy)
    with refused("find_micro_batch_size() got nothing"):
        large_batch.find_micro_batch_size()
    with refused("reason='now'", "'time limit', 'interrupt'"):
        large_batch.request_stop("now")
    assert large_batch.update(next(iter(loader)), cross_entropy).stop is None


LOADERS = {
    "nothing": (lambda: UpdateLoader(), ["UpdateLoader(): the first argument is the data set"]),
    "no plan": (lambda: UpdateLoader(DATA), ["UpdateLoader(a TensorDataset)", "is the plan"]),
    "a size": (lambda: UpdateLoader(DATA, 64), ["BatchPlan(global_batch_size=64, micro_b"]),
    "the other order": (lambda: UpdateLoader(PLAN, DATA), ["(a BatchPlan, a TensorDataset)"]),
    "a plain loader": (
        lambda: UpdateLoader(DataLoader(DATA), PLAN),
        ["Use UpdateLoader(loader.dataset, plan)"],
    ),
    "a path": (lambda: UpdateLoader("photos", PLAN), ["'photos'", "ImageFolder(path, transform)"]),
    "splits": (lambda: UpdateLoader({"train": DATA}, PLAN), ["(a dict, plan)", "map-style"]),
    "None": (lambda: UpdateLoader(None, PLAN), ["UpdateLoader(None, plan)"]),
    "a class": (lambda: UpdateLoader(TensorDataset, PLAN), ["(the class TensorDataset, plan)"]),
    "a rank in quotes": (lambda: UpdateLoader(DATA, PLAN, rank="0"), ["rank='0' is not in 0..0"]),
    "an accelerator": (
        lambda: UpdateLoader(DATA, PLAN, rank=CPU()),
        ["rank=an Accelerator", "process_index"],
    ),
    "workers in quotes": (lambda: UpdateLoader(DATA, PLAN, num_workers="4"), ["num_workers='4'"]),
    "less than none": (lambda: UpdateLoader(DATA, PLAN, num_workers=-1), ["num_workers=-1"]),
    "a mapping": (
        lambda: UpdateLoader(DATA, PLAN, growth={3: 16}),
        ["growth={3: 16}", "(30, 512)"],
    ),
    "a number": (lambda: UpdateLoader(DATA, PLAN, growth=16), ["growth=16: give pairs"]),
    "texts": (lambda: UpdateLoader(DATA, PLAN, growth=[("3", 16)]), ["give pairs of an epoch"]),
    "no function": (lambda: UpdateLoader(DATA, PLAN, collate_fn=True), ["collate_fn=True can't"]),
    "a name": (lambda: UpdateLoader(DATA, PLAN, transform="flip"), ["transform='flip' can't"]),
    "a seed": (lambda: UpdateLoader(DATA, PLAN, seed=0.5), ["seed=0.5"]),
    "a large list": (lambda: UpdateLoader(DATA, list(range(10**5))), ["a list"]),
}


def test_whole_numbers_of_numpy_are_whole_numbers():
    number = np.int64
    loader = UpdateLoader(DATA, PLAN, rank=number(0), num_workers=number(0), seed=number(1))
    assert next(iter(loader)).num_samples == PLAN.global_batch_size


@pytest.mark.parametrize("case", LOADERS)
def test_a_loader_of_other_parts_is_one_sentence(case):
    build, words = LOADERS[case]
    with refused(*words):
        build()


@pytest.mark.parametrize("thing", [lambda: prepared()[0], lambda: prepared()[3]])
@pytest.mark.parametrize("state", [{}, {"epoch": 3}, None, 7])
def test_a_state_of_something_else_is_one_sentence(thing, state):
    with refused("load_state_dict()", "state_dict()"):
        thing().load_state_dict(state)
