"""From a trained, prepared model to verified files: freeze once, write every target, check each in a fresh process."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from qat.errors import UserError, VerifyError
from qat.exporters import export
from qat.files import set_aside
from qat.frozen import Frozen
from qat.report.card import card
from qat.report.schema import Export, Fallback, Stages
from qat.runtimes import environment
from qat.stages import Stages as Progress
from qat.verdict import NOT_RUN


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """What `save_pretrained` writes for a tokenizer, by file name; nothing for None."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir()) if f.is_file()}


def ship(
    frozen: Frozen,
    targets: Sequence[str],
    run_dir: Path,
    progress: Progress,
    *,
    title: str,
    data: str,
    stages: Stages,
    fallback: list[Fallback],
) -> tuple[dict[str, Export], list[UserError | VerifyError]]:
    """Write and verify every target; returns the report's `exports`, and what to raise once the report is written."""
    exports: dict[str, Export] = {}
    wrong: list[UserError | VerifyError] = []
    for target in targets:
        path = run_dir / "export" / target
        with progress(f"export {target}") as outcome:
            text = card(frozen, target, title=title, data=data, stages=stages, fallback=fallback)
            export(frozen, target, path, card=text)
            outcome.text = str(path)
        with progress(f"verify {target}") as outcome:
            try:
                with outcome.follow():
                    found = verify_apart(path, run_dir)
            except (UserError, VerifyError) as error:  # a missing runtime must not cost the report of a long training
                kept = f"; what was written is kept as {set_aside(path)}" if isinstance(error, VerifyError) else ""
                wrong.append(type(error)(f"{target}: {error}{kept}"))
                outcome.text = f"[red]NOT VERIFIED[/] {error}"
                continue
            if found["differences"]:
                path = set_aside(path)
            exports[target] = found["figures"]
            exports[target]["path"] = str(path.relative_to(run_dir))
            if found["unchecked"]:
                exports[target]["unchecked"] = found["unchecked"]
            wrong += [VerifyError(f"{target}: {d}; what was written is kept as {path}") for d in found["differences"]]
            wrong += [UserError(f"{target}: {u}") for u in found["unchecked"] if u.startswith(NOT_RUN)]
            outcome.text = _outcome(found)
    return exports, wrong


def verify_apart(path: Path, run_dir: Path) -> dict[str, Any]:
    """`qat verify` in a process of its own: {"figures", "differences", "unchecked"}.

    Raises UserError if a runtime is missing, VerifyError if the file cannot be read or run at all.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "verdict.json")
        command = [sys.executable, "-m", "qat", "verify", path, "--against", run_dir, "--json", answer]
        done = subprocess.run([str(c) for c in command], env=environment(), capture_output=True, text=True, check=False)
        if answer.is_file():
            (found,) = json.loads(answer.read_text()).values()
            return found
    said = (done.stderr.strip().splitlines() or [f"verification of {path} ended with code {done.returncode}"])[-1]
    raise (UserError if done.returncode == 2 else VerifyError)(said.removeprefix("error: "))


def _outcome(found: dict[str, Any]) -> str:
    f = found["figures"]
    if found["differences"]:
        return f"[red]WRONG[/] {escape(found['differences'][0])}"
    parts = ["codes and weights equal" if "codes_equal" in f else "compiled: its codes cannot be read back"]
    if "runtime" in f:
        quality = f"perplexity {f['perplexity']:.4f}" if "perplexity" in f else f"accuracy {f['accuracy']:.4f}"
        parts.append(f"{f['runtime']}: {quality}")
    notes = [f"\n             [yellow]but[/] {escape(u)}" for u in found["unchecked"]]
    return ", ".join(parts) + "".join(notes)
