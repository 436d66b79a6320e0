"""`batch_invariant=True`: a token's output does not depend on how many others there are, to the bit."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import as_on_gpu, tiny_model, tiny_moe
from numerics import assert_accurate, mlp_cuda, oracle_of, random_mlp

from hf_fused_mlp import FusionError, fuse_model, fusion_report, ops, unfuse_model
from hf_fused_mlp.families.mlp import checks
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.kernels import KERNELS
from hf_fused_mlp.ops import dispatch
from hf_fused_mlp.reference import mlp_ref
from hf_fused_mlp.swap import Fused
from hf_fused_mlp.tuning.invariant import BLOCK_K, invariant_plan
from hf_fused_mlp.types import GPU, TORCH, Plan, ProblemKey, TileConfig

KINDS = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])


def outputs(x, counts, operands, activation):
    """By token count, what the first tokens of `x` give."""
    return {m: mlp_cuda(x[:m], *operands, activation, None, None, None, True) for m in counts}


@KINDS
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(200, 328), (100, 72)], ids=str)
def test_rows_do_not_depend_on_the_token_count(shape, bias, gated, device):
    """Of the second shape the rows are not aligned, and another kernel runs."""
    operands = random_mlp(*shape, gated, bias, torch.float16, device)
    x = torch.randn(130, shape[0], generator=torch.Generator().manual_seed(2)).to(device, torch.float16)
    found = outputs(x, (1, 2, 8, 17, 64, 130), operands, "gelu")
    for m, out in found.items():
        assert torch.equal(out, found[130][:m]), m
    assert_accurate(found[130], mlp_ref(x, *operands, "gelu"), oracle_of(x, operands, "gelu"))


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """The CPU's library adds in an order that depends on a tile's sides, which tensor cores do not: tiles are
    multiplied in fp64, of which the order does not show in fp32."""

    def create_dot(builder, a, b, acc, *_):
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(acc.data.dtype)
        return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)

    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def no_current_device(monkeypatch):
    """Remembered launches ask for it, on a CPU too."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)


def test_a_token_gives_the_same_at_any_place(device):
    operands = random_mlp(200, 328, True, False, torch.float16, device)
    x = torch.randn(70, 200, generator=torch.Generator().manual_seed(2)).to(device, torch.float16)
    (whole,) = outputs(x, (70,), operands, "silu").values()
    for row in (1, 16, 63, 64, 69):
        (alone,) = outputs(x[row:], (1,), operands, "silu").values()
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("gpu", [GPU("H100", 132, (9, 0), 232448), GPU("A10", 72, (8, 6), 65536)], ids=str)
@KINDS
def test_plans(gated, gpu):
    """One kernel and one step along K at every token count, K not split, and nothing of PyTorch's."""
    for hidden, intermediate, one_block in ((4096, 14336, True), (4096, 14336, False), (1000, 2730, True)):
        key = ProblemKey(1, hidden, intermediate, hidden, gated, "silu", torch.float16, False, one_block, gpu)
        plans = [invariant_plan(replace(key, m=m)) for m in (1, 2, 3, 17, 64, 128, 300, 4096, 16384)]
        for configs in ([plan.up for plan in plans], [plan.down for plan in plans]):
            assert len({config.kernel for config in configs}) == 1
            assert {config.block_k for config in configs} == {BLOCK_K}
            assert {config.split_k for config in configs} == {1}
            assert configs[0].kernel in KERNELS
        assert all(plan.down != TORCH for plan in plans)
        assert invariant_plan(replace(key, out=0)).down == TORCH
    for changes in ({"dtype": torch.float32}, {"storage": "fp8"}, {"storage": "transposed"}):
        assert invariant_plan(replace(key, **changes)) is None
    assert invariant_plan(replace(key, gpu=GPU("T4", 40, (7, 5), 65536))) is None, "it would multiply on CUDA cores"


def test_where_there_are_no_such_kernels(device, caplog):
    dispatch._warn_of_variance.cache_clear()
    operands = random_mlp(72, 104, True, False, torch.float32, device)
    x = torch.randn(3, 72).to(device)
    for _ in range(2):
        out = mlp_cuda(x, *operands, "silu", None, None, None, True)
    assert_accurate(out, mlp_ref(x, *operands, "silu"), oracle_of(x, operands, "silu"))
    # gate as it is stored usually, up and down not
    gate, up, down, *biases = (tensor if tensor is None else tensor.half() for tensor in operands)
    mlp_cuda(x.half(), gate, up.t().contiguous().t(), down, *biases, "silu", None, None, None, True)
    assert [record.getMessage() for record in caplog.records] == [
        "batch_invariant: no kernels for torch.float32 have sums that ignore the token count; load as bfloat16 or "
        "float16; the usual ones run",
        "batch_invariant: no kernels for weights stored in several ways have sums that ignore the token count; the "
        "usual ones run",
    ]


def test_a_plan_that_does_not_run(device, monkeypatch, caplog):
    """Nothing that is tuned would help: what runs instead is said not to be invariant."""
    broken = Plan(TileConfig("gemm", 64, 32, 3, num_stages=2), TORCH)
    monkeypatch.setattr(dispatch, "invariant_plan", lambda key: broken)
    operands = random_mlp(72, 104, True, False, torch.float16, device)
    x = torch.randn(3, 72).to(device, torch.float16)
    for _ in range(2):
        mlp_cuda(x, *operands, "silu", None, None, None, True)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"batch_invariant: {broken} does not run here (")
    assert record.getMessage().endswith("; PyTorch's GEMMs do, whose sums depend on the token count")


LORA = "a layer must be called, which may add in another order"


@pytest.mark.parametrize(
    "make, reason",
    [
        (tiny_model, "no kernels for torch.float32"),
        (lambda: tiny_model("gpt2", torch.float16), r"stored as \[in, out\]"),
        (lambda: with_hooks(tiny_model(dtype=torch.float16)), LORA),
    ],
    ids=["fp32", "Conv1D", "hooks"],
)
def test_refused(make, reason, monkeypatch):
    """What would depend on the token count is not fused; one form or none."""
    as_on_gpu(monkeypatch)
    model = make()
    fuse_model(model)
    with pytest.raises(FusionError, match=f"batch_invariant: .*{reason}"):
        fuse_model(model, strict=True, batch_invariant=True)
    fuse_model(model, batch_invariant=True)
    assert not any(isinstance(module, Fused) for module in model.modules())


def with_hooks(model):
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: None)
    return model


@torch.no_grad()
def test_a_layer_that_is_called_later(monkeypatch, caplog):
    as_on_gpu(monkeypatch)
    checks.warn_of_variance.cache_clear()
    model = fuse_model(tiny_model(dtype=torch.float16), strict=True, batch_invariant=True)
    with_hooks(model)(torch.ones(1, 3, dtype=torch.long))
    assert caplog.records[-1].getMessage().startswith(f"batch_invariant: {LORA}")


def test_a_failure_leaves_the_form_that_was(monkeypatch):
    as_on_gpu(monkeypatch)
    model = fuse_model(tiny_model(dtype=torch.float16))
    before = [type(module) for module in model.modules()]
    last, repack = model.model.layers[-1].mlp, FusedMLP.repack

    def fail(module):
        if module is last and module.batch_invariant:
            raise MemoryError
        repack(module)

    monkeypatch.setattr(FusedMLP, "repack", fail)
    with pytest.raises(MemoryError):
        fuse_model(model, batch_invariant=True)
    assert [type(module) for module in model.modules()] == before


@pytest.fixture
def flags(monkeypatch):
    """The option as the operator was given it, a call each."""
    as_on_gpu(monkeypatch)
    given, operator = [], ops.mlp_if_fits

    def counted(x, operands):
        given.append(operands.batch_invariant)
        return operator(x, operands)

    monkeypatch.setattr(ops, "mlp_if_fits", counted)
    return given


@torch.no_grad()
def test_the_option_reaches_the_operator(flags):
    model, x = tiny_model(dtype=torch.float16), torch.ones(1, 3, dtype=torch.long)
    fuse_model(model, strict=True)
    model(x)
    assert flags and not any(flags)
    flags.clear()
    fuse_model(model, strict=True, batch_invariant=True)
    for variant in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        variant(x)
    assert flags and all(flags)
    flags.clear()
    fuse_model(model)
    model(x)
    assert flags and all(flags), "fusing again fuses what is not fused yet, and leaves the rest"
    unfuse_model(model)
    fuse_model(model)
    flags.clear()
    model(x)
    assert flags and not any(flags)


def test_the_operator_and_its_gradients():
    x = torch.randn(3, 8, requires_grad=True)
    operands = random_mlp(8, 12, True, True, torch.float32)
    out = ops.mlp(x, *operands, "silu", batch_invariant=True)
    (grad,) = torch.autograd.grad(out.sum(), x)
    (expected,) = torch.autograd.grad(mlp_ref(x, *operands, "silu").sum(), x)
    torch.testing.assert_close(grad, expected)
    names = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(torch.ops.hf_fused_mlp.mlp, (x, *operands, "silu", None, None, None, True), test_utils=names)


def test_experts_stay_as_they_are(monkeypatch, caplog):
    as_on_gpu(monkeypatch)
    model = tiny_moe(dtype=torch.float16)
    with pytest.raises(FusionError, match="batch_invariant: no kernels for"):
        fuse_model(model, strict=True, batch_invariant=True)
    fuse_model(model, batch_invariant=True)
    assert "batch_invariant: no kernels for" in caplog.text
    assert "fused" not in {status.state for group in fusion_report(model).families[1:] for status in group.modules}
    fuse_model(model)
    fuse_model(model, batch_invariant=True)
    assert not any(isinstance(module, Fused) for module in model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "hidden, intermediate, gated", [(1024, 2816, True), (4096, 14336, True), (2048, 8192, False), (1000, 2730, True)]
)
@torch.no_grad()
def test_on_a_gpu(hidden, intermediate, gated, dtype):
    operands = random_mlp(hidden, intermediate, gated, not gated, dtype, "cuda")
    x = torch.randn(4096, hidden, device="cuda").to(dtype)
    counts = (1, 2, 8, 17, 64, 128, 512, 4096)
    found = {m: ops.mlp(x[:m], *operands, "gelu_tanh", batch_invariant=True) for m in counts}
    for m, out in found.items():
        assert torch.equal(out, found[4096][:m]), m
    for row in (3, 130, 4095):
        (alone,) = ops.mlp(x[row : row + 1], *operands, "gelu_tanh", batch_invariant=True)
        assert torch.equal(alone, found[4096][row])
    assert_accurate(found[17], mlp_ref(x[:17], *operands, "gelu_tanh"), oracle_of(x[:17], operands, "gelu_tanh"))
