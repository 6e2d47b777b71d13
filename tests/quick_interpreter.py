"""Triton's interpreter without its useless and repeated work: kernels run in half the time.

Nothing here changes what a kernel computes, but the order in which products are added up.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest


class Shape(NamedTuple):
    """Forms of a shape that types and tensors hold, and the number of elements."""

    plain: Any
    constants: Any
    numel: int
    numel_constant: Any
    text: str


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Make Triton's interpreter skip useless and repeated work."""
    with pytest.MonkeyPatch.context() as patch:
        skip_overflow_checks(patch)
        replace_the_language_once(patch)
        remember_types(patch)
        multiply_in_order(patch)
        yield


def skip_overflow_checks(patch: pytest.MonkeyPatch) -> None:
    """Check no sum, difference or product of integers for overflow.

    The interpreter uses the result only with the option ``debug``, which is off.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    patch.setattr(builder, "options", options)


def replace_the_language_once(patch: pytest.MonkeyPatch) -> None:
    """Search all of Triton's language for functions to replace once, and replace once a launch.

    The interpreter searches at each launch, and at each call of a function inside of a kernel.
    The launch has replaced them already then.
    """
    from triton.runtime import interpreter

    tl = interpreter.tl
    launch, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang
    replaced: dict[tuple[str, ...], Any] = {}

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()  # a launch puts back at its end what it has replaced
        launch(self, *args, **kwargs)

    @functools.cache
    def parts_of(fn: Any) -> tuple[str, ...]:
        language = (interpreter.tl, interpreter.tl.core)
        # Not by the function's own names: in Triton's files ``tl`` is another part.
        seen = [v for v in fn.__globals__.values() if any(v is each for each in language)]
        return tuple(part.__name__ for part in seen)

    def replace_once(fn: Any) -> Any:
        parts = parts_of(fn)
        if parts not in replaced:
            replaced[parts] = replace(fn)
        return replaced[parts]

    @functools.cache
    def builtins_of(language: Any) -> list[tuple[str, Any]]:
        return [
            (name, with_semantic(member))
            for name, member in inspect.getmembers(language)
            if tl.core.is_builtin(member)
        ]

    def with_semantic(member: Any) -> Any:
        # What a builtin wraps, if it does, is called without a check of this argument.
        body, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

        def called(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return body(*args, **kwargs)

        return called

    def replace_builtins(language: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins_of(language):
            scope.set_attr(language, name, member)

    patch.setattr(interpreter.GridExecutor, "__call__", begin)
    patch.setattr(interpreter, "_patch_lang", replace_once)
    patch.setattr(interpreter, "_patch_builtin", replace_builtins)


def remember_types(patch: pytest.MonkeyPatch) -> None:
    """Make and check each shape once, and look for no common one where two tensors share it.

    The interpreter makes them for every tensor, and a table of dtypes at each access.
    """
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    core = interpreter.tl.core
    make_block, broadcast = core.block_type.__init__, TritonSemantic.broadcast_impl_value
    equal, in_numpy = core.dtype.__eq__, interpreter._get_np_dtype
    of_scalar = functools.cache(in_numpy)
    scalar = Shape(None, core.tuple([]), 1, core.constexpr(1), "")
    shapes: dict[tuple[int, ...], Shape] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(n.value if isinstance(n, core.constexpr) else n for n in shape)
        known = shapes.get(sizes)
        if known is None:
            make_block(self, element_ty, shape)  # checks them
            constants = core.tuple([core.constexpr(n) for n in sizes])
            numel = math.prod(sizes)
            text = str(self.shape)
            known = Shape(self.shape, constants, numel, core.constexpr(numel), text)
            shapes[sizes] = known
        self.element_ty, self.shape, self.numel, self.known = (
            element_ty, known.plain, known.numel, known,
        )  # fmt: skip
        self.name = f"<{known.text}, {element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        known = type.known if type.is_block() else scalar
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known.constants, known.numel_constant

    def broadcast_if_needed(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.shape is rhs.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def in_numpy_once(dtype: Any) -> Any:
        return in_numpy(dtype) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)

    patch.setattr(core.block_type, "__init__", init_block)
    patch.setattr(core.tensor, "__init__", init_tensor)
    patch.setattr(core.dtype, "__eq__", lambda self, other: self is other or equal(self, other))
    patch.setattr(TritonSemantic, "broadcast_impl_value", broadcast_if_needed)
    patch.setattr(interpreter, "_get_np_dtype", in_numpy_once)


def multiply_in_order(patch: pytest.MonkeyPatch) -> None:
    """Add the products of several matrices up in one order for every row.

    The library's order depends on a row's place among the others. A tensor core's does not.
    """
    from triton.runtime import interpreter

    dot = interpreter.interpreter_builder.create_dot

    def dot_in_order(a: Any, b: Any, acc: Any, *options: Any) -> Any:
        if a.data.ndim == 2:
            return dot(a, b, acc, *options)
        wide = [each.data.astype(acc.data.dtype) for each in (a, b)]
        sums = np.einsum("wmk,wkn->wmn", *wide, optimize=False)
        return interpreter.TensorHandle(sums + acc.data, acc.dtype.scalar)

    patch.setattr(interpreter.interpreter_builder, "create_dot", dot_in_order)
