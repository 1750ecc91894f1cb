"""`fastpo recipes`: the systems that `fastpo iterate --recipe` knows."""

import argparse
import textwrap

import yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "The self-improvement systems of the papers: what each does, where that is from, its options."
    parser.add_argument("name", nargs="?", help="one of them")


def run(namespace: argparse.Namespace) -> int:
    from fastpo.loop import recipes

    if namespace.name is None:
        width = max(map(len, recipes.names()))
        for name in recipes.names():
            print(f"{name:<{width}}  {recipes.text_of(name)['title']}")
        print("\nfastpo recipes NAME prints one; fastpo iterate --recipe NAME runs it")
        return 0
    text = recipes.text_of(namespace.name)
    for title, key in (("", "about"), ("Source: ", "source"), ("Chosen here: ", "choices"), ("Needs: ", "needs")):
        if text[key]:
            print(textwrap.fill(title + text[key], 110), end="\n\n")
    print(
        yaml.safe_dump(recipes.options_of(namespace.name), sort_keys=False, default_flow_style=None, width=110), end=""
    )
    return 0
