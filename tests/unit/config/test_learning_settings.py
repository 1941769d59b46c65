"""Settings of the learning rules: names, ranges, contradictions, and what would do nothing."""

import pytest

from zk0bot.config.load import Sources, load_run
from zk0bot.config.models import RunConfig
from zk0bot.errors import ConfigError

PLATEAU = ("scheduler-type=reduce_on_plateau", "eval-frequency=1")
FEDPROX = ("strategy=fedprox", "proximal-mu=0.01")


def load(*pairs: str) -> RunConfig:
    return load_run(Sources(pairs=pairs), {}).config


@pytest.mark.parametrize(
    ("first", "multiple"),
    [
        ("cosine-warm-restarts-T-0", "cosine-warm-restarts-T-mult"),
        ("cosine_warm_restarts_T_0", "cosine_warm_restarts_T_mult"),
        ("cosine-warm-restarts-t-0", "cosine_warm_restarts_t_mult"),
    ],
)
def test_zk0s_capital_letter_counts_for_nothing(first: str, multiple: str) -> None:
    config = load("scheduler-type=cosine_warm_restarts", f"{first}=4", f"{multiple}=1.5")
    assert (config.cosine_warm_restarts_t_0, config.cosine_warm_restarts_t_mult) == (4, 1.5)


def test_defaults_are_off_and_zk0s() -> None:
    config = load()
    assert not config.adaptive_lr_enabled and not config.adaptive_mu_enabled
    assert not config.follows_heldout_loss and not config.round_warmup_steps
    assert (config.cosine_warm_restarts_t_0, config.stall_patience) == (15, 5)
    assert (config.high_loss_multiplier, config.lr_boost_factor) == (2.0, 1.15)
    assert (config.loss_std_threshold, config.mu_adjust_factor, config.mu_min) == (1.2, 1.05, 0.001)
    assert (config.adjustment_window, config.spike_threshold) == (5, 0.5)
    assert config.max_adjust_factor == 1.05


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (("cosine-warm-restarts-T-mult=0.9",), "restarts-T-mult: input should be greater than or"),
        (("cosine-warm-restarts-T-mult=nan",), "cosine-warm-restarts-T-mult"),
        (("cosine-warm-restarts-T-0=0",), "cosine-warm-restarts-T-0"),
        (("lr-boost-factor=0.8",), "lr-boost-factor: input should be greater than or equal to 1"),
        (("high-loss-multiplier=1",), "high-loss-multiplier: input should be greater than 1"),
        (("mu-adjust-factor=1",), "mu-adjust-factor"),
        (("loss-std-threshold=0",), "loss-std-threshold"),
        (("spike-threshold=-1",), "spike-threshold"),
        (("max-adjust-factor=0.5",), "max-adjust-factor"),
        (("stall-patience=0",), "stall-patience"),
        (("mu-min=2",), "mu-min"),
        (("scheduler-type=cosine-restarts",), "scheduler-type: input should be 'constant', "),
        (("adjustment-window=1",), "adjustment-window=1 shows no trend: set 2 or more"),
        (("round-warmup-steps=21",), "round-warmup-steps=21 is above local-steps=20"),
        (PLATEAU[:1], "follows the held-out loss of every round, eval-frequency is 5: set eval-f"),
        ((*PLATEAU[:1], "eval-frequency=0"), "eval-frequency is 0: set eval-frequency=1"),
        ((*PLATEAU, "adaptive-lr-enabled=true"), "both lower the rate .* set adjustment-window=0"),
        (("adaptive-mu-enabled=true",), "no effect with strategy=fedavgm: set strategy=fedprox"),
        (("adaptive-mu-enabled=true", FEDPROX[0], "proximal-mu=1.5"), "is above 1, the most that"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(pairs: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(*pairs)


def test_what_goes_together_is_accepted() -> None:
    load(*PLATEAU, "adaptive-lr-enabled=true", "adjustment-window=0")
    load(*FEDPROX, "adaptive-mu-enabled=true", "adaptive-lr-enabled=true")
    load("round-warmup-steps=21", "local-epochs=1")


@pytest.mark.parametrize(
    ("pairs", "follows"),
    [
        (PLATEAU, True),
        (("adaptive-lr-enabled=true", "eval-frequency=1"), True),
        (("adaptive-lr-enabled=true",), False),
        (("eval-frequency=1",), False),
    ],
)
def test_rules_follow_the_held_out_loss_where_it_is_measured_each_round(
    pairs: tuple[str, ...], follows: bool
) -> None:
    assert load(*pairs).follows_heldout_loss == follows


@pytest.mark.parametrize(
    ("pairs", "notices"),
    [
        (
            ("stall-patience=4", "cosine-warm-restarts-T-0=9"),
            (
                "cosine-warm-restarts-T-0 has no effect without "
                "scheduler-type=cosine_warm_restarts",
                "stall-patience has no effect without scheduler-type=reduce_on_plateau",
            ),
        ),
        (("mu-min=0.1",), ("mu-min has no effect without adaptive-mu-enabled",)),
        (
            ("spike-threshold=1",),
            ("spike-threshold has no effect without adaptive-lr-enabled or adaptive-mu-enabled",),
        ),
        ((*PLATEAU, "stall-patience=4"), ()),
        ((*FEDPROX, "adaptive-mu-enabled=true", "spike-threshold=1", "mu-min=0.1"), ()),
        (
            ("adaptive-lr-enabled=true",),
            (
                "high-loss-multiplier = 2: no loss is that many times the mean with 2 clients or "
                "fewer",
            ),
        ),
        (("adaptive-lr-enabled=true", "high-loss-multiplier=1.4"), ()),
        (
            ("scheduler-type=cosine_warm_restarts", "cosine-warm-restarts-T-0=20"),
            (
                "cosine-warm-restarts-T-0 = 20 is no less than num-server-rounds = 20: there is no "
                "restart",
            ),
        ),
    ],
)
def test_what_does_nothing_is_said(pairs: tuple[str, ...], notices: tuple[str, ...]) -> None:
    assert load_run(Sources(pairs=pairs), {}).notices == notices
