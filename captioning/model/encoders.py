"""CNNs and transformers that see the image: torchvision's, EfficientNet-Lite, timm's."""

import contextlib
import hashlib
import inspect
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from captioning.model.grid import compute_dtype
from captioning.run.messages import UserError, note
from captioning.run.paths import features_path


class Backbone(NamedTuple):
    """A classifier, and what an encoder takes of it."""

    # the whole network, as files of weights describe it; where there are none, Sequential(*blocks)
    classifier: nn.Module
    blocks: list  # its layers from the image to the grid
    frozen_blocks: int  # edges and colours, which serve any photograph: fine-tuning leaves them
    mean: tuple = (0.485, 0.456, 0.406)  # of the colour channels in [0, 1], as in its own training
    std: tuple = (0.229, 0.224, 0.225)
    # of a network of one's own: returns the state dict that --encoder_weights imagenet means
    pretrained: Callable | None = None


def resnet(name):
    """A ResNet without average pooling and classifier; stem and first stage stay frozen."""
    model = torchvision.models.get_model(name, weights=None)
    return Backbone(model, list(model.children())[:-2], frozen_blocks=5)


def vgg(name):
    """A VGG before its last max-pool (paper: section 4.3); its first block stays frozen."""
    model = torchvision.models.get_model(name, weights=None)
    is_pool = [isinstance(layer, nn.MaxPool2d) for layer in model.features]
    return Backbone(model, list(model.features)[:-1], frozen_blocks=is_pool.index(True) + 1)


class TimmGrid(nn.Module):
    """The last grid of a network of timm: float (B, 3, height, width) to (B, channels, n, n).

    Images are scaled to the size of the network if it takes no other, as most transformers.
    """

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name, self.size = model, name, None
        if model.pretrained_cfg["fixed_input_size"]:
            self.size = model.pretrained_cfg["input_size"][1:]

    def forward(self, images):
        """:raises UserError: if the network gives no grid for images of this size"""
        if self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        grid, channels_last = None, getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        with contextlib.suppress(AssertionError):  # with which timm refuses an image's size
            grid = self.model.forward_features(images)
        if torch.is_tensor(grid) and grid.dim() == 3:  # tokens, (B, n * n, channels)
            grid = grid[:, getattr(self.model, "num_prefix_tokens", 0) :]
            side, channels_last = math.isqrt(grid.shape[1]), True
            grid = grid.unflatten(1, (side, side)) if side**2 == grid.shape[1] else None
        if not torch.is_tensor(grid):
            size = " x ".join(map(str, images.shape[2:]))
            raise UserError(f"timm's {self.name} gives no grid for {size} pixels; take another one")
        return grid.permute(0, 3, 1, 2) if channels_last else grid


def timm_network(name, pretrained=False):
    """Any CNN or vision transformer of timm, with timm's own mean and deviation; all of it learns.

    :raises UserError: if timm does not know it
    """
    import timm  # takes more than a second, and only these networks need it

    name = name.removeprefix("timm/")
    try:  # other names would be looked for in the internet
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise UserError(f"timm has no network {name!r}, see timm.list_models(): {error}") from error
    model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    model.head = nn.Identity()  # its layers stand behind the grid
    return Backbone(model, [TimmGrid(model, name)], 0, config.mean, config.std)


def efficientnet_lite(name):
    """An EfficientNet-Lite of timm; stem and three of seven stages stay frozen."""
    network = timm_network(f"tf_{name}")
    model = network.classifier  # layer by layer, as its checkpoints have always named them
    blocks = [model.conv_stem, model.bn1, *model.blocks, model.conv_head, model.bn2]
    return network._replace(blocks=blocks, frozen_blocks=5)


EFFICIENTNETS = ("efficientnet_lite0", "efficientnet_lite2")

# To add an encoder, add an entry: a function that takes the name and returns a ``Backbone``.
ENCODERS = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), resnet),
    **dict.fromkeys([f"vgg{n}{bn}" for bn in ("", "_bn") for n in (11, 13, 16, 19)], vgg),
    **dict.fromkeys(EFFICIENTNETS, efficientnet_lite),
    "timm/NAME": timm_network,  # of any name after the stroke
}


def feature_store(captioner, dataset, folder):
    """Path of the features of a split; it tells encoder, weights, images and arithmetic apart."""
    digest, dtype = encoder_digest(captioner.encoder), compute_dtype(captioner.device)
    size = "" if captioner.image_size == dataset.image_size else f" {captioner.image_size}"
    key = f"{digest} {dataset.images_digest} {dtype}{size}"
    key = hashlib.sha256(key.encode()).hexdigest()[:12]
    return features_path(folder, dataset.name, dataset.split, key)


def tell_sizes(captioners, data):
    """Note that pictures of another size than a model's are resized for it."""
    for size in sorted({captioner.image_size for captioner in captioners} - {data.image_size}):
        note(f"the data's pictures of {data.image_size} pixels are resized to {size}")


def resized(images, size):
    """A data set's pictures as a model knows them: uint8 (B, 3, S, S) to (B, 3, size, size).

    On the CPU, bicubic and antialiased, as ``resize_image`` made them for the data set.
    """
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True)


def encoder_digest(encoder):
    """SHA-256 of all that a feature depends on but the image, in hex.

    That is the architecture, its weights and scaling, and the code of layers that are not a
    library's: it may be edited between two runs.
    """
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr(encoder.cnn))  # without addresses in memory
    digest = hashlib.sha256(f"{encoder.name} {layers}".encode())
    kinds = {type(layer) for layer in encoder.cnn.modules()}
    for kind in sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__)):
        if kind.__module__.partition(".")[0] not in ("torch", "torchvision", "timm"):
            with contextlib.suppress(OSError, TypeError):  # what was typed may have no file
                digest.update(inspect.getsource(kind).encode())
    for name, tensor in [*encoder.state_dict().items(), *encoder.named_buffers()]:
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def calibrate(encoder, batches):
    """Set BatchNorm's statistics of an encoder with random weights from a few batches of images.

    Without it they are those of no image at all, and features of a deep CNN all but vanish.

    :param encoder: ``Encoder``
    :param batches: iterable of uint8 (B, 3, S, S) on the encoder's device
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = {norm: norm.momentum for norm in encoder.modules() if isinstance(norm, kind)}
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean over the batches
    for images in batches:
        encoder(images)
    encoder.eval()
    for norm, momentum in norms.items():
        norm.momentum = momentum
