"""`python -m hf_fused_mlp`."""

from hf_fused_mlp.cli import app

app()
