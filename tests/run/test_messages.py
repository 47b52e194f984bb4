"""Tests of ``captioning/run/messages.py``."""

import re

import pytest

import utils
from captioning.run import messages
from utils import UserError


def test_an_error_is_one_line_of_bearable_length_that_ends_in_what_to_do():
    message = str(UserError(f"unknown {'x' * 10**6}\n; choose another"))
    assert (
        len(message) < 1000
        and message.startswith("unknown xxx")
        and message.endswith("\\n; choose another")
    )
    assert str(UserError(message)) == message  # and so it stays when it comes from another process


def test_of_several_processes_one_says_a_note_and_once(capsys, monkeypatch):
    for is_main in (False, True, True):
        monkeypatch.setattr(messages, "is_main", lambda is_main=is_main: is_main)
        messages.note(f"of process {is_main}")
    monkeypatch.setenv("RANK", "1")  # torchrun says so before the processes have met
    messages.note("of the second process")
    assert capsys.readouterr().err == "note: of process True\n"


def test_one_thing_is_one_and_several_have_an_s():
    counts = [messages.counted(n, "picture") for n in (0, 1, 2, 2000)]
    assert counts == ["0 pictures", "1 picture", "2 pictures", "2,000 pictures"]


def test_in_a_log_progress_is_a_plain_line_now_and_then(capsys, monkeypatch):
    def read(says):
        with utils.progress(desc="reading", total=3, unit="picture", mininterval=0) as bar:
            for i in range(3):
                bar.update()
                bar.set_postfix_str(f"loss {i}")
                if says:
                    bar.write("a message")
        return capsys.readouterr()

    assert read(says=False) == ("", "")  # it took less than half a minute
    assert read(says=True) == ("a message\n" * 3, "")
    monkeypatch.setattr(messages, "LOG_INTERVAL", 0)
    _, err = read(says=False)
    lines = err.splitlines()
    assert all(re.fullmatch(r"reading: \d/3, .* left, .*picture.*", line) for line in lines)
    assert lines[0].startswith("reading: 1/3") and lines[-1].endswith(", loss 2")


def test_a_slip_in_a_tables_entry_gets_a_hint():
    with pytest.raises(UserError, match="unknown encoder 'resent18'.*; did you mean resnet18"):
        messages.look_up({"resnet18": 1, "vgg16": 2}, "resent18", "encoder")
    with pytest.raises(UserError, match="entry of attention 'dot' is .*expected a tuple"):
        messages.look_up({"soft": (int, float), "dot": int}, "dot", "attention")
