"""WebVid: the table of the clips (results_2M_train.csv) and the MP4 files that were fetched, joined by their ids.

    results_2M_train.csv             videoid,contentUrl,duration,page_dir,name
    videos/006001_006050/1066674784.mp4          or without the folder of the page, or without videos/

The caption is `name`, the key is `videoid`, the other columns become meta. `contentUrl` is never fetched. Several
tables are read in the order of their names.
"""

from collections.abc import Iterator
from pathlib import Path

from mmgpt.core.document import Text, Video
from mmgpt.data.captions import Reject
from mmgpt.data.files import FileError, read_inside
from mmgpt.data.sources import Found, SourceError
from mmgpt.data.tables import Row, rows

_COLUMNS = ("videoid", "page_dir", "name")


def documents(path: Path, reject: Reject) -> Iterator[Found]:
    """Documents of caption and clip in the order of the rows. Raises SourceError if there is no table."""
    root = path if path.is_dir() else path.parent
    tables = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not tables or not path.exists():
        raise SourceError(f"{path}: holds no .csv file; the format 'webvid' reads a table beside its videos.")
    for table in tables:
        if not table.is_file():
            reject(table.name, "not a regular file", str(table))
            continue
        try:
            with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                for row in rows(file, str(table), _COLUMNS, reject):
                    document = _document(row, root, reject)
                    if document is not None:
                        yield document
        except FileError as e:
            reject(table.name, str(e), str(table))


def _document(row: Row, root: Path, reject: Reject) -> Found | None:
    id, caption = row.values["videoid"].strip(), row.values["name"].strip()
    key = id or row.place
    try:
        if not id:
            raise FileError("wrong type", "videoid is empty")
        if not caption:
            raise FileError("empty caption")
        data = _video(root, id, row.values["page_dir"].strip())
    except FileError as e:
        reject(key, str(e), row.place)
        return None
    meta = {name: value for name, value in row.values.items() if name not in ("videoid", "name") and value}
    return Found(key=id, segments=(Text(text=caption), Video(data=data)), meta=meta, place=row.place)


def _video(root: Path, id: str, page: str) -> bytes:
    names = [f"videos/{id}.mp4", f"{id}.mp4"]
    if page:
        names = [f"videos/{page}/{id}.mp4", f"{page}/{id}.mp4", *names]
    for name in names:
        try:
            return read_inside(root, name)
        except FileError as e:
            if e.reason != "missing file":
                raise
    raise FileError("video without a local copy", names[0][:200])
