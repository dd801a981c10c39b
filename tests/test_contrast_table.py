"""The contrast table's own rules: pairs by seed and window, the two spreads, and what cannot be told from noise."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import contrast_table as table

from qat.errors import UserError


def records(differences: list[float], jitter: float = 0.0) -> list[table.Record]:
    """Two arms; windows and seeds differ far more than the arms do, and the second has one seed more."""
    generator = torch.Generator().manual_seed(0)
    noise = jitter * torch.randn(16, generator=generator, dtype=torch.float64)  # of the windows, in every seed
    found = []
    for seed, difference in enumerate([*differences, 9.0]):
        level = 3 + torch.randn(16, generator=generator, dtype=torch.float64)
        other = level + difference + noise
        runs = [("wrong", other)] if seed == len(differences) else [("right", level), ("wrong", other)]
        for arm, nll in runs:
            line = {"settings": "s", "said": "`c`", "seed": seed, "runtime": "r", "arm": arm}
            found.append({**line, "torch": 3.0, "nll": nll.tolist()})
    return found


def cells(found: list[table.Record]) -> list[str]:
    return [c.strip() for c in table.table(found).splitlines()[-1].strip("|").split("|")]


def test_difference_is_paired_over_the_common_seeds_and_windows() -> None:
    differences = [0.010, 0.012, 0.014]
    error = torch.tensor(differences).std().item() / 3**0.5
    assert cells(records(differences))[5:] == ["+0.0120", f"{error:.4f}", "0.0000", "worse"]


@pytest.mark.parametrize(
    ("differences", "jitter", "said"),
    [
        ([0.010, 0.012, 0.014], 0.0, "worse"),
        ([-0.010, -0.012, -0.014], 0.0, "better"),
        ([0.010, 0.001, 0.001], 0.0, "not distinguishable"),  # 0.0040 ± 0.0030 over seeds
        ([0.001, 0.005, 0.006], 0.0, "not distinguishable"),  # 2.6 standard errors, but of three seeds
        ([0.010, 0.012, 0.014], 0.5, "not distinguishable"),  # seeds agree, windows do not
        ([0.010], 0.0, "one seed: unknown"),
    ],
)
def test_verdict(differences: list[float], jitter: float, said: str) -> None:
    assert cells(records(differences, jitter))[-1] == said


def test_interval_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for n in range(2, 40):
        values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        error, half = table.interval(values)
        assert error == pytest.approx(stats.sem(values.numpy()))
        exact = stats.t.ppf(0.975, n - 1) * error
        assert exact * (1 - 1e-3) <= half <= exact * (1.001 if n <= 10 else 1.12)


def test_runs_with_other_settings_have_a_table_of_their_own_under_their_commands() -> None:
    few, many = records([0.010, 0.012]), [{**r, "settings": "t"} for r in records([0.5, 0.6, 0.7])]
    more = [{**r, "settings": "t", "said": "`d`; a machine", "seed": r["seed"] + 9} for r in records([0.5])]
    want = f"s:\n- `c`\n\n{table.table(few)}\n\nt:\n- `c`\n- `d`; a machine\n\n{table.table([*many, *more])}"
    assert table.tables([*few, *many, *more]) == want


def test_record_is_read_and_a_missing_or_older_one_refused(tmp_path: Path) -> None:
    file = tmp_path / "record.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records([0.1])), encoding="utf-8")
    assert table.read(file) == records([0.1])
    with pytest.raises(UserError, match="does not exist"):
        table.read(tmp_path / "none.jsonl")
    file.write_text(json.dumps({"settings": "s", "seed": 0}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="kept no commands"):
        table.read(file)
