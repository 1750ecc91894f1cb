"""The Triton tree attention compiled ahead of time for sm_80, sm_90 and gfx942, exactly as its launchers launch it.

The launchers run on CPU tensors with their kernels replaced by a recorder; what it records is compiled for each target.
A kernel that spills registers to memory, or asks for more shared memory than the target has, fails. The table of
registers, spills and shared memory is printed. The cases are bench/aot_attention.py's.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="compiling the kernels ahead of time needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler by the interpreter", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastpo.kernels import attention  # noqa: E402

_spec = importlib.util.spec_from_file_location(
    "fastpo_aot_attention", Path(__file__).resolve().parent.parent / "bench/aot_attention.py"
)
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes that one block may have
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "v_mfma"}  # the instruction of products in 16 bits
NARROW = ("tree-dkv-fp16-128", "tree-dkv-bf16-128", "tree-dkv-bf16-80", "tree-dkv-bf16-192", "tree-dkv-bf16-256")
# The heaviest of each class of tiles.
QUICK = ("bf16-64-all", "fp16-128-all", "bf16-256-all", "fp32-64-all", "fp32-128-all")


class Recorder:
    """Stands in for a jitted kernel and keeps its last launch."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        assert all(0 < n < 2**31 for n in grid)

        def launch(*args, **kwargs) -> None:
            self.args, self.kwargs = args, kwargs

        return launch

    def compile(self, target: GPUTarget):
        """Specialised as the JIT would for these arguments."""
        names = self.kernel.arg_names
        values = dict(zip(names, self.args)) | self.kwargs
        options = {name: values.pop(name) for name in list(values) if name not in names}
        signature, constants, attributes = {}, {}, {}
        for i, param in enumerate(self.kernel.params):
            name, value = param.name, values[param.name]
            if param.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name], number = POINTERS[value.dtype], value.data_ptr()
            else:
                signature[name], number = {int: "i32", float: "fp32"}[type(value)], value
            if type(number) is int and number % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return triton.compile(ASTSource(self.kernel, signature, constants, attributes), target=target, options=options)


def resources(compiled, target: GPUTarget, folder: Path) -> dict[str, int]:
    """Registers a thread, bytes a thread in memory that spills take, bytes of shared memory a block, off the binary."""
    shared = compiled.metadata.shared
    if target.backend == "hip":
        fields = dict(re.findall(r"\.(\w+):\s+(\d+)\s*$", compiled.asm["amdgcn"], re.MULTILINE))
        # Scalar registers spill to lanes of vector registers, not to memory.
        spills = 4 * int(fields["vgpr_spill_count"]) + int(fields["private_segment_fixed_size"])
        return {"registers": int(fields["vgpr_count"]), "spills": spills, "shared": shared}
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    registers, stack, local = map(int, usage)
    return {"registers": registers, "spills": stack + local, "shared": shared}


def compile_case(case: str, target: str, monkeypatch: pytest.MonkeyPatch):
    name, launch = cases.CASES[case]
    kernels = [f"_tree_attention_{k}_kernel" for k in cases.KERNELS]
    recorders = {key: Recorder(getattr(attention, key)) for key in kernels}
    with monkeypatch.context() as patch:
        # Tiles are others on AMD.
        patch.setattr(torch.version, "hip", "7.0" if TARGETS[target].backend == "hip" else None)
        for key, recorder in recorders.items():
            patch.setattr(attention, key, recorder)
        launch()
    return recorders[name].compile(TARGETS[target])


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest):
    """Rows of results, printed past pytest's capture when the last test is done."""
    rows: list[dict] = []
    yield rows
    lines = [f"{'case':32} {'target':7} {'warps':>5} {'registers':>9} {'spills':>6} {'shared':>6}"]
    lines += ["{case:32} {target:7} {warps:5} {registers:9} {spills:6} {shared:6}".format(**r) for r in rows]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", cases.CASES)
def test_compiles_without_spills(case, target, monkeypatch, tmp_path, table):
    if not case.endswith(QUICK) and os.environ.get("FASTPO_AOT_ALL") != "1":
        pytest.skip("one of each class of tiles is compiled; FASTPO_AOT_ALL=1 compiles all")
    compiled = compile_case(case, target, monkeypatch)
    used = resources(compiled, TARGETS[target], tmp_path)
    table.append({"case": case, "target": target, "warps": compiled.metadata.num_warps, **used})
    assert used["spills"] == 0, f"{case} on {target} spills {used['spills']} bytes a thread"
    assert used["shared"] <= SHARED[target], f"{case} on {target} needs {used['shared']} bytes of shared memory"
    if TARGETS[target].backend == "cuda":
        assert used["registers"] * compiled.metadata.num_warps * 32 <= 65_536
    if "fp32" not in case:
        instruction = "mma.sync" if target == "sm_90" and case.startswith(NARROW) else MATRIX[target]
        assert instruction in compiled.asm["amdgcn" if target == "gfx942" else "ptx"]
