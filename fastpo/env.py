"""What `fastpo env` prints: the versions, devices and backends that a bug report needs."""

import importlib.util
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "accelerate", "datasets", "peft",
            "bitsandbytes", "scipy", "scikit-learn", "flash-attn", "trl", "liger-kernel", "cut-cross-entropy",
            "kernels")  # fmt: skip
VARIABLES = ("FASTPO_ATTENTION", "FASTPO_CACHE", "FASTPO_CHECK_INPUTS", "FASTPO_FUSED_FORWARD", "FASTPO_NO_CSRC",
             "FASTPO_TRACEBACK", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONSAFEPATH", "TRITON_INTERPRET",
             "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")  # fmt: skip


def collect() -> dict[str, Any]:
    """The report, ready for JSON; values that cannot be had say why."""
    import torch

    import fastpo

    root = Path(fastpo.__file__).resolve().parent.parent
    return {
        "fastpo": fastpo.__version__,
        "installed": f"checkout {root}" if (root / "pyproject.toml").is_file() else f"package {root}",
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cpu": f"{os.cpu_count()} x {_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "memory": _memory(),
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in PACKAGES},
        "module kernels": _kernels_module(),
        "cuda": _cuda_build(),
        "devices": _devices(),
        "extension": _extension(),
        "backends": _backends(),
        "compiled code": _instruction_set(),
        "bf16 on the CPU": _cpu_bf16(),
        "cache": _cache_folder(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def format_text(report: dict[str, Any]) -> str:
    """`collect()` as aligned lines."""
    lines: list[tuple[str, str]] = []
    for key, value in report.items():
        if key == "packages":
            lines += [(name, version or "-") for name, version in value.items()]
        elif isinstance(value, dict):
            lines += [(name, text) for name, text in value.items()]
        else:
            lines.append((key, ", ".join(value) or "none" if isinstance(value, list) else str(value)))
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines)


def _version(name: str) -> str | None:
    """The installed version, None where there is none. PyTorch's own text: it names the build (+cu130), which the
    package's metadata leave out of wheels from PyPI."""
    if name == "torch":
        import torch

        return str(torch.__version__)
    try:
        return metadata.version(name) or "installed, with no version"
    except metadata.PackageNotFoundError:
        return None
    except Exception as error:  # metadata that are damaged
        return f"installed, with metadata that cannot be read ({type(error).__name__})"


def _kernels_module() -> str:
    """What `import kernels` finds, which must be Hugging Face's package or nothing, never ours."""
    spec = importlib.util.find_spec("kernels")
    if spec is None:
        return "none"
    if spec.origin is None:
        return f"namespace {list(spec.submodule_search_locations or [])[0]}"
    return spec.origin


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (OSError, ValueError, AttributeError):
        return "unknown"


def _cuda_build() -> str:
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "none (CPU build of PyTorch)"


def _devices() -> list[str]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        devices.append(f"cuda:{index} {properties.name} ({capability}, {properties.total_memory / 2**30:.0f} GiB)")
    return devices


def _extension() -> str:
    try:
        from fastpo import _C
    except ImportError as error:
        return f"not built ({error})"
    return str(_C.__file__)


def _instruction_set() -> str:
    from fastpo.ops import backends

    if backends.compiled is None:
        return "none: PyTorch code does the same on the CPU, slower"
    slower = {
        "avx512_bf16": "", "avx512": " (no bf16 of AVX-512 here: attention in bf16 is slower)",
        "avx2": " (no AVX-512 here, slower)", "generic": " (neither AVX-512 nor AVX2 here, slower)",
    }  # fmt: skip
    isa = backends.compiled.isa()
    return isa + slower[isa]


def _cpu_bf16() -> str:
    from fastpo.ops import backends

    return "native" if backends.cpu_has_bf16() else "through fp32, slower than fp32 itself"


def _backends() -> list[str]:
    from fastpo.ops import available_backends

    return available_backends()


def _cache_folder() -> str:
    from fastpo.reference.cache import cache_folder

    return str(cache_folder())
