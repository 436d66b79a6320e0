"""Every kernel family against the oracle: interpreted on the CPU, compiled on a GPU."""

import importlib
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
from numerics import assert_accurate, linear, mlp_cuda, oracle_of, random_halves, random_mlp, run_plan
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.kernels import KERNELS, LAUNCHERS, _launch, describe_launch, epilogue, gemm
from hf_fused_mlp.kernels._launch import allocator, launcher
from hf_fused_mlp.ops.dispatch import act_mul_backward_cuda, act_mul_cuda
from hf_fused_mlp.reference import act_mul_ref, mlp_ref
from hf_fused_mlp.tuning.heuristics import heuristic_plan
from hf_fused_mlp.tuning.tuner import candidates
from hf_fused_mlp.types import GPU, TORCH, LinearKey, Matrix, Plan, ProblemKey, TileConfig, next_power_of_two

SMALL = {
    "gemv": TileConfig("gemv", block_k=32),
    "skinny": TileConfig("skinny", block_m=16, block_n=64, block_k=64, num_stages=3),
    "gemm": TileConfig("gemm", block_m=64, block_n=64, block_k=64, num_stages=3, group_m=2),
    "wide": TileConfig("wide"),
    "elementwise": TileConfig("elementwise"),
    "epilogue": TileConfig("epilogue"),
}
KINDS = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])


def check(family, M, H, I, device, gated=True, bias=False, activation="silu", dtype=torch.float16, config=None):
    operands = random_mlp(H, I, gated, bias, dtype, device)
    x = torch.randn(M, H, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    config = config or SMALL[family]
    plan = Plan(up=config, down=TORCH if config.kernel in ("elementwise", "wide") else config)
    assert_accurate(
        run_plan(plan, x, *operands, activation),
        mlp_ref(x, *operands, activation),
        oracle_of(x, operands, activation),
    )


@KINDS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family, M", [("gemv", 2), ("skinny", 3), ("gemm", 3), ("wide", 3)])
def test_activations(family, M, activation, gated, device):
    # in fp32 because the two GELUs differ by less than fp16 resolves
    dtype = torch.float32 if family in ("gemv", "wide") else torch.float16
    check(family, M, 72, 104, device, gated, bias=True, activation=activation, dtype=dtype)


@KINDS
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "family, M",
    [("gemv", 1), ("gemv", 2), ("gemv", 3), ("wide", 1), ("wide", 17)]
    + [(family, M) for family in ("skinny", "gemm") for M in (1, 2, 3, 16, 17, 63, 128)],
)
def test_token_counts(family, M, gated, bias, device):
    check(family, M, 72, 104, device, gated, bias)


@pytest.mark.parametrize("shape", [(100, 72), (72, 100), (33, 7), (128, 256)], ids=str)
@pytest.mark.parametrize("family, M", [("gemv", 2), ("skinny", 5), ("wide", 5)])
def test_any_hidden_and_intermediate_size(family, M, shape, device):
    check(family, M, *shape, device)


@pytest.mark.parametrize(
    "family, M, activation",
    [(f, M, a) for f, M in (("gemv", 2), ("skinny", 3), ("gemm", 3), ("wide", 3)) for a in ACTIVATIONS]
    + [("epilogue", 3, activation) for activation in epilogue.ACTIVATIONS],
)
def test_activations_of_extreme_values(activation, family, M, device):
    """Infinities, NaN and the ends of the range give what PyTorch gives."""
    ends = torch.tensor([float("inf"), -float("inf"), float("nan"), 65504.0, -65504.0, 0.0, -0.0, 6e-8] * 9)
    bias = ends.to(device, torch.float16)
    x, weight = torch.zeros(M, 104, dtype=torch.float16, device=device), bias.new_zeros(72, 104)
    out = linear(x, weight, bias, None, None, activation, SMALL[family])
    # on some processors oneDNN, to which PyTorch hands GELU on a CPU, makes NaN of infinity
    with torch.backends.mkldnn.flags(enabled=False):
        expected = ACTIVATIONS[activation].function(bias).expand(M, -1)
    torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("lead", [(), (1,), (17,), (2, 3), (1, 1, 300)], ids=str)
@pytest.mark.parametrize("activation", epilogue.ACTIVATIONS)
def test_epilogue(activation, lead, bias, device):
    """On a CPU PyTorch's operator has exact GELU, which is within fp16's tolerance of tanh GELU."""
    operands = random_mlp(72, 104, False, bias, torch.float16, device)
    x = torch.randn(*lead, 72, generator=torch.Generator().manual_seed(1)).to(device, torch.float16)
    out = run_plan(Plan(TileConfig("epilogue"), TORCH), x, *operands, activation)
    assert_accurate(out, mlp_ref(x, *operands, activation), oracle_of(x, operands, activation))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 300])
@pytest.mark.parametrize("activation", epilogue.ACTIVATIONS)
def test_epilogue_has_tanh_gelu(activation, m):
    """In fp32, because the two GELUs differ by less than fp16 resolves."""
    device = torch.device("cuda", 0)
    _, up, _, _, bias, _ = random_mlp(768, 3072, False, True, torch.float32, device)
    x = torch.randn(m, 768, device=device)
    out = linear(x, up, bias, None, None, activation, TileConfig("epilogue"))
    expected = ACTIVATIONS[activation].function(torch.nn.functional.linear(x.double(), up.double(), bias.double()))
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 2, 33, 300, 2048])
@pytest.mark.parametrize("activation", epilogue.ACTIVATIONS)
def test_epilogue_of_the_library(activation, m, dtype):
    """In sizes for which the library has its own epilogue, one kernel runs."""
    device = torch.device("cuda", 0)
    operands = random_mlp(768, 3072, False, True, dtype, device)
    x = torch.randn(m, 768, device=device, dtype=dtype)
    plan = Plan(TileConfig("epilogue"), TORCH)
    assert_accurate(
        run_plan(plan, x, *operands, activation), mlp_ref(x, *operands, activation), oracle_of(x, operands, activation)
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        linear(x, operands[1], operands[4], None, None, activation, TileConfig("epilogue"))
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if "Memset" not in event.name]
    assert kernels and not any("elementwise" in name for name in kernels), kernels


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_elementwise(activation, dtype, device):
    check("elementwise", 65, 72, 104, device, bias=True, activation=activation, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(7,), (1, 1030), (2, 3, 1500), (300, 8)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_mul(activation, shape, dtype, device):
    """Activation and product by themselves, and their gradients."""
    gate, up = random_halves(shape, dtype, device)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    results = act_mul_cuda(gate, up, activation), *act_mul_backward_cuda(grad, gate, up, activation)
    expected = act_mul_by_autograd(grad, gate, up, activation)
    oracle = act_mul_by_autograd(grad.double(), gate.double(), up.double(), activation)
    for result, eager, exact in zip(results, expected, oracle, strict=True):
        assert_accurate(result, eager, exact)


ENDS = [
    float("nan"),
    float("inf"),
    3.4028234663852886e38,
    1e30,
    4e19,
    1.85e19,
    2e13,
    1e13,
    1e5,
    300.0,
    100.0,
    20.0,
    0.0,
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("other", [1.0, 3.0, -1e-3, 0.0, 1e30, float("nan")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_mul_of_extreme_values(activation, other, device):
    """Product and gradients are infinite, NaN and zero where eager's are, at either end of the range and beyond it."""
    values = torch.tensor(ENDS, device=device)
    gate = torch.cat((values, -values)).repeat(2, 1)
    up, grad = torch.full_like(gate, other), torch.tensor([[1.0], [2.0]], device=device).expand_as(gate)
    results = act_mul_cuda(gate, up, activation), *act_mul_backward_cuda(grad, gate, up, activation)
    with torch.backends.mkldnn.flags(enabled=False):  # whose GELU of infinity is NaN, as no other's
        expected = act_mul_by_autograd(grad, gate, up, activation)
    for result, eager in zip(results, expected, strict=True):
        torch.testing.assert_close(result, eager, equal_nan=True)


def act_mul_by_autograd(grad, gate, up, activation):
    """The product, and the gradients of gate and up."""
    gate, up = (half.detach().requires_grad_() for half in (gate, up))
    out = act_mul_ref(gate, up, activation)
    return out.detach(), *torch.autograd.grad(out, (gate, up), grad)


LONG = (1 << 22) + 1


@pytest.mark.parametrize("H, lead", [(1, (5,)), (1, (1,)), (1, (2, 3)), (LONG, (1,)), (LONG, (2,))], ids=str)
def test_tokens_without_rows(H, lead, device, monkeypatch):
    """Contiguous, and yet no rows to the kernels: a copy of them has, or PyTorch's operations run."""
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    x = torch.randn(H, *lead[::-1], device=device).permute(*range(len(lead), -1, -1))
    operands = random_mlp(H, 3, True, False, torch.float32, device)
    for tokens in (x, x.contiguous(), x[:1].expand_as(x)):
        torch.testing.assert_close(mlp_cuda(tokens, *operands, "silu"), mlp_ref(tokens, *operands, "silu"))


def test_one_column(device):
    gate, up, grad = torch.randn(3, 1, 5, device=device).transpose(1, 2)
    results = act_mul_cuda(gate, up, "silu"), *act_mul_backward_cuda(grad, gate, up, "silu")
    for result, eager in zip(results, act_mul_by_autograd(grad, gate, up, "silu"), strict=True):
        torch.testing.assert_close(result, eager)


@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize("M, split_k", [(2, 2), (17, 3), (40, 4)])
def test_split_k(M, split_k, activation, device):
    """Each part of K summed by itself, some parts empty, then all of them with bias and activation."""
    config = replace(SMALL["skinny"], split_k=split_k)
    check("skinny", M, 72, 300, device, gated=False, bias=True, activation=activation, config=config)


@KINDS
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("group_m", [1, 2])
def test_gemm_halves_the_last_tiles(gated, bias, group_m, device, monkeypatch):
    """The CPU counts as four multiprocessors: six tiles are a round of four, and two that run as four halves."""
    wholes = []

    def spy(kernel, device, grid, values, tilings, **options):
        wholes.append(values[3] if tilings[3] is not None else None)
        return launcher(kernel, device, grid, values, tilings, **options)

    monkeypatch.setattr(gemm, "launcher", spy)
    sms = GPU.of(device).num_sms
    rows = 64 * (sms + sms // 2) // 2  # for the two columns of tiles that up and down have
    check("gemm", rows - 3, 72, 104, device, gated, bias, config=replace(SMALL["gemm"], group_m=group_m))
    assert wholes == [sms, sms]


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gemv_fp32_is_exact(activation, device):
    check("gemv", 1, 72, 104, device, dtype=torch.float32, activation=activation)


def test_gemv_bf16(device):
    check("gemv", 1, 72, 104, device, dtype=torch.bfloat16)


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("shape", [(1, 1000, 2736), (64, 1008, 2736), (1000, 2736, 1000)], ids=str)
def test_every_candidate(shape, gated):
    """All that a tuner may choose is right."""
    dtype = torch.bfloat16
    device = torch.device("cuda", 0)
    M, H, I = shape
    key = LinearKey(next_power_of_two(M), I, H, gated, "silu", dtype, True, GPU.of(device))
    ran = set()
    for config in candidates(key):
        try:
            check(config.kernel, M, H, I, device, gated, bias=True, dtype=dtype, config=config)
        except OutOfResources:
            continue
        ran.add(config.kernel)
    expected = {
        1: {"gemv"},
        64: {"skinny", "gemm", "wide"},
        1000: {"gemm", "wide", *(("elementwise",) if gated else ())},
    }
    assert ran == {"torch"} | expected[M]


def test_one_token_for_many_rows(device):
    """Rows that share memory, at an address that no tensor descriptor can have."""
    token = torch.randn(65, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)[1:]
    gate, up, *_ = random_mlp(64, 104, True, False, torch.float16, device)
    out = linear(token.expand(70, 64), up, None, gate, None, "silu", SMALL["gemm"])
    assert torch.equal(out, linear(token.repeat(70, 1), up, None, gate, None, "silu", SMALL["gemm"]))


def test_new_memory_holds_nan(device):
    """Or else a tile that no program writes could go unseen."""
    for lead in ((), (2,)):
        assert allocator((*lead, 3, 8), torch.float16, torch.device(device.type, 0))().isnan().all()


class Kernel:
    """In place of Triton's function: to compile it is to give `binary`."""

    def __init__(self, binary):
        self.binary, self.compiled = binary, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.compiled.append(args) or self.binary


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: f"stream of {index}", raising=False)
    return "stream of 3"


def test_a_launcher_keeps_its_binary(stream):
    """The first launch compiles, and the next run what it compiled."""
    calls = []
    kernel = Kernel(SimpleNamespace(function="f", packed_metadata="metadata", run=lambda *args: calls.append(args)))
    tensors = torch.zeros(64), torch.zeros(64)
    launch = launcher(kernel, torch.device("cuda", 3), (1, 2, 3), (7,))
    for tensor in (*tensors, *tensors):
        launch((tensor, None))
    fixed = 1, 2, 3, stream, "f", "metadata", None, None, None
    first, second = ((*fixed, tensor.data_ptr(), None, 7) for tensor in tensors)
    assert calls == [second, first, second]
    assert len(kernel.compiled) == 1


def test_a_launcher_keeps_tensor_maps(stream, monkeypatch):
    """The driver's launch gets what Triton would make of the descriptors, which is made once for an address.

    Where Triton's launcher is one that we do not look into, it makes them itself, for each launch.
    """
    driver, runtime = pytest.importorskip("triton.backends.nvidia.driver"), importlib.import_module("triton.runtime")
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 9, "block_size": [16, 64], "fp4_padded": False}
    calls, maps = [], []
    utils = SimpleNamespace()
    # newer versions of Triton call it by the second name
    utils.fill_tma_descriptor = utils.fill_tma_descriptor_tiled = lambda *args: maps.append(args) or ("map", *args)
    monkeypatch.setattr(runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    monkeypatch.setattr(_launch, "_bind_context", lambda device: None)
    signature = {"x": "tensordesc<fp16[16,64]>", "half": "constexpr", "bias": "*fp16", "K": "i32"}
    # what its constructor reads off a compiled kernel
    run = object.__new__(driver.CudaLauncher)
    run.launch = driver.wrap_handle_tensordesc(lambda *args: calls.append(args), signature, [meta])
    run.num_ctas, run.launch_cooperative_grid, run.launch_pdl = 1, False, True
    run.global_scratch_size = run.global_scratch_align = run.profile_scratch_size = run.profile_scratch_align = 0
    run.gsan_enabled, run.arg_annotations, run.kernel_signature = False, "annotations", "signature"
    kernel = Kernel(SimpleNamespace(function="f", packed_metadata="metadata", run=run))
    tiling = [32, 128], [128, 1], [16, 64]
    x, other, bias = (torch.zeros(32, 128, dtype=torch.float16) for _ in range(3))
    launch = launcher(kernel, torch.device("cuda", 3), (1, 2, 3), (7,), (tiling, None))
    for tensor in (x, x, other, x, other):
        launch((bias,), (tensor, None))
    kept = len(maps)
    expected = []
    for tensor in (x, other, x, other):
        whole = TensorDescriptor(tensor, *tiling)
        run(1, 2, 3, stream, "f", "metadata", None, None, None, whole, None, bias.data_ptr(), 7)
        expected.append(calls.pop())
    assert calls == expected
    assert kept == (2 if triton.__version__.startswith("3.6.") else 4)


def test_plans_fit_the_problem():
    """Whatever the problem, the plan names kernels that support it."""
    gpus = [GPU("H100", 132, (9, 0), 232448), GPU("A100", 108, (8, 0), 166912), GPU("T4", 40, (7, 5), 65536)]
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    sizes = itertools.product([1, 2, 16, 128, 256, 16384], [64, 100, 4096], [64, 36, 14336])
    for (m, H, I), gated, activation, dtype, one_block, gpu in itertools.product(
        sizes, [True, False], ACTIVATIONS, dtypes, [True, False], gpus
    ):
        key = ProblemKey(m, H, I, H, gated, activation, dtype, False, one_block, gpu)
        plan = heuristic_plan(key)
        for launch, config in ((key.up, plan.up), (key.down, plan.down)):
            assert config.kernel == "torch" or KERNELS[config.kernel].supports(launch) is None


@KINDS
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("family", SMALL)
def test_a_launch_serves_all_tensors_of_its_kind(family, bias, gated, device):
    """Made once, for strided tokens, and then run on others, it gives the bits of one that is made for them."""
    if family == "elementwise" and not gated:
        return
    M, H, I, activation = 5, 72, 104, "gelu"
    wide = torch.randn(4, M, H + 8).to(torch.float16).to(device)
    run = None
    for i, x in enumerate(wide[..., :H]):
        gate, up, _, gate_bias, up_bias, _ = random_mlp(H, I, gated, bias, torch.float16, device, seed=i)
        if run is None:
            call = describe_launch(x, up, gated, activation)
            assert call.stride_xm == H + 8
            run = LAUNCHERS[family](call, SMALL[family])
        expected = linear(x, up, up_bias, gate, gate_bias, activation, SMALL[family])
        assert torch.equal(run(x, Matrix(up, None, up_bias), Matrix(gate, None, gate_bias)), expected)
