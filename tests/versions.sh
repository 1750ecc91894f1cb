#!/usr/bin/env bash
# Runs tests on the lowest versions that pyproject.toml allows: tests/floor.sh [-t FOLDER] [pytest arguments].
#
# Makes a virtual environment in FOLDER (default: .floor beside this checkout's files; kept, so that a second call only
# runs the tests) with every dependency at the lowest version that fits the others, and the newest of what those bring.
# PyTorch's build comes from uv's index: UV_INDEX, UV_FIND_LINKS. FLOOR_PINS="torch==2.13.0+cpu" takes these in place of
# the lowest, where a download is too large.
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
    "$folder/bin/python" -m pip install --quiet uv
    # pip has no such resolution: it would need every lower bound to agree with what the other packages ask for.
    printf '%s\n' ${FLOOR_PINS:-} > "$folder/pins.txt"
    FASTPO_NO_CSRC=1 "$folder/bin/uv" pip install --quiet --python "$folder/bin/python" --resolution lowest-direct \
        -r pyproject.toml --extra test -r "$folder/pins.txt"
fi
"$folder/bin/uv" pip list --quiet --python "$folder/bin/python" --format=freeze | grep -iE '^(torch|transformers|peft|datasets|numpy|triton|bitsandbytes)=='
tests=("$@")
if [[ ${#tests[@]} == 0 ]]; then
    # What meets the libraries' own interfaces: ops and compilation, models, adapters, data, a run and its resume.
    tests=(tests/ops/test_head.py tests/losses/test_functions.py tests/losses/test_table.py tests/models/test_policy.py tests/models/test_adapters.py
        tests/reference/test_cache.py tests/training/test_optim.py tests/test_trainer.py tests/checkpoints/test_resume.py tests/data/test_prepare.py)
fi
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "$folder/bin/python" -m pytest -q "${tests[@]}"
