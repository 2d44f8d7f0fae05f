"""Archives are read in place: members by name, and no archive decides what is opened or how much memory goes."""

import stat
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from mmgpt.data.files import FileError
from mmgpt.data.tars import Tars, archives
from mmgpt.data.zips import MAX_RATIO, Zips
from tests.data.raw import put, tar, zipped
from tests.data.sources.raw import Rejects, reasons


def tars(paths: list[Path]) -> tuple[Tars, Rejects]:
    rejects: Rejects = []
    return Tars(paths, ("jpg",), lambda *line: rejects.append(line)), rejects


def zips(paths: list[Path]) -> tuple[Zips, Rejects]:
    rejects: Rejects = []
    return Zips(paths, ("jpg", "jsonl"), lambda *line: rejects.append(line)), rejects


def test_members_of_several_tars_are_found_by_name(tmp_path: Path):
    a = tar(tmp_path / "a.tar", {"shard/one.jpg": b"1", "two.jpg": b"22", "two.txt": b"no picture"})
    b = tar(tmp_path / "b.tar", {"three.jpg": b"333", "two.jpg": b"22"})
    found, rejects = tars([a, b])
    assert sorted(found) == ["one.jpg", "three.jpg", "two.jpg"] and len(found) == 3 and not rejects
    assert [found.read(name) for name in ("three.jpg", "one.jpg", "two.jpg", "three.jpg")] == [
        b"333",
        b"1",
        b"22",
        b"333",
    ]
    with pytest.raises(FileError, match="missing file"):
        found.read("two.txt")
    with pytest.raises(FileError, match="too many bytes: 3 is over the cap of 2"):
        found.read("three.jpg", 2)
    found.close()


def test_the_first_of_two_members_of_one_name_counts(tmp_path: Path):
    found, rejects = tars([tar(tmp_path / "a.tar", {"x.jpg": b"1"}), tar(tmp_path / "b.tar", {"y/x.jpg": b"other"})])
    assert found.read("x.jpg") == b"1" and reasons(rejects) == {"b/y/x": "duplicate key"}
    found.close()
    found, rejects = zips(
        [zipped(tmp_path / "a.zip", {"x.jpg": b"1"}), zipped(tmp_path / "b.zip", {"x.jpg": b"other"})]
    )
    assert found.read("x.jpg") == b"1" and reasons(rejects) == {"b/x.jpg": "duplicate key"}
    found.close()


def test_a_damaged_tar_gives_what_lies_before(tmp_path: Path):
    a = tar(tmp_path / "a.tar", {f"{i}.jpg": b"x" * 600 for i in range(3)})
    a.write_bytes(a.read_bytes()[:2000])
    found, rejects = tars([a])
    assert list(found) == ["0.jpg"] and reasons(rejects) == {"a": "truncated archive"}


def test_a_tar_that_shrinks_after_the_walk_is_no_short_picture(tmp_path: Path):
    a = tar(tmp_path / "a.tar", {"x.jpg": b"x" * 600})
    found, _ = tars([a])
    a.write_bytes(a.read_bytes()[:700])
    with pytest.raises(FileError, match="truncated archive"):
        found.read("x.jpg")
    found.close()


def test_archives_of_a_folder(tmp_path: Path):
    put(tmp_path, {"b.tar": b"", "a.tar": b"", "c.tar.gz": b"", "d.zip": b""})
    (tmp_path / "e.tar").mkdir()
    rejects: Rejects = []
    assert [p.name for p in archives(tmp_path, lambda *line: rejects.append(line))] == ["a.tar", "b.tar"]
    assert reasons(rejects) == {"c.tar.gz": "compressed archive", "e.tar": "not a regular file"}


def test_tar_names_do_not_leave_the_archive(tmp_path: Path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("../up.jpg", tarfile.REGTYPE), ("/abs.jpg", tarfile.REGTYPE), ("l.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            archive.addfile(info)
    found, rejects = tars([path])
    assert not len(found)
    assert reasons(rejects) == {"a/../up": "unsafe path", "a/abs": "unsafe path", "a/l": "not a regular file"}


# --- zip


def test_members_of_several_zips_are_found_by_name(tmp_path: Path):
    a = zipped(tmp_path / "a.zip", {"shard/one.jpg": b"1", "two.txt": b"no picture"})
    b = zipped(tmp_path / "b.zip", {"two.jpg": b"22"}, zipfile.ZIP_STORED)
    found, rejects = zips([a, b, put(tmp_path, {"c.zip": b"no archive"}) / "c.zip"])
    assert reasons(rejects) == {"c": "damaged archive"}
    assert [found.read(name) for name in ("two.jpg", "one.jpg")] == [b"22", b"1"]
    with pytest.raises(FileError, match="missing file"):
        found.read("two.txt")
    with pytest.raises(FileError, match="too many bytes"):
        found.read("two.jpg", 1)
    found.close()


def test_zip_members_that_are_not_read(tmp_path: Path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../up.jpg", "/abs.jpg", "http://host/a.jpg"):
            archive.writestr(zipfile.ZipInfo(name), b"x")
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/hostname")
        archive.writestr("lzma.jpg", b"x", zipfile.ZIP_LZMA)
        archive.writestr("good.jpg", b"fine")
        archive.writestr("folder.jpg/", b"")
    found, rejects = zips([path])
    assert reasons(rejects) == {
        "a/../up.jpg": "unsafe path",
        "a//abs.jpg": "unsafe path",
        "a/http://host/a.jpg": "unsafe path",
        "a/link.jpg": "not a regular file",
        "a/lzma.jpg": "unknown compression",
    }
    assert found.read("good.jpg") == b"fine"
    found.close()


def test_an_encrypted_member_is_named(tmp_path: Path):
    path = zipped(tmp_path / "a.zip", {"x.jpg": b"secret"}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    for start, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(start) + at] |= 1
    path.write_bytes(bytes(data))
    found, rejects = zips([path])
    assert "x.jpg" not in found and reasons(rejects) == {"a/x.jpg": "encrypted member"}


def test_a_member_that_inflates_out_of_proportion_is_not_read(tmp_path: Path):
    bomb = zipped(tmp_path / "a.zip", {"x.jpg": bytes(4 << 20), "small.jpg": bytes(1 << 19)})
    found, rejects = zips([bomb])
    assert MAX_RATIO < 1000 and reasons(rejects) == {"a/x.jpg": "inflates out of proportion"}
    assert found.read("small.jpg") == bytes(1 << 19), "a short member of one byte is no bomb"
    found.close()


def test_a_member_gives_no_more_than_the_directory_says(tmp_path: Path):
    path = zipped(tmp_path / "a.zip", {"x.jpg": bytes(4 << 20)})
    data = bytearray(path.read_bytes())
    for start, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        data[data.index(start) + at : data.index(start) + at + 4] = struct.pack("<I", 1000)
    path.write_bytes(bytes(data))
    found, rejects = zips([path])
    assert not rejects
    tracemalloc.start()
    with pytest.raises(FileError, match="damaged archive"):  # the sum of what it gives is wrong
        found.read("x.jpg")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20, "the other 4 MB were never inflated"
    found.close()


def test_every_cut_of_a_zip_is_named(tmp_path: Path):
    whole = zipped(tmp_path / "a.zip", {"x.jpg": b"x" * 50, "y.jpg": b"y" * 50}, zipfile.ZIP_STORED)
    data = whole.read_bytes()
    for cut in range(0, len(data), 7):
        whole.write_bytes(data[:cut])
        found, rejects = zips([whole])
        assert "x.jpg" not in found and reasons(rejects) == {"a": "damaged archive"}, cut


def test_damaged_bytes_of_a_member_are_named(tmp_path: Path):
    path = zipped(tmp_path / "a.zip", {"x.jpg": bytes(range(256)) * 4})
    data = path.read_bytes()
    path.write_bytes(data.replace(data[60:80], bytes(20), 1))
    found, _ = zips([path])
    with pytest.raises(FileError, match="damaged archive"):
        found.read("x.jpg")
    found.close()
