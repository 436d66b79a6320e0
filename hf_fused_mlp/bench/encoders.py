"""`hf-fused-mlp bench encoders`: eager forwards of small models, which wait for Python more than for the GPU.

Whole models of published sizes with random weights, in their default attention. Original and fused are the same model,
whose modules change their class in turn, and each round gives one ratio of the two.
"""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_fused_mlp.bench import wrapped
from hf_fused_mlp.bench.measuring import name_of
from hf_fused_mlp.bench.results import Row
from hf_fused_mlp.fuse import fuse_model
from hf_fused_mlp.profiling.intervals import speedup
from hf_fused_mlp.swap import Fused

TOKENS = 128  # of a text


@dataclass(frozen=True)
class Encoder:
    """A class of Transformers, that of its config, and what differs from the config's defaults."""

    model: str
    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    reads_pixels: bool = False

    def build(self, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """The model in evaluation mode, with random weights."""
        config = getattr(transformers, self.config)(**self.changes)
        with torch.device(device):
            model: Any = getattr(transformers, self.model)(config)
        return model.to(dtype).eval()

    def inputs(self, model: Any, batch: int) -> dict[str, Tensor]:
        """Random texts of `TOKENS` tokens, or random images."""
        config, where = model.config, {"device": model.device}
        if self.reads_pixels:
            shape = batch, config.num_channels, config.image_size, config.image_size
            return {"pixel_values": torch.randn(shape, dtype=model.dtype, **where)}
        return {"input_ids": torch.randint(2, config.vocab_size, (batch, TOKENS), **where)}


_PYTHIA: dict[str, Any] = {"vocab_size": 50304, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_PYTHIA |= {"num_attention_heads": 12, "use_cache": False}
_QWEN: dict[str, Any] = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "use_cache": False}
_QWEN |= {"num_attention_heads": 14, "num_key_value_heads": 2}
ENCODERS = {
    "bert-base": Encoder("BertModel", "BertConfig"),
    "vit-base": Encoder("ViTModel", "ViTConfig", reads_pixels=True),
    "clip-base-vision": Encoder("CLIPVisionModel", "CLIPVisionConfig", reads_pixels=True),
    "siglip-base-vision": Encoder("SiglipVisionModel", "SiglipVisionConfig", reads_pixels=True),
    "t5-base-encoder": Encoder(
        "T5EncoderModel", "T5Config", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    ),
    "modernbert-base": Encoder("ModernBertModel", "ModernBertConfig"),
    "pythia-160m": Encoder("GPTNeoXModel", "GPTNeoXConfig", _PYTHIA),
    "gpt2": Encoder("GPT2Model", "GPT2Config", {"use_cache": False}),
    "qwen2.5-0.5b": Encoder("Qwen2Model", "Qwen2Config", _QWEN),
}


def measure(names: Iterable[str], batches: list[int], dtypes: list[torch.dtype], rounds: int) -> Iterator[list[Row]]:
    """Times forwards until the GPU has finished.

    Args:
        names: keys of `ENCODERS`.
        batches: texts or images of a forward.
        rounds: rounds in which original and fused take turns; some before them are not counted.

    Yields:
        For each model, dtype and batch the rows of both forms, in milliseconds; `paired_speedup` is the median over
        rounds of original over fused, `low` and `high` the 95 % interval of that median.

    Raises:
        AssertionError: the fused model gives other numbers than the original.
    """
    for name in names:
        for dtype in dtypes:
            torch.manual_seed(0)
            model = fuse_model(ENCODERS[name].build(wrapped.DEVICE, dtype), strict=True)
            modules = [module for module in model.modules() if isinstance(module, Fused)]
            for batch in batches:
                step = partial(_forward, model, ENCODERS[name].inputs(model, batch))
                wrapped.check(step, modules)
                times = wrapped.time_forms(step, modules, rounds, calls=3)
                yield _rows({"model": name, "dtype": name_of(dtype), "batch": batch}, times)
            del model, modules, step
            torch.cuda.empty_cache()


@torch.no_grad()
def _forward(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).last_hidden_state


def _rows(problem: Row, times: dict[str, list[float]]) -> list[Row]:
    found = speedup(times["original"], times["fused"])
    rows = []
    for impl, values in times.items():
        cuts = statistics.quantiles(values, n=10, method="inclusive")  # of few rounds, within them
        ms = {"median_ms": statistics.median(values), "p20_ms": cuts[1], "p80_ms": cuts[7]}
        ratio = {"paired_speedup": found.median, "low": found.low, "high": found.high}
        rows.append({**problem, "impl": impl, **{key: round(value, 4) for key, value in (ms | ratio).items()}})
    return rows


def table(rows: list[Row]) -> str:
    """One line a model, dtype and batch: times, the ratio and its interval."""
    lines = ["| model | dtype | batch | original, ms | fused, ms | fused over original | 95 % |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    original = {
        (row["model"], row["dtype"], row["batch"]): row["median_ms"] for row in rows if row["impl"] == "original"
    }
    for row in rows:
        if row["impl"] == "fused":
            problem = row["model"], row["dtype"], row["batch"]
            times = f"{original[problem]:.2f} | {row['median_ms']:.2f}"
            ratio = f"{row['paired_speedup']:.2f}x | {row['low']:.2f} to {row['high']:.2f}"
            lines.append(f"| {' | '.join(map(str, problem))} | {times} | {ratio} |")
    return "\n".join(lines)
