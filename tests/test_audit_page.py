"""An audit's page: parsed, and opened in a browser where there is one."""

import re
import shutil
import subprocess
from dataclasses import replace
from html import escape

import pytest
from made_up import LONG_NAME, made_up_report
from models import tiny_model
from pages import check_page

from hf_fused_mlp import audit
from hf_fused_mlp.profiling.page import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def cpu():
    return audit(tiny_model(), gpu_price=3.0, prompt_tokens=24, new_tokens=3, rounds=2)


REPORTS = {
    "three forms": made_up_report(price=2.5),
    "no price": made_up_report(),
    "no difference": made_up_report(fused=1.0, norms=None),
    "too few rounds": made_up_report(rounds=2),
    "nothing to fuse": made_up_report(fused=None, norms=None),
}


@pytest.fixture(params=["cpu", *REPORTS])
def report(request):
    return REPORTS[request.param] if request.param in REPORTS else request.getfixturevalue("cpu")


def test_the_page_is_the_json(report):
    check_page(page(report), report.to_dict())


def words_of(text):
    """What people read: without style, data and tags."""
    text = re.sub(r"<(style|script)\b.*?</\1>", " ", text, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"</?data[^>]*>", "", text)).split())


def test_the_card_comes_first_and_says_all():
    words = words_of(page(REPORTS["three forms"]))
    card = words[: words.index("Prefill: host-bound")]
    for part in (
        "Fuse: fuse_model(model, norms=True)",
        "A whole request: 1.30x (1.29x to 1.31x)",
        "9 paired rounds",
        "1 M new tokens $12 $9.4",
        "What would help more",
        "would gain up to 2.00x",
    ):
        assert part in card, part
    assert "--gpu-price" not in card
    no_price = words_of(page(REPORTS["no price"]))
    assert "--gpu-price" in no_price and "$" not in no_price


def test_a_cpu_has_no_fused_column(cpu):
    words = words_of(page(cpu))
    assert "No verdict on a CPU" in words
    assert "Audit on the GPU that will run the model" in words
    for word in ("speedup", "the GPU waits", "fused + norms"):
        assert word not in words, word


def test_bars_have_milliseconds():
    words = words_of(page(REPORTS["three forms"]))
    assert re.search(
        r"fused \+ norms *1[67]\.?\d? ms MLPs 4\.\d ms everything else 4\.\d ms the GPU waits 8\.\d ms", words
    )


def test_kernel_lists_are_folded_and_side_by_side():
    text = page(REPORTS["three forms"])
    lists = re.findall(r"<details>(.*?)</details>", text, re.DOTALL)
    assert len(lists) == 4
    for found in lists:
        assert re.findall(r"<caption>(.*?)</caption>", found) == ["eager", "fused", "fused + norms"]
        assert f'title="{LONG_NAME.replace("<", "&lt;").replace(">", "&gt;")}"' in found


def test_names_are_no_markup(cpu):
    hostile = replace(cpu, model="</script><script>alert(1)</script>", advice=("<b>&amp;",))
    check_page(page(hostile), hostile.to_dict())
    assert "<script>" not in page(hostile)
    assert "<b>" not in page(hostile)


def test_the_page_is_valid_html(report):
    html5lib = pytest.importorskip("html5lib")
    html5lib.HTMLParser(strict=True).parse(page(report))


COLOURS = re.compile(r"--(\w+): (#[0-9a-f]+)")


def contrast(a, b):
    """WCAG's ratio of two colours."""

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_text_is_readable_in_the_light_and_in_the_dark():
    style = re.search(r"<style>(.*)</style>", page(REPORTS["no price"]), re.DOTALL)[1]
    light, _, dark = style.partition("@media (prefers-color-scheme: dark)")
    light, dark = dict(COLOURS.findall(light)), dict(COLOURS.findall(dark))
    assert light.keys() == dark.keys() >= {"text", "quiet", "page", "card"}
    for colours in (light, dark):
        for paper in ("page", "card"):
            assert min(contrast(colours[name], colours[paper]) for name in ("text", "quiet")) > 4.5


def in_browser(file, directory, *options):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory / 'profile'}"]
    command = [BROWSER, *flags, "--enable-logging=stderr", *options, file.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "CONSOLE" not in result.stderr
    return result.stdout


# a window may be wider than it was asked for, a frame is not
FRAME = """<!DOCTYPE html><title></title>
<iframe width="{width}" height="900" style="border: 0" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  page.querySelectorAll("details").forEach(found => found.open = true);
  const inside = element => element.getBoundingClientRect().right <= {width};
  const whole = element => element.scrollWidth <= element.clientWidth + 1 || element.matches(".kernel, span, data, i");
  const bad = [...page.body.querySelectorAll("*")].filter(element => !inside(element) || !whole(element));
  document.title = [page.documentElement.scrollWidth <= {width}, ...bad.map(element => element.outerHTML)].join(" ");
}};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_the_page_in_a_browser(report, width, scheme, tmp_path):
    """At both widths nothing is wider than the window, and no cell clips its text; kernels' names are shortened."""
    colours = f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}"
    file, frame, shot = tmp_path / "audit.html", tmp_path / "frame.html", tmp_path / f"{scheme}-{width}.png"
    file.write_text(page(report), encoding="utf-8")
    check_page(in_browser(file, tmp_path, "--dump-dom"), report.to_dict())
    frame.write_text(FRAME.format(width=width, page=escape(page(report))), encoding="utf-8")
    title = re.search("<title>(.*?)</title>", in_browser(frame, tmp_path, "--dump-dom"), re.DOTALL)[1]
    assert title == "true"
    in_browser(file, tmp_path, colours, f"--window-size={width},2000", f"--screenshot={shot}")
    assert shot.stat().st_size > 10_000
