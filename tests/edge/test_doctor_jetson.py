from __future__ import annotations

from pathlib import Path

import pytest

from tests.edge.jetsons import ORIN_NANO, ORIN_NX, THOR, XAVIER, Board, put
from trifold.edge.doctor.finding import Finding
from trifold.edge.doctor.jetson import JETSON
from trifold.edge.doctor.patient import Patient


def found(root: Path) -> list[Finding]:
    findings = list(JETSON.findings(Patient(root=root)))
    assert all(finding.remedy for finding in findings if finding.verdict in ("warning", "fault"))
    return findings


def details(root: Path) -> str:
    return "\n".join(finding.detail for finding in found(root))


@pytest.mark.parametrize(
    ("board", "release", "tensorrt"),
    [
        (
            ORIN_NANO,
            "Orin Nano Engineering Reference Developer Kit Super: L4T R36.4.7, JetPack 6.2.1+b38",
            "10.3.0",
        ),
        (THOR, "NVIDIA Jetson AGX Thor Developer Kit: L4T R38.2.0, JetPack 7", "10.13.3.9-1+cuda13.0"),
        (ORIN_NX, "Orin NX Engineering Reference Developer Kit: L4T R39.2.1, JetPack 7.2.1-b49", ""),
    ],
)
def test_a_board_is_told_by_its_files(board: Board, release: str, tensorrt: str, tmp_path: Path) -> None:
    told = details(board.under(tmp_path))
    assert release in told
    assert f"TensorRT {tensorrt or 'is not installed'}" in told
    assert "tj-thermal is at 54 °C" in told


def test_a_board_without_a_fault_has_none(tmp_path: Path) -> None:
    assert {finding.verdict for finding in found(ORIN_NANO.under(tmp_path))} == {"ok"}


def test_what_is_no_jetson_is_skipped(tmp_path: Path) -> None:
    [finding] = found(tmp_path)
    assert (finding.verdict, finding.detail) == (
        "skipped",
        "this is no Jetson: there is no /etc/nv_tegra_release",
    )


def test_a_jetson_that_is_too_old_is_a_fault(tmp_path: Path) -> None:
    first = found(XAVIER.under(tmp_path))[0]
    assert first.verdict == "fault"
    assert "R35.4.1 is too old" in first.detail
    assert "JetPack 6 or 7" in first.remedy


def test_a_container_that_hides_the_release_is_told_how_to_show_it(tmp_path: Path) -> None:
    put(tmp_path / "proc/device-tree/model", f"{THOR.model}\0")
    [finding] = found(tmp_path)
    assert finding.verdict == "warning"
    assert "-v /etc/nv_tegra_release" in finding.remedy


def test_a_release_of_another_form_is_told(tmp_path: Path) -> None:
    put(tmp_path / "etc/nv_tegra_release", "# Orin, some day\n")
    [finding] = found(tmp_path)
    assert finding.verdict == "warning"
    assert "# Orin, some day" in finding.detail


def test_packages_that_an_upgrade_left_half_way_are_a_fault(tmp_path: Path) -> None:
    root = ORIN_NANO.under(tmp_path, halves=["nvidia-l4t-multimedia"])
    [finding] = [finding for finding in found(root) if finding.verdict == "fault"]
    assert finding.detail == "not fully installed: nvidia-l4t-multimedia"
    assert "dpkg --configure -a" in finding.remedy


def test_packages_of_another_release_than_the_board_booted_are_told(tmp_path: Path) -> None:
    root = ORIN_NANO.under(tmp_path, nvidia_l4t_core="36.4.4-20250616085344")
    [finding] = [finding for finding in found(root) if finding.verdict == "warning"]
    assert "nvidia-l4t-core is 36.4.4-20250616085344" in finding.detail


def test_tensorrt_that_no_package_brought_is_found_by_its_library(tmp_path: Path) -> None:
    put(ORIN_NX.under(tmp_path) / "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.16.2", "")
    assert "TensorRT 10.16.2" in details(tmp_path)


def test_a_power_mode_that_caps_the_clocks_is_told_with_the_fastest_by_its_name(tmp_path: Path) -> None:
    root = ORIN_NANO.under(tmp_path)
    put(root / "var/lib/nvpmodel/status", "pmode:0003")
    [finding] = [finding for finding in found(root) if finding.verdict == "warning"]
    assert finding.detail == "power mode 7W (3) caps the clocks"
    assert finding.remedy.endswith("sudo nvpmodel -m 2 (MAXN_SUPER)")


def test_a_power_mode_that_nobody_chose_is_the_default_of_the_board(tmp_path: Path) -> None:
    assert "power mode 120W (1) caps the clocks" in details(THOR.under(tmp_path))


def test_a_board_that_is_too_hot_is_told(tmp_path: Path) -> None:
    put(ORIN_NANO.under(tmp_path) / "sys/class/thermal/thermal_zone1/temp", "97000\n")
    [finding] = [finding for finding in found(tmp_path) if finding.verdict == "warning"]
    assert finding.detail == "tj-thermal is at 97 °C: the clocks go down"
