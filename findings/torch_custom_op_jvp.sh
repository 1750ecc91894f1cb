#!/bin/sh
# torch 2.13.0: forward-mode derivatives of a torch.library.custom_op that has register_autograd (backward only) are 0, with
# no error: torch.func.jvp gives 0 for 6 and so does jacfwd. The same square as a torch.autograd.Function raises
# NotImplementedError from jvp, which is what one expects of an operation without a forward-mode formula.
# Seen: torch 2.13.0: x*x at 3: backward 6.0, jvp of the custom_op 0.0, jacfwd of the custom_op 0.0,
#       jvp of the autograd.Function NotImplementedError
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -I - <<'PY'
import sys

import torch


@torch.library.custom_op("finding::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def backward(ctx, grad):
    return 2 * ctx.saved_tensors[0] * grad


square.register_autograd(backward, setup_context=keep)


class Square(torch.autograd.Function):
    forward, setup_context, backward = (staticmethod(f) for f in (lambda x: x * x, keep, backward))


x, one = torch.tensor(3.0), torch.tensor(1.0)
leaf = x.clone().requires_grad_()
square(leaf).backward()
jvp = torch.func.jvp(square, (x,), (one,))[1].item()
jacfwd = torch.func.jacfwd(square)(x).item()
try:
    function = torch.func.jvp(Square.apply, (x,), (one,))[1].item()
except NotImplementedError as error:
    function = type(error).__name__
print(
    f"torch {torch.__version__.split('+')[0]}: x*x at 3: backward {leaf.grad.item()}, jvp of the custom_op {jvp}, jacfwd of "
    f"the custom_op {jacfwd}, jvp of the autograd.Function {function}"
)
sys.exit(0 if (leaf.grad.item(), jvp, jacfwd, function) == (6, 0, 0, "NotImplementedError") else 1)
PY
