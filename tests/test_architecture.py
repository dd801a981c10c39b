"""The house rules that a machine can check: who may import whom, that `import qat` is lazy, how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "qat").rglob("*.py"))
HEAVY = ("pytorch_lightning", "lightning", "hydra", "omegaconf", "transformers", "datasets", "wandb")


def module(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, and the modules that import_module is given as text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


IMPORTS = {module(f): imports(f) for f in FILES}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def offenders(of: str, banned: tuple[str, ...]) -> list[str]:
    return [
        f"{name} imports {i}"
        for name, found in IMPORTS.items()
        if within(name, of)
        for i in sorted(found)
        if any(within(i, b) for b in banned)
    ]


# Each part may import those to its right in this table, and itself; whatever is not named may import all of them.
ALLOWED = {
    "qat.errors": (),
    "qat.scheme": (),
    "qat.packing": (),
    "qat.files": ("qat.errors",),
    "qat.rounding": ("qat.scheme",),
    "qat.affine": ("qat.scheme", "qat.rounding"),
    "qat.fake_quantize": ("qat.affine", "qat.scheme", "qat.rounding"),
    "qat.streams": (),
    "qat.meanwhile": ("qat.files",),
    "qat.filed": ("qat.affine", "qat.packing", "qat.scheme"),
    "qat.frozen": (
        *("qat.affine", "qat.filed", "qat.scheme", "qat.files", "qat.meanwhile", "qat.streams", "qat.errors"),
    ),
    "qat.observers": ("qat.affine", "qat.fake_quantize", "qat.scheme", "qat.errors"),
    "qat.quantizers.base": ("qat.affine", "qat.fake_quantize", "qat.scheme"),
    "qat.kernels": ("qat.affine", "qat.rounding", "qat.scheme", "qat.quantizers.base"),
    "qat.modules": (
        *("qat.kernels", "qat.quantizers.base", "qat.affine", "qat.fake_quantize", "qat.scheme", "qat.errors"),
    ),
    "qat.nearest": ("qat.scheme",),
    "qat.auditing": ("qat.modules", "qat.nearest", "qat.scheme", "qat.errors"),
}


@pytest.mark.parametrize("part", ALLOWED)
def test_import_direction(part: str) -> None:
    known = [i for name, found in IMPORTS.items() if within(name, part) for i in found if within(i, "qat")]
    allowed = (part, *ALLOWED[part])
    assert sorted({i for i in known if i != "qat" and not any(within(i, a) for a in allowed)}) == []


@pytest.mark.parametrize(
    "part",
    [
        "qat.scheme",
        "qat.affine",
        "qat.fake_quantize",
        "qat.packing",
        "qat.frozen",
        "qat.streams",
        "qat.files",
        "qat.kernels",
    ],
)
def test_the_core_knows_no_framework(part: str) -> None:
    assert part in IMPORTS
    assert offenders(part, HEAVY) == []


def test_exporters_and_runtimes_know_nothing_of_training() -> None:
    assert (
        offenders("qat.exporters", ("qat.modules", "qat.quantizers", "qat.training", "qat.conversion", "qat.kernels"))
        == []
    )
    assert offenders("qat.verification", ("qat.modules", "qat.quantizers", "qat.training", "qat.conversion")) == []


def test_no_cycles() -> None:
    """Of imports at module level: what a function imports when it is called does not count."""
    top: dict[str, set[str]] = {}
    for file in FILES:
        tree = ast.parse(file.read_text())
        nodes = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        names: set[str] = set()
        for n in nodes:
            if isinstance(n, ast.ImportFrom):
                names |= {str(n.module), *(f"{n.module}.{a.name}" for a in n.names)}
            else:
                names |= {a.name for a in n.names}
        top[module(file)] = names & set(IMPORTS) - {module(file), "qat"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in top[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in top:
        visit(name, ())


ENTRY = {"qat.entry", "qat.cli", "qat.overrides", "qat.recipes", "qat.run_folder", "qat.settings"}


def test_only_the_entry_and_its_helpers_know_hydra() -> None:
    """So no DictConfig travels further (run_folder writes and reads plain dicts)."""
    found = {o.split(" imports ")[0] for o in offenders("qat", ("hydra", "omegaconf"))}
    assert sorted(found - ENTRY) == []


@pytest.mark.parametrize("file", FILES, ids=module)
def test_file(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 300, "split it"
    if text.strip():
        doc = ast.get_docstring(ast.parse(text))
        assert doc, "the first line of a file says what it is for"
        assert len(doc.splitlines()[0]) > 15


def test_importing_qat_is_lazy() -> None:
    code = f"""
import sys
import qat
print(sorted(m for m in sys.modules if m.split(".")[0] in {HEAVY!r} and "." not in m))
qat.QuantSpec, qat.Frozen
print(sorted(m for m in sys.modules if m.split(".")[0] in {HEAVY!r} and "." not in m))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[:2] == ["[]", "[]"], out.stdout
