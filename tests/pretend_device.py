"""Lets code run "on CUDA" or "on MPS" in a CPU-only build of torch, so that device mistakes show without a GPU.

    with pretend("cuda") as gpu:                                     # or "mps"
        ...                                                          # the code; torch.cuda.is_available() is True here
        assert not gpu.syncs                                         # a Counter of waits for the device; gpu.reset()

    python tests/pretend_device.py cuda v2/2.2.py --mini ...         # a whole script

A tensor on the pretended device is a subclass that wraps a CPU tensor: it says `cuda:0`, every operator computes on the
CPU tensors within, and what a real device refuses is refused with torch's own kind of error:
- operators that mix the device's tensors with the CPU's (but for scalars, copies and indices, as on a device);
- `.numpy()`, `np.asarray` and the like of a device tensor; a generator of the other device; use after a fork;
- float64 on MPS, and bfloat16 there with `bf16=False` (macOS before 14);
- reading on the CPU what `.to("cpu", non_blocking=True)` has not brought yet: it holds garbage until the next wait.
The device has random numbers of its own. Autocast, GradScaler, fused optimizers, checkpoints and Accelerate work.

It cannot see what lies in the device's kernels: their rounding, dtypes that they lack, speed, memory, layouts, launch
errors; nor streams that race each other, CUDA graphs, `torch.compile`, `pin_memory=True` of factories, several devices.
A parameter cannot move to the device while a graph holds it; backward passes belong in the thread that pretends, since
torch keeps a queue only for the devices that it saw at its first one. It reaches into torch's own tables (Linux, torch 2.13).
"""

import collections
import contextlib
import copy
import ctypes
import functools
import os
import runpy
import sys
import types
from typing import NamedTuple
from unittest import mock

import safetensors.torch
import torch
import torch._dynamo  # optimizers import it, and it wants to see torch as it is

# It reaches into torch's own tables, so it is kept to the build that it was written for.
POSSIBLE = sys.platform == "linux" and torch.version.cuda is None and torch.__version__.startswith("2.13.")

aten = torch.ops.aten
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_)
SCALARS = (*INDEXED, aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_, aten.index_fill, aten.index_fill_)
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_dim,
         aten.unique_consecutive, aten.bincount)  # their result, or its size, goes to the host
PRODUCTS = (aten.convolution, aten.convolution_backward, aten.mm, aten.bmm, aten.addmm, aten.baddbmm)
RANDOM = ("randn", "rand", "randint", "randperm", "normal", "bernoulli", "multinomial")  # and the methods that fill
FILLING = ("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "multinomial", "bernoulli")
data_of = torch.Tensor.data  # torch's own descriptor, also while another one stands in its place


class Device:
    """The pretended device: its name, its random numbers, and how often the host has waited for it.

    `syncs` counts under the name of an operator whose result, or its size, the host must know (`.item()` is
    "_local_scalar_dense"), "to host" and "to device" for copies without `non_blocking`, and "synchronize".
    """

    def __init__(self, kind: str, bf16: bool):
        self.kind, self.bf16, self.process = kind, bf16, os.getpid()
        self.syncs, self.coming, self.generators = collections.Counter(), [], {}
        self.generator = self.new_generator()

    def reset(self):
        self.syncs.clear()

    def new_generator(self):
        generator = DeviceGenerator()
        self.generators[generator._cdata] = generator  # what operators see is another Python object of the same address
        return generator

    def wait(self, why: str = "synchronize"):
        """The host waits: what was being copied to it has arrived."""
        self.syncs[why] += 1
        for host, value in self.coming:
            host.copy_(value)
        self.coming.clear()

    def check(self):
        if os.getpid() != self.process:
            raise RuntimeError(f"Cannot re-initialize {self.kind.upper()} in forked subprocess. To use "
                               f"{self.kind.upper()} with multiprocessing, you must use the 'spawn' start method")

    def empty(self, size, *strides, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        """What torch's own factories, and copies to the device, start from."""
        self.check()
        if strides:
            return DeviceTensor(torch.empty_strided(size, *strides, dtype=dtype), self)
        return DeviceTensor(torch.empty(size, dtype=dtype, memory_format=memory_format), self)


class DeviceGenerator(torch.Generator):
    @property
    def device(self):
        return torch.device(now.kind, 0)


class DeviceTensor(torch.Tensor):
    """`inner` is the CPU tensor with the values; it has this one's shape, strides and offset."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, owner: Device):
        if owner.kind == "mps" and inner.dtype in (torch.float64, torch.complex128):
            dtype = str(inner.dtype)[6:]
            raise TypeError(f"Cannot convert a MPS Tensor to {dtype} dtype as the MPS framework doesn't support {dtype}. "
                            "Please use float32 instead.")
        if owner.kind == "mps" and inner.dtype == torch.bfloat16 and not owner.bf16:
            raise TypeError("MPS BFloat16 is only supported on MacOS 14 or newer")
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(owner.kind, 0))
        self.inner, self.owner = inner, owner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, _, args=(), kwargs=None):
        with torch._C._DisableAutocast():  # a CPU autocast around this does not concern the device
            return compute(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            if not self.is_leaf:
                raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")
            twin = DeviceTensor(copy.deepcopy(self.inner, memo), self.owner)
            if isinstance(self, torch.nn.Parameter):
                twin = torch.nn.Parameter(twin)
            memo[id(self)] = twin.requires_grad_(self.requires_grad)
            twin.grad = copy.deepcopy(self.grad, memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # in checkpoints: a tensor on the device, which `map_location` may lay elsewhere
        self.owner.wait("to host")
        if isinstance(self, torch.nn.Parameter):
            return torch._utils._rebuild_parameter, (self.detach(), self.requires_grad, collections.OrderedDict())
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, (
            self.inner, self.dtype, str(self.device), self.requires_grad)

    def numpy(self, *, force=False):
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
                        "host memory first.")

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"{self.inner}, on {self.device}"

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self):
        return self.inner.data_ptr()

    def record_stream(self, stream):
        pass


def tensors_in(values):
    """The tensors among an operator's arguments, which are tensors, lists of them, or neither."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, torch.Tensor)]
    return found


class Facts(NamedTuple):
    """What an operator's declaration tells."""

    composite: bool  # made of other operators
    random: bool  # draws random numbers
    scalars: bool  # takes tensors of the CPU that are one number
    indexed: bool
    copies: bool
    waits: bool
    product: bool
    written: list[bool]  # which arguments it writes


@functools.cache
def facts(func) -> Facts:
    packet, name = func.overloadpacket, func._schema.name
    return Facts(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        torch.Tag.nondeterministic_seeded in func.tags,
        torch.Tag.pointwise in func.tags or packet in SCALARS or name.startswith("aten::_foreach_"),
        packet in INDEXED, packet in (aten.copy_, aten._foreach_copy_), packet in WAITS, packet in PRODUCTS,
        [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments])


def check_mixture(func, fact: Facts, args, kwargs, host: list):
    """Raise as a device would where the operator gets the tensors `host` of the CPU beside the device's."""
    if fact.indexed and not isinstance(args[0], DeviceTensor):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    indices = {id(i) for i in args[1]} if fact.indexed else ()
    written = [a for a, w in zip(args, fact.written, strict=False) if w]
    wrong = [t for t in host if (t.dim() or not fact.scalars) and id(t) not in indices]
    wrong += [t for t in tensors_in([*written, kwargs.get("out")]) if not isinstance(t, DeviceTensor)]
    if wrong:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {now.kind}:0 and "
                           f"cpu! (in {func}; the CPU's tensor has the shape {tuple(wrong[0].shape)})")


def inner(value):
    if isinstance(value, DeviceTensor):
        return value.inner
    return type(value)(map(inner, value)) if isinstance(value, (list, tuple)) else value


def of_type(value, dtype: torch.dtype):
    if isinstance(value, torch.Tensor):
        return value.to(dtype)
    return type(value)(of_type(v, dtype) for v in value) if isinstance(value, (list, tuple)) else value


def outer(value, owner: Device, known: dict):
    if isinstance(value, torch.Tensor):
        return known[id(value)] if id(value) in known else DeviceTensor(value, owner)
    return type(value)(outer(v, owner, known) for v in value) if isinstance(value, (list, tuple)) else value


def compute(func, args, kwargs):
    """One operator with a device tensor among its arguments."""
    fact = facts(func)
    if func.overloadpacket is aten.scaled_dot_product_attention:
        return attention(*args, **kwargs)
    if fact.composite:  # in inference mode they come whole
        return func.decompose(*args, **kwargs)
    given = tensors_in([*args, *kwargs.values()])
    ours = [t for t in given if isinstance(t, DeviceTensor)]
    host = [t for t in given if not isinstance(t, DeviceTensor)] if len(ours) < len(given) else []
    owner = ours[0].owner
    owner.check()
    if host and not fact.copies:
        check_mixture(func, fact, args, kwargs, host)
    own_numbers = fact.random
    if fact.random:
        for generator in (a for a in (*args, *kwargs.values()) if isinstance(a, torch._C.Generator)):
            own_numbers = False
            if generator._cdata not in owner.generators:
                raise RuntimeError(f"Expected a '{owner.kind}' device type for generator but found 'cpu'")

    plain = {k: inner(v) for k, v in kwargs.items()} if kwargs else kwargs
    off = plain.get("device") is not None and plain["device"].type == "cpu"
    if plain.get("device"):
        plain |= {"device": torch.device("cpu"), "pin_memory": False} if "pin_memory" in plain else {"device": "cpu"}
    to_host = off and func.overloadpacket is aten._to_copy or fact.copies and not isinstance(given[0], DeviceTensor)
    late = (to_host or fact.copies) and (plain.get("non_blocking") or any(a is True for a in args[2:]))
    if fact.waits or fact.indexed and any(i.dtype in (torch.bool, torch.uint8) for i in tensors_in(args[1:2])):
        owner.wait(func.overloadpacket.__name__)
    elif to_host and not late:
        owner.wait("to host")
    elif host and not late and (fact.copies or fact.indexed and any(t.dim() for t in host)):
        owner.wait("to device")

    if fact.product and ours[0].dtype in (torch.bfloat16, torch.float16) and not any(fact.written):
        # summed in fp32 and rounded once, as devices do; most CPUs' own kernels take 10 to 30 times as long
        result = of_type(func(*of_type(inner(args), torch.float32), **plain), ours[0].dtype)
        return outer(result, owner, {})
    with own_random_numbers(owner) if own_numbers else contextlib.nullcontext():
        result = func(*map(inner, args), **plain)
    if to_host and late:
        for value in tensors_in([result]):
            owner.coming.append((value, value.clone()))
            value.fill_(float("nan") if value.is_floating_point() else 77)
    if off:
        return result
    if not any(fact.written):
        return outer(result, owner, {})
    for t in ours:  # `out=` and resizing operators: the shell follows what it holds
        if (t.shape, t.stride(), t.storage_offset()) != (t.inner.shape, t.inner.stride(), t.inner.storage_offset()):
            data_of.__set__(t, DeviceTensor(t.inner, t.owner))
    return outer(result, owner, {id(inner(t)): t for t in given})


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """The formula: what torch would choose has kernels on a device only."""
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]


@contextlib.contextmanager
def own_random_numbers(owner: Device):
    before = torch.default_generator.get_state()
    torch.default_generator.set_state(owner.generator.get_state())
    try:
        yield
    finally:
        owner.generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(before)


now: Device | None = None


class AnyGenerator(type):
    def __instancecheck__(cls, value):
        return isinstance(value, torch._C.Generator)


class Generator(metaclass=AnyGenerator):
    """`torch.Generator` while a device is pretended."""

    def __new__(cls, device="cpu"):
        return now.new_generator() if torch.device(device).type == now.kind else torch._C.Generator(device)


def of_one_device(function):
    """A function that draws random numbers on the CPU refuses the device's generator (the reverse `compute` sees)."""
    @functools.wraps(function)
    def checked(*args, **kwargs):
        result = function(*args, **kwargs)
        if isinstance(kwargs.get("generator"), DeviceGenerator) and not isinstance(result, DeviceTensor):
            raise RuntimeError(f"Expected a 'cpu' device type for generator but found '{now.kind}'")
        return result
    return checked


def set_data(tensor, value):
    """`tensor.data = value`, also from one device to the other."""
    if isinstance(tensor, DeviceTensor) == isinstance(value, DeviceTensor):
        data_of.__set__(tensor, value)
        if isinstance(tensor, DeviceTensor):
            tensor.inner = value.inner
        return
    twin, grad, tensor.grad = value.detach(), tensor.grad, None
    if isinstance(tensor, torch.nn.Parameter):
        twin = torch.nn.Parameter(twin, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, twin.requires_grad_(tensor.requires_grad))
    if grad is not None:
        set_data(grad, grad.to(tensor.device))
        tensor.grad = grad


class Moment:
    """Stands for streams and events: here everything has happened when a call returns, but for copies to the host."""

    def __init__(self, *_, **__): ...

    def synchronize(self):
        now.wait()

    def query(self):
        return True

    def is_capturing(self):
        return False

    def elapsed_time(self, other):
        return 1.0

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    record = wait = wait_stream = wait_event = record_event = lambda self, *_: self


def patches(kind: str, bf16: bool):
    """(where, name, what stands there while the device is pretended)."""
    compatible, load = torch._has_compatible_shallow_copy_type, torch.load

    def nothing(*_, **__): ...

    def always(value):
        return lambda *_, **__: value

    def loaded(*args, map_location=None, **kwargs):
        if not isinstance(map_location, (str, torch.device)) or torch.device(map_location).type != kind:
            return load(*args, map_location=map_location, **kwargs)
        return torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.to(map_location), load(*args, map_location="cpu", **kwargs))

    def pinned(tensor, *_):
        twin = tensor.detach().clone()
        twin.pinned = True
        return twin

    def file_loaded(path, device="cpu", **kwargs):  # safetensors would lay the tensors on the device itself
        return {name: tensor.to(device) for name, tensor in load_file(path, **kwargs).items()}

    module, memory, load_file = getattr(torch, kind), 12 << 30, safetensors.torch.load_file
    yield safetensors.torch, "load_file", file_loaded
    yield torch, "Generator", Generator
    yield torch, "load", loaded
    yield torch, "_has_compatible_shallow_copy_type", lambda a, b: isinstance(b, DeviceTensor) or compatible(a, b)
    yield torch.Tensor, "data", property(data_of.__get__, set_data)
    yield torch.Tensor, "pin_memory", pinned
    yield torch.Tensor, "is_pinned", lambda tensor, *_: getattr(tensor, "pinned", False)
    for where, names in ((torch, RANDOM), (torch.Tensor, FILLING)):
        yield from ((where, name, of_one_device(getattr(where, name))) for name in names)
    for name, value in {"is_available": True, "device_count": 1, "current_device": 0, "current_device_index": 0,
                        "current_accelerator": torch.device(kind), "is_initialized": True, "_is_in_bad_fork": False,
                        "is_current_stream_capturing": False,
                        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0,
                        "current_allocated_memory": 0, "driver_allocated_memory": 0, "recommended_max_memory": memory,
                        "memory_stats": {}, "mem_get_info": (memory, memory), "get_memory_info": (memory, memory),
                        "_exchange_device": 0, "_maybe_exchange_device": 0, "get_device_name": f"pretended {kind}",
                        "get_device_capability": (8, 6) if bf16 else (7, 5), "current_stream": Moment(),
                        "default_stream": Moment(), "get_device_properties": types.SimpleNamespace(
                            name=f"pretended {kind}", major=8 if bf16 else 7, minor=6 if bf16 else 5, total_memory=memory,
                            multi_processor_count=28)}.items():
        yield from ((where, name, always(value)) for where in (module, torch.accelerator) if hasattr(where, name))
    for name, function in {
            "_lazy_init": nothing, "set_device": nothing, "set_device_index": nothing, "empty_cache": nothing,
            "reset_peak_memory_stats": nothing, "reset_accumulated_memory_stats": nothing, "ipc_collect": nothing,
            "synchronize": lambda *_, **__: now.wait(), "Stream": Moment, "Event": Moment, "stream": always(Moment()),
            "manual_seed": lambda seed: now.generator.manual_seed(seed) and None,
            "manual_seed_all": lambda seed: now.generator.manual_seed(seed) and None,
            "initial_seed": lambda: now.generator.initial_seed(),
            "get_rng_state": lambda *_: now.generator.get_state(), "get_rng_state_all": lambda: [now.generator.get_state()],
            "set_rng_state": lambda state, *_: now.generator.set_state(state) and None,
            "set_rng_state_all": lambda states: [now.generator.set_state(state) for state in states] and None}.items():
        yield from ((where, name, function) for where in (module, torch.accelerator) if hasattr(where, name))
    if kind == "cuda":
        yield torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        yield torch.version, "cuda", "12.8"
    else:
        yield from ((torch.backends.mps, name, always(True)) for name in ("is_available", "is_built", "is_macos_or_newer"))


@functools.cache
def guard() -> tuple[object, int]:
    """A device guard made of Python, as autograd asks one for the current stream, and its address."""
    class Guard(torch._C._acc.DeviceGuard):
        def type_(self):
            return getattr(torch._C._autograd.DeviceType, now.kind.upper())

    made, spare = Guard(), int(torch._C._autograd.DeviceType.PrivateUse1)
    torch._C._acc.register_python_privateuseone_device_guard(made)
    address, guards()[spare] = guards()[spare], None  # torch takes it for another device only: the caller lays it where due
    return made, address


def guards():
    """torch's table of device guards, by device type."""
    return (ctypes.c_void_p * 21).in_dll(ctypes.CDLL(torch._C.__file__), "_ZN3c104impl26device_guard_impl_registryE")


@contextlib.contextmanager
def driver(kind: str):
    """Lets autograd find a driver: a CPU-only build has neither a guard for the device nor a runtime that says it is there.

    The guard is laid into torch's table. The runtime's object gets a copy of its table of functions in which the first
    ones after the destructors (is it built, is it available, is it in use) say yes.
    """
    address, place = guard()[1], int(getattr(torch._C._autograd.DeviceType, kind.upper()))
    find = getattr(ctypes.CDLL(torch._C.__file__), f"_ZN2at6detail{len(kind) + 8}get{kind.upper()}HooksEv")
    find.restype = ctypes.c_void_p
    hooks, word, length = ctypes.c_void_p.from_address(find()), ctypes.sizeof(ctypes.c_void_p), 62
    before = hooks.value
    table = (ctypes.c_void_p * length).from_buffer_copy((ctypes.c_void_p * length).from_address(before - 2 * word))
    table[4:7] = [ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value] * 3  # two words, two destructors
    guards()[place], hooks.value = address, ctypes.addressof(table) + 2 * word
    try:
        if str(torch._C._accelerator_getAccelerator()) != kind:
            raise RuntimeError(f"this torch ({torch.__version__}) cannot be made to believe in a {kind} device")
        yield
    finally:
        guards()[place], hooks.value = None, before


@contextlib.contextmanager
def pretend(kind: str, bf16: bool = True):
    """Within it the process has one device of this `kind`, "cuda" or "mps"; yields the `Device`."""
    global now
    if torch.accelerator.is_available() or now:
        raise RuntimeError("there is a device already")
    library, now = torch.library.Library("aten", "IMPL"), Device(kind, bf16)
    with contextlib.ExitStack() as stack:
        stack.callback(globals().update, now=None)
        stack.callback(library._destroy)
        stack.enter_context(driver(kind))
        for name in ("empty.memory_format", "empty_strided"):
            library.impl(name, now.empty, kind.upper())
        library.impl("scaled_dot_product_attention", attention, f"Autograd{kind.upper()}")
        library.impl("copy_", lambda *given: compute(aten.copy_.default, given, {}), kind.upper())  # within `torch.tensor`
        for where, name, what in list(patches(kind, bf16)):
            stack.enter_context(mock.patch.object(where, name, what))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # backward passes run in their caller's thread
        yield now


if __name__ == "__main__":
    kind, *sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    with pretend(kind) as gpu:
        runpy.run_path(sys.argv[0], run_name="__main__")
