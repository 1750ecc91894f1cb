#!/bin/sh
# datasets 5.2.0 reads JSON texts that look like dates as timestamps; asking for strings with features= does not give the
# texts back, it gives the timestamps written out. A column of answers such as "2024-01-02" is trained as another text.
# Seen: datasets 5.2.0: '2024-01-02' is datetime.datetime(2024, 1, 2, 0, 0), with features=string '2024-01-02 00:00:00'
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" "$folder/venv/bin/python" - "$folder" <<'END'
import json, sys

import datasets

path = sys.argv[1] + "/rows.jsonl"
with open(path, "w") as file:
    file.write(json.dumps({"answer": "2024-01-02"}) + "\n")
load = dict(data_files=path, split="train", cache_dir=sys.argv[1] + "/cache")
plain = datasets.load_dataset("json", **load)[0]["answer"]
features = datasets.Features({"answer": datasets.Value("string")})
asked = datasets.load_dataset("json", features=features, **load)[0]["answer"]
print(f"datasets {datasets.__version__}: '2024-01-02' is {plain!r}, with features=string {asked!r}")
sys.exit(0 if asked == "2024-01-02 00:00:00" and not isinstance(plain, str) else 1)
END
