"""Where pictures are: in folders, in archives, behind patterns."""

import collections
import contextlib
import fnmatch
import glob
import os
import tarfile
import unicodedata
import zipfile
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from captioning.data.pictures import HOW_TO_READ_HEIC, PICTURE_SUFFIXES, learn_heic
from captioning.run.messages import UserError, counted, note, printable, why


def open_zip(path):
    """A zip archive as the ``zipfile.Path`` of its root."""
    try:
        return zipfile.Path(path)
    except Exception as error:  # zipfile raises several types on damaged archives
        what, advice = "not a whole zip archive", "delete it and download it again"
        if Path(path).suffix.lower() in PICTURE_SUFFIXES:
            what, advice = "a picture", "give its folder"
        with contextlib.suppress(OSError):
            if tarfile.is_tarfile(path):
                what, advice = "a tar archive", f"unpack it (tar -xf {path}) and give the folder"
        raise UserError(f"{path} is {what} ({why(error)}); {advice}") from error


def walk(folder, above=()):
    """The files below a folder in order of their names, through links too, as (name, real path).

    A folder that is linked into itself is not entered again, one that may not be read not at all.

    :raises UserError: if ``folder`` itself may not be read
    """
    real = os.path.realpath(folder)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        if not above:
            raise UserError(f"cannot read {folder}: {error.strerror or error}") from error
        return
    for entry in entries:
        is_link = entry.is_symlink()
        path = os.path.realpath(entry.path) if is_link else os.path.join(real, entry.name)
        if not (os.path.isdir(path) if is_link else entry.is_dir()):
            if not is_link or os.path.exists(path):
                yield entry.name, path
        elif path not in (*above, real):
            for name, path in walk(entry.path, (*above, real)):
                yield f"{entry.name}/{name}", path


class Pictures:
    """The files of folders and zip archives, found by the longest common end of their paths.

    Only what was seen while listing is ever opened, so no name from a caption file leads outside.
    """

    def __init__(self, places):
        self.places = ", ".join(map(str, as_list(places)))  # for messages
        self._files = collections.defaultdict(list)  # by the last part or two, see ``normal``
        pictures = {}  # real paths of those that have a known suffix to their names
        for place in as_list(places):
            if place.is_file():
                archive, root = open_zip(place).root, place.with_suffix("")
                members = [name for name in archive.namelist() if not name.endswith("/")]
                files = [(name, zipfile.Path(archive, name), f"{place}/{name}") for name in members]
            elif place.is_dir():
                files, root = [(name, place / name, real) for name, real in walk(place)], place
            else:
                raise UserError(f"there is no folder and no zip archive {place.absolute()}")
            for name, path, real in files:
                parts = parts_of(name)
                if not parts or "__MACOSX" in parts or parts[-1].startswith("._"):
                    continue  # macOS adds the last two
                whole = parts_of(os.path.abspath(root)) + parts
                file, same = File(path, real, whole, len(parts)), normal(whole)
                for count in (1, 2):
                    self._files[tuple(same[-count:])].append(file)
                if suffix(name):
                    pictures.setdefault(real, name)
        self.count, self.examples = len(pictures), list(pictures.values())[:3]

    def find(self, name):
        """The path of a picture by its name or the end of its path; None if it is not there.

        Case and Unicode's composition (NFC, NFD) do not matter, and a suffix may be missing.

        :raises UserError: if several match equally well
        """
        wanted = parts_of(name) or ("",)
        files = self._files.get(tuple(normal(wanted)[-2:]), ())
        fits = [(_fit(file, wanted), file) for file in files]
        best = max((fit for fit, _ in fits if fit), default=None)
        files = [file for fit, file in fits if fit and fit == best]
        for other in files[1:]:
            if other.real != files[0].real:
                several = f"{files[0].path} or {other.path}"
                raise UserError(f"{name!r} may be {several}: give more of its path")
        return files[0].path if files else None


class File(NamedTuple):
    """A file in one of the places that a user gave."""

    path: object  # or the ``zipfile.Path`` of an archive's member
    real: str  # without links: files are the same if this is
    whole: tuple  # parts of the whole path, an archive taken for a folder
    depth: int  # how many of these are below the place


class Fit(NamedTuple):
    """How well a file fits a name; compared in this order, the greater the better."""

    common: int  # parts of both paths that are equal, counted from their ends
    is_complete: bool  # these are all parts of the file below the place
    exact: int  # as ``common``, but case, composition and suffix count


def _fit(file, wanted):
    """The ``Fit`` of a file and the parts of a name; None if it is the name of another file."""
    suffixes = {suffix(file.whole[-1]), suffix(wanted[-1])} - {""}
    common = _common_end(normal(file.whole), normal(wanted))
    # the paths may differ only above the place, or where the name is shorter
    is_same = common == len(wanted) or common >= max(file.depth, 2)
    if len(suffixes) > 1 or not is_same:  # 0.jpg is not 0.png
        return None
    return Fit(common, common == file.depth, _common_end(file.whole, wanted))


def _common_end(a, b):
    """How many items two sequences share at their ends."""
    return len(os.path.commonprefix([a[::-1], b[::-1]]))


as_list = lambda paths: [*map(Path, paths if isinstance(paths, (list, tuple)) else [paths])]
parts_of = lambda name: tuple(p for p in name.replace("\\", "/").split("/") if p not in ("", "."))
suffix = lambda name: s if (s := os.path.splitext(name)[1].lower()) in PICTURE_SUFFIXES else ""


def normal(parts):
    """Parts of a path as they are compared: in one case and composition, without suffix."""
    stem = parts[-1][: len(parts[-1]) - len(suffix(parts[-1]))]
    return [unicodedata.normalize("NFC", part).casefold() for part in (*parts[:-1], stem)]


def find_pictures(patterns, recursive=False):
    """Files named by paths, folders and patterns, each once, in order.

    :raises UserError: if one of them matches no picture
    """
    paths = {}
    for pattern in map(os.path.expanduser, patterns):  # no shell does it within quotes
        path, skipped = Path(pattern), ""
        try:
            if path.is_dir():
                files, skipped = _pictures_of(path, recursive)
            else:
                files = [path] if path.exists() else _matches(pattern, recursive)
        except (OSError, ValueError) as error:  # a name too long, a folder that may not be read
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--img {pattern}: {reason}") from error
        if not files:
            what = f"is a folder without pictures{skipped}" if path.is_dir() else "matches no file"
            raise UserError(f"--img {pattern}: {what}; expected pictures, folders or patterns")
        if skipped:
            note(f"in {printable(path)}{skipped}")
        for file in files:
            paths.setdefault(os.path.realpath(file), file)
    return list(paths.values())


def _pictures_of(folder, recursive):
    """The pictures of a folder, and what else lies in it, by kind and number."""
    Image.init()
    readable = {name for name in Image.OPEN if Image.MIME.get(name, "").startswith("image/")}
    files, skipped = [], collections.Counter()
    inside = (folder / name for name, _ in walk(folder))
    for path in inside if recursive else sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        is_heic = suffix in (".heic", ".heif")
        if path.is_dir():
            skipped["sub-folder"] += 1
        elif any(part.startswith(".") for part in path.relative_to(folder).parts):
            skipped["hidden file"] += 1
        elif _is_drawing(path):
            skipped["attention drawing"] += 1
        elif not path.is_file():
            skipped["broken link"] += 1
        elif learn_heic() if is_heic else Image.registered_extensions().get(suffix) in readable:
            files.append(path)
        else:
            skipped[suffix or "without an ending"] += 1
    # the other kinds are endings
    things = ("sub-folder", "hidden file", "attention drawing", "broken link")
    named = lambda kind, n: counted(n, kind) if kind in things else f"{n:,} {kind}"
    kinds = ", ".join(named(kind, number) for kind, number in skipped.items())
    hints = ["see --recursive for sub-folders"] * bool(skipped["sub-folder"])
    hints += [HOW_TO_READ_HEIC] * bool(skipped[".heic"] + skipped[".heif"])
    said = f"{kinds} ({'; '.join(hints)})" if hints else kinds
    return files, f", skipped: {said}" if kinds else ""


def _is_drawing(path):
    return path.stem.endswith("_attention") and path.suffix in (".png", ".gif")


def _matches(pattern, recursive):
    """Files that a pattern matches; a folder that exists is no pattern, brackets and all.

    :param recursive: also the pictures in the folders that it matches
    """
    folder = next(parent for parent in Path(pattern).parents if parent.exists())
    parts = Path(pattern).relative_to(folder).parts
    if "**" in parts:
        names = [name for name, _ in walk(folder) if _fits_pattern(name.split("/"), parts)]
    else:
        names = sorted(glob.glob(os.path.join(*parts), root_dir=folder))
    files = [folder / name for name in names]
    inside = [_pictures_of(path, recursive)[0] for path in files if recursive and path.is_dir()]
    files = [path for path in files if path.is_file() and not _is_drawing(path)]
    return sum(inside, files)


def _fits_pattern(names, parts):
    """Whether a path fits a pattern, part by part; ``**`` stands for any number of folders."""
    if not names or not parts:
        return not names and set(parts) <= {"**"}
    if parts[0] == "**" and _fits_pattern(names, parts[1:]):
        return True
    is_seen = not names[0].startswith(".") or parts[0].startswith(".")
    is_same = is_seen and (parts[0] == "**" or fnmatch.fnmatchcase(names[0], parts[0]))
    return is_same and _fits_pattern(names[1:], parts[1 - (parts[0] == "**") :])
