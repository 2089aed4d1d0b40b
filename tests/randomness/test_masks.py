"""Masks keyed by sample: the same in every partition, on every rank, in a recompute; and random."""

from __future__ import annotations

import random

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from forks import run_forked, values
from reference import largest_relative_error, make_samples, relative_error
from timm.layers import drop, patch_dropout
from timm.layers.drop import DropPath
from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset
from torchvision.ops import StochasticDepth
from updates import one_update

from lbaccel import BatchPlan, InputError, LargeBatch, UpdateLoader
from lbaccel.batch.plan import MicroBatch
from lbaccel.randomness.draws import element_bits, halves, keep_mask
from lbaccel.randomness.keys import keyed_hash
from lbaccel.randomness.masks import MASKS, SAMPLES_AT_ONCE, KeyedRandomness

CPU = torch.device("cpu")


def drawn(layer, *micro_batches, seed=0, update=0, shape=(6,), times=1):
    """What `layer` leaves of ones in each micro-batch, one under the other."""
    randomness, rows = KeyedRandomness(seed, CPU), []
    with randomness.update(update):
        for m in micro_batches:
            with randomness.forward(m):
                for _ in range(times):
                    out = layer(torch.ones(m.num_samples, *shape, dtype=torch.float64))
                rows.append(out)
    return torch.cat(rows)


def cut(*sizes):
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    return [MicroBatch(start, (size,)) for start, size in zip(starts, sizes, strict=True)]


LAYERS = {
    "Dropout": (nn.Dropout(0.4), (6,)),
    "Dropout of maps": (nn.Dropout(0.4), (3, 4, 4)),
    "Dropout1d": (nn.Dropout1d(0.4), (6, 5)),
    "Dropout2d": (nn.Dropout2d(0.4), (6, 3, 3)),
    "Dropout3d": (nn.Dropout3d(0.4), (6, 2, 2, 2)),
    "AlphaDropout": (nn.AlphaDropout(0.4), (6,)),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout(0.4), (6, 3, 3)),
    "DropPath": (DropPath(0.4), (6,)),
    "DropPath of maps": (DropPath(0.4, scale_by_keep=False), (2, 3, 3)),
    "PatchDropout": (PatchDropout(0.4), (6, 2)),
    "PatchDropout in order": (PatchDropout(0.4, num_prefix_tokens=0, ordered=True), (6, 2)),
    "StochasticDepth": (StochasticDepth(0.4, "row"), (6,)),
    "StochasticDepth of the batch": (StochasticDepth(0.4, "batch"), (6,)),
    "F.dropout": (lambda x: F.dropout(x, 0.4), (6,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_draw_of_a_sample_is_the_same_in_every_partition(name):
    layer, shape = LAYERS[name]
    truth = drawn(layer, *cut(40), shape=shape)
    for sizes in ([13, 13, 14], [1] * 40, [40 - 7, 7]):
        assert torch.equal(drawn(layer, *cut(*sizes), shape=shape), truth)
    if "PatchDropout" not in name:  # of ones, any tokens are the same
        assert truth.unique().numel() == (1 if "batch" in name else 2)
    for key in () if "PatchDropout" in name else ("seed", "update", "times"):
        outs = [drawn(layer, *cut(40), shape=shape, **{key: v}) for v in range(2, 9)]
        # one coin for a whole batch may fall the same side twice
        assert any(not torch.equal(out, truth) for out in outs), key


def test_patches_that_stay_are_keyed_and_the_prefix_is_whole():
    tokens = torch.arange(7.0).repeat(20, 1)[..., None]
    layer = PatchDropoutWithIndices(0.5, num_prefix_tokens=1)

    def run(*micro_batches):
        randomness, rows = KeyedRandomness(0, CPU), []
        with randomness.update(0):
            for m in micro_batches:
                with randomness.forward(m):
                    x = tokens[m.start : m.start + m.num_samples]
                    rows.append(layer(x))
        return torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])

    kept, chosen = run(*cut(20))
    assert kept.shape == (20, 1 + 3, 1) and (kept[:, 0] == 0).all()
    assert torch.equal(kept[:, 1:, 0], chosen + 1.0)  # the tokens at the indices, past the prefix
    assert len({tuple(sorted(row)) for row in chosen.tolist()}) > 5
    for a, b in zip(run(*cut(20)), run(*cut(6, 13, 1)), strict=True):
        assert torch.equal(a, b)


def as_hashes(keys):
    """The int64 keys of a call, as `keyed_hash` gives them."""
    low, high = (
        half[keys.row].numpy().view(np.uint32).astype(np.uint64) for half in (keys.low, keys.high)
    )
    return low + (high << np.uint64(32))


def test_keys_are_the_documented_hash():
    randomness = KeyedRandomness(7, CPU)
    with randomness.update(3), randomness.forward(MicroBatch(5, (4,))):
        calls = [randomness.keys(torch.empty(4, 2), 2) for _ in range(70)]  # past a block of 64
    for number in (0, 1, 63, 64, 69):
        keys = calls[number]
        assert (as_hashes(keys) == keyed_hash(7, MASKS, 3, np.arange(5, 9), number)).all()
        assert torch.equal(keys.first[keys.row], keys.bits(3)[:, 0])


def test_keys_hashed_ahead_are_those_of_the_samples():
    randomness = KeyedRandomness(7, CPU)
    ends = SAMPLES_AT_ONCE + 5
    with randomness.forward(MicroBatch(0, (9,))):  # outside of an update: those of update 0
        randomness.keys(torch.empty(9, 2), 2)
    cuts = [(5, 3), (8, 1), (ends - 4, 4), (ends - 1, 2), (ends, 7), (5, 3), (4000, 600), (0, 9)]
    for update in (3, 4):
        with randomness.update(update):
            for start, samples in cuts:
                with randomness.forward(MicroBatch(start, (samples,))):
                    found = [randomness.keys(torch.empty(samples, 2), 2) for _ in range(65)]
                    positions = np.arange(start, start + samples)
                    for number in (0, 64):
                        truth = keyed_hash(7, MASKS, update, positions, number)
                        assert (as_hashes(found[number]) == truth).all()


# -- distribution ---------------------------------------------------------------------------------


def masks_of(number, *, seed=0, update=0, samples=64, elements=512, keep=0.7):
    """The mask [samples, elements] of call `number`, as numbers."""
    randomness = KeyedRandomness(seed, CPU)
    with randomness.update(update), randomness.forward(MicroBatch(0, (samples,))):
        for _ in range(number + 1):
            keys = randomness.keys(torch.empty(samples, elements), 2)
    return keep_mask(keys.bits(elements), keep).double()


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@pytest.mark.parametrize("keep", [0.001, 0.1, 0.5, 0.7, 0.95])
def test_masks_have_the_mean_and_the_variance_of_coin_tosses(keep):
    for seed in range(3):
        mask = masks_of(0, seed=seed, keep=keep, samples=256)
        sigma = (keep * (1 - keep) / mask.numel()) ** 0.5
        assert abs(mask.mean().item() - keep) < 5 * sigma
        for axis, count in ((0, 512), (1, 256)):  # rows and columns scatter as they should
            spread = mask.mean(axis).var().item() / (keep * (1 - keep) / mask.shape[axis])
            assert abs(spread - 1) < 5 * (2 / count) ** 0.5


def test_masks_of_layers_samples_updates_and_seeds_are_independent():
    base = masks_of(0)
    bound = 5 / base.numel() ** 0.5
    for other in (
        masks_of(1),
        masks_of(64),
        masks_of(0, update=1),
        masks_of(0, seed=1),
        base.roll(1, 0),
        base.roll(1, 1),
        base.roll(32, 1),
    ):
        assert abs(correlation(base, other)) < bound
    # update and call, seed and update do not stand in for each other
    assert not torch.equal(masks_of(1), masks_of(0, update=1))
    pairs = torch.corrcoef(base)  # each sample with each other: 2016 coefficients
    away = pairs[~torch.eye(len(base), dtype=torch.bool)]
    assert away.abs().max() < 5.5 / base.shape[1] ** 0.5


def test_bits_are_uniform_bit_by_bit():
    keys = torch.from_numpy(keyed_hash(1, np.arange(64)).view(np.int64))
    bits = element_bits(*halves(keys), 4096).numpy().view(np.uint32)
    for bit in range(8, 32):  # the upper ones decide
        share = ((bits >> bit) & 1).mean()
        assert abs(share - 0.5) < 5 * 0.5 / bits.size**0.5
    assert len(np.unique(bits)) > 0.99 * bits.size  # 2^18 draws of 2^32: few meet


def test_dropout_keeps_the_mean_and_alpha_dropout_the_variance_too():
    x = torch.randn(500, 400, dtype=torch.float64)
    randomness = KeyedRandomness(0, CPU)
    with randomness.update(0), randomness.forward(MicroBatch(0, (500,))):
        plain, alpha = F.dropout(x + 2, 0.3), F.alpha_dropout(x, 0.3, training=True)
    sigma = (1 / 0.7 * (1 + 4) / x.numel()) ** 0.5
    assert abs(plain.mean().item() - 2) < 5 * sigma
    assert abs(alpha.mean().item()) < 0.02 and abs(alpha.var().item() - 1) < 0.03
    assert ((plain == 0) | torch.isclose(plain, (x + 2) / 0.7)).all()


def test_a_dropped_element_has_no_gradient_and_a_kept_one_its_scale():
    x = torch.ones(9, 50, requires_grad=True)
    for inplace in (False, True):
        x.grad = None
        randomness = KeyedRandomness(0, CPU)
        with randomness.update(0), randomness.forward(MicroBatch(0, (9,))):
            out = F.dropout(x * 1, 0.25, inplace=inplace)
        out.sum().backward()
        assert torch.equal(x.grad, out.detach())
        assert out.detach().unique().tolist() == [0.0, pytest.approx(1 / 0.75)]


def test_the_ends_of_the_range():
    (whole,) = cut(8)
    assert not drawn(nn.Dropout(1.0), whole).any()
    assert drawn(nn.Dropout(0.0), whole).all() and drawn(nn.Dropout(0.5).eval(), whole).all()
    assert drawn(nn.Dropout(1e-12), whole).all()
    with pytest.raises(ValueError, match="probability"):
        drawn(lambda x: F.dropout(x, 1.5), whole)


# -- through the network --------------------------------------------------------------------------

NETWORKS = {
    "vit_tiny, drop-path 0.3": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "drop_path_rate": 0.3, "proj_drop_rate": 0.1, "patch_drop_rate": 0.25},
        None,
    ),
    "resnet, drop-rate 0.5": ("resnet10t", {"drop_rate": 0.5, "drop_path_rate": 0.2}, 3),
    "swin, windows": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 2, 1),
         "num_heads": (1, 2, 3, 6), "drop_path_rate": 0.3, "proj_drop_rate": 0.2},
        None,
    ),
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    model, options, norm = NETWORKS[name]
    return timm.create_model(model, num_classes=5, **options).double(), norm


def update_of(name, micro, *, checkpointing=False, accelerator=None):
    model, norm = make(name)
    images, labels = make_samples(11, size=NETWORKS[name][1].get("img_size", 32))
    return one_update(
        model, images, labels, micro_batch_size=micro, norm_batch_size=norm,
        checkpointing=checkpointing, accelerator=accelerator,
    )  # fmt: skip


def assert_same(found, truth):
    assert found[0].loss == pytest.approx(truth[0].loss, rel=1e-12)
    assert relative_error(found[1], truth[1]) < 1e-12
    assert largest_relative_error(found[2], truth[2]) < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_masks_gives_one_update_under_every_plan(name):
    truth = update_of(name, 12)
    for micro, checkpointing in ((12, True), (6, False), (3, True)):
        assert_same(update_of(name, micro, checkpointing=checkpointing), truth)
    model, _ = make(name)
    for module in model.modules():
        for rate in ("drop_prob", "prob", "drop_rate", "p"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    images, labels = make_samples(11, size=NETWORKS[name][1].get("img_size", 32))
    plain = one_update(
        model, images, labels, micro_batch_size=12, norm_batch_size=NETWORKS[name][2]
    )
    assert relative_error(plain[1], truth[1]) > 0.01  # the masks do something


def rank_update(rank, name):
    result, gradients, buffers = update_of(name, 3, accelerator=Accelerator(cpu=True))
    return result, gradients, buffers


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", list(NETWORKS)[:2])
def test_ranks_draw_the_masks_of_one_process(name, world_size):
    truth = update_of(name, 12)
    for found in values(run_forked(rank_update, name, world_size=world_size)):
        assert_same(found, truth)


class Shared(nn.Module):
    """One dropout module between all blocks, which are recomputed last to first."""

    def __init__(self, **how):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6).double() for _ in range(3))
        self.drop, self.how = nn.Dropout(0.5), how

    def block(self, layer, x):
        return self.drop(layer(self.drop(x)))

    def forward(self, x):
        for layer in self.layers:
            if self.how:
                x = checkpoint(self.block, layer, x, **self.how)
            else:
                x = self.block(layer, x)
        return x


def shared_gradients(**how):
    torch.manual_seed(1)
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    x.requires_grad_(how.get("use_reentrant", False))
    return one_update(
        Shared(**how), x.detach(), y, micro_batch_size=4,
        loss_fn=lambda m, b: F.mse_loss(m(b[0].requires_grad_(x.requires_grad)), b[1]),
    )[1]  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_module_called_many_times_draws_its_own_mask_in_each_recompute(reentrant):
    assert relative_error(shared_gradients(use_reentrant=reentrant), shared_gradients()) < 1e-12


def test_a_recompute_without_its_random_state_is_refused():
    with pytest.raises(InputError, match="preserve_rng_state=True"):
        shared_gradients(use_reentrant=False, preserve_rng_state=False)


# -- what stays as it was -------------------------------------------------------------------------


def all_states():
    return (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())


class Unkeyed(nn.Module):
    """Noise of every generator, which no key reaches."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(3, 1), []

    def forward(self, x):
        noise = torch.rand(len(x), 1)
        self.seen.append((noise.flatten().tolist(), random.random(), np.random.rand()))
        return self.linear(x) * noise


def prepared(model, *, micro=4, seed=0):
    data = TensorDataset(torch.randn(16, 3), torch.randn(16, 1))
    plan = BatchPlan(global_batch_size=8, micro_batch_size=micro)
    large_batch = LargeBatch(Accelerator(cpu=True), plan, seed=seed)
    model, _, loader = large_batch.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), UpdateLoader(data, plan)
    )
    return large_batch, loader


def mse(model, micro_batch):
    return F.mse_loss(model(micro_batch[0]), micro_batch[1])


def test_an_update_leaves_every_generator_where_it_was():
    large_batch, loader = prepared(nn.Sequential(Unkeyed(), nn.Dropout(0.5)))
    before = all_states()
    for update in loader:
        large_batch.update(update, mse)
        assert all_states() == before

    def fails(model, micro_batch):
        random.random(), np.random.rand(), torch.rand(1)
        raise KeyError("broken")

    loader.load_state_dict({"next_update": 0})
    with pytest.raises(KeyError):
        large_batch.update(next(iter(loader)), fails)
    assert all_states() == before
    assert F.dropout.__module__ == "torch.nn.functional"
    assert drop.drop_path.__module__ == "timm.layers.drop"


def test_what_cannot_be_keyed_is_drawn_anew_for_each_micro_batch_update_and_seed():
    def seen(**options):
        model = Unkeyed()
        large_batch, loader = prepared(model, **options)
        random.seed(str(options)), np.random.seed(len(str(options)))  # of no effect
        for update in loader:
            large_batch.update(update, mse)
        return model.seen

    first, again, other = seen(), seen(), seen(seed=1)
    assert first == again and len(first) == 4
    assert len({str(draw) for draw in [*first, *other]}) == 8


def test_what_cannot_be_keyed_depends_on_no_micro_batch_that_ran_before():
    randomness, (first, second) = KeyedRandomness(0, CPU), cut(4, 4)

    def draws(*micro_batches):
        with randomness.update(0):
            for micro_batch in micro_batches:
                with randomness.forward(micro_batch):
                    drawn = (torch.rand(2).tolist(), random.random(), np.random.rand())
        return drawn

    assert draws(second) == draws(first, second) == draws(first, first, second)
    assert draws(first) != draws(second)  # as two ranks begin


def functions():
    """Those that draw masks, as their layers find them."""
    return [
        F.dropout,
        drop.drop_path,
        patch_dropout.patch_dropout_forward,
        StochasticDepth.forward.__globals__["stochastic_depth"],
    ]


def test_functions_are_put_back_where_a_forward_fails():
    plain = functions()
    randomness = KeyedRandomness(0, CPU)
    with pytest.raises(RuntimeError), randomness.update(0), randomness.forward(cut(4)[0]):
        assert all(now is not before for now, before in zip(functions(), plain, strict=True))
        raise RuntimeError
    assert functions() == plain


def test_rows_that_are_no_samples_are_drawn_as_ever():
    randomness = KeyedRandomness(0, CPU)
    with randomness.update(0), randomness.forward(cut(4)[0]):
        assert randomness.keys(torch.empty(7, 2), 2) is None
        assert randomness.keys(torch.empty(()), 0) is None
        assert F.dropout(torch.ones(7, 100), 0.5).unique().tolist() == [0.0, 2.0]
        one = F.dropout(torch.ones(1, 100), 0.5)
    with randomness.update(0), randomness.forward(MicroBatch(4, (3,))):
        F.dropout(torch.ones(7, 100), 0.5)
        assert torch.equal(F.dropout(torch.ones(1, 100), 0.5), one)  # one draw for all samples


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, while it compiles
def test_a_compiled_network_draws_the_same_masks_and_is_compiled_once():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    compiled = torch.compile(plain, backend=backend, dynamic=False)
    x, randomness, counts = torch.randn(12, 6), KeyedRandomness(0, CPU), []
    for update in range(3):
        rows = []
        for network in (plain, compiled):
            with randomness.update(update), randomness.forward(MicroBatch(0, (12,))):
                rows.append(network(x))
        assert torch.equal(*rows)
        counts.append(len(compiled_graphs))
    assert counts[0] == counts[2] > 0
