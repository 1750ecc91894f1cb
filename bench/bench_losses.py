"""Hidden states to a preference loss and all gradients: ours, plain PyTorch and Liger's chunked losses.

    python bench/bench_losses.py [--quick] [--shape N,D,V] [--provider fastpo_dpo liger_dpo]

DPO and SimPO of four pairs without a reference; N = head rows in equal responses, D = hidden, V = vocabulary. Ours is
`linear_logprob` and `preference_loss`. What a row is: harness.py; what each provider does: peers.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
import harness  # noqa: E402
from peers import PROVIDERS  # noqa: E402

SHAPES = {"cpu": [(1024, 512, 32000)], "cuda": [(4096, 4096, 128256)]}
QUICK = [(64, 64, 4099)]


def main() -> int:
    args = harness.arguments(__doc__).parse_args()
    names = ["gemms_3", *(name for name, provider in PROVIDERS.items() if provider.level == "loss")]
    return harness.run(args, QUICK if args.quick else SHAPES[args.device], names, "losses")


if __name__ == "__main__":
    sys.exit(main())
