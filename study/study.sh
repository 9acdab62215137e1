#!/usr/bin/env bash
# The paper on a laptop: two toys (dense, hybrid) x three seeds, each a base that is mid-trained on the paper's
# three mixtures, RL on two mixes from each and from the base, all evaluated and analysed; then one report.
#
#     make study               # all six chains, two at a time; the same command goes on where it was killed
#     study/study.sh toy 1       # one chain: model and seed
#
# A cell is a folder of runs/study/MODEL-SEED: base; m, mc, mcs: the base, mid-trained on math, + code,
# + science; mcs@N: mcs in N steps; START+MIX: START, then RL on MIX. Delete a cell's folder, its score in eval/
# and all that began with it, and they are made again: with other lines below, another study.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1                     # a chain a core: a second thread gains a toy nothing
python=${PYTHON:-.venv/bin/python} study=runs/study

# code is graded in bubblewrap: without it this ends here and says what to install
$python -c 'import verify; verify.check_sandbox()'

if [ $# = 0 ]; then
  $python data.py toy --out=data/toy
  failed=0
  printf '%s\n' 'toy-h 1' 'toy 1' 'toy-h 2' 'toy 2' 'toy 3' 'toy-h 3' | xargs -P2 -L1 bash study/study.sh || failed=$?
  $python -m study.claims $study
  $python analyze.py report $study $study/toy-1/{mcs,mcs+mcs,eval/{base,mcs,mcs+mcs},analysis} --out=$study/report
  exit $failed                               # of a chain: its folder's log.txt says why
fi

model=$1 seed=$2 chain=$study/$1-$2
mkdir -p $chain
exec 3>&1 >>$chain/log.txt                   # stages keep their own logs too
say() { echo "$(date +%T) $chain: $*" >&3; }

midtrain() {                                 # cell, mixture, steps, what it begins with
  say midtrain $1
  $python midtrain.py --model=$model --mixture=$2 --steps=$3 --seed=$seed --out=$chain/$1 "${@:4}"
}

rl() {                                       # start, mix
  local mix=$([ $2 = mc ] && echo math+code || echo math+code+science)
  say rl $1+$2
  $python rl.py --model=$model --init=$chain/$1/model --domains=$mix --steps=20 --batch=8 --seed=$seed \
    --heldout=none --export_at=2,4,8,12,16 --out=$chain/$1+$2
}

evaluate() {                                 # cell
  say evaluate $1
  $python evaluate.py --model=$model --init=$chain/$1/model --samples=2 --seed=$seed \
    --tasks=toy-math+toy-code+toy-science --out=$chain/eval/$1
}

midtrain base base 300 --init=random:$model:$seed
midtrain mcs math+code+science 700 --init=$chain/base/model
midtrain mc math+code 700 --init=$chain/base/model
midtrain m math 700 --init=$chain/base/model
[ $model != toy ] || midtrain mcs@350 math+code+science 350 --init=$chain/base/model
for start in base m mc mcs; do rl $start mc; rl $start mcs; done
[ $model != toy ] || evaluate mcs@350
for cell in base m mc mcs {base,m,mc,mcs}+{mc,mcs}; do evaluate $cell; done

say analyze
base=$chain/base/model mcs=$chain/mcs/model both=$chain/mcs+mcs/model out=$chain/analysis
$python analyze.py compare $chain/eval/{base,mcs,mcs+mcs} --out=$out
$python analyze.py weights $base $mcs $chain/mc/model --null=$chain/mcs --out=$out
$python analyze.py weights $mcs $both --null=$chain/mcs+mcs --out=$out
$python analyze.py weights $base $chain/base+mcs/model --null=$chain/base+mcs --out=$out
$python analyze.py cka $base $mcs $both --out=$out
$python analyze.py trajectory $chain/mcs+mcs $mcs $base --out=$out
$python analyze.py trajectory $chain/base+mcs $base --out=$out
$python analyze.py landscape $base $mcs $both --path=9 --grid=3 --problems=50 --out=$out
say done
