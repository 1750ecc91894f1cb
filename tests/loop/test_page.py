"""report.html of a run of the loop, of run folders that are made here: whole ones, ones in the middle, hostile ones."""

import json
import os
import random
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fastpo
from fastpo.loop import config as configs
from fastpo.loop import guards, page_examples, rows
from fastpo.loop.evaluation import figures
from fastpo.loop.examples import examples_of, held_out
from fastpo.loop.page import page_of, write_page
from fastpo.loop.run_files import lines, read_run
from fastpo.loop.selecting import gather
from fastpo.sampling.items import Item, Response, Scores, Verdict
from fastpo.sampling.parts import write_json, write_lines

VOID = {"meta", "path", "circle"}
WORDS = ("the capital is a city with rivers and old bridges where people trade grain cloth and news since many years "
         "so it grew").split()  # fmt: skip
SECONDS = {"prompts": 0.4, "sample": 310.0, "score": 95.0, "select": 2.6, "train": 204.0, "eval": 41.0}


class Page(HTMLParser):
    """The page's elements, and proof that they nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def of(self, tag, kind=None):
        return [a for t, a in self.elements if t == tag and (kind is None or kind in a.get("class", "").split())]


def answer(rng, size):
    return " ".join(rng.choice(WORDS) for _ in range(size)).capitalize() + "."


def made(folder: Path, iterations=3, done=None, unit="pair", prompts=40, heldout=12, k=5, **options) -> Path:
    """A run's folder as the stages leave it, `done` iterations of it; what is in it is drawn."""
    rng = random.Random(0)
    run = folder / "run"
    held = [{"id": f"h{n}", "prompt": [{"role": "user", "content": f"Held out: capital number {n}?"}]}
            for n in range(heldout)]  # fmt: skip
    held_file = folder / "heldout.jsonl"
    write_lines(held_file, held)
    given = {
        "model": "models/start", "prompts": "prompts.jsonl", "output_dir": str(run), "iterations": iterations,
        "recipe": "sppo", "sample": {"n": k, "max_tokens": 64}, "select": {"min_chars": 4},
        "train": {"loss_type": "sppo", "reference": "current"}, "eval": {"prompts": str(held_file)},
        "scorers": {"judge": {"kind": "judge", "base_url": "http://localhost:8000/v1", "api_key": "sk-private"}},
    }  # fmt: skip
    config = configs.build(configs.merged(given, options))
    write_json(run / "iterate.json", configs.plain(config))
    _measured(run / "iter-000", rng, heldout, 0, unit, None)
    for t in range(1, (iterations if done is None else done) + 1):
        one = run / f"iter-{t:03d}"
        policy = "models/start" if t == 1 else str(run / f"iter-{t - 1:03d}" / "train")
        items = [Item(f"p{t}-{n}", [{"role": "user", "content": f"What is capital {n} of part {t}?"}])
                 for n in range(prompts)]  # fmt: skip
        write_lines(one / "prompts.jsonl", ({"id": i.id, "prompt": i.prompt} for i in items))
        sampled = {i.id: [_response(rng, t) for _ in range(k)] for i in items}
        order = [(i.id, j) for i in items for j in range(k)]
        rng.shuffle(order)  # as batches sorted by length leave them
        write_lines(one / "samples" / "part-0000.jsonl", (
            {"id": name, "k": j, "source": "policy", "text": sampled[name][j].text,
             "token_ids": list(sampled[name][j].token_ids), "finished": sampled[name][j].finished, "logp": -9.0,
             "seed": 7} for name, j in order
        ))  # fmt: skip
        dropped = Counter()
        judged = [gather(i.with_responses(sampled[i.id]), config.select, True, dropped) for i in items]
        scores = {i.id: _judge(one / "scores" / "judge", i, rng, unit) for i in judged}
        selector = rows.make_selector(config, judged, scores)
        counts = rows.make_rows(
            config, judged, scores, scored=True, selector=selector, earlier={}, dropped=dropped,
            encode=lambda prompt: (1, 2), rows_path=one / "rows.jsonl", counts_path=one / "rows.json",
        )  # fmt: skip
        steps = range(5, 45, 5)
        write_lines(
            one / "train" / "metrics.jsonl", ({"step": s, "loss": 0.7 - 0.01 * s / t, "epoch": s / 45} for s in steps)
        )
        responses = [r for found in sampled.values() for r in found]
        sizes = {"responses": len(responses), "truncated": sum(not r.finished for r in responses),
                 "with_token_ids": sum(r.token_ids is not None for r in responses),
                 "tokens": sum(len(r.token_ids or ()) for r in responses)}  # fmt: skip
        now = guards.sample_figures(sizes, responses)
        _manifest(one, "prompts", {}, {"prompts": prompts})
        _manifest(one, "sample", {"policy": policy}, {"asked": prompts * k, "failed": 0, **now})
        units = sum(len(i.responses) * (len(i.responses) - 1) if unit == "pair" else len(i.responses) for i in judged)
        _manifest(one, "score", {}, {"units": units, "ok": units - 3, "failed": 3})
        _manifest(one, "select", {}, counts)
        _manifest(one, "train", {"policy": policy, "ref_model": policy}, {"train_loss": 0.6 - 0.05 * t})
        _measured(one, rng, heldout, t, unit, run / "iter-000")
        write_json(
            one / "warnings.json",
            ["responses are 2.4 times as long as in the first iteration (mean tokens)"] * (t == 2),
        )
    return run


def _response(rng, t):
    size = rng.randrange(3, 14 + 4 * t)
    if rng.random() < 0.1:
        return Response("Paris.", (5, 6), True)
    return Response(answer(rng, size), tuple(range(size)), rng.random() > 0.1)


def _judge(folder, item, rng, unit):
    """Lines of verdicts on one item, and its scores."""
    size = len(item.responses)
    path = folder / "part-0000.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [round(rng.random() * 6, 2) for _ in range(size)]
    said = []
    wins = None
    if unit == "pair":
        wins = [[None] * size for _ in range(size)]
        agreement = []
        for i in range(size):
            for j in range(size):
                if i != j:
                    p = min(1.0, max(0.0, 0.5 + 0.1 * (values[i] - values[j]) + 0.05))
                    said.append({"id": item.id, "i": i, "j": j, "value": p, "status": "ok",
                                 "raw": f"Verdict: {'A' if p > 0.5 else 'B'} ({p:.2f})", "key": "k"})  # fmt: skip
                    wins[i][j] = 0.5 + 0.1 * (values[i] - values[j])
                    agreement.append(0.1)
        scores = Scores([], wins, None, agreement)
    else:
        said = [{"id": item.id, "i": i, "j": None, "value": v, "status": "ok", "raw": f"Score: {v}", "key": "k"}
                for i, v in enumerate(values)]  # fmt: skip
        scores = Scores(values)
    with open(path, "a") as file:
        file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in said)
    return scores


def _measured(one, rng, heldout, t, unit, start):
    answers = {f"h{n}": answer(rng, 6 + 2 * t) for n in range(heldout)}
    write_lines(one / "eval" / "answers.jsonl", (
        {"id": name, "k": 0, "source": "policy", "text": text, "token_ids": [1] * 8, "finished": True, "logp": -3.0,
         "seed": 1} for name, text in answers.items()
    ))  # fmt: skip
    found = {"mean tokens": 8.0 + t, "truncated": 0.02, "distinct 3-grams": 0.8, "against": "start", "policy": "x"}
    if unit == "response":
        values = {name: Scores([3 + 0.4 * t + rng.random()]) for name in answers}
        write_lines(one / "eval" / "scores" / "judge" / "part-0000.jsonl", (
            {"id": name, "i": 0, "j": None, "value": s.values[0], "status": "ok", "raw": "fine", "key": "k"}
            for name, s in values.items()
        ))  # fmt: skip
        found |= figures(values, None, heldout)
    elif t:
        table = {name: Scores([], [[None, p := 0.5 + 0.3 * rng.random()], [1 - p, None]]) for name in answers}
        found |= figures(table, None, heldout)
    write_json(one / "eval.json", found)
    _manifest(one, "eval", {}, found)


def _manifest(one, stage, options, counts, seconds=None):
    write_json(one / "stages" / f"{stage}.json", {
        "stage": stage, "state": "done", "key": "0", "options": options, "inputs": {},
        "seconds": SECONDS[stage] if seconds is None else seconds,
        "versions": {"python": "3.11"}, "counts": counts, "outputs": {},
    })  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return made(tmp_path_factory.mktemp("whole"))


def read(run):
    write_page(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def charts(html):
    """title -> the data of each chart."""
    out = {}
    for figure in re.findall(r'<figure class="chart">.*?</figure>', html, re.S):
        title = re.search(r"</span>(.*?)(?: <small>|</h3>)", figure).group(1)
        out[title] = json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure).group(1))
    return out


# -------------------------------------------------------------------- the whole


def test_the_file_needs_nothing_else(whole):
    html, page = read(whole)
    assert html.startswith("<!doctype html>")
    assert not {"link", "img", "iframe", "base"} & {tag for tag, _ in page.elements}
    assert all("src" not in a for _, a in page.elements)
    assert not re.search(r"@import|url\(", html)
    assert all(a["href"].startswith("#") for _, a in page.elements if "href" in a)
    (policy,) = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert not list(whole.glob(".report*"))


def test_headings_in_order_labels_and_table_heads(whole):
    _, page = read(whole)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:]))
    assert page.of("svg", "plot") and all(a["role"] == "img" and a["aria-label"] for a in page.of("svg", "plot"))
    assert page.of("div", "bar") and all(a["role"] == "img" and a["aria-label"] for a in page.of("div", "bar"))
    assert all(a.get("scope") for a in page.of("th"))


def test_numbers_of_the_iterations_are_those_of_the_files(whole):
    html, page = read(whole)
    drawn = charts(html)
    for t in (1, 2, 3):
        found = json.loads((whole / f"iter-00{t}" / "eval.json").read_text())
        assert drawn["Win rate"]["points"][0][t - 1] == [t, pytest.approx(found["win rate"], rel=1e-5)]
        counts = json.loads((whole / f"iter-00{t}" / "rows.json").read_text())
        # What iteration t samples is the policy's that the one before has made.
        assert drawn["Prompts that gave a row"]["points"][0][t - 1] == [
            t - 1, pytest.approx(counts["prompts kept"] / 40, rel=1e-5),
        ]  # fmt: skip
        assert counts["responses left out"]
        for reason, count in [*counts["dropped"].items(), *counts["responses left out"].items()]:
            assert reason in page.text and f"{count:,}" in page.text
    assert drawn["Agreement of the two orders"]["points"][0] == [[t, pytest.approx(0.9)] for t in (0, 1, 2)]
    assert "3 of 3 iterations" in page.text and "were begun" not in page.text
    assert "2.4 times as long" in page.text
    assert "iterate-2" in page.text and str(whole / "iter-002" / "train") in page.text


def test_error_bars_are_drawn_to_scale(whole):
    html, _ = read(whole)
    figure = next(f for f in re.findall(r"<figure.*?</figure>", html, re.S) if ">Win rate <" in f)
    scale = charts(html)["Win rate"]["scale"]
    bars = re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", re.search(r'class="error s1" d="([^"]*)"', figure).group(1))
    found = json.loads((whole / "iter-001" / "eval.json").read_text())
    a_pixel = (scale[5] - scale[4]) / (scale[6] - scale[7])
    assert len(bars) == 3
    assert (float(bars[0][0]) - float(bars[0][1])) * a_pixel == pytest.approx(2 * found["win rate error"], rel=0.02)


def test_the_share_of_bookkeeping(whole):
    _, page = read(whole)
    whole_time = sum(SECONDS.values())
    assert f"{3.0 / whole_time:.1%}" in page.text
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", "".join(a.get("style", "") for a in page.of("i")))]
    assert widths and all(0 < w <= 100 for w in widths)


def test_loss_curves_share_their_scales(whole):
    html, _ = read(whole)
    scales = [data["scale"] for title, data in charts(html).items() if title.startswith("Loss, iteration")]
    assert len(scales) == 3 and scales[0] == scales[1] == scales[2]


def test_a_real_run(toy, tmp_path):
    """The files as the stages write them, not as this file's `made` does."""

    class Longer:
        """P(first beats second), and a liking for what is shown first."""

        name, unit, key, exact, cached = "judge", "pair", {"rule": "longer"}, True, False

        def score(self, units):
            for unit in units:
                first, second = (sum(map(ord, r.text)) % 11 for r in unit.responses)
                p = 0.5 + 0.04 * (first - second) + 0.05
                yield unit, Verdict(p, raw=f"first {first}, second {second}")

        def close(self):
            pass

    start, run = tmp_path / "start", tmp_path / "run"
    toy.tokenizer().save_pretrained(start)
    toy.model().save_pretrained(start)
    fastpo.iterate(
        recipe="sppo", model=str(start), output_dir=str(run), iterations=2, scorers={"judge": Longer()},
        prompts=[{"id": str(k), "prompt": row["prompt"]} for k, row in enumerate(toy.rows(12))],
        eval={"prompts": [{"prompt": "w1 w2"}, {"prompt": "w3"}]},
        sample={"n": 3, "temperature": 1.0, "top_p": 1.0, "max_tokens": 5, "drop_truncated": False},
        train={"use_cpu": True, "bf16": False, "disable_tqdm": True, "report": False, "learning_rate": 1e-3,
               "optim": "adamw_torch", "save_strategy": "no", "per_device_train_batch_size": 4, "logging_steps": 1},
    )  # fmt: skip
    html, page = read(run)
    assert "2 of 2 iterations" in page.text and "could not be read" not in page.text
    assert {"Win rate", "Length", "Cut off", "Agreement of the two orders", "Loss, iteration 2"} <= set(charts(html))
    found = read_run(run)
    assert [found.sampled_from(one) for one in found.trained] == ["start", "iterate-1"]
    assert [found.name_of(one.options("train")["ref_model"]) for one in found.trained] == ["start", "iterate-1"]
    for one in found.trained:
        by_id = {row["id"]: row for row in lines(one.folder / "rows.jsonl")}
        examples = examples_of(found, one)
        assert len(examples) == 6
        for example in examples:
            assert example.judgements and all(j.raw.startswith("first") for j in example.judgements)
            for judgement in example.judgements:
                first, second = (sum(map(ord, example.answers[p].text)) % 11 for p in judgement.places)
                assert judgement.raw == f"first {first}, second {second}"
            if example.id in by_id:
                entries = by_id[example.id]["responses"]
                assert {e["text"]: pytest.approx(e["win_prob"]) for e in entries} == {
                    a.text: a.win_prob for a in example.answers if a.text in {e["text"] for e in entries}
                }
    (first, _) = held_out(found, found.iterations)
    assert first.prompt in ("w1 w2", "w3") and set(first.answers) == {"start", "iterate-1", "iterate-2"}
    assert first.answers["iterate-2"].win_prob is not None and first.judgements["iterate-2"]


# -------------------------------------------------------------------- to read


@pytest.mark.parametrize("unit", ["pair", "response"])
def test_chosen_and_rejected_are_those_of_the_rows(tmp_path, unit):
    run = read_run(made(tmp_path, 1, unit=unit))
    one = run.trained[0]
    by_id = {row["id"]: row for row in lines(one.folder / "rows.jsonl")}
    found = examples_of(run, one)
    assert len(found) == 6
    for example in found:
        if not example.row:
            continue
        row = by_id[example.id]
        texts = {(row["responses"][i]["text"], row["responses"][j]["text"]) for i, j, *_ in row["pairs"]}
        assert {(a.text, example.answers[k].text) for a in example.answers for k in a.beats} == texts
        for entry in row["responses"]:
            (shown,) = [a for a in example.answers if a.text == entry["text"]]
            assert shown.win_prob == pytest.approx(entry["win_prob"])
            if unit == "response":
                assert shown.score == pytest.approx(entry["score"])
    assert any(a.left_out == "truncated" for example in examples_of(run, one, 40) for a in example.answers)


def test_judgements_are_of_the_answers_that_they_name(tmp_path):
    """Their places count what is left after merging and leaving out."""
    run = read_run(made(tmp_path, 1, unit="response"))
    for example in examples_of(run, run.trained[0], 40):
        judged = [a for a in example.answers if not a.left_out]
        assert len(example.judgements) == len(judged)
        for judgement in example.judgements:
            assert example.answers[judgement.places[0]].score == pytest.approx(judgement.value)


def test_held_out_prompts_are_the_same_for_all_policies(whole):
    run = read_run(whole)
    found = held_out(run, run.iterations)
    assert len(found) == 6
    assert all(list(one.answers) == ["start", "iterate-1", "iterate-2", "iterate-3"] for one in found)
    assert all(f"capital number {one.id[1:]}?" in one.prompt[0]["content"] for one in found)
    assert [one.id for one in found] == [one.id for one in held_out(read_run(whole), run.iterations[:2])]


def test_all_policies_and_iterations_are_there_to_read(whole):
    _, page = read(whole)
    assert "left out" not in page.text
    for name in (
        "Iteration 1, answers of start",
        "Iteration 2, answers of iterate-1",
        "Iteration 3, answers of iterate-2",
    ):
        assert name in page.text
    held = [text for text in page.texts if re.fullmatch("start|iterate-[123]", text)]
    assert all(held.count(name) >= 6 for name in ("start", "iterate-1", "iterate-2", "iterate-3"))


def test_a_page_that_is_written_again_is_the_same(whole):
    def without_date(html):
        return re.sub(r"<footer>.*?</footer>", "", html)

    assert without_date(page_of(read_run(whole))) == without_date(page_of(read_run(whole)))


def test_pairs_of_token_ids_and_rows_of_goals_are_found_again(tmp_path):
    for name, select in (("pairs", {"rows": "pairs"}), ("goals", {"relabel": True})):
        run = read_run(made(tmp_path / name, 1, select=select))
        found = examples_of(run, run.trained[0], 40)
        kept = json.loads((run.trained[0].folder / "rows.json").read_text())["prompts kept"]
        assert sum(any(a.beats for a in example.answers) for example in found) == kept


def test_steps_of_a_tree_search(tmp_path):
    """As fastpo.loop.search writes them: nodes with their children, rows of token ids."""
    run = made(tmp_path, 1)
    one = run / "iter-001"
    shutil.rmtree(one / "samples")
    nodes, pairs = [], []
    for n in range(9):
        texts = ["first step", "another step", "no step"]
        children = [Response(t, (n, k), False, source="step", meta={"visits": 30 - 9 * k, "q": 0.5 - k})
                    for k, t in enumerate(texts)]  # fmt: skip
        nodes.append({"id": f"p1-{n}/0", "prompt": f"What is {n}? It is", "prompt_ids": [1, 2],
                      "responses": [r.to_json() for r in children], "meta": {}})  # fmt: skip
        pairs.append({"id": f"p1-{n}/0", "prompt": [1, 2], "chosen": [n, 0], "rejected": [n, 2], "win_prob": 0.7})
    write_lines(one / "samples" / "siblings.jsonl", nodes)
    write_lines(one / "rows.jsonl", pairs)
    found = read_run(run)
    examples = examples_of(found, found.trained[0])
    assert len(examples) == 6 and all(e.row for e in examples)
    assert all([a.score for a in e.answers] == [0.5, -0.5, -1.5] for e in examples)
    assert all(e.answers[0].beats == [2] and e.answers[2].loses == [0] for e in examples)
    _, page = read(run)
    assert "chosen over 3" in page.text and "30 visits" in page.text and "It is" in page.text


def test_a_search_counts_steps_and_what_comes_before_the_first_iteration_has_its_time(tmp_path):
    run = made(tmp_path, 1)
    one = run / "iter-001"
    for name in ("sample", "score", "select"):
        (one / "stages" / f"{name}.json").unlink()
    _manifest(one, "search", {"policy": "models/start"}, {}, seconds=100.0)
    _manifest(run / "prepare", "sft", {}, {}, seconds=50.0)
    write_json(one / "rows.json", {"prompts": 40, "prompts kept": 33, "pairs": 70, "rows": 70, "dropped": {"ties": 91}})
    html, page = read(run)
    assert "no pair of steps 7" in " ".join(a["aria-label"] for a in page.of("div", "bar"))
    assert "of the search, in iteration" in page.text and "prompts without a row" not in page.text
    labels = [a["aria-label"] for a in page.of("div", "bar")]
    assert "before: sft 50 s" in labels and any("search 1 min 40 s" in label for label in labels)


# -------------------------------------------------------------------- in the middle


def test_an_empty_folder_and_one_that_has_only_begun(tmp_path):
    _, page = read(tmp_path)
    assert "0 of 0 iterations" in page.text
    run = made(tmp_path, 3, done=0)
    _, page = read(run)
    assert "0 of 3 iterations" in page.text and "Held-out answers" in page.text


@pytest.mark.parametrize("stage", list(SECONDS))
def test_a_run_that_ended_in_a_stage(tmp_path, stage):
    """Everything behind the stage is not there yet."""
    run = made(tmp_path, 3, done=2)
    one = run / "iter-002"
    behind = list(SECONDS)[list(SECONDS).index(stage) + 1 :]
    left = {"prompts": ["prompts.jsonl"], "sample": ["samples"], "score": ["scores"],
            "select": ["rows.jsonl", "rows.json"], "train": ["train"],
            "eval": ["eval", "eval.json", "warnings.json"]}  # fmt: skip
    for name in behind:
        (one / "stages" / f"{name}.json").unlink()
        for path in left[name]:
            target = one / path
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    manifest = json.loads((one / "stages" / f"{stage}.json").read_text())
    del manifest["counts"], manifest["outputs"]
    write_json(one / "stages" / f"{stage}.json", manifest | {"state": "running"})
    _, page = read(run)
    assert f"1 of 3 iterations; iteration 2: {stage} was begun" in page.text


def test_lines_and_files_that_are_broken(tmp_path):
    run = made(tmp_path, 2)
    one = run / "iter-002"
    (one / "rows.json").write_text('{"prompts": 4')
    (one / "eval.json").write_text('["no mapping"]')
    (one / "warnings.json").write_text('{"no": "list"}')
    (one / "stages" / "sample.json").write_text('{"counts": [1], "seconds": "long", "options": 3, "state": "done"}')
    for path in (one / "samples/part-0000.jsonl", one / "scores/judge/part-0000.jsonl", one / "rows.jsonl",
                 one / "train/metrics.jsonl", one / "eval/answers.jsonl", one / "prompts.jsonl"):  # fmt: skip
        text = path.read_text()
        first = text.splitlines()[0]
        path.write_text('nonsense\n[1]\n{"id":7,"k":{}}\n' + text + first[: len(first) // 2])
    _, page = read(run)
    assert "could not be read" in page.text and "rows.json" in page.text
    (run / "iterate.json").write_bytes(b"\xff\xfe\x00")
    _, page = read(run)
    assert "iterate.json" in page.text and "Samples and judgements" in page.text


def random_values(rng, depth=0):
    kinds = [None, True, -1, 0, 3.5, float("nan"), float("inf"), 10**400, "", "text", "</script>"]
    if depth < 3:
        keys = ["id", "text", "value", "i", "dropped", "score", "role", "x"]
        kinds.append([random_values(rng, depth + 1) for _ in range(rng.randrange(4))])
        kinds.append({rng.choice(keys): random_values(rng, depth + 1) for _ in range(rng.randrange(4))})
    return rng.choice(kinds)


@pytest.mark.parametrize("seed", range(12))
def test_values_of_any_kind_make_a_page(tmp_path, seed):
    """In every JSON file and line some values are exchanged for others."""
    rng = random.Random(seed)
    run = made(tmp_path, 1, prompts=8, heldout=4, unit=rng.choice(["pair", "response"]))

    def changed(value):
        if isinstance(value, dict):
            return {
                k: random_values(rng) if rng.random() < 0.15 and k != "id" else changed(v) for k, v in value.items()
            }
        return value

    for path in run.rglob("*.json"):
        path.write_text(json.dumps(changed(json.loads(path.read_text()))))
    for path in run.rglob("*.jsonl"):
        path.write_text("".join(json.dumps(changed(json.loads(x))) + "\n" for x in path.read_text().splitlines()))
    read(run)


# -------------------------------------------------------------------- hostile, large

NASTY = "<script>alert('x')</script> & \"q\" </script> </div></article> --> @BODY@ @TITLE@ @STYLE@ \ud800 \u202e \x00"


def test_everything_from_outside_is_escaped(tmp_path):
    run = made(tmp_path, 1)
    harmless, plain = read(run)

    def nasty(value):
        if isinstance(value, dict):
            keys = ("id", "stage", "state", "policy", "ref_model", "model", "output_dir", "loss_type")
            return {k: v if k in keys else nasty(v) for k, v in value.items()} | (
                {NASTY: 4} if "truncated" in value else {}
            )
        if isinstance(value, list):
            return [nasty(v) for v in value]
        return NASTY if isinstance(value, str) else value

    for path in run.rglob("*.json"):
        path.write_text(json.dumps(nasty(json.loads(path.read_text()))))
    for path in [*run.rglob("*.jsonl"), tmp_path / "heldout.jsonl"]:
        path.write_text("".join(json.dumps(nasty(json.loads(x))) + "\n" for x in path.read_text().splitlines()))
    options = json.loads((run / "iterate.json").read_text())
    options |= {
        "recipe": NASTY,
        "eval": {"prompts": str(tmp_path / "heldout.jsonl")},
        "scorers": {NASTY: {"kind": NASTY}},
    }
    (run / "iterate.json").write_text(json.dumps(options))
    (run / "iter-001" / "scores" / "judge").rename(run / "iter-001" / "scores" / "<b>judge")
    html, page = read(run)
    assert "alert('x')" in page.text and page.text.count("@BODY@") >= 5
    kinds = {tag for tag, _ in plain.elements} | {"p", "li", "em"}
    assert {tag for tag, _ in page.elements} <= kinds
    scripts = re.findall(r"<script[^>]*>", html)
    assert len(scripts) == len(page.of("figure")) + 1
    assert not any(name.startswith("on") for _, a in page.elements for name in a)


def test_keys_of_servers_are_not_shown(whole):
    html, _ = read(whole)
    assert "sk-private" not in html


def test_the_page_stays_small(tmp_path):
    run = made(tmp_path, 14, prompts=12, k=4, heldout=8)
    long = "word " * 20_000
    for path in run.rglob("*.jsonl"):
        if "train" in path.parts:
            continue
        out = []
        for text in path.read_text().splitlines():
            line = json.loads(text)
            if "text" in line:
                line["text"] += long
            if "raw" in line:
                line["raw"] += long
            for entry in line.get("responses", ()):
                entry["text"] += long
            out.append(json.dumps(line) + "\n")
        path.write_text("".join(out))
    html, page = read(run)
    assert len(html) < 3_000_000
    assert "more characters)" in page.text and "are left out" in page.text
    assert len(page.of("article")) <= page_examples.ITERATIONS * 6 + 6


def test_only_lines_of_the_examples_are_parsed(whole, monkeypatch):
    """Files of a large iteration have millions of lines."""
    parsed = []
    real = json.loads
    monkeypatch.setattr("fastpo.loop.run_files.json.loads", lambda line: parsed.append(line) or real(line))
    run = read_run(whole)
    parsed.clear()
    examples_of(run, run.trained[0], 2)
    assert 0 < len(parsed) < 2 * (5 + 5 * 4 + 2) + 10
    parsed.clear()
    assert examples_of(run, run.trained[0], 2) and len(parsed) == 2  # the prompts: other files have not changed
    path = run.trained[0].folder / "rows.jsonl"
    os.utime(path, ns=(0, 0))
    assert examples_of(run, run.trained[0], 2) and 4 < len(parsed) < 8
