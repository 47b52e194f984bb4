"""Checkpoints of the PyTorch captioning tutorial, read without running the pickle."""

import math
import pickle
import re
import types
import warnings

import torch

from captioning.model.encoders import ENCODERS
from captioning.run.messages import UserError


def tutorial_checkpoint(path, word_map):
    """A checkpoint of whole modules of the PyTorch captioning tutorial, in the form of our own.

    :raises UserError: if there is no word map, or another one than the model's, or if the model is
        not the tutorial's
    """
    inert = types.ModuleType("inert")  # what torch.load asks of a module that reads pickles
    inert.Unpickler, inert.load = InertUnpickler, lambda file, **_: InertUnpickler(file).load()
    options = {"map_location": "cpu", "pickle_module": inert, "weights_only": False}
    with warnings.catch_warnings(action="ignore"):  # that the source of its classes is another one
        pickled = torch.load(path, **options)
    # fails, and is reported by load_tensors, where these are no whole modules
    encoder, decoder = (_flatten_modules(pickled[key]) for key in ("encoder", "decoder"))
    if word_map is None:
        raise UserError(
            f"{path} is a checkpoint of the PyTorch captioning tutorial, which keeps no word map: "
            "name the one it was trained with, with --word_map; caption.py, eval.py and train.py "
            "--init_from take it then"
        )
    layers = unwrapped(pickled["encoder"]).state["_modules"]
    size = layers["adaptive_pool"].state["output_size"]
    rows, columns = size if isinstance(size, tuple) else (size, size)
    encoder = {key.replace("resnet.", "cnn.", 1): tensor for key, tensor in encoder.items()}
    for key in [key for key in encoder if key.endswith("running_var")]:
        # torch before 0.4.1 counted no batches
        encoder.setdefault(key.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    # a ResNet's number counts the convolutions of its blocks, the first one and the classifier
    convolution = r"cnn\.[4-7]\.\d+\.conv\d\.weight"
    name = f"resnet{sum(bool(re.fullmatch(convolution, key)) for key in encoder) + 2}"
    try:
        vocab_size, embed_dim = decoder["embedding.weight"].shape
        decoder_dim, encoder_dim = decoder["init_h.weight"].shape
        _, attention_dim = decoder["attention.full_att.weight"].shape
        if rows != columns or name not in ENCODERS:
            raise ValueError(size, name)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path} holds another model than the tutorial's: expected a ResNet of torchvision, "
            "pooled to a square grid, and the decoder with soft attention"
        ) from error
    if vocab_size != len(word_map):
        raise UserError(
            f"--word_map has {len(word_map)} words, but {path} was trained with {vocab_size}; name "
            "the word map it was trained with"
        )
    config = {
        "encoder": name, "encoder_dim": encoder_dim, "attention_dim": attention_dim,
        "embed_dim": embed_dim, "decoder_dim": decoder_dim, "decoder": "lstm", "attention": "soft",
        "encoded_image_size": rows, "deep_output": False, "position_encoding": False,
        "dropout": 0.5, "embed_dropout": 0.0, "feature_dropout": 0.0, "image_size": 256,
        "data_name": "", "fine_tune_encoder": True,  # or not: then eval.py would keep its features
    }  # fmt: skip
    parts = {"encoder": encoder, "decoder": decoder}
    return {"config": config, "word_map": word_map, **parts, "history": []}


def _flatten_modules(module, prefix=""):
    """An unpickled module's tensors by their dotted names, as in a state dict."""
    module = unwrapped(module)
    tensors = {**module.state["_parameters"], **module.state["_buffers"]}
    flat = {prefix + key: tensor for key, tensor in tensors.items() if torch.is_tensor(tensor)}
    for name, child in module.state["_modules"].items():
        flat |= _flatten_modules(child, f"{prefix}{name}.")
    return flat


class StandIn(dict):
    """What is unpickled in place of any object and any call's result: nothing is run."""

    state, dump_patches = None, False  # torch.load asks classes for the second
    __eq__, __hash__ = object.__eq__, object.__hash__  # it may be a key or a set's member

    def __init__(self, *args, **options):  # dict's would read them
        pass

    def __setstate__(self, state):
        self.state = state


def _rebuild_tensor(storage, offset, size, stride, *_):
    """A tensor of a storage that holds as much as its shape says."""
    if len(size) != len(stride) or offset + math.prod(size) > storage.size():
        raise ValueError(f"{storage.size()} values are too few for the shape {size}")
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


class InertUnpickler(pickle._Unpickler):
    """Reads a pickle of ``torch.save``, which can call nothing but what puts a tensor together.

    The one written in Python, as C's allocates whatever a damaged file asks for.
    """

    KNOWN = {
        "torch._utils._rebuild_tensor": _rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    }

    def find_class(self, module, name):
        """What stands for a name in the pickle; ``pickle`` asks for each."""
        return self.KNOWN.get(f"{module}.{name}") or type("StandIn", (StandIn,), {})


def unwrapped(module):
    """An unpickled module, or what it holds if it is a ``DataParallel``."""
    children = module.state["_modules"]
    return children["module"] if set(children) == {"module"} else module
