"""Answers of a model to questions, scored: rows of K responses that `fastpo train` takes.

    python examples/sample.py MODEL ROWS.jsonl                  # 4 answers to each training question, into ROWS.jsonl
    python examples/sample.py MODEL --held-out --responses 8    # how right and how long its answers to the others are
    python examples/sample.py --held-out --questions FILE.jsonl # these questions alone, for `fastpo evaluate`

The questions are about capitals. An answer that names the capital scores 1, less a hundredth a word: right and short
is better than right and long, and anything wrong scores 0. Answers that reach --max-new-tokens are left out: their end
is the limit's, not the model's.
"""

import argparse
import json
import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# fmt: off
CAPITALS = {
    "Argentina": "Buenos Aires", "Austria": "Vienna", "Belgium": "Brussels", "Bulgaria": "Sofia", "Chile": "Santiago",
    "China": "Beijing", "Colombia": "Bogot", "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo",
    "Ethiopia": "Addis Ababa", "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin", "Ghana": "Accra",
    "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjav", "Indonesia": "Jakarta", "Iran": "Tehran",
    "Iraq": "Baghdad", "Ireland": "Dublin", "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo",
    "Kenya": "Nairobi", "Latvia": "Riga", "Lebanon": "Beirut", "Lithuania": "Vilnius", "Malaysia": "Kuala Lumpur",
    "Morocco": "Rabat", "Nepal": "Kathmandu",
    # held out
    "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest",
    "Russia": "Moscow", "Senegal": "Dakar", "Serbia": "Belgrade", "South Korea": "Seoul", "Spain": "Madrid",
    "Sweden": "Stockholm", "Switzerland": "Bern", "Syria": "Damascus", "Thailand": "Bangkok", "Ukraine": "Ky",
    "Venezuela": "Caracas",
}  # fmt: on
TRAIN = 32


def score(answer: str, capital: str) -> float:
    right = re.search(rf"\b{capital}", answer) is not None
    return max(0.0, 1 - len(answer.split()) / 100) if right else 0.0


def right(prompt, response: str, meta) -> float:
    """1 where the response names the capital: a judge for `fastpo evaluate verifier`."""
    return float(score(response, meta["answer"]) > 0)


@torch.no_grad()
def answers(model, tokenizer, questions: list[str], k: int, limit: int) -> list[list[str]]:
    """K answers to each question, or the greedy one for k = 0; those that did not end are left out."""
    turns = [[{"role": "user", "content": question}] for question in questions]
    batch = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    draws = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "num_return_sequences": k}
    out = model.generate(**batch, max_new_tokens=limit, **(draws if k else {"do_sample": False}))
    found = []
    for row in out[:, batch["input_ids"].shape[1] :]:
        ended = (row == tokenizer.eos_token_id).any()
        found.append(tokenizer.decode(row, skip_special_tokens=True).strip() if ended else "")
    n = max(1, k)
    return [[text for text in found[i : i + n] if text] for i in range(0, len(found), n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("rows", nargs="?")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--responses", type=int, default=4, help="answers drawn to a question; 0: the greedy one")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--questions", metavar="FILE", help="write the questions and their answers there")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.model is None and args.questions is None:
        parser.error("give a model, or --questions alone")
    chosen = list(CAPITALS.items())[slice(TRAIN, None) if args.held_out else slice(TRAIN)]
    questions = [f"What is the capital of {country}?" for country, _ in chosen]
    if args.questions:
        with open(args.questions, "w", encoding="utf-8") as file:
            for question, (country, capital) in zip(questions, chosen):
                prompt = [{"role": "user", "content": question}]
                file.write(json.dumps({"id": country, "prompt": prompt, "answer": capital}) + "\n")
    if args.model is None:
        return
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    given = answers(model, tokenizer, questions, args.responses, args.max_new_tokens)
    scores = [[score(text, capital) for text in texts] for texts, (_, capital) in zip(given, chosen)]
    flat, words = sum(scores, []), [len(text.split()) for texts in given for text in texts]
    asked = len(questions) * max(1, args.responses)
    print(f"{asked} answers, {len(flat)} that end, {sum(s > 0 for s in flat)} of them right, "
          f"{sum(words) / max(1, len(words)):.1f} words on average")  # fmt: skip
    if not args.rows:
        return
    kept = 0
    with open(args.rows, "w", encoding="utf-8") as file:
        for question, texts, of_texts in zip(questions, given, scores):
            best = {text: s for text, s in zip(texts, of_texts)}  # two equal answers are one response
            if len(set(best.values())) < 2:
                continue
            responses = [{"text": text, "score": round(s, 4)} for text, s in best.items()]
            prompt = [{"role": "user", "content": question}]
            file.write(json.dumps({"prompt": prompt, "responses": responses}, ensure_ascii=False) + "\n")
            kept += 1
    print(f"{kept} of {len(questions)} questions have answers of two scores: {args.rows}")


if __name__ == "__main__":
    main()
