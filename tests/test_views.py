"""Views are pure functions of (seed, image, view); batches of (seed, epoch)."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from utils import views

FULL = {
    "flip": True,
    "rotation": 7.0,
    "shift": 0.05,
    "zoom": 0.1,
    "brightness": 0.1,
    "contrast": 0.1,
    "cutout": 60 / 384,
}


@pytest.fixture(scope="module")
def pixels():
    """Smooth pictures, so that resizing before or after a turn is nearly the same."""
    coarse = np.random.default_rng(0).integers(0, 256, (23, 6, 6), "uint8")
    large = [Image.fromarray(c).resize((48, 48), Image.Resampling.BICUBIC) for c in coarse]
    return np.stack([np.asarray(image) for image in large])[..., None]


@pytest.fixture(scope="module")
def labels():
    return np.array([0] * 14 + [1] * 6 + [2] * 3)


@pytest.fixture(scope="module")
def targets(labels):
    return np.eye(3, dtype="float32")[labels]


def collect(dataset):
    return [
        tuple(a.numpy() for a in (batch if isinstance(batch, tuple) else (batch,)))
        for batch in dataset
    ]


def digest(batches):
    joined = b"".join(array.tobytes() for batch in batches for array in batch)
    return hashlib.sha256(joined).hexdigest()


def train(pixels, targets, **changes):
    settings = {"batch_size": 5, "epochs": 3, "seed": 4, "augmentation": FULL} | changes
    return views.training_batches(pixels, targets, **settings)


# ---------------------------------------------------------------- parameters and augment


def test_a_row_depends_on_seed_image_and_view_alone():
    few, many = views.view_parameters(1, 5, 2, FULL), views.view_parameters(1, 50, 2, FULL)
    assert few.dtype == np.float32 and few.shape == (5, 12)
    assert (many[:5] == few).all()
    assert len(np.unique(many, axis=0)) == 50
    assert (views.view_parameters(2, 5, 2, FULL) != few).any()
    assert (views.view_parameters(1, 5, 3, FULL) != few).any()


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="not \\['rotate'\\]"):
        views.view_parameters(0, 3, 0, {"rotate": 3})


def test_nothing_asked_gives_the_image_itself(pixels):
    for nothing in (None, {}, dict.fromkeys(FULL, 0)):
        out = views.augment(pixels, views.view_parameters(0, len(pixels), 5, nothing))
        assert (np.asarray(out) == pixels).all()


def test_flip_mirrors_about_half_of_the_images(pixels):
    out = views.augment(pixels, views.view_parameters(0, len(pixels), 0, {"flip": True}))
    mirrored = (np.abs(np.asarray(out) - pixels[:, :, ::-1]) < 1e-3).all((1, 2, 3))
    kept = (np.asarray(out) == pixels).all((1, 2, 3))
    assert (mirrored ^ kept).all() and 5 < mirrored.sum() < 18


def test_a_shift_moves_by_a_fraction_of_the_side(pixels):
    parameters = np.tile(np.float32([1, 0, 0.25, 0, 1, 0, 1, 0, 0, 0, 0, 0]), (len(pixels), 1))
    out = np.asarray(views.augment(pixels, parameters))
    assert np.abs(out[:, :, :36] - pixels[:, :, 12:]).max() < 1e-3
    assert np.abs(out[:, :, 36:] - pixels[:, :, -1:]).max() < 1e-3  # the border is repeated


def test_a_quarter_turn_is_a_quarter_turn(pixels):
    parameters = np.tile(np.float32([0, -1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0]), (len(pixels), 1))
    out = np.asarray(views.augment(pixels, parameters))
    assert np.abs(out - np.rot90(pixels, axes=(1, 2))).max() < 1e-2


def test_brightness_contrast_and_their_limits(pixels):
    parameters = views.view_parameters(0, len(pixels), 0, {"brightness": 0.4, "contrast": 0.4})
    out = np.asarray(views.augment(pixels, parameters))
    gain, offset = parameters[:, 6, None, None, None], parameters[:, 7, None, None, None]
    assert np.abs(out - np.clip(pixels * gain + offset, 0, 255)).max() < 1e-3
    assert gain.min() >= 0.6 and gain.max() <= 1.4 and np.ptp(gain) > 0.3
    assert out.min() >= 0 and out.max() <= 255


def test_cutout_blanks_a_square_of_the_stated_side(pixels):
    parameters = views.view_parameters(0, len(pixels), 0, {"cutout": 0.25})
    blank = np.asarray(views.augment(pixels, parameters))[..., 0] == views.GRAY
    sides = np.stack([blank.any(1).sum(1), blank.any(2).sum(1)], axis=1)
    assert sides.max() in (12, 13) and (sides[:, 0] * sides[:, 1] == blank.sum((1, 2))).all()
    assert (blank.sum((1, 2)) >= 30).all()  # the centre is inside: a quarter remains at a corner


def test_teacher_and_student_sizes_see_the_same_view(pixels):
    parameters = views.view_parameters(3, len(pixels), 1, FULL)
    small = pixels.reshape(-1, 24, 2, 24, 2, 1).mean((2, 4))
    teacher = np.asarray(views.augment(pixels, parameters)).reshape(-1, 24, 2, 24, 2, 1)
    student = np.asarray(views.augment(small, parameters))
    difference = np.abs(teacher.mean((2, 4)) - student)
    other = views.augment(small, views.view_parameters(3, len(pixels), 2, FULL))
    assert np.median(difference) < 1
    assert np.mean(difference) < 0.1 * np.abs(np.asarray(other) - student).mean()


# ---------------------------------------------------------------- batches


def digests(calls):
    """Of one view in batches of 4 and of 23, and of all training batches of three epochs."""
    pixels = np.random.default_rng(0).integers(0, 256, (23, 48, 48, 1), "uint8")
    targets = np.eye(3, dtype="float32")[np.arange(23) % 3]
    one_view = {"view": 2, "seed": 9, "augmentation": FULL, "parallel_calls": calls}
    found = [digest(collect(views.view_batches(pixels, batch_size=n, **one_view))) for n in (4, 23)]
    return [*found, digest(collect(train(pixels, targets, parallel_calls=calls)[0]))]


def test_two_processes_and_any_number_of_parallel_calls_give_identical_bytes():
    code = "import sys; sys.path[:0] = ['tests', '.']; import test_views as t; print(*t.digests(1))"
    environment = os.environ | {"TF_NUM_INTRAOP_THREADS": "1"}
    other = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    here = digests(7)
    assert here == digests(3) == other.split()
    assert here[0] == here[1]  # however the rows are cut into batches


def test_every_epoch_shows_every_image_once_in_its_view(pixels, targets):
    marked = np.c_[targets, np.arange(len(pixels))]
    dataset, steps = train(pixels, marked, batch_size=23)
    assert steps == 1 and dataset.cardinality() == 3
    orders = []
    for epoch, (x, y) in enumerate(collect(dataset)):
        order = y[:, 3].astype(int)
        expected = views.augment(pixels, views.view_parameters(4, 23, epoch, FULL))
        assert (x == np.asarray(expected)[order]).all()
        assert (y == marked[order]).all() and sorted(order) == list(range(23))
        orders.append(order.tolist())
    assert orders[0] != orders[1] != orders[2]


def test_resuming_at_any_epoch_gives_the_batches_of_an_uninterrupted_run(pixels, targets):
    whole, steps = train(pixels, targets, epochs=4, views=3)
    whole = collect(whole)
    assert len(whole) == 4 * steps == 16
    for first in (1, 3):
        rest = collect(train(pixels, targets, epochs=4, views=3, first_epoch=first)[0])
        assert digest(rest) == digest(whole[first * steps :])


def test_targets_follow_the_view(pixels, targets):
    asked = []

    def teacher(view):
        asked.append(view)
        return np.full((23, 2), view, "float32")

    batches = collect(train(pixels, teacher, epochs=5, views=2)[0])
    assert [batch[1][0, 0] for batch in batches[::4]] == [0, 1, 0, 1, 0]
    assert set(asked) == {0, 1}
    shifted = collect(train(pixels, teacher, epochs=2, first_view=6)[0])
    assert [batch[1][0, 0] for batch in shifted[::4]] == [6, 7]


def test_the_order_can_have_a_seed_of_its_own(pixels, targets):
    marked = np.c_[targets, np.arange(23)]
    one, two = (collect(train(pixels, marked, order_seed=s, batch_size=23)[0])[0] for s in (1, 2))
    assert (one[1] != two[1]).any()
    assert (one[0][np.argsort(one[1][:, 3])] == two[0][np.argsort(two[1][:, 3])]).all()


def test_class_weights_multiply_the_weights_given(pixels, targets, labels):
    given = np.linspace(1, 2, 23)
    settings = {"balance": "class_weight", "labels": labels, "shuffle": False, "epochs": 1}
    batches = collect(train(pixels, targets, weights=given, batch_size=23, **settings)[0])
    weights = batches[0][2] / given
    totals = [weights[labels == c].sum() for c in range(3)]
    assert weights.mean() == pytest.approx(1) and totals == pytest.approx([23 / 3] * 3)
    assert len(collect(train(pixels, targets)[0])[0]) == 2  # no weights, no third column


def test_resampling_draws_the_classes_equally(pixels, targets, labels):
    dataset, _ = train(pixels, targets, balance="resample", labels=labels, batch_size=23, epochs=3)
    for _, y in collect(dataset):
        assert sorted(y.sum(0)) == [7, 8, 8]
    order = views.epoch_order(23, 0, seed=0, balance="resample", labels=labels)
    repeats = np.bincount(order, minlength=23)
    for c in range(3):
        assert np.ptp(repeats[labels == c]) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 24}, "23 training images do not fill one batch of 24"),
        ({"balance": "both"}, "balance is"),
        ({"balance": "resample"}, "needs labels"),
    ],
)
def test_what_cannot_work_is_refused(changes, message, pixels, targets):
    with pytest.raises(ValueError, match=message):
        train(pixels, targets, **changes)


def test_targets_of_another_length_are_refused(pixels, targets):
    with pytest.raises(ValueError, match="targets have shape"):
        train(pixels, targets[:5])


def test_evaluation_gives_the_images_as_they_are(pixels, targets):
    batches = collect(views.evaluation_batches(pixels, targets, batch_size=10))
    assert [len(x) for x, _ in batches] == [10, 10, 3]
    assert (np.concatenate([x for x, _ in batches]) == pixels).all()
    assert (np.concatenate([y for _, y in batches]) == targets).all()
    (x,) = collect(views.evaluation_batches(pixels, batch_size=23))[0]
    assert x.dtype == np.float32


def test_a_view_of_all_images_is_in_row_order(pixels):
    batches = views.view_batches(pixels, view=3, seed=4, augmentation=FULL, batch_size=10)
    expected = views.augment(pixels, views.view_parameters(4, 23, 3, FULL))
    assert (np.concatenate([x for (x,) in collect(batches)]) == np.asarray(expected)).all()
