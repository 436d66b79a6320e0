"""Loads the model that a command's MODEL argument names."""

from typing import TYPE_CHECKING, Any

from hf_fused_mlp.cli.console import fail, require_directory
from hf_fused_mlp.integrations import demo

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(name: str | None, dtype: str, device_map: str | None, **kwargs: Any) -> "PreTrainedModel":
    """Loads a model from a directory or hub id, or the demo's; by default onto the first GPU, or the CPU.

    Transformers shows its own progress bars meanwhile. `kwargs` go to `from_pretrained`.
    """
    if dtype not in DTYPES:
        fail(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if name is not None:
        require_directory(name)

    import torch
    from transformers import AutoModelForCausalLM

    device_map = device_map or ("cuda:0" if torch.cuda.is_available() else "cpu")
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map, **kwargs)
    if dtype == "auto":
        dtype = "float32" if device_map == "cpu" else "bfloat16"
    return demo.load_demo(dtype=dtype, device_map=device_map, **kwargs)


def load_tokenizer(name: str | None) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of the same model."""
    from transformers import AutoTokenizer

    return demo.load_demo_tokenizer() if name is None else AutoTokenizer.from_pretrained(name)
