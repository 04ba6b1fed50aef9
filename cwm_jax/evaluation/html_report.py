"""`report.html`: numbers, charts, stills and films in one file that opens without a network."""

import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cwm_jax.coinrun import FPS
from cwm_jax.evaluation import comparison, lpips_weights, report_charts, uncertainty
from cwm_jax.evaluation.full import Measured, Plan
from cwm_jax.evaluation.rollout_quality import capped
from cwm_jax.files import written_whole
from cwm_jax.rendering import contact_sheet, patch_overlay, video

FILE = "report.html"
_TEMPLATE = "report_template.html"
_STRIP_FRAMES = 12  # columns of stills


class Strip(NamedTuple):
    """A clip worth showing."""

    name: str
    clip: int
    psnr: float  # mean over its frames, dB


def write(folder: Path, measured: Measured, plan: Plan) -> None:
    """Writes `report.html` and, beside it, each of its charts, stills and films by itself.

    `measured.results` must hold `checkpoint`, `code` and `device` by now.

    Raises:
        UserError: where the folder cannot be written.
    """
    charts = {
        "quality": report_charts.quality,
        "control": report_charts.control,
        "confusion": report_charts.confusion,
        "drift": report_charts.drift,
    }
    if measured.unsure:
        charts["uncertainty"] = report_charts.uncertainty
        strip = unsure_strip(measured, plan)
        video.write_png(folder / "unsure.png", strip)
    pictures = {name: report_charts.both(draw, measured.results) for name, draw in charts.items()}
    for name, variants in pictures.items():
        for suffix, png in zip(("", "_dark"), variants, strict=True):
            with written_whole(folder / f"{name}{suffix}.png") as temporary:
                temporary.write_bytes(png)
    strips = chosen_strips(measured)
    for strip in strips:
        real, drawn, actions = _clip(measured, plan, strip.clip)
        still = contact_sheet.grid(
            real, drawn, n_prompt=plan.n_prompt[0], max_columns=_STRIP_FRAMES
        )
        video.write_png(folder / f"{strip.name}.png", still)
        film = contact_sheet.side_by_side(real, drawn, actions, n_prompt=plan.n_prompt[0])
        video.write_mp4(folder / f"{strip.name}.mp4", film, fps=FPS)
    with written_whole(folder / FILE) as temporary:
        temporary.write_text(
            _page(folder, measured, plan, pictures, strips),
            encoding="utf-8",
            errors="backslashreplace",
        )


def chosen_strips(measured: Measured) -> list[Strip]:
    """The clips of best, median and worst mean PSNR, as far as they are different ones."""
    means = capped(measured.scores.psnr).mean(1)
    order = np.argsort(-means, kind="stable")
    places = {"best": 0, "median": (len(order) - 1) // 2, "worst": len(order) - 1}
    found: dict[int, Strip] = {}
    for name, place in places.items():
        clip = int(order[place])
        found.setdefault(clip, Strip(name, clip, float(means[clip])))
    return list(found.values())


def unsure_strip(measured: Measured, plan: Plan) -> np.ndarray:
    """Of the clip of median error: real and generated frames, then what spread and error tint."""
    maps, given = measured.unsure, plan.n_prompt[0]
    errors = np.square(maps.error).mean((1, 2, 3))
    clip = int(np.argsort(errors)[(len(errors) - 1) // 2])
    frames = maps.error.shape[1]
    at = np.unique(np.linspace(0, frames - 1, min(frames, _STRIP_FRAMES)).astype(int))
    real = measured.rollouts.clips.frames[clip, given + at]
    generated = measured.rollouts.true[given][clip, at]
    signs = [x for x in (maps.spread, maps.instability, maps.error) if x is not None]
    tinted = [
        patch_overlay.tinted(generated, x[clip, at], most=max(float(np.quantile(x, 0.99)), 1e-6))
        for x in signs
    ]
    return patch_overlay.rows([real, generated, *tinted])


def _clip(measured: Measured, plan: Plan, clip: int):
    """(real, drawn with its prompt, actions) of one clip, each [1, T, …]."""
    clips, given = measured.rollouts.clips, plan.n_prompt[0]
    span = slice(0, given + plan.horizon)
    real = clips.frames[clip, span][None]
    drawn = measured.rollouts.true[given][clip][None]
    return real, np.concatenate([real[:, :given], drawn], axis=1), clips.actions[clip, span][None]


def _page(folder: Path, measured: Measured, plan: Plan, pictures, strips: list[Strip]) -> str:
    results = measured.results
    checkpoint = results["checkpoint"]
    shown = "".join(_strip(folder, strip) for strip in strips)
    conditions = {
        "checkpoint": f"{checkpoint['path']}, step {checkpoint['step']}",
        "fingerprint": checkpoint["fingerprint"],
        "code": results["code"],
        "device": results["device"],
        **results["protocol"],
    }
    used = results["clips"]
    template = (Path(__file__).parent / _TEMPLATE).read_text(encoding="utf-8")
    return template.format(
        title=html.escape(f"How good the world is: {checkpoint['path']}"),
        step=checkpoint["step"],
        subject=html.escape(str(checkpoint["path"])),
        clips=used["used"],
        records=used["records"],
        split=plan.split,
        short=used["too_short"],
        needed=plan.frames,
        tiles="".join(_tile(*tile) for tile in tiles(results)),
        ranked=_ranked(results),
        strips=shown,
        uncertainty=_uncertainty(folder, results, pictures),
        conditions=_rows((k, str(v)) for k, v in conditions.items()),
        numbers=_rows(comparison.rows(results)),
        **{
            name: _chart(name, *variants)
            for name, variants in pictures.items()
            if name != "uncertainty"
        },
    )


def _uncertainty(folder: Path, results, pictures) -> str:
    """The section on uncertainty; empty where it was not measured."""
    if "uncertainty" not in pictures:
        return ""
    found = results["uncertainty"]
    best = uncertainty.best_sign(found)
    where, beyond = (comparison.interval(found[best][kind]) for kind in ("where", "beyond"))
    still = _data_uri((folder / "unsure.png").read_bytes(), "image/png")
    without = (
        ""
        if "instability" in found
        else " Instability is left out: it needs two denoising steps or more, and a model whose "
        "denoising can be watched."
    )
    return (
        "<h2>Uncertainty</h2><p>What the model is unsure of, held against its error from the "
        f"game’s own frames, patch by patch: the spread of {found['seeds']} rollouts with other "
        "noise, and how far the predicted frame moves from one denoising step to the next. Of "
        f"these, {best} says best where a frame is wrong: rank correlation {where} over the "
        f"patches of a frame, and {beyond} beyond what the model’s own change of the patch, which "
        f"costs nothing, says.{html.escape(without)}</p>"
        f'<div class="card">{_chart("uncertainty", *pictures["uncertainty"])}</div>'
        "<figure><figcaption>The clip of median error. From above: real, generated, then the "
        f"generated frames tinted by spread{', by instability' * ('instability' in found)} and by "
        f'error</figcaption><img alt="uncertainty, stills" src="{still}" style="max-width:100%">'
        "</figure>"
    )


def tiles(results) -> list[tuple[str, str, str]]:
    """The numbers to look at first: (name, value, what to hold it against)."""
    prompt, sides = next(iter(results["rollout"].items()))
    horizon = comparison.shown(sides["model"]["psnr"]["mean"])[0]
    psnr = lambda side: comparison.number(sides[side]["psnr"]["mean"][horizon]["mean"])
    delta = results["control"]["delta_psnr"]["mean"][horizon]
    read, drift = results["probe"], results["drift"]
    percent = lambda name: f"{read[name]['accuracy']['mean']:.0%}"
    of_real = read["keys_of_real"].items()
    keys = ", ".join(f"{key} {comparison.number(share)}" for key, share in of_real)
    return [
        (
            f"PSNR, frames 1…{horizon}",
            f"{psnr('model')} dB",
            f"copying the last frame {psnr('copy_last')}, "
            f"reconstruction {psnr('reconstruction')}; {report_charts.given(prompt)}",
        ),
        *_perceptual_tile(sides, horizon, prompt),
        (
            "What the actions are worth",
            f"{comparison.number(delta['mean'])} dB",
            f"ΔPSNR, 95 % in {comparison.number(delta['low'])} … "
            f"{comparison.number(delta['high'])}; 0 is a model that ignores them",
        ),
        (
            "Actions read back",
            percent("drawn"),
            f"real frames {percent('real')}, chance {percent('shuffled')}; of what real frames "
            f"show of each key: {keys}",
        ),
        (
            "Frames to collapse",
            comparison.number(drift["frames_to_collapse"]["mean"], 0),
            f"median, of {drift['frames']}; {drift['survived']:.0%} of clips last to the end, "
            f"{drift['false_alarms']:.0%} of real clips would be called collapsed",
        ),
    ]


def _perceptual_tile(sides, horizon: str, prompt: str) -> Iterator[tuple[str, str, str]]:
    if "lpips" in sides["model"]:
        mean = lambda side: comparison.number(sides[side]["lpips"]["mean"][horizon]["mean"], 3)
        yield (
            f"LPIPS, frames 1…{horizon}",
            mean("model"),
            f"lower is better; copying the last frame {mean('copy_last')}, blurred real frames "
            f"{mean('blur')}; {report_charts.given(prompt)}",
        )


def _ranked(results) -> str:
    """What LPIPS ranks otherwise, as paragraphs; or that it was not measured."""
    if not all("lpips" in sides["model"] for sides in results["rollout"].values()):
        return (
            f"<p>LPIPS was not measured: <code>{lpips_weights.FETCH}</code> gets its weights.</p>"
        )
    found = list(comparison.ranked_otherwise(results))
    if not found:
        return "<p>PSNR, SSIM and LPIPS rank the model and its floors alike.</p>"
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in found)
    return f"<p>Ranked differently:</p><ul>{lines}</ul>"


def _tile(name: str, value: str, against: str) -> str:
    name, value, against = map(html.escape, (name, value, against))
    return f'<div class="tile"><h3>{name}</h3><p class="value">{value}</p><p>{against}</p></div>'


def _strip(folder: Path, strip: Strip) -> str:
    still = _data_uri((folder / f"{strip.name}.png").read_bytes(), "image/png")
    film = _data_uri((folder / f"{strip.name}.mp4").read_bytes(), "video/mp4")
    label = f"{strip.name.capitalize()}: clip {strip.clip}, {strip.psnr:.2f} dB"
    return (
        f"<figure><figcaption>{label}</figcaption>"
        f'<div class="strip"><video src="{film}" autoplay loop muted playsinline '
        'onclick="this.paused ? this.play() : this.pause()"></video>'
        f'<img alt="{label}, stills" src="{still}"></div></figure>'
    )


def _chart(name: str, light: bytes, dark: bytes) -> str:
    width = Image.open(io.BytesIO(light)).width * 96 // 130
    return (
        "<picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark, "image/png")}">'
        f'<img alt="chart: {name}" width="{width}" src="{_data_uri(light, "image/png")}"></picture>'
    )


def _rows(pairs) -> str:
    return "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in pairs
    )


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
