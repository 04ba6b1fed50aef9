"""The dry run reports what a step needs, and suggests the cheapest change with which it fits."""

import dataclasses
import re

import jax
import pytest
from changed_config import changed
from test_loop import ROOT, config_of, program

from configs import small
from cwm_jax.errors import UserError
from cwm_jax.experiment import dry_run, loop
from cwm_jax.experiment.dry_run import Memory
from cwm_jax.experiment.settings import Settings
from cwm_jax.models import dit, flops
from cwm_jax.runtime import device_speed
from cwm_jax.training import train_step

SETTINGS = Settings.from_config(
    changed(small.get_config().to_dict(), {"compute.remat": "none", "data.batch_size": 6})
)


def computed(settings: Settings, **how) -> Settings:
    return dataclasses.replace(settings, compute=dataclasses.replace(settings.compute, **how))


@pytest.fixture
def tried(monkeypatch) -> list[tuple[str, int]]:
    """Compiles nothing: a step's memory depends on `remat` and its parts. Collects the tries."""
    tries = []
    working = {"none": 80, "gelu_norm": 60, "layer": 12}

    def compile_step(settings: Settings) -> Memory:
        compute = settings.compute
        tries.append((compute.remat, compute.accumulate_steps))
        return Memory(1, working[compute.remat] // compute.accumulate_steps)

    monkeypatch.setattr(dry_run, "compile_step", compile_step)
    monkeypatch.setattr(dry_run, "memory_of", lambda compiled: compiled)
    return tries


@pytest.mark.parametrize(
    ("limit", "remat", "parts"),
    [(70, "gelu_norm", 1), (31, "gelu_norm", 2), (14, "layer", 1), (5, "layer", 3)],
)
def test_the_cheapest_change_that_fits(tried, limit, remat, parts):
    found = dry_run.what_fits(SETTINGS, limit)
    assert (found.compute.remat, found.compute.accumulate_steps) == (remat, parts)
    assert computed(found, remat="none", accumulate_steps=1) == SETTINGS


def test_current_settings_are_not_tried_again(tried):
    settings = computed(SETTINGS, remat="gelu_norm")
    assert dry_run.what_fits(settings, 1) is None
    assert tried == [("gelu_norm", 2), *(("layer", parts) for parts in (1, 2, 3, 6))]


@pytest.fixture(scope="module")
def compile_once():
    """`compile_step`, which compiles equal steps once for all tests of this module."""
    programs, compile_step = {}, dry_run.compile_step

    def compiled(settings: Settings):
        data = dataclasses.replace(settings.data, dir="")  # no data is read
        key = repr((settings.setup(None), settings.distil_from, data))
        if key not in programs:
            programs[key] = compile_step(settings)
        return programs[key]

    return compiled


@pytest.fixture
def tiny(make_data, monkeypatch, compile_once) -> Settings:
    """A run of 2 · 5 steps on a machine of known speed."""
    monkeypatch.setattr(dry_run, "compile_step", compile_once)
    monkeypatch.setattr(device_speed, "matmul_flops", lambda dtype: 5e8)
    monkeypatch.setattr(device_speed, "copy_bytes", lambda: 2e8)
    folder = make_data(train=[[11, 12], [14]], val=[[11, 9]])  # 3 + 3 + 4 = 10 clips
    return Settings.from_config(config_of(folder, {"compute.remat": "none"}))


def reported(settings, capsys) -> dict[str, str]:
    """What `report` prints, by its label."""
    dry_run.report(settings)
    lines = (re.split(" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    return {name: rest.strip() for name, rest in lines}


def numbers(text: str) -> list[float]:
    return [float(word) for word in re.findall(r"\d+(?:\.\d+)?(?:e[-+]\d+)?", text)]


def test_the_report_follows_from_the_sizes(tiny, capsys):
    found = reported(tiny, capsys)
    assert found["global batch"] == "2 clips of 5 frames"
    operations = flops.train_step(tiny.model, clips=2, frames=5).total
    assert numbers(found["arithmetic"])[0] == pytest.approx(operations / 1e12, rel=0.01)
    soonest, latest, gbytes = numbers(found["a step"])
    assert soonest == pytest.approx(operations / 5e8, rel=0.01)
    assert latest == pytest.approx(soonest + gbytes / 0.2, rel=0.02)
    assert numbers(found["expected"]) == pytest.approx([1 / latest, 1 / soonest], rel=0.02)
    steps, *hours = numbers(found["the whole run"])
    assert steps == 10
    assert hours == pytest.approx([10 * soonest / 3600, 10 * latest / 3600], rel=0.02)
    assert "this does not fit" not in found


@pytest.mark.parametrize(
    ("steps", "minutes", "length"),
    [
        (10**9, 30, "30 minutes (config.schedule.minutes): 900…3.6e+03 steps"),
        (None, 30, "30 minutes (config.schedule.minutes): 900…3.6e+03 steps"),
        (1800, 30, "1800 steps: 0.25…1 hours"),
        (1800, 0, "1800 steps: 0.25…1 hours"),
    ],
)
def test_a_run_is_as_long_as_its_updates_or_its_minutes(steps, minutes, length, capsys):
    dry_run.print_length(steps, minutes, soonest=0.5, latest=2.0)
    assert capsys.readouterr().out.startswith(f"the whole run      {length}, if")


def test_memory_is_that_of_state_batch_and_temporary_arrays(tiny):
    memory = dry_run.memory_of(dry_run.compile_step(tiny))
    state = jax.eval_shape(lambda: train_step.init_state(tiny.model, tiny.optimizer, 0))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    batch = 2 * 5 * (64 * 64 * 3 + 4)
    assert memory.state == pytest.approx(size + batch, rel=1e-3)
    assert memory.working > size  # the gradients alone would be a third


def test_a_teacher_adds_memory_and_forward_passes(tiny):
    taught = dataclasses.replace(tiny, distil_from="somewhere")
    plain, with_teacher = (dry_run.memory_of(dry_run.compile_step(s)) for s in (tiny, taught))
    params = sum(4 * x.size for x in jax.tree.leaves(dit.shapes(tiny.model)))
    assert with_teacher.state - plain.state == pytest.approx(params, rel=1e-3)
    assert (tiny.more_passes, taught.more_passes) == (0, 2)


def test_parts_of_a_step_move_no_fewer_bytes(tiny, capsys):
    traffic = lambda settings: numbers(reported(settings, capsys)["a step"])[2]
    data = dataclasses.replace(tiny.data, batch_size=4)
    whole = dataclasses.replace(tiny, data=data)
    assert traffic(computed(whole, accumulate_steps=4)) > traffic(whole)


def test_what_is_suggested_fits(tiny, capsys, monkeypatch):
    limit = dry_run.memory_of(dry_run.compile_step(tiny)).total - 1
    monkeypatch.setattr(dry_run, "memory_limit", lambda: limit)
    suggested = reported(tiny, capsys)["this does not fit"]
    pattern = r"--config\.compute\.remat=(\w+) --config\.compute\.accumulate_steps=(\d)"
    remat, parts = re.search(pattern, suggested).groups()
    smaller = computed(tiny, remat=remat, accumulate_steps=int(parts))
    assert smaller != tiny
    assert dry_run.memory_of(dry_run.compile_step(smaller)).total <= limit


def test_training_refuses_a_step_that_does_not_fit_before_it_runs(tiny, tmp_path, monkeypatch):
    never = {"validation.every_steps": 0, "schedule.max_steps": 1}
    config = changed(tiny.to_config(), never)
    settings = Settings.from_config(config)
    needed = dry_run.memory_of(dry_run.compile_step(settings)).total

    def train(workdir, *, memory, fitting):
        monkeypatch.setattr(device_speed, "memory_limit", lambda: memory)
        monkeypatch.setattr(dry_run, "what_fits", lambda *_: fitting)
        return loop.train(settings, workdir, config=config)

    assert int(train(tmp_path / "fits", memory=needed, fitting=None).step) == 1
    less = computed(settings, remat="layer", accumulate_steps=2)
    with pytest.raises(UserError, match=r"fits with --config\.compute\.remat=layer .*_steps=2,"):
        train(tmp_path / "run", memory=needed - 1, fitting=less)
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="one clip at a time does not fit either"):
        train(tmp_path / "run", memory=1, fitting=None)


def test_a_dry_run_only_reports(tmp_path):
    sizes = dict(hidden_size=24, depth=1, num_heads=3, patch_size=16)
    result = program(
        *[str(ROOT / "train.py"), f"--config={ROOT / 'configs' / 'debug.py'}", "--dry-run"],
        *[f"--config.model.{name}={size}" for name, size in sizes.items()],
        *["--config.data.batch_size=3", "--config.data.clip_len=5", "--compile_cache="],
        *[f"--config.data.dir={ROOT / 'assets' / 'coinrun'}"],
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "global batch       3 clips of 5 frames" in result.stdout
    assert "the whole run" in result.stdout
    assert not list(tmp_path.iterdir())
