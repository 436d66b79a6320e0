"""An audit's page: parsed, and opened in a browser where there is one."""

import shutil
import subprocess
from dataclasses import replace

import pytest
from models import tiny_model
from pages import check_page

from hf_fused_mlp import audit
from hf_fused_mlp.profiling.advice import advise
from hf_fused_mlp.profiling.page import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def report():
    return audit(tiny_model(), gpu_price=3.0, prompt_tokens=24, new_tokens=3, rounds=2)


def test_the_page_is_the_json(report):
    check_page(page(report), report.to_dict())


def on_a_gpu(report):
    """The report as if a GPU had been half idle."""
    phases = []
    for phase in report.phases:
        forms = {
            form: replace(getattr(phase, form), gpu_busy_share=0.5, mlp_gpu_share=0.25, mlp_wall_share=0.125)
            for form in ("original", "fused")
        }
        phases.append(replace(phase, bound="host-bound", **forms))
    return replace(report, on_gpu=True, phases=tuple(phases))


def test_the_page_of_a_gpu(report):
    gpu = on_a_gpu(report)
    text = page(gpu)
    check_page(text, gpu.to_dict())
    assert "the GPU waits" in text
    assert "the GPU waits" not in page(report)
    assert any("would gain up to 2.00x" in sentence for sentence in advise(gpu))
    assert any("5 RMSNorms are about eight launches each" in sentence for sentence in advise(gpu))
    assert not any("RMSNorms" in sentence for sentence in (*advise(report), *advise(replace(gpu, fusable_norms=0))))


def test_names_are_no_markup(report):
    hostile = replace(report, model="</script><script>alert(1)</script>", advice=("<b>&amp;",))
    check_page(page(hostile), hostile.to_dict())
    assert "<script>" not in page(hostile)
    assert "<b>" not in page(hostile)


def test_the_page_is_valid_html(report):
    html5lib = pytest.importorskip("html5lib")
    html5lib.HTMLParser(strict=True).parse(page(on_a_gpu(report)))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_the_page_in_a_browser(report, tmp_path):
    file = tmp_path / "audit.html"
    file.write_text(page(report), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [BROWSER, *options, "--enable-logging=stderr", "--dump-dom", file.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    check_page(result.stdout, report.to_dict())
    assert "CONSOLE" not in result.stderr
