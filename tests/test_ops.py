"""The operator: shapes, gradients, errors, and what `torch.compile` and `torch.export` see of it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import as_on_gpu, tiny_model, token_ids
from numerics import assert_accurate, linear, oracle_of, random_halves, random_mlp

from hf_fused_mlp import fuse_model, ops
from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.ops import dispatch
from hf_fused_mlp.reference import mlp_ref
from hf_fused_mlp.types import MLPOperands

DEVICES = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
KINDS = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])


def problem(where, gated=True, bias=True, dtype=torch.float32, H=64, I=96):
    return torch.randn(3, H, dtype=dtype, device=where), random_mlp(H, I, gated, bias, dtype, where)


@DEVICES
@KINDS
def test_opcheck(where, gated):
    x, operands = problem(where, gated)
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, *operands)]
    torch.library.opcheck(torch.ops.hf_fused_mlp.mlp.default, (*leaves, "silu"))


@DEVICES
@KINDS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(where, gated, activation):
    x, operands = problem(where, gated, dtype=torch.float64, H=5, I=4)
    leaves = [t.clone().requires_grad_() for t in (x, *operands) if t is not None]

    def call(*leaves):
        tensors = iter(leaves)
        return ops.mlp(*(None if t is None else next(tensors) for t in (x, *operands)), activation)

    assert torch.autograd.gradcheck(call, leaves)


@DEVICES
def test_gradients_for_what_wants_them_only(where):
    x, (gate, up, down, *_) = problem(where, bias=False)
    down.requires_grad_()
    ops.mlp(x, gate, up, down, None, None, None, "silu").sum().backward()
    expected = down.detach().clone().requires_grad_()
    mlp_ref(x, gate, up, expected, None, None, None, "silu").sum().backward()
    torch.testing.assert_close(down.grad, expected.grad)
    assert x.grad is None
    assert gate.grad is None


@DEVICES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_mul_opcheck_and_gradients(where, activation):
    gate, up = (half.detach().requires_grad_() for half in random_halves((2, 5), torch.float64, where))
    torch.library.opcheck(torch.ops.hf_fused_mlp.act_mul.default, (gate, up, activation))
    assert torch.autograd.gradcheck(lambda *halves: ops.act_mul(*halves, activation), (gate, up))
    assert torch.autograd.gradgradcheck(lambda *halves: ops.act_mul(*halves, activation), (gate, up))


@DEVICES
def test_act_mul_of_what_does_not_fit(where):
    gate, up = random_halves((3, 64), torch.float64, where)
    for wrong in (up[:, :5], up.float(), up[0]):
        with pytest.raises(ValueError, match="one shape, dtype and device"):
            ops.act_mul(gate, wrong, "silu")
    with pytest.raises(KeyError, match="unknown activation 'swish'"):
        ops.act_mul(gate, up, "swish")


@DEVICES
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 3, 4, 64), (0, 64), (2, 0, 64)], ids=str)
def test_shapes(where, shape):
    _, operands = problem(where)
    x = torch.randn(shape, device=where)
    out = ops.mlp(x, *operands, "silu")
    assert out.shape == x.shape
    torch.testing.assert_close(out, mlp_ref(x, *operands, "silu"), rtol=1e-4, atol=1e-4)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("M", [1, 5, 300])
def test_strides(where, M, dtype):
    """Inputs that are transposed, sliced, broadcast or at an odd address; weights that are not contiguous."""
    operands = random_mlp(64, 96, True, True, dtype, where)
    base = torch.randn(64, M + 1, device=where).to(dtype)
    wide = torch.randn(M, 65, device=where).to(dtype)
    for x in (base.T[:M], base.T[1:], wide[:, 1:], wide[:1, :64].expand(M, 64)):
        assert_accurate(ops.mlp(x, *operands, "silu"), mlp_ref(x, *operands, "silu"), oracle_of(x, operands, "silu"))
    gate, up, down, *biases = operands
    biases = [torch.stack((bias, bias + 1), 1)[:, 0] for bias in biases]
    transposed = (gate.T.contiguous().T, up.clone(), down.T.contiguous().T, *biases)
    x = base.T[:M]
    assert_accurate(ops.mlp(x, *transposed, "silu"), mlp_ref(x, *transposed, "silu"), oracle_of(x, transposed, "silu"))


@DEVICES
@torch.no_grad()
def test_a_view_that_is_negated(where):
    """Its memory holds the values with the other sign."""
    x, operands = problem(where)
    torch.testing.assert_close(ops.mlp(torch._neg_view(x), *operands, "silu"), ops.mlp(-x, *operands, "silu"))


@DEVICES
def test_output_size_may_differ_from_hidden(where):
    x, (gate, up, down, gate_bias, up_bias, down_bias) = problem(where)
    operands = gate, up, down[:40], gate_bias, up_bias, down_bias[:40]
    assert_accurate(ops.mlp(x, *operands, "gelu"), mlp_ref(x, *operands, "gelu"), oracle_of(x, operands, "gelu"))


@DEVICES
def test_operands_that_do_not_fit(where):
    x, (gate, up, down, gate_bias, up_bias, down_bias) = problem(where)
    wrong = [
        (x[:, :63], gate, up, down, gate_bias, up_bias, down_bias),
        (x, gate[:95], up, down, gate_bias, up_bias, down_bias),
        (x, gate, up, down[:, :95], gate_bias, up_bias, down_bias),
        (x, gate, up, down, gate_bias[:5], up_bias, down_bias),
        (x, gate, up, down, gate_bias, up_bias, up_bias),
        (x, None, up, down, gate_bias, up_bias, down_bias),
        (x.half(), gate, up, down, gate_bias, up_bias, down_bias),
        (torch.tensor(1.0, device=where), gate, up, down, gate_bias, up_bias, down_bias),
    ]
    for operands in wrong:
        with pytest.raises(ValueError, match=r"expected x \[\.\.\., H\]"):
            ops.mlp(*operands, "silu")
    with pytest.raises(KeyError, match="unknown activation 'swish'"):
        ops.mlp(x, gate, up, down, None, None, None, "swish")


@DEVICES
def test_compile_and_export(where):
    x, operands = problem(where)

    class Module(torch.nn.Module):
        def forward(self, x):
            return ops.mlp(x, *operands, "silu").relu()

    expected = Module()(x)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x), expected)
    program = torch.export.export(Module(), (x,), dynamic_shapes=({0: torch.export.Dim("m", min=2, max=64)},))
    torch.testing.assert_close(program.module()(x), expected)
    assert "hf_fused_mlp.mlp" in program.graph_module.code


@DEVICES
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox"])
@torch.no_grad()
def test_fused_model_compiles_without_a_break(where, model_type, monkeypatch):
    model = fuse_model(tiny_model(model_type).to(where))
    if where == "cpu":
        as_on_gpu(monkeypatch)
    ids = token_ids(1, 8).to(where)
    graphs = torch._dynamo.explain(model)(ids)
    assert graphs.graph_break_count == 0, graphs.break_reasons
    assert sum(graph.code.count("hf_fused_mlp.mlp(") for graph in graphs.graphs) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 3, 300])
@torch.no_grad()
def test_cuda_graph_capture(M):
    operands = random_mlp(256, 512, True, True, torch.bfloat16, "cuda")
    x, new = (torch.randn(M, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ops.mlp(x, *operands, "silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.mlp(x, *operands, "silu")
    x.copy_(new)
    graph.replay()
    assert torch.equal(out, ops.mlp(new, *operands, "silu"))


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("M", [1, 2, 16, 64, 300])
@torch.no_grad()
def test_overlapping_launches_give_the_bits_of_single_ones(M, gated):
    """A hundred calls in a row, and each again with its launches one by one, down after up is over."""
    operands = gate, up, down, gate_bias, up_bias, down_bias = random_mlp(
        2048, 4096, gated, True, torch.bfloat16, "cuda"
    )
    plan = dispatch.find_plan(dispatch.problem_key(M, MLPOperands.of(*operands, "silu")))
    tokens = torch.randn(100, M, 2048, device="cuda").bfloat16()
    queued = [ops.mlp(x, *operands, "silu") for x in tokens]
    for x, out in zip(tokens, queued, strict=True):
        h = linear(x, up, up_bias, gate, gate_bias, "silu", plan.up)
        torch.cuda.synchronize()
        assert torch.equal(out, linear(h, down, down_bias, None, None, "identity", plan.down))


@pytest.mark.gpu
def test_in_a_thread_that_has_not_used_the_gpu():
    operands = random_mlp(256, 512, True, True, torch.bfloat16, "cuda")
    x = torch.randn(300, 256, device="cuda").bfloat16()

    @torch.no_grad()
    def call():
        return ops.mlp(x, *operands, "silu")

    expected = call()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(call).result(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_a_gpu_that_is_not_the_current_one():
    model = fuse_model(tiny_model(dtype=torch.bfloat16).to("cuda:1"), strict=True)
    ids = token_ids(1, 8).to("cuda:1")
    assert torch.allclose(model(ids).logits, tiny_model(dtype=torch.bfloat16).to("cuda:1")(ids).logits, atol=0.1)
    assert model.to("cuda:0").model.layers[0].mlp.runs() == (None, None)


def test_what_is_remembered_under_autocast_is_of_one_dtype():
    """GEMMs give what autocast casts to, and a kernel that was compiled for one dtype would misread another."""
    kinds = {dispatch._kind("kind")}
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        for dtype in (torch.float16, torch.bfloat16):
            torch.set_autocast_dtype("cuda", dtype)
            kinds.add(dispatch._kind("kind"))
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
    assert len(kinds) == 3
