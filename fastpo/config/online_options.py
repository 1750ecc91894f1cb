"""What becomes of the options of TRL's online trainers beyond DPOConfig's: GRPO, RLOO, GMPO, OnlineDPO, Nash-MD, XPO.

Names, defaults and order are those of TRL 1.16's config classes; NashMDConfig and XPOConfig are of earlier versions.
"""
# ruff: noqa: E501  # one option a line: it reads as the table it is

from collections.abc import Mapping
from typing import Any

from fastpo.config.option import Option, no, nothing, same, to
from fastpo.errors import ConfigError, shown

_COLOCATED = "vLLM runs as a server of its own here: given to `vllm serve`"
_BATCHING = "the sampler batches by itself; a server batches continuously: sampler={engine: openai, base_url: ...}"
_SERVER = "with use_vllm and vllm_mode=server: sampler={engine: openai, base_url: http://HOST:PORT/v1}"
_LOG_HUB = "completions are written into output_dir/completions: push that folder"
_OWN = "None: the loss's own, docs/losses.md has them"

# What the trainers share, by what it is about.
# fmt: off
_BATCH = {
    "per_device_train_batch_size": same(8, "responses, as in TRL: times gradient_accumulation_steps and processes a multiple of num_generations"),
    "remove_unused_columns": nothing("reward functions are given every column", False),
    "disable_dropout": same(False),
}
_GENERATION = {
    "num_generations_eval": same(),
    "max_completion_length": same(512),
    "ds3_gather_for_generation": nothing("there is no DeepSpeed", True),
    "shuffle_dataset": to("train_sampling_strategy", True, "true is random, false sequential", {True: "random", False: "sequential"}),
    "generation_batch_size": same(None, "responses, a multiple of the step's; not with steps_per_generation"),
    "steps_per_generation": same(None, "micro-batches, as in TRL: over gradient_accumulation_steps it is the optimiser steps that one generation feeds, a whole number; None: one. Fewer than gradient_accumulation_steps, where they divide them, are one step too: the policy does not change within it"),
}
_SAMPLING = {
    "top_p": same(1.0),
    "top_k": same(0),
    "min_p": same(),
    "generation_kwargs": same(None, "of sample_generations, without which it is refused; what is drawn for the loss takes the options around this one"),
    "chat_template_kwargs": same(),
    "repetition_penalty": same(1.0),
    "cache_implementation": no("the in-process sampler chooses the cache"),
}
_VLLM = {
    "use_vllm": to("sampler", False, _SERVER),
    "vllm_mode": to("sampler", "colocate", "server; colocate is refused: start `vllm serve MODEL`"),
    "vllm_model_impl": nothing(_COLOCATED, "vllm"),
    "vllm_enable_sleep_mode": nothing(_COLOCATED, False),
    "vllm_structured_outputs_regex": no("set guided decoding where the server starts, or check the form in a reward function"),
    "vllm_server_base_url": to("sampler", None, _SERVER),
    "vllm_server_host": to("sampler", "0.0.0.0", _SERVER),
    "vllm_server_port": to("sampler", 8000, _SERVER),
    "vllm_server_timeout": nothing("the server must be up; sampler={command: ...} starts one and waits start_timeout seconds", 240.0),
    "vllm_group_port": nothing("no group of processes sends the weights: the server loads them from a folder", 51216),
    "vllm_gpu_memory_utilization": nothing(_COLOCATED, 0.3),
    "vllm_max_model_length": nothing(_COLOCATED),
    "vllm_tensor_parallel_size": nothing(_COLOCATED, 1),
}
_LOGGING = {
    "log_completions": same(False, "written for every generation into output_dir/completions, not printed"),
    "log_multimodal": nothing("prompts and completions are text", True),
    "num_completions_to_print": same(None, "that are written"),
    "log_unique_prompts": same(False),
}
_CONTINUOUS = {
    "use_transformers_continuous_batching": nothing(_BATCHING, False),
    "transformers_continuous_batching_config": nothing(_BATCHING),
    "use_transformers_paged": nothing(_BATCHING, False),
}

GRPO: dict[str, Option] = {
    **_BATCH,
    "cast_lm_head_to_fp32": no("log-probabilities are accumulated in fp32 from the head as it is: load the model with dtype=float32", False),
    "num_generations": same(8, "None: 8; rloo and the preference losses 2"),
    **_GENERATION,
    "temperature": same(1.0, "None: 1.0; the preference losses 0.9. Log-probabilities are of the tempered distribution, as in TRL"),
    **_SAMPLING,
    **_VLLM,
    "beta": same(0.0, "None: the loss's own, of grpo and its kin 0, rloo 0.05; 0: no reference"),
    "num_iterations": same(1),
    "epsilon": same(0.2, "None: the loss's own, 0.2; gspo 0.0003, gmpo 0.4"),
    "delta": same(),
    "epsilon_high": same(None, "None: epsilon. By name, not of a GRPOConfig, dapo and cispo have their papers'"),
    "sapo_temperature_neg": same(1.05, _OWN),
    "sapo_temperature_pos": same(1.0, _OWN),
    "vespo_k_pos": same(2.0, _OWN),
    "vespo_lambda_pos": same(3.0, _OWN),
    "vespo_k_neg": same(3.0, _OWN),
    "vespo_lambda_neg": same(2.0, _OWN),
    "importance_sampling_level": same("token", "None: the loss's own, token; gspo and luspo sequence"),
    "reward_weights": same(),
    "multi_objective_aggregation": same("sum_then_normalize"),
    "scale_rewards": same("group", "true is group, false none. None: group; reinforce, rloo and dr_grpo none, as their papers"),
    "loss_type": same("dapo", "the same names; gspo is grpo with importance_sampling_level=sequence. More: reinforce, rloo, gspo, gmpo"),
    "mask_truncated_completions": same(False),
    "top_entropy_quantile": same(1.0),
    "entropy_coef": same(0.0, "not with grad_filter, which leaves out tokens that the entropy's gradient needs"),
    "use_adaptive_entropy": same(False),
    "entropy_coef_min": same(0.0),
    "entropy_coef_max": same(1.0),
    "entropy_coef_delta": same(0.005),
    "entropy_target": same(0.2),
    "max_tool_calling_iterations": no("agents that call tools while they answer are not built"),
    "vllm_importance_sampling_correction": to("importance_sampling_correction", True, "of every sampler that says its own log-probabilities"),
    "vllm_importance_sampling_mode": to("importance_sampling_mode", "sequence_mask", "None: sequence_mask; vespo token_truncate"),
    "vllm_importance_sampling_clip_max": to("importance_sampling_clip_max", 3.0),
    "vllm_importance_sampling_clip_min": to("importance_sampling_clip_min"),
    "off_policy_mask_threshold": same(),
    "use_bias_correction_kl": same(True, _OWN),
    **_LOGGING,
    "log_completions_hub_repo": no(_LOG_HUB),
    **_CONTINUOUS,
    "vllm_importance_sampling_cap": to("importance_sampling_clip_max"),
}

RLOO: dict[str, Option] = {
    **_BATCH,
    "num_generations": same(2),
    **_GENERATION,
    "temperature": same(1.0, "None: 1.0; the preference losses 0.9"),
    **_SAMPLING,
    **_VLLM,
    "beta": same(0.05, "None: the loss's own, of rloo 0.05; 0: no reference"),
    "num_iterations": same(1),
    "epsilon": same(0.2, _OWN),
    "epsilon_high": same(None, "None: epsilon"),
    "reward_weights": same(),
    "normalize_advantages": to("scale_rewards", False, "true is batch", {True: "batch", False: None}),
    "reward_clip_range": no("clip in the reward function: max(low, min(high, reward))"),
    "mask_truncated_completions": same(False),
    **_LOGGING,
    **_CONTINUOUS,
}

GMPO: dict[str, Option] = {
    **GRPO,
    "epsilon": same(0.4, "of log-ratios"),
    "loss_type": same("dapo", "gmpo, whatever it says, as in TRL"),
}

_ONE_BETA = "a list of several, one an epoch, is refused"
ONLINE_DPO: dict[str, Option] = {
    "per_device_train_batch_size": same(8, "prompts, as in TRL"),
    "learning_rate": same(5e-7),
    "remove_unused_columns": nothing("reward functions and judges are given every column", False),
    "reward_model_path": no("pass it in reward_funcs, an argument of fastpo.train"),
    "max_new_tokens": to("max_completion_length", 64),
    "max_length": same(512, "of prompt and response: a prompt that leaves no room for max_completion_length within it is left out and counted, where TRL cuts it at its start"),
    "temperature": same(0.9),
    **{name: option for name, option in _SAMPLING.items() if name != "chat_template_kwargs"},
    "missing_eos_penalty": same(None, "of every online loss"),
    "beta": same([0.1], _ONE_BETA),
    "loss_type": same("sigmoid", "sigmoid is online_dpo, ipo online_ipo"),
    **{name: option for name, option in _VLLM.items() if name != "vllm_max_model_length"},
    "vllm_gpu_memory_utilization": nothing(_COLOCATED, 0.55),
    "ds3_gather_for_generation": _GENERATION["ds3_gather_for_generation"],
    "reward_weights": same(),
}

# Beyond OnlineDPOConfig; TRL removed both before 1.16.
NASH_MD: dict[str, Option] = {"mixture_coef": same([0.5], "share of the reference in the opponent's distribution; " + _ONE_BETA)}
XPO: dict[str, Option] = {"alpha": same([1e-5], "in loss_kwargs here; " + _ONE_BETA)}
# fmt: on

TABLES = (GRPO, RLOO, ONLINE_DPO, NASH_MD, XPO)

# TRL's loss types of these trainers; GRPO's have the same names here.
LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
ONLINE_DPO_LOSSES = {"sigmoid": "online_dpo", "ipo": "online_ipo"}

# Options that say together which sampler it is.
SAMPLER_NAMES = tuple(name for name, option in _VLLM.items() if option.to == "sampler")


def apply_vllm(out: dict[str, Any], values: Mapping[Any, Any]) -> None:
    """TRL's vLLM options as `sampler` in `out`. ConfigError for vLLM in this process, and beside a `sampler`."""
    given = {name: values[name] for name in SAMPLER_NAMES if values.get(name) is not None}
    use = given.get("use_vllm", False)
    if not isinstance(use, bool):
        raise ConfigError(f"use_vllm must be true or false, not {shown(use)}")
    if not use:
        alone = [name for name, value in given.items() if value not in (GRPO[name].default, "")]
        if alone:
            raise ConfigError(f"{', '.join(alone)} {'is' if len(alone) == 1 else 'are'} set, and use_vllm is not")
        return
    mode = given.get("vllm_mode", GRPO["vllm_mode"].default)
    if mode == "colocate":
        raise ConfigError(
            "use_vllm with vllm_mode=colocate is not honoured by fastpo: start `vllm serve MODEL` and set "
            "vllm_mode=server, or sampler={engine: openai, base_url: http://localhost:8000/v1}"
        )
    if mode != "server":
        raise ConfigError(f"vllm_mode must be server, not {shown(mode)}")
    if out.get("sampler") is not None:
        raise ConfigError("use_vllm and sampler are both set; give one")
    host, port = given.get("vllm_server_host", "0.0.0.0"), given.get("vllm_server_port", 8000)
    host = "localhost" if host == "0.0.0.0" else host  # an address to listen at, not one to call
    url = str(given.get("vllm_server_base_url", f"http://{host}:{port}")).rstrip("/")
    out["sampler"] = {"engine": "openai", "base_url": url if url.endswith("/v1") else f"{url}/v1"}
