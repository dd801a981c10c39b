"""One thread for each process of the tests; and the interpreters of the runtimes that have an environment of their own,
without which the tests that need one skip."""

import os

import pytest
import torch

from qat.runtimes import environments


def pytest_configure() -> None:
    """Processes share the cores (`pytest -n logical`): two threads on one core wait for each other, spinning."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


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
