"""Every model class of Transformers with MLPs or routed experts that fuse, made small, against itself unfused.

In evaluation, in evaluation with gradients and in training: the same outputs, and the same gradient for every
parameter. Once as on any CPU, and once as on a GPU, with the operators.
"""

import copy
import time
import warnings

import pytest
import torch
import transformers
from models import experts_as_on_gpu
from small_models import inputs_for, model_classes, small_config, small_model
from transformers.utils import ModelOutput, logging

from hf_fused_mlp import fuse_model, fusion_report
from hf_fused_mlp.cli.model_types import MODEL_TYPES
from hf_fused_mlp.swap import Fused

pytestmark = [pytest.mark.slow, pytest.mark.long]

# as many model types are compared, or more; earlier versions of Transformers have fewer
NEWEST = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
FLOOR = 365 if NEWEST else 270
MODES = ("evaluation", "gradients", "training")


@pytest.fixture(autouse=True)
def quiet():
    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def results(tmp_path_factory, worker_id):
    """A directory that all workers of this run share: a file for every model type, with why it was skipped."""
    base = tmp_path_factory.getbasetemp()
    directory = (base if worker_id == "master" else base.parent) / "differential"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fused_and_unfused(model_type, monkeypatch, results):
    pairs, reasons = [], []
    try:
        for model_class in model_classes(small_config(model_type)):
            built = build(model_class, model_type)
            if isinstance(built, str):
                reasons.append(f"{model_class.__name__}: {built}")
            else:
                pairs.append(built)
    except Exception as error:  # configs check themselves in many ways, or not at all
        reasons.append(f"no small config: {_line(error)}")
    reason = "" if pairs else "; ".join(reasons) or "no Auto class builds it"
    (results / model_type).write_text(reason)
    for pair in pairs:
        compare(*pair, monkeypatch)
    if reason:
        pytest.skip(reason)


def test_how_many_are_covered(results):
    """The last test: what others skipped is listed, and may not become more."""
    end = time.monotonic() + 120
    while len(list(results.iterdir())) < len(MODEL_TYPES) and time.monotonic() < end:
        time.sleep(0.5)  # for other workers
    found = {path.name: path.read_text() for path in results.iterdir()}
    if len(found) < len(MODEL_TYPES):
        pytest.skip(
            f"{len(found)} of {len(MODEL_TYPES)} model types were tried in this run, or finished without failing"
        )
    covered = [name for name, reason in found.items() if not reason]
    skipped = "\n".join(f"  {name}: {reason}" for name, reason in sorted(found.items()) if reason)
    print(f"{len(covered)} model types are compared, {len(found) - len(covered)} are not:\n{skipped}")
    assert len(covered) >= FLOOR, f"only {len(covered)} model types are compared; not so:\n{skipped}"


def build(model_class, model_type):
    """A small model, inputs, and the names of what they reach and can be fused; or why there is none."""
    try:
        model = small_model(model_class, small_config(model_type))
    except Exception as error:
        return f"not built: {_line(error)}"
    fusable = [status.name for status in fusion_report(model).select("fusable")]
    if not fusable:
        return "nothing of it fuses"
    reached, errors = set(), []
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: reached.add(name)) for name in fusable
    ]
    try:
        for inputs in inputs_for(model):
            try:
                run(model, inputs, "evaluation")
            except Exception as error:
                errors.append(f"{', '.join(inputs)}: {_line(error)}")
            else:
                return (model, inputs, reached) if reached else f"{', '.join(inputs)} reach nothing that fuses"
    except Exception as error:
        errors.append(f"no inputs: {_line(error)}")
    finally:
        for hook in hooks:
            hook.remove()
    return f"not called: {' | '.join(errors)}"


def compare(model, inputs, reached, monkeypatch):
    experts = reached.intersection(status.name for status in fusion_report(model).experts)
    for mode in MODES:
        try:
            expected = run(copy.deepcopy(model), inputs, mode)
        except Exception:
            if mode == "evaluation":
                raise
            continue  # not differentiable, or not to be trained like this
        for kernels in (False, True):
            calls = []
            with monkeypatch.context() as patch:
                if kernels:
                    calls = experts_as_on_gpu(patch)
                fused = fuse_model(copy.deepcopy(model))
                statuses = fusion_report(fused).select("fused")
                assert statuses
                assert len(statuses) == sum(isinstance(module, Fused) for module in fused.modules())
                assert kernels == (not any("on cpu" in (status.reason or "") for status in statuses))
                actual = run(fused, inputs, mode)
            assert bool(calls) == bool(kernels and experts and mode == "evaluation")
            where = f"{type(model).__name__}, {mode}, {'with' if kernels else 'without'} the operators"
            if problem := difference(actual, expected):
                if difference(run(copy.deepcopy(model), inputs, mode), expected):
                    break  # unfused it is no more like itself
                pytest.fail(f"{where}: {problem}")


def run(model, inputs, mode):
    """Outputs by position, or with gradients those of all parameters too, by name."""
    model.train(mode == "training")
    transformers.set_seed(0)
    if mode == "evaluation":
        with torch.no_grad():
            return [dict(enumerate(floats_of(model(**inputs))))]
    outputs = list(floats_of(model(**inputs)))
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(out.shape, generator=generator) * out).sum() for out in outputs if out.requires_grad)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [dict(enumerate(out.detach() for out in outputs)), gradients]


def floats_of(output):
    """All tensors of floats in what a model gives."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (ModelOutput, dict)):
        for value in output.values():
            yield from floats_of(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from floats_of(value)


def difference(actual, expected):
    """What is not the same to about 1e-5, in words; None if all is."""
    for part, other in zip(actual, expected, strict=True):
        if part.keys() != other.keys():
            return f"{part.keys() ^ other.keys()} are there once"
        # what is nothing but rounding errors is compared with the largest of its kind
        scale = max((rms(finite(value)) for value in other.values()), default=0)
        for name, value in other.items():
            if value.shape != part[name].shape or value.dtype != part[name].dtype:
                return f"{name}: {part[name].dtype} {tuple(part[name].shape)}, not {value.dtype} {tuple(value.shape)}"
            apart = torch.where(part[name] == value, 0, part[name] - value)  # infinities are equal to themselves
            apart = torch.where(part[name].isnan() & value.isnan(), 0, apart)
            if not rms(apart) <= 1e-5 * rms(finite(value)) + 1e-6 * scale:
                return f"{name}: apart by {rms(apart)}, of {rms(finite(value))}"
    return None


def rms(tensor):
    return tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0


def finite(tensor):
    return tensor.nan_to_num(0, 0, 0)


def _line(error):
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
