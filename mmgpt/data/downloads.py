"""What img2dataset downloaded, found by the URL it came from; nothing is fetched.

images/00000.tar       000000017.jpg ...
images/00000.parquet   url, key, status: which member came from where
"""

import array
import hashlib
from pathlib import Path

import numpy as np

from mmgpt.data import columns
from mmgpt.data.captions import Reject
from mmgpt.data.files import FileError, open_inside
from mmgpt.data.tars import Member, members, read

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif")


class Downloads:
    """The images of an img2dataset folder by URL; of several downloads of one URL the first counts.

    It holds 24 bytes for each image: a hash of the URL, the archive, and the offset and size in it.
    """

    def __init__(self, folder: Path, reject: Reject) -> None:
        self._folder = folder
        self._archives = sorted(path.name for path in folder.glob("*.tar")) if folder.is_dir() else []
        hashes, archives, offsets, sizes = array.array("Q"), array.array("I"), array.array("Q"), array.array("I")
        for number, name in enumerate(self._archives):
            urls = self._urls(name, reject)
            for member in self._members(name, reject):
                if member.key in urls:
                    hashes.append(urls[member.key])
                    archives.append(number)
                    offsets.append(member.offset)
                    sizes.append(member.size)
        found = np.asarray(hashes, np.uint64)
        order = np.argsort(found, kind="stable")
        self._hashes, self._archive = found[order], np.asarray(archives, np.uint32)[order]
        self._offset, self._size = np.asarray(offsets, np.uint64)[order], np.asarray(sizes, np.uint32)[order]

    def __len__(self) -> int:
        return len(self._hashes)

    def __call__(self, url: str) -> bytes:
        """The image that was downloaded from a URL. Raises FileError "URL without a local copy"."""
        wanted = _hash(url)
        at = int(np.searchsorted(self._hashes, np.uint64(wanted)))
        if at == len(self._hashes) or int(self._hashes[at]) != wanted:
            return columns.no_copy(url)
        member = Member(url[:200], "", "", int(self._offset[at]), int(self._size[at]))
        with open_inside(self._folder, self._archives[int(self._archive[at])]) as file:
            return read(file, member)

    def _urls(self, archive: str, reject: Reject) -> dict[str, int]:
        """Hash of the URL by the key of the member, of one archive."""
        table = archive.removesuffix(".tar") + ".parquet"
        try:
            texts = {field.name for field in columns.schema(self._folder, table) if columns.is_text(field.type)}
            if not texts >= {"url", "key"}:
                raise FileError("unknown columns", f"{', '.join(sorted(texts))[:200]}; expected url and key")
        except FileError as e:
            reject(table, str(e), str(self._folder / table))
            return {}
        read = columns.rows(self._folder, table, ["url", "key"], reject)
        return {row.value["key"]: _hash(row.value["url"]) for row in read if row.value["key"] and row.value["url"]}

    def _members(self, archive: str, reject: Reject) -> list[Member]:
        found: list[Member] = []
        try:
            with open_inside(self._folder, archive) as file:
                for member in members(file, self._folder / archive, _IMAGES, reject):
                    found.append(member)
        except FileError as e:
            reject(archive, str(e), str(self._folder / archive))
        return found


def _hash(url: str) -> int:
    return int.from_bytes(hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
