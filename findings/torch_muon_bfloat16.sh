#!/bin/sh
# torch 2.13.0: torch.optim.Muon(nesterov=False) scales the momentum buffer of bfloat16 weights to norm 1 at every step, in
# place (its bfloat16 copy of the momentum is the momentum itself). Small gradients then never turn it: 200 steps towards the
# minimum of a quadratic run through it and away, where float32, float16 and bfloat16 with nesterov=True come to rest.
# Seen: torch 2.13.0: |W| from 2.0 after 200 Muon steps to W=0 (norm of the momentum): float32 0.022 (0.00012),
#       float16 0.055 (0.00009), bfloat16 4.312 (1.00000), bfloat16 nesterov 0.031 (0.00001)
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -I - <<'PY'
import sys

import torch


def train(dtype, nesterov):
    weight = torch.nn.Parameter(torch.eye(4, dtype=dtype))
    optimizer = torch.optim.Muon([weight], lr=0.02, weight_decay=0.0, nesterov=nesterov)
    for _ in range(200):
        optimizer.zero_grad()
        (0.005 * weight.square().sum()).backward()
        optimizer.step()
    return weight.float().norm().item(), optimizer.state[weight]["momentum_buffer"].float().norm().item()


runs = {
    "float32": train(torch.float32, False),
    "float16": train(torch.float16, False),
    "bfloat16": train(torch.bfloat16, False),
    "bfloat16 nesterov": train(torch.bfloat16, True),
}
seen = ", ".join(f"{name} {weight:.3f} ({momentum:.5f})" for name, (weight, momentum) in runs.items())
print(f"torch {torch.__version__.split('+')[0]}: |W| from 2.0 after 200 Muon steps to W=0 (norm of the momentum): {seen}")
weight, momentum = runs.pop("bfloat16")
right = all(w < 0.2 and m < 0.01 for w, m in runs.values())
sys.exit(0 if right and weight > 2 and abs(momentum - 1) < 0.02 else 1)
PY
