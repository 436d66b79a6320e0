"""The wheel: what is in it, and that it works where it alone is installed beside its dependencies. And the locks."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hf_fused_mlp.version import __version__

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_fused_mlp"
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "site")

SMOKE = """
import hf_fused_mlp
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
model = hf_fused_mlp.fuse_model(LlamaForCausalLM(config).eval(), strict=True)
model.generate(max_new_tokens=2, do_sample=False)
print(hf_fused_mlp.__file__)
print(hf_fused_mlp.fusion_report(model))
"""


def run(*command, **kw):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **kw)


def metadata():
    """The `project` table of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since setuptools puts into a wheel what an earlier build has left beside the sources."""
    source, built = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    # with the environment's setuptools: one that pip fetches may be another every day
    result = run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", source, "-w", built)
    assert result.returncode == 0, result.stderr
    (file,) = built.iterdir()
    return file


@pytest.mark.slow
def test_what_is_in_the_wheel(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {PACKAGE / "py.typed"}
    for pattern in ("*.py", "tuning/plans/*.json", "profiling/*.jinja"):
        expected |= {*PACKAGE.rglob(pattern)}
    assert names == {path.relative_to(ROOT).as_posix() for path in expected}


@pytest.mark.slow
def test_the_wheel_alone(wheel, tmp_path):
    target = tmp_path / "installed"
    result = run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel)
    assert result.returncode == 0, result.stderr
    environment = os.environ | {"PYTHONPATH": str(target)}
    result = run(sys.executable, "-c", SMOKE, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(target / "hf_fused_mlp"))
    assert "1 of 1 MLPs are fused" in result.stdout
    result = run(target / "bin/hf-fused-mlp", "--help", cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert "bench" in result.stdout


@pytest.mark.parametrize("lock", ["constraints.txt", "constraints-floor.txt"])
def test_the_lock_has_all_that_is_installed(lock):
    """`make lock` ran after the last change of a range."""
    project = metadata()
    extras = project["optional-dependencies"]
    pins = {}
    for line in (ROOT / "tests" / lock).read_text().splitlines():
        if not line.startswith("#"):
            pin = Requirement(line)
            (exact,) = pin.specifier
            assert exact.operator == "=="
            pins.setdefault(canonicalize_name(pin.name), []).append(exact.version)
    for asked in map(Requirement, (*project["dependencies"], *extras["dev"], *extras["docs"], "pip", "setuptools")):
        if asked.name == "torch":
            assert "torch" not in pins, "which one it is depends on the machine"
        else:
            assert all(asked.specifier.contains(version) for version in pins[canonicalize_name(asked.name)]), asked


def test_the_version_and_its_date_are_said_once_everywhere():
    heading = re.search(r"^## \[(.*?)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert heading.groups() == (__version__, str(citation["date-released"]))
    assert citation["version"] == __version__


def test_links_of_the_readme_work_without_the_repository():
    """A package index shows the README alone."""
    address = metadata().get("urls", {}).get("Repository")
    if address is None:
        pytest.skip("the project has no public address yet; see CONTRIBUTING.md, Release")
    targets = re.findall(r"\]\(([^)]+)", (ROOT / "README.md").read_text())
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_workflows_and_issue_forms():
    """They run targets that exist, and ask for what a report needs."""
    makefile = (ROOT / "Makefile").read_text()
    for workflow in (ROOT / ".github/workflows").glob("*.yml"):
        jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
        steps = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
        targets = re.findall(r"make (\S+)", "\n".join(steps))
        assert targets
        for target in targets:
            assert f"\n{target.replace('.venv-newest', '$(VENV)')}:" in makefile, f"{workflow.name}: {target}"
    for name in ("bug_report", "model_not_fused"):
        form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
        assert "hf-fused-mlp env" in str(form["body"])


def test_make_help_lists_every_target():
    if shutil.which("make") is None:
        pytest.skip("needs make")
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    listed = re.findall(r"^make (\S+) +\S", run("make", "help", cwd=ROOT).stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony)
