#!/bin/sh
# transformers.set_seed (with everything else of transformers.trainer_utils, and so TrainerCallback and get_scheduler)
# imports PEFT where that is installed, PEFT imports bitsandbytes where that is, and bitsandbytes imports torch's inductor:
# a script that only sets a seed loads a compiler. It shows in every start of every process of a job.
# Seen: transformers 5.23.0, peft 0.20.0, bitsandbytes 0.50.0: set_seed alone imports peft, bitsandbytes and
# torch._inductor.compile_fx; without bitsandbytes in reach inductor stays out
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.20.0 bitsandbytes==0.50.0
cat > "$folder/look.py" <<'END'
import sys
import time

if "without" in sys.argv:
    sys.modules["bitsandbytes"] = None
    import importlib.util

    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
import torch

start = time.perf_counter()
from transformers import set_seed  # noqa: E402,F401

names = ("peft", "bitsandbytes", "torch._inductor.compile_fx")
there = [name for name in names if sys.modules.get(name) is not None]
print(f"{' '.join(sys.argv[1:]):8s} set_seed imports {there}, {time.perf_counter() - start:.1f} s")
sys.exit(there != ["peft"] if "without" in sys.argv else there != list(names))
END
"$folder/venv/bin/python" "$folder/look.py" with
"$folder/venv/bin/python" "$folder/look.py" without
