"""Safetensors folders: the library reads what we write, we read what it writes, and nothing hostile gets through."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mmgpt.core.config import ConfigError
from mmgpt.core.errors import UserError
from mmgpt.interop.safetensors_folder import DTYPES, HEADER_BYTES, INDEX, FolderError, SafetensorsFolder, read_header
from mmgpt.interop.safetensors_writer import Planned, write_folder

rng = np.random.default_rng(0)
ARRAYS: dict[str, np.ndarray] = {
    "a": rng.standard_normal((3, 5)).astype(np.float32),
    "b.weight": rng.standard_normal(7).astype(np.float16),
    "c": np.asarray(rng.standard_normal((2, 2, 2)), jnp.bfloat16),
    "count": np.array(3, np.int64),
    "empty": np.zeros((0, 4), np.float32),
    "flags": np.array([True, False, True]),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def written(folder: Path, shard_bytes: int = 1 << 30) -> Path:
    folder.mkdir(exist_ok=True)
    plan = [Planned(name=n, dtype=NAMES[a.dtype], shape=a.shape) for n, a in ARRAYS.items()]
    write_folder(folder, plan, ARRAYS.__getitem__, metadata={"format": "pt"}, shard_bytes=shard_bytes)
    return folder


def same(found: dict[str, np.ndarray]) -> None:
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, and with a length of it that may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_what_is_written_the_library_reads_and_what_it_writes_is_read(tmp_path: Path) -> None:
    same(load_file(written(tmp_path / "ours") / "model.safetensors"))
    (tmp_path / "theirs").mkdir()
    save_file(ARRAYS, tmp_path / "theirs" / "anything.safetensors", {"format": "np"})
    folder = SafetensorsFolder(tmp_path / "theirs")
    same({name: folder.read(name) for name in folder.tensors})
    assert folder.metadata == {"format": "np"}


def test_tensors_are_spread_over_files_of_bounded_size_with_an_index(tmp_path: Path) -> None:
    folder = written(tmp_path / "f", shard_bytes=60)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2 and files[0].name == "model-00001-of-00002.safetensors"
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in ARRAYS.values())
    assert {n: f.name for f in files for n in load_file(f)} == index["weight_map"]
    ours = SafetensorsFolder(folder)
    same({name: ours.read(name) for name in ours.tensors})
    ours.release()
    same({name: ours.read(name) for name in ours.tensors})


def test_a_read_tensor_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        SafetensorsFolder(written(tmp_path / "f")).read("a")[0] = 1


HOSTILE: dict[str, tuple[Any, bytes, int | None, str]] = {
    "empty file": (b"", b"", None, "no JSON table"),
    "header longer than the file": ({"a": entry(0, 4)}, b"1234", 1 << 20, "cut off"),
    "header of 2^63 bytes": ({"a": entry(0, 4)}, b"1234", 1 << 63, "cut off"),
    "header shorter than it is": ({"a": entry(0, 4)}, b"1234", 9, "no JSON table"),
    "not JSON": (b"{nothing", b"", None, "no JSON table"),
    "not text": (b"\xff\xfe{}", b"", None, "no JSON table"),
    "a list": ([1], b"", None, "no JSON table"),
    "deeply nested": (b"[" * 50_000 + b"]" * 50_000, b"", None, "no JSON table"),
    "a name twice": (b'{"a":1,"a":2}', b"", None, "'a' stands there twice"),
    "tensors cut off": ({"a": entry(0, 8, (2,))}, b"1234", None, "8 bytes|cut off"),
    "bytes left over": ({"a": entry(0, 4)}, b"12345678", None, "cut off or padded"),
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", None, "'?b'? overlaps"),
    "gap": ({"a": entry(0, 4), "b": entry(8, 12)}, b"1" * 12, None, "gap"),
    "offsets past the end": ({"a": entry(0, 1 << 40, (1 << 38,))}, b"1234", None, "cut off or padded"),
    "negative offset": ({"a": entry(-4, 0)}, b"", None, "numbers from 0 up"),
    "end before begin": ({"a": entry(4, 0)}, b"1234", None, "takes 4 bytes"),
    "shape against offsets": ({"a": entry(0, 4, (2, 3))}, b"1234", None, "takes 24 bytes"),
    "a shape of 2^60": ({"a": entry(0, 4, (1 << 60, 1 << 60))}, b"1234", None, "takes"),
    "a shape with a fraction": ({"a": entry(0, 4, (1.5,))}, b"1234", None, "numbers from 0 up"),
    "a shape with a truth": ({"a": entry(0, 4, (True,))}, b"1234", None, "numbers from 0 up"),
    "unknown number format": ({"a": entry(0, 4, dtype="Q4")}, b"1234", None, "number format Q4"),
    "number format that is no text": ({"a": entry(0, 4, dtype=["F32"])}, b"1234", None, "number format"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", None, "expected dtype, shape"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"1234", None, "two data_off"),
    "metadata that is no text": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_told_from_its_header(case: str, tmp_path: Path) -> None:
    header, data, length, message = HOSTILE[case]
    path = raw(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(FolderError, match=message) as error:
        SafetensorsFolder(tmp_path)
    assert str(path) in str(error.value)
    with pytest.raises(safetensors.SafetensorError):
        load_file(path)


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_told(kept: int, tmp_path: Path) -> None:
    path = written(tmp_path / "f") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FolderError, match=r"cut off|no JSON"):
        SafetensorsFolder(tmp_path / "f")


def test_a_header_is_read_up_to_a_size(tmp_path: Path) -> None:
    path = raw(tmp_path / "model.safetensors", b"{}", length=HEADER_BYTES + 1)
    os.truncate(path, HEADER_BYTES + 100)  # a hole, which takes no space
    with pytest.raises(FolderError, match="a header of 100000001 bytes"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(FolderError, match="not a regular file"):
        SafetensorsFolder(tmp_path)


def test_a_number_too_large_for_its_format_is_told_by_its_tensors_name(tmp_path: Path) -> None:
    arrays = {"fits": np.full(3, 65504, np.float32), "not": np.array([1, 7e4, np.inf], np.float32)}
    plan = [Planned(name=name, dtype="F16", shape=(3,)) for name in arrays]
    with pytest.raises(ConfigError, match="not: 1 of its 3 numbers are too large for float16"):
        write_folder(tmp_path, plan, arrays.__getitem__, metadata={})


def test_an_index_reaches_no_file_outside_its_folder(tmp_path: Path) -> None:
    outside = written(tmp_path / "outside") / "model.safetensors"
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in (
        "../outside/model.safetensors",
        str(outside),
        "a\\b.safetensors",
        "..",
        "config.json",
        "x/y.safetensors",
    ):
        (inside / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(FolderError, match=r"names files that are no \.safetensors beside it"):
            SafetensorsFolder(inside)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "not an index"),
        (b"[]", "not an index"),
        (b"{}", "not an index"),
        (b'{"weight_map": {}}', "must name a file"),
        (b'{"weight_map": {"a": 3}}', "must name a file"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "stands there twice"),
        (b'{"weight_map": {"a": "gone.safetensors", "b": "model-00001-of-00002.safetensors"}}', "gone.safetensors"),
        (b'{"weight_map": {"b.weight": "model-00001-of-00002.safetensors"}}', "does not fit the files"),
    ],
)
def test_an_index_that_does_not_fit_is_told(index: bytes, message: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "f", shard_bytes=60)
    (folder / INDEX).write_bytes(index)
    with pytest.raises(FolderError, match=message):
        SafetensorsFolder(folder)


def test_all_tensors_that_lie_elsewhere_are_listed(tmp_path: Path) -> None:
    folder = written(tmp_path / "f", shard_bytes=60)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["c"]
    index["weight_map"]["more"] = index["weight_map"]["a"]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(FolderError) as error:
        SafetensorsFolder(folder)
    assert "  c: the index says nothing" in str(error.value) and "  more: " in str(error.value)


def test_a_tensor_in_two_files_is_told(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"a": np.zeros(1, np.float32), name: np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"a": "x.safetensors", "x": "x.safetensors", "y": "y.safetensors"}})
    )
    with pytest.raises(FolderError, match=r"x\.safetensors and y\.safetensors both hold a"):
        SafetensorsFolder(tmp_path)


def test_folders_without_a_clear_set_of_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="no such folder"):
        SafetensorsFolder(tmp_path / "none")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FolderError, match="carry code"):
        SafetensorsFolder(tmp_path)
    for name in ("x", "y"):
        save_file({name: np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FolderError, match=f"2 safetensors files but no {INDEX}"):
        SafetensorsFolder(tmp_path)
    save_file({"z": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "x.safetensors", "y": "y.safetensors"}}))
    with pytest.raises(FolderError, match="holds both"):
        SafetensorsFolder(tmp_path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 420), value=st.integers(0, 255), cut=st.integers(0, 40))
def test_what_we_accept_the_library_accepts_and_nothing_else_is_raised(
    place: int, value: int, cut: int, tmp_path: Path
) -> None:
    """One byte of header or data changed, and perhaps the end cut off."""
    path = written(tmp_path / "f") / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] = value
    path.write_bytes(bytes(data[: len(data) - cut]))
    try:
        tensors, _ = read_header(path)
    except UserError:
        return
    with safetensors.safe_open(path, "np") as theirs:
        assert set(theirs.keys()) == {tensor.name for tensor in tensors}
