#!/bin/sh
# torch 2.13.0: torch.compile's cache on disk does not see what a custom op's fake kernel says. After an update of the
# package that defines the op, whose output has a row more, a new process takes the graph that was compiled before, and
# fails by the size of the old version, with the advice that the fake kernel is wrong. With an empty cache it runs.
# Seen: torch 2.13.0: old version (2, 4); new version, same cache: AssertionError expected size 3==2; new version, empty
# cache: (3, 4)
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/run.py" <<'END'
import sys

import torch

rows = int(sys.argv[1])  # of the op's output: 2 in the old version of its package, 3 in the new one


@torch.library.custom_op("demo::rows", mutates_args=())
def op(x: torch.Tensor) -> torch.Tensor:
    return x.sum(0).expand(rows, -1).clone()


@op.register_fake
def _(x):
    return x.new_empty(rows, x.shape[1])


try:
    print(tuple(torch.compile(lambda x: op(x) * 2)(torch.ones(5, 4)).shape))
except AssertionError as error:
    print("AssertionError", str(error).split(",")[0])
END
old=$(TORCHINDUCTOR_CACHE_DIR="$folder/one" "$folder/venv/bin/python" "$folder/run.py" 2)
new=$(TORCHINDUCTOR_CACHE_DIR="$folder/one" "$folder/venv/bin/python" "$folder/run.py" 3)
empty=$(TORCHINDUCTOR_CACHE_DIR="$folder/two" "$folder/venv/bin/python" "$folder/run.py" 3)
version=$("$folder/venv/bin/python" -c 'import torch; print(torch.__version__.split("+")[0])')
echo "torch $version: old version $old; new version, same cache: $new; new version, empty cache: $empty"
[ "$old" = "(2, 4)" ] && [ "$new" = "AssertionError expected size 3==2" ] && [ "$empty" = "(3, 4)" ]
