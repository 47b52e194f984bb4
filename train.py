"""Train a captioner, validate it on captions that it makes on its own, and keep the best.

python train.py
python train.py --preset shapes
python train.py --encoder vgg16 --decoder gru --scheduled_sampling inverse_sigmoid --output_folder vgg16_gru
python train.py --resume
"""

import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

import datasets
import models
import utils
from utils import UserError

ARCHITECTURE = (
    "encoder",
    "decoder",
    "attention",
    "encoded_image_size",
    "attention_dim",
    "embed_dim",
    "decoder_dim",
    "deep_output",
    "position_encoding",
)
MAY_CHANGE_ON_RESUME = (
    "data_folder",
    "output_folder",
    "resume",
    "device",
    "workers",
    "epochs",
    "patience",
    "encoder_weights",
    "init_from",
    "embeddings",
    "checkpoint_every",
)
PRESETS = {  # defaults that suit a data set; any flag given beside --preset wins
    "shapes": {
        "data_name": datasets.base_name("shapes", 5, 5),
        "encoder": "efficientnet_lite0",
        "encoded_image_size": 0,
        "position_encoding": True,
        "decoder_dim": 256,
        "attention_dim": 256,
        "embed_dim": 128,
        "epochs": 12,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "warmup": 50,
        "alpha_c": 0.0,
        "label_smoothing": 0.0,
        "dropout": 0.2,
        "embed_dropout": 0.1,
        "feature_dropout": 0.1,
        "beam_size": 1,
        "amp": True,
    },
}
MAX_SKIPPED = 10  # updates in a row without a finite gradient, after which training gives up
METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")


def get_args_parser():
    parser = argparse.ArgumentParser(
        description="Train Show, Attend and Tell.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--preset", choices=PRESETS, help="other defaults: shapes, for the generated data set"
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_folder",
        type=Path,
        default=Path("data"),
        help="folder with the files that create_input_files.py wrote; feature stores are kept there too",
    )
    group.add_argument(
        "--data_name", default=datasets.base_name("flickr8k", 5, 5), help="their common name"
    )
    group.add_argument(
        "--output_folder",
        type=Path,
        default=Path("checkpoints"),
        help="folder for checkpoints, log and learning curves; give each variant its own",
    )

    group = parser.add_argument_group("model")
    group.add_argument(
        "--encoder",
        choices=models.ENCODERS,
        default="resnet101",
        metavar="NAME",
        help=f"CNN that sees the picture: {', '.join(models.ENCODERS)}",
    )
    group.add_argument(
        "--encoder_weights",
        default="imagenet",
        metavar="imagenet|none|FILE",
        help="what the CNN starts from: ImageNet's weights, random ones, or a state dict file",
    )
    group.add_argument(
        "--encoded_image_size",
        type=int,
        default=14,
        help="side of the grid that attention sees; 0 keeps the CNN's own (faster)",
    )
    group.add_argument("--decoder", choices=models.DECODERS, default="lstm", help="recurrent cell")
    group.add_argument(
        "--attention",
        choices=models.ATTENTIONS,
        default="soft",
        help="soft weighs all places, hard samples one (REINFORCE), mean does not look anywhere",
    )
    group.add_argument(
        "--attention_dim", type=int, default=512, help="width of the attention network"
    )
    group.add_argument("--embed_dim", type=int, default=512, help="width of the word embedding")
    group.add_argument("--decoder_dim", type=int, default=512, help="width of the recurrent state")
    group.add_argument(
        "--deep_output",
        action="store_true",
        help="score words from word, state and context (paper, eq. 7), not from the state alone",
    )
    group.add_argument(
        "--position_encoding",
        action="store_true",
        help="add a fixed code of row and column to the CNN's features, so that captions can tell left "
        "from right (not in the paper)",
    )
    group.add_argument(
        "--embeddings", type=Path, help="word vectors in GloVe's text format to start from"
    )

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=15, help="passes over the training pictures")
    group.add_argument(
        "--batch_size",
        type=int,
        default=16,
        help="pictures per update, each with all its captions; lower it if memory runs out",
    )
    group.add_argument(
        "--learning_rate", type=float, default=6e-4, help="of the decoder, at its peak"
    )
    group.add_argument(
        "--lr_schedule",
        choices=("cosine", "plateau", "constant"),
        default="cosine",
        help="after the warm-up: cosine falls to 0 at the last epoch; plateau multiplies by 0.8 after "
        "every 2 epochs without a better validation score",
    )
    group.add_argument(
        "--warmup", type=int, default=200, help="updates over which the learning rate rises from 0"
    )
    group.add_argument("--weight_decay", type=float, default=0.01, help="of AdamW")
    group.add_argument("--grad_clip", type=float, default=5.0, help="largest norm of the gradient")
    group.add_argument(
        "--dropout",
        type=float,
        default=0.6,
        help="on what words are scored from; raise it on overfitting",
    )
    group.add_argument("--embed_dropout", type=float, default=0.5, help="on embedded words")
    group.add_argument("--feature_dropout", type=float, default=0.3, help="on the CNN's features")
    group.add_argument(
        "--label_smoothing",
        type=float,
        default=0.1,
        help="share of each target spread over all words",
    )
    group.add_argument(
        "--alpha_c",
        type=float,
        default=0.1,
        help="weight of the doubly stochastic penalty, which makes attention visit every place",
    )
    group.add_argument(
        "--fine_tune_encoder",
        action="store_true",
        help="train the CNN too, all but its first block (EfficientNet: but its first three stages); its "
        "features are then not cached",
    )
    group.add_argument(
        "--encoder_learning_rate", type=float, default=1e-4, help="of the CNN, at its peak"
    )
    group.add_argument(
        "--mirror",
        action="store_true",
        help="show pictures mirrored every other time, except those whose captions say left or right; a "
        "frozen CNN's feature store then holds both and takes twice the time and disk (default: off)",
    )
    group.add_argument(
        "--scst",
        action="store_true",
        help="self-critical training: five captions are sampled for each picture, and those with a "
        "higher CIDEr-D than the others made likelier (Rennie et al. 2017, Luo 2020); without "
        "dropout; the loss is minus their mean reward x 100; needs --init_from and a small "
        "--learning_rate, 1e-4 for example",
    )
    group.add_argument(
        "--scst_meteor",
        type=float,
        default=0.0,
        help="with --scst: reward captions by CIDEr-D + this x METEOR, 5 for example, which makes them "
        "longer; needs Java",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of weights, dropout, sampling and the order of pictures",
    )

    group = parser.add_argument_group("scheduled sampling (Bengio et al. 2015)")
    group.add_argument(
        "--scheduled_sampling",
        choices=("none", "linear", "exponential", "inverse_sigmoid"),
        default="none",
        help="how the probability of feeding the true word falls; none keeps it at 1",
    )
    group.add_argument(
        "--ss_min",
        type=float,
        default=0.75,
        help="the probability never falls below this; lower it for more of the model's own words",
    )
    group.add_argument(
        "--ss_k",
        type=float,
        help="k of the schedule's formula (None: such that ss_min is reached at the last update)",
    )
    group.add_argument(
        "--ss_slope",
        type=float,
        help="linear only: fall of the probability per update (None: as for ss_k)",
    )
    group.add_argument(
        "--ss_argmax",
        action="store_true",
        help="feed the model's likeliest word instead of one drawn from its distribution",
    )

    group = parser.add_argument_group("validation")
    group.add_argument(
        "--metric", choices=METRICS, default="BLEU-4", help="what the best checkpoint is best at"
    )
    group.add_argument(
        "--patience", type=int, default=6, help="stop after so many epochs without a better score"
    )

    group = parser.add_argument_group("continuing")
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on with an interrupted run exactly where it was: the run of --output_folder, or the "
        "given checkpoint; with nothing there yet, start",
    )
    group.add_argument(
        "--init_from",
        type=Path,
        metavar="CHECKPOINT",
        help="start a new run from a checkpoint's weights and architecture, for example to fine-tune",
    )
    group.add_argument(
        "--checkpoint_every",
        type=int,
        default=0,
        help="save every so many updates too, for long epochs; 0: after each epoch, and when stopped",
    )
    utils.add_search_flags(parser, consensus=False)
    utils.add_device_flags(parser)
    return parser


def check_args(args):
    """Refuse values that cannot work, before anything is read or written."""
    check_ranges(
        args,
        encoded_image_size=(0, 64),
        attention_dim=(1, 65536),
        embed_dim=(1, 65536),
        decoder_dim=(1, 65536),
        epochs=(1, 100000),
        batch_size=(1, 65536),
        learning_rate=(0, 10),
        encoder_learning_rate=(0, 10),
        warmup=(0, 10**9),
        weight_decay=(0, 10),
        grad_clip=(1e-6, 1e6),
        dropout=(0, 0.99),
        embed_dropout=(0, 0.99),
        feature_dropout=(0, 0.99),
        label_smoothing=(0, 0.99),
        alpha_c=(0, 1000),
        scst_meteor=(0, 1000),
        seed=(0, 2**63 - 1),
        ss_k=(1e-6, 1e9),
        ss_slope=(0, 1),
        ss_min=(0, 1),
        patience=(1, 100000),
        checkpoint_every=(0, 10**9),
    )
    if args.resume and args.init_from:
        raise UserError(
            "--resume goes on with a run, --init_from starts a new one: give one of them"
        )
    if args.scst and not (args.init_from or args.resume):
        raise UserError("--scst improves a trained model: name its checkpoint with --init_from")
    if args.scst_meteor and not args.scst:
        raise UserError(
            "--scst_meteor is a part of the reward of self-critical training: add --scst or leave it out"
        )
    if args.scst_meteor and not shutil.which("java"):
        raise UserError(
            "--scst_meteor: METEOR needs Java, and there is no program java here: install a Java runtime, or "
            "leave the flag out"
        )
    if args.scst and args.scheduled_sampling != "none":
        raise UserError(
            "--scst feeds the model's own words already: leave out --scheduled_sampling"
        )
    if args.scheduled_sampling == "exponential" and args.ss_k is not None and args.ss_k > 1:
        raise UserError(
            f"--ss_k {args.ss_k}: expected at most 1 for --scheduled_sampling exponential, which is k^i"
        )
    if args.ss_slope is not None and args.scheduled_sampling in ("exponential", "inverse_sigmoid"):
        raise UserError(
            f"--ss_slope is for --scheduled_sampling linear; leave it out of {args.scheduled_sampling}"
        )
    if args.embeddings and args.init_from:
        raise UserError(
            "--embeddings and --init_from both say what the word vectors start from: give one of them"
        )
    if args.scheduled_sampling == "none" and (
        args.ss_argmax or args.ss_k is not None or args.ss_slope is not None
    ):
        raise UserError(
            "--ss_k, --ss_slope and --ss_argmax do nothing without --scheduled_sampling; name a schedule"
        )


def check_ranges(args, **bounds):
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} {value}: expected a value from {low} to {high}")


def main(args):
    check_args(args)
    with contextlib.ExitStack() as stack:
        train(args, stack)


def train(args, stack):
    """The whole run. What it holds until its end, its lock and its processes, is entered on ``stack``."""
    started = time.time()
    device = stack.enter_context(utils.processes(args.device))
    stop = stack.enter_context(utils.StopSignals())
    dtype = torch.bfloat16 if args.amp else torch.float32
    # oneDNN compiles kernels for each shape it meets, and no two batches have the same: a thousand kept ones, its default,
    # hold and scatter a gigabyte of memory and are no faster
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    train_data = datasets.CaptionDataset(
        datasets.split_path(args.data_folder, "train", args.data_name)
    )
    val_data = datasets.CaptionDataset(datasets.split_path(args.data_folder, "val", args.data_name))
    word_map = datasets.load_word_map(datasets.word_map_path(args.data_folder, args.data_name))
    for data in (train_data, val_data):
        data.check_word_map(word_map)

    latest_path = datasets.checkpoint_path(args.output_folder, args.data_name)
    best_path = datasets.checkpoint_path(args.output_folder, args.data_name, best=True)
    checkpoint = find_checkpoint(args, latest_path, best_path, word_map)
    check_sizes(train_data, val_data, checkpoint if args.resume else None)
    if args.scst and args.attention == "hard":
        raise UserError(
            "--scst does not train where --attention hard looks: start from a model with soft attention"
        )
    utils.set_seed(args.seed)
    encoder, decoder = build_model(args, checkpoint, word_map, device)
    encoder.fine_tune(args.fine_tune_encoder)
    updates_per_epoch = math.ceil(len(train_data) / args.batch_size)
    total_updates = args.epochs * updates_per_epoch
    ss_constants = models.schedule_constants(
        args.scheduled_sampling, total_updates, args.ss_k, args.ss_slope, args.ss_min
    )
    config = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
    }
    config |= {
        "encoder_dim": encoder.encoder_dim,
        "image_size": train_data.image_size,
        "total_updates": total_updates,
        "ss_constants": list(ss_constants),
        "machine": utils.describe_machine(device),
    }
    decoder.sample_location = args.sample_location
    captioner = models.Captioner(encoder, decoder, word_map, config)
    stack.enter_context(utils.locked(datasets.lock_path(latest_path), latest_path))
    print_header(args, captioner, train_data, val_data)

    shown = WithMirrored(train_data) if args.mirror else train_data
    train_features = None if args.fine_tune_encoder else features_of(shown, captioner, args, dtype)
    val_features = None if args.fine_tune_encoder else features_of(val_data, captioner, args, dtype)
    step = Update(
        args, captioner, build_optimizer(args, encoder, decoder), train_data, train_features, dtype
    )
    history, seconds_before = [], 0.0
    if checkpoint and args.resume:
        history, seconds_before = go_on(args, step, checkpoint, updates_per_epoch)
        write_reports(args, config, history)  # which the interrupted run may not have come to

    def save(path=latest_path):
        state = {
            "config": config,
            "word_map": word_map,
            "encoder": encoder.state_dict(),
            "decoder": decoder.state_dict(),
            "history": history,
            "seconds": seconds_before + time.time() - started,
            **step.state_dict(),
        }
        with stop.held():
            if utils.is_main():
                models.save_checkpoint(path, state)

    try:
        while (
            len(history) < args.epochs and epochs_without_gain(history, args.metric) < args.patience
        ):
            record = train_epoch(args, config, captioner, step, history, stop, save)
            utils.set_seed(
                args.seed, step.update
            )  # of locations that hard attention samples in validation
            hypotheses = caption_validation(val_data, val_features, captioner, args, dtype)
            record |= utils.broadcast(
                utils.is_main() and utils.score_captions(val_data.references, hypotheses)
            )
            record["seconds"] = round(seconds_before + time.time() - started, 1)
            is_best = record[args.metric] > best_score(history, args.metric)
            with stop.held():
                history.append(record)
                step.begin_epoch()
                # BEST first: if the run is killed in between, the epoch is repeated and ends the same
                if is_best:
                    save(best_path)
                save()
                write_reports(args, config, history)
                print_epoch(record, args, is_best, val_data, hypotheses)
    except utils.Stopped as signal:
        save()
        signal.args = (
            f"{signal} after update {step.update}; saved. The same command with --resume goes on",
        )
        raise
    best = max(history, key=lambda record: record[args.metric])
    print(
        f"best {args.metric} {best[args.metric]:.2f} in epoch {best['epoch']} of {len(history)}, "
        f"{best['seconds']:.0f} s after the start; peak memory {utils.peak_memory_gb(device)} GB: {best_path}"
    )


# --------------------------------------------------------------------------------------------------- preparations


def find_checkpoint(args, latest_path, best_path, word_map):
    """The checkpoint to go on from or to start from, checked against the flags; None starts anew."""
    path, checkpoint = args.init_from, None
    found = [p for p in (latest_path, best_path) if p.exists()]
    if found and int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    ):  # torchrun --max_restarts repeats the command
        args.resume, args.init_from = args.resume or "auto", None
    if args.resume == "auto":
        if not found:
            print(f"nothing to resume at {latest_path}: starting anew")
            return None
        path, checkpoint = first_readable(found)
    elif args.resume:
        path = Path(args.resume)
    elif found:
        raise UserError(
            f"{found[0]} holds an earlier run: add --resume to go on with it, or choose another "
            "--output_folder"
        )
    if path is None:
        return None
    checkpoint = checkpoint or models.load_checkpoint(path)
    models.check_checkpoint(checkpoint, path)
    if checkpoint["word_map"] != word_map:
        raise UserError(
            f"{path} was trained with another word map than {args.data_name} in {args.data_folder}; name "
            "the data it was trained on"
        )
    config, defaults = checkpoint["config"], vars(get_args_parser().parse_args([]))
    for key in ARCHITECTURE:  # the checkpoint says what it is; a flag may agree or be left out
        if getattr(args, key) not in (config.get(key), defaults[key]):
            raise UserError(
                f"--{key} {getattr(args, key)}: {path} was built with {config.get(key)}; leave the flag out"
            )
        setattr(args, key, config.get(key))
    if args.init_from:
        return checkpoint
    changed = [
        f"--{key} {getattr(args, key)} (was {config.get(key)})"
        for key in defaults
        if key not in MAY_CHANGE_ON_RESUME and getattr(args, key) != config.get(key, defaults[key])
    ]
    if changed:
        raise UserError(
            f"--resume goes on with the run as it was, but these differ: {', '.join(changed)}; give the "
            "same flags, or start a new run from its weights with --init_from"
        )
    return checkpoint


def first_readable(paths):
    """The first checkpoint, or if its file is damaged, the next: of a run, its last one and then its best one.

    :return: (path, checkpoint)
    """
    for path, other in zip(paths, paths[1:]):
        try:
            return path, models.load_checkpoint(path)
        except UserError as error:
            print(f"{error}; going on from {other} instead")
    return paths[-1], models.load_checkpoint(paths[-1])


def check_sizes(train_data, val_data, checkpoint):
    """:raises UserError: if the pictures of the two splits, and of a run to resume, are not of one size"""
    sizes = {
        "the training pictures": train_data.image_size,
        "the validation pictures": val_data.image_size,
    }
    if checkpoint:
        sizes["the run to resume"] = checkpoint["config"]["image_size"]
    if len(set(sizes.values())) > 1:
        raise UserError(
            "expected pictures of one size, found "
            + ", ".join(f"{size} pixels in {what}" for what, size in sizes.items())
            + "; prepare the data with one --image_size"
        )


def go_on(args, step, checkpoint, updates_per_epoch):
    """Put a training back to where its checkpoint was saved.

    :param step: ``Update``
    :return: (history, seconds that the run took so far)
    """
    try:
        step.load_state_dict(checkpoint)
        history, seconds = checkpoint["history"], float(checkpoint["seconds"])
        best = best_score(history, args.metric)
        if not 0 <= step.update - len(history) * updates_per_epoch <= updates_per_epoch:
            raise ValueError(f"{step.update} updates in {len(history)} epochs")
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        where = (
            f"the last checkpoint in {args.output_folder}" if args.resume == "auto" else args.resume
        )
        raise UserError(
            f"{where} is damaged ({type(error).__name__}: {str(error)[:160]}): it cannot be resumed; "
            "start a new run from its weights with --init_from"
        ) from error
    so_far = f"; best {args.metric} so far {best:.2f}" if history else ""
    print(f"resuming after epoch {len(history)}, update {step.update}{so_far}")
    return history, seconds


def build_model(args, checkpoint, word_map, device):
    """Encoder and decoder, from a checkpoint's weights if there is one."""
    encoder = models.Encoder(args.encoder, "none" if checkpoint else args.encoder_weights)
    decoder = models.build_decoder(
        {**vars(args), "encoder_dim": encoder.encoder_dim}, len(word_map)
    )
    if checkpoint:
        encoder.load_state_dict(checkpoint["encoder"])
        decoder.load_state_dict(checkpoint["decoder"])
    elif args.embeddings:
        vectors, found = datasets.load_embeddings(args.embeddings, word_map, args.embed_dim)
        with torch.no_grad():
            decoder.embedding.weight[torch.from_numpy(found)] = torch.from_numpy(vectors[found])
        print(f"{args.embeddings}: vectors for {found.sum()} of {len(word_map)} words")
    return encoder.to(device), decoder.to(device)


def features_of(data, captioner, args, dtype):
    """Features of a split from its feature store, made now if it is missing; on the GPU if they fit there.

    :return: float16 tensor (N, n, encoder_dim)
    """
    key = datasets.feature_key(captioner.encoder.digest(), data.images_digest, dtype)
    path = datasets.features_path(args.data_folder, args.data_name, data.split, key)
    features = encode_split(data, captioner, args, dtype, path)
    device = captioner.device
    if device.type == "cuda" and features.nbytes < 0.6 * torch.cuda.mem_get_info(device)[0]:
        features = features.to(device)
    return features


def encode_split(data, captioner, args, dtype, path=None, rows=None):
    """Features of a split (or of a slice of it) as a float16 tensor (N, n, encoder_dim) in main memory."""
    return torch.from_numpy(
        datasets.encode_split(
            data, lambda images: captioner.encode(images, dtype), path, rows, workers=args.workers
        )
    )


def caption_validation(data, features, captioner, args, dtype):
    """Captions of the validation pictures, lists of words; each process makes its share."""
    rows = utils.share(len(data))
    features = (
        encode_split(data, captioner, args, dtype, rows=rows)
        if features is None
        else features[rows]
    )
    found = models.caption_split(
        [captioner],
        [features],
        dtype,
        beam_size=args.beam_size,
        length_penalty=args.length_penalty,
        max_decode_steps=args.max_decode_steps,
        with_alphas=False,
    )
    return sum(utils.all_gather([captioner.text(best) for best, *_ in found]), [])


def build_optimizer(args, encoder, decoder):
    """AdamW over the decoder and, if it is fine-tuned, the encoder."""
    groups = [{"params": list(decoder.parameters()), "peak_lr": args.learning_rate}]
    if args.fine_tune_encoder:
        groups.append(
            {
                "params": [p for p in encoder.parameters() if p.requires_grad],
                "peak_lr": args.encoder_learning_rate,
            }
        )
    device = groups[0]["params"][0].device
    for group in groups:  # a tensor, which CUDA graphs read, and one for each group
        group["lr"] = torch.tensor(0.0, device=device)
    return torch.optim.AdamW(
        groups, capturable=device.type == "cuda", weight_decay=args.weight_decay, fused=True
    )


# --------------------------------------------------------------------------------------------------- the training


def best_score(history, metric):
    return max((record[metric] for record in history), default=-1.0)


def epochs_without_gain(history, metric):
    scores = [record[metric] for record in history]
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0


def learning_rate_factor(config, update, history):
    """Share of the peak learning rate at an update; a function of what is already logged, so nothing needs resuming."""
    if update < config["warmup"]:
        return (update + 1) / config["warmup"]
    if config["lr_schedule"] == "constant":
        return 1.0
    if config["lr_schedule"] == "plateau":
        stale = [
            epochs_without_gain(history[: n + 1], config["metric"]) for n in range(len(history))
        ]
        return 0.8 ** sum(n > 0 and n % 2 == 0 for n in stale)
    done = (update - config["warmup"]) / max(1, config["total_updates"] - config["warmup"])
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class WithMirrored:
    """The pictures of a split, and after them the same pictures mirrored: number N + i is picture i, left and right changed.

    It has what :func:`encode_split` asks of a ``CaptionDataset``.

    :param dataset: ``CaptionDataset``
    """

    def __init__(self, dataset):
        self.dataset, self.split = dataset, dataset.split
        self.images_digest = f"{dataset.images_digest} and mirrored"

    def __len__(self):
        return 2 * len(self.dataset)

    def images(self, numbers):
        """Pictures by number, uint8 (B, 3, S, S)."""
        images = self.dataset.images(numbers % len(self.dataset))
        mirrored = numbers >= len(self.dataset)
        images[mirrored] = images[mirrored, ..., ::-1]
        return images


class Model(torch.nn.Module):
    """Encoder and decoder as one module, whose gradients DistributedDataParallel can average.

    :param features: float16 tensor (N, n, encoder_dim) on a GPU, of which the inputs are numbers; or None
    """

    def __init__(self, args, captioner, features, dtype):
        super().__init__()
        self.encoder, self.decoder = (
            captioner.encoder if args.fine_tune_encoder else None,
            captioner.decoder,
        )
        self.argmax, self.dtype, self.features = args.ss_argmax, dtype, features

    def encoded(self, inputs):
        """Features of what ``Update.load`` gave: pictures, features, or numbers of features."""
        if self.encoder is not None:
            with torch.autocast(
                inputs.device.type, self.dtype, enabled=self.dtype != torch.float32
            ):
                return self.encoder(inputs)
        return inputs if self.features is None else self.features[inputs]

    def forward(self, inputs, captions, steps, pictures, epsilon):
        if not steps:  # fewer pictures in the last batch than processes
            return None
        return self.decoder(
            self.encoded(inputs), captions, steps, pictures, epsilon, self.argmax, self.dtype
        )


class Update:
    """One training update: forward, loss, backward, clipping, optimizer; and where the training stands.

    On a GPU the decoder's loop is hundreds of kernels too small to keep the card busy, so each update is recorded once
    as a CUDA graph and then replayed in one launch. A graph has fixed shapes: captions are padded to a multiple of four
    words, and one graph is made for each such length. The first update of a length runs without a graph, which also
    sets up what a recording must find in place.

    With several processes each takes its share of a batch's pictures, without graphs; the loss is divided by the words
    of the whole batch.

    Nothing is drawn that does not follow from seed, update and process, so that a run can go on where it was stopped.

    :param features: float16 tensor (N, n, encoder_dim), with --mirror of ``WithMirrored``; or None to encode
        and fine-tune
    """

    def __init__(self, args, captioner, optimizer, data, features, dtype):
        self.args, self.captioner, self.optimizer, self.dtype = args, captioner, optimizer, dtype
        self.data, self.features, self.device = data, features, captioner.device
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.model = Model(
            args, captioner, features if features is not None and features.is_cuda else None, dtype
        )
        self.ddp = self.model
        if utils.world_size() > 1:
            self.ddp = torch.nn.parallel.DistributedDataParallel(self.model)
        self.update = 0
        # sums over the epoch of loss, nll and updates, kept on the device: asking for them would make the host wait
        self.total = torch.zeros(3, device=self.device)
        self.skipped = torch.zeros(
            2, device=self.device
        )  # updates that were not finite: all, and in a row
        self.warned = 0
        self.words, self.seconds = 0, 0.0
        self.graphs = {}
        self.use_graphs = self.device.type == "cuda" and utils.world_size() == 1
        self.reward = utils.CiderD(data.references) if args.scst else None
        self.meteor = utils.Meteor() if args.scst_meteor else None
        self.banned = (
            torch.tensor(datasets.special_tokens(captioner.word_map), device=self.device)
            if args.scst
            else None
        )
        if self.use_graphs:
            self.epsilon = torch.ones((), device=self.device)
            self.stream = torch.cuda.Stream(self.device)

    def begin_epoch(self):
        self.total.zero_()
        self.skipped.zero_()
        self.words, self.seconds, self.warned = 0, 0.0, 0

    def state_dict(self):
        """Where the training stands, in the middle of an epoch too; all processes must ask at the same time."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "update": self.update,
            "epoch_so_far": {
                "total": utils.all_reduce_sum(self.total.clone()).cpu(),
                "skipped": self.skipped.cpu(),
                "words": self.words,
                "seconds": self.seconds,
            },
        }

    def load_state_dict(self, state):
        own = [
            {key: group[key] for key in ("lr", "capturable")}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, kept in zip(self.optimizer.param_groups, own):
            kept["lr"].fill_(float(group["lr"]))
            group.update(kept)  # what belongs to the device, which may be another one now
        self.update, so_far = int(state["update"]), state["epoch_so_far"]
        self.total.copy_(so_far["total"] * utils.is_main())  # the others' shares are in it
        self.skipped.copy_(so_far["skipped"])
        self.words, self.seconds = so_far["words"], so_far["seconds"]

    def load(self, pictures, mirrored=None):
        """What an update needs of its pictures, as tensors on the CPU; runs in threads, ahead of time.

        :param pictures: int array of picture indices
        :param mirrored: bool array (N,), which of all pictures to show mirrored; or None
        :return: (pictures, ``datasets.CaptionBatch``, inputs: images, features or, if those are on the GPU, numbers,
            words of the whole batch): of this process's share of the pictures
        """
        num_words = datasets.count_words(self.data, pictures)
        pictures = pictures[utils.rank() :: utils.world_size()]
        source, numbers = self.data, pictures
        if mirrored is not None:
            source, numbers = (
                WithMirrored(self.data),
                pictures + len(self.data) * mirrored[pictures],
            )
        if self.features is None:
            inputs = torch.from_numpy(source.images(numbers))
        else:
            # copied by numpy: torch would start a second team of OpenMP threads here, which fight the first for the cores
            inputs = torch.from_numpy(
                numbers if self.features.is_cuda else self.features.numpy().take(numbers, axis=0)
            )
        return pictures, datasets.collate(self.data, pictures), self.pin(inputs), num_words

    def pin(self, tensor):
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def __call__(self, pictures, rows, inputs, num_words, epsilon):
        """Make the update.

        :param epsilon: probability of feeding the true word
        """
        utils.set_seed(self.args.seed, self.update, utils.rank())
        advantages, reward = np.zeros(len(rows.captions), np.float32), 0.0
        if self.reward:
            if len(pictures):
                rows, advantages, reward = self.explore(pictures, inputs.to(self.device))
            num_words, count = np.sum(
                utils.all_gather([sum(rows.decode_lengths), len(rows.decode_lengths)]), axis=0
            ).tolist()
            reward = 100 * reward / count
        steps, captions = rows.decode_lengths, rows.captions
        if self.use_graphs:
            length = 4 * math.ceil(steps[0] / 4)
            captions = np.pad(captions, ((0, 0), (0, length + 1 - captions.shape[1])))
            steps = [length] * len(steps)
        arrays = (captions, rows.image_index, advantages, np.float32(num_words), np.float32(reward))
        self.run(steps, [inputs, *(self.pin(torch.as_tensor(array)) for array in arrays)], epsilon)
        self.words += num_words
        self.update += 1

    @torch.no_grad()
    def explore(self, pictures, inputs, samples=5):
        """Sample captions, and reward each by how much it beats the others of its picture.

        Rennie et al. compare with the greedy caption, which costs a search; the mean of the other samples costs nothing,
        and the advantages add up to zero (Luo 2020, "A better variant of self-critical sequence training").

        :return: (``datasets.CaptionBatch``, float32 advantages, sum of the rewards), longest caption first
        """
        words, end = self.captioner.words, self.captioner.word_map[datasets.END]
        captions = (
            models.sample_captions(
                self.captioner.decoder,
                self.model.encoded(inputs),
                self.captioner.word_map,
                samples,
                self.args.max_decode_steps,
                self.dtype,
            )
            .flatten(0, 1)
            .cpu()
            .numpy()
        )
        numbers = np.repeat(np.arange(len(pictures)), samples)
        texts = [datasets.decode_caption(caption, words) for caption in captions]
        rewards = np.array(
            [
                self.reward(pictures[i], text, end in caption)
                for i, text, caption in zip(numbers, texts, captions)
            ],
            np.float32,
        )
        if self.meteor:
            _, scores = self.meteor([self.data.references[pictures[i]] for i in numbers], texts)
            rewards += self.args.scst_meteor * np.array(scores, np.float32)
        means = rewards.reshape(-1, samples).mean(1).repeat(samples)
        advantages = (rewards - means) * samples / (samples - 1)  # from the mean of the others
        lengths = (captions != 0).sum(1)
        order = np.argsort(-lengths, kind="stable")
        starts = np.full((len(captions), 1), self.captioner.word_map[datasets.START])
        captions = np.concatenate([starts, captions], axis=1)[order, : lengths.max() + 1]
        return (
            datasets.CaptionBatch(captions, lengths[order].tolist(), numbers[order]),
            advantages[order],
            rewards.sum(),
        )

    def run(self, steps, tensors, epsilon):
        """Compute the update on tensors of the CPU, through a CUDA graph where there are any."""
        if not self.use_graphs:
            self.compute(steps, *(t.to(self.device) for t in tensors), epsilon)
            return
        if self.args.scheduled_sampling != "none":
            epsilon = self.epsilon.fill_(epsilon)
        key = (steps[0], *(t.shape for t in tensors))
        if key not in self.graphs:
            self.graphs[key] = None
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(
                self.stream
            ):  # recording refuses what autograd began on the default stream
                self.compute(
                    steps, *(t.to(self.device, non_blocking=True) for t in tensors), epsilon
                )
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            return
        if self.graphs[key] is None:
            inputs = [t.to(self.device) for t in tensors]
            graph = torch.cuda.CUDAGraph()
            pool = next((made[0].pool() for made in self.graphs.values() if made), None)
            self.optimizer.zero_grad(set_to_none=True)
            # thread_local: the threads that read ahead go on pinning memory meanwhile
            with torch.cuda.graph(
                graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                self.compute(steps, *inputs, epsilon)
            self.graphs[key] = graph, inputs
        graph, inputs = self.graphs[key]
        for static, tensor in zip(inputs, tensors):
            static.copy_(tensor, non_blocking=True)
        graph.replay()

    def compute(self, steps, inputs, captions, pictures, advantages, num_words, reward, epsilon):
        args, output = self.args, self.ddp(inputs, captions, steps, pictures, epsilon)
        if output is None:  # no share in this batch, but the others wait for these gradients
            loss, nll = (
                sum(p.sum() for p in self.parameters if p.requires_grad) * 0,
                torch.zeros((), device=self.device),
            )
        elif args.scst:
            loss, nll = models.self_critical_loss(output, advantages, self.banned, num_words)
        else:
            loss, nll = models.caption_loss(
                output,
                num_words,
                args.label_smoothing,
                args.alpha_c,
                decoder=self.captioner.decoder,
            )
        self.optimizer.zero_grad(set_to_none=True)
        (
            loss * utils.world_size()
        ).backward()  # DistributedDataParallel averages; the shares' losses add up
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, args.grad_clip)
        # the fused optimizer leaves everything as it is where found_inf is 1; asking here would make the host wait
        bad = 1 - norm.isfinite().float()
        self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
        self.optimizer.step()
        # self-critical training lowers minus the reward; the value of its surrogate says nothing
        sums = torch.stack(
            [
                -reward if args.scst else loss.detach(),
                nll,
                torch.full_like(bad, 1 / utils.world_size()),
            ]
        )
        self.total += torch.where(bad > 0, 0, sums)
        self.skipped.copy_(torch.stack([self.skipped[0] + bad, (self.skipped[1] + 1) * bad]))

    def check(self):
        """Warn of updates whose gradient was not finite and which were left out, or give up.

        :raises UserError: if there are many in a row
        """
        count, in_a_row = self.skipped.tolist()
        if in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"the loss was not finite in the last {in_a_row:.0f} updates: lower --learning_rate or "
                "--grad_clip, or leave out --amp; the last checkpoint is kept, and the model is as it was "
                "before these updates"
            )
        if count > self.warned:
            print(
                f"warning: update {self.update}: the loss was not finite; {count:.0f} updates of this epoch were left "
                "out",
                file=sys.stderr,
            )
            self.warned = count


def train_epoch(args, config, captioner, step, history, stop, save):
    """One pass over the training pictures, or what is left of it.

    :param step: ``Update``
    :param history: records of the epochs before
    :param stop: ``utils.StopSignals``
    :param save: function that saves the training as it stands
    :return: the epoch's record: losses, rates, words per second
    """
    # without dropout in self-critical training: captions are sampled without, and must be trained on as they were likely
    captioner.decoder.train(not args.scst)
    epoch, seconds_before, began = len(history), step.seconds, time.time()
    batches = datasets.training_batches(step.data, args.batch_size, args.seed, epoch)
    mirrored = (
        (np.random.default_rng([args.seed, epoch, 1]).random(len(step.data)) < 0.5)
        & datasets.mirrorable(step.data, captioner.word_map)
        if args.mirror
        else None
    )
    load = functools.partial(step.load, mirrored=mirrored)
    done, words_before = step.update - epoch * len(batches), step.words
    rates = functools.partial(learning_rate_factor, config, history=history)
    sample = functools.partial(models.scheduled_sampling_epsilon, args.scheduled_sampling)
    with utils.progress(
        total=len(batches),
        initial=done,
        desc=f"epoch {epoch + 1}/{args.epochs}",
        unit="batch",
        leave=False,
    ) as bar:
        for loaded in datasets.read_ahead(load, batches[done:], args.workers):
            with stop.held():
                for group in step.optimizer.param_groups:
                    group["lr"].fill_(group["peak_lr"] * rates(step.update))
                step(*loaded, sample(step.update, *config["ss_constants"], args.ss_min))
                step.seconds = seconds_before + time.time() - began
                if args.checkpoint_every and step.update % args.checkpoint_every == 0:
                    save()
            stop.check()
            bar.update()
            if step.device.type == "cpu" or step.update % 25 == 0:
                step.check()
            if step.update % 25 == 0:
                loss, _, count = step.total.tolist()
                rate = (step.words - words_before) / (time.time() - began)
                bar.set_postfix_str(f"loss {loss / max(count, 1e-9):.3f}, {rate:,.0f} words/s")
    step.check()  # waits for the device
    step.seconds = seconds_before + time.time() - began
    loss, nll, count = utils.all_reduce_sum(step.total.clone()).tolist()
    captioner.decoder.eval()
    return {
        "epoch": epoch + 1,
        "update": step.update,
        "loss": loss / max(count, 1),
        "nll": nll / max(count, 1),
        "skipped_updates": int(step.skipped[0]),
        "learning_rate": args.learning_rate * rates(step.update - 1),
        "epsilon": sample(step.update - 1, *config["ss_constants"], args.ss_min),
        "train_seconds": round(step.seconds, 1),
        "words_per_second": round(step.words / step.seconds),
        "peak_memory_gb": utils.peak_memory_gb(step.device),
    }


# ---------------------------------------------------------------------------------------------------- the reports


def print_header(args, captioner, train_data, val_data):
    """What runs, on what, with which options: enough to run it again."""
    print(captioner.config["machine"])
    counts = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in (("encoder", captioner.encoder), ("decoder", captioner.decoder))
    }
    print(
        f"{args.encoder} {counts['encoder'] / 1e6:.1f} M parameters, {args.attention} attention + {args.decoder} "
        f"{counts['decoder'] / 1e6:.1f} M; {len(captioner.word_map)} words; {len(train_data)} training pictures with "
        f"{len(train_data.captions)} captions, {len(val_data)} validation pictures"
    )
    print("options: " + " ".join(f"{key}={value}" for key, value in sorted(vars(args).items())))


def print_epoch(record, args, is_best, val_data, hypotheses):
    """A line for the epoch and three captions of validation pictures, always the same ones."""
    print(
        f"epoch {record['epoch']:>2}: loss {record['loss']:.3f}, nll {record['nll']:.3f} | validation, beam "
        f"{args.beam_size}: BLEU-4 {record['BLEU-4']:.2f}, ROUGE-L {record['ROUGE-L']:.2f}, "
        f"CIDEr {record['CIDEr']:.1f}{' *' if is_best else ''} | {record['words_per_second']:,} words/s, "
        f"{record['seconds']:.0f} s since start"
    )
    for i in np.linspace(0, len(val_data) - 1, 3).astype(int):
        print(
            f"    {val_data.image_names[i]}: {' '.join(hypotheses[i])}   (true: {val_data.raw_references[i][0]})"
        )


def write_reports(args, config, history):
    """The log and the learning curves of the epochs so far."""
    if history and utils.is_main():
        write_log(datasets.log_path(args.output_folder, args.data_name), config, history)
        draw_curves(datasets.curves_path(args.output_folder, args.data_name), history)


def write_log(path, config, history):
    """JSON lines: the configuration, then a record per epoch. Written whole each time: it never holds half a line."""
    lines = [{"config": config}, *history]
    with utils.atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def draw_curves(path, history):
    """Loss and validation scores over the epochs, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [record["epoch"] for record in history]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = {
        "training": ["nll"],
        "validation: BLEU": METRICS[:4],
        "validation: ROUGE-L, CIDEr": METRICS[4:],
    }
    for axes, (title, names) in zip(figure.subplots(1, 3), panels.items()):
        for name in names:
            axes.plot(epochs, [record[name] for record in history], "o-", markersize=3, label=name)
        axes.legend(frameon=False)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with utils.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def with_preset(parser):
    """The parser with the defaults of the preset that the command line names, if it names one."""
    preset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    preset.add_argument("--preset", choices=PRESETS)
    args, _ = preset.parse_known_args()
    parser.set_defaults(**PRESETS.get(args.preset, {}))
    return parser


if __name__ == "__main__":
    utils.run(main, with_preset(get_args_parser()))
