"""The audit as it is printed: repeated layers as one line, and the size of every file that was asked for."""

import io

from rich.console import Console
from test_conversion import GPT2_RULES, gpt2

from qat.auditing import audit
from qat.report.audit import print_audit


def test_repeated_layers_are_one_line_and_each_export_has_its_size() -> None:
    model = gpt2().half()
    audited = audit(model, GPT2_RULES)
    console = Console(file=io.StringIO(), width=160)
    said = print_audit(audited, console, exports=["hf", "gguf"])
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    (row,) = [line for line in lines if "mlp.c_fc.weight" in line]
    assert " ".join(row.split()) == "transformer.h.*.mlp.c_fc.weight 2 int4 (1, 32) absmax portable rule 1"
    # norms, biases and positions: 2 bytes each in the folder, 4 in GGUF
    floats = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias") or "ln_" in n or "wpe" in n)
    assert audited.export_nbytes("gguf") - audited.export_nbytes("hf") == 2 * floats
    float_kb = sum(p.nbytes for p in model.parameters()) / 1000
    assert f"; {float_kb:.1f} kB become {audited.nbytes / 1000:.1f} kB; files without tokenizer and header: hf " in said
    assert said.endswith(f"gguf {audited.export_nbytes('gguf') / 1000:.1f} kB")
    assert "files" not in print_audit(audited, console, exports=[])
