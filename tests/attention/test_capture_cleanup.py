"""A capture leaves nothing behind: no hook, no watcher, no tensor, not after an error and not in another thread."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from cameo.attention.capture import AttentionCapture
from cameo.errors import CaptureError
from tests.helpers.attention_kernels import DIMENSION, sdpa, xformers_rows
from tests.helpers.captured_models import Attention, Model, capture, expected_query_and_key, hooks, layer, make_model


def test_the_calls_are_free_with_the_capture(x: Tensor) -> None:
    """Without a garbage collection, which may come much later."""
    with AttentionCapture(model := make_model(sdpa), [layer()]) as captured:
        model(x)
    query = weakref.ref(captured[layer().path].query)
    assert query() is not None
    gc.disable()
    try:
        del captured
        assert query() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [RuntimeError("inside"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_an_exception_inside_the_layer_leaves_nothing(error: BaseException, x: Tensor, xformers_ops: Any) -> None:
    original = xformers_ops.memory_efficient_attention

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sdpa(q, k, v), sdpa(q, k.flip(0), v)
        raise error

    model = make_model(kernel)
    model.first = Attention(sdpa)
    captured = AttentionCapture(model, [layer("first"), layer()])
    with pytest.raises(type(error)) as raised, captured:
        model(x)
    assert raised.value is error
    assert hooks(model) == 0
    assert torch.overrides._get_current_function_mode_stack() == []
    assert xformers_ops.memory_efficient_attention is original
    with pytest.raises(CaptureError, match="did not run"):
        captured["first"]  # an incomplete forward gives no result
    model.second.kernel = sdpa
    with captured:
        model(x)
        assert torch.equal(captured["second"].query, expected_query_and_key(model, x)[0])


def test_an_exception_that_the_model_catches_ends_the_observation(x: Tensor) -> None:
    class Retrying(Model):
        def forward(self, x: Tensor) -> Tensor:
            with pytest.raises(RuntimeError, match="shape"):
                self.second(x[..., 1:])
            assert torch.overrides._get_current_function_mode_stack() == []
            return super().forward(x)

    model = Retrying()
    _, seen = capture(model, x)
    assert torch.equal(seen.query, expected_query_and_key(model, x)[0])


def test_an_unknown_path_leaves_no_hook_on_the_others() -> None:
    model = make_model()
    with pytest.raises(AttributeError), AttentionCapture(model, [layer("first"), layer("third")]):
        pass
    assert hooks(model) == 0


def test_another_thread_is_neither_observed_nor_disturbed(x: Tensor, xformers_ops: Any) -> None:
    original = xformers_ops.memory_efficient_attention
    model, other = make_model(xformers_rows), make_model(xformers_rows)
    results: dict[str, Any] = {}

    def elsewhere() -> None:
        results["same model"] = model(2 * x)  # its modules have the hooks of the capture
        results["other model"] = other(2 * x)
        results["fetched"] = xformers_ops.memory_efficient_attention

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if threading.current_thread() is threading.main_thread() and not results:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        return xformers_rows(q, k, v)

    model.second.kernel = kernel
    _, seen = capture(model, x)
    assert torch.equal(seen.query, expected_query_and_key(model, x)[0])
    assert torch.equal(results["same model"], model(2 * x))
    assert torch.equal(results["other model"], other(2 * x))
    assert xformers_ops.memory_efficient_attention is original
    late = results["fetched"](*(x[..., :DIMENSION] for _ in range(3)))  # the late call of another thread
    assert torch.equal(late, original(*(x[..., :DIMENSION] for _ in range(3))))


def test_of_two_threads_the_last_one_puts_the_kernel_back(x: Tensor, xformers_ops: Any) -> None:
    sdpa_inside = xformers_ops.memory_efficient_attention

    def original(*args: Any, **kwargs: Any) -> Tensor:
        with torch._C.DisableTorchFunction():  # like the real operator, whose kernel is not PyTorch's
            return sdpa_inside(*args, **kwargs)

    xformers_ops.memory_efficient_attention = original
    inside, finished = threading.Event(), threading.Event()
    seen: list[Tensor] = []

    def slow_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inside.set()
        assert finished.wait(timeout=20)
        return xformers_rows(q, k, v)

    slow = make_model(xformers_rows)
    slow.second.kernel = slow_kernel
    thread = threading.Thread(target=lambda: seen.append(capture(slow, 2 * x)[1].query))
    thread.start()
    assert inside.wait(timeout=20)
    model = make_model(xformers_rows)
    _, mine = capture(model, x)
    finished.set()
    thread.join()
    assert torch.equal(mine.query, expected_query_and_key(model, x)[0])
    slow.second.kernel = xformers_rows
    assert torch.equal(seen[0], expected_query_and_key(slow, 2 * x)[0])
    assert xformers_ops.memory_efficient_attention is original
