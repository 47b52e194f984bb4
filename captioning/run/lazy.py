"""Modules that are imported when they are first used: --help and a wrong flag end at once."""

import importlib


class LazyModule:
    """Stands for a module, and imports it when something of it is first used.

    importlib's LazyLoader puts it into sys.modules, where torch, while it is imported, looks at
    every module, which would import ours before torch is ready.
    """

    def __init__(self, name):
        self._name = name

    def __getattr__(self, name):
        return getattr(importlib.import_module(self._name), name)


def lazy(*names, within=None):
    """A list of :class:`LazyModule`: ``np, torch = lazy("numpy", "torch")``.

    :param within: the package whose modules they are
    """
    return [LazyModule(f"{within}.{name}" if within else name) for name in names]
