"""What a run is: its flags, its ranks and mesh, its folder, its log, its checkpoints.

A run folder holds config.json, source.zip (the scripts as they were run), log.txt, metrics.jsonl and
checkpoints/step_000500/. A checkpoint appears under its name only when complete; a killed run started again
with the same command goes on from the newest one, and its metrics.jsonl ends up the same as an uninterrupted
run's.
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
    world: int
    device: torch.device
    mesh: object
    side: object                                          # a gloo group for checkpoints in the background

    def sum(self, *numbers):
        """Numbers summed over all ranks, in float64."""
        t = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(t)
        return t.tolist()

    @contextlib.contextmanager
    def first_on_node(self):
        """The first rank of each node goes through the body before the others."""
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if not first:
            dist.barrier(group=self.side)
        yield
        if first:
            dist.barrier(group=self.side)

    def agree(self, value):
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]


@contextlib.contextmanager
def join_ranks(device="auto", replicate=1, shard=0, timeout_s=1800):
    """Joins the processes torchrun started, or makes a group of one. shard = 0 takes world / replicate."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device={device}: give auto, cpu or cuda"
                         + (" (no GPU is visible)" if kind == "cuda" else ""))
    if replicate < 1 or shard < 0 or world % replicate or (shard or world // replicate) * replicate != world:
        raise InputError(f"--replicate={replicate} x --shard={shard or 'rest'} does not make {world} "
                         f"processes; replicate * shard must be the number torchrun starts")
    where = (torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else
             torch.device("cpu"))
    if kind == "cuda":
        torch.cuda.set_device(where)
    one = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                            timeout=timedelta(seconds=timeout_s), **one)
    try:
        mesh = dist.init_device_mesh(kind, (replicate, world // replicate),
                                     mesh_dim_names=("replicate", "shard"))
        side = dist.new_group(backend="gloo", timeout=timedelta(hours=12))   # downloads and disks are slow
        yield Ranks(rank, world, where, mesh, side)
        dist.barrier()                                    # gloo aborts at exit when a rank leaves early
    finally:
        if world == 1 or sys.exc_info()[0] is None:       # else others may still wait in a collective
            dist.destroy_process_group()


def shard(model, mesh, dtype):
    """FSDP2 over the mesh, in place: a layer, an untied embedding and an untied head are a unit each.
    Matrices are sharded (fp32 masters, gathered in `dtype`, gradients reduced in fp32). Vectors (norms,
    biases, A_log, D, dt_bias: under 0.02 % of the weights) stay whole and fp32 on every rank, so they are
    never rounded; `reduce_vectors` sums their gradients. Gradients are sums over ranks, not means: divide the
    loss by the global token count."""
    embed, layers, _, head = model.trunk
    policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32,
                                  cast_forward_inputs=False)
    common = dict(mesh=mesh, mp_policy=policy, ignored_params={p for p in model.parameters() if p.ndim < 2})
    for unit in layers + ([embed, head] if head is not None else []):
        fully_shard(unit, **common)
    fully_shard(model, **common)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)                        # gloo has no scaled sum
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
    grads = [p.grad for p in parameters if p.ndim < 2 and p.grad is not None]
    if grads and dist.get_world_size() > 1:
        flat = torch.cat(grads)
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part)


def grad_norm(parameters, mesh):
    """The global L2 norm of reduced gradients, a Python float, the same on every rank to the last bit
    (replicas that clip by an ulp more or less would drift apart)."""
    def local(p):
        return p.grad.to_local() if p.ndim >= 2 else p.grad

    def squares(which):
        return sum((torch.linalg.vector_norm(local(p)).double() ** 2 for p in which),
                   torch.zeros((), dtype=torch.float64, device=mesh.device_type))

    parameters = [p for p in parameters if p.grad is not None]
    total = squares([p for p in parameters if p.ndim >= 2])
    dist.all_reduce(total)                                # every shard is there once a replica
    return float((total / mesh.size(0) + squares([p for p in parameters if p.ndim < 2])).sqrt())


# folders whose files go into source.zip: all that a run is made by
ROOMS = ("", "presets", "kernels", "engines", "corpus", "grading", "suite", "reporting")


# -- the run folder ----------------------------------------------------------------------------------------

class Run:
    """The folder of one run. Only rank 0 writes (checkpoints apart); every method may be called on all
    ranks."""

    def __init__(self, folder, cfg, ranks, free=(), fixed=(), allow_changed=False):
        """free: keys of cfg that may differ when a run goes on (they cannot change its results); fixed: keys
        that may not even with allow_changed (the checkpoint, or the order of rows, would make no sense)."""
        self.folder, self.ranks, self.pending = folder, ranks, None
        self.checkpoints, self._metrics, self._log = os.path.join(folder, "checkpoints"), None, None
        config = dataclasses.asdict(cfg)
        problem = self._claim(config, free, fixed, allow_changed) if ranks.rank == 0 else None
        problem = ranks.agree(problem)
        if problem:
            raise InputError(problem)

    def _claim(self, config, free, fixed, allow_changed):
        path = os.path.join(self.folder, "config.json")
        try:
            os.makedirs(self.folder, exist_ok=True)
            if os.path.exists(path):
                with open(path) as f:
                    old = dict(json.load(f))
                changed = {k: f"--{k}={config[k]!r} (was {old.get(k)!r})" for k in config
                           if k not in free and old.get(k) != config[k]}
                if not self._steps():                     # before the first checkpoint all may change
                    changed = {}
                stuck = [text for k, text in changed.items() if k in fixed]
                if stuck:
                    return (f"--run={self.folder} was started with another config: {', '.join(stuck)} cannot "
                            f"change within a run. Take the old values, or another --run "
                            f"(--init={self.folder}/model starts from this one)")
                if changed and not allow_changed:
                    return (f"--run={self.folder} was started with another config: "
                            f"{', '.join(changed.values())}. Take the old values, another --run, or "
                            f"--allow_changed=True to go on with the new ones")
            for name in self._saved():                    # what a killed run left half-written
                if ".tmp" in name:
                    shutil.rmtree(os.path.join(self.checkpoints, name))
            write_atomic(path, json.dumps(config, indent=2))
            self._save_source()
            self._log = open(os.path.join(self.folder, "log.txt"), "a")
        except (ValueError, TypeError) as e:
            return (f"--run={self.folder}: {path} is not a saved config ({e}); delete the folder or give "
                    f"another --run")
        except OSError as e:
            return f"--run={self.folder}: cannot write there ({e.strerror}); give another --run"

    def _save_source(self):
        here = os.path.dirname(os.path.abspath(__file__))
        with zipfile.ZipFile(os.path.join(self.folder, "source.zip.tmp"), "w", zipfile.ZIP_DEFLATED) as z:
            for room in ROOMS:
                for name in sorted(os.listdir(os.path.join(here, room))):
                    if name.endswith((".py", ".json")):
                        z.write(os.path.join(here, room, name), os.path.join(room, name))
        os.replace(os.path.join(self.folder, "source.zip.tmp"), os.path.join(self.folder, "source.zip"))

    def result(self, name):
        """A finished run's result, a JSON file of its folder, or None."""
        if os.path.exists(self.path(name)):
            with open(self.path(name)) as f:
                return json.load(f)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def log(self, text):
        """To the terminal and log.txt."""
        if self.ranks.rank == 0:
            print(text, flush=True)
            with self.writing("log.txt"):
                self._log.write(text + "\n")
                self._log.flush()

    def metrics(self, **values):
        """One line of metrics.jsonl: the raw numbers behind the step line."""
        if self.ranks.rank == 0:
            with self.writing("metrics.jsonl"):
                if self._metrics is None:
                    self._metrics = open(self.path("metrics.jsonl"), "a")
                values = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                          for k, v in values.items()}
                self._metrics.write(json.dumps(values) + "\n")
                self._metrics.flush()

    def rewind(self, step):
        """Drops what metrics.jsonl says of later than `step` (and that step's evaluation, which is made
        again). Returns the lines that stay, on every rank."""
        kept = []
        if self.ranks.rank == 0 and os.path.exists(self.path("metrics.jsonl")):
            kept = [line for line in read_lines(self.path("metrics.jsonl"))
                    if line["step"] < step or (line["step"] == step and "eval" not in line)]
            with self.writing("metrics.jsonl"):
                write_atomic(self.path("metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in kept))
        return self.ranks.agree(kept)

    @contextlib.contextmanager
    def writing(self, what):
        """Turns a full disk, or whatever else keeps `what` from being written, into an InputError."""
        try:
            yield
        except (torch.OutOfMemoryError, dist.DistError):
            raise
        except (dcp.api.CheckpointException, OSError, RuntimeError) as e:  # torch's zip writer: RuntimeError
            free = shutil.disk_usage(self.folder).free / 1e6
            raise InputError(f"--run={self.folder}: {what} could not be written "
                             f"({str(e).strip().splitlines()[-1]}; {free:,.0f} MB are free); make room and "
                             f"start the run again, it goes on from the last complete checkpoint") from None

    # -- checkpoints ----------------------------------------------------------------------------------------

    def latest(self):
        """The step of the newest complete checkpoint, or None; agreed on by all ranks."""
        return self.ranks.agree(max(self._steps(), default=None) if self.ranks.rank == 0 else None)

    def _saved(self):
        return os.listdir(self.checkpoints) if os.path.isdir(self.checkpoints) else []

    def _steps(self):
        return sorted(int(n[5:]) for n in self._saved() if re.fullmatch(r"step_\d+", n))

    def _at(self, step):
        return os.path.join(self.checkpoints, f"step_{step:06d}")

    def restore(self, state, step):
        """Loads checkpoint `step` into the tensors of `state`; any number of ranks may have written it.
        Returns state."""
        try:
            self._verify(self._at(step))
            dcp.load(state, checkpoint_id=self._at(step))
        except (dcp.api.CheckpointException, OSError, EOFError, ValueError, RuntimeError,
                zipfile.BadZipFile) as e:
            raise InputError(f"--run={self.folder}: checkpoint {self._at(step)} cannot be read "
                             f"({(str(e).strip() or repr(e)).splitlines()[-1]}); delete it to go on from the "
                             f"one before") from None
        return state

    def _verify(self, folder):
        """Every byte against the checksums written with it; the ranks share the work. Of a checkpoint's
        pieces, each a zip of torch.save, torch.load does not look at the checksums."""
        with (open(os.path.join(folder, ".metadata"), "rb") as f,
              open(os.path.join(folder, "metadata.crc32")) as g):
            if zlib.crc32(f.read()) != int(g.read()):
                raise ValueError(".metadata is damaged")
        pieces = dcp.FileSystemReader(folder).read_metadata().storage_data.values()
        pieces = sorted((p.relative_path, p.offset, p.length) for p in pieces)
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
        temporary = self._at(step) + ".tmp"
        with self.writing(f"the checkpoint of step {step}"):
            self.pending = (dcp.async_save(state, checkpoint_id=temporary, process_group=self.ranks.side),
                            step, keep)

    def poll(self):
        """Makes a checkpoint visible once it is complete; never waits."""
        if self.pending is not None and self.pending[0].done():
            self.finish()

    def finish(self):
        """Waits for the checkpoint under way, if any, and makes it visible."""
        if self.pending is None:
            return
        (future, step, keep), self.pending = self.pending, None
        with self.writing(f"the checkpoint of step {step}"):
            future.result()
            if self.ranks.rank == 0:                      # the metadata comes last, after every rank's data
                with open(os.path.join(self._at(step) + ".tmp", ".metadata"), "rb") as f:
                    write_atomic(os.path.join(self._at(step) + ".tmp", "metadata.crc32"),
                                 str(zlib.crc32(f.read())))
                os.rename(self._at(step) + ".tmp", self._at(step))
                self.prune(keep)

    def prune(self, keep):
        """Deletes all but the newest `keep` complete checkpoints (0 = keeps all)."""
        if keep and self.ranks.rank == 0:
            for step in self._steps()[:-keep]:
                os.rename(self._at(step), self._at(step) + ".tmp")  # half-deleted is never taken for complete
                shutil.rmtree(self._at(step) + ".tmp")

# -- hardware ----------------------------------------------------------------------------------------------

# bf16 dense, data sheets
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "B200": 2250, "L40S": 362, "4090": 165}


def peak_tflops(device, dtype):
    """The rate MFU is measured against, TFLOP/s: a GPU's data sheet; a CPU's own matrix product, timed
    here."""
    if device.type == "cuda" and dtype == torch.float32:
        raise InputError("no float32 peak rates are listed; give --peak_tflops=...")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, value in PEAK_TFLOPS.items():
            if key in name:
                return float(value)
        raise InputError(f"no peak rate known for {name!r}; give --peak_tflops=...")
    n = 1024
    a, best = torch.randn(n, n, dtype=dtype), float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best / 1e12
