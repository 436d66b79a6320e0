"""`hf-fused-mlp env`: what a bug report should contain about the machine."""

import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

from hf_fused_mlp.version import __version__

if TYPE_CHECKING:
    from hf_fused_mlp.types import GPU

PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "safetensors", "huggingface-hub", "numpy", "bitsandbytes"),
    *("compressed-tensors", "deepspeed", "kernels", "liger-kernel", "optimum-quanto", "peft", "torchao"),
)


def env() -> None:
    """Print versions, GPU and plans, to paste into a bug report."""
    for name, value in facts():
        print(f"{name}: {value}", flush=True)


def facts() -> Iterator[tuple[str, str]]:
    """Name and value of each line. Lines that do not need PyTorch come first, because importing it may fail."""
    yield "hf-fused-mlp", __version__
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    yield "Python", f"{platform.python_version()}, {platform.platform()}"
    yield "driver", driver()

    import torch

    from hf_fused_mlp.modes import HAS_TRITON, no_kernels
    from hf_fused_mlp.types import GPU

    yield "CUDA of PyTorch", torch.version.cuda or "none"
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not devices:
        yield "GPU", "none"
    for gpu, count in Counter(map(GPU.of, devices)).items():
        major, minor = gpu.capability
        yield "GPU", f"{count} x {gpu.name}, compute capability {major}.{minor}, {gpu.num_sms} multiprocessors"
    if devices and (reason := no_kernels(devices[0], torch.bfloat16)):
        yield "kernels", reason
    if HAS_TRITON:
        yield from plans(list(dict.fromkeys(map(GPU.of, devices))))


def plans(gpus: "list[GPU]") -> Iterator[tuple[str, str]]:
    """The number of plans for each GPU, and the user's directory."""
    from hf_fused_mlp.tuning import cache, plan_files

    for gpu in gpus:
        shipped = len(plan_files.read(cache.shipped_file(gpu), gpu, any_version=True))
        own = len(plan_files.read(cache.user_file(gpu), gpu))
        yield "plans", f"{shipped} that ship for {gpu.name}, {own} of your own"
    yield "plan cache", str(cache.user_directory())


def driver() -> str:
    """The version of NVIDIA's driver."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = (result.stdout or result.stderr).strip().splitlines()  # one for each GPU, or why not
    return " ".join(dict.fromkeys(lines))
