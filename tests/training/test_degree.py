"""degree_aux: cross-entropy over degrees of rows that name it, by a head beside the model, added to a loss of pairs."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import fastpo
from fastpo import data
from fastpo.config.train_config import TrainConfig
from fastpo.data.packing import collate
from fastpo.errors import ConfigError, DataError
from fastpo.losses.table import LOSSES, resolve_terms
from fastpo.training.objective import Objective

BOTH = ["dpo", "degree_aux"]
KEYS = ("loss", "grad_norm", "rewards/margins", "degree/loss", "degree/accuracy", "eval_loss", "eval_degree/loss")


@pytest.fixture
def run(sgd_run):
    return partial(sgd_run, loss_type=BOTH, loss_weights=[1.0, 0.7], max_steps=3, learning_rate=0.2, beta=0.5)


def mixture(toy, degrees=4):
    """Pairs and rows of a degree; weights; a prompt that both have, and a chosen response that is of degree 0."""
    pairs = [row | {"loss": "dpo"} for row in toy.rows(6)]
    singles = [{"prompt": row["prompt"], "completion": row["chosen"], "degree": k % degrees, "loss": "degree_aux"}
               for k, row in enumerate(toy.rows(8, seed=9))]  # fmt: skip
    singles[0] |= {"prompt": pairs[0]["prompt"], "completion": pairs[0]["chosen"]}
    singles[1] |= {"prompt": pairs[0]["prompt"], "completion": pairs[0]["chosen"].rpartition(" ")[0]}
    rows = [row | {"weight": 0.5 + 0.25 * (i % 5)} for i, row in enumerate(pairs + singles)]
    return rows[::2] + rows[1::2]


def logged(result, key="loss"):
    return [line[key] for line in result.log_history if key in line]


def weights(result):
    return torch.cat([p.detach().flatten() for p in result.model.parameters()]).double()


# ------------------------------------------------------------------------------------------------ against plain PyTorch


def ids_of(toy, row, key):
    tokenizer = toy.tokenizer()
    start = len(tokenizer(row["prompt"])["input_ids"])
    return torch.tensor([tokenizer(row["prompt"] + row[key] + "<eos>")["input_ids"]]), start


def logp(toy, model, row, key):
    ids, start = ids_of(toy, row, key)
    logits = model(input_ids=ids).logits[0].log_softmax(-1)
    return logits[start - 1 : -1].gather(1, ids[0, start:, None]).sum()


@pytest.mark.parametrize("of_pairs, allowed", [(1.0, 2e-7), (0.0, 1e-13)])
def test_steps_of_plain_pytorch(toy, run, tmp_path, of_pairs, allowed):
    """The model's own forward, its last hidden state at the last token, a linear layer, cross_entropy: in fp64, but for
    the log-probabilities that the pairs' loss reads, which are fp32."""
    rows = mixture(toy)
    model, ref = toy.model().double(), toy.model(1).double()
    start = torch.randn(4, 32, generator=torch.Generator().manual_seed(42)) / 32**0.5
    head = torch.nn.Linear(32, 4).double()
    with torch.no_grad():
        head.weight.copy_(start), head.bias.zero_()
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.2)
    losses, of_degrees, right = [], [], []
    for _ in range(3):
        pairs, singles, plain, hits = [], [], [], []
        for row in rows:
            if row["loss"] == "degree_aux":
                hidden = model.model(input_ids=ids_of(toy, row, "completion")[0]).last_hidden_state[0, -1]
                logits = head(hidden)[None]
                of_row = torch.nn.functional.cross_entropy(logits, torch.tensor([row["degree"]]))
                singles.append(row["weight"] * of_row), plain.append(of_row.item())
                hits.append(logits.argmax().item() == row["degree"])
                continue
            own = [logp(toy, model, row, k) for k in ("chosen", "rejected")]
            with torch.no_grad():
                base = [logp(toy, ref, row, k) for k in ("chosen", "rejected")]
            delta = own[0] - base[0] - own[1] + base[1]
            pairs.append(-row["weight"] * torch.nn.functional.logsigmoid(0.5 * delta))
        loss = of_pairs * torch.stack(pairs).mean() + 0.7 * torch.stack(singles).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item()), of_degrees.append(sum(plain) / 8), right.append(sum(hits) / 8)
    out = tmp_path / "out"
    result = fastpo.train(
        toy.model().double(), rows, ref_model=toy.model(1).double(), processing_class=toy.tokenizer(),
        loss_type=BOTH, loss_weights=[of_pairs, 0.7], beta=0.5, max_steps=3, learning_rate=0.2, max_tokens=60,
        output_dir=str(out), use_cpu=True, bf16=False, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
        per_device_train_batch_size=100, logging_steps=1, disable_tqdm=True, report=False, save_strategy="no",
    )  # fmt: skip
    assert logged(result) == pytest.approx(losses, rel=1e-6)
    assert logged(result, "degree/loss") == pytest.approx(of_degrees, rel=1e-6)
    assert logged(result, "degree/accuracy") == pytest.approx(right)
    want = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(result), want, atol=allowed, rtol=0)
    saved = load_file(out / "degree_head.safetensors")
    assert set(saved) == {"weight", "bias"} and not torch.allclose(saved["weight"], start.double(), atol=1e-3)
    for name, p in head.named_parameters():
        torch.testing.assert_close(saved[name], p.detach(), atol=allowed, rtol=0)
    names = load_file(out / "model.safetensors")
    assert not any("degree" in name for name in names)


# ---------------------------------------------------------------------------------------------------- whatever the cuts


def test_packing_changes_nothing(toy, run):
    """A row's last token is its own, with a prompt shared by rows of both kinds, and a response that both have."""
    rows = mixture(toy)
    cuts = (
        {"per_device_train_batch_size": 7, "max_tokens": 100_000},
        {"per_device_train_batch_size": 7, "max_tokens": 1},
        {"per_device_train_batch_size": 7, "max_tokens": 64, "share_prompts": "always", "token_bucket": 16},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 7, "share_prompts": "never"},
    )
    more = dict(rest={"eval_dataset": rows[:9], "ref_model": toy.model(1)}, eval_steps=1, eval_strategy="steps")
    runs = [run(rows, **more, **cut) for cut in cuts]
    for other in runs[1:]:
        for key in KEYS:
            assert logged(runs[0], key)
            assert logged(other, key) == pytest.approx(logged(runs[0], key), rel=2e-5, abs=5e-6), key
        torch.testing.assert_close(weights(other), weights(runs[0]), atol=1e-6, rtol=1e-5)


def test_the_head_reads_the_last_token(toy):
    rows = mixture(toy)
    columns = {"dpo": ["weight"], "degree_aux": ["weight"]}
    examples, report = data.prepare_examples(rows, toy.tokenizer(), losses=columns, columns=["weight"], degrees=4)
    assert report.by_loss == {"dpo": 6, "degree_aux": 8}
    for share in (0, 1):
        for example in examples:
            example.whole, example.share_from = True, share
        batch = collate(examples, range(len(examples)))
        of_degrees = [e for e in examples if e.loss == "degree_aux"]
        at = batch.degrees[:, 0]
        assert batch.input_ids[at].tolist() == [e.responses[0][-1] for e in of_degrees] == [0] * 8
        assert batch.position_ids[at].tolist() == [len(e.prompt_ids) + len(e.responses[0]) - 1 for e in of_degrees]
        assert batch.degrees[:, 1].tolist() == [row["degree"] for row in rows if "degree" in row]
    alone = collate(examples[:1], [0])
    assert alone.degrees is None and alone.degree_weight is None


def test_rows_of_ids_and_of_k_responses(toy, run):
    """Token ids after prompt_ids, beside rows of K responses, are the texts that they are of; so are sets of either."""
    tokenizer = toy.tokenizer()
    pairs, singles = toy.kway_rows(4), [row for row in mixture(toy) if "degree" in row]
    texts = [row | {"loss": "dpo"} for row in pairs] + [
        {k: v for k, v in row.items() if k != "weight"} for row in singles
    ]
    exact = []
    for row in texts:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row.get("completion", "") + "<eos>")["input_ids"]
        ids = {"completion": whole[len(prompt) :]} if "completion" in row else {}
        exact.append(row | {"prompt_ids": prompt} | ids)
    one = [row | {"responses": [{"text": row["completion"]}], "completion": None} if "degree" in row else row
           for row in texts]  # fmt: skip
    apart = {"pairs": {"dataset": texts[:4]}, "answers": {"dataset": texts[4:]}}
    runs = [run(rows, rest={"ref_model": toy.model(1)}) for rows in (texts, exact, one, apart)]
    for other in runs[1:]:
        assert logged(other) == pytest.approx(logged(runs[0]), rel=1e-6)
        torch.testing.assert_close(weights(other), weights(runs[0]), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("loss", ["simpo", "tdpo1", "rpo"])
def test_beside_other_losses(toy, run, loss):
    """The first step's loss is the sum of both apart, whatever else the loss reads of the pass."""
    rows = [row | ({"loss": loss} if row["loss"] == "dpo" else {}) for row in mixture(toy)]
    rest = {"ref_model": toy.model(1)} if LOSSES[loss].reference else {}
    options = {"max_steps": 1, "loss_weights": None, "rest": rest}
    both = run(rows, loss_type=[loss, "degree_aux"], **options)
    alone = run([row for row in rows if row["loss"] == loss], loss_type=loss, **options)
    other = run(mixture(toy), rest={"ref_model": toy.model(1)}, max_steps=1)
    assert logged(both, "degree/loss") == pytest.approx(logged(other, "degree/loss"), rel=1e-5)
    weighted = logged(both)[0] - logged(alone)[0]
    dpo = run([row for row in mixture(toy) if row["loss"] == "dpo"], loss_type="dpo", max_steps=1, loss_weights=None,
              rest={"ref_model": toy.model(1)})  # fmt: skip
    assert weighted == pytest.approx((logged(other)[0] - logged(dpo)[0]) / 0.7, rel=1e-4)


def test_bf16_weights_and_adapters(toy, tmp_path):
    """The head is in fp32 whatever the model's weights, and is trained beside an adapter."""
    from peft import LoraConfig

    options = dict(loss_type=BOTH, max_steps=2, learning_rate=0.05, use_cpu=True, bf16=False, report=False,
                   disable_tqdm=True, per_device_train_batch_size=20, save_strategy="no")  # fmt: skip
    start = torch.randn(4, 32, generator=torch.Generator().manual_seed(42)) / 32**0.5
    for name, more in (("bf16", {}), ("lora", {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=2)})):
        model = toy.model().bfloat16() if name == "bf16" else toy.model()
        folder = tmp_path / name
        fastpo.train(model, mixture(toy), processing_class=toy.tokenizer(), output_dir=str(folder), **options, **more)
        saved = load_file(folder / "degree_head.safetensors")
        assert saved["weight"].dtype == torch.float32
        assert 0.01 < (saved["weight"] - start).abs().max() < 0.2
        assert (folder / "adapter_model.safetensors").exists() == (name == "lora")


# ---------------------------------------------------------------------------------------------------------- going on


def test_a_resumed_run_is_the_unbroken_one(toy, tmp_path):
    rows = mixture(toy)
    options = dict(loss_type=BOTH, max_steps=4, learning_rate=1e-2, use_cpu=True, bf16=False, report=False,
                   disable_tqdm=True, save_steps=2, per_device_train_batch_size=5, save_strategy="steps",
                   logging_steps=1, lr_scheduler_type="constant")  # fmt: skip

    def run(folder, **more):
        return fastpo.train(toy.model(), rows, processing_class=toy.tokenizer(), output_dir=str(folder),
                            **{**options, **more})  # fmt: skip

    whole, cut = run(tmp_path / "whole"), tmp_path / "cut"
    run(cut, max_steps=2)
    assert (cut / "checkpoint-2" / "degree_head.safetensors").exists()
    resumed = run(cut, resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert logged(resumed)[:4] == logged(whole)[:4]
    for file in ("degree_head.safetensors", "model.safetensors"):
        a, b = (load_file(folder / file) for folder in (cut, tmp_path / "whole"))
        assert all(torch.equal(a[name], b[name]) for name in a)
    fastpo.train(toy.model(), toy.rows(4), processing_class=toy.tokenizer(), output_dir=str(cut),
                 overwrite_output_dir=True, **{**options, "loss_type": "dpo", "save_strategy": "no"})  # fmt: skip
    assert not (cut / "degree_head.safetensors").exists()  # of another run


def test_an_evaluation_without_degrees(toy, run):
    """Pairs alone need not name a loss."""
    options = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    result = run(mixture(toy), **options, rest={"eval_dataset": toy.rows(3)})
    assert logged(result, "eval_loss") and not logged(result, "eval_degree/loss")
    best = {"metric_for_best_model": "eval_degree/loss", "load_best_model_at_end": True, "save_strategy": "steps"}
    with pytest.raises(ConfigError, match="metric_for_best_model"):
        run(mixture(toy), **options, **best, rest={"eval_dataset": toy.rows(3)})
    run(mixture(toy), **options, **best, save_steps=1, rest={"eval_dataset": mixture(toy)})


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "degree, found", [(4, "4"), (-1, "-1"), (1.5, "1.5"), (None, "None"), ("2", "'2'"), (True, "True")]
)
def test_a_degree_that_is_none(toy, run, degree, found):
    rows = mixture(toy)
    at = next(k for k, row in enumerate(rows) if row["loss"] == "degree_aux")
    rows[at] |= {"degree": degree}
    with pytest.raises(DataError, match=rf"row {at}: 'degree' must be a whole number from 0 to 3, not {found} \(degr"):
        run(rows)
    if degree == 4:
        assert logged(run(rows, loss_kwargs={"degrees": 5}, max_steps=1))
        run(rows, max_steps=1, invalid_rows="drop")


def test_rows_that_do_not_fit(toy, run):
    rows = mixture(toy)
    pairs = [row for row in rows if row["loss"] == "dpo"]
    with pytest.raises(DataError, match="no row names degree_aux in the column 'loss': degree_aux trains rows of"):
        run(pairs)
    with pytest.raises(DataError, match="no row names degree_aux"):
        run(toy.rows(4))
    with pytest.raises(DataError, match="no row names a loss of pairs in the column 'loss'"):
        run([row for row in rows if row["loss"] != "dpo"])
    with pytest.raises(DataError, match="row 6: 'completion' is None, and the row's loss is degree_aux"):
        run([*pairs, toy.rows(1)[0] | {"degree": 1, "loss": "degree_aux"}])


@pytest.mark.parametrize(
    "names, more, message",
    [
        (["degree_aux"], {}, "degree_aux is added to a loss of pairs"),
        (["sft", "degree_aux"], {}, "degree_aux is added to a loss of pairs"),
        (["kto", "degree_aux"], {}, "degree_aux is added to a loss of pairs"),
        (BOTH, {"degrees": 1}, "degrees must be a whole number from 2 to 64, not 1"),
        (BOTH, {"degrees": 2.5}, "degrees must be a whole number from 2 to 64, not 2.5"),
        (["dpo"], {"degrees": 3}, "degrees is set, but dpo does not read it"),
        (["reward", "degree_aux"], {}, "a loss of pairs|scalar head"),
    ],
)
def test_losses_that_do_not_go_together(names, more, message):
    with pytest.raises(ConfigError, match=message):
        resolve_terms(names, loss_kwargs=more)


def test_what_it_does_not_go_with(toy, run):
    with pytest.raises(ConfigError, match="degree_aux has a head beside the model, which fsdp does not split"):
        Objective.of_options(TrainConfig(output_dir="unused", loss_type=BOTH, fsdp="full_shard"))
    model = toy.model()
    with pytest.raises(ConfigError, match="degree_aux has a head that an optimiser made before does not step"):
        fastpo.train(model, mixture(toy), processing_class=toy.tokenizer(), loss_type=BOTH, output_dir="unused",
                     optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None), use_cpu=True)  # fmt: skip
    rows = [row | {"loss": "aot"} if row["loss"] == "dpo" else row for row in mixture(toy)]
    with pytest.raises(ConfigError, match="aot reads a number of the whole step"):
        run(rows, loss_type=["aot", "degree_aux"])


def test_muon_leaves_the_head_to_adamw(toy, run, tmp_path):
    start = torch.randn(4, 32, generator=torch.Generator().manual_seed(42)) / 32**0.5
    folder = str(tmp_path / "muon")
    run(mixture(toy), optim="muon", max_steps=1, learning_rate=0.01, save_final=True, output_dir=folder)
    saved = load_file(f"{folder}/degree_head.safetensors")
    assert (saved["weight"] - start).abs().max() == pytest.approx(0.01, rel=1e-2)
