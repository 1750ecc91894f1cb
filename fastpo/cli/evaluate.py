"""`fastpo evaluate NAME`: answers of policies, verdicts of a judge, a figure with its interval."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from fastpo.cli.parser import UsageError, assign

NAMES = ("alpaca_eval", "wildbench", "arena", "rewardbench", "win_rate", "verifier", "held_out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Answers of policies, verdicts of a judge, a figure with its interval and a page to read (docs/evals.md). Run "
        "again with the same options, it goes on where it stopped."
    )
    parser.usage = "fastpo evaluate NAME --config run.yaml [--model PATH] [--baseline PATH] [--OPTION VALUE ...]"
    parser.add_argument("name", metavar="NAME", help=f"the measure: {', '.join(NAMES)}")
    parser.add_argument("--config", metavar="FILE", help="YAML file of options")
    parser.add_argument("--model", action="append", default=[], metavar="[NAME=]PATH",
                        help="a policy, or a file of answers; several have names")  # fmt: skip
    parser.add_argument("--baseline", metavar="PATH", help="what it is compared with: the same, or a model's name")
    parser.add_argument("--prompts", metavar="FILE", help="in the measure's own format, or rows with `prompt`")
    parser.add_argument("--verdicts", metavar="FILE", help="in the judge's place, as verdicts.jsonl has them")
    parser.add_argument("--annotations", metavar="FILE", help="in the measure's own format: nothing is asked")
    parser.add_argument("--output-dir", metavar="FOLDER")
    parser.add_argument("--limit", type=int, metavar="N", help="so many of the prompts, drawn by the seed")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--max-failed", type=float, metavar="SHARE", help="of answers or verdicts, before it ends")
    parser.add_argument("--set", nargs=1, action="append", default=[], metavar="NAME=VALUE", dest="assignments",
                        help="any other by its dotted name: --set judge.path=judge --set sample.n=4")  # fmt: skip
    parser.add_argument("--from", metavar="STAGE", dest="start_from",
                        help="redo from a stage on: sample, sample-NAME or judge; old files are kept")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the cost in calls and tokens, and stop")


def run(namespace: argparse.Namespace) -> int:
    from fastpo.evals import summary
    from fastpo.evals.evaluate import evaluate
    from fastpo.loop import config as configs

    given = ("baseline", "prompts", "verdicts", "annotations", "output_dir", "limit", "seed", "max_failed")
    options = configs.load(namespace.config) if namespace.config else {}
    options |= {name: getattr(namespace, name) for name in given if getattr(namespace, name) is not None}
    named = [model.partition("=") for model in namespace.model]
    if len(named) == 1 and not named[0][1]:
        options = {k: v for k, v in options.items() if k != "models"} | {"model": named[0][0]}
    elif named:
        for name, sign, path in named:
            if not sign or not name or not path:
                raise UsageError(f"--model {name}{sign}{path}: of several models each has a name, NAME=PATH")
        options = {k: v for k, v in options.items() if k != "model"} | {
            "models": {name: path for name, _, path in named}
        }
    result = evaluate(namespace.name.replace("-", "_"), _assigned(options, namespace.assignments),
                      start_from=namespace.start_from, dry_run=namespace.dry_run)  # fmt: skip
    if result is not None:
        for line in (*summary.lines(result.result), *summary.remarks(result.result)):
            print(line)
        print(f"in {result.output_dir}: result.json, report.html")
    return 0


def hint(extras: Sequence[str]) -> str:
    """What --set has where an option of a section stands alone: --max-tokens 96."""
    from fastpo.cli.parser import section_hint
    from fastpo.evals.options import SAMPLE_OPTIONS

    return section_hint(extras, {"sample": SAMPLE_OPTIONS})


def _assigned(options: dict[str, Any], assignments: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Options with those of --set on top: a dotted name changes one option of its section, a name without a dot is the
    whole of it. A judge of another kind shares no option with the one that the file has."""
    from fastpo.loop import config as configs

    dotted: dict[str, Any] = {}
    for text in (one for group in assignments for one in group):
        name = text.partition("=")[0]
        if "." in name:
            assign(dotted, [text])
        else:
            assign(options, [text])
    judge, before = dotted.get("judge", {}), options.get("judge")
    if isinstance(before, Mapping) and judge.get("kind", before.get("kind")) != before.get("kind"):
        options = {**options, "judge": {}}
    return configs.merged(options, dotted)
