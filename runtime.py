"""What a run is: its ranks and mesh, its folder, its log, its checkpoints.

A run folder holds config.json, source.zip (the scripts as they were run), log.txt, metrics.jsonl and
checkpoints/step_000500/. A checkpoint appears under its name only when complete. A killed run that is started
again with the same command goes on from the newest one, and its metrics.jsonl ends up the same as that of a
run that nothing stopped.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import sys
import time
import zipfile
import zlib
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from cli import InputError, read_lines, write_atomic

# -- ranks -------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Ranks:
    """This process among the others. mesh is (replicate, shard): HSDP by two integers, the paper's 16 x 8."""
    rank: int
    world: int                                            # processes in all
    device: torch.device
    mesh: dist.DeviceMesh
    cpu_group: dist.ProcessGroup                          # gloo, for what is slow: downloads, grading

    def sum(self, *numbers):
        """The numbers, each summed over all ranks in float64: a list of floats. They go from host to host, so
        that no GPU is waited for."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)                             # gloo's part of the group of all
        return sums.tolist()

    @contextlib.contextmanager
    def first_on_node(self):
        """The first rank of each node goes through the body before the others."""
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if not first:
            dist.barrier(group=self.cpu_group)
        yield
        if first:
            dist.barrier(group=self.cpu_group)

    def agree(self, value):
        """Rank 0's value, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
        return values[0]


@contextlib.contextmanager
def join_ranks(device="auto", replicate=1, shard=0, timeout_s=1800):
    """Joins the processes torchrun started, or makes a group of one, and gives its `Ranks`. shard = 0 takes
    world / replicate. InputError on a device that is not there, or a mesh that the processes do not fill."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))

    kind = device
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        why = " (no GPU is visible)" if kind == "cuda" else ""
        raise InputError(f"--device={device}: give auto, cpu or cuda{why}")
    if replicate < 1 or shard < 0 or world % replicate or (shard or world // replicate) * replicate != world:
        raise InputError(f"--replicate={replicate} x --shard={shard or 'rest'} does not make {world} "
                         f"processes; replicate * shard must be the number torchrun starts")

    backend = "gloo"
    torch_device = torch.device("cpu")
    if kind == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch_device = torch.device(kind, local_rank)
        torch.cuda.set_device(torch_device)
    alone = {}
    if "RANK" not in os.environ:                          # not started by torchrun: a group of one
        alone = dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **alone)
    try:
        mesh = dist.init_device_mesh(kind, (replicate, world // replicate),
                                     mesh_dim_names=("replicate", "shard"))
        # public from torch 2.14 on
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        for group in mesh.get_all_groups():               # else NCCL's ten minutes hold in them
            set_timeout(timedelta(seconds=timeout_s), group)
        cpu_group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        yield Ranks(rank, world, torch_device, mesh, cpu_group)
        dist.barrier()                                    # gloo aborts at exit when a rank leaves early
    finally:
        if world == 1 or sys.exc_info()[0] is None:       # else others may still wait in a collective
            dist.destroy_process_group()


def to_device(tensor, device):
    """A tensor of the host's on the device, without waiting for it: what a copy waits for is memory that is
    not pinned."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def shard(model, mesh, dtype, head_in_backward=True):
    """FSDP2 over the mesh, in place: a layer, an untied embedding and an untied head are a unit each.
    Matrices are sharded (fp32 masters, gathered in `dtype`, gradients reduced in fp32). Vectors (norms,
    biases, A_log, D, dt_bias: under 0.02 % of the weights) stay whole and fp32 on every rank, so they are
    never rounded; `reduce_vectors` sums their gradients. Gradients are sums over ranks, not means: divide the
    loss by the global token count. head_in_backward: whether the loss wants the head's weights once more in
    the backward pass; kernels/loss.py does not, kernels/logprob.py does."""
    embed, layers, _, head = model.trunk
    vectors = {p for p in model.parameters() if p.ndim < 2}
    policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32,
                                  cast_forward_inputs=False)
    units = list(layers)
    if head is not None:
        units += [embed, head]
    for unit in [*units, model]:                          # the model last: it takes what is left
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=vectors)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)                        # gloo has no scaled sum
    if head is not None:                                  # what no gradient is made from is not gathered
        embed.set_unshard_in_backward(False)
        head.set_unshard_in_backward(head_in_backward)
    model.compute_dtype = dtype                           # of its passes; the parameters are fp32
    return model


def reshard(model):
    """Makes named_parameters() the sharded masters again. A pass without a backward leaves the outermost
    unit (with a tied head the embedding) gathered, in the dtype of the pass, blind to later changes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reduce_vectors(parameters):
    """Sums the gradients of the unsharded vectors over all ranks, in one collective."""
    gradients = [p.grad for p in parameters if p.ndim < 2 and p.grad is not None]
    if gradients and dist.get_world_size() > 1:
        flat = torch.cat(gradients)
        dist.all_reduce(flat)
        torch._foreach_copy_(gradients, flat.split([gradient.numel() for gradient in gradients]))


def local_gradients(parameters):
    """What this rank holds of the gradients of matrices, and those of vectors, which are whole on every rank:
    two lists of plain tensors, so that one launch reaches many of them."""
    matrices = [p.grad.to_local() for p in parameters if p.ndim >= 2 and p.grad is not None]
    vectors = [p.grad for p in parameters if p.ndim < 2 and p.grad is not None]
    return matrices, vectors


def grad_norm(parameters, mesh):
    """The global L2 norm of reduced gradients, a Python float, the same on every rank to the last bit
    (replicas that clip by an ulp more or less would drift apart). The host waits here for all of a step."""
    def sum_of_squares(gradients):
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=mesh.device_type)
        return torch.stack(torch._foreach_norm(gradients)).double().square().sum()

    matrices, vectors = map(sum_of_squares, local_gradients(parameters))
    dist.all_reduce(matrices)                             # every replica adds each shard once
    return float((matrices / mesh.size(0) + vectors).sqrt())


def scale_gradients(parameters, factor):
    """Multiplies all gradients, in place."""
    for gradients in local_gradients(parameters):
        if gradients:
            torch._foreach_mul_(gradients, factor)


# The folders whose files go into source.zip: all that a run is made by.
ROOMS = ("", "presets", "kernels", "engines", "corpus", "grading", "suite", "reporting", "planning")


# -- the run folder ----------------------------------------------------------------------------------------

class Pending(NamedTuple):
    """A checkpoint that is being written."""
    future: object                                        # done() when this rank's part is on the disk
    step: int
    keep: int                                             # complete checkpoints that stay; 0 = all


class Run:
    """The folder of one run. Only rank 0 writes (checkpoints apart); every method may be called on all
    ranks. In a with statement: an InputError leaves it only when the checkpoint under way is complete."""

    def __init__(self, folder, cfg, ranks, free=(), fixed=(), allow_changed=False):
        """free: keys of cfg that may differ when a run goes on (they cannot change its results); fixed: keys
        that may not even with allow_changed (the checkpoint, or the order of rows, would make no sense).
        InputError, on every rank, if the folder cannot be written or is another config's run."""
        self.folder = folder
        self.ranks = ranks
        self.checkpoints = os.path.join(folder, "checkpoints")
        self._pending = None                              # the checkpoint under way
        self._group = None                                # of the threads that write checkpoints
        self._metrics = None                              # metrics.jsonl, open from its first line on
        self._log = None                                  # log.txt, open on rank 0
        problem = None
        if ranks.rank == 0:
            problem = self._claim(dataclasses.asdict(cfg), free, fixed, allow_changed)
        problem = ranks.agree(problem)
        if problem:
            raise InputError(problem)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, InputError):
            with contextlib.suppress(InputError):         # the first error is the one to read
                self.finish()

    def _claim(self, config, free, fixed, allow_changed):
        """Makes the folder this run's: config.json, source.zip, no half-written checkpoint. Returns what
        speaks against it, or None."""
        path = self.path("config.json")
        try:
            os.makedirs(self.folder, exist_ok=True)
            if os.path.exists(path):
                with open(path) as f:
                    old = dict(json.load(f))
                problem = self._other_config(config, old, free, fixed, allow_changed)
                if problem:
                    return problem
            for name in self._checkpoint_names():         # what a killed run left half-written
                if ".tmp" in name:
                    shutil.rmtree(os.path.join(self.checkpoints, name))
            write_atomic(path, json.dumps(config, indent=2))
            self._save_source()
            self._log = open(self.path("log.txt"), "a")
        except (ValueError, TypeError) as e:
            return (f"--run={self.folder}: {path} is not a saved config ({e}); delete the folder or give "
                    f"another --run")
        except OSError as e:
            return f"--run={self.folder}: cannot write there ({e.strerror}); give another --run"

    def _other_config(self, config, old, free, fixed, allow_changed):
        """What keeps a run of the config `old` from going on with `config`, or None. Before the first
        checkpoint everything may change."""
        if not self._steps():
            return None
        changed = [key for key in config if key not in free and old.get(key) != config[key]]
        changes = {key: f"--{key}={config[key]!r} (was {old.get(key)!r})" for key in changed}
        impossible = [change for key, change in changes.items() if key in fixed]
        if impossible:
            return (f"--run={self.folder} was started with another config: {', '.join(impossible)} cannot "
                    f"change within a run. Take the old values, or another --run "
                    f"(--init={self.folder}/model starts from this one)")
        if changes and not allow_changed:
            return (f"--run={self.folder} was started with another config: "
                    f"{', '.join(changes.values())}. Take the old values, another --run, or "
                    f"--allow_changed=True to go on with the new ones")

    def _save_source(self):
        """source.zip: every file of ROOMS, so that the run says by which code it was made."""
        home = os.path.dirname(os.path.abspath(__file__))
        path = self.path("source.zip")
        with zipfile.ZipFile(path + ".tmp", "w", zipfile.ZIP_DEFLATED) as archive:
            for room in ROOMS:
                for name in sorted(os.listdir(os.path.join(home, room))):
                    if name.endswith((".py", ".json")):
                        archive.write(os.path.join(home, room, name), os.path.join(room, name))
        os.replace(path + ".tmp", path)

    def result(self, name):
        """A finished run's result, a JSON file of its folder, or None."""
        if os.path.exists(self.path(name)):
            with open(self.path(name)) as f:
                return json.load(f)

    def path(self, *names):
        """The path of a file of the folder."""
        return os.path.join(self.folder, *names)

    def log(self, text):
        """Text to the terminal and to log.txt."""
        if self.ranks.rank == 0:
            print(text, flush=True)
            with self.writing("log.txt"):
                self._log.write(text + "\n")
                self._log.flush()

    def metrics(self, **values):
        """One line of metrics.jsonl: the raw numbers behind the step line. JSON has no nan: it becomes
        null."""
        if self.ranks.rank == 0:
            for name, value in values.items():
                if isinstance(value, float) and not math.isfinite(value):
                    values[name] = None
            with self.writing("metrics.jsonl"):
                if self._metrics is None:
                    self._metrics = open(self.path("metrics.jsonl"), "a")
                self._metrics.write(json.dumps(values) + "\n")
                self._metrics.flush()

    def rewind(self, step):
        """Drops what metrics.jsonl says of later than `step` (and that step's evaluation, which is made
        again). Returns the lines that stay, on every rank."""
        path = self.path("metrics.jsonl")
        kept = []
        if self.ranks.rank == 0 and os.path.exists(path):
            for line in read_lines(path):
                if line["step"] < step or (line["step"] == step and "eval" not in line):
                    kept.append(line)
            with self.writing("metrics.jsonl"):
                write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        return self.ranks.agree(kept)

    @contextlib.contextmanager
    def writing(self, what):
        """Turns a full disk, or whatever else keeps `what` from being written, into an InputError."""
        try:
            yield
        except (torch.OutOfMemoryError, dist.DistError):
            raise
        except (dcp.api.CheckpointException, OSError, RuntimeError) as e:  # torch's zip writer: RuntimeError
            free_mb = shutil.disk_usage(self.folder).free / 1e6
            reason = str(e).strip().splitlines()[-1]
            raise InputError(f"--run={self.folder}: {what} could not be written "
                             f"({reason}; {free_mb:,.0f} MB are free); make room and "
                             f"start the run again, it goes on from the last complete checkpoint") from None

    # -- checkpoints ----------------------------------------------------------------------------------------

    def latest(self):
        """The step of the newest complete checkpoint, or None; agreed on by all ranks."""
        newest = None
        if self.ranks.rank == 0:
            newest = max(self._steps(), default=None)
        return self.ranks.agree(newest)

    def _checkpoint_names(self):
        return os.listdir(self.checkpoints) if os.path.isdir(self.checkpoints) else []

    def _steps(self):
        """The steps of the complete checkpoints, oldest first."""
        complete = [name for name in self._checkpoint_names() if re.fullmatch(r"step_\d+", name)]
        return sorted(int(name.removeprefix("step_")) for name in complete)

    def _checkpoint(self, step):
        return os.path.join(self.checkpoints, f"step_{step:06d}")

    def restore(self, state, step):
        """Loads checkpoint `step` into the tensors of `state`; any number of ranks may have written it.
        Returns state. InputError if it is damaged."""
        folder = self._checkpoint(step)
        try:
            self._verify(folder)
            dcp.load(state, checkpoint_id=folder)
        except (dcp.api.CheckpointException, OSError, EOFError, ValueError, RuntimeError,
                zipfile.BadZipFile) as e:
            reason = str(e).strip() or repr(e)
            raise InputError(f"--run={self.folder}: checkpoint {folder} cannot be read "
                             f"({reason.splitlines()[-1]}); delete it to go on from the one before") from None
        return state

    def _verify(self, folder):
        """Every byte against the checksums written with it; the ranks share the work. Of a checkpoint's
        pieces, each a zip of torch.save, torch.load does not look at the checksums."""
        with open(os.path.join(folder, ".metadata"), "rb") as f:
            checksum = zlib.crc32(f.read())
        with open(os.path.join(folder, "metadata.crc32")) as f:
            if checksum != int(f.read()):
                raise ValueError(".metadata is damaged")
        stored = dcp.FileSystemReader(folder).read_metadata().storage_data.values()
        pieces = sorted((piece.relative_path, piece.offset, piece.length) for piece in stored)
        for file, offset, length in pieces[self.ranks.rank::self.ranks.world]:
            with open(os.path.join(folder, file), "rb") as f:
                f.seek(offset)
                if zipfile.ZipFile(io.BytesIO(f.read(length))).testzip():
                    raise ValueError(f"{file} is damaged")

    def save(self, state, step, keep):
        """Starts writing a checkpoint in the background: state is copied now, written while training goes on,
        and appears as step_NNNNNN when every rank is done. keep: how many complete checkpoints stay (0 =
        all)."""
        self.finish()
        if self._group is None:
            # A group of their own: two threads that talk in one would meet each other's messages.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        with self.writing(f"the checkpoint of step {step}"):
            future = dcp.async_save(state, checkpoint_id=self._checkpoint(step) + ".tmp",
                                    process_group=self._group)
            self._pending = Pending(future, step, keep)

    def poll(self):
        """Makes a checkpoint visible once it is complete; never waits."""
        if self._pending is not None and self._pending.future.done():
            self.finish()

    def finish(self):
        """Waits for the checkpoint under way, if any, and makes it visible."""
        if self._pending is None:
            return
        future, step, keep = self._pending
        self._pending = None
        folder = self._checkpoint(step)
        with self.writing(f"the checkpoint of step {step}"):
            future.result()
            if self.ranks.rank == 0:                      # the metadata comes last, after every rank's data
                with open(os.path.join(folder + ".tmp", ".metadata"), "rb") as f:
                    checksum = zlib.crc32(f.read())
                write_atomic(os.path.join(folder + ".tmp", "metadata.crc32"), str(checksum))
                os.rename(folder + ".tmp", folder)
                self.prune(keep)

    def prune(self, keep):
        """Deletes all but the newest `keep` complete checkpoints (0 = keeps all)."""
        if keep and self.ranks.rank == 0:
            for step in self._steps()[:-keep]:
                folder = self._checkpoint(step)
                os.rename(folder, folder + ".tmp")        # half-deleted is never taken for complete
                shutil.rmtree(folder + ".tmp")


# -- hardware ----------------------------------------------------------------------------------------------

# TFLOP/s of dense bf16 products that add in fp32, from the data sheets, by a part of the device's name; of
# names that fit, the longest holds.
PEAK_TFLOPS = {"GB300": 2500, "B300": 2250, "GB200": 2500, "B200": 2250, "GH200": 989, "H200": 989,
               "H200 NVL": 835, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H800": 989, "H20": 148,
               "A100": 312, "A800": 312, "A40": 150, "A30": 165, "A10": 125, "A10G": 70, "L40S": 362,
               "L40": 181, "L4": 121, "RTX 6000 Ada": 364, "RTX 5090": 210, "RTX 4090": 165,
               "RTX 3090 Ti": 80, "RTX 3090": 71}


def peak_tflops(device, dtype):
    """The rate MFU is measured against, TFLOP/s: a GPU's data sheet, nan where none is listed (the run goes
    on, without MFU); a CPU's own matrix product, timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        fitting = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name)]
        if dtype == torch.float32 or not fitting:
            return math.nan
        return float(PEAK_TFLOPS[max(fitting, key=len)])
    n = 1024
    matrix = torch.randn(n, n, dtype=dtype)
    fastest = math.inf
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * n ** 3 / fastest / 1e12
