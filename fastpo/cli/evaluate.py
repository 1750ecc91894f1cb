"""`fastpo evaluate NAME`: answers of policies, verdicts of a judge, a figure with its interval."""

import argparse

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

    given = ("baseline", "prompts", "verdicts", "annotations", "output_dir", "limit", "seed", "max_failed")
    overrides = {name: getattr(namespace, name) for name in given if getattr(namespace, name) is not None}
    named = [model.partition("=") for model in namespace.model]
    if len(named) == 1 and not named[0][1]:
        overrides["model"] = named[0][0]
    elif named:
        for name, sign, path in named:
            if not sign or not name or not path:
                raise UsageError(f"--model {name}{sign}{path}: of several models each has a name, NAME=PATH")
        overrides["models"] = {name: path for name, _, path in named}
    assign(overrides, [one for group in namespace.assignments for one in group])
    result = evaluate(namespace.name.replace("-", "_"), namespace.config, start_from=namespace.start_from,
                      dry_run=namespace.dry_run, **overrides)  # fmt: skip
    if result is not None:
        for line in (*summary.lines(result.result), *summary.remarks(result.result)):
            print(line)
        print(f"in {result.output_dir}: result.json, report.html")
    return 0
