"""Photographs: timm's augmentation at the same draws, and draws that belong to the sample alone."""

from __future__ import annotations

import random
from functools import partial
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_crops import scripted, smooth
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import functional as of_pillow

from lbaccel import BatchPlan, UpdateLoader
from lbaccel.data import augment
from lbaccel.data import photographs as module
from lbaccel.data.colour import ORDERS
from lbaccel.data.crops import BoxDraws
from lbaccel.data.images import ImageFiles, read_image
from lbaccel.data.photographs import NUM_DRAWS, Photographs
from lbaccel.data.pipelines import (
    EvaluationBatches,
    evaluation_batches,
    evaluation_transform,
    training_set,
)
from lbaccel.errors import InputError

COUNT, SIZE = 12, 32
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PREPROCESSING = {
    "img_size": SIZE,
    "mean": MEAN,
    "std": STD,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "decoder": "fast",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """JPEG and PNG of several sizes, one of them grey."""
    folder = tmp_path_factory.mktemp("images")
    names = []
    for number in range(COUNT):
        generator = np.random.default_rng(number)
        height, width = generator.integers(40, 100, 2).tolist()
        image = smooth(height, width, number)
        name = f"{number}.{'png' if number % 3 == 0 else 'jpg'}"
        (image.convert("L") if number == 4 else image).save(folder / name)
        names.append(name)
    read = partial(read_image, root=str(folder))
    return ImageFiles(tuple(names), tuple(n % 2 for n in range(COUNT)), ("a", "b"), names, read)


def of(images, **options):
    return Photographs(images, MEAN, STD, SIZE, **{"seed": 5, "random_erasing": 0.4, **options})


def load(photographs, indices, epoch=0):
    rows = np.asarray(indices, dtype=np.int64)
    epochs = np.full_like(rows, epoch)
    return photographs.finish(photographs.load(rows, epochs), rows, epochs)[0]


def slowly(photographs, index, epoch, monkeypatch):
    """timm's and torchvision's own functions on Pillow's images, at the same draws."""
    ((*draws,),) = photographs.draws(np.array([index]), np.array([epoch]))
    of_crop = BoxDraws(
        draws[module.AREAS], draws[module.RATIOS], draws[module.TOP], draws[module.LEFT]
    )
    image = photographs.source.load(index)
    with monkeypatch.context() as patched:
        scripted(patched, of_crop)
        image = RandomResizedCropAndInterpolation(
            SIZE, photographs.scale, photographs.ratio, photographs.interpolation
        )(image)
    if draws[module.FLIP] < photographs.flip:
        image = of_pillow.hflip(image)
    s = photographs.color_jitter
    factors = {
        name: max(0.0, 1 - s) + u * (1 + s - max(0.0, 1 - s))
        for name, u in (
            ("brightness", draws[module.BRIGHTNESS]),
            ("contrast", draws[module.CONTRAST]),
            ("saturation", draws[module.SATURATION]),
        )
    }
    for what in ORDERS[int(draws[module.ORDER] * 6)]:
        name = ("brightness", "contrast", "saturation")[what]
        image = getattr(of_pillow, f"adjust_{name}")(image, factors[name])
    return of_pillow.normalize(of_pillow.to_tensor(image), MEAN, STD)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.5])
def test_an_image_is_that_of_timms_transform_at_the_same_draws(
    images, interpolation, strength, monkeypatch
):
    fast = of(images, interpolation=interpolation, color_jitter=strength, random_erasing=0.0)
    unit = 255 * torch.tensor(STD).view(3, 1, 1)
    for epoch in (0, 3):
        found = load(fast, range(COUNT), epoch)
        for index in range(COUNT):
            apart = (found[index] - slowly(fast, index, epoch, monkeypatch)).abs() * unit
            assert apart.mean() < 0.25  # of 0..255
            assert apart.max() < 8  # 1 of the resize, times what the jitter makes of it


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_no_partition_changes_a_pixel(images, data):
    photographs = of(images)
    whole = load(photographs, range(COUNT), 7)
    order = data.draw(st.permutations(range(COUNT)))
    cuts = sorted(data.draw(st.sets(st.integers(1, COUNT - 1))))
    parts = [
        load(photographs, order[start:end], 7)
        for start, end in zip([0, *cuts], [*cuts, COUNT], strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole[order])


def epoch_of(data, *, micro, workers=0, world_size=1, repeats=1):
    """The updates of an epoch in the order of the stream, of all ranks."""
    ranks = []
    for rank in range(world_size):
        plan = BatchPlan(global_batch_size=COUNT, micro_batch_size=micro, world_size=world_size)
        loader = UpdateLoader(
            data, plan, rank=rank, seed=5, num_workers=workers, repeats=repeats, last_update="keep"
        )
        ((*parts,),) = (list(update) for update in loader)
        loader.close()
        ranks.append({m.start: batch for m, batch in parts})
    rows = sorted((start, *batch) for rank in ranks for start, batch in rank.items())
    return torch.cat([row[1] for row in rows]), torch.cat([row[2] for row in rows])


@pytest.mark.parametrize(
    ("micro", "workers", "world_size"), [(1, 0, 1), (5, 1, 1), (3, 2, 1), (2, 0, 3), (6, 1, 2)]
)
def test_neither_workers_nor_ranks_change_a_pixel(images, micro, workers, world_size):
    expected, labels = epoch_of(of(images), micro=COUNT)
    found = epoch_of(of(images), micro=micro, workers=workers, world_size=world_size)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], labels)
    assert len(expected.flatten(1).unique(dim=0)) == COUNT


def test_copies_of_an_image_have_draws_of_their_own(images):
    found, _ = epoch_of(of(images), micro=4, repeats=3)
    assert len(found.flatten(1).unique(dim=0)) == COUNT


def test_another_epoch_seed_or_sample_has_other_draws(images):
    one = np.array([3])
    base = of(images).draws(one, np.array([2]))
    for other in (
        of(images).draws(one, np.array([3])),
        of(images, seed=6).draws(one, np.array([2])),
        of(images).draws(np.array([4]), np.array([2])),
    ):
        assert not (other == base).any()


def test_no_two_kinds_of_draw_are_one():
    kinds = [getattr(module, name) for name in (
        "TOP", "LEFT", "FLIP", "BRIGHTNESS", "CONTRAST", "SATURATION", "ORDER", "ERASED",
        "ERASED_TOP", "ERASED_LEFT",
    )]  # fmt: skip
    for part in (module.AREAS, module.RATIOS, module.ERASED_AREAS, module.ERASED_RATIOS):
        kinds += range(NUM_DRAWS)[part]
    assert sorted(kinds) == list(range(NUM_DRAWS))
    of_others = [v for k, v in vars(augment).items() if k.isupper() and isinstance(v, int)]
    taken = {n for n in of_others if n != augment.GREY}
    numbers = {*range(module.FIRST_DRAW, module.FIRST_DRAW + NUM_DRAWS), module.NOISE}
    assert taken == set(range(1, 8))
    assert len(numbers) == NUM_DRAWS + 1
    assert not taken & numbers


def test_all_draws_are_uniform_and_have_no_part_in_each_other(images):
    count = 4000
    draws = of(images).draws(np.arange(count), np.arange(count) % 7)
    assert abs(draws.mean(0) - 0.5).max() < 5 / np.sqrt(12 * count)
    correlation = np.corrcoef(draws.T) - np.eye(NUM_DRAWS)
    assert abs(correlation).max() < 5 / np.sqrt(count)


def test_what_is_erased_is_normal_noise_in_a_box_and_the_rest_is_untouched(images):
    plain = load(of(images, random_erasing=0.0), range(COUNT))
    always = load(of(images, random_erasing=1.0), range(COUNT))
    changed = plain != always
    assert changed.flatten(1).any(1).all()
    for where in changed.all(1):
        rows, columns = where.any(1).nonzero(), where.any(0).nonzero()
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert where.sum() == area
        assert 0.01 < area / SIZE**2 < 0.4
    noise = always[changed]
    assert abs(noise.mean()) < 0.1
    assert noise.std() == pytest.approx(1, abs=0.05)
    some = load(of(images, random_erasing=0.4), range(COUNT))
    erased = (some != plain).flatten(1).any(1)
    assert 0 < int(erased.sum()) < COUNT
    assert torch.equal(some[erased], always[erased])


def test_the_generators_of_the_process_are_not_touched(images):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    load(of(images), range(COUNT))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_the_training_set_takes_the_users_settings(images):
    options = {"scale": (0.3, 0.9), "ratio": (1.0, 1.5), "hflip": 0.1, "color_jitter": 0.7}
    found = training_set(images, preprocessing=PREPROCESSING, seed=2, random_erasing=0.6, **options)
    expected = Photographs(
        images, MEAN, STD, SIZE, 2, "bicubic", (0.3, 0.9), (1.0, 1.5), 0.1, 0.7, 0.6
    )
    assert found == expected
    plain = training_set(images, preprocessing=PREPROCESSING, seed=2)
    assert plain == Photographs(images, MEAN, STD, SIZE, 2)
    assert training_set(images, preprocessing=PREPROCESSING, seed=2, mirror=False).flip == 0


def test_a_policy_and_older_runs_take_timms_transform(images):
    policy = training_set(images, preprocessing=PREPROCESSING, seed=2, auto_augment="rand-m9")
    older = {key: value for key, value in PREPROCESSING.items() if key != "decoder"}
    for found in (policy, training_set(images, preprocessing=older, seed=2)):
        assert not isinstance(found, Photographs)
        assert found[0][0].shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_as_before(images, tmp_path, workers):
    (tmp_path / "0.jpg").write_bytes(b"\xff\xd8\xff no image")
    broken = ImageFiles(
        ("0.jpg",) * 4, (0,) * 4, ("a",), ("0.jpg",) * 4, partial(read_image, root=str(tmp_path))
    )
    texts = set()
    for decoder in ("fast", "pillow"):
        pre = {**PREPROCESSING, "decoder": decoder}
        data = training_set(broken, preprocessing=pre, seed=2)
        plan = BatchPlan(global_batch_size=4, micro_batch_size=2)
        (update,) = UpdateLoader(data, plan, num_workers=workers)
        with pytest.raises(InputError, match=r"0\.jpg can't be read as an image") as caught:
            list(update)
        texts.add(str(caught.value))
        with pytest.raises(InputError) as caught:
            list(evaluation_batches(broken, preprocessing=pre, batch_size=2, num_workers=workers))
        texts.add(str(caught.value))
    assert len(texts) == 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_has_the_pixels_of_timms_transform_within_a_byte(images, interpolation):
    pre = {**PREPROCESSING, "interpolation": interpolation}
    ((fast, labels),) = evaluation_batches(images, preprocessing=pre, batch_size=COUNT)
    pre |= {"decoder": "pillow"}
    ((slow, of_slow),) = evaluation_batches(images, preprocessing=pre, batch_size=COUNT)
    apart = (fast - slow).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
    assert apart.max() < 1.01
    assert apart.mean() < 0.1
    assert torch.equal(labels, of_slow)


def test_evaluation_has_each_image_once_in_any_batches(images):
    expected = [evaluation_transform(PREPROCESSING)(images.load(i)) for i in range(COUNT)]
    for size, workers in ((1, 0), (5, 2), (COUNT, 0)):
        options = {"batch_size": size, "num_workers": workers, "start": 2}
        batches = list(evaluation_batches(images, preprocessing=PREPROCESSING, **options))
        assert torch.equal(torch.cat([x for x, _ in batches]), torch.stack(expected[2:]))
        assert torch.cat([y for _, y in batches]).tolist() == list(images.labels[2:])


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
def test_the_workers_of_an_evaluation_stay_and_a_pass_that_was_left_leaves_nothing(images, decoder):
    pre = {**PREPROCESSING, "decoder": decoder}
    ((expected, labels),) = EvaluationBatches(images, preprocessing=pre)(0, COUNT)
    before = set(active_children())
    batches = EvaluationBatches(images, preprocessing=pre, num_workers=2)
    pids = set()
    for start, size, read in ((0, 2, 99), (0, 1, 3), (3, 5, 99), (1, 4, 1), (0, COUNT, 99)):
        rows = start
        for number, (found, of_found) in enumerate(batches(start, size), start=1):
            assert torch.equal(found, expected[rows : rows + size])
            assert torch.equal(of_found, labels[rows : rows + size])
            rows += len(found)
            if number == read:
                break
        assert rows == (COUNT if read == 99 else start + size * read)
        pids.add(frozenset(child.pid for child in set(active_children()) - before))
    assert len(pids) == 1 and len(*pids) == 2
    batches.close()
    assert set(active_children()) <= before


def test_each_rank_evaluates_its_own_share(images):
    ((_, labels),) = EvaluationBatches(images, preprocessing=PREPROCESSING)(0, COUNT)
    for rank in range(3):
        share = EvaluationBatches(images, preprocessing=PREPROCESSING, rank=rank, world_size=3)
        assert torch.equal(torch.cat([y for _, y in share(1, 2)]), labels[rank::3][1:])


def test_a_batch_that_the_caller_has_stays_as_it_is(images):
    """Also where one image of it is left, in training and in evaluation."""
    photographs, evaluation = of(images), EvaluationBatches(images, preprocessing=PREPROCESSING)
    batches, copies = [], []
    for epoch in range(4):
        batches.append(load(photographs, range(COUNT), epoch)[-1 if epoch == 3 else slice(5)])
        copies.append(batches[-1].clone())
    for batch, _ in (*evaluation(0, COUNT), *evaluation(0, 8)):
        batches.append(batch)
        copies.append(batch.clone())
    load(photographs, range(COUNT), 4)
    assert all(torch.equal(a, b) for a, b in zip(batches, copies, strict=True))
