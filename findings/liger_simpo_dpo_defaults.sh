#!/bin/sh
# liger_kernel 0.8.5: LigerFusedLinearSimPOLoss is by default not the SimPO loss but that plus the cross-entropy of the chosen
# answers (compute_nll_loss=True, alpha=1). LigerFusedLinearDPOLoss takes label_smoothing and, in the default
# loss_type="sigmoid", leaves it out without a word, where its SimPO loss applies it.
# Seen: liger_kernel 0.8.5: SimPO of the paper 5.018, chosen cross-entropy 6.687, LigerFusedLinearSimPOLoss 11.705;
#       label_smoothing 0, 0.3: DPO 1.143, 1.143, SimPO alone 5.018, 3.532
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 liger_kernel==0.8.5 triton==3.7.1 numpy==2.4.6
"$folder/venv/bin/python" -I - <<'PY'
import sys
from importlib.metadata import version

import torch
import torch.nn.functional as F
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearSimPOLoss

torch.manual_seed(0)
hidden, weight, target = torch.randn(4, 5, 8), torch.randn(16, 8), torch.randint(0, 16, (4, 5))  # 2 chosen, 2 rejected
reference = torch.randn(16, 8)
logps = F.linear(hidden, weight).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1).mean(1)
margin = 2.0 * (logps[:2] - logps[2:]) - 0.5
paper, entropy = -F.logsigmoid(margin).mean().item(), -logps[:2].mean().item()


def simpo(**options):
    return LigerFusedLinearSimPOLoss(beta=2.0, gamma=0.5, compiled=False, **options)(weight, hidden, target)[0].item()


def dpo(smoothing):
    loss = LigerFusedLinearDPOLoss(compiled=False, label_smoothing=smoothing)
    return loss(weight, hidden, target, ref_input=hidden, ref_weight=reference)[0].item()


default = simpo()
dpos = [dpo(smoothing) for smoothing in (0.0, 0.3)]
simpos = [simpo(label_smoothing=smoothing, compute_nll_loss=False) for smoothing in (0.0, 0.3)]
print(
    f"liger_kernel {version('liger_kernel')}: SimPO of the paper {paper:.3f}, chosen cross-entropy {entropy:.3f}, "
    f"LigerFusedLinearSimPOLoss {default:.3f}; label_smoothing 0, 0.3: DPO {dpos[0]:.3f}, {dpos[1]:.3f}, "
    f"SimPO alone {simpos[0]:.3f}, {simpos[1]:.3f}"
)
added = abs(default - paper - entropy) < 1e-3 and abs(simpos[0] - paper) < 1e-3
sys.exit(0 if added and dpos[0] == dpos[1] and abs(simpos[0] - simpos[1]) > 0.1 else 1)
PY
