from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from lbaccel.batch.plan import BatchPlan, MicroBatch
from lbaccel.data.augment import CROP_X, CROP_Y, FLIP, GroupMix, KeyedImages
from lbaccel.data.sources import ImageArray
from lbaccel.errors import InputError
from lbaccel.randomness.keys import keyed_uniform

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def image_array(count=12, channels=3, height=8, width=10):
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, height, width)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return ImageArray(images, torch.arange(count) % 3, ("a", "b", "c"))


def keys(count=12, epoch=0):
    return np.arange(count), np.full(count, epoch)


def test_crops_and_mirrors_equal_padding_and_slicing_one_image_at_a_time():
    source = image_array()
    images, labels = KeyedImages(source, MEAN, STD, seed=5, pad=2, flip=0.5).fetch(*keys(epoch=3))
    moved = 0
    for i in range(12):
        y, x = (int(keyed_uniform(5, 3, i, draw) * 5) for draw in (CROP_Y, CROP_X))
        frame = F.pad(source.images[i], [2] * 4)[:, y : y + 8, x : x + 10]
        if keyed_uniform(5, 3, i, FLIP) < 0.5:
            frame = frame.flip(2)
        truth = (frame / 255.0 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
            :, None, None
        ]
        torch.testing.assert_close(images[i], truth, rtol=1e-5, atol=1e-5)
        moved += not torch.equal(frame, source.images[i])
    assert moved > 6 and torch.equal(labels, source.labels)


@pytest.mark.parametrize(
    ("padding", "numpys"),
    [
        ("zero", {"mode": "constant"}),
        ("grey", {"mode": "constant", "constant_values": 127}),
        ("reflect", {"mode": "reflect"}),
    ],
)
def test_the_frame_of_a_crop_is_padded_as_numpy_does(padding, numpys):
    source = image_array()
    found, _ = KeyedImages(source, MEAN, STD, seed=5, pad=3, padding=padding).fetch(*keys(epoch=3))
    indices, epochs = keys(epoch=3)
    y, x = ((keyed_uniform(5, epochs, indices, d) * 7).astype(int) for d in (CROP_Y, CROP_X))
    assert len(set(y)) > 3
    for i, row in enumerate(indices):
        frame = np.pad(source.images[row].numpy(), [(0, 0), (3, 3), (3, 3)], **numpys)
        crop = frame[:, y[i] : y[i] + 8, x[i] : x[i] + 10].copy()
        expected = KeyedImages(source, MEAN, STD).normalise(torch.from_numpy(crop)[None])
        assert torch.equal(found[i], expected[0])


def test_an_image_of_one_pixel_is_its_own_mirror_image():
    source = ImageArray(torch.full((9, 3, 1, 1), 77, dtype=torch.uint8), torch.zeros(9), ("x",))
    images = KeyedImages(source, MEAN, STD, pad=1, padding="reflect")
    found, _ = images.fetch(np.arange(9), np.zeros(9, int))
    assert torch.equal(found, images.normalise(source.images))


def test_the_set_itself_is_left_as_it_is():
    source = image_array(9, height=8, width=10)
    before = source.images.clone()
    images = KeyedImages(source, MEAN, STD, flip=1.0)
    found, _ = images.fetch(np.arange(9), np.zeros(9, int))
    assert torch.equal(source.images, before)
    assert torch.equal(found, images.normalise(before.flip(3)))


def test_another_padding_is_refused():
    with pytest.raises(InputError, match="padding='mirror' is not one of 'zero', 'grey', 'reflec"):
        KeyedImages(image_array(), MEAN, STD, padding="mirror")


def test_shifts_and_mirrors_have_their_distribution_and_change_with_the_epoch():
    indices = np.arange(4000)
    shifts = [(keyed_uniform(0, e, indices, CROP_Y) * 5).astype(int) for e in (0, 1)]
    assert stats.chisquare(np.bincount(shifts[0], minlength=5)).pvalue > 0.001
    assert abs(np.mean(shifts[0] == shifts[1]) - 0.2) < 0.03


def test_images_are_resized_as_torch_does():
    source = image_array(2, height=8, width=8)
    images, _ = KeyedImages(source, MEAN, STD, img_size=16).fetch(*keys(2))
    resized = F.interpolate(source.images.float(), (16, 16), mode="bicubic", antialias=True)
    truth = resized.clamp(0, 255) / 255
    truth = (truth - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(images, truth, rtol=1e-4, atol=1e-4)


def mixed(mix, plan, count=12, epoch=1):
    """The whole update's images and targets, a micro-batch at a time."""
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.rand(count, 3, 6, 6, generator=generator), torch.arange(count) % 3
    parts = []
    for micro in plan.partition(0, count):
        rows = np.arange(micro.start, micro.start + micro.num_samples)
        data = images[rows], labels[rows]
        parts.append(mix(data, micro, rows, np.full(len(rows), epoch)))
    return images, [torch.cat(part) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.4, 1.0)])
@pytest.mark.parametrize("norm", [None, 3, 5])
def test_no_cut_into_micro_batches_changes_what_is_mixed(alphas, norm):
    mix = GroupMix(3, *alphas, label_smoothing=0.1, seed=2)
    unit = norm or 2
    ends = []
    for factor in (1, 2, 12):
        plan = BatchPlan(
            global_batch_size=12,
            micro_batch_size=unit * factor,
            norm_batch_size=norm,
            mix_pairs=norm is None,
        )
        ends.append(mixed(mix, plan)[1])
    for images, targets in ends[1:]:
        assert torch.equal(images, ends[0][0]) and torch.equal(targets, ends[0][1])
    torch.testing.assert_close(ends[0][1].sum(1), torch.ones(12))


def test_mixup_is_a_blend_with_the_mirrored_place_of_its_group():
    mix = GroupMix(3, mixup=0.8, seed=2)
    plan = BatchPlan(global_batch_size=12, micro_batch_size=6, norm_batch_size=3)
    images, (blended, targets) = mixed(mix, plan)
    labels = torch.arange(12) % 3
    one_hot = torch.eye(3)
    shares = []
    for i in range(12):
        group, place = divmod(i, 3)
        j = group * 3 + 2 - place
        if i == j:
            torch.testing.assert_close(blended[i], images[i])
            continue
        share = float(((blended[i] - images[j]) / (images[i] - images[j])).median())
        torch.testing.assert_close(
            blended[i], share * images[i] + (1 - share) * images[j], rtol=1e-3, atol=1e-4
        )
        truth = share * one_hot[labels[i]] + (1 - share) * one_hot[labels[j]]
        torch.testing.assert_close(targets[i], truth, rtol=1e-3, atol=1e-3)
        shares.append(round(share, 4))
    assert len(set(shares)) == len(shares)  # one lambda a sample


def test_cutmix_targets_count_the_pixels_that_were_pasted():
    mix = GroupMix(3, cutmix=1.0, seed=3)
    plan = BatchPlan(global_batch_size=12, micro_batch_size=2, mix_pairs=True)
    images, (pasted, targets) = mixed(mix, plan)
    labels = torch.arange(12) % 3
    boxes = 0
    for i in range(12):
        j = i ^ 1
        own = (pasted[i] == images[i]).all(0)
        assert ((pasted[i] == images[j]).all(0) | own).all()
        boxes += int((~own).any())
        truth = torch.zeros(3)
        truth[labels[i]] += own.float().mean()
        truth[labels[j]] += 1 - own.float().mean()
        torch.testing.assert_close(targets[i], truth)
    assert boxes >= 6


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_lambda_is_beta_distributed(alpha):
    count = 4000
    mix = GroupMix(2, mixup=alpha)
    data = torch.zeros(count, 1, 1, 1), torch.arange(count) % 2
    rows = np.arange(count)
    _, targets = mix(data, MicroBatch(0, (2,) * (count // 2)), rows, np.zeros(count, int))
    lam = targets[torch.arange(count), data[1]].double().numpy()
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 0.001


def test_label_smoothing_without_a_partner():
    mix = GroupMix(4, mixup=1.0, label_smoothing=0.2)
    data = torch.zeros(1, 1, 2, 2), torch.tensor([2])
    _, targets = mix(data, MicroBatch(0, (1,)), np.array([0]), np.array([0]))
    torch.testing.assert_close(targets[0], torch.tensor([0.05, 0.05, 0.85, 0.05]))


def test_nothing_to_mix_is_refused():
    with pytest.raises(InputError, match="give at least one above 0"):
        GroupMix(3)
