"""Rows to token ids under many chat templates: fastpo against TRL's own tokenisation, cell by cell.

    .venv-bench/bin/python bench/data_vs_trl.py [--templates FOLDER ...] [--json FILE] [--markdown FILE]

Needs the `bench` extra (TRL). Templates are read from FOLDER/*.jinja beside those that TRL brings; none is kept here.
Each cell is one row of data under one template, through `DPOTrainer._prepare_dataset` and through
`fastpo.data.prepare_examples`. Equal means the same prompt and the same responses. A difference counts as explained
only where a rule of ours says so and the same rule, applied to the row, makes TRL's ids equal to ours. Exit code 1 if
a cell is unexplained.
"""

import argparse
import contextlib
import copy
import json
import logging
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

try:
    import trl
except ImportError:
    raise SystemExit("trl is not installed: pip install -e '.[bench]'") from None
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastpo.data import prepare_examples
from fastpo.data.arrow import without_nulls
from fastpo.errors import DataError

# Written in templates as tokens: the usual ways.
SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?s>|<(?:start|end)_of_turn>|\[/?(?:INST|TOOL_[A-Z]+|AVAILABLE_TOOLS)\]"
)
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
    "<turn|>",
)


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Bytes, with the template's special tokens, and the one that usually ends a turn as EOS."""
    found = sorted(set(SPECIAL.findall(template)))
    eos = next((end for end in ENDS if end in found), "</s>")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, "ĊĊ"])}, [("Ċ", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=eos, additional_special_tokens=[t for t in found if t != eos]
    )
    out.chat_template = template
    return out


# ---- shapes


def user(text: Any) -> dict:
    return {"role": "user", "content": text}


def bot(text: Any = "", **more: Any) -> dict:
    return {"role": "assistant", "content": text, **more}


def system(text: Any) -> dict:
    return {"role": "system", "content": text}


def part(*texts: str) -> list:
    return [{"type": "text", "text": text} for text in texts]


def call(name: str, arguments: Any, **more: Any) -> dict:
    calls = [{"type": "function", "id": "abcdefghi", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "tool_calls": calls, **more}


ASK, YES, NO = user("What colour is the sky?"), bot("Blue, I think."), bot("Green, surely.")
PAIR = {"chosen": [YES], "rejected": [NO]}
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup", "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "a word"}},
                       "required": ["word"]},
    },
}  # fmt: skip
ANSWER = {"role": "tool", "name": "lookup", "tool_call_id": "abcdefghi", "content": "a shade between green and violet"}
LOOKUP, OTHER = {"word": "blue"}, {"word": "green", "times": 2}


def shapes(tok: PreTrainedTokenizerFast, end: str) -> dict[str, dict]:
    """Rows by name. `end` is what the template ends a turn with."""
    text = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    calls = {"prompt": [user("Look up blue")], "chosen": [call("lookup", LOOKUP, content="")],
             "rejected": [call("lookup", OTHER, content="")], "tools": [TOOL]}  # fmt: skip
    more_turns = [user("And at night?"), bot("Black, mostly.")]
    loop = [call("lookup", LOOKUP, content=""), ANSWER, YES]
    return {
        "text": text,
        "text, prompt within": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "text, prompt ends in a space": {"prompt": "The sky is ", "chosen": "blue.", "rejected": "green."},
        "text, tokens merge at the boundary": {"prompt": "Sky?\n", "chosen": "\nblue", "rejected": "green"},
        "text, ends with EOS": {**text, "chosen": " blue." + tok.eos_token},
        "text, ends as the template's turns": {**text, "chosen": " blue." + end, "rejected": " green." + end},
        "text, begins with BOS": {**text, "prompt": "<s>The sky is"},
        "text, other letters": {"prompt": "Wie heißt das? 空", "chosen": " Übung 青", "rejected": " né 緑"},
        "text, identical": {**text, "rejected": " blue."},
        "text, empty": {**text, "rejected": ""},
        "turns": {"prompt": [ASK], **PAIR},
        "turns, prompt within": {"chosen": [ASK, YES], "rejected": [ASK, NO]},
        "turns, system": {"prompt": [system("Be terse."), ASK], **PAIR},
        "turns, system, prompt within": {"chosen": [system("Be terse."), ASK, YES],
                                         "rejected": [system("Be terse."), ASK, NO]},
        "turns, developer": {"prompt": [{"role": "developer", "content": "Be terse."}, ASK], **PAIR},
        "turns, history": {"prompt": [user("Hello"), bot("Hi."), ASK], **PAIR},
        "turns, system and history": {"prompt": [system("Be terse."), user("Hello"), bot("Hi."), ASK], **PAIR},
        "turns, spaces around": {"prompt": [user("  What now?\n")], "chosen": [bot(" Blue. ")],
                                 "rejected": [bot("\nRed")]},
        "turns, special tokens in them": {"prompt": [user(f"What does {end or '</s>'} mean?")], **PAIR},
        "turns, other letters": {"prompt": [user("Wie heißt 空?")], "chosen": [bot("Übung 青")],
                                 "rejected": [bot("né")]},
        "turns, prompt as a text": {"prompt": ASK["content"], "chosen": [ASK, YES], "rejected": [ASK, NO]},
        "turns, prompt repeated": {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]},
        "turns, begun by the assistant": {"prompt": [ASK, bot("Sure, it is")], "chosen": [bot(" blue.")],
                                          "rejected": [bot(" green.")]},
        "turns, an empty beginning": {"prompt": [ASK, bot("")], **PAIR},
        "turns, identical": {"prompt": [ASK], "chosen": [YES], "rejected": [YES]},
        "turns, spaces only": {"prompt": [ASK], "chosen": [bot("  ")], "rejected": [NO]},
        "turns, null of a user": {"prompt": [user(None)], **PAIR},
        "turns, null of the assistant": {"prompt": [ASK], "chosen": [bot(None)], "rejected": [NO]},
        "parts, of the user": {"prompt": [user(part("What colour is the sky?"))], **PAIR},
        "parts, of all": {"prompt": [system(part("Be terse.")), user(part("Sky?"))], "chosen": [bot(part("Blue."))],
                          "rejected": [bot(part("Red."))]},
        "parts, several": {"prompt": [user(part("What colour?", "Of the sky."))], **PAIR},
        "parts, an image": {"prompt": [user([{"type": "image"}, *part("What?")])], **PAIR},
        "tools": {"prompt": [ASK], **PAIR, "tools": [TOOL]},
        "tools, as JSON text": {"prompt": [ASK], **PAIR, "tools": json.dumps([TOOL])},
        "calls": calls,
        "calls, arguments as JSON text": {**calls, "chosen": [call("lookup", json.dumps(LOOKUP), content="")],
                                          "rejected": [call("lookup", json.dumps(OTHER), content="")]},
        "calls, null beside them": {**calls, "chosen": [call("lookup", LOOKUP, content=None)],
                                    "rejected": [call("lookup", OTHER, content=None)]},
        "calls, from Arrow": {**calls, "chosen": [call("lookup", {**LOOKUP, "times": None}, content="")]},
        "calls, without tools": {**calls, "tools": None},
        "calls, and words": {**calls, "chosen": [call("lookup", LOOKUP, content="Let me see.")], "rejected": [NO]},
        "calls, in the prompt": {"prompt": [user("Look up blue"), call("lookup", LOOKUP, content=""), ANSWER], **PAIR,
                                 "tools": [TOOL]},
        "several turns, user": {"prompt": [ASK], "chosen": [YES, *more_turns], "rejected": [NO, *more_turns]},
        "several turns, tool": {"prompt": [user("Look up blue")], "chosen": loop, "rejected": [NO], "tools": [TOOL]},
        "several turns, user first": {"prompt": [ASK, YES], "chosen": more_turns,
                                      "rejected": [more_turns[0], bot("White.")]},
        "reasoning, key": {"prompt": [ASK], "chosen": [bot("Blue.", reasoning_content="Light scatters.")],
                           "rejected": [bot("Red.", reasoning_content="It is evening.")]},
        "reasoning, in the content": {"prompt": [ASK], "chosen": [bot("<think>\nLight scatters.\n</think>\n\nBlue.")],
                                      "rejected": [bot("<think>\nEvening.\n</think>\n\nRed.")]},
        "reasoning, in the history": {"prompt": [user("Hi"), bot("Yes?", reasoning_content="They greet."), ASK],
                                      **PAIR},
        "reasoning, switched off": {"prompt": [ASK], **PAIR, "chat_template_kwargs": {"enable_thinking": False}},
        "keys, name": {"prompt": [{**ASK, "name": "Ada"}], **PAIR},
        "keys, other": {"prompt": [{**ASK, "mood": "curious"}], **PAIR},
    }  # fmt: skip


# ---- the two sides


class Rows(list):
    """What `_prepare_dataset` needs of a dataset, without Arrow in between."""

    def map(self, function, fn_kwargs=None, **_):
        return Rows({**row, **function(dict(row), **(fn_kwargs or {}))} for row in self)

    def filter(self, function, **_):
        return Rows(row for row in self if function(row))


def by_trl(row: dict, tok: PreTrainedTokenizerFast) -> list[list[int]]:
    """[prompt, chosen, rejected] of TRL's DPOTrainer."""
    given = {key: value for key, value in copy.deepcopy(row).items() if value is not None}
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tok)
    (out,) = trl.DPOTrainer._prepare_dataset(trainer, Rows([given]), tok, args, "train")
    return [list(out[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")]


def by_fastpo(row: dict, tok: PreTrainedTokenizerFast):
    (example,), report = prepare_examples([row], tok)
    return [example.prompt_ids.tolist(), *(r.tolist() for r in example.responses)], example, report


def compare(row: dict, tok: PreTrainedTokenizerFast) -> tuple[str, str]:
    """(outcome, detail) of one cell."""
    theirs = theirs_failed = None
    try:
        theirs = by_trl(row, tok)
    except Exception as error:  # jinja's errors, TRL's, Python's: whatever a row makes it raise
        theirs_failed = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    try:
        ours, example, report = by_fastpo(row, tok)
    except DataError as error:
        why = re.sub(r"^row 0: |^no row is left to train on: ", "", str(error)).split(" (invalid_rows")[0]
        if theirs is None:
            return "both refuse", ""
        return f"refused here: {refusal(why)}", why
    masked = example.token_weights is not None
    if masked:
        wrong = mask_fault(row, tok, example)
        if wrong:
            return "unexplained", wrong
    if theirs == ours:
        return ("ids equal, turns of others not trained on" if masked else "equal"), ""
    if (
        theirs
        and joined(theirs) == joined(ours)
        and isinstance(row["chosen"], list)
        and row["chosen"][0]["role"] == "user"
    ):
        return "no generation prompt before another's turn" + ", turns of others not trained on" * masked, ""
    rows, rules = meant_rows(row, report, theirs is None)
    other = next((ids for meant in rows if (ids := as_meant(meant, tok, report, ours)) is not None), None)
    if other is None or not rules:
        return "unexplained", f"{rules or 'no rule'}; TRL {theirs_failed or shown(theirs, tok)} | {shown(ours, tok)}"
    outcome = " and ".join(rules) + ", turns of others not trained on" * masked
    return (f"TRL raises; here {outcome}" if theirs is None else outcome), theirs_failed or ""


def as_meant(meant: dict, tok: PreTrainedTokenizerFast, report: Any, ours: list[list[int]]) -> list[list[int]] | None:
    """TRL's ids of a row as it is meant, less what it doubles; None where they are not ours."""
    try:
        found = by_trl(meant, tok)
    except Exception:  # as in compare
        return None
    if report.doubled_specials and found[0][:2] == [tok.bos_token_id] * 2:
        found[0] = found[0][1:]
    if report.own_endings:  # TRL puts an EOS behind every text that does not end in one
        found = [found[0], *(ids[:-1] for ids in found[1:])]
    same = found == ours or (report.continued and joined(found) == joined(ours))
    return found if same else None


def joined(ids: list[list[int]]) -> list[list[int]]:
    return [ids[0] + response for response in ids[1:]]


def shown(ids: list[list[int]], tok: PreTrainedTokenizerFast) -> str:
    return " / ".join(repr(tok.decode(part)) for part in ids)


REFUSALS = {
    "renders nothing": "a response that renders empty", "writes nothing of": "a response that renders empty",
    "writes the prompt differently": "the prompt changes with the response", "identical": "identical pair",
    "same token ids": "identical pair", "part of type": "a part that is not text", "has no 'content'": "a null content",
    "is empty": "an empty response", "no tokens of its own": "an empty response",
    "not the assistant's, and": "turns that cannot be told apart",
    "chat template failed": "the chat template fails",
}  # fmt: skip


def refusal(why: str) -> str:
    return next((reason for sign, reason in REFUSALS.items() if sign in why), why)


def meant_rows(row: dict, report: Any, theirs_failed: bool) -> tuple[list[dict], list[str]]:
    """The row as our rules read it, for TRL to read it so (in each form that a template may want), and the rules."""
    out, rules = copy.deepcopy(row), []
    clean = {key: without_nulls(value) if isinstance(value, list) else value for key, value in out.items()}
    if clean != out:
        out = clean
        rules.append("nulls left out")
    if isinstance(out.get("prompt"), str) and isinstance(out["chosen"], list):
        del out["prompt"]
        rules.append("a prompt's text beside conversations")
    if report.repeated_turns:
        n = len(out["prompt"])
        out["chosen"], out["rejected"] = out["chosen"][n:], out["rejected"][n:]
        rules.append("repeated prompt taken once")
    if report.continued:
        begun = out["prompt"].pop()
        for key in ("chosen", "rejected"):
            out[key][0] = {**out[key][0], "content": begun["content"] + out[key][0]["content"]}
        rules.append("the assistant's beginning continued")
    elif isinstance(out.get("prompt"), list) and out["prompt"] and out["prompt"][-1] == bot(""):
        out["prompt"].pop()
        rules.append("an empty beginning is the generation prompt")
    if report.read_arguments:
        for turn in all_turns(out):
            for calls in turn.get("tool_calls") or ():
                given = calls["function"]["arguments"]
                calls["function"]["arguments"] = json.loads(given) if isinstance(given, str) else json.dumps(given)
        rules.append("tool arguments as the template has them")
    calls = [turn for turn in all_turns(out) if turn.get("tool_calls") and "content" not in turn]
    if calls and theirs_failed:
        for turn in calls:
            turn["content"] = ""
        rules.append("an empty text beside calls")
    if report.doubled_specials:
        rules.append("doubled BOS removed")
    if report.own_endings:
        rules.append("no EOS behind the template's own end")
    if not report.flattened:
        return [out], rules
    return [in_form(out, form) for form in ("texts", "user parts", "parts")], [*rules, "parts as the template has them"]


def all_turns(row: dict) -> list[dict]:
    return [turn for key in ("prompt", "chosen", "rejected") for turn in row.get(key, ()) if isinstance(turn, dict)]


def in_form(row: dict, form: str) -> dict:
    """Every content as a text, or as text parts (of users only, or of all)."""
    out = copy.deepcopy(row)
    for turn in all_turns(out):
        texts = turn.get("content", [])
        texts = [texts] if isinstance(texts, str) else [p["text"] for p in texts]
        as_parts = form == "parts" or (form == "user parts" and turn["role"] == "user")
        turn["content"] = part(*texts) if as_parts else "\n".join(texts)
    return out


def mask_fault(row: dict, tok: PreTrainedTokenizerFast, example: Any) -> str | None:
    """What is wrong with the mask: trained words of others, or words of the assistant's that are not trained."""
    for key, ids, weights in zip(("chosen", "rejected"), example.responses, example.token_weights, strict=True):
        trained = tok.decode(ids[weights > 0].tolist())
        for turn in row[key]:
            text = turn.get("content") or ""
            if turn["role"] == "assistant" and text and text not in trained and text in tok.decode(ids.tolist()):
                return f"{key}: {text!r} is not trained on: {trained!r}"
            if turn["role"] != "assistant" and text in trained:
                return f"{key}: {text!r} of a {turn['role']} turn is trained on: {trained!r}"
    return None


def load_templates(folders: list[str]) -> dict[str, str]:
    """Different templates by name: TRL's own, then those of the folders."""
    found: dict[str, str] = {}
    own = Path(trl.__file__).parent / "chat_templates"
    for folder in (own, *map(Path, folders)):
        for path in sorted(folder.glob("*.jinja")):
            text = path.read_text(encoding="utf-8")
            if text not in found.values():
                found[path.stem] = text
    return found


def end_of_turn(tok: PreTrainedTokenizerFast) -> str:
    with contextlib.suppress(Exception):
        return tok.apply_chat_template([user("q"), bot("zqa")], tokenize=False).rpartition("zqa")[2].strip()
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--only", help="templates whose name has this")
    parser.add_argument("--shape", help="shapes whose name has this")
    parser.add_argument("--refusals", action="store_true", help="print each refusal of ours where TRL trains")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    outcomes: Counter = Counter()
    by_shape: dict[str, Counter] = {}
    unexplained = []
    templates = {n: t for n, t in load_templates(args.templates).items() if not args.only or args.only in n}
    for name, template in templates.items():
        tok = tokenizer(template)
        for shape, row in shapes(tok, end_of_turn(tok)).items():
            if args.shape and args.shape not in shape:
                continue
            outcome, detail = compare(row, tok)
            outcomes[outcome] += 1
            by_shape.setdefault(shape, Counter())[outcome] += 1
            if outcome == "unexplained":
                unexplained.append({"template": name, "shape": shape, "detail": detail})
            elif args.refusals and outcome.startswith("refused here"):
                print(f"{name} | {shape} | {detail[:300]}")
    for item in unexplained[:60]:
        print(f"{item['template']} | {item['shape']} | {item['detail'][:400]}")
    text = table(outcomes, by_shape, len(templates))
    print(text)
    if args.json:
        args.json.write_text(json.dumps({"templates": list(templates), "outcomes": outcomes, "by_shape": by_shape,
                                         "unexplained": unexplained}, indent=1) + "\n")  # fmt: skip
    if args.markdown:
        args.markdown.write_text(text)
    return int(bool(unexplained))


def table(outcomes: Counter, by_shape: dict[str, Counter], templates: int) -> str:
    cells = sum(outcomes.values())
    lines = [
        "# Rows to token ids: fastpo against TRL", "",
        f"`bench/data_vs_trl.py`: {templates} chat templates x {len(by_shape)} shapes of row = {cells} cells, TRL "
        f"{trl.__version__}.", "", "| outcome | cells |", "| --- | ---: |",
        *(f"| {outcome} | {count} |" for outcome, count in outcomes.most_common()),
        *([] if outcomes["unexplained"] else ["| unexplained | 0 |"]), "", "| shape | outcomes |", "| --- | --- |",
        *(f"| {shape} | {'; '.join(f'{o}: {n}' for o, n in c.most_common())} |" for shape, c in by_shape.items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
