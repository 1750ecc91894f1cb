"""Every field of TRL's DPOConfig has one status, and that status is true; other projects' names; the page."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import yaml

from fastpo.config import migration, online, options
from fastpo.config.option import HONOURED, NO_EFFECT, REFUSED, RENAMED
from fastpo.config.options import FOREIGN, OPTIONS
from fastpo.config.train_config import TrainConfig, field_names
from fastpo.errors import ConfigError
from fastpo.losses.token_table import TOKEN_LOSSES

HINTS = {f.name: f.type for f in dataclasses.fields(TrainConfig)}

# A value that TRL takes and that differs from the default here, for every honoured or renamed field whose default does
# not suggest one; and what an option must go with.
VALUES = {
    "router_aux_loss_coef": 0.001,
    "output_dir": "there", "max_steps": 7, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 3, "optim": "adamw_torch", "optim_args": "amsgrad=true", "bf16": True, "tf32": True,
    "activation_checkpointing": False, "activation_checkpointing_kwargs": {"use_reentrant": True},
    "gradient_checkpointing_kwargs": {"use_reentrant": True}, "liger_kernel_config": {"rope": False},
    "logging_strategy": "epoch", "disable_tqdm": True, "report_to": ["tensorboard"], "run_name": "a run",
    "project": "mine", "trackio_space_id": "me/space", "trackio_bucket_id": "me/bucket",
    "trackio_static_space_id": "me/static", "eval_strategy": "epoch", "eval_steps": 5, "save_strategy": "epoch",
    "save_total_limit": 2, "hub_token": "hf_secret", "hub_private_repo": True, "hub_model_id": "me/model",
    "hub_strategy": "end", "hub_revision": "branch", "metric_for_best_model": "eval_rewards/margins",
    "greater_is_better": True, "data_seed": 5, "train_sampling_strategy": "sequential", "ddp_backend": "gloo",
    "fsdp": "shard_grad_op", "resume_from_checkpoint": "out/checkpoint-5", "model_init_kwargs": {"revision": "v2"},
    "dataset_num_proc": 2, "truncation_mode": "keep_end", "loss_type": ["hinge"], "loss_weights": [0.5],
    "label_smoothing": 0.1, "ref_model_mixup_alpha": 0.5, "adam_beta1": 0.8, "adam_beta2": 0.95,
    "precompute_ref_log_probs": True, "f_divergence_type": "js_divergence", "ld_alpha": 0.5,
    "torch_compile_backend": "aot_eager", "torch_compile_mode": "default", "use_liger_kernel": True,
}  # fmt: skip
NEEDS = {"load_best_model_at_end": {"eval_strategy": "epoch", "save_strategy": "epoch"}}

# A value of a refused field that asks for something.
REFUSED_VALUES = {
    "optim_target_modules": "all-linear", "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0,
    "accelerator_config": {"split_batches": True}, "parallelism_config": {"tp_size": 2},
    "deepspeed": "zero3.json", "debug": "underflow_overflow",
}  # fmt: skip


@pytest.fixture(scope="module")
def snapshot(repo_root):
    return json.loads((repo_root / "tests" / "data" / "dpo_config_fields.json").read_text())


def of_status(*statuses):
    return [name for name, option in OPTIONS.items() if option.status in statuses]


def test_the_table_is_the_snapshot(snapshot):
    assert {name: field["default"] for name, field in snapshot["fields"].items()} == {
        name: option.default for name, option in OPTIONS.items()
    }
    assert len(OPTIONS) == 139


def test_the_snapshot_is_trls_own(snapshot):
    trl = pytest.importorskip("trl")
    import transformers

    found = {"trl": trl.__version__, "transformers": transformers.__version__}
    if found != snapshot["versions"]:
        pytest.skip(f"the snapshot is of {snapshot['versions']}, installed are {found}")
    fields = {}
    for f in dataclasses.fields(trl.DPOConfig):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        fields[f.name] = {"default": default, "type": f.type.__name__ if isinstance(f.type, type) else str(f.type)}
    assert fields == snapshot["fields"]


def test_statuses():
    for name, option in OPTIONS.items():
        assert option.status in (HONOURED, RENAMED, REFUSED, NO_EFFECT), name
        assert (name in HINTS) == (option.status == HONOURED), name
        assert (option.to in HINTS) == (option.status == RENAMED), name
        assert option.note or option.status in (HONOURED, RENAMED), name
    assert set(REFUSED_VALUES) <= set(of_status(REFUSED)) and set(VALUES) <= set(of_status(HONOURED, RENAMED))


def value_of(name):
    default = OPTIONS[name].default
    if name in VALUES:
        return VALUES[name]
    if isinstance(default, bool):
        return not default
    return type(default)(default * 2 + 1) if default < 1 else default * 2


@pytest.mark.parametrize("name", list(OPTIONS))
def test_trls_default_is_accepted(name):
    TrainConfig.build({name: OPTIONS[name].default})


@pytest.mark.parametrize("name", [n for n in of_status(HONOURED, RENAMED) if n != "fsdp_config"])
def test_what_is_honoured_arrives(name):
    value, needs = value_of(name), NEEDS.get(name, {})
    field = OPTIONS[name].to or name
    config = TrainConfig.build({**needs, name: value})
    assert getattr(config, field) == value != getattr(TrainConfig(), field)
    others = {f for f in field_names() if getattr(config, f) != getattr(TrainConfig(), f)} - {field, *needs}
    implied = {"torch_compile"} if name.startswith("torch_compile") else {"eval_strategy", "save_strategy"}
    assert others <= implied  # by a cadence, or by how to compile


@pytest.mark.parametrize("name", of_status(REFUSED))
def test_what_is_refused_raises(name):
    value = REFUSED_VALUES.get(name, True)
    with pytest.raises(ConfigError, match=name) as caught:
        TrainConfig.build({name: value})
    assert OPTIONS[name].note in str(caught.value) and "\n" not in str(caught.value)
    for off in (None, *OPTIONS[name].off):
        assert TrainConfig.build({name: off}) == TrainConfig()


@pytest.mark.parametrize("name", of_status(NO_EFFECT))
def test_what_is_without_meaning_changes_nothing(name):
    default = OPTIONS[name].default
    for value in (default, not default if isinstance(default, bool) else "anything"):
        assert TrainConfig.build({name: value}) == TrainConfig()


# Options of online losses that no module reads yet; each leaves the list where one does.
WAITING = {
    "importance_sampling_correction", "importance_sampling_mode", "importance_sampling_clip_max",
    "importance_sampling_clip_min", "sampler",
}  # fmt: skip


def test_every_field_is_read(repo_root):
    """An option that is accepted is an option that has its effect: some module reads it from the configuration."""
    by_callbacks = {"project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"}
    train_alike = {"precompute_ref_log_probs", "per_device_eval_batch_size"}  # told to callbacks, the latter
    tables = ("train_config.py", "options.py", "migration.py", "online.py")  # of config/ and cli/
    paths = [path for path in (repo_root / "fastpo").rglob("*.py") if path.name not in tables]
    # What no_effect.py says of an online option is no use of it, nor what config/online.py resolves: its Rollouts are.
    groups = {f.name: f.metadata["group"] for f in dataclasses.fields(TrainConfig)}
    through = {"loss_type": "losses", "report_to": "report_names", "generation_batch_size": "steps_per_generation"}
    reads = {p: set(re.findall(r"(?:config|args|c|asks)\.(\w+)", p.read_text())) for p in paths}
    unread = {
        name
        for name, group in groups.items()
        if not any(
            through.get(name, name) in words
            for path, words in reads.items()
            if not (group.startswith("online") and path.parent.name == "config")
        )
    }
    of_losses = {name for loss in TOKEN_LOSSES for name in loss.defaults} - {"beta", "reduction", "kl_level"}
    assert set(online.HYPER) == of_losses  # read together, by `online.hyper`
    assert unread - by_callbacks - train_alike - set(online.HYPER) == WAITING


def test_trackers_see_their_options():
    from fastpo.report.callbacks import CallbackArgs

    args = CallbackArgs(TrainConfig(project="mine", trackio_space_id="me/space", trackio_static_space_id=False))
    assert (args.project, args.trackio_space_id, args.trackio_static_space_id) == ("mine", "me/space", False)


def test_what_is_without_meaning_is_read_nowhere(repo_root):
    """No module but the two tables' and the callbacks', which show transformers' defaults, may name such an option."""
    text = "".join(
        path.read_text()
        for path in (repo_root / "fastpo").rglob("*.py")
        if path.name not in ("options.py", "migration.py", "callbacks.py")
    )
    read = [n for n in of_status(NO_EFFECT) if re.search(rf"\b(config|args)\.{n}\b", text)]
    assert not [n for n in read if n != "use_cache"]  # the model's own configuration has a use_cache


def test_arguments_of_trl_arrive(tmp_path):
    trl = pytest.importorskip("trl")
    base = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    config = TrainConfig.build(trl.DPOConfig(**base))
    assert config.save_strategy == "steps" and config.beta == 0.1 and config.losses == ["sigmoid"]
    assert config == TrainConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, loss_type=["sigmoid"], beta=0.1, save_strategy="steps",
        f_divergence_type="reverse_kl", gradient_checkpointing_kwargs=config.gradient_checkpointing_kwargs,
    )  # fmt: skip
    config = TrainConfig.build(
        trl.DPOConfig(
            **base, learning_rate=5e-7, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], report_to="tensorboard",
            eval_strategy="steps", eval_steps=20, activation_checkpointing=False, sync_ref_model=True,
            lr_scheduler_type="cosine", lr_scheduler_kwargs={"num_cycles": 1}, hub_strategy="end", optim="adamw_torch",
            padding_free=True, load_best_model_at_end=True, save_steps=40, hub_token="hf_secret", ld_alpha=1.0,
        )
    )  # fmt: skip
    assert config.learning_rate == 5e-7 and config.loss_weights == [1.0, 0.2] and config.report_names == ["tensorboard"]
    assert config.gradient_checkpointing is False and config.sync_ref_model and config.lr_scheduler_type == "cosine"
    assert config.hub_strategy == "end" and config.optim == "adamw_torch" and config.load_best_model_at_end
    assert TrainConfig.build(trl.DPOConfig(**base, loss_type="sft")).beta is None  # which sft does not read
    assert TrainConfig.build(trl.DPOConfig(**base, use_weighting=True)).use_weighting and config.ld_alpha == 1.0
    with pytest.raises(ConfigError, match="save_strategy must be one of"):
        TrainConfig.build(trl.DPOConfig(**base, save_strategy="best", metric_for_best_model="loss"))


def test_the_token_is_nowhere(tmp_path):
    config = TrainConfig.build(hub_token="hf_secret", push_to_hub=True)
    assert config.hub_token == "hf_secret"
    assert TrainConfig.build(push_to_hub_token="hf_secret") == TrainConfig.build(hub_token="hf_secret")
    assert "hf_secret" not in repr(config) + str(config) + json.dumps(config.to_dict()) + yaml.safe_dump(
        config.to_dict()
    )
    with pytest.raises(ConfigError) as caught:
        TrainConfig.build(hub_token=["hf_secret"])
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "mode", "offload"),
    [
        ({"fsdp": True}, "full_shard", False),
        ({"fsdp": "full_shard auto_wrap"}, "full_shard", False),
        ({"fsdp": ["shard_grad_op", "auto_wrap"]}, "shard_grad_op", False),
        ({"fsdp": "full_shard,offload"}, "full_shard", True),
        ({"fsdp": "auto_wrap"}, "full_shard", False),
        ({"fsdp": ""}, "no", False),
        ({"fsdp": []}, "no", False),
        ({"fsdp": None, "fsdp_config": None}, "no", False),
        ({"fsdp": True, "fsdp_config": {"fsdp_version": 2, "reshard_after_forward": False}}, "shard_grad_op", False),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": "true", "use_orig_params": True}}, "full_shard", True),
        ({"fsdp": True, "fsdp_config": '{"transformer_layer_cls_to_wrap": ["Layer"]}'}, "full_shard", False),
    ],
    ids=str,
)  # fmt: skip
def test_spellings_of_fsdp(values, mode, offload):
    for config in (TrainConfig.build(values), TrainConfig.build(yaml.safe_load(yaml.safe_dump(values)))):
        assert (config.fsdp, config.fsdp_cpu_offload) == (mode, offload)


def test_fsdp_config_from_a_file_and_of_trl(tmp_path):
    path = tmp_path / "fsdp.json"
    path.write_text('{"reshard_after_forward": true, "cpu_offload": true, "activation_checkpointing": true}')
    config = TrainConfig.build(fsdp=True, fsdp_config=str(path), gradient_checkpointing=False)
    assert (config.fsdp, config.fsdp_cpu_offload, config.gradient_checkpointing) == ("full_shard", True, True)
    with pytest.raises(ConfigError, match="cannot read fsdp_config"):
        TrainConfig.build(fsdp=True, fsdp_config=str(tmp_path / "absent.json"))
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, fsdp=True, fsdp_config={"cpu_offload": True})
    config = TrainConfig.build(args)
    assert (config.fsdp, config.fsdp_cpu_offload) == ("full_shard", True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fsdp": "hybrid_shard"}, "fsdp must be no, full_shard or shard_grad_op, not 'hybrid_shard'"),
        ({"fsdp": "full_shard shard_grad_op"}, "fsdp must be"),
        ({"fsdp_config": {"cpu_offload": True}}, "fsdp is off"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "version=1 is not honoured by fastpo, only 2"),
        ({"fsdp": True, "fsdp_config": {"min_num_params": 1000}}, "min_num_params=1000 is not honoured"),
        ({"fsdp": True, "fsdp_config": {"mixed_precision": "bf16"}}, "mixed_precision='bf16' is not honoured"),
        ({"fsdp": True, "fsdp_config": 3}, "fsdp_config must be a mapping"),
        ({"fsdp_cpu_offload": True}, "fsdp_cpu_offload needs fsdp"),
        ({"fsdp": "full_shard", "optim": "muon"}, r"optim=muon does not work on split parameters \(fsdp\)"),
        ({"fsdp": "shard_grad_op", "optim": "adamw_8bit"}, "optim=adamw_8bit does not work on split parameters"),
        ({"fsdp": True, "optim": "adamw_bnb_8bit"}, "optim=adamw_bnb_8bit does not work on split"),
        ({"fsdp": True, "optim": "paged_adamw_32bit"}, "optim=paged_adamw_32bit does not work on split"),
        ({"save_strategy": "best"}, "not 'best': load_best_model_at_end"),
        ({"eval_strategy": "best"}, "eval_strategy must be one of no, steps, epoch, not 'best'"),
        ({"hub_strategy": "checkpoint"}, "hub_strategy must be one of every_save, end, not 'checkpoint'"),
        ({"train_sampling_strategy": "group_by_length"}, "nothing is padded"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "step it in a callback"),
        ({"activation_checkpointing": False, "gradient_checkpointing": True}, "gradient_checkpointing is set twice"),
        ({"tokenizer": print}, "pass it as processing_class"),
        ({"compute_metrics": print}, "compute_metrics=.* is not honoured"),
        ({"model_name_or_path": "m"}, "belongs to the command line; fastpo.train takes model"),
        ({"use_peft": True}, "fastpo.train takes peft_config"),
        ({"save_safetensors": False}, "always saved as safetensors"),
        ({"simpo_gamma": 0.5}, "set gamma_beta_ratio to simpo_gamma / beta"),
        ({"cpo_alpha": 1.0}, r"cpo_ipo or cpo_simpo set loss_kwargs=\{cpo_alpha: ...\}"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_refusals_name_the_right_thing(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig.build(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("project, name", [(p, n) for p, names in FOREIGN.items() for n in names], ids=str)
def test_names_of_other_projects(project, name):
    for spelling in (name, f"group.{name}"):
        with pytest.raises(ConfigError) as caught:
            TrainConfig.build({spelling: "value"})
        assert any(p in str(caught.value) for p in FOREIGN)  # two projects may share a name
        assert "\n" not in str(caught.value)


def test_a_whole_file_of_another_project_is_answered_at_once():
    """LLaMA-Factory's own example for DPO with LoRA, as far as it differs from transformers' names."""
    values = yaml.safe_load(
        "{trust_remote_code: true, stage: dpo, do_train: true, finetuning_type: lora, lora_rank: 8, lora_target: all, "
        "pref_beta: 0.1, pref_loss: sigmoid, dataset: dpo_en_demo, template: qwen3_nothink, cutoff_len: 2048, "
        "max_samples: 1000, preprocessing_num_workers: 16, dataloader_num_workers: 4, plot_loss: true, "
        "learning_rate: 5.0e-6, warmup_ratio: 0.1, ddp_timeout: 180000000, resume_from_checkpoint: null}"
    )
    with pytest.raises(ConfigError) as caught:
        TrainConfig.build(values)
    told = str(caught.value)
    assert all(f"{name} is LLaMA-Factory's: " in told for name in FOREIGN["LLaMA-Factory"] if name in values)
    assert told.count("LLaMA-Factory's") == 12 and "\n" not in told
    moved = {name: value for name, value in values.items() if name not in FOREIGN["LLaMA-Factory"]}
    assert TrainConfig.build(moved, beta=0.1, max_length=2048).learning_rate == 5e-6


def test_names_of_other_projects_are_not_ours():
    ours = {*field_names(), *OPTIONS, *options.EARLIER, *options.CPO, *options.SCRIPT}
    for names in FOREIGN.values():
        assert not ours & set(names)


def test_what_other_projects_are_told_to_set_exists():
    """Where the text is, or begins with, a bare option name, that option exists."""
    inputs = {"model", "ref_model", "train_dataset", "eval_dataset", "peft_config"}
    plain = {"not", "leave", "full", "cut", "rename", "mix", "add", "merge", "the"}
    for names in FOREIGN.values():
        for name, text in names.items():
            first = text.replace(":", " ").replace(",", " ").split()[0]
            assert first in {*field_names(), *options.SCRIPT, *inputs, *plain}, (name, text)


def test_loss_types():
    from fastpo.losses.table import resolve_terms

    for name, ours in options.TRL_LOSSES.items():
        if ours is None:
            with pytest.raises(ConfigError, match=name):
                resolve_terms([name])
        else:
            assert resolve_terms([name], beta=None)[0].name == ours


def test_a_newer_field_of_transformers_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(options, "_transformers_fields", lambda: frozenset({"a_new_field"}))
    with pytest.raises(ConfigError, match="a_new_field is not honoured"):
        TrainConfig.build(a_new_field=1)
    with pytest.raises(ConfigError, match="unknown option 'b_new_field'"):
        TrainConfig.build(b_new_field=1)


def test_the_page(repo_root):
    page = migration.page()
    assert (repo_root / "docs" / "migrating-from-trl.md").read_text() == page, (
        "run python -m fastpo.config.migration > docs/migrating-from-trl.md"
    )
    for name in [*OPTIONS, *options.SCRIPT, *options.CPO, *FOREIGN["LLaMA-Factory"], *FOREIGN["OpenRLHF"]]:
        assert f"| `{name}` |" in page


def test_the_page_is_made_by_one_command(repo_root):
    done = subprocess.run(
        [sys.executable, "-m", "fastpo.config.migration"], capture_output=True, text=True, timeout=60, cwd=repo_root
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == migration.page()
