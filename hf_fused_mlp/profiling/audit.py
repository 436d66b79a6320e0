"""`audit`: where a model's time goes, and whether fusing its MLPs is worth it."""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib import metadata
from itertools import count
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_fused_mlp.fuse import fusion_report
from hf_fused_mlp.profiling.advice import advise
from hf_fused_mlp.profiling.estimates import amdahl, bound_of, dollars_per_1m_tokens, roofline
from hf_fused_mlp.profiling.intervals import speedup
from hf_fused_mlp.profiling.measure import as_it_came, forms_of, profile_forms, time_forms, worth_timing
from hf_fused_mlp.profiling.prediction import predict
from hf_fused_mlp.profiling.report import AuditReport, Form, MLPGroup, Phase, Speedup
from hf_fused_mlp.profiling.request import Request, make_request
from hf_fused_mlp.profiling.trace import Breakdown
from hf_fused_mlp.profiling.verdict import judge
from hf_fused_mlp.version import __version__


def audit(
    model: PreTrainedModel,
    *,
    batch: int = 1,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    rounds: int | None = None,
    gpu_price: float | None = None,
    trace: Path | str | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> AuditReport:
    """Finds where the time of prefill and decode goes, and says whether fusing the MLPs is worth it.

    The model may be fused or not, and is restored afterwards. On a GPU, compares three forms: eager, fused, and fused
    with norms. On a CPU, measures eager only, because the original forward runs there. Prompts are random tokens. A
    loop of forwards with the default cache represents `generate`, in which the host does slightly more work.

    Args:
        model: a causal language model of Transformers, on the CPU or on CUDA GPUs.
        batch: number of prompts in a batch.
        prompt_tokens: tokens in each prompt; default: 512 on a GPU and 128 on a CPU.
        new_tokens: tokens to generate after each; default: 32 on a GPU and 16 on a CPU.
        rounds: how often to time each form; default: 9 on a GPU and 3 on a CPU. A verdict needs 6.
        gpu_price: dollars per hour of the hardware; without it the report has no costs.
        trace: a directory for Chrome traces, `prefill-original.json` and so on.
        progress: called before each step with its name and the completed fraction of the steps.

    Raises:
        TypeError: `model` is not a causal language model of Transformers that takes a key-value cache.
        ValueError: a number is not positive, there are more tokens than positions, or the model is compiled, or
            neither on the CPU nor on a CUDA GPU.
        RuntimeError: the profiler sees no kernels on the GPU.
    """
    request = make_request(model, batch, prompt_tokens, new_tokens, rounds)
    if gpu_price is not None and not gpu_price > 0:
        raise ValueError(f"gpu_price {gpu_price}: expected dollars per hour, more than 0")
    folder = None if trace is None else Path(trace)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    device = request.ids.device
    on_device = torch.cuda.device(device) if request.ids.is_cuda else nullcontext()
    with as_it_came(model), torch.no_grad(), on_device:
        report = _audit(model, request, gpu_price, folder, progress or (lambda name, done: None))
    return replace(report, advice=advise(report))


def _audit(
    model: PreTrainedModel,
    request: Request,
    gpu_price: float | None,
    folder: Path | None,
    progress: Callable[[str, float], None],
) -> AuditReport:
    """The report without its advice; leaves the MLPs fused."""
    device, on_gpu, threads = request.ids.device, request.ids.is_cuda, torch.get_num_threads()
    forms = forms_of(model)
    timed = worth_timing(forms)
    total = (2 + request.rounds) * len(timed) + 1
    done = count()

    def tell(step: str) -> None:
        progress(step, next(done) / total)

    walls = time_forms(request, forms, timed, tell)
    steps = profile_forms(request, forms, timed, folder, tell)
    tell("limits of the device")
    best = roofline(device, model.dtype)
    forms.apply("fused")
    phases = []
    for name, tokens in (("prefill", request.ids.numel()), ("decode", request.ids.shape[0])):
        original = walls[name]["original"]
        measured = {
            form: _form(
                rounds,
                None if form == "original" else speedup(original, rounds),
                steps[name][form],
                tokens,
                on_gpu,
                gpu_price,
            )
            for form, rounds in walls[name].items()
        }
        phases.append(_phase(name, tokens, forms.mlps, best.flops_per_byte, steps[name]["original"], measured))
    fused_report = fusion_report(model)
    return AuditReport(
        model=type(model).__name__,
        device=torch.cuda.get_device_name(device) if on_gpu else f"CPU, {threads} thread{'s' * (threads > 1)}",
        dtype=str(model.dtype).removeprefix("torch."),
        attention=getattr(model.config, "_attn_implementation", None),
        fusable_norms=sum(name in forms.recipes["fused_norms"] for name in forms.norms),
        batch=request.ids.shape[0],
        prompt_tokens=request.ids.shape[1],
        new_tokens=request.new_tokens,
        rounds=request.rounds,
        price_per_hour=gpu_price,
        versions={name: metadata.version(name) for name in ("torch", "transformers")} | {"hf-fused-mlp": __version__},
        on_gpu=on_gpu,
        roofline=best,
        mlps=tuple(
            MLPGroup(class_name, count, state, reason)
            for (class_name, state, reason), count in fused_report.grouped().items()
        ),
        phases=tuple(phases),
        verdict=judge(phases, request.new_tokens, on_gpu),
    )


def _phase(
    name: str, tokens: int, mlps: dict[str, nn.Module], ridge: float, step: Breakdown, forms: dict[str, Form]
) -> Phase:
    """`step` is the original's; `mlps` are fused."""
    original, fused = forms["original"], forms.get("fused")
    weights = [weight for module in mlps.values() for weight in module.parameters()]
    weight_bytes = sum(weight.nbytes for weight in weights)
    flops_per_byte = 2 * tokens * sum(weight.numel() for weight in weights) / weight_bytes if weight_bytes else 0.0
    bound = bound_of(original.gpu_busy_share, flops_per_byte, ridge)
    return Phase(
        name=name,
        tokens=tokens,
        bound=bound,
        flops_per_byte=flops_per_byte,
        predicted=predict(mlps, tokens, bound, step, original.wall_us),
        measured_gain=fused.speedup.median if fused and fused.speedup else None,
        gain_limit=amdahl(original.mlp_share(bound), float("inf")),
        original=original,
        fused=fused,
        fused_norms=forms.get("fused_norms"),
    )


def _form(
    walls: list[float], over: Speedup | None, step: Breakdown, tokens: int, on_gpu: bool, price: float | None
) -> Form:
    wall = statistics.median(walls)
    busy = of_busy = None
    of_wall = of_host = step.mlp_host_us / step.host_us
    if on_gpu:
        # the profiler slows down the host but not the kernels, so wall-clock times come from runs without it
        busy, of_busy = min(1.0, step.busy_us / wall), step.mlp_us / step.busy_us
        of_wall = busy * of_busy
    return Form(
        wall_us=wall,
        wall_min_us=min(walls),
        wall_max_us=max(walls),
        rounds_us=tuple(walls),
        speedup=over,
        tokens_per_s=tokens / wall * 1e6,
        dollars_per_1m_tokens=dollars_per_1m_tokens(price, wall, tokens),
        gpu_busy_share=busy,
        mlp_gpu_share=of_busy,
        mlp_wall_share=of_wall,
        mlp_host_share=of_host,
        launches_per_mlp=step.launches_per_mlp,
        kernels_per_mlp=len(step.mlp_kernels) if step.mlp_kernels else None,
        mlp_kernels=step.mlp_kernels,
        top_kernels=step.top_kernels,
    )
