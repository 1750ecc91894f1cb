#!/usr/bin/env bash
# Runs tests on the lowest versions that pyproject.toml allows: tests/floor.sh [-t FOLDER] [pytest arguments].
#
# Makes a virtual environment in FOLDER (default: .floor beside this checkout's files; kept, so that a second call only
# runs the tests) with every dependency at the version behind its ">=", and the newest of what those bring. PyTorch's
# build comes from the index that pip is set to: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL. FLOOR_PINS="torch==2.13.0+cpu" takes
# these in place of the lowest, where a download is too large.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.floor
if [[ "${1:-}" == -t ]]; then
    folder=$2
    shift 2
fi
python=${PYTHON:-python3}
if [[ ! -x $folder/bin/python ]]; then
    "$python" -m venv "$folder"
    "$python" - "${FLOOR_PINS:-}" > "$folder/floor.txt" <<'PY'
import re
import sys
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
lines = [*project["dependencies"], *project["optional-dependencies"]["test"]]
lowest = {re.split("[=<>]", pin)[0]: pin for pin in sys.argv[1].split()}
for line in lines:
    requirement, _, marker = line.partition(";")
    name, version = re.fullmatch(r"([\w.-]+)\s*[>=]=\s*([\w.]+)\s*", requirement).groups()
    lowest.setdefault(name, f"{name}=={version}" + (f"; {marker.strip()}" if marker else ""))
print("\n".join(lowest.values()))
PY
    "$folder/bin/python" -m pip install --quiet -r "$folder/floor.txt"
fi
"$folder/bin/python" -m pip list --format=freeze | grep -iE '^(torch|transformers|peft|datasets|numpy|triton|bitsandbytes)=='
tests=("$@")
if [[ ${#tests[@]} == 0 ]]; then
    # What meets the libraries' own interfaces: ops and compilation, models, adapters, data, a run and its resume.
    tests=(tests/test_ops.py tests/test_losses.py tests/test_loss_table.py tests/test_model.py tests/test_adapters.py
        tests/test_ref_policy.py tests/test_optim.py tests/test_trainer.py tests/test_resume.py tests/test_data.py)
fi
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "$folder/bin/python" -m pytest -q "${tests[@]}"
