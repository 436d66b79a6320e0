"""What fusing should gain, from the MLPs' share of the time and what their plans were measured to gain alone."""

from torch import nn

from hf_fused_mlp.modules import FusedMLP
from hf_fused_mlp.profiling.estimates import amdahl
from hf_fused_mlp.profiling.report import Prediction
from hf_fused_mlp.profiling.trace import Breakdown


def predict(mlps: dict[str, nn.Module], m: int, bound: str, original: Breakdown, wall_us: float) -> Prediction:
    """Amdahl's law for a step that takes the original model `wall_us`.

    Args:
        mlps: by name, those of the model while it is fused.
        m: tokens that an MLP is given.
        bound: of the original's step.
    """
    fused = {name: module for name, module in mlps.items() if isinstance(module, FusedMLP)}
    if not fused:
        return Prediction(1.0, "no MLP of this model can be fused")
    reasons = {name: module.reasons() for name, module in fused.items()}
    original_runs = [bypassed for bypassed, _ in reasons.values() if bypassed]
    if len(original_runs) == len(fused):
        return Prediction(1.0, original_runs[0])
    if bound == "host-bound":
        return Prediction(1.0, "the GPU waits for the host, so what kernels save does not show; fewer launches may")
    before = after = 0.0
    for name, module in fused.items():
        bypassed, called = reasons[name]
        if called and not bypassed:
            return Prediction(None, f"plans are measured for kernels alone, and {name} calls projections: {called}")
        gain = 1.0 if bypassed else _gain_alone(module, m)
        if gain is None:
            return Prediction(
                None,
                f"no plan was measured for {name} and {m} tokens, whose tiles a rule of thumb chooses; "
                "`hf-fused-mlp tune` measures one",
            )
        us = original.us_by_mlp.get(name, 0.0)
        before, after = before + us, after + us / gain
    if not before:
        return Prediction(1.0, "no MLP was called")
    share = before / max(wall_us, original.busy_us)
    return Prediction(amdahl(share, before / after), "the MLPs' share of the time, and what their plans gained alone")


def _gain_alone(module: FusedMLP, m: int) -> float | None:
    """How many times faster than PyTorch's own kernels its plan for `m` tokens was when it was measured."""
    from hf_fused_mlp.dispatch import problem_key  # these two import Triton
    from hf_fused_mlp.tuning.cache import tuned_plan

    gate, up, down, *biases, activation = module.operands()
    bias = any(tensor is not None for tensor in biases)
    tuned = tuned_plan(problem_key(m, gate, up, down, activation, bias))
    return None if tuned is None else tuned.unfused_us / tuned.plan_us
