"""Tests of ``captioning/run/machine.py``."""

import os
import sys

import pytest
import torch

import utils
from captioning.run import machine


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_here_is_refused(name, fails):
    with fails("--device"):
        machine.pick_device(name)


@pytest.fixture
def cards(monkeypatch):
    """Three made-up GPUs; the list of what is done with them, in order."""
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(f"current {device}"))
    monkeypatch.setattr(torch, "empty", lambda *_, device: done.append(f"used {device}"))
    return done


@pytest.mark.parametrize(
    "name, expected",
    [
        ("cuda", ["current 0", "used cuda"]),
        ("auto", ["current 0", "used cuda"]),
        ("cuda:2", ["current 2", "used cuda:2"]),
    ],
)
def test_a_card_is_made_the_current_one_before_it_is_used(name, expected, cards, fails):
    assert machine.pick_device(name).type == "cuda"
    assert cards == expected
    with fails("--device cuda:3: torch finds 3 GPUs here"):
        machine.pick_device("cuda:3")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_each_process_opens_its_own_card_alone(name, cards, monkeypatch, fails):
    from torch import distributed

    monkeypatch.setattr(distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(distributed, "rendezvous", lambda _: iter([(None, 1, 2)]))
    monkeypatch.setattr(distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with machine.processes(name) as device:
        assert device == torch.device("cuda:1")
    assert not sys.stdout.closed and cards == ["current 1", "used cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    with fails("torch finds 3 GPUs here"), machine.processes(name):
        pytest.fail("there is no such card")


def test_autocast_is_off_unless_asked_for():
    weights = torch.ones(2, 2)
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with machine.autocast(torch.device("cpu"), enabled):
            assert (weights @ weights).dtype == dtype


def test_devices():
    assert machine.pick_device("cpu").type == "cpu"
    assert machine.pick_device("auto").type in ("cpu", "cuda", "mps")
    assert torch.__version__ in machine.describe_machine(torch.device("cpu"))


@pytest.mark.parametrize(
    "busy, settings, policy",
    [
        (0.1, {}, None),
        (1.9, {}, "PASSIVE"),
        (1.9, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),  # the user's own settings win
        (1.9, {"GOMP_SPINCOUNT": "1000"}, None),
    ],
)
def test_where_others_use_the_cores_openmp_waits_passively(busy, settings, policy, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TORCH_DISABLE_NATIVE_JIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "busy_cores", lambda: busy)
    utils.prepare_process()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    assert os.environ["TORCH_DISABLE_NATIVE_JIT"] == "1"
    said = machine.describe_machine(torch.device("cpu"))
    assert ("OMP_WAIT_POLICY" in said) == (policy is not None) and str(policy or "") in said


def test_busy_cores_are_those_of_others(monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: [100.0, 50.0, 25.0, 0.0])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2}, raising=False)
    assert machine.busy_cores() == 0.75
    monkeypatch.setattr(psutil, "cpu_percent", lambda **_: os.listdir("/proc/is/not"))
    assert machine.busy_cores() == 0
    assert len(machine.own_cores()) == 2
