"""`--teacher`: exact over partitions, ranks and retries; whose answers; and what is refused."""

from __future__ import annotations

import io
import json
import random
import shutil
from contextlib import nullcontext, redirect_stderr
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from judging import CLASSES, make_photos, photos_and_run, run_on
from recipes import settings_of
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from lbaccel import BatchPlan, InputError, LargeBatch, train
from lbaccel.batch.plan import MicroBatch
from lbaccel.cli import main
from lbaccel.data.loader import Update
from lbaccel.recipe import auto_plan
from lbaccel.recipe.accelerator import make_accelerator
from lbaccel.recipe.exported import _usual_names, imagenet_ids
from lbaccel.recipe.loss import HITS, Distillation, loss_of
from lbaccel.recipe.task import build_task, large_batch_of
from lbaccel.recipe.teacher import Teacher, check_answers, conversion, digest_of_weights
from lbaccel.recipe.trained_model import read_trained
from lbaccel.update.accumulation import accumulate

COUNT, C, ALPHA, T = 23, 5, 0.3, 4.0
WEIGHTS = torch.tensor([0.1, 3.0, 1.0, 7.5, 0.02], dtype=torch.float64)
KINDS = ["hard", "smooth", "soft"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# -- the loss --------------------------------------------------------------------------------------


def samples(kind):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(COUNT, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(C, (COUNT,), generator=generator)
    if kind == "soft":
        y = torch.rand(COUNT, C, generator=generator, dtype=torch.float64).softmax(1)
    return x, y


def network(seed):
    torch.manual_seed(seed)
    return nn.Linear(6, C).double()


def smoothing_of(kind):
    return 0.1 if kind == "smooth" else 0.0


def teacher_of(model):
    model = model.eval().requires_grad_(False)
    return Teacher(model, None, None, nullcontext, "")


def loss_fn_of(kind, weights, teacher=None):
    return loss_of(
        "ce",
        dtype=torch.float64,
        memory_format="contiguous",
        label_smoothing=smoothing_of(kind),
        class_weights=weights,
        distillation=Distillation(teacher or teacher_of(network(1)), ALPHA, T),
    )


def truth(kind, weights):
    """The whole batch at once, in formulas: loss and gradients."""
    model, (x, y), v = network(0), samples(kind), network(1)(samples(kind)[0]).detach()
    z = model(x)
    hard = F.cross_entropy(z, y, weight=weights, label_smoothing=smoothing_of(kind))
    p, q = (v / T).softmax(1), (z / T).softmax(1)
    apart = T**2 * (p * (p.log() - q.log())).sum(1)
    if weights is None:
        soft = apart.sum() / COUNT
    elif kind == "soft":
        soft = ((y * weights).sum(1) * apart).sum() / COUNT
    else:
        soft = (weights[y] * apart).sum() / weights[y].sum()
    loss = (1 - ALPHA) * hard + ALPHA * soft
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def error(loss, gradients, expected):
    gap = (gradients - expected[1]).norm() / expected[1].norm()
    return max(abs(loss / expected[0] - 1), gap.item())


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_partitions_give_the_loss_and_the_gradient_of_the_whole_batch(kind, weights):
    expected, draw = truth(kind, weights), random.Random(0)
    for _ in range(20):
        cuts = sorted(draw.sample(range(1, COUNT), draw.randint(1, COUNT - 1)))
        edges = [0, *cuts, COUNT]
        (x, y), model = samples(kind), network(0)
        parts = [(MicroBatch(a, (b - a,)), (x[a:b], y[a:b])) for a, b in pairwise(edges)]
        sums = accumulate(model, parts, loss_fn_of(kind, weights), num_samples=COUNT)
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        gradients = gradients * (COUNT / sums.weight)
        assert error((sums.loss / sums.weight).item(), gradients, expected) < 1e-12


def updated(rank, kind, weights, teacher=None, micro=3):
    """One update through LargeBatch: its distance from the whole batch, its sums and retries."""
    accelerator = Accelerator(cpu=True)
    world = accelerator.num_processes
    plan = BatchPlan(global_batch_size=COUNT, micro_batch_size=micro, world_size=world)
    (x, y), model = samples(kind), network(0)

    def cut(size):
        for m in replace(plan, micro_batch_size=size).partition(rank):
            yield m, (x[m.start : m.start + m.num_samples], y[m.start : m.start + m.num_samples])

    update = Update(0, COUNT, cut(micro), cut)
    start = [p.detach().clone() for p in model.parameters()]
    large_batch = LargeBatch(accelerator, plan)
    bare, optimizer = model, torch.optim.SGD(model.parameters(), lr=1.0)
    large_batch.prepare(model, optimizer, [update])
    result = large_batch.update(update, loss_fn_of(kind, weights, teacher))
    moved = zip(start, bare.parameters(), strict=True)
    gradients = torch.cat([(a - b.detach()).flatten() for a, b in moved])
    expected = truth(kind, weights)
    return error(result.loss, gradients, expected), dict(result.sums), result.num_retries


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_with_class_weights_give_the_whole_batch_and_count_each_hit_once(kind):
    found = forks.values(forks.run_forked(updated, kind, WEIGHTS, world_size=2))
    assert max(gap for gap, _, _ in found) < 1e-12
    x, y = samples(kind)
    hits = {} if kind == "soft" else {HITS: (network(0)(x).argmax(1) == y).sum().item()}
    assert [sums for _, sums, _ in found] == [hits, hits]


class RunsOutOnce(nn.Module):
    """A teacher whose forward runs out of memory at the first micro-batch of more than 3."""

    def __init__(self):
        super().__init__()
        self.inner, self.left = network(1), 1

    def forward(self, x):
        if self.left and len(x) > 3:
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.inner(x)


def test_a_teacher_that_runs_out_of_memory_costs_a_retry_and_no_digit():
    gap, _, retries = updated(0, "hard", WEIGHTS, teacher_of(RunsOutOnce()), micro=8)
    assert retries == 1 and gap < 1e-12


def test_at_alpha_one_the_labels_have_no_part():
    loss_fn = loss_of(
        "ce",
        dtype=torch.float64,
        memory_format="contiguous",
        label_smoothing=0.0,
        distillation=Distillation(teacher_of(network(1)), 1.0, T),
    )
    (x, y), model = samples("hard"), network(0)
    losses = [loss_fn(model, (x, labels))[0] for labels in (y, (y + 1) % C)]
    assert losses[0].item() == losses[1].item() > 0
    model.load_state_dict(network(1).state_dict())
    assert loss_fn(model, (x, y))[0].item() == pytest.approx(0.0, abs=1e-14)


# -- the teacher -----------------------------------------------------------------------------------


def test_images_that_are_normalised_for_the_student_reach_the_teacher_as_it_was_trained():
    ours = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    theirs = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    pixels = torch.rand(4, 3, 6, 6, dtype=torch.float64)

    def normal(pre):
        m, d = (torch.tensor(pre[k], dtype=torch.float64).view(1, 3, 1, 1) for k in pre)
        return (pixels - m) / d

    scale, shift = conversion(ours, theirs)
    seen = []
    teacher = Teacher(nn.Identity(), scale, shift, nullcontext, "")
    seen = teacher(normal(ours))
    torch.testing.assert_close(seen, normal(theirs), rtol=1e-13, atol=1e-13)
    assert conversion(ours, dict(ours)) == (None, None)


def test_it_answers_without_a_gradient_in_evaluation_mode_under_the_context_of_the_run():
    entered = []

    class Context:
        def __enter__(self):
            entered.append(torch.is_grad_enabled())

        def __exit__(self, *_):
            entered.append("out")

    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5)).eval()
    before = model[0].running_mean.clone()
    teacher = Teacher(model, None, None, Context, "")
    x = torch.randn(4, 1, 2, 2, requires_grad=True)
    first, second = teacher(x), teacher(x)
    assert torch.equal(first, second) and not first.requires_grad
    assert torch.equal(model[0].running_mean, before) and entered == [False, "out"] * 2


def in_precision(rank, data, teacher, precision):
    """The dtypes that the teacher's convolution gives, and its answers have, in such a run."""
    flags = ["--data", f"folder:{data}", "--model", "lbaccel_tiny", "--img-size", "8"]
    settings = settings_of(*flags, "--workers", "0", "--teacher", teacher, "--precision", precision)
    accelerator, precision = make_accelerator(precision)
    task = build_task(settings, accelerator, precision, say=lambda _: None)
    seen = []
    task.teacher.model.conv.register_forward_hook(lambda _, __, out: seen.append(str(out.dtype)))
    answers = task.teacher(torch.zeros(2, 3, 8, 8, dtype=task.dtype))
    return [*seen, str(answers.dtype)]


@pytest.mark.parametrize(
    ("precision", "inside", "outside"),
    [
        ("bf16", "torch.bfloat16", "torch.float32"),
        ("fp32", "torch.float32", "torch.float32"),
        ("fp64", "torch.float64", "torch.float64"),
    ],
)
def test_the_teacher_runs_in_the_precision_of_the_run(precision, inside, outside, photos):
    data, teacher = map(str, photos)
    (found,) = forks.values(forks.run_forked(in_precision, data, teacher, precision))
    assert found == [inside, outside]


def test_a_model_of_the_hub_goes_with_images_in_folders_of_imagenets_identifiers():
    model = timm.create_model("test_resnet", num_classes=1000)
    words = _usual_names(model)
    ids = imagenet_ids(model, words)
    assert words[0] == "tench" and (len(ids), ids[0]) == (1000, "n01440764")
    assert imagenet_ids(model, ["own", *words[1:]]) is None  # names of somebody's own training
    assert imagenet_ids(timm.create_model("test_resnet", num_classes=10), []) is None
    pre = {"num_channels": 3, "img_size": 160, "num_classes": 1000}
    trained = SimpleNamespace(
        model=model, classes=tuple(words), num_named=1000, preprocessing=pre, path="hf-hub:x"
    )
    check_answers(trained, classes=tuple(ids), preprocessing=pre)
    with pytest.raises(InputError, match="output 0 is 'tench' there and 'n01443537' here"):
        check_answers(trained, classes=(ids[1], ids[0], *ids[2:]), preprocessing=pre)


def taught(data, teacher, *flags, output="taught"):
    return run_on(data, "--teacher", str(teacher), *flags, output=output)


def lines(folder, key="train/loss"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


@pytest.fixture(scope="module")
def photos():
    return photos_and_run()


def reference_of(data, teacher, *flags):
    """The first update of such a run in float64: LargeBatch beside one plain batch of torch."""
    settings = settings_of(
        *("--data", f"folder:{data}", "--model", "lbaccel_tiny", "--seed", "1"),
        *("--global-batch-size", "12", "--norm-batch-size", "12", "--micro-batch-size", "12"),
        *("--img-size", "8", "--workers", "0", "--precision", "fp64", "--log-with", "run_folder"),
        *("--teacher", teacher, *flags),
    )
    accelerator = Accelerator(cpu=True)
    task = build_task(settings, accelerator, "fp64", say=lambda _: None)
    ((_, (images, labels)),) = list(task.loader.peek())
    trained = read_trained(teacher)
    plain = type(task.model)(num_classes=len(CLASSES)).double()
    plain.load_state_dict(task.model.state_dict())

    def normal(pre):
        return (torch.tensor(pre[k], dtype=torch.float64).view(1, 3, 1, 1) for k in ("mean", "std"))

    (m, d), (m_, d_) = normal(task.preprocessing), normal(trained.preprocessing)
    images = images.double()
    with torch.no_grad():
        v = trained.model.double()((images * d + m - m_) / d_)
    z = plain.train()(images)
    p, q = (v / 3).softmax(1), (z / 3).softmax(1)
    hard = F.cross_entropy(z, labels, label_smoothing=0.0 if labels.is_floating_point() else 0.1)
    loss = 0.6 * hard + 0.4 * 9 * (p * (p.log() - q.log())).sum(1).mean()
    loss.backward()
    return settings, accelerator, task, loss.item(), dict(plain.named_parameters())


@pytest.mark.parametrize("mix", [(), ("--mixup", "0.4")], ids=["labels", "mixup"])
def test_the_update_of_the_recipe_is_that_of_a_plain_loop_on_the_very_images(photos, mix):
    data, teacher = photos
    flags = ("--distill-alpha", "0.4", "--distill-temperature", "3", "--label-smoothing", "0.1")
    found = reference_of(
        data, str(teacher), *flags, *mix, "--mean", "0.4", "0.5", "0.6", "--std", "0.3", "0.2", "1"
    )
    settings, accelerator, task, loss, parameters = found
    optimizer = torch.optim.SGD(task.model.parameters(), lr=1.0)
    start = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    large_batch = large_batch_of(settings, accelerator, task)
    _, _, loader = large_batch.prepare(task.model, optimizer, task.loader)
    result = large_batch.update(next(iter(loader)), task.loss_fn)
    assert result.loss == pytest.approx(loss, rel=1e-12)
    moved = torch.cat([(start[n] - p).flatten() for n, p in task.model.named_parameters()])
    truth = torch.cat([parameters[n].grad.flatten() for n in start])
    assert ((moved - truth).norm() / truth.norm()).item() < 1e-12


def test_a_taught_run_depends_on_no_micro_batch_and_logs_its_hits(photos):
    data, teacher = photos
    flags = ("--precision", "fp64", "--max-updates", "5")
    whole, cut = (
        taught(data, teacher, *flags, "--micro-batch-size", size, output=f"by{size}")
        for size in ("12", "6")
    )
    for key in ("train/loss", "train/top1"):
        assert [row[key] for row in lines(cut)] == pytest.approx(
            [row[key] for row in lines(whole)], rel=1e-12
        )
    one, two = (load_file(f / "checkpoints/last/model.safetensors") for f in (whole, cut))
    assert all(torch.allclose(one[k], two[k], rtol=1e-9, atol=1e-12) for k in one)
    alone = run_on(data, *flags, "--micro-batch-size", "12", output="alone")
    assert lines(alone)[0]["train/top1"] == lines(whole)[0]["train/top1"]  # the same first weights
    assert lines(alone)[0]["train/loss"] != lines(whole)[0]["train/loss"]


def on_ranks(rank, data, teacher):
    """One rank of a taught run in float64."""
    run_on(data, "--precision", "fp64", "--max-updates", "4", "--teacher", teacher, output="ranks")


def test_two_ranks_of_a_taught_run_end_where_one_does(photos):
    data, teacher = map(str, photos)
    forks.values(forks.run_forked(on_ranks, data, teacher, world_size=2))
    (two,) = Path("ranks").iterdir()
    one = taught(data, teacher, "--precision", "fp64", "--max-updates", "4")
    weights = [load_file(f / "checkpoints/last/model.safetensors") for f in (one, two)]
    assert all(torch.allclose(*(w[k] for w in weights), rtol=1e-9, atol=1e-12) for k in weights[0])
    for key in ("train/loss", "train/top1"):
        assert [row[key] for row in lines(two)] == pytest.approx(
            [row[key] for row in lines(one)], rel=1e-10
        )


def test_ranks_whose_teachers_differ_are_refused(photos):
    data, teacher = map(str, photos)
    other = str(run_on(data, "--seed", "9", output="another"))
    outcomes = forks.run_forked(on_other_ranks, data, [teacher, other], world_size=2)
    found = forks.values(outcomes)
    assert [code for code, _ in found] == [2, 2]
    told = found[0][1]  # rank 0 speaks for all
    assert "the ranks were not started alike" in told and "weights of --teacher is" in told
    found = forks.values(forks.run_forked(on_other_ranks, data, [teacher, "none"], world_size=2))
    assert [code for code, _ in found] == [2, 2] and "--teacher is true on rank 0" in found[0][1]
    wrong = str(run_on(make_photos("two", classes=("a", "b")), output="of_two"))
    found = forks.values(forks.run_forked(on_other_ranks, data, [teacher, wrong], world_size=2))
    assert [code for code, _ in found] == [2, 2] and "has 2 classes, 'a', 'b'" in found[0][1]


def on_other_ranks(rank, data, teachers):
    told = io.StringIO()
    given = ["--data", f"folder:{data}", "--model", "lbaccel_tiny", "--img-size", "8"]
    given += ["--global-batch-size", "12", "--norm-batch-size", "6", "--workers", "0"]
    with redirect_stderr(told):
        code = train.main([*given, "--teacher", teachers[rank], "--output", "ranks"])
    return code, told.getvalue()


def test_an_automatic_micro_batch_counts_the_teacher(photos, monkeypatch, capsys):
    data, teacher = photos
    found, plain = [], auto_plan.plan

    def plan(*args, **options):
        found.append(plain(*args, **options))
        return found[-1]

    monkeypatch.setattr(auto_plan, "plan", plan)
    taught(data, teacher, "--micro-batch-size", "auto", "--max-updates", "1")
    (one,) = found
    trained = read_trained(teacher).model
    own = sum(t.nbytes for t in (*trained.parameters(), *trained.buffers()))
    assert round(one.breakdown["teacher"] * 2**30) == own


# -- the contract ----------------------------------------------------------------------------------


def test_a_run_its_checkpoint_and_its_export_are_one_teacher(photos):
    _, teacher = photos
    assert main(["export", str(teacher), "--to", "exported"]) == 0
    places = (teacher, teacher / "checkpoints" / "best", "exported")
    assert len({digest_of_weights(read_trained(place)) for place in places}) == 1
    assert digest_of_weights(read_trained(teacher, ema=True)) != digest_of_weights(
        read_trained(teacher)
    )


def test_a_resume_takes_the_same_teacher_anywhere_and_no_other_weights(photos, capsys):
    data, teacher = photos
    shutil.copytree(teacher, "teacher", symlinks=True)
    truth = taught(data, "teacher", output="whole")
    folder = taught(data, "teacher", "--max-updates", "4", output="begun")
    contract = json.loads((folder / "checkpoints/last/contract.json").read_text())
    assert contract["teacher_weights"] == digest_of_weights(read_trained(teacher))
    assert main(["export", "teacher", "--to", "exported"]) == 0

    shutil.copytree(folder, "other", symlinks=True)
    shutil.move("teacher", "gone")
    resumed = ["train", "--resume", "other", "--max-updates", "100"]
    assert main(resumed) == 2
    assert "--teacher: teacher does not exist" in capsys.readouterr().err
    other = run_on(data, "--seed", "9", output="another")
    assert main([*resumed, "--teacher", str(other)]) == 2
    assert "has other weights than when the run began" in capsys.readouterr().err
    assert main([*resumed, "--teacher", "none"]) == 2
    assert "this setting decides its result" in capsys.readouterr().err
    assert main([*resumed, "--distill-alpha", "0.9"]) == 2

    assert main([*resumed, "--teacher", "exported"]) == 0
    found, expected = (
        load_file(f"{place}/checkpoints/last/model.safetensors") for place in ("other", truth)
    )
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert yaml.safe_load(Path("other/config.yaml").read_text())["teacher"] == "exported"

    allowed = ["train", "--resume", str(folder), "--max-updates", "100"]
    assert main([*allowed, "--teacher", str(other), "--allow-changed", "teacher"]) == 0
    changed = load_file(f"{folder}/checkpoints/last/model.safetensors")
    assert any(not torch.equal(changed[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--teacher nowhere", "--teacher: nowhere does not exist. Give a run folder"),
        ("--teacher RUN --loss bce", "--loss bce does not read --teacher"),
        ("--distill-alpha 0.5", "this recipe does not read --distill-alpha 0.5. Use --teacher"),
        ("--distill-temperature 2", "does not read --distill-temperature 2. Use --teacher"),
        ("--teacher RUN --distill-alpha 0", "--distill-alpha='0' is not a number above 0"),
        ("--teacher RUN --distill-temperature 0", "is not a number above 0 and at most 100"),
        ("--teacher RUN --distill-temperature 1000", "is not a number above 0 and at most 100"),
        ("--teacher RUN --img-size 16", "takes images of 8 px, and this run trains on 16 px"),
        ("--teacher RUN --num-classes 7", "has 3 outputs, and the network that is trained has 7"),
    ],
)
def test_a_teacher_of_no_use_is_refused(flags, says, photos, capsys):
    data, teacher = photos
    given = [str(teacher) if word == "RUN" else word for word in flags.split()]
    fixed = ["--data", f"folder:{data}", "--model", "lbaccel_tiny", "--output", "runs"]
    assert train.main([*fixed, "--img-size", "8", "--workers", "0", *given]) == 2
    assert says in capsys.readouterr().err


def test_other_classes_or_another_order_are_refused_with_both_lists_shortened(photos, capsys):
    _, teacher = photos
    named = ("ant", *CLASSES[1:], "ibis", "jay", "kite", "lion", "mole")
    data = make_photos("others", classes=named, train=2, val=1)
    given = ["--data", f"folder:{data}", "--model", "lbaccel_tiny", "--img-size", "8"]
    assert train.main([*given, "--workers", "0", "--teacher", str(teacher)]) == 2
    told = capsys.readouterr().err
    assert "has 3 classes, 'cat', 'dog', '猫 $x', and the data have 8, 'ant', 'dog', 'ibis'" in told
    assert "and 3 more" in told and "output 0 is 'cat' there and 'ant' here" in told

    trained = read_trained(teacher)
    pre = {**trained.preprocessing}
    check_answers(trained, classes=CLASSES, preprocessing=pre)
    with pytest.raises(InputError, match="output 0 is 'cat' there and 'dog' here"):
        check_answers(trained, classes=(CLASSES[1], CLASSES[0], CLASSES[2]), preprocessing=pre)
    with pytest.raises(InputError, match="takes images of 3 channels, and this run trains on 1"):
        check_answers(trained, classes=CLASSES, preprocessing=pre | {"num_channels": 1})
