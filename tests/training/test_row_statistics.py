"""WPO, TDPO, LD-DPO and SamPO through `fastpo.train`, against their formulas on the full logits of every row."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

import fastpo
from fastpo.config.train_config import TrainConfig
from fastpo.data import Example
from fastpo.data.packing import collate
from fastpo.errors import ConfigError, DataError
from fastpo.losses.table import resolve_terms
from fastpo.reference import live as live_reference
from fastpo.training.metrics import pair_inputs
from fastpo.training.row_statistics import draw_rows, term_inputs

LOSSES = ("wpo", "ld_dpo", "sampo", "tdpo1", "tdpo2")
MIXED = ["tdpo2", "dpo", "sampo", "wpo", "sft"]
LORA = dict(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def run(toy, tmp_path):
    count = iter(range(100))

    def call(rows=None, model=None, changes=None, **options):
        inputs = {k: options.pop(k) for k in ("ref_model", "eval_dataset", "peft_config") if k in options}
        defaults = dict(
            output_dir=str(tmp_path / f"run{next(count)}"), disable_tqdm=True, use_cpu=True, bf16=False,
            logging_steps=1, max_steps=4, per_device_train_batch_size=8, learning_rate=0.1, optim="sgd",
            lr_scheduler_type="constant", gradient_checkpointing=False, report=False, save_final=False, beta=0.5,
        )  # fmt: skip
        model = toy.model() if model is None else model
        return fastpo.train(
            model, toy.rows(16) if rows is None else rows, processing_class=toy.tokenizer(),
            args={**defaults, **options}, **inputs,
        )  # fmt: skip

    return call


def losses(result, key="loss"):
    return [line[key] for line in result.log_history if key in line]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def of_rows(model, ref, tokenizer, row):
    """(log-probability, the reference's, log sum of squares, KL) of each token of chosen and of rejected, each [n]."""
    out = {}
    for side in ("chosen", "rejected"):
        ids = tokenizer(row["prompt"] + row[side] + "<eos>")["input_ids"]
        start = len(tokenizer(row["prompt"])["input_ids"])
        full = []
        for m in (model, ref):
            with torch.set_grad_enabled(m is model):
                full.append(m(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1))
        policy, reference = full
        at = torch.tensor(ids[start:])[:, None]
        out[side] = (
            policy.gather(1, at)[:, 0], reference.gather(1, at)[:, 0],
            (policy.detach().exp() ** 2).sum(1).log(), (reference.exp() * (reference - policy)).sum(1),
        )  # fmt: skip
    return out


def direct(name, tokens, beta=0.5, draw=None):
    """The loss of one pair from its tokens' numbers, as the papers write it."""
    (lw, rw, qw, dw), (ll, rl, ql, dl) = tokens["chosen"], tokens["rejected"]
    n = min(len(lw), len(ll))
    if name == "sampo":
        (lw, rw), (ll, rl) = ([t[chosen] for t in pair] for pair, chosen in zip(((lw, rw), (ll, rl)), draw))
    if name == "ld_dpo":
        lw, rw, ll, rl = (torch.cat([t[:n], 0.5 * t[n:]]) for t in (lw, rw, ll, rl))
    u = lw.sum() - rw.sum() - ll.sum() + rl.sum()
    if name == "tdpo1":
        u = u - (dl.sum() - dw.sum())
    if name == "tdpo2":
        u = u - 0.5 * (dl.sum() - dw.sum().detach())
    weight = 1.0
    if name == "wpo":
        weight = torch.exp((lw - qw).mean() + (ll - ql).mean()).detach().clamp(max=1)
    return weight * -logsigmoid(beta * u)


def draw_of(tokens, stream, step, row, seed=42):
    lengths = [len(tokens[side][0]) for side in ("chosen", "rejected")]
    rng = np.random.default_rng([seed, stream, step, row, 0])
    m = min(lengths)
    return [torch.from_numpy(np.sort(rng.choice(n, m, replace=False))) if n > m else torch.arange(m) for n in lengths]


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_the_formula(toy, run, name):
    """Against another model: the first step's loss and SGD's first update, and an evaluation before it."""
    model, rows, tokenizer = toy.model(), toy.rows(8), toy.tokenizer()
    result = run(rows, loss_type=name, ref_model=toy.model(seed=1), max_steps=1, max_grad_norm=0,
                 eval_dataset=toy.rows(5, seed=3), eval_on_start=True, max_tokens=64)  # fmt: skip
    twin, ref = toy.model().double(), toy.model(seed=1).double()

    def mean(rows, stream):
        tokens = [of_rows(twin, ref, tokenizer, row) for row in rows]
        return torch.stack([
            direct(name, t, draw=draw_of(t, stream, 0, i)) for i, t in enumerate(tokens)
        ]).mean()  # fmt: skip

    assert losses(result, "eval_loss")[0] == pytest.approx(mean(toy.rows(5, seed=3), 0).item(), rel=2e-5)
    loss = mean(rows, 1)
    assert losses(result)[0] == pytest.approx(loss.item(), rel=2e-5)
    loss.backward()
    before = dict(model.named_parameters())
    for key, p in twin.named_parameters():
        moved = dict(result.model.named_parameters())[key].detach() - before[key].detach()
        torch.testing.assert_close(moved.double(), -0.1 * p.grad, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("name", [*LOSSES, MIXED], ids=str)
def test_packing_changes_nothing(toy, run, name):
    """One micro-batch or one a row, with accumulation or not."""
    options = dict(
        loss_type=name, ref_model=None, eval_dataset=toy.rows(5, seed=3), eval_strategy="steps", eval_steps=2
    )
    a = run(max_tokens=10_000, **options)
    b = run(max_tokens=1, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert losses(a) == pytest.approx(losses(b), rel=1e-5)
    assert losses(a, "eval_loss") == pytest.approx(losses(b, "eval_loss"), rel=1e-5)
    assert losses(a)[0] > losses(a)[-1] and all(map(math.isfinite, losses(a)))
    torch.testing.assert_close(weights(a.model), weights(b.model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "modules_to_save", "trained adapter", "dropout"])
def test_reference_of_an_adapter(toy, run, kind):
    """With the adapter off, or as it was, the reference is what the same weights give as ref_model."""
    import peft

    config = peft.LoraConfig(**LORA | ({"modules_to_save": ["lm_head"]} if kind == "modules_to_save" else {}))
    options = dict(loss_type="tdpo2", learning_rate=0.05, optim="adamw_torch")
    if kind == "trained adapter":

        def model():
            torch.manual_seed(5)
            made = peft.get_peft_model(toy.model(), config)
            for n, p in made.named_parameters():
                if "lora_B" in n:
                    torch.nn.init.normal_(p, std=0.1)
            return made

        own, given = run(model=model(), **options), run(model=model(), ref_model=model(), **options)
        assert losses(own)[0] == pytest.approx(math.log(2), rel=1e-6)
    elif kind == "dropout":
        own = run(peft_config=peft.LoraConfig(**{**LORA, "lora_dropout": 0.3}), disable_dropout=False, **options)
        assert all(map(math.isfinite, losses(own)))
        return
    else:
        own = run(peft_config=config, **options)
        given = run(peft_config=config, ref_model=toy.model(), **options)
    assert losses(own) == pytest.approx(losses(given), rel=1e-5) and losses(own)[-1] < 0.98 * losses(own)[0]
    flags = {n for n, p in own.model.named_parameters() if p.requires_grad}
    assert flags and all("lora_" in n or "modules_to_save" in n for n in flags)


def test_reference_of_a_full_fine_tune(toy, run):
    """The weights as training began, which change places with the policy's; the same as a second model."""
    own, given = run(loss_type="tdpo1"), run(loss_type="tdpo1", ref_model=toy.model())
    assert losses(own) == losses(given) and torch.equal(weights(own.model), weights(given.model))
    ref = toy.model()
    tied = {"model": toy.model(tie_word_embeddings=True), "loss_type": "tdpo1", "gradient_checkpointing": True}
    assert losses(run(**tied))[-1] < math.log(2)
    narrow = run(model=toy.model().bfloat16(), loss_type="tdpo2", optim="adamw_torch", learning_rate=0.01)
    assert losses(narrow)[0] == pytest.approx(math.log(2), rel=1e-2) and losses(narrow)[-1] < math.log(2)
    before = weights(ref).clone()
    ref.train()
    run(loss_type="tdpo2", ref_model=ref, max_steps=1)
    assert ref.training and torch.equal(before, weights(ref))
    assert ref.config._attn_implementation != "fastpo" and ref(input_ids=torch.tensor([[3, 4]])).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["full", "ref_model", "lora", "sampo"])
def test_a_resumed_run_is_the_same(toy, run, tmp_path, kind):
    """Bit for bit: the reference is that of the start, not of the checkpoint; SamPO's draws are those of the steps."""
    import peft

    folder = tmp_path / "run"
    options = dict(loss_type="sampo" if kind == "sampo" else "tdpo2", optim="adamw_torch", learning_rate=0.01,
                   max_steps=6, save_steps=3)  # fmt: skip
    if kind == "lora":
        options["peft_config"] = peft.LoraConfig(**LORA)

    def ref():
        return {"ref_model": toy.model(seed=1)} if kind == "ref_model" else {}

    whole = run(output_dir=str(folder), **options, **ref())
    again = run(output_dir=str(folder), resume_from_checkpoint=str(folder / "checkpoint-3"), **options, **ref())
    assert torch.equal(weights(whole.model), weights(again.model))
    assert losses(whole) == losses(again)
    if kind in ("full", "ref_model"):
        other = {"model": toy.model(seed=2)} if kind == "full" else {}
        rest = {"ref_model": toy.model(seed=2)} if kind == "ref_model" else {}
        with pytest.raises(ConfigError, match="was trained against another reference|another model"):
            run(output_dir=str(folder), resume_from_checkpoint=str(folder / "checkpoint-3"), **options, **other, **rest)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"ld_alpha": 0.3}, {"use_weighting": True}], ids=str)
def test_three_steps_as_trl(toy, tmp_path, options):
    """TRL's own trainer on the same rows: losses of three steps, and an evaluation after them."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows, tokenizer = toy.rows(24), toy.tokenizer()
    tokenizer.truncation_side = "right"
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, per_device_train_batch_size=8, max_steps=3,
        learning_rate=0.01, lr_scheduler_type="constant", logging_steps=1, report_to="none", save_strategy="no",
        optim="adamw_torch", disable_tqdm=True, gradient_checkpointing=False, beta=0.3, seed=42, **options,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=toy.model(),
        ref_model=toy.model(),
        args=args,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    args.output_dir = str(tmp_path / "fastpo")
    ours = fastpo.train(toy.model(), rows, processing_class=toy.tokenizer(), args=args, save_final=False, report=False)
    assert ours.log_history and losses(ours)[:3] == pytest.approx(theirs, rel=2e-4)  # TRL rounds what it logs
    # 0.3 is dpo's beta here, not wpo's own 0.01
    assert theirs[0] == pytest.approx(math.log(2), abs=1e-3) or "use_weighting" in options


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_autocast_keeps_the_two_apart(toy, run, adapter):
    """Autocast remembers a weight's cast by its tensor, which is the policy's and the reference's in turn."""
    import peft

    options = dict(loss_type="tdpo2", bf16=True, learning_rate=0.5, max_steps=6)
    if adapter:
        options |= {"peft_config": peft.LoraConfig(**LORA, modules_to_save=["lm_head"]), "learning_rate": 0.2}
    own, given = run(**options), run(ref_model=toy.model(), **options)
    assert losses(own) == pytest.approx(losses(given), rel=1e-6) and losses(own)[-1] < losses(own)[0] - 0.005


def test_weights_are_exchanged_not_copied(toy):
    model = toy.model()
    parameters = dict(model.named_parameters())
    exchange = live_reference.Exchange(parameters)
    before = {n: p.data_ptr() for n, p in parameters.items()}
    start = weights(model).clone()
    with torch.no_grad():
        for p in parameters.values():
            p.add_(1.0)
    with exchange.in_place(model):
        assert torch.equal(weights(model), start)
    assert torch.equal(weights(model), start + 1) and before == {n: p.data_ptr() for n, p in parameters.items()}


def test_draws():
    """As many tokens of both, in order, of the longer one at random; the same in any batch, others in another step."""

    def example(*lengths, pairs=((0, 1),)):
        responses = tuple(np.arange(n) for n in lengths)
        return Example(np.arange(3), responses, tuple(pairs))

    examples = [example(4, 9), example(7, 7), example(12, 5, 8, pairs=((0, 1), (2, 0)))]
    offsets = collate(examples, [0, 1, 2]).response_offsets.tolist()
    drawn = draw_rows(examples, [0, 1, 2], 42, 1, 3).tolist()
    parts, at = [], 0
    for n in (4, 4, 7, 7, 5, 5, 8, 8):
        parts.append(drawn[at : at + n])
        at += n
    assert at == len(drawn) and all(part == sorted(set(part)) for part in parts)
    within = [0, 1, 2, 3, 4, 5, 6, 4]  # the responses of the pairs, in order
    for part, k in zip(parts, within):
        assert offsets[k] <= part[0] and part[-1] < offsets[k + 1]
    assert parts[0] == [0, 1, 2, 3] and parts[2] == list(range(13, 20))
    alone = draw_rows(examples, [2], 42, 1, 3).tolist()
    assert [i + offsets[4] for i in alone] == [i for part in parts[4:] for i in part]
    assert (
        draw_rows(examples, [0, 1, 2], 42, 1, 4).tolist() != drawn != draw_rows(examples, [0, 1, 2], 7, 1, 3).tolist()
    )
    counts = np.zeros(9)
    for step in range(900):
        counts[[i - 4 for i in draw_rows(examples, [0], 0, 1, step).tolist()[4:]]] += 1
    assert (abs(counts - 400) < 60).all()  # 4 of 9, four standard deviations


def test_tails_of_responses_in_several_pairs(toy):
    example = Example(np.arange(3), tuple(np.arange(n) for n in (6, 4, 9)), ((0, 1), (2, 0), (1, 2)))
    logps = [[np.random.default_rng(k).normal(size=len(r)).astype(np.float32) for k, r in enumerate(example.responses)]]
    batch = collate([example], [0], logps)
    logp = torch.randn(19, requires_grad=True)
    (term,) = resolve_terms(["ld_dpo"])
    x = term_inputs(term, pair_inputs(logp, batch), logp, batch)
    a, b, c = logp.split([6, 4, 9])
    torch.testing.assert_close(x.chosen_tail_logps, torch.stack([a[4:].sum(), c[6:].sum(), logp.new_zeros(())]))
    torch.testing.assert_close(x.rejected_tail_logps, torch.stack([logp.new_zeros(()), a[6:].sum(), c[4:].sum()]))
    assert x.ref_rejected_tail_logps[2].item() == pytest.approx(float(logps[0][2][4:].sum()), rel=1e-5)
    x.chosen_tail_logps.sum().backward()
    assert logp.grad.tolist() == [0.0] * 4 + [1.0] * 2 + [0.0] * 10 + [1.0] * 3


def test_what_is_refused(toy, run):
    sums = [row | {"ref_chosen_logps": -20.0, "ref_rejected_logps": -21.0} for row in toy.rows(8)]
    for name in ("ld_dpo", "sampo", ["dpo", "sampo"]):
        with pytest.raises(DataError, match="reference's log-probability of every token, and ref_chosen_logps"):
            run(sums, loss_type=name)
    for name in ("tdpo2", ["dpo", "tdpo2"]):
        with pytest.raises(DataError, match="tdpo2 needs the reference's logits: drop the columns"):
            run(sums, loss_type=name)
    assert math.isfinite(losses(run(sums, loss_type="wpo", max_steps=1))[0])  # sums are enough
    assert math.isfinite(losses(run(sums, loss_type="sampo", max_steps=1, ref_model=toy.model(seed=1)))[0])
    with pytest.raises(ConfigError, match="tdpo1 keeps its reference in memory.*leave sync_ref_model out"):
        run(loss_type="tdpo1", sync_ref_model=True)
    with pytest.raises(ConfigError, match="tdpo2 keeps its reference in memory, whole on every rank: leave fsdp out"):
        live_reference.check(TrainConfig(fsdp="full_shard"), resolve_terms(["dpo", "tdpo2"]))
    with pytest.raises(ConfigError, match="ref_model has 120 tokens and the model 100"):
        run(loss_type="tdpo2", ref_model=toy.model(vocab_size=120))
    model, sharing = toy.model(), toy.model()
    with pytest.raises(ConfigError, match="ref_model is the model that is trained"):
        run(loss_type="tdpo2", model=model, ref_model=model)
    sharing.lm_head.weight = model.lm_head.weight
    with pytest.raises(ConfigError, match="ref_model shares weights with the model"):
        run(loss_type="tdpo2", model=model, ref_model=sharing)
    assert losses(run(loss_type="sampo", sync_ref_model=True, ref_model_sync_steps=2))[-1] < math.log(2)


def test_data_seed_draws(run):
    """The draw hangs on the seed that orders the rows."""
    a, b, c = (
        losses(run(loss_type="sampo", train_sampling_strategy="sequential", max_steps=2, **seed))[1]
        for seed in ({}, {"data_seed": 42}, {"data_seed": 7})
    )
    assert a == b != c


def test_run_json_names_the_reference(toy, run, tmp_path):
    run(loss_type="tdpo2", output_dir=str(tmp_path / "r"), save_steps=2, max_steps=2)
    saved = json.loads((tmp_path / "r" / "checkpoint-2" / "run.json").read_text())
    assert saved["reference"] and not (tmp_path / "r" / "checkpoint-2" / "reference.safetensors").exists()
