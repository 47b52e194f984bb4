"""A made-up CUDA card: fake_cuda.c has the rules of a card, this file adds the numbers.

In a process with the variables that :func:`build` returns torch finds two cards, and its own code
for cards runs: it takes memory, launches kernels, records graphs. :class:`OnCPU` then computes each
operation with the CPU's kernel on the same memory, and again whenever a graph with it is replayed.
"""

import collections
import ctypes
import functools
import os
import re
import subprocess
import sysconfig
import traceback
from pathlib import Path

import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

HERE = Path(__file__).resolve().parent
LIBRARIES = ("c10_cuda", "torch_cuda", "torch_python", "torch_cuda_linalg", "caffe2_nvrtc")
OF_A_CARD = re.compile(r" U ((?:_*cu(?:da)?[A-Z]|cublas|nccl)\w+)")
# words of CUDA's headers that mean nothing in C; the header that defines them is in another package
NO_WORDS = """CUDARTAPI CUDARTAPI_CDECL CUDART_CB __host__ __device__ __device_builtin__
    __cudart_builtin__ __device_builtin_texture_type__ __device_builtin_surface_type__"""
NO_NUMBERS = ("empty", "new_empty", "set_", "resize_", "record_stream", "pin_memory", "is_pinned")
LARGEST = float(os.environ.get("FAKE_CUDA_LARGEST", "inf"))  # larger tensors get no numbers
library = functools.cache(lambda: ctypes.CDLL("libcuda.so.1"))  # in a process with the cards
GRAPHS = collections.defaultdict(list)  # the calls that each graph holds, by its number


def build(folder):
    """Compile the made-up cards; what torch asks of CUDA beyond fake_cuda.c does nothing.

    :param folder: ``Path`` of an empty folder
    :return: dict of environment variables of a process that is to find the cards
    """
    packages, path = Path(sysconfig.get_path("purelib")), folder / "libcuda.so.1"
    nm = ["nm", "-D", *(packages / f"torch/lib/lib{name}.so" for name in LIBRARIES)]
    symbols = subprocess.run(nm, check=True, capture_output=True, text=True).stdout
    lines = ["int fake_cublas();"]
    for name in set(OF_A_CARD.findall(symbols)):  # weak: what fake_cuda.c defines wins
        is_product = re.match("cublas(?!Lt|Set|Get|Destroy)", name)
        answer = f'fake_cublas(handle, "{name}")' if is_product else "0"
        lines.append(f"__attribute__((weak)) int {name}(void *handle) {{ return {answer}; }}")
    (folder / "rest.c").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "crt").mkdir()
    (folder / "crt/host_config.h").touch()
    (folder / "crt/host_defines.h").touch()
    headers = next(packages.glob("nvidia/*/include/cuda_runtime_api.h")).parent
    flags = ["-O1", "-w", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", "-ldl", "-lpthread"]
    flags += [f"-D{word}=" for word in NO_WORDS.split()]
    flags += ["-D__align__(n)=__attribute__((aligned(n)))", "-D__builtin_align__=__align__"]
    flags += [f"-I{folder}", f"-I{headers}", "-o", path]
    subprocess.run(["gcc", HERE / "fake_cuda.c", folder / "rest.c", *flags], check=True)
    plugin = folder / "fake_cuda-0.dist-info"  # torch calls what it names, once it is imported
    plugin.mkdir()
    (plugin / "entry_points.txt").write_text("[torch.backends]\nfake_cuda = fake_cuda:begin\n")
    return {"LD_PRELOAD": str(path), "PYTHONPATH": f"{folder}:{HERE}", "OMP_NUM_THREADS": "1"}


def counter(name):
    """How often this process's cards did something: ``refusals``, ``replays`` or ``graphs``."""
    return ctypes.c_long.in_dll(library(), f"fake_cuda_{name}").value


def flat(*values):
    """Values, and for lists and tuples among them what they hold."""
    return [y for x in values for y in (x if isinstance(x, (list, tuple)) else [x])]


def on_card(x):
    return isinstance(x, torch.Tensor) and x.is_cuda


def host(x):
    """What the CPU's kernel is given for ``x``: for a card's tensor, one on the same memory."""
    if isinstance(x, (list, tuple)):
        return [host(y) for y in x]
    if isinstance(x, dict):
        return {key: host(y) for key, y in x.items()}
    if on_card(x):
        memory = x.untyped_storage()
        memory = torch._C._construct_storage_from_data_pointer(
            memory.data_ptr(), torch.device("cpu"), memory.nbytes()
        )
        return torch.empty(0, dtype=x.dtype).set_(memory, x.storage_offset(), x.size(), x.stride())
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return None if isinstance(x, torch.Generator) else x


def compute(function, args, kwargs, results):
    """Do an operation on the CPU, into the memory of its results."""
    out = function(*args, **kwargs)
    for ours, found in zip(results, flat(out), strict=True):
        # where a CPU leaves statistics empty, a card fills them
        if isinstance(ours, torch.Tensor) and found.numel() and found.data_ptr() != ours.data_ptr():
            ours.copy_(found)
    return out


@ctypes.CFUNCTYPE(None, ctypes.c_long)
def replay(graph):
    try:
        with _disable_current_modes():
            for call in GRAPHS[graph]:
                call()
    except BaseException:  # which ctypes would ignore
        traceback.print_exc()
        os._exit(70)


class OnCPU(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.removeprefix("aten::").lstrip("_"), kwargs or {}
        given = list(filter(on_card, flat(*args, *kwargs.values())))
        size_depends_on_numbers = torch.Tag.dynamic_output_shape in function.tags
        if name.startswith("index"):  # by numbers or by a mask
            indices = filter(on_card, flat(args[1]))
            size_depends_on_numbers = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
        if given and size_depends_on_numbers:
            torch.cuda.current_stream(given[0].device).synchronize()  # as torch's own code does
            out = function(*host(args), **host(kwargs))
            return args[0] if function._schema.is_mutable else out.to(given[0].device)
        result = function(*args, **kwargs)
        results = flat(result)
        tensors = [*given, *filter(on_card, results)]
        view = function.is_view or torch.Tag.inplace_view in function.tags
        if not tensors or view or function.namespace != "aten" or name.startswith(NO_NUMBERS):
            return result
        if max(x.numel() for x in tensors) > LARGEST:
            for x in filter(on_card, results):
                if x.numel() < 1e7:  # zeros are valid indices; larger ones are none
                    host(x).zero_()
            return result
        call = functools.partial(compute, function, host(args), host(kwargs), host(results))
        stream = torch._C._cuda_getCurrentRawStream(tensors[0].device.index)
        if graph := library().fake_cuda_captured(ctypes.c_void_p(stream)):
            GRAPHS[graph].append(call)
            return result
        out = call()
        return result if any(isinstance(x, torch.Tensor) for x in results) else out


# A card's own cells have no kernel on a CPU: these are made of operations that have one.


def lstm_cell(x, state, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    gates = linear(x, weight_ih, bias_ih) + linear(state[0], weight_hh, bias_hh)
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(x, h, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    r, z, n = linear(x, weight_ih, bias_ih).chunk(3, 1)
    r_h, z_h, n_h = linear(h, weight_hh, bias_hh).chunk(3, 1)
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    return n + (z + z_h).sigmoid() * (h - n)


CELLS = torch.library.Library("aten", "IMPL")


def begin():
    """Give operations of this process's main thread their numbers, from now on."""
    torch.backends.cudnn.enabled = False  # cuDNN is not made up
    torch._C._set_cudnn_enabled = lambda _: None
    CELLS.impl("lstm_cell", lstm_cell, "AutogradCUDA")
    CELLS.impl("gru_cell", gru_cell, "AutogradCUDA")
    compute = ctypes.c_void_p.in_dll(library(), "fake_cuda_compute")
    compute.value = ctypes.cast(replay, ctypes.c_void_p).value
    OnCPU().__enter__()
