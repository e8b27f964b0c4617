"""What the pretended device does with data types: a cast list for autocast, and operators that refuse to mix types.

torch has such lists for the devices that it knows, and none for a device that is made in Python. This one is that of
CUDA (`aten/src/ATen/autocast_mode.h`) as far as models use it, without the cache of cast weights: a weight that is used
twice is cast twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["CAST", "NOT_CAST", "mixed_types", "register_autocast"]

KEY = "AutocastPrivateUse1"
aten = torch.ops.aten
# Computed in the precision of autocast.
LOWER_PRECISION = """
    _convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm
    baddbmm bmm chain_matmul linalg_multi_dot scaled_dot_product_attention _scaled_dot_product_flash_attention
"""
# Computed in float32.
FLOAT32 = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
    pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm group_norm frobenius_norm.dim nuclear_norm
    nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d
    hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss
    multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits
    dist pdist cdist renorm logsumexp norm.Scalar norm.ScalarOpt_dim rms_norm upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d
    upsample_bicubic2d _upsample_bicubic2d_aa
"""
# Their result is in float32 where no other type is asked for.
FLOAT32_RESULT = """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
    linalg_matrix_norm.str_ord sum sum.dim_IntList
"""
# Computed in the widest type of their arguments.
WIDEST = """
    addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put tensordot scatter_add vdot
"""
CAST = {*LOWER_PRECISION.split(), *FLOAT32.split(), *FLOAT32_RESULT.split(), *WIDEST.split(), "binary_cross_entropy"}
# CUDA casts these too: recurrent cells, what only cuDNN has, a root of matrices; and what finds the widest type itself.
NOT_CAST = {
    "cat",
    "stack",
    "_cudnn_rnn",
    "_thnn_fused_gru_cell",
    "_thnn_fused_lstm_cell",
    "gru_cell",
    "lstm_cell",
    "rnn_relu_cell",
    "rnn_tanh_cell",
    "cudnn_convolution",
    "cudnn_convolution_transpose",
    "linalg_matrix_sqrth",
}
# Kernels that a CPU has for mixed types, and CUDA has not.
ONE_TYPE = {
    aten.native_layer_norm.default,
    aten.native_layer_norm_backward.default,
    aten.native_group_norm.default,
    aten.native_group_norm_backward.default,
    aten._fused_rms_norm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}


def mixed_types(func: Any, args: Any, kwargs: Any) -> set[torch.dtype]:
    """Return the floating types that an operator of CUDA would refuse to mix; empty where it computes.

    Example:
        >>> x, weight = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(3)
        >>> sorted(map(str, mixed_types(aten.native_layer_norm.default, (x, [3], weight, weight, 1e-5), {})))
        ['torch.bfloat16', 'torch.float32']
    """
    if func not in ONE_TYPE:
        return set()
    given = args[:-1] if "backward" in func._schema.name else args
    found = {leaf.dtype for leaf in tree_leaves((given, kwargs)) if _is_floating(leaf)}
    return found if len(found) > 1 else set()


def register_autocast(device: str) -> torch.library.Library:
    """Let `torch.autocast(device)` cast as on CUDA; it holds as long as the library that is returned.

    Args:
        device: the name that was given to the device that is made in Python.
    """

    def lower(op: Any, args: Any, kwargs: Any) -> Any:
        return op(*_cast(args, torch.get_autocast_dtype(device)), **_cast(kwargs, torch.get_autocast_dtype(device)))

    def to_float32(op: Any, args: Any, kwargs: Any) -> Any:
        return op(*_cast(args, torch.float32), **_cast(kwargs, torch.float32))

    def float32_result(op: Any, args: Any, kwargs: Any) -> Any:
        names = [argument.name for argument in op._schema.arguments]
        asked = kwargs.get("dtype") or dict(zip(names, args, strict=False)).get("dtype")
        if asked is None and _is_half(args[0]):
            kwargs = {**kwargs, "dtype": torch.float32}
            args = args[: names.index("dtype")] if not op._schema.arguments[names.index("dtype")].kwarg_only else args
        return op(*args, **kwargs)

    def widest(op: Any, args: Any, kwargs: Any) -> Any:
        types = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if _is_floating(leaf)}
        if torch.float32 in types and len(types) > 1:
            args, kwargs = _cast(args, torch.float32), _cast(kwargs, torch.float32)
        return op(*args, **kwargs)

    everything = torch.library.Library("_", "IMPL", KEY)
    everything.fallback(torch.library.fallthrough_kernel)
    library = torch.library.Library("aten", "IMPL", KEY)
    library.everything = everything  # type: ignore[attr-defined]
    for names, way in (
        (LOWER_PRECISION, lower),
        (FLOAT32, to_float32),
        (FLOAT32_RESULT, float32_result),
        (WIDEST, widest),
    ):
        for name in names.split():
            packet, _, overload = name.partition(".")
            library.impl(name, _without_autocast(way, getattr(getattr(aten, packet), overload or "default")))
    library.impl("binary_cross_entropy", _refuse)
    return library


def _without_autocast(way: Callable[[Any, Any, Any], Any], op: Any) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return way(op, args, kwargs)

    return run


def _refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "binary_cross_entropy: not safe under autocast; expected binary_cross_entropy_with_logits, as on CUDA"
    )


def _cast(values: Any, dtype: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        eligible = _is_floating(value) and value.dtype != torch.float64 and value.device.type != "cpu"
        return value.to(dtype) if eligible else value

    return tree_map(cast, values)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_half(value: Any) -> bool:
    return _is_floating(value) and value.dtype in (torch.bfloat16, torch.float16)
