"""Files are complete or absent, and each system error is one sentence."""

import errno
import os

import pytest
from disks import small_disk

from fastdiff.errors import UserError
from fastdiff.written import check_writable, write_file, write_text

SIZE = 1 << 16


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    target = tmp_path / "out.json"
    write_text(target, "old")

    def half(path):
        path.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sentence = f"{target} cannot be written: No space left on device"
    with pytest.raises(UserError, match=f"^{sentence}$"):
        write_file(target, half)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert target.read_text() == "old"


def test_a_full_disk_is_one_sentence(tmp_path):
    with small_disk(tmp_path, SIZE) as reason:
        with pytest.raises(UserError, match=f"/out.json cannot be written: {reason}$"):
            write_text(tmp_path / "out.json", "x" * 2 * SIZE)
        assert list(tmp_path.iterdir()) == []


def test_a_device_stays_a_device(tmp_path):
    device = tmp_path / "full"
    try:
        os.mknod(device, 0o20666, os.makedev(1, 7))
        device.open("wb").close()
    except PermissionError:
        pytest.skip("no devices can be made here")
    check_writable(device, "--json")
    with pytest.raises(UserError, match="full cannot be written: No space left on device"):
        write_text(device, "text")
    assert device.is_char_device()


def test_a_link_stays_a_link(tmp_path):
    there, link = tmp_path / "there.json", tmp_path / "link.json"
    link.symlink_to(there)
    write_text(link, "text")
    assert link.is_symlink()
    assert there.read_text() == "text"


def test_places_that_cannot_hold_a_file_are_refused(tmp_path):
    file, loop = tmp_path / "file", tmp_path / "loop"
    file.write_text("")
    loop.symlink_to(loop)
    for path, sentence in {
        tmp_path / "no" / "x.json": f"the folder {tmp_path}/no does not exist; make it first",
        tmp_path: "is a folder; give a file name",
        file / "x.json": f"{file} is not a folder; give another name",
        tmp_path / ("x" * 300): "cannot be written: File name too long",
        loop / "x.json": "does not exist; make it first",
    }.items():
        with pytest.raises(UserError, match=sentence):
            check_writable(path, "--json")


def test_the_longest_possible_name_is_written(tmp_path):
    path = tmp_path / ("x" * 250 + ".json")
    check_writable(path, "--json")
    write_text(path, "text")
    assert path.read_text() == "text"
