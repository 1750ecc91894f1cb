"""What training needs of a Hugging Face causal language model: its trunk, its head, and packed attention in both.

The rule from hidden states to log-probabilities is `log_softmax(softcap(scale * (hidden W^T + b)))`; `verify_policy`
(models/verify.py) holds it against the model's own `logits` before anything is trained.

T = packed tokens, N = head rows (completion tokens), D = hidden size, V = vocabulary, S = responses, P = pairs.
"""

import contextlib
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fastpo import ops
from fastpo.data.example import Example
from fastpo.data.packing import PackedBatch
from fastpo.errors import ConfigError, UnsupportedModelError
from fastpo.models import adapters, attention, rotary
from fastpo.models.degree_head import LOGITS, DegreeHead
from fastpo.models.fused import Fused
from fastpo.models.layout import Layout, prompts_of_chains
from fastpo.models.loading import load_model, load_tokenizer, resolve_device
from fastpo.models.trunk import trunk_of

# The last three are loading's; scripts have them from here.
__all__ = ["DROPPED_MASS", "ENTROPY", "TOP1", "Head", "Policy", "load_model", "load_tokenizer", "resolve_device"]

log = logging.getLogger("fastpo")

# Names in PackedBatch.rows.
DROPPED_MASS = "dropped_mass"
ENTROPY, TOP1 = "entropy", "top1"  # of the head rows [N], where a log line or a loss asks for them

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

    scores = False  # whether its head gives a number a response (scalar_head.py), not one a token

    def __init__(self, model: nn.Module, fused: bool = True):
        """fused: whether layers are computed by fused ones while attached, where there are any (models/fused.py)."""
        self.model = model
        self.causal_lm = self._taken(model)
        self.trunk = trunk_of(self.causal_lm)
        self.softcap, self.logit_scale = self._logit_rule()
        self.head()  # refuses here what it would refuse in the first step
        self.unpacked = attention.runs_unpacked()
        if not self.unpacked and (why := _unpackable(self.causal_lm)):
            self.unpack(why)
        self.degree_head: DegreeHead | None = None  # what a loss has brought, beside the model
        self._originals: list[tuple[Any, str | None]] | None = None  # (config, implementation) while attached
        self.fused = Fused(fused)  # what of its layers is computed otherwise while attached
        attention.register()
        adapters.settle_quantized(self.causal_lm)

    @property
    def low_precision(self) -> bool:
        """Whether a matrix multiply of the model runs below fp32, autocast aside; a quantised base's do."""
        return weights_eps(self) > torch.finfo(torch.float32).eps

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP holds the parameters: then all ranks must run the same forwards."""
        return any(isinstance(module, FSDPModule) for module in self.trunk.modules())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the head's weight: what the checkpoint was loaded in."""
        return self.head().weight.dtype

    def unpack(self, why: str) -> None:
        """From now on every response runs alone with its prompt, through the model's own layers; said in one line."""
        self.unpacked = True
        log.warning("%s: every response runs alone with its prompt, unpacked, which is slower", why)

    def head(self) -> Head:
        """The head's tensors, looked up anew: an adapter may hold a copy of its own, or be switched off."""
        module = unwrap_head(self.causal_lm, self._head_module())
        return Head(module.weight, getattr(module, "bias", None), self.softcap, self.logit_scale)

    @staticmethod
    def _taken(model: nn.Module) -> PreTrainedModel:
        return _causal_lm(model)

    def _logit_rule(self) -> tuple[float | None, float]:
        return _logit_rule(self.causal_lm)

    def _head_module(self) -> Any:
        return self.causal_lm.get_output_embeddings()

    def place(self, examples: Sequence[Example]) -> None:
        """Notes in rows that it will read what they must bring beside their ids: last tokens, if a head reads them."""
        if self.degree_head is not None:
            for example in examples:  # of all kinds: rows of one prompt share responses
                example.whole = True

    def beside(self) -> dict[str, nn.Parameter]:
        """Parameters of what is trained beside the model, by name."""
        head = self.degree_head
        return {} if head is None else {f"degree_head.{name}": p for name, p in head.named_parameters()}

    def read(self, batch: PackedBatch, **options: Any) -> Tensor:
        """What losses read of a batch: here `logp`, whose options these are."""
        out = self.logp(batch, **options)
        assert isinstance(out, Tensor)
        return out

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Last hidden states [T, D], after the final norm, of a packed batch. The policy must be attached."""
        if self._originals is None:
            raise RuntimeError("Policy.hidden needs packed attention: call it inside `with policy.attach():`")
        layout = Layout.from_chains(batch.cu_seqlens, batch.branches)
        # The last token of a response is part of a row's length, whether it is sent through the trunk or not.
        with rotary.forward_of(None if self.unpacked else layout, missing=int(batch.uses is None)):
            if self.unpacked:
                return self._hidden_unpacked(batch.input_ids, layout)
            return self._trunk_forward(batch.input_ids, batch.position_ids, layout)

    def head_rows(self, batch: PackedBatch, prompts: bool = False) -> tuple[Tensor, Head]:
        """(hidden states [N, D] of the positions that predict a target, in the head's dtype and on its device; head);
        with `prompts`, [N + M, D]: those that predict the batch's prompt tokens follow. What a head beside the model
        says of the batch is put into `batch.rows`."""
        rows = torch.cat([batch.logit_rows, batch.prompts.rows]) if prompts and batch.prompts else batch.logit_rows
        head, hidden = self.head(), self.hidden(batch)
        if self.degree_head is not None and batch.degrees is not None:
            batch.rows[LOGITS] = self.degree_head(hidden.index_select(0, batch.degrees[:, 0]))
        return self.for_head(hidden.index_select(0, rows), head), head

    @staticmethod
    def for_head(hidden: Tensor, head: Head) -> Tensor:
        """Hidden states [N, D] in the head's dtype and on its device."""
        if hidden.dtype != head.weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(head.weight.dtype)  # a head kept in another precision, as the model's own forward has it
        return hidden.to(head.weight.device)

    def logp(
        self,
        batch: PackedBatch,
        memory_budget: int | None = None,
        return_entropy: bool = False,
        observe: Callable[[Tensor, Head], None] | None = None,
        prompts: bool = False,
        grad_filter: float = 0.0,
        token_metrics: bool = False,
        entropy_grad: bool = False,
        temperature: float = 1.0,
    ) -> Any:
        """Token log-probabilities [N] fp32 of the targets; with `return_entropy`, a pair with the entropies [N].

        `observe` is called with what `head_rows` returns, for other numbers of the same rows. With `prompts`, [N + M]:
        the batch's prompt tokens follow, from the same pass of the head. With a `grad_filter`, the probability that the
        backward leaves out, of the same rows, is put into `batch.rows`; with `token_metrics`, the entropies and whether
        the target is the likeliest token (0 or 1), each [N], of the targets alone. With `entropy_grad` the entropies
        have a gradient, and are put there too; ConfigError beside a `grad_filter`, which knows only that of `logp`.
        `temperature` divides the logits; ConfigError where these have a soft cap, which comes before that.
        """
        if entropy_grad and grad_filter:
            raise ConfigError("the gradient of the entropy is not built for grad_filter: leave grad_filter at 0")
        if temperature != 1 and self.softcap is not None:
            raise ConfigError(
                f"temperature={temperature:g} divides logits behind their soft cap, and the head has it before: set "
                "temperature=1 for this model"
            )
        hidden, head = self.head_rows(batch, prompts)
        if observe is not None:
            observe(hidden[: batch.target.numel()], head)
        target = torch.cat([batch.target, batch.prompts.target]) if prompts and batch.prompts else batch.target
        args = (hidden, head.weight, target, head.bias)
        options: dict[str, Any] = {
            "softcap": head.softcap, "logit_scale": head.logit_scale / temperature,
            "memory_budget": memory_budget,
            "return_top1": token_metrics,
        }  # fmt: skip
        out: Tensor | tuple[Tensor, ...]
        if entropy_grad:
            out = ops.linear_logprob_entropy(*args, **options)
        else:
            options |= {"return_entropy": return_entropy or token_metrics, "grad_filter": grad_filter}
            out = ops.linear_logprob(*args, **options, return_dropped=grad_filter > 0)
        logp, *further = out if isinstance(out, tuple) else (out,)
        if grad_filter:
            batch.rows[DROPPED_MASS] = further[-1]
        n = batch.target.numel()
        if token_metrics or entropy_grad:
            batch.rows[ENTROPY] = further[0][:n]
        if token_metrics:
            batch.rows[TOP1] = further[1][:n]
        return (logp, further[0]) if return_entropy else logp

    @contextlib.contextmanager
    def attach(self) -> Iterator["Policy"]:
        """Packed attention inside the block, backward included; the model's own attention after it. Nests."""
        if self._originals is not None:
            yield self
            return
        self._originals = attention_implementations(self.causal_lm)
        try:
            if not self.unpacked:
                switch_attention(self.causal_lm, attention.NAME)
                self.fused.install(self.trunk)
            with rotary.by_chain(self.trunk), attention.own_temperatures(self.trunk, packed=not self.unpacked):
                yield self
        finally:
            restore_attention(self._originals)
            self._originals = None
            self.fused.remove()

    @contextlib.contextmanager
    def detached(self) -> Iterator[nn.Module]:
        """The model with its own attention inside the block, for generate(), forward() and saving."""
        originals, self._originals = self._originals, None
        if originals is not None:
            attached = [(config, config._attn_implementation_internal) for config, _ in originals]
            restore_attention(originals)
            self.fused.switch(False)
        try:
            yield self.model
        finally:
            if originals is not None:
                restore_attention(attached)
                self._originals = originals
                self.fused.switch(True)

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
        if self.is_sharded:
            raise ConfigError(
                f"{type(self.causal_lm).__name__} runs unpacked, which fsdp's sharded parameters cannot: ranks differ "
                "in their forwards; leave fsdp out"
            )
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
    """The causal language model inside a PEFT wrapper."""
    inner = decoder_of(model)
    if inner.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no output head; load it with AutoModelForCausalLM, or pass a ...ForCausalLM "
            "model"
        )
    return inner


def decoder_of(model: Any) -> PreTrainedModel:
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
    text = config.get_text_config(decoder=True)
    if not getattr(text, "is_causal", True):
        raise UnsupportedModelError(f"{name} is configured with is_causal=False; fastpo trains causal models")
    return inner


def _unpackable(causal_lm: PreTrainedModel) -> str | None:
    """Why the tokens of a model do not meet in transformers' attention interface alone, if they do not."""
    name = f"{type(causal_lm).__name__} ({causal_lm.config.model_type})"
    text = causal_lm.config.get_text_config(decoder=True)
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _PACKABLE_LAYERS)
    if others:
        return f"{name} has {others[0]} layers, in which packed sequences would meet"
    return None if causal_lm._can_set_attn_implementation() else f"{name} does not take custom attention"


def _name_of(causal_lm: PreTrainedModel, module: nn.Module) -> str:
    return next((name for name, of in causal_lm.named_modules() if of is module), "it")


def unwrap_head(causal_lm: PreTrainedModel, head: Any) -> Any:
    """The module whose `weight` and `bias` are the head's, out of the wrappers that people and PEFT put around it."""
    name = type(causal_lm).__name__
    while True:
        kind = type(head).__name__
        if tying := _tied_by(causal_lm):
            raise UnsupportedModelError(f"{name}: {tying}")
        if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
            raise UnsupportedModelError(
                f"{name}: the output head carries an adapter ({kind}), which fastpo does not apply; leave "
                f"{_name_of(causal_lm, head)} out of target_modules, or train it whole with modules_to_save"
            )
        if hasattr(head, "token_adapter"):
            raise UnsupportedModelError(
                f"{name}: trainable_token_indices reach the output head, which fastpo does not apply; name the "
                "embeddings alone, of a model whose head is not tied to them, or train both whole with modules_to_save"
            )
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


def _tied_by(causal_lm: Any) -> str:
    """What is wrong with an adapter on the embeddings that PEFT carries over to the head tied to them; else ""."""
    head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    configs = list(getattr(causal_lm, "peft_config", {}).values())
    if not hasattr(head, "base_layer") or not any(getattr(c, "ensure_weight_tying", False) for c in configs):
        return ""
    if not hasattr(embedding, "base_layer"):
        return ""
    return (
        "ensure_weight_tying carries the adapter on the embeddings over to the output head, which fastpo does not apply"
        "; leave ensure_weight_tying or the embeddings out of peft_config, or train both whole with modules_to_save"
    )


def _logit_rule(causal_lm: PreTrainedModel) -> tuple[float | None, float]:
    """(softcap, scale) by which this family turns `hidden W^T + b` into logits; verify_policy checks it."""
    config = causal_lm.config.get_text_config(decoder=True)
    # The text half of a model of text and images has the fields; some families' whole (Aya Vision) leaves them unread.
    whole = config is not causal_lm.config and _source(type(causal_lm))
    softcap = next((c for f in _SOFTCAP_FIELDS if (c := getattr(config, f, None)) and (not whole or f in whole)), None)
    scale = 1.0
    for field, divides in _SCALE_FIELDS.items():
        value = getattr(config, field, None)
        if value is None or (whole and field not in whole):
            continue
        if not isinstance(value, int | float):
            raise UnsupportedModelError(f"{type(causal_lm).__name__}: {field}={value!r} is not a number")
        divides = divides and (config.model_type, field) not in _MULTIPLIED
        scale = scale / value if divides else scale * value
    return (None if softcap is None else float(softcap)), float(scale)


def _source(kind: type) -> str:
    """The code of a class; empty where it has none to read."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def weights_eps(policy: Policy) -> float:
    """The coarsest spacing of the weights' dtypes."""
    dtypes = {p.dtype for p in policy.causal_lm.parameters() if p.is_floating_point()}
    if adapters.is_quantized(policy.causal_lm):
        # Quantised layers compute in 16 bits, whatever the norms are in. LLM.int8 finds its outlier columns over all
        # rows of a call: packing moved its log-probabilities by 0.03 a token, as the quantising itself (bf16: 0.006).
        dtypes.add(torch.bfloat16)
    return max(torch.finfo(d).eps for d in dtypes)


# ---- which attention it runs


def attention_implementations(causal_lm: PreTrainedModel) -> list[tuple[Any, str | None]]:
    """Every configuration inside the model and its attention implementation, each configuration once."""
    configs = [causal_lm.config]
    configs += [m.config for m in causal_lm.modules() if isinstance(m, PreTrainedModel)]
    configs += [
        c for config in list(configs) for k in config.sub_configs if (c := getattr(config, k, None)) is not None
    ]
    unique = {id(c): c for c in configs}
    return [(c, c._attn_implementation_internal) for c in unique.values()]


def switch_attention(causal_lm: PreTrainedModel, implementation: str) -> None:
    """UnsupportedModelError where the model's layers call no attention that can be replaced."""
    causal_lm.set_attn_implementation(implementation)
    if causal_lm.config._attn_implementation != implementation:
        raise UnsupportedModelError(
            f"{type(causal_lm).__name__} does not take custom attention, so its sequences cannot be packed; "
            f"{attention.UNPACKED}"
        )


def restore_attention(implementations: list[tuple[Any, str | None]]) -> None:
    """What `attention_implementations` returned."""
    for config, implementation in implementations:
        config._attn_implementation_internal = implementation
