"""Where settings come from, what is refused and in which words."""

import argparse
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, get_args

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idalloc_tcp import config, kinds
from idalloc_tcp import settings as settings_module
from idalloc_tcp.address import TcpAddress, UnixAddress
from idalloc_tcp.config import Flag, Loaded, load
from idalloc_tcp.errors import SettingsError
from idalloc_tcp.pool import MAX_ID
from idalloc_tcp.settings import Fallback, Lane, LogFormat, LogLevel, Settings, setting

NAMES: Final = [field.name for field in attrs.fields(Settings)]


def from_file(folder: Path, content: str, **flags: Flag) -> Loaded:
    """What a file gives, under some flags."""
    path = folder / "x.toml"
    path.write_text(content)
    return load(flags, path, {})


def refusal(
    flags: Mapping[str, Flag] | None = None,
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> str:
    """The one line that says why settings are refused."""
    with pytest.raises(SettingsError) as caught:
        load(flags or {}, path, environ or {})
    assert str(caught.value).isprintable()
    return str(caught.value)


def refused_file(folder: Path, content: str) -> str:
    """Why a file is refused, with its path written as FILE."""
    path = folder / "x.toml"
    path.write_text(content)
    return refusal(path=path).replace(str(path), "FILE")


def parse(*arguments: str) -> dict[str, Flag]:
    """The flags of a command line."""
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    return config.given_flags(parser.parse_args(arguments))


# Sources


def test_without_any_source_there_are_the_defaults() -> None:
    """Nothing has to be given, and every setting says that it was not."""
    loaded = load({}, None, {"PATH": "/bin", "IDALLOC": "x"})
    assert loaded.settings == Settings()
    assert loaded.sources == dict.fromkeys(NAMES, "default")


def test_a_later_source_overrides_an_earlier_one(tmp_path: Path) -> None:
    """The file overrides the default, the environment the file, and a flag them all."""
    path = tmp_path / "x.toml"
    path.write_text("max_services = 1\nmax_count = 1\nsegment_size = 1\n")
    environ = {"IDALLOC_TCP_MAX_COUNT": "2", "IDALLOC_TCP_SEGMENT_SIZE": "2"}
    loaded = load({"segment_size": "3"}, path, environ)
    assert attrs.evolve(Settings(), max_services=1, max_count=2, segment_size=3) == loaded.settings
    assert {name: text for name, text in loaded.sources.items() if text != "default"} == {
        "max_services": f"file {path}",
        "max_count": "environment IDALLOC_TCP_MAX_COUNT",
        "segment_size": "flag --segment-size",
    }


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    """IDALLOC_TCP_CONFIG names the file, unless --config does."""
    named, stronger = tmp_path / "named.toml", tmp_path / "stronger.toml"
    named.write_text("max_count = 1")
    stronger.write_text("max_count = 2")
    environ = {"IDALLOC_TCP_CONFIG": str(named)}
    assert load({}, None, environ).settings.max_count == 1
    assert load({}, stronger, environ).settings.max_count == 2


def test_what_overrides_replaces_a_whole_table(tmp_path: Path) -> None:
    """A list or a table is never put together from several sources."""
    loaded = from_file(tmp_path, 'listen = ["a:1", "b:2"]\n[ceilings]\na = 1', ceilings=["b=2"])
    assert loaded.settings.ceilings == {"b": 2}
    assert loaded.settings.listen == ("a:1", "b:2")


# Values


@pytest.mark.parametrize("text", ["10_000", "10000", " 10000 ", "+10000"])
def test_an_integer_in_a_text(text: str) -> None:
    """Digits may be grouped."""
    environ = {"IDALLOC_TCP_SEGMENT_SIZE": text}
    assert load({"max_count": text}, None, environ).settings == Settings(
        max_count=10_000, segment_size=10_000
    )


def test_a_duration_may_be_a_whole_number(tmp_path: Path) -> None:
    """60 means 60.0, in a file and in a text."""
    loaded = from_file(tmp_path, "pool_seconds = 7", idle_seconds="8")
    assert (loaded.settings.pool_seconds, loaded.settings.idle_seconds) == (7.0, 8.0)
    assert isinstance(loaded.settings.pool_seconds, float)


def test_addresses_to_listen_on() -> None:
    """A variable parts addresses by commas, a flag may be repeated too; both come back parsed."""
    environ = {"IDALLOC_TCP_LISTEN": "localhost:0080, unix:/run/x"}
    from_environment = load({}, None, environ).settings
    assert from_environment.listen == ("localhost:80", "unix:/run/x")
    assert from_environment.addresses() == [TcpAddress("localhost", 80), UnixAddress("/run/x")]
    repeated = load({"listen": ["[::1]:1", "[::1]:2"]}, None, environ).settings
    assert repeated.addresses() == [TcpAddress("::1", 1), TcpAddress("::1", 2)]


def test_ceilings_go_by_folded_names(tmp_path: Path) -> None:
    """A service has one ceiling, however its name is spelt, in a table and in a text."""
    table = from_file(tmp_path, '[ceilings]\nOrders = 5\n"a.b:c" = 6')
    assert table.settings.ceilings == {"orders": 5, "a.b:c": 6}
    text = load({"ceilings": ["Orders=5, a=1", "a.b:c = 6"]}, None, {})
    assert text.settings.ceilings == {"orders": 5, "a": 1, "a.b:c": 6}


def test_the_highest_ceiling_is_the_highest_id() -> None:
    """Every ID of 63 bits may be a ceiling, and by default is."""
    assert Settings().ceiling == MAX_ID
    assert Settings(ceilings={"x": MAX_ID}).ceilings == {"x": MAX_ID}


def test_a_path_is_relative_to_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file to the file's directory, in a text to the working directory, `~` to the home."""
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.chdir("/")
    assert from_file(tmp_path, 'data = "a/ids"').settings.data == tmp_path / "a/ids"
    assert from_file(tmp_path, 'data = "~/ids"').settings.data == Path("/home/x/ids")
    assert from_file(tmp_path, 'data = "/ids"').settings.data == Path("/ids")
    assert load({"data": "a/ids"}, None, {}).settings.data == Path("/a/ids")
    monkeypatch.chdir(tmp_path.parent)
    relative = Path(tmp_path.name, "x.toml")
    relative.write_text('data = "b"')
    assert load({}, relative, {}).settings.data == tmp_path / "b"


def test_the_data_file_is_in_the_state_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless set, the data file is where the platform keeps the state of a user's programs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert Settings().data_path() == tmp_path / "idalloc-tcp/ids.sqlite3"
    assert not (tmp_path / "idalloc-tcp").exists()
    assert Settings(data=Path("/x")).data_path() == Path("/x")


# Refusals

INTEGER: Final = "expected an integer from 1 to 10_000_000, found"
WAIT: Final = "expected a number of seconds from 0.001 to 60, found"
LISTEN: Final = "expected a list of addresses (HOST:PORT, [IPv6]:PORT or unix:PATH), found"
CEILINGS: Final = f"expected service names, each with an integer from 1 to {MAX_ID:_}, found"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_count = 0", f"{INTEGER} 0"),
        ("max_count = 10000001", f"{INTEGER} 10_000_001"),
        ("max_count = 1.5", f"{INTEGER} 1.5"),
        ("max_count = 1.0", f"{INTEGER} 1.0"),
        ("max_count = true", f"{INTEGER} true"),
        ('max_count = "100"', f'{INTEGER} "100"'),
        ("max_count = [1]", f"{INTEGER} an array"),
        ("max_count = {a = 1}", f"{INTEGER} a table"),
        ("max_count = 1979-05-27", f"{INTEGER} a date"),
        ("max_count = 0x" + "f" * 9000, f"{INTEGER} an integer of 36000 bits"),
        ("wait_seconds = 0", f"{WAIT} 0"),
        ("wait_seconds = 60.5", f"{WAIT} 60.5"),
        ("wait_seconds = nan", f"{WAIT} nan"),
        ("wait_seconds = inf", f"{WAIT} inf"),
        ("wait_seconds = true", f"{WAIT} true"),
        ('wait_seconds = "2s"', f'{WAIT} "2s"'),
        ("idle_seconds = inf", "from 0.001 to 31_536_000, found inf"),
        ('listen = "localhost:1"', f'{LISTEN} "localhost:1"'),
        ("listen = []", f"{LISTEN} an array"),
        ("listen = [1]", f"{LISTEN} 1 among them"),
        (
            'listen = ["localhost:1", "::1:2"]',
            f'{LISTEN} "::1:2": an IPv6 address stands in brackets, as in [::1]:8642',
        ),
        ("data = 1", "expected the path of a file, in UTF-8, found 1"),
        ('data = ""', 'in UTF-8, found ""'),
        ('data = "a\\u0000b"', 'in UTF-8, found "a\\U00000000b"'),
        ('data = "~nobody-of-that-name/x"', 'in UTF-8, found "~nobody-of-that-name/x"'),
        ("ceilings = 1", f"{CEILINGS} 1"),
        ("ceilings = {a = 0}", f'{CEILINGS} "a" = 0'),
        ("ceilings = {a = 9223372036854775808}", '"a" = 9_223_372_036_854_775_808'),
        ("ceilings = {a.b = 1}", f'{CEILINGS} "a" = a table'),
        ("ceilings = {'a b' = 1}", '"a b" = 1: a name is 1 to 64 of the characters'),
        ("ceilings = {a = 1, A = 1}", "found a service that is named twice"),
        ('admin = "8643"', 'an address (HOST:PORT, [IPv6]:PORT or unix:PATH), found "8643": it is'),
        ("lease_segments = 0", "an integer from 1 to 1_000_000, found 0"),
        ("workers = 0", "an integer from 1 to 128, or auto, found 0"),
        ("workers = 'all'", 'an integer from 1 to 128, or auto, found "all"'),
        ("sync_workers = 1001", "an integer from 1 to 1_000, found 1_001"),
        ("create_table = 1", "expected true or false, found 1"),
        ('fallback = "on"', 'expected one of off, random, found "on"'),
        ("redis_key_prefix = 7", "expected at most 200 printable characters, found 7"),
        ('redis_key_prefix = "a\\u0007"', "printable characters, found"),
        ('redis_key_prefix = "' + "x" * 201 + '"', f'found "{"x" * 60}…"'),
        ("mysql = 7", "a URL that begins with mysql://, found something else (not shown"),
        ('log_level = "loud"', 'expected one of debug, info, warning, error, found "loud"'),
        ("log_level = []", "expected one of debug, info, warning, error, found an array"),
    ],
)
def test_a_wrong_value_in_a_file(tmp_path: Path, line: str, message: str) -> None:
    """The message names the key, the file, what was expected and what was found."""
    refused = refused_file(tmp_path, line)
    assert refused.startswith(f"{line.partition(' ')[0]} (file FILE): expected ")
    assert message in refused


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("max_count", "abc", f'{INTEGER} "abc"'),
        ("max_count", "", f'{INTEGER} ""'),
        ("max_count", "1.5", f'{INTEGER} "1.5"'),
        ("max_count", "1e6", f'{INTEGER} "1e6"'),
        ("max_count", "10k", f'{INTEGER} "10k"'),
        ("max_count", "true", f'{INTEGER} "true"'),
        ("max_count", "-5", f"{INTEGER} -5"),
        ("max_count", "9" * 5000, f'{INTEGER} "{"9" * 60}…"'),
        ("wait_seconds", "2s", f'{WAIT} "2s"'),
        ("wait_seconds", "1e400", f"{WAIT} inf"),
        ("listen", "", f'{LISTEN} "": it is none of HOST:PORT, [IPv6]:PORT and unix:PATH'),
        ("listen", "a:1,", f'{LISTEN} "": it is none of HOST:PORT, [IPv6]:PORT and unix:PATH'),
        ("data", "\udcff", 'in UTF-8, found "\\U0000dcff"'),
        ("ceilings", "orders", f'{CEILINGS} "orders"'),
        ("ceilings", "orders=x", f'{CEILINGS} "orders=x"'),
        ("ceilings", "a=1,a=1", f"{CEILINGS} a service that is named twice"),
        ("log_format", "JSON", 'expected one of console, json, found "JSON"'),
    ],
)
def test_a_wrong_text(name: str, text: str, message: str) -> None:
    """A variable and a flag are refused in the same words, each by its own name."""
    variable = f"IDALLOC_TCP_{name.upper()}"
    refused = refusal(environ={variable: text})
    assert refused.startswith(f"{name} (environment {variable}): expected ")
    assert refused.endswith(message)
    flag = f"flag --{name.replace('_', '-')}"
    assert refusal({name: text}) == refused.replace(f"environment {variable}", flag)


def test_an_unknown_key_in_the_file(tmp_path: Path) -> None:
    """A key that is not a setting is refused, with the one that was probably meant."""
    assert refused_file(tmp_path, "segment_sze = 1") == (
        "segment_sze (file FILE): unknown setting; did you mean segment_size?"
    )
    assert refused_file(tmp_path, "segment-size = 1") == (
        "segment-size (file FILE): unknown setting; did you mean segment_size?"
    )
    assert refused_file(tmp_path, "[zzz]\na = 1") == (
        "zzz (file FILE): unknown setting; `idalloc-tcp config` lists them all"
    )
    assert refused_file(tmp_path, '"a\\nb" = 1').startswith("a\\U0000000ab (file FILE): unknown")


@pytest.mark.parametrize(
    ("variable", "advice"),
    [
        ("IDALLOC_TCP_MAX_CONECTIONS", "did you mean IDALLOC_TCP_MAX_CONNECTIONS?"),
        ("IDALLOC_TCP_max_count", "did you mean IDALLOC_TCP_MAX_COUNT?"),
        ("IDALLOC_TCP_MAX-COUNT", "did you mean IDALLOC_TCP_MAX_COUNT?"),
        ("IDALLOC_TCP_ZZZ", "`idalloc-tcp config` lists them all"),
        ("IDALLOC_TCP_", "`idalloc-tcp config` lists them all"),
    ],
)
def test_an_unknown_variable(variable: str, advice: str) -> None:
    """A variable with our prefix that is not a setting is refused; capitals matter."""
    assert refusal(environ={variable: "5"}) == (
        f"{variable} (environment): unknown setting; {advice}"
    )


def test_the_first_of_several_mistakes_is_named(tmp_path: Path) -> None:
    """One line names the first mistake, in the order of the sources, and counts the others."""
    path = tmp_path / "x.toml"
    path.write_text("max_count = 0\nmax_services = 0\n")
    environ = {"IDALLOC_TCP_CEILING": "0"}
    refused = refusal({"listen": "x"}, path, environ)
    assert refused == f"max_count (file {path}): {INTEGER} 0 (and 3 more)"


def test_an_overridden_value_is_checked_as_well(tmp_path: Path) -> None:
    """A file is right or wrong by itself, whatever a flag says."""
    path = tmp_path / "x.toml"
    path.write_text("max_count = 0")
    assert refusal({"max_count": "1"}, path) == f"max_count (file {path}): {INTEGER} 0"


def test_contradicting_values(tmp_path: Path) -> None:
    """Values that are good alone but not together are refused with the sources of both."""
    path = tmp_path / "x.toml"
    path.write_text("segment_size = 20")
    environ = {"IDALLOC_TCP_MAX_COUNT": "5"}
    assert refusal({"segment_size_max": "10"}, path, environ) == (
        "segment_size_max (flag --segment-size-max): expected at least 20, "
        f"which is segment_size (file {path}), found 10"
    )
    assert refusal({"segment_size_max": "10_000"}) == (
        "segment_size_max (flag --segment-size-max): expected at least 1_000_000, "
        "which is max_count (default), found 10_000"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"max_count = ", "Invalid value (at "),
        (b"max_count = 1\nmax_count = 2", "Cannot overwrite a value (at "),
        (b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b"max_count = " + b"9" * 5000, "Exceeds the limit (4300"),
        (b"x = " + b"[" * 100_000, "recursion"),
        (b"#" * (config.FILE_BYTES_MAX + 1), "it holds more than 16_777_216 bytes"),
    ],
)
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes, reason: str) -> None:
    """What cannot be read as TOML is refused by its path, with the reason."""
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    refused = refusal(path=path)
    assert refused.startswith(f"config (flag --config): expected a TOML file, found {path}: ")
    assert reason in refused


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A file that is named must be there, and be a file."""
    missing = tmp_path / "no\nsuch.toml"
    assert refusal(path=missing) == (
        f"config (flag --config): expected a TOML file, found {tmp_path}/no\\U0000000asuch.toml: "
        "No such file or directory"
    )
    assert refusal(environ={"IDALLOC_TCP_CONFIG": str(tmp_path)}) == (
        "config (environment IDALLOC_TCP_CONFIG): expected a TOML file, "
        f"found {tmp_path}: Is a directory"
    )
    assert refusal(environ={"IDALLOC_TCP_CONFIG": ""}).endswith("found .: Is a directory")


LITERALS: Final = (
    *("0", "-1", "7", "1.5", "-0.0", "1e300", "nan", "-inf", "true", "false", "1_000"),
    *('""', '"x"', '"\\u0000"', '"~"', '"a:1"', "[]", "[1]", '["a:1"]', "[[]]"),
    *("{}", "{a = 1}", "{a = {}}", "07:32:00", "1979-05-27", "1979-05-27T07:32:00Z"),
)


def test_every_setting_against_every_type(tmp_path: Path) -> None:
    """Whatever stands in a file is taken, or refused with SettingsError; nothing else happens."""
    for name in NAMES:
        taken = 0
        for literal in LITERALS:
            try:
                from_file(tmp_path, f"{name} = {literal}")
                taken += 1
            except SettingsError as error:
                refused = str(error)
                assert refused.startswith(f"{name} (file ")
        assert taken < len(LITERALS)


@given(st.sampled_from(NAMES), st.text(max_size=100))
def test_any_text_is_taken_or_refused(name: str, text: str) -> None:
    """The same for variables and flags, which hold arbitrary text."""
    try:
        loaded = load({name: text}, None, {f"IDALLOC_TCP_{name.upper()}": text})
    except SettingsError as error:
        refused = str(error)
        assert refused.isprintable()
    else:
        assert loaded.sources[name].startswith("flag --")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_count": 0}, f"max_count: {INTEGER} 0"),
        ({"max_count": None}, f"max_count: {INTEGER} a NoneType"),
        ({"listen": ()}, f"listen: {LISTEN} a tuple"),
        ({"data": 1}, "data: expected the path of a file, in UTF-8, found 1"),
        (
            {"segment_size_max": 9_999},
            "segment_size_max: expected at least 10_000, which is segment_size, found 9_999",
        ),
    ],
)
def test_settings_check_themselves(values: dict[str, Any], message: str) -> None:
    """Settings that were not loaded but made are as strict."""
    with pytest.raises(SettingsError) as caught:
        Settings(**values)
    assert str(caught.value) == message


# Flags


def test_flags_that_are_not_given_are_not_there() -> None:
    """Not given is something else than given with the default."""
    assert parse() == {}
    assert parse("--max-count", "1_000_000") == {"max_count": "1_000_000"}
    assert load(parse("--max-count", "1_000_000"), None, {}).sources["max_count"] != "default"


def test_every_setting_has_a_flag() -> None:
    """A flag is spelt like its setting, takes a text, and says the setting's help and default."""
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    shown = " ".join(parser.format_help().split())
    for row in config.describe():
        flag = f"--{row.name.replace('_', '-')}"
        if row.type == "true or false":
            assert parse(flag) == {row.name: True}
        else:
            assert parse(flag, "-1") in ({row.name: "-1"}, {row.name: ["-1"]})
        assert flag in shown
        assert row.help.split()[-1] in shown
    assert "Default: 10_000." in shown
    assert "Default: unset." in shown
    assert shown.count("IDs:") == 1


def test_flags_of_lists_are_repeated() -> None:
    """A list's flag may be given several times; another one's last value counts."""
    flags = parse("--listen", "a:1", "--listen", "b:2,c:3", "--max-count", "1", "--max-count", "2")
    assert load(flags, None, {}).settings == Settings(listen=("a:1", "b:2", "c:3"), max_count=2)


def test_the_file_has_a_flag() -> None:
    """--config gives a path, is no setting, and is absent unless given."""
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    arguments = parser.parse_args(["--config", "x.toml"])
    assert arguments.config == Path("x.toml")
    assert config.given_flags(arguments) == {}
    assert not hasattr(parser.parse_args([]), "config")


@attrs.frozen
class Switches:
    """A settings class of switches."""

    fast: bool = setting(False, kinds.switch(), "switches", "Whether 100% is too slow.")
    safe: bool = setting(True, kinds.switch(), "switches", "Whether to be careful.")


def test_switches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A yes-or-no setting has the flags --x and --no-x, and true and false elsewhere."""
    for module in (config, settings_module):
        monkeypatch.setattr(module, "Settings", Switches)
    loaded: Any = load(parse("--fast", "--no-safe"), None, {})
    assert loaded.settings == Switches(fast=True, safe=False)
    assert loaded.sources == {"fast": "flag --fast", "safe": "flag --no-safe"}
    assert parse() == {}
    assert config.render(loaded) == "fast = true  # flag --fast\nsafe = false  # flag --no-safe\n"
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    assert "Whether 100% is too slow. Default: false." in parser.format_help()

    loaded = load({}, None, {"IDALLOC_TCP_FAST": "True"})
    assert loaded.settings == Switches(fast=True)
    refused = refusal(environ={"IDALLOC_TCP_FAST": "yes"})
    assert refused == 'fast (environment IDALLOC_TCP_FAST): expected true or false, found "yes"'
    assert refused_file(tmp_path, "fast = 1").endswith("expected true or false, found 1")


# Showing settings


def integers(maximum: int, minimum: int = 1) -> st.SearchStrategy[int]:
    """Integers, mostly from 1."""
    return st.integers(minimum, maximum)


def durations(minimum: float, maximum: float = kinds.YEAR_SECONDS) -> st.SearchStrategy[float]:
    """Seconds."""
    return st.floats(minimum, maximum)


SERVICE_NAMES: Final = st.from_regex(r"[a-z0-9_.:-]{1,64}", fullmatch=True)
PATH_TEXTS: Final = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20
)
ADDRESSES: Final = st.one_of(
    st.builds("localhost:{}".format, st.integers(0, 65535)),
    st.builds("[{}]:1".format, st.ip_addresses(v=6)),
    PATH_TEXTS.map("unix:/{}".format),
)
STORES: Final[st.SearchStrategy[dict[str, Any]]] = st.sampled_from(
    [
        {},
        {"mysql": "mysql://u@db.example/ids"},
        {"mysql": "mysql://u@[::1]:3307/ids?ssl=on", "redis": "redis://cache.example/0"},
        {"mysql": "mysql://db/ids", "redis": "unix:///run/redis.sock"},
    ]
)
VALUES: Final = st.fixed_dictionaries(
    {},
    optional={
        "create_table": st.booleans(),
        "take_over": st.booleans(),
        "redis_key_prefix": st.sampled_from(["", "idalloc:", 'a "b" \\', "{tag}é:"]),
        "lease_segments": integers(1_000_000),
        "write_db_every_n_versions": integers(1_000_000),
        "recover_redis_every_n_versions": integers(1_000_000),
        "sync_queue_size": integers(1_000_000),
        "sync_workers": integers(1_000),
        "fallback": st.sampled_from(get_args(Fallback)),
        "listen": st.lists(ADDRESSES, min_size=1).map(tuple),
        "data": PATH_TEXTS.map(lambda text: Path(f"/{text}")),
        "max_count": integers(10_000_000),
        "segment_size": integers(10_000_000),
        "segment_size_max": st.integers(10_000_000, 1_000_000_000),
        "pool_seconds": durations(0, 86_400),
        "ceiling": integers(MAX_ID),
        "ceilings": st.dictionaries(SERVICE_NAMES, integers(MAX_ID)),
        "wait_seconds": durations(0.001, 60),
        "idle_service_seconds": durations(1),
        "idle_seconds": durations(0.001),
        "line_seconds": durations(0.001),
        "send_seconds": durations(0.001),
        "drain_seconds": durations(0),
        "lane": st.sampled_from(get_args(Lane)),
        "workers": st.just("auto") | integers(128),
        "max_connections": integers(1_000_000),
        "max_services": integers(10_000_000),
        "rate_limit_qps": integers(1_000_000_000, 0),
        "rate_limit_ids": integers(1_000_000_000_000, 0),
        "service_rate_limit_qps": integers(1_000_000_000, 0),
        "service_rate_limit_ids": integers(1_000_000_000_000, 0),
        "log_level": st.sampled_from(get_args(LogLevel)),
        "log_format": st.sampled_from(get_args(LogFormat)),
        "admin": ADDRESSES,
        "debug": st.booleans(),
    },
)


@settings(deadline=None)
@given(VALUES, STORES)
def test_what_is_shown_gives_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], stores: dict[str, Any]
) -> None:
    """`idalloc-tcp config` writes a file that gives the very settings that it shows."""
    given_settings = Settings(**values, **stores)
    path = tmp_path_factory.getbasetemp() / "shown.toml"
    sources = dict.fromkeys(NAMES, "somewhere")
    path.write_text(config.render(Loaded(given_settings, sources)), encoding="utf-8")
    loaded = load({}, path, {})
    assert loaded.settings == given_settings
    unset = {name for name in NAMES if getattr(given_settings, name) is None}
    assert {name for name, text in loaded.sources.items() if text == "default"} == unset


def test_every_strategy_is_there() -> None:
    """The round trip above leaves no setting out."""
    drawn: set[str] = set()

    @settings(deadline=None, database=None)
    @given(VALUES, STORES)
    def draw(values: dict[str, Any], stores: dict[str, Any]) -> None:
        drawn.update(values, stores)

    draw()
    assert drawn == set(NAMES)


def test_how_settings_are_shown(tmp_path: Path) -> None:
    """One line a setting: name, value, source; one that is unset is a comment."""
    environ = {"IDALLOC_TCP_CEILINGS": "Orders=9007199254740991,a.b=5"}
    content = 'listen = ["localhost:1", "unix:/a b"]\npool_seconds = 5'
    path = tmp_path / "x.toml"
    path.write_text(content)
    lines = config.render(load({"log_level": "debug"}, path, environ)).splitlines()
    assert len(lines) == len(NAMES)
    assert lines[:3] == [
        f'listen = ["localhost:1", "unix:/a b"]  # file {path}',
        "# admin is unset  # default",
        f'# data = "{Settings().data_path()}"  # default',
    ]
    for line in (
        "max_count = 1_000_000  # default",
        f"pool_seconds = 5.0  # file {path}",
        'ceilings = {"orders" = 9_007_199_254_740_991, "a.b" = 5}'
        "  # environment IDALLOC_TCP_CEILINGS",
        'log_level = "debug"  # flag --log-level',
    ):
        assert line in lines


def test_a_source_cannot_break_the_line_it_stands_in(tmp_path: Path) -> None:
    """A file with a line feed in its name does not add a line to what is shown."""
    path = tmp_path / "a\nmax_count = 5 #"
    path.write_text("max_services = 3")
    shown = config.render(load({}, path, {}))
    assert tomllib.loads(shown)["max_count"] == 1_000_000
    assert len(shown.splitlines()) == len(NAMES)


def test_every_setting_describes_itself() -> None:
    """A table of settings has a row for each: a type with its range, the default, one sentence."""
    rows = config.describe()
    assert [row.name for row in rows] == NAMES
    assert rows[NAMES.index("segment_size")] == config.Description(
        "segment_size",
        "an integer from 1 to 10_000_000",
        "10_000",
        "The smallest segment that a pool asks for at once, in IDs.",
    )
    for row in rows:
        assert row.help.endswith(".")
        assert row.help.count(". ") == 0
        assert ("in seconds" in row.help) == row.name.endswith("_seconds")


def test_importing_the_settings_is_cheap() -> None:
    """What only a mistake or a default needs is not loaded before, nor is a second converter."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, idalloc_tcp.config; print(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert not {"difflib", "platformdirs", "cattrs", "pydantic"} & set(done.stdout.split())


# Stores and their passwords

PASSWORD: Final = "s3cret"


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("mysql", "mysql://h/ids"),
        ("mysql", "mysql://u:p@h:3307/ids?ssl=verify"),
        ("redis", "redis://h"),
        ("redis", "rediss://u:p@h:6380/3"),
        ("redis", "unix:///run/redis.sock?db=2"),
        ("redis", "unix://u:p@/run/redis.sock"),
    ],
)
def test_the_urls_of_stores(name: str, url: str) -> None:
    """A URL is taken as it is, from every source."""
    mysql: dict[str, Flag] = {"mysql": "mysql://h/ids"} if name == "redis" else {}
    for loaded in (
        load({**mysql, name: url}, None, {}),
        load(mysql, None, {f"IDALLOC_TCP_{name.upper()}": url}),
    ):
        assert getattr(loaded.settings, name) == url


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("mysql", f"postgres://u:{PASSWORD}@h/ids"),
        ("mysql", f"redis://u:{PASSWORD}@h"),
        ("mysql", f"u:{PASSWORD}@h/ids"),
        ("mysql", "mysql://"),
        ("mysql", f"mysql://u:{PASSWORD}@[::1/ids"),
        ("redis", f"mysql://u:{PASSWORD}@h/ids"),
        ("redis", f"http://:{PASSWORD}@h"),
        ("redis", PASSWORD),
        ("redis", ""),
    ],
)
def test_the_url_of_something_else_is_refused_unseen(name: str, url: str) -> None:
    """The message says what was expected, and nothing of what was found: it may be a password."""
    forms = "mysql://" if name == "mysql" else "redis:// or rediss:// or unix://"
    variable = f"IDALLOC_TCP_{name.upper()}"
    assert refusal(environ={variable: url}) == (
        f"{name} (environment {variable}): expected a URL that begins with {forms}, "
        "found something else (not shown: it may hold a password)"
    )


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("mysql://h/ids", "mysql://h/ids"),
        ("mysql://u@h/ids", "mysql://u@h/ids"),
        (f"mysql://u:{PASSWORD}@h:1/ids?ssl=on", "mysql://u:***@h:1/ids?ssl=on"),
        (f"mysql://u:{PASSWORD}%40@[::1]:1/ids", "mysql://u:***@[::1]:1/ids"),
        (f"mysql://u:a@{PASSWORD}@h/ids", "mysql://u:***@h/ids"),
        (f"mysql://:{PASSWORD}@h/ids", "mysql://:***@h/ids"),
        ("mysql://u:@h/ids", "mysql://u:***@h/ids"),
        (f"mysql://u:a/{PASSWORD}?#@h/ids", "mysql://u:***@h/ids"),
        (f"mysql://h/ids?password={PASSWORD}&ssl=on", "mysql://h/ids?password=***&ssl=on"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str) -> None:
    """Neither in the table of settings, nor in what the log says, nor in the help."""
    loaded = load({"mysql": url}, None, {})
    assert f'mysql = "{shown}"  # flag --mysql\n' in config.render(loaded)
    assert loaded.settings.shown("mysql", "redis", "data") == {"mysql": shown}
    contradiction = refusal({"mysql": url, "segment_size_max": "1"})
    for text in (config.render(loaded), contradiction):
        assert PASSWORD not in text


def test_a_redis_needs_a_database_beneath(tmp_path: Path) -> None:
    """What a Redis gives away is safe only if a database committed it first."""
    url = f"redis://:{PASSWORD}@h"
    message = "redis: expected mysql beside it, which makes its IDs safe"
    assert refusal({"redis": url}) == message
    assert refused_file(tmp_path, f'redis = "{url}"') == message
    assert load({"redis": url, "mysql": "mysql://h/ids"}, None, {}).settings.redis == url
