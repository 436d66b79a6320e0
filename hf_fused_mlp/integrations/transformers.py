"""The `use_fused_mlp` argument of `from_pretrained` and `from_config`.

Both end in a class method of `PreTrainedModel`, whether called through an Auto class, a concrete class, a pipeline or
remote code. `install` wraps the two methods: they take the argument out before Transformers sees it, and fuse the
loaded model. It also wraps the method with which Auto classes read the config, so that the argument reaches the model.

The flag exists only in the call. Loads without it, in any thread, run as without this package, and no config contains
it. This module does not import Transformers: it wraps methods once their module has been imported.
"""

import functools
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from hf_fused_mlp.integrations.on_import import AfterImport
from hf_fused_mlp.logs import logger
from hf_fused_mlp.options import FusionOptions

# the newest minor version with which `make test-newest` has passed
NEWEST_TESTED = "5.24"
FLAG = "use_fused_mlp"
# the registries of implementations of experts, by module
_EXPERTS = {
    "transformers.integrations.moe": "ExpertsInterface",
    "transformers.integrations.finegrained_fp8": "FP8ExpertsInterface",
}

_LOCK = threading.RLock()
_originals: dict[tuple[type, str], classmethod] = {}
_wrappers: dict[tuple[type, str], classmethod] = {}
_waiting: dict[str, AfterImport] = {}


def install() -> None:
    """Makes the loaders of Transformers accept `use_fused_mlp`, now or as soon as Transformers is imported.

    `import hf_fused_mlp` calls this. A second call does nothing.
    """
    with _LOCK:
        for name in dict.fromkeys(loader.module for loader in _LOADERS):
            _waiting.setdefault(name, AfterImport(name, _wrap)).start()
        for name in _EXPERTS:
            _waiting.setdefault(name, AfterImport(name, _register_experts)).start()


def uninstall() -> None:
    """Restores the loaders of Transformers, or stops waiting for its import. Fused models stay fused.

    `experts_implementation="hf_fused_mlp"` stays registered, because configs of live models may name it.

    Raises:
        RuntimeError: another library has wrapped the loaders meanwhile; nothing is changed.
    """
    with _LOCK:
        for (owner, name), wrapper in _wrappers.items():
            if owner.__dict__[name] is not wrapper:
                other = owner.__dict__[name]
                raise RuntimeError(f"{owner.__name__}.{name} has been wrapped again by {other!r}; undo that first")
        for finder in _waiting.values():
            finder.stop()
        _waiting.clear()
        for (owner, name), original in _originals.items():
            setattr(owner, name, original)
        _originals.clear()
        _wrappers.clear()


def _register_experts(module: ModuleType) -> None:
    """Registers `experts_implementation="hf_fused_mlp"`. Imports nothing: other threads may be importing too."""
    with _LOCK:
        if _waiting.pop(module.__name__, None) is not None:
            getattr(module, _EXPERTS[module.__name__]).register("hf_fused_mlp", _experts_forward)


def _experts_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    from hf_fused_mlp.integrations.experts import experts_forward

    return experts_forward(self, *args, **kwargs)


def _wrap(module: ModuleType) -> None:
    """Wraps the loaders of an imported module. Raises nothing, because that would make the import fail."""
    wrapped = False
    with _LOCK:
        if _waiting.pop(module.__name__, None) is None:
            return  # uninstalled by another thread meanwhile
        for loader in (loader for loader in _LOADERS if loader.module == module.__name__):
            owner = getattr(module, loader.owner, object)
            key, original = (owner, loader.method), vars(owner).get(loader.method)
            if key in _originals:
                continue
            if not isinstance(original, classmethod):
                logger.warning(
                    "this Transformers has no %s.%s that takes use_fused_mlp; look for a newer hf_fused_mlp, or call "
                    "fuse_model on loaded models",
                    loader.owner,
                    loader.method,
                )
                continue
            _originals[key] = original
            _wrappers[key] = classmethod(loader.wrap(original.__func__))
            setattr(owner, loader.method, _wrappers[key])
            wrapped = True
    if wrapped and module.__name__ == _LOADERS[0].module:
        warn_if_untested()


def warn_if_untested() -> None:
    """Logs a warning if the imported Transformers is newer than the newest that was tested."""
    version = sys.modules["transformers"].__version__
    here, tested = (re.findall(r"\d+", text)[:2] for text in (version, NEWEST_TESTED))
    if [int(number) for number in here] > [int(number) for number in tested]:
        logger.warning(
            "Transformers %s is newer than %s, the newest that hf_fused_mlp was tested with; look for a newer "
            "hf_fused_mlp, or compare a fused model with its original by `hf-fused-mlp validate`",
            version,
            NEWEST_TESTED,
        )


def _with_flag(load: Callable) -> Callable:
    @functools.wraps(load)
    def wrapper(cls, *args, **kwargs):
        options = FusionOptions.of_flag(FLAG, kwargs.pop(FLAG, False))
        loaded = load(cls, *args, **kwargs)
        if options is not None:
            from hf_fused_mlp.fuse import fuse_with  # imports PyTorch, which this module must not

            # with output_loading_info=True, from_pretrained returns a pair
            fuse_with(loaded[0] if isinstance(loaded, tuple) else loaded, options)
        return loaded

    return wrapper


def _past_config(load: Callable) -> Callable:
    """Keeps the flag away from a model's config when it is loaded, because configs take arguments for their fields."""

    @functools.wraps(load)
    def wrapper(cls, *args, **kwargs):
        # an Auto class passes the arguments that the config did not take to the model; a pipeline passes all to both
        for_a_model = kwargs.keys() & {"_from_auto", "_from_pipeline", "return_unused_kwargs"}
        if FLAG not in kwargs or not for_a_model:
            return load(cls, *args, **kwargs)
        flag = kwargs.pop(FLAG)
        loaded = load(cls, *args, **kwargs)
        if kwargs.get("return_unused_kwargs"):
            loaded[1][FLAG] = flag
        return loaded

    return wrapper


@dataclass(frozen=True)
class _Loader:
    """A class method of Transformers to wrap, and the module that defines its class."""

    module: str
    owner: str
    method: str
    wrap: Callable[[Callable], Callable]


_LOADERS = (
    _Loader("transformers.modeling_utils", "PreTrainedModel", "from_pretrained", _with_flag),
    _Loader("transformers.modeling_utils", "PreTrainedModel", "_from_config", _with_flag),
    _Loader("transformers.models.auto.configuration_auto", "AutoConfig", "from_pretrained", _past_config),
)
