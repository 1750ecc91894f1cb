"""`fastpo iterate`: sample, judge, pair, train, and again."""

import argparse

from fastpo.cli.parser import assign


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sample from a model, judge, make pairs, train, and go on from the better model: the options are in a YAML "
        "file (docs/loop.md), on top of a recipe's. Run again with the same options, it goes on where it stopped."
    )
    parser.usage = "fastpo iterate --config run.yaml [--recipe NAME] [--model PATH] [--OPTION VALUE ...]"
    parser.add_argument("--config", metavar="FILE", help="YAML file of options")
    parser.add_argument("--recipe", metavar="NAME", help="a paper's system, see fastpo recipes")
    parser.add_argument("--model", metavar="PATH", help="the policy to start from")
    parser.add_argument("--prompts", metavar="FILE", help="rows with `prompt`, and `id` if they have one")
    parser.add_argument("--output-dir", metavar="FOLDER", help="of the run")
    parser.add_argument("--iterations", type=int, metavar="N")
    parser.add_argument("--prompts-per-iteration", type=int, metavar="N")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--max-failed", type=float, metavar="SHARE", help="of samples or judgements, before a stage ends"
    )
    parser.add_argument("--set", nargs=1, action="append", default=[], metavar="NAME=VALUE", dest="assignments",
                        help="any other option by its dotted name: --set sample.n=8 --set train.beta=0.1")  # fmt: skip
    parser.add_argument("--from", metavar="STAGE", dest="start_from",
                        help="redo from a stage on: score, or 2:score for iteration 2; old files are kept")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print stages, calls, tokens and disk, and stop")


def run(namespace: argparse.Namespace) -> int:
    from fastpo.loop.run import iterate

    given = ("model", "prompts", "output_dir", "iterations", "prompts_per_iteration", "seed", "max_failed")
    overrides = {name: getattr(namespace, name) for name in given if getattr(namespace, name) is not None}
    assign(overrides, [one for group in namespace.assignments for one in group])
    result = iterate(namespace.config, recipe=namespace.recipe, start_from=namespace.start_from,
                     dry_run=namespace.dry_run, **overrides)  # fmt: skip
    if result is not None:
        print(f"best policy: {result.best} ({result.policies[result.best]})")
    return 0
