"""A made-up audit of a GPU: no number here was measured."""

import statistics
from dataclasses import replace

from hf_fused_mlp.profiling.advice import advise
from hf_fused_mlp.profiling.estimates import dollars_per_1m_tokens
from hf_fused_mlp.profiling.intervals import speedup
from hf_fused_mlp.profiling.report import AuditReport, Form, Kernel, MLPGroup, Phase, Prediction, Roofline
from hf_fused_mlp.profiling.verdict import judge

# nine rounds, that drift by a tenth and differ by a hundredth; each form is as much faster in all of them
DRIFT = (1.0, 1.02, 1.01, 1.04, 1.03, 1.06, 1.08, 1.07, 1.1)
NOISE = (0.0, 0.01, -0.01, 0.005, -0.005, 0.01, -0.01, 0.0, 0.005)
NEW_TOKENS = 32
LONG_NAME = "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128_64x4_tn_align8>(Params)"


def rounds_us(us, faster=None, rounds=9):
    """Of the original, or of a form that is `faster` by some noise."""
    times = [us * drift / (faster + noise if faster else 1) for drift, noise in zip(DRIFT, NOISE, strict=True)]
    return times[:rounds]


def made_up_form(rounds, original, tokens, price, launches):
    wall = statistics.median(rounds)
    kernels = (Kernel(LONG_NAME, 2.0, wall / 100), Kernel("silu", 1.0, wall / 400))[: 2 if launches > 2 else 1]
    return Form(
        wall_us=wall,
        wall_min_us=min(rounds),
        wall_max_us=max(rounds),
        rounds_us=tuple(rounds),
        speedup=None if rounds is original else speedup(original, rounds),
        tokens_per_s=tokens / wall * 1e6,
        dollars_per_1m_tokens=dollars_per_1m_tokens(price, wall, tokens),
        gpu_busy_share=0.5,
        mlp_gpu_share=0.5,
        mlp_wall_share=0.25,
        mlp_host_share=0.2,
        launches_per_mlp=float(launches),
        kernels_per_mlp=len(kernels),
        mlp_kernels=kernels,
        top_kernels=(*kernels, Kernel("attention", 2.0, wall / 500)),
    )


def made_up_phase(name, tokens, us, fused, norms, rounds, price):
    """`us` of the original; `fused` and `norms` are how many times faster the other forms are, None: not measured."""
    original = rounds_us(us, rounds=rounds)
    forms = {
        form: None
        if faster is None
        else made_up_form(rounds_us(us, faster, rounds), original, tokens, price, launches)
        for form, faster, launches in (("fused", fused, 2), ("fused_norms", norms, 2))
    }
    return Phase(
        name=name,
        tokens=tokens,
        bound="host-bound",
        flops_per_byte=float(tokens),
        predicted=Prediction(1.0, "made up"),
        measured_gain=forms["fused"].speedup.median if forms["fused"] else None,
        gain_limit=1.25,
        original=made_up_form(original, original, tokens, price, launches=5),
        **forms,
    )


def made_up_report(fused=1.1, norms=1.3, rounds=9, price=None, on_gpu=True):
    phases = (
        made_up_phase("prefill", 512, 21000.0, fused, norms, rounds, price),
        made_up_phase("decode", 1, 17000.0, fused, norms, rounds, price),
    )
    report = AuditReport(
        model="made-up/model",
        device="a made-up GPU",
        dtype="bfloat16",
        attention="sdpa",
        fusable_norms=61,
        batch=1,
        prompt_tokens=512,
        new_tokens=NEW_TOKENS,
        rounds=rounds,
        price_per_hour=price,
        versions={"torch": "0", "transformers": "0", "hf-fused-mlp": "0"},
        on_gpu=on_gpu,
        roofline=Roofline(500.0, 2.5),
        mlps=(MLPGroup("LlamaMLP", 30, "fused", None),),
        phases=phases,
        verdict=judge(phases, NEW_TOKENS, on_gpu),
    )
    return replace(report, advice=advise(report))
