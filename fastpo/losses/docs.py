"""docs/losses.md and `fastpo losses [NAME]`, made from the table of fastpo/losses/table.py and the functions' docstrings."""
# ruff: noqa: E501  # one remark a line: it reads as the table it is

import inspect
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from fastpo.losses.table import ALIASES, LOSSES, SFT, Loss, canonical_name
from fastpo.losses.tokens import TokenLoss


class Note(NamedTuple):
    """What formula and defaults do not say. `unverified` is what nobody here has read in a primary source."""

    use: str
    differs: str = ""
    unverified: str = ""


_FLIPPED = "labels that are wrong now and then"
_LISTS = "Not in TRL. `fastpo.train` takes rows of differing K as they are."
_GPO_UNVERIFIED = "The formula is from knowledge of the paper, and beta is ours: neither was read in a primary source."
_IPO_UNVERIFIED = "The formula is from knowledge of the paper, not read in a primary source."
_LIVE = "The reference stays in memory: `ref_model`, or with a new adapter the base, or a copy of the trainable weights. A micro-batch takes its forward pass too, three more GEMMs of the head, and three or four in the backward. Not with fsdp or sync_ref_model, nor from the columns ref_chosen_logps and ref_rejected_logps."

# fmt: off
NOTES: dict[str, Note] = {
    "dpo": Note("the default: pairs, a reference, no better reason for another loss",
                "TRL 1.16 ignores `label_smoothing` here; ours is its earlier cDPO. The authors' config has RMSprop, 5e-7, 150 warm-up steps."),
    "cdpo": Note(_FLIPPED + "; its optimum is finite, at beta delta = logit(1 - e)",
                 "dpo with a default `label_smoothing`: the authors' README has 0.1, HALOs 0.2. TRL's `sigmoid` ignores the option."),
    "robust": Note("labels flipped with a known probability e",
                   "As TRL. e = 0, TRL's default, is dpo; recipes have 0.1. Negative and unbounded values are its nature, not a bug."),
    "dpo_soft": Note("a judge that gives probabilities instead of labels; one e per pair", "Not in TRL or Liger."),
    "ipo": Note("preferences near 0 or 1, on which dpo runs away; the optimum is finite",
                "`mean` is TRL's, whose authors confirmed it gave the paper's results; `sum` is eq. 17, the DPO authors' code, COMAL, OpenRLHF and TRL's online trainers. Liger refuses it."),
    "hinge": Note("a margin that is enough once reached", "As TRL. RSO's recipe has beta 0.05; the default here is TRL's 0.1."),
    "slic": Note("no reference and a bounded push, held near the chosen responses by their likelihood",
                 "Official SLiC regularises on a target response of its own; this is HALOs' form, on the chosen one. Not in TRL."),
    "sigmoid_norm": Note("dpo whose answers grow too long", "As TRL, which takes beta 0.1 unless told.", "The default beta 5 of Tulu 3 was not read in a primary source."),
    "simpo": Note("no reference in memory or time, and length bias to be kept low",
                  "TRL's CPO trainer has gamma itself (`simpo_gamma`) and adds an NLL by default (`cpo_alpha` 1). Liger's fused loss is alike, with gamma too. The authors' config defaults (ratio 0.25) are none of their recipes: beta 2 to 10, ratio 0.3 to 0.8."),
    "orpo": Note("supervised and preference training in one, without a reference",
                 "As TRL's experimental trainer and the authors: NLL over the prompt's tokens but the first and the chosen response, mean over tokens: over the whole step's, there over a micro-batch's. `disable_prompt_loss`, the authors' flag, leaves the prompt out. Liger's fused loss leaves the prompt out too unless given other targets, and does not keep p from 0."),
    "cpo": Note("no reference, good chosen responses: the NLL keeps their likelihood up", "As TRL's experimental trainer and ALMA; the NLL there is a mean over a micro-batch's tokens, here over the whole step's. Liger's fused loss has the same sigmoid term."),
    "cpo_hinge": Note("scripts of TRL's CPO trainer with loss_type hinge; a push that ends at the margin 1/beta", "As TRL's, beside the NLL as in cpo; slic is the same with the margin `delta` and without the factor beta."),
    "cpo_ipo": Note("scripts of TRL's CPO trainer with loss_type ipo; a margin of token means that is enough once reached", "As TRL's, beside the NLL as in cpo."),
    "cpo_simpo": Note("simpo that loses the chosen responses' likelihood", "The authors write gamma 5.4 at beta 10, which is the ratio 0.54."),
    "rpo": Note("dpo that loses the chosen responses' likelihood", "As TRL's `[sigmoid, sft]` with weights `[1, 0.005]`. Iterative RPO is `nll_reduction=seq_mean` with `rpo_alpha` 1.",
                "That the paper means sums per sequence (`seq_sum`) was not read in it."),
    "dpop": Note("pairs that differ by little, on which dpo lowers the chosen response too", "As in SamPO's code; not in TRL or Liger."),
    "rdpo": Note("dpo whose answers grow too long; the sign rewards a longer rejected response less", "The plus sign is SamPO's code (`lenN`) and what the regularised reward gives."),
    "exo_pair": Note("a start that is good already: it has no gradient where a pair is very wrong",
                     "As TRL, which needs `label_smoothing` set. The authors' labels are log-probabilities (0, -10), about e = 4.5e-5."),
    "exo_rw": Note("K responses with rewards", _LISTS),
    "nca_pair": Note("keeping the chosen likelihood up: its optimum is at beta a = ln 2", "As TRL and Liger."),
    "nca_rw": Note("K responses with rewards, and the likelihood of the best kept up", "The authors add 0.01 to the first response's score, which is not done here; temperature 1e-4 makes w one for the best. " + _LISTS),
    "infonca": Note("K responses with rewards; for two it is dpo", "The authors add 0.01 to the first response's score, which is not done here; temperature 1e-4 makes w one for the best. " + _LISTS),
    "apo_zero_unpaired": Note("thumbs up and down instead of pairs, without an estimate of a KL: chosen responses that are better than what the model would say", "As TRL's KTO trainer: weighted by `desirable_weight` and `undesirable_weight` as kto is."),
    "kto": Note("thumbs up and down instead of pairs", "`kl` is the mean log-ratio of the step's prompts with completions of other prompts, the next in the data, over all ranks; TRL and Liger estimate it in the micro-batch, Liger without the two weights.",
                "The rule to keep (desirable weight x count) / (undesirable weight x count) in [1, 4/3] was not read in a primary source."),
    "bco_pair": Note("pairs whose two sides should be judged apart", "TRL has `delta` 0, and its documentation prints dpo's formula; its code is this."),
    "bco": Note("thumbs up and down instead of pairs, with a running mean of rewards as shift", "`reward_mean` is the mean over all rows so far, this step's included, as in TRL's BCO trainer (gone from 1.16); the paper takes an exponential one; the weights for a mismatch of distributions are not built."),
    "apo_zero": Note("chosen responses that are better than what the model would say", "As TRL and Liger."),
    "apo_down": Note("chosen responses that are worse than what the model says already: both go down, the rejected further", "As TRL and Liger."),
    "aot": Note("preferences between distributions of margins instead of between pairs", "TRL sorts each rank's micro-batch; here the sort is over the whole step, of all ranks, in a pass ahead of the one that trains. A pair can have no `weight`."),
    "aot_unpaired": Note("as aot, without a pairing of chosen and rejected", "As aot."),
    "discopop": Note("trying a discovered loss; it is not convex just below 0", "As the authors and TRL, whose e^(-u) overflows in low precision far below 0; ours does not."),
    "wpo": Note("off-policy pairs, weighted by how likely the policy is to say them", "The authors cap the weight at 1; TRL's `use_weighting` does not (`clamp_weight=False`), and weighs any loss. In training the sums cost one more GEMM of the head without gradients."),
    "ld_dpo": Note("dpo whose answers grow too long", "As TRL's `ld_alpha`. `*_tail_logps` are the sums past the shorter response's length, within the full sums. Training needs the reference token by token: not the columns ref_chosen_logps and ref_rejected_logps. Logged rewards are of whole responses."),
    "sampo": Note("dpo whose answers grow too long", "The authors draw the tokens anew for policy and reference; here one draw serves both, by seed, step and row of the data; evaluations have one of their own. Training needs the reference token by token: not the columns ref_chosen_logps and ref_rejected_logps. Logged rewards are of whole responses."),
    "tdpo1": Note("a KL that is held token by token", _LIVE),
    "tdpo2": Note("a KL that is held token by token, the rejected response's above all", "The authors' default config has it off, their README recommends it. " + _LIVE),
    "gpo_logistic": Note("comparing convex losses on equal terms", "", _GPO_UNVERIFIED),
    "gpo_exp": Note("comparing convex losses on equal terms; harsh on outliers", "", _GPO_UNVERIFIED),
    "gpo_sq": Note("comparing convex losses on equal terms", "", _GPO_UNVERIFIED),
    "gpo_hinge": Note("comparing convex losses on equal terms", "", _GPO_UNVERIFIED),
    "gpo_tquad": Note("comparing convex losses on equal terms; smooth where hinge has its corner", "", _GPO_UNVERIFIED),
    "gpo_savage": Note("comparing losses on equal terms; mild on outliers, not convex", "", _GPO_UNVERIFIED),
    "fdpo": Note("another divergence from the reference than the reverse KL", "As TRL's `sigmoid` with `f_divergence_type`, of which it is the name here; TRL combines the option with other losses too. Exponents end at 80 in every dtype, where TRL casts to float32."),
    "alphapo": Note("simpo with a reward whose shape can be bent; alpha 0 is simpo", "TRL's CPO trainer with `alpha`, whose powers overflow where ours stop at e^80; gamma 0.1 at beta 2.5 is the ratio 0.04."),
    "sppo": Note("self-play with a judge: each response's win probability against the previous policy", "As the authors. Their estimate of p counts a response against itself. TRL and Liger have `sppo_hard` only."),
    "sppo_single": Note("as sppo, where only the pair itself was judged"),
    "sppo_hard": Note("scripts of TRL; twice sppo_single at p = 1", "As TRL and Liger: not the paper's loss, which has probabilities and a factor 1/2."),
    "dno": Note("self-play with a judge: pairs of the previous policy, labelled by their win probabilities", "No code was published; the paper's algorithm 1. It gives no eta: beta is DNO-Prct's 0.1.",
                "Its printed learning rate 5E-5 and \"alpha 0.005\" are undefined in the paper and not built in."),
    "dno_prct": Note("iterated dpo, the reference set to the previous iterate", "No code was published; the paper takes beta 0.1 or 0.05 and pairs by a judge's score.",
                     "Its printed learning rate 5E-5 and \"alpha 0.005\" are undefined in the paper and not built in."),
    "dno_reg": Note("dno towards the equilibrium of a regularised game, last iterate included", "No code was published; the paper's appendix A. kappa 1/3 is INPO's. In a first iteration previous policy and reference are both the start, and it is dno, or dno_prct."),
    "inpo": Note("self-play towards the equilibrium of a regularised game, with one squared loss", "As the paper and COMAL. It needs pairs sampled from the previous policy; best against worst of K biases it. In a first iteration previous policy and reference are both the start, and it is ipo (sum) with tau = eta. Rewards are log-ratios to the mixture of the two."),
    "online_ipo": Note("ipo on pairs sampled while training", "TRL's online trainer has the sum too.", _IPO_UNVERIFIED),
    "ipo_md": Note("online_ipo on samples held near the reference", "", _IPO_UNVERIFIED),
    "selm": Note("exploration: the reference's own greedy response is pushed down", "The authors' code has alpha beta, algorithm 1 of the paper prints alpha. alpha 1e-3 is their Zephyr recipe, 1e-4 Llama-3. As theirs, the sum over the greedy response is not divided by its length. It may be the chosen or the rejected response too."),
    "reward": Note("a reward model: a scalar head at the end of each response, for best-of-n, scoring and ensembles (docs/reward-models.md)",
                   "As TRL's RewardTrainer, whose mean is over a micro-batch's pairs, here over the whole step's; with rows of K responses every pair that `pair_policy` forms counts as one, and each response passes the model once. InstructGPT divides the loss of a prompt by its number of pairs: a column `weight` of 1/pairs does."),
    "degree_aux": Note("a term beside a loss of pairs that has the hidden states tell a whole response from one that lacks key phrases (docs/recipes/spo_degree.md)",
                       "Not in TRL or Liger. A linear head of the run's own, in fp32, from the seed, stepped at the same rate; after training it lies beside the model as degree_head.safetensors, and is no part of it. The authors' repository was empty. Not with fsdp or an optimiser that is passed in.",
                       "The number of degrees, the weight and which token's hidden state is read were not read in a primary source; 4 degrees are ours."),
    "xpo": Note("exploration while sampling: the reference's samples are pushed down", "One response of a pair is sampled from the policy, the other from the reference; `chosen_of_reference` says which. As TRL's XPO trainer (gone from 1.16); SELM subtracts the reference's term and scales by beta."),
    "reinforce": Note("the plain policy gradient, one update a batch", "TRL has no loss of that name; its RLOO trainer is this with a clipped ratio."),
    "rloo": Note("few responses a prompt, each compared with the mean of the others (`baseline` leave_one_out)",
                 "As TRL's RLOO trainer at beta 0, which takes the KL to the reference from the reward instead (`advantages(penalty=)`, `response_kl`, beta 0.05 there); here beta adds it to the loss. The paper has no ratio and no clip."),
    "grpo": Note("verifiable rewards or a reward model, G responses a prompt; the start from which the others differ",
                 "As TRL's `loss_type` grpo. TRL's default loss is dapo, its KL corrected by the ratio (`use_bias_correction_kl`), as DeepSeek-V3.2's.",
                 "That the paper's KL is not corrected and its beta 0.04 is from knowledge of it."),
    "dr_grpo": Note("responses that grow long because they are wrong: no length and no group's deviation scales them", "As TRL's; the paper's advantages are not scaled, which is `scale_rewards` none, not part of the loss."),
    "dapo": Note("long responses: each token counts the same, and rare tokens have more room upwards",
                 "`epsilon_high` is the paper's 0.28, where TRL's default is `epsilon`. The mean is over all tokens of the step; TRL's too, by its count of the batch that was generated."),
    "bnpo": Note("scripts of TRL", "TRL's mean is over a micro-batch's tokens, and depends on its size; here it is over the step's, so that bnpo is dapo with a symmetric clip."),
    "gspo": Note("mixtures of experts, and several updates a batch: one ratio a response",
                 "TRL's `loss_type` grpo with `importance_sampling_level` sequence. The defaults of `epsilon` and `epsilon_high` are the paper's, two hundredths of grpo's: a mean of log-ratios moves little."),
    "cispo": Note("several updates a batch, without losing the gradient of rare tokens",
                  "`epsilon_high` 5 is ScaleRL's, which TRL recommends; TRL's own default would bound the ratio at `epsilon`, 0.2.",
                  "The paper's own bounds, 1 - e and 1 + E of which only the upper is in use, are from knowledge of it."),
    "sapo": Note("several updates a batch, without the edge of a clip", "As TRL's, temperatures included."),
    "luspo": Note("gspo that prefers short responses", "As TRL's, with `importance_sampling_level` sequence and the paper's clip range, section 5.1 of it as TRL's documentation quotes it, as defaults; TRL's are token and 0.2.",
                  "The formula and the clip range were read in TRL's code and documentation, not in the paper."),
    "vespo": Note("responses of an older policy or another engine: a smooth weight of the whole response's ratio",
                  "As TRL's, but that a masked token has no part in the ratio's correction; f is a constant to the gradient."),
    "gmpo": Note("ratios of single tokens that are far off: the geometric mean of a response hardly moves", "As TRL's experimental GMPO trainer. `epsilon` is of the logarithm. A response without tokens that count is 0 here and -A there, without a gradient in both."),
    "nash_md": Note("self-play with a judge, on samples of the policy against the geometric mixture with the reference",
                    "TRL's Nash-MD trainer (gone from 1.16) has each token's own log-ratio in the KL (kl_level token), which leaves out what a token does to the KL of those after it, and beta 0.1.",
                    "The formula and tau 0.008 are from knowledge of the paper, not read in a primary source."),
}
# fmt: on


def _doc(function) -> str:
    return " ".join(inspect.getdoc(function).split())


def _value(value: object) -> str:
    if value is None:
        return "unset"
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _defaults(loss: Loss) -> str:
    return ", ".join(f"{k} {_value(v)}" for k, v in loss.defaults.items())


# Arguments in a word, for the table; those of a word are told once.
_WORDS = {
    "ref_chosen_logps": "reference", "ref_rejected_logps": "reference", "chosen_len": "lengths",
    "rejected_len": "lengths", "win_prob_chosen": "win probabilities", "win_prob_rejected": "win probabilities",
    "prev_chosen_logps": "previous policy", "prev_rejected_logps": "previous policy", "prompt_logps": "prompt",
    "prompt_len": "prompt", "chosen_log_sum_sq": "sums of squares", "rejected_log_sum_sq": "sums of squares",
    "chosen_kl": "token KL", "rejected_kl": "token KL", "greedy_logps": "greedy response",
    "ref_greedy_logps": "greedy response", "chosen_of_reference": "reference's sample", "label": "unpaired rows",
    "scores": "K scored responses", "degree": "rows with a degree", **{name: "tail sums" for name in LOSSES["ld_dpo"].needs},
}  # fmt: skip
_OF_THE_DATA = {"sampo": "drawn tokens", "aot": "whole step", "aot_unpaired": "whole step", "online_ipo": "own samples",
                "ipo_md": "own samples", "xpo": "own samples"}  # fmt: skip


def _arguments(loss: Loss) -> list[str]:
    """Arguments of the function beside the log-probabilities, with the default hyper-parameters."""
    if isinstance(loss, TokenLoss):
        return loss.needed(loss.defaults)
    names = [name for name in loss.needed(loss.defaults) if name != "rejected_logps"]
    return [*names, "win_prob"] if loss.pair_prob else names


def needs(loss: Loss) -> str:
    """The same in a few words."""
    if isinstance(loss, TokenLoss):
        return "own samples, advantages" + ", reference" * ("ref_logp" in _arguments(loss))
    words = [_WORDS.get(name, name) for name in _arguments(loss)]
    words += [_OF_THE_DATA[loss.name]] if loss.name in _OF_THE_DATA else []
    return ", ".join(dict.fromkeys(words)) or "-"


_REDUCTIONS = {
    "seq_mean": "mean over each response's tokens, then over the step's responses",
    "token_mean": "sum over the step's tokens, divided by their number",
    "constant": "sum over the step's tokens, divided by its responses times max_completion_length",
    "seq_sum": "sum over each response's tokens, mean over the step's responses",
}


def _trains(loss: Loss) -> str:
    if loss.online:
        return "online: the responses are drawn as it trains, from rows of prompts (docs/online.md)"
    if loss.previous:
        read = "; win_prob, or win_prob_chosen and win_prob_rejected, are read where the data have them"
        return (
            "yes, mixed with the reference before training; the previous policy is prev_model, or the columns "
            "prev_chosen_logps and prev_rejected_logps, or the policy as it is before training"
            + read
            * bool(loss.may_read)
        )
    if loss.shape == "lists":
        return "yes, on rows of K responses with scores, or on pairs with the columns chosen_score and rejected_score"
    if "greedy_logps" in loss.needs:
        return "yes, with the column greedy, a text or turns, or one of K responses marked greedy: true"
    if loss.shape == "degrees":
        return "yes, beside a loss of pairs, on rows of prompt, completion and the column degree whose column loss names it"
    if loss.shape == "scores":
        return "yes, a model with a scalar head; margin is read where the data have it"
    if not loss.columns:
        return "yes"
    # An alternative that stands in for every column comes first: "win_prob, or win_prob_chosen and win_prob_rejected".
    shared = [name for name in loss.columns[0] if all(name in names for names in loss.columns)]
    own = [" or ".join(name for name in names if name not in shared) for names in loss.columns]
    words = [*shared, " and ".join(own)] if all(own) else shared
    return f"yes, with the column {', or '.join(words)}"


def entry(loss: Loss) -> dict[str, str]:
    """What there is to say of a loss, in order."""
    note = NOTES[loss.name]
    of_tokens = isinstance(loss, TokenLoss)
    out = {
        "loss of a token" if of_tokens else "loss of a pair": _doc(loss.fn),
        "gradient" if of_tokens else "coefficients": _doc(loss.gradient),
        "reduction": f"{loss.reduction}: {_REDUCTIONS[loss.reduction]}" if isinstance(loss, TokenLoss) else "",
        "paper": f"https://arxiv.org/abs/{loss.paper}", "defaults": _defaults(loss),
        "needs": ", ".join(_arguments(loss)),
        "trains": _trains(loss), "use": note.use, "differences": note.differs, "unverified": note.unverified,
    }  # fmt: skip
    return {k: v for k, v in out.items() if v}


_TOP = """\
# Losses

Made by `python -m fastpo.losses.docs > docs/losses.md`; the tests compare. `fastpo losses` prints the table, `fastpo losses
NAME` one entry.

`loss_type` names one, or several with `loss_weights`. Options that are fields of `TrainConfig` (`beta`,
`label_smoothing`, ...) are set by name, every other hyper-parameter through `loss_kwargs`; what is left unset is the
loss's default. Each is a function of its own, on any float dtype, differentiable, with its gradient in closed form:

```python
from fastpo.losses import LOSSES

losses = LOSSES["simpo"](chosen_logps, rejected_logps, chosen_len=n_w, rejected_len=n_l, beta=2.5)  # [P]
d_chosen, d_rejected = LOSSES["simpo"].coefficients(chosen_logps, rejected_logps, chosen_len=n_w, rejected_len=n_l)
```

Notation: lw, ll the log-probabilities of the chosen and the rejected response (sums over tokens), rw, rl the
reference's, tw, tl the previous policy's; n_w, n_l lengths in tokens; a = lw - rw, b = ll - rl, delta = a - b; s the
sigmoid, s'(u) = s(u) s(-u); e `label_smoothing`. The coefficients c_w = dL/dlw and c_l = dL/dll are per pair; a token's
log-probability gets its response's.

A loss with an NLL of the chosen response divides it as `nll_reduction` says: `token_mean` by the mean length of the
pairs (in training: all chosen tokens of the step, as an `sft` term), `seq_mean` by the response's own, `seq_sum` by
nothing. `sft`, the NLL alone, can be added to any loss and reads `nll_reduction` too. None of them depends on how a step
was accumulated or packed.

Each pair's losses are weighted by the column `weight`. `chosen_token_weights` and `rejected_token_weights`, a list of
numbers from 0 on for each response, one a token (as tokenised, with its end of sequence), weigh tokens: one of weight w
counts as w tokens in sums, lengths and NLLs, of policy and reference alike; 0 leaves a token out.

`orpo`'s NLL is over the prompt too, all its tokens but the first, each of weight 1: the head then runs on the prompts
of chosen responses as well. Where K responses share a prompt, it counts once for each that is preferred.

Rows of K `responses` ([training.md](training.md#k-responses-a-prompt)) give pairs, which every loss of pairs takes; the
`win_prob` of each response, its probability of beating the previous policy, is what `sppo`, `dno` and `dno_reg` read.
`exo_rw`, `infonca` and `nca_rw` read whole lists: their loss is a mean over the rows of the step, of any K; rewards and
accuracies are those of the best and the worst by score. They can be summed with losses of that pair.

Several losses are summed over all rows, unless rows say which of them is theirs: in the column `loss`, an entry of
`loss_type`, which then every row has.

```json
{"prompt": "...", "chosen": "...", "rejected": "...", "loss": "dpo", "weight": 0.6}
{"prompt": "...", "chosen": "...", "rejected": "...", "loss": "ipo", "weight": 0.2}
{"prompt": "...", "completion": "...", "loss": "sft"}
```

Such a row is trained by that loss alone, times the loss's own weight, and needs the columns that this loss reads. The sum
of the losses of pairs is divided by the pairs of the step, whichever loss each of them names, so that a row counts the
same whatever else is in its step; an NLL is a mean over the chosen tokens of the rows that name its loss. A row of `sft`
trains on its `completion`, or on its `chosen` response (of K responses: those that win a pair); the others do not go
through the model. `weight` weighs it too. A row of `degree_aux` has a `completion` and a whole number `degree`, from 0 to
one less than `loss_kwargs={"degrees": ...}`; its loss is a mean over these rows of the step. Every row then names its
loss, in an evaluation set only where there are such rows; `degree/loss` and `degree/accuracy` are logged. Rewards are
of all pairs, with the beta of the first loss that has a reference.
Losses that read a number of the whole step (`aot`, `aot_unpaired`, `kto`, `bco`), whole lists (`exo_rw`, `infonca`,
`nca_rw`) or unpaired rows cannot be named beside others, which is an error. The reference scores every row, those of
losses without one too.

Unpaired losses take one response a row, [S], and K-response losses [P, K], both as first argument (and
`ref_chosen_logps`). A previous policy that is a loss's only reference is read from `ref_*`.
In training `inpo` and `dno_reg` mix previous policy and reference into one number a response, so they cannot be summed
with a loss that reads the reference alone.

`reward` trains a scalar head instead of a language model's ([reward-models.md](reward-models.md)): the rewards stand in
the place of the log-probabilities, and it cannot be summed with other losses.

`kto`, `apo_zero_unpaired` and `bco` train on rows of `prompt`, `completion` and `label` (true: desirable), or on pairs,
each as two rows. What `kto`, `bco` and `aot` read of the whole step is exact for any cut into micro-batches and ranks. `bco` and `aot` pay a forward
pass more where a step has several micro-batches, `kto` one over its mismatched rows. An evaluation set counts as one step.
"""


_TOP_TOKENS = """\
# Losses per token

Of responses that the policy itself sampled, each with an advantage. They stand alone: none can be added to another loss.
Formulas and defaults were read in TRL 1.16's code and documentation, which name the papers; what was not is marked.

```python
from fastpo.losses import LOSSES
from fastpo.losses.advantages import advantages, correction
from fastpo.losses.tokens import Totals

a = advantages(rewards, groups).values  # [S] of rewards [S, F] and the prompt of each response [S]
totals = Totals(tokens, responses, max_completion_length)  # of the whole step, over all micro-batches and ranks
loss = LOSSES["grpo"](logp, a, offsets, totals=totals, old_logp=old_logp, ref_logp=ref_logp, beta=0.04)  # []
d_logp = LOSSES["grpo"].coefficients(logp, a, offsets, totals=totals, old_logp=old_logp)  # [N]
```

Notation: p the policy's probability of a token, q that of the policy that sampled, as our own pass has it (`old_logp`;
without it q is p, and the ratio is 1 with a gradient); A the advantage of its response, n the response's tokens; r = p/q,
or with `importance_sampling_level` sequence the geometric mean of p/q over the response, a number of which each token has
1/n; e `epsilon`, E `epsilon_high` (e where unset); sg() is constant. The gradient is dl/dlog p of a token, of the level
sequence that of the response's n tokens together, of which each has an equal share.

The step's loss is the sum over tokens of a share times l. The share is what `reduction` says of the whole step, so that
the losses of micro-batches and ranks add up to the step's, whatever their cut and packing. l is the term of the table;
where it is given it is multiplied by `correction` (weights against the sampler's own log-probabilities; `correction` of
fastpo.losses.advantages makes them as TRL's `vllm_importance_sampling_*` do), by `policy_mask` (tokens of high entropy),
and by 0 for a response of negative advantage whose tokens are on average `off_policy_mask_threshold` nats likelier to the
policy that sampled. With `beta` above 0, beta KL is added, estimated from the token as `kl_estimator` says with
d = log p_reference - log p: `k1` -d, `k2` d^2/2, `k3` e^d - d - 1; with `use_bias_correction_kl` times r (of `rloo`,
`reinforce` and `gmpo` the token's p/q), which is differentiated too. `mask` leaves tokens out of everything, lengths and
totals included; a response that is masked out whole still counts among the responses. A clipped ratio has no gradient; at
the bound itself it has. Exponents end at 40.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def page() -> str:
    """docs/losses.md."""
    of_tokens = [x for x in LOSSES.values() if isinstance(x, TokenLoss)]
    of_pairs = [x for x in LOSSES.values() if not isinstance(x, TokenLoss)]
    return "\n".join([*_section(_TOP, of_pairs), *_section(_TOP_TOKENS, of_tokens)])


def _section(top: str, losses: Sequence[Loss]) -> list[str]:
    rows = [
        f"| [`{x.name}`](#{x.name}) | {_defaults(x)} | {needs(x)} | {'online' if x.online else 'yes'} |" for x in losses
    ]
    parts = [top, "| name | defaults | needs | fastpo.train |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"]
    for loss in losses:
        alias = ", ".join(f"`{a}`" for a, name in ALIASES.items() if name == loss.name)
        lines = []
        for key, text in entry(loss).items():
            text = f"`{text}`" if key == "defaults" else _cell(text)
            lines.append(f"| {key} | {text} |")
        parts.append(f"## {loss.name}\n\n" + (f"Also {alias}.\n\n" if alias else "") + "| | |\n| --- | --- |\n"
                     + "\n".join(lines) + "\n")  # fmt: skip
    return parts


_SFT_TEXT = (
    f"{SFT}: negative log-likelihood of the chosen responses, mean over all their tokens in the step; nll_reduction "
    "seq_mean or seq_sum: of each response's mean or sum, mean over the responses."
)


def text(name: str | None = None) -> str:
    """What `fastpo losses [NAME]` prints. ConfigError naming the nearest for an unknown name."""
    if name is None:
        rows = [("NAME", "TRAINS", "NEEDS", "DEFAULTS")]
        rows += [(x.name, "online" if x.online else "yes", needs(x), _defaults(x)) for x in LOSSES.values()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3]]) for row in rows]
        return "\n".join([*lines, _SFT_TEXT, "`fastpo losses NAME` tells more of one."])
    name = canonical_name(name)
    if name == SFT:
        return _SFT_TEXT
    lines = [name]
    for key, value in entry(LOSSES[name]).items():
        lines += textwrap.wrap(
            f"{key + ':':<16}{value}", 110, initial_indent="  ", subsequent_indent=" " * 18, break_on_hyphens=False
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
