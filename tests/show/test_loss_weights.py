"""The picture of a loss's weights: what is drawn, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.show.test_boxes import assert_readable
from vlparts.losses.weights import PRESETS, weigh_tokens
from vlparts.show import loss_weights

LABELS = torch.tensor([-100, 5, -100, -100, 1, 2, 3, 4, 5, 6, -100, 7, 8])
LENGTHS = torch.tensor([0, 2, 10, 13])


def strips(figure: Any) -> list[Any]:
    return [ax.images[0].get_array() for ax in figure.axes if ax.images]


def bars(figure: Any) -> list[list[np.ndarray]]:
    drawn = [[container.datavalues for container in ax.containers] for ax in figure.axes]
    return [pair for pair in drawn if len(pair) == 2]


def test_weights_and_shares_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    figure = loss_weights(LABELS, cu_seqlens=LENGTHS, path=path)
    assert_readable(path)
    valid = (LABELS != -100).numpy()
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.images]
    assert titles == list(PRESETS)
    for preset, strip, (tokens, loss) in zip(PRESETS, strips(figure), bars(figure), strict=True):
        weights = weigh_tokens(LABELS, preset=preset, cu_seqlens=LENGTHS, dtype=torch.float64).weights.numpy()
        np.testing.assert_array_equal(np.ma.getmaskarray(strip)[0] | np.isnan(np.ma.getdata(strip)[0]), ~valid)
        np.testing.assert_allclose(np.ma.getdata(strip)[0][valid], weights[valid] * valid.sum())
        np.testing.assert_allclose(tokens, [1 / 9, 6 / 9, 2 / 9])
        np.testing.assert_allclose(loss, [weights[:2].sum(), weights[2:10].sum(), weights[10:].sum()])
        assert loss.sum() == pytest.approx(1)
    np.testing.assert_allclose(bars(figure)[1][1], 1 / 3)


def test_rows_share_their_scales_and_are_labelled() -> None:
    figure = loss_weights(LABELS, ["token", "sample"], cu_seqlens=LENGTHS)
    strip, other = [ax for ax in figure.axes if ax.images]
    assert strip.images[0].get_clim() == other.images[0].get_clim()
    low, high = strip.images[0].get_clim()
    assert (low * high, high) == (pytest.approx(1), pytest.approx(3))
    first, second = [ax for ax in figure.axes if len(ax.containers) == 2]
    assert first.get_ylim() == second.get_ylim()
    assert first.get_ylim()[1] > 6 / 9
    assert (other.get_xlabel(), second.get_xlabel()) == ("token", "sample")
    lines = np.array([segment[0][0] for segment in strip.collections[0].get_segments()])
    np.testing.assert_array_equal(lines, [2, 10])


def test_given_weights_count_and_options_have_titles() -> None:
    token_weights, sample_weights = torch.arange(13.0), torch.tensor([1.0, 2.0, 0.0])
    figure = loss_weights(
        LABELS,
        {"a quarter": {"mix": 0.25}},
        token_weights=token_weights,
        sample_weights=sample_weights,
        cu_seqlens=LENGTHS,
    )
    weights = weigh_tokens(
        LABELS,
        mix=0.25,
        token_weights=token_weights,
        sample_weights=sample_weights,
        cu_seqlens=LENGTHS,
        dtype=torch.float64,
    ).weights.numpy()
    (strip,) = strips(figure)
    (shares,) = bars(figure)
    seen = weights > 0
    np.testing.assert_allclose(np.ma.getdata(strip)[0][seen], weights[seen] * 9)
    np.testing.assert_array_equal(np.isnan(np.ma.filled(strip, np.nan))[0], ~seen)
    assert shares[1][2] == 0
    assert figure.axes[0].get_title(loc="left") == "a quarter"


def test_samples_by_ids_stand_together_without_padding() -> None:
    ids = torch.tensor([1, 0, 1, 0, -1, 1])
    figure = loss_weights(torch.ones(6, dtype=torch.int64), ["sample"], sample_ids=ids)
    (strip,) = strips(figure)
    np.testing.assert_allclose(strip[0], np.array([1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6]) * 5)


def test_many_tokens_are_means() -> None:
    labels = torch.where(torch.arange(3000) % 3 == 0, -100, 1)
    token_weights = torch.arange(3000.0)
    (strip,) = strips(loss_weights(labels, ["token"], token_weights=token_weights))
    relative = (weigh_tokens(labels, preset="token", token_weights=token_weights).weights * 2000).double()
    expected = [
        np.mean([relative[j] for j in range(i, min(i + 3, 3000)) if relative[j] > 0]) for i in range(0, 3000, 3)
    ]
    np.testing.assert_allclose(strip[0], expected, rtol=1e-6)


def test_extreme_weights_leave_the_colours_to_the_others() -> None:
    figure = loss_weights(torch.ones(1, 3, dtype=torch.int64), token_weights=torch.tensor([[1e-6, 1.0, 1.0]]))
    figure.canvas.draw()
    assert figure.axes[0].images[0].get_clim() == (1 / 16, 16)


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        (LABELS, {"presets": []}, "`presets` must have at least one name, got none"),
        (LABELS, {"presets": ["mean"]}, "`preset` must be one of token, sample, square, openpangu_mix, got 'mean'"),
        (torch.full((4,), -100), {}, "`labels` must have at least one label, got none"),
        (LABELS, {"token_weights": torch.zeros(13)}, "`labels` must have a token with a weight above 0, got none"),
        (LABELS, {"token_weights": -torch.ones(13)}, "`token_weights` must be finite and at least 0, got -1.0"),
    ],
)
def test_bad_inputs_are_refused(labels: torch.Tensor, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_weights(labels, **changes)


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'vlparts\[show\]'"):
        loss_weights(LABELS)
