"""A folder of MP4 clips (also in subfolders), each with a caption beside it or in a table.

    clips/0001.mp4     clips/0001.txt     the caption (or 0001.json with "caption"), or
    clips/0002.mp4                        a line in captions.csv (or .tsv) at the top: clips/0002.mp4,a boat leaves

The key is the path without suffix; other values of the JSON, and further columns of a table with a header line
(`file`, `caption`, ...), become meta.
"""

from collections.abc import Iterator
from pathlib import Path

from mmgpt.core.document import Text, Video
from mmgpt.data.captions import Reject, pairs
from mmgpt.data.sources import Found, require_folder

SUFFIXES = ("mp4", "m4v")


def documents(path: Path, reject: Reject) -> Iterator[Found]:
    """Documents of caption and clip. Raises SourceError if `path` is no folder."""
    require_folder(path, "mp4")
    for pair in pairs(path, SUFFIXES, "video", reject):
        segments = (Text(text=pair.caption), Video(data=pair.data))
        yield Found(key=pair.key, segments=segments, meta=pair.meta, place=pair.place)
