"""The run report: one self-contained file whose curves, counts and settings are the run's."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest

from fastpo import env
from fastpo.config.train_config import TrainConfig
from fastpo.data import DataReport
from fastpo.report import charts
from fastpo.report.page import write_report

VOID = {"meta", "path", "circle"}


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


def figures(html):
    """title -> {"names", "points", "scale", "svg"} of each chart."""
    out = {}
    for figure in re.findall(r'<figure class="chart">.*?</figure>', html, re.S):
        title = re.search(r"</span>(.*?)(?: <small>|</h3>)", figure).group(1)
        data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure).group(1))
        names = re.findall(r"</svg>([^<]*) <b>", figure)
        out[title] = {**data, "names": names, "svg": re.search(r'<svg class="plot".*?</svg>', figure, re.S).group(0)}
    return out


def write(tmp_path, **changes):
    """The report of `changes` over an ordinary run; (text, Page)."""
    config = changes.pop("config", None) or TrainConfig(output_dir="runs/a", learning_rate=5e-7)
    given = {
        "title": "a run", "config": config.to_dict(), "log_history": history(), "data": {"train": counts()},
        "warnings": [], "environment": env.collect(), "summary": {"model": "tiny", "outcome": "finished"}, **changes,
    }  # fmt: skip
    path = write_report(tmp_path / "report.html", **given)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def counts(**changes):
    return DataReport(
        **{
            "rows": 110,
            "kept": 100,
            "dropped": {"identical responses": 10},
            "responses": 200,
            "truncated": 50,
            "truncated_eos": 40,
            "prompt_tokens": 2000,
            "response_tokens": 6000,
            "longest_sequence": 128,
            "max_length": 128,
            "warnings": ["a warning of the data"],
            **changes,
        }  # fmt: skip
    )


def train_line(step, loss, **more):
    return {"loss": loss, "grad_norm": 1.0, "learning_rate": 1e-6 / step, "rewards/chosen": 0.1 * step,
            "rewards/rejected": -0.1 * step, "rewards/accuracies": 0.5, "rewards/margins": 0.2 * step,
            "logps/chosen": -50.0, "logps/rejected": -60.0, "tokens_per_second": 1e4, "num_tokens": 100 * step,
            "peak_memory_gb": 1.5, "epoch": step / 100, "step": step, **more}  # fmt: skip


def history():
    lines = [train_line(step, 0.7 - 0.005 * step) for step in range(10, 60, 10)]
    lines.insert(2, {"eval_loss": 0.66, "eval_rewards/margins": 0.3, "eval_runtime": 2.0, "epoch": 0.2, "step": 20})
    return [*lines, {"train_loss": 0.55, "train_runtime": 90.0, "tokens_per_second": 9e3, "epoch": 0.5, "step": 50}]


# -------------------------------------------------------------------- the file


def test_the_file_needs_nothing_else(tmp_path):
    html, page = write(tmp_path)
    assert html.startswith("<!doctype html>")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    assert not {"link", "img", "iframe", "base"} & {tag for tag, _ in page.elements}
    assert all("src" not in a for _, a in page.elements)
    assert all(a["href"].startswith("#") for _, a in page.elements if "href" in a)
    (policy,) = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert any(a.get("name") == "viewport" for a in page.of("meta"))
    for media in ("prefers-color-scheme: dark", "media print", "max-width"):
        assert media in html


def test_an_existing_report_stays_whole_until_the_new_one_is(tmp_path, monkeypatch):
    write(tmp_path, title="the first")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError):
        write(tmp_path, title="the second")
    assert "the first" in (tmp_path / "report.html").read_text()


NASTY = "<script>alert('x')</script> & \"q\" </script> @BODY@ @TITLE@ \ud800"


def test_everything_from_outside_is_escaped(tmp_path):
    config = TrainConfig()  # which would refuse half of a character
    config.run_name = config.output_dir = NASTY
    config.lr_scheduler_kwargs = {NASTY: NASTY}
    _, plain = write(tmp_path)
    html, page = write(
        tmp_path, title=NASTY, config=config, log_history=[*history(), train_line(60, 0.4, **{NASTY: 1.0})],
        data={NASTY: counts(dropped={NASTY: 3}, warnings=[NASTY])},
        warnings=[{"name": NASTY, "step": NASTY, "message": NASTY}],
        environment={NASTY: NASTY, "packages": {NASTY: NASTY}},
        summary={"model": NASTY, "outcome": NASTY, NASTY: NASTY},
    )  # fmt: skip
    assert "<script>alert" not in html
    assert len(page.of("script")) == len(plain.of("script")) + 1  # one more chart, for the metric of that name
    assert page.text.count("alert('x')") > 10
    assert page.of("title") == [{}] and len(page.of("main")) == 1


# ------------------------------------------------------------------- the head


def test_the_head_says_what_ran_and_how_it_ended(tmp_path):
    config = TrainConfig(loss_type=["ipo", "sft"], loss_weights=[1, 0.5], beta=0.2, output_dir="runs/a")
    summary = {"model": "org/some-model", "outcome": "finished", "train_runtime": 3725.0, "tokens_per_second": 12345.6,
               "peak_memory_gb": 7.25, "steps": 50, "max_steps": 50, "device": "cpu"}  # fmt: skip
    html, page = write(tmp_path, title="my run", config=config, summary=summary)
    head = Page(re.search(r"<header>.*?</header>", html, re.S).group(0)).text
    for part in ("my run", "org/some-model", "ipo (beta 0.2, ipo_reduce mean) + 0.5 sft", "1 h 2 min", "12,346", "7.25",
                 "runs/a", "0.45 final loss", "0.66 eval loss", "finished"):  # fmt: skip
        assert part in head, part
    assert "Warnings" not in page.text and "device" in page.text


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [("finished", "finished"), ("failed: no memory", "failed"), ("stopped by a callback at step 3", "stopped")],
    ids=["finished", "failed", "stopped"],
)
def test_the_outcome_has_its_colour(tmp_path, outcome, kind):
    html, _ = write(tmp_path, summary={"outcome": outcome, "steps": 3, "max_steps": 50})
    assert f'<span class="chip {kind}">{outcome}</span>' in html
    assert "3 of 50" in html


def test_warnings_come_first_with_their_reason(tmp_path):
    warnings = [
        {"name": "chosen_collapse", "step": 40, "message": "the chosen answers have lost 0.9 nats"},
        {"name": "learning_rate", "step": 0, "message": "far above"},
    ]
    html, page = write(tmp_path, warnings=warnings)
    assert "chosen collapse step 40 the chosen answers have lost 0.9 nats" in page.text
    assert "learning rate at the start far above" in page.text and "2 warnings" in page.text
    assert html.index('id="warnings"') < html.index("<figure")


# ----------------------------------------------------------------- the curves


def test_curves_hold_the_logged_values(tmp_path):
    html, _ = write(tmp_path)
    charts_ = figures(html)
    loss = charts_["Loss"]
    assert loss["names"] == ["train", "eval"]
    assert loss["points"] == [[[s, round(0.7 - 0.005 * s, 6)] for s in range(10, 60, 10)], [[20, 0.66]]]
    assert charts_["Rewards"]["names"] == ["chosen", "rejected"]
    assert charts_["Rewards"]["points"][1] == [[s, round(-0.1 * s, 6)] for s in range(10, 60, 10)]
    assert charts_["Reward margin"]["points"][1] == [[20, 0.3]]
    assert list(charts_) == ["Loss", "Accuracy", "Reward margin", "Rewards", "Log-probabilities", "Gradient norm",
                             "Learning rate", "Tokens per second", "Peak memory"]  # fmt: skip
    assert all(c["scale"][:2] == [10, 50] for c in charts_.values())


def test_pixels_are_where_the_scale_says(tmp_path):
    html, _ = write(tmp_path)
    chart = figures(html)["Loss"]
    x0, x1, left, right, y0, y1, bottom, top, _ = chart["scale"]
    path = re.search(r'class="line s1 d0" d="M([^"]*)"', chart["svg"]).group(1)
    drawn = [tuple(map(float, p.split())) for p in path.split("L")]
    for (px, py), (x, y) in zip(drawn, chart["points"][0], strict=True):
        assert px == pytest.approx(left + (right - left) * (x - x0) / (x1 - x0), abs=0.06)
        assert py == pytest.approx(bottom + (top - bottom) * (y - y0) / (y1 - y0), abs=0.06)
    assert all(0 <= px <= charts.WIDTH and 0 <= py <= charts.HEIGHT for px, py in drawn)


def test_every_evaluation_set_is_told_apart(tmp_path):
    lines = history()
    for name, offset in (("easy", 0.0), ("my_hard_set", 0.2)):
        lines += [
            {f"eval_{name}_loss": 0.6 + offset, f"eval_{name}_rewards/chosen": offset, "step": s} for s in (25, 50)
        ]
    html, page = write(tmp_path, log_history=lines)
    assert figures(html)["Loss"]["names"] == ["train", "eval", "easy", "my_hard_set"]
    rewards = figures(html)["Rewards"]
    assert rewards["names"] == ["chosen", "chosen, easy", "chosen, my_hard_set", "rejected"]
    styles = re.findall(r'<path class="line (s\d d\d)"', rewards["svg"])
    assert len(set(styles)) == len(styles) == 4
    assert "0.8 (first 0.8)" in page.text  # the table of evaluations


def test_non_finite_values_are_gaps(tmp_path):
    values = [0.7, 0.6, math.nan, 0.5, 0.4, math.inf, 0.3, None, 0.2, 0.1]
    html, _ = write(tmp_path, log_history=[{"loss": v, "step": k} for k, v in enumerate(values, 1)])
    chart = figures(html)["Loss"]
    assert chart["points"] == [[[k, v] for k, v in enumerate(values, 1) if v is not None and math.isfinite(v)]]
    path = re.search(r'class="line[^"]*" d="([^"]*)"', chart["svg"]).group(1)
    assert path.count("M") == 3 and path.count("L") == 3  # 0.7-0.6, 0.5-0.4 and 0.2-0.1
    assert len(re.findall('class="dot', chart["svg"])) == 1  # 0.3, alone
    assert "NaN" not in html and "Infinity" not in html


def test_a_single_point_is_a_dot(tmp_path):
    html, _ = write(tmp_path, log_history=[train_line(10, 0.6)])
    svg = figures(html)["Loss"]["svg"]
    assert len(re.findall('class="dot', svg)) == 1 and 'class="line' not in svg


def test_a_run_too_short_for_a_log_line_shows_its_summary(tmp_path):
    line = {"train_loss": 0.6, "train_runtime": 1.0, "rewards/margins": 0.2, "epoch": 1.0, "step": 3}
    html, _ = write(tmp_path, log_history=[line])
    assert figures(html)["Loss"]["points"] == [[[3, 0.6]]]
    assert figures(html)["Reward margin"]["points"] == [[[3, 0.2]]]


def test_no_line_at_all_and_nothing_finite(tmp_path):
    for lines in ([], [{"loss": math.nan, "step": 1}]):
        html, page = write(tmp_path, log_history=lines, data={}, environment={}, summary={})
        assert figures(html) == {} and "Settings" in page.text


def test_flat_and_wide_curves_get_an_axis(tmp_path):
    lines = [train_line(s, 0.5, grad_norm=10.0 ** (s - 3)) for s in range(1, 7)]
    html, page = write(tmp_path, log_history=lines)
    assert figures(html)["Gradient norm"]["scale"][-1] == 1 and "before clipping, logarithmic" in page.text
    flat = figures(html)["Loss"]["scale"]
    assert flat[-1] == 0 and flat[4] < 0.5 < flat[5]
    assert len(re.findall('class="y"', figures(html)["Gradient norm"]["svg"])) >= 3


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-7, 4e-7), (0.4131, 0.4132), (1e5, 3e9), (-50, -49)], ids=str)
def test_ticks_are_round_and_inside(low, high):
    ticks = charts.Axis(low, high, 0, 100).ticks()
    room = 1e-9 * (high - low)
    assert 3 <= len(ticks) <= 7 and all(low - room <= t <= high + room for t in ticks)
    gaps = [b - a for a, b in zip(ticks, ticks[1:])]
    assert max(gaps) == pytest.approx(min(gaps), rel=1e-6)
    assert float(f"{gaps[0]:.2g}") == pytest.approx(gaps[0], rel=1e-6)


def test_a_long_log_is_thinned_and_keeps_its_spikes(tmp_path):
    lines = [{"loss": 0.5 + 0.01 * math.sin(k), "step": k} for k in range(1, 100_001)]
    lines[77_776]["loss"], lines[33_332]["loss"] = 5.0, math.nan
    html, page = write(tmp_path, log_history=lines)
    (points,) = figures(html)["Loss"]["points"]
    assert [77_777, 5.0] in points and points[0][0] == 1 and points[-1][0] == 100_000
    assert len(points) <= 2 * charts.BUCKETS + 2 and len(html) < 200_000
    path = re.search(r'class="line[^"]*" d="([^"]*)"', figures(html)["Loss"]["svg"]).group(1)
    assert path.count("M") == 2  # the gap
    assert "100,000 log lines, every 500th" in page.text


def test_thinning_keeps_extremes_order_and_gaps():
    points = [(float(k), None if k == 500 else math.sin(k)) for k in range(1000)]
    thinned = charts.thin(points, buckets=10)
    assert thinned == sorted(thinned, key=lambda p: p[0]) and len(thinned) <= 33
    assert (500.0, None) in thinned
    finite = [y for _, y in points if y is not None]
    kept = [y for _, y in thinned if y is not None]
    assert max(kept) == max(finite) and min(kept) == min(finite)
    assert charts.thin(points[:20], buckets=10) == points[:20]


def test_metrics_of_callbacks_get_charts_of_their_own(tmp_path):
    lines = [train_line(s, 0.5, **{"my/score": s / 10, "note": "text", "flag": True}) for s in (10, 20)]
    html, _ = write(tmp_path, log_history=lines)
    assert figures(html)["my/score"]["points"] == [[[10, 1.0], [20, 2.0]]]
    assert "flag" not in figures(html) and "note" not in figures(html)


# -------------------------------------------------------------- counts, settings


def test_data_counts_have_a_column_a_set(tmp_path):
    sets = {"train": counts(), "eval": dataclasses.asdict(counts(rows=7, kept=7, truncated=0, dropped={}, warnings=[]))}
    _, page = write(tmp_path, data=sets)
    for row in ("rows 110 7", "kept 100 (90.9%) 7", "dropped: identical responses 10 0",
                "responses truncated 50 (25.0%) 0 (0.0%)", "tokens of responses 6,000 (mean 30)"):  # fmt: skip
        assert row in page.text, row
    assert "a warning of the data" in page.text and "doubled" not in page.text


def test_changed_settings_come_before_the_defaults(tmp_path):
    config = TrainConfig(learning_rate=3e-7, optim_args="a=<b>", max_length=None)
    html, page = write(tmp_path, config=config)
    settings = re.search(r"<h2>Settings</h2>(.*?)</section>", html, re.S).group(1)
    changed, rest = settings.split("<details>")
    assert "3e-07" in changed and "1e-06" in changed and "optim_args" in changed and "max_length" in changed
    assert "weight_decay" not in changed and "weight_decay" in rest and "learning_rate" not in rest
    names = re.findall(r'<th scope="row">(\w+)</th>', settings)
    assert sorted(names) == sorted(config.to_dict())
    assert "hub_token" not in html


def test_environment_and_values_are_listed(tmp_path):
    _, page = write(tmp_path, environment={"python": "3.11", "packages": {"torch": "2.13", "trl": None}})
    assert "python 3.11 torch 2.13" in page.text and " trl " not in page.text
    assert "7 log lines" in page.text and "eval_loss" in page.text


def test_train_writes_the_report(tmp_path, toy):
    """The whole way: a run's own log, data reports and warnings."""
    import fastpo

    result = fastpo.train(
        toy.model(), toy.rows(12), eval_dataset=toy.rows(4, seed=1), processing_class=toy.tokenizer(),
        output_dir=str(tmp_path / "run"), max_steps=4, logging_steps=1, eval_steps=2, per_device_train_batch_size=4,
        use_cpu=True, learning_rate=1e-3, disable_tqdm=True, run_name="the toy",
    )  # fmt: skip
    html = (tmp_path / "run" / "report.html").read_text()
    page = Page(html)
    logged = [[line["step"], float(f"{line['loss']:.6g}")] for line in result.log_history if "loss" in line]
    evaluated = [[s["step"], float(f"{s['eval_loss']:.6g}")] for s in result.log_history if "eval_loss" in s]
    assert figures(html)["Loss"]["points"] == [logged, evaluated]
    assert "the toy" in page.text and "dpo (beta 0.1)" in page.text and "finished" in page.text
    assert "rows 12 4" in page.text
