from __future__ import annotations

from pathlib import Path

import pytest

from trifold.shared.errors import ConfigError
from trifold.shared.settings import SETTINGS, CloudSettings, DeviceSettings, EdgeSettings


@pytest.fixture(autouse=True)
def _clean_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for settings in SETTINGS:
        for name in settings.model_fields:
            monkeypatch.delenv(settings.variable(name), raising=False)
    monkeypatch.delenv("TRIFOLD_CONFIG", raising=False)


def write(text: str, path: str = "trifold.toml") -> Path:
    Path(path).write_text(text)
    return Path(path)


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    write('[edge]\nbundle = "b"\nlisten = "127.0.0.1:1"\ncore = "127.0.0.1:1"\nlease = 1\n')
    monkeypatch.setenv("TRIFOLD_EDGE_LISTEN", "127.0.0.1:2")
    monkeypatch.setenv("TRIFOLD_EDGE_CORE", "127.0.0.1:2")
    settings = EdgeSettings.load(listen="127.0.0.1:3", timeout=None)
    assert (settings.listen, settings.core) == ("127.0.0.1:3", "127.0.0.1:2")
    assert (settings.lease, settings.timeout) == (1.0, 30.0)


def test_a_file_is_given_by_flag_by_variable_or_lies_in_the_working_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write('[device]\nbundle = "here"\n')
    assert DeviceSettings.load().bundle == Path("here")
    monkeypatch.setenv("TRIFOLD_CONFIG", str(write('[device]\nbundle = "variable"\n', "variable.toml")))
    assert DeviceSettings.load().bundle == Path("variable")
    assert DeviceSettings.load(write('[device]\nbundle = "flag"\n', "flag.toml")).bundle == Path("flag")


def test_each_tier_reads_its_own_section(monkeypatch: pytest.MonkeyPatch) -> None:
    write('[cloud]\nbundle = "c"\nkv_memory = "512MiB"\n\n[edge]\nbundle = "e"\n')
    assert CloudSettings.load().kv_memory == 512 * 1024**2
    assert EdgeSettings.load().bundle == Path("e")
    monkeypatch.setenv("TRIFOLD_CLOUD_INEXACT", "true")
    assert CloudSettings.load().inexact
    assert not EdgeSettings.load().inexact


def test_an_unknown_key_is_named_with_its_line_whichever_tier_asks() -> None:
    write('[cloud]\nbundle = "b"\n\n[edge]\nbundle = "e"\n# lisen = 1\nlisen = "127.0.0.1:1"\n')
    with pytest.raises(
        ConfigError, match=r"trifold.toml line 7: .*'lisen' in \[edge\]; did you mean listen\?"
    ):
        CloudSettings.load()


def test_an_unknown_section_is_named_with_its_line() -> None:
    write('[cloud]\nbundle = "b"\n[cluod]\nbundle = "b"\n')
    with pytest.raises(ConfigError, match=r"line 3: .*\[cluod\]; did you mean cloud\?"):
        CloudSettings.load()


def test_a_key_outside_of_sections_is_named_with_its_line() -> None:
    write('# settings\nbundle = "b"\n')
    with pytest.raises(ConfigError, match=r"line 2: .*bundle"):
        DeviceSettings.load()


def test_a_wrong_value_is_told_where_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--threads is -1"):
        CloudSettings.load(bundle="b", threads=-1)
    monkeypatch.setenv("TRIFOLD_CLOUD_LISTEN", "nowhere")
    with pytest.raises(ConfigError, match="TRIFOLD_CLOUD_LISTEN is 'nowhere': 'nowhere' is not HOST:PORT"):
        CloudSettings.load(bundle="b")
    write('[edge]\nbundle = "b"\n\nlease = "soon"\n')
    with pytest.raises(ConfigError, match=r"trifold.toml line 4, lease, is 'soon'"):
        EdgeSettings.load()


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("threads", "many", "it must be a whole number"),
        ("threads", -1, "it must be 0 or above"),
        ("lease", "soon", "it must be a number"),
        ("lease", 0, "it must be above 0"),
        ("kv_memory", "8 gigs", "it must be a size such as 512MiB or 8GiB"),
        ("inexact", "maybe", "it must be true or false"),
        ("log_level", "loud", "it must be 'debug', 'info', 'warning' or 'error'"),
        ("bundle", 3, "it must be text"),
        ("listen", 3, "it must be text"),
    ],
)
def test_a_wrong_value_is_told_what_it_must_be(name: str, value: object, wanted: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        CloudSettings.load(None, **({"bundle": "b"} | {name: value}))
    assert refusal.value.message == f"{CloudSettings.spelling(name)} is {value!r}: {wanted}"


def test_a_log_level_may_be_written_in_any_case() -> None:
    assert CloudSettings.load(bundle="b", log_level="INFO").log_level == "info"


def test_an_empty_variable_counts_as_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIFOLD_DEVICE_BUNDLE", "")
    monkeypatch.setenv("TRIFOLD_CONFIG", "")
    with pytest.raises(ConfigError, match="bundle of the device is not set"):
        DeviceSettings.load()
    write('[device]\nbundle = "b"\n')
    assert DeviceSettings.load().bundle == Path("b")


def test_an_unknown_variable_is_refused_whichever_tier_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIFOLD_EDGE_LISEN", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"TRIFOLD_EDGE_LISEN; did you mean TRIFOLD_EDGE_LISTEN\?"):
        CloudSettings.load(bundle="b")


@pytest.mark.parametrize("value", ["127.0.0.1", ":50", "host:", "host:65536", "host:-1", "host:x"])
def test_an_address_needs_host_and_port(value: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        DeviceSettings.load(bundle="b", edge=value)


def test_a_setting_that_must_be_given_is_asked_for_by_all_its_names() -> None:
    with pytest.raises(ConfigError, match=r"BUNDLE, TRIFOLD_CLOUD_BUNDLE or bundle in \[cloud\]"):
        CloudSettings.load()
    with pytest.raises(ConfigError, match=r"--bundle, TRIFOLD_DEVICE_BUNDLE or bundle in \[device\]"):
        DeviceSettings.load()


def test_a_file_that_is_missing_or_not_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml cannot be read"):
        CloudSettings.load(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"bad.toml is not TOML: .*line 1"):
        CloudSettings.load(write("listen = ?", "bad.toml"))
