"""Each rule speaks on a history that has its disease, once, and not on healthy ones."""

import json
import math

import pytest

from fastpo import losses
from fastpo.config.train_config import TrainConfig
from fastpo.data import DataReport
from fastpo.training.guardrails import PUBLISHED_RATES, Guardrails, Warning_

LENGTH = 200  # tokens of a response
BIG = 8_000_000_000


def guards(loss_type="dpo", *, full=True, parameters=BIG, starts_at_reference=True, optimizer_given=False, **options):
    config = TrainConfig(loss_type=loss_type, **options)
    terms = losses.resolve_terms(
        config.losses, config.loss_weights, beta=config.beta, label_smoothing=config.label_smoothing,
        gamma_beta_ratio=config.gamma_beta_ratio, ipo_reduce=config.ipo_reduce, loss_kwargs=config.loss_kwargs,
    )  # fmt: skip
    return Guardrails(
        terms, config, full, starts_at_reference=starts_at_reference, parameters=parameters,
        optimizer_given=optimizer_given,
    )  # fmt: skip


def report(rows=10_000, **changes):
    return DataReport(
        rows=rows, kept=rows, responses=2 * rows, response_tokens=2 * rows * LENGTH, max_length=1024, **changes
    )


def feed(guard, lines, *, every=10):
    """What the guard says of `lines`, logged every so many steps: [(step, name), ...]."""
    said = []
    for number, line in enumerate(lines, start=1):
        said += [(w.step, w.name) for w in guard.check(number * every, line)]
    return said


def line(chosen, margin, *, loss=0.6, accuracy=0.7, norm=1.0, rate=1e-6, **more):
    """A log line of a run with a reference; `chosen` and `margin` are rewards."""
    return {
        "loss": loss, "grad_norm": norm, "learning_rate": rate, "rewards/chosen": chosen,
        "rewards/rejected": chosen - margin, "rewards/margins": margin, "rewards/accuracies": accuracy,
        "logps/chosen": -200 + 10 * chosen, "logps/rejected": -210 + 10 * (chosen - margin), **more,
    }  # fmt: skip


def healthy(steps=100):
    """DPO on 8B as published runs go: the chosen reward falls somewhat, the margin ends near 3."""
    for k in range(1, steps + 1):
        f = k / steps
        noise = 0.05 * math.sin(7.3 * k)
        yield line(-3 * f + noise, 3 * f + noise, loss=math.log(2) - 0.35 * f, accuracy=0.55 + 0.25 * f)


def test_a_healthy_run_hears_nothing():
    for full, rate in ((True, 5e-7), (False, 5e-5)):
        guard = guards(full=full, learning_rate=rate)
        assert guard.at_start({"train": report(truncated=900), "eval": report()}) == []
        assert feed(guard, healthy()) == []
        assert guard.warnings == []


# The log of `fastpo quickstart` (DPO, seed 0): step, loss, grad_norm, learning rate, chosen, accuracy, margin.
QUICKSTART = [
    (5, 0.679, 1.189, 3.3e-4, 0.011, 0.459, 0.030), (10, 0.603, 0.551, 4.7e-4, -0.057, 0.647, 0.235),
    (15, 0.531, 0.876, 4.3e-4, -0.322, 0.681, 0.541), (20, 0.528, 0.267, 3.8e-4, -0.759, 0.662, 0.657),
    (25, 0.536, 0.271, 3.3e-4, -0.887, 0.659, 0.783), (30, 0.538, 0.594, 2.9e-4, -1.039, 0.666, 0.837),
    (35, 0.524, 0.744, 2.4e-4, -1.158, 0.675, 0.885), (40, 0.527, 0.764, 1.9e-4, -1.158, 0.622, 0.872),
    (45, 0.463, 0.451, 1.5e-4, -1.118, 0.649, 0.986), (50, 0.477, 0.233, 1.0e-4, -1.167, 0.650, 1.034),
    (55, 0.516, 0.475, 5.6e-5, -1.218, 0.650, 0.922), (60, 0.483, 0.217, 9.3e-6, -1.087, 0.669, 1.082),
]  # fmt: skip


def test_the_quickstart_hears_nothing():
    guard = guards(beta=0.5, learning_rate=5e-4, parameters=500_000, per_device_train_batch_size=64)
    counts = DataReport(rows=2572, kept=2572, responses=5144, response_tokens=25_600, max_length=1024)
    assert guard.at_start({"train": counts}) == []
    for step, loss, norm, rate, chosen, accuracy, margin in QUICKSTART:
        assert guard.check(step, line(chosen, margin, loss=loss, norm=norm, rate=rate, accuracy=accuracy)) == []
    assert guard.check(60, {"train_loss": 0.53, "train_runtime": 3.8}) == []


# ---------------------------------------------------------------- at the start


@pytest.mark.parametrize("loss_type", sorted(PUBLISHED_RATES))
def test_learning_rate_far_above_the_papers(loss_type):
    published = PUBLISHED_RATES[loss_type][0]
    (warning,) = guards(loss_type, learning_rate=10 * published).at_start({"train": report()})
    assert warning.name == "learning_rate" and warning.step == 0
    assert f"{10 * published:g}" in warning.message and loss_type in warning.message
    assert guards(loss_type, learning_rate=5 * published).at_start({"train": report()}) == []


def test_every_loss_has_a_published_rate():
    """But a reward model's, which has no language to unlearn, a loss that is only added to another, and those per
    token, whose gradients are those of rewards."""
    others = ("scores", "degrees", "tokens")
    named = {n for n, loss in losses.LOSSES.items() if not loss.online and loss.shape not in others}
    assert set(PUBLISHED_RATES) == {*named, losses.SFT}
    assert guards("reward", learning_rate=1.0).at_start({"train": report()}) == []


def test_learning_rate_of_adapters_is_judged_by_their_own_scale():
    def names(rate, **options):
        guard = guards(options.pop("loss_type", "dpo"), learning_rate=rate, **options)
        return [w.name for w in guard.at_start({})]

    assert names(1e-4, full=False) == [] and names(1e-4) == ["learning_rate"]
    assert names(5e-4, full=False) == ["learning_rate"]
    assert names(5e-4, full=False, loss_type="sft") == []


def test_learning_rate_is_not_judged_where_nothing_is_published():
    for options in ({"parameters": 500_000}, {"optim": "sgd"}, {"optim": "muon"}, {"optimizer_given": True}):
        assert guards(learning_rate=1e-2, **options).at_start({}) == []
    assert guards(learning_rate=1e-2, parameters=None).at_start({})  # unknown: taken for a large one


def test_the_preference_loss_of_a_sum_decides_the_learning_rate():
    assert guards(["dpo", "sft"], loss_weights=[1, 0.1], learning_rate=2e-5).at_start({})


def test_most_rows_truncated():
    guard = guards()
    (warning,) = guard.at_start({"train": report(truncated=12_000, truncated_eos=11_000), "eval": report()})
    assert warning.name == "truncated_rows"
    assert "60% of the responses of the train data are cut at max_length 1024" in warning.message
    assert "11000 of them without their end" in warning.message and "eval" not in warning.message
    assert guard.at_start({"train": report(truncated=12_000)}) == []  # once
    assert "70% of the prompts" in guards().at_start({"train": report(truncated_prompts=7_000)})[0].message
    assert guards().at_start({"train": report(truncated=9_999)}) == []


# ---------------------------------------------------------------- in the run


def collapsing(beta=0.1, nats=1.2, steps=40):
    for k in range(1, steps + 1):
        f = k / steps
        yield line(-beta * nats * LENGTH * f, 6 * f)


def test_chosen_collapse():
    guard = guards()
    guard.at_start({"train": report()})
    ((step, name),) = feed(guard, collapsing())
    assert name == "chosen_collapse"
    # ln 2 of the 1.2 nats are gone after 58% of 40 lines, and the second line in a row counts.
    assert step == 250
    message = guard.warnings[0].message
    assert "0.75 nats a token" in message and "while the margin went from 0 to 3.75" in message
    assert "now 1e-06" in message and "loss_type=['dpo', 'sft']" in message
    guard = guards(["dpo", "sft"], loss_weights=[1, 0.1])
    guard.at_start({"train": report()})
    feed(guard, collapsing())
    assert guard.warnings[0].message.endswith("or raise the weight of sft")


def test_chosen_collapse_counts_nats_whatever_the_beta():
    for loss_type, beta in (("dpo", 0.01), ("sppo_hard", 0.001), ("ipo", 0.1)):
        guard = guards(loss_type, beta=beta)
        guard.at_start({"train": report()})
        margins_aside = [{**row, "rewards/margins": 0.1 * k * beta} for k, row in enumerate(collapsing(beta))]
        assert [name for _, name in feed(guard, margins_aside)] == ["chosen_collapse"], loss_type


def test_a_fall_before_the_first_line_shows_only_against_a_known_start():
    flat = [line(-0.1 * LENGTH, 5)] * 5  # one nat a token, all of it in the first ten steps
    guard = guards()
    guard.at_start({"train": report()})
    assert feed(guard, flat) == [(20, "chosen_collapse")]
    guard = guards(starts_at_reference=False)
    guard.at_start({"train": report()})
    assert feed(guard, flat) == []


def test_simpo_collapses_by_its_mean_log_probability():
    def lines(nats):
        return [line(2.0 * (-0.5 - nats * k / 20), 0.5 + k / 10, loss=1.2 - 0.02 * k) for k in range(21)]

    for nats, expected in ((0.5, []), (1.0, ["chosen_collapse"])):
        guard = guards("simpo", starts_at_reference=True)  # which a loss without reference does not heed
        guard.at_start({"train": report()})
        assert [name for _, name in feed(guard, lines(nats))] == expected


def test_a_diverging_run_is_named_as_such():
    guard = guards()
    guard.at_start({"train": report()})
    feed(guard, [line(-0.1 * LENGTH * k / 10, -0.5 * k) for k in range(1, 15)])
    assert "the margin has not grown (-4): the run diverges" in guard.warnings[0].message


@pytest.mark.parametrize(
    ("loss_type", "options", "silent", "loud"),
    [
        ("dpo", {}, 9.9, 10.1),
        ("dpo", {"label_smoothing": 0.2}, 3.4, 3.6),  # ln 2 / 0.2
        ("robust", {"label_smoothing": 0.2}, 9.9, 10.1),
        ("hinge", {}, 9.9, 10.1),
        ("simpo", {"beta": 10.0, "gamma_beta_ratio": 0.3}, 12.9, 13.1),
        ("ipo", {"ipo_reduce": "sum"}, 0.99, 1.01),
        ("ipo", {}, 0.99 * LENGTH, 1.01 * LENGTH),
        ("sppo", {}, 1.9, 2.1),
        ("sppo_hard", {}, 1.9, 2.1),
        ("sppo_single", {}, 1.9, 2.1),
        ("gpo_sq", {}, 1.9, 2.1),
        ("sigmoid_norm", {}, 10 * LENGTH - 1, 10 * LENGTH + 1),
        ("exo_pair", {"label_smoothing": 0.2}, 9.9, 10.1),
        ("cpo", {}, 1e3, math.inf),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v) if isinstance(v, dict) else str(v),
)
def test_margins_explode_on_the_losses_own_scale(loss_type, options, silent, loud):
    for margin, expected in ((silent, []), (loud, [(20, "margins_explode")])):
        if margin == math.inf:  # sums without a reference: their margin is anything at the start
            continue
        guard = guards(loss_type, **options)
        guard.at_start({"train": report()})
        assert feed(guard, [line(0.0, margin)] * 3) == expected


@pytest.mark.parametrize("loss_type", ["ipo", "sppo_hard"])
def test_squared_losses_are_back_at_their_start_at_the_limit(loss_type):
    """The claim behind the rule, on the losses themselves."""
    import torch

    loss = losses.LOSSES[loss_type]
    hyper = loss.hyper(**({"ipo_reduce": "sum"} if loss_type == "ipo" else {}))
    guard = guards(loss_type, **({"ipo_reduce": "sum"} if loss_type == "ipo" else {}))
    limit, _ = guard._margin_limit()
    half = torch.tensor([limit / hyper["beta"] / 2], dtype=torch.float64)
    zero = torch.zeros_like(half)
    at_limit, at_start = (loss(x, -x, zero, zero, **hyper) for x in (half, zero))
    assert torch.allclose(at_limit, at_start)


def test_one_outlier_is_no_explosion():
    guard = guards()
    assert feed(guard, [line(0, 1), line(0, 50), line(0, 1), line(0, 50), line(0, 1)]) == []


def test_perfect_accuracy_within_the_first_steps():
    guard = guards(per_device_train_batch_size=8)
    guard.at_start({"train": report()})
    assert feed(guard, [line(0, 1, accuracy=1.0)] * 3) == [(10, "perfect_at_start")]  # 80 pairs
    assert "the last 80 pairs at step 10" in guard.warnings[0].message


def test_perfect_accuracy_needs_enough_new_pairs_early():
    few = guards(per_device_train_batch_size=1)  # 50 pairs in 50 steps
    few.at_start({"train": report()})
    assert feed(few, [line(0, 1, accuracy=1.0)] * 20) == []
    again = guards(per_device_train_batch_size=8)  # a set of 64 rows: from step 9 on each pair has been seen
    again.at_start({"train": report(rows=64)})
    assert feed(again, [line(0, 1, accuracy=0.6), *[line(0, 1, accuracy=1.0)] * 10]) == []
    late = guards(per_device_train_batch_size=64)
    late.at_start({"train": report()})
    assert feed(late, [line(0, 1, accuracy=0.9)] * 5 + [line(0, 1, accuracy=1.0)] * 10) == []


def test_nothing_learnt():
    lines = [line(0.001 * math.sin(k), 0.001 * math.sin(k), loss=math.log(2) - 1e-4 * k) for k in range(1, 15)]
    guard = guards(full=False)
    assert feed(guard, lines) == [(70, "nothing_learnt")]  # 50 steps at the full rate, three lines in a row
    assert "adapters need about ten times more" in guard.warnings[0].message
    slow = guards(learning_rate=1e-6)  # a warm-up is no time to learn
    assert feed(slow, [{**row, "learning_rate": 1e-7} for row in lines]) == []
    moving = guards(sync_ref_model=True)  # rewards begin again at every move
    assert feed(moving, lines) == []


def test_a_small_change_of_a_large_loss_is_learning():
    """SPPO's targets are hundreds of nats away by design: its loss hardly falls while the policy moves."""
    lines = [line(0.0, 0.001 * k / 2, loss=250_000 * (1 - 1e-4 * k)) for k in range(1, 40)]
    assert feed(guards("sppo"), lines) == []


def test_nothing_learnt_without_reference():
    same = [line(-2.0, 0.3, loss=1.1 + 0.002 * math.sin(k), accuracy=0.6) for k in range(20)]
    assert [n for _, n in feed(guards("simpo"), same)] == ["nothing_learnt"]
    better = [{**row, "loss": 1.1 - 0.01 * k, "rewards/accuracies": 0.6 + 0.01 * k} for k, row in enumerate(same)]
    assert feed(guards("simpo"), better) == []
    sft = [{"loss": 2.0 + 0.001 * (k % 3), "grad_norm": 1.0, "learning_rate": 1e-6} for k in range(20)]
    assert [n for _, n in feed(guards("sft"), sft)] == ["nothing_learnt"]


def test_zero_gradient():
    assert feed(guards(), [line(0, 1, norm=0.0)] * 2) == [(20, "zero_gradient")]
    assert feed(guards(), [line(0, 1, norm=0.0), line(0, 1, norm=1e-9)] * 3) == []
    guard = guards("hinge")
    feed(guard, [line(0, 3, norm=0.0, loss=0.0)] * 2)
    assert "every pair is past the hinge's margin" in guard.warnings[0].message


def test_many_skipped_steps():
    guard = guards()
    rows = [line(-0.1 * k, 0.1 * k, loss=0.6 - 0.01 * k, skipped_steps=k) for k in range(1, 10)]
    assert feed(guard, rows) == [(30, "skipped_steps")]
    assert guard.warnings[0].message.startswith("3 of 30 steps had a non-finite loss")
    rare = [line(-0.1 * k, 0.1 * k, loss=0.6 - 0.01 * k, skipped_steps=3) for k in range(1, 10)]
    assert feed(guards(), [{**row, "skipped_steps": 0} for row in rare[:2]] + rare, every=100) == []


def test_a_window_of_skipped_steps_only_is_read():
    guard = guards()
    said = feed(guard, [{"loss": math.nan, "grad_norm": math.nan, "learning_rate": 1e-6, "skipped_steps": 10}])
    assert said == [(10, "skipped_steps")] and guard.start == {}


def test_lines_of_evaluations_and_of_the_end_are_ignored():
    guard = guards()
    bad = {"eval_loss": 5.0, "rewards/margins": 99.0, "grad_norm": 0.0}
    assert feed(guard, [bad] * 5) == [] and guard.state_dict() == guards().state_dict()


# ------------------------------------------------------------ once, and resume


def test_each_warning_once():
    guard = guards()
    said = feed(guard, [line(0, 99, norm=0.0)] * 50)
    assert sorted(name for _, name in said) == ["margins_explode", "zero_gradient"]
    assert [w.name for w in guard.warnings] == [name for _, name in said]


@pytest.mark.parametrize("cut", [1, 12, 24, 25, 30])
def test_a_resumed_run_warns_as_an_unbroken_one(cut):
    rows = [{**row, "grad_norm": 0.0 if k > 20 else 1.0} for k, row in enumerate(collapsing())]
    whole = guards(learning_rate=1e-5)
    whole.at_start({"train": report()})
    feed(whole, rows)
    first = guards(learning_rate=1e-5)
    first.at_start({"train": report()})
    feed(first, rows[:cut])
    second = guards(learning_rate=1e-5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.at_start({"train": report()}) == []
    for number, row in enumerate(rows[cut:], start=cut + 1):
        second.check(10 * number, row)
    assert second.warnings == whole.warnings and len(whole.warnings) == 3
    assert second.state_dict() == whole.state_dict()


def test_a_warning_reads_as_one_line():
    warning = Warning_("zero_gradient", 20, "the gradient is 0")
    assert str(warning) == "step 20: the gradient is 0 [zero_gradient]"
    assert str(Warning_("learning_rate", 0, "too high")) == "too high [learning_rate]"
    assert Warning_(**json.loads(json.dumps(warning.to_dict()))) == warning
    guard = guards(learning_rate=1e-3)
    guard.at_start({"train": report(truncated=19_000)})
    feed(guard, [line(-100, 99, norm=0.0, skipped_steps=9)] * 3)
    assert len(guard.warnings) == 6 and not any("\n" in str(w) for w in guard.warnings)
