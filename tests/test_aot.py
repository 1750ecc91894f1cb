"""Every Triton kernel compiled ahead of time for sm_80, sm_90 and gfx942, exactly as its launcher would launch it.

No GPU is needed. The launchers run on CPU tensors with their kernels replaced by a recorder; what it records (dtypes,
alignments, constants, warps) is compiled for each target. A kernel that spills fails. The table of registers, spills
and shared memory is printed, and written to bench/results/aot.json when FASTPO_RECORD=1.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="compiling the kernels ahead of time needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler by the interpreter", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastpo.kernels import logprob, preference  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
POINTERS[torch.int32] = "*i32"
BF16, FP32 = torch.bfloat16, torch.float32


class Recorder:
    """Stands in for a jitted kernel and keeps its launches."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple, dict]] = []

    def __getitem__(self, grid) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))

    def compile(self, target: GPUTarget):
        """Compiles the one launch there was, specialised as the JIT would for these arguments."""
        ((args, kwargs),) = self.launches
        names = self.kernel.arg_names
        values = dict(zip(names, args)) | kwargs
        options = {name: values.pop(name) for name in list(values) if name not in names}
        signature, constants, attributes = {}, {}, {}
        for i, param in enumerate(self.kernel.params):
            name, value = param.name, values[param.name]
            specialise = name not in self.kernel.do_not_specialize
            if param.is_constexpr or value is None or (specialise and type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name], number = POINTERS[value.dtype], value.data_ptr()
            else:
                signature[name], number = {int: "i32", float: "fp32"}[type(value)], value
            if specialise and type(number) is int and number % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return triton.compile(ASTSource(self.kernel, signature, constants, attributes), target=target, options=options)


def row_inputs(v: int, dtype: torch.dtype, padded: bool = True, bias: torch.dtype | None = None):
    """(logits [8, v], target [8], bias [v] | None) for a compilation; nothing reads them."""
    logits = logprob.empty_logits(8, v, dtype, "cpu") if padded else torch.empty(8, v, dtype=dtype)
    return logits, torch.zeros(8, dtype=torch.int64), torch.zeros(v, dtype=bias) if bias else None


def row(v: int, dtype: torch.dtype, *, padded=True, bias=None, softcap=None, entropy=False, write="grad"):
    def launch() -> None:
        inputs = row_inputs(v, dtype, padded, bias)
        logprob.logprob_row_fwd(*inputs, softcap=softcap, logit_scale=0.5, entropy=entropy, write=write)

    return logprob, "_logprob_row_fwd_kernel", launch


def slice_fwd(v: int, dtype: torch.dtype, *, entropy=False):
    def launch() -> None:
        state = logprob.logprob_slice_init(8, "cpu", entropy)
        logprob.logprob_slice_fwd(*row_inputs(v, dtype), state, softcap=None, logit_scale=1.0, col_offset=v)

    return logprob, "_logprob_slice_fwd_kernel", launch


def slice_grad(v: int, dtype: torch.dtype):
    def launch() -> None:
        logits, target, bias = row_inputs(v, dtype, bias=dtype)
        logprob.logprob_slice_grad(logits, target, torch.zeros(8), bias, softcap=30.0, logit_scale=1.0, col_offset=v)

    return logprob, "_logprob_slice_grad_kernel", launch


def pairs(kernel: str, loss_type: str, *, ref="token", unique=True, **loss):
    def launch() -> None:
        offsets = torch.tensor([0, 3, 5, 9, 11], dtype=torch.int32)
        win_prob = torch.ones(2) if loss_type == "sppo" else None
        preference.preference_fwd(
            torch.zeros(11),
            torch.zeros(11) if ref == "token" else None,
            offsets,
            torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
            torch.ones(2),
            win_prob,
            win_prob,
            loss_type=loss_type,
            beta=0.1,
            unique=unique,
            ref_response_logps=torch.zeros(4) if ref == "response" else None,
            **loss,
        )

    return preference, kernel, launch


# Llama 3's vocabulary at both ends of the options; odd vocabularies, padded and not; short rows; every loss once, and
# each kind of reference once.
FWD = "_preference_fwd_kernel"
CASES = {
    "row-bf16-128256": row(128_256, BF16),
    "row-bf16-128256-stats": row(128_256, BF16, write=None),
    "row-bf16-128256-all": row(128_256, BF16, bias=BF16, softcap=30.0, entropy=True),
    "row-fp16-32000": row(32_000, torch.float16),
    "row-fp32-128256-all": row(128_256, FP32, bias=FP32, softcap=30.0, entropy=True),
    "row-bf16-50257-padded": row(50_257, BF16),
    "row-bf16-50257-unaligned": row(50_257, BF16, padded=False, entropy=True),
    "row-bf16-128256-all-bias-fp32": row(128_256, BF16, bias=FP32, softcap=30.0, entropy=True),
    "row-bf16-151665-padded-all": row(151_665, BF16, bias=FP32, softcap=30.0, entropy=True),
    "row-bf16-151665-unaligned-all": row(151_665, BF16, padded=False, bias=FP32, softcap=30.0, entropy=True),
    "row-fp32-257": row(257, FP32, padded=False, bias=FP32, entropy=True),
    "row-bf16-1": row(1, BF16, padded=False),
    "slice-fwd-bf16-8192": slice_fwd(8192, BF16),
    "slice-fwd-bf16-8192-entropy": slice_fwd(8192, BF16, entropy=True),
    "slice-fwd-fp32-100000-entropy": slice_fwd(100_000, FP32, entropy=True),
    "slice-grad-bf16-8192-all": slice_grad(8192, BF16),
    "slice-grad-fp32-100000-all": slice_grad(100_000, FP32),
    "pairs-dpo": pairs(FWD, "dpo"),
    "pairs-dpo-smooth-response-ref": pairs(FWD, "dpo", label_smoothing=0.1, ref="response"),
    "pairs-ipo": pairs(FWD, "ipo"),
    "pairs-ipo-sum": pairs(FWD, "ipo", ipo_mean=False),
    "pairs-simpo-smooth-no-ref": pairs(FWD, "simpo", label_smoothing=0.1, gamma_beta_ratio=0.5, ref="none"),
    "pairs-sppo": pairs(FWD, "sppo"),
    "pairs-sppo-hard": pairs(FWD, "sppo_hard"),
    "pairs-hinge": pairs(FWD, "hinge"),
    "pairs-robust": pairs(FWD, "robust", label_smoothing=0.1),
    "pairs-dpo-shared": pairs(FWD, "dpo", unique=False),
    "dlogp": pairs("_preference_dlogp_kernel", "dpo", unique=False),
}


def resources(compiled, target: GPUTarget, folder: Path) -> dict[str, int]:
    """Registers a thread, bytes of spills a thread, and bytes of shared memory, off the binary."""
    if target.backend == "hip":
        fields = dict(re.findall(r"\.(\w+):\s+(\d+)\s*$", compiled.asm["amdgcn"], re.MULTILINE))
        spilled = int(fields["vgpr_spill_count"]) + int(fields["sgpr_spill_count"])
        spills = 4 * spilled + int(fields["private_segment_fixed_size"])
        return {"registers": int(fields["vgpr_count"]), "spills": spills, "shared": compiled.metadata.shared}
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    registers, stack, local = map(int, usage)
    return {"registers": registers, "spills": stack + local, "shared": compiled.metadata.shared}


def compile_case(case: str, target: str, monkeypatch: pytest.MonkeyPatch):
    """The compiled kernel of one case."""
    module, name, launch = CASES[case]
    # The launchers size their blocks by the warp, which is twice as wide on AMD.
    monkeypatch.setattr(torch.version, "hip", "7.0" if TARGETS[target].backend == "hip" else None)
    recorders = {key: Recorder(value) for key, value in vars(module).items() if is_kernel(value)}
    for key, recorder in recorders.items():
        monkeypatch.setattr(module, key, recorder)
    launch()
    return recorders[name].compile(TARGETS[target])


def is_kernel(value: object) -> bool:
    return isinstance(value, triton.runtime.JITFunction) and value.__name__.endswith("_kernel")


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest):
    """Rows of results, printed past pytest's capture when the last test is done."""
    rows: list[dict] = []
    yield rows
    rows.sort(key=lambda r: (r["case"], r["target"]))
    lines = [f"{'case':32} {'target':7} {'warps':>5} {'registers':>9} {'spills':>6} {'shared':>6}"]
    lines += ["{case:32} {target:7} {warps:5} {registers:9} {spills:6} {shared:6}".format(**r) for r in rows]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")
    if os.environ.get("FASTPO_RECORD") == "1":
        record = {"triton": triton.__version__, "spills": "bytes a thread", "shared": "bytes a block", "kernels": rows}
        (ROOT / "bench/results/aot.json").write_text(json.dumps(record, indent=1) + "\n")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(case, target, monkeypatch, tmp_path, table):
    compiled = compile_case(case, target, monkeypatch)
    used = resources(compiled, TARGETS[target], tmp_path)
    table.append({"case": case, "target": target, "warps": compiled.metadata.num_warps, **used})
    assert used["spills"] == 0, f"{case} on {target} spills {used['spills']} bytes a thread"
    # Below 64 registers a block of 1,024 threads fits a multiprocessor (65,536 registers).
    if TARGETS[target].backend == "cuda":
        assert used["registers"] * compiled.metadata.num_warps * 32 <= 65_536


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "case", ["row-bf16-128256", "row-bf16-128256-all", "row-fp32-128256-all", "row-bf16-50257-padded"]
)
def test_row_access_is_16_bytes_wide(case, target, monkeypatch):
    """Logits are read and written by 16-byte accesses; only the odd rest of an odd vocabulary may go by elements."""
    ptx = compile_case(case, target, monkeypatch).asm["ptx"]
    loads = re.findall(r"ld\.global\.L1::evict_\w+\S*?(\.v4)?\.b\d+", ptx)  # the logits' loads carry a cache hint
    stores = re.findall(r"st\.global(\.v4)?\.b\d+", ptx)
    assert loads.count(".v4") >= 4 and stores.count(".v4") >= 2
    if "50257" not in case:
        assert set(loads) == {".v4"}


def test_every_kernel_is_compiled():
    """A kernel added without a case here fails, also in a new file of kernels/."""
    compiled = {name for _, name, _ in CASES.values()}
    written = set()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        if path.name == "attention.py":  # tests/test_tree_attention_aot.py
            continue
        written |= set(re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert written == compiled
