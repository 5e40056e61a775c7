"""Fixed-width vectors inside numba kernels.

LLVM cannot vectorise a floating-point reduction without reordering it, and a search for scales is
made of such reductions. So the kernels say themselves what runs side by side: a vector holds one
value for each of 8 independent blocks, and sums run along the elements. Each lane computes
what a scalar loop would, on every CPU, whatever the width of its registers.

Vectors exist only inside compiled code. Arithmetic, comparison, `&`, `|`, `<<`, `>>` work on them,
also against a scalar, which is copied to all lanes. Comparisons give masks for `select`.
Indices are not checked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import NumbaTypeError
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_ELEMENTS = {"f32": _FLOAT, "i32": _INT, "mask": ir.IntType(1)}


class Vec(types.Type):  # type: ignore[misc]
    """`lanes` values of `kind`: f32, i32 or mask."""

    def __init__(self, kind: str, lanes: int) -> None:
        self.kind = kind
        self.lanes = lanes
        super().__init__(name=f"Vec({kind}, {lanes})")

    @property
    def ir(self) -> Any:
        """The LLVM type."""
        return ir.VectorType(_ELEMENTS[self.kind], self.lanes)

    def of(self, kind: str) -> Vec:
        """As many lanes of another kind."""
        return Vec(kind, self.lanes)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Vec) -> None:
        super().__init__(dmm, fe_type, fe_type.ir)


def _splat(builder: Any, scalar: Any, lanes: int) -> Any:
    vector = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, _INT(0))
    zeros = ir.Constant(ir.VectorType(_INT, lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def _as(context: Any, builder: Any, value: Any, given: Any, wanted: Vec) -> Any:
    """A vector or scalar as a vector of type `wanted`."""
    if isinstance(given, Vec):
        return value
    scalar = types.float32 if wanted.kind == "f32" else types.int32
    return _splat(builder, context.cast(builder, value, given, scalar), wanted.lanes)


def _call(builder: Any, name: str, *values: Any) -> Any:
    """A call of an LLVM intrinsic whose operands and result share one type."""
    kind = values[0].type
    suffix = f"v{kind.count}{'f32' if kind.element == _FLOAT else 'i32'}"
    signature = ir.FunctionType(kind, [kind] * len(values))
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.{name}.{suffix}")
    return builder.call(function, values)


def _vector_of(*operands: Any) -> Vec:
    """The vector type that an operation runs in; scalars adapt to it."""
    found = {operand for operand in operands if isinstance(operand, Vec)}
    if len(found) != 1:
        raise NumbaTypeError(f"no common vector type: {operands}")
    return found.pop()


def _operator(function: Any, emit: Callable[[Any, Any, Any, str], Any], mask: bool = False) -> None:
    """Teach numba a binary operator on vectors."""

    @type_callable(function)  # type: ignore[untyped-decorator]
    def _typer_of(context: Any) -> Any:
        def typer(a: Any, b: Any) -> Any:
            if not isinstance(a, Vec) and not isinstance(b, Vec):
                return None
            vector = _vector_of(a, b)
            return vector.of("mask") if mask else vector

        return typer

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = _vector_of(*sig.args)
        a, b = (
            _as(context, builder, value, given, vector)
            for value, given in zip(args, sig.args, strict=True)
        )
        return emit(builder, a, b, vector.kind)

    for pair in ((Vec, Vec), (Vec, types.Number), (types.Number, Vec)):
        lower_builtin(function, *pair)(lower)


def _arithmetic(for_float: str, for_int: str) -> Callable[[Any, Any, Any, str], Any]:
    return lambda builder, a, b, kind: getattr(builder, for_float if kind == "f32" else for_int)(
        a, b
    )


def _comparison(symbol: str) -> Callable[[Any, Any, Any, str], Any]:
    return lambda builder, a, b, kind: (
        builder.fcmp_ordered(symbol, a, b) if kind == "f32" else builder.icmp_signed(symbol, a, b)
    )


_operator(operator.add, _arithmetic("fadd", "add"))
_operator(operator.sub, _arithmetic("fsub", "sub"))
_operator(operator.mul, _arithmetic("fmul", "mul"))
_operator(operator.truediv, _arithmetic("fdiv", "sdiv"))  # integers: towards zero
_operator(operator.and_, _arithmetic("and_", "and_"))
_operator(operator.or_, _arithmetic("or_", "or_"))
_operator(operator.lshift, _arithmetic("shl", "shl"))
_operator(operator.rshift, _arithmetic("ashr", "ashr"))
for _function, _symbol in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
):
    _operator(_function, _comparison(_symbol), mask=True)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    if array_type.layout == "A":
        raise NumbaTypeError("vectors need contiguous arrays")
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@intrinsic  # type: ignore[untyped-decorator]
def load8(typingctx: Any, array: Any, index: Any) -> Any:
    """`array[index:index + 8]`, f32, or i32 from integers of any width up to 32 bits."""
    dtype = array.dtype
    result = Vec("f32" if dtype == types.float32 else "i32", 8)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        pointer = _pointer(context, builder, sig.args[0], args[0], at)
        stored = ir.VectorType(pointer.type.pointee, result.lanes)
        value = builder.load(builder.bitcast(pointer, stored.as_pointer()))
        value.align = 1
        if isinstance(dtype, types.Integer) and dtype.bitwidth < 32:
            extend = builder.sext if dtype.signed else builder.zext
            return extend(value, result.ir)
        return value

    return result(array, index), codegen


@intrinsic  # type: ignore[untyped-decorator]
def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """`array[index:index + lanes] = value`, integers cut to the array's width."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        pointer = _pointer(context, builder, sig.args[0], args[0], at)
        stored = ir.VectorType(pointer.type.pointee, value.lanes)
        cut = args[2] if stored == args[2].type else builder.trunc(args[2], stored)
        builder.store(cut, builder.bitcast(pointer, stored.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, index, value), codegen


@intrinsic  # type: ignore[untyped-decorator]
def splat8(typingctx: Any, value: Any) -> Any:
    """`value` in every lane, f32 or i32 as the value is."""
    result = Vec("f32" if isinstance(value, types.Float) else "i32", 8)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _as(context, builder, args[0], sig.args[0], result)

    return result(value), codegen


@intrinsic  # type: ignore[untyped-decorator]
def select(typingctx: Any, mask: Any, yes: Any, no: Any) -> Any:
    """Per lane, `yes` where the mask is set, else `no`."""
    result = _vector_of(yes, no)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a = _as(context, builder, args[1], sig.args[1], result)
        b = _as(context, builder, args[2], sig.args[2], result)
        return builder.select(args[0], a, b)

    return result(mask, yes, no), codegen


def _pair(symbol: str) -> Any:
    def pick(typingctx: Any, a: Any, b: Any) -> Any:
        vector = _vector_of(a, b)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            x, y = (
                _as(context, builder, value, given, vector)
                for value, given in zip(args, sig.args, strict=True)
            )
            compare = builder.fcmp_ordered if vector.kind == "f32" else builder.icmp_signed
            return builder.select(compare(symbol, x, y), x, y)

        return vector(a, b), codegen

    return intrinsic(pick)


minimum = _pair("<")
maximum = _pair(">")


def _unary(name: str) -> Any:
    def apply(typingctx: Any, a: Any) -> Any:
        return a(a), lambda context, builder, sig, args: _call(builder, name, args[0])

    return intrinsic(apply)


absolute = _unary("fabs")
rint = _unary("rint")  # ties to even
sqrt = _unary("sqrt")


@intrinsic  # type: ignore[untyped-decorator]
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` rounded once; any of them may be a scalar."""
    vector = _vector_of(a, b, c)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = (
            _as(context, builder, value, given, vector)
            for value, given in zip(args, sig.args, strict=True)
        )
        return _call(builder, "fma", *values)

    return vector(a, b, c), codegen


def _converter(kind: str, emit: Callable[[Any, Any, Any], Any]) -> Any:
    def convert(typingctx: Any, a: Any) -> Any:
        result = a.of(kind)
        return result(a), lambda context, builder, sig, args: emit(builder, args[0], result.ir)

    return intrinsic(convert)


def _through_f16(builder: Any, value: Any, result: Any) -> Any:
    half = ir.VectorType(ir.HalfType(), result.count)
    return builder.fpext(builder.fptrunc(value, half), result)


as_i32 = _converter("i32", lambda builder, a, to: builder.fptosi(a, to))  # towards zero
as_f32 = _converter("f32", lambda builder, a, to: builder.sitofp(a, to))
bits_of = _converter("i32", lambda builder, a, to: builder.bitcast(a, to))
float_of = _converter("f32", lambda builder, a, to: builder.bitcast(a, to))
f16_near = _converter("f32", _through_f16)  # the nearest f16, ties to even


def _folder(combine: Callable[[Any, Any, Any], Any]) -> Any:
    """A reduction over the lanes by halving, so in an order that no CPU changes."""

    def fold(typingctx: Any, a: Any) -> Any:
        scalar = types.float32 if a.kind == "f32" else types.int32

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value, lanes = args[0], a.lanes
            while lanes > 1:
                lanes //= 2
                order = ir.VectorType(_INT, lanes)
                low, high = (
                    builder.shuffle_vector(value, value, ir.Constant(order, list(span)))
                    for span in (range(lanes), range(lanes, 2 * lanes))
                )
                value = combine(builder, low, high)
            return builder.extract_element(value, _INT(0))

        return scalar(a), codegen

    return intrinsic(fold)


def _add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b) if a.type.element == _FLOAT else builder.add(a, b)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    is_float = a.type.element == _FLOAT
    above = builder.fcmp_ordered(">", a, b) if is_float else builder.icmp_signed(">", a, b)
    return builder.select(above, a, b)


total = _folder(_add)
largest = _folder(_larger)


@intrinsic  # type: ignore[untyped-decorator]
def lane(typingctx: Any, a: Any, index: Any) -> Any:
    """The value in one lane."""
    scalar = types.float32 if a.kind == "f32" else types.int32

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.int32)
        return builder.extract_element(args[0], at)

    return scalar(a, index), codegen


@intrinsic  # type: ignore[untyped-decorator]
def mask_bits(typingctx: Any, mask: Any) -> Any:
    """The mask as an integer, bit i for lane i."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        packed = builder.bitcast(args[0], ir.IntType(mask.lanes))
        return builder.zext(packed, _INT)

    return types.int32(mask), codegen


@intrinsic  # type: ignore[untyped-decorator]
def transpose8(typingctx: Any, source: Any, begin: Any, stride: Any, target: Any, at: Any) -> Any:
    """`target[at + 8 i + j] = source[begin + stride j + i]` for i, j in 0..7, both f32."""
    eight = ir.VectorType(_FLOAT, 8)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        first, step, to = (
            context.cast(builder, args[n], sig.args[n], types.intp) for n in (1, 2, 4)
        )
        rows = []
        for j in range(8):
            index = builder.add(first, builder.mul(step, step.type(j)))
            pointer = _pointer(context, builder, sig.args[0], args[0], index)
            row = builder.load(builder.bitcast(pointer, eight.as_pointer()))
            row.align = 1
            rows.append(row)
        # Three rounds swap the off-diagonal quarters of ever smaller squares.
        for s in (4, 2, 1):
            low = ir.VectorType(_INT, 8)([i if not i & s else i - s + 8 for i in range(8)])
            high = ir.VectorType(_INT, 8)([i + s if not i & s else i + 8 for i in range(8)])
            for j in (j for j in range(8) if not j & s):
                a, b = rows[j], rows[j + s]
                rows[j] = builder.shuffle_vector(a, b, low)
                rows[j + s] = builder.shuffle_vector(a, b, high)
        for i, row in enumerate(rows):
            index = builder.add(to, to.type(8 * i))
            pointer = _pointer(context, builder, sig.args[3], args[3], index)
            builder.store(row, builder.bitcast(pointer, eight.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(source, begin, stride, target, at), codegen


@intrinsic  # type: ignore[untyped-decorator]
def lookup8(typingctx: Any, table: Any, index: Any) -> Any:
    """`table[index]` per lane, for a vector of 8 values and indices 0..7 (one instruction)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        found = ir.Constant(args[0].type, ir.Undefined)
        for i in range(8):
            at = builder.extract_element(args[1], _INT(i))
            value = builder.extract_element(args[0], at)
            found = builder.insert_element(found, value, _INT(i))
        return found

    return table(table, index), codegen
