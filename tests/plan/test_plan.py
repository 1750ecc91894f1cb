"""`fastpo plan` and max_tokens=auto: what is estimated is what PyTorch's allocator says that a run takes."""

import json
import resource

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastpo
from fastpo import cli
from fastpo.config.train_config import TrainConfig
from fastpo.data.packing import trunk_tokens
from fastpo.errors import ConfigError
from fastpo.plan import estimate as plan

MIB = 1 << 20
SIZES = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, max_position_embeddings=512)


def families():
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    qwen = dict(SIZES, vocab_size=5000, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    gpt2 = dict(vocab_size=100, n_embd=256, n_layer=2, n_head=4, n_positions=512)
    return {
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**qwen, tie_word_embeddings=True)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**gpt2)),
    }


@pytest.fixture
def options(tmp_path):
    return dict(
        output_dir=str(tmp_path / "run"), disable_tqdm=True, use_cpu=True, bf16=False, max_steps=2, learning_rate=1e-4,
        save_final=False, report=False, loss_type="simpo", gradient_checkpointing=False, max_tokens=1200,
        per_device_train_batch_size=16, logging_steps=1,
    )  # fmt: skip


def rows(toy, n=16):
    import random

    rng = random.Random(0)
    return [{"prompt": toy.text(rng, 30, 60), **{k: " " + toy.text(rng, 20, 60) for k in ("chosen", "rejected")}}
            for _ in range(n)]  # fmt: skip


def measured_peak(train, tmp_path) -> int:
    """Bytes that PyTorch's CPU allocator has given out at most, over those at the start, by its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        train()
    trace = tmp_path / "trace.json"
    prof.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    first = min(events, key=lambda e: e["ts"])["args"]
    start = first["Total Allocated"] - first["Bytes"]  # of an earlier profile in this process
    return max(e["args"]["Total Allocated"] for e in events) - start


CASES = {
    "llama": (None, False, torch.float32, {}),
    "checkpointing": (None, False, torch.float32, {"gradient_checkpointing": True}),
    "lora": (None, True, torch.float32, {}),
    "lora checkpointing": (None, True, torch.float32, {"gradient_checkpointing": True}),
    "masters": (None, False, torch.bfloat16, {}),
    "qwen3 sliced": ("qwen3", False, torch.float32, {"logits_memory_budget": 0}),
    "gpt2 autocast": ("gpt2", False, torch.float32, {"optim": "sgd", "bf16": True}),
}
FACTOR = 1.1


@pytest.mark.parametrize("case", CASES)
def test_estimate_against_the_allocator(toy, options, tmp_path, case):
    family, adapter, dtype, changes = CASES[case]
    model = (families()[family]() if family else toy.model(**SIZES)).to(dtype)
    if adapter:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    args = TrainConfig(**{**options, **changes})
    trainer = fastpo.trainer.Trainer(model, rows(toy), args=args, processing_class=toy.tokenizer())
    rows_share = sum(len(r) for e in trainer.examples for r in e.responses) / sum(map(trunk_tokens, trainer.examples))
    found = plan.estimate(plan.Blueprint.of_model(model), args, "cpu", row_share=rows_share, autocast=bool(args.bf16))
    assert found.weights == sum(
        t.nbytes for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values()
    )
    measured = measured_peak(trainer.train, tmp_path)
    largest = max(line["packing_efficiency"] for line in trainer.state.log_history if "packing_efficiency" in line)
    estimated = found.total(largest * args.max_tokens) - found.weights - found.process
    print(f"{case}: estimated {estimated / MIB:.1f} MiB, measured {measured / MIB:.1f} MiB: {estimated / measured:.3f}")
    assert 1 / FACTOR < estimated / measured < FACTOR


# ---- fewer layers checkpointed, activations offloaded: the same gradients


def gradients(model, batch, config) -> tuple[dict, int]:
    """({parameter: gradient} of the batch, bytes saved for the backward pass in distinct storages)."""
    from fastpo.models.modes import training_mode
    from fastpo.models.policy import Policy

    policy = Policy(model)
    model.zero_grad()
    storages: dict[int, torch.UntypedStorage] = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no address is used again
        return tensor

    with training_mode(policy, config), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        policy.logp(batch).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}, sum(s.nbytes() for s in storages.values())


@pytest.fixture
def batch(toy):
    from fastpo.data import Example
    from fastpo.data.packing import collate

    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 100, (40,), generator=generator, dtype=torch.int32).numpy() for _ in range(12)]
    return collate([Example(ids[i], [ids[i + 1], ids[i + 2]], pairs=[(0, 1)]) for i in range(0, 12, 3)], range(4))


def test_layers_that_are_checkpointed(toy, batch):
    """None of four, one, three and all of them: equal gradients bit for bit, and less and less is saved."""
    model = toy.model(**{**SIZES, "num_hidden_layers": 4})
    first, most = gradients(model, batch, TrainConfig(gradient_checkpointing=False))
    sizes = [most]
    for layers in (1, 3, 4, None):
        got, size = gradients(model, batch, TrainConfig(gradient_checkpointing_layers=layers))
        assert all(torch.equal(got[name], first[name]) for name in first)
        sizes.append(size)
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3] == sizes[4]
    assert not any(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_activations(toy, batch, checkpointing, monkeypatch):
    """Every tensor that the layers save goes through a copy, each once, and no weight does; equal bit for bit.

    On the CPU the copy is beside the original: that it frees a GPU's memory is not shown here.
    """
    from fastpo.models import modes

    monkeypatch.setattr(modes, "OFFLOADED_BYTES", 1)
    made = []

    class Counted(modes._Copy):
        def __init__(self, values, device):
            super().__init__(values, device)
            made.append(values)

    monkeypatch.setattr(modes, "_Copy", Counted)
    model = toy.model(**SIZES)
    plain = TrainConfig(gradient_checkpointing=checkpointing)
    expected, _ = gradients(model, batch, plain)
    got, _ = gradients(model, batch, TrainConfig(gradient_checkpointing=checkpointing, activation_offloading=True))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    tokens = batch.input_ids.numel()
    weights = {tuple(p.shape) for p in model.parameters()}
    assert made and not any(tuple(t.shape) in weights for t in made)
    if checkpointing:  # the layers' inputs, once each, and what lies outside the layers
        assert sum(t.shape == (1, tokens, SIZES["hidden_size"]) for t in made) <= SIZES["num_hidden_layers"] + 3
    # Each layer's input of three projections is copied once: without that there would be two more copies of it a layer.
    assert len({(t.shape, t.sum().item()) for t in made if t.dim() == 3}) >= 0.8 * sum(t.dim() == 3 for t in made)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"activation_offloading": True}, "leave it out on a CPU"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_layers": 9}, "=9, but LlamaForCausalLM has 2 layers"),
        ({"gradient_checkpointing_layers": 1}, "needs gradient_checkpointing"),
        ({"max_tokens": "many"}, "max_tokens must be a number of tokens or auto, not 'many'"),
        ({"max_tokens": 0}, "max_tokens must be positive"),
    ],
)
def test_options_that_make_no_sense(toy, options, changes, words):
    with pytest.raises(ConfigError, match=words):
        fastpo.train(toy.model(), rows(toy, 4), args={**options, **changes}, processing_class=toy.tokenizer())


# ---- max_tokens=auto


def test_auto_takes_what_fits(toy, options, monkeypatch):
    """Of 64 MiB beside the process: a run at the largest estimate, within it, and the same numbers."""
    model = toy.model(**SIZES)
    process = plan._resident()
    monkeypatch.setattr(plan, "_resident", lambda: process)
    monkeypatch.setattr(plan, "device_memory", lambda device: int((process + 64 * MIB) / (1 - plan.HEADROOM)))
    trainer = fastpo.trainer.Trainer(
        model, rows(toy), args={**options, "max_tokens": "auto", "optim": "sgd"}, processing_class=toy.tokenizer()
    )
    assert 64 < trainer.max_tokens < sum(map(trunk_tokens, trainer.examples)) and trainer.max_tokens % 64 == 0
    got = trainer.train()
    plain = fastpo.train(
        toy.model(**SIZES), rows(toy), args={**options, "optim": "sgd", "overwrite_output_dir": True},
        processing_class=toy.tokenizer(),
    )  # fmt: skip
    both = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (got.model, plain.model)]
    assert (both[0] - both[1]).abs().max() < 1e-6


def test_auto_counts_a_shared_prompt_once(toy, options, monkeypatch):
    """The step's tokens, the head's rows among them, and the longest row are those of the packing; a bucket divides."""
    data = [{"prompt": row["prompt"], "responses": [{"text": f" {row['chosen']} w{k}", "score": k} for k in range(4)]}
            for row in rows(toy)]  # fmt: skip
    estimate, shares = plan.estimate, []
    monkeypatch.setattr(plan, "estimate", lambda *a, **kw: shares.append(kw["row_share"]) or estimate(*a, **kw))
    tokens = {}
    for mode in ("never", "always"):
        args = {**options, "max_tokens": "auto", "pair_policy": "all", "share_prompts": mode, "token_bucket": 96}
        trainer = fastpo.trainer.Trainer(toy.model(**SIZES), data, args=args, processing_class=toy.tokenizer())
        tokens[mode] = sum(map(trunk_tokens, trainer.examples))
        assert trainer.max_tokens == -(-tokens[mode] // 96) * 96
    head_rows = sum(len(r) for e in trainer.examples for r in e.responses)
    assert tokens["always"] < 0.8 * tokens["never"]
    assert shares == pytest.approx([min(1, head_rows / tokens[mode]) for mode in ("never", "always")])
    process = plan._resident()
    monkeypatch.setattr(plan, "_resident", lambda: process)
    monkeypatch.setattr(plan, "device_memory", lambda device: int((process + 60 * MIB) / (1 - plan.HEADROOM)))
    with pytest.raises(ConfigError, match="max_tokens=auto: .* for 3072 tokens.*smaller token_bucket"):
        args |= {"token_bucket": 3072, "optim": "sgd"}
        fastpo.trainer.Trainer(toy.model(**SIZES), data, args=args, processing_class=toy.tokenizer())


@pytest.mark.parametrize(
    "memory, words",
    [(None, "the memory of this device is unknown"), (MIB, "more than"), (None, None)],
    ids=["unknown", "too little", "as it is here"],
)
def test_auto_on_other_machines(toy, options, monkeypatch, memory, words):
    def build():
        args = {**options, "max_tokens": "auto"}
        return fastpo.trainer.Trainer(toy.model(), rows(toy), args=args, processing_class=toy.tokenizer())

    if words is None:
        trainer = build()  # a toy's step fits any machine that runs the tests
        assert trainer.max_tokens == sum(map(trunk_tokens, trainer.examples))
        return
    monkeypatch.setattr(plan, "device_memory", lambda device: memory)
    with pytest.raises(ConfigError, match=words):
        build()


def test_a_limit_of_the_process_counts():
    """RLIMIT_AS, as `ulimit -v` sets it, is less than the machine's memory."""
    free = plan.device_memory(torch.device("cpu"))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 64 * MIB, hard))
        limited = plan.device_memory(torch.device("cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert limited < free and limited - plan._resident() <= 65 * MIB


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    free = plan.device_memory(torch.device("cpu")) - plan._resident()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert plan.device_memory(torch.device("cpu")) - plan._resident() < 0.3 * free


# ---- the command


@pytest.fixture
def folder(toy, tmp_path):
    """A model's configuration and tokenizer, and no weights."""
    toy.model(**SIZES).config.save_pretrained(tmp_path / "model")
    toy.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def planned(capsys, *options) -> dict:
    assert cli.main(["plan", *map(str, options), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_needs_no_weights(toy, folder, tmp_path, capsys):
    found = planned(capsys, "--model", folder, "--memory", "1GiB", "--use-cpu", "--max-tokens", "2048")
    model = toy.model(**SIZES)
    numbers = sum(p.numel() for p in model.parameters())
    assert found["parameters"] == numbers and found["gradients"] == 4 * numbers == found["optimizer_state"] / 2
    assert abs(found["weights"] - 4 * numbers) < 4096  # and the rotary frequencies
    assert found["memory"] == 1 << 30 and found["max_tokens"] == 2048
    at_most = planned(capsys, "--model", folder, "--memory", "1GiB", "--use-cpu", "--max-tokens", "auto")
    assert at_most["max_tokens"] == found["largest_max_tokens"]
    assert at_most["total"] <= (1 - plan.HEADROOM) * (1 << 30) < 1.02 * at_most["total"]
    # every option that saves memory does so
    less = {
        "one layer": (["--gradient-checkpointing-layers", "1"], "step_peak", 1),
        "bf16": (["--dtype", "bfloat16", "--master-weights", "stochastic"], "total", -1),
        "lora": (["--use-peft"], "total", -1),
        "others": (["--optim", "adamw_8bit", "--sync-ref-model"], "optimizer_state", -1),
    }
    for options, key, sign in less.values():
        other = planned(capsys, "--model", folder, "--memory", "1GiB", "--use-cpu", "--max-tokens", "2048", *options)
        assert (other[key] - found[key]) * sign > 0, options
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(toy)))
    with_data = planned(capsys, "--model", folder, "--memory", "1GiB", "--use-cpu", "--train-dataset", data)
    small = planned(capsys, "--model", folder, "--memory", "1GiB", "--use-cpu", "--train-dataset", data,
                    "--max-tokens", "auto", "--per-device-train-batch-size", "2")  # fmt: skip
    assert with_data["longest_row"] < small["max_tokens"] <= 2 * with_data["longest_row"]  # no more than a step has
    assert 64 < with_data["longest_row"] < 256 and with_data["activations_per_token"] <= found["activations_per_token"]


def test_the_table(folder, capsys):
    assert cli.main(["plan", "--model", str(folder), "--memory", "80GiB", "--use-cpu"]) == 0
    text = capsys.readouterr().out
    assert "at max_tokens=2,048, the default on a CPU (on a GPU 16,384: --device cuda)" in text
    for name in ("weights", "gradients", "fp32 master copies", "optimiser state", "reference", "activations",
                 "head, kept", "head, sliced", "peak of a step", "total", "the largest max_tokens is"):  # fmt: skip
        assert name in text


@pytest.mark.parametrize(
    "options, words",
    [
        ({"--model": "nowhere/at-all"}, "is no model that can be planned"),
        ({"--model": "./nowhere/at-all"}, "model: no such folder: './nowhere/at-all'"),
        ({"--model": "/"}, "model: the folder '/' holds no model, which has a config.json"),
        ({"--ref-model": "./nowhere"}, "ref_model: no such folder: './nowhere'"),
        ({"--device": "cuda:x"}, "device 'cuda:x' is not supported; use cuda or cpu"),
        ({"--device": "mps"}, "device 'mps' is not supported; use cuda or cpu"),
        ({"--memory": "nanGiB"}, "memory must be a size such as 80GiB"),
        ({"--memory": "1..2GiB"}, "memory must be a size such as 80GiB"),
        ({"--memory": "24Gib per GPU"}, "memory must be a size such as 80GiB"),
        ({"--memory": "1e99GiB"}, "is more than any device has"),
        ({"--memory": "4MB"}, "the weights take 4"),
        ({"--memory": "15MB"}, "the weights, gradients and optimiser state take 18"),
        ({"--memory": "plenty"}, "memory must be a size such as 80GiB"),
        ({"--fsdp": "full_shard"}, "leave fsdp out"),
        ({"--load-in-8bit": "true"}, "a quantised model cannot be trained itself"),
        ({"--model": None}, "no model given"),
    ],
    ids=lambda value: " ".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_plans_that_cannot_be_made(folder, capsys, options, words):
    if "8bit" in str(options):
        pytest.importorskip("bitsandbytes")
    given = {"--model": str(folder), "--memory": "1GiB", **options}
    argv = [part for pair in given.items() for part in pair if pair[1] is not None]
    assert cli.main(["plan", *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and "Traceback" not in error


@pytest.mark.slow
def test_which_max_tokens_is_assumed(folder, capsys):
    """The default of the device that training would use here, or of the one that is named; and it is said."""
    given = ("--model", folder, "--memory", "80GiB")
    found = {device: planned(capsys, *given, "--device", device) for device in ("cpu", "cuda")}
    assert {device: f["max_tokens"] for device, f in found.items()} == {"cpu": 2048, "cuda": 16384}
    assert all(f["device"] == device and f["max_tokens_from"] == "default" for device, f in found.items())
    here = planned(capsys, "--model", folder, "--memory", "80GiB")
    assert here == found["cuda" if torch.cuda.is_available() else "cpu"]
    for value in ("512", "auto"):
        said = planned(capsys, "--model", folder, "--memory", "80GiB", "--use-cpu", "--max-tokens", value)
        assert said["max_tokens_from"] == {"512": "option", "auto": "auto"}[value]
    assert cli.main(["plan", "--model", str(folder), "--memory", "80GiB", "--device", "cuda"]) == 0
    assert "at max_tokens=16,384, the default on a GPU (on a CPU 2,048: --device cpu)" in capsys.readouterr().out


def test_sizes():
    assert plan.parse_bytes("80GiB") == 80 << 30 and plan.parse_bytes("24 GB") == 24_000_000_000
    assert plan.parse_bytes("512m") == 512_000_000 and plan.parse_bytes("1e6") == 1_000_000
    with pytest.raises(ConfigError, match="memory=24 is 24 bytes: did you mean 24GiB"):
        plan.parse_bytes("24")


def test_quantised_and_saved_adapters(toy, folder, tmp_path, capsys):
    """A 4-bit base's weights as bitsandbytes has them, and a trained adapter's folder in place of a model."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from fastpo.models.loading import load_model

    toy.model(**SIZES).to(torch.bfloat16).save_pretrained(folder)
    found = planned(capsys, "--model", folder, "--memory", "1GiB", "--use-cpu", "--use-peft", "--load-in-4bit")
    from transformers import BitsAndBytesConfig

    real = load_model(
        folder, use_cpu=True, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    states = [p.quant_state for p in real.parameters() if hasattr(p, "quant_state")]
    held = sum(p.nbytes for p in real.parameters()) + sum(s.absmax.nbytes for s in states)
    adapter = 4 * found["trainable_parameters"]
    assert found["weights"] - adapter == pytest.approx(held, rel=0.01)
    model = peft.get_peft_model(toy.model(**SIZES), peft.LoraConfig(r=16, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "adapter")
    found = planned(capsys, "--model", tmp_path / "adapter", "--memory", "1GiB", "--use-cpu")
    assert found["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
