"""What must be the same on a GPU as on a CPU; skipped where there is none."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_decoder
from test_reliability import poisoned
from test_train import both_checkpoints, no_curves, optimizers, run  # noqa: F401 (fixtures are used by their names)

import datasets
import models
import train
import utils
from captioning.report import log
from captioning.run import machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]

WITHOUT_DROPOUT = ["--dropout", "0", "--embed_dropout", "0", "--feature_dropout", "0"]


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 products as exact as a CPU's; train.py allows TensorFloat32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    "options",
    [{}, {"decoder": "gru", "deep_output": True}, {"encoded_image_size": 5}, {"attention": "mean"}],
    ids=str,
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)])
def test_scores_and_gradients_are_those_of_a_cpu(options, dtype, tolerance):
    captions = torch.tensor([[8, 1, 2, 3, 9], [8, 4, 5, 9, 0], [8, 6, 9, 0, 0]])
    features, pictures = (
        torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 1]),
    )
    results = []
    for device, kind, products in (
        ("cpu", torch.float32, torch.float32),
        ("cuda", torch.float32, dtype),
    ):
        decoder = make_decoder(scale=1.0, **options).to(device, kind).train()
        with machine.autocast(torch.device(device), products == torch.bfloat16):
            output = decoder(
                features.to(device, kind), captions.to(device), [4, 3, 2], pictures.to(device)
            )
        models.caption_loss(output)[0].backward()
        results.append(
            [
                output.scores,
                output.alphas,
                *(p.grad for p in decoder.parameters() if p.grad is not None),
            ]
        )
    for ours, exact in zip(results[1], results[0], strict=True):
        exact = exact.detach().double()
        torch.testing.assert_close(
            ours.detach().cpu().double(),
            exact,
            rtol=tolerance,
            atol=tolerance * exact.abs().max().item() + 1e-7,
        )


@pytest.mark.parametrize("weight", [0.0, 1.0], ids=["plain", "consensus"])
def test_beam_search_says_the_same(weight, training_data, trained):
    folder, name = training_data
    data, known = (
        datasets.CaptionDataset(datasets.split_path(folder, split, name))
        for split in ("test", "train")
    )
    images = torch.from_numpy(data.images(slice(None)))
    found = []
    for device in ("cpu", "cuda"):
        captioner = models.load_captioner(both_checkpoints(trained, training_data)[1], device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            consensus = models.Consensus.of([captioner], known, weight) if weight else None
            found.append(
                captioner.caption(images, beam_size=5, max_decode_steps=12, consensus=consensus)
            )
    for (on_cpu, *_), (on_gpu, *_) in zip(*found):
        assert on_gpu.words == on_cpu.words
        assert on_gpu.log_prob == pytest.approx(on_cpu.log_prob, rel=1e-3)
        torch.testing.assert_close(on_gpu.alphas, on_cpu.alphas, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "flags", [[], ["--decoder", "gru", "--encoded_image_size", "3"], ["--amp"]], ids=str
)
def test_updates_in_graphs_learn_what_a_cpu_learns(flags, training_data, tmp_path):
    flags = [*flags, *WITHOUT_DROPOUT, "--epochs", "4"]
    cpu, gpu = (
        run(training_data, tmp_path / device, *flags, "--device", device)
        for device in ("cpu", "cuda")
    )
    for a, b in zip(cpu["history"], gpu["history"], strict=True):
        assert b["nll"] == pytest.approx(a["nll"], rel=0.03)


@pytest.mark.parametrize(
    "flags",
    [
        "--attention hard",
        "--attention mean --grounding 0.2",
        "--scheduled_sampling linear --ss_min 0.3",
        "--decoder gru --deep_output --amp",
        "--scheduled_sampling inverse_sigmoid --ss_argmax --position_encoding",
        "--fine_tune_encoder --mirror --batch_size 12",
    ],
)
def test_every_variant_trains(flags, training_data, tmp_path):
    history = run(training_data, tmp_path, *flags.split(), "--device", "cuda", "--epochs", 3)[
        "history"
    ]
    assert history[-1]["nll"] < history[0]["nll"] and not any(
        record["skipped_updates"] for record in history
    )


def test_self_critical_training_runs(training_data, trained, tmp_path):
    start = both_checkpoints(trained, training_data)[1]
    checkpoint = run(
        training_data,
        tmp_path,
        "--init_from",
        start,
        "--scst",
        "--learning_rate",
        "1e-4",
        "--device",
        "cuda",
    )
    assert len(checkpoint["history"]) == 2


def test_a_resumed_run_goes_on_the_same_way(training_data, tmp_path, monkeypatch, optimizers):  # noqa: F811
    flags = [*WITHOUT_DROPOUT, "--device", "cuda", "--epochs", 4, "--checkpoint_every", 1]
    whole = run(training_data, tmp_path / "whole", *flags)
    advance = train.Trainer.advance

    def killed(self, *args):
        if self.update == 5:
            raise KeyboardInterrupt
        advance(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "advance", killed)
        run(training_data, tmp_path / "parts", *flags)
    parts = run(training_data, tmp_path / "parts", *flags, "--resume")
    for a, b in zip(whole["history"], parts["history"], strict=True):
        assert b["nll"] == pytest.approx(a["nll"], rel=1e-2) and a["update"] == b["update"]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    assert (
        all(rate.is_cuda for rate in rates) and rates[0] == rates[-1]
    )  # graphs read them, so they must be there


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")], ids=str)
def test_a_run_goes_on_on_another_device(devices, training_data, tmp_path, optimizers):  # noqa: F811
    flags = [
        *WITHOUT_DROPOUT,
        "--lr_schedule",
        "constant",
    ]  # whose rates do not depend on the number of epochs
    whole = run(training_data, tmp_path / "whole", *flags, "--device", "cpu", "--epochs", 4)
    for epochs, device in zip((2, 4), devices):
        moved = run(
            training_data,
            tmp_path / "moved",
            *flags,
            "--device",
            device,
            "--epochs",
            epochs,
            "--resume",
        )
    for a, b in zip(whole["history"], moved["history"], strict=True):
        assert b["nll"] == pytest.approx(a["nll"], rel=0.03)
    assert optimizers[-1].param_groups[0]["lr"].device.type == devices[1]


def test_memory_does_not_grow(training_data, tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(log, "print_epoch", lambda *_: held.append(torch.cuda.memory_allocated()))
    run(training_data, tmp_path, "--device", "cuda", "--epochs", 8, "--patience", 99)
    assert held[-1] <= 1.01 * held[3]  # by then every length has its graph


def test_an_update_that_is_not_finite_is_left_out(training_data, tmp_path, monkeypatch):
    poisoned(monkeypatch, [3])
    checkpoint = run(training_data, tmp_path, "--batch_size", 4, "--device", "cuda", "--epochs", 4)
    assert [record["skipped_updates"] for record in checkpoint["history"]] == [1] * 4
    assert all(np.isfinite(record["loss"]) for record in checkpoint["history"])
    assert all(tensor.isfinite().all() for tensor in checkpoint["decoder"].values())


def test_a_full_gpu_ends_in_one_line():
    code = (
        "import torch, utils\n"
        "from captioning.run.command_line import ArgumentParser\n"
        "main = lambda args: torch.empty(10 ** 14, device='cuda')\n"
        "utils.run(main, ArgumentParser(prog='train.py'))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=Path(utils.__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    # a line of torch's own may stand above
    assert done.stderr.splitlines()[-1].startswith("train.py: error: out of memory: ")
