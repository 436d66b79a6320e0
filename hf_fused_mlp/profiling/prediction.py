"""Predicts the gain of fusing from the MLPs' share of the time and the measured gain of their plans."""

from torch import nn

from hf_fused_mlp.families import problem_of
from hf_fused_mlp.families.mlp.checks import has_slow_activation
from hf_fused_mlp.profiling.estimates import amdahl
from hf_fused_mlp.profiling.report import Bound, Prediction
from hf_fused_mlp.profiling.trace import Breakdown
from hf_fused_mlp.swap import Fused
from hf_fused_mlp.types import Plan, ProblemKey


def predict(mlps: dict[str, nn.Module], m: int, bound: Bound, original: Breakdown, wall_us: float) -> Prediction:
    """Amdahl's law for a step that takes the original model `wall_us`.

    Args:
        mlps: the MLPs of the fused model by name.
        m: the tokens of one call of an MLP.
        bound: what the original's step waits for.
    """
    fused = {name: module for name, module in mlps.items() if isinstance(module, Fused)}
    if not fused:
        return Prediction(1.0, "no MLP of this model can be fused")
    runs = {name: module.runs() for name, module in fused.items()}
    original_runs = [original for original, _ in runs.values() if original]
    if len(original_runs) == len(fused):
        return Prediction(1.0, original_runs[0])
    if bound == "host-bound":
        return Prediction(1.0, "the GPU waits for the host, so faster kernels do not show; fewer launches may")
    before = after = 0.0
    for name, module in fused.items():
        instead, called = runs[name]
        if called and not instead:
            return Prediction(None, f"plans are measured for kernels alone, and {name} calls projections: {called}")
        gain = 1.0 if instead else _gain_alone(module, m)
        if gain is None and problem_of(module, m) is None:
            return Prediction(None, f"no plan says what modules like {name} gain over the original")
        if gain is None:
            return Prediction(
                None,
                f"no plan was measured for {name} and {m} tokens, so the rule chooses the kernels; "
                "fuse_model(model, tune=True) measures one",
            )
        us = original.us_by_mlp.get(name, 0.0)
        before, after = before + us, after + us / gain
    if not before:
        return Prediction(1.0, "no MLP was called")
    share = before / max(wall_us, original.busy_us)
    basis = "the MLPs' share of the time, and the measured gain of their plans"
    return Prediction(amdahl(share, before / after), basis)


def _gain_alone(module: Fused, m: int) -> float | None:
    """The measured speedup of its plan for `m` tokens over PyTorch's own kernels; None if it was not measured."""
    from hf_fused_mlp.tuning.cache import tuned_plan  # imports Triton
    from hf_fused_mlp.tuning.heuristics import gains_nothing_in_eager

    key = problem_of(module, m)
    tuned = None if key is None else tuned_plan(key)
    if tuned is None:
        return None
    alone = (
        isinstance(key, ProblemKey)
        and isinstance(tuned.plan, Plan)
        and not has_slow_activation(module, module.fused_spec)
        and gains_nothing_in_eager(key, tuned.plan, len(module.fused_spec.first))
    )
    return 1.0 if alone else tuned.other_us / tuned.plan_us
