"""Every kernel family, as its launcher launches it, compiles for every GPU it may meet. No GPU needed."""

import itertools
import re
import subprocess
import tempfile
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from numerics import linear, quantized_mlp, random_mlp

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.kernels import describe_launch, fp8_gemm, norm
from hf_fused_mlp.kernels import linear as launch_linear
from hf_fused_mlp.kernels.experts import choices, describe_experts, prepare_experts, rule_of_thumb
from hf_fused_mlp.ops.dispatch import act_mul_backward_cuda, act_mul_cuda
from hf_fused_mlp.reading.norm import FORMS
from hf_fused_mlp.tuning import cache
from hf_fused_mlp.tuning.heuristics import heuristic_plan
from hf_fused_mlp.tuning.invariant import invariant_plan
from hf_fused_mlp.types import GPU, ExpertsCall, ExpertsForm, Matrix, ProblemKey, TileConfig

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CONFIGS = {
    "gemv": TileConfig("gemv", block_k=4096),
    "skinny": TileConfig("skinny", block_m=16, block_n=64, block_k=128, num_stages=4),
    "split skinny": TileConfig("skinny", block_m=16, block_n=64, block_k=128, num_stages=4, split_k=2),
    "elementwise": TileConfig("elementwise"),
    "wide": TileConfig("wide"),
    "gemm": TileConfig("gemm", 128, 128, 64, num_warps=8, num_stages=4, group_m=8),
}
TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_compiles(family, gated, bias, dtype, target, monkeypatch):
    if family == "elementwise" and not gated:
        pytest.skip("has a gate")
    first, *rest = compile_launches(family, gated, bias, dtype, TARGETS[target], monkeypatch)
    assert len(rest) == (family == "split skinny" and not gated)
    for kernel in (first, *rest):
        code = kernel.asm["ptx" if target.startswith("sm") else "amdgcn"]
        assert code
        assert ("griddepcontrol.launch_dependents" in code) == (target in ("sm_90", "sm_100"))
        assert ("griddepcontrol.wait" in code) == (target in ("sm_90", "sm_100") and family != "elementwise")
    if target == "sm_90":
        # the product runs on Hopper's tensor cores
        assert ("wgmma.mma_async" in first.asm["ptx"]) == (family in ("skinny", "split skinny", "gemm"))


def compile_launches(family, gated, bias, dtype, target, monkeypatch, activation="silu"):
    """The compiled kernels of one launch, caught between the launcher and the driver."""
    gate, up, _, gate_bias, up_bias, _ = random_mlp(256, 512, gated, bias, dtype)
    x = torch.randn(16, 256, dtype=dtype)
    return compiled(lambda: linear(x, up, up_bias, gate, gate_bias, activation, CONFIGS[family]), target, monkeypatch)


def compiled(call, target, monkeypatch, shared=232448):
    """The kernels that a call would launch on `target`."""
    capability = divmod(target.arch, 10) if target.backend == "cuda" else (0, 0)
    # three multiprocessors for four tiles, so that the kernels compiled hold the code for halved tiles too
    monkeypatch.setattr(GPU, "of", lambda device: GPU("a GPU", 3, capability, shared))
    launches = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **kw: launches.append((self, args, kw)))
    cache.forget()
    call()
    cache.forget()
    monkeypatch.undo()
    return [compile_launch(*launch, target) for launch in launches]


def compile_launch(function, args, options, target):
    signature, constexprs, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(function.params, args, strict=True)):
        if parameter.is_constexpr or value is None:
            kind = "constexpr"
            constexprs[(index,)] = value
        elif isinstance(value, TensorDescriptor):
            kind = f"tensordesc<{TYPE_NAMES[value.base.dtype]}{list(value.block_shape)}>"
        else:
            kind = f"*{TYPE_NAMES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
    source = ASTSource(function, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_compiles_every_activation(family, activation, monkeypatch):
    (kernel,) = compile_launches(family, True, True, torch.float16, TARGETS["sm_90"], monkeypatch, activation)
    assert kernel.asm["ptx"]


TURING = GPUTarget("cuda", 75, 32)  # runs fp16 alone, and what multiplies no tiles


@pytest.mark.parametrize("target", [*TARGETS, "sm_75"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_mul_compiles(activation, target, monkeypatch):
    dtype = torch.float16 if target == "sm_75" else torch.bfloat16
    grad, gate, up = (torch.randn(3, 100, dtype=dtype) for _ in range(3))
    for function, tensors in ((act_mul_cuda, (gate, up)), (act_mul_backward_cuda, (grad, gate, up))):
        (kernel,) = compiled(partial(function, *tensors, activation), TARGETS.get(target, TURING), monkeypatch)
        assert kernel.asm["ptx" if target.startswith("sm") else "amdgcn"]


@pytest.mark.parametrize("target", [*TARGETS, "sm_75"])
@pytest.mark.parametrize("hidden", [128, 4096, norm.LONGEST])
@pytest.mark.parametrize("form", FORMS)
def test_rms_norm_compiles(form, hidden, target, monkeypatch):
    dtype = torch.float16 if target == "sm_75" else torch.bfloat16
    x, weight = torch.randn(3, hidden, dtype=dtype), torch.randn(hidden, dtype=dtype)
    call = describe_launch(x, weight[None], False, "identity")
    target_of = TARGETS.get(target, TURING)
    (kernel,) = compiled(lambda: norm.rms_norm(call, 1e-6, form)(x, weight), target_of, monkeypatch)
    assert kernel.asm["ptx" if target.startswith("sm") else "amdgcn"]


TRANSPOSED_CONFIGS = {
    "skinny": TileConfig("transposed_skinny", block_m=16, block_n=64, block_k=128, num_stages=4),
    "split": TileConfig("transposed_skinny", block_m=16, block_n=64, block_k=128, num_stages=4, split_k=2),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", TRANSPOSED_CONFIGS)
def test_transposed_compiles(family, dtype, target, monkeypatch):
    """Weights are read 16 bytes at a time along the rows that are stored, and change their layout nowhere else."""
    weight, bias = torch.randn(768, 3072, dtype=dtype).t(), torch.randn(3072, dtype=dtype)
    x = torch.randn(16, 768, dtype=dtype)
    call = partial(linear, x, weight, bias, None, None, "gelu_tanh", TRANSPOSED_CONFIGS[family])
    first, *rest = compiled(call, TARGETS[target], monkeypatch)
    assert len(rest) == (family == "split")
    codes = [kernel.asm["ptx" if target.startswith("sm") else "amdgcn"] for kernel in (first, *rest)]
    assert all(codes)
    for code in codes:
        assert ("griddepcontrol.wait" in code) == (target in ("sm_90", "sm_100"))
    if target == "sm_90":
        assert "wgmma.mma_async" in codes[0] and "cp.async.cg.shared.global" in codes[0]
        assert first.asm["ttgir"].count("ttg.convert_layout") <= 1


# name, multiprocessors, and bytes of shared memory that a block may have
GPUS = {
    "sm_75": ("Tesla T4", 40, 65536),
    "sm_80": ("A100", 108, 166912),
    "sm_86": ("A10", 72, 101376),
    "sm_89": ("L4", 58, 101376),
    "sm_90": ("H100", 132, 232448),
    "sm_100": ("B200", 148, 232448),
    "gfx942": ("MI300X", 304, 65536),
}


def picked(gpu):
    """What the rule and batch invariance pick on `gpu` for a middle-sized MLP, as pairs of tiles and a launch."""
    launches = {}
    for m, gated in itertools.product((1, 2, 8, 32, 64, 128, 300, 600, 4096), (True, False)):
        key = ProblemKey(m, 2048, 8192, 2048, gated, "silu", torch.float16, not gated, True, gpu)
        others = replace(key, one_block=False), replace(key, storage="transposed", gated=False)
        for problem in (key, *(others if gpu.capability == (7, 5) else ())):
            for plan in filter(None, (heuristic_plan(problem), invariant_plan(problem))):
                for launch, config in ((problem.up, plan.up), (problem.down, plan.down)):
                    if config.kernel != "torch":
                        launches[launch.gated, launch.activation, config] = launch
    return [(config, launch) for (*_, config), launch in launches.items()]


@pytest.mark.slow
@pytest.mark.parametrize("target", GPUS)
def test_what_is_picked_fits_the_gpu(target, monkeypatch):
    """Shared memory is within the device's limit, and on NVIDIA's no registers are spilled."""
    name, sms, shared = GPUS[target]
    arch = "gfx942" if target == "gfx942" else int(target[3:])
    backend = TARGETS.get(target) or GPUTarget("cuda", arch, 32)
    gpu = GPU(name, sms, divmod(arch, 10) if backend.backend == "cuda" else (0, 0), shared)
    for config, launch in picked(gpu):
        gate, up, _, gate_bias, up_bias, _ = random_mlp(256, 512, launch.gated, not launch.gated, torch.float16)
        if launch.storage == "transposed":
            up = up.t().contiguous().t()
        x = torch.randn(min(launch.m, 16), 256).half()
        call = partial(linear, x, up, up_bias, gate, gate_bias, launch.activation, config)
        for kernel in compiled(call, backend, monkeypatch, shared):
            assert kernel.metadata.shared <= shared, (config, kernel.metadata.shared)
            assert target != "sm_75" or "tt.dot" not in kernel.asm["ttir"], "it would multiply on the CUDA cores"
            if backend.backend == "cuda" and CUOBJDUMP:
                assert stack_bytes(kernel) <= 64, config  # more holds registers


FP8_CONFIGS = {
    "fp8_gemv": TileConfig("fp8_gemv", block_n=1, block_k=4096),
    "fp8_skinny": TileConfig("fp8_skinny", block_m=16, block_n=64, block_k=128, num_stages=4),
    "split fp8_skinny": TileConfig("fp8_skinny", block_m=16, block_n=64, block_k=128, num_stages=4, split_k=2),
    "fp8_dequantized": TileConfig("fp8_dequantized"),
    "fp8_gemm": TileConfig("fp8_gemm"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scales", ["fp32", "e8m0"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("family", FP8_CONFIGS)
def test_fp8_compiles(family, gated, scales, target, monkeypatch):
    """GPUs that know no FP8 read bytes; the library's block-scaled GEMM exists on Hopper alone."""
    if family == "fp8_gemm" and target != "sm_90":
        pytest.skip("made for Hopper")
    gate, up, _, gate_bias, up_bias, _, _, *factors = quantized_mlp(
        512, 512, gated, True, torch.bfloat16, scales=scales
    )
    gate_scale, up_scale, _ = factors
    x = torch.randn(16, 512, dtype=torch.bfloat16)
    weight, gate = Matrix(up, up_scale, up_bias), Matrix(gate, gate_scale, gate_bias)
    monkeypatch.setattr(fp8_gemm, "scaled_mm", lambda *_: torch.empty(16, 512, dtype=torch.bfloat16))
    call = partial(launch_linear, x, weight, gate, "silu", FP8_CONFIGS[family])
    first, *rest = compiled(call, TARGETS[target], monkeypatch)
    codes = [kernel.asm["ptx" if target.startswith("sm") else "amdgcn"] for kernel in (first, *rest)]
    assert all(codes)
    if "skinny" in family and target in ("sm_90", "sm_100"):
        assert len(rest) == 1 + (family.startswith("split") and not gated)
        assert ("wgmma" if target == "sm_90" else "tcgen05.mma") in codes[1]
    assert ("e4m3x2" in codes[0]) == (target in ("sm_90", "sm_100"))


def test_fp8_compiles_for_ada(monkeypatch):
    """The oldest GPUs that multiply FP8 have other instructions for it than Hopper, and less shared memory."""
    target, gpu = GPUTarget("cuda", 89, 32), GPU("a GPU", 3, (8, 9), 101376)
    key = ProblemKey(64, 512, 512, 512, True, "silu", torch.bfloat16, False, True, gpu, "fp8")
    gate, up, *_, gate_scale, up_scale, _ = quantized_mlp(512, 512, True, False, torch.bfloat16)
    x, weights = (
        torch.randn(64, 512, dtype=torch.bfloat16),
        (Matrix(up, up_scale, None), Matrix(gate, gate_scale, None)),
    )
    call = partial(launch_linear, x, *weights, "silu", heuristic_plan(key).up)
    _, kernel = compiled(call, target, monkeypatch, gpu.shared_memory)
    assert re.search(r"mma\.sync\S*e4m3\.e4m3", kernel.asm["ptx"]) and kernel.metadata.shared <= gpu.shared_memory
    assert not CUOBJDUMP or stack_bytes(kernel) == 0


FORMS_OF_EXPERTS = {
    "planes": ExpertsForm("planes", True, "silu"),
    "interleaved": ExpertsForm("interleaved", True, "quick_gelu", 7.0, 1.0),
    "transposed": ExpertsForm("transposed", True, "silu"),
}


@pytest.mark.long
@pytest.mark.parametrize("scales", [torch.float32, torch.float8_e8m0fnu], ids=["fp32", "e8m0"])
@pytest.mark.parametrize("tokens", [1, 40, 400])
@pytest.mark.parametrize("target", TARGETS)
def test_fp8_experts_compile(target, tokens, scales, monkeypatch):
    """The plan that the rule chooses, in all of its launches; GPUs that know no FP8 read bytes."""
    up, down = (torch.empty(16, *shape, dtype=torch.float8_e4m3fn) for shape in ((256, 512), (512, 128)))
    factors = [torch.empty(16, *shape).to(scales) for shape in ((2, 4), (4, 1))]
    x, ids = torch.empty(tokens, 512, dtype=torch.bfloat16), torch.zeros(tokens, 2, dtype=torch.int64)

    def call():
        about = describe_experts(x, ids, up, down, FORMS_OF_EXPERTS["planes"])
        plan = rule_of_thumb(about)
        prepare_experts(plan, about)(x, ids, torch.empty(tokens, 2), up, down, None, None, *factors)

    kernels = compiled(call, TARGETS[target], monkeypatch)
    has_fp8 = target in ("sm_90", "sm_100")
    assert len(kernels) == (2 if tokens == 1 else 6 if has_fp8 else 5)
    codes = [kernel.asm["ptx" if target.startswith("sm") else "amdgcn"] for kernel in kernels]
    assert all(codes)
    if target == "sm_90" and tokens > 1:
        assert sum("wgmma.mma_async" in code and "e4m3.e4m3" in code for code in codes) == 2


@pytest.mark.long
@pytest.mark.parametrize(("tokens", "launches"), [(1, 2), (30, 4), (200, 5), (400, 6)])
@pytest.mark.parametrize(
    ("target", "form"),
    [*((target, "planes") for target in TARGETS), ("sm_90", "interleaved"), ("sm_80", "transposed")],
)
def test_experts_compile(target, form, tokens, launches, monkeypatch):
    """The plan that the rule chooses, in all of its launches. Each waits for the one before, unless rows are gathered,
    where they do not overlap."""
    kernels = compile_experts(rule_of_thumb, target, form, tokens, monkeypatch)
    assert len(kernels) == (4 if tokens == 1 and FORMS_OF_EXPERTS[form].layout != "planes" else launches)
    codes = [kernel.asm["ptx" if target.startswith("sm") else "amdgcn"] for kernel in kernels]
    waits = [code.count("griddepcontrol.wait") > 0 for code in codes]
    overlaps = target in ("sm_90", "sm_100") and tokens < 400
    assert waits == [overlaps and index > 0 for index in range(len(codes))]


def compile_experts(plan, target, form, tokens, monkeypatch, experts=16):
    """The compiled kernels of a call, of a plan or the one that a function gives."""
    form = FORMS_OF_EXPERTS[form]
    up = torch.empty(experts, 256, 512, dtype=torch.bfloat16)
    down = torch.empty(experts, 512, 128, dtype=torch.bfloat16)
    if form.layout != "planes":
        up, down = up.mT.contiguous(), down.mT.contiguous()
    x, ids = torch.empty(tokens, 512, dtype=torch.bfloat16), torch.zeros(tokens, 2, dtype=torch.int64)

    def call():
        about = describe_experts(x, ids, up, down, form)
        run = prepare_experts(plan(about) if callable(plan) else plan, about)
        run(x, ids, torch.empty(tokens, 2), up, down, None, None)

    return compiled(call, TARGETS[target], monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("form", ["planes", "interleaved"])
@pytest.mark.parametrize("experts", [2, 16, 256])
def test_candidates_of_experts_spill_no_registers(experts, form, monkeypatch):
    """Those of the tuner, for many, some and few rows an expert."""
    if not CUOBJDUMP:
        pytest.skip("Triton's wheel has no cuobjdump")
    tokens, seen = 300, set()
    sizes = tokens, 2, experts, 512, 128, 512
    call = ExpertsCall(*sizes, FORMS_OF_EXPERTS[form], torch.bfloat16, torch.device("cpu"))
    for plan in choices.first_plans(call):
        ups, downs = (choices.tiles(call, plan, launch) for launch in ("up", "down"))
        for up, down in zip_longest(ups, downs):
            chosen = replace(plan, up=up or plan.up, down=down or plan.down)
            for kernel in compile_experts(chosen, "sm_90", form, tokens, monkeypatch, experts):
                if kernel.hash not in seen:
                    seen.add(kernel.hash)
                    assert stack_bytes(kernel) <= 64, chosen  # more holds registers


# NVIDIA's tool for compiled code
CUOBJDUMP = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"), None)


def stack_bytes(kernel) -> int:
    """Of each thread, on its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        found = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", found.stdout)[1])
