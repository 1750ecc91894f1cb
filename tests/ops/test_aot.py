"""bench/aot.py: its committed table has no fault and every kernel, and what CI can afford of it is compiled anew.

The rest of the table is compiled by `python bench/aot.py --check`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="compiling the kernels ahead of time needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler by the interpreter", allow_module_level=True)

from fastpo.kernels.pair_losses import RECIPES  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("aot", ROOT / "bench/aot.py")
aot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(aot)

# Each kernel, the fused forward on every target, and the configurations nearest to spilling.
SUBSET = [
    *(("fused-bf16-4096", target) for target in aot.TARGETS),
    *(("fused-bf16-4096-all", target) for target in ("sm_80", "sm_90", "sm_100")),
    ("fused-bf16-2896-ragged", "sm_80"),
    ("fused-bf16-4096-50257", "sm_100"),
    ("fused-bf16-123-unaligned-all", "sm_80"),
    ("row-bf16-128256", "sm_90"),
    ("row-bf16-128256-all", "sm_80"),
    ("row-bf16-151665-unaligned-all", "sm_80"),
    ("row-fp32-128256-all", "sm_90"),
    ("row-bf16-128256", "gfx942"),
    ("split-100-bf16-128256-all", "sm_90"),
    ("split-grad-100-bf16-128256-all", "sm_90"),
    ("combine-splits-all", "sm_90"),
    ("slice-fwd-bf16-8192-entropy", "sm_90"),
    ("slice-grad-bf16-8192-all", "sm_80"),
    ("slice-entropy-bf16-128256-all", "sm_90"),
    ("pairs-sppo", "sm_90"),
    ("pairs-ld_dpo-weights", "gfx942"),
    ("dlogp-ld_dpo", "sm_90"),
    ("adamw-bf16-master", "sm_90"),
    ("adamw-fp16-stochastic", "sm_80"),
    ("tree-dkv-bf16-64-all", "sm_80"),
    ("tree-fwd-bf16-80-ungrouped", "sm_80"),
    ("tree-dq-bf16-64-all", "sm_90"),
    ("tree-dkv-bf16-64-all", "gfx942"),
    ("tree-fwd-bf16-256-all", "sm_80"),
    ("tree-dq-bf16-192-128", "sm_80"),
    ("tree-dkv-bf16-256-all", "sm_90"),
    ("tree-dq-bf16-256-all", "gfx942"),
    ("tree-dkv-fp32-128-all", "sm_100"),
]


@pytest.fixture(scope="module")
def committed() -> dict[tuple[str, str], dict]:
    return {(row["case"], row["target"]): row for row in aot.read_record()["kernels"]}


QUICK = {"fused-bf16-4096", "row-bf16-128256", "row-bf16-128256-all", "split-100-bf16-128256-all", "combine-splits-all",
         "slice-fwd-bf16-8192-entropy", "pairs-sppo", "dlogp-ld_dpo", "adamw-bf16-master", "tree-dq-bf16-64-all",
         "tree-fwd-bf16-80-ungrouped"}  # fmt: skip


@pytest.mark.parametrize(
    "case, target", [pytest.param(*one, marks=[] if one[0] in QUICK else pytest.mark.slow) for one in SUBSET]
)
def test_compiles_no_worse_than_the_committed_table(case, target, committed):
    path = aot.record_path()
    if not path.exists():
        pytest.skip(f"no committed table is of triton {triton.__version__}")
    assert not aot.regressions([aot.measure(case, target)], aot.read_record(path)["kernels"])


def test_the_committed_table_is_whole_and_has_no_fault(committed):
    assert set(committed) == {(case, target) for case in aot.CASES for target in aot.TARGETS}
    assert not [fault for row in committed.values() for fault in aot.faults(row)]
    for kernel in ("fused", "tree"):
        rows = [row for row in committed.values() if row["case"].startswith(kernel)]
        assert {row["tensor_cores"] for row in rows} >= {names[0] for names in aot.TENSOR_CORES.values()}
    # Rows that start on 16 bytes are read so; only the odd rest of an odd vocabulary may go by elements.
    aligned = {"row-bf16-128256": "16 B", "row-fp32-128256-all": "16 B", "row-bf16-50257-padded": "16 B and rest"}
    for case, expected in aligned.items():
        for target in ("sm_80", "sm_90", "sm_100"):
            assert committed[case, target]["loads"] == expected
    assert {committed["fused-bf16-4096", t]["loads"] for t in ("sm_90", "sm_100")} == {"TMA"}
    # What docs/kernels.md says of instructions and of the cache: half of the open rows in an H100's 50 MB.
    row = committed["row-bf16-128256", "sm_90"]
    assert row["instructions"] < 13.25 and (row["registers"], row["programs"]) == (32, 2)
    assert 132 * row["programs"] * 128_256 * 2 / 2 < 50e6


LISTING = """
        /*0000*/                   LDG.E.64 R8, [R2.64] ;
.L_x_1:
        /*0010*/                   LDG.E.EL.128 R8, [R2.64] ;
        /*0020*/                   FADD R4, R4, R8 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   LDG.E.EF.U16 R8, [R2.64] ;
.L_x_3:
        /*0050*/                   FADD R4, R4, R8 ;
        /*0060*/               @P1 BRA `(.L_x_3) ;
        /*0070*/               @P0 BRA `(.L_x_2) ;
.L_x_4:
        /*0080*/                   LDG.E.EF.128 R8, [R2.64] ;
        /*0090*/                   STG.E.128 [R2.64], R8 ;
        /*00a0*/             BRA.U UP0, `(.L_x_4) ;
.L_x_5:
        /*00b0*/                   BRA `(.L_x_5);
"""


def test_instructions_are_those_of_the_loops_that_read_logits():
    """Three a vector of 8 in the first look and in the second; not a loop around another, nor one that reads none."""
    assert [len(loop) for loop in aot.innermost_loops(LISTING)] == [3, 2, 3, 1]
    assert aot.instructions_a_logit(LISTING, 2) == 0.75 and aot.instructions_a_logit(LISTING, 4) == 1.5


def test_a_jump_back_over_the_end_is_no_loop():
    """Blackwell's waits lie behind the EXIT."""
    code = (
        LISTING
        + """
        /*00c0*/                   EXIT ;
.L_x_6:
        /*00d0*/             @!P6 BRA `(.L_x_6) ;
        /*00e0*/                   BRA `(.L_x_3) ;
"""
    )
    assert aot.innermost_loops(code, "FADD") == aot.innermost_loops(LISTING, "FADD")
    assert [len(loop) for loop in aot.innermost_loops(code, "FADD")] == [3, 2]


def test_the_pages_tables_are_the_records():
    record, page = aot.read_record(), aot.RECORD.with_suffix(".md").read_text()
    assert aot.table(record["kernels"]) in page and aot.before_and_after(record["kernels"], record["base"]) in page
    assert aot.trees_before_and_after(record["kernels"], record["trees"]) in page


OTHERS = sorted(aot.RECORD.parent.glob("aot-triton-*.json"))


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_the_tables_of_other_tritons(path, committed):
    """Whole, and without a fault."""
    record = aot.read_record(path)
    rows = {(row["case"], row["target"]): row for row in record["kernels"]}
    assert set(rows) == set(committed) and f"aot-triton-{record['triton']}" == path.stem
    assert not [fault for row in rows.values() for fault in aot.faults(row)]
    assert aot.table(record["kernels"]) in path.with_suffix(".md").read_text()


def test_tiles_without_a_mask_take_fewer_instructions(committed):
    """In 16 bits by a quarter at least; with all options, whose arithmetic stays, by an eighth."""
    trees = aot.read_record()["trees"]["instructions"]
    for (case, target), row in committed.items():
        if case.startswith("tree") and row["instructions"]:
            assert row["instructions"] < row["masked"], (case, target)
            if "fp32" not in case:
                assert row["instructions"] < (7 / 8 if "all" in case else 3 / 4) * trees[case][target], (case, target)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"spills": 8}, "spills 8 bytes"),
        ({"tensor_cores": ""}, "has no tcgen05.mma"),
        ({"loads": "elements"}, "loads by elements, before by TMA"),
        ({"case": "fused-bf16-4096-entropy", "target": "sm_80", "tensor_cores": ""}, "lost mma.sync"),
        ({"case": "tree-fwd-bf16-64", "target": "sm_90", "tensor_cores": "mma.sync"}, "lost wgmma"),
        ({"case": "tree-fwd-bf16-64", "target": "sm_90", "tensor_cores": ""}, "has no wgmma.mma_async or mma.sync"),
        ({"registers": 255, "warps": 16}, "more registers"),
        (
            {"case": "row-bf16-128256", "target": "sm_90", "tensor_cores": "", "instructions": 29.2},
            "takes 29.2 instructions a logit",
        ),
        ({"shared": 300_000}, "needs 300000 bytes of shared memory of 232448"),
    ],
    ids=[
        "spill",
        "tensor-core",
        "loads",
        "lost",
        "narrower",
        "tree-tensor-core",
        "registers",
        "instructions",
        "shared",
    ],
)
def test_a_regression_is_found(change, message, committed):
    row = committed["fused-bf16-4096", "sm_100"] | change
    assert any(message in found for found in aot.regressions([row], list(committed.values())))


def test_check_exits_1_on_a_regression(committed, monkeypatch, capsys):
    """Scalar registers that AMD moves to vector ones are counted, and are no spill."""
    monkeypatch.setattr("sys.argv", ["aot.py", "--check", "--only", "dlogp-ld_dpo-weights", "--target", "gfx942"])
    moved = {"registers": 10, "spills": 0, "sgprs_moved": 20, "shared": 16}
    monkeypatch.setattr(aot, "resources", lambda *_: moved)
    assert aot.main() == 0
    monkeypatch.setattr(aot, "resources", lambda *_: {**moved, "spills": 4})
    assert aot.main() == 1
    assert "dlogp-ld_dpo-weights on gfx942 spills 4 bytes a thread" in capsys.readouterr().out


def test_every_kernel_is_compiled():
    """A kernel added without a case in bench/aot.py fails, also in a new file of kernels/; and so does a pair loss."""
    compiled = {kernel for kernel, _ in aot.CASES.values()}
    assert {f"pairs-{loss_type}" for loss_type in RECIPES} <= set(aot.CASES)
    written = set()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        written |= set(re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert written == compiled
