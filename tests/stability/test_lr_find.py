"""The range test: what it measures, by formulas, and that it leaves no trace."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.utils.data import TensorDataset
from updates import cross_entropy
from whole_state import whole_state

from lbaccel import (
    BatchPlan,
    InputError,
    LargeBatch,
    LrRange,
    RunFailed,
    UpdateLoader,
    cli,
    largest_curvature,
    lr_find,
    train,
)
from lbaccel.errors import Diverged
from lbaccel.optim.scheduler import lr_scheduler
from lbaccel.stability.range_text import in_words


def make_network():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


def make_data(count=22):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def prepare(model, data, *, micro=4, norm=None, optimizer=None, count=8, scheduler=None, ema=None):
    plan = BatchPlan(global_batch_size=count, micro_batch_size=micro, norm_batch_size=norm)
    large_batch = LargeBatch(Accelerator(cpu=True), plan)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    loader = UpdateLoader(TensorDataset(*data), plan)
    prepared = large_batch.prepare(model, optimizer, loader, scheduler, ema=ema)
    return (large_batch, *prepared)


class Parabola(nn.Module):
    """The loss L w^2 / 2 of one weight, whatever the sample."""

    def __init__(self, curvature):
        super().__init__()
        self.curvature = curvature
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return 0.5 * self.curvature * self.w**2 + 0.0 * x.mean()


def on_a_parabola(*, momentum=0.0, num_updates=25, max_lr=100.0, **options):
    model = Parabola(4.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    data = (torch.ones(8, 1, dtype=torch.float64),)
    large_batch, _, _, loader = prepare(model, data, optimizer=optimizer, count=4, micro=3)
    return lr_find(
        large_batch,
        loader,
        lambda model, batch: model(batch[0]),
        min_lr=1e-3,
        max_lr=max_lr,
        num_updates=num_updates,
        **options,
    )


def test_on_a_parabola_losses_and_rates_are_the_closed_form():
    found = on_a_parabola()
    w, truth, lrs = 1.0, [2.0], []
    for u in range(24):
        lr = 1e-3 * (100 / 1e-3) ** (u / 23)
        w *= 1 - lr * 4.0
        truth.append(2.0 * w * w)
        lrs.append(lr)
    n = len(found.losses)
    assert found.start_loss == 2.0
    assert found.losses == pytest.approx(truth[1 : n + 1], rel=1e-12)
    assert found.lrs == pytest.approx(lrs[:n], rel=1e-12)
    # and the smoothed loss: s_u = sum_i 0.5^i l_(u-i) / sum_i 0.5^i
    for u in range(n):
        past = truth[u + 1 :: -1]
        weights = [0.5**i for i in range(len(past))]
        mean = sum(a * b for a, b in zip(weights, past, strict=True)) / sum(weights)
        assert found.smoothed[u] == pytest.approx(mean, rel=1e-12)


def test_it_ends_at_the_first_loss_above_four_times_the_best():
    found = on_a_parabola()
    assert found.ended == "diverged" and found.diverged_at == found.lrs[-1]
    for u in range(len(found.losses)):
        best = min((found.start_loss, *found.smoothed[: u + 1]))
        assert (found.losses[u] > 4 * best) == (u == len(found.losses) - 1)


@pytest.mark.parametrize("curvature", [0.5, 4.0, 30.0])
def test_with_noisy_gradients_the_largest_rate_is_near_the_stable_one(curvature):
    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(64, 1, generator=generator, dtype=torch.float64),)
    model = Parabola(curvature)
    with torch.no_grad():
        model.w.fill_(5.0)
    large_batch, _, _, loader = prepare(model, data, count=16)
    found = lr_find(
        large_batch,
        loader,
        lambda model, batch: 0.5 * curvature * (model.w - batch[0]).square().mean(),
        min_lr=1e-4,
        max_lr=100.0,
        num_updates=60,
    )
    stable = 2 / curvature
    assert found.ended == "diverged" and stable < found.diverged_at < 20 * stable
    assert stable / 5 < found.largest_lr < 2 * stable
    assert found.safe_lr == found.largest_lr / 4 < stable
    assert found.suggested_lr == min(found.steepest_lr, found.safe_lr)
    before = (found.start_loss, *found.smoothed)
    falls = [b - a for a, b in zip(found.smoothed, before, strict=False)]
    assert found.steepest_lr == found.lrs[falls.index(max(falls))]


def test_a_loss_that_falls_back_after_it_rose_is_not_steep():
    """Measured on CIFAR-10: 4.9 fell to 3.6 far above the rate at which training lost ground."""
    losses = (2.3, 2.1, 2.0, 4.9, 3.6, 37.0)
    found = LrRange((0.1, 0.2, 0.4, 0.8, 1.6, 3.2), losses, losses, 2.36, "diverged", 3.2, 8)
    assert (found.steepest_lr, found.largest_lr, found.suggested_lr) == (0.2, 0.4, 0.1)


def test_a_fall_within_the_noise_suggests_nothing_and_says_both_numbers():
    noise = torch.randn(30, generator=torch.Generator().manual_seed(0)).tolist()
    lrs = tuple(0.001 * 1.2**i for i in range(30))
    for fall, is_noise in ((0.0, True), (0.05, True), (1.0, False)):
        losses = [2.3 + 0.1 * n - fall * i / 29 for i, n in enumerate(noise)]
        smoothed, last = [], 2.3
        for loss in losses:
            last = 0.5 * last + 0.5 * loss
            smoothed.append(last)
        found = LrRange(lrs, tuple(losses), tuple(smoothed), 2.3, "max_lr", None, 8)
        assert found.noise == pytest.approx(0.1, rel=0.5)
        assert (found.suggested_lr is None) == is_noise
        text = "\n".join(in_words(found, own_lr=0.1, base_lr=0.1))
        assert ("no rate can be read off this curve" in text) == is_noise
        assert (f"{found.noise:.3g}" in text) == is_noise


def test_a_smooth_course_has_no_noise():
    found = on_a_parabola(max_lr=0.01)
    assert found.noise < 0.05 * found.fall and found.suggested_lr is not None


def test_without_divergence_it_ends_at_the_last_rate_and_says_that_the_loss_still_fell():
    found = on_a_parabola(max_lr=0.01)
    assert (found.ended, found.diverged_at, len(found.lrs)) == ("max_lr", None, 24)
    assert found.largest_lr == found.lrs[-1] == pytest.approx(0.01)
    assert any("higher --max-lr" in line for line in in_words(found, own_lr=0.1, base_lr=0.1))


def test_a_loss_that_only_rises_suggests_nothing():
    model, data = Parabola(4.0), (torch.ones(8, 1, dtype=torch.float64),)
    large_batch, _, _, loader = prepare(model, data, count=4)
    found = lr_find(
        large_batch, loader, lambda model, batch: model(batch[0]), min_lr=1.0, max_lr=10.0
    )
    assert found.steepest_lr is found.largest_lr is found.suggested_lr is None
    assert any("never fell" in line for line in in_words(found, own_lr=0.1, base_lr=0.1))


def test_a_negative_loss_diverges_by_the_same_distance():
    model, data = Parabola(4.0), (torch.ones(8, 1, dtype=torch.float64),)
    large_batch, _, _, loader = prepare(model, data, count=4)
    found = lr_find(
        large_batch, loader, lambda model, batch: model(batch[0]) - 5, min_lr=0.01, max_lr=100.0
    )
    assert found.ended == "diverged" and found.losses[-1] > min(found.smoothed) + 3 * 4.9
    assert len(found.losses) > 5 and all(loss < 0 for loss in found.losses[:5])


def test_the_micro_batch_does_not_change_the_result():
    results = []
    for micro in (2, 8):
        large_batch, _, _, loader = prepare(make_network(), make_data(), micro=micro, norm=2)
        results.append(
            lr_find(large_batch, loader, cross_entropy, min_lr=1e-3, max_lr=1.0, num_updates=8)
        )
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-9)
    assert results[0].global_batch_size == 8


def test_groups_keep_their_ratios_also_where_a_warmup_starts_at_zero():
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            if not self.param_groups[0]["params"][0].is_meta:  # a copy tells its memory so
                rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    model = make_network()
    optimizer = Watched(
        [{"params": model[0].parameters()}, {"params": model[4].parameters(), "lr": 0.5}], lr=0.05
    )
    scheduler = lr_scheduler(optimizer, lambda samples: samples / 100, samples_per_update=8)
    assert optimizer.param_groups[1]["lr"] == 0.0
    large_batch, _, _, loader, _ = prepare(
        model, make_data(), norm=2, optimizer=optimizer, scheduler=scheduler
    )
    found = lr_find(large_batch, loader, cross_entropy, min_lr=1e-3, max_lr=1e-1, num_updates=6)
    assert [head for _, head in rates[:5]] == pytest.approx(found.lrs)
    assert all(rest == pytest.approx(head / 10) for rest, head in rates)
    assert optimizer.param_groups[1]["lr"] == 0.0


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def in_the_middle_of_training(kind, *, num_updates=4):
    """A run with state everywhere: momentum, statistics, scheduler, average, loader."""
    model = make_network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler = lr_scheduler(optimizer, lambda samples: 1 / (1 + samples), samples_per_update=8)
    ema = ModelEmaV3(model, decay=0.9)
    large_batch, _, optimizer, loader, _ = prepare(
        model, make_data(), norm=2, optimizer=optimizer, scheduler=scheduler, ema=ema
    )
    for _ in range(-(-num_updates // len(loader))):
        for update in loader:
            large_batch.update(update, cross_entropy)
            if large_batch.num_updates == num_updates:
                break
    return large_batch, model, optimizer, loader, scheduler, ema.module


class Trouble:
    """A loss function that does as told in its n-th call."""

    def __init__(self, error, call):
        self.error, self.call, self.calls = error, call, 0

    def __call__(self, model, micro_batch):
        self.calls += 1
        loss = cross_entropy(model, micro_batch)
        if self.calls == self.call and self.error is not None:
            raise self.error("as it happens")
        torch.rand(1)
        return loss


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("num_updates", [0, 4])
@pytest.mark.parametrize("ending", ["max_lr", "diverged", "error", "Ctrl-C", "in the step"])
def test_everything_is_as_it_was(kind, num_updates, ending):
    parts = in_the_middle_of_training(kind, num_updates=num_updates)
    large_batch, model, optimizer, loader = parts[:4]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = whole_state(*parts)
    weights = copy.deepcopy(model.state_dict())
    seen = []

    def after_update(done, loss, lr):
        torch.rand(1)  # a user's own draw, outside an update
        seen.append(not torch.equal(model.state_dict()["0.weight"], weights["0.weight"]))

    def run(loss_fn, max_lr=1.0, num_updates=9):
        return lr_find(
            large_batch,
            loader,
            loss_fn,
            min_lr=1e-3,
            max_lr=max_lr,
            num_updates=num_updates,
            after_update=after_update,
        )

    if ending == "max_lr":
        assert run(Trouble(None, 0)).ended == "max_lr"
    elif ending == "diverged":
        assert run(Trouble(None, 0), 1e8, 30).ended in ("diverged", "not finite")
    elif ending == "in the step":  # Ctrl-C with the weights written, and no statistic yet
        calls = [0]

        def interrupted(*_):
            calls[0] += 1
            if calls[0] == 3:
                raise KeyboardInterrupt

        hook = optimizer.optimizer.register_step_post_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(Trouble(None, 0))
        hook.remove()
    else:
        error = {"error": ZeroDivisionError, "Ctrl-C": KeyboardInterrupt}[ending]
        with pytest.raises(error):
            run(Trouble(error, 6))
    assert any(seen)  # updates were real
    assert whole_state(*parts) == before


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("num_updates", [0, 4])
def test_training_goes_on_to_the_bit_as_if_there_had_been_no_test(kind, num_updates):
    ends = []
    for tests in (False, True):
        parts = in_the_middle_of_training(kind, num_updates=num_updates)
        large_batch, _, _, loader = parts[:4]
        if tests:
            lr_find(large_batch, loader, cross_entropy, min_lr=1e-3, max_lr=1e3)
        for update in loader:
            large_batch.update(update, cross_entropy)
        ends.append(whole_state(*parts))
        for name in ("identity",):
            ends[-1].pop(name)
    assert ends[0] == ends[1]


def test_a_loader_that_is_half_way_through_an_epoch_goes_on_where_it_was():
    large_batch, _, _, loader = prepare(make_network(), make_data(), norm=2)
    indices = []
    for update in loader:
        indices.append(update.index)
        large_batch.update(update, cross_entropy)
        if update.index == 0:
            lr_find(large_batch, loader, cross_entropy, min_lr=1e-3, max_lr=1e-1, num_updates=7)
    assert indices == [0, 1, 2]


def test_memory_that_runs_out_in_the_test_leaves_the_plan_as_it_was():
    large_batch, _, _, loader = prepare(make_network(), make_data(), micro=8, norm=2)

    def loss_fn(model, micro_batch):
        if len(micro_batch[0]) > 4:
            raise MemoryError
        return cross_entropy(model, micro_batch)

    found = lr_find(large_batch, loader, loss_fn, min_lr=1e-3, max_lr=1e-1, num_updates=5)
    assert len(found.losses) == 4
    assert large_batch.plan.micro_batch_size == loader.plan.micro_batch_size == 8


def test_a_loss_that_is_not_finite_from_the_start_is_no_result():
    large_batch, _, _, loader = prepare(make_network(), make_data(), norm=2)
    with pytest.raises(Diverged, match="loss is nan"):
        lr_find(
            large_batch,
            loader,
            lambda model, batch: cross_entropy(model, batch) * math.nan,
            min_lr=1e-3,
            max_lr=1.0,
        )


def test_a_failure_that_is_no_divergence_is_not_taken_for_one():
    large_batch, _, _, loader = prepare(make_network(), make_data(), norm=2)
    calls = [0]

    def loss_fn(model, micro_batch):
        calls[0] += 1
        if calls[0] > 6:
            raise RunFailed("the disk is gone")
        return cross_entropy(model, micro_batch)

    with pytest.raises(RunFailed, match="disk"):
        lr_find(large_batch, loader, loss_fn, min_lr=1e-3, max_lr=1.0)


def test_where_no_rank_holds_all_weights_it_says_how_to_start_it():
    large_batch, _, _, loader = prepare(make_network(), make_data(), norm=2)
    large_batch._transaction.sharding = SimpleNamespace(
        half_stepped=False
    )  # DeepSpeed's and FSDP2's are others
    for trial in (
        lambda: lr_find(large_batch, loader, cross_entropy, min_lr=1e-3, max_lr=1.0),
        lambda: largest_curvature(large_batch, loader, cross_entropy),
    ):
        with pytest.raises(InputError, match="torchrun"):
            trial()


@pytest.mark.parametrize("options, words", [
    ({"min_lr": 1.0, "max_lr": 0.1}, "not below max_lr"),
    ({"min_lr": 0.0, "max_lr": 0.1}, "min_lr=0.0"),
    ({"min_lr": 0.1, "max_lr": math.inf}, "max_lr=inf"),
    ({"min_lr": 0.1, "max_lr": 1.0, "num_updates": 4}, "at least 5"),
])  # fmt: skip
def test_a_range_of_no_use_is_an_error(options, words):
    large_batch, _, _, loader = prepare(make_network(), make_data(), norm=2)
    with pytest.raises(InputError, match=words):
        lr_find(large_batch, loader, cross_entropy, **options)


# -- the command --------------------------------------------------------------------------------

RECIPE = ["--model", "lbaccel_tiny", "--data", "digits", "--global-batch-size", "256"]


@pytest.fixture
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    import tiny  # noqa: F401  registers lbaccel_tiny

    monkeypatch.chdir(tmp_path)


def command(*flags):
    return cli.main(["lr-find", *RECIPE, "--num-updates", "8", *map(str, flags)])


def test_the_command_starts_from_what_train_trains(in_a_folder_of_its_own, capsys):
    assert command("--json", "--seed", "3", "--drop-path", "0.2", "--mixup", "0.2") == 0
    found = json.loads(capsys.readouterr().out)
    assert not list(Path().iterdir())  # nothing was written
    flags = ["--max-updates", "1", "--log-with", "run_folder", "--seed", "3"]
    assert train.main([*RECIPE, *flags, "--drop-path", "0.2", "--mixup", "0.2"]) == 0
    (folder,) = Path("runs").iterdir()
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert found["start_loss"] == pytest.approx(first["train/loss"], rel=1e-6)
    assert found["own_lr"] == pytest.approx(0.1 * 256 / 256)
    assert found["lrs"][0] == pytest.approx(0.1 / 1000)


def test_the_command_prints_rates_in_words_and_draws_them(in_a_folder_of_its_own, capsys):
    assert command("--plot", "range.png", "--max-lr", 50, "--num-updates", 40) == 0
    said = capsys.readouterr().out
    for words in (
        "range test: 40 updates x 256 samples = 10240 samples",
        "steepest",
        "largest",
        "--base-lr",
        "recipe: lr 0.1 is",
        "suggested: lr",
        "Nesterov momentum 0.9",
        "range.png",
    ):
        assert words in said, words
    assert Path("range.png").read_bytes().startswith(b"\x89PNG")


def test_with_a_faster_head_the_suggested_base_rate_gives_the_head_the_rate_found(
    in_a_folder_of_its_own, capsys
):
    """Rates of the test are those of the fastest group: the recipe's 0.1 is 1 for its head."""
    flags = ["--model", "test_resnet", "--norm-batch-size", "16", "--head-lr-scale", "10"]
    assert command(*flags, "--json", "--min-lr", "0.01", "--max-lr", "10") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["own_lr"] == pytest.approx(1.0)
    assert "those of the parameters with the highest, 10 x lr" in captured.err
    flags = [*flags, "--curvature-samples", "0", "--min-lr", "0.01", "--max-lr", "10"]
    assert command(*flags) == 0
    said = capsys.readouterr().out
    assert f"--base-lr {found['suggested_lr'] / 10:.3g}" in said


def test_stability_in_json_is_the_limit_over_lambda_max(in_a_folder_of_its_own, capsys):
    assert command("--json", "--optimizer", "momentum", "--momentum", "0.8") == 0
    stability = json.loads(capsys.readouterr().out)["stability"]
    assert (stability["nesterov"], stability["limit"]) == (False, pytest.approx(2 * 1.8))
    assert stability["stable_rate"] == pytest.approx(3.6 / stability["lambda_max"])
    assert stability["num_samples"] == 256
    settled = stability["residual"] <= 0.05 * stability["lambda_max"]
    assert settled or stability["num_products"] == 20


def test_an_adaptive_optimizer_has_a_range_and_no_stable_rate(in_a_folder_of_its_own, capsys):
    assert command("--optimizer", "adamw", "--num-updates", 40) == 0
    said = capsys.readouterr().out
    assert "stable rate: known for SGD, not for adamw" in said and "suggested" in said


@pytest.mark.parametrize("flags, words", [
    (["--num-updates", "3"], "--num-updates='3' is not a whole number from 5"),
    (["--min-lr", "-1"], "--min-lr"),
    (["--min-lr", "9", "--max-lr", "1"], "not below"),
    (["--plot", "range.txt"], ".png"),
    (["--plot", "no/range.png"], "no folder no"),
    (["--min-lr", "1e-300", "--max-lr", "1e300"], "too far apart"),
    (["--glboal-batch-size", "9"], "--global-batch-size"),
    (["--resume", "runs/x"], "--checkpoint"),
    (["--curvature-samples", "-1"], "--curvature-samples='-1' is not a whole number from 0"),
])  # fmt: skip
def test_bad_input_gets_exit_code_2_and_what_to_type(flags, words, in_a_folder_of_its_own, capsys):
    assert command(*flags) == 2
    assert words in capsys.readouterr().err


def test_a_range_that_diverges_at_once_still_has_words_and_a_picture(tmp_path):
    from lbaccel.stability.range_text import plot, table

    found = LrRange((), (), (), 2.0, "not finite", 5.0, 8)
    assert "diverged at 5" in "\n".join(in_words(found, own_lr=0.1, base_lr=0.1))
    assert len(table(found)) == 2
    plot(found, tmp_path / "empty.png", own_lr=0.1, stable=None, title="nothing")
    assert (tmp_path / "empty.png").stat().st_size > 0
