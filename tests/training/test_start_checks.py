"""What a run says before its first step: mistakes in one line, by name; options that change nothing; paths."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import torch

import fastpo
from fastpo.config import no_effect
from fastpo.config.no_effect import Facts, without_effect
from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError, FastpoError
from fastpo.training import inputs
from fastpo.training.step_plan import StepPlan, epoch_order, epoch_steps


@pytest.fixture
def refuse(toy, tmp_path):
    """`refuse(words, model=..., **options)`: the run ends before anything is trained, with that one line."""

    def run(words, model=None, rest=None, **options):
        rest = {"processing_class": toy.tokenizer(), **(rest or {})}
        options = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report": False, **options}
        policy = toy.model() if model is None else model
        before = {k: v.clone() for k, v in policy.state_dict().items()} if model is None else {}
        with pytest.raises(FastpoError, match=words) as caught:
            fastpo.train(policy, toy.rows(4), **rest, **options)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
        assert all(v.equal(policy.state_dict()[k]) for k, v in before.items())
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return str(caught.value)

    return run


# ---- options that failed late


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optim": "sgd", "optim_args": "momentum=nan"}, "optim_args: momentum must be finite, not nan"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "optim='sgd'.*Invalid momentum value"),
        ({"optim_args": "amsgrad=perhaps"}, "optim"),
        ({"optim": "sgd", "optim_args": "momentm=0.9"}, "did you mean momentum"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}}, "lr_scheduler_type=polynomial"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, "lr_scheduler_type=polynomial"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 1}}, "lr_scheduler_type=cosine"),
        ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": "x"}}, "num_cycles"),
        ({"lr_scheduler_kwargs": {"lr": "x" * 2000}}, "lr_scheduler_kwargs={'lr': 'xxx"),
        ({"optim": "sgd", "optim_args": f"momentum={'x' * 2000}"}, "optim_args='momentum=xxx"),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}}, "inverse_sqrt"),
        ({"gradient_checkpointing_kwargs": {"use_reentrnt": True}}, "gradient_checkpointing_kwargs.*use_reentrnt"),
        ({"gradient_checkpointing_kwargs": {"context_fn": 3}}, "gradient_checkpointing_kwargs"),
        ({"torch_compile_backend": "inductr"}, "torch_compile_backend='inductr' is unknown"),
        ({"generation_kwargs": {"max_new_tokens": 10**12}}, "max_new_tokens must be from 1 to 1,000,000"),
        ({"generation_kwargs": {"max_new_tokens": "x"}}, "max_new_tokens must be from 1 to"),
        ({"generation_kwargs": {"num_beems": 2}}, "did you mean 'num_beams'"),
        ({"num_train_epochs": 1e9, "per_device_train_batch_size": 1}, "4,000,000,000 steps .* at most 1,000,000,000"),
        ({"report_to": "wandbb"}, "unknown tracker 'wandbb' in report_to; did you mean 'wandb'"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model: no evaluation reports 'eval_accuracy'"),
        ({"push_to_hub": True, "hub_token": "x"}, "push_to_hub"),
        ({"dtype": "float8"}, "dtype"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_options_that_failed_late(refuse, options, words):
    refuse(words, **options)


def test_generation_is_tried_with_the_model(refuse, toy):
    """generate() itself refuses what neither a name nor a type shows."""
    options = {"sample_generations": 1, "eval_strategy": "steps", "rest": {"eval_dataset": toy.rows(2)}}
    refuse("generation_kwargs", generation_kwargs={"cache_implementation": "nonsense"}, **options)
    refuse("generation_kwargs: .*temperature", generation_kwargs={"temperature": -1.0, "do_sample": True}, **options)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FASTPO_ATTENTION", "nonsense", "FASTPO_ATTENTION='nonsense': expected one of flash_attn, varlen"),
        ("FASTPO_FUSED_FORWARD", "perhaps", "FASTPO_FUSED_FORWARD must be 0, 1 or unset, not 'perhaps'"),
        ("FASTPO_CACHE", __file__, "FASTPO_CACHE: .*training/test_start_checks.py' is a file"),
        ("FASTPO_CACHE", __file__ + "/below", "FASTPO_CACHE: .*training/test_start_checks.py' is a file"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_variables_that_say_nothing(refuse, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    refuse(words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "output_dir is empty"),
        ("  ", "output_dir is empty"),
        (__file__, "output_dir: .*training/test_start_checks.py' is a file"),
        (__file__ + "/a/b", "output_dir: .*training/test_start_checks.py' is a file"),
        ("x" * 5000, "output_dir 'xxx.* cannot be written: File name too long"),
        ("/proc/nowhere/x", "output_dir '/proc/nowhere/x' cannot be written"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_folders_that_cannot_be(refuse, name, words):
    refuse(words, output_dir=name)


# ---- arguments


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ({"processing_class": "gpt2"}, r"processing_class is a tokenizer, not its name: AutoTokenizer.from_p.*\("),
        ({"processing_class": Path("gpt2")}, "processing_class is a tokenizer, not its name"),
        ({"processing_class": {}}, "processing_class must be a tokenizer, not {}"),
        ({"processing_class": dict}, "processing_class must be a tokenizer, not <class 'dict'>"),
        ({"callbacks": "x"}, "callbacks must be a list of callbacks, not 'x'"),
        ({"callbacks": 3}, "callbacks must be a list of callbacks, not 3"),
        ({"callbacks": [None]}, "callbacks holds None, which has no on_"),
        ({"callbacks": [range]}, "callbacks: range cannot be made"),
        ({"optimizers": (1, 2)}, "optimizers: the first is a torch.optim.Optimizer or None, not 1"),
        ({"optimizers": ()}, r"optimizers must be \(optimizer, scheduler\), either of them None, not \(\)"),
        ({"optimizers": "adamw"}, "optimizers must be"),
        ({"optimizers": (None, 3)}, "optimizers: the second is a learning rate scheduler or None, not 3"),
        ({"eval_dataset": {}}, "eval_dataset is an empty mapping"),
        ({"eval_dataset": {3: []}}, "eval_dataset: the sets have names, and 3 is none"),
        ({"ref_model": 3}, "ref_model must be a model, or the name or path of one, not 3"),
        ({"ref_model": ""}, "ref_model must be a model, or the name or path of one, not ''"),
        ({"ref_model": "./nowhere"}, "ref_model: no such folder: './nowhere'"),
        ({"args": [1]}, "args must be a TrainConfig, a dict, a YAML path or a TRL config.*, not list"),
        ({"peft_config": 3}, "peft_config must be a PeftConfig"),
        ({"quantization_config": 3}, "quantization_config must be a BitsAndBytesConfig or its arguments, not 3"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_arguments_of_the_wrong_kind(refuse, rest, words):
    refuse(words, rest=rest)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"r": 4, "rr": 4}, "peft_config: LoraConfig has no 'rr'; did you mean 'r'"),
        ({"r": -1}, "peft_config does not fit LlamaForCausalLM: .*positive"),
        ({"r": 4, "target_modules": ["nowhere"]}, "peft_config does not fit LlamaForCausalLM: .*nowhere"),
        ({"lora_alpha": float("nan")}, "peft_config: lora_alpha must be finite, not nan"),
        ({"peft_type": "LORAA"}, "peft_config: unknown peft_type 'LORAA'; did you mean 'LORA'"),
        ({"task_type": "SEQ_CLS"}, "peft_config: task_type must be CAUSAL_LM, not 'SEQ_CLS'"),
        ({"r": "x"}, "peft_config"),
        ({3: 4}, "peft_config: its keys are names, not 3"),
    ],
    ids=str,
)
def test_adapters_as_mappings_that_do_not_fit(refuse, value, words):
    pytest.importorskip("peft")
    refuse(words, rest={"peft_config": value})


def test_an_adapter_as_a_mapping_is_the_adapter(toy, tmp_path):
    """As in YAML: the arguments of LoraConfig, or of what peft_type names."""
    peft = pytest.importorskip("peft")
    count = iter(range(9))

    def run(config):
        torch.manual_seed(0)
        return fastpo.train(
            toy.model(), toy.rows(4), processing_class=toy.tokenizer(), peft_config=config, max_steps=2, use_cpu=True,
            output_dir=str(tmp_path / str(next(count))), report=False, save_final=False, logging_steps=1,
            learning_rate=1e-2,
        ).model.state_dict()  # fmt: skip

    mapped, made = run({"r": 2}), run(peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert mapped.keys() == made.keys() and all(v.equal(made[k]) for k, v in mapped.items())
    assert any("lora_B" in k and v.abs().max() > 0 for k, v in mapped.items())
    assert isinstance(inputs.peft_config({"peft_type": "ia3"}), peft.IA3Config)


# ---- paths


@pytest.fixture
def model_folder(toy, tmp_path):
    toy.model().save_pretrained(tmp_path / "models" / "mine")
    toy.tokenizer().save_pretrained(tmp_path / "models" / "mine")
    return tmp_path / "models" / "mine"


def test_models_that_are_not_there(refuse, model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    refuse("model: no such folder: './nowhere'", model="./nowhere")
    near = str(model_folder.parent / "mien")
    refuse("model: no such folder: .*models/mien'; did you mean '.*models/mine'", model=near)
    refuse("model: no such folder: '/nowhere/at/all'", model=Path("/nowhere/at/all"))
    refuse("model: no such folder: 'nowhere'", model=Path("nowhere"))
    refuse("model: the folder .* holds no model, which has a config.json; there is one in mine below it",
           model=str(model_folder.parent))  # fmt: skip
    refuse("model: .*config.json' is a file, and a model is a folder", model=str(model_folder / "config.json"))
    refuse("model must be a model, or the name or path of one", model="")
    refuse("model must be a model, or the name or path of one, not 3", model=3)
    assert inputs.model_name("model", "~/models/mine") == str(model_folder)
    assert inputs.model_name("model", model_folder) == str(model_folder)
    assert inputs.model_name("model", "owner/name") == "owner/name" and inputs.model_name("model", "gpt2") == "gpt2"


# ---- options that change nothing

# For every line of the table: options that it names, and the same where they have their effect.
SILENT = {
    "eval_delay": ({"eval_delay": 5}, {"eval_delay": 5, "eval_strategy": "steps"}),
    "eval_steps": ({"eval_steps": 5, "eval_strategy": "epoch"}, {"eval_steps": 5}),
    "save_steps": ({"save_steps": 5, "save_strategy": "no"}, {"save_steps": 5}),
    "save_total_limit": ({"save_total_limit": 5, "save_strategy": "no"}, {"save_total_limit": 5}),
    "save_only_model": ({"save_only_model": True}, {"save_only_model": True, "save_steps": 5}),
    "logging_first_step": ({"logging_first_step": True, "logging_strategy": "no"}, {"logging_first_step": True}),
    "logging_steps": ({"logging_steps": 3, "logging_strategy": "epoch"}, {"logging_steps": 3}),
    "greater_is_better": ({"greater_is_better": True}, {"greater_is_better": True, "metric_for_best_model": "loss"}),
    "ref_model_sync_steps": ({"ref_model_sync_steps": 5}, {"ref_model_sync_steps": 5, "sync_ref_model": True}),
    "ref_model_mixup_alpha": ({"ref_model_mixup_alpha": 0.1}, {"ref_model_mixup_alpha": 0.1, "sync_ref_model": True}),
    "sync_ref_model": ({"sync_ref_model": True}, {"sync_ref_model": True, "ref_model_sync_steps": 5}),
    "warmup_steps": ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, {"warmup_steps": 5}),
    "warmup_ratio": ({"warmup_ratio": 0.5, "lr_scheduler_type": "constant"}, {"warmup_ratio": 0.5}),
    "adam_beta1": ({"adam_beta1": 0.5, "optim": "sgd"}, {"adam_beta1": 0.5}),
    "master_weights": ({"master_weights": "none"}, None),
    "gradient_checkpointing_kwargs": (
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "liger_kernel_config": (
        {"liger_kernel_config": {"rope": False}, "use_liger_kernel": False}, {"liger_kernel_config": {"rope": False}},
    ),
    "fsdp_gradients": ({"fsdp_gradients": "micro_batch"}, {"fsdp_gradients": "micro_batch", "fsdp": "full_shard"}),
    "ddp_timeout": ({"ddp_timeout": 5}, None),
    "ddp_backend": ({"ddp_backend": "gloo"}, None),
    "tf32": ({"tf32": True}, None),
    "generation_kwargs": (
        {"generation_kwargs": {"top_k": 5}},
        {"generation_kwargs": {"top_k": 5}, "sample_generations": 1, "eval_strategy": "steps"},
    ),
    "dataset_train_split": ({"dataset_train_split": "train_prefs"}, None),
    "dataset_test_split": ({"dataset_test_split": "test_prefs"}, None),
    "dataset_config": ({"dataset_config": "en"}, None),
    "project": ({"project": "mine"}, {"project": "mine", "report_to": "trackio"}),
    "hub_model_id": ({"hub_model_id": "me/mine"}, {"hub_model_id": "me/mine", "push_to_hub": True}),
    "num_train_epochs": ({"num_train_epochs": 2, "max_steps": 5}, {"num_train_epochs": 2}),
    "truncation_mode": ({"truncation_mode": "keep_end", "max_length": None}, {"truncation_mode": "keep_end"}),
    "data_seed": ({"data_seed": 3, "train_sampling_strategy": "sequential"}, {"data_seed": 3}),
    "optim": ({"optim": "sgd"}, None),
    "lr_scheduler_type": ({"lr_scheduler_type": "cosine"}, None),
    "entropy_target": (
        {"entropy_target": 1.0, "loss_type": "grpo"},
        {"entropy_target": 1.0, "loss_type": "grpo", "use_adaptive_entropy": True},
    ),
    "importance_sampling_clip_min": (
        {"importance_sampling_clip_min": 0.5, "loss_type": "grpo", "importance_sampling_correction": False},
        {"importance_sampling_clip_min": 0.5, "loss_type": "grpo"},
    ),
    "overlong_penalty": (
        {"overlong_penalty": 2.0, "loss_type": "dapo"},
        {"overlong_penalty": 2.0, "loss_type": "dapo", "overlong_buffer": 8},
    ),
    "log_unique_prompts": (
        {"log_unique_prompts": True, "loss_type": "grpo"},
        {"log_unique_prompts": True, "loss_type": "grpo", "log_completions": True},
    ),
    "num_generations_eval": (
        {"num_generations_eval": 3, "loss_type": "grpo"},
        {"num_generations_eval": 3, "loss_type": "grpo", "eval_strategy": "steps"},
    ),
}  # fmt: skip
PLAIN = Facts(steps=100, from_hub=False, eval_from_hub=False)
OTHER = Facts(device_type="cuda", processes=2, steps=100, narrow=True)


@pytest.mark.parametrize("name", SILENT)
def test_an_option_without_effect_is_named(name):
    silent, heard = SILENT[name]
    facts = PLAIN
    if name in ("optim", "lr_scheduler_type"):
        facts = Facts(steps=100, own_optimizer=False, own_scheduler=False)
    found = without_effect(TrainConfig.build(silent), facts)
    assert [f for f in found if name in f.partition(" (")[0].split(", ")], found
    found = without_effect(TrainConfig.build(silent if heard is None else heard), OTHER)
    assert not [f for f in found if name in f.partition(" (")[0].split(", ")], found


def test_the_table_of_silence_is_tested():
    """Every cause has a case above, for one of its options at least."""
    for names, _, why in no_effect._TABLE:
        assert set(names) & set(SILENT), why


def test_defaults_are_not_spoken_of(tmp_path):
    from transformers import TrainingArguments

    untouched = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    sources = [None, {}, untouched]
    if importlib.util.find_spec("trl"):
        import trl

        sources.append(trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
    for source in sources:
        assert without_effect(TrainConfig.build(source), PLAIN) == [], source
        assert without_effect(TrainConfig.build(source, save_strategy="no", max_steps=3), PLAIN) == []
        assert without_effect(TrainConfig.build(source, logging_strategy="no", optim="sgd"), PLAIN) == []


def test_silence_is_said_once_in_one_line(toy, tmp_path, caplog):
    options = {"adam_beta1": 0.5, "optim": "sgd", "dataloader_num_workers": 4, "tf32": True, "hub_strategy": "end"}
    with caplog.at_level(logging.WARNING, logger="fastpo"):
        fastpo.train(toy.model(), toy.rows(4), processing_class=toy.tokenizer(), max_steps=2, use_cpu=True,
                     report=False, output_dir=str(tmp_path), save_final=False, logging_steps=1, **options)  # fmt: skip
    said = [r.getMessage() for r in caplog.records if "without effect" in r.getMessage()]
    assert len(said) == 1 and "\n" not in said[0]
    for words in ("adam_beta1 (optim is no Adam)", "tf32 (the device is a CPU)", "hub_strategy (push_to_hub is off)",
                  "dataloader_num_workers (docs/migrating-from-trl.md says why)"):  # fmt: skip
        assert words in said[0]
    assert TrainConfig.build(TrainConfig.build(options)).without_meaning == ["dataloader_num_workers"]


# ---- the plan of the steps


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_a_plan_is_what_its_epochs_are(drop_last, strategy):
    config = TrainConfig(
        seed=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2.5,
        dataloader_drop_last=drop_last, train_sampling_strategy=strategy,
    )  # fmt: skip
    plan = StepPlan(config, 11)
    whole = []
    for epoch in range(3):
        order = epoch_order(11, seed=3, epoch=epoch, strategy=strategy)
        whole += [(epoch, rows) for rows in epoch_steps(order, 2, 2, drop_last)]
    whole = whole[: -(-5 * (len(whole) // 3) // 2)]
    assert list(plan) == whole and len(plan) == len(whole) and plan[-1] == whole[-1] and plan[2:5] == whole[2:5]
    for start, stop in ((0, None), (1, 3), (3, 10**9)):
        assert plan.visited(start, stop) == {row for _, rows in whole[start:stop] for row in rows}
    with pytest.raises(IndexError):
        plan[len(plan)]


def test_a_billion_steps_cost_nothing():
    plan = StepPlan(TrainConfig(max_steps=10**9, per_device_train_batch_size=2, dataloader_drop_last=True), 5)
    assert len(plan) == 10**9 and plan[10**9 - 1][0] == 10**9 // 2 - 1
    assert plan.visited() == set(range(5))
    sequential = TrainConfig(max_steps=10**9, per_device_train_batch_size=2, dataloader_drop_last=True,
                             train_sampling_strategy="sequential")  # fmt: skip
    assert StepPlan(sequential, 5).visited() == {0, 1, 2, 3}


FULL_STEPS = [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_order_is_transformers_seeded_permutation():
    # accelerate's SeedableRandomSampler for n = 10 and seed 42, epochs 0 and 1
    assert epoch_order(10, seed=42, epoch=0, strategy="random") == [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]
    assert epoch_order(10, seed=42, epoch=1, strategy="random") == [8, 4, 9, 0, 5, 1, 6, 7, 2, 3]
    assert epoch_order(3, seed=42, epoch=1, strategy="sequential") == [0, 1, 2]


@pytest.mark.parametrize(("drop", "steps"), [(False, [*FULL_STEPS, [8]]), (True, FULL_STEPS)])
def test_steps_of_an_epoch(drop, steps):
    assert epoch_steps(range(9), 2, 2, drop) == steps


def test_a_run_of_a_billion_steps_stops_when_told(toy, tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    result = fastpo.train(
        toy.model(), toy.rows(4), processing_class=toy.tokenizer(), callbacks=[Stop], max_steps=10**9, use_cpu=True,
        output_dir=str(tmp_path), report=False, save_final=False, save_steps=10**9, disable_tqdm=True,
    )  # fmt: skip
    assert result.state.global_step == 2 and result.state.max_steps == 10**9


# ---- fuzz


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_options", Path(__file__).parents[1] / "fuzz_options.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_options"] = module
    spec.loader.exec_module(module)
    return module


def test_random_options(fuzz, tmp_path, monkeypatch):
    """A small part of `python tests/fuzz_options.py`: trained, or one line."""
    monkeypatch.chdir(tmp_path)
    stage, found = fuzz.Stage(), []
    try:
        for seed in range(60):
            for way, what, said in fuzz.run_case(stage, seed):
                found.append(what)
                assert what != "FAILED", f"seed {seed}, {way}: {said}"
    finally:
        logging.disable(logging.NOTSET)
    assert min(map(found.count, ("trained", "refused", "built", "parsed"))) >= 10


def test_the_fuzz_sees_failures(fuzz):
    """A raw exception, an empty message: what it is there to find."""

    def raise_(error):
        raise error

    assert fuzz.outcome(lambda *_: "trained", {}, {}) == ("trained", "")
    assert fuzz.outcome(lambda *_: raise_(ConfigError("one line")), {}, {}) == ("refused", "one line")
    for error in (KeyError("x"), ConfigError(""), MemoryError()):
        assert fuzz.outcome(lambda *_, e=error: raise_(e), {}, {})[0] == "FAILED"
