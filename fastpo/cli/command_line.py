"""The command line: `fastpo train`, `plan`, `losses`, `quickstart`, `check`, `games`, `env`.

Exit codes: 0 done, 1 a run or a check failed, 2 a user's mistake (one line on stderr; FASTPO_TRACEBACK=1 shows where),
130 on Ctrl-C. PyTorch is imported only by the command that runs, so that --help is quick.
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
import shutil
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from fastpo import __version__
from fastpo.config import options
from fastpo.config import train_config as config
from fastpo.errors import ConfigError, FastpoError, TrainingError, shown

# What a run needs beside TrainConfig: argument of `fastpo.train` -> (its other name, help). YAML takes both names too.
INPUTS = {
    "model": ("model_name_or_path", "model to train: a folder, or a name on the Hugging Face hub"),
    "train_dataset": ("dataset_name", "rows to train on: a .jsonl, .jsonl.gz, .json or .parquet file, or a hub name"),
    "eval_dataset": (None, 'rows to evaluate on; as above, or several sets as JSON: \'{"a": PATH, "b": PATH}\''),
    "ref_model": ("ref_model_name_or_path", "reference model (default: the model as it is before training)"),
    "prev_model": (None, "previous policy of inpo and dno_reg (default: the model as it is before training)"),
    "peft_config": (None, "train an adapter: arguments of peft.LoraConfig, such as '{\"r\": 16}'"),
    "quantization_config": (None, "load quantised: arguments of transformers' BitsAndBytesConfig"),
}
JSON_INPUTS = ("peft_config", "quantization_config")
ALIASES = {alias: name for name, (alias, _) in INPUTS.items() if alias}

COMMANDS = ("train", "plan", "losses", "quickstart", "check", "games", "env")

# Packages of fastpo's extras, for the message when one is missing.
EXTRAS = {"datasets": "data", "pyarrow": "data", "peft": "peft", "bitsandbytes": "quant", "pytest": "test"}


class UsageError(FastpoError):
    """A command line that cannot be read."""


class _Parser(argparse.ArgumentParser):
    """Options in kebab or snake case, no abbreviations; an unknown one is answered with the nearest."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _help_formatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        found = re.match(r"argument COMMAND: invalid choice: '(.*)' \(choose", message, re.DOTALL)
        if found:
            near = difflib.get_close_matches(found[1], COMMANDS, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
            raise UsageError(f"unknown command '{found[1]}'; {hint} (see {self.prog} --help)")
        raise UsageError(f"{message} (see {self.prog} --help)")


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size((120, 24)).columns, 140)
    return argparse.HelpFormatter(prog, max_help_position=44, width=width)


def _kebab(argv: Sequence[str]) -> list[str]:
    """Option names to kebab case: --learning_rate=1e-5 becomes --learning-rate=1e-5."""
    out = []
    for token in argv:
        if re.match(r"--[A-Za-z]", token):
            name, equals, value = token.partition("=")
            token = name.replace("_", "-") + equals + value
        out.append(token)
    return out


def _kinds(annotation: Any) -> tuple[Any, ...]:
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
    if dict in kinds:
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


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument("--config", metavar="YAML", help="file of options; those given on the command line win")
    for name, (alias, text) in INPUTS.items():
        names = ["--" + n.replace("_", "-") for n in (name, alias) if n]
        is_json = name in JSON_INPUTS
        kind = _parse_json_object if is_json else str
        metavar = "JSON" if is_json else "PATH"
        inputs.add_argument(*names, dest=name, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)
    inputs.add_argument("--print-config", action="store_true", help="print the configuration as YAML and stop")

    hints = typing.get_type_hints(config.TrainConfig)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(config.TrainConfig):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        kinds = _kinds(hints[field.name])
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
    settings = [*config.field_names(), *options.all_names()]
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
    from_file = config.read_yaml(namespace.config) if namespace.config else {}
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
    for name in set(inputs) - set(JSON_INPUTS) - {"train_dataset"}:
        if name == "eval_dataset" and isinstance(sets, dict) and all(isinstance(v, str) for v in sets.values()):
            continue
        if inputs[name] is not None and not isinstance(inputs[name], str):
            raise ConfigError(f"{name} must be a path or a name, not {shown(inputs[name])}")
    args = config.TrainConfig.build(merged)
    data = inputs.get("train_dataset")
    by_name = isinstance(data, str) and not os.path.isfile(data)
    if args.eval_strategy != "no" and not inputs.get("eval_dataset") and by_name:
        inputs["eval_dataset"] = data  # its dataset_test_split, as `trl dpo`
    return inputs, args


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
        if lora.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
            raise ConfigError(f"lora_task_type must be CAUSAL_LM, not {lora['task_type']!r}")
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


def _train(namespace: argparse.Namespace, extras: Sequence[str]) -> int:
    """`train`, and `plan`, which takes the same options."""
    plans = namespace.command == "plan"
    try:
        inputs, args = _merge_train_options(namespace, extras)
    except FastpoError as error:
        error.in_options = True  # type: ignore[attr-defined]
        raise
    if namespace.print_config:
        import yaml

        print(yaml.safe_dump({**inputs, **args.to_dict()}, sort_keys=False), end="")
        return 0
    for name in ("model",) if plans else ("model", "train_dataset"):
        if not inputs.get(name):
            raise ConfigError(f"no {name} given: --{name.replace('_', '-')} PATH, or {name}: PATH in the YAML file")
    from fastpo.training import inputs as arguments

    for name in JSON_INPUTS:
        if inputs.get(name) is not None:
            inputs[name] = getattr(arguments, name)(inputs[name])
    if plans:
        from fastpo.plan import estimate as plan

        return plan.run(inputs, args, namespace.memory, namespace.json)
    from fastpo.trainer import train

    train(args=args, **inputs)
    return 0


def _env(namespace: argparse.Namespace) -> int:
    from fastpo import env

    report = env.collect()
    print(json.dumps(report, indent=2) if namespace.json else env.format_text(report))
    return 0


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; options of `quickstart`, `check` and `games`, which their own modules define, only for that one."""
    parser = _Parser(prog="fastpo", description="Preference optimisation at the speed of the matrix multiply.")
    parser.add_argument("--version", action="version", version=f"fastpo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    train = commands.add_parser(
        "train",
        help="train a model on preference data",
        description="Train a model on preference data. Every option is a key of the YAML file too, spelt with "
        "underscores. Defaults are in brackets; lists are separated by commas, mappings are JSON; --OPTION and "
        "--no-OPTION turn a BOOL on and off. Options of `trl dpo`, such as --use-peft --lora-r 16 or --load-in-4bit, "
        "work too.",
        usage="fastpo train [--config run.yaml] [--model PATH] [--train-dataset PATH] [--OPTION VALUE ...]",
    )
    _add_train_options(train)
    plan = commands.add_parser(
        "plan",
        help="what a run takes in memory, and the largest max_tokens that fits",
        description="Estimate the memory of `fastpo train` with the same options, from the model's configuration "
        "alone. With --train-dataset its lengths are used too.",
        usage="fastpo plan --model PATH [--memory 80GiB] [--train-dataset PATH] [--OPTION VALUE ...]",
    )
    if command == "plan":
        plan.add_argument("--memory", metavar="SIZE", help="memory to fit into, such as 80GiB (default: the device's)")
        plan.add_argument("--json", action="store_true", help="the numbers as JSON, in bytes")
        _add_train_options(plan)
    quickstart = commands.add_parser(
        "quickstart", help="train a small model on a task with a checkable answer, and show that it got better"
    )
    if command == "quickstart":
        from fastpo import quickstart as quickstart_module

        quickstart_module.add_arguments(quickstart)
    check = commands.add_parser("check", help="kernels and backends of this machine against the fp64 reference")
    if command == "check":
        from fastpo import check as check_module

        check_module.add_arguments(check)
    losses = commands.add_parser("losses", help="the table of losses, or all there is to say of one")
    losses.add_argument("name", nargs="?", metavar="NAME", help="a loss_type")
    games = commands.add_parser("games", help="self-play algorithms on games whose equilibrium is known")
    if command == "games":
        from fastpo.games import cli as games_cli

        games_cli.add_arguments(games)
    env = commands.add_parser("env", help="versions, devices and backends, for a bug report")
    env.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _dispatch(argv: Sequence[str]) -> int:
    argv = _kebab(argv)
    command = next((token for token in argv if not token.startswith("-")), None)
    parser = build_parser(command)
    if not argv:
        parser.print_help()
        return 0
    namespace, extras = parser.parse_known_args(argv)
    if namespace.command in ("train", "plan"):
        return _train(namespace, extras)
    if extras:
        raise UsageError(f"unrecognised argument {extras[0]!r} (see fastpo {namespace.command or ''} --help)")
    if namespace.command is None:
        raise UsageError(f"no command given: {', '.join(COMMANDS)} (see fastpo --help)")
    if namespace.command == "env":
        return _env(namespace)
    if namespace.command == "losses":
        from fastpo.losses.docs import text

        print(text(namespace.name))
        return 0
    if namespace.command == "quickstart":
        from fastpo.quickstart import run

        return run(namespace)
    if namespace.command == "games":
        from fastpo.games.cli import run as run_games

        return run_games(namespace)
    from fastpo.check import run_check

    return run_check(namespace)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _print_error(error: BaseException, message: str) -> None:
    """The one line. Under torchrun it says the rank, and what every rank finds alike is said once a node."""
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        print(f"fastpo: error: {message}", file=sys.stderr)
        return
    in_options = isinstance(error, UsageError) or getattr(error, "in_options", False)
    relayed = getattr(error, "relayed", False)  # from rank 0, which says it
    if not (in_options and local_rank != "0") and not (relayed and rank != "0"):
        print(f"fastpo: error on rank {rank}: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:  # argparse after --help and --version
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("fastpo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("FASTPO_TRACEBACK", "0") not in ("", "0"):
            raise
        if isinstance(error, FastpoError):
            message, code = _one_line(error), 1 if isinstance(error, TrainingError) else 2
        elif isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            message, code = f"{error.name} is not installed: pip install 'fastpo[{EXTRAS[error.name]}]'", 2
        elif type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "DefaultCPUAllocator" in str(error):
            # A micro-batch that does not fit is split; this is the model, a reference or the optimiser's state.
            message = f"out of memory; fastpo plan shows what a run takes ({_one_line(error)})"
            code = 1
        elif "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error):
            message, code = "another process of this run has died; its own message says why", 1
        else:
            raise
        _print_error(error, message)
        return code
