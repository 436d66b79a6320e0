"""Which plan runs a problem: a look-up, never a measurement.

Sources are asked in turn, and the first that knows the problem answers: tuned plans first, rules last.
"""

from collections.abc import Callable

from hf_fused_mlp.tuning.heuristics import heuristic_plan
from hf_fused_mlp.types import Plan, ProblemKey

SOURCES: list[Callable[[ProblemKey], Plan | None]] = [heuristic_plan]

_plans: dict[ProblemKey, Plan] = {}


def plan_for(key: ProblemKey) -> Plan:
    """The plan for `key`, remembered for the life of the process."""
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = next(plan for source in SOURCES if (plan := source(key)))
    return plan
