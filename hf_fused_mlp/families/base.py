"""What every family answers."""

from collections.abc import Hashable
from typing import Protocol

from torch import nn

from hf_fused_mlp.report import Finding
from hf_fused_mlp.swap import Fused
from hf_fused_mlp.types import GPU, ExpertsKey, ProblemKey


class Family(Protocol):
    """A kind of module that can be fused.

    `name` is the family's in a report, `noun` what messages call one of its modules, `option` the field of
    `FusionOptions` and the parameter of `fuse_model` that turn it on (None: always on), `none_found` what `strict`
    says if a model has none.

    `mixin` is the base of the family's fused forms. It defines `forward` and `runs`; in a family that is always on
    also `call_inputs` and `by_operator`, by which `validate` judges it; where weights are packed `_pack`, `_unpack`
    and `why_not_packed`. A call that is unusual in any way runs `original_class.forward`.
    """

    name: str
    noun: str
    option: str | None
    none_found: str
    mixin: type[Fused]

    def examine(self, module: nn.Module) -> Finding | None:
        """What the family says about `module`; None if it is not one of its own.

        Asked once, of every module that is not fused: `fuse.py` answers for those.
        """

    def resembles(self, name: str, module: nn.Module, holds_known: bool) -> str | None:
        """Why an unknown module belongs in a report, or None. Never decides what is fused.

        `holds_known` says that a module inside is the family's, or that of a family that is always on.
        """

    def mixin_for(self, spec: Hashable, batch_invariant: bool) -> type[Fused]:
        """The class that makes the fused form of a module that computes `spec`.

        With `batch_invariant` one whose sums do not depend on the token count, unless `why_variant` says why not.
        """

    def why_variant(self, module: nn.Module, spec: Hashable) -> str | None:
        """Why the sums of a fused `module` would depend on the token count in any form, or None."""

    def problem(self, module: nn.Module, spec: Hashable, m: int, gpu: GPU) -> ProblemKey | ExpertsKey | None:
        """The problem that `m` tokens make, weights on meta included; None if it has no plan."""
