"""report.html in a headless Chromium: charts drawn, no console errors, themes, a phone's width, the small script."""

import html
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import sample

from qat.report.html import write_html

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
    "--virtual-time-budget=2000",
)
DARK = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")
VIEWS: dict[str, tuple[tuple[int, int], tuple[str, ...]]] = {
    "light": ((1280, 900), ()),
    "dark": ((1280, 900), DARK),
    "tablet": ((720, 1000), ()),
    "phone": ((390, 844), ()),
}

PROBE = """<script>addEventListener("load", () => {
  const root = document.documentElement, out = {};
  const all = (selector) => [...document.querySelectorAll(selector)];
  out.background = getComputedStyle(document.body).backgroundColor;
  out.width = root.clientWidth;
  out.overflow = root.scrollWidth - root.clientWidth;
  for (const part of all("details")) part.open = true;
  out.overflowOpen = root.scrollWidth - root.clientWidth;
  out.drawn = all("path.line").map((path) => path.getBoundingClientRect()).map((box) => [box.width, box.height]);
  out.bars = all("rect").filter((bar) => bar.getBoundingClientRect().height > 0).length;
  const lines = (cell) => {
    const range = document.createRange();
    range.selectNodeContents(cell);
    return new Set([...range.getClientRects()].map((box) => Math.round(box.bottom))).size;
  };
  out.brokenFigures = all(".plain td:not(.text), .results td:not(.text)").filter((cell) => lines(cell) > 1)
    .map((cell) => cell.textContent);
  out.text = Math.min(...all("main *").filter((e) => e.textContent.trim() && !e.closest("svg"))
    .map((e) => parseFloat(getComputedStyle(e).fontSize)));
  const area = document.querySelector(".area"), box = area.getBoundingClientRect();
  area.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 5}));
  out.readout = document.querySelector(".readout").textContent;
  const filter = document.getElementById("filter");
  filter.value = "H.3. INT4"; filter.dispatchEvent(new Event("input"));
  out.matches = document.getElementById("matches").textContent;
  out.visible = all(".coverage tbody tr").filter((line) => line.getBoundingClientRect().height > 0).length;
  const button = document.getElementById("theme");
  out.themes = [1, 2, 3].map(() => {
    button.click();
    return [root.dataset.theme || "auto", getComputedStyle(document.body).backgroundColor];
  });
  root.dataset.probe = JSON.stringify(out);
  parent.postMessage(root.dataset.probe, "*");
});</script>"""

# No window is narrower than 500 pixels while the DOM is dumped; a frame may be.
FRAME = """<!doctype html><script>
onmessage = (event) => { document.documentElement.dataset.probe = event.data; };
</script><iframe width="390" height="844" src="probe.html"></iframe>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arms = {"control": 0.05, "qat": 0.05, "float": 0.06}
    return write_html(sample.write_run(tmp_path_factory.mktemp("page") / "run", sample.language_report(), arms))


def browse(chromium: str, page: Path, profile: Path, view: str, action: str) -> tuple[str, str]:
    """What Chromium prints and its log. A new profile folder each time, so that no theme is remembered."""
    (width, height), extra = VIEWS[view]
    command = [chromium, *OPTIONS, *extra, f"--user-data-dir={profile}", f"--window-size={width},{height}", action]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def complaints(log: str) -> list[str]:
    return [line for line in log.splitlines() if ":CONSOLE" in line]


def measure(chromium: str, page: Path, folder: Path, view: str, fault: str = "") -> Any:
    """What the probe finds in a copy of the page, with `fault` put into it."""
    copy = folder / "probe.html"
    copy.write_text(page.read_text().replace("</body>", f"{fault}{PROBE}</body>"))
    if view == "phone":
        copy = folder / "frame.html"
        copy.write_text(FRAME)
    dom, log = browse(chromium, copy, folder / "profile", view, "--dump-dom")
    assert complaints(log) == []
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found, "the probe did not finish"
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module", params=list(VIEWS))
def probed(request: Any, chromium: str, page: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """The view and what the probe measured in it."""
    return request.param, measure(chromium, page, tmp_path_factory.mktemp("probe"), request.param)


def test_charts_are_drawn_and_nothing_scrolls_sideways(probed: tuple[str, Any]) -> None:
    view, out = probed
    assert out["width"] == VIEWS[view][0][0]
    assert out["overflow"] == out["overflowOpen"] == 0
    assert len(out["drawn"]) == 6
    assert all(width > 200 and height > 50 for width, height in out["drawn"])
    assert out["bars"] == 2 * len(sample.language_report().get("layers", []))
    assert out["text"] >= 12
    assert out["brokenFigures"] == []


def test_the_script_reads_out_filters_and_changes_themes(probed: tuple[str, Any]) -> None:
    view, out = probed
    light, dark = "rgb(255, 255, 255)", "rgb(18, 21, 23)"
    own = dark if view == "dark" else light
    assert out["background"] == own
    assert out["themes"] == [["light", light], ["dark", dark], ["auto", own]]
    assert re.fullmatch(r"step \d+\nqat  3\.\d+\ncontrol  3\.\d+\nfloat  3\.\d+", out["readout"])
    shown = sum(e["scheme"].startswith("int4") and ".h.3." in e["name"] for e in sample.coverage())
    assert out["visible"] == shown > 0
    assert out["matches"] == f"{shown} of {len(sample.coverage())} parameters"


def test_rendered_dom_has_the_charts_and_the_log_is_clean(chromium: str, page: Path, tmp_path: Path) -> None:
    dom, log = browse(chromium, page, tmp_path, "light", "--dump-dom")
    assert complaints(log) == []
    assert dom.count("<figure") == 4
    assert 'data-arm="qat"' in dom
    assert "Theme: auto" in dom


def test_a_crowded_page_would_be_noticed(chromium: str, page: Path, tmp_path: Path) -> None:
    fault = "<style>main { min-width: 600px; } td { white-space: normal !important; max-width: 1rem; }</style>"
    out = measure(chromium, page, tmp_path, "phone", fault)
    assert out["overflow"] > 200
    assert "29.6 MB" in out["brokenFigures"]


@pytest.mark.parametrize("fault", ["<script>nothing.here()</script>", '<img src="http://127.0.0.1:9/x.png">'])
def test_a_faulty_page_would_be_noticed(chromium: str, page: Path, tmp_path: Path, fault: str) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(page.read_text().replace("</body>", f"{fault}</body>"))
    assert complaints(browse(chromium, bad, tmp_path / "profile", "light", "--dump-dom")[1])


@pytest.mark.parametrize("view", list(VIEWS))
def test_screenshot(chromium: str, page: Path, tmp_path: Path, view: str) -> None:
    """Written for looking at: `pytest -m browser --basetemp=FOLDER` keeps them."""
    shot = tmp_path / f"{view}.png"
    browse(chromium, page, tmp_path / "profile", view, f"--screenshot={shot}")
    data = shot.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == VIEWS[view][0]
    assert len(data) > 20_000
