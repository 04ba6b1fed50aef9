"""Reports the memory, arithmetic and time of a run without running it, and settings that fit.

The training step is compiled from shapes alone; no batch, parameters or optimizer state are
allocated, and no data is needed.
"""

import dataclasses
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cwm_jax.coinrun import FRAME_SHAPE
from cwm_jax.data import splits
from cwm_jax.data.clips import OUTCOMES
from cwm_jax.errors import UserError
from cwm_jax.experiment.settings import Settings
from cwm_jax.models import flops, kernel_choice
from cwm_jax.runtime import device_speed, sharding
from cwm_jax.training import train_step

_GIB = 2**30


class Memory(NamedTuple):
    """Bytes that a compiled step needs on each device."""

    state: int  # inputs: parameters, optimizer, average, batch
    working: int  # temporary arrays of the step

    @property
    def total(self) -> int:
        return self.state + self.working


def compile_step(settings: Settings):
    """The compiled training step of a run, from shapes alone; raises the errors of compilation."""
    mesh = sharding.make_mesh(settings.compute.fsdp)
    clips = sharding.global_batch_size(
        settings.data.batch_size,
        settings.data.global_batch_size,
        parts=settings.compute.accumulate_steps,
    )
    fresh = lambda: train_step.init_state(settings.model, settings.optimizer, settings.seed)
    state = sharding.abstract(jax.eval_shape(fresh), mesh)
    shape = clips, settings.training_data.clip_len
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.by_clip(mesh))
    batch = {"frames": place((*shape, *FRAME_SHAPE), jnp.uint8), "actions": place(shape, jnp.int32)}
    if settings.model.heads:
        batch["pressed"] = place(shape, jnp.int32)
        batch |= {name: place(shape, jnp.float32) for name in OUTCOMES}
    teacher = None
    if settings.distil_from:
        make = lambda params: train_step.init_teacher(
            settings.model, params, settings.sampler.ddim_steps
        )
        teacher = sharding.abstract(jax.eval_shape(make, state.params), mesh)
    lowered = train_step.train_step.lower(
        state,
        batch,
        jax.eval_shape(lambda: jax.random.key(0)),
        settings.setup(mesh),
        teacher=teacher,
    )
    return lowered.compile()


def memory_of(compiled) -> Memory:
    found = compiled.memory_analysis()
    kept = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes + kept)


def memory_limit() -> int:
    """Bytes available to a program on a device; on a CPU, this machine's memory."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return device_speed.memory_limit() or physical // jax.local_device_count()


def what_fits(settings: Settings, limit: int) -> Settings | None:
    """The cheapest change of `remat` and `accumulate_steps` with which a step fits, or None.

    Recomputed norms cost almost nothing, then halving the parts; then `layer`, with a third more
    arithmetic, and smaller and smaller parts.
    """
    share = settings.data.global_batch_size // jax.device_count() or settings.data.batch_size
    compute, now = settings.compute, settings.compute.accumulate_steps
    parts = [n for n in range(now, share + 1) if share % n == 0]
    options = [("gelu_norm", n) for n in parts if n <= 2 * now] + [("layer", n) for n in parts]
    if compute.remat != "none":
        options = options[options.index((compute.remat, now)) + 1 :]
    for remat, accumulate in options:
        cheaper = dataclasses.replace(compute, remat=remat, accumulate_steps=accumulate)
        changed = dataclasses.replace(settings, compute=cheaper)
        if memory_of(compile_step(changed)).total <= limit:
            return changed
    return None


def check_memory(settings: Settings, compiled) -> None:
    """Raises `UserError` where a compiled step needs more than the device's memory.

    The error has the settings that fit. Devices that do not report their memory are not checked.
    """
    limit, needed = device_speed.memory_limit(), memory_of(compiled).total
    kept = settings.data.on_device * math.prod(FRAME_SHAPE)
    if limit is None or needed + kept <= limit:
        return
    frames = f", beside {kept / _GIB:.3g} GiB of frames (config.data.on_device)" if kept else ""
    print(
        "the training step does not fit into the device's memory; searching for settings that fit"
    )
    raise UserError(
        f"a training step needs {needed / _GIB:.3g} GiB{frames}, and "
        f"{jax.local_devices()[0].device_kind} has {limit / _GIB:.3g} GiB: "
        f"{_advice(what_fits(settings, limit - kept))}"
    )


def _advice(fitting: Settings | None) -> str:
    if fitting is None:
        return (
            "one clip at a time does not fit either: choose a smaller model, or more compute.fsdp"
        )
    compute = fitting.compute
    return (
        f"it fits with --config.compute.remat={compute.remat} "
        f"--config.compute.accumulate_steps={compute.accumulate_steps}, which do not change results"
    )


def report(settings: Settings) -> None:
    """Prints the memory, arithmetic and time of a run, and what to change if it does not fit."""
    devices = jax.device_count()
    clips = sharding.global_batch_size(
        settings.data.batch_size,
        settings.data.global_batch_size,
        parts=settings.compute.accumulate_steps,
    )
    network = kernel_choice.measured(
        settings.model,
        clips=clips // devices // settings.compute.accumulate_steps,
        frames=settings.data.clip_len,
    )
    settings = dataclasses.replace(settings, model=network)
    compiled = compile_step(settings)
    memory, limit = memory_of(compiled), memory_limit()
    operations = flops.train_step(
        settings.model,
        clips=clips,
        frames=settings.data.clip_len,
        more_passes=settings.more_passes,
    )
    kind = jax.devices()[0].device_kind
    print(f"devices            {devices} × {kind}, {jax.process_count()} process(es)")
    print(f"global batch       {clips} clips of {settings.data.clip_len} frames")
    print(
        f"memory per device  {memory.total / _GIB:.2f} GiB: {memory.state / _GIB:.2f} of state and "
        f"batch, {memory.working / _GIB:.2f} within the step; available: {limit / _GIB:.1f} GiB"
    )
    print(
        f"arithmetic         {operations.total / 1e12:.4g} TFLOP per step, counted from the sizes"
    )
    _report_time(settings, operations.total / devices, compiled)
    if memory.total > limit:
        _report_what_fits(settings, limit)


def _report_time(settings: Settings, operations: float, compiled) -> None:
    rate, copying = (
        device_speed.matmul_flops(settings.model.compute_dtype),
        device_speed.copy_bytes(),
    )
    # XLA counts a loop's body once, and nearly all of a step is in the loop over its parts.
    counted = (compiled.cost_analysis() or {}).get("bytes accessed", 0.0)
    moved = settings.compute.accumulate_steps * counted
    soonest = operations / rate
    latest = soonest + moved / copying
    print(
        f"measured here      {rate / 1e12:.3g} TFLOP/s of {settings.model.compute_dtype} matrix "
        f"products, {copying / 1e9:.3g} GB/s of copying"
    )
    print(
        f"a step             between {soonest:.3g} s (arithmetic alone) and {latest:.3g} s "
        f"(and at most {moved / 1e9:.3g} GB of memory traffic, without overlap)"
    )
    print(f"expected           {1 / latest:.3g}…{1 / soonest:.3g} steps/s")
    print_length(_steps(settings), settings.schedule.minutes, soonest, latest)


def print_length(steps: int | None, minutes: float, soonest: float, latest: float) -> None:
    """Prints the length of a run.

    Args:
        steps: its updates, None if unknown.
        minutes: after which it ends even so; 0: never.
        soonest, latest: seconds of an update.
    """
    seconds = 60 * minutes
    if minutes and (steps is None or steps * soonest > seconds):
        print(
            f"the whole run      {minutes:g} minutes (config.schedule.minutes): "
            f"{seconds / latest:.3g}…{seconds / soonest:.3g} steps, if data loading keeps up"
        )
    elif steps:
        print(
            f"the whole run      {steps} steps: {steps * soonest / 3600:.3g}…"
            f"{steps * latest / 3600:.3g} hours, if data loading keeps up"
        )


def _steps(settings: Settings) -> int | None:
    """Updates in the whole run; None where they depend on missing data."""
    clips = sharding.global_batch_size(settings.data.batch_size, settings.data.global_batch_size)
    try:
        per_epoch = len(splits.open_clips(settings.training_data, "train")) // clips
    except UserError as error:
        if not settings.schedule.max_steps:
            print(f"the whole run      unknown: {str(error).splitlines()[0]}")
        return settings.schedule.max_steps or None
    total = per_epoch * settings.schedule.epochs
    return min(total, settings.schedule.max_steps or total)


def _report_what_fits(settings: Settings, limit: int) -> None:
    print(f"this does not fit  {_advice(what_fits(settings, limit))}")
