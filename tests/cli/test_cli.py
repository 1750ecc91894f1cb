"""`fastpo` on the command line: precedence, every option, exit codes, one-line errors, a quick --help."""

import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest
import yaml

from fastpo import cli
from fastpo.cli.options import kinds_of
from fastpo.config import TrainConfig
from fastpo.errors import DataError, TrainingError


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the trainer; collects the arguments of each call of `fastpo.train`."""
    calls = []
    module = types.ModuleType("fastpo.trainer")
    module.train = lambda **kwargs: calls.append(kwargs)
    monkeypatch.setitem(sys.modules, "fastpo.trainer", module)
    return calls


INPUTS = ["--model", "m", "--train-dataset", "d.jsonl"]


def run_train(trained, *options):
    assert cli.main(["train", *INPUTS, *options]) == 0
    return trained[-1]["args"]


def fail(capsys, *argv):
    """Exit code 2 with exactly one line on stderr; returns the line."""
    assert cli.main(list(argv)) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastpo: error: "), captured.err
    assert "Traceback" not in captured.out
    return lines[0]


# --- precedence and spelling


def test_command_line_over_yaml_over_default(trained, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: from-yaml\ndataset_name: rows.jsonl\nbeta: 0.3\nlearning_rate: 1e-5\nloss_type: ipo\n")
    assert cli.main(["train", "--config", str(path), "--beta", "0.2", "--model", "from-cli"]) == 0
    call = trained[0]
    assert call["model"] == "from-cli"
    assert call["train_dataset"] == "rows.jsonl"
    args = call["args"]
    assert (args.beta, args.learning_rate, args.loss_type) == (0.2, 1e-5, "ipo")
    assert args.max_length == TrainConfig().max_length
    assert "eval_dataset" not in call


@pytest.mark.parametrize(
    "options", [["--learning-rate", "3e-4"], ["--learning_rate", "3e-4"], ["--learning_rate=3e-4"]], ids=str
)
def test_kebab_and_snake_case(trained, options):
    assert run_train(trained, *options).learning_rate == 3e-4


def test_underscores_in_values_are_kept(trained, tmp_path):
    args = run_train(trained, "--run-name=my_run", "--output_dir", str(tmp_path / "a_b"))
    assert args.run_name == "my_run" and args.output_dir.endswith("a_b")


@pytest.mark.parametrize(
    "options, value",
    [
        ([], None),
        (["--bf16"], True),
        (["--no-bf16"], False),
        (["--no_bf16"], False),
        (["--bf16", "true"], True),
        (["--bf16=False"], False),
        (["--bf16", "none"], None),
    ],
    ids=str,
)
def test_booleans(trained, options, value):
    assert run_train(trained, *options).bf16 is value


def test_lists_and_mappings(trained):
    args = run_train(
        trained, "--loss-type", "sigmoid, sft", "--loss_weights", "1,0.5", "--lr-scheduler-kwargs", '{"num_cycles": 2}'
    )
    assert args.loss_type == ["sigmoid", "sft"]
    assert args.loss_weights == [1.0, 0.5]
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert run_train(trained, "--loss-type", "[sigmoid, sft]").loss_type == ["sigmoid", "sft"]
    # as the help and the messages write them
    assert run_train(trained, "--loss-kwargs", "{cpo_alpha: 0.5}").loss_kwargs == {"cpo_alpha": 0.5}
    assert run_train(trained, "--loss-type", "simpo").loss_type == "simpo"


@pytest.mark.parametrize("in_yaml", [False, True], ids=["command line", "yaml"])
def test_several_evaluation_sets(trained, tmp_path, in_yaml):
    sets = {"news": "a.jsonl", "code": "b.jsonl"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"eval_dataset": sets} if in_yaml else {}))
    options = [] if in_yaml else ["--eval-dataset", json.dumps(sets)]
    args = run_train(trained, "--config", str(path), "--eval-steps", "1", *options)
    assert trained[-1]["eval_dataset"] == sets and args.eval_strategy == "steps"


@pytest.mark.parametrize(
    "value, words", [("{a: b}", "eval_dataset is not JSON"), ('{"a": 3}', "eval_dataset must be a path or a name")]
)
def test_evaluation_sets_that_are_none(trained, capsys, value, words):
    assert words in fail(capsys, "train", *INPUTS, "--eval-dataset", value)


def test_reward_functions(trained, tmp_path):
    """Names and mappings, as often as there are; the trainer finds out what they are."""
    run_train(trained, "--loss_type", "grpo", "--reward_funcs", "mine.py:length", "org/rm")
    assert trained[-1]["reward_funcs"] == ["mine.py:length", "org/rm"]
    scorer = {"kind": "verifier", "verifier": "number"}
    run_train(trained, "--loss-type", "grpo", "--reward-model-name-or-path", "rm", "--reward-funcs", json.dumps(scorer))
    assert trained[-1]["reward_funcs"] == ["rm", scorer]
    path = tmp_path / "run.yaml"
    for given, found in ((["a:b", scorer], ["a:b", scorer]), ("a.py:b", ["a.py:b"]), (scorer, [scorer])):
        path.write_text(yaml.safe_dump({"loss_type": "grpo", "reward_funcs": given}))
        run_train(trained, "--config", str(path))
        assert trained[-1]["reward_funcs"] == found
    run_train(trained, "--config", str(path), "--reward-funcs", "c:d")
    assert trained[-1]["reward_funcs"] == ["c:d"]  # the command line wins


def test_reward_functions_by_name(trained, tmp_path):
    """In the file of options, in one of their own, or as JSON: in their order, which reward_weights have."""
    sections = {"style": {"kind": "rules", "rules": ["is polite"], "judge": {"base_url": "http://x/v1"}}, "a": "a.py:b"}
    path, rewards = tmp_path / "run.yaml", tmp_path / "rewards.yaml"
    path.write_text(yaml.safe_dump({"loss_type": "grpo", "reward_funcs": sections}, sort_keys=False))
    rewards.write_text(yaml.safe_dump(sections, sort_keys=False))
    run_train(trained, "--config", str(path))
    assert list(trained[-1]["reward_funcs"].items()) == list(sections.items())
    for given in (str(rewards), json.dumps(sections)):
        run_train(trained, "--loss-type", "grpo", "--reward-funcs", given)
        assert list(trained[-1]["reward_funcs"].items()) == list(sections.items())


def test_reward_functions_by_name_that_are_none(trained, capsys, tmp_path):
    def failed(text, *more):
        (tmp_path / "r.yaml").write_text(text)
        return fail(capsys, "train", *INPUTS, "--loss-type", "grpo", "--reward-funcs", str(tmp_path / "r.yaml"), *more)

    assert "r.yaml names its scorers: give it alone" in failed("a: a.py:b\n", "c:d")
    assert "r.yaml must hold a scorer's section, or its name or path, by a name, not a: 3" in failed("a: 3\n")
    assert "r.yaml" in failed("- a\n") and "r.yaml" in failed("a: [\n")
    assert "no.yaml" in fail(capsys, "train", *INPUTS, "--loss-type", "grpo", "--reward-funcs", "no.yaml")


@pytest.mark.parametrize(
    "given, words",
    [
        ("think_format_reward", "think_format_reward is a name of `trl grpo`: write trl.rewards:think_format_reward"),
        ("get_soft_overlong_punishment", "set overlong_buffer"),
        ("{a", "reward_funcs: '{a' is not JSON"),
        ("", "reward_funcs must hold names and mappings, not ''"),
    ],
)
def test_reward_functions_that_are_none(trained, capsys, given, words):
    assert words in fail(capsys, "train", *INPUTS, "--loss-type", "grpo", "--reward-funcs", given)


def test_a_sampler_and_a_judge(trained):
    sampler = {"engine": "openai", "base_url": "http://localhost:8000/v1"}
    assert run_train(trained, "--loss-type", "grpo", "--sampler", json.dumps(sampler)).sampler == sampler
    loss = ("--loss-type", "online_dpo", "--judge")
    assert run_train(trained, *loss, "{kind: judge, model: m}").judge == {"kind": "judge", "model": "m"}
    assert run_train(trained, *loss, "judges.py:mine").judge == "judges.py:mine"
    args = run_train(trained, "--loss-type", "grpo", "--use-vllm", "--vllm-mode", "server", "--no-shuffle-dataset")
    assert args.sampler == sampler and args.train_sampling_strategy == "sequential"


def test_none_and_negative_numbers(trained):
    args = run_train(trained, "--max-length", "none", "--max-steps", "-1")
    assert args.max_length is None and args.max_steps == -1


def _other_value(field):
    """A value unlike the default, as text, and what it must become."""
    choices = field.metadata.get("choices")
    if choices:
        value = next(c for c in choices if c != field.default)
        return value, value
    special = {
        "loss_type": ("simpo", "simpo"),
        "loss_weights": ("2", [2.0]),
        "reward_weights": ("2", [2.0]),
        "report_to": ("tensorboard", "tensorboard"),
        "fsdp": ("shard_grad_op", "shard_grad_op"),
        "resume_from_checkpoint": ("out/checkpoint-3", "out/checkpoint-3"),
        "trackio_static_space_id": ("me/space", "me/space"),
        "sampler": ('{"batch_size": 4}', {"batch_size": 4}),
    }
    if field.name in special:
        return special[field.name]
    kinds = kinds_of(field.type)
    if bool in kinds:
        return (("false", False), ("true", True))[field.default is not True]
    if dict in kinds:
        return '{"a": 1}', {"a": 1}
    if float in kinds:
        return "0.25", 0.25
    if int in kinds:
        return "3", 3
    return "text", "text"


# Options that another must go with: a sharded run, an evaluation to pick the best by.
NEEDS = {
    "fsdp_cpu_offload": {"fsdp": "full_shard"},
    "load_best_model_at_end": {"save_strategy": "epoch", "eval_strategy": "epoch"},
    "sample_generations": {"eval_strategy": "epoch"},
    "pair_margin": {"pair_policy": "margin"},
    "judge": {"loss_type": "online_dpo"},
    "mixture_coef": {"loss_type": "nash_md"},
}


def _needs(field):
    online = {"loss_type": "grpo"} if field.metadata["group"].startswith("online") else {}
    return NEEDS.get(field.name, online)


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda f: f.name)
def test_every_field_is_an_option_and_a_yaml_key(trained, tmp_path, field):
    text, value = _other_value(field)
    needs = _needs(field)
    also = [part for name, other in needs.items() for part in ("--" + name, other)]
    args = run_train(trained, *also, "--" + field.name.replace("_", "-"), text)
    assert getattr(args, field.name) == value
    implied = {"eval_steps": "eval_strategy", "save_steps": "save_strategy", "save_total_limit": "save_strategy",
               "torch_compile_backend": "torch_compile", "torch_compile_mode": "torch_compile"}  # fmt: skip
    unbounded = {"max_length"} if "loss_type" in needs else set()  # of an online loss: max_completion_length bounds it
    for other in dataclasses.fields(TrainConfig):
        if other.name not in (field.name, implied.get(field.name), *needs, *unbounded):
            assert getattr(args, other.name) == getattr(TrainConfig(), other.name)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "train_dataset": "d.jsonl", **needs, field.name: value}))
    assert cli.main(["train", "--config", str(path)]) == 0
    assert trained[-1]["args"] == args


def test_print_config_round_trips(trained, tmp_path, capsys):
    options = [*INPUTS, "--beta", "0.7", "--loss-type", "dpo,sft", "--loss-weights", "1,0.1", "--print-config"]
    assert cli.main(["train", *options]) == 0
    first = capsys.readouterr().out
    path = tmp_path / "run.yaml"
    path.write_text(first)
    assert cli.main(["train", "--config", str(path), "--print-config"]) == 0
    assert capsys.readouterr().out == first
    assert yaml.safe_load(first)["model"] == "m" and not trained


def test_adapter_from_json(trained):
    pytest.importorskip("peft")
    run_train(trained, "--peft-config", '{"r": 4, "target_modules": ["q_proj"]}')
    adapter = trained[-1]["peft_config"]
    assert type(adapter).__name__ == "LoraConfig" and adapter.r == 4 and adapter.task_type == "CAUSAL_LM"


# --- as `trl dpo` is called


def test_the_commands_of_trls_own_script(trained):
    """The two commands in the docstring of TRL 1.16's scripts/dpo.py."""
    common = (
        "--dataset_name trl-lib/ultrafeedback_binarized --model_name_or_path Qwen/Qwen2-0.5B-Instruct "
        "--learning_rate {} --num_train_epochs 1 --per_device_train_batch_size 2 --max_steps 1000 "
        "--gradient_accumulation_steps 8 --eval_strategy steps --eval_steps 50 --output_dir Qwen2-0.5B-DPO "
        "--no_remove_unused_columns"
    )
    assert cli.main(["train", *common.format("5.0e-7").split()]) == 0
    call = trained[-1]
    args = call.pop("args")
    data = "trl-lib/ultrafeedback_binarized"
    assert call == {"model": "Qwen/Qwen2-0.5B-Instruct", "train_dataset": data, "eval_dataset": data}
    assert (args.learning_rate, args.max_steps, args.gradient_accumulation_steps) == (5e-7, 1000, 8)
    assert (args.eval_strategy, args.eval_steps, args.num_train_epochs) == ("steps", 50, 1)

    pytest.importorskip("peft")
    lora = " --use_peft --lora_r 32 --lora_alpha 16"
    assert cli.main(["train", *(common.format("5.0e-6") + lora).split()]) == 0
    adapter = trained[-1]["peft_config"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.task_type) == (32, 16, 0.05, "CAUSAL_LM")


@pytest.mark.parametrize("in_yaml", [False, True], ids=["command line", "yaml"])
def test_trls_model_options(trained, tmp_path, in_yaml):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    words = (
        "--use_peft --lora_r 8 --lora_target_modules q_proj v_proj --lora_modules_to_save lm_head --use_rslora true "
        "--use_dora --load_in_4bit --use_bnb_nested_quant --bnb_4bit_quant_type fp4 --model_revision v2 "
        "--attn_implementation eager --torch_dtype float16 --loss_type sigmoid sft --loss_weights 1 0.5"
    ).split()
    if in_yaml:
        path = tmp_path / "run.yaml"
        keys = {
            "use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"],
            "lora_modules_to_save": ["lm_head"], "use_rslora": True, "use_dora": True, "load_in_4bit": True,
            "use_bnb_nested_quant": True, "bnb_4bit_quant_type": "fp4", "model_revision": "v2",
            "attn_implementation": "eager", "torch_dtype": "float16", "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1, 0.5],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(keys))
        words = ["--config", str(path)]
    args = run_train(trained, *words)
    assert args.model_init_kwargs == {"revision": "v2", "attn_implementation": "eager"} and args.dtype == "float16"
    assert (args.loss_type, args.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])
    adapter, quantization = trained[-1]["peft_config"], trained[-1]["quantization_config"]
    assert (adapter.r, set(adapter.target_modules), adapter.modules_to_save) == (8, {"q_proj", "v_proj"}, ["lm_head"])
    assert adapter.use_rslora and adapter.use_dora
    assert quantization.load_in_4bit and quantization.bnb_4bit_use_double_quant
    assert quantization.bnb_4bit_quant_type == "fp4" and str(quantization.bnb_4bit_compute_dtype) == "torch.float16"


@pytest.mark.parametrize("text", ["all-linear", "q_proj", "q_proj,v_proj", r".*\.(q|v)_proj"], ids=str)
def test_lora_targets(trained, text):
    pytest.importorskip("peft")
    run_train(trained, "--use_peft", "--lora_target_modules", text)
    targets = trained[-1]["peft_config"].target_modules
    assert targets == (set(text.split(",")) if "proj" in text and "*" not in text else text)


def test_eight_bit_and_what_asks_for_nothing(trained):
    pytest.importorskip("bitsandbytes")
    run_train(trained, "--load_in_8bit")
    assert trained[-1]["quantization_config"].load_in_8bit
    run_train(trained, "--use_peft", "false", "--lora_r", "8", "--load_in_4bit", "False", "--dataset_streaming=false")
    assert not {"peft_config", "quantization_config"} & set(trained[-1])


def test_reference_and_environment(trained, tmp_path, monkeypatch):
    monkeypatch.delenv("FASTPO_TEST_VARIABLE", raising=False)
    monkeypatch.setenv("FASTPO_TEST_VARIABLE", "old")
    path = tmp_path / "run.yaml"
    path.write_text("env: {FASTPO_TEST_VARIABLE: 1}\nref_model_name_or_path: folder\n")
    run_train(trained, "--config", str(path), "--prev-model", "iterate")
    assert trained[-1]["ref_model"] == "folder" and os.environ["FASTPO_TEST_VARIABLE"] == "1"
    assert trained[-1]["prev_model"] == "iterate"


@pytest.mark.parametrize(
    "options, mode, offload",
    [
        (["--fsdp"], "full_shard", False),
        (["--fsdp", "full_shard"], "full_shard", False),
        (["--fsdp", "full_shard auto_wrap"], "full_shard", False),
        (["--fsdp=shard_grad_op offload"], "shard_grad_op", True),
        (["--fsdp", "true", "--fsdp-cpu-offload"], "full_shard", True),
        (["--fsdp", "no"], "no", False),
        (["--no-fsdp"], "no", False),
        (["--fsdp", "--fsdp_config", '{"reshard_after_forward": false, "cpu_offload": true}'], "shard_grad_op", True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_fsdp(trained, options, mode, offload):
    args = run_train(trained, *options)
    assert (args.fsdp, args.fsdp_cpu_offload) == (mode, offload)


@pytest.mark.parametrize(
    "options, value",
    [
        ([], None),
        (["--resume-from-checkpoint"], True),
        (["--resume_from_checkpoint", "true"], True),
        (["--resume_from_checkpoint", "auto"], "auto"),
        (["--resume_from_checkpoint=false"], None),
        (["--resume_from_checkpoint="], None),
        (["--no-resume-from-checkpoint"], None),
        (["--resume_from_checkpoint", "out/checkpoint-3"], "out/checkpoint-3"),
    ],
    ids=str,
)
def test_resume_from_checkpoint(trained, options, value):
    assert run_train(trained, *options).resume_from_checkpoint == value


def test_ranks_say_which_they_are(capsys, monkeypatch, trained):
    def train(**kwargs):
        raise error

    monkeypatch.setattr(sys.modules["fastpo.trainer"], "train", train)
    error = DataError("row 3")
    assert "rank" not in fail(capsys, "train", *INPUTS)
    monkeypatch.setenv("WORLD_SIZE", "16")
    for rank in ("0", "9"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["train", *INPUTS]) == 2
        assert capsys.readouterr().err == f"fastpo: error on rank {rank}: row 3\n"
    error.relayed = True  # rank 0 says it
    assert cli.main(["train", *INPUTS]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "8")  # the options are wrong on every rank: once a node
    for local_rank, said in (
        ("0", "fastpo: error on rank 8: unknown option 'betta'; did you mean 'beta'?\n"),
        ("1", ""),
    ):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert cli.main(["train", *INPUTS, "--betta", "1"]) == 2
        assert capsys.readouterr().err.replace(" on the command line", "") == said


# --- mistakes


def test_unknown_option_names_the_nearest(trained, capsys):
    assert "did you mean 'learning_rate'?" in fail(capsys, "train", *INPUTS, "--lerning-rate", "1e-5")
    assert "did you mean 'train_dataset'?" in fail(capsys, "train", "--model", "m", "--train-datset", "d")
    assert not trained


def test_unknown_yaml_key_names_the_nearest(trained, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ntrain_dataset: d\nbetta: 0.1\n")
    assert "did you mean 'beta'?" in fail(capsys, "train", "--config", str(path))
    path.write_text("modle: m\ntrain_dataset: d\n")
    assert "did you mean 'model'?" in fail(capsys, "train", "--config", str(path))
    assert not trained


@pytest.mark.parametrize(
    "argv, words",
    [
        (["train", *INPUTS, "--fp16"], ["fp16", "not honoured"]),
        (["train", *INPUTS, "--rpo-alpha", "1.0"], ["rpo_alpha", "sft"]),
        (["train", *INPUTS, "--learning-rate", "fast"], ["learning_rate", "fast"]),
        (["train", *INPUTS, "--learning-rate"], ["learning-rate", "expected one argument"]),
        (["train", *INPUTS, "--max-length", "1.5"], ["max_length", "1.5"]),
        (["train", *INPUTS, "--bf16", "perhaps"], ["bf16", "perhaps"]),
        (["train", *INPUTS, "--optim", "adamw"], ["optim", "adamw"]),
        (["train", *INPUTS, "--model-init-kwargs", "{"], ["model-init-kwargs", "JSON"]),
        (["train", *INPUTS, "--model-init-kwargs", "[1]"], ["model-init-kwargs", "JSON"]),
        (["train", *INPUTS, "--loss-kwargs", "{cpo_alpha 1}"], ["loss-kwargs", "JSON"]),
        (["train", *INPUTS, "--loss-type", "[a"], ["loss-type", "list"]),
        (["train", *INPUTS, "stray"], ["stray"]),
        (["train", *INPUTS, "--lora_r", "8"], ["lora_r", "use_peft"]),
        (["train", *INPUTS, "--use_peft", "--peft_config", '{"r": 4}'], ["use_peft", "peft_config"]),
        (["train", *INPUTS, "--use_peft", "--lora_task_type", "SEQ_CLS"], ["lora_task_type", "SEQ_CLS"]),
        (["train", *INPUTS, "--load_in_4bit", "--load_in_8bit"], ["load_in_4bit", "load_in_8bit"]),
        (["train", *INPUTS, "--use_bnb_nested_quant"], ["use_bnb_nested_quant", "load_in_4bit"]),
        (["train", *INPUTS, "--lora_r", "8", "9"], ["unexpected", "9"]),
        (["train", *INPUTS, "--dataset_streaming"], ["dataset_streaming", "with max_steps"]),
        (["train", *INPUTS, "--deepspeed", "zero3.json"], ["deepspeed", "fsdp"]),
        (["train", *INPUTS, "--model.beta", "0.1"], ["model.beta", "OpenRLHF", "here it is beta"]),
        (["train", *INPUTS, "--pref_beta", "0.1"], ["pref_beta", "LLaMA-Factory", "here it is beta"]),
        (["train", *INPUTS, "--dataset", "a.jsonl"], ["LLaMA-Factory", "here it is train_dataset (a file or"]),
        (["train", *INPUTS, "--fsdp", "hybrid_shard"], ["fsdp", "hybrid_shard"]),
        (["train", "--train-dataset", "d"], ["--model"]),
        (["train", "--model", "m"], ["--train-dataset"]),
        (["train", "--config", "/nowhere/run.yaml"], ["/nowhere/run.yaml"]),
        (["train", *INPUTS, "--learning", "1"], ["learning"]),
        (["trian"], ["trian", "train"]),
        (["env", "--jsn"], ["--jsn"]),
        (["--nonsense"], ["--nonsense"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if len(value) > 1 else value[0],
)
def test_mistakes_are_one_line(trained, capsys, argv, words):
    line = fail(capsys, *argv)
    assert all(word in line for word in words), line
    assert not trained


@pytest.mark.parametrize(
    "text, words",
    [
        ("- a\n- b\n", ["option names"]),
        ("a: [1\n", ["YAML"]),
        ("model: m\nmodel_name_or_path: m\ntrain_dataset: d\n", ["model_name_or_path"]),
        ("model: {a: 1}\ntrain_dataset: d\n", ["model"]),
        ("model: m\ntrain_dataset: d\npeft_config: 3\n", ["peft_config", "mapping"]),
        ("model: m\ntrain_dataset: d\nbf16: 3\n", ["bf16"]),
    ],
    ids=lambda value: repr(value) if isinstance(value, str) else "",
)
def test_bad_yaml_is_one_line(trained, tmp_path, capsys, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    line = fail(capsys, "train", "--config", str(path))
    assert all(word in line for word in words), line


# --- exit codes


@pytest.mark.parametrize(
    "error, code, line",
    [
        (DataError("row 3 has\nno prompt"), 2, "fastpo: error: row 3 has no prompt"),
        (TrainingError("5 non-finite steps"), 1, "fastpo: error: 5 non-finite steps"),
        (ModuleNotFoundError("no", name="datasets"), 2, "pip install 'fastpo[data]'"),
        (KeyboardInterrupt(), 130, "fastpo: interrupted"),
    ],
    ids=["user", "run", "missing extra", "ctrl-c"],
)
def test_exit_codes(monkeypatch, capsys, trained, error, code, line):
    def train(**kwargs):
        raise error

    monkeypatch.setattr(sys.modules["fastpo.trainer"], "train", train)
    monkeypatch.delenv("FASTPO_TRACEBACK", raising=False)
    assert cli.main(["train", *INPUTS]) == code
    stderr = capsys.readouterr().err
    assert line in stderr and len(stderr.splitlines()) == 1


def test_traceback_on_request_and_for_bugs(monkeypatch, trained):
    def train(**kwargs):
        raise error

    monkeypatch.setattr(sys.modules["fastpo.trainer"], "train", train)
    error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", *INPUTS])
    error = DataError("a mistake")
    monkeypatch.setenv("FASTPO_TRACEBACK", "1")
    with pytest.raises(DataError):
        cli.main(["train", *INPUTS])


@pytest.mark.parametrize("command", ["quickstart", "check"])
def test_other_commands_get_their_options_and_give_their_exit_code(monkeypatch, capsys, command):
    module = types.ModuleType(f"fastpo.cli.{command}")
    module.add_arguments = lambda parser: parser.add_argument("--two-words", type=int)
    module.run = lambda namespace: namespace.two_words
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert cli.main([command, "--two_words", "1"]) == 1
    assert "--two" in fail(capsys, command, "--two", "1")


def test_check_gets_its_options(monkeypatch):
    calls = []
    monkeypatch.setattr("fastpo.check.run_check", lambda *args, **kwargs: calls.append((args, kwargs)) or 1)
    assert cli.main(["check", "--device", "cpu", "--quiet"]) == 1
    assert cli.main(["check"]) == 1
    assert calls == [(("cpu",), {"verbose": False}), ((None,), {"verbose": True})]


# --- help, version, env


def test_help_groups_the_fields_and_gives_defaults(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for group in {f.metadata["group"] for f in dataclasses.fields(TrainConfig)}:
        assert f"\n{group}:\n" in text
    for field in dataclasses.fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in text
    flat = " ".join(text.split())
    assert "muon, sgd [adamw_torch_fused]" in flat and "peak learning rate [1e-06]" in flat


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        [],
        *([name, "--help"] for name in ("train", "plan", "check", "evaluate", "losses", "env")),
    ],
    ids=str,
)
def test_help_and_version_do_not_import_torch(argv):
    code = (
        "import sys, fastpo.cli\n"
        f"assert fastpo.cli.main({argv!r}) == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "fastpo" in done.stdout


def test_env_reports_this_machine(capsys):
    import torch

    assert cli.main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] == torch.__version__
    assert "torch" in report["backends"]
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "backends" in text and "cache" in text


@pytest.mark.parametrize(
    "version", ["2.13.0+cpu", "2.14.1+cu130", "2.16.0.dev20261101+rocm7.1", "2.13.0a0+git1", "odd"]
)
def test_env_takes_any_version(monkeypatch, version):
    """A wheel of PyPI's has no local version in its metadata, and torch itself has one."""
    import torch

    from fastpo import env

    def broken(name):
        raise KeyError("Version")

    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(env.metadata, "version", broken)
    report = env.collect()
    assert report["packages"]["torch"] == version and "cannot be read" in report["packages"]["numpy"]
    assert version in env.format_text(report)


# --- a real run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a saved model of two layers, `model`, and eight pairs, `pairs.jsonl`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["<eos>", "<unk>", *"abcdefghij"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        folder / "model"
    )
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=0, **shape)).save_pretrained(folder / "model")
    rows = [{"prompt": f"{a} b c", "chosen": f" d {a} e", "rejected": f" {a} {a}"} for a in "abcdefgh"]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_train_end_to_end(tiny, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {tiny}/model\ntrain_dataset: {tiny}/pairs.jsonl\noutput_dir: {tmp_path}/out\n"
        "max_steps: 3\nlearning_rate: 1e-3\nper_device_train_batch_size: 4\nlogging_steps: 1\nuse_cpu: true\n"
    )
    assert cli.main(["train", "--config", str(path), "--beta", "0.5", "--disable-tqdm"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 16
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 3 and losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[2] < losses[0]
    saved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert saved["beta"] == 0.5 and saved["learning_rate"] == 1e-3
    capsys.readouterr()
    assert str(tmp_path / "out") in fail_last(capsys, "train", "--config", str(path))


def test_several_evaluation_sets_are_evaluated(tiny, tmp_path):
    """And the file that the run leaves runs it again."""
    sets = json.dumps({"a": f"{tiny}/pairs.jsonl", "b": f"{tiny}/pairs.jsonl"})
    inputs = ["--model", f"{tiny}/model", "--train-dataset", f"{tiny}/pairs.jsonl", "--eval-dataset", sets]
    options = ["--max-steps", "1", "--eval-steps", "1", "--use-cpu", "--disable-tqdm", "--no-report"]
    assert cli.main(["train", *inputs, *options, "--output-dir", str(tmp_path / "one")]) == 0
    saved = str(tmp_path / "one" / "config.yaml")
    assert cli.main(["train", "--config", saved, "--output-dir", str(tmp_path / "two")]) == 0
    for name in ("one", "two"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [k for line in lines for k in line if k.endswith("_loss")] == [
            "eval_a_loss",
            "eval_b_loss",
            "train_loss",
        ]


def fail_last(capsys, *argv):
    """As `fail`, for mistakes found once the run has begun to say what it does."""
    assert cli.main(list(argv)) == 2
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    line = stderr.splitlines()[-1]
    assert line.startswith("fastpo: error: ")
    return line


@pytest.mark.parametrize(
    "options, word",
    [
        (["--train-dataset", "/nowhere/rows.jsonl"], "/nowhere/rows.jsonl"),
        (["--model", "/nowhere/model"], "/nowhere/model"),
        (["--loss-type", "dop"], "dpo"),
        (["--loss-type", "sppo,simpo", "--loss-weights", "1"], "loss_weights"),
        (["--device", "cuda:7"], "cuda"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_of_a_run_are_one_line(tiny, tmp_path, capsys, options, word):
    inputs = [
        "--model",
        f"{tiny}/model",
        "--train-dataset",
        f"{tiny}/pairs.jsonl",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert word in fail_last(capsys, "train", *inputs, "--max-steps", "1", *options)
