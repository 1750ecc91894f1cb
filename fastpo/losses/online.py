"""The losses of an online run: which loss of the table each trains, and on what responses of the policy.

Losses per token are their own; those of preferences are losses of pairs whose pairs are drawn as the policy trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fastpo.losses.token_table import TOKEN_LOSSES

# Who a prompt's responses are drawn from: the policy; a geometric mixture of policy and reference; half of them from
# the policy and half from that mixture, or from the reference.
POLICY, MIXTURE, AGAINST_MIXTURE, AGAINST_REFERENCE = "policy", "mixture", "against mixture", "against reference"


@dataclass(frozen=True)
class Online:
    """One way to train on what the policy says."""

    name: str  # of loss_type
    loss: str  # in the table
    paper: str
    draws: str = POLICY
    by: str = "rewards"  # or wins: P(one response beats another), of a judge or of rewards
    # Losses of pairs: which pairs are formed. `chosen`: by pair_policy, of scores; `soft`: every two, both ways, by P.
    pairs: str = ""


_PREFERENCES = (
    Online("online_dpo", "dpo", "2402.04792", by="wins", pairs="chosen"),
    Online("online_ipo", "online_ipo", "2403.08635", by="wins", pairs="soft"),
    Online("ipo_md", "ipo_md", "2403.08635", MIXTURE, "wins", "soft"),
    Online("xpo", "xpo", "2405.21046", AGAINST_REFERENCE, "wins", "against"),
    Online("nash_md", "nash_md", "2312.00886", AGAINST_MIXTURE, "wins"),
    Online("spo", "grpo", "2401.04056", by="wins"),
)
ONLINE: dict[str, Online] = {loss.name: Online(loss.name, loss.name, loss.paper) for loss in TOKEN_LOSSES}
ONLINE |= {way.name: way for way in _PREFERENCES}


def is_online(names: Sequence[str]) -> bool:
    """Whether a run with these entries of loss_type draws its responses as it trains."""
    return len(names) == 1 and names[0] in ONLINE
