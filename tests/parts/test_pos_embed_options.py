"""Options of position embeddings that exclude each other, and their error messages."""

from typing import Any

import pytest

from vlparts.parts.pos_embed_options import check_position_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rotary"}, "`kind` must be one of learned, sinusoidal, fourier, got 'rotary'"),
        (
            {"coordinates": "polar"},
            "`coordinates` must be one of absolute, fractional, .*, got 'polar'",
        ),
        ({"combination": "max"}, "`combination` must be one of add, stack, product, joint, flat, got 'max'"),
        ({"interpolation": "nearest"}, "`interpolation` must be one of bilinear, .*, got 'nearest'"),
        ({"overflow": "clamp"}, "`overflow` must be one of error, interpolate, got 'clamp'"),
        (
            {"kind": "sinusoidal", "combination": "joint"},
            "`combination` must be one of add, stack, product with `kind`='sinusoidal', got 'joint'",
        ),
        ({"kind": "sinusoidal", "combination": "flat"}, "`combination` .* with `kind`='sinusoidal', got 'flat'"),
        (
            {"kind": "fourier", "combination": "flat", "coordinates": "absolute"},
            "`combination` must be one of add, stack, product, joint with `kind`='fourier', got 'flat'",
        ),
        ({"combination": "flat"}, "`coordinates` must be 'absolute' with `combination`='flat', got 'fractional'"),
        ({"hidden_size": 0}, "`hidden_size` must be at least 1, got 0"),
        ({"max_grid_size": 0}, "`max_grid_size` must be at least 1, got 0"),
        ({"hidden_size": 9, "combination": "stack"}, "`hidden_size` must be a multiple of 2 .*, got 9"),
        ({"hidden_size": 9, "kind": "sinusoidal"}, "`hidden_size` must be a multiple of 2 .*, got 9"),
        ({"hidden_size": 9, "kind": "fourier", "combination": "joint"}, "`hidden_size` must be a multiple of 2"),
        (
            {"hidden_size": 10, "kind": "fourier", "combination": "stack"},
            "`hidden_size` must be a multiple of 4 with `kind`='fourier' and `combination`='stack', got 10",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_position_options(**{"hidden_size": 8, "max_grid_size": 4, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "none"}, "`position_kind` must"),
        ({"kind": "fourier", "combination": "flat"}, "`position_combination` must .* with `position_kind`='fourier'"),
        ({"combination": "flat"}, "`position_coordinates` must be 'absolute' with `position_combination`='flat'"),
        ({"hidden_size": 9, "kind": "fourier"}, "`hidden_size` must .* with `position_kind`='fourier'"),
    ],
)
def test_names_carry_the_prefix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_position_options(**{"hidden_size": 8, "max_grid_size": 4, "prefix": "position_", **options})


def test_odd_widths_are_possible() -> None:
    for combination in ("add", "product", "joint"):
        check_position_options(9, 1, combination=combination)
    check_position_options(9, 1, combination="flat", coordinates="absolute")
