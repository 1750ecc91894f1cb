"""Options of online losses: TRL's names and defaults, what they mean together, and every mistake a one-line error."""

import dataclasses
import json
import warnings

import pytest

from fastpo.config import migration, online, online_options, options
from fastpo.config.option import HONOURED, NO_EFFECT, REFUSED, RENAMED
from fastpo.config.train_config import TrainConfig, field_names
from fastpo.config.trl_configs import CLASSES
from fastpo.errors import ConfigError
from fastpo.losses.online import ONLINE

TABLES = {name: CLASSES[name][1] for name in ("GRPOConfig", "RLOOConfig", "GMPOConfig", "OnlineDPOConfig")}
OF_LOSS = {"GRPOConfig": "grpo", "RLOOConfig": "rloo", "GMPOConfig": "gmpo", "OnlineDPOConfig": "online_dpo"}
BEYOND = [(name, option) for name, table in TABLES.items() for option in table]


@pytest.fixture(scope="module")
def snapshot(repo_root):
    return json.loads((repo_root / "tests" / "data" / "online_config_fields.json").read_text())


def classes():
    trl = pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gmpo import GMPOConfig
        from trl.experimental.online_dpo import OnlineDPOConfig
    return {c.__name__: c for c in (trl.GRPOConfig, trl.RLOOConfig, GMPOConfig, OnlineDPOConfig)}


def made(name, **given):
    return classes()[name](output_dir="out", use_cpu=True, report_to="none", bf16=False, **given)


def built(name, **given):
    return TrainConfig.build(made(name, **given))


# ---- every field of TRL's


def test_the_losses_are_those_of_the_table():
    assert set(online.ONLINE) == set(ONLINE)
    assert {name for name, way in ONLINE.items() if way.by == "wins"} == set(online.PREFERENCES)
    assert {name for name, way in ONLINE.items() if "mixture" in way.draws} == set(online.MIXTURES)


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_are_the_snapshot(snapshot, name):
    """A field that is DPOConfig's too may stand in the table where something else is to be said of it."""
    theirs = {field: of["default"] for field, of in snapshot["beyond DPOConfig"][name].items()}
    ours = {field: option.default for field, option in TABLES[name].items()}
    assert {field: ours[field] for field in theirs if field in ours} == theirs
    assert {field: ours[field] for field in set(ours) - set(theirs)} == {
        field: options.OPTIONS[field].default for field in set(ours) - set(theirs)
    }


def test_the_snapshot_is_trls_own(snapshot):
    trl = pytest.importorskip("trl")
    import transformers

    found = {"trl": trl.__version__, "transformers": transformers.__version__}
    if found != snapshot["versions"]:
        pytest.skip(f"the snapshot is of {snapshot['versions']}, installed are {found}")

    def fields(made):
        return {
            f.name: {
                "default": f.default if f.default is not dataclasses.MISSING else f.default_factory(),
                "type": f.type.__name__ if isinstance(f.type, type) else str(f.type),
            }
            for f in dataclasses.fields(made)
        }

    shared = fields(trl.DPOConfig)
    for name, made in classes().items():
        assert {n: f for n, f in fields(made).items() if shared.get(n) != f} == snapshot["beyond DPOConfig"][name]


@pytest.mark.parametrize("name, field", BEYOND)
def test_statuses(name, field):
    option = TABLES[name][field]
    known = field_names()
    assert option.status in (HONOURED, RENAMED, REFUSED, NO_EFFECT)
    assert (field in known) == (option.status == HONOURED)
    assert (option.to in known) == (option.status == RENAMED)
    assert option.note or option.status in (HONOURED, RENAMED)
    assert f"| `{field}` |" in migration.page()


@pytest.mark.parametrize("name, field", BEYOND)
def test_trls_default_is_accepted_by_name(name, field):
    default = TABLES[name][field].default
    if name == "OnlineDPOConfig" and field in ("beta", "loss_type"):
        return  # a list of one, and DPO's own name: of the class alone
    needs = {"max_new_tokens": 64} if field == "max_length" else {}
    TrainConfig.build({"loss_type": OF_LOSS[name], **needs, field: default})


# Values unlike the default that TRL takes; and what an option must go with.
VALUES = {
    "disable_dropout": True, "num_generations": 4, "num_generations_eval": 3, "generation_batch_size": 16,
    "steps_per_generation": 2, "top_k": 5, "min_p": 0.1, "generation_kwargs": {"suppress_tokens": [1]},
    "chat_template_kwargs": {"a": 1}, "delta": 4.0, "epsilon_high": 0.28, "importance_sampling_level": "sequence",
    "reward_weights": [0.5], "multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "batch",
    "loss_type": "bnpo", "num_completions_to_print": 3, "off_policy_mask_threshold": 0.5, "missing_eos_penalty": 1.0,
    "vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.5, "beta": 0.3,
    "vllm_importance_sampling_cap": 2.0, "top_p": 0.9, "top_entropy_quantile": 0.2, "sapo_temperature_neg": 2.0,
    "max_completion_length": 32,
}  # fmt: skip
SWITCHES = {"shuffle_dataset": ("sequential", False), "normalize_advantages": ("batch", True)}


def other(option, field):
    if field in VALUES:
        return VALUES[field]
    default = option.default
    return (not default) if isinstance(default, bool) else type(default)(default * 2 if default else 1)


@pytest.mark.parametrize(
    "name, field",
    [(n, f) for n, f in BEYOND if TABLES[n][f].status in (HONOURED, RENAMED) and TABLES[n][f].to != "sampler"],
)
def test_what_is_honoured_arrives_by_name(name, field):
    option = TABLES[name][field]
    if name == "OnlineDPOConfig" and field == "loss_type":
        return  # of the class alone
    arrived, value = SWITCHES.get(field, (other(option, field),) * 2)
    base = TrainConfig.build(loss_type=OF_LOSS[name])
    needs = {"sample_generations": 2, "eval_strategy": "epoch"} if field == "generation_kwargs" else {}
    config = TrainConfig.build({"loss_type": OF_LOSS[name], **needs, field: value})
    to = option.to or field
    assert getattr(config, to) == arrived
    different = {f for f in field_names() if getattr(config, f) != getattr(base, f)} - set(needs)
    assert different <= {to} and (different or arrived == getattr(base, to))


@pytest.mark.parametrize("name, field", [(n, f) for n, f in BEYOND if TABLES[n][f].status == REFUSED])
def test_what_is_refused_raises(name, field):
    value = 3 if not isinstance(TABLES[name][field].default, bool) else True
    with pytest.raises(ConfigError, match=f"{field}=.* is not honoured by fastpo") as caught:
        TrainConfig.build({"loss_type": OF_LOSS[name], field: value})
    assert TABLES[name][field].note in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, field", [(n, f) for n, f in BEYOND if TABLES[n][f].status == NO_EFFECT])
def test_what_is_without_meaning_changes_nothing(name, field):
    default = TABLES[name][field].default
    value = not default if isinstance(default, bool) else "anything"
    base = TrainConfig.build(loss_type=OF_LOSS[name])
    assert TrainConfig.build({"loss_type": OF_LOSS[name], field: value}) == base


# ---- TRL's objects


@pytest.mark.parametrize("name", TABLES)
def test_an_object_with_its_defaults(name):
    config = built(name)
    assert config.losses == ["dapo" if name == "GRPOConfig" else OF_LOSS[name]]
    for field, option in TABLES[name].items():
        if option.status == HONOURED and field not in (*online.HYPER, "loss_type", "beta", "steps_per_generation"):
            assert getattr(config, field) == option.default, field
    theirs = made(name)
    assert config.beta == theirs.beta and config.save_strategy == "steps"
    asked = online.rollouts(config)
    assert asked.num_generations == getattr(theirs, "num_generations", 2)
    assert asked.temperature == theirs.temperature and asked.steps_per_generation == 1
    assert config.max_length == getattr(theirs, "max_length", None)
    assert config.max_completion_length == getattr(
        theirs, "max_completion_length", getattr(theirs, "max_new_tokens", 0)
    )
    assert not getattr(config, "without_meaning", [])
    # What a loss reads is its own default, but where that is not TRL's.
    given = {field: getattr(config, field) for field in online.HYPER if getattr(config, field) is not None}
    assert given == ({"epsilon_high": 0.2} if name == "GRPOConfig" else {})


def test_what_an_object_says():
    config = built(
        "GRPOConfig", loss_type="cispo", epsilon=0.3, beta=0.04, scale_rewards=False, num_generations=4,
        gradient_accumulation_steps=2, steps_per_generation=8, shuffle_dataset=False, sapo_temperature_pos=2.0,
        vllm_importance_sampling_clip_max=None, vllm_importance_sampling_clip_min=0.1, reward_weights=[1.0, 2.0],
    )  # fmt: skip
    assert (config.loss_type, config.epsilon, config.epsilon_high, config.beta) == ("cispo", 0.3, 0.3, 0.04)
    assert (config.scale_rewards, config.train_sampling_strategy) == ("none", "sequential")
    assert (config.importance_sampling_clip_max, config.importance_sampling_clip_min) == (None, 0.1)
    assert config.sapo_temperature_pos == 2.0 and config.reward_weights == [1.0, 2.0]
    asked = online.rollouts(config)
    assert (asked.steps_per_generation, asked.prompts_per_step, asked.responses) == (4, 4, 64)
    assert built("GRPOConfig", scale_rewards=True).scale_rewards == "group"
    assert built("GRPOConfig", loss_type="luspo").importance_sampling_level == "token"  # TRL's, not the loss's own
    assert built("RLOOConfig", normalize_advantages=True).scale_rewards == "batch"
    assert built("RLOOConfig").scale_rewards is None and online.rollouts(built("RLOOConfig")).scale_rewards == "none"
    assert built("GMPOConfig").losses == ["gmpo"] and built("GMPOConfig", epsilon=0.2).epsilon == 0.2
    config = built("OnlineDPOConfig", loss_type="ipo", beta=[0.3], max_new_tokens=32)
    assert (config.loss_type, config.beta, config.max_completion_length) == ("online_ipo", 0.3, 32)
    assert online.rollouts(config).max_prompt_length == 480 and config.learning_rate == 5e-7
    changed = TrainConfig.build(made("GRPOConfig", gradient_accumulation_steps=4), gradient_accumulation_steps=1)
    assert online.rollouts(changed).steps_per_generation == 1  # one, as it was, not four


def test_objects_of_earlier_versions():
    online_dpo = classes()["OnlineDPOConfig"]

    @dataclasses.dataclass
    class NashMDConfig(online_dpo):
        mixture_coef: list[float] = dataclasses.field(default_factory=lambda: [0.5])

    @dataclasses.dataclass
    class XPOConfig(online_dpo):
        alpha: list[float] = dataclasses.field(default_factory=lambda: [1e-5])

    base = dict(output_dir="out", use_cpu=True, report_to="none", bf16=False)
    config = TrainConfig.build(NashMDConfig(**base, mixture_coef=[0.25]))
    assert (config.loss_type, config.mixture_coef, config.beta) == ("nash_md", 0.25, 0.1)
    config = TrainConfig.build(XPOConfig(**base))
    assert (config.loss_type, config.loss_kwargs) == ("xpo", {"alpha": 1e-5})
    with pytest.raises(ConfigError, match=r"mixture_coef=\[0.25, 0.5\], one for each epoch, is not honoured"):
        TrainConfig.build(NashMDConfig(**base, mixture_coef=[0.25, 0.5]))
    with pytest.raises(ConfigError, match="XPOConfig: loss_type='ipo' is not built"):
        TrainConfig.build(XPOConfig(**base, loss_type="ipo"))


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("GRPOConfig", {"use_vllm": True}, "vllm_mode=colocate is not honoured by fastpo: start `vllm serve MODEL`"),
        ("GRPOConfig", {"cast_lm_head_to_fp32": True}, "load the model with dtype=float32"),
        ("GRPOConfig", {"loss_type": "gspo"}, "GRPOConfig: loss_type must be one of grpo, dr_grpo, .* not 'gspo'"),
        ("GRPOConfig", {"max_completion_length": None}, "max_completion_length must not be None"),
        ("RLOOConfig", {"reward_clip_range": (-1.0, 1.0)}, "clip in the reward function"),
        ("OnlineDPOConfig", {"reward_model_path": "rm"}, "pass it in reward_funcs"),
        ("OnlineDPOConfig", {"beta": [0.1, 0.2]}, "one for each epoch, is not honoured"),
        ("OnlineDPOConfig", {"loss_type": "hinge"}, "OnlineDPOConfig: loss_type must be one of sigmoid, ipo"),
    ],
)
def test_what_an_object_says_that_is_not_built(name, given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        built(name, **given)
    assert "\n" not in str(caught.value)


# ---- the sampler


@pytest.mark.parametrize(
    "given, url",
    [
        ({}, "http://localhost:8000/v1"),
        ({"vllm_server_host": "gpu1", "vllm_server_port": 9000}, "http://gpu1:9000/v1"),
        ({"vllm_server_base_url": "https://there/", "vllm_server_host": "gpu1"}, "https://there/v1"),
        ({"vllm_server_base_url": "http://there/v1"}, "http://there/v1"),
    ],
)
def test_vllm_servers(given, url):
    config = TrainConfig.build(loss_type="grpo", use_vllm=True, vllm_mode="server", **given)
    assert config.sampler == {"engine": "openai", "base_url": url}
    assert built("GRPOConfig", use_vllm=True, vllm_mode="server", **given).sampler == config.sampler


def test_the_servers_key_is_nowhere():
    secret = {"engine": "openai", "base_url": "http://x/v1", "api_key": "sk-secret", "headers": {"a": "sk-secret"}}
    for name, loss in (("sampler", "grpo"), ("judge", "online_dpo")):
        config = TrainConfig.build({"loss_type": loss, name: secret})
        assert getattr(config, name) == secret
        assert "sk-secret" not in repr(config) + json.dumps(config.to_dict())
        assert config.to_dict()[name]["base_url"] == "http://x/v1"


# ---- what options mean together


def test_defaults_by_loss():
    def of(name, **given):
        return TrainConfig.build(loss_type=name, **given)

    def found(field, *names):
        return [getattr(online.rollouts(of(name)), field) for name in names]

    assert found("num_generations", "grpo", "rloo", "nash_md", "online_dpo") == [8, 2, 2, 2]
    assert found("num_generations_eval", "grpo", "rloo") == [8, 2]
    assert found("temperature", "grpo", "rloo", "xpo") == [1.0, 1.0, 0.9]
    assert found("scale_rewards", "grpo", "dapo", "rloo", "dr_grpo") == ["group", "group", "none", "none"]
    assert found("importance_sampling_mode", "grpo", "vespo") == ["sequence_mask", "token_truncate"]
    assert found("mixture_coef", "nash_md", "ipo_md", "spo") == [0.5, 0.5, 0.0]
    assert found("of_tokens", "gspo", "spo") == [True, False]
    assert online.rollouts(of("dr_grpo", scale_rewards=True)).scale_rewards == "group"
    for value in (False, "false", "False", "none"):
        assert online.rollouts(of("grpo", scale_rewards=value)).scale_rewards == "none"
    asked = online.rollouts(of("grpo", sampler={"engine": "openai", "base_url": "http://x/v1"}))
    assert (asked.engine, asked.sampler) == ("openai", {"base_url": "http://x/v1"})
    with pytest.raises(ConfigError, match="loss_type=dpo draws no responses"):
        online.rollouts(of("dpo"))
    assert of("grpo").is_online and not of("dpo").is_online and of(["grpo"]).is_online
    assert of("grpo").max_length is None and of("dpo").max_length == 1024
    assert of("grpo", beta=0).beta == 0 and of("nash_md", beta=0).beta == 0


@pytest.mark.parametrize(
    "given, processes, steps, prompts",
    [
        ({}, 1, 1, 1),
        ({"gradient_accumulation_steps": 4}, 2, 1, 8),
        ({"steps_per_generation": 6, "gradient_accumulation_steps": 2}, 1, 3, 2),
        ({"steps_per_generation": 1, "gradient_accumulation_steps": 4}, 1, 1, 4),  # TRL draws four times, at one policy
        ({"generation_batch_size": 64}, 2, 4, 2),
        ({"generation_batch_size": 64, "gradient_accumulation_steps": 2}, 1, 4, 2),
        ({"loss_type": "online_dpo"}, 2, 1, 16),
        ({"loss_type": "online_dpo", "num_generations": 3, "generation_batch_size": 16}, 1, 2, 8),
    ],
)
def test_sizes_of_a_generation(given, processes, steps, prompts):
    config = TrainConfig.build({"loss_type": "grpo", **given})
    asked = online.rollouts(config, processes)
    assert (asked.steps_per_generation, asked.prompts_per_step) == (steps, prompts)
    assert asked.prompts == steps * prompts and asked.responses == asked.prompts * asked.num_generations


@pytest.mark.parametrize(
    "given, processes, message",
    [
        ({"per_device_train_batch_size": 12}, 1, "is 12 responses, no multiple of num_generations=8: the nearest are 8 "
                                                 "and 16"),
        ({"per_device_train_batch_size": 2}, 3, "is 6 responses, .* the nearest is 8"),
        ({"generation_batch_size": 60}, 2, "generation_batch_size=60 must be a multiple of .*, 16: the nearest are 48 "
                                           "and 64"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, 1, "steps_per_generation=3 micro-batches must "
                                                                           "be a multiple of .*=2: the nearest are 2 "),
        ({"steps_per_generation": 1, "gradient_accumulation_steps": 4, "num_iterations": 2}, 1, "the nearest is 4"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(given, processes, message):
    config = TrainConfig.build({"loss_type": "grpo", **given})
    with pytest.raises(ConfigError, match=message) as caught:
        online.rollouts(config, processes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss_type": "dpo", "num_generations": 4}, "num_generations=4 belongs to online .* and dpo is trained"),
        ({"loss_type": ["dpo", "sft"], "temperature": 0.7}, r"temperature=0.7 belongs .* and dpo\+sft is trained"),
        ({"max_completion_length": 5}, "max_completion_length=5 belongs .*: max_length counts prompt plus response"),
        ({"loss_type": "slic", "delta": 1.0}, r"delta=1.0 .* slic's own is loss_kwargs=\{delta: ...\}"),
        ({"top_k": 1, "top_p": 0.5, "min_p": 0.1, "delta": 2.0}, "min_p=0.1 and 1 more belongs"),
        ({"loss_type": ["grpo", "sft"]}, "grpo is trained on responses of its own: give loss_type=grpo alone"),
        ({"loss_type": "grpo", "num_generations": 1}, "num_generations must be 2 or more, not 1"),
        ({"loss_type": "grpo", "generation_batch_size": 8, "steps_per_generation": 1}, "are both set; give one"),
        ({"loss_type": "grpo", "max_length": 512}, "max_completion_length=512 leaves no room for a prompt"),
        ({"loss_type": "grpo", "overlong_buffer": 513}, "overlong_buffer=513 must be at most .*=512"),
        ({"loss_type": "grpo", "fsdp": "full_shard"}, "fsdp=full_shard splits the model that the in-process sampler"),
        ({"loss_type": "xpo", "sampler": {"engine": "openai"}}, "xpo draws from the reference too"),
        ({"loss_type": "grpo", "sampler": {"engine": 3}}, "sampler: engine must be a name, not 3"),
        ({"loss_type": "grpo", "generation_kwargs": {"top_k": 5}}, r"are of sample_generations; what grpo draws takes"),
        ({"loss_type": "grpo", "precompute_ref_log_probs": True}, "grpo has no responses before the run"),
        ({"loss_type": "grpo", "judge": "mine"}, "judge compares two responses, and grpo reads a number of each"),
        ({"loss_type": "grpo", "mixture_coef": 0.1}, "mixture_coef is set, but grpo .*: nash_md and ipo_md do"),
        ({"loss_type": "grpo", "entropy_coef": 0.1, "grad_filter": 0.001}, "grad_filter leaves .* or entropy_coef out"),
        ({"loss_type": "grpo", "use_adaptive_entropy": True, "entropy_coef_min": 0.1}, "entropy_coef=0 must be from"),
        ({"loss_type": "vespo", "importance_sampling_mode": "sequence_mask"}, "vespo weighs whole responses itself"),
        ({"loss_type": "grpo", "importance_sampling_clip_min": 3}, "importance_sampling_clip_min=3 must be below"),
        ({"loss_type": "grpo", "importance_sampling_mode": "token_truncate", "importance_sampling_clip_max": None},
         "importance_sampling_mode=token_truncate needs importance_sampling_clip_max"),
        ({"loss_type": "online_dpo", "scale_rewards": "batch"}, "scale_rewards is set, but online_dpo does not"),
        ({"loss_type": "spo", "dynamic_sampling": 2}, "dynamic_sampling is set, but spo does not read it"),
        ({"loss_type": "xpo", "entropy_coef": 0.1}, "entropy_coef is set, but xpo does not read it"),
        ({"loss_type": "online_dpo", "beta": 0}, "beta must be positive, not 0"),
        ({"loss_type": "grpo", "beta": -1}, "beta must be positive, not -1"),
        ({"loss_type": "grpo", "scale_rewards": "std"}, "scale_rewards must be one of group, batch, none, not 'std'"),
        ({"loss_type": "grpo", "use_vllm": True, "vllm_mode": "there"}, "vllm_mode must be server, not 'there'"),
        ({"loss_type": "grpo", "use_vllm": True, "vllm_mode": "server", "sampler": {}}, "are both set; give one"),
        ({"loss_type": "grpo", "vllm_server_port": 80}, "vllm_server_port is set, and use_vllm is not"),
        ({"loss_type": "grpo", "use_vllm": "yes"}, "use_vllm must be true or false, not 'yes'"),
        ({"loss_type": "grpo", "shuffle_dataset": "no"}, "shuffle_dataset must be true or false, not 'no'"),
        ({"loss_type": "grpo", "shuffle_dataset": True, "train_sampling_strategy": "sequential"}, "is set twice"),
        ({"loss_type": "grpo", "reward_funcs": len}, "reward_funcs=.* an argument of fastpo.train and Trainer"),
        ({"loss_type": "grpo", "num_generation": 4}, "unknown option 'num_generation'; did you mean 'num_generations'"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_does_not_go_together(given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig.build(given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_what_has_no_effect_is_said():
    from fastpo.config.no_effect import Facts, without_effect

    def said(**given):
        return without_effect(TrainConfig.build(loss_type="grpo", **given), Facts(steps=1000))

    assert said(entropy_target=0.5) == ["entropy_target (use_adaptive_entropy is off)"]
    assert said(entropy_target=0.5, use_adaptive_entropy=True) == []
    assert said(importance_sampling_correction=False, importance_sampling_clip_max=2.0) == [
        "importance_sampling_clip_max (importance_sampling_correction is off)"
    ]
    assert said(overlong_penalty=2.0) == ["overlong_penalty (overlong_buffer is not set)"]
    assert said(log_unique_prompts=True) == ["log_unique_prompts (log_completions is off)"]
    assert said(num_generations_eval=2) == ["num_generations_eval (eval_strategy=no)"]
    assert said(vllm_group_port=3) == ["vllm_group_port (docs/migrating-from-trl.md says why)"]


def test_the_names_of_earlier_trainers():
    for table in (online_options.NASH_MD, online_options.XPO):
        for name in table:
            assert f"| `{name}` |" in migration.page()
