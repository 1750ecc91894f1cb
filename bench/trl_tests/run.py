"""TRL's own tests of its DPO, KTO, CPO and ORPO trainers on fastpo: how many of those that TRL passes fastpo passes.

`python bench/trl_tests/run.py CHECKOUT` runs the files of a checkout of TRL (its tests/ folder; none of it is kept
here) twice, with TRL's trainers and with classes over `fastpo.Trainer` in their place (plugin.py), on local stand-ins
for the hub's models and data (stand_ins.py). Tests named after Liger run in processes of their own, for it changes
transformers for good. Left out: what tests images, TRL's collators alone, GPUs, or encoder-decoders. Outcomes of both
sides lie as JSON in --work, and are used again unless --again; the page is bench/results/PLACE/trl_tests.md.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = {
    "DPO": "tests/test_dpo_trainer.py",
    "KTO": "tests/test_kto_trainer.py",
    "CPO": "tests/experimental/test_cpo_trainer.py",
    "ORPO": "tests/experimental/test_orpo_trainer.py",
}
# Words in names of tests that are left out, and why.
LEFT_OUT = {
    "VLM": "images", "Vision": "images", "vlm": "images", "vision": "images", "Collator": "TRL's collators",
    "Slow": "GPUs", "t5": "encoder-decoders",
}  # fmt: skip
# Why fastpo does not pass, by words in a test's name.
REASONS: dict[str, str] = {
    "tokenize_and_process_tokens": "it looks at TRL's collator, whose padded tensors do not exist here",
    "KTOTrainer::test_fully_truncated": "one row is left, and kto's KL is of completions of other rows: refused, where "
    "TRL takes the row's own",
}


def run_side(side: str, checkout: Path, work: Path, file: str, liger: bool, limit: int) -> dict[str, list[str]]:
    """Outcomes of one file on one side, with or without its tests on Liger. -> by test: outcome, error"""
    out = work / f"{side}-{Path(file).stem}{'-liger' if liger else ''}.json"
    if out.exists():
        return json.loads(out.read_text())
    words = [f"not {word}" for word in LEFT_OUT if word != "t5"] + ["liger" if liger else "not liger"]
    root = HERE.parent.parent
    environment = os.environ | {
        "TRL_TESTS_SIDE": side, "TRL_TESTS_STAND_INS": str(work / "stand-ins"), "TRL_TESTS_OUT": str(out) + ".part",
        "HF_HUB_CACHE": str(work / "stand-ins" / "hub"), "HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1",
        "FASTPO_CACHE": str(work / "cache"), "PYTHONPATH": f"{root}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONSAFEPATH": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-q", "-Wignore", "--tb=no",
               "--rootdir", ".", file, "-k", " and ".join(words)]  # fmt: skip
    subprocess.run(command, cwd=checkout, env=environment, timeout=limit, check=False)
    part = Path(f"{out}.part")
    if not part.exists():
        part.write_text("{}")  # no test of that kind
    part.rename(out)
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of TRL, for its tests/")
    parser.add_argument("--work", type=Path, default=Path("/tmp/fastpo-trl-tests"), help="stand-ins and outcomes")
    parser.add_argument("--again", choices=("fastpo", "both"), help="run a side again")
    parser.add_argument("--place", default="cpu-epyc-2c", help="folder of bench/results for the page")
    parser.add_argument("--limit", type=int, default=1800, help="seconds for one file of one side")
    args = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        sys.exit("trl is not installed: pip install -e '.[bench]'")
    args.work.mkdir(parents=True, exist_ok=True)
    for old in args.work.glob({"both": "*.json", "fastpo": "fastpo-*.json", None: "none"}[args.again]):
        old.unlink()
    sides: dict[str, dict[str, list[str]]] = {"trl": {}, "fastpo": {}}
    for side, outcomes in sides.items():
        for file in FILES.values():
            for liger in (False, True):
                outcomes |= run_side(side, args.checkout.resolve(), args.work, file, liger, args.limit)
    page = report(sides["trl"], sides["fastpo"], (args.checkout / "VERSION").read_text().strip())
    out = HERE.parent / "results" / args.place / "trl_tests.md"
    out.write_text(page)
    print(page)


def report(trl: dict[str, list[str]], fastpo: dict[str, list[str]], tests_of: str) -> str:
    """The page: counts by file, then every test that TRL passes and fastpo does not, with the reason."""
    lines = [
        "# TRL's own tests on fastpo\n",
        f"Tests of TRL {tests_of} with TRL {version('trl')}, transformers {version('transformers')}, torch "
        f"{version('torch')}; made by `bench/trl_tests/run.py`, which says what is left out.\n",
        "| file | TRL passes | fastpo passes of these | TRL itself does not pass |",
        "| --- | --- | --- | --- |",
    ]
    missed = []
    for name, file in FILES.items():
        of_file = {test: outcome[0] for test, outcome in trl.items() if test.startswith(file) and "t5" not in test}
        passed = [test for test, outcome in of_file.items() if outcome == "passed"]
        ours = [test for test in passed if fastpo.get(test, ["missing"])[0] == "passed"]
        missed += [test for test in passed if test not in ours]
        others = len([test for test, outcome in of_file.items() if outcome == "failed"])
        lines.append(f"| {name} | {len(passed)} | {len(ours)} | {others} |")
    lines += ["\nWhat TRL passes and fastpo does not:\n"] if missed else []
    for test in missed:
        reason = next((text for word, text in REASONS.items() if word in test), None)
        error = fastpo.get(test, ["missing", "did not run"])[1]
        lines.append(f"* `{test.partition('::')[2]}`: {reason or error.replace('|', '/')[:200]}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
