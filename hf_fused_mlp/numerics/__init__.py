"""`validate`: compares a fused model to its original, layer by layer and as a whole."""

from collections.abc import Mapping
from contextlib import ExitStack
from operator import is_

import torch
from torch import Tensor, nn

from hf_fused_mlp.families import FAMILIES
from hf_fused_mlp.fuse import fusion_report
from hf_fused_mlp.modes import evaluating
from hf_fused_mlp.numerics.layers import judge_calls
from hf_fused_mlp.numerics.logits import Forward, compare_greedy, compare_logits, predicts_next
from hf_fused_mlp.numerics.report import Divergence, LayerNumerics, NumericsReport
from hf_fused_mlp.swap import Fused
from hf_fused_mlp.types import FLOATS, FP8


@torch.no_grad()
def validate(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    *,
    reference: nn.Module | None = None,
    new_tokens: int = 32,
) -> NumericsReport:
    """Compares each fused MLP of `model` to its original, on the activations that `inputs` produce.

    The rule of `hf_fused_mlp.validation` judges the output of a layer against a float64 copy of that layer: its
    largest error may be twice the original's, and its relative RMS error has a limit for each dtype. Each token's
    output is first divided by its RMS, because a few tokens can be a thousand times larger than all others and would
    hide them. The original's largest error counts as at least half a unit in the last place of the largest output,
    because no output in that dtype can be expected to be closer. This judges the model's own call, and calls with 1
    and 16 of its tokens.

    The model passes if fused MLPs ran, if all of these pass, and if every logit that is finite in the reference is
    finite. Logits, perplexities and greedy answers are information, because no rule can bound how much rounding moves
    them. A greedy answer that differs where the reference was sure is a warning. After a near tie it is not.

    Without `reference`, the original is the model itself in its original form. This finds wrong kernels and wrong
    packing, but not a changed weight, which both forms share. With the model it was made from as `reference`, a layer
    also fails if a weight differs.

    Args:
        model: a model with fused MLPs; it runs in evaluation mode, and is restored afterwards.
        inputs: token ids `[tokens]` or `[batch, tokens]`, or the keyword arguments of a forward.
        reference: another model with MLPs of the same names, shapes and dtypes: its weights make the oracle, and its
            original forward is the baseline. MLPs in FP8 whose twins are floats are compared with their own original
            form; logits and perplexities then show what quantizing costs.
        new_tokens: the length of the greedy answers to four short pieces of the text; 0 for none.

    Raises:
        TypeError: `model` or `reference` is not an `nn.Module`, or `inputs` neither a tensor nor a mapping.
        ValueError: empty `inputs`, `new_tokens` below 0, autocast, or a `reference` that does not correspond.
    """
    source = model if reference is None else reference
    for name, module in (("model", model), ("reference", source)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"validate: {name} is {type(module).__name__}, not an nn.Module; pass the model itself")
    if new_tokens < 0:
        raise ValueError(f"validate: new_tokens={new_tokens}; expected 0 or more")
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if torch.is_autocast_enabled(device.type):
        raise ValueError("validate: called under autocast, where projections are called; call it outside")
    forward = _forward(inputs, device)

    judged = tuple(family.mixin for family in FAMILIES if family.option is None)
    fused = {name: module for name, module in model.named_modules() if isinstance(module, judged)}
    twins = fused if reference is None else {name: _twin(reference, name, module) for name, module in fused.items()}
    layers: dict[str, LayerNumerics] = {}
    # compiled code would not see the hooks
    with evaluating(model, source), torch.compiler.set_stance("force_eager"):
        with ExitStack() as hooks:
            for name, module in fused.items():
                hook = module.register_forward_hook(judge_calls(name, module, twins[name], layers), with_kwargs=True)
                hooks.callback(hook.remove)
            output = forward(model)
        logits = compare_logits(output, source, forward, predicts_next(model))
        greedy: tuple[Divergence, ...] = ()
        if logits is not None and predicts_next(model) and forward.is_text:
            greedy = compare_greedy(model, source, forward.text(), new_tokens)
        statuses = fusion_report(model).default
    return NumericsReport(
        reference="its original form" if all(map(is_, twins.values(), fused.values())) else "the reference model",
        device=str(device),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        layers=tuple(layers[name] for name in fused if name in layers),
        unfused=tuple(status for status in statuses if status.state != "fused"),
        unreached=tuple(name for name in fused if name not in layers),
        logits=logits,
        greedy=greedy,
    )


def _forward(inputs, device: torch.device) -> Forward:
    if isinstance(inputs, Tensor):
        inputs = inputs[None] if inputs.dim() == 1 else inputs
        forward = Forward(positional=inputs.to(device))
    elif isinstance(inputs, Mapping):
        forward = Forward({name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()})
    else:
        raise TypeError(f"validate: inputs are {type(inputs).__name__}; pass token ids as a tensor, or a dict")
    tensors = (*forward.arguments.values(), forward.positional)
    if not any(isinstance(tensor, Tensor) and tensor.numel() for tensor in tensors):
        raise ValueError("validate: inputs hold no tokens; pass the token ids of some text")
    return forward


def _twin(reference: nn.Module, name: str, module: Fused) -> nn.Module:
    """The module of `reference` that `module` is compared to; `module` itself if only that is quantized."""
    try:
        twin = reference.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"reference has no module {name!r}; give the model that the fused one was made from"
        ) from None
    theirs = dict(twin.named_parameters())
    for path, parameter in module.named_parameters():
        other = theirs.get(path, parameter)
        if (other.shape, other.dtype) != (parameter.shape, parameter.dtype):
            if parameter.dtype == FP8 and other.dtype in FLOATS and other.shape == parameter.shape:
                return module
            raise ValueError(
                f"{name}.{path} is {list(parameter.shape)} {parameter.dtype}, and in reference {list(other.shape)} "
                f"{other.dtype}; load both models in one architecture and dtype"
            )
    return twin
