"""Raw data sets written by tests, and what a format makes of them."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from mmgpt.data import media, sources
from mmgpt.data.sources import Found

PNG = media.encode_png(np.zeros((4, 4, 3), np.uint8))
MP4 = media.encode_mp4(np.zeros((2, 16, 16, 3), np.uint8), 4)
Rejects = list[tuple[str, str, str]]


def read(name: str, path: Path) -> tuple[list[Found], Rejects]:
    """Documents and rejects of a format, every reject with key, reason and place."""
    rejects: Rejects = []
    documents = list(sources.load(name).documents(path, lambda *line: rejects.append(line)))
    assert all(key and reason and place for key, reason, place in rejects)
    return documents, rejects


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def reasons(rejects: Rejects) -> dict[str, str]:
    assert len({key for key, _, _ in rejects}) == len(rejects), "one line for each"
    return {key: reason.partition(":")[0] for key, reason, _ in rejects}


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return path


def grey(value: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def levels(images: list[bytes]) -> list[int]:
    """The grey level of each encoded picture of one colour."""
    return [round(float(media.decode_image(data).mean())) for data in images]
