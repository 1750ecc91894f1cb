"""Which fixed policies a run compares with: the reference, and the previous policy that some losses mix with it."""

from dataclasses import dataclass
from typing import Any

from fastpo.data.prepare import Example

Sets = dict[str, list[Example]]  # data sets by name, "train" among them


@dataclass(frozen=True)
class Role:
    """A fixed policy that a loss compares with, and where a run has it."""

    name: str
    model: str  # the argument that gives it: a model, or its name or path
    columns: str  # of the data, as the example has them: sums
    file: str  # its token log-probabilities beside the run and in checkpoints
    key: str  # in run.json: the cache's key


REF = Role("reference", "ref_model", "ref_logps", "reference.safetensors", "reference")
PREV = Role("previous policy", "prev_model", "prev_logps", "previous.safetensors", "previous")
ROLES = (REF, PREV)


class Given:
    """The models that are given for the roles, in memory or by name or path; None where none is, or is needed again."""

    def __init__(self, ref_model: Any = None, prev_model: Any = None):
        self._models = {REF: ref_model, PREV: prev_model}

    def __getitem__(self, role: Role) -> Any:
        return self._models[role]

    def drop(self, role: Role) -> None:
        """Let go of a model whose log-probabilities are known."""
        self._models[role] = None
