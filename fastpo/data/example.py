"""A row as training sees it: the token ids of a prompt and its responses, and their numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# Of responses that the policy gave as it trains: a response column, and a token column beside others that losses name;
# of pairs whose one response the reference gave, whether it is the chosen one.
ADVANTAGE, REF_LOGP, OF_REFERENCE = "advantage", "ref_logp", "chosen_of_reference"


@dataclass(slots=True)
class Example:
    """One prompt with its K responses; a classic pair is `responses = [chosen, rejected]`, `pairs = [(0, 1)]`."""

    prompt_ids: np.ndarray  # [prompt_len] int32, never empty
    responses: list[np.ndarray]  # K arrays [len_k] int32, never empty, with the EOS where there is one
    pairs: list[tuple[int, int]] = field(default_factory=list)  # (preferred, other): indices into responses
    pair_columns: dict[str, list[float]] = field(default_factory=dict)  # one value a pair, only columns in the data
    response_columns: dict[str, list[float]] = field(default_factory=dict)  # one value a response
    # Only where keep_end truncation left the responses with different prompts: K arrays, never empty. `prompt_ids` is
    # then the shortest of them.
    response_prompts: list[np.ndarray] | None = None
    token_weights: list[np.ndarray] | None = None  # K arrays [len_k] fp32, where the data have them
    # Of responses that the policy gave as it trains: K arrays [len_k] fp32 by name (training/token_metrics.py).
    token_columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    share: bool = False  # the responses share one copy of the prompt in the trunk
    # Rows of a step with the same prompt have one copy of it in the trunk from this many responses on; 0: each its own.
    share_from: int = 0
    whole: bool = False  # the last token of a response enters the trunk too: a router's loss or a scalar head reads it
    # Of a reward model: which token of prompt and response, from the prompt's first on, each response is scored at.
    scored_at: tuple[int, ...] | None = None
    loss: str | None = None  # which entry of loss_type it is trained by; None: all of them
    greedy: int | None = None  # which response is the reference's greedy one (selm); it need not be in a pair
    # Of responses that another one's tokens made begin inside the prompt: how many of their first tokens are the
    # prompt's where each stands alone.
    leads: tuple[int, ...] | None = None

    def prompt_of(self, response: int) -> np.ndarray:
        """The prompt ids that response number `response` continues."""
        return self.prompt_ids if self.response_prompts is None else self.response_prompts[response]


def even_weights(examples: Sequence[Example]) -> None:
    """Ones as the weights of tokens, and of pairs, of examples without, where others have them."""
    if any("weight" in e.pair_columns for e in examples):
        for example in examples:
            example.pair_columns.setdefault("weight", [1.0] * len(example.pairs))
    if any(e.token_weights is not None for e in examples):
        for example in examples:
            if example.token_weights is None:
                example.token_weights = [np.ones(len(ids), np.float32) for ids in example.responses]
