"""Files, ranges, metrics and messages."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import utils

SCRIPT = """
    import sys
    import utils
    from captioning.run.command_line import ArgumentParser
    from captioning.run.files import atomic_path

    def main(args):
        {body}

    utils.run(main, ArgumentParser(prog="script.py"))
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


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
@pytest.mark.parametrize("times", [1, 3])  # ``timeout`` and torchrun send a signal twice
def test_a_signal_ends_a_script_with_one_line_from_the_start(name, times, tmp_path):
    if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as by nohup")
    body = f"""import os, signal, threading, time
        for _ in range({times}):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.{name})).start()
        try:
            import torch  # takes a second or more
            time.sleep(60)
        finally:
            with atomic_path({str(tmp_path / "new")!r}):  # what cleans up is not disturbed
                time.sleep(0.5)"""
    done = run_script(SCRIPT.format(body=body), tmp_path)
    assert done.stderr == f"script.py: stopped by {name}\n"
    assert done.returncode == 128 + getattr(signal, name)


def test_nohup_is_respected(tmp_path):
    body = "import os, signal; os.kill(os.getpid(), signal.SIGHUP); print('goes on')"
    done = run_script(SCRIPT.format(body=body), tmp_path, "trap '' HUP; ")
    assert (done.returncode, done.stdout, done.stderr) == (0, "goes on\n", "")


def test_output_that_is_closed_is_no_error_and_goes_nowhere_else(tmp_path):
    body = "print(1); utils.note('2'); list(utils.progress([3]))"
    for redirection, seen in ((">&-", ("", "note: 2\n")), ("2>&-", ("1\n", ""))):
        done = run_script(SCRIPT.format(body=body), tmp_path, f"exec {redirection}; ")
        assert (done.returncode, done.stdout, done.stderr) == (0, *seen)


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


def test_a_package_that_is_not_installed_is_named_in_one_line(tmp_path):
    done = run_script(SCRIPT.format(body="import not_installed"), tmp_path)
    assert done.returncode == 2 and done.stderr == (
        "script.py: error: No module named 'not_installed': python -m pip install -r "
        "requirements.txt installs what the suite needs\n"
    )


@pytest.mark.parametrize(
    "error, message",
    [
        ("utils.UserError('no room')", "no room"),
        ("OSError(28, 'No space left', 'file')", "cannot use file: No space left; .*"),
        ("MemoryError('no room')", "out of memory: no room .*"),
    ],
)
def test_what_fails_late_is_named_in_the_one_line_and_the_code_is_1(error, message, tmp_path):
    done = run_script(SCRIPT.format(body=LATE.format(error)), tmp_path)
    expected = rf"script\.py: error: the end failed; the rest is kept: {message}\n"
    assert done.returncode == 1 and re.fullmatch(expected, done.stderr)


def test_what_fails_late_by_our_own_mistake_is_named_below_the_traceback(tmp_path):
    done = run_script(SCRIPT.format(body=LATE.format("ValueError(1)")), tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: 1\nthe end failed; the rest is kept\n")


WHILE_HANDLING = """try:
            raise utils.UserError("no room")
        finally:
            raise ValueError(1)"""
LATE = """from captioning.run.messages import naming
        with naming("the end failed; the rest is kept"):
            raise {}"""


@pytest.mark.parametrize("body", ["raise ValueError(1)", WHILE_HANDLING])
def test_our_own_mistakes_keep_their_traceback(body, tmp_path):
    done = run_script(SCRIPT.format(body=body), tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr and "ValueError: 1" in done.stderr


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(utils.__file__).parent),
    "PYTHONDONTWRITEBYTECODE": "1",
}


def run_script(text, folder, before=""):
    """Run a script, which a shell starts after what is done ``before``."""
    (folder / "script.py").write_text(textwrap.dedent(text))
    return subprocess.run(
        ["sh", "-c", f'{before}exec "$0" "$1"', sys.executable, folder / "script.py"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
