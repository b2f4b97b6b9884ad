#!/usr/bin/env bash
# One run of train.sbatch under a real SLURM, interrupted three ways, and the same run undisturbed: the same weights, bit for bit.
#     make test-slurm          # scripts/slurm/one_node.sh tests/slurm/preemption.sh
set -euo pipefail

repository=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(mktemp -d "${TMPDIR:-/tmp}/slurm_jobs.XXXXXX")
trap 'rm -rf "$folder"' EXIT
cd "$folder"
LIMIT=${LIMIT:-300} # seconds to wait for anything

say() { echo "$(date +%T) $*"; }

submit() { # submit NAME: two tasks on processors, no GPU; prints the job's number
    sbatch --parsable --job-name="$1" --gpus-per-node=0 --cpus-per-task=1 "$repository/scripts/slurm/train.sbatch" \
        --config configs/data/digits_lt.yaml --config configs/trainer/slurm.yaml --trainer.accelerator=cpu \
        --trainer.precision=32 --trainer.max_epochs=20 --model.lr_scheduler.init_args.T_max=20 --data.batch_size=8 \
        --checkpoint.every_seconds=1 --trainer.enable_model_summary=false
}

wait_for() { # wait_for WHAT COMMAND...
    local what=$1 end=$((SECONDS + LIMIT))
    shift
    until "$@"; do
        if ((SECONDS > end)) || scontrol show job | grep -q "JobState=FAILED"; then
            say "no: $what"
            cat ./*.out
            exit 1
        fi
        sleep 0.5
    done
    say "$what"
}

checkpoint() { echo "logs/slurm-$1/digits_lt/imbsam/version_0/checkpoints/last.ckpt"; }
started() { grep -q "start $2\$" "interrupted-$1.out" 2>/dev/null && touch -a "$folder/start-$2"; }
training() { [[ $(checkpoint "$1") -nt $folder/start-$2 ]]; }
state() { [[ $(squeue --noheader --job "$1" --format=%T 2>/dev/null) == "$2" ]]; }
completed() { scontrol show job "$1" | grep -q "JobState=COMPLETED"; }

say "SLURM $(sbatch --version | cut -d' ' -f2), partitions $(sinfo --noheader --format=%P | paste -sd' ')"
job=$(submit interrupted)
say "job $job submitted: two tasks"

wait_for "job $job runs, start 1" started "$job" 1
wait_for "it trains: a first last.ckpt" training "$job" 1
say "scancel --signal=USR1 --batch $job: what SLURM does before the time limit"
scancel --signal=USR1 --batch "$job"

wait_for "it is back in the queue" state "$job" PENDING
wait_for "job $job runs, start 2" started "$job" 2
wait_for "it trains: a newer last.ckpt" training "$job" 2
urgent=$(sbatch --parsable --partition=urgent --ntasks=2 --output=/dev/null --wrap "sleep 1")
say "job $urgent in partition urgent wants the node: SLURM preempts job $job"

wait_for "it is back in the queue" state "$job" PENDING
wait_for "job $job runs, start 3" started "$job" 3
wait_for "it trains: a newer last.ckpt" training "$job" 3
say "scontrol requeue $job: TERM to everything at once, as for a preemption without GraceTime"
scontrol requeue "$job"

wait_for "it is back in the queue" state "$job" PENDING
wait_for "job $job runs, start 4" started "$job" 4
wait_for "it has finished" completed "$job"

reference=$(submit undisturbed)
say "job $reference submitted: the same, left alone"
wait_for "it has finished" completed "$reference"

echo
for file in interrupted-*.out undisturbed-*.out; do
    echo "--- $file"
    cat "$file"
done
echo
python - "$(checkpoint "$job")" "$(checkpoint "$reference")" <<'PYTHON'
import sys

import torch

first, second = (torch.load(path, weights_only=True) for path in sys.argv[1:])
for name, other in second["state_dict"].items():
    assert torch.equal(first["state_dict"][name], other), f"{name} differs"
assert first["global_step"] == second["global_step"]
print(f"{len(second['state_dict'])} tensors after {second['global_step']} steps: bit for bit the same")
PYTHON
