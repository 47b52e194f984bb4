"""Several processes under torchrun, on the CPU: they must be one run."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY_TRAINING, train_args
from test_train import both_checkpoints, no_curves, run  # noqa: F401 (no_curves is used by its name)

import eval as evaluation
import models
import train
import utils
from captioning.run import distributed, signals

ROOT = Path(utils.__file__).parent
# dropout draws other masks in each process; without it a run of several processes is the run of one
WITHOUT_DROPOUT = ["--dropout", "0", "--embed_dropout", "0", "--feature_dropout", "0"]


def torchrun(processes, script, *flags, torchrun_flags=()):
    """Start a script under torchrun."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        *torchrun_flags,
        ROOT / f"{script}.py",
        *flags,
    ]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def finished(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def training(data, folder, *flags):
    return [
        *TINY_TRAINING,
        *WITHOUT_DROPOUT,
        "--data_folder",
        data[0],
        "--data_name",
        data[1],
        "--output_folder",
        folder,
        *flags,
    ]


def alone(data, folder, *flags):
    return run(data, folder, *WITHOUT_DROPOUT, *flags)


def same_curves(a, b):
    """Whether two histories tell of the same run, within what adding in another order changes."""
    assert [record["epoch"] for record in a] == [record["epoch"] for record in b]
    for first, second in zip(a, b):
        for key in ("loss", "nll"):
            assert first[key] == pytest.approx(second[key], rel=2e-5, abs=2e-6)
        for key in ("update", "learning_rate", "epsilon", "skipped_updates"):
            assert first[key] == second[key]
        for key in train.METRICS:  # every validation picture once
            assert first[key] == pytest.approx(second[key], abs=1e-6)


def rows_of(path):
    """The rows of a CSV file as dicts, numbers as such."""
    number = lambda text: float(text) if re.fullmatch(r"-?[0-9.]+", text) else text
    with open(path, encoding="utf-8-sig", newline="") as file:
        return [{key: number(text) for key, text in row.items()} for row in csv.DictReader(file)]


def checkpoint_of(data, folder):
    return models.load_checkpoint(both_checkpoints(folder, data)[0])


@pytest.mark.parametrize(
    "processes, flags",
    [
        # one update per epoch, so that the log holds the loss of each; small steps, since where a
        # gradient all but vanishes rounding decides its sign, and Adam makes a whole step of it
        (2, ["--batch_size", "24", "--epochs", "4", "--learning_rate", "5e-4"]),
        # and a last batch of one picture, in which three processes have no share
        pytest.param(
            4,
            ["--batch_size", "23", "--decoder", "gru", "--label_smoothing", "0"],
            marks=pytest.mark.slow,
        ),
        pytest.param(2, ["--fine_tune_encoder", "--batch_size", "12"], marks=pytest.mark.slow),
        pytest.param(4, ["--batch_size", "24", "--epochs", "4"], marks=pytest.mark.slow),
        # whose last layers no grid comes from, and so no gradient goes to
        pytest.param(
            2,
            ["--encoder", "timm/mobilenetv3_small_050", "--fine_tune_encoder"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_several_processes_train_and_evaluate_as_one(processes, flags, training_data, tmp_path):
    expected = alone(training_data, tmp_path / "one", *flags)
    out = finished(
        torchrun(processes, "train", *training(training_data, tmp_path / "several", *flags))
    )
    assert out.count("best BLEU-4") == 1 and out.count("revision") == 1
    found = checkpoint_of(training_data, tmp_path / "several")
    same_curves(found["history"], expected["history"])
    for name, tensor in expected["decoder"].items():
        assert (found["decoder"][name] - tensor).abs().max() < 2e-3 * max(1, tensor.abs().max()), (
            name
        )
    assert sorted(
        path.name for path in (tmp_path / "several").iterdir() if path.suffix != ".png"
    ) == sorted(path.name for path in (tmp_path / "one").iterdir())

    best = both_checkpoints(tmp_path / "one", training_data)[1]
    scored = [
        "--model",
        best,
        "--data_folder",
        training_data[0],
        "--beam_size",
        "1",
        "3",
        "--device",
        "cpu",
        "--consensus",
        "1",
    ]
    out = finished(torchrun(processes, "eval", *scored, "--output_folder", tmp_path / "b"))
    assert out.count("written: ") == 1
    args = evaluation.get_args_parser().parse_args(
        [*map(str, scored), "--output_folder", str(tmp_path / "a")]
    )
    evaluation.main(args)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 4 and names == sorted(path.name for path in (tmp_path / "b").iterdir())
    table = names.pop()  # each picture's own scores
    assert table.endswith(".csv")
    first, second = (rows_of(tmp_path / folder / table) for folder in "ab")
    assert [pytest.approx(row, abs=2e-4) for row in first] == second
    for name in names:
        first, second = (json.loads((tmp_path / folder / name).read_text()) for folder in "ab")
        if name.startswith("captions"):
            # each picture once, in its place; batches of other sizes round otherwise
            assert [pytest.approx(row, abs=2e-4) for row in first] == second
        else:
            for row, other in zip(*(side["beam_sizes"].values() for side in (first, second))):
                del row["ms per picture"], other["ms per picture"]
                ratios = [side.pop("deletion ratio", None) for side in (row, other)]
                random = row.get("random fall") or 0
                if random > 1e-3:  # below that rounding decides
                    # fall / random fall: no more exact than a fall, which may differ by 1e-6
                    assert ratios[0] == pytest.approx(ratios[1], abs=1e-6 / random)
                assert row == pytest.approx(other, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [(2, 1), (1, 2), (2, 3)])
def test_a_run_goes_on_with_another_number_of_processes(first, second, training_data, tmp_path):
    """Stopped in the middle of an epoch, too."""
    expected = alone(training_data, tmp_path / "whole")
    for processes, flags in ((first, ["--checkpoint_every", "2"]), (second, ["--resume"])):
        flags = training(training_data, tmp_path / "parts", *flags)
        if flags[-1] == "--resume":
            finished(torchrun(processes, "train", *flags))
            break
        process = torchrun(processes, "train", *flags)
        latest, _ = both_checkpoints(tmp_path / "parts", training_data)
        while not latest.exists():
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=120)
    same_curves(checkpoint_of(training_data, tmp_path / "parts")["history"], expected["history"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_stop_signal_saves_one_checkpoint(name, training_data, tmp_path):
    flags = training(training_data, tmp_path, "--epochs", "5000", "--patience", "5000")
    process = torchrun(2, "train", *flags)
    for line in process.stdout:
        if line.startswith("epoch  2"):
            break
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and f"stopped by {name} after update" in err
    assert checkpoint_of(training_data, tmp_path)["update"] >= 6
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_killed_process_ends_the_run_promptly_or_restarts_it(
    victim, restarts, training_data, tmp_path
):
    flags = training(
        training_data, tmp_path, "--epochs", "8", "--patience", "99", "--checkpoint_every", "1"
    )
    process = torchrun(2, "train", *flags, torchrun_flags=[f"--max_restarts={restarts}"])
    for line in process.stdout:
        if line.startswith("epoch  2"):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    began = time.time()
    os.kill(
        next(
            int(child)
            for child in children
            if f"\0RANK={victim}\0" in Path(f"/proc/{child}/environ").read_text()
        ),
        signal.SIGKILL,
    )
    out, err = process.communicate(timeout=280)
    if restarts:
        assert process.returncode == 0, err[-3000:]
        assert "resuming after epoch" in out
        expected = alone(training_data, tmp_path / "whole", "--epochs", 8, "--patience", 99)
        same_curves(checkpoint_of(training_data, tmp_path)["history"], expected["history"])
    else:
        assert process.returncode != 0 and time.time() - began < 60
        assert checkpoint_of(training_data, tmp_path)["update"] >= 6


@pytest.mark.slow
def test_a_users_mistake_is_said_once(training_data, tmp_path):
    process = torchrun(2, "train", *training(training_data, tmp_path), "--data_name", "other")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and err.count("train.py: error: there is no ") == 1


def test_one_process_runs_no_distributed_code(training_data, tmp_path, monkeypatch):
    import torch.distributed

    def refuse(*args, **options):
        raise AssertionError("distributed code in a run of one process")

    for name in ("init_process_group", "all_gather_object", "all_reduce"):
        monkeypatch.setattr(torch.distributed, name, refuse)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", refuse)
    train.main(train_args(training_data, tmp_path, "--epochs", 1))


def test_every_thing_has_one_process(monkeypatch):
    for count in (0, 1, 5, 8, 23):
        for size in (1, 2, 3, 8):
            monkeypatch.setattr(distributed, "world_size", lambda size=size: size)
            shares = []
            for rank in range(size):
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                shares += range(count)[distributed.share(count)]
            assert shares == list(range(count))


def test_the_reward_in_the_log_is_no_sum_over_processes(monkeypatch):
    """Each process knows the mean of all; the tally adds up what the processes counted."""
    counted = SimpleNamespace(add=lambda *values: sums.append(values[0]))
    trainer = SimpleNamespace(args=SimpleNamespace(scst=True), tally=counted, optimizer=None)
    trainer.optimizer, sums = SimpleNamespace(found_inf=None), []
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    for _ in range(4):
        train.Trainer.count(trainer, None, None, SimpleNamespace(reward=32.0))
    assert sum(sums) == -32


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost(monkeypatch):
    def gather(received):
        os.kill(os.getpid(), signal.SIGTERM)
        return [received, 0]

    with signals.StopSignals() as stop:
        stop._held = True  # as beside other processes
        with monkeypatch.context() as patch:
            patch.setattr(signals, "all_gather", gather)
            stop.check()
        with pytest.raises(utils.Stopped, match="SIGTERM"):
            stop.check()
