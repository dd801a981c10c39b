"""What was trained against what the runtime computes, for every target of configs/target: prints and writes a table.

    python benchmarks/parity.py                 # all targets, to docs/parity.md
    python benchmarks/parity.py llama_cpp       # these only, printed

Each scheme is put on the embedded model (round-to-nearest: parity does not depend on training) and on a random Llama
with norms that are not 1, exported, read back and run in the real runtime. Logit errors are relative to the largest
logit, over 50 prompts of 8 to 12 tokens; "spread" is how far the simulation in float32 and in float64 differ, which
no comparison can undercut once activations are rounded. Perplexity is over 16 windows of 256 tokens of the embedded
evaluation text. Greedy: of 64 next tokens, how many agree before the first that differs, and the margin between the
two best there.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from machine import machine
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qat
from qat import evaluation, runtimes
from qat.conversion import calibrate
from qat.data.stdlib import StdlibData
from qat.errors import UserError, VerifyError
from qat.exporters import export, target_module
from qat.models.load import load
from qat.recipes import CONFIGS
from qat.shipping import tokenizer_files, verify_apart

WINDOWS, PROMPTS, GREEDY = 16, 50, 64
HEAD = (
    "| target | export | model | codes, weights | logits: median | within 2e-6 | spread | perplexity | in the runtime "
    "| greedy | runtime |"
)


class Subject(NamedTuple):
    """A float model, its tokenizer's files, and text to score; prompts [n][8..12] and one to continue."""

    name: str
    model: Any
    files: dict[str, bytes]
    batch: dict[str, Tensor]


def embedded() -> Subject:
    loaded = load(None, name="gpt2_mini")
    data = StdlibData(block_size=256, batch_size=8)
    data.attach(loaded.tokenizer)
    return Subject("gpt2_mini", loaded.model, tokenizer_files(loaded.tokenizer), data.evaluation("test", WINDOWS))


def random_llama(like: Subject, dtype: torch.dtype) -> Subject:
    """256 wide, grouped heads, untied; weights exact in `dtype`, so they are what a checkpoint of it would hold."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    tokens = {"vocab_size": like.model.config.vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, **tokens, max_position_embeddings=512)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.1 * torch.randn_like(p)).mul(0.5).to(dtype))
    name = f"random Llama, {str(dtype).removeprefix('torch.')}"
    return Subject(name, model, like.files, {k: v[:4] for k, v in like.batch.items()})


@torch.no_grad()
def last(net: nn.Module, prompts: list[list[int]]) -> tuple[Tensor, float]:
    """Log-probabilities after each prompt [n, V], and the largest logit."""
    logits = torch.stack([net(input_ids=torch.tensor([p])).logits[0, -1].float() for p in prompts])
    return logits.log_softmax(-1), logits.abs().max().item()


@torch.no_grad()
def continued(net: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(GREEDY):
        ids.append(int(net(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def row(target: str, exporter: str, subject: Subject) -> str:
    """One line of the table; raises UserError where the target refuses the model or its runtime is missing."""
    composed: Any = OmegaConf.load(CONFIGS / "target" / f"{target}.yaml")
    name = next(d["override /scheme"] for d in composed.defaults if "override /scheme" in d)
    scheme = instantiate(OmegaConf.load(CONFIGS / "scheme" / f"{name}.yaml"), _convert_="all")
    simulated = {k: v for k, v in {**scheme, **composed.get("scheme", {})}.items() if k != "rules"}
    module = target_module(exporter)
    if missing := getattr(module, "missing_runtime", lambda: None)():
        return f"| {target} | {exporter} | {subject.name} | not run: {missing} | | | | | | | |"
    model = copy.deepcopy(subject.model)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "name": subject.name}
    config["kv_cache"] = simulated.get("kv_cache")
    qat.audit(model, scheme["rules"], targets=[exporter], config=config)
    net: Any = qat.prepare(model, scheme["rules"], **simulated).eval()
    calibrate(net, [subject.batch["input_ids"][:4]], lambda m, ids: m(input_ids=ids))
    generator = torch.Generator().manual_seed(1)
    vocabulary = config["vocab_size"]
    prompts = [torch.randint(2, vocabulary, (8 + i % 5,), generator=generator).tolist() for i in range(PROMPTS)]
    want, largest = last(net, prompts)
    wide, _ = last(copy.deepcopy(net).double(), prompts)
    text = continued(net, subject.batch["input_ids"][0, :12].tolist())
    prefixes = [text[:i] for i in range(12, len(text))]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        answers = evaluation.answer(net, subject.batch, 8)
        evaluation.save(answers, run_dir / "evaluation.safetensors")
        frozen = qat.convert(net, config=config, tokenizer=subject.files)
        frozen.save(run_dir / "frozen")
        path = export(frozen, exporter, run_dir / "export" / exporter)
        found = verify_apart(path, run_dir)
        got = runtimes.run(module.RUNTIME, path, logprobs=prompts + prefixes)["logprobs"]
    figures, trained = found["figures"], evaluation.figures(answers)["perplexity"]
    error = (got[:PROMPTS] - want).abs().amax(-1) / largest
    spread = ((wide - want).abs().amax(-1) / largest).median()
    equal = "yes" if figures["codes_equal"] and figures["weights_equal"] else f"**NO** {found['differences'][0]}"
    cells = [
        target,
        exporter,
        subject.name,
        equal,
        f"{error.median():.1e}",
        f"{(error < 2e-6).float().mean():.0%}",
        f"{spread:.1e}",
        f"{trained:.4f}",
        f"{figures['perplexity']:.4f} ({figures['perplexity'] / trained - 1:+.3%})" if "perplexity" in figures else "–",
        greedy(got[PROMPTS:], text[12:], net, prefixes),
        figures.get("runtime", "not run"),
    ]
    return f"| {' | '.join(cells)} |"


def greedy(got: Tensor, want: list[int], net: Any, prefixes: list[list[int]]) -> str:
    wrong = (got.argmax(-1) != torch.tensor(want)).nonzero()
    if not len(wrong):
        return str(GREEDY)
    first = int(wrong[0])
    best = last(net, [prefixes[first]])[0][0].topk(2).values
    return f"{first}, margin {best[0] - best[1]:.1e}"


def targets(chosen: list[str]) -> list[tuple[str, str]]:
    """(target, export) of every YAML of configs/target that exports a language model."""
    found: list[tuple[str, str]] = []
    for file in sorted((CONFIGS / "target").glob("*.yaml")):
        config: Any = OmegaConf.load(file)
        found += [(file.stem, name) for name in config.export if not chosen or file.stem in chosen]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", help="names of configs/target (default: all, and docs/parity.md)")
    args = parser.parse_args()
    small = embedded()
    subjects = [small, random_llama(small, torch.float32), random_llama(small, torch.bfloat16)]
    lines = [HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
    print("\n".join(lines), flush=True)
    for target, exporter in targets(args.targets):
        for subject in subjects:
            try:
                lines.append(row(target, exporter, subject))
            except (UserError, VerifyError) as error:
                verb = "refused" if isinstance(error, UserError) else "**FAILED**"
                lines.append(f"| {target} | {exporter} | {subject.name} | {verb}: {error} | | | | | | | |")
            print(lines[-1], flush=True)
    if not args.targets:
        about = (__doc__ or "").split("\n\n", 2)[2].strip()
        head = f"# Parity\n{about}\n\n`python benchmarks/parity.py`, {machine(torch.get_num_threads())}.\n\n"
        Path(__file__).parents[1].joinpath("docs/parity.md").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
