"""Fusing a model in place, undoing it, and saying what was done."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from hf_fused_mlp.modules import FusedMLP, fuse_module, unfuse_module
from hf_fused_mlp.registry import find_spec, looks_like_mlp, reject_reason, row_of

logger = logging.getLogger("hf_fused_mlp")

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class MLPStatus:
    """One MLP of a model.

    `state` is `"fused"`, `"fusable"` or `"skipped"`; `reason` says why it is skipped or, where it is fused, why its
    next call will run the original forward, or a part of it, all the same.
    """

    name: str
    class_name: str
    state: str
    reason: str | None = None


@dataclass(frozen=True)
class FusionReport:
    """Every MLP of a model as it stands now. `print` it for a line a class and reason."""

    mlps: tuple[MLPStatus, ...]

    def select(self, state: str) -> tuple[MLPStatus, ...]:
        """The MLPs that are `"fused"`, `"fusable"` or `"skipped"`."""
        return tuple(mlp for mlp in self.mlps if mlp.state == state)

    def grouped(self) -> dict[tuple[str, str, str | None], int]:
        """How many MLPs share a class name, state and reason, in the order of the model."""
        return dict(Counter((mlp.class_name, mlp.state, mlp.reason) for mlp in self.mlps))

    def to_dict(self) -> dict:
        """Plain types, for JSON."""
        return {
            "fused": len(self.select("fused")),
            "total": len(self.mlps),
            "mlps": [asdict(mlp) for mlp in self.mlps],
        }

    def __str__(self) -> str:
        lines = [f"{len(self.select('fused'))} of {len(self.mlps)} MLPs are fused"]
        for (class_name, state, reason), count in self.grouped().items():
            lines.append(f"  {count} x {class_name}: {state}" + (f" ({reason})" if reason else ""))
        return "\n".join(lines)


def fuse_model(model: M, strict: bool = False, exclude: Iterable[str] = ()) -> M:
    """Gives every MLP that is known for one a forward of fused kernels, in place, and logs what was skipped and why.

    Parameter names, `state_dict`, `save_pretrained` and `generate` stay as they were. Fusing again fuses what is not
    fused yet, and packs again what has lost its packing.

    Args:
        model: any module; the MLPs are found inside it. A module that several layers share is fused once.
        strict: raise if any MLP that is not excluded would stay unfused, or if there is none to fuse.
        exclude: names of MLPs to leave alone, as in `fusion_report(model).mlps`; `*` matches anything, dots included.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not an `nn.Module`, or `exclude` is a string.
        ValueError: an `exclude` that matches no MLP; with `strict`, an MLP that cannot be fused, or none at all. The
            model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_model: {type(model).__name__} is not an nn.Module; pass the model itself")
    if isinstance(exclude, str):
        raise TypeError(f"exclude={exclude!r} is a string; pass a list of module names: exclude=[{exclude!r}]")

    exclude = tuple(exclude)
    report = _without_excluded(fusion_report(model), exclude)
    if strict:
        _require_fusable(report)
    _fuse_all(model, [mlp.name for mlp in report.select("fusable")])
    for module in model.modules():
        if isinstance(module, FusedMLP):
            module.repack()

    _log(_without_excluded(fusion_report(model), exclude))
    return model


def unfuse_model(model: M) -> M:
    """Undoes `fuse_model` in place, bit for bit; every parameter owns its memory again. Returns `model`."""
    for module in model.modules():
        if isinstance(module, FusedMLP):
            unfuse_module(module)
    return model


def fusion_report(model: nn.Module) -> FusionReport:
    """Every MLP of `model`, fused or not, with reasons, as the modules stand now; nothing is stored."""
    mlps: list[MLPStatus] = []
    for name, module in model.named_modules():
        class_name = type(module).__name__
        if isinstance(module, FusedMLP):
            mlps.append(MLPStatus(name, module.original_class.__name__, "fused", _why_not_all(module)))
        elif spec := find_spec(module):
            reason = reject_reason(module, type(module), spec)
            mlps.append(MLPStatus(name, class_name, "skipped" if reason else "fusable", reason))
        elif looks_like_mlp(name, module) and not any(name.startswith(f"{mlp.name}.") for mlp in mlps):
            mlps.append(MLPStatus(name, class_name, "skipped", _unknown_reason(module)))
    return FusionReport(tuple(mlps))


def _why_not_all(module: FusedMLP) -> str | None:
    bypassed, called = module.reasons()
    if bypassed or called is None:
        return bypassed
    return f"calls what has to be called, and fuses the rest: {called}"


def _unknown_reason(module: nn.Module) -> str:
    if experts := _routed_experts(module):
        return f"routed experts, whose weights are one tensor ({experts}), are not covered and run as they are"
    cls = type(module)
    known = next((base.__name__ for base in cls.__mro__[1:] if row_of(base)), None)
    what = f", a subclass of {known}," if known else ""
    return (
        f"{cls.__name__}{what} does something in its forward that is not in the equation of a gated or plain MLP, as "
        f"far as it can be read; if it computes one anyway, call register_mlp({cls.__name__}, MLPSpec(...)) first"
    )


def _routed_experts(module: nn.Module) -> str | None:
    """The first tensor in `module` that is a stack of matrices; a convolution's weight and a vector are none."""
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(path, recurse=False):
            if parameter.dim() == 3 and 1 not in parameter.shape[1:] and not isinstance(owner, nn.Conv1d):
                return f"{name} {list(parameter.shape)}"
    return None


def _without_excluded(report: FusionReport, patterns: tuple[str, ...]) -> FusionReport:
    for pattern in patterns:
        if not any(fnmatchcase(mlp.name, pattern) for mlp in report.mlps):
            names = ", ".join(mlp.name for mlp in report.mlps[:3]) or "none"
            raise ValueError(f"exclude: {pattern!r} matches no MLP of this model; its MLPs are {names}, ...")
    kept = (mlp for mlp in report.mlps if not any(fnmatchcase(mlp.name, pattern) for pattern in patterns))
    return FusionReport(tuple(kept))


def _require_fusable(report: FusionReport) -> None:
    if skipped := report.select("skipped"):
        listed = "\n".join(f"  {mlp.name} ({mlp.class_name}): {mlp.reason}" for mlp in skipped[:5])
        more = f"\n  and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        raise ValueError(
            f"strict: {len(skipped)} of {len(report.mlps)} MLPs cannot be fused; nothing was changed\n{listed}{more}"
        )
    if not report.mlps:
        raise ValueError("strict: found no MLP to fuse; register_mlp teaches a class that is not known")


def _fuse_all(model: nn.Module, names: list[str]) -> None:
    """Fuses the named modules, all or none."""
    done: list[Any] = []
    try:
        for name in names:
            module = model.get_submodule(name)
            if not isinstance(module, FusedMLP):  # another thread was faster
                fuse_module(module, find_spec(module))  # type: ignore[arg-type]  # fusable, so it has a spec
                done.append(module)
    except BaseException:
        for module in done:
            unfuse_module(module)
        raise


def _log(report: FusionReport) -> None:
    complete = report.mlps and not report.select("skipped")
    logger.log(logging.INFO if complete else logging.WARNING, "%s", report)
