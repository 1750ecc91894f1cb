#!/bin/sh
# transformers serve: a request with `temperature` is answered greedily. The server takes the number into its generation
# config and leaves `do_sample` as the model's folder has it, false by default, and nothing is said: eight seeds give one
# text, so K "samples" of a prompt are K copies. `generation_config={"do_sample": true, ...}` in the request's body samples.
# Seen: transformers 5.23.0, torch 2.13.0, fastapi 0.165.0: temperature 1.0 and 2.0: 1 text of 8 seeds; with do_sample: 8
set -e
folder=$(mktemp -d)
trap 'kill "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 fastapi==0.165.0 \
    uvicorn==0.54.0 openai==3.57.0
cat > "$folder/make.py" <<'END'
import sys

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = "abcdefghijklmnopqrstuvwxyz "
inner = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token=" "))
inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=" ", eos_token=" ", pad_token=" ")
fast.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
fast.save_pretrained(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(vocab_size=27, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     bos_token_id=None, eos_token_id=None, pad_token_id=26)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
END
cat > "$folder/ask.py" <<'END'
import json
import sys
import time
import urllib.request

port, model = sys.argv[1:]


def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120).read()


for _ in range(120):
    try:
        ask("/health")
        break
    except OSError:
        time.sleep(1)


def texts(**more):
    out = set()
    for seed in range(8):
        body = {"model": model, "messages": [{"role": "user", "content": "abc"}], "max_tokens": 12, "seed": seed, **more}
        out.add(json.loads(ask("/v1/chat/completions", {**body, "stream": False}))["choices"][0]["message"]["content"])
    return len(out)


sampled = json.dumps({"do_sample": True, "top_k": 0})
found = [texts(temperature=1.0), texts(temperature=2.0), texts(temperature=1.0, generation_config=sampled)]
print("different texts of 8 seeds: temperature 1, temperature 2, temperature 1 with do_sample:", found)
sys.exit(found[:2] != [1, 1] or found[2] < 6)
END
"$folder/venv/bin/python" "$folder/make.py" "$folder/model"
port=$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
HF_HUB_OFFLINE=1 "$folder/venv/bin/transformers" serve "$folder/model" --host 127.0.0.1 --port "$port" > "$folder/log" 2>&1 &
server=$!
"$folder/venv/bin/pip" list 2>/dev/null | grep -iE "^(torch|transformers|fastapi|uvicorn) "
"$folder/venv/bin/python" "$folder/ask.py" "$port" "$folder/model" || { tail -5 "$folder/log"; exit 1; }
