"""The reference as data: token log-probabilities computed once, kept on disk, shared by all runs that can use them.

The key of an entry is what it depends on: the token ids of prompt and response, and a fingerprint of the model
(weights, configuration, compute dtype, device type). Another beta, learning rate, loss or normalisation finds the same
entry; another tokenizer, `max_length`, dtype or weight does not.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

from fastpo.data import Example
from fastpo.packing import PackedBatch, collate, pack_all, trunk_tokens

log = logging.getLogger("fastpo")

# Entries are written in shards, so that a pass that is cut short loses at most this many seconds of work.
SHARD_SECONDS = 60.0
# A change here, or in how log-probabilities are computed, makes every older entry invalid.
CACHE_VERSION = 2

TokenLogps = list[list[np.ndarray]]  # per example, per response, fp32 [len]


def cache_folder() -> Path:
    """`$FASTPO_CACHE`, by default beside Hugging Face's cache."""
    if folder := os.environ.get("FASTPO_CACHE"):
        return Path(folder)
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME).parent / "fastpo"


def model_fingerprint(model: nn.Module, *, compute: str, without_adapter: bool = False) -> str:
    """Hex digest of all weights, buffers and the configuration; `without_adapter` leaves a switched-off one out.

    `compute` names what else the numbers depend on: autocast dtype and device type.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{CACHE_VERSION}|{compute}|".encode())
    config = getattr(model, "config", None)
    if config is not None:
        described = {k: v for k, v in config.to_dict().items() if k not in _CONFIG_WITHOUT_EFFECT}
        digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    if not without_adapter and hasattr(model, "peft_config"):
        peft: Any = model
        adapters = {name: c.to_dict() for name, c in peft.peft_config.items()}
        digest.update(json.dumps([adapters, peft.active_adapters], sort_keys=True, default=str).encode())
    tensors = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): t
        for name, t in [*model.named_parameters(), *model.named_buffers()]
        if not (without_adapter and "lora_" in name)
    }
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=4) as pool:
        for name, part in zip(names, pool.map(lambda n: _tensor_digest(tensors[n]), names), strict=True):
            digest.update(name.encode() + part)
    return digest.hexdigest()


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

    def __init__(self, fingerprint: str, folder: Path | None):
        self.folder = folder / "ref_logps" / fingerprint if folder is not None else None
        self.entries: dict[bytes, np.ndarray] = {}
        self.fresh: dict[bytes, np.ndarray] = {}
        if self.folder is not None and self.folder.is_dir():
            for shard in sorted(self.folder.glob("*.safetensors")):
                self._read(shard)

    def _read(self, shard: Path) -> None:
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
        lengths = [len(v) for v in self.fresh.values()]
        tensors: dict[str, np.ndarray] = {
            "keys": np.frombuffer(b"".join(self.fresh), np.uint8).reshape(-1, 16),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "logp": np.concatenate(list(self.fresh.values())).astype(np.float32),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            os.close(handle)
            save_file(tensors, temporary)
            os.replace(temporary, self.folder / f"{time.time_ns():020d}-{os.getpid()}.safetensors")
        except OSError as error:
            log.warning("reference cache: cannot write to %s (%s); kept in memory for this run", self.folder, error)
        self.fresh = {}


def reference_logps(
    examples: Sequence[Example],
    needed: Iterable[int],
    cache: RefCache,
    compute_logp: Callable[[PackedBatch], torch.Tensor],
    *,
    max_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TokenLogps:
    """Token log-probabilities of every response of `examples[i]` for i in `needed`; other rows stay empty lists.

    `compute_logp(batch) -> [N]` runs the reference without gradients; only what the cache lacks is computed.
    """
    out: TokenLogps = [[] for _ in examples]
    missing = []
    for i in needed:
        found = [cache.get(response_key(examples[i].prompt_of(k), r)) for k, r in enumerate(examples[i].responses)]
        if any(f is None for f in found):
            missing.append(i)
        else:
            out[i] = [f for f in found if f is not None]
    tokens = {i: trunk_tokens(examples[i]) for i in missing}
    last_flush = time.monotonic()
    done = 0
    for rows in pack_all(missing, tokens, max_tokens):
        batch = collate(examples, rows)
        logp = compute_logp(batch).float().cpu().numpy()
        offsets = batch.response_offsets.tolist()
        parts = iter(logp[a:b].copy() for a, b in zip(offsets, offsets[1:], strict=False))
        for i in batch.examples:
            out[i] = [next(parts) for _ in examples[i].responses]
            for k, part in enumerate(out[i]):
                cache.put(response_key(examples[i].prompt_of(k), examples[i].responses[k]), part)
        done += len(rows)
        progress(done, len(missing))
        if time.monotonic() - last_flush > SHARD_SECONDS:
            cache.flush()
            last_flush = time.monotonic()
    cache.flush()
    return out
