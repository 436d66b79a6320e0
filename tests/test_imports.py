"""The layers of docs/how-it-works.md: who may import whom, and that importing needs no Triton and no GPU."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_fused_mlp

PACKAGE = Path(hf_fused_mlp.__file__).parent

# each part may import itself and the parts listed
MAY_IMPORT = {
    "types": {"torch"},
    "version": set(),
    "activations": {"torch", "children"},
    "weights": {"torch"},
    "validation": {"torch"},
    "reference": {"torch", "activations", "types"},
    "memory": {"torch"},
    "source": set(),
    "files": set(),
    "recognition": {"torch", "activations", "originals", "types", "source"},
    "originals": {"torch"},
    "threads": {"torch"},
    "children": {"torch", "originals"},
    "registry": {"torch", "activations", "children", "originals", "recognition", "types"},
    "kernels": {"torch", "triton", "types", "reference"},
    "tuning": {"torch", "triton", "platformdirs", "types", "files", "reference", "validation", "kernels", "memory"},
    "dispatch": {"torch", "triton", "types", "weights", "reference", "kernels", "tuning", "memory"},
    "ops": {"torch", "types", "activations", "reference", "dispatch"},
    "swap": {"torch", "threads"},
    "modules": {
        "torch",
        "types",
        "activations",
        "recognition",
        "children",
        "originals",
        "weights",
        "registry",
        "swap",
        "threads",
        "memory",
        "ops",
    },
    "norms": {"torch", "children", "originals", "source", "recognition", "swap", "memory", "ops"},
    "fuse": {"torch", "children", "originals", "recognition", "registry", "swap", "threads", "modules", "norms"},
    "numerics": {"torch", "validation", "ops", "swap", "modules", "fuse"},
    "integrations": {"torch", "transformers", "fuse"},
    "profiling": {
        "torch",
        "transformers",
        "jinja2",
        "markupsafe",
        "types",
        "version",
        "registry",
        "swap",
        "modules",
        "dispatch",
        "tuning",
        "fuse",
    },
    "bench": {
        "liger_kernel",
        "quack",
        "matplotlib",
        "torch",
        "transformers",
        "types",
        "files",
        "activations",
        "swap",
        "modules",
        "norms",
        "dispatch",
        "fuse",
        "tuning",
        "validation",
        "integrations",
        "profiling",
    },
    "cli": {
        "torch",
        "transformers",
        "typer",
        "rich",
        "types",
        "activations",
        "registry",
        "fuse",
        "tuning",
        "numerics",
        "integrations",
        "profiling",
        "bench",
    },
    "__init__": {"types", "version", "registry", "fuse", "numerics", "integrations", "profiling"},
    "__main__": {"cli"},
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
    assert imported - set(sys.stdlib_module_names) - {part} <= MAY_IMPORT[part]


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
