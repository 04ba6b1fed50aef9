"""Auto chooses the fastest correct kernel; failures never end the run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.models import attention, kernel_choice, kernel_measure, kernel_trials
from cwm_jax.models.kernel_trials import Check, Timing, Trial
from cwm_jax.runtime import compile_cache, device_speed

FLOAT = jnp.dtype("float32")
BATCH = dict(clips=2, frames=4)


def square(x):
    return x * x


def slow(x):
    return jax.lax.fori_loop(0, 100, lambda _, y: jnp.cos(y), x) * 0 + x * x


def off(x):
    return 1.1 * x * x


def overflows(x):
    """Correct, except for large numbers."""
    return jnp.exp(2 * jnp.log(jnp.abs(x))) + 0 * jnp.exp(jnp.abs(x))


def raises(x):
    raise NotImplementedError("no such card")


def trial(setting="attention", **functions):
    """A trial of x² with fake candidates."""
    functions = {"xla": slow} | functions
    numbers = np.random.default_rng(0).standard_normal(64, np.float32)
    checks = tuple(
        Check(name, functions.get, square, (scale * numbers,), 1e-3)
        for name, scale in (("random numbers", 1), ("extreme numbers", 200))
    )
    timing = Timing(functions.get, ((10_000,),))
    return Trial(setting, tuple(functions), FLOAT, checks, (timing,))


def test_the_fastest_correct_candidate_is_chosen():
    found = kernel_choice.measure(trial(quick=square, off=off, raises=raises, overflows=overflows))
    assert kernel_choice.fastest(found) == "quick"
    assert found["quick"] < found["xla"]
    assert found["off"].startswith("wrong: off by 0.1 on random numbers")
    assert found["overflows"] == "wrong: not finite on extreme numbers"
    assert "no such card" in found["raises"]


def test_without_a_correct_candidate_xla_is_chosen():
    found = kernel_choice.measure(trial(xla=off, other=overflows, raises=raises))
    assert all(isinstance(value, str) for value in found.values())
    assert kernel_choice.fastest(found) == "xla"
    assert kernel_choice.fastest({}) == "xla"


def test_a_wrong_gradient_is_detected():
    @jax.custom_vjp
    def crooked(x):
        return x * x

    crooked.defvjp(lambda x: (x * x, x), lambda x, grad: (3 * x * grad,))
    found = kernel_choice.measure(trial(crooked=crooked))
    assert found["crooked"].startswith("wrong: off by 0.5")


RESULTS = {}


def measured_once(trial):
    """A trial's result; what is done with it needs no further measurement."""
    of_each = tuple(check.make(name) for check in trial.checks for name in trial.candidates)
    key = trial.setting, trial.candidates, of_each
    if key not in RESULTS:
        RESULTS[key] = kernel_measure.measure(trial)
    return RESULTS[key]


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """Simulates a GPU and a folder of compiled programs; returns the list of measured trials."""
    measured = []
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv(compile_cache.VARIABLE, raising=False)
    compile_cache.enable(str(tmp_path / "cache"))
    monkeypatch.setattr(attention, "fuses", lambda: True)
    fake_trials = [
        trial(fused=square, other=overflows),
        trial("time_attention", fused=square, other=overflows),
        trial("norm", triton=off),
        trial("mlp", triton=square),
    ]
    monkeypatch.setattr(kernel_trials, "trials", lambda *_, **__: fake_trials)
    count = lambda trial: measured.append(trial.setting) or measured_once(trial)
    monkeypatch.setattr(kernel_choice, "measure", count)
    yield measured
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_network_gets_the_measured_kernels(tiny, on_gpu, capsys):
    network = dataclasses.replace(tiny, dtype="auto")
    found = kernel_choice.measured(network, **BATCH)
    assert (found.attention, found.norm, found.mlp) == ("fused", "xla", "triton")
    assert dataclasses.replace(found, attention="auto", norm="auto", mlp="auto") == network
    assert (network.attention, network.norm) == ("auto", "auto")
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "attention=fused" in printed
    assert "other wrong: not finite on extreme numbers" in printed


def test_attention_over_time_may_have_another_kernel(tiny, on_gpu, monkeypatch):
    network = dataclasses.replace(tiny, dtype="auto", norm="xla", mlp="xla")
    fake_trials = [trial(fused=square), trial("time_attention", fused=overflows)]
    monkeypatch.setattr(kernel_trials, "trials", lambda *_, **__: fake_trials)
    found = kernel_choice.measured(network, **BATCH)
    assert found.attention_kernels == ("fused", "xla")
    assert kernel_choice.settings(found) == {
        "attention": "fused",
        "time_attention": "xla",
        "norm": "xla",
        "mlp": "xla",
    }
    given = dataclasses.replace(network, time_attention="xla")
    assert kernel_choice.measured(given, **BATCH).attention_kernels == ("fused", "xla")


def test_results_are_kept_for_the_same_shapes(tiny, on_gpu, capsys):
    network = dataclasses.replace(tiny, dtype="auto")
    first = kernel_choice.measured(network, **BATCH)
    assert kernel_choice.measured(network, **BATCH) == first
    assert on_gpu == ["attention", "time_attention", "norm", "mlp"]
    assert "measured before" in capsys.readouterr().out
    kernel_choice.measured(network, clips=3, frames=4)
    assert len(on_gpu) == 8
    kept = json.loads((compile_cache.folder() / kernel_choice.FILE).read_text())
    assert len(kept) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"key": 3}', ""])
def test_a_damaged_file_is_ignored_and_replaced(tiny, on_gpu, capsys, text):
    network = dataclasses.replace(tiny, dtype="auto")
    path = compile_cache.folder() / kernel_choice.FILE
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert kernel_choice.measured(network, **BATCH).attention == "fused"
    assert f"{path} cannot be used and is ignored" in capsys.readouterr().err
    assert kernel_choice.measured(network, **BATCH).attention == "fused"
    assert len(on_gpu) == 4


def test_an_error_is_not_kept(tiny, on_gpu, monkeypatch):
    network = dataclasses.replace(tiny, dtype="auto", time_attention="xla", norm="xla", mlp="xla")
    fake_trials = [trial(fused=raises)]
    monkeypatch.setattr(kernel_trials, "trials", lambda *_, **__: fake_trials)
    for _ in range(2):
        assert kernel_choice.measured(network, **BATCH).attention == "xla"
    assert len(on_gpu) == 2


def test_failures_never_end_the_run(tiny, on_gpu, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("the card is gone")

    monkeypatch.setattr(kernel_trials, "trials", broken)
    found = kernel_choice.measured(dataclasses.replace(tiny, dtype="auto"), **BATCH)
    assert (found.attention, found.norm, found.mlp) == ("xla", "xla", "xla")
    assert "the card is gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("here", "elsewhere", "taken"),
    [
        ({"xla": 3.0, "fused": 1.0}, [4.0, 2.0], "fused"),
        ({"xla": 3.0, "fused": 1.0}, [3.0, np.inf], "xla"),  # wrong on another card
        ({"xla": 2.0, "fused": 1.0}, [2.0, 9.0], "xla"),
        ({}, [3.0, 1.0], "xla"),  # nothing could be measured here
        ({"xla": "wrong: off", "fused": 5.0}, [1.0, 4.0], "fused"),
    ],
)
def test_all_processes_choose_a_kernel_that_is_correct_in_each(monkeypatch, here, elsewhere, taken):
    gather = lambda mine: np.stack([mine, np.float32(elsewhere)])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(kernel_choice.multihost_utils, "process_allgather", gather)
    assert kernel_choice.fastest(kernel_choice._agreed("attention", here)) == taken


def test_on_a_cpu_nothing_is_timed(tiny, monkeypatch):
    monkeypatch.setattr(
        device_speed, "best_time", lambda *_, **__: pytest.fail("something was timed")
    )
    assert kernel_choice.measured(tiny, **BATCH) == tiny
    assert kernel_choice.settings(tiny) == {"attention": "xla", "norm": "xla", "mlp": "xla"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_formulas_of_the_real_trials_are_those_of_the_network(tiny, dtype):
    """XLA's kernels are right on all of the checks; there are extreme ones of each setting."""
    network = dataclasses.replace(tiny, hidden_size=64, num_heads=2, dtype=dtype)
    for real in kernel_trials.trials(network, **BATCH):
        assert len(real.checks) >= 2
        errors = kernel_measure.errors(real, "xla")
        assert all(errors[check.name] <= check.near for check in real.checks), errors


def test_available_candidates(tiny):
    names = lambda dtype, size, length: attention.candidates(jnp.dtype(dtype), size, length=length)
    assert names("bfloat16", 64, 64) == ("xla", "fused")
    assert names("bfloat16", 64, 256) == ("xla",)
    assert names("bfloat16", 80, 64) == ("xla",)
    assert names("float32", 64, 64) == ("xla",)
    assert kernel_choice.KERNELS["attention"] == names("bfloat16", 64, 1)
    assert kernel_choice.KERNELS["time_attention"] == names("bfloat16", 64, 1)


def test_extreme_rows_have_extreme_scores(tiny):
    network = dataclasses.replace(tiny, hidden_size=64, num_heads=2)
    real = next(kernel_trials.trials(network, **BATCH))
    (qkv,) = next(c for c in real.checks if c.name == "extreme scores over space").arrays
    q, k, _ = np.moveaxis(qkv.reshape(*qkv.shape[:3], 3, 2, 32), 3, 0)
    scores = np.einsum("btsnk,btrnk->btnsr", q, k) / 32**0.5
    found = np.asarray(jax.nn.logsumexp(scores, axis=-1)).mean((1, 2, 3))
    np.testing.assert_allclose(found, [-150, 0, 250], atol=15)
