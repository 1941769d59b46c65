"""Settings of the learning rules that are valid and do nothing in this run: worth a word."""

from collections.abc import Collection, Iterator

from zk0bot.config.models import RunConfig
from zk0bot.config.spelling import kebab


def find_idle(config: RunConfig, given: Collection[str]) -> Iterator[str]:
    """A line for each setting among ``given`` (field names) that has no effect, with the reason;
    and for rules that cannot act in so few rounds or with so few clients."""
    for fields, switch, is_on in _switches(config):
        for name in fields:
            if name in given and not is_on:
                yield f"{kebab(name)} has no effect without {switch}"
    yield from _find_unreachable(config)


def _switches(config: RunConfig) -> tuple[tuple[tuple[str, ...], str, bool], ...]:
    """Details, what switches them on, and whether it does."""
    has_lr, has_mu = config.adaptive_lr_enabled, config.adaptive_mu_enabled
    scheduler = config.scheduler_type
    return (
        (
            ("cosine_warm_restarts_t_0", "cosine_warm_restarts_t_mult"),
            "scheduler-type=cosine_warm_restarts",
            scheduler == "cosine_warm_restarts",
        ),
        (
            ("stall_patience",),
            "scheduler-type=reduce_on_plateau",
            scheduler == "reduce_on_plateau",
        ),
        (
            ("high_loss_multiplier", "lr_boost_factor", "adjustment_window"),
            "adaptive-lr-enabled",
            has_lr,
        ),
        (("loss_std_threshold", "mu_adjust_factor", "mu_min"), "adaptive-mu-enabled", has_mu),
        (
            ("spike_threshold", "max_adjust_factor"),
            "adaptive-lr-enabled or adaptive-mu-enabled",
            has_lr or has_mu,
        ),
    )


def _find_unreachable(config: RunConfig) -> Iterator[str]:
    rounds, first = config.num_server_rounds, config.cosine_warm_restarts_t_0
    if config.scheduler_type == "cosine_warm_restarts" and first >= rounds:
        yield (
            f"cosine-warm-restarts-T-0 = {first} is no less than num-server-rounds = {rounds}: "
            "there is no restart"
        )
    least = config.high_loss_multiplier
    if (
        config.adaptive_lr_enabled
        and config.lr_boost_factor > 1
        and least >= config.min_fit_clients
    ):
        yield (
            f"high-loss-multiplier = {least:g}: no loss is that many times the mean with "
            f"{least:g} clients or fewer"
        )
