"""The handwritten digits that scikit-learn ships, as real files: PNG scans with captions, and prompts on unseen scans.

The split is that of scikit-learn's own example "Recognizing hand-written digits": the first half trains, the second
half tests, and its support vector machine is fitted here for comparison. Training scans are also written shifted and
turned a little, which is all the augmentation there is.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from mmgpt.core.errors import UserError
from mmgpt.core.log import progress, write_atomic, write_json
from mmgpt.data.media import encode_png

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LEADS = ("a handwritten", "a scan of a handwritten", "the handwritten digit")
SCALE = 2
"""Pixels a side of a written scan for each of the 8 x 8 that there are."""


class DigitsError(UserError):
    """The digits cannot be written; the message says what to do."""


def write_digits(out: Path, copies: int, seed: int) -> dict[str, float]:
    """Writes `out/train` (images and captions, `copies` of each scan) and `out/eval` (prompts); returns the counts.

    Also `svm.json`, the accuracy of scikit-learn's support vector machine on the same unseen scans.
    """
    try:
        from sklearn import datasets, svm
    except ImportError as e:
        raise DigitsError("the digits come with scikit-learn: pip install 'mmgpt[digits]'.") from e
    settings = {"copies": copies, "seed": seed}
    if (out / "svm.json").exists():
        counts = json.loads((out / "svm.json").read_text())
        found = {name: counts.get(name) for name in settings}
        if found != settings:
            raise DigitsError(
                f"{out} holds digits written with {found}, asked for {settings}; delete it or give another --out."
            )
        return counts
    partial = out / "svm.partial.json"  # written first: tells our own unfinished folder from another
    if out.is_dir() and any(out.iterdir()) and not partial.exists():
        raise DigitsError(f"{out} holds other files; give an empty or a new folder as --out.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_json(partial, settings)
    loaded: Any = datasets.load_digits(return_X_y=True)
    images, labels = loaded
    half = len(images) // 2
    classifier: Any = svm.SVC
    machine = classifier(gamma=0.001).fit(images[:half], labels[:half])
    accuracy = float(np.mean(machine.predict(images[half:]) == labels[half:]))
    rng = np.random.default_rng(seed)
    (out / "train").mkdir()
    (out / "eval" / "images").mkdir(parents=True)
    for i in progress(range(half), total=half, label="write digits"):
        for copy in range(copies):
            name = f"{i:04d}-{copy:02d}"
            scan = images[i] if copy == 0 else _varied(images[i], rng)
            (out / "train" / f"{name}.png").write_bytes(_png(scan))
            lead = LEADS[int(rng.integers(len(LEADS)))] if copy else LEADS[0]
            (out / "train" / f"{name}.txt").write_text(f"{lead} {NAMES[labels[i]]}")
    lines = []
    for i in range(half, len(images)):
        file = f"images/{i:04d}.png"
        (out / "eval" / file).write_bytes(_png(images[i]))
        meta = {"task": "label", "kind": NAMES[labels[i]], "answer": f"{LEADS[0]} {NAMES[labels[i]]}"}
        lines.append(json.dumps({"key": f"digit-{i:04d}", "segments": [{"image": file}], "meta": meta}) + "\n")
    write_atomic(out / "eval" / "documents.jsonl", "".join(lines))
    counts = {"train": half * copies, "eval": len(images) - half, "svm": round(accuracy, 4), **settings}
    write_json(out / "svm.json", counts)
    partial.unlink()
    return counts


def _varied(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The scan turned by up to 12 degrees, sheared, scaled by up to 8 % and shifted by up to 0.8 of its pixels."""
    angle, shear = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.1, 0.1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.array([[1, shear], [0, 1]])
    matrix = turn / rng.uniform(0.92, 1.08, (2, 1))
    centre = np.array([3.5, 3.5])
    offset = centre - matrix @ (centre + rng.uniform(-0.8, 0.8, 2))
    grid = scan.reshape(8, 8)
    transform: Any = ndimage.affine_transform
    return np.clip(transform(grid, matrix, offset, order=1), 0, 16)


def _png(scan: np.ndarray) -> bytes:
    """An 8 x 8 scan of 0..16 as a grey picture, each pixel SCALE x SCALE."""
    grey = np.rint(255 - scan.reshape(8, 8) * (255 / 16)).astype(np.uint8)
    large = np.kron(grey, np.ones((SCALE, SCALE), np.uint8))
    return encode_png(np.repeat(large[:, :, None], 3, axis=2))
