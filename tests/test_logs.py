"""What users read without configuring logging: a prefix, one line a model, at the verbosity of Transformers."""

import logging
import subprocess
import sys

import pytest
from models import tiny_model

from hf_fused_mlp import FusionError, fuse, fuse_model, logs
from hf_fused_mlp.options import FusionOptions

SCRIPT = """
import logging
from transformers import LlamaConfig, LlamaForCausalLM, logging as verbosity
import hf_fused_mlp
config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(config)
hf_fused_mlp.fuse_model(model)
verbosity.set_verbosity_error()
hf_fused_mlp.fuse_model(model)
verbosity.set_verbosity_warning()
logging.basicConfig(format="app: %(message)s")
hf_fused_mlp.fuse_model(model)
"""


def test_a_line_is_visible_until_it_is_silenced_or_the_application_logs():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if "MLPs" in line]
    assert lines == ["[hf_fused_mlp] fused 1 of 1 MLPs", "app: fused 1 of 1 MLPs"], result.stderr


@pytest.mark.parametrize(
    "verbosity, shown", [("debug", 3), ("info", 3), ("warning", 3), ("error", 1), ("critical", 0)]
)
def test_the_verbosity_is_that_of_transformers(verbosity, shown):
    from transformers.utils import logging as transformers_logging

    records = [
        logging.LogRecord("hf_fused_mlp", level, "", 0, "", (), None)
        for level in (logging.INFO, logging.WARNING, logging.ERROR)
    ]
    before = transformers_logging.get_verbosity()
    try:
        transformers_logging.set_verbosity(transformers_logging.log_levels[verbosity])
        assert [logs._is_verbose_enough(record) for record in records] == [False] * (3 - shown) + [True] * shown
    finally:
        transformers_logging.set_verbosity(before)


def test_what_an_application_has_set_stays(monkeypatch):
    logger, own = logging.Logger("another", logging.ERROR), logging.NullHandler()
    logger.addHandler(own)
    monkeypatch.setattr(logs, "logger", logger)
    logs.configure()
    assert (logger.level, logger.handlers) == (logging.ERROR, [own])


def test_strict_says_once_that_no_kernel_runs(caplog):
    fuse._warn_of_no_kernels.cache_clear()
    for _ in range(2):
        fuse_model(tiny_model(), strict=True)
    assert caplog.messages == [
        "strict: fused, but no kernel runs: on cpu, where the original forward runs; move the model to a GPU"
    ]
    caplog.clear()
    fuse._warn_of_no_kernels.cache_clear()
    fuse_model(tiny_model())
    assert caplog.messages == []


@pytest.mark.parametrize(
    "cause",
    [
        lambda: fuse_model(tiny_model(), exclude=["nothing"]),
        lambda: fuse_model(tiny_model().lm_head, strict=True),
        lambda: FusionOptions.of_flag("use_fused_mlp", "yes"),
        lambda: FusionOptions.of_flag("use_fused_mlp", {"strickt": True}),
    ],
    ids=["exclude", "strict", "flag", "option"],
)
def test_options_that_cannot_be_met_are_a_fusion_error(cause):
    with pytest.raises(FusionError) as error:
        cause()
    assert isinstance(error.value, ValueError), "which it was before it had a class"
