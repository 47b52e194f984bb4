"""Cores, threads and devices of this machine, and the seeds of what is random on them."""

import collections
import contextlib
import ctypes
import datetime
import io
import os
import sys
from pathlib import Path

from captioning.run.distributed import is_main
from captioning.run.lazy import lazy
from captioning.run.messages import UserError

futures, hashlib, psutil, resource, shlex, subprocess, torch = lazy(
    "concurrent.futures", "hashlib", "psutil", "resource", "shlex", "subprocess", "torch"
)


def prepare_process():
    """Set how text is written, and what torch and OpenMP read when they are loaded.

    What the user has set in the environment wins.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: print would take the one for the other
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, open until the end
        if isinstance(getattr(sys, name), io.TextIOWrapper):  # in a notebook or IDLE it is not
            getattr(sys, name).reconfigure(errors="backslashreplace")  # a log need not be UTF-8
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
    # the first may wait for hours for another run's features; torchrun sees by itself who has died
    options = {"rank": number, "world_size": size, "timeout": datetime.timedelta(days=7)}
    distributed.init_process_group(backend, store=store, **options)
    with contextlib.redirect_stdout(sys.stdout if is_main() else io.StringIO()):
        yield device
    distributed.destroy_process_group()


def autocast(device, enabled):
    """Context in which matrix products are done in bfloat16 (--amp), if it is enabled."""
    return torch.autocast(device.type, torch.bfloat16, enabled)


def set_seed(*numbers):
    """Seed torch's generators from several non-negative ints, such as seed and update."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big"))


def describe_machine(device):
    """Revision, versions and device in one line, so that a log says what it ran on."""
    folder = shlex.quote(str(Path(__file__).parents[2]))
    name = f"threads: {torch.get_num_threads()}"
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


def read_ahead(function, items, workers, ahead=0):
    """``map(function, items)`` in order; threads prepare ``ahead`` results, or two a worker."""
    with futures.ThreadPoolExecutor(max(1, workers)) as pool:
        pending = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > max(ahead, 2 * workers, 2):
                    yield pending.popleft().result()
            yield from (future.result() for future in pending)
        finally:
            pool.shutdown(cancel_futures=True)  # the caller may have stopped early
