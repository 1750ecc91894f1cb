"""The reference as data: token log-probabilities computed once, kept on disk, shared by all runs that can use them.

The key of an entry is what it depends on: the token ids of prompt and response, a fingerprint of the model (weights,
configuration, compute dtype, device type), and a digest of what else it computes with (reference/function_state.py).
Another beta, learning rate, loss or normalisation finds the same entry; another tokenizer, `max_length`, dtype or
weight does not. A key cannot hold everything that decides a number, so of every earlier pass whose entries are found a
few rows are computed again and compared: a pass that disagrees with the live model is dropped, files and all. An entry
carries a checksum; one that is damaged, not finite or of another length than its response is computed again too.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from fastpo.data import Example
from fastpo.data.packing import PackedBatch, collate, pass_batches
from fastpo.models import adapters
from fastpo.training.distributed import World, local

log = logging.getLogger("fastpo")

# Entries are written in shards, so that a pass that is cut short loses at most this many seconds of work.
SHARD_SECONDS = 60.0
# A change here, or in how log-probabilities are computed, makes every older entry invalid.
CACHE_VERSION = 4
ROUND = 8  # micro-batches that a rank computes between two exchanges
# How far a pass may be off on average, in units of what one rounding of the embeddings does. Packing alone moved
# log-probabilities by 0.07 to 0.7 of that (models/verify.py); other machines' matrix multiplies add their order of
# sums.
NOISE = 6.0

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
        digest.update(described_config(config).encode())
    if not without_adapter and hasattr(model, "peft_config"):
        peft: Any = model
        settings = {name: c.to_dict() for name, c in peft.peft_config.items()}
        digest.update(json.dumps([settings, peft.active_adapters], sort_keys=True, default=str).encode())
    tensors = adapters.base_tensors(model) if without_adapter else adapters.all_tensors(model)
    digest.update(_tensors_digest(tensors))
    return digest.hexdigest()


def described_config(config: Any) -> str:
    """A model's configuration without what decides no number, as JSON."""
    described = {k: v for k, v in config.to_dict().items() if k not in _CONFIG_WITHOUT_EFFECT}
    return json.dumps(described, sort_keys=True, default=str)


def _tensors_digest(tensors: Mapping[str, torch.Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=4) as pool:
        for name, part in zip(names, pool.map(lambda n: tensor_digest(tensors[n]), names), strict=True):
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


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """16 bytes that stand for a tensor's dtype, shape and values, and the scales of a quantised one."""
    data = tensor.detach().cpu().contiguous()
    # A quantised weight is nothing without its scales, which are attributes and not buffers.
    state = getattr(tensor, "quant_state", None)
    scales = state.as_dict() if state is not None else {"SCB": getattr(tensor, "SCB", None)}
    parts = [tensor_digest(v) if isinstance(v, torch.Tensor) else repr(v).encode() for _, v in sorted(scales.items())]
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
    """Token log-probabilities of one model, by response. `folder=None` keeps them in memory only.

    A file of the folder is what one pass wrote, of one model as it was then; `found` are entries of such passes, to be
    believed only when the live model agrees with the pass.
    """

    def __init__(self, key: str, folder: Path | None):
        self.folder = folder / "ref_logps" / key if folder is not None else None
        self.entries: dict[bytes, np.ndarray] = {}  # this run's own, and those of passes that were compared
        self.found: dict[bytes, tuple[str, np.ndarray]] = {}  # of passes that were not: the pass, its number
        self.shards: dict[str, list[Path]] = {}  # by pass
        self.agreed: set[str] = set()  # passes that the live model agrees with
        self.fresh: dict[bytes, np.ndarray] = {}
        self.odd_length = False  # whether an entry was found that is not as long as its response
        self.own_pass = uuid.uuid4().hex
        damage: list[str] = []
        for shard in self._files():
            try:
                entries, of_pass, problem = read_entries(shard)
            except OSError as error:
                damage.append(f"{shard.name}: {error}")
                continue
            if problem:
                damage.append(f"{shard.name}: {problem}")
                self._mend(shard, entries, of_pass)
            self.found |= {key: (of_pass, logp) for key, logp in entries.items()}
            self.shards.setdefault(of_pass, []).append(shard)
        if damage:
            log.warning(
                "reference cache: %d file%s in %s damaged (%s); what they lack is computed again",
                len(damage), "s" if len(damage) > 1 else "", self.folder, damage[0],
            )  # fmt: skip

    def _files(self) -> list[Path]:
        try:
            return [f for f in sorted(self.folder.glob("*.safetensors")) if f.is_file()] if self.folder else []
        except OSError:  # a folder that may not be read
            return []

    def _mend(self, shard: Path, entries: Mapping[bytes, np.ndarray], of_pass: str) -> None:
        """Leave in a file what is good of it, so that its damage is spoken of once."""
        with contextlib.suppress(OSError, SafetensorError):
            if entries:
                self._write(entries, shard, of_pass)
            else:
                shard.unlink()

    def read(self, file: Path) -> None:
        """Take in a run's own log-probabilities, as they lie in its checkpoints; they need no comparison."""
        try:
            entries, _, problem = read_entries(file, needs_sums=False)  # a checkpoint's manifest has hashes
        except OSError as error:
            entries, problem = {}, str(error)
        if problem:
            log.warning("%s is damaged (%s); what it lacks is computed again", file, problem)
        self.entries |= entries

    def get(self, key: bytes, length: int) -> tuple[str | None, np.ndarray] | None:
        """(the pass that it is from, or None for one that needs no comparison; log-probabilities [length])."""
        if (logp := self.entries.get(key)) is not None and len(logp) == length:
            return None, logp
        of_pass, logp = self.found.get(key, ("", None))
        if logp is None:
            return None
        if len(logp) != length:
            if not self.odd_length:
                log.warning(
                    "reference cache: entries under %s are not as long as their responses; they are computed again",
                    self.folder,
                )
            self.odd_length = True
            return None
        return None if of_pass in self.agreed else of_pass, logp

    def put(self, key: bytes, logp: np.ndarray) -> None:
        self.entries[key] = logp
        if np.isfinite(logp).all():
            self.fresh[key] = logp

    def drop(self, passes: Iterable[str]) -> None:
        """Forget what these passes computed, and remove it, so that nobody finds it again."""
        gone = set(passes)
        self.found = {key: entry for key, entry in self.found.items() if entry[0] not in gone}
        for shard in [shard for of_pass in gone for shard in self.shards.pop(of_pass, [])]:
            with contextlib.suppress(OSError):
                shard.unlink(missing_ok=True)

    def flush(self) -> None:
        """Write the new entries as one file. A folder that cannot be written costs the keeping, not the run."""
        if self.folder is None or not self.fresh:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shard = self.folder / f"{time.time_ns():020d}-{os.getpid()}.safetensors"
            self._write(self.fresh, shard, self.own_pass)
        except (OSError, SafetensorError) as error:
            log.warning("reference cache: cannot write to %s (%s); kept in memory for this run", self.folder, error)
            self.folder = None
        self.fresh = {}

    def _write(self, entries: Mapping[bytes, np.ndarray], shard: Path, of_pass: str) -> None:
        """Beside and then renamed, so that a file is whole or absent."""
        handle, name = tempfile.mkstemp(dir=shard.parent, suffix=".tmp")
        os.close(handle)
        try:
            write_entries(entries, Path(name), of_pass)
            os.replace(name, shard)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def write_entries(entries: Mapping[bytes, np.ndarray], path: Path, of_pass: str = "") -> None:
    """Log-probabilities [len] by response key, as one safetensors file with a checksum for each."""
    values = [np.ascontiguousarray(v, np.float32) for v in entries.values()]
    sums = b"".join(_checksum(key, logp) for key, logp in zip(entries, values, strict=True))
    tensors: dict[str, np.ndarray] = {
        "keys": np.frombuffer(b"".join(entries), np.uint8).reshape(-1, 16),
        "offsets": np.cumsum([0, *map(len, values)]).astype(np.int64),
        "logp": np.concatenate([np.empty(0, np.float32), *values]),
        "sums": np.frombuffer(sums, np.uint8).reshape(-1, 8),
    }
    save_file(tensors, path, metadata={"pass": of_pass})


def read_entries(path: Path, needs_sums: bool = True) -> tuple[dict[bytes, np.ndarray], str, str]:
    """(the good entries of a file that `write_entries` wrote, the pass that wrote it, what is wrong with others or "").

    OSError where the file cannot be read, which says nothing of what is in it. `needs_sums=False`: the checksums may be
    missing, as they are in files of older versions.
    """
    with open(path, "rb"):  # safetensors gives a missing file and a damaged one the same error
        pass
    try:
        with safe_open(path, framework="numpy") as f:
            keys, offsets, logp = (f.get_tensor(name) for name in ("keys", "offsets", "logp"))
            has_sums = needs_sums or "sums" in f.keys()  # noqa: SIM118 -- no mapping
            sums = f.get_tensor("sums") if has_sums else np.zeros((len(keys), 8), np.uint8)
            of_pass = (f.metadata() or {}).get("pass", "")
    except Exception as error:  # whatever it makes of damaged bytes
        return {}, "", str(error) or type(error).__name__
    n = len(keys)
    shapes = (keys.shape, offsets.shape, sums.shape, logp.ndim) == ((n, 16), (n + 1,), (n, 8), 1)
    dtypes = [t.dtype for t in (keys, offsets, logp, sums)] == [np.uint8, np.int64, np.float32, np.uint8]
    if not (shapes and dtypes and offsets[0] == 0 and offsets[-1] == len(logp) and (np.diff(offsets) >= 0).all()):
        return {}, of_pass, "its tensors do not fit together"
    entries, bad = {}, 0
    for key, checksum, a, b in zip(keys, sums, offsets.tolist(), offsets[1:].tolist(), strict=False):
        values = logp[a:b]
        written = not has_sums or _checksum(key.tobytes(), values) == checksum.tobytes()
        if written and np.isfinite(values).all():
            entries[key.tobytes()] = values
        else:
            bad += 1
    return entries, of_pass, f"{bad} of {n} entries are not what was written" if bad else ""


def _checksum(key: bytes, logp: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(logp).data, digest_size=8, key=key).digest()


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
    nudged: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> TokenLogps:
    """Token log-probabilities of every response of `examples[i]` for i in `needed`; other rows stay empty lists.

    `compute_logp(batch) -> [N]` runs the reference without gradients; only what rank 0's `cache` lacks is computed,
    shared between the ranks, and kept by rank 0. `passes` calls the work on each micro-batch: memory.Budget's splits.
    Inside `nudged()` the model computes with its embeddings moved by one rounding, which says how far packing may move
    a log-probability: a pass of the cache that is further off than that on the rows compared is computed anew.
    """
    world = world or World(torch.device("cpu"))
    needed = list(needed)
    out: TokenLogps = [[] for _ in examples]

    def work(rows: list[int]) -> dict[int, list[np.ndarray]]:
        return _of_batch(examples, rows, compute_logp, token_bucket)

    def check(rows: list[int]) -> dict[int, list[np.ndarray]]:
        return _compute(examples, rows, compute_logp, token_bucket)

    rows = world.first(lambda: _rows_to_compare(examples, needed, cache))
    if rows:  # every rank computes all of them: sharded ranks run together, and they are a few
        parts = pass_batches(examples, rows, max_tokens)
        live = {i: logps for part in passes(parts, examples, check) for i, logps in part.items()}
        with nudged():
            moved = {i: logps for part in passes(parts, examples, check) for i, logps in part.items()}
        world.first(lambda: _compare(examples, cache, live, moved))
    for i, entries in world.first(lambda: {j: e for j in needed if (e := _cached(examples[j], cache))}).items():
        out[i] = [logp for _, logp in entries]
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
        computed = {i: logps for part in passes(mine, examples, work) for i, logps in part.items()}
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


def _cached(example: Example, cache: RefCache) -> list[tuple[str | None, np.ndarray]] | None:
    """Of every response, the pass it is from and its log-probabilities; None where one is missing."""
    entries = []
    for k, response in enumerate(example.responses):
        entry = cache.get(response_key(example.prompt_of(k), response), len(response))
        if entry is None:
            return None
        entries.append(entry)
    return entries


def _rows_to_compare(examples: Sequence[Example], needed: Sequence[int], cache: RefCache) -> list[int]:
    """A few rows of every earlier pass that is found and was not compared yet: its shortest, middle and longest."""
    of_pass: dict[str, list[int]] = {}
    for i in needed:
        for name in {name for name, _ in _cached(examples[i], cache) or () if name is not None}:
            of_pass.setdefault(name, []).append(i)
    rows: set[int] = set()
    for found in of_pass.values():
        found.sort(key=lambda i: (len(examples[i].prompt_ids) + sum(map(len, examples[i].responses)), i))
        rows |= {found[0], found[len(found) // 2], found[-1]}
    return sorted(rows)


def _compare(
    examples: Sequence[Example],
    cache: RefCache,
    live: Mapping[int, list[np.ndarray]],
    moved: Mapping[int, list[np.ndarray]],
) -> None:
    """Accept the passes that the live model agrees with on the rows computed, and drop the others from the cache."""
    gaps: dict[str, list[np.ndarray]] = {}
    for i in live:
        for (name, logp), now, nudge in zip(_cached(examples[i], cache) or (), live[i], moved[i], strict=False):
            if name is not None:
                gaps.setdefault(name, []).append(np.stack([np.abs(logp - now), np.abs(nudge - now), np.abs(now)]))
    wrong, worst = [], (0.0, 0.0)
    for name, parts in gaps.items():
        gap, noise, size = np.concatenate(parts, 1).mean(1, dtype=np.float64)
        allowed = NOISE * noise + 1e-6 * max(1.0, size)
        if gap <= allowed:  # not so for NaN
            cache.agreed.add(name)
        else:
            wrong.append(name)
            worst = max(worst, (float(gap), float(allowed)))
    if wrong:
        log.warning(
            "reference cache: entries under %s were computed by another function of the same weights (token "
            "log-probabilities differ by %.2g on average, allowed %.2g): dropped, and computed anew",
            cache.folder, *worst,
        )  # fmt: skip
        cache.drop(wrong)


def _of_batch(
    examples: Sequence[Example],
    rows: Sequence[int],
    compute_logp: Callable[[PackedBatch], torch.Tensor],
    token_bucket: int | None,
) -> dict[int, list[np.ndarray]]:
    """A micro-batch of rows that no cache has: apart from those that are compared, so that tests can count them."""
    return _compute(examples, rows, compute_logp, token_bucket)


def _compute(
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

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        alpha: float,
        every: int,
        whole: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ):
        """parameters: the policy's trainable ones. whole: entered while weights are exchanged, when nothing may be
        saved."""
        self.parameters, self.alpha, self.every, self.whole = dict(parameters), alpha, every, whole
        self.values = {name: local(p).detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def move_(self) -> None:
        """One soft update towards the policy as it is now."""
        for name, p in self.parameters.items():
            self.values[name].lerp_(local(p), self.alpha)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the policy's parameters hold the reference's weights."""
        with self.whole():
            self._swap()
        try:
            yield
        finally:
            with self.whole():
                self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.parameters.items():
            policy = local(p).clone()
            local(p).copy_(self.values[name])
            self.values[name].copy_(policy)
