"""The guard before training: packed log-probabilities against the model's own logits, masks against attention."""

import bisect
import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpo import ops
from fastpo.data import Example
from fastpo.data.packing import PackedBatch, collate
from fastpo.errors import ConfigError, FastpoError, UnsupportedModelError
from fastpo.models import attention, rotary
from fastpo.models.adapters import first_line
from fastpo.models.layout import Layout, prompts_of_chains
from fastpo.models.modes import eval_mode
from fastpo.models.policy import Policy, attention_implementations, restore_attention, switch_attention, weights_eps

_PROBE = "fastpo_probe"  # the attention implementation that records what the model's masks and layers ask for
_SHORT_ROWS = 3  # beside the longest one
_COMPARED = 256  # tokens of a response, its last ones: the head is as costly as the trunk, and they see all before them
_MOST_BYTES = 2 << 30  # that the model's own forward of the longest row may take for scores, or for logits nobody reads


def guard_rows(policy: Policy, first: Sequence[Example], everything: Iterable[Example]) -> list[Example]:
    """What to hold the policy against: the shortest rows of `first`, such as share their prompt before others, and the
    longest row of all, so that whatever a forward takes from the whole batch shows in the short ones."""
    short = sorted(first, key=lambda e: (not e.share, _tokens(e)))[:_SHORT_ROWS]
    room = _room(policy)
    longest = max((e for e in everything if _length(e) <= room), key=_length, default=None)
    if longest is None or max(map(_length, short)) >= _length(longest):
        return short
    return [*short, _one_pair(longest)]


def verify_policy(policy: Policy, examples: Sequence[Example], tolerance: float | None = None) -> None:
    """Hold the packed log-probabilities of a few rows against the model's own logits; raise UnsupportedModelError.

    Every response's token log-probabilities from one packed batch must equal those of its row run alone, unpadded, by
    the model's own forward and attention, in the dtype that it runs in; and so must the sums that each pair of the
    batch puts together. Log-softmax is taken in fp64, for in fp32 its error grows with the vocabulary. The error
    allowed is the dtype's (`tolerance` per token overrides it). Call it under the autocast that training uses. Leaves
    the model's mode, attention and random state as they were; one row's logits are alive at a time.
    """
    if len(examples) > _SHORT_ROWS + 1:
        examples = guard_rows(policy, examples, examples)
    device = policy.causal_lm.get_input_embeddings().weight.device
    cuda = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(cuda), eval_mode(policy.model):
        with policy.detached(), soft_caps_honoured(policy.causal_lm):
            own, spacing = _own_logps(policy, examples, device)
        noise = _Noise.of(spacing) if tolerance is None else _Noise(tolerance, tolerance, few=0.0)
        try:
            with policy.attach():
                if not policy.unpacked:
                    check_attention_pattern(policy, device)
                batch = collate(examples, range(len(examples)))
                check_batch(policy, batch, examples)
                batch = batch.to(device)
                packed = _last_of_each(policy.logp(batch), batch.response_offsets.tolist())
        except TypeError as error:  # a trunk whose forward does not know the keywords
            if "unexpected keyword" not in str(error) or "attn" in str(error):
                raise
            name = type(policy.causal_lm).__name__
            raise UnsupportedModelError(f"{name} cannot run packed: {error}; {attention.UNPACKED}") from error
        difference = _difference(packed, own, noise)
        if tolerance is None and (difference is not None or policy.is_sharded):
            with policy.detached(), soft_caps_honoured(policy.causal_lm):
                noise = _measured(policy, examples, own, spacing, device)
            difference = _difference(packed, own, noise)
        if difference is not None:
            raise UnsupportedModelError(_cause(policy, examples, own, noise, difference, device))
        _compare_pairs(type(policy.causal_lm).__name__, packed, batch, examples, own, noise)


def verify_or_unpack(
    policy: Policy, examples: Sequence[Example], verify: Callable[[Policy, Sequence[Example]], None] = verify_policy
) -> None:
    """`verify`; a model that is wrong or cannot run when packed, and right when every response runs alone, runs so from
    here on (recurrent layers that its config does not name, masks of its own). Else the first error stands.
    """
    try:
        verify(policy, examples)
    except UnsupportedModelError as error:
        _unpack(policy, examples, error, verify)
    except FastpoError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        config = policy.causal_lm.config
        if config.get_text_config(decoder=True) is config and not hasattr(config, "vision_config"):
            raise
        name = type(policy.causal_lm).__name__
        raise UnsupportedModelError(f"{name} cannot run on rows of text alone: {first_line(error)}") from error


def _unpack(
    policy: Policy, examples: Sequence[Example], error: UnsupportedModelError,
    verify: Callable[[Policy, Sequence[Example]], None],
) -> None:  # fmt: skip
    """Go on unpacked where that is right, else raise `error`."""
    if policy.unpacked:
        raise error
    policy.unpacked = True
    try:
        verify(policy, examples)
    except (UnsupportedModelError, ConfigError):  # ConfigError: fsdp, which cannot run unpacked
        policy.unpacked = False
        raise error from None
    policy.unpack(str(error).partition(f"; {attention.UNPACKED}")[0].partition(f" ({attention.UNPACKED})")[0])


@dataclass(frozen=True, slots=True)
class _Noise:
    """How far rounding may move token log-probabilities."""

    any_token: float
    average: float
    few: float  # share of tokens that may go beyond `any_token`

    @classmethod
    def of(cls, spacing: Tensor, moved: float = 0.0, moved_on_average: float = 0.0, few: float = 0.0) -> "_Noise":
        return cls(moved + 2 * float(spacing.max()), moved_on_average + 0.5 * float(spacing.mean()), few)


def _tokens(example: Example) -> int:
    return len(example.prompt_ids) + sum(map(len, example.responses))


def _length(example: Example) -> int:
    """Of the longest sequence."""
    return max(len(example.prompt_of(k)) + len(r) for k, r in enumerate(example.responses))


def _room(policy: Policy) -> float:
    """The longest row that the model's own forward may be asked for: one that forms the square of the scores, or the
    logits of the prompt, takes memory that training does not."""
    text = policy.causal_lm.config.get_text_config(decoder=True)
    room = math.inf
    if policy.causal_lm.config._attn_implementation == "eager":
        room = math.sqrt(_MOST_BYTES / (2 * 4 * getattr(text, "num_attention_heads", 1)))
    if not _keeps_logits(policy.model):
        room = min(room, _MOST_BYTES / (2 * 4 * policy.head().weight.shape[0]))
    return room


def _one_pair(example: Example) -> Example:
    """A row's longest response with one that it is paired with: a row of many is no better a witness."""
    if len(example.responses) <= 2:
        return example
    longest = max(range(len(example.responses)), key=lambda k: len(example.prompt_of(k)) + len(example.responses[k]))
    pair = next((p for p in example.pairs if longest in p), (longest, (longest + 1) % len(example.responses)))
    prompts = None if example.response_prompts is None else [example.response_prompts[k] for k in pair]
    return Example(
        prompt_ids=example.prompt_ids, responses=[example.responses[k] for k in pair], pairs=[(0, 1)],
        response_prompts=prompts, share=example.share,
    )  # fmt: skip


@contextlib.contextmanager
def soft_caps_honoured(causal_lm: PreTrainedModel) -> Iterator[None]:
    """Older transformers (5.11, not 5.23) run Gemma 2 with SDPA, which leaves its soft caps out; eager has them."""
    implementations = attention_implementations(causal_lm)
    text = causal_lm.config.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None) and causal_lm.config._attn_implementation == "sdpa":
        switch_attention(causal_lm, "eager")
    try:
        yield
    finally:
        restore_attention(implementations)


def _own_logps(policy: Policy, examples: Sequence[Example], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Each response's last token log-probabilities [<= 256] fp64 by the model's own forward, and the spacing of all of
    them [tokens].

    Logits are stored with a spacing of eps times their magnitude, of which the part of a token is lost that has all the
    probability: its logit is its own normaliser; and log-probabilities in fp32.
    """
    eps = working_eps(policy, device)
    own, scales = [], []
    for number, example in enumerate(examples):
        for k, response in enumerate(example.responses):
            row = torch.as_tensor([*example.prompt_of(k), *response], dtype=torch.int64, device=device)
            logp, scale = _own_row(policy.model, row, len(response))
            if not logp.isfinite().all():
                raise UnsupportedModelError(_not_finite(policy, number, row.numel()))
            own.append(logp)
            scales.append(scale)
    return own, (eps * (1 - torch.cat(own).exp()) + torch.finfo(torch.float32).eps) * torch.cat(scales)


def _measured(
    policy: Policy, examples: Sequence[Example], own: Sequence[Tensor], spacing: Tensor, device: torch.device
) -> _Noise:
    """The noise of log-probabilities of that spacing [tokens], for a policy detached; what the spacing alone explains
    needs no such measure, which allows no less.

    Roundings inside the trunk are carried on by it: how far is measured, by moving the embeddings and the output of
    every layer by half a spacing, the most that storing them may. SmolLM2-135M with its trained weights (logits up to
    31) moved by 1.6e-6 a token in fp32 and by 0.06 in bf16 under that, by 6e-7 in fp32 through packing, and by 0.7 with
    responses one position off.
    """
    eps = working_eps(policy, device)
    moved, first = [], 0
    with rounded(policy, eps / 2):
        for example in examples:  # one of a prompt's responses shows how far roundings are carried
            response = example.responses[0]
            row = torch.as_tensor([*example.prompt_of(0), *response], dtype=torch.int64, device=device)
            moved.append((_own_row(policy.model, row, len(response))[0] - own[first]).abs())
            first += len(example.responses)
    change = torch.cat(moved)
    # In 16 bits a router may send a token to another expert: single tokens may miss, not one in ten.
    few = 0.1 if eps > 1e-4 else 0.0
    chance = 1 + len(change) ** -0.5  # of a few tokens, one may have moved by chance the least
    return _Noise.of(spacing, 4 * chance * float(change.max()), 2 * chance * float(change.mean()), few)


def _own_row(model: nn.Module, row: Tensor, response_length: int) -> tuple[Tensor, Tensor]:
    """(log-probabilities [n] fp64 of the row's last tokens, n <= 256 of the response; the magnitude of what they are
    the difference of)."""
    count = min(response_length, _COMPARED)
    # The head on the response alone. The last token predicts nothing, and is part of the row's length.
    keep = {"logits_to_keep": count + 1} if _keeps_logits(model) else {}
    rotary.fresh(model)
    logits = model(input_ids=row[None], use_cache=False, **keep).logits[0, -count - 1 : -1]
    logps, scales = [], []
    at_once = max(1, (1 << 24) // logits.shape[-1])  # 128 MiB in fp64
    for part, target in zip(logits.split(at_once), row[-count:].split(at_once), strict=True):
        wide = part.double()
        own = wide.gather(-1, target[:, None]).squeeze(-1)
        lse = wide.logsumexp(-1)
        logps.append(own - lse)
        scales.append(torch.stack([own.abs(), lse.abs(), (own - lse).abs()]).amax(0))
    return torch.cat(logps), torch.cat(scales)


def _not_finite(policy: Policy, number: int, length: int) -> str:
    name = type(policy.causal_lm).__name__
    bad = next((n for n, p in policy.causal_lm.named_parameters() if not torch.isfinite(p).all()), None)
    why = f": the weights are not, first {bad}" if bad else ""
    return (
        f"{name}: the model's own logits are not finite (NaN or infinite) on row {number} of those that it is tried on "
        f"before the first step, of {length} tokens{why}"
    )


@contextlib.contextmanager
def rounded(policy: Policy, eps: float) -> Iterator[None]:
    """Embeddings and layers whose outputs are moved by a share of `eps` inside the block."""
    layers = [m for m in policy.trunk.modules() if isinstance(m, GradientCheckpointingLayer)]

    def move(_module: nn.Module, _inputs: Any, out: Any) -> Any:
        return (_nudged(out[0], eps), *out[1:]) if isinstance(out, tuple) else _nudged(out, eps)

    handles = [m.register_forward_hook(move) for m in (policy.causal_lm.get_input_embeddings(), *layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keeps_logits(model: nn.Module) -> bool:
    """Whether the model's forward takes `logits_to_keep`, through a PEFT wrapper too."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def _nudged(out: Any, eps: float) -> Any:
    """Neighbouring values a share `eps` up and down: no random numbers are drawn."""
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return out
    sign = torch.ones_like(out)
    sign[..., ::2] = -1
    return out * (1 + eps * sign)


def working_eps(policy: Policy, device: torch.device) -> float:
    """Spacing of the precision that the matrix multiplies run in."""
    if torch.is_autocast_enabled(device.type):
        return torch.finfo(torch.get_autocast_dtype(device.type)).eps
    eps = weights_eps(policy)
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return max(eps, 2.0**-10) if tf32 else eps


def check_batch(policy: Policy, batch: PackedBatch, examples: Sequence[Example]) -> None:
    """Every response must lie in the batch behind its own prompt, at its own positions: exact, in any precision."""
    ids, positions, predicted, target = (
        x.numpy() for x in (batch.input_ids, batch.position_ids, batch.logit_rows, batch.target)
    )
    prompts = prompts_of_chains(batch.cu_seqlens, batch.branches)
    bounds = itertools.pairwise(batch.response_offsets.tolist())
    for number, example in enumerate(examples):
        for k, response in enumerate(example.responses):
            a, b = next(bounds)
            rows, prompt = predicted[a:b], example.prompt_of(k)
            right = np.array_equal(target[a:b], response) and bool((np.diff(rows[1:]) == 1).all())
            for row, seen in ((rows[:1], prompt), (rows[-1:], np.concatenate([prompt, response[:-1]]))):
                if not right:
                    break
                start = batch.cu_seqlens[bisect.bisect_right(batch.cu_seqlens, int(row[0])) - 1]
                before = np.r_[slice(*prompts.get(start, (0, 0))), start : int(row[0]) + 1]
                right = np.array_equal(ids[before], seen) and np.array_equal(positions[before], np.arange(len(seen)))
            if not right:
                raise UnsupportedModelError(
                    f"{type(policy.causal_lm).__name__}: response {k} of row {number} is not in the packed batch as in "
                    "the data (tokens, order or positions): rows are paired or packed wrongly; please report this"
                )


def _last_of_each(logp: Tensor, offsets: Sequence[int]) -> list[Tensor]:
    """Of the batch's log-probabilities [N] those that are compared, response by response."""
    ranges = zip(offsets[:-1], offsets[1:], strict=True)
    return [logp[max(a, b - _COMPARED) : b] for a, b in ranges]


@dataclass(frozen=True, slots=True)
class _Difference:
    average: float
    tokens: int
    got: float
    want: float

    def __str__(self) -> str:
        return f"(worst {self.got:.6g} instead of {self.want:.6g})"


def _difference(got: Sequence[Tensor], own: Sequence[Tensor], noise: _Noise) -> _Difference | None:
    """What rounding does not explain, if there is anything."""
    if [len(x) for x in got] != [len(x) for x in own]:  # responses that begin or end elsewhere
        return _Difference(math.inf, sum(map(len, own)), math.nan, math.nan)
    found, want = torch.cat(list(got)).double(), torch.cat(list(own))
    error = torch.nan_to_num((found - want).abs(), nan=torch.inf)
    beyond = error > noise.any_token
    rest = error[~beyond] if noise.few and not beyond.all() else error
    if int(beyond.sum()) <= noise.few * len(error) and float(rest.mean()) <= noise.average:
        return None
    worst = int(error.argmax())
    return _Difference(float(error.mean()), len(error), float(found[worst]), float(want[worst]))


def _cause(
    policy: Policy, examples: Sequence[Example], own: list[Tensor], noise: _Noise, found: _Difference,
    device: torch.device,
) -> str:  # fmt: skip
    """The message of a difference. Where it comes from is tried: head before trunk, rows alone before packed ones."""
    name = type(policy.causal_lm).__name__
    amount = f"by {found.average:.2g} on average over {found.tokens} tokens where rounding explains {noise.average:.2g}"
    with policy.detached(), soft_caps_honoured(policy.causal_lm):
        by_trunk = _by_own_trunk(policy, examples, device)
    if by_trunk is not None and _difference(by_trunk, own, noise) is not None:
        return (
            f"{name}: fastpo's log-probabilities differ from the model's own logits, {amount} {found}, and already "
            "from its own hidden states: its head has a rule (a scale, a soft cap, a bias, another module) that fastpo "
            "does not know, and training would be wrong; use another model class, or report the family"
        )
    with policy.attach():
        alone = []
        for example in examples:
            for k, response in enumerate(example.responses):
                row = collate([Example(prompt_ids=example.prompt_of(k), responses=[response])], range(1)).to(device)
                alone += _last_of_each(policy.logp(row), row.response_offsets.tolist())
    if _difference(alone, own, noise) is not None:
        where = ": it has a rule that fastpo does not know"
        if by_trunk is not None:
            where = (
                ", and not from its own hidden states: its layers have a rule of attention or positions that fastpo "
            )
            where += "does not know"
        return (
            f"{name}: fastpo's log-probabilities differ from the model's own logits, {amount} {found}, for rows alone "
            f"too{where}, and training would be wrong; {attention.UNPACKED}"
        )
    return (
        f"{name}: fastpo's log-probabilities differ from the model's own logits, {amount} {found}, only where rows are "
        "packed together: responses are packed wrongly, or the model takes something from the whole batch that fastpo "
        f"does not know; please report it; {attention.UNPACKED}"
    )


def _by_own_trunk(policy: Policy, examples: Sequence[Example], device: torch.device) -> list[Tensor] | None:
    """Log-probabilities by fastpo's head from the hidden states of the model's own forward; None where they stay inside
    it."""
    states: list[Tensor] = []
    out = []
    trunks = {policy.trunk}
    decoder = policy.causal_lm.get_decoder()
    if isinstance(decoder, PreTrainedModel) and decoder is not policy.causal_lm:
        trunks.add(decoder)  # OPT runs its decoder without the model around it
    handles = [trunk.register_forward_hook(lambda _m, _i, out: states.append(out[0])) for trunk in trunks]
    try:
        for example in examples:
            for k, response in enumerate(example.responses):
                row = torch.as_tensor([*example.prompt_of(k), *response], dtype=torch.int64, device=device)
                _own_row(policy.model, row, len(response))
                if not states:
                    return None
                count = min(len(response), _COMPARED)
                head = policy.head()
                hidden = policy.for_head(states[-1][0, -count - 1 : -1], head)
                logp = ops.linear_logprob(
                    hidden, head.weight, row[-count:].to(hidden.device), head.bias,
                    softcap=head.softcap, logit_scale=head.logit_scale,
                )  # fmt: skip
                assert isinstance(logp, Tensor)
                out.append(logp.to(device))
                states.clear()
    finally:
        for handle in handles:
            handle.remove()
    return out


def _compare_pairs(
    name: str, packed: list[Tensor], batch: PackedBatch, examples: Sequence[Example], own: list[Tensor], noise: _Noise
) -> None:
    """A pair of the batch must join the responses that its example pairs: mispaired ones start at ln 2 all the same."""
    pairs = iter(batch.pairs.tolist())
    first = 0
    for number, example in enumerate(examples):
        for pair in example.pairs:
            for index, response in zip(next(pairs), pair, strict=True):
                got, want = packed[index].sum(), own[first + response].sum()
                if not (got - want).abs() <= noise.any_token * len(own[first + response]):
                    raise UnsupportedModelError(
                        f"{name}: in the packed batch a response of row {number} has log-probability {got:.6g}, alone "
                        f"{want:.6g}: responses are paired or packed wrongly; please report this"
                    )
        first += len(example.responses)


# ---- the attention pattern, which short rows cannot show

_FAR = 1 << 20  # tokens; a window that reaches this far back is none


def check_attention_pattern(policy: Policy, device: torch.device) -> None:
    """Every layer must tell its attention about the window that its mask has.

    Packed attention sees the layers' keywords and no mask. A family that puts a sliding window, chunks or bidirectional
    blocks into the mask alone would agree on rows shorter than the window, and be wrong beyond it.
    """
    wrong: set[str] = set()

    def layer(module, query, key, value, attention_mask=None, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        window = kwargs.get("sliding_window") or _FAR
        masked = window if attention_mask is None else int(attention_mask.flatten()[0])
        chunk = attention.chunk_of(module)
        if chunk is not None and masked == (2 * _FAR - 1) % chunk + 1:
            window = masked  # packed attention cuts the chains at the chunks' ends
        if min(window, _FAR) != masked:
            told = "no window" if window >= _FAR else f"a window of {window}"
            wrong.add(f"{type(module).__name__} is told of {told} but masked {_described(masked)}")
        return attention.packed_attention(module, query, key, value, None, *args, **kwargs)

    AttentionInterface.register(_PROBE, layer)
    AttentionMaskInterface.register(_PROBE, _probe_mask)
    attached = attention_implementations(policy.causal_lm)
    try:
        switch_attention(policy.causal_lm, _PROBE)
        tokens = torch.arange(2, device=device)
        policy._trunk_forward(tokens, tokens, Layout.from_chains((0, 2)))
    finally:
        restore_attention(attached)
    if wrong:
        raise UnsupportedModelError(
            f"{type(policy.causal_lm).__name__}: {'; '.join(sorted(wrong))}; fastpo would not see the mask. If no row "
            f"is longer than that, switch it off in the model's config; else {attention.UNPACKED}"
        )


def _probe_mask(*, q_length: int, kv_length: int, mask_function: Callable[..., Tensor], **kwargs: Any) -> Tensor:
    """A mask that holds, in place of values, the window that its rule has far from the start; -1 for no window."""
    back = torch.arange(-64, _FAR)
    zero, query = torch.tensor(0), torch.tensor(2 * _FAR - 1)  # the last of a chunk of any power of two
    try:
        visible = mask_function(zero, zero, query, query - back).expand(back.shape)
    except (IndexError, RuntimeError):  # a rule that looks positions up in a tensor of this very row
        visible = torch.ones_like(back, dtype=torch.bool)
    reach = int(visible.sum())
    if visible[:64].any() or not visible[64 : 64 + reach].all():
        reach = -1
    return torch.full((1, 1, q_length, kv_length), reach, device=kwargs.get("device"))


def _described(window: int) -> str:
    if window == _FAR:
        return "in full"
    return f"by {window} tokens" if 0 < window < _FAR else "in another pattern"
