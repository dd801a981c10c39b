"""Loading from a hub over real sockets, each case in its own process: a stand-in server, and the ways it fails."""

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hub_server import COMMIT, GUARD, WATCH, HubServer, environment
from tiny_models import tiny_gpt2

from qat import hub as client

MODEL = "openai-community/gpt2"
DRIVER = f"""{WATCH}
import json
from qat.errors import UserError
from qat.models import load
folder, path, options = json.loads(sys.argv[1])
if folder:
    from pathlib import Path
    load.EMBEDDED["gpt2_mini"] = Path(folder)
if options.pop("bytes_only", False):
    load._read = lambda folder, label, options: ((folder / "model.safetensors").read_bytes(), [])
try:
    loaded = load.load(path, **options)
except UserError as error:
    print(json.dumps([heavy(), asked]), file=sys.stderr)
    print(error)
    sys.exit(error.exit_code)
if isinstance(loaded.model, bytes):
    print(len(loaded.model), loaded.source)
    sys.exit()
total = sum(float(p.double().sum()) for p in loaded.model.parameters())
fallback = loaded.fallback and [loaded.fallback.requested, loaded.fallback.used, loaded.fallback.reason]
print(json.dumps({{"source": loaded.source, "fallback": fallback, "sum": total, "vocab": len(loaded.tokenizer)}}))
"""


class Outcome(NamedTuple):
    """How the process ended, what it printed; and of a user's error what had been imported by then that takes seconds,
    and the requests before it, each with its timeouts in seconds."""

    code: int
    text: str
    heavy: list[str]
    asked: list[tuple[str, list[float]]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def expected(weights: Path) -> float:
    from safetensors.torch import load_file

    return sum(float(t.double().sum()) for t in load_file(weights / "model.safetensors").values())


def run(url: str, home: Path, path: str = MODEL, embedded: Path | None = None, **options: object) -> Outcome:
    """`load(path, **options)` in a new process with this endpoint and cache."""
    command = [sys.executable, "-c", DRIVER, json.dumps([str(embedded or ""), path, options])]
    env = environment(url, home)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=GUARD)
    assert "Traceback" not in done.stderr
    heavy, asked = json.loads(done.stderr.splitlines()[-1]) if done.returncode else ([], [])
    return Outcome(done.returncode, done.stdout.strip(), heavy, [(r, seconds) for r, seconds in asked])


# one request for what the repository holds, not repeated, that waits this long at most, and nothing imported before it
ONCE = ([], [(f"GET /api/models/{MODEL}", [client.WAIT])])


def files(home: Path, name: str) -> list[Path]:
    return list(home.rglob(name))


def test_a_model_comes_from_the_hub_and_then_from_the_cache(weights: Path, expected: float, tmp_path: Path):
    (weights / "pytorch_model.bin").write_bytes(b"the other format, never to be downloaded")
    (weights / "modeling.py").write_text("raise SystemExit('untrusted code ran')")
    with HubServer({"models": {MODEL: weights}}) as hub:
        first = run(hub.url, tmp_path, explicit=True)
        asked = " ".join(hub.requests)
    assert first.code == 0
    loaded = json.loads(first.text)
    assert loaded["source"] == f"{MODEL}@{COMMIT}"
    assert loaded["fallback"] is None
    assert loaded["sum"] == pytest.approx(expected, abs=1e-9)
    assert "model.safetensors" in asked
    assert "pytorch_model.bin" not in asked
    assert "modeling.py" not in asked
    # The server is gone now.
    again = run(hub.url, tmp_path, explicit=True)
    assert (again.code, json.loads(again.text)) == (0, loaded)


def test_no_hub_at_all_is_an_error_after_one_request(tmp_path: Path):
    with HubServer({}) as hub:
        pass
    outcome = run(hub.url, tmp_path)
    assert outcome.code == 2
    assert (outcome.heavy, outcome.asked) == ONCE
    assert f"{MODEL} is not in the local cache and the hub ({hub.url}) cannot be reached" in outcome.text
    assert "Connection refused" in outcome.text
    assert "model.path=FOLDER" in outcome.text
    assert "`python train.py recipe=quickstart` needs no network" in outcome.text


def test_a_hub_that_accepts_and_says_nothing_is_given_up_after_one_short_wait(tmp_path: Path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as mute:
        outcome = run(f"http://127.0.0.1:{mute.getsockname()[1]}", tmp_path)
    assert outcome.code == 2
    assert (outcome.heavy, outcome.asked) == ONCE
    assert f"no answer within {client.WAIT:g} s" in outcome.text


def test_a_client_that_hangs_before_its_own_timeouts_start_is_given_up(monkeypatch: pytest.MonkeyPatch):
    """As in the look-up of the name, which no timeout of a socket covers."""
    for_ever = threading.Event()

    class Hanging:
        repo_info: Callable[..., bool] = staticmethod(lambda *_, **__: for_ever.wait())

    monkeypatch.setattr(client, "HfApi", Hanging)
    monkeypatch.setattr(client, "WAIT", 0.01)
    monkeypatch.setattr(client, "_down", {})
    with pytest.raises(client.Unreachable, match=r"no answer within 0\.01 s"):
        client.probe(MODEL, "model", "model.path")
    for_ever.set()


@pytest.mark.parametrize(("status", "words"), [(200, "not a hub"), (403, "403 Forbidden"), (503, "503 Service")])
def test_a_login_page_a_firewall_and_a_broken_hub_count_as_unreachable(status: int, words: str, tmp_path: Path):
    with HubServer({}) as hub:
        hub.status = status
        outcome = run(hub.url, tmp_path)
    assert outcome.code == 2
    assert (outcome.heavy, outcome.asked) == ONCE
    assert "cannot be reached" in outcome.text
    assert words in outcome.text


def test_the_embedded_model_stands_in_where_the_recipe_says_so(weights: Path, expected: float, tmp_path: Path):
    with HubServer({}) as hub:
        pass
    outcome = run(hub.url, tmp_path, embedded=weights, offline="gpt2_mini")
    assert outcome.code == 0
    loaded = json.loads(outcome.text)
    assert loaded["source"] == "gpt2_mini"
    requested, used, reason = loaded["fallback"]
    assert (requested, used) == (MODEL, "gpt2_mini")
    assert "Connection refused" in reason
    assert loaded["sum"] == pytest.approx(expected, abs=1e-9)


def test_nothing_stands_in_for_a_path_that_the_user_gave(weights: Path, tmp_path: Path):
    with HubServer({}) as hub:
        pass
    outcome = run(hub.url, tmp_path, embedded=weights, offline="gpt2_mini", explicit=True)
    assert outcome.code == 2
    assert "cannot be reached" in outcome.text


def test_nothing_stands_in_for_a_model_that_the_hub_does_not_know(weights: Path, tmp_path: Path):
    with HubServer({"models": {}}) as hub:
        outcome = run(hub.url, tmp_path, embedded=weights, offline="gpt2_mini")
    assert outcome.code == 2
    assert f"model.path={MODEL}: no such folder here, and no such model at {hub.url}" in outcome.text


def test_a_gated_model_names_the_login(weights: Path, tmp_path: Path):
    with HubServer({"models": {MODEL: weights}}, gated=MODEL) as hub:
        outcome = run(hub.url, tmp_path, offline="gpt2_mini")
    assert outcome.code == 2
    assert f"{MODEL} is gated: accept its terms at {hub.url}/{MODEL}, run `hf auth login`" in outcome.text


@pytest.mark.parametrize(("ranges", "dies"), [(True, True), (True, False), (False, False)])
def test_a_hub_that_breaks_off_in_mid_file(ranges: bool, dies: bool, weights: Path, tmp_path: Path):
    """It goes away; or it breaks every transfer, with and without serving the rest on request (each endless, bare)."""
    with HubServer({"models": {MODEL: weights}}, breaks="model.safetensors", dies=dies) as hub:
        hub.ranges = ranges
        outcome = run(hub.url, tmp_path, embedded=weights, offline="gpt2_mini")
    assert outcome.code == 2
    assert outcome.heavy == []
    # the last of them is refused before it is sent
    assert max(Counter(request for request, _ in outcome.asked).values()) <= client.TRIES + 1
    assert f"the download of {MODEL} from {hub.url} broke off" in outcome.text
    assert "run the same command again" in outcome.text
    assert not files(tmp_path, "model.safetensors")
    assert not files(tmp_path, "*.incomplete")
    # What was left behind neither passes for a cached model nor stands in the way of a hub that works.
    assert run(hub.url, tmp_path).code == 2
    with HubServer({"models": {MODEL: weights}}) as hub:
        again = run(hub.url, tmp_path, bytes_only=True)
    assert again.text == f"{(weights / 'model.safetensors').stat().st_size} {MODEL}@{COMMIT}"
