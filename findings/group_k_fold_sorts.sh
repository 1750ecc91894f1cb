#!/bin/sh
# scikit-learn below 1.9: GroupKFold, which has no seed and does not shuffle, makes other folds on another processor where
# groups are of one size. It orders them with numpy's default sort, which is not stable and is another algorithm on
# processors with AVX2 than without (on ARM, say). 1.9 sorts stably, so an upgrade changes the folds too. AlpacaEval's
# length-controlled win rate chooses its penalty by these folds: 805 instructions, two rows each.
# NPY_DISABLE_CPU_FEATURES, an environment variable that numpy documents, stands for a processor without AVX2.
# Seen: numpy 2.2.6, a processor with AVX2: scikit-learn 1.8.0: 614 of 805 groups are in another fold without AVX2;
#       scikit-learn 1.9.1: 0 of 805; 1.9.1 against 1.8.0: 600 of 805
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 1.8.0 1.9.1; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q --no-compile scikit-learn==$version numpy==2.2.6 scipy==1.17.1
done
cat > "$folder/folds.py" <<'PY'
import json

import numpy as np
from sklearn.model_selection import GroupKFold

rows = np.tile(np.arange(805), 2)
fold = np.zeros(805, dtype=int)
for number, (_, tested) in enumerate(GroupKFold(5).split(rows, groups=rows)):
    fold[rows[tested]] = number
print(json.dumps(fold.tolist()))
PY
vectors="AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
for version in 1.8.0 1.9.1; do
    "$folder/$version/bin/python" -I -W ignore "$folder/folds.py" > "$folder/$version.with"
    NPY_DISABLE_CPU_FEATURES="$vectors" "$folder/$version/bin/python" -W ignore "$folder/folds.py" > "$folder/$version.without"
done
"$folder/1.9.1/bin/python" -I - "$folder" <<'PY'
import itertools
import json
import sys

import numpy as np

folder = sys.argv[1]
old, old_without, new, new_without = (
    json.load(open(f"{folder}/{name}")) for name in ("1.8.0.with", "1.8.0.without", "1.9.1.with", "1.9.1.without")
)


def apart(a, b):
    """Groups that are in another fold, whatever the folds' numbers."""
    return min(sum(x != order[y] for x, y in zip(a, b)) for order in itertools.permutations(range(5)))


features = np._core._multiarray_umath.__cpu_features__
has = "with" if features.get("AVX2") else "without"
print(
    f"numpy {np.__version__}, a processor {has} AVX2: scikit-learn 1.8.0: {apart(old, old_without)} of {len(old)} groups are "
    f"in another fold without AVX2; scikit-learn 1.9.1: {apart(new, new_without)} of {len(new)}; 1.9.1 against 1.8.0: "
    f"{apart(new, old)} of {len(old)}"
)
right = (apart(old, old_without) > 0) == (has == "with") and not apart(new, new_without) and apart(new, old) > 0
sys.exit(0 if right else 1)
PY
