"""What a run makes of its exports' verdicts."""

from pathlib import Path
from typing import Any

import pytest
from prepared_models import LINEAR, prepared

from qat import shipping
from qat.errors import UserError
from qat.stages import Stages


def test_a_runtime_that_did_not_run_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, frozen = prepared("llama", LINEAR)
    found: dict[str, Any] = {
        "figures": {"bytes": 1, "codes_equal": True},
        "differences": [],
        "unchecked": ["its reader rounds", "not run: loss in the runtime: pip install it"],
    }
    monkeypatch.setattr(shipping, "verify_apart", lambda *_: found)
    exports, wrong = shipping.ship(frozen, ["hf"], tmp_path, Stages(), title="t", data="", stages={}, fallback=[])
    assert exports["hf"]["codes_equal"] is True  # type: ignore[typeddict-item]
    (error,) = wrong
    assert isinstance(error, UserError)
    assert str(error) == "hf: not run: loss in the runtime: pip install it"
