"""Step-by-step parity of fastpo.train with TRL's DPOTrainer on a real model: SmolLM2-135M-Instruct, real HH rows.

    make real                                   # makes the model; two steps of it are a test
    .venv/bin/python bench/parity_real.py [--case full lora] [--dtype float32 float64] [--steps 4] [--no-write]

2 pairs a step as conversations through the model's own chat template, sequential order, AdamW. Every step's loss,
rewards, log-probabilities and gradient norm are compared; exit code 1 beyond a limit. In fp64 nothing is left of
rounding, and the limits are what the two must agree to if they compute the same; in fp32 they allow what the order of
sums in a processor's GEMMs moves: a loss is of differences of sums of hundreds of nats.
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
_COUNTS = {
    "learning_rate": ("relative", 1e-9),
    "num_tokens": ("absolute", 0.0),
    "rewards/accuracies": ("absolute", 0.0),
}
_LOGPS = ("logps/chosen", "logps/rejected")
_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")  # relative to the largest of a run
# By dtype of the weights. fp32: on an Intel Xeon the losses were within 2e-6, on an AMD EPYC within 8e-6. fp64: both
# sides log fp32, and fastpo's reference log-probabilities are kept in fp32; on the EPYC losses were within 5e-7.
LIMITS: dict[str, dict[str, tuple[str, float]]] = {
    "float32": {"loss": ("relative", 1e-5), "grad_norm": ("relative", 1e-4)}
    | dict.fromkeys(_LOGPS, ("relative", 2e-6)) | dict.fromkeys(_REWARDS, ("scale", 1e-3)) | _COUNTS,
    "float64": {"loss": ("relative", 1e-6), "grad_norm": ("relative", 1e-6)}
    | dict.fromkeys(_LOGPS, ("relative", 2e-7)) | dict.fromkeys(_REWARDS, ("scale", 2e-6)) | _COUNTS,
}  # fmt: skip


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


def run(case: str, folder: Path, steps: int, dtype: str = "float32") -> tuple[list[dict], dict]:
    """(what `parity_trl.compare` returns, both runs' steps) of one case."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import DPOTrainer

    import fastpo

    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = rows(steps * OPTIONS["per_device_train_batch_size"])
    options = OPTIONS | {"max_steps": steps} | ({"learning_rate": 1e-3} if case == "lora" else {})

    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    with tempfile.TemporaryDirectory() as out:
        trainer = DPOTrainer(
            model=load(), ref_model=load() if case == "full" else None, args=common.trl_config(out, **options),
            train_dataset=Dataset.from_list(data), processing_class=tokenizer, peft_config=adapter(case),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        start = {
            n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad and case == "lora"
        }
        trainer.train()
        theirs = common.step_logs(trainer.state.log_history)
        del trainer
    with tempfile.TemporaryDirectory() as out:
        model = load()
        if case == "lora":
            from peft import get_peft_model

            model = get_peft_model(model, adapter(case))
            own = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in start.items():
                    own[name].copy_(value)
        result = fastpo.train(model, data, args=common.fastpo_args(out, **options), processing_class=tokenizer)
    ours = common.step_logs(result.log_history)
    return parity_trl.compare(theirs, ours, LIMITS[dtype]), {"TRL": theirs, "fastpo": ours}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--dtype", nargs="+", choices=tuple(LIMITS), default=list(LIMITS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        sys.exit(f"there is no model in {args.model}: python tests/real_model.py makes it")
    common.need("trl", "datasets")
    common.quiet()
    report = {"environment": common.environment(), "setup": OPTIONS | {"steps": args.steps}, "cases": {}}
    lines = ["| case | weights | metric | largest deviation | limit | |", "| --- | --- | --- | ---: | ---: | --- |"]
    failed = False
    for dtype in args.dtype:
        for case in args.case:
            comparison, runs = run(case, args.model, args.steps, dtype)
            report["cases"][f"{case} {dtype}"] = {"comparison": comparison} | runs
            failed |= any(not row["ok"] for row in comparison)
            for row in comparison:
                found = f"{row['deviation']:.1e} {row['kind']} | {row['limit']:.0e}"
                lines.append(f"| {case} | {dtype} | {row['metric']} | {found} | {'ok' if row['ok'] else 'FAILED'} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if not args.no_write:
        print(f"written to {common.write_result('parity_real', report, table)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
