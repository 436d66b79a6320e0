"""The tolerance rule, and the random problems it is applied to."""

import torch

from hf_fused_mlp.reference import dequantize, mlp_ref, quantize_weight_ref
from hf_fused_mlp.types import Matrix, MLPOperands
from hf_fused_mlp.validation import inaccuracy


def assert_accurate(fused, eager, oracle):
    reason = inaccuracy(fused, eager, oracle)
    assert reason is None, reason


def run_plan(plan, x, gate, up, down, *biases_and_activation):
    """The MLP as `plan` has it, prepared for this one call."""
    from hf_fused_mlp.kernels import prepare

    operands = MLPOperands.of(gate, up, down, *biases_and_activation)
    return prepare(plan, x, operands)(x, *operands[:3])


def run_experts(plan, operands, form):
    """Routed experts as `plan` has them; `operands` are what launches take."""
    from hf_fused_mlp.kernels.experts import describe_experts, prepare_experts

    x, ids, _, up, down, *_ = operands
    return prepare_experts(plan, describe_experts(x, ids, up, down, form))(*operands)


ROUTINGS = ["one", "foreign", "repeated", "all foreign"]


def rerouted(case, ids, weights):
    """The ids and weights of a case of `ROUTINGS`, for at least six tokens and six experts."""
    if case == "one":
        return torch.full_like(ids, 4)[:, :1].contiguous(), weights[:, :1].contiguous()
    if case == "foreign":
        ids[::2, 1], ids[1::3, 0], ids[5] = 6, 1 << 33, -1
    elif case == "repeated":
        ids[:, 1] = ids[:, 0]
    else:
        ids[:] = 6
    return ids, weights


def mlp_cuda(x, *operands):
    """`dispatch.mlp_cuda` with the arguments of the operator."""
    from hf_fused_mlp.ops import dispatch

    return dispatch.mlp_cuda(x, MLPOperands.of(*operands))


def linear(x, weight, bias, gate, gate_bias, activation, config):
    """`kernels.linear` of single tensors."""
    from hf_fused_mlp import kernels

    return kernels.linear(x, Matrix(weight, None, bias), Matrix(gate, None, gate_bias), activation, config)


def kind_and_tensors(operands):
    """What the launch cache is asked for, but for the input."""
    from hf_fused_mlp.launch_cache import mlp_kind

    gate, up, down, *_ = operands
    return mlp_kind(*operands), (*gate, *up, *down)


def remember(x, operands, run):
    """Keeps `run` as the answer to an MLP's call."""
    from hf_fused_mlp import launch_cache

    kind, tensors = kind_and_tensors(operands)
    launch_cache.remember(kind, (x, *tensors), run)


def look_up(x, operands):
    """The remembered answer to an MLP's call, or None."""
    from hf_fused_mlp import launch_cache

    kind, tensors = kind_and_tensors(operands)
    return launch_cache.answer(kind, (x, *tensors), (x, *operands[:3]))


def random_mlp(H, I, gated, bias, dtype, device="cpu", seed=0):
    """Operands of `ops.mlp` after `x`: weights over sqrt(fan_in), gate and up packed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    block = normal(2 * I, H, scale=H**-0.5)
    # a gated product is smaller than its factors; the scale keeps the output's RMS well over 0.1
    down = normal(H, I, scale=2 * I**-0.5)
    gate_bias, up_bias, down_bias = (normal(n, scale=0.5) for n in (I, I, H)) if bias else (None, None, None)
    if gated:
        return block[:I], block[I:], down, gate_bias, up_bias, down_bias
    return None, block[I:], down, None, up_bias, down_bias


def quantize_weight(weight, scales="fp32"):
    """`weight` `[N, K]` as e4m3 and its scales, fp32 or powers of two, of blocks of 128 x 128."""
    data, scale = quantize_weight_ref(weight)
    if scales == "fp32":
        return data, scale
    numbers, scale = dequantize(data, scale, torch.float32), scale.log2().ceil().exp2()
    # ones in place of its numbers make the matrix of scales
    data = numbers / dequantize(torch.ones_like(numbers).to(data.dtype), scale, torch.float32)
    return data.to(torch.float8_e4m3fn), scale.to(torch.float8_e8m0fnu)


def quantize_stack(weights, scales="fp32"):
    """The same of each of `weights` `[E, N, K]`."""
    data, factors = zip(*(quantize_weight(weight, scales) for weight in weights), strict=True)
    return torch.stack(data), torch.stack(factors)


def quantized_mlp(H, I, gated, bias, dtype, device="cpu", activation="silu", scales="fp32"):
    """Operands of `ops.mlp` after `x`, of `random_mlp`'s weights in FP8; gate and up are not packed."""
    *weights, gate_bias, up_bias, down_bias = random_mlp(H, I, gated, bias, dtype, device)
    pairs = [(None, None) if weight is None else quantize_weight(weight, scales) for weight in weights]
    data, factors = zip(*pairs, strict=True)
    return *data, gate_bias, up_bias, down_bias, activation, *factors


def random_halves(shape, dtype, device):
    """Gate and up as a packed projection gives them, rows with gaps, and wide enough for every activation to bend."""
    gate_up = 2 * torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(0))
    return gate_up.to(device, dtype).chunk(2, dim=-1)


def oracle_of(x, operands, activation):
    """The equation in float64 on the same rounded inputs."""
    return mlp_ref(x.double(), *(None if t is None else t.double() for t in operands), activation)
