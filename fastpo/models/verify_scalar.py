"""The guard of reward models: packed rewards against those of the model's own forward, as models/verify.py does it with
log-probabilities."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpo.data import Example
from fastpo.data.packing import PackedBatch, collate
from fastpo.errors import UnsupportedModelError
from fastpo.models import attention, rotary
from fastpo.models.modes import eval_mode
from fastpo.models.policy import Policy, unwrap_head
from fastpo.models.scalar_head import RewardModel
from fastpo.models.verify import (
    check_attention_pattern,
    check_batch,
    guard_rows,
    rounded,
    soft_caps_honoured,
    working_eps,
)

_MOST_ROWS = 4
_RESPONSES = 4  # of a row: each is a forward pass of its own, and no more chains than these are another kind of tree


@dataclass(frozen=True, slots=True)
class _Own:
    """What the model's own forward says of the responses, each alone."""

    rewards: Tensor  # [S] fp64
    parts: Tensor  # [S, D] fp64: what each is the sum of, hidden * W
    first: tuple[int, ...]  # of each row the place of its first response


def verify_rewards(policy: Policy, examples: Sequence[Example], tolerance: float | None = None) -> None:
    """Hold the packed rewards of a few rows against the model's own; raise UnsupportedModelError.

    Every response's reward from one packed batch must equal that of its row run alone, unpadded, by the model's own
    forward, pooling and attention, in the dtype that it runs in (`tolerance` overrides the error allowed). Call it
    under the autocast that training uses. Leaves the model's mode, attention and random state as they were.
    """
    assert isinstance(policy, RewardModel)
    if len(examples) > _MOST_ROWS:
        examples = guard_rows(policy, examples, examples)
    examples = [_few(example) for example in examples]
    policy.place(examples)
    device = policy.causal_lm.get_input_embeddings().weight.device
    name = type(policy.causal_lm).__name__
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), eval_mode(policy.model):
        with policy.detached(), soft_caps_honoured(policy.causal_lm):
            own = _own(policy, examples, device)
            if not own.rewards.isfinite().all():
                raise UnsupportedModelError(
                    f"{name}: the model's own rewards are not finite (NaN or infinite) on rows that it is tried on"
                )
        try:
            with policy.attach():
                if not policy.unpacked:
                    check_attention_pattern(policy, device)
                batch = collate(examples, range(len(examples)))
                check_batch(policy, batch, examples)
                _check_places(policy, batch, examples)
                packed = policy.read(batch.to(device)).double()
        except TypeError as error:  # a trunk whose forward does not know the keywords
            if "unexpected keyword" not in str(error) or "attn" in str(error):
                raise
            raise UnsupportedModelError(f"{name} cannot run packed: {error}; {attention.UNPACKED}") from error
        error_of = torch.nan_to_num((packed - own.rewards).abs(), nan=torch.inf)
        worst = int(error_of.argmax())
        allowed = _spacing(policy, own, device) if tolerance is None else tolerance
        if tolerance is None and (float(error_of[worst]) > allowed or policy.is_sharded):
            with policy.detached(), soft_caps_honoured(policy.causal_lm):
                allowed += _carried(policy, examples, own, device)
        if float(error_of[worst]) > allowed:
            raise UnsupportedModelError(
                f"{name}: fastpo's rewards differ from the model's own by up to {float(error_of[worst]):.2g}, where "
                f"rounding explains {allowed:.2g} (worst {float(packed[worst]):.6g} instead of "
                f"{float(own.rewards[worst]):.6g}): its head or its layers have a rule that fastpo does not know; "
                f"{attention.UNPACKED}"
            )


def _own(policy: RewardModel, examples: Sequence[Example], device: torch.device, once: bool = False) -> _Own:
    """By the model's own forward, row after row; `once`: of each row's first response alone."""
    head = unwrap_head(policy.causal_lm, policy._head_module())
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    rewards: list[Tensor] = []
    parts: list[Tensor] = []
    first: list[int] = []
    try:
        for example in examples:
            first.append(len(rewards))
            for k, response in enumerate(example.responses[: 1 if once else None]):
                assert example.scored_at is not None
                row = torch.as_tensor(
                    np.concatenate([example.prompt_of(k), response]), dtype=torch.int64, device=device
                )
                rotary.fresh(policy.model)
                seen.clear()
                logits: Any = policy.model(input_ids=row[None], use_cache=False).logits
                rewards.append(logits.reshape(-1)[0].double())
                hidden = seen[-1].reshape(row.numel(), -1)[example.scored_at[k]]
                parts.append(hidden.double() * head.weight[0].double())
    finally:
        handle.remove()
    return _Own(torch.stack(rewards), torch.stack(parts), tuple(first))


def _few(example: Example) -> Example:
    """The row with its first responses."""
    if len(example.responses) <= _RESPONSES:
        return example
    prompts = None if example.response_prompts is None else example.response_prompts[:_RESPONSES]
    return Example(
        prompt_ids=example.prompt_ids, responses=example.responses[:_RESPONSES], response_prompts=prompts,
        share=example.share,
    )  # fmt: skip


def _spacing(policy: RewardModel, own: _Own, device: torch.device) -> float:
    """What rounding the parts of a reward and itself explains; more needs a measure."""
    eps = working_eps(policy, device) + torch.finfo(torch.float32).eps
    return float((2 * eps * (own.rewards.abs() + own.parts.square().sum(-1).sqrt())).max())


def _carried(policy: RewardModel, examples: Sequence[Example], own: _Own, device: torch.device) -> float:
    """How far roundings inside the trunk may move a reward: four times what the embeddings' and every layer's output,
    moved by half a spacing, move it by. The policy must be detached.

    A sum of D products may stand still by chance while its parts move: the square root of their squares' sum does not.
    """
    with rounded(policy, working_eps(policy, device) / 2):
        moved = _own(policy, examples, device, once=True)
    at = torch.tensor(own.first, device=own.rewards.device)
    of_sums = (moved.rewards - own.rewards[at]).abs()
    of_parts = (moved.parts - own.parts[at]).square().sum(-1).sqrt()
    return 4 * float(torch.maximum(of_sums, of_parts).max())


def _check_places(policy: RewardModel, batch: PackedBatch, examples: Sequence[Example]) -> None:
    """Every response must be scored at its own last token in the batch: exact, in any precision."""
    with contextlib.suppress(IndexError):
        if all(_places(batch, examples)):
            return
    raise UnsupportedModelError(
        f"{type(policy.causal_lm).__name__}: a response of the packed batch is scored at another token than its last; "
        "please report this"
    )


def _places(batch: PackedBatch, examples: Sequence[Example]) -> Iterator[bool]:
    assert batch.scored_rows is not None
    places = iter(batch.scored_rows.tolist())
    for example in examples:
        assert example.scored_at is not None
        for k, at in enumerate(example.scored_at):
            ids, place = np.concatenate([example.prompt_of(k), example.responses[k]]), next(places)
            yield int(batch.input_ids[place]) == int(ids[at]) and int(batch.position_ids[place]) == at
