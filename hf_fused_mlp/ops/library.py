"""The library `torch.ops.hf_fused_mlp`, and how an operator is added to it.

An operator is one node to `torch.compile` and `torch.export`, with shapes known without running it.
"""

from collections.abc import Callable
from functools import cache

import torch

_LIBRARY = torch.library.Library("hf_fused_mlp", "DEF")
_TAGS = torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag


def define(
    schema: str,
    cpu: Callable,
    cuda: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Defines the operator of `schema`, such as ``act_mul(Tensor gate, Tensor up, str activation) -> Tensor``."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"hf_fused_mlp::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"hf_fused_mlp::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


@cache
def on_gpu():
    """The module `dispatch`. It imports Triton, so it is imported at the first call on a GPU."""
    from hf_fused_mlp.ops import dispatch

    return dispatch


def gradients(function, tensors, wanted, grad):
    """The gradients of the `wanted` tensors; differentiable again in a backward that creates a graph.

    This uses autograd, because `torch.func` does not allow hooks on saved tensors.
    """
    again, inputs = torch.is_grad_enabled(), list(tensors)
    # the forward did not run under autocast, so its recomputation must not either
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        for i in wanted:
            inputs[i] = inputs[i].view_as(inputs[i]) if again else inputs[i].detach().requires_grad_()
        return torch.autograd.grad(function(*inputs), [inputs[i] for i in wanted], grad, create_graph=again)
