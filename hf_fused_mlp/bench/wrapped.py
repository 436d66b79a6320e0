"""`hf-fused-mlp bench wrapped`: decoder layers with wrapped projections, which often must be called, in eager mode.

Times whole layers of a Llama-3-8B shape with random weights, so that the speedup includes the rest of the layer.
Original and fused are the same model, whose modules change their class in turn.
"""

import importlib.util
import logging
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from hf_fused_mlp.bench.results import Row
from hf_fused_mlp.fuse import fuse_model
from hf_fused_mlp.swap import Fused, original_form

SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 512,
}
DEVICE = "cuda:0"
FORMS = ("original", "fused")
MOST_DIFFERENCE = 0.05  # of the whole output, after several layers in half precision
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

logger = logging.getLogger(__name__)


def plain(config: LlamaConfig, dtype: torch.dtype) -> nn.Module:
    """No wrapping around the projections."""
    with torch.device(DEVICE):
        model: Any = LlamaModel(config)
    return model.to(dtype).eval()


def lora(config: LlamaConfig, dtype: torch.dtype, adapters: int = 1, merged: bool = False) -> nn.Module:
    """PEFT's LoRA of rank 16 on all three projections."""
    from peft import LoraConfig, get_peft_model

    lora_config, names = LoraConfig(r=16, target_modules=list(PROJECTIONS)), [f"adapter{i}" for i in range(adapters)]
    model: Any = get_peft_model(plain(config, dtype), lora_config, adapter_name=names[0])  # type: ignore[arg-type]
    for name in names[1:]:
        model.add_adapter(name, lora_config)
    model.base_model.set_adapter(names)
    if merged:
        model.merge_adapter()
    return model.base_model.model.to(dtype)


def hooked(config: LlamaConfig, dtype: torch.dtype) -> nn.Module:
    """accelerate's hooks on every module with weights, as in offloading, with the weights on the GPU."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = plain(config, dtype)
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            add_hook_to_module(module, AlignDevicesHook(execution_device=torch.device(DEVICE)))
    return model


def saved(config: LlamaConfig, dtype: torch.dtype, **kwargs: Any) -> nn.Module:
    """A model that `from_pretrained` loads with these arguments; of several processes the first one saves it."""
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        if dist.is_initialized():
            dist.broadcast_object_list(shared)
        if not dist.is_initialized() or dist.get_rank() == 0:
            plain(config, dtype).save_pretrained(shared[0])  # type: ignore[operator]
        if dist.is_initialized():
            dist.barrier()
        model = LlamaModel.from_pretrained(shared[0], dtype=dtype, **kwargs).eval()
        if dist.is_initialized():
            dist.barrier()
        return model


def over_two_gpus(config: LlamaConfig, dtype: torch.dtype) -> nn.Module:
    """A device map that puts each half of the layers on one GPU."""
    half = config.num_hidden_layers // 2
    places = {f"layers.{i}": int(i >= half) for i in range(config.num_hidden_layers)}
    return saved(config, dtype, device_map={"embed_tokens": 0, "norm": 1, "rotary_emb": 0} | places)


def quantized(config: LlamaConfig, dtype: torch.dtype, **bits: bool) -> nn.Module:
    """bitsandbytes' layers in place of all projections."""
    from transformers import BitsAndBytesConfig

    return saved(config, dtype, device_map={"": 0}, quantization_config=BitsAndBytesConfig(**bits))


@dataclass(frozen=True)
class Wrapping:
    """One way to wrap a model: a function that makes it, what it needs, and how it runs."""

    make: Callable[[LlamaConfig, torch.dtype], nn.Module]
    package: str | None = None
    gpus: int = 1
    around: Callable[[], AbstractContextManager] = nullcontext
    trains: bool = False
    processes: int = 1


WRAPPINGS = {
    "plain": Wrapping(plain),
    "lora": Wrapping(lora, "peft"),
    "lora-two": Wrapping(partial(lora, adapters=2), "peft"),
    "lora-merged": Wrapping(partial(lora, merged=True), "peft"),
    "lora-training": Wrapping(lora, "peft", trains=True),
    "autocast": Wrapping(plain, around=partial(torch.autocast, "cuda", torch.bfloat16)),
    "hooks": Wrapping(hooked, "accelerate"),
    "bnb-8bit": Wrapping(partial(quantized, load_in_8bit=True), "bitsandbytes"),
    "bnb-4bit": Wrapping(partial(quantized, load_in_4bit=True), "bitsandbytes"),
    "device-map-2": Wrapping(over_two_gpus, "accelerate", gpus=2),
    "tensor-parallel-2": Wrapping(partial(saved, tp_plan="auto"), gpus=2, processes=2),
}


def measure(
    names: list[str], tokens: list[int], layers: int, rounds: int, dtype: torch.dtype = torch.bfloat16
) -> Iterator[list[Row]]:
    """Times forward passes (with a backward where adapters are trained) of `layers` decoder layers.

    A wrapping is logged and left out if its package or GPUs are missing, if it fails, or if the output of its fused
    layers differs from the original's.

    Args:
        names: keys of `WRAPPINGS`.
        tokens: values of M; inputs are `[1, M, hidden_size]`.
        rounds: rounds in which original and fused take turns, in random order; three more are not counted.

    Yields:
        For each wrapping and M the rows of both forms: wall-clock milliseconds of a pass, and as `paired_speedup` the
            median over rounds of original over fused.
    """
    config = LlamaConfig(**SIZES, num_hidden_layers=layers)  # type: ignore[arg-type]
    for name in names:
        wrapping = WRAPPINGS[name]
        if reason := _unavailable(wrapping):
            logger.warning("%s: %s", name, reason)
            continue
        run = _rows if wrapping.processes == 1 else _rows_of_processes
        try:
            yield from run(name, config, tokens, rounds, dtype)
        except Exception as error:  # an error in one package must not lose the rows of the others
            logger.warning("%s: %s: %s", name, type(error).__name__, error)


def _unavailable(wrapping: Wrapping) -> str | None:
    if wrapping.package is not None and importlib.util.find_spec(wrapping.package) is None:
        return f"{wrapping.package} is not installed"
    if wrapping.gpus > 1 and torch.cuda.device_count() < wrapping.gpus:
        return f"needs {wrapping.gpus} GPUs"
    return None


def _rows_of_processes(name: str, config: LlamaConfig, *how: Any) -> Iterator[list[Row]]:
    """The rows of a model that is spread over several processes."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = name, config, *how, Path(directory)
        torch.multiprocessing.spawn(_process, arguments, nprocs=WRAPPINGS[name].processes)
        yield from torch.load(Path(directory) / "rows", weights_only=True)


def _process(rank: int, name: str, config: LlamaConfig, tokens: list[int], rounds: int, dtype: Any, directory: Path):
    """One of the processes of a model that is spread over several; the first writes the rows."""
    torch.cuda.set_device(rank)
    global DEVICE
    DEVICE = f"cuda:{rank}"
    world = WRAPPINGS[name].processes
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}  # Transformers reads them
    dist.init_process_group("nccl", f"file://{directory}/store", rank=rank, world_size=world)
    rows = list(_rows(name, config, tokens, rounds, dtype))
    if rank == 0:
        torch.save(rows, directory / "rows")
    dist.barrier()
    dist.destroy_process_group()


def _rows(name: str, config: LlamaConfig, tokens: list[int], rounds: int, dtype: torch.dtype) -> Iterator[list[Row]]:
    wrapping = WRAPPINGS[name]
    torch.manual_seed(0)
    model = fuse_model(wrapping.make(config, dtype), strict=True).train(wrapping.trains)
    modules = [module for module in model.modules() if isinstance(module, Fused)]
    for m in tokens:
        x = torch.randn(1, m, config.hidden_size, device=DEVICE, dtype=dtype, requires_grad=wrapping.trains)
        step = partial(_train if wrapping.trains else _forward, model, x)
        with wrapping.around():
            check(step, modules)
            times = time_forms(step, modules, rounds, calls=1 if m > 512 else 3)
        paired = statistics.median(map(truediv, times["original"], times["fused"]))
        rows = []
        for impl, values in times.items():
            cuts = statistics.quantiles(values, n=10)
            rows.append(
                {
                    "wrapping": name,
                    "layers": config.num_hidden_layers,
                    "m": m,
                    "impl": impl,
                    "median_ms": round(statistics.median(values), 4),
                    "p20_ms": round(cuts[1], 4),
                    "p80_ms": round(cuts[7], 4),
                    "paired_speedup": round(paired, 3),
                }
            )
        yield rows
    del model, modules
    torch.cuda.empty_cache()


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x, use_cache=False).last_hidden_state


def _train(model: nn.Module, x: Tensor) -> Tensor:
    """Forward and backward, with gradients of the adapters and the input; returns the input's."""
    model.zero_grad()
    x.grad = None
    model(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
    assert x.grad is not None
    return x.grad


def check(step: Callable[[], Tensor], modules: list[Any]) -> None:
    """Raises an error if the output of the fused form of `modules` differs from the original's."""
    got = step().float()
    with original_form(modules):
        expected = step().float()
    difference = (torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected)).item()
    if not difference <= MOST_DIFFERENCE:
        raise AssertionError(f"the fused layers are off by {difference:.1%}, so they are not timed")


def time_forms(step: Callable[[], object], modules: list[Any], rounds: int, calls: int) -> dict[str, list[float]]:
    """Milliseconds of a step in each round, for the original and the fused form of `modules`, which take turns."""
    order = random.Random(0)  # the same in all processes of a model
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for round_ in range(3 + rounds):
        for form in order.sample(FORMS, 2):
            with original_form(modules if form == "original" else []):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    step()
                torch.cuda.synchronize()
                elapsed = (time.perf_counter() - start) * 1e3 / calls
            if round_ >= 3:
                times[form].append(elapsed)
    return times


def table(rows: list[Row]) -> str:
    """One line per wrapping: the speedup of fused, by token count."""
    tokens = sorted({row["m"] for row in rows})
    lines = [f"| wrapping | {' | '.join(f'M = {m}' for m in tokens)} |", "|---|" + "---:|" * len(tokens)]
    speedups: dict[str, dict[int, float]] = {}
    for row in rows:
        speedups.setdefault(row["wrapping"], {})[row["m"]] = row["paired_speedup"]
    for name, by_m in speedups.items():
        lines.append(f"| {name} | {' | '.join(f'{by_m[m]:.2f}x' if m in by_m else '-' for m in tokens)} |")
    return "\n".join(lines)
