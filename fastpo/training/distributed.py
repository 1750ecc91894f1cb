"""Several processes: who is who, and the two ways to share the work.

`torchrun --nproc-per-node 8 -m fastpo train ...` starts one process a GPU. Without `fsdp` every rank holds the model,
runs its share of a step's micro-batches, and the fp32 gradients are summed once a step. With `fsdp` the parameters are
split over the ranks by PyTorch's FSDP2 (`fully_shard`): gathered layer by layer, the head with the root, once a
micro-batch.
"""

import atexit
import datetime
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError, DeviceError, UnsupportedModelError
from fastpo.models.loading import resolve_device
from fastpo.models.policy import Policy

T = TypeVar("T")

DEVICES = ("cuda", "cpu")


@dataclass
class World:
    """The processes of a run; of size 1 without a launcher, and then every method is a no-op."""

    failed: ClassVar[bool] = False  # a run in this process has ended in an error

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def start(cls, config: TrainConfig) -> "World":
        """The process group of torchrun's environment, or one process. Raises DeviceError where it cannot be formed."""
        launched = dist.is_initialized() or ("RANK" in os.environ and "MASTER_ADDR" in os.environ)
        if not launched:
            if config.fsdp != "no":
                raise ConfigError(
                    "fsdp shares a model between processes, and there is one: "
                    "start it with torchrun --nproc-per-node N -m fastpo train ..."
                )
            return cls(_device(config.device, config))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if config.device not in (None, "cpu", "cuda"):
            raise ConfigError(f"device={config.device!r} with several processes: each takes the GPU of its LOCAL_RANK")
        gpus = torch.cuda.is_available() and not config.use_cpu and config.device != "cpu"
        device = _device(f"cuda:{local_rank}" if gpus else "cpu", config)
        if not dist.is_initialized():
            _init_process_group(config, device)
        elif config.fsdp_cpu_offload and "cpu" not in dist.get_backend_config():
            raise ConfigError(
                "fsdp_cpu_offload needs gloo beside nccl, and the process group that exists (TrainingArguments starts "
                "it) has none: call torch.distributed.init_process_group('cpu:gloo,cuda:nccl') before it is made"
            )
        return cls(device, dist.get_rank(), dist.get_world_size(), local_rank)

    @property
    def main(self) -> bool:
        """Whether this is the rank that logs and writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group, or None for one process."""
        return dist.group.WORLD if self.several else None

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place."""
        if self.several:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest of the ranks' numbers, element by element, in place."""
        if self.several:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` (picklable), in the order of ranks, on every rank."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank; what it raises there is raised on every rank."""
        if not self.several:
            return work()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            outcome[1].relayed = not self.main  # the command line says it once
            raise outcome[1]
        return outcome[0]

    def all_do(self, work: Callable[[], T]) -> T:
        """`work` on every rank; if it fails on any, every rank raises, the others with the first one's error."""
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        errors = [e for e in self.gather(error) if e is not None]
        if errors:
            raise error or errors[0]
        return result

    def barrier(self) -> None:
        if self.several:
            dist.barrier()

    def agree_(self, model: nn.Module) -> None:
        """Give every rank rank 0's weights and buffers: replicas must start alike."""
        if self.several:
            for tensor in [*model.parameters(), *model.buffers()]:
                # A quantised weight is loaded from the same checkpoint on every rank, and never trained.
                if tensor.is_floating_point():
                    dist.broadcast(tensor.detach(), src=0)


def _device(name: str | None, config: TrainConfig) -> torch.device:
    device = resolve_device(name, use_cpu=config.use_cpu)
    if device.type not in DEVICES:
        raise DeviceError(f"device {name!r} is not supported; use cuda or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether a run computes under bf16 autocast: by its option, or where the GPU has it."""
    if config.bf16 is not None:
        return config.bf16
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def _init_process_group(config: TrainConfig, device: torch.device) -> None:
    # gloo beside NCCL: objects and host tensors (offloaded gradients, checkpoints) travel without the GPU.
    backend = config.ddp_backend
    if backend in (None, "nccl"):
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=config.ddp_timeout)
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    except Exception as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        what = " ".join(str(error).split())[:300]
        raise DeviceError(
            f"the {os.environ.get('WORLD_SIZE')} processes cannot meet at {where} ({what}): is the port taken? "
            "Choose another (torchrun --master-port), or let torchrun choose (--standalone)"
        ) from error
    # Not at the end of training: a sharded model that is handed back needs the group to be gathered. And not after a
    # failure, where the others are in a collective that this rank will never join, and NCCL would wait for it.
    atexit.register(lambda: dist.is_initialized() and not World.failed and dist.destroy_process_group())


class Root(nn.Module):
    """What FSDP2 takes as the root: it runs any function on the model with the root's own parameters gathered.

    Embeddings, final norm and head belong to the root, so that a micro-batch gathers the head once, for the packed
    trunk and the head op alike; layers gather themselves.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


class Engine:
    """Runs a policy on this rank: as it is, or sharded. `Engine(policy)` for one process and for replicas."""

    def __init__(self, policy: Policy, root: Root | None = None, reduce_always: bool = False):
        self.policy, self.root, self.reduce_always = policy, root, reduce_always

    @property
    def sharded(self) -> bool:
        return self.root is not None

    def __call__(self, work: Callable[[], T]) -> T:
        """`work()`, with the parameters that it needs gathered. Every rank must call it as often as the others."""
        if self.root is None:
            return work()
        out = self.root(work)
        if not (isinstance(out, Tensor) and out.requires_grad):
            # Without a backward pass nothing else lets go of the gathered parameters, and they would outlive a step.
            for module in self.root.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return out

    @property
    def _fsdp(self) -> FSDPModule:
        assert isinstance(self.root, FSDPModule)
        return self.root

    def sync_gradients(self, now: bool) -> None:
        """Whether the next backward pass reduces gradients over the ranks: in the last micro-batch of a step.

        Until then they are whole on every rank, in fp32; `fsdp_gradients=micro_batch` saves that memory.
        """
        if self.root is not None:
            self._fsdp.set_requires_gradient_sync(now or self.reduce_always)


def shard(policy: Policy, config: TrainConfig, world: World, autocast_dtype: torch.dtype | None) -> Engine:
    """Split the policy's parameters over the ranks by FSDP2, in place, layer by layer.

    Trainable 16-bit weights become fp32 shards that the optimiser steps, and are gathered in 16 bits: what fp32 master
    copies are in one process. Gradients are reduced in fp32, as sums.
    """
    model = policy.model
    if getattr(policy.causal_lm, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            "fsdp does not split quantised weights: load the model in 16 bits, or leave fsdp out"
        )
    narrow = {p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    if len(narrow) > 1 and autocast_dtype is None:
        raise UnsupportedModelError(
            "fsdp: the model mixes bfloat16 and float16; load it in one of them (dtype=bfloat16)"
        )
    compute = autocast_dtype or next(iter(narrow), None)
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None)
    offload: OffloadPolicy = OffloadPolicy()
    if config.fsdp_cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
        if world.device.type == "cuda":  # torchrun leaves each process one thread, and the optimiser runs on the host
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    mesh = init_device_mesh(world.device.type, (world.size,))
    root = Root(model)

    def split(module: nn.Module, reshard: bool) -> None:
        for p in module.parameters():  # not kept in a list: whoever holds a parameter keeps it whole on the device
            if p.requires_grad and not isinstance(p, DTensor):
                p.data = p.data.float()
        fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=reshard)

    layers = _layers(policy)
    # Lists inside layers are experts: one that gets no token on a rank has no gradient there.
    experts = any(isinstance(m, nn.ModuleList) for layer in layers for m in layer.modules())
    for layer in layers:
        split(layer, config.fsdp == "full_shard")
    split(root, False)  # kept from forward to backward: gathered once a micro-batch
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # each term is normalised over the whole step already
            module.set_force_sum_reduction_for_comms(True)
            if experts and hasattr(module, "set_reduce_scatter_unused_params"):  # PyTorch 2.13
                module.set_reduce_scatter_unused_params(True)
    return Engine(policy, root, reduce_always=experts or config.fsdp_gradients == "micro_batch")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name; ConfigError where there is none."""
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ConfigError("no parameter of the model requires a gradient (an adapter is loaded with is_trainable=True)")
    return found


def hold(
    policy: Policy, config: TrainConfig, world: World, autocast_dtype: torch.dtype | None
) -> tuple[Engine, dict[str, nn.Parameter], dict[str, torch.dtype]]:
    """The model as this run's processes hold it, alike or sharded: (engine, trainable parameters with those beside the
    model, the dtypes of the model's as they were). Keep no parameter of a model that is to be sharded: it would stay
    whole on the device."""
    dtypes = {n: p.dtype for n, p in policy.model.named_parameters()}
    if config.fsdp != "no":
        engine = shard(policy, config, world, autocast_dtype)
    else:
        engine = Engine(policy)
        world.agree_(policy.model)
    if world.several and not config.disable_dropout:
        torch.manual_seed(config.seed + world.rank)  # every rank draws its own masks
    return engine, trainable(policy.model) | policy.beside(), dtypes


def _layers(policy: Policy) -> nn.ModuleList:
    """The trunk's list of layers: the largest ModuleList in it."""
    lists = [m for m in policy.trunk.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise UnsupportedModelError(f"{type(policy.causal_lm).__name__} has no list of layers for fsdp to split")
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state(
    model: nn.Module, world: World, dtypes: Mapping[str, torch.dtype], names: set[str] | None = None
) -> dict[str, Tensor]:
    """Whole parameters and persistent buffers on the host, on rank 0; empty elsewhere. Every rank must call it.

    `dtypes`: by name, what to write; others as they are. `names`: only these.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if names is not None and name not in names:
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.main:
            out[name] = whole.detach().to(dtypes.get(name, whole.dtype)).cpu()
    return out
