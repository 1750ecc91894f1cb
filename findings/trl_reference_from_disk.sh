#!/bin/sh
# trl 1.16.0: DPOTrainer(model) without ref_model documents the reference as "the model state before DPO training starts", and
# loads it anew from the folder that the model came from. A model that was changed in memory (merged, trained on, edited) is
# compared with the old weights: the first loss is not ln 2 = 0.6931. precompute_ref_log_probs=True, offered for memory, takes
# the model in memory instead, and another loss is trained.
# Seen: trl 1.16.0, transformers 5.23.0, first loss and reward margin: as loaded 0.6931 (0.000), changed in memory
#       0.6201 (0.152), changed in memory with precompute_ref_log_probs 0.6931 (0.000)
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 trl==1.16.0 transformers==5.23.0 datasets==5.2.0 \
    accelerate==1.15.0 tokenizers==0.23.3 numpy==2.4.6
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME="$folder/hf" TRANSFORMERS_VERBOSITY=error \
    "$folder/venv/bin/python" -I - "$folder" 2>"$folder/log" <<'PY' || { cat "$folder/log" >&2; exit 1; }
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
rows = datasets.Dataset.from_list([{"prompt": "a b ", "chosen": "c d", "rejected": "e f g"}] * 4)


def first(scale, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder + "/model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    args = trl.DPOConfig(
        output_dir=folder + "/run", use_cpu=True, bf16=False, max_steps=1, logging_steps=1, save_strategy="no", **options
    )
    trainer = trl.DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    line = trainer.state.log_history[0]
    return line["loss"], line["rewards/margins"]


loaded, changed, ahead = first(1.0), first(1.2), first(1.2, precompute_ref_log_probs=True)
print(
    f"trl {trl.__version__}, transformers {transformers.__version__}, first loss and reward margin: as loaded "
    f"{loaded[0]:.4f} ({loaded[1]:.3f}), changed in memory {changed[0]:.4f} ({changed[1]:.3f}), changed in memory with "
    f"precompute_ref_log_probs {ahead[0]:.4f} ({ahead[1]:.3f})",
    file=stdout,
    flush=True,
)
ln2 = 0.6931
as_stated = abs(loaded[0] - ln2) < 1e-3 and abs(ahead[0] - ln2) < 1e-3 and abs(changed[0] - ln2) > 0.01
sys.exit(0 if as_stated else 1)
PY
