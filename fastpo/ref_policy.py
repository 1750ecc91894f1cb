"""The reference as data: token log-probabilities computed once, kept on disk, shared by all runs that can use them.

The key of an entry is what it depends on: the token ids of prompt and response, and a fingerprint of the model
(weights, configuration, compute dtype, device type). Another beta, learning rate, loss or normalisation finds the same
entry; another tokenizer, `max_length`, dtype or weight does not.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

from fastpo import adapters
from fastpo.data import Example
from fastpo.distributed import World, local
from fastpo.packing import PackedBatch, collate, pass_batches

log = logging.getLogger("fastpo")

# Entries are written in shards, so that a pass that is cut short loses at most this many seconds of work.
SHARD_SECONDS = 60.0
# A change here, or in how log-probabilities are computed, makes every older entry invalid.
CACHE_VERSION = 3

TokenLogps = list[list[np.ndarray]]  # per example, per response, fp32 [len]


def cache_folder() -> Path:
    """`$FASTPO_CACHE`, by default beside Hugging Face's cache."""
    if folder := os.environ.get("FASTPO_CACHE"):
        return Path(folder)
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME).parent / "fastpo"


def cache_key(fingerprint: str, compute: str) -> str:
    """Name of a cache: the model's fingerprint, and what else its numbers depend on (autocast dtype, device type)."""
    return hashlib.blake2b(f"{CACHE_VERSION}|{compute}|{fingerprint}".encode(), digest_size=16).hexdigest()


def model_fingerprint(model: nn.Module, *, without_adapter: bool = False) -> str:
    """Hex digest of all weights, buffers and the configuration; `without_adapter` leaves a switched-off one out."""
    digest = hashlib.blake2b(digest_size=16)
    config = getattr(model, "config", None)
    if config is not None:
        described = {k: v for k, v in config.to_dict().items() if k not in _CONFIG_WITHOUT_EFFECT}
        digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    if not without_adapter and hasattr(model, "peft_config"):
        peft: Any = model
        settings = {name: c.to_dict() for name, c in peft.peft_config.items()}
        digest.update(json.dumps([settings, peft.active_adapters], sort_keys=True, default=str).encode())
    tensors = adapters.base_tensors(model) if without_adapter else adapters.all_tensors(model)
    digest.update(_tensors_digest(tensors))
    return digest.hexdigest()


def _tensors_digest(tensors: Mapping[str, torch.Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=4) as pool:
        for name, part in zip(names, pool.map(lambda n: _tensor_digest(tensors[n]), names), strict=True):
            digest.update(name.encode() + part)
    return digest.digest()


def frozen_fingerprint(model: nn.Module) -> str:
    """Hex digest of the weights that are not trained, which no checkpoint holds; empty where all are."""
    frozen = {
        n: t for n, t in adapters.all_tensors(model).items() if isinstance(t, nn.Parameter) and not t.requires_grad
    }
    return _tensors_digest(frozen).hex() if frozen else ""


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """What the adapters of a model are, beside their weights; JSON types."""
    settings = {}
    for name, config in getattr(model, "peft_config", {}).items():
        for key, value in config.to_dict().items():
            if key not in ("base_model_name_or_path", "inference_mode", "revision"):
                value = sorted(value) if isinstance(value, set) else value
                settings[f"{name}.{key}"] = json.loads(json.dumps(value, default=str))
    return settings


_CONFIG_WITHOUT_EFFECT = {"_name_or_path", "use_cache", "transformers_version", "architectures", "output_attentions",
                          "output_hidden_states", "return_dict", "_attn_implementation", "dtype", "torch_dtype",
                          "bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params"}  # fmt: skip


def _tensor_digest(tensor: torch.Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous()
    # A quantised weight is nothing without its scales, which are attributes and not buffers.
    state = getattr(tensor, "quant_state", None)
    scales = state.as_dict() if state is not None else {"SCB": getattr(tensor, "SCB", None)}
    parts = [_tensor_digest(v) if isinstance(v, torch.Tensor) else repr(v).encode() for _, v in sorted(scales.items())]
    header = hashlib.blake2b(
        f"{data.dtype}{tuple(data.shape)}".encode() + b"".join(parts), digest_size=32
    ).digest()  # fmt: skip
    raw = data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b""
    return hashlib.blake2b(raw, digest_size=16, person=b"fastpo", key=header).digest()


def response_key(prompt_ids: np.ndarray, response_ids: np.ndarray) -> bytes:
    """16 bytes that stand for one response to one prompt."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(len(prompt_ids).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(prompt_ids, np.int32).tobytes())
    digest.update(np.ascontiguousarray(response_ids, np.int32).tobytes())
    return digest.digest()


class RefCache:
    """Token log-probabilities of one model, by response. `folder=None` keeps them in memory only."""

    def __init__(self, key: str, folder: Path | None):
        self.folder = folder / "ref_logps" / key if folder is not None else None
        self.entries: dict[bytes, np.ndarray] = {}
        self.fresh: dict[bytes, np.ndarray] = {}
        if self.folder is not None and self.folder.is_dir():
            for shard in sorted(self.folder.glob("*.safetensors")):
                self.read(shard)

    def read(self, shard: Path) -> None:
        """Take in the entries of a file that `flush` or `write_entries` wrote."""
        try:
            with safe_open(shard, framework="numpy") as f:
                keys, offsets, logp = f.get_tensor("keys"), f.get_tensor("offsets"), f.get_tensor("logp")
        except Exception as error:  # a damaged shard costs its entries, not the run
            log.warning("reference cache: %s cannot be read (%s); its entries are computed again", shard, error)
            return
        for i, key in enumerate(keys):
            self.entries[key.tobytes()] = logp[offsets[i] : offsets[i + 1]]

    def get(self, key: bytes) -> np.ndarray | None:
        return self.entries.get(key)

    def put(self, key: bytes, logp: np.ndarray) -> None:
        self.entries[key] = self.fresh[key] = logp

    def flush(self) -> None:
        """Write the new entries as one shard, beside and then renamed, so that a shard is whole or absent."""
        if self.folder is None or not self.fresh:
            return
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            os.close(handle)
            write_entries(self.fresh, Path(temporary))
            os.replace(temporary, self.folder / f"{time.time_ns():020d}-{os.getpid()}.safetensors")
        except Exception as error:  # safetensors has an error of its own for a full disk
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            log.warning("reference cache: cannot write to %s (%s); kept in memory for this run", self.folder, error)
        self.fresh = {}


def write_entries(entries: Mapping[bytes, np.ndarray], path: Path) -> None:
    """Log-probabilities [len] by response key, as one safetensors file."""
    lengths = [len(v) for v in entries.values()]
    tensors: dict[str, np.ndarray] = {
        "keys": np.frombuffer(b"".join(entries), np.uint8).reshape(-1, 16),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "logp": np.concatenate(list(entries.values())).astype(np.float32),
    }
    save_file(tensors, path)


def reference_logps(
    examples: Sequence[Example],
    needed: Iterable[int],
    cache: RefCache,
    compute_logp: Callable[[PackedBatch], torch.Tensor],
    *,
    max_tokens: int,
    token_bucket: int | None = None,
    world: World | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    passes: Callable[..., Iterator[Any]] = lambda parts, examples, work: map(work, parts),
) -> TokenLogps:
    """Token log-probabilities of every response of `examples[i]` for i in `needed`; other rows stay empty lists.

    `compute_logp(batch) -> [N]` runs the reference without gradients; only what rank 0's `cache` lacks is computed,
    shared between the ranks, and kept by rank 0. `passes` calls the work on each micro-batch: memory.Budget's splits.
    """
    world = world or World(torch.device("cpu"))
    needed = list(needed)
    out: TokenLogps = [[] for _ in examples]

    def look_up() -> dict[int, list[np.ndarray]]:
        found = {}
        for i in needed:
            keys = [response_key(examples[i].prompt_of(k), r) for k, r in enumerate(examples[i].responses)]
            entries = [cache.get(key) for key in keys]
            if all(entry is not None for entry in entries):
                found[i] = entries
        return found

    for i, entries in world.first(look_up).items():
        out[i] = entries
    missing = [i for i in needed if not out[i]]
    batches = pass_batches(examples, missing, max_tokens)
    last_flush = time.monotonic()
    done = 0
    # In rounds of a few micro-batches for each rank: a pass that is cut short has kept all rounds but the last.
    share = ROUND if world.several else 1
    for start in range(0, len(batches), share * world.size):
        round_ = batches[start : start + share * world.size]
        # Every rank runs as many, for the sharded ones run together; one that has no more repeats its first.
        mine = round_[world.rank :: world.size] or round_[:1]
        mine += mine[:1] * (-(-len(round_) // world.size) - len(mine))
        parts = passes(mine, examples, lambda rows: _of_batch(examples, rows, compute_logp, token_bucket))
        computed = {i: logps for part in parts for i, logps in part.items()}
        for part in world.gather(computed):
            for i, logps in part.items():
                out[i] = logps
        for i in [i for rows in round_ for i in rows]:
            for k, logp in enumerate(out[i] if world.main else []):
                cache.put(response_key(examples[i].prompt_of(k), examples[i].responses[k]), logp)
        done += sum(map(len, round_))
        progress(done, len(missing))
        if time.monotonic() - last_flush > SHARD_SECONDS:
            cache.flush()
            last_flush = time.monotonic()
    cache.flush()
    return out


ROUND = 8  # micro-batches that a rank computes between two exchanges


def _of_batch(
    examples: Sequence[Example],
    rows: Sequence[int],
    compute_logp: Callable[[PackedBatch], torch.Tensor],
    token_bucket: int | None,
) -> dict[int, list[np.ndarray]]:
    batch = collate(examples, rows, token_bucket=token_bucket)
    logp = compute_logp(batch).float().cpu().numpy()
    offsets = batch.response_offsets.tolist()
    parts = iter(logp[a:b].copy() for a, b in zip(offsets, offsets[1:], strict=False))
    return {i: [next(parts) for _ in examples[i].responses] for i in batch.examples}


class MovingReference:
    """TR-DPO's soft update (arXiv:2404.09656): every `every` steps, reference <- alpha policy + (1 - alpha) reference.

    Between two moves the reference stands still, so its log-probabilities are data for the steps until the next one:
    they are computed ahead with the reference's weights in the policy's place. It costs one copy of the trainable
    weights and no second model; with an adapter, the copy is the adapter's.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], alpha: float, every: int):
        self.parameters, self.alpha, self.every = dict(parameters), alpha, every
        self.values = {name: local(p).detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def move_(self) -> None:
        """One soft update towards the policy as it is now."""
        for name, p in self.parameters.items():
            self.values[name].lerp_(local(p), self.alpha)

    @contextlib.contextmanager
    def in_place(self, whole: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Inside, the policy's parameters hold the reference's weights. `whole`: entered while they are exchanged."""
        with whole():
            self._swap()
        try:
            yield
        finally:
            with whole():
                self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.parameters.items():
            policy = local(p).clone()
            local(p).copy_(self.values[name])
            self.values[name].copy_(policy)
