"""What a training starts from: an interrupted run, another model's weights, or random ones."""

import argparse
import itertools
import os
import shutil
from pathlib import Path

import torch

from captioning.data.words import load_embeddings
from captioning.model.checkpoints import ARCHITECTURE, run_checkpoint
from captioning.model.encoders import calibrate
from captioning.model.schedules import best_epoch, of_this_data
from captioning.run.command_line import given_flags
from captioning.run.distributed import is_main
from captioning.run.files import atomic_path, check_disk
from captioning.run.machine import autocast
from captioning.run.messages import UserError, note
from captioning.run.paths import checkpoint_path

ORIGIN = ("encoder_weights", "init_from", "word_map", "embeddings")  # a run keeps what it had

MAY_CHANGE_ON_RESUME = (
    "data_folder", "output_folder", "resume", "device", "workers", "epochs", "patience",
    "checkpoint_every", "tensorboard", "beam_size", *ORIGIN,
)  # fmt: skip


def find_start(folder, name, resume, init_from, read, word_map=None):
    """The checkpoint to go on with or to start from.

    :param folder, name: the run's own folder, and its data's name
    :param resume: of ``--resume``: "auto", a checkpoint, a run's folder, or None
    :param init_from: of ``--init_from``, or None
    :param read: function of a path: its checkpoint
    :param word_map: of ``--word_map``, the words of ``init_from``, or None
    :return: (path, checkpoint, whether to go on with its run); (None, None, False) starts anew
    :raises UserError: if it cannot be used, or an earlier run would be overwritten
    """
    own = [checkpoint_path(folder, name, best) for best in (False, True)]
    found = [path for path in own if path.exists()]
    # torchrun --max_restarts repeats the command after a process has died
    if found and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        resume = "auto"
    if resume == "auto":
        if found:
            return *first_readable(found, read), True
        print(f"nothing to resume at {own[0].absolute()}: starting anew")
    elif resume:
        path = Path(resume)
        path = checkpoint_path(path, name) if path.is_dir() else path  # of a run: its latest
        if found and path.resolve().parent != Path(folder).resolve():
            raise UserError(
                f"--resume {resume}: {found[0]} holds another run; choose another --output_folder, "
                "or give --resume alone to go on with that one"
            )
        return path, read(path), True
    elif found:
        raise UserError(
            f"{found[0]} holds an earlier run: add --resume to go on with it, or choose another "
            "--output_folder"
        )
    if not init_from:
        return None, None, False
    path = run_checkpoint(init_from, name)
    return path, read(path, word_map), False


def first_readable(paths, read):
    """(path, checkpoint) of the first file, or, where it is damaged, of the next."""
    for path, other in itertools.pairwise(paths):
        try:
            return path, read(path)
        except UserError as error:
            print(f"{error}; going on from {other} instead")
    return paths[-1], read(paths[-1])


def as_built(args, parser, config, path, resuming=False):
    """The flags, with the architecture of a checkpoint, which says itself what it is.

    :param args, parser: the flags, and what declares them
    :param config, path: the checkpoint's configuration, and its name for messages
    :param resuming: its run is to go on, and only ``MAY_CHANGE_ON_RESUME`` may differ from it
    :raises UserError: if a flag contradicts the checkpoint, or if others have changed
    """
    flags, defaults, named = vars(args), vars(parser.parse_args([])), given_flags(parser)
    for key in ARCHITECTURE:  # a flag may agree or be left out
        given, built = flags[key], config[key]
        if key == "decoder_options":  # each a flag of its own
            wrong = {name: value for name, value in given.items() if built.get(name) != value}
        else:
            left_out = given == defaults[key] and key not in named
            wrong = {} if given == built or left_out else {key: given}
            built = {key: built}
        if wrong:
            wrong, built = as_flags(wrong), as_flags(built) or "none of these"
            advice = "take that, or leave it out"
            if key not in named and args.preset:
                advice = f"--preset {args.preset} asks for it: give {built} beside the preset"
            raise UserError(f"{wrong}: {path} was built with {built}; {advice}")
    flags = flags | {key: config[key] for key in ARCHITECTURE}
    flags |= {key: config.get(key, flags[key]) for key in ORIGIN if resuming}
    as_held = lambda value: str(value) if isinstance(value, Path) else value
    fixed = [key for key in defaults if resuming and key not in MAY_CHANGE_ON_RESUME]
    changed = [
        f"--{key} {flags[key]} (was {config.get(key)})"
        for key in fixed
        if as_held(flags[key]) != config.get(key, as_held(defaults[key]))
    ]
    if changed:
        raise UserError(
            f"--resume goes on with the run as it was, but these differ: {', '.join(changed)}; "
            "give the same flags, or start a new run from its weights with --init_from"
        )
    return argparse.Namespace(**flags)


def as_flags(values):
    """Names and values as they are typed: ``--layers 2, --no_deep_output``."""
    switch = lambda name, value: f"--{name}" if value else f"--no_{name}"
    typed = lambda n, value: switch(n, value) if isinstance(value, bool) else f"--{n} {value}"
    return ", ".join(typed(name, value) for name, value in values.items())


def check_sizes(train_data, val_data, checkpoint, resuming):
    """:raises UserError: if images of both splits, and of a run to resume, are not of one size"""
    sizes = {"the training images": train_data.image_size}
    sizes["the validation images"] = val_data.image_size
    size = checkpoint["config"]["image_size"] if checkpoint else train_data.image_size
    if resuming:
        sizes["the run to resume"] = size
    elif size != train_data.image_size:
        note(
            f"the model knows images of {size} pixels, these have {train_data.image_size}: "
            f"create_input_files.py --image_size {size} makes them alike"
        )
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} pixels in {what}" for what, size in sizes.items())
        raise UserError(
            f"expected images of one size, found {found}; prepare the data with one --image_size"
        )


def check_space(path, encoder, decoder):
    """:raises UserError: if the disk cannot hold two checkpoints and the temporary copy of one"""
    if is_main():
        parameters = (*encoder.parameters(), *decoder.parameters())
        # AdamW keeps two moments of what learns
        size = sum((1 + 2 * p.requires_grad) * p.nbytes for p in parameters)
        there = path.parent.glob(f"*{path.name}")  # a run that goes on replaces its own
        check_disk(path.parent, 3 * size - sum(old.stat().st_size for old in there))


def resume(trainer, checkpoint, path):
    """Put a ``Trainer`` back to where a checkpoint was saved.

    Where its data has other pictures now, more or fewer, the epoch begins anew.

    :raises UserError: if the checkpoint is damaged
    """
    metric, epochs = trainer.config["metric"], trainer.config["epochs"]
    per_epoch = trainer.config["total_updates"] // epochs
    try:
        restore_optimizer(trainer.optimizer, checkpoint["optimizer"])
        history, trainer.update = checkpoint["history"], int(checkpoint["update"])
        trainer.history = history
        trainer.started -= float(checkpoint["seconds"])  # what the run took before counts, too
        before, key = checkpoint["config"], "images_digests"
        as_many = before["total_updates"] // before["epochs"] == per_epoch
        if as_many and before.get(key, trainer.config[key]) == trainer.config[key]:
            trainer.tally.load_state_dict(checkpoint["epoch_so_far"])
        else:
            trainer.update = len(history) * per_epoch
            for record in history:  # marked with the epochs at the first change since
                record["of_other_data"] = record.get("of_other_data") or len(history)
            note(
                f"the data has other pictures than before: epoch {len(history) + 1} begins anew, "
                "and so does the search for the best one"
            )
        if not 0 <= trainer.update - len(history) * per_epoch <= per_epoch:
            raise ValueError(f"{trainer.update} updates in {len(history)} epochs")
        best = best_epoch(history, metric) if of_this_data(history) else None
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {str(error)[:160]}): it cannot be "
            "resumed; start a new run from its weights with --init_from"
        ) from error
    best_beside = Path(path).with_name(trainer.best_path.name)
    if is_main() and best_beside.exists() and not trainer.best_path.exists():  # in another folder
        with atomic_path(trainer.best_path) as temporary:
            shutil.copyfile(best_beside, temporary)
    so_far = f"; best {metric} so far {best[metric]:.2f}" if best else ""
    print(f"resuming after epoch {len(history)}, update {trainer.update}{so_far}")


def restore_optimizer(optimizer, state):
    """Load a saved state, but keep what belongs to the device, which may be another one now."""
    own = [{key: group[key] for key in ("lr", "capturable")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, own):
        kept["lr"].fill_(float(group["lr"]))
        group.update(kept)


def fill_embedding(decoder, path, word_map, known):
    """Put a file's word vectors into a decoder's ``embedding``; words that it lacks keep theirs.

    :param known: words that a model brings, which will keep its vectors
    :raises UserError: if it has none
    """
    embedding = getattr(decoder, "embedding", None)
    if not isinstance(embedding, torch.nn.Embedding):
        name = type(decoder).__name__
        raise UserError(f"--embeddings {path}: {name} has no nn.Embedding of the name embedding")
    vectors, found = load_embeddings(path, word_map, embedding.embedding_dim)
    with torch.no_grad():
        embedding.weight[torch.from_numpy(found)] = torch.from_numpy(vectors[found])
    new = [number for word, number in word_map.items() if word not in known]
    print(f"{path}: vectors for {found[new].sum()} of {len(new)} {'new ' if known else ''}words")


def calibrate_on(encoder, dataset, device, learns):
    """Set a random encoder's BatchNorm statistics from some of the images.

    :param learns: whether it will be trained, too; a note says what that means
    """
    numbers = [i % len(dataset) for i in range(64)]  # BatchNorm needs more than one value
    batches = (torch.from_numpy(dataset.images(numbers[i : i + 16])) for i in range(0, 64, 16))
    calibrate(encoder, (batch.to(device) for batch in batches))
    if not learns:
        note(
            "the CNN keeps its random weights, which know nothing of pictures: take "
            "--encoder_weights imagenet or a file, or train it with --fine_tune_encoder"
        )
    elif encoder.frozen_blocks:
        note("the CNN's first layers, which --fine_tune_encoder leaves out, stay random")


def frozen_features(captioner, splits, folder, amp, workers):
    """Features of splits, float16 (N, n, encoder_dim) each: on the GPU if all fit there.

    :param splits: tuple of ``CaptionDataset``
    """
    device = captioner.device
    with autocast(device, amp):
        found = [captioner.features(data, folder, workers=workers) for data in splits]
    size = sum(features.nbytes for features in found)
    if device.type == "cuda" and size < 0.6 * torch.cuda.mem_get_info(device)[0]:
        found = [features.to(device) for features in found]
    return found
