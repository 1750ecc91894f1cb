"""The Triton tree attention compiled ahead of time for sm_80, sm_90 and gfx942; tests/test_aot.py says how.

A kernel that spills, or asks for more shared memory than the target has, fails. The table of registers, spills and
shared memory is printed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="compiling the kernels ahead of time needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler by the interpreter", allow_module_level=True)

from fastpo.kernels import attention  # noqa: E402
from fastpo.layout import Layout  # noqa: E402

_spec = importlib.util.spec_from_file_location("fastpo_test_aot", Path(__file__).with_name("test_aot.py"))
aot = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(aot)
table = aot.table  # the fixture

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Bytes of shared memory that one block may have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}


def tree(kernel: str, sizes: tuple[int, int], dtype: torch.dtype, *, group: int = 4, sink: bool = False, **rules):
    """One launch of the three kernels on tensors that nothing reads."""

    def launch() -> None:
        heads = 2 * group
        query = torch.zeros(32, heads, sizes[0], dtype=dtype)
        key, value = (torch.zeros(32, 2, size, dtype=dtype) for size in sizes)
        config = attention.tree_config(*sizes, dtype)
        tables = Layout.from_chains((0, 32)).tree_blocks(
            query.device, config.fwd.queries, config.dq.queries, config.dkv.keys
        )
        given = {"scale": 0.1, "sink": torch.zeros(heads, dtype=dtype) if sink else None, **rules}
        out, lse = attention.tree_attention_fwd(query, key, value, tables, **given)
        attention.tree_attention_bwd(out, query, key, value, out, lse, tables, **given)

    return attention, f"_tree_attention_{kernel}_kernel", launch


KERNELS = ("fwd", "dq", "dkv")
EVERYTHING = {"window": 512, "softcap": 50.0, "sink": True}
CASES = {
    f"tree-{kernel}-{name}": tree(kernel, *problem, **rules)
    for kernel in KERNELS
    for name, problem, rules in (
        ("bf16-16", ((16, 16), BF16), {}),
        ("bf16-64", ((64, 64), BF16), {}),
        ("bf16-64-all", ((64, 64), BF16), EVERYTHING),
        ("bf16-80", ((80, 80), BF16), {}),
        ("bf16-128", ((128, 128), BF16), {}),
        ("fp16-128-all", ((128, 128), FP16), EVERYTHING),
        ("bf16-192-128", ((192, 128), BF16), {}),
        ("bf16-256", ((256, 256), BF16), {}),
        ("bf16-256-all", ((256, 256), BF16), EVERYTHING),
        ("fp32-64", ((64, 64), FP32), {}),
        ("fp32-128-all", ((128, 128), FP32), EVERYTHING),
    )
}
aot.CASES.update(CASES)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(case, target, monkeypatch, tmp_path, table):
    compiled = aot.compile_case(case, target, monkeypatch)
    used = aot.resources(compiled, aot.TARGETS[target], tmp_path)
    table.append({"case": case, "target": target, "warps": compiled.metadata.num_warps, **used})
    assert used["spills"] == 0, f"{case} on {target} spills {used['spills']} bytes a thread"
    assert used["shared"] <= SHARED[target], f"{case} on {target} needs {used['shared']} bytes of shared memory"
