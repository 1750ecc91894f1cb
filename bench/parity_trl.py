"""Step-by-step parity of fastpo.train with TRL's DPOTrainer, and of SimPO with a loop written out below.

    .venv-bench/bin/python bench/parity_trl.py [--case sigmoid ipo hinge shuffled simpo]

Needs the `bench` extra (TRL). A random fp32 Llama, 64 real HH pairs with implicit prompts, sequential order, AdamW with
weight decay, warm-up, a schedule and clipping; ten optimiser steps of 2 pairs x 4 accumulation steps, so the second
epoch begins at step 9. `shuffled` is sigmoid in TRL's default, seeded order. Every step is logged and compared; exit
code 1 if a deviation exceeds its limit.
"""

import argparse
import copy
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

import common
import torch
from torch.nn import functional as F

PAIRS, STEPS, BATCH, ACCUMULATION = 64, 10, 2, 4
MODEL = {"hidden": 64, "intermediate": 176, "layers": 2, "heads": 4}
VOCAB = 2_000
MAX_LENGTH = 344  # truncates some of the 64 pairs, drops none
OPTIONS = {
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "max_length": MAX_LENGTH,
}
SIMPO = {"beta": 2.0, "gamma_beta_ratio": 0.5}
CASES = {name: {"loss_type": name, "beta": 0.1} for name in ("sigmoid", "ipo", "hinge")} | {
    "shuffled": {"loss_type": "sigmoid", "beta": 0.1, "train_sampling_strategy": "random"},
    "simpo": {"loss_type": "simpo", **SIMPO},
}

# Limits: "relative" to the reference value of that step; "scale": to the largest magnitude of that metric's family over
# the run, since rewards start at zero; "absolute".
LIMITS = {
    "loss": ("relative", 1e-4),
    "grad_norm": ("relative", 1e-4),
    "learning_rate": ("relative", 1e-9),
    "num_tokens": ("absolute", 0.0),
    "epoch": ("absolute", 1e-9),
    "logps/chosen": ("relative", 1e-5),
    "logps/rejected": ("relative", 1e-5),
    "rewards/chosen": ("scale", 1e-3),
    "rewards/rejected": ("scale", 1e-3),
    "rewards/margins": ("scale", 1e-3),
    "rewards/accuracies": ("absolute", 1e-3),
}


def tokenizer_and_rows() -> tuple:
    rows = common.hh_rows(PAIRS)
    texts = [row[key] for row in rows for key in ("chosen", "rejected")]
    return common.bpe_tokenizer(texts, VOCAB), rows


def trl_trainer(model, rows, tokenizer, options: dict, output_dir: str):
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DPOTrainer

    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=common.trl_config(output_dir, **OPTIONS, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    if len(trainer.train_dataset) != PAIRS:
        raise RuntimeError(f"TRL kept {len(trainer.train_dataset)} of {PAIRS} rows: MAX_LENGTH is below a prompt")
    return trainer


def run_trl(model, rows, tokenizer, options: dict) -> list[dict]:
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = trl_trainer(model, rows, tokenizer, options, output_dir)
        trainer.train()
    return common.step_logs(trainer.state.log_history)


def run_simpo(model, rows, tokenizer) -> list[dict]:
    """SimPO from its formula, -log sigmoid(beta (mean logp_w - mean logp_l) - gamma), in plain padded PyTorch."""
    from transformers import get_scheduler

    with tempfile.TemporaryDirectory() as output_dir:
        dataset = trl_trainer(copy.deepcopy(model), rows, tokenizer, {}, output_dir).train_dataset
    beta, gamma = SIMPO["beta"], SIMPO["beta"] * SIMPO["gamma_beta_ratio"]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIONS["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},  # a Llama's norms
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIONS["learning_rate"])
    schedule = get_scheduler(OPTIONS["lr_scheduler_type"], optimizer, OPTIONS["warmup_steps"], STEPS)

    def response_logps(prompt: list[int], response: list[int]) -> tuple[torch.Tensor, int, int]:
        """(sum of the response's log-probabilities, its length, tokens of the sequence), alone in a batch of one."""
        ids = torch.tensor([(prompt + response)[:MAX_LENGTH]])
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        logp = logp.gather(1, ids[0, 1:, None]).squeeze(1)[len(prompt) - 1 :]
        return logp.sum(), logp.numel(), ids.numel()

    history, tokens, step_pairs = [], 0, BATCH * ACCUMULATION
    for step in range(STEPS):
        start = step * step_pairs % PAIRS
        sums = dict.fromkeys(("loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected"), 0.0)
        accurate = 0
        for row in dataset.select(range(start, start + step_pairs)):
            chosen, chosen_length, chosen_tokens = response_logps(row["prompt_ids"], row["chosen_ids"])
            rejected, rejected_length, rejected_tokens = response_logps(row["prompt_ids"], row["rejected_ids"])
            margin = chosen / chosen_length - rejected / rejected_length
            loss = -F.logsigmoid(beta * margin - gamma)
            (loss / step_pairs).backward()
            tokens += chosen_tokens + rejected_tokens
            accurate += int(margin > 0)
            values = (loss, chosen, rejected, beta * chosen / chosen_length, beta * rejected / rejected_length)
            for key, value in zip(sums, values, strict=True):
                sums[key] += value.item() / step_pairs
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIONS["max_grad_norm"])
        optimizer.step()
        learning_rate = schedule.get_last_lr()[0]
        schedule.step()
        optimizer.zero_grad()
        history.append(
            sums
            | {
                "grad_norm": norm.item(),
                "learning_rate": learning_rate,
                "num_tokens": tokens,
                "epoch": (step + 1) * step_pairs / PAIRS,
                "rewards/margins": sums["rewards/chosen"] - sums["rewards/rejected"],
                "rewards/accuracies": accurate / step_pairs,
            }
        )
    return history


def run_fastpo(model, rows, tokenizer, options: dict) -> list[dict]:
    import fastpo

    with tempfile.TemporaryDirectory() as output_dir:
        os.environ["FASTPO_CACHE"] = str(Path(output_dir) / "cache")  # the reference pass really runs
        args = common.fastpo_args(output_dir, **OPTIONS, **options)
        result = fastpo.train(model, rows, args=args, processing_class=tokenizer)
    return common.step_logs(result.log_history)


def compare(reference: list[dict], ours: list[dict], limits: dict = LIMITS) -> list[dict]:
    """Per metric the largest deviation over the steps, as its limit measures it, and whether it holds."""
    if len(reference) != len(ours):
        raise RuntimeError(f"{len(ours)} logged steps, expected {len(reference)}")
    scale = {}
    for name in limits:
        family = name.split("/")[0]
        scale[family] = max(abs(entry[key]) for entry in reference for key in limits if key.split("/")[0] == family)
    rows = []
    for name, (kind, limit) in limits.items():
        deviations = []
        for expected, got in zip(reference, ours, strict=True):
            if name not in got:
                deviations.append(float("nan"))
                continue
            unit = {"relative": abs(expected[name]), "scale": scale[name.split("/")[0]], "absolute": 1.0}[kind]
            difference = abs(got[name] - expected[name])
            deviations.append(difference / unit if difference else 0.0)
        worst = max(range(len(deviations)), key=lambda i: (deviations[i] != deviations[i], deviations[i]))
        rows.append(
            {
                "metric": name,
                "kind": kind,
                "limit": limit,
                "deviation": deviations[worst],
                "ok": deviations[worst] <= limit,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--verbose", action="store_true", help="print both runs step by step")
    args = parser.parse_args()
    common.need("trl", "datasets")
    common.quiet()
    tokenizer, rows = tokenizer_and_rows()
    initial = common.llama(len(tokenizer), **MODEL)

    report = {"environment": common.environment(), "setup": OPTIONS | MODEL | {"pairs": PAIRS}, "cases": {}}
    lines = ["| case | against | metric | largest deviation | limit | |", "| --- | --- | --- | ---: | ---: | --- |"]
    for case in args.case:
        if case == "simpo":
            against, reference = "formula", run_simpo(copy.deepcopy(initial), rows, tokenizer)
        else:
            against, reference = "TRL", run_trl(copy.deepcopy(initial), rows, tokenizer, CASES[case])
        ours = run_fastpo(copy.deepcopy(initial), rows, tokenizer, CASES[case])
        if args.verbose:
            for step, (expected, got) in enumerate(zip(reference, ours, strict=False), start=1):
                for name in LIMITS:
                    print(f"{case} step {step} {name}: {against} {expected[name]!r} fastpo {got.get(name)!r}")
        comparison = compare(reference, ours)
        report["cases"][case] = {
            "against": against,
            "comparison": comparison,
            "reference": reference,
            "fastpo": ours,
        }
        for row in comparison:
            verdict = "ok" if row["ok"] else "FAILED"
            lines.append(
                f"| {case} | {against} | {row['metric']} | {row['deviation']:.1e} {row['kind']} "
                f"| {row['limit']:.0e} | {verdict} |"
            )
    table = "\n".join(lines) + "\n"
    print(table)
    failed = any(not row["ok"] for entry in report["cases"].values() for row in entry["comparison"])
    if not args.no_write:
        print(f"written to {common.write_result('parity_trl', report, table)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
