"""Tree search: PUCT and its backup against brute force, token-exact steps, pairs of siblings, resumption, a policy."""

import json
import math
import random

import pytest

import fastpo
from fastpo import quickstart
from fastpo.errors import ConfigError, TrainingError
from fastpo.loop.growth import Tree, options_of
from fastpo.loop.search import read_siblings, search
from fastpo.loop.tree import Node, backup, chain, confidence, prior, puct, select
from fastpo.sampling.items import Failure, Item, Response, Verdict, seed_of
from fastpo.sampling.local_sampler import LocalSampler
from fastpo.scoring.scoring import FunctionScorer

END = 0  # a token without text


def encode(text):
    return [ord(c) for c in text]


def decode(ids):
    return "".join(chr(i) for i in ids if i != END)


class Scripted:
    """An exact sampler that answers by rule, in batches of its own plan; it may stop after some answers."""

    exact, key = True, {}

    def __init__(self, answer, batch=3, most=None):
        self.answer, self.batch, self.most = answer, batch, most
        self.asked = []

    def batches(self, requests):
        order = sorted(requests, key=lambda r: (-len(r.prompt_ids), r.unit))
        return [order[k : k + self.batch] for k in range(0, len(order), self.batch)]

    def sample(self, requests):
        for batch in self.batches(requests):
            for request in batch:
                if self.most is not None and len(self.asked) >= self.most:
                    raise KeyboardInterrupt
                self.asked.append(request)
                yield request, self.answer(request)

    def close(self):
        pass


class Judge:
    """Scores texts by rule; `exact` as those of fastpo."""

    unit, exact, key = "response", True, {}

    def __init__(self, rule, name="judge"):
        self.rule, self.name, self.asked = rule, name, []

    def score(self, units):
        for unit in reversed(units):  # in any order
            [response] = unit.responses
            self.asked.append(response.text)
            value = self.rule(response.text)
            yield unit, Verdict.failed("unparsed", "hm") if value is None else Verdict(value)

    def close(self):
        pass


def lines(request, *, steps=3, words="abc"):
    """A policy of lines: one of three letters each, by the request's seed; after `steps` of them the answer ends."""
    done = decode(request.prompt_ids).partition(":")[2].count("\n")
    letter = random.Random(request.seed).choice(words)
    if done + 1 == steps:
        ids = (*encode(letter), END)
    else:
        ids = tuple(encode(letter + "\n"))
    text = decode(ids).partition("\n")[0]
    return Response(text, ids, True, math.log(1 / len(words)))


def wants(text):
    """Right are answers with more a than b."""
    return float(text.count("a") > text.count("b"))


def items(n=3):
    return [Item(f"p{i}", f"{i}:", tuple(encode(f"{i}:")), meta={"answer": i}) for i in range(n)]


def run(folder, sampler=None, scorer=None, asked=None, self_eval=None, max_failed=0.0, **spec):
    spec = {"iterations": 6, "first": 2, "depth": 3} | spec
    return search(
        sampler or Scripted(lines), scorer if scorer is not None or self_eval else Judge(wants), asked or items(),
        encode, decode, spec, folder, 7, max_failed, self_eval=self_eval,
    )  # fmt: skip


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


# ---- the statistics


def test_puct_and_backup_of_a_tree_made_by_hand():
    root = Node("0", visits=4)
    a = Node("0.0", (1,), prior=0.5, parent=root)
    b = Node("0.1", (2,), prior=0.2, parent=root)
    root.children = [a, b]
    for node, v in ((a, 0.25), (b, -0.5)):
        node.evaluate(v)
        node.known = True
    assert (a.q, b.q) == (0.25, -0.5)
    a.visits = 3
    assert puct(a, 2.0) == 0.25 + 2 * 0.5 * 2 / 4
    assert puct(b, 2.0) == -0.5 + 2 * 0.2 * 2 / 1
    assert select(root, 2.0) is a and select(root, 10.0) is b

    c, d = (Node(f"0.0.{k}", (3 + k,), True, parent=a) for k in range(2))
    a.children = [c, d]
    c.evaluate(1.25)  # r = 1
    d.evaluate(-0.75)  # r = -1
    c.visits, d.visits = 2, 0
    backup([root, a, c], gamma=0.5)
    assert (a.value, a.q) == (0, 0.25)  # nobody has judged what follows
    c.known = d.known = True
    backup([root, a, c], gamma=0.5)
    assert a.value == (2 * 1 + 1 * -1) / 3
    assert a.q == 0.25 + 0.5 * a.value
    assert root.value == (3 * a.q + 1 * -0.5) / 4
    d.lose()
    backup([root, a, c], gamma=0.5)
    assert a.value == 1
    assert chain(a) == ((1, 3), True)  # d is gone, so c is what must follow
    c.lose()
    assert not a.alive and root.living == [b] and root.alive


def test_prior_and_confidence():
    assert prior(-2.0, 4, 1.25, 2) == math.exp(-2.0 / 4**1.25)
    assert prior(None, 4, 1.25, 4) == 0.25
    assert confidence(3, 1) == 0.75 and confidence(1, 3) == 0.5 and confidence(5, 0) == 1


class Brute:
    """The search written another way: visits are counted from the paths, V and Q made anew from the definitions."""

    def __init__(self, value, logp, ends, options):
        self.value, self.logp, self.ends, self.o = value, logp, ends, options
        self.children, self.paths = {}, []

    def v(self, name):
        if name == "0":
            return 0.0
        p = self.value(name) / max(1, name.count(".") - 1 - 3)
        return p + (0.0 if not self.ends(name) else 1.0 if self.value(name) >= 0.5 else -1.0)

    def visits(self, name):
        return sum(name in path for path in self.paths)

    def mean(self, name):
        below = self.children.get(name, [])
        weights = [max(1, self.visits(c)) for c in below]
        return sum(w * self.q(c) for w, c in zip(weights, below)) / sum(weights) if below else 0.0

    def q(self, name):
        return self.v(name) - self.v(name.rpartition(".")[0]) + self.o["gamma"] * self.mean(name)

    def go(self, steps):
        """The walk: (node, {child: (q, visits)}) where it was left."""
        node, walk = "0", []
        while not self.ends(node) and node.count(".") < steps:
            for _ in range(self.o["iterations"] * (self.o["first"] if node == "0" else 1)):
                path = [node]
                while not self.ends(path[-1]) and path[-1].count(".") < steps and len(path) <= self.o["depth"]:
                    here = path[-1]
                    count = self.o["children"] * (2 if here == "0" else 1)
                    self.children.setdefault(here, [f"{here}.{k}" for k in range(count)])

                    # The path that is under way has been here, too.
                    def score(c, here=here):
                        p = math.exp(self.logp(c) / 2 ** self.o["length_exponent"])
                        root = math.sqrt(self.visits(here) + 1)
                        return self.q(c) + self.o["exploration"] * p * root / (1 + self.visits(c))

                    path.append(max(self.children[here], key=score))
                self.paths.append(path)
            below = self.children[node]
            walk.append((node, {c: (self.q(c), self.visits(c)) for c in below}))
            node = max(below, key=lambda c: (self.visits(c), self.q(c), self.mean(c)))
        return walk


@pytest.mark.parametrize("seed", range(4))
def test_search_equals_brute_force(tmp_path, seed):
    """On a tree of random values: PUCT, backup, where the answer goes on, and what its siblings are worth."""
    options = dict(iterations=9, first=3, depth=4, children=2, gamma=0.9, exploration=0.7, length_exponent=1.1)

    def number(kind, name):
        return random.Random(seed_of(seed, kind, name)).random()

    def ends(name):
        return name.count(".") > 2 and number("end", name) < 0.3

    def name_of(ids):  # two tokens a step: the child's number and a filler
        return ".".join(["0", *(str(i - 1) for i in ids[::2])])

    def answer(request):
        child = f"{name_of(request.prompt_ids[2:])}.{request.k}"
        return Response("", (request.k + 1, 99), ends(child), -3 * number("logp", child))

    def text_of(ids):
        return name_of(ids)

    judge = Judge(lambda name: number("value", name))
    spec = options | {"step": {"tokens": 2}, "max_steps": 7, "threshold": 0.5, "margin": 0.0}
    own = Judge(lambda name: number("value", name), "own")
    item = Item("p", "x", (98, 98))
    search(Scripted(answer), judge, [item], encode, text_of, spec, tmp_path, 0, 0.0, self_eval=own)

    brute = Brute(lambda n: number("value", n), lambda n: -3 * number("logp", n), ends, options)
    walk = [(node, stats) for node, stats in brute.go(7) if len(stats) > 1]
    found = read_siblings(tmp_path)
    assert [i.id for i in found] == [f"p/{node}" for node, _ in walk]
    assert len(walk) > 2
    for one, (_, stats) in zip(found, walk):
        assert {r.meta["node"]: r.meta["visits"] for r in one.responses} == {
            n: visits for n, (_, visits) in stats.items()
        }
        for r in one.responses:
            assert r.meta["q"] == pytest.approx(stats[r.meta["node"]][0], abs=1e-12)


# ---- steps, items and rows


def test_steps_go_on_from_the_sampled_tokens(tmp_path):
    sampler, judge = Scripted(lines), Judge(wants)
    counts = run(tmp_path, sampler, judge)
    given = {(r.id, r.source, r.k): tuple(lines(r).token_ids) for r in sampler.asked}
    for request in sampler.asked:
        ids = tuple(encode(f"{request.id[1:]}:"))
        path = request.source.split(".")
        for depth, k in enumerate(path[1:], 1):
            ids += given[request.id, ".".join(path[:depth]), int(k)]
        assert request.prompt_ids == ids
        assert request.prompt == decode(ids)
        assert request.seed == seed_of(7, request.id, request.source, request.k)
        assert (request.stop, request.max_tokens, request.temperature) == (("\n",), 128, 1.0)
    assert all(text.count("\n") == 2 for text in judge.asked)  # finished answers alone
    assert counts["prompts"] == 3 and counts["failed"] == {}
    assert counts["finished answers"] == len(judge.asked)
    assert counts["asked"] == len(sampler.asked) + len(judge.asked)
    first = [r for r in sampler.asked if r.source == "0"]
    assert len(first) == 3 * 4  # twice as many from the prompt


def test_items_and_rows(tmp_path):
    counts = run(tmp_path)
    found = {item.id: item for item in read_siblings(tmp_path)}
    rows = rows_of(tmp_path)
    assert counts["pairs"] == len(rows) > 3
    assert counts["siblings"] == len(found) >= len(rows)
    for item in found.values():
        own, node = item.id.split("/")
        assert item.prompt == decode(item.prompt_ids) and item.prompt.startswith(f"{own[1:]}:")
        assert item.meta == {"answer": int(own[1:])}
        assert item.prompt.count("\n") == node.count(".")
        assert len({tuple(r.token_ids) for r in item.responses}) == len(item.responses) > 1
        for r in item.responses:
            assert r.text == decode(r.token_ids) and r.meta["node"].startswith(node)
            assert r.finished is (r.token_ids[-1] == END)
    for row in rows:
        item = found[row["id"]]
        assert row["prompt"] == list(item.prompt_ids)
        by_ids = {tuple(r.token_ids): r.meta for r in item.responses}
        won, lost = (by_ids[tuple(row[name])] for name in ("chosen", "rejected"))
        keys = ("q", "prior", "reward", "value", "visits")
        judged = [m for m in by_ids.values() if m["judged"]]
        order = sorted(judged, key=lambda m: tuple(m[k] for k in keys))
        assert (won, lost) == (order[-1], order[0])
        assert won["q"] > lost["q"]
        assert row["win_prob"] == max(0.5, won["visits"] / (won["visits"] + lost["visits"]))
    of_tree = {}
    for row in rows:
        of_tree.setdefault(row["id"].split("/")[0], []).append(row["weight"])
    assert counts["prompts kept"] == len(of_tree)
    assert {round(sum(weights), 9) for weights in of_tree.values()} == {round(len(rows) / len(of_tree), 9)}


def test_right_steps_are_preferred(tmp_path):
    run(tmp_path, asked=items(12))
    chosen = [decode(row["chosen"]).strip() for row in rows_of(tmp_path)]
    rejected = [decode(row["rejected"]).strip() for row in rows_of(tmp_path)]
    assert sum(c < r for c, r in zip(chosen, rejected)) > 0.8 * len(chosen)  # a before c before b would be best


def test_other_pairs(tmp_path):
    run(tmp_path / "a", asked=items(8), rejected="worst")
    run(tmp_path / "b", asked=items(8), rejected="second", win_prob="values", weights="pairs", max_pairs=1)
    worst, second = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert len({row["id"].split("/")[0] for row in second}) == len(second)
    found = {
        item.id: {tuple(r.token_ids): r.meta["q"] for r in item.responses if r.meta["judged"]}
        for item in read_siblings(tmp_path / "b")
    }
    for row in second:
        qs = found[row["id"]]
        order = sorted(qs.values())
        assert qs[tuple(row["chosen"])] == order[-1] and qs[tuple(row["rejected"])] == order[-2]
        assert row["win_prob"] == pytest.approx(1 / (1 + math.exp(order[-2] - order[-1])))
        assert row["weight"] == 1.0
    assert {r["id"] for r in second} <= {r["id"] for r in worst}


def test_steps_that_must_follow_are_joined(tmp_path):
    """From the second line on the policy has one way to go on."""

    def answer(request):
        done = decode(request.prompt_ids).count("\n")
        return lines(request, words="ab" if done == 0 else "c")

    counts = run(tmp_path, Scripted(answer), first_children=6)
    assert counts["equal steps"] > 0
    for row in rows_of(tmp_path):
        assert row["id"].endswith("/0")
        assert decode(row["chosen"]) == "a\nc\nc" and row["chosen"][-1] == END
        assert decode(row["rejected"]) == "b\nc\nc"
    [item, *_] = read_siblings(tmp_path)
    assert sum(r.count for r in item.responses) == 6 and len(item.responses) == 2


def test_a_step_of_white_space_goes_on(tmp_path):
    """A policy that writes two line breaks, of which each ends a step."""

    def answer(request):
        said = decode(request.prompt_ids).partition(":")[2]
        if said.endswith("\n") and not said.endswith("\n\n"):
            return Response("", tuple(encode("\n")), True, -0.5)
        given = lines(request)
        ended = said.count("\n\n") == 2
        ids = given.token_ids[:1] + ((END,) if ended else tuple(encode("\n")))
        return Response(given.text, ids, True, given.logp)

    run(tmp_path, Scripted(answer))
    for item in read_siblings(tmp_path):
        for r in item.responses:
            assert r.text.strip() and (item.prompt.endswith(":") or r.text.startswith("\n"))
    inside = [r for item in read_siblings(tmp_path) if not item.prompt.endswith(":") for r in item.responses]
    assert inside and all(r.meta["prior"] == pytest.approx(math.exp((-0.5 - math.log(3)) / len(r.token_ids) ** 1.25))
                          for r in inside if r.finished)  # fmt: skip


def test_conversations(tmp_path):
    asked = [Item("p0", [{"role": "user", "content": "hi"}], tuple(encode("0:")))]
    sampler = Scripted(lines)
    run(tmp_path, sampler, asked=asked)
    [item, *_] = [i for i in read_siblings(tmp_path) if i.id != "p0/0"]
    assert item.prompt[0] == {"role": "user", "content": "hi"}
    assert item.prompt[1] == {"role": "assistant", "content": decode(item.prompt_ids[2:])}
    assert all(r.prompt[-1]["role"] == ("user" if r.source == "0" else "assistant") for r in sampler.asked)


def test_the_answer_is_no_longer_than_max_steps(tmp_path):
    sampler = Scripted(lambda r: lines(r, steps=50))
    own = Judge(lambda text: text.count("a") / (1 + text.count("\n")))
    run(tmp_path, sampler, self_eval=own, max_steps=4)
    assert max(r.source.count(".") for r in sampler.asked) == 3
    assert rows_of(tmp_path)


def test_how_deep_a_path_goes(tmp_path):
    """With every step valued three steps, as in the paper; where only whole answers are judged, to their end."""
    [item] = items(1)
    assert Tree(item, (1,), options_of({}), 0, decode, {"self", "answer"}).depth == 3
    assert Tree(item, (1,), options_of({"max_steps": 9}), 0, decode, {"answer"}).depth == 9
    judge = Judge(wants)
    run(tmp_path, Scripted(lambda r: lines(r, steps=6)), judge, depth=None, iterations=1, first=1, asked=items(8))
    assert judge.asked[0].count("\n") == 5  # the first path ends with an answer


# ---- values


def test_self_evaluation_is_damped_with_depth_and_may_fail(tmp_path):
    def rule(text):
        return None if text.endswith("c\n") else 0.6 if text.endswith("a\n") else 0.4

    own = Judge(rule, "own")
    run(tmp_path, Scripted(lambda r: lines(r, steps=99)), self_eval=own, max_steps=6, max_failed=1.0, depth=2)
    seen = set()
    for item in read_siblings(tmp_path):
        for r in item.responses:
            depth, text = r.meta["node"].count("."), decode(r.token_ids).partition("\n")[0]
            if text == "c":  # the value of the step before
                assert r.meta["reward"] == 0
            else:
                assert r.meta["value"] == pytest.approx((0.6 if text == "a" else 0.4) / max(1, depth - 4))
            seen.add((text, depth > 5))
    assert {("a", False), ("b", False), ("c", False)} <= seen


def test_probabilities_are_checked(tmp_path):
    with pytest.raises(TrainingError, match=r"self_eval gave 3, which is no probability.*search.sigmoid"):
        run(tmp_path / "a", self_eval=Judge(lambda text: 3.0))
    run(tmp_path / "b", self_eval=Judge(lambda text: 3.0 if "a" in text else -800.0), sigmoid=True)
    values = {round(r.meta["value"], 6) for i in read_siblings(tmp_path / "b") for r in i.responses}
    assert round(1 / (1 + math.exp(-3)), 6) in values and 0 in values


def test_failures_are_no_numbers(tmp_path):
    """A failed response is no child; an answer whose judgement failed leaves the tree; all of it is counted."""

    def answer(request):
        return Failure("timeout", "late") if request.k == 1 else lines(request)

    judge = Judge(lambda text: None if text.endswith("c") else wants(text))
    with pytest.raises(TrainingError, match=r"search: \d+ of \d+ requests failed, more than max_failed=0: .*timeout"):
        run(tmp_path / "a", Scripted(answer), judge, asked=items(12))
    judge.asked.clear()
    counts = run(tmp_path / "b", Scripted(answer), judge, asked=items(12), max_failed=0.9, children=4)
    failed = sum(text.endswith("c") for text in judge.asked)
    assert counts["failed"]["unparsed"] == failed > 0 and counts["failed"]["timeout"] > 0
    for item in read_siblings(tmp_path / "b"):
        for r in item.responses:
            assert not r.meta["node"].endswith(".1")
            assert not (r.finished and r.text.endswith("c"))


def test_a_tree_that_leads_nowhere(tmp_path):
    """Of one prompt every answer fails: it gives no pair, and the others do."""

    def answer(request):
        return Failure("error", "no") if request.id == "p1" and request.source != "0" else lines(request)

    counts = run(tmp_path, Scripted(answer), max_failed=0.9)
    assert counts["trees without siblings"] == 1
    assert {row["id"].split("/")[0] for row in rows_of(tmp_path)} == {"p0", "p2"}


def test_ties_give_no_pair(tmp_path):
    with pytest.raises(TrainingError, match=r"no pair of steps is left to train on \(.*ties: \d"):
        run(tmp_path, scorer=Judge(lambda text: 1.0))


def test_without_log_probabilities_siblings_have_the_same_prior(tmp_path):
    from dataclasses import replace

    run(tmp_path, Scripted(lambda r: replace(lines(r), logp=None)))
    priors = {r.meta["prior"] for i in read_siblings(tmp_path) for r in i.responses}
    assert priors == {0.25, 0.5}


def test_a_function_of_the_users_judges(tmp_path):
    """As fastpo makes a scorer of it, and with the prompt's columns."""
    seen = []

    def right(prompt, response, meta):
        seen.append((prompt, meta["answer"]))
        return wants(response)

    run(tmp_path / "function", scorer=FunctionScorer("right", right))
    run(tmp_path / "judge")
    assert rows_of(tmp_path / "function") == rows_of(tmp_path / "judge")
    assert {(f"{i}:", i) for i in range(3)} == set(seen)


# ---- refused


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"iteration": 3}, "no option search.iteration; did you mean 'iterations'"),
        ({"step": {"stopp": "x"}}, "no option search.step.stopp; did you mean 'stop'"),
        ({"children": 1}, "search.children must be 2 or more"),
        ({"temperature": 0.0}, "search.temperature must be above 0"),
        ({"rejected": "worse"}, "search.rejected must be worst or second, not 'worse'; did you mean 'worst'"),
        ({"win_prob": "q"}, "search.win_prob must be visits or values"),
        ({"step": {"tokens": 0}}, "search.step.tokens must be 1 or more"),
        ({"step": {"stop": [""]}}, "search.step.stop must be texts that are not empty"),
        ({"iterations": "many"}, "search.iterations must be a whole number"),
    ],
)
def test_options_are_checked(tmp_path, spec, said):
    with pytest.raises(ConfigError, match=said):
        run(tmp_path, **spec)


def test_what_cannot_be_searched(tmp_path):
    texts = Scripted(lambda r: Response("a", None, True))
    with pytest.raises(ConfigError, match="gives texts of p0 and no token ids"):
        run(tmp_path / "a", texts)
    judge = Judge(wants)
    judge.unit = "pair"
    with pytest.raises(ConfigError, match="search.scorer='judge' judges a pair"):
        run(tmp_path / "b", scorer=judge)
    with pytest.raises(ConfigError, match="search needs a scorer"):
        search(texts, None, items(), encode, decode, {}, tmp_path / "c", 0, 0.0)


# ---- interrupted


def test_the_same_bytes_after_any_interruption(tmp_path):
    names = ("tree.jsonl", "siblings.jsonl", "rows.jsonl")
    options = dict(trees=2, iterations=4)
    counts = run(tmp_path / "whole", **options)
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in names}
    data = whole["tree.jsonl"]
    rng = random.Random(0)
    for n, cut in enumerate([0, *rng.sample(range(len(data)), 12), len(data)]):  # also in the middle of a line
        folder = tmp_path / f"cut-{n}"
        folder.mkdir()
        (folder / "tree.jsonl").write_bytes(data[:cut])
        sampler = Scripted(lines)
        assert run(folder, sampler, **options) == counts
        assert {name: (folder / name).read_bytes() for name in names} == whole
        if cut == len(data):
            assert not sampler.asked


def test_the_same_bytes_of_a_model(toy, tmp_path):
    """Through the sampler in process, whose batches hold several trees."""
    model, tokenizer = toy.model().eval(), toy.tokenizer()
    prompts = [row["prompt"] for row in toy.rows(4)]

    def work(folder):
        sampler = LocalSampler(model, tokenizer, batch_size=5)
        return search(
            sampler, Judge(lambda text: len(text) % 2), [Item(f"p{i}", p) for i, p in enumerate(prompts)],
            lambda p: tokenizer(p)["input_ids"], lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            {"step": {"tokens": 2}, "max_steps": 2, "iterations": 3}, folder, 1, 0.0,
            self_eval=Judge(lambda text: len(text) % 3 / 2, "own"),
        )  # fmt: skip

    counts = work(tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    for share in (0.2, 0.55, 0.9):
        folder = tmp_path / str(share)
        folder.mkdir()
        (folder / "tree.jsonl").write_bytes(whole["tree.jsonl"][: int(share * len(whole["tree.jsonl"]))])
        assert work(folder) == counts
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_stopped_and_gone_on_with(tmp_path):
    run(tmp_path / "whole")
    whole = (tmp_path / "whole" / "tree.jsonl").read_bytes()
    for most in (1, 17, 40):
        folder = tmp_path / f"after-{most}"
        with pytest.raises(KeyboardInterrupt):
            run(folder, Scripted(lines, most=most))
        assert whole.startswith((folder / "tree.jsonl").read_bytes())
        assert not (folder / "rows.jsonl").exists()
        again = Scripted(lines)
        run(folder, again)
        assert (folder / "tree.jsonl").read_bytes() == whole
        if most > 3:
            assert len(again.asked) <= len(lines_of(whole)) - most + 6  # whole batches are asked again, no more


def lines_of(data):
    return [line for line in data.splitlines() if b'"scorer"' not in line]


def test_failures_of_what_is_not_exact_are_asked_again(tmp_path):
    class Server(Scripted):
        exact = False

    bad = Server(lambda r: Failure("timeout") if r.source == "0" and r.k == 0 and r.id == "p0" else lines(r))
    with pytest.raises(TrainingError, match="1 timeout"):
        run(tmp_path, bad)
    good = Server(lines)
    counts = run(tmp_path, good)
    assert counts["failed"] == {}
    assert [r.unit for r in good.asked if r.source == "0"] == [("p0", "0", 0)]


# ---- a policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A model that has half learnt to keep the running total: some of its digits are wrong."""
    tokenizer = quickstart.build_tokenizer()
    model = quickstart.build_model(tokenizer, seed=0)
    problems = quickstart.draw_problems(random.Random(1), 6_000)[0]
    rows = [{"prompt": quickstart.prompt_of(p), "completion": quickstart.careful_answer(p)} for p in problems]
    fastpo.train(
        model, rows, processing_class=tokenizer, output_dir=str(tmp_path_factory.mktemp("policy")), loss_type="sft",
        learning_rate=2e-3, lr_scheduler_type="constant_with_warmup", warmup_steps=20, max_steps=120,
        per_device_train_batch_size=128, use_cpu=True, gradient_checkpointing=False, disable_tqdm=True, report=False,
        save_final=False, save_strategy="no",
    )  # fmt: skip
    return model.eval(), tokenizer


class Verifier(Judge):
    """The quickstart's judge, of items whose ids are the problems; or a coin for each answer."""

    def __init__(self, coin=False):
        super().__init__(None)
        self.coin = coin

    def score(self, units):
        for unit in units:
            text = unit.responses[0].text
            right = seed_of(unit.item.id, text) % 2 if self.coin else quickstart.is_right(unit.item.id, text)
            yield unit, Verdict(float(right))


def digits_of(folder, read):
    """(visits of right digits, of wrong ones; of pairs of a right and a wrong digit, whether the right one is chosen),
    where the totals before are right."""
    visits, chosen = {True: [], False: []}, []
    texts = {item.id: item.prompt.partition(":")[2] for item in read_siblings(folder)}

    def right(name, step):
        """None behind a wrong total, and behind the totals."""
        said, careful = texts[name], quickstart.careful_answer(name.partition("/")[0])
        if len(said) >= quickstart.DIGITS - 1 or not careful.startswith(said):
            return None
        return careful.startswith(said + step[:1])

    for item in read_siblings(folder):
        for r in item.responses:
            if (mark := right(item.id, r.text)) is not None:
                visits[mark].append(r.meta["visits"])
    for row in rows_of(folder):
        marks = [right(row["id"], read(row[name])) for name in ("chosen", "rejected")]
        if marks[0] is not marks[1]:
            chosen.append(marks[0])
    return visits[True], visits[False], chosen


@pytest.mark.slow
def test_a_policy_and_its_right_digits(policy, tmp_path):
    """The quickstart's task: a step is a token, a right digit of the running total is visited more than a wrong one."""
    model, tokenizer = policy
    asked = [Item(p, quickstart.prompt_of(p)) for p in quickstart.draw_problems(random.Random(2), 100)[0]]
    spec = {"step": {"tokens": 1}, "depth": 8, "iterations": 16, "children": 3, "exploration": 3.0, "max_steps": 8}

    def read(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    shares = {}
    for name, verifier in (("verifier", Verifier()), ("coin", Verifier(coin=True))):
        folder = tmp_path / name
        sampler = LocalSampler(model, tokenizer, batch_size=256)
        counts = search(sampler, verifier, asked, lambda p: tokenizer(p)["input_ids"], read, spec, folder, 0, 0.0)
        of_right, of_wrong, chosen = digits_of(folder, read)
        shares[name] = sum(chosen) / len(chosen)
        right, wrong = (sum(v) / len(v) for v in (of_right, of_wrong))
        print(f"{name}: visits of right digits {right:.1f}, wrong {wrong:.1f}; the right one is chosen in "
              f"{sum(chosen)} of {len(chosen)} pairs; {counts}")  # fmt: skip
        if name == "verifier":
            assert right > 2 * wrong
            assert len(chosen) > 12 and shares[name] > 0.75
    assert shares["coin"] < 0.65

    # Steps that a text ends: all totals, and the verdict with the end of the answer.
    spec = {"step": {"stop": ["="]}, "depth": 3, "iterations": 8}
    sampler = LocalSampler(model, tokenizer, batch_size=256)
    search(sampler, Verifier(), asked[:30], lambda p: tokenizer(p)["input_ids"], read, spec, tmp_path / "stop", 0, 0.0)
    texts = [r.text for item in read_siblings(tmp_path / "stop") for r in item.responses if not r.finished]
    ends = [r for item in read_siblings(tmp_path / "stop") for r in item.responses if r.finished]
    assert texts and all(text.endswith("=") for text in texts)
    assert ends and all(r.token_ids[-1] == tokenizer.eos_token_id for r in ends)

    # What it writes is what a loss of soft labels reads.
    result = fastpo.train(
        model, str(tmp_path / "verifier" / "rows.jsonl"), processing_class=tokenizer, output_dir=str(tmp_path / "run"),
        loss_type="dpo_soft", max_steps=2, per_device_train_batch_size=16, learning_rate=1e-4, use_cpu=True,
        gradient_checkpointing=False, disable_tqdm=True, report=False, save_final=False, save_strategy="no",
        logging_steps=1,
    )  # fmt: skip
    assert result.state.global_step == 2
    assert math.isfinite(result.log_history[0]["loss"])
