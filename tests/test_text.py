"""The text of a registry and the names in it: strict in, canonical out."""

from __future__ import annotations

import base64
import copy
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from zoo._json import canonical, parse_strictly
from zoo.registry import Registry
from zoo.registry import text as registry_text
from zoo.registry.changes import add_version
from zoo.registry.text import new_record, parse, write
from zoo.registry.types import (
    ModelRecord,
    RegistryError,
    Snapshot,
    VersionRecord,
    check_name,
)
from zoo.registry.types import (
    plain as plain_data,
)

CORPUS = Path(__file__).parents[2] / "shared" / "corpus" / "registry.json"
CASES = json.loads(CORPUS.read_text()) if CORPUS.exists() else {"names": [], "digests": [], "registry_texts": []}
EMPTY = {"format": "zoo-registry", "schema": 1, "models": {}, "ensembles": {}, "aliases": {}}
VERSION = {
    "n": 1,
    "spec": {"architecture": "mlp"},
    "classes": ["a", "b"],
    "blob": "sha256:" + "0" * 64,
    "bytes": 10,
    "parameters": 3,
    "created": "2026-01-31T12:00:00Z",
}
ID = "0123456789ab"
TIME = VERSION["created"]


def answer(check, value) -> str:
    """OK, or the reason of the typed error; any other error goes on."""
    try:
        check(value)
    except RegistryError as error:
        return error.reason
    return "OK"


needs_corpus = pytest.mark.skipif(not CASES["names"], reason="the collection of inputs is not here")


@needs_corpus
@pytest.mark.parametrize("case", CASES["registry_texts"], ids=lambda case: case["case"])
def test_each_text_of_the_collection_gets_its_answer(case):
    """Within a second."""
    raw = base64.b64decode(case["b64"]) if case["text"] is None else case["text"].encode()
    started = time.process_time()
    assert answer(parse, raw) == case["required"]
    assert time.process_time() - started < 1


def text(**changed: object) -> bytes:
    """An empty registry with some keys changed, or left out where None."""
    return json.dumps({key: value for key, value in (EMPTY | changed).items() if value is not None}).encode()


def with_version(**changed: object) -> bytes:
    """A registry of one version with some fields changed, or left out where None."""
    fields = {key: value for key, value in (VERSION | changed).items() if value is not None}
    return text(models={"m": {"versions": {ID: fields}}})


def with_extension(raw: str) -> bytes:
    """A registry with a key of another program, whose value is given as JSON text."""
    return (json.dumps(EMPTY)[:-1] + f',"x-a":{raw}}}').encode()


ENSEMBLE = {"members": [ID], "rule": {"rule": "mean"}, "classes": ["a", "b"], "created": TIME}
MODELS = {"m": {"versions": {ID: VERSION}}}
TEXTS = {
    "empty file": (b"", "REGISTRY_JSON"),
    "zeros": (bytes(4096), "REGISTRY_ENCODING"),
    "torn": (text()[:-7], "REGISTRY_JSON"),
    "torn and filled with zeros": (text()[:-7] + bytes(7), "CONTROL_CHARACTER REGISTRY_JSON"),
    "conflict markers": (b"{\n<<<<<<< HEAD\n" + text() + b"\n=======\n>>>>>>> branch\n", "REGISTRY_JSON"),
    "latin-1": (text(**{"x-a": "e"}).replace(b'"e"', b'"\xe9"'), "REGISTRY_ENCODING"),
    "UTF-32": (text().decode().encode("utf-32-le"), "REGISTRY_ENCODING"),
    "a list": (b"[]", "NOT_A_REGISTRY"),
    "null": (b"null", "NOT_A_REGISTRY"),
    "no format": (text(format=None), "NOT_A_REGISTRY"),
    "no schema": (text(schema=None), "SCHEMA_TYPE"),
    "schema as text": (text(schema="1"), "SCHEMA_TYPE"),
    "schema zero": (text(schema=0), "SCHEMA_TYPE"),
    "infinity": (b'{"a":-Infinity}', "NUMBER_RANGE"),
    "nested 100,000 deep": (b"[" * 100_000 + b"]" * 100_000, "REGISTRY_DEPTH"),
    "nested in an extension": (text(**{"x-a": 0}).replace(b": 0", b":" + b"[" * 500 + b"]" * 500), "REGISTRY_DEPTH"),
    "half a surrogate": (text(**{"x-a": "\ud800"}), "REGISTRY_ENCODING"),
    "a whole surrogate pair": (text(**{"x-a": "\U0001f600"}), "OK"),
    "escape sequence": (text(**{"x-a": "\x1b[31m"}), "CONTROL_CHARACTER"),
    "text from right to left": (text(**{"x-a": "\u202e"}), "CONTROL_CHARACTER"),
    "raw text from right to left": ('{"x-a":"\u202e"}'.encode(), "CONTROL_CHARACTER"),
    "line break and tab": (text(**{"x-a": "a\n\tb"}), "OK"),
    "backslash before u": (text(**{"x-a": "\\u0000 \\\\"}), "OK"),
    "unknown key": (text(paths={}), "UNKNOWN_KEY"),
    "missing section": (text(aliases=None), "MISSING_KEY"),
    "models as a list": (text(models=[]), "FIELD_TYPE"),
    "name that cannot be": (text(models={"../m": {"versions": {}}}), "NAME"),
    "name twice but for capitals": (text(models={"m": {"versions": {}}, "M": {"versions": {}}}), "NAME_COLLISION"),
    "ensemble named as a model": (text(models=MODELS, ensembles={"m": ENSEMBLE}), "NAME_COLLISION"),
    "model without versions": (text(models={"m": {"versions": {}}}), "OK"),
    "model that is null": (text(models={"m": None}), "FIELD_TYPE"),
    "a version": (with_version(), "OK"),
    "id that cannot be": (text(models={"m": {"versions": {"x": VERSION}}}), "ID"),
    "version with a path": (with_version(path="/tmp/x"), "UNKNOWN_KEY"),
    "version without a spec": (with_version(spec=None), "MISSING_KEY"),
    "version number as text": (with_version(n="1"), "FIELD_TYPE"),
    "version number zero": (with_version(n=0), "VERSION_NUMBER"),
    "version number true": (with_version(n=True), "FIELD_TYPE"),
    "two versions of one number": (
        text(models={"m": {"versions": {ID: VERSION, "ba9876543210": VERSION}}}),
        "VERSION_NUMBER",
    ),
    "blob that is a path": (with_version(blob="sha256:../" + "0" * 61), "DIGEST"),
    "metric that is text": (with_version(metrics={"a": {"value": "high"}}), "FIELD_TYPE"),
    "alias of nothing": (text(aliases={"best": {"model": "m", "version": 1}}), "DANGLING"),
    "alias of something": (text(models=MODELS, aliases={"best": {"model": "m", "version": 1}}), "OK"),
    "ensemble of nothing": (text(ensembles={"e": ENSEMBLE}), "DANGLING"),
    "ensemble of something": (text(models=MODELS, ensembles={"e": ENSEMBLE}), "OK"),
    "ensemble of one member twice": (
        text(models=MODELS, ensembles={"e": ENSEMBLE | {"members": [ID, ID]}}),
        "FIELD_TYPE",
    ),
    "ensemble with weights of others": (
        text(models=MODELS, ensembles={"e": ENSEMBLE | {"weights": [1, 2]}}),
        "FIELD_TYPE",
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_get_their_answer(name):
    """Refused for the right reason, or read."""
    raw, answers = TEXTS[name]
    assert answer(parse, raw) in answers.split()


@pytest.mark.parametrize("name", [name for name, (_, answers) in TEXTS.items() if "OK" not in answers])
def test_a_refused_text_is_never_written_over(name, tmp_path):
    """A change of a registry that does not parse leaves its bytes alone."""
    path = tmp_path / "registry.json"
    path.write_bytes(TEXTS[name][0])
    with pytest.raises(RegistryError, match=r"\["):
        Registry(path).alias("best", "m")
    assert path.read_bytes() == TEXTS[name][0]


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
names = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,12}[a-z0-9])?", fullmatch=True).filter(
    lambda n: answer(check_name, n) == "OK"
)
words = st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=8)


@given(plain)
def test_json_there_and_back_is_the_same(value):
    """One text per value, and that text gives the value."""
    assert parse_strictly(canonical(value)) == value
    assert canonical(parse_strictly(canonical(value))) == canonical(value)


@given(
    st.lists(names, unique_by=str.casefold, max_size=6),
    words,
    st.dictionaries(words.map("x-{}".format), words.map(canonical), max_size=2),
)
@settings(deadline=None)
def test_a_document_there_and_back_is_the_same(chosen, note, extensions):
    """Reading what was written gives the document; writing it again gives the bytes."""
    document = Snapshot(extensions={key: Raw(text) for key, text in extensions.items()})
    for index, name in enumerate(chosen):
        add_version(document, name, f"{index:012x}", new_record(VersionRecord, name, {**VERSION, "note": note}))
    raw = write(document)
    again = parse(raw)
    assert again == document == registry_text._fast(raw) == registry_text._strict(raw)
    assert write(again) == raw
    assert raw.decode("utf-8").splitlines()[-1] == "}"
    assert raw.endswith(b"\n")


FULL = {
    **EMPTY,
    "models": {name: {"versions": {id: VERSION}, "x-by": [1]} for name, id in (("a", ID), ("b", ID[::-1]))},
    "ensembles": {"e": {"members": [ID], "rule": {"rule": "mean"}, "classes": ["a", "b"], "created": TIME}},
    "aliases": {"best": {"model": "a", "version": 1, "before": [{"ensemble": "e"}], "x-by": {}}},
}
STRANGE = [None, True, 0, -1, 1.5, 2**62, "", "a", "../a", [], ["a"], [[]], [None], {}, {"n": [1]}, {"x-a": 1}]


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Where something stands in nested data."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(places(FULL)[1:]), st.sampled_from(STRANGE)), min_size=1, max_size=2))
def test_whatever_stands_in_a_place_is_refused_by_name_or_kept(changes):
    """No other error than the registry's own; what passes is written and read again without loss."""
    table = json.loads(json.dumps(FULL))
    for (*path, last), value in changes:
        holder = table
        for key in path:
            holder = holder[key] if isinstance(holder, dict) and key in holder else None
        if isinstance(holder, dict) and isinstance(last, str):
            holder[last] = copy.deepcopy(value)
    if answer(parse, text := json.dumps(table).encode()) == "OK":
        assert json.loads(write(parse(text))) == table


def test_keys_are_written_sorted():
    """In every object of the file but that of the models, which stand in the order of a hash."""

    def check(pairs: list[tuple[str, object]]) -> dict[str, object]:
        keys = [key for key, _ in pairs if key != "models"]
        assert keys == sorted(keys) or {*keys} == {*FULL["models"]}
        return dict(pairs)

    assert json.loads(write(parse(json.dumps(FULL).encode())), object_pairs_hook=check) == FULL


def test_every_layout_of_one_content_is_written_alike():
    """Somebody's editor may fold the lines; the next change unfolds them. Extensions stay as they stand."""
    theirs = '{"b": 1.50,\n  "a": [1e-400, "\\u00e9\\/"], "a line": {\n"0123456789ab":{}\n}}'
    folded = json.dumps(json.loads(with_version(note="é")) | {"x-lab": 0}, indent=3).replace(
        '"x-lab": 0', f'"x-lab": {theirs}'
    )
    raw = write(parse(folded.encode()))
    assert f'"x-lab":{theirs}' in raw.decode()
    assert write(parse(raw.replace(b"\n", b"\r\n"))) == raw
    assert sum(b'"note":' in line for line in raw.split(b"\n")) == 1


V, ID2 = json.dumps(VERSION), ID[::-1]
SECOND = json.dumps({**VERSION, "n": 2})
AROUND = '{"format":"zoo-registry","schema":1,"ensembles":{},"aliases":{},"models":%s}'


@pytest.mark.parametrize(
    ("models", "wanted"),
    [
        (f'{{"m":{{"versions":{{\n"{ID}":{V},\n"{ID2}":1\n}}}}}}', "FIELD_TYPE"),
        (f'{{"m":{{"versions":{{"{ID}":0}}}}}},"x-lab":{{\n"{ID2}":{V}\n}}', "FIELD_TYPE"),
        (f'{{"m":{{"versions":{{"{ID}":"\\u00010"}}}}}},"x-lab":{{\n"{ID2}":{V}\n}}', "CONTROL_CHARACTER"),
        (f'{{"m":{{"versions":{{\n"{ID}":{V}}}}}}}', "OK"),
        (f'{{"m":{{"versions":{{\n"{ID}":{V},"{ID2}":{SECOND}\n}}}}}}', "OK"),
        (f'{{"m":{{"versions":{{\n"{ID}":{V}}}}},"o":{{"versions":{{}}\n}}}}', "OK"),
        (f'{{"m":{{"versions":{{\n"{ID}":{V}}}}},"o":{{"versions":{{\n"{ID2}":{SECOND}\n}}}}}}', "OK"),
        (f'{{"m":{{"versions":{{\n"{ID}":{V},\n"{ID}":{SECOND}\n}}}}}}', "DUPLICATE_KEY"),
    ],
)
def test_a_text_means_what_it_means_however_its_lines_are_broken(models, wanted):
    """Where a line ends has no meaning."""
    text = (AROUND % models).encode()
    assert answer(parse, text) == wanted
    if wanted == "OK":
        document = parse(text)
        expected = {name: model["versions"] for name, model in json.loads(text)["models"].items()}
        for found in (document, parse(write(document))):
            lines = {name: {id: plain_data(v) for id, v in m.versions.items()} for name, m in found.models.items()}
            assert lines == expected


@pytest.mark.parametrize(
    "text",
    [
        r'"\\ud800\udc00"',
        r'"\ud800"',
        r'"\udc00\ud800"',
        r'"\ud800 \udc00"',
        r'"\ud800\ud800\udc00"',
        r'"\ud800 \u00e9"',
    ],
)
def test_half_a_pair_is_refused_whatever_stands_beside_it(text):
    """An escaped backslash and letters are no half of anything."""
    assert answer(parse, with_extension(text)) == "REGISTRY_ENCODING"


@pytest.mark.parametrize("text", [r'"\ud83d\ude00"', r'"\\\\ud800"', r'"\ud83d\ude00\ud83d\ude00"'])
def test_whole_pairs_and_escaped_backslashes_pass(text):
    """As any reader takes them."""
    assert answer(parse, with_extension(text)) == "OK"


@pytest.mark.parametrize(
    "fields",
    [
        {"probe": {"digest": "x", "values": ["a"]}},
        {"probe": {"digest": 5, "values": [1.0]}},
        {"probe": {"digest": "x", "values": None}},
        {"metrics": {"a": {"value": 1.0, "unit": 5}}},
        {"metrics": {"a": {"value": 1.0, "n": "x"}}},
        {"metrics": {"a": {"value": 1.0, "frames": 5}}},
        {"created": "2026-02-31T25:61:61Z"},
        {"n": 10**9},
    ],
)
def test_what_would_fail_when_it_is_used_is_refused_when_it_is_read(fields):
    """Numbers of a probe, parts of a metric, a day that is none, a number that no reference can name."""
    assert answer(parse, with_version(**fields)) in ("FIELD_TYPE", "VERSION_NUMBER")


def test_a_key_that_names_control_characters_may_not_stand_twice():
    """The reason is what is wrong, not what the message happens to hold."""
    assert answer(parse, with_extension('{"control character":1,"control character":2}')) == "DUPLICATE_KEY"


@pytest.mark.parametrize("bad", ["n", "blob"])
def test_the_whole_file_is_checked_at_every_reading(tmp_path, bad):
    """Damage in one line of a thousand is found whatever is asked for, named, and never written over."""
    document = Snapshot()
    for index in range(1_000):
        record = new_record(VersionRecord, "a version", {**VERSION, "note": "x" * 200})
        add_version(document, f"m-{index}", f"{index:012x}", record)
    registry = Registry(tmp_path / "registry.json")
    twice = b'"000000000007":{"n":1,"blob"' if bad == "n" else b'"000000000007":{"blob":"sha256:0","blob"'
    damaged = write(document).replace(b'"000000000007":{"blob"', twice)
    registry.path.write_bytes(damaged)
    for act in (registry.list, lambda: registry.get("m-3"), lambda: registry.alias("best", "m-3")):
        with pytest.raises(RegistryError, match=f"the key '{bad}' appears twice"):
            act()
    with pytest.raises(RegistryError, match="nothing was removed"):
        registry.collect_garbage()
    assert registry.path.read_bytes() == damaged


COMMITTED = Path(__file__).parents[1] / "registry.json"


def test_the_fast_reader_reads_what_is_written(monkeypatch):
    """The strict one is for texts that are laid out differently; the committed file comes back byte for byte."""
    raw = COMMITTED.read_bytes()
    strict = registry_text._strict(raw)
    monkeypatch.setattr(registry_text, "_strict", lambda raw: pytest.fail("read slowly"))
    assert write(parse(raw)) == raw
    assert parse(raw) == strict
    number = {
        "recipe": {"rates": [1e-08, 1e16, 1.5e-05, -0.0, 5e-324, 1e22]},
        "probe": {"digest": "e-0", "values": [1]},
    }
    written = write(Snapshot(parse(raw).models | {"m": model_of({**VERSION, **number})}))
    assert write(parse(written)) == written


def model_of(fields: dict[str, object]) -> ModelRecord:
    """A model of one version."""
    return ModelRecord(versions={ID: new_record(VersionRecord, "a version", fields)})


CANONICAL = write(
    Snapshot({"m": model_of({**VERSION, "recipe": {"a": 1e-08, "b": [1]}, "probe": {"digest": "e-05", "values": []}})})
)


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        (b'"a":1e-08', b'"a":1,"a":1e-08', "DUPLICATE_KEY"),
        (b'"a":1e-08', b'"a":1e-8', "OK"),
        (b'"a":1e-08', b'"a": 1e-08', "OK"),
        (b'"a":1e-08', b'"a":1e400', "NUMBER_RANGE"),
        (b'"a":1e-08', b'"a":NaN', "NUMBER_RANGE"),
        (b'"a":1e-08', b'"a":9223372036854775808', "NUMBER_RANGE"),
        (b'"a":1e-08', b'"a":' + b"[" * 65 + b"]" * 65, "REGISTRY_DEPTH"),
        (b'"digest":"e-05"', b'"digest":"e-05","more":1e400', "NUMBER_RANGE"),
        (b'"digest":"e-05"', b'"digest":"e-5","digest":"e-05"', "DUPLICATE_KEY"),
        (b'"n":1,', b'"n":1,"n":1,', "DUPLICATE_KEY"),
        (b'"n":1,', b'"n":1.0,', "FIELD_TYPE"),
        (b'"bytes":10,', b'"bytes":9223372036854775808,', "NUMBER_RANGE"),
        (b'"schema":1\n', b'"schema":1,\n"x-a":{"b":1,"b":1}\n', "DUPLICATE_KEY"),
        (b'"m":{', b'"m":{"versions":{}},\n"m":{', "DUPLICATE_KEY"),
    ],
)
def test_the_fast_reader_lets_nothing_pass_that_the_strict_one_refuses(old, new, wanted):
    """Not in the parts that are only carried either, and not what bytes alone would not show."""
    raw = CANONICAL.replace(old, new, 1)
    assert raw != CANONICAL
    assert answer(registry_text._strict, raw) == answer(parse, raw) == wanted
    if wanted == "OK":
        assert parse(raw).entry("m", ID).recipe == {"a": 1e-08, "b": [1]}


LEAN = json.loads(json.dumps(FULL), object_hook=lambda table: {k: v for k, v in table.items() if k != "x-by"})
WRITTEN = write(parse(json.dumps({**LEAN, "x-lab": [1.5, {"a": 1e-08}]}).encode()))
TOKENS = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b",",
    b"NaN",
    b"1e999",
    b"0",
    b"-0",
    b"9" * 19,
    b"\\u0000",
    b"\\ud800",
    b"\xff",
    b'"n":1,',
    b" ",
]


@settings(max_examples=500, deadline=None)
@given(st.integers(0, len(WRITTEN)), st.integers(0, 3), st.sampled_from(TOKENS))
def test_both_readers_agree_on_every_text(start, cut, token):
    """Whatever the fast reader accepts, the strict one accepts too, with the same content."""
    assert registry_text._fast(WRITTEN) == registry_text._strict(WRITTEN)
    raw = WRITTEN[:start] + token + WRITTEN[start + cut :]
    try:
        found = registry_text._fast(raw)
    except (ValueError, KeyError, OverflowError, RecursionError):
        return
    assert json.loads(write(found)) == json.loads(write(registry_text._strict(raw)))
