"""The results of `validate`: figures, and the verdict that follows from them."""

import math
from dataclasses import asdict, dataclass

from hf_fused_mlp.report import ModuleStatus, grouped
from hf_fused_mlp.validation import Errors

_PATHS = {
    "fused": "fused kernels",
    "partly fused": "partly fused: {}",
    "operator": "original forward: {}; the operator was judged too, on the same weights",
    "original forward": "original forward: {}",
}


@dataclass(frozen=True)
class LayerNumerics:
    """One fused MLP on the model's own activations; the worst of the judged calls.

    `path` says what was judged: `"fused"` kernels; `"partly fused"`, if projections are called; `"operator"`, if the
    device has no kernels, so that the model ran the original forward, and the operator was judged separately;
    `"original forward"`, if the kernels did not run for another reason, so that nothing fused was judged. `remark`
    says why it is not the first.

    Errors are relative to the RMS of each token's output. `tokens` is the number of tokens of the judged call.
    `oracle` is `"float64"`, or `"float32"` with the reason. `failure` says what the rule found; None if the layer
    passes.
    """

    name: str
    class_name: str
    path: str
    remark: str | None
    tokens: int
    oracle: str
    original: Errors | None
    fused: Errors | None
    failure: str | None


@dataclass(frozen=True)
class LogitsNumerics:
    """The logits of one forward, fused against the reference's; KL(reference || fused) in nats per token.

    `top1_agreement` is the share of tokens with the same most likely next token. `finite` is true if every logit that
    is finite in the reference is finite. The perplexities are None unless the model predicts the next token.
    """

    tokens: int
    kl_mean: float
    kl_max: float
    top1_agreement: float
    largest_difference: float
    finite: bool
    perplexity: float | None
    reference_perplexity: float | None


@dataclass(frozen=True)
class Divergence:
    """A greedy answer of `tokens` tokens to the prompt that begins at token `start` of the text.

    `first_difference` is the first generated token that differs from the reference's. `margin` says by how much the
    reference's logit of its own choice exceeds the next best there. Both are None if the answers agree.
    """

    start: int
    tokens: int
    first_difference: int | None
    margin: float | None


@dataclass(frozen=True)
class NumericsReport:
    """The figures of `validate`; `print` it for the verdict and what led to it.

    `reference` says what the fused layers were compared with. `unfused` are the MLPs of the model that are not fused,
    `unreached` are the names of fused MLPs that the inputs did not reach.
    """

    reference: str
    device: str
    dtype: str
    layers: tuple[LayerNumerics, ...]
    unfused: tuple[ModuleStatus, ...]
    unreached: tuple[str, ...]
    logits: LogitsNumerics | None
    greedy: tuple[Divergence, ...]

    @property
    def passed(self) -> bool:
        """Whether fused MLPs ran, and each of them passes the rule, and no logit became infinite or NaN."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """One line each, layers by name."""
        lines = [f"{layer.name} ({layer.class_name}): {layer.failure}" for layer in self.layers if layer.failure]
        if not any(layer.path != "original forward" for layer in self.layers):
            remarks = [layer.remark for layer in self.layers]
            remarks += [mlp.reason or f"{mlp.name} is not fused; call fuse_model first" for mlp in self.unfused]
            lines.append(": ".join(("no fused MLP ran, so nothing was validated", *remarks[:1])))
        if self.logits is not None and not self.logits.finite:
            lines.append("logits that are finite in the reference are not in the fused model")
        return tuple(lines)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Findings that do not fail a model, but deserve a look."""
        lines = [f"{name} is fused, but the inputs did not reach it" for name in self.unreached]
        for answer in self.greedy:
            if answer.margin is not None and answer.margin > 2 * self.logits.largest_difference:
                lines.append(
                    f"the greedy answer from token {answer.start} on differs at its token {answer.first_difference}, "
                    f"and that is no near tie: the reference's margin there is {answer.margin:.3g}, and on the text "
                    f"logits differ by {self.logits.largest_difference:.3g} at most"
                )
        return tuple(lines)

    def to_dict(self) -> dict:
        """Plain types, for JSON."""
        verdict = {"passed": self.passed, "failures": list(self.failures), "warnings": list(self.warnings)}
        return verdict | asdict(self)

    def __str__(self) -> str:
        return "\n  ".join((self.verdict(), *self.failures, *self.warnings, *self.summary()))

    def grouped(self) -> dict[tuple[str, str, str | None], list[LayerNumerics]]:
        """The layers that share a class name, path and remark, in the order of the model."""
        groups: dict[tuple[str, str, str | None], list[LayerNumerics]] = {}
        for layer in self.layers:
            groups.setdefault((layer.class_name, layer.path, layer.remark), []).append(layer)
        return groups

    def verdict(self) -> str:
        """The first line: passed or failed, and how many layers passed."""
        good = sum(layer.failure is None for layer in self.layers)
        verdict = "passed" if self.passed else "FAILED"
        return f"{verdict}: {good} of {len(self.layers)} fused MLPs are within tolerance of {self.reference}"

    def summary(self) -> list[str]:
        """What ran, and the whole model's figures, one line each. These are information, not part of the verdict."""
        lines = []
        for (class_name, path, remark), layers in self.grouped().items():
            worst = max(layers, key=severity)
            lines.append(f"{len(layers)} x {class_name}: {_PATHS[path].format(remark)}")
            if worst.fused is not None:
                error = f"relative RMS error against {worst.oracle} {worst.fused.relative_rms:.1e}"
                lines.append(f"the worst of them, {worst.name}: {error}, original {worst.original.relative_rms:.1e}")
        for (class_name, state, reason), count in grouped(self.unfused).items():
            lines.append(f"not fused: {count} x {class_name} ({reason or state})")
        if (logits := self.logits) is not None:
            lines.append(
                f"logits of {logits.tokens} tokens: KL {logits.kl_mean:.1e} nats on average, {logits.kl_max:.1e} at "
                f"most; top-1 agreement {logits.top1_agreement:.2%}; largest difference "
                f"{logits.largest_difference:.3g}"
            )
            if logits.perplexity is not None:
                lines.append(f"perplexity {logits.perplexity:.5g}, reference {logits.reference_perplexity:.5g}")
        if self.greedy:
            differing = [answer for answer in self.greedy if answer.first_difference is not None]
            same, length = len(self.greedy) - len(differing), self.greedy[0].tokens
            lines.append(f"greedy: {same} of {len(self.greedy)} answers of {length} tokens are the same")
            for answer in differing:
                where = f"from token {answer.start} on, the answer differs at its token {answer.first_difference}"
                lines.append(f"greedy: {where}, where the reference's margin is {answer.margin:.3g}")
        return lines


def severity(layer: LayerNumerics) -> tuple[bool, float]:
    """Orders layers, and calls of one layer, from harmless to bad."""
    return layer.failure is not None, math.inf if layer.fused is None else layer.fused.relative_rms
