"""The figures: drawn from recorded rows alone, and honest when the rows are few, broken or without gates."""

import numpy as np
import pytest
from processes import run_script

from rezero_hf.figures import gate_history, gate_map, log_ticks, loss_curve, new_figure
from rezero_hf.runs import read_metrics


def recorded(layers=12, steps=60, gates=1, diverges_at=None):
    """Rows as a run writes them: a training row every 2 steps, an evaluation every 20."""
    rows = []
    for step in range(0, steps + 1, 2):
        value = 2 + 6 * 0.95**step
        if step:
            broken = diverges_at is not None and step >= diverges_at
            rows.append(
                {
                    "event": "train",
                    "step": step,
                    "tokens": 64 * step,
                    "bits_per_byte": float("nan") if broken else value,
                }
            )
        if step % 20 == 0:
            alpha = {f"model.layers.{i}.residual_norm.alpha": [0.01 * i * step] * gates for i in range(layers)}
            rows.append({"event": "eval", "step": step, "split": "validation", "bits_per_byte": value, "alpha": alpha})
    return rows


def size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def drawn(path):
    """The picture as numbers; proves that something was drawn."""
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    assert pixels.std() > 0.01
    return pixels


@pytest.mark.parametrize(("layers", "gates"), [(1, 1), (12, 1), (64, 2)])
def test_figures_fit_a_card(tmp_path, layers, gates):
    """Both pictures are twice as wide as a card shows them and less tall than wide, at any depth."""
    rows = recorded(layers, gates=gates)
    for draw in (loss_curve, gate_map):
        path = draw(rows, tmp_path / "figures" / f"{draw.__name__}.png")
        width, height = size(path)
        assert width == 1600
        assert height < width
        drawn(path)


def test_the_curve_depends_on_every_kind_of_row(tmp_path):
    """Leaving out the training rows, or the validation rows, changes the picture; either alone can be drawn."""
    rows = recorded()
    both = drawn(loss_curve(rows, tmp_path / "both.png"))
    for event in ("train", "eval"):
        only = drawn(loss_curve([row for row in rows if row["event"] == event], tmp_path / f"{event}.png"))
        assert not np.array_equal(only, both)


def test_what_has_no_bytes_is_drawn_in_nats(tmp_path):
    """An image classifier records a loss alone: the same curve under another name, and only when asked for."""
    rows = [{**row, "loss": row["bits_per_byte"]} for row in recorded()]
    bits, nats = drawn(loss_curve(rows, tmp_path / "bits.png")), drawn(loss_curve(rows, tmp_path / "nats.png", "loss"))
    assert not np.array_equal(bits, nats)
    for row in rows:
        del row["bits_per_byte"]
    assert np.array_equal(nats, drawn(loss_curve(rows, tmp_path / "alone.png", "loss")))
    with pytest.raises(ValueError, match="no finite bits_per_byte"):
        loss_curve(rows, "never.png")


@pytest.mark.parametrize("low", [2.0, 0.1, 1e-3, 1e-6])
def test_numbers_on_a_logarithmic_axis_keep_apart(low):
    """However many powers of ten a loss falls through, there are a few labels and not one on another."""
    _, axes = new_figure(4.6)
    log_ticks(axes, [low, 3.0])
    bottom, top = axes.get_ylim()
    assert 2 <= sum(bottom <= tick <= top for tick in axes.get_yticks()) <= 12


def test_the_same_rows_give_the_same_file(tmp_path):
    """A figure is a function of its rows: no dates, no version strings in it."""
    first, second = (loss_curve(recorded(), tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second


def test_a_diverged_run_is_drawn_as_one(tmp_path):
    """Values that are not finite neither stop the drawing nor vanish without a mark."""
    broken = loss_curve(recorded(diverges_at=40), tmp_path / "broken.png")
    shorter = [row for row in recorded() if row["event"] == "eval" or row["step"] < 40]
    assert not np.array_equal(drawn(broken), drawn(loss_curve(shorter, tmp_path / "short.png")))


def test_nothing_to_draw_is_an_error():
    """Without a finite value there is no loss curve, without gates no gate map, and nothing is written."""
    with pytest.raises(ValueError, match="no finite bits_per_byte"):
        loss_curve([{"event": "train", "step": 1, "bits_per_byte": float("nan")}], "never.png")
    without = [{"event": "eval", "step": 1, "split": "validation", "bits_per_byte": 2.0, "alpha": {}}]
    assert gate_history(without) is None
    with pytest.raises(ValueError, match="a model without gates has no gate map"):
        gate_map(without, "never.png")


def test_gates_are_ordered_from_the_input(tmp_path):
    """Layer 10 comes after layer 9, whatever the order in the row, and a layer not recorded is missing, not zero."""
    alpha = {f"model.layers.{i}.residual_norm.alpha": [i / 10, -i / 10] for i in (10, 2, 0, 9)}
    rows = [
        {
            "event": "eval",
            "step": 0,
            "split": "validation",
            "alpha": {"model.layers.2.residual_norm.alpha": [0.5, 0.6]},
        },
        {"event": "eval", "step": 5, "split": "validation", "alpha": alpha},
    ]
    steps, history = gate_history(rows)
    assert steps.tolist() == [0, 5]
    assert history[:, 1, 0].tolist() == [0.0, 0.2, 0.9, 1.0]
    assert history[1, 0].tolist() == [0.5, 0.6]
    assert np.isnan(history[[0, 2, 3], 0]).all()
    drawn(gate_map(rows, tmp_path / "gates.png"))


def test_untrained_gates_can_be_drawn(tmp_path):
    """One evaluation at step 0, every gate 0: still a picture."""
    assert size(gate_map(recorded(steps=0), tmp_path / "gates.png"))[0] == 1600


def test_a_resumed_run_counts_each_step_once():
    """Of two rows for one step, the later in the file is the one that led to the final weights."""
    rows = [*recorded(layers=1, steps=20), *recorded(layers=1, steps=20)]
    rows[-1]["alpha"] = {"model.layers.0.residual_norm.alpha": [7.0]}
    steps, history = gate_history(rows)
    assert steps.tolist() == [0, 20]
    assert history[0, -1, 0] == 7.0


def test_read_metrics_gives_the_rows(tmp_path):
    """What was written line by line comes back, and empty lines do not matter."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"event": "train", "step": 1, "text": "a\u2028b"}\n\n{"event": "eval", "step": 2}\n', encoding="utf-8"
    )
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('{"step": 1}\n{"step": 2, "lo', 2, "delete it"),
        ('{"step": 1}\n\n[1, 2]\n', 3, "expected a JSON object, found list"),
    ],
)
def test_a_broken_line_is_named(tmp_path, text, line, says):
    """A torn or foreign line raises one line of text with file, line number and way out."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        read_metrics(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert "\n" not in str(caught.value)


def test_drawing_leaves_matplotlib_alone(tmp_path):
    """Importing the module imports no matplotlib; drawing neither imports pyplot nor needs a display."""
    code = (
        "import sys; import rezero_hf.figures as f; assert 'matplotlib' not in sys.modules\n"
        "f.loss_curve([{'event': 'train', 'step': s, 'bits_per_byte': 9 / s} for s in (1, 2)], sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    (tmp_path / "draw.py").write_text(code)
    done = run_script(tmp_path / "draw.py", tmp_path / "loss.png")
    assert done.returncode == 0, done.stderr
