"""Environments of their own: found where they are said to be, made on top of this one, and missing ones named."""

import subprocess
import sys
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.exporters import export, refuse_missing_runtimes, target_module, targets
from qat.runtimes import environments, run


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_ENVIRONMENTS", str(tmp_path / "environments"))


def test_a_package_without_an_environment_runs_here() -> None:
    assert environments.interpreter("torchao") == sys.executable
    assert environments.installed_in("torch").startswith("2.")


@pytest.mark.parametrize("target", [t for t in targets() if t in ("gptq", "gptq_v1", "awq", "mlx")])
def test_a_missing_one_is_named_before_and_after_training(target: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"python -m qat\.runtimes\.environments (gptqmodel|mlx)"):
        refuse_missing_runtimes([target])
    from prepared_models import INT4, prepared, rule

    path = export(prepared("llama", [rule(None, "lm_head"), rule(INT4)])[1], target, tmp_path / "out")
    with pytest.raises(UserError, match=r"python -m qat\.runtimes\.environments"):
        run(target_module(target).RUNTIME, path, logprobs=[[1, 2]])


def test_a_half_made_one_is_not_taken_for_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(path: Path, **_: object) -> None:
        for part in (path / "bin" / "python", path / "lib/python3/site-packages" / "site.py"):
            part.parent.mkdir(parents=True)
            part.touch()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(environments.venv, "create", create)
    with monkeypatch.context() as patch:
        patch.setattr(environments.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            environments.make("mlx")
    assert environments.missing_environment("mlx") == environments.remedy("mlx")
    assert not list(environments.folder("mlx").parent.iterdir())
    monkeypatch.setitem(environments.PACKAGES, "mlx", [])
    assert environments.make("mlx") == environments.folder("mlx")
    assert environments.missing_environment("mlx") is None


def test_the_remedy_is_what_brings_the_package() -> None:
    assert environments.remedy("gptqmodel") == "make it with python -m qat.runtimes.environments gptqmodel"
    assert environments.remedy("torchao") == "pip install torchao"


@pytest.mark.slow
def test_one_is_made_on_top_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(environments.PACKAGES, "bare", [])
    path = environments.make("bare")
    assert path == environments.folder("bare")
    code = "import sys, torch; print(sys.prefix, torch.__version__)"
    said = subprocess.run([environments.interpreter("bare"), "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split()[0] == str(path)
    monkeypatch.setitem(environments.PACKAGES, "bare", [["./no-such-folder"]])
    with pytest.raises(UserError, match="pip could not install"):
        environments.make("bare")
    assert environments.missing_environment("bare") is None, "the one that was whole is still there"
    assert list(path.parent.iterdir()) == [path], "and nothing half-made beside it"
    with pytest.raises(UserError, match="there are gptqmodel, mlx"):
        environments.make("no-such")
