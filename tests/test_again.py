"""The short way of a fused module's call: taken when such a call was answered before, and nothing has changed."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from models import Doubling, as_on_gpu, tiny_model
from numerics import look_up, remember
from test_wrapped import PROJECTIONS, WRAPPERS, attach_hook, replace_linear
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from hf_fused_mlp import fuse_model, launch_cache, modes, ops, unfuse_model
from hf_fused_mlp.families.mlp import fused
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.ops import dispatch
from hf_fused_mlp.tuning import cache
from hf_fused_mlp.types import ABSENT, TORCH, UNFUSED, MLPOperands, Plan, TileConfig

ANSWER = torch.zeros(1)
KINDS = pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox", "gpt2"])


@pytest.fixture
def short_way(monkeypatch):
    """Lets tokens on the CPU take the short way, and the way that is remembered give `ANSWER`."""
    as_on_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    cache.forget()
    yield
    cache.forget()


def replay(mlp, x):
    return fused._replay(mlp, type(mlp), x)


def answered_mlp(x, model_type="llama"):
    """A fused MLP that has answered a call with `x`."""
    mlp = next(m for m in fuse_model(tiny_model(model_type)).modules() if isinstance(m, FusedMLP))
    remember(x, mlp.operands(), lambda *operands: ANSWER)
    return mlp


@KINDS
@torch.no_grad()
def test_a_call_like_one_before_takes_the_short_way(model_type, short_way):
    x = torch.randn(3, 64)
    mlp = answered_mlp(x, model_type)
    assert mlp(x) is ANSWER
    assert mlp(torch.randn(3, 64)) is ANSWER
    for other in (torch.randn(4, 64), torch.randn(3, 1, 64), torch.randn(3, 128)[:, ::2], x.double()):
        assert replay(mlp, other) is None


@pytest.mark.parametrize("plan", [UNFUSED, Plan(TileConfig("gemv", block_k=64), TORCH)], ids=["unfused", "fused"])
@torch.no_grad()
def test_where_kernels_gain_nothing_the_original_runs_at_once(plan, short_way, monkeypatch):
    asked, x = [], torch.randn(3, 64)
    monkeypatch.setattr(dispatch, "find_plan", lambda key: asked.append(key.m) or plan)
    monkeypatch.setattr(ops.dense, "runs_now", lambda x: True)
    monkeypatch.setattr(dispatch, "mlp_cuda", lambda x, operands: ANSWER)
    mlp = next(m for m in fuse_model(tiny_model("gpt_neox")).modules() if isinstance(m, FusedMLP))
    expected = mlp.original_class.forward(mlp, x)
    for _ in range(2):
        assert torch.equal(mlp(x), expected) if plan == UNFUSED else mlp(x) is ANSWER
    assert asked == ([3] if plan == UNFUSED else [3, 3]), "which is remembered"
    mlp(torch.randn(4, 64))
    assert asked[-1] == 4
    with monkeypatch.context() as patch:
        patch.setattr(fused, "_slow_path", lambda *_: ANSWER)
        with torch.enable_grad():
            assert mlp.train()(x) is ANSWER, "training may save memory there"
        mlp.eval()
    asked.clear()
    cache.forget()  # plans may have been measured
    mlp(x)
    assert asked == [3]
    fuse_model(model := tiny_model("gpt_neox").half(), batch_invariant=True)
    mlp = next(m for m in model.modules() if isinstance(m, FusedMLP))
    assert mlp(x.half()) is ANSWER, "whose sums would depend on the token count"


@torch.no_grad()
def test_the_rule_is_asked_by_the_layers_of_the_original(short_way, monkeypatch):
    """Packed gate and up are one layer of Phi-3, and two of Llama."""
    asked = []
    monkeypatch.setattr(ops.dense, "runs_now", lambda x: True)
    monkeypatch.setattr(dispatch, "gains_nothing_in_eager", lambda key, plan, layers: asked.append(layers) or True)
    monkeypatch.setattr(dispatch, "mlp_cuda", lambda x, operands: ANSWER)

    def call(model_type, **sizes):
        mlp = next(m for m in fuse_model(tiny_model(model_type, **sizes)).modules() if isinstance(m, FusedMLP))
        mlp(torch.randn(3, 64))

    for model_type in ("llama", "phi3", "gpt_neox"):
        call(model_type)
    call("gpt2", activation_function="gelu")
    assert asked == [2, 1, 1, 1]
    call("gpt2", activation_function="gelu_new")
    call("gpt_neox", hidden_act="gelu_python")
    assert asked == [2, 1, 1, 1], "the original takes many kernels for such an activation"


def test_weights_that_no_kernel_reads_have_no_rule(short_way, monkeypatch):
    """Every other column of a tensor, for example."""
    monkeypatch.setattr(dispatch, "find_plan", lambda key: UNFUSED)
    mlp = next(m for m in fuse_model(tiny_model("gpt_neox")).modules() if isinstance(m, FusedMLP))
    operands, x = mlp.operands(), torch.randn(3, 64)
    assert dispatch.gains_nothing(x, operands, 1)
    up = operands.up._replace(data=torch.randn(256, 128)[:, ::2])
    assert not dispatch.gains_nothing(x, operands._replace(up=up), 1)


def left_alone(model_type, x):
    mlp = next(m for m in fuse_model(tiny_model(model_type)).modules() if isinstance(m, FusedMLP))
    launch_cache.leave_alone(mlp, mlp.original_class, x)
    return mlp


@torch.no_grad()
def test_what_is_left_alone_can_still_be_traced(short_way):
    x = torch.randn(3, 64)
    mlp = left_alone("phi3", x)
    expected = mlp(x)
    graph = make_fx(torch.func.vmap(mlp), tracing_mode="symbolic", _allow_non_fake_inputs=True)(x[None])
    torch.testing.assert_close(graph(x[None])[0], expected)
    assert mlp(nn.Parameter(x)).shape == x.shape
    with pytest.raises(TypeError):
        mlp()
    with pytest.raises(TypeError):
        mlp(None)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(mlp, backend=backend, fullgraph=True)(x)
    assert any("hf_fused_mlp" in str(node.target) for node in graphs[0].graph.nodes), "compiled code runs the kernels"
    torch._dynamo.reset()


def test_leaving_alone_keeps_nothing_of_what_was_before(short_way):
    x = torch.randn(3, 64)
    mlp = left_alone("gpt_neox", x)
    before = len(weakref.finalize._registry), weakref.getweakrefcount(mlp)
    for _ in range(20):
        mlp.to(torch.float32)
        launch_cache.leave_alone(mlp, mlp.original_class, x)
    assert (len(weakref.finalize._registry), weakref.getweakrefcount(mlp)) == before


@torch.no_grad()
def test_a_form_that_another_thread_gives_is_not_left_alone(short_way, monkeypatch):
    """The other one promises sums that do not depend on the token count."""
    x = torch.randn(3, 64).half()
    model = fuse_model(tiny_model("phi3").half())
    mlp = next(m for m in model.modules() if isinstance(m, FusedMLP))
    monkeypatch.setattr(ops, "gains_nothing", lambda *_: bool(fuse_model(unfuse_model(model), batch_invariant=True)))
    mlp(x)
    assert type(mlp).batch_invariant and not launch_cache.left_alone


@torch.no_grad()
def test_what_is_remembered_of_a_module_does_not_outlive_it(short_way, monkeypatch):
    """Another module may be given its id, or the module itself other weights or another form."""
    x = torch.randn(3, 64)
    mlp = next(m for m in fuse_model(tiny_model("gpt_neox")).modules() if isinstance(m, FusedMLP))
    original, calls = mlp.original_class, []
    launch_cache.leave_alone(mlp, original, x)
    with monkeypatch.context() as patch:
        patch.setattr(original, "forward", lambda self, *args, **kwargs: calls.append((args, kwargs)) or ANSWER)
        assert mlp(x) is ANSWER and mlp(hidden_states=x) is ANSWER and len(calls) == 2
    mlp.half()
    assert not launch_cache.left_alone
    launch_cache.leave_alone(mlp, original, x)
    fuse_model(unfuse_model(mlp), batch_invariant=True)
    assert not launch_cache.left_alone
    for count in range(1, 100):
        launch_cache.leave_alone(mlp, original, torch.randn(count, 64))
    assert len(launch_cache.left_alone[id(mlp)][1]) <= 64
    del mlp
    gc.collect()
    assert not launch_cache.left_alone


@torch.no_grad()
def test_another_argument(short_way):
    """What it would mean is for the original forward to say."""
    x = torch.randn(3, 64)
    mlp = answered_mlp(x)
    with pytest.raises(TypeError, match="positional arguments"):
        mlp(x, x)
    with pytest.raises(TypeError, match="unexpected keyword"):
        mlp(x, residual=x)


@KINDS
@torch.no_grad()
def test_the_long_way_has_nothing_against_it(model_type, short_way):
    x = torch.randn(3, 64)
    mlp = answered_mlp(x, model_type)
    assert replay(mlp, x) is ANSWER
    assert mlp.runs(torch.device("cuda", 0)) == (None, None)


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("wrap", WRAPPERS)
@torch.no_grad()
def test_a_projection_that_was_wrapped(wrap, name, short_way):
    x = torch.randn(3, 64)
    mlp = answered_mlp(x)
    wrap(mlp, name)
    assert replay(mlp, x) is None


def own_forward(mlp):
    mlp.forward = lambda x: LlamaMLP.forward(mlp, x)


def other_activation(mlp):
    mlp.act_fn = GELUTanh()


def unknown_activation(mlp):
    mlp.act_fn = nn.LeakyReLU()


def forward_of_the_activation(mlp):
    mlp.act_fn.forward = torch.tanh


def no_activation(mlp):
    del mlp.act_fn


def activation_of_none(mlp):
    mlp.act_fn = None


def scripted_activation(mlp):
    mlp.act_fn = torch.jit.script(nn.SiLU())


def function_of_the_activation(mlp):
    mlp.act_fn = GELUTanh()
    mlp.act_fn.act = torch.tanh


def no_projection(mlp):
    del mlp.up_proj


def pruned_rows(mlp):
    for name in ("gate_proj", "up_proj"):
        weight = mlp.get_parameter(f"{name}.weight")
        weight.data = weight.data[:128]


def pruned_columns(mlp):
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :128]


def other_dtype(mlp):
    mlp.down_proj.weight.data = mlp.down_proj.weight.data.bfloat16()


def unpacked(mlp):
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.clone())


def shifted_by_a_value(mlp):
    weight = mlp.down_proj.weight
    moved = torch.empty(weight.numel() + 1)[1:].view(weight.shape)
    weight.data = moved.copy_(weight)


def sparse(mlp):
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.detach().to_sparse(), requires_grad=False)


def new_bias(mlp):
    mlp.gate_proj.bias = nn.Parameter(torch.zeros(176))


def bias_that_is_a_buffer(mlp):
    del mlp.gate_proj.bias
    mlp.gate_proj.register_parameter("scale", None)
    mlp.gate_proj.register_buffer("bias", torch.ones(176))


CHANGES = [
    nn.Module.train,
    own_forward,
    other_activation,
    unknown_activation,
    forward_of_the_activation,
    no_activation,
    activation_of_none,
    scripted_activation,
    function_of_the_activation,
    no_projection,
    pruned_rows,
    pruned_columns,
    other_dtype,
    unpacked,
    shifted_by_a_value,
    sparse,
    new_bias,
    bias_that_is_a_buffer,
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_module_that_was_changed(change, short_way):
    x = torch.randn(3, 64)
    mlp = answered_mlp(x)
    change(mlp)
    assert replay(mlp, x) is None
    try:
        expected = LlamaMLP.forward(mlp, x)
    except Exception as error:
        with pytest.raises(type(error)):
            mlp(x)
    else:
        torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("bias", [torch.ones(1), torch.tensor(1.0), torch.ones(176)], ids=["one", "scalar", "half"])
@torch.no_grad()
def test_a_packed_bias_that_cannot_be_halved(bias, short_way):
    x = torch.randn(3, 64)
    mlp = answered_mlp(x, "phi3")
    mlp.gate_up_proj.bias = nn.Parameter(bias)
    assert replay(mlp, x) is None
    assert mlp.runs(torch.device("cuda", 0))[1].startswith("gate_up_proj has a sparse weight, or a bias that")
    if bias.numel() == 1:
        torch.testing.assert_close(mlp(x), Phi3MLP.forward(mlp, x))


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.drop, self.fc2 = nn.Linear(64, 96), nn.GELU(), nn.Dropout(0.5), nn.Linear(96, 64)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


@pytest.mark.parametrize("make", [Dropped, lambda: nn.Sequential(*Dropped().children())], ids=["module", "sequential"])
@torch.no_grad()
def test_dropout_on_the_way(make, short_way):
    x = torch.randn(3, 64)
    (mlp,) = fuse_model(nn.ModuleList([make()]).eval(), strict=True)
    remember(x, mlp.operands(), lambda *operands: ANSWER)
    dropout = next(name for name, child in mlp.named_children() if isinstance(child, nn.Dropout))
    assert mlp(x) is ANSWER
    mlp.get_submodule(dropout).train()
    assert replay(mlp, x) is None
    mlp.eval()
    assert replay(mlp, x) is ANSWER
    mlp.set_submodule(dropout, nn.Tanh())
    assert replay(mlp, x) is None
    mlp.set_submodule(dropout, nn.Identity().eval())
    assert replay(mlp, x) is ANSWER
    if isinstance(mlp, nn.Sequential):
        mlp.append(nn.Tanh())
        assert replay(mlp, x) is None


@pytest.mark.parametrize("cls", [LlamaMLP, nn.Linear, SiLUActivation], ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_a_class_that_was_patched(cls, short_way, monkeypatch):
    x = torch.randn(3, 64)
    mlp = answered_mlp(x)
    assert mlp(x) is ANSWER
    monkeypatch.setattr(cls, "forward", lambda self, x: x)
    assert replay(mlp, x) is None


@torch.no_grad()
def test_hooks_that_come_and_go(short_way):
    x = torch.randn(3, 64)
    mlp = answered_mlp(x)
    hooks = [
        lambda: register_module_forward_hook(lambda *args: None),
        lambda: mlp.act_fn.register_forward_hook(lambda *args: None),
        lambda: mlp.down_proj.register_forward_pre_hook(lambda *args: None),
    ]
    for register in hooks:
        hook = register()
        assert replay(mlp, x) is None
        hook.remove()
        assert replay(mlp, x) is ANSWER
    attach_hook(mlp, "up_proj")
    assert replay(mlp, x) is None


@torch.no_grad()
def test_backward_hooks_do_nothing_here(short_way):
    x = torch.randn(3, 64)
    mlp = answered_mlp(x)
    mlp.down_proj.register_full_backward_hook(lambda *args: None)
    mlp.down_proj.register_full_backward_pre_hook(lambda *args: None)
    assert replay(mlp, x) is ANSWER
    assert mlp.runs(torch.device("cuda", 0)) == (None, None)
    with torch.enable_grad():
        assert replay(mlp, x) is None


def test_pytorch_can_compare_tensors_at_once():
    assert launch_cache.TensorGuards is not None, "each call would find its way anew"


STATES = {
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "mode": lambda: FlopCounterMode(display=False),
    "function mode": Doubling,
    "fake": FakeTensorMode,
    "dual": forward_ad.dual_level,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("state", STATES)
def test_a_state_of_pytorch(state, mode, short_way):
    with mode():
        x = torch.randn(3, 64)
        mlp = answered_mlp(x)
        with STATES[state]():
            changed = state != "inference" or mode is torch.no_grad
            assert replay(mlp, x) is (None if changed else ANSWER)
        assert replay(mlp, x) is ANSWER


@torch.no_grad()
def test_functions_that_are_watched(short_way):
    """By a mode that may change what they return; the mode of a default device changes nothing of ours."""
    x = torch.randn(3, 64)
    mlp = answered_mlp(x)
    with torch.device("cpu"):
        assert replay(mlp, x) is ANSWER
        with Doubling():
            assert replay(mlp, x) is None
            torch.testing.assert_close(mlp(x), LlamaMLP.forward(mlp, x))


@torch.inference_mode()
def test_autocast_that_was_on_before(short_way, monkeypatch):
    """The operator, in an exported model, say, remembers calls under autocast, and casts nothing."""
    monkeypatch.setattr(dispatch, "find_plan", lambda key: UNFUSED)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    x = torch.randn(3, 64)
    mlp = fuse_model(tiny_model()).model.layers[0].mlp
    for context, again in ((torch.autocast("cpu", torch.bfloat16), False), (nullcontext(), True)):
        with context:
            out = dispatch.mlp_cuda(x, mlp.operands())
            assert torch.equal(out, dispatch.mlp_cuda(x, mlp.operands()))
            assert (replay(mlp, x) is not None) is again
    assert len(launch_cache.remembered) == 2


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "make_fx": lambda f, x: make_fx(f)(x),
    "make_fx before dispatch": lambda f, x: make_fx(f, pre_dispatch=True)(x),
    "trace": lambda f, x: torch.jit.trace(f, (x,), check_trace=False),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@torch.no_grad()
def test_a_transformed_call(transform, short_way):
    """Of what is given to it, and of what it is not about."""
    x, found = torch.randn(3, 64), []
    mlp = answered_mlp(x)

    def call(y):
        found.extend((replay(mlp, x), replay(mlp, y)))
        return 2 * y

    TRANSFORMS[transform](call, x)
    assert found
    assert all(out is None for out in found)


@torch.no_grad()
def test_a_weight_that_is_transformed(short_way):
    x, stack = torch.randn(3, 64), torch.randn(2, 176, 64)
    mlp = answered_mlp(x)

    def call(weight):
        mlp.gate_proj.weight = nn.Parameter(weight)
        assert replay(mlp, x) is None
        return weight.sum()

    torch.func.vmap(call)(stack)


@torch.no_grad()
def test_other_kinds_of_tokens(short_way):
    x = torch.randn(3, 64)
    mlp = answered_mlp(x)
    nested = torch.nested.nested_tensor([torch.randn(3, 64)])
    jagged = torch.nested.nested_tensor([torch.randn(3, 64)], layout=torch.jagged)
    for other in (x.to("meta"), x.to_sparse(), x.bfloat16(), x[:2], nn.Parameter(x), nested, jagged):
        assert replay(mlp, other) is None


def test_one_tensor_as_two(short_way):
    """PyTorch's comparison takes such calls for unlike any, so they are not kept; they are answered all the same."""
    weight = torch.randn(64, 64)
    kind, arguments = "kind", (torch.randn(3, 64), weight, weight)
    for _ in range(3):
        launch_cache.remember(kind, arguments, lambda *tensors: ANSWER)
        assert launch_cache.answer(kind, arguments, arguments) is None
    assert not launch_cache.remembered


def test_memory_is_bounded(short_way):
    for m in range(1, 5000):
        launch_cache.remember("kind", (torch.empty(m, 1),), None)
    assert len(launch_cache.remembered) <= 4096
    for stride in range(4, 400, 4):
        launch_cache.remember("kind", (torch.empty(2, stride)[:, :1],), None)
    assert max(map(len, launch_cache.remembered.values())) <= 64


@pytest.mark.gpu
@pytest.mark.parametrize("pre_dispatch", [False, True])
@torch.no_grad()
def test_a_call_that_is_traced(pre_dispatch):
    mlp = fuse_model(tiny_model()).model.layers[0].mlp.cuda()
    x = torch.randn(3, 64, device="cuda")
    mlp(x)
    traced = make_fx(mlp, pre_dispatch=pre_dispatch)(x)
    torch.testing.assert_close(traced(2 * x), mlp(2 * x))


@pytest.mark.gpu
@torch.no_grad()
def test_what_a_call_is_made_under():
    mlp = fuse_model(tiny_model()).model.layers[0].mlp.cuda()
    x = torch.randn(3, 64, device="cuda")
    expected = mlp(x)
    assert torch.equal(replay(mlp, x), expected)
    with torch.autocast("cuda", torch.bfloat16):
        assert replay(mlp, x) is None
        assert mlp(x).dtype == torch.bfloat16
    with torch.enable_grad():
        assert replay(mlp, x) is None
        assert mlp(x).requires_grad
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert replay(mlp, dual) is None
        assert forward_ad.unpack_dual(mlp(dual)).tangent is not None
    torch.testing.assert_close(torch.func.vmap(mlp)(x[:, None])[:, 0], expected)
    with torch.inference_mode():
        assert mlp(x).is_inference()
    mlp.down_proj.cpu()
    assert replay(mlp, x) is None
    mlp.down_proj.to("meta")
    assert replay(mlp, x) is None


def test_operands_that_do_not_fit(short_way):
    """What was answered fits, so what is like it does; nothing else is taken for it."""
    x, gate, up = torch.randn(3, 64), torch.randn(96, 64), torch.randn(96, 64)
    down, biases = torch.randn(64, 96), [torch.randn(96), torch.randn(96), torch.randn(64)]
    call = [x, gate, up, down, *biases, "silu"]
    remember(x, MLPOperands.of(*call[1:]), lambda *operands: ANSWER)
    again = lambda x, *operands: look_up(x, MLPOperands.of(*operands))  # noqa: E731
    assert again(*call) is ANSWER
    for i, operand in enumerate(call[:-1]):
        others = [operand.double(), operand[:2], operand[..., :32], operand[None]]
        for other in others if i == 0 or operand is up else [*others, None]:
            assert again(*call[:i], other, *call[i + 1 :]) is None
    assert again(*call[:-1], "relu") is None


H = torch.randn(3, 176, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_down_is_called_after_a_kept_launch(short_way):
    """Of an MLP whose down must be called, the launch before it is kept."""
    x, mlp = torch.randn(3, 64), fuse_model(tiny_model()).model.layers[0].mlp
    operands = mlp.operands()
    half = operands._replace(down=ABSENT)
    attach_hook(mlp, "down_proj")
    assert replay(mlp, x) is None
    remember(x, half, lambda *operands: H)
    torch.testing.assert_close(replay(mlp, x), H @ operands.down.data.T + 1)
    attach_hook(mlp, "up_proj")
    assert replay(mlp, x) is None


@pytest.mark.parametrize("cls", [nn.Linear, SiLUActivation])
@torch.no_grad()
def test_call_of_a_childs_class(cls, short_way, monkeypatch):
    x = torch.randn(3, 64)
    mlp = answered_mlp(x)
    monkeypatch.setattr(cls, "__call__", lambda self, x: 2 * nn.Module.__call__(self, x), raising=False)
    assert replay(mlp, x) is None
    torch.testing.assert_close(mlp(x), LlamaMLP.forward(mlp, x))


@torch.no_grad()
def test_sizes_of_tensors_that_are_not_real(monkeypatch):
    """A wrapped layer's few tokens run the original at once; tokens whose number is unknown are not counted."""
    monkeypatch.setattr("hf_fused_mlp.families.mlp.fused.SMALL_INPUT", 1 << 21)
    mlp = fuse_model(tiny_model()).model.layers[0].mlp
    replace_linear(mlp, "gate_proj")
    shapes = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    with FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True) as mode:
        x, chosen = mode.from_tensor(torch.randn(9, 64)), mode.from_tensor(torch.ones(9, dtype=torch.bool))
        assert mlp(x[chosen]).shape[1] == 64
    traced = make_fx(mlp, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(3, 64))
    assert traced(torch.randn(5, 64)).shape == (5, 64)


@torch.no_grad()
def test_down_that_is_gone(short_way):
    x, mlp = torch.randn(3, 64), fuse_model(tiny_model()).model.layers[0].mlp
    remember(x, mlp.operands()._replace(down=ABSENT), lambda *operands: H)
    del mlp.down_proj
    assert replay(mlp, x) is None
    with pytest.raises(AttributeError, match="down_proj"):
        mlp(x)


@torch.no_grad()
def test_a_hook_that_only_moves_inputs(short_way):
    """accelerate's: such projections are read at a glance, as long as moving inputs is all that the hook does."""
    x = torch.randn(3, 64)
    mlp = answered_mlp(x)
    for name in PROJECTIONS:
        add_hook_to_module(mlp.get_submodule(name), AlignDevicesHook(execution_device=torch.device("cpu")))
    assert replay(mlp, x) is ANSWER
    hook = mlp.up_proj._hf_hook
    for attribute, value in (("offload", True), ("no_grad", True), ("execution_device", None)):
        before = getattr(hook, attribute)
        setattr(hook, attribute, value)
        assert replay(mlp, x) is None
        setattr(hook, attribute, before)
    assert replay(mlp, x) is ANSWER
    hooked = mlp.up_proj.forward
    mlp.up_proj.forward = lambda x: 2 * hooked(x)
    assert replay(mlp, x) is None
    torch.testing.assert_close(mlp(x), LlamaMLP.forward(mlp, x))
    mlp.up_proj.forward = hooked
    mlp.up_proj._old_forward = lambda x: 2 * x
    assert replay(mlp, x) is None
    remove_hook_from_module(mlp.up_proj)
    add_hook_to_module(mlp.up_proj, ModelHook())
    assert replay(mlp, x) is None


@pytest.mark.parametrize("case", ["called", "autocast", "training", "plain"])
def test_few_tokens_run_the_original_if_only_the_product_could_be_fused(case, short_way, monkeypatch):
    monkeypatch.setattr("hf_fused_mlp.families.mlp.fused.SMALL_INPUT", 3 * 64)
    products, mlp = [], fuse_model(tiny_model()).model.layers[0].mlp
    monkeypatch.setattr(ops, "act_mul", lambda *args, act_mul=ops.act_mul: products.append(args) or act_mul(*args))
    if case == "called":
        replace_linear(mlp, "gate_proj")
    mlp.train(case == "training")
    monkeypatch.setattr(modes, "autocasts", lambda: case == "autocast")
    monkeypatch.setattr(torch._C, "_is_any_autocast_enabled", lambda: case == "autocast")
    for m, calls in ((3, 0), (4, case != "plain")):
        x = torch.randn(m, 64)
        products.clear()
        with torch.set_grad_enabled(case == "training"):
            torch.testing.assert_close(mlp(x), LlamaMLP.forward(mlp, x))
        assert len(products) == calls
