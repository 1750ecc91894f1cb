#!/bin/sh
# transformers 5.23.0: Cohere2ForCausalLM multiplies its logits by logit_scale; the image-text models around the same text
# model, Aya Vision and Cohere2 Vision, leave text_config.logit_scale out. With the same weights and ids and logit_scale=0.25
# their logits are 4 times larger: the most likely token is the same, every probability is another.
# Seen: transformers 5.23.0, logit_scale=0.25: the logits of AyaVisionForConditionalGeneration are 4.000 times those of
#       Cohere2ForCausalLM, the logits of Cohere2VisionForConditionalGeneration are 4.000 times those of Cohere2ForCausalLM
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.23.0 numpy==2.4.6
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" -I - <<'PY'
import sys

import torch
import transformers

size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
text = dict(size, model_type="cohere2", vocab_size=64, num_key_value_heads=1, eos_token_id=2, logit_scale=0.25)
vision = dict(size, model_type="siglip_vision_model", image_size=28, patch_size=14)
ids = torch.arange(5, 13)[None]
ratios = []
for name in ("AyaVision", "Cohere2Vision"):
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(text_config=text, vision_config=vision, image_token_id=63)
    whole = getattr(transformers, name + "ForConditionalGeneration")(config).eval()
    alone = transformers.Cohere2ForCausalLM(whole.config.text_config).eval()
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    with torch.no_grad():
        ratio = (whole(input_ids=ids).logits.norm() / alone(input_ids=ids).logits.norm()).item()
    ratios.append(ratio)
    print(
        f"transformers {transformers.__version__}, logit_scale={whole.config.text_config.logit_scale}: the logits of "
        f"{type(whole).__name__} are {ratio:.3f} times those of {type(alone).__name__}"
    )
sys.exit(0 if all(abs(ratio - 4) < 0.01 for ratio in ratios) else 1)
PY
