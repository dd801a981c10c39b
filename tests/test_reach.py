"""A run that lacks something outside itself ends at once: after one short request, before any heavy import.

How long that takes, `benchmarks/imports.py` measures.
"""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import GUARD, WATCH, HubServer, environment
from tiny_models import tiny_gpt2

from qat import hub

CODE = f"""{WATCH}
import json
from qat.entry import main
code = main(sys.argv[1:])
print(json.dumps([heavy(), asked]))
sys.exit(code)
"""
LLAMA, GPT2, WIKITEXT = "HuggingFaceTB/SmolLM2-135M", "openai-community/gpt2", "Salesforce/wikitext"


@pytest.fixture
def dead() -> str:
    """The address of a hub that is gone."""
    with HubServer({}) as server:
        return server.url


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a hub that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def refused(url: str, home: Path, *arguments: str, asking: tuple[str, ...] = ()) -> str:
    """The message of a command line that is refused with nothing heavy imported and nothing left behind, after asking
    the hub for these models, once each, without retries, and waiting WAIT seconds at most."""
    folder = home / "work"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", CODE, *arguments]
    env = environment(url, home / "hub")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=GUARD)
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout) == [[], [[f"GET /api/models/{name}", [hub.WAIT]] for name in asking]]
    assert list(folder.iterdir()) == []
    return done.stderr


@pytest.mark.parametrize("kind", ["dead", "mute"])
def test_without_a_hub_model_and_data_are_named_with_what_would_work(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(kind)
    command = ("recipe=llama_int4", "model.offline=error", "data.offline=error")
    message = refused(url, tmp_path, *command, asking=(LLAMA,))  # and the data's hub is known to be away
    assert f"{LLAMA} and {WIKITEXT} are not in the local cache and the hub ({url}) cannot be reached" in message
    assert "`python train.py recipe=quickstart` needs no network at all" in message
    assert "model.path=FOLDER data=custom data.path=FILE" in message


def test_only_what_nothing_stands_in_for_is_named(dead: str, tmp_path: Path) -> None:
    message = refused(dead, tmp_path, "recipe=gpt2_int4", f"model.path={GPT2}", asking=(GPT2,))
    assert f"error: {GPT2} is not in the local cache" in message  # the recipe's data have a stand-in
    assert "data.path" not in message
    message = refused(dead, tmp_path, "recipe=gpt2_int4", "data.path=a/b", asking=(GPT2,))
    assert "error: a/b is not in the local cache" in message


def test_a_hub_that_answers_is_asked_once_and_its_refusal_is_told(tmp_path: Path) -> None:
    with HubServer({"models": {}, "datasets": {}}) as server:
        message = refused(server.url, tmp_path, "recipe=llama_int4", asking=(LLAMA,))
        assert server.requests == [f"GET /api/models/{LLAMA}"]
    assert f"model.path={LLAMA}: no such folder here, and no such model at {server.url}" in message


def test_what_is_on_disk_is_looked_at(dead: str, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_gpt2(tmp_path / "original"), tmp_path / "model")
    (model / "model.safetensors").unlink()
    assert "holds no weights" in refused(dead, tmp_path, "recipe=quickstart", "model=hf", f"model.path={model}")
    assert "there is no such folder" in refused(dead, tmp_path, "recipe=quickstart", "model=hf", "model.path=/no/where")
    (tmp_path / "empty.txt").touch()
    custom = ("recipe=quickstart", "data=custom", f"data.path={tmp_path / 'empty.txt'}")
    assert "empty.txt is empty" in refused(dead, tmp_path, *custom)
    (tmp_path / "empty.txt").write_text("text")
    assert "no such file" in refused(dead, tmp_path, *custom, "data.validation_path=/no/where.txt")
