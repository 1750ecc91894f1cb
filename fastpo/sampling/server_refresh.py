"""How a server that runs is given new weights from a folder: what vLLM and SGLang have for it.

vLLM, started with VLLM_SERVER_DEV_MODE=1: POST /collective_rpc calls reload_weights of its workers with weights_path,
which old versions do not take, and POST /reset_prefix_cache drops what was computed with the weights before. SGLang:
POST /update_weights_from_disk, which drops it by itself. The folder is a whole checkpoint, where the server sees it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastpo.sampling.server_client import Client, Unanswered


@dataclass(frozen=True)
class Reload:
    """One engine's way."""

    engine: str
    path: str
    body: Callable[[str], Mapping[str, Any]]  # of the folder
    then: str | None = None  # asked after it

    async def tell(self, client: Client, folder: str) -> None:
        """Every address; Unanswered where one does not do it, and says why."""
        for answer in await client.tell(self.path, self.body(folder)):
            if isinstance(answer, Mapping) and answer.get("success") is False:
                raise Unanswered("refused", str(answer.get("message"))[:300])
        if self.then is not None:
            await client.tell(self.then, {})


RELOADS = (
    Reload(
        "vllm", "/collective_rpc", lambda folder: {"method": "reload_weights", "kwargs": {"weights_path": folder}},
        "/reset_prefix_cache",
    ),
    Reload("sglang", "/update_weights_from_disk", lambda folder: {"model_path": folder}),
)  # fmt: skip


def reloads(engine: str) -> tuple[Reload, ...]:
    """Those of an engine; all, of a server that does not say which it is."""
    return tuple(way for way in RELOADS if engine == way.engine or engine == "openai")
