"""What becomes of every option of TRL's DPOConfig, and of other projects' names: the table, its check, its page.

The page is made by `python -m fastpo.config.migration > docs/migrating-from-trl.md`. This module knows no TrainConfig: the names
that it has are passed in.
"""
# ruff: noqa: E501  # one option a line: it reads as the table it is

import difflib
import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastpo.config import online_options
from fastpo.config.option import NO_EFFECT, REFUSED, RENAMED, Option, differ
from fastpo.config.option import no as _no
from fastpo.config.option import nothing as _any
from fastpo.config.option import same as _same
from fastpo.config.option import to as _to
from fastpo.errors import ConfigError, shown

_IN_MEMORY = "batches are packed from token ids in memory; there is no loader process"
_NO_PREDICTIONS = "evaluation keeps no predictions: its metrics are sums on the device"
_ONE_REDUCTION = "gradients are summed over the ranks once a step, by parameter, without DistributedDataParallel"
_SCRIPTS = "read by example scripts, not by a trainer"

# Every field of TRL 1.16's DPOConfig with transformers 5.23, in its order, with its default.
# fmt: off
OPTIONS: dict[str, Option] = {
    "output_dir": _same(note="a folder that holds another run is refused, unless overwrite_output_dir or resume_from_checkpoint is set"),
    "per_device_train_batch_size": _same(8, "pairs, as in TRL; max_tokens bounds the memory"),
    "num_train_epochs": _same(3.0),
    "max_steps": _same(-1),
    "learning_rate": _same(1e-6),
    "lr_scheduler_type": _same("linear"),
    "lr_scheduler_kwargs": _same(),
    "warmup_steps": _same(0, "below 1 a share of all steps; warmup_ratio is accepted too"),
    "optim": _same("adamw_torch_fused", "the names that `fastpo train --help` lists; others are refused"),
    "optim_args": _same(),
    "weight_decay": _same(0.0),
    "adam_beta1": _same(0.9),
    "adam_beta2": _same(0.999),
    "adam_epsilon": _same(1e-8),
    "optim_target_modules": _no("GaLore, APOLLO and LOMO are not built: train an adapter, or set optim=adamw_8bit"),
    "gradient_accumulation_steps": _same(1, "every loss is normalised over the whole step: exact for sft terms too"),
    "average_tokens_across_devices": _any("every loss is always normalised over the whole step, all ranks together", True),
    "max_grad_norm": _same(1.0),
    "label_smoothing_factor": _no("set label_smoothing, the preference losses' own", 0.0),
    "bf16": _same(None, "None: autocast on a GPU that has bfloat16, as TRL; off on a CPU, where TRL raises"),
    "fp16": _no("use bf16, or load the model in float32", False),
    "bf16_full_eval": _no("evaluation computes as training does: set bf16, or dtype=bfloat16", False),
    "fp16_full_eval": _no("evaluation computes as training does: set bf16", False),
    "tf32": _same(),
    "activation_checkpointing": _to("gradient_checkpointing"),
    "activation_checkpointing_kwargs": _to("gradient_checkpointing_kwargs"),
    "gradient_checkpointing": _same(True, "on a GPU only as many layers as the memory demands: gradient_checkpointing_layers=all checkpoints every one"),
    "gradient_checkpointing_kwargs": _same(),
    "torch_compile": _same(False, "the trunk's layers; the head and the losses are kernels of their own. With fsdp it is refused"),
    "torch_compile_backend": _same(None, "None: inductor; one that is given means torch_compile=True"),
    "torch_compile_mode": _same(None, "default and max-autotune-no-cudagraphs; one that is given means torch_compile=True"),
    "use_liger_kernel": _same(False, "not given or True: fused layers, Liger's on a GPU (not given: if liger-kernel is installed), fastpo's own on a CPU; fused LoRA on both. False: the model's own. The False of a config object, its default, is left out. The head is always fused, by fastpo's own op"),
    "liger_kernel_config": _same(None, "on a CPU rms_norm, rope and swiglu"),
    "use_cache": _any("training never uses the key-value cache", False),
    "neftune_noise_alpha": _no("noise on the embeddings is not built"),
    "torch_empty_cache_steps": _any("the allocator's cache is left alone; PYTORCH_ALLOC_CONF=expandable_segments:True keeps it small"),
    "auto_find_batch_size": _no("set max_tokens=auto: it fits the micro-batches to the memory without changing the step", False),
    "logging_strategy": _same("steps"),
    "logging_steps": _same(10),
    "logging_first_step": _same(False),
    "log_on_each_node": _any("rank 0 alone logs", True),
    "logging_nan_inf_filter": _any("a non-finite step is skipped, counted and shown", True),
    "include_num_input_tokens_seen": _any("num_tokens is always logged", "no"),
    "log_level": _any("Python's logging decides: logging.getLogger('fastpo').setLevel(...)", "passive"),
    "log_level_replica": _any("as log_level", "warning"),
    "disable_tqdm": _same(),
    "report_to": _same("none", "metrics.jsonl is written in any case"),
    "run_name": _same(),
    "project": _same("huggingface"),
    "trackio_space_id": _same(),
    "trackio_bucket_id": _same(),
    "trackio_static_space_id": _same(),
    "eval_strategy": _same("no", "an eval_steps that is given means steps"),
    "eval_steps": _same(),
    "eval_delay": _same(0),
    "per_device_eval_batch_size": _same(8, "evaluation is packed to max_tokens; its metrics are means over pairs, whatever the batch"),
    "prediction_loss_only": _any(_NO_PREDICTIONS, False),
    "eval_on_start": _same(False),
    "eval_do_concat_batches": _any(_NO_PREDICTIONS, True),
    "eval_use_gather_object": _any(_NO_PREDICTIONS, False),
    "eval_accumulation_steps": _any(_NO_PREDICTIONS),
    "include_for_metrics": _no("compute_metrics gets numbers of whole responses: fastpo.Evaluated", []),
    "batch_eval_metrics": _no("compute_metrics is called once an evaluation", False),
    "save_only_model": _same(False),
    "save_strategy": _same("steps", "a save_steps or save_total_limit that is given means steps; best: set load_best_model_at_end"),
    "save_steps": _same(500),
    "save_on_each_node": _no("the ranks write into one output_dir, which every node must see", False),
    "save_total_limit": _same(),
    "enable_jit_checkpoint": _any("SIGTERM always saves the last finished step, in a run of one process", False),
    "push_to_hub": _same(False),
    "hub_token": _same(None, "never written to a file or a log"),
    "hub_private_repo": _same(),
    "hub_model_id": _same(),
    "hub_strategy": _same("every_save", "every_save and end"),
    "hub_always_push": _no("a push that is under way is let finish; the final model is always pushed", False),
    "hub_revision": _same(),
    "load_best_model_at_end": _same(False),
    "metric_for_best_model": _same(),
    "greater_is_better": _same(),
    "ignore_data_skip": _no("a resumed run goes on with the next row; nothing is read again for it", False),
    "restore_callback_states_from_checkpoint": _any("the states of callbacks are always restored", False),
    "full_determinism": _same(False),
    "seed": _same(42),
    "data_seed": _same(),
    "use_cpu": _same(False),
    "accelerator_config": _no("fastpo does not run on accelerate; gradients are reduced once a step"),
    "parallelism_config": _no("tensor, context and sequence parallelism are not built: use fsdp"),
    "dataloader_drop_last": _same(False),
    "dataloader_num_workers": _any(_IN_MEMORY, 0),
    "dataloader_pin_memory": _any(_IN_MEMORY, True),
    "dataloader_persistent_workers": _any(_IN_MEMORY, False),
    "dataloader_prefetch_factor": _any(_IN_MEMORY),
    "dataloader_multiprocessing_context": _any(_IN_MEMORY),
    "dataloader_in_order": _any(_IN_MEMORY, True),
    "remove_unused_columns": _any("columns that are not used are ignored", True),
    "label_names": _any("the columns have fixed names: prompt, chosen, rejected"),
    "train_sampling_strategy": _same("random", "random and sequential; group_by_length needs no counterpart, as nothing is padded"),
    "length_column_name": _any("belongs to group_by_length", "length"),
    "ddp_find_unused_parameters": _any(_ONE_REDUCTION),
    "ddp_bucket_cap_mb": _any(_ONE_REDUCTION),
    "ddp_broadcast_buffers": _any(_ONE_REDUCTION),
    "ddp_static_graph": _any(_ONE_REDUCTION),
    "ddp_backend": _same(),
    "ddp_timeout": _same(1800),
    "fsdp": _same(None, "FSDP2; true, full_shard, shard_grad_op, 'full_shard auto_wrap', 'full_shard offload'; hybrid_shard is refused"),
    "fsdp_config": _to("fsdp", None, "version=2, reshard_after_forward, cpu_offload and activation_checkpointing arrive in fsdp, fsdp_cpu_offload and gradient_checkpointing; what to wrap is known (each layer)"),
    "deepspeed": _no("use fsdp (full_shard is ZeRO-3, shard_grad_op is ZeRO-2)"),
    "debug": _no("non-finite steps are skipped and counted; FASTPO_TRACEBACK=1 shows where an error came from", ""),
    "skip_memory_metrics": _any("peak_memory_gb is always logged", True),
    "do_train": _any(_SCRIPTS, False),
    "do_eval": _any(_SCRIPTS, False),
    "do_predict": _any(_SCRIPTS, False),
    "resume_from_checkpoint": _same(None, "a folder, or true for the newest; also auto: the newest if there is one"),
    "local_rank": _any("torchrun's environment says it", -1),
    "model_init_kwargs": _same(),
    "trust_remote_code": _same(False),
    "router_aux_loss_coef": _same(None, "None: the model's own, as in TRL; 0 switches it off. One loss over the whole step, where TRL takes the mean over its micro-batches and ranks: the same where these are one"),
    "disable_dropout": _same(True),
    "dataset_num_proc": _same(),
    "max_length": _same(1024, "a response that is cut gets no end-of-sequence; rows cut or dropped are counted"),
    "truncation_mode": _same("keep_start"),
    "padding_free": _any("fastpo is always padding-free", False),
    "pad_to_multiple_of": _any("nothing is padded", "auto"),
    "precompute_ref_log_probs": _same(False, "the reference is always computed once, ahead, and cached: True and False train alike. With False, Trainer.evaluate(rows) after training loads the model again by its name for it; with True it refuses, and so does a streamed dataset, as in TRL"),
    "precompute_ref_batch_size": _any("the reference pass is packed to max_tokens"),
    "loss_type": _same(["sigmoid"], "see the table of losses"),
    "loss_weights": _same(),
    "ld_alpha": _same(None, "with sigmoid, which is then ld_dpo; with another loss it is refused, where TRL combines them. Metrics are of whole responses, TRL's of the weighted sums"),
    "f_divergence_type": _same("reverse_kl", "with sigmoid, which is then fdpo; with another loss it is refused, where TRL combines them"),
    "f_alpha_divergence_coef": _same(0.5),
    "label_smoothing": _same(0.0, "for sigmoid it is conservative DPO, where TRL ignores it; 0 is the loss's own default, for exo_pair 0.001, where TRL raises"),
    "beta": _same(0.1, "None: the loss's own"),
    "use_weighting": _same(False, "with sigmoid alone, which is then wpo with clamp_weight=False; with other losses it is refused, where TRL weighs each"),
    "discopop_tau": _same(0.05),
    "activation_offloading": _same(False, "of the layers, on a GPU; on a CPU and with fsdp it is refused"),
    "sync_ref_model": _same(False),
    "ref_model_mixup_alpha": _same(0.6),
    "ref_model_sync_steps": _same(512),
    "pad_token": _any("nothing is padded"),
}

_SFT_TERM = "add the sft loss: loss_type=[{0}, sft], loss_weights=[1, {1}]"
_GAMMA = "set gamma_beta_ratio to simpo_gamma / beta"

# Names of earlier TRL and transformers, and arguments of the trainer itself.
EARLIER: dict[str, Option] = {
    "evaluation_strategy": _to("eval_strategy"),
    "no_cuda": _to("use_cpu"),
    "torch_dtype": _to("dtype"),
    "push_to_hub_model_id": _to("hub_model_id"),
    "push_to_hub_token": _to("hub_token"),
    "per_gpu_train_batch_size": _to("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": _to("per_device_eval_batch_size"),
    "logging_dir": _any("TensorBoard writes below output_dir/runs; TENSORBOARD_LOGGING_DIR moves it"),
    "group_by_length": _no("nothing is padded: rows of different length cost nothing", False),
    "save_safetensors": _no("models are always saved as safetensors", True, ()),
    "include_tokens_per_second": _any("tokens_per_second is always logged", False),
    "label_pad_token_id": _any("nothing is padded", -100),
    "padding_value": _any("nothing is padded"),
    "use_logits_to_keep": _any("only the rows of completion tokens ever reach the head", False),
    "is_encoder_decoder": _no("causal language models only"),
    "max_prompt_length": _no("TRL removed it too: max_length counts prompt plus response"),
    "rpo_alpha": _no(_SFT_TERM.format("dpo", "rpo_alpha")),
    "reference_free": _no("use simpo, or give ref_chosen_logps and ref_rejected_logps of zero"),
    "generate_during_eval": _no("set sample_generations to the number of prompts to answer"),
    "ref_model_init_kwargs": _no("load the reference model yourself and pass ref_model"),
    "model_adapter_name": _no("the adapter that is active is trained"),
    "ref_adapter_name": _no("a trained adapter's own copy is the reference; pass ref_model for another"),
    "force_use_ref_model": _any("a ref_model that is given is always used", False),
    "tools": _no("put the tools into the rows, in a column `tools`"),
    "tokenizer": _no("pass it as processing_class"),
    "data_collator": _no("fastpo packs the rows itself"),
    "compute_metrics": _no("an argument of fastpo.train and Trainer, no option: it is given each response's log-probabilities and its reference's, fastpo.Evaluated; what reads logits is refused"),
    "preprocess_logits_for_metrics": _no("no logits are kept"),
    "model_init": _no("pass the model"),
    "reward_funcs": _no("an argument of fastpo.train and Trainer, no option"),
    "reward_model_name_or_path": _no("pass it in reward_funcs, an argument of fastpo.train"),
    "optimizer_cls_and_kwargs": _no("pass optimizers=(optimizer, scheduler), or set optim and optim_args"),
}

# TRL's CPOConfig beyond DPOConfig (SimPO is its loss_type="simpo").
CPO: dict[str, Option] = {
    "cpo_alpha": _no("with loss_type=cpo, cpo_hinge, cpo_ipo or cpo_simpo set loss_kwargs={cpo_alpha: ...} (TRL's default is 1.0, the SimPO paper's 0)", None, (False, 0)),
    "simpo_gamma": _no(_GAMMA),
    "alpha": _no("with loss_type=alphapo or xpo set loss_kwargs={alpha: ...}", 0.0),
    "generate_during_eval": EARLIER["generate_during_eval"],
    "is_encoder_decoder": EARLIER["is_encoder_decoder"],
}

# TRL's KTOConfig beyond DPOConfig.
KTO: dict[str, Option] = {
    "desirable_weight": _no("set loss_kwargs={desirable_weight: ...}", 1.0, (1,)),
    "undesirable_weight": _no("set loss_kwargs={undesirable_weight: ...}", 1.0, (1,)),
}

# TRL's RewardConfig beyond DPOConfig.
REWARD: dict[str, Option] = {
    "center_rewards_coefficient": _no("with loss_type=reward set loss_kwargs={center_rewards_coefficient: ...}"),
    "chat_template_path": _no("set the tokenizer's chat_template, and pass it as processing_class"),
    "eos_token": _no("set the tokenizer's eos_token, and pass it as processing_class"),
}

# Options of `trl dpo` beyond DPOConfig (ScriptArguments, ModelConfig, DatasetMixtureConfig). `fastpo train` takes those
# that are honoured or renamed, on the command line and in its YAML file, and turns them into arguments of fastpo.train.
SCRIPT: dict[str, Option] = {
    "model_name_or_path": _to("model"),
    "dataset_name": _to("train_dataset"),
    "dataset_config": _same(),
    "dataset_train_split": _same("train"),
    "dataset_test_split": _same("test", "evaluated where eval_strategy is set and no eval_dataset is given, as in TRL"),
    "dataset_streaming": _no("pass load_dataset(..., streaming=True) to fastpo.train, with max_steps", False),
    "ignore_bias_buffers": _any("buffers are sent once, at the start, whatever their type", False),
    "model_revision": _to("model_init_kwargs", "main"),
    "dtype": _same("float32", "None: the checkpoint's own dtype, where TRL loads float32"),
    "attn_implementation": _to("model_init_kwargs", None, "for generation and the guard; in training the attention is packed"),
    "use_peft": _to("peft_config", False),
    "lora_r": _to("peft_config", 16),
    "lora_alpha": _to("peft_config", 32),
    "lora_dropout": _to("peft_config", 0.05),
    "lora_target_modules": _to("peft_config"),
    "lora_target_parameters": _to("peft_config"),
    "lora_modules_to_save": _to("peft_config"),
    "lora_task_type": _to("peft_config", "CAUSAL_LM", "SEQ_CLS with loss_type=reward, without being told"),
    "use_rslora": _to("peft_config", False),
    "use_dora": _to("peft_config", False),
    "load_in_8bit": _to("quantization_config", False),
    "load_in_4bit": _to("quantization_config", False),
    "bnb_4bit_quant_type": _to("quantization_config", "nf4"),
    "use_bnb_nested_quant": _to("quantization_config", False),
    "bnb_4bit_quant_storage": _to("quantization_config"),
    "datasets": _to("train_dataset"),
    "streaming": _no("pass load_dataset(..., streaming=True) to fastpo.train, with max_steps", False),
    "test_split_size": _no("split the data with train_test_split and pass train_dataset and eval_dataset"),
}

_LF, _OPENRLHF = "LLaMA-Factory", "OpenRLHF"
_MAX_SAMPLES = "cut the data: train_dataset=load_dataset(..., split='train[:1000]')"
_STEP = "per_device_train_batch_size x gradient_accumulation_steps x ranks is the step; max_tokens bounds a micro-batch"

# Main names of other projects: what they are called here. Setting one raises with this text.
FOREIGN: dict[str, dict[str, str]] = {
    _LF: {
        "stage": "leave it out, `fastpo train` is stage dpo",
        "finetuning_type": "full is the default; for lora set use_peft: true (freeze and oft are not built)",
        "pref_beta": "beta",
        "pref_loss": "loss_type (sigmoid, hinge, ipo, simpo, orpo; kto_pair is not built)",
        "pref_ftx": _SFT_TERM.format("dpo", "pref_ftx"),
        "pref_bco_weight": "not built",
        "dpo_label_smoothing": "label_smoothing",
        "ref_model_adapters": "ref_model (the folder of the adapter)",
        "ref_model_quantization_bit": "not needed: the reference is computed once, then it leaves memory",
        "dataset": "train_dataset (a file or a hub name; dataset_info.json is not read)",
        "dataset_dir": "train_dataset (a path)",
        "val_size": "eval_dataset (split the data first)",
        "template": "leave it out, the tokenizer's chat template is used",
        "cutoff_len": "max_length",
        "max_samples": _MAX_SAMPLES,
        "preprocessing_num_workers": "dataset_num_proc",
        "overwrite_cache": "leave it out, the reference cache knows when it is stale",
        "packing": "leave it out, pairs are always packed",
        "neat_packing": "leave it out, pairs are always packed",
        "flash_attn": "leave it out, attention is chosen and packed by fastpo",
        "enable_liger_kernel": "use_liger_kernel",
        "quantization_bit": "load_in_4bit: true or load_in_8bit: true",
        "double_quantization": "use_bnb_nested_quant",
        "lora_rank": "lora_r (with use_peft: true)",
        "lora_target": "lora_target_modules (all is all-linear; with use_peft: true)",
        "additional_target": "lora_modules_to_save (with use_peft: true)",
        "adapter_name_or_path": "model (the folder of the adapter: it goes on being trained)",
        "create_new_adapter": "merge the first adapter, then set use_peft: true",
        "pissa_init": "peft_config: {init_lora_weights: pissa}",
        "pure_bf16": "dtype: bfloat16, with bf16: false",
        "use_galore": "not built: optim: adamw_8bit saves memory too",
        "use_apollo": "not built: optim: adamw_8bit saves memory too",
        "use_badam": "not built: optim: adamw_8bit saves memory too",
        "plot_loss": "leave it out, report.html has the curves",
        "use_swanlab": "report_to: swanlab",
    },
    _OPENRLHF: {
        "pretrain": "model",
        "ref_pretrain": "ref_model",
        "dataset_probs": "train_dataset: [{path: ..., weight: ...}, ...]",
        "train_split": "dataset_train_split",
        "eval_split": "dataset_test_split",
        "prompt_key": "rename the column to prompt",
        "chosen_key": "rename the column to chosen",
        "rejected_key": "rename the column to rejected",
        "input_template": "leave it out: prompts are taken as they are, conversations by the chat template",
        "apply_chat_template": "leave it out, conversations always go through the chat template",
        "max_len": "max_length",
        "max_epochs": "num_train_epochs",
        "train_batch_size": _STEP,
        "micro_train_batch_size": _STEP,
        "ipo": "loss_type: ipo, with ipo_reduce: sum, which OpenRLHF means",
        "nll_loss_coef": _SFT_TERM.format("dpo", "nll_loss_coef"),
        "aux_loss_coef": "router_aux_loss_coef: None is the model's own, 0 none",
        "l2": "weight_decay",
        "adam_betas": "adam_beta1 and adam_beta2",
        "max_norm": "max_grad_norm",
        "lr_scheduler": "lr_scheduler_type",
        "lr_warmup_ratio": "warmup_ratio",
        "zero_stage": "fsdp (2: shard_grad_op, 3: full_shard)",
        "adam_offload": "fsdp_cpu_offload",
        "ref_offload": "leave it out: the reference is computed once, then it leaves memory",
        "packing_samples": "leave it out, pairs are always packed",
        "target_modules": "lora_target_modules (with use_peft: true)",
        "save_path": "output_dir",
        "ckpt_path": "output_dir (checkpoints lie below it)",
        "max_ckpt_num": "save_total_limit",
        "load_checkpoint": "resume_from_checkpoint: auto",
        "use_wandb": "report_to: wandb",
        "use_tensorboard": "report_to: tensorboard",
        "wandb_run_name": "run_name",
        "wandb_project": "the environment variable WANDB_PROJECT",
    },
}

# TRL's loss types: their names here, or None where fastpo.train does not carry what they need yet.
TRL_LOSSES: dict[str, str | None] = {
    "sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "robust": "robust", "sppo_hard": "sppo_hard", "sft": "sft",
    "exo_pair": "exo_pair", "nca_pair": "nca_pair", "bco_pair": "bco_pair", "aot": "aot", "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero", "apo_down": "apo_down", "discopop": "discopop", "sigmoid_norm": "sigmoid_norm",
}
# fmt: on
_TABLES = (OPTIONS, EARLIER, CPO, KTO, REWARD, SCRIPT, *online_options.TABLES)


def lookup(name: str) -> Option | None:
    """The option of that name in TRL's configs, `trl dpo`, or earlier versions; None where nobody has it."""
    return next((table[name] for table in _TABLES if name in table), None)


def all_names() -> list[str]:
    """Every name that is known in some way, for the nearest to a misspelt one."""
    names = [n for table in _TABLES for n in table]
    return list(dict.fromkeys([*names, *(n for foreign in FOREIGN.values() for n in foreign)]))


def check_options(values: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Options to fields of TrainConfig, whose names are `known`; those without meaning are left out.

    Raises ConfigError for one that would change the training and is not built, for another project's name, and for an
    unknown one, naming the nearest.
    """
    out: dict[str, Any] = {}
    wrong: list[str] = []
    for given, value in values.items():
        if not isinstance(given, str):
            wrong.append(f"options have names, and {shown(given)} is none")
            continue
        option = lookup(given)
        name = option.to if option is not None and option.status == RENAMED and option.to in known else given
        assert name is not None
        if given == "fsdp_config" or given in online_options.SAMPLER_NAMES:
            continue
        if option is not None and option.values and name != given:
            if not isinstance(value, bool):
                if value is not None:
                    wrong.append(f"{given} must be true or false, not {shown(value)}")
                continue
            value = option.values[value]
        if name != given and value is None and (option is None or option.default is None or option.values):
            continue
        if name in known:
            if name in out and out[name] is not None and value is not None and differ(out[name], value):
                wrong.append(f"{name} is set twice, under another name too: {shown(out[name])} and {shown(value)}")
            out[name] = value
        elif option is None:
            wrong.append(_unknown(given, known))
        elif option.status == NO_EFFECT or option.harmless(value):
            continue
        elif option.status == REFUSED:
            wrong.append(f"{given}={shown(value)} is not honoured by fastpo: {option.note}")
        elif option.to is not None:
            wrong.append(f"{given} belongs to the command line; fastpo.train takes {option.to}")
    if wrong:  # all at once: a file of another project has many
        raise ConfigError("; ".join(wrong))
    online_options.apply_vllm(out, values)
    nothing: tuple[Any, ...] = (None, "", False, {})
    if all(differ(values.get("fsdp_config"), off) for off in nothing):
        _apply_fsdp_config(out, values["fsdp_config"])
    return out


def without_meaning(values: Mapping[Any, Any]) -> list[str]:
    """Names of the options that are set to something, and mean nothing here."""
    found = {name: lookup(name) for name in values if isinstance(name, str)}
    return [
        name
        for name, option in found.items()
        if option is not None and option.status == NO_EFFECT and not option.harmless(values[name])
    ]


_INPUTS = ("model", "ref_model", "train_dataset", "eval_dataset")  # what a run is given beside its options


def _unknown(name: str, known: Collection[str]) -> str:
    """What to say about a name that is nobody's, or another project's."""
    last = name.rpartition(".")[2]  # OpenRLHF's --model.beta
    for project, names in FOREIGN.items():
        if last in names:
            text = names[last]
            return f"{name} is {project}'s: {'here it is ' if text.split(' (')[0] in {*known, *_INPUTS} else ''}{text}"
    if last != name and last in known:
        return f"{name} is {_OPENRLHF}'s: here it is {last}"
    if name in _transformers_fields():
        return f"{name} is not honoured by fastpo"
    near = (
        [_SHORT[name]] if name in _SHORT else difflib.get_close_matches(name, [*known, *all_names()], n=1, cutoff=0.5)
    )
    return f"unknown option {shown(name)}" + (f"; did you mean {near[0]!r}?" if near else "")


# What people type for options whose names are too far from it to be found by likeness.
_SHORT = {"lr": "learning_rate", "batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs",
          "steps": "max_steps", "warmup": "warmup_ratio", "grad_accum": "gradient_accumulation_steps"}  # fmt: skip


@functools.cache
def _transformers_fields() -> frozenset[str]:
    """Fields of the TrainingArguments that is installed, which may be newer than the table."""
    import dataclasses

    from transformers import TrainingArguments

    return frozenset(f.name for f in dataclasses.fields(TrainingArguments))


def fsdp_mode(value: Any) -> tuple[str, bool]:
    """transformers' spellings of `fsdp` to ours, and whether they ask for CPU offload."""
    if isinstance(value, str):
        words = value.replace(",", " ").split()
    elif isinstance(value, list | tuple):
        words = [str(getattr(v, "value", v)) for v in value]
    else:
        words = ["full_shard" if value else "no"]
    plain = {"true": "full_shard", "false": "no", "none": "no"}
    words = [plain.get(word.lower(), word.lower()) for word in words]
    modes = [word for word in words if word not in ("offload", "auto_wrap")]
    if modes in (["no"], ["full_shard"], ["shard_grad_op"]):
        return modes[0], "offload" in words
    if not modes:
        return ("full_shard" if words else "no"), "offload" in words
    raise ConfigError(f"fsdp must be no, full_shard or shard_grad_op, not {shown(value)}")


# Keys of fsdp_config that change nothing here; those of _FSDP_FIXED only at these values.
_FSDP_ANY = ("transformer_layer_cls_to_wrap", "cpu_ram_efficient_loading", "sync_module_states", "use_orig_params",
             "limit_all_gathers", "forward_prefetch", "backward_prefetch", "state_dict_type")  # fmt: skip
_FSDP_FIXED = {
    "version": (2,), "min_num_params": (0,), "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "xla": (False,), "xla_fsdp_v2": (False,), "xla_fsdp_grad_ckpt": (False,), "xla_fsdp_settings": ({},),
}  # fmt: skip


def _apply_fsdp_config(out: dict[str, Any], config: Any) -> None:
    """transformers' `fsdp_config`, a mapping or the path of a JSON file, on top of `fsdp`."""
    if isinstance(config, str):
        try:
            config = json.loads(config if config.lstrip().startswith("{") else Path(config).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read fsdp_config {shown(config)}: {error}") from None
    if not isinstance(config, Mapping):
        raise ConfigError(f"fsdp_config must be a mapping, not {shown(config)}")
    mode, offload = fsdp_mode(out.get("fsdp"))
    if mode == "no":
        raise ConfigError("fsdp_config is given, but fsdp is off: set fsdp=full_shard")
    for key, value in config.items():
        key = str(key).removeprefix("fsdp_")
        text = str(value).lower()
        if key == "cpu_offload" and text in ("true", "false"):
            offload = offload or text == "true"
        elif key == "reshard_after_forward" and text in ("true", "full_shard", "false", "shard_grad_op"):
            mode = "full_shard" if text in ("true", "full_shard") else "shard_grad_op"
        elif key == "activation_checkpointing" and text in ("true", "false"):
            if text == "true":
                out["gradient_checkpointing"] = True
        elif key in _FSDP_FIXED:
            if text not in [str(fixed).lower() for fixed in (None, *_FSDP_FIXED[key])]:
                raise ConfigError(
                    f"fsdp_config: {key}={shown(value)} is not honoured by fastpo, only {_FSDP_FIXED[key][0]}"
                )
        elif key not in _FSDP_ANY:
            raise ConfigError(f"fsdp_config: {key}={shown(value)} is not honoured by fastpo")
    out["fsdp"] = mode
    if offload:
        out["fsdp_cpu_offload"] = True
