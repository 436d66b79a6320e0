"""The options that `fuse_model` and the `use_fused_mlp` argument share."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any


class FusionError(ValueError):
    """The options of `fuse_model` or `use_fused_mlp` cannot be fulfilled for this model; the message says why."""


@dataclass(frozen=True)
class FusionOptions:
    """What to fuse: the options of `fuse_model`, which documents them.

    Raises:
        TypeError: `exclude` is not a list of names, or another option is neither True nor False.
    """

    strict: bool = False
    exclude: Iterable[str] = ()
    norms: bool = False
    fp8_linears: bool = False
    tune: bool = False
    batch_invariant: bool = False

    def __post_init__(self):
        if isinstance(self.exclude, str):
            raise TypeError(
                f"exclude={self.exclude!r} is a string; pass a list of module names: exclude=[{self.exclude!r}]"
            )
        names = tuple(self.exclude) if isinstance(self.exclude, Iterable) else (None,)
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"exclude={self.exclude!r}: expected a list of module names")
        object.__setattr__(self, "exclude", names)
        for option in fields(self):
            if option.type is bool and not isinstance(value := getattr(self, option.name), bool):
                raise TypeError(f"{option.name}={value!r}: expected True or False")

    @staticmethod
    def of_flag(name: str, flag: Any) -> "FusionOptions | None":
        """Parses a flag such as `use_fused_mlp=...` into options; None means that nothing is fused.

        Raises:
            FusionError: the flag is not True, False, None, `"strict"` or a dict, or the dict has an unknown key.
            TypeError: the value of an option has a wrong type.
        """
        # identity, not equality: 1 and 0 are not valid values
        if flag is False or flag is None:
            return None
        if flag is True:
            return FusionOptions()
        if isinstance(flag, str) and flag == "strict":
            return FusionOptions(strict=True)
        known = [field.name for field in fields(FusionOptions)]
        if not isinstance(flag, dict):
            raise FusionError(f'{name}={flag!r}: expected True, False, "strict" or a dict of {", ".join(known)}')
        if unknown := [key for key in flag if key not in known]:
            raise FusionError(f"{name}: unknown option {unknown[0]!r}; the options are {', '.join(known)}")
        return FusionOptions(**flag)
