"""What a trained parameter costs, and what 16-bit weights lose: bytes and loss for each way to step them.

    .venv/bin/python bench/optim_memory.py [--threads 1] [--steps 200]

Memory: a random Llama of 34M parameters, two optimiser steps, one fresh process a row. Bytes are those of the real
tensors, by storage: weights and master copies as kept; the optimiser's state; gradients as they lie after the backward
pass of a step of one micro-batch, and of two (which 16-bit weights accumulate in fp32); and the fp32 copies that exist
during the step alone. Peak RSS is over that of the process before the model is made, with every tensor in pages of its
own (MALLOC_MMAP_THRESHOLD_); it includes activations, equal in all rows of one dtype.

Quality: next-token training of a small Llama on the first HH dialogues from the same weights, rounded to bf16 once at
the start, with the same batches in bf16 arithmetic (autocast over fp32 weights). The loss is computed in fp32 with the
final weights on the data trained on, and given as the share of the fall that fp32 weights reach.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

OPTIMIZERS = ("adamw_torch_fused", "adamw_8bit")
MODES = ("fp32 weights", "fp32", "stochastic", "none")
MEMORY_MODEL = {"hidden": 512, "intermediate": 1408, "layers": 8, "heads": 8}
QUALITY_MODEL = {"hidden": 192, "intermediate": 512, "layers": 3, "heads": 4}
VOCAB = {"memory": 8192, "quality": 2048}
LEARNING_RATES = (1e-6, 1e-4)  # DPO's usual one, where updates are below bf16's spacing; and one a hundred times that
LENGTH, BATCH, SEQUENCES = 64, 8, 256


def build(mode: str, optim: str, model, learning_rate: float):
    """Model in the mode's dtype, its gradients and optimiser as the trainer makes them."""
    import torch

    from fastpo.config.train_config import TrainConfig
    from fastpo.training.optim import Gradients, build_optimizer

    model.to(torch.bfloat16)
    if mode == "fp32 weights":
        model.float()
    masters = "fp32" if mode == "fp32 weights" else mode
    gradients = Gradients(dict(model.named_parameters()), master_weights=masters, seed=0)
    config = TrainConfig(optim=optim, learning_rate=learning_rate, master_weights=masters)
    return gradients, build_optimizer(model, config, gradients)


def step(model, gradients, optimizer, batches, after_backward=None) -> None:
    """One optimiser step over micro-batches of token ids [B, L]."""
    import torch

    gradients.begin(len(batches))
    narrow = next(model.parameters()).dtype == torch.bfloat16
    for ids in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=not narrow):
            logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        (loss / len(batches)).backward()
        del logits, loss
    if after_backward is not None:
        after_backward()
    norm = gradients.clip_(1.0)
    gradients.step_(optimizer, torch.isfinite(norm))


def nbytes(tensors) -> int:
    """Bytes of the distinct storages of some tensors, None left out."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def measure_memory(mode: str, optim: str) -> dict:
    import common
    import torch

    import fastpo.training.optim

    # As small beside this model as they are beside one of some billions of parameters.
    fastpo.training.optim.CHUNK_BYTES, fastpo.training.optim.PIECE = 4 << 20, 1 << 18
    if "8bit" in optim:
        import bitsandbytes  # noqa: F401
    base_bytes = common.reset_peak_memory()
    model = common.llama(VOCAB["memory"], **MEMORY_MODEL)
    gradients, optimizer = build(mode, optim, model, 1e-6)
    parameters = list(model.parameters())
    held = {"gradients": 0, "step": 0}

    def grads() -> int:
        return nbytes([p.grad for p in parameters] + list(gradients.buffers.values()))

    def at_step(*_) -> None:
        copies = [gradients.stepped(p) for p in parameters if gradients.stepped(p) is not p]
        during = nbytes(copies) - nbytes(gradients.masters.values())
        converted = nbytes([p.grad for p in copies]) if gradients.scale is not None and not gradients.buffers else 0
        held["step"] = max(held["step"], during + converted)

    def after_backward() -> None:
        held["gradients"] = grads()

    optimizer.register_step_pre_hook(at_step)
    ids = torch.randint(VOCAB["memory"], (1, 32), generator=torch.Generator().manual_seed(0))
    step(model, gradients, optimizer, [ids], after_backward)
    one = dict(held)
    step(model, gradients, optimizer, [ids])
    peak_bytes = common.peak_memory() - base_bytes
    step(model, gradients, optimizer, [ids, ids], after_backward)
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return {
        "mode": mode,
        "optim": optim,
        "parameters": sum(p.numel() for p in parameters),
        "weights_bytes": nbytes(parameters),
        "masters_bytes": nbytes(gradients.masters.values()),
        "state_bytes": nbytes(state),
        "gradients_bytes": one["gradients"],
        "gradients_accumulated_bytes": held["gradients"],
        "step_bytes": one["step"],
        "peak_rss_bytes": peak_bytes,
        "peak_rss_accumulated_bytes": common.peak_memory() - base_bytes,
    }


def quality_data():
    """Token ids [SEQUENCES, LENGTH] of the first HH dialogues."""
    import common
    import torch

    texts = [row["chosen"] for row in common.hh_rows(400)]
    tokenizer = common.bpe_tokenizer(texts, VOCAB["quality"])
    ids = [i for text in texts for i in tokenizer(text)["input_ids"]]
    return torch.tensor(ids[: SEQUENCES * LENGTH]).view(SEQUENCES, LENGTH)


def measure_quality(mode: str, optim: str, learning_rate: float, steps: int) -> dict:
    import copy

    import common
    import torch

    data = quality_data()
    model = common.llama(VOCAB["quality"], **QUALITY_MODEL)
    gradients, optimizer = build(mode, optim, model, learning_rate)

    @torch.no_grad()
    def loss() -> float:
        wide = copy.deepcopy(model).float()
        logits = wide(input_ids=data).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten()).item()

    start = {n: p.detach().float().clone() for n, p in model.named_parameters()}
    before = loss()
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randperm(SEQUENCES, generator=order)[:BATCH]
        step(model, gradients, optimizer, [data[rows]])
    changed = sum((p.float() != start[n]).sum().item() for n, p in model.named_parameters())
    count = sum(p.numel() for p in model.parameters())
    return {
        "mode": mode,
        "optim": optim,
        "learning_rate": learning_rate,
        "steps": steps,
        "loss_before": before,
        "loss_after": loss(),
        "changed_weights": changed / count,
    }


def spawn(kind: str, threads: int, *what) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
            "MALLOC_MMAP_THRESHOLD_": "131072",
        }
        command = [sys.executable, __file__, "--worker", kind, str(path), *map(str, what)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"{kind} {what} failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
        return json.loads(path.read_text())


def markdown(report: dict) -> str:
    env = report["environment"]
    count = report["memory"][0]["parameters"]
    lines = [
        f"torch {env['torch']}, bitsandbytes {env['bitsandbytes']}, {env['machine']}, {report['threads']} thread(s). "
        f"Random Llama of {count / 1e6:.0f}M parameters; bytes per parameter, by the tensors that exist. The 8-bit "
        "state holds 32 bits for the embedding, as in transformers.",
        "",
        "| `master_weights` | `optim` | weights | masters | state | kept | gradients, 1 micro-batch | several | "
        "copies in the step | peak RSS, MB: 1 | several |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in report["memory"]:
        kept = [r[f"{k}_bytes"] / count for k in ("weights", "masters", "state")]
        rest = [r[f"{k}_bytes"] / count for k in ("gradients", "gradients_accumulated", "step")]
        cells = [f"{v:.1f}" for v in (*kept, sum(kept), *rest)]
        cells += [f"{r[k] / 1e6:.0f}" for k in ("peak_rss_bytes", "peak_rss_accumulated_bytes")]
        lines.append(f"| {label(r['mode'])} | {r['optim']} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Loss of a small Llama after {report['quality'][0]['steps']} steps on HH dialogues, from the same weights.",
        "",
        "| `master_weights` | `optim` | learning rate | loss before | after | of fp32's fall | weights that moved |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in report["quality"]:
        lines.append(
            f"| {label(r['mode'])} | {r['optim']} | {r['learning_rate']:g} | {r['loss_before']:.4f} "
            f"| {r['loss_after']:.4f} | {100 * r['share_of_fp32']:.1f}% | {100 * r['changed_weights']:.1f}% |"
        )
    return "\n".join(lines) + "\n"


def label(mode: str) -> str:
    return "(fp32 weights)" if mode == "fp32 weights" else f"{mode}, bf16 weights"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200, help="steps of the quality runs")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, path, mode, optim, *rest = args.worker
        if kind == "memory":
            result = measure_memory(mode, optim)
        else:
            result = measure_quality(mode, optim, float(rest[0]), int(rest[1]))
        Path(path).write_text(json.dumps(result))
        return 0

    from importlib.metadata import version

    import common

    environment = common.environment() | {"bitsandbytes": version("bitsandbytes")}
    report = {"environment": environment, "threads": args.threads, "memory": [], "quality": []}
    for optim in OPTIMIZERS:
        for mode in MODES:
            report["memory"].append(spawn("memory", args.threads, mode, optim))
            print(report["memory"][-1], flush=True)
    for optim in OPTIMIZERS:
        for learning_rate in LEARNING_RATES:
            for mode in MODES:
                result = spawn("quality", args.threads, mode, optim, learning_rate, args.steps)
                report["quality"].append(result)
                exact = report["quality"][-1 - MODES.index(mode)]
                fall = exact["loss_before"] - exact["loss_after"]
                result["share_of_fp32"] = (result["loss_before"] - result["loss_after"]) / fall
                print(result, flush=True)
    table = markdown(report)
    print("\n" + table)
    if not args.no_write:
        print(f"written to {common.write_result('optim_memory', report, table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
