"""Loading from a hub over real sockets, each case in its own process: a stand-in server, and the ways it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from hub_server import COMMIT, HubServer
from tiny_models import tiny_gpt2

MODEL = "openai-community/gpt2"
DRIVER = """
import json, sys, time
from qat.errors import UserError
from qat.models import load
folder, path, options = json.loads(sys.argv[1])
if folder:
    from pathlib import Path
    load.ASSETS = Path(folder)
if options.pop("bytes_only", False):
    load._read = lambda folder, label, options: ((folder / "model.safetensors").read_bytes(), [])
start = time.monotonic()
try:
    loaded = load.load(path, **options)
except UserError as error:
    print(time.monotonic() - start, file=sys.stderr)
    print(error)
    sys.exit(error.exit_code)
if isinstance(loaded.model, bytes):
    print(len(loaded.model), loaded.source)
    sys.exit()
total = sum(float(p.double().sum()) for p in loaded.model.parameters())
fallback = loaded.fallback and [loaded.fallback.requested, loaded.fallback.used, loaded.fallback.reason]
print(json.dumps({"source": loaded.source, "fallback": fallback, "sum": total, "vocab": len(loaded.tokenizer)}))
"""


class Outcome(NamedTuple):
    """How the process ended, what it printed, and the seconds between the call and the user's error."""

    code: int
    text: str
    seconds: float


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def expected(weights: Path) -> float:
    from safetensors.torch import load_file

    return sum(float(t.double().sum()) for t in load_file(weights / "model.safetensors").values())


def run(url: str, home: Path, path: str = MODEL, embedded: Path | None = None, **options: object) -> Outcome:
    """`load(path, **options)` in a new process with this endpoint and cache."""
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])}
    argument = json.dumps([str(embedded or ""), path, options])
    done = subprocess.run([sys.executable, "-c", DRIVER, argument], env=env, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    seconds = float(done.stderr.splitlines()[-1]) if done.returncode else 0.0
    return Outcome(done.returncode, done.stdout.strip(), seconds)


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


def test_no_hub_at_all_is_an_error_within_five_seconds(tmp_path: Path):
    with HubServer({}) as hub:
        pass
    outcome = run(hub.url, tmp_path)
    assert outcome.code == 2
    assert outcome.seconds < 5
    assert f"{MODEL} is not in the local cache and the hub ({hub.url}) cannot be reached" in outcome.text
    assert "Connection refused" in outcome.text
    assert "model=gpt2_mini" in outcome.text
    assert "python train.py recipe=quickstart" in outcome.text


def test_a_hub_that_accepts_and_says_nothing_is_given_up_within_five_seconds(tmp_path: Path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as mute:
        outcome = run(f"http://127.0.0.1:{mute.getsockname()[1]}", tmp_path)
    assert outcome.code == 2
    assert outcome.seconds < 5
    assert "no answer within 3 s" in outcome.text


@pytest.mark.parametrize(("status", "words"), [(200, "not a hub"), (403, "403 Forbidden"), (503, "503 Service")])
def test_a_login_page_a_firewall_and_a_broken_hub_count_as_unreachable(status: int, words: str, tmp_path: Path):
    with HubServer({}) as hub:
        hub.status = status
        outcome = run(hub.url, tmp_path)
        assert len([r for r in hub.requests if "/api/models" in r]) == 1  # no retries
    assert outcome.code == 2
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
    assert outcome.seconds < 20
    assert f"the download of {MODEL} from {hub.url} broke off" in outcome.text
    assert "run the same command again" in outcome.text
    assert not files(tmp_path, "model.safetensors")
    assert not files(tmp_path, "*.incomplete")
    # What was left behind neither passes for a cached model nor stands in the way of a hub that works.
    assert run(hub.url, tmp_path).code == 2
    with HubServer({"models": {MODEL: weights}}) as hub:
        again = run(hub.url, tmp_path, bytes_only=True)
    assert again.text == f"{(weights / 'model.safetensors').stat().st_size} {MODEL}@{COMMIT}"


def test_the_hub_is_asked_before_the_slow_imports():
    """The probe must not wait for transformers, whose import takes seconds."""
    code = "import sys, qat.models.load; print({'transformers', 'datasets', 'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()"


DATASET = "Salesforce/wikitext"
CARD = {
    "configs": [
        {
            "config_name": name,
            "data_files": [{"split": s, "path": f"{name}/{s}-*"} for s in ("test", "validation", "train")],
        }
        for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
    ]
}
DATA_DRIVER = """
import json, sys
sys.path.append(sys.argv[2])
from qat.errors import UserError
from qat.data.custom import CustomData
from qat.data.wikitext2 import WikiText2

def outcome(kind, options):
    try:
        data = {"wikitext2": WikiText2, "custom": CustomData}[kind](block_size=16, batch_size=2, **options)
        if (stand_in := data.reach()) is not None:
            return [stand_in.requested, stand_in.used, stand_in.reason]
        from tiny_models import tiny_tokenizer
        data.attach(tiny_tokenizer())
        rows = {split: data.rows(split)["text"][:] for split in ("train", "validation", "test")}
        return {"rows": rows, "text": data.tokenizer.decode(data.windows("train")["input_ids"][:].flatten())}
    except UserError as error:
        return str(error)

print(json.dumps([outcome(*case) for case in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As WikiText lies on the hub: a folder of parquet files for each configuration, and a card that names them."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml

    folder = tmp_path_factory.mktemp("wikitext")
    for config in CARD["configs"]:
        name = config["config_name"]
        (folder / name).mkdir()
        for split, count in (("train", 60), ("validation", 20), ("test", 20)):
            rows = [x for n in range(count) for x in ("", f" = {name} {split} {n} = \n")]
            pq.write_table(pa.table({"text": rows}), folder / name / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(CARD)}---\n# WikiText\n")
    return folder


def run_data(url: str, home: Path, *cases: tuple[str, dict[str, object]]) -> list:
    """What becomes of each of these data modules, in one process: rows and text, a stand-in, or the user's error."""
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])}
    argument = json.dumps([(kind, {"cache_dir": str(home / "cache"), **options}) for kind, options in cases])
    command = [sys.executable, "-c", DATA_DRIVER, argument, str(Path(__file__).parent)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_wikitext2_comes_from_the_hub_and_then_from_the_cache(corpus: Path, tmp_path: Path):
    with HubServer({"datasets": {DATASET: corpus}}) as hub:
        hub.card = CARD
        first, ambiguous, unknown, missing = run_data(
            hub.url,
            tmp_path,
            ("wikitext2", {}),
            ("custom", {"path": DATASET}),
            ("custom", {"path": DATASET, "config": "wikitext-3"}),
            ("custom", {"path": "nobody/nothing"}),
        )
        asked = " ".join(hub.requests)
    assert {name: len(rows) for name, rows in first["rows"].items()} == {"train": 60, "validation": 20, "test": 20}
    assert first["rows"]["test"][0] == " = wikitext-2-raw-v1 test 0 = \n"
    # Lines of one text, with nothing between them.
    assert first["text"].startswith("".join(first["rows"]["train"][:20]))
    assert "wikitext-2-raw-v1/train" in asked
    assert "wikitext-103-raw-v1" not in asked
    assert "choose data.config=wikitext-103-raw-v1|wikitext-2-raw-v1" in ambiguous
    assert unknown.startswith(f"{DATASET} has no configuration 'wikitext-3'; it has wikitext-103-raw-v1, ")
    assert missing.startswith(f"data.path=nobody/nothing: no such folder here, and no such dataset at {hub.url}")
    assert run_data(hub.url, tmp_path, ("wikitext2", {})) == [first]  # the hub is gone


def test_data_out_of_reach(tmp_path: Path):
    with HubServer({}) as hub:
        pass
    refused, replaced, custom, explicit = run_data(
        hub.url,
        tmp_path,
        ("wikitext2", {}),
        ("wikitext2", {"offline": "stdlib"}),
        ("custom", {"path": DATASET, "offline": "stdlib"}),
        ("wikitext2", {"offline": "stdlib", "explicit": True}),
    )
    assert f"{DATASET} is not in the local cache and the hub ({hub.url}) cannot be reached" in refused
    assert "data=stdlib" in refused
    assert replaced[:2] == [DATASET, "stdlib"]
    assert "Connection refused" in replaced[2]
    assert custom == explicit == refused


def test_data_that_breaks_off(corpus: Path, tmp_path: Path):
    code = """
from qat import hub
from qat.data.published import fetch
from qat.errors import UserError
for _ in range(2):
    try:
        print(fetch("Salesforce/wikitext", "wikitext-2-raw-v1", "data.path"))
    except (UserError, hub.Unreachable) as error:
        print(type(error).__name__, error)
"""
    with HubServer({"datasets": {DATASET: corpus}}, breaks="train-00000-of-00001.parquet", dies=True) as hub:
        hub.card = CARD
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        env["PYTHONPATH"] = str(Path(__file__).parents[1])
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    broken, after = done.stdout.splitlines()
    assert broken.startswith(f"UserError the download of {DATASET} from {hub.url} broke off")
    assert after.startswith("Unreachable")  # what came before the break is no cached data set
