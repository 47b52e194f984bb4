"""Where pictures are: in folders, in archives, behind patterns."""

import collections
import contextlib
import glob
import os
import tarfile
import unicodedata
import zipfile
from pathlib import Path

from PIL import Image

from captioning.data.pictures import PICTURE_SUFFIXES
from captioning.run.messages import UserError, note, printable, why


def open_zip(path):
    """A zip archive as the ``zipfile.Path`` of its root."""
    try:
        return zipfile.Path(path)
    except Exception as error:  # zipfile raises several types on damaged archives
        what, advice = "not a whole zip archive", "delete it and download it again"
        with contextlib.suppress(OSError):
            if tarfile.is_tarfile(path):
                what, advice = "a tar archive", f"unpack it (tar -xf {path}) and give the folder"
        raise UserError(f"{path} is {what} ({why(error)}); {advice}") from error


class Pictures:
    """The files of folders and zip archives, found by the longest common end of their paths.

    Only what was seen while listing is ever opened, so no name from a caption file leads outside.
    """

    def __init__(self, places):
        self.places, self.count = ", ".join(map(str, as_list(places))), 0  # for messages
        self._files = collections.defaultdict(list)  # by normalised name without suffix
        for place in as_list(places):
            if place.is_file():
                archive, root = open_zip(place).root, place.with_suffix("")
                files = {name: zipfile.Path(archive, name) for name in archive.namelist()}
            elif place.is_dir():
                names = glob.iglob("**", root_dir=place, recursive=True, include_hidden=True)
                files, root = {name: place / name for name in names}, place
            else:
                raise UserError(f"there is no folder and no zip archive {place.absolute()}")
            for name, path in files.items():
                parts = _parts(name)
                if not parts or path.is_dir() or "__MACOSX" in parts or parts[-1].startswith("._"):
                    continue  # macOS adds the last two
                whole = _parts(os.path.abspath(root)) + parts
                self._files[_normal(parts)[-1]].append((whole, len(parts), path))
                self.count += suffix(parts[-1]) != ""

    def find(self, name):
        """The path of a picture by its name or the end of its path; None if it is not there.

        Case and Unicode's composition (NFC, NFD) do not matter, and a suffix may be missing.

        :raises UserError: if several match equally well
        """
        common_end = lambda a, b: len(os.path.commonprefix([a[::-1], b[::-1]]))
        wanted, found = _parts(name) or ("",), []
        for parts, depth, path in self._files.get(_normal(wanted)[-1], ()):
            common = common_end(_normal(parts), _normal(wanted))
            # where the two paths differ, it must be above the folder that was given
            is_same = common == len(wanted) or common >= max(depth, 2)
            if is_same and len({suffix(parts[-1]), suffix(wanted[-1]), ""}) < 3:  # jpg, png
                found.append(((common, common == depth, common_end(parts, wanted)), path))
        found.sort(key=lambda item: item[0], reverse=True)
        if len(found) > 1 and found[0][0] == found[1][0]:
            several = f"{found[0][1]} or {found[1][1]}"
            raise UserError(f"{name!r} may be {several}: give more of its path")
        return found[0][1] if found else None


as_list = lambda paths: [*map(Path, paths if isinstance(paths, (list, tuple)) else [paths])]


_parts = lambda name: tuple(p for p in name.replace("\\", "/").split("/") if p not in ("", "."))


suffix = lambda name: s if (s := os.path.splitext(name)[1].lower()) in PICTURE_SUFFIXES else ""


def _normal(parts):
    """Parts of a path as they are compared: in one case and composition, without suffix."""
    stem = parts[-1][: len(parts[-1]) - len(suffix(parts[-1]))]
    return [unicodedata.normalize("NFC", part).casefold() for part in (*parts[:-1], stem)]


def find_pictures(patterns, recursive=False):
    """Files named by paths, folders and patterns, each once, in order.

    :raises UserError: if one of them matches no picture
    """
    paths = {}
    for pattern in patterns:
        path, skipped = Path(pattern), ""
        try:
            if path.is_dir():
                files, skipped = _pictures_of(path, recursive)
            else:
                files = [path] if path.exists() else _matches(pattern)
        except (OSError, ValueError) as error:  # a name too long, a folder that may not be read
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--img {pattern}: {reason}") from error
        if not files:
            what = f"is a folder without pictures{skipped}" if path.is_dir() else "matches no file"
            raise UserError(f"--img {pattern}: {what}; expected pictures, folders or patterns")
        if skipped:
            note(f"in {printable(path)}{skipped}")
        for file in files:
            paths.setdefault(os.path.abspath(file), file)
    return list(paths.values())


def _pictures_of(folder, recursive):
    """The pictures of a folder, and what else lies in it, by kind and number."""
    Image.init()
    readable = {name for name in Image.OPEN if Image.MIME.get(name, "").startswith("image/")}
    files, skipped = [], collections.Counter()
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        suffix = path.suffix.lower()
        if path.is_dir():
            skipped["sub-folders (see --recursive)"] += not recursive
        elif path.name.startswith(".") or not path.is_file() or _is_drawing(path):
            skipped["hidden files" if path.name.startswith(".") else "attention drawings"] += 1
        elif Image.registered_extensions().get(suffix) in readable:
            files.append(path)
        else:
            skipped[suffix or "without an ending"] += 1
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in (+skipped).items())
    return files, f", skipped: {kinds}" if kinds else ""


def _is_drawing(path):
    return path.stem.endswith("_attention") and path.suffix in (".png", ".gif")


def _matches(pattern):
    """Files that a pattern matches; a folder that exists is no pattern, brackets and all."""
    folder = next(parent for parent in Path(pattern).parents if parent.exists())
    names = glob.glob(str(Path(pattern).relative_to(folder)), root_dir=folder, recursive=True)
    files = [folder / name for name in sorted(names)]
    return [path for path in files if path.is_file() and not _is_drawing(path)]
