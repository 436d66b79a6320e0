"""The MLPs of a model type: those in the model of its default config, with all layers and without weights."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from hf_fused_mlp.fuse import fusion_report

MODEL_TYPES = sorted(CONFIG_MAPPING.keys(), key=str.lower)

# the default config builds no model without it; no MLP depends on it
LACKING: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "idefics3": {"pad_token_id": 0},  # in Transformers 5.17
    "lfm2_moe": {"layer_types": ["full_attention"] * 32},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}


@dataclass(frozen=True)
class Found:
    """The number of MLPs of a class in a model, whether they are `"fusable"` or `"skipped"`, and why."""

    class_name: str
    count: int
    state: str
    reason: str | None


@dataclass(frozen=True)
class Entry:
    """The MLPs of a model type, or the `error` for which no model of it was built."""

    model_type: str
    model_class: str | None = None
    mlps: tuple[Found, ...] = ()
    error: str | None = None

    def select(self, state: str) -> tuple[Found, ...]:
        return tuple(mlp for mlp in self.mlps if mlp.state == state)


def examine(model_type: str) -> tuple[Entry, nn.Module | None]:
    """What would be fused in a loaded model of this type; and the model, whose weights take no memory.

    Raises:
        KeyError: a model type that Transformers does not know.
    """
    config_class = CONFIG_MAPPING[model_type]
    with _quiet():
        try:
            config = config_class(**LACKING.get(model_type, {}))
            auto_class = auto_class_of(config)
            if auto_class is None:
                return Entry(model_type, error="no Auto class of Transformers builds it"), None
            with torch.device("meta"):
                model = auto_class.from_config(config).eval()
        except Exception as error:  # models check their configs in different ways, or not at all
            return Entry(model_type, error=_why(error)), None
    # tensors on meta count as not loaded, so each becomes one number, expanded to the tensor's shape
    model._apply(lambda tensor: torch.empty((), dtype=tensor.dtype).expand(tensor.shape))
    grouped = fusion_report(model).grouped().items()
    mlps = tuple(Found(class_name, count, state, reason) for (class_name, state, reason), count in grouped)
    return Entry(model_type, type(model).__name__, mlps), model


def auto_class_of(config: PretrainedConfig) -> Any | None:
    """`AutoModel` if it builds models of this config, otherwise the first Auto class that does."""
    for auto_class in (AutoModel, *vars(modeling_auto).values()):
        mapping = getattr(auto_class, "_model_mapping", None) if isinstance(auto_class, type) else None
        if mapping is not None and type(config) in mapping:
            return auto_class
    return None


def _why(error: Exception) -> str:
    """One line. The part before a colon is the same for all model types with that problem."""
    if package := re.search(r"requires the (\S+) library", str(error)):
        return f"it needs {package[1]}, which is not installed"
    return f"its default config builds no model: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Transformers and PyTorch about default configs, which no user chose."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
