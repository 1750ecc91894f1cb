"""`TrainConfig`: one flat dataclass with Hugging Face's and TRL's field names and meanings.

A configuration comes from a `TrainConfig`, a dict, a YAML file, or arguments of TRL (`DPOConfig`, `KTOConfig`, ...) or
transformers (`TrainingArguments`), with keyword overrides on top (`TrainConfig.build`). Anything set that fastpo does not honour raises: an option that is
accepted is an option that has its effect.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpo.config import bounds, online, options, trl_configs
from fastpo.errors import ConfigError, shown


def _opt(default: Any, group: str, help: str, choices: tuple[str, ...] | None = None, secret: bool = False) -> Any:
    metadata = {"group": group, "help": help, "choices": choices}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata, repr=not secret)


SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
             "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay")  # fmt: skip
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
              "rmsprop", "muon", "sgd")  # fmt: skip


# What to do instead of a value that transformers or TRL know and fastpo does not.
_CHOICE_HINTS = {
    ("save_strategy", "best"): "load_best_model_at_end=True keeps the best checkpoint and ends with it",
    ("hub_strategy", "checkpoint"): "checkpoints stay in output_dir; every_save pushes the model",
    ("hub_strategy", "all_checkpoints"): "checkpoints stay in output_dir; every_save pushes the model",
    ("train_sampling_strategy", "group_by_length"): "nothing is padded, so rows of different length cost nothing",
    ("train_sampling_strategy", "batch_rebalance"): "ranks are always balanced",
    ("torch_compile_mode", "reduce-overhead"): "its CUDA graphs would overwrite what a layer's checkpoint still reads",
    ("torch_compile_mode", "max-autotune"): "use max-autotune-no-cudagraphs",
    ("lr_scheduler_type", "reduce_lr_on_plateau"): "pass optimizers=(optimizer, scheduler) and step it in a callback",
}


_SECRETS = ("api_key", "headers")  # of a server


@dataclass
class TrainConfig:
    """Everything a run depends on except the model and the data. `fastpo train --help` prints it grouped."""

    # fmt: off
    output_dir: str = _opt("fastpo-output", "run", "folder for the trained model, metrics.jsonl and config.yaml")
    overwrite_output_dir: bool = _opt(False, "run", "use an output_dir that already holds a run")
    resume_from_checkpoint: str | bool | None = _opt(None, "run", "go on from a checkpoint: its folder; true for the newest in output_dir; auto for the newest if there is one, else from the start")
    seed: int = _opt(42, "run", "seed of the row order, dropout and initialisation")
    data_seed: int | None = _opt(None, "run", "seed of the row order alone (None: seed)")
    use_cpu: bool = _opt(False, "run", "train on the CPU even where there is a GPU")
    device: str | None = _opt(None, "run", "device to train on, such as cuda:1 (None: the first GPU, else the CPU)")
    full_determinism: bool = _opt(False, "run", "only deterministic algorithms of PyTorch and its libraries; slower")

    fsdp: str | bool = _opt("no", "several processes", "no: every rank holds the model (data parallel); full_shard: FSDP2, parameters gathered per layer; shard_grad_op: kept gathered from forward to backward", )
    fsdp_cpu_offload: bool = _opt(False, "several processes", "fsdp: parameters, gradients and optimiser state live in host memory")
    fsdp_gradients: str = _opt("step", "several processes", "fsdp: reduce gradients once a step, whole in fp32 on every rank until then (step), or after every micro-batch, split (micro_batch)", ("step", "micro_batch"))
    ddp_timeout: int = _opt(1800, "several processes", "seconds after which a rank that waits for the others gives up")
    ddp_backend: str | None = _opt(None, "several processes", "process group's backend (None: nccl and gloo on GPUs, gloo on CPUs)")

    model_init_kwargs: dict | None = _opt(None, "model", "keyword arguments of from_pretrained, where the model is a name or path")
    dtype: str | None = _opt(None, "model", "dtype to load the model in; None or auto: the checkpoint's own")
    trust_remote_code: bool = _opt(False, "model", "let a checkpoint's own code run")
    router_aux_loss_coef: float | None = _opt(None, "model", "weight of a mixture of experts' load-balancing loss; None: the model's own, 0: none")
    disable_dropout: bool = _opt(True, "model", "set every dropout probability of the policy to zero")
    use_liger_kernel: bool | None = _opt(None, "model", "fused norms, MLPs and rotary embeddings in the trunk, and fused LoRA layers: on a CPU fastpo's own, on a GPU Liger's beside fastpo's LoRA (None: where they are available; true on a GPU: an error without liger-kernel; false: the model's own)")
    liger_kernel_config: dict | None = _opt(None, "model", "which of the fused layer kernels, such as {rope: false}")
    torch_compile: bool = _opt(False, "model", "compile the trunk's layers; token_bucket makes it for a few sizes of micro-batch instead of any")
    torch_compile_backend: str | None = _opt(None, "model", "torch.compile's backend (None: inductor)")
    torch_compile_mode: str | None = _opt(None, "model", "torch.compile's mode", ("default", "max-autotune-no-cudagraphs"))

    dataset_config: str | None = _opt(None, "data", "configuration of a hub dataset")
    dataset_train_split: str = _opt("train", "data", "split to train on, for a hub dataset")
    dataset_test_split: str = _opt("test", "data", "split to evaluate on, for a hub dataset")
    max_length: int | None = _opt(1024, "data", "tokens of prompt plus response that are kept (None: all); loss_type=reward leaves out longer responses; online losses leave out prompts without room for max_completion_length, and not given it is None for them")
    truncation_mode: str = _opt("keep_start", "data", "which end of a sequence over max_length is kept", ("keep_start", "keep_end"))
    invalid_rows: str = _opt("raise", "data", "rows with NaN scores, empty or identical responses: raise, or drop with a count", ("raise", "drop"))
    recognise_layouts: bool = _opt(True, "data", "convert rows of other projects' and popular data sets' layouts (docs/data.md), and say so; false: only fastpo's own columns")
    pair_policy: str = _opt("best_worst", "data", "pairs of rows with K responses: the best against the worst, all that differ, all that differ by pair_margin, or the column pairs (explicit)", ("best_worst", "all", "margin", "explicit"))
    pair_margin: float | None = _opt(None, "data", "pair_policy=margin: the least difference in score (or win_prob) of a pair")
    assistant_only_loss: bool = _opt(True, "data", "responses of several turns: train on the assistant's turns only (false: on those of users and tools too)")
    train_sampling_strategy: str = _opt("random", "data", "order of the rows", ("random", "sequential"))
    dataloader_drop_last: bool = _opt(False, "data", "leave out an epoch's last, incomplete step")
    dataset_num_proc: int | None = _opt(None, "data", "processes that tokenise; at most four for each CPU core are started (None: one)")

    loss_type: str | list[str] = _opt("dpo", "loss", "dpo (sigmoid), ipo, simpo, sppo, cpo, sft, ... (`fastpo losses` lists them); a list is a weighted sum")
    loss_weights: list[float] | None = _opt(None, "loss", "weight of each loss of a list (None: 1)")
    beta: float | None = _opt(None, "loss", "the loss's own beta (None: dpo, hinge, robust 0.1; simpo 2.0; sppo 0.001; ipo's tau 0.1; grpo 0; others by `fastpo losses`); 0 of a loss per token: no reference")
    label_smoothing: float = _opt(0.0, "loss", "dpo, cpo, simpo: smoothed labels (cDPO); robust: the probability that a label is flipped; exo_pair: its epsilon")
    gamma_beta_ratio: float | None = _opt(None, "loss", "simpo, cpo_simpo, alphapo: target margin over beta (None: simpo's 0.5)")
    ipo_reduce: str = _opt("mean", "loss", "ipo: log-ratios per token (mean, as TRL) or per response (sum, as the paper)", ("mean", "sum"))
    discopop_tau: float = _opt(0.05, "loss", "discopop: temperature of the blend")
    f_divergence_type: str | None = _opt(None, "loss", "dpo: the divergence from the reference; other than reverse_kl it is the loss fdpo (None: dpo's reverse_kl, fdpo's js_divergence)", ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"))
    f_alpha_divergence_coef: float = _opt(0.5, "loss", "f_divergence_type=alpha_divergence: its alpha")
    ld_alpha: float | None = _opt(None, "loss", "dpo, which is then ld_dpo: weight of the tokens past the pair's shorter response")
    use_weighting: bool = _opt(False, "loss", "dpo, which is then wpo with clamp_weight=false: pairs weighted by how likely the policy is to say them")
    loss_kwargs: dict | None = _opt(None, "loss", "further hyper-parameters of the losses, such as {cpo_alpha: 0.5}; `fastpo losses NAME` has their names")
    precompute_ref_log_probs: bool = _opt(False, "loss", "the reference is always computed once, ahead, and cached: true and false train alike. True refuses what cannot be: a streamed dataset, and after training rows given to Trainer.evaluate, for which false loads a model given by name again")
    sync_ref_model: bool = _opt(False, "loss", "TR-DPO: every ref_model_sync_steps steps the reference moves towards the policy")
    ref_model_mixup_alpha: float = _opt(0.6, "loss", "sync_ref_model: reference <- alpha policy + (1 - alpha) reference")
    ref_model_sync_steps: int = _opt(512, "loss", "sync_ref_model: steps between two moves")

    per_device_train_batch_size: int = _opt(8, "batch", "pairs per device and accumulation step; of an online loss per token responses, of an online preference loss prompts")
    gradient_accumulation_steps: int = _opt(1, "batch", "an optimiser step takes this many times per_device_train_batch_size pairs")
    per_device_eval_batch_size: int = _opt(8, "batch", "has no effect on the numbers; evaluation is packed like training")
    share_prompts: str = _opt("auto", "batch", "one copy of a prompt in the trunk for all its responses, those of other rows of the step too; auto: where it is estimated faster (on a GPU by arithmetic, not measured)", ("auto", "always", "never"))
    max_tokens: int | str | None = _opt(None, "batch", "tokens of a packed micro-batch (None: 16384 on a GPU, 2048 on a CPU; auto: as many as the memory is estimated to hold, as `fastpo plan` says)")
    token_bucket: int | None = _opt(None, "batch", "pad micro-batches to a multiple of this many tokens, which no number sees, so that compiled layers meet few shapes (None: no padding)")

    learning_rate: float = _opt(1e-6, "optimisation", "peak learning rate")
    num_train_epochs: float = _opt(3.0, "optimisation", "passes over the data")
    max_steps: int = _opt(-1, "optimisation", "optimiser steps; over num_train_epochs where positive")
    lr_scheduler_type: str = _opt("linear", "optimisation", "learning rate schedule", SCHEDULES)
    lr_scheduler_kwargs: dict | None = _opt(None, "optimisation", "arguments of the schedule")
    warmup_steps: float = _opt(0, "optimisation", "warm-up steps; below 1, a share of all steps")
    warmup_ratio: float | None = _opt(None, "optimisation", "warm-up as a share of all steps")
    optim: str = _opt("adamw_torch_fused", "optimisation", "optimiser", OPTIMIZERS)
    optim_args: str | None = _opt(None, "optimisation", "further arguments of the optimiser, as 'momentum=0.9,nesterov=true'")
    master_weights: str = _opt("auto", "optimisation", "16-bit trainable weights: step an fp32 copy (fp32), round stochastically and keep none (stochastic), or round to nearest (none), which loses small updates; auto: fp32, but stochastic on a GPU that is estimated not to hold the copies, which the log says", ("auto", "fp32", "stochastic", "none"))
    weight_decay: float = _opt(0.0, "optimisation", "decoupled weight decay, not on biases and norms")
    adam_beta1: float = _opt(0.9, "optimisation", "AdamW's beta1")
    adam_beta2: float = _opt(0.999, "optimisation", "AdamW's beta2")
    adam_epsilon: float = _opt(1e-8, "optimisation", "AdamW's epsilon")
    max_grad_norm: float = _opt(1.0, "optimisation", "gradients are scaled down to this norm (0 or less: never)")
    max_nonfinite_steps: int = _opt(5, "optimisation", "stop after this many non-finite steps in a row; each is skipped")

    bf16: bool | None = _opt(None, "precision and memory", "autocast to bfloat16 over the weights as loaded (None: on a GPU that has it)")
    tf32: bool | None = _opt(None, "precision and memory", "TF32 in fp32 matrix multiplies of NVIDIA GPUs (None: PyTorch's setting)")
    gradient_checkpointing: bool = _opt(True, "precision and memory", "recompute layers in the backward pass; gradient_checkpointing_layers says how many")
    gradient_checkpointing_kwargs: dict | None = _opt(None, "precision and memory", "arguments of gradient_checkpointing_enable")
    gradient_checkpointing_layers: int | str | None = _opt(None, "precision and memory", "gradient_checkpointing for this many of the layers, the first ones; all; or auto: as few as the memory is estimated to demand (None: auto on a GPU, all on a CPU)")
    activation_offloading: bool = _opt(False, "precision and memory", "keep what the layers save for the backward pass in host memory; needs a GPU, and slows the step")
    logits_memory_budget: int | None = _opt(None, "precision and memory", "bytes that the head may keep from forward to backward (None: 1 GiB, or an fp32 gradient of its weight if that is more; on a GPU what the run is estimated to leave over; 0: nothing of size N x V)")
    grad_filter: float = _opt(0.0, "precision and memory", "probability of each token's distribution that the head's gradient may leave out, for speed: its least likely tokens, 0.001 for instance; the mean and the largest share left out are logged (0: exact gradients)")

    eval_strategy: str = _opt("no", "evaluation", "when to evaluate; steps where eval_steps is set", ("no", "steps", "epoch"))
    eval_steps: float | None = _opt(None, "evaluation", "steps between evaluations (None: logging_steps); below 1, a share of all steps")
    eval_on_start: bool = _opt(False, "evaluation", "evaluate before the first step")
    eval_delay: float = _opt(0, "evaluation", "no evaluation before this step (or epoch, with eval_strategy=epoch)")
    sample_generations: int = _opt(0, "evaluation", "prompts of the evaluation data to answer at every evaluation, into samples.jsonl")
    generation_kwargs: dict | None = _opt(None, "evaluation", "arguments of generate() for the samples, such as {max_new_tokens: 128}")

    logging_steps: float = _opt(10, "logging", "steps between log lines; below 1, a share of all steps")
    logging_strategy: str = _opt("steps", "logging", "when to log", ("no", "steps", "epoch"))
    logging_first_step: bool = _opt(False, "logging", "log the first step too")
    token_metrics: bool = _opt(True, "logging", "entropy and mean_token_accuracy of the steps that are logged, and of evaluations, from the same pass of the head as their loss")
    disable_tqdm: bool = _opt(False, "logging", "no progress bar")
    report_to: str | list[str] = _opt("none", "logging", "trackers beside output_dir/metrics.jsonl: tensorboard, wandb, trackio, mlflow, ... as transformers names them; all; none")
    report: bool = _opt(True, "logging", "write report.html, one file with curves, settings, counts and warnings, after training")
    guardrails: bool = _opt(True, "logging", "warn, with the reason, when a run looks wrong")
    run_name: str | None = _opt(None, "logging", "name of the run, for config.yaml and the trackers")
    project: str = _opt("huggingface", "logging", "trackio: the project that the run belongs to")
    trackio_space_id: str | None = _opt(None, "logging", "trackio: Hugging Face Space to log to")
    trackio_bucket_id: str | None = _opt(None, "logging", "trackio: bucket of that Space")
    trackio_static_space_id: str | bool | None = _opt(None, "logging", "trackio: static Space for the finished run; false for none")

    save_strategy: str = _opt("no", "saving", "when to save the model beside the final save; steps where save_steps is set", ("no", "steps", "epoch"))
    save_steps: float = _opt(500, "saving", "steps between saves; below 1, a share of all steps")
    save_total_limit: int | None = _opt(None, "saving", "how many checkpoint folders to keep")
    save_only_model: bool = _opt(False, "saving", "checkpoints without the state that resuming needs")
    max_shard_size: str = _opt("5GB", "saving", "largest file of a saved model")
    load_best_model_at_end: bool = _opt(False, "saving", "end with the weights of the best checkpoint, which save_total_limit keeps")
    metric_for_best_model: str | None = _opt(None, "saving", "evaluation metric that says which checkpoint is best (None: loss)")
    greater_is_better: bool | None = _opt(None, "saving", "whether larger is better (None: not for a metric that ends in loss)")
    save_merged: bool = _opt(False, "saving", "also save the model with its adapter merged, in output_dir/merged")
    push_to_hub: bool = _opt(False, "saving", "upload the saved model to the Hugging Face hub")
    hub_model_id: str | None = _opt(None, "saving", "repository to push to (None: the name of output_dir, in your account)")
    hub_strategy: str = _opt("every_save", "saving", "push at every save and at the end, or at the end only", ("every_save", "end"))
    hub_token: str | None = _opt(None, "saving", "token to push with (None: the one that you are logged in with); kept out of every file", secret=True)
    hub_private_repo: bool | None = _opt(None, "saving", "make the repository private")
    hub_revision: str | None = _opt(None, "saving", "branch to push to")
    save_final: bool = _opt(True, "saving", "save the model in output_dir at the end")

    num_generations: int | None = _opt(None, "online: responses", "responses of each prompt, 2 or more (None: 8; rloo and the online preference losses 2)")
    num_generations_eval: int | None = _opt(None, "online: responses", "the same in an evaluation (None: num_generations)")
    max_completion_length: int = _opt(512, "online: responses", "tokens of the longest response")
    steps_per_generation: int | None = _opt(None, "online: responses", "micro-batches that one generation feeds, as TRL counts: over gradient_accumulation_steps it is optimiser steps (None: one step)")
    generation_batch_size: int | None = _opt(None, "online: responses", "the same in responses (of the preference losses prompts) over all processes; not with steps_per_generation")
    num_iterations: int = _opt(1, "online: responses", "times that the steps of a generation are done before the next is drawn")
    temperature: float | None = _opt(None, "online: responses", "of the distribution that responses are drawn from (None: 1.0; the preference losses 0.9)")
    top_p: float = _opt(1.0, "online: responses", "draw from the most likely tokens of this probability in all; 1: from all")
    top_k: int = _opt(0, "online: responses", "draw from so many of the most likely tokens; 0: from all")
    min_p: float | None = _opt(None, "online: responses", "draw from tokens that are at least so likely, as a share of the likeliest's probability")
    repetition_penalty: float = _opt(1.0, "online: responses", "factor on the logits of tokens that are there already; 1: none")
    chat_template_kwargs: dict | None = _opt(None, "online: responses", "arguments of the chat template for prompts of turns, such as {enable_thinking: false}")
    sampler: dict | None = _opt(None, "online: responses", "who answers, as the section sample of docs/loop.md: {engine: openai, base_url: ...} is a server (None: the policy in this process)", secret=True)
    mixture_coef: float | None = _opt(None, "online: responses", "nash_md, ipo_md: the reference's share where the opponent's responses are drawn (None: 0.5)")
    dynamic_sampling: int = _opt(0, "online: responses", "rounds of new prompts for those whose responses all have one reward (0: none)")

    judge: dict | str | None = _opt(None, "online: rewards", "who compares two responses for the online preference losses: a section of a judge as in docs/loop.md, or a name", secret=True)
    reward_weights: list[float] | None = _opt(None, "online: rewards", "weight of each of reward_funcs (None: 1)")
    multi_objective_aggregation: str = _opt("sum_then_normalize", "online: rewards", "several rewards: summed and then scaled, or each scaled and then summed", ("sum_then_normalize", "normalize_then_sum"))
    scale_rewards: str | None = _opt(None, "online: rewards", "advantages over the standard deviation of the prompt's rewards (group, or true), of the generation's (batch), or as they are (none, or false) (None: group; reinforce, rloo, dr_grpo none)", ("group", "batch", "none"))
    missing_eos_penalty: float | None = _opt(None, "online: rewards", "taken from the reward of a response that does not end")
    overlong_buffer: int | None = _opt(None, "online: rewards", "DAPO's soft punishment: over the last so many tokens before max_completion_length the reward falls by overlong_penalty")
    overlong_penalty: float = _opt(1.0, "online: rewards", "overlong_buffer: what a response of the greatest length loses")

    epsilon: float | None = _opt(None, "online: loss", "ratios are clipped below at 1 - epsilon (None: the loss's own, 0.2; gspo 0.0003, gmpo 0.4 of log-ratios)")
    epsilon_high: float | None = _opt(None, "online: loss", "ratios are clipped above at 1 + epsilon_high (None: the loss's own, dapo 0.28, cispo 5, gspo 0.0004, or epsilon)")
    delta: float | None = _opt(None, "online: loss", "upper bound of a ratio where the advantage is negative (None: none)")
    sapo_temperature_neg: float | None = _opt(None, "online: loss", "sapo: temperature of the gate where the advantage is not positive (None: 1.05)")
    sapo_temperature_pos: float | None = _opt(None, "online: loss", "sapo: where it is positive (None: 1.0)")
    vespo_k_pos: float | None = _opt(None, "online: loss", "vespo: power of the weight where the advantage is positive (None: 2.0)")
    vespo_lambda_pos: float | None = _opt(None, "online: loss", "vespo: its decay there (None: 3.0)")
    vespo_k_neg: float | None = _opt(None, "online: loss", "vespo: power of the weight where the advantage is negative (None: 3.0)")
    vespo_lambda_neg: float | None = _opt(None, "online: loss", "vespo: its decay there (None: 2.0)")
    importance_sampling_level: str | None = _opt(None, "online: loss", "ratios of tokens or of whole responses (None: token; gspo, luspo sequence)", ("token", "sequence"))
    kl_estimator: str | None = _opt(None, "online: loss", "what beta weighs: the log-ratio (k1), half its square (k2), or r - 1 - log r (k3) (None: k3)", ("k1", "k2", "k3"))
    use_bias_correction_kl: bool | None = _opt(None, "online: loss", "multiply the KL term by the ratio, which makes its gradient the reverse KL's (None: on; gmpo off)")
    off_policy_mask_threshold: float | None = _opt(None, "online: loss", "leave out responses of negative advantage whose mean log-ratio to the sampler's policy is over it (None: none)")
    mask_truncated_completions: bool = _opt(False, "online: loss", "leave out responses that max_completion_length ended")
    top_entropy_quantile: float = _opt(1.0, "online: loss", "this share of the tokens counts, those of the highest entropy; 1: all")
    entropy_coef: float = _opt(0.0, "online: loss", "weight of the mean entropy of the tokens, which is raised")
    use_adaptive_entropy: bool = _opt(False, "online: loss", "entropy_coef goes up by entropy_coef_delta at a step whose entropy is under entropy_target, else down")
    entropy_coef_min: float = _opt(0.0, "online: loss", "use_adaptive_entropy: the least entropy_coef")
    entropy_coef_max: float = _opt(1.0, "online: loss", "use_adaptive_entropy: the greatest")
    entropy_coef_delta: float = _opt(0.005, "online: loss", "use_adaptive_entropy: its step")
    entropy_target: float = _opt(0.2, "online: loss", "use_adaptive_entropy: nats of a token; above it the term is left out")
    importance_sampling_correction: bool = _opt(True, "online: loss", "weigh by our probability of a token over the sampler's own, where it says it")
    importance_sampling_mode: str | None = _opt(None, "online: loss", "weights of tokens or responses, those out of bounds cut to them or left out (None: sequence_mask; vespo token_truncate)", ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"))
    importance_sampling_clip_max: float | None = _opt(3.0, "online: loss", "upper bound of these weights (None: none)")
    importance_sampling_clip_min: float | None = _opt(None, "online: loss", "lower bound of these weights (None: none)")

    log_completions: bool = _opt(False, "online: logging", "write every generation's prompts, responses, rewards and advantages into output_dir/completions")
    num_completions_to_print: int | None = _opt(None, "online: logging", "log_completions: so many of a generation, the first ones (None: all)")
    log_unique_prompts: bool = _opt(False, "online: logging", "log_completions: one response of each prompt, the first")
    # fmt: on

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            choices = f.metadata["choices"]
            value = getattr(self, f.name)
            if f.name == "scale_rewards" and str(value).lower() in ("true", "false"):
                value = str(value).lower() == "true"
            if isinstance(value, bool) and choices and bool not in bounds.kinds_of(f.type):  # to YAML, no is false
                meant = ("always",) if value else ("no", "never")
                if f.name == "scale_rewards":  # which TRL takes as true and false too
                    meant = ("group",) if value else ("none",)
                value = next((c for c in choices if c in meant), value)
            value = bounds.coerce(f.name, value, f.type)
            if f.name in bounds.RANGES and not (f.name == "beta" and value == 0 and online.takes_no_beta(self.losses)):
                bounds.check_range(f.name, value)
            bounds.check_content(f.name, value if f.name != "hub_token" else None)
            setattr(self, f.name, value)
            if choices and value is not None and value not in choices:
                hint = _CHOICE_HINTS.get((f.name, value)) if isinstance(value, str) else None
                raise ConfigError(
                    f"{f.name} must be one of {', '.join(choices)}, not {shown(value)}" + (f": {hint}" if hint else "")
                )
        if isinstance(self.max_tokens, str) and self.max_tokens != "auto":
            raise ConfigError(f"max_tokens must be a number of tokens or auto, not {shown(self.max_tokens)}")
        layers = self.gradient_checkpointing_layers
        if isinstance(layers, str) and layers not in ("auto", "all"):
            raise ConfigError(
                f"gradient_checkpointing_layers must be a number of layers, all or auto, not {shown(layers)}"
            )
        if layers is not None and not self.gradient_checkpointing:
            raise ConfigError("gradient_checkpointing_layers needs gradient_checkpointing")
        if (self.pair_margin is not None) != (self.pair_policy == "margin"):
            raise ConfigError("pair_policy=margin and pair_margin need each other")
        if self.warmup_ratio is not None and self.warmup_steps:
            raise ConfigError("warmup_steps and warmup_ratio are both set; give one")
        if self.max_steps == 0:
            raise ConfigError("max_steps must be positive, or -1 for num_train_epochs, not 0")
        if self.torch_compile_backend is not None or self.torch_compile_mode is not None:
            self.torch_compile = True  # as in transformers
        self._check_fsdp()
        self._check_best()
        self._check_resume()
        if not self.losses:
            raise ConfigError("loss_type names no loss")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ConfigError(f"loss_weights has {len(self.loss_weights)} entries for {len(self.losses)} losses")
        online.check(self)

    def _check_fsdp(self) -> None:
        self.fsdp, offload = options.fsdp_mode(self.fsdp)
        self.fsdp_cpu_offload = self.fsdp_cpu_offload or offload
        if self.fsdp != "no" and ("8bit" in self.optim or "paged" in self.optim or self.optim == "muon"):
            raise ConfigError(f"optim={self.optim} does not work on split parameters (fsdp): use adamw_torch_fused")
        if self.fsdp != "no" and self.torch_compile:
            raise ConfigError("torch_compile does not go with fsdp, whose layers are gathered by hooks: leave one out")
        if self.fsdp_cpu_offload and self.fsdp == "no":
            raise ConfigError("fsdp_cpu_offload needs fsdp=full_shard")

    def _check_resume(self) -> None:
        """None for no, True for the newest, `auto`, or a path."""
        value = self.resume_from_checkpoint
        words: dict[str, Any] = dict.fromkeys(("", "false", "no", "none")) | {"true": True, "yes": True, "auto": "auto"}
        if isinstance(value, str):
            self.resume_from_checkpoint = words.get(value.lower(), value)
        elif value is False:
            self.resume_from_checkpoint = None

    def _check_best(self) -> None:
        if self.load_best_model_at_end:
            if self.save_only_model:
                raise ConfigError("load_best_model_at_end loads a checkpoint's state: leave save_only_model out")
            if self.save_strategy != self.eval_strategy or self.save_strategy == "no":
                raise ConfigError(
                    "load_best_model_at_end needs save_strategy and eval_strategy alike, steps or epoch, not "
                    f"{self.save_strategy!r} and {self.eval_strategy!r}"
                )
            if self.save_strategy == "steps" and not _multiple(self.save_steps, self.eval_steps or self.logging_steps):
                raise ConfigError("load_best_model_at_end needs save_steps to be a multiple of eval_steps")
        if self.sample_generations and self.eval_strategy == "no" and not self.eval_on_start:
            raise ConfigError("sample_generations answers at every evaluation: set eval_strategy and an eval_dataset")
        if self.push_to_hub and not self.save_final:
            raise ConfigError("push_to_hub needs save_final")

    @property
    def losses(self) -> list[str]:
        """The loss types as a list."""
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)

    @property
    def is_online(self) -> bool:
        """Whether the loss is trained on responses that the policy gives as it trains."""
        return online.loss_of(self.losses) is not None

    @property
    def scalar_head(self) -> bool:
        """Whether a reward model is trained, which has a scalar head in place of a language model's."""
        return "reward" in self.losses

    @property
    def step_size(self) -> int:
        """Pairs (or rows, for sft) of one optimiser step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def report_names(self) -> list[str]:
        """The trackers asked for, as a list; empty for none."""
        names = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to)
        return [name for name in names if name != "none"]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict, in order; without the hub's token, and a server's key and headers."""
        out = {k: v for k, v in dataclasses.asdict(self).items() if k != "hub_token"}
        for name in ("sampler", "judge"):
            if isinstance(out[name], dict):
                out[name] = {k: v for k, v in out[name].items() if k not in _SECRETS}
        return out

    @classmethod
    def build(cls, args: Any = None, **overrides: Any) -> "TrainConfig":
        """A `TrainConfig` from `args` (None, TrainConfig, dict, YAML path, or a TRL / transformers arguments object).

        Raises ConfigError for an unknown option (naming the nearest) and for one that fastpo does not honour.
        """
        ignored: list[str] = []

        def given(values: Mapping[str, Any]) -> dict[str, Any]:
            ignored.extend(options.without_meaning(values))
            return _given(values)

        if args is None:
            values: dict[str, Any] = {}
        elif isinstance(args, cls):
            values = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
            ignored += getattr(args, "without_meaning", [])
        elif isinstance(args, Mapping):
            values = given(args)
        elif isinstance(args, str | Path):
            values = given(read_yaml(args))
        elif trl_configs.class_of(args) is not None:
            values = given(trl_configs.values_of(args, field_names()))
        else:
            raise ConfigError(
                "args must be a TrainConfig, a dict, a YAML path or a TRL config such as DPOConfig, not "
                f"{type(args).__name__}"
            )
        values |= given(overrides)
        # A cadence that is given says that it is wanted.
        if ("save_steps" in values or "save_total_limit" in values) and "save_strategy" not in values:
            values["save_strategy"] = "steps"
        if values.get("eval_steps") is not None and "eval_strategy" not in values:
            values["eval_strategy"] = "steps"
        names = values.get("loss_type")
        names = [names] if isinstance(names, str) else names if isinstance(names, list) else []
        if "max_length" not in values and any(name in online.ONLINE for name in names):
            values["max_length"] = None  # as in TRL, max_completion_length is what bounds an online run's rows
        config = cls(**values)
        config.without_meaning = list(dict.fromkeys(ignored))  # type: ignore[attr-defined]  # said at the start of a run
        return config


def _multiple(value: float, of: float) -> bool:
    """Whether one cadence falls on the other; shares of all steps too, as near as floats say."""
    ratio = value / of
    return abs(ratio - round(ratio)) < 1e-6 and ratio > 0.5


def field_names() -> list[str]:
    """Names of all options, in the order of `--help`."""
    return [f.name for f in dataclasses.fields(TrainConfig)]


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Checked options; None for a field that cannot be None here, but is by TRL's default, leaves it as it is."""
    hints = {f.name: f.type for f in dataclasses.fields(TrainConfig)}
    out = options.check_options(values, hints)
    return {
        name: value
        for name, value in out.items()
        if value is not None
        or type(None) in bounds.kinds_of(hints[name])
        or name not in options.OPTIONS
        or options.OPTIONS[name].default is not None
    }


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an option that stands there twice is refused, since one of the two would be lost."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        line = key.start_mark.line + 1
                        raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is set twice (line {line})")
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader)
    except FileNotFoundError:
        raise ConfigError(f"no such file: {shown(str(path))} (the configuration)") from None
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {shown(str(path))}: {error.strerror}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}{_tab_hint(str(error))}") from None
    except ValueError as error:  # bytes that are no text; a null character in the path; a date that is none
        raise ConfigError(f"cannot read the configuration {shown(str(path))}: {error}") from None
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{path} must hold option names with values, not a {type(data).__name__}")
    return data or {}


def _tab_hint(error: str) -> str:
    return "; indent with spaces, not with tabs" if "\\t" in error else ""
