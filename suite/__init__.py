"""What a model is measured on, and how sure the figures are. Only leaderboards loads torch.

    intervals       scores with their 95 % intervals, paired gains, pass@k, tables of text
    benchmarks      the paper's seven: SUITE, Problem, Task, suite_task(); both protocols' prompts
    ruler           RULER's 13 long-context tasks: example(), score(), read_texts()
    tasks           tasks by their names: task_names(), make_task(), averages()
    leaderboards    the Open LLM Leaderboards by lm-evaluation-harness: Adapter, evaluate(), lb_v1(), lb_v2()
"""
