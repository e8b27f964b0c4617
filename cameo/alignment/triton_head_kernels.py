# Compile-time constants of Triton are written in capitals. Triton needs both branches of a choice, joins tuples with +
# only, and infers types.
# ruff: noqa: N803, RET505, RUF005
# mypy: disable-error-code="no-untyped-def, assignment"
"""Triton kernels of the alignment head, see `cameo.alignment.triton_heads`, which launches them.

Axes: K heads (HEADS; WIDTH with padding and the row of ones), m hidden units in CHUNKS of 8, P pairs of a row and a
column in tiles of TILE. Tiles are indexed so that loads and stores use the registers that the tensor cores need,
without an exchange between threads. SPLIT: float32 logits, multiplied as two TF32 parts. INTERPRETED: run by Triton's
interpreter, which has no assembly and multiplies in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "add_partial_kernel",
    "gradient_kernel",
    "normal_cdf",
    "pack_weights_kernel",
    "scores_kernel",
    "softmax_kernel",
]


@triton.jit
def _exp2(x, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def normal_cdf(x, square, FAST: tl.constexpr, INTERPRETED: tl.constexpr):
    """Cumulative normal distribution of x, given x * x, as 1 / (1 + 2 ** (x * P(x * x))).

    The log-odds of the normal distribution are odd and smooth, so P is a short polynomial, fitted for the least
    error of x * normal_cdf(x) on 0 to 5.5 and constant beyond. With degree 7 the error is that of float32 itself; in
    contrast to 0.5 * (1 + erf(x / sqrt(2))) nothing cancels for negative x. FAST uses degree 5.
    """
    t = tl.minimum(square, 30.25)
    if FAST:
        p = 1.647833300921775e-07 * t - 8.115138371067587e-06
        p = p * t + 0.00013676239177584648
        p = p * t + 0.0001654918451095
        p = p * t - 0.10492696613073349
        p = p * t - 2.3021745681762695
    else:
        p = 4.0093144082486987e-11 * t - 7.60402940613858e-09
        p = p * t + 4.392855430523923e-07
        p = p * t - 1.2047607924614567e-05
        p = p * t + 0.00016273763321805745
        p = p * t + 8.619818254373968e-05
        p = p * t - 0.10482688248157501
        p = p * t - 2.3022117614746094
    return _reciprocal(1.0 + _exp2(x * p, INTERPRETED), INTERPRETED)


@triton.jit
def _truncate(x):
    # Tensor cores read the upper 19 bits of a float32 number as TF32 and ignore the others.
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _round(x):
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _low_part(x, high, INTERPRETED: tl.constexpr):
    low = x - high
    if INTERPRETED:
        low = _truncate(low)
    return low


@triton.jit
def pack_weights_kernel(
    weight_in, bias, weight_out, packed, scale, units, CHUNKS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr
):
    """Write the operands of chunk c in the order in which threads hold them, see `_in_operand`, `_out_operand`.

    packed: [4, CHUNKS, 8 * WIDTH]: upper and lower part of [weight_in | bias], then of weight_out * weight_in.
    """
    chunk = tl.program_id(0)
    element = tl.arange(0, WIDTH * 8)
    if WIDTH == 8:
        head = (element & 1) * 4 + ((element >> 1) & 3)
        unit = element >> 3
        out_head = element >> 3
        out_unit = (element & 1) + ((element >> 1) & 3) * 2
    else:
        head = (element >> 7) * 16 + (element & 3) * 4 + ((element >> 2) & 3)
        unit = (element >> 4) & 7
        out_head = (element >> 7) * 16 + ((element >> 1) & 1) * 8 + ((element >> 4) & 7)
        out_unit = (element & 1) + ((element >> 2) & 3) * 2
    unit += chunk * 8
    out_unit += chunk * 8
    weight = tl.load(weight_in + unit * HEADS + head, mask=(unit < units) & (head < HEADS), other=0.0) * scale
    weight = tl.where(head == HEADS, tl.load(bias + unit, mask=unit < units, other=0.0), weight)
    high = _round(weight)
    part = CHUNKS * WIDTH * 8
    target = packed + chunk * WIDTH * 8 + element
    tl.store(target, high)
    tl.store(target + part, _round(weight - high))
    inside = (out_unit < units) & (out_head < HEADS)
    weight = tl.load(weight_in + out_unit * HEADS + out_head, mask=inside, other=0.0) * scale
    weight *= tl.load(weight_out + out_unit, mask=out_unit < units, other=0.0)
    high = _round(weight)
    tl.store(target + 2 * part, high)
    tl.store(target + 3 * part, _round(weight - high))


@triton.jit
def _in_operand(packed, WIDTH: tl.constexpr):
    """[WIDTH, 8]: heads, units."""
    flat = tl.load(packed + tl.arange(0, WIDTH * 8))
    if WIDTH == 8:
        return tl.reshape(tl.trans(tl.reshape(flat, [8, 4, 2]), 2, 1, 0), [8, 8])
    else:
        return tl.reshape(tl.trans(tl.reshape(flat, [WIDTH // 16, 8, 4, 4]), 0, 3, 2, 1), [WIDTH, 8])


@triton.jit
def _out_operand(packed, WIDTH: tl.constexpr):
    """[8, WIDTH]: units in the order 0, 2, 4, 6, 1, 3, 5, 7, heads."""
    flat = tl.load(packed + tl.arange(0, WIDTH * 8))
    if WIDTH == 8:
        return tl.reshape(tl.trans(tl.reshape(flat, [8, 4, 2]), 2, 1, 0), [8, 8])
    else:
        return tl.reshape(tl.trans(tl.reshape(flat, [WIDTH // 16, 8, 4, 2, 2]), 4, 2, 0, 3, 1), [8, WIDTH])


@triton.jit
def _even_units_first(x, TILE: tl.constexpr):
    return tl.reshape(tl.trans(tl.reshape(x, [TILE, 4, 2]), 0, 2, 1), [TILE, 8])


@triton.jit
def _load_logits(logits, first, pairs, keep, HEADS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """[TILE, WIDTH] in float32, of pairs `first` on, 1 at head HEADS; row r holds pair (r % 8) * TILE / 8 + r // 8."""
    high = tl.arange(0, WIDTH // 4)[:, None, None, None]
    low = tl.arange(0, 4)[None, None, :, None]
    head = high * 4 + low
    pair = tl.arange(0, 8)[None, :, None, None] * (TILE // 8) + tl.arange(0, TILE // 8)[None, None, None, :]
    inside = (head < HEADS) & (first + pair < pairs) & keep
    x = tl.load(logits + first + head.to(tl.int64) * pairs + pair, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(head == HEADS, 1.0, x)
    return tl.reshape(tl.trans(x, 3, 1, 0, 2), [TILE, WIDTH])


@triton.jit
def _hidden(x_high, x_low, packed, PART: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr):
    """[TILE, 8]: eight hidden units before the GELU; the smaller products are summed first."""
    high = _in_operand(packed, WIDTH)
    hidden = tl.dot(x_high, _in_operand(packed + PART, WIDTH), input_precision="tf32")
    if SPLIT:
        hidden = tl.dot(x_low, high, hidden, input_precision="tf32")
    return tl.dot(x_high, high, hidden, input_precision="tf32")


@triton.jit
def scores_kernel(
    logits,
    packed,
    weight_out,
    scores,
    pairs,
    units,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    FAST: tl.constexpr,
    SPLIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """scores [pairs] = weight_out . gelu(weight_in @ (scale * logits) + bias)."""
    unit = tl.arange(0, 8)
    for tile in range(tl.program_id(0), tl.cdiv(pairs, TILE), tl.num_programs(0)):
        first = tl.cast(tile, tl.int64) * TILE
        x = _load_logits(logits, first, pairs, True, HEADS, WIDTH, TILE)
        x_high = _round(x) if SPLIT else x
        x_low = _low_part(x, x_high, INTERPRETED)
        total = tl.zeros([TILE, 8], tl.float32)
        for chunk in tl.range(0, CHUNKS, loop_unroll_factor=min(CHUNKS, UNROLL)):
            source = packed + chunk * WIDTH * 8
            hidden = _hidden(x_high, x_low, source, CHUNKS * WIDTH * 8, WIDTH, SPLIT)
            index = chunk * 8 + unit
            out = tl.load(weight_out + index, mask=index < units, other=0.0)
            total += hidden * normal_cdf(hidden, hidden * hidden, FAST, INTERPRETED) * out[None, :]
        score = tl.trans(tl.reshape(tl.sum(total, 1), [TILE // 8, 8]))
        pair = tl.arange(0, 8)[:, None] * (TILE // 8) + tl.arange(0, TILE // 8)[None, :]
        tl.store(scores + first + pair, score, mask=first + pair < pairs)


@triton.jit
def _hidden_gradient(hidden, score_gradient, FAST: tl.constexpr, INTERPRETED: tl.constexpr):
    """Gradient of eight hidden units without the factor weight_out [TILE, 8], and that of weight_out per pair."""
    square = hidden * hidden
    cdf = normal_cdf(hidden, square, FAST, INTERPRETED) * score_gradient
    # 2 ** -1.3257480647361593 = 1 / sqrt(2 pi); the factor of the square is -0.5 / log(2).
    density = _exp2(square * -0.7213475204444817 - 1.3257480647361593, INTERPRETED)
    return cdf + hidden * score_gradient * density, hidden * cdf


@triton.jit
def _add_logit_gradient(
    total, gradient, packed, PART: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    if SPLIT:
        high = _round(gradient)
        low = _even_units_first(_low_part(gradient, high, INTERPRETED), TILE)
        high = _even_units_first(high, TILE)
        weight = _out_operand(packed, WIDTH)
        total = tl.dot(low, weight, total, input_precision="tf32")
        total = tl.dot(high, _out_operand(packed + PART, WIDTH), total, input_precision="tf32")
        return tl.dot(high, weight, total, input_precision="tf32")
    gradient = _even_units_first(_round(gradient), TILE)
    return tl.dot(gradient, _out_operand(packed, WIDTH), total, input_precision="tf32")


@triton.jit
def _lanes_to_registers(x, TILE: tl.constexpr, LAST: tl.constexpr):
    """Another order of pairs, for which the exchange between threads goes through shared memory, not shuffles."""
    return tl.reshape(tl.trans(tl.reshape(x, [TILE // 8, 8, LAST]), 1, 0, 2), [TILE, LAST])


@triton.jit
def _add_weight_gradient(
    total, gradient, x_high, x_low, TILE: tl.constexpr, SPLIT: tl.constexpr, INTERPRETED: tl.constexpr
):
    """total [WIDTH, 8] + x [WIDTH, TILE] @ gradient [TILE, 8]."""
    if SPLIT:
        high = _round(gradient)
        low = _lanes_to_registers(_low_part(gradient, high, INTERPRETED), TILE, 8)
        high = _lanes_to_registers(high, TILE, 8)
        total = tl.dot(x_high, low, total, input_precision="tf32")
        total = tl.dot(x_low, high, total, input_precision="tf32")
        return tl.dot(x_high, high, total, input_precision="tf32")
    return tl.dot(x_high, _lanes_to_registers(_round(gradient), TILE, 8), total, input_precision="tf32")


@triton.jit
def gradient_kernel(
    logits,
    packed,
    score_gradients,
    partial,
    pairs,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    FOR_LOGITS: tl.constexpr,
    FOR_WEIGHTS: tl.constexpr,
    FAST: tl.constexpr,
    SPLIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Overwrite logits with their gradient (FOR_LOGITS), add that of the weights (FOR_WEIGHTS) for one group.

    partial: [programs, CHUNKS, WIDTH + 1, 8], what each program adds to: at WIDTH the gradient of weight_out; the other
    gradients still lack the factor weight_out.
    """
    unit = tl.arange(0, 8)
    program = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    in_sums = ()
    out_sums = ()
    if FOR_WEIGHTS:
        for _ in tl.static_range(GROUP):
            in_sums = in_sums + (tl.zeros([WIDTH, 8], tl.float32),)
            out_sums = out_sums + (tl.zeros([8], tl.float32),)
    for tile in range(tl.program_id(0), tl.cdiv(pairs, TILE), tl.num_programs(0)):
        first = tl.cast(tile, tl.int64) * TILE
        pair = tl.arange(0, 8)[:, None] * (TILE // 8) + tl.arange(0, TILE // 8)[None, :]
        score_gradient = tl.load(score_gradients + first + pair, mask=first + pair < pairs, other=0.0)
        # Logits without a gradient are not read, so that a NaN among them cannot reach a gradient.
        keep = (score_gradient != 0)[None, :, None, :]
        score_gradient = tl.reshape(tl.trans(score_gradient), [TILE])[:, None]
        x = _load_logits(logits, first, pairs, keep, HEADS, WIDTH, TILE)
        x_high = _round(x) if SPLIT else x
        x_low = _low_part(x, x_high, INTERPRETED)
        logit_gradient = tl.zeros([TILE, WIDTH], tl.float32)
        if FOR_WEIGHTS:
            x_high_by_head = tl.trans(_lanes_to_registers(x_high, TILE, WIDTH))
            x_low_by_head = tl.trans(_lanes_to_registers(x_low, TILE, WIDTH))
            new_in_sums = ()
            new_out_sums = ()
            for index in tl.static_range(GROUP):
                source = packed + (group * GROUP + index) * WIDTH * 8
                hidden = _hidden(x_high, x_low, source, CHUNKS * WIDTH * 8, WIDTH, SPLIT)
                gradient, out = _hidden_gradient(hidden, score_gradient, FAST, INTERPRETED)
                if FOR_LOGITS:
                    out_source = source + 2 * CHUNKS * WIDTH * 8
                    logit_gradient = _add_logit_gradient(
                        logit_gradient, gradient, out_source, CHUNKS * WIDTH * 8, WIDTH, TILE, SPLIT, INTERPRETED
                    )
                in_sum = _add_weight_gradient(
                    in_sums[index], gradient, x_high_by_head, x_low_by_head, TILE, SPLIT, INTERPRETED
                )
                new_in_sums = new_in_sums + (in_sum,)
                new_out_sums = new_out_sums + (out_sums[index] + tl.sum(out, 0),)
            in_sums = new_in_sums
            out_sums = new_out_sums
        else:
            for index in range(CHUNKS):
                source = packed + index * WIDTH * 8
                hidden = _hidden(x_high, x_low, source, CHUNKS * WIDTH * 8, WIDTH, SPLIT)
                gradient, out = _hidden_gradient(hidden, score_gradient, FAST, INTERPRETED)
                out_source = source + 2 * CHUNKS * WIDTH * 8
                logit_gradient = _add_logit_gradient(
                    logit_gradient, gradient, out_source, CHUNKS * WIDTH * 8, WIDTH, TILE, SPLIT, INTERPRETED
                )
        if FOR_LOGITS:
            by_head = tl.reshape(logit_gradient, [TILE // 8, 8, WIDTH // 8, 4, 2])
            by_head = tl.trans(by_head, 2, 4, 1, 3, 0).to(logits.dtype.element_ty)
            head = (
                tl.arange(0, WIDTH // 8)[:, None, None, None, None] * 8
                + tl.arange(0, 2)[None, :, None, None, None]
                + tl.arange(0, 4)[None, None, None, :, None] * 2
            )
            place = pair[None, None, :, None, :]
            inside = (head < HEADS) & (first + place < pairs)
            tl.store(logits + first + head.to(tl.int64) * pairs + place, by_head, mask=inside)
    if FOR_WEIGHTS:
        for index in tl.static_range(GROUP):
            target = partial + (program * CHUNKS + group * GROUP + index) * (WIDTH + 1) * 8 + unit[None, :]
            in_target = target + tl.arange(0, WIDTH)[:, None] * 8
            tl.store(in_target, tl.load(in_target) + in_sums[index])
            tl.store(target + WIDTH * 8, tl.load(target + WIDTH * 8) + out_sums[index][None, :])


@triton.jit
def add_partial_kernel(
    partial,
    weight_out,
    into_weight_in,
    into_bias,
    into_weight_out,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Add the partial sums of PROGRAMS programs, a power of two, to the gradients of one hidden unit."""
    unit = tl.program_id(0)
    head = tl.arange(0, WIDTH)
    place = partial + (unit // 8) * (WIDTH + 1) * 8 + unit % 8
    place += tl.arange(0, PROGRAMS)[:, None] * CHUNKS * (WIDTH + 1) * 8
    in_sum = tl.sum(tl.load(place + head[None, :] * 8), 0) * tl.load(weight_out + unit)
    out_sum = tl.sum(tl.load(place + WIDTH * 8), 0)
    target = into_weight_in + unit * HEADS + head
    tl.store(target, tl.load(target, mask=head < HEADS) + in_sum * scale, mask=head < HEADS)
    target = into_bias + unit + head * 0
    tl.store(target, tl.load(target, mask=head == HEADS) + in_sum, mask=head == HEADS)
    target = into_weight_out + unit + tl.arange(0, 1)
    tl.store(target, tl.load(target) + out_sum)


@triton.jit
def softmax_kernel(
    logits,
    targets,
    weights,
    excluded,
    losses,
    rows,
    columns,
    targets_per_row,
    scale,
    COPIES: tl.constexpr,
    EXCLUDES: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Losses of ROWS rows, and their logits overwritten with the gradient."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    column = tl.arange(0, COLUMNS)[None, :]
    excluded_first = tl.zeros([ROWS, 1], tl.int64)
    excluded_end = excluded_first
    if EXCLUDES:
        excluded_first = tl.load(excluded + row * 2, mask=valid, other=0)[:, None]
        excluded_end = tl.load(excluded + row * 2 + 1, mask=valid, other=0)[:, None]
    loss = tl.zeros([ROWS], tl.float32)
    for copy in range(COPIES):
        start_of_row = logits + (tl.cast(copy, tl.int64) * rows + row) * columns
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, columns, COLUMNS):
            place = start + column
            seen = valid[:, None] & (place < columns) & ((place < excluded_first) | (place >= excluded_end))
            s = tl.load(start_of_row[:, None] + place, mask=seen, other=float("-inf")).to(tl.float32)
            s = tl.where(seen, s * scale, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(s, 1))
            # Subtracting an infinite peak where no column is seen yet would give NaN.
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            total = total * tl.exp(peak - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
            peak = new_peak
        log_total = tl.log(total)
        mass = tl.zeros([ROWS], tl.float32)
        for t in range(targets_per_row):
            weight = tl.load(weights + row * targets_per_row + t, mask=valid, other=0.0)
            has_target = valid & (weight != 0)
            target = tl.load(targets + row * targets_per_row + t, mask=has_target, other=0)
            s = tl.load(start_of_row + target, mask=has_target, other=0.0).to(tl.float32) * scale
            loss += tl.where(has_target, weight * (peak - s + log_total), 0.0)
            mass += weight
        if GRADIENT:
            # Threads share a row: all have read its targets before one overwrites it.
            tl.debug_barrier()
            normalizer = tl.where(mass == 0, 0.0, mass / total)[:, None]
            for start in range(0, columns, COLUMNS):
                place = start + column
                inside = valid[:, None] & (place < columns)
                seen = inside & ((place < excluded_first) | (place >= excluded_end)) & (mass != 0)[:, None]
                s = tl.load(start_of_row[:, None] + place, mask=seen, other=0.0).to(tl.float32) * scale
                gradient = tl.exp(s - peak[:, None]) * normalizer
                for t in range(targets_per_row):
                    weight = tl.load(weights + row * targets_per_row + t, mask=valid, other=0.0)
                    target = tl.load(targets + row * targets_per_row + t, mask=valid, other=0)
                    gradient -= tl.where(place == target[:, None], weight[:, None], 0.0)
                gradient = tl.where(seen, gradient * (scale / COPIES), 0.0)
                tl.store(start_of_row[:, None] + place, gradient.to(logits.dtype.element_ty), mask=inside)
    tl.store(losses + row, loss / COPIES, mask=valid)
