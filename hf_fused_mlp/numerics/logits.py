"""Compares the whole model to the reference's original form: logits, perplexity and greedy answers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_fused_mlp.numerics.fp8 import fp8_by_reference
from hf_fused_mlp.numerics.report import Divergence, LogitsNumerics
from hf_fused_mlp.swap import Fused, original_form

PROMPTS, PROMPT_TOKENS = 4, 16
ROWS = 64  # logits to convert to float64 at a time


@dataclass(frozen=True)
class Forward:
    """The arguments of a forward: keyword arguments, or one tensor."""

    arguments: dict = field(default_factory=dict)
    positional: Tensor | None = None

    def __call__(self, model: nn.Module):
        return model(**self.arguments) if self.positional is None else model(self.positional)

    @property
    def ids(self) -> Tensor | None:
        """Token ids `[batch, tokens]`, if there are any."""
        ids = self.arguments.get("input_ids", self.positional)
        return None if ids is None or ids.is_floating_point() else ids

    @property
    def is_text(self) -> bool:
        """Whether there are token ids, and no other input that would have to be cut with them."""
        return self.ids is not None and self.arguments.keys() <= {"input_ids", "attention_mask"}

    def mask(self, shape: torch.Size) -> Tensor:
        """Which positions are tokens and not padding, on the CPU; `shape` is that of the logits without vocabulary."""
        mask = self.arguments.get("attention_mask")
        return torch.ones(shape, dtype=torch.bool) if mask is None or mask.shape != shape else mask.bool().cpu()

    def text(self) -> Tensor:
        """The first text's token ids, `[tokens]`, on their device."""
        return self.ids[0][self.mask(self.ids.shape)[0].to(self.ids.device)]


def predicts_next(model: nn.Module) -> bool:
    """Whether logits predict the next token: not in encoders, nor if a decoder has other tokens."""
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return getattr(model, "can_generate", bool)() and not is_pair


def compare_logits(output, source: nn.Module, forward: Forward, next_tokens: bool) -> LogitsNumerics | None:
    """Compares `output` of the fused model to that of the original form of `source`; None if there are no logits.

    With `next_tokens`, includes perplexities.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        return None
    with _originals_of(source):
        expected = forward(source).logits
    if expected.shape != logits.shape:
        shapes = f"{list(expected.shape)}, the model {list(logits.shape)}"
        raise ValueError(f"reference gives logits {shapes}; give the model that was fused")
    mask = forward.mask(logits.shape[:-1])
    targets = torch.full(mask.shape, -1)
    if next_tokens and forward.ids is not None and forward.ids.shape == mask.shape:
        targets[:, :-1] = torch.where(mask[:, :-1] & mask[:, 1:], forward.ids[:, 1:].cpu(), -1)

    keep = mask.flatten()
    kl, same, losses, differences, finite = [], [], [], [], []
    ours, theirs = (tensor.flatten(0, -2)[keep.to(tensor.device)].split(ROWS) for tensor in (logits, expected))
    for q, p, wanted in zip(ours, theirs, targets.flatten()[keep].split(ROWS), strict=True):
        q, p = q.cpu().double(), p.cpu().double()
        finite.append((q.isfinite() | ~p.isfinite()).all().item())
        differences.append((q - p).abs().nan_to_num(0, posinf=0).max().item())
        same += (q.argmax(-1) == p.argmax(-1)).tolist()
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        kl += torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0).sum(-1).tolist()
        at = wanted[wanted >= 0, None]
        losses.append(torch.cat([-log[wanted >= 0].gather(-1, at) for log in (log_q, log_p)], -1))
    both = torch.cat(losses)
    perplexities = both.mean(0).exp().tolist() if len(both) else (None, None)
    return LogitsNumerics(
        len(kl), sum(kl) / len(kl), max(kl), sum(same) / len(same), max(differences), all(finite), *perplexities
    )


def compare_greedy(model: nn.Module, source: nn.Module, text: Tensor, new_tokens: int) -> tuple[Divergence, ...]:
    """Compares the greedy answers of both, `new_tokens` long, to up to four evenly spaced pieces of `text`."""
    answers = []
    for start in range(0, len(text), -(-len(text) // PROMPTS)) if new_tokens else ():
        prompt = text[None, start : start + PROMPT_TOKENS]
        answer = _greedy(model, prompt, new_tokens)
        with _originals_of(source):
            expected = _greedy(source, prompt, new_tokens)
            split = first_difference(answer[0].tolist(), expected[0].tolist())
            margin = None
            if split is not None:
                upto = torch.cat((prompt, expected[:, :split]), -1)
                best, second = source(upto).logits[0, -1].double().topk(2).values.tolist()
                margin = best - second
        answers.append(Divergence(start, new_tokens, split, margin))
    return tuple(answers)


@contextmanager
def _originals_of(model: nn.Module) -> Iterator[None]:
    fused = [module for module in model.modules() if isinstance(module, Fused)]
    with original_form(fused), fp8_by_reference(model):
        yield


def _greedy(model: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    """The greedy `[1, new_tokens]` tokens after `prompt` `[1, tokens]`; end-of-text tokens do not stop it."""
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, prompt.shape[1] :]


def first_difference(a: list[int], b: list[int]) -> int | None:
    """The index of the first token in which two answers differ, or None if they are the same."""
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
