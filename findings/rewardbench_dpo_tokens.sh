#!/bin/sh
# rewardbench 0.1.4: DPOInference, which scores DPO models by the log-ratio of the answer, tokenises texts that the tokenizer's
# chat template has written already, and adds to them what the template wrote: the model sees two BOS, and the answer whose
# log-probabilities are summed is the header of the assistant's turn, the answer, and two EOS. The second EOS follows the
# first one, where a chat model was never trained.
# Seen: rewardbench 0.1.4, transformers 4.51.0: input <s> <s> [USER] hi [BOT] yes </s> </s>; counted [BOT] yes </s> </s>
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==4.51.0 trl==0.17.0 datasets==4.0.0 \
    pandas==2.3.3 accelerate==1.6.0 sentencepiece==0.2.0
# Their other dependencies are trackers, linters and a web server.
"$folder/venv/bin/pip" install -q --no-compile --no-deps rewardbench==0.1.4 fschat==0.2.36
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME="$folder/hf" TRANSFORMERS_VERBOSITY=error \
    "$folder/venv/bin/python" -I - 2>"$folder/log" <<'PY' || { cat "$folder/log" >&2; exit 1; }
import sys
from types import SimpleNamespace

import rewardbench
import tokenizers
import transformers
from rewardbench.utils import prepare_dialogue_from_tokenizer

words = ["<pad>", "<s>", "</s>", "[USER]", "[BOT]", "hi", "yes", "no"]
core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
)
# As Llama's and Mistral's templates do, it writes BOS and the end of the answer itself.
tokenizer.chat_template = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %} [USER] {{ m['content'] }}"
    "{% else %} [BOT] {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)


class Model:  # tokenize_row asks no more of it
    config = SimpleNamespace(is_encoder_decoder=False)

    def eval(self):
        return self

    def requires_grad_(self, on):
        return self


row = prepare_dialogue_from_tokenizer({"prompt": "hi", "chosen": "yes", "rejected": "no"}, tokenizer)
batch = rewardbench.DPOInference(Model(), Model(), tokenizer, None).tokenize_row(row)
seen = " ".join(tokenizer.convert_ids_to_tokens(batch["chosen_input_ids"]))
counted = " ".join(tokenizer.convert_ids_to_tokens([i for i in batch["chosen_labels"] if i != -100]))
print(
    f"rewardbench {rewardbench.__version__}, transformers {transformers.__version__}: input {seen}; counted {counted}",
    flush=True,
)
as_stated = seen == "<s> <s> [USER] hi [BOT] yes </s> </s>" and counted == "[BOT] yes </s> </s>"
sys.exit(0 if as_stated else 1)
PY
