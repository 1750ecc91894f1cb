"""Samplers beside the trainer: new weights at every generation, held to what they say of their tokens."""

import math

import pytest

import fastpo
from fastpo.errors import ConfigError, TrainingError
from fastpo.models.loading import load_model
from fastpo.sampling.local_sampler import LocalSampler


class Beside:
    """Another process's sampler, as far as the trainer can see: it has the weights that it was told to load."""

    exact, key = False, {}

    def __init__(self, path, tokenizer, stale=False, silent=False, off=0.0):
        self.tokenizer, self.stale, self.silent, self.off = tokenizer, stale, silent, off
        self.folders = []
        self._load(path)

    def _load(self, folder):
        self.inner = LocalSampler(load_model(str(folder), use_cpu=True), self.tokenizer)

    def update(self, folder):
        self.folders.append(folder.name)
        if not self.stale:
            self._load(folder)
        return "loaded"

    def batches(self, requests):
        return self.inner.batches(requests)

    def sample(self, requests):
        from dataclasses import replace

        for request, answer in self.inner.sample(requests):
            logps = None if self.silent else [v + self.off for v in answer.token_logps]
            yield request, replace(answer, token_logps=logps, logp=None if logps is None else math.fsum(logps))

    def close(self):
        pass


def sums(completion_ids, **columns):
    return [float(sum(ids)) for ids in completion_ids]


@pytest.fixture
def grpo(toy, tmp_path):
    def run(sampler, **options):
        rows = [{"prompt": row["prompt"]} for row in toy.rows(4)]
        given = {"loss_type": "grpo", "num_generations": 4, "max_completion_length": 6, "max_steps": 3,
                 "per_device_train_batch_size": 8, "learning_rate": 5e-3, "use_cpu": True, "save_final": False,
                 "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
                 "overwrite_output_dir": True}  # fmt: skip
        return fastpo.train(
            toy.model(), rows, reward_funcs=sums, sampler=sampler, processing_class=toy.tokenizer(),
            output_dir=str(tmp_path / "run"), **(given | options),
        )  # fmt: skip

    return run


@pytest.fixture
def saved(toy, tmp_path):
    toy.model().save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def test_each_generation_has_the_weights_as_they_are(toy, grpo, saved):
    sampler = Beside(saved, toy.tokenizer())
    lines = [line for line in grpo(sampler).log_history if "reward" in line]
    assert sampler.folders == ["a", "b", "a"] and len(lines) == 3
    assert all(line["sampling/sampling_logp_difference/mean"] < 1e-4 for line in lines)
    assert all(abs(line["sampling/importance_sampling_ratio/mean"] - 1) < 1e-3 for line in lines)


def test_it_trains_as_the_sampler_in_this_process(toy, grpo, saved):
    beside, within = grpo(Beside(saved, toy.tokenizer())).log_history, grpo(None).log_history
    for ours, theirs in zip(beside, within, strict=True):
        assert ours["step"] == theirs["step"]
        if "grad_norm" in theirs:
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_old_weights_are_found(toy, grpo, saved):
    with pytest.raises(TrainingError, match="other or stale weights"):
        grpo(Beside(saved, toy.tokenizer(), stale=True), learning_rate=0.5, max_steps=6)


def test_a_small_difference_is_corrected(toy, grpo, saved):
    """Ratios are our probability over the sampler's: what it overstates counts less."""
    lines = grpo(
        Beside(saved, toy.tokenizer(), off=0.05), importance_sampling_mode="token_truncate", max_steps=1
    ).log_history  # fmt: skip
    assert lines[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(math.exp(-0.05), rel=1e-3)
    plain = grpo(Beside(saved, toy.tokenizer()), max_steps=1).log_history[0]
    assert lines[0]["grad_norm"] == pytest.approx(math.exp(-0.05) * plain["grad_norm"], rel=1e-2)


def test_one_that_says_nothing_is_spoken_of_once(toy, grpo, saved, caplog):
    grpo(Beside(saved, toy.tokenizer(), silent=True))
    assert sum("cannot be known" in record.message for record in caplog.records) == 1


def test_an_adapter_needs_the_sampler_in_this_process(toy, tmp_path):
    peft = pytest.importorskip("peft")
    with pytest.raises(ConfigError, match="trains an adapter"):
        fastpo.train(
            toy.model(), [{"prompt": "a"}], reward_funcs=sums, processing_class=toy.tokenizer(), loss_type="grpo",
            num_generations=2, per_device_train_batch_size=2, max_completion_length=4, use_cpu=True,
            output_dir=str(tmp_path / "run"), sampler={"engine": "openai", "base_url": "http://localhost:1/v1"},
            peft_config=peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )  # fmt: skip
