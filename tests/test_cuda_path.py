"""The CUDA path without a card: trainings, searches and scripts on a made-up one (fake_cuda.py).

What a card would refuse fails here, and the numbers are those of the CPU's kernels. A card's own
numbers, races between streams, what NCCL exchanges, and speed are only seen on a card.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest
import torch
from conftest import TINY_TRAINING, make_picture
from test_train import no_curves, run  # noqa: F401 (a fixture of all tests here)

import datasets
from captioning.run import paths

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("gcc") or not torch.version.cuda,
    reason="needs Linux, gcc and a CUDA build of torch",
)
slow = pytest.mark.slow


@pytest.fixture(scope="session")
def made_up(tmp_path_factory):
    """Environment variables of a process that finds two made-up cards."""
    variables = dict(os.environ) | fake_cuda.build(tmp_path_factory.mktemp("made_up"))
    return {k: v for k, v in variables.items() if k not in ("CC", "TORCH_DISABLE_NATIVE_JIT")}


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """(folder, name) of a data set: each picture has one to five captions of two to seven words."""
    nouns, picture = ["dog", "cat", "bird", "horse"], lambda i: lambda n: make_picture(i, n, n)
    captions = lambda i: [f"{nouns[i % 4]} runs{' far' * (i // 4)}"] * (1 + i % 5)
    records = [
        datasets.Record(f"{split}{i}.png", split, captions(i), picture(i))
        for split, count in (("train", 24), ("val", 2), ("test", 2))
        for i in range(count)
    ]
    folder, options = tmp_path_factory.mktemp("toy"), {"min_word_freq": 1, "image_size": 64}
    datasets.write_dataset(folder, records, dataset="toy", source="drawn", **options)
    return folder, datasets.base_name("toy", 5, 1)


def python(environment, *command, code=0):
    """Run Python in the suite's folder, where nothing may be refused; return its output."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "check": False}
    command, folder = [sys.executable, "-B", *map(str, command)], Path(__file__).parents[1]
    done = subprocess.run(command, cwd=folder, env=environment, timeout=1800, **options)
    assert done.returncode == code and "made-up card: " not in done.stdout, done.stdout[-6000:]
    return done.stdout


def training(data, output_folder, *flags):
    files = ["--data_folder", data[0], "--data_name", data[1], "--output_folder", output_folder]
    return ["train.py", *TINY_TRAINING, *files, *flags]


@pytest.mark.parametrize("marks", ["not (slow or gpu)", pytest.param("slow or gpu", marks=slow)])
def test_on_the_made_up_card(marks, made_up):
    """The tests below, in one process; the slow ones and those for a card, in another."""
    flags = ["-q", "--tb=short", "--show-capture=stderr", "-p", "no:cacheprovider", "-m", marks]
    inside = {"FAKE_CUDA_INSIDE": "1", "TORCH_DISABLE_NATIVE_JIT": "1"}
    python(made_up | inside, "-m", "pytest", *flags, f"{__file__}::TestInside", "tests/test_gpu.py")


def test_scripts_need_no_compiler_and_open_one_card(toy, made_up, tmp_path):
    """The other card is another process's."""
    environment = made_up | {"PATH": str(tmp_path), "FAKE_CUDA_EXCLUSIVE": str(tmp_path)}
    (tmp_path / "card0").mkdir()  # which no process can open and lock
    device, model = ["--device", "cuda:1"], paths.checkpoint_path(tmp_path, toy[1], best=True)
    search = [*device, "--model", model, "--beam_size", 2, "--max_decode_steps", 5]
    python(environment, *training(toy, tmp_path, "--encoded_image_size", 1, *device))
    assert "BLEU-4" in python(environment, "eval.py", *search, "--data_folder", toy[0])
    python(environment, "caption.py", *search, "--no_plot", "--img", "docs/shapes_attention.png")


def test_each_process_opens_its_own_card(toy, made_up, tmp_path):
    """As it must in exclusive-process mode."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--attention", "hard", "--amp", "--batch_size", 23, "--epochs", 1, "--device", "cuda"]
    exclusive = made_up | {"FAKE_CUDA_EXCLUSIVE": str(tmp_path)}
    python(exclusive, *torchrun, *training(toy, tmp_path, *flags))
    assert (tmp_path / "card0").exists() and (tmp_path / "card1").exists()


@slow
@pytest.mark.parametrize("moment", ["capture", "graph"])
def test_out_of_memory_ends_in_one_line(moment, toy, made_up, tmp_path):
    command = training(toy, tmp_path, "--device", "cuda")
    output = python(made_up | {"FAKE_CUDA_FULL": moment}, *command, code=2)
    assert output.splitlines()[-1].startswith("train.py: error: out of memory: ")
    assert "Traceback" not in output


@slow
@pytest.mark.parametrize("sections", ["decoder", "training beam encoders caption"])
def test_the_benchmark_runs_to_its_end(sections, made_up):
    """Its figures mean nothing here."""
    largest = "1e8" if sections == "decoder" else "1e4"  # it checks numbers before it times
    flags = ["--device", "cuda", "--images", 2, "--sections", *sections.split()]
    python(made_up | {"FAKE_CUDA_LARGEST": largest}, "tests/benchmark.py", *flags)


def learn(data, folder, *flags):
    """Train; return the records of the epochs. Nothing may be refused."""
    refusals = fake_cuda.counter("refusals")
    history = run(data, folder, "--max_decode_steps", 4, *flags)["history"]
    assert fake_cuda.counter("refusals") == refusals
    return history


def losses(data, folder, device, *flags):
    """Each epoch's loss of a training without dropout."""
    flags = ["--dropout", 0, "--embed_dropout", 0, "--feature_dropout", 0, "--epochs", 3, *flags]
    return [record["nll"] for record in learn(data, folder / device, *flags, "--device", device)]


@pytest.fixture(scope="session")
def usual_losses(toy, tmp_path_factory):
    return losses(toy, tmp_path_factory.mktemp("usual"), "cpu")


def set_rate_by_number(optimizer):
    """Set the learning rate to a Python number, which a replay does not change."""
    rate = optimizer.param_groups[0]["lr"]
    if not torch.cuda.is_current_stream_capturing():
        optimizer.number = float(rate)
    rate.fill_(optimizer.number)


def in_each_update(action):
    """An optimizer's step that begins with a fault: an action on the optimizer."""
    step = torch.optim.AdamW.step
    return torch.optim.AdamW, "step", lambda self: (action(self), step(self))


def stale(to, source, non_blocking=False, copy=torch.Tensor.copy_):
    """``Tensor.copy_`` that leaves a graph's inputs what they were when it was recorded."""
    return to if to.is_cuda and non_blocking else copy(to, source, non_blocking)


FAULTS = {  # what is patched, and how the fault shows
    "host sync": (in_each_update(lambda _: torch.cuda.current_stream().synchronize()), "captur"),
    "CPU's tensor": (in_each_update(lambda _: torch.zeros(9).cuda(non_blocking=True)), "captur"),
    "another card": (in_each_update(lambda _: torch.ones(1, device="cuda:1")), "captur"),
    "rate by number": (in_each_update(set_rate_by_number), "approx"),
    "stale input": ((torch.Tensor, "copy_", stale), "approx"),
}
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
    "--decoder gru --attention adaptive --encoded_image_size 3 --device cuda:1 --grounding 0.2",
    "--amp --attention hard --position_encoding",
    "--scheduled_sampling linear --ss_min 0.3 --attention hard --grounding 0.2",
    "--scheduled_sampling inverse_sigmoid --ss_argmax --encoded_image_size 1",
    "--fine_tune_encoder --amp --mirror --deep_output --alpha_c 1",
    "--attention mean",
    pytest.param("--fine_tune_encoder --amp --encoder efficientnet_lite0", marks=slow),
]
AS_ON_A_CPU = [
    "--grounding 0.2 --alpha_c 0 --deep_output --attend_word",
    "--decoder gru --encoded_image_size 3 --position_encoding --alpha_c 1",
    "--amp --learning_rate 2e-3",  # a high one spreads rounding
    "--fine_tune_encoder --mirror --batch_size 12",
]


@pytest.mark.skipif("FAKE_CUDA_INSIDE" not in os.environ, reason="test_on_the_made_up_card runs it")
class TestInside:
    @pytest.mark.parametrize("name", [*ALLOWED, *FORBIDDEN])
    def test_control(self, name):
        """The made-up card refuses what a card refuses, and lets pass what a card lets pass."""
        x, i = torch.ones(5, 7, device="cuda"), torch.arange(5, device="cuda")
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

        def work():
            x.mul_(2)
            (FORBIDDEN | ALLOWED)[name](x, i)

        with torch.cuda.stream(stream):
            work()
        torch.cuda.synchronize()
        refused = pytest.raises(Exception, match="captur")
        captured = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        with refused if name in FORBIDDEN else contextlib.nullcontext(), captured:
            work()
        if name in ALLOWED:
            before = x.clone()
            graph.replay()
            assert torch.equal(x, 2 * before)
        else:  # in torch 2.11 the generator would stay in the capture that failed
            torch.cuda.default_generators[0].graphsafe_set_state(torch.Generator("cuda"))

    @pytest.mark.parametrize("flags", VARIANTS)
    def test_rules(self, flags, toy, tmp_path, monkeypatch):
        """Every variant trains, in graphs, by the rules of capture."""
        if "mean" in flags:  # with features in main memory
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 1000))
        replays = fake_cuda.counter("replays")
        (record,) = learn(toy, tmp_path, "--epochs", 1, "--device", "cuda", *flags.split())
        assert record["nll"] < 10 and fake_cuda.counter("replays") > replays

    def test_rules_of_self_critical_training(self, toy, tmp_path):
        flags = ["--device", "cuda", "--learning_rate", 1e-4]
        learn(toy, tmp_path, *flags)
        flags += ["--init_from", paths.checkpoint_path(tmp_path, toy[1]), "--epochs", 1]
        learn(toy, tmp_path / "scst", "--scst", *flags)

    @pytest.mark.parametrize("fault", FAULTS)
    def test_faults(self, fault, usual_losses, toy, tmp_path, monkeypatch):
        """The tests of this file notice faults in an update."""
        patched, sign = FAULTS[fault]
        monkeypatch.setattr(*patched)
        with pytest.raises((RuntimeError, AssertionError), match=sign):
            assert losses(toy, tmp_path, "cuda") == pytest.approx(usual_losses, rel=2e-3)

    @slow
    @pytest.mark.parametrize("flags", AS_ON_A_CPU)
    def test_numbers(self, flags, toy, tmp_path):
        """Training in graphs gives a CPU's losses."""
        cpu, card = (losses(toy, tmp_path, device, *flags.split()) for device in ("cpu", "cuda"))
        assert card == pytest.approx(cpu, rel=2e-2 if "--amp" in flags else 2e-3)

    @slow
    def test_few_graphs(self, toy, tmp_path):
        """They serve most updates, where pictures have different numbers of captions too."""
        replays, graphs = fake_cuda.counter("replays"), fake_cuda.counter("graphs")
        learn(toy, tmp_path, "--batch_size", 2, "--device", "cuda")
        assert fake_cuda.counter("graphs") - graphs == 2  # of 16 captions, of 4 and of 8 steps
        assert fake_cuda.counter("replays") - replays == 22  # of 24 updates
