"""Rewards of a step's responses: TRL's functions, models, scorers; what fails is left out and counted."""

import asyncio
import contextlib
import functools
import threading
import types

import numpy as np
import pytest
import torch

from fastpo.errors import ConfigError, TrainingError
from fastpo.online.rewards import UNJUDGED, Rewards
from fastpo.sampling.items import Response, Verdict
from fastpo.scoring.scoring import BaseScorer, FunctionScorer

NAN = float("nan")
CHAT = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


def responses(*texts):
    return [Response(text, token_ids=list(range(len(text)))) for text in texts]


ROWS = [{"prompt": "one", "answer": "1", "n": 1}, {"prompt": "two", "answer": "2", "n": 2}]
GROUPS = [responses("1", "22", "333"), responses("2", "1", "4444")]


def length(completions, **kwargs):
    return [len(text) for text in completions]


def judge(*functions, rows=ROWS, groups=GROUPS, state=None, **options):
    with Rewards(list(functions), **options) as rewards:
        return rewards(rows, groups, state)


# ---- what a function is given


def test_it_is_called_as_trl_calls_it():
    seen = []

    def f(prompts, completions, completion_ids, answer, n, trainer_state, log_extra, log_metric, **rest):
        seen.append((prompts, completions, completion_ids, answer, n, trainer_state, rest))
        log_extra("seen", [p + c for p, c in zip(prompts, completions)])
        log_metric("m", 2)
        log_metric("m", 4.0)
        return [float(c == a) for c, a in zip(completions, answer)]

    rows = [{**row, "completion": "x", "completion_ids": "y", "prompts": "z", "log_extra": 0} for row in ROWS]
    judged = judge(f, rows=rows, state="the state")
    [(prompts, completions, ids, answer, n, state, rest)] = seen
    assert prompts == ["one"] * 3 + ["two"] * 3 and completions == ["1", "22", "333", "2", "1", "4444"]
    assert ids == [[0], [0, 1], [0, 1, 2], [0], [0], [0, 1, 2, 3]]
    assert answer == ["1"] * 3 + ["2"] * 3 and n == [1, 1, 1, 2, 2, 2] and state == "the state" and rest == {}
    assert judged.values.tolist() == [[1.0], [0.0], [0.0], [1.0], [0.0], [0.0]] and judged.values.dtype == np.float64
    assert judged.used.all() and not judged.left_out and judged.line() == ""
    assert judged.logged == {"m": 3.0} and judged.extra == {
        "seen": ["one1", "one22", "one333", "two2", "two1", "two4444"]
    }


def test_turns_are_given_as_turns():
    seen = {}

    def f(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        prompts[0][0]["content"] = "changed"
        return [0.0] * len(prompts)

    rows = [{"prompt": [{"role": "user", "content": "hi"}], "answer": 1}]
    judge(f, rows=rows, groups=[responses("a", "b")])
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in "ab"]
    assert seen["prompts"][1] == [{"role": "user", "content": "hi"}]
    assert rows[0]["prompt"] == [{"role": "user", "content": "hi"}]


def test_columns_that_only_some_rows_have_are_none_in_the_others():
    def f(completions, level, **kwargs):
        return [0.0 if x is None else x for x in level]

    assert judge(f, rows=[{"prompt": "a", "level": 3.0}, {"prompt": "b"}]).values[:, 0].tolist() == [3] * 3 + [0] * 3


def test_a_column_that_is_needed_is_asked_for_by_name():
    def f(completions, solution):
        return [0.0] * len(completions)

    rewards = Rewards(f)
    rewards.check(["prompt", "solution"])
    with pytest.raises(
        ConfigError, match="'f' needs a column 'solution', and the rows have.*answer, soluton; did you mean"
    ):
        rewards.check(["prompt", "answer", "soluton"])


def test_numbers_of_all_kinds():
    def tensor(completions, **kwargs):
        return torch.arange(len(completions), dtype=torch.bfloat16)

    def numpy(completions, **kwargs):
        return np.array([True] * len(completions))

    def generator(completions, **kwargs):
        return (x for x in range(len(completions)))

    judged = judge(tensor, numpy, generator)
    assert judged.used.all() and judged.values.tolist() == [[k, 1.0, k] for k in range(6)]


# ---- names, weights, what is none


class Scored:
    def __call__(self, completions, **kwargs):
        return [1.0] * len(completions)


def test_names_are_trls_and_never_two_of_one_kind():
    judged = Rewards(
        [length, functools.partial(length), Scored(), {"kind": "verifier", "verifier": "max_words", "n": 3}]
    )
    assert judged.names == ["length", "length_2", "Scored", "max_words"]
    assert Rewards({"a": length, "b": {"kind": "verifier", "verifier": "max_words", "n": 3}}).names == ["a", "b"]


@pytest.mark.parametrize(
    ("funcs", "weights", "message"),
    [
        (None, None, "no reward"),
        ([], None, "no reward"),
        ([3], None, "reward_funcs has 3: expected a function"),
        ("nowhere", None, "'nowhere' is no path of a reward model"),
        ("nowhere:reward", None, "cannot be imported"),
        ("math:sine", None, "math has no function 'sine'"),
        ({"kind": "judges"}, None, "did you mean 'judge'"),
        ([length], [1.0, 2.0], "2 weights for 1 reward functions"),
        ([length], [NAN], "nan, which is no finite number"),
        ([length], ["x"], "which is no finite number"),
        ([length], 2.0, "expected a list of numbers"),
        ([length], [0.0], "all 0"),
    ],
)
def test_what_is_no_reward(funcs, weights, message):
    with pytest.raises(ConfigError, match=message):
        Rewards(funcs, weights=weights)


def test_reward_processing_classes_are_counted():
    with pytest.raises(ConfigError, match="2 entries for 1 reward functions"):
        Rewards([length], [None, None])


def test_totals_are_the_weighted_sum_of_what_applies():
    def of_one(prompts, **kwargs):
        return [10.0 if p == "one" else None for p in prompts]

    rewards = Rewards([length, of_one], weights=[2.0, 0.5])
    judged = rewards(ROWS, GROUPS)
    assert judged.used.all() and not judged.left_out
    assert np.isnan(judged.values[3:, 1]).all()
    assert rewards.totals(judged).tolist() == [7.0, 9.0, 11.0, 2.0, 2.0, 8.0]


# ---- failures


@pytest.mark.parametrize(
    ("bad", "reason"),
    [(None, "none"), (NAN, "not_finite"), (float("inf"), "not_finite"), ("1.0", "not_a_number"),
     ([1.0], "not_a_number"), (10**400, "not_finite"), (torch.tensor(NAN), "not_finite"), (1j, "not_a_number")],
)  # fmt: skip
def test_one_value_that_is_none(bad, reason):
    def f(completions, **kwargs):
        return [bad if text == "22" else 1.0 for text in completions]

    judged = judge(f, length)
    assert judged.used.tolist() == [True, False, True, True, True, True]
    assert np.isnan(judged.values[1]).all() and np.isfinite(judged.values[judged.used]).all()
    assert judged.left_out == {f"f: {reason}": 1}
    assert "1 of 6 responses could not be judged and are left out: 1 f: " + reason in judged.line()


def test_nan_for_all_responses_of_a_prompt_is_no_none():
    def f(prompts, **kwargs):
        return [NAN if p == "one" else 1.0 for p in prompts]

    judged = judge(f, length)
    assert judged.used.tolist() == [False] * 3 + [True] * 3 and judged.left_out == {"f: not_finite": 3}


def test_a_prompt_to_which_nothing_applies():
    def f(prompts, **kwargs):
        return [None if p == "one" else 1.0 for p in prompts]

    judged = judge(f)
    assert judged.used.tolist() == [False] * 3 + [True] * 3 and judged.left_out == {UNJUDGED: 3}


def test_what_raises_is_asked_prompt_by_prompt():
    calls = []

    def f(prompts, completions, log_extra, log_metric, **kwargs):
        calls.append(len(prompts))
        log_extra("column", list(completions))
        log_metric("metric", float(len(prompts)))
        if "one" in prompts:
            raise RuntimeError("no\nanswer")
        return length(completions)

    judged = judge(f, length)
    assert calls == [6, 3, 3] and judged.used.tolist() == [False] * 3 + [True] * 3
    assert judged.left_out == {"f: error": 3} and judged.said == {"f: error": "RuntimeError: no answer"}
    assert judged.logged == {"metric": 3.0}  # nothing is kept of calls that failed
    assert judged.extra == {"column": [None] * 3 + ["2", "1", "4444"]}


@pytest.mark.parametrize("change", [1, -1])
def test_too_few_and_too_many_values(change):
    def f(prompts, completions, **kwargs):
        return [1.0] * (len(completions) + (change if "two" in prompts else 0))

    judged = judge(f)
    assert judged.used.tolist() == [True] * 3 + [False] * 3 and judged.left_out == {"f: wrong_count": 3}
    assert judged.said["f: wrong_count"] == f"{3 + change} values for 3 responses"


@pytest.mark.parametrize(
    ("given", "message"),
    [(None, "not_a_list, None"), (1.0, "not_a_list, 1.0"), ("abcdef", "not_a_list"), ({0: 1.0}, "not_a_list"),
     (ValueError("boom"), "error, ValueError: boom"), ([NAN] * 6, "not_finite")],
)  # fmt: skip
def test_a_function_that_never_judges_stops_the_run(given, message):
    def f(completions, **kwargs):
        if isinstance(given, Exception):
            raise given
        return given[: len(completions)] if isinstance(given, list) else given

    with pytest.raises(TrainingError, match=f"reward function 'f' could not judge any of 6 responses.*{message}"):
        judge(length, f)
    with Rewards([length, f]) as rewards:  # one of several processes looks first whether all are here
        judged = rewards(ROWS, GROUPS, stop=False)
    assert judged.broken is not None and not judged.used.any() and np.isnan(judged.values).all()


def test_a_function_that_judged_once_may_fail():
    broken = False

    def f(completions, **kwargs):
        if broken:
            raise ConnectionError("down")
        return length(completions)

    rewards = Rewards(f)
    assert rewards(ROWS, GROUPS).used.all()
    broken = True
    judged = rewards(ROWS, GROUPS)
    assert not judged.used.any() and judged.left_out == {"f: error": 6} and judged.broken is None


def test_interrupts_are_not_failures():
    def f(completions, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(f)


def test_no_responses():
    judged = judge(length, rows=[{"prompt": "a"}, {"prompt": "b"}], groups=[[], []])
    assert judged.values.shape == (0, 1) and not judged.left_out
    assert judge(length, rows=ROWS, groups=[[], GROUPS[1]]).used.all()


# ---- logs


def test_columns_of_two_functions():
    def one(completions, log_extra, **kwargs):
        log_extra("same", list(completions))
        log_extra("other", [1] * 6)
        return length(completions)

    def two(completions, log_extra, **kwargs):
        log_extra("same", list(completions))
        log_extra("other", [2] * 6)
        return length(completions)

    extra = judge(one, two).extra
    assert list(extra) == ["other", "same", "two/other"] and extra["two/other"] == [2] * 6


def test_logs_that_do_not_fit_are_said_once(caplog):
    def f(completions, log_extra, log_metric, **kwargs):
        log_extra("short", [1])
        log_metric("text", "x")
        return length(completions)

    rewards = Rewards(f)
    for _ in range(2):
        judged = rewards(ROWS, GROUPS)
        assert judged.extra == {} and judged.logged == {} and judged.used.all()
    assert len(caplog.messages) == 2 and "1 values of 'short' for 6 responses" in caplog.messages[0]


# ---- async


def test_async_functions_wait_together_in_one_loop():
    arrived, loops = [], set()

    def waits(name):
        async def f(completions, **kwargs):
            loops.add(asyncio.get_running_loop())
            arrived.append(name)
            while len(arrived) % 2:  # until the other one is here
                await asyncio.sleep(0)
            return [len(arrived)] * len(completions)

        f.__name__ = name
        return f

    class Late:
        async def __call__(self, completions, **kwargs):
            await asyncio.sleep(0)
            return length(completions)

    def hidden(completions, **kwargs):  # does not look async
        return Late()(completions)

    rewards = Rewards(
        [waits("a"), hidden, waits("b"), Late(), functools.partial(waits("c")), functools.partial(waits("d"))]
    )
    for _ in range(2):
        judged = rewards(ROWS, GROUPS)
        assert judged.used.all() and judged.values[:, 1].tolist() == judged.values[:, 3].tolist() == [1, 2, 3, 1, 1, 4]
    assert len(loops) == 1 and rewards.names == ["a", "hidden", "b", "Late", "c", "d"]
    before = {t.name for t in threading.enumerate()}
    rewards.close()
    assert "fastpo-rewards" in before and "fastpo-rewards" not in {t.name for t in threading.enumerate()}


def test_an_async_function_that_raises():
    async def f(prompts, completions, **kwargs):
        await asyncio.sleep(0)
        if "one" in prompts:
            raise RuntimeError("no")
        return length(completions)

    judged = judge(f, length)
    assert judged.used.tolist() == [False] * 3 + [True] * 3 and judged.left_out == {"f: error": 3}


def test_sync_functions_run_in_the_main_thread():
    def f(completions, **kwargs):
        assert threading.current_thread() is threading.main_thread()
        return length(completions)

    assert judge(f).used.all()


# ---- TRL's own


def test_trls_own_functions():
    trl = pytest.importorskip("trl.rewards")
    rows = [{"prompt": [{"role": "user", "content": "1/3?"}], "solution": r"\frac{1}{3}"}]
    texts = ["<think>\na b\n</think>\nso", "so so so so so so"]
    groups = [[Response(t, token_ids=[len(word) for word in t.split()]) for t in texts]]
    judged = judge(
        trl.think_format_reward, trl.get_soft_overlong_punishment(8, 6), trl.get_repetition_penalty_reward(2),
        rows=rows, groups=groups,
    )  # fmt: skip
    assert judged.used.all()
    assert np.allclose(judged.values, [[1.0, -0.5, 0.0], [0.0, -4 / 6, -0.8]])
    section = {"kind": "function", "function": trl.get_repetition_penalty_reward(2)}
    named = Rewards([trl.get_soft_overlong_punishment(8, 6), "trl.rewards:think_format_reward", section])
    assert named.names == ["soft_overlong_punishment_reward", "think_format_reward", "repetition_penalty_reward"]
    assert np.array_equal(named(rows, groups).values, judged.values[:, [1, 0, 2]])


def test_the_same_as_trls_trainer(monkeypatch):
    """What TRL's trainer hands to the same functions, and the values that it takes from them (its None is NaN)."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    monkeypatch.setattr(grpo, "profiling_context", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(grpo, "gather", lambda tensor: tensor)
    seen = []

    def f(log_extra, log_metric, trainer_state, **given):
        seen.append(given)
        log_extra("first", [c[0]["content"] for c in given["completions"]])
        log_metric("share", 0.25)
        of = zip(given["prompts"], given["completion_ids"])
        return [None if p[0]["content"] == "two" else len(ids) for p, ids in of]

    async def g(**given):
        seen.append({k: v for k, v in given.items() if k not in ("log_extra", "log_metric", "trainer_state")})
        return [len(c[0]["content"]) / 8 for c in given["completions"]]

    prompts = [[{"role": "user", "content": text}] for text in ("one", "two")]
    rows = [{"prompt": prompt, "level": n, "completion": "no"} for n, prompt in enumerate(prompts)]
    judged = judge(f, g, rows=rows, state="state")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    extra, metrics = [], []
    trainer = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device="cpu", is_main_process=False), reward_funcs=[f, g],
        reward_processing_classes=[None, None], reward_func_names=["f", "g"], state="state", environments=None,
        async_loop=loop,
        _log_completion_extra=lambda *of: extra.append(of), _log_metric=lambda *of: metrics.append(of),
    )  # fmt: skip
    flat = [r for group in GROUPS for r in group]
    inputs = [row for row, group in zip(rows, GROUPS) for _ in group]
    wanted = grpo.GRPOTrainer._calculate_rewards(
        trainer, inputs, [row["prompt"] for row in inputs],
        [[{"role": "assistant", "content": r.text}] for r in flat], [r.token_ids for r in flat],
    )  # fmt: skip
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    assert len(seen) == 4 and seen[:2] == seen[2:]
    assert sorted(seen[0]) == ["completion_ids", "completions", "level", "prompts"]
    assert np.array_equal(judged.values, wanted.double().numpy(), equal_nan=True) and judged.used.all()
    assert extra == list(judged.extra.items()) and metrics == list(judged.logged.items())


def test_trls_accuracy():
    trl = pytest.importorskip("trl.rewards")
    rows = [{"prompt": [{"role": "user", "content": "1/3?"}], "solution": s} for s in (r"\frac{1}{3}", "no value")]
    groups = [responses(r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}")] * 2
    try:
        import math_verify  # noqa: F401
    except ImportError:
        with pytest.raises(TrainingError, match="'accuracy_reward' could not judge.*ImportError: Please install"):
            judge(trl.accuracy_reward, rows=rows, groups=groups)
        return
    rewards = Rewards([trl.accuracy_reward, trl.reasoning_accuracy_reward, trl.get_cosine_scaled_reward(30)])
    assert rewards.names == ["accuracy_reward", "reasoning_accuracy_reward", "cosine_scaled_reward"]
    judged = rewards(rows, groups)
    assert judged.values[:2, :2].tolist() == [[1.0, 0.0], [0.0, 0.0]] and judged.values[0, 2] > 0 > judged.values[1, 2]
    assert judged.extra["solution"] == [r"\frac{1}{3}"] * 2 + ["no value"] * 2
    alone = judge(trl.accuracy_reward, rows=rows, groups=groups)
    assert alone.used.tolist() == [True, True, False, False] and alone.left_out == {UNJUDGED: 2}


# ---- scorers


def test_functions_of_the_loop(tmp_path):
    def of_one(prompt, response, meta):
        return float(response == meta["answer"])

    (tmp_path / "mine.py").write_text("def reward(prompt, response):\n    return len(prompt + response)\n")
    judged = judge(of_one, "mine.py:reward", where=tmp_path)
    assert judged.values[:, 0].tolist() == [1, 0, 0, 1, 0, 0] and judged.values[:, 1].tolist() == [4, 5, 6, 4, 4, 7]

    async def late(prompt, response):
        return 1.0

    with pytest.raises(ConfigError, match="an async one takes"):
        Rewards(late)


def test_sections_of_scorers():
    members = {"a": {"kind": "function", "function": is_short}, "b": {"kind": "function", "function": is_one}}
    judged = judge(
        {"kind": "verifier", "verifier": "exact_match"},
        {"kind": "function", "function": ranks, "unit": "list"},
        {"kind": "rules", "rules": [{"function": is_short}, {"function": is_one}]},
        {"kind": "ensemble", "of": members, "rule": "sum", "normalise": False, "weights": {"b": 3}},
    )  # fmt: skip
    assert judged.used.all() and judged.values.tolist() == [
        [1, 0, 1, 4], [0, 1, 0.5, 1], [0, 2, 0, 0], [1, 0, 0.5, 1], [0, 1, 1, 4], [0, 2, 0, 0],
    ]  # fmt: skip


def ranks(prompt, responses):
    return list(range(len(responses)))


def is_short(prompt, response):
    return len(response) < 3


def is_one(prompt, response):
    return response == "1"


def test_what_is_found_over_a_stage_is_refused():
    members = {"a": {"kind": "function", "function": is_short}}
    with pytest.raises(ConfigError, match="an ensemble normalises over a stage"):
        Rewards({"kind": "ensemble", "of": members})
    with pytest.raises(ConfigError, match="alpha: auto"):
        Rewards({"kind": "implicit", "policy": "a/b", "reference": "a/c", "alpha": "auto"})


def test_a_scorers_failures_are_left_out():
    def f(prompt, response):
        return {"1": None, "22": NAN}.get(response, 1.0)

    def whole(prompt, responses):
        return [1.0, None, 2.0] if prompt == "one" else [None] * 3

    judged = judge(FunctionScorer("f", f), length)
    assert judged.used.tolist() == [False, False, True, True, False, True]
    assert judged.left_out == {"f: none": 2, "f: not_finite": 1}
    judged = judge(FunctionScorer("w", whole, unit="list"), length)
    assert judged.used.tolist() == [True, False, True, True, True, True] and judged.left_out == {"w: none": 1}
    assert np.isnan(judged.values[3:, 0]).all()  # does not apply there


class Server(BaseScorer):
    """Breaks in the middle of what it is asked."""

    name = "server"

    def __init__(self, *broken, forgets=()):
        self.broken, self.forgets, self.closed, self.asked = broken, forgets, False, []

    def score(self, units):
        self.asked.append(len(units))
        for unit in reversed(units):
            if unit.item.prompt in self.broken:
                raise ConnectionError("reset")
            if unit.item.prompt not in self.forgets:
                yield unit, Verdict(float(len(unit.responses[0].text)))

    def close(self):
        self.closed = True


def test_a_scorer_that_raises_is_asked_prompt_by_prompt():
    rows, groups = [*ROWS, {"prompt": "three"}], [*GROUPS, responses("55555")]
    server = Server("two")
    with Rewards([server]) as rewards:
        judged = rewards(rows, groups)
    assert server.closed and server.asked == [7, 3, 3]  # the third prompt had its verdict
    assert judged.used.tolist() == [True] * 3 + [False] * 3 + [True] and judged.values[6, 0] == 5
    assert judged.left_out == {"server: error": 3} and judged.said["server: error"] == "ConnectionError: reset"
    judged = judge(Server(forgets=["two"]))
    assert judged.left_out == {"server: error": 3} and judged.said["server: error"] == "no verdict on this unit"
    with pytest.raises(TrainingError, match="'server' could not judge.*ConnectionError"):
        judge(Server("one", "two"))


# ---- judges of pairs


def longer(prompt, first, second):
    if prompt == "two":
        return None
    return {True: 1.0, False: 0.0}[len(first) > len(second)]


def test_the_reward_of_a_judge_is_the_share_that_is_beaten():
    judged = judge({"kind": "function", "function": longer, "unit": "pair"})
    assert judged.values[:3, 0].tolist() == [0.0, 0.5, 1.0]
    assert judged.used.tolist() == [True] * 3 + [False] * 3 and judged.left_out == {UNJUDGED: 3}
    groups = [responses("a", "a", "bb"), responses("c")]
    judged = judge(FunctionScorer("longer", longer, unit="pair"), rows=[ROWS[0]] * 2, groups=groups)
    assert judged.values[:3, 0].tolist() == [0.25, 0.25, 1.0]
    assert judged.left_out == {"longer: alone": 1} and not judged.used[3]


def test_a_pair_that_failed_is_no_tie():
    def p(prompt, first, second):
        return None if {first, second} == {"1", "22"} else float(len(first) > len(second))

    judged = judge(FunctionScorer("p", p, unit="pair"), rows=ROWS[:1], groups=GROUPS[:1])
    assert judged.values[:, 0].tolist() == [0.0, 0.0, 1.0] and judged.used.all()


# ---- reward models


def saved(toy, path, template=CHAT):
    model, tokenizer = toy.reward_model(seed=3), toy.tokenizer()
    tokenizer.chat_template = template
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, tokenizer


def test_reward_models_by_path_and_in_memory(toy, tmp_path):
    model, tokenizer = saved(toy, tmp_path / "rm")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("w1 w2", "w3")]
    groups = [responses("w4 w5", "w6"), responses("w7 w8 w9", "w10")]
    texts = [
        tokenizer.apply_chat_template([*row["prompt"], {"role": "assistant", "content": r.text}], tokenize=False)
        for row, group in zip(rows, groups) for r in group
    ]  # fmt: skip
    with torch.no_grad():  # as TRL reads them
        wanted = [
            model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0].item()
            for text in texts
        ]
    model.config._name_or_path = "org/rm"
    with Rewards([str(tmp_path / "rm"), model, {"kind": "reward_model", "model": str(tmp_path / "rm")}],
                 [None, tokenizer, None]) as rewards:  # fmt: skip
        assert rewards.names == ["rm", "rm_2", "rm_3"]
        judged = rewards(rows, groups)
    assert judged.used.all() and np.allclose(judged.values, np.array(wanted)[:, None], atol=1e-5)


def test_a_module_that_is_no_classifier_of_transformers(toy):
    inner, tokenizer = toy.reward_model(seed=3).eval(), toy.tokenizer()

    class Own(torch.nn.Module):
        config = inner.config

        def __init__(self):
            super().__init__()
            self.inner = inner
            self.device = torch.device("cpu")

        def forward(self, **inputs):
            return inner(**inputs)

    rows, groups = [{"prompt": "w1 w2"}], [responses("w3", "w4 w5")]
    judged = judge(Own(), inner, rows=rows, groups=groups, reward_processing_classes=[tokenizer, tokenizer])
    assert judged.used.all() and np.allclose(judged.values[:, 0], judged.values[:, 1], atol=1e-5)


def test_reward_models_that_are_none(toy, tmp_path):
    toy.model().save_pretrained(tmp_path / "policy")
    toy.tokenizer().save_pretrained(tmp_path / "policy")
    with pytest.raises(ConfigError, match="is no reward model: it has no weights for"):
        Rewards("start", policies={"start": str(tmp_path / "policy")})
    with pytest.raises(ConfigError, match="in memory does not say where its tokenizer is"):
        Rewards(toy.reward_model())
    with pytest.raises(ConfigError, match="has no config"):
        Rewards(torch.nn.Linear(2, 2), toy.tokenizer())


def test_a_response_that_the_model_cannot_read_is_left_out(toy, tmp_path):
    saved(toy, tmp_path / "rm")
    judged = judge(str(tmp_path / "rm"), rows=[{"prompt": "w1"}], groups=[responses("w2", "", "w3 " * 300)])
    assert judged.used.tolist() == [True, False, False]
    assert judged.left_out == {"rm: empty": 1, "rm: too_long": 1}
