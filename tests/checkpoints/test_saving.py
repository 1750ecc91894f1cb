"""No finished run is lost: what saving needs is tried before step 1, and whatever fails later leaves the weights."""

import json
import logging
import math
import os
import pickle
import shutil
import time
import types

import pytest
import torch
from safetensors.torch import load_file, load_model
from transformers import AutoModelForCausalLM, TrainerCallback

import fastpo
from fastpo.checkpoints import checkpoint, endings, model_files, state_files
from fastpo.config import bounds
from fastpo.data import Example
from fastpo.errors import ConfigError, FastpoError, TrainingError
from fastpo.report import disks


@pytest.fixture
def run(toy, tmp_path):
    """`run(folder, **options)`: six steps on 20 rows, a checkpoint every second; `rest` reaches `fastpo.train`."""

    def call(folder="run", *, model=None, tokenizer=None, rows=None, rest=None, **options):
        defaults = dict(
            output_dir=str(tmp_path / folder), disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1,
            max_steps=6, per_device_train_batch_size=4, save_steps=2, learning_rate=1e-2, gradient_checkpointing=False,
            report=False,
        )  # fmt: skip
        return fastpo.train(
            toy.model() if model is None else model, toy.rows(20) if rows is None else rows,
            processing_class=tokenizer or toy.tokenizer(), args={**defaults, **options}, **(rest or {}),
        )  # fmt: skip

    return call


class On(TrainerCallback):
    """Calls `work(model)` in an event after `step` steps."""

    def __init__(self, event, step, work):
        def handler(args, state, control, model=None, **kwargs):
            if state.global_step == step:
                work(model)

        setattr(self, event, handler)


def reseal(folder):
    """A checkpoint that somebody has changed, hashes and all."""
    written = folder.with_name("written")
    os.rename(folder, written)
    checkpoint.seal(written, folder)


def names(folder):
    return [path.name for path in checkpoint.checkpoints(folder)]


# ---- before step 1


def no_json(model, tokenizer):
    model.config.note = {"a", "b"}


def shared(model, tokenizer):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def beams(model, tokenizer):
    model.generation_config.num_return_sequences = 4


def tokenizer_note(model, tokenizer):
    tokenizer.init_kwargs["note"] = object()


def nan(model, tokenizer):
    model.lm_head.weight.data[3] = math.nan


@pytest.mark.parametrize(
    "break_, said",
    [(no_json, "model.config.note is a set, which config.json cannot hold"),
     (shared, "layers.1.mlp.gate_proj.weight and model.layers.0.* share their memory.*copy.deepcopy"),
     (beams, "generation_config cannot be saved.*num_return_sequences.*change model.generation_config"),
     (tokenizer_note, "tokenizer.init_kwargs.note is a object"),
     (nan, "lm_head.weight holds values that are not finite")],
)  # fmt: skip
def test_what_cannot_be_saved_is_found_before_any_pass(toy, run, tmp_path, monkeypatch, break_, said):
    model, tokenizer = toy.model(), toy.tokenizer()
    break_(model, tokenizer)
    passes = []
    monkeypatch.setattr("fastpo.reference.cache._of_batch", lambda *args: passes.append(args))
    with pytest.raises(ConfigError, match=said) as error:
        run(model=model, tokenizer=tokenizer)
    assert "\n" not in str(error.value) and not passes
    assert not list((tmp_path / "run").glob(".*"))


def test_a_mistyped_shard_size_and_a_folder_that_takes_nothing(run, tmp_path, monkeypatch):
    for size in ("5G", "much"):
        with pytest.raises(ConfigError, match="max_shard_size=.*'5GB'"):
            run(max_shard_size=size)
    write = model_files.Path.mkdir

    def full(path, *args, **kwargs):
        if path.name == model_files.TRIAL:
            raise OSError(30, "Read-only file system")
        write(path, *args, **kwargs)

    monkeypatch.setattr(model_files.Path, "mkdir", full)
    with pytest.raises(ConfigError, match="cannot be written: Read-only file system"):
        run()


def test_the_trial_writes_no_weights_and_a_small_disk_is_spoken_of(toy, run, monkeypatch, caplog, tmp_path):
    sizes = []
    remove = shutil.rmtree

    def look(path, **kwargs):
        if str(path).endswith(model_files.TRIAL) and os.path.isdir(path):
            sizes.append(sum(f.stat().st_size for f in model_files.Path(path).glob("*.safetensors")))
        remove(path, **kwargs)

    monkeypatch.setattr(model_files.shutil, "rmtree", look)
    free = types.SimpleNamespace(free=10)
    monkeypatch.setattr(model_files.shutil, "disk_usage", lambda path: free)
    model = toy.model(hidden_size=128)
    run(model=model, max_steps=1)
    assert 0 < max(sizes) < 20_000 < sum(p.nbytes for p in model.parameters())
    assert "free, and the model alone takes" in caplog.text


def test_settings_without_effect_are_left_out_of_the_saved_generation_config(toy, run, tmp_path, caplog):
    model = toy.model()
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    run(model=model, max_steps=1)
    saved = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert "temperature" not in saved and "leaves out temperature=0.6" in caplog.text
    assert model.generation_config.temperature == 0.6


# ---- a save that fails all the same


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_the_weights_are_left_as_plain_safetensors(toy, run, tmp_path, adapter, strategy):
    def go_bad(model):
        model.generate_note = None
        model.save_pretrained = lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("on purpose\nat length"))

    model, rest = toy.model(), {"callbacks": [On("on_step_end", 5, go_bad)]}
    if adapter:
        peft = pytest.importorskip("peft", reason="needs peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    with pytest.raises(TrainingError, match="could not be written.*load_model") as error:
        run(model=model, rest=rest, save_strategy=strategy)
    path = tmp_path / "run" / model_files.RESCUED / "model.safetensors"
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert str(path) in (path.parent / "README.md").read_text()
    fresh = toy.model(seed=9)
    if adapter:
        torch.manual_seed(5)
        fresh = peft.get_peft_model(toy.model(), config)
        assert all("lora" in name for name in load_file(path))
    load_model(fresh, path, strict=not adapter)
    trained = dict(model.named_parameters())
    assert all(torch.equal(p, trained[n]) for n, p in fresh.named_parameters())
    if strategy == "steps":
        assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-4"]
    assert not list((tmp_path / "run").glob(".saving*"))


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(run, tmp_path, monkeypatch, caplog):
    seal, failed = checkpoint.seal, []

    def broken(written, folder):
        if folder.name == "checkpoint-4":
            failed.append(folder)
            raise RuntimeError("on purpose")
        seal(written, folder)

    monkeypatch.setattr(checkpoint, "seal", broken)
    assert run().state.global_step == 6 and failed
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-6"]
    assert "checkpoint-4 could not be written: on purpose; training goes on" in caplog.text
    assert not list((tmp_path / "run").glob(".saving*"))


def test_a_tied_model_is_rescued_and_loaded(toy, tmp_path):
    model = toy.model(tie_word_embeddings=True)
    path, how = model_files.rescue(model, tmp_path)
    assert "lm_head.weight" not in load_file(path) or "model.embed_tokens.weight" not in load_file(path)
    fresh = toy.model(seed=1, tie_word_embeddings=True)
    load_model(fresh, path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    assert how.startswith("safetensors.torch.load_model(model, ")


# ---- disks


def test_lines_wait_for_their_disk_in_order(tmp_path, monkeypatch, caplog):
    lines, room, write = disks.Lines(tmp_path / "a" / "lines"), [10], os.write

    def limited(handle, data):
        if not room[0]:
            raise OSError(28, "No space left on device")
        done = write(handle, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(disks.os, "write", limited)
    for i in range(6):
        lines.add(f"{i}--\n")  # 4 bytes: the third fits in part
        text = (tmp_path / "a" / "lines").read_text()
        assert text == "".join(f"{k}--\n" for k in range(min(i + 1, 2)))
    room[0] = 10**6
    lines.add("6--\n")
    assert (tmp_path / "a" / "lines").read_text() == "".join(f"{i}--\n" for i in range(7))
    assert caplog.text.count("could not be written") == 1 and "written again" in caplog.text


def test_a_folder_that_is_removed_is_made_again(run, tmp_path, caplog):
    folder = tmp_path / "run"
    result = run(rest={"callbacks": [On("on_step_end", 3, lambda model: shutil.rmtree(folder))]})
    assert names(folder) == ["checkpoint-4", "checkpoint-6"] and (folder / "model.safetensors").exists()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.log_history and len(lines) == 7 and (folder / "config.yaml").exists()
    assert "was removed while the run goes on" in caplog.text and checkpoint.damage(folder / "checkpoint-6") is None


def test_card_report_and_configuration_cost_no_run(run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in ("hub.write_card", "outputs.write_report", "outputs._rewrite", "outputs.yaml.safe_dump"):
        monkeypatch.setattr(f"fastpo.report.{name}", full)
    assert run(report=True).state.global_step == 6 and (tmp_path / "run" / "model.safetensors").exists()


# ---- weights that are no numbers


def poison(model):
    model.lm_head.weight.data[5] = math.nan


def test_weights_that_are_no_numbers_are_no_checkpoint(run, tmp_path):
    whole = run("whole", save_total_limit=1)
    with pytest.raises(TrainingError, match=r"not finite \(first lm_head.weight\).*checkpoint-4 is the last good"):
        run(rest={"callbacks": [On("on_step_begin", 5, poison)]}, save_total_limit=1)
    assert names(tmp_path / "run") == ["checkpoint-4"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    again = run(resume_from_checkpoint="auto", save_total_limit=1)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


def test_a_checkpoint_of_no_numbers_is_passed_over(run, tmp_path, caplog):
    run(save_steps=3)
    path = tmp_path / "run" / "checkpoint-6"
    (state,) = (path / "state").glob(state_files.PATTERN)
    tensors = {name: t.clone() for name, t in load_file(state).items()}  # which are the file itself
    tensors["weights.lm_head.weight"][2, 2] = math.inf
    state_files.write_tensors(state, tensors)
    reseal(path)
    for request in (True, str(path)):
        with pytest.raises(TrainingError, match=r"checkpoint-6' .*weights are not finite \(lm_head.weight\).*point-3"):
            run(resume_from_checkpoint=request, save_steps=3)
    run(resume_from_checkpoint="auto", save_steps=3)
    assert "is not good (its weights are not finite (lm_head.weight)) and passed over" in caplog.text
    assert names(tmp_path / "run") == ["checkpoint-3", "checkpoint-6"]
    assert (tmp_path / "run" / "checkpoint-6.old").exists()


def test_a_short_run_that_ends_in_no_numbers_is_an_error(toy, run, tmp_path, any_weight, monkeypatch):
    monkeypatch.setitem(bounds.RANGES, "learning_rate", bounds.Range(0, 1e38))
    with pytest.raises(TrainingError, match="what they give to ordinary rows is not"):
        run(max_steps=3, learning_rate=1e30)
    assert names(tmp_path / "run") == [] and not (tmp_path / "run" / "model.safetensors").exists()
    rows = [{**row, "weight": 3e38} for row in toy.rows(4)]
    options = dict(loss_type="sppo_hard", max_steps=2, per_device_train_batch_size=4)
    with pytest.raises(TrainingError, match="all 2 steps had a non-finite loss or gradient"):
        run("all", rows=rows, **options)
    rows = [{**row, "weight": 1.0} for row in toy.rows(4)] + rows[:1]  # the last step alone
    options |= dict(per_device_train_batch_size=1, train_sampling_strategy="sequential", max_steps=5)
    assert run("last", rows=rows, **options).metrics["skipped_steps"] == 1


# ---- the newest


def test_the_newest_is_that_of_the_last_step_whatever_the_clock_says(run, tmp_path, monkeypatch):
    clock = time.time_ns
    back = On("on_step_end", 3, lambda model: monkeypatch.setattr(time, "time_ns", lambda: clock() - 3600 * 10**9))
    run(rest={"callbacks": [back]}, save_steps=1, save_total_limit=2)
    assert names(tmp_path / "run") == ["checkpoint-5", "checkpoint-6"]
    assert checkpoint.find(tmp_path / "run", True)[0].name == "checkpoint-6"


def test_going_on_from_an_older_one_leaves_the_later_ones_behind(run, tmp_path, caplog):
    run()
    folder = tmp_path / "run"

    def stop(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(resume_from_checkpoint=str(folder / "checkpoint-2"), rest={"callbacks": [On("on_step_end", 3, stop)]})
    assert names(folder) == ["checkpoint-2", "checkpoint-3"]
    assert "left behind as checkpoint-4.old, checkpoint-6.old" in caplog.text
    assert run(resume_from_checkpoint="auto").log_history[-1]["step"] == 6


# ---- nothing foreign is run


class Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["trainer.pt", "rng-0.pt", "state/.metadata", "state/rank-00000.safetensors",
                                  "optimizer.pt", "model.safetensors", "pytorch_model.bin"])  # fmt: skip
def test_a_checkpoint_with_a_pickle_runs_nothing(run, tmp_path, name):
    """Hashes and all: as one that somebody else hands over."""
    run(max_steps=2, save_final=False)
    folder, mark = tmp_path / "run" / "checkpoint-2", tmp_path / "mark"
    with open(folder / name, "wb") as f:
        if name.endswith(".pt"):
            torch.save(Marker(mark), f)
        else:
            pickle.dump(Marker(mark), f)
    reseal(folder)
    try:
        result = run(max_steps=4, resume_from_checkpoint=True)
        assert name in ("state/.metadata", "optimizer.pt", "model.safetensors", "pytorch_model.bin")
        assert result.state.global_step == 4
    except FastpoError as error:
        assert "cannot be resumed" in str(error) and "\n" not in str(error)
    assert not mark.exists()


def test_a_checkpoint_of_the_format_before_is_named(run, tmp_path):
    run(max_steps=2)
    manifest = tmp_path / "run" / "checkpoint-2" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 2}))
    for request in (True, "auto"):
        with pytest.raises(ConfigError, match="another format .2; this one reads 3.: resume it with that version"):
            run(resume_from_checkpoint=request)


# ---- where the saved model stops


def test_the_saved_model_stops_where_the_data_stop(toy, run, tmp_path):
    """The model's config names another id than the tokenizer's end of sequence."""
    model = toy.model()
    own = toy.tokenizer().eos_token_id
    other = next(i for i in range(10) if i != own)
    model.config.eos_token_id = model.generation_config.eos_token_id = other
    run(model=model, max_steps=1)
    saved = [json.loads((tmp_path / "run" / name).read_text()) for name in ("config.json", "generation_config.json")]
    assert saved[0]["eos_token_id"] == own and saved[1]["eos_token_id"] == [own, other]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").generation_config.eos_token_id == [own, other]


class Tokens:
    """A tokenizer of ten ids, of which 0 to 4 are special and 9 is a line feed."""

    added_tokens_decoder = {i: types.SimpleNamespace(special=True, content=f"<{i}>") for i in range(5)}
    eos_token_id, bos_token_id, pad_token_id = 1, 2, 0

    def decode(self, ids):
        return "\n" if ids == [9] else "x"


def example(*responses):
    import numpy as np

    return Example(prompt_ids=np.array([5]), responses=[np.array(r, np.int32) for r in responses], pairs=[(0, 1)])


@pytest.mark.parametrize(
    "responses, ends",
    [([[5, 1], [6, 1]], [1]), ([[5, 4, 9], [6, 4, 9]], [4]), ([[5, 4], [6, 1]], [4, 1]), ([[5, 6], [6, 7]], []),
     ([[5, 4]] + [[5, 1]] * 39, [1]), ([[5, 2], [5, 0]], []), ([[9], [4, 9, 9, 9, 9]], [])],
)  # fmt: skip
def test_ends_of_the_data(responses, ends):
    assert sorted(endings.ending_ids(Tokens(), [example(*responses)])) == sorted(ends)


def test_ids_are_added_and_none_becomes_none():
    tokens = Tokens()
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(eos_token_id=[7, 1], bos_token_id=3, pad_token_id=None),
        generation_config=types.SimpleNamespace(eos_token_id=7, bos_token_id=2, pad_token_id=0),
    )
    data = [example([5, 4, 9], [6, 4, 9])]
    changed = endings.align(model, tokens, data)
    assert model.config.eos_token_id == [4, 1, 7] and model.generation_config.eos_token_id == [4, 1, 7]
    assert (model.config.bos_token_id, model.config.pad_token_id) == (2, 0) and "config.bos_token_id" in changed
    assert endings.align(model, tokens, data) == {}
    tokens.bos_token_id = tokens.pad_token_id = tokens.eos_token_id = None
    assert endings.align(model, tokens, data) == {} and model.config.pad_token_id == 0


def test_no_log_is_needed(run, caplog):
    caplog.set_level(logging.CRITICAL)
    assert run(max_steps=1, save_final=False, save_strategy="no").state.global_step == 1
