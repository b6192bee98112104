"""Registers the checkpoint reader with transformers, whether that is imported before this package or after it.

transformers has no entry point for quantisation methods: they are registered by a call. Importing transformers here
would make `import sparse_bitnet` slow for those who do not use it, so the call is made when transformers loads the
module that keeps the register.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

REGISTER = "transformers.quantizers.auto"
READER = "sparse_bitnet.interop.hf_quantizer"  # registers itself when imported


def install() -> None:
    """Register now if transformers has loaded its register, else as soon as it does."""
    if REGISTER in sys.modules:
        import_module(READER)
    elif not any(isinstance(finder, _RegisterFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterFinder())


class _RegisterFinder(MetaPathFinder):
    """Finds the register as the other finders do, with a loader that imports the reader after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenReader(spec.loader)
        return spec


class _ThenReader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.__loader__ = self.loader
        import_module(READER)
