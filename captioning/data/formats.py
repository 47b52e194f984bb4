"""Formats of caption files: which there are, and how a file or a folder of them is read."""

import hashlib
from pathlib import PurePosixPath

import regex

from captioning.data.csv_files import csv_rows
from captioning.data.finding import suffix, walk
from captioning.data.json_files import json_rows
from captioning.data.rows import SPLIT_NAMES, row_of
from captioning.data.text_files import read_text
from captioning.run.messages import UserError


def read_rows(path, notes):
    """Yield the rows of a file of captions; its content tells its format, see ``READERS``.

    A row is a :class:`Record` without its picture, after the file and line where it stands.

    :param path: the file; or a folder, see ``caption_files``, with folders for the splits, if any
    :param notes: list to which notes for the user are added
    :raises UserError: if the file is malformed (the line is named)
    """
    if not path.is_dir():
        text = read_text(path)
        read = next(read for form, read in READERS if regex.match(form, text.lstrip()[:1000]))
        yield from read(text, path, notes)
        return
    files = caption_files(path)
    if not files:
        what = "holds no metadata.csv or .jsonl, and no .txt beside each picture"
        raise UserError(f"{path.absolute()} {what}; give --captions FILE")
    for name, picture in files.items():
        rows = read_rows(path / name, notes) if picture is None else _lines(path / name, picture)
        for where, row in rows:
            place = PurePosixPath(name).parent / row.name.replace("\\", "/")
            splits = [row.split, *(SPLIT_NAMES.get(part.lower()) for part in place.parts[:-1])]
            split = next(filter(None, splits), None)
            yield where, row._replace(name=str(place), split=split)


def caption_files(folder):
    """The files of captions in a folder: Hugging Face's metadata, or a text for each picture.

    :return: dict of names in the folder, to None for each ``metadata.csv`` and ``metadata.jsonl``.
        If there are none, of each ``.txt`` beside a picture of its name, to the name of that; or in
        a folder without pictures, of each ``.txt``, to its own name without ``.txt``
    """
    names = [name for name, _ in walk(folder)]
    names = [n for n in names if not n.rpartition("/")[2].startswith("._")]  # macOS adds these
    metadata = [n for n in names if n.rpartition("/")[2] in ("metadata.csv", "metadata.jsonl")]
    if metadata:
        return dict.fromkeys(metadata)
    pictures = {stem: n for n in names if suffix(n) for stem in (n, n[: -len(suffix(n))])}
    stems = {name: name[:-4] for name in names if name.lower().endswith(".txt")}
    described = {
        name: pictures.get(stem, None if pictures else stem) for name, stem in stems.items()
    }
    return {name: of.rpartition("/")[2] for name, of in described.items() if of}


def fingerprint(paths):
    """The names of files and folders of captions, with a digest of what is in them."""
    names = []
    for path in paths:
        digest, files = hashlib.sha256(), caption_files(path) if path.is_dir() else [""]
        try:
            for name in files:
                digest.update(name.encode("utf-8", "replace") + (path / name).read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {path.absolute()}: {error.strerror or error}") from error
        names.append(f"{path.name} (SHA-256 {digest.hexdigest()[:12]})" if files else path.name)
    return ", ".join(names)


def _lines(path, picture):
    """Rows of a text that describes one picture, a caption a line."""
    lines = enumerate(read_text(path).split("\n"), 1)
    captions = [(number, line) for number, line in lines if line.strip()] or [(1, "")]
    for number, line in captions:
        yield row_of([("image", picture), ("caption", line)], f"{path}, line {number}")


def _token_rows(text, path, notes):
    """Flickr8k's and Flickr30k's own format, ``name.jpg#0<TAB>caption``, and Flickr8k-CN's."""
    for number, line in enumerate(text.split("\n"), 1):
        found, where = _TOKEN.fullmatch(line.rstrip("\r")), f"{path}, line {number}"
        if found:
            yield row_of([("image", found["name"]), ("caption", found["caption"])], where)
        elif line.strip():
            raise UserError(f"{where}: expected name.jpg#0<TAB>caption, found {line[:80]!r}")


# between a tab and the number, or a space where the name has a suffix: dog.jpg#zhc#0 a dog
_TOKEN = regex.compile(
    r"\s*(?<name>\S[^\t\n]*?)\s*#\s*(?:\w+#)?\d+"
    r"(?:\s*\t|(?<=\.\w+#(?:\w+#)?\d+)\s+)(?<caption>.*)"
)

READERS = ((r"[\[{]", json_rows), (_TOKEN.pattern, _token_rows), ("", csv_rows))  # by beginnings
