"""Model cards that can be used as they stand, and pushes that never cost the model; a stand-in for the hub's API."""

import logging
import shlex
import types
from concurrent.futures import Future
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

import fastpo
from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.losses.table import LOSSES, resolve_terms
from fastpo.report import hub as hub_module
from fastpo.report.hub import IGNORE, MARK, Hub, last_metrics, model_card, write_card

SECRET = "hf_abcdefghijklmnop"


def config(tmp_path, **options) -> TrainConfig:
    return TrainConfig.build({"output_dir": str(tmp_path / "my-model"), **options})


def card(tmp_path, losses=("dpo",), **options) -> str:
    settings = {k: options.pop(k) for k in list(options) if k in ("hub_token", "learning_rate", "model_init_kwargs")}
    return model_card(config(tmp_path, loss_type=list(losses), **settings), resolve_terms(losses), **options)


# ---- the card


def test_metadata_are_what_the_hub_reads(tmp_path):
    text = card(tmp_path, ["dpo", "sft"], base_model="meta-llama/Llama-3.2-1B", datasets=["trl-lib/data-v1.5"],
                repo_id="me/my-model")  # fmt: skip
    data = ModelCard(text).data
    assert data.base_model == "meta-llama/Llama-3.2-1B" and data.datasets == ["trl-lib/data-v1.5"]
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.tags == ["fastpo", "preference-optimization", "dpo", "sft"] and data.model_name == "my-model"
    assert ModelCard(card(tmp_path, adapter=True)).data.library_name == "peft"


def test_no_licence_and_no_local_name_is_invented(tmp_path, monkeypatch):
    """A path is no hub id: the hub refuses a card whose base_model is one; nor is a folder that looks like an id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    for base in ("models/base", "/data/llama", "./llama", "", None):
        text = card(tmp_path, base_model=base, datasets=["rows.jsonl/x/y", "/data/rows.jsonl", None, [{"prompt": ""}]])
        metadata = yaml.safe_load(text.split("---")[1])
        assert not {"base_model", "datasets", "license"} & set(metadata), base
        assert "a model that is not on the hub" in text


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.online])
def test_the_loss_and_its_paper(tmp_path, name):
    """Every loss of the table, with its hyper-parameters and the paper that losses.py names."""
    loss = LOSSES[name]
    text = card(tmp_path, ["dpo", name] if loss.shape == "degrees" else [name])
    first, value = next(iter(loss.defaults.items()))
    assert f"huggingface.co/papers/{loss.paper}" in text and f"| loss: {name} | {first} {value:g}" in text
    assert hub_module.PAPERS.get(name, ("", loss.paper))[1] == loss.paper


def test_settings_and_results(tmp_path):
    metrics = {"eval_loss": 0.51234567, "rewards/margins": float("nan"), "step": 120, "note": "a|b"}
    text = card(tmp_path, learning_rate=5e-7, steps=120, batch_size=64, rows=7680, dtype="bfloat16", metrics=metrics)
    for line in ("| learning_rate | 5e-07 |", "| steps | 120 |", "| pairs per step | 64 |", "| eval_loss | 0.512346 |",
                 "| rewards/margins | nan |", "| rows of training data | 7680 |", "| dtype | bfloat16 |"):  # fmt: skip
        assert line in text.splitlines(), line
    assert "| step |" not in text and "a|b" not in text


def test_the_last_of_each_metric():
    history = [{"loss": 0.7, "rewards/margins": 0.1, "grad_norm": 1.0, "step": 1},
               {"eval_loss": 0.6, "eval_runtime": 2.0, "eval_samples_per_second": 3.0, "step": 1},
               {"loss": 0.5, "step": 2}, {"train_loss": 0.6, "train_runtime": 9.0}]  # fmt: skip
    metrics = last_metrics(history)
    assert metrics == {
        "eval_loss": 0.6, "loss": 0.5, "rewards/margins": 0.1, "step": 2, "train_loss": 0.6, "train_runtime": 9.0,
    }  # fmt: skip
    assert next(iter(metrics)) == "eval_loss"


def test_no_token_in_the_card(tmp_path):
    assert SECRET not in card(tmp_path, hub_token=SECRET, model_init_kwargs={"token": SECRET})


@pytest.mark.parametrize("adapter", [False, True], ids=["model", "adapter"])
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_the_quick_start_runs(toy, tmp_path, capsys, monkeypatch, adapter, chat):
    """The code of the card, word for word, on a saved model of its name in the current folder."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = toy.model(), toy.tokenizer()
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    if adapter:
        peft = pytest.importorskip("peft")
        model.save_pretrained("base")
        model = toy.model().from_pretrained("base")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained("my-model")
    tokenizer.save_pretrained("my-model")
    code = card(tmp_path, adapter=adapter, chat=chat).split("```python\n")[1].split("```")[0]
    exec(code, {})
    assert "w" in capsys.readouterr().out


def test_a_users_readme_stays(tmp_path, caplog):
    path = tmp_path / "README.md"
    assert write_card(tmp_path, f"one {MARK}") and write_card(tmp_path, f"two {MARK}")
    assert path.read_text() == f"two {MARK}"
    path.write_text("# Mine\n")
    with caplog.at_level(logging.INFO, "fastpo"):
        assert not write_card(tmp_path, "three")
    assert path.read_text() == "# Mine\n" and "is yours and stays" in caplog.text


def test_pefts_empty_template_is_replaced(toy, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(toy.model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert "[More Information Needed]" in (tmp_path / "README.md").read_text()
    assert write_card(tmp_path, "ours")


# ---- the push


class Api:
    """What HfApi does as far as a push sees it; `fail` names the methods that raise."""

    def __init__(self, fail=()):
        self.fail, self.calls, self.uploads, self.futures = set(fail), [], [], []

    def _call(self, name, **arguments):
        self.calls.append((name, arguments))
        if name in self.fail:
            raise OSError(f"{name} refused\nRequest ID: 1")

    def whoami(self):
        self._call("whoami")

    def create_repo(self, name, **arguments):
        self._call("create_repo", repo=name, **arguments)
        return types.SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def create_branch(self, repo_id, **arguments):
        self._call("create_branch", repo_id=repo_id, **arguments)

    def upload_folder(self, *, folder_path, run_as_future=False, ignore_patterns=None, **arguments):
        self._call("upload_folder", **arguments)
        files = {str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()}
        self.uploads.append(set(filter_repo_objects(files, ignore_patterns=ignore_patterns)))
        if run_as_future:
            self.futures.append(Future())
            return self.futures[-1]
        return types.SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def saved(tmp_path) -> Path:
    """An output folder as a run leaves it."""
    folder = tmp_path / "my-model"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md", "metrics.jsonl", "config.yaml",
                 "report.html", "samples.jsonl", "runs/Nov21/events.out", "merged/model.safetensors",
                 "reference.safetensors", "checkpoint-4/config.json", "checkpoint-4/model-00001-of-00002.safetensors",
                 "checkpoint-4/model.safetensors.index.json", "checkpoint-4/tokenizer_config.json",
                 "checkpoint-4/chat_template.jinja", "checkpoint-4/trainer.pt", "checkpoint-4/rng-0.pt",
                 "checkpoint-4/reference.safetensors", "checkpoint-4/manifest.json", "checkpoint-4/trainer_state.json",
                 ".saving-checkpoint-8/model.safetensors"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_a_push_carries_the_model_and_its_record(tmp_path, saved):
    api = Api()
    hub = Hub(config(tmp_path, push_to_hub=True, hub_private_repo=True, hub_revision="v1"), api)
    assert hub.repo_id == "me/my-model"
    assert hub.push(saved) == "https://hub/commit/1"
    assert api.uploads == [{"config.json", "model.safetensors", "tokenizer.json", "README.md", "metrics.jsonl",
                            "config.yaml", "report.html", "runs/Nov21/events.out"}]  # fmt: skip
    assert [name for name, _ in api.calls] == ["whoami", "create_repo", "create_branch", "upload_folder"]
    assert api.calls[1][1]["private"] is True and api.calls[3][1]["revision"] == "v1"


@pytest.mark.parametrize(
    "fail, message",
    [
        ("whoami", "push_to_hub needs a token of the hub: run `hf auth login`, or set HF_TOKEN (whoami refused)"),
        ("create_repo", "push_to_hub cannot write to 'me/m': create_repo refused"),
        ("create_branch", "push_to_hub cannot write to 'me/m': create_branch refused"),
    ],
)
def test_what_would_lose_the_push_stops_the_run_before_it(tmp_path, fail, message):
    with pytest.raises(ConfigError) as error:
        Hub(config(tmp_path, push_to_hub=True, hub_model_id="me/m", hub_revision="v1"), Api([fail]))
    assert str(error.value) == message


def test_offline_is_one_line(tmp_path):
    """The real API, which the tests keep offline."""
    with pytest.raises(ConfigError, match="needs a token of the hub") as error:
        Hub(config(tmp_path, push_to_hub=True, hub_token=SECRET))
    assert "\n" not in str(error.value) and SECRET not in str(error.value)


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="'my model' is no name of a repository; set hub_model_id"):
        Hub(config(tmp_path, push_to_hub=True, hub_model_id="my model"), Api())


def test_a_failed_push_keeps_the_model_and_says_how_to_repeat_it(tmp_path, saved, caplog):
    api = Api(["upload_folder"])
    hub = Hub(config(tmp_path, push_to_hub=True, hub_token=SECRET, hub_revision="v1"), api)
    with caplog.at_level(logging.WARNING, "fastpo"):
        assert hub.push(saved) is None
    assert (saved / "model.safetensors").exists() and SECRET not in caplog.text
    command = shlex.split(caplog.messages[0].partition("try again with: ")[2])
    assert command[:5] == ["hf", "upload", "me/my-model", str(saved), "."] and "--revision=v1" in command
    excluded = [word.removeprefix("--exclude=") for word in command if word.startswith("--exclude=")]
    assert excluded == IGNORE


def test_checkpoints_go_up_in_the_background(tmp_path, saved):
    """The model's files only; the checkpoint may be deleted meanwhile; one upload at a time."""
    api = Api()
    hub = Hub(config(tmp_path, push_to_hub=True), api)
    folder = saved / "checkpoint-4"
    assert hub.push_checkpoint(folder, 4)
    assert api.uploads[0] == {"config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
                              "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip
    links = saved / ".pushing-4"
    assert (links / "config.json").samefile(folder / "config.json")
    (folder / "config.json").unlink()
    assert (links / "config.json").read_text() == "checkpoint-4/config.json"
    assert not hub.push_checkpoint(folder, 8) and len(api.uploads) == 1  # the first is under way
    api.futures[0].set_result(None)
    assert hub.push_checkpoint(folder, 12)
    assert not links.exists() and (saved / ".pushing-12").exists()
    api.futures[1].set_result(None)
    hub.close()
    assert not (saved / ".pushing-12").exists()
    assert hub.push_checkpoint(folder, 16)
    Hub(config(tmp_path, push_to_hub=True), Api())  # after a kill
    assert not (saved / ".pushing-16").exists()


def test_a_background_push_that_fails_is_said(tmp_path, saved, caplog):
    api = Api()
    hub = Hub(config(tmp_path, push_to_hub=True), api)
    hub.push_checkpoint(saved / "checkpoint-4", 4)
    api.futures[0].set_exception(OSError("server away"))
    with caplog.at_level(logging.WARNING, "fastpo"):
        hub.push(saved)
    assert caplog.messages == ["a push to me/my-model in the background failed: server away"]
    api.fail.add("upload_folder")
    with caplog.at_level(logging.WARNING, "fastpo"):
        assert not hub.push_checkpoint(saved / "checkpoint-4", 8)
    assert caplog.messages[1] == "step 8 was not pushed to me/my-model: upload_folder refused"


def test_strategy_end_pushes_once(tmp_path, saved):
    api = Api()
    hub = Hub(config(tmp_path, push_to_hub=True, hub_strategy="end"), api)
    assert not hub.push_checkpoint(saved / "checkpoint-4", 4) and not api.uploads
    assert hub.push(saved)


# ---- in a run


@pytest.fixture
def train(toy, tmp_path, monkeypatch):
    """`train(api, **options)`: a short run from a saved model, tokens in its options, `api` standing in for the hub."""

    monkeypatch.setenv("FASTPO_CACHE", str(tmp_path / "cache"))

    def call(api, **options):
        monkeypatch.setattr("huggingface_hub.HfApi", lambda **kwargs: api)
        base = tmp_path / "base"
        toy.model().save_pretrained(base)
        toy.tokenizer().save_pretrained(base)
        defaults = dict(
            output_dir=str(tmp_path / "my-model"), disable_tqdm=True, use_cpu=True, bf16=False, max_steps=4,
            per_device_train_batch_size=4, logging_steps=1, push_to_hub=True, hub_token=SECRET,
            model_init_kwargs={"token": SECRET},
        )  # fmt: skip
        return fastpo.train(str(base), toy.rows(8), eval_dataset=toy.rows(2), args={**defaults, **options})

    return call


def test_a_run_pushes_its_checkpoints_and_its_model(train, tmp_path):
    api = Api()
    done = api.upload_folder

    def upload_folder(**arguments):
        out = done(**arguments)
        if isinstance(out, Future):
            out.set_result(None)
        return out

    api.upload_folder = upload_folder
    train(api, save_strategy="steps", save_steps=2, eval_strategy="epoch", sample_generations=1)
    background, *_, last = api.uploads
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= background
    assert not [name for name in background if "trainer" in name or "rng" in name or "manifest" in name]
    assert {"README.md", "model.safetensors", "config.yaml", "metrics.jsonl", "report.html"} <= last
    assert not [name for name in last if name.startswith(("checkpoint", ".", "samples", "reference"))]
    text = (tmp_path / "my-model" / "README.md").read_text()
    assert "| steps | 4 |" in text and "| rewards/margins |" in text and 'model="me/my-model"' in text


def test_no_token_in_any_file_of_a_run(train, tmp_path):
    train(Api(), save_strategy="steps", save_steps=2, report_to="tensorboard", hub_strategy="end")
    files = [p for p in (tmp_path / "my-model").rglob("*") if p.is_file()]
    assert len(files) > 20
    assert [str(p) for p in files if SECRET.encode() in p.read_bytes()] == []


def test_a_run_whose_push_fails_has_its_model(train, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fastpo"):
        result = train(Api(["upload_folder"]), hub_strategy="end")
    assert result.state.global_step == 4 and (tmp_path / "my-model" / "model.safetensors").exists()
    assert any("try again with: hf upload me/my-model" in message for message in caplog.messages)


def test_a_run_without_a_token_does_not_begin(train, tmp_path):
    with pytest.raises(ConfigError, match="needs a token of the hub"):
        train(Api(["whoami"]))
    assert not (tmp_path / "my-model" / "metrics.jsonl").exists()


def test_names_of_folders_and_data_sets_are_text_in_the_card(tmp_path):
    """Neither HTML, nor Markdown, nor Python comes from them."""
    import ast

    folder = tmp_path / 'c"); print("M") ; ("<b id=x>`[a](b)`\n# d'
    config = TrainConfig.build({"output_dir": str(folder)})
    terms = resolve_terms(["dpo"])
    for adapter in (False, True):
        text = model_card(config, terms, adapter=adapter, metrics={"eval_<b id=x>|_loss": 1.0}, chat=True)
        assert "<b" not in text and text.count("\n# ") == 1 and "model_name" not in text
        code = text.split("```python\n")[1].split("\n```")[0]
        constants = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
        assert folder.name in constants and 'print("M")' not in text
        assert "eval_&lt;b id=x&gt;\\|_loss" in text
