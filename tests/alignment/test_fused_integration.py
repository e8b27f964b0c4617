"""The fused loss in training: the operator's contract, half precision, compilation, autocast, backbones, copies."""

from __future__ import annotations

import copy
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cameo
from cameo import AlignmentHead, Correspondence, TokenLayout, alignment_loss
from cameo.alignment import supervision_weights
from cameo.backbone import get_backbone
from tests.helpers import backbone_checks as checks
from tests.helpers.backbone_rows import TINY, Row
from tests.helpers.models import VIEWS, JointModel, RowModel, frames, next_view
from tests.helpers.wrapped_models import UNET_MATCHES, inputs, unet

GRIDS = ((2, 3), (3, 3), (2, 3))
HEADS, WIDTH, TOKENS = 3, 4, 9
MATCH = checks.random_matches(GRIDS)
KINDS = [("mlp", 0), ("mlp", 1), ("mlp", 2), ("mean", 1), ("none", 1)]
every_kind = pytest.mark.parametrize(("kind", "depth"), KINDS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_head(kind: str = "mlp", depth: int = 1, heads: int = HEADS) -> AlignmentHead:
    torch.manual_seed(0)
    return AlignmentHead(heads, kind, depth)


def queries_and_keys(dtype: torch.dtype = torch.float32, *, tokens: int = TOKENS, views: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    made = (torch.randn(1, HEADS, views, tokens, WIDTH, generator=generator) for _ in range(2))
    return tuple(one.to(dtype).requires_grad_() for one in made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_the_operator_keeps_its_contract(kind: str, depth: int, dtype: torch.dtype) -> None:
    operator = torch.ops.cameo.alignment_loss.default
    head, exact = make_head(kind, depth), torch.promote_types(dtype, torch.float32)
    for normalize, gradients in (("per_view", True), ("all_views", False)):
        tensors = [one.detach().requires_grad_(gradients) for one in queries_and_keys(dtype)]
        weights = [one.detach().to(exact).requires_grad_(gradients) for one in head.weights()]
        token_grids = [side for grid in GRIDS for side in grid]
        options = (kind, token_grids, normalize, 0.5, 0.7, "chunked", "exact", gradients, [])
        arguments = (*tensors, MATCH.index, supervision_weights(MATCH, dtype=exact), weights, *options)
        checked = ["test_schema", "test_faketensor", "test_autograd_registration"]
        if gradients and (dtype == torch.float32 or (kind, depth) == ("mlp", 1)):
            checked.append("test_aot_dispatch_dynamic")  # slower than the others together
        torch.library.opcheck(operator, arguments, test_utils=checked)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = operator(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
        real = operator(*arguments)
        layouts = [[(one.stride(), one.dtype) for one in torch.utils._pytree.tree_leaves(out)] for out in (real, fake)]
        assert layouts[0] == layouts[1]  # opcheck does not compare all of this, and inductor relies on it


def test_a_second_derivative_is_refused_and_the_reference_has_it() -> None:
    query, key = queries_and_keys(torch.float64)
    head = make_head().double()
    loss = alignment_loss(query, key, MATCH, head, implementation="chunked")
    with pytest.raises(RuntimeError, match=r"create_graph=True.* implementation=\"reference\" only"):
        torch.autograd.grad(loss, query, create_graph=True)
    loss = alignment_loss(query, key, MATCH, head, implementation="reference")
    (gradient,) = torch.autograd.grad(loss, query, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), key)
    assert second.isfinite().all()
    assert second.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_that_is_kept_gives_the_same_gradients_again(dtype: torch.dtype) -> None:
    query, key = queries_and_keys(dtype)
    head = make_head()
    sources = [query, key, *head.parameters()]
    loss = 0.3 * alignment_loss(query, key, MATCH, head)
    first = torch.autograd.grad(loss, sources, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.fill_(torch.nan)  # the caller may change them
    again = torch.autograd.grad(loss, sources, retain_graph=True)
    last = torch.autograd.grad(loss, sources)
    for gradients in (again, last):
        assert all(map(torch.equal, gradients, kept))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_gradients_that_were_kept_become_those_of_the_caller(dtype: torch.dtype) -> None:
    query, key = queries_and_keys(dtype)
    loss = alignment_loss(query, key, MATCH, make_head())
    assert loss.grad_fn is not None
    kept = [tensor.untyped_storage().data_ptr() for tensor in loss.grad_fn.saved_tensors[:2]]
    (0.3 * loss).backward()
    assert [source.grad.untyped_storage().data_ptr() for source in (query, key)] == kept


def test_a_scaler_of_the_loss_neither_overflows_nor_loses_gradients() -> None:
    match = checks.random_matches(((16, 16),) * 2)
    query, key = queries_and_keys(torch.float16, tokens=256, views=2)
    truth = [tensor.detach().double().requires_grad_() for tensor in (query, key)]
    expected = torch.autograd.grad(alignment_loss(*truth, match, make_head().double()), truth)
    size = max(gradient.abs().max() for gradient in expected)
    # So that the product with the factor neither overflows in float16 nor underflows.
    assert 1e-5 < size < 65504 / 65536
    factor = 65536.0
    gradients = torch.autograd.grad(factor * alignment_loss(query, key, match, make_head()), (query, key))
    plain = torch.autograd.grad(alignment_loss(query, key, match, make_head()), (query, key))
    for gradient, without, exact in zip(gradients, plain, expected, strict=True):
        assert gradient.dtype == torch.float16
        assert gradient.isfinite().all()
        # Half a unit in the last place; without the factor, float16 has no digits left.
        torch.testing.assert_close(gradient.double() / factor, exact, rtol=2**-11 * 1.1, atol=size.item() * 1e-6)
        assert (without == 0).sum() > (gradient == 0).sum()


def test_rounding_after_the_factor_of_the_loss_has_no_bias() -> None:
    match = checks.random_matches(((32, 32),) * 2)
    query, key = queries_and_keys(torch.bfloat16, tokens=1024, views=2)
    truth = [tensor.detach().double().requires_grad_() for tensor in (query, key)]
    factor = 0.3  # bfloat16 does not contain this number: rounded first, it would make all gradients 0.1 % too large
    expected = torch.autograd.grad(factor * alignment_loss(*truth, match, make_head().double()), truth)
    found = torch.autograd.grad(factor * alignment_loss(query, key, match, make_head()), (query, key))
    for gradient, exact in zip(found, expected, strict=True):
        ratio = (gradient.double() * exact).sum() / exact.square().sum()
        bias = ((gradient.double() - exact) * exact.sign()).sum() / exact.abs().sum()
        # The mean of some 6000 roundings of up to 2^-8 each, twice: deviations of 2^-8 / sqrt(12 * 3000).
        assert abs(ratio - 1) < 1e-4
        assert abs(bias) < 1e-4


def test_the_loss_inside_of_a_checkpoint() -> None:
    head = make_head()

    def loss_of(query: Tensor, key: Tensor) -> Tensor:
        return alignment_loss(query.tanh(), key.tanh(), MATCH, head)

    query, key = queries_and_keys()
    sources = [query, key, *head.parameters()]
    expected = torch.autograd.grad(loss_of(query, key), sources)
    found = torch.autograd.grad(checkpoint(loss_of, query, key, use_reentrant=False), sources)
    assert all(map(torch.equal, found, expected))


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check_compiled(
    backend: str, kind: str, depth: int, match: Correspondence = MATCH, whole: bool = True, **options: Any
) -> None:
    """A function that makes queries and keys and computes their loss: compiled (as one graph if `whole`) and not.

    Code that "inductor" generates may sum in another order, as the vectors of the processor suggest.
    """
    head = make_head(kind, depth)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 3, TOKENS, 8, generator=generator)
    to_q, to_k = (torch.randn(8, HEADS * WIDTH, generator=generator).requires_grad_() for _ in range(2))

    def step(x: Tensor) -> Tensor:
        query, key = ((x @ weight).unflatten(-1, (HEADS, WIDTH)).permute(0, 3, 1, 2, 4) for weight in (to_q, to_k))
        return 0.3 * alignment_loss(query, key, match, head, **options)

    compiled = torch.compile(step, backend=backend, fullgraph=whole)
    for scale in (1.0, 1.5):
        results = []
        for run in (step, compiled):
            loss = run(scale * x)
            results.append([loss, *torch.autograd.grad(loss, [to_q, to_k, *head.parameters()])])
        exact = {} if backend == "inductor" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(*results, **exact)


@pytest.mark.parametrize(
    ("kind", "depth", "options"),
    [("mlp", 1, {}), ("mlp", 2, {"normalize": "all_views", "softness": 0.5}), ("mean", 1, {"reduction": "sum"})],
)
def test_compiled_it_is_the_same(kind: str, depth: int, options: dict[str, Any], compiler: None) -> None:
    check_compiled("aot_eager", kind, depth, **options)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the backend inductor needs a C++ compiler")
def test_compiled_to_machine_code_it_is_the_same(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor caches the code that it generates, and does not check whether torch still uses the same vector width.
    folder = (
        Path(tempfile.gettempdir()) / f"cameo-inductor-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}"
    )
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    with torch._inductor.config.patch(compile_threads=1):  # one small graph needs no pool of processes
        check_compiled("inductor", "mlp", 1)


def test_weights_of_matches_break_a_graph(compiler: None) -> None:
    weight = torch.rand(MATCH.index.shape, generator=torch.Generator().manual_seed(3))
    weighted = Correspondence(MATCH.index, MATCH.token_grids, match_weight=weight)
    with pytest.raises(
        torch._dynamo.exc.TorchDynamoException, match=r"correspondence\.match_weight"
    ):  # its values are checked
        check_compiled("aot_eager", "mlp", 1, weighted)
    check_compiled("aot_eager", "mlp", 1, weighted, whole=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_kind
def test_autocast_around_it_changes_nothing(kind: str, depth: int, dtype: torch.dtype) -> None:
    head = make_head(kind, depth)
    results = []
    for enabled in (False, True):
        query, key = queries_and_keys(dtype)
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = alignment_loss(query, key, MATCH, head)
        results.append([loss, *torch.autograd.grad(loss, [query, key, *head.parameters()])])
    assert results[0][0].dtype == torch.float32
    assert all(map(torch.equal, *results))


def test_the_loss_of_a_model_under_autocast_is_that_of_its_queries_and_keys() -> None:
    model = cameo.wrap(unet().train(), "cat3d")
    (layer,), match = model.supervised_layers, UNET_MATCHES
    args, kwargs = inputs(model.base_model)
    with torch.autocast("cpu", torch.bfloat16):
        model(*args, **kwargs, correspondence=match)
        with model.capture() as captured:
            model.base_model(*args, **kwargs)
    seen = captured[layer.path]
    assert seen.query.dtype == torch.bfloat16
    query, key, local = model.split(layer, seen, match)
    expected = alignment_loss(query, key, local, model.alignment_heads[0], scale=seen.scale)
    assert torch.equal(model.alignment_loss, expected)


def loss_and_gradients(model: cameo.CameoModel, given: checks.Inputs, match: Any) -> list[Tensor]:
    checks.run(model, given, correspondence=match)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model.alignment_loss, parameters, allow_unused=True)
    return [model.alignment_loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


def in_double(given: Any) -> Any:
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, given
    )


def check_against_reference(model: cameo.CameoModel, given: checks.Inputs, match: Any) -> None:
    results = []
    for implementation in ("reference", "chunked"):
        model.implementation = implementation
        results.append(loss_and_gradients(model, given, match))
    assert len(results[0]) == len(results[1]) > 4
    for expected, found in zip(*results, strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=max(1e-12 * size, 1e-16))


@pytest.mark.parametrize("row", TINY, ids=str)
def test_every_backbone_has_the_loss_of_the_reference(row: Row) -> None:
    subject = row.subject()
    denoiser = subject.build().double().train()
    model = subject.wrapped(denoiser).double()
    check_against_reference(model, in_double(subject.inputs(denoiser)), checks.matches_for(model, row.grids))


def test_several_layers_with_grids_of_their_own_have_the_loss_of_the_reference() -> None:
    build = get_backbone("cat3d").build
    options = {"block_out_channels": (16, 16), "attention_levels": (True, True), "heads": 2, "norm_num_groups": 8}
    wide = build("tiny", **options).unet.double().train()
    model = cameo.wrap(wide, "cat3d", [0, 2], head={"kind": "mlp", "depth": 2}).double()
    matches = [checks.random_matches((grid,) * 2, seed) for seed, grid in enumerate([(8, 8), (4, 4)])]
    check_against_reference(model, in_double(inputs(wide)), matches)


@pytest.mark.parametrize("normalize", ["per_view", "all_views"])
@pytest.mark.parametrize(
    ("layer", "layout", "call"),
    [
        ("rows", TokenLayout("(b v h) w", key="(b u h) (v w)"), 1),
        ("whole_rows", TokenLayout("(b h) (v w)"), None),
    ],
)
def test_rows_have_the_loss_of_the_reference(layer: str, layout: TokenLayout, call: int | None, normalize: str) -> None:
    torch.manual_seed(0)
    options = {"layer": layer, "layout": layout, "kernel_call": call, "normalize": normalize, "softness": 0.7}
    model = cameo.wrap(RowModel().double(), **options).double()
    check_against_reference(model, ((frames().double(),), {"num_views": VIEWS}), next_view())


def test_cells_have_the_loss_of_the_reference() -> None:
    torch.manual_seed(0)
    model = cameo.wrap(JointModel().double(), layer="temporal", layout=TokenLayout("(b h w) v")).double()
    match = next_view(shift=0)
    check_against_reference(model, ((frames().double(),), {"num_frames": VIEWS}), match)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_while_a_loss_is_alive_takes_nothing_from_it(duplicate: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = cameo.wrap(RowModel(), layer="whole_rows", layout="(b h) (v w)", implementation="chunked")
    given, match = ((frames(),), {"num_views": VIEWS}), next_view()
    expected = loss_and_gradients(model, given, match)
    checks.run(model, given, correspondence=match)
    twin = duplicate(model)
    assert twin.implementation == "chunked"
    with pytest.raises(RuntimeError, match="no alignment loss"):
        _ = twin.alignment_loss
    assert all(map(torch.equal, loss_and_gradients(twin, given, match), expected))
    gradients = torch.autograd.grad(model.alignment_loss, list(model.parameters()), allow_unused=True)
    assert all(map(torch.equal, [one for one in gradients if one is not None], expected[1:]))
