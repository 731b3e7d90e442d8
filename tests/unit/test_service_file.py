"""fastlb.service: it is in the wheel and in the source distribution. tests/netns/test_systemd.py runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).parents[2]
UNIT = "examples/systemd/fastlb.service"


@pytest.fixture
def distribution(monkeypatch: pytest.MonkeyPatch) -> Distribution:
    monkeypatch.chdir(ROOT)
    made = Distribution()
    made.parse_config_files(["pyproject.toml"])
    return made


@pytest.mark.filterwarnings("ignore:setup.py install is deprecated")
def test_a_wheel_installs_it(distribution: Distribution, tmp_path: Path) -> None:
    """Below the prefix, where systemd looks if that is /usr or /usr/local."""
    command = distribution.get_command_obj("install_data")
    command.install_dir = str(tmp_path)
    command.ensure_finalized()
    command.run()
    assert (tmp_path / "lib/systemd/system/fastlb.service").read_text() == (ROOT / UNIT).read_text()


def test_a_source_distribution_has_it(distribution: Distribution) -> None:
    assert distribution.data_files == [("lib/systemd/system", [UNIT])]
