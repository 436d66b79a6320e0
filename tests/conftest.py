"""Fixtures: a device to run on, and on the CPU Triton's interpreter in place of its compiler."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where kernels run: compiled on a GPU, interpreted on the CPU. New memory holds NaN, so that a gap shows."""
    if request.param == "cpu":
        interpret(monkeypatch)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: empty(*size, **kw).fill_(float("nan")))
    return torch.device(request.param)


def interpret(monkeypatch):
    """Swaps every jit function of the kernels, and of Triton's own library, for its interpreted form.

    The environment variable for this is read when the decorator runs: it cannot serve a process that compiles too.
    """
    import triton.experimental.gluon  # noqa: F401  (it reads the library when it is imported)
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from hf_fused_mlp import kernels
    from hf_fused_mlp.kernels import _common

    for module in (tl, tl.standard, _common, *kernels.FAMILIES.values()):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(value.fn))
