from __future__ import annotations

import pytest
import yaml

from layerwright.core.errors import InputError
from layerwright.score.device import bank_pim, device, devices, duplex, h100

GOOD = """
name: mine
high: {flops: 1e15, bandwidth: 3e12}
low: {name: near, bandwidth: 1.2e+13, op_per_byte: 8}
links: {bandwidth: 9e11}
energy: {op_joules: 5e-13, high_byte_joules: 3e-11, low_byte_joules: 2e-11}
layout: shared
"""


def test_presets() -> None:
    names = {item.name for item in devices()}
    assert names == {"h100", "duplex", "bank_pim", "bankgroup_pim", "hetero", "duplex_split"}
    assert h100().low is None
    assert duplex().low is not None and bank_pim().low is not None
    assert bank_pim().low.bandwidth == 16 * h100().high.bandwidth
    assert bank_pim().low.ridge == 1
    assert {device(name).layout for name in ("hetero", "duplex_split")} == {"hetero", "split"}
    assert all(item.capacity_bytes == 80 * 1024**3 and item.about for item in devices())


def test_a_file_describes_a_device_and_survives_yaml(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    found = device(path)
    assert found.name == "mine"
    # YAML 1.1 reads 1e15 as a text
    assert found.high.peak_flops == 1e15 and found.high.name == "high"
    assert found.low is not None and found.low.peak_flops == pytest.approx(9.6e13)
    assert found.links.bandwidth == 9e11 and found.links.latency_seconds == 3e-6
    assert found.energy is not None and found.energy.low_byte_joules == 2e-11
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(found.to_data()))
    assert device(again) == found
    assert device(found) is found


@pytest.mark.parametrize("item", devices(), ids=lambda item: item.name)
def test_every_preset_survives_yaml(item, tmp_path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text(yaml.safe_dump(item.to_data()))
    assert device(path) == item


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got NoneType, expected a mapping"),
        ("[1]", "got list, expected a mapping"),
        ("name: x", "high missing"),
        ("high: {flops: 1e+12}", "high: bandwidth missing"),
        ("high: 3", "high: got int, expected a mapping"),
        ("high: {flops: fast, bandwidth: 1}", "high: flops: got 'fast', expected a number"),
        ("high: {flops: true, bandwidth: 1}", "expected a number"),
        ("high: {flops: 1, bandwidth: 1, bandwith: 2}", "unknown field 'bandwith'.*did you mean bandwidth"),
        ("high: {flops: 1, bandwidth: 1}\ncapacity_bytes: -5", "capacity_bytes: got -5"),
        ("high: {flops: 1, bandwidth: 1}\nlayout: heter", "did you mean hetero"),
        ("high: [", "is not valid YAML"),
        ("high: {flops: 1, bandwidth: 1}\nlinks: {bandwidth: -1}", "links: bandwidth: got -1"),
    ],
)
def test_files_that_describe_no_device(text, message, tmp_path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        device(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="unknown device 'dupleks'; did you mean duplex"):
        device("dupleks")
    with pytest.raises(FileNotFoundError, match=r"no device file at nothing\.yaml"):
        device("nothing.yaml")
