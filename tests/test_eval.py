"""Scoring a tiny model: what is written, printed and refused."""

import codecs
import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import train_args
from helpers import without

import datasets
import eval as evaluation
import models
import train
import utils
from captioning.model import encoders
from captioning.report import curves, gaze, scenes, tables
from captioning.report import evaluation as written
from captioning.report import metrics as metrics_room
from captioning.run import files as files_room
from captioning.run import paths


def evaluate(data, folder, *flags):
    """Run eval.py on the test split; return its metrics."""
    argv = [
        "--data_folder",
        data[0],
        "--output_folder",
        folder,
        "--workers",
        1,
        "--device",
        "cpu",
        "--max_decode_steps",
        8,
    ]
    evaluation.main(evaluation.get_args_parser().parse_args([str(arg) for arg in [*argv, *flags]]))
    split = flags[flags.index("--split") + 1] if "--split" in flags else "test"
    (path,) = Path(folder).glob(paths.metrics_path("", f"{data[1]}*", split).name)
    return files_room.read_json(path)


@pytest.fixture
def no_java(monkeypatch):
    """METEOR takes seconds to start; other tests hold it."""
    monkeypatch.setattr(metrics_room, "_meteor", lambda gts, res: None)


@pytest.mark.parametrize("split", ["test", "val"])
def test_every_picture_is_captioned_once_and_scored(
    split, best_checkpoint, training_data, tmp_path, capsys, no_java
):
    metrics = evaluate(
        training_data, tmp_path, "--model", best_checkpoint, "--beam_size", 1, 3, "--split", split
    )
    assert set(metrics["beam_sizes"]) == {"1", "3"} and metrics["scale"] == "0-100"
    assert metrics["split"] == split and metrics["models"] == [str(best_checkpoint)]
    data = datasets.CaptionDataset(datasets.split_path(training_data[0], split, training_data[1]))
    captioner = models.load_captioner(best_checkpoint)
    for beam_size in (1, 3):
        captions = files_room.read_json(
            paths.captions_path(tmp_path, training_data[1], split, beam_size)
        )
        assert [c["image_id"] for c in captions] == list(range(len(data)))
        assert [c["file_name"] for c in captions] == data.image_names
        found = captioner.caption(
            torch.from_numpy(data.images(slice(None))),
            beam_size=beam_size,
            length_penalty=0.7,
            max_decode_steps=8,
        )
        assert [c["caption"].split() for c in captions] == [captioner.text(h[0]) for h in found]
        row = metrics["beam_sizes"][str(beam_size)]
        scores = metrics_room.score_captions(
            data.references, [c["caption"].split() for c in captions]
        )
        assert {name: row[name] for name in scores} == pytest.approx(scores)
        assert (
            0 <= row["pointing"] <= 100 if row["pointing"] is not None else row["by chance"] is None
        )
        assert row["objects"] == 100 * sum(
            scenes.judge_caption(scene, c["caption"].split())["objects"]
            for scene, c in zip(data.scenes, captions)
        ) / len(data)
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if "beam size" in line)
    assert header.split()[-3:] == ["1", "3", "people"]
    rows = [line.split() for line in out.splitlines()]
    assert any(row[:1] == ["BLEU-4"] and row[3:] == ["-"] for row in rows)
    assert metrics["people"] == pytest.approx(
        metrics_room.score_variety(
            [r[1:] for r in data.references], [r[0] for r in data.references]
        )
    )
    assert "METEOR" in out and "Java" in out and "image_id in the captions is the row" in out
    groups = [line for line in out.splitlines() if line in tables.GROUPS.values()]
    assert groups == list(tables.GROUPS.values())
    assert "pointing by chance" in out
    files = sorted(map(str, tmp_path.iterdir()))
    assert len(files) == 4 and all(file in out for file in files)


def read_csv(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_each_pictures_own_scores_are_in_the_csv_and_beside_its_caption(
    talkative, training_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(metrics_room, "_meteor", lambda gts, res: (50.0, [0.5] * len(res)))
    metrics = evaluate(training_data, tmp_path, "--model", talkative, "--beam_size", 1, 3)
    data = datasets.CaptionDataset(datasets.split_path(training_data[0], "test", training_data[1]))
    table = read_csv(paths.scores_path(tmp_path, training_data[1], "test"))
    assert paths.scores_path(tmp_path, training_data[1], "test").read_bytes()[:3] == codecs.BOM_UTF8
    assert len(table) == 2 * len(data)
    for beam_size in ("1", "3"):
        path = paths.captions_path(tmp_path, training_data[1], "test", beam_size)
        rows = files_room.read_json(path)
        lines = [line for line in table if line["beam size"] == beam_size]
        shown = [{key: str(value) for key, value in row.items()} for row in rows]
        assert [without(line, "beam size") for line in lines] == shown
        for metric in ("CIDEr", "ROUGE-L"):
            mean = sum(row[metric] for row in rows) / len(rows)
            assert mean == pytest.approx(metrics["beam_sizes"][beam_size][metric], abs=0.01)
        for row in rows:
            assert row["words"] == len(row["caption"].split()) and row["log_prob"] < 0
            assert row["METEOR"] == 50 and 0 <= row["BLEU-4"] <= 100


def test_an_ensemble_of_equals_is_its_member(best_checkpoint, training_data, tmp_path, no_java):
    alone = evaluate(training_data, tmp_path / "1", "--model", best_checkpoint)["beam_sizes"]["5"]
    twice = evaluate(training_data, tmp_path / "2", "--model", best_checkpoint, best_checkpoint)[
        "beam_sizes"
    ]["5"]
    twice.pop("ms per picture")
    assert twice == {name: alone[name] for name in twice} and "BLEU-4" in twice
    assert not paths.metrics_path(
        tmp_path / "2", training_data[1], "test"
    ).exists()  # that name is the model's own


def test_different_models_decode_together(
    best_checkpoint, training_data, tmp_path, no_java, monkeypatch
):
    monkeypatch.setattr(curves, "draw_curves", lambda *_: None)
    train.main(
        train_args(
            training_data,
            tmp_path / "gru",
            "--decoder",
            "gru",
            "--attention",
            "mean",
            "--epochs",
            1,
        )
    )
    other = paths.checkpoint_path(tmp_path / "gru", training_data[1])
    metrics = evaluate(training_data, tmp_path, "--model", best_checkpoint, other, "--beam_size", 2)
    assert (
        metrics["models"] == [str(best_checkpoint), str(other)]
        and 0 <= metrics["beam_sizes"]["2"]["BLEU-1"] <= 100
    )


def test_the_mean_of_two_trainings_is_a_model_of_its_own(
    best_checkpoint, training_data, tmp_path, no_java, monkeypatch, fails
):
    monkeypatch.setattr(curves, "draw_curves", lambda *_: None)
    train.main(
        train_args(training_data, tmp_path / "on", "--init_from", best_checkpoint, "--epochs", 1)
    )
    after = paths.checkpoint_path(tmp_path / "on", training_data[1])
    mean = tmp_path / "mean" / "mean.pth.tar"
    mean.parent.mkdir()
    with fails("there is no"):
        evaluate(
            (tmp_path / "typo", training_data[1]),
            tmp_path / "a",
            "--model",
            best_checkpoint,
            after,
            "--average",
            mean,
        )
    metrics = evaluate(
        training_data, tmp_path / "a", "--model", best_checkpoint, after, "--average", mean
    )
    assert metrics["models"] == [str(mean)] and metrics["mean of"] == [
        str(best_checkpoint),
        str(after),
    ]
    states = [models.load_checkpoint(path) for path in (best_checkpoint, after, mean)]
    weights = [state["decoder"]["fc.weight"] for state in states]
    assert not torch.equal(weights[0], weights[1])
    torch.testing.assert_close(weights[2], (weights[0] + weights[1]) / 2)
    assert all(
        torch.equal(tensor, states[0]["encoder"][key])
        for key, tensor in states[2]["encoder"].items()
    )
    again = evaluate(training_data, tmp_path / "b", "--model", mean)
    for rows in (metrics["beam_sizes"], again["beam_sizes"]):
        rows["5"].pop("ms per picture")
    assert again["beam_sizes"] == metrics["beam_sizes"]
    train.main(
        train_args(training_data, tmp_path / "from_mean", "--init_from", mean, "--epochs", 1)
    )
    with fails("--average .*mean.pth.tar exists"):
        evaluate(training_data, tmp_path, "--model", best_checkpoint, after, "--average", mean)
    # other weights, and others of the same shape
    for change in ({"decoder": "gru"}, {"position_encoding": True}):
        checkpoint = models.load_checkpoint(mean)
        checkpoint["config"] |= change
        decoder = models.build_decoder(checkpoint["config"], len(checkpoint["word_map"]))
        checkpoint["decoder"] = decoder.state_dict()
        models.save_checkpoint(tmp_path / "other.pth.tar", checkpoint)
        flags = [
            "--model",
            mean,
            tmp_path / "other.pth.tar",
            "--average",
            tmp_path / "none.pth.tar",
        ]
        with fails("not of one architecture"):
            evaluate(training_data, tmp_path, *flags)


def test_scores_of_another_model_are_not_overwritten(
    trained, training_data, tmp_path, no_java, fails
):
    best, last = (
        paths.checkpoint_path(trained, training_data[1], best=best) for best in (True, False)
    )
    before = evaluate(training_data, tmp_path, "--model", best)
    with fails("scores of another model: choose another --output_folder"):
        evaluate(training_data, tmp_path, "--model", last)
    again = evaluate(training_data, tmp_path, "--model", best, "--length_penalty", 1)
    assert again["models"] == before["models"] and again["length_penalty"] == 1


def test_a_run_that_was_moved_is_scored_again(
    best_checkpoint, training_data, tmp_path, monkeypatch, no_java
):
    """Beside its model, and named by another relative path."""
    for folder in ("run", "moved", "deep/moved"):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
    (tmp_path / "run").mkdir()
    model = Path(shutil.copy(best_checkpoint, tmp_path / "run"))
    evaluate(training_data, tmp_path / "run", "--model", model)
    (tmp_path / "run").rename(tmp_path / "deep/moved")
    monkeypatch.chdir(tmp_path / "deep")
    moved = evaluate(training_data, "moved", "--model", "moved", "--length_penalty", 1)
    assert moved["models"] == [str(tmp_path / "deep/moved" / model.name)]
    evaluate(training_data, tmp_path / "apart", "--model", "moved")
    monkeypatch.chdir(tmp_path)
    evaluate(training_data, tmp_path / "apart", "--model", "deep/../deep/moved")


def test_captions_that_would_be_written_over_are_refused(
    best_checkpoint, training_data, tmp_path, no_java, fails
):
    evaluate(training_data, tmp_path, "--model", best_checkpoint, "--beam_size", 2)
    (said,) = tmp_path.glob("captions_*.json")
    before = said.read_bytes()
    flags = ["--model", best_checkpoint, "--beam_size", 2, "--captions", said]
    with fails("--captions .* would be written over: copy it, or choose another --output_folder"):
        evaluate(training_data, tmp_path, *flags)
    assert said.read_bytes() == before
    evaluate(training_data, tmp_path / "other", *flags)


def test_a_comparison_that_is_stopped_keeps_the_first_models_figures(
    trained, training_data, tmp_path, no_java, monkeypatch
):
    search, calls = evaluation.search, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return search(*args)

    monkeypatch.setattr(evaluation, "search", stopped)
    pair = [paths.checkpoint_path(trained, training_data[1], best=best) for best in (True, False)]
    with pytest.raises(KeyboardInterrupt):
        evaluate(training_data, tmp_path, "--model", *pair, "--compare", "--beam_size", 1)
    (path,) = tmp_path.glob("metrics_*.json")
    assert list(files_room.read_json(path)["compared"]) == [str(pair[0])]


def test_the_word_map_of_a_comparison_is_for_those_that_keep_none(
    best_checkpoint, training_data, tmp_path, no_java
):
    files_room.write_json(
        tmp_path / "theirs.json", {"<pad>": 0, "dog": 1, "<unk>": 2, "<start>": 3, "<end>": 4}
    )
    shutil.copy(best_checkpoint, tmp_path / "twin.pth.tar")
    flags = ["--model", best_checkpoint, tmp_path / "twin.pth.tar", "--compare", "--beam_size", 1]
    evaluate(training_data, tmp_path / "out", *flags, "--word_map", tmp_path / "theirs.json")


def test_features_of_a_frozen_encoder_are_those_of_training(
    best_checkpoint, training_data, tmp_path, monkeypatch, no_java
):
    def encoder_runs(*_):
        raise AssertionError("the encoder ran again")

    monkeypatch.setattr(models.Encoder, "forward", encoder_runs)
    evaluate(training_data, tmp_path, "--model", best_checkpoint, "--split", "val")


def test_the_consensus_of_similar_training_pictures_chooses_among_the_beam(
    talkative, training_data, tmp_path, no_java, monkeypatch, fails, capsys
):
    data = shutil.copytree(training_data[0], tmp_path / "data"), training_data[1]
    flags = ["--model", talkative, "--beam_size", 4, "--length_penalty", 1]
    plain = evaluate(data, tmp_path / "plain", *flags)
    assert "other flags" not in capsys.readouterr().err
    evaluate(data, tmp_path / "plain", *flags, "--no_repeat")
    assert "has figures of other flags: --output_folder" in capsys.readouterr().err
    plain = evaluate(data, tmp_path / "plain", *flags)
    capsys.readouterr()
    evaluate(data, tmp_path / "plain", *flags, "--beam_size", 4, 1)  # nothing goes
    assert "other flags" not in capsys.readouterr().err
    utils.note.cache_clear()
    evaluate(data, tmp_path / "plain", *flags)
    assert "has figures of other flags: --output_folder" in capsys.readouterr().err
    chosen = evaluate(data, tmp_path / "chosen", *flags, "--consensus", 5)
    assert (plain["consensus"], chosen["consensus"]) == (0, 5)
    assert not list(data[0].glob("MEAN_*"))  # the feature store of the training serves

    for store in data[0].glob("FEATURES_TRAIN_*"):
        store.unlink()
    again = evaluate(data, tmp_path / "again", *flags, "--consensus", 5)
    (mean,) = data[0].glob("MEAN_FEATURES_TRAIN_*")
    written = mean.stat().st_mtime_ns
    captions = [
        files_room.read_json(paths.captions_path(tmp_path / run, data[1], "test", 4))
        for run in ("plain", "chosen", "again")
    ]
    assert captions[0] != captions[1] == captions[2]
    captioner = models.load_captioner(talkative)
    pictures = torch.from_numpy(
        datasets.CaptionDataset(datasets.split_path(data[0], "test", data[1])).images(slice(None))
    )
    beams = captioner.caption(pictures, beam_size=4, n_best=4, length_penalty=1, max_decode_steps=8)
    assert all(
        said["caption"].split() in [captioner.text(h) for h in beam]
        for said, beam in zip(captions[1], beams)
    )

    def encoder_runs(*_):
        raise AssertionError("the encoder ran again")

    monkeypatch.setattr(models.Encoder, "forward", encoder_runs)
    assert (
        again["beam_sizes"]["4"]["CIDEr"]
        == evaluate(data, tmp_path / "again", *flags, "--consensus", 5)["beam_sizes"]["4"]["CIDEr"]
    )
    assert mean.stat().st_mtime_ns == written
    with fails("--consensus asks the training captions"):
        evaluate(data, tmp_path / "train", *flags, "--consensus", 5, "--split", "train")
    datasets.split_path(data[0], "train", data[1]).unlink()
    export = tmp_path / "export.pth.tar"
    with fails("TRAIN_.*hdf5"):
        evaluate(data, tmp_path / "missing", *flags, "--consensus", 5, "--export", export)
    assert not export.exists()  # it would stand in the way of the same command


def test_output_lies_beside_the_checkpoint_if_nothing_is_said(
    best_checkpoint, training_data, tmp_path, no_java
):
    shutil.copy(best_checkpoint, tmp_path)
    argv = [
        "--model",
        tmp_path / best_checkpoint.name,
        "--data_folder",
        training_data[0],
        "--workers",
        1,
        "--device",
        "cpu",
    ]
    evaluation.main(evaluation.get_args_parser().parse_args([str(arg) for arg in argv]))
    assert paths.metrics_path(tmp_path, training_data[1], "test").exists()


def test_the_right_word_map_is_accepted_and_a_wrong_one_refused(
    best_checkpoint, training_data, tmp_path, word_map, fails, no_java
):
    right = datasets.word_map_path(*training_data)
    evaluate(
        training_data, tmp_path, "--model", best_checkpoint, "--word_map", right, "--beam_size", 1
    )
    files_room.write_json(tmp_path / "wrong.json", word_map)
    with fails("--word_map has 10 words and differs"):
        evaluate(
            training_data,
            tmp_path,
            "--model",
            best_checkpoint,
            "--word_map",
            tmp_path / "wrong.json",
        )


def test_an_ensemble_needs_one_word_map(best_checkpoint, training_data, tmp_path, fails):
    checkpoint = models.load_checkpoint(best_checkpoint)
    words = list(checkpoint["word_map"])
    checkpoint["word_map"] = {
        word: i for i, word in enumerate([words[0], words[2], words[1], *words[3:]])
    }
    torch.save(checkpoint, tmp_path / "other.pth.tar")
    with fails("other.pth.tar has another word map"):
        evaluate(training_data, tmp_path, "--model", best_checkpoint, tmp_path / "other.pth.tar")


def test_pictures_of_another_size_are_resized(
    best_checkpoint, training_data, tmp_path, no_java, capsys
):
    """To the model's own, for captions, consensus and comparisons alike; stores are kept apart."""
    data_copy = shutil.copytree(training_data[0], tmp_path / "data"), training_data[1]
    checkpoint = models.load_checkpoint(best_checkpoint)
    checkpoint["config"]["image_size"] = 96
    large = tmp_path / "large.pth.tar"
    torch.save(checkpoint, large)
    evaluate(data_copy, tmp_path / "own", "--model", large, "--consensus", 5)
    assert "pictures of 64 pixels are resized to 96" in capsys.readouterr().err
    data = datasets.CaptionDataset(datasets.split_path(data_copy[0], "test", data_copy[1]))
    images = data.images(slice(None))
    by_pillow = [datasets.resize_image(image.transpose(1, 2, 0), 96) for image in images]
    by_torch = encoders.resized(torch.from_numpy(images), 96).numpy()
    assert np.abs(by_torch - np.stack(by_pillow).astype(int)).max() <= 2

    flags = "--compare", "--beam_size", 1, "--model", best_checkpoint, large
    evaluate(data_copy, tmp_path / "both", *flags)
    for number, pictures in ((1, images), (2, by_torch)):
        captioner = models.load_captioner(flags[-3 + number])
        assert captioner.image_size == pictures.shape[-1]
        found = captioner.encoder(torch.from_numpy(pictures))
        model = [captioner.decoder], [found.half().float()], captioner.word_map
        said = models.beam_search(*model, beam_size=1, max_decode_steps=8)
        name = f"{data_copy[1]}_comparison_of_2_{number}"
        path = paths.captions_path(tmp_path / "both", name, "test", 1)
        captions = [row["caption"].split() for row in files_room.read_json(path)]
        assert captions == [captioner.text(best) for best, *_ in said]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "missing.pth.tar"], "missing.pth.tar"),
        (["--data_name", "other"], "TEST_other.hdf5"),
        (["--average", "typo/mean.pth.tar"], "there is no folder .*typo"),
        (["--average", "mean.pth.tar"], "--average: expected several --model"),
    ],
)
def test_bad_values_end_in_one_line(
    flags, message, best_checkpoint, training_data, tmp_path, fails
):
    with fails(message):
        evaluate(training_data, tmp_path, "--model", best_checkpoint, *flags)


@pytest.mark.parametrize("name", ["../../climbs", "/climbs", "a/b", "", ".hidden", "x" * 200])
def test_no_file_is_written_where_a_checkpoint_says(
    name, best_checkpoint, training_data, tmp_path, fails
):
    checkpoint = models.load_checkpoint(best_checkpoint)
    checkpoint["config"]["data_name"] = name
    torch.save(checkpoint, tmp_path / "other.pth.tar")
    with fails("the data's name .*expected at most 120 letters" if name else "add --data_name"):
        evaluate(training_data, tmp_path / "a" / "b", "--model", tmp_path / "other.pth.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["other.pth.tar"]


def test_the_consensus_uses_the_arithmetic_of_the_training(
    talkative, training_data, tmp_path, no_java
):
    before = sorted(training_data[0].glob("*TRAIN*"))
    flags = ["--model", talkative, "--consensus", 1, "--beam_size", 2]
    evaluate(training_data, tmp_path, *flags, "--amp")  # the training was without
    assert sorted(training_data[0].glob("*TRAIN*")) == before  # nothing was encoded again


def test_an_output_folder_that_is_a_file_is_refused_before_the_work(
    best_checkpoint, training_data, tmp_path, fails, monkeypatch
):
    monkeypatch.setattr(models, "caption_split", lambda *_, **__: pytest.fail("it began to work"))
    file = tmp_path / "README.md"
    file.write_text("precious")
    with fails("README.md is a file, expected a folder"):
        evaluate(training_data, file, "--model", best_checkpoint)


def test_the_folder_of_a_run_stands_for_its_best_checkpoint(
    trained, best_checkpoint, training_data, tmp_path, no_java
):
    metrics = evaluate(training_data, tmp_path, "--model", trained, "--beam_size", 1)
    assert metrics["models"] == [str(best_checkpoint)]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--beam_size", "3", "0"], "--beam_size 0: expected a value from 1 to 100"),
        (["--length_penalty", "nan"], "--length_penalty nan: expected a value from 0 to 10"),
        (["--consensus", "-1"], "--consensus -1: expected a value from 0"),
        (["--split", "tset"], "--split tset: expected train, val, test; did you mean test?"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as ending:
        evaluation.get_args_parser().parse_args(["--model", "run", *flags])
    err = capsys.readouterr().err
    assert ending.value.code == 2 and err.count("\n") == 1 and message in err


def source_of(ids):
    names = [f"COCO_val2014_{i:012d}.jpg" for i in (391895, 522418, 7)]

    class Data:
        image_ids, image_names = ids, names
        __len__ = lambda self: len(names)

    return Data()


def test_results_carry_the_ids_of_the_source_and_coco_loads_them(tmp_path, capsys):
    from pycocotools.coco import COCO

    data, captions = source_of([391895, 522418, 7]), [["a", "dog"], ["a", "cat"], []]
    written.write_captions(data, (captions, None, {}), tmp_path / "results.json")
    annotations = {
        "info": {},
        "images": [
            {"id": i, "file_name": name} for i, name in zip(data.image_ids, data.image_names)
        ],
        "annotations": [
            {"id": n, "image_id": i, "caption": "a dog"} for n, i in enumerate(data.image_ids)
        ],
    }
    files_room.write_json(tmp_path / "annotations.json", annotations)
    results = COCO(tmp_path / "annotations.json").loadRes(str(tmp_path / "results.json"))
    said = {i: results.imgToAnns[i][0]["caption"] for i in data.image_ids}
    assert said == {391895: "a dog", 522418: "a cat", 7: ""}


def test_row_numbers_stand_for_ids_if_the_source_lacks_some(tmp_path):
    data = source_of([391895, None, 7])
    written.write_captions(data, ([[], [], []], None, {}), tmp_path / "results.json")
    results = files_room.read_json(tmp_path / "results.json")
    assert [result["image_id"] for result in results] == [0, 1, 2]
    assert [result["file_name"] for result in results] == data.image_names


def test_the_table_shows_the_gaze_of_one_model_and_not_of_an_ensemble_or_without_attention(
    talkative, training_data, tmp_path, no_java, capsys
):
    flags = ["--model", talkative, "--beam_size", 2]
    row = evaluate(training_data, tmp_path / "one", *flags)["beam_sizes"]["2"]
    out = capsys.readouterr().out
    assert (
        re.search(rf"places of the grid +{row['num_pixels']} ", out)
        and "gaze of content words" in out
    )
    assert 1 <= row["places"] <= row["num_pixels"] and 0 < row["peak"] <= 1
    flags[2:2] = [talkative]
    both = evaluate(training_data, tmp_path / "two", *flags)
    assert "places" not in both["beam_sizes"]["2"]


def test_captions_of_another_system_are_scored_beside_the_models(
    talkative, training_data, tmp_path, no_java, capsys, fails
):
    data = datasets.CaptionDataset(datasets.split_path(training_data[0], "test", training_data[1]))
    pairs = zip(data.image_names, data.raw_references)
    people = [{"file_name": name, "caption": references[0]} for name, references in pairs]
    files_room.write_json(tmp_path / "people.json", people)
    flags = ["--model", talkative, "--beam_size", 2, "--captions", tmp_path / "people.json"]
    page = tmp_path / "page.html"
    metrics = evaluate(training_data, tmp_path / "out", *flags, "--html", page)
    alone = evaluate(training_data, tmp_path / "alone", "--model", talkative, "--beam_size", 2)
    out, theirs = capsys.readouterr().out, str(tmp_path / "people.json")
    assert list(metrics["captions"]) == [theirs] and "captions" not in alone
    for name, value in alone["beam_sizes"]["2"].items():
        assert name == "ms per picture" or metrics["beam_sizes"]["2"][name] == value
    row = metrics["captions"][theirs]
    said = [references[0] for references in data.references]
    expected = metrics_room.score_captions(data.references, said)
    assert {name: row[name] for name in expected} == expected and row["BLEU-4"] > 99
    assert row["objects"] == 100 and row["pointing"] is None
    header = next(line for line in out.splitlines() if "beam size or file" in line)
    assert header.split()[4:] == ["2", theirs, "people"]
    gap = metrics["differences"]["of"][theirs]["BLEU-4"]
    assert gap[0] == pytest.approx(row["BLEU-4"] - metrics["beam_sizes"]["2"]["BLEU-4"])
    shown = "{:+.2f} ({:+.2f} to {:+.2f})".format(*gap)
    assert re.search(rf"BLEU-4 +{re.escape(shown)}", out)
    assert "difference from beam size 2" in out

    assert "people.json" in page.read_text(encoding="utf-8")
    table = read_csv(tmp_path / "out" / f"scores_test_{training_data[1]}.csv")
    assert [line["beam size or file"] for line in table] == ["2"] * len(data) + [theirs] * len(data)
    for line, words in zip(table[len(data) :], said):
        assert line["caption"] == " ".join(words) and line["log_prob"] == ""
    files_room.write_json(tmp_path / "half.json", people[1:])
    with fails(rf"half.json: 1 of {len(data)} .* have no caption \({data.image_names[0]}\)"):
        evaluate(training_data, tmp_path / "half", *flags[:-1], tmp_path / "half.json")
    with fails("--captions: expected different files"):
        evaluate(training_data, tmp_path / "twice", *flags, tmp_path / "people.json")
    assert not (tmp_path / "half").exists() and not (tmp_path / "twice").exists()


def test_a_gaze_that_fails_loses_no_metrics(
    talkative, training_data, tmp_path, no_java, monkeypatch, capsys
):
    flags = ["--model", talkative, "--beam_size", 2]
    with monkeypatch.context() as broken:
        broken.setattr(gaze, "measure_gaze", lambda *_: 1 / 0)
        with pytest.raises(SystemExit) as stopped:
            evaluate(training_data, tmp_path / "broken", *flags)
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err and "error: the gaze could not be measured" in err
    (path,) = (tmp_path / "broken").glob("metrics_*.json")
    row = files_room.read_json(path)["beam_sizes"]["2"]
    whole = evaluate(training_data, tmp_path / "whole", *flags)["beam_sizes"]["2"]
    assert row["CIDEr"] == whole["CIDEr"] and "places" in whole and "places" not in row


def test_a_search_that_fails_loses_no_figures_of_the_earlier_ones(
    talkative, training_data, tmp_path, no_java, monkeypatch, capsys
):
    search = models.caption_split

    def fails_at_three(*args, **options):
        if options["beam_size"] == 3:
            raise MemoryError
        return search(*args, **options)

    monkeypatch.setattr(models, "caption_split", fails_at_three)
    with pytest.raises(MemoryError):
        evaluate(training_data, tmp_path / "out", "--model", talkative, "--beam_size", 1, 2, 3)
    (path,) = (tmp_path / "out").glob("metrics_*.json")
    metrics = files_room.read_json(path)
    assert list(metrics["beam_sizes"]) == ["1", "2"] and "CIDEr" in metrics["beam_sizes"]["2"]
    written = capsys.readouterr().out.partition("written: ")[2].split()
    assert len(written) == 4 and all(Path(path).exists() for path in written)
