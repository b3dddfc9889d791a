"""A tensor without values that says that it lies on the CPU: operators choose the kernels that they choose there.

What an operator gives is asked of torch's `FakeTensor`, once for the same forms. `FakeTensor` by itself remembers too,
but takes several times as long an operator, for what it can do beside (sizes that are symbols, devices).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves

CPU, META = torch.device("cpu"), torch.device("meta")
ASKED_OF_NO_VALUE = 1.0
"""A loss, or whether a gradient is finite: the answer to whatever is asked of no value."""
GROUPED = torch.ops.aten._grouped_mm.default
"""Products with the weights of many experts. CPUs compute them in every type, but torch tells the form of those in
bfloat16 alone."""
REMEMBERED = 4096
"""Operators with the forms of their arguments; a step has some hundreds."""


class HollowTensor(Tensor):
    """Shape, strides and type of a tensor, and the bytes that it would take."""

    meta: Tensor
    """On the meta device. Its storage tells views from what they are views of."""

    @staticmethod
    def __new__(cls: type[HollowTensor], meta: Tensor) -> HollowTensor:
        """Of a tensor on the meta device."""
        made: HollowTensor = Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype,
            layout=meta.layout, device=CPU)
        made.meta = meta
        return made

    def __repr__(self) -> str:  # type: ignore[override]  # what else torch asks it for is values
        return f"HollowTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    @property
    def data(self) -> Tensor:
        """Without a graph. Layers set it to change a parameter's type."""
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.meta = value.meta if isinstance(value, HollowTensor) else value.to(META)

    def tolist(self) -> Any:
        """Torch's own refuses subclasses."""
        return [part.tolist() for part in self.unbind()] if self.ndim else self.item()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the class
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What the operator gives.

        Raises:
            RuntimeError: that depends on values.
        """
        named = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return ASKED_OF_NO_VALUE
        if func is GROUPED and args[0].dtype != torch.bfloat16:
            return HollowTensor(func(*(_narrowed(value) for value in args), **named).meta.to(args[0].dtype))
        if (gives := _gives(func)) != "other":
            forms = _forms_given(func, tuple(named), *map(_form, args), *map(_form, named.values()))
            if gives == "changed":
                return args[0] if func._schema.returns else None
            if forms is not None:
                return _of_forms(forms, HollowTensor)
        owners: dict[int, HollowTensor] = {}
        on_meta = {name: _on_meta(value, owners) for name, value in named.items()}
        result = func(*_on_meta(args, owners), **on_meta)
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():
                func(*args, **named)
        return _hollow(result, owners)


def _narrowed(value: Any) -> Any:
    """The same without values in bfloat16, if it is a tensor of numbers."""
    floating = isinstance(value, HollowTensor) and value.is_floating_point()
    return HollowTensor(value.meta.to(torch.bfloat16)) if floating else value


class Form(NamedTuple):
    """What tensors have in common for which an operator gives the same form."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


@functools.cache
def _gives(func: Any) -> Literal["new", "changed", "other"]:
    """By its own word: only tensors that share no memory with its arguments, its first argument with other values (or,
    if that is a list, nothing), or anything else."""
    schema, shared = func._schema, [given.alias_info for given in func._schema.returns]
    if not schema.is_mutable:
        tensors = all(str(given.type) in ("Tensor", "List[Tensor]") for given in schema.returns)
        return "new" if tensors and not any(shared) else "other"
    in_place = schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags
    return "changed" if in_place and len(shared) <= 1 and all(shared) else "other"


@functools.lru_cache(REMEMBERED, typed=True)
def _forms_given(func: Any, names: tuple[str, ...], *values: Any) -> Any:
    """The forms of what an operator gives for arguments of such forms, the last of them by name.

    None where that shares memory with an argument, or is laid out as no form says.
    """
    given = [_of_forms(value, _fake) for value in values]
    split = len(given) - len(names)
    result = func(*given[:split], **dict(zip(names, given[split:], strict=True)))
    taken = {tensor.untyped_storage()._cdata for tensor in tree_leaves(given) if isinstance(tensor, Tensor)}
    for made in (leaf for leaf in tree_leaves(result) if leaf is not None):
        storage = made.untyped_storage()
        if storage._cdata in taken or storage.nbytes() != _of_forms(_form(made), _fake).untyped_storage().nbytes():
            return None
        taken.add(storage._cdata)
    return _form(result)


def _form(value: Any) -> Any:
    """An argument by its form, which can be a key."""
    if isinstance(value, Tensor):
        return Form(value.shape, value.stride(), value.dtype)
    return tuple(map(_form, value)) if isinstance(value, (list, tuple)) else value


def _of_forms(value: Any, kind: Callable[[Tensor], Tensor]) -> Any:
    """Tensors of such forms: what `kind` makes of those on the meta device."""
    if isinstance(value, Form):
        return kind(torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device=META))
    return tuple(_of_forms(part, kind) for part in value) if isinstance(value, tuple) else value


def _fake(meta: Tensor) -> Tensor:
    return FakeTensor(_mode(), meta, CPU)


@functools.cache
def _mode() -> FakeTensorMode:
    return FakeTensorMode()


def _on_meta(value: Any, owners: dict[int, HollowTensor]) -> Any:
    """The same arguments on the meta device; notes whose tensors those are."""
    if isinstance(value, HollowTensor):
        owners[id(value.meta)] = value
        return value.meta
    if isinstance(value, Tensor):
        return value.to(META)
    if isinstance(value, (list, tuple)):
        return [_on_meta(part, owners) for part in value]
    return META if isinstance(value, torch.device) else value


def _hollow(result: Any, owners: Mapping[int, HollowTensor]) -> Any:
    """What an operator gave, with the arguments themselves where it gave those."""
    if isinstance(result, Tensor):
        return owners[id(result)] if id(result) in owners else HollowTensor(result)
    if isinstance(result, (list, tuple)):
        return type(result)(_hollow(part, owners) for part in result)
    return result


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Where the tensor's bytes lie, or would."""
    return (tensor.meta if isinstance(tensor, HollowTensor) else tensor).untyped_storage()
