"""The packer: time for a million trees, how full its micro-batches are, and what passes through the trunk.

    PYTHONSAFEPATH=1 .venv/bin/python bench/packer.py [--trees 1000000]

Lengths are those of ../shared/data (FASTPO_BENCH_DATA: another folder) under a byte-level BPE trained on each set's own
texts: HH dialogues as pairs, AlpacaEval's eight responses a prompt with all their pairs, and the same as a data set of
pairs, seven rows a prompt (the best response against each other). Rows are packed in the order of the file. Without the
data only the part on synthetic lengths runs.

Writes bench/results/<machine>/packer.json and .md. Exits with 1 where the million takes a second or more, where C++ and
Python differ, or where micro-batches are more than 1% above the lower bound in steps that have at least 100 of them.
"""

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import common  # noqa: E402
import numpy as np  # noqa: E402

from fastpo.data import Example, packer, prepare_examples
from fastpo.data.kway import Forming
from fastpo.data.packing import TrunkCost, sequence_tokens, set_sharing, step_batches, step_trees, tree_size

VOCAB = 32_000
BUDGETS = (2_048, 16_384)  # the defaults on a CPU and on a GPU
COST = TrunkCost(token=6.3e6, pair=12 * 256)  # of the Llama of the other benchmarks: D = 256
MAX_LENGTH = 1_024
TWIN_TREES = 100_000


def kway_rows() -> list[dict]:
    folder = Path(os.environ.get("FASTPO_BENCH_DATA", common.ROOT.parent / "shared" / "data"))
    with gzip.open(folder / "alpaca_eval_kway.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [
        {
            "prompt": row["prompt"] + "\n\n",
            "responses": [{"text": r["text"], "win_prob": r["win_prob_vs_baseline"]} for r in row["responses"]],
        }
        for row in rows
    ]


def as_pairs(rows: list[dict]) -> list[dict]:
    """One row a pair: the best response of each prompt against every other."""
    out = []
    for row in rows:
        best = max(row["responses"], key=lambda r: r["win_prob"])
        others = [r for r in row["responses"] if r is not best and r["text"] != best["text"]]
        out += [{"prompt": row["prompt"], "chosen": best["text"], "rejected": r["text"]} for r in others]
    return out


def datasets() -> dict[str, tuple[list[Example], int]]:
    """name -> (examples, rows of a step)."""
    hh, kway = common.hh_rows(), kway_rows()
    hh_tokenizer = common.bpe_tokenizer([row[k] for row in hh for k in ("chosen", "rejected")], VOCAB)
    kway_tokenizer = common.bpe_tokenizer([r["text"] for row in kway for r in row["responses"]], VOCAB)
    sets = {
        "HH pairs": (hh, hh_tokenizer, {}, 16),
        "AlpacaEval K = 8, all pairs": (kway, kway_tokenizer, {"forming": Forming("all")}, 16),
        "AlpacaEval as pairs, 7 a prompt": (as_pairs(kway), kway_tokenizer, {}, 16),
    }
    return {
        name: (prepare_examples(rows, tokenizer, max_length=MAX_LENGTH, invalid="drop", **rest)[0], step)
        for name, (rows, tokenizer, rest, step) in sets.items()
    }


def trl_tokens(examples: list[Example], step: int) -> int:
    """Tokens of TRL's batches of `step` pairs: prompt and response of both, padded to the longest of the batch."""
    pairs = [max(len(e.prompt_of(k)) + len(e.responses[k]) for k in pair) for e in examples for pair in e.pairs]
    return sum(2 * len(part) * max(part) for part in (pairs[i : i + step] for i in range(0, len(pairs), step)))


def trunk(examples: list[Example], step: int) -> dict:
    """Tokens through the trunk in one epoch of steps of `step` rows."""
    out = {"pairs": sum(len(e.pairs) for e in examples), "trl padded": trl_tokens(examples, step)}
    set_sharing(examples, "never", COST)
    out["unshared"] = sum(tree_size([e], False).tokens for e in examples)
    set_sharing(examples, "auto", COST)
    out["shared by row"] = sum(tree_size([e], e.share).tokens for e in examples)
    out["grouped"] = sum(
        tree_size([examples[i] for i in tree], len(tree) > 1 or examples[tree[0]].share).tokens
        for start in range(0, len(examples), step)
        for tree in step_trees(examples, range(start, min(start + step, len(examples))), BUDGETS[1])
    )
    out["with prompts and responses"] = sum(map(sequence_tokens, examples))
    return out


def fullness(examples: list[Example], step: int, budget: int) -> dict:
    """Micro-batches of an epoch, how full, and how many there must be at least."""
    set_sharing(examples, "auto", COST)
    batches = least = proved = steps = tokens = 0
    seconds = []
    for start in range(0, len(examples), step):
        rows = range(start, min(start + step, len(examples)))
        before = time.perf_counter()
        (parts,) = step_batches(examples, rows, budget, COST)
        seconds.append(time.perf_counter() - before)
        trees = step_trees(examples, rows, budget)
        sizes = [tree_size([examples[i] for i in tree], len(tree) > 1 or examples[tree[0]].share) for tree in trees]
        bound = packer.lower_bound(np.sort([s.size for s in sizes])[::-1], budget)
        batches, least, tokens = batches + len(parts), least + bound, tokens + sum(s.tokens for s in sizes)
        proved += len(parts) == bound
        steps += 1
    return {
        "rows a step": step, "max_tokens": budget, "steps": steps, "micro-batches": batches, "lower bound": least,
        "gap": batches / least - 1, "steps at the bound": proved, "efficiency": tokens / (batches * budget),
        "efficiency at the bound": tokens / (least * budget), "ms a step": 1e3 * statistics.median(seconds),
    }  # fmt: skip


def million(name: str, lengths: np.ndarray, trees: int, budget: int) -> dict:
    """Trees drawn from `lengths`, with replacement: C++, and the twin on fewer."""
    rng = np.random.default_rng(0)
    sizes = rng.choice(lengths[lengths <= budget], trees)
    out = {"lengths": name, "max_tokens": budget, "trees": trees, "mean": float(sizes.mean())}
    compiled = packer.COMPILED
    fewer = sizes[:TWIN_TREES]
    packed = {}
    for label, module, values in (
        ("c++", compiled, sizes),
        ("c++ fewer", compiled, fewer),
        ("python fewer", None, fewer),
    ):
        if module is None and label != "python fewer":
            continue
        packer.COMPILED = module
        times = []
        for _ in range(3 if module is not None else 1):
            before = time.perf_counter()
            packed[label] = packer.pack_step(range(len(values)), values, budget)[0]
            times.append(time.perf_counter() - before)
        out[f"{label} s"] = min(times)
    packer.COMPILED = compiled
    if compiled is not None:
        before = time.perf_counter()
        descending = sizes[packer._descending(sizes)]
        packer._pack(descending, descending, budget, 1)
        out["c++ without lists s"] = time.perf_counter() - before
        out["same"] = packed["c++ fewer"] == packed["python fewer"]
        bins, bound = len(packed["c++"]), packer.lower_bound(descending, budget)
        out |= {"micro-batches": bins, "lower bound": bound, "gap": bins / bound - 1,
                "efficiency": float(sizes.sum()) / (bins * budget)}  # fmt: skip
    return out


def table(rows: list[dict], columns: list[str]) -> list[str]:
    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

    if not rows:
        return ["(no data)"]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return lines + ["| " + " | ".join(cell(row.get(c, "")) for c in columns) + " |" for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trees", type=int, default=1_000_000)
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    lengths = {"log-normal, median 245": np.clip(rng.lognormal(5.5, 0.8, 100_000), 10, 2_048).astype(np.int64)}
    skipped, tokens, full = None, [], []
    try:
        sets = datasets()
    except FileNotFoundError as error:
        sets, skipped = {}, f"no real data here: {error.filename}"
        print(skipped)
    for name, (examples, step) in sets.items():
        tokens.append({"data": name, "rows": len(examples), **trunk(examples, step)})
        lengths[name] = np.array([tree_size([e], e.share).tokens for e in examples])
        for budget in BUDGETS:
            for rows in (step, 128, len(examples)):
                full.append({"data": name, **fullness(examples, rows, budget)})
    timed = [million(name, values, args.trees, budget) for name, values in lengths.items() for budget in BUDGETS]

    enough = [row for row in full if row["lower bound"] / row["steps"] >= 100]
    checks = {
        "a million in under a second": all(row.get("c++ s", 0) < 1 for row in timed),
        "C++ and Python alike": all(row.get("same", True) for row in timed),
        "within 1% of the lower bound": all(row["gap"] <= 0.01 for row in enough),
    }
    columns = ["trl padded", "unshared", "shared by row", "grouped"]
    for row in tokens:
        row |= {f"trl / {c}": row["trl padded"] / row[c] for c in columns[1:]}
    markdown = [
        f"Packer, {common.machine_name()}, one thread. Tokens through the trunk in one epoch, steps of 16 rows, "
        f"max_length {MAX_LENGTH}.", "",
        *table(tokens, ["data", "rows", "pairs", *columns, *(f"trl / {c}" for c in columns[1:])]), "",
        "How full micro-batches are: real tokens over micro-batches times max_tokens. The lower bound is Martello and "
        "Toth's; where a step is at it, its packing is proved the best.", "",
        *table(full, ["data", "rows a step", "max_tokens", "steps", "micro-batches", "lower bound", "gap",
                      "steps at the bound", "efficiency", "efficiency at the bound", "ms a step"]), "",
        f"{args.trees:,} trees of lengths drawn from each set (those within the budget), and the first {TWIN_TREES:,} "
        "of them in C++ and in Python. Seconds, the least of three; with and without Python lists of the result.", "",
        *table(timed, ["lengths", "max_tokens", "mean", "c++ s", "c++ without lists s", "c++ fewer s", "python fewer s",
                       "same", "micro-batches", "lower bound", "gap", "efficiency"]), "",
    ]  # fmt: skip
    if skipped:
        markdown.append(skipped)
    result = {"environment": common.environment(), "skipped": skipped, "tokens": tokens, "fullness": full,
              "million": timed, "checks": checks}  # fmt: skip
    text = "\n".join(markdown)
    print(text)
    print(checks)
    print(common.write_result("packer", result, text))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
