"""Samples in this process: what is drawn, what is noted of it, and that nothing else changes."""

import contextlib
import functools
import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastpo import TrainConfig, sequence_logps
from fastpo.data import prepare_examples
from fastpo.errors import ConfigError, DataError, TrainingError
from fastpo.loop.config import Sample
from fastpo.models.modes import training_mode
from fastpo.models.policy import Policy, attention_implementations
from fastpo.reference.live import Exchange, _adapter_off
from fastpo.sampling.check_sampler import check_sampler
from fastpo.sampling.items import Failure, Request, Response, seed_of
from fastpo.sampling.local_sampler import LocalSampler
from fastpo.sampling.make import make_sampler, prompt_ids

CHAT = (
    "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def requests_for(toy, n=6, k=3, seed=0, **settings):
    """k of each of n prompts of 1 to n + 2 tokens."""
    tokenizer = toy.tokenizer()
    out = []
    for i in range(n):
        prompt = " ".join(f"w{(7 * i + j) % toy.words}" for j in range(1 + (5 * i) % (n + 2)))
        ids = prompt_ids(tokenizer, prompt)
        given = {"max_tokens": 20, **settings}
        out += [Request(f"p{i}", j, "policy", prompt, ids, seed_of(seed, i, j), **given) for j in range(k)]
    return out


def policy_of(toy, **changes):
    """As the tokenizer ends: Llama's configuration has another token for it."""
    model = toy.model(**changes).eval()
    model.generation_config.eos_token_id = 0
    return model


@pytest.fixture(scope="module")
def model(toy):
    return policy_of(toy)


@pytest.fixture(scope="module")
def sampler(toy, model):
    return LocalSampler(model, toy.tokenizer(), batch_size=5)


def all_of(sampler, requests):
    return {request.unit: answer for request, answer in sampler.sample(requests)}


# ---- what is drawn


def test_log_probabilities_are_the_policys_own(toy, sampler, model):
    requests = requests_for(toy, temperature=0.6, top_p=0.8, top_k=30)
    answers = all_of(sampler, requests)
    pairs = [(request, answers[request.unit]) for request in requests]
    rows = [{"prompt": list(q.prompt_ids), "completion": list(r.token_ids)} for q, r in pairs]
    ours = sequence_logps(model, rows, processing_class=toy.tokenizer())
    for (_, response), (logp,) in zip(pairs, ours, strict=True):
        assert response.logp == pytest.approx(float(logp.sum()), abs=2e-4)
    found = check_sampler(pairs, model, toy.tokenizer(), n=5)
    assert found["compared"] == 5 and found["difference"] < 1e-5
    with pytest.raises(TrainingError, match="the sampler is not the policy.*stale weights"):
        check_sampler(pairs, toy.model(seed=1, initializer_range=0.3), toy.tokenizer())
    without = [(q, replace(r, logp=None)) for q, r in pairs]
    assert check_sampler(without, model)["why"].startswith("the sampler gives no log-probabilities")
    texts = [(q, replace(r, token_ids=None)) for q, r in pairs]
    assert "no token ids" in check_sampler(texts, model)["why"]
    assert check_sampler([], model)["compared"] == 0
    not_finite = [(q, replace(r, logp=float("nan"))) for q, r in pairs]
    with pytest.raises(TrainingError, match="not the policy"):
        check_sampler(not_finite, model, toy.tokenizer())


def test_greedy_is_that_of_each_prompt_alone(toy, sampler, model):
    requests = requests_for(toy, k=1, temperature=0.0)
    answers = all_of(sampler, requests)
    for request in requests:
        ids = torch.tensor([request.prompt_ids])
        settings = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=0, pad_token_id=2)
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert answers[request.unit].token_ids == tuple(alone[0, ids.shape[1] :].tolist())


def test_an_answer_ends_where_the_policy_ended_it(toy, sampler):
    answers = all_of(sampler, requests_for(toy, n=8, k=8, max_tokens=60)).values()
    ended = [a for a in answers if a.finished]
    assert ended and len(ended) < len(answers)
    for answer in answers:
        assert (answer.token_ids[-1] == 0) is answer.finished and 0 not in answer.token_ids[:-1]
        assert answer.finished or len(answer.token_ids) == 60
        assert answer.text == toy.tokenizer().decode(answer.token_ids, skip_special_tokens=True)


def test_a_conversations_answer_ends_with_the_templates_turn(toy):
    """The template ends a turn with <end>, which the checkpoint's settings do not know."""
    tokenizer = toy.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = CHAT.replace("<eos>", "<end>")
    end = tokenizer.convert_tokens_to_ids("<end>")
    model = policy_of(toy, vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[end] = 3 * model.lm_head.weight[:100].abs().max(0).values
    turns = [{"role": "user", "content": "w1 w2"}]
    chat, text = prompt_ids(tokenizer, turns), prompt_ids(tokenizer, "w1 w2")
    requests = [Request("c", k, "policy", turns, chat, k, max_tokens=50) for k in range(8)]
    requests += [Request("t", k, "policy", "w1 w2", text, k, max_tokens=50) for k in range(8)]
    answers = all_of(LocalSampler(model, tokenizer), requests)
    drawn = [answers[r.unit] for r in requests if r.id == "c" and end in answers[r.unit].token_ids]
    assert drawn and all(a.finished and a.token_ids.index(end) == len(a.token_ids) - 1 for a in drawn)
    assert any(end in answers[r.unit].token_ids[:-1] for r in requests if r.id == "t")


@pytest.mark.parametrize("temperature, top_p, top_k", [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.5, 0), (0.7, 0.6, 6)])
def test_tokens_are_drawn_from_the_distribution(toy, model, temperature, top_p, top_k):
    ids = (10, 11, 12)
    settings = dict(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=1)
    n = 3000
    requests = [Request("p", k, "policy", "", ids, seed_of(k), **settings) for k in range(n)]
    answers = all_of(LocalSampler(model, toy.tokenizer(), batch_size=1000), requests).values()
    found = torch.bincount(torch.tensor([a.token_ids[0] for a in answers]), minlength=100) / n
    with torch.no_grad():
        values, order = (model(torch.tensor([ids])).logits[0, -1].double() / temperature).sort(descending=True)
    if top_k:
        values[top_k:] = -torch.inf
    probs = values.softmax(-1)
    probs[torch.cat([torch.tensor([False]), probs.cumsum(-1)[:-1] >= top_p])] = 0
    expected = torch.zeros(100, dtype=torch.float64).scatter_(0, order, probs / probs.sum())
    assert not found[expected == 0].any()
    # Four standard deviations of a count: of 100 tokens none is beyond it but once in a hundred such tests.
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt() + 1e-9).all()


def test_a_contrast_mixes_the_logits_of_two_prompts(toy, model, sampler):
    plain = requests_for(toy, n=5, k=2, temperature=1.0)
    other = (4, 5, 6, 7, 8, 9, 10, 11, 12)
    there = all_of(sampler, [replace(r, prompt_ids=other) for r in plain])
    for c, expected in ((1.0, there), (0.0, all_of(sampler, plain))):
        mixed = all_of(sampler, [replace(r, contrast_ids=other, contrast=c) for r in plain])
        assert {u: a.token_ids for u, a in mixed.items()} == {u: a.token_ids for u, a in expected.items()}
    # Between the two, beside rows without; log-probabilities stay the policy's after its own prompt.
    some = [replace(r, contrast_ids=other, contrast=-0.5, temperature=0.0) if r.k else r for r in plain]
    answers = all_of(sampler, some)
    assert check_sampler([(r, answers[r.unit]) for r in some], model, toy.tokenizer(), n=9)["difference"] < 1e-5
    for request in some:
        if request.contrast_ids is None:
            continue
        drawn: list[int] = []
        for token in answers[request.unit].token_ids:
            with torch.no_grad():
                own, contrast = (
                    model(torch.tensor([[*ids, *drawn]])).logits[0, -1] for ids in (request.prompt_ids, other)
                )
            assert token == int((1.5 * own - 0.5 * contrast).argmax())
            drawn.append(token)


def test_stop_strings_end_an_answer_and_are_not_in_its_text(toy, sampler):
    free = all_of(sampler, requests_for(toy, k=4, max_tokens=40))
    unit, answer = next((u, a) for u, a in free.items() if len(a.token_ids) > 6)
    word = answer.text.split()[4]
    stopped = all_of(sampler, requests_for(toy, k=4, max_tokens=40, stop=(f" {word}",)))
    for key, whole in free.items():
        at = whole.text.find(f" {word}")
        # "w1" is found in "w12" too, as a server finds it.
        assert stopped[key].text == (whole.text if at < 0 else whole.text[:at])
        assert stopped[key].token_ids == whole.token_ids[: len(stopped[key].token_ids)]
        assert stopped[key].finished or at < 0
    assert len(stopped[unit].token_ids) <= 5 and stopped[unit].finished


def test_ids_are_kept_that_the_text_would_not_give_again():
    """A tokenizer that joins a and b, and a policy that gives them one by one."""
    inner = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "<eos>": 3}, merges=[("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.Split("<eos>", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                         max_position_embeddings=64)  # fmt: skip
    sampler = LocalSampler(LlamaForCausalLM(config), tokenizer)
    requests = [Request("p", k, "policy", "a", (0,), k, max_tokens=12) for k in range(20)]
    answers = all_of(sampler, requests).values()
    other = [
        a for a in answers if tuple(tokenizer(a.text)["input_ids"]) != tuple(a.token_ids[: -1 if a.finished else None])
    ]
    assert other and all(tokenizer.decode(a.token_ids, skip_special_tokens=True) == a.text for a in other)


# ---- exactness, and what stays as it is


def test_the_same_requests_give_the_same_answers(toy, model):
    requests = requests_for(toy, n=7, k=3, temperature=1.0)
    first = all_of(LocalSampler(model, toy.tokenizer(), batch_size=4), requests)
    torch.manual_seed(5)
    again = all_of(LocalSampler(model, toy.tokenizer(), batch_size=4), requests[::-1])
    assert first == again
    assert len({a.token_ids for u, a in first.items() if u[0] == "p3"}) == 3
    # Other batches are other sums in another order, and the same draws.
    wide = all_of(LocalSampler(model, toy.tokenizer(), batch_size=50), requests)
    assert {u: a.token_ids for u, a in wide.items()} == {u: a.token_ids for u, a in first.items()}


def test_the_plan_depends_on_the_requests_alone(toy, sampler):
    requests = requests_for(toy, n=9, k=3)
    plan = sampler.batches(requests)
    assert plan == sampler.batches(requests[5:] + requests[:5])
    assert sorted(r.unit for batch in plan for r in batch) == sorted(r.unit for r in requests)
    flat = [r for batch in plan for r in batch]
    assert [len(r.prompt_ids) for r in flat] == sorted((len(r.prompt_ids) for r in flat), reverse=True)
    assert sum(a.id != b.id for a, b in zip(flat, flat[1:], strict=False)) == 8  # those of a prompt together
    assert all(sampler.batches(batch) == [batch] for batch in plan)
    bounded = LocalSampler(sampler.model, toy.tokenizer(), batch_tokens=80)
    for batch in bounded.batches(requests):
        assert len(batch) == 1 or len(batch) * max(len(r.prompt_ids) + 20 for r in batch) <= 80
        assert bounded.batches(batch) == [batch]


def test_nothing_but_the_answers_comes_of_it(toy):
    model = toy.model(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    model.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, top_k=1, max_new_tokens=2)
    settings, state = model.generation_config.to_dict(), torch.get_rng_state()
    requests = requests_for(toy, k=2)
    answers = all_of(LocalSampler(model, toy.tokenizer()), requests)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert model.generation_config.to_dict() == settings and model.config.use_cache is False
    assert answers == all_of(LocalSampler(model.eval(), toy.tokenizer()), requests)  # no dropout, no penalty
    assert max(len(a.token_ids) for a in answers.values()) > 2


def test_memory_that_runs_out_halves_the_batches_and_is_said_once(toy, monkeypatch, caplog):
    model, requests = toy.model().eval(), requests_for(toy, n=5, k=4, temperature=1.0)
    whole = all_of(LocalSampler(model, toy.tokenizer(), batch_size=10), requests)
    sizes, generate = [], model.generate

    def small(input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", small)
    with caplog.at_level(logging.WARNING, "fastpo"):
        parts = all_of(LocalSampler(model, toy.tokenizer(), batch_size=10), requests)
    assert {u: a.token_ids for u, a in parts.items()} == {u: a.token_ids for u, a in whole.items()}
    assert sizes[:2] == [10, 5] and set(sizes[2:]) <= {1, 2}  # the second batch is not tried whole again
    said = [r.message for r in caplog.records if "did not fit" in r.message]
    assert len(said) == 2 and "batch_size=2" in said[1]  # 10, then 5


def test_a_row_that_does_not_fit_by_itself_is_an_error(toy, monkeypatch):
    model = toy.model()

    def never(**kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "generate", never)
    with pytest.raises(torch.OutOfMemoryError):
        all_of(LocalSampler(model, toy.tokenizer()), requests_for(toy, n=1))


def test_a_prompt_without_room_fails_alone(toy):
    model = toy.model(max_position_embeddings=32)
    requests = requests_for(toy, n=3, k=1, max_tokens=50)
    long = Request("long", 0, "policy", "", tuple([5] * 32), 1, max_tokens=50)
    tight = Request("tight", 0, "policy", "", tuple([5] * 30), 1, max_tokens=50)
    empty = Request("empty", 0, "policy", "", (), 1)
    answers = all_of(LocalSampler(model, toy.tokenizer()), [*requests, long, tight, empty])
    assert answers[long.unit] == Failure("error", "the prompt has 32 tokens, the model 32 positions")
    assert answers[empty.unit] == Failure("error", "the prompt has no tokens")
    assert len(answers[tight.unit].token_ids) <= 2
    assert all(isinstance(answers[r.unit], Response) for r in requests)
    with pytest.raises(ConfigError, match="none of the model's 100"):
        all_of(LocalSampler(model, toy.tokenizer()), [replace(long, prompt_ids=(5, 100))])


def test_logits_that_are_not_finite_end_it(toy):
    model = toy.model()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(TrainingError, match="not finite"):
        all_of(LocalSampler(model, toy.tokenizer()), requests_for(toy, n=1))


def test_a_folder_is_loaded_when_it_is_asked(toy, tmp_path):
    toy.model().save_pretrained(tmp_path)
    toy.tokenizer().save_pretrained(tmp_path)
    made = make_sampler(Sample(options={"batch_size": 2, "use_cpu": True, "dtype": "float32"}), str(tmp_path))
    assert made.key["model"] == str(tmp_path) and made._model is None
    requests = requests_for(toy, n=2)
    assert all_of(made, requests) == all_of(LocalSampler(toy.model(), toy.tokenizer(), batch_size=2), requests)
    made.close()
    assert made._model is None


@pytest.mark.parametrize(
    "sample, message",
    [
        (Sample(engine="vlm"), "sample.engine='vlm'"),
        (Sample(options={"batchsize": 2}), "no such option; did you mean 'batch_size'"),
        (Sample(options={"base_url": "http://x/v1"}), "it is one of sample.engine=openai"),
        (Sample(options={"batch_size": 0}), "a whole number from 1 on"),
        (Sample(engine="openai"), "needs sample.base_url"),
    ],
    ids=lambda value: "" if isinstance(value, Sample) else value.split("=")[0][:30],
)
def test_wrong_options_are_named(sample, message, toy):
    with pytest.raises(ConfigError, match=message):
        make_sampler(sample, "policy", toy.tokenizer())


# ---- ids of prompts


def byte_tokenizer():
    """Letters, with a BOS that it puts before every text, as Llama's."""
    letters = {c: i for i, c in enumerate(["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz<>:/ \n"])}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[]))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")


PARTS = (
    "{{ bos_token }}{% for turn in messages %}{{ turn.role }}: {% for part in turn.content %}{{ part.text }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("template", [None, "{{ bos_token }}" + CHAT, PARTS], ids=["text", "chat", "parts"])
def test_prompts_have_the_ids_that_training_has(template):
    tokenizer = byte_tokenizer()
    if template is None:
        prompts = ["hello", "<s>hello", "a b"]
        rows = [{"prompt": p, "completion": " yes"} for p in prompts]
    else:
        tokenizer.chat_template = template
        user, system = {"role": "user", "content": "hello"}, {"role": "system", "content": "be"}
        begun = {"role": "assistant", "content": "so"}
        prompts = [[user], [system, user], [user, {"role": "assistant", "content": "no"}, user]]
        if template is not PARTS:  # which cannot write them apart
            prompts.append([user, begun])
        rows = [{"prompt": p, "completion": [{"role": "assistant", "content": " yes"}]} for p in prompts]
    examples, _ = prepare_examples(rows, tokenizer, kind="sft", recognise=False)
    for prompt, example in zip(prompts, examples, strict=True):
        assert prompt_ids(tokenizer, prompt) == tuple(example.prompt_ids.tolist())


def test_a_prompt_that_the_template_refuses(toy):
    tokenizer = toy.tokenizer()
    with pytest.raises(DataError, match="no chat template"):
        prompt_ids(tokenizer, [{"role": "user", "content": "w1"}])
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(DataError, match="refuses a prompt.*no system turn"):
        prompt_ids(tokenizer, [{"role": "user", "content": "w1"}])


# ---- log-probabilities of tokens, and a policy that is trained between calls


def test_log_probabilities_of_tokens_are_the_policys_own(toy, sampler, model):
    requests = requests_for(toy, temperature=0.6, top_p=0.8, top_k=30)
    answers = all_of(sampler, requests)
    for request in requests:
        response = answers[request.unit]
        ids = torch.tensor([[*request.prompt_ids, *response.token_ids]])
        with torch.no_grad():
            logps = model(ids).logits[0].double().log_softmax(-1)
        ours = logps[len(request.prompt_ids) - 1 : -1].gather(-1, ids[0, len(request.prompt_ids) :, None])[:, 0]
        assert list(response.token_logps) == pytest.approx(ours.tolist(), abs=1e-4)
        assert response.logp == sum(response.token_logps)
    line = json.loads(json.dumps(answers[requests[0].unit].to_json()))
    back = Response.from_json(line)
    assert list(back.token_logps) == list(answers[requests[0].unit].token_logps)
    some = replace(back, token_logps=[-1.0, math.nan])
    assert some.to_json()["token_logps"] == [-1.0, None]
    read = Response.from_json(some.to_json()).token_logps
    assert read[0] == -1.0 and math.isnan(read[1])
    assert "token_logps" not in replace(back, token_logps=None).to_json()


def test_the_check_takes_log_probabilities_that_are_there(toy, sampler, model):
    requests = requests_for(toy, n=4, k=2)
    answers = all_of(sampler, requests)
    pairs = [(r, answers[r.unit]) for r in requests]
    rows = [{"prompt": list(q.prompt_ids), "completion": list(r.token_ids)} for q, r in pairs]
    own = [logps[0] for logps in sequence_logps(model, rows, processing_class=toy.tokenizer())]
    found = check_sampler(pairs, own=own)
    assert found["compared"] == 8 and found["difference"] < 1e-5
    assert check_sampler(pairs, own=[torch.from_numpy(x) for x in own]) == found
    gaps = [(q, replace(r, logp=None, token_logps=[math.nan, *list(r.token_logps)[1:]])) for q, r in pairs]
    left_out = check_sampler(gaps, own=[[99.0, *x[1:]] for x in own])  # the first of each is not looked at
    assert left_out["compared"] == sum(len(r.token_ids) > 1 for _, r in pairs) and left_out["difference"] < 1e-5
    sums = [(q, replace(r, token_logps=None)) for q, r in pairs]
    assert check_sampler(sums, own=own)["compared"] == 8
    with pytest.raises(TrainingError, match="the sampler is not the policy.*of 8 responses.*other or stale weights"):
        check_sampler(pairs, own=[x + 0.2 for x in own])
    with pytest.raises(TrainingError, match="the sampler is not the policy"):
        check_sampler(pairs, own=[[math.nan] * len(x) for x in own])
    none = [(q, replace(r, logp=None, token_logps=None)) for q, r in pairs]
    assert check_sampler(none, own=own)["why"].startswith("the sampler gives no log-probabilities")
    with pytest.raises(ValueError, match="tokens were sampled"):
        check_sampler(pairs, own=[x[:-1] for x in own])
    with pytest.raises(ValueError):
        check_sampler(pairs, own=own[:-1])


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("attached", [False, True], ids=["", "attached"])
def test_a_policy_that_is_trained_between_calls(toy, method, attached):
    """As a trainer has it: attached, in train mode, layers recomputed, half of a step done."""
    model = policy_of(toy)
    if method == "lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    requests = requests_for(toy, n=3, k=4)
    sampler = LocalSampler(model, toy.tokenizer(), live=True)
    config = TrainConfig(output_dir="", gradient_checkpointing=True)
    policy = Policy(model)
    with training_mode(policy, config) if attached else contextlib.nullcontext():
        first = None
        for step in range(2):
            flags = {name: p.requires_grad for name, p in model.named_parameters()}
            modes = [m.training for m in model.modules()]
            checkpointed = [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
            attention, state = attention_implementations(policy.causal_lm), torch.get_rng_state()
            caches = model.config.use_cache
            with policy.detached():
                answers = all_of(sampler, requests)
            assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
            assert [m.training for m in model.modules()] == modes
            assert [getattr(m, "gradient_checkpointing", None) for m in model.modules()] == checkpointed
            assert [a for _, a in attention_implementations(policy.causal_lm)] == [a for _, a in attention]
            assert model.config.use_cache == caches and torch.equal(torch.get_rng_state(), state)
            rows = [{"prompt": list(r.prompt_ids), "completion": list(answers[r.unit].token_ids)} for r in requests]
            with policy.detached():
                own = [x[0] for x in sequence_logps(model, rows, processing_class=toy.tokenizer())]
            assert check_sampler([(r, answers[r.unit]) for r in requests], own=own)["difference"] < 1e-4
            assert step == 0 or first != answers
            first = answers
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    assert sampler.key["model"] == "in memory, trained"


def test_in_the_precision_of_an_autocast(toy, model):
    requests = requests_for(toy, n=3, k=2)
    sampler = LocalSampler(model, toy.tokenizer())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers = all_of(sampler, requests)
    found = check_sampler([(r, answers[r.unit]) for r in requests], model, toy.tokenizer(), tolerance=0.02)
    assert 1e-6 < found["difference"]  # bf16 was used, and is near


# ---- prompts that several responses have, and the cache


def alone(model, request, tokens):
    """Logits [tokens, V] in fp64 of a full forward without a cache, before each of the tokens."""
    ids = torch.tensor([[*request.prompt_ids, *tokens]])
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1].double()


def drawn_again(request, logits):
    """The tokens that the request's random numbers draw from logits [tokens, V] in fp64."""
    u = torch.rand(request.max_tokens, generator=torch.Generator().manual_seed(request.seed), dtype=torch.float64)
    sums = (logits / request.temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(sums, (u[: len(sums)] * sums[:, -1])[:, None], right=True)[:, 0].tolist()


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 8}], ids=["full", "window"])
def test_a_prompt_of_many_responses_is_computed_once(toy, monkeypatch, changes):
    model = policy_of(toy)
    if changes:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.MistralConfig(**{**model.config.to_dict(), **changes})
        model = transformers.MistralForCausalLM(config).eval()
        model.generation_config.eos_token_id = 0
    model = model.double()
    tokenizer = toy.tokenizer()
    prompts = [tuple(range(3, 3 + size)) for size in (40, 1, 17)]
    requests = [Request(f"p{i}", k, "policy", "", ids, seed_of(i, k), max_tokens=20)
                for i, ids in enumerate(prompts) for k in range(6)]  # fmt: skip
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    answers = all_of(LocalSampler(model, tokenizer, batch_size=18), requests)
    handle.remove()
    assert seen[0] == (3, 39) and set(seen[1:]) == {(18, 1)}
    for request in requests:
        tokens = answers[request.unit].token_ids
        logits = alone(model, request, tokens)
        assert drawn_again(request, logits) == list(tokens)
        logps = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert list(answers[request.unit].token_logps) == pytest.approx(logps.tolist(), abs=1e-5)


def test_the_memory_of_keys_and_values_grows(toy, monkeypatch):
    monkeypatch.setattr("fastpo.sampling.decoding.ROOM", 3)
    model, requests = policy_of(toy), requests_for(toy, n=5, k=3, max_tokens=30)
    answers = all_of(LocalSampler(model, toy.tokenizer()), requests)
    pairs = [(r, answers[r.unit]) for r in requests]
    assert check_sampler(pairs, model, toy.tokenizer(), n=15)["difference"] < 1e-5


# ---- min_p and the repetition penalty


@pytest.mark.parametrize(
    "settings",
    [
        dict(min_p=0.3),
        dict(min_p=0.2, top_k=12),
        dict(min_p=0.25, top_p=0.9, temperature=0.8),
        dict(repetition_penalty=1.6),
        dict(repetition_penalty=0.7, min_p=0.1, top_k=20, top_p=0.95, temperature=1.3),
        dict(top_p=0.97),
        dict(top_k=7),
    ],
    ids=str,
)
@pytest.mark.parametrize("likeliest", [512, 4], ids=["", "few"])
def test_cuts_and_the_penalty_are_transformers_own(toy, monkeypatch, settings, likeliest):
    """Which tokens can be drawn and how often, against its own processors."""
    monkeypatch.setattr("fastpo.sampling.drawing._LIKELIEST", likeliest)
    model = policy_of(toy, initializer_range=0.4)
    ids, n = (10, 11, 12, 11), 4000
    given = GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    processors = model._get_logits_processor(given, len(ids), device="cpu", logits_processor=[])
    with torch.no_grad():
        scores = processors(torch.tensor([ids]), model(torch.tensor([ids])).logits[:, -1].float())
    expected = scores[0].double().softmax(-1)
    plain = [Request("q", k, "policy", "", ids, seed_of(k, 1), max_tokens=1) for k in range(50)]  # beside rows without
    requests = [Request("p", k, "policy", "", ids, seed_of(k), max_tokens=1, **settings) for k in range(n)]
    answers = all_of(LocalSampler(model, toy.tokenizer(), batch_size=1000), [*plain, *requests])
    found = torch.bincount(torch.tensor([answers[r.unit].token_ids[0] for r in requests]), minlength=100).double()
    assert not found[expected == 0].any()
    often = expected * n >= 5
    rest = [(found[~often].sum(), expected[~often].sum() * n)] if (expected[~often] > 0).any() else []
    cells = [*zip(found[often], expected[often] * n, strict=True), *rest]
    chi = sum(float((f - e) ** 2 / e) for f, e in cells if e > 0)
    assert len(cells) > 1 and chi < chi_square_999(len(cells) - 1)


def chi_square_999(freedom):
    """The 0.999 quantile, by Wilson and Hilferty."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_the_penalty_counts_what_was_drawn(toy):
    """Greedy with a penalty is generate's own, token for token."""
    model = policy_of(toy, initializer_range=0.4)
    requests = requests_for(toy, n=5, k=1, temperature=0.0, repetition_penalty=1.5, max_tokens=25)
    answers = all_of(LocalSampler(model, toy.tokenizer()), requests)
    for request in requests:
        ids = torch.tensor([request.prompt_ids])
        settings = GenerationConfig(do_sample=False, max_new_tokens=25, eos_token_id=0, pad_token_id=2,
                                    repetition_penalty=1.5)  # fmt: skip
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert answers[request.unit].token_ids == tuple(expected[0, ids.shape[1] :].tolist())
    for wrong in (dict(min_p=1.5), dict(repetition_penalty=0.0)):
        with pytest.raises(ConfigError, match="expected a min_p from 0 to 1 and a penalty above 0"):
            all_of(LocalSampler(model, toy.tokenizer()), requests_for(toy, n=1, **wrong))


# ---- a mixture of the policy and its reference


def mixtures(toy, kind):
    """(policy, reference of LocalSampler, how the reference's own logits are had, what is trained)."""
    model = policy_of(toy, initializer_range=0.3).double()
    if kind == "other":
        reference = policy_of(toy, seed=3, initializer_range=0.3).double()
        return model, reference, reference, contextlib.nullcontext
    if kind == "exchange":
        exchange = Exchange(dict(model.named_parameters()))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        within = functools.partial(exchange.in_place, model)
        return model, within, model, within
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    within = functools.partial(_adapter_off, model, Exchange({}))
    return model, within, model, within


@pytest.mark.parametrize("kind", ["other", "exchange", "adapter"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "single"])
def test_a_mixture_is_that_of_full_forwards(toy, monkeypatch, kind, shared):
    """Left padding, stops and ends within a batch; each token is the one that its random number draws in fp64."""
    monkeypatch.setattr("fastpo.sampling.decoding._WORTH", 1)  # such prompts are too short else
    model, reference, of_it, within = mixtures(toy, kind)
    model.train()
    n, k = (5, 8) if shared else (12, 1)
    requests = requests_for(toy, n=n, k=k, max_tokens=25, temperature=0.9, stop=("w50 ", "w7"))
    c, tokenizer = 0.35, toy.tokenizer()
    flags = [p.requires_grad for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    answers = all_of(LocalSampler(model, tokenizer, batch_size=20, mixture=c, reference=reference, live=True), requests)
    assert model.training and [p.requires_grad for p in model.parameters()] == flags
    assert all(map(torch.equal, before, model.parameters()))
    model.eval()
    lengths, differ = set(), 0
    for request in requests:
        answer = answers[request.unit]
        own = alone(model, request, answer.token_ids)
        with within():
            other = alone(of_it, request, answer.token_ids)
        assert drawn_again(request, (1 - c) * own + c * other) == list(answer.token_ids)
        differ += drawn_again(request, own) != list(answer.token_ids)
        logps = own.log_softmax(-1).gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert list(answer.token_logps) == pytest.approx(logps.tolist(), abs=1e-4)  # the policy's
        lengths.add((len(answer.token_ids), answer.finished))
    assert len(lengths) > 3 and differ > 2


@pytest.mark.parametrize("kind", ["other", "exchange", "adapter"])
def test_mixtures_of_nothing_and_of_all_are_plain_sampling(toy, kind):
    model, reference, of_it, within = mixtures(toy, kind)
    requests, tokenizer = requests_for(toy, n=4, k=3), toy.tokenizer()
    policy = all_of(LocalSampler(model, tokenizer, mixture=0.0, reference=reference), requests)
    assert policy == all_of(LocalSampler(model, tokenizer), requests)
    passes = []
    if kind == "other":
        model.register_forward_hook(lambda *_: passes.append(1))
    there = all_of(LocalSampler(model, tokenizer, mixture=1.0, reference=reference), requests)
    assert not passes  # the policy is not run
    with within():
        assert there == all_of(LocalSampler(of_it, tokenizer), requests)
    assert there != policy
    if kind != "other":
        assert policy == all_of(LocalSampler(model, tokenizer), requests)  # it is the policy again


def test_tokens_of_a_mixture_are_drawn_from_its_distribution(toy):
    model, other = policy_of(toy, initializer_range=0.4), policy_of(toy, seed=5, initializer_range=0.4)
    ids, n, c = (10, 11, 12), 4000, 0.5
    requests = [Request("p", k, "policy", "", ids, seed_of(k), max_tokens=1) for k in range(n)]
    answers = all_of(LocalSampler(model, toy.tokenizer(), batch_size=1000, mixture=c, reference=other), requests)
    found = torch.bincount(torch.tensor([a.token_ids[0] for a in answers.values()]), minlength=100).double()
    with torch.no_grad():
        own, theirs = (m(torch.tensor([ids])).logits[0, -1].double() for m in (model, other))
    expected = ((1 - c) * own + c * theirs).softmax(-1) * n
    often = expected >= 5
    cells = [*zip(found[often], expected[often], strict=True), (found[~often].sum(), expected[~often].sum())]
    chi = sum(float((f - e) ** 2 / e) for f, e in cells)
    assert len(cells) > 10 and chi < chi_square_999(len(cells) - 1)
    wrong = own.softmax(-1) * n  # the policy's alone would be found
    assert sum(float((f - e) ** 2 / e) for f, e in zip(found[often], wrong[often], strict=True)) > 10 * chi


def test_mixtures_that_are_none_are_refused(toy, model):
    for options, message in (
        (dict(mixture=1.5, reference=model), "mixture must be from 0"),
        (dict(mixture=True, reference=model), "mixture must be from 0"),
        (dict(mixture=0.5), "mixture=0.5 needs a reference"),
    ):
        with pytest.raises(ConfigError, match=message):
            LocalSampler(model, toy.tokenizer(), **options)
    larger = LocalSampler(model, toy.tokenizer(), mixture=0.5, reference=policy_of(toy, vocab_size=128))
    with pytest.raises(ConfigError, match="the reference has 128 tokens and the policy 100"):
        all_of(larger, requests_for(toy, n=1))
    contrasts = [replace(r, contrast_ids=(4,), contrast=0.5) for r in requests_for(toy, n=1)]
    with pytest.raises(ConfigError, match="two prompts, which a mixture cannot"):
        all_of(LocalSampler(model, toy.tokenizer(), mixture=0.5, reference=model), contrasts)
