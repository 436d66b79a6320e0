"""`hf-fused-mlp bench --end-to-end MODEL`: what `generate` takes for a token, original and fused in turn."""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle, repeat
from operator import truediv
from typing import Any

import torch
from rich.progress import track
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_fused_mlp.cli.console import console, note
from hf_fused_mlp.cli.loading import load_model
from hf_fused_mlp.cli.results import Row
from hf_fused_mlp.cli.shapes import fused_twin
from hf_fused_mlp.integrations import demo
from hf_fused_mlp.modules import FusedMLP
from hf_fused_mlp.norms import FusedRMSNorm
from hf_fused_mlp.profiling.request import make_request
from hf_fused_mlp.profiling.trace import record
from hf_fused_mlp.swap import Fused, original_form

NEW_TOKENS = 8  # after the first, which is the prefill's
MODES = {"eager": {}, "static-compile": {"cache_implementation": "static"}}
PROFILED = 8  # tokens

# whole models of published sizes, made with random weights
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
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": ("llama", _LLAMA_3_8B),
    "pythia-6.9b": ("gpt_neox", _PYTHIA_6_9B),
}

# the fields of a row that say what it is a measurement of
WORKLOAD = ("model", "mode", "batch", "prompt")
PROBLEM = ("model", "mode", "phase", "batch", "prompt")
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Workload:
    """Requests of `prompt` tokens each, `batch` of them at once, in a key of `MODES`."""

    mode: str
    batch: int
    prompt: int


def load(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The demo, a key of `MODELS`, a directory or hub id, or for random weights the file of a config."""
    if name in MODELS:
        model_type, sizes = MODELS[name]
        config = CONFIG_MAPPING[model_type](**sizes)
    elif name.endswith(".json"):
        config = AutoConfig.from_pretrained(name)
    else:
        return load_model(None if name == demo.NAME else name, str(dtype).removeprefix("torch."), "cuda:0")
    with torch.device("cuda:0"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@dataclass(frozen=True)
class Form:
    """A model, and which of its fused modules run in their original form meanwhile."""

    model: Any
    originals: tuple[Fused, ...]

    def given(self) -> AbstractContextManager[None]:
        """The model in this form."""
        return original_form(self.originals)


def end_to_end(name: str, workloads: list[Workload], dtype: torch.dtype, rounds: int) -> Iterator[list[Row]]:
    """For each workload, a row for the prefill and one for a token of the decoding, of each form of the model."""
    original = load(name, dtype)
    models = {"original": original, "fused": fused_twin(original, strict=False, norms=True)}
    for workload in track(workloads, "measuring", console=console):
        torch.compiler.reset()  # each size is compiled for itself, and what the last one held is free again
        for model in models.values():
            vars(model).pop("_compiled_call", None)
        torch.cuda.empty_cache()
        try:
            yield measure(name, forms_of(models, workload), workload, rounds)
        except torch.OutOfMemoryError:
            note(f"skipped, since the GPU has no room for it: {workload}")


def forms_of(models: dict[str, PreTrainedModel], workload: Workload) -> dict[str, Form]:
    """The forms to compare: in eager mode of one model, and where compiled of two, since code is made for one form.

    Norms are fused by themselves, in eager mode only: compiled code runs their original forward.
    """
    mlps, norms = (
        tuple(module for module in models["fused"].modules() if isinstance(module, cls))
        for cls in (FusedMLP, FusedRMSNorm)
    )
    fused = Form(models["fused"], norms)
    if workload.mode != "eager":
        return {"original": Form(models["original"], ()), "fused": fused}
    forms = {"original": Form(models["fused"], mlps + norms), "fused": fused}
    return forms | ({"fused-norms": Form(models["fused"], ())} if norms else {})


def measure(name: str, forms: dict[str, Form], workload: Workload, rounds: int) -> list[Row]:
    """The rows of one workload."""
    model = forms["fused"].model
    prompt = torch.randint(model.config.vocab_size, (workload.batch, workload.prompt), device=model.device)
    mlps = [name for name, module in model.named_modules() if isinstance(module, FusedMLP)]
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
    """By form and phase, the milliseconds of each token; those of a first round, which compiles, do not count.

    Eager forms take turns token by token, since what Python takes changes within a second; compiled ones, whose cache
    is made for a request, request by request. What is at one place of their lists is from one round.
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
    """Times each token of a `generate`, and then gives the model, off the clock, the next of `forms`."""

    def __init__(self, forms: Iterator[str], give: Callable[[str], None]):
        self.forms, self.give = forms, give
        self.laps: list[tuple[str, float]] = []
        self.begin()

    def begin(self) -> None:
        """A lap, by the next form."""
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
    """For the prefill and for a token of the decoding, milliseconds in which the GPU works, and works on MLPs.

    `names` are the MLPs'. In compiled code they are not to be told from the rest: 0. There the decoding is a whole
    request less its prefill, since one of another length would have another cache, and be compiled anew.
    """
    mlps = {name: model.get_submodule(name) for name in names if workload.mode == "eager"}
    first = record(partial(generate, model, prompt, 1, workload), 1, mlps, on_gpu=True)
    prefill = first.busy_us / 1e3, first.mlp_us / 1e3
    if workload.mode != "eager":
        whole = record(partial(generate, model, prompt, 1 + NEW_TOKENS, workload), 1, mlps, on_gpu=True)
        return [prefill, ((whole.busy_us - first.busy_us) / NEW_TOKENS / 1e3, 0.0)]
    request = make_request(model, workload.batch, workload.prompt, PROFILED, 1)
    token = record(request.decoding(), PROFILED, mlps, on_gpu=True)
    return [prefill, (token.busy_us / 1e3, token.mlp_us / 1e3)]


def generate(
    model: Any, prompt: torch.Tensor, new_tokens: int, workload: Workload, *criteria: StoppingCriteria
) -> torch.Tensor:
    """Greedy, and never done before `new_tokens`."""
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
    """A line a workload, phase and form: its milliseconds, the GPU's part, and how many times faster it is.

    How busy the GPU is, and with MLPs, is the original's. `paired` is the median of the ratios within a round, in
    eager mode only: how fast Python is meanwhile moves it little.
    """
    columns = ("original, ms", "ms", "tokens/s", "GPU original, ms", "GPU, ms", "GPU busy", "of it MLPs")
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
    """For each phase of a workload the fields that say which it is, the original's row and that of a fused form."""
    forms: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        forms.setdefault(tuple(row[name] for name in PROBLEM), {})[row["impl"]] = row
    for problem, form in forms.items():
        yield from ((problem, form["original"], row) for impl, row in form.items() if impl != "original")
