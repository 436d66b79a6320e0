"""`hf-fused-mlp list`, docs/coverage.md, which it writes, and all of Transformers, which both are about."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from models import assert_fused_computes_the_same
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel
from typer.testing import CliRunner

from hf_fused_mlp import fuse_model, fusion_report
from hf_fused_mlp.cli import app
from hf_fused_mlp.cli.coverage import LIGER_MODEL_TYPES, OUTCOMES, coverage_page, outcome_of, summary
from hf_fused_mlp.cli.list import table
from hf_fused_mlp.cli.model_types import LACKING, MODEL_TYPES, Entry, Found, examine
from hf_fused_mlp.reading.mlp import MLPKind, recognise

H, I = 12, 20
PAGE = Path(__file__).parent.parent / "docs/coverage.md"

FUSED = Found("AMLP", 2, "fusable", None)
SKIPPED = Found("BMLP", 3, "skipped", "BMLP clamps; register [it]")
EXPERTS = [Found("BMoE", count, "skipped", f"experts ([{count}, 6]) are skipped") for count in (4, 5)]
ENTRIES = [
    Entry("llama", "AModel", (FUSED,)),
    Entry("mixtral", "BModel", (FUSED, SKIPPED, *EXPERTS)),
    Entry("gpt_oss", "CModel", (SKIPPED,)),
    Entry("bert", "DModel"),
    Entry("mllama_text_model", error="it needs timm, which is not installed"),
    Entry("other", error="its default config builds no model: KeyError: 'one'"),
    Entry("another", error="its default config builds no model: KeyError: 'two'"),
]


def invoke(*args):
    return CliRunner().invoke(app, ["list", *args])


@pytest.mark.parametrize(
    "model_type, mlps",
    [
        ("llama", [("LlamaMLP", 32, "fusable")]),
        ("phi3", [("Phi3MLP", 32, "fusable")]),
        ("nemotron", [("NemotronMLP", 32, "fusable")]),
        ("falcon_h1", [("FalconH1MLP", 32, "skipped")]),
        ("gpt2", [("GPT2MLP", 12, "fusable")]),
        ("deepseek_v3", [("DeepseekV3MLP", 61, "fusable"), ("DeepseekV3Experts", 58, "fusable")]),
        ("bert", [("BertIntermediate", 12, "fusable")]),
        ("vits", [("VitsFeedForward", 6, "skipped")]),
        ("resnet", []),
        # towers of two kinds, and what joins them
        (
            "llava",
            [("CLIPMLP", 24, "fusable"), ("LlavaMultiModalProjector", 1, "fusable"), ("LlamaMLP", 32, "fusable")],
        ),
        ("paligemma", [("SiglipMLP", 27, "fusable"), ("GemmaMLP", 18, "fusable")]),
        ("mistral3", [("PixtralMLP", 24, "fusable"), ("MistralMLP", 40, "fusable")]),
        ("qwen2_vl", [("VisionMlp", 32, "fusable"), ("Sequential", 1, "fusable"), ("Qwen2MLP", 80, "fusable")]),
        (
            "idefics3",
            [("Idefics3VisionMLP", 12, "fusable"), ("Idefics3SimpleMLP", 1, "skipped"), ("LlamaMLP", 32, "fusable")],
        ),
        ("t5", [("T5DenseActDense", 12, "fusable")]),
        ("vit", [("ViTMLP", 12, "fusable")]),
    ],
)
def test_one_model_type(model_type, mlps):
    """The counts are those of the whole default model: one that begins with dense layers has routed experts too."""
    result = invoke("--model-type", model_type, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    (entry,) = answer["model_types"]
    assert answer["transformers"] == transformers.__version__
    assert entry["model_type"] == model_type and entry["model_class"].endswith("Model") and entry["error"] is None
    assert [(mlp["class_name"], mlp["count"], mlp["state"]) for mlp in entry["mlps"]] == mlps
    assert all((mlp["state"] == "skipped") == bool(mlp["reason"]) for mlp in entry["mlps"])

    words = invoke("--model-type", model_type).stdout
    assert all(word in words for mlp in mlps for word in map(str, mlp)) and (mlps or "has no MLP module" in words)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
}


def words(reason):
    """A reason without sizes."""
    return reason and reason.partition("[")[0]


@pytest.mark.parametrize("model_type", ["llama", "phi3", "nemotron", "falcon_h1", "gpt2", "qwen2_moe", "bert"])
def test_the_answer_is_what_fusing_a_loaded_model_does(model_type):
    entry, _ = examine(model_type)
    model = AutoModel.from_config(CONFIG_MAPPING[model_type](**SMALL)).eval()
    found = [(class_name, state, words(reason)) for class_name, state, reason in fusion_report(model).grouped()]
    assert found == [(mlp.class_name, mlp.state, words(mlp.reason)) for mlp in entry.mlps]
    fused = fusion_report(fuse_model(model)).select("fused")
    assert {mlp.class_name for mlp in fused} == {mlp.class_name for mlp in entry.select("fusable")}


def test_nothing_is_allocated():
    entry, model = examine("mistral")
    assert model.config.num_hidden_layers == 32 and not model.training
    assert sum(parameter.untyped_storage().nbytes() for parameter in model.parameters()) < 1 << 16
    assert entry == Entry("mistral", "MistralModel", (Found("MistralMLP", 32, "fusable", None),))


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "give either --model-type, such as --model-type llama, or --all"),
        (["--all", "--model-type", "llama"], "give either --model-type"),
        (["--model-type", "Lama"], "has no model type 'Lama'; did you mean llama"),
        (["--model-type", "zzzz"], "has no model type 'zzzz'; --all lists those that there are"),
        (["--model-type", "llama", "--markdown"], "give it with --all"),
        (["--all", "--json", "--markdown"], "without --json"),
        (["--model-type", "informer"], "informer: its default config builds no model: ValueError: The `prediction_"),
        (["--model-type", "mllama_text_model"], "mllama_text_model: no Auto class of Transformers builds it"),
    ],
)
def test_errors_are_one_line(args, words):
    result = invoke(*args)
    assert result.exit_code == 2
    assert words in result.output
    assert len(result.output.splitlines()) == 1


def test_a_missing_package_is_named(monkeypatch):
    def from_config(config):
        raise ImportError("\nThing requires the timm library but it was not found in your environment.")

    monkeypatch.setattr(AutoModel, "from_config", from_config)
    assert examine("llama") == (Entry("llama", error="it needs timm, which is not installed"), None)


def test_all(monkeypatch):
    names = [entry.model_type for entry in ENTRIES]
    monkeypatch.setattr("hf_fused_mlp.cli.model_types.MODEL_TYPES", names)
    monkeypatch.setattr("hf_fused_mlp.cli.model_types.examine", lambda name: (ENTRIES[names.index(name)], None))
    listed = json.loads(invoke("--all", "--json").stdout)["model_types"]
    assert [entry["model_type"] for entry in listed] == names
    assert invoke("--all", "--markdown").stdout == coverage_page(ENTRIES) + "\n"
    assert "Of 3 model types that can be built and have MLPs, 2 fuse" in invoke("--all").stdout.replace("\n", " ")

    rows = list(zip(*(column.cells for column in table(ENTRIES).columns), strict=True))
    assert rows[:3] == [
        ("llama", "AMLP", "2", "[green]fusable[/]", ""),
        ("mixtral", "AMLP", "2", "[green]fusable[/]", ""),
        ("mixtral", "BMLP", "3", "[yellow]skipped[/]", r"BMLP clamps; register \[it]"),
    ]
    assert rows[6] == ("bert", "", "0", "no MLPs", "")
    assert rows[7] == ("mllama_text_model", "", "", "[red]not built[/]", "it needs timm, which is not installed")


def test_page():
    assert [outcome_of(entry) for entry in ENTRIES[:5]] == list(OUTCOMES)
    assert summary(ENTRIES) == ("Of 3 model types that can be built and have MLPs, 2 fuse: 1 in whole, 1 in part.")
    page = coverage_page(ENTRIES)
    for line in (
        f"Written by this command, with Transformers {transformers.__version__}, without timm:",
        "| not built | 3 |",
        "1. clamps",
        "2. experts are skipped",
        "| mixtral | AMLP (2) | BMLP (3) [1], BMoE (9) [2] |",
        "| none fuses: 1 | gpt_oss |",
        "It needs timm, which is not installed: mllama_text_model",
        "Its default config builds no model: other, another",
    ):
        assert line in page.splitlines()


def test_names_are_model_types():
    assert set(LACKING) <= set(MODEL_TYPES)
    assert len(LIGER_MODEL_TYPES) == len(set(LIGER_MODEL_TYPES)) == 53


@pytest.fixture(scope="module")
def every_model_type():
    """What `list --all` finds; the names of all classes met; and a module of each class and spec recognised."""
    entries, class_names, mlps = [], set(), {}
    for model_type in MODEL_TYPES:
        entry, model = examine(model_type)
        entries.append(entry)
        for module in () if model is None else model.modules():
            class_names.add(type(module).__name__)
            if spec := recognise(module):
                mlps.setdefault((type(module), spec), module)
    return entries, class_names, mlps


@pytest.mark.long
def test_the_page_is_what_the_command_prints(every_model_type):
    page, printed = PAGE.read_text(), coverage_page(every_model_type[0]) + "\n"
    written_with, here = page.splitlines()[2], printed.splitlines()[2]
    if written_with != here:
        pytest.skip(f"the page says: {written_with!r}; here: {here!r}")
    assert page == printed


# whose forward is not recognised
REFUSED = ["FalconH1MLP", "DeepseekV4MLP", "Glm5NextTextMLP", "BitNetMLP", "Gemma3nTextMLP", "Step3p7MLP", "BeamMLP"]


@pytest.mark.long
@torch.no_grad()
def test_what_is_recognised_computes_the_same(every_model_type):
    """Each distinct MLP of all of Transformers against what its class does, on small projections."""
    entries, class_names, mlps = every_model_type
    assert class_names.intersection(REFUSED), "they were met"
    for (cls, spec), module in mlps.items():
        assert cls.__name__ not in REFUSED
        assert_fused_computes_the_same(with_small_projections(module, spec))
    newest = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
    assert sum(bool(entry.select("fusable")) for entry in entries) >= (460 if newest else 400)
    assert len(mlps) >= 350


def with_small_projections(module, spec):
    """A copy on the CPU with other sizes."""
    small = copy.copy(module)
    small._modules = dict(module._modules)
    for name in spec.projections:
        bias = getattr(module._modules[name], "bias", None) is not None
        up = H, I * (2 if spec.kind is MLPKind.PACKED else 1)
        small._modules[name] = nn.Linear(*((I, H) if name == spec.down else up), bias=bias)
    return small
