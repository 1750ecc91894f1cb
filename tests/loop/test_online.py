"""Iterations whose loss draws its responses as it trains: stages, keys, resume, what is refused, the page."""

import json
import shutil
from pathlib import Path

import pytest

import fastpo
from fastpo.errors import ConfigError, FastpoError
from fastpo.loop import online
from fastpo.loop.config import merged
from fastpo.loop.run import resolve
from fastpo.report.charts import number as shown_number
from fastpo.sampling.items import Verdict
from fastpo.sampling.parts import read_lines

TRAIN = {
    "loss_type": "grpo", "num_generations": 3, "max_completion_length": 5, "per_device_train_batch_size": 6,
    "use_cpu": True, "bf16": False, "disable_tqdm": True, "report": True, "gradient_checkpointing": False,
    "learning_rate": 1e-3, "optim": "adamw_torch", "save_strategy": "no", "logging_steps": 1, "max_steps": 3,
}  # fmt: skip


def letters(prompt, response, meta):
    """Anything that differs between texts."""
    return float(sum(map(ord, response)) % 7)


def known(prompts, completions, answer, **columns):
    """TRL's signature: a column of the prompts."""
    return [float(len(text) % (2 + len(a))) for text, a in zip(completions, answer, strict=True)]


class Pairs:
    name, unit, exact, cached, key = "judge", "pair", True, False, {"pairs": 1}

    def score(self, units):
        for unit in units:
            a, b = (letters(None, r.text, {}) for r in unit.responses)
            yield unit, Verdict(0.5 + 0.5 * ((a > b) - (a < b)))

    def close(self):
        pass


@pytest.fixture(scope="module")
def start(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    toy.tokenizer().save_pretrained(folder)
    toy.model().save_pretrained(folder)
    return folder


@pytest.fixture
def options(toy, start, tmp_path):
    def make(**more):
        given = {
            "model": str(start), "output_dir": str(tmp_path / "run"), "iterations": 1, "train": TRAIN,
            "prompts": [{"id": str(k), "prompt": row["prompt"], "answer": "x" * (k % 3)}
                        for k, row in enumerate(toy.rows(8))],
        }  # fmt: skip
        return merged(given, more)

    return make


def weights(folder):
    return (folder / "train" / "model.safetensors").read_bytes()


def stage(run, name, t=1):
    return json.loads((run / f"iter-{t:03d}" / "stages" / f"{name}.json").read_text())


def test_prompts_are_the_rows_and_scorers_the_rewards(options, tmp_path):
    heldout = [{"prompt": "w1 w2", "answer": "xx"}, {"prompt": "w3", "answer": "x"}]
    given = options(iterations=2, eval={"prompts": heldout}, train={"reward_weights": [1.0, 0.5]})
    result = fastpo.iterate(given, scorers={"letters": letters, "known": known})
    run = tmp_path / "run"
    for t in (1, 2):
        folder = run / f"iter-{t:03d}"
        assert {p.stem for p in (folder / "stages").iterdir()} == {"prompts", "train", "eval"}
        lines = [x for x in read_lines(folder / "train" / "metrics.jsonl") if "reward" in x]
        assert len(lines) == 3
        for line in lines:
            parts = [line[f"rewards/{name}/mean"] for name in ("letters", "known")]
            assert line["reward"] == pytest.approx(parts[0] + 0.5 * parts[1])
        counts = stage(run, "train", t)["counts"]
        assert counts["reward at first"] == lines[0]["reward"] and counts["reward"] == lines[-1]["reward"]
        assert counts["reward of known"] == lines[-1]["rewards/known/mean"]
        assert result.iterations[t - 1]["samples"]["mean tokens"] == lines[-1]["completions/mean_length"]
        measured = json.loads((folder / "eval.json").read_text())
        [scores] = [list(read_lines(p)) for p in (folder / "eval/scores/known").glob("*.jsonl")]
        assert {line["value"] for line in scores} <= set(range(4)) and measured["failed"] == 0
    assert stage(run, "train", 2)["options"]["policy"] == str(run / "iter-001" / "train")
    assert stage(run, "train")["options"]["rewards"][0][0] == "letters"
    page = (run / "report.html").read_text()
    assert "Reward, iteration 1" in page and "Reward, iteration 2" in page
    counts = stage(run, "train")["counts"]
    assert f"{shown_number(counts['reward at first'])} → {shown_number(counts['reward'])}" in page
    assert len(list(read_lines(run / "iter-001" / "prompts.jsonl"))) == 4


def test_the_sum_of_the_rewards_measures_a_policy(options, tmp_path):
    """Weighted as they are in training."""
    given = options(eval={"prompts": [{"prompt": "w1 w2", "answer": "x"}]}, train={"reward_weights": [1.0, -2.0]})
    fastpo.iterate(given, scorers={"letters": letters, "known": known})
    folder = tmp_path / "run/iter-001"
    [answer] = read_lines(folder / "eval/answers.jsonl")
    want = letters("", answer["text"], {}) - 2 * known([], [answer["text"]], ["x"])[0]
    assert json.loads((folder / "eval.json").read_text())["score"] == pytest.approx(want)


def test_done_is_done_and_a_changed_option_or_reward_names_itself(options, tmp_path):
    given = options()
    fastpo.iterate(given, scorers={"letters": letters})
    before = weights(tmp_path / "run/iter-001")

    def other(prompt, response, meta):
        return float(len(response))

    fastpo.iterate(given, scorers={"letters": letters})
    with pytest.raises(ConfigError, match=r"stage train was done with train\.num_generations=3, now it is 2"):
        fastpo.iterate(merged(given, {"train": {"num_generations": 2}}), scorers={"letters": letters})
    with pytest.raises(ConfigError, match="stage train was done with rewards="):
        fastpo.iterate(given, scorers={"letters": other})
    fastpo.iterate(given, scorers={"letters": other}, start_from="train")
    assert weights(tmp_path / "run/iter-001/old-1") == before != weights(tmp_path / "run/iter-001")


class Ends(Exception):
    pass


def test_what_was_stopped_in_training_goes_on_from_its_checkpoint(options, tmp_path):
    """Same bytes as a run that was not."""
    given = options(train={"save_strategy": "steps", "save_steps": 1, "max_steps": 4})
    fastpo.iterate(given, scorers={"letters": letters})
    run, asked = tmp_path / "run", []
    whole = weights(run / "iter-001")
    shutil.move(run, tmp_path / "whole")

    class Counted:
        name, unit, exact, cached, key = "letters", "response", True, False, {}
        most = 14  # responses: in the middle of the third step

        def score(self, units):
            for unit in units:
                asked.append(unit.key)
                if len(asked) > self.most:
                    raise KeyboardInterrupt
                yield unit, Verdict(letters("", unit.responses[0].text, {}))

        def close(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        fastpo.iterate(given, scorers={"letters": Counted()})
    assert stage(run, "train")["state"] == "running"
    Counted.most, before = 10**6, len(asked)
    fastpo.iterate(given, scorers={"letters": Counted()})
    assert len(asked) - before == 2 * 6  # of the last two steps
    assert weights(run / "iter-001") == whole


def test_a_reference_by_name(options, tmp_path):
    given = options(iterations=2, train={"beta": 0.1, "reference": "start"})
    fastpo.iterate(given, scorers={"letters": letters})
    assert stage(tmp_path / "run", "train", 2)["options"]["ref_model"] == given["model"]
    kl = [x["kl"] for x in read_lines(tmp_path / "run/iter-002/train/metrics.jsonl") if "kl" in x]
    assert kl and kl[0] > 0  # the second iteration begins away from the start


@pytest.mark.parametrize("loss", ["online_dpo", "nash_md"])
def test_a_judge_of_pairs(options, tmp_path, loss):
    train = {"loss_type": loss, "num_generations": 2, "per_device_train_batch_size": 2, "beta": 0.1}
    fastpo.iterate(options(train=train), scorers={"judge": Pairs()})
    assert weights(tmp_path / "run/iter-001") != weights_of_start(options)


def weights_of_start(options):
    return (Path(options()["model"]) / "model.safetensors").read_bytes()


def test_iterations_of_pairs_and_online_ones(options, tmp_path):
    """The second iteration is trained on rows, with what is sampled for it."""
    pairs = {"loss_type": "dpo", "num_generations": None, "max_completion_length": None, "max_steps": 2,
             "per_device_train_batch_size": 2, "beta": 0.1}  # fmt: skip
    given = options(
        iterations=2, at={2: {"train": pairs, "sample": {"n": 4, "max_tokens": 5, "drop_truncated": False}}}
    )
    result = fastpo.iterate(given, scorers={"letters": letters})
    stages = [{p.stem for p in (tmp_path / f"run/iter-00{t}/stages").iterdir()} for t in (1, 2)]
    assert stages == [{"prompts", "train"}, {"prompts", "sample", "score", "select", "train"}]
    assert len(result.iterations) == 2


def test_a_dry_run_says_what_is_drawn(options, capsys):
    given = options(train={"max_steps": -1, "num_train_epochs": 1, "beta": 0.1, "reference": "start"})
    assert fastpo.iterate(given, scorers={"letters": letters, "known": known}, dry_run=True) is None
    told = capsys.readouterr().out
    assert "8 prompts; 4 steps on 24 responses" in told and "3 a prompt, at most 120 tokens" in told
    assert "48 judgements by letters, known; loss grpo, reference start" in told


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"sample": {"n": 8}}, r"sample\.n=8: grpo draws its responses in training: set train\.num_generations"),
        ({"sample": {"max_tokens": 9}}, r"set train\.max_completion_length"),
        ({"sample": {"stop": ["x"]}}, r"sample\.stop=\('x',\): grpo draws its responses in training: leave it out"),
        ({"sample": {"engine": "openai", "base_url": "http://x/v1"}}, r"say who answers as grpo trains"),
        ({"score": {"by": "letters"}}, r"score\.by='letters': grpo has no stage of scores: set train"),
        ({"score": {"both_orders": False}}, r"score\.both_orders=False: grpo is trained on what it draws"),
        ({"select": {"policy": "all"}}, r"select\.policy='all': grpo is trained on what it draws.*leave it out"),
        ({"refine": {"rounds": 1}}, r"refine\.rounds=1"),
        ({"degrade": {"degrees": 3}}, r"degrade\.degrees=3"),
        ({"replay": {1: 0.5}}, "replay has no part in an iteration of grpo"),
        ({"search": {"iterations": 3}}, "search has no part in an iteration of grpo"),
        ({"train": {"judge": {"kind": "judge"}}}, "train: judge compares two responses, and grpo reads a number"),
        ({"train": {"judge": {"kind": "judge"}, "loss_type": "spo"}}, r"train\.judge: the scorers of the run judge"),
        ({"train": {"previous": "start"}}, r"train\.previous: grpo reads no previous policy"),
        ({"train": {"reference": "start"}}, r"train\.reference: grpo with beta=0 reads no reference; set train\.beta"),
        ({"train": {"reference": "strat", "beta": 0.1}}, r"train\.reference='strat' is neither a policy's name"),
        ({"train": {"reward_funcs": ["lettrs"]}}, r"'lettrs' is none of the scorers letters; did you mean 'letters'"),
        ({"train": {"reward_funcs": ["letters", "letters"]}}, "names a scorer twice: use reward_weights"),
        ({"train": {"reward_funcs": 3}}, r"train\.reward_funcs must list names of scorers, not 3"),
        ({"train": {"reward_weights": [1, 2]}}, "reward_weights has 2 weights for 1 rewards: letters"),
        ({"train": {"num_generations": 4}}, "6 responses, no multiple of num_generations=4"),
        ({"train": {"loss_type": ["grpo", "sft"]}}, "give loss_type=grpo alone"),
        ({"train": {"loss_type": "dpo", "reward_funcs": ["letters"]}}, "reward_funcs"),
        ({"train": {"num_generatons": 4}}, "did you mean 'num_generations'"),
        ({"scorers": {"long": {"kind": "verifier", "verifier": "max_words", "n": 3}}, "eval": {"scorer": "long"}},
         r"must name the scorers that are rewards, of long, letters: eval\.scorer='long' may be one"),
        ({"scorers": {"all": {"kind": "ensemble", "of": ["letters"]}}}, "must name the scorers.*'all' combines others"),
        ({"scorers": {"all": {"kind": "ensemble", "of": ["letters"]}}, "train": {"reward_funcs": ["all"]}},
         "scorer 'all': an ensemble normalises over a stage, and a run has none"),
    ],
)  # fmt: skip
def test_what_means_nothing_then_is_refused_before_the_first_step(options, tmp_path, more, says):
    with pytest.raises(FastpoError, match=says) as error:
        fastpo.iterate(options(**more), scorers={"letters": letters})
    assert "\n" not in str(error.value) and not (tmp_path / "run/iter-001").exists()


def test_there_must_be_a_reward(options):
    with pytest.raises(ConfigError, match="grpo needs rewards and there is no scorer"):
        fastpo.iterate(options())


def test_a_judge_alone_has_no_weight(options):
    given = options(train={"loss_type": "online_dpo", "reward_weights": [2.0]})
    with pytest.raises(ConfigError, match=r"train\.reward_weights: 'judge' compares responses and is the only judge"):
        fastpo.iterate(given, scorers={"judge": Pairs()})


def test_pairs_cannot_be_summed_where_a_policy_is_measured(options):
    given = options(eval={"prompts": [{"prompt": "w1"}]})
    with pytest.raises(ConfigError, match="eval.scorer must name what a policy is measured by: 'judge' judges a pair"):
        fastpo.iterate(given, scorers={"judge": Pairs(), "letters": letters})


def test_an_ensemble_by_the_names_of_its_members(options, tmp_path):
    """Members are no rewards of their own."""
    scorers = {"words": {"kind": "verifier", "verifier": "max_words", "n": 2},
               "both": {"kind": "ensemble", "of": ["letters", "words"], "rule": "sum", "normalise": False}}  # fmt: skip
    fastpo.iterate(options(scorers=scorers, train={"reward_funcs": ["both"]}), scorers={"letters": letters})
    [line, *_] = read_lines(tmp_path / "run/iter-001/train/metrics.jsonl")
    assert "rewards/both/mean" in line and "rewards/words/mean" not in line


def test_options_of_pairs_are_the_losss(options):
    config = resolve(options(train={"loss_type": "online_dpo", "pair_policy": "all", "beta": 0.1}), None, {})
    assert config.train["pair_policy"] == "all" and online.way_of(config.train).pairs == "chosen"
    with pytest.raises(ConfigError, match=r"train\.pair_policy is set by the loop"):
        resolve(options(train={"loss_type": "dpo", "pair_policy": "all"}), None, {})
