"""The parity table's own rules: what counts as a miss, and that a second run replaces its rows and no others."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import parity_table as table

MET = {"equal": True, "error": torch.full((50,), 1e-6), "spread": 4e-7, "rounded": False, "half": False, "ratio": 1.0}
FLIPPED = torch.cat([torch.full((17,), 1e-7), torch.full((33,), 1e-3)])
EMPTY = f"# Parity\nby hand\n\n{table.START}\n{table.END}\nmore by hand\n"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "none"),
        ({"equal": False}, "**codes**"),
        ({"error": torch.tensor([0.0] * 49 + [3e-6])}, "**logits**"),
        ({"error": torch.tensor([0.0] * 49 + [5e-4]), "half": True}, "none"),
        ({"error": torch.tensor([0.0] * 49 + [7e-4]), "half": True}, "**logits**"),
        ({"error": FLIPPED, "rounded": True, "spread": 2e-3}, "none"),
        ({"error": FLIPPED, "rounded": True}, "**logits**"),
        ({"error": FLIPPED.roll(1)[:48], "rounded": True, "spread": 2e-3}, "none"),
        ({"error": FLIPPED[1:], "rounded": True, "spread": 2e-3}, "**logits**"),
        ({"error": torch.full((50,), 1e-6), "rounded": True}, "**logits**"),
        ({"text": False}, "**greedy**"),
        ({"ratio": 1.0004, "error": torch.full((50,), 1.0)}, "**logits**"),
        ({"ratio": 0.9994, "equal": False}, "**codes**, **perplexity**"),
    ],
)
def test_each_bound_of_a_row(changes: dict[str, object], said: str) -> None:
    assert table.misses(**{**MET, **changes}) == said  # type: ignore[arg-type]


def filled(target: str, model: str, value: str) -> table.Row:
    return table.Row([target, "hf", model, *[value] * (len(table.COLUMNS) - 3)])


def test_a_second_run_replaces_its_own_rows_alone() -> None:
    linear = table.without_figures(["b", "hf", "gpt2"], "refused", "type `Linear` decides nothing:\nof type Conv1D")
    other = table.without_figures(["b", "hf", "odd"], "not run", "make it with: python -m x")
    order = [(t, "hf", m) for t in "abc" for m in ("gpt2", "odd")]
    first = table.merged(EMPTY, [filled("c", "odd", "1"), filled("a", "gpt2", "2"), linear, other], order)
    assert first.startswith("# Parity\nby hand\n")
    assert first.endswith("\nmore by hand\n")
    assert "| refused: Linear only [1] |" in first
    assert "| not run [2] |" in first
    assert "1. `type 'Linear' decides nothing: of type Conv1D`\n2. `make it with: python -m x`\n" in first
    assert table.read(first) == [filled("a", "gpt2", "2"), linear, other, filled("c", "odd", "1")]
    second = table.merged(first, [filled("b", "gpt2", "3"), filled("c", "odd", "4")], order)
    assert table.read(second) == [filled("a", "gpt2", "2"), filled("b", "gpt2", "3"), other, filled("c", "odd", "4")]
    assert "1. `make it with: python -m x`" in second
    assert table.read(table.merged(second, [], order[:2])) == [filled("a", "gpt2", "2")]  # a target that is gone


def test_the_written_table_reads_back_as_it_is() -> None:
    text = table.FILE.read_text(encoding="utf-8")
    rows = table.read(text)
    assert table.merged(text, rows, [row.key for row in rows]) == text
    assert all(len(row.cells) == len(table.COLUMNS) for row in rows)
