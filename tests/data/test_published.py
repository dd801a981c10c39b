"""Data sets from a hub over real sockets: their splits and configurations, a stand-in, a transfer that breaks off."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

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
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    argument = json.dumps([(kind, {"cache_dir": str(home / "cache"), **options}) for kind, options in cases])
    command = [sys.executable, "-c", DATA_DRIVER, argument, str(Path(__file__).parents[1])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
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
    assert "data=custom data.path=FILE" in refused
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
        env["PYTHONPATH"] = str(Path(__file__).parents[2])
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    broken, after = done.stdout.splitlines()
    assert broken.startswith(f"UserError the download of {DATASET} from {hub.url} broke off")
    assert after.startswith("Unreachable")  # what came before the break is no cached data set
