"""The sample stage: what is there is kept, what lacks is asked, and killed and resumed it leaves the same bytes."""

import json
import os
import random
import signal
import time

import pytest

from fastpo.errors import DataError, TrainingError
from fastpo.loop.sample_stage import read_samples, sample_stage
from fastpo.sampling.items import Failure, Request, Response, seed_of
from fastpo.sampling.local_sampler import LocalSampler
from fastpo.sampling.parts import Part

PROCESS = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import Toy
import torch
torch.set_num_threads(1)
sys.path.insert(0, str(Path({tests!r}) / "loop"))
from test_sample_stage import requests_for
from fastpo.sampling.local_sampler import LocalSampler
from fastpo.sampling.parts import Part
from fastpo.loop.sample_stage import sample_stage
sampler = LocalSampler(Toy.model(), Toy.tokenizer(), batch_size=4)
sample_stage(sampler, requests_for(), Path(sys.argv[1]), bar=False)
"""


def requests_for(n=16, k=3, **settings):
    given = {"max_tokens": 40, "temperature": 0.8, **settings}
    return [
        Request(f"p{i}", j, "policy", "", tuple(range(3, 4 + i % 9)), seed_of(i, j), **given)
        for i in range(n)
        for j in range(k)
    ]


class Fake:
    """Answers as told: `plan` gives the answer to a request, and what was asked is kept."""

    key = {"engine": "fake"}

    def __init__(self, plan, exact=False):
        self.plan, self.exact, self.asked = plan, exact, []

    def batches(self, requests):
        return [list(requests)]

    def sample(self, requests):
        for request in requests:
            self.asked.append(request.unit)
            yield request, self.plan(request)

    def close(self):
        pass


def good(request):
    return Response(f"to {request.id}", (5, 0), True, -1.5, request.source)


# ---- exact samplers


@pytest.fixture(scope="module")
def unbroken(toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken") / "samples" / "part-0000.jsonl"
    counts = sample_stage(LocalSampler(toy.model(), toy.tokenizer(), batch_size=4), requests_for(), path, bar=False)
    return path.read_bytes(), counts, path.parent


def test_lines_say_what_was_sampled(toy, unbroken, tmp_path):
    content, counts, where = unbroken
    lines = [json.loads(line) for line in content.splitlines()]
    assert all(set(line) == {"id", "k", "source", "text", "token_ids", "finished", "logp", "seed"} for line in lines)
    assert counts == {
        "asked": 48, "responses": 48, "truncated": sum(not line["finished"] for line in lines), "with_token_ids": 48,
        "tokens": sum(len(line["token_ids"]) for line in lines), "failed": 0,
    }  # fmt: skip
    path = tmp_path / "part"
    path.write_bytes(content)
    found = read_samples(path)
    beside = json.loads((where / "part-0000.sampler.json").read_text())
    assert beside["key"]["engine"] == "transformers" and {"torch", "transformers"} <= set(beside["versions"])
    assert set(found) == {f"p{i}" for i in range(16)} and all(len(own) == 3 for own in found.values())
    by_unit = {(line["id"], line["k"]): line for line in lines}
    for name, own in found.items():
        for k, response in enumerate(own):
            assert list(response.token_ids) == by_unit[name, k]["token_ids"]
            assert toy.tokenizer().decode(response.token_ids, skip_special_tokens=True) == response.text


def test_wherever_the_file_was_cut_off_it_becomes_the_same(toy, unbroken, tmp_path):
    content, counts, _ = unbroken
    sampler, rng = LocalSampler(toy.model(), toy.tokenizer(), batch_size=4), random.Random(0)
    line_ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    cuts = [0, len(content), *rng.sample(line_ends, 3), *(rng.randrange(len(content)) for _ in range(3))]
    for cut in cuts:
        path = tmp_path / f"cut-{cut}"
        path.write_bytes(content[:cut])
        assert sample_stage(sampler, requests_for(), path, bar=False) == counts
        assert path.read_bytes() == content, cut


def test_killed_at_any_moment_it_becomes_the_same(preloaded, unbroken, repo_root, tmp_path):
    content, _, _ = unbroken
    code = PROCESS.format(tests=str(repo_root / "tests"))
    path, rng, killed = tmp_path / "samples.jsonl", random.Random(1), 0
    for attempt in range(5):
        before = path.stat().st_size if path.exists() else 0
        process = preloaded.start("-c", code, path)
        deadline = time.monotonic() + 60
        # Killed after it has written something new, a random while later: within a batch or in the middle of a write.
        while (path.stat().st_size if path.exists() else 0) <= before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate(60)
        killed += process.returncode == -signal.SIGKILL
        assert content.startswith(path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]), attempt
        if path.read_bytes() == content:
            break
    assert killed >= 2
    done = preloaded.run("-c", code, path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == content


def test_an_exact_sampler_is_not_asked_again_for_what_it_cannot(toy, tmp_path):
    long = Request("long", 0, "policy", "", tuple([5] * 300), 1)
    requests, sampler = [*requests_for(4, 1), long], LocalSampler(toy.model(), toy.tokenizer())
    path = tmp_path / "part"
    counts = sample_stage(sampler, requests, path, bar=False, max_failed=0.5)
    assert counts["failed"] == 1 == counts["failed: error"] and counts["responses"] == 4
    content = path.read_bytes()
    assert sample_stage(sampler, requests, path, bar=False, max_failed=0.5) == counts and path.read_bytes() == content


@pytest.mark.parametrize("torn", [b"", b'{"id": "p', b"x" * 200_000], ids=["none", "short", "long"])
def test_a_torn_line_is_cut_off_wherever_the_last_break_is(tmp_path, torn):
    path = tmp_path / "part"
    for whole in (b"", b'{"id": 1}\n{"id": 2}\n'):
        path.write_bytes(whole + torn)
        assert [line["id"] for line in Part(path).lines] == [1, 2][: whole.count(b"\n")]
        assert path.read_bytes() == whole
    path.write_bytes(b'{"id": 1}\nno JSON\n')
    with pytest.raises(DataError, match="line 2 is no JSON"):
        Part(path)


# ---- others


def test_failures_are_counted_kept_apart_and_asked_again_once(tmp_path):
    requests, path = requests_for(10, 2), tmp_path / "part"
    ill = {("p3", "policy", 1): Failure("timeout", "late"), ("p4", "policy", 0): Failure("refused", "no")}
    first = Fake(lambda r: ill.get(r.unit) or good(r))
    counts = sample_stage(first, requests, path, bar=False, max_failed=0.2)
    assert counts["responses"] == 18 and counts["failed"] == 2
    assert counts["failed: timeout"] == counts["failed: refused"] == 1
    found = read_samples(path)
    assert len(found["p3"]) == len(found["p4"]) == 1 and sum(map(len, found.values())) == 18
    second = Fake(lambda r: Failure("error", "still") if r.unit == ("p4", "policy", 0) else good(r))
    counts = sample_stage(second, requests, path, bar=False, max_failed=0.2)
    assert sorted(second.asked) == sorted(ill)
    assert counts["responses"] == 19 and counts["failed"] == 1 == counts["failed: error"]
    assert len(read_samples(path)["p3"]) == 2
    third = Fake(good)
    assert sample_stage(third, requests, path, bar=False)["failed"] == 0 and third.asked == [("p4", "policy", 0)]
    fourth = Fake(good)
    sample_stage(fourth, requests, path, bar=False)
    assert not fourth.asked


def test_too_many_failures_end_the_stage_with_three_replies(tmp_path):
    requests, path = requests_for(10, 1), tmp_path / "part"
    ill = {f"p{i}": Failure("refused" if i < 3 else "timeout", f"reply\n{i}") for i in range(4)}
    with pytest.raises(TrainingError) as error:
        sample_stage(Fake(lambda r: ill.get(r.id) or good(r)), requests, path, bar=False)
    message = str(error.value)
    assert "4 of 10 requests failed, more than max_failed=0.02: 3 refused, 1 timeout" in message
    assert message.count("reply") == 3 and "\n" not in message and str(path) in message
    assert len(path.read_text().splitlines()) == 10  # the rest was asked, and is kept


def test_a_server_that_only_fails_is_not_asked_to_the_end(tmp_path):
    sampler = Fake(lambda r: Failure("error", "503"))
    with pytest.raises(TrainingError, match="21 of 2,000 requests failed"):
        sample_stage(sampler, requests_for(1000, 2), tmp_path / "part", bar=False, max_failed=0.01)
    assert len(sampler.asked) == 21


def test_answers_to_what_is_no_longer_asked_do_not_count(tmp_path):
    path = tmp_path / "part"
    sample_stage(Fake(good), requests_for(4, 2), path, bar=False)
    counts = sample_stage(Fake(good), requests_for(2, 2), path, bar=False)
    assert counts["asked"] == counts["responses"] == 4


def test_the_order_of_responses_is_that_of_sources_and_k(tmp_path):
    path = tmp_path / "part"
    sources = ["refined-10", "greedy", "refined-2", "policy"]
    requests = [Request("p", k, source, "", (3,), k) for k in (2, 10, 0) for source in sources]
    sample_stage(Fake(lambda r: Response(f"{r.source} {r.k}", source=r.source)), requests, path, bar=False)
    own = [r.text for r in read_samples(path)["p"]]
    assert own == [f"{s} {k}" for s in ("policy", "greedy", "refined-2", "refined-10") for k in (0, 2, 10)]
    given = [r.text for r in read_samples(path, sources)["p"]]
    assert given == [f"{s} {k}" for s in sources for k in (0, 2, 10)]


def test_a_request_twice_is_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(ValueError, match="asked twice"):
        sample_stage(Fake(good), requests_for(1, 1) * 2, tmp_path / "part", bar=False)


def test_answers_that_are_all_alike_are_said(tmp_path, caplog):
    sample_stage(Fake(good), requests_for(12, 3), tmp_path / "a", bar=False)
    assert "decodes greedily" in caplog.text
    caplog.clear()
    sample_stage(Fake(good), requests_for(12, 3, temperature=0.0), tmp_path / "b", bar=False)
    sample_stage(Fake(lambda r: Response(f"{r.id} {r.k}")), requests_for(12, 3), tmp_path / "c", bar=False)
    assert "decodes greedily" not in caplog.text


def test_meta_of_a_response_is_in_its_line(tmp_path):
    path = tmp_path / "part"
    sample_stage(Fake(lambda r: Response("x", meta={"parent": r.k})), requests_for(1, 2), path, bar=False)
    assert [r.meta["parent"] for r in read_samples(path)["p0"]] == [0, 1]
