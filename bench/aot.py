"""Compiles every Triton kernel and configuration for sm_80, sm_90, sm_100 and gfx942, without a GPU.

    python bench/aot.py            compile all, print the table, write bench/results/aot.json and aot.md; of another
                                   Triton than theirs aot-triton-VERSION.json and .md
    python bench/aot.py --check    compile all and compare with the committed table; exit 1 on a regression
    python bench/aot.py --only fused --target sm_90    a part of it, printed only

A case is a launch: the launchers run on CPU tensors with the kernels replaced by recorders, and what those record
(dtypes, alignments, constants, warps) is compiled for each target as the JIT would there. Off the binary: registers a
thread, bytes of spills a thread, shared memory, and how many programs these let an NVIDIA multiprocessor hold; off the
assembly: the tensor-core instruction of GEMM kernels, and how logits or operands are loaded; off the machine code for
NVIDIA: instructions a logit of the row kernels, of all passes' loops together (a row's masked rest is not in them);
instructions of all threads for a score of the tree attention, in tiles without a mask and, under `masked`, in those
with one; for a number of AdamW. A regression is a new spill, a lost tensor-core instruction, a narrower load or a
twentieth more instructions. Speed is not in here: only a GPU tells.

Spills are what goes to memory: local memory on NVIDIA, scratch on AMD (of vector registers, or of any other kind). No
kernel may have any. AMD's scalar registers, one of which serves a whole wave, are moved to lanes of a vector register
where they do not suffice: no memory, one instruction each way. Their number is in a column of its own, `sgprs moved`,
and fails nothing. The fused forward must have its chip's own tensor-core instruction, any other GEMM kernel of 16-bit
inputs one of the chip's: tiles too narrow for Hopper's wgmma or Blackwell's tcgen05 run mma.sync. Products of fp32
inputs are full fp32, for which only AMD has matrix instructions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpo.kernels import adamw, attention, entropy, fused, logprob, online_softmax, preference
from fastpo.kernels.pair_losses import RECIPES, recipe
from fastpo.losses.table import LOSSES
from fastpo.models.layout import Layout

sys.path.append(str(Path(__file__).resolve().parent))
from machine_code import PRODUCT, innermost_loops, instructions_a_logit, of_cubin  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench/results/aot.json"
MODULES = (adamw, attention, entropy, fused, logprob, online_softmax, preference)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MULTIPROCESSORS = 132  # an H100's; the only use of it here is to cut few rows into splits
# Instructions of products in 16 bits, the chip's own first.
TENSOR_CORES = {
    "sm_80": ("mma.sync",),
    "sm_90": ("wgmma.mma_async", "mma.sync"),
    "sm_100": ("tcgen05.mma", "mma.sync"),
    "gfx942": ("v_mfma",),
}
# What an NVIDIA multiprocessor holds of threads, and of 32-bit registers, which are given out to a warp 8 a thread.
THREADS, REGISTERS = 2048, 65_536
# Bytes of shared memory that a block may have.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
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
        top1 = torch.empty(rows) if entropy else None  # as the op asks for them
        options = {"softcap": softcap, "logit_scale": 0.5, "entropy": entropy, "write": write, "argmax": best}
        logprob.logprob_row_fwd(logits, target, bias_values, top1=top1, **options)

    return f"_logprob_{kernel}_kernel", launch


def slice_fwd(v: int, dtype: torch.dtype, *, entropy=False):
    def launch() -> None:
        state = logprob.logprob_slice_init(1000, "cpu", entropy)
        logprob.logprob_slice_fwd(*row_inputs(1000, v, dtype), state, softcap=None, logit_scale=1.0, col_offset=v)

    return "_logprob_slice_fwd_kernel", launch


def slice_grad(v: int, dtype: torch.dtype):
    def launch() -> None:
        logits, target, bias = row_inputs(1000, v, dtype, bias=dtype)
        norm, logp = torch.zeros(2, 1000), torch.zeros(1000)
        rule = {"softcap": 30.0, "logit_scale": 1.0, "col_offset": v}
        logprob.logprob_slice_grad(logits, target, norm, bias, logp=logp, **rule)

    return "_logprob_slice_grad_kernel", launch


def entropy_grad(v: int, dtype: torch.dtype, *, rows=1000, padded=True, bias=None, softcap=None):
    def launch() -> None:
        logits, target, bias_values = row_inputs(rows, v, dtype, padded, bias)
        rule = {"softcap": softcap, "logit_scale": 0.5, "col_offset": v}
        stats, upstream = torch.zeros(4, rows), torch.zeros(2, rows)
        entropy.logprob_entropy_grad(logits, target, stats, upstream, bias_values, out=torch.empty_like(logits), **rule)

    return "_logprob_entropy_grad_kernel", launch


def fused_fwd(d: int, dtype=BF16, *, v=128_256, bias=None, softcap=None, entropy=False, config=None, combine=False):
    def launch() -> None:
        hidden, weight = (torch.empty(n, d, dtype=dtype) for n in (1000, v))  # never touched, so never in memory
        target, bias_values = torch.zeros(1000, dtype=torch.int64), torch.empty(v, dtype=bias) if bias else None
        top1 = torch.empty(1000) if entropy else None
        options = {"softcap": softcap, "logit_scale": 1.0, "entropy": entropy, "config": config}
        fused.fused_logprob_fwd(hidden, weight, target, bias_values, top1=top1, **options)

    return "_logprob_combine_kernel" if combine else "_fused_logprob_fwd_kernel", launch


FWD, DLOGP = "_preference_fwd_kernel", "_preference_dlogp_kernel"


def pairs(loss_type: str, kernel: str = FWD, *, ref="token", unique=True, weights=False, **hyper):
    """A pair loss with all that it reads; an NLL beside it is summed by sequence, as the kernel does it."""
    if "nll_reduction" in LOSSES[loss_type].defaults:
        hyper = {"nll_reduction": "seq_sum", **hyper}
    hyper = LOSSES[loss_type].hyper(**hyper)

    def launch() -> None:
        made = recipe(loss_type, **hyper)
        tokens, responses, win_prob = torch.zeros(11), torch.zeros(4), torch.ones(2)
        preference.preference_fwd(
            tokens,
            tokens if ref == "token" and made.reference != "none" else None,
            torch.tensor([0, 3, 5, 9, 11], dtype=torch.int32),
            torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
            torch.ones(2),
            win_prob,
            win_prob,
            unique=unique,
            ref_response_logps=responses if ref == "response" else None,
            prev_logp=tokens if made.reference == "mixed" and ref == "token" else None,
            prev_response_logps=responses if made.reference == "mixed" and ref == "response" else None,
            rows=tokens if made.reads_rows else None,
            token_weight=tokens if weights else None,
            drawn_rows=torch.tensor([0, 1, 3, 4, 5, 6, 9, 10]) if made.tokens == "drawn" else None,
            loss_type=made,
        )

    return kernel, launch


def tree(kernel: str, sizes: tuple[int, int], dtype: torch.dtype, *, group=4, sink=False, **rules):
    """A kernel of the tree attention; sizes of a head of keys and of values."""

    def launch() -> None:
        query = torch.zeros(32, 2 * group, sizes[0], dtype=dtype)
        key, value = (torch.zeros(32, 2, size, dtype=dtype) for size in sizes)
        config = attention.tree_config(*sizes, dtype)
        blocks = config.fwd.queries, config.dq.queries, config.dkv.keys
        tables = Layout.from_chains((0, 32)).tree_blocks(query.device, *blocks)
        given = {"scale": 0.1, "sink": torch.zeros(2 * group, dtype=dtype) if sink else None, **rules}
        out, lse = attention.tree_attention_fwd(query, key, value, tables, **given)
        attention.tree_attention_bwd(out, query, key, value, out, lse, tables, **given)

    return f"_tree_attention_{kernel}_kernel", launch


def adamw_step(dtype: torch.dtype, grad: torch.dtype, *, master=False, key=(1, 2), state=FP32, offset=0):
    """A step of 16-bit weights; `offset` elements from where memory is aligned."""

    def launch() -> None:
        weight, wide, m, v = (torch.zeros(100_000, dtype=kind)[offset:] for kind in (dtype, FP32, state, state))
        tensors = [
            adamw.AdamWTensor(weight.to(grad), weight, wide if master else None, m, v, torch.ones(()), 0),
        ]
        hyper = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "key": key}
        adamw.adamw(adamw.adamw_table(tensors), tensors, finite=torch.ones(()), scale=torch.ones(()), **hyper)

    return "_adamw_kernel", launch


# Llama 3's vocabulary at both ends of the options; odd vocabularies, padded and not; short rows; rows few enough to be
# split; every pair loss once, and each option that changes its code; each way of stepping 16-bit weights; every class
# of the attention's tiles with and without all options, odd and uneven heads.
ALL = {"softcap": 30.0, "entropy": True}
TREE_ALL = {"window": 512, "softcap": 50.0, "sink": True}
TREES = {
    "bf16-16": ((16, 16), BF16, {}),
    "bf16-64": ((64, 64), BF16, {}),
    "bf16-64-all": ((64, 64), BF16, TREE_ALL),
    "bf16-80-ungrouped": ((80, 80), BF16, {"group": 1}),
    "bf16-128": ((128, 128), BF16, {}),
    "fp16-128-all": ((128, 128), FP16, TREE_ALL),
    "bf16-192-128": ((192, 128), BF16, {}),
    "bf16-256-all": ((256, 256), BF16, TREE_ALL),
    "fp32-64-all": ((64, 64), FP32, TREE_ALL),
    "fp32-128": ((128, 128), FP32, {}),
    "fp32-128-all": ((128, 128), FP32, TREE_ALL),
}
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
    "slice-entropy-bf16-8192": entropy_grad(8192, BF16),
    "slice-entropy-bf16-128256-all": entropy_grad(128_256, BF16, bias=BF16, softcap=30.0),
    "slice-entropy-fp32-100000-all": entropy_grad(100_000, FP32, bias=FP32, softcap=30.0),
    "slice-entropy-bf16-50257": entropy_grad(50_257, BF16),
    "slice-entropy-bf16-151665-unaligned-all": entropy_grad(151_665, BF16, padded=False, bias=FP32, softcap=30.0),
    "slice-entropy-split-100-bf16-128256": entropy_grad(128_256, BF16, rows=100),
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
    **{f"pairs-{loss_type}": pairs(loss_type) for loss_type in RECIPES},
    "pairs-orpo": pairs("orpo", disable_prompt_loss=True),  # of the prompt's tokens the kernel knows nothing
    "pairs-dpo-smooth-response-ref": pairs("dpo", label_smoothing=0.1, ref="response"),
    "pairs-dpo-weights": pairs("dpo", weights=True),
    "pairs-ipo-sum": pairs("ipo", ipo_reduce="sum"),
    "pairs-simpo-smooth": pairs("simpo", label_smoothing=0.1),
    "pairs-fdpo-forward-kl": pairs("fdpo", f_divergence_type="forward_kl"),
    "pairs-fdpo-js": pairs("fdpo", f_divergence_type="js_divergence"),
    "pairs-fdpo-alpha": pairs("fdpo", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.5),
    "pairs-wpo-unclamped": pairs("wpo", clamp_weight=False),
    "pairs-cpo-nll-mean": pairs("cpo", cpo_alpha=1.0, nll_reduction="seq_mean"),
    "pairs-inpo-response-ref": pairs("inpo", ref="response"),
    **{f"pairs-{name}-shared": pairs(name, unique=False) for name in ("dpo", "ld_dpo", "sampo", "tdpo2")},
    "pairs-sppo-shared-weights": pairs("sppo", unique=False, weights=True),
    "pairs-ld_dpo-weights": pairs("ld_dpo", weights=True),
    "pairs-sampo-weights": pairs("sampo", weights=True),
    "dlogp": pairs("dpo", DLOGP, unique=False),
    "dlogp-weights": pairs("dpo", DLOGP, unique=False, weights=True),
    "dlogp-tdpo1": pairs("tdpo1", DLOGP, unique=False),
    "dlogp-tdpo2-weights": pairs("tdpo2", DLOGP, unique=False, weights=True),
    "dlogp-ld_dpo": pairs("ld_dpo", DLOGP, unique=False),
    "dlogp-ld_dpo-weights": pairs("ld_dpo", DLOGP, unique=False, weights=True),
    "adamw-bf16-master": adamw_step(BF16, BF16, master=True, key=None),
    "adamw-bf16-master-grad-fp32": adamw_step(BF16, FP32, master=True, key=None),
    "adamw-bf16-stochastic": adamw_step(BF16, BF16),
    "adamw-bf16-stochastic-grad-fp32": adamw_step(BF16, FP32),
    "adamw-bf16-stochastic-unaligned": adamw_step(BF16, FP32, offset=1),
    "adamw-fp16-stochastic": adamw_step(FP16, FP16),
    "adamw-bf16-nearest": adamw_step(BF16, BF16, state=BF16, key=None),
    **{
        f"tree-{kernel}-{name}": tree(kernel, sizes, dtype, **rules)
        for name, (sizes, dtype, rules) in TREES.items()
        for kernel in ("fwd", "dq", "dkv")
    },
}
GEMMS = {kernel for kernel, _ in CASES.values() if kernel.startswith(("_fused", "_tree"))}


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
    """Registers and bytes of spills, each a thread's, scalar registers moved to vector ones, bytes of shared memory."""
    shared = compiled.metadata.shared
    if TARGETS[target].backend == "hip":
        fields = dict(re.findall(r"\.(\w+):\s+(\d+)\s*$", compiled.asm["amdgcn"], re.MULTILINE))
        spills = 4 * int(fields["vgpr_spill_count"]) + int(fields["private_segment_fixed_size"])
        moved = int(fields["sgpr_spill_count"])
        return {"registers": int(fields["vgpr_count"]), "spills": spills, "sgprs_moved": moved, "shared": shared}
    report = of_cubin(compiled, "cuobjdump", "-res-usage")
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    registers, stack, local = map(int, usage)
    return {"registers": registers, "spills": stack + local, "sgprs_moved": 0, "shared": shared}


def instructions_a_score(code: str, case: str) -> list[float]:
    """Of a tree attention's loops over tiles, without masks and with them: instructions of all threads for a score."""
    kernel, name = case.removeprefix("tree-").split("-", 1)
    sizes, dtype, rules = TREES[name]
    config = attention.tree_config(*sizes, dtype)
    if rules.get("softcap"):
        config = attention.softcapped(config, dtype, sizes[0])
    tile = getattr(config, kernel)
    threads = 32 * tile.warps / (tile.queries * tile.keys)
    return [round(len(loop) * threads, 1) for loop in innermost_loops(code, PRODUCT)]


def instructions_a_number(code: str) -> float:
    """Of AdamW's loop over a chunk: instructions of all threads for each of its numbers."""
    (loop,) = innermost_loops(code, r"\bLDG\b")
    return round(len(loop) * 32 * adamw.WARPS / adamw.BLOCK, 1)


def instructions(code: str, case: str) -> tuple[float | None, float | None]:
    """(of the table's column of that name, of `masked`) of machine code for NVIDIA."""
    if case.startswith("tree"):
        plain, masked = instructions_a_score(code, case)
        return plain, masked
    if case.startswith("adamw"):
        return instructions_a_number(code), None
    return instructions_a_logit(code, 4 if "fp32-" in case else 2), None


def programs(row: dict) -> int:
    """Programs of a kernel that an NVIDIA multiprocessor holds at a time."""
    threads = 32 * row["warps"]
    by_shared = (SHARED[row["target"]] + 1024) // (row["shared"] + 1024)  # a block takes 1 KiB more than it asks for
    return min(THREADS // threads, REGISTERS // (-(-row["registers"] // 8) * 8 * threads), by_shared, 32)


def loads(compiled, target: str, gemm: bool) -> str:
    """How a kernel reads its matrices, one of LOADS."""
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
    gemm = CASES[case][0] in GEMMS
    reads_logits = re.match(r"row|split|slice", case)
    hip = TARGETS[target].backend == "hip"
    assembly = compiled.asm["amdgcn" if hip else "ptx"]
    row = {"case": case, "target": target, "warps": compiled.metadata.num_warps, **resources(compiled, target)}
    counted = reads_logits or case.startswith(("tree", "adamw"))
    code = of_cubin(compiled, "nvdisasm", "-c") if counted and not hip else ""
    count, masked = instructions(code, case) if code else (None, None)
    return row | {
        "programs": None if hip else programs(row),
        "instructions": count,
        "masked": masked,
        "tensor_cores": next((name for name in TENSOR_CORES[target] if name in assembly), "") if gemm else "",
        "loads": loads(compiled, target, gemm) if gemm or reads_logits else "",
    }


def faults(row: dict) -> list[str]:
    """What no row may have, whatever the committed table says."""
    where = f"{row['case']} on {row['target']}"
    found = []
    if row["spills"]:
        found.append(f"{where} spills {row['spills']} bytes a thread")
    kernel = CASES[row["case"]][0]
    if kernel in GEMMS and "fp32" not in row["case"]:
        wanted = TENSOR_CORES[row["target"]][: 1 if kernel == "_fused_logprob_fwd_kernel" else None]
        if row["tensor_cores"] not in wanted:
            found.append(f"{where} has no {' or '.join(wanted)}")
    if row["shared"] > SHARED[row["target"]]:
        found.append(f"{where} needs {row['shared']} bytes of shared memory of {SHARED[row['target']]}")
    if TARGETS[row["target"]].backend == "cuda" and row["registers"] * row["warps"] * 32 > REGISTERS:
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
        ranks = (*TENSOR_CORES[row["target"]], "")
        if ranks.index(row["tensor_cores"]) > ranks.index(old["tensor_cores"]):
            found.append(f"{where} lost {old['tensor_cores']}")
        if old["loads"] and LOADS.index(row["loads"] or "elements") < LOADS.index(old["loads"]):
            found.append(f"{where} loads by {row['loads']}, before by {old['loads']}")
        for name in ("instructions", "masked"):
            if old[name] and (row[name] or 0) > 1.05 * old[name]:
                unit = f"{name} a {unit_of(row['case'])}".replace("masked a", "instructions a masked")
                found.append(f"{where} takes {row[name]} {unit}, before {old[name]}")
    return found


def unit_of(case: str) -> str:
    return "score" if case.startswith("tree") else "number" if case.startswith("adamw") else "logit"


def read_record(path: Path = RECORD) -> dict:
    return json.loads(path.read_text())


def record_path(version: str = triton.__version__) -> Path:
    """Where a version's table is: the first one's is RECORD."""
    if not RECORD.exists() or read_record()["triton"] == version:
        return RECORD
    return RECORD.with_name(f"aot-triton-{version}.json")


def table(rows: list[dict]) -> str:
    """Markdown."""
    header = (
        "case", "target", "warps", "registers", "spills", "sgprs moved", "shared", "programs", "instructions",
        "masked", "tensor cores", "loads",
    )  # fmt: skip
    values = [[row[name.replace(" ", "_")] for name in header] for row in rows]
    lines = [["" if value is None else str(value) for value in line] for line in values]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rules = ["-" * w for w in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in [header, rules, *lines]
    )


def before_and_after(rows: list[dict], base: dict) -> str:
    """Markdown: instructions a logit of the row kernels of an earlier commit, and now."""
    now = {(row["case"], row["target"]): row["instructions"] for row in rows}
    targets = [target for target in TARGETS if TARGETS[target].backend == "cuda"]
    lines = ["| case | " + " | ".join(targets) + " |", "| --- |" + " ---: |" * len(targets)]
    for case, counts in base["instructions"].items():
        cells = (f"{counts[target]:.1f} to {now[case, target]:.1f}" for target in targets)
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def trees_before_and_after(rows: list[dict], base: dict) -> str:
    """Markdown: instructions a score of the tree attention of a commit that masked all tiles, and now."""
    now = {(row["case"], row["target"]): (row["instructions"], row["masked"]) for row in rows}
    targets = [target for target in TARGETS if TARGETS[target].backend == "cuda"]
    lines = ["| case | " + " | ".join(targets) + " |", "| --- |" + " ---: |" * len(targets)]
    for case, counts in base["instructions"].items():
        cells = ("{:.1f} to {:.1f}, {:.1f}".format(counts[target], *now[case, target]) for target in targets)
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_record(rows: list[dict], path: Path, base: dict | None, trees: dict | None) -> None:
    """The table as JSON and Markdown. `base`, of the row kernels, and `trees` are {"commit", "instructions": {case:
    {target: a logit or a score}}} of earlier commits."""
    units = {"registers": "a thread", "spills": "bytes a thread", "sgprs_moved": "a wave", "shared": "bytes a block"}
    units |= {"programs": "a multiprocessor", "instructions": "a logit, a score or a number", "masked": "a score"}
    record = {"triton": triton.__version__, **units, "base": base, "trees": trees, "kernels": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    page = f"""Every Triton kernel, compiled by Triton {triton.__version__} without a GPU (`bench/aot.py`).
Registers and spills to memory (bytes) are a thread's, shared memory (bytes) a block's. AMD's scalar
registers that are moved to lanes of vector registers go to no memory. Programs are what an NVIDIA
multiprocessor holds at a time. Instructions are those of the loops: of a row kernel for each logit, of the
tree attention for each score in tiles without a mask and in masked ones, of AdamW for each number.

{table(rows)}
"""
    if base:
        page += f"""
Instructions a logit of the row kernels at commit {base["commit"]}, whose exponentials were natural, and now:

{before_and_after(rows, base)}
"""
    if trees:
        page += f"""
Instructions a score of the tree attention at commit {trees["commit"]}, which masked every tile, and now: without a
mask, with one:

{trees_before_and_after(rows, trees)}
"""
    path.with_suffix(".md").write_text(page)


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
    path = record_path()
    if options.check:
        record = read_record(path if path.exists() else RECORD)
        if record["triton"] != triton.__version__:
            print(f"note: the committed table is of triton {record['triton']}, this is {triton.__version__}")
        found = regressions(rows, record["kernels"])
    else:
        found = [fault for row in rows for fault in faults(row)]
        if not options.only and not options.target:
            old = read_record() if path == RECORD and path.exists() else {}
            write_record(rows, path, old.get("base"), old.get("trees"))
    print(*found, sep="\n")
    print(f"{len(rows)} kernels compiled, {len(found)} {'regressions' if options.check else 'faults'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
