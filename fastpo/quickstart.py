"""The built-in first run: a small model learns from its own right and wrong answers to work a problem out.

No network, no weights to fetch. The problem: is the sum of six digits odd or even? A careful answer keeps a running
total and then says which, "738492:" -> "08213=odd"; a careless one guesses, "=odd", and is right half of the time. A
Llama-type model is supervised on demonstrations of which most guess. Several answers to each of many new problems are
sampled from it and judged, right ones are paired with wrong ones, and `fastpo.train` does the rest.

Supervision on the right answers (the control) keeps the lucky guesses among them; a preference loss learns what tells
right from wrong. All of it runs on the CPU, in about half a minute.
"""

import contextlib
import copy
import json
import logging
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Regex, decoders, models, pre_tokenizers
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_outputs import CausalLMOutputWithPast

import fastpo
from fastpo.errors import ConfigError, TrainingError

DIGITS = 6
ANSWER_TOKENS = DIGITS + 2  # the totals, "=", the verdict, the end
CAREFUL = 0.25  # share of the demonstrations that work the answer out
VOCABULARY = ("<pad>", "<eos>", "<unk>", *"0123456789:=", "odd", "even")

# Settled over four seeds. DPO and SPPO keep their gains at half and twice the rate; SimPO has no reference to hold it.
PREFERENCE: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.5, "learning_rate": 5e-4},
    "simpo": {"beta": 10.0, "gamma_beta_ratio": 0.3, "learning_rate": 3e-4},
    "sppo": {"beta": 0.02, "learning_rate": 5e-4},
}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    demonstrations: int = 12_000
    target: float = 0.95  # supervision stops where this share of the worked answers is right
    limit: int = 1_500  # supervised steps at most
    prompts: int = 3_072
    samples: int = 4  # of each prompt
    steps: int = 60
    batch: int = 64  # pairs
    validation: int = 500
    heldout: int = 1_000


FULL = Size()
FAST = Size(demonstrations=8_000, target=0.9, prompts=1_536, steps=40, heldout=500)


def prompt_of(problem: str) -> str:
    """The text that the model continues."""
    return f"{problem}:"


def verdict(problem: str) -> str:
    """The right answer."""
    return "odd" if sum(map(int, problem)) % 2 else "even"


def careful_answer(problem: str) -> str:
    """The last digit of the running total from the second digit on, then the verdict."""
    total, totals = int(problem[0]), ""
    for digit in problem[1:]:
        total = (total + int(digit)) % 10
        totals += str(total)
    return f"{totals}={verdict(problem)}"


def is_right(problem: str, answer: str) -> bool:
    """The judge: exact match of what follows "="; how the answer was found does not count."""
    return "=" in answer and answer.rpartition("=")[2] == verdict(problem)


def is_worked(answer: str) -> bool:
    """Whether the answer shows any working."""
    return answer[:1].isdigit()


def draw_problems(rng: random.Random, *counts: int) -> list[list[str]]:
    """As many lists of problems, of these lengths; no problem twice."""
    numbers = iter(rng.sample(range(10**DIGITS), sum(counts)))
    return [[f"{next(numbers):0{DIGITS}d}" for _ in range(count)] for count in counts]


def demonstrate(problems: Sequence[str], rng: random.Random) -> list[dict[str, str]]:
    """Rows for supervision, most of them guesses."""

    def answer(problem: str) -> str:
        return careful_answer(problem) if rng.random() < CAREFUL else "=" + rng.choice(("odd", "even"))

    return [{"prompt": prompt_of(p), "completion": answer(p)} for p in problems]


def build_tokenizer() -> Tokenizer:
    """One token a character, and one each for "odd" and "even"."""
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("odd|even|."), "isolated")
    inner.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )


def build_model(tokenizer: Tokenizer, seed: int) -> Model:
    """A random Llama of 0.1M parameters."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=170, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        initializer_range=0.09,  # with the usual 0.02, meant for wide models, a seed took 725 steps to learn, not 400
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@contextlib.contextmanager
def _generating(model: Model) -> Iterator[None]:
    """Evaluation mode and the model's own attention, also in a callback, where training has attached the packed one."""
    attention, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("sdpa")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)


# What transformers calls the keys and values of earlier tokens: renamed in 5.24.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


@torch.no_grad()
def sample_answers(model: Model, tokenizer: Tokenizer, problems: Sequence[str], seed: int | None = None) -> list[str]:
    """An answer to each problem, sampled at temperature 1; greedy without a seed. One prompt length: no padding."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    eos, answers = tokenizer.eos_token_id, []
    with _generating(model):
        for start in range(0, len(problems), 2048):
            prompts = [prompt_of(p) for p in problems[start : start + 2048]]
            tokens = torch.tensor(tokenizer(prompts)["input_ids"])  # [B, prompt], then [B, 1]
            cache, columns = None, []
            for _ in range(ANSWER_TOKENS):
                out = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{_CACHE: cache})
                cache, logits = out[_CACHE], out.logits[:, -1].float()
                if generator is None:
                    tokens = logits.argmax(-1, keepdim=True)
                else:
                    tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                columns.append(tokens)
            rows = torch.cat(columns, 1).tolist()
            answers += tokenizer.batch_decode([row[: row.index(eos)] if eos in row else row for row in rows])
    return answers


def exact_match(
    model: Model, tokenizer: Tokenizer, problems: Sequence[str], *, samples: int = 0, seed: int = 0
) -> float:
    """The share that is right of greedy answers, or of `samples` sampled ones a problem."""
    asked = [p for p in problems for _ in range(samples or 1)]
    answers = sample_answers(model, tokenizer, asked, seed if samples else None)
    return sum(map(is_right, asked, answers)) / len(asked)


class Measure(transformers.TrainerCallback):
    """Accuracy on validation problems every `every` steps; training stops once worked answers reach `target`."""

    def __init__(self, tokenizer: Tokenizer, problems: Sequence[str], every: int, target: float | None = None):
        self.tokenizer, self.problems, self.every, self.target = tokenizer, problems, every, target
        self.curve: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Model, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Model, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        asked = [*self.problems, *self.problems]
        answers = sample_answers(model, self.tokenizer, asked, seed=state.global_step)
        right = list(map(is_right, asked, answers))
        greedy = exact_match(model, self.tokenizer, self.problems)
        self.curve.append({"step": state.global_step, "sampled": sum(right) / len(asked), "greedy": greedy})
        worked = [r for r, answer in zip(right, answers) if is_worked(answer)]
        # At a constant learning rate the share of worked answers wanders; it stops where it is the demonstrations'.
        as_shown = abs(len(worked) / len(asked) - CAREFUL) < 0.05
        if self.target is not None and as_shown and sum(worked) >= self.target * len(worked):
            control.should_training_stop = True


def make_pairs(problems: Sequence[str], answers: Sequence[str], rng: random.Random) -> list[dict[str, Any]]:
    """A right with a wrong answer, for each problem that has both; a problem's answers lie side by side.

    The win probabilities are SPPO's: the share of the problem's answers that an answer beats, itself included, with
    one half for a tie.
    """
    samples = len(answers) // len(problems)
    rows = []
    for i, problem in enumerate(problems):
        group = answers[i * samples : (i + 1) * samples]
        right = [a for a in group if is_right(problem, a)]
        wrong = [a for a in group if a and not is_right(problem, a)]
        if right and wrong:
            row = {"prompt": prompt_of(problem), "chosen": rng.choice(right), "rejected": rng.choice(wrong)}
            share = len(right) / samples
            rows.append({**row, "win_prob_chosen": 1 - share / 2, "win_prob_rejected": (1 - share) / 2})
    return rows


def run_quickstart(
    output_dir: str | Path = "fastpo-quickstart", loss_type: str = "dpo", seed: int = 0, control: bool = False,
    fast: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Supervise, sample, judge, pair, train by preference, measure; returns what it writes to summary.json.

    control: also take as many supervised steps, at the same learning rate, on the chosen answers, for comparison.
    fast: a smaller run, for tests.
    """
    if loss_type not in PREFERENCE:
        raise ConfigError(f"loss_type must be one of {', '.join(PREFERENCE)} in the quickstart, not {loss_type!r}")
    folder = _own_folder(Path(output_dir))
    with _one_thread(), _quiet_log():
        return _Run(folder, loss_type, seed, FAST if fast else FULL).go(control)


class _Run:
    """One quickstart: what its stages share."""

    def __init__(self, folder: Path, loss_type: str, seed: int, size: Size):
        self.folder, self.loss_type, self.seed, self.size = folder, loss_type, seed, size
        self.rng = random.Random(seed)
        self.tokenizer = build_tokenizer()
        self.heldout, self.validation, self.shown, self.asked = draw_problems(
            self.rng, size.heldout, size.validation, size.demonstrations, size.prompts
        )
        self.curves: dict[str, list[dict[str, float]]] = {}

    def go(self, control: bool) -> dict[str, Any]:
        size, started = self.size, time.monotonic()
        example = self.heldout[0]
        print("Is the sum of six digits odd or even? A careful answer keeps a running total; a careless one guesses.")
        print(f"   {prompt_of(example)} careful {careful_answer(example)}, careless =odd or =even\n")

        model = build_model(self.tokenizer, self.seed)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"1. Supervise a Llama of {parameters / 1e6:.2f}M parameters on {size.demonstrations:,} demonstrations,")
        print(f"   of which {1 - CAREFUL:.0%} guess, until {size.target:.0%} of the answers it works out are right")
        supervised = self.supervise(model)
        before = self.measure(model)
        print(f"   {supervised} steps; sampled answers are right {before['sampled']:.0%} of the time\n")

        print(f"2. Sample {size.samples} answers to each of {size.prompts:,} new problems; pair right with wrong")
        pairs = self.pair(model)
        worked = sum(is_worked(row["chosen"]) for row in pairs) / len(pairs)
        print(f"   {len(pairs):,} pairs; {worked:.0%} of the chosen answers are worked, the others are lucky guesses\n")

        print(f"3. Train on the pairs: {self.loss_type}, {size.steps} steps of {size.batch}\n")
        trained = copy.deepcopy(model)
        log = self.prefer(trained, pairs, self.loss_type, self.loss_type)
        after = self.measure(trained)
        compared = None
        if control:
            print(f"4. Control: {size.steps} supervised steps of {size.batch} on the chosen answers alone\n")
            rival = copy.deepcopy(model)
            chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
            self.prefer(rival, chosen, "sft", "control")
            compared = self.measure(rival)

        summary: dict[str, Any] = {
            "loss_type": self.loss_type, "seed": self.seed,
            "before": before["sampled"], "after": after["sampled"],
            "before_greedy": before["greedy"], "after_greedy": after["greedy"],
        }  # fmt: skip
        if compared is not None:
            summary |= {"control": compared["sampled"], "control_greedy": compared["greedy"]}
        summary |= {
            "heldout": size.heldout, "pairs": len(pairs), "steps": size.steps, "batch": size.batch,
            "supervised_steps": supervised, **PREFERENCE[self.loss_type],
            "seconds": round(time.monotonic() - started, 1),
            "versions": {"fastpo": fastpo.__version__, "torch": torch.__version__,
                         "transformers": transformers.__version__, "tokenizers": tokenizers.__version__,
                         "python": platform.python_version()},
        }  # fmt: skip
        plot_curves(self.folder / "curves.png", self.curves, log)
        (self.folder / "curves.json").write_text(json.dumps(self.curves) + "\n")
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self.report(summary, model, trained)
        return summary

    def supervise(self, model: Model) -> int:
        """Train on the demonstrations until the target is measured; returns the steps that took."""
        measure = Measure(self.tokenizer, self.validation, every=25, target=self.size.target)
        result = self.train(
            model, demonstrate(self.shown, self.rng), "supervised", measure,
            loss_type="sft", learning_rate=2e-3, lr_scheduler_type="constant_with_warmup", warmup_steps=20,
            max_steps=self.size.limit, per_device_train_batch_size=128,
        )  # fmt: skip
        if result.state.global_step == self.size.limit:
            print("   (the limit of steps came first)")
        return result.state.global_step

    def pair(self, model: Model) -> list[dict[str, Any]]:
        """Sampled, judged and paired answers, written to pairs.jsonl."""
        asked = [p for p in self.asked for _ in range(self.size.samples)]
        rows = make_pairs(self.asked, sample_answers(model, self.tokenizer, asked, self.seed), self.rng)
        if not rows:
            raise TrainingError("no problem has both a right and a wrong answer: the supervised model is of no use")
        with open(self.folder / "pairs.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return rows

    def prefer(self, model: Model, rows: list[dict[str, Any]], loss_type: str, name: str) -> list[dict[str, float]]:
        """Train on the pairs, or on their chosen answers with loss_type="sft"; returns the log."""
        options = {k: v for k, v in PREFERENCE[self.loss_type].items() if k == "learning_rate" or loss_type != "sft"}
        result = self.train(
            model, rows, name, Measure(self.tokenizer, self.validation, every=self.size.steps // 10),
            loss_type=loss_type, max_steps=self.size.steps, per_device_train_batch_size=self.size.batch,
            warmup_ratio=0.1, logging_steps=5, **options,
        )  # fmt: skip
        return [line for line in result.log_history if "loss" in line]

    def train(self, model: Model, rows: list[dict[str, Any]], name: str, measure: Measure, **options: Any) -> Any:
        """`fastpo.train` in its own folder; the model is trained in place."""
        result = fastpo.train(
            model, rows, processing_class=self.tokenizer, callbacks=[measure],
            output_dir=str(self.folder / name), overwrite_output_dir=True, seed=self.seed, use_cpu=True,
            gradient_checkpointing=False, disable_tqdm=not sys.stderr.isatty(), **options,
        )  # fmt: skip
        self.curves[name] = measure.curve
        return result

    def measure(self, model: Model) -> dict[str, float]:
        """Exact match on the held-out problems."""
        sampled = exact_match(model, self.tokenizer, self.heldout, samples=4, seed=self.seed + 1)
        return {"sampled": sampled, "greedy": exact_match(model, self.tokenizer, self.heldout)}

    def report(self, summary: dict[str, Any], before: Model, after: Model) -> None:
        """The table, three held-out problems before and after, and where everything is."""
        has_control = "control" in summary
        print(f"Exact match on {summary['heldout']:,} problems that were never trained on")
        print("              before   after  change" + ("  control" if has_control else ""))
        for name, key in (("greedy", "_greedy"), ("sampled", "")):
            first, last = 100 * summary[f"before{key}"], 100 * summary[f"after{key}"]
            tail = f"   {100 * summary[f'control{key}']:5.1f}%" if has_control else ""
            print(f"   {name:8s}   {first:5.1f}%  {last:5.1f}%  {last - first:+6.1f}{tail}")
        print("\nThree of them, answered greedily")
        problems = self.heldout[:3]
        answers = (sample_answers(m, self.tokenizer, problems) for m in (before, after))
        for problem, first, last in zip(problems, *answers, strict=True):
            marks = ["right" if is_right(problem, a) else "wrong" for a in (first, last)]
            print(f"   {prompt_of(problem)}  before {first:11s} {marks[0]}   after {last:11s} {marks[1]}")
        print(f"\n{summary['seconds']:.0f} s. In {self.folder}/: summary.json, curves.png, pairs.jsonl, and the models")
        print(f"   supervised/ and {self.loss_type}/. The same pairs with another loss, from the command line:")
        print(f"   fastpo train --model {self.folder}/supervised --train-dataset {self.folder}/pairs.jsonl \\")
        print(f"      --loss-type ipo --learning-rate 5e-4 --max-steps 60 --output-dir {self.folder}-ipo")


def plot_curves(path: Path, curves: dict[str, list[dict[str, float]]], log: list[dict[str, float]]) -> None:
    """Accuracy while supervised; while trained by preference, and the control's; and the rewards, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colors = {"supervised": "tab:orange", "control": "tab:gray"}
    for name, curve in curves.items():
        axis = left if name == "supervised" else middle
        for kind, style in (("greedy", "-"), ("sampled", "--")):
            x, y = [point["step"] for point in curve], [100 * point[kind] for point in curve]
            axis.plot(x, y, style, color=colors.get(name, "tab:blue"), label=f"{name}, {kind}")
    for axis, title in ((left, "supervised, mostly on guesses"), (middle, "on its own right and wrong answers")):
        axis.set(xlabel="step", ylabel="exact match, validation problems (%)", ylim=(0, 102), title=title)
        axis.legend(loc="lower right")
    for name in ("chosen", "rejected"):
        right.plot([line["step"] for line in log], [line[f"rewards/{name}"] for line in log], label=name)
    right.set(xlabel="step", ylabel="reward", title="the loss's implicit rewards")
    right.legend()
    figure.savefig(path, dpi=110)


def _own_folder(folder: Path) -> Path:
    """The output folder, made; one that holds anything but an earlier quickstart is refused."""
    own = {"supervised", "control", "pairs.jsonl", "curves.json", "curves.png", "summary.json", *PREFERENCE}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(p.name for p in folder.iterdir() if p.name not in own)
    except OSError as error:
        raise ConfigError(f"output_dir {str(folder)!r} cannot be used: {error.strerror}") from None
    if foreign:
        raise ConfigError(f"output_dir {str(folder)!r} holds other things ({foreign[0]}); choose another")
    return folder


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A model this small gains little from a second thread, and where other programs want the cores, threads that wait
    for each other lose far more: on two busy cores a step of a similar model took 2.3 s with two, 0.1 s with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Of the trainer only its warnings, unless the program has set up logging itself; no bars for saved files."""
    log, handler = logging.getLogger("fastpo"), logging.StreamHandler()
    if not log.handlers and not logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)
        log.addHandler(handler)
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        log.removeHandler(handler)
        if bars:
            transformers.logging.enable_progress_bar()
