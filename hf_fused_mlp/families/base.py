"""The interface of a family."""

from collections.abc import Hashable
from typing import Protocol

from torch import nn

from hf_fused_mlp.report import Finding
from hf_fused_mlp.swap import Fused
from hf_fused_mlp.types import GPU, ExpertsKey, ProblemKey


class Family(Protocol):
    """A kind of module that can be fused.

    `name` is the family's name in a report. `noun` is the word for one of its modules in messages. `option` is the
    field of `FusionOptions` and the parameter of `fuse_model` that turn it on (None: always on). `none_found` is the
    message of `strict` for a model without such modules.

    `mixin` is the base of the family's fused forms. It defines `forward` and `runs`. In a family that is always on it
    also defines `call_inputs` and `by_operator`, which `validate` uses, and if weights are packed `_pack`, `_unpack`
    and `why_not_packed`. A call that is unusual in any way runs `original_class.forward`.
    """

    name: str
    noun: str
    option: str | None
    none_found: str
    mixin: type[Fused]

    def examine(self, module: nn.Module) -> Finding | None:
        """What the family finds about `module`; None if it does not belong to the family.

        Called once for every module that is not fused; `fuse.py` handles fused ones.
        """

    def resembles(self, name: str, module: nn.Module, holds_known: bool) -> str | None:
        """Why an unknown module is listed in a report, or None. Never decides what is fused.

        `holds_known` is true if a module inside belongs to this family, or to one that is always on.
        """

    def mixin_for(self, spec: Hashable, batch_invariant: bool) -> type[Fused]:
        """The class that makes the fused form of a module that computes `spec`.

        With `batch_invariant`, one whose sums do not depend on the token count, unless `why_variant` gives a reason.
        """

    def why_variant(self, module: nn.Module, spec: Hashable) -> str | None:
        """Why the sums of a fused `module` would depend on the token count in any form, or None."""

    def problem(self, module: nn.Module, spec: Hashable, m: int, gpu: GPU) -> ProblemKey | ExpertsKey | None:
        """The problem for `m` tokens, also with weights on meta; None if it has no plan."""
