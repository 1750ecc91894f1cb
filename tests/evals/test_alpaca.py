"""AlpacaEval 2: the package's figures, what a rate must obey, and input that is refused."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent))
import alpaca_cases

from fastpo.errors import ConfigError, DataError
from fastpo.evals import alpaca, glm

FROZEN = json.loads(alpaca_cases.FROZEN.read_text())["cases"]


def close(found: alpaca.WinRates, wanted: dict[str, float]) -> None:
    got = {
        "win_rate": found.win_rate, "standard_error": found.standard_error, "n_wins": found.wins,
        "n_wins_base": found.losses, "n_draws": found.ties, "n_total": found.prompts - found.missing_preferences,
        "discrete_win_rate": found.discrete_win_rate, "length_controlled_winrate": found.length_controlled,
        "lc_standard_error": found.lc_package_error,
    }  # fmt: skip
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, abs=1e-6), name


def case(number: int, folder: Path) -> alpaca.WinRates:
    calibration = alpaca.load_calibration(alpaca_cases.write_gamed(number, folder / "df_gamed.csv"))
    form = alpaca_cases.FORMS[alpaca_cases.form(number)]
    return alpaca.win_rates(
        alpaca_cases.annotations(number), calibration=calibration, form=form, allow_missing=True, resamples=0
    )


def drawn(count: int, seed: int, apart: float = 0.2, level: float = -0.4) -> alpaca.Annotations:
    """Preferences of a logistic model with a coefficient of length of -1.5, [count]."""
    draw = np.random.default_rng(seed)
    baseline = np.round(np.exp(draw.normal(6.5, 0.5, count)))
    ours = np.round(baseline * np.exp(draw.normal(apart, 0.4, count)))
    difference = baseline - ours
    logits = level - 1.5 * np.tanh(difference / difference.std(ddof=1)) + draw.normal(0, 0.7, count)
    return alpaca.Annotations(1 / (1 + np.exp(-logits)), ours, baseline)


def swapped(rows: alpaca.Annotations) -> alpaca.Annotations:
    """The baseline as the model and the model as the baseline."""
    return alpaca.Annotations(1 - rows.preferences, rows.baseline_lengths, rows.lengths)


@pytest.mark.parametrize("number", range(alpaca_cases.CASES))
def test_the_package_s_figures(number, tmp_path):
    close(case(number, tmp_path), FROZEN[number])


def test_the_cases_hold_what_they_say():
    kinds = {(alpaca_cases.form(n), alpaca_cases.kind(n)) for n in range(alpaca_cases.CASES)}
    assert {form for form, _ in kinds} == set(alpaca_cases.FORMS) and len(FROZEN) == 50
    assert {kind for _, kind in kinds} == set(alpaca_cases.KINDS)


def test_the_package_itself(tmp_path):
    pytest.importorskip("alpaca_eval.metrics.glm_winrate", reason="alpaca-eval is not installed")
    for number in range(alpaca_cases.CASES):
        close(case(number, tmp_path), alpaca_cases.package_figures(number, tmp_path / "df_gamed.csv"))


@pytest.mark.parametrize("seed", range(3))
def test_the_quick_solver_is_the_class_to_the_bit(seed):
    draw = np.random.default_rng(seed)
    x, y, weights = draw.normal(size=(500, 3)), draw.random(500) < 0.5, draw.random(500) * (draw.random(500) < 0.9)
    assert glm.solver() is glm._by_the_solver
    for c in glm.CS:
        a, b = np.random.RandomState(seed), np.random.RandomState(seed)
        for _ in range(2):  # both draw once, so that the second fit begins alike
            one, other = (fit(x, y.astype(int), weights, c, state) for fit, state in
                          ((glm._by_the_solver, a), (glm._by_the_class, b)))  # fmt: skip
            assert np.array_equal(one, other)


def test_resamples_are_fitted_to_the_solver_s_solution():
    rows = drawn(400, 0)
    design = alpaca._design(rows, None, False, False)
    coefficients, c = glm.fit(design.x, design.targets, design.weights)
    [exact] = glm.refit(design.x, design.targets, design.weights[None], c, np.zeros(2))
    assert exact == pytest.approx(coefficients, abs=0.02)  # liblinear stops early
    won = 1 / (1 + np.exp(-design.x @ exact))
    slope = c * design.x.T @ (won - design.targets)
    assert np.abs(slope + np.sign(exact)).max() < 1e-6 * c * 400  # the optimum's own condition, L1 and all


@pytest.mark.parametrize("form", [alpaca.MINIMAL, alpaca.NOREG])
def test_swapped_models_give_the_rest_to_a_hundred(form):
    calibration = alpaca.Calibration(np.random.default_rng(5).normal(size=300))
    for seed in range(5):
        rows = drawn(300, seed)
        one, other = (
            alpaca.win_rates(r, calibration=calibration, form=form, resamples=0) for r in (rows, swapped(rows))
        )
        assert one.win_rate + other.win_rate == pytest.approx(100, abs=1e-9)
        assert one.length_controlled + other.length_controlled == pytest.approx(100, abs=0.05)  # the solver's stop
        assert (one.wins, one.losses, one.ties) == (other.losses, other.wins, other.ties)


@pytest.mark.parametrize("apart", [0, 250, -40])
def test_a_constant_difference_of_lengths_gives_the_raw_rate(apart):
    for seed in range(5):
        rows = drawn(200, seed)
        rows = alpaca.Annotations(rows.preferences, rows.baseline_lengths + 40 + apart, rows.baseline_lengths + 40)
        found = alpaca.win_rates(rows, resamples=10)
        assert found.length_controlled == found.win_rate and found.lc_interval == found.interval
        assert found.lc_standard_error == found.standard_error and "this is the raw rate" in found.note


def test_length_is_taken_out():
    """The same preferences of quality, with and without the judge's love of length."""
    fair = drawn(3000, 1, apart=0.0)
    longer = drawn(3000, 1, apart=0.5)
    fair, longer = (alpaca.win_rates(rows, resamples=0) for rows in (fair, longer))
    assert longer.win_rate > fair.win_rate + 10
    assert abs(longer.length_controlled - fair.length_controlled) < 5


def test_a_model_against_itself():
    rows = [dict(row, generator_2="baseline") for row in alpaca_cases.annotations(0)]
    found = alpaca.win_rates(rows)
    assert (found.length_controlled, found.lc_package_error) == (50.0, 0.0)
    assert found.lc_standard_error is None and found.inverse_penalty is None


def truth(apart: float, level: float) -> float:
    """Rate at equal lengths of `drawn`: the regression that a hundred thousand instructions give."""
    return alpaca.win_rates(drawn(100_000, 99, apart, level), resamples=0).length_controlled


def test_intervals_cover():
    """Nominal 95 % in 120 draws of a seed each: 0.88 is three standard deviations below, and all of them are one in
    five hundred; the mean width is what the rates' own spread makes it, which 120 draws give to 6 %."""
    wanted, found = truth(0.2, -0.4), []
    raw = 100 * float(drawn(100_000, 99).preferences.mean())
    for seed in range(120):
        found.append(alpaca.win_rates(drawn(200, seed), resamples=200, seed=seed))
    for true, rates, intervals in (
        (wanted, [f.length_controlled for f in found], [f.lc_interval for f in found]),
        (raw, [f.win_rate for f in found], [f.interval for f in found]),
    ):
        assert 0.88 <= np.mean([low <= true <= high for low, high in intervals]) <= 0.99
        width = np.mean([high - low for low, high in intervals])
        assert width == pytest.approx(2 * 1.96 * np.std(rates, ddof=1), rel=0.2)


def longer_by(apart: float, spread: float, seed: int, count: int = 300) -> alpaca.Annotations:
    """A model that is longer by `apart` characters, give or take `spread`, and wins 70 of 100, whatever the length."""
    draw, baseline = np.random.default_rng(seed), np.full(count, 2000.0)
    ours = baseline + apart + np.round(draw.normal(0, spread, count))
    return alpaca.Annotations((draw.random(count) < 0.7).astype(float), ours, baseline)


@pytest.mark.parametrize("spread", [1, 100, 200])
def test_lengths_that_differ_by_more_than_they_vary_give_no_interval(spread, caplog):
    """By 900, 9 and 4.5 of their standard deviations: intervals of resamples held the truth, 70, in 40 % and fewer."""
    for seed in range(5):
        caplog.clear()
        found = alpaca.win_rates(longer_by(900, spread, seed), resamples=100)
        assert found.lc_interval is None and found.lc_standard_error is None and found.interval is not None
        assert "no interval" in found.note
        assert [record.getMessage() for record in caplog.records] == [f"model: {found.note}"]
    near = alpaca.win_rates(longer_by(100, 100, 0), resamples=100)
    assert near.note is None and near.lc_interval is not None


def test_intervals_that_are_left_hold_where_lengths_differ_by_much():
    """At 1.75 standard deviations apart; without the rule, 80 % at 2.5 of them."""
    found = [alpaca.win_rates(longer_by(175, 100, seed), resamples=100, seed=seed) for seed in range(60)]
    intervals = [f.lc_interval for f in found if f.lc_interval is not None]
    assert len(intervals) > 40 and np.mean([low <= 70 <= high for low, high in intervals]) >= 0.83


def test_a_coefficient_of_0_is_no_measurement():
    rows = drawn(60, 0)
    rows = alpaca.Annotations(np.tile([0.4, 0.6], 30), rows.lengths, rows.baseline_lengths)
    found = alpaca.win_rates(rows, resamples=50)
    assert found.coefficients["model"] == 0 and found.length_controlled == 50 and found.lc_interval is None
    assert "set the model's own coefficient to 0" in found.note


@pytest.mark.parametrize("preference", [0.0, 0.5, 1.0])
def test_preferences_that_are_all_alike(preference, capfd):
    rows = drawn(60, 0)
    rows = alpaca.Annotations(np.full(60, preference), rows.lengths, rows.baseline_lengths)
    found = alpaca.win_rates(rows, resamples=50)
    assert found.lc_interval is None and f"all 60 preferences are {preference:g}" in found.note
    assert found.interval[0] <= found.win_rate <= found.interval[1]
    assert capfd.readouterr().out == ""  # liblinear's lines, one for each fit


@pytest.mark.parametrize("number", range(0, alpaca_cases.CASES, 7))
def test_a_rate_is_within_its_interval(number):
    found = alpaca.win_rates(alpaca_cases.annotations(number), allow_missing=True, resamples=100)
    for rate, interval in ((found.win_rate, found.interval), (found.length_controlled, found.lc_interval)):
        assert interval is None or interval[0] <= rate <= interval[1]


@pytest.mark.parametrize("raw, controlled, said", [
    (20, 9.9, True), (20, 10.1, False), (20, 39.9, False), (20, 40.1, True), (50, 37.4, True), (50, 37.6, False),
])  # fmt: skip
def test_the_package_s_rule_of_an_extreme_change(raw, controlled, said):
    assert alpaca._extreme(raw, controlled) is said


def test_an_extreme_change_is_noted():
    rows = drawn(300, 0, apart=1.0)
    found = alpaca.win_rates(rows, resamples=0)
    assert found.win_rate > found.length_controlled + 20
    assert f"is {found.length_controlled:.1f} where the raw one is {found.win_rate:.1f}" in found.note


def test_the_resampled_error_is_that_of_new_instructions():
    calibration = alpaca.Calibration(np.random.default_rng(3).normal(0, 0.5, 300))
    rates, errors, package = [], [], []
    for seed in range(60):
        found = alpaca.win_rates(
            drawn(300, seed), calibration=calibration, form=alpaca.NOREG, resamples=100 if seed < 10 else 0
        )
        rates.append(found.length_controlled)
        errors += [found.lc_standard_error] if seed < 10 else []
        package.append(found.lc_package_error)
    assert np.mean(errors) == pytest.approx(np.std(rates, ddof=1), rel=0.25)
    assert np.mean(package) < np.std(rates, ddof=1) / 3


def test_the_same_seed_the_same_error():
    rows = drawn(100, 0)
    one, same, other = (alpaca.win_rates(rows, resamples=60, seed=seed) for seed in (0, 0, 1))
    assert one == same and one.lc_standard_error != other.lc_standard_error


def test_difficulties_go_by_prompt(tmp_path):
    rows = alpaca_cases.annotations(1)
    path = alpaca_cases.write_gamed(1, tmp_path / "df_gamed.csv")
    prompts = [row["instruction"] for row in rows]
    calibration = alpaca.load_calibration(path, prompts=prompts)
    straight = alpaca.win_rates(rows, calibration=alpaca.load_calibration(tmp_path), resamples=0)
    assert alpaca.win_rates(rows, calibration=calibration, prompts=prompts, resamples=0) == straight
    turned = alpaca.win_rates(rows[::-1], calibration=calibration, prompts=prompts, resamples=0)
    assert turned == straight
    part = [row for number, row in enumerate(rows) if number != 3]
    with pytest.raises(DataError, match="model: 1 of 120 prompts have no annotation: 'instruction 3'; allow_missing"):
        alpaca.win_rates(part, calibration=calibration)
    assert alpaca.win_rates(part, calibration=calibration, allow_missing=True, resamples=0).prompts == 119
    with pytest.raises(DataError, match="119 annotations and 120 instruction difficulties; without.*by their place"):
        alpaca.win_rates(part, calibration=alpaca.load_calibration(path))


@pytest.mark.parametrize("name", ["annotations.json", "annotations.json.gz", "rows.jsonl", "folder"])
def test_where_annotations_come_from(name, tmp_path):
    rows = alpaca_cases.annotations(0)
    wanted = alpaca.win_rates(rows, resamples=0)
    path = tmp_path / ("annotations.json" if name == "folder" else name)
    text = json.dumps(rows) if ".jsonl" not in name else "\n".join(map(json.dumps, rows))
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert alpaca.win_rates(tmp_path if name == "folder" else path, resamples=0) == wanted


def test_arrays():
    found = alpaca.win_rates(alpaca.Annotations([1, 0, 0.5, 1, 1, 0.2], [5] * 6, [4, 5, 6, 7, 8, 9]), resamples=0)
    assert found.win_rate == pytest.approx(100 * 3.7 / 6) and found.form == "length_controlled_minimal"


def test_a_leaderboard_is_its_models_one_by_one(tmp_path):
    files = []
    for number in range(6):
        files.append(tmp_path / f"{number}.json")
        named = [dict(row, generator_2=f"model {number}") for row in alpaca_cases.annotations(number)]
        files[-1].write_text(json.dumps(named))
    alone = sorted((alpaca.win_rates(file, resamples=0) for file in files), key=lambda found: -found.length_controlled)
    for workers in (None, 1, 2):
        assert alpaca.leaderboard(files, workers=workers, resamples=0) == alone
    files[2].write_text("[]")
    for workers in (1, 2):
        with pytest.raises(DataError, match="2.json: no annotations"):
            alpaca.leaderboard(files, workers=workers, resamples=0)
    with pytest.raises(ConfigError, match="workers must be 1 or more, not 0"):
        alpaca.leaderboard(files, workers=0)
    with pytest.raises(ConfigError, match="a leaderboard is of several sources"):
        alpaca.leaderboard(str(files[0]))


ROW = {"instruction": "a", "output_1": "b", "output_2": "c", "generator_1": "base", "generator_2": "new"}


def rows(*preferences, **changes):
    return [{**ROW, "instruction": f"i{n}", "preference": p, **changes} for n, p in enumerate(preferences)]


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "annotations: no annotations"),
        (rows(1, 2, 2.5, -1, 1.5), r"new: 2 of 5 preferences are neither in \[1, 2\] nor 0, a tie: 'row 2: 2.5', 'row"),
        (rows(1, 2, "2", 1, 1), "new: the preference of row 2 is '2', not a number"),
        (rows(1, 2, True, 1, 1), "new: the preference of row 2 is True, not a number"),
        (rows(1, 2, 1, 1, 1, output_2=3), "new: the answer of row 0 is a int, not a text"),
        (rows(1, 2, 1) + rows(1, 2), "new: 2 of 3 prompts occur more than once: 'i0', 'i1'"),
        (rows(1, 2, None, 1, None), "new: 2 of 5 preferences are missing: 'i2', 'i4'; allow_missing=True"),
        (rows(1, 2) + [{**r, "instruction": "x" + str(n), "output_2": None} for n, r in enumerate(rows(1, 1, 1))],
         "new: 3 of 5 answers are missing: 'x0', 'x1', 'x2'"),
        (rows(1, 2), "new: 2 whole annotations; the regression's 5 folds need one each"),
        (rows(1, 2) + rows(1, generator_2="other"), "annotations of 2 models.*choose one with model="),
        (rows(1, 2) + rows(1, generator_1="other"), "annotations against 2 baselines: 'base', 'other'"),
        ([{k: v for k, v in r.items() if k != "preference"} for r in rows(1, 2)],
         "2 of 2 annotations have no 'preference'"),
        (["text"], "row 0 is a str"),
        ("nowhere/at/all.json", "all.json"),
    ],
)  # fmt: skip
def test_bad_annotations(given, said):
    with pytest.raises(DataError, match=said):
        alpaca.win_rates(given)


@pytest.mark.parametrize(
    "arrays, said",
    [
        (([0.5, 1.2], [1, 1], [1, 1]), r"model: 1 of 2 preferences are not in \[0, 1\]: 'row 1: 1.2'"),
        (([0.5, 1], [1, -1], [1, 1]), "1 of 2 lengths are negative or infinite: 'row 1: -1'"),
        (([0.5, 1], [1, 1], [1, np.inf]), "1 of 2 baseline_lengths are negative or infinite"),
        (([0.5, 1], [1], [1, 1]), r"lengths has the shape \(1,\), not that of 2 preferences"),
        ((["a"], [1], [1]), "preferences must be numbers"),
        (([], [], []), "no annotations"),
    ],
)
def test_bad_arrays(arrays, said):
    with pytest.raises(DataError, match=said):
        alpaca.Annotations(*arrays)


def test_annotations_of_other_prompts():
    with pytest.raises(DataError, match=r"new: 3 of 5 annotations are of other prompts: 'i2', 'i3', 'i4'$"):
        alpaca.win_rates(rows(1, 2, 1, 1, 1), prompts=["i0", "i1", "other"])
    with pytest.raises(DataError, match=r"new: 1 of 6 prompts have no annotation: 'other'"):
        alpaca.win_rates(rows(1, 2, 1, 1, 1), prompts=["i0", "i1", "i2", "i3", "i4", "other"])


def test_one_model_of_several():
    several = rows(1, 2, 1, 1, 1) + rows(2, 2, 2, 2, 1, generator_2="other")
    assert alpaca.win_rates(alpaca.read_annotations(several, model="other"), resamples=0).win_rate == 80
    with pytest.raises(DataError, match="no annotations of 'othr'; did you mean 'other'"):
        alpaca.read_annotations(several, model="othr")


def test_calibrations_that_are_not_here(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file of instruction difficulties and gamed baselines"):
        alpaca.load_calibration(tmp_path / "df_gamed.csv")
    import huggingface_hub

    def unreachable(**_):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(DataError, match=r"\(df_gamed.csv of the data set tatsu-lab/alpaca_eval\) are not here \(OSErr"):
        alpaca.load_calibration()
    path = tmp_path / "df_gamed.csv"
    path.write_text("model,preference,index,std_delta_len\nv,0.5,0,1\n")
    with pytest.raises(DataError, match="has no column 'instruction_difficulty', only 'model'"):
        alpaca.load_calibration(path)
    path.write_text("preference,index,std_delta_len,instruction_difficulty\n0.5,1,1,1\n")
    with pytest.raises(DataError, match="its 1 instructions are not numbered from 0 to 0"):
        alpaca.load_calibration(path)
    path.write_text("preference,index,std_delta_len,instruction_difficulty\n1.5,0,1,1\n")
    with pytest.raises(DataError, match=r"1 preferences of the gamed baselines are not in \[0, 1\]"):
        alpaca.load_calibration(path)
    path.write_text("preference,index,std_delta_len,instruction_difficulty\nx,0,1,1\n")
    with pytest.raises(DataError, match="could not convert"):
        alpaca.load_calibration(path)


def test_forms_that_cannot_be_had():
    five = rows(1, 2, 1, 1, 1)
    with pytest.raises(ConfigError, match="form 'length_controled_noreg' is none of .*did you mean"):
        alpaca.win_rates(five, form="length_controled_noreg")
    with pytest.raises(ConfigError, match="length_controlled_winrate needs a calibration: load_calibration"):
        alpaca.win_rates(five, form=alpaca.FULL)
    with pytest.raises(ConfigError, match="needs the gamed baselines' annotations.*length_controlled_noreg"):
        alpaca.win_rates(five, form=alpaca.FULL, calibration=alpaca.Calibration(np.zeros(5)))


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ConfigError, match=r"win rate needs scikit-learn, .*: pip install 'fastpo\[evals\]'$"):
        alpaca.win_rates(rows(1, 2, 1, 1, 1))


def test_folds_are_those_of_scikit_learn_1_9():
    """Before, they were the processor's: its GroupKFold sorted groups of one size by no stable sort."""
    from sklearn import __version__
    from sklearn.model_selection import GroupKFold

    if tuple(map(int, __version__.split(".")[:2])) < (1, 9):
        pytest.skip(f"scikit-learn {__version__}")
    for count in (5, 12, 804, 805):
        twice = np.tile(np.arange(count), 2)
        for (fitted, tested), (own, held) in zip(
            GroupKFold(5).split(twice, groups=twice), glm._folds(count), strict=True
        ):
            assert np.array_equal(fitted, own) and np.array_equal(tested, held)
