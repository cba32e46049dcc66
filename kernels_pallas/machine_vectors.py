"""Loops of machine_products and machine_attention that are written in LLVM's own words: vectors of 16 numbers, which it
divides where registers are shorter, and tiles. Addresses are whole numbers."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernels_pallas.machine_words import BYTE, TYPES, WORD, declared, instruction, word_at

_AHEAD_BYTES = 24576  # the processor's own prefetching ends at each page of memory; measured in docs/design.md
_REALS, _INTEGERS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)
_KINDS = (types.float32, types.uint16, types.int8, types.uint8)  # what Numba calls TYPES
_SIZES = tuple(np.dtype(each).itemsize for each in TYPES.values())


def _emit_prefetch(builder: Any, address: Any, locality: int = 3) -> None:
    """locality: 3 to the first cache, 2 to the second."""
    pointer, number = BYTE.as_pointer(), ir.IntType(32)
    read, level, data = (ir.Constant(number, n) for n in (0, locality, 1))
    at = builder.inttoptr(address, pointer)
    function = declared(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *[number] * 3])
    builder.call(function, [at, read, level, data])


def _type_dots(_context, at, stride, x, count, out, limit, rows, tokens, kind):
    """rows of a matrix of a kind, stride bytes apart, times tokens of float32 [tokens, count], 16 numbers at a time
    -> out [rows, tokens]; what is behind the last 16 is left to the caller."""
    num_rows, num_tokens = rows.literal_value, tokens.literal_value
    load = _LOADS[kind.literal_value]

    def generate(context, builder, sig, args):
        at, stride, x, count, out, limit = args[:6]
        starts = [builder.add(at, builder.mul(stride, ir.Constant(WORD, row))) for row in range(num_rows)]
        rights = [builder.add(x, builder.mul(count, ir.Constant(WORD, 4 * token))) for token in range(num_tokens)]
        before, loop, after = builder.block, builder.append_basic_block("dots"), builder.append_basic_block("dotted")
        end = builder.and_(count, ir.Constant(WORD, -16))
        zero = _all(0.0)
        builder.cbranch(builder.icmp_signed(">", end, ir.Constant(WORD, 0)), loop, after)
        builder.position_at_end(loop)
        i = builder.phi(WORD)
        i.add_incoming(ir.Constant(WORD, 0), before)
        sums = [[builder.phi(_REALS) for _ in range(num_tokens)] for _ in range(num_rows)]
        columns = [_load_reals(builder, builder.add(right, builder.mul(i, ir.Constant(WORD, 4)))) for right in rights]
        made = []
        for start, row in zip(starts, sums, strict=True):
            weights = load(builder, start, i)
            ahead = builder.add(start, builder.mul(i, ir.Constant(WORD, _SIZES[kind.literal_value])))
            ahead = builder.add(ahead, ir.Constant(WORD, _AHEAD_BYTES))
            ahead = builder.select(builder.icmp_signed("<", ahead, limit), ahead, start)
            _emit_prefetch(builder, ahead)
            made.append(
                [_multiply_add(builder, weights, column, sum_) for column, sum_ in zip(columns, row, strict=True)]
            )
        following = builder.add(i, ir.Constant(WORD, 16))
        i.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
        builder.position_at_end(after)
        for row, new in zip(sums, made, strict=True):
            for t, (phi, value) in enumerate(zip(row, new, strict=True)):
                phi.add_incoming(zero, before)
                phi.add_incoming(value, loop)
                total = builder.phi(_REALS)
                total.add_incoming(zero, before)
                total.add_incoming(value, loop)
                row[t] = total
        for r, row in enumerate(sums):
            for t, total in enumerate(row):
                target = builder.add(out, ir.Constant(WORD, 4 * (r * num_tokens + t)))
                builder.store(_sum_of(builder, total), builder.inttoptr(target, ir.FloatType().as_pointer()))
        return context.get_dummy_value()

    return types.none(*[types.intp] * 6, rows, tokens, kind), generate


def _type_multiply(_context, a, a_stride, b, b_stride, c, c_stride, count, rows, ahead, together, vectors, adds):
    """float32 a [rows, count] times b [count, vectors * 16] -> c [rows, vectors * 16], added to it where adds is 1; the
    rows of each are stride bytes apart. together rows at a time, then what is left of them at once. Each sum is made in
    the order of count, whatever the number of rows. ahead: where a line of 64 bytes is fetched for each of count."""

    def generate(context, builder, sig, args):
        a, a_stride, b, b_stride, c, c_stride, count, rows = args[:8]
        fetched = None if isinstance(ahead, types.NoneType) else args[8]
        most, shape = together.literal_value, (vectors.literal_value, adds.literal_value == 1)
        step, zero = ir.Constant(WORD, most), ir.Constant(WORD, 0)
        left = builder.srem(rows, step)
        whole = builder.sub(rows, left)

        def some(first, num_rows):
            at, to = (
                builder.add(start, builder.mul(first, stride)) for start, stride in ((a, a_stride), (c, c_stride))
            )
            _emit_multiply(builder, at, a_stride, b, b_stride, to, c_stride, count, num_rows, fetched, *shape)

        before, loop, rest, after = (
            builder.block,
            *(builder.append_basic_block(name) for name in ("rows", "rest", "done")),
        )
        builder.cbranch(builder.icmp_signed(">", whole, zero), loop, rest)
        builder.position_at_end(loop)
        first = builder.phi(WORD)
        first.add_incoming(zero, before)
        some(first, most)
        following = builder.add(first, step)
        first.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, whole), loop, rest)
        builder.position_at_end(rest)
        choice = builder.switch(left, after)
        for number in range(1, most):
            block = builder.append_basic_block("some")
            choice.add_case(ir.Constant(WORD, number), block)
            builder.position_at_end(block)
            some(whole, number)
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.none(*[types.intp] * 8, ahead, together, vectors, adds), generate


def _emit_multiply(
    builder: Any,
    a: Any,
    a_stride: Any,
    b: Any,
    b_stride: Any,
    c: Any,
    c_stride: Any,
    count: Any,
    num_rows: int,
    ahead: Any,
    num_vectors: int,
    adds: bool,
) -> None:
    """Rows whose sums are kept in registers."""

    def row_of(start: Any, stride: Any, row: int) -> Any:
        return builder.add(start, builder.mul(stride, ir.Constant(WORD, row)))

    def at_vector(start: Any, vector: int) -> Any:
        return builder.add(start, ir.Constant(WORD, 64 * vector))

    each = [(row, vector) for row in range(num_rows) for vector in range(num_vectors)]
    targets = {(row, vector): at_vector(row_of(c, c_stride, row), vector) for row, vector in each}
    starts = [row_of(a, a_stride, row) for row in range(num_rows)]
    zero = _all(0.0)
    first = {one: _load_reals(builder, targets[one]) if adds else zero for one in each}
    before, loop, after = builder.block, builder.append_basic_block("product"), builder.append_basic_block("multiplied")
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(WORD)
    i.add_incoming(ir.Constant(WORD, 0), before)
    sums = {one: builder.phi(_REALS) for one in each}
    right, left = builder.add(b, builder.mul(b_stride, i)), builder.mul(i, ir.Constant(WORD, 4))
    columns = [_load_reals(builder, at_vector(right, vector)) for vector in range(num_vectors)]
    made = {}
    if ahead is not None:
        _emit_prefetch(builder, builder.add(ahead, builder.mul(i, ir.Constant(WORD, 64))), 2)
    for row in range(num_rows):
        number = builder.load(builder.inttoptr(builder.add(starts[row], left), ir.FloatType().as_pointer()))
        wide = _spread(builder, number)
        for vector in range(num_vectors):
            made[row, vector] = _multiply_add(builder, wide, columns[vector], sums[row, vector])
    following = builder.add(i, ir.Constant(WORD, 1))
    i.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    for one in each:
        sums[one].add_incoming(first[one], before)
        sums[one].add_incoming(made[one], loop)
    builder.position_at_end(after)
    for one in each:
        _store_reals(builder, made[one], targets[one])


def _type_tiles(_context, at, stride, x, count, out, ahead, row_tiles, vectors):
    """bfloat16 [row_tiles * 16, count], rows stride bytes apart, times x [count / 2, vectors * 16, 2] of bfloat16 ->
    float32 out [row_tiles * 16, vectors * 16], by the tile registers of x86's AMX, configured; count is a multiple of
    32. What lies ahead bytes further on is fetched to the second cache."""
    num_rows, num_vectors = row_tiles.literal_value, vectors.literal_value

    def generate(context, builder, sig, args):
        at, stride, x, count, out, ahead = args[:6]
        pointer, number = BYTE.as_pointer(), ir.IntType(8)

        def word(value):
            return ir.Constant(WORD, value)

        def tile(value):
            return ir.Constant(number, value)

        def emit(name, kinds, *operands):
            builder.call(declared(builder, f"llvm.x86.{name}", ir.VoidType(), kinds), operands)

        def move(name, register, address, step):
            emit(name, [number, pointer, WORD], tile(register), builder.inttoptr(address, pointer), step)

        of_x, of_rows = num_rows * num_vectors, num_rows * num_vectors + num_vectors  # registers behind the sums'
        for register in range(num_rows * num_vectors):
            emit("tilezero", [number], tile(register))
        before, loop, after = builder.block, builder.append_basic_block("tiles"), builder.append_basic_block("tiled")
        builder.branch(loop)
        builder.position_at_end(loop)
        i = builder.phi(WORD)
        i.add_incoming(word(0), before)
        for vector in range(num_vectors):
            address = builder.add(x, builder.add(builder.mul(i, word(32 * num_vectors)), word(64 * vector)))
            move("tileloadd64", of_x + vector, address, word(64 * num_vectors))
        for row in range(num_rows):
            start = builder.add(at, builder.mul(i, word(2)))
            start = builder.add(start, builder.mul(stride, word(16 * row)))
            move("tileloadd64", of_rows, start, stride)
            following = builder.add(start, ahead)
            for line in range(16):
                _emit_prefetch(builder, builder.add(following, builder.mul(stride, word(line))), 2)
            for vector in range(num_vectors):
                registers = (row * num_vectors + vector, of_rows, of_x + vector)
                emit("tdpbf16ps", [number] * 3, *map(tile, registers))
        following = builder.add(i, word(32))
        i.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        for row in range(num_rows):
            for vector in range(num_vectors):
                address = builder.add(out, word(64 * vector + 16 * 64 * num_vectors * row))
                move("tilestored64", row * num_vectors + vector, address, word(64 * num_vectors))
        return context.get_dummy_value()

    return types.none(*[types.intp] * 6, row_tiles, vectors), generate


def _emit_configured(builder: Any, at: Any) -> None:
    pointer = BYTE.as_pointer()
    builder.call(declared(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [pointer]), [builder.inttoptr(at, pointer)])


def _emit_released(builder: Any) -> None:
    builder.call(declared(builder, "llvm.x86.tilerelease", ir.VoidType(), []), [])


def _type_turned(_context, rows_at, offset, out, stride, sample):
    """16 numbers of a sample's type at offset behind each of 16 addresses -> out, float32: first those of one place in
    all 16, then those of the next, stride bytes apart."""
    kind = _KINDS.index(sample)
    load, size = _LOADS[kind], _SIZES[kind]

    def generate(context, builder, sig, args):
        rows_at, offset, out, stride = args[:4]
        place = builder.sdiv(offset, ir.Constant(WORD, size))
        rows = []
        for row in range(16):
            at = builder.load(word_at(builder, builder.add(rows_at, ir.Constant(WORD, 8 * row))))
            rows.append(load(builder, at, place))
        for width in (8, 4, 2, 1):  # pairs of rows that are so far apart exchange blocks so wide
            first_half = ir.Constant(_INTEGERS, [(n if n & width == 0 else 16 + n - width) for n in range(16)])
            second_half = ir.Constant(_INTEGERS, [(n + width if n & width == 0 else 16 + n) for n in range(16)])
            for row in range(16):
                if row & width == 0:
                    upper, lower = rows[row], rows[row + width]
                    rows[row] = builder.shuffle_vector(upper, lower, first_half)
                    rows[row + width] = builder.shuffle_vector(upper, lower, second_half)
        for row in range(16):
            _store_reals(builder, rows[row], builder.add(out, builder.mul(stride, ir.Constant(WORD, row))))
        return context.get_dummy_value()

    return types.none(*[types.intp] * 4, sample), generate


def _type_widened(_context, at, out, sample):
    """16 numbers of a sample's type -> float32."""
    load = _LOADS[_KINDS.index(sample)]

    def generate(context, builder, sig, args):
        _store_reals(builder, load(builder, args[0], ir.Constant(WORD, 0)), args[1])
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, sample), generate


def _each_vector(builder: Any, at: Any, count: Any, first: Any, emit: Any) -> Any:
    """emit(address, number of the vector, value) -> value, over count vectors of 16 float32, one at least."""
    before, loop, after = builder.block, builder.append_basic_block("vectors"), builder.append_basic_block("passed")
    builder.branch(loop)
    builder.position_at_end(loop)
    i, value = builder.phi(WORD), builder.phi(_REALS)
    made = emit(builder.add(at, builder.mul(i, ir.Constant(WORD, 64))), i, value)
    following = builder.add(i, ir.Constant(WORD, 1))
    for phi, start, after_one in ((i, ir.Constant(WORD, 0), following), (value, first, made)):
        phi.add_incoming(start, before)
        phi.add_incoming(after_one, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return made


def _emit_largest(builder: Any, at: Any, count: Any, least: Any) -> Any:
    def emit(address, _, value):
        number = _load_reals(builder, address)
        return builder.select(builder.fcmp_ordered(">", number, value), number, value)

    found, real = _each_vector(builder, at, count, _spread(builder, least), emit), ir.FloatType()
    function = declared(builder, "llvm.vector.reduce.fmax.v16f32", real, [_REALS])
    return builder.call(function, [found], fastmath=("nnan", "nsz"))


def _emit_weights(builder: Any, at: Any, count: Any, highest: Any) -> Any:
    top, zero = _spread(builder, highest), _all(0.0)

    def emit(address, _, value):
        weight = _emit_exp(builder, builder.fsub(_load_reals(builder, address), top))
        _store_reals(builder, weight, address)
        return builder.fadd(value, weight)

    return _sum_of(builder, _each_vector(builder, at, count, zero, emit))


def _emit_exp(builder: Any, x: Any) -> Any:
    """exp of x <= 0 within 2e-7 of it, 0 below -87 (polynomial: Cephes' expf)."""
    rint = declared(builder, "llvm.rint.v16f32", _REALS, [_REALS])
    counts = builder.fcmp_ordered(">", x, _all(-87.0))
    x = builder.select(counts, x, _all(-87.0))
    n = builder.call(rint, [builder.fmul(x, _all(1.44269504))])
    r = _multiply_add(builder, n, _all(-0.693359375), x)
    r = _multiply_add(builder, n, _all(2.12194440e-4), r)
    y = _all(1.9875691500e-4)
    for number in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = _multiply_add(builder, y, r, _all(number))
    y = _multiply_add(builder, builder.fmul(y, r), r, builder.fadd(r, _all(1.0)))
    power = builder.shl(builder.fptosi(n, _INTEGERS), ir.Constant(_INTEGERS, [23] * 16))
    y = builder.bitcast(builder.add(builder.bitcast(y, _INTEGERS), power), _REALS)
    return builder.select(counts, y, _all(0.0))


def _type_gated(_context, gate, up, out, sample):
    """silu of 16 numbers times 16 others -> float32; both are of a sample's type."""
    load = _LOADS[_KINDS.index(sample)]

    def generate(context, builder, sig, args):
        x, up = (load(builder, at, ir.Constant(WORD, 0)) for at in args[:2])
        negative = builder.fcmp_ordered("<", x, _all(0.0))
        small = _emit_exp(builder, builder.select(negative, x, builder.fsub(_all(0.0), x)))
        share = builder.fdiv(builder.select(negative, small, _all(1.0)), builder.fadd(small, _all(1.0)))
        _store_reals(builder, builder.fmul(builder.fmul(x, share), up), args[2])
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, types.intp, sample), generate


def _emit_scaled(builder: Any, at: Any, count: Any, factor: Any) -> None:
    wide = _spread(builder, factor)

    def emit(address, _, value):
        _store_reals(builder, builder.fmul(_load_reals(builder, address), wide), address)
        return value

    _each_vector(builder, at, count, _all(0.0), emit)


def _type_only(_context, at, count, first, last, other):
    """Of count vectors, numbers before place first and behind place last become other."""

    def generate(context, builder, sig, args):
        at, count, first, last, other = args
        number = ir.IntType(32)
        first, last = (_spread(builder, builder.trunc(place, number)) for place in (first, last))
        other = _spread(builder, other)

        def emit(address, i, value):
            place = builder.trunc(builder.mul(i, ir.Constant(WORD, 16)), number)
            place = builder.add(_spread(builder, place), ir.Constant(_INTEGERS, list(range(16))))
            inside = builder.and_(builder.icmp_signed(">=", place, first), builder.icmp_signed("<=", place, last))
            _store_reals(builder, builder.select(inside, _load_reals(builder, address), other), address)
            return value

        _each_vector(builder, at, count, _all(0.0), emit)
        return context.get_dummy_value()

    return types.none(*[types.intp] * 4, types.float32), generate


def _all(number: float) -> Any:
    return ir.Constant(_REALS, [number] * 16)


def _spread(builder: Any, number: Any) -> Any:
    """A number -> 16 of it."""
    kind = ir.VectorType(number.type, 16)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_INTEGERS, [0] * 16))


def _store_reals(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, _REALS.as_pointer())).align = 4


def _load_vector(builder: Any, address: Any, element: Any) -> Any:
    kind = ir.VectorType(element, 16)
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def _load_reals(builder: Any, address: Any) -> Any:
    return _load_vector(builder, address, ir.FloatType())


def _load_float32(builder: Any, start: Any, i: Any) -> Any:
    return _load_reals(builder, builder.add(start, builder.mul(i, ir.Constant(WORD, 4))))


def _load_bfloat16(builder: Any, start: Any, i: Any) -> Any:
    halves = _load_vector(builder, builder.add(start, builder.mul(i, ir.Constant(WORD, 2))), ir.IntType(16))
    bits = builder.shl(builder.zext(halves, _INTEGERS), ir.Constant(_INTEGERS, [16] * 16))
    return builder.bitcast(bits, _REALS)


def _load_int8(builder: Any, start: Any, i: Any) -> Any:
    return builder.sitofp(builder.sext(_load_vector(builder, builder.add(start, i), BYTE), _INTEGERS), _REALS)


def _load_float8(builder: Any, start: Any, i: Any) -> Any:
    """Exponent and fraction are moved to where float32 has them; the smallest numbers, whose exponent is 0, are
    fractions of 2 ** -6 as they stand. No weight is NaN."""

    def each(number: int) -> Any:
        return ir.Constant(_INTEGERS, [number] * 16)

    bits = builder.zext(_load_vector(builder, builder.add(start, i), BYTE), _INTEGERS)
    size = builder.and_(bits, each(0x7F))
    normal = builder.bitcast(builder.add(builder.shl(size, each(20)), each(120 << 23)), _REALS)
    small = builder.fmul(builder.sitofp(size, _REALS), _all(2.0**-9))
    value = builder.select(builder.icmp_unsigned("<", size, each(8)), small, normal)
    sign = builder.shl(builder.and_(bits, each(0x80)), each(24))
    return builder.bitcast(builder.or_(builder.bitcast(value, _INTEGERS), sign), _REALS)


def _multiply_add(builder: Any, left: Any, right: Any, total: Any) -> Any:
    return builder.fadd(builder.fmul(left, right, flags=("contract",)), total, flags=("contract",))


def _sum_of(builder: Any, vector: Any) -> Any:
    real = ir.FloatType()
    function = declared(builder, "llvm.vector.reduce.fadd.v16f32", real, [real, _REALS])
    return builder.call(function, [ir.Constant(real, -0.0), vector], fastmath=("reassoc",))


_LOADS = (_load_float32, _load_bfloat16, _load_int8, _load_float8)  # in the order of TYPES
prefetch_near = instruction(types.none(types.intp), lambda builder, at: _emit_prefetch(builder, at, 2))
dots: Any = intrinsic(prefer_literal=True)(_type_dots)
multiply: Any = intrinsic(prefer_literal=True)(_type_multiply)
largest = instruction(types.float32(types.intp, types.intp, types.float32), _emit_largest)
weights = instruction(types.float32(types.intp, types.intp, types.float32), _emit_weights)
scaled = instruction(types.none(types.intp, types.intp, types.float32), _emit_scaled)
only: Any = intrinsic(_type_only)
tiles: Any = intrinsic(prefer_literal=True)(_type_tiles)
configured = instruction(types.none(types.intp), _emit_configured)  # AMX's registers, by 64 bytes
released = instruction(types.none(), _emit_released)
gated: Any = intrinsic(_type_gated)
turned: Any = intrinsic(_type_turned)
widened: Any = intrinsic(_type_widened)
