"""Reports about a model's modules. `fuse` makes these values from what the families find."""

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["fused", "fusable", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What a family found about one module in its present state.

    Args:
        reason: of a skipped module, why, and the remedy; of a fused one, what will run in place of our kernels, or
            None.
        spec: what the module computes; None if only its name resembles an MLP's.
    """

    state: State
    reason: str | None = None
    spec: Hashable = None

    @staticmethod
    def of(reason: str | None, spec: Hashable) -> "Finding":
        """The finding for a module that computes `spec`; with a `reason`, it cannot be fused."""
        return Finding("skipped" if reason else "fusable", reason, spec)


@dataclass(frozen=True)
class ModuleStatus:
    """One module of a model, such as an MLP or a norm.

    `state` is `"fused"`, `"fusable"` or `"skipped"`. `reason` says why it is skipped or, for a fused module, why its
    next call will run the original forward or a part of it.
    """

    name: str
    class_name: str
    state: State
    reason: str | None = None


def grouped(modules: Iterable[ModuleStatus]) -> dict[tuple[str, State, str | None], int]:
    """The number of modules with each class name, state and reason, in the order of the model."""
    return dict(Counter((module.class_name, module.state, module.reason) for module in modules))


@dataclass(frozen=True)
class FamilyReport:
    """The modules of one family, in the order of the model.

    `family` is the name of a row of `FAMILIES`, such as `"mlps"`; `noun` is the word for a module in messages;
    `optional` is true for families that are fused on request.
    """

    family: str
    noun: str
    modules: tuple[ModuleStatus, ...]
    optional: bool = False

    def select(self, state: State) -> tuple[ModuleStatus, ...]:
        """The modules that are in this state."""
        return tuple(module for module in self.modules if module.state == state)

    def __str__(self) -> str:
        lines = [f"{len(self.select('fused'))} of {len(self.modules)} {self.noun}s are fused"]
        for (class_name, state, reason), count in grouped(self.modules).items():
            lines.append(f"  {count} x {class_name}: {state}" + (f" ({reason})" if reason else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class FusionReport:
    """Every module of a model that a family knows, as it is now. `print` shows one line per class and reason."""

    families: tuple[FamilyReport, ...]

    def of(self, family: str) -> FamilyReport:
        """The report of one family.

        Raises:
            KeyError: no family has that name; the message lists the known ones.
        """
        for report in self.families:
            if report.family == family:
                return report
        raise KeyError(
            f"no family {family!r}; the families are {', '.join(report.family for report in self.families)}"
        )

    @property
    def mlps(self) -> tuple[ModuleStatus, ...]:
        """The MLPs."""
        return self.of("mlps").modules

    @property
    def experts(self) -> tuple[ModuleStatus, ...]:
        """Every module of routed experts."""
        return self.of("experts").modules

    @property
    def norms(self) -> tuple[ModuleStatus, ...]:
        """The RMSNorms."""
        return self.of("norms").modules

    @property
    def fp8_linears(self) -> tuple[ModuleStatus, ...]:
        """The projections of an FP8 checkpoint, those of MLPs included."""
        return self.of("fp8_linears").modules

    @property
    def shown(self) -> tuple[FamilyReport, ...]:
        """The families to show. An empty default family is left out, unless it is the first and all are empty."""
        empty = [report for report in self.families if not report.optional and not report.modules]
        needless = empty if self.default else empty[1:]
        return tuple(report for report in self.families if report not in needless)

    @property
    def default(self) -> tuple[ModuleStatus, ...]:
        """The modules of all families that are fused by default."""
        return tuple(module for report in self.families if not report.optional for module in report.modules)

    def select(self, state: State) -> tuple[ModuleStatus, ...]:
        """The modules of `default` that are in this state."""
        return tuple(module for module in self.default if module.state == state)

    def grouped(self) -> dict[tuple[str, State, str | None], int]:
        """The number of modules of `default` with each class name, state and reason."""
        return grouped(self.default)

    def to_dict(self) -> dict:
        """Plain types, for JSON: a list for each family; `fused` and `total` count the modules of `default`."""
        counts = {"fused": len(self.select("fused")), "total": len(self.default)}
        return counts | {report.family: [asdict(module) for module in report.modules] for report in self.families}

    def __str__(self) -> str:
        """Optional families are included once one of their modules is fused."""
        return "\n".join(str(report) for report in self.shown if not report.optional or report.select("fused"))
