"""Files that appear whole or not at all, locks between runs, JSON and CSV, and room on the disk."""

import contextlib
import errno
import io
import os
import re
import shutil
import sys
from pathlib import Path

from captioning.run.distributed import is_main
from captioning.run.lazy import lazy
from captioning.run.messages import UserError, cannot, note

csv, fcntl, hashlib, json, tqdm = lazy("csv", "fcntl", "hashlib", "json", "tqdm")


@contextlib.contextmanager
def atomic_path(path):
    """Give the path of an empty file beside ``path``; on success rename it, otherwise remove it.

    So a file appears under its final name whole or not at all, whatever kills the process. The
    temporary name is always the same one, and locked: what a killed process left is written over,
    and a second writer waits. Links are followed; a FIFO or a device is given as it is.

    :param path: final path, whose suffix the file has; its folder is made if it is missing
    :raises UserError: if the folder cannot be written or the disk is full
    """
    final = Path(os.path.realpath(path))
    digest = hashlib.sha256(os.fsencode(final.name)).hexdigest()[:8]  # names end at 255 bytes
    temporary = final.with_name(f".{final.name[:30]}.{digest}.partial{final.suffix[:10]}")
    try:
        if final.exists() and not (final.is_file() or final.is_dir()):
            yield Path(path)
            return
        with locked(temporary.with_name(f"{temporary.name}.lock"), path, wait=True):
            try:
                temporary.write_bytes(b"")
                yield temporary
                precaution("fsync", _flush, temporary)
                os.replace(temporary, final)
            finally:
                temporary.unlink(missing_ok=True)
        precaution("fsync of folders", _flush, final.parent)  # it holds the new name
    except OSError as error:
        raise cannot("write", path, error) from error


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


@contextlib.contextmanager
def locked(path, what, wait=False):
    """Hold a lock file, which the system releases when the process ends, however it ends.

    :param what: what is locked, for messages
    :param wait: wait for another process that holds it, instead of raising UserError
    """
    if not is_main():  # the first process of a run holds it for all
        yield
        return
    path = Path(path)
    is_new = not path.parent.exists()
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            try:
                precaution("locks", fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if not wait:
                    message = f"{what} is being written by another run"
                    raise UserError(f"{message}; wait for it, or choose another folder") from error
                print(f"waiting for another run, which is writing {what}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                held = os.path.samefile(path, file.fileno())
            except FileNotFoundError:
                held = False
            if not held:
                continue  # who held it has removed it
            try:
                yield
                return
            finally:
                path.unlink(missing_ok=True)  # while it is held: who waits for it makes a new one
                if is_new:  # a run that failed at once leaves no empty folder
                    with contextlib.suppress(OSError):
                        path.parent.rmdir()


def write_text(path, text):
    """Write a text to a file, atomically, or to what ``output_path`` gave."""
    if str(path) == "-":
        print(text.removeprefix("\ufeff"), end="", file=sys.__stdout__, flush=True)
        return
    with atomic_path(path) as temporary:  # names of files may be no text
        temporary.write_bytes(text.encode("utf-8", "replace"))


def write_json(path, value):
    """Write ``value`` as readable JSON, as ``write_text`` does."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_csv(path, rows):
    """Write dicts as a table, as ``write_text`` does; its columns are all their keys.

    It begins with the mark by which spreadsheets know UTF-8, which pandas and R's readr skip.
    """
    text = io.StringIO("\ufeff")
    text.seek(0, io.SEEK_END)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path):
    """Read a JSON file.

    :raises UserError: if it is missing, unreadable or not JSON (the line and column are named)
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, or a nesting without end
        raise UserError(f"{path} is not valid JSON: {str(error)[:160]}") from error


# what flags write: the suffixes of its name, and what a file that it replaces must be
KINDS = {
    "json": ((".json",), "a list of captions"),
    "csv": ((".csv",), "a table of captions"),
    "txt": ((".txt",), "a list of captions"),
    "html": ((".html", ".htm"), "a page of this suite"),
}


def output_path(path, force=False, kind=None, begins=None):
    """Check a file that a flag names before the work starts.

    :param path: as typed; ``-`` and /dev/stdout are standard output for lists of captions
    :param force: take any name, and replace what is there whatever it is
    :param kind: a key of ``KINDS``, which is also the flag; None for a checkpoint
    :param begins: how files of this kind begin, a pattern of bytes
    :raises UserError: if it cannot be written, has another kind's name, or something else would be
        lost
    """
    path = Path(path)
    if str(path) in ("-", "/dev/stdout", "/dev/fd/1") and kind in ("json", "csv", "txt"):
        return Path("-")
    if path.is_dir():
        example = path / (f"captions.{kind}" if kind else "model.pth.tar")
        raise UserError(f"{path} is a folder; expected a file, such as {example}")
    if path.exists() and not path.is_file():  # a FIFO or a device
        return path
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {folder}; make it first")
    check_disk(folder, 0)
    if force or not kind:
        return path
    suffixes, what = KINDS[kind]
    if path.is_file() and path.stat().st_size and not _is_ours(path, begins):
        advice = "choose another name" if kind == "html" else "choose another name, or add --force"
        raise UserError(f"{path} exists and is not {what}: {advice}")
    if path.suffix.lower() not in ("", *suffixes):
        raise UserError(f"--{kind} {path}: expected a name that ends in {suffixes[0]}")
    return path


def check_disk(folder, size):
    """:raises UserError: if ``size`` bytes cannot be written to a folder, which need not exist"""
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file, expected a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"cannot write {folder}: you may not; choose another folder")
    disk = shutil.disk_usage(there)
    if disk.total and disk.free < size:  # some file systems say that they have 0 bytes in all
        free, needed = (tqdm.tqdm.format_sizeof(value, "B") for value in (disk.free, size))
        raise UserError(
            f"{folder} needs {needed}, but its disk has {free} free; make room or choose another"
        )


def reserve(path, size):
    """Claim disk space for a file: libhdf5 and mapped files crash where they find none."""
    if hasattr(os, "posix_fallocate"):
        # not opened for appending, which glibc's emulation refuses
        with open(path, "rb+" if os.path.exists(path) else "wb+") as file:
            precaution("reserving of space", os.posix_fallocate, file.fileno(), 0, size)


def precaution(what, call, *args):
    """Call what guards against power cuts or other processes; say once if the disk cannot do it.

    :raises OSError: if it failed for another reason, such as a full disk
    """
    codes = "ENOSYS ENOTSUP EOPNOTSUPP EINVAL ENOLCK EPERM EACCES ENOTTY EBADF ENODEV"
    try:
        call(*args)
    except OSError as error:
        if errno.errorcode.get(error.errno) not in codes.split():
            raise
        note(f"this file system has no {what} ({os.strerror(error.errno)}); going on without")


def _is_ours(path, begins):
    """Whether a file begins so."""
    with open(path, "rb") as file:
        return re.match(begins, file.read(4096)) is not None


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
