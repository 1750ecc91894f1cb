"""Operators on hidden states: log-probabilities and losses without the logits, differentiable; tensors in, tensors
out."""

from fastpo.ops.dispatch import linear_logprob, linear_logprob_entropy
from fastpo.ops.head import (
    FUSED_LOSSES,
    PreferenceInputs,
    PreferenceOutput,
    has_kernel,
    log_sum_sq,
    plain_preference_loss,
    preference_loss,
    table_inputs,
    token_kl,
)
from fastpo.ops.inputs import NATIVE_DTYPES, available_backends, default_memory_budget
from fastpo.ops.parts import OpError

__all__ = [
    "FUSED_LOSSES",
    "NATIVE_DTYPES",
    "OpError",
    "PreferenceInputs",
    "PreferenceOutput",
    "available_backends",
    "default_memory_budget",
    "has_kernel",
    "linear_logprob",
    "linear_logprob_entropy",
    "log_sum_sq",
    "plain_preference_loss",
    "preference_loss",
    "table_inputs",
    "token_kl",
]
