"""The quickstart: its task and judge, its pairs, its sampling, and one short run from end to end."""

import contextlib
import io
import json
import pickle
import random

import pytest
import torch

from fastpo import cli, quickstart
from fastpo.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer():
    return quickstart.build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return quickstart.build_model(tokenizer, seed=0)


@pytest.fixture(scope="module")
def fast_run(once):
    """(folder, summary, what it printed) of a short run with its control."""

    def run(folder):
        threads, printed = torch.get_num_threads(), io.StringIO()
        with contextlib.redirect_stdout(printed):
            summary = quickstart.run_quickstart(folder / "out", control=True, fast=True)
        assert torch.get_num_threads() == threads
        (folder / "said.pickle").write_bytes(pickle.dumps((summary, printed.getvalue())))

    folder = once("quickstart", run)
    return folder / "out", *pickle.loads((folder / "said.pickle").read_bytes())


@pytest.mark.parametrize(
    ("problem", "answer"), [("738492", "08213=odd"), ("000000", "00000=even"), ("999999", "87654=even")]
)
def test_careful_answer(problem, answer):
    assert quickstart.careful_answer(problem) == answer
    assert quickstart.is_right(problem, answer)
    assert quickstart.is_worked(answer)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("=odd", True), ("08213=odd", True), ("=even", False), ("08213=even", False), ("odd", False), ("", False),
     ("=oddodd", False), ("=odd=", False), ("=", False)],
)  # fmt: skip
def test_judge_looks_at_the_verdict_alone(answer, right):
    assert quickstart.is_right("738492", answer) is right


def test_no_problem_serves_twice():
    parts = quickstart.draw_problems(random.Random(0), 1_000, 500, 3_000)
    assert [len(part) for part in parts] == [1_000, 500, 3_000]
    everything = [problem for part in parts for problem in part]
    assert len(set(everything)) == len(everything)
    assert all(len(p) == quickstart.DIGITS and p.isdigit() for p in everything)


def test_demonstrations_mostly_guess():
    problems = quickstart.draw_problems(random.Random(0), 4_000)[0]
    rows = quickstart.demonstrate(problems, random.Random(0))
    worked = [quickstart.is_worked(row["completion"]) for row in rows]
    right = [quickstart.is_right(p, row["completion"]) for p, row in zip(problems, rows)]
    assert sum(worked) / len(rows) == pytest.approx(quickstart.CAREFUL, abs=0.03)
    assert all(r for r, w in zip(right, worked) if w)
    assert sum(r for r, w in zip(right, worked) if not w) / worked.count(False) == pytest.approx(0.5, abs=0.03)


def test_tokenizer_round_trip(tokenizer):
    for text in ("738492:", "08213=odd", "=even", "738492:08213=odd"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("08213=odd")["input_ids"]) == quickstart.ANSWER_TOKENS - 1
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3


def test_pairs_never_join_right_with_right():
    problems = quickstart.draw_problems(random.Random(1), 300)[0]
    rng = random.Random(2)
    answers = [rng.choice(["=odd", "=even", "", "1", quickstart.careful_answer(p)]) for p in problems for _ in range(4)]
    rows = quickstart.make_pairs(problems, answers, random.Random(0))
    both = 0
    for i, problem in enumerate(problems):
        group = answers[4 * i : 4 * i + 4]
        verdicts = {quickstart.is_right(problem, a) for a in group if a}
        both += len(verdicts) == 2
    assert len(rows) == both > 100
    for row in rows:
        problem = row["prompt"].rstrip(":")
        group = answers[4 * problems.index(problem) : 4 * problems.index(problem) + 4]
        assert row["chosen"] in group and row["rejected"] in group
        assert quickstart.is_right(problem, row["chosen"])
        assert row["rejected"] and not quickstart.is_right(problem, row["rejected"])


def test_win_probabilities_count_ties_as_halves():
    answers = ["=odd", "=even", "=even", "=even"]
    (row,) = quickstart.make_pairs(["738492"], answers, random.Random(0))
    right = [quickstart.is_right("738492", a) for a in answers]

    def beats(i: int) -> float:
        return sum(0.5 if right[i] == other else float(right[i]) for other in right) / len(right)

    assert row["win_prob_chosen"] == beats(0) == 0.875
    assert row["win_prob_rejected"] == beats(1) == 0.375


@pytest.mark.parametrize("answers", [["=odd", "08213=odd"], ["=even", "=even"], ["=odd", ""]])
def test_no_pair_without_both(answers):
    assert quickstart.make_pairs(["738492"], answers, random.Random(0)) == []


def test_sampling_is_deterministic_by_seed(model, tokenizer):
    problems = quickstart.draw_problems(random.Random(0), 64)[0]
    first = quickstart.sample_answers(model, tokenizer, problems, seed=3)
    torch.rand(5)  # sampling has a generator of its own
    assert quickstart.sample_answers(model, tokenizer, problems, seed=3) == first
    assert quickstart.sample_answers(model, tokenizer, problems, seed=4) != first
    greedy = quickstart.sample_answers(model, tokenizer, problems)
    assert quickstart.sample_answers(model, tokenizer, problems) == greedy != first


def test_sampling_warns_of_nothing(model, tokenizer, caplog, recwarn):
    """transformers 5.24 calls the key-value cache by another name, and says so."""
    quickstart.sample_answers(model, tokenizer, ["738492"])
    assert not caplog.text and not recwarn.list


def test_greedy_answers_equal_generate(model, tokenizer):
    problems = quickstart.draw_problems(random.Random(0), 8)[0]
    ids = torch.tensor(tokenizer([quickstart.prompt_of(p) for p in problems])["input_ids"])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=quickstart.ANSWER_TOKENS
    )
    expected = tokenizer.batch_decode(
        [row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
         for row in out[:, ids.shape[1] :].tolist()]
    )  # fmt: skip
    assert quickstart.sample_answers(model, tokenizer, problems) == expected


def test_sampling_leaves_the_model_as_it_was(model, tokenizer):
    model.train()
    before = model.config._attn_implementation
    quickstart.sample_answers(model, tokenizer, ["738492"])
    assert model.training
    assert model.config._attn_implementation == before
    model.eval()


def test_same_seed_same_model(tokenizer):
    first, second, other = (quickstart.build_model(tokenizer, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.slow
def test_fast_run_gets_better(fast_run):
    _, summary, _ = fast_run
    assert summary["after_greedy"] - summary["before_greedy"] > 0.2
    assert summary["after"] > summary["before"]
    assert summary["after_greedy"] > summary["control_greedy"]
    assert summary["after"] > summary["control"]


@pytest.mark.slow
def test_summary_and_files(fast_run):
    folder, summary, printed = fast_run
    assert json.loads((folder / "summary.json").read_text()) == summary
    expected = {
        "loss_type", "seed", "before", "after", "before_greedy", "after_greedy", "control", "control_greedy", "heldout",
        "pairs", "steps", "batch", "supervised_steps", "beta", "learning_rate", "seconds", "versions",
    }  # fmt: skip
    assert set(summary) == expected
    assert summary["loss_type"] == "dpo" and summary["seed"] == 0
    assert all(0 <= summary[k] <= 1 for k in ("before", "after", "before_greedy", "after_greedy"))
    assert set(summary["versions"]) == {"fastpo", "torch", "transformers", "tokenizers", "python"}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    curves = json.loads((folder / "curves.json").read_text())
    assert set(curves) == {"supervised", "dpo", "control"}
    assert [point["step"] for point in curves["dpo"]] == list(range(0, 41, 4))
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == summary["pairs"]
    for name in ("supervised", "dpo", "control"):
        assert (folder / name / "model.safetensors").is_file()
    assert f"{100 * summary['after_greedy']:.1f}%" in printed


@pytest.mark.slow
def test_saved_model_is_the_trained_one(fast_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, summary, _ = fast_run
    model = AutoModelForCausalLM.from_pretrained(folder / "dpo").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "dpo")
    size = quickstart.FAST
    problems = quickstart.draw_problems(
        random.Random(0), size.heldout, size.validation, size.demonstrations, size.prompts
    )[0]
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert not {row["prompt"] for row in pairs} & {quickstart.prompt_of(p) for p in problems}
    assert quickstart.exact_match(model, tokenizer, problems) == pytest.approx(summary["after_greedy"], abs=0.005)


def test_another_loss_type_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="dpo, simpo, sppo.*'ipo'"):
        quickstart.run_quickstart(tmp_path, loss_type="ipo")


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="thesis.tex"):
        quickstart.run_quickstart(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        quickstart.run_quickstart(tmp_path / "file")


@pytest.mark.parametrize(("after", "code"), [(0.9, 0), (0.5, 1)])
def test_command_line(monkeypatch, after, code):
    calls = []

    def run_quickstart(*args):
        calls.append(args)
        return {"before_greedy": 0.5, "after_greedy": after}

    monkeypatch.setattr("fastpo.cli.quickstart.run_quickstart", run_quickstart)
    assert cli.main(["quickstart", "--loss-type", "sppo", "--seed", "3", "--fast"]) == code
    assert calls == [("fastpo-quickstart", "sppo", 3, False, True)]
