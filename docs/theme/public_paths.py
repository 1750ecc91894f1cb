"""An extension of griffe, which reads the sources for the reference.

`kernels/` is the package `fastpo.kernels`; and what signatures say of their arguments in comments, shapes for the most
part, is put behind the docstring, for signatures lose their comments.
"""

import ast
import io
import tokenize

import griffe


class PublicPaths(griffe.Extension):
    def on_package(self, *, pkg, loader, **kwargs):
        if pkg.path == "fastpo" and "kernels" not in pkg.members:
            pkg.set_member("kernels", loader.load("kernels", try_relative_path=False))

    def on_function_instance(self, *, node, func, agent, **kwargs):
        if func.docstring is None or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        lines = func.lines_collection[func.filepath][node.lineno - 1 : node.body[0].lineno - 1]
        last = {}  # the last argument of each line: its comment is about that
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            last[argument.lineno - node.lineno + 1] = argument.arg
        said = [f"* `{last[line]}`: {text}" for line, text in _comments(lines) if line in last]
        if said:
            func.docstring.value = "\n".join([func.docstring.value, "", *said])


def _comments(lines):
    """(line from 1, text) of each comment but the formatter's."""
    source = io.StringIO("\n".join(lines) + "\n")
    try:
        for token in tokenize.generate_tokens(source.readline):
            if token.type == tokenize.COMMENT and not token.string.startswith(("# fmt", "# noqa", "# type")):
                yield token.start[0], token.string[1:].strip()
    except tokenize.TokenError:  # the body is cut off
        return
