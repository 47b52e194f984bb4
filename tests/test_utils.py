"""Files, ranges, metrics and messages."""

import argparse
import concurrent.futures
import errno
import importlib
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import utils
from utils import UserError

# ------------------------------------------------------------ files


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "file.png"
    with utils.atomic_path(path) as temporary:
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
    with pytest.raises(error), utils.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["x" * 255, "🐕" * 63, "漢" * 81 + ".hdf5"])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path, name):
    with utils.atomic_path(tmp_path / name) as temporary:
        temporary.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_rights_that_the_user_gives_new_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        utils.write_json(tmp_path / "file", {})
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
        assert os.umask(umask) == umask  # and the mask is as it was
    finally:
        os.umask(before)


def test_what_a_killed_process_left_is_written_over(tmp_path):
    names = []
    for content in ("", "a killed process left this, which is longer"):
        with utils.atomic_path(tmp_path / "file.json") as temporary:
            assert not temporary.read_text()
            names.append(temporary)
            temporary.write_text("whole")
        assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
        temporary.write_text(content)
    utils.write_json(tmp_path / "file.json", {})
    assert names[0] == names[1] and [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_two_writers_of_one_file_take_turns(tmp_path):
    """Each of them writes half, waits, and writes the rest: no file is a mixture."""
    path, seen = tmp_path / "file", set()

    def write(letter):
        with utils.atomic_path(path) as temporary:
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
    with utils.locked(lock, "the data"):
        with fails("the data is being written by another run"), utils.locked(lock, "the data"):
            pytest.fail("it was not locked")
        assert lock.exists()
    assert not list(tmp_path.iterdir())


def test_who_waits_for_a_lock_gets_it_in_turn(tmp_path, capsys):
    inside, most = [], []

    def work(_):
        with utils.locked(tmp_path / "lock", "the data", wait=True):
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
            with utils.atomic_path(tmp_path / "store") as temporary:
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
        with utils.locked(tmp_path / "lock", "the data"):
            utils.write_json(tmp_path / "file.json", [1])
    assert utils.read_json(tmp_path / "file.json") == [1] and len(list(tmp_path.iterdir())) == 1
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1 + (function == "fsync")
    assert all(os.strerror(number) in line and "going on without" in line for line in notes)


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EDQUOT"])
def test_a_disk_that_fails_while_it_flushes_is_an_error(code, tmp_path, monkeypatch, fails):
    def fail(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    utils.write_json(tmp_path / "file.json", ["old"])
    monkeypatch.setattr(os, "fsync", fail)
    with fails(f"cannot write .*file.json: {os.strerror(getattr(errno, code))}"):
        utils.write_json(tmp_path / "file.json", ["new"])
    assert utils.read_json(tmp_path / "file.json") == ["old"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_is_followed_and_a_fifo_written_to(tmp_path):
    (tmp_path / "target.json").write_text("[]")
    for name, target in (("link", "target.json"), ("dangling", "new.json")):
        (tmp_path / name).symlink_to(target)
        utils.write_json(utils.output_path(tmp_path / name), {"a": 1})
        assert (tmp_path / name).is_symlink() and utils.read_json(tmp_path / target) == {"a": 1}
    os.mkfifo(tmp_path / "fifo")
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        read = threads.submit((tmp_path / "fifo").read_text)
        utils.write_json(utils.output_path(tmp_path / "fifo"), [1])
        assert json.loads(read.result(10)) == [1]
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_a_hyphen_is_standard_output(capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stderr)  # where the other text goes
    for name in ("-", "/dev/stdout"):
        utils.write_json(utils.output_path(name), [1])
        assert json.loads(capfd.readouterr().out) == [1]


def test_a_file_that_would_be_lost_or_cannot_be_written_is_refused_first(tmp_path, fails):
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "old.json").write_text("[]")
    (tmp_path / "empty").write_text("")
    (tmp_path / "link").symlink_to("README.md")
    for name in ("README.md", "link"):
        with fails(f"{name} exists and is not JSON: choose another name, or add --force"):
            utils.output_path(tmp_path / name)
        assert utils.output_path(tmp_path / name, force=True) == tmp_path / name
    for name in ("old.json", "empty", "new"):
        assert utils.output_path(str(tmp_path / name)) == tmp_path / name
    with fails("there is no folder .*/typo"):
        utils.output_path(tmp_path / "typo" / "out.json")
    with fails("is a folder; expected a file"):
        utils.output_path(tmp_path)
    assert (tmp_path / "README.md").read_text() == "words" and not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_used_is_found_first(tmp_path, monkeypatch, fails):
    utils.check_disk(tmp_path / "a" / "b", 1000)
    assert not list(tmp_path.iterdir())  # a run that fails leaves no empty folder
    (tmp_path / "file").write_text("")
    with fails("file is a file, expected a folder"):
        utils.check_disk(tmp_path / "file", 0)
    with fails("file is a file, expected a folder"):
        utils.check_disk(tmp_path / "file" / "folder" / "b", 0)
    with monkeypatch.context() as patch, fails("cannot write .*b: you may not"):
        patch.setattr(os, "access", lambda path, _: path != tmp_path)
        utils.check_disk(tmp_path / "a" / "b", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(total=9e9, free=2.5e6))
    with fails(f"{tmp_path} needs 1.30GB, but its disk has 2.50MB free"):
        utils.check_disk(tmp_path, 1.3e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(total=0, free=0))
    utils.check_disk(tmp_path, 1.3e9)  # a file system that says nothing of its size


def test_a_place_that_cannot_be_written_is_named(tmp_path, fails):
    (tmp_path / "file").write_text("not a folder")
    with fails("file/value.json"):
        utils.write_json(tmp_path / "file" / "value.json", 1)
    (tmp_path / "folder").mkdir()
    with fails("cannot write .*folder"):
        utils.write_json(tmp_path / "folder", 1)
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
    utils.write_json(path, value)
    assert utils.read_json(path) == value


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
        utils.read_json(tmp_path / "bad.json")


def test_json_that_is_not_there_is_refused(tmp_path, fails):
    for path in (tmp_path / "missing.json", tmp_path):
        with fails(f"cannot read {path}"):
            utils.read_json(path)


def test_json_of_an_editor_on_windows_is_read(tmp_path):
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert utils.read_json(tmp_path / "bom.json") == {"a": 1}


# ------------------------------------------------------------ values


@pytest.mark.parametrize("text", ["0", "1", "0.5", "1e-3", "-0"])
def test_a_bounded_number_is_read(text):
    assert utils.bounded(float, 0, 1)(text) == float(text)


@pytest.mark.parametrize("text", ["-1e-9", "1.001", "nan", "inf", "-inf", "many", "", "1,5"])
def test_a_number_out_of_bounds_is_refused(text):
    for kind in (int, float):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a value from 0 to 1"):
            utils.bounded(kind, 0, 1)(text)
    with pytest.raises(argparse.ArgumentTypeError, match="0.5: .* a whole number"):
        utils.bounded(int, 0, 1)("0.5")


@pytest.fixture
def parser():
    """A parser of a few flags, whose errors say ``script.py: error: …``."""
    parser = utils.ArgumentParser(
        prog="script.py", examples="python script.py --img a.jpg\nanother"
    )
    parser.add_argument("--img", nargs="+", help="which pictures")
    parser.add_argument("--no_plot", action="store_true", help="draw nothing")
    parser.add_argument("--dropout", type=utils.bounded(float, -1, 1), default=0.5, help="a ratio")
    parser.add_argument("--data_folder", type=Path, default=Path("data"), help="where they are")
    parser.add_argument("--split", choices=("val", "test"), help="which part")
    utils.add_device_flags(parser)
    return parser


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--no_plto", "unknown flag --no_plto; did you mean --no_plot?"),
        ("--no-plto", "unknown flag --no_plto; did you mean --no_plot?"),
        ("--xyzzy 3", "unknown flag --xyzzy; --help lists all flags"),
        ("--dropout 7", "--dropout 7: expected a value from -1 to 1"),
        ("--dropout=-1.5e0", "--dropout -1.5e0: expected a value from -1 to 1"),
        ("--dropout", "--dropout expected one argument"),
        ("--split tset", "--split tset: expected val, test; did you mean test?"),
        ("--split 7", "--split 7: expected val, test"),
        (
            "--img -a.jpg",
            "-a.jpg: flags begin with two hyphens; write a file of that name ./-a.jpg",
        ),
        ("--device gpu", "--device gpu: expected auto, cpu, cuda, cuda:N or mps"),
        ("more", "unrecognized arguments: more"),
    ],
)
def test_a_typing_error_gives_one_line_and_a_hint(argv, message, parser, capsys):
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(argv.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"script.py: error: {message}\n"


def test_hyphens_in_flags_are_underscores_and_those_in_values_stay(parser):
    args = parser.parse_args(
        ["--no-plot", "--data-folder=a-b", "--dropout", "-1e-1", "--img", "c-d"]
    )
    assert args.no_plot and args.data_folder == Path("a-b") and args.img == ["c-d"]
    assert args.dropout == -0.1


def test_help_says_each_default_once_and_ends_in_the_examples(parser, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = parser.format_help()
    assert text.endswith("examples:\n  python script.py --img a.jpg\n  another\n")
    assert "--dropout X" in text and "--data_folder FOLDER" in text and "--workers N" in text
    assert text.count("(default: 0.5)") == 1 and "None" not in text and "False" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_an_error_is_one_line_of_bearable_length_that_ends_in_what_to_do():
    message = str(UserError(f"unknown {'x' * 10**6}\n; choose another"))
    assert (
        len(message) < 1000
        and message.startswith("unknown xxx")
        and message.endswith("\\n; choose another")
    )
    assert str(UserError(message)) == message  # and so it stays when it comes from another process


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_here_is_refused(name, fails):
    with fails("--device"):
        utils.pick_device(name)


@pytest.fixture
def cards(monkeypatch):
    """Three made-up GPUs; the list of what is done with them, in order."""
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(f"current {device}"))
    monkeypatch.setattr(torch, "empty", lambda *_, device: done.append(f"used {device}"))
    return done


@pytest.mark.parametrize(
    "name, expected",
    [
        ("cuda", ["current 0", "used cuda"]),
        ("auto", ["current 0", "used cuda"]),
        ("cuda:2", ["current 2", "used cuda:2"]),
    ],
)
def test_a_card_is_made_the_current_one_before_it_is_used(name, expected, cards, fails):
    assert utils.pick_device(name).type == "cuda"
    assert cards == expected
    with fails("--device cuda:3: torch finds 3 GPUs here"):
        utils.pick_device("cuda:3")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_each_process_opens_its_own_card_alone(name, cards, monkeypatch, fails):
    from torch import distributed

    monkeypatch.setattr(distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(distributed, "rendezvous", lambda _: iter([(None, 1, 2)]))
    monkeypatch.setattr(distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with utils.processes(name) as device:
        assert device == torch.device("cuda:1")
    assert not sys.stdout.closed and cards == ["current 1", "used cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    with fails("torch finds 3 GPUs here"), utils.processes(name):
        pytest.fail("there is no such card")


def test_autocast_is_off_unless_asked_for():
    weights = torch.ones(2, 2)
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with utils.autocast(torch.device("cpu"), enabled):
            assert (weights @ weights).dtype == dtype


def test_devices():
    assert utils.pick_device("cpu").type == "cpu"
    assert utils.pick_device("auto").type in ("cpu", "cuda", "mps")
    assert torch.__version__ in utils.describe_machine(torch.device("cpu"))


SCRIPT = """
    import sys
    import utils

    def main(args):
        {body}

    utils.run(main, utils.ArgumentParser(prog="script.py"))
"""


@pytest.mark.parametrize(
    "body, code, message",
    [
        (
            'raise utils.UserError("--img x: no such picture")',
            2,
            "script.py: error: --img x: no such picture\n",
        ),
        (
            "raise utils.UserError('two\\nlines\\x1b[2J of caf\\udce9 漢')",
            2,
            "script.py: error: two\\nlines\\x1b[2J of caf\\udce9 漢\n",
        ),
        (
            "open('missing/file')",
            2,
            "script.py: error: cannot use missing/file: No such file or directory; check the disk's"
            " space and your rights\n",
        ),
        ("raise KeyboardInterrupt", 130, "script.py: stopped by SIGINT\n"),
        ("print(1)", 0, ""),
    ],
)
def test_a_user_sees_one_line_and_no_traceback(body, code, message, tmp_path):
    done = run_script(SCRIPT.format(body=body), tmp_path)
    assert (done.returncode, done.stderr) == (code, message)


def test_a_log_that_is_not_utf_8_holds_what_it_can(tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "PYTHONIOENCODING", "ascii")
    done = run_script(SCRIPT.format(body="print('a \\u6f22')"), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a \\u6f22\n", "")


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(SCRIPT.format(body='[print("line", i) for i in range(100000)]'))
    )
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(30) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("times", [1, 3])  # ``timeout`` and torchrun send a signal twice
def test_a_signal_ends_a_script_with_one_line_from_the_start(name, times, tmp_path):
    body = f"""import os, signal, threading, time
        for _ in range({times}):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.{name})).start()
        try:
            import torch  # takes a second or more
            time.sleep(60)
        finally:
            with utils.atomic_path({str(tmp_path / "new")!r}):  # what cleans up is not disturbed
                time.sleep(0.5)"""
    done = run_script(SCRIPT.format(body=body), tmp_path)
    assert done.stderr == f"script.py: stopped by {name}\n"
    assert done.returncode == 128 + getattr(signal, name)


def test_output_that_finds_no_room_ends_in_one_line(tmp_path):
    for body in ("print(1)", "[print('line', i) for i in range(100000)]"):
        (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT.format(body=body)))
        with open("/dev/full", "w") as full:
            command = [sys.executable, tmp_path / "script.py"]
            done = subprocess.run(
                command,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                env=ENVIRONMENT,
                check=False,
            )
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "script.py: error: cannot use standard output: No space left" in done.stderr


@pytest.mark.parametrize(
    "busy, settings, policy",
    [
        (0.1, {}, None),
        (1.9, {}, "PASSIVE"),
        (1.9, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),  # the user's own settings win
        (1.9, {"GOMP_SPINCOUNT": "1000"}, None),
    ],
)
def test_where_others_use_the_cores_openmp_waits_passively(busy, settings, policy, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TORCH_DISABLE_NATIVE_JIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(utils, "busy_cores", lambda: busy)
    utils.prepare_process()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    assert os.environ["TORCH_DISABLE_NATIVE_JIT"] == "1"
    said = utils.describe_machine(torch.device("cpu"))
    assert ("OMP_WAIT_POLICY" in said) == (policy is not None) and str(policy or "") in said


def test_busy_cores_are_those_of_others(monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: [100.0, 50.0, 25.0, 0.0])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2}, raising=False)
    assert utils.busy_cores() == 0.75
    monkeypatch.setattr(psutil, "cpu_percent", lambda **_: os.listdir("/proc/is/not"))
    assert utils.busy_cores() == 0
    assert len(utils.own_cores()) == 2


def test_a_package_that_is_not_installed_is_named_in_one_line(tmp_path):
    done = run_script(SCRIPT.format(body="import not_installed"), tmp_path)
    assert done.returncode == 2 and done.stderr == (
        "script.py: error: No module named 'not_installed': python -m pip install -r "
        "requirements.txt installs what the suite needs\n"
    )


def test_our_own_mistakes_keep_their_traceback(tmp_path):
    done = run_script(SCRIPT.format(body="raise ValueError(1)"), tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(utils.__file__).parent),
    "PYTHONDONTWRITEBYTECODE": "1",
}


def run_script(text, folder):
    (folder / "script.py").write_text(textwrap.dedent(text))
    return subprocess.run(
        [sys.executable, folder / "script.py"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )


def test_in_a_log_progress_is_a_plain_line_now_and_then(capsys):
    assert list(utils.progress([1, 2, 3], desc="reading")) == [1, 2, 3]
    assert capsys.readouterr().err == ""  # it took less than half a minute
    with utils.progress(desc="reading", total=3, unit="picture", delay=0, mininterval=0) as bar:
        bar.set_postfix_str("loss 1.0")
        bar.update(3)
    out, err = capsys.readouterr()
    lines = err.replace("\r", "").split("\n")
    assert not out
    assert all(re.fullmatch(r"reading: \d/3, .* left, .*|\s*", line) for line in lines)
    assert any(re.match("reading: 3/3, .* left, .*picture.*, loss 1.0", line) for line in lines)


# ------------------------------------------------------------ metrics

CAPTIONS = [  # candidate, references
    (
        "a dog runs on the grass",
        ["a dog runs on the green grass", "the dog is running", "a brown dog on grass"],
    ),
    ("two men play football", ["two men are playing football on a field", "men play a game"]),
    ("a a a a", ["a cat sits on a mat", "the cat is on the mat"]),
    (
        "a child in a red shirt climbs a rope",
        ["a child in a red shirt climbs up a rope", "a child climbs a rope"],
    ),
]
HYPOTHESES = [candidate.split() for candidate, _ in CAPTIONS]
REFERENCES = [[text.split() for text in texts] for _, texts in CAPTIONS]


def bleu(references, hypotheses, n):
    """Papineni et al. 2002, by loops: clipped counts over the corpus, closest reference length."""
    precisions, length, reference_length = [], 0, 0
    for order in range(1, n + 1):
        hits = total = 0
        for texts, words in zip(references, hypotheses):
            grams = Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))
            limits = Counter()
            for text in texts:
                limits |= Counter(tuple(text[i : i + order]) for i in range(len(text) - order + 1))
            hits += sum((grams & limits).values())
            total += sum(grams.values())
        precisions.append(hits / total)
    for texts, words in zip(references, hypotheses):
        length += len(words)
        reference_length += min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
    brevity = 1 if length > reference_length else math.exp(1 - reference_length / length)
    return 100 * brevity * math.exp(sum(map(math.log, precisions)) / n)


def test_bleu_equals_the_papers_formula():
    scores = utils.score_captions(REFERENCES, HYPOTHESES)
    for n in range(1, 5):
        assert scores[f"BLEU-{n}"] == pytest.approx(bleu(REFERENCES, HYPOTHESES, n))
    assert 0 < scores["BLEU-4"] < scores["BLEU-1"] < 100


def as_coco():
    return (
        {i: [" ".join(text) for text in texts] for i, texts in enumerate(REFERENCES)},
        {i: [" ".join(words)] for i, words in enumerate(HYPOTHESES)},
    )


def test_metrics_equal_their_published_implementations():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    scores = utils.score_captions(REFERENCES, HYPOTHESES)
    gts, res = as_coco()
    assert [scores[f"BLEU-{n}"] for n in range(1, 5)] == pytest.approx(
        [100 * b for b in Bleu().compute_score(gts, res, verbose=0)[0]], rel=1e-4
    )
    assert scores["ROUGE-L"] == pytest.approx(100 * Rouge().compute_score(gts, res)[0])
    assert scores["CIDEr"] == pytest.approx(100 * Cider().compute_score(gts, res)[0])
    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
def test_meteor_is_the_same_in_every_language(monkeypatch):
    found = []
    for options in ("", "-Duser.language=de -Duser.country=DE", "-Duser.language=fr"):
        for name in ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS"):
            monkeypatch.setenv(name, options)
        found.append(utils.score_captions(REFERENCES, HYPOTHESES, meteor=True)["METEOR"])
    assert 10 < found[0] < 80 and found == found[:1] * 3
    same = [texts[0] for texts in REFERENCES]
    perfect = utils.score_captions(REFERENCES, same, meteor=True)["METEOR"]
    assert perfect == pytest.approx(100)


def test_without_java_there_is_no_meteor(monkeypatch):
    monkeypatch.setattr(utils.shutil, "which", lambda name: None)
    assert utils.score_captions(REFERENCES, HYPOTHESES, meteor=True)["METEOR"] is None


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """``fake_java("exit 1")``: from now on java is this line of shell."""

    def install(line):
        (tmp_path / "java").write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


def test_java_that_fails_costs_meteor_alone(fake_java, capsys):
    fake_java("exit 1")
    utils.note.cache_clear()
    scores = utils.score_captions(REFERENCES, HYPOTHESES, meteor=True)
    assert scores["METEOR"] is None and scores["CIDEr"] > 0
    err = capsys.readouterr().err
    assert "java -version" in err and "Traceback" not in err


def test_java_reads_numbers_as_the_program_writes_them(fake_java, monkeypatch, tmp_path):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("_JAVA_OPTIONS", "-Xss2m -Duser.language=de")
    fake_java(f'echo "$LC_ALL $_JAVA_OPTIONS" > {tmp_path}/said; exit 1')
    assert utils.score_captions(REFERENCES, HYPOTHESES, meteor=True)["METEOR"] is None
    language, said = "-Duser.language=en", (tmp_path / "said").read_text()
    assert said.startswith("C -Xss2m") and said.rindex(language) > said.rindex("language=de")
    assert os.environ["LC_ALL"] == "de_DE.UTF-8"  # this process keeps its own


@pytest.mark.parametrize(
    "hypotheses", [[[]] * 4, [["zebra"]] * 4, [["a"]] * 4, [["zebra"] * 9] * 4]
)
def test_poor_captions_score_low_and_quietly(hypotheses, recwarn):
    scores = utils.score_captions(REFERENCES, hypotheses)
    assert all(0 <= score < 40 for score in scores.values())
    assert scores["BLEU-4"] == pytest.approx(0, abs=1e-3)
    assert not [w for w in recwarn if "BLEU" in str(w.message)]


@pytest.mark.parametrize("references, hypotheses", [([], []), (REFERENCES, HYPOTHESES[:3])])
def test_nothing_to_score_is_refused(references, hypotheses, fails):
    with fails("expected as many"):
        utils.score_captions(references, hypotheses)


def test_reward_is_the_published_cider():
    from pycocoevalcap.cider.cider import Cider

    scorer = utils.CiderD(REFERENCES, end=None)
    rewards = [scorer(i, words) for i, words in enumerate(HYPOTHESES)]
    assert rewards == pytest.approx(list(Cider().compute_score(*as_coco())[1]))
    with_end = utils.CiderD(REFERENCES)
    assert (
        with_end(0, REFERENCES[0][0])
        > with_end(0, REFERENCES[0][0][:-1])
        > with_end(0, HYPOTHESES[2])
        >= 0
    )
    assert with_end(0, []) >= 0 and json.dumps(rewards)
