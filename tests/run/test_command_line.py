"""Tests of ``captioning/run/command_line.py``."""

import argparse
from pathlib import Path

import pytest

from captioning.run import command_line


@pytest.mark.parametrize("text", ["0", "1", "0.5", "1e-3", "-0"])
def test_a_bounded_number_is_read(text):
    assert command_line.bounded(float, 0, 1)(text) == float(text)


@pytest.mark.parametrize("text", ["-1e-9", "1.001", "nan", "inf", "-inf", "many", "", "1,5"])
def test_a_number_out_of_bounds_is_refused(text):
    for kind in (int, float):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a value from 0 to 1"):
            command_line.bounded(kind, 0, 1)(text)
    with pytest.raises(argparse.ArgumentTypeError, match="0.5: .* a whole number"):
        command_line.bounded(int, 0, 1)("0.5")


@pytest.fixture
def parser():
    """A parser of a few flags, whose errors say ``script.py: error: …``."""
    parser = command_line.ArgumentParser(
        "What it does.\n\npython script.py --img a.jpg\nanother\n", prog="script.py"
    )
    parser.add_argument("--img", nargs="+", help="which pictures")
    parser.add_argument("--no_plot", action="store_true", help="draw nothing")
    parser.add_argument(
        "--dropout", type=command_line.bounded(float, -1, 1), default=0.5, help="a ratio"
    )
    parser.add_argument("--data_folder", type=Path, default=Path("data"), help="where they are")
    parser.add_argument("--split", choices=("val", "test"), help="which part")
    command_line.add_device_flags(parser)
    return parser


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--no_plto", "unknown flag --no_plto; did you mean --no_plot?"),
        ("--no-plto", "unknown flag --no_plto; did you mean --no_plot?"),
        ("--spli test", "unknown flag --spli; did you mean --split?"),
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


def test_a_home_folder_is_found_behind_an_equals_sign_too(parser):
    args = parser.parse_args(["--data_folder=~/data", "--img=~/a.jpg"])
    assert args.data_folder == Path.home() / "data" and args.img == [f"{Path.home()}/a.jpg"]


def test_a_switch_can_be_set_and_unset_and_its_default_may_be_on():
    parser = command_line.ArgumentParser(prog="script.py")
    parser.add_argument("--amp", action=command_line.Switch, help="faster")
    parser.add_argument("--no_repeat", action=command_line.Switch, default=True, help="once")
    said = lambda *flags: tuple(vars(parser.parse_args(flags)).values())
    assert said() == (False, True) and said("--amp", "--no_amp") == (False, True)
    assert said("--amp", "--no-no_repeat") == (True, False)
    parser.set_defaults(amp=True)  # as a preset does
    assert said() == (True, True) and said("--no_amp") == (False, True)


def test_help_says_each_default_once_and_ends_in_the_examples(parser, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = parser.format_help()
    assert text.endswith("examples:\n  python script.py --img a.jpg\n  another\n")
    assert "--dropout X" in text and "--data_folder FOLDER" in text and "--workers N" in text
    assert text.count("(default: 0.5)") == 1 and "None" not in text and "False" not in text
    assert max(map(len, text.splitlines())) <= 80
