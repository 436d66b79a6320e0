"""`hf-fused-mlp bench generate MODEL`: times tokens in `generate` of a whole model, original and fused in turn."""

import copy
import logging
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle, repeat
from operator import truediv
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_fused_mlp.bench.results import Row
from hf_fused_mlp.bench.shapes import fused_twin, to_fp8
from hf_fused_mlp.families.experts import FusedExperts
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.families.norm import FusedRMSNorm
from hf_fused_mlp.fuse import fuse_model
from hf_fused_mlp.integrations import demo
from hf_fused_mlp.profiling.request import make_request
from hf_fused_mlp.profiling.trace import record
from hf_fused_mlp.swap import Fused, original_form

logger = logging.getLogger(__name__)

NEW_TOKENS = 8  # tokens decoded after the first one, which belongs to the prefill
MODES = {"eager": {}, "static-compile": {"cache_implementation": "static"}}
PROFILED = 8  # tokens under the profiler

# models of published sizes, built with random weights
_LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
}
_PYTHIA_6_9B = {
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 50432,
    "max_position_embeddings": 16384,
}
_QWEN3_30B_A3B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": ("llama", _LLAMA_3_8B),
    "pythia-6.9b": ("gpt_neox", _PYTHIA_6_9B),
    "qwen3-30b-a3b": ("qwen3_moe", _QWEN3_30B_A3B),
}

# the row fields that identify a problem
WORKLOAD = ("model", "mode", "batch", "prompt")
PROBLEM = ("model", "mode", "phase", "batch", "prompt")
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Workload:
    """`batch` requests at once of `prompt` tokens each; `mode` is a key of `MODES`."""

    mode: str
    batch: int
    prompt: int


def load(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Loads a model onto the first GPU, in eval mode.

    Args:
        name: the demo's name, a directory or hub id; for random weights a key of `MODELS` or a config file (`.json`).

    Raises:
        OSError: no such model.
    """
    device = "cuda:0"
    if name == demo.NAME:
        return demo.load_demo(dtype=dtype, device_map=device)
    if name in MODELS:
        model_type, sizes = MODELS[name]
        config = CONFIG_MAPPING[model_type](**sizes)
    elif name.endswith(".json"):
        config = AutoConfig.from_pretrained(name)
    else:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@dataclass(frozen=True)
class Form:
    """A model, and those of its fused modules that run in their original form while it is timed."""

    model: Any
    originals: tuple[Fused, ...]

    def given(self) -> AbstractContextManager[None]:
        """Puts the model into this form until the context exits."""
        return original_form(self.originals)


def measure(
    name: str, workloads: Iterable[Workload], dtype: torch.dtype, rounds: int, fp8: bool = False
) -> Iterator[list[Row]]:
    """Times `generate` of one model, original and fused.

    Args:
        name: see `load`.
        rounds: rounds in which all forms take turns; at least 2.
        fp8: also time two fused copies with FP8 weights, one in MLPs only, one everywhere but in `lm_head`; in
            compiled code only, where each form has a separate model.

    Yields:
        For each workload the rows of every form: one for the prefill, one for a decoded token. A workload that
        does not fit into GPU memory is logged and left out.
    """
    original = load(name, dtype)
    models = {"original": original, "fused": fused_twin(original, strict=False, norms=True)}
    if fp8:
        mlps = [name for name, module in models["fused"].named_modules() if isinstance(module, FusedMLP)]
        models["fused-fp8-mlps"] = quantized(original, mlps)
        models["fused-fp8"] = quantized(original, [original.base_model_prefix])
    for workload in workloads:
        torch.compiler.reset()  # sizes are compiled separately, and the memory of the last one is freed
        for model in models.values():
            vars(model).pop("_compiled_call", None)
        torch.cuda.empty_cache()
        try:
            yield measure_workload(name, forms_of(models, workload), workload, rounds)
        except torch.OutOfMemoryError:
            logger.warning("skipped, because it does not fit into GPU memory: %s", workload)


def quantized(original: PreTrainedModel, names: Iterable[str]) -> PreTrainedModel:
    """A fused copy of `original` with FP8 weights in the submodules of these names; the others share theirs."""
    shared = {id(tensor): tensor for tensor in (*original.parameters(), *original.buffers())}
    model = copy.deepcopy(original, shared)
    for name in names:
        to_fp8(model.get_submodule(name))
    return fuse_model(model, fp8_linears=True)


def forms_of(models: dict[str, PreTrainedModel], workload: Workload) -> dict[str, Form]:
    """The forms to compare. Eager forms share one model; compiled ones need two, since code is compiled for one form.

    `fused-norms` exists in eager mode only: compiled code runs the original forward of norms.
    """
    mlps, norms = (
        tuple(module for module in models["fused"].modules() if isinstance(module, cls))
        for cls in ((FusedMLP, FusedExperts), FusedRMSNorm)
    )
    fused = Form(models["fused"], norms)
    if workload.mode != "eager":
        in_fp8 = {name: Form(model, ()) for name, model in models.items() if name.startswith("fused-fp8")}
        return {"original": Form(models["original"], ()), "fused": fused} | in_fp8
    forms = {"original": Form(models["fused"], mlps + norms), "fused": fused}
    return forms | ({"fused-norms": Form(models["fused"], ())} if norms else {})


def measure_workload(name: str, forms: dict[str, Form], workload: Workload, rounds: int) -> list[Row]:
    """The rows of one workload: medians in milliseconds, and the time in which the GPU works."""
    model = forms["fused"].model
    prompt = torch.randint(model.config.vocab_size, (workload.batch, workload.prompt), device=model.device)
    mlps = [name for name, module in model.named_modules() if isinstance(module, (FusedMLP, FusedExperts))]
    times = time_forms(forms, prompt, workload, rounds)
    rows = []
    for impl, form in forms.items():
        with form.given():
            works = gpu_work(form.model, mlps, prompt, workload)
        for phase, tokens, (busy, mlp) in zip(PHASES, (workload.prompt, 1), works, strict=True):
            values = times[impl, phase]
            cuts, median = statistics.quantiles(values, n=10), statistics.median(values)
            paired = statistics.median(map(truediv, times["original", phase], values))
            rows.append(
                {
                    "model": name,
                    "mode": workload.mode,
                    "phase": phase,
                    "batch": workload.batch,
                    "prompt": workload.prompt,
                    "impl": impl,
                    "rounds": rounds,
                    "median_ms": round(median, 3),
                    "p20_ms": round(cuts[1], 3),
                    "p80_ms": round(cuts[7], 3),
                    "paired_speedup": round(paired, 3) if workload.mode == "eager" else None,
                    "tokens_per_s": round(1e3 * workload.batch * tokens / median, 1),
                    "gpu_ms": round(busy, 3),
                    "gpu_busy": round(min(1.0, busy / median), 3),
                    "mlp_share": round(mlp / busy, 3) if mlp else None,
                }
            )
    return rows


def time_forms(
    forms: dict[str, Form], prompt: torch.Tensor, workload: Workload, rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of each token, by form and phase. A first round compiles and is not counted.

    Eager forms take turns token by token, because the host's speed changes within a second. Compiled forms take turns
    request by request, because their cache belongs to a request. Equal positions in the lists are of one round.
    """
    given = ExitStack()

    def give(form: str) -> None:
        given.close()
        given.enter_context(forms[form].given())

    names = list(forms)
    times: dict[tuple[str, str], list[float]] = {(impl, phase): [] for impl in forms for phase in PHASES}
    for round_ in range(1 + rounds):
        for impl in random.sample(names, len(names)):
            first = names.index(impl)
            turns = cycle(names[first:] + names[:first]) if workload.mode == "eager" else repeat(impl)
            with given:
                clock = Stopwatch(turns, give)
                generate(forms[impl].model, prompt, 1 + NEW_TOKENS, workload, clock)
            for index, (form, ms) in enumerate(clock.laps if round_ else ()):
                times[form, PHASES[index > 0]].append(ms)
    return times


class Stopwatch(StoppingCriteria):
    """Times each token of a `generate`, then switches the model to the next form while the clock is stopped."""

    def __init__(self, forms: Iterator[str], give: Callable[[str], None]):
        self.forms, self.give = forms, give
        self.laps: list[tuple[str, float]] = []
        self.begin()

    def begin(self) -> None:
        """Starts a lap in the next form."""
        self.form = next(self.forms)
        self.give(self.form)
        torch.cuda.synchronize()
        self.start = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        torch.cuda.synchronize()
        self.laps.append((self.form, 1e3 * (time.perf_counter() - self.start)))
        none_stops = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.begin()
        return none_stops


@torch.no_grad()
def gpu_work(
    model: PreTrainedModel, names: list[str], prompt: torch.Tensor, workload: Workload
) -> list[tuple[float, float]]:
    """Milliseconds in which the GPU is busy, and busy with MLPs, for the prefill and for one decoded token.

    `names` are the names of the MLPs. In compiled code their share is unknown and 0. There we measure a whole request
    and subtract its prefill, because a request of another length would be compiled again.
    """
    mlps = {name: model.get_submodule(name) for name in names if workload.mode == "eager"}
    first = record(partial(generate, model, prompt, 1, workload), 1, mlps, on_gpu=True)
    prefill = first.busy_us / 1e3, first.mlp_us / 1e3
    if workload.mode != "eager":
        whole = record(partial(generate, model, prompt, 1 + NEW_TOKENS, workload), 1, mlps, on_gpu=True)
        return [prefill, ((whole.busy_us - first.busy_us) / NEW_TOKENS / 1e3, 0.0)]
    request = make_request(model, workload.batch, workload.prompt, PROFILED, 1)
    with request.decoding() as step:
        token = record(step, PROFILED, mlps, on_gpu=True)
    return [prefill, (token.busy_us / 1e3, token.mlp_us / 1e3)]


def generate(
    model: Any, prompt: torch.Tensor, new_tokens: int, workload: Workload, *criteria: StoppingCriteria
) -> torch.Tensor:
    """Greedy decoding of exactly `new_tokens` tokens."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList(criteria),
        **MODES[workload.mode],
    )


def table(rows: list[Row]) -> str:
    """One line per workload, phase and fused form: times, GPU times and speedups over the original.

    `GPU busy` and `MLPs' share` are the original's. `paired` is the median of the ratios within a round, in eager mode
    only; the speed of the host cancels out in it.
    """
    columns = ("original, ms", "ms", "tokens/s", "GPU original, ms", "GPU, ms", "GPU busy", "MLPs' share")
    head = (*PROBLEM, "impl", *columns, "over original", "paired")
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---:|---:|---|" + "---:|" * 9]
    for problem, original, fused in pairs(rows):
        cells = [f"{form['median_ms']:.2f}" for form in (original, fused)] + [f"{fused['tokens_per_s']:.0f}"]
        cells += [f"{form['gpu_ms']:.2f}" for form in (original, fused)] + [f"{original['gpu_busy']:.0%}"]
        cells += ["-" if original["mlp_share"] is None else f"{original['mlp_share']:.0%}"]
        cells += [f"{original['median_ms'] / fused['median_ms']:.2f}x"]
        cells += ["-" if fused["paired_speedup"] is None else f"{fused['paired_speedup']:.2f}x"]
        lines.append(f"| {' | '.join(map(str, (*problem, fused['impl'], *cells)))} |")
    return "\n".join(lines)


def pairs(rows: list[Row]) -> Iterator[tuple[tuple, Row, Row]]:
    """Yields the problem, the original's row and a fused form's row, for each phase and fused form."""
    forms: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        forms.setdefault(tuple(row[name] for name in PROBLEM), {})[row["impl"]] = row
    for problem, form in forms.items():
        yield from ((problem, form["original"], row) for impl, row in form.items() if impl != "original")
