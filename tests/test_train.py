"""Training runs of a second each: what they write, how they go on, what they refuse."""

import ast
import contextlib
import json
import math
import shutil
import sys
import types
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch
from conftest import make_picture, train_args
from PIL import Image

import caption
import datasets
import eval
import models
import train
import utils
from captioning.model import schedules, starting
from captioning.report import curves as curves_room
from captioning.report import log, metrics
from captioning.run import command_line, files, paths


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than the training; the run behind ``trained`` draws."""
    monkeypatch.setattr(curves_room, "draw_curves", lambda *_: None)


def both_checkpoints(folder, data):
    return paths.checkpoint_path(folder, data[1]), paths.checkpoint_path(folder, data[1], best=True)


def run(data, folder, *flags):
    """Train; return the last checkpoint."""
    train.main(train_args(data, folder, *flags))
    return models.load_checkpoint(both_checkpoints(folder, data)[0])


def same(a, b):
    """Whether two nested values are equal, tensors bit for bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        )
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def without_times(history):
    times = ("seconds", "train_seconds", "words_per_second", "peak_memory_gb")
    return [{key: value for key, value in record.items() if key not in times} for record in history]


# -------------------------------------------------------------------------------- what a run leaves


def test_a_run_writes_checkpoints_log_and_curves(trained, training_data):
    latest, best = both_checkpoints(trained, training_data)
    log = paths.log_path(trained, training_data[1])
    curves = paths.curves_path(trained, training_data[1])
    assert sorted(trained.iterdir()) == sorted([latest, best, log, curves])
    with Image.open(curves) as image:
        assert image.width > 600

    checkpoint = models.load_checkpoint(latest)  # loads tensors and plain values only
    assert (
        checkpoint["config"]["encoder"] == "resnet18" and checkpoint["config"]["decoder_dim"] == 32
    )
    assert checkpoint["word_map"] == datasets.load_word_map(datasets.word_map_path(*training_data))
    first, *records = [json.loads(line) for line in log.read_text().splitlines()]
    assert first == {"config": checkpoint["config"]}
    assert records == checkpoint["history"]
    assert [record["epoch"] for record in records] == [1, 2]
    assert [record["update"] for record in records] == [3, 6]  # 24 pictures, 8 at a time
    assert records[1]["nll"] < records[0]["nll"] < math.log(len(checkpoint["word_map"])) + 1
    for record in records:
        assert set(train.METRICS) < set(record) and record["epsilon"] == 1
    best_epoch = len(models.load_checkpoint(best)["history"])
    ranks = [(record["BLEU-4"], -record["val_nll"]) for record in records]
    assert best_epoch == 1 + (ranks[1] > ranks[0])


def test_tensorboard_gets_figures_and_captioned_images(training_data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = run(training_data, tmp_path, "--tensorboard")["history"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()
    assert {*train.METRICS, "loss", "learning_rate", "epsilon"} <= set(tags["scalars"])
    written = [(event.step, event.value) for event in events.Scalars("nll")]
    assert written == [(r["update"], pytest.approx(r["nll"], rel=1e-6)) for r in history]
    assert len(tags["images"]) == 3 and events.Images(tags["images"][0])[0].width > 64


def test_without_tensorboard_a_line_says_what_to_install(
    training_data, tmp_path, monkeypatch, fails
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with fails("--tensorboard needs .*pip install tensorboard"):
        run(training_data, tmp_path, "--tensorboard")


def test_a_run_says_what_it_is_and_shows_captions(training_data, tmp_path, capsys):
    checkpoint = run(training_data, tmp_path, "--epochs", 1)
    out = capsys.readouterr().out
    assert (
        torch.__version__ in out
        and "--encoder resnet18" in out
        and "--learning_rate 0.02" in out
        and "--seed" not in out
        and max(map(len, out.splitlines())) < 300
    )
    assert "24 training images with 120 captions" in out
    assert (
        out.count("(true: ") == 3
        and "BLEU-4" in out
        and str(both_checkpoints(tmp_path, training_data)[1]) in out
    )
    assert checkpoint["history"][0]["epoch"] == 1


def test_validation_is_on_captions_that_the_model_makes_alone(trained, training_data):
    """The score in the log is that of beam search, not of teacher forcing."""
    latest, _ = both_checkpoints(trained, training_data)
    record = models.load_checkpoint(latest)["history"][-1]
    captioner = models.load_captioner(latest)
    data = datasets.CaptionDataset(datasets.split_path(training_data[0], "val", training_data[1]))
    found = captioner.caption(
        torch.from_numpy(data.images(slice(None))),
        beam_size=2,
        length_penalty=0.7,
        max_decode_steps=12,
    )
    scores = metrics.score_captions(data.references, [captioner.text(h) for (h,) in found])
    assert {name: record[name] for name in scores} == pytest.approx(scores, abs=1e-3)


def test_validation_loss_is_that_of_the_true_words(trained, training_data):
    """Computed anew, one caption at a time, with steps of the decoder alone."""
    latest, _ = both_checkpoints(trained, training_data)
    captioner = models.load_captioner(latest)
    data = datasets.CaptionDataset(datasets.split_path(training_data[0], "val", training_data[1]))
    total = words = 0
    with torch.no_grad():
        for captions, image in zip(data.references, data.images(slice(None))):
            encoder_out = captioner.encode(torch.from_numpy(image)[None]).half()
            for caption in captions:
                context, state = captioner.decoder.init_hidden_state(encoder_out)
                ids = datasets.encode_caption(caption, captioner.word_map, 50)
                ids = [i for i in np.array(ids).ravel().tolist() if i != datasets.PAD_ID]
                for word, following in zip(ids, ids[1:]):
                    word = torch.tensor([[word]])
                    scores, _, state = captioner.decoder.step(word, state, context)
                    total -= scores.double().log_softmax(2)[0, 0, following].item()
                    words += 1
    record = models.load_checkpoint(latest)["history"][-1]
    assert record["val_nll"] == pytest.approx(total / words, rel=1e-5)


def test_curves_show_whole_epochs_the_best_one_and_both_losses(tmp_path, monkeypatch):
    """From one epoch on."""
    monkeypatch.undo()
    figures = []
    savefig = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *args, **options: figures.append(self) or savefig(self, *args, **options),
    )
    history = [
        {"epoch": i, "nll": 3 / i, "val_nll": 3 / i + 0.1, **dict.fromkeys(train.METRICS, 30 - i)}
        for i in (1, 2, 3)
    ]
    for count in (1, 3):
        curves_room.draw_curves(tmp_path / "curves.png", history[:count], "CIDEr")
        losses, *scores = figures[-1].axes
        assert [line.get_label() for line in losses.lines][:2] == ["training", "validation"]
        alone = [axes for axes in scores if "CIDEr" in axes.get_title()]
        assert len(alone) == 1 and len(alone[0].lines) == 2  # the scores, and where the best is
        for axes in figures[-1].axes:
            low, high = axes.get_xlim()
            assert all(tick == round(tick) for tick in axes.get_xticks() if low < tick < high)
            assert low < 1 and axes.lines[-1].get_xdata()[0] == 1  # the first epoch was the best
    assert Image.open(tmp_path / "curves.png").width > 600
    own = [record | {"of my own": 1.0} for record in history]
    curves_room.draw_curves(tmp_path / "curves.png", own, "of my own")
    assert figures[-1].axes[-1].get_title() == "validation: of my own"


def test_the_line_of_an_epoch_shows_what_chooses_the_best(training_data, tmp_path, capsys):
    """And one says that a CNN with random weights learns nothing."""
    checkpoint = run(training_data, tmp_path, "--metric", "BLEU-1", "--epochs", 1)
    said = capsys.readouterr()
    assert f", BLEU-1 {checkpoint['history'][0]['BLEU-1']:.2f} * | " in said.out
    assert "the CNN keeps its random weights" in said.err and "--fine_tune_encoder" in said.err


def test_no_more_than_a_checkpoint_is_needed_to_go_on_in_another_folder(
    training_data, tmp_path, trained
):
    shutil.copy(both_checkpoints(trained, training_data)[0], tmp_path / "copy.pth.tar")
    checkpoint = run(
        training_data, tmp_path / "out", "--resume", tmp_path / "copy.pth.tar", "--epochs", 3
    )
    assert [record["epoch"] for record in checkpoint["history"]] == [1, 2, 3]


@pytest.mark.parametrize("flag", ["--preset", "--decoder"])
def test_a_flag_without_its_value_is_one_line(flag, monkeypatch, capsys):
    """Though these are read before the others, for the defaults that belong to them."""
    monkeypatch.setattr("sys.argv", ["train.py", flag])
    with pytest.raises(SystemExit):
        train.get_args_parser().parse_args()
    assert capsys.readouterr().err == f"train.py: error: {flag} expected one argument\n"


def test_a_preset_whose_architecture_is_another_says_how_to_take_the_runs_own(
    training_data, trained, tmp_path, fails
):
    with fails("--deep_output: .* was built with --no_deep_output; take that, or leave it out"):
        run(training_data, tmp_path / "out", "--init_from", trained, "--deep_output")
    with fails("--deep_output: .*; --preset focus asks for it: give --no_deep_output beside the"):
        run(training_data, tmp_path / "out", "--init_from", trained, "--preset", "focus")


@pytest.mark.parametrize(
    "flags, idle",
    [
        ("--encoder_learning_rate 1e-3", "encoder_learning_rate does nothing without --fine_tune"),
        ("--ss_min 0.2", "ss_min does nothing without --scheduled_sampling"),
        ("--init_from x --encoder_weights y", "encoder_weights does nothing beside --init_from"),
        ("--init_from x --scst --alpha_c 1", "alpha_c does nothing with --scst"),
        ("--init_from x --scst --dropout=0.1", "dropout does nothing with --scst"),
        ("--attention mean --grounding 0.1", "grounding does nothing with --attention mean"),
        ("--fine_tune_encoder --encoder_learning_rate 1e-3 --grounding 0.1", ""),
        ("--init_from x --scst --preset focus", ""),  # nobody gave the flag itself
    ],
)
def test_a_flag_that_does_nothing_beside_the_others_is_named(flags, idle, monkeypatch, capsys):
    utils.note.cache_clear()
    monkeypatch.setattr("sys.argv", ["train.py", *flags.split()])
    train.check_args(train.get_args_parser().parse_args())
    err = capsys.readouterr().err
    assert err.count("\n") == bool(idle) and idle in err


def test_a_preset_changes_defaults_and_a_flag_beside_it_wins(monkeypatch):
    parser, argv = train.get_args_parser(), ["--preset", "focus", "--grounding", "0.1"]
    monkeypatch.setattr("sys.argv", ["a_notebook"])
    args = parser.parse_args(argv)
    assert (args.alpha_c, args.attend_word, args.deep_output) == (0.0, True, True)
    assert args.grounding == 0.1
    assert parser.parse_args([]).alpha_c == 0.1  # of this one command line alone


# --------------------------------------------------------------------------------------- continuing


@pytest.mark.parametrize(
    "flags",
    [
        ["--lr_schedule", "plateau", "--decoder_dim", "256"],
        # large enough for torch to use several threads, whose order of adding must not matter
        ["--attention_dim", "512", "--batch_size", "24", "--epochs", "3"],
        pytest.param(["--attention", "hard"], marks=pytest.mark.slow),
        ["--scheduled_sampling", "linear", "--ss_min", "0.3"],
        ["--grounding", "0.2"],
        ["--scheduled_sampling", "inverse_sigmoid", "--decoder", "gru"],
        pytest.param(
            ["--fine_tune_encoder", "--mirror", "--batch_size", "12"], marks=pytest.mark.slow
        ),
    ],
    ids=" ".join,
)
def test_a_resumed_run_equals_an_uninterrupted_one(flags, training_data, tmp_path, monkeypatch):
    whole = run(training_data, tmp_path / "whole", *flags)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(log, "print_epoch", killed)  # after the first epoch's checkpoint
        run(training_data, tmp_path / "parts", *flags)
    torch.rand(7)  # what came in between must not matter
    parts = run(training_data, tmp_path / "parts", *flags, "--resume")
    for key in ("encoder", "decoder", "optimizer", "update", "epoch_so_far", "word_map"):
        assert same(parts[key], whole[key]), key
    assert same(parts.get("teacher"), whole.get("teacher"))
    assert without_times(parts["history"]) == without_times(whole["history"])
    best = [
        models.load_checkpoint(both_checkpoints(tmp_path / name, training_data)[1])
        for name in ("whole", "parts")
    ]
    assert same(best[0]["decoder"], best[1]["decoder"])


@pytest.fixture
def optimizers(monkeypatch):
    """The optimizers of the runs to come, in order."""
    made, build = [], train.build_optimizer
    monkeypatch.setattr(
        train, "build_optimizer", lambda *args: made.append(build(*args)) or made[-1]
    )
    return made


def test_encoder_and_decoder_learn_at_their_own_rates(training_data, tmp_path, optimizers):
    run(
        training_data,
        tmp_path,
        "--fine_tune_encoder",
        "--learning_rate",
        4e-4,
        "--encoder_learning_rate",
        1e-4,
        "--lr_schedule",
        "constant",
        "--epochs",
        1,
        "--batch_size",
        12,
    )
    decoder, encoder = (float(group["lr"]) for group in optimizers[0].param_groups)
    assert decoder == pytest.approx(4 * encoder) and encoder > 0


def test_a_run_of_another_device_goes_on_with_this_ones_optimizer(
    training_data, tmp_path, optimizers
):
    run(training_data, tmp_path / "whole", "--lr_schedule", "constant", "--epochs", 3)
    checkpoint = run(training_data, tmp_path / "parts", "--lr_schedule", "constant")
    for group in checkpoint["optimizer"]["param_groups"]:
        group |= {"lr": 7.0, "capturable": True}
    models.save_checkpoint(both_checkpoints(tmp_path / "parts", training_data)[0], checkpoint)
    run(training_data, tmp_path / "parts", "--lr_schedule", "constant", "--epochs", 3, "--resume")
    whole, resumed = optimizers[0].param_groups, optimizers[-1].param_groups
    assert [group["lr"] for group in resumed] == [group["lr"] for group in whole] and not resumed[
        0
    ]["capturable"]
    both = [
        models.load_checkpoint(both_checkpoints(tmp_path / name, training_data)[0])
        for name in ("whole", "parts")
    ]
    assert same(both[0]["decoder"], both[1]["decoder"])


def test_killed_between_best_and_latest_the_epoch_is_repeated(
    training_data, tmp_path, monkeypatch, trained
):
    save, saved = models.save_checkpoint, []

    def killed_at_third(path, checkpoint):
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(path, checkpoint)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(models, "save_checkpoint", killed_at_third)
        run(training_data, tmp_path)
    latest, best = both_checkpoints(tmp_path, training_data)
    assert saved == [latest, best, latest]  # before validation, and after it BEST first
    resumed = run(training_data, tmp_path, "--resume")
    assert same(
        resumed["decoder"],
        models.load_checkpoint(both_checkpoints(trained, training_data)[0])["decoder"],
    )


def test_resume_and_init_from_take_a_runs_folder(training_data, trained, tmp_path, capsys):
    """--resume the last checkpoint in it, --init_from the best."""
    resumed = run(training_data, tmp_path / "resumed", "--resume", trained, "--epochs", 3)
    assert [record["epoch"] for record in resumed["history"]] == [1, 2, 3]
    assert "resuming after epoch 2" in capsys.readouterr().out
    flags = ["--epochs", 1, "--learning_rate", 0]
    started = run(training_data, tmp_path / "started", "--init_from", trained, *flags)
    best = models.load_checkpoint(both_checkpoints(trained, training_data)[1])
    assert len(started["history"]) == 1 and same(started["decoder"], best["decoder"])


def test_resume_elsewhere_takes_the_best_checkpoint_along(training_data, trained, tmp_path, capsys):
    """And says where it has gone if it was not there."""
    flags = ["--resume", trained, "--epochs", 3, "--learning_rate", "0.02"]
    run(training_data, tmp_path / "folder", *flags)
    names = [path.name for path in both_checkpoints(tmp_path / "folder", training_data)]
    assert all((tmp_path / "folder" / name).exists() for name in names)
    latest = both_checkpoints(trained, training_data)[0]
    (tmp_path / "alone").mkdir()
    shutil.copy(latest, tmp_path / "alone")
    capsys.readouterr()
    train.main(train_args(training_data, tmp_path / "out", "--resume", tmp_path / "alone"))
    assert "its checkpoint was not beside the one that was resumed" in capsys.readouterr().out


def test_resume_of_another_run_does_not_write_over_this_one(
    training_data, trained, tmp_path, fails, monkeypatch
):
    run(training_data, tmp_path, "--epochs", 1, "--seed", 3)
    before = both_checkpoints(tmp_path, training_data)[0].read_bytes()
    with fails("--resume .* holds another run; choose another --output_folder"):
        run(training_data, tmp_path, "--resume", trained, "--epochs", 3)
    shutil.copytree(trained, tmp_path / "gru")  # as runs lie below the default --output_folder
    with fails("--resume .*gru: .* holds another run"):
        run(training_data, tmp_path, "--resume", tmp_path / "gru", "--epochs", 3)
    assert both_checkpoints(tmp_path, training_data)[0].read_bytes() == before
    # a process of torchrun's that is started again goes on with what its run has written since
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    name = training_data[1]
    path, _, resuming = starting.find_start(tmp_path, name, str(trained), None, lambda path: path)
    assert resuming and path == both_checkpoints(tmp_path, training_data)[0]


def test_resume_with_nothing_there_starts(training_data, tmp_path, capsys):
    assert len(run(training_data, tmp_path, "--resume", "--epochs", 1)["history"]) == 1
    assert "nothing to resume" in capsys.readouterr().out


def test_a_checkpoint_that_was_named_must_be_there(training_data, tmp_path, fails):
    for flag in ("--resume", "--init_from"):
        with fails("there is no file .*typo.pth.tar"):
            run(training_data, tmp_path, flag, tmp_path / "typo.pth.tar")


def test_an_earlier_run_is_not_overwritten(training_data, trained, fails):
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    with fails("holds an earlier run: add --resume"):
        run(training_data, trained)
    assert {path: path.stat().st_mtime_ns for path in trained.iterdir()} == before


def test_starting_from_a_checkpoint_does_not_overwrite_its_run(
    training_data, trained, tmp_path, fails
):
    shutil.copytree(trained, tmp_path / "run")
    latest, best = both_checkpoints(tmp_path / "run", training_data)
    before = latest.read_bytes(), best.read_bytes()
    with fails("holds an earlier run"):
        run(
            training_data,
            tmp_path / "run",
            "--init_from",
            best,
            "--fine_tune_encoder",
            "--epochs",
            1,
        )
    assert (latest.read_bytes(), best.read_bytes()) == before


@pytest.mark.parametrize(
    "flags",
    [
        ["--decoder_dim", 33],
        ["--learning_rate", 0.1],
        ["--encoder", "resnet34"],
        ["--amp"],
        ["--seed", 5],
        ["--scheduled_sampling", "linear"],
        ["--fine_tune_encoder"],
    ],
)
def test_resuming_with_other_flags_is_refused_and_names_them(flags, training_data, trained, fails):
    with fails(f"{flags[0]} .*was"):
        run(training_data, trained, "--resume", *flags)


def test_a_run_whose_validation_was_too_large_goes_on_with_a_narrower_beam(
    training_data, trained, tmp_path
):
    resumed = run(training_data, tmp_path, "--resume", trained, "--epochs", 3, "--beam_size", 1)
    assert len(resumed["history"]) == 3 and resumed["config"]["beam_size"] == 1


@pytest.mark.parametrize("grounding", [0.5, 0])
def test_a_new_run_goes_on_with_the_attention_teacher(grounding, training_data, tmp_path):
    """If there is one: a checkpoint may have been trained without."""
    checkpoint = run(training_data, tmp_path / "first", "--grounding", grounding, "--epochs", 1)
    flags = (
        "--init_from",
        tmp_path / "first",
        "--learning_rate",
        0,
        "--grounding",
        0.5,
        "--epochs",
        1,
    )
    assert ("teacher" in checkpoint) == (grounding > 0)
    second = run(training_data, tmp_path / "second", *flags)
    if grounding:
        assert same(second["teacher"], checkpoint["teacher"])


def test_a_run_of_a_revision_that_did_not_know_a_flag_can_be_resumed(
    training_data, trained, tmp_path
):
    for path in both_checkpoints(trained, training_data):
        checkpoint = models.load_checkpoint(path)
        del checkpoint["config"]["grounding"]
        models.save_checkpoint(tmp_path / path.name, checkpoint)
    assert len(run(training_data, tmp_path, "--resume", "--epochs", 3)["history"]) == 3


def test_a_frozen_run_can_be_fine_tuned_and_that_resumed(training_data, trained, tmp_path):
    start = both_checkpoints(trained, training_data)[1]
    before = models.load_checkpoint(start)
    flags = [
        "--fine_tune_encoder",
        "--learning_rate",
        "0.001",
        "--batch_size",
        "12",
        "--epochs",
        "1",
    ]
    after = run(training_data, tmp_path, "--init_from", start, *flags)
    assert len(after["history"]) == 1
    moved = {
        name.split(".")[1]
        for name, tensor in after["encoder"].items()
        if not torch.equal(tensor, before["encoder"][name])
    }
    assert moved == {"5", "6", "7"}  # ResNet's second to fourth block, and no BatchNorm statistics
    assert not any(
        "running" in name or "tracked" in name
        for name, tensor in after["encoder"].items()
        if not torch.equal(tensor, before["encoder"][name])
    )
    # it began with the weights of the frozen run
    assert (
        after["history"][0]["nll"]
        < models.load_checkpoint(both_checkpoints(trained, training_data)[0])["history"][0]["nll"]
    )
    flags[-1] = "2"
    assert len(run(training_data, tmp_path, "--resume", *flags)["history"]) == 2


def test_mirror_shows_some_images_mirrored_but_none_whose_captions_say_left_or_right(
    training_data, trained, tmp_path, monkeypatch
):
    data = datasets.CaptionDataset(datasets.split_path(training_data[0], "train", training_data[1]))
    sided = {
        i
        for i, captions in enumerate(data.references)
        if {"left", "right"} & {word for c in captions for word in c}
    }
    assert 0 < len(sided) < len(data)
    images = torch.from_numpy(data.images(slice(None)))
    both = torch.cat([images, images.flip(3)]).flatten(1)
    shown, load = [], train.Trainer.load

    def record(trainer, *args):
        batch = load(trainer, *args)
        shown.append(batch.inputs.flatten(1))
        return batch

    monkeypatch.setattr(train.Trainer, "load", record)
    start = both_checkpoints(trained, training_data)[1]
    flags = ["--fine_tune_encoder", "--mirror", "--batch_size", 12, "--epochs", 4]
    run(training_data, tmp_path, "--init_from", start, *flags)
    shown = [(both == image).all(1).nonzero()[0].item() for image in torch.cat(shown)]
    plain = {i for i in shown if i < len(data)}
    mirrored = {i - len(data) for i in shown if i >= len(data)}
    assert len(shown) == 4 * len(data) and mirrored and not mirrored & sided
    assert mirrored & plain  # the same image once so, once so


def test_a_picture_with_left_in_a_caption_that_is_not_trained_on_is_not_mirrored(tmp_path):
    """Self-critical training rewards by all captions, those beyond --captions_per_image too."""
    records, _ = datasets.shapes_records(2, 1, 1, seed=1, size=64)
    plain, sided = ["a dog", "a dog runs"], ["a dog", "a dog runs", "a dog on the left of it"]
    records[0], records[1] = (
        record._replace(captions=texts) for record, texts in zip(records, (plain, sided))
    )
    settings = {"min_word_freq": 1, "captions_per_image": 1, "image_size": 64}
    datasets.write_dataset(tmp_path, records, dataset="own", source="own", **settings)
    path = paths.split_path(tmp_path, "train", datasets.base_name("own", 1, 1))
    assert datasets.mirrorable(datasets.CaptionDataset(path)).tolist() == [True, False]


@pytest.mark.parametrize("text", ["Ein Hund läuft links", "une fille à droite", "左边的狗在跑"])
def test_left_and_right_are_known_in_other_languages(text):
    data = types.SimpleNamespace(references=[[datasets.tokenize(text)], [["ein", "hund"]]])
    assert datasets.mirrorable(data).tolist() == [False, True]


def test_mirror_is_refused_where_features_are_computed_once(training_data, tmp_path, fails):
    with fails("--mirror.*--fine_tune_encoder"):
        run(training_data, tmp_path, "--mirror")


def test_a_checkpoint_brings_its_architecture(training_data, trained, tmp_path, fails):
    start = both_checkpoints(trained, training_data)[1]
    folder, name = training_data
    args = train.get_args_parser().parse_args(
        [
            "--data_folder",
            str(folder),
            "--data_name",
            name,
            "--output_folder",
            str(tmp_path),
            "--init_from",
            str(start),
            *[
                "--epochs",
                "1",
                "--beam_size",
                "1",
                "--max_decode_steps",
                "3",
                "--workers",
                "1",
                "--device",
                "cpu",
            ],
        ]
    )
    train.main(args)
    config = models.load_checkpoint(both_checkpoints(tmp_path, training_data)[0])["config"]
    assert (config["encoder"], config["decoder_dim"], config["encoded_image_size"]) == (
        "resnet18",
        32,
        0,
    )
    args.resume, args.init_from, args.epochs = "auto", None, 2
    for key in models.ARCHITECTURE:  # the same command line with --resume in place of --init_from
        setattr(args, key, train.get_args_parser().get_default(key))
    train.main(args)
    with fails("--decoder gru.*was built with --decoder lstm"):
        run(training_data, tmp_path / "other", "--init_from", start, "--decoder", "gru")


def test_a_command_with_init_from_goes_on_by_resume_added(training_data, trained, tmp_path, capsys):
    flags = ["--init_from", trained, "--resume"]
    assert len(run(training_data, tmp_path, *flags, "--epochs", 1)["history"]) == 1
    assert "nothing to resume" in capsys.readouterr().out
    assert len(run(training_data, tmp_path, *flags, "--epochs", 2)["history"]) == 2
    assert "resuming after epoch 1" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_origin(training_data, trained, tmp_path):
    run(training_data, tmp_path / "a", "--init_from", trained, "--epochs", 1)
    for flags in ([], ["--init_from", "elsewhere"]):
        on = run(training_data, tmp_path / "a", "--resume", "--epochs", 2, *flags)
        assert on["config"]["init_from"] == str(trained)
    on = run(training_data, tmp_path / "b", "--resume", tmp_path / "a", "--epochs", 3)
    assert on["config"]["init_from"] == str(trained)


def test_resume_or_init_from(training_data, tmp_path, fails):
    with fails("give one of them"):
        run(training_data, tmp_path, "--resume", "y", "--init_from", "x")
    with fails("--word_map is that of --init_from"):
        run(training_data, tmp_path, "--word_map", "words.json")
    with fails("--preset adapt needs a model to go on from"):
        run(training_data, tmp_path, "--preset", "adapt")
    for flags in (["--preset", "adapt"], ["--scst"]):  # nothing is there to resume
        with fails(f"{flags[0]}.* needs a model"):
            run(training_data, tmp_path, *flags, "--resume")


@pytest.mark.parametrize(
    "part, value",
    [
        ("optimizer", None),
        ("optimizer", {"state": 5}),
        ("epoch_so_far", {}),
        ("update", "x"),
        ("update", 99),
        ("history", []),
        ("history", [{}]),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_is_refused(
    part, value, training_data, trained, tmp_path, fails
):
    checkpoint = models.load_checkpoint(both_checkpoints(trained, training_data)[0])
    torch.save({**checkpoint, part: value}, tmp_path / "broken.pth.tar")
    with fails("broken.pth.tar is damaged.*cannot be resumed.*--init_from"):
        run(training_data, tmp_path / "out", "--resume", tmp_path / "broken.pth.tar")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--resume", "--init_from"])
def test_weights_that_do_not_fit_are_refused(flag, training_data, trained, tmp_path, fails):
    checkpoint = models.load_checkpoint(both_checkpoints(trained, training_data)[0])
    torch.save({**checkpoint, "decoder": {}}, tmp_path / "broken.pth.tar")
    with fails("broken.pth.tar is damaged"):
        run(training_data, tmp_path / "out", flag, tmp_path / "broken.pth.tar")


def test_pictures_of_another_size_are_refused(training_data, trained, tmp_path, fails):
    checkpoint = models.load_checkpoint(both_checkpoints(trained, training_data)[0])
    checkpoint["config"]["image_size"] = 32
    torch.save(checkpoint, tmp_path / "small.pth.tar")
    with fails("found 64 pixels.*32 pixels in the run to resume"):
        run(training_data, tmp_path / "out", "--resume", tmp_path / "small.pth.tar")


# ------------------------------------------------------------------------------------ feature store


def test_features_are_computed_once_and_never_taken_from_other_weights(
    training_data, tmp_path, monkeypatch
):
    data = tmp_path / "data", training_data[1]
    data[0].mkdir()
    for path in training_data[0].iterdir():
        if not path.name.startswith("FEATURES"):
            shutil.copy(path, data[0])
    encoded, encode = [], models.Captioner.encode
    monkeypatch.setattr(
        models.Captioner,
        "encode",
        lambda self, images: encoded.append(len(images)) or encode(self, images),
    )

    def pictures_encoded(folder, *flags):
        encoded.clear()
        run(data, tmp_path / folder, *flags)
        return sum(encoded)

    def stores():
        return sorted(path.name for path in data[0].glob("FEATURES_*"))

    # 24 to train, 6 to validate, once for two epochs; one of each for the shape of a store; and in
    # every run two with which the decoder is checked before
    assert pictures_encoded("first") == 34
    assert len(stores()) == 2
    assert pictures_encoded("second") == 2
    assert pictures_encoded("first", "--resume", "--epochs", 3) == 2
    assert pictures_encoded("other_seed", "--seed", 1) == 34  # other random weights
    assert len(stores()) == 4
    assert pictures_encoded("fine", "--fine_tune_encoder", "--epochs", 1, "--batch_size", 12) == 8
    assert len(stores()) == 4
    store = np.load(data[0] / stores()[0])
    assert store.dtype == np.float16 and store.shape[1:] == (4, 512)


def test_a_damaged_feature_store_is_named(training_data, tmp_path, fails):
    data = tmp_path / "data", training_data[1]
    shutil.copytree(training_data[0], data[0])
    stores = list(data[0].glob("FEATURES_TRAIN_*"))
    others = []
    for array in (
        np.zeros((24, 4, 512)),
        np.zeros((24, 2048), np.float16),
        np.zeros((23, 4, 512), np.float16),
        np.zeros((), np.float16),
        np.array([{}] * 24),
        np.zeros((24, 4, 512), np.float16, order="F"),
    ):
        np.save(tmp_path / "other.npy", array)
        others.append((tmp_path / "other.npy").read_bytes())
    for content in (
        b"",
        b"\x93NUMPY",
        stores[0].read_bytes()[:5000],
        stores[0].read_bytes() + b"\0",
        *others,
    ):
        for store in stores:
            store.write_bytes(content)
        with fails("feature store .*FEATURES_TRAIN.*delete it"):
            run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize(
    "flags",
    [
        "--decoder gru --deep_output",
        "--attention hard --scheduled_sampling linear --ss_k 0.9 --ss_slope 0.01",
        "--attention mean --amp --scheduled_sampling exponential --ss_min 0.2",
        "--encoded_image_size 3 --position_encoding",
        "--scheduled_sampling inverse_sigmoid --ss_argmax --lr_schedule constant --warmup 0",
        *(
            pytest.param(flags, marks=pytest.mark.slow)
            for flags in (
                "--attention hard --decoder gru",
                "--attention mean --deep_output",
                "--amp --label_smoothing 0 --alpha_c 0",
                "--metric CIDEr --grad_clip 0.1 --workers 3 --batch_size 100",
                "--encoder vgg11",
                "--encoder efficientnet_lite0",
            )
        ),
    ],
)
def test_every_variant_trains_and_captions(flags, training_data, tmp_path):
    checkpoint = run(training_data, tmp_path, *flags.split())
    records = checkpoint["history"]
    assert records[1]["nll"] < records[0]["nll"]
    if "--scheduled_sampling" in flags:
        assert 1 >= records[0]["epsilon"] > records[1]["epsilon"] > 0
    captioner = models.load_captioner(both_checkpoints(tmp_path, training_data)[0])
    ((found,),) = captioner.caption(
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8), beam_size=2, max_decode_steps=5
    )
    assert len(found.words) <= 5 and math.isfinite(found.log_prob)


def test_loss_keeps_falling(training_data, tmp_path):
    checkpoint = run(
        training_data,
        tmp_path,
        "--epochs",
        8,
        "--batch_size",
        4,
        "--dropout",
        0,
        "--embed_dropout",
        0,
        "--feature_dropout",
        0,
        "--label_smoothing",
        0,
    )
    losses = [record["nll"] for record in checkpoint["history"]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


def test_self_critical_training_goes_on_from_a_checkpoint(training_data, trained, tmp_path, fails):
    start = both_checkpoints(trained, training_data)[1]
    flags = [
        "--scst",
        "--epochs",
        "2",
        "--learning_rate",
        "0.001",
        "--lr_schedule",
        "constant",
        "--warmup",
        "0",
    ]
    checkpoint = run(training_data, tmp_path / "scst", "--init_from", start, *flags)
    assert len(checkpoint["history"]) == 2
    assert not same(checkpoint["decoder"], models.load_checkpoint(start)["decoder"])
    with fails("--init_from"):
        run(training_data, tmp_path / "fresh", "--scst")
    with fails("--scheduled_sampling"):
        run(
            training_data,
            tmp_path / "both",
            "--scst",
            "--init_from",
            start,
            "--scheduled_sampling",
            "linear",
        )


def warm(energies, decoder):
    """Hard attention of one's own."""
    return models.hard(energies / 2, decoder)


warm.samples = True


@pytest.mark.parametrize("name", ["hard", "warm"])
def test_self_critical_training_refuses_a_checkpoint_with_hard_attention(
    name, training_data, tmp_path, fails, monkeypatch
):
    monkeypatch.setitem(models.ATTENTIONS, "warm", (models.Attention, warm))
    run(training_data, tmp_path / "hard", "--attention", name, "--epochs", 1)
    with fails("--scst does not train hard attention"):
        run(
            training_data,
            tmp_path / "scst",
            "--scst",
            "--init_from",
            both_checkpoints(tmp_path / "hard", training_data)[0],
        )


def test_embeddings_are_taken(training_data, tmp_path, capsys):
    vectors = tmp_path / "vectors.txt"
    vectors.write_text(
        "".join(f"{word} {' '.join(['0.25'] * 16)}\n" for word in ("red", "circle", "zebra"))
    )
    checkpoint = run(
        training_data,
        tmp_path / "out",
        "--embeddings",
        vectors,
        "--epochs",
        1,
        "--learning_rate",
        0,
    )
    word_map, rows = checkpoint["word_map"], checkpoint["decoder"]["embedding.weight"]
    assert (rows[[word_map["red"], word_map["circle"]]] == 0.25).all() and not (
        rows[word_map["square"]] == 0.25
    ).any()
    assert "vectors for 2 of" in capsys.readouterr().out


def test_training_stops_when_nothing_is_gained(training_data, tmp_path):
    checkpoint = run(training_data, tmp_path, "--learning_rate", 0, "--patience", 2, "--epochs", 9)
    assert (
        len(checkpoint["history"]) == 3
    )  # the first is the best of equals, and two have passed since
    assert len(models.load_checkpoint(both_checkpoints(tmp_path, training_data)[1])["history"]) == 1


# ---------------------------------------------------------------------------------------- schedules


def factors(updates=100, history=(), **config):
    config = {
        "warmup": 10,
        "total_updates": 100,
        "lr_schedule": "cosine",
        "metric": "BLEU-4",
        **config,
    }
    return [
        schedules.learning_rate_factor(config, update, list(history)) for update in range(updates)
    ]


def test_learning_rate_rises_and_then_follows_its_schedule(monkeypatch, fails):
    cosine = factors()
    assert cosine[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert cosine[9:] == sorted(cosine[9:], reverse=True)
    assert (
        cosine[10] == pytest.approx(1)
        and cosine[55] == pytest.approx(0.5)
        and 0 <= cosine[-1] < 0.01
    )
    assert factors(lr_schedule="constant")[10:] == [1.0] * 90
    monkeypatch.setitem(schedules.LEARNING_RATES, "linear", lambda progress, *_: 1 - progress)
    assert factors(lr_schedule="linear")[10::45] == pytest.approx([1, 0.5])
    parsed = train.get_args_parser().parse_args(["--lr_schedule", "linear"])
    assert parsed.lr_schedule == "linear"
    with fails("unknown lr_schedule 'liner'; .*linear"):
        factors(lr_schedule="liner")
    assert factors(warmup=0)[0] == pytest.approx(1)
    assert all(
        0 <= f <= 1 for f in factors(300, warmup=150)
    )  # a warm-up longer than the run, a run made longer


def test_plateau_waits_for_two_poor_epochs_each_time():
    def after(*scores):
        history = [{"BLEU-4": score, "val_nll": 3.0} for score in scores]
        return factors(50, history, lr_schedule="plateau")[-1]

    assert after() == after(1) == after(1, 2, 3) == after(1, 0.5) == 1
    assert after(1, 1, 1) == after(1, 0, 0.5) == pytest.approx(0.8)
    assert after(1, 0, 0, 0) == pytest.approx(0.8)
    assert after(1, 0, 0, 0, 0) == pytest.approx(0.64)
    assert after(1, 0, 0, 2, 3, 1) == pytest.approx(0.8)


def test_plateau_keeps_its_reductions_when_the_data_changes():
    of = lambda score: {"BLEU-4": score, "val_nll": 3.0}
    old = [of(score) | {"of_other_data": 3} for score in (5, 4, 4)]
    for since, factor in (([], 0.8), ([1, 2], 0.8), ([1, 0, 0], 0.64)):
        history = old + [of(score) for score in since]
        assert factors(50, history, lr_schedule="plateau")[-1] == pytest.approx(factor)


# --------------------------------------------------------------------------------------- bad values


def test_a_disk_too_small_for_the_checkpoints_is_said_before_the_work(
    training_data, tmp_path, monkeypatch, fails
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    monkeypatch.setattr(models.Encoder, "forward", None)  # nothing is encoded
    monkeypatch.setattr(starting, "calibrate", lambda *_: None)
    with fails("MB"):
        run(training_data, tmp_path / "out")


def test_the_loop_can_be_read_at_a_glance():
    """From the epoch over the backward pass to saving: one function of at most 60 lines."""
    tree = ast.parse(Path(train.__file__).read_text(encoding="utf-8"))
    (loop,) = (node for node in tree.body if getattr(node, "name", "") == "train")
    assert loop.end_lineno - loop.lineno < 60


@pytest.mark.parametrize(
    "flags",
    [
        "--epochs 0",
        "--batch_size 0",
        "--learning_rate nan",
        "--learning_rate -1",
        "--dropout 1",
        "--dropout nan",
        "--embed_dropout -0.1",
        "--label_smoothing 1.5",
        "--decoder_dim 0",
        "--encoded_image_size -1",
        "--beam_size 0",
        "--workers 0",
        "--warmup -1",
        "--patience 0",
        "--grad_clip 0",
        "--seed -1",
        "--ss_min 1.5",
        "--alpha_c -1",
        "--length_penalty -1",
        "--max_decode_steps 0",
        "--encoder_weights missing.pth",
        "--device cuda:99",
        "--ss_k 3",
        "--ss_argmax",
        "--embeddings missing.txt",
        "--data_name other",
        "--data_folder missing",
        "--scheduled_sampling linear --ss_k nan",
        "--scheduled_sampling exponential --ss_k 1.5",
        "--scheduled_sampling exponential --ss_slope 0.1",
    ],
)
def test_a_bad_value_ends_in_one_line_that_names_it(flags, training_data, tmp_path, capsys):
    *_, flag, last = ["", *flags.split()]
    named = last if last in ("other", "missing", "missing.txt") else flag
    message = refused(capsys, lambda: run(training_data, tmp_path, *flags.split()))
    assert (named or flags) in message
    assert not list(tmp_path.iterdir())  # and before anything is written


def refused(capsys, call):
    """The one line that a call ends in, be it the parser's or the script's."""
    try:
        call()
    except utils.UserError as error:
        message = str(error)
    except SystemExit as error:
        assert error.code == 2
        message = capsys.readouterr().err.strip()
    assert message and "\n" not in message
    return message


def test_a_flag_without_its_number_is_refused(training_data, tmp_path, capsys):
    message = refused(capsys, lambda: run(training_data, tmp_path, "--beam_size"))
    assert "--beam_size" in message


def test_data_of_another_word_map_is_refused(training_data, tmp_path, fails):
    data = tmp_path / "data", training_data[1]
    shutil.copytree(training_data[0], data[0])
    path = datasets.word_map_path(*data)
    word_map = datasets.load_word_map(path)
    word_map["red"], word_map["a"] = word_map["a"], word_map["red"]
    files.write_json(path, word_map)
    with fails("encoded with another word map"):
        run(data, tmp_path / "out")


def test_a_validation_that_fails_loses_nothing(training_data, tmp_path, monkeypatch, capsys):
    """The epoch is in the checkpoint, and the run goes on from there as if nothing had happened."""
    whole = run(training_data, tmp_path / "whole")

    def fail(*_, **__):
        raise utils.UserError("the scores are not finite")

    with monkeypatch.context() as broken:
        broken.setattr(models, "caption_split", fail)
        broken.setattr(sys, "argv", ["train.py"])
        parser = command_line.ArgumentParser(prog="train.py")
        with pytest.raises(SystemExit) as ended:
            utils.run(lambda _: run(training_data, tmp_path / "run"), parser)
    path = both_checkpoints(tmp_path / "run", training_data)[0]
    named = f"validation failed; {path} has what epoch 1 learned: the scores are not finite"
    assert ended.value.code == 1
    assert capsys.readouterr().err.endswith(f"train.py: error: {named}\n")
    assert models.load_checkpoint(path)["update"] == 3
    resumed = run(training_data, tmp_path / "run", "--resume")
    assert same(resumed["decoder"], whole["decoder"])
    keys = ("epoch", "update", "loss", "nll", "val_nll", "CIDEr")
    histories = [[[r[key] for key in keys] for r in c["history"]] for c in (resumed, whole)]
    assert histories[0] == histories[1]


def test_the_transformer_trains_samples_and_goes_on(training_data, tmp_path, fails, monkeypatch):
    """With scheduled sampling, then self-critical, with its own options in the checkpoint."""
    own = ("--decoder", "transformer", "--layers", "1", "--heads", "2")
    sampling = ("--scheduled_sampling", "linear", "--ss_min", "0.5", "--amp")
    first = run(training_data, tmp_path / "first", *own, *sampling)
    assert first["config"]["decoder_options"] == {"layers": 1, "heads": 2}
    folder = tmp_path / "first"
    start = ("--init_from", folder, "--epochs", "1")
    scst = run(training_data, tmp_path / "scst", *start, "--scst", "--heads", "2")
    assert scst["config"]["decoder_options"] == {"layers": 1, "heads": 2}
    assert math.isfinite(scst["history"][0]["val_nll"])
    with fails("--layers 2: .* was built with --layers 1, --heads 2; take that, or leave it out"):
        run(training_data, tmp_path / "other", *start, "--layers", "2")
    monkeypatch.setattr("sys.argv", ["train.py", "--decoder=lstm"])  # asked for, if the default
    with fails("--decoder lstm: .* was built with --decoder transformer; take that"):
        run(training_data, tmp_path / "other", *start)
    with fails("--layers 2 is not for --decoder lstm"):
        run(training_data, tmp_path / "lstm", "--layers", "2")


def test_a_transformers_captions_and_page_are_drawn_by_head(training_data, tmp_path, fails):
    """The sheets of two heads differ, and eval.py measures its gaze and makes its page."""
    run(training_data, tmp_path / "run", "--decoder", "transformer", "--epochs", "1")
    path = both_checkpoints(tmp_path / "run", training_data)[1]
    checkpoint = models.load_checkpoint(path)
    generator = torch.Generator().manual_seed(0)
    for weights in checkpoint["decoder"].values():  # so that it says something
        weights.copy_(torch.rand(weights.shape, generator=generator) - 0.5)
    models.save_checkpoint(path, checkpoint)
    picture = tmp_path / "a.png"
    Image.fromarray(make_picture(0)).save(picture)
    common = ["--model", str(tmp_path / "run"), "--device", "cpu", "--max_decode_steps", "6"]

    def describe(*flags):
        words = ["--img", str(picture), *common, "--output_folder", str(tmp_path / "out"), *flags]
        caption.main(caption.get_args_parser().parse_args(words))
        return (tmp_path / "out" / "a_attention.png").read_bytes()

    first = describe("--head", "1", "--html", str(tmp_path / "page.html"))
    assert len({first, describe("--head", "2"), describe()}) == 3
    with fails("--head 5: the model has 4 heads"):
        describe("--head", "5")
    folder = str(training_data[0])
    words = [*common, "--data_folder", folder, "--html", str(tmp_path / "report.html")]
    eval.main(eval.get_args_parser().parse_args([*words, "--output_folder", str(tmp_path)]))
    (metrics,) = map(files.read_json, tmp_path.glob("metrics_*.json"))
    assert metrics["beam_sizes"]["5"]["num_pixels"] == 4


def test_the_transformer_brings_its_own_defaults():
    args = train.get_args_parser().parse_args(["--decoder", "transformer", "--dropout", "0.1"])
    assert (args.learning_rate, args.dropout, args.embed_dropout) == (4e-4, 0.1, 0.3)
    assert args.decoder_options == {}


def test_an_update_does_what_the_flags_say(training_data, tmp_path, monkeypatch):
    forward, step = models.DecoderWithAttention.forward, torch.optim.AdamW.step
    clip, fed, norms, rates = torch.nn.utils.clip_grad_norm_, [], [], []

    def watched_forward(decoder, *args):
        if decoder.training:
            fed.append((*args[4:], torch.is_autocast_enabled("cpu"), torch.initial_seed()))
        return forward(decoder, *args)

    def watched_step(optimizer):
        (group,) = optimizer.param_groups
        rates.append((float(group["lr"]), group["weight_decay"]))
        return step(optimizer)

    watched_clip = lambda parameters, norm: norms.append(norm) or clip(parameters, norm)
    monkeypatch.setattr(models.DecoderWithAttention, "forward", watched_forward)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched_clip)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)
    flags = "--epochs 4 --batch_size 4 --lr_schedule constant --warmup 2 --weight_decay 0.125 --amp"
    sampling = "--scheduled_sampling linear --ss_min 0.5 --ss_argmax --grad_clip 0.25"
    history = run(training_data, tmp_path, *flags.split(), *sampling.split())["history"]
    *shown, seeds = zip(*fed)
    epsilons = [pytest.approx(1 - 0.5 * i / 24) for i in range(24)]
    assert shown == [(*epsilons,), (True,) * 24, (True,) * 24] and len(set(seeds)) == 24
    assert rates == [(pytest.approx(0.02 * min(1, (i + 1) / 2)), 0.125) for i in range(24)]
    assert norms == [0.25] * 24
    assert [record["learning_rate"] for record in history] == [pytest.approx(0.02)] * 4


def test_the_constants_of_a_schedule_reach_it():
    flags = "--scheduled_sampling linear --ss_min 0.2 --ss_k 0.9 --ss_slope 0.01"
    args, config = train.get_args_parser().parse_args(flags.split()), {"total_updates": 100}
    trainer = types.SimpleNamespace(args=args, config=config)
    found = [train.Trainer.epsilon(trainer, update) for update in (0, 50, 99)]
    assert found == pytest.approx([0.9, 0.4, 0.2])


@pytest.mark.parametrize("flags", [[], ["--fine_tune_encoder"]], ids=["features", "pictures"])
def test_captions_are_learned_beside_their_own_picture(flags, training_data, tmp_path, monkeypatch):
    load, fits = train.Trainer.load, []

    def watched(trainer, *args):
        batch, data = load(trainer, *args), trainer.train_data
        pictures = trainer.features
        pictures = torch.from_numpy(data.images(slice(None))) if pictures is None else pictures
        pictures_of = np.repeat(np.arange(len(data)), np.diff(data.caption_offsets))
        for words, place in zip(batch.captions.tolist(), batch.image_index):
            rows = data.captions[:, : len(words)].tolist()
            own = [of for of, row in zip(pictures_of, rows) if row == words]  # several may say it
            fits.append(any(torch.equal(batch.inputs[place], pictures[of]) for of in own))
        return batch

    monkeypatch.setattr(train.Trainer, "load", watched)
    run(training_data, tmp_path, "--epochs", 1, *flags)
    assert fits == [True] * 120


def test_self_critical_training_learns_without_dropout(
    trained, training_data, tmp_path, monkeypatch
):
    forward, modes = models.DecoderWithAttention.forward, []

    def watched(decoder, *args):
        modes.append((torch.is_grad_enabled(), decoder.training))
        return forward(decoder, *args)

    monkeypatch.setattr(models.DecoderWithAttention, "forward", watched)
    flags = "--scst", "--learning_rate", 1e-4, "--epochs", 1
    run(training_data, tmp_path, "--init_from", trained, *flags)
    assert (True, False) in modes and (True, True) not in modes


def test_the_attention_teacher_learns_with_its_weight(training_data, tmp_path, monkeypatch):
    build, loss, made, weights = train.build_optimizer, models.caption_loss, [], []

    def watched_build(args, captioner, teacher=None):
        made.append((build(args, captioner, teacher), teacher))
        return made[0][0]

    def watched_loss(*args, **options):
        if torch.is_grad_enabled():  # of validation the words alone count
            weights.append(options["grounding"])
        return loss(*args, **options)

    monkeypatch.setattr(train, "build_optimizer", watched_build)
    monkeypatch.setattr(models, "caption_loss", watched_loss)
    run(training_data, tmp_path, "--grounding", 0.375, "--epochs", 1)
    ((optimizer, teacher),) = made
    learned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert teacher and {id(p) for p in teacher.parameters()} <= learned
    assert weights and set(weights) == {0.375}


@pytest.mark.parametrize("flags", [[], ["--sample_location"]])
def test_validation_samples_places_if_asked_to(flags, training_data, tmp_path, monkeypatch):
    split, found = models.caption_split, []

    def watched(captioners, *args, **options):
        found.append(captioners[0].decoder.sample_location)
        return split(captioners, *args, **options)

    monkeypatch.setattr(models, "caption_split", watched)
    run(training_data, tmp_path, "--attention", "hard", "--epochs", 1, *flags)
    assert found == [bool(flags)]


def test_tensorboard_is_shown_each_picture_with_its_own_words_and_gaze(
    trained, training_data, monkeypatch
):
    """Written for a made-up TensorBoard, which need not be installed."""
    texts, images = {}, {}

    class Writer(contextlib.nullcontext):
        def add_scalar(self, *_):
            pass

        def add_image(self, name, image, step):
            images[name] = image

        def add_text(self, name, text, step):
            texts[name] = text

    room = types.SimpleNamespace(SummaryWriter=lambda folder: Writer(Writer()))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", room)
    captioner, folder = models.load_captioner(trained), training_data[0]
    (path,) = Path(folder).glob("VAL_*.hdf5")
    data = datasets.CaptionDataset(path)
    log.write_tensorboard(Path("."), captioner, data, {"update": 1}, {"beam_size": 2})
    rows = [0, (len(data) - 1) // 2, len(data) - 1]
    found = captioner.caption(torch.from_numpy(data.images(rows)), beam_size=2)
    for row, image, (best, *_) in zip(rows, data.images(rows), found, strict=True):
        assert texts[data.image_names[row]] == " ".join(captioner.text(best))
        strip, size = images[data.image_names[row]], image.shape[1]
        assert strip.shape == (3, size, size * (1 + len(best.words)))
        side = math.isqrt(best.alphas.shape[1])
        for i, alpha in enumerate(best.alphas, 1):
            lit = strip[:, :, i * size : (i + 1) * size].sum(0) / strip[:, :, :size].sum(0)
            brightest = (alpha.argmax() // side, alpha.argmax() % side)
            row, column = (int(x) * size // side + size // side // 2 for x in brightest)
            assert lit[row, column] > 0.95  # of 0.2 to 1


def test_a_disk_that_holds_a_runs_own_checkpoints_has_room_to_go_on(tmp_path, monkeypatch):
    asked, module, path = [], torch.nn.Linear(100, 100), tmp_path / "checkpoint_a.pth.tar"
    monkeypatch.setattr(starting, "check_disk", lambda folder, size: asked.append(size))
    starting.check_space(path, module, module)
    for name in ("checkpoint_a.pth.tar", "BEST_checkpoint_a.pth.tar"):
        path.with_name(name).write_bytes(bytes(100))
    starting.check_space(path, module, module)
    assert asked[0] == 3 * 3 * 2 * 101 * 100 * 4 and asked[0] - asked[1] == 200


def test_random_weights_are_calibrated_on_a_single_tiny_picture(capsys):
    class Data(list):
        def images(self, numbers):
            return np.stack([self[number] for number in numbers])

    encoder, data = (
        models.Encoder("resnet18", "none"),
        Data([make_picture(1, 32).transpose(2, 0, 1)]),
    )
    starting.calibrate_on(encoder, data, torch.device("cpu"), learns=True)
    assert (
        "first layers, which --fine_tune_encoder leaves out, stay random" in capsys.readouterr().err
    )
    assert encoder(torch.from_numpy(data.images([0]))).isfinite().all()
