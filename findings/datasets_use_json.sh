#!/bin/sh
# datasets 5.2.0: from_list(..., on_mixed_types="use_json"), made for chat contents that are now a text, now a list of parts,
# parses the texts too: an answer "4" comes back as the number 4 and '{"sum": 4}' as a dict, plain texts stay. Parquet written
# from it holds JSON: pyarrow 26.0.1 reads the content "hello" as '"hello"' with quotation marks, and 4 cannot be told from "4".
# Seen: datasets 5.2.0, pyarrow 26.0.1: given ['hello', '4', '{"sum": 4}', [{'type': 'text', 'text': 'hi'}]],
#       datasets has ['hello', 4, {'sum': 4}, [{'type': 'text', 'text': 'hi'}]],
#       pyarrow reads ['"hello"', '4', '{"sum": 4}', '[{"type":"text","text":"hi"}]']
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" "$folder/venv/bin/python" -I - "$folder" 2>"$folder/log" <<'PY' || { cat "$folder/log" >&2; exit 1; }
import sys

import datasets
import pyarrow
import pyarrow.parquet

given = ["hello", "4", '{"sum": 4}', [{"type": "text", "text": "hi"}]]
rows = datasets.Dataset.from_list([{"content": content} for content in given], on_mixed_types="use_json")
rows.to_parquet(sys.argv[1] + "/rows.parquet")
read = [row["content"] for row in pyarrow.parquet.read_table(sys.argv[1] + "/rows.parquet").to_pylist()]
has = list(rows["content"])
print(
    f"datasets {datasets.__version__}, pyarrow {pyarrow.__version__}: given {given},\n"
    f"datasets has {has},\npyarrow reads {read}"
)
same = has == ["hello", 4, {"sum": 4}, given[3]] and read[:2] == ['"hello"', "4"] and isinstance(read[3], str)
sys.exit(0 if same else 1)
PY
