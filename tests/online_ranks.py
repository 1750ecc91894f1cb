"""The same online training by one process and by two: what online/test_ranks.py compares.

    python tests/online_ranks.py results.pt

Runs are forked from this process, which has everything imported and nothing computed (see kill_runs.py).
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import peft  # noqa: E402
import torch  # noqa: E402

import online_runs as runs  # noqa: E402
from fastpo.errors import TrainingError  # noqa: E402
from kill_runs import LORA, fork, wait  # noqa: E402

OPTIONS = {"max_steps": 4, "adam_epsilon": 1e-3, "max_tokens": 90, "log_completions": True, "temperature": 0.9}


def sparse(completion_ids: Any, **_: Any) -> list[float]:
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def some(completion_ids: Any, **_: Any) -> list[float | None]:
    """Of the first response of a prompt there is no number, of those that begin with a high token neither."""
    return [None if k % 4 == 0 or ids[0] > 90 else runs.worth(ids) for k, ids in enumerate(completion_ids)]


def broken(completion_ids: Any, **_: Any) -> list[float]:
    raise ValueError("no")


# case -> options of one process's run, further arguments
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({}, {}),
    "reference": ({"beta": 0.1, "num_iterations": 2, "steps_per_generation": 2}, {}),
    "rloo": ({"loss_type": "rloo"}, {}),
    "certain": ({"top_entropy_quantile": 0.5, "loss_type": "dapo"}, {}),
    "entropy": ({"use_adaptive_entropy": True, "entropy_target": 3.6, "entropy_coef": 0.1}, {}),
    "dynamic": ({"dynamic_sampling": 2}, {"reward_funcs": sparse}),
    "online_dpo": ({"loss_type": "online_dpo", "per_device_train_batch_size": 2, "log_completions": False}, {}),
    "nash_md": ({"loss_type": "nash_md", "per_device_train_batch_size": 2, "log_completions": False}, {}),
    "lora": ({"beta": 0.1, "learning_rate": 1e-2}, {"peft_config": {**LORA, "lora_dropout": 0.0}}),
    "left out": ({}, {"reward_funcs": [some, runs.by_ids]}),
}


def run(case: str, ranks: int, out: Path) -> None:
    options, rest = CASES[case]
    options, rest = {**OPTIONS, **options}, {"sampler": None, **rest}
    if "peft_config" in rest:
        rest["peft_config"] = peft.LoraConfig(**rest["peft_config"])
    options["per_device_train_batch_size"] = options.get("per_device_train_batch_size", 8) // ranks
    seen: list[list[int]] = []
    given = rest.get("reward_funcs", runs.by_ids)
    first, others = (given[0], given[1:]) if isinstance(given, list) else (given, [])

    def noted(completion_ids: Any, **more: Any) -> Any:
        seen.extend(completion_ids)
        return first(completion_ids=completion_ids, **more)

    start = runs.model()
    before = {n: p.detach().clone() for n, p in start.named_parameters()}
    result = runs.train(
        out.parent / out.stem,
        rest={**rest, "reward_funcs": [noted, *others], "model": start, "eval_dataset": runs.prompts(3, 7)},
        eval_strategy="steps", eval_steps=2, **options,
    )  # fmt: skip
    after = {n.replace("base_model.model.", "").replace(".base_layer", ""): p.detach().clone()
             for n, p in result.model.named_parameters()}  # fmt: skip
    torch.save([list(map(int, ids)) for ids in seen], out.with_suffix(f".{os.environ.get('RANK', 0)}"))
    if int(os.environ.get("RANK", 0)) == 0:
        moved = {n: p - before[n] if n in before else p for n, p in after.items()}
        torch.save({"weights": after, "moved": moved, "logs": runs.lines(result)}, out)


def stopped(out: Path) -> None:
    try:
        runs.train(out.parent / out.stem, rest={"reward_funcs": broken}, per_device_train_batch_size=4)
    except TrainingError as error:
        out.with_suffix(f".{os.environ['RANK']}").write_text(str(error)[:44])


def main() -> None:
    results: dict[str, Any] = {}
    home = Path(tempfile.mkdtemp(prefix="fastpo-online-ranks-"))
    for case in CASES:
        for ranks in (1, 2):
            folder = home / f"{case}-{ranks}".replace(" ", "-")
            folder.mkdir()
            out = folder / "run.pt"
            wait(fork(ranks, folder, lambda: run(case, ranks, out)), folder)  # noqa: B023
            found = torch.load(out, weights_only=True)
            parts = [torch.load(out.with_suffix(f".{r}"), weights_only=True) for r in range(ranks)]
            found["responses"] = sorted(ids for part in parts for ids in part)
            results.setdefault(case, {})[str(ranks)] = found
    wait(fork(2, home, lambda: stopped(home / "raises.pt")), home)
    results["raises"] = [(home / f"raises.{r}").read_text() for r in range(2)]
    torch.save(results, sys.argv[1])


if __name__ == "__main__":
    main()
