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
        "count": -0.001,
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
        ["count", "0.00", "-"],
        ["pointing", "-", "-"],
        ["pointing by chance", "9.52", "-"],
    ]


def test_figures_that_the_first_model_lacks_are_shown():
    """Attention that is a mean, in the first column, has no gaze."""
    mean, soft = {"BLEU-1": 50.0}, {"BLEU-1": 51.0, "num_pixels": 64, "places": 9.0}
    for columns in ({"mean": mean, "soft": soft}, {"soft": soft, "mean": mean}):
        metrics, gaze = tables.make_table("model", columns)
        assert [row[0] for row in gaze["rows"]] == ["places of the grid", "places"]
        cells = dict(zip(columns, gaze["rows"][1][1:]))
        assert cells == {"mean": "-", "soft": "9.00"}
        assert {row[0] for row in metrics["rows"]} == {"BLEU-1"}
