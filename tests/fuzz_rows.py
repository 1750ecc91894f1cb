"""Random rows, good and bad ones, through `prepare_examples`: no raw exception, and no row lost unreported.

    python tests/fuzz_rows.py [--count 10000] [--seed 0]

Half of them go one by one with invalid="raise": an example or a DataError of one line. The others go in small sets with
invalid="drop": each row is kept or counted under a reason, unless the set as a whole is refused.
tests/data/test_content.py runs a sample.
"""

import argparse
import json
import logging
import math
import random
import sys
from collections import Counter
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastpo.data import prepare_examples
from fastpo.errors import DataError

CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m['role'] }}]{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["a", "sky", " blue", "\n", "é", "空", "</s>", "<|im_end|>", "<think>x</think>", "", " ", "None", "{'a': 1}",
         "\x00"]  # fmt: skip


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    out = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>",
                                  additional_special_tokens=["<|im_start|>", "<|im_end|>"])  # fmt: skip
    out.chat_template = template
    return out


class Maker:
    """Random values, most of them as they should be."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def odd(self, share: float = 0.05) -> bool:
        return self.rng.random() < share

    def junk(self) -> Any:
        return self.rng.choice([None, 0, -1, 3.5, math.nan, True, [], {}, "", "x", ["x"], [None], {"role": "user"},
                                [[]], [{"role": None}], [{"content": "x"}], b"x", 10**400, (1, 2), {1: 2}])  # fmt: skip

    def text(self) -> Any:
        if self.odd(0.005):
            return self.junk()
        return "".join(self.rng.choices(WORDS, k=self.rng.randint(1, 5))) + "\ud800" * self.odd(0.003)

    def content(self) -> Any:
        kind = self.rng.random()
        if kind < 0.9:
            return self.text()
        if kind < 0.98:
            return [{"type": "text", "text": self.text()} for _ in range(self.rng.randint(0, 3))]
        return self.rng.choice([None, [{"type": "image"}], [{"type": "text"}], ["x"], {"text": "x"}, 5, [None]])

    def turn(self, role: str) -> Any:
        if self.odd(0.005):
            return self.junk()
        turn: dict = {"role": role if not self.odd(0.01) else self.rng.choice(["system", "bot", "", None, 7])}
        if not self.odd(0.01):
            turn["content"] = self.content()
        if role == "assistant" and self.odd(0.1):
            turn["tool_calls"] = self.rng.choice([
                [{"function": {"name": "f", "arguments": {"x": 1, "y": None}}}],
                [{"type": "function", "function": {"name": "f", "arguments": '{"x": "a"}'}}],
                [{"function": {"name": "f", "arguments": "no json"}}], [{"name": "f", "arguments": {}}], [None], {},
                "x", [{"function": None}], [{"function": {"name": None, "arguments": [1]}}],
            ])  # fmt: skip
        if self.odd(0.08):
            key = self.rng.choice(["reasoning_content", "name", "thinking", "mood", "tool_call_id", "weight"])
            turn[key] = self.text()
        return turn

    def turns(self, last: str, most: int = 4) -> Any:
        if self.odd(0.005):
            return self.junk()
        roles = ["user", "assistant"] * most
        first = (1 if last == "assistant" else 0) if most == 1 else 0
        n = self.rng.randint(1, most)
        chosen = roles[first : first + n]
        if chosen[-1] != last and not self.odd(0.1):
            chosen.append(last)
        out = [self.turn(role) for role in chosen]
        if last == "user" and self.odd(0.3):
            out.insert(0, self.turn("system"))
        if self.odd(0.1):
            out.insert(self.rng.randint(0, len(out)), self.turn("tool"))
        return out

    def response(self) -> Any:
        if self.odd(0.005):
            return self.junk()
        out = [self.turn("assistant")]
        if self.odd(0.15):
            out += [self.turn(self.rng.choice(["user", "tool"])), self.turn("assistant")]
        return out

    def row(self, chat: bool, kind: str) -> dict:
        prompt, answer = (lambda: self.turns("user")) if chat else self.text, self.response if chat else self.text
        row = {"prompt": prompt()}
        if kind == "preference":
            row |= {"chosen": answer(), "rejected": answer()}
            if self.odd(0.1):
                shared = row.pop("prompt")
                for name in ("chosen", "rejected"):
                    with_prompt = isinstance(shared, type(row[name])) and isinstance(shared, str | list)
                    row[name] = shared + row[name] if with_prompt else row[name]
            elif chat and self.odd(0.1) and all(isinstance(value, list) for value in row.values()):
                row |= {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
            elif chat and self.odd(0.05) and isinstance(row["prompt"], list):
                row["prompt"] = [*row["prompt"], self.turn("assistant")]
        elif kind == "responses":
            row["responses"] = [
                {**({"messages": self.response()} if chat and self.odd(0.3) else {"text": self.text()}),
                 "score": self.rng.choice([0.1, 1, 2, self.junk() if self.odd(0.05) else 3])}
                for _ in range(self.rng.randint(1, 4))
            ]  # fmt: skip
        else:
            row |= {"completion": answer(), "label": self.rng.choice([True, False, 1, self.junk()])}
        for name in ("weight", "win_prob", "chosen_score", "ref_chosen_logps", "tools", "chat_template_kwargs", "meta"):
            if self.odd(0.01):
                row[name] = self.rng.choice([0.5, self.junk(), '[{"name": "f"}]', [{"function": {"name": "f"}}]])
        if self.odd(0.002):
            row.pop(self.rng.choice(list(row)))
        return row


def fuzz(count: int, seed: int, log: Counter | None = None) -> list[str]:
    """What went wrong in `count` rows, one line each."""
    rng = random.Random(seed)
    maker = Maker(rng)
    tokenizers = [tokenizer(template) for template in (CHATML, STRICT, GENERATION)]
    wrong: list[str] = []
    log = Counter() if log is None else log
    done = 0
    while done < count:
        chat, kind = (
            rng.random() < 0.7,
            rng.choice(["preference", "preference", "unpaired", "sft", "responses", "apart"]),
        )
        mode = rng.choice(["raise", "drop"])
        shape = "preference" if kind == "apart" else kind
        rows = [maker.row(chat, shape) for _ in range(1 if mode == "raise" else rng.randint(1, 6))]
        done += len(rows)
        options = {"max_length": rng.choice([None, 2, 16, 64]), "invalid": mode,
                   "truncation_mode": rng.choice(["keep_start", "keep_end"]),
                   "kind": {"responses": "preference", "apart": "unpaired"}.get(kind, kind),
                   "assistant_only": rng.random() < 0.8}  # fmt: skip
        shown = f"{options} {rows!r}"[:600]
        try:
            examples, report = prepare_examples(rows, rng.choice(tokenizers), **options)
        except DataError as error:
            log["refused"] += len(rows)
            if "\n" in str(error):
                wrong.append(f"an error of several lines: {error!r} for {shown}")
            continue
        except Exception as error:  # the very thing that must not be
            wrong.append(f"{type(error).__name__}: {error} for {shown}")
            continue
        expected = len(rows) * (1 + (kind == "apart"))
        log["kept"] += report.kept
        log.update(report.dropped)
        if report.kept + sum(report.dropped.values()) != expected or report.rows != expected:
            wrong.append(f"kept {report.kept}, dropped {report.dropped} of {expected} for {shown}")
        for example in examples:
            if not len(example.prompt_ids) or not all(map(len, example.responses)):
                wrong.append(f"an empty sequence for {shown}")
            weights = example.token_weights
            if weights is not None and not all(
                len(w) == len(r) for w, r in zip(weights, example.responses, strict=True)
            ):
                wrong.append(f"token weights of another length for {shown}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    log: Counter = Counter()
    wrong = fuzz(args.count, args.seed, log)
    for line in wrong[:20]:
        print(line)
    print(json.dumps(dict(log.most_common()), indent=1))
    print(f"{args.count} rows, seed {args.seed}: {len(wrong)} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
