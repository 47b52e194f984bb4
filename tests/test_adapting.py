"""A model goes on with other data: its words, few pictures, and what docs/adapting.py deals out."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from test_create_input_files import prepare
from test_eval import evaluate
from test_pages import commands, text_of
from test_pages import run as run_script
from test_train import run

import datasets
import eval as evaluation
import models
from captioning.model import checkpoints
from captioning.report import curves, metrics
from captioning.run import paths
from captioning.run.files import read_json
from utils import UserError

SPECIAL = [datasets.PAD, datasets.UNK, datasets.START, datasets.END]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(curves, "draw_curves", lambda *_: None)
    monkeypatch.setattr(metrics, "_meteor", lambda gts, res: None)


@pytest.fixture
def described():
    """Function of a folder, captions and a word map that is known: a data set, prepared.

    Its pictures are generated, and each has all the captions.
    """

    def make(folder, captions, known=None, name="own"):
        records, _ = datasets.shapes_records(12, 3, 3, seed=1, size=64)
        records = [record._replace(captions=list(captions)) for record in records]
        settings = {"min_word_freq": 1, "max_len": 20, "image_size": 64, "seed": 1}
        datasets.write_dataset(folder, records, dataset=name, source="own", known=known, **settings)
        return folder, paths.base_name(name, 5, 1)

    return make


def word_map_of(data):
    return datasets.load_word_map(paths.word_map_path(*data))


# --------------------------------------------------------------------------------- words of a model


def test_known_words_keep_their_numbers_and_new_ones_follow():
    known = {"<pad>": 0, "a": 1, "dog": 2, "<unk>": 3, "<start>": 4, "<end>": 5}
    captions = [["a", "cat", "sat"], ["a", "cat"], ["a", "bird", "sat"], ["sat"]]
    assert datasets.build_word_map(captions, 2, known) == {**known, "sat": 6, "cat": 7}
    assert datasets.build_word_map(captions, 9, known) == known
    assert list(datasets.build_word_map(captions, 2)) == [
        "<pad>", "a", "sat", "cat", "<unk>", "<start>", "<end>"
    ]  # fmt: skip


@pytest.mark.parametrize("given", ["checkpoint", "folder of a run", "word map"])
def test_preparing_with_the_words_of_a_model(
    given, own_data, trained, best_checkpoint, training_data, tmp_path, capsys, fails
):
    images, captions = own_data
    known = models.load_checkpoint(best_checkpoint)["word_map"]
    word_map = paths.word_map_path(*training_data)
    model = {"checkpoint": best_checkpoint, "word map": word_map}.get(given, trained)
    flags = ["--dataset", "mine", "--images", images, "--captions", captions]
    flags += ["--data_folder", tmp_path / "data"]
    prepare(*flags, "--words_of", model, size=None)
    data = tmp_path / "data", paths.base_name("mine", 5, 1)
    own = word_map_of(data)
    # the captions say a, dog, runs, on, grass, the, it and a number from 0 to 17
    new = {"dog", "runs", "grass", "it", "on", *map(str, range(18))} - known.keys()
    assert {word: own[word] for word in known} == known
    assert sorted(own[word] for word in new) == list(range(len(known), len(own)))
    printed = capsys.readouterr().out
    assert f"the {len(known) - 4:,} words of {model}, {len(new)} new and 4 special" in printed
    train_data = datasets.CaptionDataset(paths.split_path(data[0], "train", data[1]))
    words = sorted(own, key=own.get)
    assert datasets.decode_caption(train_data.captions[1], words) == ["the", "dog", "it", "runs"]
    # a model brings the size of its pictures, too; a word map has none
    assert train_data.image_size == (256 if model == word_map else 64)
    prepare(*flags, "--words_of", model, size=None)
    assert "already" in capsys.readouterr().out
    with fails("TRAIN_.*hdf5 was made with a --words_of; give --force"):
        prepare(*flags, size=train_data.image_size)


def test_the_captioner_of_the_suite_is_named_without_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert models.run_checkpoint("captioner") == checkpoints.DEFAULT_CAPTIONER
    folder = checkpoints.DEFAULT_CAPTIONER.parent
    assert models.run_checkpoint(folder) == checkpoints.DEFAULT_CAPTIONER
    Path("captioner").mkdir()  # a folder of the user's goes first
    with pytest.raises(UserError, match="holds no BEST_checkpoint"):
        models.run_checkpoint("captioner")
    with pytest.raises(UserError, match="no file captoner; did you mean captioner"):
        models.run_checkpoint("captoner")


def test_a_model_learns_other_words(training_data, trained, described, tmp_path, capsys):
    start = models.load_checkpoint(paths.checkpoint_path(trained, training_data[1], best=True))
    known = start["word_map"]
    new = described(tmp_path / "data", ["a red hexagon", "red hexagon on grass"])
    flags = ["--init_from", trained, "--epochs", 1, "--learning_rate", 0]
    checkpoint = run(new, tmp_path / "out", *flags)
    own = checkpoint["word_map"]
    assert own == word_map_of(new)
    shared = own.keys() & known.keys()
    assert shared == {"a", "red", "on", *SPECIAL}
    assert (
        f"{len(shared) - 4} of {len(own) - 4} words known; 2 begin anew" in capsys.readouterr().out
    )
    for key, tensor in checkpoint["decoder"].items():
        if key in ("embedding.weight", "fc.weight", "fc.bias"):
            for word in shared:
                assert torch.equal(tensor[own[word]], start["decoder"][key][known[word]]), key
        else:
            assert torch.equal(tensor, start["decoder"][key]), key
    assert all(torch.equal(start["encoder"][k], t) for k, t in checkpoint["encoder"].items())


def test_pictures_of_another_size_than_the_models_are_told_of(
    training_data, trained, tmp_path, capsys
):
    records, _ = datasets.shapes_records(12, 3, 3, seed=1, size=32)
    settings = {"min_word_freq": 1, "max_len": 20, "image_size": 32, "seed": 1}
    datasets.write_dataset(tmp_path / "data", records, dataset="own", source="own", **settings)
    small = tmp_path / "data", paths.base_name("own", 5, 1)
    checkpoint = run(small, tmp_path / "out", "--init_from", trained, "--epochs", 1)
    told = "knows images of 64 pixels, these have 32: create_input_files.py --image_size 64"
    assert told in capsys.readouterr().err
    assert checkpoint["config"]["image_size"] == 32
    run(training_data, tmp_path / "alike", "--init_from", trained, "--epochs", 1)
    assert "pixels" not in capsys.readouterr().err


def test_the_word_map_of_init_from_does_not_stop_resume(
    training_data, trained, described, tmp_path, capsys
):
    new = described(tmp_path / "data", ["a red hexagon", "red hexagon on grass"])
    flags = ["--init_from", trained, "--word_map", paths.word_map_path(*training_data)]
    run(new, tmp_path / "out", *flags, "--epochs", 1)
    assert len(run(new, tmp_path / "out", *flags, "--resume", "--epochs", 2)["history"]) == 2
    assert "going on from" not in capsys.readouterr().out


def test_vectors_are_counted_for_words_that_the_model_does_not_bring(
    trained, described, tmp_path, capsys
):
    new = described(tmp_path / "data", ["a red hexagon", "red hexagon on grass"])
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("".join(f"{w} {' '.join(['0.25'] * 16)}\n" for w in ("red", "hexagon")))
    flags = ["--init_from", trained, "--embeddings", vectors, "--epochs", 1, "--learning_rate", 0]
    checkpoint = run(new, tmp_path / "out", *flags)
    assert "vectors for 1 of 2 new words" in capsys.readouterr().out
    rows, word_map = checkpoint["decoder"]["embedding.weight"], checkpoint["word_map"]
    assert (rows[word_map["hexagon"]] == 0.25).all()
    assert not (rows[word_map["red"]] == 0.25).any()


def test_words_in_another_order_say_the_same(training_data, trained, tmp_path):
    """At a learning rate of 0 the run only says what the model said before."""
    folder, name = training_data
    words = list(word_map_of(training_data))
    other = {w: i for i, w in enumerate([words[0], *reversed(words[1:])])}
    records, _ = datasets.shapes_records(24, 6, 6, seed=1, size=64)
    settings = {"min_word_freq": 1, "max_len": 20, "image_size": 64, "seed": 1}
    datasets.write_dataset(
        tmp_path / "data", records, dataset="shapes", source="generated", known=other, **settings
    )
    (best,) = trained.glob("BEST_*")
    flags = ["--init_from", best, "--learning_rate", 0, "--epochs", 1]
    before = run(training_data, tmp_path / "before", *flags)["history"][0]
    after = run((tmp_path / "data", name), tmp_path / "after", *flags)["history"][0]
    for key in ("BLEU-1", "ROUGE-L", "CIDEr"):
        assert after[key] == before[key]
    assert after["val_nll"] == pytest.approx(before["val_nll"], rel=1e-5)


def test_the_teacher_of_attention_learns_other_words_too(training_data, described, tmp_path):
    flags = ["--grounding", 0.2, "--epochs", 1, "--learning_rate", 0]
    start = run(training_data, tmp_path / "first", *flags)
    new = described(tmp_path / "data", ["a red hexagon", "red hexagon on grass"])
    after = run(new, tmp_path / "second", *flags, "--init_from", tmp_path / "first")
    for key in ("place_words.weight", "place_words.bias", "next_words.0.weight"):
        for word in ("a", "red"):
            row = start["teacher"][key][start["word_map"][word]]
            assert torch.equal(after["teacher"][key][after["word_map"][word]], row), key


def test_another_architecture_is_one_clear_error(
    training_data, trained, described, tmp_path, fails
):
    new = described(tmp_path / "data", ["a red hexagon"])
    with fails("--decoder gru: .* was built with --decoder lstm; take that, or leave it out"):
        run(new, tmp_path / "out", "--init_from", trained, "--decoder", "gru")


def test_vectors_are_for_the_words_that_begin_anew(trained, described, tmp_path):
    new = described(tmp_path / "data", ["a red hexagon"])
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("\n".join(f"{word} " + "0.25 " * 16 for word in ("red", "hexagon")))
    flags = ["--init_from", trained, "--embeddings", vectors, "--epochs", 1, "--learning_rate", 0]
    checkpoint = run(new, tmp_path / "out", *flags)
    rows, own = checkpoint["decoder"]["embedding.weight"], checkpoint["word_map"]
    assert (rows[own["hexagon"]] == 0.25).all() and not (rows[own["red"]] == 0.25).any()


# ------------------------------------------------------------------------------------------- resume


def resized(training_data, tmp_path, count, reverse=False, less=0):
    """The training data prepared anew with another number of pictures, or its words reversed.

    :param less: number of validation pictures that are left out
    """
    words = list(word_map_of(training_data))
    known = {w: i for i, w in enumerate([words[0], *reversed(words[1:])])} if reverse else None
    records, _ = datasets.shapes_records(24, 6, 6, seed=1, size=64)
    records = sorted(records, key=lambda record: record.split == "val")
    records = records[: len(records) - less]
    train_split = [record for record in records if record.split == "train"]
    more = [record._replace(name=f"again_{record.name}") for record in train_split[: count - 24]]
    settings = {"min_word_freq": 1, "max_len": 20, "image_size": 64, "seed": 1}
    datasets.write_dataset(
        tmp_path, records + more, dataset="shapes", source="generated", known=known, **settings
    )
    return tmp_path, training_data[1]


def test_a_run_goes_on_though_its_words_have_other_numbers(training_data, trained, tmp_path):
    """As if they had the old ones: weights, optimizer and losses are equal to the bit."""
    data = resized(training_data, tmp_path / "data", 24, reverse=True)
    latest = paths.checkpoint_path(trained, training_data[1])
    expected = run(training_data, tmp_path / "a", "--resume", latest, "--epochs", 3)
    found = run(data, tmp_path / "b", "--resume", latest, "--epochs", 3)
    assert found["word_map"] == expected["word_map"] != word_map_of(data)
    for key, tensor in expected["decoder"].items():
        assert torch.equal(found["decoder"][key], tensor)
    assert found["history"][-1]["nll"] == expected["history"][-1]["nll"]


def test_a_run_goes_on_with_more_pictures(training_data, trained, tmp_path, capsys):
    data = resized(training_data, tmp_path / "data", 40)
    latest = paths.checkpoint_path(trained, training_data[1])  # two epochs of three updates
    found = run(data, tmp_path / "out", "--resume", latest, "--epochs", 4)
    assert [record["update"] for record in found["history"]] == [3, 6, 15, 20]
    assert "other pictures than before: epoch 3 begins anew" in capsys.readouterr().err


def test_a_run_goes_on_with_other_pictures_though_they_are_as_many_updates(
    training_data, trained, tmp_path, capsys
):
    data = resized(training_data, tmp_path / "data", 24, less=1)  # of another validation split
    latest = paths.checkpoint_path(trained, training_data[1])
    found = run(data, tmp_path / "out", "--resume", latest, "--epochs", 3)
    assert [record.get("of_other_data") for record in found["history"]] == [2, 2, None]
    assert "other pictures than before: epoch 3 begins anew" in capsys.readouterr().err


def test_with_more_pictures_the_best_epoch_is_one_of_those_that_saw_them(
    training_data, trained, tmp_path, capsys
):
    """Scores of other validation pictures do not compare: the best model stayed the old one."""
    data = resized(training_data, tmp_path / "data", 40)
    before = models.load_checkpoint(paths.checkpoint_path(trained, training_data[1]))
    for record in before["history"]:
        record["BLEU-4"] = 99.0
    models.save_checkpoint(tmp_path / "high.pth.tar", before)
    flags = ["--resume", tmp_path / "high.pth.tar", "--epochs", 4, "--patience", 1]
    found = run(data, tmp_path / "out", *flags)
    best = models.load_checkpoint(paths.checkpoint_path(tmp_path / "out", data[1], best=True))
    assert len(best["history"]) > 2 and len(found["history"]) > 2
    assert "in epoch 1 of" not in capsys.readouterr().out


def test_a_run_does_not_go_on_with_other_words(training_data, trained, described, tmp_path, fails):
    data = described(tmp_path / "data", ["a red hexagon"], name="shapes")
    with fails("1 are new, [0-9]+ are gone.*start a new run .*--init_from"):
        run(data, tmp_path / "out", "--resume", paths.checkpoint_path(trained, training_data[1]))


# ---------------------------------------------------------------------------- scores on any data


def test_each_model_speaks_its_own_words(training_data, trained, described, tmp_path, capsys):
    """Compared and scored on data of other words: references are words, and nobody votes."""
    new = described(tmp_path / "data", ["a red hexagon", "red hexagon on grass"])
    run(new, tmp_path / "mine", "--epochs", 1)
    flags = ["--model", tmp_path / "mine", trained, "--compare", "--beam_size", 2]
    compared = evaluate(new, tmp_path / "both", *flags)["compared"]
    for model in (tmp_path / "mine", trained):
        flags = ["--model", model, "--data_name", new[1], "--beam_size", 2]
        alone = evaluate(new, tmp_path / f"alone-{model.name}", *flags)["beam_sizes"]["2"]
        assert compared[str(model)]["BLEU-1"] == alone["BLEU-1"]
        captioner = models.load_captioner(models.run_checkpoint(model))
        said = read_json(paths.captions_path(tmp_path / f"alone-{model.name}", new[1], "test", 2))
        assert {w for row in said for w in row["caption"].split()} <= captioner.word_map.keys()


def test_the_model_before_may_be_named_first(
    training_data, trained, described, tmp_path, capsys, fails
):
    """Then it says which data is meant, and which words a mean does not know."""
    new = described(tmp_path / "data", ["a red hexagon", "red hexagon on grass"])
    flags = ["--init_from", trained, "--epochs", 1]
    run(new, tmp_path / "mine", *flags)
    both = ["--model", trained, tmp_path / "mine", "--beam_size", 1]
    with fails(f"there is no .*, of the first model: add --data_name, perhaps {new[1]}"):
        evaluate(new, tmp_path / "both", *both, "--compare")
    both += ["--data_name", new[1]]
    evaluate(new, tmp_path / "both", *both, "--compare")
    assert "too few to tell how far pictures differ" in capsys.readouterr().err
    evaluate(new, tmp_path / "mean", *both, "--average", tmp_path / "mean.pth.tar")
    said = capsys.readouterr().err
    assert "the mean speaks the words of the first model, without the words grass, hexagon" in said


def test_scores_of_the_suites_captioner_are_not_written_beside_it():
    flags = ["--model", "captioner", "--beam_size", "2"]
    args = evaluation.get_args_parser().parse_args(flags)
    outputs = evaluation.name_files(args, "mine", [models.run_checkpoint("captioner")])
    assert outputs["metrics"].parent == Path("captions")


def test_those_who_vote_need_one_word_map(trained, described, tmp_path, fails):
    new = described(tmp_path / "data", ["a red hexagon"])
    run(new, tmp_path / "mine", "--epochs", 1)
    with fails("has another word map than"):
        evaluate(new, tmp_path / "out", "--model", tmp_path / "mine", trained)


def test_the_mean_with_a_model_of_larger_pictures_says_which_size_it_sees(capsys):
    small, large = (models.load_captioner() for _ in range(2))
    large.image_size = 384
    models.average_weights([small, large], models.build_decoder)
    assert "the mean sees pictures of 320 pixels, as the first model" in capsys.readouterr().err


def test_the_mean_with_a_model_of_fewer_words(training_data, trained, described, tmp_path):
    """Rows of words that the other does not know stay as they are."""
    known = word_map_of(training_data)
    new = described(tmp_path / "data", ["a red hexagon", "red hexagon"], known=known)
    run(new, tmp_path / "mine", "--epochs", 1, "--init_from", trained)
    flags = ["--model", tmp_path / "mine", trained, "--average", tmp_path / "mean.pth.tar"]
    evaluate(new, tmp_path / "out", *flags, "--beam_size", 1)
    mine, before, mean = (
        models.load_checkpoint(models.run_checkpoint(path))
        for path in (tmp_path / "mine", trained, tmp_path / "mean.pth.tar")
    )
    assert mean["word_map"] == mine["word_map"] and len(known) == len(mine["word_map"]) - 1
    for key in ("embedding.weight", "fc.bias"):
        a, b, both = (checkpoint["decoder"][key] for checkpoint in (mine, before, mean))
        assert torch.allclose(both[: len(known)], (a[: len(known)] + b) / 2, atol=1e-6)
        assert torch.equal(both[-1], a[-1])


def test_the_captioner_of_the_suite_is_scored_on_anybodys_data(own_data, tmp_path, capsys):
    images, captions = own_data
    flags = ["--dataset", "mine", "--images", images, "--captions", captions]
    prepare(*flags, "--data_folder", tmp_path / "data")
    data = tmp_path / "data", paths.base_name("mine", 5, 1)
    flags = ["--model", "captioner", "--data_name", data[1], "--beam_size", 1]
    scores = evaluate(data, tmp_path / "out", *flags)
    row, out = scores["beam_sizes"]["1"], capsys.readouterr().out
    assert row["BLEU-1"] > 0  # it says "a" and "dog"
    assert row["CIDEr"] is None  # of a single picture it is always 0
    assert scores["people"] == {} and "people" not in out  # nor does it show any variety
    assert f"split of {data[1]}, 1 picture\n" in out


def test_the_commands_of_the_guide_adapt_the_captioner(own_data, tmp_path, monkeypatch, capsys):
    folder, captions = own_data
    rows = re.sub(",(split|train|val|test)$", "", captions.read_text(), flags=re.M)
    (tmp_path / "captions.csv").write_text(rows)  # dealt out by lot: 16, 2 and 2
    folder.rename(tmp_path / "FOLDER")
    monkeypatch.chdir(tmp_path)
    section = re.search(r"^## I have 60 pictures\n(.*?)^## ", text_of("docs/guide.md"), re.S | re.M)
    more = {"train": ["--epochs", "1"], "caption": ["--no_plot"]}
    found = list(commands(section[1]))
    assert [script for script, _ in found[:3]] == ["create_input_files", "train", "caption"]
    for script, argv in found[:4]:
        run_script(script, [*argv, *more.get(script, [])], monkeypatch)
    printed = capsys.readouterr().out
    assert "words of captioner" in printed and Path("captions.html").exists()
    adapted = models.load_captioner(models.run_checkpoint("checkpoints/mine"))
    known = models.load_checkpoint(models.run_checkpoint("captioner"))["word_map"]
    assert known.items() <= adapted.word_map.items()
    mean = models.load_captioner("checkpoints/mean.pth.tar")
    assert mean.word_map == adapted.word_map


# ------------------------------------------------------------------------------- the trial's data


@pytest.fixture(scope="module")
def adapting():
    path = Path(datasets.__file__).parent / "docs" / "adapting.py"
    return runpy.run_path(str(path), run_name="adapting")


def test_the_trial_deals_out_dogs(adapting):
    dog, man = ["A brown dog.", "Two Dogs run"], ["A man on a bicycle"]
    records = [
        *(datasets.Record(f"d{i}", "train", [*dog, "a puppy"]) for i in range(8)),
        *(datasets.Record(f"v{i}", "val", [*dog, "A greyhound"]) for i in range(4)),
        *(datasets.Record(f"t{i}", "test", [*dog, "a dog"]) for i in range(3)),
        datasets.Record("both", "train", [*dog, *man]),  # only two say so: in neither part
        *(datasets.Record(f"m-{split}", split, man * 3) for split in datasets.SPLITS),
    ]
    found = adapting["trials"](records, seed=0, sizes=(5, 10), together=5, languages=(5,))
    assert sorted(found) == ["base", "both5", "language5", "own10", "own5", "quarter"]
    splits = lambda part: [sum(r.split == split for r in part) for split in datasets.SPLITS]
    names = {key: {r.name for r in part} for key, part in found.items()}
    assert names["base"] == {"m-train", "m-val", "m-test"}
    assert splits(found["own5"]) == [4, 1, 3] and splits(found["own10"]) == [8, 2, 3]
    assert names["own5"] < names["own10"]
    assert names["both5"] == names["own5"] | {"m-train", "m-val"}
    assert splits(found["quarter"]) == [2, 5, 4]  # of 10 training pictures, and all others
    first = found["language5"][0]
    assert first.captions[:2] == ["aux nworbux godux", "owtux sgodux nurux"]
    again = adapting["trials"](records, seed=0, sizes=(5, 10), together=5, languages=(5,))
    other = adapting["trials"](records, seed=1, sizes=(5, 10), together=5, languages=(5,))
    assert again == found and other["base"] == found["base"] and other["own5"] != found["own5"]
    assert other["quarter"] != found["quarter"]
    with pytest.raises(UserError, match="8 pictures of dogs in train, expected 16"):
        adapting["trials"](records, seed=0, sizes=(20,), together=5, languages=())
