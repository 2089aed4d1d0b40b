"""A plan whose estimates an earlier one kept is the same plan; what may differ is not taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch
from runs_of_recipe import run
from torch import nn
from torch.nn import functional as F

from lbaccel import BatchPlan, plan
from lbaccel.launch import estimates_folder
from lbaccel.models import create_backbone
from lbaccel.planning import kept_estimates as module
from lbaccel.planning.candidates import Candidate
from lbaccel.planning.cost import workspace
from lbaccel.planning.cost.devices import CPU, find_device
from lbaccel.planning.cost.kernel_calls import Unmeasured
from lbaccel.planning.cost.update import Network, classification_loss, image_batch
from lbaccel.planning.estimate import Estimator
from lbaccel.planning.kept_estimates import kept_estimates

CARD = find_device("RTX 3060")
CONTRACT = BatchPlan(global_batch_size=16, micro_batch_size=8, norm_batch_size=8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """That estimates are kept in."""
    monkeypatch.setenv("LBACCEL_ESTIMATES", str(tmp_path / "estimates"))
    return tmp_path / "estimates"


@pytest.fixture
def traces(monkeypatch):
    """The candidates that are traced."""
    found, plain = [], Estimator._trace

    def trace(self, candidate, *rest):
        found.append(candidate)
        return plain(self, candidate, *rest)

    monkeypatch.setattr(Estimator, "_trace", trace)
    return found


def built(name="test_resnet", **arguments):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=10, **arguments)


def network(model=None, **changes):
    asked = {"model": model or built(), "make_batch": image_batch(3, 32), **changes}
    if "optimizer" not in asked:
        asked["optimizer"] = torch.optim.SGD(asked["model"].parameters(), 0.1, momentum=0.9)
    return Network(**asked)


def owner(network, device=CARD, states=()):
    kept = kept_estimates(network, states, device)
    return None if kept is None else kept._path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {"device": "RTX 3060", "memory": "1GiB"}),
        ("test_resnet", {"device": "cpu", "memory": "18MiB", "precision": "bf16"}),
        ("test_vit", {"device": "cpu", "memory": "17MiB", "world_size": 2}),
        ("test_resnet", {"device": "RTX 3060", "memory": "0.505GiB", "activation_offload": "auto"}),
        ("test_vit", {"device": "RTX 3060", "memory": "1GiB", "zero_stage": 2, "sweeps": True}),
    ],
)
def test_a_plan_from_kept_estimates_is_the_same_and_traces_nothing(folder, traces, name, options):
    def planned():
        return plan(
            name, global_batch_size=512, img_size=64, num_classes=10, compare=True, **options
        )

    first, number = planned(), len(traces)
    assert number > 2 and folder.is_dir()
    assert planned() == first
    assert len(traces) == number


def test_another_budget_traces_what_only_it_asks_for_and_gives_the_plan_of_no_folder(
    folder, traces, monkeypatch
):
    def planned(memory):
        return plan("test_vit", global_batch_size=1024, num_classes=10, device="cpu", memory=memory)

    planned("0.2GiB")
    before = len(traces)
    found = planned("0.04GiB")
    some = len(traces) - before
    monkeypatch.setenv("LBACCEL_ESTIMATES", "off")
    assert planned("0.04GiB") == found
    assert 0 < some < len(traces) - before - some


def test_a_model_as_it_is_shares_the_estimates_of_its_name(folder, traces):
    def planned(model, **options):
        return plan(
            model, img_size=160, global_batch_size=64, device="cpu", memory="1GiB", **options
        )

    first, number = planned("test_vit", num_classes=10), len(traces)
    real = create_backbone("test_vit", num_classes=10, img_size=160)
    assert replace(planned(real), model=first.model) == first
    assert len(traces) == number


def test_a_run_of_the_recipe_that_is_started_again_traces_nothing(folder, traces, tmp_path):
    flags = ("--model", "test_resnet", "--epochs", "1", "--micro-batch-size", "auto")
    run(*flags, "--activation-checkpointing", "auto", output=tmp_path / "runs")
    number = len(traces)
    assert number > 0
    run(*flags, "--activation-checkpointing", "auto", output=tmp_path / "runs")
    assert len(traces) == number


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    assert estimates_folder() is None  # in tests: see conftest.py
    monkeypatch.delenv("LBACCEL_ESTIMATES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert estimates_folder() == tmp_path / "lbaccel" / "estimates"


def inplace(model):
    for part in model.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = not part.inplace


def frozen(model):
    next(model.parameters()).requires_grad_(False)


def channels_last(model):
    next(model.parameters()).data = torch.empty(16, 3, 3, 3, device="meta").to(
        memory_format=torch.channels_last
    )


def bound(model):
    class Act(nn.ReLU):
        pass

    model.act1 = Act()


def hooked(model):
    model.register_forward_hook(lambda *_: None)


def overridden(model):
    model.forward = model.forward_features


def of_a_subclass(model):
    kind = type("Sharded", (torch.Tensor,), {})
    model.register_buffer("more", torch.empty(3).as_subclass(kind))


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.fc)
    model.fc = nn.utils.parametrizations.weight_norm(Own(3, 3))


def strange_hook(model):
    model.hook_scale = torch.ones(3)


def holds_itself(model):
    model.table = {}
    model.table["more"] = model.table


def with_function(model):
    model.norm_layer = nn.functional.relu


CHANGES = {
    "classes": lambda: network(timm.create_model("test_resnet", num_classes=11)),
    "another network": lambda: network(built("test_vit")),
    "an activation in place": lambda: network(changed(inplace)),
    "a weight that is not trained": lambda: network(changed(frozen)),
    "a weight in another layout": lambda: network(changed(channels_last)),
    "drop-path": lambda: network(built(drop_path_rate=0.1)),
    "images": lambda: network(make_batch=image_batch(3, 64)),
    "clipping": lambda: network(clips=True),
    "a teacher": lambda: network(teacher=built("test_vit")),
    "no optimizer": lambda: network(optimizer=None),
    "AdamW": lambda: of_optimizer(torch.optim.AdamW),
    "a fused step": lambda: of_optimizer(torch.optim.SGD, momentum=0.9, foreach=True),
    "no momentum": lambda: of_optimizer(torch.optim.SGD),
}


def changed(change):
    model = built()
    change(model)
    return model


STRANGE = (
    *(bound, hooked, overridden, with_function, of_a_subclass),
    *(parametrized, strange_hook, holds_itself),
)


def of_optimizer(kind, **options):
    model = built()
    return network(model, optimizer=kind(model.parameters(), 0.1, **options))


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_an_estimate_changes_its_owner(folder, change):
    assert owner(network()) == owner(network())
    assert owner(CHANGES[change]()) not in (None, owner(network()))
    relu = nn.ReLU()
    twice, two = nn.Sequential(relu, relu), nn.Sequential(nn.ReLU(), nn.ReLU())
    assert owner(network(twice, optimizer=None)) != owner(network(two, optimizer=None))


def test_another_device_state_or_version_has_another_owner(folder, monkeypatch):
    plain = owner(network())
    assert owner(network(), CPU) != plain
    assert owner(network(), replace(CARD, bandwidth=1e9)) != plain
    assert owner(network(), states=[torch.empty(3)]) != plain
    found = {plain}
    for home, name, value in (
        (torch, "__version__", "2.0"),
        (module, "_files", lambda package: package),
        (torch, "get_default_dtype", lambda: torch.float64),
        (torch.backends.cuda, "flash_sdp_enabled", lambda: False),
        (module, "variables", lambda *starts: {"TIMM_FUSED_ATTN": "0"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(home, name, value)
            found.add(owner(network()))
    assert len(found) == 6
    on_cpu = owner(network(), CPU)
    monkeypatch.setattr(module, "this_processor", lambda: "another")
    assert owner(network(), CPU) != on_cpu
    assert owner(network()) == plain  # a plan for a card is that of any processor


def test_a_changed_file_of_a_package_changes_the_owner(folder, monkeypatch, tmp_path):
    source = tmp_path / "part.py"
    (tmp_path / "__init__.py").write_text("")
    source.write_text("x = 1")
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(module, "find_spec", lambda name: spec)
    files = module._files.__wrapped__
    first = files("timm")
    assert files("timm") == first
    os.utime(source, ns=(1, 1))
    assert files("timm") != first


class Own(nn.Linear):
    """A class of the user's."""


def own_batch(size):
    return torch.empty(size, 3, 32, 32), torch.zeros(size, dtype=torch.long)


@pytest.mark.parametrize(
    "asked",
    [
        lambda: network(nn.Sequential(nn.Flatten(), Own(3, 3))),
        lambda: network(make_batch=own_batch),
        lambda: network(loss_fn=lambda model, batch: model(batch[0]).sum()),
        lambda: network(loss_fn=classification_loss, embed=lambda model, batch: batch),
        lambda: of_optimizer(type("Mine", (torch.optim.SGD,), {"__module__": "mine"})),
        lambda: network(teacher=Own(3, 3)),
        *(lambda c=c: network(changed(c)) for c in STRANGE),
    ],
)
def test_what_no_text_says_all_of_is_not_kept(folder, asked):
    assert owner(asked()) is None
    assert not folder.exists()


def patched(monkeypatch, home, name):
    def mine(*values, **options):
        raise AssertionError

    monkeypatch.setattr(home, name, mine)


@pytest.mark.parametrize(
    ("home", "name"), [(nn.ReLU, "forward"), (nn.Conv2d, "_conv_forward"), (F, "layer_norm")]
)
def test_a_function_that_is_replaced_is_not_known(folder, monkeypatch, home, name):
    assert owner(network()) is not None
    patched(monkeypatch, home, name)
    assert owner(network()) is None


def test_a_hook_of_all_modules_is_not_known(folder):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert owner(network()) is None
    finally:
        handle.remove()
    assert owner(network()) is not None


def test_classes_of_one_name_in_two_modules_are_two(folder):
    with torch.device("meta"):
        one, two = nn.Dropout(0.5), torch.ao.nn.quantized.Dropout(0.5)
    assert owner(network(one, optimizer=None)) != owner(network(two, optimizer=None))


def test_switches_of_timm_and_torch_change_the_owner(folder, monkeypatch):
    found = {owner(network())}
    monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", 7)
    found.add(owner(network()))
    monkeypatch.setattr(torch.utils.checkpoint, "_enable_checkpoint_early_stop", "other")
    found.add(owner(network()))
    assert len(found) == 3
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of this launch")
    assert owner(network()) in found


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9 has none"
)
def test_newer_settings_of_precision_are_no_failure():
    """torch refuses `get_float32_matmul_precision` once one of them was made."""
    code = """
import torch
from lbaccel.planning.cost.processor import kernel_state
before = kernel_state()
torch.backends.cuda.matmul.fp32_precision = "tf32"
print(before != kernel_state())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True"]


def estimator(device=CPU, precision="fp32", **contract):
    return Estimator(network(), replace(CONTRACT, **contract), device, precision)


def test_another_contract_precision_or_candidate_is_another_question(folder, traces):
    candidate = Candidate(8)
    estimator().estimate(candidate)
    number = len(traces)
    estimator(global_batch_size=64, world_size=2).estimate(candidate)  # two micro-steps as well
    assert len(traces) == number
    for asked in (
        lambda: estimator(norm_batch_size=4).estimate(candidate),
        lambda: estimator(norm_batch_size="frozen").estimate(candidate),
        lambda: estimator(mix_pairs=True, norm_batch_size="frozen").estimate(candidate),
        lambda: estimator(precision="bf16").estimate(candidate),
        lambda: estimator().estimate(Candidate(16)),
        lambda: estimator().estimate(Candidate(8, "channels_last")),
        lambda: estimator(global_batch_size=8).estimate(candidate),  # one micro-step
    ):
        asked()
        assert len(traces) > number
        number = len(traces)


def test_an_assumed_workspace_is_not_kept(folder, traces, monkeypatch):
    def fails(name, args):
        raise Unmeasured("a profiler runs")

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "measured_workspace", fails)
        assumed = estimator().estimate(Candidate(8))
    number = len(traces)
    assert estimator().estimate(Candidate(8)).peak < assumed.peak
    assert len(traces) > number


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("peak"),
        lambda found: found.update(more=1),
        lambda found: found.update(kind="Survey"),
        lambda found: found["chain"].update(units=3),
        lambda found: found["chain"]["units"][0].pop("saved"),
        lambda found: found.pop("kind"),
        lambda found: found.update(peak=None),
        lambda found: found.update(peak="8"),
        lambda found: found.update(breakdown={}),
        lambda found: found.update(breakdown=[1]),
        lambda found: found.update(accumulating={"weights": None}),
        lambda found: found.update(forward_seconds=["1"]),
        lambda found: found["chain"].update(head=None),
    ],
)
def test_a_damaged_estimate_is_traced_again(folder, traces, change):
    plain = estimator(CARD).estimate(Candidate(8))
    (file,) = folder.iterdir()
    document = json.loads(file.read_text())
    for found in document["results"].values():
        if found["kind"] == "Estimate":
            change(found)
    file.write_text(json.dumps(document))
    number = len(traces)
    assert estimator(CARD).estimate(Candidate(8)) == plain
    assert len(traces) == number + 1


def test_an_estimate_that_was_read_can_be_read_again_and_written(folder):
    plain = estimator(CARD).estimate(Candidate(8))
    again = estimator(CARD)
    assert again.estimate(Candidate(8)) == again.like().estimate(Candidate(8)) == plain
    again.estimate(Candidate(16))  # which writes all
    assert estimator(CARD).estimate(Candidate(8)) == plain


def test_the_files_written_longest_ago_make_room(folder, monkeypatch):
    monkeypatch.setattr(module, "MOST_FILES", 3)
    folder.mkdir()
    for number in range(5):
        (folder / f"{number:032}.json").write_text("{}")
        os.utime(folder / f"{number:032}.json", (number, number))
    mine = {"notes.json", "a" * 32 + ".txt"}
    for name in mine:
        (folder / name).write_text("mine")
        os.utime(folder / name, (0, 0))
    estimator(CARD).estimate(Candidate(8))
    names = {path.name for path in folder.iterdir()}
    assert mine | {f"{3:032}.json", f"{4:032}.json"} < names and len(names) == 5


def test_a_folder_that_nobody_may_read_or_that_is_a_file_is_no_failure(folder, traces, monkeypatch):
    folder.write_text("a file")
    plain = estimator(CARD).estimate(Candidate(8))
    folder.unlink()

    def denied(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(module.Path, "exists", denied)
    assert estimator(CARD).estimate(Candidate(8)) == plain
