"""What several parts of the suite need and no one of them owns: files, checkpoints, seeds, devices, metrics, messages.

Nothing here knows of pictures or of words' meaning, and nothing happens at import.
"""

import collections
import contextlib
import ctypes
import glob
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def printable(text):
    """A text as one line that any terminal can show: names of files may hold line breaks, escapes, or no text."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


class UserError(ValueError):
    """Something the user can mend: a wrong value, a missing or broken file. Shown as one line, without a traceback."""

    def __init__(self, message=""):
        message = printable(message)
        # a name or a value can be of any length; what to do stands at the end
        super().__init__(message if len(message) <= 1000 else f"{message[:500]} … {message[-400:]}")


def run(main, parser):
    """Parse the command line and call ``main(args)``; end with one line and exit code 2 on a :class:`UserError`.

    :param main: function of the parsed arguments
    :param parser: the script's ``argparse.ArgumentParser``
    """
    for stream in (sys.stdout, sys.stderr):  # a log that is not UTF-8 must not stop the work
        stream.reconfigure(errors="backslashreplace")
    args = parser.parse_args()
    try:
        main(args)
    except UserError as error:
        if int(
            os.environ.get("RANK", 0)
        ):  # of torchrun: the first process likely says the same, and ends this one
            time.sleep(3)
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except Stopped as stop:
        parser.exit(
            128 + stop.signal,
            None if int(os.environ.get("RANK", 0)) else f"{parser.prog}: {stop}\n",
        )
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped by the user\n")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        parser.exit(
            2,
            f"{parser.prog}: error: out of memory: {str(error).splitlines()[0][:200]} Lower --batch_size or "
            "--beam_size, add --amp, or look whether somebody else uses this device\n",
        )
    except (
        BrokenPipeError
    ):  # the reader of our output (head, less) has left: nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.filename is None:
            raise
        parser.exit(
            2,
            f"{parser.prog}: error: cannot use {printable(error.filename)}: {error.strerror}; expected a "
            "path that you may use\n",
        )


def _is_out_of_memory(error):
    """Whether it is Python's, a GPU's (torch.OutOfMemoryError is a RuntimeError) or torch's on a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


# ------------------------------------------------------------------------------------------------------- stop signals


class Stopped(Exception):
    """The process was asked to stop, by Ctrl-C or by a scheduler; the text tells the user how to go on."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class StopSignals:
    """Turn SIGINT, SIGTERM and SIGUSR1 (SLURM's warning) into :class:`Stopped`, but not inside :meth:`held`.

    Signals that come more than five seconds after the first do what they always did, so that a program that hangs can
    be stopped; until then they are likely the same one, from the terminal and from torchrun. With several processes a
    signal takes effect in :meth:`check` alone, in all of them at once. A context manager; signal handlers belong to the
    main thread, elsewhere nothing is changed.
    """

    def __enter__(self):
        self._holding, self._received, self._since, self._before = 0, 0, None, {}
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._handle) for number in self.numbers()
            }
        return self

    @staticmethod
    def numbers():
        """The signals' numbers, of those that this system has."""
        return [
            getattr(signal, name)
            for name in ("SIGINT", "SIGTERM", "SIGUSR1")
            if hasattr(signal, name)
        ]

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        now = time.monotonic()
        if self._since is not None and now - self._since > 5:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        self._since = self._since or now
        self._received = number
        if not self._holding and world_size() == 1:
            self.check()

    @contextlib.contextmanager
    def held(self):
        """A signal that arrives inside takes effect at the end (in one process; several wait for :meth:`check`)."""
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1
        if not self._holding and world_size() == 1:
            self.check()

    def check(self):
        """:raises Stopped: if a signal has arrived since the last time, in any of the run's processes"""
        number, self._received = all_reduce_max(self._received), 0
        if number:
            raise Stopped(number)


# ------------------------------------------------------------------------------------------------- several processes


@contextlib.contextmanager
def processes(device_name):
    """Join the processes that torchrun started, or be the only one.

    Only the first process of a run prints.

    :param device_name: as for :func:`pick_device`; with torchrun, cuda and auto give each process a GPU of its own
    :return: context manager that yields this process's torch device
    :raises UserError: if there are fewer GPUs than processes
    """
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield pick_device(device_name)
        return
    device, local = pick_device(device_name), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local + 1} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}; lower --nproc_per_node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # pictures' names, captions and scores travel between the CPUs, so that nobody waits on a busy GPU
    store, number, size = next(distributed.rendezvous("env://"))
    if (
        os.environ["GROUP_WORLD_SIZE"] == "1"
    ):  # one machine: keep what processes before a restart wrote out of sight
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=number,
        world_size=size,
    )
    if not is_main():
        sys.stdout = open(os.devnull, "w")
    yield device
    distributed.destroy_process_group()


def _distributed():
    """torch.distributed, if several processes have joined; never the first to import it."""
    distributed = sys.modules.get("torch.distributed")
    return (
        distributed
        if distributed and distributed.is_available() and distributed.is_initialized()
        else None
    )


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
    if not _distributed():
        return [value]
    values = [None] * world_size()
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
    if not _distributed():
        return number
    import torch

    tensor = torch.tensor(number)
    _distributed().all_reduce(tensor, op=_distributed().ReduceOp.MAX)
    return tensor.item()


def barrier():
    """Wait until every process has come here."""
    all_gather(None)


def share(count):
    """This process's share of ``count`` things, as a slice."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


# ---------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_path(path):
    """Give a temporary path beside ``path``; on success flush it to disk and rename it, otherwise remove it.

    So a file appears under its final name whole or not at all, whatever kills the process. What killed processes of
    this machine left of the same file is removed.

    :param path: final path; its folder is made if it is missing
    :return: context manager that yields the temporary ``Path`` (same suffix, since some libraries look at it)
    :raises UserError: if the folder cannot be written or the disk is full
    """
    path = Path(path)
    temporary = None
    # short, since names end at 255 bytes, and of this machine's process, so that nobody removes what another one writes
    stem = f".{path.name[:30]}.{hashlib.sha256(f'{socket.gethostname()}/{path.name}'.encode()).hexdigest()[:8]}."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f"{glob.escape(stem)}*.partial{glob.escape(path.suffix)}"):
            owner = leftover.name[len(stem) :].split(".")[0]
            if owner.isdigit() and not _is_alive(int(owner)):
                leftover.unlink(missing_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f"{stem}{os.getpid()}.", suffix=f".partial{path.suffix}", dir=path.parent
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files private; ours are as any other
        os.replace(temporary, path)
        if os.name == "posix":  # the new name itself must reach the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; check the disk's space and your rights"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


@contextlib.contextmanager
def locked(path, what, wait=False):
    """Hold a lock file, which the system releases when the process ends, however it ends.

    :param path: the lock file, removed at the end
    :param what: what is locked, for the message
    :param wait: wait until another process releases it
    :raises UserError: if another process holds it
    """
    if not is_main():  # the first process of a run holds it for all
        yield
        return
    import filelock

    lock, is_new = filelock.FileLock(path), not Path(path).parent.exists()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            if not wait:
                raise UserError(
                    f"{what} is being written by another run; wait for it, or choose another folder"
                ) from error
            print(f"waiting for another run, which is making {what}", flush=True)
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; check the disk's space and your rights"
        ) from error
    try:
        yield
    finally:
        Path(path).unlink(
            missing_ok=True
        )  # while it is held: who waits for it sees that, and makes a new one
        lock.release()
        if is_new:  # a run that failed at once leaves no empty folder
            with contextlib.suppress(OSError):
                Path(path).parent.rmdir()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, value):
    """Write ``value`` as readable JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(
            json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )


def read_json(path):
    """Read a JSON file.

    :raises UserError: if it is missing, unreadable or not JSON (the line and column are named)
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; expected a JSON file") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting without end
        raise UserError(f"{path} is not JSON that can be read: {str(error)[:160]}") from error


# torch is imported where it is used: preparing data and printing --help need not wait for it

# ------------------------------------------------------------------------------------------------ device and seeds


def available_cores():
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_device_flags(parser):
    """Flags of every script that runs a network."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, mps, …; auto: the first GPU if there is one (default: %(default)s)",
    )
    group.add_argument(
        "--amp",
        action="store_true",
        help="do matrix products in bfloat16: faster on recent GPUs and CPUs (default: float32)",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=min(8, available_cores()),
        help="threads that read pictures; raise it if the device waits for data "
        "(default: the cores that are free to use, at most 8: %(default)s)",
    )


def add_search_flags(parser, beam_sizes=None, consensus=True):
    """Flags of every script that utters captions.

    :param beam_sizes: ``nargs`` of --beam_size: None for one, ``+`` for several
    :param consensus: --consensus too
    """
    group = parser.add_argument_group("beam search")
    group.add_argument(
        "--beam_size",
        type=int,
        nargs=beam_sizes,
        default=[5] if beam_sizes else 5,
        help="hypotheses kept per picture; 1 is greedy (default: 5)",
    )
    group.add_argument(
        "--length_penalty",
        type=float,
        default=0.7,
        help="captions are ranked by log-probability / length^this; raise it if captions are too short, "
        "0 is plain beam search (default: %(default)s)",
    )
    group.add_argument(
        "--sample_location",
        action="store_true",
        help="hard attention: look at a location drawn by its weight (default: at the likeliest)",
    )
    group.add_argument(
        "--max_decode_steps",
        type=int,
        default=50,
        help="longest caption in words (default: %(default)s)",
    )
    if consensus:
        group.add_argument(
            "--consensus",
            type=float,
            default=0.0,
            metavar="WEIGHT",
            help="among the captions of the beam prefer what people said of similar training pictures: add "
            "this x their CIDEr-D to the score (Mao et al. 2015); 0.8 with --beam_size 20 "
            "--length_penalty 1 does well; needs the training data in --data_folder "
            "(default: %(default)s, off)",
        )


def check_ranges(args, **bounds):
    """Refuse numbers outside their bounds; None means that a flag was left to its default.

    :param bounds: flag name to (lowest, highest)
    :raises UserError: naming flag, value and bounds
    """
    for name, (low, high) in bounds.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not low <= value <= high:  # written so that nan fails too
                raise UserError(f"--{name} {value}: expected a value from {low} to {high}")


def check_shared_flags(args):
    """:func:`check_ranges` for the flags that this module adds."""
    check_ranges(
        args,
        workers=(1, 256),
        beam_size=(1, 100),
        length_penalty=(0, 10),
        max_decode_steps=(1, 1000),
    )
    if "consensus" in args:
        check_ranges(args, consensus=(0, 1000))


def pick_device(name):
    """The torch device of a name; ``auto`` prefers a GPU.

    :raises UserError: if there is no such device here
    """
    import torch

    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(
            f"--device {name} cannot be used here: {str(error).splitlines()[0]}; try --device cpu"
        ) from error
    return device


def set_seed(*numbers):
    """Seed torch's generators on every device; numpy's and Python's are never drawn from.

    :param numbers: non-negative ints, such as seed and update: other numbers give other, unrelated draws
    """
    import torch

    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big"))


def describe_machine(device):
    """Revision, versions and device in one line, so that a log says what it ran on."""
    import torch

    git = (
        subprocess.run(
            ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
        )
        if shutil.which("git")
        else None
    )
    revision = git.stdout.strip() if git and git.returncode == 0 else "unknown"
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    return (
        f"revision {revision} | Python {sys.version.split()[0]} | torch {torch.__version__} | "
        f"device {device} ({name})"
    )


def peak_memory_gb(device):
    """Most memory held at once so far, in GB: a GPU's tensors, or all of this process with the files it maps.

    :param device: torch device
    :return: float, or None where it cannot be known
    """
    if device.type == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def give_back_memory():
    """Return to the system what the allocator holds without need: glibc keeps freed memory that lies between used pieces."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def progress(iterable=None, **options):
    """A tqdm bar on standard error; in a log file, where it cannot redraw itself, a line now and then."""
    from tqdm import tqdm

    options = {"disable": not is_main(), **options}
    return tqdm(
        iterable, mininterval=0.1 if sys.stderr.isatty() else 15, dynamic_ncols=True, **options
    )


# --------------------------------------------------------------------------------------------------------- metrics


def score_captions(references, hypotheses, meteor=False):
    """Corpus metrics on the 0–100 scale, computed on words.

    nltk's BLEU-n counts one n-gram for a caption shorter than n words, where coco-caption counts none; on captions of
    at least four words the two agree.

    BLEU-1..4 from nltk (Papineni et al. 2002), ROUGE-L, CIDEr and METEOR 1.5 from pycocoevalcap. Both sides must have
    been tokenised alike.

    :param references: list (pictures) of lists (captions) of lists of words
    :param hypotheses: list of lists of words, one per picture
    :param meteor: METEOR too; it needs Java and takes some seconds
    :return: dict of floats: BLEU-1, …, BLEU-4, [METEOR,] ROUGE-L, CIDEr; METEOR is None where Java is missing
    :raises UserError: if there is nothing to score
    """
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if not references or len(references) != len(hypotheses):
        raise UserError(
            f"{len(references)} pictures with references, {len(hypotheses)} captions: expected as many "
            "of both, and at least one"
        )
    # without smoothing nltk warns when no 4-gram matches; a vanishing count instead of zero leaves other scores alone
    smooth = SmoothingFunction(epsilon=1e-12).method1
    weights = [tuple(1 / n for _ in range(n)) for n in range(1, 5)]
    bleu = corpus_bleu(references, hypotheses, weights=weights, smoothing_function=smooth)
    scores = {f"BLEU-{n}": 100 * bleu[n - 1] for n in range(1, 5)}
    if meteor:
        scores["METEOR"] = _meteor(references, hypotheses)
    gts, res = _as_texts(references, hypotheses)
    scores["ROUGE-L"] = 100 * float(Rouge().compute_score(gts, res)[0])
    scores["CIDEr"] = 100 * float(Cider().compute_score(gts, res)[0])
    return scores


class CiderD:
    """CIDEr-D of single captions, fast enough to reward every sample in training (Vedantam et al. 2015, section 5).

    The same figure as pycocoevalcap's (a test holds that), with all that depends on the references computed once; the
    document frequencies are those of the references given here. The caption's end counts as a word: without it,
    training on the reward learns to stop in the middle of a phrase.

    :param references: list (pictures) of lists (captions) of lists of words
    """

    def __init__(self, references, end="<end>"):
        self.references, self.end, self.log_pictures = references, end, math.log(len(references))
        frequency = collections.Counter(
            ngram
            for captions in references
            for ngram in set().union(*(self._count(words, end) for words in captions))
        )
        self.log_frequency = {ngram: math.log(n) for ngram, n in frequency.items()}
        self.weighed = {}  # by picture, when it is first asked for: a consensus asks for few

    def _count(self, words, end):
        words = [*words, end] if end else words
        return collections.Counter(
            tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1)
        )

    def _weigh(self, counts):
        """tf-idf of each n-gram, its norm for each n, and the length in bigrams."""
        vector = {
            ngram: n * (self.log_pictures - self.log_frequency.get(ngram, 0.0))
            for ngram, n in counts.items()
        }
        squares = [0.0] * 4
        for ngram, value in vector.items():
            squares[len(ngram) - 1] += value * value
        return (
            vector,
            [math.sqrt(square) for square in squares],
            sum(n for g, n in counts.items() if len(g) == 2),
        )

    def __call__(self, picture, words, ended=True):
        """Score a caption of a picture.

        :param picture: its number in the references
        :param words: list of words
        :param ended: whether the caption ended by itself, and was not cut off
        :return: float; 1.0 is CIDEr 100
        """
        vector, norms, length = self._weigh(self._count(words, self.end if ended else None))
        if picture not in self.weighed:
            self.weighed[picture] = [
                self._weigh(self._count(said, self.end)) for said in self.references[picture]
            ]
        total = 0.0
        for other, other_norms, other_length in self.weighed[picture]:
            products = [0.0] * 4
            for ngram, value in vector.items():
                if ngram in other:
                    products[len(ngram) - 1] += min(value, other[ngram]) * other[ngram]
            cosine = sum(p / (a * b) for p, a, b in zip(products, norms, other_norms) if a and b)
            total += cosine * math.exp(-((length - other_length) ** 2) / 72)  # sigma = 6
        return 10 * total / 4 / len(self.references[picture])


def _as_texts(references, hypotheses):
    """The two dicts that pycocoevalcap's scorers take."""
    return (
        {i: [" ".join(words) for words in captions] for i, captions in enumerate(references)},
        {i: [" ".join(words)] for i, words in enumerate(hypotheses)},
    )


class Meteor:
    """METEOR 1.5 (Denkowski and Lavie 2014) by pycocoevalcap, in a Java process that lives as long as this object."""

    def __init__(self):
        from pycocoevalcap.meteor.meteor import Meteor as Scorer

        before = {}
        if threading.current_thread() is threading.main_thread():
            # Ctrl-C reaches every process of the terminal, but a training that saves itself still needs its scorer;
            # what is ignored here stays ignored in the new process
            for number in StopSignals.numbers():
                before[number] = signal.signal(number, signal.SIG_IGN)
        try:
            self.scorer = Scorer()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __call__(self, references, hypotheses):
        """Score captions.

        :param references: list of lists (captions) of lists of words
        :param hypotheses: list of lists of words, as many
        :return: (METEOR of all together, list of each one's own), from 0 to 1
        :raises UserError: if Java fails
        """
        try:
            return self.scorer.compute_score(*_as_texts(references, hypotheses))
        except (OSError, ValueError) as error:  # Java is there but does not run the scorer
            self.scorer.lock.release()  # else its destructor waits for ever, or complains
            with contextlib.suppress(OSError):
                self.scorer.meteor_p.stdin.close()
            raise UserError(
                f"METEOR failed in Java ({error}): see whether java -version works"
            ) from error


def _meteor(references, hypotheses):
    """METEOR, or None where Java is missing or fails."""
    if not shutil.which("java"):
        return None
    try:
        return 100 * Meteor()(references, hypotheses)[0]
    except UserError as error:
        print(f"METEOR left out: {error}", file=sys.stderr)
        return None
