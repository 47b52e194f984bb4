"""What several parts need and no one of them owns: errors, processes, files, devices, metrics."""

import argparse
import base64
import collections
import contextlib
import errno
import functools
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path


class UserError(ValueError):
    """What the user can mend, such as a wrong value: shown as one line, without a traceback."""

    def __init__(self, message=""):
        super().__init__(one_line(message))


def run(main, parser):
    """Parse the command line and call ``main(args)``; end with one line if the user can mend it."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # a log need not be UTF-8
    with StopSignals(together=False):
        try:
            args = parser.parse_args()
            prepare_libraries()
            main(args)
            print(end="", flush=True)  # a full disk is noticed here, where it can be said
        except (Exception, KeyboardInterrupt) as error:
            parser.exit(*ending(parser.prog, error))


# ---------------------------------------------------------------- beyond the main path


class LazyModule:
    """A module that is imported when it is first used.

    importlib's LazyLoader will not do: what it makes stands in sys.modules, and torch, while it is
    imported, looks at every module there, which would import ours before torch is ready.
    """

    def __init__(self, name):
        self._name = name

    def __getattr__(self, name):
        return getattr(importlib.import_module(self._name), name)


def printable(text):
    """A text as one line that any terminal can show: names of files may hold line breaks."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def one_line(message):
    """A printable message of bearable length; what to do stands at its end."""
    message = printable(message)
    return message if len(message) <= 1000 else f"{message[:500]} … {message[-400:]}"


@functools.cache
def note(text):
    """Say something on standard error, once."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def ending(prog, error):
    """Exit code and last line (or None) for an error that the user can mend; raises any other."""
    is_first = not int(os.environ.get("RANK", 0))  # of torchrun's processes, which end alike
    for number in StopSignals.numbers:  # the process is ending already; torchrun ends the others
        signal.signal(number, signal.SIG_IGN if is_first else signal.SIG_DFL)
    try:
        print(end="", flush=True)
    except OSError as fault:  # Python would fail once more on what is left in the buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, OSError) and error.errno == fault.errno:
            error.filename = "standard output"
    cause = error  # an import that is interrupted can fail in any way
    while not isinstance(cause, (KeyboardInterrupt, UserError, type(None))):
        cause = cause.__context__
    error = cause or error
    if isinstance(error, KeyboardInterrupt):
        stop = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        return 128 + stop.signal, f"{prog}: {stop}\n" if is_first else None
    if isinstance(error, BrokenPipeError):  # the reader of the output (head, less) has left
        return 141, None
    if isinstance(error, UserError):
        time.sleep(0 if is_first else 3)  # torchrun ends it before that, unless it alone failed
    elif isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search("out of memory|DefaultCPUAlloc", str(error))
    ):  # Python's, a GPU's (torch has two types for that), torch's on a CPU
        text = [*str(error).splitlines(), "no room."][0][:200]
        what_to_do = (
            "Lower --batch_size or --beam_size, add --amp, or see who else uses this device"
        )
        error = UserError(f"out of memory: {text} {what_to_do}")
    elif isinstance(error, OSError) and error.filename is not None:
        error = _cannot("use", error.filename, error)
    else:
        raise error
    return 2, f"{prog}: error: {error}\n"


def _cannot(do, path, error):
    reason = error.strerror or error
    return UserError(f"cannot {do} {path}: {reason}; check the disk's space and your rights")


class ArgumentParser(argparse.ArgumentParser):
    """argparse with hyphens for underscores, errors of one line that give a hint, and examples.

    :param examples: commands that --help shows at its end, one a line
    """

    def __init__(self, *args, examples="", **options):
        super().__init__(*args, formatter_class=_HelpFormatter, exit_on_error=False, **options)
        self._negative_number_matcher = re.compile(r"-(\d|\.|inf|nan)")
        self.epilog = "\n  ".join(["examples:", *examples.split("\n")]) if examples else None

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        try:
            return super().parse_known_args([self._as_declared(arg) for arg in args], namespace)
        except argparse.ArgumentError as error:
            self.error(f"{error.argument_name} {error.message}")

    def _as_declared(self, arg):
        name, equals, value = arg.partition("=")
        if re.fullmatch(r"--.+", name):
            name = "--" + name[2:].replace("-", "_")
            if not any(flag.startswith(name) for flag in self._option_string_actions):
                hint = _hint(name, self._option_string_actions) or "; --help lists all flags"
                self.error(f"unknown flag {name}{hint}")
        elif re.match("-[^-h]", name) and not self._negative_number_matcher.match(name):
            self.error(f"{arg}: flags begin with two hyphens; write a file of that name ./{arg}")
        return name + equals + value

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            known = f"expected {' or '.join(action.choices)}{_hint(value, action.choices)}"
            raise argparse.ArgumentError(action, f"{value}: {known}")

    def print_help(self, file=None):
        print(self.format_help(), end="", file=file, flush=True)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


class OnOff(argparse.BooleanOptionalAction):
    """A flag that is on or off: --flag or --no_flag."""

    def __init__(self, option_strings, **options):
        super().__init__(option_strings, **options)
        self.option_strings = [name.replace("--no-", "--no_") for name in self.option_strings]

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


def _hint(name, known):
    import difflib

    near = difflib.get_close_matches(name.lower(), known, 1)
    return f"; did you mean {near[0]}?" if near else ""


class _HelpFormatter(argparse.HelpFormatter):
    """Defaults where they mean something, metavars that say what is expected, examples as typed."""

    def _fill_text(self, text, width, indent):
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_help_string(self, action):
        if isinstance(action, OnOff):
            return f"{action.help} (default: {'on' if action.default else 'off'})"
        said = "(default" in action.help or action.nargs == 0 or action.default in (None, "")
        return action.help if said else f"{action.help} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action):
        kinds = {int: "N", float: "X", Path: "FILE"}
        kind = kinds.get(getattr(action.type, "kind", action.type), "NAME")
        return "FOLDER" if action.dest.endswith("folder") else kind


def bounded(kind, low, high):
    """Type of a flag that takes an int or float from low to high: ``type=bounded(int, 1, 64)``."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:  # written so that nan fails too
                return value
        whole = ", a whole number" if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text}: expected a value from {low} to {high}{whole}")

    parse.kind = kind
    return parse


def add_device_flags(parser):
    """Flags of every script that runs a network."""
    add = parser.add_argument_group("machine").add_argument
    text = "auto, cpu, cuda, cuda:N (GPU number N) or mps; auto is the first GPU if there is one"
    add("--device", type=_device_name, default="auto", help=text)
    text = "do matrix products in bfloat16, which is faster on recent GPUs and CPUs than float32"
    add("--amp", action="store_true", help=text)
    text = "threads that read pictures; raise it if the device waits for them"
    add("--workers", type=bounded(int, 1, 256), default=min(8, available_cores()), help=text)


def add_search_flags(parser, several=False, consensus=True):
    """Flags of every script that utters captions.

    :param several: --beam_size takes several values
    :param consensus: --consensus too
    """
    add = parser.add_argument_group("beam search").add_argument
    text = "hypotheses kept per picture; 1 is greedy (default: 5)"
    size, options = bounded(int, 1, 100), {"nargs": "+", "default": [5]} if several else {}
    add("--beam_size", **{"type": size, "default": 5, "help": text, **options})
    text = (
        "captions are ranked by log-probability / length^this; raise it if they are too short; "
        "0 is plain beam search"
    )
    add("--length_penalty", type=bounded(float, 0, 10), default=0.7, help=text)
    text = "hard attention: look at a location drawn by its weight, instead of the likeliest"
    add("--sample_location", action="store_true", help=text)
    text = "say no word twice in succession, and no three words in a row a second time"
    add("--no_repeat", action="store_true", help=text)
    text = "longest caption, in words"
    add("--max_decode_steps", type=bounded(int, 1, 1000), default=50, help=text)
    if consensus:
        text = (
            "among the captions of the beam prefer what people said of similar training pictures: "
            "add this x their CIDEr-D to the score (Mao et al. 2015); 0 is off, 0.8 with "
            "--beam_size 20 --length_penalty 1 does well; needs the training data in --data_folder"
        )
        add("--consensus", type=bounded(float, 0, 1000), default=0.0, metavar="WEIGHT", help=text)


class Stopped(KeyboardInterrupt):
    """The process was asked to stop, by Ctrl-C or a scheduler; the text says how to go on."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class StopSignals:
    """Turn SIGINT, SIGTERM and SIGUSR1 (SLURM's warning) into Stopped, but not inside ``held``.

    What comes within five seconds counts as the same signal: torchrun and ``timeout`` send two.

    :param together: with several processes a signal takes effect in ``check`` alone, in all at once
    """

    _names = ("SIGINT", "SIGTERM", "SIGUSR1")
    numbers = [getattr(signal, name) for name in _names if hasattr(signal, name)]

    def __init__(self, together=True):
        self._together, self._holding, self._received, self._since = together, 0, 0, -math.inf

    def __enter__(self):
        self._before = {number: signal.signal(number, self._handle) for number in self.numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if time.monotonic() - self._since > 5:
            self._since, self._received = time.monotonic(), number
            self._obey()

    def _obey(self):
        if not self._together:
            raise Stopped(self._received)
        if not self._holding and world_size() == 1:
            self.check()

    @contextlib.contextmanager
    def held(self):
        """A signal that arrives inside takes effect at the end."""
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1
        self._obey()

    def check(self):
        """:raises Stopped: if a signal has arrived since the last time, in any of the processes"""
        number, self._received = all_reduce_max(self._received), 0
        if number:
            raise Stopped(number)


@contextlib.contextmanager
def processes(device_name):
    """Join the processes that torchrun started, or be the only one; only the first one prints.

    :param device_name: as for ``pick_device``; of torchrun's processes each gets a GPU of its own
    :return: context manager that yields this process's torch device
    :raises UserError: if there are fewer GPUs than processes
    """
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield pick_device(device_name)
        return
    if device_name.startswith("cuda") or (device_name == "auto" and torch.cuda.is_available()):
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"  # and no process opens another's
    device = pick_device(device_name)
    # names, captions and scores travel between the CPUs, so that nobody waits on a busy GPU
    store, number, size = next(distributed.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":  # what processes before a restart wrote stays apart
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=number, world_size=size)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(sys.stdout if is_main() else nowhere),
    ):
        yield device
    distributed.destroy_process_group()


def _distributed():
    """torch.distributed, if several processes have joined; never the first to import it."""
    distributed = sys.modules.get("torch.distributed")
    joined = distributed and distributed.is_available() and distributed.is_initialized()
    return distributed if joined else None


def rank():
    """This process's number among those of the run."""
    return _distributed().get_rank() if _distributed() else 0


def world_size():
    """How many processes the run has."""
    return _distributed().get_world_size() if _distributed() else 1


def is_main():
    """Whether this process is the one that writes files."""
    return rank() == 0


def all_gather(value):
    """List of every process's value, in order, in every process."""
    values = [value] * world_size()
    if _distributed():
        _distributed().all_gather_object(values, value)
    return values


def broadcast(value):
    """The first process's value, in every process."""
    return all_gather(value if is_main() else None)[0]


def all_reduce_sum(tensor):
    """The sum of every process's tensor, in place."""
    if _distributed():
        _distributed().all_reduce(tensor)
    return tensor


def all_reduce_max(number):
    """The largest of every process's numbers, in every process."""
    return max(all_gather(number))


def barrier():
    """Wait until every process has come here."""
    all_gather(None)


def share(count):
    """This process's share of ``count`` things, as a slice."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def precaution(what, call, *args):
    """Call what guards against power cuts or other processes; say once if the disk cannot do it.

    :param what: what it is called, for the note
    :raises OSError: if it failed for another reason, such as a full disk
    """
    codes = "ENOSYS ENOTSUP EOPNOTSUPP EINVAL ENOLCK EPERM EACCES ENOTTY EBADF ENODEV"
    try:
        call(*args)
    except OSError as error:
        if errno.errorcode.get(error.errno) not in codes.split():
            raise
        note(f"this file system has no {what} ({os.strerror(error.errno)}); going on without")


@contextlib.contextmanager
def _alone(path, what, wait=True):
    """Hold a file open and locked; the system releases it when the process ends, however it ends.

    :param what: what is held, for messages
    :param wait: wait for another process that holds it, instead of raising UserError
    """
    while True:
        with open(path, "ab+") as file:
            try:
                precaution("locks", _lock, file, False)
            except BlockingIOError as error:
                if not wait:
                    message = f"{what} is being written by another run"
                    raise UserError(f"{message}; wait for it, or choose another folder") from error
                print(f"waiting for another run, which is writing {what}", file=sys.stderr)
                _lock(file, True)
            # who held it before has renamed or removed it at the end
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                yield file
                return


def _lock(file, wait):
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError as error:  # Windows
        raise OSError(errno.ENOSYS, "no flock") from error
    flock(file, LOCK_EX if wait else LOCK_EX | LOCK_NB)


@contextlib.contextmanager
def atomic_path(path):
    """Give a temporary path beside ``path``; on success rename it, otherwise remove it.

    So a file appears under its final name whole or not at all, whatever kills the process. The
    temporary name is always the same one, and locked: what a killed process left is written over,
    and a second writer waits. Links are followed; a FIFO or a device is given as it is.

    :param path: final path; its folder is made if it is missing
    :return: context manager that yields the temporary ``Path``, which has the same suffix
    :raises UserError: if the folder cannot be written or the disk is full
    """
    final = Path(os.path.realpath(path))
    digest = hashlib.sha256(os.fsencode(final.name)).hexdigest()[:8]  # names end at 255 bytes
    temporary = final.parent / f".{final.name[:30]}.{digest}.partial{final.suffix[:10]}"
    try:
        if final.exists() and not (final.is_file() or final.is_dir()):
            yield Path(path)
            return
        final.parent.mkdir(parents=True, exist_ok=True)
        with _alone(temporary, path) as file:
            try:
                file.truncate(0)
                yield temporary
                precaution("fsync", os.fsync, file.fileno())
                if os.name == "nt":  # Windows renames no open file
                    file.close()
                os.replace(temporary, final)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        if os.name == "posix" and os.access(final.parent, os.R_OK):
            folder = os.open(final.parent, os.O_RDONLY)  # the new name must reach the disk too
            precaution("fsync of folders", os.fsync, folder)
            os.close(folder)
    except OSError as error:
        raise _cannot("write", path, error) from error


@contextlib.contextmanager
def locked(path, what, wait=False):
    """Hold a lock file, which the system releases when the process ends, however it ends.

    :param path: the lock file, removed at the end
    :param what: what is locked, for messages
    :param wait: wait until another process releases it
    :raises UserError: if another process holds it, or it cannot be written
    """
    if not is_main():  # the first process of a run holds it for all
        yield
        return
    path = Path(path)
    is_new = not path.parent.exists()
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(_alone(path, what, wait))
        except OSError as error:
            raise _cannot("write", path, error) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: who waits for it makes a new one
            if is_new:  # a run that failed at once leaves no empty folder
                with contextlib.suppress(OSError):
                    path.parent.rmdir()


def output_path(path, force=False, page=False):
    """Check a file that a flag names before the work starts.

    :param path: as typed; ``-`` and /dev/stdout are standard output, for ``write_json`` alone
    :param force: replace what is there whatever it is
    :param page: it is for ``write_page``, not for ``write_json``
    :return: ``Path``
    :raises UserError: if it cannot be written, or something else than JSON (a page) would be lost
    """
    path = Path(path)
    if str(path) in ("-", "/dev/stdout", "/dev/fd/1") and not page:
        return Path("-")
    if path.is_dir():
        example = path / ("page.html" if page else "output.json")
        raise UserError(f"{path} is a folder; expected a file, such as {example}")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {folder}; make it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"cannot write {path}: you may not; choose another folder")
    if page and path.is_file() and not force:
        first = PAGE.read_bytes().partition(b"\n")[0]
        with open(path, "rb") as file:
            if file.read(len(first)) not in (b"", first):
                raise UserError(f"{path} exists and is no page of this suite: choose another name")
    elif path.is_file() and path.stat().st_size and not force:
        try:
            read_json(path)
        except UserError as error:
            message = f"{path} exists and is not JSON: choose another name, or add --force"
            raise UserError(message) from error
    return path


def write_json(path, value):
    """Write ``value`` as readable JSON to a file, atomically, or to what ``output_path`` gave."""
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    if str(path) == "-":
        print(text, end="", file=sys.__stdout__, flush=True)
        return
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


PAGE = Path(__file__).with_name("docs") / "page.html"  # the template, which says what it reads


def write_page(path, data):
    """Write a page to look at: one file that needs no other and no network, atomically.

    :param data: plain values, as ``docs/page.html`` reads them; all texts in it are shown as text
    """
    text = json.dumps(data, separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # so that nothing in it ends the script
    with atomic_path(path) as temporary:
        page = PAGE.read_text(encoding="utf-8").replace("{data}", text, 1)
        temporary.write_text(page, encoding="utf-8")


def page_picture(image, side):
    """A picture for ``write_page``, as a dict.

    :param image: PIL image or uint8 (height, width, 3)
    :param side: its longer side in pixels; a smaller picture keeps its size
    """
    import numpy as np
    from PIL import Image

    small, file = Image.fromarray(np.asarray(image)), io.BytesIO()
    small.thumbnail((side, side))
    small.save(file, "JPEG", quality=80)
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"image": uri, "width": small.width, "height": small.height}


def page_caption(words, hypothesis, scores, alternatives=None, **more):
    """A caption for ``write_page``, as a dict; its weights in 8 bits, a word's largest one is 255.

    :param words: list of words
    :param hypothesis: ``models.Hypothesis`` with alphas
    :param scores: dict of text; pictures are sorted by the first one
    :param alternatives: for each word a list of (word, probability), or None
    :param more: "label" of the caption; "differs", the places of words that others lack
    """
    probabilities = (round(math.exp(p), 4) for p in hypothesis.word_log_probs)
    alphas = hypothesis.alphas  # (num_words, num_pixels)
    # even weights light the whole picture evenly and not fully: nothing was singled out
    light = alphas / alphas.amax(dim=1, keepdim=True).clamp(min=4 / alphas.shape[1])
    return {
        "words": list(zip(words, probabilities, *([alternatives] if alternatives else []))),
        "alphas": base64.b64encode((255 * light).round().byte().numpy().tobytes()).decode(),
        "scores": list(scores.items()),
    } | more


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


def check_disk(folder, size):
    """See before the work starts whether ``size`` bytes can be written to a folder, made or not.

    :raises UserError: if not
    """
    from tqdm import tqdm

    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file, expected a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"cannot write {folder}: you may not; choose another folder")
    disk = shutil.disk_usage(there)
    if disk.total and disk.free < size:  # some file systems say that they have 0 bytes in all
        free, needed = (tqdm.format_sizeof(value, "B") for value in (disk.free, size))
        raise UserError(
            f"{folder} needs {needed}, but its disk has {free} free; make room or choose another"
        )


def available_cores():
    """Number of cores that this process may use."""
    is_known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if is_known else os.cpu_count() or 1


def busy_cores(seconds=0.1):
    """How many of its cores others keep busy (float), measured while this process sleeps."""
    import psutil

    with contextlib.suppress(OSError):  # some containers do not say
        percent = psutil.cpu_percent(interval=seconds, percpu=True)
        own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(percent))
        return sum(percent[core] for core in own if core < len(percent)) / 100
    return 0.0


def prepare_libraries():
    """Set what torch and OpenMP read when they are loaded; what the user has set wins."""
    if "torch._C" in sys.modules:
        return
    # torch 2.14 would compile a kernel for products of width 1, and many servers have no compiler
    os.environ.setdefault("TORCH_DISABLE_NATIVE_JIT", "1")
    # threads that spin while they wait take the cores that their own partners are waiting for
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ) and busy_cores() > 0.5:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _device_name(name):
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise argparse.ArgumentTypeError(f"{name}: expected auto, cpu, cuda, cuda:N or mps")
    return name


def pick_device(name):
    """The torch device of a name, made the current one; ``auto`` prefers a GPU.

    :raises UserError: if there is no such device here
    """
    import torch

    try:
        if _device_name(name) == "auto":
            has_mps = torch.backends.mps.is_available()
            name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
        device, count = torch.device(name), torch.cuda.device_count()
        if device.type == "cuda":
            if (device.index or 0) >= count:
                raise UserError(f"--device {name}: torch finds {count} GPUs here; try --device cpu")
            torch.cuda.set_device(device.index or 0)  # before anything opens the first one
        torch.empty(1, device=device)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--device {error}") from error
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used: {reason}; try --device cpu") from error
    return device


def autocast(device, enabled):
    """Context in which matrix products are done in bfloat16 (--amp), if it is enabled."""
    return sys.modules["torch"].autocast(device.type, sys.modules["torch"].bfloat16, enabled)


def set_seed(*numbers):
    """Seed torch's generators on every device; numpy's and Python's are never drawn from.

    :param numbers: non-negative ints, such as seed and update: others give unrelated draws
    """
    import torch

    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big"))


def describe_machine(device):
    """Revision, versions and device in one line, so that a log says what it ran on."""
    import subprocess

    import torch

    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    revision, name = "unknown", f"threads: {torch.get_num_threads()}"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = subprocess.run(command, capture_output=True, text=True, check=True)
        revision = git.stdout.strip()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif policy := os.environ.get("OMP_WAIT_POLICY"):
        name += f", OMP_WAIT_POLICY={policy}"
    return (
        f"revision {revision} | Python {sys.version.split()[0]} | torch {torch.__version__} | "
        f"device {device} ({name})"
    )


def peak_memory_gb(device):
    """Most memory held so far: a GPU's tensors, or this process with the files it maps.

    :return: float, in GB, or None on Windows without a GPU
    """
    if device.type == "cuda":
        return round(sys.modules["torch"].cuda.max_memory_allocated(device) / 1e9, 2)
    with contextlib.suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def progress(iterable=None, **options):
    """A tqdm bar; in a log file and on a dumb terminal, a plain line every half minute."""
    import types

    from tqdm import tqdm

    def write(text):
        sys.stderr.write(text.strip("\r\n") + "\n" if text.strip() else "")

    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        look = {"dynamic_ncols": True}  # a narrow terminal cuts off the right end
        layout = (
            "{percentage:3.0f}% {remaining} left, {rate_fmt}{postfix} |{bar}| {n_fmt}/{total_fmt}"
        )
    else:
        lines = types.SimpleNamespace(write=write, flush=sys.stderr.flush)
        look = {"file": lines, "mininterval": 30, "maxinterval": 30, "delay": 30}
        layout = "{n_fmt}/{total_fmt}, {remaining} left, {rate_fmt}{postfix}"
    layout = "{desc}: " + layout if options.get("desc") else layout
    look |= {"bar_format": layout, "disable": not is_main()}
    return tqdm(iterable, **{**look, **options})


def score_captions(references, hypotheses, meteor=False, each=False):
    """Corpus metrics on the 0–100 scale, computed on words that were tokenised alike.

    BLEU-1..4 from nltk (Papineni et al. 2002), ROUGE-L, CIDEr and METEOR 1.5 from pycocoevalcap.
    nltk's BLEU-n counts one n-gram for a caption shorter than n words, where coco-caption counts
    none; on captions of at least four words the two agree.

    :param references: list (pictures) of lists (captions) of lists of words
    :param hypotheses: list of lists of words, one per picture
    :param meteor: METEOR too; it needs Java and takes some seconds
    :param each: the pictures' own too: "each", a dict of lists, CIDEr and METEOR if it is to be had
    :return: dict of floats: BLEU-1, …, BLEU-4, [METEOR,] ROUGE-L, CIDEr; METEOR may be None
    :raises UserError: if there is nothing to score
    """
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if not references or len(references) != len(hypotheses):
        counts = f"{len(references)} pictures with references, {len(hypotheses)} captions"
        raise UserError(f"{counts}: expected as many of both, and at least one")
    # nltk warns when no 4-gram matches; a vanishing count instead of zero leaves other scores alone
    smooth = SmoothingFunction(epsilon=1e-12).method1
    weights = [tuple(1 / n for _ in range(n)) for n in range(1, 5)]
    bleu = corpus_bleu(references, hypotheses, weights=weights, smoothing_function=smooth)
    gts = {i: [" ".join(words) for words in captions] for i, captions in enumerate(references)}
    res = {i: [" ".join(words)] for i, words in enumerate(hypotheses)}
    cider, own_cider = Cider().compute_score(gts, res)
    found = (_meteor(gts, res) if meteor else None) or (None, [])
    own = {"CIDEr": own_cider, "METEOR": found[1]}
    own = {name: [100 * float(score) for score in scores] for name, scores in own.items()}
    return {
        **{f"BLEU-{n}": 100 * score for n, score in enumerate(bleu, 1)},
        **({"METEOR": found[0]} if meteor else {}),
        "ROUGE-L": 100 * float(Rouge().compute_score(gts, res)[0]),
        "CIDEr": 100 * float(cider),
        **({"each": {name: scores for name, scores in own.items() if scores}} if each else {}),
    }


def _meteor(gts, res):
    """METEOR 1.5 (Denkowski and Lavie 2014), 0-100, and a list of the captions' own, 0-1.

    :return: None where Java is missing or fails
    """
    from unittest import mock

    from pycocoevalcap.meteor.meteor import Meteor

    if not shutil.which("java"):
        return None
    # the Java program reads and writes numbers by the user's language, some of which have 0,5
    options = "-Duser.language=en -Duser.country=US -Duser.language.format=en"
    options = f"{os.environ.get('_JAVA_OPTIONS', '')} {options} -Dfile.encoding=UTF-8"
    with mock.patch.dict(os.environ, {"_JAVA_OPTIONS": options, "LC_ALL": "C"}):
        scorer = Meteor()
    try:
        score, own = scorer.compute_score(gts, res)
        return 100 * score, own
    except (OSError, ValueError) as error:  # Java is there but does not run the program
        scorer.lock.release()  # else its destructor waits for ever, or complains
        with contextlib.suppress(OSError):
            scorer.meteor_p.stdin.close()
        note(f"METEOR left out, it failed in Java ({error}): see whether java -version works")


class CiderD:
    """CIDEr-D of single captions, fast enough to reward every sample in training.

    Vedantam et al. 2015, section 5; the same figure as pycocoevalcap's, with all that depends on
    the references computed once. The caption's end counts as a word: without it, training on the
    reward learns to stop in the middle of a phrase.

    :param references: list (pictures) of lists (captions) of lists of words
    """

    def __init__(self, references, end="<end>"):
        self.references, self.end, self.log_pictures = references, end, math.log(len(references))
        frequency = collections.Counter()
        for captions in references:
            frequency.update(set().union(*(self._count(words, end) for words in captions)))
        self.log_frequency = {ngram: math.log(n) for ngram, n in frequency.items()}
        self.weighed = {}  # by picture, when it is first asked for: a consensus asks for few

    def _count(self, words, end):
        words = [*words, end] if end else words
        starts = ((i, n) for n in range(1, 5) for i in range(len(words) - n + 1))
        return collections.Counter(tuple(words[i : i + n]) for i, n in starts)

    def _weigh(self, counts):
        """tf-idf of each n-gram, its norm for each n, and the length in bigrams."""
        vector, squares, length = {}, [0.0] * 4, 0
        for ngram, n in counts.items():
            vector[ngram] = n * (self.log_pictures - self.log_frequency.get(ngram, 0.0))
            squares[len(ngram) - 1] += vector[ngram] ** 2
            length += n * (len(ngram) == 2)
        return vector, list(map(math.sqrt, squares)), length

    def __call__(self, picture, words, ended=True):
        """Score a caption of a picture; 1.0 is CIDEr 100.

        :param picture: its number in the references
        :param ended: whether the caption ended by itself, and was not cut off
        """
        vector, norms, length = self._weigh(self._count(words, self.end if ended else None))
        captions = self.references[picture]
        if picture not in self.weighed:
            self.weighed[picture] = [self._weigh(self._count(said, self.end)) for said in captions]
        total = 0.0
        for other, other_norms, other_length in self.weighed[picture]:
            products = [0.0] * 4
            for ngram, value in vector.items():
                if ngram in other:
                    products[len(ngram) - 1] += min(value, other[ngram]) * other[ngram]
            cosine = sum(p / (a * b) for p, a, b in zip(products, norms, other_norms) if a and b)
            total += cosine * math.exp(-((length - other_length) ** 2) / 72)  # sigma = 6
        return 10 * total / 4 / len(captions)
