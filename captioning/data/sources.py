"""Sources of captioned pictures: one's own, or Flickr8k, as lists of records."""

import collections
import functools
import hashlib
import math

from captioning.data.finding import Pictures, as_list, open_zip, parts_of
from captioning.data.formats import read_rows
from captioning.data.pictures import open_image
from captioning.data.records import MOST_NOTES, SPLITS, Lost, Record
from captioning.data.rows import SPLIT_NAMES, split_of
from captioning.data.text_files import read_text
from captioning.run.messages import UserError, counted


def custom_records(images, captions, seed, lost=None):
    """The user's own pictures and captions, or a published data set in one of the known formats.

    :param images: folder or zip archive of the pictures, or a list of them
    :param captions: file of captions, or a list of them, see ``READERS`` and :func:`read_rows`
    :param seed: pictures without a split are dealt out with it, see ``_deal_splits``
    :param lost: :class:`Lost`, which decides whether too many pictures are missing
    :return: list of :class:`Record`, list of notes for the user
    :raises UserError: if a row is malformed (its line is named) or the pictures are not there
    """
    notes, captions = [], as_list(captions)
    splits = _splits_of_files(captions)
    rows = (
        (line, row if row.split else row._replace(split=split))
        for path, split in zip(captions, splits)
        for line, row in _named_rows(path, notes, len(captions) > 1 and path in as_list(images))
    )
    pictures, where = Pictures(images), ", ".join(map(str, captions))
    records, notes = _records(rows, pictures, where, seed, notes, lost or Lost())
    if pictures.count > len(records):
        unused = counted(pictures.count - len(records), "picture")
        notes.append(f"{unused} of {pictures.places} without a caption in {where}: left out")
    return records, notes


def _named_rows(path, notes, is_one_of_several):
    """The rows of a file or folder; of several folders of pictures each may have its own 0.jpg."""
    for line, row in read_rows(path, notes):
        name = f"{path.absolute().name}/{row.name}" if is_one_of_several else row.name
        yield line, row._replace(name=name)


def _splits_of_files(paths):
    """The split of each file or folder of captions that its name or its folder's tells, or None.

    One file alone is the whole data set, whatever its name. Where no file is called test, those for
    validation, such as COCO's, are left to be dealt out to both.
    """
    paths = [path.absolute() for path in paths]
    splits = [split_of(path.name) or split_of(path.parent.name) for path in paths]
    if "train" not in splits:
        return [None] * len(splits)
    return [split if "test" in splits or split == "train" else None for split in splits]


def flickr8k_records(folder, seed=0, lost=None):
    """Flickr8k, with its official split if the lists of it are there.

    :param folder: holds ``Flickr8k_Dataset.zip`` and ``Flickr8k_text.zip`` (read in place), what
        they unpack to, or Kaggle's ``Images`` and ``captions.txt``; or a list of such folders
    :param seed: without lists the pictures are dealt out with it, see ``_deal_splits``
    :param lost: :class:`Lost`, which decides whether too many pictures are missing
    :return: list of :class:`Record`, list of notes for the user
    :raises UserError: if something is missing or damaged
    """
    notes, captions, lost = [], collections.defaultdict(list), lost or Lost()
    where = ", ".join(str(place.absolute()) for place in as_list(folder))
    images, source, lists = flickr8k_files(folder)
    if not images or not source:
        raise UserError(
            f"{where} is not the whole of Flickr8k: expected Flickr8k_Dataset.zip and "
            "Flickr8k_text.zip, packed or unpacked, or Kaggle's Images and captions.txt"
        )
    for _, row in read_rows(source, notes):
        captions[row.name] += row.captions
    names = [(name.strip(), s) for s in lists for name in read_text(lists[s]).split("\n")]
    names = names or [(name, None) for name in captions]
    rows = [(where, Record(name, split, captions[name])) for name, split in names if name]
    mute = [row.name for _, row in rows if not row.captions]
    notes += _check_missing(mute, len(rows), source, lost)
    if not lists:
        notes.append("for the official split put Flickr8k_text.zip beside captions.txt")
    return _records(rows, Pictures(images), where, seed, notes, lost)


def flickr8k_files(folder):
    """What there is of Flickr8k in a folder or a list of folders; texts may lie one folder above.

    :return: path of the pictures, path of the captions (None for what is missing), and dict of
        the official split's names to the paths of its lists (empty unless all are there)
    """
    places = as_list(folder)
    texts = [*places, *(place.absolute().parent for place in places)]
    archive = _first(texts, ["Flickr8k_text.zip"])
    texts += [open_zip(archive)] if archive else []
    text = lambda name: _first(texts, [name, f"Flickr8k_text/{name}"])
    folders = ["Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images"]
    images = _first(places, [*folders, "Flickr8k_Dataset.zip"])
    captions = text("Flickr8k.token.txt") or _first(places, ["captions.txt"])
    lists = [text(f"Flickr_8k.{part}Images.txt") for part in ("train", "dev", "test")]
    return images, captions, dict(zip(SPLITS, lists)) if all(lists) else {}


def _first(places, names):
    """The first path that exists in one of the folders, or is one of the places itself; or None."""
    paths = (place if place.name == name else place / name for place in places for name in names)
    return next((path for path in paths if path.exists()), None)


def _records(rows, pictures, where, seed, notes, lost):
    """Gather rows by picture, find the pictures, and deal out those without a split.

    :param rows: iterable of (file and line, or another place; :class:`Record`)
    :return: list of :class:`Record`, list of all notes
    """
    gathered, repeated = {}, 0
    for line, row in rows:
        known = gathered.setdefault(row.name, row)
        if row.split and known.split and row.split != known.split:
            message = f"{row.name} is in {row.split} here, but in {known.split} above"
            raise UserError(f"{line}: {message}")
        if known is not row:
            new = [text for text in row.captions if text not in known.captions]
            repeated += len(row.captions) - len(new)
            captions, split = known.captions + new, known.split or row.split
            gathered[row.name] = known._replace(captions=captions, split=split)
    described = {name: row for name, row in gathered.items() if row.captions}
    if not described:
        raise UserError(f"{where} holds no caption; expected a row for each")
    records, missing, used = [], [], {}
    for name, row in described.items():
        path = pictures.find(name)
        if path is None:
            missing.append(name)
        elif used.setdefault(path, name) != name:
            raise UserError(f"{where} calls {path} both {used[path]!r} and {name!r}; use one name")
        else:
            image = functools.partial(open_image, path)
            records.append(row._replace(image=image))
    # what is missing or has no word takes no place in a split that is dealt out
    told = {record.name for record in records if any(map(str.strip, record.captions))} or gathered
    named = {name: row.split for name, row in gathered.items() if row.split or name in told}
    if not any(named.values()):
        named, told = _by_folders(named)
        notes = [*notes, *told]
    splits, dealt = _deal_splits(named, seed)
    records = [record._replace(split=splits.get(record.name, "train")) for record in records]
    places, examples = pictures.places, pictures.examples
    notes = [*notes, *dealt, *_check_missing(missing, len(described), places, lost, examples)]
    if mute := len(gathered) - len(described):
        notes.append(f"{counted(mute, 'picture')} without a caption in {where}: left out")
    if repeated:
        rows = f"{counted(repeated, 'row')} of {where}"
        notes.append(f"{rows} with a caption that the picture has already: left out")
    return records, notes


def _by_folders(names):
    """The splits that the folders of pictures' names tell, if some are for training, some not.

    :return: dict of the names to splits or None, list of notes
    """
    words = {name: map(str.lower, parts_of(name)[:-1]) for name in names}
    splits = {n: next(filter(None, map(SPLIT_NAMES.get, of)), None) for n, of in words.items()}
    if "train" not in splits.values() or len({*splits.values()} - {None}) < 2:
        return dict.fromkeys(names), []
    return splits, ["no split is named: it was taken from the pictures' folders, such as train"]


def _check_missing(missing, total, where, lost, there=()):
    """Notes on a few missing pictures; raises UserError if they are too many.

    :param there: names of some pictures that are there
    """
    hint = "; is it the right folder, and whole?"
    if there:
        hint += f" It has {', '.join(map(repr, there))}"
    why = f"is missing in {where} (or has no caption)"
    what = f"are missing in {where} (or have no captions)"
    lost.add(dict.fromkeys(missing, why), total, what, hint)
    lost.check()
    notes = [f"{name!r} {why}; left out" for name in missing[:MOST_NOTES]]
    return notes + [f"{len(missing) - MOST_NOTES:,} more are missing"] * (len(missing) > MOST_NOTES)


def _deal_splits(splits, seed):
    """Deal out the pictures whose source names no split, by the order of their names' hashes.

    Without any split: 80 % train, 10 % val, 10 % test. If there is a training split, but no val or
    test, these get the pictures without a split, or else 10 % of the training pictures each.

    :param splits: dict of names to splits or None
    :return: the same without None, list of notes
    """
    lacking = [split for split in ("test", "val") if split not in splits.values()]
    train, pool = ([n for n, split in splits.items() if split == s] for s in ("train", None))
    size = max(1, round(len(pool or train) / 10))  # of each part but the last, in pictures
    if pool and lacking and train:
        size = math.ceil(len(pool) / len(lacking))
    pool, parts = pool or (train if lacking else []), lacking or ["test", "val"]
    pool.sort(key=lambda n: hashlib.sha256(f"{seed}/{n}".encode("utf-8", "replace")).digest())
    dealt = {name: [*parts, "train"][min(i // size, len(parts))] for i, name in enumerate(pool)}
    counts = collections.Counter(dealt.values())
    said = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS if counts[split])
    what = f"no split is named for {len(pool):,} pictures: they"
    if pool and None not in splits.values():
        what = f"no picture is named {' or '.join(lacking)}: the {len(pool):,} of train"
    note = f"{what} are dealt out by --seed {seed} as {said}"
    return {**splits, **dealt}, [note] * bool(pool)
