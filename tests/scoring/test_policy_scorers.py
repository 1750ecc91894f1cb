"""Models as scorers: reward models, implicit rewards, density ratios."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

import fastpo
from fastpo.errors import ConfigError
from fastpo.loop.score_stage import read_scores, score_stage
from fastpo.loop.verdicts import VerdictCache
from fastpo.sampling.items import Item, Response, Unit
from fastpo.scoring.policy_scorers import RewardModelScorer, weights_key
from fastpo.scoring.scorers import make_scorer

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
LOSSY = (
    "{% for m in messages if m['role'] != 'system' %}{{ m['role'][0] }} {{ m['content'].split('w9')[0] }} <eos> "
    "{% endfor %}"
)


@pytest.fixture
def policy(toy, tmp_path):
    def save(name, seed=0, template=None):
        tokenizer = toy.tokenizer()
        tokenizer.chat_template = template
        toy.model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def of_texts(toy, n=6, k=3, seed=0):
    rng = random.Random(seed)
    return [
        Item(f"i{m}", toy.text(rng, 2, 5), responses=tuple(Response(" " + toy.text(rng, 1, 8)) for _ in range(k)))
        for m in range(n)
    ]


def scored(scorer, items):
    found = {u.key: v for u, v in scorer.score([Unit(i, k) for i in items for k in range(len(i.responses))])}
    return [found[i.id, k, None] for i in items for k in range(len(i.responses))]


def logp(path, prompt, response):
    """Of token ids, by the model's own forward."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, :-1].double().log_softmax(-1)
    at = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    return float(logits[at, torch.tensor(response)].sum())


# ---- reward models


@pytest.fixture
def reward_model(toy, tmp_path):
    def save(name="rm", template=None, labels=1):
        torch.manual_seed(1)
        options = dict(
            vocab_size=toy.words + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, num_labels=labels, pad_token_id=2,
        )  # fmt: skip
        model = LlamaForSequenceClassification(LlamaConfig(**options)).eval()
        tokenizer = toy.tokenizer()
        tokenizer.chat_template = template
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return model, tokenizer, str(tmp_path / name)

    return save


def own(model, ids, label=0):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, label].item()


@pytest.mark.parametrize("padded", [False, True])
def test_rewards_are_the_models_own(toy, reward_model, padded, monkeypatch):
    model, tokenizer, path = reward_model()
    if padded:
        forward = RewardModelScorer._padded
        monkeypatch.setattr(
            RewardModelScorer, "_rewards",
            lambda self, model, tokenizer, ids: forward(self, model, tokenizer, [p + r for p, r in ids]),
        )  # fmt: skip
    scorer = make_scorer("rm", {"kind": "reward_model", "model": "best", "batch_size": 4}, {"best": path}, Path())
    items = of_texts(toy)
    for verdict, (prompt, text) in zip(
        scored(scorer, items), [(i.prompt, r.text) for i in items for r in i.responses], strict=True
    ):
        ids = tokenizer(prompt + text)["input_ids"] + [tokenizer.eos_token_id]
        assert verdict.value == pytest.approx(own(model, ids), abs=2e-6)


def test_turns_go_through_its_own_template(reward_model):
    model, tokenizer, path = reward_model(template=CHAT)
    of = Item(
        "x", [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}], responses=(Response("w3 w4"),)
    )
    [verdict] = scored(RewardModelScorer("rm", path), [of])
    rendered = tokenizer.apply_chat_template([*of.prompt, {"role": "assistant", "content": "w3 w4"}], tokenize=False)
    ids = tokenizer(rendered.strip())["input_ids"]
    assert verdict.value == pytest.approx(own(model, ids), abs=2e-6)
    # A text is a user's turn to a model with a template.
    as_text, as_turn = (
        scored(RewardModelScorer("rm", path), [Item("x", prompt, responses=of.responses)])[0].value
        for prompt in ("w2", [{"role": "user", "content": "w2"}])
    )
    assert as_text == as_turn


def test_what_it_does_not_see_is_not_scored(reward_model):
    _, _, path = reward_model(template=LOSSY)
    user = [{"role": "user", "content": "w2"}]
    items = [
        Item("cut", user, responses=(Response("w3 w9 w4"),)), Item("whole", user, responses=(Response("w3"),)),
        Item("system", [{"role": "system", "content": "w1"}, *user], responses=(Response("w3"),)),
        Item("empty", user, responses=(Response(" "),)), Item("long", user, responses=(Response("w3 " * 80),)),
    ]  # fmt: skip
    found = scored(RewardModelScorer("rm", path), items)
    assert [v.status for v in found] == ["not_seen", "ok", "not_seen", "empty", "too_long"]
    assert [v.value is None for v in found] == [True, False, True, True, True]
    assert "does not write this assistant's text" in found[0].raw
    with pytest.raises(ConfigError, match="no chat template"):
        scored(RewardModelScorer("rm", reward_model("bare")[2]), items[:1])


def test_what_is_no_reward_model_is_refused(policy, reward_model):
    with pytest.raises(ConfigError, match="no weights for 'score.weight', which would be random"):
        scored(RewardModelScorer("rm", policy("policy")), [])
    with pytest.raises(ConfigError, match="cannot load"):
        scored(RewardModelScorer("rm", "/nowhere"), [])
    model, tokenizer, path = reward_model(labels=3)
    with pytest.raises(ConfigError, match="set `label`"):
        scored(RewardModelScorer("rm", path), [])
    with pytest.raises(ConfigError, match="did you mean 'LABEL_2'"):
        scored(RewardModelScorer("rm", path, label="LABEL2"), [])
    of = Item("x", "w1", responses=(Response(" w2"),))
    [verdict] = scored(RewardModelScorer("rm", path, label="LABEL_2"), [of])
    assert verdict.value == pytest.approx(own(model, tokenizer("w1 w2")["input_ids"] + [0], 2), abs=2e-6)


def test_the_same_bytes_after_a_break(toy, reward_model, tmp_path, monkeypatch):
    monkeypatch.setattr("fastpo.loop.score_stage.CHUNK", 7)
    _, _, path = reward_model()
    items = of_texts(toy, 8)
    score_stage(RewardModelScorer("rm", path), items, tmp_path / "scores", cache=False)
    part = tmp_path / "scores" / "rm" / "part-0000.jsonl"
    whole = part.read_bytes()
    for cut in (100, len(whole) // 2, len(whole) - 3):
        part.write_bytes(whole[:cut])
        score_stage(RewardModelScorer("rm", path), items, tmp_path / "scores", cache=False)
        assert part.read_bytes() == whole


def test_the_key_is_of_the_weights(policy, tmp_path):
    path = policy("a", seed=1)
    first = weights_key(path)
    assert weights_key(policy("b", seed=1)) == first != weights_key(policy("c", seed=2))
    (Path(path) / "trainer_state.json").write_text("{}")
    assert weights_key(path) == first
    config = Path(path) / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert weights_key(path) != first
    assert weights_key("some/name") == {"name": "some/name"}


# ---- DICE


def implicit(policies, **options):
    spec = {"kind": "implicit", "policy": "current", "reference": "previous", **options}
    return make_scorer("dice", spec, policies, Path())


@pytest.fixture
def two(policy):
    return {"current": policy("current", 1), "previous": policy("previous", 2)}


def test_implicit_rewards_of_sampled_tokens(two):
    prompt, ended, cut = (5, 6, 7), (8, 9, 0), (8, 9)
    items = [
        Item("x", "w2 w3 w4", prompt, (Response(" w5 w6", ended), Response(" w5 w6", cut, finished=False))),
        Item("y", "w2 w3 w4", None, (Response(" w5 w6"), Response(" w5 w6", finished=False), Response("", ()))),
    ]  # fmt: skip
    found = scored(implicit(two), items)

    def ratio(ids):
        return logp(two["current"], prompt, ids) - logp(two["previous"], prompt, ids)

    assert [v.status for v in found] == ["ok", "ok", "ok", "ok", "empty"]
    for verdict, ids in zip(found, (ended, cut, ended, cut), strict=False):
        assert verdict.value == pytest.approx(ratio(ids), abs=1e-5)
    for verdict in scored(implicit(two, end="mask"), items)[:4]:
        assert verdict.value == pytest.approx(ratio(cut), abs=1e-5)


def test_a_text_is_a_text_and_turns_go_through_the_template(policy):
    both = {"current": policy("current", 1, CHAT), "previous": policy("previous", 2, CHAT)}
    turns = [{"role": "user", "content": "w2"}]
    items = [
        Item("t", "w2", responses=(Response(" w5", (8, 0)), Response(" w5"))),
        Item("c", turns, responses=(Response("w5", (8, 0)), Response("w5"))),
    ]
    text, text_outside, chat, chat_outside = (v.value for v in scored(implicit(both), items))
    tokenizer = AutoTokenizer.from_pretrained(both["current"])
    rendered = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))["input_ids"]
    for value, prompt in ((text, [5]), (text_outside, [5]), (chat, rendered), (chat_outside, rendered)):
        wanted = logp(both["current"], prompt, [8, 0]) - logp(both["previous"], prompt, [8, 0])
        assert value == pytest.approx(wanted, abs=1e-5)
    assert text != chat


def test_tokens_of_another_tokenizer_are_refused(two):
    items = [Item(f"i{n}", "w1", (4,), (Response(" w50 w51", (5, 6)),)) for n in range(16)]
    with pytest.raises(ConfigError, match="another model's"):
        scored(implicit(two), items)


def test_the_length_penalty_of_the_stage(two, toy, tmp_path):
    items, two = of_texts(toy, 12, 5), {"current": two["previous"], "previous": two["current"]}
    raw = [v.value for v in scored(implicit(two), items)]
    counts = score_stage(implicit(two, alpha="auto"), items, tmp_path, cache=False)
    assert counts["failed"] == 0
    said = json.loads((tmp_path / "dice" / "scorer.json").read_text())["settled"]
    chars = [torch.tensor([float(len(r.text)) for r in i.responses]) for i in items]
    values = [torch.tensor(raw[n * 5 : n * 5 + 5], dtype=torch.float64) for n in range(12)]
    alpha, gap = fastpo.selection.length_penalty(values, chars)
    assert said == {"alpha": alpha, "length_gap": gap} and alpha > 0
    table = read_scores(tmp_path, "dice", items)
    for n, item in enumerate(items):
        np.testing.assert_allclose(table[item.id].values, values[n] - alpha * chars[n], atol=1e-9)
    score_stage(implicit(two, alpha=0.5), items, tmp_path / "given", cache=False)
    assert read_scores(tmp_path / "given", "dice", items)["i0"].values[0] == pytest.approx(
        raw[0] - 0.5 * float(chars[0][0])
    )


def test_each_policy_computes_a_response_once(two, policy, toy, tmp_path, monkeypatch):
    items, calls = of_texts(toy), []
    import fastpo.scoring.policy_scorers as module

    compute = module.sequence_logps
    monkeypatch.setattr(
        module, "sequence_logps", lambda model, rows, **k: calls.append(len(rows)) or compute(model, rows, **k)
    )
    with VerdictCache(tmp_path / "kept.sqlite") as cache:
        score_stage(implicit(two), items, tmp_path / "one", cache=cache)
        score_stage(implicit(two), items, tmp_path / "two", cache=cache)
        assert calls == [18, 18]
        # The next round: what was the policy is the reference now.
        score_stage(
            implicit({"current": policy("next", 3), "previous": two["current"]}), items, tmp_path / "three", cache=cache
        )
        assert calls == [18, 18, 18]
    part = "dice/part-0000.jsonl"
    assert (tmp_path / "one" / part).read_bytes() == (tmp_path / "two" / part).read_bytes()


def test_the_implicit_reward_of_a_policy_trained_by_dpo_is_its_reward(policy, tmp_path):
    """pi ~ pi_ref exp(r / beta): beta times the implicit reward is r, but for one constant a prompt."""
    start, reward, beta = policy("start", 1), (0.0, 0.7, -0.5, 0.3), 0.5
    rows = [
        {"prompt": [5], "chosen": [10 + i], "rejected": [10 + j], "weight": 1 / (1 + math.exp(reward[j] - reward[i]))}
        for i in range(4) for j in range(4) if i != j
    ]  # fmt: skip
    fastpo.train(
        start, rows, loss_type="dpo", beta=beta, output_dir=str(tmp_path / "trained"), max_steps=150,
        learning_rate=0.01, lr_scheduler_type="cosine", warmup_steps=0, per_device_train_batch_size=12, use_cpu=True,
        bf16=False, disable_tqdm=True, report=False, max_grad_norm=1e9, save_strategy="no", weight_decay=0.0,
        optim="adamw_torch", gradient_checkpointing=False,
    )  # fmt: skip
    of = Item("x", "w2", (5,), tuple(Response(f"w{7 + k}", (10 + k,), False) for k in range(4)))
    found = [v.value for v in scored(implicit({"current": str(tmp_path / "trained"), "previous": start}), [of])]
    gap = beta * np.array(found) - np.array(reward)
    assert np.ptp(gap) < 5e-3 and np.ptp(reward) > 1


# ---- CDR


def ratio_of(policies, **options):
    return make_scorer(
        "cdr", {"kind": "density_ratio", "strong": "strong", "weak": "weak", **options}, policies, Path()
    )


def test_density_ratio_by_hand(policy):
    both = {"strong": policy("strong", 1), "weak": policy("weak", 2)}
    of = Item("x", "w2 w3", responses=(Response(" w5 w6 w7"),))
    prompt, ids = [5, 6], [8, 9, 10]
    sums = {end: [logp(path, prompt, [*ids, *end]) for path in both.values()] for end in ((0,), ())}
    for options, wanted in (
        ({}, sums[0,][0] - sums[0,][1]), ({"end": "mask"}, sums[()][0] - sums[()][1]),
        ({"reduce": "mean"}, (sums[0,][0] - sums[0,][1]) / 4),
    ):  # fmt: skip
        [verdict] = scored(ratio_of(both, **options), [of])
        assert verdict.value == pytest.approx(wanted, abs=1e-5)
    unfinished = Item("x", "w2 w3", responses=(Response(" w5 w6 w7", finished=False),))
    assert scored(ratio_of(both), [unfinished])[0].value == pytest.approx(sums[()][0] - sums[()][1], abs=1e-5)


@pytest.mark.parametrize("who", ["both", "strong", "weak"])
def test_each_model_has_its_own_template_and_the_criterion(policy, who):
    """The strong one has turns, the weak one plain texts."""
    both = {"strong": policy("strong", 1, CHAT), "weak": policy("weak", 2)}
    of = Item("x", "w2 w3", responses=(Response("w5 w6"),))
    [verdict] = scored(ratio_of(both, criterion="w80", criterion_for=who), [of])
    tokenizer = AutoTokenizer.from_pretrained(both["strong"])
    with_strong, with_weak = who in ("both", "strong"), who in ("both", "weak")
    turns = [{"role": "system", "content": "w80"}] * with_strong + [{"role": "user", "content": "w2 w3"}]
    answer = {"role": "assistant", "content": "w5 w6"}
    whole = tokenizer(tokenizer.apply_chat_template([*turns, answer], tokenize=False).strip())["input_ids"]
    start = len(
        tokenizer(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))["input_ids"]
    )
    strong = logp(both["strong"], whole[:start], whole[start:])
    # Words of a toy tokenizer: the prompt's last and the response's first are one where no space is between.
    text = tokenizer("w80 w2 w3w5 w6" if with_weak else "w2 w3w5 w6")["input_ids"]
    weak = logp(both["weak"], text[:-2], [*text[-2:], 0])
    assert verdict.value == pytest.approx(strong - weak, abs=1e-5)
