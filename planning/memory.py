"""Memory of a training step on one GPU, by arithmetic, and what is said of it.

What a rank of `runtime.shard` holds at the moments of a step that may be its peak: by what each op saves for
its backward pass (kernels/, torch's Linear and attention), and by the order in which FSDP2 gathers, frees and
reduces. On GPUs, with Triton's kernels. docs/memory.md has it beside traces of real steps.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from cli import InputError
from kernels.loss import triton_chunk
from model import WINDOW_BLOCK, Arch, Model

SCAN_CHUNK = 256                                # tokens of the Triton scan's chunk


class Activations(NamedTuple):
    """Bytes a token that a sublayer holds in training."""
    kept: int                                   # until its backward pass
    products: int                               # what selective keeps: outputs of products and of attention
    gradients: int                              # of activations, the most at a time of its backward pass


@dataclass(frozen=True)
class TrainingPass:
    """What decides how much memory a training pass of one rank takes."""
    arch: Arch
    rows: int
    tokens_per_row: int
    number: int                                 # bytes of a number in the dtype of the passes: 2 or 4
    shards: int                                 # ranks that a matrix is cut over
    recompute: str                              # off, full, selective
    fused_attention: bool = True                # False: torch's plain one, which holds all scores
    only_attention: bool = False                # all other weights are frozen
    accumulates: bool = True                    # gradients of an earlier pass are there

    @property
    def tokens(self):
        return self.rows * self.tokens_per_row

    def trains(self, kind):
        """Whether weights of that sublayer ("a", "f", "m"), or of embedding and head (""), are trained."""
        return kind == "a" or not self.only_attention


def activations(work, kind):
    """`Activations` of a sublayer ("a", "f", "m"). In numbers a token, beside few of fp32 (1 / rms,
    log-sum-exp, time steps), it keeps the stream and its norm, and

        a   q, k, v and the output                                                   2 C + 2 (H + K) D
        f   gate and up (Nemotron-H: up), and the activation                         2 C + 3 F (2 F)
        m   in_proj's output (z, x B C, dt), the convolution's, y, y gated and normed

    and has, at the most, gradients of the stream, of the output projection's input and of what that is made
    from. A frozen matrix keeps no input."""
    arch, number = work.arch, work.number
    trained = work.trains(kind)
    stream = number * arch.C
    kept = stream + 4 + stream * trained                  # the norm's input, 1 / rms; its output, for dW
    gradients = stream * (1 if arch.residual_scale == 1.0 else 2)          # of the sum and of its scaled term
    if kind == "a":
        heads = number * arch.H * arch.D
        qkv = heads + 2 * number * arch.K * arch.D
        softmax, workspace = 4 * arch.H, 4 * arch.H * arch.D               # log-sum-exp; dq summed in fp32
        inputs = qkv
        if not work.fused_attention:
            softmax, workspace = _plain_attention(work)
            if not arch.window:
                inputs = 3 * heads                        # keys and values once for every query head
        return Activations(kept + inputs + heads + softmax,
                           products=qkv + heads + softmax + stream,
                           gradients=gradients + heads + qkv + workspace)
    if kind == "f":
        width = number * arch.F
        inputs = width if arch.family == "nemotron_h" else 2 * width       # of the activation
        return Activations(kept + inputs + width * trained,
                           products=inputs + stream,
                           # where the output was kept, its gradient takes its place
                           gradients=gradients + inputs + width * (not trained))
    sizes = arch.mamba
    inner = number * sizes.inner
    projected = number * (sizes.inner + sizes.conv_channels + sizes.heads)
    convolved = number * sizes.conv_channels
    steps = 8 * sizes.heads                               # before softplus and after it
    kept += projected + convolved + steps + inner + 4 * sizes.groups + inner * trained
    return Activations(kept, products=projected + stream,
                       gradients=gradients + 2 * inner + _scan_backward(sizes, number))


def _plain_attention(work):
    """Bytes a token of the softmax that torch's plain attention keeps, and of its two gradients: over a row's
    keys, or with a window over those of a block of queries, a block after the other."""
    number, heads, T = work.number, work.arch.H, work.tokens_per_row
    window = work.arch.window
    if not window or T <= window:
        return number * heads * T, 2 * number * heads * T
    block = min(window, WINDOW_BLOCK)
    seen = [min(start, window) + block for start in range(0, T, block)]
    return number * heads * sum(seen) // len(seen), 2 * number * heads * max(seen) // len(seen)


def _scan_backward(sizes, number):
    """Bytes a token that kernels/ssd.py's backward pass holds: the gradient of x, the states that enter
    chunks and their gradients, scores and theirs, and fp32 numbers of each head."""
    tiles = SCAN_CHUNK // (64 if number == 2 else 32)
    parts = math.ceil(sizes.heads / sizes.groups / 16)    # programs that share a group's heads
    states = 2 * number * sizes.inner * sizes.state // SCAN_CHUNK
    scores = number * sizes.groups * SCAN_CHUNK * (1 + parts)
    matrices = 8 * parts * sizes.groups * sizes.state     # gradients of B and C, fp32
    return number * sizes.inner + states + scores + matrices + 4 * sizes.heads * (4 + 2 * tiles + 3)


class Matrices(NamedTuple):
    """Numbers of a module's matrices."""
    whole: int
    shard: int                                  # of one rank: rows are padded to the same number for all


class Shapes(NamedTuple):
    """Shapes of a model's matrices, which are sharded; vectors are whole on every rank."""
    embed: list
    layers: list                                # of each layer: {kind of sublayer: its matrices' shapes}
    vectors: int                                # numbers of all


@functools.cache
def matrix_shapes(arch):
    """`Shapes` of an architecture."""
    def of(module):
        return [p.shape for p in module.parameters() if p.ndim >= 2]

    with torch.device("meta"):
        model = Model(arch)
    layers = []
    for layer, kinds in zip(model.trunk.layers, arch.layers, strict=True):
        mixers = [getattr(layer, sublayer.mixer) for sublayer in layer.sublayers]
        layers.append({kind: of(mixer) for kind, mixer in zip(kinds, mixers, strict=True)})
    vectors = sum(p.numel() for p in model.parameters() if p.ndim < 2)
    return Shapes(of(model.trunk.embed), layers, vectors)


class TrainingMemory:
    """Bytes of one rank by what they hold, {text: bytes}, at the moments of a step that may be its peak:

        states()    what is there all the time
        moments()   {moment: parts} of a forward and a backward pass; `peak` is the largest

    In the head's loss all layers' activations are kept, and the head is gathered. In the backward pass of a
    layer those of the layers before it are, and its own, made again or not; its weights are gathered, the
    next ones on their way, and the gradients of the layer behind it being reduced. AdamW takes no memory of
    its own. head: bytes of the head's loss (`HeadMemory`)."""

    def __init__(self, work, head):
        self.work = work
        self.head = head
        self.tied = work.arch.tied
        shapes = matrix_shapes(work.arch)
        self.vectors = shapes.vectors
        self.embed = self.matrices(shapes.embed)
        self.layers = []                                  # of each layer: {kind of sublayer: Matrices}
        for layer in shapes.layers:
            self.layers.append({kind: self.matrices(each) for kind, each in layer.items()})
        # The first layer that is trained: those before it keep nothing, and have no backward pass.
        trained = [any(map(work.trains, kinds)) for kinds in work.arch.layers]
        self.first = trained.index(True) if any(trained) else len(trained)
        self.sublayers = {kind: activations(work, kind) for kind in "".join(work.arch.layers)}

    # -- numbers of matrices -------------------------------------------------------------------------------

    def matrices(self, shapes):
        whole = sum(shape.numel() for shape in shapes)
        rows = [-(-shape[0] // self.work.shards) for shape in shapes]
        shard = sum(n * shape[1:].numel() for n, shape in zip(rows, shapes, strict=True))
        return Matrices(whole, shard)

    def ends(self):
        """Embedding and head, each as `Matrices`; a tied head is the embedding."""
        return [self.embed] if self.tied else [self.embed, self.embed]

    def gathered(self, i):
        """Of layer i, whole."""
        return sum(matrices.whole for matrices in self.layers[i].values())

    def trained(self, i):
        """Of layer i, those that get gradients, whole."""
        return sum(matrices.whole for kind, matrices in self.layers[i].items() if self.work.trains(kind))

    def trained_shards(self, first=0):
        """Of one rank, those that get gradients: of the layers from `first` on, of embedding and head."""
        total = sum(end.shard for end in self.ends()) if self.work.trains("") else 0
        for layer in self.layers[first:]:
            total += sum(matrices.shard for kind, matrices in layer.items() if self.work.trains(kind))
        return total

    # -- bytes ---------------------------------------------------------------------------------------------

    def states(self):
        """Weights and Adam's moments, always there."""
        work = self.work
        weights = self.vectors + sum(end.shard for end in self.ends())
        for layer in self.layers:
            weights += sum(matrices.shard for matrices in layer.values())
        trained = self.trained_shards() + self.vectors * work.trains("")
        return {"weights, fp32, sharded": 4 * weights,
                "Adam moments, fp32, sharded": 8 * trained}

    def gradients(self, first):
        """Reduced gradients, where the layers from `first` on have had their backward pass."""
        if self.work.accumulates:
            first = 0
        vectors = self.vectors * self.work.trains("")
        reduced = self.trained_shards(first) if first < len(self.layers) else 0
        return 4 * (reduced + vectors)

    def kept(self, layers):
        """Activations that so many first layers keep for their backward passes."""
        work = self.work
        stream = work.number * work.arch.C
        total = 0
        for kinds in work.arch.layers[self.first:layers]:
            each = [self.sublayers[kind] for kind in kinds]
            if work.recompute == "off":
                total += sum(sublayer.kept for sublayer in each)
            else:
                total += stream                           # the layer's input
            if work.recompute == "selective":
                total += sum(sublayer.products for sublayer in each)
        return total * work.tokens

    def on_its_way(self, numbers):
        """Bytes of a collective's buffer of so many numbers beside what it is copied to or from."""
        return self.work.number * numbers * (self.work.shards > 1)

    def parts(self, gathered, reduced_from, kept, layer=0, unreduced=0, loss=0):
        """{text: bytes} of a moment."""
        work = self.work
        dtype = "bfloat16" if work.number == 2 else "float32"
        return self.states() | {
            "gradients, fp32, sharded": self.gradients(reduced_from),
            f"weights gathered in {dtype}, and on their way": gathered,
            f"activations kept, recompute={work.recompute}": kept,
            "a layer's activations and their gradients": layer,
            "gradients of matrices, unreduced and being reduced": unreduced,
            "the head's loss: a chunk of logits, gradients": loss,
        }

    def moments(self):
        """{moment: {text: bytes}}."""
        work = self.work
        last = len(self.layers) - 1
        stream = work.number * work.arch.C * work.tokens
        embedding = work.number * self.embed.whole
        kept = self.kept(last + 1) + stream               # the final norm's input
        # The buffer of what was gathered last is freed when the forward pass has ended.
        arrived = self.on_its_way(self.gathered(last) if self.tied else self.embed.whole)
        moments = {"in the head's loss": self.parts(
            embedding + arrived, last + 1, kept + stream, loss=self.head.forward)}
        there = embedding * (self.tied or self.head.gathered_in_backward)
        moments["in the backward pass of the head's loss"] = self.parts(
            there + self.on_its_way(self.gathered(last)), last + 1, kept, loss=self.head.backward)
        for i in range(last, self.first - 1, -1):
            moments[f"in the backward pass of layer {i + 1} of {last + 1}"] = self.layer_moment(i)
        return moments

    def layer_moment(self, i):
        """Parts of the backward pass of layer i, where its activations and gradients are the most."""
        work, number = self.work, self.work.number
        # This layer's weights were gathered, those of the one before it are on their way.
        gathered = number * self.gathered(i)
        if i > 0:
            gathered += self.on_its_way(self.gathered(i - 1))
        # The gradients of the unit before are being reduced; a tied embedding's wait for the end.
        unreduced = 0
        if i + 1 < len(self.layers):
            unreduced = 4 * self.trained(i + 1)
        elif work.trains("") and not self.tied:
            unreduced = 4 * self.embed.whole
        if self.tied:
            gathered += number * self.embed.whole
            unreduced += number * self.embed.whole * work.trains("")
        largest = max(self.within_layer(i), key=sum)
        layer, own_gradients = largest
        return self.parts(gathered, i + 1, self.kept(i), layer=layer, unreduced=unreduced + own_gradients)

    def within_layer(self, i):
        """(bytes of activations and their gradients, of gradients of matrices) at each sublayer of layer i,
        when it has the gradients of its output projection, and when the layer ends."""
        work = self.work
        kinds = work.arch.layers[i]
        each = [self.sublayers[kind] for kind in kinds]
        matrices = list(self.layers[i].values())
        done = 0
        for s in reversed(range(len(kinds))):
            kept = sum(sublayer.kept for sublayer in each[:s + 1])
            trained = work.trains(kinds[s])
            output = output_projection(work.arch, kinds[s]) * trained
            yield (kept + each[s].gradients) * work.tokens, work.number * (done + output)
            done += matrices[s].whole * trained
        yield 3 * work.number * work.arch.C * work.tokens, work.number * done

    def scoring(self):
        """Bytes of a forward pass without gradients: the states, and a layer's activations or the head's
        loss, with what is gathered for them."""
        work = self.work
        stream = work.number * work.arch.C * work.tokens
        before = self.gathered(-1) if self.tied else self.embed.whole
        passes = [work.number * self.embed.whole + self.on_its_way(before) + 2 * stream + self.head.forward]
        for i, kinds in enumerate(work.arch.layers):
            largest = max(self.sublayers[kind].kept for kind in kinds) * work.tokens
            before = self.gathered(i - 1) if i else self.embed.whole
            embedding = work.number * self.embed.whole * self.tied
            gathered = work.number * self.gathered(i) + self.on_its_way(before)
            passes.append(embedding + gathered + stream + largest)
        return sum(self.states().values()) + max(passes)

    def peak(self):
        """(moment, {text: bytes}) of the largest."""
        return max(self.moments().items(), key=lambda item: sum(item[1].values()))


class HeadMemory(NamedTuple):
    """Bytes that a loss of the head holds beside the head's weights and the final norm's input and output."""
    forward: int
    backward: int
    gathered_in_backward: bool                  # an untied head: see `runtime.shard`


def sequence_bytes(arch, tokens, number):
    """Bytes that generation keeps of one sequence: keys and values of the tokens that attention still sees,
    the convolutions' last inputs, the scans' states in fp32. number: bytes of a number of the engine."""
    kinds = "".join(arch.layers)
    seen = min(tokens, arch.window or tokens)
    total = kinds.count("a") * 2 * arch.K * arch.D * seen * number
    if arch.mamba:
        sizes = arch.mamba
        inputs = (sizes.conv_width - 1) * sizes.conv_channels * number
        total += kinds.count("m") * (inputs + 4 * sizes.inner * sizes.state)
    return total


# What a GPU holds besides, of which no trace tells. Assumed, not yet measured.
CUDA_CONTEXT = 500_000_000                      # with the kernels that are loaded
NCCL_COMMUNICATOR = 32 * 2 * (4 << 20)          # channels x (send, receive) x NCCL_BUFFSIZE, 4 MiB by default
FRAGMENTATION = 0.05                            # of the traced sum: blocks of 2 MiB, a pool a stream
TOLERANCE = 0.1                                 # of the traced sum: how far it may be off
CARD = 80_000_000_000                           # bytes, where no GPU is here to be asked


def besides(traced, replicate, shards):
    """{text: bytes} of what a GPU holds besides the traced sum. A mesh of one dimension has one communicator,
    the world's; one of two has the world's and one each."""
    communicators = 3 if replicate > 1 and shards > 1 else 1
    if replicate * shards == 1:
        communicators = 0
    return {"CUDA context (assumed)": CUDA_CONTEXT,
            f"NCCL: communicators {communicators} x 32 channels x 2 x 4 MiB (assumed)":
                communicators * NCCL_COMMUNICATOR,
            f"fragmentation: {FRAGMENTATION:.0%} of the sum (assumed)": FRAGMENTATION * traced}


def needed_bytes(traced, replicate, shards):
    """Bytes that a GPU needs for the traced sum and what it holds besides."""
    return traced + sum(besides(traced, replicate, shards).values())


def part_lines(parts):
    """{text: bytes} as lines of GB; what takes nothing is left out."""
    return [f"  {part:63s} {size / 1e9:8.2f} GB" for part, size in parts.items() if size]


def attention_note(dtype):
    """What --dry_run says of attention in float32: a list of no or one line."""
    if dtype == "bfloat16":
        return []
    return ["float32: with torch's plain attention, which holds a row's scores; its memory-efficient kernel, "
            "where it runs, takes less"]


def card_bytes(gpu_gb):
    """Bytes of a GPU's memory: --gpu_gb's, or else this machine's first GPU's, or else 80 GB."""
    if gpu_gb:
        return gpu_gb * 1e9
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return CARD


def layout_knobs(cfg, world):
    """What to try of a stage's flags, for `changes_that_fit`: more ranks to a copy of the model, more
    recomputation."""
    modes = ["off", "selective", "full"]
    shards = world // cfg.replicate
    ranks = [shards * factor for factor in (2, 4, 8, 16)]
    return {"shard": [n for n in ranks if cfg.batch % (cfg.replicate * n) == 0],
            "recompute": modes[modes.index(cfg.recompute) + 1:]}


def changes_that_fit(cfg, knobs, fits):
    """What to give instead, a text: of each flag the nearest value that fits alone; where none does, of every
    two flags the nearest values that do together, and so on. knobs: {flag: values, the nearest first};
    fits(cfg) tries one."""
    def written(changes):
        return " ".join(f"--{flag}={value}" for flag, value in changes.items())

    def nearest(flags):
        for values in itertools.product(*(knobs[flag] for flag in flags)):
            changes = dict(zip(flags, values, strict=True))
            if fits(replace(cfg, **changes)):
                return written(changes)

    for count in range(1, len(knobs) + 1):
        found = [nearest(flags) for flags in itertools.combinations(knobs, count)]
        found = [text for text in found if text]
        if found:
            return "give " + ", or ".join(found)
    return "none of its flags makes it fit"


def memory_verdict(needed, card, advice):
    """The line of --dry_run on memory, in bytes. advice: a function that says what to change."""
    if needed <= card:
        return f"fits {card / 1e9:.0f} GB ({needed / 1e9:.1f} GB)"
    return f"does not fit {card / 1e9:.0f} GB ({needed / 1e9:.1f} GB): {advice()}"


def refuse_oversized(traced, device, advice):
    """InputError where this GPU surely cannot hold what the arithmetic says, even if it is 10 % too high.
    advice: a function that says what to change for a GPU of so many bytes."""
    card = torch.cuda.get_device_properties(device).total_memory
    least = (1 - TOLERANCE) * traced
    if least > card:
        raise InputError(f"--dry_run's arithmetic puts {traced / 1e9:.1f} GB on each GPU, which has "
                         f"{card / 1e9:.1f} GB; even {TOLERANCE:.0%} less does not fit: {advice(card)}")


def mfu_on_paper(arch):
    """Model FLOPs utilization of mid-training on H100s, reckoned with full recomputation, not yet measured:
    hybrids, dense models of about 8B, of about 24B."""
    if arch.mamba:
        return 0.30
    return 0.36 if arch.C > 4096 else 0.33


def output_projection(arch, kind):
    """Numbers of the matrix that brings a sublayer back to the stream."""
    widths = {"a": arch.H * arch.D, "f": arch.F, "m": arch.mamba and arch.mamba.inner}
    return widths[kind] * arch.C


def logits_bytes(arch, tokens, number):
    """Bytes of the largest chunk of logits, of Triton's kernels."""
    return min(triton_chunk(arch.V), tokens) * (-(-arch.V // 16) * 16) * number
