"""Plans on disk: a JSON document of measured plans for one GPU, a list for each kind of problem (`KINDS`).

Its header says what the plans were measured on. Plans that do not apply here, or cannot be read, are skipped with a
warning. So a wrong plan is never loaded, and a bad file never stops a forward.
"""

import ast
import datetime
import hashlib
import json
import math
import reprlib
import stat
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
import triton
from filelock import FileLock

from hf_fused_mlp import kernels
from hf_fused_mlp.files import replace_file
from hf_fused_mlp.kernels.experts import choices
from hf_fused_mlp.logs import logger
from hf_fused_mlp.tuning.buckets import bucket
from hf_fused_mlp.types import GPU, ExpertsKey, ExpertsPlan, Plan, ProblemKey, TileConfig

FORMAT = 1
VERSIONS = ("torch", "triton")
_LARGEST = {"num_warps": 32, "num_stages": 32, "split_k": 64}
LARGEST_TILE = 1 << 16  # elements; twice what any candidate has, and much more takes minutes to compile
LARGEST_FILE = 64 << 20  # bytes; a plan takes 400
REMEDY = "measure it again with `hf-fused-mlp tune`"

T = TypeVar("T")

_types_of = cache(get_type_hints)

_quote = reprlib.Repr()
_quote.maxstring = _quote.maxother = _quote.maxlong = 100
shown = _quote.repr  # limits for the contents of a file, which may be long or deep


@dataclass(frozen=True)
class TunedPlan:
    """The fastest plan for a problem, and the median microseconds that it took and that it is compared with.

    That is the unfused path for MLPs, and the rule's plan for routed experts.
    """

    key: ProblemKey | ExpertsKey
    plan: Plan | ExpertsPlan
    plan_us: float
    other_us: float


def read(path: Path, gpu: GPU, any_version: bool = False) -> dict[ProblemKey | ExpertsKey, TunedPlan]:
    """The plans in `path` that apply on `gpu`; one warning says what was skipped.

    Args:
        any_version: take plans that were measured with other versions of PyTorch and Triton.
    """
    plans: dict[ProblemKey | ExpertsKey, TunedPlan] = {}
    try:
        document = _load(path)
        reason = _stale_reason(document, gpu, ignored=VERSIONS if any_version else ())
    except FileNotFoundError:
        return plans
    except Exception as error:  # a file may hold anything
        reason = f"not a file of plans ({type(error).__name__}: {_short(error)})"
    if reason is not None:
        logger.warning("%s: %s; its plans are not used, %s", path, reason, REMEDY)
        return plans

    skipped: list[str] = []
    for name, kind in KINDS.items():
        for index, entry in enumerate(document.get(name, [])):
            try:
                tuned = _from_json(kind, entry, gpu, document["kernels"])
                plans[tuned.key] = tuned
            except Exception as error:  # and so may an entry
                skipped.append(f"{name}[{index}]: {_short(error)}")
    if skipped:
        more = f" (and {len(skipped) - 1} more like it)" if len(skipped) > 1 else ""
        logger.warning("%s: %s; skipped%s, %s", path, skipped[0], more, REMEDY)
    return plans


def write(path: Path, tuned: Iterable[TunedPlan], gpu: GPU) -> None:
    """Adds plans to `path`, replacing those for the same problems and dropping those that no longer apply.

    The file is replaced as a whole (`replace_file`), and by one process at a time; the lock file next to it stays.

    Raises:
        OSError: the directory cannot be made or written to, or the file is one of something else; it is as it was.
    """
    path = path.resolve()  # of a link, what it points to is replaced
    if path.exists() and not _is_of_plans(path):
        raise FileExistsError(f"{path} exists and is not a file of plans")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        plans = read(path, gpu) | {entry.key: entry for entry in tuned}
        lists = ""
        for name, kind in KINDS.items():
            keys: Any = sorted((key for key in plans if type(key) is kind.key), key=kind.order)
            if keys or name == "plans":
                lines = ",\n".join(json.dumps(_to_json(kind, plans[key])) for key in keys)
                lists += f',\n "{name}": [\n{lines}\n ]'
        header = json.dumps(header_of(gpu), indent=1)[:-2]
        replace_file(path, f"{header}{lists}\n}}\n")


def header_of(gpu: GPU) -> dict[str, Any]:
    """What plans depend on besides the problem."""
    return {
        "format": FORMAT,
        "gpu": gpu.name,
        "num_sms": gpu.num_sms,
        "kernels": kernel_hashes(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _unsupported(key: ProblemKey, plan: Plan) -> str | None:
    """Why `plan` cannot run `key`, or None if it can."""
    for name, launch, config in (("up", key.up, plan.up), ("down", key.down, plan.down)):
        if config.kernel == "torch":
            continue
        if config.kernel not in kernels.KERNELS:
            return f"{name}: unknown kernel {config.kernel!r}; known are torch, {', '.join(kernels.KERNELS)}"
        kernel = kernels.KERNELS[config.kernel]
        if reason := kernel.supports(launch):
            return f"{name}: {config.kernel} does not run this problem: {reason}"
        if launch.k > config.block_k * getattr(kernel, "MOST_STEPS", launch.k):  # code of minutes to compile
            return f"{name}: block_k {config.block_k} is too small for the unrolled loop of {config.kernel}"
    return None


class Kind(NamedTuple):
    """A list of a file of plans: the classes of its problems and plans, and what its plans are compared with.

    `unsupported` gives the reason why a plan cannot run a problem, `order` is what the list is sorted by.
    """

    key: type
    plan: type
    kernels: dict[str, ModuleType]
    unsupported: Callable[[Any, Any], str | None]
    order: Callable[[Any], tuple]
    other: str


def _order(key: ProblemKey) -> tuple:
    kind = key.gated, key.activation, str(key.dtype), key.bias, key.storage
    return key.hidden, key.intermediate, key.out, *kind, key.m


def _order_of_experts(key: ExpertsKey) -> tuple:
    kind = key.layout, key.gated, key.activation, str(key.dtype), key.bias, key.storage
    return key.hidden, key.intermediate, key.experts, key.top_k, *kind, key.m


KINDS = {
    "plans": Kind(ProblemKey, Plan, kernels.KERNELS, _unsupported, _order, "unfused_us"),
    "experts": Kind(ExpertsKey, ExpertsPlan, choices.KERNELS, choices.unsupported, _order_of_experts, "rule_us"),
}


@cache
def kernel_hashes() -> dict[str, str]:
    """For each kernel, a hash of its Triton functions and of those that all kernels share.

    Comments, docstrings, layout, launchers and the version of Python do not change it.
    """
    files = {name: Path(str(kernel.__file__)) for kind in KINDS.values() for name, kernel in kind.kernels.items()}
    codes = {name: _imported_code(file) + kernel_code(file.read_text(), file.stem) for name, file in files.items()}
    return {name: hashlib.sha256(code.encode()).hexdigest()[:16] for name, code in codes.items()}


def _imported_code(file: Path) -> str:
    """The canonical text of the Triton functions in the files of kernels that `file` imports.

    A file in a folder of kernels brings along what it imports itself.
    """
    root = Path(kernels.__file__).parent
    code = ""
    for node in ast.parse(file.read_text()).body:
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(f"{kernels.__name__}."):
            continue
        place = root.joinpath(*str(node.module).removeprefix(f"{kernels.__name__}.").split("."))
        for imported in (place.with_suffix(".py"), *(place / f"{alias.name}.py" for alias in node.names)):
            if imported.exists():
                code += (_imported_code(imported) if imported.parent != root else "") + kernel_code(
                    imported.read_text()
                )
    return code


def kernel_code(source: str, start: str | None = None) -> str:
    """The canonical text of the Triton functions in `source`, without comments, layout and bare strings.

    With `start`, only of the functions that it runs, which excludes a kernel's backward. Not `ast.dump`, which prints
    fields, though empty, that only some versions of Python have.
    """
    statements = ast.parse(source).body
    if start is not None:
        functions = {node.name: node for node in statements if isinstance(node, ast.FunctionDef)}
        statements = _reached(functions, start)

    def canonical(node):
        if isinstance(node, list):
            return tuple(canonical(child) for child in node if not _is_bare_string(child))
        if not isinstance(node, ast.AST):
            return node
        fields = ((name, canonical(value)) for name, value in ast.iter_fields(node))
        return (type(node).__name__, *(field for field in fields if field[1] not in (None, ())))

    return "".join(repr(canonical(node)) for node in statements if _is_kernel(node))


def _reached(functions: dict[str, ast.FunctionDef], start: str) -> list[ast.stmt]:
    """The `functions` that `start` uses, directly or indirectly, in the order of the file."""
    reached, ahead = {start}, [start]
    while ahead:
        named = {node.id for node in ast.walk(functions[ahead.pop()]) if isinstance(node, ast.Name)}
        new = (named & functions.keys()) - reached
        reached |= new
        ahead += new
    return [node for name, node in functions.items() if name in reached]


def _is_kernel(node: ast.stmt) -> bool:
    decorators = getattr(node, "decorator_list", ())
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in decorators)


def _is_bare_string(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_of_plans(path: Path) -> bool:
    try:
        document = _load(path)
    except OSError:
        raise
    except Exception:  # a file may hold anything
        return False
    return isinstance(document, dict) and {"format", "plans"} <= document.keys()


def _load(path: Path) -> Any:
    """The JSON in `path`.

    Raises:
        OSError: there is no file, it cannot be read, or is something that would be read for ever.
        Exception: it holds no JSON; of several kinds.
    """
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)) or status.st_size > LARGEST_FILE:
        raise OSError("a device, a pipe, or far larger than plans are")
    return json.loads(path.read_text(encoding="utf-8"))  # of a directory, this raises


def _stale_reason(document: Any, gpu: GPU, ignored: tuple[str, ...]) -> str | None:
    """Why nothing in a document holds here, or None."""
    for name, here in header_of(gpu).items():
        found = document.get(name) if isinstance(document, dict) else None
        if name not in ("date", "kernels", *ignored) and found != here:
            return f"{name} is {shown(found)}, here {here!r}"
    if not isinstance(document["kernels"], dict):
        return f"its kernels are a {type(document['kernels']).__name__}, expected an object"
    for name, found in (("plans", document["plans"]), *((name, document.get(name, [])) for name in KINDS)):
        if not isinstance(found, list):
            return f"its {name} are a {type(found).__name__}, expected a list"
    return None


def _to_json(kind: Kind, tuned: TunedPlan) -> dict[str, Any]:
    key = {name: getattr(tuned.key, name) for name in _types_of(kind.key) if name != "gpu"}
    if key.get("storage") == "float":
        del key["storage"]  # as in files that are older than FP8
    return {
        "problem": key | {"dtype": str(tuned.key.dtype).removeprefix("torch.")},
        "plan": asdict(tuned.plan),
        "plan_us": round(tuned.plan_us, 2),
        kind.other: round(tuned.other_us, 2),
    }


def _from_json(kind: Kind, entry: dict[str, Any], gpu: GPU, hashes: dict[str, str]) -> TunedPlan:
    """Raises one of several exceptions where anything but a plan for its problem comes out."""
    key: Any = _typed(kind.key, entry["problem"], gpu=gpu)
    if (counted := bucket(key).m) != key.m:
        raise ValueError(f"m {shown(key.m)}: expected a count that plans are measured for, such as {counted}")
    plan: Any = _typed(kind.plan, entry["plan"])
    if reason := kind.unsupported(key, plan):
        raise ValueError(reason)
    for kernel in {plan.up.kernel, plan.down.kernel} - {"torch"}:
        if hashes.get(kernel) != kernel_hashes()[kernel]:
            raise ValueError(f"{kernel} is not the kernel that was measured")
    times = {name: float(entry[name]) for name in ("plan_us", kind.other)}
    for name, us in times.items():
        if not 0 < us < math.inf:
            raise ValueError(f"{name} is {shown(entry[name])}, expected microseconds")
    return TunedPlan(key, plan, *times.values())


def _config(values: dict[str, Any]) -> TileConfig:
    config = _typed(TileConfig, values)
    for name, value in vars(config).items():
        if name not in values:
            raise ValueError(f"{name} is missing")
        if name.startswith(("block_", "num_warps")) and value.bit_count() != 1:
            raise ValueError(f"{name} {shown(value)}: expected a power of two")
        if name != "kernel" and not 1 <= value <= _LARGEST.get(name, 1 << 14):
            raise ValueError(f"{name} {shown(value)}: expected 1 to {_LARGEST.get(name, 1 << 14)}")
    for one, other in combinations(("block_m", "block_n", "block_k"), 2):
        if getattr(config, one) * getattr(config, other) > LARGEST_TILE:
            raise ValueError(f"{one} x {other}: expected at most {LARGEST_TILE} elements")
    return config


def _typed(cls: type[T], values: dict[str, Any], **given: Any) -> T:
    """An instance of the dataclass `cls` from JSON; every field must be known, and of exactly its type."""
    if not isinstance(values, dict):
        raise TypeError(f"{cls.__name__} is {shown(values)}, expected an object")
    types = _types_of(cls)  # type: ignore[arg-type]
    arguments = dict(given)
    for name, value in values.items():
        if name not in types or name in given:
            raise ValueError(f"unknown field {shown(name)} of {cls.__name__}")
        if types[name] is TileConfig:
            value = _config(value)
        if types[name] is torch.dtype:
            value = vars(torch).get(value) if isinstance(value, str) else None
        if type(value) is not types[name] or (types[name] is int and value < 0):
            raise ValueError(f"{name} is {shown(values[name])}, expected a {types[name].__name__}")
        arguments[name] = value
    return cls(**arguments)


def _short(error: Exception) -> str:
    """The beginning of what an error says, which may quote all of a file."""
    return str(error)[:300]
