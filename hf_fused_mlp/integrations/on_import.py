"""Calls a function right after a module has been imported, without importing it."""

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class AfterImport(MetaPathFinder):
    """Calls `function(module)` once after the module `name` was imported; immediately if it already was.

    While it waits it is the first finder of `sys.meta_path` and wraps the loader of that one module. It removes itself
    before the call. If the import fails it waits for the next attempt.
    """

    def __init__(self, name: str, function: Callable[[ModuleType], object]):
        self.name, self.function = name, function
        self._lock = threading.Lock()
        self._waiting = False
        self._here = threading.local()

    def start(self) -> None:
        """Calls the function if the module is imported, otherwise starts to wait. A second call is harmless."""
        with self._lock:
            if not self._waiting:
                self._waiting = True
                sys.meta_path.insert(0, self)
        self._look()  # after inserting, so that we do not miss an import that begins meanwhile

    def stop(self) -> bool:
        """Ends the waiting; returns whether this call ended it."""
        with self._lock:
            waited, self._waiting = self._waiting, False
            if waited:
                # a new list: removing from the old one makes a thread that iterates over it skip a finder
                sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
        return waited

    def call(self, module: ModuleType) -> None:
        """Ends the waiting and calls the function, in the first thread that gets here."""
        if self.stop():
            self.function(module)

    def _look(self) -> None:
        module = sys.modules.get(self.name)
        # importlib sets this attribute while a module is executed
        if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
            self.call(module)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            self._look()  # an import that began before `start` has no wrapped loader; it may have ended since
            return None
        if not self._waiting or getattr(self._here, "finding", False):
            return None
        self._here.finding = True  # other finders like this one may ask all finders in turn
        try:
            for finder in list(sys.meta_path):
                find = getattr(finder, "find_spec", None) if finder is not self else None
                spec = find(fullname, path, target) if find else None
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader, self)
                    return spec
        finally:
            self._here.finding = False
        return None


class _Loader(Loader):
    """Loads a module with its own loader, then tells the finder."""

    def __init__(self, loader: Any, finder: AfterImport):
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # readers of source and resources expect the module's own loader
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if sys.modules.get(module.__name__) is module:
            self._finder.call(module)
