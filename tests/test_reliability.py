"""Runs that are killed, stopped or starved: what they leave, and how they go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_TRAINING, train_args
from test_train import both_checkpoints, no_curves, run, same, without_times  # noqa: F401 (no_curves is used by its name)

import datasets
import models
import train
import utils
from captioning.model import starting, tensor_files
from captioning.report import metrics
from captioning.run import files

ROOT = Path(utils.__file__).parent


def equal_runs(a, b, data):
    """Whether two output folders hold the same run, bit for bit, times apart."""
    for first, second in zip(both_checkpoints(a, data), both_checkpoints(b, data)):
        first, second = models.load_checkpoint(first), models.load_checkpoint(second)
        for key in ("encoder", "decoder", "optimizer", "update", "word_map"):
            assert same(first[key], second[key]), key
        assert without_times(first["history"]) == without_times(second["history"])
    assert not list(Path(b).glob(".*"))  # neither locks nor halves of files


@pytest.fixture(scope="module")
def whole(training_data, tmp_path_factory):
    """Output folder of an uninterrupted run of three updates in each of two epochs."""
    folder = tmp_path_factory.mktemp("whole")
    train.main(train_args(training_data, folder))
    return folder


# ------------------------------------------------------------------------------------------ kill -9

# Forked children of a process that has imported everything: a start costs no imports.
KILLER = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import create_input_files, datasets, models, train, utils
import matplotlib.figure, nltk.translate.bleu_score, pycocoevalcap.cider.cider
import pycocoevalcap.rouge.rouge, torch, torchvision
kills, rng = 0, random.Random(int(sys.argv[3]))
longest = float(sys.argv[4])
while True:
    child = os.fork()
    if child == 0:
        for script, flags in zip((create_input_files, train), sys.argv[5:]):
            script.main(script.get_args_parser().parse_args(flags.split("|")))
        os._exit(0)
    os.setpgid(child, child)  # by the parent, which must not kill before it is done
    wait, end = rng.uniform(0, longest), time.time()
    end += wait
    while time.time() < end and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    if time.time() < end:
        break
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    if kills == int(sys.argv[2]):  # from here on it is left in peace
        longest = 1e9
print(kills)
"""


@pytest.mark.parametrize("kills", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_as_if_nothing_had_been(kills, own_data, tmp_path):
    """Preparing, extracting, training, validating, saving: SIGKILL, and the same commands again."""
    images, captions = own_data
    name = datasets.base_name("mine", 5, 1)

    def flags(folder):
        prepare = [
            "--dataset",
            "mine",
            "--images",
            images,
            "--captions",
            captions,
            "--min_word_freq",
            1,
            "--image_size",
            64,
            "--data_folder",
            folder / "data",
            "--workers",
            1,
        ]
        training = [
            *TINY_TRAINING,
            "--data_folder",
            folder / "data",
            "--data_name",
            name,
            "--output_folder",
            folder / "out",
            "--resume",
            "--checkpoint_every",
            1,
            "--epochs",
            3,
            "--batch_size",
            4,
        ]
        return ["|".join(map(str, part)) for part in (prepare, training)]

    def repeat(folder, kills, seed, longest):
        done = subprocess.run(
            [
                sys.executable,
                "-B",
                "-c",
                KILLER,
                str(ROOT),
                str(kills),
                str(seed),
                str(longest),
                *flags(folder),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        return int(done.stdout.split()[-1])

    began = time.time()
    assert repeat(tmp_path / "whole", 0, 0, 1e9) == 0
    longest, survived, seed = (
        0.25 * (time.time() - began),
        0,
        0,
    )  # of a start with its imports: most waits end in a kill
    while survived < kills:
        seed += 1
        parts = tmp_path / f"parts{seed}"
        survived += repeat(parts, kills - survived, seed, longest)
        for path in sorted((tmp_path / "whole" / "data").iterdir()):
            assert (parts / "data" / path.name).read_bytes() == path.read_bytes(), path.name
        assert {p.name for p in (parts / "data").iterdir()} == {
            p.name for p in (tmp_path / "whole" / "data").iterdir()
        }
        equal_runs(tmp_path / "whole" / "out", parts / "out", (parts / "data", name))
    print(f"{survived} kills in {seed} runs")


# ------------------------------------------------------------------------------------- stop signals


@pytest.mark.parametrize(
    "name, owner, function, call, flags",
    [
        ("SIGTERM", models, "caption_loss", 2, []),  # in the second update
        ("SIGINT", train.Trainer, "advance", 4, ["--checkpoint_every", 2]),
        ("SIGUSR1", train, "validate", 1, []),
        ("SIGTERM", models, "save_checkpoint", 1, []),  # while it writes
        ("SIGTERM", train.Trainer, "write_reports", 2, []),
        ("SIGHUP", models, "caption_loss", 5, []),
    ],
)
def test_a_stop_signal_saves_and_says_how_to_go_on(
    name, owner, function, call, flags, whole, training_data, tmp_path, monkeypatch
):
    original, calls = getattr(owner, function), []
    if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as by nohup")

    def signalled(*args, **options):
        calls.append(None)
        if len(calls) == call:
            signal.raise_signal(getattr(signal, name))
        return original(*args, **options)

    with (
        monkeypatch.context() as patch,
        pytest.raises(utils.Stopped, match=f"stopped by {name} .*saved.*--resume goes on") as stop,
    ):
        patch.setattr(owner, function, signalled)
        run(training_data, tmp_path, *flags)
    assert stop.value.signal == getattr(signal, name) and len(calls) >= call
    run(training_data, tmp_path, "--resume", *flags)
    equal_runs(whole, tmp_path, training_data)


def test_a_scheduler_sees_the_signals_exit_code_and_one_line(training_data, tmp_path):
    folder, name = training_data
    command = [
        sys.executable,
        "-B",
        ROOT / "train.py",
        *TINY_TRAINING,
        "--data_folder",
        folder,
        "--data_name",
        name,
        "--output_folder",
        tmp_path,
        "--epochs",
        "10000",
        "--patience",
        "10000",
    ]
    started = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in started.stdout:
        if line.startswith("epoch"):
            break
    started.send_signal(signal.SIGTERM)
    _, err = started.communicate(timeout=120)
    assert started.returncode == 128 + signal.SIGTERM
    last = err.splitlines()[-1]
    assert "train.py: stopped by SIGTERM after update" in last and last.endswith(
        "The same command with --resume goes on"
    )
    assert "Traceback" not in err


@pytest.mark.parametrize("update", [1, 2, 4, 5])
def test_a_run_goes_on_from_the_middle_of_an_epoch(
    update, whole, training_data, tmp_path, monkeypatch
):
    advance = train.Trainer.advance

    def killed(self, *args):
        if self.update == update:
            raise KeyboardInterrupt  # nothing is saved on the way out
        advance(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "advance", killed)
        run(training_data, tmp_path, "--checkpoint_every", 1)
    assert models.load_checkpoint(both_checkpoints(tmp_path, training_data)[0])["update"] == update
    run(training_data, tmp_path, "--resume")
    equal_runs(whole, tmp_path, training_data)


# --------------------------------------------------------------------------- what must not get lost


def test_two_runs_do_not_write_to_one_place(training_data, tmp_path, fails):
    latest, _ = both_checkpoints(tmp_path, training_data)
    with (
        files.locked(datasets.lock_path(latest), "it"),
        fails("is being written by another run; wait for it, or choose"),
    ):
        run(training_data, tmp_path)
    assert not list(tmp_path.iterdir())
    with files.locked(
        datasets.lock_path(datasets.word_map_path(tmp_path, "x_5_cap_per_img_1_min_word_freq")),
        "it",
    ):
        records, _ = datasets.shapes_records(2, 1, 1, size=32)
        with fails("is being written by another run"):
            datasets.write_dataset(
                tmp_path, records, dataset="x", source="generated", min_word_freq=1, image_size=32
            )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\0" * len(data)],
)
def test_resume_falls_back_to_the_best_checkpoint(
    damage, training_data, tmp_path, monkeypatch, capsys
):
    scores = {1: 2.0, 2: 1.0, 3: 1.5}  # the first of three epochs is the best
    score_captions, made = metrics.score_captions, []

    def scored(*args):
        made.append(None)
        return {**score_captions(*args), "BLEU-4": scores[len(made)]}

    monkeypatch.setattr(metrics, "score_captions", scored)
    whole = run(training_data, tmp_path, "--epochs", 3)
    latest, best = both_checkpoints(tmp_path, training_data)
    latest.write_bytes(damage(latest.read_bytes()))
    kept = best.read_bytes()
    del made[1:]
    resumed = run(training_data, tmp_path, "--resume", "--epochs", 3)
    assert (
        f"{latest} is no checkpoint" in (out := capsys.readouterr().out)
        and f"going on from {best} instead" in out
    )
    assert best.read_bytes() == kept
    assert same(resumed["decoder"], whole["decoder"]) and without_times(
        resumed["history"]
    ) == without_times(whole["history"])


def test_the_best_checkpoint_is_not_lost_with_the_last_one(training_data, tmp_path, fails):
    run(training_data, tmp_path)
    latest, best = both_checkpoints(tmp_path, training_data)
    latest.unlink()
    kept = best.read_bytes()
    with fails("BEST_.*holds an earlier run"):
        run(training_data, tmp_path)
    rank = lambda history: (history[-1]["BLEU-4"], -history[-1]["val_nll"])
    before = models.load_checkpoint(best)["history"]
    resumed = run(training_data, tmp_path, "--resume", "--epochs", 3)
    after = models.load_checkpoint(best)["history"]
    assert best.read_bytes() == kept or rank(after) > rank(before)
    assert len(resumed["history"]) == 3


@pytest.mark.parametrize("room", [0, 5000, 10**6])
def test_a_full_disk_ends_in_one_line_and_leaves_the_old_checkpoint(room, tmp_path):
    """Python ignores SIGXFSZ, so that a file beyond the limit fails as on a full disk."""
    path = tmp_path / "checkpoint.pth.tar"
    models.save_checkpoint(path, {"weights": torch.zeros(9)})
    code = f"""
import resource, sys, torch, models, utils
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
try:
    models.save_checkpoint({str(path)!r}, {{"weights": torch.zeros(10 ** 6)}})
except utils.UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write {path}: ") and done.stdout.count("\n") == 1
    assert (
        len(tensor_files.load_tensors(path)["weights"]) == 9 and len(list(tmp_path.iterdir())) == 1
    )


def test_a_feature_store_that_finds_no_room_ends_in_one_line(training_data, tmp_path):
    data = datasets.CaptionDataset(datasets.split_path(training_data[0], "train", training_data[1]))
    code = f"""
import resource, torch, datasets, utils
from pathlib import Path
data = datasets.CaptionDataset({str(data.path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 5, 10 ** 5))
try:
    path = Path({str(tmp_path / "f.npy")!r})
    datasets.encode_split(data, lambda images: torch.zeros(len(images), 64, 512), path)
except utils.UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write {tmp_path / '.f.npy.growing'}: ") and not list(
        tmp_path.iterdir()
    )


def test_two_runs_on_one_data_set_share_the_features(training_data, tmp_path):
    """The second waits for the first's and then reads them."""
    path, made = tmp_path / "features.npy", []
    data = datasets.CaptionDataset(datasets.split_path(training_data[0], "val", training_data[1]))
    script = (
        "import time, numpy\nfrom captioning.run.files import locked\n"
        f"with locked({str(datasets.lock_path(path))!r}, 'it'):\n print(flush=True)\n"
        f" time.sleep(2)\n numpy.save({str(path)!r}, numpy.ones(({len(data)}, 4, 3), 'float16'))"
    )
    other = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    other.stdout.readline()
    began = time.time()
    found = datasets.encode_split(data, lambda images: made.append(1), path)
    assert time.time() - began > 1 and not made and (found == 1).all()
    other.wait()


# ------------------------------------------------------------------------------- numbers and memory


def poisoned(monkeypatch, numbers, value=float("nan")):
    """Let the features of some training images be nonsense."""
    frozen_features = starting.frozen_features

    def spoiled(*args):
        features, val_features = frozen_features(*args)
        features = features.clone()
        features[numbers] = value
        return features, val_features

    monkeypatch.setattr(starting, "frozen_features", spoiled)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("flags", [[], ["--attention", "hard"]])
def test_an_update_that_is_not_finite_is_left_out_with_a_warning(
    flags, value, training_data, tmp_path, monkeypatch, capsys
):
    poisoned(monkeypatch, [3], value)
    checkpoint = run(training_data, tmp_path, "--batch_size", 4, *flags)
    assert [record["skipped_updates"] for record in checkpoint["history"]] == [1, 1]
    assert all(np.isfinite(record["loss"]) for record in checkpoint["history"])
    assert all(tensor.isfinite().all() for tensor in checkpoint["decoder"].values())
    assert checkpoint["history"][1]["nll"] < checkpoint["history"][0]["nll"]
    assert capsys.readouterr().err.count("note: update") == 2


def test_too_many_such_updates_end_the_run_and_keep_the_last_checkpoint(
    training_data, tmp_path, monkeypatch, fails
):
    run(training_data, tmp_path, "--batch_size", 2, "--epochs", 1)
    kept = [path.read_bytes() for path in both_checkpoints(tmp_path, training_data)]
    poisoned(monkeypatch, slice(None))
    with fails("not finite in the last 10 updates: lower --learning_rate"):
        run(training_data, tmp_path, "--batch_size", 2, "--epochs", 3, "--resume")
    assert [path.read_bytes() for path in both_checkpoints(tmp_path, training_data)] == kept


def test_an_epoch_without_a_finite_update_is_no_epoch(training_data, tmp_path, monkeypatch, fails):
    poisoned(monkeypatch, slice(None))
    with fails("not finite in any update of this epoch: lower --learning_rate"):
        run(training_data, tmp_path, "--batch_size", 12, "--epochs", 20)
    assert not any(path.exists() for path in both_checkpoints(tmp_path, training_data))


@pytest.mark.parametrize(
    "raising",
    [
        "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')",
        "torch.empty(10 ** 15)",
        "raise torch.AcceleratorError('CUDA error: out of memory')",
        "raise MemoryError('no room')",
        "raise MemoryError",
    ],
)
def test_memory_that_runs_out_ends_in_one_line_that_says_what_to_lower(raising, tmp_path):
    code = f"""
import torch, utils
from captioning.run.command_line import ArgumentParser
def main(args):
    {raising}
utils.run(main, ArgumentParser(prog="train.py"))
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        done.stderr.startswith("train.py: error: out of memory: ")
        and "Lower --batch_size" in done.stderr
    )
