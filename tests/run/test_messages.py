"""Tests of ``captioning/run/messages.py``."""

import re

import utils
from utils import UserError


def test_an_error_is_one_line_of_bearable_length_that_ends_in_what_to_do():
    message = str(UserError(f"unknown {'x' * 10**6}\n; choose another"))
    assert (
        len(message) < 1000
        and message.startswith("unknown xxx")
        and message.endswith("\\n; choose another")
    )
    assert str(UserError(message)) == message  # and so it stays when it comes from another process


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
