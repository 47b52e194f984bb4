"""Few pictures: warm-up, patience and notes of small trainings; large ones are as ever."""

import numpy as np
import pytest
from test_eval import evaluate
from test_train import run

import datasets
from captioning.model import schedules
from captioning.report import curves, metrics
from captioning.run.messages import UserError


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(curves, "draw_curves", lambda *_: None)


def rates(updates, **config):
    config = {"warmup": 200, "lr_schedule": "cosine", "metric": "CIDEr"} | config
    config["total_updates"] = updates
    return [schedules.learning_rate_factor(config, update, []) for update in range(updates)]


def test_the_rates_of_a_large_run_are_what_they_were():
    """Eight epochs of Flickr8k: 200 updates of warm-up, then a cosine, to the bit."""
    expected = [(i + 1) / 200 for i in range(200)]
    expected += [0.5 * (1 + np.cos(np.pi * min(1.0, i / 2800))) for i in range(2800)]
    assert rates(8 * 375) == expected


def test_a_warm_up_takes_at_most_a_tenth():
    few = rates(90)  # 48 pictures, 30 epochs
    assert few[:9] == pytest.approx([(i + 1) / 9 for i in range(9)]) and few[9] == 1
    assert rates(9)[0] == 1
    assert rates(90, warmup=4)[:5] == [0.25, 0.5, 0.75, 1, 1]


def test_patience_counts_from_the_end_of_the_warm_up():
    config = {"warmup": 200, "total_updates": 90, "metric": "CIDEr"}  # warm after update 9
    history = [{"update": 3 * i, "CIDEr": 1.0} for i in range(1, 31)]
    stops = [n for n in range(1, 31) if not schedules.is_patient(config, history[:n], patience=6)]
    assert stops[0] == 9  # epochs 4 to 9
    large = [{"update": 375 * i, "CIDEr": 1.0} for i in range(1, 9)]
    config["total_updates"] = 3000
    stops = [n for n in range(1, 9) if not schedules.is_patient(config, large[:n], patience=6)]
    assert stops[0] == 7  # the first was the best, and six have passed since, as ever


def test_a_run_that_ends_early_says_why(training_data, tmp_path, capsys):
    run(training_data, tmp_path, "--learning_rate", 0, "--patience", 2, "--epochs", 9)
    said = "stopped after 3 of 9 epochs: no better BLEU-4 for 2 epochs (--patience)"
    assert said in capsys.readouterr().out
    run(training_data, tmp_path / "whole", "--epochs", 2)
    assert "stopped after" not in capsys.readouterr().out


def test_few_updates_an_epoch_are_a_note_that_says_what_to_do(training_data, tmp_path, capsys):
    run(training_data, tmp_path / "few", "--epochs", 1)
    note = capsys.readouterr().err
    assert "24 training images are 3 updates an epoch at --batch_size 8" in note
    assert "--preset adapt --init_from captioner" in note
    run(training_data, tmp_path / "on", "--epochs", 1, "--init_from", tmp_path / "few")
    run(training_data, tmp_path / "more", "--epochs", 1, "--batch_size", 2)
    assert "updates an epoch" not in capsys.readouterr().err


def test_captions_too_short_for_bleu_4_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "_meteor", lambda gts, res: None)
    short, long = ["a", "dog"], ["a", "dog", "runs", "on"]
    assert metrics.too_short([short, long, short]).startswith("2 of 3 captions")
    assert metrics.too_short([short, long, long]) is None
    records, _ = datasets.shapes_records(12, 3, 3, seed=1, size=64)
    records = [record._replace(captions=["red hexagon", "a hexagon"]) for record in records]
    settings = {"min_word_freq": 1, "max_len": 20, "image_size": 64}
    datasets.write_dataset(tmp_path / "data", records, dataset="own", source="own", **settings)
    data = tmp_path / "data", datasets.base_name("own", 5, 1)
    run(data, tmp_path / "out", "--epochs", 1)
    printed = capsys.readouterr().err
    assert "validation: 6 of 6 captions have fewer than four words" in printed
    assert "--metric CIDEr" in printed
    run(data, tmp_path / "cider", "--epochs", 1, "--metric", "CIDEr")
    assert "--metric CIDEr" not in capsys.readouterr().err
    flags = ["--max_decode_steps", 3, "--model", tmp_path / "out", "--beam_size", 1]
    evaluate(data, tmp_path / "scores", *flags)
    assert "beam size 1: 3 of 3 captions have fewer than four words" in capsys.readouterr().out


def test_cider_of_one_validation_picture_is_refused(tmp_path):
    records, _ = datasets.shapes_records(6, 1, 2, seed=1, size=64)
    settings = {"min_word_freq": 1, "max_len": 50, "image_size": 64}
    datasets.write_dataset(tmp_path, records, dataset="own", source="own", **settings)
    data = tmp_path, datasets.base_name("own", 5, 1)
    with pytest.raises(UserError, match="--metric CIDEr is always 0 for a single image"):
        run(data, tmp_path / "out", "--metric", "CIDEr")
