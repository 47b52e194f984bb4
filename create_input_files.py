"""Prepare a data set: three HDF5 files of pictures and captions, and the word map.

python create_input_files.py                     # Flickr8k, downloaded to data/
python create_input_files.py --source downloads  # Flickr8k from what you have
python create_input_files.py --dataset shapes    # generated pictures
python create_input_files.py --dataset own --captions own.csv --images own
"""

import contextlib
import difflib
import errno
import hashlib
import http.client
import os
import re
import sys
import textwrap
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import lazy_loader as lazy

if sys.flags.safe_path:
    sys.exit("create_input_files.py: error: unset PYTHONSAFEPATH, which hides this suite's files")
import utils
from utils import UserError

datasets = lazy.load("datasets")  # loaded when first used: --help need not wait for it


def main(args):
    warnings.filterwarnings("ignore", module=r"PIL\.")  # we say ourselves what a picture lacks
    check_flags(args)
    name = datasets.base_name(args.dataset, args.captions_per_image, args.min_word_freq)
    if not args.force and is_prepared(args, name):
        draw_examples(args, name)  # they are there, unless an earlier run was killed before
        print(f"The files of {name} are in {args.data_folder} already; --force makes them again.")
        return
    start = time.monotonic()
    with no_empty_folder(args.data_folder):
        records, notes, source = find_records(args)
        utils.check_disk(args.data_folder, len(records) * 3 * args.image_size**2)
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
    for note in [*notes, *describe_losses(summaries, args)]:
        print(f"Note: {note}.")
    print(describe(summaries, word_map, args))
    print(
        f"\nMade {name} in {args.data_folder} in {time.monotonic() - start:.0f} s. Look at {sheet}: "
        "are the pictures right, and do the captions fit them?"
    )


def find_records(args):
    """:return: list of ``datasets.Record``, notes for the user, and in words where they come from"""
    if args.dataset == "shapes":
        return *datasets.shapes_records(seed=args.seed, size=args.image_size), "generated"
    if args.images:
        captions = captions_of(args)
        return *datasets.custom_records(args.images, captions, args.seed), name_of(captions)
    folders = args.source or [args.data_folder]
    missing = datasets.missing_flickr8k_archives(folders)
    if missing and args.source:
        where, lacking = " ".join(str(f.absolute()) for f in folders), " and ".join(missing)
        raise UserError(
            f"{where} lacks {lacking} (packed or unpacked); leave out --source to download"
        )
    download(args.data_folder, missing)
    split = "official split" if datasets.flickr8k_split_lists(folders) else "split by seed"
    return *datasets.flickr8k_records(folders, args.seed), f"Flickr8k, {split}"


# ---------------------------------------------------------------- beyond the main path

KNOWN = ("flickr8k", "flickr30k", "coco", "shapes")


def get_args_parser():
    examples = __doc__.strip().partition("\n\n")[2]
    parser = utils.ArgumentParser(description=__doc__.split("\n")[0], examples=examples)
    group = parser.add_argument_group("where the pictures and captions come from")
    group.add_argument(
        "--dataset",
        type=lambda name: name.lower() if name.lower() in KNOWN else name,
        default="flickr8k",
        metavar="NAME",
        help="flickr8k, flickr30k, coco, shapes (generated), or a name for your own data",
    )
    group.add_argument(
        "--source",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="folder with Flickr8k's archives, with what they unpack to, or with Kaggle's Flickr8k; "
        "if not given, they are looked for in --data_folder and downloaded to it",
    )
    group.add_argument(
        "--captions",
        "--karpathy_json",
        action="extend",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="captions, with --images: CSV with the header image,caption[,split], JSON with the same keys, "
        "name.jpg#0<TAB>caption, COCO's or Karpathy's JSON files, Kaggle's Flickr30k",
    )
    group.add_argument(
        "--images",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="folder or zip archive of the pictures; without --captions a Hugging Face image folder, "
        "which holds metadata.csv or metadata.jsonl",
    )
    group = parser.add_argument_group("what is made of them")
    group.add_argument(
        "--data_folder",
        type=Path,
        default=Path("data"),
        metavar="FOLDER",
        help="folder that the files are written to",
    )
    for flag, low, high, default, text in (
        (
            "captions_per_image",
            1,
            100,
            5,
            "captions of each picture to train on; more are drawn from by --seed",
        ),
        (
            "min_word_freq",
            1,
            10**6,
            5,
            "rarer words of the training captions become <unk>; raise it for a smaller vocabulary",
        ),
        ("max_len", 1, 1000, 50, "do not train on captions of more words than this"),
        ("image_size", 32, 1024, 256, "side of the stored pictures, in pixels"),
        ("seed", 0, 2**32 - 1, 0, "seed of everything that is drawn by lot"),
        ("workers", 1, 256, utils.available_cores(), "threads that decode pictures"),
    ):
        group.add_argument(
            f"--{flag}", type=utils.bounded(int, low, high), default=default, metavar="N", help=text
        )
    group.add_argument(
        "--force", action="store_true", help="make the files again if they are there"
    )
    return parser


def check_flags(args):
    """:raises UserError: if two flags contradict each other, or one is missing"""
    datasets.check_name(args.dataset, "--dataset", 64)
    own, close = (
        args.dataset not in KNOWN,
        difflib.get_close_matches(args.dataset.lower(), KNOWN, 1),
    )
    for is_wrong, message in (
        (
            args.dataset == "shapes" and (args.images or args.captions or args.source),
            "--dataset shapes is generated: leave out --source, --images and --captions",
        ),
        (
            args.source and (args.images or args.captions or args.dataset != "flickr8k"),
            "--source is for Flickr8k; other data is given by --images and --captions",
        ),
        (
            args.captions and not args.images,
            "--captions needs --images, the folder of the pictures",
        ),
        (
            args.images and not captions_of(args),
            "--images needs --captions, unless it is a Hugging Face image folder",
        ),
        (
            not args.images and args.dataset in ("flickr30k", "coco"),
            f"--dataset {args.dataset} needs --captions and --images, for instance --captions "
            f"dataset_{args.dataset}.json --images FOLDER",
        ),
        (
            not args.images and own,
            f"--dataset {args.dataset} is none of {', '.join(KNOWN)}"
            + (f" (did you mean {close[0]}?)" if close else "")
            + "; for your own data give --images and --captions too",
        ),
        (
            args.images and args.dataset == "flickr8k",
            "--images with --dataset flickr8k: give your own data another name, and Flickr8k's folder by --source",
        ),
    ):
        if is_wrong:
            raise UserError(message)


def captions_of(args):
    """The files of captions, or the folders of pictures that hold some."""
    return args.captions or [path for path in args.images if path.is_dir()]


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
    source = args.images and name_of(captions_of(args))
    for path in paths:
        dataset = datasets.CaptionDataset(path)
        dataset.check_word_map(word_map)
        made = dataset.attributes
        for key in ("max_len", "image_size", "seed"):
            if made[key] != getattr(args, key):
                raise UserError(
                    f"{path} was made with --{key} {made[key]}, not {getattr(args, key)}; give "
                    "--force to make it again, or another --data_folder"
                )
        if source and made["source"] != source:
            raise UserError(
                f"{path} was made from {made['source']}, not {source}; give --force to make it "
                "again, or another --dataset name"
            )
    return True


def name_of(paths):
    """The names of files, and something that changes with what is in them."""
    names = []
    for path in paths:
        try:
            content = b"" if path.is_dir() else path.read_bytes()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot read {path.absolute()}: {reason}") from error
        digest = f" (SHA-256 {hashlib.sha256(content).hexdigest()[:12]})" if content else ""
        names.append(f"{path.name}{digest}")
    return ", ".join(names)


@contextlib.contextmanager
def no_empty_folder(folder):
    """Remove the folders that a failure left empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it is not there, or not empty
                path.rmdir()


# ---------------------------------------------------------------------------------------- download

BASE_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
ARCHIVES = {  # name: MD5, bytes (about)
    "Flickr8k_Dataset.zip": ("f18a1e2920de5bd84dae7cf08ec78978", 1_115_000_000),
    "Flickr8k_text.zip": ("bf6c1abcb8e4a833b7f922104de18627", 2_340_000),
}


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
    utils.check_disk(folder, sum(archives[name][1] for name in names))
    for name in names:
        md5, size = archives[name]
        path, part = Path(folder) / name, Path(folder) / f"{name}.part"
        for attempt in range(attempts):
            time.sleep(pause * 2 ** (attempt - 1) if attempt else 0)
            try:
                _fetch(base_url + name, part, size, timeout)
                with open(part, "rb") as file:
                    digest = hashlib.file_digest(file, "md5").hexdigest()
                if digest != md5:
                    part.unlink()
                    raise OSError("what arrived has another MD5 checksum")
                os.replace(part, path)
                break
            except UserError:
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:
                number = getattr(error, "errno", None)
                if number in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
                    problem = f"cannot write {part}: {error.strerror}"
                    raise UserError(f"{problem}; make room or check your rights") from error
                problem = datasets.clean_caption(str(error)) or type(error).__name__
                if getattr(error, "code", None) in (401, 403, 404, 410) or attempt == attempts - 1:
                    raise UserError(
                        f"cannot download {base_url}{name}: {problem}. Run the command again to "
                        f"continue, or put {' and '.join(archives)} into {folder} by hand, or name "
                        "their folder with --source; --dataset shapes needs no download"
                    ) from error


def _fetch(url, part, size, timeout):
    """Continue ``part`` with what it lacks."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:
            return  # nothing is left to send: the checksum will tell whether all is well
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise OSError("the server sent a web page instead of the archive")
        sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        start = int(sent[1]) if response.status == 206 and sent else 0
        if start != have:
            have = 0
            part.unlink(missing_ok=True)
            if start:
                raise OSError("the server sent another part of the archive than it was asked for")
        total = None if response.length is None else have + response.length
        if max(have, total or 0) > 2 * size:
            raise OSError(f"the server says that it sends {total:,} bytes, expected about {size:,}")
        utils.check_disk(part.parent, (total or size) - have)
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


# ----------------------------------------------------------------------------------------- summary


def describe_losses(summaries, args):
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
            lines.append(f"{split}: left out, {len(unreadable) - 20:,} more that cannot be read")
    train = summaries["train"]
    if train["unknown"] > 0.2 * train["words"]:
        lines.append(
            f"{train['unknown'] / train['words']:.0%} of the words of the training captions are <unk>, since they occur "
            f"fewer than {args.min_word_freq} times; lower --min_word_freq, or give more captions"
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
        f"Vocabulary: {len(word_map) - 4:,} words and 4 special tokens. Words that occur fewer than "
        f"{args.min_word_freq:,} times in the training captions become <unk>."
    )
    return "\n".join(lines)


def draw_examples(args, name, anew=False):
    """Draw the contact sheet, and write a few generated test pictures for caption.py.

    :param anew: even if they are there
    :return: path of the contact sheet
    """
    from PIL import Image

    sheet = datasets.contact_sheet_path(args.data_folder, name)
    if anew or not sheet.exists():
        train = datasets.split_path(args.data_folder, "train", name)
        draw_contact_sheet(sheet, datasets.CaptionDataset(train))
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
    import numpy as np
    from matplotlib.figure import Figure

    chosen = np.linspace(0, len(dataset) - 1, min(number, len(dataset))).round().astype(int)
    rows = -(-len(chosen) // 3)
    figure = Figure(figsize=(12, 0.5 + 5.6 * rows), layout="constrained")
    figure.suptitle(f"{dataset.name}: {dataset.split}\n", fontsize=11, parse_math=False)
    axes = figure.subplots(2 * rows, 3, squeeze=False, height_ratios=[3.6, 1.8] * rows)
    for axis in axes.flat:
        axis.axis("off")
    for place, (i, image) in enumerate(zip(chosen, dataset.images(chosen))):
        shown, below = axes[2 * (place // 3), place % 3], axes[2 * (place // 3) + 1, place % 3]
        shown.imshow(image.transpose(1, 2, 0), interpolation="antialiased")
        title = textwrap.shorten(dataset.image_names[i], 48)
        shown.set_title(title, fontsize=8, parse_math=False)
        texts = (textwrap.shorten(text, 150) for text in dataset.raw_references[i][:5])
        marks = {"initial_indent": "– ", "subsequent_indent": "   "}
        text = "\n".join(textwrap.fill(text, 54, **marks) for text in texts)
        below.text(0, 1, text, fontsize=9, va="top", parse_math=False)
    with utils.atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        figure.savefig(temporary, dpi=100)


if __name__ == "__main__":
    utils.run(main, get_args_parser())
