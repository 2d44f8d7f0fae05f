"""Raw data sets that tests write: files, archives, pictures of one grey."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from mmgpt.data import media

PNG = media.encode_png(np.zeros((4, 4, 3), np.uint8))
MP4 = media.encode_mp4(np.zeros((2, 16, 16, 3), np.uint8), 4)


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


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
