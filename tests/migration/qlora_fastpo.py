"""An adapter on a base in 4 bits, as in TRL's pages on PEFT and quantisation."""

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import DPOConfig

import fastpo

dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

training_args = DPOConfig(
    output_dir="Qwen3-0.6B-DPO-QLoRA",
    learning_rate=5.0e-6,
    loss_type=["sigmoid", "sft"],
    loss_weights=[1.0, 0.2],
    per_device_train_batch_size=4,
    num_train_epochs=1,
    logging_steps=1,
    lr_scheduler_type="cosine",
    warmup_steps=0.1,
)

fastpo.train(
    model="Qwen/Qwen3-0.6B",
    args=training_args,
    train_dataset=dataset,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    ),
    peft_config=LoraConfig(r=32, lora_alpha=16, target_modules="all-linear"),
)
