"""Which checkpoint is the best (fastpo.report.callbacks); transformers' own Trainer is the reference."""

import math
import types

import pytest
from transformers import Trainer, TrainerState

from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.report import callbacks as cb
from fastpo.report.callbacks import CallbackArgs


def config(tmp_path, **options) -> TrainConfig:
    return TrainConfig.build({"output_dir": str(tmp_path / "run"), **options})


@pytest.mark.parametrize(
    "metric, better",
    [("loss", None), ("eval_rewards/accuracies", None), ("rewards/margins", True), ("rewards/margins", False)],
)
def test_best_is_what_transformers_calls_best(tmp_path, metric, better):
    options = config(tmp_path, metric_for_best_model=metric, greater_is_better=better, eval_steps=2, save_steps=2)
    mine, theirs = TrainerState(), TrainerState()
    trainer = types.SimpleNamespace(args=CallbackArgs(options), state=theirs)
    name = f"eval_{metric.removeprefix('eval_')}"
    for step, value in enumerate([math.nan, 0.5, 0.5, 0.7, 0.2, -0.1, math.inf, 0.1], start=1):
        mine.global_step = theirs.global_step = step
        got = cb.best(mine, {name: value}, options)
        assert got == Trainer._determine_best_metric(trainer, {name: value}, None), step
        cb.note_saved(mine, f"checkpoint-{step}")
    assert mine.best_metric == theirs.best_metric and mine.best_global_step == theirs.best_global_step
    assert mine.best_model_checkpoint == f"checkpoint-{mine.best_global_step}"


def test_best_without_a_metric_notes_nothing(tmp_path):
    state = TrainerState()
    assert not cb.best(state, {"eval_loss": 1.0}, config(tmp_path)) and state.best_metric is None


def test_a_metric_that_no_evaluation_reports(tmp_path):
    options = config(tmp_path, metric_for_best_model="reward/accuracies", eval_steps=1)
    with pytest.raises(ConfigError, match="did you mean 'eval_rewards/accuracies'"):
        cb.check_best(options, {"eval": ["loss", "rewards/accuracies"]})
    named = config(tmp_path, metric_for_best_model="loss", eval_steps=1)
    with pytest.raises(ConfigError, match="no evaluation reports 'eval_loss'; did you mean 'eval_news_loss'"):
        cb.check_best(named, {"eval_news": ["loss"], "eval_code": ["loss"]})
    cb.check_best(config(tmp_path, metric_for_best_model="news_loss"), {"eval_news": ["loss"]})
    with pytest.raises(ConfigError, match="no evaluation reports 'eval_loss'"):
        cb.best(TrainerState(), {"eval_news_loss": 1.0}, named)
