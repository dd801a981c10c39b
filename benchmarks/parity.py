"""What was trained against what the runtime computes, for every target and variant: prints and writes a table.

    python benchmarks/parity.py                       # all targets and variants, into docs/parity.md
    python benchmarks/parity.py llama_cpp mlx@2bit    # these, printed
    python benchmarks/parity.py llama_cpp --write     # and its rows replace those in docs/parity.md

Each scheme is put on the embedded models (round-to-nearest: parity does not depend on training) and on random Llamas
with norms that are not 1, exported, read back and run in the real runtime. docs/parity.md says what the columns mean;
what there is to be measured is in parity_variants.py.
"""

import argparse
import copy
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import parity_table as table
import torch
from machine import machine
from parity_causes import cause, known, within
from parity_spread import SEEDS, moved, others, spreads, step
from parity_subjects import RANDOM, Subject, subjects
from parity_variants import exports, models, scheme_of
from torch import Tensor, nn

import qat
from qat import evaluation, runtimes
from qat.conversion import calibrate
from qat.errors import UserError, VerifyError
from qat.exporters import export, runtime_of, target_module
from qat.models.load import EMBEDDED
from qat.verification import verify

PROMPTS, GREEDY, DRAWS = 50, 64, 64
SUBJECTS: dict[str, Subject] = {}  # of this process


@torch.no_grad()
def last(net: nn.Module, prompts: list[list[int]]) -> tuple[Tensor, float]:
    """Log-probabilities after each prompt [n, V], and the largest logit. One prompt a call, as runtimes are asked."""
    logits = torch.stack([net(input_ids=torch.tensor([p])).logits[0, -1].float() for p in prompts])
    return logits.log_softmax(-1), logits.abs().max().item()


@torch.no_grad()
def together(net: nn.Module, prompts: list[list[int]]) -> Tensor:
    """Log-probabilities after each prompt [n, V], those of equal length in one call: several times as fast, and only
    the order of sums may differ."""
    found: dict[int, Tensor] = {}
    for length in {len(p) for p in prompts}:
        at = [i for i, p in enumerate(prompts) if len(p) == length]
        logits = net(input_ids=torch.tensor([prompts[i] for i in at])).logits[:, -1].float()
        found.update(zip(at, logits.log_softmax(-1), strict=True))
    return torch.stack([found[i] for i in range(len(prompts))])


@torch.no_grad()
def continued(net: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(GREEDY):
        ids.append(int(net(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def row(target: str, exporter: str, subject: Subject) -> table.Row:
    """One line of the table."""
    key = [target, exporter, subject.name]
    module = target_module(exporter)
    if missing := getattr(module, "missing_runtime", lambda: None)():
        return table.without_figures(key, "not run", missing)
    try:
        return table.Row([*key, *figures(target, exporter, subject)])
    except (UserError, VerifyError) as error:
        verb = "refused" if isinstance(error, UserError) else "**FAILED**"
        return table.without_figures(key, verb, str(error))


def figures(target: str, exporter: str, subject: Subject) -> list[str]:
    """The cells of a row. Raises UserError where the target refuses the model, VerifyError where its runtime fails."""
    scheme = scheme_of(target)
    numerics = {k: v for k, v in scheme.items() if k != "rules"}
    module = target_module(exporter)
    model = copy.deepcopy(subject.model)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "name": subject.name}
    config["kv_cache"] = numerics.get("kv_cache")
    qat.audit(model, scheme["rules"], targets=[exporter], config=config)
    net: Any = qat.prepare(model, scheme["rules"], **numerics).eval()
    calibrate(net, [subject.batch["input_ids"][:4]], lambda m, ids: m(input_ids=ids))
    generator = torch.Generator().manual_seed(1)
    vocabulary = config["vocab_size"]
    prompts = [torch.randint(2, vocabulary, (8 + i % 5,), generator=generator).tolist() for i in range(PROMPTS)]
    want, largest = last(net, prompts)
    found_apart = others(net, lambda n: together(n, prompts))
    apart = spreads(want, found_apart, largest)
    text = continued(net, subject.batch["input_ids"][0, :12].tolist())
    prefixes = [text[:i] for i in range(12, len(text))]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        answers = evaluation.answer(net, subject.batch, 8)
        frozen = qat.convert(net, config=config, tokenizer=subject.files)
        frozen.save(run_dir / "frozen")
        path = export(frozen, exporter, run_dir / "export")
        found = verify(path, against=run_dir / "frozen", runtime=False)
        ids = answers["input_ids"]
        runtime = runtime_of(exporter, path)
        got = runtimes.run(runtime, path, score=ids, logprobs=prompts + prefixes, version="")
    equal = not found.differences
    held = "logits only: a compiled .pte cannot be read back" if hasattr(module, "UNREADABLE") else "equal"
    trained = evaluation.figures(answers)["perplexity"]
    there = evaluation.figures({**answers, "nll": -got["score"]})["perplexity"]
    errors = [(got["logprobs"][:PROMPTS] - w).abs().amax(-1) / largest for w in (want, *found_apart["float64"])]
    rounded = any(rule.scheme is not None and rule.scheme.input is not None for rule in scheme["rules"])
    half = exporter in ("awq", "gptq", "gptq_v1")
    text_cell, text_equal, turned = greedy(got["logprobs"][PROMPTS:], text[12:], net, prefixes)
    unit = step(want, largest)
    bound = apart["float64"] + unit
    error = max(errors if rounded else errors[:1], key=lambda e: (within(e), -float(e.median())))
    missed = table.misses(
        equal=equal, error=error, spread=bound, rounded=rounded, half=half, ratio=there / trained, text=text_equal
    )
    apart_too = perplexities(net, subject, there) if "perplexity" in missed else ""
    simulated = None
    if missed != "none" and (otherwise := known(target, runtime)):
        theirs = last(otherwise[0](net), prompts)[0]
        far = [(t - theirs).abs().amax(-1) / largest for t in (got["logprobs"][:PROMPTS], want)]
        simulated = otherwise[1], far[0], far[1]
    return [
        missed,
        held if equal else f"**NO** {found.differences[0]}",
        " / ".join(f"{e.median():.1e}" for e in errors),
        " / ".join(f"{within(e):.0%}" for e in errors),
        " / ".join(f"{value:.1e}" for value in apart.values()),
        f"{trained:.4f}",
        f"{there:.4f} ({there / trained - 1:+.3%})",
        text_cell,
        got["version"],
        table.today(),
        cause(target, exporter, missed, simulated, error, max(apart.values()) + unit, turned, apart_too),
    ]


def perplexities(net: Any, subject: Subject, there: float) -> str:
    """Where those of DRAWS evaluations with last bits moved lie, and how many are as far from their median as the
    runtime's."""
    found: list[float] = []
    for seed in range(SEEDS, SEEDS + DRAWS):
        with moved(net, seed):
            found.append(evaluation.figures(evaluation.answer(net, subject.batch, 8))["perplexity"])
    middle = sorted(found)[DRAWS // 2]
    far = sum(abs(p - middle) >= abs(there - middle) for p in found)
    said = f"{DRAWS} evaluations with last bits moved give {min(found):.4f} to {max(found):.4f}"
    return f"{said}; {far or 'none'} as far from their median, {middle:.4f}, as the runtime"


def greedy(got: Tensor, want: list[int], net: Any, prefixes: list[list[int]]) -> tuple[str, bool, str]:
    """What the table says of the text, whether a step that differs is one which the spread there explains, and if it
    is not, how many of DRAWS more evaluations choose the runtime's token; "" if none does.

    margin: how much likelier, in nats, the simulation finds its own token than the runtime's; spread: by how much
    that changes from one of its evaluations to another, at most.
    """
    wrong = (got.argmax(-1) != torch.tensor(want)).nonzero()
    if not len(wrong):
        return str(GREEDY), True, ""
    first = int(wrong[0])
    theirs = int(got[first].argmax())

    def margin(model: nn.Module) -> Tensor:
        logits = last(model, [prefixes[first]])[0][0]
        return logits[want[first]] - logits[theirs]

    here = margin(net)
    spread = max(float((other - here).abs()) for found in others(net, margin).values() for other in found)
    cell = f"{first}, margin {here:.1e}, spread {spread:.1e}"
    if float(here) <= spread:
        return cell, True, ""
    turned = 0
    for seed in range(SEEDS, SEEDS + DRAWS):
        with moved(net, seed):
            turned += float(margin(net)) <= 0
    return (
        cell,
        False,
        f"{turned} of {DRAWS} evaluations with last bits moved choose the runtime's token" if turned else "",
    )


def rows(targets: list[str], names: list[str]) -> list[tuple[str, str, str]]:
    """The keys (target, exporter, model) of the rows of these targets and models, in the table's order."""
    return [
        (target, exporter, name)
        for target, exporter in exports()
        for name in models(target, exporter)
        if target in targets and name in names
    ]


def _start(names: list[str]) -> None:
    """In each worker process: one thread, its own copy of the models."""
    torch.set_num_threads(1)
    SUBJECTS.update((s.name, s) for s in subjects(names))


def _work(key: tuple[str, str, str]) -> tuple[table.Row, float]:
    since = time.monotonic()
    target, exporter, name = key
    return row(target, exporter, SUBJECTS[name]), time.monotonic() - since


def measured(keys: list[tuple[str, str, str]], jobs: int) -> Iterator[tuple[table.Row, float]]:
    """The rows of these keys in their order, and the seconds each took, from so many processes of one thread."""
    names = [name for _, _, name in keys]
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runtimes too: two threads on one core wait for each other, spinning
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_start, initargs=(names,)) as pool:
        yield from pool.map(_work, keys)


def main() -> None:
    subject_names, names = [*EMBEDDED, *RANDOM], list(dict.fromkeys(target for target, _ in exports()))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", help="of configs/target, or variants (default: all, into docs/parity.md)")
    parser.add_argument("--models", nargs="+", choices=subject_names, default=subject_names)
    parser.add_argument("--write", action="store_true", help="replace these rows of docs/parity.md")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default 2)")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(names):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    keys, order = rows(args.targets or names, args.models), rows(names, subject_names)
    print(machine(args.jobs), table.line(table.COLUMNS), "|" + "---|" * len(table.COLUMNS), sep="\n", flush=True)
    since = time.monotonic()
    for found, seconds in measured(keys, args.jobs):
        print(table.line(found.cells), found.reason, f"{seconds:.1f} s", flush=True)
        if args.write or not args.targets:
            table.write([found], order)
    print(f"{len(keys)} rows in {time.monotonic() - since:.0f} s")


if __name__ == "__main__":
    main()
