"""What is done to a model around training: dropout off, checkpointing on, modes and devices put back as they were."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import enable_full_determinism

from fastpo import data
from fastpo.adapters import is_quantized
from fastpo.config import TrainConfig
from fastpo.errors import DataError
from fastpo.model import Policy


def set_numerics(config: TrainConfig) -> None:
    """PyTorch's global switches that the configuration names."""
    if config.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    if config.full_determinism:
        enable_full_determinism(config.seed)


def disable_dropout(model: nn.Module) -> None:
    """Every dropout probability to zero: the modules', and those that attention layers keep as a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # attention_dropout, residual_dropout, resid_pdrop, layerdrop, ...
            if isinstance(value, float) and ("drop" in name):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def training_mode(policy: Policy, config: TrainConfig) -> Iterator[None]:
    """The model as training needs it: packed attention, train mode, checkpointing; put back afterwards."""
    model = policy.model
    was_training = model.training
    model.train()
    already = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if config.gradient_checkpointing and not already:
        _checkpointing(policy.causal_lm, {"use_reentrant": False, **(config.gradient_checkpointing_kwargs or {})})
    try:
        with policy.attach():
            yield
    finally:
        model.train(was_training)
        if config.gradient_checkpointing and not already:
            _checkpointing(policy.causal_lm, None)


def _checkpointing(model: nn.Module, kwargs: dict | None) -> None:
    """Switch it on with `kwargs`, or off; transformers 5.12 renamed the methods."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if kwargs is None:
        getattr(model, f"{name}_checkpointing_disable")()
        model.disable_input_require_grads()  # type: ignore[operator]  # which enabling it has hooked into the embeddings
    else:
        getattr(model, f"{name}_checkpointing_enable")(kwargs)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A reference model where and how it is needed; put back afterwards, so that it holds no device memory."""
    home = next(model.parameters()).device
    with eval_mode(model):
        if not is_quantized(model):
            model.to(device)
        try:
            yield
        finally:
            if not is_quantized(model):
                model.to(home)


def check_ids(policy: Policy, examples: Sequence[data.Example], name: str) -> None:
    """Token ids and positions must exist in the model: on a GPU the look-up of one that does not is a lost context."""
    rows = policy.causal_lm.get_input_embeddings().weight.shape[0]
    largest = max(int(ids.max()) for e in examples for ids in (e.prompt_ids, *e.responses))
    if largest >= rows:
        raise DataError(
            f"the {name} data hold token id {largest}, but the model has {rows} embeddings: "
            "call model.resize_token_embeddings(len(tokenizer)), or use the model's own tokenizer"
        )
    positions = ("wpe", "embed_positions")
    learnt = [
        module.num_embeddings
        for path, module in policy.trunk.named_modules()
        if path.rpartition(".")[2] in positions and isinstance(module, nn.Embedding)
    ]
    longest = max(len(e.prompt_of(k)) + len(r) for e in examples for k, r in enumerate(e.responses))
    if learnt and longest > min(learnt):
        raise DataError(
            f"the {name} data hold a row of {longest} tokens, the model has {min(learnt)} positions: set max_length"
        )
