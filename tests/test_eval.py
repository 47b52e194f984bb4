"""Scoring a tiny model: what is written, printed and refused."""

import json
import re
import shutil
import types
from pathlib import Path

import pytest
import torch
from conftest import train_args

import datasets
import eval as evaluation
import models
import train
import utils


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
    (path,) = Path(folder).glob(datasets.metrics_path("", f"{data[1]}*", split).name)
    return utils.read_json(path)


@pytest.fixture
def no_java(monkeypatch):
    """METEOR takes seconds to start; other tests hold it."""
    monkeypatch.setattr(utils, "_meteor", lambda gts, res: None)


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
        captions = utils.read_json(
            datasets.captions_path(tmp_path, training_data[1], split, beam_size)
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
        scores = utils.score_captions(data.references, [c["caption"].split() for c in captions])
        assert {name: row[name] for name in scores} == pytest.approx(scores)
        assert (
            0 <= row["pointing"] <= 100 if row["pointing"] is not None else row["by chance"] is None
        )
        assert row["objects"] == 100 * sum(
            evaluation.judge_caption(scene, c["caption"].split())["objects"]
            for scene, c in zip(data.scenes, captions)
        ) / len(data)
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if "beam size" in line)
    assert header.split()[-3:] == ["1", "3", "people"]
    rows = [line.split() for line in out.splitlines()]
    assert any(row[:1] == ["BLEU-4"] and row[3:] == ["-"] for row in rows)
    assert metrics["people"] == pytest.approx(
        evaluation.score_variety([r[1:] for r in data.references], [r[0] for r in data.references])
    )
    assert "METEOR" in out and "Java" in out and "image_id in the captions is the row" in out
    groups = [line for line in out.splitlines() if line in evaluation.GROUPS.values()]
    assert groups == list(evaluation.GROUPS.values())
    assert "pointing by chance" in out
    files = sorted(map(str, tmp_path.iterdir()))
    assert len(files) == 3 and all(file in out for file in files)


def test_an_ensemble_of_equals_is_its_member(best_checkpoint, training_data, tmp_path, no_java):
    alone = evaluate(training_data, tmp_path / "1", "--model", best_checkpoint)["beam_sizes"]["5"]
    twice = evaluate(training_data, tmp_path / "2", "--model", best_checkpoint, best_checkpoint)[
        "beam_sizes"
    ]["5"]
    twice.pop("ms per picture")
    assert twice == {name: alone[name] for name in twice} and "BLEU-4" in twice
    assert not datasets.metrics_path(
        tmp_path / "2", training_data[1], "test"
    ).exists()  # that name is the model's own


def test_different_models_decode_together(
    best_checkpoint, training_data, tmp_path, no_java, monkeypatch
):
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
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
    other = datasets.checkpoint_path(tmp_path / "gru", training_data[1])
    metrics = evaluate(training_data, tmp_path, "--model", best_checkpoint, other, "--beam_size", 2)
    assert (
        metrics["models"] == [str(best_checkpoint), str(other)]
        and 0 <= metrics["beam_sizes"]["2"]["BLEU-1"] <= 100
    )


def test_the_mean_of_two_trainings_is_a_model_of_its_own(
    best_checkpoint, training_data, tmp_path, no_java, monkeypatch, fails
):
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
    train.main(
        train_args(training_data, tmp_path / "on", "--init_from", best_checkpoint, "--epochs", 1)
    )
    after = datasets.checkpoint_path(tmp_path / "on", training_data[1])
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
        datasets.checkpoint_path(trained, training_data[1], best=best) for best in (True, False)
    )
    before = evaluate(training_data, tmp_path, "--model", best)
    with fails("scores of another model: choose another --output_folder"):
        evaluate(training_data, tmp_path, "--model", last)
    again = evaluate(training_data, tmp_path, "--model", best, "--length_penalty", 1)
    assert again["models"] == before["models"] and again["length_penalty"] == 1


def test_features_of_a_frozen_encoder_are_those_of_training(
    best_checkpoint, training_data, tmp_path, monkeypatch, no_java
):
    def encoder_runs(*_):
        raise AssertionError("the encoder ran again")

    monkeypatch.setattr(models.Encoder, "forward", encoder_runs)
    evaluate(training_data, tmp_path, "--model", best_checkpoint, "--split", "val")


def test_the_consensus_of_similar_training_pictures_chooses_among_the_beam(
    talkative, training_data, tmp_path, no_java, monkeypatch, fails
):
    data = shutil.copytree(training_data[0], tmp_path / "data"), training_data[1]
    flags = ["--model", talkative, "--beam_size", 4, "--length_penalty", 1]
    plain = evaluate(data, tmp_path / "plain", *flags)
    chosen = evaluate(data, tmp_path / "chosen", *flags, "--consensus", 5)
    assert (plain["consensus"], chosen["consensus"]) == (0, 5)
    assert not list(data[0].glob("MEAN_*"))  # the feature store of the training serves

    for store in data[0].glob("FEATURES_TRAIN_*"):
        store.unlink()
    again = evaluate(data, tmp_path / "again", *flags, "--consensus", 5)
    (mean,) = data[0].glob("MEAN_FEATURES_TRAIN_*")
    written = mean.stat().st_mtime_ns
    captions = [
        utils.read_json(datasets.captions_path(tmp_path / run, data[1], "test", 4))
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
    with fails("TRAIN_.*hdf5"):
        evaluate(data, tmp_path / "missing", *flags, "--consensus", 5)


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
    assert datasets.metrics_path(tmp_path, training_data[1], "test").exists()


def test_the_right_word_map_is_accepted_and_a_wrong_one_refused(
    best_checkpoint, training_data, tmp_path, word_map, fails, no_java
):
    right = datasets.word_map_path(*training_data)
    evaluate(
        training_data, tmp_path, "--model", best_checkpoint, "--word_map", right, "--beam_size", 1
    )
    utils.write_json(tmp_path / "wrong.json", word_map)
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


def test_pictures_of_another_size_are_refused(best_checkpoint, training_data, tmp_path, fails):
    checkpoint = models.load_checkpoint(best_checkpoint)
    checkpoint["config"]["image_size"] = 256
    torch.save(checkpoint, tmp_path / "large.pth.tar")
    with fails("64 pixels.*256.*--image_size"):
        evaluate(training_data, tmp_path, "--model", tmp_path / "large.pth.tar")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "missing.pth.tar"], "missing.pth.tar"),
        (["--data_name", "other"], "TEST_other.hdf5"),
        (["--average", "typo/mean.pth.tar"], "there is no folder .*typo"),
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


def test_other_data_is_refused_unless_the_word_map_is_named(
    best_checkpoint, training_data, tmp_path, fails, no_java, monkeypatch
):
    records, _ = datasets.shapes_records(4, 1, 1, seed=1, size=64)
    records = [record._replace(captions=["my own words", "a thing"]) for record in records]
    folder = tmp_path / "data"
    datasets.write_dataset(
        folder,
        records,
        dataset="own",
        source="own",
        min_word_freq=1,
        max_len=20,
        image_size=64,
        seed=1,
    )
    data = folder, datasets.base_name("own", 5, 1)
    flags = ["--model", best_checkpoint, "--data_name", data[1], "--beam_size", 1]
    with monkeypatch.context() as patch:
        patch.setattr(models.Encoder, "forward", lambda *_: pytest.fail("it began to work"))
        with fails("another vocabulary than the model's [0-9]+ words and 4 special tokens"):
            evaluate(data, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
    own = datasets.word_map_path(*training_data)
    metrics = evaluate(data, tmp_path / "out", *flags, "--word_map", own)
    assert metrics["beam_sizes"]["1"]["CIDEr"] is None  # of a single picture it is always 0


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


# ---------------------------------------------------------------- what is written


def source_of(ids):
    names = [f"COCO_val2014_{i:012d}.jpg" for i in (391895, 522418, 7)]

    class Data:
        image_ids, image_names = ids, names
        __len__ = lambda self: len(names)

    return Data()


def test_results_carry_the_ids_of_the_source_and_coco_loads_them(tmp_path, capsys):
    from pycocotools.coco import COCO

    data, captions = source_of([391895, 522418, 7]), [["a", "dog"], ["a", "cat"], []]
    evaluation.write_captions(data, captions, tmp_path / "results.json")
    annotations = {
        "info": {},
        "images": [
            {"id": i, "file_name": name} for i, name in zip(data.image_ids, data.image_names)
        ],
        "annotations": [
            {"id": n, "image_id": i, "caption": "a dog"} for n, i in enumerate(data.image_ids)
        ],
    }
    utils.write_json(tmp_path / "annotations.json", annotations)
    results = COCO(tmp_path / "annotations.json").loadRes(str(tmp_path / "results.json"))
    said = {i: results.imgToAnns[i][0]["caption"] for i in data.image_ids}
    assert said == {391895: "a dog", 522418: "a cat", 7: ""}


def test_row_numbers_stand_for_ids_if_the_source_lacks_some(tmp_path):
    data = source_of([391895, None, 7])
    evaluation.write_captions(data, [[], [], []], tmp_path / "results.json")
    results = utils.read_json(tmp_path / "results.json")
    assert [result["image_id"] for result in results] == [0, 1, 2]
    assert [result["file_name"] for result in results] == data.image_names


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
    evaluation.print_table("beam size", *evaluation.make_table(columns))
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


# ---------------------------------------------------------------- variety and scenes


def test_variety_is_counted_by_hand():
    references = [
        [["a", "red", "dog"], ["two", "dogs"]],
        [["a", "cat"]],
        [["a", "blue", "cat"]],
        [["it"]],
    ]
    captions = [
        caption.split()
        for caption in ("a red dog and three blue dogs", "a cat", "a cat", "a cat and a cat and a")
    ]
    assert evaluation.score_variety(references, captions) == {
        "words per caption": 4.5,
        "words used": 8,
        "distinct captions": 75,
        "commonest caption": 50,
        "repeats itself": 25,
        "colours agreed": 50,
        "numbers agreed": 0,
    }
    silent = evaluation.score_variety(references, [[]] * 4)
    assert (
        silent["words used"] == 0
        and silent["colours agreed"] is None
        and silent["repeats itself"] == 0
    )


def test_agreement_on_words_that_nobody_says_cannot_be_had():
    variety = evaluation.score_variety(
        [[["a", "dog"]], [["a", "red", "cat"]]], [["two", "red"]] * 2
    )
    assert variety["numbers agreed"] is None and variety["colours agreed"] == 50


@pytest.mark.parametrize(
    "caption, repeats",
    [
        ("a dog and a dog", False),
        ("a dog dog", True),
        ("", False),
        ("a b c a b c", True),
        ("a b a b", False),
        ("a b a b a", True),
    ],
)
def test_what_counts_as_repeating(caption, repeats):
    assert evaluation.repeats_itself(caption.split()) is repeats


def test_scenes_are_counted_by_hand():
    scene = {
        "objects": [
            {"shape": "circle", "color": "red", "box": [0.0, 0.0, 0.4, 0.4]},
            {"shape": "star", "color": "blue", "box": [0.6, 0.0, 1.0, 0.4]},
        ],
        "names": {"red": [0], "circle": [0], "blue": [1], "star": [1]},
    }
    captions = [
        "a red circle left of a blue star",
        "a red circle right of a blue star",
        "a red star",
        "a blue star",
    ]
    captions = [caption.split() for caption in captions]
    left_top = torch.tensor(
        [[0.7, 0.1, 0.1, 0.1]]
    )  # a grid of 2 by 2, whose cells' centres lie at 1/4 and 3/4
    result = evaluation.score_scenes(
        [scene] * 4, captions, [left_top.expand(len(words), -1) for words in captions]
    )
    assert (
        result["count"] == result["shapes"] == result["objects"] == 50 and result["relation"] == 50
    )
    # named: red circle blue star twice, red star, blue star; the circle is looked at, not the star
    assert result["pointing"] == pytest.approx(100 * 5 / 12) and result[
        "by chance"
    ] == pytest.approx(25)
    nothing = evaluation.score_scenes([scene], [[]], [torch.zeros(0, 4)])
    assert nothing["relation"] is None and nothing["pointing"] is None and nothing["objects"] == 0
    assert json.dumps(nothing)


def test_attention_that_looks_nowhere_points_at_nothing():
    box = {"shape": "circle", "color": "red", "box": [0.0, 0.0, 0.5, 0.5]}
    scene = {"objects": [box], "names": {"circle": [0]}}
    even = evaluation.score_scenes([scene], [["circle"]], [torch.full((1, 4), 0.25)])
    assert even["pointing"] is None and even["by chance"] == 25


# ---------------------------------------------------------------- the gaze

WORDS = ["<pad>", "<start>", "<unk>", "<end>", "dog", "runs", "in", "the"]
SAID = [[7, 4, 5], [7, 4, 6, 7, 5], [], [4]]


@pytest.fixture
def gaze():
    """Function of a change to a decoder, of features and options: the figures of its gaze."""

    def measure(change=lambda decoder: None, features=None, said=SAID, grid=0, **options):
        torch.manual_seed(0)
        decoder = models.DecoderWithAttention(len(WORDS), 12, 8, 8, 8, encoded_image_size=grid)
        with torch.no_grad():
            change(decoder.eval())
        word_map = {word: i for i, word in enumerate(WORDS)}
        captioner = types.SimpleNamespace(
            decoder=decoder, words=WORDS, word_map=word_map, device=torch.device("cpu")
        )
        if features is None:
            features = torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(1))
        hypotheses = [types.SimpleNamespace(words=words) for words in said]
        return evaluation.measure_gaze(captioner, features, hypotheses, **options)

    return measure


def test_attention_that_is_even_covers_all_places_and_never_moves(gaze):
    found = gaze(lambda decoder: decoder.attention.full_att.weight.zero_())
    assert found["places"] == pytest.approx(16) and found["function places"] == pytest.approx(16)
    assert found["peak"] == pytest.approx(1 / 16) and found["num_pixels"] == 16
    assert found["movement"] == pytest.approx(0, abs=1e-6)


def test_attention_on_one_place_counts_one_and_the_words_feel_its_deletion(gaze):
    def marks(decoder):  # one channel marks a place, and attention looks for nothing else
        decoder.attention.encoder_att.weight.zero_()
        decoder.attention.encoder_att.weight[:, 0] = 100
        decoder.attention.full_att.weight.fill_(1)
        decoder.decode_step.weight_ih.mul_(5)

    features = torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(1))
    features[:, :, 0] = 0
    features[:, 3, 0] = 1
    found = gaze(marks, features)
    assert found["places"] == pytest.approx(1, abs=1e-3)
    assert found["peak"] == pytest.approx(1, abs=1e-3)
    # a random tenth is 2 of 16 places, so it seldom holds the one that matters
    assert abs(found["fall"]) > 2 * abs(found["random fall"])


def test_only_what_attention_sees_at_the_word_is_deleted(gaze):
    # the state never hears of what attention saw
    found = gaze(lambda decoder: decoder.decode_step.weight_ih.zero_())
    assert found["fall"] == pytest.approx(0, abs=1e-5)
    assert found["random fall"] == pytest.approx(0, abs=1e-5)
    assert found["movement"] > 0


def test_the_size_of_a_batch_does_not_change_the_gaze(gaze):
    one, all_at_once = gaze(batch_size=1), gaze(batch_size=4)
    for name in ("places", "function places", "peak", "movement", "fall"):
        assert one[name] == pytest.approx(all_at_once[name], rel=1e-4, abs=1e-6)


def test_the_first_pictures_are_measured_whatever_process_holds_their_features(monkeypatch):
    captioner = types.SimpleNamespace(config={"attention": "soft"})
    shares, gathered = torch.arange(10.0).view(2, 5, 1, 1), []
    monkeypatch.setattr(utils, "all_gather", lambda part: gathered.append(part) or [part])
    for start, share in zip((0, 5), shares):
        evaluation.gaze_features([captioner], share, start, pictures=7)
    assert torch.cat(gathered).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]
    captioner.config["attention"] = "mean"
    assert evaluation.gaze_features([captioner], shares[0], 0) is None


def test_a_grid_of_another_size_than_the_encoders_is_measured_too(gaze):
    found = gaze(grid=2)
    assert found["num_pixels"] == 4 and 1 <= found["places"] <= 4 and found["fall"] != 0


@pytest.mark.parametrize("said", [[[7], [6], [7], [6]], [[], [], [], []]])
def test_what_has_no_content_words_has_no_gaze_of_them(said, gaze):
    found = gaze(said=said)
    assert found.get("places") is None and "deletion ratio" not in found
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_words_of_the_list_are_function_words():
    assert {"a", "in", "the", "with", "is"} <= evaluation.FUNCTION_WORDS
    assert not {"dog", "red", "runs", "two", "standing"} & evaluation.FUNCTION_WORDS


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
