"""What training needs of a Hugging Face causal language model: its trunk, its head, and packed attention in both.

The rule from hidden states to log-probabilities is `log_softmax(softcap(scale * (hidden W^T + b)))`; `verify_policy`
holds it against the model's own `logits` before anything is trained.

T = packed tokens, N = head rows (completion tokens), D = hidden size, V = vocabulary, S = responses, P = pairs.
"""

import contextlib
import inspect
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from fastpo import adapters, attention, ops
from fastpo.adapters import first_line
from fastpo.errors import ConfigError, DeviceError, UnsupportedModelError
from fastpo.layout import Layout, prompts_of_chains
from fastpo.packing import PackedBatch, collate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastpo.data import Example

DROPPED_MASS = "dropped_mass"  # name in PackedBatch.rows
_PROBE = "fastpo_probe"  # the attention implementation that records what the model's masks and layers ask for
_MAX_GUARD_ROWS = 4

# Layers in which tokens meet in plain attention; the others (recurrent, convolutional, sparse) would mix the chains.
_PACKABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}

# Scalars that families apply to their logits, by configuration field: whether logits are divided by it.
_SCALE_FIELDS = {
    "logit_scale": False,  # Cohere
    "logits_scaling": True,  # Granite, MiniCPM3 (which divides the hidden states)
    "output_multiplier": False,  # Muse
    "lm_head_multiplier": False,  # Falcon-H1
    "logits_mup_width_multiplier": True,  # Inkling
}
_MULTIPLIED = {("hyperclovax", "logits_scaling")}  # the exception: muP, as Granite's field but the other way round
_SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, slots=True)
class Head:
    """The output head as it stands now: adapters may have been switched since the last call."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float


class Policy:
    """A causal language model, with or without a PEFT adapter, seen as packed log-probabilities."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.causal_lm = _causal_lm(model)
        self.trunk = _trunk(self.causal_lm)
        self.softcap, self.logit_scale = _logit_rule(self.causal_lm)
        self.head()  # refuses here what it would refuse in the first step
        _refuse_router_loss(self.causal_lm)
        self._originals: list[tuple[Any, str | None]] | None = None  # (config, implementation) while attached
        attention.register()
        adapters.settle_quantized(self.causal_lm)

    @property
    def low_precision(self) -> bool:
        """Whether a matrix multiply of the model runs below fp32, autocast aside; a quantised base's do."""
        return _weights_eps(self) > torch.finfo(torch.float32).eps

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the head's weight: what the checkpoint was loaded in."""
        return self.head().weight.dtype

    def head(self) -> Head:
        """The head's tensors, looked up anew: an adapter may hold a copy of its own, or be switched off."""
        module = _unwrap_head(self.causal_lm)
        return Head(module.weight, getattr(module, "bias", None), self.softcap, self.logit_scale)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Last hidden states [T, D], after the final norm, of a packed batch. The policy must be attached."""
        if self._originals is None:
            raise RuntimeError("Policy.hidden needs packed attention: call it inside `with policy.attach():`")
        layout = Layout.from_chains(batch.cu_seqlens, batch.branches)
        if attention.runs_unpacked():
            return self._hidden_unpacked(batch.input_ids, layout)
        return self._trunk_forward(batch.input_ids, batch.position_ids, layout)

    def head_rows(self, batch: PackedBatch, prompts: bool = False) -> tuple[Tensor, Head]:
        """(hidden states [N, D] of the positions that predict a target, in the head's dtype and on its device; head);
        with `prompts`, [N + M, D]: those that predict the batch's prompt tokens follow."""
        rows = torch.cat([batch.logit_rows, batch.prompts.rows]) if prompts and batch.prompts else batch.logit_rows
        hidden = self.hidden(batch).index_select(0, rows)  # [N, D]
        head = self.head()
        if hidden.dtype != head.weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(head.weight.dtype)  # a head kept in another precision, as the model's own forward has it
        return hidden.to(head.weight.device), head

    def logp(
        self,
        batch: PackedBatch,
        memory_budget: int | None = None,
        return_entropy: bool = False,
        observe: Callable[[Tensor, Head], None] | None = None,
        prompts: bool = False,
        grad_filter: float = 0.0,
    ) -> Any:
        """Token log-probabilities [N] fp32 of the targets; with `return_entropy`, a pair with the entropies [N].

        `observe` is called with what `head_rows` returns, for other numbers of the same rows. With `prompts`, [N + M]:
        the batch's prompt tokens follow, from the same pass of the head. With a `grad_filter`, the probability that the
        backward leaves out, of the same rows, is put into `batch.rows`.
        """
        hidden, head = self.head_rows(batch, prompts)
        if observe is not None:
            observe(hidden[: batch.target.numel()], head)
        target = torch.cat([batch.target, batch.prompts.target]) if prompts and batch.prompts else batch.target
        out = ops.linear_logprob(
            hidden,
            head.weight,
            target,
            head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            return_entropy=return_entropy,
            memory_budget=memory_budget,
            grad_filter=grad_filter,
            return_dropped=grad_filter > 0,
        )
        if grad_filter:
            *rest, batch.rows[DROPPED_MASS] = out
            out = (rest[0], rest[1]) if return_entropy else rest[0]
        return out

    @contextlib.contextmanager
    def attach(self) -> Iterator["Policy"]:
        """Packed attention inside the block, backward included; the model's own attention after it. Nests."""
        if self._originals is not None:
            yield self
            return
        self._originals = _implementations(self.causal_lm)
        try:
            if not attention.runs_unpacked():
                _switch(self.causal_lm, attention.NAME)
            yield self
        finally:
            _restore(self._originals)
            self._originals = None

    @contextlib.contextmanager
    def detached(self) -> Iterator[nn.Module]:
        """The model with its own attention inside the block, for generate(), forward() and saving."""
        originals, self._originals = self._originals, None
        if originals is not None:
            attached = [(config, config._attn_implementation_internal) for config, _ in originals]
            _restore(originals)
        try:
            yield self.model
        finally:
            if originals is not None:
                _restore(attached)
                self._originals = originals

    def _trunk_forward(self, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
        outputs = self.trunk(
            input_ids=input_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            return_dict=True,
            fastpo_layout=layout,
        )
        return outputs.last_hidden_state.squeeze(0)

    def _hidden_unpacked(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """The same for a model that cannot be packed: chain by chain, a branch's each after its prompt."""
        if any(isinstance(module, FSDPModule) for module in self.trunk.modules()):
            raise ConfigError("FASTPO_ATTENTION=own cannot run with sharded parameters: ranks differ in their forwards")
        prompts = prompts_of_chains(layout.cu_seqlens, layout.branches)
        parts = []
        for start, stop in itertools.pairwise(layout.cu_seqlens):
            first, end = prompts.get(start, (start, start))
            ids = torch.cat([input_ids[first:end], input_ids[start:stop]]).unsqueeze(0)
            outputs = self.trunk(input_ids=ids, use_cache=False, return_dict=True)
            parts.append(outputs.last_hidden_state[0, end - first :])
        return torch.cat(parts)


# ---- what kind of model this is


def _causal_lm(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, if it is one that can be trained here."""
    name = type(model).__name__
    inner = model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        for config in model.peft_config.values():
            adapters.check_adapter_type(config)
        inner = model.get_base_model()
        name = type(inner).__name__
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"{name} is not a transformers causal language model; pass a PreTrainedModel")
    config = inner.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; fastpo trains decoder-only language models")
    if inner.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{name} has no output head; load it with AutoModelForCausalLM, or pass a ...ForCausalLM model"
        )
    text = config.get_text_config(decoder=True)
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _PACKABLE_LAYERS)
    if (others or not inner._can_set_attn_implementation()) and not attention.runs_unpacked():
        what = f"has {others[0]} layers" if others else "does not take custom attention"
        raise UnsupportedModelError(
            f"{name} ({config.model_type}) {what}, so its sequences cannot be packed: their tokens must meet in "
            f"transformers' attention interface only; {attention.UNPACKED}"
        )
    if not getattr(text, "is_causal", True):
        raise UnsupportedModelError(f"{name} is configured with is_causal=False; fastpo trains causal models")
    return inner


def _trunk(causal_lm: PreTrainedModel) -> nn.Module:
    """The module from token ids to the last hidden states: all but the head, and of a multimodal model the text."""
    trunk = getattr(causal_lm, causal_lm.base_model_prefix, None)
    if causal_lm.config.get_text_config(decoder=True) is not causal_lm.config:
        trunk = causal_lm.get_decoder()
    if trunk is None or trunk is causal_lm:
        raise UnsupportedModelError(
            f"{type(causal_lm).__name__} has no trunk apart from its head (base_model_prefix "
            f"'{causal_lm.base_model_prefix}'); fastpo cannot run the head on completion tokens only"
        )
    return trunk


def _unwrap_head(causal_lm: PreTrainedModel) -> Any:
    """The module whose `weight` and `bias` are the head's, out of the wrappers that people and PEFT put around it."""
    name = type(causal_lm).__name__
    head = causal_lm.get_output_embeddings()
    while True:
        kind = type(head).__name__
        if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
            raise UnsupportedModelError(
                f"{name}: the output head carries an adapter ({kind}), which fastpo does not apply; leave it out of "
                "target_modules, or train it whole with modules_to_save"
            )
        if hasattr(head, "token_adapter"):
            raise UnsupportedModelError(f"{name}: trainable_token_indices on the output head are not supported")
        if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
            adapters = [] if head.disable_adapters else [a for a in head.active_adapters if a in head.modules_to_save]
            head = head.modules_to_save[adapters[0]] if adapters else head.original_module
        elif "weight" not in dict(head.named_parameters(recurse=False)) and len(list(head.children())) == 1:
            head = next(head.children())  # e.g. an nn.Sequential that casts its output
        else:
            break
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise UnsupportedModelError(f"{name}: the output head ({kind}) has no weight matrix [vocabulary, hidden]")
    if weight.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise UnsupportedModelError(
            f"{name}: the output head is quantised ({kind}, {weight.dtype}); keep it in 16 bits, for instance with "
            "llm_int8_skip_modules=['lm_head']"
        )
    return head


def _logit_rule(causal_lm: PreTrainedModel) -> tuple[float | None, float]:
    """(softcap, scale) by which this family turns `hidden W^T + b` into logits; verify_policy checks it."""
    config = causal_lm.config.get_text_config(decoder=True)
    softcap = next((c for f in _SOFTCAP_FIELDS if (c := getattr(config, f, None))), None)
    scale = 1.0
    for field, divides in _SCALE_FIELDS.items():
        value = getattr(config, field, None)
        if value is None:
            continue
        if not isinstance(value, int | float):
            raise UnsupportedModelError(f"{type(causal_lm).__name__}: {field}={value!r} is not a number")
        divides = divides and (config.model_type, field) not in _MULTIPLIED
        scale = scale / value if divides else scale * value
    return (None if softcap is None else float(softcap)), float(scale)


def _refuse_router_loss(causal_lm: PreTrainedModel) -> None:
    config = causal_lm.config.get_text_config(decoder=True)
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if getattr(config, "output_router_logits", False) and coefficient:
        raise UnsupportedModelError(
            f"{type(causal_lm).__name__} asks for a router loss (output_router_logits=True, router_aux_loss_coef="
            f"{coefficient}), which fastpo does not compute; set model.config.output_router_logits = False"
        )


# ---- which attention it runs


def _implementations(causal_lm: PreTrainedModel) -> list[tuple[Any, str | None]]:
    """Every configuration inside the model and its attention implementation, each configuration once."""
    configs = [causal_lm.config]
    configs += [m.config for m in causal_lm.modules() if isinstance(m, PreTrainedModel)]
    configs += [
        c for config in list(configs) for k in config.sub_configs if (c := getattr(config, k, None)) is not None
    ]
    unique = {id(c): c for c in configs}
    return [(c, c._attn_implementation_internal) for c in unique.values()]


def _switch(causal_lm: PreTrainedModel, implementation: str) -> None:
    causal_lm.set_attn_implementation(implementation)
    if causal_lm.config._attn_implementation != implementation:
        raise UnsupportedModelError(
            f"{type(causal_lm).__name__} does not take custom attention, so its sequences cannot be packed; "
            f"{attention.UNPACKED}"
        )


def _restore(implementations: list[tuple[Any, str | None]]) -> None:
    for config, implementation in implementations:
        config._attn_implementation_internal = implementation


# ---- the guards before training


def verify_policy(policy: Policy, examples: "Sequence[Example]", tolerance: float | None = None) -> None:
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
                if not attention.runs_unpacked():
                    _check_attention_pattern(policy, device)
                batch = collate(examples, range(len(examples))).to(device)
                packed = policy.logp(batch)
        except TypeError as error:  # a trunk whose forward does not know the keywords
            if "unexpected keyword" not in str(error) or "attn" in str(error):
                raise
            raise UnsupportedModelError(f"{name} cannot run packed: {error}; {attention.UNPACKED}") from error
        _compare_tokens(name, packed, torch.cat(own), noise)
        _compare_pairs(name, packed, batch, examples, own, noise)


@dataclass(frozen=True, slots=True)
class _Noise:
    """How far rounding may move token log-probabilities."""

    any_token: float
    average: float
    few: float  # share of tokens that may go beyond `any_token`


def _short_rows(examples: "Sequence[Example]") -> "list[Example]":
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
    implementations = _implementations(causal_lm)
    text = causal_lm.config.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None) and causal_lm.config._attn_implementation == "sdpa":
        _switch(causal_lm, "eager")
    try:
        yield
    finally:
        _restore(implementations)


def _own_logps(policy: Policy, examples: "Sequence[Example]", device: torch.device) -> tuple[list[Tensor], _Noise]:
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
    eps = _weights_eps(policy)
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return max(eps, 2.0**-10) if tf32 else eps


def _weights_eps(policy: Policy) -> float:
    dtypes = {p.dtype for p in policy.causal_lm.parameters() if p.is_floating_point()}
    if adapters.is_quantized(policy.causal_lm):
        # Quantised layers compute in 16 bits, whatever the norms are in. LLM.int8 finds its outlier columns over all
        # rows of a call: packing moved its log-probabilities by 0.03 a token, as the quantising itself (bf16: 0.006).
        dtypes.add(torch.bfloat16)
    return max(torch.finfo(d).eps for d in dtypes)


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
    name: str, packed: Tensor, batch: PackedBatch, examples: "Sequence[Example]", own: list[Tensor], noise: _Noise
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
    attached = _implementations(policy.causal_lm)
    try:
        _switch(policy.causal_lm, _PROBE)
        tokens = torch.arange(2, device=device)
        policy._trunk_forward(tokens, tokens, Layout.from_chains((0, 2)))
    finally:
        _restore(attached)
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


# ---- loading


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: torch.device | str | None = None,
    use_cpu: bool = False,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantization_config: object | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal language model by name or path, in the checkpoint's own dtype unless `dtype` says otherwise.

    A trained adapter's folder or hub name gives its base with that adapter, trainable; `revision` is the adapter's.
    `attn_implementation` is what the model runs outside fastpo (generation, the guard); inside, attention is packed.
    """
    kwargs = dict(model_init_kwargs or {})
    dtype = dtype or kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
    kwargs.update(dtype=_parse_dtype(dtype), trust_remote_code=trust_remote_code)
    given = dict(revision=revision, attn_implementation=attn_implementation, quantization_config=quantization_config)
    kwargs.update({key: value for key, value in given.items() if value is not None})
    where, of = os.fspath(name_or_path), ""
    if adapter := adapters.saved_adapter(where, revision):
        where, of = adapter.base_model_name_or_path, f", the base of the adapter {where!r}"
        kwargs["revision"] = adapter.revision
    target = resolve_device(device, use_cpu=use_cpu)
    if quantization_config is not None and "device_map" not in kwargs:
        kwargs["device_map"] = {"": target}
    try:
        model = AutoModelForCausalLM.from_pretrained(where, **kwargs)
    except ImportError as error:
        hint = "pip install 'fastpo[quant]'" if quantization_config is not None else first_line(error)
        raise ConfigError(f"loading {where!r} needs a package that is not installed: {hint}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"cannot load the model {where!r}{of}: {first_line(error)}") from error
    adapters.settle_quantized(model, just_loaded=True)
    model = model if "device_map" in kwargs else model.to(target)
    return model if adapter is None else adapters.continue_adapter(model, name_or_path, revision)


def load_tokenizer(
    name_or_path: str | os.PathLike[str], *, trust_remote_code: bool = False, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer that lies with the model; of an adapter saved without one, its base's."""
    where = os.fspath(name_or_path)
    if not where:
        raise ConfigError("the model does not say where its tokenizer is: pass processing_class=")
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        if adapter := adapters.saved_adapter(where, revision):
            return load_tokenizer(adapter.base_model_name_or_path, trust_remote_code=trust_remote_code)
        here = "" if os.path.isdir(where) else ", which is no folder here"
        raise ConfigError(f"cannot load a tokenizer from {where!r}{here}: {first_line(error)}") from error


def resolve_device(device: torch.device | str | None = None, *, use_cpu: bool = False) -> torch.device:
    """The device asked for, or the accelerator that is there, or the CPU."""
    if device is None:
        if use_cpu or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())
    try:
        device = torch.device(device)
    except RuntimeError:
        raise DeviceError(f"there is no device {device!r}; use cuda, cuda:0 or cpu") from None
    if use_cpu and device.type != "cpu":
        raise DeviceError(f"use_cpu is set, and device {device} too; leave one out")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device {device} was asked for, but PyTorch sees no GPU; use_cpu=True trains on the CPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {device} was asked for, but there are {torch.cuda.device_count()} GPUs")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
    parsed = getattr(torch, short.get(dtype, dtype.removeprefix("torch.")), None)
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise ConfigError(f"dtype={dtype!r}: expected 'auto', 'bfloat16', 'float16' or 'float32'")
    return parsed
