"""The quickstart's sentence and figures, on numbers that can be checked by hand."""

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from tokenformer.reports.quickstart import answer, draw_growth


def made_up(grown: float, scratch: float, scratch_losses: list[float]) -> dict[str, Any]:
    """Base costs 100 FLOPs, growing 100 more, from scratch 200; the grown model's training loss ends at 3."""

    def model(perplexity: float, parameters: int) -> dict[str, Any]:
        return {"eval_perplexity": perplexity, "parameters": parameters}

    def curve(losses: list[float], step: float) -> list[dict[str, Any]]:
        return [{"step": i, "flops": step * i, "loss": loss} for i, loss in enumerate(losses, 1)]

    return {
        "models": {
            "base": model(30, 1_000_000),
            "grown": model(grown, 3_000_000),
            "scratch": model(scratch, 3_000_000),
        },
        "cumulative_flops": {"base": 100, "grown": 200, "scratch": 200},
        "curves": {
            "base": curve([5, 4.5, 4, 3.8, 3.6], 20),
            "grown": [*curve([3] * 5, 20), {"step": 5, "flops": 100, "eval_loss": 9.0}],
            "scratch": curve(scratch_losses, 20),
        },
    }


@pytest.mark.parametrize(
    ("grown", "scratch", "verdict"),
    [
        (18.0, 20.0, "10.0 % lower (better) when grown"),
        (22.0, 20.0, "10.0 % higher (worse) when grown"),
        (20.05, 20.0, "equal"),
    ],
    ids=["better", "worse", "equal"],
)
def test_the_answer_says_what_came_out(grown: float, scratch: float, verdict: str) -> None:
    sentence = answer(made_up(grown, scratch, [6.0] * 10))
    assert f"{grown:.2f} grown and {scratch:.2f} from scratch" in sentence
    assert verdict in sentence
    assert "reached" not in sentence


def test_the_flops_saved_are_read_off_the_curves() -> None:
    # the mean of five logs is first at 3 with the eighth of ten: 160 of 200 FLOPs
    sentence = answer(made_up(18.0, 20.0, [6, 5, 4, 3, 3, 3, 3, 3, 3, 3]))
    assert "after 80% of its FLOPs" in sentence


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw_growth(made_up(18.0, 20.0, [6.0] * 10), tmp_path / "growth.png")
    pixels = matplotlib.image.imread(tmp_path / "growth.png")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 1000
    for colour in ((0x1F, 0x77, 0xB4), (0xD6, 0x27, 0x28), (0x7F, 0x7F, 0x7F)):
        near = abs(pixels[..., :3] * 255 - colour).max(-1) < 40
        assert near.sum() > 200, f"no line of colour {colour}"
