#!/usr/bin/env bash
# What `make demo` runs: the study (study/study.sh) cut to one chain of under ten minutes on two cores. A toy base, mid-
# trained on the paper's mixture, then RL on math, and half as much on the base itself; all evaluated and analysed,
# one report. The same command goes on where it was killed.
set -euo pipefail
export OMP_NUM_THREADS=1                     # two stages at a time, a core each: a second thread gains a toy nothing
run=${PYTHON:-.venv/bin/python} base=runs/base/model mt=runs/mt/model rl=runs/rl/model
mkdir -p runs
$run - <<'END'
import verify
try:
    verify.check_sandbox()
except verify.SandboxMissing as missing:     # the rest of the demo goes on, and its page has a cell that says so
    print(f"toy-code will be sampled but not graded: {missing}")
END

second_core() {                              # a job of its own, ended with this script; prints into a file
  set -m
  "$@" >>runs/second-core.txt &
  set +m
  trap "kill -- -$! 2>/dev/null || true" EXIT
}
score() { $run evaluate.py --model=toy --init=runs/$1/model --out=runs/eval/$1; }
of_base() { score base; $run rl.py --model=toy --init=$base --steps=25 --out=runs/rl-base; }
of_mt() { score mt; $run analyze.py weights $base $mt; }

$run midtrain.py --model=toy --mixture=base --steps=300 --out=runs/base
second_core of_base
$run midtrain.py --model=toy --init=$base --out=runs/mt
wait $!
second_core of_mt
$run rl.py --model=toy --init=$mt --export_at=5,10,20,30,40 --out=runs/rl
wait $!
second_core score rl
$run analyze.py weights $mt $rl --null=runs/rl --rank=sampled
$run analyze.py cka $base $mt $rl
$run analyze.py trajectory runs/rl $mt $base
$run analyze.py landscape $base $mt $rl --path=9 --grid=3 --problems=50
wait $!
$run analyze.py compare runs/eval/base runs/eval/mt runs/eval/rl --out=runs/eval
$run analyze.py behaviour runs/eval/base runs/eval/mt runs/eval/rl
$run analyze.py report runs/mt runs/rl runs/eval runs/analysis --out=runs/report
$run tests/check_demo.py runs
