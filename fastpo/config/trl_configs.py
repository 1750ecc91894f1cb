"""TRL's arguments objects to fastpo's options: DPO-, KTO-, CPO-, ORPO- and RewardConfig, GRPO-, RLOO-, GMPO- and
OnlineDPOConfig (with the Nash-MD and XPO of earlier versions), plain TrainingArguments.

Each trainer of TRL has a class of its own whose defaults mean its loss; here the loss is an option. The tables say what
becomes of the fields that a class has beyond DPOConfig's, which are in fastpo/config/options.py.
"""

# ruff: noqa: E501  # one option a line: it reads as the table it is

import enum
from collections.abc import Callable, Collection, Mapping
from typing import Any

from fastpo.config import online, online_options, options
from fastpo.config.option import Option, differ
from fastpo.config.option import no as _no
from fastpo.config.option import nothing as _any
from fastpo.config.option import same as _same
from fastpo.errors import ConfigError, shown

_ONE_LENGTH = "TRL removed it too: max_length counts prompt plus response"
_KWARGS = "in loss_kwargs here"
_ENCODER_DECODER = {
    "max_completion_length": _no(_ONE_LENGTH),
    "generate_during_eval": _no("set sample_generations to the number of prompts to answer", False),
    "is_encoder_decoder": _no("causal language models only"),
}
# By class: its loss, and the fields beyond DPOConfig's.
CLASSES: dict[str, tuple[str, dict[str, Option]]] = {
    "DPOConfig": ("sigmoid", {}),
    "KTOConfig": ("kto", {
        "loss_type": _same("kto", "kto, apo_zero_unpaired"),
        "train_sampling_strategy": _same("sequential", "the rows in their order, as in TRL; random is honoured too"),
        "desirable_weight": _same(1.0, _KWARGS),
        "undesirable_weight": _same(1.0, _KWARGS),
    }),
    "CPOConfig": ("sigmoid", {
        "loss_type": _same("sigmoid", "sigmoid is cpo, hinge cpo_hinge, ipo cpo_ipo; simpo is cpo_simpo, or simpo with cpo_alpha=0; alphapo is alphapo"),
        "label_smoothing": _same(0.0, "with sigmoid and simpo; with hinge and ipo, where TRL warns and ignores it, it is refused"),
        "cpo_alpha": _same(1.0, f"{_KWARGS}; with alpha the weight of an sft term"),
        "simpo_gamma": _same(0.5, "gamma_beta_ratio = simpo_gamma / beta; TRL reads it with simpo alone"),
        "alpha": _same(0.0, "with simpo, which is then alphapo; with another loss_type, where TRL bends sums of log-probabilities, it is refused"),
        **_ENCODER_DECODER,
    }),
    "ORPOConfig": ("orpo", {
        "beta": _same(0.1, "the odds ratio's weight"),
        "padding_value": _any("nothing is padded"),
        **_ENCODER_DECODER,
    }),
    "RewardConfig": ("reward", {
        "learning_rate": _same(1e-4),
        "max_length": _same(1024, "rows over it are left out and counted; of rows of K responses, those responses"),
        "center_rewards_coefficient": _same(None, _KWARGS),
        "chat_template_path": _no("set the tokenizer's chat_template, and pass it as processing_class"),
        "eos_token": _no("set the tokenizer's eos_token, and pass it as processing_class"),
    }),
    "GRPOConfig": ("dapo", online_options.GRPO),
    "RLOOConfig": ("rloo", online_options.RLOO),
    "GMPOConfig": ("gmpo", online_options.GMPO),
    "OnlineDPOConfig": ("online_dpo", online_options.ONLINE_DPO),
}  # fmt: skip
_EARLIER = ("NashMDConfig", "XPOConfig")  # kinds of OnlineDPOConfig that TRL 1.16 has no more
_CPO_LOSSES = {"sigmoid": "cpo", "hinge": "cpo_hinge", "ipo": "cpo_ipo", "simpo": "cpo_simpo"}


def class_of(args: Any) -> str | None:
    """Which of CLASSES an arguments object is of, itself or by inheritance, or TrainingArguments; None for another kind
    of object. ConfigError for another trainer's arguments, which mean another loss."""
    names = [c.__name__ for c in type(args).__mro__]
    if "TrainingArguments" not in names:
        return None
    found = next((name for name in names if name in CLASSES or name in _EARLIER), None)
    if found is None and names[0] != "TrainingArguments":
        raise ConfigError(
            f"args is a {names[0]}, whose defaults mean another loss; pass a {', a '.join(CLASSES)}, a dict or a "
            "TrainConfig"
        )
    return found or names[0]


def values_of(args: Any, known: Collection[str]) -> dict[str, Any]:
    """The options that an arguments object sets: what its user gave, and the defaults of the fields that fastpo has too
    (`known`), so that they keep TRL's meaning. use_liger_kernel's False, which is its default, is left out: fused
    layers change no meaning.

    Fields that transformers fills in by itself (logging_dir, bf16 on this machine, ...) are compared with an untouched
    object of the same class.
    """
    kind = class_of(args)
    try:
        untouched = type(args)(output_dir=args.output_dir, use_cpu=True, bf16=False)
    except TypeError as error:  # a subclass with arguments of its own
        raise ConfigError(
            f"args is a {type(args).__name__} that cannot be compared with its defaults: {error}"
        ) from None
    fields = {name: getattr(args, name) for name, f in type(args).__dataclass_fields__.items() if f.init}
    changed = {k: v for k, v in fields.items() if options.differ(v, getattr(untouched, k))}
    for name in known:
        if name in fields and name not in ("bf16", "use_liger_kernel"):
            changed.setdefault(name, fields[name])
    changed["bf16"] = bool(fields.get("bf16"))
    if "loss_type" in fields:
        changed["loss_type"] = fields["loss_type"]
    changed = {name: value.value if isinstance(value, enum.Enum) else value for name, value in changed.items()}
    if kind in _OWN:
        return changed | _OWN[kind](changed, fields)
    names = [changed["loss_type"]] if isinstance(changed.get("loss_type"), str) else changed.get("loss_type", [])
    trl_beta = set(names) <= set(options.TRL_LOSSES) and set(names) != {"sft"}
    if changed.get("beta") == getattr(untouched, "beta", None) and not trl_beta:
        changed["beta"] = None  # TRL's default was not meant for a loss that TRL does not have, and sft reads none
    return changed


def _kto(changed: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    weights = {name: fields[name] for name in ("desirable_weight", "undesirable_weight")}
    _take(changed, weights)
    return {"loss_kwargs": weights}


def _cpo(changed: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    _one_length(changed)
    loss, alpha, nll = fields["loss_type"], fields["alpha"], fields["cpo_alpha"]
    _take(changed, ("cpo_alpha", "simpo_gamma", "alpha"))
    if loss not in _CPO_LOSSES:
        raise ConfigError(f"CPOConfig: loss_type must be one of {', '.join(_CPO_LOSSES)}, not {loss!r}")
    if alpha and loss != "simpo":
        raise ConfigError(
            f"CPOConfig: alpha={alpha} with loss_type={loss!r} is not honoured by fastpo: set loss_type='alphapo'"
        )
    ratio = {"gamma_beta_ratio": fields["simpo_gamma"] / changed["beta"]} if loss == "simpo" and changed["beta"] else {}
    if alpha:
        out: dict[str, Any] = {"loss_type": "alphapo", "loss_kwargs": {"alpha": alpha}}
        return {**out, **ratio, **({"loss_type": ["alphapo", "sft"], "loss_weights": [1.0, nll]} if nll else {})}
    if loss == "simpo" and not nll:
        return {"loss_type": "simpo", **ratio}
    return {"loss_type": _CPO_LOSSES[loss], "loss_kwargs": {"cpo_alpha": nll}, **ratio}


def _orpo(changed: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    _one_length(changed)
    return {"loss_type": "orpo"}


def _one_length(changed: dict[str, Any]) -> None:
    """CPO's and ORPO's max_completion_length is not that of an online run."""
    value = changed.pop("max_completion_length", None)
    if value is not None:
        raise ConfigError(f"max_completion_length={shown(value)} is not honoured by fastpo: {_ONE_LENGTH}")


def _reward(changed: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    coefficient = fields["center_rewards_coefficient"]
    _take(changed, ("center_rewards_coefficient",))
    kwargs = {} if coefficient is None else {"loss_kwargs": {"center_rewards_coefficient": coefficient}}
    return {"loss_type": "reward", **kwargs}


def _grpo(changed: dict[str, Any], fields: dict[str, Any], loss: str | None = None) -> dict[str, Any]:
    loss = fields["loss_type"] if loss is None else loss
    if loss not in (*online_options.LOSSES, "gmpo"):
        raise ConfigError(
            f"GRPOConfig: loss_type must be one of {', '.join(online_options.LOSSES)}, not {shown(loss)}; for a loss of "
            "fastpo's alone give its options without GRPOConfig"
        )
    _own_defaults(changed, online_options.GMPO if loss == "gmpo" else online_options.GRPO)
    if loss in ("dapo", "cispo") and fields["epsilon_high"] is None:  # to these losses themselves None is their paper's
        changed["epsilon_high"] = fields["epsilon"]
    if loss == "luspo":  # which has another default than TRL's config
        changed["importance_sampling_level"] = fields["importance_sampling_level"]
    return {"loss_type": loss, **_drawn(changed, fields)}


def _gmpo(changed: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return _grpo(changed, fields, "gmpo")


def _rloo(changed: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    _own_defaults(changed, online_options.RLOO)
    return {"loss_type": "rloo", **_drawn(changed, fields)}


def _own_defaults(changed: dict[str, Any], table: Mapping[str, Option]) -> None:
    """Leaves out what a loss itself reads and what stands at TRL's default: a config carries those of every loss."""
    _take(changed, [n for n in online.HYPER if n in changed and not differ(changed[n], table[n].default)])


def _drawn(changed: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """What GRPO and RLOO say of their generations. A config fills in both of the two names of a generation's size."""
    _take(changed, ("generation_batch_size", "shuffle_dataset"))
    micro = fields["steps_per_generation"]
    in_order = not fields["shuffle_dataset"] or changed.get("train_sampling_strategy") == "sequential"
    return {
        "steps_per_generation": None if micro == fields["gradient_accumulation_steps"] else micro,
        "train_sampling_strategy": "sequential" if in_order else "random",
        "max_length": None,  # neither has one
    }


def _online_dpo(changed: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    loss = fields["loss_type"]
    if loss not in online_options.ONLINE_DPO_LOSSES:
        names = ", ".join(online_options.ONLINE_DPO_LOSSES)
        raise ConfigError(f"OnlineDPOConfig: loss_type must be one of {names}, not {shown(loss)}")
    _take(changed, ("max_new_tokens",))
    out = {"loss_type": online_options.ONLINE_DPO_LOSSES[loss], "max_completion_length": fields["max_new_tokens"]}
    return {**out, "beta": _one("beta", fields["beta"])}


def _nash_md(changed: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    share = _one("mixture_coef", fields["mixture_coef"])
    return {**_online_dpo(changed, fields), "loss_type": "nash_md", "mixture_coef": share}


def _xpo(changed: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    if fields["loss_type"] != "sigmoid":
        raise ConfigError(f"XPOConfig: loss_type={shown(fields['loss_type'])} is not built: leave it at sigmoid")
    _take(changed, ("alpha",))
    alpha = _one("alpha", fields["alpha"])
    return {**_online_dpo(changed, fields), "loss_type": "xpo", "loss_kwargs": {"alpha": alpha}}


def _one(name: str, value: Any) -> Any:
    """A number that earlier TRL takes as a list too, one for each epoch."""
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise ConfigError(f"{name}={shown(value)}, one for each epoch, is not honoured by fastpo: give one number")
        return value[0]
    return value


def _take(changed: dict[str, Any], names: Collection[str]) -> None:
    for name in names:
        changed.pop(name, None)


_OWN: dict[str, Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "KTOConfig": _kto, "CPOConfig": _cpo, "ORPOConfig": _orpo,
    "RewardConfig": _reward, "GRPOConfig": _grpo, "RLOOConfig": _rloo, "GMPOConfig": _gmpo,
    "OnlineDPOConfig": _online_dpo, "NashMDConfig": _nash_md, "XPOConfig": _xpo,
}  # fmt: skip
