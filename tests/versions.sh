#!/usr/bin/env bash
# Tests on the lowest or the newest versions that pyproject.toml allows:
#
#     tests/versions.sh floor|newest [-t FOLDER] [pytest arguments]
#
# Makes a virtual environment in FOLDER (default: .versions/floor, .versions/newest), kept: a later call makes it again
# only where pyproject.toml or PINS has changed. FOLDER/set.txt says what is in it. `floor`: every lower bound itself,
# without TRL, which asks for more, and the newest of what those bring. `newest`: the newest of all, on the day the
# folder is made. Without a path among the arguments the tests at the end of this file run.
# PyTorch from PyPI is a CUDA build, 3 GB to load; UV_INDEX, UV_FIND_LINKS or PINS="torch==2.13.0+cpu" name another.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:-}
[[ $mode == floor || $mode == newest ]] || { sed -n '2,/^set /{/^set /d;s/^# \?//;p}' "$0" >&2; exit 2; }
shift
folder=.versions/$mode
if [[ "${1:-}" == -t ]]; then
    folder=$2
    shift 2
fi
python=$folder/bin/python
if [[ ! -x $python ]]; then
    "${PYTHON:-python3}" -m venv "$folder"
    # In an environment of its own: the other one holds the set and nothing else.
    "${PYTHON:-python3}" -m venv "$folder/uv"
    "$folder/uv/bin/python" -m pip install --quiet uv
fi
"$python" - "$mode" ${PINS:-} > "$folder/asked.new" <<'PY'
import re
import sys
import tomllib

mode, *pins = sys.argv[1:]
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
asked = list(project["dependencies"])
for extra in ("data", "peft", "quant", "games", "evals", "test"):
    asked += project["optional-dependencies"][extra]
if mode == "floor":  # the bounds themselves: they must fit each other, and one that does not is an error here
    asked = [r.replace(">=", "==") for r in asked if not r.startswith("trl")]
pinned = {re.split("[=<>]", pin)[0] for pin in pins}
print(*dict.fromkeys([r for r in asked if re.split("[=<>;]", r)[0] not in pinned] + pins), sep="\n")
PY
uv=$folder/uv/bin/uv
if ! cmp --quiet "$folder/asked.new" "$folder/asked.txt"; then
    "$uv" pip compile --quiet --no-header --no-annotate --upgrade --python "$python" "$folder/asked.new" \
        --output-file "$folder/set.txt" > /dev/null
    "$uv" pip sync --quiet --python "$python" "$folder/set.txt"
    mv "$folder/asked.new" "$folder/asked.txt"
fi
"$uv" pip install --quiet --python "$python" --no-deps -e .  # with the extension, built in this checkout
main='^(torch|triton|transformers|peft|datasets|numpy|bitsandbytes|accelerate|trl)=='
echo "$mode: $(grep -E "$main" "$folder/set.txt" | paste -sd ' ')"

export PYTHONSAFEPATH=1
run=("$python" -m pytest -q)
for argument in "$@"; do
    if [[ $argument == tests* ]]; then
        exec "${run[@]}" "$@"
    fi
done
# What meets the libraries' own interfaces. Not here: the command line, games, bench/, pages, the package itself.
rc=0
"${run[@]}" -m "not gpu and not real" --ignore-glob "tests/*/test_*_interpreter.py" "$@" \
    tests/ops tests/losses tests/models tests/reference tests/training tests/data tests/checkpoints tests/plan \
    tests/report tests/config tests/sampling tests/scoring tests/online tests/loop tests/evals \
    tests/test_trainer.py tests/test_face.py tests/test_quickstart.py || rc=1
# Triton reads TRITON_INTERPRET when a kernel is decorated: a process of its own.
TRITON_INTERPRET=1 "${run[@]}" -m "not gpu" "$@" tests/*/test_*_interpreter.py tests/ops/test_head.py \
    tests/ops/test_entropy.py -k "_interpreter or triton-interpreted" || rc=1
exit $rc
