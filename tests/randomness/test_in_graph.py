"""Masks inside the graph of torch.compile: no graph break, and the masks of the plain run."""

from __future__ import annotations

from shutil import which

import pytest
import torch
from accelerate import Accelerator
from forks import run_forked, values
from reference import relative_error
from test_layouts import DRAWS, Network, of_some_rows
from test_layouts import mse as mean_squares
from test_layouts import samples as tokens
from test_masks import LAYERS
from timm.layers.drop import DropPath
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from updates import one_update

from lbaccel import InputError
from lbaccel.batch.plan import MicroBatch
from lbaccel.randomness.layouts import Layouts, NotLearned, SamplePlace
from lbaccel.randomness.masks import KeyedRandomness

# torch's own, while it compiles
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")
CPU = torch.device("cpu")
BLOCKS, COUNT = 3, 11
OTHER_DTYPES = (torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def breaks():
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Block(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.linear, self.path, self.drop = nn.Linear(8, 8), DropPath(rate), nn.Dropout(0.3)

    def forward(self, x):
        x = x + self.path(self.linear(x))
        x = x + self.drop(x.tanh())
        return x + F.dropout(x, 0.4, self.training)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(0.3) for _ in range(BLOCKS))
        self.head = nn.Linear(8, 5)
        self.double()

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(x.mean(1))

    def run(self, block, x):
        return block(x)


class Recomputed(Blocks):
    def run(self, block, x):
        return checkpoint(block, x, use_reentrant=False)


class Unread(Blocks):
    """Masks of which the result is dropped, and two calls that are equal."""

    def run(self, block, x):
        block(x)
        F.dropout(x, 0.5)
        return block(x) + F.dropout(x, 0.5) + F.dropout(x, 0.5)


class Shared(Blocks):
    """One module for all blocks, in places that are recomputed last to first."""

    def run(self, block, x):
        return checkpoint(self.blocks[0], x, use_reentrant=False)


class Broken(Blocks):
    """A graph ends after each block."""

    def run(self, block, x):
        x = block(x)
        torch._dynamo.graph_break()
        return x


def whole(model, backend):
    model.compile(backend=backend)


def by_blocks(model, backend):
    for block in model.blocks:
        block.compile(backend=backend)


def once(model, micro_batch):
    return F.cross_entropy(model(micro_batch[0]), micro_batch[1])


def twice(model, micro_batch):
    """Two runs of each graph before the first backward pass."""
    x, y = micro_batch
    return F.cross_entropy(model(x), y) + F.cross_entropy(model(2 * x), y)


def gradients(make, micro_batch_size, *, compiles=None, backend="aot_eager", loss_fn=once, **how):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(COUNT, 6, 8, generator=generator, dtype=torch.float64)
    model = make()
    if compiles is not None:
        compiles(model, backend)
    y = torch.arange(COUNT) % 5
    return one_update(model, x, y, micro_batch_size=micro_batch_size, loss_fn=loss_fn, **how)[1]


@pytest.mark.parametrize("loss_fn", [once, twice])
@pytest.mark.parametrize(
    ("make", "compiles"),
    [
        (Blocks, whole),
        (Blocks, by_blocks),
        (Recomputed, whole),  # the checkpoint is in the graph
        (Recomputed, by_blocks),  # the graph is in the checkpoint
        (Unread, whole),
        (Shared, whole),
    ],
)
def test_a_compiled_update_has_the_masks_of_the_plain_one(make, compiles, loss_fn):
    truth = gradients(make, COUNT, loss_fn=loss_fn)
    for micro_batch_size in (COUNT, 4, 1) if loss_fn is once else (4,):  # 4, 4, 3
        found = gradients(make, micro_batch_size, compiles=compiles, loss_fn=loss_fn)
        assert relative_error(found, truth) < 1e-12, micro_batch_size
    assert graphs() > 0 == breaks()


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.skipif(not any(map(which, ("g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("make", [Recomputed, Unread])
def test_inductor_keeps_calls_and_masks_as_well(make):
    truth = gradients(make, COUNT)
    found = gradients(make, 4, compiles=whole, backend="inductor", loss_fn=once)
    assert relative_error(found, truth) < 1e-12
    assert graphs() > 0 == breaks()


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_the_compiler_may_make_masks_again_in_the_backward_pass(budget, monkeypatch):
    truth = gradients(Unread, COUNT, loss_fn=twice)
    recomputed, drawn = [], KeyedRandomness.drawn

    def watched(self, *args, **how):
        recomputed.append(self._recomputing)
        return drawn(self, *args, **how)

    monkeypatch.setattr(KeyedRandomness, "drawn", watched)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        found = gradients(Unread, 4, compiles=whole, loss_fn=twice)
    assert any(recomputed)
    assert relative_error(found, truth) < 1e-12


def test_layers_of_equal_code_share_a_graph():
    gradients(Blocks, 4, compiles=by_blocks)
    # of inputs without a gradient and with one, of four samples and of any number
    assert graphs() <= 4 < 2 * BLOCKS


def test_equal_networks_have_equal_graphs_so_that_a_cache_has_them():
    found = []

    def backend(graph, inputs):
        calls = (n for n in graph.graph.nodes if n.target is torch.ops.lbaccel.drawn)
        found.append([node.args[1] for node in calls])
        return graph.forward

    for _ in range(2):
        torch._dynamo.reset()
        gradients(Unread, COUNT, compiles=whole, backend=backend)
    assert len(found[0]) == len(set(found[0])) == 9 * BLOCKS
    assert found[0] == found[1] and len(found) == 2


def test_graphs_that_end_between_the_masks_go_on_counting():
    truth = gradients(Broken, COUNT)
    assert relative_error(gradients(Broken, 4, compiles=whole), truth) < 1e-12
    assert graphs() > 2


@pytest.mark.parametrize("draw", DRAWS)
def test_a_mask_in_a_graph_is_the_same_wherever_the_samples_stand(draw):
    truth = one_update(Network(draw), *tokens(), micro_batch_size=8, loss_fn=mean_squares)
    model = Network(draw)
    model.compile(backend="aot_eager")
    found = one_update(model, *tokens(), micro_batch_size=3, loss_fn=mean_squares)
    assert relative_error(found[1], truth[1]) < 1e-12
    assert graphs() > 0 == breaks()


def places(*ndims, dim=0):
    return Layouts(tuple(SamplePlace(dim, 1, ndim) for ndim in ndims))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in LAYERS),
        *((name, dtype) for name in ("Dropout", "DropPath") for dtype in OTHER_DTYPES),
    ],
    ids=str,
)
def test_a_compiled_layer_gives_the_bits_of_the_plain_one(name, dtype):
    layer, shape = LAYERS[name]
    x = torch.randn(9, *shape).to(dtype)
    place = SamplePlace(None if "of the batch" in name else 0, 1, x.ndim)
    randomness = KeyedRandomness(3, CPU, Layouts((place, place)))

    def calls(x):
        return layer(x.clone()), layer(x.clone())

    compiled = torch.compile(calls, backend="aot_eager")
    compiled(x[:4])  # a graph that is of no update
    with randomness.update(2):
        for start, samples in ((0, 4), (4, 4), (8, 1)):
            rows, micro_batch = x[start : start + samples], MicroBatch(start, (samples,))
            with randomness.forward(micro_batch):
                truth = calls(rows)
            with randomness.forward(micro_batch):
                found = compiled(rows)
            for a, b in zip(found, truth, strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)
    for network in (calls, compiled):
        torch.manual_seed(7)
        found = network(x)
        truth = truth if network is compiled else found
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
    assert graphs() > 0 == breaks()


def rank_gradients(rank, make):
    return gradients(make, 2, compiles=whole, accelerator=Accelerator(cpu=True))


@pytest.mark.parametrize("make", [Blocks, Unread])
def test_compiled_ranks_draw_the_masks_of_one_process(make):
    truth = gradients(make, COUNT)
    for found in values(run_forked(rank_gradients, make, world_size=2)):
        assert relative_error(found, truth) < 1e-12


# -- where a graph may not hold the calls ---------------------------------------------------------


def both(run):
    """What `run` gives of the plain network, and of the compiled one."""
    torch.manual_seed(0)
    x, found = torch.randn(5, 6, 8, dtype=torch.float64), []
    for compiles in (lambda *_: None, whole):
        compiles(model := Blocks(), "aot_eager")
        randomness = KeyedRandomness(0, CPU, places(*[3] * 3 * BLOCKS))
        torch.manual_seed(5)
        found.append(list(run(model, x, randomness)))
    return zip(*found, strict=True)


def test_outside_of_an_update_the_random_stream_is_the_users():
    def run(model, x, randomness):
        for update in range(2):
            yield from (model(x), torch.rand(2))
            with randomness.update(update), randomness.forward(MicroBatch(0, (5,))):
                yield model(x)
            yield from (model(x), torch.rand(2), model.eval()(x))
            model.train()

    for plain, compiled in both(run):
        assert torch.equal(compiled, plain)
    assert graphs() > 0 == breaks()


@pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch compiles no second run of such a break: it diverges"
)
def test_outside_of_a_micro_batch_calls_have_no_keys_and_break_the_graph():
    def run(model, x, randomness):
        with randomness.update(0):
            with randomness.forward(MicroBatch(0, (5,))):
                yield model(x)
            assert breaks() == 0
            yield from (model(x), torch.rand(2))
            with randomness.forward(MicroBatch(0, (5,))), randomness.whole(5, counts=True):
                randomness.skip(3 * BLOCKS)
                yield model(x)

    for plain, compiled in both(run):
        assert torch.equal(compiled, plain)
    assert graphs() > 0


def test_a_tensor_without_a_place_for_its_samples_breaks_the_graph_and_is_drawn_as_before():
    how = {"micro_batch_size": 3, "loss_fn": mean_squares}
    found = []
    for compiles in (False, True):
        model = Network(of_some_rows)
        if compiles:
            model.compile(backend="aot_eager")
        with pytest.warns(UserWarning, match="no dimension holds the samples"):
            found.append(one_update(model, *tokens(), **how)[1])
    assert relative_error(*found) < 1e-12
    assert breaks() > 0


def test_a_call_that_was_not_learned_says_so_through_the_graph():
    randomness = KeyedRandomness(0, CPU, places(2))
    compiled = torch.compile(lambda x: F.dropout(F.dropout(x, 0.5), 0.5), backend="aot_eager")
    forward = randomness.forward(MicroBatch(0, (4,)))
    with randomness.update(0), pytest.raises(NotLearned, match="more than 1"), forward:
        compiled(torch.ones(4, 2))


def test_a_mask_that_the_compiler_writes_into_is_not_the_one_kept_for_the_next_samples():
    randomness = KeyedRandomness(0, CPU, places(2))

    def drawn(keep):
        with randomness.forward(MicroBatch(0, (4,))):
            return torch.ops.lbaccel.drawn(randomness.order, 0, [4, 6], 1, [], keep, CPU)

    with randomness.update(0):
        for keep in (0.5, None):
            first = drawn(keep)
            truth = first.clone()
            first.zero_()
            assert truth.any() and torch.equal(drawn(keep), truth)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("covered", "each", "keep"), [(1, [], 0.5), (3, [], 0.5), (1, [5], None)])
def test_the_operator_keeps_what_it_declares(covered, each, keep, dim):
    """Shape, strides and dtype of its result, what it writes, and how it is traced."""
    randomness = KeyedRandomness(0, CPU, places(*[3] * 20, dim=dim))
    arguments = (0, [4, 4, 6], covered, each, keep, CPU)
    with randomness.update(0), randomness.forward(MicroBatch(0, (4,))):
        torch.library.opcheck(
            torch.ops.lbaccel.drawn.default, (randomness.order, *arguments),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )  # fmt: skip
        out = torch.ops.lbaccel.drawn(randomness.order, *arguments)
        randomness.skip(20 - randomness.num_calls)
    assert out.is_contiguous()


def test_a_recompute_that_puts_no_random_state_back_is_refused():
    class Careless(Blocks):
        def run(self, block, x):
            return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)

    with pytest.raises(InputError, match="preserve_rng_state=True"):
        gradients(Careless, 4, compiles=by_blocks)
