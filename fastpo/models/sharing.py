"""What a shared prompt saves and costs on a device: the numbers by which `share_prompts=auto` decides.

A CPU's are measured (data/packing.py). A GPU's come from arithmetic and are not measured. A token of a layer costs its
parameters' multiply-adds: 2 FLOPs a parameter forward, again where layers are checkpointed, and 2 or 4 backward. A
query and a key that it sees cost 4 H D FLOPs forward and 10 backward. FlashAttention takes a tree in two calls, of all
chains and of all branches on their prompts, whose outputs are merged by their log-sum-exps. What that reads and writes
counts as the FLOPs that the chip could have done in that time, by the peaks of its data sheet; so do its launches. The
Triton kernel takes a tree in one call, and costs nothing beside.

On paper the trunk of an 8B Llama trains 1.6 times as fast where two responses of 256 tokens share a prompt of 1,024.

H = query heads, D = their size.
"""

from typing import Any

import torch

from fastpo.config.train_config import TrainConfig
from fastpo.data.packing import TrunkCost
from fastpo.models import attention
from fastpo.models.flops import Flops
from fastpo.models.policy import Policy

# FLOPs in 16 bits that a chip could do in the time of a byte, by its data sheet; another's is taken to be the H100's.
_FLOPS_A_BYTE = {"H100": 989 / 3.35, "H200": 989 / 4.8, "A100": 312 / 2.0, "B200": 2250 / 8.0, "L40S": 362 / 0.864,
                 "MI300X": 1307 / 5.3}  # fmt: skip
_PEAK = 989e12  # FLOP/s, of one that is not known

# Bytes that the merge moves, b being those of a number, by its lines in tree_attention.TreeAttention. For a number of
# a branch's output, forward: queries and outputs gathered (4 b), read and written by the second call (2 b), scaled in
# fp32 (2 b + 8), added (12), rounded and put back (3 b + 4). Backward: three gathered (6 b), the call (4 b), one added
# in place (7 b). For one of its prompt's keys and values, forward: gathered and read (3 b). Backward: gathered, read
# and written (4 b), added in place (7 b).
_LAUNCHES = 17, 19  # kernels of the merge, forward and backward
_LAUNCH_SECONDS = 3e-6  # that a kernel takes, however little it does


def _branch_bytes(b: int, forwards: int) -> int:
    return forwards * (11 * b + 24) + 17 * b


def _key_bytes(b: int, forwards: int) -> int:
    return forwards * 3 * b + 11 * b


def trunk_cost(
    policy: Policy, config: TrainConfig, device_type: str, device: torch.device | None, *, bf16: bool, room: int
) -> TrunkCost:
    """Of a layer of this policy. device: None for a GPU that is not here. bf16: by autocast. room: tokens of a
    micro-batch."""
    flops = Flops(policy, device if device is not None else torch.device("cpu"))
    if device_type != "cuda":
        return TrunkCost.of(flops)._replace(shares=device_type == "cpu")
    name = torch.cuda.get_device_name(device) if device is not None else ""
    dtype = torch.bfloat16 if bf16 and policy.dtype != torch.float64 else policy.dtype
    forwards = 1 + config.gradient_checkpointing
    return gpu_cost(
        flops, policy.model.config, tree_backend(policy, config, device, dtype), name, forwards=forwards,
        itemsize=dtype.itemsize, rows=config.step_size, room=room,
    )  # fmt: skip


def gpu_cost(
    flops: Flops, model: Any, backend: str | None, chip: str, *, forwards: int, itemsize: int, rows: int, room: int
) -> TrunkCost:
    """backend: of shared prompts, None for none. model: its configuration. chip: the device's name. forwards: of a
    layer, in a step of so many rows."""
    model = model.get_text_config() if hasattr(model, "get_text_config") else model
    layers = max(flops.layers, 1)
    queries, keys = _width(model, "num_attention_heads"), _width(model, "num_key_value_heads")
    token = (flops.active_per_token + 2 * (forwards - 1) * flops.active) / layers
    cost = TrunkCost(token, (4 * forwards + 10) * queries, branch=0.0, shares=backend is not None)
    if backend is None or backend == "triton":
        return cost
    a_byte = next((ratio for known, ratio in _FLOPS_A_BYTE.items() if known in chip), _FLOPS_A_BYTE["H100"])
    kernels = forwards * _LAUNCHES[0] + _LAUNCHES[1]
    return cost._replace(
        branch_token=a_byte * queries * _branch_bytes(itemsize, forwards),
        branch_key=a_byte * 2 * keys * _key_bytes(itemsize, forwards),
        launches=kernels * _LAUNCH_SECONDS * (flops.peak or _PEAK), rows=rows, room=room,
    )  # fmt: skip


def _width(model: Any, heads: str) -> int:
    """Numbers of a token's queries, or of its keys, in all heads."""
    of_queries = getattr(model, "num_attention_heads", 0) or 0
    count = getattr(model, heads, None) or of_queries
    return count * _head(model)


def _head(model: Any) -> int:
    """The larger of the sizes of a query and a value."""
    count = getattr(model, "num_attention_heads", 0) or 1
    plain = getattr(model, "head_dim", None) or getattr(model, "hidden_size", 0) // count
    latent = (getattr(model, "qk_nope_head_dim", 0) or 0) + (getattr(model, "qk_rope_head_dim", 0) or 0)
    return max(latent or plain, getattr(model, "v_head_dim", 0) or 0)


def kinds(policy: Policy, config: TrainConfig) -> set[attention.Kind]:
    """What the layers ask of their attention, as far as it can be seen before they run."""
    out: set[attention.Kind] = set()
    model: Any = policy.model.config
    model = model.get_text_config() if hasattr(model, "get_text_config") else model
    modules: list[Any] = list(policy.trunk.modules())
    for module in modules:
        if "Attention" not in type(module).__name__:
            continue
        window = getattr(module, "sliding_window", None)
        if window is not None and config.max_length is not None and window >= config.max_length:
            window = None  # no row is longer
        softcap = getattr(module, "attn_logit_softcapping", None) or getattr(model, "attn_logit_softcapping", None)
        dropout = 0.0 if config.disable_dropout else _dropout(module, model)
        out.add(attention.Kind(_head(model), window, softcap, dropout, getattr(module, "sinks", None) is not None))
    return out


def _dropout(module: Any, model: Any) -> float:
    found = [getattr(owner, name, 0.0) for owner in (module, model) for name in ("attention_dropout", "attn_pdrop")]
    return max(float(p) for p in found if isinstance(p, float | int))


def tree_backend(policy: Policy, config: TrainConfig, device: torch.device | None, dtype: torch.dtype) -> str | None:
    """What computes shared prompts in every layer, the slower one where they differ; None where one cannot."""
    found = {attention.tree_backend(kind, device, dtype) for kind in kinds(policy, config)}
    if policy.unpacked or not found or None in found:
        return None
    return next((name for name in ("flash_attn", "varlen") if name in found), "triton")
