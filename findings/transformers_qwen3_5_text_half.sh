#!/bin/sh
# transformers 5.23.0: AutoModelForCausalLM.from_pretrained on an image-text checkpoint gives the whole model for Gemma 3, but
# for Qwen3.5 the text half alone, without a warning and without unexpected keys in the loading info. Trained and saved, that
# is another kind of checkpoint: AutoModelForImageTextToText does not take it back.
# Seen: transformers 5.23.0: Gemma3ForConditionalGeneration (49 parameters) is loaded as Gemma3ForConditionalGeneration (49),
#       warnings: none, unexpected keys: 0, saved again and loaded as image-text: Gemma3ForConditionalGeneration
#       transformers 5.23.0: Qwen3_5ForConditionalGeneration (35 parameters) is loaded as Qwen3_5ForCausalLM (14),
#       warnings: none, unexpected keys: 0, saved again and loaded as image-text: ValueError
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.23.0 numpy==2.4.6
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" HF_HUB_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" -I - "$folder" 2>"$folder/log" <<'PY' || { cat "$folder/log" >&2; exit 1; }
import logging
import sys
import warnings

import transformers

size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
text = dict(size, vocab_size=64, num_key_value_heads=1, head_dim=16)
gemma = transformers.Gemma3Config(
    text_config=text, vision_config=dict(size, image_size=28, patch_size=14), mm_tokens_per_image=4
)
qwen = transformers.Qwen3_5Config(
    text_config=dict(text, layer_types=["full_attention"]),
    vision_config=dict(
        depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, num_position_embeddings=16
    ),
)


class Said(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def count(model):
    return len(list(model.parameters()))


seen = []
for whole in (transformers.Gemma3ForConditionalGeneration(gemma), transformers.Qwen3_5ForConditionalGeneration(qwen)):
    name = type(whole).__name__
    first, second = (f"{sys.argv[1]}/{name}-{i}" for i in (1, 2))
    whole.save_pretrained(first)
    said = Said()
    transformers.utils.logging.add_handler(said)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(first, output_loading_info=True)
    transformers.utils.logging.remove_handler(said)
    spoken = said.messages + [str(warning.message) for warning in warned]
    loaded.save_pretrained(second)
    try:
        back = type(transformers.AutoModelForImageTextToText.from_pretrained(second)).__name__
    except ValueError:
        back = "ValueError"
    unexpected = len(info["unexpected_keys"])
    print(
        f"transformers {transformers.__version__}: {name} ({count(whole)} parameters) is loaded as "
        f"{type(loaded).__name__} ({count(loaded)}), warnings: {spoken or 'none'}, unexpected keys: {unexpected}, "
        f"saved again and loaded as image-text: {back}"
    )
    seen.append((type(loaded).__name__, count(loaded) == count(whole), bool(spoken), unexpected, back))
gemma = "Gemma3ForConditionalGeneration"
wanted = [(gemma, True, False, 0, gemma), ("Qwen3_5ForCausalLM", False, False, 0, "ValueError")]
sys.exit(0 if seen == wanted else 1)
PY
