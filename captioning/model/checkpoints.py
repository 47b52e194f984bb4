"""Checkpoints: what they hold, what is checked before they are used, means and exports of them."""

import functools
from pathlib import Path

import torch

from captioning.data.words import is_word_map
from captioning.model.tensor_files import load_tensors, save_checkpoint
from captioning.model.tutorial import tutorial_checkpoint
from captioning.model.vocabulary import with_words
from captioning.run.messages import UserError, did_you_mean, note
from captioning.run.paths import DEFAULT_CAPTIONER, checkpoint_path

# What of a configuration makes the model's architecture; a checkpoint and a flag must agree on it.
ARCHITECTURE = (
    "encoder", "decoder", "attention", "encoded_image_size", "attention_dim", "embed_dim",
    "decoder_dim", "deep_output", "position_encoding", "attend_word", "decoder_options",
)  # fmt: skip

DROPOUTS = ("dropout", "embed_dropout", "feature_dropout")
CHECKPOINT_KEYS = dict.fromkeys(("config", "word_map", "encoder", "decoder"), dict)
CHECKPOINT_KEYS |= {"history": list}


def run_checkpoint(path, name=None):
    """The checkpoint that a path names: itself, or the best one of a run's folder.

    :param path: None, or ``captioner`` where there is no such file: the one that comes along
    :param name: the data's name, which tells several runs in one folder apart
    :raises UserError: if a folder holds none, or several that nothing tells apart
    """
    if path is None:
        note(f"without --model: taking {DEFAULT_CAPTIONER}, which comes with the suite")
        return DEFAULT_CAPTIONER
    path = Path(path)
    if path == Path("captioner") and not path.exists():
        return DEFAULT_CAPTIONER
    if not path.exists():
        raise UserError(f"there is no file {path}{did_you_mean(str(path), ['captioner'])}")
    if not path.is_dir():
        return path
    if name and checkpoint_path(path, name, best=True).exists():
        return checkpoint_path(path, name, best=True)
    found = sorted(path.glob("BEST_checkpoint_*.pth.tar")) or sorted(path.glob("*.pth.tar"))
    if len(found) != 1:
        what = "no BEST_checkpoint_*.pth.tar" if not found else ", ".join(p.name for p in found)
        raise UserError(f"the folder {path} holds {what}; expected one run: name its checkpoint")
    return found[0]


def export_captioner(captioner, path):
    """Write a captioner to caption with, at half its size and without what only training needs.

    Matrices and kernels become float16; loading makes them float32 again. Paths of the machine that
    it was trained on are left out.
    """
    checkpoint = {key: getattr(captioner, key) for key in CHECKPOINT_KEYS}
    own = ("data_folder", "output_folder", "init_from", "resume", "embeddings", "encoder_weights")
    checkpoint["config"] = {k: v for k, v in captioner.config.items() if k not in own}
    for part in ("encoder", "decoder"):
        state = checkpoint[part].state_dict()
        halve = lambda t: t.half() if t.dim() > 1 and t.is_floating_point() else t
        checkpoint[part] = {key: halve(tensor) for key, tensor in state.items()}
    save_checkpoint(path, checkpoint)


def read_checkpoint(path, build, word_map=None, strict=True):
    """Read and check a checkpoint of this suite or of the PyTorch captioning tutorial, on the CPU.

    :param build: function of a configuration and the number of words: encoder and decoder
    :param word_map: what should be its word map; the tutorial's checkpoints keep none and need it
    :param strict: refuse one that keeps another word map; else the word map is for those with none
    :return: dict with at least ``CHECKPOINT_KEYS``
    :raises UserError: if it is missing, damaged, something else, or of another word map
    """
    checkpoint = load_tensors(path, lambda path: tutorial_checkpoint(path, word_map))
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(key), kind) for key, kind in CHECKPOINT_KEYS.items()
    ):
        raise UserError(f"{path} is no checkpoint: expected a file written by train.py")
    for key, value in {"attend_word": False, "decoder_options": {}}.items():
        checkpoint["config"].setdefault(key, value)  # earlier revisions did not know it
    check_checkpoint(checkpoint, path, build)
    own = checkpoint["word_map"]
    if strict and word_map not in (None, own):
        raise UserError(
            f"--word_map has {len(word_map)} words and differs from the one that {path} was "
            f"trained with ({len(own)} words); leave the flag out: the checkpoint holds its own"
        )
    return checkpoint


def check_checkpoint(checkpoint, path, build):
    """Hold a checkpoint's parts against each other before anything of the size it claims is built.

    :raises UserError: if word map, configuration and weights do not fit each other, or weights are
        not finite
    """
    config, word_map = checkpoint["config"], checkpoint["word_map"]
    try:
        check_config(config, word_map)
        with torch.device("meta"):  # which has shapes, and no memory
            encoder, decoder = build(config, len(word_map))
        check_weights("encoder", encoder, checkpoint["encoder"])
        check_weights("decoder", decoder, checkpoint["decoder"])
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        missing = isinstance(error, KeyError)
        reason = f"{error} is missing" if missing else str(error).partition("\n")[0][:160]
        raise UserError(
            f"{path} is damaged, or of another version of the suite: {reason}; train it again, or "
            "take another checkpoint"
        ) from error


def check_config(config, word_map):
    """:raises ValueError: if the word map is none, or a value of the configuration out of range"""
    if not is_word_map(word_map):
        raise ValueError("its word map is none")
    bounds = {
        **dict.fromkeys(DROPOUTS, (float, 0, 1)),
        "image_size": (int, 1, 4096),
        "encoded_image_size": (int, 0, 64),
        "fine_tune_encoder": (bool, False, True),
        "data_name": (str, "", "\U0010ffff"),
    }
    options = config["decoder_options"]
    plain = isinstance(options, dict) and all(isinstance(key, str) for key in options)
    if not plain or not {type(value) for value in options.values()} <= {bool, int, float, str}:
        raise ValueError("its decoder_options are none")
    for key, (kind, low, high) in bounds.items():
        if type(config[key]) is not kind or not low <= config[key] <= high:
            raise ValueError(f"its configuration says {key}={config[key]!r}")


def check_weights(name, module, given):
    """:raises ValueError: if weights have other shapes than a module's, or are not all there"""
    kinds = lambda state: {key: (t.shape, t.is_floating_point()) for key, t in state.items()}
    tensors, fault = given.values(), None
    learned = {key for key, _ in module.named_parameters()}  # a buffer may mask by -inf
    if kinds(module.state_dict()) != kinds(given):
        fault = "do not fit its own configuration"
    elif any(t.layout != torch.strided or t.untyped_storage().nbytes() < t.nbytes for t in tensors):
        fault = "claim more than the file holds"
    elif not all((t.isfinite() if k in learned else ~t.isnan()).all() for k, t in given.items()):
        fault = "are not all finite, as after a training that diverged"
    if fault:
        raise ValueError(f"the weights of its {name} {fault}")


def average_weights(captioners, build):
    """One captioner with the mean weights of several (Wortsman et al. 2022, "Model soups").

    Weights can be averaged if the trainings started from one checkpoint, for example before and
    after self-critical training. Averaging models that do not share a starting point gives noise.

    :param captioners: list of ``Captioner``; the mean speaks the words of the first one, and the
        rows of words that another does not know are the first one's
    :param build: function of a configuration and the number of words: a decoder
    :return: the first ``Captioner``, whose tensors are overwritten
    :raises UserError: if they are not of one architecture
    """
    kinds = [[captioner.config[key] for key in ARCHITECTURE] for captioner in captioners]
    if any(kind != kinds[0] for kind in kinds):
        raise UserError("the models are not of one architecture: their weights have no mean")
    first = captioners[0]
    lost = set().union(*(captioner.word_map for captioner in captioners)) - set(first.word_map)
    if lost:
        words = f"{len(lost):,} words" if len(lost) > 3 else f"the words {', '.join(sorted(lost))}"
        note(f"the mean speaks the words of the first model, without {words} of the others")
    if len({captioner.image_size for captioner in captioners}) > 1:
        note(f"the mean sees pictures of {first.image_size} pixels, as the first model does")
    for part in ("encoder", "decoder"):
        states = [getattr(captioner, part).state_dict() for captioner in captioners]
        if part == "decoder":
            words = states[0], first.word_map, functools.partial(build, first.config)
            states = [with_words(s, c.word_map, *words) for c, s in zip(captioners, states)]
        for key, tensor in getattr(first, part).state_dict().items():
            if tensor.is_floating_point():  # summed in float64 on the CPU, which every machine has
                tensors = torch.stack([state[key].cpu() for state in states])
                tensor.copy_(tensors.double().mean(dim=0))
    return first
