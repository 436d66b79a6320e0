"""The commands, as a person types them."""

import json
import subprocess
import sys

import pytest
import typer
from models import tiny_model
from rich.markup import escape
from typer.testing import CliRunner

from hf_fused_mlp.cli import app
from hf_fused_mlp.cli.console import fail
from hf_fused_mlp.cli.run import first_difference, report_table
from hf_fused_mlp.fuse import FusionReport, ModuleStatus


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.mark.slow
def test_run_without_arguments_is_the_demo():
    result = subprocess.run([sys.executable, "-m", "hf_fused_mlp", "run"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "30 of 30 MLPs are fused" in result.stdout
    assert "The capital of France is Paris." in result.stdout
    assert "fused and original agree on all" in result.stdout


@pytest.mark.slow
def test_run_json():
    command = [sys.executable, "-m", "hf_fused_mlp", "run", "--json", "--max-new-tokens", "3"]
    result = subprocess.run(command, capture_output=True, text=True)
    answer = json.loads(result.stdout)
    assert answer["first_difference"] is None
    assert answer["fused"]["tokens"] == answer["original"]["tokens"]
    assert len(answer["fused"]["tokens"]) == 3
    assert answer["report"]["fused"] == answer["report"]["total"] == 30


def test_run_a_directory(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tiny_model().save_pretrained(tmp_path)
    vocabulary = {"a": 0, "b": 1, "<unk>": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    ).save_pretrained(tmp_path)
    result = invoke("run", tmp_path, "--prompt", "a", "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output
    assert "2 of 2 MLPs are fused" in result.stdout
    assert "fused and original agree on all 2 tokens" in result.stdout


@pytest.mark.parametrize(
    "args, words",
    [
        (["run", "/no/such/directory"], "/no/such/directory: no such directory"),
        (["run", "--dtype", "int4"], "dtype 'int4': expected one of auto, float32"),
        (["bench", "--table", "/no/such/file.json"], "/no/such/file.json"),
        (["bench", "--shapes", "gpt-5"], "unknown shape 'gpt-5'; the shapes are llama-3-8b"),
        (
            ["bench", "--impl", "fused,fastest"],
            "unknown implementation 'fastest'; the implementations are fused, eager",
        ),
        (["bench", "--m", "one"], "m 'one': expected token counts"),
        (["tune", "/no/such/directory"], "/no/such/directory: no such directory"),
        (["tune", "phi-3-mini", "--m", "1,0"], "m '1,0': expected token counts"),
        (["tune", "phi-3-mini", "--m", "1,,2"], "m '1,,2': expected token counts"),
        (["tune", "phi-3-mini", "--dtype", "int4"], "dtype 'int4': expected auto, bfloat16"),
        (["tune"], "Missing argument"),
    ],
)
def test_errors_are_one_line(args, words):
    result = invoke(*args)
    assert result.exit_code == 2
    assert words in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_brackets_in_messages_are_no_markup(capsys):
    with pytest.raises(typer.Exit):
        fail("the spec [red] names [/no] style")
    assert "the spec [red] names [/no] style" in capsys.readouterr().err
    reason = "remove [/it], or pass exclude=[...]"
    report = FusionReport((ModuleStatus("mlp", "SomeMLP", "skipped", reason),))
    assert list(report_table(report).columns[3].cells) == [escape(reason)]


def test_run_with_nothing_fusable(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)).save_pretrained(tmp_path)
    result = invoke("run", tmp_path)
    assert result.exit_code == 2
    assert "no MLP of this model was fused" in result.output


@pytest.mark.parametrize(
    "a, b, expected", [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None)]
)
def test_first_difference(a, b, expected):
    assert first_difference(a, b) == expected
