"""The implementations that `bench` compares: the fused MLP, the eager one, and other packages.

Each is a row of `IMPLEMENTATIONS`. `prepare(eager, fused, x)`, with `x` `[M, H]`, returns the call to time. It may
compile and copy weights into another layout; tuning happens in the first call. Neither is timed.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.bench.shapes import fused_twin, to_fp8
from hf_fused_mlp.fuse import fuse_model
from hf_fused_mlp.options import FusionError
from hf_fused_mlp.reading.mlp import MLPKind

LIGER_MODULES = {
    (MLPKind.GATED, "silu"): "LigerSwiGLUMLP",
    (MLPKind.GATED, "gelu_tanh"): "LigerGEGLUMLP",
    (MLPKind.PACKED, "silu"): "LigerPhi3SwiGLUMLP",
}
QUACK_ACTIVATIONS = {"silu": "swiglu", "gelu_tanh": "geglu"}


class Unavailable(Exception):
    """An implementation cannot run here, or does not support this kind of MLP; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One row.

    `ours` must be within tolerance, `eager` is the baseline, a `peer` is checked but timed anyway, a `floor` does not
    compute an MLP, and a `quantized` one computes a less accurate MLP, which is not checked. Where `in_fp8` is given,
    the implementation is compared with what it makes of the eager module, which it may change. An implementation that
    `trains` gives gradients to the parameters of the eager module.
    """

    name: str
    prepare: Callable[[nn.Module, nn.Module, Tensor], Callable[[], Tensor]]
    role: Literal["ours", "eager", "peer", "floor", "quantized"] = "peer"
    package: str | None = None
    trains: bool = False
    in_fp8: Callable[[nn.Module], nn.Module] | None = None


def fused_mlp(eager, fused, x):
    return partial(fused, x)


def eager_mlp(eager, fused, x):
    return partial(eager, x)


def compiled_mlp(eager, fused, x, mode=None):
    """The eager module through `torch.compile`; the module is an argument, so copies share the compiled code."""
    return partial(_compiled(_run_module, mode), eager, x)


def _run_module(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def _compiled(function: Callable[..., Tensor], mode: str | None = None) -> Callable[..., Tensor]:
    """Compiles `function` for static shapes; `fullgraph` makes a graph break an error."""
    compiled = torch.compile(function, mode=mode, dynamic=False, fullgraph=True)
    if compiled is function or torch._dynamo.config.disable:
        raise Unavailable("torch.compile is disabled; unset TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE")
    return compiled


def liger_elementwise(eager, fused, x):
    """Liger's drop-in module for this one: the same GEMMs, one kernel for activation and product."""
    kind, activation = fused.fused_spec.kind, fused.operands().activation
    if (kind, activation) not in LIGER_MODULES:
        raise Unavailable(f"has no {kind.value} MLP with {activation}")
    return partial(_liger_module(LIGER_MODULES[kind, activation], eager), x)


def liger_mlp(eager, fused, x):
    """Liger's module whose gate and up GEMMs, activation and product are one kernel."""
    kind, activation = fused.fused_spec.kind, fused.operands().activation
    if (kind, activation) != (MLPKind.GATED, "silu"):
        raise Unavailable(f"has no {kind.value} MLP with {activation}")
    module = _liger_module("LigerMLP", eager)
    return lambda: module(x[None])[0]  # accepts [batch, M, H] only


def _liger_module(class_name: str, eager: nn.Module) -> nn.Module:
    """Liger's module of that class, with the projections of `eager`."""
    with _requires("liger-kernel"):
        import liger_kernel.transformers as liger
    with torch.device("meta"):
        module = getattr(liger, class_name)(eager.config)
    for name, _ in list(module.named_children()):
        setattr(module, name, getattr(eager, name))
    return module


def quack(eager, fused, x):
    """QuACK's GEMM with the gated activation in its epilogue, on interleaved rows, then its GEMM; it tunes both."""
    gate, up, down, *biases, activation = fused.operands().flat()[:7]
    if gate is None or activation not in QUACK_ACTIVATIONS or any(bias is not None for bias in biases):
        raise Unavailable(f"has no {fused.fused_spec.kind.value} MLP with {activation}")
    with _requires("quack-kernels==0.4.1 nvidia-cutlass-dsl==4.4.2"):
        from quack.gemm_interface import gemm, gemm_gated
    rows = torch.stack((gate, up), dim=1).flatten(0, 1)

    def call():
        _, h = gemm_gated(x, rows.T, activation=QUACK_ACTIVATIONS[activation], store_preact=False)
        return gemm(h, down.T)

    return call


def packed_gemm(eager, fused, x):
    """A hand-written version: one GEMM for gate and up, a compiled activation kernel, one GEMM for down."""
    gate, up, down, gate_bias, up_bias, down_bias, activation = fused.operands().flat()[:7]
    weight, bias = _packed(gate, up), _packed(gate_bias, up_bias)
    activate = _compiled(_activate if gate is None else _activate_and_multiply)
    return lambda: F.linear(activate(F.linear(x, weight, bias), activation), down, down_bias)


def _packed(gate: Tensor | None, up: Any) -> Any:
    return up if gate is None else torch.cat((gate, up))


def _activate(h: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation].function(h)


def _activate_and_multiply(h: Tensor, activation: str) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return ACTIVATIONS[activation].function(gate) * up


def two_gemms(eager, fused, x):
    """The two GEMMs of the library, without bias and activation: a lower bound for everything that calls them."""
    gate, up, down, *_ = fused.operands().flat()
    weight = _packed(gate, up)
    h = torch.randn(x.shape[0], down.shape[1], device=x.device, dtype=x.dtype)

    def call():
        F.linear(x, weight)
        return F.linear(h, down)

    return call


def batch_invariant_mlp(eager, fused, x):
    """Ours with `batch_invariant=True`, on the same weights."""
    try:
        return partial(fused_twin(eager, batch_invariant=True), x)
    except FusionError as error:
        raise Unavailable(str(error)) from error


def fp8_mlp(eager, fused, x):
    """The fused MLP with its weights in FP8, a scale for each 128 x 128 block, as in official FP8 checkpoints."""
    twin: Any = fuse_model(to_fp8(copy.deepcopy(eager)), strict=True)
    if reason := twin.runs(x.device).called:
        raise Unavailable(reason)
    return partial(twin.by_operator, x)


def torchao_fp8(eager, fused, x):
    """torchao's FP8 with a scale for each row of the weights and of the tokens, compiled."""
    with _requires("torchao"):
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    twin = copy.deepcopy(eager)
    quantize_(twin, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return partial(_compiled(_run_module), twin, x)


IMPLEMENTATIONS = {
    row.name: row
    for row in (
        Implementation("fused", fused_mlp, "ours", trains=True),
        Implementation("eager", eager_mlp, "eager", trains=True),
        Implementation("compile", compiled_mlp, trains=True),
        Implementation("compile-max-autotune", partial(compiled_mlp, mode="max-autotune-no-cudagraphs")),
        Implementation("liger", liger_elementwise, package="liger-kernel", trains=True),
        Implementation("liger-mlp", liger_mlp, package="liger-kernel"),
        Implementation("quack", quack, package="quack-kernels"),
        Implementation("packed-gemm", packed_gemm),
        Implementation("two-gemms", two_gemms, "floor"),
        Implementation("batch-invariant", batch_invariant_mlp, "ours"),
        Implementation("fp8", fp8_mlp, "ours", in_fp8=to_fp8),
        Implementation("torchao-fp8", torchao_fp8, "quantized", package="torchao"),
    )
}


@contextmanager
def _requires(packages: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise Unavailable(f"not installed ({error}); pip install {packages}") from error


def packages_of(names: list[str]) -> list[str]:
    """The distributions that these implementations come from."""
    return [package for name in names if (package := IMPLEMENTATIONS[name].package)]
