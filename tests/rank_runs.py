"""The same training by one process and by several, replicated and sharded: what training/test_distributed.py compares.

    python tests/rank_runs.py FOLDER CASE LAYOUT

leaves the results of one run in FOLDER/run.pt. Its ranks are forked from this process, which has everything imported
and nothing computed (see kill_runs.py). RUNS has the names.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402

import fastpo  # noqa: E402
from conftest import Toy  # noqa: E402
from kill_runs import LORA, TIMES, fork, wait  # noqa: E402

# Two ranks of 4 pairs or one of 8; 21 rows, so that a step of 5 pairs ends each epoch.
OPTIONS = dict(
    use_cpu=True, bf16=False, disable_tqdm=True, max_steps=6, learning_rate=0.05, lr_scheduler_type="constant",
    optim="sgd", logging_steps=1, max_tokens=90, gradient_checkpointing=False, report=False, beta=0.5,
    max_grad_norm=0.5, eval_strategy="steps", eval_steps=3,
)  # fmt: skip
# what is trained -> (options, rows, adapter, model)
CASES: dict[str, tuple[dict, int, bool, dict]] = {
    "dpo": ({}, 21, False, {}),
    "tied": ({"loss_type": ["simpo", "sft"], "beta": None}, 21, False, {"tie_word_embeddings": True}),
    "idle": ({}, 9, False, {}),  # each epoch's second step has one row: the other ranks have no completion token
    "lora": ({"optim": "adamw_torch", "learning_rate": 0.01}, 21, True, {}),
    "bf16": ({"optim": "adamw_torch", "learning_rate": 0.01}, 21, False, {"dtype": torch.bfloat16}),
    "tr-dpo": ({"sync_ref_model": True, "ref_model_sync_steps": 2}, 21, False, {}),
    "inpo": ({"loss_type": "inpo", "beta": None, "loss_kwargs": {"eta": 0.5}}, 21, False, {"prev_model": 1}),
    "kto": ({"loss_type": "kto"}, 11, False, {}),
    "bco": ({"loss_type": "bco"}, 11, False, {}),
    "aot": ({"loss_type": "aot"}, 21, False, {}),
    "orpo": ({"loss_type": ["orpo", "sft"], "beta": None, "pair_policy": "all"}, 21, False, {"kway": True}),
    "rows": ({"loss_type": ["wpo", "sampo", "ld_dpo"]}, 21, False, {}),
    "tdpo": ({"loss_type": "tdpo2"}, 21, False, {}),
    "tdpo lora": ({"loss_type": "tdpo1"}, 21, True, {}),
    "all pairs": ({"pair_policy": "all"}, 21, False, {"kway": True}),  # rows of differing K, differing pairs
    "lists": ({"loss_type": ["exo_rw", "dpo"]}, 21, False, {"kway": True}),
    "named": ({"loss_type": ["dpo", "sft", "ipo"]}, 21, False, {"named": True}),  # a loss a row
    "degrees": ({"loss_type": ["dpo", "degree_aux"]}, 21, False, {"named": True}),
    "reward": ({"loss_type": "reward", "beta": None, "pair_policy": "all"}, 21, False, {"kway": True, "reward": True}),
    "few prompts": ({"share_prompts": "always"}, 21, False, {"few_prompts": True}),  # trees of several rows
    "checkpointing": ({"gradient_checkpointing": True, "max_steps": 2}, 21, False, {}),
}
LAYOUTS: dict[str, tuple[int, dict]] = {
    "one": (1, {"per_device_train_batch_size": 8}),
    "ddp": (2, {"per_device_train_batch_size": 4}),
    "fsdp": (2, {"per_device_train_batch_size": 4, "fsdp": "full_shard"}),
}
STOPS = [("ddp", "on_train_begin", 0), ("ddp", "on_evaluate", 0), ("ddp", "on_log", 2), ("fsdp", "on_log", 2),
         ("ddp", "on_evaluate", 2), ("ddp", "on_save", 2)]  # fmt: skip
# A checkpoint of some ranks, taken up by others.
CHANGES = [("fsdp", "one"), ("one", "fsdp"), ("fsdp", "ddp"), ("ddp", "shard_grad_op")]
ADAM = {"optim": "adamw_torch", "learning_rate": 0.01, "save_steps": 3}


def _runs() -> dict[tuple[str, str], tuple[int, dict, dict]]:
    """(case, layout's name) -> (ranks, options, further arguments of `run`): everything that can be asked for."""
    runs: dict[tuple[str, str], tuple[int, dict, dict]] = {
        (case, name): (ranks, options, {})
        for case in CASES
        for name, (ranks, options) in LAYOUTS.items()
        if not (case.startswith(("tdpo", "degrees")) and name == "fsdp")  # refused
    }
    fsdp = LAYOUTS["fsdp"][1]
    grad_op = {**fsdp, "fsdp": "shard_grad_op"}
    accumulating = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    runs |= {
        ("dpo", "ddp accumulating"): (2, accumulating, {}),
        ("dpo", "fsdp on four"): (4, {**fsdp, "per_device_train_batch_size": 2}, {}),
        ("dpo", "shard_grad_op"): (2, grad_op, {}),
        ("dpo", "offload"): (2, {**fsdp, "fsdp_cpu_offload": True}, {}),
        ("dpo", "micro_batch"): (2, {**fsdp, "fsdp_gradients": "micro_batch", "max_tokens": 40}, {}),
        ("dpo", "counted"): (2, {**fsdp, "max_tokens": 40}, {"counts": True}),
        # Layers that stay gathered must not outlive what is written into the shards: a resume, and a moving reference.
        ("tr-dpo", "shard_grad_op"): (2, grad_op, {}),
    }
    # What a callback decides on one rank; ranks that part wait for each other until the time-out.
    for layout, event, step in STOPS:
        options = {**LAYOUTS[layout][1], "eval_steps": 1, "save_steps": 1, "ddp_timeout": 30, "eval_on_start": True}
        runs["dpo", f"{layout} stopped in {event} at {step}"] = (2, options, {"stops": (event, step)})
    # An optimiser with moments, half of the steps on each number of ranks.
    layouts = {**LAYOUTS, "shard_grad_op": (2, grad_op)}
    runs["dpo", "adam"] = (1, {**LAYOUTS["one"][1], **ADAM}, {})
    for before, after in CHANGES:
        ranks, options = layouts[after]
        first = (layouts[before][0], {**layouts[before][1], **ADAM, "max_steps": 3})
        runs["dpo", f"{before} to {after}"] = (ranks, {**options, **ADAM}, {"first": first})
    return runs


class StopsOne:
    """Decides on the last rank alone, in one event after `step` steps, that training stops."""

    def __init__(self, event: str, step: int):
        def handler(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
            control.should_training_stop |= last and state.global_step == step

        setattr(self, event, handler)


def run(case: str, ranks: int, options: dict, out: Path, counts: bool = False, stops: tuple = ()) -> None:
    """In a forked process: train, and leave the results in `out` on rank 0."""
    changes, rows, adapter, model = CASES[case]
    rest: dict[str, Any] = {}
    if adapter:
        import peft

        rest["peft_config"] = peft.LoraConfig(**{**LORA, "lora_dropout": 0.0})
    model = dict(model)
    if stops:
        rest["callbacks"] = [StopsOne(*stops)]
    dtype = model.pop("dtype", torch.float32)
    if "prev_model" in model:
        rest["prev_model"] = Toy.model(model.pop("prev_model"))
    make = Toy.kway_rows if model.pop("kway", False) else Toy.rows
    train = make(rows)
    if model.pop("few_prompts", False):
        train = [{**row, "prompt": train[k % 3]["prompt"]} for k, row in enumerate(train)]
    calls = _count_collectives() if counts else {}
    named_losses = changes["loss_type"] if model.pop("named", False) else []

    def named(rows: list[dict]) -> list[dict]:
        given = (
            [{**row, "loss": named_losses[k % len(named_losses)]} for k, row in enumerate(rows)]
            if named_losses
            else rows
        )
        return [{**row, "completion": row["chosen"], "degree": k // 2 % 4} if row.get("loss") == "degree_aux" else row
                for k, row in enumerate(given)]  # fmt: skip

    scalar = model.pop("reward", False)
    make_model = Toy.reward_model if scalar else Toy.model
    args = {"output_dir": str(out.parent / out.stem), **OPTIONS, **changes, **options}
    result = fastpo.train(
        make_model(**model).to(dtype), named(train), processing_class=Toy.tokenizer(), args=args,
        eval_dataset={"a": named(make(5, seed=1)), "b": named(make(2 if case == "kto" else 1, seed=2))}, **rest,
    )  # fmt: skip
    trained = dict(result.model.named_parameters())
    whole = {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in trained.items()}
    sizes = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in trained.values())
    if int(os.environ.get("RANK", 0)) == 0:
        saved = _load(Path(args["output_dir"]), adapter, make_model(**model).to(dtype), scalar)
        same = all(torch.equal(whole[n].to(p.dtype), p) for n, p in saved.named_parameters())
        logs = [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in result.log_history]
        torch.save({"weights": whole, "logs": logs, "local": sizes, "calls": calls, "saved": same}, out)


def _load(folder: Path, adapter: bool, base: torch.nn.Module, scalar: bool) -> torch.nn.Module:
    """What lies in output_dir, as its users read it."""
    if adapter:
        import peft

        return peft.PeftModel.from_pretrained(base, folder)
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return (AutoModelForSequenceClassification if scalar else AutoModelForCausalLM).from_pretrained(folder)


def _count_collectives() -> dict[str, int]:
    """Counts of the root's gathers and of all reductions, and of forward passes through the root."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    from fastpo.training.distributed import Root

    calls = {"root gathers": 0, "reductions": 0, "passes with gradient": 0, "steps": 0}
    gather, reduce, forward = group.foreach_all_gather, group.foreach_reduce, Root.forward

    def counted_gather(params, *args, **kwargs):
        if torch.is_grad_enabled() and any(p._module_info.param_name == "weight" and
                                           p._param_fqn.endswith("lm_head.weight") for p in params):  # fmt: skip
            calls["root gathers"] += 1
        return gather(params, *args, **kwargs)

    def counted_reduce(*args, **kwargs):
        calls["reductions"] += 1
        return reduce(*args, **kwargs)

    def counted_forward(self, work):
        out = forward(self, work)
        calls["passes with gradient"] += isinstance(out, torch.Tensor) and out.requires_grad
        return out

    group.foreach_all_gather, group.foreach_reduce, Root.forward = counted_gather, counted_reduce, counted_forward
    return calls


RUNS = _runs()


def main(folder: Path, case: str, layout: str) -> None:
    ranks, options, rest = RUNS[case, layout]
    if first := rest.pop("first", None):  # a run until step 3, whose checkpoint the other takes up
        wait(fork(first[0], folder, lambda: run(case, *first, folder / "first.pt")), folder)
        options = {**options, "resume_from_checkpoint": str(folder / "first" / "checkpoint-3")}
    wait(fork(ranks, folder, lambda: run(case, ranks, options, folder / "run.pt", **rest)), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
