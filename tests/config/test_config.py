"""TrainConfig from every source, and every mistake a one-line error."""

import dataclasses
import pickle

import pytest

from fastpo.config import bounds
from fastpo.config.train_config import TrainConfig, field_names, read_yaml
from fastpo.errors import ConfigError


def test_sources_agree(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-5\nloss_type: [sigmoid, sft]\nloss_weights: [1, 0.5]\nbeta: 0.2\n")
    options = {"learning_rate": "1e-5", "loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5], "beta": 0.2}
    assert TrainConfig.build(path) == TrainConfig.build(options) == TrainConfig.build(TrainConfig.build(options))
    config = TrainConfig.build(path, beta=0.3)
    assert (config.learning_rate, config.beta, config.loss_weights) == (1e-5, 0.3, [1.0, 0.5])
    assert config.losses == ["sigmoid", "sft"]


def test_every_field_has_help_and_a_group():
    for f in dataclasses.fields(TrainConfig):
        assert f.metadata["help"] and f.metadata["group"], f.name
    assert len(set(field_names())) == len(field_names())


def test_options_of_transformers_and_trl():
    assert TrainConfig.build({"activation_checkpointing": False}).gradient_checkpointing is False
    assert TrainConfig.build({"padding_free": True, "dataloader_num_workers": 4, "fp16": False}) == TrainConfig()
    with pytest.raises(ConfigError, match="neftune_noise_alpha=5 is not honoured"):
        TrainConfig.build(neftune_noise_alpha=5)


def test_training_arguments_object():
    from transformers import TrainingArguments

    args = TrainingArguments(
        output_dir="here", learning_rate=3e-4, max_steps=7, use_cpu=True, lr_scheduler_type="cosine"
    )
    config = TrainConfig.build(args)
    assert (config.output_dir, config.learning_rate, config.max_steps) == ("here", 3e-4, 7)
    assert config.lr_scheduler_type == "cosine" and config.bf16 is False and config.use_cpu
    assert config.logging_steps == 500  # transformers' default keeps its meaning
    with pytest.raises(ConfigError, match="neftune_noise_alpha=5.0 is not honoured"):
        TrainConfig.build(TrainingArguments(output_dir="here", use_cpu=True, neftune_noise_alpha=5.0))
    compiled = TrainConfig.build(TrainingArguments(output_dir="here", use_cpu=True, torch_compile=True))
    assert compiled.torch_compile and compiled.torch_compile_backend == "inductor"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["dpo", "ipo"], "loss_weights": [1, float("nan")]}, "loss_weights must be from -1,000"),
        ({"bta": 0.1}, "unknown option 'bta'; did you mean 'beta'"),
        ({"fp16": True}, "fp16=True is not honoured by fastpo: use bf16"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not honoured"),
        ({"model_init_kwargs": "{a"}, "model_init_kwargs is not JSON"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs save_strategy and eval_strategy alike"),
        ({"ref_model_mixup_alpha": 1.5}, r"ref_model_mixup_alpha must be in \[0, 1\]"),
        ({"sample_generations": -1}, "sample_generations must be zero or more"),
        ({"beta": 0}, "beta must be positive, not 0"),
        ({"beta": float("nan")}, "beta must be positive, not nan"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, not 'fast'"),
        ({"max_steps": 1.5}, "max_steps must be a whole number, not 1.5"),
        ({"bf16": "maybe"}, "bf16 must be true or false, not 'maybe'"),
        ({"optim": "lion"}, "optim must be one of adamw_torch"),
        ({"max_steps": 0}, "max_steps must be positive, or -1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be positive"),
        ({"report_to": 3}, "report_to must be a string or list, not 3"),
        ({"loss_type": ["dpo", "sft"], "loss_weights": [1]}, "loss_weights has 1 entries for 2 losses"),
        ({"gradient_checkpointing": None}, "gradient_checkpointing must not be None"),
    ],
)  # fmt: skip
def test_mistakes(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig.build(options)
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file: .*the configuration"):
        TrainConfig.build(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("beta: [1\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        TrainConfig.build(broken)
    broken.write_text("- beta\n")
    with pytest.raises(ConfigError, match="must hold option names"):
        TrainConfig.build(str(broken))
    with pytest.raises(ConfigError, match="args must be .* not list"):
        TrainConfig.build([1])


def test_a_cadence_implies_its_strategy():
    assert TrainConfig.build(save_steps=5).save_strategy == "steps"
    assert TrainConfig.build(save_total_limit=2).save_strategy == "steps"
    assert TrainConfig.build(eval_steps=5).eval_strategy == "steps"
    assert TrainConfig.build(save_steps=5, save_strategy="no").save_strategy == "no"


def test_arguments_of_other_trainers_are_refused():
    import dataclasses as dc

    from transformers import TrainingArguments

    @dc.dataclass
    class SFTConfig(TrainingArguments):
        beta: float = 0.1

    with pytest.raises(ConfigError, match="args is a SFTConfig"):
        TrainConfig.build(SFTConfig(output_dir="x", use_cpu=True))


def test_harmless_values_are_accepted(tmp_path):
    import torch

    assert TrainConfig.build(report_to=None).report_names == TrainConfig.build(report_to=[]).report_names == []
    assert TrainConfig.build(model_init_kwargs='{"revision": "v2"}').model_init_kwargs == {"revision": "v2"}
    assert TrainConfig.build(output_dir=None, disable_tqdm=None) == TrainConfig()  # TRL's defaults
    assert TrainConfig.build(TrainConfig(max_length=10), max_length=None).max_length is None
    options = {"f_divergence_type": "reverse_kl", "logging_strategy": "steps", "max_grad_norm": -1.0}
    assert TrainConfig.build(options).max_grad_norm == -1.0
    assert TrainConfig.build(output_dir=tmp_path, dtype=torch.bfloat16).dtype == "torch.bfloat16"
    with pytest.raises(ConfigError, match="both set"):
        TrainConfig.build(warmup_ratio=0.0, warmup_steps=3)


def test_no_and_yes_of_yaml(tmp_path):
    """YAML reads a bare no as false; transformers' strategies are called no."""
    path = tmp_path / "run.yaml"
    path.write_text("eval_strategy: no\nsave_strategy: no\nshare_prompts: no\n")
    config = TrainConfig.build(read_yaml(path))
    assert (config.eval_strategy, config.save_strategy, config.share_prompts) == ("no", "no", "never")
    assert TrainConfig(share_prompts=True).share_prompts == "always"
    with pytest.raises(ConfigError, match="eval_strategy must be a string, not True"):
        TrainConfig(eval_strategy=True)


LISTS = ("loss_weights", "reward_weights")


def number_fields():
    kinds = {f.name: bounds.kinds_of(f.type) for f in dataclasses.fields(TrainConfig)}
    return [name for name, of in kinds.items() if int in of or float in of] + [*LISTS]


def test_every_number_has_a_range():
    assert set(bounds.RANGES) == set(number_fields())
    for f in dataclasses.fields(TrainConfig):
        if f.name in bounds.RANGES:
            bounds.check_range(f.name, f.default)


@pytest.mark.parametrize("name", sorted(bounds.RANGES))
def test_numbers_out_of_range(name):
    """NaN, infinities, and numbers as large as they come: one line that names the option."""
    for number in (float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 10**400, -(10**400), "nan", "1e400"):
        value = [number] if name in LISTS else number
        with pytest.raises(ConfigError, match=f"{name} must be ") as caught:
            TrainConfig.build({name: value})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    low, high = bounds.RANGES[name].low, bounds.RANGES[name].high
    bounds.check_range(name, high if not bounds.RANGES[name].below else 0.5)
    if high > 1:
        with pytest.raises(ConfigError, match="at most"):
            bounds.check_range(name, high * 2)
    with pytest.raises(ConfigError, match=name):
        bounds.check_range(name, low - max(1, abs(low)))


def test_numbers_of_numpy_keep_their_digits():
    import numpy as np
    import torch

    config = TrainConfig.build(
        beta=np.float64(0.2), seed=np.int64(3), loss_weights=(np.float32(0.5),), tf32=np.bool_(True),
        logits_memory_budget=2**61 + 1, model_init_kwargs={"a": np.int32(2)}, dtype=torch.bfloat16,
    )  # fmt: skip
    assert (config.beta, config.seed, config.loss_weights, config.tf32) == (0.2, 3, [0.5], True)
    assert {type(v) for v in (config.beta, config.seed, config.tf32, config.model_init_kwargs["a"])} == {
        float, int, bool,
    }  # fmt: skip
    assert config.logits_memory_budget == 2**61 + 1 and config.dtype == "torch.bfloat16"
    for strange in (np.ones(2), torch.tensor(2.0), torch.ones(2), 1j, b"1", object, len):
        for name in ("beta", "seed", "output_dir", "bf16", "model_init_kwargs", "fp16", "neftune_noise_alpha"):
            with pytest.raises(ConfigError, match=name):
                TrainConfig.build({name: strange})


class TwoLines:
    def __repr__(self):
        return "one\ntwo" + "x" * 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run_name": "a\x00b"}, "run_name holds a null character"),
        ({"run_name": "\ud800"}, "run_name is no text that a file can hold"),
        ({"generation_kwargs": {"temperature": float("nan")}}, "generation_kwargs: temperature must be finite"),
        ({"lr_scheduler_kwargs": {"a": [1.0, float("inf")]}}, "lr_scheduler_kwargs: a must be finite, not inf"),
        ({"model_init_kwargs": {3: 4}}, "model_init_kwargs: its keys are names, not 3"),
        ({"loss_kwargs": {"": 4}}, "loss_kwargs: its keys are names, not ''"),
        ({3: 4}, "options have names, and 3 is none"),
        ({"beta": TwoLines()}, "beta must be a number, not one two"),
        ({"fp16": TwoLines()}, "fp16=one two.* is not honoured"),
        ({"x" * 5000: 1}, "unknown option 'xxx"),
        ({"logging_steps": 2.5}, "logging_steps must be a whole number of steps, or below 1 a share of all steps"),
        ({"warmup_steps": 1.5}, "warmup_steps must be a whole number of steps, or below 1 a share"),
        ({"report_to": ["wandb", 3]}, "report_to must be a string or a list of strings"),
        ({"loss_type": []}, "loss_type names no loss"),
        ({"loss_weights": ["x"]}, "loss_weights must be a list of numbers, not"),
        ({"max_steps": 10**9 + 1}, "max_steps must be at most 1,000,000,000, not 1000000001"),
        ({"seed": -1}, "seed must be zero or more, not -1"),
        ({"seed": 2**32}, "seed must be at most 4,294,967,295, not 4294967296"),
        ({"adam_epsilon": 0}, "adam_epsilon must be from 1e-37 to 1,000,000, not 0"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_values_that_no_run_takes(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig.build(options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_message_is_one_line_whatever_is_in_it():
    error = ConfigError("a\n  b\t" + "c" * 10_000)
    assert str(error).startswith("a b ccc") and len(str(error)) < 2100 and "\n" not in str(error)
    assert pickle.loads(pickle.dumps(error)).args == error.args


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"beta: 0.1\nbeta: 0.2\n", r"'beta' is set twice \(line 2\)"),
        (b"peft_config:\n  r: 1\n  r: 2\n", r"'r' is set twice \(line 3\)"),
        (b"beta:\n\t- 1\n", "is not valid YAML: .*indent with spaces"),
        (b"\xff\xfe\x00", "cannot read the configuration"),
        (b"0\n", "must hold option names with values, not a int"),
        (b"just words\n", "must hold option names with values, not a str"),
        (b"[]\n", "must hold option names with values, not a list"),
        (b"? [1, 2]\n: 3\n", "is not valid YAML"),
        (b"3: 4\n", "options have names, and 3 is none"),
        (b"beta: !!python/object:os.system {}\n", "is not valid YAML"),
    ],
)  # fmt: skip
def test_files_that_are_no_configuration(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig.build(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_a_configuration(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf# with a mark\nbase: &base {beta: 0.2}\n"[:3] + b"# nothing\n")
    assert TrainConfig.build(path) == TrainConfig()
    path.write_text("run_name: '\N{GREEK SMALL LETTER BETA}'\n", encoding="utf-8")
    assert TrainConfig.build(path).run_name == "\N{GREEK SMALL LETTER BETA}"
    for absent in (tmp_path / "absent.yaml", "absent\x00.yaml", tmp_path):
        with pytest.raises(ConfigError, match="the configuration"):
            TrainConfig.build(absent)
