"""The model card of a trained model, and its way to the Hugging Face hub."""

import html
import importlib.metadata
import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

import fastpo
from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.losses.table import SFT, Term
from fastpo.report.callbacks import plain_config

log = logging.getLogger("fastpo")

CARD = "README.md"
MARK = "<!-- written by fastpo: replaced at the next save; remove this line to keep the text as it is -->"
# What is left out of a push of the whole output folder: other steps' weights, what resuming needs, the texts of
# samples.jsonl (rows of the data, which may not be public), and what trackers and git lay beside it.
IGNORE = [
    "checkpoint-*",
    ".*",
    "reference.safetensors",
    "samples.jsonl",
    "merged/*",
    "wandb/*",
    "mlruns/*",
    "__pycache__/*",
]
# What a checkpoint folder holds of the model and its tokenizer; the rest is for resuming.
MODEL_FILES = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
               "adapter_config.json", "adapter_model*.safetensors", "adapter_model.safetensors.index.json",
               "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja",
               "*.model", "*.py"]  # fmt: skip
PAPERS = {
    "dpo": ("Direct Preference Optimization: Your Language Model is Secretly a Reward Model", "2305.18290"),
    "hinge": ("Statistical Rejection Sampling Improves Preference Optimization", "2309.06657"),
    "ipo": ("A General Theoretical Paradigm to Understand Learning from Human Preferences", "2310.12036"),
    "robust": ("Provably Robust DPO: Aligning Language Models with Noisy Feedback", "2403.00409"),
    "simpo": ("SimPO: Simple Preference Optimization with a Reference-Free Reward", "2405.14734"),
    "sppo": ("Self-Play Preference Optimization for Language Model Alignment", "2405.00675"),
    "sppo_hard": ("Self-Play Preference Optimization for Language Model Alignment", "2405.00675"),
}
# What the card says of the settings, where they are set.
_SETTINGS = ("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "optim", "weight_decay",
             "max_grad_norm", "max_length", "seed")  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


# ---- the card


def model_card(
    config: TrainConfig,
    terms: Sequence[Term],
    *,
    base_model: str | None = None,
    adapter: bool = False,
    datasets: Sequence[Any] = (),
    rows: int = 0,
    steps: int = 0,
    batch_size: int = 0,
    metrics: Mapping[str, Any] | None = None,
    chat: bool = False,
    tags: Sequence[str] | None = None,
    repo_id: str | None = None,
    dtype: str | None = None,
) -> str:
    """README.md of a trained model: what it is, how it was trained, what came out, how to use it.

    base_model, datasets: as given to `fastpo.train`; only those that are hub ids are named in the metadata. metrics:
    `last_metrics` of the run. batch_size: pairs of one step over all devices. tags: of
    the model; None: ours and the losses' names. No licence is stated: that is for whoever publishes the model.
    """
    base = base_model if _is_hub_id(base_model) else None
    data = [d for d in datasets if _is_hub_id(d)]
    name = (repo_id or Path(config.output_dir).absolute().name).rpartition("/")[2]
    task = "text-classification" if config.scalar_head else "text-generation"
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": task}
    head["base_model"] = base
    head["datasets"] = data
    head["model_name"] = name if _HUB_ID.fullmatch(name) else None  # any other is a folder's, of this machine
    head["tags"] = list(tags or ["fastpo", "preference-optimization", *dict.fromkeys(t.name for t in terms)])
    front = yaml.safe_dump({k: v for k, v in head.items() if v}, sort_keys=False, allow_unicode=True)
    kind = "An adapter for" if adapter else "A fine-tuned version of"
    origin = f"[{base}](https://huggingface.co/{base})" if base else "a model that is not on the hub"
    of_data = f" on {_enumerate([f'[{d}](https://huggingface.co/datasets/{d})' for d in data])}" if data else ""
    return "\n".join(
        [
            f"---\n{front}---\n{MARK}\n",
            f"# {_text(name)}\n",
            f"{kind} {origin}, trained{of_data} with "
            f"{_enumerate([_term(t) for t in terms])} by fastpo {fastpo.__version__}.\n",
            "## Use\n",
            f"```python\n{(_score if config.scalar_head else _quick_start)(repo_id or name, adapter, chat)}\n```\n",
            "## Training\n",
            *_training(config, terms, rows, steps, batch_size, dtype),
            *_results(metrics or {}),
            "## Versions\n",
            f"* fastpo {fastpo.__version__}",
            *(f"* {p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "tokenizers")),
            *([f"* peft {importlib.metadata.version('peft')}"] if adapter else []),
            "",
            "No licence is stated here: those of the base model and of the data hold, and yours to add.\n",
        ]
    )


def last_metrics(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a card shows of a run: the last value of each metric, evaluations first, without the pace of evaluations."""
    last: dict[str, Any] = {}
    for line in log_history:
        last |= line
    pace = ("_runtime", "_per_second")
    of_eval = {k: v for k, v in last.items() if k.startswith("eval_") and not k.endswith(pace)}
    hidden = ("grad_norm", "learning_rate", "packing_efficiency", "shared_prompt_savings", "train_samples_per_second",
              "train_steps_per_second")  # fmt: skip
    return of_eval | {k: v for k, v in last.items() if not k.startswith("eval_") and k not in hidden}


def write_card(folder: str | Path, card: str) -> bool:
    """Write README.md, unless one is there that its user wrote; fastpo's own and PEFT's empty template are replaced."""
    path = Path(folder) / CARD
    if path.exists():
        text = path.read_text(errors="replace")
        template = "# Model Card for Model ID" in text and text.count("[More Information Needed]") > 5
        if MARK not in text and not template:
            log.info("%s is yours and stays as it is", path)
            return False
    path.write_text(card, encoding="utf-8", errors="replace")
    return True


def _term(term: Term) -> str:
    if term.name == SFT:
        return "a negative log-likelihood term (sft)"
    title, paper = PAPERS.get(term.name, (f"arXiv {term.loss.paper}", term.loss.paper))
    return f"{term.name} ([{title}](https://huggingface.co/papers/{paper}))"


def _enumerate(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def _quick_start(where: str, adapter: bool, chat: bool) -> str:
    question = "What do you think of the sea?"
    where = _python(where)
    prompt = f'[{{"role": "user", "content": "{question}"}}]' if chat else f'"{question}"'
    if not adapter:
        return (
            "from transformers import pipeline\n\n"
            f'generate = pipeline("text-generation", model={where})\n'
            f'print(generate({prompt}, max_new_tokens=128, return_full_text=False)[0]["generated_text"])'
        )
    lines = [
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer\n",
        f"model = AutoPeftModelForCausalLM.from_pretrained({where})",
        f"tokenizer = AutoTokenizer.from_pretrained({where})",
    ]
    if chat:
        lines += [
            f"prompt = {prompt}",
            'inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", '
            "return_dict=True)",
        ]
    else:
        lines.append(f'inputs = tokenizer({prompt}, return_tensors="pt")')
    lines += [
        "tokens = model.generate(**inputs, max_new_tokens=128)",
        'print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


def _score(where: str, adapter: bool, chat: bool) -> str:
    """How to score a response with a reward model, by transformers alone."""
    question, answer = "What do you think of the sea?", "It is wide."
    kind = "AutoPeftModelForSequenceClassification" if adapter else "AutoModelForSequenceClassification"
    imports = ["import torch", f"from peft import {kind}", "from transformers import AutoTokenizer\n"]
    if not adapter:
        imports = ["import torch", f"from transformers import AutoTokenizer, {kind}\n"]
    labels = ", num_labels=1" if adapter else ""
    lines = [
        *imports,
        f"model = {kind}.from_pretrained({_python(where)}{labels})",
        f"tokenizer = AutoTokenizer.from_pretrained({_python(where)})",
    ]
    if chat:
        lines += [
            f'turns = [{{"role": "user", "content": "{question}"}}, {{"role": "assistant", "content": "{answer}"}}]',
            'inputs = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)',
        ]
    else:
        lines.append(f'inputs = tokenizer("{question} {answer}" + tokenizer.eos_token, return_tensors="pt")')
    lines += ["with torch.no_grad():", "    print(model(**inputs).logits.item())  # the reward"]
    return "\n".join(lines)


def _training(
    config: TrainConfig, terms: Sequence[Term], rows: int, steps: int, batch_size: int, dtype: str | None
) -> list[str]:
    values = plain_config(config)
    table: dict[str, Any] = {}
    for term in terms:
        weight = {"weight": term.weight} if len(terms) > 1 else {}
        settings = ", ".join(f"{k} {_number(v)}" for k, v in {**term.hyper, **weight}.items())
        table[f"loss: {term.name}"] = settings or "-"
    of_step = "responses per step" if any(t.of_tokens for t in terms) else "pairs per step"
    table |= {"rows of training data": rows, "steps": steps, of_step: batch_size, "dtype": dtype}
    table |= {name: values[name] for name in _SETTINGS}
    body = [f"| {_text(k)} | {_number(v)} |" for k, v in table.items() if v not in (None, 0, "")]
    return ["| setting | value |", "| --- | --- |", *body, "", "All settings are in `config.yaml`.\n"]


def _results(metrics: Mapping[str, Any]) -> list[str]:
    shown = {k: v for k, v in metrics.items() if isinstance(v, int | float) and k not in ("step", "epoch")}
    if not shown:
        return []
    body = [f"| {_text(k)} | {_number(v)} |" for k, v in shown.items()]
    return ["## Results\n", "| metric | value |", "| --- | --- |", *body, ""]


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _text(str(value))


def _python(text: str) -> str:
    """A string literal of Python (JSON's are), in which no HTML stands."""
    return json.dumps(text, ensure_ascii=False).replace("<", "\\x3c").replace(">", "\\x3e")


def _text(text: str) -> str:
    """Text as it is in Markdown: no HTML, links, code, tables or headings come from a folder's or a data set's name."""
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", html.escape(" ".join(text.split())))


def _is_hub_id(name: Any) -> bool:
    return isinstance(name, str) and bool(_HUB_ID.fullmatch(name)) and not os.path.exists(name)


# ---- the push


class Hub:
    """Where a run is pushed to. Made before training, on one rank: a ConfigError then beats a lost push later.

    `api` is huggingface_hub's HfApi, or what stands in for it.
    """

    def __init__(self, config: TrainConfig, api: Any = None):
        self.config = config
        self.pending: tuple[Any, Path] | None = None  # the background upload and its folder
        if api is None:
            from huggingface_hub import HfApi

            api = HfApi(token=config.hub_token, library_name="fastpo")
        self.api = api
        for links in Path(config.output_dir).glob(".pushing-*"):  # of a run that was killed
            shutil.rmtree(links, ignore_errors=True)
        name = config.hub_model_id or Path(config.output_dir).absolute().name
        if not _HUB_ID.fullmatch(name):
            raise ConfigError(f"push_to_hub: {name!r} is no name of a repository; set hub_model_id='you/your-model'")
        try:
            api.whoami()
        except Exception as error:
            raise ConfigError(
                f"push_to_hub needs a token of the hub: run `hf auth login`, or set HF_TOKEN ({_first_line(error)})"
            ) from None
        try:
            self.repo_id: str = api.create_repo(name, private=config.hub_private_repo, exist_ok=True).repo_id
            if config.hub_revision:
                api.create_branch(self.repo_id, branch=config.hub_revision, exist_ok=True)
        except Exception as error:
            raise ConfigError(f"push_to_hub cannot write to {name!r}: {_first_line(error)}") from None

    def push_checkpoint(self, folder: str | Path, step: int) -> bool:
        """Upload a checkpoint's model files in the background; False where hub_strategy or the last upload says no.

        From hard links, so that the checkpoint may be deleted meanwhile.
        """
        if self.config.hub_strategy != "every_save" or (self.pending is not None and not self.pending[0].done()):
            return False
        self._finish()
        links = Path(folder).parent / f".pushing-{step}"
        try:
            shutil.rmtree(links, ignore_errors=True)
            links.mkdir()
            for file in sorted(Path(folder).iterdir()):
                if file.is_file() and any(fnmatch(file.name, pattern) for pattern in MODEL_FILES):
                    _link(file, links / file.name)
            future = self.api.upload_folder(
                repo_id=self.repo_id, folder_path=str(links), revision=self.config.hub_revision,
                commit_message=f"Training in progress, step {step}", run_as_future=True,
            )  # fmt: skip
        except Exception as error:
            log.warning("step %d was not pushed to %s: %s", step, self.repo_id, _first_line(error))
            shutil.rmtree(links, ignore_errors=True)
            return False
        self.pending = (future, links)
        return True

    def push(self, folder: str | Path, message: str = "End of training") -> str | None:
        """Upload what was trained; the commit's address, or None after a warning that says how to try again."""
        self._finish()
        try:
            commit = self.api.upload_folder(
                repo_id=self.repo_id, folder_path=str(folder), revision=self.config.hub_revision,
                commit_message=message, ignore_patterns=IGNORE,
            )  # fmt: skip
        except Exception as error:
            log.warning(
                "the model is saved in %s, but was not pushed: %s\ntry again with: %s",
                folder, _first_line(error), self.retry_command(folder),
            )  # fmt: skip
            return None
        return str(getattr(commit, "commit_url", commit))

    def close(self) -> None:
        """Wait for an upload that is under way: a run that stops leaves no half of one."""
        self._finish()

    def retry_command(self, folder: str | Path) -> str:
        """The same push by hand; it takes the token from `hf auth login` or HF_TOKEN."""
        words = ["hf", "upload", self.repo_id, str(folder), "."]
        words += [f"--revision={self.config.hub_revision}"] if self.config.hub_revision else []
        words += [f"--exclude={pattern}" for pattern in IGNORE]
        return shlex.join(words)

    def _finish(self) -> None:
        if self.pending is None:
            return
        (future, links), self.pending = self.pending, None
        try:
            future.result()
        except Exception as error:
            log.warning("a push to %s in the background failed: %s", self.repo_id, _first_line(error))
        shutil.rmtree(links, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
