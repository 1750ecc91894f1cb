"""The guard before training: packed log-probabilities against the model's own logits, masks against attention."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from fastpo import attention
from fastpo.adapters import first_line
from fastpo.data import Example
from fastpo.errors import ConfigError, FastpoError, UnsupportedModelError
from fastpo.layout import Layout
from fastpo.model import Policy, attention_implementations, restore_attention, switch_attention, weights_eps
from fastpo.packing import PackedBatch, collate

_PROBE = "fastpo_probe"  # the attention implementation that records what the model's masks and layers ask for
_MAX_GUARD_ROWS = 4


def verify_policy(policy: Policy, examples: Sequence[Example], tolerance: float | None = None) -> None:
    """Hold the packed log-probabilities of a few rows against the model's own logits; raise UnsupportedModelError.

    Every response's token log-probabilities from one packed batch must equal those of its row run alone, unpadded, by
    the model's own forward and attention; and so must the sums that each pair of the batch puts together. The error
    allowed is the dtype's (`tolerance` per token overrides it). Call it under the autocast that training uses. Leaves
    the model's mode, attention and random state as they were; one row's logits are alive at a time.
    """
    examples = _short_rows(examples)
    name = type(policy.causal_lm).__name__
    device = policy.causal_lm.get_input_embeddings().weight.device
    cuda = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(cuda), _evaluating(policy.model):
        with policy.detached(), _soft_caps_honoured(policy.causal_lm):
            own, noise = _own_logps(policy, examples, device)
        if tolerance is not None:
            noise = _Noise(tolerance, tolerance, few=0.0)
        try:
            with policy.attach():
                if not policy.unpacked:
                    _check_attention_pattern(policy, device)
                batch = collate(examples, range(len(examples))).to(device)
                packed = policy.logp(batch)
        except TypeError as error:  # a trunk whose forward does not know the keywords
            if "unexpected keyword" not in str(error) or "attn" in str(error):
                raise
            raise UnsupportedModelError(f"{name} cannot run packed: {error}; {attention.UNPACKED}") from error
        _compare_tokens(name, packed, torch.cat(own), noise)
        _compare_pairs(name, packed, batch, examples, own, noise)


def verify_or_unpack(policy: Policy, examples: Sequence[Example]) -> None:
    """`verify_policy`; a model that is wrong or cannot run when packed, and right when every response runs alone, runs
    so from here on (recurrent layers that its config does not name, masks of its own). Else the first error stands.
    """
    try:
        verify_policy(policy, examples)
    except UnsupportedModelError as error:
        _unpack(policy, examples, error)
    except FastpoError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        config = policy.causal_lm.config
        if config.get_text_config(decoder=True) is config and not hasattr(config, "vision_config"):
            raise
        name = type(policy.causal_lm).__name__
        raise UnsupportedModelError(f"{name} cannot run on rows of text alone: {first_line(error)}") from error


def _unpack(policy: Policy, examples: Sequence[Example], error: UnsupportedModelError) -> None:
    """Go on unpacked where that is right, else raise `error`."""
    if policy.unpacked:
        raise error
    policy.unpacked = True
    try:
        verify_policy(policy, examples)
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


def _short_rows(examples: Sequence[Example]) -> list[Example]:
    """At most four rows, the shortest."""
    return sorted(examples, key=lambda e: len(e.prompt_ids) + sum(map(len, e.responses)))[:_MAX_GUARD_ROWS]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _soft_caps_honoured(causal_lm: PreTrainedModel) -> Iterator[None]:
    """Older transformers (5.11, not 5.23) run Gemma 2 with SDPA, which leaves its soft caps out; eager has them."""
    implementations = attention_implementations(causal_lm)
    text = causal_lm.config.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None) and causal_lm.config._attn_implementation == "sdpa":
        switch_attention(causal_lm, "eager")
    try:
        yield
    finally:
        restore_attention(implementations)


def _own_logps(policy: Policy, examples: Sequence[Example], device: torch.device) -> tuple[list[Tensor], _Noise]:
    """Each response's token log-probabilities [len] by the model's own forward, and the noise to expect in them.

    Noise has two parts. Values of magnitude z, logits and log-probabilities, are stored with a spacing of eps * z. And
    roundings inside the trunk are carried on by it: how far is measured, by moving the embeddings by one spacing, more
    than any rounding does. Over ten tiny families of 2 to 24 layers in fp32, bf16 and fp16, packing moved the
    log-probabilities by 0.07 to 0.7 of that on average, and by at most 1.0 of it in the worst token.
    """
    embeddings = policy.causal_lm.get_input_embeddings()
    eps = _working_eps(policy, device)
    own, moved, peaks = [], [], []
    for example in examples:
        for k, response in enumerate(example.responses):
            row = torch.as_tensor([*example.prompt_of(k), *response], dtype=torch.int64, device=device)
            logp, peak = _own_row(policy.model, row, len(response))
            own.append(logp)
            peaks.append(peak)
            if k > 1:
                continue  # two of a prompt's responses show how far roundings are carried
            handle = embeddings.register_forward_hook(lambda _module, _inputs, out: _nudged(out, eps))
            try:
                nudged, _ = _own_row(policy.model, row, len(response))
            finally:
                handle.remove()
            moved.append((nudged - logp).abs())
    spacing, change = eps * float(torch.stack(peaks).max()), torch.cat(moved)
    # In 16 bits a router may send a token to another expert: single tokens may miss, not one in ten.
    few = 0.1 if eps > 1e-4 else 0.0
    return own, _Noise(4 * float(change.max()) + 2 * spacing, 2 * float(change.mean()) + 0.5 * spacing, few)


def _own_row(model: nn.Module, row: Tensor, response_length: int) -> tuple[Tensor, Tensor]:
    """(log-probabilities [response_length] of the row's last tokens, the largest magnitude of them and the logits)."""
    keep = {"logits_to_keep": response_length} if _keeps_logits(model) else {}  # the head on the response alone
    logits = model(input_ids=row[None, :-1], use_cache=False, **keep).logits[0, -response_length:]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = wide.log_softmax(-1).gather(-1, row[-response_length:, None]).squeeze(-1)
    return logp, torch.maximum(wide.abs().max(), logp.abs().max())


def _keeps_logits(model: nn.Module) -> bool:
    """Whether the model's forward takes `logits_to_keep`, through a PEFT wrapper too."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def _nudged(out: Tensor, eps: float) -> Tensor:
    """Neighbouring values one spacing up and one spacing down: no random numbers are drawn."""
    sign = torch.ones_like(out)
    sign[..., ::2] = -1
    return out * (1 + eps * sign)


def _working_eps(policy: Policy, device: torch.device) -> float:
    """Spacing of the precision that the matrix multiplies run in."""
    if torch.is_autocast_enabled(device.type):
        return torch.finfo(torch.get_autocast_dtype(device.type)).eps
    eps = weights_eps(policy)
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return max(eps, 2.0**-10) if tf32 else eps


def _compare_tokens(name: str, packed: Tensor, own: Tensor, noise: _Noise) -> None:
    error = torch.nan_to_num((packed.to(own.dtype) - own).abs(), nan=torch.inf)
    beyond = int((error > noise.any_token).sum())
    if beyond > noise.few * len(own) or float(error.mean()) > noise.average:
        worst = int(error.argmax())
        raise UnsupportedModelError(
            f"{name}: fastpo's log-probabilities differ from the model's own logits, by {float(error.mean()):.2g} on "
            f"average over {len(own)} tokens where rounding explains {noise.average:.2g} (worst {packed[worst]:.6g} "
            f"instead of {own[worst]:.6g}): it has a logit or attention rule that fastpo does not know, and training "
            "would be wrong; use another model class, or report the family"
        )


def _compare_pairs(
    name: str, packed: Tensor, batch: PackedBatch, examples: Sequence[Example], own: list[Tensor], noise: _Noise
) -> None:
    """A pair of the batch must join the responses that its example pairs: mispaired ones start at ln 2 all the same."""
    offsets = batch.response_offsets.tolist()
    pairs = iter(batch.pairs.tolist())
    first = 0
    for number, example in enumerate(examples):
        for pair in example.pairs:
            for index, response in zip(next(pairs), pair, strict=True):
                got = packed[offsets[index] : offsets[index + 1]].sum()
                want = own[first + response].sum()
                if not (got - want).abs() <= noise.any_token * len(own[first + response]):
                    raise UnsupportedModelError(
                        f"{name}: in the packed batch a response of row {number} has log-probability {got:.6g}, alone "
                        f"{want:.6g}: responses are paired or packed wrongly; please report this"
                    )
        first += len(example.responses)


# ---- the attention pattern, which short rows cannot show

_FAR = 1 << 20  # tokens; a window that reaches this far back is none


def _check_attention_pattern(policy: Policy, device: torch.device) -> None:
    """Every layer must tell its attention about the window that its mask has.

    Packed attention sees the layers' keywords and no mask. A family that puts a sliding window, chunks or bidirectional
    blocks into the mask alone would agree on rows shorter than the window, and be wrong beyond it.
    """
    wrong: set[str] = set()

    def layer(module, query, key, value, attention_mask=None, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        window = kwargs.get("sliding_window") or _FAR
        masked = window if attention_mask is None else int(attention_mask.flatten()[0])
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
