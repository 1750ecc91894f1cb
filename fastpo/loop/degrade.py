"""Versions of a response that lack a growing share of its key phrases, each with its degree: rows of degree_aux.

Degree 0 is the response as it is, degree k of D lacks the first `most` k / (D - 1) of its phrases, by rank. Every
version is a row of text, degree 0 too: token ids as they were sampled would tell it from the others.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fastpo.data.rows import DEGREE_OF, LOSS
from fastpo.errors import TrainingError
from fastpo.loop.config import Degrade, LoopConfig
from fastpo.losses.table import DEGREE, canonical_name
from fastpo.sampling.items import seed_of

Span = tuple[int, int]  # of a text: [start, stop)
Phrase = Sequence[Span]  # all places at which a phrase stands

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
# English words that say little of their own: where RAKE's phrases end.
_FUNCTION_WORDS = frozenset("""
    a about above after again against all almost also although always am among an and another any anyone anything
    are aren't around as at away be became because become becomes been before behind being below between both but by
    came can can't cannot come could couldn't did didn't do does doesn't doing don't done down during each either
    else enough even ever every everyone everything few for from further gave get gets getting give given gives go
    goes going gone got had hadn't has hasn't have haven't having he he's her here hers herself him himself his how
    however i i'd i'll i'm i've if in instead into is isn't it it's its itself just keep kept know known least less
    let let's like made make makes many may me might mine more most much must my myself near need neither never no
    nobody none nor not nothing now of off often on once one only onto or other others ought our ours ourselves out
    over own per perhaps put quite rather really said same saw say says see seem seemed seems seen shall she she's
    should shouldn't since so some someone something still such take taken takes than that that's the their theirs
    them themselves then there there's therefore these they they're this those though through thus to together too
    took toward towards under until up upon us use used uses using very via want was wasn't way we we're well went
    were weren't what what's when where whether which while who whole whom whose why will with within without won't
    would wouldn't yes yet you you'd you'll you're you've your yours yourself
""".split())  # fmt: skip


# ---- key phrases, the most important first


def rake(text: str, options: Degrade, seed: int) -> list[Phrase]:
    """Runs of words between punctuation and English function words; a word's score is the mean length of the runs that
    it is in, a phrase's the sum over its words (RAKE, Rose et al. 2010)."""
    runs = list(_runs(text))
    found: dict[tuple[str, ...], list[Span]] = {}
    often, together = Counter[str](), Counter[str]()
    for run in runs:
        words = tuple(text[slice(*span)].lower() for span in run)
        found.setdefault(words, []).append((run[0][0], run[-1][1]))
        for word in words:
            often[word] += 1
            together[word] += len(words)
    scores = {words: sum(together[word] / often[word] for word in words) for words in found}
    return [found[words] for words in sorted(found, key=lambda words: -scores[words])]  # equal ones as they stand


def _runs(text: str) -> Iterator[list[Span]]:
    """Words with nothing but blanks between them, none of them a function word."""
    run: list[Span] = []
    for match in _WORD.finditer(text):
        if run and text[run[-1][1] : match.start()].strip():
            yield run
            run = []
        if match[0].lower().replace("’", "'") not in _FUNCTION_WORDS:
            run.append(match.span())
        elif run:
            yield run
            run = []
    if run:
        yield run


def words(text: str, options: Degrade, seed: int) -> list[Phrase]:
    """Single words of any language that has blanks, the longest first."""
    found: dict[str, list[Span]] = {}
    for match in _WORD.finditer(text):
        found.setdefault(match[0].lower(), []).append(match.span())
    return [found[word] for word in sorted(found, key=lambda word: -len(word))]


def pattern(text: str, options: Degrade, seed: int) -> list[Phrase]:
    """What matches `degrade.pattern`, match by match, in an order drawn by the seed: for answers that are no prose."""
    found: list[Phrase] = [[match.span()] for match in re.finditer(options.pattern, text) if match[0]]
    random.Random(seed).shuffle(found)
    return found


PHRASES: dict[str, Callable[[str, Degrade, int], list[Phrase]]] = {"rake": rake, "words": words, "pattern": pattern}


# ---- versions and rows


def versions(text: str, options: Degrade, seed: int) -> list[str] | None:
    """The text by degree, all different and none empty; None where it has too few key phrases for that."""
    phrases = PHRASES[options.phrases](text, options, seed)
    steps = options.degrees - 1
    out = [text]
    for k in range(1, options.degrees):
        share = math.ceil(len(phrases) * options.most * k / steps - 1e-9)
        out.append(without(text, [span for phrase in phrases[:share] for span in phrase]))
    return out if len(set(out)) == len(out) and all(version.strip() for version in out) else None


def without(text: str, spans: Sequence[Span]) -> str:
    """The text without these places, and without the second of two blanks that come together there."""
    out, at = "", 0
    for start, stop in sorted(spans):
        out += text[at:start]
        at = max(at, stop)
        if text[at : at + 1] == " " and (not out or out[-1].isspace()):
            at += 1
    return out + text[at:]


class Versions:
    """The rows of a degree of one iteration, made row by row; `counts` of them."""

    def __init__(self, config: LoopConfig):
        self.options, self.seed, self.loss = config.degrade, config.seed, pair_loss(config.train)
        self.counts = {"of a degree": 0, "responses without degrees": 0}

    def named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of pairs, which names its loss now that there are rows of another."""
        return {**row, LOSS: row.get(LOSS, self.loss)}

    def of(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Of the responses that a selected row's pairs have."""
        sides = 1 if self.options.of == "chosen" else 2
        for place in dict.fromkeys(place for pair in row["pairs"] for place in pair[:sides]):
            text, seed = row["responses"][place]["text"], seed_of(self.seed, "degrade", row["id"], place)
            made = versions(text, self.options, seed)
            if made is None:
                self.counts["responses without degrees"] += 1
                continue
            self.counts["of a degree"] += len(made)
            prompt = {name: row[name] for name in ("prompt", "prompt_ids") if name in row}
            turns = not isinstance(row["prompt"], str)
            for degree, version in enumerate(made):
                completion = [{"role": "assistant", "content": version}] if turns else version
                yield {"id": f"{row['id']}/{place}/degree-{degree}", **prompt, "completion": completion,
                       DEGREE_OF: degree, LOSS: DEGREE}  # fmt: skip

    def check(self) -> None:
        """TrainingError where there is none of them."""
        if not self.counts["of a degree"]:
            raise TrainingError(
                f"no response has the key phrases for {self.options.degrees} degrees (degrade.phrases="
                f"{self.options.phrases}): take fewer degrees, or other phrases"
            )


def pair_loss(train: Mapping[str, Any]) -> str:
    """The loss that degree_aux is added to."""
    names = train.get("loss_type", "dpo")
    given = [names] if isinstance(names, str) else list(names)
    return next(name for name in map(canonical_name, given) if name != DEGREE)
