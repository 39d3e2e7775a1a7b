"""What the machine is and can do: cores, threads, the precision it multiplies fast, its peak where that is known."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenformer.errors import UserError

if TYPE_CHECKING:
    import torch

# What decides the speed of products in bfloat16 and float32 on a CPU.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "bf16", "sve")

# dense bf16 FLOP/s as the vendors state them, by a part of the device name; longer names first
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
}


def hardware() -> dict[str, Any]:
    """Model, physical cores this process may use, and instruction sets of the CPU."""
    fields = _cpuinfo()
    first = fields[0] if fields else {}
    flags = (first.get("flags") or first.get("Features") or "").split()
    return {
        "cpu": first.get("model name") or platform.processor() or platform.machine(),
        "cores": physical_cores(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "system": platform.system(),
        "machine": platform.machine(),
    }


def versions() -> dict[str, str | None]:
    """Python, torch and tokenformer, and the commit where tokenformer runs from a git checkout (else None)."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # names the build too (+cpu, +cu130), which the package's metadata may not
        "tokenformer": metadata.version("tokenformer"),
        "commit": _commit(Path(__file__).resolve().parent),
    }


def physical_cores() -> int:
    """Physical cores that this process may use; two hardware threads of one core count once."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    cores = {
        (fields.get("physical id"), fields["core id"])
        for fields in _cpuinfo()
        if "core id" in fields and (usable is None or int(fields["processor"]) in usable)
    }
    return len(cores) or (len(usable) if usable else os.cpu_count() or 1)


def set_threads(threads: int | None) -> int:
    """Give torch `threads` threads, or one per physical core; returns the number.

    Raises:
        UserError: fewer than one.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}")
    import torch

    threads = physical_cores() if threads is None else threads
    torch.set_num_threads(threads)
    return threads


def pick_device() -> "torch.device":
    """The accelerator if there is one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def pick_precision(precision: str, device: "torch.device") -> str:
    """`precision`, or for `auto` the fastest one that trains safely: bf16 where it is native, else fp32.

    Raises:
        UserError: fp16 without a GPU.
    """
    if precision == "fp16" and device.type != "cuda":
        raise UserError(f"training.precision fp16 needs a CUDA GPU, and this is {device.type}: use bf16 or fp32")
    if precision != "auto":
        return precision
    import torch

    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Without matrix units, bf16 on a CPU is emulated and slower than float32.
    if device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return "bf16"
    return "fp32"


def autocast_dtype(precision: str) -> "torch.dtype | None":
    """The dtype of products under `precision`; None for float32."""
    import torch

    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def peak_flops(device: "torch.device") -> float | None:
    """Peak dense bf16 FLOP/s of the device, or None where we do not know it."""
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def accelerator_peak(name: str) -> tuple[str, float]:
    """An accelerator that is meant by `name`, whatever the case, and its peak dense bf16 FLOP/s.

    Raises:
        UserError: none that we know.
    """
    for known, peak in _PEAK_FLOPS.items():
        if known.lower() == name.lower():
            return known, peak
    raise UserError(f"unknown accelerator '{name}': use one of {', '.join(_PEAK_FLOPS)}, or cpu")


def _cpuinfo() -> list[dict[str, str]]:
    """The fields of each logical CPU; empty where the system has no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    blocks = [re.findall(r"^([^\t:]+?)\s*:[ \t]*(.*)$", block, re.MULTILINE) for block in text.split("\n\n")]
    return [fields for block in blocks if "processor" in (fields := dict(block))]


def _commit(folder: Path) -> str | None:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # An environment inside somebody's repository is not a checkout of this project.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
