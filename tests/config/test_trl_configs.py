"""TRL's arguments objects beside DPOConfig: each field has a meaning here or is refused, and the loss is TRL's."""

import dataclasses
import warnings

import pytest

from fastpo.config import migration, options
from fastpo.config.train_config import TrainConfig, field_names
from fastpo.config.trl_configs import CLASSES
from fastpo.errors import ConfigError
from fastpo.losses.table import resolve_terms

trl = pytest.importorskip("trl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.gmpo import GMPOConfig
    from trl.experimental.online_dpo import OnlineDPOConfig
    from trl.experimental.orpo import ORPOConfig

CLASS = {"DPOConfig": trl.DPOConfig, "KTOConfig": trl.KTOConfig, "CPOConfig": CPOConfig, "ORPOConfig": ORPOConfig,
         "RewardConfig": trl.RewardConfig, "GRPOConfig": trl.GRPOConfig, "RLOOConfig": trl.RLOOConfig,
         "GMPOConfig": GMPOConfig, "OnlineDPOConfig": OnlineDPOConfig}  # fmt: skip


def made(name, **given):
    return CLASS[name](output_dir="out", use_cpu=True, report_to="none", **given)


def built(name, **given):
    return TrainConfig.build(made(name, **given))


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_is_accounted_for(name):
    own = CLASSES[name][1]
    fields = {f.name: f for f in dataclasses.fields(CLASS[name])}
    assert set(own) <= set(fields)
    for field, option in own.items():
        default = fields[field].default
        if default is dataclasses.MISSING:
            default = fields[field].default_factory()
        assert default == option.default, field
    assert not [f for f in fields if f not in own and f not in options.OPTIONS]
    for option in own:
        assert f"| `{option}` |" in migration.page()


def test_the_class_says_the_loss():
    config = built("KTOConfig", desirable_weight=1.5)
    assert config.loss_type == "kto" and config.train_sampling_strategy == "sequential"
    assert config.loss_kwargs == {"desirable_weight": 1.5, "undesirable_weight": 1.0}
    assert built("KTOConfig", loss_type="apo_zero_unpaired").loss_type == "apo_zero_unpaired"
    assert built("KTOConfig", train_sampling_strategy="random").train_sampling_strategy == "random"
    config = built("ORPOConfig", beta=0.3, learning_rate=8e-6)
    assert (config.loss_type, config.beta, config.learning_rate) == ("orpo", 0.3, 8e-6)
    assert built("DPOConfig").losses == ["sigmoid"]


@pytest.mark.parametrize(
    "given, loss, beta, kwargs, ratio, weights",
    [
        ({}, "cpo", 0.1, {"cpo_alpha": 1.0}, None, None),
        ({"loss_type": "hinge", "cpo_alpha": 0.0}, "cpo_hinge", 0.1, {"cpo_alpha": 0.0}, None, None),
        ({"loss_type": "ipo", "beta": 0.5}, "cpo_ipo", 0.5, {"cpo_alpha": 1.0}, None, None),
        ({"loss_type": "simpo", "beta": 2.0}, "cpo_simpo", 2.0, {"cpo_alpha": 1.0}, 0.25, None),
        ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.1}, "simpo", 0.1, None, 1.0, None),
        ({"loss_type": "alphapo", "alpha": 0.25, "beta": 2.5}, "alphapo", 2.5, {"alpha": 0.25}, 0.2, None),
        ({"loss_type": "simpo", "alpha": 0.25}, ["alphapo", "sft"], 0.1, {"alpha": 0.25}, 5.0, [1.0, 1.0]),
    ],
)
def test_cpo(given, loss, beta, kwargs, ratio, weights):
    config = built("CPOConfig", **given)
    assert (config.loss_type, config.beta, config.loss_kwargs) == (loss, beta, kwargs)
    assert config.gamma_beta_ratio == (None if ratio is None else pytest.approx(ratio))
    assert config.loss_weights == weights
    resolve_terms(config.losses, config.loss_weights, loss_kwargs=config.loss_kwargs, beta=config.beta,
                  gamma_beta_ratio=config.gamma_beta_ratio)  # fmt: skip


@pytest.mark.parametrize(
    "name, given, message",
    [
        (
            "CPOConfig",
            {"loss_type": "sigmoid", "alpha": 0.5},
            "alpha=0.5 with loss_type='sigmoid' .* set loss_type='alphapo'",
        ),
        ("CPOConfig", {"max_completion_length": 5}, "max_completion_length=5 is not honoured"),
        ("ORPOConfig", {"is_encoder_decoder": True}, "causal language models only"),
        ("ORPOConfig", {"generate_during_eval": True}, "set sample_generations"),
        ("KTOConfig", {"router_aux_loss_coef": 0.1, "neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 is not"),
    ],
)
def test_what_is_not_built_is_refused(name, given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        built(name, **given)
    assert "\n" not in str(caught.value)


def test_other_trainers_arguments_are_refused():
    with pytest.raises(ConfigError, match="args is a SFTConfig, whose defaults mean another loss; pass a DPOConfig"):
        TrainConfig.build(trl.SFTConfig(output_dir="out", use_cpu=True, report_to="none"))
    with pytest.raises(ConfigError, match="a TRL config such as DPOConfig, not int"):
        TrainConfig.build(3)


def test_overrides_go_on_top():
    config = TrainConfig.build(made("CPOConfig", beta=0.2), loss_type="simpo", loss_kwargs={}, learning_rate=1e-5)
    assert (config.loss_type, config.beta, config.learning_rate) == ("simpo", 0.2, 1e-5)
    assert set(field_names()) >= {"loss_kwargs"}
