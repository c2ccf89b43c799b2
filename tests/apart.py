"""A device for machines without a GPU: its tensors lie in the CPU's memory and yet do not mix with the CPU's.

`pytest -m gpu --apart` runs the tests of a GPU on it. As on a GPU, an operation on tensors of two devices is an error.
So are a product of integers, a draw from the CPU's generator and a numpy array of a tensor. It shows that everything
lies where it should, not what a GPU's kernels compute. Torch's hook for backends in Python, which makes it, is
experimental: https://docs.pytorch.org/docs/stable/accelerator/index.html
"""

import contextlib
import types

import torch
from torch.utils import _pytree as tree
from torch.utils import backend_registration

NAME = "apart"
MOVES = ("aten::_to_copy", "aten::copy_", "aten::_copy_from")  # what may take tensors of two devices
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_")  # whose indices may lie on the CPU
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::mv", "aten::convolution")
HALF = ("linear", "matmul", "mm", "bmm", "addmm", "conv2d")  # what autocast computes in half precision
kept = []  # torch forgets a registration with the object that made it


class Apart(torch.Tensor):
    """A tensor of the device; `inner` holds its values on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        strides = {"strides": inner.stride()} if inner.layout == torch.strided else {"layout": inner.layout}
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=f"{NAME}:0", **strides)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, function, _, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def __reduce_ex__(self, protocol):
        return moved, (self.detach().cpu(), self.requires_grad, is_parameter(self))

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), moved(self.detach().clone(), self.requires_grad, is_parameter(self)))

    def __repr__(self):
        return f"{NAME}({self.inner!r})"

    def __format__(self, wanted):
        return format(self.inner, wanted)

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        return self.inner.tolist()

    def numpy(self, *_):
        raise TypeError("a tensor of another device has no numpy array; copy it with cpu()")

    __array__ = numpy


def is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def moved(tensor: torch.Tensor, requires_grad: bool, parameter: bool) -> torch.Tensor:
    """A tensor on the device, as a parameter if it was one."""
    tensor = tensor.to(NAME)
    return torch.nn.Parameter(tensor, requires_grad) if parameter else tensor.requires_grad_(requires_grad)


def tensors(*values) -> list[torch.Tensor]:
    return [value for value in tree.tree_leaves(values) if isinstance(value, torch.Tensor)]


def check(name: str, args: tuple, kwargs: dict) -> None:
    """Raise what a GPU would raise for an operation."""
    found = tensors(args, kwargs)
    ours = [each for each in found if isinstance(each, Apart)]
    others = [each for each in found if not isinstance(each, Apart) and each.dim()]
    if name in INDEXED and ours and isinstance(args[0], Apart):
        others = [each for each in tensors(args[2:]) if not isinstance(each, Apart) and each.dim()]
    if ours and others and name not in MOVES:
        raise RuntimeError(f"{name}: tensors of two devices, {NAME} and cpu {[tuple(each.shape) for each in others]}")
    if ours and name in PRODUCTS and not all(each.is_floating_point() for each in ours):
        raise NotImplementedError(f"{name}: a GPU has no product of integers")
    if ours and any(isinstance(value, torch.Generator) for value in tree.tree_leaves((args, kwargs))):
        raise RuntimeError(f"{name}: the generator is the CPU's")


def run(function, args: tuple, kwargs: dict):
    """Run an operation on the CPU, its results on the device unless it moves them elsewhere."""
    check(function._schema.name, args, kwargs)
    if function._schema.name in MOVES[1:]:
        target, source = args[:2] if function._schema.name == "aten::copy_" else args[1::-1]
        inside(target).copy_(inside(source))
        return target
    wrapped = {id(each.inner): each for each in tensors(args, kwargs) if isinstance(each, Apart)}
    device = kwargs.get("device")
    plain = {key: value for key, value in tree.tree_map(inside, kwargs).items() if key != "pin_memory"}
    result = function(*tree.tree_map(inside, args), **plain)
    if device is not None and torch.device(device).type != NAME:
        return result
    return tree.tree_map(lambda each: outside(each, wrapped), result)


def outside(value, wrapped: dict[int, Apart]):
    """A result on the device: what was changed in place is the tensor that it was."""
    if isinstance(value, Apart) or not isinstance(value, torch.Tensor):
        return value
    return wrapped[id(value)] if id(value) in wrapped else Apart(value)


def inside(value):
    """The value with tensors and devices replaced by the CPU's."""
    if isinstance(value, Apart):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def install() -> None:
    """Make the device known to torch, and what Global.device: gpu means."""
    same = {name: lambda *_, value=value: value for name, value in MODULE.items()}
    backend_registration._setup_privateuseone_for_python_backend(NAME, types.SimpleNamespace(**same))
    library, fallback = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    for name, function in factories():
        library.impl(name, made_by(function), "PrivateUse1")
    library.impl("_copy_from", lambda source, target, _=False: run(COPY, (target, source), {}), "PrivateUse1")
    library.impl("_local_scalar_dense", lambda each: each.inner.item(), "PrivateUse1")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in HALF:
        library.impl(name, in_half(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
    kept.extend([library, fallback])
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.serialization.add_safe_globals([moved])
    as_subclass = torch.Tensor.as_subclass
    torch.Tensor.as_subclass = lambda self, kind: self if kind is Apart else as_subclass(self, kind)

    from recnb.recipe import learner

    learner.pick_device = lambda name: torch.device("cpu" if name == "cpu" else NAME)


COPY = torch.ops.aten.copy_.default
MODULE = {
    "is_available": True,
    "is_initialized": True,
    "_is_in_bad_fork": False,
    "device_count": 1,
    "current_device": 0,
    "manual_seed_all": None,
    "get_amp_supported_dtype": [torch.float16, torch.bfloat16],
    "device": contextlib.nullcontext(),
}


def factories():
    """Yield every operation that makes a tensor of none, by its name: nothing but the device says whose it is."""
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full.partition("::")
        packet, _, overload = name.partition(".")
        function = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if namespace != "aten" or function is None or any(word in name for word in ("sparse", "quantized", "nested")):
            continue
        kinds = {argument.name: str(argument.type) for argument in function._schema.arguments}
        makes = [str(each.type) for each in function._schema.returns] == ["Tensor"]
        if makes and "device" in kinds and not any("Tensor" in kind for kind in kinds.values()):
            yield name, function


def made_by(function):
    def kernel(*args, **kwargs):
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{function}: the generator is the CPU's")
        return Apart(function(*args, **{**kwargs, "device": torch.device("cpu"), "pin_memory": None}))

    return kernel


def in_half(function):
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def kernel(*args):
        dtype = torch.get_autocast_dtype(NAME)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return function(*(each.to(dtype) if isinstance(each, torch.Tensor) else each for each in args))

    return kernel
