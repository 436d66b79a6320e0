"""The `use_fused_mlp` argument of `from_pretrained` and `from_config`.

Both end in a class method of `PreTrainedModel`: Auto classes, concrete classes, pipelines and remote code come through
them. `install` wraps the two so that they take the argument out before Transformers sees it and fuse what was loaded,
and the method that reads the config of Auto classes before, so that the argument reaches them.

The flag travels in the call and nowhere else. So loads without it, in this thread or another, run as they always did,
and no config ever holds it.
"""

import functools
import logging
import re
from collections.abc import Callable

import transformers
from transformers import AutoConfig, PreTrainedModel

from hf_fused_mlp.fuse import fuse_with
from hf_fused_mlp.options import FusionOptions

logger = logging.getLogger("hf_fused_mlp")

# the newest minor that `make test-newest` has passed with
NEWEST_TESTED = "5.24"
FLAG = "use_fused_mlp"
_originals: dict[tuple[type, str], classmethod] = {}
_wrappers: dict[tuple[type, str], classmethod] = {}


def install() -> None:
    """Teaches the loaders the flag; a second call does nothing."""
    for loader in _LOADERS:
        if loader not in _originals:
            owner, name = loader
            _originals[loader] = owner.__dict__[name]
            _wrappers[loader] = classmethod(_LOADERS[loader](_originals[loader].__func__))
            setattr(owner, name, _wrappers[loader])


def uninstall() -> None:
    """Puts Transformers back as it was; models that were fused stay fused.

    Raises:
        RuntimeError: another library has wrapped the loaders since; they are left as they are.
    """
    for (owner, name), wrapper in _wrappers.items():
        if owner.__dict__[name] is not wrapper:
            other = owner.__dict__[name]
            raise RuntimeError(f"{owner.__name__}.{name} has been wrapped again by {other!r}; undo that first")
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    _originals.clear()
    _wrappers.clear()


def warn_if_untested() -> None:
    """Says so where Transformers is newer than the newest that was tested."""
    here, tested = (re.findall(r"\d+", version)[:2] for version in (transformers.__version__, NEWEST_TESTED))
    if [int(number) for number in here] > [int(number) for number in tested]:
        logger.warning(
            "Transformers %s is newer than %s, the newest that hf_fused_mlp was tested with; look for a newer "
            "hf_fused_mlp, or compare a fused model with its original by `hf-fused-mlp validate`",
            transformers.__version__,
            NEWEST_TESTED,
        )


def _with_flag(load: Callable) -> Callable:
    @functools.wraps(load)
    def wrapper(cls, *args, **kwargs):
        options = FusionOptions.of_flag(FLAG, kwargs.pop(FLAG, False))
        loaded = load(cls, *args, **kwargs)
        if options is not None:
            # with output_loading_info=True, from_pretrained returns a pair
            fuse_with(loaded[0] if isinstance(loaded, tuple) else loaded, options)
        return loaded

    return wrapper


def _past_config(load: Callable) -> Callable:
    """Keeps the flag from a config that is loaded for a model: it would take what it has a field for."""

    @functools.wraps(load)
    def wrapper(cls, *args, **kwargs):
        # an Auto class gives what the config leaves to the model; a pipeline gives both the same
        for_a_model = kwargs.keys() & {"_from_auto", "_from_pipeline", "return_unused_kwargs"}
        if FLAG not in kwargs or not for_a_model:
            return load(cls, *args, **kwargs)
        flag = kwargs.pop(FLAG)
        loaded = load(cls, *args, **kwargs)
        if kwargs.get("return_unused_kwargs"):
            loaded[1][FLAG] = flag
        return loaded

    return wrapper


_LOADERS: dict[tuple[type, str], Callable[[Callable], Callable]] = {
    (PreTrainedModel, "from_pretrained"): _with_flag,
    (PreTrainedModel, "_from_config"): _with_flag,
    (AutoConfig, "from_pretrained"): _past_config,
}
