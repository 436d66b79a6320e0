"""A fused module in the place of its original: for whoever looks at its class, its signature or its source."""

import copy
import inspect
import pickle
from abc import ABC

import pytest
import torch
from models import as_on_gpu, tiny_model, token_ids
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_fused_mlp import MLPSpec, fuse_model, fusion_report, register_mlp, unfuse_model
from hf_fused_mlp.reading import mlp as reading_mlp
from hf_fused_mlp.swap import Fused


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def fused_llama():
    return fuse_model(tiny_model(), norms=True)


def parts(model):
    return model.model.layers[0].mlp, model.model.norm


def test_the_class_is_found_by_its_name():
    for module, unfused in zip(parts(fused_llama()), parts(tiny_model()), strict=True):
        cls, original = type(module), type(unfused)
        assert cls is not original
        assert (cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__) == (
            original.__name__,
            original.__qualname__,
            original.__module__,
            original.__doc__,
        )
        assert inspect.getsource(cls) == inspect.getsource(original)
        assert inspect.signature(module.forward) == inspect.signature(unfused.forward)
        assert repr(module).startswith(f"Fused{original.__name__}(")


def test_who_finds_the_class_of_a_fused_module_means_every_module_of_that_class():
    """FSDP's policies look for the first module of a name and then for instances of its class."""
    model = fuse_model(tiny_model(num_hidden_layers=3), exclude=["model.layers.1.mlp"])
    found = type(model.model.layers[0].mlp)
    assert sum(isinstance(module, found) for module in model.modules()) == 3
    assert not isinstance(model.model.norm, found)
    assert not isinstance(model.model.layers[1].mlp, Fused)


def test_classes_are_pickled_and_copied():
    model = fused_llama()
    for module in parts(model):
        cls = type(module)
        assert pickle.loads(pickle.dumps(cls)) is cls
        assert copy.deepcopy(cls) is cls
    fuse_model(abstract := nn.ModuleList([Abstract()]))
    assert pickle.loads(pickle.dumps(type(abstract[0]))) is type(abstract[0])
    assert isinstance(Abstract(), type(abstract[0]))


@pytest.mark.parametrize("forced", [False, True], ids=["", "on a GPU"])
@pytest.mark.parametrize("index", [0, 1], ids=["mlp", "norm"])
@pytest.mark.parametrize(
    "make",
    [
        torch.fx.symbolic_trace,
        lambda module: torch.fx.symbolic_trace(nn.Sequential(module)),
        torch.jit.script,
        lambda module: torch.jit.trace(module, torch.randn(2, 64)),
        lambda module: torch.export.export(module, (torch.randn(2, 64),)).module(),
        lambda module: torch.export.export(
            module, (torch.randn(2, 64),), dynamic_shapes=({0: torch.export.Dim("n", max=64)},)
        ).module(),
    ],
    ids=["symbolic_trace", "symbolic_trace around", "script", "trace", "export", "export dynamic"],
)
@torch.no_grad()
def test_made_into_a_program(make, index, forced, monkeypatch):
    """The program is the original's, and holds no operator of ours."""
    if forced:
        as_on_gpu(monkeypatch)
    module, x = parts(fused_llama())[index], torch.randn(2, 64)
    expected = module.original_class.forward(module, x)
    program = make(module)
    torch.testing.assert_close(program(x), expected)
    assert "hf_fused_mlp" not in str(getattr(program, "code", ""))


@torch.no_grad()
def test_onnx(monkeypatch):
    pytest.importorskip("onnxscript")
    as_on_gpu(monkeypatch)
    mlp = parts(fused_llama())[0]
    program = torch.onnx.export(mlp, (torch.randn(2, 64),), dynamo=True, verbose=False)
    assert not any("fused" in node.op_type.lower() for node in program.model.graph)


class Reduces(MLP):
    def __reduce__(self):
        return _load, (self.state_dict(),)


def _load(state):
    module = Reduces()
    module.load_state_dict(state)
    return module


class NewWithArguments(MLP):
    def __new__(cls, tag):
        return super().__new__(cls)

    def __init__(self, tag):
        super().__init__()
        self.tag = tag

    def __getnewargs__(self):
        return (self.tag,)


class NewWithKeywords(NewWithArguments):
    def __new__(cls, *, tag):
        return nn.Module.__new__(cls)

    def __init__(self, *, tag):
        super().__init__(tag)

    def __getnewargs_ex__(self):
        return (), {"tag": self.tag}


class MadeByItsClass(MLP):
    def __reduce__(self):
        return type(self), (), self.__dict__


class Abstract(MLP, ABC):
    pass


@pytest.mark.parametrize(
    "make",
    [
        MLP,
        Reduces,
        lambda: NewWithArguments("t"),
        lambda: NewWithKeywords(tag="t"),
        MadeByItsClass,
        Abstract,
    ],
    ids=["usual", "__reduce__", "__getnewargs__", "__getnewargs_ex__", "type(self)", "ABC"],
)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, *(lambda module, p=p: pickle.loads(pickle.dumps(module, p)) for p in range(2, 6))],
    ids=["deepcopy", *(f"pickle {p}" for p in range(2, 6))],
)
@torch.no_grad()
def test_copies(make, copied):
    module, x = make(), torch.randn(2, 8)
    expected, tag = module(x), getattr(module, "tag", None)
    fuse_model(nn.ModuleList([module]), strict=True)
    twin = copied(module)
    assert type(twin) is type(module)
    assert getattr(twin, "tag", None) == tag
    assert torch.equal(twin(x), expected)


def test_subclasses_that_register_themselves():
    """A generated class is none of them, and needs no arguments that they do."""
    known = {}

    class Registered(MLP):
        def __init_subclass__(cls, name, **kwargs):
            super().__init_subclass__(**kwargs)
            known[name] = cls

    class One(Registered, name="one"):
        pass

    module = One()
    fuse_model(nn.ModuleList([module]), strict=True)
    assert isinstance(module, Fused)
    assert known == {"one": One}


def test_a_metaclass_that_keeps_a_register_by_name():
    """Neither looking at a model nor fusing it changes what the register holds."""
    known = {}

    class Once(type):
        def __init__(cls, name, bases, namespace):
            super().__init__(name, bases, namespace)
            if name in known:
                raise ValueError(f"two classes are called {name}")
            known[name] = cls

    class Kept(MLP, metaclass=Once):
        pass

    model = nn.ModuleList([Kept()])
    assert [mlp.state for mlp in fusion_report(model).mlps] == ["fusable"]
    fuse_model(model, strict=True)
    assert isinstance(model[0], Fused)
    assert known == {"Kept": Kept}


def test_a_class_that_cannot_be_subclassed_is_refused(monkeypatch):
    def fails(*args):
        raise TypeError("no subclasses")

    class Last(MLP):
        pass

    model = nn.ModuleList([Last(), Last()])
    monkeypatch.setattr("hf_fused_mlp.swap._like", fails)
    with pytest.raises(ValueError, match=r"0 \(Last\): its class cannot have subclasses \(TypeError: no subclasses\)"):
        fuse_model(model, strict=True)
    fuse_model(model)
    assert not any(isinstance(module, Fused) for module in model)


def test_a_patch_of_a_fused_modules_class_is_one_of_the_original():
    class Patched(MLP):
        pass

    module, x = Patched(), torch.randn(2, 8)
    fuse_model(nn.ModuleList([module]), strict=True)
    type(module).forward = lambda self, x: 7 * x
    type(module).counter = 1
    assert torch.equal(module(x), 7 * x)
    assert "was replaced" in fusion_report(nn.ModuleList([module])).mlps[0].reason
    assert torch.equal(Patched()(x), 7 * x)
    assert Patched.counter == 1
    del type(module).counter
    unfuse_model(nn.ModuleList([module]))
    assert torch.equal(module(x), 7 * x)
    assert not hasattr(Patched, "counter")


@torch.no_grad()
def test_a_forward_of_any_arguments(monkeypatch):
    class Any(MLP):
        def forward(*args):
            self, x = args
            return self.down(self.act(self.gate(x)) * self.up(x))

    monkeypatch.setattr(reading_mlp, "MLP_SPECS", type(reading_mlp.MLP_SPECS)())
    register_mlp(Any, MLPSpec("gated", gate="gate", up="up", down="down", activation="act"))
    as_on_gpu(monkeypatch)
    module, x = Any(), torch.randn(2, 8)
    expected = module(x)
    fuse_model(nn.ModuleList([module]), strict=True)
    torch.testing.assert_close(module(x), expected)
    with pytest.raises(TypeError, match="unexpected keyword"):
        module(x=x)


@pytest.mark.parametrize("name", ["a.b", "[red]x[/red]", "*", "mlp[0]", "<b>"])
@torch.no_grad()
def test_odd_names(name):
    model, x = nn.Module(), torch.randn(2, 8)
    model._modules[name] = module = MLP()
    expected = module(x)
    fuse_model(model, strict=True)
    assert [mlp.name for mlp in fusion_report(model).select("fused")] == [name]
    assert torch.equal(module(x), expected)
    unfuse_model(model)
    assert type(module) is MLP
    assert not fusion_report(model).select("fused")


def wrapped_by_checkpoint(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaMLP))
    return model


def compiled_one_by_one(model):
    for layer in model.model.layers:
        layer.mlp = torch.compile(layer.mlp, backend="eager")
    return model


def compiled_in_place(model):
    for layer in model.model.layers:
        layer.mlp.compile(backend="eager")
    return model


def saved_beside_an_adapter(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"], r=2))


def in_a_list(model):
    for layer in model.model.layers:
        layer.mlp = nn.Sequential(layer.mlp)
    return model


@pytest.mark.parametrize(
    "wrap",
    [wrapped_by_checkpoint, compiled_one_by_one, compiled_in_place, saved_beside_an_adapter, in_a_list],
    ids=lambda wrap: wrap.__name__,
)
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_a_wrapper_is_no_other_mlp(wrap, when):
    ids = token_ids(1, 5)
    expected = tiny_model()(ids).logits
    model = tiny_model()
    if when == "after":
        fuse_model(model)
    model = wrap(model).eval()
    fuse_model(model, strict=True)
    report = fusion_report(model)
    assert len(report.mlps) == len(report.select("fused")) == sum(isinstance(m, LlamaMLP) for m in model.modules())
    torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "hooks",
    [
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor),
    ],
    ids=["save_on_cpu", "saved_tensors_hooks"],
)
def test_hooks_on_saved_tensors(training, hooks, monkeypatch):
    as_on_gpu(monkeypatch)
    ids, grads = token_ids(2, 5), []
    for fuse in (lambda model: model, fuse_model):
        model = fuse(tiny_model()).train(training)
        with hooks():
            model(ids, labels=ids).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0])
