"""Judges behind a server that misbehaves, and in this process: nothing that is no verdict becomes a number."""

import importlib.util
import json
import math
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fastpo.errors import ConfigError, TrainingError
from fastpo.sampling.items import Item, Response, Unit
from fastpo.scoring.scorers import make_scorer

pytest.importorskip("openai", reason="openai is not installed (extra loop)")
pytest.importorskip("tenacity", reason="tenacity is not installed (extra loop)")
pytest.importorskip("pytest_httpserver", reason="pytest-httpserver is not installed (extra test)")
from werkzeug.wrappers import Response as Http  # noqa: E402

from fastpo.loop.score_stage import read_verdicts, score_stage  # noqa: E402
from fastpo.sampling.server_process import ServerProcess  # noqa: E402
from fastpo.scoring import client as clients  # noqa: E402
from fastpo.scoring import judges  # noqa: E402


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(clients, "WAIT", 0.01)


def item(*texts, name="x", **meta):
    return Item(name, "Say it.", responses=tuple(Response(text) for text in texts), meta=meta)


def said(text, **choice):
    return {
        "model": "judge-1",
        "choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop", **choice}],
    }


class Server:
    """Replies to /chat/completions by a function of the request's text; keeps the requests."""

    def __init__(self, httpserver):
        self.http, self.bodies, self.lock = httpserver, [], threading.Lock()
        self.reply = lambda text: said("Verdict: A")
        httpserver.expect_request("/v1/chat/completions", method="POST").respond_with_handler(self._answer)
        httpserver.expect_request("/v1/models").respond_with_json({"data": [{"id": "judge", "root": "/models/one"}]})

    def _answer(self, request):
        body = request.get_json()
        with self.lock:
            self.bodies.append(body)
        reply = self.reply(body["messages"][-1]["content"])
        return reply if isinstance(reply, Http) else Http(json.dumps(reply), content_type="application/json")

    def judge(self, name="judge", **options):
        options = {"mode": "pair", "model": "judge", "attempts": 2, "both_orders": False, **options}
        if options["mode"] != "pair":
            del options["both_orders"]
        return make_scorer(name, {"kind": "judge", "base_url": self.http.url_for("/v1"), **options}, {}, Path())


@pytest.fixture
def server(httpserver):
    return Server(httpserver)


def one(judge, of=None):
    of = of or item("good", "bad")
    unit = {"pair": Unit(of, 0, 1), "response": Unit(of, 0), "list": Unit(of)}[judge.unit]
    [(_, verdict)] = judge.score([unit])
    judge.close()
    return verdict


BROKEN = {
    "500": (Http("no", 500), "error"), "429": (Http("slow down", 429), "error"), "400": (Http("what?", 400), "error"),
    "401": (Http("who?", 401), "error"), "no JSON": (Http("{", content_type="application/json"), "error"),
    "text": (Http("hello"), "error"), "null": (Http("null", content_type="application/json"), "error"),
    "list": ([], "error"), "no choices": ({"choices": None}, "error"), "no choice": ({"choices": []}, "wrong_count"),
    "two choices": ({"choices": [said("Verdict: A")["choices"][0]] * 2}, "wrong_count"),
    "a choice that is none": ({"choices": ["A"]}, "wrong_count"), "empty": (said(""), "empty"),
    "nothing": (said(None), "empty"), "no message": ({"choices": [{}]}, "empty"),
    "parts": (said([{"text": "A"}]), "error"),
    "thoughts only": (said("<think>A?</think>"), "empty"), "prose": (said("Both are nice."), "unparsed"),
    "refusal": (said("I'm sorry, but I can't judge that."), "refused"),
    "typed refusal": ({"choices": [{"message": {"content": None, "refusal": "no"}}]}, "refused"),
    "filtered": (said("Verdict: A", finish_reason="content_filter"), "refused"),
    "cut": (said("Verdict: A", finish_reason="length"), "truncated"),
    "both": (said("Verdict: A. No: verdict: B"), "unparsed"),
}  # fmt: skip


@pytest.mark.parametrize(("reply", "status"), BROKEN.values(), ids=BROKEN)
def test_nothing_becomes_a_score(server, reply, status):
    server.reply = lambda text: reply
    verdict = one(server.judge())
    assert verdict.value is None and verdict.status == status
    if isinstance(reply, Http) and reply.status_code > 200:
        assert len(server.bodies) == (2 if reply.status_code >= 429 else 1)


LISTS = {
    "prose around JSON": ("Here you are: [1, 2]", "unparsed"), "one too few": ("[1]", "wrong_count"),
    "one too many": ("[1, 2, 3]", "wrong_count"), "above the scale": ("[1, 7]", "out_of_range"),
    "texts": ('["1", "2"]', "unparsed"),
    "an order that cannot be": ('[{"answer": 1, "score": 1}, {"answer": 1, "score": 2}]', "wrong_count"),
}  # fmt: skip


@pytest.mark.parametrize(("reply", "status"), LISTS.values(), ids=LISTS)
def test_no_list_becomes_scores(server, reply, status):
    server.reply = lambda text: said(reply)
    verdict = one(server.judge(mode="list"))
    assert verdict.value is None and verdict.status == status and verdict.raw == reply


def test_lists_by_their_own_order(server):
    server.reply = lambda text: said('[{"answer": 2, "score": 1}, {"answer": 1, "score": 6}]')
    assert one(server.judge(mode="list")).value == (6, 1)
    server.reply = lambda text: said("Scores:\n[2, 3]")
    assert one(server.judge(mode="list", prose=True)).value == (2, 3)
    assert "<answer_2>\nbad\n</answer_2>" in server.bodies[-1]["messages"][0]["content"]


def test_a_server_that_does_not_answer(server, unused_tcp_port_factory=None):
    server.reply = lambda text: time.sleep(0.6) or said("Verdict: A")
    verdict = one(server.judge(timeout=0.2))
    assert verdict.value is None and verdict.status == "timeout"
    gone = make_scorer("j", {"kind": "judge", "base_url": "http://127.0.0.1:9/v1", "model": "m", "attempts": 2,
                             "both_orders": False}, {}, Path())  # fmt: skip
    verdict = one(gone)
    assert verdict.value is None and verdict.status == "error" and "Connection" in verdict.raw


def test_what_fails_once_is_asked_again(server):
    replies = iter([Http("no", 500), Http("wait", 429, headers={"retry-after": "0"}), said("Verdict: B")])
    server.reply = lambda text: next(replies)
    assert one(server.judge(attempts=3)).value == 0.0
    # A reply that cannot be read is asked for again where the next may be another one.
    replies = iter([said("Hm."), said("Verdict: B"), said("Hm.")])
    assert one(server.judge(temperature=0.5, seed=7)).value == 0.0
    assert [body["seed"] for body in server.bodies[-2:]] == [7, 8]
    assert one(server.judge()).value is None


def test_modes_and_what_the_judge_sees(server):
    server.reply = lambda text: said("Score: 7")
    verdict = one(server.judge(mode="response", criterion="brevity"), item("good", reference_text="the right one"))
    assert verdict.value == 7.0 and verdict.raw == "Score: 7"
    shown = server.bodies[-1]["messages"][0]["content"]
    assert all(words in shown for words in ("Say it.", "good", "brevity", "the right one", "from 1 (useless) to 10"))
    # What stands in a response is not a field of the template.
    one(server.judge(mode="response"), item("{prompt} {low} {nothing}"))
    assert "{prompt} {low} {nothing}" in server.bodies[-1]["messages"][0]["content"]
    reference = server.judge(mode="reference_text", system="You are strict.")
    assert one(reference, item("good", reference_text="the right one")).value == 7.0
    assert server.bodies[-1]["messages"][0] == {"role": "system", "content": "You are strict."}
    asked = len(server.bodies)
    verdict = one(server.judge(mode="reference_text"), item("good"))
    assert verdict.value is None and verdict.status == "no_reference" and len(server.bodies) == asked


def test_rules_by_a_judge(server):
    server.reply = lambda text: said("Yes" if "short" in text else "No" if "kind" in text else "Perhaps")
    spec = {"kind": "rules", "rules": ["Be short.", "Be kind."],
            "judge": {"base_url": server.http.url_for("/v1"), "model": "judge"}}  # fmt: skip
    rules = make_scorer("rules", spec, {}, Path())
    assert one(rules).value == 0.5
    verdict = one(make_scorer("rules", {**spec, "rules": ["Be short.", "Be polite."]}, {}, Path()))
    assert verdict.value is None and verdict.status == "unparsed" and verdict.raw.startswith("Be polite.")


# ---- probabilities


def top(**tokens):
    return said(
        "A", logprobs={"content": [{"top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in tokens.items()]}]}
    )


def test_probabilities_of_labels(server):
    server.reply = lambda text: top(**{"A": 0.5, " A": 0.1, "\u0120B": 0.2, "C": 0.1})
    verdict = one(server.judge(by="logprobs"))
    assert verdict.value == pytest.approx(0.75) and verdict.raw == "A=0.75 B=0.25"
    assert server.bodies[-1]["max_tokens"] == 1 and server.bodies[-1]["logprobs"] is True
    server.reply = lambda text: top(**{"3": 0.5, "5": 0.5})
    assert one(server.judge(mode="response", by="logprobs")).value == pytest.approx(4.0)
    for reply, status in (
        (said("A"), "no_logprobs"), (said("A", logprobs=None), "no_logprobs"), (top(A=0.1, B=0.1, C=0.7), "unparsed"),
        (said("A", logprobs={"content": []}), "no_logprobs"), (said("A", logprobs={"content": [{}]}), "no_logprobs"),
        (said("A", logprobs={"content": [{"top_logprobs": [{"token": "A", "logprob": float("nan")}]}]}), "unparsed"),
        (said("A", logprobs={"content": [{"top_logprobs": [{"token": "A", "logprob": 3.0}]}]}), "unparsed"),
    ):  # fmt: skip
        server.reply = lambda text, reply=reply: reply
        verdict = one(server.judge(by="logprobs"))
        assert verdict.value is None and verdict.status == status
    with pytest.raises(ConfigError, match=r"in \[0, 9\]"):
        server.judge(mode="response", by="logprobs", scale=[1, 10])
    with pytest.raises(ConfigError, match="answers by text"):
        server.judge(mode="list", by="logprobs")


def test_typed_decisions(server):
    answers = []
    server.http.expect_request("/v1/systemone", method="POST").respond_with_handler(
        lambda request: (
            server.bodies.append(request.get_json()) or Http(json.dumps(answers[-1]), content_type="application/json")
        )
    )

    def ask(answer, **options):
        answers.append({"answers": {"verdict": answer}})
        return one(server.judge(by="systemone", **options))

    # By name, whatever their order.
    assert ask({"type": "choice", "choice": "A", "probabilities": {"B": 0.2, "A": 0.8}}).value == 0.8
    asked = server.bodies[-1]
    assert asked["questions"] == {"verdict": {"type": "choice", "criteria": {"A": None, "B": None}}}
    assert "<answer_A>\ngood\n</answer_A>" in asked["state"]
    assert ask({"probabilities": {"0": 0.5, "2": 0.5, "1": 0.0}}, mode="response", scale=[1, 3]).value == 2.0
    for answer in (
        {"probabilities": {"A": 0.8}}, {"probabilities": {"A": 0.8, "B": 0.8}}, {"probabilities": {"A": 2, "B": -1}},
        {"probabilities": {"A": 0.8, "C": 0.2}}, {"probabilities": {"A": "x", "B": 0}}, {"choice": "A"}, None, [],
        {"probabilities": {"A": float("nan"), "B": 0.0}},
    ):  # fmt: skip
        verdict = ask(answer)
        assert verdict.value is None and verdict.status == "unparsed"
    assert ask({"probabilities": {"1": 0.5, "2": 0.5}}, mode="response", scale=[1, 2]).status == "unparsed"


# ---- who the judge is


def test_the_key_names_what_decides(server):
    base = server.judge(temperature=0.5).key
    for options in ({"temperature": 0.6}, {"model": "other"}, {"template": "pair_graded"}, {"criterion": "x"},
                    {"system": "x"}, {"max_tokens": 5}, {"both_orders": True}, {"seed": 1}):  # fmt: skip
        assert server.judge(**{"temperature": 0.5, **options}).key != base, options
    assert server.judge(temperature=0.5).key == base and "Verdict: A" in base["template"]
    assert server.judge().identity["judge"]["server"] == {"id": "judge", "root": "/models/one"}
    only = make_scorer("j", {"kind": "judge", "base_url": server.http.url_for("/v1"), "both_orders": False}, {}, Path())
    assert one(only).value == 1.0 and server.bodies[-1]["model"] == "judge"


def test_a_model_that_is_not_named_must_be_the_only_one(server):
    server.http.clear()
    server.http.expect_request("/v1/models").respond_with_json({"data": [{"id": "a"}, {"id": "b"}]})
    with pytest.raises(ConfigError, match="lists 'a', 'b': set `model`"):
        one(server.judge(model=None))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"template": "pare"}, "did you mean 'pair'"), ({"template": "{prompt} {a}"}, r"no \{b\}"),
        ({"template": "{prompt} {a} {b} {refrence}"}, "did you mean 'reference'"), ({"scale": [3, 3]}, "scale"),
        ({"template": "{prompt} {a} {b}", "criterion": "x"}, "no {criterion}"), ({"scale": 3}, "scale"),
        ({"template": "{prompt} {a} {b} {criterion}"}, "no criterion is given"),
        ({"mode": "list", "both_orders": True}, "both"), ({"concurrency": 0}, "above 0"),
        ({"api_key_env": "FASTPO_NO_SUCH_KEY"}, "not set"), ({"by": "words"}, "none of text"),
        ({"temperature": -1}, ">= 0"), ({"base_url": "localhost:80"}, "base_url"),
    ],
)  # fmt: skip
def test_judges_that_are_refused(server, options, words):
    with pytest.raises(ConfigError, match=words):
        make_scorer("j", {"kind": "judge", "base_url": server.http.url_for("/v1"), "model": "m", **options}, {}, Path())


def test_a_template_of_a_file(server, tmp_path):
    (tmp_path / "mine.txt").write_text("{prompt}|{a}|{b}")
    spec = {"kind": "judge", "base_url": server.http.url_for("/v1"), "model": "m", "both_orders": False}
    judge = make_scorer("j", {**spec, "template": "mine.txt"}, {}, tmp_path)
    one(judge)
    assert server.bodies[-1]["messages"][0]["content"] == "Say it.|good|bad"


# ---- through the score stage


def test_counts_of_a_judge_that_fails_now_and_then(server, tmp_path):
    def reply(text):
        if "r1" in text.split("answer_A")[1] and "r2" in text.split("answer_B")[1]:
            return said("Both.")
        if "r0" in text.split("answer_B")[1]:
            return Http("no", 500)
        return said("Verdict: A")

    server.reply = reply
    items = [item("r0", "r1", "r2", name=f"i{n}") for n in range(4)]
    judge = server.judge(both_orders=True)
    counts = score_stage(judge, items, tmp_path, cache=False, max_failed=0.5)
    assert counts == {
        "units": 24, "ok": 12, "failed": 12, "statuses": {"error": 8, "unparsed": 4}, "asked": 24, "from_cache": 0,
        "orders": {"pairs": 0, "agree": None, "by_position": None, "first": None, "gap": None},
    }  # fmt: skip
    with pytest.raises(TrainingError, match=r"failed on 1\d? of 24 units.* error.*'500 no'") as error:
        score_stage(judge, items, tmp_path / "strict", cache=False, max_failed=0.4)
    assert "\n" not in str(error.value)
    judge.close()


def test_an_interrupted_stage_leaves_no_request_behind(server, tmp_path):
    """An exception among the verdicts ends the stage; what is in flight is cancelled, and the client still works."""
    server.reply = lambda text: Http("no", 400)
    judge = server.judge(concurrency=2)
    items = [item("a", "b", name=f"i{n}") for n in range(50)]
    with pytest.raises(TrainingError):
        score_stage(judge, items, tmp_path, cache=False, max_failed=0.0)
    assert len(server.bodies) < 20
    server.reply = lambda text: said("Verdict: A")
    assert one(judge).value == 1.0
    assert one(judge).value == 1.0  # after close


# ---- in this process


@pytest.fixture
def saved(toy, tmp_path):
    def save(name="judge", seed=0, words=None, template=None):
        model, tokenizer = toy.model(seed=seed), toy.tokenizer()
        tokenizer.chat_template = template
        for label in words or ("A", "B", "Yes", "No"):
            tokenizer.add_tokens([label])
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def test_a_model_in_this_process(saved):
    path = saved()
    spec = {"kind": "judge", "path": path, "template": "{prompt} {a} {b}", "both_orders": False}
    judge = make_scorer("j", spec, {}, Path())
    of = Item("x", "w1 w2", responses=(Response("w3 w4"), Response("w5")))
    units = [Unit(of, 0, 1), Unit(of, 1, 0)]
    found = [v.value for _, v in judge.score(units)]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    labels = tokenizer.convert_tokens_to_ids(["A", "B"])
    for text, p in zip(("w1 w2 w3 w4 w5", "w1 w2 w5 w3 w4"), found, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1, labels]
        assert p == pytest.approx(logits.double().softmax(-1)[0].item(), abs=1e-5)
    assert judge.exact and found[0] != found[1]
    rules = make_scorer("r", {"kind": "rules", "rules": ["w7"], "judge": {"path": path}}, {}, Path())
    [(_, verdict)] = rules.score([Unit(of, 0)])
    assert 0 < verdict.value < 1


def test_labels_must_be_tokens_of_it(saved):
    spec = {"kind": "judge", "path": saved(words=["x"]), "both_orders": False}
    with pytest.raises(ConfigError, match="'A' is no single token"):
        one(make_scorer("j", spec, {}, Path()))


def test_transformers_serve_as_a_judge(saved, tmp_path):
    """Typed decisions of a real server on loopback are those of the model itself, asked by its prompt."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("transformers serve is not installed: needs fastapi, uvicorn, pydantic, openai")
    if importlib.util.find_spec("transformers.cli.serving.systemone") is None:
        pytest.skip("this transformers serves no typed decisions")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = saved("served", template=template)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    command = f"{sys.executable} -m transformers.cli.transformers serve {{model}} --device cpu --port {url[17:-3]}"
    server = ServerProcess(command, path, url, tmp_path / "server.log", timeout=120)
    try:
        spec = {"kind": "judge", "base_url": url, "model": path, "by": "systemone", "template": "{prompt} {a} {b}"}
        judge = make_scorer("served", spec, {}, Path())
        of = [Item(f"x{n}", f"w1 w{n}", responses=(Response("w3 w4"), Response("w5"))) for n in range(4)]
        counts = score_stage(judge, of, tmp_path, cache=False)
        rules = make_scorer("rules", {"kind": "rules", "rules": ["w7"], "judge": {"base_url": url, "model": path,
                                      "by": "systemone", "template": "{rule} {response}"}}, {}, Path())  # fmt: skip
        [(_, kept)] = rules.score([Unit(of[0], 0)])
        # What the server ignores is no verdict: it gives no log-probabilities.
        [(_, none)] = make_scorer("n", {**spec, "by": "logprobs", "both_orders": False}, {}, Path()).score(
            [Unit(of[0], 0, 1)]
        )
    finally:
        server.close()
    assert counts["ok"] == counts["asked"] == 8 and counts["orders"]["pairs"] == 4
    assert none.value is None and none.status == "no_logprobs" and 0 < kept.value < 1
    from transformers import pipeline

    pipe = pipeline("decision", model=path, device="cpu")
    for item in of:
        said = read_verdicts(tmp_path, "served")[item.id]
        for (i, j), p in said.items():
            state = f"{item.prompt} {item.responses[i].text} {item.responses[j].text}"
            asked = {"state": state, "questions": {"verdict": {"type": "choice", "criteria": {"A": None, "B": None}}}}
            assert p == pytest.approx(pipe(asked)["verdict"]["probabilities"]["A"], abs=1e-5)


@pytest.mark.parametrize("template", judges.TEMPLATES)
def test_templates_of_the_package_fit_their_modes(server, template):
    """Each names what its mode must show, and nothing is left of its fields."""
    mode = {"pair": "pair", "score": "response", "dno": "list", "rule": "rule"}.get(template.split("_")[0], template)
    judge = server.judge(mode=mode, template=template, **({} if mode == "rule" else {"criterion": "brevity"}))
    of = item("good", "bad", reference_text="the right one")
    if mode == "rule":
        list(judge.ask_rules([(Unit(of, 0), "Be short.")]))
    else:
        one(judge, of)
    shown = server.bodies[-1]["messages"][0]["content"]
    assert (
        "Say it." in shown and "good" in shown and "{" not in shown and ("the right one" in shown) == (mode != "rule")
    )
