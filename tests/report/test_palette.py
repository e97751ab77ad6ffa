"""Every treatment has its own look."""

from __future__ import annotations

from layerwright.report.palette import NEUTRAL, palette


def _luminance(colour: str) -> float:
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_natural_order_and_neutral_labels():
    marks = palette(["int16 rtn", "not planned", "int2 rtn", "kept", "int2 rtn"])
    assert list(marks) == ["int2 rtn", "int16 rtn", "kept", "not planned"]
    assert marks["kept"].colour == marks["not planned"].colour == NEUTRAL


def test_order_of_input_does_not_matter():
    labels = ["rank 8", "drop", "int3 gptq", "2:4 wanda"]
    assert palette(labels) == palette(reversed(labels))


def test_dropped_is_grey_and_unlike_what_is_kept():
    marks = palette(["drop", "kept", "int2"])
    assert list(marks) == ["int2", "drop", "kept"]
    assert len({mark.colour for mark in marks.values()}) == 3


def test_a_generator_is_read_once():
    assert list(palette(label for label in ("kept", "int2"))) == ["int2", "kept"]


def test_twenty_eight_labels_all_look_different():
    marks = palette(f"int{i} gptq" for i in range(28))
    assert len({(m.colour, m.pattern) for m in marks.values()}) == 28
    assert len({(m.colour, m.symbol) for m in marks.values()}) == 28


def test_text_on_colours_has_contrast():
    for mark in palette(f"int{i}" for i in range(7)).values():
        light, dark = sorted((_luminance(mark.colour), _luminance(mark.ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, mark
