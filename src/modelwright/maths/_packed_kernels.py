"""The loops of `packed_products`, compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from modelwright.maths._compiled import compiled

AHEAD = 4096  # bytes before they are needed, codes are asked of the memory: decoding waits for it more than for sums
FOUR, LOW, HALVES = np.uint8(4), np.uint8(15), np.uint32(16)
SIXTEEN = np.float32(16)
WHOLE = np.float32(1 << 23)  # whose last bit is worth 1
LOOSE = {"reassoc", "contract", "nsz"}  # sums in any order, so that the processor takes many terms at once; NaN stays NaN


@partial(compiled, fastmath=LOOSE)
def real(scale: Any, row: Any, group: Any) -> Any:
    """An entry of scales as float32; unsigned numbers of 16 bits are the upper halves of one."""
    if scale.itemsize == 2:
        return np.uint32(np.uint32(scale[row, group]) << HALVES).view(np.float32)
    return np.float32(scale[row, group])


@partial(compiled, fastmath=LOOSE)
def shift(zero: Any, bits: Any, row: Any, group: Any) -> Any:
    """What is taken from each unsigned code of a group: its zero point, one of floats [out, groups] or in the bytes of packed words."""
    if zero is None:
        return np.float32(1 << (bits - 1))
    if zero.itemsize == 1:
        place = row * bits % 32
        return np.float32((np.int64(zero[row * bits // 32, 4 * group + place // 8]) >> (place % 8)) & ((1 << bits) - 1))
    return np.float32(1 << (bits - 1)) + real(zero, row, group)


def _dot(_: Any, codes: Any, x: Any, steps: Any, shifts: Any, vectors: Any, lanes: Any, halves: Any) -> Any:
    """Add up a row of bytes: Σ step · Σ (code - middle) · x, where the second codes of bytes, times 16 as they lie there, go with x[1].

    It takes codes uint8 [n or more, as words may be padded], x float32 [codes in a byte, n], steps float32 [n / vectors / lanes], how many
    vectors share one, shifts float32 [codes in a byte, n / vectors / lanes], and two tuples whose lengths are known to the compiler: an
    entry for each lane of a vector, and one for each code in a byte. A code becomes a float as the last bits of WHOLE, and the shift,
    WHOLE + middle (times 16), is taken from it without rounding. In LLVM's words, since numba's own loops do not ask for memory ahead.
    """

    def generate(context: Any, build: Any, signature: Any, given: Any) -> Any:
        arrays = [context.make_array(kind)(context, build, value) for kind, value in zip(signature.args[:4], given[:4], strict=True)]
        size, count = build.extract_value(arrays[1].shape, 1), build.extract_value(arrays[2].shape, 0)
        row, inputs, scales, middles = (array.data for array in arrays)
        return _summed(build, row, inputs, scales, middles, size, count, given[4], len(lanes), len(halves))

    return types.float32(codes, x, steps, shifts, vectors, lanes, halves), generate


dot: Any = intrinsic(_dot)


def _summed(build: Any, codes: Any, x: Any, steps: Any, shifts: Any, size: Any, count: Any, vectors: Any, lanes: int, halves: int) -> Any:
    """Write the loops of `dot` into a function that is being built; returns the sum."""
    number, place, real = ir.IntType(32), ir.IntType(64), ir.FloatType()
    floats, whole = ir.VectorType(real, lanes), ir.VectorType(number, lanes)
    zero = ir.Constant(floats, [0.0] * lanes)

    def called(name: str, result: Any, *values: Any, **how: Any) -> Any:
        kind = ir.FunctionType(result, [value.type for value in values])
        return build.call(cgutils.get_or_insert_function(build.module, kind, name), values, **how)

    def read(array: Any, at: Any, item: Any) -> Any:
        values = build.load(build.bitcast(build.gep(array, [at]), ir.VectorType(item, lanes).as_pointer()))
        values.align = item.width // 8 if isinstance(item, ir.IntType) else 4
        return values

    def add(total: Any, left: Any, right: Any) -> None:
        build.store(called(f"llvm.fmuladd.v{lanes}f32", floats, left, right, build.load(total)), total)

    def everyone(value: int) -> Any:
        return ir.Constant(whole, [value] * lanes)

    def everywhere(values: Any, at: Any) -> Any:  # an entry, in all lanes
        one = build.insert_element(zero, build.load(build.gep(values, [at])), number(0))
        return build.shuffle_vector(one, zero, everyone(0))

    total, part = cgutils.alloca_once_value(build, zero), cgutils.alloca_once_value(build, zero)
    wide = build.mul(vectors, place(lanes))
    with cgutils.for_range(build, count, intp=place) as step:
        build.store(zero, part)
        middles = [everywhere(shifts, build.add(step.index, build.mul(count, place(half)))) for half in range(halves)]
        with cgutils.for_range(build, vectors, intp=place) as vector:
            at = build.add(build.mul(step.index, wide), build.mul(vector.index, place(lanes)))
            ahead = build.gep(codes, [build.add(at, place(AHEAD))])
            called(f"llvm.prefetch.{ahead.type.intrinsic_name}", ir.VoidType(), ahead, number(0), number(3), number(1))  # to read
            found = build.zext(read(codes, at, ir.IntType(8)), whole)
            for half, (mask, middle) in enumerate(zip((255,) if halves == 1 else (15, 240), middles, strict=True)):
                own = build.or_(build.and_(found, everyone(mask)), everyone(int(WHOLE.view(np.int32))))
                own = build.fsub(build.bitcast(own, floats), middle)
                add(part, own, read(x, build.add(at, build.mul(size, place(half))), real))
        add(total, everywhere(steps, step.index), build.load(part))
    return called(f"llvm.vector.reduce.fadd.v{lanes}f32", real, ir.Constant(real, 0.0), build.load(total), fastmath=("reassoc",))


@partial(compiled, fastmath=LOOSE)
def integers(
    packed: Any, scale: Any, zero: Any, x: Any, sums: Any, out: Any, parts: Any, lanes: Any, halves: Any, first: Any, last: Any
) -> Any:
    """Rows `first` to `last` of codes, times x float32 [count, codes in a byte, bytes], into out; the tuples are those of `dot`.

    sums: of the inputs of each group, [count, groups]. parts: into how many each group falls, whose sums begin beside each other. What a
    zero point has behind the comma, which is little, is taken from the sum.
    """
    groups, bits = scale.shape[1], 8 // len(halves)
    vectors = x.shape[2] // (groups * parts * len(lanes))
    steps, shifts = np.empty(groups * parts, np.float32), np.empty((len(halves), groups * parts), np.float32)
    rest = np.zeros(groups, np.float32)
    for half in range(len(halves)):
        shifts[half] = WHOLE + (np.float32(1) if half == 0 else SIXTEEN) * shift(None, bits, 0, 0)
    for row in range(first, last):
        if parts == 1:  # a loop of its own, which takes many at once
            for group in range(groups):
                steps[group] = real(scale, row, group)
        else:
            for group in range(groups):
                steps[group * parts : (group + 1) * parts] = real(scale, row, group)
        if zero is not None:
            for group in range(groups):
                middle = shift(zero, bits, row, group)
                near = np.float32(np.rint(middle))
                rest[group] = real(scale, row, group) * (middle - near)
                for part in range(group * parts, (group + 1) * parts):
                    shifts[0, part] = WHOLE + near
                    shifts[-1, part] = WHOLE + (SIXTEEN if len(halves) == 2 else np.float32(1)) * near
        for one in range(len(x)):
            total = dot(packed[row], x[one], steps, shifts, vectors, lanes, halves)
            if zero is not None:
                for group in range(groups):
                    if rest[group] != 0:
                        total -= rest[group] * sums[one, group]
            out[one, row] = total


@partial(compiled, fastmath=LOOSE)
def levels(packed: Any, scale: Any, table: Any, x: Any, out: Any, first: Any, last: Any) -> Any:
    """The same for codes of 4 bits that are places in a table of 16 levels."""
    groups = scale.shape[1]
    size = x.shape[2] // groups
    for row in range(first, last):
        for one in range(len(x)):
            total = np.float32(0)
            for group in range(groups):
                part = slice(group * size, (group + 1) * size)
                codes, even, odd = packed[row, part], x[one, 0, part], x[one, 1, part]
                found = np.float32(0)
                for place in range(size):
                    code = codes[place]
                    found += even[place] * table[code & LOW] + odd[place] * table[code >> FOUR]
                total += real(scale, row, group) * found
            out[one, row] = total
