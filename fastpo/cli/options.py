"""The options of `fastpo train` and `fastpo plan`: added to a parser, and read back as the arguments of `fastpo.train`.

The command line wins over the YAML file, the file over the defaults. TRL's options of scripts (`--use_peft`,
`--load_in_4bit` and the like) become the arguments that they stand for.
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from fastpo.cli.parser import UsageError
from fastpo.config import TrainConfig, field_names, options, read_yaml
from fastpo.errors import ConfigError, FastpoError, shown

# What a run needs beside TrainConfig: argument of `fastpo.train` -> (its other name, help). YAML takes both names too.
INPUTS = {
    "model": ("model_name_or_path", "model to train: a folder, or a name on the Hugging Face hub"),
    "train_dataset": ("dataset_name", "rows to train on: a .jsonl, .jsonl.gz, .json or .parquet file, or a hub name"),
    "eval_dataset": (None, 'rows to evaluate on; as above, or several sets as JSON: \'{"a": PATH, "b": PATH}\''),
    "ref_model": ("ref_model_name_or_path", "reference model (default: the model as it is before training)"),
    "prev_model": (None, "previous policy of inpo and dno_reg (default: the model as it is before training)"),
    "reward_funcs": (
        "reward_model_name_or_path",
        "what judges the responses of an online loss, such as grpo: FILE.py:NAME, "
        "MODULE:NAME, a reward model's folder or hub name, a scorer as JSON, or a YAML file of scorers by name; "
        "several are summed",
    ),
    "peft_config": (None, "train an adapter: arguments of peft.LoraConfig, such as '{\"r\": 16}'"),
    "quantization_config": (None, "load quantised: arguments of transformers' BitsAndBytesConfig"),
}
JSON_INPUTS = ("peft_config", "quantization_config")
# Names that `trl grpo` knows: what they are here.
_TRL_REWARDS = {name: f"write trl.rewards:{name}" for name in
                ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")}  # fmt: skip
_TRL_REWARDS["get_soft_overlong_punishment"] = "set overlong_buffer"
ALIASES = {alias: name for name, (alias, _) in INPUTS.items() if alias}


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """The plain types of an annotation: `float | None` gives (float, NoneType)."""
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    args = typing.get_args(annotation) if union else (annotation,)
    return tuple(typing.get_origin(a) or a for a in args)


def _parse_value(text: str, kinds: tuple[Any, ...]) -> Any:
    """An option's text to a value; numbers stay text, which TrainConfig converts and checks."""
    if type(None) in kinds and text.strip().lower() in ("none", "null"):
        return None
    if bool in kinds:
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        if str not in kinds:
            words |= {"1": True, "0": False}
        if text.lower() in words:
            return words[text.lower()]
        if str not in kinds:
            raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    if dict in kinds and (str not in kinds or text.lstrip().startswith("{")):
        return _parse_json_object(text)
    if list in kinds:
        if text.lstrip().startswith("["):
            import yaml

            try:
                return yaml.safe_load(text)
            except yaml.YAMLError:
                raise argparse.ArgumentTypeError(f"{text!r} is not a list") from None
        parts = [part.strip() for part in text.split(",")]
        return parts if len(parts) > 1 or str not in kinds else text
    return text


def _parse_json_object(text: str) -> dict[str, Any]:
    """JSON, or a mapping as YAML has it: `{cpo_alpha: 0.5}`, as help and messages write them."""
    import yaml

    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = None
        # {a 1} is {"a 1": None} to YAML.
        if not isinstance(value, dict) or None in value.values():
            raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object such as '{{\"key\": 1}}', not {text!r}")
    return value


def _default_text(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(field.default_factory())
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return str(field.default)


def _metavar(kinds: tuple[Any, ...], choices: Sequence[str] | None) -> str:
    if choices and len(choices) <= 4:
        return "{" + ",".join(choices) + "}"
    for kind, name in ((dict, "JSON"), (list, "LIST"), (float, "FLOAT"), (int, "INT")):
        if kind in kinds:
            return name
    return "NAME" if choices else "TEXT"


def add_train_options(parser: argparse.ArgumentParser) -> None:
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument("--config", metavar="YAML", help="file of options; those given on the command line win")
    for name, (alias, text) in INPUTS.items():
        names = ["--" + n.replace("_", "-") for n in (name, alias) if n]
        if name == "reward_funcs":  # each time further ones
            inputs.add_argument(
                *names, dest=name, nargs="+", action="extend", metavar="NAME", default=argparse.SUPPRESS, help=text
            )
            continue
        is_json = name in JSON_INPUTS
        kind = _parse_json_object if is_json else str
        metavar = "JSON" if is_json else "PATH"
        inputs.add_argument(*names, dest=name, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)
    inputs.add_argument("--print-config", action="store_true", help="print the configuration as YAML and stop")

    hints = typing.get_type_hints(TrainConfig)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        kinds = kinds_of(hints[field.name])
        choices = field.metadata.get("choices")
        text = field.metadata["help"]
        if choices and len(choices) > 4:
            text += ": " + ", ".join(choices)
        text = f"{text} [{_default_text(field)}]".replace("%", "%%")
        flag = "--" + field.name.replace("_", "-")
        common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        parse = _typed(kinds)
        if bool in kinds:
            group.add_argument(flag, nargs="?", const=True, type=parse, metavar="BOOL", help=text, **common)
            no_flag = "--no-" + field.name.replace("_", "-")
            group.add_argument(no_flag, action="store_const", const=False, help=argparse.SUPPRESS, **common)
        elif list in kinds:  # separated by commas, or by spaces as TRL has it
            group.add_argument(flag, nargs="+", action=_Joined, type=parse, metavar="LIST", help=text, **common)
        else:
            group.add_argument(flag, type=parse, metavar=_metavar(kinds, choices), help=text, **common)


class _Joined(argparse.Action):
    """`--loss-type dpo sft` as `--loss-type dpo,sft`; one value stays as it was parsed."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(values) > 1:
            values = [part for value in values for part in (value if isinstance(value, list) else [value])]
        else:
            values = values[0]
        setattr(namespace, self.dest, values)


def _typed(kinds: tuple[Any, ...]) -> Any:
    def parse(text: str) -> Any:
        return _parse_value(text, kinds)

    return parse


def _other_options(extras: Sequence[str]) -> dict[str, Any]:
    """Options that are no field of TrainConfig, as name -> value: TrainConfig says for each what is the matter."""
    found: dict[str, list[str]] = {}
    name = None
    for token in extras:
        if token.startswith("--"):
            name, equals, value = token[2:].replace("-", "_").partition("=")
            if equals:
                value = token.partition("=")[2]
            found[name] = [value] if equals else []
            name = None if equals else name
        elif name is not None:
            found[name].append(token)
        else:
            hint = f"did you mean --config {token}?" if token.endswith((".yaml", ".yml")) else "see fastpo train --help"
            raise UsageError(f"unexpected argument {token!r} ({hint})")
    settings: dict[str, Any] = {}
    for name, values in found.items():
        positive = name.removeprefix("no_")
        if not values and positive != name and options.lookup(positive) is not None:
            settings[positive] = False
        elif len(values) > 1 and name not in LIST_OPTIONS:
            raise UsageError(f"unexpected argument {values[1]!r} (see fastpo train --help)")
        else:
            parsed = [_scalar(value) for value in values]
            settings[name] = parsed if len(parsed) > 1 else parsed[0] if parsed else True
    return settings


def _scalar(text: str) -> Any:
    """An option's text as YAML reads it: a number, true, false, none or the text itself."""
    import yaml

    if text.lower() == "none":
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    try:
        return float(value) if isinstance(value, str) else value  # 5e-6, a text to YAML
    except ValueError:
        return value


def _check_names(given: dict[str, Any], source: str) -> None:
    """Refuses a misspelt input, which TrainConfig does not know of; TrainConfig refuses the rest."""
    settings = [*field_names(), *options.all_names()]
    inputs = [*INPUTS, *ALIASES]
    for name in given:
        if name not in settings and name not in inputs and "." not in name:
            near = difflib.get_close_matches(str(name), [*settings, *inputs], n=1, cutoff=0.5)
            if near and near[0] in inputs:
                raise ConfigError(f"unknown option {name!r} {source}; did you mean {near[0]!r}?")


def _merge_train_options(namespace: argparse.Namespace, extras: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """The inputs of `fastpo.train` and its TrainConfig: command line over YAML over defaults."""
    apart = ("command", "config", "print_config", "memory", "json")
    given = {k: v for k, v in vars(namespace).items() if k not in apart}
    others = _other_options(extras)
    _check_names(others, "on the command line")
    given.update(others)
    from_file = read_yaml(namespace.config) if namespace.config else {}
    _check_names(from_file, f"in {namespace.config}")
    _set_environment(from_file.pop("env", None) or {}, namespace.config)
    for alias, name in ALIASES.items():
        if alias in from_file:
            if name in from_file:
                raise ConfigError(f"{namespace.config} sets both {name!r} and {alias!r}")
            from_file[name] = from_file.pop(alias)
    merged = {**from_file, **given}
    inputs = {name: merged.pop(name) for name in INPUTS if name in merged}
    _script_options(merged, inputs)
    for name in JSON_INPUTS:
        if inputs.get(name) is not None and not isinstance(inputs[name], dict):
            raise ConfigError(f"{name} must be a mapping, not {shown(inputs[name])}")
    sets = inputs.get("eval_dataset")
    if isinstance(sets, str) and sets.lstrip().startswith("{"):
        try:
            inputs["eval_dataset"] = sets = json.loads(sets)
        except json.JSONDecodeError as error:
            raise ConfigError(f"eval_dataset is not JSON: {error}") from None
    inputs["train_dataset"] = _mixture(merged.pop("datasets", None), inputs.get("train_dataset"))
    if inputs.get("reward_funcs") is not None:
        inputs["reward_funcs"] = _reward_funcs(inputs["reward_funcs"])
    for name in set(inputs) - set(JSON_INPUTS) - {"train_dataset", "reward_funcs"}:
        if name == "eval_dataset" and isinstance(sets, dict) and all(isinstance(v, str) for v in sets.values()):
            continue
        if inputs[name] is not None and not isinstance(inputs[name], str):
            raise ConfigError(f"{name} must be a path or a name, not {shown(inputs[name])}")
    args = TrainConfig.build(merged)
    data = inputs.get("train_dataset")
    by_name = isinstance(data, str) and not os.path.isfile(data)
    if args.eval_strategy != "no" and not inputs.get("eval_dataset") and by_name:
        inputs["eval_dataset"] = data  # its dataset_test_split, as `trl dpo`
    return inputs, args


def _reward_funcs(given: Any) -> list[Any] | dict[str, Any]:
    """Reward functions as `fastpo.train` takes them: names and paths, and mappings, which may stand as JSON; or all of
    them by names, as a mapping or a YAML file of one."""
    given = [given] if isinstance(given, str | dict) else given
    by_name = _named_rewards(given)
    if by_name is not None:
        return by_name
    if not isinstance(given, list) or not given:
        raise ConfigError(f"reward_funcs must be a name, a mapping or a list of them, not {shown(given)}")
    out = []
    for entry in given:
        if isinstance(entry, str) and entry.lstrip().startswith("{"):
            try:
                entry = _parse_json_object(entry)
            except argparse.ArgumentTypeError as error:
                raise ConfigError(f"reward_funcs: {error}") from None
        if not isinstance(entry, str | dict) or not entry:
            raise ConfigError(f"reward_funcs must hold names and mappings, not {shown(entry)}")
        if isinstance(entry, str) and entry in _TRL_REWARDS and not os.path.exists(entry):
            raise ConfigError(f"reward_funcs: {entry} is a name of `trl grpo`: {_TRL_REWARDS[entry]}")
        out.append(entry)
    return out


def _named_rewards(given: Any) -> dict[str, Any] | None:
    """Scorers by name, where that is what is given, else None. ConfigError beside others, and where there are none."""
    for entry in given if isinstance(given, list) else ():
        found, where = entry, "reward_funcs"
        if isinstance(entry, str) and entry.endswith((".yaml", ".yml")):
            found, where = read_yaml(entry), f"reward_funcs: {entry}"
        elif isinstance(entry, str) and entry.lstrip().startswith("{"):
            try:
                found = _parse_json_object(entry)
            except argparse.ArgumentTypeError:
                continue
        if not isinstance(found, dict) or "kind" in found:
            continue
        if len(given) > 1:
            raise ConfigError(f"{where} names its scorers: give it alone, with all of them in it")
        wrong = next((name for name, one in found.items() if not isinstance(one, str | dict) or not one), None)
        if wrong is not None or not found:
            said = f"{wrong}: {shown(found[wrong], 60)}" if found else "nothing"
            raise ConfigError(f"{where} must hold a scorer's section, or its name or path, by a name, not {said}")
        return {str(name): section for name, section in found.items()}
    return None


def _set_environment(variables: Any, source: str) -> None:
    """`env` of a YAML file, as in TRL's."""
    if not isinstance(variables, dict):
        raise ConfigError(f"env in {source} must be a mapping of variables, not {shown(variables)}")
    for name, value in variables.items():
        try:
            os.environ[str(name)] = str(value)
        except (ValueError, UnicodeError) as error:
            raise ConfigError(f"env in {source}: {shown(name)} cannot be set: {error}") from None


def _mixture(datasets: Any, given: Any) -> Any:
    """The training data: a path or name, or several with their weights (TRL's `datasets`, or train_dataset itself)."""
    if datasets is not None and given is not None:
        raise ConfigError("train_dataset (dataset_name) and datasets are both given: give one")
    given = datasets if datasets is not None else given
    if isinstance(given, str) and given.lstrip().startswith(("[", "{")):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ConfigError(f"train_dataset is not JSON: {error}") from None
    if given is None or isinstance(given, str):
        return given
    from fastpo.data import mixing

    if mixing.parts_of(given) is None:
        raise ConfigError(
            f"train_dataset must be a path or a name, or several with weights, as [{{path: a.jsonl, weight: 0.7}}, "
            f"{{path: b.jsonl, weight: 0.3}}], not {given!r}"
        )
    return given


# TRL's ModelConfig: option -> argument of peft.LoraConfig and of BitsAndBytesConfig.
LORA = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
        "lora_target_modules": "target_modules", "lora_target_parameters": "target_parameters",
        "lora_modules_to_save": "modules_to_save", "lora_task_type": "task_type", "use_rslora": "use_rslora",
        "use_dora": "use_dora"}  # fmt: skip
FOUR_BIT = {"bnb_4bit_quant_type": "bnb_4bit_quant_type", "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
            "bnb_4bit_quant_storage": "bnb_4bit_quant_storage"}  # fmt: skip
LIST_OPTIONS = ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save")


def _script_options(merged: dict[str, Any], inputs: dict[str, Any]) -> None:
    """TRL's options for adapters, quantisation and loading, taken out of `merged`, as arguments of fastpo.train."""
    loading = {"model_revision": "revision", "attn_implementation": "attn_implementation"}
    kwargs = {key: merged.pop(name) for name, key in loading.items() if merged.get(name) is not None}
    if kwargs:
        merged["model_init_kwargs"] = {**kwargs, **_mapping(merged, "model_init_kwargs")}

    lora = {key: merged.pop(name) for name, key in LORA.items() if name in merged}
    use_peft = merged.pop("use_peft", None)
    if use_peft and inputs.get("peft_config") is not None:
        raise ConfigError("use_peft and peft_config are both set; give one")
    if lora and not use_peft and use_peft is not False:
        name = next(name for name, key in LORA.items() if key in lora)
        raise ConfigError(f"{name} needs use_peft")
    if use_peft:
        lora = {key: value for key, value in lora.items() if value is not None}
        for key in ("target_modules", "target_parameters", "modules_to_save"):
            if isinstance(lora.get(key), str) and re.fullmatch(
                r"[\w.,\s]+", lora[key]
            ):  # else all-linear, or a pattern
                lora[key] = [part.strip() for part in lora[key].split(",")]
        inputs["peft_config"] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, **lora}

    four, eight = merged.pop("load_in_4bit", None), merged.pop("load_in_8bit", None)
    bnb = {key: merged.pop(name) for name, key in FOUR_BIT.items() if name in merged}
    if (four or eight) and inputs.get("quantization_config") is not None:
        raise ConfigError("load_in_4bit or load_in_8bit and quantization_config are both set; give one")
    if four and eight:
        raise ConfigError("load_in_4bit and load_in_8bit are both set; give one")
    if four:
        dtype = str(merged.get("dtype") or merged.get("torch_dtype") or "auto").removeprefix("torch.")
        bnb = {"bnb_4bit_quant_type": "nf4", **{key: value for key, value in bnb.items() if value is not None}}
        # As in TRL the base computes in the model's dtype; where that is left to the checkpoint, as QLoRA does.
        compute = "bfloat16" if dtype == "auto" else dtype
        inputs["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": compute, **bnb}
    elif bnb and four is None:
        raise ConfigError(f"{next(name for name, key in FOUR_BIT.items() if key in bnb)} needs load_in_4bit")
    if eight:
        inputs["quantization_config"] = {"load_in_8bit": True}


def _mapping(merged: dict[str, Any], name: str) -> dict[str, Any]:
    value = merged.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a mapping, not {shown(value)}")
    return value


def run_arguments(
    namespace: argparse.Namespace, extras: Sequence[str], needed: Sequence[str]
) -> tuple[dict[str, Any], Any] | None:
    """What `fastpo.train` is given beside its TrainConfig, and that; None after `--print-config`. ConfigError where one
    of `needed` is not there. `extras` are the options that the parser does not know."""
    try:
        inputs, args = _merge_train_options(namespace, extras)
    except FastpoError as error:
        error.in_options = True  # type: ignore[attr-defined]
        raise
    if namespace.print_config:
        import yaml

        print(yaml.safe_dump({**inputs, **args.to_dict()}, sort_keys=False), end="")
        return None
    for name in needed:
        if not inputs.get(name):
            raise ConfigError(f"no {name} given: --{name.replace('_', '-')} PATH, or {name}: PATH in the YAML file")
    from fastpo.training import inputs as arguments

    if inputs.get("peft_config") is not None:
        inputs["peft_config"] = arguments.peft_config(inputs["peft_config"], scalar_head=args.scalar_head)
    if inputs.get("quantization_config") is not None:
        inputs["quantization_config"] = arguments.quantization_config(inputs["quantization_config"])
    return inputs, args
