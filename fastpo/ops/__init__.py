"""Operators on hidden states: log-probabilities and losses without the logits, differentiable; tensors in, tensors
out."""

from fastpo.ops.head import (
    PreferenceInputs,
    PreferenceOutput,
    available_backends,
    linear_logprob,
    log_sum_sq,
    preference_loss,
    token_kl,
)

__all__ = [
    "PreferenceInputs",
    "PreferenceOutput",
    "available_backends",
    "linear_logprob",
    "log_sum_sq",
    "preference_loss",
    "token_kl",
]
