"""`import qat` teaches transformers' `from_pretrained` the quant_method "qat", without importing transformers itself.

transformers has a registry for this (`register_quantizer`), in a module that takes seconds to import. So a finder waits
for someone else to import that module, and registers right after it has run.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Register now if transformers' registry is there already, else as soon as it is imported."""
    if REGISTRY in sys.modules:
        register(sys.modules[REGISTRY])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register(registry: ModuleType) -> None:
    """Add quantizer and configuration to transformers' registry, once."""
    if "qat" in registry.AUTO_QUANTIZER_MAPPING:
        return
    from qat.packed.quantizer import QatConfig, QatQuantizer

    registry.register_quantization_config("qat")(QatConfig)
    registry.register_quantizer("qat")(QatQuantizer)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The module's own loader, with the registration after it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        register(module)

    def __getattr__(self, name: str) -> object:  # get_source and the like, for tracebacks
        return getattr(self.loader, name)
