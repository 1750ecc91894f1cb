"""The reference cache: what finds an entry again, what does not, and what a damaged file costs."""

import numpy as np
import pytest
import torch

from fastpo.data import Example
from fastpo.ref_policy import RefCache, cache_folder, cache_key, model_fingerprint, reference_logps


@pytest.fixture
def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(0, 50, n).astype(np.int32)  # noqa: E731
    return [Example(ids(4), [ids(3), ids(5)], [(0, 1)]) for _ in range(6)]


class Counting:
    """A stand-in for the reference: a number that depends on each target, and a count of responses computed."""

    responses = 0

    def __call__(self, batch):
        self.responses += len(batch.response_offsets) - 1
        return -batch.target.float()


def compute(examples, needed, cache, reference=None):
    reference = reference or Counting()
    out = reference_logps(examples, needed, cache, reference, max_tokens=20)
    return out, reference.responses


def test_rows_return_in_place_and_only_those_needed(examples):
    out, computed = compute(examples, [4, 1], RefCache("m", None))
    assert computed == 4
    for i in (1, 4):
        for response, logp in zip(examples[i].responses, out[i], strict=True):
            assert logp.dtype == np.float32 and (logp == -response).all()
    assert out[0] == [] and out[5] == []


def test_a_second_run_computes_nothing_and_a_superset_only_the_rest(examples, tmp_path):
    first, computed = compute(examples, range(3), RefCache("m", tmp_path))
    assert computed == 6
    again, computed = compute(examples, range(6), RefCache("m", tmp_path))
    assert computed == 6
    assert all((a == b).all() for i in range(3) for a, b in zip(first[i], again[i], strict=True))
    _, computed = compute(examples[::-1], range(6), RefCache("m", tmp_path))
    assert computed == 0  # another order of the same rows


def test_another_model_or_other_tokens_find_nothing(examples, tmp_path):
    compute(examples, range(6), RefCache("m", tmp_path))
    assert compute(examples, range(6), RefCache("other", tmp_path))[1] == 12
    shorter = [Example(e.prompt_ids, [r[:-1] for r in e.responses], e.pairs) for e in examples]
    assert compute(shorter, range(6), RefCache("m", tmp_path))[1] == 12
    moved = [Example(e.prompt_ids[:-1], [np.r_[e.prompt_ids[-1:], r] for r in e.responses], e.pairs) for e in examples]
    assert compute(moved, range(6), RefCache("m", tmp_path))[1] == 12  # same tokens, another boundary


def test_a_damaged_shard_costs_its_entries_only(examples, tmp_path, caplog):
    compute(examples, range(6), RefCache("m", tmp_path))
    (shard,) = (tmp_path / "ref_logps" / "m").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-7])
    out, computed = compute(examples, range(6), RefCache("m", tmp_path))
    assert computed == 12 and "cannot be read" in caplog.text and (out[0][0] == -examples[0].responses[0]).all()


def test_an_unwritable_folder_is_a_warning(examples, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    out, _ = compute(examples, range(6), RefCache("m", blocked))
    assert "cannot write" in caplog.text and len(out[5]) == 2


def test_a_pass_that_dies_keeps_what_it_had(examples, tmp_path, monkeypatch):
    monkeypatch.setattr("fastpo.ref_policy.SHARD_SECONDS", 0.0)

    class Dies(Counting):
        def __call__(self, batch):
            if self.responses >= 8:
                raise KeyboardInterrupt
            return super().__call__(batch)

    with pytest.raises(KeyboardInterrupt):
        compute(examples, range(6), RefCache("m", tmp_path), Dies())
    assert compute(examples, range(6), RefCache("m", tmp_path))[1] == 4


def test_fingerprint_follows_weights_and_config(toy):
    model = toy.model()
    key = model_fingerprint(model)
    assert key == model_fingerprint(toy.model()) == model_fingerprint(model.train())
    assert cache_key(key, "a") == cache_key(key, "a") != cache_key(key, "b")
    assert key != model_fingerprint(toy.model(seed=1))
    assert key != model_fingerprint(toy.model(rope_theta=123.0))
    assert key != model_fingerprint(toy.model().bfloat16())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-4
    assert key != model_fingerprint(model)


def test_folder_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTPO_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FASTPO_CACHE")
    assert cache_folder().name == "fastpo"
