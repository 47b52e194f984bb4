"""Tests of ``captioning/model/encoders.py``."""

import copy
import importlib
import itertools
import math
import types

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from conftest import make_picture
from helpers import without

import datasets
import models
from captioning.model import encoders


@pytest.mark.parametrize("name", models.ENCODERS)
def test_every_encoder_gives_its_last_grid(name):
    name = {"timm/NAME": "timm/test_convnext"}.get(name, name)
    with torch.device("meta"):  # shapes only: no weights are drawn
        encoder = models.Encoder(name, "none")
        out = encoder(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    # VGG's last max-pool is left out, so it halves the picture four times, the others five
    sides = {encoders.vgg: 4, encoders.resnet: 2, encoders.efficientnet_lite: 2}
    assert math.isqrt(out.shape[1]) == sides.get(models.ENCODERS.get(name), math.sqrt(out.shape[1]))
    widths = {"resnet18": 512, "resnet34": 512, encoders.resnet: 2048, encoders.vgg: 512}
    widths[encoders.efficientnet_lite] = 1280
    width = widths.get(name) or widths.get(models.ENCODERS.get(name), encoder.encoder_dim)
    assert out.shape[0] == 2 and out.shape[2] == encoder.encoder_dim == width


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
    models.calibrate(encoder, [images[:4], images[4:]])
    with torch.no_grad():
        features = encoder(images).mean(dim=1)  # (8, encoder_dim)
    assert features.std(0).mean() > 0.2 and features.abs().mean() > 0.2
    assert not any(module.training for module in encoder.modules())
    norm = next(m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d))
    scaled = (images.float() - encoder.mean) / encoder.std
    seen = [encoder.cnn[0](half) for half in (scaled[:4], scaled[4:])]
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)  # over all batches alike
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-3, atol=1e-4)


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
            for name in encoders.EFFICIENTNETS
        ),
    ],
)
def test_fine_tuning_frees_all_but_the_first_blocks(name, first_blocks):
    with torch.device("meta"):
        encoder = models.Encoder(name, "none")
        whole = (
            timm.create_model(f"tf_{name}")
            if name in encoders.EFFICIENTNETS
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
    assert encoders.encoder_digest(other) != encoders.encoder_digest(resnet18)
    other.load_state_dict(resnet18.state_dict())
    assert encoders.encoder_digest(other) == encoders.encoder_digest(resnet18)
    with torch.no_grad():
        other.cnn[1].running_var[3] += 1e-3  # a buffer counts too
    assert encoders.encoder_digest(other) != encoders.encoder_digest(resnet18)


def test_digest_tells_what_is_done_with_the_weights_apart(tmp_path, monkeypatch):
    """Else features of code that was edited would be taken from the store."""
    backbone = models.ENCODERS["resnet18"]("resnet18")
    code = "class Own(torch.nn.Sequential):\n    def forward(self, x):\n        return {}\n"
    classes = []
    for i, result in enumerate(["super().forward(x)", "super().forward(x).abs()"]):
        (tmp_path / f"own{i}.py").write_text("import torch\n\n\n" + code.format(result))
        monkeypatch.syspath_prepend(tmp_path)
        classes.append(importlib.import_module(f"own{i}").Own)
    made = [
        backbone._replace(std=(0.5, 0.5, 0.5)),
        backbone._replace(blocks=[*backbone.blocks, torch.nn.MaxPool2d(2)]),
        backbone._replace(blocks=[*backbone.blocks, torch.nn.MaxPool2d(2, ceil_mode=True)]),
        *(
            backbone._replace(blocks=[*backbone.blocks[:-1], kind(backbone.blocks[-1])])
            for kind in classes
        ),
    ]
    found = set()
    for one in (backbone, *made, backbone):
        monkeypatch.setitem(models.ENCODERS, "own", lambda name, one=one: one)
        found.add(encoders.encoder_digest(models.Encoder("own", "none")))
    assert len(found) == 1 + len(made)


def test_unknown_encoder_is_refused(fails):
    with fails("alexnet.*resnet101"):
        models.Encoder("alexnet", "none")


def test_a_store_is_of_these_pictures_in_this_size_and_arithmetic(resnet18):
    one = types.SimpleNamespace(encoder=resnet18, image_size=64, device=torch.device("cpu"))
    data = {"images_digest": "a", "image_size": 64, "name": "n", "split": "val"}
    changes = {}, {"images_digest": "b"}, {"image_size": 32}, {"split": "test"}
    of = lambda change: encoders.feature_store(one, types.SimpleNamespace(**data | change), "")
    found = set(map(of, changes))
    with torch.autocast("cpu", torch.bfloat16):
        found.add(of({}))
    assert len(found) == 5
