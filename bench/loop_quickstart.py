"""Every recipe of `fastpo iterate` on the quickstart's task: two iterations from a supervised model.

    python bench/loop_quickstart.py                                  # all recipes, three seeds
    python bench/loop_quickstart.py --recipe sppo inpo --seeds 0     # some of them, one seed
    python bench/loop_quickstart.py --judge random --add             # beside these, with verdicts drawn at random

The task is the quickstart's (fastpo/quickstart.py), and so is the judge: is the sum of six digits odd or even? The
start answers carefully in a quarter of the cases and guesses in the others. Accuracy is exact match on 1,000 held-out
problems, four sampled answers each. What a recipe needs beside the judge stands in its place as LOOP says: a gold
response is the worked answer, a user's text is the worked answer, a prefix is a digit that the start was shown with
careful or careless answers. The control has the same recipe, rows and steps, and a judge whose verdicts are drawn.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

import common  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import fastpo  # noqa: E402
from fastpo import quickstart as qs  # noqa: E402
from fastpo.sampling.items import Request, Response, Unit, Verdict, seed_of  # noqa: E402

PROMPTS, STEPS, BATCH = 768, 20, 64  # of each iteration
ITERATIONS = 2
GOOD, BAD, AGAIN = "9", "8", ":"  # before a prompt, and behind an answer that is to be refined
AT_GOAL = {"reward_augmented": "1:"}  # what is asked for when the policy is measured


def problem_of(prompt: str) -> str:
    """The six digits before the first colon, whatever stands before them."""
    return prompt.partition(":")[0][-qs.DIGITS :]


def right(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    """The judge: 1 for the right verdict, 0 for another."""
    return float(qs.is_right(problem_of(prompt), response))


def at_random(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    """The control's."""
    return float(seed_of("control", prompt, response) % 2)


def worked(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    return float(qs.is_worked(response))


def ends_in_a_verdict(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    return float(response.rpartition("=")[2] in ("odd", "even"))


def against_reference(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    """PUGC's: whether the response ends as the user's text does."""
    return float(response.rpartition("=")[2] == meta["reference_text"].rpartition("=")[2])


class Asker:
    """Instruct-SkillMix's teacher: it writes a problem that the start has not seen, with the worked answer."""

    exact, key = True, {"teacher": "quickstart"}

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        return [list(requests)]

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Response]]:
        for request in requests:
            problem = f"{seed_of(request.id) % 10**qs.DIGITS:0{qs.DIGITS}d}"
            text = f"### Instruction:\n{qs.prompt_of(problem)}\n### Response:\n{qs.careful_answer(problem)}"
            yield request, Response(text)

    def close(self) -> None:
        pass


class Pairs:
    """A judge of pairs by one of responses: 1 to the better one, a half to equals."""

    unit, exact, cached = "pair", True, False

    def __init__(self, score: Callable[[str, str, Mapping[str, Any]], float], name: str = "judge"):
        self.score_one, self.name = score, name
        self.key = {"pairs by": score.__qualname__}

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        for unit in units:
            a, b = (self.score_one(str(unit.item.prompt), r.text, unit.item.meta) for r in unit.responses)
            yield unit, Verdict(0.5 + 0.5 * ((a > b) - (a < b)))

    def close(self) -> None:
        pass


def graded(score: Callable[..., float]) -> Callable[..., float]:
    """DNO-Prct's scale of six points: five for a right answer, one for working."""

    def points(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
        return 5 * score(prompt, response, meta) + worked(prompt, response, meta)

    return points


def noisy(score: Callable[..., float], seed: int) -> Callable[..., float]:
    """A judge that is wrong in a fifth of the cases."""

    def scored(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
        value = score(prompt, response, meta)
        return 1 - value if seed_of("noise", seed, prompt, response) % 5 == 0 else value

    return scored


def train_options(loss: str | list[str], **more: Any) -> dict[str, Any]:
    known = {"dpo": {"beta": 0.5, "learning_rate": 5e-4}, "sppo": {"beta": 0.1, "learning_rate": 5e-4},
             "simpo": {"beta": 10.0, "learning_rate": 3e-4}, "inpo": {"learning_rate": 5e-4}}  # fmt: skip
    return {
        "loss_type": loss, "max_steps": STEPS, "per_device_train_batch_size": BATCH, "use_cpu": True, "report": False,
        "gradient_checkpointing": False, "warmup_ratio": 0.1, "disable_tqdm": True, "optim": "adamw_torch",
        "lr_scheduler_type": "linear", "warmup_steps": 0, "logging_steps": 5, "save_strategy": "no", "bf16": False,
        **known.get(str(loss), {"learning_rate": 1e-3} if loss == "sft" else known["dpo"]), **more,
    }  # fmt: skip


def _without_loss(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "loss_type"}


def recipes(score: Callable[..., float], start: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What each recipe is given on this task."""
    four = {"n": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": qs.ANSWER_TOKENS}
    judge, pairs = {"judge": score}, {"judge": Pairs(score)}
    gold = {"gold": "column:worked"}
    return {
        "iterative_dpo": {"scorers": judge, "sample": four, "train": train_options("dpo")},
        "sppo": {"scorers": pairs, "sample": four, "train": train_options("sppo")},
        "dno": {"scorers": pairs, "sample": four, "train": train_options("dno")},
        "dno_prct": {"scorers": {"judge": graded(score)}, "sample": four, "extra_responses": gold,
                     "train": train_options("dno_prct", learning_rate=3e-4)},
        "inpo": {"scorers": pairs, "sample": {**four, "n": 8},
                 "train": train_options("inpo", loss_kwargs={"eta": 0.1, "kappa": 1 / 3})},
        "selm": {"scorers": judge, "sample": {**four, "n": 1},
                 "extra_responses": {"chosen": "column:worked", "rejected": "column:wrong"},
                 "train": train_options("selm", learning_rate=3e-4, loss_kwargs={"alpha": 0.001})},
        "reward_augmented": {"scorers": judge, "sample": four,
                             "train": train_options("dpo", learning_rate=1e-3, max_steps=60),
                             "select": {"goal": "{goal}", "goal_joint": ":"}},
        "rm_ensemble": {"scorers": {f"rm{k}": noisy(score, k) for k in range(3)}, "sample": four,
                        "config_scorers": {"ensemble": {"kind": "ensemble", "rule": "uwo", "coefficient": 0.5,
                                                        "of": ["rm0", "rm1", "rm2"]}},
                        "train": train_options("dpo")},
        "pugc": {"scorers": {"judge": against_reference if score is right else score}, "sample": four,
                 "train": train_options("dpo")},
        "evolve": {"scorers": judge, "sample": {**four, "n": 2}, "refine": {"rounds": 2, "template": AGAIN},
                   "train": train_options("dpo")},
        # What stands in an answer is taken away character by character: its digits, "=" and the verdict.
        "spo_degree": {"scorers": judge, "sample": four, "train": train_options(
            ["dpo", "degree_aux"], loss_weights=[1.0, 0.1], per_device_train_batch_size=4 * BATCH,
        ), "degrade": {"degrees": 3, "phrases": "pattern", "pattern": "odd|even|."}},
        "just_say": {"scorers": {}, "train": train_options("dpo"), "sample": {**four, "n": 0, "sources": [
            {"source": "good", "n": 2, "prefix": GOOD}, {"source": "bad", "n": 2, "prefix": BAD},
        ]}},
        "dice": {"scorers": {}, "sample": {**four, "n": 8}, "before": str(start),
                 "select": {"length_penalty": 0.0, "min_chars": 2,
                            "extra_rows": str(folder / "first/iter-001/rows.jsonl")},
                 "train": train_options("dpo", learning_rate=3e-5)},
        "cdr": {"scorers": {}, "sample": four, "train": train_options("simpo"),
                "config_scorers": {"ratio": {"kind": "density_ratio", "strong": str(folder / "first/iter-001/train"),
                                             "weak": str(start)}}},
        "mcts_dpo": {"scorers": judge, "train": train_options("dpo_soft", max_steps=-1, num_train_epochs=1),
                     "sample": {"max_tokens": qs.ANSWER_TOKENS},
                     "search": {"iterations": 12, "first": 2, "children": 3, "step": {"stop": [], "tokens": 1}}},
        "skillmix": {"scorers": {}, "iterations": 0, "prompts": None, "train": {}, "prepare": {
            "skillmix": {"n": 1024, "skills": ["even", "odd"], "types": ["sum"], "turns": False},
            "sft": {"train": _without_loss(train_options("sft", max_steps=2 * STEPS))}}},
        "autorule": {"scorers": judge, "sample": four, "train": train_options("dpo"), "score": {"by": "sum"},
                     "config_scorers": {"rules": {"kind": "rules", "rules": [worked, ends_in_a_verdict]},
                                        "sum": {"kind": "ensemble", "rule": "sum", "of": ["judge", "rules"],
                                                "normalise": ["judge"]}}},
    }  # fmt: skip


def supervised(folder: Path, seed: int) -> tuple[list[str], list[str]]:
    """A supervised model in `folder/start`; (problems to ask, held-out ones)."""
    rng = random.Random(seed)
    tokenizer = qs.build_tokenizer()
    size = qs.FULL
    heldout, validation, shown, asked = qs.draw_problems(
        rng, size.heldout, size.validation, size.demonstrations, PROMPTS * ITERATIONS
    )
    model = qs.build_model(tokenizer, seed)
    measure = qs.Measure(tokenizer, validation, every=25, target=size.target)
    fastpo.train(
        model, qs.demonstrate(shown, rng), processing_class=tokenizer, callbacks=[measure], loss_type="sft",
        output_dir=str(folder / "start"), learning_rate=2e-3, lr_scheduler_type="constant_with_warmup",
        warmup_steps=20, max_steps=size.limit, per_device_train_batch_size=128, seed=seed, use_cpu=True,
        gradient_checkpointing=False, disable_tqdm=True, report=False,
    )  # fmt: skip
    return asked, heldout


def shown_more(folder: Path, rows: list[dict[str, str]], seed: int) -> None:
    """The supervised model, after further demonstrations."""
    fastpo.train(
        str(folder.parent / "start"), rows, loss_type="sft", output_dir=str(folder), learning_rate=1e-3, max_steps=150,
        per_device_train_batch_size=128, seed=seed, use_cpu=True, gradient_checkpointing=False, disable_tqdm=True,
        report=False, warmup_steps=10,
    )  # fmt: skip


def start_of(recipe: str, root: Path, asked: Sequence[str], seed: int) -> Path:
    """The policy that a recipe starts from: the supervised one, or one that knows what the recipe asks of it."""
    rng = random.Random(seed)
    start, problems = root / "start", qs.draw_problems(rng, 8_000)[0]
    if recipe == "evolve" and not (root / "refines").exists():
        # A guess, and asked again the careful answer, in a half of the rows; the others as the start was shown.
        rows = qs.demonstrate(problems[:4000], rng)
        for problem in problems[4000:]:
            guess = rng.choice(("=odd", "=even"))
            again = qs.careful_answer(problem) if rng.random() < 0.5 else "=" + rng.choice(("odd", "even"))
            rows.append({"prompt": f"{qs.prompt_of(problem)}{guess}{AGAIN}", "completion": again})
        shown_more(root / "refines", rows, seed)
    if recipe == "just_say" and not (root / "prefixes").exists():
        rows = qs.demonstrate(problems[:3000], rng)
        rows += [{"prompt": GOOD + qs.prompt_of(p), "completion": qs.careful_answer(p)} for p in problems[3000:5500]]
        rows += [
            {"prompt": BAD + qs.prompt_of(p), "completion": "=" + rng.choice(("odd", "even"))} for p in problems[5500:]
        ]
        shown_more(root / "prefixes", rows, seed)
    if recipe == "reward_augmented" and not (root / "goals").exists():
        # Goals are in front of half of the prompts and say nothing yet.
        rows = qs.demonstrate(problems, rng)
        for row in rows[::2]:
            row["prompt"] = f"{rng.randrange(2)}:{row['prompt']}"
        shown_more(root / "goals", rows, seed)
    own = {"evolve": root / "refines", "just_say": root / "prefixes", "reward_augmented": root / "goals"}
    return own.get(recipe, start)


def accuracy(policy: str, heldout: Sequence[str], seed: int, asked_for: str = "") -> float:
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    model = transformers.AutoModelForCausalLM.from_pretrained(policy).eval()
    problems = [p for p in heldout for _ in range(4)]
    answers = qs.sample_answers(model, tokenizer, [asked_for + p for p in problems], seed + 1)
    return sum(map(qs.is_right, problems, answers)) / len(problems)


def one_run(recipe: str, root: Path, folder: Path, asked: Sequence[str], heldout: Sequence[str], seed: int,
            score: Callable[..., float]) -> dict[str, Any]:  # fmt: skip
    start = start_of(recipe, root, asked, seed)
    rows = []
    for problem in asked:
        wrong = "=odd" if qs.verdict(problem) == "even" else "=even"
        rows.append({"id": problem, "prompt": qs.prompt_of(problem), "worked": qs.careful_answer(problem),
                     "wrong": wrong, "reference_text": qs.careful_answer(problem)})  # fmt: skip
    if recipe in ("dice", "cdr"):  # they compare the start with what a first iteration with the judge made of it
        first = recipes(score, start, folder)["iterative_dpo"]
        fastpo.iterate({"recipe": "iterative_dpo", "model": str(start), "prompts": rows[:PROMPTS], "iterations": 1,
                        "output_dir": str(folder / "first"), "seed": seed, **{**first, "scorers": {}}},
                       scorers=first["scorers"])  # fmt: skip
    given = dict(recipes(score, start, folder)[recipe])
    named, functions = given.pop("config_scorers", {}), given.pop("scorers")
    model = folder / "first" / "iter-001" / "train" if recipe == "dice" else start
    began = time.perf_counter()
    options = {"recipe": recipe, "model": str(model), "prompts": rows, "output_dir": str(folder / "run"), "seed": seed,
               "iterations": ITERATIONS, "scorers": named, **given}  # fmt: skip
    result = fastpo.iterate(options, scorers=functions, teacher=Asker)
    assert result is not None
    seconds = time.perf_counter() - began
    made = [path for name, path in result.policies.items() if name.startswith("iterate-")]
    policies = [str(model), *(made or [result.policies["start"]])]
    figures = [accuracy(p, heldout, seed, AT_GOAL.get(recipe, "")) for p in policies]
    return {"recipe": recipe, "seed": seed, "accuracy": figures, "seconds": seconds,
            "rows": [f["rows"]["rows"] for f in result.iterations]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", help="default: all that this script has")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--judge", nargs="+", choices=("judge", "random"), default=["judge"])
    parser.add_argument(
        "--add", action="store_true", help="to the results that are there, in the place of these recipes'"
    )
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.recipe or list(recipes(right, Path(), Path()))
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for seed in args.seeds:
            asked, heldout = supervised(Path(work) / f"seed-{seed}", seed)
            for name in names:
                for judge in args.judge:
                    score = right if judge == "judge" else at_random
                    folder = Path(work) / f"seed-{seed}" / f"{name}-{judge}"
                    run = one_run(name, folder.parent, folder, asked, heldout, seed, score)
                    runs.append(run | {"judge": judge})
                    figures = " -> ".join(f"{100 * a:.1f}%" for a in run["accuracy"])
                    print(f"{seed} {name} ({judge}): {figures}, {run['seconds']:.1f} s", flush=True)
    if args.add:
        path = common.ROOT / "bench" / "results" / common.machine_name() / "loop_quickstart.json"
        new = {(r["recipe"], r["seed"], r["judge"]) for r in runs}
        there = json.loads(path.read_text())["runs"]
        runs = [r for r in there if (r["recipe"], r["seed"], r["judge"]) not in new] + runs
        names = list(dict.fromkeys(r["recipe"] for r in runs))
    seeds = sorted({r["seed"] for r in runs})
    lines = [
        f"{common.machine_name()}: the quickstart's task, {ITERATIONS} iterations, {PROMPTS} prompts and {STEPS} steps "
        f"of {BATCH} pairs; exact match of sampled answers to {qs.FULL.heldout:,} held-out problems, mean (and range) "
        f"of seeds {', '.join(map(str, seeds))}.", "",
        "| recipe | judge | start | iteration 1 | iteration 2 | change |", "| --- | --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for name in names:
        for judge in ("judge", "random"):
            own = [r["accuracy"] for r in runs if r["recipe"] == name and r["judge"] == judge]
            if own:
                columns = [[100 * r[k] for r in own] for k in range(len(own[0]))]
                cells = [f"{statistics.fmean(c):.1f}% ({min(c):.1f} - {max(c):.1f})" for c in columns]
                cells += [""] * (ITERATIONS + 1 - len(cells))
                change = statistics.fmean(c[-1] - c[0] for c in zip(*columns))
                lines.append(f"| {name} | {judge} | {' | '.join(cells)} | {change:+.1f} |")
    table = "\n".join(lines) + "\n"
    print("\n" + table)
    if not args.no_write:
        result = {"environment": common.environment(), "runs": runs}
        print(f"written to {common.write_result('loop_quickstart', result, table)}")


if __name__ == "__main__":
    main()
