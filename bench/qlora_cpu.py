"""QLoRA and 8-bit AdamW for real on the CPU: bytes before and after quantising, peak memory, and the loss falls.

    .venv/bin/python bench/qlora_cpu.py [--steps 16] [--mode lora qlora_nf4]

Needs the `peft` and `quant` extras (bitsandbytes 0.46 or newer). A random Llama of 61M parameters is saved in bf16 and
trained by fastpo.train with each mode in a fresh process: same rows, same order, same seed, gradient checkpointing on.
The chosen words come from one hundred words, the rejected ones from another, so that there is something to learn.
Bytes are sums over real tensors: weights with their quantisation scales, adapter, optimiser state (masters included).
Resident memory is that of the process over its imports, tokenizer and rows: the peak of loading, quantising and the
reference pass, what is left after them, and the peak of the steps. No timings: bitsandbytes' CPU path is slow.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

VOCAB = 8_000
MODEL = {"hidden": 640, "intermediate": 1792, "layers": 10, "heads": 10}
PAIRS = 8  # a step
# name: (bits of the base, adapter, optimiser, learning rate)
MODES = {
    "full": (16, False, "adamw_torch_fused", 5e-5),
    "full_8bit_adamw": (16, False, "adamw_8bit", 5e-5),
    "lora": (16, True, "adamw_torch_fused", 1e-3),
    "qlora_int8": (8, True, "adamw_8bit", 1e-3),
    "qlora_nf4": (4, True, "adamw_8bit", 1e-3),
}


def rows(count: int) -> list[dict]:
    import random

    rng = random.Random(0)

    def words(low: int, high: int, of: tuple[int, int]) -> str:
        return " ".join(f"w{rng.randrange(*of)}" for _ in range(rng.randint(low, high)))

    return [
        {"prompt": words(5, 20, (3, VOCAB)) + " ", "chosen": words(5, 20, (100, 200)),
         "rejected": words(5, 20, (200, 300))}
        for _ in range(count)
    ]  # fmt: skip


def weight_bytes(tensors) -> int:
    """Bytes of tensors, with the scales that 4-bit weights carry as an attribute."""
    total = 0
    for tensor in tensors:
        state = getattr(tensor, "quant_state", None)
        scales = [v for v in state.as_dict().values() if hasattr(v, "nbytes")] if state is not None else []
        total += tensor.nbytes + sum(v.nbytes for v in scales)
    return total


def worker(mode: str, base: str, steps: int, out: str) -> None:
    import bitsandbytes  # noqa: F401  (its import is no part of the memory measured)
    import common
    import peft
    import torch
    import transformers

    import fastpo
    from fastpo.models import adapters

    common.quiet()
    bits, adapter, optim, learning_rate = MODES[mode]
    quantization = {
        16: None,
        8: transformers.BitsAndBytesConfig(load_in_8bit=True),
        4: transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    }[bits]  # fmt: skip
    data, tokenizer = rows(PAIRS * steps), common.word_tokenizer(VOCAB)
    home = common.reset_peak_memory()
    seen: dict = {}

    class Memory(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            weights = adapters.base_tensors(model)
            seen["weight_bytes"] = weight_bytes(weights.values())
            names = adapters.all_tensors(model)
            seen["adapter_bytes"] = weight_bytes(t for n, t in names.items() if n not in weights)
            seen["loading_peak_bytes"] = common.peak_memory() - home
            seen["resident_bytes"] = common.reset_peak_memory() - home

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            seen["training_peak_bytes"] = common.peak_memory() - home
            stepped = [p for group in optimizer.param_groups for p in group["params"]]
            own = {p.data_ptr() for p in model.parameters()}
            state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
            seen["optimizer_bytes"] = sum(v.nbytes for v in state)
            seen["master_bytes"] = sum(p.nbytes for p in stepped if p.data_ptr() not in own)
            seen["trainable_parameters"] = sum(p.numel() for p in stepped)

    result = fastpo.train(
        base,
        data,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if adapter else None,
        quantization_config=quantization,
        callbacks=[Memory()],
        args=common.fastpo_args(
            os.environ["FASTPO_CACHE"] + "/out", optim=optim, learning_rate=learning_rate, num_train_epochs=1,
            per_device_train_batch_size=PAIRS, gradient_checkpointing=True, lr_scheduler_type="constant", report=False,
            guardrails=False, max_tokens=512,
        ),
    )  # fmt: skip
    seen["losses"] = [entry["loss"] for entry in common.step_logs(result.log_history)]
    Path(out).write_text(json.dumps(seen))


def spawn(mode: str, base: str, steps: int, threads: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        environment = os.environ | {"FASTPO_CACHE": folder, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # freed tensors leave the resident size
        command = [sys.executable, __file__, "--worker", mode, base, "--steps", str(steps), "--out", str(out)]
        subprocess.run(command, check=True, env=environment)
        return json.loads(out.read_text())


def markdown(report: dict) -> str:
    env = report["environment"]
    mb = lambda bytes_: f"{bytes_ / 1e6:,.0f}"  # noqa: E731
    lines = [
        f"fastpo {env['fastpo']}, bitsandbytes {env['bitsandbytes']}, peft {env['peft']}, torch {env['torch']}, "
        f"{env['machine']}. Llama, {report['parameters'] / 1e6:.0f}M parameters, saved in bf16; LoRA r=16 on all "
        f"linear layers, in fp32; DPO, {PAIRS} pairs a step, {report['steps']} steps. MB = 10^6 bytes.",
        "",
        "| mode | optimiser | base weights MB | adapter MB | optimiser + masters MB | peak MB to the first "
        "step | resident MB then | peak MB of the steps | loss: first | last 3 steps |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in report["modes"].items():
        sizes = [row["weight_bytes"], row["adapter_bytes"], row["optimizer_bytes"] + row["master_bytes"]]
        sizes += [row["loading_peak_bytes"], row["resident_bytes"], row["training_peak_bytes"]]
        lines.append(
            f"| {name} | {MODES[name][2]} | {' | '.join(map(mb, sizes))} "
            f"| {row['losses'][0]:.4f} | {sum(row['losses'][-3:]) / 3:.4f} |"
        )
    return "\n".join(lines) + "\n"


def failures(report: dict) -> list[str]:
    """A loss that does not start at ln 2 or does not fall; weights that are not smaller."""
    found, plain = [], report["modes"].get("lora", {}).get("weight_bytes")
    for name, row in report["modes"].items():
        first, last = row["losses"][0], sum(row["losses"][-3:]) / 3
        if abs(first - 0.6931) > 0.03:
            found.append(f"{name}: the first loss is {first:.4f}, not ln 2")
        if last > 0.9 * first:
            found.append(f"{name}: the loss goes from {first:.4f} to {last:.4f} only")
        # Embedding and head (17 % of the weights here) stay in 16 bits.
        ratio = {16: 1.0, 8: 0.62, 4: 0.40}[MODES[name][0]]
        if plain and row["weight_bytes"] > 1.01 * ratio * plain:
            found.append(f"{name}: {row['weight_bytes']} bytes of weights, more than {ratio} of the bf16 base")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=16, help="optimiser steps a run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--worker", nargs=2, metavar=("MODE", "BASE"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker, args.steps, args.out)
        return 0

    from importlib.metadata import version

    import common

    environment = common.environment() | {name: version(name) for name in ("bitsandbytes", "peft")}
    with tempfile.TemporaryDirectory() as base:
        model = common.llama(VOCAB, **MODEL).bfloat16()
        model.save_pretrained(base)
        parameters = sum(p.numel() for p in model.parameters())
        report = {"environment": environment, "parameters": parameters, "steps": args.steps, "modes": {}}
        del model
        for mode in args.mode:
            report["modes"][mode] = row = spawn(mode, base, args.steps, args.threads)
            print(f"{mode}: loss {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}, peak "
                  f"{row['training_peak_bytes'] / 1e6:,.0f} MB", flush=True)  # fmt: skip
    table = markdown(report)
    print("\n" + table)
    report["failures"] = failures(report)
    if not args.no_write:
        print(f"written to {common.write_result('qlora', report, table)}")
    for line in report["failures"]:
        print(f"FAILED {line}")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
