"""Prompts, answers, judges and rows that the tests of `fastpo evaluate` share."""

import json
import random

from fastpo.sampling.items import Verdict

COUNT = 40


def longer(prompt, first, second, meta):
    """0.9 for the longer one."""
    return 0.5 + 0.4 * ((len(first) > len(second)) - (len(first) < len(second)))


def size(prompt, response, meta):
    return float(len(response))


class Judged:
    """A judge of pairs by a function of what is shown, which counts its calls and can end at one of them."""

    name, unit, exact, cached = "judge", "pair", False, False

    def __init__(self, p=longer, stop=None, name="judge", cached=False):
        self.p, self.stop, self.name, self.calls, self.cached = p, stop, name, 0, cached
        self.key = {"judge": name}
        self.identity = self.key

    def content(self, unit):
        return f"{unit.item.prompt} {' '.join(r.text for r in unit.responses)}"

    def score(self, units):
        for unit in units:
            self.calls += 1
            if self.calls == self.stop:
                raise KeyboardInterrupt
            value = self.p(unit.item.prompt, *(r.text for r in unit.responses), unit.item.meta)
            yield unit, value if isinstance(value, Verdict) else Verdict(value)

    def close(self):
        pass


def texts(letter, seed, least=1):
    draw = random.Random(seed)
    return [letter * draw.randint(least, 40) for _ in range(COUNT)]


PROMPTS = [{"id": f"p{k}", "prompt": f"question {k}"} for k in range(COUNT)]
MINE = [{"id": f"p{k}", "text": text} for k, text in enumerate(texts("a", 1))]
THEIRS = [{"id": f"p{k}", "text": text} for k, text in enumerate(texts("b", 2))]


def preferences(mine=MINE, theirs=THEIRS):
    return [longer("", a["text"], b["text"], {}) for a, b in zip(mine, theirs)]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


TASKS = [
    {"id": f"w{k}", "conversation_input": [{"role": "user", "content": f"Task {k}"}], "checklist": [f"is it {k}?"],
     "primary_tag": tag, "secondary_tags": []}
    for k, tag in enumerate(["Math", "Planning", "Coding & Debugging", "Editing", "Information seeking"] * 4)
]  # fmt: skip


def answers_to(rows, seed):
    draw = random.Random(seed)
    return {row["id"]: "x" * draw.randint(1, 60) if k else "" for k, row in enumerate(rows)}  # the first is empty


def quarters(prompt, first, second, meta):
    assert meta["checklist"]
    return min(1.0, max(0.0, 0.5 + (len(first) - len(second)) // 10 / 4))


BENCH = [
    {"id": k, "subset": subset, "prompt": f"q{k}", "chosen": "y" * (3 + k % 5), "rejected": "n" * (3 + k % 3)}
    for k, subset in enumerate(["hep-python", "math-prm", "alpacaeval-easy"] * 6)
]  # fmt: skip
