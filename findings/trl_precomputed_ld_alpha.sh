#!/bin/sh
# trl 1.16.0 with datasets 5.2.0: precomputed reference log-probabilities are found again by the data and the weights alone.
# ld_alpha, which they depend on, is not part of that: with max_length=None a second run with another ld_alpha trains against
# the first run's numbers, and its first loss is not ln 2 = 0.6931. At the default max_length the hash of a filter that names
# the whole configuration is, by chance, part of the data's: there a new learning_rate alone computes all of them again.
# Seen: trl 1.16.0, datasets 5.2.0, max_length=None: first loss with ld_alpha=0.0 after a run without 1.6190, alone 0.6931;
#       passes of the reference for a second learning_rate: max_length=None 0, max_length=1024 1
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 trl==1.16.0 transformers==5.23.0 datasets==5.2.0 \
    accelerate==1.15.0 tokenizers==0.23.3 numpy==2.4.6
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME="$folder/hf" TRANSFORMERS_VERBOSITY=error \
    "$folder/venv/bin/python" -I - "$folder" 2>"$folder/log" <<'PY' || { cat "$folder/log" >&2; exit 1; }
import json
import sys

import datasets
import tokenizers
import torch
import transformers
import trl

folder = sys.argv[1]
stdout, sys.stdout = sys.stdout, sys.stderr  # the trainer's own lines
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefghijklmn"])}, "<pad>")
    ),
    pad_token="<pad>", eos_token="<eos>",
)
tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
)
transformers.LlamaForCausalLM(config).save_pretrained(folder + "/model")
with open(folder + "/rows.jsonl", "w") as file:
    for _ in range(4):
        file.write(json.dumps({"prompt": "a b ", "chosen": "c d", "rejected": "e f g h i j"}) + "\n")


class Trainer(trl.DPOTrainer):
    passes = 0

    def compute_ref_log_probs(self, *args):
        self.passes += 1
        return super().compute_ref_log_probs(*args)


def run(cache, **options):
    rows = datasets.load_dataset("json", data_files=folder + "/rows.jsonl", split="train", cache_dir=folder + cache)
    args = trl.DPOConfig(
        output_dir=folder + "/run", use_cpu=True, bf16=False, max_steps=1, logging_steps=1, save_strategy="no",
        precompute_ref_log_probs=True, **options,
    )
    trainer = Trainer(folder + "/model", args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer.state.log_history[0]["loss"], trainer.passes


run("/one", max_length=None)
after, _ = run("/one", max_length=None, ld_alpha=0.0)
alone, _ = run("/other", max_length=None, ld_alpha=0.0)
passes = []
for max_length in (None, 1024):
    run("/one", max_length=max_length, learning_rate=1e-6)
    passes.append(run("/one", max_length=max_length, learning_rate=2e-6)[1])
print(
    f"trl {trl.__version__}, datasets {datasets.__version__}, max_length=None: first loss with ld_alpha=0.0 after a run "
    f"without {after:.4f}, alone {alone:.4f}; passes of the reference for a second learning_rate: max_length=None "
    f"{passes[0]}, max_length=1024 {passes[1]}",
    file=stdout,
    flush=True,
)
sys.exit(0 if abs(after - 0.6931) > 0.01 and abs(alone - 0.6931) < 1e-3 and passes == [0, 1] else 1)
PY
