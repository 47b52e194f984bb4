"""What the user is told: errors of one line, notes that are said once, progress."""

import contextlib
import functools
import math
import os
import sys
import time

from captioning.run.distributed import is_main
from captioning.run.lazy import lazy

difflib, tqdm, traceback = lazy("difflib", "tqdm", "traceback")


class UserError(ValueError):
    """What the user can mend, such as a wrong value: shown as one line, without a traceback."""

    def __init__(self, message=""):
        super().__init__(one_line(message))


def printable(text):
    """A text as one line that any terminal can show: names of files may hold line breaks."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def one_line(message):
    """A printable message of bearable length; what to do stands at its end."""
    message = printable(message)
    return message if len(message) <= 1000 else f"{message[:500]} … {message[-400:]}"


def counted(number, thing):
    """A number of things, with the plural's s: ``1 picture``, ``2,000 pictures``."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


@functools.cache
def note(text):
    """Say something on standard error, once, in one of a run's processes."""
    if is_main() and not int(os.environ.get("RANK", 0)):  # before they have met, all are first
        print(f"note: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def naming(failure, goes_on=None):
    """Say what it means if the block fails.

    :param failure: what failed, and what is kept
    :param goes_on: a list: the work goes on, the error's traceback and the failure are shown, and
        the list gets the failure; None: the error is raised again with the failure as its note,
        which Python shows below a traceback, and ``utils.ending`` in its line
    """
    try:
        yield
    except Exception as error:
        if goes_on is None:
            error.add_note(failure)
            raise
        traceback.print_exception(error)
        print(f"error: {failure}", file=sys.stderr, flush=True)
        goes_on.append(failure)


def cannot(do, path, error):
    """A ``UserError`` for an ``OSError`` that a file met."""
    advice = "check the disk's space and your rights"
    return UserError(f"cannot {do} {path}: {error.strerror or error}; {advice}")


def why(error):
    """What an exception means to the user, in at most 160 letters of one line."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text[:160] or type(error).__name__


def did_you_mean(name, known):
    """A hint for the end of an error, if one of the known names is near."""
    near = difflib.get_close_matches(name.lower(), known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def progress(iterable=None, **options):
    """A tqdm bar; in a log file and on a dumb terminal, a plain line every half minute."""
    options = {"disable": not is_main(), **options}
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return tqdm.tqdm(iterable, dynamic_ncols=True, **options)
    layout = "{desc}: {n_fmt}/{total_fmt}, {remaining} left, {rate_fmt}{postfix}"
    return _log_bar()(iterable, **options | {"bar_format": layout, "leave": False})


LOG_INTERVAL = 30  # seconds


@functools.cache
def _log_bar():
    """The class of tqdm bars that write lines; made when tqdm is needed."""

    class LogBar(tqdm.tqdm):
        due = math.inf

        def display(self, *_, **__):  # tqdm asks for it at the start and after every message, too
            now = time.monotonic()
            if now >= self.due:
                print(self, file=self.fp, flush=True)
            if now >= self.due or self.due == math.inf:
                self.due = now + LOG_INTERVAL

        def clear(self, *_, **__):
            """Lines stay."""

    return LogBar


def look_up(table, name, what):
    """An entry of a table of ``models.py``; the entry ``x/NAME`` stands for all ``x/...``.

    :raises UserError: if there is none of this name; the message lists the known ones
    """
    entry = table.get(name, table.get(f"{name.partition('/')[0]}/NAME"))
    if entry is None:
        hint = did_you_mean(name, table)
        raise UserError(f"unknown {what} {name!r}; expected one of {', '.join(table)}{hint}")
    if type(entry) is not tuple and type(next(iter(table.values()))) is tuple:
        expected = "expected a tuple, as the others are"
        raise UserError(f"the table's entry of {what} {name!r} is {entry!r}; {expected}")
    return entry
