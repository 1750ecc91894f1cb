"""The reference cache: what finds an entry again, what does not, and what a damaged file costs."""

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fastpo.data import Example
from fastpo.reference import cache as module
from fastpo.reference.cache import (
    RefCache,
    cache_folder,
    cache_key,
    model_fingerprint,
    read_entries,
    reference_logps,
    write_entries,
)


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


def compute(examples, needed, cache, reference=None, **options):
    """(log-probabilities, responses computed apart from those of the rows that are compared)."""
    with mock.patch.object(module, "_of_batch", wraps=module._of_batch) as of_batch:
        out = reference_logps(examples, needed, cache, reference or Counting(), max_tokens=20, **options)
    return out, sum(len(examples[i].responses) for call in of_batch.call_args_list for i in call.args[1])


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
    assert (
        computed == 12
        and caplog.text.count("is computed again") == 1
        and (out[0][0] == -examples[0].responses[0]).all()
    )


def only_shard(folder):
    (shard,) = (folder / "ref_logps" / "m").glob("*.safetensors")
    return shard


def flipped(shard, at):
    """One bit of the number at this place of the shard's log-probabilities."""
    raw = bytearray(shard.read_bytes())
    raw[raw.find(load_file(shard)["logp"].tobytes()) + 4 * at + 3] ^= 2
    shard.write_bytes(raw)


def changed(**tensors):
    def change(shard):
        was = load_file(shard)
        save_file({k: v for k, v in (was | {k: f(was) for k, f in tensors.items()}).items() if v is not None}, shard)

    return change


DAMAGES = {  # and how many of the twelve responses they cost
    "one bit": (lambda shard: flipped(shard, 7), 1),
    "zeros in the second half": (changed(logp=lambda t: np.r_[t["logp"][:24], 0 * t["logp"][24:]]), 6),
    "nan": (changed(logp=lambda t: t["logp"] * np.nan), 12),
    "offsets one off": (changed(offsets=lambda t: np.r_[0, t["offsets"][1:-1] - 1, t["offsets"][-1]]), 12),
    "fewer offsets": (changed(offsets=lambda t: t["offsets"][:3]), 12),
    "offsets that descend": (changed(offsets=lambda t: np.r_[t["offsets"][:4], t["offsets"][3:-1] - 3, 48]), 12),
    "offsets past the end": (changed(offsets=lambda t: t["offsets"] + 0 * t["offsets"][-1:] + 5), 12),
    "another dtype": (changed(logp=lambda t: t["logp"].astype(np.float64)), 12),
    "no log-probabilities": (changed(logp=lambda t: None), 12),
    "no checksums": (changed(sums=lambda t: None), 12),
    "another's checksums": (changed(sums=lambda t: t["sums"][::-1]), 12),
    "half of the file": (lambda shard: shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2]), 12),
    "an empty file": (lambda shard: shard.write_bytes(b""), 12),
    "no file of this kind": (lambda shard: shard.write_bytes(b"no tensors" * 99), 12),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_never_believed_and_spoken_of_once(examples, tmp_path, caplog, kind):
    damage, lost = DAMAGES[kind]
    first, _ = compute(examples, range(6), RefCache("m", tmp_path))
    damage(only_shard(tmp_path))
    out, computed = compute(examples, range(6), RefCache("m", tmp_path))
    rows_lost = {1: 2}.get(lost, lost)  # a row is computed whole
    assert computed == rows_lost and caplog.text.count("\n") == caplog.text.count("is computed again") == 1
    again, computed = compute(examples, range(6), RefCache("m", tmp_path))
    assert computed == 0 and caplog.text.count("\n") == 1  # the damage is gone
    for a, b, c in zip(first, out, again, strict=True):
        assert all((x == y).all() and (x == z).all() for x, y, z in zip(a, b, c, strict=True))


def test_an_entry_of_another_length_is_computed_again(examples, tmp_path, caplog):
    compute(examples, range(6), RefCache("m", tmp_path))
    entries, of_pass, problem = read_entries(only_shard(tmp_path))
    assert not problem and len(of_pass) == 32
    write_entries({k: v[:-1] for k, v in entries.items()}, only_shard(tmp_path))
    out, computed = compute(examples, range(6), RefCache("m", tmp_path))
    assert computed == 12 and caplog.text.count("not as long as their responses") == 1
    assert [len(v) for v in out[0]] == [3, 5]


def test_what_is_not_finite_is_given_but_not_kept(examples, tmp_path):
    class Infinite(Counting):
        def __call__(self, batch):
            return super().__call__(batch).where(batch.target != examples[0].responses[0][0], -torch.inf)

    out, _ = compute(examples, range(6), RefCache("m", tmp_path), Infinite())
    assert np.isneginf(out[0][0]).any()
    assert 0 < compute(examples, range(6), RefCache("m", tmp_path), Infinite())[1] < 12


def test_folders_and_links_to_nowhere_are_no_entries(examples, tmp_path, caplog):
    compute(examples, range(6), RefCache("m", tmp_path))
    folder = only_shard(tmp_path).parent
    (folder / "x.safetensors").mkdir()
    (folder / "y.safetensors").symlink_to("nowhere")
    assert compute(examples, range(6), RefCache("m", tmp_path))[1] == 0 and not caplog.text


# ------------------------------------------------------------------------- passes against the live model


class Shifted(Counting):
    """Another function of the same weights."""

    def __call__(self, batch):
        return super().__call__(batch) - 0.0078125


def test_a_pass_of_another_function_is_dropped_and_its_files_with_it(examples, tmp_path, caplog):
    compute(examples, range(6), RefCache("m", tmp_path), Shifted())
    wrong = only_shard(tmp_path)
    out, computed = compute(examples, range(6), RefCache("m", tmp_path))
    assert computed == 12 and (out[3][1] == -examples[3].responses[1]).all() and not wrong.exists()
    assert caplog.text.count("\n") == caplog.text.count("another function of the same weights") == 1
    assert compute(examples, range(6), RefCache("m", tmp_path))[1] == 0 and caplog.text.count("\n") == 1
    back, computed = compute(examples, range(6), RefCache("m", tmp_path), Shifted())  # and the other way round
    assert computed == 12 and (back[3][1] == -0.0078125 - examples[3].responses[1]).all()


def test_every_pass_is_compared_and_only_the_wrong_one_dropped(examples, tmp_path):
    """Whose rows are few beside the others, so that a sample of all rows would miss it."""
    examples += [Example(e.prompt_ids[:2], e.responses, e.pairs) for e in examples]
    compute(examples, [7], RefCache("m", tmp_path), Shifted())
    compute(examples, [i for i in range(12) if i != 7][:10], RefCache("m", tmp_path))
    cache, reference = RefCache("m", tmp_path), Counting()
    out, computed = compute(examples, range(12), cache, reference)
    assert computed == 4 and (out[7][0] == -examples[7].responses[0]).all()  # rows 7 and 11
    assert reference.responses == 4 + 2 * (3 + 1) * 2  # and of each pass a few, in place and with a nudge
    assert len(cache.agreed) == 1 and len(list(cache.folder.glob("*"))) == 2


def test_other_data_sets_of_a_run_compare_a_pass_once(examples, tmp_path):
    compute(examples, range(6), RefCache("m", tmp_path))
    cache, reference = RefCache("m", tmp_path), Counting()
    compute(examples, range(3), cache, reference)
    compared = reference.responses
    compute(examples, range(3, 6), cache, reference)
    assert reference.responses == compared == 12


def test_what_packing_may_move_is_no_difference(examples, tmp_path):
    """The nudge says how much that is."""
    nudge = [0.0]

    @contextlib.contextmanager
    def nudged():
        nudge[0] = 0.002
        yield
        nudge[0] = 0.0

    def near(shift):
        return lambda batch: -batch.target.float() + shift + nudge[0]

    compute(examples, range(6), RefCache("m", tmp_path), near(0.0))
    assert compute(examples, range(6), RefCache("m", tmp_path), near(0.01), nudged=nudged)[1] == 0
    assert compute(examples, range(6), RefCache("m", tmp_path), near(0.02), nudged=nudged)[1] == 12


def test_a_runs_own_file_is_taken_as_it_is_but_not_damaged(examples, tmp_path, caplog):
    compute(examples, range(6), RefCache("m", tmp_path), Shifted())
    own = only_shard(tmp_path)
    resumed = RefCache("", None)
    resumed.read(own)
    out, computed = compute(examples, range(6), resumed)
    assert computed == 0 and (out[3][1] == -0.0078125 - examples[3].responses[1]).all()
    flipped(own, 7)
    resumed = RefCache("", None)
    resumed.read(own)
    assert compute(examples, range(6), resumed)[1] == 2 and caplog.text.count("1 of 12 entries are not what") == 1
    changed(sums=lambda t: None)(own)  # as older versions wrote it
    RefCache("", None).read(own)
    assert caplog.text.count("\n") == 1


def test_a_full_disk_costs_the_keeping(examples, tmp_path, caplog, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half of")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    monkeypatch.setattr(module, "SHARD_SECONDS", 0.0)  # it is tried once
    out, _ = compute(examples, range(6), RefCache("m", tmp_path))
    assert len(out[5]) == 2 and caplog.text.count("cannot write to") == 1
    assert not list((tmp_path / "ref_logps" / "m").iterdir())


def test_an_unwritable_folder_is_a_warning(examples, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    out, _ = compute(examples, range(6), RefCache("m", blocked))
    assert "cannot write" in caplog.text and len(out[5]) == 2


def test_a_pass_that_dies_keeps_what_it_had(examples, tmp_path, monkeypatch):
    monkeypatch.setattr("fastpo.reference.cache.SHARD_SECONDS", 0.0)

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
