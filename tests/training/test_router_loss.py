"""The load-balancing loss of mixtures of experts: TRL's numbers on one batch, the same ones however it is packed."""

import copy
import math

import pytest
import torch
import transformers

import fastpo
from fastpo.errors import ConfigError, UnsupportedModelError

SIZES = dict(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=2, eos_token_id=0, bos_token_id=0,
)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
MODELS = {
    "Mixtral": {**LOCAL, "sliding_window": None},
    "Qwen2Moe": {**MOE, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": MOE,
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {**LOCAL, "head_dim": 8},
    "Phimoe": {**LOCAL, "sliding_window": None, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "GraniteMoe": LOCAL,
    "JetMoe": {**LOCAL, "kv_channels": 8, "num_key_value_heads": 2},  # routers in its attention too
    "Qwen3Next": {**MOE, "linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 8,
                  "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16},  # runs unpacked
}  # fmt: skip
MODELS = {k: v for k, v in MODELS.items() if hasattr(transformers, f"{k}ForCausalLM")}
COEFFICIENT = 0.5


def make_model(name: str = "Qwen3Moe", **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    options = {**SIZES, **MODELS[name], "router_aux_loss_coef": COEFFICIENT, "output_router_logits": False, **changes}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options))
    with torch.no_grad():  # routers that prefer some experts
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.05))
    return model


@pytest.fixture
def run(toy, tmp_path):
    count = iter(range(100))

    def call(model, rows, rest=None, **options):
        args = dict(
            output_dir=str(tmp_path / f"run{next(count)}"), use_cpu=True, bf16=False, disable_tqdm=True, max_steps=2,
            logging_steps=1, learning_rate=1e-2, lr_scheduler_type="constant", per_device_train_batch_size=8,
            report=False, save_final=False, save_strategy="no", optim="sgd", max_length=None, guardrails=False,
        )  # fmt: skip
        out = fastpo.train(model, rows, processing_class=toy.tokenizer(), args={**args, **options}, **rest or {})
        return [line for line in out.log_history if "loss" in line], out

    return call


def padded(toy, rows) -> tuple[torch.Tensor, torch.Tensor]:
    tokenizer = toy.tokenizer()
    sequences = [[*tokenizer(r["prompt"]).input_ids, *tokenizer(r[k]).input_ids, 0] for k in ("chosen", "rejected")
                 for r in rows]  # fmt: skip
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [2] * (longest - len(s)) for s in sequences])
    return ids, torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cut", [{}, {"max_tokens": 60, "share_prompts": "always"}], ids=["whole", "cut and shared"])
def test_it_is_the_models_own(toy, run, name, cut):
    """Of a padded batch with its mask, as TRL has it: the value, and the gradient through one SGD step."""
    rows, model = toy.rows(8), make_model(name)
    ids, mask = padded(toy, rows)
    own = copy.deepcopy(model)
    aux = own(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss
    if not isinstance(aux, torch.Tensor):
        pytest.skip(f"{name} of transformers {transformers.__version__} returns no router logits, and has no such loss")
    (COEFFICIENT * aux).backward()
    # Without a preference loss that moves: its weight is nothing beside the router's.
    lines, out = run(copy.deepcopy(model), rows, max_steps=1, learning_rate=1.0, max_grad_norm=0.0,
                     loss_weights=[1e-12], router_aux_loss_coef=COEFFICIENT, **cut)  # fmt: skip
    assert lines[0]["aux_loss"] == pytest.approx(aux.item(), rel=2e-6)
    assert lines[0]["loss"] == pytest.approx(COEFFICIENT * aux.item(), rel=2e-6)
    start, trained = dict(model.named_parameters()), dict(out.model.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in own.parameters() if p.grad is not None)
    assert largest > 1e-3
    for key, parameter in own.named_parameters():
        step = start[key].detach() - trained[key].detach()
        want = torch.zeros_like(step) if parameter.grad is None else parameter.grad
        assert (step - want).abs().max() <= 1e-5 * largest + 2e-7 * start[key].abs().max(), key


def test_no_router_logits_is_said(toy, run, caplog):
    lines, _ = run(make_model(mlp_only_layers=[0, 1]), toy.rows(8))
    assert "Qwen3MoeForCausalLM returned no router logits" in caplog.text and "aux_loss" not in lines[0]


def test_the_summary_has_it_too(toy, run):
    """Of the steps that no log line shows."""
    rows, model = toy.rows(8), make_model("Mixtral")
    lines, _ = run(copy.deepcopy(model), rows, max_steps=2)
    _, out = run(copy.deepcopy(model), rows, max_steps=2, logging_steps=10)
    assert out.metrics["aux_loss"] == pytest.approx((lines[0]["aux_loss"] + lines[1]["aux_loss"]) / 2, rel=1e-6)


def test_of_rows_given_to_evaluate(toy, tmp_path):
    """Their last tokens count too, as those of the trainer's own set."""
    rows = toy.rows(5, seed=3)
    args = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, disable_tqdm=True, max_length=None)
    trainer = fastpo.Trainer(
        make_model("Mixtral"), toy.rows(4), eval_dataset=rows, processing_class=toy.tokenizer(), args=args
    )
    own, given = trainer.evaluate(), trainer.evaluate(rows)
    assert given["eval_aux_loss"] == own["eval_aux_loss"] > 0 and given["eval_loss"] == own["eval_loss"]


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_as_trl(toy, run, tmp_path, name, lora):
    """TRL's DPOTrainer at its defaults, two steps."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows, model = toy.rows(16), make_model(name)
    adapter = {}
    if lora:
        peft = pytest.importorskip("peft")
        adapter = {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}

    def config(folder):
        return trl.DPOConfig(
            output_dir=str(tmp_path / folder), use_cpu=True, bf16=False, max_steps=2, logging_steps=1, report_to="none",
            disable_tqdm=True, learning_rate=1e-2, save_strategy="no", max_grad_norm=0.0,
        )  # fmt: skip

    torch.manual_seed(5)
    theirs = trl.DPOTrainer(
        copy.deepcopy(model), ref_model=None if lora else copy.deepcopy(model), args=config("trl"),
        train_dataset=Dataset.from_list(rows), processing_class=toy.tokenizer(), **copy.deepcopy(adapter),
    )  # fmt: skip
    if lora:
        adapters = {k: v.clone() for k, v in theirs.model.state_dict().items() if "lora_" in k}
    theirs.train()
    want = [line for line in theirs.state.log_history if "loss" in line]
    if lora:
        import peft

        mine = peft.get_peft_model(copy.deepcopy(model), adapter["peft_config"])
        mine.load_state_dict(adapters, strict=False)
    else:
        mine = copy.deepcopy(model)
    out = fastpo.train(mine, rows, processing_class=toy.tokenizer(), args=config("fastpo"))
    got = [line for line in out.log_history if "loss" in line]
    for a, b in zip(got, want, strict=True):
        for key in ("loss", "aux_loss", "grad_norm", "rewards/chosen", "entropy", "mean_token_accuracy"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), key
    assert got[0]["loss"] == pytest.approx(math.log(2) + COEFFICIENT * got[0]["aux_loss"], rel=1e-5)


def test_packing_accumulation_and_sharing_change_nothing(toy, run):
    prompt = toy.rows(1)[0]["prompt"]
    rows = [{**row, "prompt": prompt} if i % 3 == 0 else row for i, row in enumerate(toy.rows(16))]
    kinds = [
        {"max_tokens": 100_000, "share_prompts": "never"},
        {"max_tokens": 1},
        {"max_tokens": 150, "share_prompts": "always"},
        {"max_tokens": 100_000, "share_prompts": "always", "gradient_checkpointing": False},
        {"max_tokens": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "token_bucket": 32},
        {"max_tokens": 90, "loss_type": "sigmoid", "disable_dropout": False},
    ]
    rest = {"eval_dataset": toy.rows(5, seed=3)}
    runs = [run(make_model(), rows, rest=rest, eval_steps=1, **kind) for kind in kinds]
    keys = ("loss", "aux_loss", "grad_norm", "eval_loss", "eval_aux_loss")
    first = [line[key] for line in runs[0][1].log_history for key in keys if key in line]
    assert len(first) == 10
    for _, other in runs[1:]:
        numbers = [line[key] for line in other.log_history for key in keys if key in line]
        assert numbers == pytest.approx(first, rel=1e-5)


def test_beside_other_losses(toy, run):
    """KTO's KL and BCO's mean are of the step too; an sft loss has no pairs."""
    unpaired = [{"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"} for r in toy.rows(6)
                for k in ("chosen", "rejected")]  # fmt: skip
    for rows, loss in ((unpaired, "kto"), (unpaired, "bco"), (toy.rows(8), "sft"), (toy.rows(8), "aot")):
        numbers = []
        for tokens in (100_000, 40):
            lines, _ = run(make_model(), rows, loss_type=loss, max_tokens=tokens)
            numbers.append([line[key] for line in lines for key in ("loss", "aux_loss", "grad_norm")])
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-5), loss


def test_it_can_be_switched_off_and_asked_for(toy, run):
    rows = toy.rows(8)
    lines, _ = run(make_model(), rows, router_aux_loss_coef=0)
    assert "aux_loss" not in lines[0]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    lines, _ = run(make_model(router_aux_loss_coef=0.0), rows, router_aux_loss_coef=0.25)
    assert lines[0]["loss"] == pytest.approx(math.log(2) + 0.25 * lines[0]["aux_loss"], abs=1e-5)
    with pytest.raises(ConfigError, match="LlamaForCausalLM is no mixture of experts"):
        run(toy.model(), rows, router_aux_loss_coef=0.1)
    with pytest.raises(ConfigError, match="router_aux_loss_coef must be zero or more"):
        run(make_model(), rows, router_aux_loss_coef=-1)
    with pytest.raises(ConfigError, match="use_reentrant"):
        run(make_model(), rows, gradient_checkpointing_kwargs={"use_reentrant": True})


def test_another_formula_is_refused(toy, run):
    class Other(transformers.Qwen3MoeForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            if out.aux_loss is not None:
                out.aux_loss = out.aux_loss * 1.01
            return out

    Other.__module__ = transformers.Qwen3MoeForCausalLM.__module__
    model = make_model()
    model.__class__ = Other
    with pytest.raises(UnsupportedModelError, match="Other: the load-balancing loss is .* by the model's own formula"):
        run(model, toy.rows(8))
