"""Memory that belongs to somebody else: whoever shares a weight with an unfused model shares it with a fused one.

The oracle is always an unfused model with which the same was done: what it severs a fused one may sever, and no more.
"""

import copy
import ctypes
import gc
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import psutil
import pytest
import torch
from models import as_on_gpu, tiny_config, tiny_model, token_ids
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_fused_mlp import fuse_model, fusion_report, unfuse_model
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.weights import is_packed


class Model(nn.Module):
    """Two MLPs, and tensors by the names of the parameters whose memory they share."""

    def __init__(self, bias=False, layers=2, **sizes):
        super().__init__()
        self.layers = nn.ModuleList([LlamaMLP(tiny_config(mlp_bias=bias, **sizes)) for _ in range(layers)])
        self.aliases = {}

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def new_model(**kwargs):
    torch.manual_seed(0)
    return Model(**kwargs).eval()


@pytest.fixture(autouse=True)
def kernels(monkeypatch, request):
    """Weights are packed where kernels run: on the CPU too, except in a test that asks where it runs."""
    if "where" not in request.fixturenames:
        as_on_gpu(monkeypatch)


WHERE = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def device_of(model):
    return next(model.parameters()).device


def x_for(model):
    return X.to(device_of(model))


# who else holds the memory of parameters; each gives tensors or arrays by the names of parameters


def parameters_of(model):
    return dict(model.named_parameters(remove_duplicate=False))


def in_buffer(model, names):
    """Every parameter is a view of one flat buffer, as DeepSpeed, apex and Megatron have it."""
    parameters = parameters_of(model)
    buffer = torch.cat([parameters[name].detach().flatten() for name in names])
    views = buffer.split([parameters[name].numel() for name in names])
    return point_at(model, {name: view.view_as(parameters[name]) for name, view in zip(names, views, strict=True)})


def point_at(model, memory):
    """Points parameters at `memory`, which gets their values, and gives it back."""
    for name, parameter in parameters_of(model).items():
        if name in memory:
            parameter.data = memory[name].copy_(parameter.detach())
    return memory


def in_model_order(model, directory):
    return in_buffer(model, list(parameters_of(model)))


def in_reversed_order(model, directory):
    return in_buffer(model, list(parameters_of(model))[::-1])


def in_vector(model, directory):
    vector = parameters_to_vector(model.parameters()).detach().clone()
    vector_to_parameters(vector, model.parameters())
    views = vector.split([parameter.numel() for parameter in model.parameters()])
    return {name: view.view_as(p) for (name, p), view in zip(model.named_parameters(), views, strict=True)}


def halves(model, directory, order=("gate_proj", "up_proj")):
    names = [f"layers.{layer}.{name}.weight" for layer in range(2) for name in order]
    return point_at(model, dict(zip(names, torch.empty(4, 176, 64, device=device_of(model)), strict=True)))


def halves_up_first(model, directory):
    return halves(model, directory, ("up_proj", "gate_proj"))


def stacked_gates(model, directory):
    memory = torch.empty(2, 176, 64, device=device_of(model))
    return point_at(model, {f"layers.{i}.gate_proj.weight": part for i, part in enumerate(memory)})


def other_model(model, directory):
    """A model that shares all weights by `.data`, as a reference model of reinforcement learning may."""
    other = new_model(bias=model.layers[0].gate_proj.bias is not None)
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        twin.data = parameter.data
    return {name: parameter.detach() for name, parameter in other.named_parameters()}


def other_linear(model, directory, name="gate_proj"):
    other = nn.Linear(64, 176, device=device_of(model))
    getattr(model.layers[0], name).weight.data = other.weight.data
    return {f"layers.0.{name}.weight": other.weight.detach()}


def other_linear_for_up(model, directory):
    return other_linear(model, directory, "up_proj")


def state_dict(model, directory):
    return dict(model.state_dict())


def arrays_of_weights(model, directory):
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def weights_of_arrays(model, directory):
    arrays = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = torch.from_numpy(arrays[name])
    return arrays


def memory_map(model, directory):
    arrays = {}
    for name, parameter in model.named_parameters():
        arrays[name] = np.memmap(directory / name, np.float32, "w+", shape=tuple(parameter.shape))
        arrays[name][...] = parameter.detach().numpy()
        parameter.data = torch.from_numpy(arrays[name])
    return arrays


def mapped_checkpoint(model, directory):
    torch.save(model.state_dict(), directory / "checkpoint")
    loaded = torch.load(directory / "checkpoint", mmap=True)
    model.load_state_dict(loaded, assign=True)
    return loaded


def shared_memory(model, directory):
    """What another process is given of a model that is shared with it."""
    model.share_memory()
    return {name: pickle.loads(ForkingPickler.dumps(p.detach())) for name, p in model.named_parameters()}


def transposed(model, directory):
    return point_at(model, {n: p.new_empty(p.shape[::-1]).t() for n, p in model.named_parameters() if p.dim() == 2})


def every_other_column(model, directory):
    return point_at(model, {n: p.new_empty(*p.shape, 2)[..., 0] for n, p in model.named_parameters()})


def window(model, directory):
    """Part of a longer tensor, as a row slice of an embedding or a padded allocation is."""
    return point_at(model, {n: p.new_empty(len(p) + 2, *p.shape[1:])[1:-1] for n, p in model.named_parameters()})


def down_alone(model, directory):
    return other_model_part(model, "down_proj")


def other_model_part(model, part):
    return {name: parameter.detach() for name, parameter in model.named_parameters() if part in name}


OWNERS = [
    in_model_order,
    in_reversed_order,
    in_vector,
    halves,
    halves_up_first,
    stacked_gates,
    other_model,
    other_linear,
    other_linear_for_up,
    state_dict,
    arrays_of_weights,
    weights_of_arrays,
    memory_map,
    mapped_checkpoint,
    shared_memory,
    transposed,
    every_other_column,
    window,
    down_alone,
]

ON_CPU = [arrays_of_weights, weights_of_arrays, memory_map, mapped_checkpoint, shared_memory]

# what is done to a model, word by word; an unfused one skips the words fuse and unfuse
STEPS = {
    "fuse": lambda model: fuse_model(model, strict=True),
    "unfuse": unfuse_model,
    "to": lambda model: model.to(device_of(model)),
    "float": lambda model: model.float(),
    "half-float": lambda model: model.half().float(),
    "assign": lambda model: model.load_state_dict(model.state_dict(), assign=True),
    "load": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "train": lambda model: model.train()(x_for(model)).sum().backward(),
}
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}
HISTORIES = [
    "share fuse",
    "share fuse to float",
    "share fuse fuse",
    "share fuse half-float",
    "share fuse assign to",
    "share fuse unfuse",
    "share fuse deepcopy",
    "share fuse pickle",
    "share fuse train unfuse",
    "fuse share",
    "fuse share to",
    "fuse share float",
    "fuse share half-float",
    "fuse share assign",
    "fuse share assign to",
    "fuse share load to",
    "fuse share fuse",
    "fuse share unfuse",
    "fuse share to unfuse",
    "fuse share deepcopy to",
    "fuse share pickle to",
    "fuse share deepcopy unfuse",
    "fuse unfuse share to",
]


def lived(model, history, share=None, fused=True):
    """`model` after `history`, and the copies that were made on the way."""
    models = [model]
    for step in history.split():
        if step == "share":
            model.aliases = share(model)
        elif step in COPIES:
            models.append(COPIES[step](model))
        elif fused or step not in ("fuse", "unfuse"):
            for each in models:
                STEPS[step](each)
    return models


def followers(model):
    """The parameters that change with the memory that they shared."""
    generator, parameters = torch.Generator().manual_seed(1), parameters_of(model)
    aliases = {name: torch.as_tensor(alias) for name, alias in model.aliases.items()}
    with torch.no_grad():
        for alias in aliases.values():
            alias.copy_(torch.randn(alias.shape, generator=generator) / 8)  # from the CPU: the same on every device
    return {name for name, alias in aliases.items() if torch.equal(parameters[name], alias)}


def assert_computes_with_its_weights(model):
    """Both ways: with the kernels, and through the projections."""
    twin = new_model(bias=model.layers[0].gate_proj.bias is not None)
    twin.to(device_of(model)).load_state_dict(model.state_dict())
    x = x_for(model)
    tolerance = 1e-4 if x.is_cuda else 1e-5
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), twin(x), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(model.train()(x), twin.train()(x), atol=tolerance, rtol=tolerance)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize(
    # without biases, up follows gate in the order of the model
    "owner, bias",
    [(owner, True) for owner in OWNERS] + [(in_model_order, False), (in_vector, False)],
    ids=lambda value: getattr(value, "__name__", "bias" if value else ""),
)
def test_who_shares_memory_goes_on_sharing_it(owner, bias, history, tmp_path):
    assert_shares(owner, bias, history, tmp_path, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("owner", [owner for owner in OWNERS if owner not in ON_CPU], ids=lambda owner: owner.__name__)
def test_on_a_gpu_too(owner, history, tmp_path):
    assert_shares(owner, True, history, tmp_path, "cuda")


def assert_shares(owner, bias, history, directory, where):
    plain, fused = (
        lived(new_model(bias=bias).to(where), history, lambda model: owner(model, directory), fused)
        for fused in (False, True)
    )
    assert len(plain) == len(fused)
    for unfused, model in zip(plain, fused, strict=True):
        for (name, expected), (_, actual) in zip(unfused.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(actual, expected), name
            assert actual.requires_grad
            assert actual.is_leaf
        lost = followers(unfused) - followers(model)
        assert not lost, f"severed: {', '.join(sorted(lost))}"
        assert sum(isinstance(module, FusedMLP) for module in model.modules()) == (0 if "unfuse" in history else 2)
        assert_computes_with_its_weights(model)


@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: owner.__name__)
def test_the_oracle_shares(owner, tmp_path):
    """Unfused, every row of the table is followed by all that it names, also after calls that move nothing."""
    model = new_model(bias=True)
    model.aliases = owner(model, tmp_path)
    model.to("cpu").float()
    assert followers(model) == model.aliases.keys() != set()


@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: owner.__name__)
def test_what_was_not_moved_is_not_moved_back(owner, tmp_path):
    model = new_model(bias=True)
    model.aliases = owner(model, tmp_path)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for step in (fuse_model, fuse_model, lambda model: model.to("cpu"), unfuse_model):
        step(model)
        parameters = parameters_of(model)
        assert {name: parameters[name].data_ptr() for name in model.aliases} == {n: pointers[n] for n in model.aliases}


@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: owner.__name__)
@pytest.mark.parametrize("history", ["share fuse", "fuse share", "fuse share to"])
def test_the_report_says_what_is_not_packed(owner, history, tmp_path):
    (model,) = lived(new_model(bias=True), history, lambda model: owner(model, tmp_path))
    statuses = fusion_report(model).mlps
    assert [status.state for status in statuses] == ["fused"] * 2
    for layer, status in zip(model.layers, statuses, strict=True):
        packed = is_packed(layer.gate_proj.weight, layer.up_proj.weight)
        assert packed == ("not packed" not in (status.reason or "")), status
    if owner is down_alone:
        assert all(status.reason is None for status in statuses)


def test_a_report_of_lost_packing_names_the_remedy_and_fusing_again_restores_it():
    model = fuse_model(new_model())
    assert all(status.reason is None for status in fusion_report(model).mlps)
    model.load_state_dict(new_model().state_dict(), assign=True)
    assert all("not packed" in status.reason for status in fusion_report(model).mlps)
    assert all("fuse_model" in status.reason for status in fusion_report(model).mlps)
    fuse_model(model)
    assert all(status.reason is None for status in fusion_report(model).mlps)


def test_what_has_no_gate_is_not_reported_as_not_packed():
    for model_type in ("phi3", "gpt_neox"):
        model = fuse_model(tiny_model(model_type), strict=True)
        assert all(status.reason is None for status in fusion_report(model).mlps)


# parameters that several modules hold


def tie(*names):
    def tied(model):
        first, *others = (name.rsplit(".", 1) for name in names)
        for module, attribute in others:
            setattr(model.get_submodule(module), attribute, getattr(model.get_submodule(first[0]), first[1]))

    return tied


TIES = {
    "gates": tie("layers.0.gate_proj.weight", "layers.1.gate_proj.weight"),
    "ups": tie("layers.0.up_proj.weight", "layers.1.up_proj.weight"),
    "gates of three": tie(*(f"layers.{i}.gate_proj.weight" for i in range(3))),
    "gate is up": tie("layers.0.gate_proj.weight", "layers.0.up_proj.weight"),
    "gate is the next layer's up": tie("layers.0.gate_proj.weight", "layers.1.up_proj.weight"),
    "gates and ups": lambda model: [
        tie(f"layers.0.{name}.weight", f"layers.1.{name}.weight")(model) for name in ("gate_proj", "up_proj")
    ],
    "whole projections": tie("layers.0.gate_proj", "layers.1.gate_proj"),
    "gates by .data": lambda model: setattr(
        model.layers[1].gate_proj.weight, "data", model.layers[0].gate_proj.weight.data
    ),
}
TIED_HISTORIES = [history for history in HISTORIES if "unfuse share" not in history]


def ties_of(model, key):
    """Names of parameters, grouped by `key`."""
    groups = {}
    for name, parameter in parameters_of(model).items():
        groups.setdefault(key(parameter), set()).add(name)
    return {frozenset(group) for group in groups.values()}


@pytest.mark.parametrize("history", TIED_HISTORIES)
@pytest.mark.parametrize("kind", TIES)
def test_ties(kind, history):
    """`share` ties here."""
    plain, fused = (
        lived(new_model(layers=3), history, lambda model: TIES[kind](model) and {}, fused) for fused in (False, True)
    )
    for unfused, model in zip(plain, fused, strict=True):
        assert ties_of(model, id) == ties_of(unfused, id)
        assert ties_of(model, torch.Tensor.data_ptr) == ties_of(unfused, torch.Tensor.data_ptr)
        expected = unfused.eval()(X)
        torch.testing.assert_close(model.eval()(X), expected, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
        pointers = [parameter.data_ptr() for parameter in model.parameters()]
        model.to("cpu")
        fuse_model(model)
        model.to("cpu")
        settled = [parameter.data_ptr() for parameter in model.parameters()]
        fuse_model(model).to("cpu")
        assert [parameter.data_ptr() for parameter in model.parameters()] == settled, "copied at every call"
        if "unfuse" not in history and "pickle" not in history:  # which has aliases of weights while it loads
            assert settled == pointers, "copied once more"


def resident():
    """MiB of this process."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss / 2**20


def untied(model):
    pass


@pytest.mark.parametrize("kind", ["gates of three", "ups", "gates by .data", "gates and ups", "gate is up", None])
def test_memory_does_not_grow(kind):
    weight = 8  # MiB
    model = new_model(layers=4, hidden_size=1024, intermediate_size=2048)
    TIES.get(kind, untied)(model)
    steps = [fuse_model, lambda model: model.to("cpu"), fuse_model, unfuse_model, fuse_model, unfuse_model]
    fuse_model(new_model())  # what the first call imports
    start, grown = resident(), []
    for step in steps:
        step(model)
        grown.append(round(resident() - start))
    assert max(grown) < weight / 2, grown


# storages that are emptied and filled again, as frameworks that offload weights do


def empty_and_refill(model):
    for parameter in model.parameters():
        kept, storage = parameter.detach().clone(), parameter.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        parameter.data.copy_(kept)


def empty_all_and_refill(model):
    """All at once, so that the halves of a block are empty together; in the other order they come back."""
    kept = {name: (p.detach().clone(), p.untyped_storage().nbytes()) for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.untyped_storage().resize_(0)
    for name, parameter in reversed(list(model.named_parameters())):
        parameter.untyped_storage().resize_(kept[name][1])
        parameter.data.copy_(kept[name][0])


def leave_for_a_copy(model):
    """As verl does."""
    for parameter in model.parameters():
        old = parameter.data
        parameter.data = parameter.data.clone()
        old.storage().resize_(0)


def empty_the_last(model):
    for name, parameter in list(model.named_parameters())[::-1]:
        if "up_proj" in name:
            kept, storage = parameter.detach().clone(), parameter.untyped_storage()
            size = storage.nbytes()
            storage.resize_(0)
            storage.resize_(size)
            parameter.data.copy_(kept)


@WHERE
@pytest.mark.parametrize("resize", [empty_and_refill, empty_all_and_refill, leave_for_a_copy, empty_the_last])
@pytest.mark.parametrize("before", ["", "fuse", "fuse to", "fuse unfuse", "fuse unfuse fuse", "fuse deepcopy"])
@pytest.mark.parametrize("after", ["", "to", "fuse", "unfuse", "unfuse fuse"])
def test_storages_can_be_resized(resize, before, after, where):
    model, expected = lived(new_model().to(where), before)[-1], new_model().to(where)
    resize(model)
    lived(model, after)
    x = x_for(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x), atol=1e-5, rtol=1e-5)
    for (name, parameter), (_, actual) in zip(expected.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(actual, parameter), name


@WHERE
@pytest.mark.parametrize("before", ["fuse", "fuse to", "fuse half-float", "fuse deepcopy", "fuse pickle"])
def test_a_storage_that_is_emptied_frees_its_memory(before, where):
    model = new_model(layers=1, hidden_size=2048, intermediate_size=4096)  # 32 MiB a weight
    model = lived(model.to(where), before)[-1]
    for name in ("gate_proj", "up_proj"):
        start = allocated(where)
        getattr(model.layers[0], name).weight.untyped_storage().resize_(0)
        assert start - allocated(where) > 28, name


def allocated(where):
    return torch.cuda.memory_allocated() / 2**20 if where == "cuda" else resident()


# wrapped, pruned and hooked since it was fused

CHANGES = {
    "hook": lambda linear: linear.register_forward_hook(lambda *args: None),
    "prune": lambda linear: prune.identity(linear, "weight"),
    "frozen": lambda linear: linear.requires_grad_(False),
    "forward": lambda linear: setattr(linear, "forward", lambda x: nn.functional.linear(x, linear.weight)),
    "parameter": lambda linear: linear.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "spectral": lambda linear: nn.utils.parametrizations.weight_norm(linear),
    "replaced": lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.detach().clone())),
}


@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])
@pytest.mark.parametrize("change", CHANGES)
def test_unfusing_gives_every_weight_memory_of_its_own(change, name):
    """What was one block is two, whatever is around the weights: without one of them its memory is free."""
    model = fuse_model(new_model(layers=1, hidden_size=2048, intermediate_size=4096), strict=True)  # 32 MiB a weight
    mlp = model.layers[0]
    weights = {key: getattr(mlp, key).weight for key in ("gate_proj", "up_proj")}
    values = {key: weight.detach().clone() for key, weight in weights.items()}
    CHANGES[change](getattr(mlp, name))
    unfuse_model(model)
    assert type(mlp) is LlamaMLP
    for key, weight in weights.items():
        assert torch.equal(weight, values[key]), key
    other = "up_proj" if name == "gate_proj" else "gate_proj"
    del values
    start = resident()
    weights.pop(other)
    setattr(mlp, other, None)
    del weight
    assert start - resident() > 28, "freeing one weight frees its half"


# modes of the caller

INFERENCE = ["fuse", "fuse unfuse", "fuse fuse", "fuse to", "fuse assign fuse", "fuse deepcopy", "fuse pickle"]


@pytest.mark.parametrize("history", INFERENCE)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("call", [False, True], ids=["", "called"])
def test_inference_mode_does_not_end_training(history, norms, call, monkeypatch):
    if norms:
        monkeypatch.setitem(STEPS, "fuse", lambda model: fuse_model(model, norms=True))
    ids = token_ids(2, 5)
    models = [tiny_model(), tiny_model()]
    with torch.inference_mode():
        for fused in (False, True):
            models[fused] = lived(models[fused], history, fused=fused)[-1]
            if call:
                models[fused](ids)
    assert_train_alike(*models)


@pytest.mark.parametrize("history", ["to", "half-float", "unfuse", "fuse", "load", "assign fuse"])
def test_a_model_that_was_fused_before_goes_through_inference_mode(history):
    plain, fused = tiny_model(), fuse_model(tiny_model())
    with torch.inference_mode():
        lived(plain, history, fused=False)
        lived(fused, history)
    assert_train_alike(plain, fused)


def test_loading_fused_in_inference_mode(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    models = []
    for use_fused_mlp in (False, True):
        with torch.inference_mode():
            models.append(AutoModelForCausalLM.from_pretrained(tmp_path, use_fused_mlp=use_fused_mlp))
    assert_train_alike(*models)


def assert_train_alike(plain, fused):
    """What can be trained is the same, and learns the same; so does a model in evaluation mode."""
    state = {name: parameter.is_inference() for name, parameter in plain.named_parameters()}
    assert {name: parameter.is_inference() for name, parameter in fused.named_parameters()} == state
    if any(state.values()):
        return  # nothing to compare: unfused, it cannot be trained either
    ids = token_ids(2, 5)
    for training in (True, False):
        for model in (plain, fused):
            model.train(training)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                model(ids, labels=ids).loss.backward()
                assert all(parameter.grad is not None for parameter in model.parameters())
                optimizer.step()
        for (name, p), (_, q) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
            torch.testing.assert_close(q, p, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("history", ["fuse", "fuse fuse", "fuse unfuse"])
def test_fake_weights_stay_usable(history):
    with FakeTensorMode():
        (model,) = lived(new_model(), history)
        fusion_report(model)
        with torch.no_grad():
            assert model(torch.randn(3, 64)).shape == (3, 64)
        model(torch.randn(3, 64)).sum().backward()


@pytest.mark.parametrize("before", ["", "fuse"])
@pytest.mark.parametrize("history", ["fuse", "fuse fuse", "unfuse", "fuse unfuse"])
def test_real_weights_are_left_alone_by_fake_mode(history, before):
    model = lived(new_model(), before)[0]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        lived(model, history)
        fusion_report(model)
    assert len(values) == 6
    for name, parameter in model.named_parameters():
        assert type(parameter.data) is torch.Tensor, name
        assert parameter.data_ptr(), name  # what has no memory raises here, and would crash if it was read
        assert torch.equal(parameter, values[name]), name
    with torch.no_grad():
        torch.testing.assert_close(model(X), new_model()(X), atol=1e-5, rtol=1e-5)
    unfuse_model(fuse_model(model))
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


# another process


def receive(queue, answers):
    """Fuses a model whose weights another process holds, and says which of them follow it."""
    memory = queue.get()
    model = new_model().cuda()
    for name, parameter in model.named_parameters():
        parameter.data = memory[name]
    del memory
    fuse_model(model, strict=True)
    model.to("cuda")
    with torch.no_grad():
        model(X.cuda())
    torch.cuda.synchronize()
    answers.put(True)
    queue.get()
    answers.put({name: bool((parameter == 7).all()) for name, parameter in model.named_parameters()})
    queue.get()


@pytest.mark.gpu
def test_cuda_ipc():
    context = torch.multiprocessing.get_context("spawn")
    queue, answers = context.Queue(), context.Queue()
    child = context.Process(target=receive, args=(queue, answers))
    child.start()
    weights = {name: parameter.detach().cuda() for name, parameter in new_model().named_parameters()}
    queue.put(weights)
    assert answers.get(timeout=300)
    for weight in weights.values():
        weight.fill_(7)
    torch.cuda.synchronize()
    queue.put(True)
    followed = answers.get(timeout=300)
    queue.put(True)
    child.join()
    assert all(followed.values()), followed
