"""Robot episodes: a LeRobot data set of version 2, or folders of actions and frames.

    meta/info.json  meta/tasks.jsonl                                    LeRobot, codebase_version v2.0 or v2.1
    data/chunk-000/episode_000000.parquet                               action, timestamp, task_index
    videos/chunk-000/observation.images.top/episode_000000.mp4          one a camera, or pictures in the Parquet file

    pick_17/actions.npy                                                 float [steps, dimensions], no objects
    pick_17/instruction.txt                                             what is to be done
    pick_17/frames/0000.jpg ...    or pick_17/top.mp4 pick_17/wrist.mp4 a frame a step, of one camera or several

A document is the instruction, then for every 10 steps an image of each camera at the first of them and the actions of
all of them, as `univla_video` lays them out. Times are LeRobot's timestamps, or those of the clip's frames.
"""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mmgpt.core.document import Action, Image, Segment, Text
from mmgpt.data.captions import Reject
from mmgpt.data.files import MAX_TEXT_BYTES, FileError, as_text, read_inside
from mmgpt.data.media import MediaError, clip_times, encode_jpeg, frames_at
from mmgpt.data.sources import Found, SourceError, require_folder
from mmgpt.data.subtitles import load_json

STEPS = 10
"""Actions between two looks, as UniVLA trains on LIBERO and CALVIN."""
MAX_STEPS = 1 << 16
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
_EMBEDDED = 1 << 30
_MANY = 10_000_000


def documents(path: Path, reject: Reject) -> Iterator[Found]:
    """Documents episode by episode. Raises SourceError for another version of LeRobot, or if there is no episode."""
    require_folder(path, "episodes")
    if (path / "meta" / "info.json").is_file():
        yield from _lerobot(path, reject)
        return
    folders = sorted(p for p in path.iterdir() if p.is_dir() and (p / "actions.npy").exists())
    if not folders:
        raise SourceError(f"{path}: holds neither meta/info.json nor folders with actions.npy, which 'episodes' reads.")
    for folder in folders:
        try:
            yield _plain(path, folder.name)
        except (FileError, MediaError) as e:
            reject(folder.name, str(e), str(folder))


class _Camera(NamedTuple):
    """Pictures at the steps 0, 10, 20 ... of an episode."""

    name: str
    images: list[bytes]


def _laid_out(task: str, cameras: list[_Camera], actions: np.ndarray, times: np.ndarray | None) -> tuple[Segment, ...]:
    segments: list[Segment] = [Text(text=task, role="user")]
    for k, start in enumerate(range(0, len(actions), STEPS)):
        time = None if times is None else round(float(times[start]), 3)
        segments += [Image(data=camera.images[k], time=time) for camera in cameras]
        segments.append(Action(values=actions[start : start + STEPS], time=time))
    return tuple(segments)


def _seen(data: bytes, times: np.ndarray, name: str) -> _Camera:
    """The pictures of a clip at the first of every 10 times."""
    wanted = times[::STEPS].tolist()
    images = [encode_jpeg(frame) for frame in frames_at(data, wanted)]
    if len(images) < len(wanted):
        raise FileError("frames and actions differ", f"{name} ends before {wanted[len(images)]:.2f} s")
    return _Camera(name, images)


# --- LeRobot


def _lerobot(root: Path, reject: Reject) -> Iterator[Found]:
    info = _info(root)
    tasks = _tasks(root)
    cameras = {n: f.get("dtype") for n, f in info["features"].items() if f.get("dtype") in ("video", "image")}
    for index in range(info["total_episodes"]):
        key, place = f"episode_{index:06d}", f"episode_{index:06d} of {root}"
        chunk = index // info["chunks_size"]
        try:
            table = _table(read_inside(root, _DATA.format(episode_chunk=chunk, episode_index=index)), cameras)
            actions, times = _actions(table["action"]), _column(table, "timestamp")
            numbers = set(_column(table, "task_index").tolist())
            if len(numbers) != 1 or (task := tasks.get(int(next(iter(numbers))))) is None:
                raise FileError(
                    "no instruction", f"task_index is {sorted(numbers)[:5]}, expected one of meta/tasks.jsonl"
                )
            seen = []
            for name, kind in cameras.items():
                if kind == "image":
                    seen.append(_Camera(name, [_embedded(row.as_py(), name) for row in table[name][::STEPS]]))
                else:
                    file = _VIDEO.format(episode_chunk=chunk, video_key=name, episode_index=index)
                    seen.append(_seen(read_inside(root, file), times, name))
        except (FileError, MediaError) as e:
            reject(key, str(e), place)
            continue
        meta = {
            "fps": json.dumps(info.get("fps")),
            "robot_type": str(info.get("robot_type") or ""),
            "cameras": ", ".join(cameras),
        }
        yield Found(key=key, segments=_laid_out(task, seen, actions, times), meta=meta, place=place)


def _info(root: Path) -> dict[str, Any]:
    """meta/info.json. Raises SourceError where it is of another version, or does not say what is needed."""
    where = root / "meta" / "info.json"
    try:
        info = load_json(as_text(read_inside(root, "meta/info.json", MAX_TEXT_BYTES)))
    except FileError as e:
        raise SourceError(f"{where}: {e}. LeRobot's description of the data set is needed.") from e
    if not isinstance(info, dict) or str(info.get("codebase_version"))[:2] not in ("v2", "2."):
        found = info.get("codebase_version") if isinstance(info, dict) else None
        raise SourceError(
            f"{where}: codebase_version is {found!r}; this reads v2.0 and v2.1. Write it with lerobot<0.4."
        )
    if info.get("data_path", _DATA) != _DATA or (info.get("video_path") or _VIDEO) != _VIDEO:
        raise SourceError(f"{where}: data_path and video_path must be LeRobot's own, {_DATA} and {_VIDEO}.")
    features = info.get("features")
    sound = isinstance(features, dict) and all(isinstance(f, dict) for f in features.values())
    if not sound or not all(
        type(info.get(n)) is int and 0 < info[n] < _MANY for n in ("total_episodes", "chunks_size")
    ):
        raise SourceError(f"{where}: features, total_episodes and chunks_size must be there, as LeRobot writes them.")
    return info


def _tasks(root: Path) -> dict[int, str]:
    """Number -> instruction."""
    where = root / "meta" / "tasks.jsonl"
    try:
        lines = as_text(read_inside(root, "meta/tasks.jsonl", MAX_TEXT_BYTES)).splitlines()
        items = [load_json(line) for line in lines if line.strip()]
        return {item["task_index"]: str(item["task"]).strip() for item in items if str(item["task"]).strip()}
    except (FileError, TypeError, KeyError) as e:
        raise SourceError(f"{where}: {e}. A line is {{'task_index': 0, 'task': 'pick the cup'}}.") from e


def _table(data: bytes, cameras: dict[str, Any]) -> pa.Table:
    wanted = ["action", "timestamp", "task_index", *(name for name, kind in cameras.items() if kind == "image")]
    try:
        file = pyarrow.parquet.ParquetFile(pa.BufferReader(data))
        if lacking := [name for name in wanted if name not in file.schema_arrow.names]:
            raise FileError(
                "wrong columns", f"no {', '.join(lacking)} among {', '.join(file.schema_arrow.names)[:200]}"
            )
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        if size > _EMBEDDED or not 0 < file.metadata.num_rows <= MAX_STEPS:
            raise FileError("too many steps", f"{file.metadata.num_rows} in {size} bytes; 1 to {MAX_STEPS} are read")
        return file.read(columns=wanted)
    except (pa.ArrowException, OSError, ValueError) as e:
        if isinstance(e, FileError):
            raise
        raise FileError("damaged Parquet file", str(e)) from e


def _column(table: pa.Table, name: str) -> np.ndarray:
    try:
        values = table[name].combine_chunks().cast(pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowException, ValueError) as e:
        raise FileError("wrong type", f"{name} must be numbers: {e}") from e
    if not np.isfinite(values).all() or (name == "timestamp" and (np.diff(values) < 0).any()):
        raise FileError("wrong type", f"{name} must be finite, and times ascend")
    return values


def _actions(column: pa.ChunkedArray) -> np.ndarray:
    rows = column.to_pylist()
    try:
        return _narrow(np.asarray([row if isinstance(row, list) else [row] for row in rows], np.float64))
    except (TypeError, ValueError, OverflowError) as e:
        raise FileError("wrong type", f"action must be lists of numbers of one length: {e}") from e


def _embedded(value: Any, name: str) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:  # a path in its place is not followed
        raise FileError("image without bytes", f"{name} in the Parquet file")
    return data


# --- folders


def _plain(root: Path, name: str) -> Found:
    task = as_text(read_inside(root, f"{name}/instruction.txt", MAX_TEXT_BYTES)).strip()
    if not task:
        raise FileError("no instruction", "instruction.txt is empty")
    actions = read_array(read_inside(root, f"{name}/actions.npy"))
    folder = root / name
    times = None
    if (folder / "frames").is_dir():
        frames = sorted(p.name for p in (folder / "frames").iterdir() if p.suffix.lower() in _IMAGES)
        if len(frames) not in (len(actions), len(actions) + 1):  # the last one may show what the last action did
            raise FileError("frames and actions differ", f"{len(frames)} frames, {len(actions)} actions")
        images = [read_inside(root, f"{name}/frames/{file}") for file in frames[: len(actions) : STEPS]]
        cameras = [_Camera("frames", images)]
    else:
        clips = sorted(p.name for p in folder.iterdir() if p.suffix.lower() == ".mp4")
        if not clips:
            raise FileError("actions without frames", "neither frames/ nor a .mp4 file")
        cameras = []
        for clip in clips:
            data = read_inside(root, f"{name}/{clip}")
            times = np.asarray(clip_times(data, MAX_STEPS))
            if len(times) not in (len(actions), len(actions) + 1):
                raise FileError("frames and actions differ", f"{len(times)} frames in {clip}, {len(actions)} actions")
            cameras.append(_seen(data, times[: len(actions)], clip))
    meta = {"cameras": ", ".join(camera.name for camera in cameras)}
    return Found(key=name, segments=_laid_out(task, cameras, actions, times), meta=meta, place=str(folder))


def read_array(data: bytes) -> np.ndarray:
    """Actions of a .npy file as float32. Raises FileError "not an array", "wrong type", "wrong shape".

    The header is checked against the size of the file before anything is allocated for it; objects are never loaded.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(file)
    except Exception as e:  # numpy parses the header as Python and raises almost any class on damaged input
        raise FileError("not an array", str(e)) from e
    if dtype.kind not in "fiu" or dtype.hasobject:
        raise FileError("wrong type", f"actions of the type {dtype} are no numbers")
    if len(shape) != 2 or min(shape) < 1 or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        rest = f"{len(data) - file.tell()} bytes"
        raise FileError("wrong shape", f"{list(shape)} of {dtype} in {rest}, expected [steps, dimensions]")
    if shape[0] > MAX_STEPS:
        raise FileError("too many steps", f"{shape[0]}; 1 to {MAX_STEPS} are read")
    values = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if by_columns else "C")
    return _narrow(values)


def _narrow(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which the import refuses
        return np.ascontiguousarray(values, np.float32)
