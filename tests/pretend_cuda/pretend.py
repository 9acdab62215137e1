"""A CUDA device that is not there: every op of the product traced on tensors of device cuda that have shapes,
dtypes, strides and no data (torch's FakeTensorMode, which knows the layouts that CUDA's ops return).

Import it before torch (pytest -p pretend): a small library, compiled once, tells torch of eight devices. Then

    with pretend.cuda() as meter:
        net = pretend.model(arch)
        net(tokens, None, targets).backward()
    meter.peak, meter.launches.total(), meter.waits

Triton's launches check their arguments and count; whatever makes the host wait for the device counts as a
wait, and gives ones, for there is no data; an op that mixes devices raises, as on a GPU.
"""

import collections
import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import types
import weakref
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def load_guard():
    """Compiles guard.cpp against the torch that is installed (seconds, once), and loads it."""
    home = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    version = (home / "version.py").read_text()
    source = (HERE / "guard.cpp").read_text()
    key = hashlib.sha256((source + version).encode()).hexdigest()[:16]
    library = HERE / "__pycache__" / f"guard-{key}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", "-O1", f"-I{home}/include",
                        HERE / "guard.cpp", "-o", unfinished, f"-L{home}/lib", "-ltorch_cpu", "-lc10"],
                       check=True)
        os.replace(unfinished, library)
    ctypes.CDLL(home / "lib" / "libtorch_cpu.so", ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)


if "torch" in sys.modules:
    raise ImportError("pretend must be imported before torch")
load_guard()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed._tools.fake_collectives  # noqa: E402, F401  (what collectives return)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

sys.path.insert(0, str(ROOT))

DEVICE = torch.device("cuda", 0)

# -- torch.cuda and Triton, as far as the product calls them ------------------------------------------------

class Event:
    """An event that has always happened."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        return self

    def wait(self, *args):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1.0


class Stream:
    """A stream whose work is done."""

    def __init__(self, *args, **kwargs):
        self.device = DEVICE

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return Event()

    def synchronize(self):
        pass

    def is_capturing(self):
        return False


def patched_cuda(patch):
    """Answers of torch.cuda that a build without CUDA cannot give: one H100 of 80 GB."""
    properties = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0,
                                       total_memory=85_000_000_000, multi_processor_count=132)
    default = Stream()
    answers = dict(
        Stream=Stream,
        Event=Event,
        stream=lambda stream: contextlib.nullcontext(),
        current_stream=lambda *args: default,
        default_stream=lambda *args: default,
        current_device=lambda: 0,
        device_count=lambda: 8,
        set_device=lambda device: None,
        is_available=lambda: True,
        is_initialized=lambda: True,
        is_current_stream_capturing=lambda: False,
        get_device_properties=lambda *args: properties,
        get_device_capability=lambda *args: (9, 0),
        get_device_name=lambda *args: properties.name,
        mem_get_info=lambda *args: (60 << 30, 80 << 30),
        max_memory_allocated=lambda *args: 0,
        empty_cache=lambda: None,
        synchronize=lambda *args: None,
        _lazy_init=lambda: None,
    )
    for name, answer in answers.items():
        patch(torch.cuda, name, answer)
    patch(torch.accelerator, "current_stream", lambda *args: default)


def patched_triton(patch, meter):
    """Launches that check what they point at, and count. torch.addmm into an fp32 output, which fake tensors
    lack, likewise."""
    from triton.runtime.jit import JITFunction

    import kernels.logprob
    import kernels.loss

    def launch(kernel, *args, grid, warmup, **kwargs):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and not tensor.is_cuda:
                raise ValueError(f"{kernel.__name__}: a pointer to a {tensor.device.type} tensor")
        meter.launches[f"triton {kernel.__name__}"] += 1

    def add_product(dw, dx, h):
        assert dw.shape == (dx.shape[1], h.shape[1]) and dw.device == dx.device == h.device
        meter.launches["addmm"] += 1

    patch(JITFunction, "run", launch)
    patch(kernels.loss, "add_product", add_product)
    patch(kernels.logprob, "add_product", add_product)


def patched_swaps(patch):
    """torch swaps no tensor that is referred to weakly; to fake ones their mode keeps such references."""
    patch(torch.utils, "weakref", types.SimpleNamespace(getweakrefs=lambda tensor: []))


def patched_inference(patch):
    """torch.inference_mode as torch.no_grad: fake tensors cannot become parameters in it."""
    def enter(mode):
        mode.instead = torch.no_grad()
        mode.instead.__enter__()

    patch(torch.inference_mode, "__enter__", enter)
    patch(torch.inference_mode, "__exit__", lambda mode, *exception: mode.instead.__exit__(*exception))


def patched_factories(patch):
    """torch.tensor and torch.as_tensor copy to the device out of the dispatcher's sight: here by .to()."""
    def on_device(make):
        def made(data, *args, device=None, **kwargs):
            if device is None or torch.device(device).type != "cuda" or isinstance(data, torch.Tensor):
                return make(data, *args, device=device, **kwargs)
            tensor = make(data, *args, **kwargs)
            tensor.constant = None                        # else the copy is made of its value, on the device
            return tensor.to(device)
        return made

    patch(torch, "tensor", on_device(torch.tensor))
    patch(torch, "as_tensor", on_device(torch.as_tensor))


def patched_reads(patch, meter):
    """Ways to the host that pass by the dispatcher."""
    def tolist(tensor):
        if tensor.is_cuda:
            meter.wait("tolist")
        return np.ones(tensor.shape).tolist()

    def numpy(tensor):
        if tensor.is_cuda:
            raise TypeError("can't convert a cuda tensor to numpy")
        return np.ones(tensor.shape, dtype=str(tensor.dtype).removeprefix("torch."))

    patch(FakeTensor, "tolist", tolist)
    patch(FakeTensor, "numpy", numpy)
    patch(FakeTensor, "pin_memory", lambda tensor, *args: tensor)


# -- the meter -----------------------------------------------------------------------------------------------

# Ops whose result depends on data: the host waits for the device.
WAITING = {"nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_consecutive", "unique_dim",
           "repeat_interleave.Tensor"}
# Ops that only make another view, and launch nothing.
VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "select", "slice", "split", "unbind",
         "split_with_sizes", "unsqueeze", "squeeze", "as_strided", "alias", "detach", "diagonal", "unfold",
         "_reshape_alias", "lift_fresh", "view_as_real", "empty", "empty_like", "new_empty", "empty_strided",
         "new_empty_strided", "_local_scalar_dense", "set_", "resize_", "split_with_sizes_copy_out", "chunk"}


class Meter(TorchDispatchMode):
    """Of everything that runs within it: live bytes of the device's memory and their peak, kernels launched,
    waits of the host, collectives' bytes."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0                          # bytes
        self.launches = collections.Counter()
        self.waits = collections.Counter()                # by the line of the product that waits
        self.moved = collections.Counter()                # bytes of collectives, by kind and dtype
        self._live = {}                                   # storage: its bytes
        self._resize = torch.UntypedStorage.resize_

    # -- memory --------------------------------------------------------------------------------------------

    def _hold(self, tensor):
        tensor = getattr(tensor, "_local_tensor", tensor)                  # a DTensor's
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live:
            weakref.finalize(storage, self._release, storage._cdata)
        self._set(storage._cdata, storage.nbytes())

    def _set(self, key, size):
        self.now += size - self._live.get(key, 0)
        self._live[key] = size
        self.peak = max(self.peak, self.now)

    def _release(self, key):
        self.now -= self._live.pop(key, 0)

    # -- what the host waits for ---------------------------------------------------------------------------

    def wait(self, what):
        """Counts a wait by the line of the product that waits."""
        self.waits[f"{what} at {self._where()}"] += 1

    def _where(self):
        """The line of the product nearest to what runs."""
        frame = sys._getframe(2)
        while frame:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and not path.is_relative_to(HERE) and ".venv" not in path.parts:
                return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
            frame = frame.f_back
        return "a test"

    # -- ops -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        space, name = op._schema.name.split("::")
        if space == "c10d":
            self._count_collective(name, args)
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            if args[0].is_cuda:
                self.wait("item")
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if name in WAITING or str(op).removeprefix("aten.") in WAITING:
            self.wait(name)
        self._refuse_mixed_indices(name, args)
        out = op(*args, **kwargs)
        self._count_copy(name, args, kwargs, out)
        written = tensors_in(out if op._schema.returns else args)
        if name not in VIEWS and any(tensor.is_cuda for tensor in written):
            self.launches[name] += 1
        for tensor in tensors_in(out):
            self._hold(tensor)
        return out

    def _count_collective(self, name, args):
        """Bytes that a rank puts in or gets out, whichever are more."""
        sent = max(tensors_in(args), key=lambda tensor: tensor.nbytes, default=None)
        if sent is not None:
            self.moved[name.strip("_"), str(sent.dtype).removeprefix("torch.")] += sent.nbytes

    def _refuse_mixed_indices(self, name, args):
        """torch indexes a device's tensor by a host's, and copies it there at every call."""
        if name.startswith("index") and len(args) > 1:
            devices = {tensor.device.type for tensor in tensors_in(args[:2])}
            if {"cpu", "cuda"} <= devices:
                raise RuntimeError(f"{name} mixes devices at {self._where()}")

    def _count_copy(self, name, args, kwargs, out):
        if name not in ("_to_copy", "copy_"):
            return
        target, source = (args[0], args[1]) if name == "copy_" else (out, args[0])
        waits = not kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        kinds = source.device.type, target.device.type
        if kinds == ("cuda", "cpu") or (kinds == ("cpu", "cuda") and waits):
            self.wait("copy")

    def __enter__(self):
        def resize(storage, size):
            resized = self._resize(storage, size)
            if storage._cdata in self._live:
                self._set(storage._cdata, storage.nbytes())
            return resized

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *exception):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*exception)


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# -- how tests use it ---------------------------------------------------------------------------------------

@contextlib.contextmanager
def cuda():
    """Within it there is a GPU, without data; gives the Meter of what runs."""
    undo = []

    def patch(owner, name, value):
        undo.append((owner, name, vars(owner).get(name, undo)))
        setattr(owner, name, value)

    meter = Meter()
    patched_cuda(patch)
    patched_triton(patch, meter)
    patched_swaps(patch)
    patched_inference(patch)
    patched_factories(patch)
    patched_reads(patch, meter)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), meter:
            yield meter
    finally:
        for owner, name, value in reversed(undo):
            if value is undo:                             # it was inherited, or absent
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextlib.contextmanager
def ranks(replicate, shard):
    """A process group of replicate * shard ranks, of which this is the first: a runtime.Ranks whose
    collectives move nothing. Around `cuda()`, not within it."""
    from runtime import Ranks
    world = replicate * shard
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        mesh = dist.init_device_mesh("cuda", (replicate, shard), mesh_dim_names=("replicate", "shard"))
        yield Ranks(0, world, DEVICE, mesh, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def model(arch, dtype=torch.bfloat16):
    """A whole model on the device, its weights without data."""
    from model import Model
    with torch.device("cuda"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return Model(arch)
        finally:
            torch.set_default_dtype(default)


def passes(model, batch, lengths, ranks):
    """The passes of a step of midtrain.main's loop: the sum of their losses. batch: tokens, docs and targets
    (n, T); lengths: of the documents of one pass, which say how many rows that is."""
    tokens, docs, targets = batch
    rows = sum(lengths) // tokens.shape[1]
    loss_sum = torch.zeros((), device=ranks.device)
    for first in range(0, len(tokens), rows):
        part = slice(first, first + rows)
        model.set_requires_all_reduce(first + rows >= len(tokens))
        loss = model(tokens[part], docs[part], targets[part], lengths) / 100
        loss.backward()
        loss_sum += loss.detach()
    return loss_sum


def update(model, optimizer, loss_sum, ranks):
    """The update of a step of midtrain.main's loop; the loss of all ranks, still on the device."""
    from runtime import grad_norm, reduce_vectors, scale_gradients
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss_sum = loss_sum.double()
    dist.all_reduce(loss_sum)
    reduce_vectors(parameters)
    norm = grad_norm(parameters, ranks.mesh)
    scale_gradients(parameters, 1 / norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss_sum


def training_step(model, optimizer, batch, lengths, ranks):
    """Both."""
    update(model, optimizer, passes(model, batch, lengths, ranks), ranks)


def decode_steps(model, prompts, n, new_tokens, meter, **options):
    """Steps of the embedded engine until n samples of each prompt have new_tokens, the replay of a graph
    counted as one launch. Yields (launches, waits) of each."""
    from engines.contract import make_requests
    from engines.embedded import Batch, TorchEngine
    engine = TorchEngine(model, progress=False, **options)

    def capture(function):
        function()
        return lambda: meter.launches.update(graph=1)

    engine.capture = lambda: capture
    requests, stops = make_requests(engine, prompts, n=n, max_new_tokens=new_tokens, stop=[], seed=0,
                                    temperature=1.0, top_p=1.0, keys=None, first=0)
    batch = Batch(engine, engine.allocate(requests), requests, stops, 1.0, 1.0, None)
    while batch.unfinished:
        meter.launches.clear()
        meter.waits.clear()
        batch.step()
        yield meter.launches.total(), meter.waits.total()
    assert all(len(sample.tokens) == new_tokens for request in requests for sample in request.samples)
