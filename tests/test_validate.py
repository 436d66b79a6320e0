"""`validate`: right models pass, a wrong layer is named, and the model is left as it was."""

import json

import pytest
import torch
from models import as_on_gpu, tiny_config, tiny_model, token_ids
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_fused_mlp import fuse_model, ops, validate
from hf_fused_mlp.cli import app
from hf_fused_mlp.families.mlp import fused
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.integrations import demo
from hf_fused_mlp.launch_cache import leave_alone
from hf_fused_mlp.numerics import layers
from hf_fused_mlp.numerics.report import Divergence, LogitsNumerics, NumericsReport
from hf_fused_mlp.report import ModuleStatus
from hf_fused_mlp.types import MLPOperands

IDS = token_ids(1, 60)
LAYER = "model.layers.1.mlp"


def fused_model(model_type="llama", **kwargs):
    return fuse_model(tiny_model(model_type, **kwargs), strict=True)


def failing(report):
    return [layer.name for layer in report.layers if layer.failure]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox"])
@pytest.mark.parametrize("path", ["fused", "operator"])
def test_fused_models_pass(model_type, dtype, path, monkeypatch):
    if path == "fused":
        as_on_gpu(monkeypatch)
    for reference in (None, tiny_model(model_type, dtype=dtype)):
        report = validate(fused_model(model_type, dtype=dtype), IDS, reference=reference, new_tokens=4)
        assert report.passed and not report.warnings, str(report)
        assert [layer.path for layer in report.layers] == [path, path]
        assert all(0 < layer.fused.relative_rms <= 2 * layer.original.relative_rms for layer in report.layers)
        assert all(layer.oracle == "float64" for layer in report.layers)
        assert len(report.greedy) == 4 and all(answer.first_difference is None for answer in report.greedy)
        assert report.logits.tokens == 60 and report.logits.top1_agreement == 1
    assert "2 of 2 fused MLPs" in str(report)
    assert ("on cpu, where the original forward runs" in str(report)) == (path == "operator")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", ["fused", "operator"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_routed_experts(model_type, path, dtype, monkeypatch):
    """They pass, and one whose kernel or weight is wrong is named."""
    if path == "fused":
        as_on_gpu(monkeypatch)
        monkeypatch.setattr("hf_fused_mlp.modes.runs_now", lambda x: True)
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
    model, reference = (tiny_model(model_type, dtype=dtype, **sizes) for _ in range(2))
    fuse_model(model, strict=True)
    for source in (None, reference):
        report = validate(model, IDS, reference=source, new_tokens=2)
        assert report.passed, str(report)
        assert [layer.path for layer in report.layers] == [path, path]
        assert all(layer.oracle == "float64" and layer.fused.relative_rms > 0 for layer in report.layers)
    name = "model.layers.1.mlp.experts"
    wrong = model.get_submodule(name)
    operator = ops.experts_if_fits

    def doubled(x, ids, weights, operands):
        return operator(x, ids, weights * (2 if operands.up is wrong.gate_up_proj else 1), operands)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "experts_if_fits", doubled)
        patch.setattr(ops, "experts", doubled)
        assert failing(validate(model, IDS, new_tokens=0)) == [name]
    with torch.no_grad():
        wrong.down_proj[2, 3, 5] += 0.5
    assert failing(validate(model, IDS, reference=reference, new_tokens=0)) == [name]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox"])
def test_fused_models_pass_on_a_gpu(model_type, dtype):
    report = validate(fused_model(model_type, dtype=dtype).cuda(), IDS, new_tokens=4)
    assert report.passed, str(report)
    assert {layer.path for layer in report.layers} == {"fused"}


def one_weight(mlp):
    mlp.down_proj.weight[3, 5] += 1e-2


def one_weight_relative(mlp):
    row = mlp.up_proj.weight[7]
    row[row.abs().argmax()] *= 1 + 1e-2


def one_tensor(mlp):
    mlp.gate_proj.weight *= 1 + 1e-2


def activation(mlp):
    mlp.act_fn = nn.GELU()


@pytest.mark.parametrize(
    "change, dtype",
    [
        (one_weight, torch.float32),
        (one_weight_relative, torch.float32),
        (one_weight, torch.bfloat16),
        (one_weight_relative, torch.bfloat16),
        (one_tensor, torch.bfloat16),
        (activation, torch.float32),
        (activation, torch.bfloat16),
    ],
)
def test_a_layer_that_differs_from_the_reference_is_named(change, dtype):
    model = fused_model(dtype=dtype)
    with torch.no_grad():
        change(model.model.layers[1].mlp)
    assert validate(model, IDS, new_tokens=0).passed, "its own original form has the same change"
    report = validate(model, IDS, reference=tiny_model(dtype=dtype), new_tokens=0)
    assert not report.passed
    assert failing(report) == [LAYER]
    hidden = change is one_weight_relative and dtype is torch.bfloat16
    assert report.failures[0].startswith(f"{LAYER} (LlamaMLP): " + ("up_proj.weight" if hidden else "largest error"))
    assert ("differs from the reference's in" in report.failures[0]) == (change is not activation)
    assert str(report).startswith("FAILED: 1 of 2") and LAYER in str(report)


def test_a_swapped_gelu_is_named():
    """GELU and its tanh form differ by less than bf16 rounds; in fp32 the rule tells them apart."""
    model, reference = (tiny_model("gemma2", dtype=torch.float32) for _ in range(2))
    model.model.layers[1].mlp.act_fn = nn.GELU()
    assert failing(validate(fuse_model(model, strict=True), IDS, reference=reference)) == [LAYER]


@pytest.mark.parametrize("few", [False, True], ids=["every call", "calls of one token"])
def test_a_wrong_kernel_is_named(few, monkeypatch):
    """Without a reference: the model's own original form is right."""
    as_on_gpu(monkeypatch)
    model, mlp = fused_model(), ops.mlp_if_fits
    wrong = model.model.layers[1].mlp.up_proj.weight

    def operator(x, operands):
        out = mlp(x, operands)
        return 1.01 * out if operands.up.data is wrong and (x.shape[:-1].numel() == 1 or not few) else out

    monkeypatch.setattr(ops, "mlp_if_fits", operator)
    report = validate(model, IDS)
    assert failing(report) == [LAYER]
    assert not few or report.layers[1].tokens == 1


def test_a_wrong_pack_is_named_on_a_cpu(monkeypatch):
    """There the model runs the original forward; what is judged is the operator."""
    operands = fused.FusedGatedMLP.operands
    model = fused_model()

    def swapped(self):
        gate, up, *others = operands(self)
        return MLPOperands(*((up, gate) if self is model.model.layers[1].mlp else (gate, up)), *others)

    monkeypatch.setattr(fused.FusedGatedMLP, "operands", swapped)
    assert failing(validate(model, IDS)) == [LAYER]


def test_a_huge_token_hides_no_other():
    """Massive activations: one token's output is a thousand times all others', whose error is still seen."""

    reference, model = (nn.Sequential(tiny_model("gpt_neox").gpt_neox.layers[0].mlp) for _ in range(2))
    fuse_model(model, strict=True)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    x[0] *= 1000
    assert validate(model, x, reference=reference).passed
    with torch.no_grad():
        model[0].dense_4h_to_h.bias += 1e-5 * reference(x)[1:].abs().mean()
    assert failing(validate(model, x, reference=reference)) == ["0"]


def test_an_exact_original_is_no_standard():
    """Where the original's answer happens to be the very number, the number next to it is not wrong for that."""
    oracle = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).bfloat16().double()
    eager = oracle.bfloat16()
    fused = eager.clone()
    fused[0, 0] = eager[0, 0] = oracle[0, 0] = 20
    fused[0, 0] *= 1 + torch.finfo(torch.bfloat16).eps
    assert fused[0, 0] != eager[0, 0]
    assert layers._verdict(fused, eager, oracle, False)["failure"] is None
    fused[0, 0] *= 1 + torch.finfo(torch.bfloat16).eps
    assert "largest error" in layers._verdict(fused, eager, oracle, False)["failure"]


def test_the_model_is_left_as_it_was():
    model, reference = fused_model().train(), tiny_model().train()
    model.model.layers[0].eval()

    def state(network):
        modes = [(type(module), module.training, len(module._forward_hooks)) for module in network.modules()]
        return modes, {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in network.state_dict().items()}

    before = [state(network) for network in (model, reference)]
    assert validate(model, IDS, reference=reference, new_tokens=2).passed
    with pytest.raises(IndexError):
        validate(model, IDS + 1000)
    for network, (modes, tensors) in zip((model, reference), before, strict=True):
        now_modes, now = state(network)
        assert now_modes == modes
        assert all(now[name][0] == at and torch.equal(now[name][1], value) for name, (at, value) in tensors.items())
        assert all(parameter.grad is None for parameter in network.parameters())


def test_compiled_models_are_seen():
    torch.compiler.reset()
    model = fused_model()
    model.compile(backend="eager")
    model(IDS)
    assert validate(model, IDS, new_tokens=0).passed


def test_inputs_with_padding():
    mask = torch.ones_like(IDS)
    mask[0, :20] = 0
    report = validate(fused_model(), {"input_ids": IDS, "attention_mask": mask}, new_tokens=2)
    assert report.passed and report.logits.tokens == 40
    assert [answer.start for answer in report.greedy] == [0, 10, 20, 30]


def test_perplexity_is_that_of_the_model():
    model = fused_model()
    with torch.no_grad():
        expected = model(IDS, labels=IDS).loss.exp().item()
    report = validate(model, IDS[0], new_tokens=0)
    assert report.logits.perplexity == pytest.approx(expected, rel=1e-5)
    assert report.logits.reference_perplexity == pytest.approx(expected, rel=1e-5)


def test_models_without_logits():
    model = AutoModel.from_config(tiny_config()).eval()
    report = validate(fuse_model(model, strict=True), IDS)
    assert report.passed and report.logits is None and report.greedy == ()


def test_logits_that_differ():
    """KL, agreement and divergences of a model whose output layer was changed, which is no fault of its MLPs."""
    model, reference = fused_model(), tiny_model()
    with torch.no_grad():
        model.lm_head.weight += 0.02 * torch.randn_like(model.lm_head.weight)
    report = validate(model, IDS, reference=reference, new_tokens=8)
    assert report.passed
    with torch.no_grad():
        p, q = (network(IDS).logits[0].double().log_softmax(-1) for network in (reference, model))
    kl = nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert report.logits.kl_mean == pytest.approx(kl.mean().item())
    assert report.logits.kl_max == pytest.approx(kl.max().item())
    assert report.logits.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    split = next(answer for answer in report.greedy if answer.first_difference is not None)
    assert split.margin > 0
    assert f"from token {split.start} on, the answer differs at its token {split.first_difference}" in str(report)


def test_logits_that_overflow_fail():
    model, reference = fused_model(), tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = float("inf")
    report = validate(model, IDS, reference=reference, new_tokens=0)
    assert failing(report) == [] and not report.passed
    assert report.failures == ("logits that are finite in the reference are not in the fused model",)


@pytest.mark.parametrize("margin, warned", [(0.1, False), (0.3, True)])
def test_a_divergence_where_the_reference_was_sure_is_a_warning(margin, warned):
    logits = LogitsNumerics(9, 1e-6, 1e-5, 1.0, largest_difference=0.1, finite=True, perplexity=None,
                            reference_perplexity=None)  # fmt: skip
    report = NumericsReport("it", "cpu", "float32", (), (), (), logits, (Divergence(0, 8, 3, margin),))
    assert any("is no near tie" in line for line in report.warnings) == warned


def test_nothing_fused_is_a_failure():
    report = validate(tiny_model(), IDS, new_tokens=0)
    assert not report.passed
    assert report.failures == (
        "no fused MLP ran, so nothing was validated: model.layers.0.mlp is not fused; call fuse_model first",
    )
    assert [mlp.state for mlp in report.unfused] == ["fusable", "fusable"]


def test_an_mlp_that_cannot_run_fused_is_no_evidence():
    model = fused_model()
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Tanh()
    report = validate(model, IDS, new_tokens=0)
    assert {layer.path for layer in report.layers} == {"original forward"}
    assert "nothing was validated: act_fn is Tanh" in report.failures[0]


def test_unfused_and_unreached_mlps_are_listed():
    model = fuse_model(tiny_model(), exclude=[LAYER])
    model.spare = fused_model().model.layers[0].mlp
    report = validate(model, IDS, new_tokens=0)
    assert report.passed
    assert report.unfused == (ModuleStatus(LAYER, "LlamaMLP", "fusable"),)
    assert report.unreached == ("spare",) and "spare is fused, but the inputs did not reach it" in report.warnings


class Rounded(nn.Linear):
    """Stands for a quantized projection: its weight is no float."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale = scale.item()

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_projections_that_cannot_be_cast(monkeypatch):
    as_on_gpu(monkeypatch)
    model = tiny_model(dtype=torch.bfloat16)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Rounded(getattr(layer.mlp, name)))
    report = validate(fuse_model(model, strict=True), IDS)
    assert report.passed, str(report)
    assert {layer.path for layer in report.layers} == {"partly fused"}
    assert {layer.oracle for layer in report.layers} == {"float32 (gate_proj.weight is torch.int8)"}


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"model": "gpt2"}, TypeError, "model is str, not an nn.Module"),
        ({"reference": "gpt2"}, TypeError, "reference is str"),
        ({"inputs": "some text"}, TypeError, "inputs are str; pass token ids"),
        ({"inputs": IDS[:, :0]}, ValueError, "inputs hold no tokens"),
        ({"inputs": {}}, ValueError, "inputs hold no tokens"),
        ({"new_tokens": -1}, ValueError, "new_tokens=-1"),
        ({"reference": tiny_model("gpt_neox")}, ValueError, "reference has no module 'model.layers.0.mlp'"),
        ({"reference": tiny_model(intermediate_size=64)}, ValueError, r"gate_proj.weight is \[176, 64\]"),
        ({"reference": tiny_model(dtype=torch.bfloat16)}, ValueError, "load both models in one architecture"),
        ({"reference": tiny_model(vocab_size=99)}, ValueError, r"reference gives logits \[1, 60, 99\]"),
    ],
)
def test_bad_arguments(arguments, error, words):
    arguments = {"model": fused_model(), "inputs": IDS} | arguments
    with pytest.raises(error, match=words):
        validate(arguments.pop("model"), arguments.pop("inputs"), **arguments)


def test_autocast_is_an_error():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="called under autocast"):
        validate(fused_model(), IDS)


@pytest.fixture
def saved(tmp_path):
    """A directory with a tiny model and a tokenizer, and a function that saves a changed model beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0} | {chr(code): code - 31 for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")

    def save(name, change=lambda mlp: None):
        model = tiny_model()
        with torch.no_grad():
            change(model.model.layers[1].mlp)
        model.save_pretrained(tmp_path / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def invoke(*args):
    return CliRunner().invoke(app, ["validate", *map(str, args)])


def test_command(saved, tmp_path):
    result = invoke(saved("good"), "--new-tokens", 4)
    assert result.exit_code == 0, result.output
    assert "2 x LlamaMLP" in result.stdout and "passed: 2 of 2" in result.stdout
    assert "logits of 128 tokens" in result.stdout, "no more than the model has positions for"

    result = invoke(saved("bad", one_weight), "--reference", saved("good"), "--new-tokens", 0)
    assert result.exit_code == 1, result.output
    assert f"failed: {LAYER} (LlamaMLP): largest error" in result.stdout

    (tmp_path / "text").write_text("def f(x): return x")
    args = ["--text", tmp_path / "text", "--no-reference", "--json"]
    result = invoke(tmp_path / "bad", *args)
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["passed"] and answer["reference"] == "its original form"
    assert [layer["name"] for layer in answer["layers"]] == ["model.layers.0.mlp", LAYER]
    assert answer["logits"]["tokens"] == 18 and len(answer["greedy"]) == 4


@pytest.mark.parametrize(
    "args, words",
    [
        (["/no/such/directory"], "/no/such/directory: no such directory"),
        (["--reference", "/no/such/directory"], "/no/such/directory: no such directory"),
        (["--dtype", "int4"], "dtype 'int4': expected one of auto, float32"),
        (["--reference", "a/b", "--no-reference"], "--reference and --no-reference exclude each other"),
        (["--text", "/no/such/file"], "/no/such/file"),
    ],
)
def test_bad_usage(args, words):
    result = invoke(*args)
    assert result.exit_code == 2
    assert words in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_models_of_two_architectures_are_bad_usage(saved, tmp_path):
    tiny_model("gpt_neox").save_pretrained(tmp_path / "neox")
    saved("neox")  # a tokenizer; then the other model over it
    tiny_model("gpt_neox").save_pretrained(tmp_path / "neox")
    result = invoke(saved("good"), "--reference", tmp_path / "neox")
    assert result.exit_code == 2 and "reference has no module" in result.output


@pytest.mark.slow
def test_smollm2():
    model, reference = (demo.load_demo(dtype=torch.float32, use_fused_mlp=fused) for fused in (True, False))
    ids = demo.load_demo_tokenizer()("The lambda keyword makes a small anonymous function.", return_tensors="pt")
    report = validate(model, dict(ids), reference=reference, new_tokens=4)
    assert report.passed and len(report.layers) == 30, str(report)
    assert isinstance(model.model.layers[17].mlp, FusedMLP)
    with torch.no_grad():
        model.model.layers[17].mlp.down_proj.weight[100, 200] += 1e-2
    model.model.layers[3].mlp.act_fn = nn.GELU()
    report = validate(model, dict(ids), reference=reference, new_tokens=0)
    assert failing(report) == ["model.layers.3.mlp", "model.layers.17.mlp"]


def test_kernels_of_compiled_code_are_judged_where_eager_calls_leave_them_alone(monkeypatch):
    as_on_gpu(monkeypatch)
    model = fused_model("phi3")
    for module in model.modules():
        if isinstance(module, FusedMLP):
            leave_alone(module, module.original_class, torch.empty(60, 64))
    assert validate(model, IDS, new_tokens=0).passed
    hook = model.model.layers[0].mlp.gate_up_proj.register_forward_hook(lambda *_: None)
    assert validate(model, IDS, new_tokens=0).passed, "a layer that must be called has no operands"
    hook.remove()
    operator = ops.mlp
    monkeypatch.setattr(ops, "mlp", lambda x, *rest, **kwargs: operator(x, *rest, **kwargs) * (x.numel() < 60 * 64))
    report = validate(model, IDS, new_tokens=0)
    assert len(failing(report)) == 2 and report.layers[0].tokens == 60
