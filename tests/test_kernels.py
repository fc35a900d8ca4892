# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Products that skip zeros: values against fp64, what is never read, the set that S keeps, which kernel serves."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from models import compiled
from torch.nn import functional as F

from peft_spon import kernels
from peft_spon.criteria import CRITERIA, keep_above
from peft_spon.environment import environment
from peft_spon.kernels import build, cpu, reference


ROOT = Path(__file__).parents[1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
NAN, INF = float("nan"), float("inf")
# A compiler that writes its output slowly, in two parts; $6 is the output of `cc -O3 -shared -fPIC source -o output`.
SLOW_COMPILER = 'sh -c \'printf half > "$5"; sleep 0.3; printf whole > "$5"\''
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
products = pytest.mark.parametrize("product", [pytest.param(cpu.sparse_gemv, marks=compiled), cpu.bag])


@pytest.fixture(autouse=True)
def _decoding():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def inputs(rows, n_in, n_out, dtype, sparsity=0.6):
    z = torch.randn(*rows, n_in)
    z = (z * (torch.rand_like(z) >= sparsity)).to(dtype)
    return z, torch.randn(n_in, n_out).to(dtype), torch.randn(n_out)


def poisoned(weight_t, z):
    """NaN wherever no row of the batch needs the weights."""
    idle = (z == 0).reshape(-1, z.shape[-1]).all(0)
    return torch.where(idle[:, None], NAN, weight_t)


def exact(z, weight_t, bias=None):
    y = z.double() @ weight_t.double()
    return y if bias is None else y + bias.double()


def error(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


@products
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "n_in", "n_out"),
    [((1,), 64, 64), ((), 300, 200), ((1, 1), 1000, 696), ((2,), 130, 1056), ((3, 1), 77, 333), ((11,), 40, 128)],
)
def test_values_and_what_is_never_read(product, dtype, rows, n_in, n_out):
    z, weight_t, bias = inputs(rows, n_in, n_out, dtype, sparsity=0.9 if len(rows) == 1 else 0.6)
    if rows != (11,):  # more than eight rows share no reading
        assert poisoned(weight_t, z).isnan().any()
    y = product(z, weight_t if rows == (11,) else poisoned(weight_t, z), bias)
    assert y.shape == (*rows, n_out)
    assert y.dtype == dtype
    limit = LIMIT[dtype] * (1.5 if product is cpu.bag else 1)  # which rounds before the bias, too
    assert error(y, exact(z, weight_t, bias)) <= limit
    assert error(product(z, weight_t, bias.to(dtype)), exact(z, weight_t, bias.to(dtype))) <= limit


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_nothing_but_the_row(dtype):
    """Not on threads, not on the other rows, not on whether zeros are skipped."""
    z, weight_t, bias = inputs((8,), 301, 1100, dtype)
    alone = torch.stack([kernels.sparse_gemv(row, weight_t, bias) for row in z])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(kernels.sparse_gemv(z, weight_t, bias), alone)
            assert torch.equal(kernels.dense_gemv(z, weight_t, bias), alone)
            assert torch.equal(kernels.dense_gemv(z[0], weight_t, bias), alone[0])
    finally:
        torch.set_num_threads(before)


@products
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(product, dtype):
    z, weight_t, bias = inputs((1,), 96, 72, dtype)
    nothing = torch.zeros_like(z)
    assert torch.equal(product(nothing, torch.full_like(weight_t, NAN), bias), bias.to(dtype)[None])
    assert torch.equal(product(-nothing, weight_t, None), nothing[:, :72])
    everything = torch.randn_like(z)
    assert error(product(everything, weight_t), exact(everything, weight_t)) <= LIMIT[dtype]
    z[0, 5] = NAN
    assert product(z, weight_t, bias).isnan().all()
    z[0, 5] = INF
    assert torch.equal(product(z, weight_t, bias)[0], weight_t[5].sign() * INF)
    assert product(z.new_empty(0, 96), weight_t, bias).shape == (0, 72)
    assert product(z.new_empty(2, 0, 96), weight_t, None).shape == (2, 0, 72)
    assert torch.equal(product(z.new_empty(2, 0), weight_t[:0], bias), bias.to(dtype).expand(2, -1))
    assert product(z, weight_t[:, :0], None).shape == (1, 0)


@products
def test_views(product):
    """Every second input of a longer row; one of three weights stored side by side; a bias with strides."""
    z, weight_t, bias = inputs((2,), 200, 360, torch.float32)
    narrow, part = z[:, ::2], weight_t[:100, 120:240]
    expected = exact(narrow, part, bias[::3])
    assert not narrow.is_contiguous()
    assert error(product(narrow, poisoned(part, narrow).contiguous(), bias[::3]), expected) <= 2e-6
    assert error(product(narrow, part, bias[::3]), expected) <= 2e-6


@compiled
def test_half_precision_numbers_of_every_size():
    """Subnormal, huge and infinite results round as torch rounds them."""
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)
        column = bits.view(dtype)[:, None].contiguous()
        one = torch.ones(1, dtype=dtype)
        y = kernels.sparse_gemv(one, column.t().contiguous())
        assert torch.equal(y.isnan(), column[:, 0].isnan())
        assert torch.equal(y[~y.isnan()], column[:, 0][~y.isnan()])
        wide = torch.cat([torch.randn(4096) * 2.0**e for e in range(-30, 20)])
        assert torch.equal(kernels.sparse_gemv(one, torch.zeros(1, len(wide), dtype=dtype), wide), wide.to(dtype))


def score_arguments(name, norms):
    order = {"magnitude": 0, "robust": 1, "relative": 2, "weighted": 2}[name]
    return {"column_scale": norms if name in ("weighted", "robust") else None, "relative": order}


@pytest.mark.parametrize("name", ["magnitude", "relative", "weighted", "robust"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8, 77, 576, 1536])
def test_the_set_is_that_of_the_criterion(name, dtype, n):
    """Through the identity y is S(x) itself. Thresholds lie on scores and beside them, where rounding decides."""
    criterion, identity = CRITERIA[name](), torch.eye(n, dtype=dtype)
    norms = torch.rand(n) + 0.5
    for trial in range(12):
        x = (torch.randn(1, 1, n) * 10.0 ** (trial % 5 - 2)).to(dtype)
        score = criterion.score(x, {"column_scale": norms})
        tau = score.flatten().kthvalue(n // 2).values
        for threshold in (tau, tau.nextafter(torch.tensor(0.0)), tau.nextafter(torch.tensor(INF)), tau * 1.0001):
            expected = x * keep_above(score, threshold, dtype)
            y = kernels.threshold_gemv(x, identity, threshold, **score_arguments(name, norms))
            assert torch.equal(y, expected)


@pytest.mark.parametrize("name", ["magnitude", "relative", "weighted", "robust"])
def test_the_set_for_strange_inputs(name):
    criterion, n = CRITERIA[name](), 24
    norms, identity = torch.rand(n) + 0.5, torch.eye(n)
    usual = torch.randn(n).clamp(-2, 2)
    strange = torch.stack([usual, usual * 0, usual * 1e-25, usual * 1e20, usual * 1e38, usual * 1e-42])
    for x in (*strange, strange):
        for tau in (torch.tensor(0.5), torch.tensor(0.0), torch.tensor(-1.0), torch.tensor(INF), torch.tensor(NAN)):
            expected = x * keep_above(criterion.score(x, {"column_scale": norms}), tau, x.dtype)
            assert torch.equal(kernels.threshold_gemv(x, identity, tau, **score_arguments(name, norms)), expected)
    for bad in (NAN, INF):
        x = usual.clone()
        x[3] = bad
        expected = x * keep_above(criterion.score(x, {"column_scale": norms}), torch.tensor(0.5), x.dtype)
        y = kernels.threshold_gemv(x, torch.ones(n, 1), torch.tensor(0.5), **score_arguments(name, norms))
        torch.testing.assert_close(y, expected.sum()[None], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_threshold_gain_and_shift_in_one_call(dtype, rows):
    x, weight_t, shift = inputs((rows,), 320, 200, dtype, sparsity=0.0)
    norms, gain, tau = torch.rand(320) + 0.5, 1 + 0.3 * torch.randn(320), torch.tensor(0.9)
    kept = x * keep_above(CRITERIA["robust"]().score(x, {"column_scale": norms}), tau, dtype)
    if rows == 1:
        weight_t = poisoned(weight_t, kept)
    y = kernels.threshold_gemv(x, weight_t, tau, norms, gain, shift, relative=1)
    expected = exact(kept.double() * gain.double(), weight_t.nan_to_num(), shift)
    composed = cpu.bag(reference.select(x, tau, norms, gain, 1), weight_t.nan_to_num(), shift)
    assert error(composed, expected) <= 2 * LIMIT[dtype]
    if kernels.active_kernel().name.startswith("c-"):
        assert error(y, expected) <= LIMIT[dtype]


@pytest.mark.parametrize("order", [True, 3, -1])
def test_what_scores_are_relative_to_is_an_order(order):
    x, tau = torch.randn(1, 8), torch.tensor(0.5)
    with pytest.raises(ValueError, match="2 to their root mean square"):
        kernels.threshold_gemv(x, torch.eye(8), tau, relative=order)
    with pytest.raises(ValueError, match="2 to their root mean square"):
        kernels.bind_threshold_gemv(torch.eye(8), tau, relative=order)


def test_ops_are_well_registered():
    z, weight_t, bias = inputs((2,), 48, 40, torch.bfloat16)
    torch.library.opcheck(torch.ops.peft_spon.sparse_gemv.default, (z, weight_t, bias))
    torch.library.opcheck(torch.ops.peft_spon.dense_gemv.default, (z[0], weight_t))
    arguments = (z, weight_t, torch.tensor(0.5), torch.rand(48), torch.rand(48), bias, 1)
    torch.library.opcheck(torch.ops.peft_spon.threshold_gemv.default, arguments)


def test_compiled_models_call_the_ops():
    z, weight_t, bias = inputs((1,), 48, 40, torch.float32)
    weight, tau = kernels.transposed_storage(weight_t.t()), torch.tensor(0.3)

    def layer(z):
        y = kernels.sparse_gemv(z, weight_t, bias) + kernels.threshold_gemv(z, weight_t, tau, bias=bias)
        return y + kernels.sparse_linear(z, weight, bias, sparsity=0.5)

    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    compiled_layer = torch.compile(layer, fullgraph=True, backend=backend)
    for x in (z, torch.randn(6, 48), torch.randn(20, 48)):
        torch.testing.assert_close(compiled_layer(x), layer(x))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("sparse_gemv" in t for t in targets) == 2
    aot = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(aot(z), layer(z))


def test_devices_without_a_kernel_compute_the_same():
    z, weight_t, bias = inputs((2,), 48, 40, torch.float32)
    torch.testing.assert_close(reference.sparse_gemv(z, poisoned(weight_t, z), bias), exact(z, weight_t, bias).float())
    torch.testing.assert_close(reference.masked_linear(z, weight_t, bias), exact(z, weight_t, bias).float())
    meta = kernels.sparse_gemv(z.to("meta"), weight_t.to("meta"), bias.to("meta"))
    assert (meta.shape, meta.device.type) == ((2, 40), "meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, w, b: (z[:, :5], w, b), "Shapes do not fit"),
        (lambda z, w, b: (z, w, b[:5]), "Shapes do not fit"),
        (lambda z, w, b: (z, w.half(), b), "weight_t torch.float16"),
        (lambda z, w, b: (z.double(), w.double(), b), "must be one of"),
        (lambda z, w, b: (z, w.t().contiguous().t(), b), "rows must be contiguous"),
        (lambda z, w, b: (z, w.to("meta"), b), "must be, too"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kernels.sparse_gemv(*change(*inputs((1,), 48, 40, torch.float32)))


def test_what_is_refused_of_s():
    x, weight_t, _ = inputs((1,), 48, 40, torch.float32)
    with pytest.raises(ValueError, match="one fp32 number"):
        kernels.threshold_gemv(x, weight_t, torch.rand(48))
    with pytest.raises(ValueError, match=r"shape \(48,\)"):
        kernels.threshold_gemv(x, weight_t, torch.tensor(0.5), torch.rand(40))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_sparse_linear_is_linear_for_any_number_of_rows(dtype, sparsity):
    z, weight_t, bias = inputs((40,), 96, 1056, dtype, sparsity)
    plain = weight_t.t().contiguous()
    weight = kernels.transposed_storage(plain)
    assert weight.shape == plain.shape
    assert weight.stride() == (1, 1056)
    assert torch.equal(weight, plain)
    assert kernels.transposed_storage(weight).data_ptr() == weight.data_ptr()
    for rows in (1, 2, 4, 8, 9, 40):
        for stored in (weight, plain):
            y = kernels.sparse_linear(z[:rows], stored, bias.to(dtype), sparsity)
            # Stored as usual, torch's own products serve, in their own precision.
            limit = LIMIT[dtype] if stored is weight and dtype in cpu.SLOW_DTYPES else 3 * LIMIT[dtype]
            assert error(y, exact(z[:rows], weight_t, bias.to(dtype))) <= limit
    assert kernels.sparse_linear(z[:0], weight, bias, sparsity).shape == (0, 1056)


def test_when_skipping_pays():
    """kernels.md of the measurements: up to 2 rows at 50 %, 4 at 70 %, 8 at 90 %, more never."""
    most = {s: max((r for r in range(1, 100) if kernels.skips(r, s)), default=0) for s in (0.0, 0.1, 0.5, 0.7, 0.9)}
    assert most == {0.0: 0, 0.1: 0, 0.5: 2, 0.7: 4, 0.9: 8}


def test_gradients_go_through_torch():
    for dtype in (torch.float32, torch.bfloat16):
        z, weight_t, bias = inputs((2,), 48, 40, dtype)
        weight = kernels.transposed_storage(weight_t.t())
        with torch.enable_grad():
            z.requires_grad_()
            kernels.sparse_linear(z, weight, bias.to(dtype)).float().square().sum().backward()
        mine, z.grad = z.grad, None
        with torch.enable_grad():
            F.linear(z, weight_t.t().contiguous(), bias.to(dtype)).float().square().sum().backward()
        torch.testing.assert_close(mine, z.grad, rtol=2e-2, atol=2e-1 if dtype == torch.bfloat16 else 1e-3)


@pytest.fixture
def reload(monkeypatch):
    """Loads the kernel as a process with these environment variables would."""

    def load(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        found = cpu._load.__wrapped__()
        monkeypatch.setattr(cpu, "_load", lambda: found)
        return found[1]

    yield load
    monkeypatch.undo()
    cpu._load.__wrapped__()  # the instruction set is chosen for the whole process


@compiled
@pytest.mark.parametrize("instructions", cpu.INSTRUCTION_SETS)
def test_the_kernel_for_every_instruction_set_of_this_machine(reload, instructions):
    try:
        kernel = reload(PEFT_SPON_CPU_KERNEL=instructions)
    except ValueError as refusal:
        if instructions == "portable":
            raise
        pytest.skip(str(refusal))
    assert kernel.name == f"c-{instructions}"
    for dtype in DTYPES:
        for rows in ((1,), (3,)):
            z, weight_t, bias = inputs(rows, 301, 700, dtype, sparsity=0.7)
            y = kernels.sparse_gemv(z, poisoned(weight_t, z), bias)
            assert error(y, exact(z, weight_t, bias)) <= LIMIT[dtype]
            assert torch.equal(kernels.dense_gemv(z, weight_t, bias), y)
            x = torch.randn(700).to(dtype)
            norms, tau = torch.rand(700) + 0.5, torch.tensor(0.8)
            for name in ("robust", "weighted"):
                kept = x * keep_above(CRITERIA[name]().score(x, {"column_scale": norms}), tau, dtype)
                y = kernels.threshold_gemv(x, torch.eye(700, dtype=dtype), tau, **score_arguments(name, norms))
                assert torch.equal(y, kept)


def test_without_a_compiler_embedding_bag_serves_and_says_why(reload, tmp_path):
    kernel = reload(CC=tmp_path / "cc", XDG_CACHE_HOME=tmp_path)
    assert kernel.name == kernels.active_kernel().name == "embedding_bag"
    assert str(tmp_path / "cc") in kernel.origin
    for dtype in DTYPES:
        z, weight_t, bias = inputs((1,), 301, 700, dtype)
        weight = kernels.transposed_storage(weight_t.t())
        y = kernels.sparse_gemv(z, poisoned(weight_t, z), bias)
        assert error(y, exact(z, weight_t, bias)) <= 1.5 * LIMIT[dtype]
        for rows in (1, 4, 20):
            z = z[:1].expand(rows, -1)
            y = kernels.sparse_linear(z, weight, bias, sparsity=0.5)
            assert error(y, exact(z, weight_t, bias)) <= 3 * LIMIT[dtype]


def test_which_kernel_serves(reload, tmp_path):
    assert kernels.active_kernel("cpu", torch.float64).name == "none"
    assert kernels.active_kernel("mps").name == "torch"
    assert "PEFT_SPON_CPU_KERNEL=torch" in reload(PEFT_SPON_CPU_KERNEL="torch").origin
    assert kernels.active_kernel().name == "embedding_bag"


def test_a_wrong_wish_names_the_choices(reload):
    with pytest.raises(ValueError, match="'fast'; it must be one of 'no-build'"):
        reload(PEFT_SPON_CPU_KERNEL="fast")


def test_the_compilers_words_are_told(reload, tmp_path):
    kernel = reload(XDG_CACHE_HOME=tmp_path, CC="sh -c 'echo no such header >&2; exit 1'")
    assert kernel.name == "embedding_bag"
    assert "no such header" in kernel.origin


def test_a_broken_library_is_not_used(reload, tmp_path):
    kernel = reload(XDG_CACHE_HOME=tmp_path, CC=SLOW_COMPILER)
    assert kernel.name == "embedding_bag"
    assert "no compiled library" in kernel.origin


def test_a_user_without_a_home_gets_what_needs_no_library(reload, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what Python does where no home is known
    monkeypatch.setattr("peft_spon.kernels.cpu.build.library_name", lambda: "none.so")
    kernel = reload()
    assert kernel.name == "embedding_bag"
    assert "home directory" in kernel.origin
    assert environment()["kernels"]["cpu float32"]["name"] == "embedding_bag"


def test_nothing_is_compiled_where_that_is_forbidden(reload, tmp_path):
    kernel = reload(PEFT_SPON_CPU_KERNEL="no-build", XDG_CACHE_HOME=tmp_path)
    assert kernel.name == "embedding_bag"
    assert not list(tmp_path.iterdir())


def test_processes_that_compile_at_once_see_whole_files_only(tmp_path):
    code = (
        "import runpy, pathlib, sys; build = runpy.run_path('peft_spon/kernels/build.py');"
        f"print(build['compile_into'](pathlib.Path({str(tmp_path)!r})).read_text())"
    )
    several = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "CC": SLOW_COMPILER},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    assert [p.communicate()[0].strip() for p in several] == ["whole"] * 3
    assert [p.name for p in tmp_path.iterdir()] == [build.library_name()]


@pytest.mark.parametrize("compiler", ["works", "is missing"])
def test_wheels(tmp_path, compiler):
    """With a compiler the wheel carries the library and is one of a platform; without, it is pure and still made."""
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        env={**os.environ, "CC": SLOW_COMPILER if compiler == "works" else str(tmp_path / "cc")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "peft_spon/kernels/sparse_gemv.c" in names
    assert (f"peft_spon/kernels/{build.library_name()}" in names) == (compiler == "works")
    assert ("-py3-none-any" in wheel.name) == (compiler == "is missing")


INTERPRETED = """
import torch
import triton_kernel
torch.manual_seed(0)
counters = torch.zeros(triton_kernel.COUNTERS, dtype=torch.int32)

def select(x, tau, column_scale, gain, order):
    scores = (x.float() if column_scale is None else x.float() * column_scale).abs()
    if order:
        scores = scores / scores.pow(order).mean(-1, keepdim=True).pow(1 / order)
    z = x * (scores > tau).to(x.dtype)
    return z if gain is None else (z * gain).to(x.dtype)

# The interpreter truncates to bf16 where GPUs round to nearest, gains and sums: twice at most 2 ** -7.
for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 2**-6), (torch.float16, 5e-4)):
    shapes = ((1, 600, 200, 4), (2, 600, 200, 4), (8, 520, 130, 4), (1, 700, 2500, 12), (1, 16, 130, 1))
    for rows, n_in, n_out, shares in shapes:
        splits = triton_kernel.plan(rows, n_in, n_out, dtype.itemsize, processors=shares).splits
        assert splits == 1 if n_in <= 32 else splits > 1, splits
        every = dtype == torch.float32 and n_out == 200
        for order, more in ((2, True), (0, True), (0, False), (1, True), (2, False))[: 5 if every else 1]:
            x, tau = torch.randn(rows, n_in).to(dtype), torch.tensor([1.1])
            weight_t, bias = torch.randn(n_in, n_out).to(dtype), torch.randn(2 * n_out)[::2]
            column_scale, gain = torch.rand(2, n_in) + 0.5 if more else (None, None)
            z = select(x, tau, column_scale, gain, order)
            expected = z.double() @ weight_t.double() + bias.double()
            weight_t[(z == 0).all(0)] = float("nan")
            selection = dict(tau=tau, column_scale=column_scale, gain=gain, relative=order)
            for name, given in (("S inside", (x, selection)), ("sparse already", (z, {}))):
                y = triton_kernel.launch(given[0], weight_t, bias, counters, shares, **given[1])
                error = (y.double() - expected).norm() / expected.norm()
                assert error <= limit, (name, dtype, rows, order, error)
                assert not counters.any()
            again = triton_kernel.launch(z, weight_t, bias, counters, shares)
            assert torch.equal(y, again)
            in_8_bits, scale = torch.randint(-127, 128, (n_in, n_out), dtype=torch.int8), torch.rand(n_out) / 64
            expected = z.double() @ (in_8_bits * scale).double() + bias.double()
            y = triton_kernel.launch(x, in_8_bits, bias, counters, shares, **selection, weight_scale=scale)
            assert (y.double() - expected).norm() <= limit * expected.norm(), (dtype, rows)
# A list that is full twice, and one that is full and then empty.
cut = triton_kernel.Plan(block_in=16, block_out=128, block_list=64, n_split=128, splits=2, warps=1)
for kept in (slice(None), slice(0, 64)):
    z, weight_t = torch.zeros(1, 256), torch.randn(256, 130)
    z[0, kept] = torch.randn(256)[kept]
    y = triton_kernel.launch(z, weight_t, None, counters, 4, cut=cut)
    assert torch.allclose(y, z @ weight_t, atol=1e-4)
# More partial sums than are added up at a time.
z, weight_t = torch.randn(1, 8192), torch.randn(8192, 40)
cut = triton_kernel.plan(1, 8192, 40, 4, processors=132)
assert cut.splits > cut.block_partial, cut
y = triton_kernel.launch(z, weight_t, None, counters, 132, cut=cut)
assert torch.allclose(y, z @ weight_t, atol=2e-3)
z = torch.zeros(1, 64)
assert torch.equal(triton_kernel.launch(z, torch.full((64, 40), float("nan")), bias[:40], counters, 4)[0], bias[:40])
z[0, 3] = float("nan")
assert triton_kernel.launch(z, torch.ones(64, 40), None, counters, 4).isnan().all()
tau = torch.tensor([1.0])
for order in (0, 1, 2):
    assert triton_kernel.launch(z, torch.ones(64, 40), None, counters, 4, tau, relative=order).isnan().all()
"""

COMPILED_FOR_GPUS = r"""
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton_kernel
kernel = triton_kernel._sparse_gemv
sizes = {"fp32": 4, "bf16": 2, "fp16": 2, "i8": 1}
shapes = ((1, "bf16", "bf16", 4096, 4096), (1, "fp32", "fp32", 1024, 1), (4, "fp16", "fp16", 4096, 4096),
          (1, "bf16", "i8", 4096, 4096), (2, "bf16", "i8", 4096, 4096))
for rows, kind, of_weights, n_out, n_in in shapes:
    cut = triton_kernel.plan(rows, n_in, n_out, sizes[of_weights], 108)
    fixed = dict(ROWS=rows, ROWS_PADDED=1 if rows == 1 else 16, HAS_WEIGHT_SCALE=of_weights == "i8", HAS_BIAS=True,
                 SELECTS=True, ORDER=2, HAS_SCALE=True, HAS_GAIN=True, DOT_IN_FP32=False, BLOCK_IN=cut.block_in,
                 BLOCK_OUT=cut.block_out, BLOCK_LIST=cut.block_list,
                 BLOCK_MEAN=triton_kernel.block_mean(rows, cut.warps),
                 BLOCK_PARTIAL=cut.block_partial)
    fixed |= {"n_in": 1} if n_in == 1 else {}  # as triton does it
    pointers = dict(x=kind, weight_t=of_weights, weight_scale="fp32", bias="fp32", tau="fp32", column_scale="fp32",
                    gain="fp32", y=kind, partial="fp32", counters="i32", listed="i32", values=kind)
    types = {name: "*" + of for name, of in pointers.items()}
    types |= {name: "constexpr" if name in fixed else "i32" for name in kernel.arg_names if name not in pointers}
    # As triton does it with addresses and sizes that are multiples of 16.
    of_16 = [i for i, name in enumerate(kernel.arg_names) if name in {*pointers, "stride", "n_out"}]
    aligned = {(i,): [["tt.divisibility", 16]] for i in of_16}
    source = ASTSource(kernel, types, fixed, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": cut.warps})
    assert len(made.asm["cubin"]) > 1000
    assert made.metadata.shared < 48 * 1024
    # 16 bytes of a row of W^T at a time: what is read slower is read at a part of the bandwidth.
    assert re.search(r"ld\.global\S*evict_first\S*v4\.b32", made.asm["ptx"]), (rows, kind, of_weights)
"""


def in_a_process(code, **environment):
    """Runs code that finds the file of the Triton kernel, alone, as `triton_kernel`."""
    alone = [sys.executable, "-c", f"import sys; sys.path.append({str(Path(build.__file__).parent)!r})\n{code}"]
    done = subprocess.run(alone, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_triton
def test_the_cuda_kernel_in_tritons_interpreter():
    in_a_process(INTERPRETED, TRITON_INTERPRET="1")


@needs_triton
def test_the_cuda_kernel_compiles_for_the_oldest_gpus(tmp_path):
    in_a_process(COMPILED_FOR_GPUS, TRITON_CACHE_DIR=str(tmp_path))
