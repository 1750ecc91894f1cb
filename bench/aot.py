"""Compiles every Triton kernel and configuration for sm_80, sm_90, sm_100 and gfx942, without a GPU.

    python bench/aot.py            compile all, print the table, write bench/results/aot.json and aot.md
    python bench/aot.py --check    compile all and compare with the committed table; exit 1 on a regression
    python bench/aot.py --only fused --target sm_90    a part of it, printed only

A case is a launch: the launchers run on CPU tensors with the kernels replaced by recorders, and what those record
(dtypes, alignments, constants, warps) is compiled for each target as the JIT would there. Off the binary: registers a
thread, bytes of spills a thread, shared memory; off the assembly: the tensor-core instruction of GEMM kernels, and how
logits or operands are loaded. A regression is a new spill, a lost tensor-core instruction or a narrower load. Speed is
not in here: only a GPU tells.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpo.kernels import fused, logprob, online_softmax, preference

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench/results/aot.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MODULES = (fused, logprob, online_softmax, preference)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MULTIPROCESSORS = 132  # an H100's; the only use of it here is to cut few rows into splits
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
LOADS = ("elements", "16 B and rest", "16 B", "TMA")  # from worse to better
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
DTYPE_NAMES[torch.int32] = "i32"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

Launch = Callable[[], object]


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
            if isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{DTYPE_NAMES[value.base.dtype]}{list(value.block_shape)}>"
                continue
            if isinstance(value, torch.Tensor):
                signature[name], number = "*" + DTYPE_NAMES[value.dtype], value.data_ptr()
            else:
                signature[name], number = {int: "i32", float: "fp32"}[type(value)], value
            if specialise and type(number) is int and number % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return triton.compile(ASTSource(self.kernel, signature, constants, attributes), target=target, options=options)


def row_inputs(rows: int, v: int, dtype: torch.dtype, padded: bool = True, bias: torch.dtype | None = None):
    """(logits [rows, v], target, bias [v] | None) for a compilation; nothing reads them."""
    logits = logprob.empty_logits(rows, v, dtype, "cpu") if padded else torch.empty(rows, v, dtype=dtype)
    return logits, torch.zeros(rows, dtype=torch.int64), torch.zeros(v, dtype=bias) if bias else None


def row(
    v: int, dtype: torch.dtype, *, rows=1000, kernel="row_fwd", padded=True, bias=None, softcap=None, entropy=False,
    write="grad", argmax=False,
):  # fmt: skip
    def launch() -> None:
        logits, target, bias_values = row_inputs(rows, v, dtype, padded, bias)
        best = torch.empty_like(target) if argmax else None
        options = {"softcap": softcap, "logit_scale": 0.5, "entropy": entropy, "write": write, "argmax": best}
        logprob.logprob_row_fwd(logits, target, bias_values, **options)

    return f"_logprob_{kernel}_kernel", launch


def slice_fwd(v: int, dtype: torch.dtype, *, entropy=False):
    def launch() -> None:
        state = logprob.logprob_slice_init(1000, "cpu", entropy)
        logprob.logprob_slice_fwd(*row_inputs(1000, v, dtype), state, softcap=None, logit_scale=1.0, col_offset=v)

    return "_logprob_slice_fwd_kernel", launch


def slice_grad(v: int, dtype: torch.dtype):
    def launch() -> None:
        logits, target, bias = row_inputs(1000, v, dtype, bias=dtype)
        lse, logp = torch.zeros(2, 1000)
        rule = {"softcap": 30.0, "logit_scale": 1.0, "col_offset": v}
        logprob.logprob_slice_grad(logits, target, lse, bias, logp=logp, **rule)

    return "_logprob_slice_grad_kernel", launch


def fused_fwd(d: int, dtype=BF16, *, v=128_256, bias=None, softcap=None, entropy=False, config=None, combine=False):
    def launch() -> None:
        hidden, weight = (torch.empty(n, d, dtype=dtype) for n in (1000, v))  # never touched, so never in memory
        target, bias_values = torch.zeros(1000, dtype=torch.int64), torch.empty(v, dtype=bias) if bias else None
        options = {"softcap": softcap, "logit_scale": 1.0, "entropy": entropy, "config": config}
        fused.fused_logprob_fwd(hidden, weight, target, bias_values, **options)

    return "_logprob_combine_kernel" if combine else "_fused_logprob_fwd_kernel", launch


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

    return kernel, launch


# Llama 3's vocabulary at both ends of the options; odd vocabularies, padded and not; short rows; rows few enough to be
# split; every loss once, and each kind of reference once.
FWD = "_preference_fwd_kernel"
ALL = {"softcap": 30.0, "entropy": True}
CASES: dict[str, tuple[str, Launch]] = {
    "row-bf16-128256": row(128_256, BF16),
    "row-bf16-128256-stats": row(128_256, BF16, write=None),
    "row-bf16-128256-argmax": row(128_256, BF16, write=None, argmax=True),
    "row-bf16-128256-all": row(128_256, BF16, bias=BF16, **ALL),
    "row-bf16-128256-all-argmax": row(128_256, BF16, bias=BF16, argmax=True, **ALL),
    "row-fp16-32000": row(32_000, FP16),
    "row-fp32-128256-all": row(128_256, FP32, bias=FP32, **ALL),
    "row-bf16-50257-padded": row(50_257, BF16),
    "row-bf16-50257-unaligned": row(50_257, BF16, padded=False, entropy=True),
    "row-bf16-128256-all-bias-fp32": row(128_256, BF16, bias=FP32, **ALL),
    "row-bf16-151665-padded-all": row(151_665, BF16, bias=FP32, **ALL),
    "row-bf16-151665-unaligned-all": row(151_665, BF16, padded=False, bias=FP32, **ALL),
    "row-fp32-257": row(257, FP32, padded=False, bias=FP32, entropy=True),
    "row-bf16-1": row(1, BF16, padded=False),
    "split-1-bf16-128256": row(128_256, BF16, rows=1, kernel="split_fwd"),
    "split-100-bf16-128256-all": row(128_256, BF16, rows=100, kernel="split_fwd", bias=BF16, argmax=True, **ALL),
    "split-8-fp32-151936-all": row(151_936, FP32, rows=8, kernel="split_fwd", argmax=True, **ALL),
    "split-grad-1-bf16-128256": row(128_256, BF16, rows=1, kernel="slice_grad"),
    "split-grad-100-bf16-128256-all": row(128_256, BF16, rows=100, kernel="slice_grad", bias=BF16, **ALL),
    "combine-splits-all": row(128_256, BF16, rows=8, kernel="combine", argmax=True, **ALL),
    "combine-fused": fused_fwd(4096, combine=True),
    "slice-fwd-bf16-8192": slice_fwd(8192, BF16),
    "slice-fwd-bf16-8192-entropy": slice_fwd(8192, BF16, entropy=True),
    "slice-fwd-fp32-100000-entropy": slice_fwd(100_000, FP32, entropy=True),
    "slice-grad-bf16-8192-all": slice_grad(8192, BF16),
    "slice-grad-fp32-100000-all": slice_grad(100_000, FP32),
    "fused-bf16-4096": fused_fwd(4096),
    "fused-fp16-4096": fused_fwd(4096, FP16),
    "fused-bf16-4096-entropy": fused_fwd(4096, entropy=True),
    "fused-bf16-4096-all": fused_fwd(4096, bias=BF16, **ALL),
    "fused-bf16-2896-ragged": fused_fwd(2896, v=50_272),
    "fused-bf16-2896-ragged-all": fused_fwd(2896, v=50_257, bias=FP32, **ALL),
    "fused-bf16-4096-50257": fused_fwd(4096, v=50_257),
    "fused-bf16-2888-all": fused_fwd(2888, bias=BF16, **ALL),
    "fused-bf16-123-unaligned-all": fused_fwd(123, v=50_257, bias=BF16, **ALL),
    "fused-bf16-4096-unknown-chip": fused_fwd(4096, config=fused.UNKNOWN),
    "fused-bf16-4096-unknown-chip-all": fused_fwd(4096, bias=BF16, config=fused.UNKNOWN, **ALL),
    "pairs-dpo": pairs(FWD, "dpo"),
    "pairs-dpo-smooth-response-ref": pairs(FWD, "dpo", label_smoothing=0.1, ref="response"),
    "pairs-ipo": pairs(FWD, "ipo"),
    "pairs-ipo-sum": pairs(FWD, "ipo", ipo_reduce="sum"),
    "pairs-simpo-smooth-no-ref": pairs(FWD, "simpo", label_smoothing=0.1, gamma_beta_ratio=0.5, ref="none"),
    "pairs-sppo": pairs(FWD, "sppo"),
    "pairs-sppo-hard": pairs(FWD, "sppo_hard"),
    "pairs-hinge": pairs(FWD, "hinge"),
    "pairs-robust": pairs(FWD, "robust", label_smoothing=0.1),
    "pairs-dpo-shared": pairs(FWD, "dpo", unique=False),
    "dlogp": pairs("_preference_dlogp_kernel", "dpo", unique=False),
}


def is_kernel(value: object) -> bool:
    return isinstance(value, triton.runtime.JITFunction) and value.__name__.endswith("_kernel")


def compile_case(case: str, target: str):
    """The compiled kernel of one case."""
    kernel, launch = CASES[case]
    recorders: dict[str, Recorder] = {}
    with contextlib.ExitStack() as stack:
        # Launchers size their blocks by the warp, which is twice as wide on AMD, and by the chip.
        hip = "7.0" if TARGETS[target].backend == "hip" else None
        stack.enter_context(mock.patch.object(torch.version, "hip", hip))
        stack.enter_context(mock.patch.object(fused, "chip", lambda device: target))
        stack.enter_context(mock.patch.object(logprob, "multiprocessors", lambda device: MULTIPROCESSORS))
        for module in MODULES:
            for name, value in list(vars(module).items()):
                if is_kernel(value):
                    recorders[name] = Recorder(value)
                    stack.enter_context(mock.patch.object(module, name, recorders[name]))
        launch()
    return recorders[kernel].compile(TARGETS[target])


def resources(compiled, target: str) -> dict[str, int]:
    """Registers a thread, bytes of spills a thread, and bytes of shared memory, off the binary."""
    if TARGETS[target].backend == "hip":
        fields = dict(re.findall(r"\.(\w+):\s+(\d+)\s*$", compiled.asm["amdgcn"], re.MULTILINE))
        spilled = int(fields["vgpr_spill_count"]) + int(fields["sgpr_spill_count"])
        spills = 4 * spilled + int(fields["private_segment_fixed_size"])
        return {"registers": int(fields["vgpr_count"]), "spills": spills, "shared": compiled.metadata.shared}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        report = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    registers, stack, local = map(int, usage)
    return {"registers": registers, "spills": stack + local, "shared": compiled.metadata.shared}


def loads(compiled, target: str, gemm: bool) -> str:
    """How a kernel of the head reads its matrices, one of LOADS."""
    if TARGETS[target].backend == "hip":  # the assembly does not tell loads of logits from others
        return "16 B" if re.search(r"(global|buffer)_load_dwordx4", compiled.asm["amdgcn"]) else "elements"
    ptx = compiled.asm["ptx"]
    if gemm:
        if "cp.async.bulk.tensor" in ptx:
            return "TMA"
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?\], 0x(\w+)", ptx)
        if not copies:  # through registers; the bias and the targets are loaded so too
            return "16 B and rest" if "ld.global.v4" in ptx else "elements"
        wide = copies.count("10")
    else:
        copies = re.findall(r"ld\.global\.L1::evict_\w+\S*?(\.v4)?\.b\d+", ptx)  # loads of logits carry a cache hint
        wide = copies.count(".v4")
    return "elements" if not wide else "16 B" if wide == len(copies) else "16 B and rest"


def measure(case: str, target: str) -> dict:
    """One row of the table."""
    compiled = compile_case(case, target)
    gemm = CASES[case][0] == "_fused_logprob_fwd_kernel"
    reads_logits = re.match(r"row|split|slice", case)
    assembly = compiled.asm["amdgcn" if TARGETS[target].backend == "hip" else "ptx"]
    return {
        "case": case,
        "target": target,
        "warps": compiled.metadata.num_warps,
        **resources(compiled, target),
        "tensor_cores": TENSOR_CORES[target] if gemm and TENSOR_CORES[target] in assembly else "",
        "loads": loads(compiled, target, gemm) if gemm or reads_logits else "",
    }


def faults(row: dict) -> list[str]:
    """What no row may have, whatever the committed table says."""
    where = f"{row['case']} on {row['target']}"
    found = []
    if row["spills"]:
        found.append(f"{where} spills {row['spills']} bytes a thread")
    if CASES[row["case"]][0] == "_fused_logprob_fwd_kernel" and not row["tensor_cores"]:
        found.append(f"{where} has no {TENSOR_CORES[row['target']]}")
    if TARGETS[row["target"]].backend == "cuda" and row["registers"] * row["warps"] * 32 > 65_536:
        found.append(f"{where} needs more registers than a multiprocessor has")
    return found


def regressions(rows: list[dict], committed: list[dict]) -> list[str]:
    """Faults, and where rows are worse than the committed ones."""
    before = {(row["case"], row["target"]): row for row in committed}
    found = []
    for row in rows:
        where = f"{row['case']} on {row['target']}"
        found += faults(row)
        old = before.get((row["case"], row["target"]))
        if old is None:
            found.append(f"{where} is not in the committed table: run bench/aot.py and commit what it writes")
            continue
        if old["tensor_cores"] and not row["tensor_cores"]:
            found.append(f"{where} lost {old['tensor_cores']}")
        if old["loads"] and LOADS.index(row["loads"] or "elements") < LOADS.index(old["loads"]):
            found.append(f"{where} loads by {row['loads']}, before by {old['loads']}")
    return found


def read_record() -> dict:
    return json.loads(RECORD.read_text())


def table(rows: list[dict]) -> str:
    """Markdown."""
    header = ("case", "target", "warps", "registers", "spills", "shared", "tensor cores", "loads")
    lines = [[str(row[name.replace(" ", "_")]) for name in header] for row in rows]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rules = ["-" * w for w in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in [header, rules, *lines]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table; exit 1 if worse")
    parser.add_argument("--only", default="", help="cases whose name holds this; prints, writes nothing")
    parser.add_argument("--target", choices=TARGETS, help="one target; prints, writes nothing")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in case]
    if not cases:
        parser.error(f"no case holds {options.only!r}; there are {', '.join(CASES)}")
    targets = [options.target] if options.target else list(TARGETS)
    rows = [measure(case, target) for case in cases for target in targets]
    print(table(rows))
    if options.check:
        record = read_record()
        if record["triton"] != triton.__version__:
            print(f"note: the committed table is of triton {record['triton']}, this is {triton.__version__}")
        found = regressions(rows, record["kernels"])
    else:
        found = [fault for row in rows for fault in faults(row)]
        if not options.only and not options.target:
            units = {"spills": "bytes a thread", "shared": "bytes a block", "registers": "a thread"}
            RECORD.write_text(json.dumps({"triton": triton.__version__, **units, "kernels": rows}, indent=1) + "\n")
            title = f"Every Triton kernel, compiled by Triton {triton.__version__} without a GPU (`bench/aot.py`).\n"
            notes = "Registers and spills (bytes) are a thread's, shared memory (bytes) a block's.\n"
            RECORD.with_suffix(".md").write_text(f"{title}{notes}\n{table(rows)}\n")
    print(*found, sep="\n")
    print(f"{len(rows)} kernels compiled, {len(found)} {'regressions' if options.check else 'faults'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
