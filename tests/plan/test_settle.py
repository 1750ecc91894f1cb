"""What the memory decides of a run: the rules by numbers, on fake tensors of real shapes, and in runs on a CPU.

A GPU is only named here: the device's memory is said, and what the rules decide for it is looked at.
"""

import json
import logging
import random

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import fastpo
from fastpo import cli, ops
from fastpo.config.train_config import TrainConfig
from fastpo.data import Example
from fastpo.errors import ConfigError
from fastpo.models.modes import layers_to_checkpoint
from fastpo.plan import estimate as plan
from fastpo.plan import settle as rules
from fastpo.plan.settle import Case, Demand, Open, decide, settle, with_options
from fastpo.plan.weightless import Blueprint
from fastpo.training.distributed import World
from fastpo.training.objective import Objective

GIB, MIB = 1 << 30, 1 << 20
GPU = World(torch.device("cuda"), 0, 1, 0)
CPU = World(torch.device("cpu"), 0, 1, 0)
ALL = Open(master_weights=True, layers=True, head=True)


def moments(per_token: float):
    """A step that takes so many bytes a token."""
    return {"sliced": plan._Moments(np.array([0.0]), np.array([per_token]))}


def estimate_of(per_token: float, masters: float = 0.0, fixed: float = 0.0) -> plan.Estimate:
    """Of a step without a scratch of the head: half of its tokens are head rows, V 1,000, 16 bits."""
    none = {"sliced": plan._Moments(np.array([]), np.array([]))}
    return plan.Estimate(
        parameters=0, trainable=0, weights=0, gradients=0, masters=masters, optimizer=fixed, reference=0,
        reference_pass=0, process=0, row_share=0.5, vocabulary=1000, hidden=0, itemsize=2, device_type="cuda",
        head_trained=True, logits_budget=0, scratch=0, trunk=moments(per_token), head=none,
    )  # fmt: skip


def demand_of(masters: float = 4e9, layers: int = 10, default: int = 1 << 20) -> Demand:
    """Of 10,000 tokens: 1 GB with every layer checkpointed, 11 GB with none; the N x V matrix takes 10 MB."""
    every, none = estimate_of(1e5, masters, fixed=8e9), estimate_of(11e5, masters, fixed=8e9)
    return Demand(every, lambda: none, layers, 10_000, default)


def test_what_is_decided_with_less_and_less_memory():
    """In this order the run gives up: layers that are not checkpointed, the N x V matrix, fp32 copies; at every size
    what was decided fits where anything does, and one layer fewer would not."""
    demand, seen = demand_of(), []
    tile = demand.every.step(10_000) - 1e9  # of logits, in the head op
    for room in np.arange(30e9, 8.5e9, -1e8):
        choice = decide(demand, ALL, room, None)
        fits_stochastic = 9e9 + tile <= room
        assert choice.fits == fits_stochastic
        assert choice.master_weights == ("fp32" if 13e9 + tile <= room else "stochastic")
        fixed = 8e9 + tile + (4e9 if choice.master_weights == "fp32" else 0)
        if choice.fits:
            kept = 1e7 if fixed + 1e9 + 1e7 <= room else 0
            total = fixed + 11e9 - 1e9 * choice.layers + kept
            assert total <= room + 1 and (choice.layers == 0 or total + 1e9 > room)
            assert choice.total == pytest.approx(total) and kept <= choice.budget <= room - total + kept + 1
        else:
            assert choice.layers == 10 and choice.budget == demand.default
        seen.append((choice.master_weights, choice.layers))
    assert seen[0] == ("fp32", 0) and seen[-1] == ("stochastic", 10)
    of_fp32 = [layers for master, layers in seen if master == "fp32"]
    assert of_fp32 == sorted(of_fp32) and set(of_fp32) == set(range(11))  # every number occurs


@pytest.mark.parametrize(
    "room, kept",
    [(14e9 + 11e6, "all of it"), (13e9 + 5e6, "the op's own budget"), (13e9 + 5e5, "none of it")],
)
def test_the_matrix_comes_before_layers(room, kept):
    """10 MB are for the N x V matrix, not for a layer, unless they are not there; then the op's own budget is tried."""
    demand = demand_of()
    room += demand.every.step(10_000) - 1e9
    choice = decide(demand, ALL, room, None)
    assert choice.master_weights == "fp32" and choice.layers == (9 if room > 14e9 else 10)
    sizes = {"all of it": (demand.matrix, 2e7), "the op's own budget": (demand.default, 6e6), "none of it": (0, 1e6)}
    least, most = sizes[kept]
    assert least <= choice.budget <= most


def test_what_is_set_stays():
    """Neither the options that are set, nor what they take, are changed; only what is open is decided."""
    demand = demand_of()
    nothing = decide(demand, Open(), 1e9, None)
    assert (nothing.master_weights, nothing.layers, nothing.budget, nothing.fits) == (None, None, None, False)
    only_head = decide(demand, Open(head=True), 100e9, None)
    assert only_head.master_weights is None and only_head.layers is None and only_head.budget > 80e9
    # A budget that is set counts as far as the matrix goes, and no further.
    tight = 20e9 + 5e6 + demand.every.step(10_000) - 1e9
    few = decide(demand, Open(layers=True), tight, 0)
    more = decide(demand, Open(layers=True), tight, 1 << 40)
    assert few.layers == 3 and more.layers == 4 and more.total - few.total == pytest.approx(1e7 - 1e9)


def test_which_options_are_open():
    def of(device="cuda", narrow=True, **options):
        found = Open.of(TrainConfig(**options), device, narrow)
        return {name for name in ("master_weights", "layers", "head", "max_tokens") if getattr(found, name)}

    assert of() == {"master_weights", "layers", "head"}
    assert of("cpu") == set() and of("cpu", max_tokens="auto") == {"max_tokens"}
    assert of("cpu", gradient_checkpointing_layers="auto") == {"layers"}
    assert of(narrow=False) == {"layers", "head"}
    assert of(master_weights="fp32", gradient_checkpointing_layers="all", logits_memory_budget=0) == set()
    assert of(gradient_checkpointing_layers=3) == {"master_weights", "head"}
    assert of(gradient_checkpointing=False) == of(activation_offloading=True) == {"master_weights", "head"}
    assert of(fsdp="full_shard") == set()


# ---- estimates of models


SIZES = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=5, max_position_embeddings=512)


def families(toy):
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    qwen = dict(SIZES, vocab_size=5000, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    return {
        "llama": toy.model(**SIZES),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**qwen, tie_word_embeddings=True)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=256, n_layer=5, n_head=4, n_positions=512)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "lora"])
def test_the_line_between_no_layer_and_all_is_an_upper_bound(toy, family):
    """Peaks fall with every layer that is checkpointed, none is above the line that `decide` goes by, and the line asks
    for at most one layer more than the peaks do."""
    model = families(toy)["llama" if family == "lora" else family].to(torch.bfloat16)
    if family == "lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    blueprint, layers, tokens = Blueprint.of_model(model), SIZES["num_hidden_layers"], 4096
    assert len(layers_to_checkpoint(blueprint.policy)) == layers
    config = TrainConfig(logits_memory_budget=0)
    steps = [
        plan.estimate(
            blueprint, with_options(config, gradient_checkpointing_layers=n), "cuda", regimes=("sliced",)
        ).step(tokens)
        for n in range(layers + 1)
    ]
    line = [steps[0] + (steps[-1] - steps[0]) * n / layers for n in range(layers + 1)]
    assert all(step <= bound * (1 + 1e-9) for step, bound in zip(steps, line, strict=True)), (steps, line)
    for room in np.linspace(steps[-1], steps[0], 40):
        by_line, by_peak = (next(n for n in range(layers + 1) if of[n] <= room * (1 + 1e-9)) for of in (line, steps))
        assert by_peak <= by_line <= by_peak + 1
    assert sorted(steps, reverse=True) == steps and steps[-1] < 0.75 * steps[0]
    whole = plan.estimate(blueprint, config, "cuda", regimes=("sliced",))
    assert whole.step(tokens) == steps[-1]


def test_an_estimate_does_not_depend_on_where_the_model_is(toy):
    """A model on a GPU is planned on fake tensors of the CPU, as the fake batch is: here one on the meta device."""
    config = TrainConfig()
    here = plan.estimate(Blueprint.of_model(toy.model(**SIZES)), config, "cuda")
    there = plan.estimate(Blueprint.of_model(toy.model(**SIZES).to("meta")), config, "cuda")
    assert there.weights == here.weights and there.total(4096) == here.total(4096)
    with torch.device("meta"):  # tied weights stay tied
        tied = families(toy)["qwen3"]
    planned = plan.estimate(Blueprint.of_model(tied), config, "cuda")
    assert planned.gradients == 4 * planned.parameters


def llama_8b(folder, layers=32):
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.mark.slow
def test_a_full_fine_tune_of_8b_on_a_card_of_139_gib(tmp_path, caplog):
    """By default: fp32 copies would take 30 GiB that are not there, and the log says so; with stochastic rounding the
    run fits with 92% of the memory, the N x V matrix kept and the fewest layers checkpointed."""
    config = TrainConfig()
    blueprint = Blueprint.of_name(llama_8b(tmp_path), config)
    options = dict(row_share=1.0, autocast=True)
    case = Case(blueprint, config, "cuda", 139 * GIB, 2048, plan.MOST_TOKENS, options, process=lambda found: 0)
    demand = case.demand(config, 16_384)
    assert demand.every.fixed == pytest.approx(134.6 * GIB, rel=1e-3) and demand.layers == 32
    caplog.set_level(logging.INFO)
    choice = decide(demand, ALL, case.room, None)
    rules.say_masters(choice, demand, case.memory)
    rules.say(choice, demand, config, case.memory)
    assert choice.master_weights == "stochastic" and choice.fits and 16 <= choice.layers < 32
    assert 0.95 * case.room < choice.total <= case.room
    assert demand.every.rounding == 4 * 128_256 * 4096  # the largest fp32 copy, for the time of its step
    assert choice.budget >= 16_384 * 128_256 * 2 > ops.default_memory_budget(blueprint.policy.head().weight)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("master_weights=auto: stochastic, since fp32 copies of the 16-bit weights would take 29.92")
    assert "master_weights=fp32 or stochastic decides it" in first
    assert second.startswith(f"{choice.layers} of 32 layers are checkpointed, the head may keep ")
    # With two such cards' memory fp32 copies fit, and nothing is checkpointed.
    rich = decide(demand, ALL, 2 * case.room, None)
    assert (rich.master_weights, rich.layers) == ("fp32", 0)
    # On one of 80 GiB nothing does: what would help is said.
    poor = decide(demand, ALL, 80 * GIB, None)
    assert poor.master_weights == "stochastic" and not poor.fits
    caplog.clear()
    rules.say(poor, demand, config, 80 * GIB)
    assert "optim=adamw_8bit, or train an adapter" in caplog.records[0].getMessage()


def test_the_plan_shows_what_is_decided(tmp_path, capsys):
    """`fastpo plan` for a card that is not here, on two layers of 8B's shape; options that are set stay."""
    folder = llama_8b(tmp_path, layers=2)

    def planned(*options):
        assert cli.main(["plan", "--model", folder, "--device", "cuda", *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    rich = planned("--memory", "80GiB")
    assert (rich["master_weights"], rich["gradient_checkpointing_layers"]) == ("fp32", 0)
    assert rich["head_regime"] == "kept" and rich["logits_memory_budget"] > 4 * GIB
    poor = planned("--memory", "30GiB")
    assert poor["master_weights"] == "stochastic" and poor["master_copies"] < MIB
    assert poor["total"] <= 30 * GIB * (1 - plan.HEADROOM)
    fixed = planned("--memory", "32GiB", "--master-weights", "fp32", "--gradient-checkpointing-layers", "1",
                    "--logits-memory-budget", "0")  # fmt: skip
    assert (fixed["master_weights"], fixed["gradient_checkpointing_layers"]) == ("fp32", 1)
    assert fixed["logits_memory_budget"] == 0 and fixed["head_regime"] == "sliced" and fixed["master_copies"] > 5 * GIB
    assert cli.main(["plan", "--model", folder, "--device", "cuda", "--memory", "30GiB"]) == 0
    text = capsys.readouterr().out
    assert "stochastic (auto: fp32 copies take 5.54 GiB, too much)" in text


# ---- a run's options


def examples(n=12, prompt=40, response=20):
    rng = np.random.default_rng(0)
    ids = lambda k: rng.integers(3, 100, k).astype(np.int32)  # noqa: E731
    return [Example(ids(prompt), [ids(response), ids(response)], pairs=[(0, 1)]) for _ in range(n)]


def settled(model, config, monkeypatch, memory, world=GPU, **options):
    monkeypatch.setattr(plan, "device_memory", lambda device: memory)
    objective = Objective.of_options(config)
    return settle(model, config, world, examples(), objective, autocast=False, **options)


def test_a_run_is_settled_by_its_own_rows(toy, monkeypatch):
    """On a named GPU: with memory all is kept; with less the run's largest micro-batch, here the step of 8 rows of 118
    tokens, decides; other numbers than these do not move it."""
    model = toy.model(**SIZES).to(torch.bfloat16)
    rich = settled(model, TrainConfig(loss_type="simpo"), monkeypatch, GIB)
    assert (rich.config.master_weights, rich.config.gradient_checkpointing_layers) == ("fp32", 0)
    assert rich.max_tokens == 16_384 and rich.given == ("gradient_checkpointing_layers", "logits_memory_budget")
    case = Case.of_run(
        model, TrainConfig(loss_type="simpo"), GPU.device, examples(), Objective.of_options(TrainConfig()), False, None
    )
    demand = case.demand(case.config, 16_384)
    assert demand.tokens == 8 * 118
    need = [demand.every.total_with(s) for s in (demand.every.step(944), demand.none().step(944))]
    found = {}
    for memory in np.linspace(0.9 * need[0], 1.1 * need[1], 5):
        of_memory = settled(model, TrainConfig(loss_type="simpo"), monkeypatch, int(memory / (1 - plan.HEADROOM)))
        found[memory] = of_memory.config
    counts = [c.gradient_checkpointing_layers for c in found.values()]
    counts = [5 if count is None else count for count in counts]
    assert counts == sorted(counts, reverse=True) and counts[0] == 5 and counts[-1] == 0 and len(set(counts)) > 2
    assert [c.master_weights for c in found.values()][0] == "stochastic"
    assert found[memory].logits_memory_budget >= ops.default_memory_budget(model.lm_head.weight)
    given = settled(model, TrainConfig(loss_type="simpo", max_tokens=118), monkeypatch, int(need[0]))
    assert (given.max_tokens, given.config.max_tokens) == (118, 118)


@pytest.mark.slow
def test_max_tokens_and_layers_together(toy, monkeypatch):
    """Layers for a micro-batch of the usual size, max_tokens for what is left then, the head's budget for the rest."""
    model, config = toy.model(**SIZES), TrainConfig(loss_type="simpo", max_tokens="auto")
    found = settled(model, config, monkeypatch, GIB)
    assert found.config.gradient_checkpointing_layers == 0 and found.max_tokens == 944  # of the step
    tight = settled(model, config, monkeypatch, 75 * MIB)
    assert tight.config.gradient_checkpointing_layers is None and 64 <= tight.max_tokens < 944
    with pytest.raises(ConfigError, match="more than this cuda has for it"):
        settled(model, config, monkeypatch, 20 * MIB)


def test_on_a_cpu_nothing_is_open(toy, monkeypatch):
    """Nothing is estimated there by default, and what is left open means what it always meant."""
    monkeypatch.setattr(rules.Blueprint, "of_model", lambda model: pytest.fail("estimated"))
    for dtype in (torch.float32, torch.bfloat16):
        found = settled(toy.model().to(dtype), TrainConfig(loss_type="simpo"), monkeypatch, 1, world=CPU)
        assert (found.config.master_weights, found.config.gradient_checkpointing_layers) == ("fp32", None)
        assert found.config.logits_memory_budget is None and found.max_tokens == 2048 and found.given == ()
    all_ = TrainConfig(loss_type="simpo", gradient_checkpointing_layers="all", master_weights="none")
    found = settled(toy.model(), all_, monkeypatch, 1, world=CPU).config
    assert found.gradient_checkpointing_layers is None and found.master_weights == "none"


def test_options_that_are_set_stay_in_a_run(toy, monkeypatch):
    model = toy.model(**SIZES).to(torch.bfloat16)
    config = TrainConfig(
        loss_type="simpo", master_weights="fp32", gradient_checkpointing_layers=2, logits_memory_budget=7
    )
    found = settled(model, config, monkeypatch, MIB)
    assert found.config == config and found.given == ()


def test_what_cannot_be_estimated_runs_as_ever(toy, monkeypatch, caplog):
    """A model that no fake tensor passes is no error where options were only left open; for max_tokens=auto it is."""
    model = toy.model()
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, out: out + float(out.sum()))
    caplog.set_level(logging.INFO)
    found = settled(model, TrainConfig(loss_type="simpo"), monkeypatch, GIB)
    assert (found.config.gradient_checkpointing_layers, found.config.logits_memory_budget) == (None, None)
    assert "every layer is checkpointed" in caplog.text and found.given == ()
    with pytest.raises(fastpo.errors.UnsupportedModelError, match="cannot be run without its weights"):
        settled(model, TrainConfig(loss_type="simpo", max_tokens="auto"), monkeypatch, GIB)
    assert settled(model, TrainConfig(loss_type="simpo"), monkeypatch, None).given == ()  # memory unknown


def test_an_estimate_draws_no_random_numbers(toy, monkeypatch):
    model = toy.model(attention_dropout=0.1)
    torch.manual_seed(5)
    state, numbers = torch.get_rng_state(), random.getstate()
    settled(model, TrainConfig(loss_type="simpo", disable_dropout=False), monkeypatch, GIB)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == numbers


def test_ranks_agree(toy, monkeypatch):
    """The rank with the least memory decides for all: stochastic if one says so, most layers, the smallest budget."""

    class Two(World):
        def gather(self, value):
            if not isinstance(value, tuple):
                return [value, value]
            other = {"gradient_checkpointing_layers": 3, "logits_memory_budget": 11, "master_weights": "stochastic"}
            return [value, (other, 640)]

    model = toy.model(**SIZES).to(torch.bfloat16)
    world = Two(torch.device("cuda"), 0, 1, 0)
    found = settled(model, TrainConfig(loss_type="simpo"), monkeypatch, GIB, world=world)
    assert (found.config.gradient_checkpointing_layers, found.config.logits_memory_budget) == (3, 11)
    assert found.config.master_weights == "stochastic" and found.max_tokens == 640
    assert rules._alike([({"gradient_checkpointing_layers": None}, 5), None], 7) == ({}, 7)


def test_a_resumed_run_has_what_its_beginning_decided(toy, monkeypatch, tmp_path):
    """By run.json: on the same kind of device all of it, on another what is in the weights; nothing is estimated."""
    config = TrainConfig(loss_type="simpo")
    model = toy.model(**SIZES).to(torch.bfloat16)
    begun = with_options(config, master_weights="stochastic", gradient_checkpointing_layers=4, logits_memory_budget=99)
    record = rules.Settled(begun, 1).record("cuda")
    (tmp_path / "run.json").write_text(json.dumps({"config": config.to_dict(), "settled": record}))
    with monkeypatch.context() as patch:
        patch.setattr(rules.Blueprint, "of_model", lambda model: pytest.fail("estimated"))
        found = settled(model, config, patch, GIB, resume=tmp_path)
        assert found.config == begun and found.given == ("gradient_checkpointing_layers", "logits_memory_budget")
        on_cpu = settled(model, config, patch, GIB, world=CPU, resume=tmp_path).config
        assert (on_cpu.master_weights, on_cpu.gradient_checkpointing_layers) == ("stochastic", None)
    other = settled(model, with_options(config, master_weights="fp32"), monkeypatch, GIB, resume=tmp_path).config
    assert (other.master_weights, other.gradient_checkpointing_layers) == ("fp32", 4)
    # A checkpoint from before, and one that is damaged.
    (tmp_path / "run.json").write_text(json.dumps({"config": {**config.to_dict(), "master_weights": "none"}}))
    assert settled(model, config, monkeypatch, GIB, resume=tmp_path).config.master_weights == "none"
    (tmp_path / "run.json").write_text('{"config": {"master_weights": "fp8"}, "settled": 3}')
    assert settled(model, config, monkeypatch, GIB, resume=tmp_path).config.master_weights == "fp32"


# ---- where it was wrong


class Short:
    """A model that runs out of memory while fewer layers than `needs` are checkpointed, or in more than `limit` tokens
    a micro-batch."""

    def __init__(self, model, needs=0, limit=1 << 30):
        self.layers, self.needs, self.limit, self.failed = model.model.layers, needs, limit, 0
        self.seen: list[tuple[int, int]] = []
        self.layers[-1].mlp.register_forward_hook(self.look)

    def look(self, module, inputs, out):
        if isinstance(out, FakeTensor) or not (module.training and torch.is_grad_enabled()):
            return
        checkpointed = sum(layer.gradient_checkpointing for layer in self.layers)
        self.seen.append((checkpointed, out.shape[1]))
        if checkpointed < self.needs or out.shape[1] > self.limit:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def run(toy, tmp_path, monkeypatch):
    count = iter(range(100))

    def call(model, needs=0, limit=1 << 30, memory=64 * GIB, **options):
        monkeypatch.setattr(plan, "device_memory", lambda device: memory)
        short = Short(model, needs, limit)
        args = dict(
            output_dir=str(tmp_path / f"run{next(count)}"), disable_tqdm=True, use_cpu=True, bf16=False, max_steps=3,
            learning_rate=1e-2, save_final=False, report=False, loss_type="simpo", max_tokens=600, optim="sgd",
            train_sampling_strategy="sequential", gradient_checkpointing_layers="auto", logging_steps=1,
        )  # fmt: skip
        result = fastpo.train(model, toy.rows(24), processing_class=toy.tokenizer(), args={**args, **options})
        result.short = short
        return result

    return call


def weights(result) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


def test_too_few_layers_are_mended_while_it_runs(toy, run):
    """Once as it was, then with every layer checkpointed, in micro-batches of the same size: the same weights bit for
    bit as of a run that had them checkpointed from the start, and one warning."""
    model = {"num_hidden_layers": 3}
    plain = run(toy.model(**model), gradient_checkpointing_layers="all")
    assert {n for n, _ in plain.short.seen} == {3}
    wrong = run(toy.model(**model), needs=3)
    assert [n for n, _ in wrong.short.seen[:3]] == [0, 0, 3] and wrong.short.failed == 2
    assert torch.equal(weights(wrong), weights(plain))
    assert [w.name for w in wrong.warnings if w.name == "out_of_memory"] == ["out_of_memory"]
    assert "every layer is checkpointed" in next(w.message for w in wrong.warnings if w.name == "out_of_memory")
    assert not any(layer.gradient_checkpointing for layer in wrong.model.model.layers)  # put back
    # Then micro-batches become smaller.
    small = run(toy.model(**model), needs=3, limit=250)
    messages = [w.message for w in small.warnings if w.name == "out_of_memory"]
    assert len(messages) == 2 and "every layer" in messages[0] and "max_tokens=" in messages[1]
    assert (weights(small) - weights(plain)).abs().max() < 1e-6
    # A number that was set stays.
    number = run(toy.model(**model), limit=250, gradient_checkpointing_layers=1)
    assert {n for n, _ in number.short.seen} == {1}


def test_a_resumed_run_keeps_what_was_given_back(toy, run, tmp_path):
    model = {"num_hidden_layers": 3}
    folder = str(tmp_path / "kept")
    run(toy.model(**model), needs=3, output_dir=folder, save_steps=2, save_strategy="steps", max_steps=2)
    again = run(toy.model(**model), needs=3, output_dir=folder, resume_from_checkpoint=True, max_steps=4)
    assert again.short.failed == 0 and {n for n, _ in again.short.seen} == {3}
    saved = json.loads(next((tmp_path / "kept").glob("checkpoint-2/run.json")).read_text())
    assert saved["settled"] == {
        "device": "cpu", "master_weights": "fp32", "gradient_checkpointing_layers": 0, "logits_memory_budget": None,
    }  # fmt: skip


def test_the_heads_budget_is_given_back_after_the_layers(toy):
    """And the op's own is used from then on, by the object that the forward pass reads."""
    from fastpo.models.policy import Policy
    from fastpo.training.memory import Retreat

    config = with_options(TrainConfig(), gradient_checkpointing_layers=1, logits_memory_budget=1 << 40)
    policy = Policy(toy.model())
    retreat = Retreat(config, ("logits_memory_budget", "gradient_checkpointing_layers"), policy)
    assert retreat.give().startswith("every layer is checkpointed (gradient_checkpointing_layers=all from the start")
    assert config.gradient_checkpointing_layers is None and config.logits_memory_budget == 1 << 40
    assert f"keeps no more than its usual budget (logits_memory_budget={1 << 30}" in retreat.give()
    assert config.logits_memory_budget is None and retreat.give() is None
    later = with_options(TrainConfig(), gradient_checkpointing_layers=1, logits_memory_budget=1 << 40)
    fresh = Retreat(later, ("gradient_checkpointing_layers", "logits_memory_budget"), policy)
    fresh.load(retreat.given[:1])
    assert later.gradient_checkpointing_layers is None and later.logits_memory_budget == 1 << 40
    assert fresh.give().startswith("the head")
