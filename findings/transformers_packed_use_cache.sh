#!/bin/sh
# transformers 5.23.0: position_ids that begin again at 0 keep the rows of a packed batch apart under sdpa and eager attention,
# but only while no key-value cache is made: with the default use_cache=True the second row attends to the first, with no
# warning, and only its positions begin anew. Gradient checkpointing switches the cache off in train mode, so that the same
# call on the same model keeps rows apart while it trains and mixes them when it evaluates.
# Seen: transformers 5.23.0, log-probabilities of the second of two packed rows beside the row alone, largest difference:
#       sdpa: train 7.968, train with gradient checkpointing 0.000, eval 7.968, eval with use_cache=False 0.000
#       eager: train 7.968, train with gradient checkpointing 0.000, eval 7.968, eval with use_cache=False 0.000
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.23.0 numpy==2.4.6
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" -I - 2>"$folder/log" <<'PY' || { cat "$folder/log" >&2; exit 1; }
import sys

import torch
import transformers

first, second = torch.arange(5, 11)[None], torch.arange(30, 35)[None]
ids = torch.cat([first, second], 1)
positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
print(
    f"transformers {transformers.__version__}, log-probabilities of the second of two packed rows beside the row alone, "
    "largest difference:"
)
as_stated = True
for attention in ("sdpa", "eager"):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, attn_implementation=attention,
    )
    model = transformers.LlamaForCausalLM(config)

    def off(**options):
        packed = model(ids, position_ids=positions, **options).logits[:, 6:].log_softmax(-1)
        return (packed - model(second).logits.log_softmax(-1)).abs().max().item()

    train = off()
    model.gradient_checkpointing_enable()
    checkpointed = off()
    model.eval()
    evaluated = off()
    uncached = off(use_cache=False)
    print(
        f"{attention}: train {train:.3f}, train with gradient checkpointing {checkpointed:.3f}, eval {evaluated:.3f}, "
        f"eval with use_cache=False {uncached:.3f}"
    )
    as_stated &= min(train, evaluated) > 1 and max(checkpointed, uncached) < 1e-3
sys.exit(0 if as_stated else 1)
PY
