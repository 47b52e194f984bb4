"""What several parts of the suite need and no one of them owns: files, checkpoints, seeds, devices, metrics, messages.

Nothing here knows of pictures or of words' meaning, and nothing happens at import.
"""

import collections
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
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
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped by the user\n")
    except BrokenPipeError:  # the reader of our output (head, less) has left: nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.filename is None:
            raise
        parser.exit(2, f"{parser.prog}: error: cannot use {printable(error.filename)}: {error.strerror}; expected a "
                       "path that you may use\n")


# ---------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_path(path):
    """Give a temporary path beside ``path``; on success flush it to disk and rename it, otherwise remove it.

    So a file appears under its final name whole or not at all, whatever kills the process.

    :param path: final path; its folder is made if it is missing
    :return: context manager that yields the temporary ``Path`` (same suffix, since some libraries look at it)
    :raises UserError: if the folder cannot be written or the disk is full
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=f".partial{path.suffix}", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files private; ours are as any other
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; check the disk's space and your rights"
                        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, value):
    """Write ``value`` as readable JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_json(path):
    """Read a JSON file.

    :raises UserError: if it is missing, unreadable or not JSON (the line and column are named)
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; expected a JSON file") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting without end
        raise UserError(f"{path} is not JSON that can be read: {str(error)[:160]}") from error


# ----------------------------------------------------------------------------------------------------- checkpoints

# torch is imported where it is used: preparing data and printing --help need not wait for it

CHECKPOINT_KEYS = ("config", "word_map", "encoder", "decoder", "history")


def load_tensors(path):
    """Read a file of tensors and plain values on the CPU, without executing anything in it.

    :raises UserError: if it is missing, damaged, or would need to run code
    """
    import torch

    try:
        _refuse_inflation(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch's unpickler raises nearly every type on damaged data
        raise UserError(f"{path} is not a readable file of tensors (damaged, or it holds code, which is never run): "
                        f"{str(error).splitlines()[0][:160] if str(error) else type(error).__name__}") from error


def _refuse_inflation(path):
    """Refuse a zip bomb before it inflates: torch.save compresses nothing, so that members fit into their file.

    :raises ValueError: if the members together say that they are larger
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        claimed, size = sum(member.file_size for member in archive.infolist()), os.path.getsize(path)
    if claimed > size:
        raise ValueError(f"its {size:,} bytes would become {claimed:,}; expected tensors as torch.save stores them")


def save_checkpoint(path, checkpoint):
    """Write a checkpoint (tensors and plain values only), atomically."""
    import torch

    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(path):
    """Read a checkpoint of this suite on the CPU.

    :return: dict with at least ``CHECKPOINT_KEYS``
    :raises UserError: if it is missing, damaged, or something else
    """
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, dict) or not all(
            isinstance(checkpoint.get(key), list if key == "history" else dict) for key in CHECKPOINT_KEYS):
        raise UserError(f"{path} is not a checkpoint of this suite; expected a file written by train.py")
    return checkpoint


# ------------------------------------------------------------------------------------------------ device and seeds


def add_device_flags(parser):
    """Flags of every script that runs a network."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto",
                       help="cpu, cuda, cuda:1, mps, …; auto: the first GPU if there is one (default: %(default)s)")
    group.add_argument("--amp", action="store_true",
                       help="do matrix products in bfloat16: faster on recent GPUs and CPUs (default: float32)")
    group.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1),
                       help="processes or threads that read pictures; raise it if the device waits for data "
                            "(default: the machine's cores, at most 8: %(default)s)")


def add_search_flags(parser, beam_sizes=None):
    """Flags of every script that utters captions.

    :param beam_sizes: ``nargs`` of --beam_size: None for one, ``+`` for several
    """
    group = parser.add_argument_group("beam search")
    group.add_argument("--beam_size", type=int, nargs=beam_sizes, default=[5] if beam_sizes else 5,
                       help="hypotheses kept per picture; 1 is greedy (default: 5)")
    group.add_argument("--length_penalty", type=float, default=0.7,
                       help="captions are ranked by log-probability / length^this; raise it if captions are too short, "
                            "0 is plain beam search (default: %(default)s)")
    group.add_argument("--sample_location", action="store_true",
                       help="hard attention: look at a location drawn by its weight (default: at the likeliest)")
    group.add_argument("--max_decode_steps", type=int, default=50,
                       help="longest caption in words (default: %(default)s)")


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
    check_ranges(args, workers=(1, 256), beam_size=(1, 100), length_penalty=(0, 10), max_decode_steps=(1, 1000))


def pick_device(name):
    """The torch device of a name; ``auto`` prefers a GPU.

    :raises UserError: if there is no such device here
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}; try --device cpu"
                        ) from error
    return device


def set_seed(seed):
    """Seed torch's generators on every device; numpy's and Python's are never drawn from."""
    import torch

    torch.manual_seed(seed)


def rng_state():
    """State of torch's generators, as tensors that a checkpoint can hold."""
    import torch

    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    """Put torch's generators back to where :func:`rng_state` found them."""
    import torch

    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.set_rng_state_all(state["cuda"])


def describe_machine(device):
    """Revision, versions and device in one line, so that a log says what it ran on."""
    import torch

    git = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True,
                         text=True, check=False) if shutil.which("git") else None
    revision = git.stdout.strip() if git and git.returncode == 0 else "unknown"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return (f"revision {revision} | Python {sys.version.split()[0]} | torch {torch.__version__} | "
            f"device {device} ({name})")


def progress(iterable=None, **options):
    """A tqdm bar on standard error; in a log file, where it cannot redraw itself, a line now and then."""
    from tqdm import tqdm

    return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 15, dynamic_ncols=True, **options)


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
        raise UserError(f"{len(references)} pictures with references, {len(hypotheses)} captions: expected as many "
                        "of both, and at least one")
    # without smoothing nltk warns when no 4-gram matches; a vanishing count instead of zero leaves other scores alone
    smooth = SmoothingFunction(epsilon=1e-12).method1
    weights = [tuple(1 / n for _ in range(n)) for n in range(1, 5)]
    bleu = corpus_bleu(references, hypotheses, weights=weights, smoothing_function=smooth)
    scores = {f"BLEU-{n}": 100 * bleu[n - 1] for n in range(1, 5)}
    gts = {i: [" ".join(words) for words in captions] for i, captions in enumerate(references)}
    res = {i: [" ".join(words)] for i, words in enumerate(hypotheses)}
    if meteor:
        scores["METEOR"] = _meteor(gts, res)
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
        self.end, self.log_pictures = end, math.log(len(references))
        counts = [[self._count(words, end) for words in captions] for captions in references]
        frequency = collections.Counter(ngram for captions in counts for ngram in set().union(*captions))
        self.log_frequency = {ngram: math.log(n) for ngram, n in frequency.items()}
        self.references = [[self._weigh(count) for count in captions] for captions in counts]

    def _count(self, words, end):
        words = [*words, end] if end else words
        return collections.Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))

    def _weigh(self, counts):
        """tf-idf of each n-gram, its norm for each n, and the length in bigrams."""
        vector = {ngram: n * (self.log_pictures - self.log_frequency.get(ngram, 0.0)) for ngram, n in counts.items()}
        squares = [0.0] * 4
        for ngram, value in vector.items():
            squares[len(ngram) - 1] += value * value
        return vector, [math.sqrt(square) for square in squares], sum(n for g, n in counts.items() if len(g) == 2)

    def __call__(self, picture, words, ended=True):
        """Score a caption of a picture.

        :param picture: its number in the references
        :param words: list of words
        :param ended: whether the caption ended by itself, and was not cut off
        :return: float; 1.0 is CIDEr 100
        """
        vector, norms, length = self._weigh(self._count(words, self.end if ended else None))
        total = 0.0
        for other, other_norms, other_length in self.references[picture]:
            products = [0.0] * 4
            for ngram, value in vector.items():
                if ngram in other:
                    products[len(ngram) - 1] += min(value, other[ngram]) * other[ngram]
            cosine = sum(p / (a * b) for p, a, b in zip(products, norms, other_norms) if a and b)
            total += cosine * math.exp(-((length - other_length) ** 2) / 72)  # sigma = 6
        return 10 * total / 4 / len(self.references[picture])


def _meteor(gts, res):
    """METEOR 1.5 through Java, or None where there is none."""
    if not shutil.which("java"):
        return None
    from pycocoevalcap.meteor.meteor import Meteor

    try:
        return 100 * float(Meteor().compute_score(gts, res)[0])
    except (OSError, ValueError) as error:  # Java is there but does not run the scorer
        print(f"METEOR left out: Java failed ({error})", file=sys.stderr)
        return None
