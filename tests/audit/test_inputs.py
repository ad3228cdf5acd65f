"""The notation of arguments, and the recipes that make them."""

import pytest
import torch

from batchproof.audit.op.inputs import KINDS, parse
from batchproof.audit.op.workload import Workload
from batchproof.errors import ArgumentError


def one(text):
    return parse({"other": "randn[M]", "x": text})[1]


@pytest.mark.parametrize(
    ("text", "dims", "axis", "each", "dtype"),
    [
        ("randn[M,4096]:bf16", (None, 4096), 0, 1, torch.bfloat16),
        ("randn[ 8*M , 64 ]", (None, 64), 0, 8, torch.float32),
        ("randn[M*8,64]:float16", (None, 64), 0, 8, torch.float16),
        ("rand[3,M]:fp64", (3, None), 1, 1, torch.float64),
        ("randint(0,100)[M]:i32", (None,), 0, 1, torch.int32),
        ("randint(0,100)[M]", (None,), 0, 1, torch.int64),
        ("full(0.5)[1]", (1,), None, 1, torch.float32),
        ("empty[M,2]:fp8", (None, 2), 0, 1, torch.float8_e4m3fn),
    ],
)
def test_tensors(text, dims, axis, each, dtype):
    argument = one(text)
    assert (argument.dims, argument.axis, argument.each, argument.dtype) == (dims, axis, each, dtype)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("-1", -1), ("True", True), ("None", None), ("'fp8'", "fp8"), ("[1, 2]", [1, 2]),
     ("torch.bfloat16", torch.bfloat16)],
)  # fmt: skip
def test_literals(text, value):
    assert one(text).literal == value


def test_other_values_than_strings_pass_as_they_are():
    assert one(1e-6).literal == 1e-6
    assert one(torch.bfloat16).literal is torch.bfloat16


def test_the_batch_size_and_places():
    assert one("M").maker == "M"
    assert one("arange[M+1]:i32").make_anew(3, torch.device("cpu")).tolist() == [0, 1, 2, 3]
    assert bool(one("empty[M,2]").make_anew(3, torch.device("cpu")).isnan().all())
    assert bool(one("empty[M]:i32").make_anew(3, torch.device("cpu")).eq(2**31 - 1).all())
    assert bool(one("empty[M]:fp8").make_anew(3, torch.device("cpu")).float().isnan().all())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("randn[M,M]", "want M once"),
        ("randn[M+1]", r"M\+1 for arange and empty only"),
        ("randn[N,4]", "a size of x is 'N'"),
        ("randn[M]:bf17", "dtype of x is 'bf17'"),
        ("randint[M]", "want randint"),
        ("randn(3)[M]", "want randint"),
        ("gauss[M]", "want a tensor such as"),
        ("hello", "a Python literal"),
        ("torch.mm", "a Python literal"),
    ],
)
def test_what_is_malformed_is_named(text, message):
    with pytest.raises(ArgumentError, match=message):
        one(text)


def test_something_must_be_of_requests():
    with pytest.raises(ArgumentError, match="no argument has an axis M"):
        parse({"x": "randn[4]", "out": "empty[M]"})
    with pytest.raises(ArgumentError, match="want a Python identifier"):
        parse({"x y": "randn[M]"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_in_every_batch(kind):
    arguments = parse({"x": "randn[M,8]:bf16", "y": "randn[2*M,8]:bf16", "z": "randn[3,M]:fp32"})
    workload = Workload(lambda x, y, z: (x, y, z.t()), arguments, 20, torch.device("cpu"), 20)
    whole, parts = workload.run(kind, 20), workload.run(kind, 3)
    assert whole.difference(parts) is None
    assert [name for name, _ in whole.outputs] == ["output 0", "output 1", "output 2"]
    assert whole.outputs[1][1].shape == (20, 2, 8)


def test_cancelling_inputs_cancel():
    x, y = parse({"x": "randn[M,8]", "y": "randn[M,8]"})
    scope = {"torch": torch}
    exec("\n".join(x.recipe(50, 0, "cancelling") + y.recipe(50, 1, "cancelling", "x")), scope)
    total = scope["x"] + scope["y"]
    assert float(total.abs().max()) < 0.05
    assert float(total.abs().max()) > 0
    assert float(scope["x"].sum(-1).abs().max()) < 0.5  # its second half undoes the first


def test_subnormal_inputs_are_subnormal():
    scope = {"torch": torch}
    exec("\n".join(one("randn[M,64]").recipe(10, 0, "subnormal")), scope)
    below = scope["x"].abs() < torch.finfo(torch.float32).tiny
    assert 0.5 < float(below.float().mean()) <= 1.0
    assert bool((scope["x"] != 0).any())


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_fp8_input_overflows_to_nan(kind):
    scope = {"torch": torch}
    exec("\n".join(one("randn[M,64]:fp8").recipe(50, 0, kind)), scope)
    assert not bool(scope["x"].float().isnan().any())


def test_an_output_in_the_arguments_must_be_changed_to_count():
    workload = Workload(
        lambda x, scale, out: out.copy_(x * scale), parse({"x": "randn[M,4]", "scale": "ones[1]", "out": "empty[M,4]"}),
        8, torch.device("cpu"), 8,
    )  # fmt: skip
    assert [output.name for output in workload.outputs] == ["out"]


def test_a_shared_argument_that_changes_is_not_observed():
    def cached(x, cache):
        cache[0] += 1
        return x

    workload = Workload(cached, parse({"x": "randn[M,4]", "cache": "zeros[3]"}), 8, torch.device("cpu"), 8)
    assert workload.unobserved == ["cache: is changed and has no axis M: it is no request's"]


@pytest.mark.parametrize(
    ("function", "arguments", "by_place"),
    [
        (lambda x, y: x - y, {"x": "randn[M,4]", "y": "ones[M,4]"}, False),
        (lambda x, y: x - y, {"y": "ones[M,4]", "x": "randn[M,4]"}, False),
        (lambda a, b: a - b, {"x": "randn[M,4]", "y": "ones[M,4]"}, True),
        (lambda a, b: a - b, ["randn[M,4]", "ones[M,4]"], True),
        (lambda **named: named["x"] - named["y"], {"y": "ones[M,4]", "x": "randn[M,4]"}, False),
        (torch.sub, {"other": "ones[M,4]", "input": "randn[M,4]"}, False),
    ],
)
def test_names_are_kept_if_the_function_knows_them(function, arguments, by_place):
    workload = Workload(function, parse(arguments), 8, torch.device("cpu"), 8)
    assert workload.by_place == by_place
    (_, out), *_ = workload.run_batch("normal", torch.arange(8))
    drawn = workload.prepare("normal", torch.arange(8))
    x = next(t for t in drawn.values() if not bool((t == 1).all()))
    assert torch.equal(out, x - 1)
