"""Named tensors of a run on the disk: safetensors, one file a rank, from which no code can come when they are read.

A file is written tensor by tensor, so that no second copy of the state exists, and read by slices, so that another
number of ranks, or none, takes what it needs. Of a sharded tensor each rank's file holds its part; where the part lies
in the whole stands in the file's own header, and parts that leave a gap or overlap are an error.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from fastpo.errors import TrainingError
from fastpo.training.distributed import World, local

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16", torch.uint32: "U32",
    torch.uint64: "U64", torch.bool: "BOOL",
}  # fmt: skip
_PARTS = "parts"  # in a header's metadata: JSON, name -> [shape of the whole, dim, start]
PATTERN = "rank-*.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file. Tensors may share memory, lie on a device, or have strides: each is written whole."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each lies aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    end = 0
    for name in names:
        t = tensors[name]
        if t.dtype not in _DTYPES:
            raise TrainingError(f"{name} is of {t.dtype}, which safetensors does not hold")
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            f.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], world: World, sharded: bool) -> None:
    """Write named tensors into `folder`; sharded ones each rank its part, all others rank 0."""
    if not (sharded or world.main):
        return
    folder.mkdir(exist_ok=True)
    own, parts = {}, {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            dim, start, _ = _range(tensor)
            own[name], parts[name] = local(tensor), [list(tensor.shape), dim, start]
        elif world.main:
            own[name] = tensor
    write_tensors(folder / f"rank-{world.rank:05d}.safetensors", own, {_PARTS: json.dumps(parts)})


def describe(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Name -> [dtype, shape of the whole]: what `load_tensors` may be told to expect."""
    return {name: [_DTYPES.get(t.dtype, str(t.dtype)), list(t.shape)] for name, t in tensors.items()}


def load_tensors(
    folder: Path, like: Mapping[str, Tensor], expected: Mapping[str, list[Any]] | None = None
) -> dict[str, Tensor]:
    """The tensors that lie in `folder`, on the host; where `like` has a sharded parameter of a name, this rank's part.

    The state `optimizer.KEY.NAME` is laid out as the parameter NAME where it has its shape. Raises TrainingError where
    parts of a tensor are missing, or where there are others than `expected`.
    """
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob(PATTERN))]
    found: dict[str, list[tuple[int, int, Any]]] = {}  # name -> (start, stop, file) of each part
    layout: dict[str, tuple[list[int], int | None]] = {}  # name -> (shape of the whole, dim of the parts)
    described: dict[str, list[Any]] = {}
    for file in files:
        parts = json.loads((file.metadata() or {}).get(_PARTS, "{}"))
        for name in file.keys():  # noqa: SIM118  # no dict
            shape = file.get_slice(name).get_shape()
            whole, dim, start = parts.get(name, (shape, None, 0))
            if layout.setdefault(name, (whole, dim)) != (whole, dim):
                raise TrainingError(f"{folder} cannot be resumed: the parts of {name} do not fit together")
            described[name] = [file.get_slice(name).get_dtype(), whole]
            found.setdefault(name, []).append((start, start + (1 if dim is None else shape[dim]), file))
    if expected is not None and described != expected:
        differs = next(n for n in (*expected, *described) if described.get(n) != expected.get(n))
        is_, should = described.get(differs) or "missing", expected.get(differs) or "nothing"
        raise TrainingError(f"{folder} cannot be resumed: {differs} is {is_}, expected {should}")
    out = {}
    for name, (shape, dim) in layout.items():
        p = like.get(parameter_of(name))
        asked = _range(p) if isinstance(p, DTensor) and list(p.shape) == shape else None
        out[name] = _read(folder, name, shape, dim, found[name], asked)
    return out


def _read(
    folder: Path, name: str, shape: list[int], dim: int | None, parts: list[tuple[int, int, Any]],
    asked: tuple[int, int, int] | None,
) -> Tensor:  # fmt: skip
    """One tensor, or of it what `asked` (dim, start, stop) names, from the parts that hold it."""
    parts = sorted((p for p in parts if p[0] < p[1]), key=lambda part: part[:2])
    size = 1 if dim is None else shape[dim]
    ends = [0, *(stop for _, stop, _ in parts)]
    if [start for start, _, _ in parts] != ends[:-1] or ends[-1] != size:
        raise TrainingError(f"{folder} cannot be resumed: parts of {name} are missing or there twice")
    if dim is None:
        whole = parts[0][2].get_tensor(name)
        # A copy: what was read lies in the mapped file, and the file goes when its checkpoint does.
        return (whole if asked is None else whole.narrow(asked[0], asked[1], asked[2] - asked[1])).clone()
    if asked is not None and asked[0] == dim:
        first, last = asked[1:]
    else:
        first, last = 0, size
    pieces = []
    for start, stop, file in parts:
        a, b = max(first, start), min(last, stop)
        if a < b:
            index = (*[slice(None)] * dim, slice(a - start, b - start))
            pieces.append(file.get_slice(name)[index])
    if not pieces and parts:  # a rank beyond the rows of a small parameter
        pieces = [parts[0][2].get_slice(name)[(*[slice(None)] * dim, slice(0, 1))].narrow(dim, 0, 0)]
    out = torch.cat(pieces, dim) if pieces else torch.empty(shape)
    if asked is not None and asked[0] != dim:
        out = out.narrow(asked[0], asked[1], asked[2] - asked[1]).clone()
    return out


def _range(tensor: DTensor) -> tuple[int, int, int]:
    """(dim, start, stop) of this rank's part: FSDP2 cuts one dimension as torch.chunk does."""
    (placement,) = tensor.placements
    assert isinstance(placement, Shard)
    mesh, dim = tensor.device_mesh, placement.dim
    n = tensor.shape[dim]
    chunk = -(-n // mesh.size())
    start = min(mesh.get_local_rank() * chunk, n)
    stop = min(start + chunk, n)
    assert tensor.to_local().shape[dim] == stop - start
    return dim, start, stop


def parameter_of(key: str) -> str:
    """The parameter's name in `weights.NAME`, `reference.NAME` and `optimizer.KEY.NAME`."""
    kind, _, name = key.partition(".")
    return name.partition(".")[2] if kind == "optimizer" else name


def as_sharded(part: Tensor, like: Tensor) -> Tensor:
    """A rank's part, as a sharded tensor laid out like `like`."""
    assert isinstance(like, DTensor)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def nonfinite_weights(folder: Path) -> str | None:
    """The first weight in a checkpoint's state that holds a value which is no number, or None."""
    for path in sorted(folder.glob(PATTERN)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.startswith("weights.") and not all_finite(file.get_tensor(name)):
                    return parameter_of(name)
    return None


def all_finite(tensor: Tensor) -> bool:
    """Whether every value is finite; without a copy of the tensor."""
    return not (tensor.numel() and tensor.is_floating_point()) or bool(_extremes(tensor).isfinite().all())


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds a value which is no number, or None. One wait for the device."""
    names = [name for name, t in tensors.items() if t.numel() and t.is_floating_point()]
    if not names:
        return None
    device = tensors[names[0]].device
    good = torch.stack([_extremes(tensors[name]).isfinite().all().to(device) for name in names]).tolist()
    return next((name for name, fine in zip(names, good, strict=True) if not fine), None)


def _extremes(tensor: Tensor) -> Tensor:
    """[2] least and largest value, NaN where there is one: a pass that needs no memory of the tensor's size."""
    return torch.stack(torch.aminmax(tensor.detach()))
