"""AutoRule whole, on the quickstart's task: rules from explained preferences, a reward model, GRPO on both.

    python bench/autorule_recorded.py                    # the recipe, and the reward model alone; writes the results
    python bench/autorule_recorded.py --seeds 0 --no-write

`fastpo iterate` runs the recipe autorule_grpo over a server with an OpenAI-compatible interface, which this script
starts on the loopback: as the teacher of the three rounds (justify, extract, merge) and as the judge of each rule. No
reasoning model stands behind it. The teacher's replies are recorded in autorule_recorded_answers.json, where they were
written by hand; the judge checks the three rules by a function. What is shown is that the parts fit and that the reward
does what it says, not what a reasoning model would find.

The start is the quickstart's supervised model, which works a quarter of its answers out and guesses the others. The
reward model is trained here, by loss_type=reward, on pairs of the start's own right and wrong answers. Accuracy is
exact match on 1,000 held-out problems, four sampled answers each.
"""

import argparse
import http.server
import json
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

import common  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from loop_quickstart import accuracy, supervised  # noqa: E402

import fastpo  # noqa: E402
from fastpo import quickstart as qs  # noqa: E402

RECORDED = json.loads((Path(__file__).parent / "autorule_recorded_answers.json").read_text(encoding="utf-8"))
STEPS, PROMPTS, GROUP = 40, 16, 8  # of a step
PAIRS = 768  # problems that the reward model's pairs are sampled for
ARMS = {"reward + rules": ["reward", "rules"], "reward alone": ["reward"]}


def keeps(rule: str, answer: str) -> bool:
    """The judge: whether an answer follows one of the three rules."""
    totals, _, verdict = answer.rpartition("=")
    if rule == RECORDED["merge"][0]:
        return len(totals) >= qs.DIGITS - 1 and totals.isdigit()
    if rule == RECORDED["merge"][1]:
        return bool(re.search(r"=(odd|even)$", answer))
    if rule == RECORDED["merge"][2]:
        return totals[-1:].isdigit() and verdict == ("odd" if int(totals[-1]) % 2 else "even")
    raise ValueError(f"no rule of these: {rule!r}")


def reply_to(text: str) -> tuple[str, str]:
    """(round, what is said) to a question of the templates in fastpo/loop/templates and fastpo/scoring/templates."""
    if "Does the answer follow the rule?" in text:
        rule, answer = (re.search(rf"<{n}>\n(.*?)\n</{n}>", text, re.DOTALL) for n in ("rule", "answer"))
        assert rule and answer
        return "judge", "Yes" if keeps(rule[1], answer[1]) else "No"
    if "collected from many comparisons" in text:
        return "merge", json.dumps(RECORDED["merge"])
    [name] = [pair["id"] for pair in RECORDED["pairs"] if pair["prompt"] in text]
    if "Write down the rules" in text:
        assert RECORDED["justify"][name] in text  # what is extracted from is what was said
        return "extract", json.dumps(RECORDED["extract"][name])
    return "justify", RECORDED["justify"][name]


class Server:
    """The server; `asked` counts its requests by round."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": "recorded"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if self.path != "/v1/chat/completions":
                    return self.reply(404, {"error": {"message": "chats only"}})
                kind, said = reply_to(body["messages"][-1]["content"])
                outer.asked[kind] = outer.asked.get(kind, 0) + 1
                message = {"role": "assistant", "content": said}
                self.reply(200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

            def reply(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def common_options(**more: Any) -> dict[str, Any]:
    return {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "report": False,
            "optim": "adamw_torch", "save_strategy": "no", **more}  # fmt: skip


def reward_model(start: Path, folder: Path, problems: list[str], seed: int) -> float:
    """A reward model in `folder`, of the start's right answers over its wrong ones; its accuracy on others."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    model = transformers.AutoModelForCausalLM.from_pretrained(start).eval()
    asked = [p for p in problems for _ in range(4)]
    answers = qs.sample_answers(model, tokenizer, asked, seed)
    rows = []
    for k, problem in enumerate(problems):
        own = answers[4 * k : 4 * k + 4]
        right, wrong = ([a for a in own if qs.is_right(problem, a) is is_so] for is_so in (True, False))
        if right and wrong:
            rows.append({"prompt": qs.prompt_of(problem), "chosen": right[0], "rejected": wrong[0]})
    kept = len(rows) // 8
    result = fastpo.train(
        str(start), rows[kept:], eval_dataset=rows[:kept], eval_strategy="epoch", loss_type="reward", seed=seed,
        output_dir=str(folder), learning_rate=1e-3, num_train_epochs=4, per_device_train_batch_size=32,
        **common_options(),
    )  # fmt: skip
    return float(next(line["eval_accuracy"] for line in reversed(result.log_history) if "eval_accuracy" in line))


def one_run(names: list[str], server: Server, root: Path, folder: Path, asked: list[str], seed: int) -> dict[str, Any]:
    judge = {"base_url": server.url, "model": "recorded", "concurrency": 8, "max_tokens": 16}
    pairs = root / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in RECORDED["pairs"]), encoding="utf-8")
    teacher = {"engine": "openai", "base_url": server.url, "model": "recorded"}
    scorers: dict[str, Any] = {"reward": {"kind": "reward_model", "model": str(root / "reward")}}
    options: dict[str, Any] = {
        "recipe": "autorule_grpo", "model": str(root / "start"), "output_dir": str(folder), "seed": seed,
        "prompts": [{"id": p, "prompt": qs.prompt_of(p)} for p in asked], "scorers": scorers,
        "train": common_options(
            reward_funcs=names, num_generations=GROUP, per_device_train_batch_size=PROMPTS * GROUP, max_steps=STEPS,
            max_completion_length=qs.ANSWER_TOKENS, learning_rate=2e-4, beta=0.05, logging_steps=1, seed=seed,
            warmup_steps=4, lr_scheduler_type="linear",
        ),
    }  # fmt: skip
    if "rules" in names:
        options["prepare"] = {"rules": {"pairs": str(pairs), "n": len(RECORDED["pairs"]), "teacher": teacher}}
        scorers["rules"] = {"kind": "rules", "rules": "rules.json", "judge": judge}
    before, began = dict(server.asked), time.perf_counter()
    result = fastpo.iterate(options)
    seconds = time.perf_counter() - began
    lines = [json.loads(x) for x in (folder / "iter-001/train/metrics.jsonl").read_text().splitlines()]
    keys = ["reward", *(f"rewards/{name}/mean" for name in names), "kl", "completions/mean_length"]
    rules = folder / "prepare/rules/rules.json"
    return {
        "seed": seed, "rewards": names, "seconds": seconds, "policy": result.policies["iterate-1"],
        "curve": [{"step": x["step"], **{k: x[k] for k in keys if k in x}} for x in lines if "reward" in x],
        "rules": json.loads(rules.read_text()) if rules.exists() else [],
        "asked": {kind: n - before.get(kind, 0) for kind, n in server.asked.items() if n > before.get(kind, 0)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    server, runs = Server(), []
    with tempfile.TemporaryDirectory() as work:
        for seed in args.seeds:
            root = Path(work) / f"seed-{seed}"
            asked, heldout = supervised(root, seed)
            right = reward_model(root / "start", root / "reward", asked[:PAIRS], seed)
            start = accuracy(str(root / "start"), heldout, seed)
            print(f"seed {seed}: start {start:.1%}, reward model right on {right:.1%} of other pairs", flush=True)
            for arm in args.arms:
                run = one_run(ARMS[arm], server, root, root / arm.replace(" ", "-"), asked[PAIRS:], seed)
                run |= {"arm": arm, "before": start, "after": accuracy(run.pop("policy"), heldout, seed)}
                runs.append(run | {"reward model": right})
                print(f"seed {seed} {arm}: {start:.1%} -> {run['after']:.1%}, {run['seconds']:.0f} s", flush=True)
    server.close()
    table = report(runs)
    print("\n" + table)
    if not args.no_write:
        result = {"environment": common.environment(), "runs": runs}
        print(f"written to {common.write_result('autorule_recorded', result, table)}")


def report(runs: list[dict[str, Any]]) -> str:
    first = next((r for r in runs if r["rules"]), None)
    seeds = sorted({r["seed"] for r in runs})
    lines = [
        f"{common.machine_name()}: AutoRule on the quickstart's task by `fastpo iterate` with the recipe "
        f"autorule_grpo, {STEPS} steps of {PROMPTS} prompts with {GROUP} responses; seed "
        f"{', '.join(map(str, seeds))}. The teacher's replies are recorded and were written by hand, "
        "and the judge of the rules is a function, both behind a server "
        "on the loopback: no reasoning model has been asked. Exact match of sampled answers to "
        f"{qs.FULL.heldout:,} held-out problems.", "",
        "| rewards | before | after | reward at first | reward at last | rules kept at first | rules kept at last |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for arm in dict.fromkeys(r["arm"] for r in runs):
        own = [r for r in runs if r["arm"] == arm]

        def mean(key: str, last: bool, own: list[dict[str, Any]] = own) -> str:
            """Of four steps at an end of the curve."""
            found = [x[key] for r in own for x in (r["curve"][-4:] if last else r["curve"][:4]) if key in x]
            return f"{statistics.fmean(found):.2f}" if found else ""

        ends = [statistics.fmean(r[end] for r in own) for end in ("before", "after")]
        cells = [*(f"{e:.1%}" for e in ends), *(mean(k, last) for k in ("reward", "rewards/rules/mean")
                 for last in (False, True))]  # fmt: skip
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    right = statistics.fmean(r["reward model"] for r in runs)
    lines += ["", f"The reward model is right on {right:.1%} of the pairs that were kept from it."]
    if first is not None:
        counts = ", ".join(f"{kind} {n:,}" for kind, n in first["asked"].items())
        lines += ["", f"Requests to the server, one of them to see how it is asked: {counts}. Rules:", "",
                  *(f"{k}. {rule}" for k, rule in enumerate(first["rules"], 1))]  # fmt: skip
        curve = first["curve"]
        shown = [x for x in curve if x["step"] == 1 or x["step"] % 5 == 0]
        rows = {"reward": "reward", "r_theta": "rewards/reward/mean", "rules": "rewards/rules/mean"}
        lines += ["", "| step | " + " | ".join(str(x["step"]) for x in shown) + " |",
                  "| --- |" + " ---: |" * len(shown),
                  *(f"| {label} | " + " | ".join(f"{x[key]:.2f}" for x in shown) + " |"
                    for label, key in rows.items())]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
