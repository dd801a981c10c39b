"""The interpreters of the runtimes that have an environment of their own; tests that need one that is not made skip."""

import pytest

from qat.runtimes import environments


def _python(name: str) -> str:
    if environments.missing_environment(name) is not None:
        pytest.skip(f"the environment of {name} is not made: python -m qat.runtimes.environments {name}")
    return environments.interpreter(name)


@pytest.fixture(scope="session")
def gptqmodel_python() -> str:
    return _python("gptqmodel")


@pytest.fixture(scope="session")
def mlx_python() -> str:
    return _python("mlx")
