"""`fastpo plan`: what a run takes, what it would choose, and the largest `max_tokens` that fits; a table or JSON."""

import json
from dataclasses import dataclass
from typing import Any

import torch

from fastpo.config.train_config import TrainConfig
from fastpo.data import Example, layouts, mixing, prepare_examples, rows, sources
from fastpo.data.kway import Forming
from fastpo.data.packing import set_sharing, sharing_mode, trunk_tokens
from fastpo.errors import ConfigError
from fastpo.losses import LOSSES
from fastpo.models import rotary, sharing
from fastpo.models.loading import load_tokenizer, resolve_device
from fastpo.plan.estimate import HEADROOM, MOST_TOKENS, STEP_TOKENS, Estimate, at_most, device_memory, gib, parse_bytes
from fastpo.plan.settle import DECIDED, Case, Open, assumed_tokens, decide, options_of, with_options
from fastpo.plan.weightless import Blueprint
from fastpo.training import run_data
from fastpo.training.memory import MAX_TOKENS
from fastpo.training.optim import NARROW


def run(inputs: dict[str, Any], config: TrainConfig, memory: str | None, as_json: bool) -> int:
    """`fastpo plan`: prints the table. `inputs` and `config` as `fastpo.train` takes them."""
    given = parse_bytes(memory) if memory is not None else None
    # With a size the device need not be here: one that is named is planned for as it is.
    named = given is not None and config.device is not None and not config.use_cpu
    device = None if named else resolve_device(config.device, use_cpu=config.use_cpu)
    device_type = device.type if device is not None else _type_of(config.device)
    blueprint = Blueprint.of_name(inputs["model"], config, inputs.get("peft_config"), inputs.get("quantization_config"))
    examples = _examples(inputs, config) if inputs.get("train_dataset") else []
    share, longest, step = 1.0, 0, MOST_TOKENS
    autocast = config.bf16 if config.bf16 is not None else device_type == "cuda"
    if examples:
        with blueprint.mode:
            cost = sharing.trunk_cost(
                blueprint.policy, config, device_type, device, bf16=autocast, room=assumed_tokens(config, device_type)
            )
        set_sharing(examples, sharing_mode(config.share_prompts, cost), cost)
        rotary.unshare(blueprint.policy.trunk, examples)
        sizes = sorted(map(trunk_tokens, examples), reverse=True)
        longest, step = sizes[0], sum(sizes[: config.step_size])
        share = min(1.0, sum(len(r) for e in examples for r in e.responses) / sum(sizes))
    ref_name = inputs.get("ref_model")
    ref_model = Blueprint.of_name(ref_name, config, argument="ref_model").weights if ref_name else 0
    terms = [LOSSES.get(name) for name in config.losses]
    live = any(t is not None and "chosen_kl" in t.needs for t in terms)
    available = given if given is not None or device is None else device_memory(device)
    if available is None:
        raise ConfigError("the memory of this device is unknown: say --memory SIZE")
    case = Case(
        blueprint, config, device_type, available, longest, step,
        dict(row_share=share, autocast=autocast, ref_model=ref_model, live=live),
        process=lambda found: found.process if given is None else 0,  # a size that is given is the run's
    )  # fmt: skip
    planned = _planned(case)
    found = planned.found
    if as_json:
        numbers = _numbers(planned, available, longest)
        print(json.dumps(numbers | {"device": device_type, "max_tokens_from": _origin(config)}))
    else:
        print(_table(planned, case, bool(examples)))
    found.check_fixed(available, "the memory given" if given is not None else "this device has")
    return 0


@dataclass
class _Planned:
    """A run's options as training would settle them, and what it takes then."""

    config: TrainConfig
    wanted: Open  # what was left open
    layers: int  # that can be checkpointed, where their number was open
    masters: int  # bytes of fp32 copies, had or not
    found: Estimate
    tokens: int
    largest: int


def _planned(case: Case) -> _Planned:
    """As `Case.choices`, but what does not fit is no error here: the table says so."""
    config, tokens = case.config, assumed_tokens(case.config, case.device_type)
    trained = (p for p in case.blueprint.policy.model.parameters() if p.requires_grad)
    wanted = Open.of(config, case.device_type, any(p.dtype in NARROW for p in trained))
    layers, masters, settled = 0, 0, at_most(config)
    if wanted.by_device:
        demand = case.demand(config, tokens)
        choice = decide(demand, wanted, case.room, config.logits_memory_budget)
        settled = with_options(settled, **options_of(choice, demand))
        layers, masters = demand.layers, demand.every.masters
    found = case.estimate(with_options(settled, logits_memory_budget=config.logits_memory_budget))
    masters = masters or found.masters
    largest = found.largest(case.room)
    if wanted.max_tokens:
        tokens = max(STEP_TOKENS, min(largest, case.step))  # as in training: no more than the largest step has
        if wanted.head:
            of_head, demand = case.head_budget(settled, tokens)
            settled = with_options(settled, **options_of(of_head, demand))
    if settled.logits_memory_budget is not None:
        found.logits_budget = settled.logits_memory_budget
    return _Planned(settled, wanted, layers, masters, found, tokens, largest)


def _type_of(device: str | None) -> str:
    """`cuda` or `cpu`, of a device that need not be here."""
    try:
        kind = torch.device(device or "cpu").type
    except RuntimeError:
        kind = ""
    if kind not in MAX_TOKENS:
        raise ConfigError(f"device {device!r} is not supported; use cuda or cpu")
    return kind


def _origin(config: TrainConfig) -> str:
    return "default" if config.max_tokens is None else "auto" if config.max_tokens == "auto" else "option"


def _assumed(config: TrainConfig, device_type: str) -> str:
    """Where the number of tokens comes from, and whose it would be on another device."""
    if _origin(config) == "option":
        return ""
    if _origin(config) == "auto":
        return ", as max_tokens=auto takes"
    names = {"cpu": "a CPU", "cuda": "a GPU"}
    other = next(kind for kind in names if kind != device_type)
    return f", the default on {names[device_type]} (on {names[other]} {MAX_TOKENS[other]:,}: --device {other})"


def _examples(inputs: dict[str, Any], config: TrainConfig) -> list[Example]:
    tokenizer = load_tokenizer(inputs["model"], trust_remote_code=config.trust_remote_code)
    given = inputs["train_dataset"]
    examples: list[Example] = []
    for part in mixing.parts_of(given) or [mixing.Part("", given)]:
        table = run_data.open_table(part, config.dataset_train_split, config.dataset_config)
        names, head = set(sources.column_names(table)), sources.head_rows(table)
        kinds = ("unpaired", "preference") if names & {"label", "kto_tag"} else ("preference", "sft")
        layout = layouts.find(names, head, kinds)
        own = "preference" if names & {"chosen", rows.RESPONSES} else "unpaired" if rows.LABEL in names else "sft"
        examples += prepare_examples(
            table, tokenizer, kind=own if layout is None else layout.kind, max_length=config.max_length, columns=[],
            truncation_mode=config.truncation_mode, invalid="drop", num_proc=config.dataset_num_proc,
            forming=Forming(config.pair_policy, config.pair_margin), recognise=config.recognise_layouts,
        )[0]  # fmt: skip
    return examples


def _numbers(planned: _Planned, memory: int, longest: int) -> dict[str, Any]:
    found, tokens = planned.found, planned.tokens
    regime = found.regime(tokens)
    return {
        "parameters": found.parameters, "trainable_parameters": found.trainable, "weights": found.weights,
        "gradients": found.gradients, "master_copies": found.masters, "optimizer_state": found.optimizer,
        "reference": found.reference, "process": found.process, "activations_per_token": found.saved_per_token,
        "head": {r: found.head_bytes(tokens, r) for r in found.trunk}, "head_regime": regime, "max_tokens": tokens,
        "step_peak": found.step(tokens), "total": found.total(tokens), "memory": memory,
        "largest_max_tokens": planned.largest, "longest_row": longest,
        **{name: getattr(planned.config, name) for name in DECIDED},
    }  # fmt: skip


def _table(planned: _Planned, case: Case, from_data: bool) -> str:
    """The estimate for people."""
    blueprint, config, memory, longest = case.blueprint, case.config, case.memory, case.longest
    found, tokens, largest = planned.found, planned.tokens, planned.largest
    policy, numbers = blueprint.policy, _numbers(planned, memory, longest)
    regime = found.regime(tokens)
    trained = "all" if found.trainable == found.parameters else f"{found.trainable:,}"
    quantised = f", base in {blueprint.quantized}" if blueprint.quantized else ""
    checkpointing = "off"
    if config.gradient_checkpointing:
        count = planned.config.gradient_checkpointing_layers
        checkpointing = "every layer" if count is None else f"the first {count} layers"
        if planned.wanted.layers and count is not None:
            which = f"the first {count}" if count else "none"
            checkpointing = f"{which} of {planned.layers} layers, as few as the memory demands"
    masters = planned.config.master_weights
    if planned.wanted.master_weights:
        masters += (
            f" (auto: fp32 copies take {gib(planned.masters)}, {'which fit' if masters == 'fp32' else 'too much'})"
        )
    reference = "stays in memory" if found.reference else "computed before training"
    if found.reference_pass:
        reference += f", when ref_model takes {gib(found.reference_pass)}"
    share = "of the data" if from_data else "taken as 1 without --train-dataset: an upper bound"
    lines = [
        f"{type(policy.causal_lm).__name__}: {found.parameters:,} parameters ({trained} trained), "
        f"{str(policy.dtype).removeprefix('torch.')}{quantised}; gradient checkpointing: {checkpointing}",
        "",
        _line("weights", found.weights),
        _line("gradients", found.gradients, "fp32" if found.gradients else ""),
        _line("fp32 master copies", found.masters, masters),
        _line("optimiser state", found.optimizer, config.optim),
        _line("reference", found.reference, reference),
    ]
    if found.process:
        lines.append(_line("process", found.process, "Python and its libraries"))
    lines += [
        _line("activations", numbers["activations_per_token"] * tokens,
              f"{gib(numbers['activations_per_token'])} a token x {tokens:,} tokens, kept for the backward pass"),
        *(_line(f"head, {r}", nbytes, f"{'in use' if r == regime else 'not in use'}; "
                f"N {found.rows(tokens):,.0f} x V {found.vocabulary:,}") for r, nbytes in numbers["head"].items()),
        _line("peak of a step", found.step(tokens), "activations, head, gradients on their way: the worst moment"),
        _line("total", found.total(tokens), f"at max_tokens={tokens:,}{_assumed(config, found.device_type)}"),
        "",
        f"memory {gib(memory)}, of which {HEADROOM:.0%} are left free: "
        + (f"the largest max_tokens is {largest:,}" if largest else f"not even {STEP_TOKENS} tokens fit"),
        f"head rows: {found.row_share:.2f} of the tokens ({share})",
    ]  # fmt: skip
    if planned.wanted.head and found.head_trained and found.total(tokens) <= case.room:
        lines.append(f"the head may keep {gib(found.logits_budget)} of what the run leaves over")
    if longest:
        fits = "fits" if found.total(longest) <= memory * (1 - HEADROOM) else "does not fit"
        lines.append(f"longest row: {longest:,} tokens, {gib(found.total(longest))} alone: {fits}")
    return "\n".join(lines)


def _line(name: str, nbytes: float, note: str = "") -> str:
    return f"{name:<22}{gib(nbytes):>12}  {note}".rstrip()
