"""timm's training transform by its own names: each setting read, each draw keyed by its sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import ColorJitter, RandomHorizontalFlip

from lbaccel import BatchPlan, UpdateLoader
from lbaccel.data.images import ImageArray, ImageFiles
from lbaccel.data.pipelines import evaluation_transform, training_set

PREPROCESSING = {
    "img_size": 24,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bilinear",
    "crop_pct": 0.9,
}
COUNT = 8


@pytest.fixture
def files(tmp_path):
    generator = np.random.default_rng(0)
    names = [str(tmp_path / f"{i}.png") for i in range(COUNT)]
    for name in names:
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(name)
    return ImageFiles(names, [0, 1] * (COUNT // 2), ("a", "b"), names)


def in_memory():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (COUNT, 3, 24, 24), generator=generator, dtype=torch.uint8)
    return ImageArray(images, torch.arange(COUNT) % 2, ("a", "b"))


def steps(source, **options):
    return training_set(source, preprocessing=PREPROCESSING, seed=0, **options).transform.transforms


def test_without_settings_it_is_timms_transform_as_it_was(files):
    before = create_transform(
        (3, 24, 24),
        is_training=True,
        interpolation="bilinear",
        mean=PREPROCESSING["mean"],
        std=PREPROCESSING["std"],
    )
    assert [str(step) for step in steps(files)] == [str(step) for step in before.transforms]


def test_each_setting_is_that_of_timms_transform(files):
    crop, *others = steps(
        files, scale=(0.3, 0.9), ratio=(1.0, 1.5), hflip=0.1, color_jitter=0.7, random_erasing=0.6
    )
    assert (crop.scale, crop.ratio) == ((0.3, 0.9), (1.0, 1.5))
    by_type = {type(step): step for step in others}
    assert by_type[RandomHorizontalFlip].p == 0.1
    assert by_type[ColorJitter].brightness == pytest.approx((0.3, 1.7))
    erasing = by_type[RandomErasing]
    assert (erasing.probability, erasing.per_pixel, erasing.max_count) == (0.6, True, 1)


def test_zero_takes_a_mirror_image_and_the_colours_away(files):
    kinds = {type(step) for step in steps(files, hflip=0.0)}
    assert RandomHorizontalFlip not in kinds and ColorJitter in kinds
    jitter = next(s for s in steps(files, color_jitter=0.0) if isinstance(s, ColorJitter))
    assert (jitter.brightness, jitter.contrast, jitter.saturation) == (None, None, None)


def test_images_in_memory_are_mirrored_as_often_as_asked():
    assert training_set(in_memory(), preprocessing=PREPROCESSING, seed=0).flip == 0.5
    for hflip in (0.0, 0.2):
        found = training_set(in_memory(), preprocessing=PREPROCESSING, seed=0, hflip=hflip)
        assert found.flip == hflip
    by_default = training_set(in_memory(), preprocessing=PREPROCESSING, seed=0, mirror=False)
    assert by_default.flip == 0.0


def epoch_of(source, *, micro, workers=0):
    data = training_set(
        source, preprocessing=PREPROCESSING, seed=3, random_erasing=0.5, color_jitter=0.3
    )
    plan = BatchPlan(global_batch_size=COUNT, micro_batch_size=micro)
    (update,) = UpdateLoader(data, plan, seed=3, num_workers=workers)
    return torch.cat([images for _, (images, _) in update.micro_batches])


@pytest.mark.parametrize(("micro", "workers"), [(1, 0), (3, 0), (4, 2)])
def test_what_is_erased_depends_on_the_sample_and_on_no_plan(files, micro, workers):
    expected = epoch_of(files, micro=COUNT)
    assert torch.equal(epoch_of(files, micro=micro, workers=workers), expected)
    plain = training_set(files, preprocessing=PREPROCESSING, seed=3, color_jitter=0.3)
    plan = BatchPlan(global_batch_size=COUNT, micro_batch_size=COUNT)
    (update,) = UpdateLoader(plain, plan, seed=3)
    ((_, (without, _)),) = update.micro_batches
    changed = (without != expected).flatten(1).any(1)
    assert 0 < int(changed.sum()) < COUNT


@pytest.mark.parametrize("size", [(1, 3000), (3000, 2), (40, 30)])
def test_a_strip_is_cut_to_its_middle_before_it_is_enlarged(size, monkeypatch):
    """1 x 3000 pixels, enlarged whole to 256 on the short side, would take 1.6 GB."""
    seen = []
    plain = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, to, *a, **k: seen.append(to) or plain(self, to, *a, **k)
    )
    pre = {"img_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    out = evaluation_transform({**pre, "crop_pct": 0.875})(Image.new("RGB", size, (9, 99, 200)))
    assert out.shape == (3, 32, 32)
    assert max(max(to) for to in seen) <= 20 * 37
