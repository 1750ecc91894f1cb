"""A reference that stays in memory while the policy trains, for losses that read its logits (TDPO).

A reference's log-probabilities are data (reference/cache.py), its logits are not: N x V numbers a micro-batch. So its
hidden states are computed in every step, without gradients; that costs one more forward pass, and memory by what it is:
`ref_model` its own weights; a new adapter nothing, for its reference is the base with the adapter off, but a copy of
what of the base itself is trained with it (`bias="all"`); anything else one copy of the trainable weights as training
began, which change places with the policy's for the pass.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastpo import ops
from fastpo.config.train_config import TrainConfig
from fastpo.data.packing import PackedBatch
from fastpo.errors import ConfigError, DataError
from fastpo.losses.table import Term
from fastpo.models import adapters
from fastpo.models.modes import eval_mode
from fastpo.models.policy import Head, Policy
from fastpo.reference.kept import Kept
from fastpo.reference.policies import Policies
from fastpo.reference.roles import REF, Sets


class LiveReference:
    """The reference of one run; `rows` computes what the losses read of it."""

    def __init__(
        self,
        policy: Policy,
        within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        held: contextlib.ExitStack | None = None,
    ):
        """policy: the reference, or the policy itself, which is the reference inside `within()`. held: until close."""
        self.policy, self.within, self.held = policy, within, held or contextlib.ExitStack()

    @torch.no_grad()
    def rows(self, batch: PackedBatch) -> tuple[Tensor, Head]:
        """(hidden states [N, E] of the batch's head rows, the head), detached; sets `batch.ref_logp` [N] too."""
        with self.within(), self.policy.attach():
            hidden, head = self.policy.head_rows(batch)
            # Detached, the weight stays the reference's when the two have changed places again.
            bias = None if head.bias is None else head.bias.detach()
            head = dataclasses.replace(head, weight=head.weight.detach(), bias=bias)
            logp = ops.linear_logprob(
                hidden, head.weight, batch.target, bias, softcap=head.softcap, logit_scale=head.logit_scale
            )
        assert isinstance(logp, Tensor)
        batch.ref_logp = logp
        return hidden, head

    def close(self) -> None:
        self.held.close()


def reader(terms: Sequence[Term]) -> str:
    """The first of these losses that reads the reference's logits."""
    return next(t.name for t in terms if t.loss and "chosen_kl" in t.loss.needs)


def check(config: TrainConfig, terms: Sequence[Term]) -> None:
    """Refuse what a reference in memory does not go with."""
    name = reader(terms)
    if config.sync_ref_model:
        raise ConfigError(f"{name} keeps its reference in memory, which stands still: leave sync_ref_model out")
    if config.fsdp != "no":
        raise ConfigError(
            f"{name} keeps its reference in memory, whole on every rank: leave fsdp out (a new adapter's reference, "
            "with peft_config, takes no memory of its own)"
        )


def start(
    policies: Policies,
    kept: Kept,
    sets: Sets,
    parameters: Mapping[str, nn.Parameter],
    *,
    loss: str,
    whole: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> LiveReference:
    """The reference of a run, before its weights are restored or trained.

    parameters: those that are trained. loss: the name of the one that reads it. whole: entered while the policy's
    weights are exchanged for the reference's, when nothing may be saved.
    """
    given, begin = policies.given[REF], policies.start
    for name, examples in sets.items():
        if any(REF.columns in e.response_columns for e in examples) and given is None:
            raise DataError(
                f"the {name} data have ref_chosen_logps and ref_rejected_logps, and {loss} needs the reference's "
                "logits: drop the columns, and pass the model they are of as ref_model"
            )
    policy, fingerprint = begin.engine.policy, begin.fingerprint
    within: Callable[[], AbstractContextManager[Any]]
    with contextlib.ExitStack() as held:
        if given is not None:
            engine, fingerprint = policies.load(REF, sets, held)
            policy = engine.policy
            _refuse_shared(policy.model, parameters)
            policies.verify(engine)
            held.enter_context(policy.attach())
            within = contextlib.nullcontext
            vocabulary, other = policy.head().weight.shape[0], begin.engine.policy.head().weight.shape[0]
            if vocabulary != other:
                raise ConfigError(f"ref_model has {vocabulary} tokens and the model {other}: they have no KL")
        elif begin.is_base:
            base = {id(tensor) for tensor in adapters.base_tensors(policy.model).values()}
            trained = {name: p for name, p in parameters.items() if id(p) in base}
            whole = whole if trained else contextlib.nullcontext
            within = functools.partial(_adapter_off, policy.model, Exchange(trained), whole)
        else:
            within = functools.partial(Exchange(parameters).in_place, policy.model, whole)
        if not kept.is_as_begun(REF, policies.key(fingerprint)):
            raise ConfigError(
                f"{kept.resume} was trained against another reference, which is not in it: to go on, pass the model "
                f"{'and ref_model ' if given is not None else ''}that the run began with"
            )
        return LiveReference(policy, within, held.pop_all())


def _refuse_shared(reference: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
    moving = {p.data_ptr() for p in trained.values()}
    if any(p.data_ptr() in moving for p in reference.parameters()):
        raise ConfigError("ref_model shares weights with the model that is trained: leave it out, or pass a copy")


@contextlib.contextmanager
def _adapter_off(
    model: Any, trained: "Exchange", whole: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
) -> Iterator[None]:
    """The base without its adapter, and with its own weights as they were before training (`trained`, `whole` as in
    Exchange.in_place); PEFT changes requires_grad on the way, which is put back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with trained.in_place(model, whole), warnings.catch_warnings():
            # PEFT warns that biases were trained, which is what the exchange is for.
            warnings.filterwarnings("ignore", message="Careful, disabling adapter layers", category=UserWarning)
            with model.disable_adapter():
                yield
    finally:
        for p, flag in flags:
            if p.requires_grad != flag:
                p.requires_grad_(flag)


class Exchange:
    """A copy of the trainable weights as they are now, to stand in the policy's place. Nothing is copied for that."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.parameters = list(parameters.values())
        self.values = [p.detach().clone() for p in self.parameters]

    @contextlib.contextmanager
    def in_place(
        self, model: nn.Module, whole: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    ) -> Iterator[None]:
        """Inside, the parameters hold the weights as they were; without gradients only. `whole`: as MovingReference."""
        with whole():
            self._swap()
        try:
            with eval_mode(model):
                yield
        finally:
            with whole():
                self._swap()

    def _swap(self) -> None:
        for i, p in enumerate(self.parameters):
            p.data, self.values[i] = self.values[i], p.data
