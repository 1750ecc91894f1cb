"""The load-balancing loss of mixtures of experts, as the model's own forward adds it, exact whatever the packing.

Over all layers and tokens of the responses of a step, each with its prompt, padding aside, it is

    E * sum_e (C_e / n) (P_e / n),    C_e = tokens that chose expert e,    P_e = sum of its probabilities

C has no gradient, P is a sum: with the step's C and n known, each micro-batch adds its own part. A prompt that several
responses share counts once for each. Where a step is more than one micro-batch, C and n come from a pass over the trunk
ahead of it, without gradient.

E = experts, T = packed tokens.
"""

import contextlib
import inspect
import itertools
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.config.train_config import TrainConfig
from fastpo.data import Example
from fastpo.data.packing import PackedBatch, collate
from fastpo.errors import ConfigError, UnsupportedModelError
from fastpo.models.layout import prompts_of_chains
from fastpo.models.modes import eval_mode
from fastpo.models.policy import Policy
from fastpo.training.distributed import Engine, World

log = logging.getLogger("fastpo")

ROUTER = "router"  # in PackedBatch.rows, from the forward pass: [2 E + 1], C, P and n of the batch
# How far the packed loss may lie from the model's own, relative: by roundings, which may send a token elsewhere.
_ALLOWED, _ALLOWED_16_BITS = 1e-4, 0.05


def of_run(policy: Policy, config: TrainConfig, sets: Iterable[Sequence[Example]]) -> "RouterLoss | None":
    """The router loss of a run, or None where the model has none or its coefficient is 0; its rows then enter the trunk
    whole. ConfigError where one is asked for that the model does not have."""
    if policy.scores:  # transformers' sequence classifiers, which have no such loss
        return None
    name, given = type(policy.causal_lm).__name__, config.router_aux_loss_coef
    text = policy.causal_lm.config.get_text_config(decoder=True)
    coefficient = getattr(text, "router_aux_loss_coef", 0.0) if given is None else given
    if given and not hasattr(text, "output_router_logits"):
        raise ConfigError(f"router_aux_loss_coef={given}: {name} is no mixture of experts that returns router logits")
    if not coefficient or not hasattr(text, "output_router_logits"):
        return None
    own = hasattr(sys.modules.get(type(policy.causal_lm).__module__), "load_balancing_loss_func")
    top_k = getattr(policy.causal_lm, "num_experts_per_tok", None) or getattr(text, "num_experts_per_tok", None)
    if top_k is None or not (own or given or hasattr(text, "num_experts")):
        if given:
            raise ConfigError(f"router_aux_loss_coef={given}: the config of {name} does not say num_experts_per_tok")
        log.warning("%s has router_aux_loss_coef=%g, and no such loss of its own: it is left out", name, coefficient)
        return None
    if config.torch_compile:
        raise ConfigError(
            f"torch_compile hides the router logits of {name}, whose load-balancing loss is added "
            f"(router_aux_loss_coef={coefficient:g}): leave it out, or set router_aux_loss_coef=0"
        )
    if (config.gradient_checkpointing_kwargs or {}).get("use_reentrant") and config.gradient_checkpointing:
        raise ConfigError(
            "gradient_checkpointing_kwargs: use_reentrant=true keeps gradients from the router's load-balancing loss: "
            "leave it out, or set router_aux_loss_coef=0"
        )
    router = RouterLoss(policy, float(coefficient), int(top_k))
    for examples in sets:
        router.take_whole(examples)
    return router


class RouterLoss:
    """One policy's; `coefficient` is what the loss is weighted by, `total` its sum over the step so far, detached."""

    def __init__(self, policy: Policy, coefficient: float, top_k: int):
        self.policy, self.coefficient, self.top_k = policy, coefficient, top_k
        self.total = torch.zeros(())
        self.size = 1  # 2 E + 1, once `verify` has seen a forward

    @staticmethod
    def take_whole(examples: Iterable[Example]) -> None:
        """Before the rows are packed: their last tokens enter the trunk too."""
        for example in examples:
            example.whole = True

    # -------------------------------------------------------------- forward

    @contextlib.contextmanager
    def collecting(self, batch: PackedBatch) -> Iterator[None]:
        """Inside, the trunk's forward over `batch` leaves its sums in `batch.rows[ROUTER]`, differentiable."""
        if batch.uses is None:
            yield
            return
        calls: list[tuple[Tensor, ...]] = []

        def ask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "output_router_logits": True}

        def take(_module: nn.Module, _args: Any, _kwargs: Any, outputs: Any) -> None:
            calls.append(tuple(getattr(outputs, "router_logits", None) or ()))

        trunk = self.policy.trunk
        handles = [
            trunk.register_forward_pre_hook(ask, with_kwargs=True),
            trunk.register_forward_hook(take, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        batch.rows[ROUTER] = self._sums(calls, list(self._uses(batch)))

    def _uses(self, batch: PackedBatch) -> Iterator[Tensor]:
        """The weight of each token of each call of the trunk: one for the pack, or unpacked one for each chain, whose
        prompt was counted where it stands."""
        assert batch.uses is not None
        if not self.policy.unpacked:
            yield batch.uses
            return
        prompts = prompts_of_chains(batch.cu_seqlens, batch.branches)
        for start, stop in itertools.pairwise(batch.cu_seqlens):
            first, end = prompts.get(start, (start, start))
            yield torch.cat([batch.uses.new_zeros(end - first), batch.uses[start:stop]])

    def _sums(self, calls: Sequence[tuple[Tensor, ...]], uses: Sequence[Tensor]) -> Tensor:
        """C, P and n of router logits [T, E] of each layer of each call. -> [2 E + 1] fp32"""
        total: Tensor | None = None
        for layers, weight in zip(calls, uses, strict=True):
            for logits in layers:
                rows = logits.reshape(-1, logits.shape[-1])
                weight = weight.to(rows.device)
                if len(rows) != len(weight):
                    raise UnsupportedModelError(
                        f"{type(self.policy.causal_lm).__name__}: router logits of {len(rows)} rows for {len(weight)} "
                        "tokens; set router_aux_loss_coef=0"
                    )
                probs = rows.softmax(-1)
                chosen = probs.topk(self.top_k, dim=-1).indices  # [T, k]
                wide = torch.promote_types(probs.dtype, torch.float32)
                load = torch.zeros(probs.shape[1], dtype=wide, device=rows.device)
                load.scatter_add_(0, chosen.flatten(), weight.to(wide).repeat_interleave(self.top_k))
                probability = (probs.to(wide) * weight.to(wide)[:, None]).sum(0)
                part = torch.cat([load, probability, weight.to(wide).sum()[None]])
                total = part if total is None else total + part.to(total.device)
        if total is None:
            return torch.zeros(1)
        return total

    def trunk_pass(self, engine: Engine, batch: PackedBatch) -> Tensor:
        """The sums of a micro-batch by its trunk alone, without gradient. -> [2 E + 1]"""
        with torch.no_grad(), self.collecting(batch):
            engine(lambda: self.policy.hidden(batch))
        return batch.rows.pop(ROUTER)

    def look_ahead(self, parts: Iterable[Tensor], idle: Iterable[Tensor], world: World) -> Tensor:
        """The sums of a step from those of this rank's micro-batches, which are formed here, and after them those of
        its idle rounds, for nothing. The random state is left as it was: the pass that trains draws the same masks."""
        with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
            mine = list(parts)
            for _ in idle:
                pass
        return world.sum_(torch.stack(mine).sum(0) if mine else torch.zeros(self.size, device=world.device))

    # ----------------------------------------------------------------- loss

    def begin(self) -> None:
        """A step, or a step anew, begins."""
        self.total = torch.zeros((), device=self.policy.head().weight.device)

    def share(self, batch: PackedBatch, of_step: Tensor | None) -> Tensor:
        """The micro-batch's part of the weighted loss. `of_step`: the whole step's sums, where it is not all of it."""
        mine = batch.rows[ROUTER]
        aux = value(mine if of_step is None else of_step, mine)
        self.total = self.total + aux.detach().to(self.total.device)
        return self.coefficient * aux

    # ---------------------------------------------------------------- guard

    @torch.no_grad()
    def verify(self, examples: Sequence[Example], low_precision: bool) -> "RouterLoss | None":
        """Hold the loss of a few rows against the model's own, over the same rows padded; UnsupportedModelError. None
        where no layer has a router."""
        policy = self.policy
        name = type(policy.causal_lm).__name__
        device = policy.causal_lm.get_input_embeddings().weight.device
        sequences = [[*e.prompt_of(k), *r] for e in examples for k, r in enumerate(e.responses)]
        longest = max(map(len, sequences))
        ids = torch.tensor([[*map(int, s), *[0] * (longest - len(s))] for s in sequences], device=device)
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=device)
        inner: Any = policy.causal_lm
        keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}
        with eval_mode(policy.model):
            batch = collate(examples, range(len(examples))).to(device)
            with policy.attach():
                mine = self.trunk_pass(Engine(policy), batch)
            self.size = len(mine)
            # Dense layers only, of which some models' own loss is an IndexError; or a model that hands no router logits
            # on (GraniteMoe in transformers 5.11).
            if self.size == 1:
                log.warning("%s returned no router logits: no load-balancing loss is added", name)
                return None
            with policy.detached() as model:
                out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True, **keep)
        own = getattr(out, "aux_loss", None)
        if not isinstance(own, Tensor):
            log.warning("%s has no load-balancing loss of its own: Mixtral's is added, as TRL does", name)
            return self
        got, want = float(value(mine, mine)), float(own)
        allowed = _ALLOWED_16_BITS if low_precision else _ALLOWED
        if not abs(got - want) <= allowed * abs(want):
            raise UnsupportedModelError(
                f"{name}: the load-balancing loss is {want:.6g} by the model's own formula and {got:.6g} by fastpo's: "
                "set router_aux_loss_coef=0"
            )
        return self


def value(of_step: Tensor, part: Tensor) -> Tensor:
    """The part of the step's loss that lies in the probabilities of `part`. Both [2 E + 1] -> []"""
    experts = len(part) // 2
    if not experts:
        return part.sum() * 0.0
    load, count = of_step[:experts].detach(), of_step[-1].detach()
    return experts * (load * part[experts:-1]).sum() / count.square()
