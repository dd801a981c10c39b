"""Paths reach the run as typed; a resume takes nothing but a number of steps."""

from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from qat import recipes
from qat.errors import UserError
from qat.overrides import quote, resumed


def test_no_target_undoes_what_the_recipe_set() -> None:
    with hydra.initialize_config_dir(str(recipes.CONFIGS), version_base="1.3"):
        recipes.register()
        composed = hydra.compose("train", ["recipe=quickstart", quote("target=null")])
    assert composed.export == []
    assert composed.scheme.rules == []


PATHS = [
    "plain",
    "with space",
    "a,b",
    "a=b",
    "#1",
    "(x)",
    "[x]{y}",
    "größe/数据",
    "it's",
    'say "hi"',
    "back\\slash",
    "back\\'quote",
    "trailing\\",
    "${oc.env:HOME}",
    "$HOME",
    "a:b",
    "*?;&|<>!%",
    "true",
    "1e5",
    " lead",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["run_dir", "model.path"])
def test_paths_survive_hydra(path: str, key: str) -> None:
    with hydra.initialize_config_dir(str(recipes.CONFIGS), version_base="1.3"):
        composed = hydra.compose("train", [quote(f"{key}={path}")])
    assert OmegaConf.select(composed, key) == path


def test_home_is_expanded() -> None:
    assert quote("run_dir=~/a b") == f"run_dir='{Path.home()}/a b'"


def test_quotes_meant_for_hydra_are_dropped() -> None:
    assert quote("data.path='/a b'") == quote("data.path=/a b") == "data.path='/a b'"


@pytest.mark.parametrize("argument", ["seed=1,2", "--multirun", "model.path=null", "run_dir=", "export=[hf,gguf]"])
def test_everything_else_is_left_to_hydra(argument: str) -> None:
    assert quote(argument) == argument


def test_resume_with_nothing_or_steps_beside_it() -> None:
    assert resumed(["resume=/a b=c"]) == (Path("/a b=c"), None)
    assert resumed(["trainer.max_steps=30", "resume=~/run"]) == (Path.home() / "run", 30)
    assert resumed(["recipe=x"]) is None


@pytest.mark.parametrize("other", ["seed=1", "recipe=gpt2_int4", "+x=1", "run_dir=/b", "trainer.max_steps=many"])
def test_anything_else_beside_resume_is_refused(other: str) -> None:
    with pytest.raises(UserError, match=other.partition("=")[0].lstrip("+")):
        resumed(["resume=/a", other])
