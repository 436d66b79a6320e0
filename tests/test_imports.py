"""The layers of docs/how-it-works.md: who may import whom, and that importing needs no Triton and no GPU."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_fused_mlp

PACKAGE = Path(hf_fused_mlp.__file__).parent

# a part may import itself and the parts in the lines above its own
LAYERS = (
    *[("version", "types", "activations", "originals", "threads", "files", "logs", "options", "report", "validation")],
    ("calls", "modes", "reference", "launch_cache"),
    ("reading", "weights", "swap"),
    ("kernels",),
    ("tuning",),
    ("ops",),
    ("families",),
    ("tune",),
    ("fuse",),
    ("numerics", "profiling", "integrations"),
    ("bench",),
    ("cli",),
    ("__init__",),
    ("__main__",),
)
# the packages that a part may import besides torch
PACKAGES = {
    "kernels": {"triton"},
    "tuning": {"triton", "platformdirs", "filelock"},
    "ops": {"triton"},
    "tune": {"rich"},
    "integrations": {"transformers"},
    "profiling": {"transformers", "jinja2", "markupsafe"},
    "bench": {"transformers", "accelerate", "peft", "liger_kernel", "quack", "torchao", "matplotlib"},
    "cli": {"transformers", "typer", "rich"},
}


def part_of(module):
    """`hf_fused_mlp.kernels.gemm` is in `kernels`; other modules go by their first name."""
    names = module.split(".")
    return (names[1] if len(names) > 1 else "__init__") if names[0] == "hf_fused_mlp" else names[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {part_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            imported |= {part_of(name if node.module == "hf_fused_mlp" else node.module) for name in names}
    below = LAYERS[: next(place for place, layer in enumerate(LAYERS) if part in layer)]
    allowed = {part, "torch", *PACKAGES.get(part, ()), *(name for layer in below for name in layer)}
    assert imported - set(sys.stdlib_module_names) <= allowed


def test_fuse_knows_no_family():
    nodes = ast.walk(ast.parse((PACKAGE / "fuse.py").read_text()))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and "families" in str(node.module)]
    assert {alias.name for node in imports for alias in node.names} == {"FAMILIES", "Family"}


def test_no_file_is_long():
    assert max(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")) <= 400


def test_import_and_cpu_use_need_no_triton():
    script = """
import sys
sys.modules["triton"] = None
import torch, hf_fused_mlp, hf_fused_mlp.cli
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
model = hf_fused_mlp.fuse_model(LlamaForCausalLM(config).eval(), strict=True)
print(model(torch.tensor([[1, 2]])).logits.shape)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 2, 9])" in result.stdout
