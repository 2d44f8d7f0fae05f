"""Reading raw data in the tests of formats: what is found, what is refused, and small media to write."""

from pathlib import Path

import numpy as np

from mmgpt.core.document import Image, Text
from mmgpt.data import media, sources
from mmgpt.data.sources import Found

Rejects = list[tuple[str, str, str]]


def picture(i: int = 0) -> bytes:
    return media.encode_png(np.full((4, 6, 3), i, np.uint8))


def put(root: Path, name: str, data: bytes | str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(name: str, path: Path) -> tuple[list[Found], Rejects]:
    """What a format finds, with unique keys, and what it refuses, each with key, reason and place."""
    rejects: Rejects = []
    documents = list(sources.load(name).documents(path, lambda *line: rejects.append(line)))
    assert all(key and reason and place for key, reason, place in rejects)
    assert len({d.key for d in documents}) == len(documents)
    return documents, rejects


def reasons(rejects: Rejects) -> dict[str, str]:
    """The fixed part of the reason by key."""
    assert len({key for key, _, _ in rejects}) == len(rejects), "one line for each"
    return {key: reason.partition(":")[0] for key, reason, _ in rejects}


def shown(document: Found) -> list[str | bytes]:
    """Texts and bytes of a document in their order."""
    kept = [s.text if isinstance(s, Text) else s.data for s in document.segments if isinstance(s, (Text, Image))]
    return [k for k in kept if k is not None]


def canaries(outside: Path, root: Path) -> list[str]:
    """Names that lead out of `root` to a picture: above, absolute, through a link, and by URL."""
    secret = put(outside, "secret.png", picture(99))
    root.mkdir(parents=True, exist_ok=True)
    (root / "link.png").symlink_to(secret)
    (root / "folder").symlink_to(outside, target_is_directory=True)
    return ["../secret.png", str(secret), "link.png", "folder/secret.png", secret.as_uri(), "C:\\secret.png", "a\0b"]
