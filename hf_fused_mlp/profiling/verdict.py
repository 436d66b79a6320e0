"""Decides whether to fuse, from measured times only."""

from collections.abc import Sequence

from hf_fused_mlp.profiling.intervals import CONFIDENCE, ENOUGH_ROUNDS, direction, speedup
from hf_fused_mlp.profiling.report import Phase, Verdict

CALLS = {"fused": "fuse_model(model)", "fused_norms": "fuse_model(model, norms=True)"}


def judge(phases: Sequence[Phase], new_tokens: int, on_gpu: bool) -> Verdict:
    """The verdict on a request of one prefill and `new_tokens` steps of decode."""
    rounds = request_us(phases, new_tokens)
    form = better_form(rounds)
    if form is None:
        if not on_gpu:
            reason = "On a CPU the original forward runs. Audit on the GPU that will run the model."
            return Verdict(None, "No verdict on a CPU", reason, None, None)
        return Verdict(False, "Nothing to fuse", f"Fusing changes nothing: {phases[0].predicted.basis}.", None, None)
    gain = speedup(rounds["original"], rounds[form])
    found = direction(gain)
    per_round = f"{len(rounds[form])} paired rounds of prefill and {new_tokens} decode steps"
    headline, fuse, reason = {
        "unknown": (
            "Too few rounds for a verdict",
            None,
            f"{per_round} give no {CONFIDENCE:.0%} interval; ask for {ENOUGH_ROUNDS} rounds or more.",
        ),
        "the same": (
            "No measurable difference",
            False,
            f"Over {per_round}, the {CONFIDENCE:.0%} interval of the speedup contains 1.",
        ),
        "faster": (f"Fuse: {CALLS[form]}", True, f"Over {per_round}, eager and fused in turn."),
        "slower": ("Do not fuse: it is slower here", False, f"Over {per_round}, eager and fused in turn."),
    }[found]
    return Verdict(fuse, headline, reason, form, gain)


def request_us(phases: Sequence[Phase], new_tokens: int) -> dict[str, list[float]]:
    """For each measured form, the microseconds of a whole request in each round."""
    prefill, decode = phases
    return {
        name: [
            first + new_tokens * step for first, step in zip(form.rounds_us, decode.forms[name].rounds_us, strict=True)
        ]
        for name, form in prefill.forms.items()
    }


def better_form(rounds: dict[str, list[float]]) -> str | None:
    """The fused form to recommend, if any was measured. Includes norms only if they make a measurable difference."""
    fused = [name for name in rounds if name != "original"]
    if len(fused) < 2:
        return next(iter(fused), None)
    faster = {name: direction(speedup(rounds["original"], rounds[name])) == "faster" for name in fused}
    norms_help = direction(speedup(rounds["fused"], rounds["fused_norms"])) == "faster"
    return "fused_norms" if norms_help or faster["fused_norms"] > faster["fused"] else "fused"
