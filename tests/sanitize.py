"""Every kernel on small ragged shapes, for `make sanitize` to watch. A wrong answer is an error."""

import torch
from numerics import assert_accurate, oracle_of, random_mlp, run_plan

from hf_fused_mlp import ops
from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.reference import act_mul_ref, mlp_ref
from hf_fused_mlp.types import TORCH, Plan, TileConfig

H, I = 200, 328
PLANS = (
    (1, TileConfig("gemv", block_k=128)),
    (2, TileConfig("gemv", block_k=128)),
    (17, TileConfig("skinny", 32, 64, 64, num_stages=3, split_k=2)),
    (129, TileConfig("elementwise")),
    (129, TileConfig("wide")),
    (129, TileConfig("gemm", 64, 64, 64, num_warps=4, num_stages=3, group_m=2)),
    (17, TileConfig("transposed_skinny", 32, 64, 64, num_stages=3, split_k=2)),
)

for M, config in PLANS:
    transposed = config.kernel.startswith("transposed")
    for gated in (False,) if transposed else (True, False) if config.kernel != "elementwise" else (True,):
        operands = random_mlp(H, I, gated, True, torch.bfloat16, "cuda")
        if transposed:
            operands = [t if t is None or t.dim() == 1 else t.t().contiguous().t() for t in operands]
        x = torch.randn(M, H, device="cuda", dtype=torch.bfloat16)
        plan = Plan(config, TORCH if config.kernel in ("elementwise", "wide") else config)
        out = run_plan(plan, x, *operands, "gelu")
        again = run_plan(plan, x, *operands, "gelu")
        assert torch.equal(out, again), (M, config)
        assert_accurate(out, mlp_ref(x, *operands, "gelu"), oracle_of(x, operands, "gelu"))
        print(f"{config.kernel}, {M} tokens, {'gated' if gated else 'plain'}: right", flush=True)

halves = torch.randn(2, 5, 1100, device="cuda", dtype=torch.bfloat16)


def gradients(act_mul, activation, dtype=torch.bfloat16):
    gate, up = pair = [half.to(dtype).requires_grad_() for half in halves.unbind()]
    return torch.stack(torch.autograd.grad(act_mul(gate, up, activation).sum(), pair))


for activation in ACTIVATIONS:
    expected, oracle = (gradients(act_mul_ref, activation, dtype) for dtype in (torch.bfloat16, torch.float64))
    assert_accurate(gradients(ops.act_mul, activation), expected, oracle)
    print(f"gradients of act_mul, {activation}: right", flush=True)
