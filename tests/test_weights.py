"""Packing: same values, one block, and the parameters never notice."""

import copy
import io
import pickle

import pytest
import torch
from accelerate import Accelerator
from models import as_on_gpu, tiny_model, token_ids
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from hf_fused_mlp import fuse_model, fusion_report, unfuse_model
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.weights import is_packed, pack, unpack


def pair(rows=6, columns=4):
    return nn.Parameter(torch.randn(rows, columns)), nn.Parameter(torch.randn(rows, columns))


def packs(model):
    mlps = [module for module in model.modules() if isinstance(module, FusedMLP)]
    assert mlps
    return [is_packed(mlp.gate_proj.weight, mlp.up_proj.weight) for mlp in mlps]


@pytest.fixture
def packing(monkeypatch):
    """Weights are packed where the kernels run."""
    as_on_gpu(monkeypatch)


def test_pack_and_back():
    gate, up = pair()
    values, identities = (gate.clone(), up.clone()), (id(gate), id(up))
    assert not is_packed(gate, up)
    pack(gate, up)
    assert is_packed(gate, up)
    assert torch.equal(gate, values[0])
    assert torch.equal(up, values[1])
    for half in (gate, up):
        assert half.untyped_storage().nbytes() == half.nbytes, "each half is a storage of its own"
    pointer = gate.data_ptr()
    pack(gate, up)
    assert gate.data_ptr() == pointer, "packing twice moves nothing"

    unpack((gate, up))
    assert not is_packed(gate, up)
    assert torch.equal(gate, values[0])
    assert torch.equal(up, values[1])
    assert (id(gate), id(up)) == identities
    assert gate.requires_grad


def test_optimizer_step_writes_through_the_pack():
    gate, up = pair()
    optimizer = torch.optim.SGD([gate, up], lr=1.0)
    pack(gate, up)
    expected = gate.detach() - 1, up.detach() - 1
    (gate.sum() + up.sum()).backward()
    optimizer.step()
    assert is_packed(gate, up)
    assert torch.equal(gate, expected[0])
    assert torch.equal(up, expected[1])


@pytest.mark.parametrize(
    "gate, up",
    [
        (torch.empty(6, 4, device="meta"), torch.empty(6, 4, device="meta")),
        (torch.randn(6, 4), torch.empty(6, 4, device="meta")),
        (torch.randn(6, 4), torch.randn(6, 4).half()),
        (torch.randn(6, 4), torch.randn(5, 4)),
        (torch.randn(6, 4).share_memory_(), torch.randn(6, 4).share_memory_()),
    ],
    ids=["meta", "half on meta", "dtypes", "shapes", "shared memory"],
)
def test_what_cannot_share_a_block_stays(gate, up):
    gate, up = nn.Parameter(gate), nn.Parameter(up)
    before = [(t.data_ptr(), t.dtype, t.device, t.is_shared()) for t in (gate, up)]
    pack(gate, up)
    unpack((gate, up))
    assert [(t.data_ptr(), t.dtype, t.device, t.is_shared()) for t in (gate, up)] == before


@pytest.mark.parametrize(
    "remake",
    [
        lambda model: model.to(torch.float64),
        lambda model: model.half().float(),
        copy.deepcopy,
        # while it loads, pickle has aliases of the weights
        lambda model: pickle.loads(pickle.dumps(model)).to("cpu"),
        lambda model: torch_save_and_load(model).double(),
        lambda model: copy.deepcopy(model).to("meta").to_empty(device="cpu"),
    ],
    ids=["to", "half", "deepcopy", "pickle", "torch.save", "to_empty"],
)
def test_packing_survives(remake, packing):
    model = remake(fuse_model(tiny_model()))
    assert all(packs(model))


def torch_save_and_load(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def test_plain_pickle_is_no_larger():
    model = tiny_model()
    size = len(pickle.dumps(model))
    assert len(pickle.dumps(fuse_model(model))) < 1.02 * size


@pytest.mark.parametrize(
    "save, load",
    [
        (
            lambda model, path: Accelerator().save_model(model, path),
            lambda path: load_file(path / "model.safetensors"),
        ),
        (
            lambda model, path: save_model(model, path / "m.safetensors"),
            lambda path: load_file(path / "m.safetensors"),
        ),
        (lambda model, path: save_file(model.state_dict(), path / "f"), lambda path: load_file(path / "f")),
        (lambda model, path: torch.save(model.state_dict(), path / "t"), lambda path: torch.load(path / "t")),
    ],
    ids=["accelerate", "safetensors.save_model", "safetensors.save_file", "torch.save"],
)
def test_every_way_of_saving_keeps_every_weight(save, load, tmp_path, packing):
    """Some look for tensors of one storage and drop all but one of them."""
    model = tiny_model()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(fuse_model(model, strict=True), tmp_path)
    saved = load(tmp_path)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox"])
def test_copies_are_fused_and_give_the_same_logits(model_type, packing):
    model, ids = fuse_model(tiny_model(model_type)), token_ids(1, 5)
    with torch.no_grad():
        logits = model(ids).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch_save_and_load(model)):
            assert sum(isinstance(module, FusedMLP) for module in twin.modules()) == 2
            assert torch.equal(twin(ids).logits, logits)


def test_load_state_dict_writes_through_the_pack(packing):
    model, other = fuse_model(tiny_model()), tiny_model()
    with torch.no_grad():
        other.model.layers[0].mlp.gate_proj.weight.normal_()
    model.load_state_dict(other.state_dict())
    assert all(packs(model))
    ids = token_ids(1, 5)
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_fusing_again_restores_a_lost_pack(packing):
    model = fuse_model(tiny_model())
    model.load_state_dict(tiny_model().state_dict(), assign=True)
    assert not any(packs(model))
    assert {mlp.reason for mlp in fusion_report(model).mlps} == {
        "not packed: gate and up were replaced or moved after fusing; call fuse_model(model) again"
    }
    fuse_model(model)
    assert all(packs(model))
    assert {mlp.reason for mlp in fusion_report(model).mlps} == {None}


@pytest.mark.gpu
def test_moving_to_the_gpu_packs_there():
    model = fuse_model(tiny_model()).cuda()
    assert all(packs(model))
    assert not any(packs(model.cpu()))


@pytest.mark.gpu
def test_memory_while_fusing_is_one_layer():
    model = tiny_model(hidden_size=512, intermediate_size=2048, num_hidden_layers=6).cuda()
    layer_bytes = 2 * model.model.layers[0].mlp.gate_proj.weight.nbytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fuse_model(model, strict=True)
    assert torch.cuda.max_memory_allocated() - before <= layer_bytes
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("hold", [lambda weight: weight.untyped_storage(), lambda weight: weight.storage()])
def test_a_storage_that_somebody_holds_stays_the_weights(hold, packing):
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    held = hold(mlp.gate_proj.weight)
    fuse_model(model)
    unfuse_model(model)
    assert held.data_ptr() == mlp.gate_proj.weight.data_ptr()
