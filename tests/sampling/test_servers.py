"""Servers as samplers: those that do what they say, and those that do not. Nothing is invented, everything counted."""

import http.server
import json
import logging
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="needs openai: pip install 'fastpo[loop]'")
pytest.importorskip("tenacity", reason="needs tenacity: pip install 'fastpo[loop]'")

from fastpo import sequence_logps
from fastpo.errors import ConfigError, TrainingError
from fastpo.loop.sample_stage import read_samples, sample_stage
from fastpo.sampling.check_sampler import check_sampler
from fastpo.sampling.items import Failure, Refresh, Request, Response, seed_of
from fastpo.sampling.local_sampler import LocalSampler
from fastpo.sampling.server_forms import Form, sampled_tokens
from fastpo.sampling.server_process import ServerProcess
from fastpo.sampling.servers import ServerSampler

EOS = 0
OURS = {"top_k", "min_p", "repetition_penalty", "return_token_ids", "return_tokens_as_token_ids", "add_special_tokens",
        "stop_token_ids", "generation_config"}  # fmt: skip


class Server:
    """An HTTP server whose `answer(path, body)` gives JSON, (status, JSON or text, headers), or drops the connection
    with None. `bodies` are those that were asked."""

    def __init__(self, answer):
        self.answer, self.bodies, self.paths = answer, [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.reply({"data": [{"id": "served", "owned_by": "vllm"}]} if self.path == "/v1/models" else (404, {}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.bodies.append(body)
                outer.paths.append(self.path)
                self.reply(outer.answer(self.path, body))

            def reply(self, given):
                if given is None:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, content, headers = (given + ({},))[:3] if isinstance(given, tuple) else (200, given, {})
                kind = "text/html" if isinstance(content, str) else "application/json"
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                for name, value in {"content-type": kind, "content-length": len(data), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # clients that have gone
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve():
    """`serve(answer)`: a server; closed at the end."""
    running = []

    def start(answer):
        running.append(Server(answer))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def sampler_of(toy):
    """`sampler_of(server, **options)`: closed at the end."""
    made = []

    def make(*servers, **options):
        given = {"wait": 0.01, "attempts": 3, "concurrency": 4, **options}
        made.append(ServerSampler("policy", toy.tokenizer(), base_url=[s.url for s in servers], **given))
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()


def choice(text, index=0, ids=None, reason="stop", logps=None, **more):
    found = {"text": text, "index": index, "finish_reason": reason, **more}
    if ids is not None:
        found["token_ids"] = ids
    if logps is not None:
        found["logprobs"] = {"tokens": [f"token_id:{i}" for i in ids or range(len(logps))], "token_logprobs": logps}
    return found


def vllm(path, body):
    """Token ids in and out, n choices; of a probe too."""
    prompt = body["prompt"]
    choices = [choice(f"w{i} w{len(prompt)}", i, [3 + i, 3 + len(prompt), EOS], logps=[-1.0, -2.0, -0.5])
               for i in range(body["n"])]  # fmt: skip
    return {"choices": choices[::-1], "usage": {"prompt_tokens": len(prompt)}}


def plain(text="w1", **more):
    """A server of OpenAI's fields alone: others, and token ids, are a 400."""

    def answer(path, body):
        if set(body) & OURS or not isinstance(body.get("prompt", ""), str):
            return 400, {"error": {"message": "unknown field or prompt"}}
        if body["max_tokens"] == 2:  # the probe
            return {"choices": [choice("w1")]}
        return {"choices": [choice(f"{text} {i}", i, **more) for i in range(body["n"])]}

    return answer


def after_probe(answer):
    """`answer` to all requests but the probe, which goes well."""
    return lambda path, body: vllm(path, body) if body.get("max_tokens") == 2 else answer(path, body)


def requests_for(n=4, k=3, prompt="w1 w2", **settings):
    ids = tuple(range(4, 4 + len(prompt.split())))
    given = {"max_tokens": 9, **settings}
    return [Request(f"p{i}", j, "policy", prompt, ids, seed_of(i, j), **given) for i in range(n) for j in range(k)]


def all_of(sampler, requests):
    answers = [(request.unit, answer) for request, answer in sampler.sample(requests)]
    assert sorted(u for u, _ in answers) == sorted(r.unit for r in requests)  # one each
    return dict(answers)


# ---- what it can do


def test_token_ids_in_and_out(serve, sampler_of):
    server = serve(vllm)
    sampler = sampler_of(server)
    answers = all_of(sampler, requests_for(temperature=0.7, top_p=0.9, stop=("x",)))
    for (_, _, k), answer in answers.items():  # the choices came in the wrong order
        assert answer == Response(f"w{k} w2", (3 + k, 5, EOS), True, -3.5, "policy")
    assert sampler.found == {"engine": "vllm", "model": "served", "prompt": "ids", "logps": True, "tokens": "ids"}
    probe, *bodies = server.bodies
    assert len(bodies) == 4 and all(body["prompt"] == [4, 5] and body["n"] == 3 for body in bodies)
    # What is left out would be the checkpoint's or the server's own.
    sent = dict(temperature=0.7, top_p=0.9, top_k=-1, min_p=0.0, repetition_penalty=1.0, stop=["x"], max_tokens=9)
    assert all(sent.items() <= body.items() for body in bodies)
    assert {body["seed"] for body in bodies} == {seed_of(i, 0) for i in range(4)}
    assert sampler.key == {"engine": "openai", "model": "served", "tokens": "auto", "template": sampler.key["template"]}


def test_ids_of_logprobs_where_the_choice_has_none(serve, sampler_of):
    def answer(path, body):
        made = vllm(path, body)
        for own in made["choices"]:
            del own["token_ids"]
        return made

    assert all_of(sampler_of(serve(answer)), requests_for())["p0", "policy", 1].token_ids == (4, 5, EOS)

    def llama_cpp(path, body):
        content = [{"id": i, "token": "x", "logprob": -1.0} for i in (9, EOS)]
        return {"choices": [choice("w6", logprobs={"content": content})]}

    assert all_of(sampler_of(serve(llama_cpp)), requests_for(k=1))["p0", "policy", 0].token_ids == (9, EOS)


def test_a_server_without_ids_gives_texts_and_that_is_said(serve, sampler_of, caplog):
    server = serve(plain())
    sampler = sampler_of(server)
    answers = all_of(sampler, requests_for(k=2))
    assert answers["p1", "policy", 1] == Response("w1 1", None, True, None, "policy")
    assert sampler.found["tokens"] == "text" and caplog.text.count("not exact to the token") == 1
    assert all(body["prompt"] == "w1 w2" for body in server.bodies[-2:])
    with pytest.raises(ConfigError, match="takes no request that fastpo knows.*token ids"):
        all_of(sampler_of(server, tokens="ids"), requests_for())
    with pytest.raises(ConfigError, match="takes no request"):  # top_k is not among OpenAI's fields
        all_of(sampler_of(server), requests_for(top_k=5))
    with pytest.raises(ConfigError, match="sample.top_k: this server takes OpenAI's fields alone"):
        all_of(sampler, requests_for(top_k=5))


def test_ids_that_became_other_tokens_are_no_ids(serve, sampler_of):
    """A server that reads a list of ids as texts, and says so in its counts only."""

    def answer(path, body):
        made = vllm(path, body)
        if isinstance(body["prompt"], list):
            made["usage"]["prompt_tokens"] = 7
        else:
            made["usage"]["prompt_tokens"] = 2
        return made

    server = serve(answer)
    sampler = sampler_of(server)
    all_of(sampler, requests_for())
    assert sampler.found["prompt"] == "text" and sampler.found["tokens"] == "text"
    assert server.bodies[-1]["add_special_tokens"] is False


def test_another_template_is_said(serve, sampler_of, caplog):
    def chat(path, body):
        if path != "/v1/chat/completions":
            return 404, {"detail": "Not Found"}
        return {"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "w5"}}],
                "usage": {"prompt_tokens": 40}}  # fmt: skip

    turns = [{"role": "user", "content": "w1"}]
    requests = [Request("p", 0, "policy", turns, (4, 5), 1, max_tokens=9)]
    server = serve(chat)
    assert all_of(sampler_of(server), requests)["p", "policy", 0].text == "w5"
    assert server.bodies[-1]["messages"] == turns
    assert "counts 40 tokens in a prompt where the policy's tokenizer has 2" in caplog.text
    with pytest.raises(ConfigError, match="the prompts are texts"):
        all_of(sampler_of(server, tokens="chat"), requests_for())


def test_log_probabilities_are_kept_where_they_are_the_policys(serve, sampler_of, toy):
    """As vLLM those before the temperature; of a server that nobody knows at a temperature of 1 only."""
    for owner, kept in (("vllm", True), ("somebody", False)):
        server = serve(vllm)
        sampler = sampler_of(server)

        async def listed(owner=owner):
            return owner, "served"

        sampler._listed = listed
        answers = all_of(sampler, requests_for(k=1, temperature=0.7))
        assert all((a.logp == -3.5) is kept and (kept or a.logp is None) for a in answers.values())
        assert all(a.logp == -3.5 for a in all_of(sampler, requests_for(k=1)).values())


def test_samples_of_a_real_policy_pass_the_check_and_those_of_another_do_not(serve, sampler_of, toy, tmp_path):
    def serving(model):
        local = LocalSampler(model, toy.tokenizer())

        def answer(path, body):
            prompt, most = tuple(body["prompt"]), body["max_tokens"]
            asked = [Request("x", k, "policy", "", prompt, body["seed"] + k, max_tokens=most) for k in range(body["n"])]
            out = []
            for request, own in local.sample(asked):
                share = [own.logp / len(own.token_ids)] * len(own.token_ids)
                reason = "stop" if own.finished else "length"
                out.append(choice(own.text, request.k, list(own.token_ids), reason, share))
            return {"choices": out, "usage": {"prompt_tokens": len(body["prompt"])}}

        return answer

    policy, requests = toy.model(), requests_for(6, 2, max_tokens=20)
    for model, right in ((policy, True), (toy.model(seed=3, initializer_range=0.3), False)):
        path = tmp_path / f"{right}.jsonl"
        # One at a time: the model is not for two threads.
        sample_stage(sampler_of(serve(serving(model)), concurrency=1), requests, path, bar=False)
        found = read_samples(path)
        pairs = [(r, found[r.id][r.k]) for r in requests]
        if right:
            assert check_sampler(pairs, policy, toy.tokenizer())["difference"] < 1e-5
        else:
            with pytest.raises(TrainingError, match="the sampler is not the policy"):
                check_sampler(pairs, policy, toy.tokenizer())


# ---- what it does not


def test_n_that_is_ignored_is_asked_one_by_one(serve, sampler_of, caplog):
    def one(path, body):
        return {"choices": [choice(f"w{body['seed'] % 90}", 0, [3, EOS])]}

    server = serve(one)
    answers = all_of(sampler_of(server, concurrency=1), requests_for(5, 4))
    seeds = Counter(body["seed"] for body in server.bodies[1:])
    assert len(answers) == 20 and set(seeds) == {seed_of(i, j) for i in range(5) for j in range(4)}
    assert set(seeds.values()) == {1}
    for (name, _, k), answer in answers.items():  # each by its own seed: no choice stands for two
        assert answer.text == f"w{seed_of(int(name[1:]), k) % 90}"
    assert caplog.text.count("gives one choice where 4 were asked for") == 1


def test_choices_that_were_lost_are_asked_again_and_no_more_taken_than_were_asked(serve, sampler_of):
    def some(path, body):
        made = vllm(path, body)["choices"]
        return {"choices": made[:2] if body["n"] == 3 else [*made, *made]}

    server = serve(some)
    answers = all_of(sampler_of(server), requests_for())
    assert all(isinstance(a, Response) for a in answers.values()) and len(answers) == 12
    assert Counter(body["n"] for body in server.bodies[1:]) == {3: 4, 1: 4}


@pytest.mark.parametrize("choices, why", [([], "no choices"), (None, "null"), ("w1", "w1"), ([None], "None")])
def test_no_choices_at_all(serve, sampler_of, choices, why):
    answers = all_of(sampler_of(serve(after_probe(lambda *_: {"choices": choices}))), requests_for(2, 2))
    for answer in answers.values():
        assert isinstance(answer, Failure) and answer.status == "unparsed" and why in answer.raw


@pytest.mark.parametrize(
    "made, status, raw",
    [
        (choice("", reason="length"), "unparsed", "no text"),
        (choice(None, reason="length"), "unparsed", "no text"),
        (choice("w1", reason=None), "unparsed", "finish_reason None"),
        (choice("w1", reason="abort"), "unparsed", "finish_reason 'abort'"),
        (choice("w1", reason="content_filter"), "refused", "content_filter"),
        ({"index": 0, "finish_reason": "stop", "message": {"refusal": "I will not"}}, "refused", "I will not"),
        ("w1", "unparsed", "w1"),
    ],
    ids=["empty", "none", "no reason", "abort", "filter", "refusal", "text"],
)
def test_a_choice_that_is_no_response(serve, sampler_of, made, status, raw):
    answer = all_of(sampler_of(serve(after_probe(lambda *_: {"choices": [made]}))), requests_for(1, 1))
    (failure,) = answer.values()
    assert isinstance(failure, Failure) and failure.status == status and raw in failure.raw


@pytest.mark.parametrize("ids", [[EOS], None], ids=["ids", "text"])
def test_an_empty_answer_that_ended_is_a_response(serve, sampler_of, ids):
    server = serve(after_probe(lambda *_: {"choices": [choice("", ids=ids)]}))
    expected = Response("", None if ids is None else tuple(ids), True)
    assert list(all_of(sampler_of(server), requests_for(1, 1)).values()) == [expected]


def test_ids_without_the_end_are_not_what_was_sampled(serve, sampler_of, caplog):
    made = {"end": choice("w1 w2", ids=[4, 5, EOS]), "no end": choice("w1 w2", ids=[4, 5]),
            "cut": choice("w1 w2", ids=[4, 5], reason="length"),
            "cut at the end": choice("w1", ids=[4, EOS], reason="length"),
            "stop": choice("w1", ids=[4, 5], stop_reason="w2")}  # fmt: skip
    rest = iter(made.values())
    server = serve(after_probe(lambda *_: {"choices": [next(rest)]}))
    answers = all_of(sampler_of(server, concurrency=1), requests_for(5, 1, stop=("w2", "w9")))
    found = {name: answers[f"p{i}", "policy", 0] for i, name in enumerate(made)}
    assert found["end"].token_ids == (4, 5, EOS) and found["end"].finished
    # The text has a stop string in it that the server did not heed: what it says of the end is believed, the text cut.
    assert found["no end"].token_ids == (4, 5) and found["no end"].text == "w1 "
    assert found["cut"].token_ids == (4, 5) and not found["cut"].finished
    assert found["cut at the end"].finished  # transformers serve calls it length
    assert found["stop"].token_ids == (4, 5) and found["stop"].finished
    without = serve(after_probe(lambda *_: {"choices": [choice("w1 w2", ids=[4, 5])]}))
    (answer,) = all_of(sampler_of(without), requests_for(1, 1)).values()
    assert answer == Response("w1 w2", None, True) and "not that of their end" in caplog.text


def test_failures_that_pass_are_tried_again(serve, sampler_of):
    count = Counter()

    def ill(path, body):
        count[body["seed"]] += 1
        first, second = ((500, {"error": "no memory"}), (429, {"error": "slow down"}, {"retry-after": "0.3"}))
        return {1: first, 2: second}.get(count[body["seed"]]) or vllm(path, body)

    start = time.monotonic()
    answers = all_of(sampler_of(serve(after_probe(ill))), requests_for(2, 2))
    assert all(isinstance(a, Response) for a in answers.values()) and set(count.values()) == {3}
    assert 0.3 <= time.monotonic() - start < 5
    date = {"retry-after": "Fri, 13 Nov 2020 00:00:00 GMT"}  # long ago: at once
    count.clear()
    ill_once = iter([(503, {}, date)])
    server = serve(after_probe(lambda path, body: next(ill_once, None) or vllm(path, body)))
    assert all(isinstance(a, Response) for a in all_of(sampler_of(server, wait=30.0), requests_for(1, 1)).values())


@pytest.mark.parametrize(
    "given, status, raw, times",
    [
        ((500, {"error": "no memory"}), "error", "500", 3),
        ((429, "slow down"), "error", "429 slow down", 3),
        ((400, {"error": "too long"}), "refused", "400", 1),
        ((422, "no"), "refused", "422 no", 1),
        ("<html>gateway</html>", "unparsed", "no JSON object: <html>", 3),
        ([1, 2], "unparsed", "no JSON object", 3),
        (None, "error", "no connection", 3),
    ],
    ids=["500", "429", "400", "422", "html", "list", "dropped"],
)
def test_failures_that_stay(serve, sampler_of, given, status, raw, times):
    server = serve(after_probe(lambda *_: given))
    answers = all_of(sampler_of(server), requests_for(2, 2))
    assert len(answers) == 4 and len(server.bodies) == 1 + 2 * times
    assert all(isinstance(a, Failure) and a.status == status and raw in a.raw for a in answers.values()), answers


def test_a_server_that_does_not_answer_in_time(serve, sampler_of):
    release = threading.Event()
    server = serve(after_probe(lambda *_: release.wait(20) and {}))
    answers = all_of(sampler_of(server, timeout=0.3, attempts=6), requests_for(2, 1))
    release.set()
    assert {a.status for a in answers.values()} == {"timeout"} and len(server.bodies) == 1 + 2 * 2


def test_several_addresses_and_one_that_is_not_there(serve, sampler_of):
    gone = serve(vllm)
    gone.close()
    with pytest.raises(ConfigError, match="no server answers at http://127.0.0.1"):
        all_of(sampler_of(gone), requests_for())
    servers = [serve(vllm), serve(vllm)]
    answers = all_of(sampler_of(gone, *servers), requests_for(30, 2))
    assert all(isinstance(a, Response) for a in answers.values())
    assert all(len(server.bodies) >= 5 for server in servers)


def test_a_server_that_goes_ends_the_stage_and_keeps_what_came(serve, sampler_of, tmp_path):
    server, done = serve(lambda *_: None), Counter()

    def answer(path, body):
        done["n"] += 1
        return vllm(path, body) if done["n"] < 6 else None

    server.answer = answer
    path = tmp_path / "part"
    sampler = sampler_of(server, concurrency=1, attempts=1)
    with pytest.raises(TrainingError, match="no server answers any more"):
        sample_stage(sampler, requests_for(40, 2), path, bar=False, max_failed=0.9)
    assert len(read_samples(path)) == 4
    server.answer = vllm
    counts = sample_stage(sampler, requests_for(40, 2), path, bar=False)
    assert counts["responses"] == 80 and counts["failed"] == 0


def test_what_a_server_cannot_is_refused_by_name(serve, sampler_of, toy):
    mixed = [Request("p", 0, "negative", "w1", (4,), 1, contrast_ids=(5,), contrast=0.5)]
    with pytest.raises(ConfigError, match="source 'negative' mixes the logits.*engine=local"):
        all_of(sampler_of(serve(vllm)), mixed)
    with pytest.raises(ConfigError, match="refuses the api_key: 401"):
        all_of(sampler_of(serve(lambda *_: (401, "who?"))), requests_for())
    for options, message in (
        ({"base_url": "localhost:8000"}, "is no address"),
        ({"base_url": []}, "base_url is empty"),
        ({"base_url": "http://x/v1", "tokens": "yes"}, "expected one of auto, ids, text, chat"),
        ({"base_url": "http://x/v1", "concurrency": 0}, "sample.concurrency"),
    ):
        with pytest.raises(ConfigError, match=message):
            ServerSampler("policy", toy.tokenizer(), **options)


def test_without_the_packages_it_says_which_extra(monkeypatch, toy):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"needs openai: pip install 'fastpo\[loop\]'"):
        ServerSampler("policy", toy.tokenizer(), base_url="http://x/v1")


def test_leaving_in_the_middle_lets_go(serve, sampler_of):
    server = serve(after_probe(lambda path, body: time.sleep(0.05) or vllm(path, body)))
    sampler = sampler_of(server)
    answers = sampler.sample(requests_for(200, 1))
    next(answers)
    answers.close()
    time.sleep(0.3)
    asked = len(server.bodies)
    assert asked < 50
    time.sleep(0.3)
    assert len(server.bodies) == asked
    assert len(all_of(sampler, requests_for(3, 1))) == 3


def test_a_lone_surrogate_in_an_answer_is_written(serve, sampler_of, tmp_path):
    server = serve(after_probe(lambda *_: {"choices": [choice("w1 \ud83d", ids=[4, EOS])]}))
    sample_stage(sampler_of(server), requests_for(1, 1), tmp_path / "part", bar=False)
    assert read_samples(tmp_path / "part")["p0"][0].text == "w1 \ud83d"


# ---- a server that is started

SERVER = """
import http.server, json, os, sys, time
port, mode = int(sys.argv[1]), sys.argv[3]
print("loading", sys.argv[2], flush=True)
if mode == "dies":
    sys.exit("no such model")
if mode == "child":
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ok = self.path == ("/v1/models" if mode == "no health" else "/health")
        self.send_response(200 if ok else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
time.sleep(60 if mode == "slow" else 0.3)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def command(tmp_path):
    """`command(mode)`: (command, address) of a server that is a script."""
    script = tmp_path / "server.py"
    script.write_text(SERVER)

    def make(mode="well"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return f"{sys.executable} {script} {port} {{model}} '{mode}'", f"http://127.0.0.1:{port}/v1"

    return make


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_within(pid, seconds=5):
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


@pytest.mark.parametrize("mode", ["well", "no health", "child"])
def test_a_server_is_started_and_stopped_with_its_workers(command, tmp_path, mode):
    text, url = command(mode)
    server = ServerProcess(text, "a folder/policy", url, tmp_path / "logs" / "server.log", timeout=30)
    pid, log = server._process.pid, (tmp_path / "logs" / "server.log").read_text()
    assert alive(pid) and "loading a folder/policy" in log and server.died() is None
    with pytest.raises(ConfigError, match="something answers at .* already"):
        ServerProcess(text, "policy", url, tmp_path / "other.log", timeout=30)
    server.close()
    server.close()
    assert gone_within(pid)
    if mode == "child":
        assert gone_within(int(log.split("child ")[1].split()[0]))


def test_a_server_that_does_not_start_shows_its_log(command, tmp_path):
    text, url = command("dies")
    with pytest.raises(TrainingError, match="ended with exit code 1.*loading policy | no such model"):
        ServerProcess(text, "policy", url, tmp_path / "server.log", timeout=30)
    text, url = command("slow")
    with pytest.raises(TrainingError, match="within 1 seconds.*loading policy"):
        ServerProcess(text, "policy", url, tmp_path / "server.log", timeout=1)
    for wrong, message in (
        ("no-such-program x", "there is no program 'no-such-program'"),
        ("'x", "sample.command"),
        ("", "is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            ServerProcess(wrong, "policy", url, tmp_path / "server.log", timeout=1)


def test_a_server_that_dies_while_it_is_asked_ends_the_stage(serve, sampler_of, command, tmp_path):
    """The sampler's addresses are of another server here, which stops with it."""
    text, url = command()
    front = serve(vllm)
    sampler = sampler_of(front, concurrency=1)
    all_of(sampler, requests_for(1, 1))
    sampler._process = ServerProcess(text, "policy", url, tmp_path / "server.log", timeout=30)
    os.killpg(sampler._process._process.pid, signal.SIGKILL)
    sampler._process._process.wait()
    front.answer = lambda *_: None
    with pytest.raises(TrainingError, match="the server ended with exit code -9; its log .* loading policy"):
        all_of(sampler, requests_for(20, 1))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_the_server_ends_with_the_run_however_that_ends(command, tmp_path, number):
    text, url = command()
    code = (
        "import os, sys; from pathlib import Path; from fastpo.sampling.server_process import ServerProcess\n"
        "s = ServerProcess(sys.argv[1], 'policy', sys.argv[2], Path(sys.argv[3]), timeout=30)\n"
        "os.kill(os.getpid(), int(sys.argv[4]))"
    )
    log = tmp_path / "server.log"
    done = subprocess.run(
        [sys.executable, "-c", code, text, url, log, str(int(number))], capture_output=True, timeout=60
    )
    assert done.returncode == -number, done.stderr
    assert gone_within(json.loads(log.with_suffix(".pid").read_text())["pid"], 10)
    ServerProcess(text, "policy", url, log, timeout=30).close()


def test_what_is_left_of_a_killed_runs_server_is_stopped(command, tmp_path, caplog):
    text, url = command()
    left = subprocess.Popen(shlex.split(text), start_new_session=True, stdout=subprocess.DEVNULL)
    log = tmp_path / "server.log"
    started = Path(f"/proc/{left.pid}/stat").read_text().rpartition(")")[2].split()[19]
    log.with_suffix(".pid").write_text(json.dumps({"pid": left.pid, "started": started}))
    threading.Thread(target=left.wait, daemon=True).start()
    with caplog.at_level(logging.WARNING, "fastpo"):
        server = ServerProcess(text, "policy", url, log, timeout=30)
    try:
        assert gone_within(left.pid) and f"pid {left.pid}" in caplog.text and server._process.pid != left.pid
    finally:
        server.close()
    # A pid that has become another process's is left alone.
    log.with_suffix(".pid").write_text(json.dumps({"pid": os.getpid(), "started": "1"}))
    ServerProcess(text, "policy", url, log, timeout=30).close()


# ---- a real one


@pytest.fixture(scope="module")
def saved(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    model = toy.model(vocab_size=100)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return folder


def test_transformers_serve_as_a_sampler(saved, tmp_path, monkeypatch, caplog):
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("transformers serve is not installed: needs fastapi, uvicorn, pydantic, openai, python-multipart")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = f"{sys.executable} -m transformers.cli.transformers serve {{model}} --device cpu --port {port}"
    requests = requests_for(6, 4, max_tokens=12)
    sampler = ServerSampler(saved, base_url=f"http://127.0.0.1:{port}/v1", command=command, start_timeout=120,
                            log_path=tmp_path / "server.log", concurrency=3)  # fmt: skip
    try:
        counts = sample_stage(sampler, requests, tmp_path / "part", bar=False)
        greedy = all_of(sampler, requests_for(2, 2, max_tokens=12, temperature=0.0))
    finally:
        pid = sampler._process._process.pid
        sampler.close()
    assert gone_within(pid)
    assert counts["responses"] == 24 and counts["failed"] == 0 and counts["with_token_ids"] == 0
    assert sampler.found["engine"] == "transformers" and sampler.found["tokens"] == "text"
    assert "not exact to the token" in caplog.text
    texts = [r.text for own in read_samples(tmp_path / "part").values() for r in own]
    assert len(set(texts)) > 12  # it samples, which its temperature alone does not make it do
    assert "decodes greedily" not in caplog.text and "counts" not in caplog.text
    local = LocalSampler(str(saved), use_cpu=True)
    own = all_of(local, requests_for(2, 2, max_tokens=12, temperature=0.0))
    assert {u: a.text for u, a in greedy.items()} == {u: a.text for u, a in own.items()}


# ---- new weights


class Engine:
    """An imitation of vLLM or SGLang with weights: loads them from a folder, or only says so."""

    def __init__(self, toy, model, keeps_old=False):
        self.tokenizer, self.model, self.keeps_old = toy.tokenizer(), model, keeps_old
        self.told = []

    def __call__(self, path, body):
        if not path.startswith("/v1/"):
            self.told.append((path, body))
        if path == "/collective_rpc":
            self.load(body["kwargs"]["weights_path"])
            return {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, ""
        if path == "/update_weights_from_disk":
            self.load(body["model_path"])
            return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}
        local = LocalSampler(self.model, self.tokenizer)
        asked = [Request("x", k, "policy", "", tuple(body["prompt"]), body["seed"] + k, max_tokens=body["max_tokens"])
                 for k in range(body["n"])]  # fmt: skip
        choices = [choice(own.text, r.k, list(own.token_ids), "stop" if own.finished else "length",
                          list(own.token_logps)) for r, own in local.sample(asked)]  # fmt: skip
        return {"choices": choices, "usage": {"prompt_tokens": len(body["prompt"])}}

    def load(self, folder):
        from transformers import LlamaForCausalLM

        if not self.keeps_old:
            self.model = LlamaForCausalLM.from_pretrained(folder)


def listed_as(sampler, owner):
    async def listed():
        return owner, "served"

    sampler._listed = listed
    return sampler


@pytest.fixture
def folders(toy, tmp_path):
    """Two models and the folder of the second."""
    models = [toy.model(), toy.model(seed=3, initializer_range=0.3)]
    for model in models:
        model.generation_config.eos_token_id = EOS
    models[1].save_pretrained(tmp_path / "new")
    return models, tmp_path / "new"


def own_logps(model, toy, pairs):
    rows = [{"prompt": list(q.prompt_ids), "completion": list(r.token_ids)} for q, r in pairs]
    return [logps[0] for logps in sequence_logps(model, rows, processing_class=toy.tokenizer())]


@pytest.mark.parametrize(
    "owner, told",
    [
        ("vllm", ["/collective_rpc", "/reset_prefix_cache"]),
        ("sglang", ["/update_weights_from_disk"]),
        ("openai", ["/collective_rpc", "/reset_prefix_cache"]),  # one that does not say: the first that it takes
    ],
)
def test_a_server_loads_new_weights(serve, sampler_of, toy, folders, owner, told):
    (old, new), folder = folders
    engines = [Engine(toy, old), Engine(toy, old)]
    sampler = listed_as(sampler_of(*map(serve, engines), concurrency=1), owner)
    assert isinstance(sampler, Refresh) and not isinstance(LocalSampler(old, toy.tokenizer()), Refresh)
    requests = requests_for(5, 2, max_tokens=20)
    before = all_of(sampler, requests)
    pairs = [(r, before[r.unit]) for r in requests]
    assert check_sampler(pairs, own=own_logps(old, toy, pairs))["difference"] < 1e-5
    for number in (1, 2):
        assert sampler.update(folder) == f"loaded by {told[0]}"
        assert all([path for path, _ in engine.told] == told * number for engine in engines)  # every address
    after = all_of(sampler, requests)
    pairs = [(r, after[r.unit]) for r in requests]
    assert check_sampler(pairs, own=own_logps(new, toy, pairs))["difference"] < 1e-5
    assert sampler.key["weights"] == str(folder) and sampler.model == "served"


def test_a_server_that_keeps_its_old_weights_is_found(serve, sampler_of, toy, folders):
    (old, new), folder = folders
    sampler = sampler_of(serve(Engine(toy, old, keeps_old=True)), concurrency=1)
    sampler.update(folder)  # before it was asked for anything
    answers = all_of(sampler, requests_for(5, 2, max_tokens=20))
    pairs = [(r, answers[r.unit]) for r in requests_for(5, 2, max_tokens=20)]
    with pytest.raises(TrainingError, match="the sampler is not the policy: .* of 10 .*other or stale weights"):
        check_sampler(pairs, own=own_logps(new, toy, pairs))


def test_a_server_that_loads_no_weights_is_refused(serve, sampler_of, toy, folders, tmp_path):
    _, folder = folders
    without = serve(lambda path, body: vllm(path, body) if path.startswith("/v1/") else (404, {"detail": "Not Found"}))
    with pytest.raises(ConfigError, match="cannot be given new weights .*collective_rpc: 404.*VLLM_SERVER_DEV_MODE=1"):
        sampler_of(without).update(folder)
    fails = serve(lambda *_: (400, {"success": False, "message": "no such file"}))
    with pytest.raises(ConfigError, match="/update_weights_from_disk: 400.*no such file") as found:
        listed_as(sampler_of(fails), "sglang").update(folder)
    assert "\n" not in str(found.value)
    polite = serve(lambda *_: {"success": False, "message": "other shapes"})
    with pytest.raises(ConfigError, match="other shapes"):
        listed_as(sampler_of(polite), "sglang").update(folder)
    with pytest.raises(ConfigError, match="no way of loading weights that fastpo knows"):
        listed_as(sampler_of(serve(vllm)), "llama.cpp").update(folder)
    with pytest.raises(ConfigError, match="has no config.json"):
        sampler_of(without).update(tmp_path / "adapter")
    gone = serve(vllm)
    gone.close()
    with pytest.raises(TrainingError, match="no server answers"):
        listed_as(sampler_of(gone), "vllm").update(folder)


def test_a_server_of_a_command_is_started_anew(command, folders, toy, tmp_path, caplog):
    text, url = command()
    _, folder = folders
    sampler = ServerSampler("policy", toy.tokenizer(), base_url=url, command=text, log_path=tmp_path / "server.log",
                            attempts=1)  # fmt: skip
    try:
        sampler._started()
        first = sampler._process._process.pid
        for _ in range(2):
            assert sampler.update(folder) == "started anew"
        assert gone_within(first) and alive(sampler._process._process.pid)
        said = (tmp_path / "server.log").read_text()
        assert "loading policy" in said and said.count(f"loading {folder}") == 2
        assert caplog.text.count("is started anew for new weights") == 1
    finally:
        sampler.close()
    waiting = ServerSampler("policy", toy.tokenizer(), base_url=url, command=text, log_path=tmp_path / "later.log")
    assert waiting.update(folder) == "started with it"
    try:
        waiting._started()
        assert f"loading {folder}" in (tmp_path / "later.log").read_text()
    finally:
        waiting.close()


# ---- log-probabilities of tokens


def test_log_probabilities_of_tokens_as_servers_give_them(serve, sampler_of):
    triples = [[-1.0, 4, "w1"], [None, 5, "w2"], [-0.25, EOS, None]]
    chat = {"message": {"content": "w1 w2"}, "finish_reason": "stop", "index": 0,
            "meta_info": {"output_token_logprobs": triples}}  # fmt: skip
    assert sampled_tokens(chat) == ([4, 5, EOS], pytest.approx([-1.0, math.nan, -0.25], nan_ok=True))
    made = iter([choice("w1 w2", ids=[4, 5, EOS], logps=[-1.0, None, -0.25]), choice("w1 w2", ids=[4, 5, EOS]),
                 choice("w1", ids=[4, EOS], logps=[None, None])])  # fmt: skip
    sampler = sampler_of(serve(after_probe(lambda *_: {"choices": [next(made)]})), concurrency=1)
    some, none, nothing = all_of(sampler, requests_for(3, 1)).values()
    assert some.logp is None and list(some.token_logps) == pytest.approx([-1.0, math.nan, -0.25], nan_ok=True)
    assert none.logp is None and none.token_logps is None and nothing.token_logps is None
    whole = all_of(sampler_of(serve(vllm)), requests_for())["p0", "policy", 0]
    assert list(whole.token_logps) == [-1.0, -2.0, -0.5] and whole.logp == -3.5


def test_min_p_and_the_penalty_are_sent(serve, sampler_of):
    server = serve(vllm)
    all_of(sampler_of(server), requests_for(min_p=0.1, repetition_penalty=1.2))
    assert all(b["min_p"] == 0.1 and b["repetition_penalty"] == 1.2 for b in server.bodies)
    for settings in (dict(min_p=0.1), dict(repetition_penalty=1.2)):
        with pytest.raises(ConfigError, match="takes no request"):
            all_of(sampler_of(serve(plain())), requests_for(**settings))
    body = Form(dialect="transformers").body(requests_for(min_p=0.1, repetition_penalty=1.2)[0], 1, "m", "w1")
    assert {"min_p": 0.1, "repetition_penalty": 1.2}.items() <= json.loads(body["generation_config"]).items()
