#!/bin/sh
# trl 1.16.0: disable_dropout=True, DPOTrainer's default, sets the modules of class torch.nn.Dropout to 0. The attention dropout
# of transformers' Llama (Qwen, Mistral, ...) is a number in each layer and stays on: the first loss is not ln 2 = 0.6931, and
# is the same to the last bit with the option off. The lora_dropout that was asked for in peft's LoraConfig is such a module:
# it is gone.
# Seen: trl 1.16.0, transformers 5.23.0, peft 0.21.2, attention_dropout=0.2, lora_dropout=0.3: first loss with disable_dropout
#       0.7424, without 0.7424; dropout of the LoRA layers with it 0.0, without it 0.3
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 trl==1.16.0 transformers==5.23.0 datasets==5.2.0 peft==0.21.2 \
    accelerate==1.15.0 tokenizers==0.23.3 numpy==2.4.6
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME="$folder/hf" TRANSFORMERS_VERBOSITY=error \
    "$folder/venv/bin/python" -I - "$folder" 2>"$folder/log" <<'PY' || { cat "$folder/log" >&2; exit 1; }
import sys

import datasets
import peft
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
    initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=1, attention_dropout=0.2,
)
transformers.LlamaForCausalLM(config).save_pretrained(folder + "/model")
rows = datasets.Dataset.from_list([{"prompt": "a b ", "chosen": "c d", "rejected": "e f g"}] * 4)
lora = peft.LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj"])


def trainer(disable_dropout, peft_config=None):
    args = trl.DPOConfig(
        output_dir=folder + "/run", use_cpu=True, bf16=False, max_steps=1, logging_steps=1, save_strategy="no",
        disable_dropout=disable_dropout,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder + "/model")
    return trl.DPOTrainer(
        model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
    )


losses, dropouts = [], []
for disable_dropout in (True, False):
    full = trainer(disable_dropout)
    full.train()
    losses.append(full.state.log_history[0]["loss"])
    modules = trainer(disable_dropout, lora).model.named_modules()
    dropouts.append({float(module.p) for name, module in modules if name.endswith("lora_dropout.default")})
print(
    f"trl {trl.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, attention_dropout=0.2, "
    f"lora_dropout=0.3: first loss with disable_dropout {losses[0]:.4f}, without {losses[1]:.4f}; dropout of the LoRA "
    f"layers with it {', '.join(map(str, dropouts[0]))}, without it {', '.join(map(str, dropouts[1]))}",
    file=stdout,
    flush=True,
)
as_stated = losses[0] == losses[1] and abs(losses[0] - 0.6931) > 0.001 and dropouts == [{0.0}, {0.3}]
sys.exit(0 if as_stated else 1)
PY
