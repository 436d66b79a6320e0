"""Fusing a model in place, undoing it, and saying what was done."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from hf_fused_mlp.children import device_of
from hf_fused_mlp.modules import FusedMLP, fuse_module, mixin_of, no_kernels
from hf_fused_mlp.norms import FusedRMSNorm, find_norm, fuse_norm, looks_like_norm, norm_reject_reason
from hf_fused_mlp.originals import is_patched
from hf_fused_mlp.recognition import is_known, unknown_child
from hf_fused_mlp.registry import (
    find_spec,
    looks_like_mlp,
    registered_spec,
    reject_reason,
    replaced_reason,
    unknown_activation_reason,
)
from hf_fused_mlp.swap import Fused, unfuse_module, was_changed, why_not_swappable
from hf_fused_mlp.threads import LOCK

logger = logging.getLogger("hf_fused_mlp")

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class ModuleStatus:
    """One MLP or norm of a model.

    `state` is `"fused"`, `"fusable"` or `"skipped"`; `reason` says why it is skipped or, where it is fused, why its
    next call will run the original forward, or a part of it, all the same.
    """

    name: str
    class_name: str
    state: str
    reason: str | None = None


@dataclass(frozen=True)
class FusionReport:
    """Every MLP and RMSNorm of a model as it stands now. `print` it for a line a class and reason."""

    mlps: tuple[ModuleStatus, ...]
    norms: tuple[ModuleStatus, ...] = ()

    def select(self, state: str, norms: bool = False) -> tuple[ModuleStatus, ...]:
        """The MLPs, or else the norms, that are `"fused"`, `"fusable"` or `"skipped"`."""
        return _select(self.norms if norms else self.mlps, state)

    def grouped(self) -> dict[tuple[str, str, str | None], int]:
        """How many MLPs share a class name, state and reason, in the order of the model."""
        return _grouped(self.mlps)

    def to_dict(self) -> dict:
        """Plain types, for JSON; `fused` and `total` count MLPs."""
        return {
            "fused": len(self.select("fused")),
            "total": len(self.mlps),
            "mlps": [asdict(mlp) for mlp in self.mlps],
            "norms": [asdict(norm) for norm in self.norms],
        }

    def __str__(self) -> str:
        """Norms are in it once one is fused."""
        return _text("MLPs", self.mlps) + (f"\n{_text('norms', self.norms)}" if _select(self.norms, "fused") else "")


def _select(modules: tuple[ModuleStatus, ...], state: str) -> tuple[ModuleStatus, ...]:
    return tuple(module for module in modules if module.state == state)


def _grouped(modules: tuple[ModuleStatus, ...]) -> dict[tuple[str, str, str | None], int]:
    return dict(Counter((module.class_name, module.state, module.reason) for module in modules))


def _text(what: str, modules: tuple[ModuleStatus, ...]) -> str:
    lines = [f"{len(_select(modules, 'fused'))} of {len(modules)} {what} are fused"]
    for (class_name, state, reason), count in _grouped(modules).items():
        lines.append(f"  {count} x {class_name}: {state}" + (f" ({reason})" if reason else ""))
    return "\n".join(lines)


def fuse_model(model: M, strict: bool = False, exclude: Iterable[str] = (), norms: bool = False) -> M:
    """Gives every MLP that is known for one a forward of fused kernels, in place, and logs what was skipped and why.

    Parameter names, `state_dict`, `save_pretrained` and `generate` stay as they were. Fusing again fuses what is not
    fused yet, and packs again what has lost its packing.

    Args:
        model: any module; the MLPs are found inside it. A module that several layers share is fused once.
        strict: raise if any MLP that is not excluded would stay unfused, or if there is none to fuse.
        exclude: names of MLPs to leave alone, as in `fusion_report(model).mlps`; `*` matches anything, dots included.
        norms: fuse RMSNorms too, each into one launch in eager mode without gradients; compiled code runs the
            original, so leave them out there. `strict` and `exclude` are then about the report's `norms` as well.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not an `nn.Module`, or `exclude` is a string.
        ValueError: an `exclude` that matches nothing; with `strict`, an MLP that cannot be fused, or none at all. The
            model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_model: {type(model).__name__} is not an nn.Module; pass the model itself")
    if isinstance(exclude, str):
        raise TypeError(f"exclude={exclude!r} is a string; pass a list of module names: exclude=[{exclude!r}]")

    exclude = tuple(exclude)
    with LOCK:
        found = fusion_report(model)
        report = _wanted(found, exclude, norms)
        if strict:
            _require_fusable(found, report, norms)
        _fuse_all(model, {status.name for status in _select(report.mlps + report.norms, "fusable")})
        for module in model.modules():
            if isinstance(module, Fused):
                module.repack()
        report = fusion_report(model)

    _log(_wanted(report, exclude, norms), exclude, norms)
    return model


def unfuse_model(model: M) -> M:
    """Undoes `fuse_model` in place, bit for bit; moves only weights that fusing moved. Returns `model`.

    Raises:
        ValueError: a fused module was given another class since; the model is as it was.
    """
    with LOCK:
        fused = {name: module for name, module in model.named_modules() if isinstance(module, Fused)}
        for name, module in fused.items():
            if was_changed(module):
                raise ValueError(
                    f"unfuse_model: {name or 'the model'} has become a {type(module).__name__} since it was fused, by "
                    "FSDP or a parametrization, for example; undo that first"
                )
        for module in fused.values():
            unfuse_module(module)
    return model


def fusion_report(model: nn.Module) -> FusionReport:
    """Every MLP and RMSNorm of `model`, fused or not, with reasons, as they stand now; nothing is stored."""
    mlps: dict[str, ModuleStatus] = {}
    norms: dict[str, ModuleStatus] = {}
    with LOCK:
        modules = dict(model.named_modules())
        for name, module in modules.items():
            class_name = type(module).__name__
            if isinstance(module, FusedMLP):
                mlps[name] = ModuleStatus(name, class_name, "fused", _why_not_all(module))
            elif isinstance(module, FusedRMSNorm):
                reason = module.reason() or no_kernels(device_of(module))
                norms[name] = ModuleStatus(name, class_name, "fused", reason)
            elif spec := find_spec(module):
                reason = why_not_swappable(module, mixin_of(spec), spec) or reject_reason(module, type(module), spec)
                mlps[name] = ModuleStatus(name, class_name, "skipped" if reason else "fusable", reason)
            elif norm := find_norm(module):
                reason = why_not_swappable(module, FusedRMSNorm, norm) or norm_reject_reason(module, norm)
                norms[name] = ModuleStatus(name, class_name, "skipped" if reason else "fusable", reason)
            elif looks_like_norm(module):
                reason = f"{class_name} is not one of the RMSNorms that are known, as far as its forward can be read"
                norms[name] = ModuleStatus(name, class_name, "skipped", reason)
        known = {id(modules[name]) for name in mlps}
        for name, module in modules.items():
            if name in norms or not looks_like_mlp(name, module):
                continue
            # a part of an MLP is none itself; nor is what holds one that is known, such as a wrapper or a sparse block
            parts = name.split(".")
            if any(".".join(parts[:end]) in mlps for end in range(len(parts) + 1)):
                continue
            holds_known = any(id(inner) in known for inner in module.modules())
            if not _only_wraps(module) and (not holds_known or _stacks_matrices(module)):
                mlps[name] = ModuleStatus(name, type(module).__name__, "skipped", _unknown_reason(module))
    order = {name: place for place, name in enumerate(modules)}
    return FusionReport(tuple(sorted(mlps.values(), key=lambda mlp: order[mlp.name])), tuple(norms.values()))


def _only_wraps(module: nn.Module) -> bool:
    """Whether a module has nothing but one other, which will be in the report itself."""
    children = list(module.children())
    return len(children) == 1 and not module._parameters and looks_like_mlp("", children[0])


def _stacks_matrices(module: nn.Module) -> bool:
    """Whether a module itself holds weights of routed experts."""
    return any(parameter is not None and parameter.dim() == 3 for parameter in module._parameters.values())


def _why_not_all(module: FusedMLP) -> str | None:
    bypassed, called = module.reasons()
    if bypassed:
        return bypassed
    if called is None:
        return None if (reason := module.why_not_packed()) is None else f"not packed: {reason}"
    return f"calls what has to be called, and fuses the rest: {called}"


def _unknown_reason(module: nn.Module) -> str:
    if experts := _routed_experts(module):
        return f"routed experts, whose weights are one tensor ({experts}), are not covered and run as they are"
    cls: Any = type(module)
    if is_patched(cls):
        return replaced_reason(cls)
    if name := unknown_child(module):
        return unknown_activation_reason(name, module.get_submodule(name))
    bases = [base for base in cls.__mro__[1:] if getattr(base, "forward", cls.forward) is not cls.forward]
    known = next((base.__name__ for base in bases if registered_spec(base) or is_known(base)), None)
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


def _matches(module: ModuleStatus, pattern: str) -> bool:
    return module.name == pattern or fnmatchcase(module.name, pattern)


def _wanted(report: FusionReport, excluded: tuple[str, ...], norms: bool) -> FusionReport:
    """What of a model is to be fused: not what matches a pattern, and norms only if they are wanted."""
    if not norms:
        report = replace(report, norms=())
    for pattern in excluded:
        if not any(_matches(module, pattern) for module in report.mlps + report.norms):
            what = "MLP or norm" if norms else "MLP"
            names = ", ".join(module.name for module in (*report.mlps[:3], *report.norms[:3])) or "none"
            raise ValueError(f"exclude: {pattern!r} matches no {what} of this model; its {what}s are {names}, ...")

    def kept(modules: tuple[ModuleStatus, ...]) -> tuple[ModuleStatus, ...]:
        return tuple(module for module in modules if not any(_matches(module, pattern) for pattern in excluded))

    return FusionReport(kept(report.mlps), kept(report.norms))


def _require_fusable(found: FusionReport, report: FusionReport, norms: bool) -> None:
    """Raises unless there is something to fuse in what was `found`, and all of it that `report` has can be."""
    if not found.mlps:
        raise ValueError("strict: found no MLP to fuse; register_mlp teaches a class that is not known")
    if norms and not found.norms:
        raise ValueError("strict: found no RMSNorm to fuse; call fuse_model without norms=True")
    for what, modules in (("MLPs", report.mlps), ("norms", report.norms)):
        if skipped := _select(modules, "skipped"):
            listed = "\n".join(f"  {module.name} ({module.class_name}): {module.reason}" for module in skipped[:5])
            more = f"\n  and {len(skipped) - 5} more" if len(skipped) > 5 else ""
            raise ValueError(
                f"strict: {len(skipped)} of {len(modules)} {what} cannot be fused; nothing was changed\n{listed}{more}"
            )


def _fuse_all(model: nn.Module, names: set[str]) -> None:
    """Fuses the named modules, all or none."""
    done: list[Any] = []
    try:
        for name, module in list(model.named_modules()):
            if name in names:
                if spec := find_spec(module):
                    fuse_module(module, spec)
                else:
                    fuse_norm(module, find_norm(module))  # type: ignore[arg-type]  # fusable, so it has a spec
                done.append(module)
    except BaseException:
        for module in done:
            unfuse_module(module)
        raise


def _log(report: FusionReport, excluded: tuple[str, ...], norms: bool) -> None:
    wanted = (("MLPs", report.mlps), ("norms", report.norms)) if norms else (("MLPs", report.mlps),)
    # there may be none since all are excluded
    said = [(what, modules) for what, modules in wanted if modules or not excluded]
    complete = all(modules and not _select(modules, "skipped") for _, modules in said)
    logger.log(logging.INFO if complete else logging.WARNING, "\n".join(_text(*part) for part in said))
