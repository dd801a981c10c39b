"""Every shipped configuration is accepted, and a typo anywhere is refused with the key's name."""

import re
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from qat import recipes
from qat.errors import UserError
from qat.pipeline import run
from qat.settings import check

GROUPS = sorted(
    f"{path.parent.relative_to(recipes.CONFIGS)}={path.stem}" for path in recipes.CONFIGS.glob("*/**/*.yaml")
)
NEEDED = {"model=hf": ["model.path=x"], "data=custom": ["data.path=x"]}


def compose(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    recipes.register()
    with hydra.initialize_config_dir(str(recipes.CONFIGS), version_base="1.3"):
        composed = hydra.compose("train", list(overrides))
    config: Any = OmegaConf.to_container(composed, resolve=True)
    return {**config, "recipe": "x", "run_dir": None, "target": None, "config": {}}


@pytest.mark.parametrize("name", [recipe.name for recipe in recipes.recipes()])
def test_every_recipe_is_accepted(name: str) -> None:
    check(compose(f"recipe={name}"), run)


@pytest.mark.parametrize("option", GROUPS)
def test_every_option_is_accepted(option: str) -> None:
    check(compose(option, *NEEDED.get(option, [])), run)


@pytest.mark.parametrize("name", [recipe.name for recipe in recipes.recipes()])
def test_every_recipe_says_what_it_is_and_costs(name: str) -> None:
    recipe = recipes.read(recipes.RECIPES / f"{name}.yaml")
    assert recipe.about
    assert recipe.time
    assert recipe.hardware
    assert recipe.about in recipes.listing()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.lrr", 1.0, "optimizer.lrr; did you mean lr"),
        ("trainer.max_stepz", 1, "trainer.max_stepz; did you mean max_steps"),
        ("data.blocksize", 1, "data.blocksize; did you mean block_size"),
        ("sead", 1, "sead; did you mean seed"),
        ("task.gradient_checkpoint", True, "task.gradient_checkpoint"),
        ("optimizer.lr", "fast", "optimizer.lr='fast' does not fit: a number"),
        ("trainer.max_steps", 1.5, "trainer.max_steps=1.5 does not fit: a whole number"),
        ("seed", "x", "seed='x' does not fit"),
        ("data.cache_dir", 3, "data.cache_dir=3 does not fit: text or nothing is expected"),
        ("optimizer.betas", 0.9, "optimizer.betas=0.9 does not fit: a list is expected"),
        ("control", 1, "control=1 does not fit: true or false"),
        ("data.block_size", True, "data.block_size=True does not fit"),
        ("optimizer._target_", "qat.training.optim.Optimiser", "optimizer._target_"),
        ("optimizer._target_", [1], "optimizer._target_=[1]"),
        ("optimizer._target_", "a..b", "optimizer._target_=a..b"),
        ("optimizer._target_", "os", "optimizer._target_=os is not a class"),
        ("optimizer", {"lr": 1.0}, "optimizer={'lr': 1.0} does not fit: Optimizer is expected"),
        ("optimizer", [1], "optimizer=[1] does not fit: Optimizer is expected"),
        ("optimizer", None, "optimizer=None does not fit: Optimizer is expected"),
        ("scheme.rules", 3, "scheme.rules=3 does not fit: a list is expected"),
        ("scheme.rules", [3], "scheme.rules[0]=3 does not fit: Rule is expected"),
        ("scheme.rules", [{"path": "x"}], "scheme.rules[0]={'path': 'x'} does not fit: Rule is expected"),
        ("export", [3], "export[0]=3 does not fit: text is expected"),
    ],
)
def test_a_typo_or_a_wrong_type_is_named(key: str, value: object, message: str) -> None:
    config = compose("recipe=pretrain_gpt2_mini")
    node, (*above, last) = config, key.split(".")
    for part in above:
        node = node[part]
    node[last] = value
    with pytest.raises(UserError, match=re.escape(message)):
        check(config, run)


def test_each_choice_is_said_once() -> None:
    config = compose("recipe=pretrain_gpt2_mini", "trainer.precision=foo")
    with pytest.raises(UserError, match=r"trainer\.precision='foo' does not fit: one of 64, 32, 16, ") as error:
        check(config, run)
    words = str(error.value).replace(",", "").split()
    for choice in ("32", "bf16", "bf16-mixed", "32-true", "nothing"):
        assert words.count(choice) == 1


def test_a_missing_key_is_named() -> None:
    config = compose("recipe=pretrain_gpt2_mini")
    del config["data"]["block_size"]
    with pytest.raises(UserError, match=r"lacks data\.block_size"):
        check(config, run)
