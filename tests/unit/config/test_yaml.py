"""What YAML lets pass, what is no YAML, and where a fault stands."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastlb.config import load_config
from fastlb.config.yaml import Document
from fastlb.errors import ConfigError
from tests.unit.config.written import NAT, problems_in

TOP_KEYS = (
    "interfaces, vip_address, workers, hash_seed, snat, snat_ports, flow_log, flows, flow_file, new_flow_rate, "
    "affinity_entries, maglev_size, ring_points, transmit, tunnel_offload, control, icmp_echo, timeouts, ring, services"
)


@pytest.mark.parametrize(
    ("text", "name"),
    [("on", "on"), ("no", "no"), ("Yes", "Yes"), ("2024-02-30", "2024-02-30"), ("'0123'", "0123")],
)
def test_yaml_words_that_stay_text(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "c.yaml").write_text(NAT.replace("name: web", f"name: {text}"))
    assert load_config(tmp_path / "c.yaml").services[0].name == name


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", "auto"), ("true", True), ("True", True), ("FALSE", False), ('"auto"', "auto")],
)
def test_open_blocks_in_yaml(tmp_path: Path, text: str, value: object) -> None:
    (tmp_path / "c.yaml").write_text(f"ring: {{open_blocks: {text}}}")
    got = load_config(tmp_path / "c.yaml").ring.open_blocks
    assert (got, type(got)) == (value, type(value))


def test_yaml_numbers_and_aliases(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "hash_seed: 0x1F\nflows: 1_000\nservices:\n"
        "  - {name: a, vip: 192.0.2.1, port: 1, protocol: udp, forward: dsr,"
        " backends: &b [{address: 10.0.0.1}]}\n"
        "  - {name: b, vip: 192.0.2.1, port: 2, protocol: udp, forward: dsr, backends: *b}\n"
    )
    config = load_config(tmp_path / "c.yaml")
    assert (config.hash_seed, config.flows) == (31, 1000)
    assert config.services[0].backends == config.services[1].backends != ()


@pytest.mark.parametrize(
    ("text", "line", "path", "message"),
    [
        (
            NAT.replace("80", "0123"),
            4,
            "services[0].port",
            "YAML may read 0123 as a number in base 8 or 2; write a plain number, or quotes for text",
        ),
        (
            NAT.replace("203.0.113.10", "1:2:3:4:5:6:7:8"),
            3,
            "services[0].vip",
            "YAML may read 1:2:3:4:5:6:7:8 as a number in base 60; write it in quotes, or as a plain number",
        ),
        (
            "timeouts: {udp: 1:30}",
            1,
            "timeouts.udp",
            "YAML may read 1:30 as a number in base 60; write it in quotes, or as a plain number",
        ),
        (
            "timeouts: {udp: .inf}",
            1,
            "timeouts.udp",
            ".inf is not a number that can be used here; write a plain number, or quotes for text",
        ),
        (
            "flows: !!int many",
            1,
            "flows",
            "many is not a number that can be used here; write a plain number, or quotes for text",
        ),
        ("flows: 64\n\nflows: 65", 3, "flows", "it is given twice, first on line 1; keep one"),
        ("ring: {blocks: 64, blocks: 65}", 1, "ring.blocks", "it is given twice, first on line 1; keep one"),
        ("ring:\n  ? [a]\n  : 1", 1, "ring", "line 2 has a collection for a key; a key must be text"),
        ("80: 1", 1, "80", f"there is no such key; use one of: {TOP_KEYS}"),
        ("- a", 1, "", f"found a list; it must be a mapping with keys among: {TOP_KEYS}"),
        ("", 0, "", "it is empty; it must have keys such as interfaces and services"),
        ("# nothing\n", 0, "", "it is empty; it must have keys such as interfaces and services"),
        (b"flows: 64\nname: \xff\n", 2, "", "it is not UTF-8 text; save it as UTF-8"),
        ("flows: 64\nname: \x07\n", 2, "", "there is a control character here; remove it"),
        (
            f"services: {'[' * 100_000}",
            0,
            "",
            "it is nested deeper than 32 levels; the configuration needs 5",
        ),
    ],
)
def test_yaml(tmp_path: Path, text: str | bytes, line: int, path: str, message: str) -> None:
    assert problems_in(text, tmp_path) == [(line, path, message)]


@pytest.mark.parametrize(
    ("text", "line", "advice"),
    [
        ("flows: 64\n\tworkers: 1\n", 2, "indent with spaces"),
        ("flows: 64\nservices: [\n", 3, "check the indentation, brackets and quotes"),
        ('flows: 64\ncontrol: "/run/x\nworkers: 2\n', 2, "close the quote that begins here"),
        ("control: a: b\n", 1, "align the keys of a mapping"),
        ("flows: 64\n---\nflows: 65\n", 2, "remove the second '---'"),
        ("flows: *nowhere\n", 1, "put text that begins with * or & in quotes"),
        ("flows: &a 64\nworkers: &a 2\n", 2, "give each anchor a name of its own"),
        ("flows: 64\nworkers:2\nservices: []\n", 3, "put a space behind the ':' of each key"),
        ("snat:\n  - 10.0.0.1\n  a: 1\n", 3, "begin each item of a list with '- '"),
        ("ring:\n  blocks: 64\n - timeout: 1ms\n", 3, "align the items and keys of one level"),
    ],
)
def test_what_is_no_yaml(tmp_path: Path, text: str, line: int, advice: str) -> None:
    [(where, path, message)] = problems_in(text, tmp_path)
    assert (where, path) == (line, "")
    assert message.startswith("it is not valid YAML: ")
    assert advice in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for file, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            load_config(file)
        assert str(caught.value) == f"{file}: it cannot be read: {reason}"
        assert caught.value.exit_code == 2


def test_a_few_lines_of_aliases_do_not_grow(tmp_path: Path) -> None:
    """Each level names the one below ten times: 10^25 items if they were copied or printed."""
    levels = [f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 10)}]" for n in range(1, 26)]
    text = "\n".join(["k0: &k0 [x]", *levels, "services: *k25", "interfaces: &own [*own]"])
    found = problems_in(text, tmp_path)
    assert {path for _, path, _ in found} >= {"k0", "k25", "services[9]", "interfaces[0]"}
    assert len(found) == 37


def test_a_dash_that_is_missing(tmp_path: Path) -> None:
    text = NAT + "    backends:\n      - address: 10.0.0.1\n        address: 10.0.0.2\n"
    message = 'it is given twice, first on line 8; keep one, or begin another item of the list with "- "'
    assert problems_in(text, tmp_path) == [(9, "services[0].backends[0].address", message)]


def read(text: str, directory: Path) -> Document:
    (directory / "c.yaml").write_text(text)
    return Document.read(str(directory / "c.yaml"))


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("? &k name\n: web\nagain: *k\n*k : last\n", {"name": "last", "again": "name"}),
        ("a: &l [1]\nb: *l\n", {"a": [1], "b": [1]}),
        ("a: &n\nb: *n\n", {"a": None, "b": None}),
        ("a: !!str 5\nb: ! 5\nc: !!float 1.5\nd: !own 5\n", {"a": "5", "b": 5, "c": 1.5, "d": "5"}),
        ("a: '5'\nb: 5\nc: |\n  5\n", {"a": "5", "b": 5, "c": "5\n"}),
        ("a: 1e3\nb: -1.5e+3\nc: 0x1f\nd: -0\n", {"a": "1e3", "b": -1500.0, "c": 31, "d": 0}),
        ("a: <<\nb: =\nc: ~\nd: NULL\ne: True\n", {"a": "<<", "b": "=", "c": None, "d": None, "e": True}),
    ],
)
def test_what_scalars_and_aliases_mean(tmp_path: Path, text: str, data: object) -> None:
    document = read(text, tmp_path)
    assert document.data == data
    assert set(document.faults.values()) <= {"it is given twice, first on line 1; keep one"}


def test_faults_in_a_key_that_is_a_collection_are_its_own(tmp_path: Path) -> None:
    document = read("? {a: 0123, a: &x 5}\n: 0123\nb: *x\n", tmp_path)
    assert document.faults == {(): "line 1 has a collection for a key; a key must be text"}
    assert document.data == {"b": 5}


def test_lines_of_key_paths(tmp_path: Path) -> None:
    document = read("a:\n  - b: 1\n    c: 2\n  - b: 3\n\nd: 4\n", tmp_path)
    lines = {(): 1, ("a",): 1, ("a", 0, "c"): 3, ("a", 1): 4, ("a", 1, "none"): 4, ("d",): 6, ("e",): 1}
    assert {loc: document.line(loc) for loc in lines} == lines
    assert document.where(3) == f"{tmp_path}/c.yaml:3"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8", exclude_categories=["C"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc: -#", max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(data=PLAIN.filter(lambda data: data is not None), flow=st.booleans())
def test_what_pyyaml_writes_is_read_as_it_was(data: object, flow: bool) -> None:
    text = yaml.safe_dump(data, allow_unicode=True, default_flow_style=flow)
    with tempfile.TemporaryDirectory() as directory:
        assert read(text, Path(directory)).data == data
