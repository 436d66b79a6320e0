"""Benchmarks: fused MLPs against the modules they replace and against other packages.

Each measurement is one module and one command, `hf-fused-mlp bench NAME`. Modules here raise errors and log
notes to the logger `hf_fused_mlp.bench`; the commands in `hf_fused_mlp.cli.bench` print and exit.
"""
