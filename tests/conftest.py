"""Fixtures: a device to run on, and on the CPU Triton's interpreter in place of its compiler."""

import logging
import os
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

# no such directory: tests do not depend on what was tuned on this machine
os.environ["HF_FUSED_MLP_CACHE"] = str(Path(__file__).parent / "no-plans")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def no_call_is_small(monkeypatch):
    """Tests are about small MLPs and few tokens, for which kernels would not be worth it in eager mode."""
    monkeypatch.setattr("hf_fused_mlp.families.mlp.fused.SMALL_INPUT", 0)
    monkeypatch.setattr("hf_fused_mlp.tuning.heuristics.HOST_BOUND", 0.0)


@pytest.fixture
def caplog(caplog):
    """Warnings and errors only, whatever level another test's library has given the root logger."""
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where kernels run: compiled on a GPU, interpreted on the CPU. New memory holds NaN, so that a gap shows.

    Nothing that another test made the package remember answers calls: launches, or plans that failed.
    """
    from hf_fused_mlp.tuning import cache

    cache.forget()
    guards = torch._C._dynamo.guards  # the kernels allocate with Inductor's functions
    for module, name in ((torch, "empty"), (guards, "_empty_strided_cpu"), (guards, "_empty_strided_cuda")):
        if allocate := getattr(module, name, None):
            monkeypatch.setattr(module, name, partial(_filled, allocate))
    with interpreter(monkeypatch) if request.param == "cpu" else nullcontext():
        yield torch.device(request.param)
    cache.forget()


def _filled(allocate, *args, **kwargs):
    tensor = allocate(*args, **kwargs)
    return tensor.fill_(float("nan") if tensor.is_floating_point() else min(1 << 30, torch.iinfo(tensor.dtype).max))


@pytest.fixture
def plan_cache(tmp_path, monkeypatch):
    """An empty directory in place of the user's plans, and none that ship; nothing is remembered before or after."""
    from hf_fused_mlp.tuning import cache

    directory = tmp_path / "plan-cache"
    monkeypatch.setenv("HF_FUSED_MLP_CACHE", str(directory))
    monkeypatch.setattr(cache, "SHIPPED", tmp_path / "shipped")
    cache.forget()
    yield directory
    cache.forget()


_FLOATS = {"fp8e4nv": torch.float8_e4m3fn, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _cast_fp8(convert, input, source, target, rounding):
    """Casts as GPUs do, where Triton's interpreter forgets the carry of a rounding, and NaN."""
    if "fp8e4nv" not in (source.name, target.name):
        return convert(input, source, target, rounding)
    numbers = torch.from_numpy(input.copy()).view(_FLOATS[source.name])
    if target.name == "fp8e4nv":
        numbers = numbers.clamp(-448, 448)
    unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[_FLOATS[target.name].itemsize]
    return numbers.to(_FLOATS[target.name]).view(unsigned).numpy()


@contextmanager
def interpreter(monkeypatch):
    """Swaps every jit function of the kernels, and of Triton's own library, for its interpreted form.

    The environment variable for this is read when the decorator runs: it cannot serve a process that compiles too. The
    interpreter does not put back all that it changes in the language, so this does.
    """
    import triton.experimental.gluon  # noqa: F401  (it reads the library when it is imported)
    import triton.language as tl
    from triton.runtime import interpreter as interpreter_module
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from hf_fused_mlp import kernels
    from hf_fused_mlp.kernels import _common, _fp8, _quantize, experts, norm

    changed = (tl, tl.core, tl.math, tl.core.tensor, tl.core.dtype, tl.core.tensor_descriptor_base, tl.core.condition)
    before = [dict(vars(owner)) for owner in changed]
    of_experts = experts._common, experts.pairs, experts.routing, experts.grouped, experts.fp8_grouped
    monkeypatch.setattr(interpreter_module, "_convert_float", partial(_cast_fp8, interpreter_module._convert_float))
    for module in (tl, tl.standard, _common, _fp8, _quantize, norm, *kernels.KERNELS.values(), *of_experts):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(value.fn))
    yield
    monkeypatch.undo()
    for owner, attributes in zip(changed, before, strict=True):
        for name, value in list(vars(owner).items()):
            if name not in attributes:
                delattr(owner, name)
            elif value is not attributes[name]:
                setattr(owner, name, attributes[name])
