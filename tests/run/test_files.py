"""Tests of ``captioning/run/files.py``."""

import argparse
import concurrent.futures
import errno
import functools
import importlib
import json
import os
import shutil
import stat
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import utils
from captioning.report import lists
from captioning.run import files
from utils import UserError


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "file.png"
    with files.atomic_path(path) as temporary:
        assert temporary.suffix == ".png" and temporary.parent == path.parent
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["file.png"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, UserError])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["x" * 255, "🐕" * 63, "漢" * 81 + ".hdf5"])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path, name):
    with files.atomic_path(tmp_path / name) as temporary:
        temporary.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_rights_that_the_user_gives_new_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        files.write_json(tmp_path / "file", {})
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
        assert os.umask(umask) == umask  # and the mask is as it was
    finally:
        os.umask(before)


def test_what_a_killed_process_left_is_written_over(tmp_path):
    names = []
    for content in ("", "a killed process left this, which is longer"):
        with files.atomic_path(tmp_path / "file.json") as temporary:
            assert not temporary.read_text()
            names.append(temporary)
            temporary.write_text("whole")
        assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
        temporary.write_text(content)
    files.write_json(tmp_path / "file.json", {})
    assert names[0] == names[1] and [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_two_writers_of_one_file_take_turns(tmp_path):
    """Each of them writes half, waits, and writes the rest: no file is a mixture."""
    path, seen = tmp_path / "file", set()

    def write(letter):
        with files.atomic_path(path) as temporary:
            temporary.write_text(letter * 5)
            time.sleep(0.02)
            with open(temporary, "a") as file:
                file.write(letter * 5)
        seen.add(path.read_text())

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(write, "abcdefgh"))
    assert seen <= {letter * 10 for letter in "abcdefgh"} and len(list(tmp_path.iterdir())) == 1


def test_a_lock_is_held_by_one_and_leaves_nothing(tmp_path, fails):
    lock = tmp_path / "new" / "lock"
    with files.locked(lock, "the data"):
        with fails("the data is being written by another run"), files.locked(lock, "the data"):
            pytest.fail("it was not locked")
        assert lock.exists()
    assert not list(tmp_path.iterdir())


def test_who_waits_for_a_lock_gets_it_in_turn(tmp_path, capsys):
    inside, most = [], []

    def work(_):
        with files.locked(tmp_path / "lock", "the data", wait=True):
            inside.append(None)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(16)))
    assert most == [1] * 16 and not list(tmp_path.iterdir())
    assert "waiting for another run, which is writing the data" in capsys.readouterr().err


def test_many_runs_may_write_one_file(tmp_path):
    def work(run):
        for i in range(60):
            with files.atomic_path(tmp_path / "store") as temporary:
                temporary.write_text(f"{run} {i}")

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize(
    "module, function, code",
    [
        ("fcntl", "flock", "ENOLCK"),
        ("fcntl", "flock", "ENOSYS"),
        ("os", "fsync", "EINVAL"),
        ("os", "fsync", "ENOSYS"),
    ],
)
def test_what_a_file_system_cannot_do_is_left_out_with_one_note(
    module, function, code, tmp_path, monkeypatch, capsys
):
    number = getattr(errno, code)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    utils.note.cache_clear()
    monkeypatch.setattr(importlib.import_module(module), function, fail)
    for _ in range(3):
        with files.locked(tmp_path / "lock", "the data"):
            files.write_json(tmp_path / "file.json", [1])
    assert files.read_json(tmp_path / "file.json") == [1] and len(list(tmp_path.iterdir())) == 1
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1 + (function == "fsync")
    assert all(os.strerror(number) in line and "going on without" in line for line in notes)


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EDQUOT"])
def test_a_disk_that_fails_while_it_flushes_is_an_error(code, tmp_path, monkeypatch, fails):
    def fail(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    files.write_json(tmp_path / "file.json", ["old"])
    monkeypatch.setattr(os, "fsync", fail)
    with fails(f"cannot write .*file.json: {os.strerror(getattr(errno, code))}"):
        files.write_json(tmp_path / "file.json", ["new"])
    assert files.read_json(tmp_path / "file.json") == ["old"]
    assert len(list(tmp_path.iterdir())) == 1


json_path = functools.partial(files.output_path, kind="json", begins=lists.BEGINS["json"])


def test_a_link_is_followed_and_a_fifo_written_to(tmp_path):
    (tmp_path / "target.json").write_text("[]")
    for name, target in (("link", "target.json"), ("dangling", "new.json")):
        (tmp_path / name).symlink_to(target)
        files.write_json(json_path(tmp_path / name), {"a": 1})
        assert (tmp_path / name).is_symlink() and files.read_json(tmp_path / target) == {"a": 1}
    os.mkfifo(tmp_path / "fifo")
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        read = threads.submit((tmp_path / "fifo").read_text)
        files.write_json(json_path(tmp_path / "fifo"), [1])
        assert json.loads(read.result(10)) == [1]
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_a_hyphen_is_standard_output(capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stderr)  # where the other text goes
    for name in ("-", "/dev/stdout"):
        files.write_json(json_path(name), [1])
        assert json.loads(capfd.readouterr().out) == [1]


def test_a_file_that_would_be_lost_or_cannot_be_written_is_refused_first(tmp_path, fails):
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "old.json").write_text("[]")
    (tmp_path / "empty").write_text("")
    (tmp_path / "link").symlink_to("README.md")
    for name in ("README.md", "link"):
        with fails(
            f"{name} exists and is not a list of captions: choose another name, or add --force"
        ):
            json_path(tmp_path / name)
        assert json_path(tmp_path / name, force=True) == tmp_path / name
    for name in ("old.json", "empty", "new", "new.json", "NEW.JSON"):
        assert json_path(str(tmp_path / name)) == tmp_path / name
    for name in ("c.csv", "c.json.txt", "c.xlsx"):
        with fails(f"--json .*{name}: expected a name that ends in .json"):
            json_path(tmp_path / name)
    with fails("there is no folder .*/typo"):
        json_path(tmp_path / "typo" / "out.json")
    with fails("is a folder; expected a file"):
        json_path(tmp_path)
    assert (tmp_path / "README.md").read_text() == "words" and not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_used_is_found_first(tmp_path, monkeypatch, fails):
    files.check_disk(tmp_path / "a" / "b", 1000)
    assert not list(tmp_path.iterdir())  # a run that fails leaves no empty folder
    (tmp_path / "file").write_text("")
    with fails("file is a file, expected a folder"):
        files.check_disk(tmp_path / "file", 0)
    with fails("file is a file, expected a folder"):
        files.check_disk(tmp_path / "file" / "folder" / "b", 0)
    with monkeypatch.context() as patch, fails("cannot write .*b: you may not"):
        patch.setattr(os, "access", lambda path, _: path != tmp_path)
        files.check_disk(tmp_path / "a" / "b", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(total=9e9, free=2.5e6))
    with fails(f"{tmp_path} needs 1.30GB, but its disk has 2.50MB free"):
        files.check_disk(tmp_path, 1.3e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(total=0, free=0))
    files.check_disk(tmp_path, 1.3e9)  # a file system that says nothing of its size


def test_a_place_that_cannot_be_written_is_named(tmp_path, fails):
    (tmp_path / "file").write_text("not a folder")
    with fails("file/value.json"):
        files.write_json(tmp_path / "file" / "value.json", 1)
    (tmp_path / "folder").mkdir()
    with fails("cannot write .*folder"):
        files.write_json(tmp_path / "folder", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda value: (
            st.lists(value, max_size=3)
            | st.dictionaries(st.text("aé\n", max_size=3), value, max_size=3)
        ),
    )
)
def test_json_comes_back_as_it_was(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": 1,\n "b" 2}', "line 2 column 6"),
        (b"", "line 1 column 1"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"[" * 10**6, "recursion"),
    ],
)
def test_what_is_no_json_is_refused(tmp_path, content, message, fails):
    (tmp_path / "bad.json").write_bytes(content)
    with fails(f"bad.json.*{message}"):
        files.read_json(tmp_path / "bad.json")


def test_json_that_is_not_there_is_refused(tmp_path, fails):
    for path in (tmp_path / "missing.json", tmp_path):
        with fails(f"cannot read {path}"):
            files.read_json(path)


def test_json_of_an_editor_on_windows_is_read(tmp_path):
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert files.read_json(tmp_path / "bom.json") == {"a": 1}
