"""Checkpoints: strict bytes, all or nothing, the same content always the same file."""

from __future__ import annotations

import base64
import json
import time
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

import zoo
from zoo import CheckpointError
from zoo.checkpoint import adapted, decode, encode, foreign, prefix_of, prefixes, read, verify, verify_bytes, write
from zoo.checkpoint.exam import check_probe
from zoo.checkpoint.match import restore

CORPUS = Path(__file__).parents[2] / "shared" / "corpus" / "safetensors.json"
CASES = json.loads(CORPUS.read_text())["cases"] if CORPUS.exists() else []
SPEC = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1})


def checkpoint(seed: int = 0, **about: object) -> zoo.Checkpoint:
    """A small model's."""
    return zoo.Checkpoint.from_module(zoo.build(SPEC, seed=seed), SPEC, ["no", "yes"], **about)


def laid_out(header: object, data: bytes = b"") -> bytes:
    """A file with this header, well-formed or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def reason_of(data: bytes) -> str:
    """The answer to a file's bytes."""
    try:
        verify_bytes(data)
    except CheckpointError as error:
        return error.reason
    return "OK"


@pytest.mark.skipif(not CASES, reason="the collection of malformed files is not here")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_each_file_of_the_collection_gets_its_answer(case):
    """Malformed files are refused for the right reason, within a second; odd but valid ones are read."""
    data = zlib.decompress(base64.b64decode(case["zlib_b64"])) if "zlib_b64" in case else base64.b64decode(case["b64"])
    started = time.process_time()
    assert reason_of(data) == case["required"]
    assert time.process_time() - started < 1


T = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
OWN_CASES = {
    "nothing in it": (laid_out({}), "OK"),
    "trailing bytes": (laid_out({"t": T}, b"12345678"), "OFFSETS"),
    "truncated data": (laid_out({"t": T}, b"12"), "OFFSETS"),
    "hole at the beginning": (laid_out({"t": {**T, "data_offsets": [4, 8]}}, b"12345678"), "OFFSETS"),
    "two tensors in one place": (laid_out({"a": T, "b": T}, b"1234"), "OFFSETS"),
    "negative size": (laid_out({"t": {**T, "shape": [-1]}}, b"1234"), "SHAPE"),
    "size as text": (laid_out({"t": {**T, "shape": ["1"]}}, b"1234"), "SHAPE"),
    "true as size": (laid_out({"t": {**T, "shape": [True]}}, b"1234"), "SHAPE"),
    "no list of sizes": (laid_out({"t": {**T, "shape": None}}, b"1234"), "SHAPE"),
    "offset as text": (laid_out({"t": {**T, "data_offsets": ["0", "4"]}}, b"1234"), "OFFSETS"),
    "dtype as number": (laid_out({"t": {**T, "dtype": 32}}, b"1234"), "DTYPE"),
    "empty name": (laid_out({"": T}, b"1234"), "TENSOR_NAME"),
    "absolute name": (laid_out({"/etc": T}, b"1234"), "TENSOR_NAME"),
    "name of a NUL": (laid_out({"a\0": T}, b"1234"), "TENSOR_NAME"),
    "a list": (laid_out([]), "HEADER_ROOT"),
    "a space first": (laid_out(b" {}"), "HEADER_ROOT"),
    "spaces after": (laid_out(b"{}   "), "OK"),
    "no UTF-8": (laid_out(b'{"\xff":1}'), "HEADER_ENCODING"),
    "byte order mark": (laid_out(b"\xef\xbb\xbf{}"), "HEADER_ENCODING"),
    "NaN": (laid_out(b'{"t":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"), "NUMBER_RANGE"),
    "minus zero": (laid_out(b'{"t":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "NOT_INTEGER"),
    "metadata of a number": (laid_out({"__metadata__": {"a": 1}}), "METADATA_TYPE"),
    "boolean that is whole": (laid_out({"t": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\0\1"), "OK"),
    "nested a hundred deep": (laid_out(b'{"t":' + b"[" * 100 + b"]" * 100 + b"}"), "HEADER_DEPTH"),
}


@pytest.mark.parametrize("name", OWN_CASES)
def test_malformed_files_are_refused_for_their_reason(name):
    """One file has one reading, or is refused."""
    data, reason = OWN_CASES[name]
    assert reason_of(data) == reason


@pytest.mark.parametrize(
    ("start", "hint"),
    [
        (b"PK\x03\x04" + b"\0" * 30, "zip archive"),
        (b"\x80\x02}q\x00." + b"\0" * 30, "pickle"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
    ],
)
def test_what_is_no_safetensors_file_is_named(start, hint):
    """The refusal says what the file seems to be."""
    with pytest.raises(CheckpointError, match=hint):
        verify_bytes(start)


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_the_typed_error(data):
    """Whatever the file holds, the answer is a reason or OK."""
    reason_of(data)


@given(st.integers(0, 10_000), st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_is_refused_or_is_another_file(place, value):
    """Whatever the byte, the answer is a checkpoint or the typed error, no other."""
    data = bytearray(encode(checkpoint()))
    place %= len(data)
    data[place] = value
    with suppress(CheckpointError):
        decode(data)


def test_equal_content_makes_equal_bytes(tmp_path):
    """The file is a function of what is in it: no time, no order of dictionaries, no chance."""
    metrics = {"valid/accuracy": {"value": 0.5}, "valid/loss": {"value": 1.0}}
    backwards = dict(reversed(metrics.items()))
    assert encode(checkpoint(metrics=metrics)) == encode(checkpoint(metrics=backwards))
    assert encode(checkpoint(seed=1)) != encode(checkpoint())


def test_a_checkpoint_there_and_back_is_the_same(tmp_path):
    """All fields and every bit of the weights return."""
    about = {"metrics": {"a": {"value": 0.25, "n": 3}}, "recipe": {"epochs": 2}, "parents": ("0" * 12,)}
    first = checkpoint(kind="averaged", trained_on="f" * 64, note="é\n", **about)
    write(first, tmp_path / "deep" / "a.safetensors")
    again = read(tmp_path / "deep" / "a.safetensors")
    names = ("spec", "classes", "metrics", "recipe", "parents", "kind", "trained_on", "note", "digest")
    assert [getattr(again, name) for name in names] == [getattr(first, name) for name in names]
    x = torch.randn(5, 6)
    assert torch.equal(again.to_module()(x), zoo.build(SPEC, seed=0).eval()(x))


def test_another_hash_than_expected_is_refused(tmp_path):
    """Both hashes are in the message."""
    write(checkpoint(), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"expected sha256 {'0' * 64}"):
        read(tmp_path / "a.safetensors", sha256="0" * 64)
    with pytest.raises(CheckpointError, match="cannot read"):
        verify(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match="plain file"):
        verify(tmp_path)


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The tensors of a model, some replaced, or left out where None; `__` stands for a dot."""
    state = dict(checkpoint().tensors) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


WRONG = {
    "missing": ({"1__bias": None}, "missing 1.bias"),
    "extra": ({"spare": torch.zeros(1)}, "not in the model spare"),
    "shape": ({"1__bias": torch.zeros(3)}, r"1.bias: expected shape \(2,\), got \(3,\)"),
    "scalar": ({"0__1__num_batches_tracked": torch.zeros(1, dtype=torch.int64)}, "num_batches_tracked: expected shape"),
    "wider type": ({"1__bias": torch.zeros(2, dtype=torch.float64)}, "expected torch.float32, got torch.float64"),
    "integers": ({"1__bias": torch.zeros(2, dtype=torch.int8)}, "expected torch.float32, got torch.int8"),
    "NaN": ({"1__bias": torch.tensor([0.0, float("nan")])}, "NaN or infinity in 1.bias"),
    "infinity": ({"1__bias": torch.tensor([float("inf"), -float("inf")])}, "NaN or infinity in 1.bias"),
    "variance": ({"0__1__running_var": -torch.ones(4)}, "less in 0.1.running_var"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_do_not_fit_change_nothing(name):
    """The model is as it was, bit by bit, and the message names the tensor."""
    replaced, message = WRONG[name]
    target = zoo.build(SPEC, seed=3)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        restore(target, changed(**replaced))
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())
    with pytest.raises(CheckpointError, match=message):
        zoo.Checkpoint(SPEC, changed(**replaced), ("no", "yes"))


def test_all_differences_are_told_at_once():
    """One look is enough to see what is wrong."""
    with pytest.raises(CheckpointError, match=r"missing 1\.weight.*spare.*1\.bias"):
        zoo.Checkpoint(
            SPEC, changed(**{"1__weight": None, "spare": torch.zeros(1), "1__bias": torch.zeros(3)}), ("a", "b")
        )


PREFIXES = ("module.", "_orig_mod.", "model.", "net.module._orig_mod.", "student.backbone.", "0.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_with_which_all_names_fit_is_named_and_stripped_when_asked(tmp_path, prefix):
    """By file, found or told; not without being asked, and not where another one was told."""
    file = tmp_path / "foreign.safetensors"
    file.write_bytes(save({prefix + name: tensor for name, tensor in checkpoint().tensors.items()}))
    registry = zoo.Registry(tmp_path / "registry.json")
    for asked, message in ((False, f"begin with '{prefix}'.*strip it with strip_prefix=True"), ("other.", "missing")):
        with pytest.raises(CheckpointError, match=message):
            registry.register("a", file, spec=SPEC, classes=["no", "yes"], strip_prefix=asked)
    for asked in (True, prefix, prefix[:-1]):
        entry = registry.register("a", file, spec=SPEC, classes=["no", "yes"], strip_prefix=asked)
        assert registry.checkpoint(entry).digest == checkpoint().digest


def test_a_prefix_is_found_beside_other_tensors_and_never_guessed():
    """Weights of a loss stay where they are; of two copies none is chosen."""
    names = ["0.weight", "0.bias"]
    model, copy = ([f"{front}.{name}" for name in names] for front in ("model", "ema"))
    assert prefixes(names, [*model, "loss.weight"]) == ["model."]
    assert prefix_of(names, names) == ""
    assert prefixes(names, [*copy, *model, *names, "0.0.weight"]) == ["", "ema.", "model."]
    assert prefixes(names, ["x0.weight", "x0.bias"]) == []
    with pytest.raises(CheckpointError, match=r"expected one prefix.*got 'ema\.' and 'model\.'"):
        prefix_of(names, [*model, *copy])
    with pytest.raises(CheckpointError, match=r"expected one prefix.*got none among 1\.weight"):
        prefix_of(names, ["1.weight"])
    with pytest.raises(CheckpointError, match=r"names that differ without 'model\.'"):
        adapted({}, {"a": torch.ones(1), "model.a": torch.zeros(1)}, prefix="model.")


@pytest.mark.parametrize("kind", [None, torch.int32, torch.int16, torch.int64])
def test_counters_of_batch_norm_are_completed_as_torch_does(tmp_path, kind):
    """Files of older programs have none, or shorter integers; the counts stay."""
    counter = "0.1.num_batches_tracked"
    tensors = changed(**{counter.replace(".", "__"): None if kind is None else torch.tensor(7, dtype=kind)})
    found = foreign(save(tensors), SPEC, ["no", "yes"]).tensors[counter]
    assert (int(found), found.dtype) == (0 if kind is None else 7, torch.int64)
    for wrong in (torch.tensor(7.0), torch.zeros(1, dtype=torch.int32), torch.tensor(True)):
        with pytest.raises(CheckpointError, match="num_batches_tracked: expected"):
            foreign(save({**tensors, counter: wrong}), SPEC, ["no", "yes"])


def test_a_tied_tensor_may_be_in_a_file_once():
    """As programs write it that keep each tensor once."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    whole = net.state_dict()
    for left_out in ("0.weight", "1.weight"):
        found = adapted(whole, {name: tensor for name, tensor in whole.items() if name != left_out})
        assert found.keys() == whole.keys()
        assert torch.equal(found[left_out], net[0].weight)


WEIGHT = checkpoint().tensors["1.weight"]  # (2, 4)
ORDERED = {
    "transposed": WEIGHT.t().contiguous().t(),
    "every other row": WEIGHT.repeat_interleave(2, dim=0)[::2],
    "a parameter": nn.Parameter(WEIGHT.clone()),
    "a negative view": torch._neg_view(-WEIGHT),
    "one memory for two": torch.cat([WEIGHT.flatten(), WEIGHT.flatten()])[:8].view(2, 4),
}


@pytest.mark.parametrize("kind", ORDERED)
def test_it_does_not_matter_how_tensors_lie_in_memory(kind):
    """The file is that of the same values in order, also where two tensors share a memory."""
    tensors = changed(**{"1__weight": ORDERED[kind], "1__bias": ORDERED[kind].detach()[0, :2]})
    plain = changed(**{"1__weight": WEIGHT, "1__bias": WEIGHT[0, :2].clone()})
    found, wanted = (zoo.Checkpoint(SPEC, each, ("no", "yes")) for each in (tensors, plain))
    assert encode(found) == encode(wanted)
    assert torch.equal(decode(encode(found)).tensors["1.weight"], WEIGHT)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "1.weight: NoneType, which is no tensor"),
        (WEIGHT.numpy(), "1.weight: ndarray"),
        (WEIGHT.to_sparse(), "1.weight: a quantised, sparse"),
        (torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8), "1.weight: a quantised"),
        (WEIGHT.to("meta"), r"on the meta device: \['1.weight'\]"),
    ],
    ids=["nothing", "an array", "sparse", "quantised", "no values"],
)
def test_what_is_no_plain_tensor_is_refused_by_name(value, message):
    """Before anything is made of it."""
    with pytest.raises(CheckpointError, match=message):
        zoo.Checkpoint(SPEC, {**checkpoint().tensors, "1.weight": value}, ("no", "yes"))


def test_large_finite_weights_pass():
    """A sum that overflows is no reason: the values are looked at themselves."""
    tensors = changed(**{"1__bias": torch.full((2,), torch.finfo(torch.float32).max)})
    assert zoo.Checkpoint(SPEC, tensors, ("no", "yes")).tensors["1.bias"].isfinite().all()


def test_class_names_must_be_as_many_as_classes():
    """Repeated or missing names are refused."""
    for classes in (["no"], ["no", "no"], ["no", "yes", "perhaps"]):
        with pytest.raises(CheckpointError, match="expected 2 different names"):
            zoo.Checkpoint.from_module(zoo.build(SPEC), SPEC, classes)


def test_absurd_sizes_are_refused_before_anything_is_allocated():
    """A width of a billion is a spec, but no model."""
    absurd = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 10**9, "depth": 3})
    with pytest.raises(CheckpointError, match="parameters"):
        zoo.Checkpoint(absurd, {}, ("no", "yes"))


def test_a_file_without_our_metadata_is_no_checkpoint(tmp_path):
    """A foreign file has to be registered with its spec."""
    (tmp_path / "a.safetensors").write_bytes(save(dict(checkpoint().tensors)))
    with pytest.raises(CheckpointError, match="no key 'zoo'"):
        read(tmp_path / "a.safetensors")


def test_a_model_shares_no_memory_with_its_checkpoint():
    """Training it further leaves the checkpoint as it was."""
    kept = checkpoint()
    digest, module = zoo.Checkpoint(SPEC, kept.tensors, kept.classes).digest, kept.to_module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert zoo.Checkpoint(SPEC, kept.tensors, kept.classes).digest == digest


def test_buffers_outside_the_state_keep_their_values():
    """A builder's own constants are not lost on the way through the meta device."""

    class Scaled(nn.Module):
        def __init__(self, inputs: int, classes: int) -> None:
            super().__init__()
            self.linear = nn.Linear(inputs, classes)
            self.register_buffer("scale", torch.tensor(3.0), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.scale

    def scaled_for_test(inputs, classes):
        return Scaled(inputs, classes)

    zoo.architecture(scaled_for_test)
    spec = zoo.Spec("scaled_for_test", features=2, context=0, classes=2)
    model = zoo.build(spec, seed=0)
    x = torch.randn(3, 2)
    assert torch.equal(zoo.Checkpoint.from_module(model, spec, ["a", "b"]).to_module()(x), model(x))


def test_the_probe_finds_right_bytes_in_wrong_code():
    """The same weights under another activation answer otherwise; rounding in the last digit does not count."""
    other = zoo.Spec(
        "cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1, "activation": "gelu"}
    )
    kept = checkpoint()
    recorded = kept.exam().record
    check_probe(recorded, kept.exam().record)
    near = {"digest": "other", "values": [value * (1 + 1e-5) for value in recorded["values"]]}
    check_probe(near, kept.exam().record)
    with pytest.raises(CheckpointError, match="the code computes otherwise"):
        check_probe(recorded, zoo.Checkpoint(other, kept.tensors, kept.classes).exam().record)


class Odd(nn.Module):
    """A layer under a name of its user's, beside a buffer of some element type."""

    def __init__(self, inputs: int, classes: int, name: str, dtype: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(inputs, classes))
        self.name = name
        self.register_buffer("own", torch.zeros(2, dtype=getattr(torch, dtype)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer."""
        return self.get_submodule(self.name)(x)


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("head", "int32", "OK"),
        ("head/1", "int32", "TENSOR_NAME"),
        ("\u00e9", "int32", "TENSOR_NAME"),
        ("head", "complex64", "DTYPE"),
        ("head", "complex128", "DTYPE"),
        ("head", "float8_e8m0fnu", "DTYPE"),
    ],
)
def test_what_could_not_be_read_again_is_never_written(tmp_path, monkeypatch, name, dtype, reason):
    """A user's own architecture may hold what the format or its reader does not: then nothing is registered."""

    def odd(inputs: int, classes: int, *, name: str = "head", dtype: str = "int32") -> nn.Module:
        return Odd(inputs, classes, name, dtype)

    monkeypatch.setattr("zoo.models.architectures.ARCHITECTURES", {})
    zoo.architecture(odd)
    spec = zoo.Spec("odd", features=2, context=1, classes=2, options={"name": name, "dtype": dtype})
    registry = zoo.Registry(tmp_path / "registry.json")
    found = "OK"
    try:
        registry.register("odd", zoo.build(spec, seed=0), spec=spec, classes=["no", "yes"])
        registry.load("odd")
    except CheckpointError as error:
        found = error.reason
    assert (found, len([*tmp_path.rglob("*")]) > 0) == (reason, reason == "OK")
