"""A made-up CUDA card: fake_cuda.c has the rules of a card, this file adds the numbers.

In a process with the variables of :func:`environment` torch finds two cards, and its own code for
cards runs: it takes memory, launches kernels, records graphs. :class:`OnCPU` then computes each
operation with the CPU's kernel on the same memory, and again whenever a graph with it is replayed.
"""

import ctypes
import functools
import os
import re
import subprocess
import sysconfig
import traceback
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
# words of CUDA's headers that mean nothing in C; the header that defines them is in another package
NO_WORDS = """CUDARTAPI CUDARTAPI_CDECL CUDART_CB __host__ __device__ __device_builtin__
    __cudart_builtin__ __device_builtin_texture_type__ __device_builtin_surface_type__"""
OF_A_CARD = re.compile(r"_*(cuda|cu)[A-Z]|cublas|nccl")
NO_NUMBERS = ("empty", "new_empty", "set_", "resize_", "record_stream", "pin_memory", "is_pinned")
LARGEST = float(os.environ.get("FAKE_CUDA_LARGEST", "inf"))
# Python starts with this; importing torch here would hide what a script must do before that
START = f"""
import importlib.util, sys

class AfterTorch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(AfterTorch)
            spec = importlib.util.find_spec("torch")
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda torch: (load(torch), __import__("fake_cuda").begin())
            return spec

sys.path.append({str(HERE)!r})
sys.meta_path.insert(0, AfterTorch)
"""


def environment(folder, **variables):
    """Environment variables of a process that is to find two made-up cards.

    :param folder: ``Path`` of a folder for the library, which is compiled at the first call
    :param variables: more of them, see fake_cuda.c; FAKE_CUDA_LARGEST=N leaves out the numbers of
        operations on a tensor of more than N elements
    """
    if not (folder / "libcuda.so.1").exists():
        compile_library(folder)
        (folder / "sitecustomize.py").write_text(START, encoding="utf-8")
    paths = {"LD_PRELOAD": str(folder / "libcuda.so.1"), "PYTHONPATH": str(folder)}
    return {**os.environ, **paths, "OMP_NUM_THREADS": "1", **variables}


def compile_library(folder):
    """Compile fake_cuda.c; what torch asks of CUDA beyond it becomes functions that do nothing."""
    packages = Path(sysconfig.get_path("purelib"))
    (folder / "crt").mkdir()
    for name in ("host_defines.h", "host_config.h"):
        (folder / "crt" / name).touch()
    headers = next(packages.glob("nvidia/*/include/cuda_runtime_api.h")).parent
    gcc = ["gcc", "-O1", "-w", "-fPIC", f"-I{folder}", f"-I{headers}"]
    gcc += ["-D__align__(n)=__attribute__((aligned(n)))", "-D__builtin_align__=__align__"]
    gcc += [f"-D{word}=" for word in NO_WORDS.split()]
    subprocess.run([*gcc, "-c", HERE / "fake_cuda.c", "-o", folder / "fake.o"], check=True)
    libraries = ("c10_cuda", "torch_cuda", "torch_python", "torch_cuda_linalg", "caffe2_nvrtc")
    libraries = [packages / "torch" / "lib" / f"lib{name}.so" for name in libraries]
    wanted = symbols("-D", "--undefined-only", *libraries)
    lines = ["int fake_cublas();"]
    for name in sorted(wanted - symbols("--defined-only", folder / "fake.o")):
        product = re.match("cublas(?!Lt|Set|Get|Destroy)", name)
        does = f'fake_cublas(handle, "{name}")' if product else "0"
        if OF_A_CARD.match(name):
            lines.append(f"int {name}(void *handle) {{ return {does}; }}")
    (folder / "rest.c").write_text("\n".join(lines) + "\n", encoding="utf-8")
    gcc += ["-shared", "-Wl,-soname,libcuda.so.1", folder / "fake.o", folder / "rest.c"]
    subprocess.run([*gcc, "-o", folder / "libcuda.so.1", "-ldl", "-lpthread"], check=True)


def symbols(*flags):
    done = subprocess.run(["nm", *flags], check=True, capture_output=True, text=True)
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines() if line}


@functools.cache
def library():
    """The library, in a process that found the cards."""
    return ctypes.CDLL("libcuda.so.1")


def counter(name):
    """How often this process's cards did something: ``refusals``, ``replays`` or ``graphs``."""
    return getattr(library(), f"fake_cuda_{name}")()


# ---------------------------------------------------------------------------------------- numbers


def leaves(x):
    """What nested lists, tuples and dicts hold, in order."""
    if isinstance(x, dict):
        x = list(x.values())
    return [leaf for y in x for leaf in leaves(y)] if isinstance(x, (list, tuple)) else [x]


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
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("cpu")
    return None if isinstance(x, torch.Generator) else x


def compute(function, args, kwargs, results):
    """Do an operation on the CPU, into the memory of its results."""
    out = CELLS.get(function, function)(*args, **kwargs)
    for ours, found in zip(results, leaves(out), strict=True):
        # where a CPU leaves statistics empty, a card fills them
        if isinstance(ours, torch.Tensor) and found.numel() and found.data_ptr() != ours.data_ptr():
            ours.copy_(found)
    return out


RECORDED = [None]  # calls that graphs hold, by their number


@ctypes.CFUNCTYPE(None, ctypes.c_long)
def run_recorded(number):
    try:
        RECORDED[number]()
    except BaseException:  # which ctypes would ignore
        traceback.print_exc()
        os._exit(70)


def size_depends_on_numbers(name, function, args):
    if name.startswith("index"):
        masks = (torch.bool, torch.uint8)
        return any(on_card(x) and x.dtype in masks for x in leaves(args[1:2]))
    return torch.Tag.dynamic_output_shape in function.tags


class OnCPU(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.removeprefix("aten::").lstrip("_"), kwargs or {}
        given = [x for x in leaves((args, kwargs)) if on_card(x)]
        if given and size_depends_on_numbers(name, function, args):
            torch.cuda.current_stream(given[0].device).synchronize()  # as torch's own code does
            out = function(*host(args), **host(kwargs))
            return args[0] if function._schema.is_mutable else out.to(given[0].device)
        result = function(*args, **kwargs)
        results = leaves(result)
        tensors = [*given, *filter(on_card, results)]
        view = function.is_view or torch.Tag.inplace_view in function.tags
        if not tensors or view or function.namespace != "aten" or name.startswith(NO_NUMBERS):
            return result
        if max(x.numel() for x in tensors) > LARGEST:
            for x in results:
                if on_card(x) and x.numel() < 1e7:  # zeros are valid indices; larger ones are none
                    host(x).zero_()
            return result
        call = functools.partial(compute, function, host(args), host(kwargs), host(results))
        stream = torch._C._cuda_getCurrentRawStream(tensors[0].device.index)
        if library().fake_cuda_record(ctypes.c_void_p(stream), ctypes.c_long(len(RECORDED))):
            RECORDED.append(call)
            return result
        out = call()
        return result if any(isinstance(x, torch.Tensor) for x in results) else out


def begin():
    """Give operations of this process's main thread their numbers, from now on."""
    torch.backends.cudnn.enabled = False  # cuDNN is not made up
    torch._C._set_cudnn_enabled = lambda _: None
    show = torch.Tensor.__repr__  # which leaves every mode
    torch.Tensor.__repr__ = lambda x, **options: show(x.cpu() if x.is_cuda else x, **options)
    library().fake_cuda_set_run_call(run_recorded)
    OnCPU().__enter__()


# Cells have no kernel for CPUs; what they keep for the backward pass is their own affair.


def lstm(igates, hgates, cx, ibias=None, hbias=None):
    gates = igates + hgates if ibias is None else igates + hgates + ibias + hbias
    i, f, g, o = gates.chunk(4, 1)
    cy = f.sigmoid() * cx + i.sigmoid() * g.tanh()
    return o.sigmoid() * cy.tanh(), cy, gates


def lstm_backward(grad_hy, grad_cy, cx, cy, gates, has_bias):
    grad, _, grad_cx, *_ = torch.ops.aten._thnn_differentiable_lstm_cell_backward(
        grad_hy, grad_cy, gates, torch.zeros_like(gates), None, None, cx, cy
    )
    return grad, grad_cx, grad.sum(0) if has_bias else None


def gru(igates, hgates, hx, ibias=None, hbias=None):
    if ibias is not None:
        igates, hgates = igates + ibias, hgates + hbias
    (r, z, new), (hr, hz, hn) = igates.chunk(3, 1), hgates.chunk(3, 1)
    r, z = r + hr, z + hz
    n = (new + r.sigmoid() * hn).tanh()
    return n + z.sigmoid() * (hx - n), torch.cat([r, z, new, hn, hx], 1)


def gru_backward(grad_hy, kept, has_bias):
    r, z, new, hn, hx = kept.chunk(5, 1)
    gates = torch.cat([r, z, new], 1), torch.cat([r * 0, z * 0, hn], 1)
    backward = torch.ops.aten._thnn_differentiable_gru_cell_backward
    grads = backward(grad_hy, *gates, hx, None, None)[:3]
    return *grads, *(grad.sum(0) if has_bias else None for grad in grads[:2])


CELLS = {
    torch.ops.aten._thnn_fused_lstm_cell.default: lstm,
    torch.ops.aten._thnn_fused_lstm_cell_backward_impl.default: lstm_backward,
    torch.ops.aten._thnn_fused_gru_cell.default: gru,
    torch.ops.aten._thnn_fused_gru_cell_backward.default: gru_backward,
}
