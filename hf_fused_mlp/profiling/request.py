"""The work that an audit times: one greedy request, prefill and decode."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# by the kind of device
PROMPT_TOKENS = {"cuda": 512, "cpu": 128}
NEW_TOKENS = {"cuda": 32, "cpu": 16}
ROUNDS = {"cuda": 9, "cpu": 3}
# the name of the key-value cache in a forward and its output: from Transformers 5.24 on, and before
CACHE_NAMES = ("cache", "past_key_values")
State = tuple[Tensor, Any]


@dataclass(frozen=True)
class Request:
    """One request: `ids` `[batch, prompt_tokens]`, how many tokens to generate after them, and how often to time it.

    `forward` is the model's, which takes its key-value cache as `cache_name`, and `gpus` are those that it is on.
    `for_decoding` makes the context in which `generate` decodes, where routed experts have another implementation.
    """

    forward: Callable
    for_decoding: Callable[[], AbstractContextManager]
    cache_name: str
    ids: Tensor
    new_tokens: int
    rounds: int
    gpus: tuple[torch.device, ...]

    def prefill(self) -> State:
        return self.step(self.ids, None)

    def step(self, ids: Tensor, cache: Any) -> State:
        """One forward: the next token of each prompt, `[batch, 1]`, and the cache."""
        output = self.forward(input_ids=ids, **{self.cache_name: cache})
        # not by `cache_name`: remote code may take the cache by the old name and return it by the new one
        kept = next(getattr(output, name) for name in CACHE_NAMES if hasattr(output, name))
        return output.logits[:, -1:].argmax(-1), kept

    @contextmanager
    def decoding(self) -> Iterator[Callable[[], None]]:
        """Runs a prefill, and gives a function that takes one more step at each call, as `generate` does."""
        state = self.prefill()

        def step() -> None:
            nonlocal state
            state = self.step(*state)

        with self.for_decoding():
            yield step


def make_request(
    model: PreTrainedModel, batch: int, prompt_tokens: int | None, new_tokens: int | None, rounds: int | None
) -> Request:
    """Makes random prompts, the same at every call. Sizes that are None depend on the device.

    Raises:
        TypeError, ValueError: see `audit`.
    """
    device = _auditable_device(model)
    parameters = _parameters(model)
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or float("inf")
    new_tokens = NEW_TOKENS[device.type] if new_tokens is None else new_tokens
    rounds = ROUNDS[device.type] if rounds is None else rounds
    # one more token, because the profiler warms up
    room = longest - new_tokens - 1
    if prompt_tokens is None:
        prompt_tokens = int(max(1, min(PROMPT_TOKENS[device.type], room)))
    numbers = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rounds": rounds}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} {value}: expected at least 1")
    if prompt_tokens > room:
        raise ValueError(
            f"prompt_tokens {prompt_tokens} and new_tokens {new_tokens}: the model has {longest} positions, one of "
            f"which the profiler needs; ask for at most {longest - 1} tokens together"
        )
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch, prompt_tokens), generator=seeded).to(device)
    # like generate, which asks for the logits of the last token only
    last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    cache_name = next(name for name in CACHE_NAMES if name in parameters)
    gpus = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    for_decoding = getattr(model, "_optimize_model_for_decode", nullcontext)  # as `generate` does, if it has experts
    forward = partial(model, use_cache=True, **last)
    return Request(forward, for_decoding, cache_name, ids, new_tokens, rounds, tuple(gpus))


def _auditable_device(model: PreTrainedModel) -> torch.device:
    """The device for the prompts, if `model` can be audited."""
    name = type(model).__name__
    if getattr(model, "_orig_mod", None) or getattr(model, "_compiled_call_impl", None):
        raise ValueError(f"audit: {name} is compiled, which hides its MLPs; pass the model before torch.compile")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"audit: {name} is not a model of Transformers; pass the loaded model itself")
    parameters = _parameters(model)
    cached = {"input_ids", "use_cache"} <= parameters.keys() and not parameters.keys().isdisjoint(CACHE_NAMES)
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None or not cached:
        raise TypeError(f"audit: {name} does not generate with a key-value cache; pass a causal language model")
    device = next(model.get_input_embeddings().parameters()).device
    if device.type not in PROMPT_TOKENS:
        raise ValueError(f"audit: {name} is on {device}, expected a CPU or a CUDA GPU; move it there")
    return device


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)
