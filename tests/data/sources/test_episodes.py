"""Episodes: instruction, then what is seen and what is done, step by step, from LeRobot's files and from folders."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mmgpt.core.document import Action, Image, Text
from mmgpt.data.importing import check, import_dataset
from mmgpt.data.media import encode_mp4, encode_png
from mmgpt.data.record import Dataset
from mmgpt.data.sources import Found, SourceError
from mmgpt.data.sources.episodes import read_array
from tests.data.raw import MP4, grey, levels, put
from tests.data.sources.raw import read, reasons

CAMERA = "observation.images.top"
STEPS = np.arange(25, dtype=np.float32)[:, None] * np.array([1, -1], np.float32)
"""25 steps of two dimensions."""


def clip(steps: int) -> bytes:
    return encode_mp4(np.stack([grey(8 * k) for k in range(steps)]), 5.0)


def npy(values: object) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(values))
    return out.getvalue()


def shown(document: Found) -> list[object]:
    """Text, grey level of a picture to the nearest step, or the numbers of the first dimension."""
    found: list[object] = []
    for s in document.segments:
        match s:
            case Text(text=text):
                found.append(text)
            case Image(data=data):
                found.append(round(levels([data or b""])[0] / 8))
            case Action(values=np.ndarray() as values):
                found.append(values[:, 0].astype(int).tolist())
    return found


EXPECTED = ["pick the cup", 0, list(range(10)), 10, list(range(10, 20)), 20, list(range(20, 25))]


# --- LeRobot


def parquet(columns: dict[str, object]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), out)
    return out.getvalue()


def steps(actions: np.ndarray = STEPS, task: int = 0) -> dict[str, object]:
    n = len(actions)
    return {
        "action": pa.array(actions.tolist(), pa.list_(pa.float32(), actions.shape[1])),
        "observation.state": pa.array(actions.tolist(), pa.list_(pa.float32())),
        "timestamp": pa.array(np.arange(n, dtype=np.float32) / 5),
        "frame_index": pa.array(range(n)),
        "task_index": pa.array([task] * n),
    }


def lerobot(root: Path, *episodes: bytes, **info: object) -> Path:
    """A data set of LeRobot 2.1 with one camera, the episodes as Parquet files."""
    described = {
        "codebase_version": "v2.1",
        "robot_type": "so100",
        "total_episodes": len(episodes),
        "total_frames": 25 * len(episodes),
        "total_tasks": 2,
        "chunks_size": 1000,
        "fps": 5,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
            CAMERA: {"dtype": "video", "shape": [16, 16, 3], "names": ["height", "width", "channels"]},
        },
        **info,
    }
    tasks = '{"task_index": 0, "task": "pick the cup"}\n{"task_index": 1, "task": "put it down"}\n'
    put(root, {"meta/info.json": json.dumps(described), "meta/tasks.jsonl": tasks})
    chunk = described["chunks_size"]
    for i, data in enumerate(episodes):
        folder = f"chunk-{i // (chunk if isinstance(chunk, int) and chunk else 1):03d}"
        put(root, {f"data/{folder}/episode_{i:06d}.parquet": data})
        put(root, {f"videos/{folder}/{CAMERA}/episode_{i:06d}.mp4": clip(25)})
    return root


def test_lerobot_episodes_are_instruction_pictures_and_actions(tmp_path: Path):
    documents, rejects = read("episodes", lerobot(tmp_path, parquet(steps()), parquet(steps(task=1)), chunks_size=1))
    assert not rejects and [d.key for d in documents] == ["episode_000000", "episode_000001"]
    assert shown(documents[0]) == EXPECTED and shown(documents[1])[0] == "put it down"
    assert documents[0].meta == {"fps": "5", "robot_type": "so100", "cameras": CAMERA}
    assert [s.time for s in documents[0].segments] == [None, 0.0, 0.0, 2.0, 2.0, 4.0, 4.0]
    assert documents[0].segments[0].role == "user"
    values = [s.values for s in documents[0].segments if isinstance(s, Action) and s.values is not None]
    assert np.array_equal(np.concatenate(values), STEPS) and values[0].dtype == np.float32


def test_lerobot_pictures_may_lie_in_the_parquet_file(tmp_path: Path):
    pictures = [{"bytes": encode_png(grey(8 * k)), "path": "/etc/hostname"} for k in range(25)]
    features = {CAMERA: {"dtype": "image"}, "wrist": {"dtype": "image"}}
    columns = {**steps(), CAMERA: pa.array(pictures), "wrist": pa.array(pictures[::-1])}
    (document,), _ = read("episodes", lerobot(tmp_path, parquet(columns), features=features))
    assert shown(document)[:4] == ["pick the cup", 0, 24, list(range(10))]
    columns[CAMERA] = pa.array([{"bytes": None, "path": "/etc/hostname"}] * 25)
    assert list(reasons(read("episodes", lerobot(tmp_path, parquet(columns), features=features))[1]).values()) == [
        "image without bytes"
    ]


def with_column(name: str, values: object) -> bytes:
    return parquet({**steps(), name: values})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"PAR1 no file PAR1", "damaged Parquet file"),
        (parquet(steps())[:-300], "damaged Parquet file"),
        (parquet({"action": pa.array([[1.0]])}), "wrong columns"),
        (with_column("action", pa.array(["left"] * 25)), "wrong type"),
        (with_column("action", pa.array([[1.0]] * 24 + [[1.0, 2.0]])), "wrong type"),
        (with_column("timestamp", pa.array(["now"] * 25)), "wrong type"),
        (with_column("timestamp", pa.array([float("nan")] * 25)), "wrong type"),
        (with_column("timestamp", pa.array([1.0] + [0.0] * 24)), "wrong type"),
        (with_column("task_index", pa.array([9] * 25)), "no instruction"),
        (with_column("task_index", pa.array([0] * 24 + [1])), "no instruction"),
        (parquet({name: column[:0] for name, column in steps().items()}), "too many steps"),  # pyright: ignore
        (parquet(steps(np.zeros((26, 2))) | {"timestamp": pa.array(np.arange(26.0))}), "frames and actions differ"),
    ],
)
def test_a_bad_lerobot_episode_costs_itself(tmp_path: Path, data: bytes, reason: str):
    documents, rejects = read("episodes", lerobot(tmp_path, data, parquet(steps())))
    assert [d.key for d in documents] == ["episode_000001"] and reasons(rejects) == {"episode_000000": reason}


def test_a_missing_or_broken_clip_costs_its_episode(tmp_path: Path):
    lerobot(tmp_path, *[parquet(steps())] * 4)
    folder = tmp_path / "videos" / "chunk-000" / CAMERA
    (folder / "episode_000000.mp4").unlink()
    (folder / "episode_000001.mp4").write_bytes(b"<html>")
    put(tmp_path.parent, {f"{tmp_path.name}-secret.mp4": MP4})
    (folder / "episode_000002.mp4").unlink()
    (folder / "episode_000002.mp4").symlink_to(tmp_path.parent / f"{tmp_path.name}-secret.mp4")
    documents, rejects = read("episodes", tmp_path)
    assert [d.key for d in documents] == ["episode_000003"]
    assert list(reasons(rejects).values()) == ["missing file", "not a video", "link out of the folder"]


@pytest.mark.parametrize(
    "info",
    [
        {"codebase_version": "v3.0"},
        {"codebase_version": None},
        {"data_path": "../../{episode_index:099999999d}.parquet"},
        {"video_path": "/etc/{video_key}"},
        {"features": []},
        {"features": {"action": 3}},
        {"total_episodes": 10**12},
        {"chunks_size": 0},
    ],
)
def test_another_lerobot_is_told_at_once(tmp_path: Path, info: dict):
    lerobot(tmp_path, parquet(steps()), **info)
    with pytest.raises(SourceError, match=r"info\.json"):
        read("episodes", tmp_path)


def test_lerobot_camera_names_do_not_leave_the_folder(tmp_path: Path):
    put(tmp_path, {"secret/episode_000000.mp4": clip(25)})
    lerobot(tmp_path / "raw", parquet(steps()), features={"../../../secret": {"dtype": "video"}})
    documents, rejects = read("episodes", tmp_path / "raw")
    assert not documents and reasons(rejects) == {"episode_000000": "unsafe path"}


@pytest.mark.parametrize("tasks", ["[", '{"task": "x"}', "[1]", b"\xff"])
def test_bad_lerobot_tasks_are_told_at_once(tmp_path: Path, tasks: str | bytes):
    with pytest.raises(SourceError, match=r"tasks\.jsonl"):
        read("episodes", put(lerobot(tmp_path, parquet(steps())), {"meta/tasks.jsonl": tasks}))


# --- folders


def folder(root: Path, actions: object = STEPS, **files: bytes | str) -> Path:
    return put(root, {"actions.npy": npy(actions), "instruction.txt": "pick the cup\n", **files})


def frames(count: int) -> dict[str, bytes]:
    return {f"frames/{k:04d}.png": encode_png(grey(8 * k)) for k in range(count)}


def test_folders_of_frames_or_clips(tmp_path: Path):
    folder(tmp_path / "a", **frames(25))
    folder(tmp_path / "b", np.asfortranarray(STEPS.astype(np.float64)), **frames(26))
    folder(tmp_path / "c", STEPS.astype(np.int16), **{"top.mp4": clip(25), "wrist.mp4": clip(26)})
    documents, rejects = read("episodes", tmp_path)
    assert not rejects and [d.key for d in documents] == ["a", "b", "c"]
    assert shown(documents[0]) == shown(documents[1]) == EXPECTED
    assert shown(documents[2])[:4] == ["pick the cup", 0, 0, list(range(10))]
    assert [s.time for s in documents[2].segments][:4] == [None, 0.0, 0.0, 0.0] and documents[2].segments[4].time == 2.0
    assert documents[2].meta == {"cameras": "top.mp4, wrist.mp4"}
    done = import_dataset("episodes", tmp_path, tmp_path.parent / f"{tmp_path.name}-out")
    assert done.documents == 3 and isinstance(Dataset(done.directory)[0].segments[2], Action)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"instruction.txt": " "}, "no instruction"),
        ({"instruction.txt": b"\xff"}, "not UTF-8"),
        ({"instruction.txt": None}, "missing file"),
        ({"frames/0000.png": None}, "frames and actions differ"),
        ({"frames/0001.png": None, "frames/0000.png": None, "frames/0002.png": None}, "frames and actions differ"),
        (dict.fromkeys(frames(25)), "frames and actions differ"),
        ({"actions.npy": b"\x93NUMPY"}, "not an array"),
        ({"actions.npy": npy(STEPS)[:-4]}, "wrong shape"),
        ({"actions.npy": npy(STEPS[:, 0])}, "wrong shape"),
        ({"actions.npy": npy(np.zeros((0, 3)))}, "wrong shape"),
        ({"actions.npy": npy(STEPS.astype(bool))}, "wrong type"),
        ({"actions.npy": npy(STEPS.astype(complex))}, "wrong type"),
        ({"actions.npy": npy(np.zeros((70_000, 1), np.int8))}, "too many steps"),
    ],
)
def test_a_bad_folder_costs_itself(tmp_path: Path, files: dict[str, bytes | str | None], reason: str):
    folder(tmp_path / "bad", **frames(25))
    folder(tmp_path / "good", **frames(25))
    for name, data in files.items():
        if data is None:
            (tmp_path / "bad" / name).unlink()
        else:
            put(tmp_path / "bad", {name: data})
    documents, rejects = read("episodes", tmp_path)
    assert [d.key for d in documents] == ["good"] and reasons(rejects) == {"bad": reason}


def test_a_folder_needs_frames_of_its_own(tmp_path: Path):
    put(tmp_path, {"secret.mp4": clip(25)})
    folder(tmp_path / "raw" / "none")
    folder(tmp_path / "raw" / "link")
    (tmp_path / "raw" / "link" / "top.mp4").symlink_to(tmp_path / "secret.mp4")
    folder(tmp_path / "raw" / "short", **{"top.mp4": clip(20)})
    documents, rejects = read("episodes", tmp_path / "raw")
    assert not documents and reasons(rejects) == {
        "none": "actions without frames",
        "link": "link out of the folder",
        "short": "frames and actions differ",
    }


class Ran:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("the file ran its code",))


def test_an_array_of_objects_is_not_loaded():
    out = io.BytesIO()
    np.save(out, np.array([[Ran()]], object), allow_pickle=True)  # the attack
    with pytest.raises(ValueError, match="wrong type"):
        read_array(out.getvalue())


@pytest.mark.parametrize("shape", ["(1000000000000, 7)", "(-5, -5)", "(5, 5, 1)", "(True, 25)", "((5, 5)", "x" * 9000])
def test_a_header_that_claims_too_much_is_refused(shape: str):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()
    header = header.ljust(-(-(len(header) + 11) // 64) * 64 - 11) + b"\n"
    with pytest.raises(ValueError, match=r"wrong shape|not an array"):
        read_array(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(101))


def test_the_import_refuses_actions_that_are_no_actions():
    def fault(values: object) -> str:
        made = Action(values=values if values is None else np.asarray(values, np.float32))  # pyright: ignore
        return str(check(Found(key="a", segments=(made,), place="p"))).partition(":")[0]

    assert fault([[1, 2]]) == "None"
    assert fault([[1, np.nan]]) == fault([[np.inf, 1]]) == "not finite"
    assert fault([1, 2]) == fault(np.zeros((0, 2))) == fault(np.zeros((3, 0))) == "wrong shape"
    assert fault(np.zeros((1 << 16 + 1, 1))) == fault(np.zeros((1 << 15, 33))) == "wrong shape"
    assert fault(None) == "wrong type"


def test_lerobot_steps_without_an_action_are_refused(tmp_path: Path):
    (document,), _ = read("episodes", lerobot(tmp_path, with_column("action", pa.array([[1.0]] * 24 + [None]))))
    assert str(check(document)).startswith("not finite")


def test_values_over_what_float32_holds_are_refused(tmp_path: Path):
    folder(tmp_path / "bad", np.full((25, 2), 1e300), **frames(25))
    (document,), _ = read("episodes", tmp_path)
    assert str(check(document)).startswith("not finite")


def test_episodes_need_episodes(tmp_path: Path):
    with pytest.raises(SourceError, match=r"neither meta/info\.json nor"):
        read("episodes", tmp_path)
