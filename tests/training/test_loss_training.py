"""Each loss that `fastpo.train` can feed trains a toy model: its start is the closed form, and it falls."""

import math
from types import SimpleNamespace

import pytest
import torch

import fastpo
from fastpo.errors import ConfigError, DataError
from fastpo.losses.table import LOSSES, Term

# Of language models; test_reward_model.py has the other.
TRAINABLE = [
    name for name, loss in LOSSES.items() if not loss.online and loss.shape not in ("scores", "degrees", "tokens")
]
LN2 = math.log(2)


def rows_with_probabilities(toy, count=16):
    """Pairs with all that any loss reads; the reference's greedy response is the rejected one every other time."""
    extra = toy.rows(count, seed=1)
    return [
        row | {"win_prob": 0.55 + 0.4 * i / count, "chosen_score": 0.7, "rejected_score": 0.4,
               "greedy": row["rejected"] if i % 2 else extra[i]["chosen"]}
        for i, row in enumerate(toy.rows(count))
    ]  # fmt: skip


@pytest.fixture
def run(toy, tmp_path):
    count = iter(range(100))

    def call(rows=None, **options):
        defaults = dict(
            output_dir=str(tmp_path / f"run{next(count)}"), disable_tqdm=True, use_cpu=True, bf16=False,
            logging_steps=1, max_steps=3, per_device_train_batch_size=16, learning_rate=1e-3,
            lr_scheduler_type="constant", gradient_checkpointing=False, save_final=False,
            report=False, save_strategy="no",
        )  # fmt: skip
        rows = rows_with_probabilities(toy) if rows is None else rows
        ref_model = options.pop("ref_model", None)
        args = {**defaults, **options}
        return fastpo.train(toy.model(), rows, processing_class=toy.tokenizer(), ref_model=ref_model, args=args)

    return call


def sums(toy, rows):
    """Log-probabilities, lengths and sums of log sum_v p^2 of the untrained model, one row at a time, in fp64; of the
    prompts too, from their second token on."""
    model, tokenizer = toy.model().double(), toy.tokenizer()

    @torch.no_grad()
    def of(prompt, response):
        ids = tokenizer(prompt + response + "<eos>")["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        logp = logits[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None])
        prompt_logp = logits[: start - 1].gather(1, torch.tensor(ids[1:start])[:, None])
        length, prompt_length = (torch.tensor(float(len(part))).double() for part in (logp, prompt_logp))
        return logp.sum(), length, (2 * logits[start - 1 : -1]).logsumexp(-1).sum(), prompt_logp.sum(), prompt_length

    sides = [zip(*(of(r["prompt"], r[k]) for r in rows), strict=True) for k in ("chosen", "rejected")]
    (lw, nw, qw, lp, np), (ll, nl, ql, _, _) = ([torch.stack(part) for part in side] for side in sides)
    p = torch.tensor([r["win_prob"] for r in rows]).double()
    return SimpleNamespace(lw=lw, ll=ll, nw=nw, nl=nl, qw=qw, ql=ql, p=p, lp=lp, np=np)


def s(u):
    return torch.sigmoid(u)


LIKE_DPO = (
    "dpo", "cdpo", "robust", "dpo_soft", "dpop", "fdpo", "gpo_logistic", "dno", "dno_prct", "dno_reg", "sigmoid_norm",
    "ld_dpo", "sampo", "tdpo1", "tdpo2", "infonca", "selm",
)  # fmt: skip

# The mean loss where the policy is the reference, or of a policy without one. NLLs are means over the step's tokens.
START = {
    **dict.fromkeys(LIKE_DPO, lambda v: LN2),
    **dict.fromkeys(("aot", "aot_unpaired", "bco"), lambda v: LN2), "kto": lambda v: 0.5,
    "apo_zero_unpaired": lambda v: 0.5,
    "ipo": lambda v: 25.0, "hinge": lambda v: 1.0, "gpo_hinge": lambda v: 1.0, "gpo_exp": lambda v: 1.0,
    "gpo_sq": lambda v: 1.0, "gpo_tquad": lambda v: 1.0, "gpo_savage": lambda v: 0.25,
    "rdpo": lambda v: torch.log(1 + torch.exp(-0.01 * (v.nw - v.nl))).mean(),
    "exo_rw": lambda v: -LN2 - 0.5 * float(torch.log_softmax(torch.tensor([1.4, 0.8]).double(), 0).sum()),
    "nca_rw": lambda v: 2 * LN2,
    "exo_pair": lambda v: 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001),
    "nca_pair": lambda v: 2 * LN2, "bco_pair": lambda v: 2 * LN2, "apo_zero": lambda v: 1.0, "apo_down": lambda v: 1.0,
    "discopop": lambda v: 0.5 * LN2 + 0.5,
    "rpo": lambda v: LN2 - 0.005 * v.lw.sum() / v.nw.sum(),
    "cpo": lambda v: -torch.log(s(0.1 * (v.lw - v.ll))).mean() - v.lw.sum() / v.nw.sum(),
    "cpo_hinge": lambda v: (1 - 0.1 * (v.lw - v.ll)).clamp(min=0).mean() - v.lw.sum() / v.nw.sum(),
    "cpo_ipo": lambda v: ((v.lw / v.nw - v.ll / v.nl - 5) ** 2).mean() - v.lw.sum() / v.nw.sum(),
    "slic": lambda v: (1 - v.lw + v.ll).clamp(min=0).mean() - 0.1 * v.lw.sum() / v.nw.sum(),
    "simpo": lambda v: -torch.log(s(2 * (v.lw / v.nw - v.ll / v.nl) - 1)).mean(),
    "cpo_simpo": lambda v: (
        -torch.log(s(10 * (v.lw / v.nw - v.ll / v.nl) - 5.4)).mean() - 0.05 * v.lw.sum() / v.nw.sum()
    ),
    "orpo": lambda v: LOSSES["orpo"](
        v.lw, v.ll, chosen_len=v.nw, rejected_len=v.nl, prompt_logps=v.lp, prompt_len=v.np
    ).mean(),
    "alphapo": lambda v: LOSSES["alphapo"](v.lw, v.ll, chosen_len=v.nw, rejected_len=v.nl).mean(),
    "sppo": lambda v: 1e6 * ((v.p - 0.5) ** 2).mean(), "sppo_single": lambda v: 1e6 * ((v.p - 0.5) ** 2).mean(),
    "sppo_hard": lambda v: 2 * 500.0**2, "inpo": lambda v: 100.0**2,
    "wpo": lambda v: LN2 * torch.exp((v.lw - v.qw) / v.nw + (v.ll - v.ql) / v.nl).clamp(max=1).mean(),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINABLE)
def test_three_steps(toy, run, name):
    result = run(loss_type=name, per_device_train_batch_size=32)  # all rows, of each response apart too
    losses = [line["loss"] for line in result.log_history if "loss" in line]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert losses[0] == pytest.approx(float(START[name](sums(toy, rows_with_probabilities(toy)))), rel=2e-5)
    assert losses[0] > losses[1] > losses[2]
    assert all(math.isfinite(v) for v in result.metrics.values()) and result.metrics["skipped_steps"] == 0


def test_every_trainable_loss_has_its_start_here():
    assert set(START) == set(TRAINABLE)


@pytest.mark.parametrize("name", ["cpo", "rpo", "slic", "orpo", "sppo_single", "rdpo"])
def test_packing_changes_nothing(run, name):
    """One micro-batch or sixteen: NLLs are means over the step's tokens."""
    runs = [run(loss_type=name, max_tokens=budget, optim="sgd") for budget in (10_000, 1)]
    a, b = ([line["loss"] for line in r.log_history if "loss" in line] for r in runs)
    assert a == pytest.approx(b, rel=1e-5)


def test_mixtures(toy, run):
    """A weighted sum of losses, one of them with an NLL, starts at the weighted sum of their starts."""
    v = sums(toy, rows_with_probabilities(toy))
    result = run(loss_type=["dpo", "cpo", "sft"], loss_weights=[1.0, 0.5, 2.0], max_steps=1,
                 loss_kwargs={"cpo_alpha": 0.25})  # fmt: skip
    nll = -v.lw.sum() / v.nw.sum()
    expected = LN2 - 0.5 * torch.log(s(0.1 * (v.lw - v.ll))).mean() + (0.5 * 0.25 + 2) * nll
    assert result.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


NLL = {
    "token_mean": lambda v, w: -(w * v.lw).sum() / v.nw.sum(),
    "seq_mean": lambda v, w: -(w * v.lw / v.nw).mean(),
    "seq_sum": lambda v, w: -(w * v.lw).mean(),
}


@pytest.mark.parametrize("reduction", NLL)
def test_the_three_reductions_of_an_nll(toy, run, reduction):
    """Of sft and of a loss's own, with pairs of different weight, for any packing and accumulation."""
    rows = [row | {"weight": 0.5 + i % 3} for i, row in enumerate(rows_with_probabilities(toy))]
    v, w = sums(toy, rows), torch.tensor([row["weight"] for row in rows]).double()
    nll = NLL[reduction](v, w)
    kwargs = {"nll_reduction": reduction}
    logistic = (-w * torch.log(s(0.1 * (v.lw - v.ll)))).mean()
    cases = {("sft",): nll, ("dpo", "sft"): (LN2 * w).mean() + nll, ("cpo",): logistic + nll}
    for names, expected in cases.items():
        runs = [
            run(rows, loss_type=list(names), loss_kwargs=kwargs, optim="sgd", max_steps=2, **options)
            for options in (
                {"max_tokens": 10_000},
                {"max_tokens": 1},
                {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "max_tokens": 70},
            )
        ]
        first, *others = ([line["loss"] for line in r.log_history if "loss" in line] for r in runs)
        assert first[0] == pytest.approx(float(expected), rel=1e-5)
        assert all(other == pytest.approx(first, rel=1e-5) for other in others)


def weigh(toy, rows, weight):
    """The rows with `weight(k)` as the weight of a response's k-th token."""
    out = [dict(row) for row in rows]
    for row in out:
        for side in ("chosen", "rejected"):
            row[f"{side}_token_weights"] = [weight(k) for k in range(len(row[side].split()) + 1)]
    return out


TOKEN_WEIGHTED = ("dpo", "simpo", "ipo", "rpo", "inpo", ["dpo", "sft"])


@pytest.mark.parametrize("name", TOKEN_WEIGHTED, ids=str)
def test_token_weights(toy, run, name):
    """A token of weight w counts as w tokens: in sums, lengths and NLLs, of policy and reference."""
    rows, models = rows_with_probabilities(toy), (toy.model(), toy.model(1))
    options = dict(loss_type=name, optim="sgd", learning_rate=1e-4, max_steps=2)

    def losses(rows, **more):
        ref = {"ref_model": models[1]} if name != "simpo" else {}
        return [line["loss"] for line in run(rows, **options, **ref, **more).log_history if "loss" in line]

    plain = losses(rows)
    assert losses(weigh(toy, rows, lambda k: 1)) == pytest.approx(plain, rel=1e-6)
    weight = lambda k: (0.5, 2.0, 0.0)[k % 3]  # noqa: E731
    got = losses(weigh(toy, rows, weight))
    assert losses(weigh(toy, rows, weight), max_tokens=1) == pytest.approx(got, rel=1e-5)
    assert got[0] != pytest.approx(plain[0], rel=1e-4)
    (l_w, n_w), (l_l, n_l) = (weighted_sums(toy, models[0], rows, k, weight) for k in ("chosen", "rejected"))
    (r_w, _), (r_l, _) = (weighted_sums(toy, models[1], rows, k, weight) for k in ("chosen", "rejected"))
    given = dict(chosen_len=n_w, rejected_len=n_l, prev_chosen_logps=l_w, prev_rejected_logps=l_l)  # the start
    first, sft = (name, 0) if isinstance(name, str) else (name[0], -l_w.sum() / n_w.sum())
    expected = LOSSES[first](l_w, l_l, r_w, r_l, **given).mean() + sft
    assert got[0] == pytest.approx(float(expected), rel=1e-5)


def weighted_sums(toy, model, rows, side, weight):
    """Weighted log-probabilities and lengths of one side, in fp64."""
    tokenizer, sums_, lengths = toy.tokenizer(), [], []
    for row in rows:
        ids = tokenizer(row["prompt"] + row[side] + "<eos>")["input_ids"]
        start = len(tokenizer(row["prompt"])["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        logp = logits[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
        w = torch.tensor([weight(k) for k in range(len(logp))]).double()
        sums_.append((w * logp).sum())
        lengths.append(w.sum())
    return torch.stack(sums_), torch.stack(lengths)


@pytest.mark.parametrize("reduction", ["seq_mean", "seq_sum"])
def test_token_weights_in_the_reductions_of_sft(toy, run, reduction):
    rows, weight = toy.rows(8), lambda k: 0.5 + k % 2
    lw, nw = weighted_sums(toy, toy.model(), rows, "chosen", weight)
    loss = run(weigh(toy, rows, weight), loss_type="sft", loss_kwargs={"nll_reduction": reduction}, max_steps=1)
    expected = -(lw / nw).mean() if reduction == "seq_mean" else -lw.mean()
    assert loss.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_token_weights_that_cannot_be(toy, run):
    rows = weigh(toy, toy.rows(4), lambda k: 1.0)
    cases = [
        ({"chosen_token_weights": [1.0]}, r"row 0: 'chosen_token_weights' has 1 numbers and the response \d+ tokens"),
        ({"chosen_token_weights": [0, 0]}, "row 0: .*'chosen_token_weights' must be a list of .* not all 0, not"),
        ({"rejected_token_weights": [-1.0]}, "must be a list of numbers from 0 to 1e.09, not all 0"),
        ({"rejected_token_weights": "1"}, "must be a list of numbers from 0"),
        ({"rejected_token_weights": [math.nan]}, "must be a list of numbers from 0"),
        ({"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0}, "are sums, which neither chosen_token_weights nor"),
    ]  # fmt: skip
    for change, message in cases:
        every = [row | change for row in rows] if "ref_chosen_logps" in change else [rows[0] | change, *rows[1:]]
        with pytest.raises(DataError, match=message) as caught:
            run(every)
        assert "\n" not in str(caught.value)
    one = [{k: v for k, v in row.items() if k != "rejected_token_weights"} for row in rows]
    with pytest.raises(DataError, match="'chosen_token_weights' needs 'rejected_token_weights' beside it"):
        run(one)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_token_weights_are_truncated_with_the_tokens(toy, mode):
    from fastpo.data import prepare_examples

    rows = weigh(toy, toy.rows(30), float)
    examples, report = prepare_examples(rows, toy.tokenizer(), max_length=10, truncation_mode=mode)
    assert report.truncated and examples
    if mode == "keep_start":  # the first token has weight 0
        assert report.dropped["no token of weight is left after truncation"] > 0
    for number, e in zip(report.kept_rows, examples, strict=True):
        for side, ids, got in zip(("chosen", "rejected"), e.responses, e.token_weights, strict=True):
            whole = rows[number][f"{side}_token_weights"]
            assert got.tolist() == (whole[-len(ids) :] if mode == "keep_end" else whole[: len(ids)])


def test_sft_on_completions_by_sequence(toy, run):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in toy.rows(16)]
    v = sums(toy, rows_with_probabilities(toy))
    for reduction, expected in NLL.items():
        result = run(rows, loss_type="sft", loss_kwargs={"nll_reduction": reduction}, max_steps=1)
        assert result.log_history[0]["loss"] == pytest.approx(float(expected(v, torch.ones(16))), rel=1e-5)
    with pytest.raises(ConfigError, match="sft: nll_reduction must be one of token_mean, seq_mean, seq_sum, not 'sum'"):
        run(rows, loss_type="sft", loss_kwargs={"nll_reduction": "sum"})


def test_options_reach_the_loss(run):
    js = run(loss_type="sigmoid", f_divergence_type="js_divergence", max_steps=2).log_history[1]["loss"]
    fdpo = run(loss_type="fdpo", max_steps=2).log_history[1]["loss"]
    dpo = run(loss_type="dpo", max_steps=2).log_history[1]["loss"]
    assert js == fdpo != dpo
    blends = [run(loss_type="discopop", max_steps=2, discopop_tau=tau).log_history[1]["loss"] for tau in (0.05, 0.5)]
    assert blends[0] != blends[1]
    no_length = run(loss_type="rdpo", loss_kwargs={"alpha": 0.0}, max_steps=1).log_history[0]["loss"]
    assert no_length == pytest.approx(LN2, rel=1e-6)


def test_what_is_refused(toy, run):
    with pytest.raises(ConfigError, match="online_ipo needs pairs sampled .* does not carry yet"):
        run(loss_type="online_ipo")
    with pytest.raises(DataError, match="loss_type='sppo_single' needs the column 'win_prob'"):
        run(toy.rows(4), loss_type="sppo_single")
    both = [row | {"win_prob_chosen": 0.8, "win_prob_rejected": 0.1} for row in toy.rows(4)]
    with pytest.raises(DataError, match="loss_type='dpo_soft' needs the column 'win_prob'"):
        run(both, loss_type="dpo_soft")
    with pytest.raises(ConfigError, match="gamma is set, but dpo does not read it"):
        run(loss_type="dpo", loss_kwargs={"gamma": 1.0})
    with pytest.raises(ConfigError, match="loss_kwargs must be a mapping"):
        run(loss_type="dpo", loss_kwargs=[1])


def test_win_probabilities_that_contradict_each_other(toy, run):
    """A pair in both orders, or a response in two rows; rounding to two decimals is no contradiction."""
    row, other = toy.rows(2)
    swapped = row | {"chosen": row["rejected"], "rejected": row["chosen"]}

    def soft(p, q, second=swapped):
        return [row | {"win_prob": p}, other | {"win_prob": 0.5}, second | {"win_prob": q}]

    for rows in (soft(0.7, 0.4), soft(0.7, 0.6, row)):
        with pytest.raises(DataError, match=r"rows 0 and 2 contradict .* 0.7 by .* 0.6 by .*\(win_prob\)") as caught:
            run(rows, loss_type="dpo_soft")
        assert "\n" not in str(caught.value)
    for rows in (soft(0.7, 0.3), soft(0.67, 0.34), soft(0.7, 0.7, row)):
        run(rows, loss_type="dpo_soft", max_steps=1)
    run(soft(0.7, 0.4), loss_type="dpo", max_steps=1)  # which reads none

    mixed = row | {"rejected": other["chosen"]}
    each = [row | {"win_prob_chosen": 0.8, "win_prob_rejected": 0.1}]
    each += [mixed | {"win_prob_chosen": 0.6, "win_prob_rejected": 0.1}]
    with pytest.raises(
        DataError, match=r"rows 0 and 1 .* previous policy with probability 0.8 by .* 0.6 by .*_chosen\)"
    ):
        run(each, loss_type="sppo")
    each[1]["win_prob_chosen"] = 0.8
    run(each, loss_type="sppo", max_steps=1)


def test_the_kernel_takes_what_it_knows_and_the_table_the_rest(monkeypatch):
    """The choice in Objective.of_pairs, without a GPU: a stand-in for the fused path notes what it is asked for.
    tests/ops/test_kernels_interpreter.py compares the two paths."""
    from fastpo.losses.table import Pairs
    from fastpo.training import metrics, objective
    from fastpo.training.stepwide import Statistics

    asked = []

    def fused(term, logp, batch):
        asked.append(term.name)
        return logp.sum() * 0, torch.full((9,), 7.0)

    x = Pairs(*(torch.full((2,), -float(k), requires_grad=k < 3) for k in range(1, 5)))
    given = []
    monkeypatch.setattr(objective, "fused_pair_loss", fused)
    monkeypatch.setattr(metrics, "choose_backend", lambda *_: "triton")
    monkeypatch.setattr(objective, "pair_inputs", lambda logp, batch: given.append(batch) or x)

    class OnGpu:
        """What the method asks of the log-probabilities."""

        new_zeros = staticmethod(torch.zeros)
        sum = staticmethod(lambda: torch.zeros(()))

    batch = SimpleNamespace(pair_weight=torch.ones(2), token_weight=None, label=None, losses=None)
    own = {"cpo_alpha": 0.3, "nll_reduction": "token_mean"}  # a term that the trainer never makes: the table has it
    taken = [Term("dpo", 1.0, LOSSES["dpo"], {"beta": 0.1}), Term("apo_zero", 1.0, LOSSES["apo_zero"], {"beta": 0.1})]
    left = Term("cpo", 1.0, LOSSES["cpo"], {"beta": 0.1, **own})
    x = x._replace(chosen_len=torch.ones(2), rejected_len=torch.ones(2))
    for terms in (taken, [left], [*taken, left], [left, *taken]):
        asked.clear()
        given.clear()
        total, sums = objective.Objective(terms).of_pairs(OnGpu(), batch, Statistics())
        assert asked == [t.name for t in terms if t is not left] and len(given) == (left in terms)
        assert (sums == 7).all().item() == (terms[0] is not left), "the metrics are the first term's"
        expected = left.loss.fn(x, **left.hyper).sum().item() if left in terms else 0.0
        assert total.item() == pytest.approx(expected)
