"""report.html as text: well-formed, self-contained, escaped, and saying what is missing."""

import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import sample

from qat.errors import UserError
from qat.report.html import render, write_html

VOID = {"meta", "link", "input", "br", "wbr", "hr", "img"}
LOADS = {"src", "href", "srcset", "data", "poster", "action", "xlink:href", "background"}


class Page(HTMLParser):
    """Checks nesting while reading; keeps tags with their attributes, and text by the id of the section it is in."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.feed(source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id") or ""))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()[0] == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        section = next((name for tag, name in reversed(self.open) if tag == "section"), "")
        self.text[section] = " ".join((self.text.get(section, "") + data).split(" "))

    def named(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and kind in ["", *(attrs.get("class") or "").split()]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return sample.write_samples(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("kind", ["language", "classifier", "pretrain", "ptq"])
def test_page_is_well_formed_and_loads_nothing(runs: dict[str, Path], kind: str) -> None:
    source = write_html(runs[kind]).read_text(encoding="utf-8")
    page = Page(source)
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert name not in LOADS or (value or "").startswith(("data:", "#")), f"<{tag} {name}={value}>"
            assert not name.startswith("on"), f"<{tag} {name}=…>"
    policy = next(attrs["content"] for attrs in page.named("meta") if attrs.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for name in ("style.css", "script.js"):
        text = (resources.files("qat.report") / name).read_text(encoding="utf-8")
        assert text in source
        assert not re.search(r"https?:|//\w+\.|@import|url\(|</", text.replace("</script", ""))
    assert [attrs for attrs in page.named("meta") if attrs.get("name") == "viewport"]


def test_page_shows_the_figures_of_the_report(runs: dict[str, Path]) -> None:
    page = Page(render(runs["language"]))
    results = re.sub(r"\s+", " ", page.text["results"])
    assert "float 3.2142 24.883 29.6 MB" in results
    assert "QAT 3.2044 24.641 4.87 MB" in results
    assert "gguf re-loaded 3.2044 24.641 4.91 MB 5.27 yes yes 3.1e-04 llama.cpp b6997 (xllamacpp)" in results
    summary = re.sub(r"\s+", " ", page.text[""])
    assert "29.6 MB → 4.91 MB 6.03× smaller, as gguf" in summary
    assert "24.883 → 24.641 −0.97% from float, in llama.cpp b6997 (xllamacpp); float trained alike: 24.339" in summary
    assert "Recovered 85%" in summary
    assert "Exports verified 3 of 3" in summary
    assert "A stand-in was used Asked for openai-community/gpt2" in summary


def test_the_caveats_of_an_export_stand_under_the_results(runs: dict[str, Path]) -> None:
    page = Page(render(runs["language"]))
    assert len(page.named("dl", "caveats")) == 1
    results = re.sub(r"\s+", " ", page.text["results"])
    assert f"What the equality does not cover gguf{''.join(sample.CAVEATS)}" in results
    quiet = Page(render(runs["classifier"]))
    assert quiet.named("dl", "caveats") == []
    assert "does not cover" not in quiet.text["results"]


def test_every_layer_parameter_and_arm_is_on_the_page(runs: dict[str, Path]) -> None:
    report = sample.language_report()
    page = Page(render(runs["language"]))
    assert len(page.named("rect")) == 2 * len(report.get("layers", []))
    assert [attrs["data-arm"] for attrs in page.named("path", "line")] == ["float", "control", "qat"] * 2
    coverage = re.sub(r"\s+", "", page.text["coverage"])
    for entry in report["coverage"]:
        line = f"{entry['name']}{' × '.join(map(str, entry['shape']))}{entry['scheme']}{entry['reason']}"
        assert line.replace(" ", "") in coverage
    assert f"{sample.INT4} 82.47% of the weights, 32 parameters" in re.sub(r"\s+", " ", page.text["coverage"])
    assert len(page.named("div", "size")) == 1 + len(report["exports"])
    assert "quant_start_step: 200" in page.text["setup"]


def test_markup_in_any_user_string_stays_text(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\"<img src=https://evil.example/x onerror=alert(1)>"

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {k if k in keys else f"{k}{evil}": poison(v) for k, v in value.items()}
        return (
            [poison(v) for v in value] if isinstance(value, list) else value + evil if isinstance(value, str) else value
        )

    report: Any = sample.language_report()
    keys = {key for entry in (report, report["stages"], *report["exports"].values()) for key in entry}
    keys |= {key for name in ("coverage", "layers", "fallback") for key in report[name][0]} | {"loss", "perplexity"}
    poisoned = poison(report)
    run = sample.write_run(tmp_path / "run", sample.language_report(), {f"qat{evil}": 0.5}, config=evil)
    (run / "metrics.csv").write_text((run / "metrics.csv").read_text().replace("train/loss", '"loss<script>"'))
    sample.write_report(poisoned, run / "report.json")
    source = render(run)
    page = Page(source)
    assert len(page.named("script")) == 1
    assert page.named("img") == []
    assert source.count("<script>") == 1
    assert source.count("&lt;script&gt;") > 2 * len(report["coverage"])


def test_missing_files_are_said_on_the_page(runs: dict[str, Path], tmp_path: Path) -> None:
    page = Page(render(runs["ptq"]))
    assert "This run did not train" in page.text["training"]
    assert "config.yaml is missing" in page.text["setup"]
    trained = sample.write_run(tmp_path / "run", sample.language_report())
    assert "metrics.csv is missing" in Page(render(trained)).text["training"]
    (trained / "metrics.csv").write_text("step,lr\n1,0.1\n")
    assert "holds no loss" in Page(render(trained)).text["training"]


def test_failed_verification_is_loud(tmp_path: Path) -> None:
    report: Any = sample.language_report()
    report["exports"]["hf"]["weights_equal"] = report["exports"]["gguf"]["codes_equal"] = False
    page = Page(render(sample.write_run(tmp_path / "run", report)))
    assert len(page.named("section", "failed")) == 1
    summary = re.sub(r"\s+", " ", page.text[""])
    assert "were decided: gguf, hf. Do not use it." in summary
    assert "smaller, as gptq" in summary  # the headline is not about a broken file, small as it is
    assert "Exports verified 1 of 3 not equal: gguf, hf" in summary


def test_a_compiled_file_is_neither_verified_nor_failed(tmp_path: Path) -> None:
    report: Any = sample.language_report()
    for name in ("codes_equal", "weights_equal", "bits_per_weight"):
        del report["exports"]["hf"][name]
    page = Page(render(sample.write_run(tmp_path / "run", report)))
    assert not page.named("section", "failed")
    summary = re.sub(r"\s+", " ", page.text[""])
    assert (
        "Exports verified 2 of 3 read back: codes, scales and weights equal compiled, cannot be read back: hf"
        in summary
    )


def test_runs_without_quantization_or_exports_leave_those_parts_out(runs: dict[str, Path]) -> None:
    page = Page(render(runs["pretrain"]))
    assert "This run exported nothing." in page.text[""]
    assert "layers" not in page.text
    assert "bytes" not in page.text
    assert "Codes equal" not in page.text["results"]
    assert "Recovered" not in page.text[""]
    accuracy = Page(render(runs["classifier"]))
    assert "98.33%" in accuracy.text["results"]
    assert "erplexity" not in accuracy.text["results"]
    assert "PTQ cost too little" in accuracy.text[""]


def test_page_needs_a_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no report\.json"):
        write_html(tmp_path)


def luminance(colour: str) -> float:
    """WCAG relative luminance of #rgb or #rrggbb."""
    digits = colour.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_contrast_is_at_least_4_5(theme: int) -> None:
    css = (resources.files("qat.report") / "style.css").read_text(encoding="utf-8")
    colours = {n: v[theme] for n, *v in re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", css)}
    for text in ("ink", "soft", "accent", "bad"):
        for ground in ("bg", "raise"):
            dark, light = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
    for mark in ("tint", "grey", "warn"):  # bars and lines: 3 is asked of them, but for the tint, which is never alone
        dark, light = sorted((luminance(colours[mark]), luminance(colours["bg"])))
        assert (light + 0.05) / (dark + 0.05) >= (2 if mark == "tint" else 3), mark
