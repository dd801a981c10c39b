"""What a run ends with on the terminal: one table and the commands to paste."""

import json
import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qat.report.rows import BLANK, Row, quality_name, rows
from qat.report.schema import Report

PROMPT = "The"


def result_table(report: Report, console: Console) -> RenderableType:
    """Float / control / PTQ / QAT / each re-loaded export. Too narrow a console gets the export checks as a second
    table underneath instead of folded columns."""
    lines = rows(report)
    wide = _table(report, lines, figures=True, checks=any(row.exported for row in lines))
    if Measurement.get(console, console.options.update(max_width=1000), wide).maximum <= console.width:
        parts: list[RenderableType] = [wide]
    else:
        parts = [_table(report, lines, figures=True, checks=False)]
        parts += [_table(report, exported, figures=False, checks=True)] if (exported := _exported(lines)) else []
    if "recovered" in report:
        parts.append(Text(f"QAT undid {report['recovered']:.0%} of the damage of PTQ"))
    for entry in report.get("fallback", []):
        message = f"{entry['requested']} was NOT used. In its place: {entry['used']}\n({entry['reason']})"
        text = Text(message, no_wrap=False, overflow="fold")  # also on a console that never wraps
        parts.insert(0, Panel(text, title="STAND-IN USED", style="bold black on yellow"))
    return Group(*parts)


def _exported(lines: list[Row]) -> list[Row]:
    return [row for row in lines if row.exported]


def _table(report: Report, lines: list[Row], *, figures: bool, checks: bool) -> Table:
    table = Table(title=Text(f"{report['recipe']} · {report['model']}") if figures else None, title_justify="left")
    table.add_column("" if figures else "export", style="bold", overflow="fold")
    if figures:
        for name in ("loss", quality_name(report), "size"):
            table.add_column(name, justify="right", no_wrap=True)
        if _exported(lines):
            table.add_column("bits/w", justify="right", no_wrap=True)
    if checks:
        table.add_column("codes =", justify="center", no_wrap=True)
        table.add_column("weights =", justify="center", no_wrap=True)
        table.add_column("Δ logit", justify="right", no_wrap=True)
        table.add_column("runtime", overflow="fold")
    first_export = next((i for i, row in enumerate(lines) if row.exported), 0)
    for index, row in enumerate(lines):
        if figures and index == first_export and index:
            table.add_section()
        cells: list[RenderableType] = [Text(row.label)]
        if figures:
            cells += [row.loss, row.quality, row.size] + ([row.bits] if _exported(lines) else [])
        if checks:
            cells += [_mark(row.equal("codes")), _mark(row.equal("weights")), row.logit_diff, Text(row.runtime)]
        table.add_row(*cells)
    return table


def _mark(equal: str) -> Text:
    return Text(equal, style={"yes": "green", "NO": "bold white on red", BLANK: "dim"}[equal])


def next_commands(report: Report, run_dir: Path) -> list[str]:
    """Shell lines, ready to paste from any folder: run the file in llama.cpp, load the folder in transformers (or
    onnxruntime), `qat generate`. What this run has no file for is left out; `qat inspect` fills up."""
    run_dir = run_dir.absolute()
    if "ptq" not in report["stages"]:  # a float run has RUN/model alone: run it, quantize it
        model = run_dir / "model"
        return [_transformers(model), f"{_tool('qat')} train recipe=quickstart {shlex.quote(f'model.path={model}')}"]
    paths = {target: run_dir / entry["path"] for target, entry in report["exports"].items()}
    commands: list[str] = []
    if "gguf" in paths:
        commands.append(_llama_cpp(_file(paths["gguf"], "*.gguf")))
    if "hf" in paths:
        commands.append(_transformers(paths["hf"]))
    if "onnx" in paths and quality_name(report) == "perplexity":
        commands.append(f"{_tool('qat')} generate {shlex.quote(str(paths['onnx']))} --prompt {shlex.quote(PROMPT)}")
    elif "onnx" in paths:
        model = _literal(_file(paths["onnx"], "*.onnx"))
        code = f"import onnxruntime as o; s = o.InferenceSession({model}); "
        code += "print([(i.name, i.type, i.shape) for i in s.get_inputs()])"
        commands.append(f"{_tool('python')} -c {shlex.quote(code)}")
    if quality_name(report) == "perplexity":
        commands.append(f"{_tool('qat')} generate {shlex.quote(str(run_dir))} --prompt {shlex.quote(PROMPT)}")
    return commands if len(commands) >= 3 else [*commands, f"{_tool('qat')} inspect {shlex.quote(str(run_dir))}"]


def _tool(name: str) -> str:
    """`python` or `qat` of this environment: the bare name only where the shell would find just that one."""
    bin_folder = Path(sys.executable).parent
    found = shutil.which(name)
    if found is not None and Path(found).parent == bin_folder:
        return name
    if name != "python" and not (bin_folder / name).exists():
        return f"{_tool('python')} -m {name}"
    return shlex.quote(sys.executable if name == "python" else str(bin_folder / name))


def _file(path: Path, pattern: str) -> Path:
    """The one file of that kind in an export's folder, or the path itself if it is a file."""
    return next(iter(sorted(path.glob(pattern))), path) if path.is_dir() else path


def _literal(value: object) -> str:
    """A Python string literal in double quotes, so that the shell's single quotes can stand around it."""
    return json.dumps(str(value), ensure_ascii=False)


def _llama_cpp(model: Path) -> str:
    """llama-cli where it is installed, else the llama.cpp inside the xllamacpp wheel."""
    if shutil.which("llama-cli"):
        return f"llama-cli -m {shlex.quote(str(model))} -p {PROMPT} -n 40"
    code = (
        "import xllamacpp as x; p = x.CommonParams(); p.verbosity = 0; p.n_ctx = 512; "
        f"p.model.path = {_literal(model)}; "
        f'print(x.Server(p).handle_completions({{"prompt": "{PROMPT}", "max_tokens": 40}})["choices"][0]["text"])'
    )
    return f"{_tool('python')} -c {shlex.quote(code)}"


def _transformers(folder: Path) -> str:
    """Plain transformers where the layout is its own; `import qat` first where the folder says quant_method qat."""
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    quantized = settings.get("quantization_config", {})
    more, options = "import qat; " if quantized.get("quant_method") == "qat" else "", ""
    if any(not group["weights"]["symmetric"] for group in quantized.get("config_groups", {}).values()):
        more = "from transformers import CompressedTensorsConfig as C; "  # the only way it loads asymmetric weights
        options = ', model_kwargs={"quantization_config": C(dequantize=True)}'
    code = (
        f'{more}from transformers import pipeline; p = pipeline("text-generation", {_literal(folder)}{options}); '
        f'print(p("{PROMPT}", max_new_tokens=40)[0]["generated_text"])'
    )
    return f"{_tool('python')} -c {shlex.quote(code)}"
