"""What several parts need and no one of them owns: errors, processes, files, devices, metrics."""

import argparse
import base64
import collections
import contextlib
import ctypes
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
    with StopSignals(together=False):
        try:
            prepare_process()
            main(parser.parse_args())
            print(end="", flush=True)  # a full disk is noticed here, where it can be said
        except (Exception, KeyboardInterrupt) as error:
            parser.exit(*ending(parser.prog, error))


# ---------------------------------------------------------------- beyond the main path


class LazyModule:
    """A module that is imported when it is first used.

    importlib's LazyLoader puts it into sys.modules, where torch, while it is imported, looks at
    every module, which would import ours before torch is ready.
    """

    def __init__(self, name):
        self._name = name

    def __getattr__(self, name):
        return getattr(importlib.import_module(self._name), name)


names = ("torch", "tqdm", "psutil", "numpy", "PIL.Image")
torch, tqdm, psutil, np, Image = map(LazyModule, names)
names = ("difflib", "fcntl", "resource", "shlex", "subprocess")
difflib, fcntl, resource, shlex, subprocess = map(LazyModule, names)


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
    elif isinstance(error, OSError) and error.filename is not None:
        error = _cannot("use", error.filename, error)
    elif isinstance(error, MemoryError) or re.search("out of memory|DefaultCPUAlloc", str(error)):
        what = [*str(error).splitlines(), "no room."][0][:200]
        advice = "Lower --batch_size or --beam_size, add --amp, or see who else uses this device"
        error = UserError(f"out of memory: {what} {advice}")
    elif isinstance(error, ModuleNotFoundError):
        advice = "python -m pip install -r requirements.txt installs what the suite needs"
        error = UserError(f"{error}: {advice}")
    else:
        raise error
    return 2, f"{prog}: error: {error}\n"


def _cannot(do, path, error):
    advice = "check the disk's space and your rights"
    return UserError(f"cannot {do} {path}: {error.strerror or error}; {advice}")


class ArgumentParser(argparse.ArgumentParser):
    """argparse with hyphens for underscores, errors of one line that give a hint, and examples.

    :param examples: commands that --help shows at its end, one a line
    """

    def __init__(self, *args, examples="", **options):
        super().__init__(*args, formatter_class=_HelpFormatter, **options)
        self._negative_number_matcher = re.compile(r"-(\d|\.|inf|nan)")
        self.epilog = "\n  ".join(["examples:", *examples.split("\n")]) if examples else None

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._as_declared(arg) for arg in args], namespace)

    def _as_declared(self, arg):
        name, equals, value = arg.partition("=")
        if re.match("--.", name):
            name, known = "--" + name[2:].replace("-", "_"), self._option_string_actions
            if not any(flag.startswith(name) for flag in known):
                hint = did_you_mean(name, known) or "; --help lists all flags"
                self.error(f"unknown flag {name}{hint}")
        elif re.match("-[^-h]", name) and not self._negative_number_matcher.match(name):
            self.error(f"{arg}: flags begin with two hyphens; write a file of that name ./{arg}")
        return name + equals + value

    def _check_value(self, action, value):
        if action.choices and value not in action.choices:
            expected = f"expected {', '.join(action.choices)}{did_you_mean(value, action.choices)}"
            raise argparse.ArgumentError(action, f"{value}: {expected}")

    def error(self, message):
        message = re.sub(r"^argument (\S+): ", r"\1 ", message)
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def did_you_mean(name, known):
    """A hint for the end of an error, if one of the known names is near."""
    near = difflib.get_close_matches(name.lower(), known, 1)
    return f"; did you mean {near[0]}?" if near else ""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Defaults where they mean something, and metavars that say what is expected."""

    def _get_help_string(self, action):
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
    add("--workers", type=bounded(int, 1, 256), default=min(8, len(own_cores())), help=text)


def add_search_flags(parser, several=False):
    """Flags of every script that utters captions; ``several``: --beam_size takes several values.

    :return: function that adds flags to the same group
    """
    add = parser.add_argument_group("beam search").add_argument
    text = "hypotheses kept per picture; 1 is greedy (default: 5)"
    size, several = bounded(int, 1, 100), {"nargs": "+", "default": [5]} if several else {}
    add("--beam_size", **{"type": size, "default": 5, "help": text, **several})
    text = "rank by log-probability / length^this: raise it if captions are too short; 0 is plain"
    add("--length_penalty", type=bounded(float, 0, 10), default=0.7, help=text)
    text = "hard attention: look at a location drawn by its weight, instead of the likeliest"
    add("--sample_location", action="store_true", help=text)
    text = "say no word twice in succession, and no three words in a row a second time"
    add("--no_repeat", action="store_true", help=text)
    text = "longest caption, in words"
    add("--max_decode_steps", type=bounded(int, 1, 1000), default=50, help=text)
    return add


def add_captioning_flags(parser, several=False):
    """Flags of the scripts that caption with a trained model; ``several``: or with more of them."""
    add = parser.add_argument
    text = "checkpoint of train.py, or the folder of a run, for its best (default: the suite's own)"
    add("--model", type=Path, nargs="+" if several else None, help=text)
    text = "the model's own word map; checkpoints of the PyTorch tutorial need it"
    add("--word_map", type=Path, help=text)
    text = "folder with the files that create_input_files.py wrote"
    add("--data_folder", type=Path, default=Path("data"), help=text)
    text = "also write a page to look at: point at a word and see where the model looked"
    add("--html", type=Path, help=text)
    text = (
        "among the captions of the beam prefer what people said of similar training pictures: add "
        "this x their CIDEr-D to the score (Mao et al. 2015); 0 is off, 0.8 with --beam_size 20 "
        "--length_penalty 1 does well; needs the training data in --data_folder"
    )
    add = add_search_flags(parser, several)
    add("--consensus", type=bounded(float, 0, 1000), default=0.0, metavar="WEIGHT", help=text)
    add_device_flags(parser)


def search_options(args):
    """The flags of beam search that all scripts hand on to ``models.beam_search``, as a dict."""
    return {
        "length_penalty": args.length_penalty,
        "max_decode_steps": args.max_decode_steps,
        "no_repeat": args.no_repeat,
    }


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

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, together=True):
        self._held, self._received, self._since = together and world_size() > 1, 0, -math.inf

    def __enter__(self):
        self._before = {number: signal.signal(number, self._handle) for number in self.numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if time.monotonic() - self._since > 5:
            self._since = time.monotonic()
            if not self._held:
                raise Stopped(number)
            self._received = number

    @contextlib.contextmanager
    def held(self):
        """A signal that arrives inside takes effect at the end."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before
        if not before:
            self.check()

    def check(self):
        """:raises Stopped: if a signal was held back in any of the processes"""
        number, self._received = max(all_gather(self._received)), 0
        if number:
            raise Stopped(number)


@contextlib.contextmanager
def processes(device_name):
    """This process's torch device, once torchrun's processes have met; only the first one prints.

    :param device_name: as for ``pick_device``; of torchrun's processes each gets a GPU of its own
    :raises UserError: if there are fewer GPUs than processes
    """
    distributed = torch.distributed
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
    with contextlib.redirect_stdout(sys.stdout if is_main() else io.StringIO()):
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


def barrier():
    """Wait until every process has come here."""
    all_gather(None)


def share(count):
    """This process's share of ``count`` things, as a slice."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


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


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        raise _cannot("write", path, error) from error


def output_path(path, force=False, page=False):
    """Check a file that a flag names before the work starts.

    :param path: as typed; ``-`` and /dev/stdout are standard output, for ``write_json`` alone
    :param force: replace what is there whatever it is
    :param page: it is for ``write_page``, not for ``write_json``
    :raises UserError: if it cannot be written, or something else than JSON (a page) would be lost
    """
    path = Path(path)
    if str(path) in ("-", "/dev/stdout", "/dev/fd/1") and not page:
        return Path("-")
    if path.is_dir():
        example = path / ("page.html" if page else "output.json")
        raise UserError(f"{path} is a folder; expected a file, such as {example}")
    if path.is_file() or not path.exists():  # and no FIFO or device
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {folder}; make it first")
        check_disk(folder, 0)
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


def own_cores():
    """The numbers of the cores that this process may use."""
    every = range(os.cpu_count() or 1)
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else every


def busy_cores(seconds=0.1):
    """How many of its cores others keep busy (float), measured while this process sleeps."""
    try:
        percent = psutil.cpu_percent(interval=seconds, percpu=True)
        return sum(percent[core] for core in own_cores()) / 100
    except (OSError, IndexError):  # some containers do not say
        return 0.0


def prepare_process():
    """Set how text is written, and what torch and OpenMP read when they are loaded.

    What the user has set in the environment wins.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # a log need not be UTF-8
    # what an update frees serves the next one; glibc would give it back and get it anew by pages
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
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
    """The torch device of a name, made the current one; raises UserError if it is not here."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device, count = torch.device(name), torch.cuda.device_count()
        if device.type == "cuda":
            if (device.index or 0) >= count:
                raise UserError(f"--device {name}: torch finds {count} GPUs here; try --device cpu")
            torch.cuda.set_device(device.index or 0)  # before anything opens the first one
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used: {reason}; try --device cpu") from error
    return device


def autocast(device, enabled):
    """Context in which matrix products are done in bfloat16 (--amp), if it is enabled."""
    return torch.autocast(device.type, torch.bfloat16, enabled)


def set_seed(*numbers):
    """Seed torch's generators from several non-negative ints, such as seed and update."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big"))


def describe_machine(device):
    """Revision, versions and device in one line, so that a log says what it ran on."""
    folder, name = shlex.quote(str(Path(__file__).parent)), f"threads: {torch.get_num_threads()}"
    status, output = subprocess.getstatusoutput(f"git -C {folder} describe --always --dirty")
    revision = "unknown" if status else output  # of a copy without git, too
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif policy := os.environ.get("OMP_WAIT_POLICY"):
        name += f", OMP_WAIT_POLICY={policy}"
    return (
        f"revision {revision} | Python {sys.version.split()[0]} | torch {torch.__version__} | "
        f"device {device} ({name})"
    )


def peak_memory_gb(device):
    """Most memory held so far, in GB: a GPU's tensors, or this process with the files it maps."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def progress(iterable=None, **options):
    """A tqdm bar; in a log file and on a dumb terminal, a plain line every half minute."""
    look = {"dynamic_ncols": True}
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        layout = "{desc}: {n_fmt}/{total_fmt}, {remaining} left, {rate_fmt}{postfix}\n"
        look = {"mininterval": 30, "maxinterval": 30, "delay": 30, "bar_format": layout}
    return tqdm.tqdm(iterable, **{"disable": not is_main(), **look, **options})


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
    weights = [(1 / n,) * n for n in range(1, 5)]
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
            frequency.update(set().union(*(self._ngrams(words, end) for words in captions)))
        self.log_frequency = {ngram: math.log(n) for ngram, n in frequency.items()}
        # when a picture is first asked for: a consensus asks for few
        self.weighed = functools.cache(lambda i: [self._weigh(said, end) for said in references[i]])

    def _ngrams(self, words, end):
        words = [*words, end] if end else words
        starts = ((i, n) for n in range(1, 5) for i in range(len(words) - n + 1))
        return collections.Counter(tuple(words[i : i + n]) for i, n in starts)

    def _weigh(self, words, end):
        """Dict n-gram -> (tf-idf, the same over the norm of all n-grams of its length); length."""
        weights, squares = {}, [0.0] * 4
        for ngram, count in self._ngrams(words, end).items():
            weights[ngram] = count * (self.log_pictures - self.log_frequency.get(ngram, 0.0))
            squares[len(ngram) - 1] += weights[ngram] ** 2
        vector = {g: (w, w / squares[len(g) - 1] ** 0.5) for g, w in weights.items() if w}
        return vector, len(words) + bool(end)

    def __call__(self, picture, words, ended=True):
        """Score a caption of a picture; 1.0 is CIDEr 100.

        :param picture: its number in the references
        :param ended: whether the caption ended by itself, and was not cut off
        """
        vector, length = self._weigh(words, self.end if ended else None)
        total = 0.0
        for other, other_length in self.weighed(picture):
            cosine = sum(
                unit * other[ngram][1] * min(1.0, other[ngram][0] / weight)
                for ngram, (weight, unit) in vector.items()
                if ngram in other
            )
            total += cosine * math.exp(-((length - other_length) ** 2) / 72)  # sigma = 6
        return 10 * total / 4 / len(self.references[picture])
