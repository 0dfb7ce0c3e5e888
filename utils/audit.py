"""What a careful reader asks of a dataset before training on it. No TensorFlow here.

Radiographs of one kind look so much alike that small images take strangers for copies. So these
only propose pairs; each is aligned, and its fine detail, which no two X-rays share, decides.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.optimize import least_squares
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from utils import folders

MAX_NEAR_COPIES = 0.02  # share of val and test; more, and scores would be too good
NEIGHBOURS = 3  # candidates for each image, as it is and mirrored
FAR = 0.95  # distance of whitened small images (0 to 2); those further apart are strangers
SIDE, LEAST = 64, 96  # px: for the alignment; the least at which strangers differ in detail
FINEST = 224  # px, at which detail is compared where the images have as many
BLOCKS = 5  # along each side; a quarter of them may disagree
ALIKE = 0.4  # least correlation of the detail in the other three quarters


def audit(facts: pd.DataFrame, images: np.ndarray, found: Mapping) -> dict:
    """What a reader should know about a dataset, as plain JSON values; None: not looked for.

    facts: of `data.complete_splits`; images: of `images.decode`; found: of `folders.scan`.
    """
    counts = folders.check_classes(facts, found["class_names"], list(folders.SPLITS))
    lacks = [(split, name) for name in counts for split in counts.index[counts[name] == 0]]
    same = facts[facts.duplicated("pixels", keep=False)].groupby("pixels")
    crossing, groups = same["split"].nunique() > 1, same["image"].agg(list)
    splits = facts.groupby("patient")["split"].unique().map(list)
    shared = splits[splits.map(len) > 1].to_dict()
    return {
        "images": len(facts),
        "counts": counts.to_dict("index"),
        "patient_rule": found["patient_rule"],
        "shared_patients": shared if found["patient_rule"] == 1 or shared else None,
        "identical_across_splits": groups[crossing].tolist(),
        "identical_within_split": groups[~crossing].tolist(),
        "near_copies": near_copies(images, facts),
        "notes": found["notes"]
        + [f"{split} has no image of class {name}" for split, name in lacks],
    }


def check_leaks(report: Mapping, allow: bool = False) -> list[str]:
    """What leaks between the splits; near-copies count from 2 % of val and test on.

    ValueError: something leaks, and that is not allowed.
    """
    shared, near = report["shared_patients"] or {}, report["near_copies"] or []
    found = [f"patient {patient} is in {' and '.join(s)}" for patient, s in shared.items()]
    found += [f"{' = '.join(names)} (same pixels)" for names in report["identical_across_splits"]]
    held_out = sum(sum(report["counts"][split].values()) for split in ("val", "test"))
    if len(near) > MAX_NEAR_COPIES * held_out:
        found += [f"{pair['image']} = {pair['copy']} (near-copies)" for pair in near]
    if found and not allow:
        raise ValueError(
            f"{len(found)} leaks between splits: {folders.listing(found, 6)}. Scores would be too "
            "good: remove those files from one of the splits, or set ALLOW_LEAKS to go on."
        )
    return found


def near_copies(images: np.ndarray, facts: pd.DataFrame) -> list[dict] | None:
    """Pairs of pictures in two splits that are one picture, the most alike first.

    Returns image, copy (names) and correlation (0 to 1) of each; equal pixels, or two images of one
    patient, are no pair. None: fewer than 20 images, or under 96 px, so that nothing can be said.
    """
    size = int(min(images.shape[1], FINEST, facts[["width", "height"]].max(axis=1).median()))
    if len(facts) < 20 or size < LEAST:
        return None
    names, splits, pixels, patients = facts[["image", "split", "pixels", "patient"]].to_numpy().T
    small = shrink(images[..., 0], 16)[facts.index]
    pca = PCA(min(64, len(facts) // 2), whiten=True, random_state=0).fit(unit(small))
    points = {flip: unit(pca.transform(unit(small[:, :, ::flip]))) for flip in (1, -1)}
    pairs = set()
    for split in sorted({*splits} - {"train"}):
        before = folders.SPLITS[: folders.SPLITS.index(split)]
        asked, others = np.flatnonzero(splits == split), np.flatnonzero(np.isin(splits, before))
        near = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(others))).fit(points[1][others])
        for flip in points:
            distances, found = near.kneighbors(points[flip][asked])
            for i, j in np.argwhere(distances < FAR):
                a, b = others[found[i, j]], asked[i]
                if pixels[a] != pixels[b] and patients[a] != patients[b]:
                    pairs.add((a, b, flip))

    def likeness(pair):
        a, b, flip = pair
        moving, fixed = shrink(images[facts.index[[a, b]], :, :, 0], size)
        alike = round(correlation(moving, fixed[:, ::flip]), 3)
        return {"image": names[a], "copy": names[b], "correlation": alike}

    with ThreadPoolExecutor() as pool:
        found = [pair for pair in pool.map(likeness, sorted(pairs)) if pair["correlation"] > ALIKE]
    return sorted(found, key=lambda pair: -pair["correlation"])


def shrink(images: Iterable[np.ndarray], size: int) -> np.ndarray:
    """Images (S, S), box-averaged: float64 (n, size, size)."""
    small = [Image.fromarray(i).resize((size, size), Image.Resampling.BOX) for i in images]
    return np.stack(small).astype(float)


def unit(images: np.ndarray) -> np.ndarray:
    """Each image as a vector of mean 0 and length 1: float (n, features)."""
    points = images.reshape(len(images), -1)
    return normalize(points - points.mean(axis=1, keepdims=True))


def correlation(moving: np.ndarray, fixed: np.ndarray) -> float:
    """How alike the fine detail of two images (S, S) is: the lower quartile over 25 blocks.

    `moving` is aligned first, by the affine map that fits best at 64 px; black bars do not count.
    """
    small = [detail(image, 1, 6) for image in shrink((moving, fixed), SIDE)]

    def difference(affine):
        return (warp(small[0], affine) - small[1])[5:-5, 5:-5].ravel()

    start, steps = np.eye(2, 3, 1).ravel(), {"diff_step": 0.01, "ftol": 0.01, "xtol": 0.01}
    found = least_squares(difference, start, method="lm", **steps)
    edge, finest = len(fixed) // 12, max(len(fixed) / 224, 0.5)
    side = (len(fixed) - 2 * edge) // BLOCKS
    inner, blocks = slice(edge, edge + BLOCKS * side), []
    for image in (warp(moving, found.x), fixed):
        cut = detail(image, finest, 4 * finest)[inner, inner].reshape(BLOCKS, side, BLOCKS, side)
        blocks.append(cut - cut.mean(axis=(1, 3), keepdims=True))
    a, b = blocks
    energy = np.sqrt((a**2).mean(axis=(1, 3)) * (b**2).mean(axis=(1, 3)))
    used = energy > 0.05
    if used.sum() < BLOCKS**2 // 4:
        return 0.0
    return float(np.quantile((a * b).mean(axis=(1, 3))[used] / energy[used], 0.25))


def detail(image: np.ndarray, fine: float, coarse: float) -> np.ndarray:
    """What lies between two scales, in pixels: a difference of Gaussians."""
    image = gaussian_filter(image, fine)
    return image - gaussian_filter(image, coarse)


def warp(image: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Transform an image about its centre; affine: 6 numbers, in each row the shift first."""
    shift, matrix = np.split(affine.reshape(2, 3), [1], axis=1)
    centre = np.full(2, (len(image) - 1) / 2)
    shift = centre - matrix @ centre + shift[:, 0] * centre
    return affine_transform(image, matrix, shift, order=1, mode="nearest")
