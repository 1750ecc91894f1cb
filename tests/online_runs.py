"""What tests of online runs share: given responses in the sampler's place, their rewards, and runs on the toy model."""

import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402

import fastpo  # noqa: E402
from conftest import Toy  # noqa: E402
from fastpo.sampling.items import Failure, Request, Response  # noqa: E402

EOS, LONGEST = 0, 9
TIMES = ("runtime", "per_second", "peak_memory_gb", "step_time")


def seeded(*parts: Any) -> random.Random:
    return random.Random(hashlib.sha256(repr(parts).encode()).hexdigest())


def response_ids(prompt_ids: Sequence[int], k: int, salt: Any = 0) -> list[int]:
    """Response k to a prompt: 1 to LONGEST tokens; every fourth has no end."""
    rng = seeded(list(map(int, prompt_ids)), k, salt)
    if k % 4 == 3:
        return [rng.randrange(3, Toy.words + 3) for _ in range(LONGEST)]
    return [rng.randrange(3, Toy.words + 3) for _ in range(rng.randrange(LONGEST))] + [EOS]


def worth(ids: Sequence[int]) -> float:
    """A reward that a few responses share."""
    return (sum(ids) % 5) / 4 - 0.1 * len(ids)


def by_ids(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    return [worth(ids) for ids in completion_ids]


def by_text(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Another one; all alike for a third of the prompts."""
    return [0.5 if len(p) % 3 == 0 else float(len(c) % 3) for p, c in zip(prompts, completions)]


class Stop:
    """A callback: Ctrl-C after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Given:
    """A Sampler that has its answers; `fails` says which requests it cannot answer."""

    exact = True
    key: Mapping[str, Any] = {"engine": "given"}

    def __init__(
        self, ids: Callable[..., Sequence[int]] = response_ids,
        fails: Callable[[Request], bool] = lambda request: False, by_seed: bool = False,
    ):  # fmt: skip
        """by_seed: other answers every time that a prompt is asked."""
        self.ids, self.fails, self.by_seed = ids, fails, by_seed
        self.requests: list[Request] = []
        self.tokenizer = Toy.tokenizer()

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        return [list(requests[i : i + 4]) for i in range(0, len(requests), 4)]

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Response | Failure]]:
        for request in requests:
            self.requests.append(request)
            if self.fails(request):
                yield request, Failure("timeout")
                continue
            salt = [request.seed] if self.by_seed else []
            ids = list(self.ids(request.prompt_ids, request.k, *salt))
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            yield request, Response(text, tuple(ids), ids[-1] == EOS, source=request.source)

    def close(self) -> None:
        pass


def prompts(n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"prompt": f"w{i} {Toy.text(rng, 2, 9)}", "number": i} for i in range(n)]


def model(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """The toy model with weights so large that its distributions are far from uniform."""
    out = Toy.model(seed, **changes)
    with torch.no_grad():
        for p in out.parameters():
            if p.dim() > 1:
                p.mul_(4)
        out.lm_head.weight.mul_(3)
    return out


def options(folder: Path | str, **changes: Any) -> dict[str, Any]:
    return dict(
        output_dir=str(folder), loss_type="grpo", num_generations=4, max_completion_length=LONGEST,
        per_device_train_batch_size=8, max_steps=3, logging_steps=1, use_cpu=True, bf16=False, disable_tqdm=True,
        learning_rate=3e-3, lr_scheduler_type="constant", warmup_steps=0, report=False, report_to="none",
        save_strategy="no", save_final=False, gradient_checkpointing=False, train_sampling_strategy="sequential",
        max_grad_norm=0.0,
    ) | changes  # fmt: skip


def train(folder: Path | str, rows: Any = None, *, rest: Mapping[str, Any] | None = None, **changes: Any) -> Any:
    """A short run on given responses; `rest`: further arguments of fastpo.train, a `model` too."""
    arguments = {"reward_funcs": [by_ids], "sampler": Given(), "processing_class": Toy.tokenizer(), **(rest or {})}
    start = arguments.pop("model", None)
    return fastpo.train(model() if start is None else start, prompts(8) if rows is None else rows,
                        args=options(folder, **changes), **arguments)  # fmt: skip


def weights(trained: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in trained.parameters()])


def lines(result: Any) -> list[dict[str, Any]]:
    """What was logged, without times."""
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in result.log_history]
