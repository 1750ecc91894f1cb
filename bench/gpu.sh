#!/usr/bin/env bash
# Nine minutes of a GPU in one command: environment, checks, tests, our figures, goals, peers; one archive in a folder.
#
#     bash bench/gpu.sh --out FOLDER        FOLDER/gpu.tar.gz
#     bash bench/gpu.sh --help              --train, --wheels FOLDER, --limit, --only, --device cpu --tiny
#
# PYTHON names the interpreter (default: .venv/bin/python where there is one, else python3). It needs torch, triton and
# transformers (peft and pytest for some sections); fastpo need not be installed. What it does: bench/gpu_run.py.
set -u
bench=$(cd "$(dirname "$0")" && pwd) || exit 1
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$bench/../.venv/bin/python" ]; then PYTHON=$bench/../.venv/bin/python; else PYTHON=python3; fi
fi
exec "$PYTHON" "$bench/gpu_run.py" "$@"
