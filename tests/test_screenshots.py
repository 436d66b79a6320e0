"""The pages in headless Chromium, where it is installed: no horizontal overflow and no clipped column.

1400 and 400 px wide, light and dark. The page measures itself in a script and writes what it found into the document,
which Chromium prints with ``--dump-dom``; a screenshot is kept under ``$SCREENSHOTS`` if that is set.
"""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import made_up_report

from hf_fused_mlp.profiling.page import page as audit_page

ROOT = Path(__file__).parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium on the PATH, or its path in $CHROMIUM"),
]

# an iframe of the width to test: Chromium's own windows have a smallest width
FRAME = """<!doctype html><body style="margin:0">
<iframe src="PAGE" width="WIDTH" height="900" style="border:0"></iframe>
<script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, width = WIDTH, found = {wide: [], clipped: []};
  found.background = getComputedStyle(page.body).backgroundColor;
  found.text = page.body.innerText.length;
  found.scroll = page.documentElement.scrollWidth;
  const name = e => `${e.tagName}.${e.getAttribute("class") || ""} ${e.textContent.trim().slice(0, 40)}`;
  const boxes = e => { const a = []; for (let b = e.parentElement; b; b = b.parentElement) a.push(b); return a; };
  for (const e of page.querySelectorAll("table, img, svg, pre, h1, h2, p, td, th")) {
    const box = e.getBoundingClientRect();
    if (!box.width || box.right <= width + 1) continue;
    const styles = boxes(e).map(b => getComputedStyle(b).overflowX);
    if (styles.some(s => s == "auto" || s == "scroll")) continue;
    (styles.some(s => s == "hidden" || s == "clip") ? found.clipped : found.wide).push(name(e));
  }
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.replaceChildren(out);
};
</script>"""


def browse(url, *options):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", *options, url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The site's home and performance pages, and the page of an audit, by name."""

    pytest.importorskip("mkdocs")
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", site]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    audit = site / "audit.html"
    audit.write_text(audit_page(made_up_report(price=2.5)))
    return {"home": site / "index.html", "performance": site / "performance/index.html", "audit": audit}


@pytest.mark.parametrize("name", ["home", "performance", "audit"])
@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows(name, width, scheme, pages, tmp_path):
    page = pages[name]
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(FRAME.replace("PAGE", page.name).replace("WIDTH", str(width)))
    options = [f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--window-size=1500,1000"]
    if scheme == "dark":
        options.append("--blink-settings=preferredColorScheme=0")
    text = browse(frame.as_uri(), "--dump-dom", *options)
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', text, re.DOTALL)[1]))
    assert found["text"] > 500
    assert (found["wide"], found["clipped"]) == ([], [])
    assert found["scroll"] <= width + 1
    brightness = sum(map(int, re.findall(r"\d+", found["background"])[:3]))
    if found["background"] != "rgba(0, 0, 0, 0)":
        assert (brightness < 384) == (scheme == "dark"), found["background"]
    if folder := os.environ.get("SCREENSHOTS"):
        file = Path(folder, f"{name}-{width}-{scheme}.png")
        browse(page.as_uri(), *options, f"--screenshot={file.resolve()}", f"--window-size={width},2400")
        assert file.stat().st_size > 5000
