"""Quantization-aware training in which what you train is what you ship.

Everything here is imported on first use (PEP 562), so that `import qat` costs no transformers and no Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qat import hf_plugin

if TYPE_CHECKING:
    from qat.auditing import audit as audit
    from qat.conversion import calibrate as calibrate
    from qat.conversion import convert as convert
    from qat.conversion import prepare as prepare
    from qat.conversion import set_fake_quant as set_fake_quant
    from qat.errors import UserError as UserError
    from qat.errors import VerifyError as VerifyError
    from qat.exporters import export as export
    from qat.frozen import Frozen as Frozen
    from qat.packed.load import load as load
    from qat.scheme import QuantSpec as QuantSpec
    from qat.scheme import Rule as Rule
    from qat.scheme import Scheme as Scheme
    from qat.verification import verify as verify

__version__ = "0.1.0"

_PUBLIC = {
    "audit": "qat.auditing",
    "prepare": "qat.conversion",
    "calibrate": "qat.conversion",
    "convert": "qat.conversion",
    "set_fake_quant": "qat.conversion",
    "export": "qat.exporters",
    "verify": "qat.verification",
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
