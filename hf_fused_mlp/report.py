"""What is known of a model's modules: values only, made by `fuse` from what the families find."""

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["fused", "fusable", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What a family says about one module as it stands now.

    Args:
        reason: skipped: why, and the remedy. Fused: what will run in place of our kernels, if anything will.
        spec: what the module computes; None if it is listed only because of its name.
    """

    state: State
    reason: str | None = None
    spec: Hashable = None

    @staticmethod
    def of(reason: str | None, spec: Hashable) -> "Finding":
        """Of a module that can be fused as `spec` says unless there is a `reason`."""
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
    """How many modules share a class name, state and reason, in the order of the model."""
    return dict(Counter((module.class_name, module.state, module.reason) for module in modules))


@dataclass(frozen=True)
class FamilyReport:
    """The modules of one family, in the order of the model.

    `family` is the name of a row of `FAMILIES`, such as `"mlps"`, `noun` what messages call a module, `optional` says
    that fusing is on request.
    """

    family: str
    noun: str
    modules: tuple[ModuleStatus, ...]
    optional: bool = False

    def select(self, state: State) -> tuple[ModuleStatus, ...]:
        """The modules in one state."""
        return tuple(module for module in self.modules if module.state == state)

    def __str__(self) -> str:
        lines = [f"{len(self.select('fused'))} of {len(self.modules)} {self.noun}s are fused"]
        for (class_name, state, reason), count in grouped(self.modules).items():
            lines.append(f"  {count} x {class_name}: {state}" + (f" ({reason})" if reason else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class FusionReport:
    """Every module of a model that a family knows, as it stands now. `print` it for a line a class and reason."""

    families: tuple[FamilyReport, ...]

    def of(self, family: str) -> FamilyReport:
        """The report of one family.

        Raises:
            KeyError: no family has that name; the message lists those that there are.
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
        """The families worth a line: without a default one that has no modules where another has, or comes first."""
        empty = [report for report in self.families if not report.optional and not report.modules]
        needless = empty if self.default else empty[1:]
        return tuple(report for report in self.families if report not in needless)

    @property
    def default(self) -> tuple[ModuleStatus, ...]:
        """The modules of all families that are fused without being asked for."""
        return tuple(module for report in self.families if not report.optional for module in report.modules)

    def select(self, state: State) -> tuple[ModuleStatus, ...]:
        """The modules of `default` in one state."""
        return tuple(module for module in self.default if module.state == state)

    def grouped(self) -> dict[tuple[str, State, str | None], int]:
        """How many modules of `default` share a class name, state and reason."""
        return grouped(self.default)

    def to_dict(self) -> dict:
        """Plain types, for JSON: a list for each family; `fused` and `total` count the modules of `default`."""
        counts = {"fused": len(self.select("fused")), "total": len(self.default)}
        return counts | {report.family: [asdict(module) for module in report.modules] for report in self.families}

    def __str__(self) -> str:
        """Optional families are included once one of their modules is fused."""
        return "\n".join(str(report) for report in self.shown if not report.optional or report.select("fused"))
