"""Views are a pure function of (seed, image, view), at any size; order depends on (seed, epoch)."""

import numpy as np
import pytest

from utils import views

ALL = {
    "flip": True,
    "rotation": 10.0,
    "shift": 0.1,
    "zoom": 0.1,
    "brightness": 0.1,
    "contrast": 0.2,
    "cutout": 0.25,
}
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 32, 32, 1), dtype="uint8")
TARGETS = np.arange(20, dtype="float32")[:, None]


def batches_of(epoch, **changes):
    options = {"batch_size": 4, "seed": 3, "augmentation": ALL, "epoch": lambda: epoch}
    dataset = views.training_batches(PIXELS, TARGETS, **(options | changes))
    return [[np.asarray(part) for part in batch] for batch in dataset]


def test_a_view_depends_on_its_own_numbers_alone():
    few, many = views.parameters(1, 5, 2, ALL), views.parameters(1, 50, 2, ALL)
    assert np.array_equal(few, many[:5]) and few.shape == (5, 12) and few.dtype == np.float32
    assert not np.array_equal(few, views.parameters(1, 5, 3, ALL))
    assert not np.array_equal(few, views.parameters(2, 5, 2, ALL))
    with pytest.raises(ValueError, match="rotate"):
        views.parameters(1, 5, 2, {"rotate": 3})


def test_without_augmentation_the_image_stays():
    same = views.augment(PIXELS, views.parameters(0, 20, 0, None))
    assert np.allclose(same, PIXELS, atol=1e-3)


def test_each_kind_of_change_does_what_it_says():
    def changed(**augmentation):
        return np.asarray(views.augment(PIXELS, views.parameters(0, 20, 0, augmentation)))

    flipped = changed(flip=True)
    mirrored = [np.allclose(a, b[:, ::-1], atol=1e-2) for a, b in zip(flipped, PIXELS, strict=True)]
    assert 4 < sum(mirrored) < 16
    brighter = changed(brightness=0.2) - PIXELS
    assert np.abs(np.median(brighter, axis=(1, 2, 3))).max() > 10
    assert (changed(cutout=0.5) == views.GRAY).mean() > 0.1
    for name in ("rotation", "shift", "zoom", "contrast"):
        out = changed(**{name: 20.0 if name == "rotation" else 0.3})
        assert not np.allclose(out, PIXELS, atol=1) and out.min() >= 0 and out.max() <= 255


def test_a_view_at_two_sizes_shows_the_same():
    smooth = np.zeros((1, 64, 64, 1), "uint8")
    smooth[:, 10:30, 20:50] = 200
    small = smooth.reshape(1, 32, 2, 32, 2, 1).mean((2, 4)).astype("uint8")
    drawn = views.parameters(5, 1, 1, {"rotation": 20.0, "shift": 0.2})
    large = np.asarray(views.augment(smooth, drawn)).reshape(1, 32, 2, 32, 2, 1).mean((2, 4))
    assert np.abs(large - np.asarray(views.augment(small, drawn))).mean() < 3


def test_an_epoch_shows_each_image_once_and_can_be_made_again():
    first, again, other = batches_of(0), batches_of(0), batches_of(1)
    rows = np.concatenate([y[:, 0] for _, y in first])
    assert sorted(rows) == list(range(20))
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(rows, np.concatenate([y[:, 0] for _, y in other]))


def test_iterating_again_asks_for_the_epoch_again():
    epochs = iter(range(10))
    now = {"epoch": 0}
    dataset = views.training_batches(
        PIXELS, TARGETS, batch_size=4, seed=3, augmentation=ALL, epoch=lambda: now["epoch"]
    )
    seen = []
    for _ in range(3):
        now["epoch"] = next(epochs)
        seen.append(np.concatenate([np.asarray(x) for x, _ in dataset]))
    for epoch, x in enumerate(seen):
        assert np.array_equal(x, np.concatenate([x for x, _ in batches_of(epoch)]))


def test_stored_views_come_again_with_their_targets():
    asked = []

    def targets(view):
        asked.append(view)
        return TARGETS + 100 * view

    data = batches_of(7, views=3)
    dataset = views.training_batches(
        PIXELS, targets, batch_size=4, seed=3, augmentation=ALL, epoch=lambda: 7, views=3
    )
    for (x, _), (x_again, y) in zip(data, dataset, strict=True):
        assert np.array_equal(x, np.asarray(x_again)) and (np.asarray(y) >= 100).all()
    assert set(asked) == {1}
    one_view = np.concatenate(
        [np.asarray(x) for x in views.view_batches(PIXELS, view=1, seed=3, augmentation=ALL)]
    )
    rows = np.concatenate([np.asarray(y)[:, 0] - 100 for _, y in dataset]).astype(int)
    assert np.allclose(np.concatenate([x for x, _ in data]), one_view[rows], atol=1e-3)


def test_evaluation_batches_are_whole_and_even():
    shown = list(views.evaluation_batches(PIXELS, TARGETS, batch_size=9))
    assert [len(x) for x, _ in shown] == [6, 7, 7]
    assert np.array_equal(np.concatenate([x for x, _ in shown]), PIXELS)
    assert np.array_equal(np.concatenate([y for _, y in shown]), TARGETS)


def test_weights_and_bad_input():
    weights = views.class_weights(np.array([0, 0, 0, 1]))
    assert weights.mean() == pytest.approx(1) and weights[3] == pytest.approx(3 * weights[0])
    assert len(batches_of(0, weights=np.ones(20))[0]) == 3
    with pytest.raises(ValueError, match="lower it"):
        batches_of(0, batch_size=21)
    with pytest.raises(ValueError, match="targets have shape"):
        views.training_batches(
            PIXELS, TARGETS[:3], batch_size=4, seed=0, augmentation=None, epoch=lambda: 0
        )
