"""Two small raw datasets of many shards, real tokenizers with drawn parameters, and the command that joins them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from mmgpt.core import config
from mmgpt.core.document import Document, Image, Text
from mmgpt.data.media import encode_png
from mmgpt.data.record import Writer
from mmgpt.train.run import Run
from tests import tiny, tiny_run

SHARDS = {"left": 30, "right": 10}
DOCUMENTS = 6


def make(folder: Path) -> None:
    """`text.model` and `vision` below the folder, and a dataset for each name in SHARDS."""
    tiny.tokens(folder)
    vision = config.load(folder / "vision" / "config.json")
    assert isinstance(vision, Run)
    tiny_run.save(vision, folder / "vision", {"loss": 0.25}, {"left/psnr": 20.0})
    for name, shards in SHARDS.items():
        with Writer(folder / name, name=name, shard_documents=DOCUMENTS) as writer:
            for i in range(shards * DOCUMENTS):
                rng = np.random.default_rng(i)
                picture = encode_png(rng.integers(0, 256, (16 * (1 + i % 2), 32, 3)).astype(np.uint8))
                data = b"not a picture" if i % 17 == 3 else picture
                writer.write(Document(key=f"{name}{i}", segments=(Text(text=f"a red circle {i}"), Image(data=data))))


def command(folder: Path, out: Path, *options: str) -> list[str]:
    """`mmgpt tokenize data` of what `make` made."""
    files = ["--text", str(folder / "text.model"), "--vision", str(folder / "vision"), "--area", "1024", "--batch", "4"]
    named = [str(folder / name) for name in SHARDS]
    return [sys.executable, "-m", "mmgpt", "tokenize", "data", *named, *files, "--out", str(out), *options]


def environment(folder: Path) -> dict[str, str]:
    """One device, whatever the tests have, and a cache of compiled functions for all runs of the folder."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**os.environ, "JAX_PLATFORMS": "cpu", **cache}


def run(folder: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    return subprocess.run(
        command(folder, out, *options), env=environment(folder), capture_output=True, text=True, check=False
    )


def contents(out: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
