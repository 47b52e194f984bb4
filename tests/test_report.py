"""The report in docs/: its tables are what its runs give, and a run can be taken in."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

import datasets
import eval as evaluation
import models
import utils

DOCS = Path(utils.__file__).parent / "docs"
spec = importlib.util.spec_from_file_location("report", DOCS / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)


def run_report(folder, monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["report.py", "--folder", str(folder), *map(str, flags)])
    report.main()


def test_tables_and_plots_are_what_the_runs_give(tmp_path, monkeypatch):
    for name in ("runs.json", "results.md"):
        shutil.copy(DOCS / name, tmp_path)
    run_report(tmp_path, monkeypatch)
    for name in ("runs.json", "results.md"):
        assert (tmp_path / name).read_text() == (DOCS / name).read_text(), (
            "run docs/report.py and commit what it writes"
        )
    assert {path.stem for path in tmp_path.glob("*.png")} == set(report.PLOTS)
    assert all((DOCS / f"{name}.png").exists() for name in report.PLOTS)


def test_a_run_is_taken_in_with_its_options_and_scores(
    trained, best_checkpoint, training_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(utils, "_meteor", lambda gts, res: None)
    folder = tmp_path / "mine-seed0"
    shutil.copytree(trained, folder)
    evaluation.main(
        evaluation.get_args_parser().parse_args(
            [
                "--model",
                str(folder / best_checkpoint.name),
                "--data_folder",
                str(training_data[0]),
                "--beam_size",
                "1",
                "2",
                "--device",
                "cpu",
                "--max_decode_steps",
                "8",
            ]
        )
    )
    for name in ("runs.json", "results.md"):
        shutil.copy(DOCS / name, tmp_path)
    run_report(tmp_path, monkeypatch, "--add", folder)
    run = json.loads((tmp_path / "runs.json").read_text())["mine-seed0"]
    assert run["options"]["encoder"] == "resnet18" and "data_folder" not in run["options"]
    assert [epoch["epoch"] for epoch in run["epochs"]] == [1, 2] and "torch" in run["machine"]
    assert run["parameters"] == sum(
        p.numel() for p in models.load_captioner(best_checkpoint).decoder.parameters()
    )
    metrics = utils.read_json(datasets.metrics_path(folder, training_data[1], "test"))
    assert run["test"]["beams"]["2"]["CIDEr"] == round(metrics["beam_sizes"]["2"]["CIDEr"], 4)
    assert "`python train.py --encoder resnet18 " in (tmp_path / "results.md").read_text()
    assert report.seeds({"a-seed0": 1, "a-seed1": 2, "a-b-seed0": 3}, "a") == [1, 2]


def test_a_run_that_tables_cannot_show_changes_nothing(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "gru-seed2")  # joins the GRU's rows, but was not scored
    for name in ("runs.json", "results.md"):
        shutil.copy(DOCS / name, tmp_path)
    with pytest.raises(SystemExit, match="nothing was taken in"):
        run_report(tmp_path, monkeypatch, "--add", tmp_path / "gru-seed2")
    for name in ("runs.json", "results.md"):
        assert (tmp_path / name).read_text() == (DOCS / name).read_text()


def test_spread_over_seeds_is_half_of_the_range():
    assert (
        report.cell([2.0]) == "2.00"
        and report.cell([1.0, 2.0, 4.0], 1) == "2.3 ± 1.5"
        and report.cell([None]) == "–"
    )
