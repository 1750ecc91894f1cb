#!/usr/bin/env bash
# Everything that a GPU has to show, in one command and under eight minutes; no network, nothing is installed.
#
#     bash bench/gpu.sh                          results into $OUT, or bench/results/<machine>/
#     bash bench/gpu.sh --train                  instead: attention on shared prompts, and whole training runs against TRL
#     bash bench/gpu.sh --device cpu --tiny      walks through its own logic on a CPU; its times mean nothing
#
# Correctness first: a section that fails or runs out of its time is named at the end, and the others still run. PYTHON
# names the interpreter (default: .venv/bin/python where there is one, else python3); fastpo need not be installed.
# Exit code: 0 all sections ran and all goals that were measured are met, else 1.
set -u
cd "$(dirname "$0")/.." || exit 1
DEVICE=cuda TINY= TRAIN=
while [ $# -gt 0 ]; do
  case $1 in
    --device) DEVICE=${2:?--device takes cpu or cuda}; shift ;;
    --tiny) TINY=1 ;;
    --train) TRAIN=1 ;;
    *) echo "unknown option $1; --device cpu|cuda, --tiny, --train" >&2; exit 2 ;;
  esac
  shift
done
if [ -z "${PYTHON:-}" ]; then if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi; fi
export PYTHONSAFEPATH=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 MPLBACKEND=Agg PYTHONUNBUFFERED=1
OUT=${OUT:-bench/results/$("$PYTHON" -c 'import sys; sys.path.append("bench"); import common; print(common.machine_name())')} || exit 1
mkdir -p "$OUT"
[ -n "$TRAIN" ] || rm -f "$OUT"/{ops,ours/ops,losses,sweep,kernels,goals}.json  # nothing of an earlier run is judged
FASTPO_CACHE=$(mktemp -d) || exit 1
export FASTPO_CACHE
trap 'rm -rf "$FASTPO_CACHE"' EXIT
BEGIN=$SECONDS LIMIT=${LIMIT:-450} FAILED=()

# section NAME SECONDS CMD...: the command with its output in $OUT/NAME.log, within its time and what is left of LIMIT
section() {
  local name=$1 limit=$2 left=$((LIMIT - SECONDS + BEGIN)) start=$SECONDS rc
  shift 2
  if [ "$left" -lt 5 ]; then
    echo "== $name: no time left"; FAILED+=("$name (no time left)"); return
  fi
  timeout -k 5 $((limit < left ? limit : left)) "$@" >"$OUT/$name.log" 2>&1
  rc=$?
  echo "== $name: exit code $rc in $((SECONDS - start)) s"
  tail -n "${TAIL:-4}" "$OUT/$name.log"
  if [ $rc = 124 ] || [ $rc = 137 ]; then FAILED+=("$name (cut off)"); elif [ $rc != 0 ]; then FAILED+=("$name (exit code $rc)"); fi
}

finish() {
  echo "results in $OUT after $((SECONDS - BEGIN)) s"
  if [ ${#FAILED[@]} -gt 0 ]; then
    printf 'did not succeed: %s\n' "${FAILED[@]}"
    exit 1
  fi
  exit 0
}

QUICK=${TINY:+--quick}
if [ -n "$TRAIN" ]; then  # results of these two go to bench/results/<machine>/
  if [ "$DEVICE" = cuda ]; then
    section attention_tests 90 "$PYTHON" -m pytest -q -m gpu --maxfail 5 tests/models/test_attention.py tests/models/test_tree_attention.py \
      tests/models/test_tree_attention_interpreter.py -p no:cacheprovider
    TAIL=30 section attention 80 "$PYTHON" bench/bench_attention.py --device cuda
    TAIL=20 section train 330 "$PYTHON" bench/train_vs_peers.py --device cuda --steps ${STEPS:-4} --repeats 1 \
      --scenario ${SCENARIOS:-1b_full_1024_256 1b_lora_64_512 8b_lora_1024_256}
  else
    TAIL=30 section attention 120 "$PYTHON" bench/bench_attention.py --tokens 1280 --rounds 2 --no-write
    TAIL=20 section train 240 "$PYTHON" bench/train_vs_peers.py --scenario synthetic --steps 1 --repeats 1 --no-write
  fi
  finish
fi
TAIL=20 section env 30 "$PYTHON" -m fastpo env
section check 90 "$PYTHON" -m fastpo check --device "$DEVICE" --quiet
if [ "$DEVICE" = cuda ]; then
  section tests 100 "$PYTHON" -m pytest -q -m gpu --maxfail 5 tests/ops/test_head.py tests/ops/test_kernels_interpreter.py -p no:cacheprovider
  section kernels 40 "$PYTHON" bench/gpu_goals.py kernels --out "$OUT" ${TINY:+--tiny}
else
  section kernels 60 env TRITON_INTERPRET=1 "$PYTHON" bench/gpu_goals.py kernels --device cpu --out "$OUT" --tiny
fi
# Ours alone first: a peer that breaks the device's context, or takes too long to compile, must not cost the goals.
section ours 60 "$PYTHON" bench/bench_ops.py --device "$DEVICE" --out "$OUT/ours" --seconds 5 $QUICK \
  --provider gemms_1 gemms_2 gemms_3 fastpo_none fastpo_frozen fastpo_kept fastpo_sliced naive
TAIL=60 section ops 150 "$PYTHON" bench/bench_ops.py --device "$DEVICE" --out "$OUT" --seconds 15 $QUICK
TAIL=20 section goals 30 "$PYTHON" bench/gpu_goals.py judge --device "$DEVICE" --out "$OUT"
section losses 50 "$PYTHON" bench/bench_losses.py --device "$DEVICE" --out "$OUT" --seconds 5 $QUICK
section sweep 60 "$PYTHON" bench/bench_ops.py --sweep --device "$DEVICE" --out "$OUT" --seconds 1 --rounds 3 $QUICK
LIMIT=$((LIMIT + 25))  # what was measured is drawn in any case
section report 25 "$PYTHON" bench/report.py --folder "$OUT" --output "$OUT/RESULTS.md"

finish
