"""Quantization-aware training in which what you train is what you ship.

Everything here is imported on first use (PEP 562), so that `import qat` costs no transformers and no Lightning.
"""

from importlib import import_module
from typing import Any

from qat import hf_plugin

__version__ = "0.1.0"

_PUBLIC = {
    "audit": "qat.audit",
    "prepare": "qat.convert",
    "calibrate": "qat.convert",
    "convert": "qat.convert",
    "set_fake_quant": "qat.convert",
    "export": "qat.export",
    "verify": "qat.verify",
    "load": "qat.packed.load",
    "Frozen": "qat.frozen",
    "QuantSpec": "qat.scheme",
    "Scheme": "qat.scheme",
    "Rule": "qat.scheme",
    "UserError": "qat.errors",
    "VerifyError": "qat.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qat' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


hf_plugin.install()  # "qat" folders load through transformers once this is imported
