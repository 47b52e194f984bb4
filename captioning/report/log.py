"""What a training says of itself: on the terminal, in its log, and for TensorBoard."""

import itertools
import json
import math

import numpy as np
import torch

from captioning.data.words import join_words
from captioning.model.grid import split_sentinel
from captioning.model.schedules import best_epoch
from captioning.report.metrics import too_short
from captioning.run.files import atomic_path
from captioning.run.messages import counted, note


def print_header(captioner, train_data, val_data, options):
    """What runs, on what, and the options that are not the defaults; all stand in the log.

    :param options: dict of the flags' groups to dicts of flags that are not as when left out
    """
    config, modules = captioner.config, (captioner.encoder, captioner.decoder)
    encoder, decoder = (sum(p.numel() for p in m.parameters()) / 1e6 for m in modules)
    print(
        f"{config['machine']}\nmodel: {config['encoder']}, {encoder:.1f} M parameters; "
        f"{config['attention']} attention and {config['decoder']}, {decoder:.1f} M parameters\n"
        f"data: {config['data_name']}: {len(train_data):,} training images with "
        f"{len(train_data.captions):,} captions, {counted(len(val_data), 'validation image')}; "
        f"{len(captioner.word_map) - 4:,} words and 4 special tokens"
    )
    updates = config["total_updates"] // config["epochs"]
    if updates < 10 and not config["init_from"]:
        note(
            f"{len(train_data):,} training images are {counted(updates, 'update')} an epoch at "
            f"--batch_size {config['batch_size']}: too few to learn much from; go on from a "
            "trained model (--preset adapt --init_from captioner), or take --batch_size 4 and more "
            "--epochs"
        )
    short = too_short([*itertools.chain.from_iterable(val_data.references)])
    if short and config["metric"] == "BLEU-4":
        note(f"validation: {short}; choose the best epoch by --metric CIDEr")
    for group, changed in options.items():
        changed = changed | changed.pop("decoder_options", {})
        print(f"{group}: {' '.join(as_typed(*flag) for flag in changed.items())}")


def as_typed(key, value):
    """A flag as one types it."""
    switches = {"True": f"--{key}", "False": f"--no_{key}"}
    return switches.get(str(value), f"--{key} {value}")


def print_epoch(record, config, is_best, val_data, hypotheses):
    """A line for the epoch and three captions of validation images, always the same ones."""
    shown = ("BLEU-4", "ROUGE-L", "CIDEr")
    metric = config["metric"]
    chosen_by = "" if metric in shown else f", {metric} {record[metric]:.2f}"
    print(
        f"epoch {record['epoch']:>2}: loss {record['loss']:.3f}, nll {record['nll']:.3f} | "
        f"validation: nll {record['val_nll']:.3f}; beam {config['beam_size']}: BLEU-4 "
        f"{record['BLEU-4']:.2f}, ROUGE-L {record['ROUGE-L']:.2f}, CIDEr {record['CIDEr']:.1f}"
        f"{chosen_by}"
        f"{' *' if is_best else ''} | {record['words_per_second']:,} words/s, "
        f"{record['seconds']:.0f} s since start"
    )
    if short := too_short(hypotheses):
        note(short)
    for i in np.linspace(0, len(val_data) - 1, 3).astype(int):
        caption, true = join_words(hypotheses[i]), val_data.raw_references[i][0]
        print(f"    {val_data.image_names[i]}: {caption}   (true: {true})")


def print_end(config, history, memory, path):
    """Why a training ended early, if it did, and what its best epoch was."""
    metric, epochs = config["metric"], config["epochs"]
    if len(history) < epochs:
        why = f"no better {metric} for {config['patience']} epochs (--patience)"
        print(f"stopped after {len(history)} of {epochs} epochs: {why}")
    best = best_epoch(history, metric)
    where = path if path.exists() else "its checkpoint was not beside the one that was resumed"
    print(
        f"best {metric} {best[metric]:.2f} in epoch {best['epoch']} of {len(history)}, "
        f"{best['seconds']:.0f} s after the start; peak memory {memory} GB: {where}"
    )
    if best[metric] == 0:
        advice = "" if metric == "CIDEr" else "; --metric CIDEr tells more"
        note(f"{metric} was 0 in every epoch, so the lowest loss chose{advice}")


def write_log(path, config, history):
    """The log, as JSON lines: the configuration, then a record per epoch."""
    lines = [{"config": config}, *history]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_tensorboard(folder, captioner, data, record, options):
    """An epoch's record and three validation images, word by word, for TensorBoard.

    :param options: those of ``beam_search``
    """
    from torch.utils.tensorboard import SummaryWriter

    step = record["update"]
    numbers = np.linspace(0, len(data) - 1, min(3, len(data))).astype(int)
    images = torch.from_numpy(data.images(numbers))  # (3, 3, S, S)
    with SummaryWriter(folder / "tensorboard") as writer:
        for name, value in record.items():
            writer.add_scalar(name, value, step)
        for number, image, (best, *_) in zip(numbers, images, captioner.caption(images, **options)):
            alphas, _ = split_sentinel(best.alphas)  # (num_words, num_pixels)
            side = math.isqrt(alphas.shape[1])
            alphas = alphas.view(-1, 1, side, side)  # (num_words, 1, rows, columns)
            light = torch.nn.functional.interpolate(alphas, image.shape[1:], mode="bilinear")
            light = 0.2 + 0.8 * light / light.amax(dim=(2, 3), keepdim=True)
            strip = torch.cat([image / 255, *(image / 255 * light)], dim=2)
            writer.add_image(data.image_names[number], strip, step)
            writer.add_text(data.image_names[number], join_words(captioner.text(best)), step)
