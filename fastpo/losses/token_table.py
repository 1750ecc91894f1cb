"""The entries of the losses per token, with TRL's names of hyper-parameters; docs/losses.md says where a default is the
paper's and TRL has another.
"""

from typing import Any

from fastpo.losses import token_functions as f
from fastpo.losses.tokens import TokenLoss


def _shared(reduction: str, **more: Any) -> dict[str, Any]:
    kl = {"beta": 0.0, "kl_estimator": "k3", "use_bias_correction_kl": True}
    return {**more, **kl, "off_policy_mask_threshold": None, "reduction": reduction} | {
        name: more[name] for name in kl if name in more
    }


def _clip(reduction: str, **more: Any) -> dict[str, Any]:
    own = {"epsilon": 0.2, "epsilon_high": None, "delta": None, "importance_sampling_level": "token"}
    return _shared(reduction, **(own | more))


TOKEN_LOSSES = (
    TokenLoss("reinforce", f.reinforce, f.d_reinforce, "2402.14740", _shared("seq_sum")),
    TokenLoss("rloo", f.rloo, f.d_rloo, "2402.14740", _shared("seq_sum", epsilon=0.2, epsilon_high=None),
              inside=("policy_mask",)),
    TokenLoss("grpo", f.grpo, f.d_grpo, "2402.03300", _clip("seq_mean")),
    TokenLoss("dr_grpo", f.dr_grpo, f.d_grpo, "2503.20783", _clip("constant")),
    TokenLoss("dapo", f.dapo, f.d_grpo, "2503.14476", _clip("token_mean", epsilon_high=0.28)),
    TokenLoss("bnpo", f.bnpo, f.d_grpo, "2506.02864", _clip("token_mean")),
    TokenLoss("gspo", f.gspo, f.d_grpo, "2507.18071",
              _clip("seq_mean", epsilon=3e-4, epsilon_high=4e-4, importance_sampling_level="sequence")),
    TokenLoss("cispo", f.cispo, f.d_cispo, "2506.13585",
              _shared("token_mean", epsilon_high=5.0, importance_sampling_level="token")),
    TokenLoss("sapo", f.sapo, f.d_sapo, "2511.20347",
              _shared("seq_mean", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
                      importance_sampling_level="token")),
    TokenLoss("luspo", f.luspo, f.d_grpo, "2602.05261",
              _clip("seq_sum", epsilon=2e-3, epsilon_high=2.5e-3, importance_sampling_level="sequence")),
    TokenLoss("vespo", f.vespo, f.d_vespo, "2602.10693",
              _shared("token_mean", vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
                      importance_sampling_level="token"), inside=("correction",)),
    TokenLoss("gmpo", f.gmpo, f.d_gmpo, "2507.20673",
              _shared("seq_mean", epsilon=0.4, epsilon_high=None, use_bias_correction_kl=False),
              inside=("policy_mask",)),
    TokenLoss("nash_md", f.nash_md, f.d_nash_md, "2312.00886",
              {"beta": 0.008, "kl_level": "sequence", "reduction": "seq_sum"}),
)  # fmt: skip
