"""fastpo.iterate from end to end on the toy model: stages, resume, what is refused, what is said."""

import itertools
import json
import shutil

import pytest

import fastpo
from fastpo.errors import ConfigError, TrainingError
from fastpo.loop.config import as_json, merged
from fastpo.loop.run import resolve
from fastpo.sampling.items import Response, Verdict
from fastpo.sampling.parts import read_lines
from fastpo.scoring.scorers import FunctionScorer

TRAIN = {
    "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "disable_tqdm": True, "report": False,
    "gradient_checkpointing": False, "learning_rate": 1e-3, "optim": "adamw_torch", "save_strategy": "no",
}  # fmt: skip
SAMPLE = {"n": 3, "temperature": 1.0, "top_p": 1.0, "max_tokens": 5, "drop_truncated": False}


def judge(prompt, response, meta):
    """Anything that differs between texts."""
    return float(sum(map(ord, response)) % 7)


class Pairs:
    name, unit, exact, cached = "judge", "pair", True, False

    def __init__(self, p):
        self.p, self.key = p, {"pairs": p.__qualname__}

    def score(self, units):
        for unit in units:
            yield unit, Verdict(self.p(*(r.text for r in unit.responses)))

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
    """A run of two iterations; further options on top."""

    def make(**more):
        given = {
            "recipe": "iterative_dpo", "model": str(start), "output_dir": str(tmp_path / "run"), "iterations": 2,
            "prompts": [{"id": str(k), "prompt": row["prompt"]} for k, row in enumerate(toy.rows(12))],
            "sample": SAMPLE, "train": TRAIN,
        }  # fmt: skip
        return merged(given, more)

    return make


def test_two_iterations_from_prompts_to_a_model(options, tmp_path):
    heldout = [{"prompt": "w1 w2"}, {"prompt": "w3"}]
    result = fastpo.iterate(options(eval={"prompts": heldout}), scorers={"judge": judge})
    run = tmp_path / "run"
    assert set(result.policies) == {"start", "iterate-1", "iterate-2"} and result.best in result.policies
    asked = [{line["id"] for line in read_lines(run / f"iter-00{t}" / "prompts.jsonl")} for t in (1, 2)]
    assert len(asked[0]) == len(asked[1]) == 6 and not asked[0] & asked[1]
    for t in (1, 2):
        folder = run / f"iter-00{t}"
        rows = list(read_lines(folder / "rows.jsonl"))
        counts = json.loads((folder / "rows.json").read_text())
        assert counts["prompts"] == 6 and counts["rows"] == len(rows) == counts["prompts kept"]
        assert counts["prompts kept"] + sum(counts["dropped"].values()) == 6
        for row in rows:
            texts = [r["text"] for r in row["responses"]]
            ((winner, loser),) = [pair[:2] for pair in row["pairs"]]
            assert judge(None, texts[winner], {}) == max(judge(None, t, {}) for t in texts)
            assert judge(None, texts[loser], {}) == min(judge(None, t, {}) for t in texts)
            assert all(r["token_ids"] for r in row["responses"]) and row["prompt_ids"]
        found = json.loads((folder / "eval.json").read_text())
        assert found["prompts"] == 2 and 0 <= found["win rate"] <= 1 and found["against"] == "start"
    assert (run / "report.html").exists()


def test_what_is_trained_is_what_was_sampled(options, tmp_path):
    """Token for token, no end where the policy gave none."""
    fastpo.iterate(options(iterations=1), scorers={"judge": judge})
    folder = tmp_path / "run" / "iter-001"
    sampled = {(line["id"], line["text"]): line for line in read_lines(folder / "samples" / "part-0000.jsonl")}
    for row in read_lines(folder / "rows.jsonl"):
        for response in row["responses"]:
            line = sampled[row["id"], response["text"]]
            assert response["token_ids"] == line["token_ids"] and response["finished"] == line["finished"]


def test_done_stages_are_not_done_again_and_a_changed_option_names_itself(options, tmp_path):
    calls = itertools.count()  # a list or a number of a closure would be part of the judge's key

    def counted(prompt, response, meta):
        next(calls)
        return judge(prompt, response, meta)

    given = options(scorers={}, iterations=1)
    fastpo.iterate(given, scorers={"judge": counted})
    first, weights = next(calls), (tmp_path / "run/iter-001/train/model.safetensors").read_bytes()
    assert first
    fastpo.iterate(given, scorers={"judge": counted})
    assert next(calls) == first + 1
    with pytest.raises(ConfigError, match=r"stage sample was done with sample\.temperature=1\.0, now it is 0\.5"):
        fastpo.iterate(merged(given, {"sample": {"temperature": 0.5}}), scorers={"judge": counted})
    with pytest.raises(ConfigError, match=r"stage train was done with train\.beta=0\.1, now it is 0\.2.*--from train"):
        fastpo.iterate(merged(given, {"train": {"beta": 0.2}}), scorers={"judge": counted})
    fastpo.iterate(merged(given, {"train": {"beta": 0.2}}), scorers={"judge": counted}, start_from="train")
    assert next(calls) == first + 2
    assert (tmp_path / "run/iter-001/old-1/train/model.safetensors").read_bytes() == weights
    assert (tmp_path / "run/iter-001/train/model.safetensors").read_bytes() != weights


def test_a_changed_file_is_found(options, tmp_path):
    given = options(iterations=1)
    fastpo.iterate(given, scorers={"judge": judge})
    rows = tmp_path / "run/iter-001/rows.jsonl"
    rows.write_text(rows.read_text().replace("0", "1", 1))
    with pytest.raises(ConfigError, match=r"rows\.jsonl is not what stage select wrote.*--from select"):
        fastpo.iterate(given, scorers={"judge": judge})


def test_a_stage_that_was_killed_in_the_middle_goes_on(options, tmp_path):
    """The torn last line is cut off, and what is there is not asked again."""
    given = options(iterations=1)
    fastpo.iterate(given, scorers={"judge": judge})
    whole = tmp_path / "run"
    kept = tmp_path / "kept"
    shutil.copytree(whole, kept)
    folder = whole / "iter-001"
    for stage in ("score", "select", "train"):
        (folder / "stages" / f"{stage}.json").unlink()
    shutil.rmtree(folder / "train")
    (folder / "rows.jsonl").unlink()
    part = folder / "scores/judge/part-0000.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:3]) + lines[3][:10])
    fastpo.iterate(given, scorers={"judge": judge})
    for name in ("scores/judge/part-0000.jsonl", "rows.jsonl", "train/model.safetensors"):
        assert (folder / name).read_bytes() == (kept / "iter-001" / name).read_bytes(), name


def test_a_judge_that_always_says_the_first_makes_ties_and_a_clear_end(options):
    always_a = Pairs(lambda a, b: 1.0)
    with pytest.raises(TrainingError, match=r"goes by the place alone in 100% of \d+ pairs.*score\.position_bias=0\.9"):
        fastpo.iterate(options(recipe="sppo"), scorers={"judge": always_a})
    with pytest.raises(TrainingError, match="no row is left to train on .*all tie.*goes by the place alone"):
        fastpo.iterate(
            options(recipe="sppo", score={"position_bias": 1.0}), scorers={"judge": always_a}, start_from="select"
        )


def test_failed_judgements_are_no_scores(options, tmp_path):
    """TRL 1.16 makes the response whose judge failed the winner, as nansum takes None for 0; here it has no score."""

    def fails(prompt, response, meta):
        return None if sum(map(ord, response)) % 3 == 0 else -judge(prompt, response, meta) - 1

    fastpo.iterate(options(iterations=1, max_failed=0.9), scorers={"judge": fails})
    for row in read_lines(tmp_path / "run/iter-001/rows.jsonl"):
        assert all(fails(None, r["text"], {}) is not None for r in row["responses"])
        assert all(r["score"] < 0 for r in row["responses"])


def test_too_many_failures_end_the_stage(options):
    with pytest.raises(TrainingError, match="max_failed"):
        fastpo.iterate(options(), scorers={"judge": lambda prompt, response, meta: None})


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"iterations": 20}, "12 different prompts are too few for 20 disjoint iterations"),
        ({"prompts_per_iteration": 7}, "set prompts_per_iteration to 6 or less"),
        ({"selct": {}}, "no option selct; did you mean 'select'"),
        ({"select": {"polcy": "all"}}, r"no option select\.polcy; did you mean 'policy'"),
        ({"select": {"policy": "best_wrost"}}, "no 'best_wrost'; did you mean 'best_worst'"),
        ({"train": {"lerning_rate": 1.0}}, "train: .*lerning_rate.*learning_rate"),
        ({"train": {"loss_type": "inpo"}}, "beta is set, but inpo does not read it"),
        ({"train": {"loss_type": "dpo_soft"}}, r"set select\.rows=pairs"),
        ({"train": {"loss_type": "grpo"}}, r"grpo draws its responses in training: set train\.num_generations"),
        ({"train": {"loss_type": "simpo"}}, r"train\.reference: simpo reads no reference"),
        ({"train": {"previous": "start"}}, r"train\.previous: dpo reads no previous policy"),
        ({"train": {"reference": "strat"}}, r"train\.reference='strat' is neither a policy's name"),
        ({"train": {"output_dir": "x"}}, r"train\.output_dir is set by the loop"),
        ({"score": {"by": "juge"}}, "none of the scorers judge"),
        ({"select": {"policy": "tournament"}}, "needs a scorer of pairs"),
        ({"select": {"policy": "explicit"}}, "needs select.chosen_source"),
        ({"select": {"soften": 0.5}}, "needs a scorer of pairs"),
        ({"sample": {"temperature": -1}}, r"sample\.temperature must be 0 or more, not -1"),
        ({"sample": {"n": "many"}}, r"sample\.n must be a whole number, not 'many'"),
        ({"recipe": "spo"}, "no recipe 'spo'"),
        ({"at": {2: {"model": "x"}}}, r"at\.2\.model: only"),
        ({"model": None}, "fastpo iterate needs model"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_first_sample(options, tmp_path, more, says):
    with pytest.raises(ConfigError, match=says):
        fastpo.iterate(options(**more), scorers={"judge": judge})
    assert not list((tmp_path / "run").glob("iter-*"))


def test_pair_scorers_do_not_go_with_losses_of_lists(options):
    given = options(train={"loss_type": "exo_rw", "beta": 0.5})
    with pytest.raises(ConfigError, match="exo_rw reads a score of each response and 'judge' compares pairs"):
        fastpo.iterate(given, scorers={"judge": Pairs(lambda a, b: 0.5)})


def test_an_iteration_has_options_of_its_own(options):
    config = resolve(None, None, options(at={2: {"train": {"beta": 0.7}, "sample": {"n": 5}}}))
    assert config.in_iteration(1).train["beta"] == 0.1 and config.in_iteration(1).sample.n == 3
    assert config.in_iteration(2).train["beta"] == 0.7 and config.in_iteration(2).sample.n == 5
    assert config.in_iteration(2).train["loss_type"] == "dpo"


def test_replay_takes_its_share_of_earlier_rows(options, tmp_path):
    fastpo.iterate(options(replay={1: 0.4}), scorers={"judge": judge})
    counts = json.loads((tmp_path / "run/iter-002/rows.json").read_text())
    assert counts["replayed"] == int(counts["of this iteration"] / 0.6 * 0.4)
    assert sum("replayed" in row for row in read_lines(tmp_path / "run/iter-002/rows.jsonl")) == counts["replayed"]


def test_the_command_line_with_a_file_a_dry_run_and_settings(start, toy, tmp_path, preloaded):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in toy.rows(6)))
    (tmp_path / "judges.py").write_text("def longest(prompt, response, meta):\n    return float(len(response))\n")
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({
        "recipe": "iterative_dpo", "model": str(start), "prompts": str(prompts), "output_dir": str(tmp_path / "run"),
        "iterations": 1, "sample": SAMPLE, "train": TRAIN,
        "scorers": {"judge": {"kind": "function", "function": str(tmp_path / "judges.py") + ":longest"}},
    }))  # fmt: skip

    def call(*args):
        return preloaded.run("-m", "fastpo", "iterate", "--config", config, *args)

    done = call("--dry-run", "--set", "sample.n=5")
    assert done.returncode == 0, done.stderr
    assert "6 prompts; 30 responses" in done.stdout and "30 judgements by judge" in done.stdout
    assert not (tmp_path / "run").exists()
    done = call("--set", "sample.n=2")
    assert done.returncode == 0, done.stderr
    assert "best policy: iterate-1" in done.stdout
    done = call("--set", "sample.n=3")
    assert done.returncode == 2 and "sample.n=2, now it is 3" in done.stderr.splitlines()[-1]


def test_more_iterations_on_top_of_those_that_are_done(options, tmp_path):
    """Where the size of a part is given, the number of parts may grow; else it cuts the prompts."""
    given = options(iterations=1, prompts_per_iteration=4)
    fastpo.iterate(given, scorers={"judge": judge})
    kept = (tmp_path / "run/iter-001/rows.jsonl").read_bytes()
    result = fastpo.iterate(merged(given, {"iterations": 2}), scorers={"judge": judge})
    assert list(result.policies) == ["start", "iterate-1", "iterate-2"]
    assert (tmp_path / "run/iter-001/rows.jsonl").read_bytes() == kept


def test_secrets_are_not_written(options, tmp_path):
    assert "hush" not in json.dumps(as_json(resolve(None, None, options(sample={"api_key": "hush"}))))


class Teacher:
    """Answers the questions of the stages before the first iteration."""

    exact, key = True, {"teacher": "by rule"}

    def batches(self, requests):
        return [list(requests)]

    def sample(self, requests):
        for request in requests:
            n = request.seed % 50
            if request.source == "query":
                text = f"w1 w{n} w{request.seed // 50 % 50}"
            elif request.source in ("answers", "filter"):
                text = "yes"
            else:
                text = f"### Instruction:\nw3 w{n}\n### Response:\n w4 w5"
            yield request, Response(text)

    def close(self):
        pass


def test_what_is_prepared_stands_in_the_place_of_options(options, tmp_path):
    """PUGC's queries are the prompts, the texts they came from the reference; the supervised model is the start."""
    texts = [{"text": " ".join(["w7"] * (k + 2))} for k in range(6)]
    seen = []

    def against(prompt, response, meta):
        seen.append(meta["reference_text"])
        return judge(prompt, response, meta)

    sft = {"rows": [{"prompt": "w1", "completion": " w2"}] * 4, "train": {**TRAIN, "max_steps": 1}}
    given = options(iterations=1, prepare={"queries": {"texts": texts, "turns": False}, "sft": sft})
    given.pop("prompts")
    result = fastpo.iterate(
        given, scorers={"judge": FunctionScorer("judge", against, key={"judge": 1})}, teacher=Teacher
    )
    assert result.policies["start"] == str(tmp_path / "run/prepare/sft/train")
    assert set(seen) <= {row["text"] for row in texts} and len(set(seen)) > 1
    stages = tmp_path / "run/prepare/stages"
    before = {path.name: path.read_text() for path in stages.iterdir()}
    fastpo.iterate(given, scorers={"judge": FunctionScorer("judge", against, key={"judge": 1})}, teacher=Teacher)
    assert before == {path.name: path.read_text() for path in stages.iterdir()}


def test_supervision_alone(options, tmp_path):
    """Instruct-SkillMix: no prompts, no iterations."""
    prepare = {"skillmix": {"n": 6, "skills": ["a", "b"], "types": ["c"], "turns": False},
               "sft": {"train": {**TRAIN, "max_steps": 1}}}  # fmt: skip
    given = options(recipe="skillmix", iterations=0, prepare=prepare)
    given.pop("prompts")
    result = fastpo.iterate(given, teacher=Teacher)
    assert list(result.policies) == ["start"] and result.best == "start" and not result.iterations
    assert (tmp_path / "run/prepare/sft/train/model.safetensors").exists()


def test_tree_search_in_the_place_of_sampling(options, tmp_path):
    search = {"iterations": 4, "first": 1, "max_steps": 3, "step": {"stop": [], "tokens": 1}, "self_eval": "judge"}
    given = options(
        recipe="mcts_dpo", iterations=1, search=search, sample={"n": None, "max_tokens": 3},
        train={"learning_rate": 1e-3, "num_train_epochs": 1},
    )  # fmt: skip
    fastpo.iterate(given, scorers={"judge": lambda prompt, response, meta: judge(prompt, response, meta) % 2})
    rows = list(read_lines(tmp_path / "run/iter-001/rows.jsonl"))
    assert rows and all(row["chosen"] != row["rejected"] and 0.5 <= row["win_prob"] <= 1 for row in rows)
    assert (tmp_path / "run/iter-001/train/model.safetensors").exists()


def test_refinements_may_have_a_loss_of_their_own(options, tmp_path):
    """EVOLVE's ipo form: dpo on the prompt, ipo on what follows an answer, one step of both."""
    train = {"loss_type": ["dpo", "ipo"], "loss_weights": [1.0, 1.0]}
    more = {"recipe": "evolve", "iterations": 1, "train": train, "sample": {"n": 2}, "score": {"by": "judge"}}
    with pytest.raises(ConfigError, match=r"refine\.loss='hinge' is none of train\.loss_type: dpo, ipo"):
        fastpo.iterate(
            options(**more, refine={"rounds": 1, "template": " w9 ", "loss": "hinge"}), scorers={"judge": judge}
        )
    fastpo.iterate(options(**more, refine={"rounds": 1, "template": " w9 ", "loss": "ipo"}), scorers={"judge": judge})
    rows = list(read_lines(tmp_path / "run/iter-001/rows.jsonl"))
    assert {row["loss"] for row in rows if "/after-" in row["id"]} == {"ipo"}
    assert {row["loss"] for row in rows if "/after-" not in row["id"]} == {"dpo"}
