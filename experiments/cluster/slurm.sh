#!/bin/bash
# One sweep on several nodes of a SLURM cluster; every GPU runs a trial of its own.
#
#   sbatch experiments/cluster/slurm.sh experiments/pet_r101.yaml --data /shared/data --weights /shared/weights
#
# To be started in a checkout on a file system that all nodes see, with the project's environment active: results go to
# its results/. Two minutes before the time is over the steps that are running end, their trials are saved, and the job
# is queued again; it goes on where it was.
#SBATCH --job-name=ris-bench
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --output=slurm-%j.txt

set -euo pipefail
: "${1:?name an experiment: sbatch experiments/cluster/slurm.sh EXPERIMENT.yaml [flags of run_bench.py]}"

read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=6379
export RAY_USAGE_STATS_ENABLED=0
# Whoever knows the token may run code on these nodes.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH")

node=(ray start --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --block)
srun --nodes 1 --ntasks 1 --nodelist "$head" "${node[@]}" --head --node-ip-address "$head" --port "$port" &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    others=$((SLURM_JOB_NUM_NODES - 1))
    srun --nodes "$others" --ntasks "$others" --exclude "$head" "${node[@]}" --address "$head:$port" &
fi
until ray status --address "$head:$port" > /dev/null 2>&1; do sleep 2; done

python run_bench.py "$@" --address "$head:$port" &
sweep=$!
stop() {
    kill -TERM "$sweep"
    wait "$sweep" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap stop TERM
wait "$sweep"
