"""Parts of the recipe from flags, as `lbaccel train` makes them."""

from __future__ import annotations

from lbaccel.recipe import rate
from lbaccel.recipe.checks import check_read, check_scaling, checked
from lbaccel.recipe.optimizer import build_optimizer, build_schedule
from lbaccel.recipe.settings import read_settings


def settings_of(*flags):
    """The settings that these flags ask for, checked."""
    return checked(read_settings([str(flag) for flag in flags])[0])


def rate_of(settings, *, batch):
    """The peak rate of settings at a global batch."""
    check_read(settings)
    check_scaling(settings.rate, settings.batch, noise_scale=settings.run.noise_scale)
    return rate.rate_of(settings, global_batch_size=batch)


def optimizer_of(settings, model, *, stream, say=lambda _: None):
    """Optimizer, schedule and peak rate, as `build_training` puts them together."""
    peak = rate_of(settings, batch=stream.global_batch_size)
    for line in rate.lines_of(settings.rate, peak):
        say(line)
    schedule = build_schedule(
        settings.rate, rate=peak, stream=stream, steps_at=settings.rate.milestones
    )
    optimizer = build_optimizer(settings.optimizer, model, rate=peak, fused=False, say=say)
    return optimizer, schedule, peak
