"""Fuses a model in place, undoes it, and reports what is fused. Asks each family once about each module."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, TypeVar

from torch import nn

from hf_fused_mlp.calls import device_of, dtype_of, why_adapted
from hf_fused_mlp.families import FAMILIES, Family
from hf_fused_mlp.logs import logger
from hf_fused_mlp.modes import no_kernels
from hf_fused_mlp.options import FusionError, FusionOptions
from hf_fused_mlp.report import FamilyReport, Finding, FusionReport, ModuleStatus
from hf_fused_mlp.swap import Fused, fuse, unfuse_module, was_changed
from hf_fused_mlp.threads import LOCK
from hf_fused_mlp.tune import tune_model

M = TypeVar("M", bound=nn.Module)


def fuse_model(
    model: M,
    strict: bool = False,
    exclude: Iterable[str] = (),
    norms: bool = False,
    fp8_linears: bool = False,
    tune: bool = False,
    batch_invariant: bool = False,
) -> M:
    """Fuses every recognised MLP in place and logs which were skipped and why.

    Parameter names, `state_dict`, `save_pretrained` and `generate` behave as before. Fusing again fuses what is not
    fused yet, and packs again what has lost its packing.

    Args:
        model: any module; MLPs are searched inside it. A module that several layers share is fused once.
        strict: raise if an MLP that is not excluded would stay unfused, or if there is none to fuse.
        exclude: names of MLPs to skip, as in `fusion_report(model).mlps`; `*` matches anything, dots included.
        norms: fuse RMSNorms too, each into one launch in eager mode without gradients. Compiled code runs the
            original, so leave norms out there. `strict` and `exclude` then apply to the report's `norms` as well.
        fp8_linears: also fuse the projections of an FP8 checkpoint outside of its MLPs, so that it runs without
            kernels from the Hub. `strict` and `exclude` then apply to the report's `fp8_linears` as well.
        tune: find the fastest kernels for the model's dense MLPs on its GPU, unless `hf-fused-mlp tune` or this
            package has a plan for them. This takes seconds. The user's cache keeps the result, so the next load
            measures nothing.
        batch_invariant: run kernels whose sums do not depend on the number of tokens, so that a token's output has the
            same bits alone or among others. For float16 and bfloat16 in inference; slower, see docs/numerics.md.
            MLPs without such kernels, and routed experts, are not fused then.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not an `nn.Module`, or `exclude` is a string.
        FusionError: an `exclude` that matches nothing; with `strict`, an MLP that cannot be fused, or none at all. The
            model is unchanged.
    """
    return fuse_with(model, FusionOptions(strict, exclude, norms, fp8_linears, tune, batch_invariant))


def fuse_with(model: M, options: FusionOptions) -> M:
    """`fuse_model` with its options as one value."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_model: {type(model).__name__} is not an nn.Module; pass the model itself")
    wanted = [family for family in FAMILIES if family.option is None or getattr(options, family.option)]
    with LOCK:
        found = _as_asked(examine(model), options)
        report = _selected(_report(found), wanted, options)
        if options.strict:
            _require_fusable(found, report, wanted)
        names = {status.name for group in report.families for status in group.select("fusable")}
        _fuse_all([entry for entry in found if entry.name in names], options)
        names = {status.name for group in report.families for status in group.select("skipped")}
        for entry in found:
            if entry.name in names and isinstance(entry.module, Fused):  # an earlier call asked for less
                unfuse_module(entry.module)
        for module in model.modules():
            if isinstance(module, Fused):
                module.repack()
        report = _report(_as_asked(examine(model), options))
    _log(_selected(report, wanted, options), options)
    if options.strict:
        fused = [module for module in model.modules() if isinstance(module, Fused)]
        reasons = {no_kernels(device_of(module), dtype_of(module)) or "" for module in fused}
        if reasons and "" not in reasons:
            _warn_of_no_kernels(", ".join(sorted(reasons)))
    if options.tune:
        tune_model(model)
    return model


def unfuse_model(model: M) -> M:
    """Undoes `fuse_model` in place, bit for bit; moves only weights that fusing moved. Returns `model`.

    Raises:
        FusionError: the class of a fused module was changed after fusing; the model is unchanged.
    """
    with LOCK:
        fused = {name: module for name, module in model.named_modules() if isinstance(module, Fused)}
        for name, module in fused.items():
            if was_changed(module):
                raise FusionError(
                    f"unfuse_model: {name or 'the model'} has become a {type(module).__name__} since it was fused, by "
                    "FSDP or a parametrization, for example; undo that first"
                )
        for module in fused.values():
            unfuse_module(module)
    return model


def fusion_report(model: nn.Module) -> FusionReport:
    """Reports every MLP and RMSNorm of `model`, fused or not, with reasons, from its present state."""
    return _report(examine(model))


@dataclass(frozen=True)
class Examined:
    """A module of a model, its family, and what the family found."""

    name: str
    module: nn.Module
    family: Family
    finding: Finding


def examine(model: nn.Module) -> list[Examined]:
    """The modules of `model` that a family recognises, and unknown ones that resemble these, in the model's order."""
    with LOCK:
        return _examine(dict(model.named_modules()))


def _examine(modules: dict[str, nn.Module]) -> list[Examined]:
    found: dict[str, Examined] = {}
    for name, module in modules.items():
        for family in FAMILIES:
            if (finding := _finding(family, name, modules)) is not None:
                found[name] = Examined(name, module, family, finding)
                break
    for family in FAMILIES:
        known = {id(entry.module) for entry in found.values() if entry.family is family or entry.family.option is None}
        for name, module in modules.items():
            # a part of a listed module is not listed
            if name in found or any(entry.family is family for entry in _around(name, found)):
                continue
            holds_known = any(id(inner) in known for inner in module.modules())
            if (reason := family.resembles(name, module, holds_known)) is not None:
                found[name] = Examined(name, module, family, Finding("skipped", reason))
    return [found[name] for name in modules if name in found]


def _finding(family: Family, name: str, modules: dict[str, nn.Module]) -> Finding | None:
    module = modules[name]
    if not isinstance(module, Fused):
        return family.examine(module)
    if not isinstance(module, family.mixin):
        return None
    return Finding("fused", why_adapted(name, modules) or _remark(module))


def _remark(module: Fused) -> str | None:
    """Why the next call of a fused module will not run the fastest kernels only, or None."""
    original, called = module.runs()
    if original:
        return original
    if called is None:
        return None if (reason := module.why_not_packed()) is None else f"not packed: {reason}"
    return f"calls some projections, and fuses the rest: {called}"


def _around(name: str, found: dict[str, Examined]) -> list[Examined]:
    """The listed modules that contain the module `name`."""
    parts = name.split(".")
    return [found[path] for end in range(len(parts)) if (path := ".".join(parts[:end])) in found]


def _report(found: list[Examined]) -> FusionReport:
    return FusionReport(
        tuple(
            FamilyReport(
                family.name,
                family.noun,
                tuple(
                    ModuleStatus(entry.name, type(entry.module).__name__, entry.finding.state, entry.finding.reason)
                    for entry in found
                    if entry.family is family
                ),
                optional=family.option is not None,
            )
            for family in FAMILIES
        )
    )


def _matches(module: ModuleStatus, pattern: str) -> bool:
    return module.name == pattern or fnmatchcase(module.name, pattern)


def _selected(report: FusionReport, wanted: list[Family], options: FusionOptions) -> FusionReport:
    """The part of a report that the options select: the requested families, without excluded modules.

    Raises:
        FusionError: an excluded name matches nothing.
    """
    groups = [report.of(family.name) for family in wanted]
    for pattern in options.exclude:
        if not any(_matches(module, pattern) for group in groups for module in group.modules):
            for family in FAMILIES:
                if any(_matches(module, pattern) for module in report.of(family.name).modules):
                    what = f"{family.noun}s, which are fused with {family.option}=True only"
                    raise FusionError(f"exclude: {pattern!r} matches {what}; pass that too, or leave out the name")
            held = [group for group in groups if group.modules] or groups[:1]
            what = " or ".join(group.noun for group in held)
            names = ", ".join(module.name for group in held for module in group.modules[:3]) or "none"
            raise FusionError(f"exclude: {pattern!r} matches no {what} of this model; its {what}s are {names}, ...")

    def kept(group: FamilyReport) -> FamilyReport:
        excluded = options.exclude
        modules = (module for module in group.modules if not any(_matches(module, pattern) for pattern in excluded))
        return replace(group, modules=tuple(modules))

    return FusionReport(tuple(map(kept, groups)))


def _require_fusable(found: list[Examined], report: FusionReport, wanted: list[Family]) -> None:
    """Raises FusionError if the model has nothing to fuse, or if a selected module cannot be fused."""
    families = [entry.family for entry in found]
    default = [family for family in wanted if family.option is None]
    if not any(family in families for family in default):
        others = Counter(entry.family for entry in found if entry.finding.state == "fusable")
        hints = (f"; without strict, {f.option}=True fuses its {count} {f.noun}s" for f, count in others.items())
        raise FusionError(default[0].none_found + "".join(hints))
    for family in wanted:
        if family.option is not None and family not in families:
            raise FusionError(family.none_found)
    for group in report.families:
        if skipped := group.select("skipped"):
            listed = "\n".join(f"  {module.name} ({module.class_name}): {module.reason}" for module in skipped[:5])
            more = f"\n  and {len(skipped) - 5} more" if len(skipped) > 5 else ""
            nouns = f"{group.noun}s"
            raise FusionError(
                f"strict: {len(skipped)} of {len(group.modules)} {nouns} cannot be fused; nothing was changed\n"
                f"{listed}{more}"
            )


def _as_asked(found: list[Examined], options: FusionOptions) -> list[Examined]:
    """`found`, adapted to `batch_invariant`.

    Modules without such kernels are skipped, and modules that are fused in another form count as fusable.
    """
    if not options.batch_invariant:
        return found

    def asked(entry: Examined) -> Examined:
        spec = entry.module.fused_spec if isinstance(entry.module, Fused) else entry.finding.spec
        if spec is None or entry.finding.state == "skipped":
            return entry
        if reason := entry.family.why_variant(entry.module, spec):
            return replace(entry, finding=Finding("skipped", f"batch_invariant: {reason}", spec))
        is_so = isinstance(entry.module, entry.family.mixin_for(spec, batch_invariant=True))
        return entry if is_so else replace(entry, finding=Finding("fusable", spec=spec))

    return [asked(entry) for entry in found]


def _fuse_all(entries: list[Examined], options: FusionOptions) -> None:
    """Fuses all modules or, if one fails, none: each has the form again that it had."""
    before: list[tuple[nn.Module, tuple | None]] = []
    try:
        for entry in entries:
            module: Any = entry.module
            before.append((module, module.fused_recipe() if isinstance(module, Fused) else None))
            if isinstance(module, Fused):  # in another form
                unfuse_module(module)
            fuse(module, entry.family.mixin_for(entry.finding.spec, options.batch_invariant), entry.finding.spec)
    except BaseException:
        for module, recipe in before:
            if isinstance(module, Fused):
                unfuse_module(module)
            if recipe is not None:
                fuse(module, *recipe)
        raise


def _log(report: FusionReport, options: FusionOptions) -> None:
    """Logs one line, or the whole report as a warning if something was not fused.

    Nothing is logged if everything was excluded, or if the model has no module of an optional family."""
    groups = [group for group in report.shown if group.modules or not options.exclude]
    complete = all((group.modules or group.optional) and not group.select("skipped") for group in groups)
    if not complete:
        logger.warning("\n".join(map(str, groups)))
    elif groups:
        counts = (f"{len(group.select('fused'))} of {len(group.modules)} {group.noun}s" for group in groups)
        logger.info("fused %s", ", ".join(counts))


@cache
def _warn_of_no_kernels(reason: str) -> None:
    """Logs a warning once: `strict` checks what can be fused, not whether this device has kernels."""
    logger.warning("strict: fused, but no kernel runs: %s", reason)
