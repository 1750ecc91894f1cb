"""Step-by-step parity of fastpo.train with TRL's DPOTrainer on a real model: SmolLM2-135M-Instruct, real HH rows.

    make real                                   # makes the model; two steps of it are a test
    .venv/bin/python bench/parity_real.py [--case full lora] [--steps 4] [--no-write]

fp32 weights by path, 2 pairs a step as conversations through the model's own chat template, sequential order, AdamW.
Every step's loss, rewards, log-probabilities and gradient norm are compared; exit code 1 beyond a limit.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

import common
import parity_trl
import torch

FOLDER = common.ROOT / "runs" / "SmolLM2-135M-Instruct"
OPTIONS = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "max_length": 512,
    "beta": 0.1,
}
# As in parity_trl.py. Rewards are beta times a difference of sums of hundreds of nats: relative to the largest one.
LIMITS = {
    "loss": ("relative", 2e-6),
    "grad_norm": ("relative", 1e-4),
    "learning_rate": ("relative", 1e-9),
    "num_tokens": ("absolute", 0.0),
    "logps/chosen": ("relative", 2e-6),
    "logps/rejected": ("relative", 2e-6),
    "rewards/chosen": ("scale", 1e-3),
    "rewards/rejected": ("scale", 1e-3),
    "rewards/margins": ("scale", 1e-3),
    "rewards/accuracies": ("absolute", 0.0),
}


def turns(text: str) -> list[dict]:
    """The turns of an HH dialogue."""
    out = []
    for part in text.split("\n\nHuman: ")[1:]:
        user, *answers = part.split("\n\nAssistant: ")
        out.append({"role": "user", "content": user.strip()})
        out += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return out


def rows(count: int) -> list[dict]:
    """Dialogues of at most 900 characters whose answers are not empty: explicit prompts, as turns."""
    out = []
    for row in common.hh_rows():
        chosen, rejected = turns(row["chosen"]), turns(row["rejected"])
        short = len(row["chosen"]) < 900 and len(row["rejected"]) < 900
        if short and chosen[:-1] == rejected[:-1] and all(t["content"] for t in (*chosen, rejected[-1])):
            out.append({"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]})
    return out[:count]


def adapter(case: str):
    """A new LoRA adapter, or None. Its B is zero and its A drawn from the seed, so that both sides begin alike."""
    if case == "full":
        return None
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def run(case: str, folder: Path, steps: int) -> tuple[list[dict], dict]:
    """(what `parity_trl.compare` returns, both runs' steps) of one case."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback
    from trl import DPOTrainer

    import fastpo

    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = rows(steps * OPTIONS["per_device_train_batch_size"])
    options = OPTIONS | {"max_steps": steps} | ({"learning_rate": 1e-3} if case == "lora" else {})
    with tempfile.TemporaryDirectory() as out:
        trainer = DPOTrainer(
            model=str(folder), args=common.trl_config(out, **options), train_dataset=Dataset.from_list(data),
            processing_class=tokenizer, peft_config=adapter(case),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        start = {
            n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad and case == "lora"
        }
        trainer.train()
        theirs = common.step_logs(trainer.state.log_history)
        del trainer
    with tempfile.TemporaryDirectory() as out:
        model = folder
        if case == "lora":
            from peft import get_peft_model
            from transformers import AutoModelForCausalLM

            model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), adapter(case))
            own = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in start.items():
                    own[name].copy_(value)
        result = fastpo.train(model, data, args=common.fastpo_args(out, **options), processing_class=tokenizer)
    ours = common.step_logs(result.log_history)
    return parity_trl.compare(theirs, ours, LIMITS), {"TRL": theirs, "fastpo": ours}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        sys.exit(f"there is no model in {args.model}: python tests/real_model.py makes it")
    common.need("trl", "datasets")
    common.quiet()
    report = {"environment": common.environment(), "setup": OPTIONS | {"steps": args.steps}, "cases": {}}
    lines = ["| case | metric | largest deviation | limit | |", "| --- | --- | ---: | ---: | --- |"]
    failed = False
    for case in args.case:
        comparison, runs = run(case, args.model, args.steps)
        report["cases"][case] = {"comparison": comparison} | runs
        failed |= any(not row["ok"] for row in comparison)
        lines += [f"| {case} | {row['metric']} | {row['deviation']:.1e} {row['kind']} | {row['limit']:.0e} | "
                  f"{'ok' if row['ok'] else 'FAILED'} |" for row in comparison]  # fmt: skip
    table = "\n".join(lines) + "\n"
    print(table)
    if not args.no_write:
        print(f"written to {common.write_result('parity_real', report, table)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
