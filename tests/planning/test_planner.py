"""`lbaccel.plan`: what it chooses, what it says, and that its figures hold together."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import lbaccel
from lbaccel import cli
from lbaccel.batch.plan import BatchPlan
from lbaccel.errors import InputError
from lbaccel.planning.candidates import Candidate
from lbaccel.planning.cost.chain import ChainCost
from lbaccel.planning.cost.devices import CARDS, CPU, find_device
from lbaccel.planning.cost.update import Network, image_batch
from lbaccel.planning.estimate import Estimator
from lbaccel.planning.planner import plan
from lbaccel.planning.search import PLATEAU, Pinned, Search

pytestmark = pytest.mark.usefixtures("shared_traces")

KEYS = {
    "fits",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "memory_format",
    "zero_stage",
    "offload",
    "predicted_peak_gib",
    "predicted_seconds_per_update",
    "breakdown",
    "levers",
    "alternatives",
    "lr",
}
PARTS = {
    "weights", "gradients", "optimizer", "activations", "workspace", "allocator", "context"
}  # fmt: skip
CONTRACT = {"img_size": 64, "global_batch_size": 256, "num_classes": 10}


def test_json_has_every_key_and_its_figures_add_up(capsys):
    flags = "--model resnet10t --img-size 64 --global-batch-size 256 --memory 2GiB --num-classes 10"
    assert cli.main(["plan", *flags.split(), "--device", "RTX 3060", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= KEYS and found["breakdown"].keys() == PARTS
    assert sum(found["breakdown"].values()) == pytest.approx(found["predicted_peak_gib"])
    assert found["fits"] and found["predicted_peak_gib"] <= 2
    assert found["micro_batch_size"] * found["gradient_accumulation_steps"] >= 256
    assert found["lr"] == 0.1  # 256 / 256, linear
    assert {a["world_size"] for a in found["alternatives"]} == {1, 2, 4, 8}
    for other in found["alternatives"]:
        assert other["gpu_hours"] == pytest.approx(other["hours"] * other["world_size"])
    for lever in found["levers"]:
        keys = {"name", "gib_saved", "time_pct", "changes_result", "verdict", "host_gib"}
        assert lever.keys() == keys
        assert lever["verdict"]


def test_weights_gradients_and_state_are_formulas():
    for name, copies in (("sgd", 1), ("adamw", 2)):
        found = plan("resnet10t", memory="4GiB", device="cpu", optimizer=name, **CONTRACT,
                     micro_batch_size=32, compare=False)  # fmt: skip
        with torch.device("meta"):
            model = timm.create_model("resnet10t", num_classes=10)
        parameters = sum(p.numel() for p in model.parameters()) * 4
        buffers = sum(b.nbytes for b in model.buffers())
        gib = 2**30
        assert found.breakdown["weights"] * gib == pytest.approx(parameters + buffers, abs=1)
        assert found.breakdown["gradients"] * gib == pytest.approx(parameters, abs=1)
        # AdamW counts its steps in one float a parameter
        state = copies * parameters
        assert found.breakdown["optimizer"] * gib == pytest.approx(state, abs=4096)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("resnet10t", "cpu"),
        ("resnet10t", "RTX 3060"),
        pytest.param("vit_tiny_patch16_224", "cpu", marks=pytest.mark.slow),
        pytest.param("vit_tiny_patch16_224", "RTX 3060", marks=pytest.mark.slow),
    ],
)
def test_less_memory_means_smaller_micro_batches_then_recompute_then_no(name, device):
    options = CONTRACT | {"img_size": 224 if "vit" in name else 64, "compare": False}
    generous = plan(name, memory="64GiB", device=device, **options)
    assert generous.fits and generous.activation_checkpointing == "none"
    unit = generous.batch.group_size
    tight = plan(
        name, memory="64GiB", device=device, micro_batch_size=unit,
        activation_checkpointing="none", **options,
    )  # fmt: skip
    below = int(tight.predicted_peak_gib * 2**30) - 1
    squeezed = plan(name, memory=below, device=device, **options)
    if squeezed.fits:
        assert squeezed.activation_checkpointing != "none"
        assert squeezed.predicted_seconds_per_update > tight.predicted_seconds_per_update
    assert squeezed.fits == (squeezed.predicted_peak_gib * 2**30 <= below)
    fixed = sum(squeezed.breakdown[k] for k in ("weights", "gradients", "optimizer", "context"))
    nothing = plan(name, memory=int(fixed * 2**30), device=device, **options)
    assert not nothing.fits and "whatever the batch" in nothing.why
    nearest = nothing.to_dict()["nearest"]
    assert nearest["memory_gib"] <= squeezed.predicted_peak_gib * 1.02
    # what it calls the nearest plan does fit in what it says it needs
    again = plan(name, memory=int(nearest["memory_gib"] * 2**30) + 2, device=device, **options)
    assert again.fits


def test_pins_are_kept():
    found = plan(
        "resnet10t", memory="8GiB", device="cpu", micro_batch_size=96,
        memory_format="channels_last", activation_checkpointing="full", compare=False, **CONTRACT,
    )  # fmt: skip
    assert (found.micro_batch_size, found.memory_format) == (96, "channels_last")
    assert found.activation_checkpointing == "full" and found.gradient_accumulation_steps == 3


def test_a_pinned_plan_that_does_not_fit_says_so_and_stays_the_plan():
    found = plan("resnet10t", memory="70MiB", device="cpu", micro_batch_size=256, compare=False,
                 activation_checkpointing="none", **CONTRACT)  # fmt: skip
    assert not found.fits and found.micro_batch_size == 256 and found.predicted_peak_gib > 0.07


def test_a_plan_under_zero_has_its_own_peak_and_its_levers_are_the_other_stages():
    given = {"memory": "4GiB", "device": "RTX 3060", "world_size": 4, **CONTRACT}
    given |= {"micro_batch_size": 32, "activation_checkpointing": "none"}
    plain = plan("resnet10t", **given)
    divided = plan("resnet10t", zero_stage=1, **given)
    assert (plain.zero_stage, divided.zero_stage, divided.offload) == (None, 1, "none")
    names = {lever.name.split(" (")[0]: lever for lever in divided.levers}
    assert {"without ZeRO", "ZeRO-2", "ZeRO-3"} <= names.keys() and "ZeRO-1" not in names
    assert (names["ZeRO-2"].gib_saved, names["ZeRO-2"].time_pct) == (0, 0)
    assert names["ZeRO-3"].time_pct > 0  # it communicates in every micro-step
    less = next(lever.gib_saved for lever in plain.levers if lever.name.startswith("ZeRO-1"))
    assert less == pytest.approx(plain.predicted_peak_gib - divided.predicted_peak_gib)
    assert names["without ZeRO"].gib_saved == pytest.approx(-less)
    assert divided.predicted_peak_gib == pytest.approx(sum(divided.breakdown.values()))


def test_a_stage_and_an_offload_that_do_not_go_together_are_no_plan():
    given = {"memory": "4GiB", "device": "cpu", **CONTRACT}
    with pytest.raises(
        InputError, match=r"zero_stage=1 with offload='optimizer'.*Use zero_stage=2"
    ):
        plan("resnet10t", zero_stage=1, offload="optimizer", **given)
    with pytest.raises(InputError, match="Give zero_stage=2"):
        plan("resnet10t", offload="optimizer", **given)


def test_the_contract_is_never_touched():
    found = plan("resnet10t", memory="300MiB", device="cpu", optimizer="adamw", compare=False,
                 norm_batch_size=16, precision="bf16", **CONTRACT)  # fmt: skip
    assert found.batch.global_batch_size == 256 and found.batch.norm_batch_size == 16
    assert (found.precision, found.optimizer) == ("bf16", "adamw")
    assert found.micro_batch_size % 16 == 0


def test_levers_that_change_the_result_are_listed_as_such_and_zero_needs_devices():
    one = plan("resnet10t", memory="4GiB", device="RTX 3060", **CONTRACT)
    changes = {lever.name: lever.changes_result for lever in one.levers}
    assert changes["bf16"] and changes["8-bit optimizer state"] and changes["frozen BatchNorm"]
    assert not any(v for k, v in changes.items() if "ZeRO" in k or "recompute" in k)
    zero = [lever for lever in one.levers if "ZeRO" in lever.name]
    assert len(zero) == 3 and all(lever.gib_saved <= 0 for lever in zero)
    assert all("nothing to divide" in lever.verdict for lever in zero)


class Tokens(nn.Module):
    """No image network, and no name of timm's."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(100, 32), nn.Linear(32, 100)

    def forward(self, ids):
        return self.head(self.embed(ids).mean(1))


def test_any_module_is_planned_and_left_as_it_is():
    model = Tokens()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    optimizer = torch.optim.AdamW(model.parameters())
    found = lbaccel.plan(
        model,
        global_batch_size=64,
        memory="1GiB",
        device="cpu",
        optimizer=optimizer,
        make_batch=lambda n: (
            torch.zeros(n, 7, dtype=torch.long),
            torch.zeros(n, dtype=torch.long),
        ),
        compare=False,
    )
    assert found.fits and found.optimizer == "AdamW" and not optimizer.state
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_alternatives_fit_too_though_more_devices_hold_ddps_buckets():
    asked = CONTRACT | {"global_batch_size": 512}
    options = {"device": "RTX 3060", "norm_batch_size": "frozen", "optimizer": "adamw"}
    asked |= {"img_size": 64}
    exact = plan(
        "resnet10t", memory="4GiB", micro_batch_size=100, compare=False, **options, **asked
    )
    found = plan("resnet10t", memory=int(exact.predicted_peak_gib * 2**30) + 1, **options, **asked)
    assert found.fits
    for other in found.alternatives:
        assert other.peak_gib <= found.budget_gib, other
        assert other.micro_batch_size <= found.micro_batch_size


def test_a_module_without_blocks_has_levers_and_a_nearest_plan_too():
    ids = {"make_batch": lambda n: (torch.zeros(n, 7).long(), torch.zeros(n).long())}
    contract = {"global_batch_size": 64, "device": "cpu", "img_size": None, **ids}
    found = lbaccel.plan(Tokens(), memory="1GiB", **contract)
    assert found.fits and found.levers
    assert not any("every block" in lever.name for lever in found.levers)
    assert not lbaccel.plan(Tokens(), memory=30_000, **contract).fits


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x):
        y = self.linear(self.conv(x).mean((2, 3)))
        return y if float(y.detach().sum()) > 0 else -y


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": "8"}, "Use a number above 0 and a unit, such as 8GiB"),
        ({"memory": "10MiB"}, "below the weights of resnet10t alone"),
        ({"device": "RTX 9999"}, "lbaccel calibrate"),
        ({"global_batch_size": 0}, "global_batch_size"),
        ({"norm_batch_size": 512}, "larger than global_batch_size=256"),
        ({"micro_batch_size": 33}, "no multiple of norm_batch_size=32"),
        ({"world_size": 300}, "8 groups of at most 32 samples, fewer than world_size=300"),
        ({"optimizer": "sgdd"}, "none of timm.optim"),
        ({"img_size": 0}, "img_size"),
    ],
)
def test_bad_input_is_refused_with_what_to_type(options, words):
    with pytest.raises(InputError) as raised:
        plan("resnet10t", **({"memory": "1GiB", "device": "cpu"} | CONTRACT | options))
    assert words in str(raised.value)


def test_a_model_that_reads_values_is_refused_by_the_operators_name_on_another_device():
    with pytest.raises(InputError, match=r"_local_scalar_dense.*on the device itself"):
        plan(Reads(), img_size=8, global_batch_size=8, memory="1GiB", device="RTX 3060")


def test_a_model_that_reads_values_is_measured_on_the_device_at_hand_and_left_as_it_is():
    model = Reads()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    side, batch = 64, 256
    contract = {"img_size": side, "global_batch_size": batch, "device": "cpu"}
    roomy = plan(model, memory="1GiB", **contract)
    assert roomy.fits and "micro-batches on cpu measured" in roomy.notes[0] and not roomy.levers
    fixed = sum(p.nbytes for p in model.parameters())
    image, features = 3 * side**2 * 4, 8 * side**2 * 4
    for memory in (8 * 2**20, 20 * 2**20):
        found = plan(model, memory=memory, **contract)
        peak, size = found.predicted_peak_gib * 2**30, found.micro_batch_size
        # weights, gradients, momentum; the images and what the convolution gives of each
        assert 3 * fixed + size * (image + features) <= peak <= memory and found.fits
        assert found.batch.global_batch_size == batch
    assert not plan(model, memory=100_000, **contract).fits
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_torchs_fused_step_is_taken_where_it_has_one():
    for optimizer, precision, device, fused in (
        ("sgd", "fp32", "cpu", True),
        ("adamw", "bf16", "RTX 3060", True),
        ("adamw", "fp16", "RTX 3060", False),
        ("lamb", "fp32", "cpu", False),
    ):
        found = plan("resnet10t", memory="4GiB", device=device, optimizer=optimizer,
                     precision=precision, micro_batch_size=32, memory_format="contiguous",
                     activation_checkpointing="none", compare=False, **CONTRACT)  # fmt: skip
        assert found.fused_optimizer is found.to_dict()["fused_optimizer"] is fused


@pytest.mark.slow
def test_tensor_cores_want_channels_last_for_convolutions_and_not_for_a_transformer():
    # timm's results of training on an RTX 3090 with AMP, images/s channels-last over contiguous:
    # resnet50 1.47, mobilenetv2_100 1.26, vit_base 1.00.
    def images_per_second(name, memory_format, **options):
        found = plan(name, global_batch_size=256, memory="96GiB", device="RTX 3090",
                     precision="bf16", micro_batch_size=256, memory_format=memory_format,
                     activation_checkpointing="none", compare=False, **options)  # fmt: skip
        return 256 / found.predicted_seconds_per_update

    for name, published in (("resnet50", 1.47), ("mobilenetv2_100", 1.26)):
        turned, plain = (
            images_per_second(name, layout, norm_batch_size=256)
            for layout in ("channels_last", "contiguous")
        )
        assert turned / plain == pytest.approx(published, rel=0.15)
    turned, plain = (
        images_per_second("vit_base_patch16_224", layout)
        for layout in ("channels_last", "contiguous")
    )
    assert turned / plain == pytest.approx(1.0, abs=0.02)


def test_the_command_prints_the_plan_and_ends_with_1_where_nothing_fits(capsys, tmp_path):
    flags = "--model resnet10t --img-size 64 --global-batch-size 256 --num-classes 10 --device cpu"
    picture = tmp_path / "sweep.png"
    code = cli.main(["plan", *flags.split(), "--memory", "1GiB", "--sweep", "--plot", str(picture)])
    out = capsys.readouterr().out
    assert code == 0 and "global batch 256" in out and "activations kept" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["plan", *flags.split(), "--memory", "60MiB"]) == 1
    assert "does not fit: one group of 32 samples" in capsys.readouterr().out
    assert cli.main(["plan", *flags.split(), "--plot", "x.png"]) == 2
    assert cli.main(["plan", *flags.split(), "--sweep", "--plot", str(tmp_path / "x.txt")]) == 2


# -- the parts ------------------------------------------------------------------------------------


def search_for(name, *, device, budget, batch=128, size=64, n=None, **pins):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    network = Network(model=model, make_batch=image_batch(3, size), optimizer=optimizer)
    contract = BatchPlan(global_batch_size=batch, micro_batch_size=n or 1, norm_batch_size=n)
    return Search(Estimator(network, contract, device, "fp32"), budget, Pinned(**pins))


@pytest.mark.slow
@pytest.mark.parametrize("device", [CPU, CARDS["RTX 3060"]])
def test_the_largest_micro_batch_that_fits_is_within_a_group_or_five_percent(device):
    search = search_for("resnet10t", device=device, budget=2**31, n=16, memory_format="contiguous")
    plain = {
        size: search.choice(Candidate(size)).estimate.peak for size in range(16, 129, 16)
    }  # every one, traced
    for budget in (plain[16], plain[48] + 1, plain[64] - 1, plain[128], 2**40):
        found = Search(search.estimator, budget, Pinned(memory_format="contiguous"))
        size = found._largest("contiguous", "none", 64)
        truth = max((s for s, peak in plain.items() if peak <= budget), default=None)
        assert size is not None and plain[size] <= budget
        assert size == truth or budget - plain[size] < 0.05 * budget


@pytest.mark.parametrize("device", [CPU, CARDS["RTX 3060"]])
def test_no_plan_is_slower_by_its_own_model_than_one_that_was_traced_and_fits(device, monkeypatch):
    search = search_for("resnet10t", device=device, budget=2**31, n=16)
    search.run()
    traced = [search.choice(candidate) for candidate in search.estimator.traced()]
    best = min((c for c in traced if c.fits), key=lambda c: c.seconds)
    slow = max((c for c in traced if c.fits), key=lambda c: c.seconds)
    assert slow.seconds > PLATEAU[device.kind] * best.seconds
    monkeypatch.setattr(Search, "_fitting", lambda *_: slow)
    monkeypatch.setattr(Search, "_with_segments", lambda self, layout, found: found)
    assert search.run() == best
    pin = Pinned(micro_batch_size=slow.candidate.micro_batch_size)
    size = Search(search.estimator, 2**31, pin).run().candidate.micro_batch_size
    assert size == slow.candidate.micro_batch_size  # a pin is kept, however slow


@pytest.mark.parametrize("seconds", [((1.0,), (3.0,)), ((2.0,), (2.0,)), ((3.0,), (2.0,))])
def test_a_units_seconds_are_never_below_zero_however_small_the_micro_batch(seconds, monkeypatch):
    """swin_tiny in bf16: four units took more than twice as long on twice the samples."""
    search = search_for("resnet10t", device=CPU, budget=2**31)
    chain = ChainCost((), before=0, head=0, elsewhere=0, state=0)
    estimates = [SimpleNamespace(chain=chain, forward_seconds=of) for of in seconds]
    monkeypatch.setattr(search.lines, "both", lambda *_: estimates)
    a, b = search.lines.sizes
    least = min(seconds[0][0] / a, seconds[1][0] / b)
    for size in (1, 3, a, b, 4 * b):
        (found,) = search.lines.chain("contiguous", size)[1]
        assert found >= size * least > 0


def test_without_a_micro_batch_that_fits_there_is_none():
    search = search_for("resnet10t", device=CPU, budget=10**6, n=8)
    assert search._largest("contiguous", "none", 8) is None


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("rtx-4070", "RTX 4070"),
        ("A100-SXM4-40GB", "A100-40GB"),
        ("Tesla T4", "T4"),
        ("CPU", "cpu"),
    ],
)
def test_a_device_is_found_by_the_name_that_its_driver_gives(asked, found):
    assert find_device(asked).name == found
