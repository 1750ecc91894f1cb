"""Rows of a language model's head for bench/grad_filter.py, from a small model trained here on real text.

    python bench/grad_filter_rows.py --seconds 420 /tmp/rows.pt

No pretrained model is at hand without a network, so a Llama of two layers (hidden size 128, a byte-level BPE of up to
32,000 tokens) is trained for the time given on the texts of shared/data, but for a tenth of the dialogues: their
assistant turns are the rows. Its distributions are flatter than a large model's; grad_filter.py sharpens them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent))
import common  # noqa: E402

from fastpo import ops  # noqa: E402

VOCABULARY, HIDDEN, CONTEXT, BATCH = 32_000, 128, 256, 6
ROWS = 4096


def texts() -> tuple[list[str], list[str]]:
    """(texts to train on, held-out dialogues)."""
    dialogues = [row["chosen"] for row in common.hh_rows()]
    folder = Path(os.environ.get("FASTPO_BENCH_DATA", common.ROOT.parent / "shared" / "data"))
    with gzip.open(folder / "alpaca_eval_kway.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    answers = [f"Human: {r.get('instruction', r.get('prompt'))}\n\nAssistant: {a['text']}" for r in rows
               for a in (r["baseline"], *r["responses"])]  # fmt: skip
    held_out = dialogues[::10]
    return answers + [d.strip() for i, d in enumerate(dialogues) if i % 10], [d.strip() for d in held_out]


def train(seconds: float, seed: int = 0) -> dict[str, Tensor]:
    """hidden [ROWS, HIDDEN], weight [V, HIDDEN], target [ROWS] of held-out assistant turns, fp32."""
    torch.manual_seed(seed)
    train_texts, held_out = texts()
    tokenizer = common.bpe_tokenizer(train_texts, VOCABULARY)
    eos = tokenizer.eos_token_id
    ids = [[*t, eos] for t in tokenizer(train_texts)["input_ids"]]
    order = torch.randperm(len(ids)).tolist()
    stream = torch.tensor([token for i in order for token in ids[i]])
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    model = common.llama(len(tokenizer), hidden=HIDDEN, intermediate=384, layers=2, heads=4, seed=seed)
    counts = torch.bincount(stream, minlength=len(tokenizer)).float() + 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    started, step, losses = time.monotonic(), 0, []
    print(f"{len(stream)} tokens, {len(tokenizer)} in the vocabulary, unigram entropy "
          f"{-(counts / counts.sum() * (counts / counts.sum()).log()).sum():.2f}", flush=True)  # fmt: skip
    while (share := (time.monotonic() - started) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share))
        at = torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows)
        batch = windows[at]
        hidden = model.model(input_ids=batch).last_hidden_state[:, :-1].reshape(-1, HIDDEN)
        loss = -ops.linear_logprob(hidden, model.lm_head.weight, batch[:, 1:].reshape(-1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            print(f"step {step}: loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    return rows(model, tokenizer, held_out)


@torch.no_grad()
def rows(model, tokenizer, dialogues: list[str]) -> dict[str, Tensor]:
    hidden, target, count = [], [], 0
    for text in dialogues:
        for turn in re.finditer(r"Assistant:(.*?)(?=\n\nHuman:|$)", text, re.S):
            prompt = tokenizer(text[: turn.start(1)])["input_ids"]
            answer = tokenizer(turn.group(1))["input_ids"]
            if not prompt or not answer:
                continue
            ids = torch.tensor([(prompt + answer)[-2 * CONTEXT :]])
            keep = min(len(answer), ids.shape[1] - 1)
            states = model.model(input_ids=ids).last_hidden_state[0]
            hidden.append(states[-keep - 1 : -1])
            target.append(ids[0, -keep:])
            count += keep
            if count >= ROWS:
                break
        if count >= ROWS:
            break
    weight = model.lm_head.weight.detach().clone()
    return {"hidden": torch.cat(hidden)[:ROWS], "weight": weight, "target": torch.cat(target)[:ROWS]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--seconds", type=float, default=420)
    args = parser.parse_args()
    out = train(args.seconds)
    logp = ops.linear_logprob(out["hidden"], out["weight"], out["target"])
    print({k: list(v.shape) for k, v in out.items()}, "held-out NLL", -logp.mean().item())
    torch.save(out, args.path)
