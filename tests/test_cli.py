"""The commands, as a person types them."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import transformers
import typer
from made_up import rounds_us
from models import tiny_model
from rich.markup import escape
from typer.testing import CliRunner

from hf_fused_mlp.cli import app
from hf_fused_mlp.cli.console import fail, output
from hf_fused_mlp.cli.list import table as list_table
from hf_fused_mlp.cli.model_types import Entry, Found
from hf_fused_mlp.cli.run import measure, print_answers, report_table
from hf_fused_mlp.cli.validate import layer_table
from hf_fused_mlp.numerics.logits import first_difference
from hf_fused_mlp.numerics.report import LayerNumerics
from hf_fused_mlp.profiling.speed import timed
from hf_fused_mlp.report import FamilyReport, FusionReport, ModuleStatus
from hf_fused_mlp.swap import Fused
from hf_fused_mlp.tuning import cache
from hf_fused_mlp.types import GPU
from hf_fused_mlp.version import __version__


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.mark.slow
def test_run_without_arguments_is_the_demo():
    result = subprocess.run([sys.executable, "-m", "hf_fused_mlp", "run"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "30 of 30 MLPs are fused" in result.stdout
    assert "The capital of France is Paris." in result.stdout
    assert "fused and original agree on all" in result.stdout
    assert result.stderr == ""


@pytest.mark.slow
def test_run_json():
    command = [sys.executable, "-m", "hf_fused_mlp", "run", "--json", "--max-new-tokens", "3"]
    result = subprocess.run(command, capture_output=True, text=True)
    answer = json.loads(result.stdout)
    assert answer["first_difference"] is None
    assert answer["fused"]["tokens"] == answer["original"]["tokens"]
    assert len(answer["fused"]["tokens"]) == 3
    assert answer["report"]["fused"] == answer["report"]["total"] == 30
    assert answer["speed"] == []


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
    assert "Speed needs a GPU" in result.stdout
    assert "tokens/s" not in result.stdout


def test_run_times_prefill_and_decode(capsys):
    """On a CPU, where both forms run the same, for the code's sake."""
    model = tiny_model()
    rows = measure(model)
    assert [row["phase"] for row in rows] == ["prefill, 111 tokens", "decode, one token after 111"]
    for row in rows:
        assert row["speedup"]["low"] <= row["speedup"]["median"] <= row["speedup"]["high"]
    assert not any(isinstance(module, Fused) for module in model.modules())
    assert measure(torch.nn.Linear(2, 2)) == []
    assert "note: speed was not measured: audit: Linear is not a model" in capsys.readouterr().err


def test_run_prints_the_rows_that_matter(capsys):
    """Of made-up times."""
    walls = {"original": rounds_us(21000.0), "fused_norms": rounds_us(21000.0, 1.5)}
    same = {"original": rounds_us(900.0), "fused_norms": rounds_us(900.0, 1.0)}
    speed = [asdict(row) for row in timed({"prefill": walls, "decode": same})]
    answer = {"text": "Yes.", "tokens": [1, 2]}
    result = {"prompt": "?", "dtype": "bfloat16", "device": "a made-up GPU", "speed": speed}
    print_answers(result | {"fused": answer, "original": answer, "first_difference": None})
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "fused and original agree on all 2 tokens",
        "a made-up GPU",
        "prefill 21.8 ms 14.5 ms 1.50x (1.49x to 1.51x)",
        "decode 936 us 932 us no measurable difference (0.99x to 1.01x)",
        "bench generate MODEL --mode static-compile",
    ):
        assert words in printed, printed


@pytest.mark.parametrize(
    "args, words",
    [
        (["run", "/no/such/directory"], "/no/such/directory: no such directory"),
        (["run", "--dtype", "int4"], "dtype 'int4': expected one of auto, float32"),
        (["bench", "mlp", "--table", "/no/such/file.json"], "/no/such/file.json"),
        (["bench", "mlp", "--shapes", "gpt-5"], "unknown shape 'gpt-5'; the shapes are llama-3-8b"),
        (
            ["bench", "mlp", "--impl", "fused,fastest"],
            "unknown implementation 'fastest'; the implementations are fused, eager",
        ),
        (["bench", "mlp", "--m", "one"], "m 'one': expected token counts"),
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
    report = FusionReport((FamilyReport("mlps", "MLP", (ModuleStatus("mlp", "SomeMLP", "skipped", reason),)),))
    assert list(report_table(report).columns[3].cells) == [escape(reason)]


def changed(model, name, change):
    """A copy of a model's directory, in which `change` has damaged something."""
    copy = model.with_name(name)
    shutil.copytree(model, copy)
    change(copy)
    return copy


def config(**changes):
    def change(directory):
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def halve(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BROKEN = {
    "half of the weights": halve,
    "no weights": lambda directory: (directory / "model.safetensors").unlink(),
    "weights that are none": lambda directory: (directory / "model.safetensors").write_text("weights"),
    "weights of another shape": config(intermediate_size=99),
    "an unknown activation": config(hidden_act="nope"),
    "a negative size": config(hidden_size=-5),
    "a size in words": config(hidden_size="large"),
    "no heads": config(num_attention_heads=0),
    "an unknown model type": config(model_type="nope"),
    "no JSON": lambda directory: (directory / "config.json").write_text("{"),
    "a list": lambda directory: (directory / "config.json").write_text("[]"),
    "null": lambda directory: (directory / "config.json").write_text("null"),
    "other bytes": lambda directory: (directory / "config.json").write_bytes(b"\xff\xfe"),
    "no config": lambda directory: (directory / "config.json").unlink(),
    "no tokenizer": lambda directory: None,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "good"
    tiny_model().save_pretrained(directory)
    return directory


def assert_is_one_line(result, code=2):
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > 15, result.stderr


@pytest.mark.parametrize("command", ["run", "audit", "validate", "tune"])
@pytest.mark.parametrize("what", BROKEN)
def test_broken_models(what, command, saved, tmp_path_factory):
    if command == "audit" and what == "no tokenizer":
        pytest.skip("audit needs none")
    directory = changed(saved, f"{command} {what}", BROKEN[what])
    assert_is_one_line(invoke(command, directory))


@pytest.mark.parametrize(
    "args",
    [
        ["run", "--device-map", "cuda:77"],
        ["run", "--device-map", "abacus"],
        ["audit", "--device-map", "cuda:77"],
        ["audit", "--prompt-tokens", 10**6],
        ["audit", "--batch", 10**17],
        ["audit", "--gpu-price", "inf"],
        ["audit", "--html", "/dev/null/page.html"],
        ["audit", "--trace", "/dev/null/traces"],
        ["validate", "--reference", "/no/such/directory"],
        ["validate", "--text", "{latin}"],
        ["tune", "--m", "9" * 5000],
        ["tune", "--m", "1,99999999999"],
        ["bench", "mlp", "--m", "9" * 5000],
        ["bench", "mlp", "--table", "{latin}"],
        ["bench", "mlp", "--table", "{rows}"],
        ["list", "--model-type", "[/nope]"],
    ],
    ids=lambda args: " ".join(map(str, args))[:40],
)
def test_mistakes_are_one_line(args, saved, tmp_path):
    (tmp_path / "latin").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "rows").write_text('{"timed": "forward", "rows": [{}, 7]}')
    command, *options = (str(arg).format(latin=tmp_path / "latin", rows=tmp_path / "rows") for arg in args)
    model = [saved] if command in ("run", "audit", "validate", "tune") else []
    tokenizer_of(saved)
    assert_is_one_line(invoke(command, *model, *options))


def tokenizer_of(directory):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "<unk>": 2}
    model = models.WordLevel(vocabulary, unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(directory)


def test_a_traceback_where_it_is_asked_for(saved, monkeypatch):
    directory = changed(saved, "for a traceback", config(hidden_act="nope"))
    result = invoke("run", directory)
    assert result.exit_code == 2 and "KeyError: 'nope'; set HF_FUSED_MLP_DEBUG=1 to see where" in result.stderr
    monkeypatch.setenv("HF_FUSED_MLP_DEBUG", "1")
    result = invoke("run", directory)
    assert isinstance(result.exception, KeyError) and result.exit_code == 1


HELP = """
import sys
from typer.testing import CliRunner
from hf_fused_mlp.cli import BENCH, COMMANDS, app
commands = [[], ["bench"], *([row.name] for row in COMMANDS), *(["bench", row.name] for row in BENCH)]
for arguments in [["--version"], *([*command, "--help"] for command in commands)]:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and len(result.stdout) > 10, result.output
print({"torch", "transformers", "triton", "numpy", "jinja2"} & sys.modules.keys())
"""


def test_help_imports_nothing_that_takes_time():
    result = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr


def test_version():
    assert invoke("--version").stdout == f"hf-fused-mlp {__version__}\n"


def test_env(plan_cache):
    lines = dict(line.split(": ", 1) for line in invoke("env").stdout.splitlines())
    assert lines["hf-fused-mlp"] == __version__
    assert lines["torch"] == torch.__version__
    assert lines["transformers"] == transformers.__version__
    assert lines["plan cache"] == str(plan_cache)
    assert "GPU" in lines and "driver" in lines


def test_env_on_gpus(monkeypatch):
    document = json.loads((cache.SHIPPED / "nvidia-h100-80gb-hbm3-132.json").read_text())
    gpu = GPU(document["gpu"], document["num_sms"], (9, 0), 1 << 18)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(GPU, "of", lambda device: gpu)
    lines = invoke("env").stdout.splitlines()
    assert f"GPU: 2 x {gpu.name}, compute capability 9.0, 132 multiprocessors" in lines
    assert f"plans: {len(document['plans'])} that ship for {gpu.name}, 0 of your own" in lines
    assert not any(line.startswith("kernels") for line in lines), "nothing speaks against them"


def test_what_other_libraries_say_of_themselves_is_not_printed():
    result = subprocess.run(COMMAND, capture_output=True, text=True)
    json.loads(result.stdout)
    assert result.stderr == ""


COMMAND = [sys.executable, "-m", "hf_fused_mlp", "list", "--model-type", "llama", "--json"]


def test_output_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        result = subprocess.run(COMMAND, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device"
    assert "Exception" not in result.stderr


def test_who_reads_the_output_may_have_seen_enough():
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert not any(line.startswith(("error", "Traceback", "Exception")) for line in said.splitlines()), said


STRANGE = ["[red]MLP", "[/]MLP", "[/red]", ":smile:MLP", "a.b[0].MLP", "[link=x]MLP"]


@pytest.mark.parametrize("name", STRANGE)
def test_names_are_printed_as_they_are(name, capsys):
    status = ModuleStatus(name, name, "skipped", f"{name} is odd")
    report = FusionReport((FamilyReport("mlps", "MLP", (status,)),))
    output.print(report_table(report))
    entry = Entry(name, name, (Found(name, 1, "skipped", name),))
    output.print(list_table([entry]))
    layer = LayerNumerics(name, name, "original forward", None, 1, "float64", None, None, None)
    for passed in (True, False):
        output.print(
            layer_table(
                SimpleNamespace(passed=passed, layers=[layer], dtype="", device="cpu", grouped=lambda: {0: [layer]})
            )
        )
    assert capsys.readouterr().out.count(name) == 7
    with pytest.raises(typer.Exit):
        fail(f"of {name}\\")
    assert f"error: of {name}\\\n" == capsys.readouterr().err


def test_run_with_nothing_fusable(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50}
    GPT2LMHeadModel(GPT2Config(**sizes, activation_function="tanh")).save_pretrained(tmp_path)
    result = invoke("run", tmp_path)
    assert result.exit_code == 2
    assert "no MLP of this model was fused" in result.output
    result = invoke("run", tmp_path, "--json")
    assert result.stdout == "" and "GPT2MLP" in result.stderr, "the table that the error speaks of"


@pytest.mark.parametrize(
    "a, b, expected", [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None)]
)
def test_first_difference(a, b, expected):
    assert first_difference(a, b) == expected
