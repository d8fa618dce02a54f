"""Doing something as soon as another package is imported, without importing it."""

import importlib.util
import sys
from collections.abc import Callable

_waiting: dict[str, Callable[[], object]] = {}


class _Loader:
    """Another loader, and then an action."""

    def __init__(self, loader, action: Callable[[], object]):
        self._loader, self._action = loader, action

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._action()


class _Finder:
    """Lets the other finders find a module that is waited for, and wraps its loader."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        action = _waiting.pop(name, None)
        if action is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, action)
        return spec


def after(module: str, action: Callable[[], object]) -> None:
    """Call `action` once `module` has been imported: now, if it has."""
    if module in sys.modules:
        action()
        return
    _waiting[module] = action
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
