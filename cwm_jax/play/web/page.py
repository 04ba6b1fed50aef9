"""The page: Gradio's controls around the stage, which `static/` implements.

No control calls Python through Gradio's queue: each passes its value to `static/play.js`, which
sends it on the player's socket, so that keys and commands keep their order.
"""

import hashlib
import importlib.resources

import gradio as gr

from cwm_jax.play.session.prompt_sources import MAX_PROMPT, USUAL_PROMPT
from cwm_jax.play.web.app_state import Rules

_STATIC = importlib.resources.files("cwm_jax.play.web") / "static"
_SYSTEM = ("ui-sans-serif", "system-ui", "sans-serif")  # no font is downloaded
_MONO = ("ui-monospace", "monospace")


def style() -> dict:
    """Theme, style sheet and script for `gradio.mount_gradio_app`."""
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.amber,
        neutral_hue=gr.themes.colors.slate,
        font=_SYSTEM,
        font_mono=_MONO,
        radius_size=gr.themes.sizes.radius_lg,
    ).set(**_colours())
    version = hashlib.sha1((_STATIC / "play.js").read_bytes()).hexdigest()[
        :8
    ]  # so that browsers do not use an old one
    head = (
        '<meta name="viewport" content="width=device-width, initial-scale=1, viewport-fit=cover">'
        f'<script type="module" src="play/static/play.js?{version}"></script>'
    )
    return dict(theme=theme, css=(_STATIC / "play.css").read_text(encoding="utf-8"), head=head)


def _colours() -> dict[str, str]:
    """Muted backgrounds, so that the game is the brightest part of the page."""
    chosen = {
        "block_background_fill": ("#f1f2f4", "#1b1f27"),
        "body_background_fill": ("#fbfbfa", "#0f1115"),
        "border_color_primary": ("#e0e2e6", "#2c313c"),
        "button_secondary_background_fill": ("#f1f2f4", "#1b1f27"),
        "button_secondary_background_fill_hover": ("#f1f2f4", "#1b1f27"),
        "checkbox_label_background_fill": ("#f1f2f4", "#1b1f27"),
        "checkbox_label_background_fill_hover": ("#e9ebee", "#242934"),
        "checkbox_background_color": ("#ffffff", "#0f1115"),
        "background_fill_primary": ("#fbfbfa", "#0f1115"),
        "background_fill_secondary": ("#f1f2f4", "#1b1f27"),
        "input_background_fill": ("#f1f2f4", "#1b1f27"),
    }
    light = {name: pair[0] for name, pair in chosen.items()}
    return light | {f"{name}_dark": pair[1] for name, pair in chosen.items()}


def build(rules: Rules) -> gr.Blocks:
    """The page for players with these rules."""
    page = gr.Blocks(title="Play the world model", analytics_enabled=False, fill_width=True)
    with page, gr.Row(elem_id="play-columns", equal_height=False):
        with gr.Column(scale=3, min_width=320):
            stage = (_STATIC / "stage.html").read_text(encoding="utf-8")
            gr.HTML(stage, elem_id="play-frame", js_on_load=None)
        with gr.Column(scale=2, min_width=300, elem_id="play-side"):
            _start_controls()
            _pace_controls(rules)
            _save_controls()
            _share_controls()
    return page


def _call(button, method: str, inputs=(), outputs=None):
    """A click calls a method of the page's script with the values of `inputs`."""
    names = ", ".join(f"v{i}" for i in range(len(inputs)))
    returns = "return " if outputs else ""
    script = f"async ({names}) => {{ {returns}await window.play.{method}({names}); }}"
    button.click(None, list(inputs), outputs, js=script, queue=False, show_progress="hidden")


def _start_controls() -> None:
    with gr.Column(elem_classes="play-card", min_width=280):
        gr.Markdown("### Start")
        with gr.Row():
            clip = gr.Number(0, label="Validation clip", precision=0, minimum=0,
                             min_width=120, elem_id="play-clip")  # fmt: skip
            frames = gr.Slider(1, MAX_PROMPT, USUAL_PROMPT, step=1, label="Prompt frames",
                               min_width=160, buttons=[], elem_id="play-prompt")  # fmt: skip
        with gr.Row():
            chosen = gr.Button("This clip", size="sm", min_width=90, elem_id="play-start")
            random = gr.Button("Random clip", size="sm", variant="primary", min_width=90,
                               elem_id="play-random")  # fmt: skip
            picture = gr.Button("My picture", size="sm", min_width=90, elem_id="play-picture")
    _call(chosen, "start", (clip, frames))
    _call(random, "startRandom", (frames,))
    _call(picture, "pickPicture")


def _pace_controls(rules: Rules) -> None:
    with gr.Column(elem_classes="play-card", min_width=280):
        gr.Markdown("### Pace")
        with gr.Row():
            fps = gr.Slider(1, max(30, rules.fps), rules.fps, step=1, label="Frames a second",
                            min_width=200, buttons=[], elem_id="play-fps")  # fmt: skip
            steps = gr.Radio(
                ["auto", *map(str, rules.steps)], value="auto", label="DDIM steps", min_width=260,
                elem_id="play-steps",
            )  # fmt: skip
    _call_on_change(fps, "setFps")
    _call_on_change(steps, "setSteps")


def _call_on_change(control, method: str) -> None:
    control.change(
        None, [control], None, js=f"(value) => {{ window.play.{method}(value); }}",
        queue=False, show_progress="hidden",
    )  # fmt: skip


def _save_controls() -> None:
    with gr.Column(elem_classes="play-card", min_width=280):
        gr.Markdown("### Record")
        with gr.Row():
            record = gr.Button("● Record", size="sm", min_width=90, elem_id="play-record")
            clear = gr.Button("Clear", size="sm", min_width=90, elem_id="play-clear")
        with gr.Row():
            video = gr.Button("Video (mp4)", size="sm", min_width=90, elem_id="play-mp4")
            numbers = gr.Button("Data (npz)", size="sm", min_width=90, elem_id="play-npz")
    _call(record, "record")
    _call(clear, "clear")
    _call(video, "saveVideo")
    _call(numbers, "saveNumbers")


def _share_controls() -> None:
    with gr.Column(elem_classes="play-card", min_width=280):
        gr.Markdown("### Share")
        code = gr.Textbox(
            label="Share code", lines=2, max_lines=4, buttons=["copy"], elem_id="play-code",
            placeholder="Make a code of this session, or paste one to replay it",
        )  # fmt: skip
        with gr.Row():
            make = gr.Button("Make code", size="sm", min_width=90, elem_id="play-share")
            replay = gr.Button("Play code", size="sm", min_width=90, elem_id="play-replay")
    _call(make, "share", outputs=code)
    _call(replay, "replay", (code,))
