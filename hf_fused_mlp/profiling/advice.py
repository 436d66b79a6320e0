"""Advice that follows from an audit's figures, besides the verdict."""

from collections.abc import Iterator

from hf_fused_mlp.profiling.intervals import direction
from hf_fused_mlp.profiling.report import AuditReport, Phase


def advise(report: AuditReport) -> tuple[str, ...]:
    """Short sentences, the most useful first."""
    return (*_about_model(report), *(sentence for phase in report.phases for sentence in _about_phase(report, phase)))


def _about_model(report: AuditReport) -> Iterator[str]:
    if not report.mlps:
        yield "No MLP was found; register an unknown class with register_mlp."
    for group in report.mlps:
        if group.state != "fused":
            yield f"{group.count} x {group.class_name} cannot be fused: {group.reason}"
        elif group.reason and report.on_gpu:
            yield f"{group.count} x {group.class_name} run their kernels in part or not at all: {group.reason}"
    if report.attention == "eager":
        yield "Attention is the eager implementation; load with attn_implementation='sdpa' or a flash kernel."
    if report.on_gpu and report.dtype == "float32":
        yield "Weights are float32; bfloat16 halves their bytes, and runs products on the tensor cores."


def _about_phase(report: AuditReport, phase: Phase) -> Iterator[str]:
    name = phase.name.capitalize()
    busy = phase.original.gpu_busy_share
    if phase.bound == "host-bound" and busy is not None:
        yield (
            f"{name} is host-bound: the GPU works {busy:.0%} of the time. A static cache with "
            f"torch.compile(mode='reduce-overhead'), or CUDA graphs, would gain up to {1 / busy:.2f}x."
        )
    if phase.bound == "memory-bound" and phase.name == "decode":
        yield (
            "Decode is memory-bound: a larger batch reads each weight once for more tokens, and weights of fewer bits "
            "take less time to read."
        )
    if report.on_gpu and phase.predicted.gain is None:
        yield f"{name}: {phase.predicted.basis}."
    form = phase.forms.get(report.verdict.form or "original")
    if form is not None and form.speedup is not None and direction(form.speedup) == "slower":
        yield f"{name} is slower fused ({form.speedup.median:.2f}x); tune it, or leave the model as it is for this."
