#!/bin/sh
# transformers 5.23.0: a model with rope_type "dynamic" remembers the longest row that it has seen. In eval mode the logits of a
# row longer than max_position_embeddings are those of the longest row before it, in whatever call or batch that was, until a
# row shorter than max_position_embeddings comes by. References, evaluations and caches of log-probabilities depend on the order.
# Seen: transformers 5.23.0, dynamic RoPE over 32 positions: log-probabilities of a row of 40, largest difference from a fresh
#       model: again 0.000, after a row of 120 6.722, after a row of 40 6.722, after a row of 20 0.000
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.23.0 numpy==2.4.6
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" -I - 2>"$folder/log" <<'PY' || { cat "$folder/log" >&2; exit 1; }
import sys

import torch
import transformers

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    initializer_range=0.2, max_position_embeddings=32,
    rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
)
model = transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def logps(length):
    return model(torch.arange(length)[None] % 64, use_cache=False).logits.log_softmax(-1)


fresh = logps(40)
seen = {}
for name, before in (("again", 40), ("after a row of 120", 120), ("after a row of 40", 40), ("after a row of 20", 20)):
    logps(before)
    seen[name] = (logps(40) - fresh).abs().max().item()
print(
    f"transformers {transformers.__version__}, dynamic RoPE over 32 positions: log-probabilities of a row of 40, largest "
    f"difference from a fresh model: {', '.join(f'{name} {value:.3f}' for name, value in seen.items())}"
)
again, longer, still, short = seen.values()
sys.exit(0 if again == 0 and longer > 0.1 and still == longer and short == 0 else 1)
PY
