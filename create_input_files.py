"""Prepare a data set: three HDF5 files of pictures and captions, and the word map.

python create_input_files.py                     # downloads Flickr8k to data/
python create_input_files.py --source downloads  # Flickr8k from what you have
python create_input_files.py --dataset shapes    # generated pictures
python create_input_files.py --dataset own --captions own.csv --images own
"""

import difflib
import sys
import time
import warnings
from pathlib import Path

if sys.flags.safe_path:
    sys.exit("create_input_files.py: error: unset PYTHONSAFEPATH, which hides this suite's files")

import utils
from captioning.run import command_line, files, machine, paths
from captioning.run.lazy import lazy
from utils import UserError

datasets, models, downloads, formats, records, contact_sheet = lazy(
    "datasets", "models", "captioning.data.downloads", "captioning.data.formats",
    "captioning.data.records", "captioning.report.contact_sheet",
)  # fmt: skip


def main(args):
    warnings.filterwarnings("ignore", module=r"PIL\.")  # we say ourselves what a picture lacks
    check_flags(args)
    name = paths.base_name(args.dataset, args.captions_per_image, args.min_word_freq)
    known, size = models.known_words(args.words_of) if args.words_of else (None, None)
    args.image_size = args.image_size or size or records.Settings().image_size
    if not args.force and is_prepared(args, name, known):
        draw_examples(args, name)  # an earlier run may have been killed before it drew them
        print(f"The files of {name} are in {args.data_folder} already; --force makes them again.")
        return
    start = time.monotonic()
    lost = records.Lost(paths.left_out_path(args.data_folder, name), args.skip_bad_pictures)
    with files.no_empty_folder(args.data_folder):
        pictures, notes, source = find_records(args, lost)
        files.check_disk(args.data_folder, len(pictures) * 3 * args.image_size**2)
        sizes = {"image_size": args.image_size, "captions_per_image": args.captions_per_image}
        limits = {"min_word_freq": args.min_word_freq, "max_len": args.max_len, "seed": args.seed}
        about = {"dataset": args.dataset, "source": source, "workers": args.workers, "lost": lost}
        summaries, word_map = datasets.write_dataset(
            args.data_folder, pictures, known=known, **about, **sizes, **limits
        )
    sheet = draw_examples(args, name, anew=True)
    for note in [*notes, *describe_losses(summaries, args), *lost.finish()]:
        print(f"Note: {note}.")
    print(describe(summaries, word_map, known, args))
    print(
        f"\nMade {name} in {args.data_folder} in {time.monotonic() - start:.0f} s. See {sheet}: "
        "are the pictures right, and do the captions fit them?"
    )


def find_records(args, lost):
    """:return: list of ``datasets.Record``, notes for the user, and where they come from"""
    return SOURCES.get(args.dataset, own)(args, lost)


def own(args, lost):
    """Pictures and captions of any name, in a format that ``formats`` knows."""
    found = datasets.custom_records(args.images, captions_of(args), args.seed, lost)
    return *found, formats.fingerprint(captions_of(args))


def generated(args, lost):
    """Pictures of coloured shapes, of which none is lost."""
    return *datasets.shapes_records(seed=args.seed, size=args.image_size), "generated"


def flickr8k(args, lost):
    """Flickr8k, of which is downloaded what is not there."""
    folders = args.source or [args.data_folder]
    if not args.source:
        found = zip(downloads.ARCHIVES, datasets.flickr8k_files(folders))  # pictures, captions
        downloads.download(args.data_folder, [archive for archive, path in found if not path])
    split = "official split" if datasets.flickr8k_files(folders)[2] else "split by seed"
    return *datasets.flickr8k_records(folders, args.seed, lost), f"Flickr8k, {split}"


# To add a source, add an entry: a name for --dataset, and a function that returns what
# ``find_records`` does, with a digest of the captions in its last part (``formats.fingerprint``).
SOURCES = {"flickr8k": flickr8k, "flickr30k": own, "coco": own, "shapes": generated}

NUMBERS = {  # flags: lowest, highest and default value, help
    "captions_per_image": (1, 100, 5, "captions to train on; more are drawn from by --seed"),
    "min_word_freq": (1, 10**6, 5, "rarer words of the training captions become <unk>"),
    "max_len": (1, 1000, 50, "do not train on captions of more words than this"),
    "image_size": (32, 1024, None, "side of the stored pictures (default: 256 pixels, or MODEL's)"),
    "seed": (0, 2**32 - 1, 0, "seed of everything that is drawn by lot"),
    "workers": (1, 256, len(machine.own_cores()), "threads that decode pictures"),
}


def get_args_parser():
    parser = command_line.ArgumentParser(__doc__)
    group = parser.add_argument_group("where the pictures and captions come from")
    lowered = lambda name: name.lower() if name.lower() in SOURCES else name
    text = f"{', '.join(SOURCES)} (shapes are generated), or a name for your own data"
    group.add_argument("--dataset", type=lowered, default="flickr8k", help=text)
    several = {"action": "extend", "type": Path, "nargs": "+"}
    text = "Flickr8k's archives or what they hold (default: in --data_folder, else downloaded)"
    group.add_argument("--source", **several, metavar="FOLDER", help=text)
    text = (
        "CSV with a header such as image,caption[,split], JSON with the same keys, name.jpg#0<TAB>"
        "caption, COCO's or Karpathy's JSON files, a folder of .txt; docs/guide.md has a table"
    )
    group.add_argument("--captions", "--karpathy_json", **several, metavar="FILE", help=text)
    text = (
        "folder or zip archive of pictures; without --captions a folder that holds metadata.csv or "
        ".jsonl, or a .txt beside each picture"
    )
    group.add_argument("--images", **several, metavar="FOLDER", help=text)
    group = parser.add_argument_group("what is made of them")
    group.add_argument("--data_folder", type=Path, default=Path("data"), help="where the files go")
    for flag, (low, high, default, text) in NUMBERS.items():
        bounds = command_line.bounded(int, low, high)
        group.add_argument(f"--{flag}", type=bounds, default=default, help=text)
    text = (
        "checkpoint, run's folder or word map of a model to go on from with train.py --init_from: "
        "its words keep their numbers and new ones follow; captioner is the suite's own"
    )
    group.add_argument("--words_of", type=Path, metavar="MODEL", help=text)
    text = "go on without pictures that are missing or cannot be read, however many"
    group.add_argument("--skip_bad_pictures", action="store_true", help=text)
    group.add_argument("--force", action="store_true", help="make the files again")
    return parser


def check_flags(args):
    """:raises UserError: if two flags contradict each other, or one is missing"""
    name, listed = f"--dataset {args.dataset}", args.images or args.captions
    is_own = SOURCES.get(args.dataset, own) is own
    paths.check_name(args.dataset, "--dataset", 64)
    near = difflib.get_close_matches(args.dataset.lower(), SOURCES, 1)
    hint = f"did you mean {near[0]}? Else" if near else "for your own data"
    for is_wrong, message in (
        (args.dataset == "shapes" and (listed or args.source), f"{name} takes no other data"),
        (args.source and is_own, f"--source is for Flickr8k, not for {name}"),
        (args.captions and not args.images, "--captions needs --images, the folder of pictures"),
        (listed and not is_own, f"{name} is for --source; give another name"),
        (not captions_of(args) and args.images, "--images needs --captions, or metadata in it"),
        (
            not listed and args.dataset in ("flickr30k", "coco"),
            f"{name} needs --captions and --images, such as dataset_{args.dataset}.json and FOLDER",
        ),
        (
            not listed and args.dataset not in SOURCES,
            f"{name} is none of {', '.join(SOURCES)}; {hint} give --images and --captions too",
        ),
    ):
        if is_wrong:
            raise UserError(message)


def captions_of(args):
    """The files of captions, or the folders of pictures that hold some."""
    return args.captions or [path for path in args.images or () if path.is_dir()]


def is_prepared(args, name, known):
    """Whether all files are there; raises UserError if they are broken or of other settings."""
    splits = [paths.split_path(args.data_folder, split, name) for split in datasets.SPLITS]
    word_map = paths.word_map_path(args.data_folder, name)
    if not all(path.exists() for path in [*splits, word_map]):
        return False
    try:
        word_map = datasets.load_word_map(word_map)
    except UserError as error:
        raise UserError(f"{error}; --force makes it again") from error
    wanted = {key: getattr(args, key) for key in ("max_len", "image_size", "seed")}
    # Flickr8k's archives need not be there any more; if they are, its lists may be new
    places = args.source or [args.data_folder]
    if args.images:
        wanted["source"] = formats.fingerprint(captions_of(args))
    elif args.dataset != "flickr8k" or all(datasets.flickr8k_files(places)[:2]):
        wanted["source"] = find_records(args, records.Lost())[2]
    wanted["words_of"] = datasets.word_map_digest(known) if known else ""
    for path in splits:
        dataset = datasets.CaptionDataset(path)
        dataset.check_word_map(word_map)
        for key, value in wanted.items():
            made = dataset.attributes.get(key, "")  # an earlier revision knew no words_of
            if made != value:
                what = f"{key} {made or 'none'}, not {value or 'none'}"
                if key == "words_of":  # digests, which tell nobody anything
                    what = f"{('another' if value else 'a') if made else 'no'} --words_of"
                advice = "give --force to make it again with these flags, or another --data_folder"
                raise UserError(f"{path} was made with {what}; {advice}")
    return True


def describe_losses(summaries, args):
    """:return: list of lines that say what was left out, and why"""
    lines, train = [], summaries["train"]
    for split, summary in summaries.items():
        for key, what in (
            ("empty", "left out, captions without a word"),
            ("too_long", "references only, and not trained on, captions longer than --max_len"),
            ("without_captions", "left out, pictures without a usable caption"),
        ):
            lines += [f"{split}: {what}: {summary[key]:,}"] * (summary[key] > 0)
        unreadable, most = [*summary["unreadable"].values()], records.MOST_NOTES
        lines += [f"{split}: left out, {message}" for message in unreadable[:most]]
        if len(unreadable) > most:
            lines.append(f"{split}: left out, {len(unreadable) - most:,} more that cannot be read")
    if summaries["val"]["pictures"] == 1:
        lines.append("val: CIDEr is always 0 on a split of one picture; choose the best by BLEU-4")
    if train["unknown"] > 0.2 * train["words"]:
        share = f"{train['unknown'] / train['words']:.0%} of the words of the training captions"
        lines.append(f"{share} are <unk>; lower --min_word_freq {args.min_word_freq}")
    return lines


def describe(summaries, word_map, known, args):
    """:return: table of what was written, as text"""
    lines = ["", "split   pictures   captions  references     words    <unk>       size"]
    for split, s in summaries.items():
        unknown, size = 100 * s["unknown"] / max(s["words"], 1), s["bytes"] / 1e6
        counts = f"{s['pictures']:>10,}{s['captions']:>11,}{s['references']:>12,}{s['words']:>10,}"
        lines.append(f"{split:<6}{counts}{unknown:>7.1f} %{size:>8,.0f} MB")
    words = f"{len(word_map) - 4:,} words and 4 special tokens. Words"
    if known:
        new = len(word_map) - len(known)
        words = f"the {len(known) - 4:,} words of {args.words_of}, {new:,} new and 4 special "
        words += "tokens. Other words"
    return "\n".join(lines) + (
        f"\nVocabulary: {words} that occur fewer than {args.min_word_freq:,} times in the training "
        "captions become <unk>."
    )


def draw_examples(args, name, anew=False):
    """Draw the contact sheet, and a few generated pictures for caption.py, if not there or anew.

    :return: path of the contact sheet
    """
    from PIL import Image

    sheet = paths.contact_sheet_path(args.data_folder, name)
    if anew or not sheet.exists():
        train = paths.split_path(args.data_folder, "train", name)
        contact_sheet.draw_contact_sheet(sheet, datasets.CaptionDataset(train))
    if args.dataset == "shapes":
        test = datasets.CaptionDataset(paths.split_path(args.data_folder, "test", name))
        for i, picture in enumerate(test.image_names[:6]):
            path = paths.pictures_folder(args.data_folder, name) / picture
            if anew or not path.exists():
                with files.atomic_path(path) as temporary:
                    Image.fromarray(test.images([i])[0].transpose(1, 2, 0)).save(temporary)
    return sheet


if __name__ == "__main__":
    utils.run(main, get_args_parser())
