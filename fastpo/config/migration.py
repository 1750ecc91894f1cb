"""The page docs/migrating-from-trl.md, made from the tables of fastpo/config/options.py and fastpo/config/trl_configs.py."""
# ruff: noqa: E501  # one row a line: it reads as the table it is

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastpo.config import online_options, options
from fastpo.config.option import HONOURED, NO_EFFECT, REFUSED, RENAMED, Option
from fastpo.config.train_config import TrainConfig
from fastpo.config.trl_configs import CLASSES

_TOP = """\
# Moving from TRL, LLaMA-Factory or OpenRLHF

Made by `python -m fastpo.config.migration > docs/migrating-from-trl.md`; the tests compare. Every option is accounted for: it is
honoured, renamed, refused by an error that says what to do instead, or accepted because it has no meaning here.

## In ten minutes

**A Python script.** Replace the import, and `DPOTrainer(...)` with its `.train()` by one `fastpo.train(...)` of the
same arguments; `DPOConfig` stays, or becomes a dict, a `TrainConfig` or keyword arguments. So it is with `KTOTrainer`,
`CPOTrainer`, `ORPOTrainer`, `RewardTrainer`, `GRPOTrainer`, `RLOOTrainer` and `OnlineDPOTrainer`: the class of `args`
says the loss. A script that goes on with its trainer (evaluates
other rows, saves elsewhere) takes the class `fastpo.Trainer(...)`, with the same arguments too.

```python
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
args = DPOConfig(output_dir="out", beta=0.2)
trainer = DPOTrainer(model="Qwen/Qwen3-0.6B", args=args, train_dataset=dataset)
trainer.train()
```

becomes

```python
import fastpo
from datasets import load_dataset
from trl import DPOConfig

dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
args = DPOConfig(output_dir="out", beta=0.2)
result = fastpo.train(model="Qwen/Qwen3-0.6B", args=args, train_dataset=dataset)
```

Without TRL installed: `fastpo.train(model="Qwen/Qwen3-0.6B", train_dataset="trl-lib/ultrafeedback_binarized",
output_dir="out", beta=0.2)`. `tests/migration/` holds three scripts of TRL's documentation and their moved twins.

| of the trainer | here |
| --- | --- |
| `trainer.train(resume_from_checkpoint=...)` | `resume_from_checkpoint=...`, an option |
| `trainer.evaluate()`, of other rows too | the same of a `fastpo.Trainer`; inside a run `eval_dataset=...` with `eval_strategy` or `eval_on_start` |
| `trainer.save_model()` | done at the end, in `output_dir` (`save_final`); `result.model` is the model. Elsewhere: the same of a `fastpo.Trainer` |
| `trainer.push_to_hub()` | `push_to_hub=True`, or the same of a `fastpo.Trainer` |
| `trainer.model`, `.ref_model`, `.args`, `.state`, `.processing_class`, `.log_metrics()`, `.save_metrics()`, `.save_state()` | the same of a `fastpo.Trainer`. `ref_model` is the one given, or with `sync_ref_model` the moving one; else None, as the policy at its start is not kept |
| `trainer.train_dataset`, `.eval_dataset` | rows as `prompt_ids`, `chosen_ids`, `rejected_ids` (`completion_ids`, `label`), of the rows kept |
| `trainer.state.log_history` | `result.log_history`, and `output_dir/metrics.jsonl` |
| `tokenizer=` | `processing_class=` |
| `compute_metrics=` | the same, called with `fastpo.Evaluated`: the responses' log-probabilities and the reference's. What reads logits (`predictions`) is refused: nothing keeps them, and TRL deprecates them |
| `data_collator=` | refused: fastpo packs the rows |
| `reward_funcs=`, `reward_processing_classes=` of the online trainers | the same |
| `tools=`, `rollout_func=`, `environment_factory=` of `GRPOTrainer` | not built: a response is what the sampler says to a prompt |

**The command line.** `trl dpo` becomes `fastpo train`, with the same options and the same YAML files:

```bash
trl dpo      --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/ultrafeedback_binarized --use_peft --lora_r 32
fastpo train --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/ultrafeedback_binarized --use_peft --lora_r 32
```

**Several GPUs.** `accelerate launch --num_processes 8 script.py` becomes `torchrun`. Data parallel is the default,
`--fsdp` shards (FSDP2). The step is the same: per_device_train_batch_size x gradient_accumulation_steps x ranks.

```bash
torchrun --nproc-per-node 8 -m fastpo train --config run.yaml --fsdp full_shard
torchrun --nproc-per-node 8 script.py
```

**What differs on purpose**

* A model given by name loads in the checkpoint's own dtype; TRL loads float32 (`dtype="float32"` is the same).
* The reference is the policy as it was passed in, computed once and cached; TRL loads it again from the model's name.
* A ragged last batch counts every pair alike; `sft` terms are means over the tokens of the whole step. Both agree with
  TRL wherever its micro-batches hold equally many pairs and tokens.
* `label_smoothing` acts on `sigmoid` too (conservative DPO); TRL 1.16 ignores it there.
* A mixture of experts' load-balancing loss is one loss over all tokens of the step; TRL takes the mean over its
  micro-batches and ranks, which is the same where these are one. An evaluation set counts as one step. It goes with
  every loss; TRL's CPO and ORPO add it only where the config has `output_router_logits`.
* A checkpoint that its class would not load whole (weights that would start at random, tensors that would be gone once
  it is saved) ends before step 1; TRL trains it. Heads that predict further tokens, which transformers leaves out, are
  carried over into the saved folder.
* Models of text and images train their language part on text rows; the rest is frozen and saved as it is. Logits are
  the model's own: TRL's fused head scales those of Aya Vision and Cohere 2 Vision, which the models themselves do not.
* A `DPOConfig` keeps TRL's defaults, so it saves every 500 steps; without one nothing is saved but the final model.
* Rows that are too long, empty or odd are counted and reported, never dropped in silence; TRL filters out pairs whose
  prompt alone fills `max_length` without a word.
* A prompt may be text beside messages as chosen and rejected.

**What surprises on the way in**

* Liger 0.8.5's SimPO adds the chosen answer's cross-entropy with weight 1 (`alpha`, `compute_nll_loss`) and takes gamma
  outside beta: its `gamma` is `beta * gamma_beta_ratio` here, and its loss is `loss_type=[simpo, sft]`.
* Liger 0.8.5's DPO takes `label_smoothing` and ignores it for `sigmoid`, as TRL does.
* TRL's CPO and ORPO trainers put an end of sequence behind whatever does not end in one: behind conversations whose
  template ends in its own end of turn, or in a newline, that is a second ending.
* AlpacaEval 0.6.6's length feature is the baseline's length minus the model's, and its preferences go from 1 (the
  baseline wins) to 2 (the model does), 0 and 1.5 being ties.
* TRL's `sft` term is a mean over each micro-batch's tokens, so that accumulation changes it.
"""

_ELSEWHERE = """\
Each of these names raises an error that says what is written here, in `fastpo.train`, in a YAML file and on the command
line{more}. Names that the project shares with transformers (`learning_rate`, `output_dir`, ...) are in the first table.
"""


_ONLINE = """\
`reward_funcs` and `reward_processing_classes` are arguments of `fastpo.train`, as in TRL: functions of TRL's signature,
names of reward models, or mappings as the scorers of docs/loop.md. On the command line `--reward_funcs` takes several of
`FILE.py:NAME`, `MODULE:NAME`, a model's name or folder, and a mapping as JSON; or one YAML file of them by name.

Ours alone: `loss_type` reinforce, gspo and gmpo, `kl_estimator`, `dynamic_sampling`, `overlong_buffer` with
`overlong_penalty`, `missing_eos_penalty` with every online loss, `sampler`, `judge`, `mixture_coef`.

An option of an online loss with another `loss_type` is refused by its name, unless it stands at its default.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    return f"`{value!r}`"


def _defaults() -> dict[str, Any]:
    config = TrainConfig()
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def _here(name: str, option: Option, defaults: Mapping[str, Any]) -> str:
    """What the page says about one option."""
    if option.status == RENAMED:
        return f"**`{option.to}`**" + (f": {option.note}" if option.note else "")
    if option.status == REFUSED:
        return f"refused: {option.note}"
    if option.status == NO_EFFECT:
        return f"without meaning: {option.note}"
    notes = [option.note] if option.note else []
    if name in defaults and defaults[name] != option.default and name not in ("loss_type", "fsdp"):
        notes.insert(0, f"default here {_value(defaults[name])}")
    return "honoured" + (": " + "; ".join(notes) if notes else "")


def _options_table(table: Mapping[str, Option]) -> str:
    defaults = _defaults()
    return _table(
        ("option", "TRL's default", "here"),
        ((f"`{name}`", _value(option.default), _here(name, option, defaults)) for name, option in table.items()),
    )


def _classes() -> list[str]:
    """The sections on the arguments of TRL's other trainers, given as `args`."""
    parts = []
    seen: dict[str, Option] = {}  # of GRPOConfig, which the other online trainers share most with
    for name, (_, table) in CLASSES.items():
        own = {n: option for n, option in table.items() if seen.get(n) != option}
        shared = "`DPOConfig` is in the first table" + (", with `GRPOConfig` in the table above" if seen else "")
        if own:
            parts += [
                f"## TRL's `{name}`\n\nGiven as `args`. What it shares with {shared}.\n",
                _options_table(own),
            ]
        if name == "GRPOConfig":
            parts += [_ONLINE]
            seen = table
    earlier = {**online_options.NASH_MD, **online_options.XPO}
    parts += [
        "## TRL's `NashMDConfig` and `XPOConfig`\n\nOf versions before 1.16, which has them no more. Beyond "
        "`OnlineDPOConfig`; their losses are `nash_md` and `xpo`.\n",
        _options_table(earlier),
    ]
    return parts


def page() -> str:
    """The whole page, as Markdown."""
    counts = {status: sum(o.status == status for o in options.OPTIONS.values()) for status in
              (HONOURED, RENAMED, REFUSED, NO_EFFECT)}  # fmt: skip
    summary = ", ".join(f"{number} {status}" for status, number in counts.items())
    losses = (
        (f"`{name}`", f"`{ours}`" if ours else "a function in `fastpo.losses`; `fastpo.train` cannot feed it yet")
        for name, ours in options.TRL_LOSSES.items()
    )
    parts = [
        _TOP,
        f"## TRL 1.16: every field of `DPOConfig`\n\n{len(options.OPTIONS)} fields with transformers 5.23: {summary}. "
        "A refused option raises when it is set to something else than its default or off.\n",
        _options_table(options.OPTIONS),
        "### Loss types\n",
        _table(("`loss_type` in TRL", "here"), losses),
        "### Earlier names, and arguments of the trainer\n",
        _table(("name", "here"), ((f"`{n}`", _here(n, o, {})) for n, o in options.EARLIER.items())),
        "### `trl dpo`: script and model options\n\nOn the command line and in the YAML file of `fastpo train`.\n",
        _options_table(options.SCRIPT),
        *_classes(),
        "### Their options by name\n\nIn a dict, a YAML file or as keyword arguments, where no class says the loss.\n",
        _table(("option", "here"), ((f"`{n}`", _here(n, o, {})) for n, o in {**options.KTO, **options.CPO, **options.REWARD}.items())),
    ]  # fmt: skip
    for project, names in options.FOREIGN.items():
        more = ", there also as `--group.name`" if project == "OpenRLHF" else ""
        parts += [
            f"## {project}\n\n{_ELSEWHERE.format(more=more)}",
            _table((f"{project}", "here"), ((f"`{name}`", text) for name, text in names.items())),
        ]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
