"""AutoRule over an OpenAI-compatible server: the teacher of the three rounds and the judge of each rule, killed in each
of them."""

import hashlib
import http.server
import json
import re
import signal
import threading
import time

import pytest

pytest.importorskip("openai", reason="needs openai: pip install 'fastpo[loop]'")
pytest.importorskip("tenacity", reason="needs tenacity: pip install 'fastpo[loop]'")

import fastpo
from fastpo import cli
from fastpo.loop.answers import Answers
from fastpo.loop.config import merged
from fastpo.sampling.parts import read_lines

PAIRS = [{"id": f"q{i}", "prompt": f"Question {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6)]
RULES = ["The answer has an even number of letters.", "The answer names w1 or w2."]


def keeps(rule, answer):
    """The verifier of these rules."""
    return bool(re.search(r"w[12]\b", answer)) if "w1" in rule else sum(map(str.isalpha, answer)) % 2 == 0


class Server:
    """Answers chats alone, as a reasoning model behind a parser of its thoughts does; `asked` has a line a request."""

    def __init__(self):
        self.asked, self.wait, self.stop_at, self.held = [], 0.0, None, threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.reply(200, {"data": [{"id": "reasoner", "owned_by": "someone"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if self.path != "/v1/chat/completions":
                    return self.reply(404, {"error": {"message": "not here"}})
                self.reply(200, outer.answer(body))

            def reply(self, status, content):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # clients that were killed
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, body):
        text = body["messages"][-1]["content"]
        kind, name, said = self.of(text)
        if body.get("max_tokens", body.get("max_completion_tokens")) != 2:  # what finds out how it is asked
            self.asked.append((kind, name))
            if self.stop_at is not None and self.stop_at[0] == kind and self.of_kind(kind) > self.stop_at[1]:
                self.held.wait(30)  # the client is killed meanwhile
        message = {"role": "assistant", "content": said}
        if kind == "justify":
            message["reasoning_content"] = f"Both answers, part by part: good {name} is what was asked for."
        return {"model": "reasoner", "usage": {"prompt_tokens": 7},
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}  # fmt: skip

    def of(self, text):
        """(what is asked, of which, the reply)."""
        if "Does the answer follow the rule?" in text:
            rule, answer = (re.search(rf"<{n}>\n(.*?)\n</{n}>", text, re.DOTALL)[1] for n in ("rule", "answer"))
            return "judge", (rule, answer), "Yes" if keeps(rule, answer) else "No"
        if "Work out why" in text:
            return "justify", re.search(r"good (\d)", text)[1], "It is the better one."
        if "Write down the rules" in text:
            # Only the thoughts, which the server keeps apart from the text, say which answer it is.
            number = re.search(r"<think>Both answers.*good (\d).*</think>\nIt is the better one", text, re.DOTALL)[1]
            return "extract", number, json.dumps([RULES[int(number) % 2], f"The answer says {number}."])
        listed = re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)
        left = [rule for rule in RULES if rule in listed] or listed[:1]
        return "merge", hashlib.sha256(text.encode()).hexdigest()[:8], json.dumps(left)

    def of_kind(self, kind):
        return sum(k == kind for k, _ in self.asked)

    def close(self):
        self.held.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="module")
def start(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    toy.tokenizer().save_pretrained(folder)
    toy.model().save_pretrained(folder)
    return folder


def judge_of(server):
    return {
        "kind": "rules",
        "rules": "rules.json",
        "judge": {"base_url": server.url, "model": "judge", "concurrency": 2},
    }


@pytest.fixture
def options(toy, start, server, tmp_path):
    """The recipe, on the toy model."""

    def make(folder, **more):
        pairs = tmp_path / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
        teacher = {"engine": "openai", "base_url": server.url, "model": "reasoner", "concurrency": 2, "wait": 0.01}
        given = {
            "recipe": "autorule_grpo", "model": str(start), "output_dir": str(tmp_path / folder),
            "prompts": [{"id": str(k), "prompt": row["prompt"]} for k, row in enumerate(toy.rows(4))],
            "prepare": {"rules": {"pairs": str(pairs), "n": 6, "group": 5, "teacher": teacher}},
            "scorers": {"reward": {"kind": "verifier", "verifier": "max_words", "n": 3}, "rules": judge_of(server)},
            "train": {"num_generations": 3, "per_device_train_batch_size": 6, "max_completion_length": 5,
                      "max_steps": 3, "use_cpu": True, "bf16": False, "disable_tqdm": True, "report": False,
                      "optim": "adamw_torch", "gradient_checkpointing": False,
                      "learning_rate": 1e-3, "save_steps": 1, "logging_steps": 1,
                      "save_strategy": "steps", "log_completions": True},
        }  # fmt: skip
        return merged(given, more)

    return make


def test_the_rules_become_the_reward(options, server, tmp_path):
    fastpo.iterate(options("run"))
    run = tmp_path / "run"
    assert json.loads((run / "prepare/rules/rules.json").read_text()) == RULES
    assert {kind: server.of_kind(kind) for kind in ("justify", "extract")} == {"justify": 6, "extract": 6}
    assert server.of_kind("merge") == 3  # 8 rules: two groups, and what is left of them
    lines = [x for x in read_lines(run / "iter-001/train/metrics.jsonl") if "reward" in x]
    assert len(lines) == 3
    judged = [answer for kind, answer in server.asked if kind == "judge"]
    drawn = []
    for path in sorted((run / "iter-001/train/completions").iterdir()):
        drawn += list(read_lines(path))
    assert len(drawn) == 18 and len(judged) == 2 * 18
    for line in drawn:
        kept = sum(keeps(rule, line["completion"]) for rule in RULES) / 2
        assert line["rules"] == kept and (RULES[0], line["completion"]) in judged
    for n, line in enumerate(lines):
        own = drawn[6 * n : 6 * n + 6]
        assert line["reward"] == pytest.approx(sum(x["reward"] + x["rules"] for x in own) / 6)


def wait_for(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(("kind", "after"), [("justify", 3), ("extract", 2), ("merge", 1), ("judge", 17)])
def test_killed_in_a_round(options, server, preloaded, tmp_path, kind, after):
    """What was answered is not asked again, and rules and weights are those of a run that was not killed."""
    fastpo.iterate(options("whole"))
    whole = list(server.asked)
    server.asked.clear()
    given = options("broken")
    path = tmp_path / "options.json"
    path.write_text(json.dumps(given))
    code = "import json, sys, fastpo; fastpo.iterate(json.load(open(sys.argv[1])))"
    server.stop_at = (kind, after)
    process = preloaded.start("-c", code, path)
    wait_for(lambda: server.of_kind(kind) > after)
    if kind in ("justify", "extract", "merge"):  # what was answered before is in the file
        grown = tmp_path / "broken/prepare/rules" / f"{kind}.jsonl"
        wait_for(lambda: grown.exists() and grown.read_bytes().count(b"\n") >= after - 1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    server.stop_at = None
    server.held.set()
    fastpo.iterate(given)
    rules = [tmp_path / folder / "prepare/rules/rules.json" for folder in ("whole", "broken")]
    assert rules[0].read_bytes() == rules[1].read_bytes()
    weights = [tmp_path / folder / "iter-001/train/model.safetensors" for folder in ("whole", "broken")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for round_ in ("justify", "extract", "merge"):
        here, there = ([name for k, name in asked if k == round_] for asked in (server.asked, whole))
        assert set(here) == set(there)
        # Two were under way when it was killed, and one more may have been answered and not written.
        assert len(here) <= len(there) + (3 if round_ == kind else 0), round_
    with Answers(tmp_path / "broken/prepare/rules/justify.jsonl", name="x", max_failed=0) as answers:
        assert len(answers._known) == len(PAIRS)


def test_rules_and_their_judge_on_the_command_line(toy, start, server, tmp_path, monkeypatch):
    """fastpo train --reward-funcs rewards.yaml, with the files found from the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.json").write_text(json.dumps(RULES))
    sections = {"reward": {"kind": "verifier", "verifier": "max_words", "n": 3}, "rules": judge_of(server)}
    (tmp_path / "rewards.yaml").write_text(json.dumps(sections))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": r["prompt"]}) + "\n" for r in toy.rows(4)))
    command = ["train", "--model", str(start), "--train-dataset", "prompts.jsonl", "--loss_type", "grpo",
               "--reward_funcs", "rewards.yaml", "--reward-weights", "1.0,2.0", "--num-generations", "3",
               "--per-device-train-batch-size", "6", "--max-completion-length", "5", "--max-steps", "2", "--use-cpu",
               "--no-bf16", "--output-dir", "out", "--logging-steps", "1", "--report-to", "none"]  # fmt: skip
    assert cli.main(command) == 0
    lines = [x for x in read_lines(tmp_path / "out/metrics.jsonl") if "reward" in x]
    assert len(lines) == 2 and server.of_kind("judge") == 2 * 12
    for line in lines:
        assert line["reward"] == pytest.approx(line["rewards/reward/mean"] + 2 * line["rewards/rules/mean"])
