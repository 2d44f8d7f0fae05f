"""A folder of pictures (also in subfolders), each with a caption beside it or in a table.

    birds/kea.jpg        birds/kea.txt      the caption, or
    birds/tui.png        birds/tui.json     {"caption": "a tui on flax", "photographer": "..."}
    birds/moa.webp                          a line in captions.tsv (or .csv) at the top: birds/moa.webp<TAB>a moa

The key is the path without suffix; other values of the JSON, and further columns of a table with a header line
(`file`, `caption`, ...), become meta.
"""

from collections.abc import Iterator
from pathlib import Path

from mmgpt.core.document import Image, Text
from mmgpt.data.captions import Reject, pairs
from mmgpt.data.sources import Found, require_folder

SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")


def documents(path: Path, reject: Reject) -> Iterator[Found]:
    """Documents of caption and image. Raises SourceError if `path` is no folder."""
    require_folder(path, "folder")
    for pair in pairs(path, SUFFIXES, "image", reject):
        segments = (Text(text=pair.caption), Image(data=pair.data))
        yield Found(key=pair.key, segments=segments, meta=pair.meta, place=pair.place)
