"""What every file of the suite is called."""

from pathlib import Path

from captioning.run.lazy import lazy
from captioning.run.messages import UserError

(regex,) = lazy("regex")

DEFAULT_CAPTIONER = Path(__file__).parents[2] / "docs" / "captioner" / "flickr8k.pth.tar"

# Each gives the path of a file in a folder; `name` is what all files of a data set share.
split_path = lambda folder, split, name: Path(folder) / f"{split.upper()}_{name}.hdf5"
word_map_path = lambda folder, name: Path(folder) / f"WORDMAP_{name}.json"
contact_sheet_path = lambda folder, name: Path(folder) / f"CONTACT_SHEET_{name}.png"
left_out_path = lambda folder, name: Path(folder) / f"LEFT_OUT_{name}.txt"  # lost pictures
pictures_folder = lambda folder, name: Path(folder) / f"PICTURES_{name}"  # generated ones, as PNG
features_path = lambda at, name, split, key: Path(at) / f"FEATURES_{split.upper()}_{name}_{key}.npy"

checkpoint_path = lambda at, name, best=False: (
    Path(at) / f"{'BEST_' * best}checkpoint_{name}.pth.tar"
)

log_path = lambda folder, name: Path(folder) / f"log_{name}.jsonl"
curves_path = lambda folder, name: Path(folder) / f"curves_{name}.png"
captions_path = lambda at, name, split, beam: Path(at) / f"captions_{split}_{name}_beam{beam}.json"
metrics_path = lambda folder, name, split: Path(folder) / f"metrics_{split}_{name}.json"
scores_path = lambda folder, name, split: Path(folder) / f"scores_{split}_{name}.csv"
attention_path = lambda folder, image, suffix: Path(folder) / f"{image}_attention.{suffix}"
lock_path = lambda path: Path(path).with_name(f".{Path(path).name}.lock")


def base_name(dataset, captions_per_image, min_word_freq):
    """Name that all files of one data set share: ``flickr8k_5_cap_per_img_5_min_word_freq``."""
    return f"{dataset}_{captions_per_image}_cap_per_img_{min_word_freq}_min_word_freq"


def check_name(name, what="the data's name", longest=120):
    """:raises UserError: if a name cannot be part of a file's name or leads to another folder"""
    pattern = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{longest - 1}}}"
    if not isinstance(name, str) or not regex.fullmatch(pattern, name):
        known = f"at most {longest} letters, digits, dots, dashes and underscores"
        raise UserError(f"{what} {name!r}: expected {known}, since files are called by it")
