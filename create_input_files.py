"""Prepare a data set: three HDF5 files of pictures and captions, and the word map.

python create_input_files.py                              # Flickr8k, downloaded into data/ if it is not there
python create_input_files.py --source downloads           # Flickr8k, from archives or folders that you have
python create_input_files.py --dataset shapes             # generated pictures: no download
python create_input_files.py --dataset coco --karpathy_json dataset_coco.json --images coco_pictures
python create_input_files.py --dataset mine --images pictures --captions captions.csv
"""

import argparse
import errno
import hashlib
import http.client
import os
import re
import shutil
import textwrap
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

import datasets
import utils
from utils import UserError

BASE_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
ARCHIVES = {  # name: MD5, bytes (about)
    "Flickr8k_Dataset.zip": ("f18a1e2920de5bd84dae7cf08ec78978", 1_115_000_000),
    "Flickr8k_text.zip": ("bf6c1abcb8e4a833b7f922104de18627", 2_340_000),
}


def get_args_parser():
    parser = argparse.ArgumentParser(
        description="Prepare a data set for train.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    group = parser.add_argument_group("where the pictures and captions come from")
    group.add_argument(
        "--dataset",
        default="flickr8k",
        help="flickr8k, flickr30k, coco, shapes (generated), or a name for your own data",
    )
    group.add_argument(
        "--source",
        type=Path,
        help="folder with Flickr8k's archives, or what they unpack to; if not given, they are looked "
        "for in --data_folder and downloaded to it",
    )
    group.add_argument(
        "--karpathy_json",
        type=Path,
        help="Karpathy's dataset_flickr8k.json, dataset_flickr30k.json or dataset_coco.json; "
        "needs --images",
    )
    group.add_argument(
        "--images",
        type=Path,
        help="folder or zip archive of pictures, for --karpathy_json or --captions",
    )
    group.add_argument(
        "--captions",
        type=Path,
        help="your own captions: CSV with the header image,caption[,split], JSON lines with the same "
        "keys, or lines of name.jpg#0<TAB>caption; needs --images",
    )
    group = parser.add_argument_group("what is made of them")
    group.add_argument(
        "--data_folder",
        type=Path,
        default=Path("data"),
        help="folder that the files are written to",
    )
    group.add_argument(
        "--captions_per_image",
        type=int,
        default=5,
        help="captions of each picture to train on; if it has more, they are drawn by --seed",
    )
    group.add_argument(
        "--min_word_freq",
        type=int,
        default=5,
        help="rarer words of the training captions become <unk>; raise it for a smaller vocabulary",
    )
    group.add_argument(
        "--max_len", type=int, default=50, help="do not train on captions of more words than this"
    )
    group.add_argument(
        "--image_size", type=int, default=256, help="side of the stored pictures, in pixels"
    )
    group.add_argument(
        "--seed", type=int, default=0, help="seed of everything that is drawn by lot"
    )
    group.add_argument(
        "--force", action="store_true", help="make the files again if they are there"
    )
    group.add_argument(
        "--workers",
        type=int,
        default=utils.available_cores(),
        help="threads that decode pictures; the default is the number of cores",
    )
    return parser


def main(args):
    warnings.filterwarnings(
        "ignore", module=r"PIL\."
    )  # what is wrong with a picture is said in our own words
    check_flags(args)
    name = datasets.base_name(args.dataset, args.captions_per_image, args.min_word_freq)
    if not args.force and is_prepared(args, name):
        draw_examples(
            args, name
        )  # unless an earlier run was killed before it came to that, they are there
        print(f"The files of {name} are in {args.data_folder} already; --force makes them again.")
        return
    start = time.monotonic()
    records, notes, source = find_records(args)
    check_disk(args.data_folder, len(records) * 3 * args.image_size**2)
    summaries, word_map = datasets.write_dataset(
        args.data_folder,
        records,
        dataset=args.dataset,
        source=source,
        captions_per_image=args.captions_per_image,
        min_word_freq=args.min_word_freq,
        max_len=args.max_len,
        image_size=args.image_size,
        seed=args.seed,
        workers=args.workers,
    )
    sheet = draw_examples(args, name, anew=True)
    for line in [*notes, *describe_losses(summaries)]:
        print(f"Note: {line}.")
    print(describe(summaries, word_map, args))
    print(
        f"\nMade {name} in {args.data_folder} in {time.monotonic() - start:.0f} s. Look at {sheet}: "
        "are the pictures right, and do the captions fit them?"
    )


def check_ranges(args, **bounds):
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} {value}: expected a value from {low} to {high}")


def check_flags(args):
    """:raises UserError: if a value is out of bounds, or two flags contradict each other"""
    check_ranges(
        args,
        captions_per_image=(1, 100),
        min_word_freq=(1, 10**6),
        max_len=(1, 1000),
        image_size=(32, 1024),
        seed=(0, 2**32 - 1),
        workers=(1, 256),
    )
    datasets.check_name(args.dataset, "--dataset", 64)
    if args.captions and args.karpathy_json:
        raise UserError(
            "--captions and --karpathy_json both say what the captions are; give one of them"
        )
    listed = args.captions or args.karpathy_json
    if bool(listed) != bool(args.images):
        raise UserError(
            "--images needs --captions or --karpathy_json, and each of them needs --images"
        )
    if args.dataset == "shapes" and (listed or args.source):
        raise UserError(
            "--dataset shapes is generated: leave out --source, --images, --captions and --karpathy_json"
        )
    if args.source and (listed or args.dataset != "flickr8k"):
        raise UserError(
            "--source is for Flickr8k's own archives; other data is given by --images and --captions or "
            "--karpathy_json"
        )
    if args.captions and args.dataset in ("flickr8k", "flickr30k", "coco"):
        raise UserError(
            f"--dataset {args.dataset} with --captions: give your own data another name, so that it is not "
            "taken for the published split"
        )
    if not listed and args.dataset in ("flickr30k", "coco"):
        raise UserError(
            f"--dataset {args.dataset} needs --karpathy_json dataset_{args.dataset}.json and --images"
        )
    if not listed and args.dataset not in ("flickr8k", "shapes"):
        raise UserError(
            f"--dataset {args.dataset} is not known; for your own data give --images and --captions too"
        )


def is_prepared(args, name):
    """Whether all files are there.

    :raises UserError: if they are, but broken or made with other settings
    """
    paths = [datasets.split_path(args.data_folder, split, name) for split in datasets.SPLITS]
    word_map = datasets.word_map_path(args.data_folder, name)
    if not all(path.exists() for path in [*paths, word_map]):
        return False
    try:
        word_map = datasets.load_word_map(word_map)
    except UserError as error:
        raise UserError(f"{error}; --force makes it again") from error
    listed = args.captions or args.karpathy_json
    source = listed and name_of(listed)
    for path in paths:
        dataset = datasets.CaptionDataset(path)
        dataset.check_word_map(word_map)
        for key in ("max_len", "image_size", "seed"):
            if dataset.attributes[key] != getattr(args, key):
                raise UserError(
                    f"{path} was made with --{key} {dataset.attributes[key]}, not {getattr(args, key)}; "
                    "give --force to make it again, or another --data_folder"
                )
        if source and dataset.attributes["source"] != source:
            raise UserError(
                f"{path} was made from {dataset.attributes['source']}, not {source}; give --force to make it "
                "again, or another --dataset name"
            )
    return True


def name_of(path):
    """A file's name, and something that changes with what is in it.

    :raises UserError: if it cannot be read
    """
    try:
        with open(path, "rb") as file:
            return f"{path.name} (SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()[:12]})"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def find_records(args):
    """:return: list of ``datasets.Record``, notes for the user, and in words where they come from"""
    if args.dataset == "shapes":
        return *datasets.shapes_records(seed=args.seed, size=args.image_size), "generated"
    if args.karpathy_json:
        return *datasets.karpathy_records(args.karpathy_json, args.images), name_of(
            args.karpathy_json
        )
    if args.captions:
        return *datasets.custom_records(args.images, args.captions, args.seed), name_of(
            args.captions
        )
    folder = args.source or args.data_folder
    missing = datasets.missing_flickr8k_archives(folder)
    if missing and args.source:
        raise UserError(
            f"{folder} lacks {' and '.join(missing)} (packed or unpacked); leave out --source to download"
        )
    download(folder, missing)
    return *datasets.flickr8k_records(folder), "Flickr8k, official split"


# ------------------------------------------------------------------------------------------------------------ download


def download(
    folder, names, base_url=BASE_URL, archives=ARCHIVES, timeout=30, attempts=4, pause=1.0
):
    """Download archives; what an earlier attempt left is continued.

    :param names: names of those to fetch
    :param archives: dict name -> (MD5 in hex, number of bytes, about)
    :param timeout: seconds without a byte after which a connection is given up
    :param attempts: how often to try each archive
    :param pause: seconds before the second attempt; doubled before each further one
    :raises UserError: if one cannot be had; the message says how to get it by hand
    """
    check_disk(folder, sum(archives[name][1] for name in names))
    for name in names:
        md5, size = archives[name]
        path = Path(folder) / name
        part = path.with_name(f"{name}.part")
        for attempt in range(attempts):
            time.sleep(pause * 2 ** (attempt - 1) if attempt else 0)
            try:
                _fetch(base_url + name, part, size, timeout)
                if _md5(part) != md5:
                    part.unlink()
                    raise OSError("what arrived has another MD5 checksum")
                os.replace(part, path)
                break
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                if getattr(error, "errno", None) in (
                    errno.ENOSPC,
                    errno.EACCES,
                    errno.EROFS,
                    errno.EDQUOT,
                ):
                    raise UserError(
                        f"cannot write {part}: {error.strerror}; make room or check your rights"
                    ) from error
                problem = datasets.clean_caption(str(error)) or type(error).__name__
                if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404, 410):
                    attempt = attempts
            if attempt >= attempts - 1:
                raise UserError(
                    f"cannot download {base_url}{name}: {problem}. Run the command again to continue, or "
                    f"put {' and '.join(archives)} into {folder} by hand, or name their folder with "
                    "--source; --dataset shapes needs no download"
                )


def _fetch(url, part, size, timeout):
    """Continue ``part`` with what it lacks."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if (
            have and error.code == 416
        ):  # nothing is left to send: the checksum will tell whether all is well
            return
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise OSError("the server sent a web page instead of the archive")
        start = (
            re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if response.status == 206
            else None
        )
        if start is None or int(start[1]) != have:
            have = 0
            part.unlink(missing_ok=True)
            if start is not None and int(start[1]) != 0:
                raise OSError("the server sent another part of the archive than it was asked for")
        total = None if response.length is None else have + response.length
        if max(have, total or 0) > 2 * size:
            raise OSError(f"the server says that it sends {total:,} bytes, expected about {size:,}")
        check_disk(part.parent, (total or size) - have)
        bar = utils.progress(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True)
        with open(part, "ab") as file, bar:
            while chunk := response.read1(2**18):  # what has come, so that a stall loses nothing
                have += len(chunk)
                if have > 2 * size:
                    raise OSError(
                        f"the server sends more than {2 * size:,} bytes, expected about {size:,}"
                    )
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and have < total:
        raise OSError(f"the connection broke after {have:,} of {total:,} bytes")


def _md5(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def check_disk(folder, size):
    """Make a folder.

    :raises UserError: if it cannot be made, or its disk has fewer than ``size`` bytes free
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {folder}: {error.strerror}; choose another --data_folder"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, expected at least {size / 1e9:.1f} GB; make room or "
            "choose another --data_folder"
        )


# ------------------------------------------------------------------------------------------------------------- summary


def describe_losses(summaries):
    """:return: list of lines that say what was left out, and why"""
    lines = []
    for split, summary in summaries.items():
        for key, what in (
            ("empty", "captions without a word were left out"),
            (
                "too_long",
                "captions longer than --max_len are kept as references, but not trained on",
            ),
            ("without_captions", "pictures without a usable caption were left out"),
        ):
            if summary[key]:
                lines.append(f"{split}: {summary[key]:,} {what}")
        unreadable = summary["unreadable"]
        lines += [f"{split}: left out, {message}" for message in unreadable[:20]]
        if len(unreadable) > 20:
            lines.append(
                f"{split}: left out, {len(unreadable) - 20:,} more pictures that cannot be read"
            )
    return lines


def describe(summaries, word_map, args):
    """:return: table of what was written, as text"""
    lines = ["", "split   pictures   captions  references     words    <unk>       size"]
    for split, s in summaries.items():
        unknown = 100 * s["unknown"] / max(s["words"], 1)
        lines.append(
            f"{split:<6}{s['pictures']:>10,}{s['captions']:>11,}{s['references']:>12,}{s['words']:>10,}"
            f"{unknown:>7.1f} %{s['bytes'] / 1e6:>8,.0f} MB"
        )
    lines.append(
        f"Vocabulary: {len(word_map) - 4:,} words that occur at least {args.min_word_freq} times in the "
        "training captions; the others become <unk>."
    )
    return "\n".join(lines)


def draw_examples(args, name, anew=False):
    """Draw the contact sheet, and write a few generated test pictures for caption.py; what is there already may stay.

    :return: path of the contact sheet
    """
    sheet = datasets.contact_sheet_path(args.data_folder, name)
    if anew or not sheet.exists():
        draw_contact_sheet(
            sheet, datasets.CaptionDataset(datasets.split_path(args.data_folder, "train", name))
        )
    if args.dataset == "shapes":
        test = datasets.CaptionDataset(datasets.split_path(args.data_folder, "test", name))
        for i, picture in enumerate(test.image_names[:6]):
            path = datasets.pictures_folder(args.data_folder, name) / picture
            if anew or not path.exists():
                with utils.atomic_path(path) as temporary:
                    Image.fromarray(test.images([i])[0].transpose(1, 2, 0)).save(temporary)
    return sheet


def draw_contact_sheet(path, dataset, number=6):
    """Draw a few pictures spread over a split, as they are stored, with their captions."""
    from matplotlib.figure import Figure

    chosen = np.linspace(0, len(dataset) - 1, min(number, len(dataset))).round().astype(int)
    rows = -(-len(chosen) // 3)
    figure = Figure(figsize=(12, 0.5 + 5.6 * rows), layout="constrained")
    figure.suptitle(f"{dataset.name}: {dataset.split}\n", fontsize=11, parse_math=False)
    axes = figure.subplots(2 * rows, 3, squeeze=False, height_ratios=[3.6, 1.8] * rows)
    for axis in axes.flat:
        axis.axis("off")
    for place, (i, image) in enumerate(zip(chosen, dataset.images(chosen))):
        row, column = divmod(place, 3)
        axes[2 * row, column].imshow(image.transpose(1, 2, 0), interpolation="antialiased")
        axes[2 * row, column].set_title(
            textwrap.shorten(dataset.image_names[i], 48), fontsize=8, parse_math=False
        )
        texts = (
            textwrap.fill(
                textwrap.shorten(text, 150), 54, initial_indent="– ", subsequent_indent="   "
            )
            for text in dataset.raw_references[i][:5]
        )
        axes[2 * row + 1, column].text(
            0, 1, "\n".join(texts), fontsize=9, va="top", parse_math=False
        )
    with utils.atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        figure.savefig(temporary, dpi=100)


if __name__ == "__main__":
    utils.run(main, get_args_parser())
