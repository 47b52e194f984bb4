"""A made-up CUDA card for machines without one: fake_cuda.c sets the rules of a card, this file adds the numbers.

``environment`` gives the environment variables under which a command finds two made-up cards. In such a command torch's own
code for cards runs: it takes memory, launches kernels, records graphs. ``OnCPU`` then computes each operation with the CPU's
kernel on the same memory, and again whenever a graph that contains the operation is replayed.
"""

import ctypes
import functools
import importlib.abc
import importlib.util
import os
import subprocess
import sys
import sysconfig
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
# not supplied by NVIDIA's package of the runtime's headers
EMPTY_WORDS = """__host__ __device__ __global__ __device_builtin__ __cudart_builtin__ __managed__ CUDARTAPI CUDARTAPI_CDECL
    CUDART_CB __device_builtin_texture_type__ __device_builtin_surface_type__ __shared__ __constant__ __no_sanitize_memory__"""


def environment(folder, **variables):
    """The environment variables of a command that is to find two made-up cards.

    :param folder: ``Path`` of a folder for the library, which is compiled at the first call
    :param variables: more environment variables; see fake_cuda.c
    """
    if not (folder / "sitecustomize.py").exists():
        compile_library(folder)
        start = f"import sys\nsys.path.append({str(HERE)!r})\nimport fake_cuda\nfake_cuda.install()\n"
        (folder / "sitecustomize.py").write_text(start, encoding="utf-8")  # Python runs it when it starts
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / "libcuda.so.1"),
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def compile_library(folder):
    """Compile fake_cuda.c, with a do-nothing function for whatever else torch asks of CUDA's libraries."""
    packages = Path(sysconfig.get_path("purelib"))
    (folder / "crt").mkdir(parents=True)
    for name in ("host_defines.h", "host_config.h"):
        (folder / "crt" / name).touch()
    headers = next(packages.glob("nvidia/*/include/cuda_runtime_api.h")).parent
    gcc = ["gcc", "-O1", "-w", "-fPIC", f"-I{folder}", f"-I{headers}", "-D__align__(n)=__attribute__((aligned(n)))"]
    gcc += ["-D__builtin_align__=__align__", *(f"-D{word}=" for word in EMPTY_WORDS.split())]
    subprocess.run([*gcc, "-c", HERE / "fake_cuda.c", "-o", folder / "fake.o"], check=True)
    wanted = set()
    for name in ("c10_cuda", "torch_cuda", "torch_python", "torch_cuda_linalg", "caffe2_nvrtc"):
        wanted |= symbols(packages / "torch" / "lib" / f"lib{name}.so", "-D", "--undefined-only")
    functions = []
    for name in sorted(wanted - symbols(folder / "fake.o", "--defined-only")):
        if name.startswith("cublas") and not name.startswith(("cublasLt", "cublasSet", "cublasDestroy")):
            functions.append(f'int {name}(void *handle) {{ return fake_cublas(handle, "{name}"); }}')
        elif name.startswith(("cublas", "nccl")) or name.lstrip("_").startswith("cu") and "A" <= name.lstrip("_").replace("cuda", "cu", 1)[2] <= "Z":
            functions.append(f"int {name}(void) {{ return 0; }}")
    (folder / "rest.c").write_text("int fake_cublas();\n" + "\n".join(functions), encoding="utf-8")
    library = ["-shared", "-Wl,-soname,libcuda.so.1", folder / "fake.o", folder / "rest.c"]
    subprocess.run([*gcc, *library, "-o", folder / "libcuda.so.1", "-ldl", "-lpthread"], check=True)


def symbols(path, *kind):
    out = subprocess.run(["nm", *kind, path], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in out.splitlines()}


def card():
    """The library in this process, to ask it what happened."""
    return ctypes.CDLL("libcuda.so.1")


def install():
    """Give the card's operations their numbers, from the moment when torch is imported."""

    class AfterTorch(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name != "torch":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec("torch")
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                begin()

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, AfterTorch())


def begin():
    """Enter the mode that computes numbers; for the rest of this process."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map

    aten, library, recorded = torch.ops.aten, card(), [None]
    largest = float(os.environ.get("FAKE_CUDA_LARGEST", "inf"))
    torch.backends.cudnn.enabled = False  # cuDNN is not made up
    torch._C._set_cudnn_enabled = lambda _: None

    def on_card(x):
        return isinstance(x, torch.Tensor) and x.is_cuda

    def host(x):
        """The CPU's view of what an operation was given: tensors on the same memory."""
        if on_card(x):
            storage = x.untyped_storage()
            memory = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device("cpu"), storage.nbytes())
            return torch.empty(0, dtype=x.dtype).set_(memory, x.storage_offset(), x.size(), x.stride())
        if isinstance(x, torch.device) and x.type == "cuda":
            return torch.device("cpu")
        return None if isinstance(x, torch.Generator) else x

    def compute(function, args, kwargs, results):
        out = OWN.get(function, function)(*args, **kwargs)
        for ours, found in zip(results, tree_leaves(out), strict=True):
            # a CPU leaves some statistics empty which a card fills
            if ours is not None and found.numel() and found.data_ptr() != ours.data_ptr():
                ours.copy_(found)
        return out

    @ctypes.CFUNCTYPE(None, ctypes.c_long)
    def run_call(number):
        try:
            recorded[number]()
        except BaseException:  # ctypes would go on
            traceback.print_exc()
            os._exit(70)

    def lstm(igates, hgates, cx, ibias=None, hbias=None):
        gates = igates + hgates if ibias is None else igates + hgates + ibias + hbias
        i, f, g, o = gates.chunk(4, 1)
        cy = f.sigmoid() * cx + i.sigmoid() * g.tanh()
        return o.sigmoid() * cy.tanh(), cy, gates

    def lstm_backward(grad_hy, grad_cy, cx, cy, gates, has_bias):
        grad, _, grad_cx, *_ = aten._thnn_differentiable_lstm_cell_backward(
            grad_hy, grad_cy, gates, torch.zeros_like(gates), None, None, cx, cy
        )
        return grad, grad_cx, grad.sum(0) if has_bias else None

    def gru(igates, hgates, hx, ibias=None, hbias=None):
        if ibias is not None:
            igates, hgates = igates + ibias, hgates + hbias
        (ir, iz, new), (hr, hz, hn) = igates.chunk(3, 1), hgates.chunk(3, 1)
        z, n = (iz + hz).sigmoid(), (new + (ir + hr).sigmoid() * hn).tanh()
        return n + z * (hx - n), torch.cat([ir + hr, iz + hz, new, hn, hx], 1)

    def gru_backward(grad_hy, kept, has_bias):
        r, z, new, hn, hx = kept.chunk(5, 1)
        igates, hgates = torch.cat([r, z, new], 1), torch.cat([r * 0, z * 0, hn], 1)
        grads = aten._thnn_differentiable_gru_cell_backward(grad_hy, igates, hgates, hx, None, None)
        return (*grads[:3], *((g.sum(0) if has_bias else None) for g in grads[:2]))

    OWN = {  # operations of cards alone; what they keep for the backward pass is not what a card keeps
        aten._thnn_fused_lstm_cell.default: lstm,
        aten._thnn_fused_lstm_cell_backward_impl.default: lstm_backward,
        aten._thnn_fused_gru_cell.default: gru,
        aten._thnn_fused_gru_cell_backward.default: gru_backward,
    }
    NO_NUMBERS = ("empty", "new_empty", "set_", "resize", "record_stream", "pin_memory", "is_pinned")

    class OnCPU(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            given = tree_leaves((args, kwargs))
            name = function._schema.name.removeprefix("aten::")
            if torch.Tag.dynamic_output_shape in function.tags or name.startswith("index_put"):
                masks = name.startswith("index") and not any(
                    on_card(x) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1])
                )
                if not masks and any(map(on_card, given)):
                    return self.wait(function, args, kwargs)
            result = function(*args, **kwargs)
            results = tree_leaves(result)
            tensors = [x for x in (*given, *results) if on_card(x)]
            skip = function.is_view or torch.Tag.inplace_view in function.tags or name.lstrip("_").startswith(NO_NUMBERS)
            if not tensors or skip or function.namespace != "aten":
                return result
            if max(x.numel() for x in tensors) > largest:
                return result
            call = functools.partial(
                compute, function, tree_map(host, args), tree_map(host, kwargs), [host(x) if isinstance(x, torch.Tensor) else None for x in results]
            )
            stream = torch._C._cuda_getCurrentRawStream(tensors[0].device.index)
            if library.fake_cuda_record(ctypes.c_void_p(stream), ctypes.c_long(len(recorded))):
                recorded.append(call)
                return result
            out = call()
            return result if any(isinstance(x, torch.Tensor) for x in results) else out

        @staticmethod
        def wait(function, args, kwargs):
            """An operation whose result's size depends on the numbers: a card makes the host wait for it."""
            device = next(x.device for x in tree_leaves((args, kwargs)) if on_card(x))
            torch.cuda.current_stream(device).synchronize()
            out = function(*tree_map(host, args), **tree_map(host, kwargs))
            if function._schema.is_mutable:
                return args[0]
            return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, out)

    show = torch.Tensor.__repr__  # which leaves every mode
    torch.Tensor.__repr__ = lambda x, **options: show(x.cpu() if x.is_cuda else x, **options)
    library.fake_cuda_set_run_call(run_call)
    mode = OnCPU()
    mode.__enter__()
    begin.kept = mode, run_call
