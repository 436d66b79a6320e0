"""`Conv1D`, GPT-2's projection, whose weight is `[in, out]`: kernels against float64, and models from load to save."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from models import as_on_gpu
from numerics import assert_accurate, mlp_cuda, oracle_of, random_mlp, run_plan
from safetensors.torch import load_file, save_file, save_model
from small_models import model_classes, small_config, small_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.pytorch_utils import Conv1D

from hf_fused_mlp import fuse_model, fusion_report, ops, unfuse_model
from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.families import FAMILIES
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.kernels import KERNELS, LAUNCHERS, describe_launch
from hf_fused_mlp.ops import dispatch
from hf_fused_mlp.originals import functions_are_own
from hf_fused_mlp.reference import mlp_ref
from hf_fused_mlp.tuning.heuristics import heuristic_plan
from hf_fused_mlp.tuning.tuner import Launch, candidates
from hf_fused_mlp.types import ABSENT, GPU, TORCH, Matrix, MLPOperands, Plan, ProblemKey, TileConfig, storage_of
from hf_fused_mlp.weights import formats

CONFIGS = {
    "skinny": TileConfig("transposed_skinny", block_m=16, block_n=32, block_k=64, num_stages=3),
    "split": TileConfig("transposed_skinny", block_m=16, block_n=32, block_k=32, num_stages=3, split_k=3),
    "epilogue": TileConfig("epilogue"),
}
H, I = 32, 48


def stored_transposed(weight):
    """The same numbers, whose memory is that of the transposed matrix."""
    return None if weight is None else weight.t().contiguous().t()


def transposed_mlp(*args, **kwargs):
    *weights, gate_bias, up_bias, down_bias = random_mlp(*args, **kwargs)
    return *map(stored_transposed, weights), gate_bias, up_bias, down_bias


def tokens(m, hidden, dtype, device):
    return torch.randn(m, hidden, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)


# kernels


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(72, 104), (100, 72), (33, 7), (128, 256)], ids=str)
@pytest.mark.parametrize(
    "family, M", [(family, M) for family in ("skinny", "split", "epilogue") for M in (1, 2, 5, 17)]
)
def test_kernels(family, M, shape, bias, device):
    operands = transposed_mlp(*shape, False, bias, torch.float16, device)
    x = tokens(M, shape[0], torch.float16, device)
    down = TORCH if family == "epilogue" else CONFIGS[family]
    out = run_plan(Plan(CONFIGS[family], down), x, *operands, "gelu_tanh")
    expected, oracle = mlp_ref(x, *operands, "gelu_tanh"), oracle_of(x, operands, "gelu_tanh")
    assert_accurate(out, expected, oracle)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, device):
    operands = transposed_mlp(72, 104, False, True, torch.float16, device)
    x = tokens(3, 72, torch.float16, device)
    out = run_plan(Plan(CONFIGS["skinny"], CONFIGS["skinny"]), x, *operands, activation)
    assert_accurate(out, mlp_ref(x, *operands, activation), oracle_of(x, operands, activation))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_launch_serves_strided_tokens(family, device):
    weight = stored_transposed(random_mlp(72, 104, False, False, torch.float16, device)[1])
    wide = tokens(5, 80, torch.float16, device)
    x, config = wide[:, :72], CONFIGS[family]
    run = LAUNCHERS[config.kernel](describe_launch(x, weight, False, "relu"), config)
    out = run(x, Matrix(weight, None, None), ABSENT)
    torch.testing.assert_close(out, nn.functional.relu(x @ weight.t()), atol=5e-3, rtol=5e-3)
    assert torch.equal(out, run(x, Matrix(weight, None, None), ABSENT))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [1, 2, 16, 64, 300])
@pytest.mark.parametrize("shape", [(768, 3072), (1000, 2736), (1600, 6400)], ids=str)
def test_the_rule_and_every_candidate(shape, m, dtype):
    device = torch.device("cuda", 0)
    operands = transposed_mlp(*shape, False, True, dtype, device)
    key = dispatch.problem_key(m, MLPOperands.of(*operands, "gelu_tanh"))
    assert key.storage == "transposed"
    x = tokens(m, shape[0], dtype, device)
    expected, oracle = mlp_ref(x, *operands, "gelu_tanh"), oracle_of(x, operands, "gelu_tanh")
    for config in candidates(key.up):
        assert_accurate(run_plan(Plan(config, TORCH), x, *operands, "gelu_tanh"), expected, oracle)
    for plan in (heuristic_plan(key), *(Plan(TORCH, config) for config in candidates(key.down))):
        assert_accurate(run_plan(plan, x, *operands, "gelu_tanh"), expected, oracle)


def test_a_gate_is_for_any_storage(device):
    """PyTorch's GEMMs take what is stored in either order, and one kernel does the rest."""
    operands = transposed_mlp(72, 104, True, True, torch.float16, device)
    x = tokens(5, 72, torch.float16, device)
    out = run_plan(Plan(TileConfig("elementwise"), TORCH), x, *operands, "silu")
    assert_accurate(out, mlp_ref(x, *operands, "silu"), oracle_of(x, operands, "silu"))


def test_how_weights_are_stored(device, monkeypatch):
    """One way for a whole MLP; what lies in another, or in two, PyTorch's operations compute."""
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    floats, transposed = (make(72, 104, True, True, torch.float16, device) for make in (random_mlp, transposed_mlp))
    every_other = [t if t is None else t.repeat_interleave(2, -1)[..., ::2] for t in floats]
    mixed = *floats[:2], *transposed[2:]
    biases = *floats[:3], *every_other[3:]
    stored = {"float": floats, "transposed": transposed, None: mixed}
    for storage, operands in (*stored.items(), (None, every_other), (None, biases)):
        assert MLPOperands.of(*operands, "silu").storage == storage
        x = tokens(3, 72, torch.float16, device)
        assert_accurate(mlp_cuda(x, *operands, "silu"), mlp_ref(x, *floats, "silu"), oracle_of(x, floats, "silu"))
    single = Matrix(torch.empty(5, 1).t(), None, None)
    assert storage_of(single, Matrix(torch.empty(1, 5), None, None)) == "float", "a row is stored in either way"


def test_dispatch_runs_the_plan(device, plan_cache, monkeypatch):
    """Not PyTorch's operations, as for weights whose memory is in no order that kernels know."""
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    operands = transposed_mlp(72, 104, False, True, torch.float16, device)
    plans = []
    monkeypatch.setattr(dispatch, "SOURCES", [lambda key: plans.append(key) or Plan(*[CONFIGS["skinny"]] * 2)])
    x = tokens(5, 72, torch.float16, device)
    out = mlp_cuda(x, *operands, "gelu_tanh")
    assert torch.equal(mlp_cuda(x, *operands, "gelu_tanh"), out)
    assert [key.storage for key in plans] == ["transposed"]
    assert torch.equal(out, run_plan(Plan(*[CONFIGS["skinny"]] * 2), x, *operands, "gelu_tanh"))
    rows = random_mlp(72, 104, False, True, torch.float16, device)
    monkeypatch.setattr(dispatch, "SOURCES", [lambda key: plans.append(key) or Plan(TORCH, TORCH)])
    mlp_cuda(x, *rows, "gelu_tanh")
    assert plans[1].storage == "float", "what is remembered of the one is not taken for the other"


def test_plans_fit_the_problem():
    """Each kernel that the rule picks, or the tuner tries, runs the problem; those for other storage run none."""
    gpus = [GPU("H100", 132, (9, 0), 232448), GPU("A100", 108, (8, 0), 166912), GPU("T4", 40, (7, 5), 65536)]
    sizes = itertools.product([1, 2, 16, 128, 16384], [64, 100, 6400, 1 << 18], [64, 36, 1600])
    dtypes = [torch.float16, torch.float32, torch.float64]
    for (m, hidden, inner), gated, dtype, gpu in itertools.product(sizes, [True, False], dtypes, gpus):
        key = ProblemKey(m, hidden, inner, hidden, gated, "gelu_tanh", dtype, True, not gated, gpu, "transposed")
        plan = heuristic_plan(key)
        for launch, config in ((key.up, plan.up), (key.down, plan.down)):
            for kernel in {config.kernel, *(config.kernel for config in candidates(launch))} - {"torch"}:
                assert KERNELS[kernel].supports(launch) is None
                assert kernel.startswith("transposed") or kernel in ("elementwise", "epilogue")


def test_a_tuner_measures_weights_that_are_stored_so(monkeypatch):
    monkeypatch.setattr("hf_fused_mlp.tuning.tuner.weight_copies", lambda nbytes: 3)
    key = ProblemKey(1, 64, 96, 64, False, "gelu_tanh", torch.float32, True, True, GPU("", 1, (9, 0), 0), "transposed")
    launch = Launch.random(key.up, "cpu")
    assert [storage_of(*copy) for copy in launch.copies] == ["transposed"] * 3
    assert launch.copies[0][0].data.shape == (96, 64)
    assert 0.05 < launch.run(launch.x, 0, TORCH).std() < 2


# models


@pytest.fixture
def on_gpu(monkeypatch):
    as_on_gpu(monkeypatch)


@pytest.fixture
def by_kernels(monkeypatch, on_gpu):
    """The calls that kernels would answer as a whole."""
    calls, mlp = [], ops.mlp_if_fits
    monkeypatch.setattr(ops, "mlp_if_fits", lambda *args: calls.append(args) or mlp(*args))
    return calls


def gpt2(**changes):
    torch.manual_seed(0)
    config = GPT2Config(
        **{"n_embd": H, "n_layer": 2, "n_head": 2, "n_inner": I, "n_positions": 64, "vocab_size": 50} | changes,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval()


def gpt2_mlp(**changes):
    mlp = gpt2(**changes).transformer.h[0].mlp
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=1.5 * parameter.shape[0] ** -0.5 if parameter.dim() == 2 else 0.2)
    return mlp


IDS = torch.randint(2, 50, (2, 7), generator=torch.Generator().manual_seed(0))


MODEL_TYPES = "gpt2", "imagegpt", "decision_transformer", "openai-gpt", "clvp", "gpt_bigcode"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_every_model_of_transformers_that_has_it(model_type, by_kernels):
    """GPT-BigCode's MLP is GPT-2's with `nn.Linear`."""
    model = small_model(model_classes(small_config(model_type))[0], small_config(model_type))
    mlps = [module for module in model.modules() if hasattr(module, "c_fc") and hasattr(module, "c_proj")]
    assert mlps
    for mlp in mlps:
        x = torch.randn(2, 3, mlp.c_fc.weight.shape[1 if model_type == "gpt_bigcode" else 0])
        expected, held = mlp(x), nn.ModuleList([mlp])
        fuse_model(held, strict=True)
        assert mlp.runs() == (None, None)
        torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)
        operands = by_kernels.pop()[1]
        assert operands.storage == ("float" if model_type == "gpt_bigcode" else "transposed")
        assert by_kernels == []
        unfuse_model(held)
        assert torch.equal(mlp(x), expected)


@torch.no_grad()
def test_a_model_matches(by_kernels):
    model, original = gpt2(), gpt2()
    fuse_model(model, strict=True)
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, atol=1e-5, rtol=1e-5)
    assert len(by_kernels) == 2
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), original.generate(IDS, **options))
    assert str(fusion_report(model)) == "2 of 2 MLPs are fused\n  2 x GPT2MLP: fused"


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_a_module_by_interpreted_kernels(family, device):
    mlp = gpt2_mlp().half().to(device)
    x = tokens(5, H, torch.float16, device)
    expected, exact = mlp(x), copy.deepcopy(mlp).double()(x.double())
    fuse_model(nn.ModuleList([mlp]), strict=True)
    plan = Plan(CONFIGS[family], TORCH if family == "epilogue" else CONFIGS[family])
    assert_accurate(run_plan(plan, x, *mlp.operands().flat()), expected, exact)


def saved(model, directory):
    """What each way of saving writes, by a name for it."""
    model.save_pretrained(directory / "pretrained")
    model.save_pretrained(directory / "sharded", max_shard_size="10KB")
    save_model(model, directory / "model.safetensors")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, directory / "state.safetensors")
    torch.save(state, buffer := io.BytesIO())
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    return files | {"torch": buffer.getvalue(), "pickle": pickle.dumps([t.numpy() for t in state.values()])}


def facts(model):
    """What code can see of parameters."""
    return {
        name: (id(p), p.data_ptr(), p.shape, p.stride(), p.untyped_storage().nbytes(), p.view(-1).tolist())
        for name, p in model.named_parameters()
    }


def test_nothing_is_moved_and_files_are_equal(tmp_path, on_gpu):
    """Fused, used and unfused: the same parameters in the same memory, and the same bytes on disk."""
    model = gpt2()
    before, files = facts(model), saved(model, tmp_path / "original")
    assert len(files) > 8
    fuse_model(model, strict=True)
    with torch.no_grad():
        model(IDS)
    assert facts(model) == before
    assert saved(model, tmp_path / "fused") == files
    unfuse_model(model)
    assert facts(model) == before
    assert type(model.transformer.h[0].mlp) is GPT2MLP


@torch.no_grad()
def test_saved_and_loaded_again(tmp_path, by_kernels):
    model = fuse_model(gpt2(), strict=True)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    reloaded = GPT2LMHeadModel.from_pretrained(tmp_path, use_fused_mlp="strict")
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    other = fuse_model(gpt2(initializer_range=0.3), strict=True)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assigned = fuse_model(gpt2(initializer_range=0.3), strict=True)
    assigned.load_state_dict(model.state_dict(), assign=True)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    by_kernels.clear()
    for twin in (reloaded, other, assigned, *twins):
        assert torch.equal(twin(IDS).logits, expected)
    assert len(by_kernels) == 12
    half = model.to(torch.bfloat16)
    assert half.transformer.h[0].mlp.operands().storage == "transposed"


def test_an_optimizer_and_tied_weights_see_what_they_always_saw(on_gpu):
    """Two layers share a weight; a step of the optimizer is seen by the next call."""
    models = []
    for fuse in (False, True):
        model = gpt2()
        first, second = (block.mlp for block in model.transformer.h)
        second.c_fc.weight = first.c_fc.weight
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if fuse:
            fuse_model(model, strict=True)
        for _ in range(2):  # in evaluation, where the kernels run and gradients are wanted
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
        models.append(model)
    expected, got = models
    for (name, parameter), other in zip(expected.named_parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(other, parameter, atol=1e-4, rtol=1e-4, msg=name)
        torch.testing.assert_close(other.grad, parameter.grad, atol=1e-4, rtol=1e-3, msg=name)
    assert got.transformer.h[0].mlp.c_fc.weight is got.transformer.h[1].mlp.c_fc.weight


def test_training_runs_the_original_forward(by_kernels):
    model, original = gpt2().train(), gpt2().train()
    fuse_model(model, strict=True)
    losses = []
    for form in (model, original):
        torch.manual_seed(1)  # of dropout
        losses.append(form(IDS, labels=IDS).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    assert by_kernels == []
    assert "in training mode" in fusion_report(model).mlps[0].reason


@torch.no_grad()
def test_compiles_without_a_break(by_kernels):
    mlp = gpt2_mlp()
    x = torch.randn(2, 3, H)
    expected = mlp(x)
    fuse_model(nn.ModuleList([mlp]), strict=True)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    graphs = []
    torch.compiler.reset()
    torch.compile(mlp, backend=lambda graph, _: graphs.append(graph.code) or graph.forward)(x)
    assert "hf_fused_mlp.mlp" in graphs[0]
    mlp.c_fc.register_forward_hook(lambda module, args, output: 2 * output)
    assert not torch.allclose(torch.compile(mlp, backend="aot_eager")(x), expected)


def test_lora_is_called(by_kernels):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    original = peft.get_peft_model(gpt2(), config).eval()
    model = copy.deepcopy(original)
    with pytest.raises(ValueError, match=r"c_fc is peft\.tuners\.lora\.layer\.Linear, expected nn\.Linear; load"):
        fuse_model(model, strict=True)
    fuse_model(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, original(IDS).logits)
    merged = fuse_model(model.merge_and_unload(), strict=True)
    assert by_kernels == []
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, original(IDS).logits, atol=1e-4, rtol=1e-4)
    assert len(by_kernels) == 2


# what a call does besides


class Doubled(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(function):
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


def hooked(mlp, patch):
    mlp.c_fc.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_before(mlp, patch):
    mlp.c_fc.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def own_forward(mlp, patch):
    mlp.c_fc.forward = doubled(mlp.c_fc.forward)


def subclass(mlp, patch):
    mlp.c_fc.__class__ = Doubled


def patched_class(mlp, patch):
    patch.setattr(Conv1D, "forward", doubled(Conv1D.forward))


def patched_function(mlp, patch):
    patch.setattr(torch, "addmm", doubled(torch.addmm))


def no_parameter(mlp, patch):
    del mlp.c_fc.bias
    mlp.c_fc.register_buffer("bias", torch.ones(I))


def more_beside(mlp, patch):
    mlp.c_fc.scale = nn.Parameter(torch.ones(1))


CHANGES = {
    hooked: "c_fc has hooks or a replaced forward",
    hooked_before: "c_fc has hooks or a replaced forward",
    own_forward: "c_fc has hooks or a replaced forward",
    subclass: "c_fc is test_conv1d.Doubled, expected nn.Linear",
    patched_class: "c_fc has hooks or a replaced forward",
    patched_function: "torch.addmm was replaced by test_conv1d.doubled.<locals>.<lambda>; undo the patch",
    no_parameter: "c_fc has a sparse weight, or a bias that is not an nn.Parameter of one value for each row",
    more_beside: "c_fc carries scale besides weight and bias",
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_cannot_be_read_is_called(change, when, monkeypatch, by_kernels):
    mlp, x = gpt2_mlp(), torch.randn(2, 3, H)
    model = nn.ModuleList([mlp])
    if when == "after":
        fuse_model(model, strict=True)
        assert mlp(x) is not None
        by_kernels.clear()
    change(mlp, monkeypatch)
    if when == "before":
        fuse_model(model)
    expected = getattr(type(mlp), "original_class", GPT2MLP).forward(mlp, x)
    assert torch.equal(mlp(x), expected)
    assert by_kernels == []
    (status,) = fusion_report(model).mlps
    assert CHANGES[change] in status.reason
    assert isinstance(mlp, FusedMLP) == (when == "after")


def test_a_patched_addmm_does_not_stop_calls_of_linear_layers(monkeypatch):
    monkeypatch.setattr(torch, "addmm", doubled(torch.addmm))
    assert functions_are_own()
    assert formats.read(nn.Linear(4, 4)) is not None
    assert formats.read(Conv1D(4, 4)) is formats.glance(Conv1D(4, 4)) is None


def test_what_is_read():
    layer = Conv1D(6, 4)
    assert formats.may_be_read(layer)
    for matrix in (formats.read(layer), formats.glance(layer)):
        assert matrix.data.shape == (6, 4)
        assert matrix.data.data_ptr() == layer.weight.data_ptr()
        assert matrix.data.stride() == (1, 6)
        assert matrix.bias is layer.bias
    layer.nf = 5
    assert formats.read(layer) is None, "its call would fail"
    meta = Conv1D(6, 4).to("meta")
    assert formats.described(meta).data.shape == (6, 4)
    assert formats.read(meta) is None
    assert formats.why_called(meta).startswith("has its weight on meta")
    assert "has a weight of torch.int8" in formats.why_called(integers(Conv1D(6, 4)))


def integers(layer):
    layer.weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)
    return layer


def test_problems_are_those_of_calls(on_gpu):
    mlp = gpt2_mlp().half()
    model = fuse_model(nn.ModuleList([mlp]), strict=True)
    problem = FAMILIES[0].problem(mlp, mlp.fused_spec, 3, GPU.of(torch.device("cpu")))
    assert problem == dispatch.problem_key(3, mlp.operands())
    assert (problem.hidden, problem.intermediate, problem.out, problem.storage) == (H, I, H, "transposed")
    assert fusion_report(model).mlps[0].reason is None


def test_errors_are_the_originals(on_gpu):
    mlp = gpt2_mlp()
    fuse_model(nn.ModuleList([mlp]), strict=True)
    with pytest.raises(RuntimeError):
        mlp(torch.randn(2, H + 1))
    with pytest.raises(RuntimeError):
        mlp(torch.randn(2, H).half())
