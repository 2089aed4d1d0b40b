from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from updates import cross_entropy

from lbaccel.batch.plan import BatchPlan
from lbaccel.errors import InputError
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update.accumulation import accumulate
from lbaccel.update.checkpointing import apply_segments
from lbaccel.update.normalization import convert_batch_norm, has_batch_norm

CPU = torch.device("cpu")
MICRO_BATCH, NORM_BATCH, SIZE = 4, 2, 32

STEM = ["conv1", "bn1", "act1", "maxpool"]
BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
VIT_BLOCKS = [f"blocks.{i}" for i in range(4)]

RESNET_SEGMENTS = {
    "the stem": [STEM],
    "from bn1, which act1 overwrites": [STEM[1:]],
    "every block alone": [[name] for name in BLOCKS],
    "runs of three": [[*STEM[:3]], ["maxpool", *BLOCKS[:2]], BLOCKS[2:5], BLOCKS[5:]],
    "all but the head": [[*STEM, *BLOCKS]],
    "the head too": [BLOCKS[4:6], [*BLOCKS[6:], "global_pool", "fc"]],
}
VIT_SEGMENTS = {
    "every block alone": [[name] for name in VIT_BLOCKS],
    "two runs": [["pos_drop", "patch_drop", "norm_pre", *VIT_BLOCKS[:2]], VIT_BLOCKS[2:]],
    "from the second block on": [[*VIT_BLOCKS[1:], "norm"]],
    "embedding and head": [["patch_embed"], ["fc_norm", "head_drop", "head"]],
}


def resnet():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=5, drop_path_rate=0.2).double().train()


def vit():
    torch.manual_seed(0)
    masks = {"drop_path_rate": 0.5, "proj_drop_rate": 0.3, "pos_drop_rate": 0.2, "drop_rate": 0.2}
    model = timm.create_model("test_vit", img_size=SIZE, depth=4, num_classes=5, **masks)
    return model.double().train()


def samples(count):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (count,), generator=generator)


def update(model, *, count=2 * MICRO_BATCH, index=0):
    """Loss, gradients and buffers of an update in two micro-batches, and bytes saved by forward."""
    norm_batch_size = NORM_BATCH if has_batch_norm(model) else None
    plan = BatchPlan(
        global_batch_size=count, micro_batch_size=MICRO_BATCH, norm_batch_size=norm_batch_size
    )
    norm, randomness = convert_batch_norm(model, norm_batch_size), KeyedRandomness(0, CPU)
    images, labels = samples(count)
    saved = [0]

    def pack(tensor):
        saved[0] += tensor.nbytes
        return tensor

    def loss_fn(model, data):
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            return cross_entropy(model, data)

    model.zero_grad()
    norm.begin()
    with randomness.update(index):
        sums = accumulate(
            model,
            [
                (m, (images[m.start : m.start + m.num_samples], labels[m.start :][: m.num_samples]))
                for m in plan.partition()
            ],
            loss_fn,
            num_samples=count,
            scopes=(norm, randomness),
        )
    norm.commit()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    return sums.loss.item(), gradients, dict(model.named_buffers()), saved[0]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def assert_nothing_changes(make, segments):
    plain, recomputed = make(), make()
    keys = list(recomputed.state_dict())
    apply_segments(recomputed, segments)
    assert list(recomputed.state_dict()) == keys
    assert [n for n, _ in recomputed.named_modules()] == [n for n, _ in plain.named_modules()]
    for index in range(2):  # a second update of the same model is like the first
        expected, found = update(plain, index=index), update(recomputed, index=index)
        assert found[0] == expected[0]
        assert_equal(found[1], expected[1])
        assert_equal(found[2], expected[2])
        assert found[3] < expected[3], (found[3], expected[3])
    return found, expected


@pytest.mark.parametrize("segments", RESNET_SEGMENTS.values(), ids=RESNET_SEGMENTS)
def test_gradients_and_batch_norm_statistics_of_a_resnet_stay_to_the_bit(segments):
    found, _ = assert_nothing_changes(resnet, segments)
    counts = {n: b.item() for n, b in found[2].items() if n.endswith("num_batches_tracked")}
    # Two updates of two micro-batches of two ghost batches: a recompute counts none of them.
    assert set(counts.values()) == {2 * 2 * (MICRO_BATCH // NORM_BATCH)}


@pytest.mark.parametrize("segments", VIT_SEGMENTS.values(), ids=VIT_SEGMENTS)
def test_gradients_of_a_vit_with_keyed_masks_stay_to_the_bit(segments):
    assert_nothing_changes(vit, segments)


def test_the_masks_of_the_vit_matter_so_that_equality_means_something():
    model = vit()
    first, second = update(model, index=0), update(model, index=1)
    assert first[0] != second[0]
    again = update(model, index=0)
    assert again[0] == first[0]


def test_torchs_own_masks_stay_to_the_bit_without_keyed_randomness():
    model, recomputed = vit(), vit()
    apply_segments(recomputed, VIT_SEGMENTS["two runs"])
    gradients = []
    for one in (model, recomputed):
        torch.manual_seed(5)
        one(samples(MICRO_BATCH)[0]).square().sum().backward()
        gradients.append({n: p.grad for n, p in one.named_parameters()})
        gradients.append({"generator": torch.get_rng_state()})
    assert_equal(gradients[2], gradients[0])
    assert_equal(gradients[3], gradients[1])


def test_a_run_of_the_whole_chain_saves_its_input_and_output_alone():
    width, depth, count = 16, 8, 4
    model = nn.Sequential()
    for _ in range(depth):
        model.append(nn.Linear(width, width)).append(nn.Tanh())
    x = torch.randn(count, width, requires_grad=True)

    def held_by(model):
        """Bytes of distinct activations that are alive after the forward, by their storages."""
        storages = {}

        def pack(tensor):
            if not isinstance(tensor, nn.Parameter) and tensor.numel() == count * width:
                storages[tensor.untyped_storage()._cdata] = tensor.nbytes
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(x)
        out.sum().backward()
        return sum(storages.values())

    activation = count * width * x.element_size()
    # Each Linear saves its input, each Tanh its output, which is the next one's input.
    assert held_by(model) == (depth + 1) * activation
    apply_segments(model, [[str(i) for i in range(2 * depth)]])
    assert held_by(model) <= activation


class Counted(nn.Linear):
    """A layer that counts its forwards."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("has_run", [False, True])
def test_a_deep_copy_runs_its_own_modules_and_not_the_originals(has_run):
    model = nn.Sequential(*[Counted(8, 8) for _ in range(4)])
    apply_segments(model, [["0", "1"], ["2", "3"]])
    if has_run:
        model(torch.randn(2, 8)).sum().backward()
        model.zero_grad()
    twin = copy.deepcopy(model)
    before = [layer.calls for layer in model]
    twin(torch.randn(2, 8)).sum().backward()
    assert [layer.calls for layer in model] == before
    assert all(a.calls > b for a, b in zip(twin, before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not twin(torch.randn(2, 8)).any() and model(torch.randn(2, 8)).any()


def test_a_deep_copy_in_the_middle_of_training_gives_the_originals_update():
    model = resnet()
    apply_segments(model, RESNET_SEGMENTS["runs of three"])
    update(model)
    twin = copy.deepcopy(model)
    found, expected = update(twin), update(model)
    assert_equal(found[1], expected[1])
    assert_equal(found[2], expected[2])
    assert found[3] == expected[3]


@pytest.mark.parametrize("make", [resnet, vit])
def test_evaluation_and_no_grad_give_the_same_and_recompute_nothing(make):
    plain, recomputed = make(), make()
    segments = RESNET_SEGMENTS if make is resnet else VIT_SEGMENTS
    apply_segments(recomputed, list(segments.values())[1])
    images, _ = samples(3)
    calls = []
    for module in recomputed.modules():
        module.register_forward_hook(lambda module, args, out: calls.append(module))
    plain.eval()
    recomputed.eval()
    with torch.no_grad():
        assert torch.equal(recomputed(images), plain(images))
        assert len(calls) == len(set(map(id, calls))), "a module ran twice"
    with torch.inference_mode():
        assert torch.equal(recomputed(images), plain(images))
    # Evaluation with gradients (saliency) recomputes and is right as well.
    gradients = [
        torch.autograd.grad(model(x).sum(), x)[0]
        for model in (plain, recomputed)
        for x in [images.clone().requires_grad_()]
    ]
    assert torch.equal(*gradients)


def test_training_goes_on_after_an_evaluation_and_after_a_failed_forward():
    class Sometimes(nn.Module):
        fails = False

        def forward(self, x):
            if self.fails:
                raise RuntimeError("out of memory, say")
            return x.tanh()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Sometimes(), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    model(x).sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    apply_segments(model, [["0", "1", "2"]])
    for disturb in ("fail", "evaluate", "drop the graph"):
        model.zero_grad()
        model[1].fails = disturb == "fail"
        if disturb == "fail":
            with pytest.raises(RuntimeError, match="out of memory, say"):
                model(x)
            model[1].fails = False
        elif disturb == "evaluate":
            with torch.no_grad():
                model(x)
        else:
            model(x)
        model(x).sum().backward()
        assert_equal({n: p.grad for n, p in model.named_parameters()}, expected)


def test_two_forwards_before_one_backward_are_recomputed_each_on_its_own_input():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    first, second = torch.randn(2, 8), torch.randn(2, 8)

    def gradients():
        model.zero_grad()
        (model(first) * model(second)).sum().backward()
        return {n: p.grad for n, p in model.named_parameters()}

    expected = gradients()
    apply_segments(model, [["0", "1", "2"]])
    assert_equal(gradients(), expected)


class Branches(nn.Module):
    """`a` and `b` on the same input, then `c` on their sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.c(self.a(x) + self.b(x))


@pytest.mark.parametrize(
    ("segment", "named", "before"),
    [
        (["a", "b"], "b", "a"),  # b runs on a's input
        (["b", "a"], "a", "b"),  # a runs before b
        (["a", "c"], "c", "a"),  # something lies between
        (["b", "c"], "c", "b"),
    ],
)
def test_a_segment_that_is_no_chain_is_refused_by_the_name_of_its_module(segment, named, before):
    model = Branches()
    apply_segments(model, [segment])
    with pytest.raises(InputError, match=rf"'{named}' did not run on the output of '{before}'"):
        model(torch.randn(2, 8))


def test_a_segment_that_leaves_out_a_block_is_refused():
    model = vit()
    apply_segments(model, [["blocks.0", "blocks.2"]])
    with pytest.raises(InputError, match=r"'blocks.2' did not run on .*'blocks.0'.*lbaccel plan"):
        model(samples(2)[0])


def test_unknown_names_empty_segments_and_repeated_names_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with pytest.raises(
        InputError, match=r"segments=\[\['0', 'x'\], \['y'\]\].*\['x', 'y'\] are no"
    ):
        apply_segments(model, [["0", "x"], ["y"]])
    with pytest.raises(InputError, match=r"\[''\] are no modules"):  # the model itself
        apply_segments(model, [[""]])
    for segments in ([["0"], []], [["0", "0"]], [["0", "1"], ["1", "2"]]):
        with pytest.raises(InputError, match="each names modules, each of them once"):
            apply_segments(model, segments)
    assert all("forward" not in vars(module) for module in model.modules()), "nothing was applied"


def test_no_segments_change_nothing():
    model = nn.Sequential(nn.Linear(8, 8))
    assert apply_segments(model, []).blocks == ()
    assert "forward" not in vars(model[0])


def test_segments_are_told_by_their_first_and_last_module():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    done = apply_segments(model, [["0"], ["1", "2", "3"]])
    assert not done.by_model and done.blocks == ("0", "1 .. 3")
    assert str(done) == "activation checkpointing: 2 blocks wrapped (0, 1 .. 3)"


def test_hooks_inside_a_segment_see_a_stand_in_and_those_of_its_last_module_the_output():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(4, 8))
    x, seen = torch.randn(2, 8), {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda module, args, out, name=name: seen.setdefault(name, []).append(out.detach())
        )
    model(x)
    expected = {name: outputs[0] for name, outputs in seen.items()}
    seen.clear()
    apply_segments(model, [["0", "1", "2"]])
    model(x).sum().backward()
    assert {name: len(outputs) for name, outputs in seen.items()} == dict.fromkeys("0123", 1)
    for name in ("0", "1"):
        assert seen[name][0].shape == expected[name].shape and seen[name][0].isnan().all()
    assert all(torch.equal(seen[name][0], expected[name]) for name in ("2", "3"))


def test_what_reads_between_the_modules_of_a_segment_gets_a_loss_that_is_not_finite():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            assert y.shape == (2, 4)  # shapes are right
            return self.b(y) + y.sigmoid()

    model = Reads()
    apply_segments(model, [["a", "b"]])
    assert model(torch.randn(2, 8)).isnan().all()


def test_a_module_in_two_calls_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    apply_segments(model, [["0", "1"]])
    with pytest.raises(InputError, match=r"\['1'\] are in segments"):
        apply_segments(model, [["1", "2"]])


def test_a_hook_that_changes_the_output_of_a_run_of_one_changes_it_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model[0].register_forward_hook(lambda module, args, out: 2 * out)
    x = torch.randn(2, 8)
    expected = model(x)
    apply_segments(model, [["0"]])
    assert torch.equal(model(x), expected)


def test_a_member_with_a_keyword_argument_is_refused_by_its_name():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x, scale=1.0):
            return self.fc(x) * scale

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Scaled()

        def forward(self, x):
            return self.a(x, scale=2.0)

    model = Caller()
    apply_segments(model, [["a"]])
    with pytest.raises(InputError, match="'a'"):
        model(torch.randn(2, 8))


def test_a_model_with_segments_is_pickled_after_a_forward_as_before_it():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    apply_segments(model, [["0", "1"]])
    x = torch.randn(2, 8)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
