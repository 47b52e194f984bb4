"""Tests of ``captioning/report/tables.py``."""

import re

from captioning.report import tables


def test_the_table_has_groups_units_and_a_dash_for_what_cannot_be_had(capsys):
    row = {
        "BLEU-1": 50.0,
        "CIDEr": None,
        "words per caption": 9.0,
        "words used": 1234,
        "numbers agreed": None,
        "count": 99.0,
        "pointing": None,
        "by chance": 9.52,
    }
    columns = {3: row, "people": {"words used": 7, "numbers agreed": None}}
    tables.print_table(tables.make_table("beam size", columns))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    rows = [re.split(r"\s{2,}", line) for line in lines if line]
    assert rows == [
        ["beam size", "3", "people"],
        ["metrics, 0-100"],
        ["BLEU-1", "50.00", "-"],
        ["CIDEr", "-", "-"],
        ["variety"],
        ["words per caption", "9.00", "-"],
        ["different words", "1,234", "7"],
        ["numbers agreed, %", "-", "-"],
        ["scenes, %"],
        ["count", "99.00", "-"],
        ["pointing", "-", "-"],
        ["pointing by chance", "9.52", "-"],
    ]
