"""The two Open LLM Leaderboards (LB-V1, LB-V2) by lm-evaluation-harness: our models behind its interface, and
the scores that it does not make itself.

    adapter = Adapter(model, engine(model))                     # generate.py's engine, of the same weights
    lb_v1(evaluate(adapter, TASKS["lb_v1"])["results"])["mean"]
    lb_v2(evaluate(adapter, TASKS["lb_v2"], use_cache="runs/eval/answers")["results"])

Tasks, few-shot examples and grading are the harness's (lm-eval 0.4.13, extras math and ifeval), as are the
rules of its own HFLM, by which the adapter tokenizes, truncates and scores. Prompts are plain text: these are
base models, there is no chat template.
"""

import functools
import itertools
import json
import math
from typing import NamedTuple

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from cli import InputError, did_you_mean
from model import project

# -- the adapter ---------------------------------------------------------------------------------------------


class Adapter(TemplateLM):
    """Log-probs from a Model, texts from an engine of the same weights. What both may read: engine.context
    tokens. row_tokens: of the texts that are scored in one pass. seed: of tasks that sample."""

    def __init__(self, model, engine, row_tokens=16384, seed=1):
        super().__init__()
        self.model, self.engine = model, engine
        self.row_tokens = row_tokens
        self.seed = seed
        self.max_length = engine.context
        self.tokenizer_name = model.tokenizer.fingerprint

    tokenizer_name = None                                 # the base class has a property without a setter

    @property
    def eot_token_id(self):
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self):
        """What an empty context is: the bos, or of a model without one the eos."""
        return (self.model.tokenizer.bos_ids or [self.eot_token_id])[0]

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """Ids with the bos in front where the model has one, unless add_special_tokens is False. A bos that
        the text spells is text."""
        bos_ids = [] if add_special_tokens is False else self.model.tokenizer.bos_ids
        return bos_ids + self.model.tokenizer.encode(string)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        """[(key or None, context ids, continuation ids)] -> [(log-prob of the continuation in nats, whether
        greedy decoding would write it)]. Texts are cut on the left to the context; those that differ in the
        last id alone (the letters of a multiple choice) are read once."""
        requests_of = {}                                  # {text that is read: its requests' indices}
        for i, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(f"a continuation has {len(continuation)} tokens; give 1 to --context="
                                 f"{self.max_length}")
            text = (context + continuation)[-self.max_length - 1:-1]
            requests_of.setdefault(tuple(text), []).append(i)
        answers = [None] * len(requests)
        rows = tqdm(self.rows(requests_of), desc="log-probs", unit="row", leave=False,
                    disable=disable_tqdm or None)
        for row in rows:
            logprobs, greedy = self.score(row, requests_of, requests)
            start = 0                                     # of a request's tokens
            for i in itertools.chain.from_iterable(requests_of[text] for text in row):
                key, _, continuation = requests[i]
                tokens = slice(start, start + len(continuation))
                answers[i] = logprobs[tokens].sum().item(), bool(greedy[tokens].all())
                start += len(continuation)
                if key is not None:                       # None: a window of loglikelihood_rolling()
                    self.cache_hook.add_partial("loglikelihood", key, answers[i])
        return answers

    def rows(self, texts):
        """Texts in rows of about row_tokens: equal lengths together, the longest first."""
        rows, room = [], 0
        for text in sorted(texts, key=len, reverse=True):
            if len(text) > room:
                rows.append([])
                room = self.row_tokens
            rows[-1].append(text)
            room -= len(text)
        return rows

    def score(self, row, requests_of, requests):
        """One pass over a row of texts: fp32 log-prob, and whether it is the most probable, of every token of
        the continuations, one after the other: (2,) of (tokens,). The distribution is over all rows of the
        head, as HFLM's."""
        ids, docs = [], []                                # of the row: token ids, which text each is of
        where, targets = [], []                           # places in the row, and the ids they must predict
        for document, text in enumerate(row):
            ids += text
            docs += [document] * len(text)
            for i in requests_of[text]:                   # a text's last token predicts its continuation's
                continuation = requests[i][2]
                where += range(len(ids) - len(continuation), len(ids))
                targets += continuation
        device = self.model.trunk.embed.weight.device
        where = torch.tensor(where, device=device)
        targets = torch.tensor(targets, device=device)[:, None]

        def head(hidden, weight, scale):
            scored = []
            for start in range(0, len(where), 512):       # few logits at a time
                places, wanted = where[start:start + 512], targets[start:start + 512]
                logits = project(hidden[places], weight, scale, None)
                logprobs = logits.gather(1, wanted) - logits.logsumexp(-1, keepdim=True)
                greedy = logits.argmax(-1, keepdim=True) == wanted
                scored.append(torch.cat([logprobs, greedy], 1))
            return torch.cat(scored).cpu()

        tokens, docs = torch.tensor([ids], device=device), torch.tensor([docs], device=device)
        return self.model(tokens, docs, head, [len(text) for text in row]).unbind(1)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-probs of whole texts, each token predicted once, from windows as long as the context."""
        windows, request_of_window = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                request_of_window.append(i)
        answers = self._loglikelihood_tokens(windows, disable_tqdm)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(request_of_window, answers, strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        """Texts up to the first of `until` or the eos, requests of the same settings together; greedy unless
        the task samples. A prompt is cut on the left until max_gen_toks fit behind it."""
        groups = {}                                       # {settings as text: indices of requests}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        answers = [None] * len(requests)

        def keep(group, k, _, sample):                    # as each one ends: a killed run has them
            i = group[k]
            answers[i] = sample.text
            self.cache_hook.add_partial("generate_until", requests[i].args, sample.text)

        for group in groups.values():
            settings = normalize_gen_kwargs(requests[group[0]].args[1], 256)         # HFLM's default length
            until, new_tokens = settings.pop("until"), settings.pop("max_gen_toks")
            temperature, top_p = settings.pop("temperature", 1.0), settings.pop("top_p", 1.0)
            if not settings.pop("do_sample"):
                temperature = 0.0
            if settings or new_tokens >= self.max_length:
                raise InputError(f"generation_kwargs: max_gen_toks is {new_tokens}, give less than --context="
                                 f"{self.max_length}; unknown: {', '.join(settings) or 'none'} (known: "
                                 f"until, max_gen_toks, do_sample, temperature, top_p)")
            most = self.max_length - new_tokens           # tokens of a prompt
            prompts = [self.tok_encode(requests[i].args[0])[-most:] for i in group]
            self.engine.generate(prompts, max_new_tokens=new_tokens, temperature=temperature, top_p=top_p,
                                 seed=self.seed, stop=[*until, self.eot_token_id],
                                 on_sample=functools.partial(keep, group))
        return answers


# -- the benchmarks ------------------------------------------------------------------------------------------

# names, and with how many examples (None: as the task says). LB-V1 is what the harness's group `openllm` is
# meant to be: that of 0.4.13 runs one of MMLU's 57 subjects, since its `task: mmlu` renames all to one name
TASKS = {
    "lb_v1": dict(arc_challenge=25, hellaswag=10, truthfulqa_mc2=0, mmlu=5, winogrande=5, gsm8k=5),
    "lb_v2": dict.fromkeys(f"leaderboard_{name}" for name in (
        "ifeval", "bbh", "math_hard", "gpqa", "musr", "mmlu_pro")),
}


def evaluate(adapter, names, limit=None, use_cache=None, task_manager=None):
    """Runs tasks of the harness: names, or {name: number of examples} as in TASKS; returns simple_evaluate's
    results, versions, n-shot and n-samples. limit: of each task's questions. use_cache: a file of answers
    from which a killed run goes on; one a checkpoint, since answers are looked up by the request alone."""
    manager = task_manager or TaskManager()
    shots = names if isinstance(names, dict) else dict.fromkeys(names)
    results = {"results": {}, "versions": {}, "n-shot": {}, "n-samples": {}}
    # One by one, each with fresh seeds: GPQA shuffles by the global RNG while loading; `datasets` keeps that
    # order. (With its caching disabled, the harness would shuffle again between asking and grading.)
    for name in shots:
        if name not in manager.all_tasks:
            raise InputError(f"--tasks: unknown task {name!r}{did_you_mean(name, manager.all_tasks)} "
                             f"({len(manager.all_tasks)} are known)")
        try:
            of_task = simple_evaluate(
                adapter, tasks=[name], num_fewshot=shots[name], limit=limit, use_cache=use_cache,
                task_manager=manager, log_samples=False, random_seed=0, numpy_random_seed=1234,
                torch_random_seed=1234, fewshot_random_seed=1234,
                bootstrap_iters=1000)                     # not of means, which have a closed form
        except (ConnectionError, FileNotFoundError) as e:
            raise InputError(f"--tasks: {name} has no data ({str(e).splitlines()[0]}). Gated data needs "
                             f"HF_TOKEN; offline, bring the cache of a machine that has run it and set "
                             f"HF_HUB_OFFLINE=1") from None
        for part, values in results.items():
            values.update(of_task[part])
    return results


# -- their scores --------------------------------------------------------------------------------------------

class Benchmark(NamedTuple):
    """What a benchmark's score is made of: the mean of these metrics, over these rows of the results."""
    metrics: list
    guesses: dict                        # {row of the results: score of a guess}


LB_V1 = {
    "arc_challenge": Benchmark(["acc_norm,none"], {"arc_challenge": 0}),
    "hellaswag": Benchmark(["acc_norm,none"], {"hellaswag": 0}),
    "truthfulqa_mc2": Benchmark(["acc,none"], {"truthfulqa_mc2": 0}),
    "mmlu": Benchmark(["acc,none"], {"mmlu": 0}),
    "winogrande": Benchmark(["acc,none"], {"winogrande": 0}),
    "gsm8k": Benchmark(["exact_match,strict-match"], {"gsm8k": 0}),
}

# how many choices a question has (doc_to_choice in lm_eval/tasks/leaderboard/bbh_mc)
_BBH = dict(
    boolean_expressions=2, causal_judgement=2, date_understanding=6, disambiguation_qa=3, formal_fallacies=2,
    geometric_shapes=11, hyperbaton=2, logical_deduction_five_objects=5, logical_deduction_seven_objects=7,
    logical_deduction_three_objects=3, movie_recommendation=6, navigate=2, object_counting=19,
    penguins_in_a_table=5, reasoning_about_colored_objects=18, ruin_names=6,
    salient_translation_error_detection=6, snarks=2, sports_understanding=2, temporal_sequences=4,
    tracking_shuffled_objects_five_objects=5, tracking_shuffled_objects_seven_objects=7,
    tracking_shuffled_objects_three_objects=3, web_of_lies=2)
_MUSR = dict(murder_mysteries=2, object_placements=5, team_allocation=3)
_MATH = "algebra counting_and_prob geometry intermediate_algebra num_theory prealgebra precalculus".split()
LB_V2 = {
    "ifeval": Benchmark(["prompt_level_strict_acc,none", "inst_level_strict_acc,none"],
                        {"leaderboard_ifeval": 0}),
    "bbh": Benchmark(["acc_norm,none"], {f"leaderboard_bbh_{task}": 1 / n for task, n in _BBH.items()}),
    "math": Benchmark(["exact_match,none"], {f"leaderboard_math_{task}_hard": 0 for task in _MATH}),
    # over all questions, as the leaderboard
    "gpqa": Benchmark(["acc_norm,none"], {"leaderboard_gpqa": 1 / 4}),
    "musr": Benchmark(["acc_norm,none"], {f"leaderboard_musr_{task}": 1 / n for task, n in _MUSR.items()}),
    "mmlu_pro": Benchmark(["acc,none"], {"leaderboard_mmlu_pro": 1 / 10}),
}


def scores(results, board):
    """{benchmark: percent, ..., "mean": ..., "stderr": the same keys}. A row counts from its guess, which is
    0, to 1, which is 100; below the guess it is 0. Then rows are averaged, then benchmarks. Standard errors
    are scaled alike and combined as of independent rows; None where the harness has none. Of two metrics on
    the same answers (IFEval) the first one's is taken: they rise and fall together."""
    missing = [f"{row} ({metric})" for benchmark in board.values() for row in benchmark.guesses
               for metric in benchmark.metrics if metric not in results.get(row, {})]
    if missing:
        raise InputError(f"{len(missing)} results are missing: {', '.join(missing)}; run their tasks too")
    percents, errors = {}, {}
    for name, benchmark in board.items():
        percents[name], errors[name] = benchmark_score(results, benchmark)
    percents["mean"] = sum(percents.values()) / len(percents)
    errors["mean"] = math.hypot(*errors.values()) / len(errors)
    known = {name: None if math.isnan(error) else error for name, error in errors.items()}
    return percents | {"stderr": known}


def benchmark_score(results, benchmark):
    """(percent, its standard error, nan where the harness has none) of a Benchmark."""
    metrics = benchmark.metrics
    percents, errors = [], []
    for row, guess in benchmark.guesses.items():
        value = sum(results[row][metric] for metric in metrics) / len(metrics)
        percents.append(100 * max(0.0, value - guess) / (1 - guess))
        error = results[row].get(metrics[0].replace(",", "_stderr,"))
        if not isinstance(error, float):                  # missing, or "N/A"
            error = math.nan
        errors.append(100 * error / (1 - guess))
    return sum(percents) / len(percents), math.hypot(*errors) / len(errors)


def lb_v1(results):
    """Open LLM Leaderboard 1: the plain mean of six; mmlu is the harness's mean over all questions."""
    return scores(results, LB_V1)


def lb_v2(results):
    """Open LLM Leaderboard 2: normalised, and from the rows of the subtasks, since the harness's own group
    rows are raw averages over questions; but GPQA, a task without subtasks there
    (huggingface.co/docs/leaderboards/open_llm_leaderboard/normalization)."""
    return scores(results, LB_V2)


SCORERS = {"lb_v1": lb_v1, "lb_v2": lb_v2}
