"""The CUDA path without a card: trainings, searches and scripts on a made-up one (fake_cuda.py).

What a card would refuse fails here, and the numbers are those of the CPU's kernels. The numbers of
a card's kernels, races between streams, what NCCL exchanges, and speed are not seen here, but by
tests/test_gpu.py and tests/benchmark.py on a card.
"""

import fcntl
import functools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest
import torch
from conftest import TINY_TRAINING, train_args
from PIL import Image

import datasets
import models
import train

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("gcc") or not torch.version.cuda,
    reason="needs Linux, gcc and a CUDA build of torch",
)
INSIDE = "FAKE_CUDA_INSIDE" in os.environ  # this is a process that test_stage started
WITHOUT_DROPOUT = ["--dropout", 0, "--embed_dropout", 0, "--feature_dropout", 0]
SLOW_STAGES = [pytest.param(name, marks=pytest.mark.slow) for name in ("numbers", "few_graphs")]


@pytest.fixture(scope="session")
def made_up(tmp_path_factory):
    """Function: environment variables of a process that finds two made-up cards."""
    return functools.partial(fake_cuda.environment, tmp_path_factory.mktemp("made_up"))


def start(environment, *command):
    """Start Python in the suite's folder."""
    return subprocess.Popen(
        [sys.executable, "-B", *map(str, command)],
        cwd=Path(train.__file__).parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    """Wait for a process that nothing may be refused to; return its output."""
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == code and "made-up card: " not in output, output[-6000:]
    return output


def pytest_inside(environment, *flags):
    environment = {**environment, "FAKE_CUDA_INSIDE": "1", "TORCH_DISABLE_NATIVE_JIT": "1"}
    flags = ["-q", "--tb=short", "--show-capture=stderr", "-p", "no:cacheprovider", *flags]
    finish(start(environment, "-m", "pytest", *flags))


@pytest.mark.parametrize("stage", ["control", "rules", "faults", *SLOW_STAGES])
def test_stage(stage, made_up):
    pytest_inside(made_up(), __file__, "-k", f"TestInside and test_{stage}")


@pytest.mark.slow
def test_the_tests_for_a_card_pass(made_up):
    pytest_inside(made_up(), Path(__file__).with_name("test_gpu.py"))


@pytest.fixture
def data(shapes_data, tmp_path):
    """The small shapes data set, copied for one test: (folder, name)."""
    return shutil.copytree(shapes_data[0], tmp_path / "data"), shapes_data[1]


def training(data, output_folder, *flags):
    files = ["--data_folder", data[0], "--data_name", data[1], "--output_folder", output_folder]
    return ["train.py", *TINY_TRAINING, *files, *flags]


@pytest.mark.parametrize("stage", ["no_compiler", "busy_card"])
def test_scripts(stage, data, made_up, picture, tmp_path):
    """They need no compiler, and with --device cuda:1 never touch card 0, which is another's."""
    if stage == "no_compiler":
        environment = made_up(PATH=str(tmp_path))
        device, flags = "cuda", ["--fine_tune_encoder", "--encoded_image_size", 1, "--epochs", 1]
    else:
        environment = made_up(FAKE_CUDA_EXCLUSIVE=str(tmp_path))
        device, flags = "cuda:1", ["--epochs", 3]
    for name in ("CC", "TORCH_DISABLE_NATIVE_JIT"):
        environment.pop(name, None)
    best = datasets.checkpoint_path(tmp_path / "run", data[1], best=True)
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    common = ["--model", best, "--device", device, "--beam_size", 2, "--max_decode_steps", 5]
    with open(tmp_path / "card0", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        finish(start(environment, *training(data, tmp_path / "run", *flags, "--device", device)))
        scores = finish(start(environment, "eval.py", *common, "--data_folder", data[0]))
        flags = ["--no_plot", "--img", tmp_path / "a.png"]
        assert "BLEU-4" in scores and finish(start(environment, "caption.py", *common, *flags))


def test_each_process_opens_its_own_card(data, made_up, tmp_path):
    """As it must in exclusive-process mode."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--attention", "hard", "--amp", "--batch_size", 23, "--device", "cuda"]
    environment = made_up(FAKE_CUDA_EXCLUSIVE=str(tmp_path))
    finish(start(environment, *torchrun, *training(data, tmp_path / "run", *flags)))
    assert (tmp_path / "card0").exists() and (tmp_path / "card1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["capture", "graph"])
def test_out_of_memory_ends_in_one_line(moment, data, made_up, tmp_path):
    command = training(data, tmp_path / "run", "--device", "cuda")
    output = finish(start(made_up(FAKE_CUDA_FULL=moment), *command), code=2)
    assert output.splitlines()[-1].startswith("train.py: error: out of memory: ")
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "largest, sections",
    [
        ("1e8", "decoder"),  # which first checks numbers
        ("1e4", "training beam encoders caption"),
    ],
    ids=["decoder", "others"],
)
def test_the_benchmark_runs_to_its_end(largest, sections, made_up):
    """Its figures mean nothing here."""
    flags = ["--device", "cuda", "--images", 2, "--sections", *sections.split(" ")]
    finish(start(made_up(FAKE_CUDA_LARGEST=largest), "tests/benchmark.py", *flags))


# ------------------------------------------------------------------------------ on the made-up card


def losses(device, data, folder, *flags):
    """Train without dropout; return each epoch's loss. Feature stores are made anew."""
    copy = shutil.copytree(data[0], folder / f"data_{device}"), data[1]
    flags = [*WITHOUT_DROPOUT, "--epochs", 3, *flags, "--device", device]
    return [record["nll"] for record in run(copy, folder / device, *flags)]


def run(data, folder, *flags):
    """Train; return the records of the epochs. Nothing may be refused."""
    refusals = fake_cuda.counter("refusals")
    train.main(train_args(data, folder, *flags))
    assert fake_cuda.counter("refusals") == refusals
    return models.load_checkpoint(datasets.checkpoint_path(folder, data[1]))["history"]


@pytest.fixture(scope="session")
def usual_losses(shapes_data, tmp_path_factory):
    return losses("cpu", shapes_data, tmp_path_factory.mktemp("cpu"))


def in_each_update(action):
    """Plant a fault: an action on the optimizer before each of its steps."""

    def plant(monkeypatch):
        step = torch.optim.AdamW.step
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (action(self), step(self)))

    return plant


def synchronize(optimizer):
    torch.cuda.current_stream().synchronize()


def use_the_cpu(optimizer):
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad += torch.zeros(weight.shape).to("cuda", non_blocking=True)


def use_another_card(optimizer):
    torch.ones(1, device="cuda:1")


def set_rate_by_number(optimizer, known=[0.0]):  # noqa: B006 (it is meant to be kept)
    rate = optimizer.param_groups[0]["lr"]
    known[0] = known[0] if torch.cuda.is_current_stream_capturing() else float(rate)
    rate.fill_(known[0])


def keep_inputs(monkeypatch):
    """Plant a fault: a graph's inputs stay what they were when it was recorded."""
    copy = torch.Tensor.copy_

    def stale(to, source, non_blocking=False):
        return to if to.is_cuda and non_blocking else copy(to, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", stale)


FORBIDDEN = {
    "read a number": lambda x, i: x.sum().item(),
    "make a tensor of numbers": lambda x, i: torch.tensor([1, 2], device="cuda"),
    "count": lambda x, i: x.nonzero(),
    "select by a mask": lambda x, i: x[x > 0],
    "copy to the CPU": lambda x, i: x.cpu(),
    "copy unpinned memory": lambda x, i: x.copy_(torch.rand(x.shape), non_blocking=True),
    "index by the CPU": lambda x, i: x[torch.tensor([1])],
    "wait": lambda x, i: torch.cuda.synchronize(),
    "use another card": lambda x, i: torch.ones(1, device="cuda:1"),
}
ALLOWED = {
    "draw": lambda x, i: torch.multinomial(x, 1),
    "draw integers": lambda x, i: torch.empty_like(i).random_(),
    "fill at indices": lambda x, i: x.index_fill(1, i, -1.0),
    "add at indices": lambda x, i: x.index_add(0, i, x),
    "copy pinned memory": lambda x, i: i.copy_(torch.arange(5).pin_memory(), non_blocking=True),
}
VARIANTS = [
    "",
    "--decoder gru --encoded_image_size 3 --device cuda:1",
    "--amp --deep_output --attention hard --position_encoding",
    "--scheduled_sampling linear --ss_min 0.3 --attention hard",
    "--scheduled_sampling inverse_sigmoid --ss_argmax --encoded_image_size 1",
    "--fine_tune_encoder --amp --encoder efficientnet_lite0 --mirror --batch_size 12",
]


class TestInside:
    __test__ = INSIDE

    @pytest.fixture(autouse=True)
    def no_curves(self, monkeypatch):
        monkeypatch.setattr(train, "draw_curves", lambda *_: None)

    @pytest.mark.parametrize("name", [*ALLOWED, *FORBIDDEN])
    def test_control(self, name):
        """The made-up card refuses what a card refuses, and lets pass what a card lets pass."""
        x, i = torch.ones(5, 7, device="cuda"), torch.arange(5, device="cuda")
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

        def work():
            x.mul_(2)
            (FORBIDDEN | ALLOWED)[name](x, i)

        def capture():
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                work()

        with torch.cuda.stream(stream):
            work()
        torch.cuda.synchronize()
        if name in FORBIDDEN:
            with pytest.raises(Exception, match="captur"):
                capture()
        else:
            capture()
            before = x.clone()
            graph.replay()
            assert torch.equal(x, 2 * before)

    @pytest.mark.parametrize("flags", VARIANTS)
    def test_rules(self, flags, training_data, tmp_path):
        """Every variant trains, in graphs, by the rules of capture."""
        replays, flags = fake_cuda.counter("replays"), ["--device", "cuda", *flags.split()]
        history = run(training_data, tmp_path, *flags)
        assert all(math.isfinite(record["nll"]) for record in history)
        assert fake_cuda.counter("replays") > replays

    def test_rules_of_self_critical_training(self, training_data, best_checkpoint, tmp_path):
        flags = ["--init_from", best_checkpoint, "--scst", "--learning_rate", 1e-4]
        assert len(run(training_data, tmp_path, *flags, "--device", "cuda")) == 2

    def test_rules_for_features_in_main_memory(self, training_data, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 1000))
        run(training_data, tmp_path, "--attention", "mean", "--device", "cuda")

    @pytest.mark.parametrize(
        "plant, sign",
        [
            (in_each_update(synchronize), "captur"),
            (in_each_update(use_the_cpu), "captur"),
            (in_each_update(use_another_card), "captur"),
            (in_each_update(set_rate_by_number), "approx"),
            (keep_inputs, "approx"),
        ],
        ids=["host sync", "tensor of the CPU", "another card", "rate by number", "stale input"],
    )
    def test_faults(self, plant, sign, usual_losses, shapes_data, tmp_path, monkeypatch):
        """The tests of this file notice faults in an update."""
        plant(monkeypatch)
        with pytest.raises((RuntimeError, AssertionError), match=sign):
            assert losses("cuda", shapes_data, tmp_path) == pytest.approx(usual_losses, rel=2e-3)

    @pytest.mark.parametrize(
        "flags, tolerance",
        [
            ("", 2e-3),
            ("--encoded_image_size 3 --position_encoding", 2e-3),
            ("--decoder gru --deep_output --amp", 2e-2),
            ("--fine_tune_encoder --mirror --batch_size 12", 2e-3),
        ],
    )
    def test_numbers(self, flags, tolerance, shapes_data, tmp_path):
        """Training in graphs gives a CPU's losses."""
        on_cpu = losses("cpu", shapes_data, tmp_path, *flags.split())
        on_card = losses("cuda", shapes_data, tmp_path, *flags.split())
        assert on_card == pytest.approx(on_cpu, rel=tolerance)

    def test_few_graphs(self, picture, tmp_path):
        """They serve most updates, where pictures have different numbers of captions too."""
        records = [
            datasets.Record(
                f"{split}{i}.png",
                split,
                [f"a dog runs{' far' * k}" for k in range(1 + i % 5)],
                lambda size, i=i: picture(i, size, size),
            )
            for split, count in (("train", 60), ("val", 2), ("test", 2))
            for i in range(count)
        ]
        options = {"min_word_freq": 1, "image_size": 64, "seed": 1}
        datasets.write_dataset(tmp_path, records, dataset="own", source="drawn", **options)
        replays, graphs = fake_cuda.counter("replays"), fake_cuda.counter("graphs")
        data = tmp_path, datasets.base_name("own", 5, 1)
        flags = ["--batch_size", 2, "--epochs", 4, "--device", "cuda"]
        updates = run(data, tmp_path / "run", *flags)[-1]["update"]
        assert fake_cuda.counter("graphs") - graphs <= 12
        assert fake_cuda.counter("replays") - replays > 0.7 * updates
