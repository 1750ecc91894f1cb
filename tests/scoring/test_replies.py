"""What judges write is read as it is meant, or not at all."""

import pytest

from fastpo.sampling.items import Failure
from fastpo.scoring.replies import read_list, read_pair, read_score, read_yes_no

PAIRS = {
    "Verdict: A": 1.0, "A is shorter.\n**Verdict**: B": 0.0, "verdict: tie": 0.5, "Verdict: Tie": 0.5, "B": 0.0,
    '"A".': 1.0, '{"comparison": "...", "choice": "A++"}': 1.0, "Verdict: A+": 0.75, "Verdict: A=B": 0.5,
    "Verdict: B+": 0.25, "Verdict: B++": 0.0, "[[A]]": 1.0, "so my pick is [[B]].": 0.0, "[[C]]": 0.5, "[[A>>B]]": 1.0,
    "[[B>A]]": 0.25, "Verdict: Response A": 1.0, "Verdict: Answer_B": 0.0, "Verdict: A. And again, verdict: A": 1.0,
    "<think>Verdict: B?</think>Verdict: A": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(("reply", "p"), PAIRS.items())
def test_pairs(reply, p):
    assert read_pair(reply) == p


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        ("", "empty"), (" \n ", "empty"), ("<think>hm</think>", "empty"), ("<think>Verdict: A", "unparsed"),
        ("Both have merit.", "unparsed"), ("Verdict: A\nVerdict: B", "unparsed"), ("Verdict: A or B", "unparsed"),
        ("Verdict: A/B", "unparsed"), ("Verdict: AB", "unparsed"), ("Verdict: C", "unparsed"), ("[[D]]", "unparsed"),
        ("I'm sorry, but I can't compare these.", "refused"), ("I cannot help with that.", "refused"),
        ("As an AI, I have no opinion.", "refused"), ("A is a good answer", "unparsed"), ("Better", "unparsed"),
    ],
)  # fmt: skip
def test_no_pair(reply, status):
    found = read_pair(reply)
    assert isinstance(found, Failure) and found.status == status and found.raw == reply


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("Score: 7", 7), ("It is fine.\nScore: 7/10", 7), ("**Rating:** 7 out of 10", 7), ('{"score": 6.5}', 6.5),
        ("[[3]]", 3), ("10", 10), ("8.", 8), ("Score: 7\nFinal score: 7", 7), ("Score: 70", "out_of_range"),
        ("Score: -3", "out_of_range"), ("Score: 0", "out_of_range"), ("Score: 7/100", "unparsed"),
        ("Score: 7-8", "unparsed"), ("Score: 7 or 8", "unparsed"), ("Score: 3, or rather score: 5", "unparsed"),
        ("Score: high", "unparsed"), ("There are 3 mistakes.", "unparsed"), ("Score: N", "unparsed"), ("", "empty"),
        ("Score: NaN", "unparsed"), ("Sorry, I can't rate this.", "refused"), ("Score: 1e3", "unparsed"),
    ],
)  # fmt: skip
def test_scores(reply, found):
    read = read_score(reply, 1, 10)
    assert (read.status if isinstance(read, Failure) else read) == found


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("Yes", 1), ("no.", 0), ("**Yes**", 1), ("No, it has none.", 0), ("Yes - it does", 1), ("Verdict: no", 0),
        ("[[yes]]", 1), ("No problem, I will check.", "unparsed"), ("Yesterday", "unparsed"), ("", "empty"),
        ("It depends.", "unparsed"), ("I can't say.", "refused"),
    ],
)  # fmt: skip
def test_yes_no(reply, found):
    read = read_yes_no(reply)
    assert (read.status if isinstance(read, Failure) else read) == found


LISTS = [
    ("[1, 2, 3]", (1, 2, 3)), ("```json\n[1, 2.5, 3]\n```", (1, 2.5, 3)), ('{"scores": [6, 0, 3]}', (6, 0, 3)),
    ('[{"score": 1}, {"score": 2}, {"score": 3}]', (1, 2, 3)),
    ('[{"answer": 3, "score": 6}, {"answer": 1, "score": 0}, {"answer": 2, "score": 1}]', (0, 1, 6)),
    ("1: 4\n2: 5\n3: 6", (4, 5, 6)), ("3. 6\n1. 4\n2. 5", (4, 5, 6)),
    ("Answer 1: 4\nAnswer 2: 0\nAnswer 3: 2", (4, 0, 2)),
    ("[1, null, 3]", (1, None, 3)), ("[1, 2]", "wrong_count"), ("[1, 2, 3, 4]", "wrong_count"), ("[]", "unparsed"),
    ("1: 4\n2: 5\n2: 6", "wrong_count"), ("1: 4\n2: 5\n4: 6", "wrong_count"), ("[1, 2, 7]", "out_of_range"),
    ("[1, 2, -1]", "out_of_range"), ('[1, 2, "3"]', "unparsed"), ("[1, 2, true]", "unparsed"),
    ("[1, 2, NaN]", "unparsed"),
    ("[1, 2, Infinity]", "unparsed"), ("[null, null, null]", "unparsed"), ("The scores are [1, 2, 3].", "unparsed"),
    ("[1, 2, 3] and [3, 2, 1]", "unparsed"), ("", "empty"), ("I won't score these.", "refused"),
    ("[[1, 2, 3]]", "unparsed"),
    ('[{"answer": 1, "score": 1}, {"score": 2}, {"score": 3}]', "unparsed"), ("[1, 2, 3", "unparsed"),
    ('[{"answer": 0, "score": 1}, {"answer": 1, "score": 2}, {"answer": 2, "score": 3}]', "wrong_count"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "found"), LISTS)
def test_lists(reply, found):
    read = read_list(reply, 3, 0, 6)
    assert (read.status if isinstance(read, Failure) else read) == found


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("The scores are [1, 2, 3].", (1, 2, 3)), ("[1, 2, 3] and [3, 2, 1]", "unparsed"),
        ("Item [a] has [1, 2, 3]", (1, 2, 3)),
        ("So:\n1: 4\n2: 5\n3: 6\nDone.", (4, 5, 6)), ("[1, 2, 3]", (1, 2, 3)), ("none", "unparsed"),
    ],
)  # fmt: skip
def test_a_list_among_prose_where_it_is_allowed(reply, found):
    read = read_list(reply, 3, 0, 6, prose=True)
    assert (read.status if isinstance(read, Failure) else read) == found
