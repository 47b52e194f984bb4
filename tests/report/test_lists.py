"""Tests of ``captioning/report/lists.py``."""

import codecs
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import save

import caption
from captioning.data import formats
from captioning.report import lists
from captioning.run import files


def read_csv(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_and_lines_say_what_the_json_says(describe):
    names = ["a.png", "COCO_val2014_000000000042.png", 'with, "quotes" 漢字.png']
    paths = [save(f"pictures/{name}", i) for i, name in enumerate(names)]
    flags = ["--img", *paths, "--n_best", 2, "--no_plot", "--csv", "said.csv", "--txt", "said.txt"]
    _, results = describe(*flags)
    assert Path("said.csv").read_bytes().startswith(codecs.BOM_UTF8)
    rows, lines = read_csv("said.csv"), Path("said.txt").read_text(encoding="utf-8").splitlines()
    expected = [
        (found, number, said)
        for found in results
        for number, said in enumerate(found["captions"], 1)
    ]
    assert len(rows) == len(lines) == len(expected) > 3
    for row, line, (found, number, said) in zip(rows, lines, expected):
        assert line == f"{found['image']}#{number - 1}\t{said['caption']}"
        assert row["image"] == found["image"] and row["number"] == str(number)
        assert row["image_id"] == str(found.get("image_id", ""))
        shown = {key: str(value) for key, value in said.items()}
        assert {key: row[key] for key in shown} == shown
    describe(*flags)  # what is ours is replaced unasked


def test_create_input_files_reads_the_lines(describe):
    save("pictures/a.png", 1)
    save("pictures/b.png", 2)
    _, results = describe("--img", "pictures", "--no_plot", "--txt", "said.txt", "--n_best", 2)
    said = [(found["image"], c["caption"]) for found in results for c in found["captions"]]
    rows = formats.read_rows(Path("said.txt"), [])
    assert [(row.name, *row.captions) for _, row in rows] == said and len(said) > 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--json", "c.csv"], "--json c.csv: expected a name that ends in .json"),
        (["--csv", "c.json"], "--csv c.json: expected a name that ends in .csv"),
        (["--csv", "c.xlsx"], "--csv c.xlsx: expected a name that ends in .csv"),
        (["--txt", "c.csv"], "--txt c.csv: expected a name that ends in .txt"),
        (["--html", "c.json"], "--html c.json: expected a name that ends in .html"),
        (["--csv", "mine.csv"], "mine.csv exists and is not a table of captions: .*--force"),
        (["--txt", "mine.txt"], "mine.txt exists and is not a list of captions: .*--force"),
        (["--csv", "own.csv"], "own.csv exists and is not a table of captions: .*--force"),
        (["--json", "own.json"], "own.json exists and is not a list of captions: .*--force"),
        (["--csv", "out", "--json", "./out"], "--json and --csv name one file"),
        (["--csv", "-", "--txt", "-"], "--csv - --txt -: expected one list on standard output"),
    ],
)
def test_a_false_name_and_a_list_of_ones_own_are_refused_first(flags, message, describe, fails):
    path = save("pictures/a.png")
    Path("mine.csv").write_text("name,price\n")
    Path("mine.txt").write_text("milk\tbread\n")
    Path("own.csv").write_text("image,caption,split\na.png,a dog,train\n")  # to train on
    Path("own.json").write_text('[{"image": "a.png", "caption": "a dog"}]')
    with fails(message):
        describe("--img", path, *flags)
    assert Path("mine.csv").read_text() == "name,price\n" and not Path("c.csv").exists()
    assert not Path("captions.json").exists()


def test_force_replaces_what_is_there(describe):
    Path("mine.csv").write_text("name,price\n")
    describe("--img", save("pictures/a.png"), "--no_plot", "--csv", "mine.csv", "--force")
    assert read_csv("mine.csv")[0]["image"] == "pictures/a.png"


@pytest.mark.parametrize("kind", ["json", "csv", "txt"])
def test_one_list_can_go_to_standard_output_with_nothing_else_on_it(kind, capfd, tmp_path):
    results = [lists.result(Path("a.png"), [{"caption": "a dog", "log_prob": -1.0}])]
    path = lists.list_paths(**{kind: Path("-")})[kind]
    lists.write_list(kind, path, results)
    out = capfd.readouterr().out
    parts = {
        "json": lambda: json.loads(out)[0]["captions"][0]["caption"],
        "csv": lambda: next(csv.DictReader(io.StringIO(out)))["caption"],
        "txt": lambda: out.removeprefix("a.png#0\t").rstrip("\n"),
    }
    assert parts[kind]() == "a dog" and not out.startswith("\ufeff")


def test_what_is_said_beside_a_list_on_standard_output_goes_to_the_other(best_checkpoint, tmp_path):
    path = save(tmp_path / "photo.png")
    command = [sys.executable, caption.__file__, "--model", best_checkpoint, "--img", path]
    command += ["--no_plot", "--csv", "-"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, check=True)
    (row,) = csv.DictReader(io.StringIO(done.stdout.decode()))
    assert row["image"] == str(path) and row["caption"].encode() in done.stderr
    assert files.output_path("-", kind="csv") == Path("-")
