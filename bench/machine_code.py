"""What NVIDIA's tools say of a compiled Triton kernel, and what the listing of its machine code holds."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# A product in NVIDIA's machine code, in 16 bits or in full fp32, as loops that only wait have none.
PRODUCT = r"\b(HMMA|HGMMA|UTC\w*MMA|FFMA2?)\b"


def of_cubin(compiled, tool: str, option: str) -> str:
    """What one of NVIDIA's tools says of the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return subprocess.run([NVIDIA_TOOLS / tool, option, cubin], capture_output=True, text=True, check=True).stdout


def innermost_loops(code: str, holding: str = "") -> list[list[str]]:
    """Instructions of each loop that holds `holding` (a pattern) without another such in it, of nvdisasm's listing."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    spans = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            lines.append(instruction[1])
            jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction[1])
            if jump and jump[1] in labels:  # backwards: its label has been seen
                spans.append(range(labels[jump[1]], len(lines)))
    # Blackwell's waits lie behind the kernel's end and jump back into it, over an EXIT: no loops.
    spans = [a for a in spans if not any(re.match(r"EXIT\b", line) for line in lines[a.start : a.stop])]
    spans = [a for a in spans if any(re.search(holding, line) for line in lines[a.start : a.stop])]
    inner = [a for a in spans if not any(b != a and b.start >= a.start and b.stop <= a.stop for b in spans)]
    return [lines[a.start : a.stop] for a in inner]


def instructions_a_logit(code: str, itemsize: int) -> float:
    """Of a row kernel's loops together: one loop a pass, told by the cache hint of its loads; of an unrolled loop and
    its rest, the former."""
    passes: dict[str, tuple[int, int]] = {}
    for loop in innermost_loops(code):
        for hint in ("EL", "EF"):  # evict last, evict first
            widths = [re.search(rf"\bLDG\.E\.{hint}\.?(128|64|U16|)", line) for line in loop]
            size = {"128": 16, "64": 8, "U16": 2, "": 4}
            logits = sum(size[width[1]] for width in widths if width) // itemsize
            if logits > passes.get(hint, (0, 0))[1]:
                passes[hint] = len(loop), logits
    return round(sum(count / logits for count, logits in passes.values()), 2)
